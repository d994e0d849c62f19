// What AVX512-BF16 adds to the avx512 table: conv2d_forward with products in bfloat16.
#define FASTNN_ISA avx512
#include "cpu/kernel_table.h"
#include "cpu/kernels/isa.inl.h"
#include "cpu/kernels/conv2d.inl.h"
#include "cpu/kernels/conv2d_winograd_bf16.inl.h"

namespace fastnn::cpu {

extern const KernelTable kernel_table_avx512;

namespace {

// In bfloat16 where Winograd serves, with its few points; the rest is the table's.
void conv2d_forward_bf16_products(const Conv2dShape& as_given, const Conv2dForward<float>& t) {
  const Conv2dShape s = as_computed<float>(as_given);
  const Scratch<int64_t> tap_places(2 * kernel_taps(s));
  const GatherConv<float> all_groups = forward_conv(s, t, tap_places);
  const AloneIfSmall scope(multiply_adds(s));
  if (!winograd_forward<float, Bf16Products>(s, t, all_groups)) kernel_table_avx512.float32.conv2d_forward(as_given, t);
}

}  // namespace

extern const Conv2dForwardKernel conv2d_forward_avx512_bf16;
const Conv2dForwardKernel conv2d_forward_avx512_bf16 = conv2d_forward_bf16_products;

}  // namespace fastnn::cpu
