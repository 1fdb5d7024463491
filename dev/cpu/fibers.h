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

// For all between a kernel and a switch of its stack: see switch_stacks.
#define CUDA_ON_CPU_INLINE __attribute__((always_inline)) inline

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
// The switch. Where it stands in the code, the compiler keeps what it still needs on the stack that is left, for it is
// told that nothing else survives. On x86-64 there is no call and no `ret` in it: a CPU predicts where returns go from
// the calls before, and calls on other stacks would mislead it, 20 cycles at each return that follows.

#if !defined(CUDA_ON_CPU_UCONTEXT) && defined(__x86_64__)

inline void *fresh_stack(uintptr_t top, void (*entry)()) {
    uintptr_t *p = reinterpret_cast<uintptr_t *>(top & ~uintptr_t{15});
    *--p = 0;                                  // a caller's address of 0 ends a debugger's backtrace
    *--p = reinterpret_cast<uintptr_t>(entry); // where the first switch jumps
    return p;
}

#ifdef __AVX512F__
#define CUDA_ON_CPU_MORE_REGISTERS \
    , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", \
        "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7"
#else
#define CUDA_ON_CPU_MORE_REGISTERS
#endif
CUDA_ON_CPU_INLINE void switch_stacks(void **save, void *load) {
    asm volatile("leaq -128(%%rsp), %%rsp\n" // a function may use 128 bytes below its stack pointer
                 "pushq %%rbp\n"
                 "leaq 1f(%%rip), %%rax\n"
                 "pushq %%rax\n"
                 "movq %%rsp, (%0)\n"
                 "movq %1, %%rsp\n"
                 "popq %%rax\n"
                 "jmpq *%%rax\n"
                 "1: popq %%rbp\n"
                 "leaq 128(%%rsp), %%rsp"
                 : "+D"(save), "+S"(load)
                 :
                 : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1",
                   "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",
                   "xmm14", "xmm15" CUDA_ON_CPU_MORE_REGISTERS, "memory", "cc");
}

#elif !defined(CUDA_ON_CPU_UCONTEXT) // aarch64: a call; x19..x30 and the low halves of v8..v15 are kept

asm(R"(
    .pushsection .text
    .weak cuda_on_cpu_switch
    .type cuda_on_cpu_switch, %function
    .balign 16
cuda_on_cpu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0];   stp x21, x22, [sp, #16];  stp x23, x24, [sp, #32];  stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64];  stp x29, x30, [sp, #80];  stp d8, d9, [sp, #96];    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0];   ldp x21, x22, [sp, #16];  ldp x23, x24, [sp, #32];  ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64];  ldp x29, x30, [sp, #80];  ldp d8, d9, [sp, #96];    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
    .popsection
)");

inline void *fresh_stack(uintptr_t top, void (*entry)()) {
    uintptr_t *p = reinterpret_cast<uintptr_t *>(top & ~uintptr_t{15}) - 20;
    for (int i = 0; i < 20; i++) p[i] = 0;
    p[11] = reinterpret_cast<uintptr_t>(entry); // x30, where `ret` goes
    return p;
}

extern "C" void cuda_on_cpu_switch(void **save, void *load);
inline void switch_stacks(void **save, void *load) { cuda_on_cpu_switch(save, load); }

#endif

CUDA_ON_CPU_INLINE void context_arrived(Context *c) { // the first thing on a stack that was switched to
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(c->asan_frames, nullptr, nullptr);
#else
    (void)c;
#endif
}

CUDA_ON_CPU_INLINE void context_switch(Context *from, Context *to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from->asan_frames, to->bottom, to->bytes);
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
    swapcontext(&from->saved, &to->saved);
#else
    switch_stacks(&from->stack_pointer, to->stack_pointer);
#endif
    context_arrived(from);
}

// Asks for the lines that a switch to c reads first. A warp's stacks and data are more than the L1 cache holds.
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

inline void context_create(Context *c, Stack stack, void (*entry)()) {
    *c = Context{};
    c->bottom = stack.bottom;
    c->bytes = static_cast<size_t>(stack.top - stack.bottom);
#ifdef CUDA_ON_CPU_UCONTEXT
    getcontext(&c->saved);
    c->saved.uc_stack.ss_sp = c->bottom;
    c->saved.uc_stack.ss_size = c->bytes;
    makecontext(&c->saved, entry, 0);
#else
    c->stack_pointer = fresh_stack(reinterpret_cast<uintptr_t>(stack.top), entry);
#endif
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
