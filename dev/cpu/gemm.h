// Matrix products on the CPU: C = alpha op(A) op(B) + beta C, column-major as in cuBLAS, sums in fp32.
//
// 1. Pack. op(A) is copied into panels of MR rows, op(B) into panels of NR columns, each so that the inner loop reads
//    memory in order; bf16 becomes fp32 and short panels are filled up with zeros on the way.
// 2. Multiply. The kernel keeps MR x NR sums in registers and runs over K: 2 loads of A and NR numbers of B for 2 NR
//    vector multiply-adds. Tiles of panels, sized for the L2 cache, are spread over the OS threads.
//
// Every number of C is one sum in ascending k, whatever tile it is in: so its bits depend neither on the thread count
// nor on how many columns there are. But for one or two, where packing would take longest: these are dot products.
#pragma once

#include <vector>

#include "cuda_bf16.h"

namespace cuda_on_cpu {

// The CPU's vectors have VL floats (warp.h). With 32 registers 24 hold sums, with 16 registers 12.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int NR = 12;
#else
constexpr int NR = 6;
#endif
constexpr int MR = 2 * VL;

struct Matrix { // a batch of them: element (i, j) is at data[i + j * ld]
    void *data;
    bool bf16;
    int64_t ld, stride; // stride: from one of the batch to the next
};

inline int64_t panels(int64_t n, int width) { return (n + width - 1) / width; }

// The numbers at p as a vector of floats
template <typename V> V load_floats(const float *p) {
    V x;
    memcpy(&x, p, sizeof(x));
    return x;
}
template <int n> struct Bits { // vectors of n numbers
    typedef float Floats __attribute__((vector_size(4 * n)));
    typedef uint16_t Halves __attribute__((vector_size(2 * n)));
    typedef uint32_t Words __attribute__((vector_size(4 * n)));
    typedef int8_t Int8s __attribute__((vector_size(n)));
    typedef int16_t Int16s __attribute__((vector_size(2 * n)));
};
template <typename V> V load_floats(const __nv_bfloat16 *p) { // a bf16 number is the upper half of a float
    typename Bits<sizeof(V) / 4>::Halves halves;
    memcpy(&halves, p, sizeof(halves));
    return reinterpret_cast<V>(__builtin_convertvector(halves, typename Bits<sizeof(V) / 4>::Words) << 16);
}
template <typename V> V load_floats(const int8_t *p) { // by way of 16 bits: at once, g++ takes them one by one
    typename Bits<sizeof(V) / 4>::Int8s bytes;
    memcpy(&bytes, p, sizeof(bytes));
    return __builtin_convertvector(__builtin_convertvector(bytes, typename Bits<sizeof(V) / 4>::Int16s), V);
}

// column[k][i] = p[i * si + k] for four i and four k
template <typename T>
__attribute__((always_inline)) inline void transpose_4x4(Vector4 (&column)[4], const T *p, int64_t si) {
    const Vector4 a = load_floats<Vector4>(p), b = load_floats<Vector4>(p + si);
    const Vector4 c = load_floats<Vector4>(p + 2 * si), d = load_floats<Vector4>(p + 3 * si);
    const Vector4 ab[2] = {pick<0, 4, 1, 5>(a, b), pick<2, 6, 3, 7>(a, b)};
    const Vector4 cd[2] = {pick<0, 4, 1, 5>(c, d), pick<2, 6, 3, 7>(c, d)};
    for (int k = 0; k < 4; k++)
        column[k] = k % 2 ? pick<2, 3, 6, 7>(ab[k / 2], cd[k / 2]) : pick<0, 1, 4, 5>(ab[k / 2], cd[k / 2]);
}

// One panel: WIDTH rows i of op(A) (columns of op(B)), all k. Element (i, k) is at p[i * si + k * sk]; si or sk is 1.
template <int WIDTH, typename T>
void pack_panel(float *to, const T *p, int64_t si, int64_t sk, int64_t rows, int64_t K) {
    if (rows < WIDTH) {
        for (int64_t k = 0; k < K; k++)
            for (int64_t i = 0; i < WIDTH; i++)
                to[k * WIDTH + i] = i < rows ? static_cast<float>(p[i * si + k * sk]) : 0.0f;
    } else if (si == 1) {
        for (int64_t k = 0; k < K; k++)
            for (int i = 0; i < WIDTH; i++) to[k * WIDTH + i] = static_cast<float>(p[i + k * sk]);
    } else {
        for (int64_t k0 = 0; k0 < K; k0 += 16) { // a transposition, in squares that stay in the L1 cache
            constexpr int fours = WIDTH / 4 * 4;
            const int64_t end = std::min(k0 + 16, K), whole = k0 + (end - k0) / 4 * 4;
            for (int i = 0; i < fours; i += 4) {
                const T *four = p + i * si;
                // of many rows at once the CPU would not see what comes
                for (int l = 0; l < 4; l++) __builtin_prefetch(four + l * si + k0 + 64);
                for (int64_t k = k0; k < whole; k += 4) {
                    Vector4 column[4];
                    transpose_4x4(column, four + k, si);
                    for (int j = 0; j < 4; j++) memcpy(to + (k + j) * WIDTH + i, &column[j], sizeof(Vector4));
                }
            }
            for (int i = whole < end ? 0 : fours; i < WIDTH; i++)
                for (int64_t k = i < fours ? whole : k0; k < end; k++)
                    to[k * WIDTH + i] = static_cast<float>(p[i * si + k]);
        }
    }
}

template <int WIDTH> // K numbers of each, from k on
void pack(float *to, const Matrix &m, int64_t batch, int64_t panel, bool k_runs_first, int64_t n, int64_t k,
          int64_t K) {
    const int64_t si = k_runs_first ? m.ld : 1, sk = k_runs_first ? 1 : m.ld, first = panel * WIDTH;
    const int64_t at = batch * m.stride + first * si + k * sk, rows = std::min<int64_t>(WIDTH, n - first);
    if (m.bf16) pack_panel<WIDTH>(to, static_cast<const __nv_bfloat16 *>(m.data) + at, si, sk, rows, K);
    else pack_panel<WIDTH>(to, static_cast<const float *>(m.data) + at, si, sk, rows, K);
}

// sums[j][i] += sum over k of a[k][i] b[k][j]
inline void multiply_panels(float *sums, const float *a, const float *b, int64_t K) {
    Vector s[NR][2];
    memcpy(s, sums, sizeof(s));
    for (int64_t k = 0; k < K; k++, a += MR, b += NR) {
        const Vector a0 = *reinterpret_cast<const Vector *>(a), a1 = *reinterpret_cast<const Vector *>(a + VL);
#pragma GCC unroll 12
        for (int j = 0; j < NR; j++) {
            const Vector right = b[j] - Vector{};
            s[j][0] = fused(a0, right, s[j][0]);
            s[j][1] = fused(a1, right, s[j][1]);
        }
    }
    memcpy(sums, s, sizeof(s));
}

template <typename T>
void store(T *c, int64_t ld, const float *sums, int64_t ld_sums, int64_t rows, int64_t columns, float alpha,
           float beta) {
    for (int64_t j = 0; j < columns; j++, c += ld, sums += ld_sums)
        for (int64_t i = 0; i < rows; i++) // beta 0 does not read c: it may be uninitialized
            c[i] = static_cast<T>(beta == 0 ? alpha * sums[i] : alpha * sums[i] + beta * static_cast<float>(c[i]));
}

// ---- sums over rows, for twins and for products with a vector or two ----

template <typename V> float sum_in(V v) { // halves are added until one number is left
    typename Bits<sizeof(V) / 8>::Floats half[2];
    memcpy(half, &v, sizeof(v));
    half[0] += half[1];
    if constexpr (sizeof(V) == 16) return half[0][0] + half[0][1];
    else return sum_in(half[0]);
}

inline float sum_of(const float *x, int64_t n) {
    Vector s[4] = {};
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int part = 0; part < 4; part++) s[part] += load_floats<Vector>(x + i + part * VL);
    float sum = sum_in((s[0] + s[1]) + (s[2] + s[3]));
    for (; i < n; i++) sum += x[i];
    return sum;
}

