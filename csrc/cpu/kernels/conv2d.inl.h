// conv2d (ops/conv2d.h): which kernel serves which geometry.
//
//   all                   depthwise, and grouped where groups are narrow
//   forward, grad_input   winograd for 3x3 and 5x5 of stride 1 with channels enough, else the gather, whose columns are
//                         dot products where they are few
//   forward               winograd along rows for 3x3 of stride 1 with few channels
//   grad_input            scatter where a weight is not finite
//   grad_weight           winograd for 3x3 and 5x5 of stride 1 with channels enough, packed for a vector of input
//                         channels and more - direct where packing would not pay -, else outer products, also where
//                         the output channels fill vectors better
//
// The input gradient of stride s is s * s gathers, one per phase: input pixel (s * q + phase) receives
// grad[q + (phase + padding - ky * dilation) / s] through each tap ky for which that division is exact.
#pragma once

#include "cpu/kernels/conv2d_gather.inl.h"
#include "cpu/kernels/conv2d_grad_weight.inl.h"
#include "cpu/kernels/conv2d_grad_weight_packed.inl.h"
#include "cpu/kernels/conv2d_grad_weight_winograd.inl.h"
#include "cpu/kernels/conv2d_grouped.inl.h"
#include "cpu/kernels/conv2d_grouped_grad_weight.inl.h"
#include "cpu/kernels/conv2d_lookup_grad_weight.inl.h"
#include "cpu/kernels/conv2d_pack.inl.h"
#include "cpu/kernels/conv2d_scatter.inl.h"
#include "cpu/kernels/conv2d_sparse_grad_input.inl.h"
#include "cpu/kernels/conv2d_sparse_grad_weight.inl.h"
#include "cpu/kernels/conv2d_winograd.inl.h"
#include "cpu/kernels/conv2d_winograd_row.inl.h"
#include "cpu/kernels/sums.inl.h"

