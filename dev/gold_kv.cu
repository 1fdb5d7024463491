// GOLD's keys and values, made from the compressed key cache K0 and the normed embeddings xo alone. dk0 = shift(K0) -
// K0 etc.:
//
//     m  = tanh((xo + dxo * mu_x) W1);      m_k = m[:, :32] W2[0],  m_v = m[:, 32:] W2[1]
//     k1 = K0 + dk0 * (mu_k + m_k);         v1 = xo + dxo * (mu_v + m_v)
//     k  = LayerNorm_k(k1 + tanh(k1 K1) K2);   v = LayerNorm_v(v1 + tanh(v1 V1) V2)              rank C/16, 64 at least
//
// Floor: bytes. K0 and xo in, k and v out: 4 units of BT C floatX. Every product has a rank of 32 or 64: together 2 C
// (128 + 4 rank) flops a token, which take a third of that time at D768.
//
//     1 each operation a kernel, a thread an element, products by cuBLAS: 25 units go through memory
//     2 in use, for training: m is made inside the mixes, its hidden layer without the mix of xo (both:
//       ddlerp.cu), the sums by the norms that read them
//
// Inference makes them tile by tile in registers as its attention needs them, and never writes them out:
// infer_goldfinch.cu, section 2.
//
//     make -C dev gold_kv && dev/gold_kv [VERSION [B T C]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static int B, T, C, BT, rank_;
static Model *model;
static Layer *layer;
static Array<floatX> K0, xo, mu_x, mu_k, mu_v, W1, W2, K1, K2, V1, V2, gain_k, bias_k, gain_v, bias_v, k, v;
static Array<floatX> mixed, hidden, m, low; // scratch of 1

// ---- 1: a kernel an operation ----

static const int THREADS = 256;

// m may be null
__global__ void mix(floatX *out, const floatX *x, const floatX *mu, const floatX *m, int T, int C, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    const float here = (float)x[i], before = i / C % T ? (float)x[i - C] : 0;
    out[i] = (floatX)(here + (before - here) * ((float)mu[i % C] + (m ? (float)m[i] : 0)));
}

__global__ void tanh_in_place(floatX *h, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) h[i] = (floatX)tanhf((float)h[i]);
}

__global__ void add_to(floatX *x, const floatX *y, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) x[i] = (floatX)((float)x[i] + (float)y[i]);
}

// a block a row
__global__ void norm(floatX *out, const floatX *x, const floatX *gain, const floatX *bias, int C) {
    __shared__ float2 shared[32];
    const int64_t row = (int64_t)blockIdx.x * C;
    float sum = 0, squares = 0;
    for (int c = threadIdx.x; c < C; c += blockDim.x) sum += (float)x[row + c];
    const float mean = block_sum(sum, shared) / C;
    for (int c = threadIdx.x; c < C; c += blockDim.x)
        squares += ((float)x[row + c] - mean) * ((float)x[row + c] - mean);
    const float rstd = rsqrtf(block_sum(squares, shared) / C + 1e-5f);
    for (int c = threadIdx.x; c < C; c += blockDim.x)
        out[row + c] = (floatX)(((float)x[row + c] - mean) * rstd * (float)gain[c] + (float)bias[c]);
}

static int blocks(int64_t n) { return (int)ceil_div(n, THREADS); }

// out (BT, C) from x, its mu and the m_i of its mix
static void side_1(floatX *out, const floatX *x, const floatX *mu, const floatX *m_i, const floatX *down,
                   const floatX *up, const floatX *gain, const floatX *bias) {
    const int64_t E = (int64_t)BT * C, h = (int64_t)BT * rank_;
    mix<<<blocks(E), THREADS, 0, stream>>>(mixed.p, x, mu, m_i, T, C, E);
    matmul(hidden.p, rank_, rows(mixed.p, C), rows(down, rank_), BT, rank_, C);
    tanh_in_place<<<blocks(h), THREADS, 0, stream>>>(hidden.p, h);
    matmul(low.p, C, rows(hidden.p, rank_), rows(up, C), BT, C, rank_);
    add_to<<<blocks(E), THREADS, 0, stream>>>(mixed.p, low.p, E);
    norm<<<BT, THREADS, 0, stream>>>(out, mixed.p, gain, bias, C);
}

static void gold_kv_1(void) {
    const int64_t E = (int64_t)BT * C;
    const floatX *no_m = nullptr;
    mix<<<blocks(E), THREADS, 0, stream>>>(mixed.p, xo.p, mu_x.p, no_m, T, C, E);
    matmul(hidden.p, 64, rows(mixed.p, C), rows(W1.p, 64), BT, 64, C);
    tanh_in_place<<<blocks((int64_t)BT * 64), THREADS, 0, stream>>>(hidden.p, (int64_t)BT * 64);
    for (int i = 0; i < 2; i++)
        matmul(m.p + i * E, C, rows(hidden.p + 32 * i, 64), rows(W2.p + 32 * i * C, C), BT, C, 32);
    side_1(k.p, K0.p, mu_k.p, m.p, K1.p, K2.p, gain_k.p, bias_k.p);
    side_1(v.p, xo.p, mu_v.p, m.p + E, V1.p, V2.p, gain_v.p, bias_v.p);
}

// ---- 2: in use; it takes its inputs from the model and leaves k and v in the layer ----

