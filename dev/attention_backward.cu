// Causal attention, backward. With p as in attention_forward.cu, dp_ts = dy_t . v_s, delta_t = sum_s p_ts dp_ts = dy_t
// . y_t:
//
//   ds_ts = p_ts (dp_ts - delta_t), dq_t = sum_{s<=t} ds_ts k_s / 8, dk_s = sum_{t>=s} ds_ts q_t / 8, dv_s = sum_{t>=s}
//   p_ts dy_t
//
// q, k, v, y and their gradients (B, T, H, 64); log_sum, delta (B, H, T), log_sum in units of log 2 from the forward
// pass.
//
// Floor: flops. T^2 / 2 pairs a head, and for each five products of 64 multiplications: scores, dp, dq, dk, dv. dq sums
// over keys, dk and dv over queries: one walk over all pairs makes five products, but then either dq or dk and dv must
// be added up in memory, atomically, in another order each time. Two walks need no atomics and give the same bits in
// every run, for seven products. That is what all versions here do.
//
// Versions:  1 a thread a query for dq, a thread a key for dk and dv; all comes from the cache
//            2 a block of 64 queries (or keys) copies 64 of the others into shared memory, and all its threads read
//              them there
//            3 tensor cores: a warp takes 16 rows. Each fragment loaded from shared memory (256 bytes) feeds one
//              product of 16x8x16: shared memory (128 bytes a clock) is the bottleneck
//            4 in use before Hopper: a warp takes 32 rows, a fragment feeds two products; what a warp keeps stays in
//              registers; squares above the diagonal are left out; the next tile is copied behind one barrier
//            5 in use on Hopper (sm_90a): warpgroups, as in attention_forward.cu; the same sums in the same order, so
//              the same bits as 4. Keys and values: two warpgroups of 64 keys; queries: three of 64. Left operands come
//              from shared memory with each product; from registers they would be 5 % faster, but nvcc 13.0.88 then
//              writes over registers that the next turn needs
//
//     make -C dev attention_backward && dev/attention_backward [VERSION [B H T]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static int B, H, T;
static Array<floatX> q, k, v, y, dy, dq, dk, dv;
static Array<float> log_sum, delta;

// ---------------------------------------------------------------------------------------------------------------------
// 1: a thread a row

__device__ inline float dot(const floatX *a, const floatX *b) {
    float sum = 0;
    for (int c = 0; c < N; c += 8) {
        const Pack x = load(a + c), y = load(b + c);
        for (int i = 0; i < 8; i++) sum += x.x[i] * y.x[i];
    }
    return sum;
}

__device__ inline void add(float (&to)[N], float weight, const floatX *x) {
    for (int c = 0; c < N; c += 8) {
        const Pack p = load(x + c);
        for (int i = 0; i < 8; i++) to[c + i] += weight * p.x[i];
    }
}

__device__ inline void write(floatX *to, const float (&x)[N], float scale) {
    for (int c = 0; c < N; c++) to[c] = (floatX)(scale * x[c]);
}

// p and ds of a pair; the pointers are at its rows
struct Weights {
    float p, ds;
};
__device__ inline Weights weights(const floatX *q, const floatX *k, const floatX *v, const floatX *dy, float log_sum,
                                  float delta) {
    const float p = exp2_fast(dot(q, k) * SCALE_LOG2 - log_sum);
    return {p, p * (dot(dy, v) - delta)};
}

__global__ void attention_backward_q_1(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int T,
                                       int H) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x, h = blockIdx.y, b = blockIdx.z, A = H * N;
    if (t >= T) return;
    const int64_t head = (int64_t)b * T * A + h * N, row = ((int64_t)b * H + h) * T, at = head + (int64_t)t * A;
    float dq[N] = {};
    for (int s = 0; s <= t; s++) {
        const int64_t key = head + (int64_t)s * A;
        add(dq, weights(q + at, k + key, v + key, g.dy + at, g.log_sum[row + t], g.delta[row + t]).ds, k + key);
    }
    write(g.dq + at, dq, 0.125f);
}

