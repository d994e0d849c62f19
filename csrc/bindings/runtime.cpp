// Set-up, ISA choice, build facts and the dispatch trace.
#include "bindings/module.h"
#include "bindings/run.h"
#include "common/trace.h"
#include "cpu/parallel.h"
#ifdef FASTNN_CUDA_EMULATOR
#include "cuda/emulator/emulator.h"
#endif

namespace fastnn {
namespace {

std::string joined_isas(bool supported_only) {
  std::string names;
  for (int i = 0; i < cpu::isa_count(); ++i) {
    if (supported_only && !cpu::isa_supported(i)) continue;
    names += (names.empty() ? "" : ", ") + std::string(cpu::isa_name(i));
  }
  return names;
}

py::list isa_list(bool supported_only) {
  py::list names;
  for (int i = 0; i < cpu::isa_count(); ++i)
    if (!supported_only || cpu::isa_supported(i)) names.append(cpu::isa_name(i));
  return names;
}

void set_isa(const std::string& name) {
  if (!cpu::set_isa(name.c_str()))
    fail_value("isa",
               "one of " + joined_isas(true) + " (compiled: " + joined_isas(false) + "; this CPU runs the former)",
               "'" + name + "'");
}

py::dict build_facts() {
  py::dict facts;
  facts["version"] = FASTNN_VERSION;
  facts["compiler"] = __VERSION__;
  facts["isas_compiled"] = isa_list(false);
  facts["openmp"] = cpu::openmp_library();
#ifdef FASTNN_CUDA
  facts["cuda"] = true;
  facts["cuda_architectures"] = FASTNN_CUDA_ARCHITECTURES;
  facts["cuda_devices"] = cuda::device_count();
#else
  facts["cuda"] = false;
  facts["cuda_architectures"] = "";
  facts["cuda_devices"] = 0;
#endif
  return facts;
}

py::list take_trace() {
  py::list records;
  trace_stop(
      [](const TraceRecord& record, void* list) {
        static_cast<py::list*>(list)->append(
            py::make_tuple(record.operation, record.variant, record.isa, record.dtype, record.device));
      },
      &records);
  return records;
}

#ifdef FASTNN_CUDA_EMULATOR
// How the emulator runs the launches that follow; `capability` is what launchers take the device for, 90 for sm_90.
void set_schedule(const std::string& order, unsigned seed, bool eager_copies, int capability) {
  static const char* const names[] = {"forward", "reverse", "random", "greedy"};
  for (int i = 0; i < 4; ++i) {
    if (order != names[i]) continue;
    cuda::emulator::schedule = {static_cast<cuda::emulator::Order>(i), seed, eager_copies};
    cuda::emulator::capability = capability;
    return;
  }
  fail_value("order", "'forward', 'reverse', 'random' or 'greedy'", "'" + order + "'");
}
#endif

}  // namespace

void bind_runtime(py::module_& module) {
  module.def("initialise", &initialise_tensors, py::arg("tensor_type"), py::arg("parameter_type"),
             py::arg("get_num_threads"), py::arg("out_of_memory"), py::arg("is_grad_enabled"), py::arg("modes"));
  module.def("quick_way", &quick_way);
  module.def("set_isa", &set_isa, py::arg("name"));
  module.def("get_isa", [] { return cpu::active_table().isa; });
  module.def("available_isas", [] { return isa_list(true); });
  module.def("has_bf16", [] { return cpu::conv2d_forward_bf16() != nullptr; });
  module.def("build_facts", &build_facts);
  module.def("device_has_code", [](int device) {
#ifdef FASTNN_CUDA
    return cuda::device_has_code(device);
#else
    return false;
#endif
  });
  module.def("is_emulator", [] {
#ifdef FASTNN_CUDA_EMULATOR
    return true;
#else
    return false;
#endif
  });
  module.def("num_threads", [] {
    adopt_torch_threads();
    return cpu::max_threads();
  });
  module.def(
      "set_openmp_threads",
      [](int threads) {
        adopt_torch_threads();
        return cpu::set_openmp_threads(threads);
      },
      py::arg("threads"));
  module.def("set_own_threads", &cpu::set_own_threads, py::arg("own"));
  module.def("trace_start", &trace_start);
  module.def("trace_stop", &take_trace);
#ifdef FASTNN_CUDA_EMULATOR
  module.def("set_schedule", &set_schedule, py::arg("order"), py::arg("seed"), py::arg("eager_copies"),
             py::arg("capability"));
#endif
}

}  // namespace fastnn
