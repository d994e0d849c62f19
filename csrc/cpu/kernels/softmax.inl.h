// softmax, log_softmax (ops/softmax.h), and the lines that they share with the losses.
//
// Where the classes lie together a line is walked a vector at a time and reduced across the lanes; else kLanes lines
// lie side by side, and a vector holds one class of each:
//
//   along (inner == 1)                  abreast (inner > 1)
//   x_0 x_1 x_2 x_3 | x_4 x_5 x_6 x_7   a_0 b_0 c_0 d_0      <- lines a, b, c, d
//                                       a_1 b_1 c_1 d_1
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd/math.h"

namespace fastnn::cpu {
namespace {

// Elements of one task: 5 to 10 us of exponentials, ten times what an OpenMP region costs.
constexpr int64_t kSoftmaxGrain = 1 << 13;

// One line, or as many abreast as fit a vector.
template <class T, bool along>
struct Lines {
  int64_t offset;  // of the first element
  int64_t classes, inner;
  int64_t count;  // lines

  // step(offset, lanes, class) for each vector of a line.
  template <class Step>
  FASTNN_INLINE void walk(const Step& step) const {
    if constexpr (along) {
      int64_t c = 0;
      for (; c + kLanes<T> <= classes; c += kLanes<T>) step(offset + c, kLanes<T>, c);
      if (c < classes) step(offset + c, classes - c, c);
    } else {
      for (int64_t c = 0; c < classes; ++c) step(offset + c * inner, count, c);
    }
  }

  FASTNN_INLINE Vec<T> largest(Vec<T> v) const { return along ? maximum_of_lanes<T>(v) : v; }
  FASTNN_INLINE Vec<T> total(Vec<T> v) const { return along ? sum_of_lanes<T>(v) : v; }

  // Per-line values, for all classes.
  FASTNN_INLINE Vec<T> of_line(const T* values) const { return along ? broadcast(*values) : load_upto(values, count); }
  // Per-class values that all lines share, for the class of a vector.
  static FASTNN_INLINE Vec<T> of_class(const T* values, int64_t c, int64_t lanes) {
    return along ? load_upto(values + c, lanes) : broadcast(values[c]);
  }
};

// body(lines, index) for the bundles [begin, end) of the array, `index` being the first line's number.
template <class T, class Body>
void for_lines(const SoftmaxShape& shape, int64_t begin, int64_t end, const Body& body) {
  if (shape.inner == 1) {
    for (int64_t line = begin; line < end; ++line)
      body(Lines<T, true>{line * shape.classes, shape.classes, 1, 1}, line);
    return;
  }
  const int64_t bundles = (shape.inner + kLanes<T> - 1) / kLanes<T>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t outer = i / bundles, first = i % bundles * kLanes<T>;
    const int64_t left = shape.inner - first;
    body(Lines<T, false>{outer * shape.classes * shape.inner + first, shape.classes, shape.inner,
                         left < kLanes<T> ? left : kLanes<T>},
         outer * shape.inner + first);
  }
}

template <class T>
int64_t bundle_count(const SoftmaxShape& shape) {
  return shape.inner == 1 ? shape.outer : shape.outer * ((shape.inner + kLanes<T> - 1) / kLanes<T>);
}

template <class T>
int64_t bundle_grain(const SoftmaxShape& shape) {
  return kSoftmaxGrain / (shape.classes * (shape.inner == 1 ? 1 : kLanes<T>)) + 1;
}

// As load_upto, with another value in the lanes beyond.
template <class T>
FASTNN_INLINE Vec<T> load_filled(const T* p, int64_t lanes, T fill) {
  if (lanes == kLanes<T>) return load(p);
  return lane_numbers<T>() < static_cast<LaneType<T>>(lanes) ? load_first(p, lanes) : broadcast(fill);
}

// The first lanes, the others 0 whatever they were.
template <class T>
FASTNN_INLINE Vec<T> keep_first(Vec<T> v, int64_t lanes) {
  if (lanes == kLanes<T>) return v;
  return lane_numbers<T>() < static_cast<LaneType<T>>(lanes) ? v : Vec<T>{};
}

template <class T, bool along>
FASTNN_INLINE Vec<T> line_maximum(const Lines<T, along>& lines, const T* x) {
  Vec<T> largest = broadcast(minus_infinity<T>);
  lines.walk([&](int64_t at, int64_t lanes, int64_t) {
    largest = maximum(largest, load_filled(x + at, lanes, minus_infinity<T>));
  });
  return lines.largest(largest);
}

// The sum of exp(x - largest), each power handed to visit(at, lanes, class, x - largest, power) on the way.
template <class T, bool along, class Visit>
FASTNN_INLINE Vec<T> line_exp_sum(const Lines<T, along>& lines, const T* x, Vec<T> largest, const Visit& visit) {
  Vec<T> sum{};
  lines.walk([&](int64_t at, int64_t lanes, int64_t c) {
    const Vec<T> shifted = load_filled(x + at, lanes, minus_infinity<T>) - largest;
    const Vec<T> power = exponential<T>(shifted);
    visit(at, lanes, c, shifted, power);
    sum += power;
  });
  return lines.total(sum);
}

// body(lines) for every bundle, in parallel.
template <class T, class Body>
void parallel_lines(const SoftmaxShape& shape, const Body& body) {
  parallel_ranges(bundle_count<T>(shape), bundle_grain<T>(shape), [&](int64_t begin, int64_t end) {
    for_lines<T>(shape, begin, end, [&](const auto& lines, int64_t) { body(lines); });
  });
}

// output_i = exp(input_i), log(input_i): for the tests of simd/math.h.
template <class T>
void exponentials(int64_t count, const T* input, T* output) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t lanes = count - i < kLanes<T> ? count - i : kLanes<T>;
    store_upto(output + i, exponential<T>(load_upto(input + i, lanes)), lanes);
  }
}
template <class T>
void logarithms(int64_t count, const T* input, T* output) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t lanes = count - i < kLanes<T> ? count - i : kLanes<T>;
    store_upto(output + i, logarithm<T>(load_upto(input + i, lanes)), lanes);
  }
}

