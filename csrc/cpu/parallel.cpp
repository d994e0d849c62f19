// Threads. A loop's tasks are cut into one range a thread, so that consecutive loops over the same images find them in
// the same cores' caches; a thread that is done helps with the others' ranges, from their ends, which are the same
// tasks each time. Two crews run them:
//
//   OpenMP      the pool that torch's own operators use, for single operators between torch's: two pools side by side
//               would fight for cores, since OpenMP's threads spin for a while after each region
//   own threads for compiled training steps, whose loops follow each other without torch between them
//
// OpenMP ends a region with a barrier of all its threads, also those that found no task. When another process holds a
// core, the barrier waits for a thread that is not running, while the others spin: training collapses to a fraction. A
// crew of our own needs no such wait: whoever runs takes the tasks, and the region ends when no claimed task is left.
#include "cpu/parallel.h"

#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/scratch.h"

namespace fastnn::cpu {
namespace {

bool forked_child = false;
[[maybe_unused]] const int fork_hook = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });

thread_local bool in_task = false;
thread_local bool use_own_threads = false;
thread_local bool alone = false;

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What is left of one thread's range of tasks.
class alignas(64) Range {
 public:
  struct Run {
    int64_t begin, end;
  };

  Range(int64_t begin, int64_t end) : left_{{static_cast<uint32_t>(begin), static_cast<uint32_t>(end)}} {}

  // An eighth of what is left: the first tasks for the thread whose range it is, the last ones for another. Large runs
  // cost few claims, and small ones at the end even out what other processes take.
  Run claim(bool own) {
    Left left = left_.load(std::memory_order_relaxed), rest;
    do {
      const uint32_t run = (left.end - left.begin + 7) / 8;
      rest = own ? Left{left.begin + run, left.end} : Left{left.begin, left.end - run};
    } while (!left_.compare_exchange_weak(left, rest, std::memory_order_relaxed));
    return own ? Run{left.begin, rest.begin} : Run{rest.end, left.end};
  }

 private:
  struct alignas(8) Left {  // or Clang calls libatomic
    uint32_t begin, end;
  };
  std::atomic<Left> left_;
};

// One parallel loop.
struct Loop {
  int64_t tasks, unit;  // a claim counts in units of so many tasks
  int threads;
  Work work;
  const void* context;
  Range* ranges;  // one a thread
  std::atomic_flag failed{};
  std::exception_ptr failure{};  // the first one: none leaves a thread

  void take_part(int thread) {
    in_task = true;
    for (int i = 0; i < threads; ++i) {
      Range& range = ranges[(thread + i) % threads];
      for (;;) {
        const auto [begin, end] = range.claim(i == 0);
        if (begin == end) break;
        try {
          work(context, begin * unit, std::min(end * unit, tasks), thread);
        } catch (...) {
          if (!failed.test_and_set()) failure = std::current_exception();
        }
      }
    }
    in_task = false;
  }
};

// Our own threads. One loop at a time; a caller that finds the crew busy works alone.
//
// A worker enters a loop by raising `inside` and then looking whether a loop is open; the owner closes the loop and
// then waits for `inside` to fall to 0. Both orders are sequentially consistent, so either the worker sees the loop
// closed and leaves without touching it, or the owner sees the worker and waits.
class Crew {
 public:
  // False where the crew serves another caller.
  bool run(Loop& loop) {
    const std::unique_lock<std::mutex> lock(owner_, std::try_to_lock);
    if (!lock) return false;
    while (static_cast<int>(workers_.size()) < loop.threads - 1) {
      const int thread = static_cast<int>(workers_.size()) + 1;
      workers_.emplace_back([this, thread] { serve(thread); });
      workers_.back().detach();
    }
    open_.store(&loop);
    round_.fetch_add(1);
    round_.notify_all();
    loop.take_part(0);
    open_.store(nullptr);
    for (int spins = 0; inside_.load() != 0; ++spins) wait_a_moment(spins);
    return true;
  }

 private:
  // A thread that waits first spins, some 20 microseconds, then offers its core to whoever wants it. A worker that
  // found nothing for some 500 microseconds - longer than the gaps in a training step - sleeps: waking it costs as much
  // as a loop.
  static constexpr int kSpins = 500;
  static constexpr int kWaits = 1500;

  static void wait_a_moment(int waited) {
    if (waited < kSpins)
      pause_briefly();
    else
      sched_yield();
  }

  void serve(int thread) {
    uint32_t seen = 0;
    for (;;) {
      for (int waited = 0; round_.load(std::memory_order_relaxed) == seen && waited < kWaits; ++waited)
        wait_a_moment(waited);
      round_.wait(seen);
      seen = round_.load();
      inside_.fetch_add(1);
      Loop* loop = open_.load();
      if (loop && thread < loop->threads) loop->take_part(thread);
      inside_.fetch_sub(1);
    }
  }

  std::mutex owner_;
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<Loop*> open_{nullptr};
  alignas(64) std::atomic<int> inside_{0};
};

Crew& crew() {
  static Crew* const instance = new Crew;  // never destroyed: its threads outlive static destruction
  return *instance;
}

}  // namespace

int max_threads() { return forked_child || in_task || alone || omp_in_parallel() ? 1 : omp_get_max_threads(); }

int set_openmp_threads(int threads) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(threads);
  return before;
}

const char* openmp_library() {
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) ? info.dli_fname : "unknown";
}

void run_tasks(int64_t tasks, Work work, const void* context) {
  const int threads = static_cast<int>(std::min<int64_t>(max_threads(), tasks));
  if (threads <= 1) {
    if (tasks > 0) work(context, 0, tasks, 0);
    return;
  }
  const Scratch<Range> ranges(threads);
  const int64_t unit = tasks / UINT32_MAX + 1, units = (tasks + unit - 1) / unit;
  for (int i = 0; i < threads; ++i) new (&ranges[i]) Range(units * i / threads, units * (i + 1) / threads);
  Loop loop{.tasks = tasks, .unit = unit, .threads = threads, .work = work, .context = context, .ranges = ranges};
  if (!use_own_threads) {
#pragma omp parallel num_threads(threads)
    loop.take_part(omp_get_thread_num());
  } else if (!crew().run(loop)) {
    return work(context, 0, tasks, 0);
  }
  if (loop.failure) std::rethrow_exception(loop.failure);
}

bool set_own_threads(bool own) { return std::exchange(use_own_threads, own); }

bool set_alone(bool value) { return std::exchange(alone, value); }

}  // namespace fastnn::cpu
