// Twins of some kernels for the CPU, in plain loops: what launches such a kernel calls its twin instead (README.md
// here). train_goldfinch.cu includes this behind its kernels, whose words and equations it shares.
#pragma once

// The kernel's twin for the CPU, to the bit
static void add_partials_in_loops(Targets to, float *matrix, const float *partial, int P, int rows, int n, int C,
                                  int parts) {
    const int64_t all = (int64_t)(rows + n) * C;
    cuda_on_cpu::for_each(all / 32, 32 * P, [&](int64_t block) {
        const int64_t at = block * 32, row = at / C;
        float sums[32][32] = {}, *target = row < rows ? matrix + at : to.g[row - rows] + at % C;
        for (int i = 0; i < P; i++)
            for (int c = 0; c < 32; c++) sums[i % parts][c] += partial[i * all + at + c];
        for (int i = 1; i < parts; i++)
            for (int c = 0; c < 32; c++) sums[0][c] += sums[i][c];
        for (int c = 0; c < 32; c++) target[c] += sums[0][c];
    });
}

// What the kernel's block_sum is of a row. Not inlined: squares are rounded before they are added, as in the kernel.
__attribute__((noinline)) static float sum_of_row(float *x, int C) {
    float sums[MAX_C / 8] = {}; // of each thread
    for (int t = 0; t < C / 8; t++)
        for (int i = 0; i < 8; i++) sums[t] += x[8 * t + i];
    return cuda_on_cpu::sum_as_block(sums, row_threads(C));
}

// The kernel's twin for the CPU, to the bit
static void layernorm_forward_in_loops(floatX *out, floatX *sum, const floatX *x, const int *index,
                                       const floatX *branch, const LayerNorm &ln, int rows, int C) {
    cuda_on_cpu::for_each(
        rows, 4 * C,
        [&](int64_t row) {
            const int64_t at = row * C, from = index ? (int64_t)index[row] * C : at;
            float v[MAX_C], squares[MAX_C];
            for (int c = 0; c < C; c++) v[c] = (float)x[from + c];
            for (int c = 0; c < C && branch; c++) {
                sum[at + c] = (floatX)(v[c] + (float)branch[at + c]);
                v[c] = (float)sum[at + c];
            }
            const float mean = sum_of_row(v, C) / C;
            for (int c = 0; c < C; c++) {
                v[c] -= mean;
                squares[c] = v[c] * v[c];
            }
            const float rstd = rsqrtf(sum_of_row(squares, C) / C + 1e-5f);
            for (int c = 0; c < C; c++) out[at + c] = (floatX)(v[c] * rstd * (float)ln.gain.w[c] + (float)ln.bias.w[c]);
        });
}

static void rms_norm_forward_in_loops(floatX *out, const floatX *x, int rows, int C) { // to the bit
    cuda_on_cpu::for_each(
        rows, 2 * C,
        [&](int64_t row) {
            float squares[MAX_C];
            for (int c = 0; c < C; c++) squares[c] = (float)x[row * C + c] * (float)x[row * C + c];
            const float scale = 1 / (sqrtf(sum_of_row(squares, C) / C) + 1e-8f);
            for (int c = 0; c < C; c++) out[row * C + c] = (floatX)((float)x[row * C + c] * scale);
        });
}

// ---- ddlerp's twins for the CPU: 64 channels of a row at a time, each number by the same operations in the same order
// as in the kernels ----

// c_i = mu_i + h_i w2_i
template <int n>
static void ddlerp_amounts_in_loops(float *amount, const MixTask<n> &mix, int i, int64_t row, int first, int C) {
    for (int c = 0; c < MIX_CHANNELS; c++) amount[c] = (float)mix.mu[i][first + c];
    for (int k = MIX_RANK * i; k < MIX_RANK * (i + 1); k++) {
        const float h = (float)mix.low.h[row * mix.low.ld + k];
        const floatX *w2 = mix.low.w2 + (int64_t)k * C + first;
        for (int c = 0; c < MIX_CHANNELS; c++) amount[c] += h * (float)w2[c];
    }
}

