// Picks the kernel table when the module loads: that of the best ISA that this CPU runs.
#include <atomic>
#include <cstring>

#include "cpu/kernel_table.h"

namespace fastnn::cpu {

extern const KernelTable kernel_table_baseline;
#ifdef FASTNN_X86_ISAS
extern const KernelTable kernel_table_avx2;
extern const KernelTable kernel_table_avx512;
extern const Conv2dForwardKernel conv2d_forward_avx512_bf16;
#endif

namespace {

struct Isa {
  const KernelTable* table;
  bool (*supported)();
};

#ifdef FASTNN_X86_ISAS
// The features of x86-64-v3 and v4 that tell processors apart: clang knows the levels' names only from version 18 on.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Isa isas[] = {
    {&kernel_table_baseline, [] { return true; }},
#ifdef FASTNN_X86_ISAS
    {&kernel_table_avx2, has_avx2},
    {&kernel_table_avx512, has_avx512},
#endif
};

const KernelTable* best_table() {
  const KernelTable* best = isas[0].table;
  for (const Isa& isa : isas)
    if (isa.supported()) best = isa.table;
  return best;
}

std::atomic<const KernelTable*> active{best_table()};

}  // namespace

const KernelTable& active_table() { return *active.load(std::memory_order_relaxed); }

Conv2dForwardKernel conv2d_forward_bf16() {
#ifdef FASTNN_X86_ISAS
  if (&active_table() == &kernel_table_avx512 && __builtin_cpu_supports("avx512bf16"))
    return conv2d_forward_avx512_bf16;
#endif
  return nullptr;
}

int isa_count() { return static_cast<int>(sizeof(isas) / sizeof(isas[0])); }
const char* isa_name(int index) { return isas[index].table->isa; }
bool isa_supported(int index) { return isas[index].supported(); }

bool set_isa(const char* name) {
  for (const Isa& isa : isas) {
    if (std::strcmp(isa.table->isa, name) == 0 && isa.supported()) {
      active = isa.table;
      return true;
    }
  }
  return false;
}

}  // namespace fastnn::cpu
