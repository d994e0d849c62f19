// nll_loss_forward, nll_loss_backward: see ops/nll_loss.h for the formulas.
#include "bindings/loss.h"
#include "bindings/module.h"
#include "bindings/run.h"

namespace fastnn {
namespace {

// Checks what both directions share; `input` is the input or its gradient.
NllLossShape nll_loss_shape(const char* name, const Tensor& input, const Tensor& loss, const char* loss_name,
                            const Tensor& divisor, const Tensor& target, const std::optional<Tensor>& weight,
                            int reduction) {
  const NllLossShape shape{class_lines(name, input), reduction_of(reduction)};
  check_class_target(target, name, input);
  check_class_weight(weight, name, input, shape.lines.classes);
  check_loss(loss_name, loss, shape.reduction, name, input, shape.samples());
  check_divisor(divisor, name, input);
  return shape;
}

void nll_loss_forward(const Tensor& output, const Tensor& divisor, const Tensor& input, const Tensor& target,
                      const std::optional<Tensor>& weight, int64_t ignore_index, int reduction) {
  const NllLossShape shape = nll_loss_shape("input", input, output, "output", divisor, target, weight, reduction);
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input, [=](const auto& kernels) {
      const int64_t outside =
          kernels.nll_loss_forward(shape, {output.data<T>(),
                                           divisor.data<Compute<T>>(),
                                           input.data<T>(),
                                           {target.data<int64_t>(), data_or_null<T>(weight), ignore_index}});
      check_targets_inside(outside, target.data<int64_t>());
    });
  });
}

void nll_loss_backward(const Tensor& grad_input, const Tensor& grad_output, const Tensor& divisor, const Tensor& target,
                       const std::optional<Tensor>& weight, int64_t ignore_index, int reduction) {
  const NllLossShape shape =
      nll_loss_shape("grad_input", grad_input, grad_output, "grad_output", divisor, target, weight, reduction);
  dispatch("grad_input", grad_input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(grad_input, [=](const auto& kernels) {
      kernels.nll_loss_backward(shape, {grad_input.data<T>(),
                                        grad_output.data<T>(),
                                        divisor.data<Compute<T>>(),
                                        {target.data<int64_t>(), data_or_null<T>(weight), ignore_index}});
    });
  });
}

}  // namespace

void bind_nll_loss(py::module_& module) {
  module.def("nll_loss_forward", &nll_loss_forward, py::arg("output"), py::arg("divisor"), py::arg("input"),
             py::arg("target"), py::arg("weight"), py::arg("ignore_index"), py::arg("reduction"));
  module.def("nll_loss_backward", &nll_loss_backward, py::arg("grad_input"), py::arg("grad_output"), py::arg("divisor"),
             py::arg("target"), py::arg("weight"), py::arg("ignore_index"), py::arg("reduction"));
}

}  // namespace fastnn