// shift(x) - x
static void shift_difference(float *diff, const floatX *x, int64_t row, int first, int T, int C) {
    const floatX *now = x + row * C + first, *before = row % T ? now - C : nullptr;
    for (int c = 0; c < MIX_CHANNELS; c++) diff[c] = (before ? (float)before[c] : 0) - (float)now[c];
}

template <int n> static void ddlerp_forward_in_loops(const MixTask<n> &mix, const floatX *x, int BT, int T, int C) {
    const int64_t cost = n * MIX_RANK * C;
    cuda_on_cpu::for_each(BT, cost, [&](int64_t row) {
        for (int first = 0; first < C; first += MIX_CHANNELS) {
            const int64_t at = row * C + first;
            float diff[MIX_CHANNELS], amount[MIX_CHANNELS];
            shift_difference(diff, x, row, first, T, C);
            for (int i = 0; i < n; i++) {
                ddlerp_amounts_in_loops(amount, mix, i, row, first, C);
                for (int c = 0; c < MIX_CHANNELS; c++)
                    mix.x[i][at + c] = (floatX)((float)x[at + c] + diff[c] * amount[c]);
            }
        }
    });
}

// dx and dh. Rows are walked from last to first, so that the next token's part is at hand.
template <int n, typename TX, bool accumulate>
static void ddlerp_backward_x_in_loops(const MixTask<n> &mix, TX *dx, floatX *dh, const floatX *x, int BT, int T,
                                       int C) {
    const int rows = 16, hidden = MIX_RANK * n;
    float *w2 = (float *)malloc((int64_t)hidden * C * sizeof(float)); // transposed: (C, hidden)
    for (int k = 0; k < hidden; k++)
        for (int c = 0; c < C; c++) w2[(int64_t)c * hidden + k] = (float)mix.low.w2[(int64_t)k * C + c];
    cuda_on_cpu::for_each(ceil_div(BT, rows), (int64_t)rows * n * MIX_RANK * C * 2, [&](int64_t part) {
        const int64_t begin = part * rows, end = BT < begin + rows ? BT : begin + rows;
        float dhidden[rows][MIX_RANK * n] = {};
        for (int first = 0; first < C; first += MIX_CHANNELS) {
            float next[MIX_CHANNELS] = {}; // sum_i g_i c_i of the row after this one
            for (int64_t row = end < BT ? end : end - 1; row >= begin; row--) {
                const int64_t at = row * C + first;
                float diff[MIX_CHANNELS], amount[MIX_CHANNELS], dm[MIX_CHANNELS], now[MIX_CHANNELS] = {};
                shift_difference(diff, x, row, first, T, C);
                for (int i = 0; i < n; i++) {
                    const floatX *g = mix.x[i] + at;
                    ddlerp_amounts_in_loops(amount, mix, i, row, first, C);
                    for (int c = 0; c < MIX_CHANNELS; c++) now[c] += (float)g[c] * amount[c];
                    if (row == end) continue;
                    for (int c = 0; c < MIX_CHANNELS; c++) dm[c] = (float)(floatX)((float)g[c] * diff[c]);
                    float *to = dhidden[row - begin] + MIX_RANK * i;
                    for (int c = 0; c < MIX_CHANNELS; c++)
                        for (int k = 0; k < MIX_RANK; k++)
                            to[k] += dm[c] * w2[(int64_t)(first + c) * hidden + MIX_RANK * i + k];
                }
                for (int c = 0; c < MIX_CHANNELS && row < end; c++) {
                    float out = accumulate ? (float)dx[at + c] : 0;
                    out += next[c] - now[c];
                    for (int i = 0; i < n; i++) out += (float)mix.x[i][at + c];
                    dx[at + c] = (TX)out;
                }
                for (int c = 0; c < MIX_CHANNELS; c++) next[c] = row % T ? now[c] : 0;
            }
        }
        for (int64_t row = begin; row < end; row++)
            for (int k = 0; k < hidden; k++) {
                const float h = (float)mix.low.h[row * mix.low.ld + k];
                dh[row * mix.low.ld + k] = (floatX)(dhidden[row - begin][k] * (1 - h * h));
            }
    });
    free(w2);
}

