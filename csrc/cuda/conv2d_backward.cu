// conv2d, backward: see ops/conv2d.h for the formulas, gemm.cuh for the products and conv2d_readers.cuh for their
// factors.
#include "cuda/conv2d.cuh"
#include "cuda/conv2d_depthwise.cuh"
#include "cuda/conv2d_few_taps.cuh"

namespace fastnn::cuda {
namespace {

// C (input pixels x input channels of a group).
template <class T>
struct GradInputProblem {
  using Readers = ReadersOf<T, GradientRows, WeightColumns>;
  static constexpr Role kRole = Role::grad_input;
  ImageSource<T> a;
  WeightSource<T> b;
  GemmSize size;
  Compute<T>* partials;
  T* grad_input;

  __device__ __forceinline__ void store(int group, int64_t m, int64_t n, Compute<T> z) const {
    grad_input[m * a.s.in_channels + group * a.s.group_in + n] = narrow<T>(z);
  }
};

// C (output channels of a group x taps), and the sums of A's rows, which are the bias's gradient.
template <class T>
struct GradWeightProblem {
  using Readers = ReadersOf<T, GradientColumns, InputColumns>;
  static constexpr Role kRole = Role::grad_weight;
  ImageSource<T> a, b;
  GemmSize size;
  Compute<T>* partials;
  T *grad_weight, *grad_bias;
  bool channels_last;

  __device__ __forceinline__ void store(int group, int64_t m, int64_t n, Compute<T> z) const {
    const Geometry& s = a.s;
    const int64_t channel = group * s.group_out + m, depth = int64_t{s.taps} * s.group_in;
    if (n == depth) {
      grad_bias[channel] = narrow<T>(z);
      return;
    }
    uint32_t in = static_cast<uint32_t>(n);
    const uint32_t tap = s.by.group_in.split(in);
    grad_weight[channel * depth + (channels_last ? n : int64_t{in} * s.taps + tap)] = narrow<T>(z);
  }
};

// grad_bias without a product that it could be a column of: sums over the outputs, 32 channels a block. Blocks of y
// take equal parts of the outputs, whose sums are added in order by a second launch.
template <class T>
__global__ void grad_bias_kernel(int64_t outputs, int64_t outputs_per_block, int channels, const T* gradient,
                                 Compute<T>* partials, T* grad_bias) {
  begin_kernel();
  const int channel = blockIdx.x * 32 + threadIdx.x % 32;
  const int64_t first = blockIdx.y * outputs_per_block;
  const int64_t last = first + outputs_per_block < outputs ? first + outputs_per_block : outputs;
  Compute<T> sum = 0;
  if (channel < channels)
    for (int64_t i = first + threadIdx.x / 32; i < last; i += kSumRows) sum += widen(gradient[i * channels + channel]);
  sum = Team(column_teams()).sum(sum);
  if (threadIdx.x >= 32 || channel >= channels) return;
  if (partials)
    partials[int64_t{blockIdx.y} * channels + channel] = sum;
  else
    grad_bias[channel] = narrow<T>(sum);
}

template <class T>
void run_grad_bias(const char* operation, const Queue& queue, const Conv2dShape& s, const T* gradient, T* grad_bias) {
  const int64_t outputs = Geometry(s).out_pixels();
  const int64_t column_blocks = (s.out_channels + 31) / 32;
  const int64_t parts = sum_parts(queue, outputs, column_blocks);
  Compute<T>* partials = parts > 1 ? queue.workspace<Compute<T>>(parts * s.out_channels) : nullptr;
  launch(operation, queue, grad_bias_kernel<T>, dim3(column_blocks, parts), kSumThreads,
         column_teams().shared_bytes<Compute<T>>(), outputs, (outputs + parts - 1) / parts, s.out_channels, gradient,
         partials, grad_bias);
  if (parts > 1)
    launch(operation, queue, add_partials_kernel<T>, blocks_for(s.out_channels, 256), 256, 0, parts, s.out_channels,
           partials, grad_bias);
}

// The gradient of z where its windows were pooled: each window's gradient at the place of its winner, 0 elsewhere. A
// thread takes kSize channels of a window; `packs` are those of a row of windows.
template <class T, int kSize>
__global__ void __launch_bounds__(kLotThreads)
    unpool_kernel(int64_t count, ImagePixels packs, Divider channel_packs, int width, int channels,
                  const T* grad_output, const uint8_t* winner, T* gradient) {
  begin_kernel();
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    const PixelOrigin row(i, packs);
    uint32_t pack = row.rest;
    const int64_t x = channel_packs.split(pack);
    const auto grads = load_pack<T, kSize>(grad_output + i * kSize);
    const auto winners = load_pack<uint8_t, kSize>(winner + i * kSize);
#pragma unroll
    for (int place = 0; place < 4; ++place) {
      Pack<T, kSize> values;
#pragma unroll
      for (int e = 0; e < kSize; ++e) values.values[e] = winners.values[e] == place ? grads.values[e] : narrow<T>(0);
      const int64_t y = 2 * row.image + place / 2;
      store_pack(gradient + (y * width + 2 * x + place % 2) * channels + int64_t{pack} * kSize, values);
    }
  }
}

template <class T, int kSize>
void run_unpool(const char* operation, const Queue& queue, const Conv2dShape& s, const Conv2dBackward<T>& b,
                T* gradient) {
  const int64_t width = s.out_width / 2, channel_packs = s.out_channels / kSize;
  const int64_t count = s.batch * (s.out_height / 2) * width * channel_packs;
  launch(operation, queue, unpool_kernel<T, kSize>, blocks_for(count, kLotThreads), kLotThreads, 0, count,
         ImagePixels(width * channel_packs), Divider(channel_packs), 2 * width, s.out_channels, b.grad_output, b.winner,
         gradient);
}

// The gradient of z: grad_output where ReLU and pooling let it through. In the workspace, where there is either, so
// that products read it as they read images.
template <class T>
const T* gradient_of_z(const char* operation, const Queue& queue, const Conv2dShape& s, const Conv2dBackward<T>& b) {
  if (!s.pool && !s.relu) return b.grad_output;
  const int64_t count =
      s.batch * s.out_channels * (s.pool ? s.out_height / 2 * (s.out_width / 2) * 4 : s.out_height * s.out_width);
  T* gradient = queue.workspace<T>(count);
  if (count == 0) return gradient;
  if (!s.pool)
    Kernels<T>(queue).relu_backward({count}, {gradient, b.grad_output, b.output});
  else if (s.out_channels % kChunk<T> == 0 && aligned_to(16, b.grad_output) && aligned_to(kChunk<T>, b.winner))
    run_unpool<T, kChunk<T>>(operation, queue, s, b, gradient);
  else
    run_unpool<T, 1>(operation, queue, s, b, gradient);
  return gradient;
}

// The convolution whose output is what was pooled: without the row and the column that no window has.
Conv2dShape without_rest(Conv2dShape s) {
  if (s.pool) s.out_height -= s.out_height % 2, s.out_width -= s.out_width % 2;
  s.pool = s.relu = false;
  return s;
}

}  // namespace

