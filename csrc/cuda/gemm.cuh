// The one matrix product behind linear and conv2d, forward and backward: C (M x N) = A (M x K) B (K x N), where A and B
// are read through readers - rows of a matrix, or pixels of images that a convolution's taps touch - and C is stored by
// what follows the product: bias, ReLU, pooling.
//
//   block: 64 x 64 of C, 4 warps of 32 x 32. K passes in stages of 64 bytes a row, 4 stages deep in shared memory:
//
//     load 0 | load 1 | load 2 | wait 0, load 3, multiply 0 | wait 1, load 4, multiply 1 | ...
//
//   A stage of an operand is 256 chunks of 16 bytes, two for each thread to load. It lies as its reader finds it in
//   memory: by rows of M or N with K innermost, or by rows of K with M or N innermost.
//
//   thread: of its warp's 32 x 32, with lane = 4 g + t: rows g + 8 i (i = 0..3), columns 8 j + 2 t and 8 j + 2 t + 1
//   (j = 0..3) - the fragments of two by four mma instructions. When C is pooled, rows g + 8 i are the four places of
//   one pooling window, so that its maximum needs no other thread.
//
// No atomics: where M x N alone does not fill the device, K is split between blocks, whose partial sums a second kernel
// adds in order.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastnn::cuda {

constexpr int kGemmThreads = 128;
constexpr int kGemmBlock = 64;  // rows and columns of C a block
constexpr int kWarpTile = 32;
constexpr int kStages = 4;       // 40 KB: below the 48 KB that need no leave, and two blocks fit where 96 KB are
constexpr int kStageBytes = 64;  // of K in a row
constexpr int kOperandBytes = kGemmBlock * (kStageBytes + 16);
constexpr int kGemmSharedBytes = kStages * 2 * kOperandBytes;

template <class T>
constexpr int kDepth = kStageBytes / sizeof(T);  // of K a stage
template <class T>
constexpr int kChunk = kPackOf16Bytes<T>;  // values a chunk

// How a stage of an operand lies in shared memory. Rows are padded so that a warp's reads fall into different banks.
enum class Layout {
  depth_inner,  // a row for each of M or N
  depth_outer,  // a row for each of K
};

template <class T, Layout layout>
struct Tile {
  static constexpr int kPadding = layout == Layout::depth_inner || sizeof(T) == 2 ? 16 : 32;  // bytes
  static constexpr int kRow = (layout == Layout::depth_inner ? kDepth<T> : kGemmBlock) + kPadding / sizeof(T);
  static constexpr int kRowChunks = (layout == Layout::depth_inner ? kDepth<T> : kGemmBlock) / kChunk<T>;
  static_assert((layout == Layout::depth_inner ? kGemmBlock : kDepth<T>)*kRow * sizeof(T) <= kOperandBytes);

  // Element (index of M or N, k).
  static __device__ __forceinline__ int at(int index, int k) {
    return layout == Layout::depth_inner ? index * kRow + k : k * kRow + index;
  }
};

// A thread's part of C. value(i, j): row g + 8 i, column 8 (j / 2) + 2 t + j % 2 of the warp's tile.
template <class C>
struct Accumulators {
  C fragment[2][4][4] = {};
  __device__ __forceinline__ C& value(int i, int j) { return fragment[i / 2][j / 2][2 * (i % 2) + j % 2]; }
};

// How a stage is multiplied: `a` and `b` point to the warp's first row of each operand's tile.

// Scalar products, in the compute type. For float64, and for devices whose tensor cores lack the dtype.
template <class T>
struct PlainProducts {
  static constexpr const char* kName = "plain";
  static constexpr bool kTensorCores = false;
  template <Layout LA, Layout LB>
  static __device__ __forceinline__ void multiply(const T* a, const T* b, Accumulators<Compute<T>>& c) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 2
    for (int k = 0; k < kDepth<T>; ++k) {
      Compute<T> x[4], y[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = widen(a[Tile<T, LA>::at(g + 8 * i, k)]);
#pragma unroll
      for (int j = 0; j < 8; ++j) y[j] = widen(b[Tile<T, LB>::at(8 * (j / 2) + 2 * t + j % 2, k)]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) c.value(i, j) += x[i] * y[j];
    }
  }
};

