#include "cuda/emulator/emulator.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>

namespace fastnn::cuda::emulator {
namespace {

#ifdef FASTNN_ASAN
constexpr size_t kStack = 256 << 10;  // instrumented frames are several times as large
constexpr size_t kGuard = 0;          // the sanitizer knows where shared memory ends, and sees reads as well
#else
constexpr size_t kStack = 64 << 10;
constexpr size_t kGuard = 256;  // a multiple of 16, which shared memory is aligned to
#endif

// All ones are NaN in every floating-point format.
constexpr unsigned char kPoison = 0xFF;

struct Failure {};  // unwinds a thread of a block that has an error

std::string name_of(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

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
  other.fiber.enter(self->fiber);
}

// Runs others until `ready`; when none gets on for two rounds, the block is deadlocked.
template <class Ready>
void wait_until(Ready ready) {
  uint64_t seen = block->progress;
  size_t idle = 0;
  while (!ready()) {
    if (!block->error.empty()) throw Failure();
    if (block->progress != seen) {
      seen = block->progress;
      idle = 0;
    } else if (++idle > 2 * block->threads.size()) {
      fail("deadlock: thread " + std::to_string(thread->number) + " waits for threads that never come");
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
  thread->fiber.arrive();
  try {
    if (block->error.empty()) (*block->body)();
  } catch (const Failure&) {
  }
  Thread* self = thread;
  self->done = true;
  --block->live;
  ++block->progress;
  open_barrier_if_all_came();
  if (block->live > 0) thread = &pick();
  (block->live > 0 ? thread->fiber : block->caller).enter_last(self->fiber);
}

std::vector<unsigned> thread_order(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = schedule.order == Order::reverse ? count - 1 - i : i;
  if (schedule.order == Order::random)
    std::shuffle(order.begin(), order.end(), std::mt19937(schedule.seed + block->index.x));
  return order;
}

void check_guards() {
  const auto is_poison = [](unsigned char byte) { return byte == kPoison; };
  const std::vector<unsigned char>& shared = block->shared;
  if (!std::all_of(shared.begin(), shared.begin() + kGuard, is_poison) ||
      !std::all_of(shared.end() - kGuard, shared.end(), is_poison))
    block->error = "a write outside of shared memory";
}

void run_block(const std::function<void()>& body, size_t shared_bytes) {
  Block& b = *block;
  const unsigned count = b.size.x * b.size.y * b.size.z;
  b.shared.assign(kGuard + shared_bytes + kGuard, kPoison);
  b.threads.resize(count);
  const std::vector<unsigned> order = thread_order(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = b.threads[order[i]];
    t.number = order[i], t.next = order[(i + 1) % count];
    t.index = dim3(t.number % b.size.x, t.number / b.size.x % b.size.y, t.number / (b.size.x * b.size.y));
    t.done = t.at_barrier = t.begun = false;
    t.open.clear(), t.groups.clear();
    t.fiber.prepare(&b.stacks[t.number * kStack], kStack, thread_main);
  }
  b.warps.resize((count + kWarp - 1) / kWarp);
  for (Warp& w : b.warps) w.arrived = 0;
  b.live = count, b.arrived = 0, b.body = &body;
  b.error.clear();
  thread = &b.threads[order[0]];
  thread->fiber.enter(b.caller);
  if (b.error.empty()) check_guards();
}

// What a launch of more would be answered with.
const char* limit_exceeded(dim3 grid, dim3 size, size_t shared_bytes) {
  if (int64_t{size.x} * size.y * size.z > 1024) return "more than 1024 threads in a block";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "a grid of more than 2^31 - 1, 65535, 65535";
  if (shared_bytes > most_shared_bytes()) return "more shared memory than devices have";
  return nullptr;
}

}  // namespace

void launch(const char* operation, dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  std::string error;
  if (const char* limit = limit_exceeded(grid, size, shared_bytes)) error = limit;
  const int64_t blocks = error.empty() ? int64_t{grid.x} * grid.y * grid.z : 0;
#pragma omp parallel if (blocks > 1)
  {
    static thread_local Block b;  // kept: stacks anew would cost more than most launches
    b.size = size, b.grid = grid;
    const unsigned count = size.x * size.y * size.z;
    if (b.stack_count < count) b.stacks.reset(new char[count * kStack]), b.stack_count = count;
    block = &b;
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < blocks; ++n) {
      const int64_t i = schedule.order == Order::reverse ? blocks - 1 - n : n;
      b.index = dim3(i % grid.x, i / grid.x % grid.y, i / (int64_t{grid.x} * grid.y));
      run_block(kernel, shared_bytes);
      if (b.error.empty()) continue;
#pragma omp critical(fastnn_emulator_error)
      if (error.empty()) error = b.error + " (block " + name_of(b.index) + ")";
    }
  }
  if (!error.empty()) throw std::runtime_error(std::string(operation) + ": " + error);
}

void fail(const std::string& message) {
  if (block->error.empty()) block->error = message;
  throw Failure();
}

void* shared_memory() { return block->shared.data() + kGuard; }

void sync_block(int line) {
  if (block->arrived > 0 && block->barrier_line != line)
    fail("threads wait at different barriers, of lines " + std::to_string(block->barrier_line) + " and " +
         std::to_string(line));
  block->barrier_line = line;
  const unsigned generation = block->generation;
  ++block->arrived;
  ++block->progress;
  thread->at_barrier = true;
  open_barrier_if_all_came();
  wait_until([&] { return block->generation != generation; });
}

Slots collective(const void* in, size_t words, Combine combine) {
  Warp& w = block->warps[thread->number / kWarp];
  if (w.arrived != 0 && (w.words != words || w.combine != combine)) fail("lanes of a warp are at different operations");
  w.words = words, w.combine = combine;
  const uint32_t generation = w.generation;
  const Slots slots = w.slots[generation & 1];
  std::memcpy(slots[lane()], in, words * 4);
  w.arrived |= 1u << lane();
  ++block->progress;
  if (w.arrived == ~0u) {
    if (combine) combine(slots);
    w.arrived = 0;
    ++w.generation;
    ++block->progress;
  } else {
    wait_until([&] { return w.generation != generation; });
  }
  return slots;
}

namespace {

// Aligned bytes of shared memory, as many as their alignment.
void check_shared(const void* place, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(place);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(shared_memory());
  if (address % bytes != 0) fail("shared memory that is not aligned to the bytes that are moved");
  if (address < begin || address + bytes > begin + block->shared.size() - 2 * kGuard)
    fail("bytes outside of shared memory");
}

void land(const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, copy.bytes);
  else
    std::memset(copy.to, 0, copy.bytes);
}

}  // namespace

Slots exchange_rows(const void* row) {
  check_shared(row, 16);
  uint32_t words[4];
  std::memcpy(words, row, 16);
  return collective(words, 4);
}

void copy_async(void* to, const void* from, size_t bytes, bool valid) {
  check_shared(to, bytes);
  if (valid && reinterpret_cast<uintptr_t>(from) % bytes != 0)
    fail("an asynchronous copy from memory that is not aligned");
  const Copy copy{to, valid ? from : nullptr, bytes};
  if (schedule.eager_copies)
    land(copy);
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
    for (const Copy& copy : groups[i]) land(copy);
  groups.erase(groups.begin(), groups.begin() + landed);
}

}  // namespace fastnn::cuda::emulator
