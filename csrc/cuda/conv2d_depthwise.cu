// conv2d of one channel a group: see conv2d_depthwise.cuh.
#include "cuda/conv2d_depthwise.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kDepthwiseThreads = 256;

template <class T>
__global__ void depthwise_forward_kernel(const GRID_CONSTANT InputSource<T> input, const T* weight, const T* bias,
                                         bool relu, T* output) {
  const Geometry& s = input.s;
  for (int64_t i = global_thread(); i < s.out_pixels() * s.out_channels; i += grid_threads()) {
    const int channel = static_cast<int>(i % s.out_channels);
    const PixelOrigin origin(i / s.out_channels, s.out);
    const Pixel p = pixel_after(origin, 0, s.out_height, s.out_width, s.batch);
    Compute<T> z = 0;
    for (int tap = 0; tap < s.taps; ++tap)
      if (const T* x = input.at(p, {tap / s.kernel_width, tap % s.kernel_width, 0}, channel))
        z += widen(*x) * widen(weight[int64_t{channel} * s.taps + tap]);
    if (bias) z += widen(bias[channel]);
    output[i] = narrow<T>(relu && z <= 0 ? 0 : z);
  }
}

template <class T>
__global__ void depthwise_grad_input_kernel(const GRID_CONSTANT GradientSource<T> gradient, const T* weight,
                                            T* grad_input) {
  const Geometry& s = gradient.s;
  for (int64_t i = global_thread(); i < s.in_pixels() * s.in_channels; i += grid_threads()) {
    const int channel = static_cast<int>(i % s.in_channels);
    const PixelOrigin origin(i / s.in_channels, s.in);
    const Pixel p = pixel_after(origin, 0, s.in_height, s.in_width, s.batch);
    Compute<T> sum = 0;
    for (int tap = 0; tap < s.taps; ++tap) {
      const Pixel out = touched_output(s, p, {tap / s.kernel_width, tap % s.kernel_width, 0});
      if (out.valid) sum += widen(gradient.value(out, 0, channel)) * widen(weight[int64_t{channel} * s.taps + tap]);
    }
    grad_input[i] = narrow<T>(sum);
  }
}

// Blocks of x take 32 channels, of y a part of the output pixels, of z a tap.
template <class T>
__global__ void depthwise_grad_weight_kernel(const GRID_CONSTANT GradientSource<T> gradient,
                                             const GRID_CONSTANT InputSource<T> input, int64_t pixels_per_block,
                                             Compute<T>* partials) {
  const Geometry& s = gradient.s;
  const int channel = blockIdx.x * 32 + threadIdx.x % 32, tap = blockIdx.z;
  const int64_t first = blockIdx.y * pixels_per_block, end = first + pixels_per_block;
  const int64_t last = end < s.out_pixels() ? end : s.out_pixels();
  const PixelOrigin origin(first, s.out);
  Compute<T> sum = 0;
  if (channel < s.out_channels)
    for (int64_t i = first + threadIdx.x / 32; i < last; i += kSumRows) {
      const Pixel p = pixel_after(origin, static_cast<uint32_t>(i - first), s.out_height, s.out_width, s.batch);
      if (const T* x = input.at(p, {tap / s.kernel_width, tap % s.kernel_width, 0}, channel))
        sum += widen(*x) * widen(gradient.value(p, 0, channel));
    }
  sum = Team(column_teams()).sum(sum);
  if (threadIdx.x < 32 && channel < s.out_channels)
    partials[(int64_t{blockIdx.y} * s.out_channels + channel) * s.taps + tap] = sum;
}

}  // namespace

template <class T>
void depthwise_forward(const StageNames& names, const Queue& queue, const Conv2dShape& s, const Conv2dForward<T>& b) {
  trace<T>(queue, names.forward, "depthwise");
  const Geometry geometry(s);
  launch(names.forward, queue, depthwise_forward_kernel<T>,
         blocks_for(geometry.out_pixels() * s.out_channels, kDepthwiseThreads), kDepthwiseThreads, 0,
         InputSource<T>(b.input, geometry), b.weight, b.bias, s.relu, b.output);
}

template <class T>
void depthwise_backward(const StageNames& names, const Queue& queue, const Conv2dShape& s, const Conv2dBackward<T>& b) {
  const Geometry geometry(s);
  const GradientSource<T> gradient(b, geometry, s.relu);
  if (b.grad_input) {
    trace<T>(queue, names.grad_input, "depthwise");
    launch(names.grad_input, queue, depthwise_grad_input_kernel<T>,
           blocks_for(geometry.in_pixels() * s.in_channels, kDepthwiseThreads), kDepthwiseThreads, 0, gradient,
           b.weight, b.grad_input);
  }
  if (b.grad_weight) {
    trace<T>(queue, names.grad_weight, "depthwise");
    const int64_t pixels = geometry.out_pixels(), column_blocks = (s.out_channels + 31) / 32;
    const int64_t parts = sum_parts(queue, pixels, column_blocks * geometry.taps);
    Compute<T>* partials = queue.workspace<Compute<T>>(parts * s.out_channels * geometry.taps);
    launch(names.grad_weight, queue, depthwise_grad_weight_kernel<T>, dim3(column_blocks, parts, geometry.taps),
           kSumThreads, column_teams().shared_bytes<Compute<T>>(), gradient, InputSource<T>(b.input, geometry),
           (pixels + parts - 1) / parts, partials);
    const int64_t count = s.out_channels * geometry.taps;
    launch(names.grad_weight, queue, add_partials_kernel<T>, blocks_for(count, 256), 256, 0, parts, count, partials,
           b.grad_weight);
  }
}

FASTNN_INSTANTIATE_OF(void, depthwise_forward, Conv2dForward)
FASTNN_INSTANTIATE_OF(void, depthwise_backward, Conv2dBackward)

}  // namespace fastnn::cuda
