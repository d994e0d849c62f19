// exp and log of whole vectors, and reductions across lanes. Bounds are tested in tests/test_simd_math.py.
//
//   exp(x) = 2^n e^r,           n = round(x / ln 2), |r| <= ln 2 / 2, e^r by a polynomial
//   log(x) = k ln 2 + log(m),   x = 2^k m, sqrt(1/2) <= m < sqrt(2), log(m) by a polynomial in (m - 1) / (m + 1)
//
// exp is within 1.1 ulp and log within 1 ulp, in float and double, subnormals included. exp overflows to infinity and
// underflows gradually to 0; log(0) = -inf and log of a negative number is NaN; NaN stays NaN.
#pragma once

#include "cpu/simd/lanes.h"

namespace fastnn::cpu {
namespace {

template <class T>
struct MathConstants;

template <>
struct MathConstants<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr int32_t exponent_bias = 127;
  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
  static constexpr float round_magic = 0x1.8p23f;
  static constexpr float log2_e = 0x1.715476p0f;
  // ln 2 in two parts, the first of 9 bits, so that n times it is exact (Cody and Waite; the split of Cephes).
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  // Below exp_least exp is less than half the smallest subnormal; above exp_most it is infinite.
  static constexpr float exp_least = -104.0f, exp_most = 89.0f;
  // (e^r - 1 - r) / r^2, by Remez's exchange for the relative error of e^r: 3.1e-9.
  static constexpr float exp_terms[] = {0x1.fffffcp-2f, 0x1.555490p-3f, 0x1.5558f8p-5f, 0x1.123b02p-7f,
                                        0x1.6a2254p-10f};
  static constexpr int32_t sqrt_half_bits = 0x3f3504f3;
  static constexpr float smallest_normal = 0x1p-126f;
  static constexpr float log_ln2_high = 6.9313812256e-01f, log_ln2_low = 9.0580006145e-06f;
  // The odd part of log((1 + s) / (1 - s)), from fdlibm's logf (Sun Microsystems, 1993).
  static constexpr float log_terms[] = {0.66666662693f, 0.40000972152f, 0.28498786688f, 0.24279078841f};
};

template <>
struct MathConstants<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr int64_t exponent_bias = 1023;
  static constexpr double round_magic = 0x1.8p52;
  static constexpr double log2_e = 0x1.71547652b82fep0;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double exp_least = -746.0, exp_most = 710.0;
  // As above, relative error 3.7e-18.
  static constexpr double exp_terms[] = {0.5000000000000011,    0.16666666666666408,    0.0416666666665281,
                                         0.008333333333496928,  0.0013888888944249126,  0.00019841269502733722,
                                         2.480149238833721e-05, 2.7557588427032884e-06, 2.763052345640972e-07,
                                         2.4999856621550797e-08};
  static constexpr int64_t sqrt_half_bits = 0x3fe6a09e667f3bcd;
  static constexpr double smallest_normal = 0x1p-1022;
  static constexpr double log_ln2_high = 6.93147180369123816490e-01, log_ln2_low = 1.90821492927058770002e-10;
  static constexpr double log_terms[] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                                         2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                                         1.479819860511658591e-01};
};

template <class T>
FASTNN_INLINE Mask<T> bits_of(Vec<T> v) {
  return (Mask<T>)v;
}
template <class T>
FASTNN_INLINE Vec<T> from_bits(Mask<T> bits) {
  return (Vec<T>)bits;
}

