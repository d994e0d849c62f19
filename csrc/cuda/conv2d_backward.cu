// conv2d, backward: see ops/conv2d.h for the formulas, gemm.cuh for the products and conv2d_readers.cuh for their
// factors.
#include "cuda/conv2d.cuh"
#include "cuda/conv2d_depthwise.cuh"

namespace fastnn::cuda {
namespace {

// C (input pixels x input channels of a group).
template <class T>
struct GradInputProblem {
  using ReaderA = GradientRows<T>;
  using ReaderB = WeightColumns<T>;
  GradientSource<T> a;
  WeightSource<T> b;
  GemmSize size;
  Compute<T>* partials;
  T* grad_input;

  __device__ __forceinline__ void store_one(int group, int64_t m, int64_t n, Compute<T> z) const {
    grad_input[m * a.s.in_channels + group * a.s.group_in + n] = narrow<T>(z);
  }
  __device__ __forceinline__ void store(int group, int64_t m0, int64_t n0, Accumulators<Compute<T>>& c) const {
    store_each(*this, group, m0, n0, c);
  }
};

// C (output channels of a group x taps), and where the bias has a gradient one column more: its input is 1 everywhere.
template <class T>
struct GradWeightProblem {
  using ReaderA = SummedPixels<T, GradientSource>;
  using ReaderB = SummedPixels<T, InputAndOne>;
  GradientSource<T> a;
  InputAndOne<T> b;
  GemmSize size;
  Compute<T>* partials;
  T *grad_weight, *grad_bias;
  bool channels_last;

  __device__ __forceinline__ void store_one(int group, int64_t m, int64_t n, Compute<T> z) const {
    const Geometry& s = a.s;
    const int64_t channel = group * s.group_out + m, depth = int64_t{s.taps} * s.group_in;
    if (n == depth) {
      grad_bias[channel] = narrow<T>(z);
      return;
    }
    const Quotient tap = divide(static_cast<uint32_t>(n), s.group_in);
    grad_weight[channel * depth + (channels_last ? n : int64_t{tap.remainder} * s.taps + tap.quotient)] = narrow<T>(z);
  }
  __device__ __forceinline__ void store(int group, int64_t m0, int64_t n0, Accumulators<Compute<T>>& c) const {
    store_each(*this, group, m0, n0, c);
  }
};

// grad_bias without a product that it could be a column of: sums over the stored outputs, 32 channels a block. Blocks
// of y take equal parts of the outputs, whose sums are added in order by a second launch.
template <class T>
__global__ void grad_bias_kernel(int64_t outputs, int64_t outputs_per_block, int channels, const T* grad_output,
                                 const T* output, const uint8_t* winner, Compute<T>* partials, T* grad_bias) {
  const int channel = blockIdx.x * 32 + threadIdx.x % 32;
  const int64_t first = blockIdx.y * outputs_per_block;
  const int64_t last = first + outputs_per_block < outputs ? first + outputs_per_block : outputs;
  Compute<T> sum = 0;
  if (channel < channels)
    for (int64_t i = first + threadIdx.x / 32; i < last; i += kSumRows) {
      const int64_t at = i * channels + channel;
      const bool cut = winner ? winner[at] == kNoWinner : output && widen(output[at]) <= 0;
      if (!cut) sum += widen(grad_output[at]);
    }
  sum = Team(column_teams()).sum(sum);
  if (threadIdx.x >= 32 || channel >= channels) return;
  if (partials)
    partials[int64_t{blockIdx.y} * channels + channel] = sum;
  else
    grad_bias[channel] = narrow<T>(sum);
}

template <class T>
void run_grad_bias(const char* operation, const Queue& queue, const Conv2dShape& s, const Conv2dBackward<T>& b) {
  const Geometry geometry(s);
  const int64_t outputs = s.pool ? geometry.windows() : geometry.out_pixels();
  const int64_t column_blocks = (s.out_channels + 31) / 32;
  const int64_t parts = sum_parts(queue, outputs, column_blocks);
  Compute<T>* partials = parts > 1 ? queue.workspace<Compute<T>>(parts * s.out_channels) : nullptr;
  launch(operation, queue, grad_bias_kernel<T>, dim3(column_blocks, parts), kSumThreads,
         column_teams().shared_bytes<Compute<T>>(), outputs, (outputs + parts - 1) / parts, s.out_channels,
         b.grad_output, s.relu && !s.pool ? b.output : nullptr, s.pool ? b.winner : nullptr, partials, b.grad_bias);
  if (parts > 1)
    launch(operation, queue, add_partials_kernel<T>, blocks_for(s.out_channels, 256), 256, 0, parts, s.out_channels,
           partials, b.grad_bias);
}

}  // namespace

template <class T>
void run_conv2d_backward(const StageNames& names, const Queue& queue, const Conv2dShape& s,
                         const Conv2dBackward<T>& b) {
  check_sizes(names.grad_input, s);
  const Geometry geometry(s);
  const bool product = b.grad_weight && geometry.group_out > 0 && geometry.group_in > 0 && !is_depthwise(s);
  if (b.grad_bias && !product && s.out_channels > 0) run_grad_bias(names.grad_weight, queue, s, b);
  if (is_depthwise(s)) return depthwise_backward(names, queue, s, b);
  const GradientSource<T> gradient(b, geometry, s.relu);
  if (b.grad_input && geometry.in_pixels() > 0 && geometry.group_in > 0) {
    const T* weight = packed_weight(names.grad_input, queue, s, b.weight);
    const GradInputProblem<T> problem{gradient,
                                      WeightSource<T>(weight, geometry),
                                      {geometry.in_pixels(), geometry.group_in,
                                       int64_t{geometry.taps} * geometry.group_out, static_cast<int>(s.groups), 1, 0},
                                      nullptr,
                                      b.grad_input};
    run_gemm<T>(names.grad_input, queue, problem, s.precision, true);
  }
  if (product) {
    const GradWeightProblem<T> problem{
        gradient,
        InputAndOne<T>(b.input, geometry),
        {geometry.group_out, int64_t{geometry.taps} * geometry.group_in + (b.grad_bias ? 1 : 0),
         s.pool ? 4 * geometry.windows() : geometry.out_pixels(), static_cast<int>(s.groups), 1, 0},
        nullptr,
        b.grad_weight,
        b.grad_bias,
        s.weight_channels_last};
    run_gemm<T>(names.grad_weight, queue, problem, s.precision, true);
  }
}

template <class T>
void Kernels<T>::conv2d_backward(const Conv2dShape& s, const Conv2dBackward<T>& b) const {
  run_conv2d_backward(kConv2dStages, queue_, s, b);
}

FASTNN_INSTANTIATE(void, conv2d_backward, Conv2dShape, Conv2dBackward)
FASTNN_INSTANTIATE_OF(void, run_conv2d_backward, Conv2dBackward)

}  // namespace fastnn::cuda
