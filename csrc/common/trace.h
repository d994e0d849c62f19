// A record of the kernels that ran, for explain_dispatch() and for tests that prove which kernel, ISA and device served
// a call.
#pragma once

namespace fastnn {

constexpr int kCpuDevice = -1;

struct TraceRecord {
  const char* operation;  // "linear_forward"
  const char* variant;    // "dot"
  const char* isa;        // of the object file that the kernel was compiled into; "sm_90"
  const char* dtype;      // "float32"
  int device;             // kCpuDevice, or the CUDA device's index
};

void trace_kernel(const TraceRecord& record);

void trace_start();
// Stops recording and hands each record to visit(record, context) in order.
void trace_stop(void (*visit)(const TraceRecord& record, void* context), void* context);

}  // namespace fastnn
