#include "cpu/scratch.h"

#include <cstdlib>
#include <new>
#include <numeric>
#include <vector>

namespace fastnn::cpu {
namespace {

constexpr size_t kAlignment = 64;  // a cache line, and an AVX-512 vector
// What takes more, blocks of all threads together, goes back to the system after its call.
constexpr size_t kKeptBytes = 32u << 20;
// Beyond a thread's block: what a processor fetches ahead at its end, at most to the end of a page, is nobody's.
constexpr size_t kApart = 4096;

// A block for each of some threads. What has room for a call is left as it is, its address too, which the threads read:
// lines that nobody writes stay in all caches.
class Blocks {
 public:
  Blocks() = default;
  Blocks(Blocks&&) noexcept = default;
  ~Blocks() { release(); }

  void* const* make(size_t count, size_t bytes) {
    if (data_.size() < count) {
      data_.resize(count, nullptr);
      sizes_.resize(count, 0);
    }
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    for (size_t i = 0; i < count; ++i) {
      if (sizes_[i] >= bytes) continue;
      std::free(data_[i]);
      sizes_[i] = 0;
      data_[i] = rounded < bytes ? nullptr : std::aligned_alloc(kAlignment, rounded);
      if (!data_[i]) throw std::bad_alloc();
      sizes_[i] = rounded;
    }
    return data_.data();
  }

  void release_if_large() {
    if (std::accumulate(sizes_.begin(), sizes_.end(), size_t{0}) > kKeptBytes) release();
  }

 private:
  void release() {
    for (void* block : data_) std::free(block);
    data_.clear();
    sizes_.clear();
  }

  std::vector<void*> data_;
  std::vector<size_t> sizes_;
};

class Stack {
 public:
  void* const* push(size_t count, size_t bytes) {
    if (depth_ == levels_.size()) levels_.emplace_back();
    void* const* blocks = levels_[depth_].make(count, bytes);
    ++depth_;
    return blocks;
  }

  void pop() { levels_[--depth_].release_if_large(); }

 private:
  std::vector<Blocks> levels_;
  size_t depth_ = 0;
};

thread_local Stack shared, of_threads;

}  // namespace

void* scratch_push(size_t bytes) { return shared.push(1, bytes)[0]; }

void scratch_pop() { shared.pop(); }

void* const* scratch_push_each(int threads, size_t bytes) {
  if (bytes + kApart < bytes) throw std::bad_alloc();
  return of_threads.push(static_cast<size_t>(threads), bytes + kApart);
}

void scratch_pop_each() { of_threads.pop(); }

}  // namespace fastnn::cpu
