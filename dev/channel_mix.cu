// The channel mix, forward and backward, F = 3.5 C:
//
//     x_k = x + dx * mu_k,  x_r = x + dx * mu_r,  dx = shift(x) - x
//     k = relu(x_k K^T)^2,   out = sigmoid(x_r R^T) * (k V^T)               K (F, C), V (C, F), R (C, C)
//
// Floor: flops, of three products: 2 (2 C F + C^2) a token, twice that backward. They are cuBLAS' (matmul.cu). So the
// question is what lies between them: every pass over (BT, F) or (BT, C) is time in which the tensor cores rest. In
// units of BT C floatX beyond the products' own reading and writing:
//
//     1 each operation a kernel, a thread an element: 2 mixes (4 units), square of relu to a place of its own (7),
//       sigmoid (2), product (3); backward likewise
//     2 in use: both mixes in one pass, relu^2 in place, gate and product together, 16 bytes a load. (Its relu^2 needs
//       no mask for the backward pass: relu is the root of what it left.)
//
//     make -C dev channel_mix && dev/channel_mix [VERSION [B T C]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static int B, T, C, F, BT;
static Model *model;
static Layer *layer;
static Array<floatX> x, mu_k, mu_r, K, V, R, out, dout, dx;
static Array<float> dmu_k, dmu_r, dK, dV, dR;
static Array<floatX> xk, xr, k0, k, v, r0, gate, dxk, dxr, dk0, dk, dv, dr; // what 1 keeps, and its scratch

// ---- 1: a kernel an operation ----

static const int THREADS = 256;

__global__ void mix(floatX *out, const floatX *x, const floatX *mu, int T, int C, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    const float here = (float)x[i], before = i / C % T ? (float)x[i - C] : 0;
    out[i] = (floatX)(here + (before - here) * (float)mu[i % C]);
}

__global__ void relu_squared(floatX *k, const floatX *k0, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) k[i] = (floatX)((float)k0[i] > 0 ? (float)k0[i] * (float)k0[i] : 0);
}

__global__ void relu_squared_gradient(floatX *dk0, const floatX *dk, const floatX *k0, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) dk0[i] = (floatX)((float)k0[i] > 0 ? 2 * (float)k0[i] * (float)dk[i] : 0);
}

__global__ void sigmoid(floatX *gate, const floatX *r, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) gate[i] = (floatX)(1 / (1 + expf(-(float)r[i])));
}

__global__ void multiply(floatX *out, const floatX *a, const floatX *b, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) out[i] = (floatX)((float)a[i] * (float)b[i]);
}

__global__ void sigmoid_gradient(floatX *dr, const floatX *dout, const floatX *gate, const floatX *v, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) dr[i] = (floatX)((float)dout[i] * (float)v[i] * (float)gate[i] * (1 - (float)gate[i]));
}

__global__ void mix_gradient(floatX *dx, const floatX *dxk, const floatX *dxr, const floatX *mu_k, const floatX *mu_r,
                             int T, int C, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    const float k = (float)mu_k[i % C], r = (float)mu_r[i % C], next = (i / C + 1) % T ? 1.f : 0.f;
    const float later = next ? (float)dxk[i + C] * k + (float)dxr[i + C] * r : 0;
    dx[i] = (floatX)((float)dxk[i] * (1 - k) + (float)dxr[i] * (1 - r) + later);
}

// a thread a channel
__global__ void mix_sums(float *dmu, const floatX *g, const floatX *x, int T, int C, int BT) {
    const int c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    for (int t = 0; t < BT; t++) {
        const int64_t i = (int64_t)t * C + c;
        sum += (float)g[i] * ((t % T ? (float)x[i - C] : 0) - (float)x[i]);
    }
    dmu[c] += sum;
}

static Param weight(Array<floatX> &w, Array<float> &g, int rows, int columns) {
    return {w.p, g.p, rows, columns, columns, nullptr};
}
static int blocks(int64_t n) { return (int)ceil_div(n, THREADS); }

static void channel_mix_1(void) {
    const int64_t E = (int64_t)BT * C, EF = (int64_t)BT * F;
    mix<<<blocks(E), THREADS, 0, stream>>>(xk.p, x.p, mu_k.p, T, C, E);
    mix<<<blocks(E), THREADS, 0, stream>>>(xr.p, x.p, mu_r.p, T, C, E);
    linear_forward(k0.p, xk.p, weight(K, dK, F, C), BT);
    relu_squared<<<blocks(EF), THREADS, 0, stream>>>(k.p, k0.p, EF);
    linear_forward(v.p, k.p, weight(V, dV, C, F), BT);
    linear_forward(r0.p, xr.p, weight(R, dR, C, C), BT);
    sigmoid<<<blocks(E), THREADS, 0, stream>>>(gate.p, r0.p, E);
    multiply<<<blocks(E), THREADS, 0, stream>>>(out.p, gate.p, v.p, E);
}

