// WKV, forward: the recurrence at the heart of RWKV-6. Per head, S is (N keys i, N values j), zero at the start:
//
//     y_t[j] = sum_i r_t[i] (S[i][j] + u[i] k_t[i] v_t[j]),
//         S[i][j] <- d_t[i] S[i][j] + k_t[i] v_t[j],     d = exp(-exp(w))
//
// Floor: r, k, v, w in and y out, 5 floatX a number, and 4 N flop a number (a product with S, an update of S), on
// tensor cores if they can be brought there: then memory bandwidth is the limit. Token by token they can't: a vector
// times a matrix, 4 N^2 flop and two exponentials a channel, T times one after the other, and only B H blocks of 64
// threads to fill the GPU with.
//
//     1 a thread a value j: its column of S lives in 64 registers; each thread reads r, k, w of all 64 keys from memory
//       and computes all 64 decays, as its 63 neighbours do
//     2 the same, 8 tokens at a time in shared memory: a thread brings one key's numbers, a decay is computed once, and
//       the loads of the next 8 tokens are under way while these are used
//     3 in tiles of 16: what 16 tokens do to S and to each other are matrix products, so tensor cores do it, and S is
//       touched 16 times less. With P_t[i] the product of the tile's decays before t, and W(s,t) of those between s
//       and t:
//           a[t][s] = sum_i r_t[i] k_s[i] W(s,t)[i]     (s < t; on the diagonal u instead of W)
//           y = (r P) S + a v          S <- D S + (k W(s,end))^T v,   D: all of the tile
//       W(s,t) is not P_t / P_(s+1): that would overflow where decays are strong. It is multiplied up, pair by pair.
//     4 in use: what it does better is told in train_goldfinch.cu, under "---- WKV"
//
// And of a prompt (wkv_prompt), which begins with a state, and alone has too few heads to fill a GPU:
//
//     1 the same kernel, from its first token to its last
//     2 in use: segments of 512 tokens side by side, once it is known which states they start with. More work, but of
//       4,096 tokens' steps a quarter, one after the other
//
//     make -C dev wkv_forward && dev/wkv_forward [VERSION [B T H]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static int B, T, H, A;
static Array<floatX> r, k, v, w, u, y;
static Array<float> states, carry;

struct In {
    const floatX *r, *k, *v, *w, *u;
};

// ---- 1: token by token ----

__global__ void wkv_1(floatX *y, In in, int T, int A) {
    const floatX *r = in.r, *k = in.k, *v = in.v, *w = in.w, *u = in.u;
    const int h = blockIdx.x, j = threadIdx.x;
    float S[N] = {}; // column j
    for (int t = 0; t < T; t++) {
        const int64_t at = ((int64_t)blockIdx.y * T + t) * A + h * N;
        const float vj = (float)v[at + j];
        float sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float ri = (float)r[at + i], ki = (float)k[at + i], d = expf(-expf((float)w[at + i]));
            sum += ri * (S[i] + (float)u[h * N + i] * ki * vj);
            S[i] = d * S[i] + ki * vj;
        }
        y[at + j] = (floatX)sum;
    }
}

// ---- 2: shared memory ----

static const int AHEAD = 8; // tokens that are loaded together

__global__ void wkv_2(floatX *y, In in, int T, int A) {
    const floatX *r = in.r, *k = in.k, *v = in.v, *w = in.w, *u = in.u;
    __shared__ float shared_r[AHEAD][N];
    __shared__ float shared_k[AHEAD][N];
    __shared__ float shared_d[AHEAD][N];
    __shared__ float shared_u[N];
    const int h = blockIdx.x, j = threadIdx.x;
    const int64_t base = (int64_t)blockIdx.y * T * A + h * N + j;
    float S[N] = {};
    floatX next[4][AHEAD]; // r, k, v, w of channel j, the tile to come
    shared_u[j] = (float)u[h * N + j];
    for (int t0 = -AHEAD; t0 < T; t0 += AHEAD) {
        float vj[AHEAD];
        __syncthreads();
#pragma unroll
        for (int t = 0; t < AHEAD; t++) {
            if (t0 >= 0) {
                shared_r[t][j] = (float)next[0][t];
                shared_k[t][j] = (float)next[1][t];
                shared_d[t][j] = expf(-expf((float)next[3][t]));
                vj[t] = (float)next[2][t];
            }
            const int64_t at = base + (int64_t)min(t0 + AHEAD + t, T - 1) * A;
            next[0][t] = r[at], next[1][t] = k[at], next[2][t] = v[at], next[3][t] = w[at];
        }
        __syncthreads();
        if (t0 < 0) continue;
#pragma unroll
        for (int t = 0; t < AHEAD; t++) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < N; i++) {
                sum += shared_r[t][i] * (S[i] + shared_u[i] * shared_k[t][i] * vj[t]);
                S[i] = shared_d[t][i] * S[i] + shared_k[t][i] * vj[t];
            }
            if (t0 + t < T) y[base + (int64_t)(t0 + t) * A] = (floatX)sum;
        }
    }
}

