// Scratch memory for one kernel call: a per-thread stack of cached, 64-byte aligned blocks.
//
// Allocate on the calling thread, before a parallel loop: an allocation that fails then raises MemoryError,
// and no allocation happens once the blocks are warm.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastnn::cpu {

void* scratch_push(size_t bytes);  // throws std::bad_alloc
void scratch_pop();

namespace {

template <class T>
class Scratch {
 public:
  // Room for `count` elements and two vectors more, so that a kernel may load whole vectors at the end.
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(scratch_push(static_cast<size_t>(count) * sizeof(T) + 128))) {}
  ~Scratch() { scratch_pop(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace fastnn::cpu
