// nll_loss, forward and backward: see ops/nll_loss.h for the formulas.
#include "cuda/lines.cuh"
#include "cuda/loss.cuh"

namespace fastnn::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kOneBlockThreads)
    nll_loss_forward_kernel(NllLossShape s, NllLossForward<T> b, LossTotal<T> total) {
  begin_kernel();
  using C = Compute<T>;
  const int64_t samples = s.lines.outer * s.lines.inner;
  LossSum sum{0, 0};
  for (int64_t i = global_thread(); i < samples; i += grid_threads()) {
    const WeightedClass<T> target = class_of(b.classes, s.lines.classes, i);
    C loss = 0;
    if (target.index >= 0) {
      const int64_t at = line_offset(i, s.lines.classes, s.lines.inner) + target.index * s.lines.inner;
      loss = -target.weight * widen(b.input[at]);
    }
    sum.loss += loss;
    sum.weight += target.weight;
    if (s.reduction == Reduction::none) b.output[i] = narrow<T>(loss);
  }
  total.add(sum);
}

// Zeros and the targets' gradients in one pass: each line is written by a team, as it would be read.
template <class T>
__global__ void __launch_bounds__(kWideLineThreads)
    nll_loss_backward_kernel(Lines lines, Reduction reduction, NllLossBackward<T> b) {
  begin_kernel();
  using C = Compute<T>;
  for_lines(lines, [&](const Team&, const Line& line) {
    if (!line.there) return;
    const WeightedClass<T> target = class_of(b.classes, line.classes, line.number);
    const C grad =
        target.index < 0 ? 0 : -sample_gradient(reduction, b.grad_output, b.divisor, line.number) * target.weight;
    int64_t at = line.offset;
    for (int64_t c = line.first; c < line.classes; c += line.step, at += line.stride)
      b.grad_input[at] = narrow<T>(c == target.index ? grad : 0);
  });
}

}  // namespace

// Returns -1: targets are checked on the device.
template <class T>
int64_t Kernels<T>::nll_loss_forward(const NllLossShape& s, const NllLossForward<T>& b) const {
  const LossGrid grid = loss_grid(s.samples(), 1);
  trace<T>(queue_, "nll_loss_forward", grid.variant());
  launch_loss<T>("nll_loss_forward", queue_, nll_loss_forward_kernel<T>, grid.blocks, grid.threads, 0,
                 {s.reduction, b.output, b.divisor, nullptr}, s, b);
  return -1;
}

template <class T>
void Kernels<T>::nll_loss_backward(const NllLossShape& s, const NllLossBackward<T>& b) const {
  const Lines lines = plan_lines(s.lines);
  trace<T>(queue_, "nll_loss_backward", lines.variant());
  launch("nll_loss_backward", queue_, nll_loss_backward_kernel<T>, blocks_for(lines.bundles(), 1), lines.team.threads(),
         0, lines, s.reduction, b);
}

FASTNN_INSTANTIATE(int64_t, nll_loss_forward, NllLossShape, NllLossForward)
FASTNN_INSTANTIATE(void, nll_loss_backward, NllLossShape, NllLossBackward)

}  // namespace fastnn::cuda
