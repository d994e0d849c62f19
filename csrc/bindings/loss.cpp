#include "bindings/loss.h"

namespace fastnn {

Reduction reduction_of(int number) {
  if (number < 0 || number > 2) fail_value("reduction", "0 (none), 1 (mean) or 2 (sum)", std::to_string(number));
  return static_cast<Reduction>(number);
}

SoftmaxShape class_lines(const char* name, const Tensor& input) {
  check_device(name, input);
  if (input.dim() < 1) fail_value(name, "shape (classes,) or (batch, classes, ...)", "a scalar");
  check_contiguous(name, input);
  if (input.dim() == 1) return {1, input.size(0), 1};
  SoftmaxShape lines{input.size(0), input.size(1), 1};
  for (int64_t d = 2; d < input.dim(); ++d) lines.inner *= input.size(d);
  return lines;
}

void check_class_target(const Tensor& target, const char* input_name, const Tensor& input) {
  check_dtype("target", target, DType::int64);
  bool same = target.dim() == input.dim() - 1;
  std::string expected = "(";
  for (int64_t d = 0; d < input.dim(); ++d) {
    if (d == (input.dim() == 1 ? 0 : 1)) continue;
    const int64_t own = d == 0 ? 0 : d - 1;
    same = same && target.size(own) == input.size(d);
    expected += (own ? ", " : "") + std::to_string(input.size(d));
  }
  expected += input.dim() == 2 ? ",)" : ")";
  if (!same)
    fail_value("target", "shape " + expected + " for " + input_name + " of shape " + input.shape_string(),
               target.shape_string());
  check_same_device("target", target, input_name, input);
  check_contiguous("target", target);
}

void check_class_weight(const std::optional<Tensor>& weight, const char* input_name, const Tensor& input,
                        int64_t classes) {
  if (!weight) return;
  check_shape("weight", *weight, {classes});
  check_same_kind("weight", *weight, input_name, input);
  check_contiguous("weight", *weight);
}

void check_loss(const char* name, const Tensor& loss, Reduction reduction, const char* input_name, const Tensor& input,
                int64_t samples) {
  const int64_t expected = reduction == Reduction::none ? samples : 1;
  if (loss.numel() != expected) fail_value(name, std::to_string(expected) + " elements", loss.shape_string());
  check_same_kind(name, loss, input_name, input);
  check_contiguous(name, loss);
}

void check_divisor(const Tensor& divisor, const char* input_name, const Tensor& input) {
  if (divisor.numel() != 1) fail_value("divisor", "1 element", divisor.shape_string());
  check_sums("divisor", divisor, input_name, input);
}

void check_sums(const char* name, const Tensor& sums, const char* input_name, const Tensor& input) {
  check_dtype(name, sums, input.dtype() == DType::float64 ? DType::float64 : DType::float32);
  check_same_device(name, sums, input_name, input);
}

void check_targets_inside(int64_t sample, const int64_t* targets) {
  if (sample >= 0) throw pybind11::index_error("Target " + std::to_string(targets[sample]) + " is out of bounds.");
}

}  // namespace fastnn
