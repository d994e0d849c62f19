// Winograd's sums with both factors rounded to bfloat16, added in float32: AVX512-BF16 multiplies two channels at a
// time.
#pragma once

#include "cpu/kernels/conv2d_winograd.inl.h"

namespace fastnn::cpu {
namespace {

struct Bf16Products {
  using Element = uint16_t;
  static constexpr int kMostPoints = 4;  // more would lose most of the 8 bits
  static constexpr int64_t kGroup = 2;

  template <class F>
  static constexpr const char* kName = "winograd_bf16";

  static FASTNN_INLINE __m256i rounded(Vec<float> value) {
    return (__m256i)_mm512_maskz_cvtneps_pbh(0xFFFF, (__m512)value);
  }
  static FASTNN_INLINE void store_input(Element* to, Vec<float> value, int64_t count) {
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), rounded(value));
  }
  // Columns are pairs of channels: the first member fills the low halves, the second the high ones.
  static FASTNN_INLINE void store_weight(Element* to, Vec<float> value, int64_t member) {
    const __m512i halves = _mm512_maskz_cvtepu16_epi32(0xFFFF, rounded(value));
    const __m512i pairs =
        member == 0 ? halves : _mm512_or_si512(_mm512_loadu_si512(to), _mm512_maskz_slli_epi32(0xFFFF, halves, 16));
    _mm512_storeu_si512(to, pairs);
  }

  template <int rows, int vectors>
  static FASTNN_INLINE void accumulate(int64_t groups, const Element* const (&sources)[rows], const Element* u,
                                       Vec<float> (&acc)[rows][vectors]) {
    for (int64_t k = 0; k < groups; ++k, u += kTileColumns<float> * kGroup) {
      __m512bh weights[vectors];
      FASTNN_UNROLL
      for (int v = 0; v < vectors; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(u + v * kLanes<float> * kGroup);
      FASTNN_UNROLL
      for (int r = 0; r < rows; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, sources[r] + k * kGroup, sizeof pair);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        FASTNN_UNROLL
        for (int v = 0; v < vectors; ++v) acc[r][v] = (Vec<float>)_mm512_dpbf16_ps((__m512)acc[r][v], x, weights[v]);
      }
    }
  }
};

}  // namespace
}  // namespace fastnn::cpu
