// Runs CUDA kernels on the CPU, for tests: each CUDA thread is a fiber with a stack of its own, each block runs on one
// OS thread, and blocks are spread over OpenMP's.
//
// A fiber runs until it waits for others - at a barrier or a warp-wide operation - and then hands over to the next.
// Kernels that forget a barrier or a wait can still be right by luck, so there are several schedules: the order in
// which threads run, and when an asynchronous copy lands. A race shows as a result that differs between them. Shared
// memory starts as NaN.
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
inline int capability = 90;  // what launchers are told: 75 makes them choose kernels without asynchronous copies

constexpr int kWarp = 32;
constexpr int kSlotWords = 16;  // the most that a lane hands to a warp-wide operation: mma's fragments

using Slots = uint32_t (*)[kSlotWords];

struct Warp {
  uint32_t live = 0, arrived = 0, generation = 0;
  uint32_t slots[2][kWarp][kSlotWords];
};

struct Copy {
  void* to;
  unsigned char bytes[16];
  int size;
};

struct Thread {
  Fiber fiber;
  dim3 index;
  unsigned number = 0, next = 0;
  bool done = false, at_barrier = false;
  std::vector<Copy> open;                 // asynchronous copies not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> stacks;
  std::vector<unsigned char> shared;
  Fiber caller;
  dim3 size, grid, index;
  unsigned live = 0, arrived = 0, generation = 0;
  uint64_t progress = 0;
  const std::function<void()>* body = nullptr;
};

inline thread_local Block* block = nullptr;
inline thread_local Thread* thread = nullptr;

// Runs `kernel` once for each thread of each block.
void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel);

// The last launch's error - a deadlock or a failed device_check - or null; asking clears it.
const char* take_error();

// What kernels call, through primitives.cuh.
[[noreturn]] void fail(const std::string& message);
void* shared_memory();
void sync_block();
inline unsigned lane() { return thread->number % kWarp; }
// Every lane of `mask` hands over `words` words; the last to come runs `combine` on all of them, then all go on.
Slots collective(const void* in, size_t words, uint32_t mask, void (*combine)(Slots) = nullptr);
void copy_async(void* to, const void* from, int size, bool valid);
void commit_copies();
void wait_for_copies(size_t groups_left);

}  // namespace fastnn::cuda::emulator