// Tensor cores on float32. `kExact`: each factor is split in two, x = high + low, and three of the four products are
// formed (Markidis et al., 2018): the error is float32's own. Otherwise factors are rounded to tf32.
template <bool kExact>
struct Tf32Products {
  static constexpr const char* kName = kExact ? "tf32x3" : "tf32";
  static constexpr bool kTensorCores = true;
  template <Layout LA, Layout LB>
  static __device__ __forceinline__ void multiply(const float* a, const float* b, Accumulators<float>& c) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < kDepth<float>; k += 8) {
      uint32_t x[2][4], x_low[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          split(a[Tile<float, LA>::at(16 * m + g + 8 * (r % 2), k + t + 4 * (r / 2))], x[m][r], x_low[m][r]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t y[2], y_low[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) split(b[Tile<float, LB>::at(8 * n + g, k + t + 4 * r)], y[r], y_low[r]);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          if constexpr (kExact) {
            mma_tf32(c.fragment[m][n], x_low[m], y);
            mma_tf32(c.fragment[m][n], x[m], y_low);
          }
          mma_tf32(c.fragment[m][n], x[m], y);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ void split(float value, uint32_t& high, uint32_t& low) {
    high = to_tf32(value);
    low = kExact ? to_tf32(value - bits_to_float(high)) : 0;
  }
};

// Tensor cores on 16-bit values.
template <class T>
struct HalfProducts {
  static constexpr const char* kName = "mma";
  static constexpr bool kTensorCores = true;
  template <Layout LA, Layout LB>
  static __device__ __forceinline__ void multiply(const T* a, const T* b, Accumulators<float>& c) {
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 16) {
      uint32_t x[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_fragment<LA>(a, 16 * m, k, x[m]);
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t y[4];  // columns n: words 0 and 2 of a 16 x 16 fragment, columns n + 1: words 1 and 3
        load_fragment<LB>(b, 8 * n, k, y);
        const uint32_t first[2] = {y[0], y[2]}, second[2] = {y[1], y[3]};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_16bit<T>(c.fragment[m][n], x[m], first);
          mma_16bit<T>(c.fragment[m][n + 1], x[m], second);
        }
      }
    }
  }

 private:
  // 16 (of M or N, from `index` on) by 16 (of K): word r holds (g + 8 (r % 2), 2 t and 2 t + 1 + 8 (r / 2)).
  template <Layout layout>
  static __device__ __forceinline__ void load_fragment(const T* tile, int index, int k, uint32_t (&words)[4]) {
    const int lane = threadIdx.x % 32;
    if constexpr (layout == Layout::depth_inner) {
#pragma unroll
      for (int r = 0; r < 4; ++r)
        std::memcpy(&words[r],
                    &tile[Tile<T, layout>::at(index + lane / 4 + 8 * (r % 2), k + 2 * (lane % 4) + 8 * (r / 2))], 4);
    } else {
      // Matrix i = lane / 8: rows k + 8 (i / 2) + lane % 8, columns from index + 8 (i % 2) on.
      load_matrices_transposed(words,
                               &tile[Tile<T, layout>::at(index + lane / 8 % 2 * 8, k + lane / 16 * 8 + lane % 8)]);
    }
  }
};

// What a thread loads of one operand: two chunks of a stage, each with its reader.
template <class T, class Reader>
struct Loads {
  static constexpr Layout layout = Reader::layout;
  static constexpr int kRowChunks = Tile<T, layout>::kRowChunks;
  static constexpr int kRowStep = kGemmThreads / kRowChunks;

  template <class Source>
  __device__ __forceinline__ Loads(const Source& source, int64_t first, int64_t first_k, int group)
      : readers_{Reader(source, first, first_k, fixed(0), group), Reader(source, first, first_k, fixed(1), group)} {}

  // Values k, k + 1, ... of the sum that began at first_k.
  __device__ __forceinline__ void load(T* tile, int k) const {
    const int row = threadIdx.x / kRowChunks, column = threadIdx.x % kRowChunks * kChunk<T>;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int r = row + j * kRowStep;
      readers_[j].load(tile + r * Tile<T, layout>::kRow + column, k + (layout == Layout::depth_inner ? column : r));
    }
  }

 private:
  static __device__ __forceinline__ int fixed(int j) {
    return layout == Layout::depth_inner ? threadIdx.x / kRowChunks + j * kRowStep
                                         : threadIdx.x % kRowChunks * kChunk<T>;
  }
  Reader readers_[2];
};

