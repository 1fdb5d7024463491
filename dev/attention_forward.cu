// Causal attention, forward:  y_t = sum_{s<=t} p_ts v_s,   p_ts = exp(q_t . k_s / 8 - l_t),
//                             l_t = log sum_{s<=t} exp(q_t . k_s / 8)
//
// q, k, v, y (B, T, H, 64); l (B, H, T), in units of log 2, is kept for the backward pass.
//
// Floor: flops. T^2 / 2 pairs a head, and for each 64 multiplications for its score and 64 for its value. Bytes are few
// (each number once). What hides behind "flops": a pair also costs an exponential, of which an H100's SM makes 16 a
// clock beside 4096 flops, that is 256 in the time of one; 256 is just what a pair has. So half of the work is not
// matrix products.
//
// Versions:  1 a thread a query, two passes over the keys: first the maximum and the sum, then the values. Two loads
//              from the cache for each multiplication and addition
//            2 one pass: where a new maximum comes up, what was summed so far is multiplied by exp(old - new). No score
//              is made twice, and nothing of the size T is stored: this step makes all that follows possible
//            3 a block of 64 queries copies 64 keys and values into shared memory, and all its threads read them there
//            4 tensor cores: a warp takes 16 queries by 64 keys (FlashAttention-2). Each fragment of keys or values
//              loaded from shared memory (256 bytes) feeds one product of 16x8x16: shared memory (128 bytes a clock) is
//              the bottleneck
//            5 in use before Hopper: a warp takes 32 queries by 32 keys, so that a fragment feeds two products; squares
//              above the diagonal are left out; copies are two tiles ahead behind one barrier; the maximum moves only
//              when it must
//            6 in use on Hopper (sm_90a): a warpgroup takes 64 queries by 128 keys; products (wgmma) read shared memory
//              themselves and run in the background, copies (TMA) cost no instruction. While the tensor cores multiply
//              the next scores and these values, the warps take exponentials. Three warpgroups, so that one multiplies
//              while others do not: 0.388 ms where two gave 0.456 (8x32x2048). To make them take turns by barriers
//              changed nothing; to leave out tiles above the diagonal made it slower (0.395), by registers; to take a
//              part of the exponentials by a polynomial, too (0.397)
//
//     make -C dev attention_forward && dev/attention_forward [VERSION [B H T]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static int B, H, T;
static Array<floatX> q, k, v, y;
static Array<float> l;

// ---------------------------------------------------------------------------------------------------------------------
// 1, 2: a thread a query

__device__ inline float dot(const float (&a)[N], const floatX *b) {
    float sum = 0;
    for (int c = 0; c < N; c += 8) {
        const Pack p = load(b + c);
        for (int i = 0; i < 8; i++) sum += a[c + i] * p.x[i];
    }
    return sum;
}

__device__ inline void add(float (&to)[N], float weight, const floatX *x) {
    for (int c = 0; c < N; c += 8) {
        const Pack p = load(x + c);
        for (int i = 0; i < 8; i++) to[c + i] += weight * p.x[i];
    }
}

__device__ inline void read(float (&to)[N], const floatX *from, float scale) {
    for (int c = 0; c < N; c++) to[c] = scale * (float)from[c];
}

__device__ inline void write(floatX *to, const float (&x)[N], float scale) {
    for (int c = 0; c < N; c++) to[c] = (floatX)(scale * x[c]);
}

__global__ void attention_forward_1(floatX *y, float *l, const floatX *q, const floatX *k, const floatX *v, int T,
                                    int H) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x, h = blockIdx.y, b = blockIdx.z, A = H * N;
    if (t >= T) return;
    const int64_t head = (int64_t)b * T * A + h * N;
    float query[N], out[N] = {}, top = -INFINITY, sum = 0;
    read(query, q + head + (int64_t)t * A, SCALE_LOG2);
    for (int s = 0; s <= t; s++) top = fmaxf(top, dot(query, k + head + (int64_t)s * A));
    for (int s = 0; s <= t; s++) {
        const float p = exp2_fast(dot(query, k + head + (int64_t)s * A) - top);
        sum += p;
        add(out, p, v + head + (int64_t)s * A);
    }
    write(y + head + (int64_t)t * A, out, 1 / sum);
    l[((int64_t)b * H + h) * T + t] = top + log2f(sum);
}

