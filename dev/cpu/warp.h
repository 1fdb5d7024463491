// What the 32 lanes of a warp do together. Each call is a collective: all lanes of the warp (other warps may be
// elsewhere) come to the same line, the last one computes for all. Masks must therefore name the whole warp.
#pragma once

#include "block.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace cuda_on_cpu {

inline void check_mask(unsigned mask, const char *name) {
    if (mask != 0xFFFFFFFFu) fail("%s with mask 0x%08x: only whole warps (0xffffffff) are supported here", name, mask);
}

template <typename T> struct ShuffleLane {
    T value, result;
    int source; // a lane number; outside of the warp: the lane's own value
};

template <typename T> T shuffle(const char *name, Site site, unsigned mask, T value, int source) {
    check_mask(mask, name);
    ShuffleLane<T> mine = {value, value, source};
    collective(name, site, &mine, [](ShuffleLane<T> *const *lanes, int n) {
        for (int i = 0; i < n; i++)
            if (lanes[i]->source >= 0 && lanes[i]->source < n) lanes[i]->result = lanes[lanes[i]->source]->value;
    });
    return mine.result;
}

inline int lane_number() { return block->self->lane; }

struct VoteLane {
    bool predicate;
    unsigned result;
};

inline unsigned vote(const char *name, Site site, unsigned mask, bool predicate) {
    check_mask(mask, name);
    VoteLane mine = {predicate, 0};
    collective(name, site, &mine, [](VoteLane *const *lanes, int n) {
        unsigned bits = 0;
        for (int i = 0; i < n; i++) bits |= static_cast<unsigned>(lanes[i]->predicate) << i;
        for (int i = 0; i < n; i++) lanes[i]->result = bits;
    });
    return mine.result;
}

// Several numbers at once from the lane whose number differs in `bits`.
template <int COUNT> void shuffle_xor(float (&to)[COUNT], const float (&from)[COUNT], int bits, Site site) {
    struct Numbers {
        float x[COUNT];
    } mine;
    memcpy(&mine, from, sizeof(mine));
    mine = shuffle("shuffle_xor", site, 0xFFFFFFFFu, mine, lane_number() ^ bits);
    memcpy(to, &mine, sizeof(mine));
}

// Sum or maximum of each of `count` numbers over aligned groups of WIDTH lanes (2, 4, .., 32), for every lane of the
// group. One collective, but the same additions in the same order as x += __shfl_xor_sync(~0u, x, apart) for apart =
// WIDTH/2, .., 2, 1.
template <int WIDTH, int APART = WIDTH / 2, typename Combine> void fold(float *x, Combine combine) {
    for (int first = 0; first < 32; first += WIDTH)
        for (int i = first; i < first + APART; i++) x[i] = combine(x[i], x[i + APART]);
    if constexpr (APART > 1) fold<WIDTH, APART / 2>(x, combine);
}

template <typename Combine>
void over_lanes(const char *name, Site site, int count, float *x, int width, Combine combine) {
    collective(
        name, site, x,
        [=](float *const *lanes, int n) {
            for (int j = 0; j < count; j++) {
                float v[32] = {};
                for (int i = 0; i < n; i++) v[i] = lanes[i][j];
                switch (width) {
                case 32: fold<32>(v, combine); break;
                case 16: fold<16>(v, combine); break;
                case 8: fold<8>(v, combine); break;
                case 4: fold<4>(v, combine); break;
                case 2: fold<2>(v, combine); break;
                case 1: break;
                default: fail("a group of %d lanes: only powers of two up to 32", width);
                }
                for (int i = 0; i < n; i++) lanes[i][j] = v[i & -width];
            }
        });
}

inline void warp_sum(int count, float *x, int width, Site site) {
    over_lanes(
        "warp_sum", site, count, x, width, [](float a, float b) { return a + b; });
}

inline float warp_max(float x, int width, Site site) {
    over_lanes("warp_max", site, 1, &x, width, [](float a, float b) { return a > b ? a : b; });
    return x;
}

