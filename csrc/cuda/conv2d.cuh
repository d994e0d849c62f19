// What conv2d's two directions share, and their entry by the name of the operator that asks: linear is a convolution of
// images of one pixel.
#pragma once

#include "cuda/conv2d_readers.cuh"

namespace fastnn::cuda {

// What the stages are called in traces and errors.
struct StageNames {
  const char *forward, *grad_input, *grad_weight;
};
constexpr StageNames kConv2dStages{"conv2d_forward", "conv2d_grad_input", "conv2d_grad_weight"};
constexpr StageNames kLinearStages{"linear_forward", "linear_backward", "linear_backward"};

template <class T>
void run_conv2d_forward(const StageNames& names, const Queue& queue, const Conv2dShape& s, const Conv2dForward<T>& b);
template <class T>
void run_conv2d_backward(const StageNames& names, const Queue& queue, const Conv2dShape& s, const Conv2dBackward<T>& b);

// (out, in, taps) to (out, taps, in): the order that the readers take.
template <class T>
__global__ void pack_weight_kernel(int64_t count, int taps, int in, const T* weight, T* packed) {
  begin_kernel();
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    const int64_t row = i / in, out = row / taps;
    packed[i] = weight[(out * in + i % in) * taps + row % taps];
  }
}

// The weight as the readers take it: itself, or a copy in the workspace.
template <class T>
const T* packed_weight(const char* operation, const Queue& queue, const Conv2dShape& s, const T* weight) {
  const int64_t in = s.in_channels / s.groups, taps = s.kernel_height * s.kernel_width;
  if (s.weight_channels_last || in == 1 || taps == 1) return weight;
  const int64_t count = s.out_channels * taps * in;
  T* packed = queue.workspace<T>(count);
  launch(operation, queue, pack_weight_kernel<T>, blocks_for(count, 256), 256, 0, count, taps, in, weight, packed);
  return packed;
}

// Sizes that the kernels hold in 32 bits: offsets within a kernel's taps, a padded image and, of a stride of 1, as many
// outputs. Others are counted in 64.
inline void check_sizes(const char* operation, const Conv2dShape& s) {
  constexpr int64_t kMost = int64_t{1} << 31;
  const auto fail = [&](const char* expected) {
    throw std::runtime_error(std::string(operation) + ": expected " + expected);
  };
  const int64_t taps = s.kernel_height * s.kernel_width;
  const int64_t in = s.in_channels / s.groups, out = s.out_channels / s.groups;
  if (taps * in >= kMost || taps * out >= kMost || s.in_channels >= kMost || s.out_channels >= kMost)
    fail("a kernel of less than 2^31 values a channel");
  const int64_t height = s.in_height + 2 * s.padding_height, width = s.in_width + 2 * s.padding_width;
  const bool unit_stride = s.stride_height == 1 && s.stride_width == 1;
  const int64_t channels = unit_stride ? std::max(s.in_channels, s.out_channels) : s.in_channels;
  if (height >= kMost || width >= kMost || height * width >= kMost / 2 || height * width * channels >= kMost ||
      s.out_height * s.out_width * s.out_channels >= kMost)
    fail("padded images of less than 2^30 pixels and 2^31 values");
}

}  // namespace fastnn::cuda

// A function of stage names, a queue and a shape, for every dtype.
#define FASTNN_INSTANTIATE_OF(result, function, Buffers)                                                   \
  template result function(const StageNames&, const Queue&, const Conv2dShape&, const Buffers<float>&);    \
  template result function(const StageNames&, const Queue&, const Conv2dShape&, const Buffers<double>&);   \
  template result function(const StageNames&, const Queue&, const Conv2dShape&, const Buffers<bfloat16>&); \
  template result function(const StageNames&, const Queue&, const Conv2dShape&, const Buffers<float16>&);
