// Multi-tensor Adam, AdamW and SGD: see ops/optimizer.h for the formulas.
//
// Tensors are cut into tiles (vector.cuh), numbered through all tensors of a launch; a block takes every gridDim.x-th:
//
//   tensors   |      a      | b |       c       |
//   tiles     | 0 | 1 | 2 : | 3 | 4 | 5 | 6 | 7 |    a tensor's last tile may be part empty
//
// What a kernel knows of the tensors travels in its parameters: there is nothing to copy to the device first, and a
// CUDA graph keeps it.
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace fastnn::cuda {
namespace {

// All devices and drivers take 4 KiB of parameters. The tensors get what the options, 128 bytes at most, leave over.
constexpr size_t kParameterBytes = 4096, kOptionBytes = 128;

template <class Tensor>
struct OptimizerEntry {
  Tensor tensor;
  int64_t count;     // elements
  int64_t tile_end;  // tiles of the chunk up to and including this tensor's
  bool aligned;
};

// The tensors of one launch.
template <class Tensor>
struct OptimizerChunk {
  using Entry = OptimizerEntry<Tensor>;
  static constexpr int kMost = (kParameterBytes - kOptionBytes - sizeof(int64_t)) / sizeof(Entry);

  int64_t count;
  Entry entries[kMost];

  __host__ __device__ __forceinline__ int64_t tile_begin(int i) const { return i > 0 ? entries[i - 1].tile_end : 0; }
  __host__ __device__ __forceinline__ int64_t tiles() const { return tile_begin(static_cast<int>(count)); }
  // The tensor that a tile lies in.
  __device__ __forceinline__ int find(int64_t tile) const {
    int low = 0, high = static_cast<int>(count) - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (entries[middle].tile_end > tile)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }
};

// The chunk that begins with the list's tensor `first`: as many of the rest as fit. aligned(tensor) tells whether all
// of its arrays are 16-byte aligned.
template <class T, class Tensor, class Aligned>
OptimizerChunk<Tensor> chunk_from(const TensorList<Tensor>& list, int64_t first, const Aligned& aligned) {
  OptimizerChunk<Tensor> chunk{};
  for (int64_t i = first; i < list.count && chunk.count < chunk.kMost; ++i) {
    const int64_t elements = list.ends[i] - (i > 0 ? list.ends[i - 1] : 0);
    chunk.entries[chunk.count] = {list.tensors[i], elements, chunk.tiles() + lot_tiles<T>(elements),
                                  aligned(list.tensors[i])};
    ++chunk.count;
  }
  return chunk;
}

// Adam

__device__ __forceinline__ double read(const Scalar& scalar) { return scalar.place ? *scalar.place : scalar.value; }

// What depends on the step's number and on scheduled options: of each tensor, in the precision of its update.
template <class C>
struct alignas(4 * sizeof(C)) AdamScales {
  C step_size;   // lr / (1 - beta1^step)
  C root_scale;  // 1 / sqrt(1 - beta2^step)
  C keep;        // of the parameter, with decoupled decay
  C beta2, one_minus_beta2;
  // m + w (g - m) loses m's share where w = 1 - beta1 is large, g - beta1 (g - m) where it is small: torch.lerp's
  // choice. `factor` is w or -beta1.
  C factor;
  bool from_average;
};

struct AdamSteps {
  static constexpr int kMost = (kParameterBytes - kOptionBytes) / sizeof(float*);
  float* steps[kMost];
};

constexpr int kAdamScalesThreads = 128;

// Counts the update and works out its scales, in double as torch's capturable update does, a thread a tensor. A launch
// of its own: in the update, every block would take two powers, and no block could tell when all others have read the
// step and it may be overwritten.
template <class C>
__global__ void __launch_bounds__(kAdamScalesThreads)
    adam_scales_kernel(int64_t count, AdamOptions o, AdamScales<C>* scales, AdamSteps chunk) {
  begin_kernel();
  const int64_t i = global_thread();
  if (i >= count) return;
  const float step = *chunk.steps[i] + 1;
  *chunk.steps[i] = step;
  const double lr = read(o.lr), beta1 = read(o.beta1), beta2 = read(o.beta2);
  const bool from_average = 1 - beta1 < 0.5;
  scales[i] = {static_cast<C>(lr / (1 - std::pow(beta1, static_cast<double>(step)))),
               static_cast<C>(1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step)))),
               static_cast<C>(o.decoupled ? 1 - lr * o.weight_decay : 1),
               static_cast<C>(beta2),
               static_cast<C>(1 - beta2),
               static_cast<C>(from_average ? 1 - beta1 : -beta1),
               from_average};
}

