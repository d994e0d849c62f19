// How a convolution's matrix products read its tensors: see gemm.cuh. A reader serves one chunk: 16 bytes that lie next
// to each other along its inner index. What is outside - the image, the channels, the sum - reads as zero.
//
//   forward      C (pixels x out)     = A: input at the pixel's taps      B: weight (out x taps)
//   grad_input   C (pixels x in)      = A: gradient of the taps' outputs  B: weight (taps x in)
//   grad_weight  C (out x taps + 1)   = A: gradient (out x pixels)        B: input at the pixel's taps, and 1
//
// where a tap is (ky, kx, channel), the channel innermost. Where a row of channels is not a multiple of 16 bytes, or
// memory not aligned to it, chunks are gathered value by value.
#pragma once

#include "cuda/gemm.cuh"

namespace fastnn::cuda {

struct Quotient {
  int quotient, remainder;
};

__device__ __forceinline__ Quotient divide(uint32_t x, int by) {
  const uint32_t quotient = x / static_cast<uint32_t>(by);
  return {static_cast<int>(quotient), static_cast<int>(x - quotient * static_cast<uint32_t>(by))};
}

// How many pixels an image has, and the inverse of that: 64-bit division is a call of a hundred instructions.
struct ImagePixels {
  int64_t count;
  double inverse;
  explicit ImagePixels(int64_t count) : count(count), inverse(1.0 / static_cast<double>(count)) {}
};

// A Conv2dShape in the widths that addresses are computed in.
struct Geometry {
  int64_t batch;
  int in_channels, in_height, in_width;
  int out_channels, out_height, out_width;
  int kernel_width, taps;  // of the kernel: height * width
  int stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int group_in, group_out;  // channels of a group
  int pooled_height, pooled_width;
  ImagePixels in, out, pooled;
  bool pool;

  explicit Geometry(const Conv2dShape& s)
      : batch(s.batch),
        in_channels(s.in_channels),
        in_height(s.in_height),
        in_width(s.in_width),
        out_channels(s.out_channels),
        out_height(s.out_height),
        out_width(s.out_width),
        kernel_width(s.kernel_width),
        taps(s.kernel_height * s.kernel_width),
        stride_y(s.stride_height),
        stride_x(s.stride_width),
        padding_y(s.padding_height),
        padding_x(s.padding_width),
        dilation_y(s.dilation_height),
        dilation_x(s.dilation_width),
        group_in(s.in_channels / s.groups),
        group_out(s.out_channels / s.groups),
        pooled_height(s.out_height / 2),
        pooled_width(s.out_width / 2),
        in(s.in_height * s.in_width),
        out(s.out_height * s.out_width),
        pooled((s.out_height / 2) * (s.out_width / 2)),
        pool(s.pool) {}

  __host__ __device__ int64_t windows() const { return batch * pooled.count; }
  __host__ __device__ int64_t out_pixels() const { return batch * out.count; }
  __host__ __device__ int64_t in_pixels() const { return batch * in.count; }
};

struct Pixel {
  int64_t image;
  int y, x;
  bool valid;
};

// Where a block begins among the pixels of all images.
struct PixelOrigin {
  int64_t image;
  uint32_t rest;

