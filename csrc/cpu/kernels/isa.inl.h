// The name of the ISA that a file of cpu/isa/ is compiled for, as FASTNN_ISA, and how its kernels report themselves.
#pragma once

#include "common/trace.h"

#define FASTNN_STRING_(name) #name
#define FASTNN_STRING(name) FASTNN_STRING_(name)
#define FASTNN_CONCAT_(a, b) a##b
#define FASTNN_CONCAT(a, b) FASTNN_CONCAT_(a, b)

namespace fastnn::cpu {
namespace {

template <class T>
inline void trace(const char* operation, const char* variant) {
  trace_kernel({operation, variant, FASTNN_STRING(FASTNN_ISA), sizeof(T) == 4 ? "float32" : "float64", kCpuDevice});
}

}  // namespace
}  // namespace fastnn::cpu
