// What the losses share: sums over samples that have the same bits for every thread count, and class targets.
#pragma once

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/math.h"

namespace fastnn::cpu {
namespace {

// Sums run in double: a float sum of a million losses would lose three digits.
struct LossSum {
  double loss = 0;
  double weight = 0;
  int64_t outside = -1;  // the first sample whose target is no class
};

// body(begin, end, sum) for runs of `grain` items; the runs' sums added in order.
template <class Body>
LossSum sum_over_ranges(int64_t count, int64_t grain, const Body& body) {
  const int64_t tasks = (count + grain - 1) / grain;
  const Scratch<LossSum> sums(tasks);
  parallel_for(tasks, [&](int64_t task) {
    sums[task] = LossSum{};
    const int64_t begin = task * grain;
    body(begin, begin + grain < count ? begin + grain : count, sums[task]);
  });
  LossSum total;
  for (int64_t task = 0; task < tasks; ++task) {
    total.loss += sums[task].loss;
    total.weight += sums[task].weight;
    if (total.outside < 0) total.outside = sums[task].outside;
  }
  return total;
}

// Writes the reduced loss; divisor may be null.
template <class T>
void store_reduced(Reduction reduction, const LossSum& total, T* output, T* divisor) {
  if (divisor) *divisor = static_cast<T>(total.weight);
  if (reduction == Reduction::sum) *output = static_cast<T>(total.loss);
  if (reduction == Reduction::mean) *output = static_cast<T>(total.loss / total.weight);
}

// grad_output of sample s, divided for the mean.
template <class T>
FASTNN_INLINE T sample_gradient(Reduction reduction, const T* grad_output, const T* divisor, int64_t s) {
  if (reduction == Reduction::none) return grad_output[s];
  return reduction == Reduction::mean ? *grad_output / *divisor : *grad_output;
}

// The class of a sample and its weight; class -1 where the sample is ignored or its target is no class.
template <class T>
struct WeightedClass {
  int64_t index;
  T weight;
};

template <class T>
FASTNN_INLINE WeightedClass<T> class_of(const ClassTarget<T>& classes, int64_t class_count, int64_t s) {
  const int64_t target = classes.target[s];
  if (target == classes.ignore_index || target < 0 || target >= class_count) return {-1, T(0)};
  return {target, classes.weight ? classes.weight[target] : T(1)};
}

// Notes a target that is neither a class nor ignored.
template <class T>
FASTNN_INLINE void note_outside(const ClassTarget<T>& classes, int64_t s, LossSum& sum) {
  if (sum.outside < 0 && classes.target[s] != classes.ignore_index) sum.outside = s;
}

}  // namespace
}  // namespace fastnn::cpu