// The usual store of a product: each element by itself, through problem.store_one.
template <class Problem, class C>
__device__ __forceinline__ void store_each(const Problem& problem, int group, int64_t m0, int64_t n0,
                                           Accumulators<C>& c) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int64_t m = m0 + g + 8 * i, n = n0 + 8 * (j / 2) + 2 * t + j % 2;
      if (m < problem.size.m && n < problem.size.n) problem.store_one(group, m, n, c.value(i, j));
    }
}

// A product's sizes. Blocks of z are group * splits + split.
struct GemmSize {
  int64_t m, n, k;
  int groups, splits;
  int64_t split_depth;  // of K a split: a multiple of the stage's
};

// `Problem` has source_a(), source_b(), their readers ReaderA and ReaderB, `size`, `partials` (groups x splits x M x N
// in the compute type, or null) and store(group, m, n, warp's accumulators).
// At least three blocks a multiprocessor: up to 168 registers a thread, where ptxas by itself would spill a few.
template <class T, class Products, class Problem>
__global__ void __launch_bounds__(kGemmThreads, 3) gemm_kernel(const GRID_CONSTANT Problem problem) {
#ifdef __CUDA_ARCH__  // what run_gemm() never launches on this architecture is left empty, which halves the build
  constexpr bool kChosen = std::is_same_v<T, double> || Products::kTensorCores == (__CUDA_ARCH__ >= 800);
  if constexpr (!kChosen) return;
#endif
  using LoadsA = Loads<T, typename Problem::ReaderA>;
  using LoadsB = Loads<T, typename Problem::ReaderB>;
  T* shared = shared_memory<T>();
  constexpr int kOperand = kOperandBytes / sizeof(T);
  const GemmSize& size = problem.size;
  const int64_t m0 = int64_t{blockIdx.x} * kGemmBlock, n0 = int64_t{blockIdx.y} * kGemmBlock;
  const int group = blockIdx.z / size.splits, split = blockIdx.z % size.splits;
  const int64_t first = split * size.split_depth;
  const int64_t depth = (size.k - first < size.split_depth ? size.k - first : size.split_depth);
  const int stages = static_cast<int>((depth + kDepth<T> - 1) / kDepth<T>);

  const LoadsA loads_a(problem.a, m0, first, group);
  const LoadsB loads_b(problem.b, n0, first, group);
  const auto load = [&](int stage) {
    if (stage < stages) {
      T* tile = shared + stage % kStages * 2 * kOperand;
      loads_a.load(tile, stage * kDepth<T>);
      loads_b.load(tile + kOperand, stage * kDepth<T>);
    }
    commit_copies();  // an empty group too: the count of groups is what wait_for_copies counts
  };

  const int warp = threadIdx.x / 32, warp_m = warp / 2 * kWarpTile, warp_n = warp % 2 * kWarpTile;
  Accumulators<Compute<T>> c;
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_copies<kStages - 2>();
    sync_block();  // this stage has come for all threads, and none still reads the one that is loaded next
    load(stage + kStages - 1);
    const T* tile = shared + stage % kStages * 2 * kOperand;
    Products::template multiply<LoadsA::layout, LoadsB::layout>(
        tile + Tile<T, LoadsA::layout>::at(warp_m, 0), tile + kOperand + Tile<T, LoadsB::layout>::at(warp_n, 0), c);
  }

  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  if (problem.partials) {
    Compute<T>* partials = problem.partials + int64_t{blockIdx.z} * size.m * size.n;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int64_t m = m0 + warp_m + g + 8 * i, n = n0 + warp_n + 8 * (j / 2) + 2 * t + j % 2;
        if (m < size.m && n < size.n) partials[m * size.n + n] = c.value(i, j);
      }
  } else {
    problem.store(group, m0 + warp_m, n0 + warp_n, c);
  }
}

// Threads of 32 columns by kSumRows rows, for sums over rows: a column's threads are a team.
constexpr int kSumRows = 8;
constexpr int kSumThreads = 32 * kSumRows;

__host__ __device__ __forceinline__ TeamShape column_teams() { return {1, kSumRows, 32}; }

