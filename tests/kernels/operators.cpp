// Every kernel of every ISA that this processor runs, on OpenMP's threads and on fastnn's own, without Python: for
// processors that are emulated, compilers that are only tried, and sanitizers that cannot look into an interpreter.
// Small integers must come out bit for bit; what takes roots and exponentials must be near by a bound that is counted.
#include <omp.h>

#include <atomic>
#include <new>
#include <set>

#include "check.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"
#include "common/trace.h"
#include "reference.h"

namespace fastnn::tests {
namespace {

Report report;

template <class T>
void test_linear() {
  constexpr Precision fp32 = Precision::fp32;
  for (const bool relu : {false, true})
    for (const LinearShape s : {LinearShape{1, 1, 1, relu, fp32},
                                {5, 19, 18, relu, fp32},
                                {3, 65, 7, relu, fp32},
                                {70, 33, 41, relu, fp32}}) {
      const auto input = integers<T>(s.batch * s.in_features, 1),
                 weight = integers<T>(s.out_features * s.in_features, 2);
      const auto bias = integers<T>(s.out_features, 3), grad = integers<T>(s.batch * s.out_features, 4);
      const LinearReference expected(s, as_double(input), as_double(weight), as_double(bias), as_double(grad));
      auto output = unwritten<T>(s.batch * s.out_features), grad_input = unwritten<T>(s.batch * s.in_features);
      auto grad_weight = unwritten<T>(s.out_features * s.in_features), grad_bias = unwritten<T>(s.out_features);
      cpu::kernels<T>().linear_forward(s, {output.data(), input.data(), weight.data(), bias.data()});
      report.exact("linear_forward", output, expected.output);
      cpu::kernels<T>().linear_backward(s, {grad_input.data(), grad_weight.data(), grad_bias.data(), grad.data(),
                                            input.data(), weight.data(), relu ? output.data() : nullptr});
      report.exact("linear grad_input", grad_input, expected.grad_input);
      report.exact("linear grad_weight", grad_weight, expected.grad_weight);
      report.exact("linear grad_bias", grad_bias, expected.grad_bias);
    }
}

// A row: sizes, then stride, padding and dilation of both axes, groups, ReLU, pooling.
struct Conv2dCase {
  int64_t batch, in_channels, height, width, out_channels, kernel_height, kernel_width;
  int64_t stride, padding, dilation, groups;
  bool relu, pool;
};

const Conv2dCase kConv2dCases[] = {
    {2, 3, 7, 6, 5, 3, 3, 1, 1, 1, 1, false, false},     // winograd by rows, outer
    {1, 15, 5, 42, 13, 3, 3, 1, 2, 1, 1, true, false},   // winograd by rows, several runs of tiles
    {1, 17, 9, 7, 19, 5, 4, 2, 2, 1, 1, true, false},    // gather by phases, packed
    {1, 16, 10, 10, 16, 3, 3, 1, 1, 1, 1, true, false},  // winograd, tiles of 2x2
    {2, 16, 12, 11, 33, 3, 3, 1, 1, 1, 1, true, false},  // winograd, tiles of 4x4, some over the edge
    {2, 16, 14, 14, 20, 3, 3, 1, 1, 1, 1, true, false},  // winograd, tiles of 4x4, 4x2, 2x4 and 2x2
    {3, 32, 13, 10, 32, 3, 3, 1, 0, 1, 1, true, true},   // winograd, pooled; sparse gradients
    {3, 17, 13, 10, 33, 5, 5, 1, 2, 1, 1, true, false},  // winograd of 5x5, some tiles over the edge
    {5, 16, 18, 18, 16, 5, 5, 1, 0, 1, 1, true, true},   // the same, pooled
    {8, 16, 26, 26, 16, 3, 3, 1, 1, 1, 1, true, false},  // the weight's gradient in parts
    {2, 1, 14, 13, 20, 3, 3, 1, 0, 1, 1, true, true},    // first layer: lookup
    {2, 3, 14, 13, 20, 3, 3, 1, 1, 1, 1, true, true},    // the same on three colours, with AVX-512
    {2, 8, 11, 9, 12, 5, 5, 1, 2, 1, 1, false, true},    // gather, pooled; sparse grad_weight
    {2, 3, 9, 8, 4, 3, 3, 2, 1, 1, 1, true, true},       // pooled with a stride: dense kernels
    {2, 21, 6, 5, 21, 3, 3, 1, 1, 1, 21, true, false},   // depthwise
    {1, 8, 9, 9, 8, 3, 3, 2, 2, 2, 8, false, false},     // depthwise, dilated
    {2, 6, 7, 8, 8, 3, 3, 1, 1, 1, 2, true, false},      // groups
    {2, 36, 7, 11, 36, 3, 3, 1, 2, 2, 9, true, false},   // narrow groups where a vector holds some, dilated
    {1, 24, 8, 9, 24, 5, 5, 2, 2, 1, 3, false, false},   // the same with a stride
    {2, 36, 6, 5, 24, 3, 3, 1, 1, 1, 12, true, false},   // groups side by side
    {3, 37, 5, 4, 41, 1, 1, 1, 0, 1, 1, false, false},   // pixels as rows
    {1, 2, 9, 11, 3, 2, 2, 4, 0, 1, 1, false, false},    // a stride beyond the kernel
    {0, 3, 7, 6, 4, 3, 3, 1, 1, 1, 1, true, false},      // no images
};

Conv2dShape shape_of(const Conv2dCase& c) {
  const auto size = [&](int64_t in, int64_t kernel) {
    return (in + 2 * c.padding - c.dilation * (kernel - 1) - 1) / c.stride + 1;
  };
  Conv2dShape s{};
  s.batch = c.batch, s.in_channels = c.in_channels, s.in_height = c.height, s.in_width = c.width;
  s.out_channels = c.out_channels, s.kernel_height = c.kernel_height, s.kernel_width = c.kernel_width;
  s.out_height = size(c.height, c.kernel_height), s.out_width = size(c.width, c.kernel_width);
  s.stride_height = s.stride_width = c.stride, s.padding_height = s.padding_width = c.padding;
  s.dilation_height = s.dilation_width = c.dilation, s.groups = c.groups;
  s.relu = c.relu, s.pool = c.pool, s.weight_channels_last = true;
  return s;
}

// Winograd's square roots round even small integers. How far its results may be from the exact ones: with factors below
// 1, 25 * 25 bounds the products behind an output of 3x3 for each channel, 38 * 38 of 5x5 (tests/tolerance.py has the
// matrices).
template <class T>
bool may_be_winograd(const Conv2dShape& s) {
  const bool square = s.kernel_height == s.kernel_width && (s.kernel_height == 3 || s.kernel_height == 5);
  return sizeof(T) == 4 && square && s.stride_height == 1 && s.dilation_height == 1 && s.in_channels / s.groups >= 16;
}
double winograd_error(const Conv2dShape& s, int64_t channels) {
  const double along_axis = s.kernel_height == 5 ? 38 : 25;
  const int64_t roundings = channels + (s.kernel_height == 5 ? 31 : 27);
  return along_axis * along_axis * static_cast<double>(channels * roundings) * kUnitRoundoff<float>;
}
// The weight's gradient sums over tiles.
double winograd_weight_error(const Conv2dShape& s) {
  const double along_axis = s.kernel_height == 5 ? 20 : 31;
  const int64_t tile = 7 - s.kernel_height;
  const int64_t tiles = s.batch * ((s.out_height + tile - 1) / tile) * ((s.out_width + tile - 1) / tile);
  return along_axis * along_axis * static_cast<double>(tiles * (tiles + 27)) * kUnitRoundoff<float>;
}

template <class T>
void test_conv2d() {
  for (const Conv2dCase& c : kConv2dCases) {
    const Conv2dShape s = shape_of(c);
    const int64_t out =
        s.batch * s.out_channels * (s.pool ? (s.out_height / 2) * (s.out_width / 2) : s.out_height * s.out_width);
    const bool rounds = may_be_winograd<T>(s);
    const auto numbers = [&](int64_t count, unsigned seed) {
      return rounds ? fractions<T>(count, -1, 1, seed) : integers<T>(count, seed);
    };
    const auto input = numbers(s.batch * s.in_channels * s.in_height * s.in_width, 1);
    const auto weight = numbers(s.out_channels * s.in_channels / s.groups * s.kernel_height * s.kernel_width, 2);
    const auto bias = numbers(s.out_channels, 3), grad = numbers(out, 4);
    const Conv2dReference expected(s, as_double(input), as_double(weight), as_double(bias), as_double(grad));
    auto output = unwritten<T>(out);
    auto winner = unwritten<uint8_t>(s.pool ? out : 0);
    uint8_t* winners = s.pool ? winner.data() : nullptr;
    cpu::kernels<T>().conv2d_forward(s, {output.data(), winners, input.data(), weight.data(), bias.data()});
    report.close("conv2d_forward", output, expected.output, 0, rounds ? winograd_error(s, s.in_channels) : 0);
    report.exact("conv2d winner", winner, expected.winner);
    if (s.pool) {
      auto alone = unwritten<T>(out);
      cpu::kernels<T>().conv2d_forward(s, {alone.data(), nullptr, input.data(), weight.data(), bias.data()});
      report.that("conv2d_forward without winners", alone == output, "another output than with them");
    }
    auto grad_input = unwritten<T>(static_cast<int64_t>(input.size()));
    auto grad_weight = unwritten<T>(static_cast<int64_t>(weight.size())), grad_bias = unwritten<T>(s.out_channels);
    cpu::kernels<T>().conv2d_backward(s, {grad_input.data(), grad_weight.data(), grad_bias.data(), grad.data(),
                                          input.data(), weight.data(), output.data(), winners});
    const double pixels = static_cast<double>(s.batch * s.out_height * s.out_width);
    const double summed = rounds ? winograd_weight_error(s) + pixels * pixels * kUnitRoundoff<T> : 0;
    report.close("conv2d grad_input", grad_input, expected.grad_input, 0,
                 rounds ? winograd_error(s, s.out_channels) : 0);
    report.close("conv2d grad_weight", grad_weight, expected.grad_weight, 0, summed);
    report.close("conv2d grad_bias", grad_bias, expected.grad_bias, 0, summed);
  }
}

template <class T>
void test_max_pool2d() {
  for (const bool channels_last : {true, false})
    for (const MaxPool2dShape& s : {MaxPool2dShape{2, 5, {8, 4, 2, 2, 0, 1}, {7, 3, 2, 2, 0, 1}, channels_last},
                                    {1, 19, {9, 5, 3, 2, 1, 1}, {8, 4, 3, 2, 1, 1}, channels_last},
                                    {2, 3, {9, 5, 3, 1, 0, 2}, {11, 3, 2, 3, 0, 3}, channels_last}}) {
      const int64_t out = s.batch * s.channels * s.y.out_size * s.x.out_size;
      const auto input = integers<T>(s.batch * s.channels * s.y.size * s.x.size, 1), grad = integers<T>(out, 2);
      const MaxPool2dReference expected(s, as_double(input), as_double(grad));
      for (const bool bytes : {true, false}) {
        auto output = unwritten<T>(out), grad_input = unwritten<T>(static_cast<int64_t>(input.size()));
        auto winners = unwritten<uint8_t>(out);
        auto indices = unwritten<int64_t>(out);
        uint8_t* as_bytes = bytes ? winners.data() : nullptr;
        int64_t* as_indices = bytes ? nullptr : indices.data();
        cpu::kernels<T>().max_pool2d_forward(s, {output.data(), as_bytes, as_indices, input.data()});
        report.exact("max_pool2d_forward", output, expected.output);
        if (!bytes) report.exact("max_pool2d indices", indices, expected.indices);
        cpu::kernels<T>().max_pool2d_backward(s, {grad_input.data(), grad.data(), as_bytes, as_indices});
        report.exact("max_pool2d_backward", grad_input, expected.grad_input);
      }
    }
}

template <class T>
void test_elementwise() {
  const int64_t count = 1037;
  const auto x = integers<T>(count, 1), y = integers<T>(count, 2), grad = integers<T>(count, 3);
  auto output = unwritten<T>(count), grad_input = unwritten<T>(count);
  Doubles positive, masked, squares, difference;
  for (int64_t i = 0; i < count; ++i) {
    positive.push_back(x[i] > 0 ? x[i] : 0), masked.push_back(x[i] > 0 ? grad[i] : 0);
    squares.push_back((x[i] - y[i]) * (x[i] - y[i])), difference.push_back(2 * grad[i] * (x[i] - y[i]));
  }
  cpu::kernels<T>().relu_forward({count}, {output.data(), x.data()});
  report.exact("relu_forward", output, positive);
  cpu::kernels<T>().relu_backward({count}, {grad_input.data(), grad.data(), output.data()});
  report.exact("relu_backward", grad_input, masked);
  std::vector<T> divisor(1), sum(1);
  cpu::kernels<T>().mse_loss_forward({count, Reduction::none},
                                     {output.data(), divisor.data(), x.data(), y.data(), nullptr});
  report.exact("mse_loss_forward", output, squares);
  cpu::kernels<T>().mse_loss_forward({count, Reduction::sum},
                                     {sum.data(), divisor.data(), x.data(), y.data(), nullptr});
  double total = 0;
  for (const double square : squares) total += square;
  report.exact("mse_loss_forward sum", sum, {total});
  cpu::kernels<T>().mse_loss_backward(
      {count, Reduction::none}, {grad_input.data(), nullptr, grad.data(), divisor.data(), x.data(), y.data(), nullptr});
  report.exact("mse_loss_backward", grad_input, difference);
}

// exp and log of the kernels are within 4 units in the last place (tests/test_simd_math.py), 8 roundings. A difference
// x - max of up to 6 is rounded once, and its error is a relative one of the power. A sum of c powers rounds c times.
template <class T>
double softmax_error(const SoftmaxShape& s) {
  return 2 * (8 + 6 + static_cast<double>(s.classes) + 4) * kUnitRoundoff<T>;
}

template <class T>
void test_softmax() {
  for (const SoftmaxShape s : {SoftmaxShape{5, 10, 1}, {37, 32, 1}, {3, 257, 1}, {2, 7, 21}, {1, 1, 1}}) {
    const int64_t count = s.outer * s.classes * s.inner;
    const double error = softmax_error<T>(s);
    const auto x = integers<T>(count, 1), grad = integers<T>(count, 2);
    const LinesReference lines(s, as_double(x));
    Doubles probabilities(lines.shifted), logs(lines.shifted), grad_softmax(count), grad_log(count);
    for (int64_t line = 0; line < s.outer * s.inner; ++line) {
      double dot = 0, sum = 0;
      for (int64_t c = 0; c < s.classes; ++c) {
        const int64_t i = LinesReference::at(s, line, c);
        logs[i] -= lines.log_sum[line], probabilities[i] = std::exp(logs[i]);
        dot += grad[i] * probabilities[i], sum += grad[i];
      }
      for (int64_t c = 0; c < s.classes; ++c) {
        const int64_t i = LinesReference::at(s, line, c);
        grad_softmax[i] = probabilities[i] * (grad[i] - dot), grad_log[i] = grad[i] - probabilities[i] * sum;
      }
    }
    auto output = unwritten<T>(count), grad_input = unwritten<T>(count);
    cpu::kernels<T>().softmax_forward(s, {output.data(), x.data()});
    report.close("softmax_forward", output, probabilities, error);
    // |grad| is at most 3 and probabilities add up to 1: the dot product is at most 3, every error at most 9 of them.
    cpu::kernels<T>().softmax_backward(s, {grad_input.data(), grad.data(), output.data()});
    report.close("softmax_backward", grad_input, grad_softmax, error, 9 * error);
    cpu::kernels<T>().log_softmax_forward(s, {output.data(), x.data()});
    report.close("log_softmax_forward", output, logs, error, error);
    const double sums = 3 * static_cast<double>(s.classes);  // the largest |sum of grad|
    cpu::kernels<T>().log_softmax_backward(s, {grad_input.data(), grad.data(), output.data()});
    report.close("log_softmax_backward", grad_input, grad_log, error, 3 * sums * error);
  }
}

template <class T>
void test_class_losses() {
  for (const SoftmaxShape lines : {SoftmaxShape{6, 10, 1}, {4, 33, 1}, {2, 5, 13}}) {
    const int64_t samples = lines.outer * lines.inner, count = samples * lines.classes;
    const auto x = integers<T>(count, 1);
    const auto weight = fractions<T>(lines.classes, 0.5, 2, 2);
    const LinesReference reference(lines, as_double(x));
    std::vector<int64_t> target;
    Doubles cross_entropy, nll, grad(count), grad_nll(count);
    double mass = 0;
    for (int64_t s = 0; s < samples; ++s) {
      target.push_back(s == 3 ? -100 : (s * 7) % lines.classes);
      const double w = s == 3 ? 0 : weight[target[s]];
      const int64_t hot = LinesReference::at(lines, s, s == 3 ? 0 : target[s]);
      mass += w;
      cross_entropy.push_back(w * (reference.log_sum[s] - reference.shifted[hot]));
      nll.push_back(-w * x[hot]);
      for (int64_t c = 0; c < lines.classes; ++c) {
        const int64_t i = LinesReference::at(lines, s, c);
        grad[i] = w * (std::exp(reference.shifted[i] - reference.log_sum[s]) - (i == hot));
      }
      grad_nll[hot] -= w;
    }
    const double error = softmax_error<T>(lines);
    const ClassTarget<T> classes{target.data(), weight.data(), -100};
    const CrossEntropyShape shape{lines, Reduction::none, 0};
    auto output = unwritten<T>(samples), largest = unwritten<T>(samples), inverse_sum = unwritten<T>(samples);
    auto grad_input = unwritten<T>(count);
    std::vector<T> divisor(1), ones(samples, T(1));
    const CrossEntropyStatistics<T> statistics{largest.data(), inverse_sum.data(), nullptr, divisor.data()};
    int64_t outside =
        cpu::kernels<T>().cross_entropy_forward(shape, {output.data(), statistics, x.data(), classes, nullptr});
    report.that("cross_entropy_forward", outside == -1, "expected every target inside");
    report.close("cross_entropy_forward", output, cross_entropy, error, 2 * error);
    cpu::kernels<T>().cross_entropy_backward(
        shape, {grad_input.data(), nullptr, ones.data(), statistics, x.data(), classes, nullptr});
    report.close("cross_entropy_backward", grad_input, grad, error, 2 * error);
    const NllLossShape nll_shape{lines, Reduction::none};
    outside = cpu::kernels<T>().nll_loss_forward(nll_shape, {output.data(), divisor.data(), x.data(), classes});
    report.that("nll_loss_forward", outside == -1, "expected every target inside");
    report.close("nll_loss_forward", output, nll, kUnitRoundoff<T>);
    cpu::kernels<T>().nll_loss_backward(nll_shape, {grad_input.data(), ones.data(), divisor.data(), classes});
    report.exact("nll_loss_backward", grad_input, grad_nll);
    std::vector<T> mean(1);
    cpu::kernels<T>().nll_loss_forward({lines, Reduction::mean}, {mean.data(), divisor.data(), x.data(), classes});
    report.close("nll_loss divisor", divisor, {mass}, kUnitRoundoff<T>);
    target[1] = lines.classes;
    outside = cpu::kernels<T>().nll_loss_forward(nll_shape, {output.data(), divisor.data(), x.data(), classes});
    report.that("nll_loss_forward", outside == 1, "expected sample 1 outside, got " + std::to_string(outside));
  }
}

// Positive numbers everywhere: no difference cancels, so relative errors add up. An update takes at most 24 roundings.
template <class T>
void test_optimizers() {
  const int64_t sizes[] = {1, 37, 8195};  // the last spans two tasks
  const AdamOptions adam{{0.01}, {0.9}, {0.99}, 1e-8, 0.1, true, true, false};
  const SgdOptions sgd{{0.01}, {0.9}, 0.1, 0.1, true, false};
  const double error = 2 * 24 * kUnitRoundoff<T>, step = 3;
  float steps[] = {2, 2, 2};
  std::vector<std::vector<T>> p, g, m, v, largest, q, buffer;
  std::vector<Doubles> adam_expected, sgd_expected;
  for (const int64_t size : sizes) {
    p.push_back(fractions<T>(size, 1, 2, 1)), q.push_back(p.back()), g.push_back(fractions<T>(size, 0.5, 1, 2));
    m.push_back(fractions<T>(size, 0.1, 1, 3)), buffer.push_back(m.back());
    v.push_back(fractions<T>(size, 0.1, 1, 4)), largest.push_back(fractions<T>(size, 0.5, 1, 5));
    Doubles by_adam, by_sgd;
    for (int64_t i = 0; i < size; ++i) {
      const double grad = g.back()[i], decayed = grad + sgd.weight_decay * p.back()[i];
      const double first = adam.beta1.value * m.back()[i] + (1 - adam.beta1.value) * grad;
      const double second =
          std::max<double>(largest.back()[i], adam.beta2.value * v.back()[i] + (1 - adam.beta2.value) * grad * grad);
      by_adam.push_back(p.back()[i] * (1 - adam.lr.value * adam.weight_decay) -
                        adam.lr.value / (1 - std::pow(adam.beta1.value, step)) * first /
                            (std::sqrt(second / (1 - std::pow(adam.beta2.value, step))) + adam.eps));
      const double momentum = sgd.momentum.value * buffer.back()[i] + (1 - sgd.dampening) * decayed;
      by_sgd.push_back(p.back()[i] - sgd.lr.value * (decayed + sgd.momentum.value * momentum));
    }
    adam_expected.push_back(by_adam), sgd_expected.push_back(by_sgd);
  }
  std::vector<AdamTensor<T>> adam_tensors;
  std::vector<SgdTensor<T>> sgd_tensors;
  std::vector<int64_t> ends;
  for (size_t i = 0; i < p.size(); ++i) {
    adam_tensors.push_back({p[i].data(), g[i].data(), m[i].data(), v[i].data(), largest[i].data(), &steps[i], nullptr});
    sgd_tensors.push_back({q[i].data(), g[i].data(), buffer[i].data(), false});
    ends.push_back((i ? ends.back() : 0) + sizes[i]);
  }
  cpu::kernels<T>().adam_step(adam, {3, adam_tensors.data(), ends.data()});
  cpu::kernels<T>().sgd_step(sgd, {3, sgd_tensors.data(), ends.data()});
  for (size_t i = 0; i < p.size(); ++i) {
    report.close("adam_step", p[i], adam_expected[i], error);
    report.close("sgd_step", q[i], sgd_expected[i], error);
  }
}

template <class T>
void test_batches() {
  const int64_t images = 5, channels = 3, pixels = 35;
  const auto source = integers<T>(images * channels * pixels, 1);
  const std::vector<int64_t> index{4, 0, 0, 2}, target{1, 0, 2, 2};
  Doubles gathered, turned;
  for (const int64_t image : index)
    for (int64_t i = 0; i < pixels * channels; ++i)
      gathered.push_back(source[(image * channels + i % channels) * pixels + i / channels] / 2.0);
  for (int64_t i = 0; i < images * channels * pixels; ++i) {
    const int64_t image = i / (channels * pixels), place = i % (channels * pixels);
    turned.push_back(source[(image * channels + place % channels) * pixels + place / channels]);
  }
  auto batch = unwritten<T>(static_cast<int64_t>(gathered.size()));
  std::vector<int64_t> targets(images), gathered_targets(4, -1);
  std::vector<double> expected_targets;
  for (int64_t i = 0; i < images; ++i) targets[i] = 7 * i;
  for (const int64_t image : index) expected_targets.push_back(static_cast<double>(targets[image]));
  cpu::kernels<T>().gather_images({images, 4, channels, pixels, false, 2},
                                  {batch.data(), source.data(), index.data(), gathered_targets.data(), targets.data()});
  report.exact("gather_images", batch, gathered);
  report.exact("gather_images, targets", gathered_targets, expected_targets);
  auto rows = unwritten<T>(static_cast<int64_t>(turned.size()));
  cpu::kernels<T>().transpose({images, channels, pixels}, {rows.data(), source.data()});
  report.exact("transpose", rows, turned);
  const std::vector<T> logits{0, 1, 0, 2, 1, 0, 5, 1, 2, 0, 0, 1};
  std::vector<int64_t> correct(1);
  cpu::kernels<T>().count_correct({4, 3}, {correct.data(), logits.data(), target.data()});
  report.exact("count_correct", correct, {3});
}

// What a task throws arrives at the caller when the loop has ended, and the next loop finds nothing of it.
void test_tasks_that_throw() {
  for (int round = 0; round < 20; ++round) {
    std::atomic<int64_t> ended{0};
    bool caught = false;
    try {
      cpu::parallel_for(100, [&](int64_t task) {
        ++ended;
        if (task % 10 == round % 10) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    report.that("tasks that throw", caught && ended > 0, "expected std::bad_alloc, got nothing");
    ended = 0;
    cpu::parallel_for(100, [&](int64_t) { ++ended; });
    report.that("tasks after some that threw", ended == 100, std::to_string(ended) + " of 100");
  }
}

template <class T>
void test_all(const char* isa, const char* dtype, bool own) {
  report.enter(std::string(isa) + " " + dtype + (own ? ", own threads" : ", OpenMP"));
  cpu::set_own_threads(own);
  test_linear<T>();
  test_conv2d<T>();
  test_max_pool2d<T>();
  test_elementwise<T>();
  test_softmax<T>();
  test_class_losses<T>();
  test_optimizers<T>();
  test_batches<T>();
  test_tasks_that_throw();
  cpu::set_own_threads(false);
}

// Kernels that the cases above are made for, whatever the vector's width.
const char* const kExpectedVariants[] = {
    "conv2d_forward depthwise",       "conv2d_forward gather",        "conv2d_forward winograd_1x4",
    "conv2d_forward winograd_2x2",    "conv2d_forward winograd_4x4",  "conv2d_grad_input depthwise",
    "conv2d_grad_input gather",       "conv2d_grad_input sparse",     "conv2d_grad_input winograd_2x2",
    "conv2d_grad_input winograd_4x4", "conv2d_grad_weight depthwise", "conv2d_grad_weight lookup",
    "conv2d_grad_weight outer",       "conv2d_grad_weight packed",    "conv2d_grad_weight winograd_4x4",
    "conv2d_grad_weight sparse",      "linear_forward dot",           "linear_forward gemm",
    "softmax_forward abreast",        "softmax_forward along",        "softmax_forward transposed"};

}  // namespace
}  // namespace fastnn::tests

int main(int count, char** arguments) {
  using namespace fastnn;
  const bool own_alone = count > 1 && std::string(arguments[1]) == "own-threads";
  omp_set_num_threads(3);
  for (int isa = 0; isa < cpu::isa_count(); ++isa) {
    const char* name = cpu::isa_name(isa);
    if (!cpu::set_isa(name)) {
      std::printf("%s: not run, this processor lacks it\n", name);
      continue;
    }
    const int64_t before = tests::report.checks();
    trace_start();
    for (const bool own : {true, false}) {
      if (own_alone && !own) continue;
      tests::test_all<float>(name, "float32", own);
      tests::test_all<double>(name, "float64", own);
    }
    std::set<std::string> ran;
    trace_stop(
        [](const TraceRecord& record, void* set) {
          static_cast<std::set<std::string>*>(set)->insert(std::string(record.operation) + " " + record.variant);
        },
        &ran);
    for (const char* variant : tests::kExpectedVariants)
      tests::report.that("kernels that ran", ran.count(variant) == 1, std::string("expected ") + variant);
    std::printf("%s: %lld comparisons\n", name, static_cast<long long>(tests::report.checks() - before));
  }
  std::printf("%lld failed\n", static_cast<long long>(tests::report.failures()));
  return tests::report.failures() == 0 ? 0 : 1;
}
