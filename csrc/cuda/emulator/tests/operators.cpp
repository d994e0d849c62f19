// Every launcher with shapes of odd tails, on memory that shows where a kernel leaves its arrays or an output
// unwritten, or gives other bits under another schedule. Whether numbers are right is what the tests in Python ask.
#include <algorithm>
#include <stdexcept>

#include "cuda/emulator/tests/test.h"

namespace fastnn::cuda::tests {
namespace {

template <class T>
struct Run {
  Memory& memory;
  Kernels<T> kernels{memory.queue()};

  T* in(int64_t count, int low = -3, int high = 3) { return memory.input<T>(count, low, high); }
  T* out(int64_t count) { return memory.output<T>(count); }
  Compute<T>* sums(int64_t count) { return memory.output<Compute<T>>(count); }
  T* updated(int64_t count, int low = -3, int high = 3) { return memory.updated<T>(count, low, high); }
};

// Calls body(run, shape) in every dtype, with memory of its own for each shape: on aligned arrays on a device with
// tensor cores for all dtypes, and on others on one without.
template <class Shapes, class Body>
std::string for_all(const Shapes& shapes, const Body& body) {
  std::string bytes;
  const auto with_dtype = [&](auto zero, int64_t offset) {
    for (const auto& shape : shapes) {
      Memory memory(offset);
      body(Run<decltype(zero)>{memory}, shape);
      bytes += memory.check();
    }
  };
  for (const int64_t offset : {0, 1}) {
    emulator::capability = offset == 0 ? 90 : 75;
    with_dtype(float{}, offset);
    with_dtype(double{}, offset);
    with_dtype(bfloat16{}, offset);
    with_dtype(float16{}, offset);
  }
  emulator::capability = 90;
  return bytes;
}

std::string relu() {
  return for_all(std::vector<ReluShape>{{1}, {7}, {4099}}, []<class T>(Run<T> r, const ReluShape& s) {
    T* output = r.out(s.count);
    r.kernels.relu_forward(s, {output, r.in(s.count)});
    r.kernels.relu_backward(s, {r.out(s.count), r.in(s.count), output});
  });
}

std::string linear() {
  const std::vector<LinearShape> shapes = {{1, 1, 1, false, Precision::fp32},    {5, 19, 18, true, Precision::tf32},
                                           {3, 616, 7, false, Precision::fp32},  {70, 40, 72, true, Precision::fp32},
                                           {67, 33, 65, false, Precision::fp32}, {0, 4, 3, true, Precision::fp32},
                                           {130, 16, 24, false, Precision::tf32}};
  return for_all(shapes, []<class T>(Run<T> r, const LinearShape& s) {
    const int64_t in = s.batch * s.in_features, out = s.batch * s.out_features,
                  weights = s.in_features * s.out_features;
    const T *input = r.in(in), *weight = r.in(weights);
    T* output = r.out(out);
    r.kernels.linear_forward(s, {output, input, weight, r.in(s.out_features)});
    r.kernels.linear_backward(
        s, {r.out(in), r.out(weights), r.out(s.out_features), r.in(out), input, weight, s.relu ? output : nullptr});
  });
}

// A row: sizes, then stride, padding, dilation and groups, ReLU, pooling, how the weight lies.
struct Conv2dCase {
  int64_t batch, in_channels, height, width, out_channels, kernel_height, kernel_width;
  int64_t stride, padding, dilation, groups;
  bool relu, pool, weight_channels_last;
};

Conv2dShape shape_of(const Conv2dCase& c) {
  const auto out_size = [&](int64_t in, int64_t kernel) {
    return (in + 2 * c.padding - c.dilation * (kernel - 1) - 1) / c.stride + 1;
  };
  Conv2dShape s{};
  s.batch = c.batch, s.in_channels = c.in_channels, s.in_height = c.height, s.in_width = c.width;
  s.out_channels = c.out_channels, s.kernel_height = c.kernel_height, s.kernel_width = c.kernel_width;
  s.out_height = out_size(c.height, c.kernel_height), s.out_width = out_size(c.width, c.kernel_width);
  s.stride_height = s.stride_width = c.stride, s.padding_height = s.padding_width = c.padding;
  s.dilation_height = s.dilation_width = c.dilation, s.groups = c.groups;
  s.relu = c.relu, s.pool = c.pool, s.weight_channels_last = c.weight_channels_last;
  return s;
}

std::string conv2d() {
  const std::vector<Conv2dCase> cases = {
      {2, 3, 7, 6, 5, 3, 3, 1, 1, 1, 1, false, false, true},     // values one by one
      {1, 16, 9, 7, 24, 3, 3, 1, 1, 1, 1, true, false, true},    // chunks of every dtype
      {1, 17, 9, 7, 19, 5, 4, 2, 2, 1, 1, true, false, false},   // strided
      {3, 8, 13, 10, 32, 3, 3, 1, 0, 1, 1, true, true, false},   // pooled, a row and a column left over
      {2, 1, 14, 13, 20, 3, 3, 1, 0, 1, 1, true, true, true},    // first layer
      {2, 6, 7, 8, 8, 3, 3, 1, 1, 2, 2, true, false, false},     // groups, dilated
      {2, 21, 6, 5, 21, 3, 3, 1, 1, 1, 21, true, false, true},   // depthwise
      {1, 8, 9, 9, 8, 3, 3, 2, 2, 2, 8, false, true, false},     // depthwise, pooled
      {3, 37, 5, 4, 41, 1, 1, 1, 0, 1, 1, false, false, false},  // 1x1
      {1, 2, 9, 11, 3, 2, 2, 4, 0, 1, 1, false, false, true},    // a stride beyond the kernel
      {5, 4, 17, 19, 4, 3, 3, 1, 1, 1, 1, false, false, true},   // sums over pixels in parts
  };
  return for_all(cases, []<class T>(Run<T> r, const Conv2dCase& c) {
    const Conv2dShape s = shape_of(c);
    const int64_t in = s.batch * s.in_channels * s.in_height * s.in_width;
    const int64_t out =
        s.batch * s.out_channels * (s.pool ? (s.out_height / 2) * (s.out_width / 2) : s.out_height * s.out_width);
    const int64_t weights = s.out_channels * s.in_channels / s.groups * s.kernel_height * s.kernel_width;
    const T *input = r.in(in), *weight = r.in(weights);
    T* output = r.out(out);
    uint8_t* winner = s.pool ? r.memory.template output<uint8_t>(out) : nullptr;
    r.kernels.conv2d_forward(s, {output, winner, input, weight, r.in(s.out_channels)});
    r.kernels.conv2d_backward(
        s, {r.out(in), r.out(weights), r.out(s.out_channels), r.in(out), input, weight, output, winner});
  });
}

std::string max_pool2d() {
  std::vector<MaxPool2dShape> shapes;
  for (const bool channels_last : {true, false})
    for (const int64_t channels : {5, 16}) {
      shapes.push_back({2, channels, {8, 4, 2, 2, 0, 1}, {7, 3, 2, 2, 0, 1}, channels_last});
      shapes.push_back({1, channels, {9, 5, 3, 2, 1, 1}, {8, 4, 3, 2, 1, 1}, channels_last});
      shapes.push_back({2, channels, {9, 5, 3, 1, 0, 2}, {11, 3, 2, 3, 0, 3}, channels_last});
      shapes.push_back({1, channels, {11, 4, 2, 3, 0, 1}, {13, 4, 3, 3, 0, 1}, channels_last});  // gaps
    }
  return for_all(shapes, []<class T>(Run<T> r, const MaxPool2dShape& s) {
    const int64_t in = s.batch * s.channels * s.y.size * s.x.size;
    const int64_t out = s.batch * s.channels * s.y.out_size * s.x.out_size;
    const T *input = r.in(in), *grad = r.in(out);
    uint8_t* winners = r.memory.template output<uint8_t>(out);
    int64_t* indices = r.memory.template output<int64_t>(out);
    r.kernels.max_pool2d_forward(s, {r.out(out), winners, nullptr, input});
    r.kernels.max_pool2d_backward(s, {r.out(in), grad, winners, nullptr});
    r.kernels.max_pool2d_forward(s, {r.out(out), nullptr, indices, input});
    r.kernels.max_pool2d_backward(s, {r.out(in), grad, nullptr, indices});
  });
}

const std::vector<SoftmaxShape> kLines = {{1, 1, 1}, {5, 10, 1}, {3, 257, 1}, {2, 7, 21}, {1, 40, 33}, {1, 5003, 1}};

std::string softmax() {
  return for_all(kLines, []<class T>(Run<T> r, const SoftmaxShape& s) {
    const int64_t count = s.outer * s.classes * s.inner;
    const T *input = r.in(count), *grad = r.in(count);
    T *output = r.out(count), *logs = r.out(count);
    r.kernels.softmax_forward(s, {output, input});
    r.kernels.softmax_backward(s, {r.out(count), grad, output});
    r.kernels.log_softmax_forward(s, {logs, input});
    r.kernels.log_softmax_backward(s, {r.out(count), grad, logs});
  });
}

// Class lines with a reduction.
struct LossCase {
  SoftmaxShape lines;
  Reduction reduction;
  int64_t samples() const { return lines.outer * lines.inner; }
  int64_t count() const { return samples() * lines.classes; }
  int64_t outputs() const { return reduction == Reduction::none ? samples() : 1; }
};

std::vector<LossCase> loss_cases() {
  std::vector<LossCase> cases = {{{6, 10, 1}, Reduction::sum}, {{1203, 11, 1}, Reduction::mean}};  // several blocks
  for (const Reduction reduction : {Reduction::none, Reduction::mean})
    for (const SoftmaxShape& lines : kLines) cases.push_back({lines, reduction});
  return cases;
}

// Class 0 is ignored, unless that could be all samples' class: their mean is NaN.
template <class T>
ClassTarget<T> class_target(Run<T>& r, const LossCase& c) {
  const int classes = static_cast<int>(c.lines.classes);
  return {r.memory.template input<int64_t>(c.samples(), 0, classes - 1), r.in(classes, 1, 3),
          c.samples() > 4 ? 0 : -100};
}

std::string cross_entropy() {
  return for_all(loss_cases(), []<class T>(Run<T> r, const LossCase& c) {
    const T *input = r.in(c.count()), *grad = r.in(c.outputs());
    for (const bool probabilities : {false, true}) {
      const CrossEntropyShape s{c.lines, c.reduction, probabilities ? 0.0 : 0.1};
      const T* given = probabilities ? r.in(c.count(), 0, 1) : nullptr;
      const ClassTarget<T> classes =
          probabilities ? ClassTarget<T>{nullptr, r.in(c.lines.classes, 1, 3), -100} : class_target(r, c);
      const CrossEntropyStatistics<T> statistics{r.sums(c.samples()), r.sums(c.samples()),
                                                 probabilities ? r.sums(c.samples()) : nullptr, r.sums(1)};
      r.kernels.cross_entropy_forward(s, {r.out(c.outputs()), statistics, input, classes, given});
      r.kernels.cross_entropy_backward(
          s, {r.out(c.count()), probabilities ? r.out(c.count()) : nullptr, grad, statistics, input, classes, given});
    }
  });
}

std::string nll_loss() {
  return for_all(loss_cases(), []<class T>(Run<T> r, const LossCase& c) {
    const NllLossShape s{c.lines, c.reduction};
    const ClassTarget<T> classes = class_target(r, c);
    Compute<T>* divisor = r.sums(1);
    r.kernels.nll_loss_forward(s, {r.out(c.outputs()), divisor, r.in(c.count()), classes});
    r.kernels.nll_loss_backward(s, {r.out(c.count()), r.in(c.outputs()), divisor, classes});
  });
}

std::string mse_loss() {
  const std::vector<MseLossShape> shapes = {
      {1, Reduction::mean}, {1037, Reduction::none}, {1037, Reduction::sum}, {40003, Reduction::mean}};
  return for_all(shapes, []<class T>(Run<T> r, const MseLossShape& s) {
    const int64_t outputs = s.reduction == Reduction::none ? s.count : 1;
    const T *input = r.in(s.count), *target = r.in(s.count), *grad = r.in(outputs);
    for (const T* weight : {static_cast<const T*>(nullptr), static_cast<const T*>(r.in(s.count, 1, 3))}) {
      Compute<T>* divisor = r.sums(1);
      r.kernels.mse_loss_forward(s, {r.out(outputs), divisor, input, target, weight});
      r.kernels.mse_loss_backward(s, {r.out(s.count), r.out(s.count), grad, divisor, input, target, weight});
    }
  });
}

std::string transpose() {
  return for_all(std::vector<TransposeShape>{{2, 33, 65}, {3, 1, 17}, {1, 70, 5}},
                 []<class T>(Run<T> r, const TransposeShape& s) {
                   const int64_t count = s.batch * s.rows * s.columns;
                   r.kernels.transpose(s, {r.out(count), r.in(count)});
                 });
}

std::string gather_images() {
  const std::vector<GatherImagesShape> shapes = {{5, 7, 3, 67, true, 255}, {4, 2, 1, 300, false, 2}};
  return for_all(shapes, []<class T>(Run<T> r, const GatherImagesShape& s) {
    const int64_t count = s.images * s.channels * s.pixels;
    const void* input = s.from_uint8 ? static_cast<const void*>(r.memory.template input<uint8_t>(count, 0, 255))
                                     : static_cast<const void*>(r.in(count));
    const int64_t* index = r.memory.template input<int64_t>(s.batch, 0, static_cast<int>(s.images) - 1);
    const bool targets = s.from_uint8;
    r.kernels.gather_images(s, {r.out(s.batch * s.channels * s.pixels), input, index,
                                targets ? r.memory.template output<int64_t>(s.batch) : nullptr,
                                targets ? r.memory.template input<int64_t>(s.images, 0, 9) : nullptr});
  });
}

std::string count_correct() {
  return for_all(
      std::vector<CountCorrectShape>{{1, 1}, {5, 3}, {300, 10}, {17, 1001}},
      []<class T>(Run<T> r, const CountCorrectShape& s) {
        const int64_t* target = r.memory.template input<int64_t>(s.batch, 0, static_cast<int>(s.classes) - 1);
        r.kernels.count_correct(s, {r.memory.template output<int64_t>(1), r.in(s.batch * s.classes), target});
      });
}

// Sizes of the tensors of one update.
using Sizes = std::vector<int64_t>;

// What a network of many small tensors and a few larger ones has; more than fit into one launch.
std::vector<Sizes> optimizer_cases() {
  Sizes many;
  for (int64_t i = 1; i <= 80; ++i) many.push_back(i % 13 + 1);
  return {{1}, {7, 1025, 4099}, many};
}

// Calls step(tensors) with a list of `make(size)` for each size.
template <class Make, class Step>
void with_list(const Sizes& sizes, const Make& make, const Step& step) {
  std::vector<decltype(make(0))> tensors;
  std::vector<int64_t> ends;
  for (const int64_t size : sizes) {
    tensors.push_back(make(size));
    ends.push_back((ends.empty() ? 0 : ends.back()) + size);
  }
  step(TensorList<decltype(make(0))>{static_cast<int64_t>(tensors.size()), tensors.data(), ends.data()});
}

std::string adam_step() {
  return for_all(optimizer_cases(), []<class T>(Run<T> r, const Sizes& sizes) {
    const double* number = r.memory.template input<double>(1, 0, 0);
    for (const bool amsgrad : {false, true})
      with_list(
          sizes,
          [&](int64_t size) {
            return AdamTensor<T>{r.updated(size),
                                 r.in(size),
                                 r.updated(size),
                                 r.updated(size, 1, 3),
                                 amsgrad ? r.updated(size, 1, 3) : nullptr,
                                 r.memory.template updated<float>(1, 0, 3),
                                 nullptr};
          },
          [&](const auto& list) {
            const double* place = amsgrad ? number : nullptr;
            r.kernels.adam_step({{0.1, place}, {0.9, place}, {0.99, place}, 1e-8, 0.1, amsgrad, amsgrad, !amsgrad},
                                list);
          });
  });
}

std::string sgd_step() {
  return for_all(optimizer_cases(), []<class T>(Run<T> r, const Sizes& sizes) {
    const double* number = r.memory.template input<double>(1, 1, 1);
    for (const bool momentum : {false, true})
      with_list(
          sizes,
          [&](int64_t size) {
            const bool first = size % 2 == 1;  // its buffer is written, never read
            T* buffer = !momentum ? nullptr : first ? r.out(size) : r.updated(size);
            return SgdTensor<T>{r.updated(size), r.in(size), buffer, momentum && first};
          },
          [&](const auto& list) {
            const double* place = momentum ? number : nullptr;
            r.kernels.sgd_step({{0.1, place}, {0.0, place}, 0, 0.1, momentum, !momentum}, list);
          });
  });
}

}  // namespace

std::vector<Case> operator_cases() {
  return {{"operator/relu", relu},
          {"operator/linear", linear},
          {"operator/conv2d", conv2d},
          {"operator/max_pool2d", max_pool2d},
          {"operator/softmax", softmax},
          {"operator/cross_entropy", cross_entropy},
          {"operator/nll_loss", nll_loss},
          {"operator/mse_loss", mse_loss},
          {"operator/transpose", transpose},
          {"operator/gather_images", gather_images},
          {"operator/count_correct", count_correct},
          {"operator/adam_step", adam_step},
          {"operator/sgd_step", sgd_step}};
}

}  // namespace fastnn::cuda::tests
