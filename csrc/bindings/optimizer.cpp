// adam_step, sgd_step: see ops/optimizer.h. Tensors come as lists, one entry a parameter.
#include <algorithm>
#include <cstddef>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/module.h"
#include "bindings/run.h"

namespace fastnn {
namespace {

using Tensors = std::vector<Tensor>;

std::string entry_name(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

void check_length(const char* name, const Tensors& tensors, const Tensors& params) {
  if (tensors.size() != params.size())
    fail_value(name, std::to_string(params.size()) + " tensors, one for each of params",
               std::to_string(tensors.size()));
}

bool has_layout_of(const Tensor& tensor, const Tensor& param) {
  if (tensor.dim() != param.dim()) return false;
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) != param.size(d) ||
        (tensor.size(d) != 1 && param.numel() > 0 && tensor.stride(d) != param.stride(d)))
      return false;
  return true;
}

// Names are made for a failure alone: five hundred of them would take as long as the update.
void check_params(const Tensors& params) {
  std::vector<std::pair<const std::byte*, const std::byte*>> ranges;
  ranges.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    if (param.dtype() != params[0].dtype() || param.dtype() == DType::other || !param.is_on_device_of(params[0])) {
      const std::string name = entry_name("params", i);
      check_device(name.c_str(), param);
      check_same_kind(name.c_str(), param, "params[0]", params[0]);
    }
    if (param.numel() == 0) continue;
    if (!param.is_dense())
      fail_value(entry_name("params", i).c_str(), "a tensor without gaps or overlaps",
                 "one of shape " + param.shape_string());
    const std::byte* begin = param.data<std::byte>();
    ranges.emplace_back(begin, begin + param.numel() * param.item_size());
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i].first < ranges[i - 1].second)
      fail_value("params", "tensors with memory of their own", "two that share memory");
}

void check_like_params(const char* name, const Tensors& tensors, const Tensors& params) {
  check_length(name, tensors, params);
  for (size_t i = 0; i < params.size(); ++i) {
    if (tensors[i].dtype() == params[i].dtype() && tensors[i].is_on_device_of(params[i]) &&
        has_layout_of(tensors[i], params[i]))
      continue;
    const std::string entry = entry_name(name, i), param = entry_name("params", i);
    check_same_kind(entry.c_str(), tensors[i], param.c_str(), params[i]);
    fail_value(entry.c_str(), "shape and strides of " + param + ", " + params[i].shape_string(),
               tensors[i].shape_string());
  }
}

std::vector<int64_t> running_ends(const Tensors& params) {
  std::vector<int64_t> ends;
  ends.reserve(params.size());
  int64_t total = 0;
  for (const Tensor& param : params) ends.push_back(total += param.numel());
  return ends;
}

// Each holds one number: float32 on the device for CUDA's kernels, else on the CPU, where torch's default dtype counts.
void check_steps(const Tensors& steps, const Tensors& params) {
  check_length("steps", steps, params);
  for (size_t i = 0; i < steps.size(); ++i) {
    const bool on_cuda = params[i].runs_on_cuda();
    const bool is_floating = steps[i].dtype() == DType::float32 || (steps[i].dtype() == DType::float64 && !on_cuda);
    if (is_floating && steps[i].is_on_device_of(params[i]) && steps[i].numel() == 1) continue;
    const std::string name = entry_name("steps", i), param = entry_name("params", i);
    check_same_device(name.c_str(), steps[i], param.c_str(), params[i]);
    if (!is_floating) fail_type(name.c_str(), on_cuda ? "float32" : "float32 or float64", steps[i].dtype_string());
    fail_value(name.c_str(), "one number", steps[i].shape_string());
  }
}

// A number, or a tensor that holds it, for the kernel to read when it runs.
using Number = std::variant<double, Tensor>;

Scalar scalar_of(const char* name, const Number& number, const Tensors& params) {
  if (const double* value = std::get_if<double>(&number)) return {*value, nullptr};
  const Tensor& tensor = std::get<Tensor>(number);
  check_dtype(name, tensor, DType::float64);
  check_same_device(name, tensor, "params[0]", params[0]);
  if (tensor.numel() != 1) fail_value(name, "one number", tensor.shape_string());
  return {0, tensor.data<double>()};
}

