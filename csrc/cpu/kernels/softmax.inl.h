// softmax, log_softmax (ops/softmax.h), and the lines that they share with the losses.
//
// Where the classes lie together a line is walked a vector at a time and reduced across the lanes; else kLanes lines
// lie side by side, and a vector holds one class of each:
//
//   along (inner == 1)                  abreast (inner > 1)
//   x_0 x_1 x_2 x_3 | x_4 x_5 x_6 x_7   a_0 b_0 c_0 d_0      <- lines a, b, c, d
//                                       a_1 b_1 c_1 d_1
//
// Forward passes reduce a line twice, which takes longer than the exponentials of few classes: they transpose short
// lines, which then go abreast.
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd/map.h"
#include "cpu/simd/math.h"
#include "cpu/simd/transpose.h"

namespace fastnn::cpu {
namespace {

// Elements of one task: 5 to 10 us of exponentials, ten times what an OpenMP region costs.
constexpr int64_t kSoftmaxGrain = 1 << 13;
// Lines abreast keep what they read twice on the stack, for so many classes (8 KiB with the widest vectors): where
// classes lie an image of 32 x 32 floats apart they all fall into one set of the cache.
constexpr int64_t kStagedClasses = 128;
// Classes of a short line, and lines that repay a transposition.
constexpr int64_t kShortLine = 32;
constexpr int64_t kFewestTransposed = 4;

enum class LineOrder { along, abreast, transposed };

enum class Pass { forward, backward };

template <Pass pass>
LineOrder line_order(const SoftmaxShape& shape) {
  if (shape.inner != 1) return LineOrder::abreast;  // of 0 lines, too
  const bool repays = shape.classes <= kShortLine && shape.outer >= kFewestTransposed;
  return pass == Pass::forward && repays ? LineOrder::transposed : LineOrder::along;
}

inline const char* order_name(LineOrder order) {
  static constexpr const char* names[] = {"along", "abreast", "transposed"};
  return names[static_cast<int>(order)];
}

// Up to kLanes short lines of an array (null for none), copied so that they lie abreast.
template <class T>
class TransposedInput {
 public:
  TransposedInput(const T* lines, int64_t classes, int64_t count) : given_(lines != nullptr) {
    if (given_) transpose_panel<T, true>(lines, classes, count, classes, copy_, kLanes<T>);
  }
  TransposedInput(const TransposedInput&) = delete;
  operator const T*() const { return given_ ? copy_ : nullptr; }

 private:
  bool given_;
  alignas(kVectorBytes) T copy_[kShortLine * kLanes<T>];
};

// A copy to be written, which becomes the lines of an array when it ends.
template <class T>
class TransposedOutput {
 public:
  TransposedOutput(T* lines, int64_t classes, int64_t count) : lines_(lines), classes_(classes), count_(count) {}
  TransposedOutput(const TransposedOutput&) = delete;
  ~TransposedOutput() { transpose_matrix<T>(copy_, kLanes<T>, classes_, count_, lines_, classes_); }
  operator T*() { return copy_; }

 private:
  T* lines_;
  int64_t classes_, count_;
  alignas(kVectorBytes) T copy_[kShortLine * kLanes<T>];
};

// One line, or as many abreast as fit a vector.
template <class T, LineOrder order>
struct Lines {
  static constexpr bool along = order == LineOrder::along;

  int64_t begin;  // of the first element in an array
  int64_t classes, inner;
  int64_t count;  // lines

  // Of the first element in what reading() and writing() return.
  FASTNN_INLINE int64_t offset() const { return order == LineOrder::transposed ? 0 : begin; }

  // The array, or a copy of these lines.
  FASTNN_INLINE auto reading(const T* array) const {
    if constexpr (order == LineOrder::transposed)
      return TransposedInput<T>(array ? array + begin : nullptr, classes, count);
    else
      return array;
  }
  FASTNN_INLINE auto writing(T* array) const {
    if constexpr (order == LineOrder::transposed)
      return TransposedOutput<T>(array + begin, classes, count);
    else
      return array;
  }

  // step(offset, lanes, class) for each vector of a line.
  template <class Step>
  FASTNN_INLINE void walk(const Step& step) const {
    walk_from(0, step);
  }

  // output[offset] = value(offset, lanes, class) for each vector, several computed before they are stored (simd/map.h).
  template <class Value>
  FASTNN_INLINE void map(T* output, const Value& value) const {
    const int64_t classes_apart = along ? kLanes<T> : 1, apart = along ? kLanes<T> : inner;
    const int64_t lanes = along ? kLanes<T> : width();
    int64_t c = 0;
    for (; c + kMapVectors * classes_apart <= classes; c += kMapVectors * classes_apart) {
      const int64_t at = offset() + (along ? c : c * inner);
      Vec<T> values[kMapVectors];
      FASTNN_UNROLL
      for (int v = 0; v < kMapVectors; ++v) values[v] = value(at + v * apart, lanes, c + v * classes_apart);
      FASTNN_UNROLL
      for (int v = 0; v < kMapVectors; ++v) store_upto(output + at + v * apart, values[v], lanes);
    }
    walk_from(c, [&](int64_t at, int64_t lanes_left, int64_t c_left) {
      store_upto(output + at, value(at, lanes_left, c_left), lanes_left);
    });
  }

