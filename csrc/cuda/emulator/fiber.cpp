#include "cuda/emulator/fiber.h"

#include <cstdint>

#ifdef FASTNN_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastnn::cuda::emulator {

#ifdef FASTNN_FIBER_SWITCH

extern "C" void fastnn_fiber_switch(void** save, void* load);
asm(R"(
.text
.globl fastnn_fiber_switch
.hidden fastnn_fiber_switch
.type fastnn_fiber_switch, @function
fastnn_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastnn_fiber_switch, .-fastnn_fiber_switch
)");

void Fiber::prepare(char* stack, size_t size, void (*entry)()) {
  stack_ = stack, stack_size_ = size, fake_stack_ = nullptr;
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15});
  *--top = nullptr;  // where a call would have left its return address: the stack is aligned as the ABI wants
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

#else

void Fiber::prepare(char* stack, size_t size, void (*entry)()) {
  stack_ = stack, stack_size_ = size, fake_stack_ = nullptr;
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = size;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

#endif

namespace {
thread_local Fiber* left;  // by the last switch
}

void Fiber::enter(Fiber& from, [[maybe_unused]] bool last) {
  left = &from;
#ifdef FASTNN_ASAN
  if (last) __asan_handle_no_return();  // frames that never return leave no forbidden zones on the stack
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack_, stack_, stack_size_);
#endif
#ifdef FASTNN_FIBER_SWITCH
  fastnn_fiber_switch(&from.stack_pointer_, stack_pointer_);
#else
  swapcontext(&from.context_, &context_);
#endif
  from.arrive();
}

void Fiber::arrive() {
#ifdef FASTNN_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, &left->stack_, &left->stack_size_);
#endif
}

}  // namespace fastnn::cuda::emulator
