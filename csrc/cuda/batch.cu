// transpose, gather_images, count_correct: see ops/batch.h for the formulas.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastnn::cuda {
namespace {

// transpose

// A block moves a square of 32 x 32 through shared memory, so that a warp reads and writes runs of 32. The row of 33
// puts the 32 values of a column into 32 banks.
constexpr int kSquare = 32, kSquarePitch = kSquare + 1;
constexpr int kTransposeThreads = 256;
constexpr int kTransposeRows = kTransposeThreads / kSquare;  // at a time: 4 loads a thread in flight

template <class T>
__global__ void __launch_bounds__(kTransposeThreads) transpose_kernel(TransposeShape s, TransposeBuffers<T> b) {
  begin_kernel();
  T* square = shared_memory<T>();  // (kSquare, kSquarePitch)
  const int lane = static_cast<int>(threadIdx.x) % kSquare, line = static_cast<int>(threadIdx.x) / kSquare;
  const int64_t column0 = int64_t{blockIdx.x} * kSquare;
  for (int64_t matrix = blockIdx.z; matrix < s.batch; matrix += gridDim.z) {
    const T* input = b.input + matrix * s.rows * s.columns;
    T* output = b.output + matrix * s.rows * s.columns;
    for (int64_t row0 = int64_t{blockIdx.y} * kSquare; row0 < s.rows; row0 += int64_t{gridDim.y} * kSquare) {
#pragma unroll
      for (int i = line; i < kSquare; i += kTransposeRows)
        if (row0 + i < s.rows && column0 + lane < s.columns)
          square[i * kSquarePitch + lane] = input[(row0 + i) * s.columns + column0 + lane];
      sync_block();
#pragma unroll
      for (int i = line; i < kSquare; i += kTransposeRows)
        if (column0 + i < s.columns && row0 + lane < s.rows)
          output[(column0 + i) * s.rows + row0 + lane] = square[lane * kSquarePitch + i];
      sync_block();
    }
  }
}

// One row or one column: nothing changes its place.
template <class T>
__global__ void __launch_bounds__(kLotThreads)
    transpose_copy_kernel(int64_t count, bool aligned, const T* input, T* output) {
  begin_kernel();
  for (int64_t tile = blockIdx.x; tile * Lot<T>::kTile < count; tile += gridDim.x) {
    const Lot<T> lot(tile, count, aligned);
    lot.store(output, lot.load(input));
  }
}

// gather_images

constexpr int kGatherThreads = 256;

// A thread takes a pixel and its channels, which are few in images: reads of a channel are neighbours, and the writes
// of a warp fill whole sectors one after the other.
template <class T, class Source>
__global__ void __launch_bounds__(kGatherThreads, 4)
    gather_images_kernel(GatherImagesShape s, GatherImagesBuffers<T> b) {
  begin_kernel();
  using C = Compute<T>;
  const C divisor = static_cast<C>(s.divisor);
  for (int64_t sample = blockIdx.y; sample < s.batch; sample += gridDim.y) {
    const int64_t image = b.index[sample];
    if (image < 0 || image >= s.images) {
      device_check(false, "an index is outside the images");
      return;  // the compiler need not keep registers for what comes after the message
    }
    const Source* from = static_cast<const Source*>(b.input) + image * s.channels * s.pixels;
    T* to = b.output + sample * s.channels * s.pixels;
    if (b.target && global_thread() == 0) b.target_output[sample] = b.target[image];
    for (int64_t pixel = global_thread(); pixel < s.pixels; pixel += grid_threads())
      for (int64_t c = 0; c < s.channels; ++c) {
        const Source value = from[c * s.pixels + pixel];
        if constexpr (std::is_same_v<Source, uint8_t>)
          to[pixel * s.channels + c] = narrow<T>(static_cast<C>(value) / divisor);
        else
          to[pixel * s.channels + c] = narrow<T>(widen(value) / divisor);
      }
  }
}

// count_correct

constexpr int kCountThreads = 256;
constexpr int64_t kMostCountBlocks = kCountThreads;  // the second stage adds one a thread
// A row's share of one lane: as many loads are in flight.
constexpr int64_t kClassesPerLane = 8;

// `lanes` threads, a power of two, share a row. A block writes its count to counts[blockIdx.x].
template <class T>
__global__ void __launch_bounds__(kCountThreads)
    count_correct_kernel(CountCorrectShape s, int lanes, const T* logits, const int64_t* target, int64_t* counts) {
  begin_kernel();
  using C = Compute<T>;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int rows = kCountThreads / lanes;  // at a time
  int64_t correct = 0;
  for (int64_t first = int64_t{blockIdx.x} * rows; first < s.batch; first += int64_t{gridDim.x} * rows) {
    const int64_t row = first + static_cast<int>(threadIdx.x) / lanes;
    C value = static_cast<C>(-INFINITY);
    int64_t best = lane;
    if (row < s.batch)
      for (int64_t c = lane; c < s.classes; c += lanes) {
        const C x = widen(logits[row * s.classes + c]);
        if (x > value || (x != x && value == value)) value = x, best = c;  // NaN counts as largest
      }
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      const C other = shuffle_xor(value, mask);
      const int64_t its = shuffle_xor(best, mask);
      const bool equal = other == value || (other != other && value != value);
      if (equal ? its < best : other > value || other != other) value = other, best = its;
    }
    if (row < s.batch && lane == 0) correct += best == target[row];
  }
  const int64_t total = Team(block_team(kCountThreads)).sum(correct);
  if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kCountThreads)
    add_counts_kernel(int64_t blocks, const int64_t* counts, int64_t* correct) {
  begin_kernel();
  const int64_t total = Team(block_team(kCountThreads)).sum(threadIdx.x < blocks ? counts[threadIdx.x] : 0);
  if (threadIdx.x == 0) *correct = total;
}

}  // namespace

