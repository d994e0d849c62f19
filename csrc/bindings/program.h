// Recorded kernel calls: what a compiled training step replays with no Python between kernels.
//
// While a program records, bindings check their arguments as ever, but append the call - shape and pointers - instead
// of making it. The tensors must stay alive and in place for as long as the program runs: its owner in Python keeps
// them.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace fastnn {

class Program {
 public:
  void append(std::function<void()> call) { calls_.push_back(std::move(call)); }
  void append(const Program& other) { calls_.insert(calls_.end(), other.calls_.begin(), other.calls_.end()); }
  void run() const {
    for (const auto& call : calls_) call();
  }
  int64_t size() const { return static_cast<int64_t>(calls_.size()); }

  // The program that records on this thread, or null.
  static Program*& recording() {
    thread_local Program* program = nullptr;
    return program;
  }

 private:
  std::vector<std::function<void()>> calls_;
};

}  // namespace fastnn