static void channel_mix_backward_1(void) {
    const int64_t E = (int64_t)BT * C, EF = (int64_t)BT * F;
    multiply<<<blocks(E), THREADS, 0, stream>>>(dv.p, dout.p, gate.p, E);
    sigmoid_gradient<<<blocks(E), THREADS, 0, stream>>>(dr.p, dout.p, gate.p, v.p, E);
    linear_backward(model, dxr.p, dr.p, xr.p, weight(R, dR, C, C), BT);
    linear_backward(model, dk.p, dv.p, k.p, weight(V, dV, C, F), BT);
    relu_squared_gradient<<<blocks(EF), THREADS, 0, stream>>>(dk0.p, dk.p, k0.p, EF);
    linear_backward(model, dxk.p, dk0.p, xk.p, weight(K, dK, F, C), BT);
    mix_gradient<<<blocks(E), THREADS, 0, stream>>>(dx.p, dxk.p, dxr.p, mu_k.p, mu_r.p, T, C, E);
    mix_sums<<<C / 32, 32, 0, stream>>>(dmu_k.p, dxk.p, x.p, T, C, BT);
    mix_sums<<<C / 32, 32, 0, stream>>>(dmu_r.p, dxr.p, x.p, T, C, BT);
}

// ---- 2: in use ----

static void channel_mix_in_use(void) { cmix_forward(model, layer, out.p, x.p); }
static void channel_mix_backward_in_use(void) { cmix_backward(model, layer, dx.p, dout.p, x.p); }

static void forward_run(int version) { version == 1 ? channel_mix_1() : channel_mix_in_use(); }
static void backward_run(int version) { version == 1 ? channel_mix_backward_1() : channel_mix_backward_in_use(); }

// ---- what to expect ----

typedef std::vector<double> Row;

static Row product(const Array<floatX> &W, const Row &x, int rows, int columns, bool transposed) { // W x, or W^T x
    Row y(transposed ? columns : rows);
    for (int64_t i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) (transposed ? y[j] : y[i]) += W[i * columns + j] * x[transposed ? i : j];
    return y;
}

struct Token { // of one token: what goes forward, and, if dout is there, what comes back
    Row dx, xk, xr, k0, k, v, gate, dv, dr, dk0, dxk, dxr;
    explicit Token(int64_t t, bool backward) : dx(C), xk(C), xr(C), dv(C), dr(C), dk0(F) {
        for (int c = 0; c < C; c++) {
            const double here = x[t * C + c];
            dx[c] = (t % T ? x[(t - 1) * C + c] : 0) - here;
            xk[c] = here + dx[c] * mu_k[c];
            xr[c] = here + dx[c] * mu_r[c];
        }
        k0 = k = product(K, xk, F, C, false);
        gate = product(R, xr, C, C, false);
        for (double &each : k) each = pow(fmax(each, 0), 2);
        for (double &each : gate) each = 1 / (1 + exp(-each));
        v = product(V, k, C, F, false);
        if (!backward) return;
        for (int c = 0; c < C; c++) {
            dv[c] = dout[t * C + c] * gate[c];
            dr[c] = dout[t * C + c] * v[c] * gate[c] * (1 - gate[c]);
        }
        dk0 = product(V, dv, C, F, true);
        for (int f = 0; f < F; f++) dk0[f] *= 2 * fmax(k0[f], 0);
        dxk = product(K, dk0, F, C, true);
        dxr = product(R, dr, C, C, true);
    }
};

static void inputs(const int *shape) {
    B = shape[0], T = shape[1], C = shape[2], BT = B * T;
    model = lab_model(1, B, T, C);
    layer = &model->layers[0];
    F = model->d.F;
    const int64_t E = (int64_t)BT * C, EF = (int64_t)BT * F;
    x.random(E);
    for (Array<floatX> *mu : {&mu_k, &mu_r}) mu->random(C, 0.3, 0.5);
    K.random((int64_t)F * C, 1 / sqrt(C));
    V.random((int64_t)C * F, 1 / sqrt(F));
    R.random((int64_t)C * C, 1 / sqrt(C));
    for (Array<floatX> *each : {&xk, &xr, &v, &r0, &gate, &dxk, &dxr, &dv, &dr}) each->allocate(E);
    for (Array<floatX> *each : {&k0, &k, &dk0, &dk}) each->allocate(EF);
    dK.random((int64_t)F * C); // gradients are added to what is there
    dV.random((int64_t)C * F);
    dR.random((int64_t)C * C);
    dmu_k.random(C);
    dmu_r.random(C);
    Params &p = layer->p;
    p.ffn_time_maa_k = weight(mu_k, dmu_k, 1, C);
    p.ffn_time_maa_r = weight(mu_r, dmu_r, 1, C);
    p.ffn_key = weight(K, dK, F, C);
    p.ffn_value = weight(V, dV, C, F);
    p.ffn_receptance = weight(R, dR, C, C);
}

