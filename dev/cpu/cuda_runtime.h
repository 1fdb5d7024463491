// CUDA's runtime for a machine without a GPU: `g++ -DCUDA_ON_CPU -Idev/cpu` finds this file in place of the toolkit's.
// It holds what the project uses of CUDA, no more. How it works: README.md; in files: fibers.h (stacks and the switch),
// block.h (threads of a block, barriers), launch.h (grids), warp.h (shuffles, votes, tile products), and here the
// language's words, small types, mathematics and the host's functions.
#pragma once

#include <cmath>
#include <cstring>
#include <map>
#include <new>
#include <type_traits>

#include "block.h"
#include "launch.h"
#include "arrivals.h"
#include "warp.h"

// ---------------------------------------------------------------------------------------------------------------------
// Words of the language.

#define __host__
#ifdef CUDA_ON_CPU_DEBUG
#define __device__ // functions that a debugger can step over
#else
// As nvcc inlines them; g++ left out `load`: a tenth of a training step. -Wno-attributes: so may those without `inline`
// be.
#define __device__ __attribute__((always_inline))
#endif
#define __global__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#ifdef CUDA_ON_CPU_SANITIZE
#define __shared__ static // ASan guards plain static arrays, but no thread_local ones
#else
#define __shared__ static thread_local
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Vector types, aligned as on the device.

#define CUDA_ON_CPU_VECTORS(T, name) \
    struct alignas(8) name##2 { \
        T x, y; \
    }; \
    struct alignas(16) name##4 { \
        T x, y, z, w; \
    }; \
    constexpr name##2 make_##name##2(T x, T y) { return {x, y}; } \
    constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
#undef CUDA_ON_CPU_VECTORS

// ---------------------------------------------------------------------------------------------------------------------
// Mathematics and small device functions.

inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline void sincospif(float x, float *sine, float *cosine) {
    *sine = static_cast<float>(sin(M_PI * x));
    *cosine = static_cast<float>(cos(M_PI * x));
}
inline unsigned __float_as_uint(float x) {
    unsigned i;
    memcpy(&i, &x, 4);
    return i;
}
inline float __uint_as_float(unsigned i) {
    float x;
    memcpy(&x, &i, 4);
    return x;
}

// e^x, 2^x and tanh x to two units in the last place, as on a GPU. g++ makes functions of eight numbers of these, too;
// libm's it calls one by one.
namespace cuda_on_cpu {
// 2^n e^r, for |r| below log(2) / 2; shifted: n + `rounding`, whose last bits are those of n
constexpr float rounding = 1.5f * (1 << 23); // what is added to it loses its fraction
__attribute__((always_inline)) inline float exp_of_parts(float shifted, float r) {
    const float p = 0.5f + r * (0.166665152f + r * (0.0416684560f + r * (0.00836941972f + r * 0.00138131424f)));
    const unsigned n = __float_as_uint(shifted) - __float_as_uint(rounding);
    const unsigned half = static_cast<unsigned>(static_cast<int>(n) >> 1); // 2^n in two factors: it may be small
    return (1 + (r + r * r * p)) * __uint_as_float((127 + half) << 23) * __uint_as_float((127 + n - half) << 23);
}
#pragma omp declare simd notinbranch
[[gnu::noinline, gnu::const]] inline float exp_of(float x) {
    x = x < -104 ? -104 : x > 89 ? 89 : x; // beyond: 0, infinity
    const float shifted = x * 1.44269504f + rounding, n = shifted - rounding;
    return exp_of_parts(shifted, x - n * 0.693359375f + n * 2.12194440e-4f); // x - n log 2, its last bits apart
}
#pragma omp declare simd notinbranch
[[gnu::noinline, gnu::const]] inline float exp2_of(float x) {
    x = x < -150 ? -150 : x > 128 ? 128 : x;
    const float shifted = x + rounding;
    return exp_of_parts(shifted, (x - (shifted - rounding)) * 0.693147181f);
}
#pragma omp declare simd notinbranch
[[gnu::noinline, gnu::const]] inline float tanh_of(float x) {
    const float a = fabsf(x), z = x * x, large = 1 - 2 / (exp_of(2 * a) + 1);
    const float t =
        -0.333332598f + z * (0.133308306f + z * (-0.0536880121f + z * (0.0204693843f - z * 0.00551512884f)));
    return a < 0.6f ? x + x * z * t : copysignf(large, x);
}
} // namespace cuda_on_cpu
#define expf cuda_on_cpu::exp_of
#define exp2f cuda_on_cpu::exp2_of
#define tanhf cuda_on_cpu::tanh_of
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) { // bytes 0 to 3 are x's, 4 to 7 y's
    const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
    unsigned to = 0;
    for (int i = 0; i < 4; i++) to |= static_cast<unsigned>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return to;
}
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }

