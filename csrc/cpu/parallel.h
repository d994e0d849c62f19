// The only threading code of the CPU kernels: OpenMP loops over a fixed list of tasks.
//
// Kernels must give the same bits for every thread count. So a task never depends on which thread runs it:
// tasks are cut from the shape alone, and a reduction over tasks adds their partial results in task order.
#pragma once

#include <omp.h>

#include <cstdint>

namespace fastnn::cpu {

// Threads the next region may use: torch.set_num_threads()'s value, or 1 in a forked child (whose copy of
// the OpenMP pool has no threads and would hang) and inside another region.
int max_threads();

// Path of the OpenMP runtime that this module is bound to.
const char* openmp_library();

namespace {  // this header is compiled for several ISAs: nothing in it may be shared between objects

// body(task) for every task in [0, tasks), in contiguous runs of tasks per thread.
template <class Body>
inline void parallel_for(int64_t tasks, const Body& body) {
  int64_t threads = max_threads();
  if (threads > tasks) threads = tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

// body(task, thread) for every task, a free thread taking the next one; 0 <= thread < max_threads() picks scratch memory.
template <class Body>
inline void parallel_tasks(int64_t tasks, const Body& body) {
  int64_t threads = max_threads();
  if (threads > tasks) threads = tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads))
  for (int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
}

// Elements [begin, end) of a flat loop, in runs of at least `grain`: body(begin, end).
template <class Body>
inline void parallel_ranges(int64_t count, int64_t grain, const Body& body) {
  const int64_t tasks = (count + grain - 1) / grain;
  parallel_for(tasks, [&](int64_t task) {
    const int64_t begin = task * grain;
    body(begin, begin + grain < count ? begin + grain : count);
  });
}

}  // namespace
}  // namespace fastnn::cpu
