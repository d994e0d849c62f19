// softmax_*, log_softmax_*: see ops/softmax.h for the formulas.
#include "bindings/module.h"
#include "bindings/run.h"

namespace fastnn {
namespace {

// Checks `tensor`, whose lines run along `dim`.
SoftmaxShape softmax_shape(const char* name, const Tensor& tensor, int64_t dim) {
  check_device(name, tensor);
  check_contiguous(name, tensor);
  if (dim < 0 || dim >= tensor.dim())
    fail_value("dim", "a dimension of " + std::string(name) + " of shape " + tensor.shape_string(),
               std::to_string(dim));
  SoftmaxShape shape{1, tensor.size(dim), 1};
  for (int64_t d = 0; d < dim; ++d) shape.outer *= tensor.size(d);
  for (int64_t d = dim + 1; d < tensor.dim(); ++d) shape.inner *= tensor.size(d);
  return shape;
}

// `kernel(kernels, shape, buffers)` runs one of the two operators.
template <class Kernel>
void forward(const Kernel& kernel, const Tensor& output, const Tensor& input, int64_t dim) {
  const SoftmaxShape shape = softmax_shape("input", input, dim);
  check_same_layout("output", output, "input", input);
  if (input.numel() == 0) return;
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    const SoftmaxForward<T> buffers{output.data<T>(), input.data<T>()};
    run_kernel<T>(input, [=](const auto& kernels) { kernel(kernels, shape, buffers); });
  });
}

template <class Kernel>
void backward(const Kernel& kernel, const Tensor& grad_input, const Tensor& grad_output, const Tensor& output,
              int64_t dim) {
  const SoftmaxShape shape = softmax_shape("output", output, dim);
  check_same_layout("grad_output", grad_output, "output", output);
  check_same_layout("grad_input", grad_input, "output", output);
  if (output.numel() == 0) return;
  dispatch("output", output, [&](auto zero) {
    using T = decltype(zero);
    const SoftmaxBackward<T> buffers{grad_input.data<T>(), grad_output.data<T>(), output.data<T>()};
    run_kernel<T>(output, [=](const auto& kernels) { kernel(kernels, shape, buffers); });
  });
}

void softmax_forward(const Tensor& output, const Tensor& input, int64_t dim) {
  forward([](const auto& kernels, const auto&... arguments) { kernels.softmax_forward(arguments...); }, output, input,
          dim);
}

void log_softmax_forward(const Tensor& output, const Tensor& input, int64_t dim) {
  forward([](const auto& kernels, const auto&... arguments) { kernels.log_softmax_forward(arguments...); }, output,
          input, dim);
}

void softmax_backward(const Tensor& grad_input, const Tensor& grad_output, const Tensor& output, int64_t dim) {
  backward([](const auto& kernels, const auto&... arguments) { kernels.softmax_backward(arguments...); }, grad_input,
           grad_output, output, dim);
}

void log_softmax_backward(const Tensor& grad_input, const Tensor& grad_output, const Tensor& output, int64_t dim) {
  backward([](const auto& kernels, const auto&... arguments) { kernels.log_softmax_backward(arguments...); },
           grad_input, grad_output, output, dim);
}

// exp and log as the CPU's kernels compute them, for the tests of their error bounds.
void vector_math(const Tensor& output, const Tensor& input, bool exponential) {
  if (!input.is_cpu()) fail_value("input", "a tensor on cpu", "one on " + input.device_string());
  check_contiguous("input", input);
  check_same_layout("output", output, "input", input);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = exponential ? cpu::kernels<T>().exponentials : cpu::kernels<T>().logarithms;
    kernel(input.numel(), input.data<T>(), output.data<T>());
  };
  if (input.dtype() == DType::float64)
    run(double{});
  else if (input.dtype() == DType::float32)
    run(float{});
  else
    fail_type("input", "a float32 or float64 tensor", input.dtype_string());
}

}  // namespace

void bind_softmax(py::module_& module) {
  module.def("softmax_forward", &softmax_forward, py::arg("output"), py::arg("input"), py::arg("dim"));
  module.def("softmax_backward", &softmax_backward, py::arg("grad_input"), py::arg("grad_output"), py::arg("output"),
             py::arg("dim"));
  module.def("log_softmax_forward", &log_softmax_forward, py::arg("output"), py::arg("input"), py::arg("dim"));
  module.def("log_softmax_backward", &log_softmax_backward, py::arg("grad_input"), py::arg("grad_output"),
             py::arg("output"), py::arg("dim"));
  module.def(
      "exponentials", [](const Tensor& output, const Tensor& input) { vector_math(output, input, true); },
      py::arg("output"), py::arg("input"));
  module.def(
      "logarithms", [](const Tensor& output, const Tensor& input) { vector_math(output, input, false); },
      py::arg("output"), py::arg("input"));
}

}  // namespace fastnn