// sums[j] = sum over k of a[k] b[j ldb + k], in PARTS VL sums that are added up at the end
template <int COLUMNS, typename A, typename B> void dots(float *sums, const A *a, const B *b, int64_t ldb, int64_t K) {
    constexpr int PARTS = COLUMNS == 1 ? 8 : 4;
    Vector s[COLUMNS][PARTS] = {};
    int64_t k = 0;
    for (; k + PARTS * VL <= K; k += PARTS * VL)
#pragma GCC unroll 8
        for (int part = 0; part < PARTS; part++) {
            // of short numbers the CPU alone does not ask for enough ahead; of four bytes it does, and this costs
            if (sizeof(A) < 4 && part * VL * sizeof(A) % 64 == 0)
                __builtin_prefetch(reinterpret_cast<const char *>(a + k + part * VL) + 2048);
            const Vector x = load_floats<Vector>(a + k + part * VL);
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; j++)
                s[j][part] = fused(x, load_floats<Vector>(b + j * ldb + k + part * VL), s[j][part]);
        }
    for (int j = 0; j < COLUMNS; j++)
        for (int part = 1; part < PARTS && k > 0; part++) s[j][0] += s[j][part];
    for (; k + VL <= K; k += VL)
        for (int j = 0; j < COLUMNS; j++)
            s[j][0] = fused(load_floats<Vector>(a + k), load_floats<Vector>(b + j * ldb + k), s[j][0]);
    for (int j = 0; j < COLUMNS; j++) sums[j] = sum_in(s[j][0]);
    for (; k < K; k++)
        for (int j = 0; j < COLUMNS; j++)
            sums[j] = fused(static_cast<float>(a[k]), static_cast<float>(b[j * ldb + k]), sums[j]);
}

