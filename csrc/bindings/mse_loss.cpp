// mse_loss_forward, mse_loss_backward: see ops/mse_loss.h for the formulas.
#include "bindings/loss.h"
#include "bindings/module.h"
#include "bindings/run.h"

namespace fastnn {
namespace {

// Checks what both directions share. All elementwise arrays lie as input does.
MseLossShape mse_loss_shape(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                            const Tensor& loss, const char* loss_name, const Tensor& divisor, int reduction) {
  const MseLossShape shape{input.numel(), reduction_of(reduction)};
  check_device("input", input);
  check_dense("input", input);
  check_same_layout("target", target, "input", input);
  if (weight) check_same_layout("weight", *weight, "input", input);
  if (shape.reduction == Reduction::none)
    check_same_layout(loss_name, loss, "input", input);
  else
    check_loss(loss_name, loss, shape.reduction, "input", input, 1);
  check_divisor(divisor, "input", input);
  return shape;
}

void mse_loss_forward(const Tensor& output, const Tensor& divisor, const Tensor& input, const Tensor& target,
                      const std::optional<Tensor>& weight, int reduction) {
  const MseLossShape shape = mse_loss_shape(input, target, weight, output, "output", divisor, reduction);
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input, [=](const auto& kernels) {
      kernels.mse_loss_forward(shape, {output.data<T>(), divisor.data<Compute<T>>(), input.data<T>(), target.data<T>(),
                                       data_or_null<T>(weight)});
    });
  });
}

void mse_loss_backward(const std::optional<Tensor>& grad_input, const std::optional<Tensor>& grad_target,
                       const Tensor& grad_output, const Tensor& divisor, const Tensor& input, const Tensor& target,
                       const std::optional<Tensor>& weight, int reduction) {
  const MseLossShape shape = mse_loss_shape(input, target, weight, grad_output, "grad_output", divisor, reduction);
  if (grad_input) check_same_layout("grad_input", *grad_input, "input", input);
  if (grad_target) check_same_layout("grad_target", *grad_target, "input", input);
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input, [=](const auto& kernels) {
      kernels.mse_loss_backward(
          shape, {data_or_null<T>(grad_input), data_or_null<T>(grad_target), grad_output.data<T>(),
                  divisor.data<Compute<T>>(), input.data<T>(), target.data<T>(), data_or_null<T>(weight)});
    });
  });
}

}  // namespace

void bind_mse_loss(py::module_& module) {
  module.def("mse_loss_forward", &mse_loss_forward, py::arg("output"), py::arg("divisor"), py::arg("input"),
             py::arg("target"), py::arg("weight"), py::arg("reduction"));
  module.def("mse_loss_backward", &mse_loss_backward, py::arg("grad_input"), py::arg("grad_target"),
             py::arg("grad_output"), py::arg("divisor"), py::arg("input"), py::arg("target"), py::arg("weight"),
             py::arg("reduction"));
}

}  // namespace fastnn
