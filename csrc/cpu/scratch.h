// Scratch memory for one kernel call, from stacks of cached blocks.
//
// Allocate on the calling thread, before a parallel loop: an allocation that fails then raises MemoryError,
// and no allocation happens once the blocks are warm.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace fastnn::cpu {

// A block of what all threads share; throws std::bad_alloc.
void* scratch_push(size_t bytes);
void scratch_pop();
// A block for each of a loop's threads.
void* const* scratch_push_each(int threads, size_t bytes);
void scratch_pop_each();

namespace {

// Room for `count` elements and two vectors more, so that a kernel may load whole vectors at the end. Throws
// std::bad_alloc for more than can be addressed.
template <class T>
size_t scratch_bytes(int64_t count) {
  constexpr int64_t kMost = INT64_MAX / static_cast<int64_t>(sizeof(T)) - 128;
  if (count < 0 || count > kMost) throw std::bad_alloc();
  return static_cast<size_t>(count) * sizeof(T) + 128;
}

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(scratch_push(scratch_bytes<T>(count)))) {}
  ~Scratch() { scratch_pop(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// `count` elements for each of a loop's threads. A thread has them where no other one ever writes: their lines stay in
// its core's caches from one kernel to the next.
template <class T>
class ThreadScratch {
 public:
  ThreadScratch(int threads, int64_t count) : blocks_(scratch_push_each(threads, scratch_bytes<T>(count))) {}
  ~ThreadScratch() { scratch_pop_each(); }
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;
  T* operator[](int thread) const { return static_cast<T*>(blocks_[thread]); }

 private:
  void* const* blocks_;
};

}  // namespace
}  // namespace fastnn::cpu
