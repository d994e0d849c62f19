// cross_entropy, forward and backward: see ops/cross_entropy.h for the formulas.
//
// The softmax of a line is made and used within one kernel, never stored.
#include <cmath>

#include "cuda/lines.cuh"
#include "cuda/loss.cuh"

namespace fastnn::cuda {
namespace {

// What label smoothing and weights make of a target.
template <class C>
struct Smoothing {
  C keep;     // 1 - label_smoothing
  C spread;   // label_smoothing / classes
  bool some;  // whether q_c is not 0 for other classes than the target
};

template <class T>
Smoothing<Compute<T>> smoothing_of(const CrossEntropyShape& s, const T* probabilities) {
  using C = Compute<T>;
  return {static_cast<C>(1 - s.label_smoothing),
          static_cast<C>(s.label_smoothing / static_cast<double>(s.lines.classes)),
          probabilities || s.label_smoothing != 0};
}

// One class of a line.
template <class C>
struct ClassValues {
  C x, probability, weight;

  // q_c, without the target's own part where targets are class numbers.
  __device__ __forceinline__ C share(const Smoothing<C>& smoothing) const {
    return (smoothing.keep * probability + smoothing.spread) * weight;
  }
};

template <class T>
__global__ void __launch_bounds__(kWideLineThreads, kWideLineBlocks<T>)
    cross_entropy_forward_kernel(Lines lines, Smoothing<Compute<T>> smoothing, CrossEntropyForward<T> b,
                                 LossTotal<T> total) {
  begin_kernel();
  using C = Compute<T>;
  LossSum total_sum{0, 0};
  for_lines(lines, [&](const Team& team, const Line& line) {
    // The target is asked for early: it comes while the line is read.
    WeightedClass<T> target{-1, 1};
    if (line.leads() && !b.probabilities) target = class_of(b.classes, lines.classes, line.number);
    const C largest = line_largest(team, line, b.input);
    // dot = sum of q_c (x_c - largest), mass = sum of q_c: the loss is mass * log_sum - dot, both terms >= 0.
    C sum = 0, dot = 0, mass = 0;
    if (smoothing.some) {
      line.walk(
          [&](int64_t at, int64_t c) {
            return ClassValues<C>{widen(b.input[at]), b.probabilities ? widen(b.probabilities[at]) : 0,
                                  b.classes.weight ? widen(b.classes.weight[c]) : 1};
          },
          [&](const ClassValues<C>& v, int64_t, int64_t) {
            const C shifted = v.x - largest, share = v.share(smoothing);
            sum += std::exp(shifted);
            dot += share * shifted;
            mass += share;
          });
      dot = team.sum(dot);
      mass = team.sum(mass);
    } else {
      line.walk([&](int64_t at, int64_t) { return widen(b.input[at]); },
                [&](C x, int64_t, int64_t) { sum += std::exp(x - largest); });
    }
    sum = team.sum(sum);
    if (!line.leads()) return;
    const int64_t s = line.number;
    const C log_sum = std::log(sum);
    C loss = smoothing.some ? mass * log_sum - dot : 0;
    if (target.index >= 0) {
      const C shifted = widen(b.input[line.offset + target.index * lines.inner]) - largest;
      loss += smoothing.keep * target.weight * (log_sum - shifted);
    } else if (!b.probabilities) {
      loss = 0;  // ignored
    }
    if (b.statistics.largest) {
      b.statistics.largest[s] = largest;
      b.statistics.inverse_sum[s] = 1 / sum;
      if (b.probabilities) b.statistics.mass[s] = mass;
    }
    total_sum.loss += loss;
    total_sum.weight += target.weight;
    if (total.reduction == Reduction::none) b.output[s] = narrow<T>(loss);
  });
  if (total.wanted()) total.add(total_sum);
}

template <class T>
__global__ void __launch_bounds__(kWideLineThreads, kWideLineBlocks<T>)
    cross_entropy_backward_kernel(Lines lines, Reduction reduction, Smoothing<Compute<T>> smoothing,
                                  CrossEntropyBackward<T> b) {
  begin_kernel();
  using C = Compute<T>;
  const T* __restrict__ input = b.input;
  const T* __restrict__ probabilities = b.probabilities;
  const T* __restrict__ weights = b.classes.weight;
  T* __restrict__ grad_input = b.grad_input;
  T* __restrict__ grad_target = b.grad_target;
  // What label smoothing adds to the mass of a line whose target is a class: each block sums the weights for itself.
  C spread_mass = smoothing.spread * lines.classes;
  if (weights && !probabilities && smoothing.some) {
    C sum = 0;
    for (int64_t c = threadIdx.x; c < lines.classes; c += blockDim.x) sum += widen(weights[c]);
    spread_mass = smoothing.spread * Team(block_team(blockDim.x)).sum(sum);
  }
  for_lines(lines, [&](const Team&, const Line& line) {
    if (!line.there) return;
    const int64_t s = line.number;
    C grad = sample_gradient(reduction, b.grad_output, b.statistics.divisor, s);
    C mass, hot = 0;  // hot: what the target's class loses
    int64_t target_class = -1;
    if (probabilities) {
      mass = b.statistics.mass[s];
    } else {
      const WeightedClass<T> target = class_of(b.classes, lines.classes, s);
      target_class = target.index;
      if (target.index < 0) grad = 0;
      mass = smoothing.keep * target.weight + spread_mass;
      hot = grad * smoothing.keep * target.weight;
    }
    const C largest = b.statistics.largest[s], inverse_sum = b.statistics.inverse_sum[s];
    const C scale = grad * mass * inverse_sum, log_sum = grad_target ? -std::log(inverse_sum) : 0;
    line.walk(
        [&](int64_t at, int64_t c) {
          return ClassValues<C>{widen(input[at]), probabilities ? widen(probabilities[at]) : 0,
                                weights ? widen(weights[c]) : 1};
        },
        [&](const ClassValues<C>& v, int64_t at, int64_t c) {
          const C shifted = v.x - largest;
          if (grad_input) {
            C value = std::exp(shifted) * scale;
            if (smoothing.some) value -= grad * v.share(smoothing);
            if (c == target_class) value -= hot;
            grad_input[at] = narrow<T>(value);
          }
          if (grad_target) grad_target[at] = narrow<T>(-grad * smoothing.keep * v.weight * (shifted - log_sum));
        });
  });
}

}  // namespace

// Returns -1: targets are checked on the device.
template <class T>
int64_t Kernels<T>::cross_entropy_forward(const CrossEntropyShape& s, const CrossEntropyForward<T>& b) const {
  // Few samples: blocks as large as they get, of which one may do.
  Lines lines = plan_lines(s.lines, kWideLineThreads);
  if (lines.bundles() > kOneBlockRounds) lines = plan_lines(s.lines);
  trace<T>(queue_, "cross_entropy_forward", lines.variant());
  launch_loss<T>("cross_entropy_forward", queue_, cross_entropy_forward_kernel<T>, loss_blocks(lines.bundles()),
                 lines.team.threads(), lines.team.shared_bytes<Compute<T>>(),
                 {s.reduction, b.output, b.statistics.divisor, nullptr}, lines, smoothing_of(s, b.probabilities), b);
  return -1;
}

template <class T>
void Kernels<T>::cross_entropy_backward(const CrossEntropyShape& s, const CrossEntropyBackward<T>& b) const {
  const Lines lines = plan_lines(s.lines);
  const int threads = lines.team.threads();
  trace<T>(queue_, "cross_entropy_backward", lines.variant());
  launch("cross_entropy_backward", queue_, cross_entropy_backward_kernel<T>, blocks_for(lines.bundles(), 1), threads,
         block_team(threads).shared_bytes<Compute<T>>(), lines, s.reduction, smoothing_of(s, b.probabilities), b);
}

FASTNN_INSTANTIATE(int64_t, cross_entropy_forward, CrossEntropyShape, CrossEntropyForward)
FASTNN_INSTANTIATE(void, cross_entropy_backward, CrossEntropyShape, CrossEntropyBackward)

}  // namespace fastnn::cuda
