// Fibers: stacks of our own and a switch between them, about 5 ns instead of the microseconds of an OS thread.
// A thread of a CUDA block that must wait at a barrier keeps its stack, and the CPU goes on with another fiber.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !(defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)))
#include <ucontext.h>
#define CUDA_ON_CPU_UCONTEXT
#endif

namespace cuda_on_cpu {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t stack_bytes = 512 * 1024; // ASan's frames are several times as large
#else
constexpr size_t stack_bytes = 64 * 1024;
#endif

struct Context { // where a stack was left, and where it lies
#ifdef CUDA_ON_CPU_UCONTEXT
    ucontext_t saved;
#else
    void *stack_pointer;
#endif
    char *bottom; // lowest usable address
    size_t bytes;
    void *asan_frames; // ASan's own note about a stack that is not running
};

// ---------------------------------------------------------------------------------------------------------------------
// The switch. All registers that a called function must preserve go onto the stack that is left; the rest the compiler
// has saved already, since this looks like any call. Either we go on where the other stack was left, or we call `entry`
// there, which returns the stack to go on with when it is done. A CPU foretells where a `ret` goes from the calls
// before it, whatever stacks they were on. Threads that wait at one place return to one place, so it is right as long
// as every stack is called once and returns once.

#if !defined(CUDA_ON_CPU_UCONTEXT) && defined(__x86_64__)

asm(R"(
    .pushsection .text
    .weak cuda_on_cpu_switch                        # weak: several objects may bring it
    .type cuda_on_cpu_switch, @function
    .balign 64
cuda_on_cpu_switch:
    .cfi_startproc
    .cfi_undefined rip                              # a debugger's backtrace ends here
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    testq %rdx, %rdx
    jz 1f
    callq *%rdx
    movq %rax, %rsp
1:  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
    .cfi_endproc
    .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
    .popsection
)");

#elif !defined(CUDA_ON_CPU_UCONTEXT) // aarch64: x19..x30 and the low halves of v8..v15

asm(R"(
    .pushsection .text
    .weak cuda_on_cpu_switch
    .type cuda_on_cpu_switch, %function
    .balign 64
cuda_on_cpu_switch:
    .cfi_startproc
    .cfi_undefined x30
    sub sp, sp, #160
    stp x19, x20, [sp, #0];   stp x21, x22, [sp, #16];  stp x23, x24, [sp, #32];  stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64];  stp x29, x30, [sp, #80];  stp d8, d9, [sp, #96];    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    cbz x2, 1f
    blr x2
    mov sp, x0
1:  ldp x19, x20, [sp, #0];   ldp x21, x22, [sp, #16];  ldp x23, x24, [sp, #32];  ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64];  ldp x29, x30, [sp, #80];  ldp d8, d9, [sp, #96];    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .cfi_endproc
    .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
    .popsection
)");

#endif

#ifdef CUDA_ON_CPU_UCONTEXT
using Entry = void();
#else
using Entry = void *();
extern "C" void cuda_on_cpu_switch(void **save, void *load, Entry *entry);
#endif

inline void context_arrived(Context *c) { // the first thing on a stack that was switched to
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(c->asan_frames, nullptr, nullptr);
#else
    (void)c;
#endif
}

// From one stack to another: to where it was left, or to `entry` on a stack that is free.
inline void context_switch(Context *from, Context *to, Entry *entry) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from->asan_frames, to->bottom, to->bytes);
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
    if (entry != nullptr) {
        getcontext(&to->saved);
        to->saved.uc_stack.ss_sp = to->bottom;
        to->saved.uc_stack.ss_size = to->bytes;
        makecontext(&to->saved, entry, 0);
    }
    swapcontext(&from->saved, &to->saved);
#else
    cuda_on_cpu_switch(&from->stack_pointer, entry == nullptr ? to->stack_pointer : to->bottom + to->bytes, entry);
#endif
    context_arrived(from);
}

// How `entry` ends: return context_end(to).
inline auto context_end(Context *to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(nullptr, to->bottom, to->bytes);
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
    setcontext(&to->saved);
#else
    return to->stack_pointer;
#endif
}

// Asks for the lines that a switch to c reads first. A warp's stacks and data are more than the L1 cache holds; waiting
// for the L2 cache took 15 % of a training step.
inline void context_prefetch(const Context *c) {
#ifdef CUDA_ON_CPU_UCONTEXT
    (void)c;
#else
    for (int line = 0; line < 3; line++) __builtin_prefetch(static_cast<char *>(c->stack_pointer) + 64 * line);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Stacks. The first page of each is a guard: an overflow is a segmentation fault there, not a damaged neighbour. The
// bytes above `top` belong to the caller. Tops are spread over a page: with all of them at the same offset, a few
// hundred stacks would fight for the same 8 lines of the L1 cache.

struct Stack {
    char *bottom, *top;
};

inline Stack stack_create(size_t bytes_above_top, int number) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = page + stack_bytes + page;
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "cuda_on_cpu: no memory for a stack of %zu bytes\n", bytes);
        abort();
    }
    mprotect(memory, page, PROT_NONE); // if the system has no mapping left for a guard, we go without
    char *base = static_cast<char *>(memory);
    return {base + page, base + bytes - (bytes_above_top + 63) / 64 * 64 - static_cast<size_t>(number) * 5 % 64 * 64};
}

inline void context_create(Context *c, Stack stack) {
    *c = Context{};
    c->bottom = stack.bottom;
    c->bytes = static_cast<size_t>(stack.top - stack.bottom);
}

inline void context_of_os_thread(Context *c) { // the stack we are on; only ASan wants to know its bounds
    *c = Context{};
#ifdef __SANITIZE_ADDRESS__
    static thread_local void *bottom = nullptr;
    static thread_local size_t bytes = 0;
    if (bottom == nullptr) { // once: it reads all of /proc/self/maps
        pthread_attr_t attributes;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &bottom, &bytes);
        pthread_attr_destroy(&attributes);
    }
    c->bottom = static_cast<char *>(bottom);
    c->bytes = bytes;
#endif
}

} // namespace cuda_on_cpu