template <class T>
void run_conv2d_backward(const StageNames& names, const Queue& queue, const Conv2dShape& fused,
                         const Conv2dBackward<T>& b) {
  check_sizes(names.grad_input, fused);
  const Conv2dShape s = without_rest(fused);
  const Geometry geometry(s);
  const bool product = b.grad_weight && geometry.group_out > 0 && geometry.group_in > 0 && !is_depthwise(s);
  const bool sparse = product && is_sparse(fused);
  const bool grad_input = b.grad_input && geometry.in_pixels() > 0 && geometry.group_in > 0;
  const T* z = sparse && !grad_input ? nullptr : gradient_of_z(names.grad_input, queue, fused, b);
  if (b.grad_bias && !product && s.out_channels > 0) run_grad_bias(names.grad_weight, queue, s, z, b.grad_bias);
  if (is_depthwise(s)) return depthwise_backward(names, queue, s, b, z);
  const auto gradient = ImageSource<T>::gradient(z, geometry);
  const Fork fork(queue, grad_input && product);
  if (grad_input) {
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
        ImageSource<T>::input(b.input, geometry),
        {geometry.group_out, int64_t{geometry.taps} * geometry.group_in, geometry.out_pixels(),
         static_cast<int>(s.groups), 1, 0, b.grad_bias != nullptr},
        nullptr,
        b.grad_weight,
        b.grad_bias,
        s.weight_channels_last};
    if (sparse)
      sparse_grad_weight(names.grad_weight, fork.side(), fused, b, problem);
    else
      run_gemm<T>(names.grad_weight, fork.side(), problem, s.precision, true);
  }
  fork.join();
}

template <class T>
void Kernels<T>::conv2d_backward(const Conv2dShape& s, const Conv2dBackward<T>& b) const {
  run_conv2d_backward(kConv2dStages, queue_, s, b);
}

FASTNN_INSTANTIATE(void, conv2d_backward, Conv2dShape, Conv2dBackward)
FASTNN_INSTANTIATE_OF(void, run_conv2d_backward, Conv2dBackward)

}  // namespace fastnn::cuda
