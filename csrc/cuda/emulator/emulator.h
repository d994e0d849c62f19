// Runs CUDA kernels on the CPU, for tests: each CUDA thread is a fiber with a stack of its own, each block runs on one
// OS thread, and blocks are spread over OpenMP's.
//
// A fiber runs until it waits for others - at a barrier or a warp-wide operation - and then hands over to the next.
// Kernels that forget a barrier or a wait can still be right by luck, so there are several schedules: the order in
// which threads and blocks run, and when an asynchronous copy lands. A race shows as a result that differs between
// them. Shared memory starts as NaN.
//
// What a GPU answers with an error, or with nothing at all, ends the launch with an exception: device_check, a
// deadlock, a barrier or a warp-wide operation that not all threads reach, writing or copying outside of shared memory,
// a misaligned copy, more threads or shared memory than devices have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/emulator/fiber.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fastnn::cuda::emulator {

enum class Order {
  forward,  // by thread index
  reverse,
  random,
  greedy,  // a warp runs as far ahead of the others as barriers let it
};

struct Schedule {
  Order order = Order::forward;
  unsigned seed = 1;
  // Asynchronous copies land at once - finding a buffer that is refilled too early - or at the wait alone - finding a
  // wait that is missing.
  bool eager_copies = false;
};

inline Schedule schedule;
inline int capability = 90;  // what launchers are told: 75 makes them choose kernels without tensor cores

// What a block may have: as on sm_90, sm_80, or the least of the devices between and before them.
inline size_t most_shared_bytes() {
  return (capability >= 90 ? 227 : capability == 80 ? 163 : capability > 80 ? 99 : 64) << 10;
}

constexpr int kWarp = 32;
constexpr int kSlotWords = 10;  // the most that a lane hands to a warp-wide operation: mma's fragments

using Slots = uint32_t (*)[kSlotWords];
using Combine = void (*)(Slots);

// A warp-wide operation under way: who has come, with what. Slots are two, since a lane may come to the next operation
// while others still read the last one's.
struct Warp {
  uint32_t arrived = 0, generation = 0;
  size_t words = 0;
  Combine combine = nullptr;
  uint32_t slots[2][kWarp][kSlotWords];
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
};

struct Thread {
  Fiber fiber;
  dim3 index;
  unsigned number = 0, next = 0;
  bool done = false, at_barrier = false, begun = false;
  std::vector<Copy> open;                 // asynchronous copies not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> stacks;
  unsigned stack_count = 0;
  std::vector<unsigned char> shared;  // between two guards
  Fiber caller;
  dim3 size, grid, index;
  unsigned live = 0, arrived = 0, generation = 0;  // of the barrier
  int barrier_line = 0;                            // of the source: where the threads that arrived wait
  uint64_t progress = 0;
  const std::function<void()>* body = nullptr;
  std::string error;  // ends all of the block's threads
};

inline thread_local Block* block = nullptr;
inline thread_local Thread* thread = nullptr;

// Runs `kernel` once for each thread of each block. Throws std::runtime_error, naming `operation`.
void launch(const char* operation, dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel);

// What kernels call, through primitives.cuh.
[[noreturn]] void fail(const std::string& message);
void* shared_memory();
void sync_block(int line);
inline unsigned lane() { return thread->number % kWarp; }
// Every lane of the warp hands over `words` words; the last to come runs `combine` on all of them, then all go on.
Slots collective(const void* in, size_t words, Combine combine = nullptr);
Slots exchange_rows(const void* row);  // every lane hands over 16 aligned bytes of shared memory
void copy_async(void* to, const void* from, size_t bytes, bool valid);
void commit_copies();
void wait_for_copies(size_t groups_left);

}  // namespace fastnn::cuda::emulator