namespace fastnn::cpu {
namespace {

// Groups of as many channels out as in, and so few that a vector holds several - or one, of as many registers as its
// permutations want; but not where Winograd serves.
template <class T>
inline bool has_narrow_groups(const Conv2dShape& s) {
  const int64_t members = group_inputs(s), most = kVectorRegisters == 32 ? kLanes<T> : kLanes<T> - 1;
  if (s.groups == 1 || s.in_channels != s.out_channels || members == 0) return false;
  if (members == 1) return true;
  if (kHasWinograd<T> && dense_square_taps(s) != 0 && members >= kWinogradChannels) return false;
  return kPermutesLanes && members <= most && kLanes<T> % members == 0;
}

template <class T>
inline Conv2dShape as_computed(const Conv2dShape& as_given) {
  return has_narrow_groups<T>(as_given) ? as_given : with_pixels_as_rows(as_given);
}

inline const char* grouped_name(const Conv2dShape& s) { return group_inputs(s) == 1 ? "depthwise" : "grouped"; }

inline int64_t multiply_adds(const Conv2dShape& s) { return s.batch * s.out_height * s.out_width * weight_elements(s); }

// Whether groups are computed side by side, each on one thread, instead of one after the other on all threads. They
// share well, nothing waits, and a weight's gradient needs fewer sums. But where a group is much work, each thread
// reads parts of all pixels then, instead of some pixels.
inline bool groups_side_by_side(const Conv2dShape& s) { return s.groups >= 4 * max_threads(); }
inline bool small_groups_side_by_side(const Conv2dShape& s) {
  constexpr int64_t kMultiplyAdds = 1 << 25;  // of a group
  return groups_side_by_side(s) && multiply_adds(s) / s.groups < kMultiplyAdds;
}

// body(group) for every group.
template <class Body>
inline void for_each_group(int64_t groups, bool side_by_side, const Body& body) {
  if (side_by_side) return parallel_for(groups, body);
  for (int64_t group = 0; group < groups; ++group) body(group);
}

// The same; returns what body returns for the last group, the name of the kernel that is put on record.
template <class Body>
inline const char* kernel_of_groups(int64_t groups, bool side_by_side, const Body& body) {
  const char* last = nullptr;
  for_each_group(groups, side_by_side, [&](int64_t group) {
    const char* name = body(group);
    if (group == groups - 1) last = name;
  });
  return last;
}

// Convolves one group as chosen; returns the kernel's name. Where a weight is not finite, only `always`, else the name
// is null.
template <class T, class Products = FullProducts<T>>
const char* winograd(const GatherConv<T>& conv, const WinogradKernels<T>& kernels, WinogradChoice choice, bool always) {
  bool finite = true;
  const auto with_tiles_of_2 = [&](auto f) -> const char* {
    using F = decltype(f);
    if (finite || always) winograd_conv<T, Products, F>(conv, kernels, always, &finite);
    return finite || always ? Products::template kName<F> : nullptr;
  };
  if constexpr (Products::kMostPoints == 6) {
    if (choice.taps == 5) return with_tiles_of_2(Winograd<2, 5>{});
    if (choice.tile == 4 && winograd_conv<T, Products, Winograd<4, 3>>(conv, kernels, false, &finite))
      return Products::template kName<Winograd<4, 3>>;
  }
  return with_tiles_of_2(Winograd<2, 3>{});
}

// The forward pass of all groups; `tap_places` hold two numbers for each tap.
template <class T>
GatherConv<T> forward_conv(const Conv2dShape& s, const Conv2dForward<T>& t, int64_t* tap_places) {
  const int64_t taps = kernel_taps(s);
  int64_t* tap_y = tap_places;
  int64_t* tap_x = tap_y + taps;
  list_taps(forward_taps(vertical_axis(s)), forward_taps(horizontal_axis(s)), tap_y, tap_x);
  const int64_t stored_height = s.pool ? s.out_height / 2 : s.out_height;
  const int64_t stored_width = s.pool ? s.out_width / 2 : s.out_width;
  return {
      .batch = s.batch,
      .out_height = s.out_height,
      .out_width = s.out_width,
      .step_y = s.stride_height,
      .step_x = s.stride_width,
      .taps = {taps, tap_y, tap_x},
      .groups = s.groups,
      .depth = group_inputs(s),
      .columns = group_outputs(s),
      .source = t.input,
      .source_height = s.in_height,
      .source_width = s.in_width,
      .source_image_stride = s.in_height * s.in_width * s.in_channels,
      .source_row_stride = s.in_width * s.in_channels,
      .source_pixel_stride = s.in_channels,
      .dots = false,
      .panels = nullptr,
      .bias = t.bias,
      .relu = s.relu,
      .out = t.output,
      .out_image_stride = stored_height * stored_width * s.out_channels,
      .out_row_stride = stored_width * s.out_channels,
      .out_pixel_stride = s.out_channels,
      .stream =
          !s.pool && worth_streaming(t.output, s.batch * s.out_height * s.out_width * s.out_channels, group_outputs(s)),
      .pool = s.pool,
      .winner = t.winner,
  };
}

// Computes it by Winograd where that serves, else returns false.
template <class T, class Products>
bool winograd_forward(const Conv2dShape& s, const Conv2dForward<T>& t, const GatherConv<T>& all_groups) {
  const WinogradChoice choice = winograd_choice<T, Products>(all_groups);
  if (choice.tile == 0) return false;
  const OhwiWeight<T> weight(s, t.weight);
  const int64_t inputs = group_inputs(s), kernel = kernel_taps(s) * inputs;
  const char* variant = kernel_of_groups(s.groups, small_groups_side_by_side(s), [&](int64_t group) {
    const WinogradKernels<T> kernels{weight + group * group_outputs(s) * kernel, kernel, 1, s.kernel_width * inputs,
                                     inputs};
    return winograd<T, Products>(all_groups.of_group(group), kernels, choice, true);
  });
  trace<T>("conv2d_forward", variant);
  return true;
}

template <class T>
void conv2d_forward(const Conv2dShape& as_given, const Conv2dForward<T>& t) {
  const Conv2dShape s = as_computed<T>(as_given);
  const AloneIfSmall scope(multiply_adds(s));
  if (has_narrow_groups<T>(s) && !s.pool) {
    trace<T>("conv2d_forward", grouped_name(s));
    return grouped_forward<T>(s, t);
  }
  const int64_t taps = kernel_taps(s), inputs = group_inputs(s), outputs = group_outputs(s);
  const Scratch<int64_t> tap_places(2 * taps);
  GatherConv<T> all_groups = forward_conv(s, t, tap_places);
  if constexpr (kHasWinograd<T>) {
    if (winograd_forward<T, FullProducts<T>>(s, t, all_groups)) return;
  }
  const OhwiWeight<T> weight(s, t.weight);
  const bool row_serves = winograd_row_serves(all_groups);
  all_groups.dots = !s.pool && dots_serve<T>(outputs, taps, inputs, row_serves);
  if (all_groups.dots) {
    all_groups.panels = weight;
    gather_conv(all_groups);
    return trace<T>("conv2d_forward", "dot");
  }
  const Scratch<T> panels(all_groups.panel_elements());
  pack_forward_panels<T>(s.groups, outputs, inputs, taps, weight, panels);
  all_groups.panels = panels;
  if constexpr (kHasWinograd<T>) {
    if (row_serves) {
      const char* variant = kernel_of_groups(s.groups, small_groups_side_by_side(s), [&](int64_t group) {
        const GatherConv<T> conv = all_groups.of_group(group);
        if (winograd_row_conv(conv)) return "winograd_1x4";
        gather_conv(conv);
        return "gather";
      });
      return trace<T>("conv2d_forward", variant);
    }
  }
  gather_conv(all_groups);
  trace<T>("conv2d_forward", "gather");
}

// The gradient of z out of that of the output: through ReLU and pooling.
template <class T>
void undo_activation(const Conv2dShape& s, const Conv2dBackward<T>& t, T* grad) {
  const int64_t rows = s.batch * s.out_height, channels = s.out_channels, row_elements = s.out_width * channels;
  if (!s.pool) {
    parallel_for(rows, [&](int64_t row) {
      const T *given = t.grad_output + row * row_elements, *output = t.output + row * row_elements;
      T* to = grad + row * row_elements;
      for (int64_t i = 0; i < row_elements; i += kLanes<T>) {
        const int64_t left = row_elements - i < kLanes<T> ? row_elements - i : kLanes<T>;
        const Vec<T> g = load_upto(output + i, left) <= Vec<T>{} ? Vec<T>{} : load_upto(given + i, left);
        store_upto(to + i, g, left);
      }
    });
    return;
  }
  const int64_t pooled_height = s.out_height / 2, pooled_width = s.out_width / 2;
  parallel_for(rows, [&](int64_t row) {
    const int64_t image = row / s.out_height, y = row % s.out_height;
    T* to = grad + row * row_elements;
    if (y / 2 >= pooled_height) return zero_run(row_elements, to);
    for (int64_t x = 0; x < s.out_width; ++x, to += channels) {
      if (x / 2 >= pooled_width) {
        zero_run(channels, to);
        continue;
      }
      const int64_t from = ((image * pooled_height + y / 2) * pooled_width + x / 2) * channels;
      const uint8_t place = static_cast<uint8_t>(y % 2 * 2 + x % 2);
      for (int64_t c = 0; c < channels; ++c) to[c] = t.winner[from + c] == place ? t.grad_output[from + c] : T(0);
    }
  });
}

template <class T>
void conv2d_grad_input(const Conv2dShape& as_given, const T* grad, const T* weight_as_given, T* grad_input) {
  const OhwiWeight<T> weight(as_given, weight_as_given);
  const Conv2dShape s = with_image_as_pixel(as_given);
  const auto scatter = [&] {
    trace<T>("conv2d_grad_input", "scatter");
    scatter_grad_input<T>(s, grad, weight, grad_input);
  };
  if (has_narrow_groups<T>(s)) {
    if (!all_finite<T>(weight_elements(s), weight)) return scatter();
    trace<T>("conv2d_grad_input", grouped_name(s));
    return grouped_grad_input<T>(s, grad, weight, grad_input);
  }
  const int64_t taps = kernel_taps(s), inputs = group_inputs(s), outputs = group_outputs(s);
  const bool side_by_side = small_groups_side_by_side(s);
  const Scratch<T> panels(s.groups * panels_of<T>(inputs) * taps * outputs * kTileColumns<T>);
  const Scratch<int64_t> tables(3 * taps);
  int64_t* tap_y = tables;
  int64_t* tap_x = tap_y + taps;
  int64_t* places = tap_x + taps;
  const int64_t phases = s.stride_height * s.stride_width;
  const bool dots = dots_serve<T>(inputs, (taps + phases - 1) / phases, outputs, false);
  const char* variant = dots ? "dot" : "gather";  // or Winograd, where it served a phase of the last group
  int64_t of_phase = 0;  // each has panels of its own, of which a thread always packs the same part

  for (int64_t phase_y = 0; phase_y < s.stride_height && phase_y < s.in_height; ++phase_y) {
    const TapAxis vertical = phase_taps(vertical_axis(s), phase_y);
    for (int64_t phase_x = 0; phase_x < s.stride_width && phase_x < s.in_width; ++phase_x) {
      const TapAxis horizontal = phase_taps(horizontal_axis(s), phase_x);
      const int64_t count = vertical.count * horizontal.count;
      const int64_t height = (s.in_height - phase_y + s.stride_height - 1) / s.stride_height;
      const int64_t width = (s.in_width - phase_x + s.stride_width - 1) / s.stride_width;
      T* first = grad_input + (phase_y * s.in_width + phase_x) * s.in_channels;
      if (count == 0) {  // no tap reaches these pixels: a stride larger than the kernel
        parallel_for(s.batch * height, [&](int64_t row) {
          for (int64_t x = 0; x < width; ++x)
            zero_run(s.in_channels,
                     first + ((row / height * s.in_height + row % height * s.stride_height) * s.in_width +
                              x * s.stride_width) *
                                 s.in_channels);
        });
        continue;
      }
      list_taps(vertical, horizontal, tap_y, tap_x);
      for (int64_t i = 0; i < count; ++i)
        places[i] = vertical.place(i / horizontal.count) * s.kernel_width + horizontal.place(i % horizontal.count);
      GatherConv<T> all_groups{
          .batch = s.batch,
          .out_height = height,
          .out_width = width,
          .step_y = 1,
          .step_x = 1,
          .taps = {count, tap_y, tap_x},
          .groups = s.groups,
          .depth = outputs,
          .columns = inputs,
          .source = grad,
          .source_height = s.out_height,
          .source_width = s.out_width,
          .source_image_stride = s.out_height * s.out_width * s.out_channels,
          .source_row_stride = s.out_width * s.out_channels,
          .source_pixel_stride = s.out_channels,
          .dots = dots,
          .panels = nullptr,
          .bias = nullptr,
          .relu = false,
          .out = first,
          .out_image_stride = s.in_height * s.in_width * s.in_channels,
          .out_row_stride = s.stride_height * s.in_width * s.in_channels,
          .out_pixel_stride = s.stride_width * s.in_channels,
          .stream = worth_streaming(grad_input, s.batch * s.in_height * s.in_width * s.in_channels, inputs),
          .pool = false,
          .winner = nullptr,
      };
      const WinogradChoice choice = winograd_choice<T, FullProducts<T>>(all_groups);
      bool finite = true;
      if (choice.tile == 0) {
        const auto& pack = dots ? pack_gradient_dots<T> : pack_gradient_panels<T>;
        finite = pack(s.groups, outputs, inputs, taps, weight, count, places, panels + of_phase);
        all_groups.panels = panels + of_phase;
        if (finite) gather_conv(all_groups);
      } else if constexpr (kHasWinograd<T>) {
        variant = kernel_of_groups(s.groups, side_by_side, [&](int64_t group) {
          // OHWI has a panel's columns side by side: nothing is packed.
          const WinogradKernels<T> kernels{weight + (group * outputs * taps + places[0]) * inputs, 1, taps * inputs,
                                           (places[choice.taps] - places[0]) * inputs,
                                           (places[1] - places[0]) * inputs};
          const char* name = winograd<T>(all_groups.of_group(group), kernels, choice, false);
          if (!name) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
          return name;
        });
      }
      if (!finite) return scatter();
      of_phase += all_groups.panel_elements();
    }
  }
  trace<T>("conv2d_grad_input", variant);
}

template <class T>
void conv2d_grad_weight(const Conv2dShape& s, const T* grad, const T* input, T* grad_weight) {
  if (weight_elements(s) == 0) return;
  if (s.batch * s.out_height * s.out_width == 0) return zero_run(weight_elements(s), grad_weight);
  if (has_narrow_groups<T>(s)) {
    trace<T>("conv2d_grad_weight", grouped_name(s));
    return grouped_grad_weight<T>(s, input, grad, grad_weight);
  }
  const int64_t group_weights = group_outputs(s) * group_inputs(s) * kernel_taps(s);
  const auto each_group = [&](const auto& kernel) {
    for_each_group(s.groups, groups_side_by_side(s), [&](int64_t group) {
      kernel(s, input + group * group_inputs(s), grad + group * group_outputs(s), grad_weight + group * group_weights);
    });
  };
  if (winograd_serves_grad_weight<T>(s)) {
    const bool of_5x5 = dense_square_taps(s) == 5;
    each_group(of_5x5 ? winograd_grad_weight<T, Winograd<2, 5>> : winograd_grad_weight<T, Winograd<4, 3>>);
    // A NaN or infinity reaches all taps, also those that see the border alone there: made anew below.
    if (all_finite(weight_elements(s), grad_weight))
      return trace<T>("conv2d_grad_weight", of_5x5 ? Winograd<2, 5>::kName : Winograd<4, 3>::kName);
  }
  const bool packed = packed_serves_grad_weight<T>(s);
  trace<T>("conv2d_grad_weight", !packed ? "outer" : packs_grad_weight<T>(s) ? "packed" : "direct");
  packed ? packed_grad_weight<T>(s, input, grad, grad_weight) : each_group(grad_weight_outer<T>);
}

template <class T>
void conv2d_backward(const Conv2dShape& as_given, const Conv2dBackward<T>& t) {
  const Conv2dShape s = as_computed<T>(as_given);
  const AloneIfSmall scope(multiply_adds(s));
  Conv2dBackward<T> dense = t;  // what the winner-sparse kernels leave to the dense ones
  if (s.pool && s.batch > 0) {
    if (t.grad_input && sparse_serves_grad_input<T>(s) && sparse_grad_input(s, t)) {
      trace<T>("conv2d_grad_input", "sparse");
      dense.grad_input = nullptr;
    }
    const bool lookup = lookup_serves_grad_weight<T>(s);
    if (t.grad_weight && (lookup || sparse_serves_grad_weight<T>(s))) {
      if (lookup ? lookup_grad_weight(s, t) : sparse_grad_weight(s, t)) {
        trace<T>("conv2d_grad_weight", lookup ? "lookup" : "sparse");
        dense.grad_weight = nullptr;
      }
    } else if (t.grad_bias) {
      sparse_grad_bias(s, t);
    }
    dense.grad_bias = nullptr;
  }
  if (!dense.grad_input && !dense.grad_weight && !dense.grad_bias) return;

  const int64_t pixels = s.batch * s.out_height * s.out_width;
  const bool undo = s.relu || s.pool;
  const Scratch<T> undone(undo ? pixels * s.out_channels : 0);
  if (undo) undo_activation<T>(s, t, undone);
  const T* grad = undo ? undone : t.grad_output;
  if (dense.grad_input) conv2d_grad_input<T>(s, grad, t.weight, t.grad_input);
  if (dense.grad_weight) conv2d_grad_weight<T>(s, grad, t.input, t.grad_weight);
  if (dense.grad_bias) column_sums(pixels, s.out_channels, grad, t.grad_bias);
}

}  // namespace
}  // namespace fastnn::cpu
