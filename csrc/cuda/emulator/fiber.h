// A stack that can be left and entered again: what a CUDA thread runs on.
#pragma once

#include <ucontext.h>

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastnn::cuda::emulator {

// ucontext's switch saves the signal mask with a system call, which costs a hundred times the switch itself: on x86-64
// the registers that a function must keep are pushed and the stack pointer exchanged.
#if defined(__x86_64__)
#define FASTNN_FIBER_SWITCH 1
extern "C" void fastnn_fiber_switch(void** save, void* load);
#endif

struct Fiber {
#ifdef FASTNN_FIBER_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* stack = nullptr;  // for the address sanitizer, which must know on which stack it is
  size_t stack_size = 0;
  void* fake_stack = nullptr;

  // The next switch to this fiber calls `entry`, which never returns.
  void prepare(char* stack, size_t size, void (*entry)());
  // Leaves `this`, which is running, for `to`.
  void switch_to(Fiber& to);
  // First thing in `entry`: completes the switch that led here from `first`, a thread's own stack.
  void entered(Fiber& first);
};

}  // namespace fastnn::cuda::emulator