// sums[column] = sum of partials[row][column] in the order of rows.
template <class T>
__global__ void add_partials_kernel(int rows, int64_t columns, const Compute<T>* partials, T* sums) {
  for (int64_t i = global_thread(); i < columns; i += grid_threads()) {
    Compute<T> sum = 0;
    for (int r = 0; r < rows; ++r) sum += partials[r * columns + i];
    sums[i] = narrow<T>(sum);
  }
}

// Into how many parts `rows` are cut for blocks of kSumThreads: about two blocks a multiprocessor, and each thread with
// at least 64 rows.
inline int64_t sum_parts(const Queue& queue, int64_t rows, int64_t other_blocks) {
  int64_t parts = 2 * device_multiprocessors(queue.device) / (other_blocks > 0 ? other_blocks : 1);
  if (parts > rows / (64 * kSumRows)) parts = rows / (64 * kSumRows);
  return parts < 1 ? 1 : parts;
}

// Adds the partial sums of each element in the order of splits and stores the result.
template <class T, class Problem>
__global__ void reduce_splits_kernel(const GRID_CONSTANT Problem problem) {
  const GemmSize& size = problem.size;
  const int64_t matrix = size.m * size.n;
  for (int64_t i = global_thread(); i < matrix * size.groups; i += grid_threads()) {
    const int64_t group = i / matrix, element = i % matrix;
    const Compute<T>* partial = problem.partials + group * size.splits * matrix + element;
    Compute<T> sum = 0;
    for (int split = 0; split < size.splits; ++split) sum += partial[split * matrix];
    problem.store_one(static_cast<int>(group), element / size.n, element % size.n, sum);
  }
}

// How many ways K is split: so that each multiprocessor gets about two blocks, of at least eight stages each.
inline void choose_splits(GemmSize& size, int stage_depth, int multiprocessors, bool can_split) {
  const int64_t blocks =
      (size.m + kGemmBlock - 1) / kGemmBlock * ((size.n + kGemmBlock - 1) / kGemmBlock) * size.groups;
  const int64_t stages = (size.k + stage_depth - 1) / stage_depth;
  int64_t splits = 1;
  if (can_split && blocks > 0) splits = 2 * multiprocessors / blocks;
  if (splits > stages / 8) splits = stages / 8;
  if (splits > 64) splits = 64;
  if (splits < 1) splits = 1;
  const int64_t split_stages = (stages + splits - 1) / splits;
  size.split_depth = split_stages * stage_depth;
  size.splits = static_cast<int>(split_stages > 0 ? (stages + split_stages - 1) / split_stages : 1);
}

template <class T, class Products, class Problem>
void run_gemm(const char* operation, const Queue& queue, Problem problem, bool can_split) {
  GemmSize& size = problem.size;
  choose_splits(size, kDepth<T>, device_multiprocessors(queue.device), can_split);
  trace<T>(queue, operation, Products::kName);
  if (size.splits > 1)
    problem.partials = queue.workspace<Compute<T>>(size.groups * int64_t{size.splits} * size.m * size.n);
  const dim3 grid((size.m + kGemmBlock - 1) / kGemmBlock, (size.n + kGemmBlock - 1) / kGemmBlock,
                  size.groups * size.splits);
  launch(operation, queue, gemm_kernel<T, Products, Problem>, grid, kGemmThreads, kGemmSharedBytes, problem);
  if (size.splits > 1)
    launch(operation, queue, reduce_splits_kernel<T, Problem>, blocks_for(size.m * size.n * size.groups, 256), 256, 0,
           problem);
}

// The product in the precision that is asked for, by the fastest way that the device has.
template <class T, class Problem>
void run_gemm(const char* operation, const Queue& queue, const Problem& problem, Precision precision, bool can_split) {
  if constexpr (!std::is_same_v<T, double>) {
    if (device_capability(queue.device) >= 80) {
      if constexpr (!std::is_same_v<T, float>)
        run_gemm<T, HalfProducts<T>>(operation, queue, problem, can_split);
      else if (precision == Precision::tf32)
        run_gemm<T, Tf32Products<false>>(operation, queue, problem, can_split);
      else
        run_gemm<T, Tf32Products<true>>(operation, queue, problem, can_split);
      return;
    }
  }
  run_gemm<T, PlainProducts<T>>(operation, queue, problem, can_split);
}

}  // namespace fastnn::cuda
