// softmax_*, log_softmax_*: see ops/softmax.h for the formulas.
#include "bindings/module.h"
#include "bindings/tensor.h"
#include "cpu/kernel_table.h"

namespace fastnn {
namespace {

// Checks `tensor`, whose lines run along `dim`.
SoftmaxShape softmax_shape(const char* name, const Tensor& tensor, int64_t dim) {
  check_cpu(name, tensor);
  check_contiguous(name, tensor);
  if (dim < 0 || dim >= tensor.dim())
    fail_value("dim", "a dimension of " + std::string(name) + " of shape " + tensor.shape_string(),
               std::to_string(dim));
  SoftmaxShape shape{1, tensor.size(dim), 1};
  for (int64_t d = 0; d < dim; ++d) shape.outer *= tensor.size(d);
  for (int64_t d = dim + 1; d < tensor.dim(); ++d) shape.inner *= tensor.size(d);
  return shape;
}

template <class T>
using Forward = void (*cpu::Kernels<T>::*)(const SoftmaxShape&, const SoftmaxForward<T>&);
template <class T>
using Backward = void (*cpu::Kernels<T>::*)(const SoftmaxShape&, const SoftmaxBackward<T>&);

// A kernel in both precisions.
template <template <class> class Kernel>
struct Kernels {
  Kernel<float> float32;
  Kernel<double> float64;
  template <class T>
  auto kernel() const {
    if constexpr (sizeof(T) == 4)
      return cpu::kernels<T>().*float32;
    else
      return cpu::kernels<T>().*float64;
  }
};

void forward(const Kernels<Forward>& kernels, const Tensor& output, const Tensor& input, int64_t dim) {
  const SoftmaxShape shape = softmax_shape("input", input, dim);
  check_same_layout("output", output, "input", input);
  if (input.numel() == 0) return;
  adopt_torch_threads();
  dispatch_floating("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel([=] { kernels.kernel<T>()(shape, {output.data<T>(), input.data<T>()}); });
  });
}

void backward(const Kernels<Backward>& kernels, const Tensor& grad_input, const Tensor& grad_output,
              const Tensor& output, int64_t dim) {
  const SoftmaxShape shape = softmax_shape("output", output, dim);
  check_same_layout("grad_output", grad_output, "output", output);
  check_same_layout("grad_input", grad_input, "output", output);
  if (output.numel() == 0) return;
  adopt_torch_threads();
  dispatch_floating("output", output, [&](auto zero) {
    using T = decltype(zero);
    run_kernel([=] { kernels.kernel<T>()(shape, {grad_input.data<T>(), grad_output.data<T>(), output.data<T>()}); });
  });
}

void softmax_forward(const Tensor& output, const Tensor& input, int64_t dim) {
  forward({&cpu::Kernels<float>::softmax_forward, &cpu::Kernels<double>::softmax_forward}, output, input, dim);
}

void log_softmax_forward(const Tensor& output, const Tensor& input, int64_t dim) {
  forward({&cpu::Kernels<float>::log_softmax_forward, &cpu::Kernels<double>::log_softmax_forward}, output, input, dim);
}

void softmax_backward(const Tensor& grad_input, const Tensor& grad_output, const Tensor& output, int64_t dim) {
  backward({&cpu::Kernels<float>::softmax_backward, &cpu::Kernels<double>::softmax_backward}, grad_input, grad_output,
           output, dim);
}

void log_softmax_backward(const Tensor& grad_input, const Tensor& grad_output, const Tensor& output, int64_t dim) {
  backward({&cpu::Kernels<float>::log_softmax_backward, &cpu::Kernels<double>::log_softmax_backward}, grad_input,
           grad_output, output, dim);
}

// exp and log as the kernels compute them, for the tests of their error bounds.
void vector_math(const Tensor& output, const Tensor& input, bool exponential) {
  check_cpu("input", input);
  check_contiguous("input", input);
  check_same_layout("output", output, "input", input);
  dispatch_floating("input", input, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = exponential ? cpu::kernels<T>().exponentials : cpu::kernels<T>().logarithms;
    kernel(input.numel(), input.data<T>(), output.data<T>());
  });
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
