// Kernels with a fault of each kind that the emulator is there to find, and the same without.
// tests/test_cuda_emulator.py knows under which schedules each is caught.
#include <algorithm>

#include "cuda/emulator/tests/test.h"
#include "cuda/vector.cuh"

namespace fastnn::cuda::tests {
namespace {

enum class Fault {
  none,
  barrier,  // one is missing, or is in the wrong place
  second_barrier,
  wait,        // for asynchronous copies
  wait_count,  // waits for one group too few
  tail_read,   // one element after the end
  tail_write,
  shared_read,
  shared_write,
  uninitialised,
  return_before,  // a warp-wide operation
  operation,      // lanes at different ones
  alignment,
};

constexpr int kThreads = 128;
constexpr int64_t kCount = 1000;  // an odd tail

// Launches kernel(arguments..., output) and compares `count` outputs with expected(i).
template <class Kernel, class Expected, class... Arguments>
std::string run(Memory& memory, Kernel kernel, int64_t blocks, size_t shared_bytes, int64_t count,
                const Expected& expected, const Arguments&... arguments) {
  float* output = memory.output<float>(count);
  launch("test", memory.queue(), kernel, dim3(static_cast<unsigned>(blocks)), kThreads, shared_bytes, arguments...,
         output);
  for (int64_t i = 0; i < count; ++i)
    expect(output[i] == expected(i), "expected " + std::to_string(expected(i)) + " at " + std::to_string(i) + ", got " +
                                         std::to_string(output[i]));
  return memory.check();
}

int64_t blocks_of(int64_t count) { return (count + kThreads - 1) / kThreads; }

float sum_of(const float* values, int64_t first, int64_t end) {
  float sum = 0;
  for (int64_t i = first; i < end; ++i) sum += values[i];
  return sum;
}

// Tree sum: each block adds up its elements in shared memory, half by half.
template <Fault fault>
__global__ void tree_sum_kernel(int64_t count, const float* input, float* sums) {
  begin_kernel();
  float* shared = shared_memory<float>();
  const int64_t i = global_thread();
  if (fault != Fault::uninitialised || i < count) shared[threadIdx.x] = i < count ? input[i] : 0;
  sync_block();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    if (fault != Fault::barrier) sync_block();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = shared[0];
}

template <Fault fault>
std::string tree_sum() {
  Memory memory;
  const float* input = memory.input<float>(kCount);
  return run(
      memory, tree_sum_kernel<fault>, blocks_of(kCount), kThreads * sizeof(float), blocks_of(kCount),
      [&](int64_t b) { return sum_of(input, b * kThreads, std::min((b + 1) * kThreads, kCount)); }, kCount, input);
}

// Row sums: one block adds up row after row, lanes by shuffles and warps through the same few slots.
template <Fault fault>
__global__ void row_sums_kernel(int64_t rows, const float* input, float* sums) {
  begin_kernel();
  float* slots = shared_memory<float>();
  for (int64_t row = 0; row < rows; ++row) {
    float sum = input[row * kThreads + threadIdx.x];
    for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (fault != Fault::second_barrier) sync_block();  // the last row's slots have been read
    if (threadIdx.x % kWarpThreads == 0) slots[threadIdx.x / kWarpThreads] = sum;
    if (fault != Fault::barrier) sync_block();
    sum = 0;
    for (int warp = 0; warp < kThreads / kWarpThreads; ++warp) sum += slots[warp];
    if (threadIdx.x == kThreads - 1 - row % kThreads) sums[row] = sum;
  }
}

template <Fault fault>
std::string row_sums() {
  constexpr int64_t kRows = 9;
  Memory memory;
  const float* input = memory.input<float>(kRows * kThreads);
  return run(
      memory, row_sums_kernel<fault>, 1, kThreads / kWarpThreads * sizeof(float), kRows,
      [&](int64_t row) { return sum_of(input, row * kThreads, (row + 1) * kThreads); }, kRows, input);
}

// Pipeline: while a stage is added up, the next one is on its way into the other of two buffers. Each thread loads a
// chunk of 16 bytes and adds the one that its neighbour has loaded.
template <Fault fault>
__global__ void pipeline_kernel(int stages, const float* input, float* sums) {
  begin_kernel();
  float* buffers = shared_memory<float>();  // (2, kThreads, 4)
  const auto load = [&](int stage) {
    const float* from = input + (stage * kThreads + threadIdx.x) * 4;
    if (stage < stages)
      copy_async<16>(buffers + (stage % 2 * kThreads + threadIdx.x) * 4, from + (fault == Fault::alignment), true);
    commit_copies();
  };
  const int neighbour = (threadIdx.x + 1) % kThreads;
  float sum = 0;
  load(0);
  for (int stage = 0; stage < stages; ++stage) {
    load(stage + 1);
    if (fault == Fault::wait_count)
      wait_for_copies<2>();
    else if (fault != Fault::wait)
      wait_for_copies<1>();
    if (fault != Fault::barrier) sync_block();
    for (int e = 0; e < 4; ++e) sum += buffers[(stage % 2 * kThreads + neighbour) * 4 + e];
    if (fault != Fault::second_barrier) sync_block();  // before the buffer is filled anew
  }
  sums[threadIdx.x] = sum;
}

template <Fault fault>
std::string pipeline() {
  constexpr int kStages = 5;
  Memory memory;
  const float* input = memory.input<float>(kStages * kThreads * 4 + 1);
  return run(
      memory, pipeline_kernel<fault>, 1, 2 * kThreads * 16, kThreads,
      [&](int64_t i) {
        float sum = 0;
        for (int stage = 0; stage < kStages; ++stage) {
          const int64_t first = (stage * kThreads + (i + 1) % kThreads) * 4;
          sum += sum_of(input, first, first + 4);
        }
        return sum;
      },
      kStages, input);
}

// Neighbours: each element plus the next one of its block, or the one before, if there is one.
template <Fault fault, int kStep>
__global__ void neighbours_kernel(int64_t count, const float* input, float* output) {
  begin_kernel();
  float* shared = shared_memory<float>();
  const int64_t i = global_thread();
  const int here = static_cast<int>(threadIdx.x), other = here + kStep;
  shared[here] = i < count + (fault == Fault::tail_read) ? input[i] : 0;
  if (fault == Fault::shared_write && here == 0) shared[kThreads] = 0;
  if (fault != Fault::barrier) sync_block();
  const bool has_other = other >= 0 && other < kThreads + (fault == Fault::shared_read);
  const float sum = shared[here] + (has_other ? shared[other] : 0);
  if (i < count + (fault == Fault::tail_write)) output[i] = sum;
}

template <Fault fault, int kStep = 1>
std::string neighbours() {
  Memory memory;
  const float* input = memory.input<float>(kCount);
  return run(
      memory, neighbours_kernel<fault, kStep>, blocks_of(kCount), kThreads * sizeof(float), kCount,
      [&](int64_t i) {
        const int64_t first = i / kThreads * kThreads, end = std::min(first + kThreads, kCount), other = i + kStep;
        return input[i] + (first <= other && other < end ? input[other] : 0);
      },
      kCount, input);
}

// Control flow: what all threads of a warp or a block must reach together.
template <Fault fault>
__global__ void together_kernel(const float* input, float* output) {
  begin_kernel();
  float* shared = shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x), lane = i % kWarpThreads;
  float value = input[i];
  if (fault == Fault::return_before && lane >= kWarpThreads / 2) {
    output[i] = input[i] + input[i ^ 1];
    return;
  }
  if (fault == Fault::operation && lane % 2 != 0) {
    uint32_t words[4];
    load_matrices_transposed(words, shared);
  }
  if (fault == Fault::second_barrier && lane < kWarpThreads / 2) sync_block();  // the others are at the shuffle
  value += shuffle_xor(value, 1);
  if (fault == Fault::barrier && i % 2 == 0) {
    shared[i] = value;
    sync_block();
  } else {
    shared[i] = value;
    sync_block();
  }
  output[i] = shared[i ^ 1];
}

template <Fault fault>
std::string together() {
  Memory memory;
  const float* input = memory.input<float>(kThreads);
  return run(
      memory, together_kernel<fault>, 1, kThreads * sizeof(float), kThreads,
      [&](int64_t i) { return input[i] + input[i ^ 1]; }, input);
}

// 16 bytes at a time from where they are not aligned to: the undefined behaviour sanitizer alone sees it.
template <Fault fault>
__global__ void vector_kernel(const float* input, float* output) {
  begin_kernel();
  const auto pack = load_pack<float, 4>(input + 4 * threadIdx.x + (fault == Fault::alignment));
  output[threadIdx.x] = pack.values[0] + pack.values[3];
}

template <Fault fault>
std::string vector() {
  Memory memory;
  const float* input = memory.input<float>(4 * kThreads + 1);
  return run(
      memory, vector_kernel<fault>, 1, 0, kThreads,
      [&](int64_t i) {
        return input[4 * i + (fault == Fault::alignment)] + input[4 * i + 3 + (fault == Fault::alignment)];
      },
      input);
}

}  // namespace