// ---- 3: tiles of matrix products ----

// tokens of a tile; rows of operands in shared memory
static const int TOKENS = 16, WIDTH = N + PAD, SQUARE = TOKENS + PAD;

struct Tile {
    float r[TOKENS][N], k[TOKENS][N], d[TOKENS][N], u[N], D[N], S[N][N + 4];
    float partial[8][TOKENS][TOKENS]; // the scores, over 8 channels each
    alignas(16) floatX v[TOKENS][WIDTH];
    alignas(16) floatX rP[TOKENS][WIDTH];
    alignas(16) floatX kW[TOKENS][WIDTH];
    alignas(16) floatX a[TOKENS][SQUARE];
    alignas(16) floatX S_operand[N][WIDTH]; // S, rounded
};

// Thread (s, 8 channels): k_s goes through the tokens after s, and decays on the way.
__device__ inline void pairs(Tile &c) {
    const int s = threadIdx.x % TOKENS, group = threadIdx.x / TOKENS;
    float score[TOKENS] = {};
    for (int i = 8 * group; i < 8 * group + 8; i++) {
        float kept = c.k[s][i];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (t == s) score[t] += c.r[t][i] * c.u[i] * kept;
            if (t <= s) continue;
            score[t] += c.r[t][i] * kept;
            kept *= c.d[t][i];
        }
        c.kW[s][i] = (floatX)kept;
    }
    for (int t = 0; t < TOKENS; t++) c.partial[group][t][s] = score[t];
}

__global__ void wkv_3(floatX *y, In in, int T, int A) {
    const floatX *r = in.r, *k = in.k, *v = in.v, *w = in.w, *u = in.u;
    Tile &c = *dynamic_smem<Tile>();
    const int h = blockIdx.x, warp = threadIdx.x / 32;
    if (threadIdx.x < N) c.u[threadIdx.x] = (float)u[h * N + threadIdx.x];
    for (int i = threadIdx.x; i < N * N; i += blockDim.x) {
        c.S[i / N][i % N] = 0;
        c.S_operand[i / N][i % N] = (floatX)0.f;
    }
    for (int t0 = 0; t0 < T; t0 += TOKENS) {
        const int64_t base = ((int64_t)blockIdx.y * T + t0) * A + h * N;
        for (int at = threadIdx.x; at < TOKENS * N; at += blockDim.x) {
            const int t = at / N, i = at % N;
            const bool inside = t0 + t < T; // past the end: r = k = v = 0, d = 1
            const int64_t from = base + (int64_t)(inside ? t : 0) * A + i;
            c.r[t][i] = inside ? (float)r[from] : 0;
            c.k[t][i] = inside ? (float)k[from] : 0;
            c.v[t][i] = inside ? v[from] : (floatX)0.f;
            c.d[t][i] = inside ? expf(-expf((float)w[from])) : 1;
        }
        __syncthreads();
        pairs(c);
        if (threadIdx.x < N) { // thread i: the products of its decays
            float P = 1;
            for (int t = 0; t < TOKENS; t++) {
                c.rP[t][threadIdx.x] = (floatX)(c.r[t][threadIdx.x] * P);
                P *= c.d[t][threadIdx.x];
            }
            c.D[threadIdx.x] = P;
        }
        __syncthreads();
        for (int at = threadIdx.x; at < TOKENS * TOKENS; at += blockDim.x) {
            float sum = 0;
            for (int group = 0; group < 8; group++) sum += c.partial[group][at / TOKENS][at % TOKENS];
            c.a[at / TOKENS][at % TOKENS] = (floatX)sum;
        }
        __syncthreads();
        // (16 tokens x this warp's 16 values) = (r P) S + a v
        TileC out[2] = {};
        for (int i = 0; i < N; i += 16) {
            const TileB S[2] = {load_b_t(&c.S_operand[i][16 * warp], WIDTH),
                                load_b_t(&c.S_operand[i][16 * warp + 8], WIDTH)};
            mma(out, load_a(&c.rP[0][i], WIDTH), S);
        }
        const TileB values[2] = {load_b_t(&c.v[0][16 * warp], WIDTH), load_b_t(&c.v[0][16 * warp + 8], WIDTH)};
        mma(out, load_a(&c.a[0][0], SQUARE), values);
        for (int n = 0; n < 2; n++)
            for (int e = 0; e < 4; e++)
                if (t0 + tile_row(e) < T)
                    y[base + (int64_t)tile_row(e) * A + 16 * warp + 8 * n + tile_col(e)] = (floatX)out[n].x[e];
        __syncthreads();
        const TileA keys = load_a_t(&c.kW[0][16 * warp], WIDTH); // S: this warp's 16 keys x all values
        for (int n = 0; n < 8; n++) {
            TileC sum[1];
            const TileB value[1] = {load_b_t(&c.v[0][8 * n], WIDTH)};
            for (int e = 0; e < 4; e++) {
                const int i = 16 * warp + tile_row(e);
                sum[0].x[e] = c.D[i] * c.S[i][8 * n + tile_col(e)];
            }
            mma(sum, keys, value);
            for (int e = 0; e < 4; e++) {
                const int i = 16 * warp + tile_row(e), j = 8 * n + tile_col(e);
                c.S[i][j] = sum[0].x[e];
                c.S_operand[i][j] = (floatX)sum[0].x[e];
            }
        }
        __syncthreads();
    }
}