template <class T>
void Kernels<T>::transpose(const TransposeShape& s, const TransposeBuffers<T>& b) const {
  if (s.rows == 1 || s.columns == 1) {
    const int64_t count = s.batch * s.rows * s.columns;
    trace<T>(queue_, "transpose", "copy");
    launch("transpose", queue_, transpose_copy_kernel<T>, blocks_for(count, Lot<T>::kTile), kLotThreads, 0, count,
           aligned_to(16, b.input, b.output), b.input, b.output);
    return;
  }
  trace<T>(queue_, "transpose", "tiled");
  const auto squares = [](int64_t size) { return (size + kSquare - 1) / kSquare; };
  const dim3 grid(static_cast<unsigned>(squares(s.columns)),
                  static_cast<unsigned>(std::min<int64_t>(squares(s.rows), kMostGridYZ)),
                  static_cast<unsigned>(std::min<int64_t>(s.batch, kMostGridYZ)));
  launch("transpose", queue_, transpose_kernel<T>, grid, kTransposeThreads, kSquare * kSquarePitch * sizeof(T), s, b);
}

template <class T>
void Kernels<T>::gather_images(const GatherImagesShape& s, const GatherImagesBuffers<T>& b) const {
  trace<T>(queue_, "gather_images", s.from_uint8 ? "uint8" : "copy");
  const dim3 grid(blocks_for(s.pixels, kGatherThreads).x,
                  static_cast<unsigned>(std::min<int64_t>(s.batch, kMostGridYZ)));
  launch("gather_images", queue_, s.from_uint8 ? gather_images_kernel<T, uint8_t> : gather_images_kernel<T, T>, grid,
         kGatherThreads, 0, s, b);
}

// Blocks count on their own; where there is more than one, a second launch adds their counts up.
template <class T>
void Kernels<T>::count_correct(const CountCorrectShape& s, const CountCorrectBuffers<T>& b) const {
  int lanes = 1;
  while (lanes < kWarpThreads && lanes * kClassesPerLane < s.classes) lanes *= 2;
  const int64_t rows = kCountThreads / lanes;
  const int64_t blocks = std::clamp((s.batch + rows - 1) / rows, int64_t{1}, kMostCountBlocks);
  const size_t shared_bytes = block_team(kCountThreads).shared_bytes<int64_t>();
  trace<T>(queue_, "count_correct", blocks == 1 ? "one_block" : "blocks");
  int64_t* counts = blocks == 1 ? b.correct : queue_.workspace<int64_t>(blocks);
  launch("count_correct", queue_, count_correct_kernel<T>, dim3(static_cast<unsigned>(blocks)), kCountThreads,
         shared_bytes, s, lanes, b.logits, b.target, counts);
  if (blocks > 1)
    launch("count_correct", queue_, add_counts_kernel, dim3(1), kCountThreads, shared_bytes, blocks, counts, b.correct);
}

FASTNN_INSTANTIATE(void, transpose, TransposeShape, TransposeBuffers)
FASTNN_INSTANTIATE(void, gather_images, GatherImagesShape, GatherImagesBuffers)
FASTNN_INSTANTIATE(void, count_correct, CountCorrectShape, CountCorrectBuffers)

}  // namespace fastnn::cuda
