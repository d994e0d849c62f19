// relu_forward, relu_backward: see ops/relu.h for the formulas.
#include "bindings/module.h"
#include "bindings/run.h"

namespace fastnn {
namespace {

void relu_forward(const Tensor& output, const Tensor& input) {
  check_device("input", input);
  check_dense("input", input);
  check_same_layout("output", output, "input", input);
  const ReluShape shape{input.numel()};
  if (shape.count == 0) return;
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input,
                  [=](const auto& kernels) { kernels.relu_forward(shape, {output.data<T>(), input.data<T>()}); });
  });
}

void relu_backward(const Tensor& grad_input, const Tensor& grad_output, const Tensor& output) {
  check_device("output", output);
  check_dense("output", output);
  check_same_layout("grad_output", grad_output, "output", output);
  check_same_layout("grad_input", grad_input, "output", output);
  const ReluShape shape{output.numel()};
  if (shape.count == 0) return;
  dispatch("output", output, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(output, [=](const auto& kernels) {
      kernels.relu_backward(shape, {grad_input.data<T>(), grad_output.data<T>(), output.data<T>()});
    });
  });
}

}  // namespace

void bind_relu(py::module_& module) {
  module.def("relu_forward", &relu_forward, py::arg("output"), py::arg("input"));
  module.def("relu_backward", &relu_backward, py::arg("grad_input"), py::arg("grad_output"), py::arg("output"));
}

}  // namespace fastnn
