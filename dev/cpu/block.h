// One block of threads on one OS thread. A thread runs until it returns or must wait; then the next one runs on another
// fiber. A kernel without barriers therefore needs a single fiber and a plain call per thread.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstring>
#include <mutex>
#include <new>

#include "fibers.h"

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Variables as in CUDA: a debugger shows them. A block never changes its OS thread while it runs, so thread_local is
// right, and a kernel that has looked up their address stays right when fibers are switched.
inline thread_local uint3 threadIdx = {0, 0, 0}, blockIdx = {0, 0, 0};
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

constexpr int max_threads = 1024; // of one block, as on a GPU

#ifdef CUDA_ON_CPU_SANITIZE
constexpr bool sanitizing = true; // then all blocks run on one OS thread
#else
constexpr bool sanitizing = false;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// CUDA_ON_CPU_ORDER: unset runs threads and blocks in ascending order; "reverse" and a number (a seed) run them in
// others. A kernel without races gives the same bits in all of them.

struct Order {
    enum Kind { ascending, reverse, shuffled } kind = ascending;
    uint64_t seed = 0;

    Order() {
        const char *text = getenv("CUDA_ON_CPU_ORDER");
        if (text == nullptr || *text == 0) return;
        char *end;
        seed = strtoull(text, &end, 10);
        kind = strcmp(text, "reverse") == 0 ? reverse : shuffled;
        if (kind == shuffled && *end != 0) {
            fprintf(stderr, "cuda_on_cpu: CUDA_ON_CPU_ORDER is \"reverse\" or a number, not \"%s\"\n", text);
            exit(2);
        }
    }
};
inline const Order order;

#ifdef CUDA_ON_CPU_DEBUG
constexpr bool debugging = true;
#else
constexpr bool debugging = false;
#endif

// New memory, and shared memory at the start of a block, is filled with 0xFF (NaN, -1) where we look for errors.
inline bool poisoning() { return sanitizing || debugging || order.kind != Order::ascending; }

// Some wrappers of kernels have a twin for the CPU in plain loops. It is used but where errors are looked for, or as
// CUDA_ON_CPU_TWINS says: 0 or 1.
inline bool wants_twins() {
    const char *text = getenv("CUDA_ON_CPU_TWINS");
    if (text == nullptr || *text == 0) return !poisoning();
    if (strcmp(text, "0") == 0 || strcmp(text, "1") == 0) return *text == '1';
    fprintf(stderr, "cuda_on_cpu: CUDA_ON_CPU_TWINS is 0 or 1, not \"%s\"\n", text);
    exit(2);
}
inline const bool twins = wants_twins();