  // Brings the memory at p of the bundles to come near: the processor does not foresee steps of a page and more. A
  // quarter to a half of the backward passes' time at 32 x 32.
  static FASTNN_INLINE void fetch_ahead(const T* p) {
    if constexpr (order == LineOrder::abreast) __builtin_prefetch(p + 4 * kLanes<T>, 0, 2);
  }

  FASTNN_INLINE Vec<T> largest(Vec<T> v) const { return along ? maximum_of_lanes<T>(v) : v; }
  FASTNN_INLINE Vec<T> total(Vec<T> v) const { return along ? sum_of_lanes<T>(v) : v; }

  // Per-line values, for all classes.
  FASTNN_INLINE Vec<T> of_line(const T* values) const { return along ? broadcast(*values) : load_upto(values, count); }
  // Per-class values that all lines share, for the class of a vector.
  static FASTNN_INLINE Vec<T> of_class(const T* values, int64_t c, int64_t lanes) {
    return along ? load_upto(values + c, lanes) : broadcast(values[c]);
  }

  template <class Step>
  FASTNN_INLINE void walk_from(int64_t c, const Step& step) const {
    if constexpr (along) {
      for (; c + kLanes<T> <= classes; c += kLanes<T>) step(offset() + c, kLanes<T>, c);
      if (c < classes) step(offset() + c, classes - c, c);
    } else {
      for (; c < classes; ++c) step(offset() + c * inner, width(), c);
    }
  }