template <typename X, typename Y> float dot(const X *x, const Y *y, int64_t n) {
    float sum;
    dots<1>(&sum, x, y, 0, n);
    return sum;
}

constexpr int64_t tile_a = 128 / MR, most_b = 264 / NR, few_ks = 256; // panels of a tile, numbers of each
struct Workplace {                                                    // for a tile
    alignas(64) float a[tile_a][MR * few_ks], sums[most_b][tile_a][NR * MR];
};
inline thread_local Workplace workplace;

inline void gemm_of_panels(bool transA, bool transB, int64_t M, int64_t N, int64_t K, float alpha, const Matrix &A,
                           const Matrix &B, float beta, const Matrix &C, int64_t batches) {
    const int64_t a_panels = panels(M, MR), b_panels = panels(N, NR), a_tiles = panels(a_panels, tile_a);
    const int os_threads = 2.0 * M * N * K * batches < 2e5 ? 1 : os_threads_here();
    // Where each panel of A is in one tile, it is packed there, few ks at a time; else all are packed first.
    const bool in_tiles = b_panels <= most_b && batches * a_tiles >= 2 * os_threads;
    const int64_t tile_b = in_tiles ? most_b : 96 / NR, b_tiles = panels(b_panels, tile_b),
                  part = in_tiles ? few_ks : K;
    const int64_t packed_of_a = in_tiles ? 0 : batches * a_panels, packed_of_b = batches * b_panels;

    static float *buffer = nullptr; // grows to the largest product
    static int64_t capacity = 0;
    const int64_t needed = (packed_of_a * MR + packed_of_b * NR) * K + 16;
    if (needed > capacity) {
        free(buffer);
        void *memory;
        if (posix_memalign(&memory, 64, static_cast<size_t>(needed) * 4)) fail("no memory to pack matrices");
        buffer = static_cast<float *>(memory);
        capacity = needed;
    }
    float *const a_packed = buffer, *const b_packed = buffer + packed_of_a * MR * K;
    const int64_t all = packed_of_a + packed_of_b; // A's panels first, then B's
    parallel(os_threads, all, std::max<int64_t>(1, all / (os_threads * 8)), [&](auto take) {
        for (int64_t i, end; take(&i, &end);)
            for (; i < end; i++) {
                const int64_t p = i - packed_of_a;
                if (p < 0) pack<MR>(a_packed + i * MR * K, A, i / a_panels, i % a_panels, transA, M, 0, K);
                else pack<NR>(b_packed + p * NR * K, B, p / b_panels, p % b_panels, !transB, N, 0, K);
            }
    });
    parallel(os_threads, batches * a_tiles * b_tiles, 1, [&](auto take) {
        auto &own = workplace.a;
        auto &sums = workplace.sums;
        for (int64_t tile, end; take(&tile, &end);) {
            const int64_t batch = tile / (a_tiles * b_tiles), ta = tile % a_tiles, tb = tile / a_tiles % b_tiles;
            const int64_t pa = ta * tile_a, a_here = std::min(tile_a, a_panels - pa);
            const int64_t pb = tb * tile_b, b_here = std::min(tile_b, b_panels - pb);
            for (int64_t j = 0; j < b_here; j++) memset(sums[j], 0, static_cast<size_t>(a_here) * sizeof(sums[j][0]));
            for (int64_t k = 0; k < K; k += part) {
                const int64_t ks = std::min(part, K - k);
                const int64_t step = transA ? ks : 16; // so that what lies side by side is read together
                for (int64_t at = 0; at < ks && in_tiles; at += step)
                    for (int64_t i = 0; i < a_here; i++)
                        pack<MR>(own[i] + at * MR, A, batch, pa + i, transA, M, k + at, std::min(step, ks - at));
                for (int64_t j = 0; j < b_here; j++)
                    for (int64_t i = 0; i < a_here; i++)
                        multiply_panels(sums[j][i], in_tiles ? own[i] : a_packed + (batch * a_panels + pa + i) * MR * K,
                                        b_packed + (batch * b_panels + pb + j) * NR * K + k * NR, ks);
            }
            for (int64_t j = 0; j < b_here; j++)
                for (int64_t i = 0; i < a_here; i++) {
                    const int64_t row = (pa + i) * MR, column = (pb + j) * NR;
                    const int64_t at = batch * C.stride + row + column * C.ld;
                    const int64_t rows = std::min<int64_t>(MR, M - row), columns = std::min<int64_t>(NR, N - column);
                    if (C.bf16)
                        store(static_cast<__nv_bfloat16 *>(C.data) + at, C.ld, sums[j][i], MR, rows, columns, alpha,
                              beta);
                    else store(static_cast<float *>(C.data) + at, C.ld, sums[j][i], MR, rows, columns, alpha, beta);
                }
        }
    });
}

