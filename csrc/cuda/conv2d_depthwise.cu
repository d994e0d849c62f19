// conv2d of one channel a group: see conv2d_depthwise.cuh.
#include "cuda/conv2d_depthwise.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kDepthwiseThreads = 256;

// Where a channel of an image begins.
template <class T>
__device__ __forceinline__ const T* channel_of(const ImageSource<T>& source, const ImagePixels& pixels, int64_t image,
                                               int channel) {
  return source.image + image * pixels.count * source.s.in_channels + channel;
}

template <class T>
__global__ void depthwise_forward_kernel(const GRID_CONSTANT ImageSource<T> input, const T* weight, const T* bias,
                                         bool relu, T* output) {
  begin_kernel();
  const Geometry& s = input.s;
  for (int64_t i = global_thread(); i < s.out_pixels() * s.out_channels; i += grid_threads()) {
    const int channel = static_cast<int>(i % s.out_channels);
    const Pixel p = out_pixel_after(s, PixelOrigin(i / s.out_channels, s.out), 0);
    const T* image = channel_of(input, s.in, p.image, channel);
    const int y = p.y * s.stride_y - s.padding_y, x = p.x * s.stride_x - s.padding_x;
    Compute<T> z = 0;
    for (int tap = 0; tap < s.taps; ++tap)
      if (const auto place = input_at(s, image, y, x, tap_of(s, tap, s.by.group_in)); place.valid)
        z += widen(*place.from) * widen(weight[int64_t{channel} * s.taps + tap]);
    if (bias) z += widen(bias[channel]);
    output[i] = narrow<T>(relu && z <= 0 ? 0 : z);
  }
}

template <class T>
__global__ void depthwise_grad_input_kernel(const GRID_CONSTANT ImageSource<T> gradient, const T* weight,
                                            T* grad_input) {
  begin_kernel();
  const Geometry& s = gradient.s;
  for (int64_t i = global_thread(); i < s.in_pixels() * s.in_channels; i += grid_threads()) {
    const int channel = static_cast<int>(i % s.in_channels);
    const PixelOrigin origin(i / s.in_channels, s.in);
    const Pixel p = pixel_after(origin, 0, s.by.in_height, s.by.in_width, s.batch);
    const T* image = channel_of(gradient, s.out, p.image, channel);
    Compute<T> sum = 0;
    for (int tap = 0; tap < s.taps; ++tap)
      if (const auto place = gradient_at(s, image, p.y + s.padding_y, p.x + s.padding_x, tap_of(s, tap, s.by.group_in));
          place.valid)
        sum += widen(*place.from) * widen(weight[int64_t{channel} * s.taps + tap]);
    grad_input[i] = narrow<T>(sum);
  }
}

// Blocks of x take 32 channels, of y a part of the output pixels, of z taps.
template <class T>
__global__ void depthwise_grad_weight_kernel(const GRID_CONSTANT ImageSource<T> gradient,
                                             const GRID_CONSTANT ImageSource<T> input, int64_t pixels_per_block,
                                             Compute<T>* partials) {
  begin_kernel();
  const Geometry& s = gradient.s;
  const int channel = blockIdx.x * 32 + threadIdx.x % 32;
  const int64_t first = blockIdx.y * pixels_per_block, end = first + pixels_per_block;
  const int64_t last = end < s.out_pixels() ? end : s.out_pixels();
  const PixelOrigin origin(first, s.out);
  for (int place_of_tap = blockIdx.z; place_of_tap < s.taps; place_of_tap += gridDim.z) {
    const Tap tap = tap_of(s, place_of_tap, s.by.group_in);
    Compute<T> sum = 0;
    if (channel < s.out_channels)
      for (int64_t i = first + threadIdx.x / 32; i < last; i += kSumRows) {
        const Pixel p = out_pixel_after(s, origin, static_cast<uint32_t>(i - first));
        const T* image = channel_of(input, s.in, p.image, channel);
        const auto place = input_at(s, image, p.y * s.stride_y - s.padding_y, p.x * s.stride_x - s.padding_x, tap);
        if (place.valid) sum += widen(*place.from) * widen(gradient.image[i * s.out_channels + channel]);
      }
    sum = Team(column_teams()).sum(sum);
    if (threadIdx.x < 32 && channel < s.out_channels)
      partials[(int64_t{blockIdx.y} * s.out_channels + channel) * s.taps + place_of_tap] = sum;
  }
}

}  // namespace

template <class T>
void depthwise_forward(const StageNames& names, const Queue& queue, const Conv2dShape& s, const Conv2dForward<T>& b) {
  trace<T>(queue, names.forward, "depthwise");
  const Geometry geometry(s);
  launch(names.forward, queue, depthwise_forward_kernel<T>,
         blocks_for(geometry.out_pixels() * s.out_channels, kDepthwiseThreads), kDepthwiseThreads, 0,
         ImageSource<T>::input(b.input, geometry), b.weight, b.bias, s.relu, b.output);
}

template <class T>
void depthwise_backward(const StageNames& names, const Queue& queue, const Conv2dShape& s, const Conv2dBackward<T>& b,
                        const T* z) {
  const Geometry geometry(s);
  const auto gradient = ImageSource<T>::gradient(z, geometry);
  if (b.grad_input) {
    trace<T>(queue, names.grad_input, "depthwise");
    launch(names.grad_input, queue, depthwise_grad_input_kernel<T>,
           blocks_for(geometry.in_pixels() * s.in_channels, kDepthwiseThreads), kDepthwiseThreads, 0, gradient,
           b.weight, b.grad_input);
  }
  if (b.grad_weight) {
    trace<T>(queue, names.grad_weight, "depthwise");
    const int64_t pixels = geometry.out_pixels(), column_blocks = (s.out_channels + 31) / 32;
    // Of less than 2^31 pixels each, as the kernel counts them.
    const int64_t parts = std::max(sum_parts(queue, pixels, column_blocks * geometry.taps), (pixels >> 30) + 1);
    Compute<T>* partials = queue.workspace<Compute<T>>(parts * s.out_channels * geometry.taps);
    launch(names.grad_weight, queue, depthwise_grad_weight_kernel<T>,
           dim3(column_blocks, parts, std::min(geometry.taps, kMostGridYZ)), kSumThreads,
           column_teams().shared_bytes<Compute<T>>(), gradient, ImageSource<T>::input(b.input, geometry),
           (pixels + parts - 1) / parts, partials);
    const int64_t count = s.out_channels * geometry.taps;
    launch(names.grad_weight, queue, add_partials_kernel<T>, blocks_for(count, 256), 256, 0, parts, count, partials,
           b.grad_weight);
  }
}

FASTNN_INSTANTIATE_OF(void, depthwise_forward, Conv2dForward)

#define FASTNN_INSTANTIATE_BACKWARD(T)                                                                            \
  template void depthwise_backward(const StageNames&, const Queue&, const Conv2dShape&, const Conv2dBackward<T>&, \
                                   const T*);
FASTNN_INSTANTIATE_BACKWARD(float)
FASTNN_INSTANTIATE_BACKWARD(double)
FASTNN_INSTANTIATE_BACKWARD(bfloat16)
FASTNN_INSTANTIATE_BACKWARD(float16)

}  // namespace fastnn::cuda