// The other options in the precision of the update.
template <class C>
struct AdamConstants {
  C sign, coupled_decay, eps;
};

// A thread loads 16 bytes of each of four arrays before it uses the first: 64 bytes in flight. 85 registers let three
// blocks stay on a multiprocessor, 48 KiB under way (float takes 62 and four blocks; three 16-bit ones take 72). Memory
// at 3.4 TB/s with 0.7 us of latency asks for 18 KiB from each of 132: there is room for blocks that search their
// tensor, compute or store.
constexpr int kAdamBlocks = 3;

template <class T>
__global__ void __launch_bounds__(kLotThreads, kAdamBlocks)
    adam_kernel(AdamConstants<Compute<T>> o, const AdamScales<Compute<T>>* scales,
                OptimizerChunk<AdamTensor<T>> chunk) {
  begin_kernel();
  using C = Compute<T>;
  for (int64_t tile = blockIdx.x; tile < chunk.tiles(); tile += gridDim.x) {
    const int i = chunk.find(tile);
    const AdamTensor<T> t = chunk.entries[i].tensor;
    const Lot<T> lot(tile - chunk.tile_begin(i), chunk.entries[i].count, chunk.entries[i].aligned);
    auto params = lot.load(t.param);
    const auto grads = lot.load(t.grad);
    auto exp_avgs = lot.load(t.exp_avg);
    auto exp_avg_sqs = lot.load(t.exp_avg_sq);
    typename Lot<T>::Values largest{};
    if (t.max_exp_avg_sq) largest = lot.load(t.max_exp_avg_sq);
    const AdamScales<C> scale = scales[i];
#pragma unroll
    for (int e = 0; e < Lot<T>::kSize; ++e) {
      const C p = widen(params.values[e]) * scale.keep;
      C g = widen(grads.values[e]) * o.sign;
      if (o.coupled_decay != 0) g += o.coupled_decay * p;  // not without decay: 0 * inf is NaN
      const C average = widen(exp_avgs.values[e]);
      const C m = (scale.from_average ? average : g) + (g - average) * scale.factor;
      C v = widen(exp_avg_sqs.values[e]) * scale.beta2 + scale.one_minus_beta2 * g * g;
      exp_avgs.values[e] = narrow<T>(m);
      exp_avg_sqs.values[e] = narrow<T>(v);
      if (t.max_exp_avg_sq) {
        const C most = widen(largest.values[e]);
        v = v > most || v != v ? v : most;
        largest.values[e] = narrow<T>(v);
      }
      params.values[e] = narrow<T>(p - scale.step_size * (m / (std::sqrt(v) * scale.root_scale + o.eps)));
    }
    lot.store(t.param, params);
    lot.store(t.exp_avg, exp_avgs);
    lot.store(t.exp_avg_sq, exp_avg_sqs);
    if (t.max_exp_avg_sq) lot.store(t.max_exp_avg_sq, largest);
  }
}

// SGD

template <class C>
struct SgdConstants {
  C sign, decay, fresh;
  Scalar lr, momentum;
  bool nesterov;
};

template <class T>
__global__ void __launch_bounds__(kLotThreads)
    sgd_kernel(SgdConstants<Compute<T>> o, OptimizerChunk<SgdTensor<T>> chunk) {
  begin_kernel();
  using C = Compute<T>;
  const C lr = static_cast<C>(read(o.lr)), momentum = static_cast<C>(read(o.momentum));
  for (int64_t tile = blockIdx.x; tile < chunk.tiles(); tile += gridDim.x) {
    const int i = chunk.find(tile);
    const SgdTensor<T> t = chunk.entries[i].tensor;
    const Lot<T> lot(tile - chunk.tile_begin(i), chunk.entries[i].count, chunk.entries[i].aligned);
    auto params = lot.load(t.param);
    const auto grads = lot.load(t.grad);
    typename Lot<T>::Values buffers{};
    if (t.momentum_buffer && !t.first) buffers = lot.load(t.momentum_buffer);
#pragma unroll
    for (int e = 0; e < Lot<T>::kSize; ++e) {
      const C p = widen(params.values[e]);
      C g = widen(grads.values[e]) * o.sign;
      if (o.decay != 0) g += o.decay * p;  // not without decay: 0 * inf is NaN
      if (t.momentum_buffer) {
        const C b = t.first ? g : widen(buffers.values[e]) * momentum + g * o.fresh;
        buffers.values[e] = narrow<T>(b);
        g = o.nesterov ? g + momentum * b : b;
      }
      params.values[e] = narrow<T>(p - lr * g);
    }
    lot.store(t.param, params);
    if (t.momentum_buffer) lot.store(t.momentum_buffer, buffers);
  }
}

}  // namespace

