// Twins of some kernels for the CPU, in plain loops: what launches such a kernel calls its twin instead (README.md
// here). They follow the equations above the kernels, sums in an order of their own. train_goldfinch.cu includes this
// behind its kernels, whose words it shares.
//
// What a loop over channels reads beside its arrays is copied to a local variable first: a store through a pointer
// might change what a lambda holds by reference, and g++ would take numbers one by one.
#pragma once

using cuda_on_cpu::dot, cuda_on_cpu::for_each, cuda_on_cpu::fused, cuda_on_cpu::sum_of;

// to += factor x, n numbers
template <typename X> static void add_scaled(float *to, float factor, const X *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = fused(factor, (float)x[i], to[i]);
}

// Memory that is kept from call to call
static void grow(std::vector<float> &memory, int64_t n) {
    if ((int64_t)memory.size() < n) memory.resize(n);
}

// n numbers for the work of one OS thread
static float *memory_of_thread(int64_t n) {
    static thread_local std::vector<float> memory;
    grow(memory, n);
    return memory.data();
}

// x -= its mean; returns 1/deviation
static float center(float *x, int C) {
    const float mean = sum_of(x, C) / C;
    for (int c = 0; c < C; c++) x[c] -= mean;
    return rsqrtf(dot(x, x, C) / C + 1e-5f);
}

static void add_partials_in_loops(Targets to, float *matrix, const float *partial, int P, int rows, int n, int C) {
    const int64_t all = (int64_t)(rows + n) * C;
    for_each(all / 32, 32 * P, [&](int64_t block) {
        const int64_t at = block * 32, row = at / C;
        float sums[32] = {}, *target = row < rows ? matrix + at : to.g[row - rows] + at % C;
        for (int i = 0; i < P; i++) add_scaled(sums, 1, partial + i * all + at, 32);
        add_scaled(target, 1, sums, 32);
    });
}

static void layernorm_forward_in_loops(floatX *out, floatX *sum, const floatX *x, const int *index,
                                       const floatX *branch, const LayerNorm &ln, int rows, int C) {
    for_each(
        rows, 4 * C,
        [&](int64_t row) {
            const int channels = C;
            const floatX *from = x + (index ? index[row] : row) * C, *other = branch ? branch + row * C : nullptr;
            const floatX *gain = ln.gain.w, *bias = ln.bias.w;
            floatX *to = out + row * C, *both = sum + row * C;
            float v[MAX_C];
            for (int c = 0; c < channels; c++) v[c] = (float)from[c];
            for (int c = 0; c < channels && other; c++) {
                both[c] = (floatX)(v[c] + (float)other[c]);
                v[c] = (float)both[c];
            }
            const float rstd = center(v, C);
            for (int c = 0; c < channels; c++) to[c] = (floatX)(v[c] * rstd * (float)gain[c] + (float)bias[c]);
        });
}

template <bool accumulate>
static void layernorm_backward_in_loops(floatX *dx, float *partial, const floatX *dout, const floatX *x,
                                        const int *index, const floatX *gain, int rows, int per, int C) {
    for_each(
        ceil_div(rows, per), 8 * per * C,
        [&](int64_t part) {
            const int channels = C;
            const floatX *gains = gain;
            float n[MAX_C], dn[MAX_C], *dgain = partial + part * 2 * C, *dbias = dgain + C;
            memset(dgain, 0, 2 * C * sizeof(float));
            for (int64_t row = part * per; row < rows && row < (part + 1) * per; row++) {
                const floatX *from = x + (index ? index[row] : row) * C, *dy = dout + row * C;
                floatX *to = dx + row * C;
                for (int c = 0; c < channels; c++) n[c] = (float)from[c];
                const float rstd = center(n, C);
                for (int c = 0; c < channels; c++) {
                    n[c] *= rstd;
                    dn[c] = (float)dy[c] * (float)gains[c];
                    dgain[c] += (float)dy[c] * n[c];
                    dbias[c] += (float)dy[c];
                }
                const float dn_mean = sum_of(dn, C) / C, dn_n_mean = dot(dn, n, C) / C;
                for (int c = 0; c < channels; c++)
                    to[c] = (floatX)((accumulate ? (float)to[c] : 0) + rstd * (dn[c] - dn_mean - n[c] * dn_n_mean));
            }
        });
}

