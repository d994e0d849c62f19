// How a convolution's matrix products read their tensors: see gemm.cuh. A reader serves one chunk: 16 bytes that lie
// next to each other along its inner index. What is outside - the image, the channels, the sum - reads as zero.
//
//   forward      C (pixels x out)     = A: input at the pixel's taps      B: weight (out x taps)
//   grad_input   C (pixels x in)      = A: gradient of the taps' outputs  B: weight (taps x in)
//   grad_weight  C (out x taps)       = A: gradient (out x pixels)        B: input at the pixel's taps
//
// where a tap is (ky, kx, channel), the channel innermost. Where a row of channels is not a multiple of 16 bytes, or
// memory not aligned to it, chunks are gathered value by value.
#pragma once

#include "cuda/divider.cuh"
#include "cuda/gemm.cuh"

namespace fastnn::cuda {

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
  bool pool, unit_stride;
  struct Dividers {
    Divider in_height, in_width, out_height, out_width, pooled_height, pooled_width;
    Divider kernel_width, group_in, group_out, stride_y, stride_x;
  } by;

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
        pool(s.pool),
        unit_stride(s.stride_height == 1 && s.stride_width == 1),
        by{divider(in_height),     divider(in_width),     divider(out_height),   divider(out_width),
           divider(pooled_height), divider(pooled_width), divider(kernel_width), divider(group_in),
           divider(group_out),     divider(stride_y),     divider(stride_x)} {}

  __host__ __device__ int64_t windows() const { return batch * pooled.count; }
  __host__ __device__ int64_t out_pixels() const { return batch * out.count; }
  __host__ __device__ int64_t in_pixels() const { return batch * in.count; }

 private:
  // Nothing is divided by a size of 0: such a launch has no blocks.
  static Divider divider(int by) { return Divider(std::max(by, 1)); }
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

// The pixel `offset` after the origin. Both are below 2^30 (check_sizes).
__device__ __forceinline__ Pixel pixel_after(const PixelOrigin& origin, uint32_t offset, const Divider& height,
                                             const Divider& width, int64_t batch) {
  uint32_t x = origin.rest + offset, y = width.split(x);
  const int64_t image = origin.image + height.split(y);
  return {image, static_cast<int>(y), static_cast<int>(x), image < batch};
}

__device__ __forceinline__ Pixel out_pixel_after(const Geometry& s, const PixelOrigin& origin, uint32_t offset) {
  return pixel_after(origin, offset, s.by.out_height, s.by.out_width, s.batch);
}

// The output pixel at one of the four places of a pooling window, row by row.
__device__ __forceinline__ Pixel at_place(Pixel window, int place) {
  window.y = 2 * window.y + place / 2, window.x = 2 * window.x + place % 2;
  return window;
}

// Of each 32 rows of a pooled product, rows w, w + 8, w + 16 and w + 24 are the places of one window (see gemm.cuh).
__device__ __forceinline__ Pixel pooled_row(const Geometry& s, int64_t first, int row) {
  const PixelOrigin origin(first / 4, s.pooled);
  const uint32_t window = row / 32 * 8 + row % 8;
  return at_place(pixel_after(origin, window, s.by.pooled_height, s.by.pooled_width, s.batch), row % 32 / 8);
}

// A place of the kernel, dilated, and a channel.
struct Tap {
  int y, x, channel;
};

// Of (tap, channel) number `k`, with so many channels.
__device__ __forceinline__ Tap tap_of(const Geometry& s, uint32_t k, const Divider& channels) {
  uint32_t x = channels.split(k);
  const uint32_t y = s.by.kernel_width.split(x);
  return {static_cast<int>(y * s.dilation_y), static_cast<int>(x * s.dilation_x), static_cast<int>(k)};
}

// Where a value, or a chunk of them, is read; zeros stand for what is not valid, and its address means nothing.
template <class T>
struct Place {
  const T* from;
  bool valid;
};

// A chunk that lies together.
template <class T>
__device__ __forceinline__ void copy_chunk(T* to, const Place<T>& place) {
  copy_async<16>(to, place.from, place.valid);
}

// A chunk of values that lie apart: value e at place(e), so many at a time. 16-bit values are below what asynchronous
// copies move: the thread waits for them.
template <int kTogether, class T, class At>
__device__ __forceinline__ void gather_chunk(T* to, const At& place) {
  constexpr int kStep = kTogether < kChunk<T> ? kTogether : kChunk<T>;
#pragma unroll 1
  for (int first = 0; first < kChunk<T>; first += kStep) {
    Pack<T, kStep> pack;
#pragma unroll
    for (int e = 0; e < kStep; ++e) {
      const Place<T> value = place(first + e);
      if constexpr (sizeof(T) >= 4)
        copy_async<sizeof(T)>(to + first + e, value.from, value.valid);
      else
        pack.values[e] = value.valid ? *value.from : narrow<T>(0);
    }
    if constexpr (sizeof(T) < 4) store_pack(to + first, pack);
  }
}

// A chunk whose value e is at place(e): at once where they lie `together`, else kTogether at a time.
template <int kTogether = 4, class T, class At>
__device__ __forceinline__ void load_chunk(T* to, bool together, const At& place) {
  if (together)
    copy_chunk(to, place(0));
  else
    gather_chunk<kTogether>(to, place);
}

// Weight as (out_channels, taps, group_in).
template <class T>
struct WeightSource {
  const T* weight;
  Geometry s;
  bool chunks;  // may be read 16 bytes at a time

