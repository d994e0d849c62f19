// Every kernel, for the compiler's default target: x86-64 with SSE2, or aarch64 with NEON.
#define FASTNN_ISA baseline
#include "cpu/kernels/table.inl.h"