#define CUDA_ON_CPU_MIN_MAX(T) \
    constexpr T min(T a, T b) { return b < a ? b : a; } \
    constexpr T max(T a, T b) { return a < b ? b : a; }
CUDA_ON_CPU_MIN_MAX(int)
CUDA_ON_CPU_MIN_MAX(unsigned)
CUDA_ON_CPU_MIN_MAX(long)
CUDA_ON_CPU_MIN_MAX(unsigned long)
CUDA_ON_CPU_MIN_MAX(long long)
CUDA_ON_CPU_MIN_MAX(unsigned long long)
#undef CUDA_ON_CPU_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); } // of a number and NaN: the number, as on the device
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline void __threadfence_block() {} // one OS thread runs the block

// Integers only: sums of floats in any order would differ from run to run.
template <typename T> using AtomicInteger = std::enable_if_t<std::is_integral<T>::value, T>;
template <typename T> AtomicInteger<T> atomicAdd(T *p, T x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }

// ---------------------------------------------------------------------------------------------------------------------
// Memory. Device memory is memory.

namespace cuda_on_cpu {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t guard_bytes = 256; // to leave between tensors that share an allocation
inline void guard_gap(void *p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
#else
constexpr size_t guard_bytes = 0;
inline void guard_gap(void *, size_t) {}
#endif

inline cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

} // namespace cuda_on_cpu

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};

namespace cuda_on_cpu {
// Large allocations are mappings of large pages: a thousand small ones take long to come, and to look up. Each page
// comes when it is first touched, as zeros.
constexpr size_t large_page = 2 << 20;
struct Mapping {
    char *begin;
    size_t bytes;
};
inline std::map<void *, Mapping> mappings; // where what cudaMalloc gave out lies
inline std::mutex mapping;

inline bool is_mapped(size_t bytes) { return bytes >= large_page && !sanitizing; } // sanitizers guard the heap alone
inline bool comes_as_zeros(size_t bytes) { return is_mapped(bytes) && !poisoning(); }

inline void *map_pages(size_t bytes) {
    const Mapping all = {static_cast<char *>(mmap(nullptr, bytes + large_page, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)),
                         bytes + large_page};
    if (all.begin == MAP_FAILED) return nullptr;
    const uintptr_t at = (reinterpret_cast<uintptr_t>(all.begin) + large_page - 1) & ~(large_page - 1);
    void *memory = reinterpret_cast<void *>(at);
    madvise(memory, bytes, MADV_HUGEPAGE);
    std::lock_guard<std::mutex> lock(mapping);
    mappings[memory] = all;
    return memory;
}
} // namespace cuda_on_cpu

template <typename T> cudaError_t cudaMalloc(T **p, size_t bytes) {
    *p = nullptr;
    if (bytes == 0) return cudaSuccess;
    void *memory = nullptr;
    if (cuda_on_cpu::is_mapped(bytes)) memory = cuda_on_cpu::map_pages(bytes);
    else if (posix_memalign(&memory, 256, bytes) != 0) memory = nullptr;
    if (memory == nullptr) return cuda_on_cpu::result(cudaErrorMemoryAllocation);
    if (cuda_on_cpu::poisoning()) memset(memory, 0xFF, bytes);
    *p = static_cast<T *>(memory);
    return cudaSuccess;
}
template <typename T> cudaError_t cudaMallocHost(T **p, size_t bytes) { return cudaMalloc(p, bytes); }
inline cudaError_t cudaFree(void *p) {
    std::lock_guard<std::mutex> lock(cuda_on_cpu::mapping);
    const auto found = cuda_on_cpu::mappings.find(p);
    if (found == cuda_on_cpu::mappings.end()) {
        free(p);
    } else {
        munmap(found->second.begin, found->second.bytes);
        cuda_on_cpu::mappings.erase(found);
    }
    return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void *p) { return cudaFree(p); }

inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
    if (bytes > 0 && (to == nullptr || from == nullptr)) return cudaErrorInvalidValue;
    if (bytes < 2 * cuda_on_cpu::large_page) {
        if (bytes > 0) memmove(to, from, bytes);
        return cudaSuccess;
    }
    const int64_t step = cuda_on_cpu::large_page, n = static_cast<int64_t>(bytes); // pages come at their first touch
    cuda_on_cpu::for_each((n + step - 1) / step, step, [&](int64_t i) {
        memcpy(static_cast<char *>(to) + i * step, static_cast<const char *>(from) + i * step,
               static_cast<size_t>(std::min(step, n - i * step)));
    });
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t = nullptr) {
    return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemset(void *p, int byte, size_t bytes) {
    if (bytes > 0) memset(p, byte, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *p, int byte, size_t bytes, cudaStream_t = nullptr) {
    return cudaMemset(p, byte, bytes);
}

inline cudaError_t cudaMemGetInfo(size_t *available, size_t *total) { // of the machine's memory, or the container's
    *total = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    *available = *total / 2;
    if (FILE *f = fopen("/proc/meminfo", "r")) {
        char line[256];
        size_t kilobytes;
        while (fgets(line, sizeof(line), f))
            if (sscanf(line, "MemAvailable: %zu kB", &kilobytes) == 1) *available = kilobytes * 1024;
        fclose(f);
    }
    const cuda_on_cpu::Container container = cuda_on_cpu::container_now();
    if (container.memory < static_cast<double>(*total)) *total = static_cast<size_t>(container.memory);
    if (container.memory_left < static_cast<double>(*available))
        *available = static_cast<size_t>(container.memory_left);
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams and events. All work is done when its call returns, so there is nothing to wait for; events keep the time.

constexpr unsigned cudaStreamDefault = 0, cudaEventDisableTiming = 2;

inline cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    static uintptr_t streams = 0;
    *stream = reinterpret_cast<cudaStream_t>(++streams);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
    return cudaStreamCreate(stream);
}
inline cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = *greatest = 0;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

struct CUevent_st {
    double time;
};
using cudaEvent_t = CUevent_st *;

inline cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = new CUevent_st{0};
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return cudaEventCreate(event); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t = nullptr) {
    event->time = cuda_on_cpu::seconds();
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaProfilerStart() { return cudaSuccess; }
inline cudaError_t cudaProfilerStop() { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = static_cast<float>((end->time - start->time) * 1e3);
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) { return cudaSuccess; }

// ---------------------------------------------------------------------------------------------------------------------
// The device and errors.

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
};

inline cudaError_t cudaGetDeviceCount(int *count) { // one a core, for processes that share the machine (nccl.h)
    const char *text = getenv("CUDA_ON_CPU_DEVICES");
    *count = text ? atoi(text) : omp_get_num_procs();
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    int count;
    cudaGetDeviceCount(&count);
    if (device < 0 || device >= count) return cuda_on_cpu::result(cudaErrorInvalidValue);
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    *p = cudaDeviceProp();
    strcpy(p->name, "CPU");
    p->major = 8; // what these headers can do is of that generation
    p->multiProcessorCount = cuda_on_cpu::sanitizing ? 1 : cuda_on_cpu::os_threads_here();
    size_t available;
    cudaMemGetInfo(&available, &p->totalGlobalMem);
    p->sharedMemPerBlock = 48 * 1024;
    p->sharedMemPerBlockOptin = 227 * 1024;
    return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
template <typename F> cudaError_t cudaFuncSetAttribute(F *, cudaFuncAttribute, int) { return cudaSuccess; }

inline cudaError_t cudaGetLastError() {
    cudaError_t error = cuda_on_cpu::last_error;
    cuda_on_cpu::last_error = cudaSuccess;
    return error;
}
inline const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorNotSupported: return "operation not supported";
    }
    return "unknown error";
}
