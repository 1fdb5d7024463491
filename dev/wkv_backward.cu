// WKV, backward. With S_t the state before token t and dS_t the gradient of the state after it (wkv_forward.cu has the
// recurrence; e = exp(w), d = exp(-e)):
//
//     dr_t[i] = sum_j dy_t[j] (S_t[i][j] + u[i] k_t[i] v_t[j])
//         dS_t-1 = d_t dS_t + r_t dy_t,  zero after the last token
//     dk_t[i] = sum_j v_t[j] (dS_t[i][j] + u[i] r_t[i] dy_t[j])       dw_t[i] = -e_t d_t sum_j S_t[i][j] dS_t[i][j]
//     dv_t[j] = sum_i k_t[i] dS_t[i][j] + dy_t[j] sum_i r_t[i] u[i] k_t[i]
//         du[i] = sum_t r_t[i] k_t[i] sum_j v_t[j] dy_t[j]
//
// Floor: bytes. r, k, v, w, dy in and dr, dk, dv, dw out, 9 floatX a number; 14 N flop a number, on tensor cores.
//
// The difficulty: dw needs S_t and dS_t at the same time, but one is known from the front, the other from the back, and
// S_t can't be had from S_t+1 (that would divide by d, which may be 0). So states are kept, and made again in between.
//
//     1 three kernels: states every 16 tokens; a thread a key i walks back with its rows of dS in registers, and makes
//       each S_t again from the last state kept, 7.5 steps on average; a thread a value j walks back once more for dv
//     2 keys and values in one block of 128 threads, which share what they read: 16 tokens in shared memory
//     3 in use: 16 tokens at a time by matrix products. How it finds dr and dw without ever having S_t inside a tile is
//       told in train_goldfinch.cu, above WkvBackward
//
// What made 3 quick, in ms on an H200 (32x1024x12; 8x2048x32). It began with operands as two bf16 each and 2,650
// instructions a warp and tile: 0.530, 0.838.
//
//     0.422, 0.654   fp32 operands as they stand in registers (tf32, mma_half): no conversions, 1,930 instructions
//     0.381, 0.604   states come by cp.async, a tile ahead, in the order in which threads hold them
//     0.366, 0.570   v and dy take their places in turn from both ends, so that nobody waits for the copy begun last;
//                    and sums over all tiles are in shared memory, as with 3 blocks on a multiprocessor registers run
//                    out, and what the compiler puts elsewhere finds 28 KB of L1 (either alone: no gain)
//     0.363, 0.565   the states' addresses are computed where they are used: another register
//
// No gain: states prefetched into L2; r not loaded where it is not needed; the sum over keys (past) by a product.
// Slower: u and decays in shared memory (0.383), loads past L1 (0.438), 2 blocks with 255 registers each (0.611; but
// 0.634 beside 0.654 for 32 heads, where 2 run anyway).
//
//     make -C dev wkv_backward && dev/wkv_backward [VERSION [B T H]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static int B, T, H, A;
static Array<floatX> r, k, v, w, u, y, dy, dr, dk, dv, dw;
static Array<float> du, dw_sum, states, states16;

static const int TOKENS = 16; // from one state kept to the next, in 1 and 2

struct In {
    const floatX *r, *k, *v, *w, *u, *dy;
};
struct Out {
    floatX *dr, *dk, *dv, *dw;
    float *du;
};

__device__ inline float decay(floatX w) { return expf(-expf((float)w)); }

// ---- 1: walk back, and from the last state kept forward again ----

