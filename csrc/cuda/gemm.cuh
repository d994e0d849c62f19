// The one matrix product behind linear and conv2d, forward and backward: C (M x N) = A (M x K) B (K x N), where A and B
// are read through readers - rows of a matrix, or pixels of images that a convolution's taps touch - and C is stored by
// what follows the product: bias, ReLU, pooling.
//
//   block: 8 warps share out 64 x 32 of C or more (BlockShape). K passes in stages of 128 bytes a row, 3 stages deep in
//   shared memory:
//
//     load 0 | load 1 | wait 0, load 2, multiply 0 | wait 1, load 3, multiply 1 | ...
//
//   A stage of an operand is eight chunks of 16 bytes a row. It lies as its reader finds it in memory: by rows of M or
//   N with K innermost, or by rows of K with M or N innermost.
//
//   thread: with lane = 4 g + t, of its warp's rows g + 8 i and columns 8 j + 2 t and 8 j + 2 t + 1: the fragments of
//   mma instructions. When C is pooled, four rows g + 8 i are the places of one pooling window, so that its maximum
//   needs no other thread.
//
// No atomics: where M x N alone does not fill the device, K is split between blocks, whose partial sums a second kernel
// adds in order.
#pragma once

#include <algorithm>

#include "cuda/divider.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastnn::cuda {

constexpr int kGemmThreads = 256;

// A block's share of C: kWarpsM x kWarpsN warps of kFragmentsM x kFragmentsN fragments of 16 x 8.
template <int kWarpsM_, int kWarpsN_, int kFragmentsM_, int kFragmentsN_>
struct BlockShape {
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kFragmentsM = kFragmentsM_, kFragmentsN = kFragmentsN_;
  static constexpr int kWarpM = 16 * kFragmentsM, kWarpN = 8 * kFragmentsN;
  static constexpr int kM = kWarpsM * kWarpM, kN = kWarpsN * kWarpN;
  static_assert(kWarpThreads * kWarpsM * kWarpsN == kGemmThreads);
};
using SquareBlock = BlockShape<2, 4, 2, 2>;  // 64 x 64: the most blocks
using SmallBlock = BlockShape<4, 2, 1, 2>;   // 64 x 32, 128 x 32: for few columns
using NarrowBlock = BlockShape<4, 2, 2, 2>;
using TallBlock = BlockShape<4, 2, 2, 4>;  // 128 x 64: fewer reads of shared memory for each product
using WideBlock = BlockShape<2, 4, 4, 4>;  // 128 x 128: and fewer copies to it

constexpr int kStages = 3;
constexpr int kStageBytes = 128;  // of K in a row

// Of a stage of an operand of so many rows of M or N, rows or columns padded; below, of all stages of both.
template <int kRows>
constexpr int kOperandBytes = kStageBytes * kRows + (16 * kRows > 1024 ? 16 * kRows : 1024);
template <class Shape>
constexpr int kGemmSharedBytes = kStages * (kOperandBytes<Shape::kM> + kOperandBytes<Shape::kN>);

template <class T>
constexpr int kDepth = kStageBytes / sizeof(T);  // of K a stage
template <class T>
constexpr int kChunk = kPackOf16Bytes<T>;  // values a chunk

// How a stage of an operand lies in shared memory. Rows are padded so that a warp's reads fall into different banks.
enum class Layout {
  depth_inner,  // a row for each of M or N
  depth_outer,  // a row for each of K
};

// A stage of an operand with kSize rows of M or N.
template <class T, Layout kLayout_, int kSize>
struct Tile {
  static constexpr Layout kLayout = kLayout_;
  static constexpr int kPadding = kLayout == Layout::depth_inner || sizeof(T) == 2 ? 16 : 32;  // bytes
  static constexpr int kInner = kLayout == Layout::depth_inner ? kDepth<T> : kSize;
  static constexpr int kRows = kLayout == Layout::depth_inner ? kSize : kDepth<T>;
  static constexpr int kRow = kInner + kPadding / sizeof(T);
  static constexpr int kRowChunks = kInner / kChunk<T>;
  static_assert(kRows * kRow * sizeof(T) <= kOperandBytes<kSize>);

