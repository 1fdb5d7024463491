// Launches. The Makefile's sed turns
//     kernel<64><<<grid, threads, bytes, stream>>>(x, y);
// into
//     cuda_on_cpu::launch("kernel<64>", cuda_on_cpu::Shape(grid, threads, bytes, stream),
//                         [&](const auto &...arguments) { kernel<64>(arguments...); })(x, y);
// all on one line, so that line numbers stay. It runs at once: when the launch returns, the kernel is done.
#pragma once

#include <chrono>

#include "block.h"
#include "parallel.h"

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNotReady = 600,
    cudaErrorNotSupported = 801
};
using cudaStream_t = struct CUstream_st *;

namespace cuda_on_cpu {

inline cudaError_t last_error = cudaSuccess;

struct Shape {
    dim3 grid, block;
    size_t smem;
    Shape(dim3 grid, dim3 block, size_t smem = 0, cudaStream_t = nullptr) : grid(grid), block(block), smem(smem) {}
};

struct Kernel { // a launch, with types removed
    const char *name;
    Shape shape;
    void (*entry)(void *);
    void *arguments;
};

inline double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Block objects (and their stacks) are kept and handed to whichever OS thread needs one.
struct Pool {
    std::mutex mutex;
    Block *free[1024];
    int n = 0;
};
inline Pool pool;

inline void worker_begin(const Kernel &kernel) {
    {
        std::lock_guard<std::mutex> lock(pool.mutex);
        block = pool.n > 0 ? pool.free[--pool.n] : new Block();
    }
    Block &b = *block;
    blockDim = kernel.shape.block;
    gridDim = kernel.shape.grid;
    b.n_threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    b.barrier.expected = b.n_threads;
    for (int w = 0; w * 32 < b.n_threads; w++) b.warps[w].expected = std::min(32, b.n_threads - w * 32);
    b.entry = kernel.entry;
    b.arguments = kernel.arguments;
    b.kernel = kernel.name;
    context_of_os_thread(&b.os_thread);
    b.dynamic_smem_bytes = kernel.shape.smem;
    if (sanitizing || b.dynamic_smem_bytes > b.dynamic_smem_capacity) { // sanitizing: no byte more than asked for
        free(b.dynamic_smem);
        void *memory = nullptr;
        if (b.dynamic_smem_bytes > 0 && posix_memalign(&memory, 64, b.dynamic_smem_bytes) != 0)
            fail("no memory for %zu bytes of dynamic shared memory", b.dynamic_smem_bytes);
        b.dynamic_smem = static_cast<char *>(memory);
        b.dynamic_smem_capacity = b.dynamic_smem_bytes;
    }
}

inline void worker_end() {
    std::lock_guard<std::mutex> lock(pool.mutex);
    if (pool.n < 1024) pool.free[pool.n++] = block;
    block = nullptr;
}

// A permutation of the blocks: i -> (i * step + start) mod n, where step and n have no common divisor.
struct BlockOrder {
    uint64_t n, step = 1, start = 0, seed = 0;
    explicit BlockOrder(uint64_t n) : n(n) {
        static uint64_t launches = 0;
        seed = order.seed * 1000003 + launches++;
        if (order.kind == Order::reverse) step = start = n - 1;
        if (order.kind != Order::shuffled || n == 1) return;
        Random random = {seed};
        start = random.next() % n;
        do step = 1 + random.next() % (n - 1);
        while (std::__gcd(step, n) != 1);
    }
    uint64_t operator()(uint64_t i) const {
        return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step + start) % n);
    }
};

// `cost`: seconds of one block when this line of code was last run, negative at first. Work below ten microseconds is
// not worth waking other OS threads for; the result is the same.
inline void run_grid(const Kernel &kernel, double *cost) {
    const dim3 g = kernel.shape.grid, t = kernel.shape.block;
    const uint64_t blocks = uint64_t{g.x} * g.y * g.z, threads = uint64_t{t.x} * t.y * t.z;
    if (blocks == 0 || g.x > 0x7FFFFFFF || g.y > 65535 || g.z > 65535 || threads == 0 || threads > max_threads ||
        t.z > 64 || kernel.shape.smem > 227 * 1024) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    if (block != nullptr) fail("a kernel launches kernel %s", kernel.name);

    const BlockOrder nth(blocks);
    int os_threads = sanitizing || blocks == 1 ? 1 : os_threads_here();
    if (*cost >= 0 && *cost * static_cast<double>(blocks) < 10e-6) os_threads = 1;
    const int64_t n = static_cast<int64_t>(blocks), chunk = std::max<int64_t>(1, n / (os_threads * 16));
    std::atomic<int64_t> nanoseconds{0};
    parallel(os_threads, n, chunk, [&](auto take) {
        worker_begin(kernel);
        double start = seconds();
        for (int64_t i, end; take(&i, &end);)
            for (; i < end; i++) {
                uint64_t b = nth(static_cast<uint64_t>(i));
                uint3 index = {static_cast<unsigned>(b), 0, 0};
                if (b >= g.x)
                    index = {static_cast<unsigned>(b % g.x), static_cast<unsigned>(b / g.x % g.y),
                             static_cast<unsigned>(b / g.x / g.y)};
                run_block(index, nth.seed + b);
            }
        nanoseconds += static_cast<int64_t>((seconds() - start) * 1e9);
        worker_end();
    });
    *cost = static_cast<double>(nanoseconds) * 1e-9 / static_cast<double>(blocks);
}

template <typename Call> struct Launch {
    const char *name;
    Shape shape;
    Call call;
    template <typename... Arguments> void operator()(Arguments... arguments) {
        static double cost = -1;
        auto thread = [&] { call(arguments...); };
        run_grid({name, shape, [](void *p) { (*static_cast<decltype(thread) *>(p))(); }, &thread}, &cost);
    }
};

template <typename Call> Launch<Call> launch(const char *name, Shape shape, Call call) { return {name, shape, call}; }

// The Makefile's sed writes CUDA_ON_CPU_SHARED(x) behind a `__shared__ T x[..];`: the block's first thread to come
// fills the array with 0xFF when we look for errors.
inline void poison_once_per_block(uint64_t *last, void *p, size_t bytes) {
    if (*last == blocks_run) return;
    *last = blocks_run;
    memset(p, 0xFF, bytes);
}

template <typename T> T *dynamic_smem() { return reinterpret_cast<T *>(block->dynamic_smem); }

} // namespace cuda_on_cpu

#define CUDA_ON_CPU_SHARED(x) \
    if (cuda_on_cpu::poisoning()) { \
        static thread_local uint64_t last_block = 0; \
        cuda_on_cpu::poison_once_per_block(&last_block, reinterpret_cast<void *>(&x), sizeof(x)); \
    }
