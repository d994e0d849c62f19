// The inventory of CPU kernels: one row per operator stage, filled once per ISA by cpu/kernels/table.inl.h.
#pragma once

#include "ops/batch.h"
#include "ops/conv2d.h"
#include "ops/cross_entropy.h"
#include "ops/linear.h"
#include "ops/optimizer.h"
#include "ops/max_pool2d.h"
#include "ops/mse_loss.h"
#include "ops/nll_loss.h"
#include "ops/relu.h"
#include "ops/softmax.h"

namespace fastnn::cpu {

template <class T>
struct Kernels {
  void (*linear_forward)(const LinearShape&, const LinearForward<T>&);
  void (*linear_backward)(const LinearShape&, const LinearBackward<T>&);
  void (*conv2d_forward)(const Conv2dShape&, const Conv2dForward<T>&);
  void (*conv2d_backward)(const Conv2dShape&, const Conv2dBackward<T>&);
  void (*adam_step)(const AdamOptions&, const TensorList<AdamTensor<T>>&);
  void (*sgd_step)(const SgdOptions&, const TensorList<SgdTensor<T>>&);
  void (*transpose)(const TransposeShape&, const TransposeBuffers<T>&);
  void (*gather_images)(const GatherImagesShape&, const GatherImagesBuffers<T>&);
  void (*count_correct)(const CountCorrectShape&, const CountCorrectBuffers<T>&);
  void (*max_pool2d_forward)(const MaxPool2dShape&, const MaxPool2dForward<T>&);
  void (*max_pool2d_backward)(const MaxPool2dShape&, const MaxPool2dBackward<T>&);
  int64_t (*cross_entropy_forward)(const CrossEntropyShape&, const CrossEntropyForward<T>&);
  void (*cross_entropy_backward)(const CrossEntropyShape&, const CrossEntropyBackward<T>&);
  int64_t (*nll_loss_forward)(const NllLossShape&, const NllLossForward<T>&);
  void (*nll_loss_backward)(const NllLossShape&, const NllLossBackward<T>&);
  void (*relu_forward)(const ReluShape&, const ReluForward<T>&);
  void (*relu_backward)(const ReluShape&, const ReluBackward<T>&);
  void (*softmax_forward)(const SoftmaxShape&, const SoftmaxForward<T>&);
  void (*softmax_backward)(const SoftmaxShape&, const SoftmaxBackward<T>&);
  void (*log_softmax_forward)(const SoftmaxShape&, const SoftmaxForward<T>&);
  void (*log_softmax_backward)(const SoftmaxShape&, const SoftmaxBackward<T>&);
  void (*mse_loss_forward)(const MseLossShape&, const MseLossForward<T>&);
  void (*mse_loss_backward)(const MseLossShape&, const MseLossBackward<T>&);
  void (*exponentials)(int64_t count, const T* input, T* output);
  void (*logarithms)(int64_t count, const T* input, T* output);
};

using Conv2dForwardKernel = void (*)(const Conv2dShape&, const Conv2dForward<float>&);

struct KernelTable {
  const char* isa;
  Kernels<float> float32;
  Kernels<double> float64;
};

// The table in use: the best that this CPU runs, or the one forced by FASTNN_ISA or set_isa().
const KernelTable& active_table();

template <class T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return active_table().float32;
}
template <>
inline const Kernels<double>& kernels<double>() {
  return active_table().float64;
}

// conv2d_forward whose 3x3 convolutions may round both factors to bfloat16, adding in float32. Null unless the table in
// use is avx512 and this CPU has AVX512-BF16.
Conv2dForwardKernel conv2d_forward_bf16();

// The compiled tables, plainest first.
int isa_count();
const char* isa_name(int index);
bool isa_supported(int index);   // by this CPU
bool set_isa(const char* name);  // false where the name is unknown or this CPU cannot run it

}  // namespace fastnn::cpu