  // Element (index of M or N, k).
  static __device__ __forceinline__ int at(int index, int k) {
    return kLayout == Layout::depth_inner ? index * kRow + k : k * kRow + index;
  }
  // What this lane hands to load_matrices for 16 indices from `index` on by 32 bytes of K from `k` on: matrices 0 and 1
  // are the first 16 bytes of 8 indices each, 2 and 3 the next.
  static __device__ __forceinline__ int matrix_row(int index, int k) {
    const int lane = threadIdx.x % kWarpThreads;
    return at(index + lane / 8 % 2 * 8 + lane % 8, k + lane / 16 * kChunk<T>);
  }
};

// A thread's part of C. value(i, j): row g + 8 i, column 8 (j / 2) + 2 t + j % 2 of the warp's tile.
template <class C, class Shape>
struct Accumulators {
  static constexpr int kRows = 2 * Shape::kFragmentsM, kColumns = 2 * Shape::kFragmentsN;
  C fragment[Shape::kFragmentsM][Shape::kFragmentsN][4] = {};
  __device__ __forceinline__ C& value(int i, int j) { return fragment[i / 2][j / 2][2 * (i % 2) + j % 2]; }
};

// How a stage is multiplied: `a` and `b` point to the warp's first row of each operand's tile.

// Scalar products, in the compute type. For float64, and for devices whose tensor cores lack the dtype.
template <class T>
struct PlainProducts {
  static constexpr const char* kName = "plain";
  static constexpr bool kTensorCores = false;
  template <class TileA, class TileB, class Shape>
  static __device__ __forceinline__ void multiply(const T* a, const T* b, Accumulators<Compute<T>, Shape>& c) {
    constexpr int kRows = c.kRows, kColumns = c.kColumns;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 2
    for (int k = 0; k < kDepth<T>; ++k) {
      Compute<T> x[kRows], y[kColumns];
#pragma unroll
      for (int i = 0; i < kRows; ++i) x[i] = widen(a[TileA::at(g + 8 * i, k)]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) y[j] = widen(b[TileB::at(8 * (j / 2) + 2 * t + j % 2, k)]);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) c.value(i, j) += x[i] * y[j];
    }
  }
};

// Tensor cores: kStep values of K an instruction, kUnrolled steps at a time. A policy loads fragments - 16 of M or two
// times 8 of N, four words a thread - and multiplies them.
template <class Policy, class T>
struct FragmentProducts {
  static constexpr bool kTensorCores = true;
  template <class TileA, class TileB, class Shape>
  static __device__ __forceinline__ void multiply(const T* a, const T* b, Accumulators<float, Shape>& c) {
#pragma unroll(Policy::kUnrolled)
    for (int k = 0; k < kDepth<T>; k += Policy::kStep) {
      typename Policy::Fragment x[Shape::kFragmentsM];
#pragma unroll
      for (int m = 0; m < Shape::kFragmentsM; ++m) x[m] = Policy::template load<TileA>(a, 16 * m, k);
#pragma unroll
      for (int n = 0; n < Shape::kFragmentsN; n += 2) {
        const auto y = Policy::template load<TileB>(b, 8 * n, k);
#pragma unroll
        for (int m = 0; m < Shape::kFragmentsM; ++m) {
          Policy::add_product(c.fragment[m][n], x[m], y, 0);
          Policy::add_product(c.fragment[m][n + 1], x[m], y, 1);
        }
      }
    }
  }
};

// Tensor cores do not read the 13 low bits of their factors, which takes (1/m) 2^-11 of a number of mantissa m on
// average. One multiplication gives it back, where rounding would take two instructions and a conversion more.
constexpr float kHalfUlp = 1 + 0x1.7p-12f;

// Tensor cores on float32. `kExact`: each factor is split in two, x = high + low, and three of the four products are
// formed (Markidis et al., 2018); a step's sum begins at zero and is added here, which rounds, where tensor cores cut
// off, and over thousands of steps to one side (Ootomo and Yokota, 2022): the error is float32's own. Otherwise factors
// are tf32, off by 1.29 * 2^-11 at most.
template <bool kExact>
struct Tf32Products : FragmentProducts<Tf32Products<kExact>, float> {
  static constexpr const char* kName = kExact ? "tf32x3" : "tf32";
  // Several steps of three products at a time would need more registers than kGemmBlocks leaves.
  static constexpr int kStep = 8, kUnrolled = kExact ? 1 : 4;
  // Word r: (g + 8 (r % 2), t + 4 (r / 2)).
  struct Fragment {
    uint32_t high[4], low[kExact ? 4 : 1];
  };

