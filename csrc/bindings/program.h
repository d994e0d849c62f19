// Recorded kernel calls: what runs with no Python between kernels.
//
// While a program records, bindings check their arguments as ever, but append the call - shape and tensors - instead
// of making it. A program runs in one of two ways:
//
//   run()     on the tensors that it was recorded on, which must stay alive and in place: its owner in Python keeps
//             them. Compiled training steps do.
//   run_on()  on others, after place() has said which tensors those of the recording stand for.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "bindings/tensor.h"

namespace fastnn {

class Program {
 public:
  // A tensor of the recording that is part of another one in a run, so many bytes from its begin.
  struct Piece {
    Tensor tensor;
    int in;
    int64_t offset;
  };

  void append(std::function<void()> call) { calls_.push_back(std::move(call)); }
  void append(const Program& other) { calls_.insert(calls_.end(), other.calls_.begin(), other.calls_.end()); }
  void run() const {
    for (const auto& call : calls_) call();
  }
  int64_t size() const { return static_cast<int64_t>(calls_.size()); }

  // Says what all memory of the calls is: `slots`, for each of which a run takes one like it, or pieces of tensors of
  // bytes that a run takes after those.
  void place(const std::vector<Tensor>& slots, const std::vector<Piece>& pieces);
  // False, and nothing is run, where a tensor has another shape, strides, dtype or device than its slot.
  bool run_on(const std::vector<Tensor>& tensors) const;

  // The program that records on this thread, or null.
  static Program*& recording() {
    thread_local Program* program = nullptr;
    return program;
  }

 private:
  struct Range {
    const char* begin;
    int64_t bytes;
    int in;  // the number of a run's tensor
    int64_t offset;
  };

  std::vector<std::function<void()>> calls_;
  std::vector<TensorLayout> slots_;
  std::vector<Range> ranges_;
};

}  // namespace fastnn