  // first < 2^53, so that the quotient is off by one at most.
  __device__ __forceinline__ PixelOrigin(int64_t first, const ImagePixels& pixels)
      : image(static_cast<int64_t>(static_cast<double>(first) * pixels.inverse)) {
    int64_t remainder = first - image * pixels.count;
    if (remainder < 0) --image, remainder += pixels.count;
    if (remainder >= pixels.count) ++image, remainder -= pixels.count;
    rest = static_cast<uint32_t>(remainder);
  }
};

// The pixel `offset` after the origin.
__device__ __forceinline__ Pixel pixel_after(const PixelOrigin& origin, uint32_t offset, int height, int width,
                                             int64_t batch) {
  const Quotient row = divide(origin.rest + offset, width), image = divide(row.quotient, height);
  const int64_t n = origin.image + image.quotient;
  return {n, image.remainder, row.remainder, n < batch};
}

// Of each 32 rows of a pooled product, rows w, w + 8, w + 16 and w + 24 are the places of one window (see gemm.cuh).
__device__ __forceinline__ Pixel pooled_row(const Geometry& s, int64_t first, int row) {
  const PixelOrigin origin(first / 4, s.pooled);
  Pixel p = pixel_after(origin, row / 32 * 8 + row % 8, s.pooled_height, s.pooled_width, s.batch);
  const int place = row % 32 / 8;
  p.y = 2 * p.y + place / 2, p.x = 2 * p.x + place % 2;
  return p;
}

// Output pixels as a sum over them counts: with pooling, window by window, place by place. `first` is a multiple of 4.
__device__ __forceinline__ PixelOrigin summed_origin(const Geometry& s, int64_t first) {
  return s.pool ? PixelOrigin(first / 4, s.pooled) : PixelOrigin(first, s.out);
}

__device__ __forceinline__ Pixel summed_pixel(const Geometry& s, const PixelOrigin& origin, int k) {
  if (!s.pool) return pixel_after(origin, k, s.out_height, s.out_width, s.batch);
  Pixel p = pixel_after(origin, k / 4, s.pooled_height, s.pooled_width, s.batch);
  p.y = 2 * p.y + k % 4 / 2, p.x = 2 * p.x + k % 2;
  return p;
}

struct Tap {
  int y, x, channel;
};

__device__ __forceinline__ Tap tap_of(const Geometry& s, int k, int channels) {
  const Quotient tap = divide(k, channels), row = divide(tap.quotient, s.kernel_width);
  return {row.quotient, row.remainder, tap.remainder};
}

// A chunk of values that come from value(e), e = 0, 1, ...: one by one, since there may be much code behind each.
template <class T, class Value>
__device__ __forceinline__ void store_each_value(T* to, const Value& value) {
#pragma unroll 1
  for (int e = 0; e < kChunk<T>; ++e) to[e] = value(e);
}

// Weight as (out_channels, taps, group_in).
template <class T>
struct WeightSource {
  const T* weight;
  Geometry s;
  bool chunks;  // may be read 16 bytes at a time

  WeightSource(const T* weight, const Geometry& s)
      : weight(weight), s(s), chunks(s.group_in % kChunk<T> == 0 && aligned_to(16, weight)) {}
  __device__ __forceinline__ int depth() const { return s.taps * s.group_in; }
};

// A reader is made for `first`, the block's first row or column, and `fixed`, the thread's after it; `first_k` is where
// its sum begins, and load() takes k after that.

// Row: an output channel; k: a tap.
template <class T>
class WeightRows {
 public:
  static constexpr Layout layout = Layout::depth_inner;
  __device__ __forceinline__ WeightRows(const WeightSource<T>& source, int64_t first, int64_t first_k, int fixed,
                                        int group)
      : source_(source),
        row_(source.weight + (group * int64_t{source.s.group_out} + first + fixed) * source.depth() + first_k),
        depth_(first + fixed < source.s.group_out ? source.depth() - static_cast<int>(first_k) : 0) {}

  __device__ __forceinline__ void load(T* to, int k) const {
    if (source_.chunks)
      copy_async16(to, row_ + k, k < depth_);
    else
      store_each_value(to, [&](int e) { return k + e < depth_ ? row_[k + e] : narrow<T>(0); });
  }

 private:
  const WeightSource<T>& source_;
  const T* row_;
  int depth_;  // from first_k on
};

// Column: an input channel; k: (tap, output channel).
template <class T>
class WeightColumns {
 public:
  static constexpr Layout layout = Layout::depth_outer;
  __device__ __forceinline__ WeightColumns(const WeightSource<T>& source, int64_t first, int64_t first_k, int fixed,
                                           int group)
      : source_(source), first_k_(static_cast<int>(first_k)), column_(static_cast<int>(first) + fixed), group_(group) {}

  __device__ __forceinline__ void load(T* to, int k) const {
    const Geometry& s = source_.s;
    const Quotient tap = divide(first_k_ + k, s.group_out);
    const bool valid = tap.quotient < s.taps;
    const T* row = source_.weight +
                   ((group_ * int64_t{s.group_out} + tap.remainder) * s.taps + tap.quotient) * s.group_in + column_;
    if (source_.chunks)
      copy_async16(to, row, valid && column_ < s.group_in);
    else
      store_each_value(to, [&](int e) { return valid && column_ + e < s.group_in ? row[e] : narrow<T>(0); });
  }