__global__ void attention_backward_kv_1(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int T,
                                        int H) {
    const int s = blockIdx.x * blockDim.x + threadIdx.x, h = blockIdx.y, b = blockIdx.z, A = H * N;
    if (s >= T) return;
    const int64_t head = (int64_t)b * T * A + h * N, row = ((int64_t)b * H + h) * T, at = head + (int64_t)s * A;
    float dk[N] = {}, dv[N] = {};
    for (int t = s; t < T; t++) {
        const int64_t query = head + (int64_t)t * A;
        const Weights w = weights(q + query, k + at, v + at, g.dy + query, g.log_sum[row + t], g.delta[row + t]);
        add(dv, w.p, g.dy + query);
        add(dk, w.ds, q + query);
    }
    write(g.dk + at, dk, 0.125f);
    write(g.dv + at, dv, 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2: a tile of the others in shared memory

// 64 rows of two arrays, those before T
__device__ inline void copy_tiles(floatX (*to_a)[N], floatX (*to_b)[N], const floatX *a, const floatX *b, int t0, int T,
                                  int A) {
    for (int i = threadIdx.x * 8; i < 64 * N && t0 + i / N < T; i += 64 * 8) {
        store(&to_a[i / N][i % N], load(a + (int64_t)(t0 + i / N) * A + i % N));
        store(&to_b[i / N][i % N], load(b + (int64_t)(t0 + i / N) * A + i % N));
    }
}

__global__ void attention_backward_q_2(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int T,
                                       int H) {
    __shared__ __align__(16) floatX keys[64][N];
    __shared__ __align__(16) floatX values[64][N];
    const int t = min((int)(blockIdx.x * 64 + threadIdx.x), T - 1), h = blockIdx.y, b = blockIdx.z, A = H * N;
    const int64_t head = (int64_t)b * T * A + h * N, row = ((int64_t)b * H + h) * T, at = head + (int64_t)t * A;
    const float log_sum = g.log_sum[row + t], delta = g.delta[row + t];
    float dq[N] = {};
    for (int tile = 0; tile <= (int)blockIdx.x; tile++) {
        copy_tiles(keys, values, k + head, v + head, tile * 64, T, A);
        __syncthreads();
        for (int s = 0; s < 64 && tile * 64 + s <= t; s++)
            add(dq, weights(q + at, keys[s], values[s], g.dy + at, log_sum, delta).ds, keys[s]);
        __syncthreads();
    }
    write(g.dq + at, dq, 0.125f); // threads past the end have made the last row again
}

__global__ void attention_backward_kv_2(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int T,
                                        int H) {
    __shared__ __align__(16) floatX queries[64][N];
    __shared__ __align__(16) floatX dy[64][N];
    const int s = min((int)(blockIdx.x * 64 + threadIdx.x), T - 1), h = blockIdx.y, b = blockIdx.z, A = H * N;
    const int64_t head = (int64_t)b * T * A + h * N, row = ((int64_t)b * H + h) * T, at = head + (int64_t)s * A;
    float dk[N] = {}, dv[N] = {};
    for (int tile = blockIdx.x; tile * 64 < T; tile++) {
        copy_tiles(queries, dy, q + head, g.dy + head, tile * 64, T, A);
        __syncthreads();
        for (int t = max(s, tile * 64); t < min(T, tile * 64 + 64); t++) {
            const floatX *query = queries[t % 64], *gradient = dy[t % 64];
            const Weights w = weights(query, k + at, v + at, gradient, g.log_sum[row + t], g.delta[row + t]);
            add(dv, w.p, gradient);
            add(dk, w.ds, query);
        }
        __syncthreads();
    }
    write(g.dk + at, dk, 0.125f);
    write(g.dv + at, dv, 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// 3: tensor cores, 16 rows a warp

// out (16 x 8 n) = a (16 x N) b[0..8 n)^T, both in shared memory
template <int n> __device__ inline void product(TileC (&out)[n], const HeadRow *a, const HeadRow *b) {
    for (int c = 0; c < N; c += 16) {
        TileB right[n];
        for (int j = 0; j < n; j++) right[j] = load_b(&b[8 * j][c], LD);
        mma(out, load_a(&a[0][c], LD), right);
    }
}

// out (16 x N) += w (16 x 8 n) b[0..8 n)
template <int n> __device__ inline void add_product(TileC (&out)[8], const TileC (&w)[n], const HeadRow *b) {
    for (int s = 0; s < n / 2; s++) {
        TileB right[8];
        for (int j = 0; j < 8; j++) right[j] = load_b_t(&b[16 * s][8 * j], LD);
        mma(out, to_a(w[2 * s], w[2 * s + 1]), right);
    }
}

__device__ inline void write_tiles(floatX *to, const TileC (&x)[8], float scale, int t0, int T, int A) {
    for (int i = 0; i < 4; i++)
        for (int n = 0; n < 8 && t0 + tile_row(i) < T; n++)
            to[(int64_t)(t0 + tile_row(i)) * A + 8 * n + tile_col(i)] = (floatX)(scale * x[n].x[i]);
}

__global__ void __launch_bounds__(128)
    attention_backward_q_3(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int T, int H) {
    HeadRow *queries = dynamic_smem<HeadRow>(), *dy = queries + 64, *keys = queries + 128, *values = queries + 192;
    const int warp = threadIdx.x / 32, h = blockIdx.y, b = blockIdx.z, A = H * N;
    const int block = gridDim.x - 1 - blockIdx.x, t0 = block * 64 + 16 * warp;
    const int64_t head = (int64_t)b * T * A + h * N, row = ((int64_t)b * H + h) * T;
    attention_load<64>(queries, q + head, block * 64, T, A);
    attention_load<64>(dy, g.dy + head, block * 64, T, A);
    TileC dq[8] = {};
    for (int tile = 0; tile <= block; tile++) {
        attention_load<64>(keys, k + head, tile * 64, T, A);
        attention_load<64>(values, v + head, tile * 64, T, A);
        async_commit();
        async_wait<0>();
        __syncthreads();
        for (int part = 0; part < 64; part += 32) {
            TileC p[4] = {}, ds[4] = {};
            product(p, queries + 16 * warp, keys + part);
            product(ds, dy + 16 * warp, values + part);
            for (int n = 0; n < 4; n++)
                for (int i = 0; i < 4; i++) {
                    const int t = t0 + tile_row(i), s = tile * 64 + part + 8 * n + tile_col(i);
                    const float weight = s <= t && t < T ? exp2_fast(p[n].x[i] * SCALE_LOG2 - g.log_sum[row + t]) : 0;
                    ds[n].x[i] = t < T ? weight * (ds[n].x[i] - g.delta[row + t]) : 0;
                }
            add_product(dq, ds, keys + part);
        }
        __syncthreads();
    }
    write_tiles(g.dq + head, dq, 0.125f, t0, T, A);
}

__global__ void __launch_bounds__(128)
    attention_backward_kv_3(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int T, int H) {
    HeadRow *queries = dynamic_smem<HeadRow>(), *dy = queries + 64, *keys = queries + 128, *values = queries + 192;
    const int warp = threadIdx.x / 32, h = blockIdx.y, b = blockIdx.z, A = H * N, s0 = blockIdx.x * 64 + 16 * warp;
    const int64_t head = (int64_t)b * T * A + h * N, row = ((int64_t)b * H + h) * T;
    attention_load<64>(keys, k + head, blockIdx.x * 64, T, A);
    attention_load<64>(values, v + head, blockIdx.x * 64, T, A);
    TileC dk[8] = {}, dv[8] = {};
    for (int tile = blockIdx.x; tile * 64 < T; tile++) {
        attention_load<64>(queries, q + head, tile * 64, T, A);
        attention_load<64>(dy, g.dy + head, tile * 64, T, A);
        async_commit();
        async_wait<0>();
        __syncthreads();
        for (int part = 0; part < 64; part += 32) { // transposed: rows are keys
            TileC p[4] = {}, ds[4] = {};
            product(p, keys + 16 * warp, queries + part);
            product(ds, values + 16 * warp, dy + part);
            for (int n = 0; n < 4; n++)
                for (int i = 0; i < 4; i++) {
                    const int s = s0 + tile_row(i), t = tile * 64 + part + 8 * n + tile_col(i);
                    p[n].x[i] = s <= t && t < T ? exp2_fast(p[n].x[i] * SCALE_LOG2 - g.log_sum[row + t]) : 0;
                    ds[n].x[i] = t < T ? p[n].x[i] * (ds[n].x[i] - g.delta[row + t]) : 0;
                }
            add_product(dv, p, dy + part);
            add_product(dk, ds, queries + part);
        }
        __syncthreads();
    }
    write_tiles(g.dk + head, dk, 0.125f, s0, T, A);
    write_tiles(g.dv + head, dv, 1, s0, T, A);
}

// ---------------------------------------------------------------------------------------------------------------------

static void run(int version) {
    const dim3 grid((int)ceil_div(T, 64), H, B);
    const size_t smem = 256 * sizeof(HeadRow);
    const AttentionGradients g = {dq.p, dk.p, dv.p, dy.p, log_sum.p, delta.p};
    attention_delta(delta.p, dy.p, y.p, B, T, H);
    if (version == 4) attention_backward_by_warps(g, q.p, k.p, v.p, B, T, H);
#if WARPGROUP_KERNELS
    if (version == 5) attention_backward_by_warpgroups(g, q.p, k.p, v.p, B, T, H);
#endif
    if (version == 1) {
        attention_backward_q_1<<<grid, 64, 0, stream>>>(g, q.p, k.p, v.p, T, H);
        attention_backward_kv_1<<<grid, 64, 0, stream>>>(g, q.p, k.p, v.p, T, H);
    }
    if (version == 2) {
        attention_backward_q_2<<<grid, 64, 0, stream>>>(g, q.p, k.p, v.p, T, H);
        attention_backward_kv_2<<<grid, 64, 0, stream>>>(g, q.p, k.p, v.p, T, H);
    }
    if (version == 3) {
        allow_smem(attention_backward_q_3, smem);
        attention_backward_q_3<<<grid, 128, smem, stream>>>(g, q.p, k.p, v.p, T, H);
        allow_smem(attention_backward_kv_3, smem);
        attention_backward_kv_3<<<grid, 128, smem, stream>>>(g, q.p, k.p, v.p, T, H);
    }
}

// What to expect in one head, whose rows are `A` apart from element `head` on. An error counts against the size of a
// sum's terms, the root of their squares' sum: p and ds are rounded, each term moves by a part of itself, and the sum
// may be near 0.
static void expect_head(int64_t head) {
    const int64_t A = (int64_t)H * N;
    std::vector<double> dk_sum(T * N), dv_sum(T * N), dk_squares(T * N), dv_squares(T * N), p(T), dp(T);
    for (int64_t t = 0; t < T; t++) {
        const int64_t query = head + t * A;
        double top = -INFINITY, sum = 0, delta = 0, dq_sum[N] = {}, dq_squares[N] = {};
        for (int64_t s = 0; s <= t; s++) {
            const int64_t key = head + s * A;
            p[s] = dp[s] = 0;
            for (int c = 0; c < N; c++) {
                p[s] += q[query + c] * k[key + c];
                dp[s] += dy[query + c] * v[key + c];
            }
            top = fmax(top, p[s]);
        }
        for (int64_t s = 0; s <= t; s++) sum += p[s] = exp((p[s] - top) / sqrt(N));
        for (int c = 0; c < N; c++) delta += dy[query + c] * y[query + c]; // y as rounded: it is an input
        for (int64_t s = 0; s <= t; s++) {
            p[s] /= sum;
            const double ds = p[s] * (dp[s] - delta) / sqrt(N);
            for (int c = 0; c < N; c++) {
                const double of_q = ds * k[head + s * A + c], of_k = ds * q[query + c], of_v = p[s] * dy[query + c];
                dq_sum[c] += of_q, dq_squares[c] += of_q * of_q;
                dk_sum[s * N + c] += of_k, dk_squares[s * N + c] += of_k * of_k;
                dv_sum[s * N + c] += of_v, dv_squares[s * N + c] += of_v * of_v;
            }
        }
        for (int c = 0; c < N; c++) dq.expect(query + c, dq_sum[c], sqrt(dq_squares[c]));
    }
    for (int64_t i = 0; i < T * N; i++) {
        dk.expect(head + i / N * A + i % N, dk_sum[i], sqrt(dk_squares[i]));
        dv.expect(head + i / N * A + i % N, dv_sum[i], sqrt(dv_squares[i]));
    }
}

static void setup(const int *shape) {
    B = shape[0], H = shape[1], T = shape[2];
    const int64_t n = (int64_t)B * T * H * N;
    q.random(n, 2);
    for (Array<floatX> *x : {&k, &v, &dy}) x->random(n);
    y.allocate(n);
    log_sum.allocate((int64_t)B * H * T);
    delta.allocate((int64_t)B * H * T);
    attention_forward(y.p, log_sum.p, q.p, k.p, v.p, B, T, H);
    y.host.resize(n);
    CUDA_CHECK(cudaMemcpy(y.host.data(), y.p, n * sizeof(floatX), cudaMemcpyDeviceToHost));
    // six times what rounding to bf16 is, as a root mean square: 0.166 %
    const double tolerance = by_precision(3e-5, 1e-2);
    dq.output("dq", tolerance, n);
    dk.output("dk", tolerance, n);
    dv.output("dv", tolerance, n);
    for (int64_t head : sample(B * H, T > 1024 ? 1 : 3)) expect_head(head / H * T * H * N + head % H * N);
}

static Cost cost(const int *shape) {
    const double tokens = (double)shape[0] * shape[1] * shape[2], pairs = tokens * (shape[2] + 1) / 2;
    return {tokens * (8 * N * sizeof(floatX) + 4), pairs * 10 * N};
}

int main(int argc, char **argv) {
    std::vector<const char *> versions = {"a thread a row", "tiles in shared memory", "tensor cores, 16 rows a warp",
                                          "in use before Hopper: 32 rows a warp"};
    if (lab_has_warpgroups()) versions.push_back("in use on Hopper: warpgroups");
    return lab_main({{"attention_backward",
                      {{"B", 1}, {"H", 1}, {"T", 1}},
                      versions,
                      {{1, 2, 5}, {2, 1, 77}, {1, 1, 128}, {2, 2, 333}},
                      {{8, 32, 2048}, {32, 12, 1024}, {4, 32, 4096}},
                      setup,
                      run,
                      cost}},
                    argc, argv);
}