static void forward_setup(const int *shape) {
    inputs(shape);
    out.output("out", by_precision(1e-5, 4e-2), (int64_t)BT * C);
    for (int64_t t : sample(BT, C < 512 ? 40 : 8)) {
        const Token token(t, false);
        for (int c = 0; c < C; c++) out.expect(t * C + c, token.gate[c] * token.v[c]);
    }
}

// of a gradient's terms; of their squares: for the scale
struct Sum {
    double sum = 0, squares = 0;
};

static void add_outer(std::vector<Sum> &to, const Row &d, const Row &x) {
    to.resize(d.size() * x.size());
    for (size_t i = 0; i < to.size(); i++) {
        const double term = d[i / x.size()] * x[i % x.size()];
        to[i] = {to[i].sum + term, to[i].squares + term * term};
    }
}

static void backward_setup(const int *shape) {
    inputs(shape);
    dout.random((int64_t)BT * C);
    out.allocate((int64_t)BT * C);
    // both versions find what their forward pass kept
    channel_mix_1();
    channel_mix_in_use();
    const double tolerance = by_precision(1e-5, 4e-2);
    // the sums over all tokens cost the CPU too much if not
    const bool all = BT <= 300;
    dx.output("dx", tolerance, (int64_t)BT * C);
    for (int64_t t : sample(BT, C < 512 ? 300 : 8)) {
        const Token token(t, true), next(std::min<int64_t>(t + 1, BT - 1), true);
        for (int c = 0; c < C; c++) {
            const double later = (t + 1) % T ? next.dxk[c] * mu_k[c] + next.dxr[c] * mu_r[c] : 0;
            dx.expect(t * C + c, token.dxk[c] * (1 - mu_k[c]) + token.dxr[c] * (1 - mu_r[c]) + later);
        }
    }
    if (!all) return;
    std::vector<Sum> of_K, of_V, of_R, of_k(C), of_r(C);
    for (int t = 0; t < BT; t++) {
        const Token token(t, true);
        add_outer(of_K, token.dk0, token.xk);
        add_outer(of_V, token.dv, token.k);
        add_outer(of_R, token.dr, token.xr);
        for (int c = 0; c < C; c++) {
            of_k[c].sum += token.dxk[c] * token.dx[c];
            of_r[c].sum += token.dxr[c] * token.dx[c];
        }
    }
    const struct {
        Array<float> &gradient;
        const char *name;
        const std::vector<Sum> &sums;
    } gradients[] = {
        {dK, "dK", of_K}, {dV, "dV", of_V}, {dR, "dR", of_R}, {dmu_k, "dmu_k", of_k}, {dmu_r, "dmu_r", of_r}};
    for (const auto &g : gradients) {
        g.gradient.output(g.name, tolerance);
        for (int64_t i = 0; i < g.gradient.n; i++)
            g.gradient.expect(i, g.gradient[i] + g.sums[i].sum, sqrt(g.sums[i].squares + pow(g.gradient[i], 2)));
    }
}

static Cost cost(const int *shape) {
    const double n = (double)shape[0] * shape[1], c = shape[2], f = 3.5 * c;
    return {2 * sizeof(floatX) * n * c, 2 * n * (2 * c * f + c * c)};
}
static Cost backward_cost(const int *shape) { return {1.5 * cost(shape).bytes, 2 * cost(shape).flops}; }

int main(int argc, char **argv) {
    const Shapes small = {{2, 1, 64}, {3, 37, 64}, {1, 50, 192}}, large = {{32, 1024, 768}, {8, 2048, 2048}};
    const std::vector<const char *> versions = {"a kernel an operation", "in use"};
    const std::vector<Dimension> dimensions = {{"B", 1}, {"T", 1}, {"C", 64}};
    return lab_main({{"channel_mix_forward", dimensions, versions, small, large, forward_setup, forward_run, cost},
                     {"channel_mix_backward", dimensions, versions, small, large, backward_setup, backward_run,
                      backward_cost}},
                    argc, argv);
}
