// The token shift's ddlerp, as Finch-C2 has it: five mixes of each token with the one before it,
//
//     out_i = x + diff * (mu_i + m_i),   diff = shift(x) - x,   m_i = h_i w2_i          i: r, k, v, w, v2
//
// where h (BT, 5 x 32) is the hidden layer of the low-rank part, h_i its i-th 32 columns, w2 (5, 32, C).
//
// Floor: bytes. Forward reads x (and h, 160 numbers a token) and writes 5 outputs: 6 units of BT C floatX. The rank-32
// product costs 320 flops a number, little for tensor cores. Backward reads x and 5 gradients and writes dx: 7 units.
//
// Forward:   1 m by cuBLAS, then a launch for each mix, a thread an element: m is written and read, x is read 10 times:
//              25 units
//            2 m by cuBLAS, then all five mixes in one pass: a thread owns 8 channels, walks the tokens, and the token
//              before is what it held a moment ago: 16 units
//            3 the product inside the kernel: m_i goes from the tensor cores through shared memory to the mix: 6 units
//            4 without the way through shared memory: w2's columns are permuted so that what a lane gets of a result of
//              mma are 8 neighbouring channels, 16 bytes. But a warp waits for its h, then for its x, and has nothing
//              else to do
//            5 in use: 4 with h and x of the next 64 tokens on their way into shared memory meanwhile
// Backward, where dh is given as the gradient before the tanh that made h, times 1 - h^2:
//            1 m and dm in memory, a thread an element; the sums over tokens by a thread a channel
//            2 in use: a kernel for dx and dh, where blocks own tokens and walk the channels, and one for dw2 and dmu,
//              where blocks own channels and walk the tokens. Both read x and the gradients, 13 units in all: one pass
//              would write and read as many bytes in partial sums of dh (or of dw2, if blocks own tokens)
//
// The hidden layer itself comes from one more mix of the same tokens,
//
//     h = tanh((x + diff * mu_x) @ w1)
//
// Floor: x is read, 1 unit; backward x is read, and the gradient of x is added to what is there, 3 units.
//
// Hidden:    1 the mixed x in memory: read, write, read again: 3 units forward. Backward its gradient, too: 8 units
//            2 in use: the shift is linear, so it comes after the product, where a token has 160 numbers: the floor's
//              units. The price is twice the flops, and 320 numbers a token more: bytes of 1.7 units at C = 768, of 0.6
//              at 2048
//
//     make -C dev ddlerp && dev/ddlerp [VERSION [B T C]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static const int MIXES = 5, HIDDEN = MIXES * MIX_RANK; // MIX_RANK, the trainer's: 32
static int B, T, C, BT;
static Array<floatX> x, h, w2, mu[MIXES], out[MIXES], g[MIXES], m, dm, dx, dh;
static Array<float> dmu[MIXES], dw2, partial;

// m (5, BT, C); x: outputs, backward their gradients
struct Five {
    const floatX *mu[MIXES], *m;
    floatX *x[MIXES];
};

static Five five(Array<floatX> *to) {
    Five mix = {{}, m.p, {}};
    for (int i = 0; i < MIXES; i++) mix.mu[i] = mu[i].p, mix.x[i] = to[i].p;
    return mix;
}

