// Twins of kernels that decode, in plain loops: see twins.h. Their sums come in another order. infer_goldfinch.cu
// includes this behind its kernels.
#pragma once

// Query m, as query_pack makes it
static void query_in_loops(float *q, const WindowTask &p, int m) {
    const QuerySource &s = p.query;
    for (int c = 0; c < p.C; c++) q[c] = s.q ? (float)s.q[(int64_t)m * p.C + c] : s.q0[c];
    if (s.q) return;
    float squares[MAX_C];
    const float mean = sum_of_row(q, p.C) / p.C;
    for (int c = 0; c < p.C; c++) squares[c] = (q[c] - mean) * (q[c] - mean);
    const float rstd = rsqrtf(sum_of_row(squares, p.C) / p.C + 1e-5f);
    for (int c = 0; c < p.C; c++) q[c] = (float)(floatX)((q[c] - mean) * rstd * (float)s.gain[c] + (float)s.bias[c]);
    for (int c = 0; c < p.C && s.rope->used; c += 8)
        store(q + c, rope_pack(load(q + c), *s.rope, s.place->first, c, 1));
}

// A split takes tokens that lie side by side, 64 at a time.
static void window_attention_in_loops(const WindowTask &p, int splits) {
    const int64_t begin = p.place->begin, seen = p.place->first + p.m0 + 1 - begin; // of the first query here
    std::vector<float> queries((size_t)p.M * p.C);
    for (int m = 0; m < p.M; m++) query_in_loops(&queries[(size_t)m * p.C], p, m);
    cuda_on_cpu::for_each((int64_t)p.M * splits * p.H, (seen / splits + 1) * N * 4, [&](int64_t task) {
        const int h = task % p.H;
        const int64_t row = task / p.H, split = row / p.M, m = row % p.M; // row: split * M + m
        auto from = [&](int64_t split) { return begin + ((seen + m) * split + splits - 1) / splits; };
        const int64_t end = from(split + 1); // the first split sees a token, as TmixOut wants it
        const float *q = &queries[(size_t)m * p.C + h * N];
        float top = -INFINITY, sum = 0, out[N] = {}, scores[64];
        for (int64_t t0 = from(split); t0 < end; t0 += 64) {
            const int n = (int)(end - t0 < 64 ? end - t0 : 64);
            auto at = [&](int i) { return (int64_t)((unsigned)(t0 + i) % (unsigned)p.window) * p.C + h * N; };
            float high = top;
            for (int i = 0; i < n; i++) {
                cuda_on_cpu::dots<1>(&scores[i], p.keys + at(i), q, 0, N);
                scores[i] *= SCALE_LOG2;
                high = fmaxf(high, scores[i]);
            }
            const float shrink = softmax_shrink(top, high);
            top = high;
            sum *= shrink;
            for (float &x : out) x *= shrink;
            for (int i = 0; i < n; i++) {
                const float weight = softmax_weight(scores[i], top);
                const floatX *value = p.values + at(i);
                sum += weight;
                for (int c = 0; c < N; c++) out[c] = fused(weight, (float)value[c], out[c]);
            }
        }
        memcpy(p.to.out + row * p.C + h * N, out, sizeof(out));
        p.to.top[row * p.H + h] = top;
        p.to.sum[row * p.H + h] = sum;
    });
}

// to[c] += sum over k of h[k] w[k][c]
static void add_low_rank(float *to, const float *h, const floatX *w, int rank, int columns, int64_t ld) {
    for (int k = 0; k < rank; k++)
        for (int c = 0; c < columns; c++) to[c] = fused(h[k], (float)w[k * ld + c], to[c]);
}

static void decode_mixes_in_loops(const Mixed &p, int mixes, int C) {
    cuda_on_cpu::for_each(
        mixes, 32 * C,
        [&](int64_t i) {
            float m[MAX_C];
            for (int c = 0; c < C; c++) m[c] = (float)p.mu[i][c];
            add_low_rank(m, p.hidden + 32 * i, p.w + i * 32 * C, 32, C, C);
            for (int c = 0; c < C; c++)
                p.xs[i * C + c] = (floatX)((float)p.ln[c] + ((float)p.shift[c] - (float)p.ln[c]) * m[c]);
        });
}

static void wkv_step_in_loops(const WkvStep &p) {
    const int A = p.H * N;
    cuda_on_cpu::for_each(p.H, 4 * N * N, [&](int64_t h) {
        const int head = h * N;
        float decay[N], d_minus_1[N], k[N], extra[N], bonus = 0, *S = p.state + h * N * N;
        for (int i = 0; i < N; i++) {
            decay[i] = (float)p.time_decay[head + i];
            extra[i] = p.use_v2 ? p.v2[head + i] : 0;
        }
        add_low_rank(decay, p.hidden, p.decay_w2 + head, DECAY_RANK, N, A);
        if (p.use_v2) add_low_rank(extra, p.hidden + DECAY_RANK, p.value2_w2 + head, VALUE2_RANK, N, A);
        for (int i = 0; i < N; i++) {
            float e = fast_exp(decay[i]);
            e = e < 128 ? e : 128;
            d_minus_1[i] = -one_minus(fast_exp(-e), e);
            k[i] = p.k[head + i] * (p.one_minus_w ? -d_minus_1[i] : 1);
        }
        for (int i = 0; i < N && p.u; i++) bonus += p.r[head + i] * (float)p.u[head + i] * k[i];
        for (int j = 0; j < N; j++, S += N) {
            const float v = p.v[head + j];
            float y;
            cuda_on_cpu::dots<1>(&y, S, p.r + head, 0, N);
            p.y[head + j] = y + bonus * v + extra[j];
            for (int i = 0; i < N; i++) S[i] = fused(k[i], v, fused(S[i], d_minus_1[i], S[i]));
        }
    });
}
