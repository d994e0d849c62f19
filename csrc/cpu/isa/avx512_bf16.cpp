// What AVX512-BF16 adds to the avx512 table: conv2d_forward with products in bfloat16.
#define FASTNN_ISA avx512
#include "cpu/kernel_table.h"
#include "cpu/kernels/isa.inl.h"
#include "cpu/kernels/conv2d.inl.h"
#include "cpu/kernels/conv2d_winograd_bf16.inl.h"

namespace fastnn::cpu {

extern const Conv2dForwardKernel conv2d_forward_avx512_bf16;
const Conv2dForwardKernel conv2d_forward_avx512_bf16 = conv2d_forward<float, Bf16Products>;

}  // namespace fastnn::cpu