  template <class Tile>
  static __device__ __forceinline__ Fragment load(const float* tile, int index, int k) {
    Fragment result;
    uint32_t words[4];
    if constexpr (Tile::kLayout == Layout::depth_inner) {
      load_matrices(words, &tile[Tile::matrix_row(index, k)]);
    } else {
      const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
      for (int r = 0; r < 4; ++r)
        words[r] = float_to_bits(tile[Tile::at(index + g + 8 * (r % 2), k + t + 4 * (r / 2))]);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float value = bits_to_float(words[r]);
      if constexpr (kExact) {
        result.high[r] = to_tf32(value);
        result.low[r] = to_tf32(value - bits_to_float(result.high[r]));
      } else {
        result.high[r] = float_to_bits(value * kHalfUlp);
      }
    }
    return result;
  }

  // The columns of y's half.
  static __device__ __forceinline__ void add_product(float (&c)[4], const Fragment& x, const Fragment& y, int half) {
    const uint32_t high[2] = {y.high[half], y.high[half + 2]};
    if constexpr (kExact) {
      const uint32_t low[2] = {y.low[half], y.low[half + 2]};
      float sums[4] = {};
      mma_tf32(sums, x.low, high);
      mma_tf32(sums, x.high, low);
      mma_tf32(sums, x.high, high);
#pragma unroll
      for (int r = 0; r < 4; ++r) c[r] += sums[r];
    } else {
      mma_tf32(c, x.high, high);
    }
  }
};

// Tensor cores on 16-bit values.
template <class T>
struct HalfProducts : FragmentProducts<HalfProducts<T>, T> {
  static constexpr const char* kName = "mma";
  static constexpr int kStep = 16, kUnrolled = 4;  // all of a stage
  // Word r: (g + 8 (r % 2), 2 t and 2 t + 1 + 8 (r / 2)).
  struct Fragment {
    uint32_t words[4];
  };

  template <class Tile>
  static __device__ __forceinline__ Fragment load(const T* tile, int index, int k) {
    Fragment result;
    if constexpr (Tile::kLayout == Layout::depth_inner) {
      load_matrices(result.words, &tile[Tile::matrix_row(index, k)]);
    } else {
      // Matrix i = lane / 8: rows k + 8 (i / 2) + lane % 8, columns from index + 8 (i % 2) on.
      const int lane = threadIdx.x % kWarpThreads;
      load_matrices_transposed(result.words, &tile[Tile::at(index + lane / 8 % 2 * 8, k + lane / 16 * 8 + lane % 8)]);
    }
    return result;
  }

  static __device__ __forceinline__ void add_product(float (&c)[4], const Fragment& x, const Fragment& y, int half) {
    const uint32_t columns[2] = {y.words[half], y.words[half + 2]};
    mma_16bit<T>(c, x.words, columns);
  }
};

// What a thread loads of an operand of kSize rows of M or N: kCount chunks of each stage, kStep rows of its tile apart.
// Reader<kCount, kStep> is made with the block's first row of M or N, the first k, and where in the tile the thread's
// first chunk lies: row of M or N and offset along K, or the other way round. load(to, step) then loads the chunks of
// the next stage to `to`, to + step, ...
template <class T, template <int, int> class Reader, int kSize>
struct Loads {
  using Tile = cuda::Tile<T, Reader<1, 1>::layout, kSize>;
  static constexpr int kStep = kGemmThreads / Tile::kRowChunks;
  static constexpr int kCount = Tile::kRows / kStep;
  static_assert(kCount * kStep == Tile::kRows);

  template <class Source>
  __device__ __forceinline__ Loads(const Source& source, int64_t first, int64_t first_k, int group)
      : reader_(source, first, first_k, group, row(), column()) {}
  __device__ __forceinline__ void load(T* tile) {
    reader_.load(tile + row() * Tile::kRow + column(), kStep * Tile::kRow);
  }

 private:
  static __device__ __forceinline__ int row() { return threadIdx.x / Tile::kRowChunks; }
  static __device__ __forceinline__ int column() { return threadIdx.x % Tile::kRowChunks * kChunk<T>; }
  Reader<kCount, kStep> reader_;
};

// The readers of a product's factors, as Loads takes them.
template <class T, template <class, int, int> class ReaderA, template <class, int, int> class ReaderB>
struct ReadersOf {
  template <int kCount, int kStep>
  using A = ReaderA<T, kCount, kStep>;
  template <int kCount, int kStep>
  using B = ReaderB<T, kCount, kStep>;
};

