#include "cpu/parallel.h"

#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>

namespace fastnn::cpu {
namespace {

bool forked_child = false;
[[maybe_unused]] const int fork_hook = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });

}  // namespace

int max_threads() { return forked_child || omp_in_parallel() ? 1 : omp_get_max_threads(); }

const char* openmp_library() {
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) ? info.dli_fname : "unknown";
}

}  // namespace fastnn::cpu
