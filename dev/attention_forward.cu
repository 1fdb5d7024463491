// Causal attention, forward:
//
//     y_t = sum_{s<=t} p_ts v_s,   p_ts = exp(q_t . k_s / sqrt(N) - l_t),   l_t = log sum_{s<=t} exp(q_t . k_s / sqrt(N))
//
// q, k, v, y are (B, T, A), head h at channels h N .. h N + N - 1; l (B, H, T), in units of log 2.
//
// Floor: flops. 2 N for a score and 2 N to use it, for half of T x T: 2 N T^2 a head. Bytes, 4 floatX a number, are few
// beside it, as long as the scores themselves (T x T a head!) never go to memory.
//
//     1 scores to memory, then the softmax of each row, then the values: as the equation is written
//     2 a thread a query, with a running maximum and sum: no scores in memory, but each thread reads all keys and values
//     3 in use: train_goldfinch.cu, above attention_forward_kernel
//
//     make -C dev attention_forward && dev/attention_forward [VERSION [B T H]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static int B, T, H, A;
static Array<floatX> q, k, v, y;
static Array<float> l, scores;

// ---- 1: scores in memory, (B, H, T, T); a block row of threads a query ----

__global__ void attention_scores_1(float *scores, const floatX *q, const floatX *k, int T, int A) {
    const int s = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y, H = A / N, b = blockIdx.z / H, h = blockIdx.z % H;
    if (s > t) return;
    const floatX *query = q + ((int64_t)b * T + t) * A + h * N, *key = k + ((int64_t)b * T + s) * A + h * N;
    float sum = 0;
    for (int i = 0; i < N; i++) sum += (float)query[i] * (float)key[i];
    scores[((int64_t)blockIdx.z * T + t) * T + s] = sum * SCALE_LOG2;
}

__global__ void attention_softmax_1(float *scores, float *l, int T) {   // a warp a row
    float *row = scores + ((int64_t)blockIdx.y * T + blockIdx.x) * T, top = -INFINITY, sum = 0;
    for (int s = threadIdx.x; s <= (int)blockIdx.x; s += 32) top = fmaxf(top, row[s]);
    top = warp_max(top);
    for (int s = threadIdx.x; s <= (int)blockIdx.x; s += 32) sum += exp2f(row[s] - top);
    const float log_sum = top + log2f(warp_sum(sum));
    for (int s = threadIdx.x; s <= (int)blockIdx.x; s += 32) row[s] = exp2f(row[s] - log_sum);
    if (threadIdx.x == 0) l[(int64_t)blockIdx.y * T + blockIdx.x] = log_sum;
}

__global__ void attention_values_1(floatX *y, const float *scores, const floatX *v, int T, int A) {     // a thread a channel
    const int t = blockIdx.x, H = A / N, b = blockIdx.y / H, h = blockIdx.y % H;
    const float *p = scores + ((int64_t)blockIdx.y * T + t) * T;
    float sum = 0;
    for (int s = 0; s <= t; s++) sum += p[s] * (float)v[((int64_t)b * T + s) * A + h * N + threadIdx.x];
    y[((int64_t)b * T + t) * A + h * N + threadIdx.x] = (floatX)sum;
}

// ---- 2: a thread a query ----

__global__ void attention_forward_2(floatX *y, float *l, const floatX *q, const floatX *k, const floatX *v, int T, int A) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x, h = blockIdx.y, b = blockIdx.z;
    if (t >= T) return;
    const int64_t head = (int64_t)b * T * A + h * N;
    float query[N], out[N] = {}, top = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++) query[i] = (float)q[head + (int64_t)t * A + i];
    for (int s = 0; s <= t; s++) {
        const floatX *key = k + head + (int64_t)s * A, *value = v + head + (int64_t)s * A;
        float score = 0;
#pragma unroll
        for (int i = 0; i < N; i++) score += query[i] * (float)key[i];
        score *= SCALE_LOG2;
        const float high = fmaxf(top, score), shrink = exp2f(top - high), p = exp2f(score - high);
        top = high;
        sum = sum * shrink + p;
#pragma unroll
        for (int i = 0; i < N; i++) out[i] = out[i] * shrink + p * (float)value[i];
    }
    l[((int64_t)b * gridDim.y + h) * T + t] = top + log2f(sum);
#pragma unroll
    for (int i = 0; i < N; i++) y[head + (int64_t)t * A + i] = (floatX)(out[i] / sum);
}

// ---- in use ----

static void attention_forward_in_use(void) { attention_forward(y.p, l.p, q.p, k.p, v.p, B, T, H); }

static void run(int version) {
    if (version == 1) {
        attention_scores_1<<<dim3((int)ceil_div(T, 128), T, B * H), 128, 0, stream>>>(scores.p, q.p, k.p, T, A);
        attention_softmax_1<<<dim3(T, B * H), 32, 0, stream>>>(scores.p, l.p, T);
        attention_values_1<<<dim3(T, B * H), N, 0, stream>>>(y.p, scores.p, v.p, T, A);
    }
    if (version == 2) attention_forward_2<<<dim3((int)ceil_div(T, 64), H, B), 64, 0, stream>>>(y.p, l.p, q.p, k.p, v.p, T, A);
    if (version == 3) attention_forward_in_use();
}

static void setup(const int *shape) {
    B = shape[0], T = shape[1], H = shape[2], A = H * N;
    const int64_t n = (int64_t)B * T * A;
    for (Array<floatX> *input : {&q, &k, &v}) input->random(n);
    scores.allocate((int64_t)B * H * T * T);
    y.output("y", by_precision(1e-5, 1e-2), n);
    l.output("l", 1e-5, (int64_t)B * H * T);
    for (int64_t head : sample((int64_t)B * H, 4)) {
        const int64_t from = head / H * T * A + head % H * N;
        for (int64_t t : sample(T, 200)) {
            std::vector<double> p(t + 1), sum_v(N);
            double sum = 0;
            for (int s = 0; s <= t; s++) {
                for (int i = 0; i < N; i++) p[s] += q[from + t * A + i] * k[from + (int64_t)s * A + i] / 8;
                sum += p[s] = exp(p[s]);
            }
            for (int s = 0; s <= t; s++)
                for (int i = 0; i < N; i++) sum_v[i] += p[s] / sum * v[from + (int64_t)s * A + i];
            for (int i = 0; i < N; i++) y.expect(from + t * A + i, sum_v[i]);
            l.expect(head * T + t, log2(sum));
        }
    }
}

static Cost cost(const int *shape) {
    const double heads = (double)shape[0] * shape[2], t = shape[1];
    return {4 * sizeof(floatX) * heads * t * N, 2 * N * t * t * heads};
}

int main(int argc, char **argv) {
    return lab_main({{"attention_forward", {{"B", 1}, {"T", 1}, {"H", 1}}, {"scores in memory", "a thread a query", "in use"},
                      {{2, 2, 3}, {2, 37, 1}, {1, 150, 3}}, {{32, 1024, 12}, {8, 2048, 32}}, setup, run, cost}}, argc, argv);
}
