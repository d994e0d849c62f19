#include "cuda/emulator/fiber.h"

#include <cstdint>

namespace fastnn::cuda::emulator {

#ifdef FASTNN_FIBER_SWITCH

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

void Fiber::prepare(char* memory, size_t size, void (*entry)()) {
  stack = memory, stack_size = size, fake_stack = nullptr;
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(memory) + size) & ~uintptr_t{15});
  *--top = nullptr;  // where a call would have left its return address: the stack is aligned as the ABI wants
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer = top;
}

#else

void Fiber::prepare(char* memory, size_t size, void (*entry)()) {
  stack = memory, stack_size = size, fake_stack = nullptr;
  getcontext(&context);
  context.uc_stack.ss_sp = memory;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

void Fiber::switch_to(Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.stack_size);
#endif
#ifdef FASTNN_FIBER_SWITCH
  fastnn_fiber_switch(&stack_pointer, to.stack_pointer);
#else
  swapcontext(&context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* left;
  size_t left_size;
  __sanitizer_finish_switch_fiber(fake_stack, &left, &left_size);
#endif
}

void Fiber::entered([[maybe_unused]] Fiber& first) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &first.stack, &first.stack_size);
#endif
}

}  // namespace fastnn::cuda::emulator
