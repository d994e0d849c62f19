// Every kernel, for x86-64-v3: AVX2 and FMA.
#define FASTNN_ISA avx2
#include "cpu/kernels/table.inl.h"