// A step of the online softmax: one more key.
__device__ inline void online_step(float (&out)[N], float &top, float &sum, float score, const floatX *value) {
    if (score > top) {
        const float shrink = exp2_fast(top - score);
        for (int c = 0; c < N; c++) out[c] *= shrink;
        sum *= shrink;
        top = score;
    }
    const float p = exp2_fast(score - top);
    sum += p;
    add(out, p, value);
}

__global__ void attention_forward_2(floatX *y, float *l, const floatX *q, const floatX *k, const floatX *v, int T,
                                    int H) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x, h = blockIdx.y, b = blockIdx.z, A = H * N;
    if (t >= T) return;
    const int64_t head = (int64_t)b * T * A + h * N;
    float query[N], out[N] = {}, top = -INFINITY, sum = 0;
    read(query, q + head + (int64_t)t * A, SCALE_LOG2);
    for (int s = 0; s <= t; s++) {
        const int64_t key = head + (int64_t)s * A;
        online_step(out, top, sum, dot(query, k + key), v + key);
    }
    write(y + head + (int64_t)t * A, out, 1 / sum);
    l[((int64_t)b * H + h) * T + t] = top + log2f(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// 3: keys and values in shared memory

__global__ void attention_forward_3(floatX *y, float *l, const floatX *q, const floatX *k, const floatX *v, int T,
                                    int H) {
    __shared__ __align__(16) floatX keys[64][N];
    __shared__ __align__(16) floatX values[64][N];
    const int t = blockIdx.x * 64 + threadIdx.x, h = blockIdx.y, b = blockIdx.z, A = H * N;
    const int64_t head = (int64_t)b * T * A + h * N;
    float query[N], out[N] = {}, top = -INFINITY, sum = 0;
    read(query, q + head + (int64_t)min(t, T - 1) * A, SCALE_LOG2);
    for (int tile = 0; tile <= (int)blockIdx.x; tile++) {
        for (int i = threadIdx.x * 8; i < 64 * N && tile * 64 + i / N < T; i += 64 * 8) {
            const int64_t from = head + (int64_t)(tile * 64 + i / N) * A + i % N;
            store(&keys[i / N][i % N], load(k + from));
            store(&values[i / N][i % N], load(v + from));
        }
        __syncthreads();
        for (int s = 0; s < 64 && tile * 64 + s <= min(t, T - 1); s++)
            online_step(out, top, sum, dot(query, keys[s]), values[s]);
        __syncthreads();
    }
    if (t < T) write(y + head + (int64_t)t * A, out, 1 / sum);
    if (t < T) l[((int64_t)b * H + h) * T + t] = top + log2f(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4: tensor cores, 16 queries a warp

__global__ void __launch_bounds__(128)
    attention_forward_4(floatX *y, float *l, const floatX *q, const floatX *k, const floatX *v, int T, int H) {
    HeadRow *queries = dynamic_smem<HeadRow>(), *keys = queries + 64, *values = keys + 64;
    const int warp = threadIdx.x / 32, h = blockIdx.y, b = blockIdx.z, A = H * N;
    const int block = gridDim.x - 1 - blockIdx.x, t0 = block * 64 + 16 * warp;
    const int64_t head = (int64_t)b * T * A + h * N;
    attention_load<64>(queries, q + head, block * 64, T, A);
    TileC out[8] = {};
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}; // of the lane's two rows
    for (int tile = 0; tile <= block; tile++) {
        attention_load<64>(keys, k + head, tile * 64, T, A);
        attention_load<64>(values, v + head, tile * 64, T, A);
        async_commit();
        async_wait<0>();
        __syncthreads();
        TileC p[8] = {};
        for (int c = 0; c < N; c += 16) { // scores
            TileB right[8];
            for (int n = 0; n < 8; n++) right[n] = load_b(&keys[8 * n][c], LD);
            mma(p, load_a(&queries[16 * warp][c], LD), right);
        }
        for (int r = 0; r < 2; r++) { // softmax
            float high = top[r];
            for (int i = 0; i < 16; i++) {
                float &x = p[i / 2].x[2 * r + i % 2];
                x = tile == block && i / 2 * 8 + tile_col(i % 2) > 16 * warp + tile_row(2 * r) ? -INFINITY
                                                                                               : x * SCALE_LOG2;
                high = fmaxf(high, x);
            }
            high = warp_max(high, 4);
            const float shrink = exp2_fast(top[r] - high);
            top[r] = high;
            sum[r] *= shrink;
            for (int i = 0; i < 16; i++) {
                float &x = p[i / 2].x[2 * r + i % 2];
                out[i / 2].x[2 * r + i % 2] *= shrink;
                x = exp2_fast(x - high);
                sum[r] += x;
            }
        }
        for (int s = 0; s < 4; s++) { // values
            TileB right[8];
            for (int n = 0; n < 8; n++) right[n] = load_b_t(&values[16 * s][8 * n], LD);
            mma(out, to_a(p[2 * s], p[2 * s + 1]), right);
        }
        __syncthreads();
    }
    for (int r = 0; r < 2; r++) {
        const int t = t0 + tile_row(2 * r);
        sum[r] = warp_sum(sum[r], 4);
        if (threadIdx.x % 4 == 0 && t < T) l[((int64_t)b * H + h) * T + t] = top[r] + log2f(sum[r]);
        for (int i = 0; i < 16 && t < T; i++)
            y[head + (int64_t)t * A + i / 2 * 8 + tile_col(i % 2)] = (floatX)(out[i / 2].x[2 * r + i % 2] / sum[r]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------

static void run(int version) {
    const dim3 grid((int)ceil_div(T, 64), H, B);
    const size_t smem = 192 * sizeof(HeadRow);
    if (version == 1) attention_forward_1<<<grid, 64, 0, stream>>>(y.p, l.p, q.p, k.p, v.p, T, H);
    if (version == 2) attention_forward_2<<<grid, 64, 0, stream>>>(y.p, l.p, q.p, k.p, v.p, T, H);
    if (version == 3) attention_forward_3<<<grid, 64, 0, stream>>>(y.p, l.p, q.p, k.p, v.p, T, H);
    if (version == 4) {
        allow_smem(attention_forward_4, smem);
        attention_forward_4<<<grid, 128, smem, stream>>>(y.p, l.p, q.p, k.p, v.p, T, H);
    }
    if (version == 5) attention_forward_by_warps(y.p, l.p, q.p, k.p, v.p, B, T, H);
#if WARPGROUP_KERNELS
    if (version == 6) attention_forward_by_warpgroups(y.p, l.p, q.p, k.p, v.p, B, T, H);
#endif
}

static void setup(const int *shape) {
    B = shape[0], H = shape[1], T = shape[2];
    const int64_t n = (int64_t)B * T * H * N;
    // scores of deviation 2: some weights are large
    q.random(n, 2);
    k.random(n);
    v.random(n);
    y.output("y", by_precision(1e-5, 1e-2), n);
    l.output("l", by_precision(1e-5, 1e-4), (int64_t)B * H * T);
    for (int64_t row : sample((int64_t)B * H * T, 200)) { // (b, h, t), as in l
        const int64_t t = row % T, head = row / T / H * T * H * N + row / T % H * N;
        std::vector<double> score(t + 1), out(N), squares(N);
        double top = -INFINITY, sum = 0;
        for (int64_t s = 0; s <= t; s++) {
            for (int c = 0; c < N; c++) score[s] += q[head + t * H * N + c] * k[head + s * H * N + c] / sqrt(N);
            top = fmax(top, score[s]);
        }
        for (int64_t s = 0; s <= t; s++) sum += exp(score[s] - top);
        for (int64_t s = 0; s <= t; s++)
            for (int c = 0; c < N; c++) {
                const double term = exp(score[s] - top) / sum * v[head + s * H * N + c];
                out[c] += term;
                squares[c] += term * term;
            }
        l.expect(row, (top + log(sum)) / log(2.));
        // p is rounded: each term errs
        for (int c = 0; c < N; c++) y.expect(head + t * H * N + c, out[c], sqrt(squares[c]));
    }
}

static Cost cost(const int *shape) {
    const double tokens = (double)shape[0] * shape[1] * shape[2], pairs = tokens * (shape[2] + 1) / 2;
    return {tokens * (4 * N * sizeof(floatX) + 4), pairs * 4 * N};
}

int main(int argc, char **argv) {
    std::vector<const char *> versions = {"a thread a query, two passes", "one pass: the online softmax",
                                          "keys and values in shared memory", "tensor cores, 16 queries a warp",
                                          "in use before Hopper: 32 queries a warp"};
    if (lab_has_warpgroups()) versions.push_back("in use on Hopper: warpgroups");
    return lab_main({{"attention_forward",
                      {{"B", 1}, {"H", 1}, {"T", 1}},
                      versions,
                      {{1, 2, 1}, {2, 1, 77}, {1, 1, 128}, {2, 3, 333}},
                      {{8, 32, 2048}, {32, 12, 1024}, {4, 32, 4096}},
                      setup,
                      run,
                      cost}},
                    argc, argv);
}
