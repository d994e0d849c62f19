// Convolution in narrow groups, forward and the gradient of its input: the tiles of conv2d_grouped_tile.inl.h over
// images and rows, and their weights.
#pragma once

#include "cpu/kernels/conv2d_grouped_tile.inl.h"

namespace fastnn::cpu {
namespace {

// Rows of the output in one task: few enough that eight threads share the work evenly.
inline int64_t grouped_rows_per_task(int64_t images, int64_t height) {
  const int64_t rows = images * height / 32;
  return rows < 1 ? 1 : rows > height ? height : rows;
}

// Whether to stream an output of so many pixels an image, where tiles have whole lines.
template <class T>
bool grouped_streams(const Conv2dShape& s, const T* output, int64_t pixels) {
  return worth_streaming(output, s.batch * pixels * s.in_channels, s.in_channels);
}

// Lines from one address to another, of the kAliasLines after which a load may take a store for its own: by 4 KiB, and
// pixels of a tile may lie a part of that apart. A load one or two lines on from what was just streamed waits until
// that is in memory, four times as long as a tile takes. So weights lie half of this away from the output, and tiles go
// backwards over the channels where the source lies one or two lines before it.
constexpr int64_t kAliasLines = 16;
inline int64_t alias_lines(const void* from, const void* to) {
  return static_cast<int64_t>((reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from)) / kLineBytes) %
         kAliasLines;
}
inline bool goes_backwards(const void* source, const void* output) {
  const int64_t lines = alias_lines(source, output);
  return lines == 1 || lines == 2;
}
template <class T>
T* away_from(const T* output, T* scratch) {
  const int64_t lines = (alias_lines(scratch, output) + kAliasLines / 2) % kAliasLines;
  return scratch + lines * kLineBytes / static_cast<int64_t>(sizeof(T));
}

// Weights, with room for away_from().
template <class T>
int64_t grouped_weight_elements(const Conv2dShape& s) {
  return weight_elements(s) + kAliasLines * kLineBytes / static_cast<int64_t>(sizeof(T));
}

// As WeightSteps, of weights [channel][...] as they were given, whose channels come side by side.
inline WeightSteps given_steps(const Conv2dShape& s) {
  const int64_t members = group_inputs(s), taps = kernel_taps(s);
  return is_ohwi(s) ? WeightSteps{members, 1} : WeightSteps{1, taps};
}

inline WeightSteps times(WeightSteps steps, int64_t factor) { return {steps.place * factor, steps.member * factor}; }

// [channel][weights of an output] to [weight of an output][channel]
template <class T>
void pack_grouped_forward(const Conv2dShape& s, const T* weight, T* packed) {
  constexpr int64_t kShare = 8 << 10;  // elements worth another thread
  const int64_t channels = s.out_channels, weights = group_inputs(s) * kernel_taps(s);
  const int64_t grain = (kShare / weights / kLanes<T> + 1) * kLanes<T>;
  parallel_ranges(channels, grain, [&](int64_t begin, int64_t end) {
    transpose_matrix(weight + begin * weights, weights, end - begin, weights, packed + begin, channels);
  });
}

// OHWI to [kernel place][member of the output's group][input channel]
template <class T>
void pack_grouped_gradient(const Conv2dShape& s, const T* ohwi, T* packed) {
  if (group_inputs(s) == 1) return pack_grouped_forward(s, ohwi, packed);
  const auto pack = [&](auto constant) {
    constexpr int64_t members = decltype(constant)::value;
    const int64_t taps = kernel_taps(s), channels = s.in_channels;
    parallel_for(taps, [&](int64_t tap) {
      for (int64_t o = 0; o < channels; ++o)
        copy_run(ohwi + (o * taps + tap) * members, members,
                 packed + (tap * members + o % members) * channels + o / members * members);
    });
  };
  switch (group_inputs(s)) {
    case 2: return pack(Constant<2>{});
    case 4: return pack(Constant<4>{});
    case 8: return pack(Constant<8>{});
    default: return pack(Constant<16>{});
  }
}

template <class T>
void grouped_forward(const Conv2dShape& s, const Conv2dForward<T>& t) {
  if (s.out_width == 0) return;
  const Scratch<T> scratch(grouped_weight_elements<T>(s));
  T* const weight = away_from<T>(t.output, scratch);
  pack_grouped_forward<T>(s, t.weight, weight);
  const WeightSteps steps = times(given_steps(s), s.out_channels);
  const TapAxis vertical = forward_taps(vertical_axis(s));
  const TapAxis horizontal = forward_taps(horizontal_axis(s));
  const bool stream = grouped_streams(s, t.output, s.out_height * s.out_width);
  const bool backwards = stream && goes_backwards(t.input, t.output);
  const bool fetch = worth_fetching<T>(s.batch * s.in_height * s.in_width * s.in_channels);
  const int64_t block = grouped_rows_per_task(s.batch, s.out_height), blocks = (s.out_height + block - 1) / block;
  parallel_tasks(s.batch * blocks, [&](int64_t task, int) {
    const int64_t image = task / blocks, first = task % blocks * block;
    const int64_t end = first + block < s.out_height ? first + block : s.out_height;
    const int64_t source_row = s.in_width * s.in_channels, out_row = s.out_width * s.in_channels;
    GroupedRow<T> row{{t.input + image * s.in_height * source_row, s.in_height, s.in_width, source_row, s.in_channels},
                      vertical,
                      horizontal,
                      0,
                      s.stride_width,
                      s.out_width,
                      s.in_channels,
                      group_inputs(s),
                      stream,
                      backwards};
    const int64_t run = fetch ? 1 : end - first;
    for (int64_t y = first; y < end; y += run) {
      row.source_row = y * s.stride_height;
      if (fetch) row.next_source = next_rows(row, s.stride_height);
      T* out = t.output + (image * s.out_height + y) * out_row;
      for_each_part(row, [&](const GroupedRow<T>& part, int64_t pixel, int64_t pixel_step) {
        with_taps(part, [&](auto width, auto step, auto depthwise) {
          grouped_pixels<T, decltype(width)::value, decltype(step)::value, decltype(depthwise)::value>(
              part, run, s.stride_height, weight, steps, s.kernel_width, t.bias, s.relu,
              {out + pixel * s.in_channels, pixel_step * s.in_channels, out_row});
        });
      });
    }
    if (stream) finish_streaming();
  });
}

template <class T>
void grouped_grad_input(const Conv2dShape& s, const T* grad, const T* ohwi, T* grad_input) {
  if (s.in_width == 0) return;
  const int64_t members = group_inputs(s);
  const Scratch<T> scratch(grouped_weight_elements<T>(s));
  T* const weight = away_from<T>(grad_input, scratch);
  pack_grouped_gradient<T>(s, ohwi, weight);
  const WeightSteps steps{members * s.in_channels, s.in_channels};
  const bool stream = grouped_streams(s, grad_input, s.in_height * s.in_width);
  const bool backwards = stream && goes_backwards(grad, grad_input);
  const bool fetch = worth_fetching<T>(s.batch * s.out_height * s.out_width * s.in_channels);
  const int64_t block = grouped_rows_per_task(s.batch, s.in_height), blocks = (s.in_height + block - 1) / block;
  parallel_tasks(s.batch * blocks, [&](int64_t task, int) {
    const int64_t image = task / blocks, first = task % blocks * block;
    const int64_t end = first + block < s.in_height ? first + block : s.in_height;
    const int64_t source_row = s.out_width * s.out_channels;
    const Image<T> source{grad + image * s.out_height * source_row, s.out_height, s.out_width, source_row,
                          s.out_channels};
    const int64_t run = s.stride_height == 1 && !fetch ? end - first : 1;  // rows that read through the same taps
    for (int64_t y = first; y < end; y += run) {
      const TapAxis vertical = phase_taps(vertical_axis(s), y % s.stride_height);
      T* out = grad_input + (image * s.in_height + y) * s.in_width * s.in_channels;
      for (int64_t phase = 0; phase < s.stride_width && phase < s.in_width; ++phase) {
        GroupedRow<T> row{source,
                          vertical,
                          phase_taps(horizontal_axis(s), phase),
                          y / s.stride_height,
                          1,
                          (s.in_width - phase + s.stride_width - 1) / s.stride_width,
                          s.in_channels,
                          members,
                          stream,
                          backwards};
        if (fetch && phase == 0 && y % s.stride_height == 0) row.next_source = next_rows(row, 1);
        for_each_part(row, [&](const GroupedRow<T>& part, int64_t pixel, int64_t pixel_step) {
          with_taps(part, [&](auto width, auto step, auto depthwise) {
            grouped_pixels<T, decltype(width)::value, decltype(step)::value, decltype(depthwise)::value>(
                part, run, 1, weight, steps, s.kernel_width, nullptr, false,
                {out + (phase + pixel * s.stride_width) * s.in_channels, pixel_step * s.stride_width * s.in_channels,
                 s.in_width * s.in_channels});
          });
        });
      }
    }
    if (stream) finish_streaming();
  });
}

}  // namespace
}  // namespace fastnn::cpu
