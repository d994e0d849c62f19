#include "cuda/emulator/emulator.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <random>

namespace fastnn::cuda::emulator {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;  // instrumented frames are several times as large
#else
constexpr size_t kStack = 64 << 10;
#endif

std::mutex error_mutex;
std::string error, taken_error;

// The thread that runs after the current one: itself where no other can.
Thread& pick() {
  if (schedule.order == Order::greedy) {
    const unsigned first = thread->number / kWarp * kWarp;
    for (unsigned k = 1; k < kWarp; ++k) {
      const unsigned i = first + (thread->number - first + k) % kWarp;
      if (i < block->threads.size() && !block->threads[i].done && !block->threads[i].at_barrier)
        return block->threads[i];
    }
  }
  unsigned next = thread->next;
  while (block->threads[next].done) next = block->threads[next].next;
  return block->threads[next];
}

void resume(Thread& other) {
  Thread* self = thread;
  thread = &other;
  self->fiber.switch_to(other.fiber);
}

// Runs others until `ready`; when none gets on for two rounds, the block is deadlocked.
template <class Ready>
void wait_until(Ready ready) {
  uint64_t seen = block->progress;
  size_t idle = 0;
  while (!ready()) {
    if (block->progress != seen) {
      seen = block->progress;
      idle = 0;
    } else if (++idle > 2 * block->threads.size()) {
      const dim3 b = block->index;
      fail("deadlock: thread " + std::to_string(thread->number) + " of block (" + std::to_string(b.x) + ", " +
           std::to_string(b.y) + ", " + std::to_string(b.z) + ") waits for threads that never come");
    }
    Thread& other = pick();
    if (&other != thread) resume(other);
  }
}

void open_barrier_if_all_came() {
  if (block->live == 0 || block->arrived != block->live) return;
  block->arrived = 0;
  ++block->generation;
  ++block->progress;
  for (Thread& t : block->threads) t.at_barrier = false;
}

void thread_main() {
  thread->fiber.entered(block->caller);
  for (;;) {
    (*block->body)();
    thread->done = true;
    --block->live;
    ++block->progress;
    block->warps[thread->number / kWarp].live &= ~(1u << lane());
    open_barrier_if_all_came();
    if (block->live == 0) {
      Thread* self = thread;
      thread = nullptr;
      self->fiber.switch_to(block->caller);
    } else {
      resume(pick());
    }
  }
}

std::vector<unsigned> thread_order(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = schedule.order == Order::reverse ? count - 1 - i : i;
  if (schedule.order == Order::random)
    std::shuffle(order.begin(), order.end(), std::mt19937(schedule.seed + block->index.x));
  return order;
}

void run_block(Block& b, const std::function<void()>& body) {
  const unsigned count = b.size.x * b.size.y * b.size.z;
  block = &b;
  if (b.threads.size() != count) {
    b.stacks.reset(new char[count * kStack]);
    b.threads.assign(count, Thread{});
    for (unsigned i = 0; i < count; ++i) b.threads[i].fiber.prepare(&b.stacks[i * kStack], kStack, thread_main);
  }
  const std::vector<unsigned> order = thread_order(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = b.threads[order[i]];
    t.number = order[i], t.next = order[(i + 1) % count];
    t.index = dim3(t.number % b.size.x, t.number / b.size.x % b.size.y, t.number / (b.size.x * b.size.y));
    t.done = t.at_barrier = false;
    t.open.clear(), t.groups.clear();
  }
  b.warps.resize((count + kWarp - 1) / kWarp);
  for (unsigned w = 0; w < b.warps.size(); ++w) {
    const unsigned lanes = count - kWarp * w;
    b.warps[w].arrived = 0;
    b.warps[w].live = lanes >= kWarp ? ~0u : (1u << lanes) - 1;
  }
  b.live = count, b.arrived = 0, b.body = &body;
  thread = &b.threads[order[0]];
  b.caller.switch_to(thread->fiber);
}

}  // namespace

void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
#pragma omp parallel
  {
    Block b;
    b.size = size, b.grid = grid;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < blocks; ++i) {
      b.index = dim3(i % grid.x, i / grid.x % grid.y, i / (int64_t{grid.x} * grid.y));
      b.shared.assign(shared_bytes + 16, 0xFF);  // all ones are NaN in every floating-point format
      run_block(b, kernel);
    }
  }
}

const char* take_error() {
  const std::lock_guard<std::mutex> lock(error_mutex);
  taken_error.swap(error);
  error.clear();
  return taken_error.empty() ? nullptr : taken_error.c_str();
}

// Ends the block: its threads are made anew for the next one.
void fail(const std::string& message) {
  {
    const std::lock_guard<std::mutex> lock(error_mutex);
    if (error.empty()) error = message;
  }
  Thread* self = thread;
  Block* b = block;
  thread = nullptr;
  for (size_t i = 0; i < b->threads.size(); ++i)
    if (&b->threads[i] != self) b->threads[i].fiber.prepare(&b->stacks[i * kStack], kStack, thread_main);
  Fiber abandoned;
  self->fiber.prepare(&b->stacks[self->number * kStack], kStack, thread_main);
  abandoned.switch_to(b->caller);
  __builtin_unreachable();
}

void* shared_memory() {
  const uintptr_t address = reinterpret_cast<uintptr_t>(block->shared.data());
  return reinterpret_cast<void*>((address + 15) & ~uintptr_t{15});
}

void sync_block() {
  const unsigned generation = block->generation;
  ++block->arrived;
  ++block->progress;
  thread->at_barrier = true;
  open_barrier_if_all_came();
  wait_until([&] { return block->generation != generation; });
  thread->at_barrier = false;
}

Slots collective(const void* in, size_t words, uint32_t mask, void (*combine)(Slots)) {
  Warp& w = block->warps[thread->number / kWarp];
  const uint32_t generation = w.generation;
  const Slots slots = w.slots[generation & 1];
  std::memcpy(slots[lane()], in, words * 4);
  w.arrived |= 1u << lane();
  ++block->progress;
  const uint32_t expected = mask & w.live;
  if ((w.arrived & expected) == expected) {
    if (combine) combine(slots);
    w.arrived = 0;
    ++w.generation;
    ++block->progress;
  } else {
    wait_until([&] { return w.generation != generation; });
  }
  return slots;
}

void copy_async(void* to, const void* from, int size, bool valid) {
  Copy copy{to, {}, size};
  if (valid) std::memcpy(copy.bytes, from, size);
  if (schedule.eager_copies)
    std::memcpy(to, copy.bytes, size);
  else
    thread->open.push_back(copy);
}

void commit_copies() {
  thread->groups.push_back(std::move(thread->open));
  thread->open.clear();
}

void wait_for_copies(size_t groups_left) {
  std::vector<std::vector<Copy>>& groups = thread->groups;
  const size_t landed = groups.size() > groups_left ? groups.size() - groups_left : 0;
  for (size_t i = 0; i < landed; ++i)
    for (const Copy& copy : groups[i]) std::memcpy(copy.to, copy.bytes, copy.size);
  groups.erase(groups.begin(), groups.begin() + landed);
}

}  // namespace fastnn::cuda::emulator