  WeightSource(const T* weight, const Geometry& s)
      : weight(weight), s(s), chunks(s.group_in % kChunk<T> == 0 && aligned_to(16, weight)) {}
};

// Images (batch, height, width, channels): the input, or the gradient of z.
template <class T>
struct ImageSource {
  const T* image;
  Geometry s;
  bool chunks;

  static ImageSource input(const T* input, const Geometry& s) {
    return {input, s, s.group_in % kChunk<T> == 0 && s.in_channels % kChunk<T> == 0 && aligned_to(16, input)};
  }
  static ImageSource gradient(const T* gradient, const Geometry& s) {
    return {gradient, s, s.group_out % kChunk<T> == 0 && s.out_channels % kChunk<T> == 0 && aligned_to(16, gradient)};
  }
};

// Where a channel of pixel (y, x) lies from the image's first value. Of pixels outside, which nobody reads, it may be
// anything: hence unsigned, which does not overflow. A padded image holds less than 2^31 values (check_sizes).
__device__ __forceinline__ int value_offset(unsigned y, unsigned x, int width, int channels, int channel) {
  return static_cast<int>((y * width + x) * channels + channel);
}

// The input at `tap` of the output pixel whose first tap is at (y, x). `image` is the image's first value of the group.
template <class T>
__device__ __forceinline__ Place<T> input_at(const Geometry& s, const T* image, unsigned y, unsigned x,
                                             const Tap& tap) {
  y += tap.y, x += tap.x;
  return {image + value_offset(y, x, s.in_width, s.in_channels, tap.channel),
          y < static_cast<unsigned>(s.in_height) && x < static_cast<unsigned>(s.in_width)};
}

// The gradient at the output whose `tap` touches the input pixel (y, x), padding counted in.
template <class T>
__device__ __forceinline__ Place<T> gradient_at(const Geometry& s, const T* image, unsigned y, unsigned x,
                                                const Tap& tap) {
  y -= tap.y, x -= tap.x;
  bool valid = true;
  if (!s.unit_stride) {
    valid = static_cast<int>(y) >= 0 && static_cast<int>(x) >= 0;
    uint32_t rest_y = valid ? y : 0, rest_x = valid ? x : 0;
    y = s.by.stride_y.split(rest_y), x = s.by.stride_x.split(rest_x);
    valid = valid && rest_y == 0 && rest_x == 0;
  }
  return {image + value_offset(y, x, s.out_width, s.out_channels, tap.channel),
          valid && y < static_cast<unsigned>(s.out_height) && x < static_cast<unsigned>(s.out_width)};
}

// Readers: see Loads. `row` and `column` say where in its tile the thread's first chunk lies.

// Row: an output channel; k: a tap.
template <class T, int kCount, int kStep>
class WeightRows {
 public:
  static constexpr Layout layout = Layout::depth_inner;
  __device__ __forceinline__ WeightRows(const WeightSource<T>& source, int64_t first, int64_t first_k, int group,
                                        int row, int column)
      : chunks_(source.chunks), k_(static_cast<int>(first_k) + column), depth_(source.s.taps * source.s.group_in) {
    rows_ = source.s.group_out - static_cast<int>(first) - row;
    weight_ = source.weight + (group * int64_t{source.s.group_out} + first + row) * depth_;
  }