// partial sums of dw2 and dmu
template <int n>
static void ddlerp_backward_w2_in_loops(const MixTask<n> &mix, float *partial, const floatX *x, int BT, int T, int C,
                                        int split) {
    const int64_t cost = ceil_div(BT, split) * MIX_RANK * C;
    const int64_t others = (int64_t)(split - 1) * MIX_W2_ROWS; // rows of other parts between two tiles of a part
    cuda_on_cpu::for_each(split * n, cost, [&](int64_t task) {
        const int64_t part = task / n, i = task % n;
        float *to = partial + part * (MIX_RANK + 1) * n * C;
        for (int first = 0; first < C; first += MIX_CHANNELS) {
            float dw2[MIX_RANK][MIX_CHANNELS] = {}, dmu[4][MIX_CHANNELS] = {}; // dmu: of the lanes that share a column
            for (int64_t row = part * MIX_W2_ROWS; row < BT; row += (row + 1) % MIX_W2_ROWS ? 1 : 1 + others) {
                float diff[MIX_CHANNELS], dm[MIX_CHANNELS];
                shift_difference(diff, x, row, first, T, C);
                for (int c = 0; c < MIX_CHANNELS; c++) dm[c] = (float)mix.x[i][row * C + first + c] * diff[c];
                for (int c = 0; c < MIX_CHANNELS; c++) dmu[row % 8 / 2][c] += dm[c];
                for (int c = 0; c < MIX_CHANNELS; c++) dm[c] = (float)(floatX)dm[c];
                for (int k = 0; k < MIX_RANK; k++) {
                    const float h = (float)mix.low.h[row * mix.low.ld + MIX_RANK * i + k];
                    for (int c = 0; c < MIX_CHANNELS; c++) dw2[k][c] += h * dm[c];
                }
            }
            for (int k = 0; k < MIX_RANK; k++) memcpy(to + (MIX_RANK * i + k) * C + first, dw2[k], sizeof(dw2[k]));
            for (int c = 0; c < MIX_CHANNELS; c++)
                to[(MIX_RANK * n + i) * C + first + c] = (dmu[0][c] + dmu[2][c]) + (dmu[1][c] + dmu[3][c]);
        }
    });
}

// The kernel's twin for the CPU where no gradient follows: the recurrence as it stands above, token by token. Its sums
// come in another order; training has the kernel's.
static void wkv_forward_in_loops(floatX *y, const Wkv &p, int B) {
    const int A = p.H * N;
    const int64_t cost = (int64_t)p.T * N * N;
    cuda_on_cpu::for_each(B * p.H, cost, [&](int64_t head) {
        const int64_t channel = head % p.H * N;
        // S: (keys, values); carry: (values, keys)
        float S[N][N] = {}, *carry = p.carry ? p.carry + head * N * N : nullptr;
        for (int i = 0; i < N && carry; i++)
            for (int j = 0; j < N; j++) S[i][j] = carry[j * N + i];
        for (int t = 0; t < p.T; t++) {
            const int64_t at = (head / p.H * p.T + t) * A + channel;
            float k[N], d_minus_1[N], v[N], out[N] = {}, bonus = 0;
            for (int i = 0; i < N; i++) {
                const float w = p.w ? (float)p.w[at + i] : 0;
                float e = fast_exp(w + (p.time_decay ? (float)p.time_decay[channel + i] : 0));
                e = e < 128 ? e : 128;
                d_minus_1[i] = -one_minus(fast_exp(-e), e);
                k[i] = (float)p.k[at + i] * (p.one_minus_w ? -d_minus_1[i] : 1);
                v[i] = (float)p.v[at + i];
            }
            for (int i = 0; i < N && p.u; i++) bonus += (float)p.r[at + i] * (float)p.u[channel + i] * k[i];
            for (int i = 0; i < N; i++) {
                const float r = (float)p.r[at + i];
                for (int j = 0; j < N; j++) {
                    out[j] += r * S[i][j];
                    S[i][j] += S[i][j] * d_minus_1[i] + k[i] * v[j];
                }
            }
            for (int j = 0; j < N; j++) y[at + j] = (floatX)(out[j] + bonus * v[j] + (p.v2 ? (float)p.v2[at + j] : 0));
        }
        for (int i = 0; i < N && carry; i++)
            for (int j = 0; j < N; j++) carry[j * N + i] = S[i][j];
    });
}