static void gold_kv_in_use(void) { gold_keys_values(model, layer); }

static void run(int version) { version == 1 ? gold_kv_1() : gold_kv_in_use(); }

// ---- what to expect ----

typedef std::vector<double> Row;

static double mixed_with_before(const Array<floatX> &x, int64_t t, int c, double by) {
    const double here = x[t * C + c];
    return here + ((t % T ? x[(t - 1) * C + c] : 0) - here) * by;
}

// += tanh(x down) up
static void add_low_rank(Row &to, const Row &x, const Array<floatX> &down, const Array<floatX> &up) {
    for (int l = 0; l < rank_; l++) {
        double h = 0;
        for (int c = 0; c < C; c++) h += x[c] * down[(int64_t)c * rank_ + l];
        for (int c = 0; c < C; c++) to[c] += tanh(h) * up[(int64_t)l * C + c];
    }
}

static void expect_side(Array<floatX> &out, int64_t t, Row x, const Array<floatX> &down, const Array<floatX> &up,
                        const Array<floatX> &gain, const Array<floatX> &bias) {
    double mean = 0, var = 0;
    add_low_rank(x, Row(x), down, up);
    for (double each : x) mean += each / C;
    for (double each : x) var += (each - mean) * (each - mean) / C;
    for (int c = 0; c < C; c++) out.expect(t * C + c, (x[c] - mean) / sqrt(var + 1e-5) * gain[c] + bias[c]);
}

static void expect_token(int64_t t) {
    Row x(C), m_k(C), m_v(C);
    for (int c = 0; c < C; c++) x[c] = mixed_with_before(xo, t, c, mu_x[c]);
    for (int l = 0; l < 64; l++) {
        double h = 0;
        for (int c = 0; c < C; c++) h += x[c] * W1[c * 64 + l];
        for (int c = 0; c < C; c++) (l < 32 ? m_k : m_v)[c] += tanh(h) * W2[(int64_t)l * C + c];
    }
    for (int c = 0; c < C; c++) {
        m_k[c] = mixed_with_before(K0, t, c, mu_k[c] + m_k[c]);
        m_v[c] = mixed_with_before(xo, t, c, mu_v[c] + m_v[c]);
    }
    expect_side(k, t, m_k, K1, K2, gain_k, bias_k);
    expect_side(v, t, m_v, V1, V2, gain_v, bias_v);
}

static void setup(const int *shape) {
    B = shape[0], T = shape[1], C = shape[2], BT = B * T;
    model = lab_model(2, B, T, C);
    layer = &model->layers[1];
    rank_ = gold_rank(model->d);
    const int64_t E = (int64_t)BT * C;
    for (Array<floatX> *x : {&K0, &xo}) x->random(E);
    for (Array<floatX> *mu : {&mu_x, &mu_k, &mu_v}) mu->random(C, 0.3, 0.5);
    for (Array<floatX> *gain : {&gain_k, &gain_v}) gain->random(C, 0.5, 1);
    for (Array<floatX> *bias : {&bias_k, &bias_v}) bias->random(C);
    W1.random(C * 64, 1 / sqrt(C));
    W2.random(64 * C, 0.1);
    for (Array<floatX> *down : {&K1, &V1}) down->random((int64_t)C * rank_, 1 / sqrt(C));
    for (Array<floatX> *up : {&K2, &V2}) up->random((int64_t)rank_ * C, 0.1);
    mixed.allocate(E);
    low.allocate(E);
    m.allocate(2 * E);
    hidden.allocate((int64_t)BT * rank_);
    for (Array<floatX> *out : {&k, &v}) out->output(out == &k ? "k" : "v", by_precision(1e-5, 3e-2), E);
    for (int64_t t : sample(BT, 60)) expect_token(t);

    Params &p = layer->p;
    const struct {
        Param &param;
        const Array<floatX> &array;
    } weights[] = {{p.time_maa_v_cache, mu_x}, {p.time_maa_k, mu_k},  {p.time_maa_v, mu_v},  {p.time_maa_kv_w1, W1},
                   {p.time_maa_kv_w2, W2},     {p.time_key_w1, K1},   {p.time_key_w2, K2},   {p.time_value_w1, V1},
                   {p.time_value_w2, V2},      {p.ln_k.gain, gain_k}, {p.ln_k.bias, bias_k}, {p.ln_v.gain, gain_v},
                   {p.ln_v.bias, bias_v}};
    for (const auto &w : weights) w.param.w = w.array.p;
    model->k0 = K0.p, model->xo = xo.p;
    layer->gold.k = k.p, layer->gold.v = v.p;
}

static Cost cost(const int *shape) {
    const double n = (double)shape[0] * shape[1], c = shape[2], rank = fmax(64, shape[2] / 16);
    return {4 * sizeof(floatX) * n * c, 2 * n * c * (128 + 4 * rank)};
}

int main(int argc, char **argv) {
    return lab_main({{"gold_kv",
                      {{"B", 1}, {"T", 1}, {"C", 64}},
                      {"a kernel an operation", "in use, for training"},
                      {{2, 1, 64}, {3, 37, 192}, {1, 50, 1088}},
                      {{32, 1024, 768}, {8, 2048, 2048}},
                      setup,
                      run,
                      cost}},
                    argc, argv);
}