// Steps `params` by update(kernels, tensors), or records it.
template <class T, template <class> class Entry, class Update>
void run_update(const Tensors& params, const std::vector<Entry<T>>& tensors, const Update& update) {
  const std::vector<int64_t> ends = running_ends(params);
  run_kernel<T>(params[0], [=](const auto& kernels) {
    update(kernels, TensorList<Entry<T>>{static_cast<int64_t>(tensors.size()), tensors.data(), ends.data()});
  });
}

void adam_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
               const Tensors& max_exp_avg_sqs, const Tensors& steps, const Number& lr, const Number& beta1,
               const Number& beta2, double eps, double weight_decay, bool decoupled, bool amsgrad, bool maximize) {
  if (params.empty()) return;
  check_params(params);
  check_like_params("grads", grads, params);
  check_like_params("exp_avgs", exp_avgs, params);
  check_like_params("exp_avg_sqs", exp_avg_sqs, params);
  if (amsgrad) check_like_params("max_exp_avg_sqs", max_exp_avg_sqs, params);
  check_steps(steps, params);
  adopt_torch_threads();
  const AdamOptions options{scalar_of("lr", lr, params),
                            scalar_of("beta1", beta1, params),
                            scalar_of("beta2", beta2, params),
                            eps,
                            weight_decay,
                            decoupled,
                            amsgrad,
                            maximize};
  dispatch("params[0]", params[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<AdamTensor<T>> tensors;
    tensors.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      const bool is_float = steps[i].dtype() == DType::float32;
      tensors.push_back({params[i].data<T>(), grads[i].data<T>(), exp_avgs[i].data<T>(), exp_avg_sqs[i].data<T>(),
                         amsgrad ? max_exp_avg_sqs[i].data<T>() : nullptr, is_float ? steps[i].data<float>() : nullptr,
                         is_float ? nullptr : steps[i].data<double>()});
    }
    run_update<T, AdamTensor>(params, tensors,
                              [=](const auto& kernels, const auto& list) { kernels.adam_step(options, list); });
  });
}

// `first[i]`: momentum_buffers[i] holds nothing yet.
void sgd_step(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers,
              const std::vector<bool>& first, const Number& lr, const Number& momentum, double dampening,
              double weight_decay, bool nesterov, bool maximize) {
  if (params.empty()) return;
  check_params(params);
  check_like_params("grads", grads, params);
  const SgdOptions options{scalar_of("lr", lr, params),
                           scalar_of("momentum", momentum, params),
                           dampening,
                           weight_decay,
                           nesterov,
                           maximize};
  const bool has_momentum = options.has_momentum();
  if (has_momentum) {
    check_like_params("momentum_buffers", momentum_buffers, params);
    if (first.size() != params.size())
      fail_value("first", std::to_string(params.size()) + " booleans", std::to_string(first.size()));
  }
  adopt_torch_threads();
  dispatch("params[0]", params[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<SgdTensor<T>> tensors;
    tensors.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i)
      tensors.push_back({params[i].data<T>(), grads[i].data<T>(),
                         has_momentum ? momentum_buffers[i].data<T>() : nullptr, has_momentum && first[i]});
    run_update<T, SgdTensor>(params, tensors,
                             [=](const auto& kernels, const auto& list) { kernels.sgd_step(options, list); });
  });
}

}  // namespace

void bind_optimizer(py::module_& module) {
  module.def("adam_step", &adam_step, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
             py::arg("max_exp_avg_sqs"), py::arg("steps"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
             py::arg("eps"), py::arg("weight_decay"), py::arg("decoupled"), py::arg("amsgrad"), py::arg("maximize"));
  module.def("sgd_step", &sgd_step, py::arg("params"), py::arg("grads"), py::arg("momentum_buffers"), py::arg("first"),
             py::arg("lr"), py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"),
             py::arg("maximize"));
}

}  // namespace fastnn