  __device__ __forceinline__ void load(T* to, int step) {
#pragma unroll
    for (int j = 0; j < kCount; ++j, to += step) {
      const T* row = weight_ + int64_t{j * kStep} * depth_ + k_;
      const auto at = [&](int e) { return Place<T>{row + e, j * kStep < rows_ && k_ + e < depth_}; };
      load_chunk(to, chunks_, at);
    }
    k_ += kDepth<T>;
  }

 private:
  bool chunks_;
  int k_, depth_, rows_;
  const T* weight_;
};

// Column: an input channel; k: (tap, output channel).
template <class T, int kCount, int kStep>
class WeightColumns {
 public:
  static constexpr Layout layout = Layout::depth_outer;
  __device__ __forceinline__ WeightColumns(const WeightSource<T>& source, int64_t first, int64_t first_k, int group,
                                           int row, int column)
      : source_(source), k_(static_cast<int>(first_k) + row), column_(static_cast<int>(first) + column) {
    weight_ = source.weight + group * int64_t{source.s.group_out} * source.s.taps * source.s.group_in + column_;
  }

  __device__ __forceinline__ void load(T* to, int step) {
    const Geometry& s = source_.s;
#pragma unroll
    for (int j = 0; j < kCount; ++j, to += step) {
      uint32_t out = k_ + j * kStep;
      const int tap = static_cast<int>(s.by.group_out.split(out));
      const T* row = weight_ + int64_t{static_cast<int>(out) * s.taps + tap} * s.group_in;
      const auto at = [&](int e) { return Place<T>{row + e, tap < s.taps && column_ + e < s.group_in}; };
      load_chunk(to, source_.chunks, at);
    }
    k_ += kDepth<T>;
  }

 private:
  const WeightSource<T>& source_;
  const T* weight_;
  int k_, column_;
};

// Row: a pixel; k: (tap, channel). Of the input at an output pixel's taps (with pooling, pixels as pooled_row() orders
// them), or of the gradient at the outputs whose taps touch an input pixel.
//
// Where chunks lie together, the thread walks along the channels of a tap, and works out where its pixels have the next
// tap only once it comes to it.
template <class T, int kCount, int kStep, bool kTouching>
class PixelRows {
 public:
  static constexpr Layout layout = Layout::depth_inner;
  __device__ __forceinline__ PixelRows(const ImageSource<T>& source, int64_t first, int64_t first_k, int group, int row,
                                       int column)
      : source_(source),
        k_(static_cast<int>(first_k) + column),
        walks_(source.chunks && (!kTouching || source.s.unit_stride)) {
    const Geometry& s = source.s;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const Pixel p = pixel(s, first, row + j * kStep);
      if constexpr (kTouching) {
        y_[j] = p.y + s.padding_y, x_[j] = p.x + s.padding_x;
        image_[j] = source.image + p.image * s.out.count * s.out_channels + int64_t{group} * s.group_out;
      } else {
        y_[j] = p.y * s.stride_y - s.padding_y, x_[j] = p.x * s.stride_x - s.padding_x;
        image_[j] = source.image + p.image * s.in.count * s.in_channels + int64_t{group} * s.group_in;
      }
      rows_ |= static_cast<unsigned>(p.valid) << j;
      // A walk begins at the pixel, a general read at the image.
      if (walks_) image_[j] += value_offset(y_[j], x_[j], width(s), pitch(s), 0);
    }
    if (!walks_) return;
    uint32_t channel = k_;
    uint32_t tap_x = by_channels(s).split(channel);
    tap_y_ = static_cast<int>(s.by.kernel_width.split(tap_x));
    tap_x_ = static_cast<int>(tap_x), channel_ = static_cast<int>(channel);
    reach_tap(s);
  }

