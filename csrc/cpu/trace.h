// A record of the kernels that ran, for explain_dispatch() and for tests that prove which ISA served a call.
#pragma once

namespace fastnn::cpu {

struct TraceRecord {
  const char* operation;  // "linear_forward"
  const char* variant;    // "dot"
  const char* isa;        // of the object file that the kernel was compiled into
  const char* dtype;      // "float32"
};

void trace_kernel(const char* operation, const char* variant, const char* isa, const char* dtype);

void trace_start();
// Stops recording and hands each record to visit(record, context) in order.
void trace_stop(void (*visit)(const TraceRecord& record, void* context), void* context);

}  // namespace fastnn::cpu
