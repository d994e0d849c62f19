// The interface to threads: loops over a fixed list of tasks. cpu/parallel.cpp is the only threading code.
//
// Kernels must give the same bits for every thread count. So a task never depends on which thread runs it: tasks are
// cut from the shape alone, and a reduction over tasks adds their partial results in task order.
#pragma once

#include <cstdint>

namespace fastnn::cpu {

// Threads that the next loop may use: torch.set_num_threads()'s value; 1 in a forked child, which has no threads but
// its own, and inside a task.
int max_threads();

// Threads that OpenMP's loops have from here on where the calling thread starts them, torch's among them; returns how
// many they had before.
int set_openmp_threads(int threads);

// Path of the OpenMP runtime that this module is bound to.
const char* openmp_library();

// work(context, begin, end, thread) over runs of tasks until all of [0, tasks) are done; a free thread takes the next
// run. 0 <= thread < max_threads() picks scratch memory. What a task throws is thrown when the loop has ended, the
// first of several.
using Work = void (*)(const void* context, int64_t begin, int64_t end, int thread);
void run_tasks(int64_t tasks, Work work, const void* context);

// Whether loops of this thread run on fastnn's own threads instead of OpenMP's (see parallel.cpp); returns what was
// before.
bool set_own_threads(bool own);

// Whether loops of this thread run on it alone; returns what was before.
bool set_alone(bool alone);

// Multiply-adds below which an operator runs on one thread: some 2 us, twice what its loops cost when the other threads
// are waiting for them, and nothing beside what they cost when another process holds a core.
constexpr int64_t kSmallWork = 1 << 16;

namespace {  // this header is compiled for several ISAs: no template of it may be shared between objects

// While it lives, loops of this thread run on it alone if the work is small.
class AloneIfSmall {
 public:
  explicit AloneIfSmall(int64_t multiply_adds)
      : small_(multiply_adds < kSmallWork), before_(small_ ? set_alone(true) : false) {}
  ~AloneIfSmall() {
    if (small_) set_alone(before_);
  }
  AloneIfSmall(const AloneIfSmall&) = delete;
  AloneIfSmall& operator=(const AloneIfSmall&) = delete;

 private:
  const bool small_, before_;
};

// body(task, thread) for every task.
template <class Body>
inline void parallel_tasks(int64_t tasks, const Body& body) {
  const Work work = [](const void* context, int64_t begin, int64_t end, int thread) {
    const Body& each = *static_cast<const Body*>(context);
    for (int64_t task = begin; task < end; ++task) each(task, thread);
  };
  run_tasks(tasks, work, &body);
}

// body(task) for every task.
template <class Body>
inline void parallel_for(int64_t tasks, const Body& body) {
  parallel_tasks(tasks, [&](int64_t task, int) { body(task); });
}

// The order of a product's tasks: blocks of rows times parts of columns. Tasks that follow each other are one thread's.
// By columns it stays with the weights of a part, which it has packed or transformed before, else with its rows: what
// is larger should not change hands.
struct TaskOrder {
  int64_t blocks, parts;
  bool by_columns;
  int64_t tasks() const { return blocks * parts; }
  int64_t block(int64_t task) const { return by_columns ? task % blocks : task / parts; }
  int64_t part(int64_t task) const { return by_columns ? task / blocks : task % parts; }
};

// Elements [begin, end) of a flat loop, in runs of `grain`: body(begin, end).
template <class Body>
inline void parallel_ranges(int64_t count, int64_t grain, const Body& body) {
  parallel_for((count + grain - 1) / grain, [&](int64_t task) {
    const int64_t begin = task * grain;
    body(begin, begin + grain < count ? begin + grain : count);
  });
}

}  // namespace
}  // namespace fastnn::cpu
