// Every kernel, for x86-64-v4: AVX-512 F, BW, CD, DQ, VL.
#define FASTNN_ISA avx512
#include "cpu/kernels/table.inl.h"
