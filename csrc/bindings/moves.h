// Where a program finds the memory that it was recorded on, when a run gives it other memory (see program.h).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace fastnn {

class Moves {
 public:
  void add(const char* from, int64_t bytes, char* to) { ranges_.push_back({from, from + bytes, to}); }

  char* find(char* address) const {
    if (!address) return nullptr;  // of a tensor without elements
    for (const Range& range : ranges_)
      if (address >= range.begin && address < range.end) return range.to + (address - range.begin);
    throw std::logic_error("Program: a call reads memory that no slot stands for");
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
