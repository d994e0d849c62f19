// The inventory of CUDA kernels, under the names of cpu/kernel_table.h. Plain C++: bindings include it.
//
// T is float, double, bfloat16 or float16. Buffers are device memory. A call launches on the queue's stream and returns
// without waiting; it throws std::runtime_error where a launch fails.
#pragma once

#include "cuda/queue.h"
#include "ops/batch.h"
#include "ops/conv2d.h"
#include "ops/cross_entropy.h"
#include "ops/dtype.h"
#include "ops/linear.h"
#include "ops/max_pool2d.h"
#include "ops/mse_loss.h"
#include "ops/nll_loss.h"
#include "ops/optimizer.h"
#include "ops/relu.h"
#include "ops/softmax.h"

namespace fastnn::cuda {

template <class T>
class Kernels {
 public:
  explicit Kernels(const Queue& queue) : queue_(queue) {}

  void linear_forward(const LinearShape&, const LinearForward<T>&) const;
  void linear_backward(const LinearShape&, const LinearBackward<T>&) const;
  void conv2d_forward(const Conv2dShape&, const Conv2dForward<T>&) const;
  void conv2d_backward(const Conv2dShape&, const Conv2dBackward<T>&) const;
  void adam_step(const AdamOptions&, const TensorList<AdamTensor<T>>&) const;
  void sgd_step(const SgdOptions&, const TensorList<SgdTensor<T>>&) const;
  void transpose(const TransposeShape&, const TransposeBuffers<T>&) const;
  void gather_images(const GatherImagesShape&, const GatherImagesBuffers<T>&) const;
  void count_correct(const CountCorrectShape&, const CountCorrectBuffers<T>&) const;
  void max_pool2d_forward(const MaxPool2dShape&, const MaxPool2dForward<T>&) const;
  void max_pool2d_backward(const MaxPool2dShape&, const MaxPool2dBackward<T>&) const;
  // A class outside the range stops the kernel, as in torch: on the CPU these return the sample instead.
  int64_t cross_entropy_forward(const CrossEntropyShape&, const CrossEntropyForward<T>&) const;
  void cross_entropy_backward(const CrossEntropyShape&, const CrossEntropyBackward<T>&) const;
  int64_t nll_loss_forward(const NllLossShape&, const NllLossForward<T>&) const;
  void nll_loss_backward(const NllLossShape&, const NllLossBackward<T>&) const;
  void relu_forward(const ReluShape&, const ReluForward<T>&) const;
  void relu_backward(const ReluShape&, const ReluBackward<T>&) const;
  void softmax_forward(const SoftmaxShape&, const SoftmaxForward<T>&) const;
  void softmax_backward(const SoftmaxShape&, const SoftmaxBackward<T>&) const;
  void log_softmax_forward(const SoftmaxShape&, const SoftmaxForward<T>&) const;
  void log_softmax_backward(const SoftmaxShape&, const SoftmaxBackward<T>&) const;
  void mse_loss_forward(const MseLossShape&, const MseLossForward<T>&) const;
  void mse_loss_backward(const MseLossShape&, const MseLossBackward<T>&) const;

 private:
  Queue queue_;
};

}  // namespace fastnn::cuda
