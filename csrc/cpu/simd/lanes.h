// Lanes as integers: indices and bytes that accompany a Vec<T>, and the shuffles that deal vectors out.
#pragma once

#include "cpu/simd/bytes.h"

namespace fastnn::cpu {
namespace {

template <class T>
constexpr T minus_infinity = -__builtin_inff();

// The integer of T's size: what Mask<T> is made of.
template <class T>
struct LaneOf;
template <>
struct LaneOf<float> {
  using type = int32_t;
};
template <>
struct LaneOf<double> {
  using type = int64_t;
};
template <class T>
using LaneType = typename LaneOf<T>::type;

template <class T>
FASTNN_INLINE Mask<T> broadcast_lane(int64_t value) {
  return static_cast<LaneType<T>>(value) - Mask<T>{};
}

template <class T, int... Index>
FASTNN_INLINE Mask<T> numbers(Indices<Index...>) {
  return Mask<T>{Index...};
}

// 0, 1, 2, ...
template <class T>
FASTNN_INLINE Mask<T> lane_numbers() {
  return numbers<T>(LaneIndices<T>{});
}

// |v| as integers, whose order is that of the magnitudes, NaN beyond infinity.
template <class T>
FASTNN_INLINE Mask<T> magnitude_bits(Vec<T> v) {
  constexpr LaneType<T> sign = LaneType<T>(1) << (8 * sizeof(T) - 1);
  return (Mask<T>)v & ~sign;
}

// Whether any lane of a comparison's mask is set.
template <class T>
FASTNN_INLINE bool any_lane(Mask<T> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  LaneType<T> any = 0;
  for (int i = 0; i < kLanes<T>; ++i) any |= mask[i];
  return any != 0;
#endif
}

template <class T>
FASTNN_INLINE Mask<T> load_lanes(const LaneType<T>* p) {
  typedef LaneType<T> Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}

template <class T>
FASTNN_INLINE void store_lanes(LaneType<T>* p, Mask<T> lanes) {
  typedef LaneType<T> Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  *reinterpret_cast<Unaligned*>(p) = lanes;
}

// The low byte of every lane. (For AVX2, GCC 12 makes __builtin_convertvector one move a byte.)
template <class T>
FASTNN_INLINE void store_bytes(uint8_t* p, Mask<T> lanes) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i bytes = _mm256_shuffle_epi8((__m256i)lanes, _mm256_set1_epi32(sizeof(T) == 4 ? 0x0C080400 : 0x0800));
  const __m128i first = _mm256_castsi256_si128(bytes), second = _mm256_extracti128_si256(bytes, 1);
  if constexpr (sizeof(T) == 4)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(first, second));
  else
    _mm_storeu_si32(p, _mm_unpacklo_epi16(first, second));
#else
  *reinterpret_cast<typename VecTypes<T>::UnalignedBytes*>(p) =
      __builtin_convertvector(lanes, typename VecTypes<T>::Bytes);
#endif
}

// As store_bytes, of the first n lanes.
template <class T>
FASTNN_INLINE void store_bytes_upto(uint8_t* p, Mask<T> lanes, int64_t n) {
  if (n == kLanes<T>) return store_bytes<T>(p, lanes);
  uint8_t bytes[kLanes<T>];
  store_bytes<T>(bytes, lanes);
  for (int64_t i = 0; i < n; ++i) p[i] = bytes[i];
}

// The first n bytes, one to a lane, the other lanes 0.
template <class T>
FASTNN_INLINE Mask<T> load_bytes(const uint8_t* p, int64_t n) {
  if (n == kLanes<T>) return widen_bytes<T>(p);
  uint8_t bytes[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) bytes[i] = p[i];
  return widen_bytes<T>(bytes);
}

// Whether permute() is one instruction.
constexpr bool kPermutesLanes = kVectorBytes >= 32;

// Lane i becomes v[index[i]].
template <class T>
FASTNN_INLINE Vec<T> permute(Vec<T> v, Mask<T> index) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_permutexvar_ps(0xFFFF, (__m512i)index, (__m512)v);
  else
    return (Vec<T>)_mm512_maskz_permutexvar_pd(0xFF, (__m512i)index, (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 8) index = index << 1 | ((index << 1) + 1) << 32;  // of halves
  return (Vec<T>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#else
  Vec<T> lanes;
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = v[index[i]];
  return lanes;
#endif
}

template <class T, int first, int... Index>
FASTNN_INLINE Vec<T> every_second_lane(Vec<T> a, Vec<T> b, Indices<Index...>) {
  return __builtin_shufflevector(a, b, (2 * Index + first)...);
}

// Lanes first, first + 2, ... of a and b put one after the other.
template <class T, int first>
FASTNN_INLINE Vec<T> alternate_lanes(Vec<T> a, Vec<T> b) {
  return every_second_lane<T, first>(a, b, LaneIndices<T>{});
}

}  // namespace
}  // namespace fastnn::cpu