// The usual store of a product: each element by itself, through store(row, column, value).
template <class C, class Shape, class Store>
__device__ __forceinline__ void store_each(const int64_t m0, int64_t n0, int64_t m_end, int64_t n_end,
                                           Accumulators<C, Shape>& c, const Store& store) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < c.kRows; ++i)
#pragma unroll
    for (int j = 0; j < c.kColumns; ++j) {
      const int64_t m = m0 + g + 8 * i, n = n0 + 8 * (j / 2) + 2 * t + j % 2;
      if (m < m_end && n < n_end) store(m, n, c.value(i, j));
    }
}

// A product's sizes.
struct GemmSize {
  int64_t m, n, k;
  int groups, splits;
  int64_t split_depth;                 // of K a split: a multiple of the stage's
  bool row_sums = false;               // whether the sums of A's rows are wanted, too: a column of C after the last
  Divider tiles_m = {}, tiles_n = {};  // of a group and split; blocks take those of M first, then of N

  __host__ __device__ int64_t columns() const { return n + row_sums; }
};

// The sums of a block's rows of A, each shared out among kParts threads. What is in shared memory for the product
// anyway is read once more, where a column of ones in B would take blocks of its own.
template <class C, class Tile, int kM>
struct RowSums {
  static constexpr int kParts = kGemmThreads / kM;
  C sum = 0;

  static __device__ __forceinline__ int row() { return threadIdx.x % kM; }
  template <class T>
  __device__ __forceinline__ void add(const T* tile) {
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += kParts) sum += widen(tile[Tile::at(row(), k + threadIdx.x / kM)]);
  }
  // The sum of row(), for the first kM threads. All threads call it, when nobody needs what is in shared memory.
  __device__ __forceinline__ C total() const {
    C* sums = shared_memory<C>();
    sync_block();
    sums[threadIdx.x] = sum;
    sync_block();
    C result = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) result += sums[row() + part * kM];
    return result;
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kWideBlocksFit = false;  // the compiler wants more than 128 registers
#else
constexpr bool kWideBlocksFit = true;
#endif
// Blocks that stay on a multiprocessor: three of 80 registers a thread, two of 128, or one of 128 x 128 where products
// of three hold both parts of their factors.
template <class T, class Products, class Shape>
constexpr int kGemmBlocks = Shape::kM == 64 && sizeof(T) < 8                                                        ? 3
                            : Shape::kN == 128 && (!kWideBlocksFit || std::is_same_v<Products, Tf32Products<true>>) ? 1
                                                                                                                    : 2;

// What a product is for, which says how large its sides are, and how much its readers hold.
enum class Role { forward, grad_input, grad_weight };