static void rms_norm_forward_in_loops(floatX *out, const floatX *x, int rows, int C) {
    for_each(
        rows, 2 * C,
        [&](int64_t row) {
            const int channels = C;
            const floatX *from = x + row * C;
            floatX *to = out + row * C;
            const float scale = 1 / (sqrtf(dot(from, from, C) / C) + 1e-8f);
            for (int c = 0; c < channels; c++) to[c] = (floatX)((float)from[c] * scale);
        });
}

static void classifier_in_loops(floatX *logits, float *losses, int *right, const int *targets, float scale, int V,
                                int count) {
    for_each(
        count, 32 * V,
        [&](int64_t row) {
            floatX *z = logits + row * V;
            const int target = targets[row];
            losses[row] = 0, right[row] = 0;
            if (target < 0) {
                for (int c = 0; c < V && scale != 0; c++) z[c] = (floatX)0.f;
                return;
            }
            const float of_target = (float)z[target];
            const int n = V;
            float *const p = memory_of_thread(n), top = -INFINITY;
            for (int c = 0; c < n; c++) top = (float)z[c] > top ? (float)z[c] : top;
            int at = 0;
            while (at < n - 1 && (float)z[at] != top) at++;
            for (int c = 0; c < n; c++) p[c] = fast_exp((float)z[c] - top);
            const float sum = sum_of(p, n), factor = scale / sum;
            losses[row] = logf(sum) + top - of_target;
            right[row] = at == target;
            if (scale == 0) return;
            p[at] += sum * 1e-4f * top;
            p[target] -= sum;
            for (int c = 0; c < n; c++) z[c] = (floatX)(p[c] * factor);
        });
}

static void squares_of_pieces_in_loops(double *squares, const float *grads, const Piece *pieces, int n) {
    for_each(
        n, PIECE,
        [&](int64_t i) {
            const float *g = grads + pieces[i].offset;
            squares[pieces[i].number] = dot(g, g, pieces[i].count);
        });
}

// Row by row: less what lies along the rows before, then to length 1
static void orthonormalize_panel_in_loops(float *panel, int count, int64_t n) {
    const int64_t some = 2048;
    std::vector<float> along(count);
    for (int row = 0; row < count; row++) {
        float *x = panel + row * n;
        for_each(row, n, [&](int64_t j) { along[j] = dot(x, panel + j * n, n); });
        for_each(ceil_div(n, some), some * row, [&](int64_t part) {
            const int64_t at = part * some, here = n - at < some ? n - at : some;
            for (int j = 0; j < row; j++) add_scaled(x + at, -along[j], panel + j * n + at, here);
        });
        const float scale = rsqrtf(dot(x, x, n));
        for (int64_t i = 0; i < n; i++) x[i] *= scale;
    }
}

// ---- ddlerp: matrix products, and a pass over the rows ----

// As cuBLAS sees it: column-major, a batch of them `stride` elements apart
template <typename X> static cuda_on_cpu::Matrix matrix_of(X *x, int64_t ld, int64_t stride) {
    return {(void *)x, sizeof(X) == 2, ld, stride};
}

// The m_i = h_i w2_i: (n, BT, C)
template <int n> static float *ddlerp_amounts_in_loops(const MixTask<n> &mix, int BT, int C) {
    static std::vector<float> m;
    grow(m, (int64_t)n * BT * C);
    cuda_on_cpu::gemm(false, false, C, BT, MIX_RANK, 1, matrix_of(mix.low.w2, C, MIX_RANK * C),
                      matrix_of(mix.low.h, mix.low.ld, MIX_RANK), 0, matrix_of(m.data(), C, (int64_t)BT * C), n);
    return m.data();
}

// shift(x) - x
static void shift_difference(float *diff, const floatX *x, int64_t row, int T, int C) {
    const floatX *now = x + row * C, *before = now - C;
    for (int c = 0; c < C; c++) diff[c] = (row % T ? (float)before[c] : 0) - (float)now[c];
}