std::vector<Case> broken_cases() {
  return {
      {"correct/tree_sum", tree_sum<Fault::none>},
      {"broken/tree_sum_without_barrier", tree_sum<Fault::barrier>},
      {"broken/tree_sum_of_uninitialised_memory", tree_sum<Fault::uninitialised>},
      {"correct/row_sums", row_sums<Fault::none>},
      {"broken/row_sums_without_barrier_before_reading", row_sums<Fault::barrier>},
      {"broken/row_sums_without_barrier_after_reading", row_sums<Fault::second_barrier>},
      {"correct/pipeline", pipeline<Fault::none>},
      {"broken/pipeline_without_wait", pipeline<Fault::wait>},
      {"broken/pipeline_with_wait_for_too_few", pipeline<Fault::wait_count>},
      {"broken/pipeline_without_barrier_before_reading", pipeline<Fault::barrier>},
      {"broken/pipeline_without_barrier_before_refill", pipeline<Fault::second_barrier>},
      {"broken/pipeline_of_misaligned_copies", pipeline<Fault::alignment>},
      {"correct/neighbours", neighbours<Fault::none>},
      {"correct/neighbours_before", neighbours<Fault::none, -1>},
      {"broken/neighbours_without_barrier", neighbours<Fault::barrier>},
      {"broken/neighbours_before_without_barrier", neighbours<Fault::barrier, -1>},
      {"broken/neighbours_read_after_the_end", neighbours<Fault::tail_read>},
      {"broken/neighbours_write_after_the_end", neighbours<Fault::tail_write>},
      {"broken/neighbours_read_after_shared_memory", neighbours<Fault::shared_read>},
      {"broken/neighbours_write_after_shared_memory", neighbours<Fault::shared_write>},
      {"correct/together", together<Fault::none>},
      {"broken/barriers_that_differ", together<Fault::barrier>},
      {"broken/barrier_of_half_a_warp", together<Fault::second_barrier>},
      {"broken/shuffle_of_half_a_warp", together<Fault::return_before>},
      {"broken/operations_that_differ", together<Fault::operation>},
      {"correct/vector", vector<Fault::none>},
#ifdef FASTNN_ASAN  // and with it the other one
      {"broken/vector_misaligned", vector<Fault::alignment>},
#endif
  };
}

}  // namespace fastnn::cuda::tests