template <class T>
void softmax_forward(const SoftmaxShape& shape, const SoftmaxForward<T>& t) {
  trace<T>("softmax_forward", shape.inner == 1 ? "along" : "abreast");
  parallel_lines<T>(shape, [&](const auto& lines) {
    const Vec<T> largest = line_maximum(lines, t.input);
    const Vec<T> sum = line_exp_sum(
        lines, t.input, largest,
        [&](int64_t at, int64_t lanes, int64_t, Vec<T>, Vec<T> power) { store_upto(t.output + at, power, lanes); });
    const Vec<T> scale = T(1) / sum;
    lines.walk([&](int64_t at, int64_t lanes, int64_t) {
      store_upto(t.output + at, load_upto(t.output + at, lanes) * scale, lanes);
    });
  });
}

template <class T>
void softmax_backward(const SoftmaxShape& shape, const SoftmaxBackward<T>& t) {
  trace<T>("softmax_backward", shape.inner == 1 ? "along" : "abreast");
  parallel_lines<T>(shape, [&](const auto& lines) {
    Vec<T> dot{};
    lines.walk([&](int64_t at, int64_t lanes, int64_t) {
      dot += load_upto(t.grad_output + at, lanes) * load_upto(t.output + at, lanes);
    });
    dot = lines.total(dot);
    lines.walk([&](int64_t at, int64_t lanes, int64_t) {
      const Vec<T> grad = load_upto(t.output + at, lanes) * (load_upto(t.grad_output + at, lanes) - dot);
      store_upto(t.grad_input + at, grad, lanes);
    });
  });
}

template <class T>
void log_softmax_forward(const SoftmaxShape& shape, const SoftmaxForward<T>& t) {
  trace<T>("log_softmax_forward", shape.inner == 1 ? "along" : "abreast");
  parallel_lines<T>(shape, [&](const auto& lines) {
    const Vec<T> largest = line_maximum(lines, t.input);
    const Vec<T> log_sum =
        logarithm<T>(line_exp_sum(lines, t.input, largest, [](int64_t, int64_t, int64_t, Vec<T>, Vec<T>) {}));
    lines.walk([&](int64_t at, int64_t lanes, int64_t) {
      store_upto(t.output + at, (load_upto(t.input + at, lanes) - largest) - log_sum, lanes);
    });
  });
}

template <class T>
void log_softmax_backward(const SoftmaxShape& shape, const SoftmaxBackward<T>& t) {
  trace<T>("log_softmax_backward", shape.inner == 1 ? "along" : "abreast");
  parallel_lines<T>(shape, [&](const auto& lines) {
    Vec<T> sum{};
    lines.walk([&](int64_t at, int64_t lanes, int64_t) { sum += load_upto(t.grad_output + at, lanes); });
    sum = lines.total(sum);
    lines.walk([&](int64_t at, int64_t lanes, int64_t) {
      const Vec<T> share = exponential<T>(load_upto(t.output + at, lanes)) * sum;
      store_upto(t.grad_input + at, load_upto(t.grad_output + at, lanes) - share, lanes);
    });
  });
}

}  // namespace
}  // namespace fastnn::cpu
