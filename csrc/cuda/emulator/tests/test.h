// What the emulator's tests are written with: cases, and device memory in which a kernel cannot go astray unseen.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/launch.cuh"

namespace fastnn::cuda::tests {

struct Case {
  std::string name;
  // Throws where something is wrong; returns bytes that must be the same under every schedule.
  std::string (*run)();
};

std::vector<Case> primitive_cases();
std::vector<Case> broken_cases();
std::vector<Case> operator_cases();

void expect(bool holds, const std::string& otherwise);

// Whether `value` is what an array starts with where nothing fills it: all ones, NaN in every floating-point format.
template <class T>
bool is_poison(const T& value) {
  if constexpr (std::is_integral_v<T>) return value == static_cast<T>(~T{0});
  if constexpr (!std::is_integral_v<T>) return widen(value) != widen(value);
}

template <class T>
void set(T& value, int number) {
  if constexpr (std::is_integral_v<T>) value = static_cast<T>(number);
  if constexpr (!std::is_integral_v<T>) narrow_to(static_cast<Compute<T>>(number), value);
}

// Arrays, each an allocation of its own: of exactly its size under the address sanitizer, else between guards.
class Memory {
 public:
  // Arrays begin `offset` elements after a boundary of 256 bytes.
  explicit Memory(int64_t offset = 0) : offset_(offset) {}
  Memory(const Memory&) = delete;
  ~Memory();

  // What kernels read: whole numbers from `low` to `high`.
  template <class T>
  T* input(int64_t count, int low = -3, int high = 3) {
    T* data = static_cast<T*>(allocate(count * sizeof(T), offset_ * sizeof(T)));
    for (int64_t i = 0; i < count; ++i, state_ = state_ * 1103515245 + 12345)
      set(data[i], low + static_cast<int>((state_ >> 16) % (high - low + 1)));
    Array& array = arrays_.back();
    array.original.assign(array.data, array.data + array.bytes);
    return data;
  }
  // What they must write.
  template <class T>
  T* output(int64_t count) {
    T* data = static_cast<T*>(allocate(count * sizeof(T), offset_ * sizeof(T)));
    arrays_.back().is_output = true;
    arrays_.back().first_missing = first_missing<T>;
    return data;
  }
  // What they read and write.
  template <class T>
  T* updated(int64_t count, int low = -3, int high = 3) {
    T* data = input<T>(count, low, high);
    arrays_.back().is_output = true;
    arrays_.back().first_missing = first_missing<T>;
    return data;
  }

  // Its workspace is of this memory.
  Queue queue();

  // Throws where a guard is hurt, an input changed or an output not written. Returns the bytes of all outputs.
  std::string check() const;

 private:
  struct Array {
    unsigned char *allocation, *data;
    size_t bytes;
    bool is_output;
    int64_t (*first_missing)(const unsigned char* data, size_t bytes);
    std::string original;  // of an input
  };

  template <class T>
  static int64_t first_missing(const unsigned char* data, size_t bytes) {
    const T* values = reinterpret_cast<const T*>(data);
    for (size_t i = 0; i < bytes / sizeof(T); ++i)
      if (is_poison(values[i])) return static_cast<int64_t>(i);
    return -1;
  }

  void* allocate(size_t bytes, size_t offset);

  int64_t offset_;
  uint32_t state_ = 1;
  std::vector<Array> arrays_;
};

}  // namespace fastnn::cuda::tests
