// Vec<T>: one SIMD register of T for the ISA this file is compiled for, with arithmetic and comparison
// operators from the compiler's vector extension. Intrinsics appear only where the extension has no word, or no short
// one: partial loads, square roots, maxima.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FASTNN_INLINE inline __attribute__((always_inline))
#define FASTNN_UNROLL _Pragma("GCC unroll 64")

namespace fastnn::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2 on x86-64, NEON on aarch64
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

template <class T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  typedef uint8_t UnalignedBytes __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));
};
template <>
struct VecTypes<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 8)));
  typedef uint8_t UnalignedBytes __attribute__((vector_size(kVectorBytes / 8), aligned(1), may_alias));
};

template <class T>
using Vec = typename VecTypes<T>::Vec;
template <class T>
using Mask = typename VecTypes<T>::Mask;  // all ones or all zeros per lane: what comparisons give

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
FASTNN_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecTypes<T>::Unaligned*>(p);
}
template <class T>
FASTNN_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecTypes<T>::Unaligned*>(p) = v;
}
// v, held in a register: without it, the compiler reads a value that several operations use from memory for each.
template <class V>
FASTNN_INLINE V in_register(V v) {
#if defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+v"(v));
#endif
  return v;
}
// n, of which the compiler knows nothing. An unrolled loop that reads and writes at tens of addresses, each the sum of
// something that stays and n, would otherwise walk all of them, most in memory.
FASTNN_INLINE int64_t unknown(int64_t n) {
  asm("" : "+r"(n));
  return n;
}
template <class T>
FASTNN_INLINE Vec<T> broadcast(T s) {
  return s - Vec<T>{};
}

// load_first, store_first: the first n < kLanes elements; the lanes beyond load as 0.
#if defined(__AVX512F__)
FASTNN_INLINE Vec<float> load_first(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
FASTNN_INLINE Vec<double> load_first(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
}
FASTNN_INLINE void store_first(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
FASTNN_INLINE void store_first(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
}
FASTNN_INLINE Vec<float> square_root(Vec<float> v) { return (Vec<float>)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)v); }
FASTNN_INLINE Vec<double> square_root(Vec<double> v) { return (Vec<double>)_mm512_maskz_sqrt_pd(0xFF, (__m512d)v); }
#elif defined(__AVX2__)
FASTNN_INLINE __m256i first_lanes32(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTNN_INLINE __m256i first_lanes64(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
FASTNN_INLINE Vec<float> load_first(const float* p, int64_t n) {
  return (Vec<float>)_mm256_maskload_ps(p, first_lanes32(n));
}
FASTNN_INLINE Vec<double> load_first(const double* p, int64_t n) {
  return (Vec<double>)_mm256_maskload_pd(p, first_lanes64(n));
}
// In halves: AMD's processors take some 40 cycles for a masked store.
FASTNN_INLINE void store_first(float* p, Vec<float> v, int64_t n) {
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps((__m256)v, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
}
FASTNN_INLINE void store_first(double* p, Vec<double> v, int64_t n) {
  __m128d part = _mm256_castpd256_pd128((__m256d)v);
  if (n & 2) {
    _mm_storeu_pd(p, part);
    part = _mm256_extractf128_pd((__m256d)v, 1);
    p += 2;
  }
  if (n & 1) _mm_store_sd(p, part);
}
FASTNN_INLINE Vec<float> square_root(Vec<float> v) { return (Vec<float>)_mm256_sqrt_ps((__m256)v); }
FASTNN_INLINE Vec<double> square_root(Vec<double> v) { return (Vec<double>)_mm256_sqrt_pd((__m256d)v); }
#else
template <class T>
FASTNN_INLINE Vec<T> load_first(const T* p, int64_t n) {
  Vec<T> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <class T>
FASTNN_INLINE void store_first(T* p, Vec<T> v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
template <class V>
FASTNN_INLINE V square_root(V v) {
  for (unsigned i = 0; i < sizeof(v) / sizeof(v[0]); ++i)
    v[i] = sizeof(v[0]) == 4 ? __builtin_sqrtf(static_cast<float>(v[i])) : __builtin_sqrt(v[i]);
  return v;
}
#endif

// n in [0, kLanes]
template <class T>
FASTNN_INLINE Vec<T> load_upto(const T* p, int64_t n) {
  return n == kLanes<T> ? load(p) : load_first(p, n);
}
template <class T>
FASTNN_INLINE void store_upto(T* p, Vec<T> v, int64_t n) {
  if (n == kLanes<T>)
    store(p, v);
  else
    store_first(p, v, n);
}

template <int... Index>
struct Indices {};
template <int Count, int... Index>
struct MakeIndices : MakeIndices<Count - 1, Count - 1, Index...> {};
template <int... Index>
struct MakeIndices<0, Index...> {
  using type = Indices<Index...>;
};
template <class T>
using LaneIndices = typename MakeIndices<kLanes<T>>::type;

// Lane i becomes v[i] + v[i ^ distance].
template <class T, int distance, int... Index>
FASTNN_INLINE Vec<T> add_lanes_apart(Vec<T> v, Indices<Index...>) {
  return v + __builtin_shufflevector(v, v, (Index ^ distance)...);
}

// The sum of all lanes, in pairs: the same order on every call.
template <class T, int distance = kLanes<T> / 2>
FASTNN_INLINE T horizontal_sum(Vec<T> v) {
  const Vec<T> sums = add_lanes_apart<T, distance>(v, LaneIndices<T>{});
  if constexpr (distance > 1)
    return horizontal_sum<T, distance / 2>(sums);
  else
    return sums[0];
}

// a > b ? a : b in one instruction: b where they are equal or one is NaN.
template <class T>
FASTNN_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
  else
    return (Vec<T>)_mm512_maskz_max_pd(0xFF, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  else
    return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// Zero where v < 0; NaN stays NaN, as in torch.
template <class T>
FASTNN_INLINE T relu(T s) {
  return s < T(0) ? T(0) : s;
}
FASTNN_INLINE Vec<float> relu(Vec<float> v) { return larger<float>(Vec<float>{}, v); }
FASTNN_INLINE Vec<double> relu(Vec<double> v) { return larger<double>(Vec<double>{}, v); }

}  // namespace
}  // namespace fastnn::cpu