  __device__ __forceinline__ void load(T* to, int step) {
    const Geometry& s = source_.s;
    const int depth = s.taps * channels(s);
    if (walks_) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) copy_async<16>(to + j * step, image_[j] + offset_, valid_ >> j & 1);
      offset_ += kDepth<T>, channel_ += kDepth<T>;
      if (channel_ >= channels(s)) next_tap(s);
      return;
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j, to += step) {
      const auto at = [&](int e) {
        const int k = k_ + e;
        const Tap tap = tap_of(s, k, by_channels(s));
        const Place<T> place =
            kTouching ? gradient_at(s, image_[j], y_[j], x_[j], tap) : input_at(s, image_[j], y_[j], x_[j], tap);
        return Place<T>{place.from, place.valid && (rows_ >> j & 1) && k < depth};
      };
      load_chunk<kTouching ? 2 : 4>(to, source_.chunks || k_ >= depth, at);  // beyond the sum all is zero
    }
    k_ += kDepth<T>;
  }

 private:
  static __device__ __forceinline__ int width(const Geometry& s) { return kTouching ? s.out_width : s.in_width; }
  static __device__ __forceinline__ int height(const Geometry& s) { return kTouching ? s.out_height : s.in_height; }
  static __device__ __forceinline__ int pitch(const Geometry& s) { return kTouching ? s.out_channels : s.in_channels; }
  static __device__ __forceinline__ int channels(const Geometry& s) { return kTouching ? s.group_out : s.group_in; }
  static __device__ __forceinline__ const Divider& by_channels(const Geometry& s) {
    return kTouching ? s.by.group_out : s.by.group_in;
  }
  static __device__ __forceinline__ Pixel pixel(const Geometry& s, int64_t first, int row) {
    if constexpr (kTouching) return pixel_after(PixelOrigin(first, s.in), row, s.by.in_height, s.by.in_width, s.batch);
    return s.pool ? pooled_row(s, first, row) : out_pixel_after(s, PixelOrigin(first, s.out), row);
  }

  __device__ __forceinline__ void next_tap(const Geometry& s) {
    do {
      channel_ -= channels(s);
      if (++tap_x_ == s.kernel_width) tap_x_ = 0, ++tap_y_;
    } while (channel_ >= channels(s));
    reach_tap(s);
  }

  __device__ __forceinline__ void reach_tap(const Geometry& s) {
    const unsigned direction = kTouching ? ~0u : 1u;  // -1 or 1
    const unsigned dy = direction * tap_y_ * s.dilation_y, dx = direction * tap_x_ * s.dilation_x;
    offset_ = value_offset(dy, dx, width(s), pitch(s), channel_);
    valid_ = 0;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const bool inside = y_[j] + dy < static_cast<unsigned>(height(s)) && x_[j] + dx < static_cast<unsigned>(width(s));
      valid_ |= static_cast<unsigned>(inside) << j;
    }
    valid_ &= tap_y_ * s.kernel_width < s.taps ? rows_ : 0;
  }

  const ImageSource<T>& source_;
  int k_;
  bool walks_;
  const T* image_[kCount];
  int y_[kCount], x_[kCount];
  unsigned rows_ = 0;  // a bit for each of the rows that is a pixel
  // A walk: the tap and its channel that come next, how far they are from the pixel, and which rows have the tap
  // inside.
  int tap_y_ = 0, tap_x_ = 0, channel_ = 0, offset_ = 0;
  unsigned valid_ = 0;
};

template <class T, int kCount, int kStep>
using InputRows = PixelRows<T, kCount, kStep, false>;
template <class T, int kCount, int kStep>
using GradientRows = PixelRows<T, kCount, kStep, true>;

// How many pixels follow the first of a sum, as far as it may ask.
__device__ __forceinline__ int pixels_left(const Geometry& s, int64_t first_k) {
  const int64_t left = s.out_pixels() - first_k;
  return left < INT32_MAX ? static_cast<int>(left) : INT32_MAX;
}