template <int n> static void ddlerp_forward_in_loops(const MixTask<n> &mix, const floatX *x, int BT, int T, int C) {
    const float *m = ddlerp_amounts_in_loops(mix, BT, C);
    for_each(BT, 2 * n * C, [&](int64_t row) {
        const int channels = C;
        const floatX *now = x + row * C;
        float diff[MAX_C];
        shift_difference(diff, x, row, T, C);
        for (int i = 0; i < n; i++) {
            const float *amount = m + ((int64_t)i * BT + row) * C;
            const floatX *mu = mix.mu[i];
            floatX *to = mix.x[i] + row * C;
            for (int c = 0; c < channels; c++) to[c] = (floatX)((float)now[c] + diff[c] * ((float)mu[c] + amount[c]));
        }
    });
}

template <int n, typename TX, bool accumulate>
static void ddlerp_backward_in_loops(const MixTask<n> &mix, const DdlerpGradients &grads, TX *dx, const floatX *x,
                                     int BT, int T, int C) {
    const int64_t all = (int64_t)BT * C, hidden = MIX_RANK * n;
    static std::vector<float> shifted_rows, dh_rows; // (BT + 1, C): sum_i g_i c_i; (BT, 32 n)
    grow(shifted_rows, all + C);
    grow(dh_rows, BT * hidden);
    float *const dm = ddlerp_amounts_in_loops(mix, BT, C), *const shifted = shifted_rows.data(); // m, then dm
    for_each(BT, 4 * n * C, [&](int64_t row) {
        const int channels = C;
        float diff[MAX_C], *sum = shifted + row * C;
        shift_difference(diff, x, row, T, C);
        memset(sum, 0, C * sizeof(float));
        for (int i = 0; i < n; i++) {
            const floatX *g = mix.x[i] + row * C, *mu = mix.mu[i];
            float *m = dm + i * all + row * C;
            for (int c = 0; c < channels; c++) {
                sum[c] += (float)g[c] * ((float)mu[c] + m[c]);
                m[c] = (float)g[c] * diff[c];
            }
        }
    });
    for_each(BT, 2 * n * C, [&](int64_t row) {
        const int channels = C;
        const float *sum = shifted + row * C;
        float out[MAX_C];
        TX *to = dx + row * C;
        for (int c = 0; c < channels; c++) out[c] = (accumulate ? (float)to[c] : 0) - sum[c];
        if ((row + 1) % T) add_scaled(out, 1, sum + C, C); // the next token's
        for (int i = 0; i < n; i++) add_scaled(out, 1, mix.x[i] + row * C, C);
        for (int c = 0; c < channels; c++) to[c] = (TX)out[c];
    });
    for_each(n * C / 32, BT * 32, [&](int64_t part) {
        const int64_t i = part * 32 / C, c = part * 32 % C;
        float sums[32] = {};
        for (int64_t row = 0; row < BT; row++) add_scaled(sums, 1, dm + i * all + row * C + c, 32);
        add_scaled(grads.dmu.g[i] + c, 1, sums, 32);
    });
    cuda_on_cpu::gemm(false, true, C, MIX_RANK, BT, 1, matrix_of(dm, C, all),
                      matrix_of(mix.low.h, mix.low.ld, MIX_RANK), 1, matrix_of(grads.dw2, C, MIX_RANK * C), n);
    cuda_on_cpu::gemm(true, false, MIX_RANK, BT, C, 1, matrix_of(mix.low.w2, C, MIX_RANK * C), matrix_of(dm, C, all), 0,
                      matrix_of(dh_rows.data(), hidden, MIX_RANK), n);
    for_each(BT, hidden, [&](int64_t row) {
        for (int k = 0; k < hidden; k++) {
            const float h = (float)mix.low.h[row * mix.low.ld + k];
            grads.dh[row * mix.low.ld + k] = (floatX)(dh_rows[row * hidden + k] * (1 - h * h));
        }
    });
}

// ---- WKV: token by token, as the recurrence is written ----

typedef float WkvState[N][N]; // S^T: (values, keys)

struct WkvToken {              // of a head
    float r[N], k[N], v[N];    // k times 1 - d if one_minus_w
    float e[N], d[N], rest[N]; // d = exp(-e), rest = 1 - d

    void finish(bool one_minus_w) { // where e holds w + time_decay, and k is as it came
        for (int i = 0; i < N; i++) {
            const float x = fast_exp(e[i]);
            e[i] = x < 128 ? x : 128;
        }
        for (int i = 0; i < N; i++) d[i] = fast_exp(-e[i]);
        for (int i = 0; i < N; i++) rest[i] = one_minus(d[i], e[i]);
        for (int i = 0; i < N && one_minus_w; i++) k[i] *= rest[i];
    }

