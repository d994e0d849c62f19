// cross_entropy_forward, cross_entropy_backward: see ops/cross_entropy.h for the formulas.
#include "bindings/loss.h"
#include "bindings/module.h"
#include "bindings/run.h"

namespace fastnn {
namespace {

// Checks what both directions share. A target of input's dtype holds probabilities.
CrossEntropyShape cross_entropy_shape(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                                      int64_t ignore_index, int reduction, double label_smoothing) {
  const SoftmaxShape lines = class_lines("input", input);
  if (lines.classes < 1) fail_value("input", "at least one class", "shape " + input.shape_string());
  if (target.dtype() == DType::int64) {
    check_class_target(target, "input", input);
  } else {
    check_same_kind("target", target, "input", input);
    if (!target.has_shape_of(input))
      fail_value("target", "class probabilities of the shape of input, " + input.shape_string(), target.shape_string());
    check_contiguous("target", target);
    if (ignore_index >= 0)
      fail_value("ignore_index", "a negative number with class probabilities", std::to_string(ignore_index));
  }
  check_class_weight(weight, "input", input, lines.classes);
  if (!(label_smoothing >= 0 && label_smoothing <= 1))
    fail_value("label_smoothing", "a number between 0 and 1", std::to_string(label_smoothing));
  return {lines, reduction_of(reduction), label_smoothing};
}

// One tensor holds them: largest, inverse_sum and, with probabilities, mass of each sample, then the divisor.
int64_t statistics_rows(const Tensor& target) { return target.dtype() == DType::int64 ? 2 : 3; }

template <class T>
CrossEntropyStatistics<T> statistics_in(const std::optional<Tensor>& statistics, const Tensor& target,
                                        int64_t samples) {
  if (!statistics) return {};
  Compute<T>* data = statistics->data<Compute<T>>();
  const int64_t rows = statistics_rows(target);
  return {data, data + samples, rows == 3 ? data + 2 * samples : nullptr, data + rows * samples};
}

void check_statistics(const Tensor& statistics, const Tensor& input, const Tensor& target, int64_t samples) {
  check_shape("statistics", statistics, {statistics_rows(target) * samples + 1});
  check_sums("statistics", statistics, "input", input);
  check_contiguous("statistics", statistics);
}

template <class T>
ClassTarget<T> class_target(const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index) {
  return {target.dtype() == DType::int64 ? target.data<int64_t>() : nullptr, data_or_null<T>(weight), ignore_index};
}

template <class T>
const T* probabilities_in(const Tensor& target) {
  return target.dtype() == DType::int64 ? nullptr : target.data<T>();
}

void cross_entropy_forward(const Tensor& output, const std::optional<Tensor>& statistics, const Tensor& input,
                           const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index,
                           int reduction, double label_smoothing) {
  const CrossEntropyShape shape = cross_entropy_shape(input, target, weight, ignore_index, reduction, label_smoothing);
  check_loss("output", output, shape.reduction, "input", input, shape.samples());
  if (statistics) check_statistics(*statistics, input, target, shape.samples());
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input, [=](const auto& kernels) {
      const int64_t outside = kernels.cross_entropy_forward(
          shape, {output.data<T>(), statistics_in<T>(statistics, target, shape.samples()), input.data<T>(),
                  class_target<T>(target, weight, ignore_index), probabilities_in<T>(target)});
      check_targets_inside(outside, target.data<int64_t>());
    });
  });
}

void cross_entropy_backward(const std::optional<Tensor>& grad_input, const std::optional<Tensor>& grad_target,
                            const Tensor& grad_output, const Tensor& statistics, const Tensor& input,
                            const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index,
                            int reduction, double label_smoothing) {
  const CrossEntropyShape shape = cross_entropy_shape(input, target, weight, ignore_index, reduction, label_smoothing);
  check_loss("grad_output", grad_output, shape.reduction, "input", input, shape.samples());
  check_statistics(statistics, input, target, shape.samples());
  for (const auto& [name, grad] : {std::pair{"grad_input", &grad_input}, std::pair{"grad_target", &grad_target}}) {
    if (!*grad) continue;
    if (!(*grad)->has_shape_of(input))
      fail_value(name, "the shape of input, " + input.shape_string(), (*grad)->shape_string());
    check_same_kind(name, **grad, "input", input);
    check_contiguous(name, **grad);
  }
  if (grad_target && target.dtype() == DType::int64) fail_value("grad_target", "None for class numbers", "a tensor");
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input, [=](const auto& kernels) {
      kernels.cross_entropy_backward(shape,
                                     {data_or_null<T>(grad_input), data_or_null<T>(grad_target), grad_output.data<T>(),
                                      statistics_in<T>(statistics, target, shape.samples()), input.data<T>(),
                                      class_target<T>(target, weight, ignore_index), probabilities_in<T>(target)});
    });
  });
}

}  // namespace

void bind_cross_entropy(py::module_& module) {
  module.def("cross_entropy_forward", &cross_entropy_forward, py::arg("output"), py::arg("statistics"),
             py::arg("input"), py::arg("target"), py::arg("weight"), py::arg("ignore_index"), py::arg("reduction"),
             py::arg("label_smoothing"));
  module.def("cross_entropy_backward", &cross_entropy_backward, py::arg("grad_input"), py::arg("grad_target"),
             py::arg("grad_output"), py::arg("statistics"), py::arg("input"), py::arg("target"), py::arg("weight"),
             py::arg("ignore_index"), py::arg("reduction"), py::arg("label_smoothing"));
}

}  // namespace fastnn