// ---- 4: in use, as in training: it leaves the states for the backward pass ----

static void wkv_forward_in_use(void) {
    wkv_forward(y.p, Wkv{r.p, k.p, v.p, w.p, nullptr, u.p, nullptr, false, states.p, nullptr, T, H}, B);
}

static void run(int version) {
    const dim3 grid(H, B);
    const In in = {r.p, k.p, v.p, w.p, u.p};
    if (version == 1) wkv_1<<<grid, N, 0, stream>>>(y.p, in, T, A);
    if (version == 2) wkv_2<<<grid, N, 0, stream>>>(y.p, in, T, A);
    if (version == 3) {
        allow_smem(wkv_3, sizeof(Tile));
        wkv_3<<<grid, 2 * N, sizeof(Tile), stream>>>(y.p, in, T, A);
    }
    if (version == 4) wkv_forward_in_use();
}

// The state to begin with is zero; without memory for them there are no segments.
static void run_prompt(int version) {
    CUDA_CHECK(cudaMemsetAsync(carry.p, 0, (int64_t)B * H * N * N * sizeof(float), stream));
    float *segments = version == 1 ? nullptr : states.p;
    wkv_forward(y.p, Wkv{r.p, k.p, v.p, w.p, nullptr, u.p, nullptr, false, segments, carry.p, T, H}, B);
}

static void setup(const int *shape) {
    B = shape[0], T = shape[1], H = shape[2], A = H * N;
    const int64_t n = (int64_t)B * T * A;
    for (Array<floatX> *input : {&r, &k, &v}) input->random(n);
    u.random(A);
    // Decays from 0.99995 to 0: a token's own in odd channels, which soon forget, a channel's own in even ones, some of
    // which remember all tokens.
    w.fill(n, [](int64_t i) { return (float)(-10 + 14 * lab_uniform(1, i % A % 2 ? i : i % A)); });
    states.allocate((int64_t)B * H * ceil_div(T, CHUNK) * N * N);
    carry.allocate((int64_t)B * H * N * N);
    // In bf16 a state that remembers much is a rounded operand, off by 2^-9 in each of 64 terms. Seen: up to 2.6e-2
    y.output("y", by_precision(1e-5, 5e-2), n);
    for (int64_t head : sample((int64_t)B * H, 8)) {
        std::vector<double> S(N * N);
        for (int t = 0; t < T; t++) {
            const int64_t at = (head / H * T + t) * A + head % H * N;
            double out[N] = {};
            for (int i = 0; i < N; i++) {
                const double d = exp(-exp(w[at + i]));
                for (int j = 0; j < N; j++) {
                    const double kv = k[at + i] * v[at + j];
                    out[j] += r[at + i] * (S[i * N + j] + u[head % H * N + i] * kv);
                    S[i * N + j] = d * S[i * N + j] + kv;
                }
            }
            for (int j = 0; j < N; j++) y.expect(at + j, out[j]);
        }
    }
}

static Cost cost(const int *shape) {
    const double numbers = (double)shape[0] * shape[1] * shape[2] * N;
    return {5 * sizeof(floatX) * numbers, 4 * N * numbers};
}

int main(int argc, char **argv) {
    return lab_main({{"wkv_forward",
                      {{"B", 1}, {"T", 1}, {"H", 1}},
                      {"a thread a value, token by token", "8 tokens in shared memory", "tiles on tensor cores",
                       "in use"},
                      {{2, 1, 3}, {2, 37, 1}, {1, 150, 3}},
                      {{32, 1024, 12}, {8, 2048, 32}},
                      setup,
                      run,
                      cost},
                     {"wkv_prompt",
                      {{"B", 1}, {"T", 1}, {"H", 1}},
                      {"in one piece", "in use, in segments"},
                      {{2, 37, 1}, {1, 512, 1}, {1, 513, 1}, {2, 1100, 2}},
                      {{1, 4096, 12}, {1, 4096, 32}},
                      setup,
                      run_prompt,
                      cost}},
                    argc, argv);
}
