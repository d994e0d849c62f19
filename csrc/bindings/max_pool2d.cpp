// max_pool2d_forward, max_pool2d_backward: see ops/max_pool2d.h for the formulas.
#include <algorithm>

#include "bindings/module.h"
#include "bindings/run.h"

namespace fastnn {
namespace {

// A single window takes no step: any stride means the kernel's reach, and a larger one would only cost memory.
PoolAxis pool_axis(int64_t size, int64_t out_size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t reach = (kernel - 1) * dilation + 1;
  return {size, out_size, kernel, out_size == 1 ? std::min(stride, reach) : stride, padding, dilation};
}

// Checks what both directions share. `output` has the pooled shape; an image without batch counts as a batch of one.
MaxPool2dShape pool_shape(const Tensor& input, const Tensor& output, const Pair& kernel_size, const Pair& stride,
                          const Pair& padding, const Pair& dilation, const char* output_name) {
  check_device("input", input);
  if (input.dim() != 3 && input.dim() != 4)
    fail_value("input", "shape (channels, height, width) or (batch, channels, height, width)", input.shape_string());
  check_pair("kernel_size", kernel_size, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  const int64_t c = input.dim() - 3;
  const int64_t batch = c == 0 ? 1 : input.size(0);
  if (c == 0)
    check_shape(output_name, output, {input.size(0), "out_height", "out_width"});
  else
    check_shape(output_name, output, {input.size(0), input.size(1), "out_height", "out_width"});
  check_same_kind(output_name, output, "input", input);
  const bool channels_last = input.is_channels_last() && output.is_channels_last();
  if (!channels_last) {
    check_contiguous("input", input);
    check_contiguous(output_name, output);
  }
  return {batch, input.size(c),
          pool_axis(input.size(c + 1), output.size(c + 1), kernel_size[0], stride[0], padding[0], dilation[0]),
          pool_axis(input.size(c + 2), output.size(c + 2), kernel_size[1], stride[1], padding[1], dilation[1]),
          channels_last};
}

// winners: bytes or indices, in the shape and order of the output.
void check_winners(const Tensor& winners, const Tensor& output, const char* output_name, const MaxPool2dShape& shape) {
  if (winners.dtype() != DType::uint8 && winners.dtype() != DType::int64)
    fail_type("winners", "uint8 or int64", winners.dtype_string());
  if (!winners.has_shape_of(output))
    fail_value("winners", "the shape of " + std::string(output_name) + ", " + output.shape_string(),
               winners.shape_string());
  if (winners.dtype() == DType::uint8 && shape.y.kernel * shape.x.kernel > kMaxByteTaps)
    fail_value("winners", "int64 for a kernel of more than " + std::to_string(kMaxByteTaps) + " taps", "uint8");
  check_same_device("winners", winners, output_name, output);
  shape.channels_last ? check_channels_last("winners", winners) : check_contiguous("winners", winners);
}

template <class T>
T* data_if(const std::optional<Tensor>& tensor, DType dtype) {
  return tensor && tensor->dtype() == dtype ? tensor->data<T>() : nullptr;
}

void max_pool2d_forward(const Tensor& output, const std::optional<Tensor>& winners, const Tensor& input,
                        const Pair& kernel_size, const Pair& stride, const Pair& padding, const Pair& dilation) {
  const MaxPool2dShape shape = pool_shape(input, output, kernel_size, stride, padding, dilation, "output");
  if (winners) check_winners(*winners, output, "output", shape);
  if (output.numel() == 0) return;
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input, [=](const auto& kernels) {
      kernels.max_pool2d_forward(shape, {output.data<T>(), data_if<uint8_t>(winners, DType::uint8),
                                         data_if<int64_t>(winners, DType::int64), input.data<T>()});
    });
  });
}

void max_pool2d_backward(const Tensor& grad_input, const Tensor& grad_output, const Tensor& winners,
                         const Pair& kernel_size, const Pair& stride, const Pair& padding, const Pair& dilation) {
  const MaxPool2dShape shape =
      pool_shape(grad_input, grad_output, kernel_size, stride, padding, dilation, "grad_output");
  check_winners(winners, grad_output, "grad_output", shape);
  if (grad_input.numel() == 0) return;
  dispatch("grad_input", grad_input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(grad_input, [=](const auto& kernels) {
      kernels.max_pool2d_backward(shape,
                                  {grad_input.data<T>(), grad_output.data<T>(), data_if<uint8_t>(winners, DType::uint8),
                                   data_if<int64_t>(winners, DType::int64)});
    });
  });
}

}  // namespace

void bind_max_pool2d(py::module_& module) {
  module.def("max_pool2d_forward", &max_pool2d_forward, py::arg("output"), py::arg("winners"), py::arg("input"),
             py::arg("kernel_size"), py::arg("stride"), py::arg("padding"), py::arg("dilation"));
  module.def("max_pool2d_backward", &max_pool2d_backward, py::arg("grad_input"), py::arg("grad_output"),
             py::arg("winners"), py::arg("kernel_size"), py::arg("stride"), py::arg("padding"), py::arg("dilation"));
}

}  // namespace fastnn
