#include "bindings/program.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "bindings/module.h"
#include "bindings/moves.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace fastnn {
namespace {

int64_t bytes_of(const Tensor& tensor) { return tensor.numel() * tensor.item_size(); }

// Sets a variable of this thread for as long as it lives.
template <class T>
class Setting {
 public:
  Setting(T& variable, T value) : variable_(variable) { variable = value; }
  ~Setting() { variable_ = T{}; }
  Setting(const Setting&) = delete;
  Setting& operator=(const Setting&) = delete;

 private:
  T& variable_;
};

// What `function()` returns; the kernel calls that it makes become part of the program.
py::object record(Program& program, const py::function& function) {
  if (Program::recording())
    throw std::runtime_error("Program: expected no other program to be recording on this thread");
  const Setting<Program*> setting(Program::recording(), &program);
  return function();
}

// Runs the program, or adds its calls to the one that records.
void run(const Program& program) {
  if (Program* recording = Program::recording()) return recording->append(program);
  adopt_torch_threads();
  const py::gil_scoped_release release;
  program.run();
}

void place(Program& program, const std::vector<Tensor>& slots,
           const std::vector<std::tuple<Tensor, size_t, int64_t>>& pieces) {
  std::vector<Program::Piece> placed;
  for (const auto& [tensor, in, offset] : pieces) placed.push_back({tensor.data<char>(), bytes_of(tensor), in, offset});
  program.place(slots, std::move(placed));
}

bool run_on(const Program& program, const std::vector<Tensor>& tensors) {
  if (Program::recording()) throw std::runtime_error("Program: expected no program to be recording on this thread");
  adopt_torch_threads();
  return program.run_on(tensors);
}

// output = the programs' output for each batch of `index`, whose rows a program finds in rows[i] and whose output it
// leaves in outputs[i]. Where there is a program for each thread, threads compute batches side by side, each with
// memory of its own and alone; else the first program computes one after the other, each on all threads.
void run_batches(const std::vector<const Program*>& programs, const std::vector<Tensor>& rows,
                 const std::vector<Tensor>& outputs, const Tensor& index, const Tensor& output) {
  if (Program::recording()) throw std::runtime_error("run_batches: expected no program to be recording on this thread");
  if (programs.empty() || rows.size() != programs.size() || outputs.size() != programs.size())
    fail_value("programs", "as many as rows and outputs, at least one",
               std::to_string(programs.size()) + ", " + std::to_string(rows.size()) + " and " +
                   std::to_string(outputs.size()));
  check_shape("index", index, {"rows"});
  const auto check_dense = [](const char* name, const Tensor& tensor) {
    if (!tensor.is_cpu() || !tensor.is_dense())
      fail_value(name, "a dense tensor on the CPU", tensor.shape_string() + " on " + tensor.device_string());
  };
  const int64_t batch = rows[0].size(0);
  for (size_t i = 0; i < programs.size(); ++i) {
    check_shape("rows", rows[i], {batch});
    check_dtype("rows", rows[i], DType::int64);
    check_dense("rows", rows[i]);
    check_dense("outputs", outputs[i]);
    if (!outputs[i].has_shape_of(outputs[0]))
      fail_value("outputs", outputs[0].shape_string(), outputs[i].shape_string());
  }
  check_dtype("index", index, DType::int64);
  check_contiguous("index", index);
  check_dense("output", output);
  const int64_t batches = batch > 0 ? index.size(0) / batch : 0;
  if (batches * batch != index.size(0) || bytes_of(output) != batches * bytes_of(outputs[0]))
    fail_value("index", "whole batches of " + std::to_string(batch) + " rows, and an output of as many",
               index.shape_string() + " and " + output.shape_string());

  adopt_torch_threads();
  const py::gil_scoped_release release;
  const auto compute = [&](int64_t number, int thread) {
    const size_t i = static_cast<size_t>(thread);
    std::memcpy(rows[i].data<char>(), index.data<char>() + number * bytes_of(rows[i]), bytes_of(rows[i]));
    programs[i]->run();
    std::memcpy(output.data<char>() + number * bytes_of(outputs[i]), outputs[i].data<char>(), bytes_of(outputs[i]));
  };
  if (static_cast<int>(programs.size()) < cpu::max_threads()) {
    for (int64_t number = 0; number < batches; ++number) compute(number, 0);
    return;
  }
  cpu::parallel_tasks(batches, compute);
}

}  // namespace

void Program::place(const std::vector<Tensor>& slots, std::vector<Piece> pieces) {
  slots_.clear();
  for (const Tensor& slot : slots) {
    pieces.push_back({slot.data<char>(), bytes_of(slot), slots_.size(), 0});
    slots_.emplace_back(slot);
  }
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
  pieces_ = std::move(pieces);
}

bool Program::run_on(const std::vector<Tensor>& tensors) const {
  if (tensors.size() < slots_.size()) return false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const bool fits = i < slots_.size() ? slots_[i].is_of(tensor)
                                        : tensor.dtype() == DType::uint8 && tensor.is_contiguous() &&
                                              tensor.is_on_device_of(tensors[0]);
    if (!fits) return false;
  }
  Moves moves;
  for (const Piece& piece : pieces_) {
    if (piece.in >= tensors.size() || piece.offset + piece.bytes > bytes_of(tensors[piece.in])) return false;
    moves.add(piece.begin, piece.bytes, tensors[piece.in].data<char>() + piece.offset);
  }
  const py::gil_scoped_release release;
  const Setting<const Moves*> setting(Moves::active(), &moves);
  run();
  return true;
}

void bind_program(py::module_& module) {
  py::class_<Program>(module, "Program", py::module_local())
      .def(py::init<>())
      .def("record", &record, py::arg("function"))
      .def("run", &run)
      .def("place", &place, py::arg("slots"), py::arg("pieces"))
      .def("run_on", &run_on, py::arg("tensors"))
      .def("__len__", &Program::size);
  module.def("run_batches", &run_batches, py::arg("programs"), py::arg("rows"), py::arg("outputs"), py::arg("index"),
             py::arg("output"));
  module.def("stand_in", &stand_in, py::arg("like"), py::arg("shape"), py::arg("strides"));
}

}  // namespace fastnn
