// The points of Winograd's algorithm, and its transforms of one axis and of both.
//
// A place is a pair of points at which the polynomials behind the algorithm are multiplied. Along an axis they are
//
//   0, 1/s, -1/s, s, -s, infinity, with s = sqrt(2): 4 outputs of 3 taps, 2 outputs of 5
//   0, 1/s, -1/s,        infinity:                   2 outputs of 3 taps
//
// The square roots lose half as many digits as the usual 1 and 2 (compare Barabasz et al., "Error Analysis and
// Improving the Accuracy of Winograd Convolution", 2020). The fewer points are among the others, so one U of 3x3
// kernels serves tiles of both sizes: an axis is cut into tiles of 4 and, where 1 or 2 outputs are left, one of 2.
#pragma once

#include "cpu/simd/vector.h"

namespace fastnn::cpu {
namespace {

// The transforms of one axis of a tile with so many outputs of so many taps.
template <int outputs, int taps>
struct WinogradAxis;

template <>
struct WinogradAxis<2, 3> {
  template <class T>
  static FASTNN_INLINE void input(const Vec<T> (&d)[4], Vec<T> (&v)[4]) {
    const Vec<T> odd = d[1] * T(kHalfRoot);
    v[0] = d[0] - T(2) * d[2];
    v[1] = d[2] + odd;
    v[2] = d[2] - odd;
    v[3] = d[3] - T(0.5) * d[1];
  }
  template <class T>
  static FASTNN_INLINE void weight(const Vec<T> (&g)[3], Vec<T> (&u)[4]) {
    const Vec<T> even = g[0] + T(0.5) * g[2], odd = g[1] * T(kHalfRoot);
    u[0] = g[0], u[1] = even + odd, u[2] = even - odd, u[3] = g[2];
  }
  template <class T>
  static FASTNN_INLINE void output(const Vec<T> (&m)[4], Vec<T> (&y)[2]) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = m[3] + T(kHalfRoot) * (m[1] - m[2]);
  }
  static constexpr double kHalfRoot = 0.70710678118654752440;  // 1 / sqrt(2)
};

template <>
struct WinogradAxis<4, 3> {
  template <class T>
  static FASTNN_INLINE void input(const Vec<T> (&d)[6], Vec<T> (&v)[6]) {
    const Vec<T> even = d[4] - T(2) * d[2], odd = d[3] - T(2) * d[1];
    const Vec<T> far_even = d[4] - T(0.5) * d[2], far_odd = d[3] - T(0.5) * d[1];
    v[0] = (d[0] + d[4]) - T(2.5) * d[2];
    v[1] = even + T(kHalfRoot) * odd;
    v[2] = even - T(kHalfRoot) * odd;
    v[3] = far_even + T(kRoot) * far_odd;
    v[4] = far_even - T(kRoot) * far_odd;
    v[5] = (d[1] + d[5]) - T(2.5) * d[3];
  }
  template <class T>
  static FASTNN_INLINE void weight(const Vec<T> (&g)[3], Vec<T> (&u)[6]) {
    const Vec<T> even = g[0] + T(0.5) * g[2], far_even = g[0] + T(2) * g[2];
    u[0] = g[0];
    u[1] = even + T(kHalfRoot) * g[1];
    u[2] = even - T(kHalfRoot) * g[1];
    u[3] = far_even + T(kRoot) * g[1];
    u[4] = far_even - T(kRoot) * g[1];
    u[5] = g[2];
  }
  template <class T>
  static FASTNN_INLINE void output(const Vec<T> (&m)[6], Vec<T> (&y)[4]) {
    const Vec<T> sum = m[1] + m[2], difference = m[1] - m[2], far_sum = m[3] + m[4], far_difference = m[3] - m[4];
    y[0] = m[0] - T(2. / 3) * sum + T(1. / 6) * far_sum;
    y[1] = T(kRoot / 6) * far_difference - T(2 * kHalfRoot / 3) * difference;
    y[2] = T(1. / 3) * far_sum - T(1. / 3) * sum;
    y[3] = m[5] - T(kHalfRoot / 3) * difference + T(kRoot / 3) * far_difference;
  }
  // The transposes of output() and weight(), for gradients.
  template <class T>
  static FASTNN_INLINE void output_transposed(const Vec<T> (&y)[4], Vec<T> (&m)[6]) {
    const Vec<T> even = T(-2. / 3) * y[0] - T(1. / 3) * y[2];
    const Vec<T> odd = T(2 * kHalfRoot / 3) * y[1] + T(kHalfRoot / 3) * y[3];
    const Vec<T> far_even = T(1. / 6) * y[0] + T(1. / 3) * y[2];
    const Vec<T> far_odd = T(kRoot / 6) * y[1] + T(kRoot / 3) * y[3];
    m[0] = y[0], m[1] = even - odd, m[2] = even + odd, m[3] = far_even + far_odd, m[4] = far_even - far_odd,
    m[5] = y[3];
  }
  template <class T>
  static FASTNN_INLINE void weight_transposed(const Vec<T> (&u)[6], Vec<T> (&g)[3]) {
    const Vec<T> sum = u[1] + u[2], difference = u[1] - u[2], far_sum = u[3] + u[4], far_difference = u[3] - u[4];
    g[0] = u[0] + (sum + far_sum);
    g[1] = T(kHalfRoot) * difference + T(kRoot) * far_difference;
    g[2] = u[5] + T(0.5) * sum + T(2) * far_sum;
  }
  static constexpr double kHalfRoot = WinogradAxis<2, 3>::kHalfRoot, kRoot = 2 * kHalfRoot;
};

// The same points as for 4 outputs of 3 taps. What those scale in their outputs is scaled in the weights here.
template <>
struct WinogradAxis<2, 5> {
  template <class T>
  static FASTNN_INLINE void input(const Vec<T> (&d)[6], Vec<T> (&v)[6]) {
    WinogradAxis<4, 3>::input<T>(d, v);
  }
  template <class T>
  static FASTNN_INLINE void weight(const Vec<T> (&g)[5], Vec<T> (&u)[6]) {
    const Vec<T> even = T(-2. / 3) * (g[0] + T(0.5) * g[2] + T(0.25) * g[4]);
    const Vec<T> odd = T(-2 * kHalfRoot / 3) * (g[1] + T(0.5) * g[3]);
    const Vec<T> far_even = T(1. / 6) * (g[0] + T(2) * g[2] + T(4) * g[4]);
    const Vec<T> far_odd = T(kRoot / 6) * (g[1] + T(2) * g[3]);
    u[0] = g[0], u[1] = even + odd, u[2] = even - odd, u[3] = far_even + far_odd, u[4] = far_even - far_odd,
    u[5] = g[4];
  }
  template <class T>
  static FASTNN_INLINE void output(const Vec<T> (&m)[6], Vec<T> (&y)[2]) {
    y[0] = m[0] + ((m[1] + m[2]) + (m[3] + m[4]));
    y[1] = m[5] + T(kHalfRoot) * (m[1] - m[2]) + T(kRoot) * (m[3] - m[4]);
  }
  template <class T>
  static FASTNN_INLINE void output_transposed(const Vec<T> (&y)[2], Vec<T> (&m)[6]) {
    const Vec<T> odd = T(kHalfRoot) * y[1], far_odd = T(kRoot) * y[1];
    m[0] = y[0], m[1] = y[0] + odd, m[2] = y[0] - odd, m[3] = y[0] + far_odd, m[4] = y[0] - far_odd, m[5] = y[1];
  }
  template <class T>
  static FASTNN_INLINE void weight_transposed(const Vec<T> (&u)[6], Vec<T> (&g)[5]) {
    const Vec<T> sum = T(-2. / 3) * (u[1] + u[2]), difference = T(-2 * kHalfRoot / 3) * (u[1] - u[2]);
    const Vec<T> far_sum = T(1. / 6) * (u[3] + u[4]), far_difference = T(kRoot / 6) * (u[3] - u[4]);
    g[0] = u[0] + (sum + far_sum);
    g[1] = difference + far_difference;
    g[2] = T(0.5) * sum + T(2) * far_sum;
    g[3] = T(0.5) * difference + T(2) * far_difference;
    g[4] = u[5] + T(0.25) * sum + T(4) * far_sum;
  }
  static constexpr double kHalfRoot = WinogradAxis<2, 3>::kHalfRoot, kRoot = 2 * kHalfRoot;
};

// Transforms both axes: `down` along y, then `along` along x, each from an array of vectors to another. from(y, x)
// loads, to(y, x, value) stores.
template <class T, int from_height, int from_width, int height, int width, class From, class Down, class Along,
          class To>
FASTNN_INLINE void winograd_transform(const From& from, const Down& down, const Along& along, const To& to) {
  Vec<T> rows[height][from_width];
  FASTNN_UNROLL
  for (int x = 0; x < from_width; ++x) {
    Vec<T> column[from_height], result[height];
    FASTNN_UNROLL
    for (int y = 0; y < from_height; ++y) column[y] = from(y, x);
    down(column, result);
    FASTNN_UNROLL
    for (int y = 0; y < height; ++y) rows[y][x] = result[y];
  }
  FASTNN_UNROLL
  for (int y = 0; y < height; ++y) {
    Vec<T> result[width];
    along(rows[y], result);
    FASTNN_UNROLL
    for (int x = 0; x < width; ++x) to(y, x, result[x]);
  }
}

}  // namespace
}  // namespace fastnn::cpu