    void load(const Wkv &p, int64_t at, int channel) {
        for (int i = 0; i < N; i++) {
            r[i] = (float)p.r[at + i];
            k[i] = (float)p.k[at + i];
            v[i] = (float)p.v[at + i];
            e[i] = (p.w ? (float)p.w[at + i] : 0) + (p.time_decay ? (float)p.time_decay[channel + i] : 0);
        }
        finish(p.one_minus_w);
    }

    float bonus(const floatX *u) const { // r . u k
        float sum = 0;
        for (int i = 0; i < N && u; i++) sum += r[i] * (float)u[i] * k[i];
        return sum;
    }

    void update(WkvState &S) const { // S - rest S in place of d S: slow decays keep all their digits
        for (int j = 0; j < N; j++)
            for (int i = 0; i < N; i++) S[j][i] = fused(k[i], v[j], fused(-rest[i], S[j][i], S[j][i]));
    }

    void step(float *y, WkvState &S, const floatX *u) const {
        const float own = bonus(u);
        for (int j = 0; j < N; j++) y[j] = dot(S[j], r, N) + own * v[j];
        update(S);
    }
};

static void wkv_forward_in_loops(floatX *y, const Wkv &p, int B) {
    const int A = p.H * N, chunks = ceil_div(p.T, CHUNK);
    for_each(B * p.H, (int64_t)p.T * N * N, [&](int64_t bh) {
        const int channel = bh % p.H * N;
        float *carry = p.carry ? p.carry + bh * N * N : nullptr;
        WkvState S = {};
        if (carry) memcpy(S, carry, sizeof(S));
        for (int t = 0; t < p.T; t++) {
            if (p.states && !carry && t % CHUNK == 0)
                memcpy(p.states + (bh * chunks + t / CHUNK) * N * N, S, sizeof(S));
            const int64_t at = (bh / p.H * p.T + t) * A + channel;
            WkvToken x;
            x.load(p, at, channel);
            float out[N];
            x.step(out, S, p.u ? p.u + channel : nullptr);
            for (int j = 0; j < N; j++) y[at + j] = (floatX)(out[j] + (p.v2 ? (float)p.v2[at + j] : 0));
        }
        if (carry) memcpy(carry, S, sizeof(S));
    });
}

// With dS the gradient of the state after a token, from the last token to the first:
//     dr = S dy + u k (dy . v)        dk = dS v + u r (dy . v)        dv = dS^T k + (r . u k) dy
//     dw = -e d (the sum over j of dS S)        dS <- d dS + r dy^T
static void wkv_backward_in_loops(const WkvGradients &g, const Wkv &p, int B) {
    const int A = p.H * N, chunks = ceil_div(p.T, CHUNK);
    for_each(B * p.H, (int64_t)p.T * N * N * 3, [&](int64_t bh) {
        const int channel = bh % p.H * N;
        const floatX *u = p.u ? p.u + channel : nullptr;
        static thread_local WkvState states[CHUNK]; // before each token
        static thread_local WkvToken tokens[CHUNK];
        WkvState dS = {};
        float dw_sum[N] = {}, du[N] = {};
        for (int chunk = chunks - 1; chunk >= 0; chunk--) {
            const int t0 = chunk * CHUNK, n = min(CHUNK, p.T - t0);
            const int64_t first = (bh / p.H * p.T + t0) * A + channel;
            memcpy(states[0], p.states + (bh * chunks + chunk) * N * N, sizeof(WkvState));
            for (int t = 0; t < n; t++) {
                tokens[t].load(p, first + t * A, channel);
                if (t == n - 1) break;
                memcpy(states[t + 1], states[t], sizeof(WkvState));
                tokens[t].update(states[t + 1]);
            }
            for (int t = n - 1; t >= 0; t--) {
                const int64_t at = first + t * A;
                const WkvToken &x = tokens[t];
                const WkvState &S = states[t];
                const float own = dot(g.dy + at, x.v, N), bonus = x.bonus(u);
                float dr[N] = {}, dk[N] = {}, dd[N] = {};
                for (int j = 0; j < N; j++) {
                    const float dy = (float)g.dy[at + j];
                    g.dv[at + j] = (floatX)(dot(dS[j], x.k, N) + bonus * dy);
                    for (int i = 0; i < N; i++) {
                        dr[i] = fused(S[j][i], dy, dr[i]);
                        dk[i] = fused(dS[j][i], x.v[j], dk[i]);
                        dd[i] = fused(dS[j][i], S[j][i], dd[i]);
                        dS[j][i] = fused(x.r[i], dy, fused(-x.rest[i], dS[j][i], dS[j][i]));
                    }
                }
                for (int i = 0; i < N && u; i++) {
                    dr[i] += (float)u[i] * x.k[i] * own;
                    dk[i] += (float)u[i] * x.r[i] * own;
                    du[i] += x.r[i] * x.k[i] * own;
                }
                for (int i = 0; i < N; i++) {
                    float dw = -x.e[i] * x.d[i] * dd[i];
                    if (p.one_minus_w) {
                        dw += dk[i] * (float)p.k[at + i] * x.e[i] * x.d[i];
                        dk[i] *= x.rest[i];
                    }
                    dw_sum[i] += dw;
                    g.dr[at + i] = (floatX)dr[i];
                    g.dk[at + i] = (floatX)dk[i];
                    if (g.dw) g.dw[at + i] = (floatX)dw;
                }
            }
        }
        const int64_t at = bh / p.H * A + channel;
        memcpy(g.dw_sum + at, dw_sum, sizeof(dw_sum));
        memcpy(g.du + at, du, sizeof(du));
    });
}

