// AdamW:    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2,
//           p -= lr (m / correction1 / (sqrt(v / correction2) + eps) + weight_decay p)
//               correction: 1 - beta^step
//
// Floor: bytes. Master weight, m and v are read and written, the gradient is read: 28 bytes a parameter, and 2 more for
// the bf16 copy that the model computes with. No number is used twice, so all that counts is that loads are wide and
// many.
//
// Parameters are cut into pieces that lie in one tensor each, a block a piece, so that a block has one learning rate.
//
//     1 a thread an element: every load and store moves 4 bytes
//     2 a thread 8 elements: 16 bytes at a time, seven loads under way before the first is used
//     3 in use: 2, and one factor on all gradients that the norm's kernel left on the device (clip), for no host waits
//       on it
//
//     make -C dev adamw && dev/adamw [VERSION [PARAMETERS]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static const AdamW HYPER = {1e-2f, 0.9f, 0.99f, 1e-8f, 0.1f, 1 - 0.9f, 1 - 0.99f};
static const float CLIP = 0.5f;

static int64_t n;
static int n_pieces;
static Array<floatX> params;
static Array<float> master, first, second, grads;
static Array<char> piece_bytes, state_bytes; // arrays of one Piece each, one UpdateState

__global__ void adamw_1(floatX *params, float *master, float *m, float *v, const float *grads, const Piece *pieces,
                        float clip, AdamW a) {
    const Piece piece = pieces[blockIdx.x];
    const float lr = a.lr * piece.lr_scale, decay = a.weight_decay * piece.weight_decay;
    for (int64_t i = piece.offset + threadIdx.x; i < piece.offset + piece.count; i += blockDim.x) {
        const float g = grads[i] * clip;
        m[i] = a.beta1 * m[i] + (1 - a.beta1) * g;
        v[i] = a.beta2 * v[i] + (1 - a.beta2) * g * g;
        master[i] -= lr * (m[i] / a.correction1 / (sqrtf(v[i] / a.correction2) + a.eps) + decay * master[i]);
        if (PRECISION_BF16) params[i] = (floatX)master[i];
    }
}

__global__ void adamw_2(floatX *params, float *master, float *m, float *v, const float *grads, const Piece *pieces,
                        float clip, AdamW a) {
    const Piece piece = pieces[blockIdx.x];
    const float lr = a.lr * piece.lr_scale, decay = a.weight_decay * piece.weight_decay;
    for (int64_t i = piece.offset + threadIdx.x * 8; i < piece.offset + piece.count; i += blockDim.x * 8) {
        const Pack g = load(grads + i);
        Pack first = load(m + i), second = load(v + i), p = load(master + i);
        for (int j = 0; j < 8; j++) {
            first.x[j] = a.beta1 * first.x[j] + (1 - a.beta1) * g.x[j] * clip;
            second.x[j] = a.beta2 * second.x[j] + (1 - a.beta2) * g.x[j] * clip * g.x[j] * clip;
            p.x[j] -= lr * (first.x[j] / a.correction1 / (sqrtf(second.x[j] / a.correction2) + a.eps) + decay * p.x[j]);
        }
        store(m + i, first);
        store(v + i, second);
        store(master + i, p);
        if (PRECISION_BF16) store(params + i, p);
    }
}

static void adamw_in_use(const Piece *pieces) {
    const UpdateState *state = (const UpdateState *)state_bytes.p;
    adamw_kernel<<<n_pieces, 256, 0, stream>>>(params.p, master.p, first.p, second.p, grads.p, pieces, state, HYPER);
}

static void run(int version) {
    const Piece *pieces = (const Piece *)piece_bytes.p;
    floatX *p = params.p;
    if (version == 1)
        adamw_1<<<n_pieces, 256, 0, stream>>>(p, master.p, first.p, second.p, grads.p, pieces, CLIP, HYPER);
    if (version == 2)
        adamw_2<<<n_pieces, 256, 0, stream>>>(p, master.p, first.p, second.p, grads.p, pieces, CLIP, HYPER);
    if (version == 3) adamw_in_use(pieces);
}

static void setup(const int *shape) {
    n = shape[0];
    n_pieces = (int)ceil_div(n, PIECE);
    std::vector<Piece> pieces;
    // every third one decays, every second one learns faster
    for (int64_t at = 0; at < n; at += PIECE) {
        const int64_t i = at / PIECE;
        pieces.push_back({at, (int)std::min<int64_t>(PIECE, n - at), i % 2 ? 2.f : 1.f, i % 3 ? 0.f : 1.f, (int)i, at});
    }
    const UpdateState state = {0, 0, CLIP, 0};
    piece_bytes.fill(
        n_pieces * sizeof(Piece), [&](int64_t i) { return ((const char *)pieces.data())[i]; });
    state_bytes.fill(sizeof(state), [&](int64_t i) { return ((const char *)&state)[i]; });
    grads.random(n);
    first.random(n, 0.1);
    second.fill(n, [](int64_t i) { return (float)lab_uniform(1, i); });
    master.random(n);
    first.output("m", 1e-6);
    second.output("v", 1e-6);
    master.output("master", 1e-6);
    if (PRECISION_BF16) params.output("params", 4e-3, n);
    for (int64_t i : sample(n, 100000)) {
        const Piece &piece = pieces[i / PIECE];
        const double g = grads[i] * CLIP, m = HYPER.beta1 * first[i] + (1 - HYPER.beta1) * g;
        const double v = HYPER.beta2 * second[i] + (1 - HYPER.beta2) * g * g;
        const double step = m / HYPER.correction1 / (sqrt(v / HYPER.correction2) + HYPER.eps);
        const double p =
            master[i] - HYPER.lr * piece.lr_scale * (step + HYPER.weight_decay * piece.weight_decay * master[i]);
        first.expect(i, m);
        second.expect(i, v);
        master.expect(i, p);
        if (PRECISION_BF16) params.expect(i, p);
    }
}

static Cost cost(const int *shape) { return {(28. + (PRECISION_BF16 ? 2 : 0)) * shape[0], 16. * shape[0]}; }

int main(int argc, char **argv) {
    return lab_main({{"adamw",
                      {{"PARAMETERS", 8}},
                      {"a thread an element", "a thread 8 elements", "in use"},
                      {{8}, {4104}, {100000}},
                      {{124000000}},
                      setup,
                      run,
                      cost}},
                    argc, argv);
}
