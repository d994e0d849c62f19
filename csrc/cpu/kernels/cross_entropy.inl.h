// cross_entropy (ops/cross_entropy.h): the softmax of a line is made and used within one pass, never stored.
//
// Forward walks a line twice (largest, then sum of powers), backward once. A bundle of lines (softmax.inl.h) has its
// numbers per line in arrays of kLanes, of which a line along the lanes uses the first.
#pragma once

#include "cpu/kernels/loss.inl.h"
#include "cpu/kernels/softmax.inl.h"

namespace fastnn::cpu {
namespace {

// What label smoothing and weights make of a target.
template <class T>
struct Smoothing {
  T keep;              // 1 - label_smoothing
  T spread;            // label_smoothing / classes
  T class_weight = 0;  // sum of all weights; without smoothing an infinite one counts nowhere

  Smoothing(const CrossEntropyShape& shape, const T* weight)
      : keep(static_cast<T>(1 - shape.label_smoothing)),
        spread(static_cast<T>(shape.label_smoothing / static_cast<double>(shape.lines.classes))) {
    if (spread == 0) return;
    double sum = weight ? 0 : static_cast<double>(shape.lines.classes);
    for (int64_t c = 0; weight && c < shape.lines.classes; ++c) sum += weight[c];
    class_weight = static_cast<T>(sum);
  }
  T mass(T target_weight) const { return keep * target_weight + spread * class_weight; }
};

// q_c of a vector of classes, without the target's own part where targets are class numbers.
template <class T, LineOrder order>
FASTNN_INLINE Vec<T> target_share(const Lines<T, order>&, const Smoothing<T>& smoothing, const T* weight,
                                  const T* probabilities, int64_t at, int64_t lanes, int64_t c) {
  Vec<T> share = broadcast(smoothing.spread);
  if (probabilities) share += smoothing.keep * load_upto(probabilities + at, lanes);
  return weight ? share * Lines<T, order>::of_class(weight, c, lanes) : share;
}

// Returns the first sample whose target is no class, or -1.
template <class T>
int64_t cross_entropy_forward(const CrossEntropyShape& shape, const CrossEntropyForward<T>& t) {
  trace<T>("cross_entropy_forward", t.probabilities ? "probabilities" : "indices");
  const Smoothing<T> smoothing(shape, t.classes.weight);
  const bool spreads = t.probabilities || shape.label_smoothing != 0;
  LossSum total = sum_over_ranges(
      bundle_count<T, Pass::forward>(shape.lines), bundle_grain<T, Pass::forward>(shape.lines),
      [&](int64_t begin, int64_t end, LossSum& task_sum) {
        for_lines<T, Pass::forward>(shape.lines, begin, end, [&](const auto& lines, int64_t first) {
          const auto input = lines.reading(t.input), probabilities = lines.reading(t.probabilities);
          const Vec<T> largest = line_maximum<T>(lines, input);
          // dot = sum of q_c (x_c - largest), mass = sum of q_c: the loss is mass * log_sum - dot, both terms >= 0.
          Vec<T> dot{}, mass{}, sum;
          if (spreads) {
            sum = line_exp_sum<T>(lines, input, largest, [&](int64_t at, int64_t lanes, int64_t c, Vec<T> shifted) {
              const Vec<T> share = target_share<T>(lines, smoothing, t.classes.weight, probabilities, at, lanes, c);
              dot += keep_first<T>(share * shifted, lanes);
              mass += keep_first<T>(share, lanes);
            });
            dot = lines.total(dot);
            mass = lines.total(mass);
          } else {
            sum = line_exp_sum<T>(lines, input, largest, [](int64_t, int64_t, int64_t, Vec<T>) {});
          }
          const Vec<T> log_sum = logarithm<T>(sum);
          const Vec<T> spread_loss = spreads ? mass * log_sum - dot : Vec<T>{};
          if (t.statistics.largest) {
            store_upto(t.statistics.largest + first, largest, lines.count);
            store_upto(t.statistics.inverse_sum + first, T(1) / sum, lines.count);
            if (t.probabilities) store_upto(t.statistics.mass + first, mass, lines.count);
          }
          for (int64_t l = 0; l < lines.count; ++l) {
            T loss = spread_loss[l];
            if (!t.probabilities) {
              const WeightedClass<T> target = class_of(t.classes, shape.lines.classes, first + l);
              if (target.index >= 0) {
                const T shifted = input[lines.offset() + l + target.index * lines.inner] - largest[l];
                loss += smoothing.keep * target.weight * (log_sum[l] - shifted);
              } else {
                loss = 0;
                note_outside(t.classes, first + l, task_sum);
              }
              task_sum.weight += target.weight;
            }
            task_sum.loss += loss;
            if (shape.reduction == Reduction::none) t.output[first + l] = loss;
          }
        });
      });
  if (t.probabilities) total.weight = static_cast<double>(shape.samples());
  store_reduced(shape.reduction, total, t.output, t.statistics.divisor);
  return total.outside;
}

template <class T>
void cross_entropy_backward(const CrossEntropyShape& shape, const CrossEntropyBackward<T>& t) {
  trace<T>("cross_entropy_backward", t.probabilities ? "probabilities" : "indices");
  const Smoothing<T> smoothing(shape, t.classes.weight);
  const bool spreads = t.probabilities || shape.label_smoothing != 0;
  const CrossEntropyStatistics<T>& s = t.statistics;
  const int64_t bundles = bundle_count<T, Pass::backward>(shape.lines);
  parallel_ranges(bundles, bundle_grain<T, Pass::backward>(shape.lines), [&](int64_t begin, int64_t end) {
    for_lines<T, Pass::backward>(shape.lines, begin, end, [&](const auto& lines, int64_t first) {
      // Of each line: g, g * sum of q_c, and what the target's class loses; all 0 for ignored samples.
      T grads[kLanes<T>] = {}, masses[kLanes<T>] = {}, hot[kLanes<T>] = {};
      int64_t targets[kLanes<T>] = {};
      for (int64_t l = 0; l < lines.count; ++l) {
        const T grad = sample_gradient(shape.reduction, t.grad_output, s.divisor, first + l);
        if (t.probabilities) {
          grads[l] = grad;
          masses[l] = grad * s.mass[first + l];
          continue;
        }
        const WeightedClass<T> target = class_of(t.classes, shape.lines.classes, first + l);
        targets[l] = target.index;
        if (target.index < 0) continue;
        grads[l] = grad;
        masses[l] = grad * smoothing.mass(target.weight);
        hot[l] = grad * smoothing.keep * target.weight;
      }
      const Vec<T> largest = lines.of_line(s.largest + first), inverse_sum = lines.of_line(s.inverse_sum + first);
      const Vec<T> grad = lines.of_line(grads), scale = lines.of_line(masses) * inverse_sum;
      if (t.grad_input && spreads) {
        lines.map(t.grad_input, [&](int64_t at, int64_t lanes, int64_t c) {
          const Vec<T> share = target_share(lines, smoothing, t.classes.weight, t.probabilities, at, lanes, c);
          lines.fetch_ahead(t.input + at);
          lines.fetch_ahead(t.grad_input + at);
          return exponential<T>(load_upto(t.input + at, lanes) - largest) * scale - grad * share;
        });
      } else if (t.grad_input) {
        lines.map(t.grad_input, [&](int64_t at, int64_t lanes, int64_t) {
          lines.fetch_ahead(t.input + at);
          lines.fetch_ahead(t.grad_input + at);
          return exponential<T>(load_upto(t.input + at, lanes) - largest) * scale;
        });
      }
      if (t.grad_input && !t.probabilities)
        for (int64_t l = 0; l < lines.count; ++l)
          if (targets[l] >= 0) t.grad_input[lines.offset() + l + targets[l] * lines.inner] -= hot[l];
      if (t.grad_target) {
        const Vec<T> log_sum = -logarithm<T>(inverse_sum);
        lines.map(t.grad_target, [&](int64_t at, int64_t lanes, int64_t c) {
          Vec<T> factor = grad * -smoothing.keep;
          if (t.classes.weight) factor *= lines.of_class(t.classes.weight, c, lanes);
          return factor * ((load_upto(t.input + at, lanes) - largest) - log_sum);
        });
      }
    });
  });
}

}  // namespace
}  // namespace fastnn::cpu
