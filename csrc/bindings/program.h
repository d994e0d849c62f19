// Recorded kernel calls: what runs with no Python between kernels.
//
// While a program records, bindings check their arguments as ever, but append the call - shape and tensors - instead
// of making it. A program runs in one of two ways:
//
//   run()     on the tensors that it was recorded on, which must stay alive and in place: its owner in Python keeps
//             them. Compiled training steps do.
//   run_on()  on others, where the recording was made of stand-ins, tensors with an address and no memory
//             (stand_in()), and place() has said what stands for what. fastnn.nn.Sequential does.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "bindings/tensor.h"

namespace fastnn {

class Program {
 public:
  // Memory of the recording: so many bytes of a run's tensor from an offset on.
  struct Piece {
    const char* begin;
    int64_t bytes;
    size_t in;  // the number of the tensor
    int64_t offset;
  };

  Program() = default;
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  void append(std::function<void()> call) { calls_.push_back(std::move(call)); }
  void append(const Program& other) { calls_.insert(calls_.end(), other.calls_.begin(), other.calls_.end()); }
  void run() const {
    for (const auto& call : calls_) call();
  }
  int64_t size() const { return static_cast<int64_t>(calls_.size()); }

  // What all memory of the calls is: `slots`, for each of which a run brings a tensor like it, and pieces of those or
  // of tensors of bytes that a run brings after them.
  void place(const std::vector<Tensor>& slots, std::vector<Piece> pieces);
  // False, and nothing is run, where a tensor is not like its slot, or a piece does not fit.
  bool run_on(const std::vector<Tensor>& tensors) const;

  // The program that records on this thread, or null.
  static Program*& recording() {
    thread_local Program* program = nullptr;
    return program;
  }

 private:
  std::vector<std::function<void()>> calls_;
  std::vector<TensorLayout> slots_;
  std::vector<Piece> pieces_;  // in the order of addresses
};

}  // namespace fastnn