// `Problem` has sources a and b, their Readers, `size` (row_sums for weights' gradients alone), `partials` (groups x
// splits x M x columns() in the compute type, or null), store(group, m, n, value), its kRole, and where that is forward
// pools() and store_pooled(group, m0, n0, warp's accumulators).
template <class T, class Products, class Shape, class Problem>
__global__ void __launch_bounds__(kGemmThreads, kGemmBlocks<T, Products, Shape>)
    gemm_kernel(const GRID_CONSTANT Problem problem) {
#ifdef __CUDA_ARCH__  // what run_gemm() never launches on this architecture is left empty, which halves the build
  constexpr bool kChosen = std::is_same_v<T, double> || Products::kTensorCores == (__CUDA_ARCH__ >= 800);
  if constexpr (!kChosen) return;
#endif
  using LoadsA = Loads<T, Problem::Readers::template A, Shape::kM>;
  using LoadsB = Loads<T, Problem::Readers::template B, Shape::kN>;
  T* shared = shared_memory<T>();
  constexpr int kOperandA = kOperandBytes<Shape::kM> / sizeof(T),
                kStage = kOperandA + kOperandBytes<Shape::kN> / sizeof(T);
  const GemmSize& size = problem.size;
  uint32_t tile_m = blockIdx.x, tile_n = size.tiles_m.split(tile_m);
  const uint32_t matrix = size.tiles_n.split(tile_n);  // group * splits + split
  const int64_t m0 = int64_t{tile_m} * Shape::kM, n0 = int64_t{tile_n} * Shape::kN;
  const int group = matrix / size.splits, split = matrix % size.splits;
  const int64_t first = split * size.split_depth;
  const int64_t depth = size.k - first < size.split_depth ? size.k - first : size.split_depth;
  const int stages = static_cast<int>((depth + kDepth<T> - 1) / kDepth<T>);

  LoadsA loads_a(problem.a, m0, first, group);
  LoadsB loads_b(problem.b, n0, first, group);
  const auto load = [&](int stage) {
    if (stage < stages) {
      T* tile = shared + stage % kStages * kStage;
      loads_a.load(tile);
      loads_b.load(tile + kOperandA);
    }
    commit_copies();  // an empty group too: the count of groups is what wait_for_copies counts
  };

  const int warp = threadIdx.x / 32;
  const int warp_m = warp / Shape::kWarpsN * Shape::kWarpM, warp_n = warp % Shape::kWarpsN * Shape::kWarpN;
  Accumulators<Compute<T>, Shape> c;
  RowSums<Compute<T>, typename LoadsA::Tile, Shape::kM> row_sums;
  const bool sums_rows = Problem::kRole == Role::grad_weight && size.row_sums && tile_n == 0;
  begin_kernel();
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_copies<kStages - 2>();
    sync_block();  // this stage has come for all threads, and none still reads the one that is loaded next
    load(stage + kStages - 1);
    const T* tile = shared + stage % kStages * kStage;
    Products::template multiply<typename LoadsA::Tile, typename LoadsB::Tile>(
        tile + LoadsA::Tile::at(warp_m, 0), tile + kOperandA + LoadsB::Tile::at(warp_n, 0), c);
    if (sums_rows) row_sums.add(tile);
  }

  Compute<T>* partials = nullptr;
  if (problem.partials) partials = problem.partials + int64_t{matrix} * size.m * size.columns();
  if (sums_rows) {
    const Compute<T> sum = row_sums.total();
    const int64_t m = m0 + row_sums.row();
    if (threadIdx.x < Shape::kM && m < size.m) {
      if (partials)
        partials[m * size.columns() + size.n] = sum;
      else
        problem.store(group, m, size.n, sum);
    }
  }
  if (partials) {
    store_each(m0 + warp_m, n0 + warp_n, size.m, size.n, c,
               [&](int64_t m, int64_t n, Compute<T> value) { partials[m * size.columns() + n] = value; });
    return;
  }
  if constexpr (Problem::kRole == Role::forward)
    if (problem.pools()) return problem.store_pooled(group, m0 + warp_m, n0 + warp_n, c);
  store_each(m0 + warp_m, n0 + warp_n, size.m, size.n, c,
             [&](int64_t m, int64_t n, Compute<T> value) { problem.store(group, m, n, value); });
}

// Threads of 32 columns by kSumRows rows, for sums over rows: a column's threads are a team.
constexpr int kSumRows = 8;
constexpr int kSumThreads = 32 * kSumRows;

__host__ __device__ __forceinline__ TeamShape column_teams() { return {1, kSumRows, 32}; }
// For few rows: a thread a column.
__host__ __device__ __forceinline__ TeamShape column_threads() { return {1, 1, kSumThreads}; }