// The same sums over a block of whole warps: of each warp, as above, then of these in ascending order. One meeting in
// place of three barriers.
inline void block_sum(int count, float *x, Site site) {
    collective(
        block->barrier, block->self->thread, "block_sum", site, x,
        [=](float *const *lanes, int n) {
            for (int j = 0; j < count; j++) {
                float total = 0;
                for (int first = 0; first < n; first += 32) {
                    float v[32];
                    for (int i = 0; i < 32; i++) v[i] = lanes[first + i][j];
                    fold<32>(
                        v, [](float a, float b) { return a + b; });
                    total = first == 0 ? v[0] : total + v[0];
                }
                for (int i = 0; i < n; i++) lanes[i][j] = total;
            }
        });
}

// ---------------------------------------------------------------------------------------------------------------------
// The tensor core: n products D (16 x 8) += A (16 x 16) B (16 x 8) with one A, in fp32. The lanes hold the tiles as
// mma.m16n8k16 has them; with g = lane / 4, t = lane % 4:
//     a[i]      row g + 8 ((i / 2) % 2), column 2t + i % 2 + 8 (i / 4)
//     b[4j + i] row 2t + i % 2 + 8 (i / 2), column g of the j-th B
//     c[4j + i] row g + 8 (i / 2), column 2t + i % 2 of the j-th D
// Each number of D sums its 16 products in ascending order.

#if defined(__AVX512F__)
constexpr int VL = 16; // floats in a vector register
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
using Vector = float __attribute__((vector_size(VL * 4)));
using Vector4 = float __attribute__((vector_size(16)));

// a b + c, rounded once where the CPU has an instruction for it. g++ makes none of a product and a sum by itself
// (-ffp-contract=off): which it would take depends on what it inlines.
template <typename V> V fused(V a, V b, V c) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) return _mm512_fmadd_ps(a, b, c);
    else
#endif
#if defined(__FMA__)
        if constexpr (sizeof(V) == 32)
        return _mm256_fmadd_ps(a, b, c);
    else return _mm_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}
inline float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// The numbers `which` of x and, from its length on, of y: one instruction
#if defined(__clang__) || __GNUC__ >= 12
template <int... which, typename V> auto pick(V x, V y) { return __builtin_shufflevector(x, y, which...); }
#else
template <int... which, typename V> auto pick(V x, V y) {
    constexpr int n = sizeof(V) / 4;
    using To = float __attribute__((vector_size(4 * sizeof...(which))));
    return To{(which < n ? x[which % n] : y[which % n])...};
}
#endif

inline void mma_product(int n, float *const *c, const float *const *a, const float *const *b) {
    constexpr int wide = VL < 8 ? VL : 8;
    using Some = float __attribute__((vector_size(wide * 4)));
    alignas(64) float A[16][16], B[16][8], D[16][8];
    for (int lane = 0; lane < 32; lane++) { // pairs of columns at a time
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; i += 2) memcpy(&A[g + 4 * (i & 2)][2 * t + 2 * (i & 4)], a[lane] + i, 8);
    }
    for (int j = 0; j < n; j++) {
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; i++) B[2 * t + i % 2 + 4 * (i & 2)][g] = b[lane][4 * j + i];
            for (int i = 0; i < 4; i += 2) memcpy(&D[g + 4 * i][2 * t], c[lane] + 4 * j + i, 8);
        }
        for (int row = 0; row < 16; row++)
            for (int column = 0; column < 8; column += wide) { // as vectors: g++ would take them one by one
                Some sum, b;
                memcpy(&sum, &D[row][column], sizeof(sum));
                for (int k = 0; k < 16; k++) {
                    memcpy(&b, &B[k][column], sizeof(b));
                    sum = fused(A[row][k] - Some{}, b, sum);
                }
                memcpy(&D[row][column], &sum, sizeof(sum));
            }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i += 2) memcpy(c[lane] + 4 * j + i, &D[lane / 4 + 4 * i][lane % 4 * 2], 8);
    }
}

