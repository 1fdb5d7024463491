// Twins of kernels that decode, in plain loops: see twins.h. Their sums come in another order. infer_goldfinch.cu
// includes this behind its kernels.
#pragma once

// Query m, as query_pack makes it
static void query_in_loops(float *q, const WindowTask &p, int m) {
    const QuerySource &s = p.query;
    for (int c = 0; c < p.C; c++) q[c] = s.q ? (float)s.q[(int64_t)m * p.C + c] : s.q0[c];
    if (s.q) return;
    const float rstd = center(q, p.C);
    for (int c = 0; c < p.C; c++) q[c] = (float)(floatX)(q[c] * rstd * (float)s.gain[c] + (float)s.bias[c]);
    for (int c = 0; c < p.C && s.rope->used; c += 8)
        store(q + c, rope_pack(load(q + c), *s.rope, s.place->first, c, 1));
}

// A split takes tokens that lie side by side.
static void window_attention_in_loops(const WindowTask &p, int splits) {
    const int64_t begin = p.place->begin, seen = p.place->first + p.m0 + 1 - begin; // of the first query here
    std::vector<float> queries((size_t)p.M * p.C);
    for (int m = 0; m < p.M; m++) query_in_loops(&queries[(size_t)m * p.C], p, m);
    for_each((int64_t)p.M * splits * p.H, (seen / splits + 1) * N * 4, [&](int64_t task) {
        const int h = task % p.H;
        const int64_t row = task / p.H, split = row / p.M, m = row % p.M; // row: split * M + m
        auto from = [&](int64_t split) { return begin + ((seen + m) * split + splits - 1) / splits; };
        // maybe none; the first split sees a token, as TmixOut wants it
        const int64_t first = from(split), n = max(from(split + 1) - first, (int64_t)0);
        auto at = [&](int64_t i) { return (int64_t)((unsigned)(first + i) % (unsigned)p.window) * p.C + h * N; };
        float *const weights = memory_of_thread(n), top = -INFINITY, out[N] = {};
        for (int64_t i = 0; i < n; i++) {
            weights[i] = dot(&queries[(size_t)m * p.C + h * N], p.keys + at(i), N) * SCALE_LOG2;
            top = weights[i] > top ? weights[i] : top;
        }
        for (int64_t i = 0; i < n; i++) weights[i] = exp2_fast(weights[i] - top);
        for (int64_t i = 0; i < n; i++) add_scaled(out, weights[i], p.values + at(i), N);
        memcpy(p.to.out + row * p.C + h * N, out, sizeof(out));
        p.to.top[row * p.H + h] = top;
        p.to.sum[row * p.H + h] = sum_of(weights, n);
    });
}

// to += h (rank) w (rank, columns)
static void add_low_rank(float *to, const float *h, const floatX *w, int rank, int columns, int64_t ld) {
    for (int k = 0; k < rank; k++) add_scaled(to, h[k], w + k * ld, columns);
}

static void decode_mixes_in_loops(const Mixed &p, int mixes, int C) {
    for_each(
        mixes, MIX_RANK * C,
        [&](int64_t i) {
            float m[MAX_C];
            for (int c = 0; c < C; c++) m[c] = (float)p.mu[i][c];
            add_low_rank(m, p.hidden + MIX_RANK * i, p.w + i * MIX_RANK * C, MIX_RANK, C, C);
            for (int c = 0; c < C; c++)
                p.xs[i * C + c] = (floatX)((float)p.ln[c] + ((float)p.shift[c] - (float)p.ln[c]) * m[c]);
        });
}

static void wkv_step_in_loops(const WkvStep &p) {
    for_each(
        p.H, 4 * N * N,
        [&](int64_t h) {
            const int head = h * N, A = p.H * N;
            WkvToken x;
            float extra[N];
            for (int i = 0; i < N; i++) {
                x.r[i] = p.r[head + i], x.k[i] = p.k[head + i], x.v[i] = p.v[head + i];
                x.e[i] = (float)p.time_decay[head + i];
                extra[i] = p.use_v2 ? p.v2[head + i] : 0;
            }
            add_low_rank(x.e, p.hidden, p.decay_w2 + head, DECAY_RANK, N, A);
            if (p.use_v2) add_low_rank(extra, p.hidden + DECAY_RANK, p.value2_w2 + head, VALUE2_RANK, N, A);
            x.finish(p.one_minus_w);
            WkvState &S = *(WkvState *)(p.state + h * N * N);
            x.step(p.y + head, S, p.u ? p.u + head : nullptr);
            for (int j = 0; j < N; j++) p.y[head + j] += extra[j];
        });
}