// Thread i: row i of S, kept before every 16th token: states (B, H, T / 16, N keys, N values)
__global__ void wkv_states(float *states, const floatX *k, const floatX *v, const floatX *w, int T, int A) {
    const int i = threadIdx.x, chunks = (T + TOKENS - 1) / TOKENS;
    float S[N] = {};
    for (int t = 0; t < T; t++) {
        const int64_t at = ((int64_t)blockIdx.y * T + t) * A + blockIdx.x * N;
        float *kept = states + ((((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * chunks + t / TOKENS) * N + i) * N;
        const float d = decay(w[at + i]), ki = (float)k[at + i];
#pragma unroll
        for (int j = 0; j < N; j++) {
            if (t % TOKENS == 0) kept[j] = S[j];
            S[j] = d * S[j] + ki * (float)v[at + j];
        }
    }
}

__global__ void wkv_backward_keys(Out out, In in, const float *states, int T, int A) {
    const int i = threadIdx.x, chunks = (T + TOKENS - 1) / TOKENS;
    const float u = (float)in.u[blockIdx.x * N + i];
    float dS[N] = {}, du = 0;
    for (int t = T - 1; t >= 0; t--) {
        const int64_t at = ((int64_t)blockIdx.y * T + t) * A + blockIdx.x * N;
        const float *kept =
            states + ((((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * chunks + t / TOKENS) * N + i) * N;
        float S[N];
#pragma unroll
        for (int j = 0; j < N; j++) S[j] = kept[j];
        for (int s = t / TOKENS * TOKENS; s < t; s++) { // S_t again
            const int64_t from = at + (int64_t)(s - t) * A;
            const float d = decay(in.w[from + i]), ki = (float)in.k[from + i];
#pragma unroll
            for (int j = 0; j < N; j++) S[j] = d * S[j] + ki * (float)in.v[from + j];
        }
        const float ri = (float)in.r[at + i], ki = (float)in.k[at + i], d = decay(in.w[at + i]);
        float dr = 0, dk = 0, dd = 0, v_dy = 0;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float dyj = (float)in.dy[at + j], vj = (float)in.v[at + j];
            dr += dyj * S[j];
            dk += vj * dS[j];
            dd += S[j] * dS[j];
            v_dy += vj * dyj;
            dS[j] = d * dS[j] + ri * dyj;
        }
        out.dr[at + i] = (floatX)(dr + u * ki * v_dy);
        out.dk[at + i] = (floatX)(dk + u * ri * v_dy);
        out.dw[at + i] = (floatX)(-expf((float)in.w[at + i]) * d * dd);
        du += ri * ki * v_dy;
    }
    out.du[(int64_t)blockIdx.y * A + blockIdx.x * N + i] = du;
}

__global__ void wkv_backward_values(Out out, In in, int T, int A) {
    const int j = threadIdx.x;
    float dS[N] = {};
    for (int t = T - 1; t >= 0; t--) {
        const int64_t at = ((int64_t)blockIdx.y * T + t) * A + blockIdx.x * N;
        const float dyj = (float)in.dy[at + j];
        float dv = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float ri = (float)in.r[at + i], ki = (float)in.k[at + i];
            dv += ki * (dS[i] + ri * (float)in.u[blockIdx.x * N + i] * dyj);
            dS[i] = decay(in.w[at + i]) * dS[i] + ri * dyj;
        }
        out.dv[at + j] = (floatX)dv;
    }
}

// ---- 2: one kernel, 16 tokens in shared memory ----

struct Tile {
    float r[TOKENS][N], k[TOKENS][N], v[TOKENS][N], e[TOKENS][N], d[TOKENS][N], dy[TOKENS][N], u[N];
};

__device__ inline float backward_of_key(Out out, const Tile &tile, float (&dS)[N], const float *kept, int t, int64_t at,
                                        int i) {
    float S[N], dr = 0, dk = 0, dd = 0, v_dy = 0;
#pragma unroll
    for (int j = 0; j < N; j++) S[j] = kept[j];
    for (int s = 0; s < t; s++)
#pragma unroll
        for (int j = 0; j < N; j++) S[j] = tile.d[s][i] * S[j] + tile.k[s][i] * tile.v[s][j];
#pragma unroll
    for (int j = 0; j < N; j++) {
        dr += tile.dy[t][j] * S[j];
        dk += tile.v[t][j] * dS[j];
        dd += S[j] * dS[j];
        v_dy += tile.v[t][j] * tile.dy[t][j];
        dS[j] = tile.d[t][i] * dS[j] + tile.r[t][i] * tile.dy[t][j];
    }
    out.dr[at] = (floatX)(dr + tile.u[i] * tile.k[t][i] * v_dy);
    out.dk[at] = (floatX)(dk + tile.u[i] * tile.r[t][i] * v_dy);
    out.dw[at] = (floatX)(-tile.e[t][i] * tile.d[t][i] * dd);
    return tile.r[t][i] * tile.k[t][i] * v_dy; // to du
}

__device__ inline void backward_of_value(Out out, const Tile &tile, float (&dS)[N], int t, int64_t at, int j) {
    float dv = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        dv += tile.k[t][i] * (dS[i] + tile.r[t][i] * tile.u[i] * tile.dy[t][j]);
        dS[i] = tile.d[t][i] * dS[i] + tile.r[t][i] * tile.dy[t][j];
    }
    out.dv[at] = (floatX)dv;
}

__global__ void __launch_bounds__(2 * N) wkv_backward_2(Out out, In in, const float *states, int T, int A) {
    __shared__ Tile tile;
    const int i = threadIdx.x % N, chunks = (T + TOKENS - 1) / TOKENS; // threads 0..63: key i; 64..127: value i
    float dS[N] = {}, du = 0;
    if (threadIdx.x < N) tile.u[i] = (float)in.u[blockIdx.x * N + i];
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        const int tokens = min(TOKENS, T - chunk * TOKENS);
        const int64_t base = ((int64_t)blockIdx.y * T + chunk * TOKENS) * A + blockIdx.x * N + i;
        const float *kept = states + ((((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * chunks + chunk) * N + i) * N;
        __syncthreads();
        for (int t = threadIdx.x / N; t < tokens; t += 2) {
            const int64_t at = base + (int64_t)t * A;
            tile.r[t][i] = (float)in.r[at];
            tile.k[t][i] = (float)in.k[at];
            tile.v[t][i] = (float)in.v[at];
            tile.dy[t][i] = (float)in.dy[at];
            tile.e[t][i] = expf((float)in.w[at]);
            tile.d[t][i] = expf(-tile.e[t][i]);
        }
        __syncthreads();
        for (int t = tokens - 1; t >= 0; t--)
            if (threadIdx.x < N) du += backward_of_key(out, tile, dS, kept, t, base + (int64_t)t * A, i);
            else backward_of_value(out, tile, dS, t, base + (int64_t)t * A, i);
    }
    if (threadIdx.x < N) out.du[(int64_t)blockIdx.y * A + blockIdx.x * N + i] = du;
}

// ---- 3: in use; the forward pass left its states ----

static Wkv wkv_in_use(void) { return {r.p, k.p, v.p, w.p, nullptr, u.p, nullptr, false, states.p, nullptr, T, H}; }
static void wkv_backward_in_use(void) {
    wkv_backward(WkvGradients{dy.p, dr.p, dk.p, dv.p, dw.p, dw_sum.p, du.p}, wkv_in_use(), B);
}

static void run(int version) {
    const dim3 grid(H, B);
    const In in = {r.p, k.p, v.p, w.p, u.p, dy.p};
    const Out out = {dr.p, dk.p, dv.p, dw.p, du.p};
    if (version < 3) wkv_states<<<grid, N, 0, stream>>>(states16.p, k.p, v.p, w.p, T, A);
    if (version == 1) {
        wkv_backward_keys<<<grid, N, 0, stream>>>(out, in, states16.p, T, A);
        wkv_backward_values<<<grid, N, 0, stream>>>(out, in, T, A);
    }
    if (version == 2) wkv_backward_2<<<grid, 2 * N, 0, stream>>>(out, in, states16.p, T, A);
    if (version == 3) wkv_backward_in_use();
}

// ---- what to expect ----

static void expect_head(int64_t head) {
    const int h = (int)(head % H), b = (int)(head / H);
    std::vector<double> S((int64_t)(T + 1) * N * N), dS(N * N), du_of(N); // S of all tokens
    for (int t = 0; t < T; t++)
        for (int64_t i = 0, at = ((int64_t)b * T + t) * A + h * N; i < N; i++)
            for (int j = 0; j < N; j++)
                S[((t + 1) * N + i) * N + j] = exp(-exp(w[at + i])) * S[(t * N + i) * N + j] + k[at + i] * v[at + j];
    for (int t = T - 1; t >= 0; t--) {
        const int64_t at = ((int64_t)b * T + t) * A + h * N;
        double dv_of[N] = {}, v_dy = 0;
        for (int j = 0; j < N; j++) v_dy += v[at + j] * dy[at + j];
        for (int i = 0; i < N; i++) {
            const double e = exp(w[at + i]), d = exp(-e), ri = r[at + i], ki = k[at + i], ui = u[h * N + i];
            double dr_of = ui * ki * v_dy, dk_of = ui * ri * v_dy, dd = 0, s2 = 0, ds2 = 0;
            for (int j = 0; j < N; j++) {
                const double s = S[(t * N + i) * N + j], ds = dS[i * N + j];
                dr_of += dy[at + j] * s;
                dk_of += v[at + j] * ds;
                dd += s * ds;
                s2 += s * s, ds2 += ds * ds;
                dv_of[j] += ki * (ds + ri * ui * dy[at + j]);
                dS[i * N + j] = d * ds + ri * dy[at + j];
            }
            dr.expect(at + i, dr_of);
            dk.expect(at + i, dk_of);
            // a sum of N products of any sign: its usual size
            dw.expect(at + i, -e * d * dd, e * d * sqrt(s2 * ds2 / N));
            du_of[i] += ri * ki * v_dy;
        }
        for (int j = 0; j < N; j++) dv.expect(at + j, dv_of[j]);
    }
    for (int i = 0; i < N; i++) du.expect((int64_t)b * A + h * N + i, du_of[i]);
}

static void setup(const int *shape) {
    B = shape[0], T = shape[1], H = shape[2], A = H * N;
    const int64_t n = (int64_t)B * T * A, heads = (int64_t)B * H;
    for (Array<floatX> *input : {&r, &k, &v, &dy}) input->random(n);
    u.random(A);
    // as in wkv_forward.cu: half the channels soon forget, some of the others remember all tokens
    w.fill(n, [](int64_t i) { return (float)(-10 + 14 * lab_uniform(1, i % A % 2 ? i : i % A)); });
    y.allocate(n);
    states.allocate(heads * ceil_div(T, CHUNK) * N * N);
    states16.allocate(heads * ceil_div(T, TOKENS) * N * N);
    dw_sum.allocate((int64_t)B * A);
    wkv_forward(y.p, wkv_in_use(), B);
    // In bf16 states are made of keys rounded once more, and dv has dS as a rounded operand. Seen: up to 1.6e-2
    const double tolerance = by_precision(1e-5, 2e-2), wide = by_precision(1e-5, 5e-2);
    dr.output("dr", wide, n);
    dk.output("dk", tolerance, n);
    dv.output("dv", wide, n);
    dw.output("dw", tolerance, n);
    du.output("du", tolerance, (int64_t)B * A);
    for (int64_t head : sample(heads, 4)) expect_head(head);
}

static Cost cost(const int *shape) {
    const double numbers = (double)shape[0] * shape[1] * shape[2] * N;
    return {9 * sizeof(floatX) * numbers, 14 * N * numbers};
}

int main(int argc, char **argv) {
    return lab_main({{"wkv_backward",
                      {{"B", 1}, {"T", 1}, {"H", 1}},
                      {"walk back, and forward again", "16 tokens in shared memory", "in use"},
                      {{2, 1, 3}, {2, 37, 1}, {1, 137, 2}, {1, 150, 3}},
                      {{32, 1024, 12}, {8, 2048, 32}},
                      setup,
                      run,
                      cost}},
                    argc, argv);
}
