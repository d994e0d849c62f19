// conv2d, forward: see ops/conv2d.h for the formula, gemm.cuh for the product and conv2d_readers.cuh for its factors.
#include "cuda/conv2d.cuh"
#include "cuda/conv2d_depthwise.cuh"

namespace fastnn::cuda {
namespace {

// C (output pixels x output channels of a group), then bias, ReLU and pooling.
template <class T>
struct ForwardProblem {
  using ReaderA = InputRows<T>;
  using ReaderB = WeightRows<T>;
  InputSource<T> a;
  WeightSource<T> b;
  GemmSize size;
  Compute<T>* partials;
  T* output;
  uint8_t* winner;
  const T* bias;
  bool relu;

  __device__ __forceinline__ Compute<T> finish(Compute<T> z, int channel) const {
    if (bias) z += widen(bias[channel]);
    return relu && z <= 0 ? 0 : z;  // NaN stays
  }

  __device__ __forceinline__ void store_one(int group, int64_t m, int64_t n, Compute<T> z) const {
    const Geometry& s = a.s;
    const int channel = group * s.group_out + static_cast<int>(n);
    output[m * s.out_channels + channel] = narrow<T>(finish(z, channel));
  }

  __device__ __forceinline__ void store(int group, int64_t m0, int64_t n0, Accumulators<Compute<T>>& c) const {
    const Geometry& s = a.s;
    if (!s.pool) return store_each(*this, group, m0, n0, c);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int64_t window = m0 / 32 * 8 + g;
    if (window >= s.windows()) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int64_t n = n0 + 8 * (j / 2) + 2 * t + j % 2;
      if (n < size.n) store_pooled(window, group * s.group_out + static_cast<int>(n), c, j);
    }
  }

  // The maximum of a window, whose places are the four rows of column j: the first of equals, and NaN before all.
  __device__ __forceinline__ void store_pooled(int64_t window, int channel, Accumulators<Compute<T>>& c, int j) const {
    Compute<T> best = c.value(0, j);
    int place = 0;
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      const Compute<T> z = c.value(i, j);
      if (z > best || (z != z && best == best)) best = z, place = i;
    }
    if (bias) best += widen(bias[channel]);
    const bool cut = relu && best <= 0;
    const int64_t at = window * a.s.out_channels + channel;
    output[at] = narrow<T>(cut ? 0 : best);
    winner[at] = cut ? kNoWinner : place;
  }
};

}  // namespace

template <class T>
void run_conv2d_forward(const StageNames& names, const Queue& queue, const Conv2dShape& s, const Conv2dForward<T>& b) {
  if (s.batch == 0 || s.out_channels == 0) return;
  check_sizes(names.forward, s);
  if (is_depthwise(s)) return depthwise_forward(names, queue, s, b);
  const Geometry geometry(s);
  const T* weight = packed_weight(names.forward, queue, s, b.weight);
  const int64_t m = s.pool ? (geometry.windows() + 7) / 8 * 32 : geometry.out_pixels();
  const ForwardProblem<T> problem{
      InputSource<T>(b.input, geometry),
      WeightSource<T>(weight, geometry),
      {m, geometry.group_out, int64_t{geometry.taps} * geometry.group_in, static_cast<int>(s.groups), 1, 0},
      nullptr,
      b.output,
      b.winner,
      b.bias,
      s.relu};
  run_gemm<T>(names.forward, queue, problem, s.precision, !s.pool);
}

template <class T>
void Kernels<T>::conv2d_forward(const Conv2dShape& s, const Conv2dForward<T>& b) const {
  run_conv2d_forward(kConv2dStages, queue_, s, b);
}

FASTNN_INSTANTIATE(void, conv2d_forward, Conv2dShape, Conv2dForward)
FASTNN_INSTANTIATE_OF(void, run_conv2d_forward, Conv2dForward)

}  // namespace fastnn::cuda