// One column or two, the rows of A in memory one after the other: dot products
inline void gemm_of_columns(bool transB, int64_t M, int64_t N, int64_t K, float alpha, const Matrix &A, const Matrix &B,
                            float beta, const Matrix &C) {
    std::vector<float> b(static_cast<size_t>(N * K));
    for (int64_t j = 0; j < N; j++) pack<1>(b.data() + j * K, B, 0, j, !transB, N, 0, K);
    for_each(M, N * K, [&](int64_t row) {
        float sums[2];
        auto multiply = [&](auto *a) {
            if (N == 1) dots<1>(sums, a + row * A.ld, b.data(), K, K);
            else dots<2>(sums, a + row * A.ld, b.data(), K, K);
        };
        if (A.bf16) multiply(static_cast<const __nv_bfloat16 *>(A.data));
        else multiply(static_cast<const float *>(A.data));
        if (C.bf16) store(static_cast<__nv_bfloat16 *>(C.data) + row, C.ld, sums, 1, 1, N, alpha, beta);
        else store(static_cast<float *>(C.data) + row, C.ld, sums, 1, 1, N, alpha, beta);
    });
}

inline Matrix moved(Matrix m, int64_t elements) {
    m.data = static_cast<char *>(m.data) + elements * (m.bf16 ? 2 : 4);
    return m;
}

inline void gemm(bool transA, bool transB, int64_t M, int64_t N, int64_t K, float alpha, const Matrix &A,
                 const Matrix &B, float beta, const Matrix &C, int64_t batches) {
    if (transA && N <= 2 && N > 0 && batches == 1) return gemm_of_columns(transB, M, N, K, alpha, A, B, beta, C);
    constexpr int64_t most = 1024 * NR; // columns at a time: what is packed takes memory
    for (int64_t at = 0; at < N; at += most)
        gemm_of_panels(transA, transB, M, std::min(most, N - at), K, alpha, A, moved(B, transB ? at : at * B.ld), beta,
                       moved(C, at * C.ld), batches);
}

} // namespace cuda_on_cpu