// Column: an output channel; k: an output pixel.
template <class T, int kCount, int kStep>
class GradientColumns {
 public:
  static constexpr Layout layout = Layout::depth_outer;
  __device__ __forceinline__ GradientColumns(const ImageSource<T>& source, int64_t first, int64_t first_k, int group,
                                             int row, int column)
      : source_(source), pixels_(pixels_left(source.s, first_k) - row) {
    const Geometry& s = source.s;
    const int at = static_cast<int>(first) + column;
    columns_ = s.group_out - at;
    gradient_ = source.image + (first_k + row) * s.out_channels + int64_t{group} * s.group_out + at;
  }

  __device__ __forceinline__ void load(T* to, int step) {
    const int64_t pitch = source_.s.out_channels;
    const T* row = gradient_;
#pragma unroll
    for (int j = 0; j < kCount; ++j, to += step, row += kStep * pitch) {
      const auto at = [&](int e) { return Place<T>{row + e, j * kStep < pixels_ && e < columns_}; };
      load_chunk(to, source_.chunks, at);
    }
    gradient_ += kDepth<T> * pitch, pixels_ -= kDepth<T>;
  }

 private:
  const ImageSource<T>& source_;
  const T* gradient_;
  int pixels_, columns_;
};

// Column: a tap; k: an output pixel. The thread walks from each of its pixels to the next, kStep further.
template <class T, int kCount, int kStep>
class InputColumns {
 public:
  static constexpr Layout layout = Layout::depth_outer;
  __device__ __forceinline__ InputColumns(const ImageSource<T>& source, int64_t first, int64_t first_k, int group,
                                          int row, int column)
      : source_(source),
        column_(static_cast<int>(first) + column),
        depth_(source.s.taps * source.s.group_in),
        pixels_(pixels_left(source.s, first_k) - row),
        tap_(tap_of(source.s, column_, source.s.by.group_in)) {
    const Geometry& s = source.s;
    const Pixel p = out_pixel_after(s, PixelOrigin(first_k, s.out), row);
    image_ = source.image + p.image * image_size(s) + int64_t{group} * s.group_in;
    y_ = p.y, x_ = p.x;
    uint32_t x = kStep, y = s.by.out_width.split(x);
    step_images_ = static_cast<int>(s.by.out_height.split(y)) * image_size(s);
    step_y_ = static_cast<int>(y), step_x_ = static_cast<int>(x);
    together_ = source.chunks && column_ + kChunk<T> <= depth_;
  }

  __device__ __forceinline__ void load(T* to, int step) {
    if (column_ >= depth_) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) copy_async<16>(to + j * step, image_, false);
      return;
    }
    const Geometry& s = source_.s;
#pragma unroll
    for (int j = 0; j < kCount; ++j, to += step, next_pixel(s)) {
      const int y0 = y_ * s.stride_y - s.padding_y, x0 = x_ * s.stride_x - s.padding_x;
      const bool valid = j * kStep < pixels_;
      if (together_) {
        const Place<T> place = input_at(s, image_, y0, x0, tap_);
        copy_chunk(to, Place<T>{place.from, place.valid && valid});
        continue;
      }
      gather_chunk<4>(to, [&](int e) {
        const Place<T> place = input_at(s, image_, y0, x0, tap_of(s, column_ + e, s.by.group_in));
        return Place<T>{place.from, place.valid && valid && column_ + e < depth_};
      });
    }
    pixels_ -= kDepth<T>;
  }

 private:
  static __device__ __forceinline__ int64_t image_size(const Geometry& s) { return s.in.count * s.in_channels; }

  __device__ __forceinline__ void next_pixel(const Geometry& s) {
    x_ += step_x_, y_ += step_y_, image_ += step_images_;
    if (x_ >= s.out_width) x_ -= s.out_width, ++y_;
    if (y_ >= s.out_height) y_ -= s.out_height, image_ += image_size(s);
  }

  const ImageSource<T>& source_;
  const T* image_;
  int column_, depth_, pixels_, y_, x_;
  int step_y_, step_x_;
  int64_t step_images_;
  bool together_;
  Tap tap_;
};

}  // namespace fastnn::cuda
