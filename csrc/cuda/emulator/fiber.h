// A stack that can be left and entered again: what a CUDA thread runs on.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define FASTNN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTNN_ASAN 1
#endif
#endif

// ucontext's switch saves the signal mask with a system call, which costs a hundred times the switch itself: on x86-64
// the registers that a function must keep are pushed and the stack pointer exchanged.
#if defined(__x86_64__)
#define FASTNN_FIBER_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace fastnn::cuda::emulator {

class Fiber {
 public:
  // The next switch to this fiber calls `entry`, which begins with arrive() and ends with another's enter_last().
  void prepare(char* stack, size_t size, void (*entry)());
  // Leaves the running fiber `from` for this one.
  void enter(Fiber& from) { enter(from, false); }
  // The same when `from` will never be entered again, until it is prepared anew.
  void enter_last(Fiber& from) { enter(from, true); }
  void arrive();

 private:
  void enter(Fiber& from, bool last);

#ifdef FASTNN_FIBER_SWITCH
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  // For the address sanitizer, which must be told on which stack it is and keeps some of the stack elsewhere.
  const void* stack_ = nullptr;
  size_t stack_size_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace fastnn::cuda::emulator