struct Random { // splitmix64
    uint64_t state;
    uint64_t next() {
        uint64_t z = (state += 0x9E3779B97F4A7C15);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
    template <typename T> void shuffle(T *items, int n) {
        for (int i = n - 1; i > 0; i--) std::swap(items[i], items[next() % static_cast<uint64_t>(i + 1)]);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// What a block consists of while it runs.

struct Site { // where in the source a barrier stands
    const char *file;
    int line;
    static constexpr Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    bool operator!=(const Site &other) const {
        return line != other.line || (file != other.file && strcmp(file, other.file) != 0);
    }
};

struct AsyncCopy {
    void *to;
    const void *from; // null: zeros
    int group;
};

struct Fiber;

template <int N> struct Rendezvous { // where N threads or fewer wait for each other
    int arrived = 0, expected = 0;
    const char *name; // "__syncthreads" or another, and where it stands: the first to arrive says so
    Site site;
    Fiber *fibers[N]; // in the order they arrived
    void *lanes[N];   // each thread's arguments, on its own stack
};
using Warp = Rendezvous<32>;

struct Fiber { // lies above the top of its stack: a switch touches one page
    Context context;
    int thread; // index in the block of the thread that runs here
    int lane;   // index in its warp
    Warp *warp;
    uint3 index; // the same as threadIdx
    Site site;
    const char *waits_at;   // of a signal, and for messages: "__syncthreads", or null if it does not wait
    int n_copies, n_groups; // async_copy16 in flight, groups committed
    AsyncCopy copies[256];
};

struct Block {             // one per OS thread, used for block after block
    Fiber *self = nullptr; // the fiber that runs
    int n_threads = 0, started = 0, finished = 0;
    void (*entry)(void *) = nullptr; // calls the kernel with its arguments
    void *arguments = nullptr;
    const char *kernel = "";

    Fiber *ready[max_threads] = {}; // a queue: fibers that may go on
    unsigned ready_head = 0, ready_tail = 0;
    Fiber *idle[max_threads + 1]; // a stack: fibers without a thread
    int n_idle = 0;
    Fiber *fibers[max_threads + 1]; // all of them
    int n_fibers = 0;

    Rendezvous<max_threads> barrier;
    Warp warps[max_threads / 32];
    Context os_thread;
    int start_order[max_threads]; // of the threads, when the order is not ascending
    Random random = {0};
    char *dynamic_smem = nullptr;
    size_t dynamic_smem_bytes = 0, dynamic_smem_capacity = 0;

    bool has_ready() const { return ready_head != ready_tail; }
    Fiber *pop_ready() { // and asks for what the two after it will need
        Fiber *first = ready[ready_head++ % max_threads], *second = ready[ready_head % max_threads];
        __builtin_prefetch(ready[(ready_head + 1) % max_threads]); // an old one, maybe: no harm
        if (second != nullptr) context_prefetch(&second->context);
        return first;
    }
    void push_ready(Fiber *f) { ready[ready_tail++ % max_threads] = f; }
};

inline thread_local Block *block = nullptr;  // the one that this OS thread works on
inline thread_local uint64_t blocks_run = 0; // on this OS thread

// ---------------------------------------------------------------------------------------------------------------------
// Errors end the program at the spot (SIGABRT), so that a debugger stands there.

inline std::mutex failing; // kept by the first that fails

[[noreturn]] inline void fail(const char *format, ...) {
    failing.lock();
    fflush(stdout);
    if (block != nullptr)
        fprintf(stderr, "cuda_on_cpu: kernel %s, block (%u,%u,%u), thread (%u,%u,%u): ", block->kernel, blockIdx.x,
                blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    else fprintf(stderr, "cuda_on_cpu: ");
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    if (block != nullptr) { // who waits where, and who is gone
        auto wait_at = [](auto &r) {
            for (int i = 0; i < r.arrived; i++) r.fibers[i]->waits_at = r.name, r.fibers[i]->site = r.site;
        };
        wait_at(block->barrier);
        for (Warp &warp : block->warps) wait_at(warp);
        for (int i = 0; i < block->n_fibers; i++) {
            Fiber *f = block->fibers[i];
            if (f->waits_at == nullptr) continue;
            int count = 0, first = max_threads;
            bool listed = false;
            for (int j = 0; j < block->n_fibers; j++) {
                Fiber *g = block->fibers[j];
                if (g->waits_at == nullptr || g->site != f->site || strcmp(g->waits_at, f->waits_at) != 0) continue;
                count++;
                first = std::min(first, g->thread);
                listed = listed || j < i;
            }
            if (!listed)
                fprintf(stderr, "    %4d thread%s (first: number %d) at %s, %s:%d\n", count, count == 1 ? "" : "s",
                        first, f->waits_at, f->site.file, f->site.line);
        }
        if (block->finished > 0) fprintf(stderr, "    %4d returned\n", block->finished);
    }
    abort();
}

// ---------------------------------------------------------------------------------------------------------------------
// Running threads.

[[gnu::noinline]] inline void fiber_create() {
    Stack stack = stack_create(sizeof(Fiber), block->n_fibers);
    Fiber *f = new (stack.top) Fiber();
    context_create(&f->context, stack);
    block->fibers[block->n_fibers++] = block->idle[block->n_idle++] = f;
}

[[noreturn]] inline void nobody_can_go_on() {
    if (block->finished > 0) fail("a thread returned before a barrier that others wait at");
    fail("the threads wait at different places, so that none can go on");
}

// The threads that run on a fiber: starts one after the other while there are any, then leaves the fiber free.
inline auto fiber_main() {
    Fiber *self = block->self;
    context_arrived(&self->context);
    while (block->started < block->n_threads) {
        int t = block->started++;
        if (order.kind != Order::ascending) t = block->start_order[t];
        self->thread = t;
        self->lane = t % 32;
        self->warp = &block->warps[t / 32];
        self->n_copies = self->n_groups = 0;
        unsigned u = static_cast<unsigned>(t), xy = blockDim.x * blockDim.y;
        if (u >= blockDim.x) self->index = {u % blockDim.x, u % xy / blockDim.x, u / xy};
        else self->index = {u, 0, 0};
        threadIdx = self->index;
        if (block->n_idle == 0) fiber_create(); // for the next thread, if this one waits
        block->entry(block->arguments);
        block->finished++;
    }
    block->idle[block->n_idle++] = self;
    Context *to = &block->os_thread;
    if (block->has_ready()) {
        block->self = block->pop_ready();
        threadIdx = block->self->index;
        to = &block->self->context;
    } else if (block->finished < block->n_threads) {
        nobody_can_go_on();
    }
    return context_end(to);
}

// The running thread waits: go on with one that may, else start the next. What calls this should do nothing after it:
// then g++ makes a jump of the call, and few registers are saved twice.
__attribute__((always_inline)) inline void wait_here() {
    Block &b = *block;
    Fiber *from = b.self, *to;
    Entry *entry = nullptr;
    if (b.has_ready()) {
        to = b.pop_ready();
        if (to == from) return;
        threadIdx = to->index;
    } else if (b.started < b.n_threads) {
        to = b.idle[--b.n_idle];
        entry = fiber_main;
    } else {
        nobody_can_go_on();
    }
    b.self = to;
    context_switch(&from->context, &to->context, entry);
}

inline void run_block(uint3 index, uint64_t seed) {
    Block &b = *block;
    blockIdx = index;
    blocks_run++;
    b.started = b.finished = 0;
    if (poisoning() && b.dynamic_smem != nullptr) memset(b.dynamic_smem, 0xFF, b.dynamic_smem_bytes);
    if (order.kind != Order::ascending) {
        for (int t = 0; t < b.n_threads; t++) b.start_order[t] = b.n_threads - 1 - t;
        b.random.state = seed;
        if (order.kind == Order::shuffled) b.random.shuffle(b.start_order, b.n_threads);
    }
    if (b.n_idle == 0) fiber_create();
    b.self = b.idle[--b.n_idle];
    context_switch(&b.os_thread, &b.self->context, fiber_main);
}

// ---------------------------------------------------------------------------------------------------------------------
// Waiting for each other.

// True for the last thread to arrive: it does the work for all, then calls `release`. The others wait until then.
template <int N> bool is_last(Rendezvous<N> &r, const char *name, Site site) {
    Fiber *self = block->self;
    if (r.arrived == 0) {
        r.name = name;
        r.site = site;
    } else if (r.site != site) {
        self->waits_at = name;
        self->site = site;
        fail("some threads are at another barrier than the others");
    }
    r.fibers[r.arrived++] = self;
    return r.arrived == r.expected;
}

template <int N> void release(Rendezvous<N> &r) {
    int others = r.arrived - 1; // all but the last, which is running
    r.arrived = 0;
    if (order.kind == Order::shuffled) {
        block->random.shuffle(r.fibers, others + 1);
        for (int i = 0; i <= others; i++) block->push_ready(r.fibers[i]);
        wait_here();
    } else {
        for (int i = 0; i < others; i++) block->push_ready(r.fibers[i]);
    }
}

// Of all threads that meet, each brings a Lane, and the last one calls work(lanes, number of lanes).
template <int N, typename Lane, typename Work>
void collective(Rendezvous<N> &r, int number, const char *name, Site site, Lane *mine, Work work) {
    r.lanes[number] = mine;
    if (!is_last(r, name, site)) return wait_here();
    work(reinterpret_cast<Lane *const *>(r.lanes), r.expected);
    release(r);
}
template <typename Lane, typename Work> void collective(const char *name, Site site, Lane *mine, Work work) {
    collective(*block->self->warp, block->self->lane, name, site, mine, work);
}

} // namespace cuda_on_cpu

inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
    using namespace cuda_on_cpu;
    if (!is_last(block->barrier, "__syncthreads", site)) return wait_here();
    release(block->barrier);
}
