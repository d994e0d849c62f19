// conv2d_forward, conv2d_backward: see ops/conv2d.h for the formulas.
#include "bindings/module.h"
#include "bindings/run.h"

namespace fastnn {
namespace {

// What both directions take, as torch.nn.functional.conv2d names it.
struct Geometry {
  Pair stride, padding, dilation;
  int64_t groups;
};

int64_t conv_out_size(const char* axis, int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t span = dilation * (kernel - 1) + 1;
  if (in + 2 * padding < span)
    fail_value("input", std::string("a padded ") + axis + " of at least the kernel's " + std::to_string(span),
               std::to_string(in + 2 * padding));
  return (in + 2 * padding - span) / stride + 1;
}

Precision precision_of(const std::string& name) {
  if (name == "fp32") return Precision::fp32;
  if (name == "tf32") return Precision::tf32;
  if (name == "bf16") return Precision::bf16;
  fail_value("precision", "'fp32', 'tf32' or 'bf16'", "'" + name + "'");
}

Conv2dShape conv2d_shape(const Tensor& input, const Tensor& weight, const Geometry& geometry, bool relu, bool pool,
                         const std::string& precision) {
  check_device("input", input);
  check_shape("input", input, {"batch", "in_channels", "in_height", "in_width"});
  check_channels_last("input", input);
  check_pair("stride", geometry.stride, 1);
  check_pair("padding", geometry.padding, 0);
  check_pair("dilation", geometry.dilation, 1);
  const int64_t in_channels = input.size(1), groups = geometry.groups;
  if (groups < 1 || in_channels % groups != 0)
    fail_value("groups", "a divisor of the " + std::to_string(in_channels) + " channels of input",
               std::to_string(groups));
  check_shape("weight", weight, {"out_channels", in_channels / groups, "kernel_height", "kernel_width"});
  check_same_kind("weight", weight, "input", input);
  if (weight.size(0) % groups != 0)
    fail_value("weight", "out_channels divisible by the " + std::to_string(groups) + " groups", weight.shape_string());
  if (weight.size(2) < 1 || weight.size(3) < 1) fail_value("weight", "a kernel of at least 1x1", weight.shape_string());
  const bool contiguous = weight.is_contiguous();
  if (!contiguous && !weight.is_channels_last() && weight.numel() > 0)
    fail_value("weight", "a contiguous or channels_last tensor",
               "one of shape " + weight.shape_string() + " with other strides");
  Conv2dShape shape{};
  shape.batch = input.size(0);
  shape.in_channels = in_channels, shape.in_height = input.size(2), shape.in_width = input.size(3);
  shape.out_channels = weight.size(0), shape.kernel_height = weight.size(2), shape.kernel_width = weight.size(3);
  shape.stride_height = geometry.stride[0], shape.stride_width = geometry.stride[1];
  shape.padding_height = geometry.padding[0], shape.padding_width = geometry.padding[1];
  shape.dilation_height = geometry.dilation[0], shape.dilation_width = geometry.dilation[1];
  shape.out_height = conv_out_size("height", shape.in_height, shape.kernel_height, geometry.stride[0],
                                   geometry.padding[0], geometry.dilation[0]);
  shape.out_width = conv_out_size("width", shape.in_width, shape.kernel_width, geometry.stride[1], geometry.padding[1],
                                  geometry.dilation[1]);
  shape.groups = groups;
  shape.relu = relu, shape.pool = pool;
  shape.weight_channels_last = !contiguous;
  shape.precision = precision_of(precision);
  return shape;
}

// A tensor of input's kind and of the output's shape, in channels_last order.
void check_output(const char* name, const Tensor& tensor, const Tensor& input, const Conv2dShape& s) {
  check_shape(
      name, tensor,
      {s.batch, s.out_channels, s.pool ? s.out_height / 2 : s.out_height, s.pool ? s.out_width / 2 : s.out_width});
  check_same_kind(name, tensor, "input", input);
  check_channels_last(name, tensor);
}

void check_winner(const Tensor& winner, const Tensor& input, const Conv2dShape& s) {
  check_shape("winner", winner, {s.batch, s.out_channels, s.out_height / 2, s.out_width / 2});
  check_dtype("winner", winner, DType::uint8);
  check_same_device("winner", winner, "input", input);
  check_channels_last("winner", winner);
}

void check_bias(const char* name, const Tensor& bias, const Tensor& input, const Conv2dShape& s) {
  check_shape(name, bias, {s.out_channels});
  check_same_kind(name, bias, "input", input);
  check_contiguous(name, bias);
}

// The CPU's bfloat16 kernel is no row of its table. Asked with every call: a recorded one may run after set_isa().
template <class Kernels, class Buffers>
void run_forward(const Kernels& kernels, const Conv2dShape& shape, const Buffers& buffers) {
  if constexpr (std::is_same_v<Kernels, cpu::Kernels<float>>)
    if (const auto kernel = shape.precision == Precision::bf16 ? cpu::conv2d_forward_bf16() : nullptr)
      return kernel(shape, buffers);
  kernels.conv2d_forward(shape, buffers);
}

void conv2d_forward(const Tensor& output, const std::optional<Tensor>& winner, const Tensor& input,
                    const Tensor& weight, const std::optional<Tensor>& bias, const Pair& stride, const Pair& padding,
                    const Pair& dilation, int64_t groups, bool relu, bool pool, const std::string& precision) {
  const Conv2dShape shape = conv2d_shape(input, weight, {stride, padding, dilation, groups}, relu, pool, precision);
  if (shape.precision == Precision::bf16) {
    check_dtype("input", input, DType::float32);
    if (input.runs_on_cuda()) fail_value("precision", "'fp32' or 'tf32' on CUDA", "'bf16'");
    if (!cpu::conv2d_forward_bf16())
      fail_value("precision", std::string("'fp32' with the ISA ") + cpu::active_table().isa + " on this processor",
                 "'bf16'");
  }
  check_output("output", output, input, shape);
  if (winner && !pool) fail_value("winner", "None without pool", "a tensor");
  if (winner) check_winner(*winner, input, shape);
  if (bias) check_bias("bias", *bias, input, shape);
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input, [=](const auto& kernels) {
      run_forward(kernels, shape,
                  Conv2dForward<T>{output.data<T>(), data_or_null<uint8_t>(winner), input.data<T>(), weight.data<T>(),
                                   data_or_null<T>(bias)});
    });
  });
}