static void make_m(void) {
    matmul(m.p, C, rows(h.p, HIDDEN, MIX_RANK), rows(w2.p, C, MIX_RANK * C), BT, C, MIX_RANK, 0, MIXES,
           (int64_t)BT * C);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

__global__ void mix_1(floatX *out, const floatX *x, const floatX *mu, const floatX *m, int BT, int T, int C) {
    const int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, row = at / C;
    if (row >= BT) return;
    const float here = (float)x[at], before = row % T ? (float)x[at - C] : 0;
    out[at] = (floatX)(here + (before - here) * ((float)mu[at % C] + (float)m[at]));
}

static const int ROWS = 8; // tokens that a thread walks

__global__ void mix_2(Five mix, const floatX *x, int BT, int T, int C) {
    const int c = threadIdx.x * 8;
    if (c >= C) return;
    Pack mu[MIXES];
    for (int i = 0; i < MIXES; i++) mu[i] = load(mix.mu[i] + c);
    const int64_t begin = (int64_t)blockIdx.x * ROWS;
    Pack before = begin ? load(x + (begin - 1) * C + c) : zero_pack();
    for (int64_t row = begin; row < min((int64_t)BT, begin + ROWS); row++) {
        const Pack here = load(x + row * C + c);
        if (row % T == 0) before = zero_pack();
        for (int i = 0; i < MIXES; i++) {
            Pack v = load(mix.m + ((int64_t)i * BT + row) * C + c);
            for (int j = 0; j < 8; j++) v.x[j] = here.x[j] + (before.x[j] - here.x[j]) * (mu[i].x[j] + v.x[j]);
            store(mix.x[i] + row * C + c, v);
        }
        before = here;
    }
}

// A block owns 64 channels, keeps their share of w2 in shared memory and walks 256 tokens, 64 at a time, a warp 16 of
// them.
static const int WALK = 256, LDH = HIDDEN + PAD, LDW = 64 + PAD, LDM = 64 + 4;

struct MixTile {
    alignas(16) floatX w2[HIDDEN][LDW];
    alignas(16) floatX h[64][LDH];
    // of each warp: 16 tokens x 64 channels of one mix
    float m[4][16][LDM];
};

__global__ void __launch_bounds__(128)
    mix_3(Five mix, const floatX *x, const floatX *h, const floatX *w2, int BT, int T, int C) {
    MixTile &s = *dynamic_smem<MixTile>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c0 = blockIdx.x * 64, c = lane % 8 * 8;
    for (int i = threadIdx.x; i < HIDDEN * 8; i += 128)
        store(&s.w2[i / 8][i % 8 * 8], load(w2 + (int64_t)(i / 8) * C + c0 + i % 8 * 8));
    const int64_t begin = (int64_t)blockIdx.y * WALK, end = min((int64_t)BT, begin + WALK);
    for (int64_t t0 = begin; t0 < end; t0 += 64) {
        __syncthreads();
        for (int i = threadIdx.x; i < 64 * HIDDEN / 8; i += 128) {
            const int t = i / (HIDDEN / 8), column = i % (HIDDEN / 8) * 8;
            store(&s.h[t][column], t0 + t < end ? load(h + (t0 + t) * HIDDEN + column) : zero_pack());
        }
        __syncthreads();
        for (int i = 0; i < MIXES; i++) {
            TileC product[8] = {};
            for (int k = MIX_RANK * i; k < MIX_RANK * (i + 1); k += 16) {
                TileB b[8];
                for (int n = 0; n < 8; n++) b[n] = load_b_t(&s.w2[k][8 * n], LDW);
                mma(product, load_a(&s.h[16 * warp][k], LDH), b);
            }
            for (int n = 0; n < 8; n++)
                for (int e = 0; e < 4; e++) s.m[warp][tile_row(e)][8 * n + tile_col(e)] = product[n].x[e];
            __syncwarp();
            const Pack mu = load(mix.mu[i] + c0 + c);
            for (int t = lane / 8; t < 16 && t0 + 16 * warp + t < end; t += 4) { // 8 lanes a row
                const int64_t row = t0 + 16 * warp + t, at = row * C + c0 + c;
                const Pack here = load(x + at), before = row % T ? load(x + at - C) : zero_pack();
                Pack v = load(&s.m[warp][t][c]);
                for (int j = 0; j < 8; j++) v.x[j] = here.x[j] + (before.x[j] - here.x[j]) * (mu.x[j] + v.x[j]);
                store(mix.x[i] + at, v);
            }
            __syncwarp();
        }
    }
}

__global__ void __launch_bounds__(128) mix_4(MixTask<MIXES> mix, const floatX *x, int BT, int T, int C) {
    DdlerpWeights<MIXES> &s = *dynamic_smem<DdlerpWeights<MIXES>>();
    const int first = blockIdx.x * MIX_CHANNELS, warp = threadIdx.x / 32;
    ddlerp_load_weights(s, mix, first, C);
    __syncthreads();
    for (int row0 = (blockIdx.y * 4 + warp) * 16; row0 < BT; row0 += gridDim.y * 64) {
        TileA h[MIXES][2];
        for (int i = 0; i < MIXES; i++)
            for (int k = 0; k < 2; k++)
                h[i][k] = load_a_global(mix.low.h + (int64_t)row0 * HIDDEN + MIX_RANK * i + 16 * k, HIDDEN, BT - row0);
        for (int group = 0; group < MIX_CHANNELS; group += 32) {
            const int c = first + group + threadIdx.x % 4 * 8;
            Pack here[2], before[2];
            for (int half = 0; half < 2; half++) {
                const int64_t row = row0 + tile_row(2 * half);
                here[half] = row < BT ? load(x + row * C + c) : zero_pack();
                before[half] = row < BT && row % T ? load(x + (row - 1) * C + c) : zero_pack();
            }
#pragma unroll
            for (int i = 0; i < MIXES; i++) {
                TileC amount[4];
                ddlerp_amounts(amount, s, i, group, h[i]);
                for (int half = 0; half < 2; half++) {
                    const int64_t row = row0 + tile_row(2 * half);
                    Pack v = here[half];
                    for (int j = 0; j < 8; j++)
                        v.x[j] += (before[half].x[j] - v.x[j]) * amount[j / 2].x[2 * half + j % 2];
                    if (row < BT) store(mix.x[i] + row * C + c, v);
                }
            }
        }
    }
}

static MixTask<MIXES> mixes_in_use(Array<floatX> *to) {
    MixTask<MIXES> mix = {{}, {h.p, HIDDEN, w2.p}, {}};
    for (int i = 0; i < MIXES; i++) mix.mu[i] = mu[i].p, mix.x[i] = to[i].p;
    return mix;
}

static void mix_forward_in_use(void) { ddlerp_forward<MIXES>(mixes_in_use(out), x.p, BT, T, C); }

static void forward_run(int version) {
    const int64_t E = (int64_t)BT * C;
    if (version == 1 || version == 2) make_m();
    for (int i = 0; i < MIXES && version == 1; i++)
        mix_1<<<(int)ceil_div(E, 256), 256, 0, stream>>>(out[i].p, x.p, mu[i].p, m.p + i * E, BT, T, C);
    if (version == 2) mix_2<<<(int)ceil_div(BT, ROWS), row_threads(C), 0, stream>>>(five(out), x.p, BT, T, C);
    if (version == 3) {
        allow_smem(mix_3, sizeof(MixTile));
        mix_3<<<dim3(C / 64, (int)ceil_div(BT, WALK)), 128, sizeof(MixTile), stream>>>(five(out), x.p, h.p, w2.p, BT, T,
                                                                                       C);
    }
    if (version == 4) {
        const size_t smem = sizeof(DdlerpWeights<MIXES>);
        allow_smem(mix_4, smem);
        mix_4<<<dim3(C / 64, (int)ceil_div(4 * multiprocessors, C / 64)), 128, smem, stream>>>(mixes_in_use(out), x.p,
                                                                                               BT, T, C);
    }
    if (version == 5) mix_forward_in_use();
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward. With c_i = mu_i + m_i and g_i the gradient of out_i:
//
//     dx_t = sum_i g_i,t (1 - c_i,t) + sum_i g_i,t+1 c_i,t+1 (of the next token of the sequence)
//     dm_i = g_i * diff,  dmu_i = sum over tokens of dm_i,  dh_i = dm_i w2_i^T (1 - h_i^2),  dw2_i = h_i^T dm_i

__global__ void mix_backward_1(Five mix, floatX *dx, floatX *dm, const floatX *x, int BT, int T, int C) {
    const int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, row = at / C, E = (int64_t)BT * C;
    if (row >= BT) return;
    float sum = 0;
    for (int i = 0; i < MIXES; i++) {
        const float mu = (float)mix.mu[i][at % C], here = (float)mix.x[i][at];
        sum += here * (1 - mu - (float)mix.m[i * E + at]);
        if ((row + 1) % T && row + 1 < BT) sum += (float)mix.x[i][at + C] * (mu + (float)mix.m[i * E + at + C]);
        dm[i * E + at] = (floatX)(here * ((row % T ? (float)x[at - C] : 0) - (float)x[at]));
    }
    dx[at] = (floatX)sum;
}

__global__ void mix_backward_sums(Targets dmu, const floatX *dm, int BT, int C) { // a thread a channel of a mix
    const int c = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y;
    if (c >= C) return;
    float sum = 0;
    for (int64_t row = 0; row < BT; row++) sum += (float)dm[((int64_t)i * BT + row) * C + c];
    dmu.g[i][c] += sum;
}

static void product_gradients(void) { // dh, dw2 from dm
    matmul(dh.p, HIDDEN, rows(dm.p, C, (int64_t)BT * C), columns(w2.p, C, MIX_RANK * C), BT, MIX_RANK, C, 0, MIXES,
           MIX_RANK);
    tanh_backward_kernel<<<pack_blocks((int64_t)BT * HIDDEN), 256, 0, stream>>>(dh.p, h.p, (int64_t)BT * HIDDEN);
    matmul(dw2.p, C, columns(h.p, HIDDEN, MIX_RANK), rows(dm.p, C, (int64_t)BT * C), MIX_RANK, C, BT, 1, MIXES,
           MIX_RANK * C);
}

static Targets dmu_targets(void) { return {{dmu[0].p, dmu[1].p, dmu[2].p, dmu[3].p, dmu[4].p}}; }

static void mix_backward_in_use(void) {
    ddlerp_backward<MIXES, floatX, false>(mixes_in_use(g), {dh.p, dw2.p, dmu_targets()}, dx.p, x.p, partial.p, BT, T,
                                          C);
}

static void backward_run(int version) {
    if (version == 1) {
        make_m();
        mix_backward_1<<<(int)ceil_div((int64_t)BT * C, 256), 256, 0, stream>>>(five(g), dx.p, dm.p, x.p, BT, T, C);
        mix_backward_sums<<<dim3((int)ceil_div(C, 32), MIXES), 32, 0, stream>>>(dmu_targets(), dm.p, BT, C);
        product_gradients();
    }
    if (version == 2) mix_backward_in_use();
}

// ---------------------------------------------------------------------------------------------------------------------
// The hidden layer

static Array<floatX> w1, mu_x, xx, dxx, both, dz;
static Array<float> dw1, dmu_x, dboth, z;

static Dims dims(void) {
    Dims d = {};
    d.B = B, d.T = T, d.C = C, d.BT = BT;
    return d;
}
static MixedInputs layer(void) {
    static Param mu, w;
    mu = {mu_x.p, dmu_x.p, 1, C, C, nullptr}, w = {w1.p, dw1.p, C, HIDDEN, HIDDEN, nullptr};
    return {.n = MIXES, .mu_x = &mu, .w1 = &w, .both = both.p, .h = h.p, .tmp = {z.p, dh.p, dz.p, dboth.p}};
}

static void hidden_in_use(void) { mixed_inputs_hidden(dims(), layer(), x.p); }
static void hidden_run(int version) {
    if (version == 1) {
        lerp_forward<1>({{mu_x.p}, {}, {xx.p}}, x.p, BT, T, C);
        matmul(h.p, HIDDEN, rows(xx.p, C), rows(w1.p, HIDDEN), BT, HIDDEN, C);
        tanh_forward_kernel<<<pack_blocks((int64_t)BT * HIDDEN), 256, 0, stream>>>(h.p, (int64_t)BT * HIDDEN);
    }
    if (version == 2) hidden_in_use();
}

static void hidden_backward_in_use(void) { mixed_inputs_hidden_backward(dims(), layer(), dx.p, x.p); }
static void hidden_backward_run(int version) {
    if (version == 1) {
        matmul(dw1.p, HIDDEN, columns(xx.p, C), rows(dh.p, HIDDEN), C, HIDDEN, BT, 1);
        matmul(dxx.p, C, rows(dh.p, HIDDEN), columns(w1.p, HIDDEN), BT, C, HIDDEN);
        lerp_backward<1>({{mu_x.p}, {}, {dxx.p}}, g[0].p, {{dmu_x.p}}, partial.p, x.p, BT, T, C);
        add_forward_kernel<<<pack_blocks((int64_t)BT * C), 256, 0, stream>>>(dx.p, dx.p, g[0].p, (int64_t)BT * C);
    }
    if (version == 2) hidden_backward_in_use();
}

// ---------------------------------------------------------------------------------------------------------------------
// What to expect

static void inputs(const int *shape) {
    B = shape[0], T = shape[1], C = shape[2], BT = B * T;
    x.random((int64_t)BT * C);
    // as tanh makes them
    h.fill((int64_t)BT * HIDDEN, [](int64_t i) { return (float)(2 * lab_uniform(1, i) - 1); });
    w2.random(HIDDEN * C, 0.2);
    for (Array<floatX> &each : mu) each.random(C, 0.3, 0.5);
    m.allocate((int64_t)MIXES * BT * C);
    dm.allocate((int64_t)MIXES * BT * C);
}

static double diff_at(int64_t row, int c) { return (row % T ? x[(row - 1) * C + c] : 0) - x[row * C + c]; }
static double coefficient(int i, int64_t row, int c) {
    double sum = mu[i][c];
    for (int l = MIX_RANK * i; l < MIX_RANK * (i + 1); l++) sum += h[row * HIDDEN + l] * w2[(int64_t)l * C + c];
    return sum;
}

static void forward_setup(const int *shape) {
    static const char *names[] = {"r", "k", "v", "w", "v2"};
    inputs(shape);
    const std::vector<int64_t> some = sample(BT, 50);
    for (int i = 0; i < MIXES; i++) {
        out[i].output(names[i], by_precision(1e-5, 2e-2), (int64_t)BT * C);
        for (int64_t row : some)
            for (int c = 0; c < C; c++)
                out[i].expect(row * C + c, x[row * C + c] + diff_at(row, c) * coefficient(i, row, c));
    }
}

static void backward_setup(const int *shape) {
    static const char *names[] = {"mu_r", "mu_k", "mu_v", "mu_w", "mu_v2"};
    inputs(shape);
    partial.allocate(ddlerp_partial_floats(C));
    for (Array<floatX> &each : g) each.random((int64_t)BT * C);
    dx.output("dx", by_precision(1e-5, 1e-2), (int64_t)BT * C);
    dh.output("dh", by_precision(1e-5, 1e-2), (int64_t)BT * HIDDEN);
    for (int64_t row : sample(BT, 50)) {
        for (int c = 0; c < C; c++) {
            double sum = 0;
            for (int i = 0; i < MIXES; i++) {
                sum += g[i][row * C + c] * (1 - coefficient(i, row, c));
                if ((row + 1) % T) sum += g[i][(row + 1) * C + c] * coefficient(i, row + 1, c);
            }
            dx.expect(row * C + c, sum);
        }
        for (int l = 0; l < HIDDEN; l++) {
            double sum = 0;
            for (int c = 0; c < C; c++) sum += g[l / MIX_RANK][row * C + c] * diff_at(row, c) * w2[(int64_t)l * C + c];
            dh.expect(row * HIDDEN + l, sum * (1 - pow(h[row * HIDDEN + l], 2)));
        }
    }
    dw2.random(HIDDEN * C); // gradients are added to what is there
    dw2.output("dw2", by_precision(1e-4, 1e-2));
    for (int64_t at : sample(HIDDEN * C, 300)) {
        double sum = dw2[at];
        for (int64_t row = 0; row < BT; row++)
            sum += h[row * HIDDEN + at / C] * g[at / C / MIX_RANK][row * C + at % C] * diff_at(row, (int)(at % C));
        dw2.expect(at, sum);
    }
    for (int i = 0; i < MIXES; i++) {
        dmu[i].random(C);
        dmu[i].output(names[i], by_precision(1e-4, 1e-2));
        for (int64_t c : sample(C, 50)) {
            double sum = dmu[i][c];
            for (int64_t row = 0; row < BT; row++) sum += g[i][row * C + c] * diff_at(row, (int)c);
            dmu[i].expect(c, sum);
        }
    }
}

static double xx_at(int64_t row, int c) { return x[row * C + c] + diff_at(row, c) * mu_x[c]; }

static void hidden_inputs(const int *shape) {
    B = shape[0], T = shape[1], C = shape[2], BT = B * T;
    x.random((int64_t)BT * C);
    w1.random(HIDDEN * C, 1 / sqrt(C));
    mu_x.random(C, 0.3, 0.5);
    for (Array<floatX> *each : {&xx, &dxx, &g[0]}) each->allocate((int64_t)BT * C);
    both.allocate(2 * HIDDEN * C);
    z.allocate((int64_t)2 * HIDDEN * BT);
    dz.allocate((int64_t)2 * HIDDEN * BT);
    dboth.allocate(2 * HIDDEN * C);
}

static void hidden_setup(const int *shape) {
    hidden_inputs(shape);
    h.output("h", by_precision(1e-4, 2e-2), (int64_t)BT * HIDDEN); // 1e-4: a sum of C products
    for (int64_t row : sample(BT, 50))
        for (int l = 0; l < HIDDEN; l++) {
            double sum = 0;
            for (int c = 0; c < C; c++) sum += xx_at(row, c) * w1[(int64_t)c * HIDDEN + l];
            h.expect(row * HIDDEN + l, tanh(sum));
        }
}

static void hidden_backward_setup(const int *shape) {
    hidden_inputs(shape);
    lerp_forward<1>({{mu_x.p}, {}, {xx.p}}, x.p, BT, T, C); // the forward passes left these
    ddlerp_hidden_weights_kernel<<<pack_blocks(HIDDEN * C), 256, 0, stream>>>(both.p, w1.p, mu_x.p, C, HIDDEN, HIDDEN);
    partial.allocate((int64_t)row_blocks(BT, C) * C);
    dh.random((int64_t)BT * HIDDEN);
    dx.random((int64_t)BT * C); // gradients are added to what is there
    dx.output("dx", by_precision(1e-5, 1e-2));
    auto dxx_at = [&](int64_t row, int c) {
        double sum = 0;
        for (int l = 0; l < HIDDEN; l++) sum += dh[row * HIDDEN + l] * w1[(int64_t)c * HIDDEN + l];
        return sum;
    };
    for (int64_t row : sample(BT, 50))
        for (int c = 0; c < C; c++)
            dx.expect(row * C + c, dx[row * C + c] + dxx_at(row, c) * (1 - mu_x[c]) +
                                       ((row + 1) % T ? dxx_at(row + 1, c) * mu_x[c] : 0));
    dw1.random(HIDDEN * C);
    dw1.output("dw1", by_precision(1e-4, 1e-2));
    for (int64_t at : sample(HIDDEN * C, 300)) {
        double sum = dw1[at];
        for (int64_t row = 0; row < BT; row++) sum += xx_at(row, (int)(at / HIDDEN)) * dh[row * HIDDEN + at % HIDDEN];
        dw1.expect(at, sum);
    }
    dmu_x.random(C);
    dmu_x.output("mu_x", by_precision(1e-4, 1e-2));
    for (int64_t c : sample(C, 20)) {
        double sum = dmu_x[c];
        for (int64_t row = 0; row < BT; row++) sum += dxx_at(row, (int)c) * diff_at(row, (int)c);
        dmu_x.expect(c, sum);
    }
}

static Cost cost(const int *shape, double units, double products) {
    const double n = (double)shape[0] * shape[1];
    return {sizeof(floatX) * n * (units * shape[2] + HIDDEN), 2. * HIDDEN * products * n * shape[2]};
}
static Cost forward_cost(const int *shape) { return cost(shape, 6, 1); }
static Cost backward_cost(const int *shape) { return cost(shape, 7, 3); }
static Cost hidden_cost(const int *shape) { return cost(shape, 1, 1); }
static Cost hidden_backward_cost(const int *shape) { return cost(shape, 3, 2); }

int main(int argc, char **argv) {
    const Shapes small = {{1, 1, 64}, {3, 37, 192}, {2, 150, 320}, {1, 290, 4096}},
                 large = {{32, 1024, 768}, {8, 2048, 2048}};
    const std::vector<Dimension> dimensions = {{"B", 1}, {"T", 1}, {"C", 64}};
    return lab_main({{"ddlerp_forward",
                      dimensions,
                      {"a launch a mix", "five mixes in one pass", "with the product inside", "and in registers",
                       "in use: loads ahead"},
                      small,
                      large,
                      forward_setup,
                      forward_run,
                      forward_cost},
                     {"ddlerp_backward",
                      dimensions,
                      {"a thread an element", "in use"},
                      small,
                      large,
                      backward_setup,
                      backward_run,
                      backward_cost},
                     {"ddlerp_hidden_forward",
                      dimensions,
                      {"the mix in memory", "in use: the shift after the product"},
                      small,
                      large,
                      hidden_setup,
                      hidden_run,
                      hidden_cost},
                     {"ddlerp_hidden_backward",
                      dimensions,
                      {"the mix in memory", "in use: the shift after the product"},
                      small,
                      large,
                      hidden_backward_setup,
                      hidden_backward_run,
                      hidden_backward_cost}},
                    argc, argv);
}
