// conv2d, forward: see ops/conv2d.h for the formula, gemm.cuh for the product and conv2d_readers.cuh for its factors.
#include "cuda/conv2d.cuh"
#include "cuda/conv2d_depthwise.cuh"
#include "cuda/conv2d_few_taps.cuh"

namespace fastnn::cuda {
namespace {

// C (output pixels x output channels of a group), then bias, ReLU and pooling.
template <class T>
struct ForwardProblem {
  using Readers = ReadersOf<T, InputRows, WeightRows>;
  static constexpr Role kRole = Role::forward;
  ImageSource<T> a;
  WeightSource<T> b;
  GemmSize size;
  Compute<T>* partials;
  T* output;
  uint8_t* winner;
  const T* bias;
  bool relu;

  __device__ __forceinline__ void store(int group, int64_t m, int64_t n, Compute<T> z) const {
    const int channel = group * a.s.group_out + static_cast<int>(n);
    if (bias) z += widen(bias[channel]);
    output[m * a.s.out_channels + channel] = narrow<T>(relu && z <= 0 ? 0 : z);  // NaN stays
  }

  __device__ __forceinline__ bool pools() const { return a.s.pool; }
  template <class Shape>
  __device__ __forceinline__ void store_pooled(int group, int64_t m0, int64_t n0,
                                               Accumulators<Compute<T>, Shape>& c) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < c.kRows; i += 4) {
      const int64_t window = m0 / 4 + 2 * i + g;
      if (window >= a.s.windows()) return;
#pragma unroll
      for (int j = 0; j < c.kColumns; ++j) {
        const int64_t n = n0 + 8 * (j / 2) + 2 * t + j % 2;
        if (n >= size.n) continue;
        const Compute<T> places[4] = {c.value(i, j), c.value(i + 1, j), c.value(i + 2, j), c.value(i + 3, j)};
        store_largest(window, group * a.s.group_out + static_cast<int>(n), places);
      }
    }
  }

  // The four places of a window, or of what is not pooled four outputs that follow each other.
  __device__ __forceinline__ void store_places(int64_t item, int channel, const Compute<T> (&z)[4]) const {
    if (a.s.pool) return store_largest(item, channel, z);
#pragma unroll
    for (int place = 0; place < 4; ++place)
      if (4 * item + place < a.s.out_pixels()) store(0, 4 * item + place, channel, z[place]);
  }

 private:
  // The maximum of a window: the first of equals, and NaN before all.
  __device__ __forceinline__ void store_largest(int64_t window, int channel, const Compute<T> (&places)[4]) const {
    Compute<T> best = places[0];
    int place = 0;
#pragma unroll
    for (int i = 1; i < 4; ++i)
      if (places[i] > best || (places[i] != places[i] && best == best)) best = places[i], place = i;
    if (bias) best += widen(bias[channel]);
    const bool cut = relu && best <= 0;
    const int64_t at = window * a.s.out_channels + channel;
    output[at] = narrow<T>(cut ? 0 : best);
    if (winner) winner[at] = cut ? kNoWinner : place;
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
      ImageSource<T>::input(b.input, geometry),
      WeightSource<T>(weight, geometry),
      {m, geometry.group_out, int64_t{geometry.taps} * geometry.group_in, static_cast<int>(s.groups), 1, 0},
      nullptr,
      b.output,
      b.winner,
      b.bias,
      s.relu};
  if (has_few_taps(s) && geometry.taps > 1) return direct_forward<T>(names.forward, queue, problem);
  run_gemm<T>(names.forward, queue, problem, s.precision, !s.pool);
}

template <class T>
void Kernels<T>::conv2d_forward(const Conv2dShape& s, const Conv2dForward<T>& b) const {
  run_conv2d_forward(kConv2dStages, queue_, s, b);
}

FASTNN_INSTANTIATE(void, conv2d_forward, Conv2dShape, Conv2dForward)
FASTNN_INSTANTIATE_OF(void, run_conv2d_forward, Conv2dForward)

}  // namespace fastnn::cuda
