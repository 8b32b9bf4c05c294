#include "fiber.h"

#include <cstdint>
#include <cstdlib>
#include <utility>

#if defined(__x86_64__)

// Saves the registers that a call preserves on the stack, and the stack pointer in *save; continues at
// `load`.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");
constexpr int kSavedRegisters = 6;

#else
#error "tests/cuda_on_cpu switches stacks on x86-64 only: write cuda_on_cpu_switch for this processor"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
namespace {
void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
}  // namespace
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace cuda_on_cpu {
namespace {

Fiber* running = nullptr;

// The stack that resumed the running fiber.
void* resumer_stack_pointer = nullptr;
const void* resumer_stack = nullptr;
size_t resumer_stack_bytes = 0;

}  // namespace

Fiber::Fiber() : stack_(new char[kStackBytes]) {}

void Fiber::start(std::function<void()> body) {
    if (!finished_) ASAN_UNPOISON_MEMORY_REGION(stack_.get(), kStackBytes);  // frames that never returned
    body_ = std::move(body);
    finished_ = false;
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack_.get()) + kStackBytes) & ~15ul);
    *--top = nullptr;  // `enter` finds its stack aligned as after a call
    *--top = reinterpret_cast<void*>(&Fiber::enter);
    for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
    stack_pointer_ = top;
    sanitizers_view_ = nullptr;
}

void Fiber::resume() {
    running = this;
    void* view = nullptr;
    __sanitizer_start_switch_fiber(&view, stack_.get(), kStackBytes);
    cuda_on_cpu_switch(&resumer_stack_pointer, stack_pointer_);
    __sanitizer_finish_switch_fiber(view, nullptr, nullptr);
}

void Fiber::suspend() { running->leave(false); }

void Fiber::leave(bool for_good) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &sanitizers_view_, resumer_stack,
                                   resumer_stack_bytes);
    cuda_on_cpu_switch(&stack_pointer_, resumer_stack_pointer);
    __sanitizer_finish_switch_fiber(sanitizers_view_, &resumer_stack, &resumer_stack_bytes);
}

void Fiber::enter() {
    __sanitizer_finish_switch_fiber(nullptr, &resumer_stack, &resumer_stack_bytes);
    running->body_();
    running->finished_ = true;
    running->leave(true);
    std::abort();  // nobody resumes a fiber that has finished
}

}  // namespace cuda_on_cpu