void conv2d_backward(const std::optional<Tensor>& grad_input, const std::optional<Tensor>& grad_weight,
                     const std::optional<Tensor>& grad_bias, const Tensor& grad_output, const Tensor& input,
                     const Tensor& weight, const std::optional<Tensor>& output, const std::optional<Tensor>& winner,
                     const Pair& stride, const Pair& padding, const Pair& dilation, int64_t groups,
                     const std::string& precision) {
  const Conv2dShape shape = conv2d_shape(input, weight, {stride, padding, dilation, groups}, output.has_value(),
                                         winner.has_value(), precision);
  check_output("grad_output", grad_output, input, shape);
  if (output) check_output("output", *output, input, shape);
  if (winner) check_winner(*winner, input, shape);
  if (grad_input) {
    check_shape("grad_input", *grad_input, {shape.batch, shape.in_channels, shape.in_height, shape.in_width});
    check_same_kind("grad_input", *grad_input, "input", input);
    check_channels_last("grad_input", *grad_input);
  }
  if (grad_weight) {
    check_shape("grad_weight", *grad_weight,
                {shape.out_channels, weight.size(1), shape.kernel_height, shape.kernel_width});
    check_same_kind("grad_weight", *grad_weight, "input", input);
    if (shape.weight_channels_last)
      check_channels_last("grad_weight", *grad_weight);
    else
      check_contiguous("grad_weight", *grad_weight);
  }
  if (grad_bias) check_bias("grad_bias", *grad_bias, input, shape);
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input, [=](const auto& kernels) {
      kernels.conv2d_backward(shape, {data_or_null<T>(grad_input), data_or_null<T>(grad_weight),
                                      data_or_null<T>(grad_bias), grad_output.data<T>(), input.data<T>(),
                                      weight.data<T>(), data_or_null<T>(output), data_or_null<uint8_t>(winner)});
    });
  });
}

}  // namespace

void bind_conv2d(py::module_& module) {
  module.def("conv2d_forward", &conv2d_forward, py::arg("output"), py::arg("winner"), py::arg("input"),
             py::arg("weight"), py::arg("bias"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
             py::arg("groups"), py::arg("relu"), py::arg("pool"), py::arg("precision") = "fp32");
  module.def("conv2d_backward", &conv2d_backward, py::arg("grad_input"), py::arg("grad_weight"), py::arg("grad_bias"),
             py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("output"), py::arg("winner"),
             py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
             py::arg("precision") = "fp32");
}

}  // namespace fastnn