 private:
  const WeightSource<T>& source_;
  int first_k_, column_, group_;
};

template <class T>
struct InputSource {
  const T* input;
  Geometry s;
  bool chunks;

  InputSource(const T* input, const Geometry& s)
      : input(input),
        s(s),
        chunks(s.group_in % kChunk<T> == 0 && s.in_channels % kChunk<T> == 0 && aligned_to(16, input)) {}

  // The value that output pixel `p` multiplies with `tap`, or null outside the image.
  __device__ __forceinline__ const T* at(const Pixel& p, const Tap& tap, int group) const {
    const int y = p.y * s.stride_y - s.padding_y + tap.y * s.dilation_y;
    const int x = p.x * s.stride_x - s.padding_x + tap.x * s.dilation_x;
    if (!p.valid || y < 0 || y >= s.in_height || x < 0 || x >= s.in_width) return nullptr;
    return input + ((p.image * s.in_height + y) * s.in_width + x) * s.in_channels + group * s.group_in + tap.channel;
  }

  // The chunk of taps k, k + 1, ... of pixel p.
  __device__ __forceinline__ void load(T* to, const Pixel& p, int k, int group) const {
    const int depth = s.taps * s.group_in;
    if (chunks) {
      const T* from = k < depth ? at(p, tap_of(s, k, s.group_in), group) : nullptr;
      copy_async16(to, from ? from : input, from != nullptr);
    } else {
      store_each_value(to, [&](int e) {
        const T* from = k + e < depth ? at(p, tap_of(s, k + e, s.group_in), group) : nullptr;
        return from ? *from : narrow<T>(0);
      });
    }
  }
};

// After the last tap comes a 1, then zeros.
template <class T>
struct InputAndOne : InputSource<T> {
  using InputSource<T>::InputSource;

  __device__ __forceinline__ void load(T* to, const Pixel& p, int k, int group) const {
    const Geometry& s = this->s;
    const int depth = s.taps * s.group_in;
    if (k + kChunk<T> <= depth) return InputSource<T>::load(to, p, k, group);
    store_each_value(to, [&](int e) {
      const T* from = k + e < depth ? this->at(p, tap_of(s, k + e, s.group_in), group) : nullptr;
      return from ? *from : narrow<T>(k + e == depth ? 1 : 0);
    });
  }
};

// Row: an output pixel (with pooling, as pooled_row() orders them); k: a tap.
template <class T>
class InputRows {
 public:
  static constexpr Layout layout = Layout::depth_inner;
  __device__ __forceinline__ InputRows(const InputSource<T>& source, int64_t first, int64_t first_k, int fixed,
                                       int group)
      : source_(source), first_k_(static_cast<int>(first_k)), group_(group), pixel_(pixel(source.s, first, fixed)) {}
  __device__ __forceinline__ void load(T* to, int k) const { source_.load(to, pixel_, first_k_ + k, group_); }

 private:
  static __device__ __forceinline__ Pixel pixel(const Geometry& s, int64_t first, int fixed) {
    if (s.pool) return pooled_row(s, first, fixed);
    return pixel_after(PixelOrigin(first, s.out), fixed, s.out_height, s.out_width, s.batch);
  }

  const InputSource<T>& source_;
  int first_k_, group_;
  Pixel pixel_;
};

// The gradient of z, which is not stored: grad_output where ReLU and pooling let it through.
template <class T>
struct GradientSource {
  const T* grad_output;
  const T* output;        // undoes a ReLU, or null
  const uint8_t* winner;  // undoes pooling, or null
  Geometry s;
  bool chunks;

  GradientSource(const Conv2dBackward<T>& b, const Geometry& s, bool relu)
      : grad_output(b.grad_output),
        output(relu && !s.pool ? b.output : nullptr),
        winner(s.pool ? b.winner : nullptr),
        s(s),
        chunks(s.group_out % kChunk<T> == 0 && s.out_channels % kChunk<T> == 0 &&
               aligned_to(16, b.grad_output, output)) {}

  // Of one channel of the group at output pixel `p`.
  __device__ __forceinline__ T value(Pixel p, int channel, int group) const {
    const int place = to_stored(p);
    if (!p.valid || channel >= s.group_out) return narrow<T>(0);
    const int64_t at = offset(p, channel, group);
    if (winner ? winner[at] != place : output && widen(output[at]) <= 0) return narrow<T>(0);
    return grad_output[at];
  }