template <class T>
void Kernels<T>::adam_step(const AdamOptions& o, const TensorList<AdamTensor<T>>& list) const {
  using C = Compute<T>;
  trace<T>(queue_, "adam_step", o.decoupled ? "adamw" : "adam");
  AdamScales<C>* scales = queue_.workspace<AdamScales<C>>(list.count);
  AdamSteps steps;
  for (int64_t first = 0; first < list.count; first += steps.kMost) {
    const int64_t count = list.count - first < steps.kMost ? list.count - first : steps.kMost;
    for (int64_t i = 0; i < count; ++i) steps.steps[i] = list.tensors[first + i].step;
    launch("adam_step", queue_, adam_scales_kernel<C>, blocks_for(count, kAdamScalesThreads), kAdamScalesThreads, 0,
           count, o, scales + first, steps);
  }

  const AdamConstants<C> constants{static_cast<C>(o.maximize ? -1 : 1),
                                   static_cast<C>(o.decoupled ? 0 : o.weight_decay), static_cast<C>(o.eps)};
  const auto aligned = [](const AdamTensor<T>& t) {
    return aligned_to(16, t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.max_exp_avg_sq);
  };
  using Chunk = OptimizerChunk<AdamTensor<T>>;
  static_assert(sizeof(constants) + sizeof(scales) + sizeof(Chunk) <= kParameterBytes);
  for (int64_t first = 0; first < list.count; first += Chunk::kMost) {
    const Chunk chunk = chunk_from<T>(list, first, aligned);
    launch("adam_step", queue_, adam_kernel<T>, blocks_for(chunk.tiles(), 1), kLotThreads, 0, constants, scales + first,
           chunk);
  }
}

template <class T>
void Kernels<T>::sgd_step(const SgdOptions& o, const TensorList<SgdTensor<T>>& list) const {
  using C = Compute<T>;
  trace<T>(queue_, "sgd_step", o.has_momentum() ? "momentum" : "plain");
  const SgdConstants<C> constants{static_cast<C>(o.maximize ? -1 : 1),
                                  static_cast<C>(o.weight_decay),
                                  static_cast<C>(1 - o.dampening),
                                  o.lr,
                                  o.momentum,
                                  o.nesterov};
  const auto aligned = [](const SgdTensor<T>& t) { return aligned_to(16, t.param, t.grad, t.momentum_buffer); };
  using Chunk = OptimizerChunk<SgdTensor<T>>;
  static_assert(sizeof(constants) + sizeof(Chunk) <= kParameterBytes);
  for (int64_t first = 0; first < list.count; first += Chunk::kMost) {
    const Chunk chunk = chunk_from<T>(list, first, aligned);
    launch("sgd_step", queue_, sgd_kernel<T>, blocks_for(chunk.tiles(), 1), kLotThreads, 0, constants, chunk);
  }
}

template void Kernels<float>::adam_step(const AdamOptions&, const TensorList<AdamTensor<float>>&) const;
template void Kernels<double>::adam_step(const AdamOptions&, const TensorList<AdamTensor<double>>&) const;
template void Kernels<bfloat16>::adam_step(const AdamOptions&, const TensorList<AdamTensor<bfloat16>>&) const;
template void Kernels<float16>::adam_step(const AdamOptions&, const TensorList<AdamTensor<float16>>&) const;
template void Kernels<float>::sgd_step(const SgdOptions&, const TensorList<SgdTensor<float>>&) const;
template void Kernels<double>::sgd_step(const SgdOptions&, const TensorList<SgdTensor<double>>&) const;
template void Kernels<bfloat16>::sgd_step(const SgdOptions&, const TensorList<SgdTensor<bfloat16>>&) const;
template void Kernels<float16>::sgd_step(const SgdOptions&, const TensorList<SgdTensor<float16>>&) const;

}  // namespace fastnn::cuda
