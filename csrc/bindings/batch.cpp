// transpose, gather_images, count_correct: see ops/batch.h.
#include "bindings/module.h"
#include "bindings/run.h"

namespace fastnn {
namespace {

void transpose(const Tensor& output, const Tensor& input) {
  check_shape("input", input, {"batch", "rows", "columns"});
  check_shape("output", output, {input.size(0), input.size(2), input.size(1)});
  check_same_kind("output", output, "input", input);
  check_device("input", input);
  check_contiguous("input", input);
  check_contiguous("output", output);
  const TransposeShape shape{input.size(0), input.size(1), input.size(2)};
  dispatch("input", input, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input, [=](const auto& kernels) { kernels.transpose(shape, {output.data<T>(), input.data<T>()}); });
  });
}

void gather_images(const Tensor& output, const Tensor& input, const Tensor& index, double divisor,
                   const std::optional<Tensor>& target_output, const std::optional<Tensor>& target) {
  check_shape("input", input, {"images", "channels", "height", "width"});
  check_shape("index", index, {"batch"});
  check_shape("output", output, {index.size(0), input.size(1), input.size(2), input.size(3)});
  check_device("input", input);
  check_same_device("index", index, "input", input);
  check_same_device("output", output, "input", input);
  check_contiguous("input", input);
  check_contiguous("index", index);
  check_channels_last("output", output);
  check_dtype("index", index, DType::int64);
  if (input.dtype() != DType::uint8) check_same_kind("input", input, "output", output);
  if (target.has_value() != target_output.has_value())
    fail_value("target_output", "one with target alone", target ? "None" : "a tensor");
  if (target) {
    check_shape("target", *target, {input.size(0)});
    check_shape("target_output", *target_output, {index.size(0)});
    for (const auto& [name, tensor] : {std::pair{"target", &*target}, std::pair{"target_output", &*target_output}}) {
      check_same_device(name, *tensor, "input", input);
      check_dtype(name, *tensor, DType::int64);
      check_contiguous(name, *tensor);
    }
  }
  const GatherImagesShape shape{
      input.size(0), index.size(0), input.size(1), input.size(2) * input.size(3), input.dtype() == DType::uint8,
      divisor};
  const bool check = !input.runs_on_cuda();  // there the kernel does
  dispatch("output", output, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(input, [=](const auto& kernels) {
      for (int64_t b = 0; b < shape.batch && check; ++b) {  // in the call: a program's rows change from run to run
        const int64_t i = index.data<int64_t>()[b];
        if (i < 0 || i >= shape.images)
          fail_value("index", "numbers from 0 to " + std::to_string(shape.images - 1), std::to_string(i));
      }
      kernels.gather_images(shape, {output.data<T>(), input.data<void>(), index.data<int64_t>(),
                                    data_or_null<int64_t>(target_output), data_or_null<int64_t>(target)});
    });
  });
}

void count_correct(const Tensor& correct, const Tensor& logits, const Tensor& target) {
  check_shape("logits", logits, {"batch", "classes"});
  check_shape("target", target, {logits.size(0)});
  check_shape("correct", correct, {});
  check_dtype("target", target, DType::int64);
  check_dtype("correct", correct, DType::int64);
  check_device("logits", logits);
  check_same_device("target", target, "logits", logits);
  check_same_device("correct", correct, "logits", logits);
  check_contiguous("logits", logits);
  check_contiguous("target", target);
  const CountCorrectShape shape{logits.size(0), logits.size(1)};
  dispatch("logits", logits, [&](auto zero) {
    using T = decltype(zero);
    run_kernel<T>(logits, [=](const auto& kernels) {
      kernels.count_correct(shape, {correct.data<int64_t>(), logits.data<T>(), target.data<int64_t>()});
    });
  });
}

}  // namespace

void bind_batch(py::module_& module) {
  module.def("transpose", &transpose, py::arg("output"), py::arg("input"));
  module.def("gather_images", &gather_images, py::arg("output"), py::arg("input"), py::arg("index"), py::arg("divisor"),
             py::arg("target_output") = py::none(), py::arg("target") = py::none());
  module.def("count_correct", &count_correct, py::arg("correct"), py::arg("logits"), py::arg("target"));
}

}  // namespace fastnn