// `products` of these, one after the other: c, a and b move on by next_c, 8 and next_b floats.
inline void mma(int products, int n, float *c, int next_c, const float *a, const float *b, int next_b, Site site) {
    struct Lane {
        int n;
        float *c;
        const float *a, *b;
    } mine = {n, c, a, b};
    collective("mma", site, &mine, [=](Lane *const *lanes, int count) {
        if (count < 32) fail("mma in a warp of %d lanes", count);
        for (int p = 0; p < products; p++) {
            float *c[32];
            const float *a[32], *b[32];
            for (int i = 0; i < 32; i++) {
                if (lanes[i]->n != n) fail("mma with n = %d in one lane, %d in another", lanes[i]->n, n);
                c[i] = lanes[i]->c + p * next_c;
                a[i] = lanes[i]->a + p * 8;
                b[i] = lanes[i]->b + p * next_b;
            }
            mma_product(n, c, a, b);
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// cp.async: 16 bytes from global to shared memory that are only there after their group was waited for. Where we look
// for errors, the target holds 0xFF until then, so that a forgotten wait shows; else they are copied at once. valid ==
// false: zeros, and src is not read.

inline void async_copy16(void *smem, const void *src, bool valid) {
    if (!poisoning()) {
        if (valid) memcpy(smem, src, 16);
        else memset(smem, 0, 16);
        return;
    }
    Fiber *self = block->self;
    constexpr int most = static_cast<int>(sizeof(self->copies) / sizeof(self->copies[0]));
    if (reinterpret_cast<uintptr_t>(smem) % 16 || (valid && reinterpret_cast<uintptr_t>(src) % 16))
        fail("async_copy16 needs addresses that are multiples of 16: %p, %p", smem, src);
    if (self->n_copies == most) fail("more than %d copies of one thread in flight", most);
    memset(smem, 0xFF, 16);
    self->copies[self->n_copies++] = {smem, valid ? src : nullptr, self->n_groups};
}

inline void async_commit() {
    if (poisoning()) block->self->n_groups++;
}

template <int N> void async_wait() { // until at most the N newest groups are in flight
    if (!poisoning()) return;
    Fiber *self = block->self;
    int left = 0;
    for (int i = 0; i < self->n_copies; i++) {
        AsyncCopy copy = self->copies[i];
        if (copy.group >= self->n_groups - N) self->copies[left++] = copy;
        else if (copy.from != nullptr) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    }
    self->n_copies = left;
}

} // namespace cuda_on_cpu

// ---------------------------------------------------------------------------------------------------------------------
// CUDA's names.

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
    cuda_on_cpu::vote("__syncwarp", site, mask, false);
}

template <typename T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
    int lane = cuda_on_cpu::lane_number();
    return cuda_on_cpu::shuffle("__shfl_sync", site, mask, x, lane / width * width + (source & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
    int lane = cuda_on_cpu::lane_number(), source = lane ^ bits; // later groups of `width` keep their own value
    return cuda_on_cpu::shuffle("__shfl_xor_sync", site, mask, x, source / width > lane / width ? lane : source);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T x, int by, int width = 32, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
    int lane = cuda_on_cpu::lane_number(), source = lane + by;
    return cuda_on_cpu::shuffle("__shfl_down_sync", site, mask, x, source / width != lane / width ? lane : source);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T x, int by, int width = 32, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
    int lane = cuda_on_cpu::lane_number(), source = lane - by;
    return cuda_on_cpu::shuffle("__shfl_up_sync", site, mask, x, source < lane / width * width ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, bool p, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
    return cuda_on_cpu::vote("__ballot_sync", site, mask, p);
}

inline int __any_sync(unsigned mask, bool p, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
    return cuda_on_cpu::vote("__any_sync", site, mask, p) != 0;
}

inline int __all_sync(unsigned mask, bool p, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
    return cuda_on_cpu::vote("__all_sync", site, mask, !p) == 0;
}
