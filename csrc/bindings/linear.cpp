// linear_forward, linear_backward: see ops/linear.h for the formulas.
#include "bindings/module.h"
#include "bindings/run.h"

namespace fastnn {
namespace {

// Checks what both directions share. Leading dimensions of input count as one batch.
LinearShape linear_shape(const Tensor& input, const Tensor& weight, bool relu, bool tf32) {
  check_device("input", input);
  if (input.dim() < 1) fail_value("input", "shape (..., in_features)", "a scalar");
  const int64_t in_features = input.size(input.dim() - 1);
  check_shape("weight", weight, {"out_features", in_features});
  check_same_kind("weight", weight, "input", input);
  check_contiguous("input", input);
  check_contiguous("weight", weight);
  int64_t batch = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) batch *= input.size(d);
  return {batch, in_features, weight.size(0), relu, tf32 ? Precision::tf32 : Precision::fp32};
}

// A tensor of input's kind and leading dimensions, with this last size.
void check_rows(const char* name, const Tensor& tensor, const Tensor& input, int64_t last) {
  bool same = tensor.dim() == input.dim() && tensor.size(tensor.dim() - 1) == last;
  for (int64_t d = 0; same && d + 1 < input.dim(); ++d) same = tensor.size(d) == input.size(d);
  if (!same)
    fail_value(
        name,
        "the leading dimensions of input, " + input.shape_string() + ", and last dimension " + std::to_string(last),
        tensor.shape_string());
  check_same_kind(name, tensor, "input", input);
  check_contiguous(name, tensor);
}

void check_parameter(const char* name, const Tensor& tensor, const Tensor& input, std::initializer_list<Size> shape) {
  check_shape(name, tensor, shape);
  check_same_kind(name, tensor, "input", input);
  check_contiguous(name, tensor);
}

void linear_forward(const Tensor& output, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                    bool relu, bool tf32) {
  const LinearShape shape = linear_shape(input, weight, relu, tf32);
  check_rows("output", output, input, shape.out_features);
  if (bias) check_parameter("bias", *bias, input, {shape.out_features});
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input, [=](const auto& kernels) {
      kernels.linear_forward(shape, {output.data<T>(), input.data<T>(), weight.data<T>(), data_or_null<T>(bias)});
    });
  });
}

void linear_backward(const std::optional<Tensor>& grad_input, const std::optional<Tensor>& grad_weight,
                     const std::optional<Tensor>& grad_bias, const Tensor& grad_output, const Tensor& input,
                     const Tensor& weight, const std::optional<Tensor>& output, bool tf32) {
  const LinearShape shape = linear_shape(input, weight, output.has_value(), tf32);
  check_rows("grad_output", grad_output, input, shape.out_features);
  if (output) check_rows("output", *output, input, shape.out_features);
  if (grad_input) check_rows("grad_input", *grad_input, input, shape.in_features);
  if (grad_weight) check_parameter("grad_weight", *grad_weight, input, {shape.out_features, shape.in_features});
  if (grad_bias) check_parameter("grad_bias", *grad_bias, input, {shape.out_features});
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input, [=](const auto& kernels) {
      kernels.linear_backward(shape,
                              {data_or_null<T>(grad_input), data_or_null<T>(grad_weight), data_or_null<T>(grad_bias),
                               grad_output.data<T>(), input.data<T>(), weight.data<T>(), data_or_null<T>(output)});
    });
  });
}

}  // namespace

void bind_linear(py::module_& module) {
  module.def("linear_forward", &linear_forward, py::arg("output"), py::arg("input"), py::arg("weight"), py::arg("bias"),
             py::arg("relu"), py::arg("tf32") = false);
  module.def("linear_backward", &linear_backward, py::arg("grad_input"), py::arg("grad_weight"), py::arg("grad_bias"),
             py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("output"), py::arg("tf32") = false);
}

}  // namespace fastnn