// c[0] + c[1] x + ...
template <class T, int count>
FASTNN_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[count]) {
  Vec<T> sum = broadcast(c[count - 1]);
  FASTNN_UNROLL
  for (int i = count - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// v * 2^n, n being whole: as a float for the AVX-512 instruction, and its bits as round_magic leaves them.
template <class T>
FASTNN_INLINE Vec<T> scale_by_power(Vec<T> v, [[maybe_unused]] Vec<T> n, [[maybe_unused]] Mask<T> rounded_bits) {
#if defined(__AVX512F__)
  // With a full mask: the form without one warns of an undefined operand in GCC 12.
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_scalef_ps(0xffff, (__m512)v, (__m512)n);
  else
    return (Vec<T>)_mm512_maskz_scalef_pd(0xff, (__m512d)v, (__m512d)n);
#else
  // In two halves, each a normal power of two, so that a subnormal result is rounded once.
  using C = MathConstants<T>;
  const Mask<T> power = rounded_bits - bits_of<T>(broadcast(C::round_magic));
  const Mask<T> half = power >> 1;
  const Vec<T> first = from_bits<T>((half + C::exponent_bias) << C::mantissa_bits);
  const Vec<T> second = from_bits<T>((power - half + C::exponent_bias) << C::mantissa_bits);
  return v * first * second;
#endif
}

template <class T>
FASTNN_INLINE Vec<T> exponential(Vec<T> x) {
  using C = MathConstants<T>;
  x = x < C::exp_least ? broadcast(C::exp_least) : x;
  x = x > C::exp_most ? broadcast(C::exp_most) : x;
  const Vec<T> rounded = x * C::log2_e + C::round_magic;
  const Vec<T> n = rounded - C::round_magic;
  const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
  const Vec<T> power = (r * r) * polynomial<T>(r, C::exp_terms) + r + T(1);
  return scale_by_power<T>(power, n, bits_of<T>(rounded));
}

template <class T>
FASTNN_INLINE Vec<T> logarithm(Vec<T> x) {
  using C = MathConstants<T>;
  const Mask<T> subnormal = x < C::smallest_normal;
  const Vec<T> normal = subnormal ? x * static_cast<T>(int64_t{1} << (C::mantissa_bits + 1)) : x;
  // The exponent counted from sqrt(1/2), so that m lies around 1. Without the sign bit, whose difference would
  // overflow: numbers below zero get their result at the end.
  const Mask<T> shifted = (bits_of<T>(normal) & ~bits_of<T>(broadcast(T(-0.0)))) - C::sqrt_half_bits;
  const Mask<T> exponent = (shifted >> C::mantissa_bits) - (subnormal ? Mask<T>{} + (C::mantissa_bits + 1) : Mask<T>{});
  const Vec<T> k = from_bits<T>(exponent + bits_of<T>(broadcast(C::round_magic))) - C::round_magic;
  const Mask<T> mantissa = shifted & ((LaneType<T>{1} << C::mantissa_bits) - 1);
  const Vec<T> f = from_bits<T>(mantissa + C::sqrt_half_bits) - T(1);
  const Vec<T> s = f / (f + T(2));
  const Vec<T> z = s * s;
  const Vec<T> half_square = T(0.5) * f * f;
  const Vec<T> tail = s * (half_square + z * polynomial<T>(z, C::log_terms)) + k * C::log_ln2_low;
  const Vec<T> result = ((tail - half_square) + f) + k * C::log_ln2_high;
  constexpr T infinity = -minus_infinity<T>;
  const Vec<T> at_most_zero = x == T(0) ? broadcast(-infinity) : broadcast(static_cast<T>(__builtin_nanf("")));
  return x > T(0) ? (x < infinity ? result : x) : (x != x ? x : at_most_zero);
}

template <class V>
FASTNN_INLINE V maximum(V a, V b) {
  return b > a ? b : a;  // a where b is NaN
}

template <class T, int distance, int... Index>
FASTNN_INLINE Vec<T> lanes_apart(Vec<T> v, Indices<Index...>) {
  return __builtin_shufflevector(v, v, (Index ^ distance)...);
}

// The largest lane, in every lane.
template <class T, int distance = kLanes<T> / 2>
FASTNN_INLINE Vec<T> maximum_of_lanes(Vec<T> v) {
  const Vec<T> larger = maximum(v, lanes_apart<T, distance>(v, LaneIndices<T>{}));
  if constexpr (distance > 1)
    return maximum_of_lanes<T, distance / 2>(larger);
  else
    return larger;
}

// The sum of all lanes, in pairs, in every lane.
template <class T, int distance = kLanes<T> / 2>
FASTNN_INLINE Vec<T> sum_of_lanes(Vec<T> v) {
  const Vec<T> sums = v + lanes_apart<T, distance>(v, LaneIndices<T>{});
  if constexpr (distance > 1)
    return sum_of_lanes<T, distance / 2>(sums);
  else
    return sums;
}

}  // namespace
}  // namespace fastnn::cpu