 private:
  // Lanes of a vector of lines abreast. A copy has zeros in those beyond the lines.
  FASTNN_INLINE int64_t width() const { return order == LineOrder::transposed ? kLanes<T> : count; }
};

// body(lines, index) for the bundles [begin, end) of the array, `index` being the first line's number.
template <class T, Pass pass, class Body>
void for_lines(const SoftmaxShape& shape, int64_t begin, int64_t end, const Body& body) {
  const int64_t classes = shape.classes, inner = shape.inner;
  const LineOrder order = line_order<pass>(shape);
  const int64_t bundles = (inner + kLanes<T> - 1) / kLanes<T>;
  for (int64_t i = begin; i < end; ++i) {
    if (order == LineOrder::along) {
      body(Lines<T, LineOrder::along>{i * classes, classes, 1, 1}, i);
    } else if (order == LineOrder::abreast) {
      const int64_t outer = i / bundles, first = i % bundles * kLanes<T>, left = inner - first;
      body(Lines<T, LineOrder::abreast>{outer * classes * inner + first, classes, inner,
                                        left < kLanes<T> ? left : kLanes<T>},
           outer * inner + first);
    } else if constexpr (pass == Pass::forward) {
      const int64_t first = i * kLanes<T>, left = shape.outer - first;
      body(Lines<T, LineOrder::transposed>{first * classes, classes, kLanes<T>, left < kLanes<T> ? left : kLanes<T>},
           first);
    }
  }
}

template <class T, Pass pass>
int64_t bundle_count(const SoftmaxShape& shape) {
  const auto vectors = [](int64_t lines) { return (lines + kLanes<T> - 1) / kLanes<T>; };
  switch (line_order<pass>(shape)) {
    case LineOrder::along: return shape.outer;
    case LineOrder::transposed: return vectors(shape.outer);
    default: return shape.outer * vectors(shape.inner);
  }
}

template <class T, Pass pass>
int64_t bundle_grain(const SoftmaxShape& shape) {
  const bool along = line_order<pass>(shape) == LineOrder::along;
  return kSoftmaxGrain / (shape.classes * (along ? 1 : kLanes<T>)) + 1;
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

template <class T, LineOrder order>
FASTNN_INLINE Vec<T> line_maximum(const Lines<T, order>& lines, const T* x) {
  Vec<T> largest = broadcast(minus_infinity<T>);
  lines.walk([&](int64_t at, int64_t lanes, int64_t) {
    lines.fetch_ahead(x + at);
    largest = maximum(largest, load_filled(x + at, lanes, minus_infinity<T>));
  });
  return lines.largest(largest);
}

// The sum of exp(x - largest), each difference handed to visit(at, lanes, class, x - largest) on the way.
template <class T, LineOrder order, class Visit>
FASTNN_INLINE Vec<T> line_exp_sum(const Lines<T, order>& lines, const T* x, Vec<T> largest, const Visit& visit) {
  Vec<T> sum{};
  lines.walk([&](int64_t at, int64_t lanes, int64_t c) {
    const Vec<T> shifted = load_filled(x + at, lanes, minus_infinity<T>) - largest;
    visit(at, lanes, c, shifted);
    sum += exponential<T>(shifted);
  });
  return lines.total(sum);
}

// body(lines) for every bundle, in parallel; puts `operation` on record.
template <class T, Pass pass, class Body>
void parallel_lines(const char* operation, const SoftmaxShape& shape, const Body& body) {
  trace<T>(operation, order_name(line_order<pass>(shape)));
  parallel_ranges(bundle_count<T, pass>(shape), bundle_grain<T, pass>(shape), [&](int64_t begin, int64_t end) {
    for_lines<T, pass>(shape, begin, end, [&](const auto& lines, int64_t) { body(lines); });
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
  parallel_lines<T, Pass::forward>("softmax_forward", shape, [&](const auto& lines) {
    const auto input = lines.reading(t.input);
    auto output = lines.writing(t.output);
    const Vec<T> largest = line_maximum<T>(lines, input);
    const auto power = [&](int64_t at, int64_t lanes) {
      return exponential<T>(load_filled(input + at, lanes, minus_infinity<T>) - largest);
    };
    Vec<T> sum{};
    if (shape.inner > 1 && shape.classes <= kStagedClasses) {
      alignas(kVectorBytes) T powers[kStagedClasses * kLanes<T>];
      lines.walk([&](int64_t at, int64_t lanes, int64_t c) {
        lines.fetch_ahead(output + at);
        const Vec<T> value = power(at, lanes);
        sum += value;
        store(powers + c * kLanes<T>, value);
      });
      const Vec<T> scale = T(1) / sum;
      lines.map(output, [&](int64_t, int64_t, int64_t c) { return load(powers + c * kLanes<T>) * scale; });
      return;
    }
    lines.map(output, [&](int64_t at, int64_t lanes, int64_t) {
      const Vec<T> value = power(at, lanes);
      sum += value;
      return value;
    });
    const Vec<T> scale = T(1) / lines.total(sum);
    lines.map(output, [&](int64_t at, int64_t lanes, int64_t) { return load_upto(output + at, lanes) * scale; });
  });
}

template <class T>
void softmax_backward(const SoftmaxShape& shape, const SoftmaxBackward<T>& t) {
  parallel_lines<T, Pass::backward>("softmax_backward", shape, [&](const auto& lines) {
    Vec<T> dot{};
    if (shape.inner > 1 && shape.classes <= kStagedClasses) {
      alignas(kVectorBytes) T grads[kStagedClasses * kLanes<T>], powers[kStagedClasses * kLanes<T>];
      lines.walk([&](int64_t at, int64_t lanes, int64_t c) {
        const Vec<T> grad = load_upto(t.grad_output + at, lanes), power = load_upto(t.output + at, lanes);
        lines.fetch_ahead(t.grad_output + at);
        lines.fetch_ahead(t.output + at);
        lines.fetch_ahead(t.grad_input + at);
        dot += grad * power;
        store(grads + c * kLanes<T>, grad);
        store(powers + c * kLanes<T>, power);
      });
      lines.map(t.grad_input, [&](int64_t, int64_t, int64_t c) {
        return load(powers + c * kLanes<T>) * (load(grads + c * kLanes<T>) - dot);
      });
      return;
    }
    lines.walk([&](int64_t at, int64_t lanes, int64_t) {
      dot += load_upto(t.grad_output + at, lanes) * load_upto(t.output + at, lanes);
    });
    dot = lines.total(dot);
    lines.map(t.grad_input, [&](int64_t at, int64_t lanes, int64_t) {
      return load_upto(t.output + at, lanes) * (load_upto(t.grad_output + at, lanes) - dot);
    });
  });
}

template <class T>
void log_softmax_forward(const SoftmaxShape& shape, const SoftmaxForward<T>& t) {
  parallel_lines<T, Pass::forward>("log_softmax_forward", shape, [&](const auto& lines) {
    const auto input = lines.reading(t.input);
    auto output = lines.writing(t.output);
    const Vec<T> largest = line_maximum<T>(lines, input);
    const Vec<T> log_sum =
        logarithm<T>(line_exp_sum<T>(lines, input, largest, [](int64_t, int64_t, int64_t, Vec<T>) {}));
    lines.map(output,
              [&](int64_t at, int64_t lanes, int64_t) { return (load_upto(input + at, lanes) - largest) - log_sum; });
  });
}

template <class T>
void log_softmax_backward(const SoftmaxShape& shape, const SoftmaxBackward<T>& t) {
  parallel_lines<T, Pass::backward>("log_softmax_backward", shape, [&](const auto& lines) {
    Vec<T> sum{};
    lines.walk([&](int64_t at, int64_t lanes, int64_t) {
      lines.fetch_ahead(t.grad_output + at);
      lines.fetch_ahead(t.output + at);
      lines.fetch_ahead(t.grad_input + at);
      sum += load_upto(t.grad_output + at, lanes);
    });
    sum = lines.total(sum);
    lines.map(t.grad_input, [&](int64_t at, int64_t lanes, int64_t) {
      const Vec<T> share = exponential<T>(load_upto(t.output + at, lanes)) * sum;
      return load_upto(t.grad_output + at, lanes) - share;
    });
  });
}

}  // namespace
}  // namespace fastnn::cpu
