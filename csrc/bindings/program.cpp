#include "bindings/program.h"

#include <algorithm>
#include <tuple>

#include "bindings/module.h"
#include "bindings/moves.h"

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
  module.def("stand_in", &stand_in, py::arg("like"), py::arg("shape"), py::arg("strides"));
}

}  // namespace fastnn
