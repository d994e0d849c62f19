// Where a program finds the memory that it was recorded on, when a run gives it other memory (see program.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace fastnn {

class Moves {
 public:
  // In the order of addresses; ranges do not overlap.
  void add(const char* from, int64_t bytes, char* to) { ranges_.push_back({from, from + bytes, to}); }

  char* find(char* address) const {
    if (!address) return nullptr;  // of a tensor without elements
    const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                                        [](const char* a, const Range& range) { return a < range.begin; });
    if (after == ranges_.begin() || address >= after[-1].end)
      throw std::logic_error("Program: a call uses memory that no tensor of the run stands for");
    return after[-1].to + (address - after[-1].begin);
  }

  // Those of the program that runs on this thread, or null.
  static const Moves*& active() {
    thread_local const Moves* moves = nullptr;
    return moves;
  }

 private:
  struct Range {
    const char *begin, *end;
    char* to;
  };
  std::vector<Range> ranges_;
};

}  // namespace fastnn