// ---- attention: query by query ----

static void attention_forward_in_loops(floatX *y, float *log_sum, const floatX *q, const floatX *k, const floatX *v,
                                       int B, int T, int H) {
    const int64_t A = H * N;
    for_each((int64_t)B * H * T, T * N, [&](int64_t row) { // (B, H, T), as log_sum is
        const int64_t bh = row / T, t = row % T, head = bh / H * T * A + bh % H * N;
        float *const p = memory_of_thread(T), top = -INFINITY, out[N] = {};
        for (int64_t s = 0; s <= t; s++) {
            p[s] = dot(q + head + t * A, k + head + s * A, N) * SCALE_LOG2;
            top = p[s] > top ? p[s] : top;
        }
        for (int64_t s = 0; s <= t; s++) p[s] = exp2_fast(p[s] - top);
        for (int64_t s = 0; s <= t; s++) add_scaled(out, p[s], v + head + s * A, N);
        const float sum = sum_of(p, t + 1);
        log_sum[row] = top + log2f(sum);
        for (int c = 0; c < N; c++) y[head + t * A + c] = (floatX)(out[c] / sum);
    });
}

static void attention_backward_in_loops(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int B,
                                        int T, int H) {
    const int64_t A = H * N;
    for_each((int64_t)B * H, (int64_t)T * T * N, [&](int64_t bh) {
        const int64_t head = bh / H * T * A + bh % H * N;
        std::vector<float> dk((size_t)T * N), dv((size_t)T * N);
        float *const p = memory_of_thread(T);
        for (int64_t t = 0; t < T; t++) {
            const floatX *query = q + head + t * A, *dy = g.dy + head + t * A;
            const float log_sum = g.log_sum[bh * T + t], delta = g.delta[bh * T + t];
            float dq[N] = {};
            for (int64_t s = 0; s <= t; s++) p[s] = dot(query, k + head + s * A, N) * SCALE_LOG2 - log_sum;
            for (int64_t s = 0; s <= t; s++) p[s] = exp2_fast(p[s]);
            for (int64_t s = 0; s <= t; s++) {
                const float ds = p[s] * (dot(dy, v + head + s * A, N) - delta);
                add_scaled(&dv[s * N], p[s], dy, N);
                add_scaled(&dk[s * N], ds, query, N);
                add_scaled(dq, ds, k + head + s * A, N);
            }
            for (int c = 0; c < N; c++) g.dq[head + t * A + c] = (floatX)(dq[c] * SCALE);
        }
        for (int64_t t = 0; t < T; t++)
            for (int c = 0; c < N; c++) {
                g.dk[head + t * A + c] = (floatX)(dk[t * N + c] * SCALE);
                g.dv[head + t * A + c] = (floatX)dv[t * N + c];
            }
    });
}