  // Of channels `channel`, channel + 1, ...
  __device__ __forceinline__ void load(T* to, Pixel p, int channel, int group) const {
    if (!chunks) {
      store_each_value(to, [&](int e) { return value(p, channel + e, group); });
      return;
    }
    const int place = to_stored(p);
    const bool valid = p.valid && channel < s.group_out;
    const int64_t at = valid ? offset(p, channel, group) : 0;
    if (!output && !winner) {
      copy_async16(to, grad_output + at, valid);
      return;
    }
    Pack<T, kChunk<T>> grads{}, outputs{};
    if (valid) {
      grads = load_pack<T, kChunk<T>>(grad_output + at);
      if (output) outputs = load_pack<T, kChunk<T>>(output + at);
    }
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e)
      if (valid && (winner ? winner[at + e] != place : widen(outputs.values[e]) <= 0)) grads.values[e] = narrow<T>(0);
    store_pack(to, grads);
  }

 private:
  // Turns `p` into the pixel that is stored and returns its place in the pooling window.
  __device__ __forceinline__ int to_stored(Pixel& p) const {
    if (!winner) return 0;
    const int place = p.y % 2 * 2 + p.x % 2;
    p.y /= 2, p.x /= 2;
    p.valid = p.valid && p.y < s.pooled_height && p.x < s.pooled_width;
    return place;
  }
  __device__ __forceinline__ int64_t offset(const Pixel& p, int channel, int group) const {
    const int height = winner ? s.pooled_height : s.out_height, width = winner ? s.pooled_width : s.out_width;
    return ((p.image * height + p.y) * width + p.x) * s.out_channels + group * s.group_out + channel;
  }
};

// The output pixel whose `tap` touches input pixel `p`.
__device__ __forceinline__ Pixel touched_output(const Geometry& s, const Pixel& p, const Tap& tap) {
  const int y = p.y + s.padding_y - tap.y * s.dilation_y, x = p.x + s.padding_x - tap.x * s.dilation_x;
  Pixel out{p.image, y / s.stride_y, x / s.stride_x, p.valid};
  out.valid = p.valid && y >= 0 && x >= 0 && out.y * s.stride_y == y && out.x * s.stride_x == x &&
              tap.y * s.kernel_width + tap.x < s.taps && out.y < s.out_height && out.x < s.out_width;
  return out;
}

// Row: an input pixel; k: (tap, output channel), at the output that this tap of it touches the pixel.
template <class T>
class GradientRows {
 public:
  static constexpr Layout layout = Layout::depth_inner;
  __device__ __forceinline__ GradientRows(const GradientSource<T>& source, int64_t first, int64_t first_k, int fixed,
                                          int group)
      : source_(source),
        first_k_(static_cast<int>(first_k)),
        group_(group),
        pixel_(pixel_after(PixelOrigin(first, source.s.in), fixed, source.s.in_height, source.s.in_width,
                           source.s.batch)) {}

  __device__ __forceinline__ void load(T* to, int k) const {
    const Geometry& s = source_.s;
    if (source_.chunks) {
      const Tap tap = tap_of(s, first_k_ + k, s.group_out);
      source_.load(to, touched_output(s, pixel_, tap), tap.channel, group_);
    } else {
      store_each_value(to, [&](int e) {
        const Tap tap = tap_of(s, first_k_ + k + e, s.group_out);
        return source_.value(touched_output(s, pixel_, tap), tap.channel, group_);
      });
    }
  }

 private:
  const GradientSource<T>& source_;
  int first_k_, group_;
  Pixel pixel_;
};

// Column: a tap of InputAndOne, or an output channel of GradientSource; k: an output pixel.
template <class T, template <class> class Source>
class SummedPixels {
 public:
  static constexpr Layout layout = Layout::depth_outer;
  __device__ __forceinline__ SummedPixels(const Source<T>& source, int64_t first, int64_t first_k, int fixed, int group)
      : source_(source),
        origin_(summed_origin(source.s, first_k)),
        column_(static_cast<int>(first) + fixed),
        group_(group) {}
  __device__ __forceinline__ void load(T* to, int k) const {
    source_.load(to, summed_pixel(source_.s, origin_, k), column_, group_);
  }

 private:
  const Source<T>& source_;
  PixelOrigin origin_;
  int column_, group_;
};

}  // namespace fastnn::cuda
