// Memory access 16 bytes at a time, and elementwise work on whole arrays with it.
//
// An array is cut into tiles of 256 lots, a tile a block and a lot a thread. A lot is 16 bytes that lie together where
// every array of the kernel is 16-byte aligned. Else its elements are 256 apart, so that the threads of a warp still
// read neighbours (4 elements a lot):
//
//   aligned      0 0 0 0 1 1 1 1 2 2 2 2 ... 255 255 255 255    (the number of the thread)
//   otherwise    0 1 2 3 ... 255 0 1 2 3 ... 255 0 1 2 3 ...
#pragma once

#include "cuda/primitives.cuh"

namespace fastnn::cuda {

// kCount values that one instruction moves.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T values[kCount];
};

template <class T>
constexpr int kPackOf16Bytes = 16 / sizeof(T);

template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}

template <class T, int kCount>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

// Whether all of them may be accessed `bytes` at a time; null may.
template <class... Pointers>
bool aligned_to(uintptr_t bytes, const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

constexpr int kLotThreads = 256;

template <class T>
class Lot {
 public:
  static constexpr int kSize = kPackOf16Bytes<T>;
  static constexpr int64_t kTile = int64_t{kLotThreads} * kSize;
  using Values = Pack<T, kSize>;

  // This thread's lot of a tile of an array of `count` elements.
  __device__ __forceinline__ Lot(int64_t tile, int64_t count, bool aligned)
      : first_(tile * kTile + static_cast<int>(threadIdx.x) * (aligned ? kSize : 1)),
        left_(static_cast<int>(count - first_ < kTile ? count - first_ : kTile)),
        step_(aligned ? 1 : kLotThreads) {}

  // Elements beyond the array's end are 0.
  __device__ __forceinline__ Values load(const T* array) const {
    const T* from = array + first_;
    if (is_whole()) return load_pack<T, kSize>(from);
    Values result{};
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      if (e * step_ < left_) result.values[e] = from[e * step_];
    return result;
  }

  __device__ __forceinline__ void store(T* array, const Values& values) const {
    T* to = array + first_;
    if (is_whole()) return store_pack(to, values);
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      if (e * step_ < left_) to[e * step_] = values.values[e];
  }

 private:
  __device__ __forceinline__ bool is_whole() const { return step_ == 1 && left_ >= kSize; }

  int64_t first_;
  int left_;  // elements from the first on, as far as the tile asks
  int step_;
};

template <class T>
int64_t lot_tiles(int64_t count) {
  return (count + Lot<T>::kTile - 1) / Lot<T>::kTile;
}

}  // namespace fastnn::cuda