// sums[column] = sum of partials[row][column] in the order of rows.
template <class T>
__global__ void add_partials_kernel(int rows, int64_t columns, const Compute<T>* partials, T* sums) {
  begin_kernel();
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

// Adds the partial sums of each element of a group's matrix - each of a team's threads its own, in the order of splits,
// then the team theirs - and stores the result. Blocks of y take groups.
template <class T, class Problem>
__global__ void __launch_bounds__(kSumThreads)
    reduce_splits_kernel(const GRID_CONSTANT Problem problem, const TeamShape shape) {
  begin_kernel();
  const GemmSize& size = problem.size;
  const Team team(shape);
  const int64_t matrix = size.m * size.columns();
  for (int group = blockIdx.y; group < size.groups; group += gridDim.y)
    for (int64_t start = int64_t{blockIdx.x} * shape.span; start < matrix; start += int64_t{gridDim.x} * shape.span) {
      const int64_t element = start + team.position;
      const Compute<T>* partial = problem.partials + int64_t{group} * size.splits * matrix + element;
      Compute<T> sum = 0;
      if (element < matrix)
#pragma unroll 8
        for (int split = team.part; split < size.splits; split += shape.parts) sum += partial[split * matrix];
      sum = team.sum(sum);
      if (element >= matrix || team.part > 0) continue;
      const int64_t row = divide64(element, size.columns());
      problem.store(group, row, element - row * size.columns(), sum);
    }
}

template <class T, class Problem>
void add_splits(const char* operation, const Queue& queue, const Problem& problem) {
  const GemmSize& size = problem.size;
  const TeamShape teams = size.splits < 4 * kSumRows ? column_threads() : column_teams();
  const dim3 grid(blocks_for(size.m * size.columns(), teams.span).x, std::min(size.groups, kMostGridYZ));
  launch(operation, queue, reduce_splits_kernel<T, Problem>, grid, kSumThreads, teams.shared_bytes<Compute<T>>(),
         problem, teams);
}

template <class T>
int64_t stages_of(const GemmSize& size) {
  return (size.k + kDepth<T> - 1) / kDepth<T>;
}

template <class Shape>
int64_t blocks_of(const GemmSize& size) {
  return (size.m + Shape::kM - 1) / Shape::kM * ((size.n + Shape::kN - 1) / Shape::kN) * size.groups;
}

// How many ways K is split: where blocks do not fill the device, so that each multiprocessor gets about three, of a
// least depth. That is larger where C is: to write and read its partial sums takes as long as some six stages.
constexpr int64_t kLeastStages = 2, kLeastStagesOfLarge = 16;
constexpr int64_t kLarge = 1 << 19;  // elements of C

template <class T, class Shape>
void choose_splits(GemmSize& size, int multiprocessors, bool can_split) {
  const int64_t blocks = blocks_of<Shape>(size), stages = stages_of<T>(size);
  const bool splits_help = can_split && blocks > 0 && blocks < multiprocessors;
  const int64_t wanted = splits_help ? 3 * multiprocessors / blocks : 1;
  const int64_t least = size.m * size.n * size.groups < kLarge ? kLeastStages : kLeastStagesOfLarge;
  const int64_t splits = std::max<int64_t>(std::min(wanted, stages / least), 1);
  const int64_t split_stages = (stages + splits - 1) / splits;
  size.split_depth = split_stages * kDepth<T>;
  size.splits = static_cast<int>(split_stages > 0 ? (stages + split_stages - 1) / split_stages : 1);
}

template <class T, class Products, class Shape, class Problem>
void run_gemm_in_blocks(const char* operation, const Queue& queue, Problem problem, bool can_split) {
  GemmSize& size = problem.size;
  choose_splits<T, Shape>(size, device_multiprocessors(queue.device), can_split);
  if (size.splits > 1)
    problem.partials = queue.workspace<Compute<T>>(size.groups * int64_t{size.splits} * size.m * size.columns());
  const int64_t blocks = blocks_of<Shape>(size) * size.splits;  // along x alone: y and z end at 65535
  if (blocks > 0) {
    size.tiles_m = Divider((size.m + Shape::kM - 1) / Shape::kM);
    size.tiles_n = Divider((size.n + Shape::kN - 1) / Shape::kN);
    launch(operation, queue, gemm_kernel<T, Products, Shape, Problem>, dim3(static_cast<unsigned>(blocks)),
           kGemmThreads, kGemmSharedBytes<Shape>, problem);
  }
  if (size.splits > 1) add_splits<T>(operation, queue, problem);
}

// Larger blocks read less for each product, but must be enough for the device.
template <class T, class Products, class Problem>
void run_gemm(const char* operation, const Queue& queue, const Problem& problem, bool can_split) {
  trace<T>(queue, operation, Products::kName);
  const auto run_in = [&]<class Shape>(Shape) {
    run_gemm_in_blocks<T, Products, Shape>(operation, queue, problem, can_split);
  };
  if constexpr (Products::kTensorCores) {
    const GemmSize& size = problem.size;
    const int64_t multiprocessors = device_multiprocessors(queue.device);
    const bool tall = size.m > SquareBlock::kM;
    if (size.n <= NarrowBlock::kN) {
      if (tall && blocks_of<NarrowBlock>(size) >= multiprocessors) return run_in(NarrowBlock());
      // A warp of it has half a window.
      if constexpr (Problem::kRole != Role::forward) return run_in(SmallBlock());
    } else if (tall) {
      // The readers of gradients take the registers that the largest blocks need.
      if constexpr (Problem::kRole == Role::forward)
        if (size.n > TallBlock::kN && 3 * blocks_of<WideBlock>(size) >= 2 * multiprocessors &&
            kGemmSharedBytes<WideBlock> <= device_shared_bytes(queue.device))
          return run_in(WideBlock());
      // K is long enough to be split where it runs through pixels.
      if (Problem::kRole == Role::grad_weight || 4 * blocks_of<TallBlock>(size) >= 3 * multiprocessors)
        return run_in(TallBlock());
    }
  }
  run_in(SquareBlock());
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
