// Causal attention, backward. With p_ts and l_t as in attention_forward.cu, all sums over s <= t:
//
//     delta_t = dy_t . y_t,   ds_ts = p_ts (dy_t . v_s - delta_t)
//     dq_t = sum_s ds_ts k_s / sqrt(N),   dk_s = sum_t ds_ts q_t / sqrt(N),   dv_s = sum_t p_ts dy_t
//
// Floor: flops. Five products of N T^2 / 2 multiply-adds a head (scores, dy v^T, dq, dk, dv): 5 N T^2 flops. A version that
// sums dq in one kernel and dk, dv in another makes the scores and dy v^T twice, 7 N T^2, but needs no atomics.
//
//     1 p and ds to memory, then a thread for each number of dq, dk and dv: as the equations are written
//     2 in use: train_goldfinch.cu, above struct AttentionGradients
//
//     make -C dev attention_backward && dev/attention_backward [VERSION [B T H]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static int B, T, H, A;
static Array<floatX> q, k, v, y, dy, dq, dk, dv;
static Array<float> l, delta, p, ds;

// ---- 1: p and ds in memory, (B, H, T, T) ----

__global__ void attention_ds_1(float *p, float *ds, AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int T, int A) {
    const int s = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y, H = A / N;
    if (s > t) return;
    const int64_t head = (int64_t)(blockIdx.z / H) * T * A + blockIdx.z % H * N, from = head + (int64_t)t * A, to = head + (int64_t)s * A;
    float score = 0, dp = 0;
    for (int i = 0; i < N; i++) {
        score += (float)q[from + i] * (float)k[to + i];
        dp += (float)g.dy[from + i] * (float)v[to + i];
    }
    const int64_t at = ((int64_t)blockIdx.z * T + t) * T + s, row = (int64_t)blockIdx.z * T + t;
    p[at] = exp2f(score * SCALE_LOG2 - g.l[row]);
    ds[at] = p[at] * (dp - g.delta[row]);
}

// Thread i: channel i of dq, dk and dv of token blockIdx.x, as a query of the tokens before, as a key of those after.
__global__ void attention_sums_1(AttentionGradients g, const float *p, const float *ds, const floatX *q, const floatX *k, int T, int A) {
    const int t = blockIdx.x, H = A / N;
    const int64_t head = (int64_t)(blockIdx.y / H) * T * A + blockIdx.y % H * N + threadIdx.x, square = (int64_t)blockIdx.y * T * T;
    float dq = 0, dk = 0, dv = 0;
    for (int s = 0; s <= t; s++) dq += ds[square + (int64_t)t * T + s] * (float)k[head + (int64_t)s * A];
    for (int s = t; s < T; s++) {
        dk += ds[square + (int64_t)s * T + t] * (float)q[head + (int64_t)s * A];
        dv += p[square + (int64_t)s * T + t] * (float)g.dy[head + (int64_t)s * A];
    }
    g.dq[head + (int64_t)t * A] = (floatX)(dq / 8);
    g.dk[head + (int64_t)t * A] = (floatX)(dk / 8);
    g.dv[head + (int64_t)t * A] = (floatX)dv;
}

// ---- in use ----

static void attention_backward_in_use(void) {
    attention_backward(dq.p, dk.p, dv.p, delta.p, dy.p, y.p, l.p, q.p, k.p, v.p, B, T, H);
}

static void run(int version) {
    const AttentionGradients g = {dq.p, dk.p, dv.p, dy.p, l.p, delta.p};
    if (version == 1) {
        attention_delta<<<B * T, row_threads(A), 0, stream>>>(delta.p, dy.p, y.p, T, H);
        attention_ds_1<<<dim3((int)ceil_div(T, 128), T, B * H), 128, 0, stream>>>(p.p, ds.p, g, q.p, k.p, v.p, T, A);
        attention_sums_1<<<dim3(T, B * H), N, 0, stream>>>(g, p.p, ds.p, q.p, k.p, T, A);
    }
    if (version == 2) attention_backward_in_use();
}

// ---- what to expect: the sums, and as the scale of their errors the roots of the sums of their terms' squares ----

static void expect_head(int64_t head) {
    const int64_t from = head / H * T * A + head % H * N;
    std::vector<double> dk_of((int64_t)T * N), dv_of(dk_of), dk_squares(dk_of), dv_squares(dk_of), p_of(T);
    auto dot = [&](const Array<floatX> &a, int64_t t, const Array<floatX> &b, int64_t s) {
        double sum = 0;
        for (int i = 0; i < N; i++) sum += a[from + t * A + i] * b[from + s * A + i];
        return sum;
    };
    for (int64_t t = 0; t < T; t++) {
        double sum = 0, delta_of = 0, dq_of[N] = {}, dq_squares[N] = {};
        for (int64_t s = 0; s <= t; s++) sum += p_of[s] = exp(dot(q, t, k, s) / 8);
        for (int64_t s = 0; s <= t; s++) delta_of += (p_of[s] /= sum) * dot(dy, t, v, s);
        for (int64_t s = 0; s <= t; s++) {
            const double dp = dot(dy, t, v, s), ds_of = p_of[s] * (dp - delta_of) / 8, size = p_of[s] * (fabs(dp) + fabs(delta_of)) / 8;
            for (int i = 0; i < N; i++) {
                dq_of[i] += ds_of * k[from + s * A + i];
                dk_of[s * N + i] += ds_of * q[from + t * A + i];
                dq_squares[i] += pow(size * k[from + s * A + i], 2);
                dk_squares[s * N + i] += pow(size * q[from + t * A + i], 2);
                dv_of[s * N + i] += p_of[s] * dy[from + t * A + i];
                dv_squares[s * N + i] += pow(p_of[s] * dy[from + t * A + i], 2);
            }
        }
        for (int i = 0; i < N; i++) dq.expect(from + t * A + i, dq_of[i], sqrt(dq_squares[i]));
    }
    for (int64_t t = 0; t < T; t++)
        for (int i = 0; i < N; i++) {
            dk.expect(from + t * A + i, dk_of[t * N + i], sqrt(dk_squares[t * N + i]));
            dv.expect(from + t * A + i, dv_of[t * N + i], sqrt(dv_squares[t * N + i]));
        }
}

static void setup(const int *shape) {
    B = shape[0], T = shape[1], H = shape[2], A = H * N;
    const int64_t n = (int64_t)B * T * A, rows = (int64_t)B * H * T;
    for (Array<floatX> *input : {&q, &k, &v, &dy}) input->random(n);
    y.allocate(n);
    l.allocate(rows);
    delta.allocate(rows);
    p.allocate(rows * T);
    ds.allocate(rows * T);
    attention_forward(y.p, l.p, q.p, k.p, v.p, B, T, H);                // leaves y and l for all versions
    dq.output("dq", by_precision(1e-5, 4e-2), n);
    dk.output("dk", by_precision(1e-5, 2e-2), n);
    dv.output("dv", by_precision(1e-5, 2e-2), n);
    for (int64_t head : sample((int64_t)B * H, 4)) expect_head(head);
}

static Cost cost(const int *shape) {
    const double heads = (double)shape[0] * shape[2], t = shape[1];
    return {8 * sizeof(floatX) * heads * t * N, 5 * N * t * t * heads};
}

int main(int argc, char **argv) {
    return lab_main({{"attention_backward", {{"B", 1}, {"T", 1}, {"H", 1}}, {"p and ds in memory", "in use"},
                      {{2, 2, 3}, {2, 37, 1}, {1, 150, 3}}, {{32, 1024, 12}, {8, 2048, 32}}, setup, run, cost}}, argc, argv);
}
