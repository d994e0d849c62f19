#include "bindings/program.h"

#include <pybind11/stl.h>

#include "bindings/module.h"
#include "bindings/moves.h"

namespace py = pybind11;

namespace fastnn {
namespace {

void start(Program& program) {
  if (Program::recording())
    throw std::runtime_error("Program: expected no other program to be recording on this thread");
  Program::recording() = &program;
}

// Runs the program, or adds its calls to the one that records.
void run(const Program& program) {
  if (Program* recording = Program::recording()) return recording->append(program);
  adopt_torch_threads();
  const py::gil_scoped_release release;
  program.run();
}

void place(Program& program, const std::vector<Tensor>& slots,
           const std::vector<std::tuple<Tensor, int, int64_t>>& pieces) {
  std::vector<Program::Piece> placed;
  for (const auto& [tensor, in, offset] : pieces) placed.push_back({tensor, in, offset});
  program.place(slots, placed);
}

bool run_on(const Program& program, const std::vector<Tensor>& tensors) {
  if (Program::recording()) throw std::runtime_error("Program: expected no program to be recording on this thread");
  adopt_torch_threads();
  return program.run_on(tensors);
}

}  // namespace

void Program::place(const std::vector<Tensor>& slots, const std::vector<Piece>& pieces) {
  slots_.clear(), ranges_.clear();
  for (const Tensor& tensor : slots) {
    ranges_.push_back({tensor.data<char>(), tensor.numel() * tensor.item_size(), static_cast<int>(slots_.size()), 0});
    slots_.emplace_back(tensor);
  }
  for (const Piece& piece : pieces)
    ranges_.push_back(
        {piece.tensor.data<char>(), piece.tensor.numel() * piece.tensor.item_size(), piece.in, piece.offset});
}

bool Program::run_on(const std::vector<Tensor>& tensors) const {
  if (tensors.size() < slots_.size()) return false;
  for (size_t i = 0; i < slots_.size(); ++i)
    if (!slots_[i].is_of(tensors[i])) return false;
  Moves moves;
  for (const Range& range : ranges_) {
    const Tensor& tensor = tensors.at(range.in);
    if (range.offset + range.bytes > tensor.numel() * tensor.item_size()) return false;
    moves.add(range.begin, range.bytes, tensor.data<char>() + range.offset);
  }
  const py::gil_scoped_release release;
  Moves::active() = &moves;
  struct Reset {
    ~Reset() { Moves::active() = nullptr; }
  } reset;
  run();
  return true;
}

void bind_program(py::module_& module) {
  py::class_<Program>(module, "Program", py::module_local())
      .def(py::init<>())
      .def("start_recording", &start)
      .def("stop_recording", [](Program&) { Program::recording() = nullptr; })
      .def("run", &run)
      .def("place", &place, py::arg("slots"), py::arg("pieces"))
      .def("run_on", &run_on, py::arg("tensors"))
      .def("__len__", &Program::size);
}

}  // namespace fastnn
