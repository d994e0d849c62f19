// What the losses share: class targets, and sums over samples that have the same bits in every run.
//
// Each thread adds up its samples, each block its threads (LossTotal::add), and where there are several blocks a second
// launch of one block adds up theirs. How many threads and blocks there are follows from the shape alone.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace fastnn::cuda {

constexpr int kLossThreads = 256, kOneBlockThreads = 1024;
// One block of so many rounds takes less time than a second launch, 2 us.
constexpr int kOneBlockRounds = 4;
// Several times what the largest GPUs run at a time, so that the last ones to run are a small part; their sums are four
// a thread of the second launch.
constexpr int64_t kMostLossBlocks = 4 * kOneBlockThreads;

// Sums run in double: a float sum of a million losses would lose three digits.
struct LossSum {
  double loss, weight;
};

// Where the sums go.
template <class T>
struct LossTotal {
  Reduction reduction;
  T* output;
  Compute<T>* divisor;  // may be null
  LossSum* partials;    // one a block; null where there is one

  __host__ __device__ bool wanted() const { return reduction != Reduction::none || divisor; }

  // Takes the sums of all threads of the block.
  __device__ __forceinline__ void add(LossSum sum) const {
    const Team block(block_team(blockDim.x));
    sum.loss = block.sum(sum.loss);
    sum.weight = block.sum(sum.weight);
    if (threadIdx.x != 0) return;
    if (gridDim.x > 1) {
      partials[blockIdx.x] = sum;
      return;
    }
    using C = Compute<T>;
    if (divisor) *divisor = static_cast<C>(sum.weight);
    if (reduction == Reduction::sum) *output = narrow<T>(static_cast<C>(sum.loss));
    if (reduction == Reduction::mean) *output = narrow<T>(static_cast<C>(sum.loss / sum.weight));
  }
};

// Shared memory for LossTotal::add.
inline size_t loss_shared_bytes(int threads) { return block_team(threads).shared_bytes<double>(); }

template <class T>
__global__ void loss_total_kernel(int64_t count, const LossSum* partials, LossTotal<T> total) {
  begin_kernel();
  LossSum sum{0, 0};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    sum.loss += partials[i].loss;
    sum.weight += partials[i].weight;
  }
  total.add(sum);
}

// Blocks for `rounds` of a block's work.
inline int64_t loss_blocks(int64_t rounds) { return rounds <= kOneBlockRounds ? 1 : std::min(rounds, kMostLossBlocks); }

// For kernels whose threads take `items` of `count` elements in a round.
struct LossGrid {
  int64_t blocks;
  int threads;
  const char* variant() const { return blocks == 1 ? "one_block" : "blocks"; }
};
inline LossGrid loss_grid(int64_t count, int items) {
  const int64_t threads = std::max<int64_t>((count + items - 1) / items, 1);
  if (threads <= kOneBlockThreads * kOneBlockRounds) return {1, std::min(round_to_warps(threads), kOneBlockThreads)};
  return {loss_blocks((threads + kLossThreads - 1) / kLossThreads), kLossThreads};
}

// Launches kernel(arguments..., total) and, after several blocks, the sum of theirs.
template <class T, class... Parameters, class... Arguments>
void launch_loss(const char* operation, const Queue& queue, void (*kernel)(Parameters...), int64_t blocks, int threads,
                 size_t shared_bytes, LossTotal<T> total, const Arguments&... arguments) {
  const bool apart = blocks > 1 && total.wanted();
  if (apart) total.partials = queue.workspace<LossSum>(blocks);
  launch(operation, queue, kernel, dim3(static_cast<unsigned>(blocks)), threads,
         std::max(shared_bytes, loss_shared_bytes(threads)), arguments..., total);
  if (!apart) return;
  trace<T>(queue, operation, "total");
  const int total_threads = std::min(round_to_warps(blocks), kOneBlockThreads);
  launch(operation, queue, loss_total_kernel<T>, dim3(1), total_threads, loss_shared_bytes(total_threads), blocks,
         total.partials, total);
}

// The class of a sample and its weight; class -1 where the sample is ignored.
template <class T>
struct WeightedClass {
  int64_t index;
  Compute<T> weight;
};

template <class T>
__device__ __forceinline__ WeightedClass<T> class_of(const ClassTarget<T>& classes, int64_t class_count, int64_t s) {
  const int64_t target = classes.target[s];
  if (target == classes.ignore_index) return {-1, 0};
  device_check(target >= 0 && target < class_count, "Target out of bounds");
  return {target, classes.weight ? widen(classes.weight[target]) : 1};
}

// grad_output of sample s, divided for the mean.
template <class T>
__device__ __forceinline__ Compute<T> sample_gradient(Reduction reduction, const T* grad_output,
                                                      const Compute<T>* divisor, int64_t s) {
  if (reduction == Reduction::none) return widen(grad_output[s]);
  const Compute<T> grad = widen(*grad_output);
  if (reduction == Reduction::sum) return grad;
  return grad / *divisor;
}

}  // namespace fastnn::cuda
