// Byte masks and lane look-ups: what the winner-sparse kernels need beyond vector arithmetic.
#pragma once

#include "cpu/simd/vector.h"

namespace fastnn::cpu {
namespace {

// Bit i is set where p[i] == value, for i < 32.
FASTNN_INLINE uint32_t equal_mask32(const uint8_t* p, uint8_t value) {
#if defined(__AVX2__)
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i equal = _mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(static_cast<char>(value)));
  return static_cast<uint32_t>(_mm256_movemask_epi8(equal));
#else
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(p[i] == value) << i;
  return mask;
#endif
}

// As equal_mask32 for the first `count` <= 32 bytes; the other bits are 0.
FASTNN_INLINE uint32_t equal_mask_upto(const uint8_t* p, int64_t count, uint8_t value) {
  if (count == 32) return equal_mask32(p, value);
  uint32_t mask = 0;
  for (int64_t i = 0; i < count; ++i) mask |= static_cast<uint32_t>(p[i] == value) << i;
  return mask;
}

// A vector's worth of bytes, one to a lane. (GCC 12 makes __builtin_convertvector of it one move a byte.)
template <class T>
FASTNN_INLINE Mask<T> widen_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Mask<T>)_mm512_maskz_cvtepu8_epi32(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  else
    return (Mask<T>)_mm512_maskz_cvtepu8_epi64(0xFF, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Mask<T>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  else
    return (Mask<T>)_mm256_cvtepu8_epi64(_mm_loadu_si32(p));
#else
  return __builtin_convertvector(*reinterpret_cast<const typename VecTypes<T>::UnalignedBytes*>(p), Mask<T>);
#endif
}

// Lane i of the result is (upper[i] ? b : a)[index[i]]; upper is a comparison's mask, index below kLanes.
template <class T>
FASTNN_INLINE Vec<T> look_up(Vec<T> a, Vec<T> b, Mask<T> index, Mask<T> upper) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_permutex2var_ps((__m512)a, (__m512i)(index + (upper & 16)), (__m512)b);
  if constexpr (sizeof(T) == 8)
    return (Vec<T>)_mm512_permutex2var_pd((__m512d)a, (__m512i)(index + (upper & 8)), (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256 from_a = _mm256_permutevar8x32_ps((__m256)a, (__m256i)index);
    const __m256 from_b = _mm256_permutevar8x32_ps((__m256)b, (__m256i)index);
    return (Vec<T>)_mm256_blendv_ps(from_a, from_b, (__m256)upper);
  }
#endif
  Vec<T> result;
  for (int i = 0; i < kLanes<T>; ++i) result[i] = upper[i] ? b[index[i]] : a[index[i]];
  return result;
}

}  // namespace
}  // namespace fastnn::cpu
