// The kernel table of one ISA. Included once by each file of cpu/isa/, which defines FASTNN_ISA.
//
// Everything but the table itself is in an anonymous namespace and no std:: template is used: a weak symbol
// compiled for AVX-512 here could otherwise be the copy that the linker keeps for baseline code.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/isa.inl.h"
#include "cpu/kernels/batch.inl.h"
#include "cpu/kernels/conv2d.inl.h"
#include "cpu/kernels/cross_entropy.inl.h"
#include "cpu/kernels/linear.inl.h"
#include "cpu/kernels/optimizer.inl.h"
#include "cpu/kernels/max_pool2d.inl.h"
#include "cpu/kernels/mse_loss.inl.h"
#include "cpu/kernels/nll_loss.inl.h"
#include "cpu/kernels/relu.inl.h"
#include "cpu/kernels/softmax.inl.h"

namespace fastnn::cpu {
namespace {

template <class T>
constexpr Kernels<T> kernels_of_isa() {
  return {
      .linear_forward = linear_forward<T>,
      .linear_backward = linear_backward<T>,
      .conv2d_forward = conv2d_forward<T>,
      .conv2d_backward = conv2d_backward<T>,
      .adam_step = adam_step<T>,
      .sgd_step = sgd_step<T>,
      .transpose = transpose_batch<T>,
      .gather_images = gather_images<T>,
      .count_correct = count_correct<T>,
      .max_pool2d_forward = max_pool2d_forward<T>,
      .max_pool2d_backward = max_pool2d_backward<T>,
      .cross_entropy_forward = cross_entropy_forward<T>,
      .cross_entropy_backward = cross_entropy_backward<T>,
      .nll_loss_forward = nll_loss_forward<T>,
      .nll_loss_backward = nll_loss_backward<T>,
      .relu_forward = relu_forward<T>,
      .relu_backward = relu_backward<T>,
      .softmax_forward = softmax_forward<T>,
      .softmax_backward = softmax_backward<T>,
      .log_softmax_forward = log_softmax_forward<T>,
      .log_softmax_backward = log_softmax_backward<T>,
      .mse_loss_forward = mse_loss_forward<T>,
      .mse_loss_backward = mse_loss_backward<T>,
      .exponentials = exponentials<T>,
      .logarithms = logarithms<T>,
  };
}

}  // namespace

extern const KernelTable FASTNN_CONCAT(kernel_table_, FASTNN_ISA);
const KernelTable FASTNN_CONCAT(kernel_table_, FASTNN_ISA) = {
    FASTNN_STRING(FASTNN_ISA),
    kernels_of_isa<float>(),
    kernels_of_isa<double>(),
};

}  // namespace fastnn::cpu
