/*
test_goldfinch.c: the GoldFinch model in plain C, and every check of the trainer.

Part 1 is the model without any CUDA: forward, backward, AdamW, learning rate. It is the place to read what the program
computes: each equation is one forward function with its backward function below it, in plain loops. Parameters and
activations are float; every sum is accumulated in double. It shares no code with the kernels of train_goldfinch.cu.

Part 2 checks. It holds three computations against each other: golden tables (dev/golden, made in float64 by another
implementation), part 1, and the kernels, which it reaches through the extern "C" interface of train_goldfinch.cu.

    make test_goldfinch [PRECISION=BF16|FP32] [GPU=0|1]
    ./test_goldfinch                # every check
    ./test_goldfinch FILE...        # just these golden tables; one whose config has steps= is a training run
    ./test_goldfinch --trainer FILE...      # without inference: for tools that slow a kernel a thousandfold
    ./test_goldfinch --ranks N FILE...      # training runs on N GPUs, or N processes of the CPU build

The last line is "N passed, N failed, N skipped"; the exit status is 1 if any check failed.

Letters: B batch, T time, C n_embd, A dim_att, F dim_ffn, V vocab_size, L n_layer, N = 64 head size, H = A / N heads,
R numbers per token in the compressed cache. rows = B * T. Activations are (rows, C), channel fastest.
*/

#define _DEFAULT_SOURCE // opendir, getline, strdup
#include <dirent.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// ====================================================================================================================
// Part 1: the model
// ====================================================================================================================

enum { N = 64 }; // channels per head, in every GoldFinch

// --------------------------------------------------------------------------------------------------------------------
// Settings: under the names of the command line. type, group, name, default

#define SETTINGS(X) \
    X(INT, model, n_layer, 6) \
    X(INT, model, n_embd, 128) \
    X(INT, model, ctx_len, 64) \
    X(INT, model, vocab_size, 320) \
    X(INT, model, head_size, 64) \
    X(INT, model, dim_att, 0) \
    X(INT, model, dim_ffn, 0) \
    X(TEXT, model, tmix, "x060c2") \
    X(TEXT, model, tmix2, "") \
    X(TEXT, model, cmix, "x060") \
    X(TEXT, model, cmix2, "x060") \
    X(INT, model, inv_other_layer_ratio, 3) \
    X(INT, model, kv_cache_compression_ratio, 16) \
    X(INT, model, use_one_minus_w, 1) \
    X(INT, model, use_v2, 1) \
    X(INT, model, parallel, 0) \
    X(REAL, model, head_size_divisor, 8) \
    X(INT, train, micro_bsz, 1) \
    X(INT, train, accumulate_grad_batches, 1) \
    X(INT, train, grad_cp, 0) \
    X(INT, train, warmup_steps, 10) \
    X(INT, train, my_exit_tokens, 1498226207) \
    X(INT, train, layerwise_lr, 1) \
    X(TEXT, train, lr_decay_type, "cos") \
    X(REAL, train, lr_init, 6e-4) \
    X(REAL, train, lr_final, 2e-4) \
    X(REAL, train, lr_wait, 0) \
    X(REAL, train, weight_decay, 0.001) \
    X(REAL, train, beta1, 0.9) \
    X(REAL, train, beta2, 0.99) \
    X(REAL, train, adam_eps, 1e-8) \
    X(REAL, train, gradient_clip_val, 1.0)

#define NESTED_SETTINGS(X) \
    X(REAL, model, rope.base, 0) \
    X(REAL, model, rope.rebase, 1) \
    X(REAL, model, rope.rescale, 1) \
    X(REAL, model, brope.rescale, 0)

#define FIELD_INT(name) int64_t name;
#define FIELD_REAL(name) double name;
#define FIELD_TEXT(name) char name[16];
typedef struct Settings {
#define FIELD(type, group, name, value) FIELD_##type(name)
    SETTINGS(FIELD)
#undef FIELD
    // base 0: none
    struct {
        double base, rebase, rescale;
    } rope;
    // 0: none
    struct {
        double rescale;
    } brope;
} Settings;

// --------------------------------------------------------------------------------------------------------------------
// Tensors: one table per part names each tensor, its shape, its optimizer group and how it starts

typedef enum Group {
    PLAIN, // learning rate x 1, no weight decay
    TWICE, // learning rate x 2, no weight decay
    DECAY, // learning rate x 1, weight decay
} Group;

typedef enum Init { // with p = l / (L-1), q = 1 - l / L for layer l, and d = i / C for channel i
    ZERO,
    ONE,
    MIX,             // 1 - d^q
    MIX_HALF,        // 1 - d^(q/2)
    MIX_V,           // 1 - (d^q + 0.3 p)
    EAGLE_MIX,       // d^q
    EAGLE_MIX_HALF,  // d^(q/2)
    EAGLE_MIX_V,     // d^q + 0.3 p
    SMALL,           // uniform in +-0.01
    EMBEDDING,       // uniform in +-1e-4
    TIME_DECAY,      // -6 + 5 (i/(A-1))^(0.7 + 1.3 p)
    TIME_FAAAA,      // p (1 - i/(A-1)) + 0.1 ((i+1) mod 3 - 1)
    LN_X,            // ((1+l)/L)^0.7
    ORTHOGONAL,      // gain 1
    ORTHOGONAL_KEY,  // gain 0.1
    ORTHOGONAL_HEAD, // gain 0.5 sqrt(V/C) if V > C, else 0.5
} Init;

typedef struct Row {
    const char *name, *shape; // shape: numbers and letters; D = max(C/16, 64), X = C + R, W = 8C/3 in steps of 32
    Group group;
    Init init;
} Row;

// clang-format off
#define NORM(name, width, gain) {name ".weight", width, PLAIN, gain}, {name ".bias", width, PLAIN, ZERO}

static const Row model_tensors[] = {
    {"emb.weight",  "V C", DECAY, EMBEDDING},
    {"head.weight", "V C", DECAY, ORTHOGONAL_HEAD},
    NORM("ln_out", "C", ONE),
    {0}
};
static const Row token_cat_tensors[] = {
    {"w_kv_cache_a.weight", "R C", DECAY, ORTHOGONAL},
    {"w_kv_cache_b.weight", "A X", DECAY, ORTHOGONAL},
    {0}
};
static const Row ln0_tensors[] = {  // of block 0
    NORM("ln0", "C", ONE),
    {0}
};
static const Row block_tensors[] = {
    NORM("ln1", "C", ONE),
    NORM("ln2", "C", ONE),
    {0}
};
static const Row finch_c2_tensors[] = {
    {"att.time_maa_x",  "1 1 C", PLAIN, MIX},
    {"att.time_maa_r",  "1 1 C", PLAIN, MIX_HALF},
    {"att.time_maa_k",  "1 1 C", PLAIN, MIX},
    {"att.time_maa_v",  "1 1 C", PLAIN, MIX_V},
    {"att.time_maa_w",  "1 1 C", PLAIN, MIX},
    {"att.time_maa_v2", "1 1 C", PLAIN, MIX_V},
    {"att.time_maa_w1", "C 160", PLAIN, ZERO},
    {"att.time_maa_w2", "5 32 C", PLAIN, SMALL},
    {"att.time_decay",  "1 1 A", TWICE, TIME_DECAY},
    {"att.time_decay_w1", "C 64", PLAIN, ZERO},
    {"att.time_decay_w2", "64 A", PLAIN, SMALL},
    {"att.time_value2_w1", "C 64", PLAIN, ZERO},
    {"att.time_value2_w2", "64 A", PLAIN, SMALL},
    {"att.time_faaaa", "H 64", PLAIN, TIME_FAAAA},
    {"att.receptance.weight", "A C", DECAY, ORTHOGONAL},
    {"att.key.weight",    "A C", DECAY, ORTHOGONAL_KEY},
    {"att.value.weight",  "A C", DECAY, ORTHOGONAL},
    {"att.output.weight", "C A", DECAY, ZERO},
    NORM("att.ln_x", "A", LN_X),
    {0}
};
static const Row gold_tensors[] = {
    {"att.time_maa_x", "1 1 C", PLAIN, MIX},
    {"att.time_maa_q", "1 1 C", PLAIN, MIX_HALF},
    {"att.time_maa_k", "1 1 C", PLAIN, MIX},
    {"att.time_maa_v", "1 1 C", PLAIN, MIX_V},
    {"att.time_maa_v_cache", "1 1 C", PLAIN, MIX},
    {"att.time_maa_q_w1", "C 32", PLAIN, ZERO},
    {"att.time_maa_q_w2", "32 C", PLAIN, SMALL},
    {"att.time_maa_kv_w1", "C 64", PLAIN, ZERO},
    {"att.time_maa_kv_w2", "2 32 C", PLAIN, SMALL},
    {"att.time_key_w1", "C D", PLAIN, ZERO},
    {"att.time_key_w2", "D C", PLAIN, SMALL},
    {"att.time_value_w1", "C D", PLAIN, ZERO},
    {"att.time_value_w2", "D C", PLAIN, SMALL},
    {"att.query.weight",  "A C", DECAY, ORTHOGONAL},
    {"att.output.weight", "C A", DECAY, ZERO},
    NORM("att.ln_q", "A", ONE),
    NORM("att.ln_k", "A", ONE),
    NORM("att.ln_v", "A", ONE),
    NORM("att.ln_x", "A", LN_X),
    {0}
};
static const Row finch_tensors[] = {
    {"att.time_maa_x", "1 1 C", PLAIN, MIX},
    {"att.time_maa_w", "1 1 C", PLAIN, MIX},
    {"att.time_maa_k", "1 1 C", PLAIN, MIX},
    {"att.time_maa_v", "1 1 C", PLAIN, MIX_V},
    {"att.time_maa_r", "1 1 C", PLAIN, MIX_HALF},
    {"att.time_maa_g", "1 1 C", PLAIN, MIX_HALF},
    {"att.time_maa_w1", "C 160", PLAIN, ZERO},
    {"att.time_maa_w2", "5 32 C", PLAIN, SMALL},
    {"att.time_decay", "1 1 A", TWICE, TIME_DECAY},
    {"att.time_decay_w1", "C 64", PLAIN, ZERO},
    {"att.time_decay_w2", "64 A", PLAIN, SMALL},
    {"att.time_faaaa", "H 64", PLAIN, TIME_FAAAA},
    {"att.receptance.weight", "A C", DECAY, ORTHOGONAL},
    {"att.key.weight",    "A C", DECAY, ORTHOGONAL_KEY},
    {"att.value.weight",  "A C", DECAY, ORTHOGONAL},
    {"att.gate.weight",   "A C", DECAY, ORTHOGONAL_KEY},
    {"att.output.weight", "C A", DECAY, ZERO},
    NORM("att.ln_x", "A", LN_X),
    {0}
};
static const Row finch_b_tensors[] = {
    {"att.time_maa_x", "1 1 C", PLAIN, MIX},
    {"att.time_maa_r", "1 1 C", PLAIN, MIX_HALF},
    {"att.time_maa_k", "1 1 C", PLAIN, MIX},
    {"att.time_maa_v", "1 1 C", PLAIN, MIX_V},
    {"att.time_maa_w", "1 1 C", PLAIN, MIX},
    {"att.time_maa_rkvw_w1", "C 128", PLAIN, ZERO},
    {"att.time_maa_rkvw_w2", "4 32 C", PLAIN, SMALL},
    {"att.time_decay", "1 1 A", TWICE, TIME_DECAY},
    {"att.time_decay_w1", "C 64", PLAIN, ZERO},
    {"att.time_decay_w2", "64 A", PLAIN, SMALL},
    {"att.time_faaaa", "H 64", PLAIN, TIME_FAAAA},
    {"att.receptance.weight", "A C", DECAY, ORTHOGONAL},
    {"att.key.weight",    "A C", DECAY, ORTHOGONAL_KEY},
    {"att.value.weight",  "A C", DECAY, ORTHOGONAL},
    {"att.output.weight", "C A", DECAY, ZERO},
    NORM("att.ln_x", "A", LN_X),
    {0}
};
static const Row eagle_tensors[] = {
    {"att.time_mix_k", "1 1 C", PLAIN, EAGLE_MIX},
    {"att.time_mix_v", "1 1 C", PLAIN, EAGLE_MIX_V},
    {"att.time_mix_r", "1 1 C", PLAIN, EAGLE_MIX_HALF},
    {"att.time_mix_g", "1 1 C", PLAIN, EAGLE_MIX_HALF},
    {"att.time_decay", "H 64", TWICE, TIME_DECAY},
    {"att.time_faaaa", "H 64", PLAIN, TIME_FAAAA},
    {"att.receptance.weight", "A C", DECAY, ORTHOGONAL},
    {"att.key.weight",    "A C", DECAY, ORTHOGONAL_KEY},
    {"att.value.weight",  "A C", DECAY, ORTHOGONAL},
    {"att.gate.weight",   "A C", DECAY, ORTHOGONAL_KEY},
    {"att.output.weight", "C A", DECAY, ZERO},
    NORM("att.ln_x", "A", LN_X),
    {0}
};
static const Row gptalpha_tensors[] = {
    {"att.time_maa_x", "1 1 C", PLAIN, MIX},
    {"att.time_maa_r", "1 1 C", PLAIN, MIX_HALF},
    {"att.time_maa_k", "1 1 C", PLAIN, MIX},
    {"att.time_maa_v", "1 1 C", PLAIN, MIX_V},
    {"att.time_maa_w1", "C 96", PLAIN, ZERO},
    {"att.time_maa_w2", "3 32 C", PLAIN, SMALL},
    {"att.query.weight",  "A C", DECAY, ORTHOGONAL},
    {"att.key.weight",    "A C", DECAY, ORTHOGONAL_KEY},
    {"att.value.weight",  "A C", DECAY, ORTHOGONAL},
    {"att.output.weight", "C A", DECAY, ZERO},
    NORM("att.ln_r", "A", ONE),
    NORM("att.ln_k", "A", ONE),
    NORM("att.ln_v", "A", ONE),
    NORM("att.ln_x", "A", LN_X),
    {0}
};
static const Row llama_tensors[] = {
    {"att.wq.weight", "A C", DECAY, ORTHOGONAL},
    {"att.wk.weight", "A C", DECAY, ORTHOGONAL},
    {"att.wv.weight", "A C", DECAY, ORTHOGONAL},
    {"att.wo.weight", "C A", DECAY, ORTHOGONAL},
    {0}
};
static const Row cmix_tensors[] = {
    {"ffn.time_maa_k", "1 1 C", PLAIN, MIX},
    {"ffn.time_maa_r", "1 1 C", PLAIN, MIX},
    {"ffn.key.weight", "F C", DECAY, ORTHOGONAL},
    {"ffn.receptance.weight", "C C", DECAY, ZERO},
    {"ffn.value.weight", "C F", DECAY, ZERO},
    {0}
};
static const Row cmix_eagle_tensors[] = {
    {"ffn.time_mix_k", "1 1 C", PLAIN, EAGLE_MIX},
    {"ffn.time_mix_r", "1 1 C", PLAIN, EAGLE_MIX},
    {"ffn.key.weight", "F C", DECAY, ORTHOGONAL},
    {"ffn.receptance.weight", "C C", DECAY, ZERO},
    {"ffn.value.weight", "C F", DECAY, ZERO},
    {0}
};
static const Row cmix_llama_tensors[] = {
    {"ffn.w1.weight", "W C", DECAY, ORTHOGONAL},
    {"ffn.w2.weight", "C W", DECAY, ORTHOGONAL},
    {"ffn.w3.weight", "W C", DECAY, ORTHOGONAL},
    {0}
};
// clang-format on

typedef struct Param {
    char name[64]; // "blocks.0.att.key.weight"
    const Row *row;
    int layer; // -1: belongs to no block
    int ndim;
    int64_t shape[3], size;
    float *w, *g, *m, *v; // weights, gradient, AdamW's two moments
} Param;

typedef struct Array { // an activation kept for the backward pass
    char name[64];     // "blocks.0.att.out"
    int64_t size;
    float *data;
} Array;

typedef struct Ref {
    Settings s;
    int L, C, A, H, F, V, R, G0; // layers 0 .. G0-1 use tmix and cmix, G0 .. L-1 use tmix2 and cmix2
    int B, T, rows;              // of the current batch
    int n_params, n_kept, n_temporary;
    Param params[512];
    Array kept[1024];
    float *temporary[64]; // gradients of activations, freed after each layer
    float *dx0, *dK0;     // (rows, C), (rows, A): sums over all the GOLD layers
} Ref;

static void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "test_goldfinch: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(2);
}

static void *zeros(int64_t n, size_t size) {
    void *p = calloc(n > 0 ? n : 1, size);
    if (!p) fail("out of memory (%lld x %zu bytes)", (long long)n, size);
    return p;
}

static void full_name(char full[64], int l, const char *name) {
    if (l < 0) snprintf(full, 64, "%s", name);
    else snprintf(full, 64, "blocks.%d.%s", l, name);
}

static int llama_width(const Ref *m) { return m->C * 4 * 2 / 3 / 32 * 32; }

static int64_t dimension(const Ref *m, const char *text) {
    switch (*text) {
    case 'A': return m->A;
    case 'C': return m->C;
    case 'D': return m->C / 16 > 64 ? m->C / 16 : 64;
    case 'F': return m->F;
    case 'H': return m->H;
    case 'R': return m->R;
    case 'V': return m->V;
    case 'W': return llama_width(m);
    case 'X': return m->C + m->R;
    default: return atoi(text);
    }
}

static void add_tensors(Ref *m, int layer, const Row *row) {
    for (; row->name; row++) {
        Param *p = &m->params[m->n_params++];
        full_name(p->name, layer, row->name);
        p->row = row;
        p->layer = layer;
        p->size = 1;
        for (const char *s = row->shape; s; s = strchr(s, ' ')) {
            if (*s == ' ') s++;
            p->shape[p->ndim] = dimension(m, s);
            p->size *= p->shape[p->ndim++];
        }
        p->w = zeros(p->size, sizeof(float));
        p->g = zeros(p->size, sizeof(float));
        p->m = zeros(p->size, sizeof(float));
        p->v = zeros(p->size, sizeof(float));
    }
}

// Parameter of layer l by its name inside the block, or of the model if l is -1.
static Param *param(Ref *m, int l, const char *name) {
    char full[64];
    full_name(full, l, name);
    for (int i = 0; i < m->n_params; i++)
        if (!strcmp(m->params[i].name, full)) return &m->params[i];
    return NULL;
}

// An activation computed earlier in this pass.
static Array *kept(Ref *m, int l, const char *name) {
    char full[64];
    full_name(full, l, name);
    for (int i = 0; i < m->n_kept; i++)
        if (!strcmp(m->kept[i].name, full)) return &m->kept[i];
    return NULL;
}

static float *saved(Ref *m, int l, const char *name) { return kept(m, l, name)->data; }

// A new activation of n zeros under this name; the backward pass finds it by saved().
static float *keep(Ref *m, int l, const char *name, int64_t n) {
    Array *a = kept(m, l, name);
    if (!a) {
        a = &m->kept[m->n_kept++];
        full_name(a->name, l, name);
    }
    free(a->data);
    a->size = n;
    a->data = zeros(n, sizeof(float));
    return a->data;
}

static float *temporary(Ref *m, int64_t n) { return m->temporary[m->n_temporary++] = zeros(n, sizeof(float)); }

static void free_temporary(Ref *m) {
    while (m->n_temporary) free(m->temporary[--m->n_temporary]);
}

// --------------------------------------------------------------------------------------------------------------------
// What a bf16 build keeps. Between kernels it rounds numbers to 8 bits; sums, and gradients of parameters, are fp32.
// With `rounds` the reference does the same where it has computed an activation or its gradient, so that one can say
// what error such storage costs a model, whoever computes it.

static int rounds;

static float bf16(float x) { // to nearest, ties to even
    union {
        float value;
        uint32_t bits;
    } u = {x};
    u.bits = (u.bits + 0x7FFF + (u.bits >> 16 & 1)) & 0xFFFF0000u;
    return u.value;
}

static void store(float *x, int64_t n) {
    for (int64_t i = 0; i < n && rounds; i++) x[i] = bf16(x[i]);
}

// --------------------------------------------------------------------------------------------------------------------
// Linear algebra. Every function here and below ADDS to what it computes into; activations start as zeros.

// y[i][j] += sum over k of a[i][k] b[k][j], for i < I, j < J, k < K.
// a_row is the distance from a[i][k] to a[i+1][k], a_col to a[i][k+1]; b alike, so any of them may be transposed.
static void matmul(float *y, int y_row, const float *a, int a_row, int a_col, const float *b, int b_row, int b_col,
                   int I, int J, int K) {
    double *panel = zeros(4 * (int64_t)K, sizeof(double)); // four columns of b side by side: (K, 4)
    for (int j = 0; j < J; j += 4) {
        int width = J - j < 4 ? J - j : 4;
        for (int k = 0; k < K; k++)
            for (int c = 0; c < width; c++) panel[4 * k + c] = b[(int64_t)k * b_row + (int64_t)(j + c) * b_col];
        for (int i = 0; i < I; i++) {
            const float *ai = a + (int64_t)i * a_row;
            double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (int k = 0; k < K; k++) {
                double x = ai[(int64_t)k * a_col];
                s0 += x * panel[4 * k];
                s1 += x * panel[4 * k + 1];
                s2 += x * panel[4 * k + 2];
                s3 += x * panel[4 * k + 3];
            }
            double s[4] = {s0, s1, s2, s3};
            for (int c = 0; c < width; c++) y[(int64_t)i * y_row + j + c] += s[c];
        }
    }
    free(panel);
}

// Linear layer: y = x Wᵀ, W (out, in), x (rows, in), y (rows, out).
static void linear(float *y, const float *x, const Param *W, int rows) {
    int out = W->shape[0], in = W->shape[1];
    matmul(y, out, x, in, 1, W->w, 1, in, rows, out, in);
    store(y, (int64_t)rows * out);
}

static void linear_backward(float *dx, const float *dy, const float *x, const Param *W, int rows) {
    int out = W->shape[0], in = W->shape[1];
    matmul(dx, in, dy, out, 1, W->w, in, 1, rows, in, out);
    matmul(W->g, in, dy, 1, out, x, in, 1, out, in, rows);
    store(dx, (int64_t)rows * in);
}

// Low-rank function: h = tanh(x @ W1); y = h @ W2.  W1 (in, n rank); W2 (rank, out), or (n, rank, out) for n outputs,
// of which number i sees only columns rank i .. rank (i+1) of h. x (rows, in), h (rows, n rank), y (n, rows, out).
static void low_rank(float *y, float *h, const float *x, const Param *W1, const Param *W2, int rows) {
    int in = W1->shape[0], width = W1->shape[1];
    int n = W2->ndim == 3 ? W2->shape[0] : 1, rank = W2->shape[W2->ndim - 2], out = W2->shape[W2->ndim - 1];
    matmul(h, width, x, in, 1, W1->w, width, 1, rows, width, in);
    for (int64_t i = 0; i < (int64_t)rows * width; i++) h[i] = tanh(h[i]);
    store(h, (int64_t)rows * width);
    for (int i = 0; i < n; i++) {
        matmul(y + (int64_t)i * rows * out, out, h + i * rank, width, 1, W2->w + i * rank * out, out, 1, rows, out,
               rank);
    }
}

static void low_rank_backward(float *dx, const float *dy, const float *h, const float *x, const Param *W1,
                              const Param *W2, int rows) {
    int in = W1->shape[0], width = W1->shape[1];
    int n = W2->ndim == 3 ? W2->shape[0] : 1, rank = W2->shape[W2->ndim - 2], out = W2->shape[W2->ndim - 1];
    float *dh = zeros((int64_t)rows * width, sizeof(float));
    for (int i = 0; i < n; i++) {
        const float *dyi = dy + (int64_t)i * rows * out;
        matmul(dh + i * rank, width, dyi, out, 1, W2->w + i * rank * out, 1, out, rows, rank, out);
        matmul(W2->g + i * rank * out, out, h + i * rank, 1, width, dyi, out, 1, rank, out, rows);
    }
    for (int64_t i = 0; i < (int64_t)rows * width; i++) dh[i] *= 1 - (double)h[i] * h[i];
    store(dh, (int64_t)rows * width);
    matmul(dx, in, dh, width, 1, W1->w, 1, width, rows, in, width);
    matmul(W1->g, width, x, 1, in, dh, width, 1, in, width, rows);
    free(dh);
}

// --------------------------------------------------------------------------------------------------------------------
// Norms

typedef struct Moments {
    double mean, rstd;
} Moments;

static Moments moments(const float *x, int D) {
    double mean = 0, variance = 0;
    for (int i = 0; i < D; i++) mean += x[i];
    mean /= D;
    for (int i = 0; i < D; i++) variance += (x[i] - mean) * (x[i] - mean);
    return (Moments){mean, 1 / sqrt(variance / D + 1e-5)};
}

// y = (x - mean) / sqrt(variance + 1e-5) * gain + bias, over the last dimension. x, y (rows, D)
static void layer_norm(float *y, const float *x, const Param *gain, const Param *bias, int rows) {
    int D = gain->size;
    for (int t = 0; t < rows; t++, x += D, y += D) {
        Moments s = moments(x, D);
        for (int i = 0; i < D; i++) y[i] += (x[i] - s.mean) * s.rstd * gain->w[i] + bias->w[i];
        store(y, D);
    }
}

static void layer_norm_backward(float *dx, const float *dy, const float *x, const Param *gain, const Param *bias,
                                int rows) {
    int D = gain->size;
    double *dgain = zeros(D, sizeof(double)), *dbias = zeros(D, sizeof(double));
    for (int t = 0; t < rows; t++, x += D, dx += D, dy += D) {
        Moments s = moments(x, D);
        double mean_dn = 0, mean_dn_n = 0; // n is x normalized, before gain and bias
        for (int i = 0; i < D; i++) {
            double n = (x[i] - s.mean) * s.rstd, dn = (double)dy[i] * gain->w[i];
            mean_dn += dn / D;
            mean_dn_n += dn * n / D;
            dgain[i] += dy[i] * n;
            dbias[i] += dy[i];
        }
        for (int i = 0; i < D; i++) {
            double n = (x[i] - s.mean) * s.rstd, dn = (double)dy[i] * gain->w[i];
            dx[i] += (dn - mean_dn - n * mean_dn_n) * s.rstd;
        }
        store(dx, D);
    }
    for (int i = 0; i < D; i++) {
        gain->g[i] += dgain[i];
        bias->g[i] += dbias[i];
    }
    free(dgain);
    free(dbias);
}

// y = x / (|x| / sqrt(D) + 1e-8)
static void rms_norm(float *y, const float *x, int D, int rows) {
    for (int t = 0; t < rows; t++, x += D, y += D) {
        double square = 0;
        for (int i = 0; i < D; i++) square += (double)x[i] * x[i];
        double scale = 1 / (sqrt(square / D) + 1e-8);
        for (int i = 0; i < D; i++) y[i] += x[i] * scale;
        store(y, D);
    }
}

static void rms_norm_backward(float *dx, const float *dy, const float *x, int D, int rows) {
    for (int t = 0; t < rows; t++, x += D, dx += D, dy += D) {
        double square = 0, dot = 0;
        for (int i = 0; i < D; i++) {
            square += (double)x[i] * x[i];
            dot += (double)dy[i] * x[i];
        }
        double rms = sqrt(square / D), scale = 1 / (rms + 1e-8);
        if (rms == 0) continue; // by decision: the norm has no derivative at 0
        for (int i = 0; i < D; i++) dx[i] += dy[i] * scale - x[i] * dot * scale * scale / (rms * D);
        store(dx, D);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Token shift

// diff_t = x_{t-1} - x_t, with x_{-1} = 0 at the start of each sequence. x, diff (B, T, C)
static void shift_difference(float *diff, const float *x, int B, int T, int C) {
    for (int t = 0; t < B * T; t++)
        for (int64_t i = (int64_t)t * C; i < (int64_t)(t + 1) * C; i++) diff[i] += (t % T ? x[i - C] : 0) - x[i];
}

static void shift_difference_backward(float *dx, const float *ddiff, int B, int T, int C) {
    for (int t = 0; t < B * T; t++) {
        int last = t % T == T - 1;
        for (int64_t i = (int64_t)t * C; i < (int64_t)(t + 1) * C; i++) dx[i] += (last ? 0 : ddiff[i + C]) - ddiff[i];
    }
}

// y = x + diff * (maa + m): between this token's x and the last one's, by a learned amount per channel (maa, (C)) and
// optionally one that depends on the data (m, (rows, C), may be NULL).
static void lerp(float *y, const float *x, const float *diff, const Param *maa, const float *m, int rows) {
    int C = maa->size;
    for (int64_t i = 0; i < (int64_t)rows * C; i++) y[i] += x[i] + diff[i] * (maa->w[i % C] + (m ? m[i] : 0));
    store(y, (int64_t)rows * C);
}

static void lerp_backward(float *dx, float *ddiff, float *dm, const float *dy, const float *diff, const Param *maa,
                          const float *m, int rows) {
    int C = maa->size;
    for (int c = 0; c < C; c++) {
        double dmaa = 0;
        for (int64_t i = c; i < (int64_t)rows * C; i += C) {
            dx[i] += dy[i];
            ddiff[i] += dy[i] * (maa->w[c] + (m ? m[i] : 0));
            if (m) dm[i] += dy[i] * diff[i];
            dmaa += (double)dy[i] * diff[i];
        }
        maa->g[c] += dmaa;
    }
}

// --------------------------------------------------------------------------------------------------------------------
// WKV: the linear attention of RWKV. Per head a state S (N keys, N values), S = 0 at the start of a sequence:
//     y_t[j]  = sum over i of r_t[i] (S[i][j] + u[i] k_t[i] v_t[j])
//     S[i][j] = d_t[i] S[i][j] + k_t[i] v_t[j],      d_t = exp(-exp(w_t))
// r, k, v, w, y (B, T, H, N); u (H, N), or NULL for zeros.

static double decay(float w) { return exp(-exp(w)); }

static double decay_gradient(float w) { // d decay / d w, without inf * 0
    return w < 7 ? -exp(-exp(w)) * exp(w) : 0;
}

static void wkv(float *y, const float *r, const float *k, const float *v, const float *w, const float *u, int B, int T,
                int H) {
    for (int bh = 0; bh < B * H; bh++) {
        double S[N][N] = {{0}};
        for (int t = 0; t < T; t++) {
            int64_t at = (((int64_t)(bh / H) * T + t) * H + bh % H) * N;
            double sum[N] = {0};
            for (int i = 0; i < N; i++) {
                double ri = r[at + i], ki = k[at + i], di = decay(w[at + i]), ui = u ? u[bh % H * N + i] : 0;
                for (int j = 0; j < N; j++) {
                    double kv = ki * v[at + j];
                    sum[j] += ri * (S[i][j] + ui * kv);
                    S[i][j] = di * S[i][j] + kv;
                }
            }
            for (int j = 0; j < N; j++) y[at + j] += sum[j];
            store(y + at, N);
        }
    }
}

static void wkv_backward(float *dr, float *dk, float *dv, float *dw, float *du, const float *dy, const float *r,
                         const float *k, const float *v, const float *w, const float *u, int B, int T, int H) {
    double(*S)[N][N] = zeros(T + 1, sizeof(*S)); // S[t]: the state that token t finds
    for (int bh = 0; bh < B * H; bh++) {
        for (int t = 0; t < T; t++) {
            int64_t at = (((int64_t)(bh / H) * T + t) * H + bh % H) * N;
            for (int i = 0; i < N; i++) {
                double ki = k[at + i], di = decay(w[at + i]);
                for (int j = 0; j < N; j++) S[t + 1][i][j] = di * S[t][i][j] + ki * v[at + j];
            }
        }
        double dS[N][N] = {{0}}; // gradient of the state after token t
        double du_sum[N] = {0};
        for (int t = T - 1; t >= 0; t--) {
            int64_t at = (((int64_t)(bh / H) * T + t) * H + bh % H) * N;
            double dv_sum[N] = {0}, v_dy = 0;
            for (int j = 0; j < N; j++) v_dy += (double)v[at + j] * dy[at + j];
            for (int i = 0; i < N; i++) {
                double ri = r[at + i], ki = k[at + i], di = decay(w[at + i]), ui = u ? u[bh % H * N + i] : 0;
                double dr_sum = 0, dk_sum = 0, dd_sum = 0;
                for (int j = 0; j < N; j++) {
                    double dyj = dy[at + j];
                    dr_sum += S[t][i][j] * dyj;
                    dk_sum += dS[i][j] * v[at + j];
                    dd_sum += dS[i][j] * S[t][i][j];
                    dv_sum[j] += dS[i][j] * ki + ri * ui * ki * dyj;
                    dS[i][j] = di * dS[i][j] + ri * dyj;
                }
                dr[at + i] += dr_sum + ui * ki * v_dy;
                dk[at + i] += dk_sum + ui * ri * v_dy;
                dw[at + i] += dd_sum * decay_gradient(w[at + i]);
                du_sum[i] += ri * ki * v_dy;
            }
            for (int j = 0; j < N; j++) dv[at + j] += dv_sum[j];
            store(dr + at, N), store(dk + at, N), store(dv + at, N), store(dw + at, N);
        }
        for (int i = 0; i < N && du; i++) du[bh % H * N + i] += du_sum[i];
    }
    free(S);
}

// --------------------------------------------------------------------------------------------------------------------
// Causal attention: y_t = sum over s <= t of p_ts v_s, p_t = softmax over s of q_t k_s / sqrt(N). All (B, T, H, N)

static double dot(const float *a, const float *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)a[i] * b[i];
    return sum;
}

// p[s], s <= t, of one query; k is the head's first key, keys lie `stride` apart.
static void attention_row(double *p, const float *q, const float *k, int t, int stride) {
    double largest = -INFINITY, total = 0;
    for (int s = 0; s <= t; s++) {
        p[s] = dot(q, k + (int64_t)s * stride, N) / sqrt(N);
        if (p[s] > largest) largest = p[s];
    }
    for (int s = 0; s <= t; s++) total += p[s] = exp(p[s] - largest);
    for (int s = 0; s <= t; s++) p[s] /= total;
}

static void attention(float *y, const float *q, const float *k, const float *v, int B, int T, int H) {
    double *p = zeros(T, sizeof(double));
    int stride = H * N;
    for (int bh = 0; bh < B * H; bh++) {
        int64_t head = (int64_t)(bh / H) * T * stride + bh % H * N;
        for (int t = 0; t < T; t++) {
            double sum[N] = {0};
            attention_row(p, q + head + (int64_t)t * stride, k + head, t, stride);
            for (int s = 0; s <= t; s++)
                for (int j = 0; j < N; j++) sum[j] += p[s] * v[head + (int64_t)s * stride + j];
            for (int j = 0; j < N; j++) y[head + (int64_t)t * stride + j] += sum[j];
            store(y + head + (int64_t)t * stride, N);
        }
    }
    free(p);
}

static void attention_backward(float *dq, float *dk, float *dv, const float *dy, const float *q, const float *k,
                               const float *v, int B, int T, int H) {
    double *p = zeros(T, sizeof(double)), *dp = zeros(T, sizeof(double));
    double(*dk_sum)[N] = zeros(T, sizeof(*dk_sum)), (*dv_sum)[N] = zeros(T, sizeof(*dv_sum));
    int stride = H * N;
    for (int bh = 0; bh < B * H; bh++) {
        int64_t head = (int64_t)(bh / H) * T * stride + bh % H * N;
        memset(dk_sum, 0, T * sizeof(*dk_sum));
        memset(dv_sum, 0, T * sizeof(*dv_sum));
        for (int t = 0; t < T; t++) {
            int64_t at = head + (int64_t)t * stride;
            double mean_dp = 0, dq_sum[N] = {0};
            attention_row(p, q + at, k + head, t, stride);
            for (int s = 0; s <= t; s++) {
                dp[s] = dot(dy + at, v + head + (int64_t)s * stride, N);
                mean_dp += p[s] * dp[s];
            }
            for (int s = 0; s <= t; s++) {
                double dscore = p[s] * (dp[s] - mean_dp) / sqrt(N);
                for (int j = 0; j < N; j++) {
                    dq_sum[j] += dscore * k[head + (int64_t)s * stride + j];
                    dk_sum[s][j] += dscore * q[at + j];
                    dv_sum[s][j] += p[s] * dy[at + j];
                }
            }
            for (int j = 0; j < N; j++) dq[at + j] += dq_sum[j];
            store(dq + at, N);
        }
        for (int t = 0; t < T; t++) {
            for (int j = 0; j < N; j++) {
                dk[head + (int64_t)t * stride + j] += dk_sum[t][j];
                dv[head + (int64_t)t * stride + j] += dv_sum[t][j];
            }
            store(dk + head + (int64_t)t * stride, N), store(dv + head + (int64_t)t * stride, N);
        }
    }
    free(p);
    free(dp);
    free(dk_sum);
    free(dv_sum);
}

// --------------------------------------------------------------------------------------------------------------------
// Positions: the channels 2i and 2i + 1 of each head, as a vector in the plane, turn by position * velocity_i, where
//     rope:  velocity_i = (base rebase)^(-2i/N) / rescale
//     brope: velocity_i = pi 2^-i / rescale for i < log2(ctx_len), rounded down; 0 for the others

static double rope_velocity(const Settings *s, int i) {
    if (s->rope.base > 0) return pow(s->rope.base * s->rope.rebase, -2.0 * i / N) / s->rope.rescale;
    if (s->brope.rescale > 0 && i < floor(log2(s->ctx_len))) return acos(-1) * exp2(-i) / s->brope.rescale;
    return 0;
}

// x (rows, A) in place; direction 1, or -1 for gradients: a turn's transpose turns back.
static void rope(const Ref *m, float *x, int direction) {
    for (int64_t c = 0; c < (int64_t)m->rows * m->A; c += 2) {
        double angle = direction * (double)(c / m->A % m->T) * rope_velocity(&m->s, c % N / 2);
        double a = x[c], b = x[c + 1];
        x[c] = a * cos(angle) - b * sin(angle);
        x[c + 1] = a * sin(angle) + b * cos(angle);
    }
    store(x, (int64_t)m->rows * m->A);
}

// --------------------------------------------------------------------------------------------------------------------
// Time mixers and channel mixers. forward(m, l, out, x), backward(m, l, dx, dout, x); x, out (rows, C).
// P finds a tensor of this block, KEEP a new activation of this block, SAVED one that forward kept.

#define P(name) param(m, l, name)
#define KEEP(name, width) keep(m, l, name, (int64_t)m->rows *(width))
#define SAVED(name) saved(m, l, name)
#define TEMPORARY(width) temporary(m, (int64_t)m->rows *(width))

// x060c2, Finch-C2:
//     diff = shift(x) - x
//     m_i  = (tanh((x + diff time_maa_x) @ time_maa_w1))_i @ time_maa_w2[i]        i = r, k, v, w, v2
//     x_i  = x + diff (time_maa_i + m_i)
//     r    = receptance x_r;  k = key x_k;  v = value x_v
//     v2   = value x_v2 + tanh(x_v2 @ time_value2_w1) @ time_value2_w2
//     w    = time_decay + tanh(x_w @ time_decay_w1) @ time_decay_w2
//     k    = k (1 - exp(-exp(w)))           if use_one_minus_w
//     y    = WKV(r, k, v, w, u) + v2        u = 0 with use_v2; without it u = time_faaaa, and no v2
//     out  = output LayerNorm_ln_x(y)
static const char *const finch_c2_mixes[5] = {
    "att.time_maa_r", "att.time_maa_k", "att.time_maa_v", "att.time_maa_w", "att.time_maa_v2",
};

static void tmix_finch_c2(Ref *m, int l, float *out, const float *x) {
    int rows = m->rows, C = m->C, A = m->A;
    float *diff = KEEP("att.diff", C), *xx = KEEP("att.xx", C), *h = KEEP("att.h", 160);
    float *mi = KEEP("att.m", 5 * C), *xi = KEEP("att.x", 5 * C); // (5, rows, C)
    shift_difference(diff, x, m->B, m->T, C);
    lerp(xx, x, diff, P("att.time_maa_x"), NULL, rows);
    low_rank(mi, h, xx, P("att.time_maa_w1"), P("att.time_maa_w2"), rows);
    for (int i = 0; i < 5; i++)
        lerp(xi + (int64_t)i * rows * C, x, diff, P(finch_c2_mixes[i]), mi + (int64_t)i * rows * C, rows);
    float *xr = xi, *xk = xr + rows * C, *xv = xk + rows * C, *xw = xv + rows * C, *xv2 = xw + rows * C;

    float *r = KEEP("att.r", A), *k = KEEP("att.k", A), *v = KEEP("att.v", A), *w = KEEP("att.w", A);
    linear(r, xr, P("att.receptance.weight"), rows);
    linear(k, xk, P("att.key.weight"), rows);
    linear(v, xv, P("att.value.weight"), rows);
    const float *time_decay = P("att.time_decay")->w;
    for (int64_t i = 0; i < (int64_t)rows * A; i++) w[i] = time_decay[i % A];
    low_rank(w, KEEP("att.h_w", 64), xw, P("att.time_decay_w1"), P("att.time_decay_w2"), rows);

    float *kw = KEEP("att.kw", A), *y = KEEP("att.y", A);
    for (int64_t i = 0; i < (int64_t)rows * A; i++) kw[i] = m->s.use_one_minus_w ? k[i] * -expm1(-exp(w[i])) : k[i];
    wkv(y, r, kw, v, w, m->s.use_v2 ? NULL : P("att.time_faaaa")->w, m->B, m->T, m->H);
    if (m->s.use_v2) {
        linear(y, xv2, P("att.value.weight"), rows);
        low_rank(y, KEEP("att.h_v2", 64), xv2, P("att.time_value2_w1"), P("att.time_value2_w2"), rows);
    }
    float *normed = KEEP("att.normed", A);
    layer_norm(normed, y, P("att.ln_x.weight"), P("att.ln_x.bias"), rows);
    linear(out, normed, P("att.output.weight"), rows);
}

static void tmix_finch_c2_backward(Ref *m, int l, float *dx, const float *dout, const float *x) {
    int rows = m->rows, C = m->C, A = m->A;
    const float *diff = SAVED("att.diff"), *mi = SAVED("att.m"), *w = SAVED("att.w"), *k = SAVED("att.k");
    const float *xr = SAVED("att.x"), *xk = xr + rows * C, *xv = xk + rows * C, *xw = xv + rows * C;
    const float *xv2 = xw + rows * C;
    float *dxi = TEMPORARY(5 * C), *dmi = TEMPORARY(5 * C);
    float *dxr = dxi, *dxk = dxr + rows * C, *dxv = dxk + rows * C, *dxw = dxv + rows * C, *dxv2 = dxw + rows * C;

    float *dnormed = TEMPORARY(A), *dy = TEMPORARY(A);
    linear_backward(dnormed, dout, SAVED("att.normed"), P("att.output.weight"), rows);
    layer_norm_backward(dy, dnormed, SAVED("att.y"), P("att.ln_x.weight"), P("att.ln_x.bias"), rows);
    if (m->s.use_v2) {
        linear_backward(dxv2, dy, xv2, P("att.value.weight"), rows);
        low_rank_backward(dxv2, dy, SAVED("att.h_v2"), xv2, P("att.time_value2_w1"), P("att.time_value2_w2"), rows);
    }
    float *dr = TEMPORARY(A), *dk = TEMPORARY(A), *dv = TEMPORARY(A), *dw = TEMPORARY(A);
    Param *u = m->s.use_v2 ? NULL : P("att.time_faaaa");
    wkv_backward(dr, dk, dv, dw, u ? u->g : NULL, dy, SAVED("att.r"), SAVED("att.kw"), SAVED("att.v"), w,
                 u ? u->w : NULL, m->B, m->T, m->H);
    for (int64_t i = 0; i < (int64_t)rows * A && m->s.use_one_minus_w; i++) {
        dw[i] -= dk[i] * k[i] * decay_gradient(w[i]);
        dk[i] *= -expm1(-exp(w[i]));
    }
    for (int i = 0; i < A; i++) {
        double sum = 0;
        for (int t = 0; t < rows; t++) sum += dw[t * A + i];
        P("att.time_decay")->g[i] += sum;
    }
    low_rank_backward(dxw, dw, SAVED("att.h_w"), xw, P("att.time_decay_w1"), P("att.time_decay_w2"), rows);
    linear_backward(dxr, dr, xr, P("att.receptance.weight"), rows);
    linear_backward(dxk, dk, xk, P("att.key.weight"), rows);
    linear_backward(dxv, dv, xv, P("att.value.weight"), rows);

    float *ddiff = TEMPORARY(C), *dxx = TEMPORARY(C);
    for (int i = 0; i < 5; i++) {
        int64_t at = (int64_t)i * rows * C;
        lerp_backward(dx, ddiff, dmi + at, dxi + at, diff, P(finch_c2_mixes[i]), mi + at, rows);
    }
    low_rank_backward(dxx, dmi, SAVED("att.h"), SAVED("att.xx"), P("att.time_maa_w1"), P("att.time_maa_w2"), rows);
    lerp_backward(dx, ddiff, NULL, dxx, diff, P("att.time_maa_x"), NULL, rows);
    shift_difference_backward(dx, ddiff, m->B, m->T, C);
    (void)x;
}

// gold, the GOLD attention. It sees x, and of earlier layers only x0 (the normed embedding) and K0 (TokenCat below):
//     diff = shift(x) - x;  xo = rms_norm(x0);  diff_xo = shift(xo) - xo;  diff_K0 = shift(K0) - K0
//     m_q  = tanh((x + diff time_maa_x) @ time_maa_q_w1) @ time_maa_q_w2
//     q    = LayerNorm_ln_q(query (x + diff (time_maa_q + m_q)))
//     m_i  = (tanh((xo + diff_xo time_maa_v_cache) @ time_maa_kv_w1))_i @ time_maa_kv_w2[i]        i = k, v
//     k    = K0 + diff_K0 (time_maa_k + m_k)
//     v    = xo + diff_xo (time_maa_v + m_v)
//     k    = LayerNorm_ln_k(k + tanh(k @ time_key_w1) @ time_key_w2)
//     v    = LayerNorm_ln_v(v + tanh(v @ time_value_w1) @ time_value_w2)
//     out  = output LayerNorm_ln_x(attention(rope(q), rope(k), v))
// K0 (rows, A) meets tensors of width C here, so A = C.
static void tmix_gold(Ref *m, int l, float *out, const float *x) {
    int rows = m->rows, C = m->C, B = m->B, T = m->T;
    const float *x0 = saved(m, -1, "x0"), *K0 = saved(m, -1, "k_cache");
    float *diff = KEEP("att.diff", C), *xx = KEEP("att.xx", C), *h_q = KEEP("att.h_q", 32), *m_q = KEEP("att.m_q", C);
    float *xq = KEEP("att.xq", C), *q_linear = KEEP("att.q_linear", C), *q = KEEP("att.q", C);
    shift_difference(diff, x, B, T, C);
    lerp(xx, x, diff, P("att.time_maa_x"), NULL, rows);
    low_rank(m_q, h_q, xx, P("att.time_maa_q_w1"), P("att.time_maa_q_w2"), rows);
    lerp(xq, x, diff, P("att.time_maa_q"), m_q, rows);
    linear(q_linear, xq, P("att.query.weight"), rows);
    layer_norm(q, q_linear, P("att.ln_q.weight"), P("att.ln_q.bias"), rows);

    float *xo = KEEP("att.xo", C), *diff_xo = KEEP("att.diff_xo", C), *xxo = KEEP("att.xxo", C),
          *diff_K0 = KEEP("att.diff_K0", C);
    float *m_kv = KEEP("att.m_kv", 2 * C), *m_k = m_kv, *m_v = m_kv + rows * C;
    rms_norm(xo, x0, C, rows);
    shift_difference(diff_xo, xo, B, T, C);
    shift_difference(diff_K0, K0, B, T, C);
    lerp(xxo, xo, diff_xo, P("att.time_maa_v_cache"), NULL, rows);
    low_rank(m_kv, KEEP("att.h_kv", 64), xxo, P("att.time_maa_kv_w1"), P("att.time_maa_kv_w2"), rows);

    int rank = P("att.time_key_w1")->shape[1];
    float *k_mix = KEEP("att.k_mix", C), *k_sum = KEEP("att.k_sum", C), *k = KEEP("att.k", C);
    lerp(k_mix, K0, diff_K0, P("att.time_maa_k"), m_k, rows);
    memcpy(k_sum, k_mix, (size_t)rows * C * sizeof(float));
    low_rank(k_sum, KEEP("att.h_k", rank), k_mix, P("att.time_key_w1"), P("att.time_key_w2"), rows);
    layer_norm(k, k_sum, P("att.ln_k.weight"), P("att.ln_k.bias"), rows);

    float *v_mix = KEEP("att.v_mix", C), *v_sum = KEEP("att.v_sum", C), *v = KEEP("att.v", C);
    lerp(v_mix, xo, diff_xo, P("att.time_maa_v"), m_v, rows);
    memcpy(v_sum, v_mix, (size_t)rows * C * sizeof(float));
    low_rank(v_sum, KEEP("att.h_v", rank), v_mix, P("att.time_value_w1"), P("att.time_value_w2"), rows);
    layer_norm(v, v_sum, P("att.ln_v.weight"), P("att.ln_v.bias"), rows);

    float *y = KEEP("att.y", C), *normed = KEEP("att.normed", C);
    rope(m, q, 1);
    rope(m, k, 1);
    attention(y, q, k, v, B, T, m->H);
    layer_norm(normed, y, P("att.ln_x.weight"), P("att.ln_x.bias"), rows);
    linear(out, normed, P("att.output.weight"), rows);
}

static void tmix_gold_backward(Ref *m, int l, float *dx, const float *dout, const float *x) {
    int rows = m->rows, C = m->C, B = m->B, T = m->T;
    const float *x0 = saved(m, -1, "x0");
    const float *diff = SAVED("att.diff"), *diff_xo = SAVED("att.diff_xo"), *m_k = SAVED("att.m_kv"),
                *m_v = m_k + rows * C;

    float *dnormed = TEMPORARY(C), *dy = TEMPORARY(C), *dq = TEMPORARY(C), *dk = TEMPORARY(C), *dv = TEMPORARY(C);
    linear_backward(dnormed, dout, SAVED("att.normed"), P("att.output.weight"), rows);
    layer_norm_backward(dy, dnormed, SAVED("att.y"), P("att.ln_x.weight"), P("att.ln_x.bias"), rows);
    attention_backward(dq, dk, dv, dy, SAVED("att.q"), SAVED("att.k"), SAVED("att.v"), B, T, m->H);
    rope(m, dq, -1);
    rope(m, dk, -1);

    float *g_xo = TEMPORARY(C), *g_diff_xo = TEMPORARY(C),
          *g_diff_K0 = TEMPORARY(C); // gradients of xo, diff_xo, diff_K0
    float *dm_k = TEMPORARY(2 * C), *dm_v = dm_k + rows * C;
    float *dv_sum = TEMPORARY(C), *dv_mix = TEMPORARY(C);
    layer_norm_backward(dv_sum, dv, SAVED("att.v_sum"), P("att.ln_v.weight"), P("att.ln_v.bias"), rows);
    memcpy(dv_mix, dv_sum, (size_t)rows * C * sizeof(float));
    low_rank_backward(dv_mix, dv_sum, SAVED("att.h_v"), SAVED("att.v_mix"), P("att.time_value_w1"),
                      P("att.time_value_w2"), rows);
    lerp_backward(g_xo, g_diff_xo, dm_v, dv_mix, diff_xo, P("att.time_maa_v"), m_v, rows);

    float *dk_sum = TEMPORARY(C), *dk_mix = TEMPORARY(C);
    layer_norm_backward(dk_sum, dk, SAVED("att.k_sum"), P("att.ln_k.weight"), P("att.ln_k.bias"), rows);
    memcpy(dk_mix, dk_sum, (size_t)rows * C * sizeof(float));
    low_rank_backward(dk_mix, dk_sum, SAVED("att.h_k"), SAVED("att.k_mix"), P("att.time_key_w1"), P("att.time_key_w2"),
                      rows);
    lerp_backward(m->dK0, g_diff_K0, dm_k, dk_mix, SAVED("att.diff_K0"), P("att.time_maa_k"), m_k, rows);
    shift_difference_backward(m->dK0, g_diff_K0, B, T, C);

    float *dxxo = TEMPORARY(C);
    low_rank_backward(dxxo, dm_k, SAVED("att.h_kv"), SAVED("att.xxo"), P("att.time_maa_kv_w1"), P("att.time_maa_kv_w2"),
                      rows);
    lerp_backward(g_xo, g_diff_xo, NULL, dxxo, diff_xo, P("att.time_maa_v_cache"), NULL, rows);
    shift_difference_backward(g_xo, g_diff_xo, B, T, C);
    rms_norm_backward(m->dx0, g_xo, x0, C, rows);

    float *dq_linear = TEMPORARY(C), *dxq = TEMPORARY(C), *dm_q = TEMPORARY(C), *ddiff = TEMPORARY(C),
          *dxx = TEMPORARY(C);
    layer_norm_backward(dq_linear, dq, SAVED("att.q_linear"), P("att.ln_q.weight"), P("att.ln_q.bias"), rows);
    linear_backward(dxq, dq_linear, SAVED("att.xq"), P("att.query.weight"), rows);
    lerp_backward(dx, ddiff, dm_q, dxq, diff, P("att.time_maa_q"), SAVED("att.m_q"), rows);
    low_rank_backward(dxx, dm_q, SAVED("att.h_q"), SAVED("att.xx"), P("att.time_maa_q_w1"), P("att.time_maa_q_w2"),
                      rows);
    lerp_backward(dx, ddiff, NULL, dxx, diff, P("att.time_maa_x"), NULL, rows);
    shift_difference_backward(dx, ddiff, B, T, C);
    (void)x;
}

// x060, the channel mix:
//     x_i = x + (shift(x) - x) time_maa_i                    i = k, r
//     k   = relu(key x_k)²
//     out = sigmoid(receptance x_r) (value k)
static void cmix(Ref *m, int l, float *out, const float *x) {
    int rows = m->rows, C = m->C, F = m->F;
    float *diff = KEEP("ffn.diff", C), *xk = KEEP("ffn.xk", C), *xr = KEEP("ffn.xr", C);
    float *k = KEEP("ffn.k", F), *kk = KEEP("ffn.kk", F), *v = KEEP("ffn.v", C), *r = KEEP("ffn.r", C);
    shift_difference(diff, x, m->B, m->T, C);
    lerp(xk, x, diff, P("ffn.time_maa_k"), NULL, rows);
    lerp(xr, x, diff, P("ffn.time_maa_r"), NULL, rows);
    linear(k, xk, P("ffn.key.weight"), rows);
    for (int64_t i = 0; i < (int64_t)rows * F; i++) kk[i] = k[i] > 0 ? k[i] * k[i] : 0;
    store(kk, (int64_t)rows * F);
    linear(v, kk, P("ffn.value.weight"), rows);
    linear(r, xr, P("ffn.receptance.weight"), rows);
    for (int64_t i = 0; i < (int64_t)rows * C; i++) {
        r[i] = 1 / (1 + exp(-r[i]));
        out[i] += r[i] * v[i];
    }
    store(out, (int64_t)rows * C);
}

static void cmix_backward(Ref *m, int l, float *dx, const float *dout, const float *x) {
    int rows = m->rows, C = m->C, F = m->F;
    const float *r = SAVED("ffn.r"), *v = SAVED("ffn.v"), *k = SAVED("ffn.k"), *diff = SAVED("ffn.diff");
    float *dr = TEMPORARY(C), *dv = TEMPORARY(C), *dk = TEMPORARY(F), *dxk = TEMPORARY(C), *dxr = TEMPORARY(C);
    float *ddiff = TEMPORARY(C);
    for (int64_t i = 0; i < (int64_t)rows * C; i++) {
        dr[i] = dout[i] * v[i] * r[i] * (1 - r[i]);
        dv[i] = dout[i] * r[i];
    }
    store(dr, (int64_t)rows * C), store(dv, (int64_t)rows * C);
    linear_backward(dxr, dr, SAVED("ffn.xr"), P("ffn.receptance.weight"), rows);
    linear_backward(dk, dv, SAVED("ffn.kk"), P("ffn.value.weight"), rows);
    for (int64_t i = 0; i < (int64_t)rows * F; i++) dk[i] *= k[i] > 0 ? 2 * k[i] : 0;
    store(dk, (int64_t)rows * F);
    linear_backward(dxk, dk, SAVED("ffn.xk"), P("ffn.key.weight"), rows);
    lerp_backward(dx, ddiff, NULL, dxk, diff, P("ffn.time_maa_k"), NULL, rows);
    lerp_backward(dx, ddiff, NULL, dxr, diff, P("ffn.time_maa_r"), NULL, rows);
    shift_difference_backward(dx, ddiff, m->B, m->T, C);
    (void)x;
}

// What x060, x060b and gptalpha share, for n inputs whose mixes are `names`:
//     diff = shift(x) - x
//     m_i = (tanh((x + diff time_maa_x) @ W1))_i @ W2[i]
//     x_i = x + diff (time_maa_i + m_i)
// Keeps x_i as "att.x" (n, rows, C).
static float *mixed_inputs(Ref *m, int l, const float *x, const char *const *names, int n, const Param *W1,
                           const Param *W2) {
    int rows = m->rows, C = m->C;
    float *diff = KEEP("att.diff", C), *xx = KEEP("att.xx", C), *h = KEEP("att.h", 32 * n);
    float *mi = KEEP("att.m", n * C), *xi = KEEP("att.x", n * C);
    shift_difference(diff, x, m->B, m->T, C);
    lerp(xx, x, diff, P("att.time_maa_x"), NULL, rows);
    low_rank(mi, h, xx, W1, W2, rows);
    for (int i = 0; i < n; i++)
        lerp(xi + (int64_t)i * rows * C, x, diff, P(names[i]), mi + (int64_t)i * rows * C, rows);
    return xi;
}

static void mixed_inputs_backward(Ref *m, int l, float *dx, const float *dxi, const char *const *names, int n,
                                  const Param *W1, const Param *W2) {
    int rows = m->rows, C = m->C;
    const float *diff = SAVED("att.diff"), *mi = SAVED("att.m");
    float *dmi = TEMPORARY(n * C), *ddiff = TEMPORARY(C), *dxx = TEMPORARY(C);
    for (int i = 0; i < n; i++) {
        int64_t at = (int64_t)i * rows * C;
        lerp_backward(dx, ddiff, dmi + at, dxi + at, diff, P(names[i]), mi + at, rows);
    }
    low_rank_backward(dxx, dmi, SAVED("att.h"), SAVED("att.xx"), W1, W2, rows);
    lerp_backward(dx, ddiff, NULL, dxx, diff, P("att.time_maa_x"), NULL, rows);
    shift_difference_backward(dx, ddiff, m->B, m->T, C);
}

// w = time_decay + tanh(x_w @ time_decay_w1) @ time_decay_w2
static float *data_decay(Ref *m, int l, const float *xw) {
    float *w = KEEP("att.w", m->A);
    const float *time_decay = P("att.time_decay")->w;
    for (int64_t i = 0; i < (int64_t)m->rows * m->A; i++) w[i] = time_decay[i % m->A];
    low_rank(w, KEEP("att.h_w", 64), xw, P("att.time_decay_w1"), P("att.time_decay_w2"), m->rows);
    return w;
}

static void add_rows(Param *p, const float *dx, int rows) { // the gradient of a vector that every row adds
    for (int64_t i = 0; i < p->size; i++) {
        double sum = 0;
        for (int t = 0; t < rows; t++) sum += dx[t * p->size + i];
        p->g[i] += sum;
    }
}

static double silu(double x) { return x / (1 + exp(-x)); }

static double silu_gradient(double x) {
    double s = 1 / (1 + exp(-x));
    return s + x * s * (1 - s);
}

static void head_moments(const float *y, double scale, double eps, double *mean, double *rstd) {
    double variance = 0;
    *mean = 0;
    for (int i = 0; i < N; i++) *mean += y[i] / scale / N;
    for (int i = 0; i < N; i++) variance += (y[i] / scale - *mean) * (y[i] / scale - *mean) / N;
    *rstd = 1 / sqrt(variance + eps);
}

// out = GroupNorm(y / scale) silu(g): each head of N channels is normed by itself. y, g (rows, A)
static void gated_group_norm(float *out, const float *y, const float *g, const Param *gain, const Param *bias,
                             double scale, double eps, int rows) {
    for (int64_t at = 0; at < rows * gain->size; at += N) {
        double mean, rstd;
        head_moments(y + at, scale, eps, &mean, &rstd);
        for (int64_t i = at; i < at + N; i++) {
            int c = i % gain->size;
            out[i] += ((y[i] / scale - mean) * rstd * gain->w[c] + bias->w[c]) * silu(g[i]);
        }
        store(out + at, N);
    }
}

static void gated_group_norm_backward(float *dy, float *dg, const float *dout, const float *y, const float *g,
                                      const Param *gain, const Param *bias, double scale, double eps, int rows) {
    double *dgain = zeros(gain->size, sizeof(double)), *dbias = zeros(gain->size, sizeof(double));
    for (int64_t at = 0; at < rows * gain->size; at += N) {
        double mean, rstd, n[N], dn[N], mean_dn = 0, mean_dn_n = 0;
        head_moments(y + at, scale, eps, &mean, &rstd);
        for (int i = 0; i < N; i++) {
            int c = (at + i) % gain->size;
            double dnormed = dout[at + i] * silu(g[at + i]);
            n[i] = (y[at + i] / scale - mean) * rstd;
            dn[i] = dnormed * gain->w[c];
            mean_dn += dn[i] / N;
            mean_dn_n += dn[i] * n[i] / N;
            dgain[c] += dnormed * n[i];
            dbias[c] += dnormed;
            dg[at + i] += dout[at + i] * (n[i] * gain->w[c] + bias->w[c]) * silu_gradient(g[at + i]);
        }
        for (int i = 0; i < N; i++) dy[at + i] += (dn[i] - mean_dn - n[i] * mean_dn_n) * rstd / scale;
        store(dy + at, N), store(dg + at, N);
    }
    for (int64_t c = 0; c < gain->size; c++) {
        gain->g[c] += dgain[c];
        bias->g[c] += dbias[c];
    }
    free(dgain);
    free(dbias);
}

// x060, Finch (RWKV-6), with the mixes w, k, v, r, g:
//     r   = receptance x_r;  k = key x_k;  v = value x_v;  g = gate x_g;  w = data_decay(x_w)
//     y   = WKV(r, k, v, w, time_faaaa)
//     out = output (GroupNorm_ln_x(y) silu(g))                  eps 1e-5 head_size_divisor²
static const char *const finch_mixes[5] = {
    "att.time_maa_w", "att.time_maa_k", "att.time_maa_v", "att.time_maa_r", "att.time_maa_g",
};

static void tmix_finch(Ref *m, int l, float *out, const float *x) {
    int rows = m->rows, C = m->C, A = m->A;
    double divisor = m->s.head_size_divisor;
    float *xw = mixed_inputs(m, l, x, finch_mixes, 5, P("att.time_maa_w1"), P("att.time_maa_w2"));
    float *xk = xw + rows * C, *xv = xk + rows * C, *xr = xv + rows * C, *xg = xr + rows * C;
    float *r = KEEP("att.r", A), *k = KEEP("att.k", A), *v = KEEP("att.v", A), *g = KEEP("att.g", A);
    float *y = KEEP("att.y", A), *gated = KEEP("att.gated", A), *w = data_decay(m, l, xw);
    linear(r, xr, P("att.receptance.weight"), rows);
    linear(k, xk, P("att.key.weight"), rows);
    linear(v, xv, P("att.value.weight"), rows);
    linear(g, xg, P("att.gate.weight"), rows);
    wkv(y, r, k, v, w, P("att.time_faaaa")->w, m->B, m->T, m->H);
    gated_group_norm(gated, y, g, P("att.ln_x.weight"), P("att.ln_x.bias"), 1, 1e-5 * divisor * divisor, rows);
    linear(out, gated, P("att.output.weight"), rows);
}

static void tmix_finch_backward(Ref *m, int l, float *dx, const float *dout, const float *x) {
    int rows = m->rows, C = m->C, A = m->A;
    double divisor = m->s.head_size_divisor;
    const float *xw = SAVED("att.x"), *xk = xw + rows * C, *xv = xk + rows * C, *xr = xv + rows * C,
                *xg = xr + rows * C;
    float *dxw = TEMPORARY(5 * C), *dxk = dxw + rows * C, *dxv = dxk + rows * C, *dxr = dxv + rows * C,
          *dxg = dxr + rows * C;
    float *dgated = TEMPORARY(A), *dy = TEMPORARY(A), *dg = TEMPORARY(A);
    float *dr = TEMPORARY(A), *dk = TEMPORARY(A), *dv = TEMPORARY(A), *dw = TEMPORARY(A);
    Param *u = P("att.time_faaaa");
    linear_backward(dgated, dout, SAVED("att.gated"), P("att.output.weight"), rows);
    gated_group_norm_backward(dy, dg, dgated, SAVED("att.y"), SAVED("att.g"), P("att.ln_x.weight"), P("att.ln_x.bias"),
                              1, 1e-5 * divisor * divisor, rows);
    wkv_backward(dr, dk, dv, dw, u->g, dy, SAVED("att.r"), SAVED("att.k"), SAVED("att.v"), SAVED("att.w"), u->w, m->B,
                 m->T, m->H);
    add_rows(P("att.time_decay"), dw, rows);
    low_rank_backward(dxw, dw, SAVED("att.h_w"), xw, P("att.time_decay_w1"), P("att.time_decay_w2"), rows);
    linear_backward(dxr, dr, xr, P("att.receptance.weight"), rows);
    linear_backward(dxk, dk, xk, P("att.key.weight"), rows);
    linear_backward(dxv, dv, xv, P("att.value.weight"), rows);
    linear_backward(dxg, dg, xg, P("att.gate.weight"), rows);
    mixed_inputs_backward(m, l, dx, dxw, finch_mixes, 5, P("att.time_maa_w1"), P("att.time_maa_w2"));
    (void)x;
}

// x060b, Finch without a gate, with the mixes r, k, v, w:
//     as x060, and out = output LayerNorm_ln_x(y)
static const char *const finch_b_mixes[4] = {"att.time_maa_r", "att.time_maa_k", "att.time_maa_v", "att.time_maa_w"};

static void tmix_finch_b(Ref *m, int l, float *out, const float *x) {
    int rows = m->rows, C = m->C, A = m->A;
    float *xr = mixed_inputs(m, l, x, finch_b_mixes, 4, P("att.time_maa_rkvw_w1"), P("att.time_maa_rkvw_w2"));
    float *xk = xr + rows * C, *xv = xk + rows * C, *xw = xv + rows * C;
    float *r = KEEP("att.r", A), *k = KEEP("att.k", A), *v = KEEP("att.v", A);
    float *y = KEEP("att.y", A), *normed = KEEP("att.normed", A), *w = data_decay(m, l, xw);
    linear(r, xr, P("att.receptance.weight"), rows);
    linear(k, xk, P("att.key.weight"), rows);
    linear(v, xv, P("att.value.weight"), rows);
    wkv(y, r, k, v, w, P("att.time_faaaa")->w, m->B, m->T, m->H);
    layer_norm(normed, y, P("att.ln_x.weight"), P("att.ln_x.bias"), rows);
    linear(out, normed, P("att.output.weight"), rows);
}

static void tmix_finch_b_backward(Ref *m, int l, float *dx, const float *dout, const float *x) {
    int rows = m->rows, C = m->C, A = m->A;
    const float *xr = SAVED("att.x"), *xk = xr + rows * C, *xv = xk + rows * C, *xw = xv + rows * C;
    float *dxr = TEMPORARY(4 * C), *dxk = dxr + rows * C, *dxv = dxk + rows * C, *dxw = dxv + rows * C;
    float *dnormed = TEMPORARY(A), *dy = TEMPORARY(A);
    float *dr = TEMPORARY(A), *dk = TEMPORARY(A), *dv = TEMPORARY(A), *dw = TEMPORARY(A);
    Param *u = P("att.time_faaaa");
    linear_backward(dnormed, dout, SAVED("att.normed"), P("att.output.weight"), rows);
    layer_norm_backward(dy, dnormed, SAVED("att.y"), P("att.ln_x.weight"), P("att.ln_x.bias"), rows);
    wkv_backward(dr, dk, dv, dw, u->g, dy, SAVED("att.r"), SAVED("att.k"), SAVED("att.v"), SAVED("att.w"), u->w, m->B,
                 m->T, m->H);
    add_rows(P("att.time_decay"), dw, rows);
    low_rank_backward(dxw, dw, SAVED("att.h_w"), xw, P("att.time_decay_w1"), P("att.time_decay_w2"), rows);
    linear_backward(dxr, dr, xr, P("att.receptance.weight"), rows);
    linear_backward(dxk, dk, xk, P("att.key.weight"), rows);
    linear_backward(dxv, dv, xv, P("att.value.weight"), rows);
    mixed_inputs_backward(m, l, dx, dxr, finch_b_mixes, 4, P("att.time_maa_rkvw_w1"), P("att.time_maa_rkvw_w2"));
    (void)x;
}

// y = x time_mix + shift(x) (1 - time_mix), Eagle's mix, which does not depend on the data. x, y (B, T, C)
static void eagle_lerp(float *y, const float *x, const Param *time_mix, int T, int rows) {
    int C = time_mix->size;
    for (int64_t i = 0; i < (int64_t)rows * C; i++) {
        double a = time_mix->w[i % C], before = i / C % T ? x[i - C] : 0;
        y[i] += x[i] * a + before * (1 - a);
    }
    store(y, (int64_t)rows * C);
}

static void eagle_lerp_backward(float *dx, const float *dy, const float *x, const Param *time_mix, int T, int rows) {
    int C = time_mix->size;
    for (int c = 0; c < C; c++) {
        double a = time_mix->w[c], sum = 0;
        for (int64_t i = c; i < (int64_t)rows * C; i += C) {
            int first = i / C % T == 0;
            sum += dy[i] * ((double)x[i] - (first ? 0 : x[i - C]));
            dx[i] += dy[i] * a;
            if (!first) dx[i - C] += dy[i] * (1 - a);
        }
        time_mix->g[c] += sum;
    }
}

// x052, Eagle (RWKV-5):
//     x_i = x time_mix_i + shift(x) (1 - time_mix_i)            i = k, v, r, g
//     r   = receptance x_r;  k = key x_k;  v = value x_v;  g = gate x_g
//     y   = WKV(r, k, v, w, time_faaaa)                         w = time_decay for every token
//     out = output (GroupNorm_ln_x(y / head_size_divisor) silu(g))
static void tmix_eagle(Ref *m, int l, float *out, const float *x) {
    int rows = m->rows, C = m->C, A = m->A;
    float *xk = KEEP("att.xk", C), *xv = KEEP("att.xv", C), *xr = KEEP("att.xr", C), *xg = KEEP("att.xg", C);
    float *r = KEEP("att.r", A), *k = KEEP("att.k", A), *v = KEEP("att.v", A), *g = KEEP("att.g", A),
          *w = KEEP("att.w", A);
    float *y = KEEP("att.y", A), *gated = KEEP("att.gated", A);
    eagle_lerp(xk, x, P("att.time_mix_k"), m->T, rows);
    eagle_lerp(xv, x, P("att.time_mix_v"), m->T, rows);
    eagle_lerp(xr, x, P("att.time_mix_r"), m->T, rows);
    eagle_lerp(xg, x, P("att.time_mix_g"), m->T, rows);
    linear(r, xr, P("att.receptance.weight"), rows);
    linear(k, xk, P("att.key.weight"), rows);
    linear(v, xv, P("att.value.weight"), rows);
    linear(g, xg, P("att.gate.weight"), rows);
    for (int64_t i = 0; i < (int64_t)rows * A; i++) w[i] = P("att.time_decay")->w[i % A];
    wkv(y, r, k, v, w, P("att.time_faaaa")->w, m->B, m->T, m->H);
    gated_group_norm(gated, y, g, P("att.ln_x.weight"), P("att.ln_x.bias"), m->s.head_size_divisor, 1e-5, rows);
    linear(out, gated, P("att.output.weight"), rows);
}

static void tmix_eagle_backward(Ref *m, int l, float *dx, const float *dout, const float *x) {
    int rows = m->rows, C = m->C, A = m->A;
    float *dxk = TEMPORARY(C), *dxv = TEMPORARY(C), *dxr = TEMPORARY(C), *dxg = TEMPORARY(C);
    float *dgated = TEMPORARY(A), *dy = TEMPORARY(A), *dg = TEMPORARY(A);
    float *dr = TEMPORARY(A), *dk = TEMPORARY(A), *dv = TEMPORARY(A), *dw = TEMPORARY(A);
    Param *u = P("att.time_faaaa");
    linear_backward(dgated, dout, SAVED("att.gated"), P("att.output.weight"), rows);
    gated_group_norm_backward(dy, dg, dgated, SAVED("att.y"), SAVED("att.g"), P("att.ln_x.weight"), P("att.ln_x.bias"),
                              m->s.head_size_divisor, 1e-5, rows);
    wkv_backward(dr, dk, dv, dw, u->g, dy, SAVED("att.r"), SAVED("att.k"), SAVED("att.v"), SAVED("att.w"), u->w, m->B,
                 m->T, m->H);
    add_rows(P("att.time_decay"), dw, rows);
    linear_backward(dxk, dk, SAVED("att.xk"), P("att.key.weight"), rows);
    linear_backward(dxv, dv, SAVED("att.xv"), P("att.value.weight"), rows);
    linear_backward(dxr, dr, SAVED("att.xr"), P("att.receptance.weight"), rows);
    linear_backward(dxg, dg, SAVED("att.xg"), P("att.gate.weight"), rows);
    eagle_lerp_backward(dx, dxk, x, P("att.time_mix_k"), m->T, rows);
    eagle_lerp_backward(dx, dxv, x, P("att.time_mix_v"), m->T, rows);
    eagle_lerp_backward(dx, dxr, x, P("att.time_mix_r"), m->T, rows);
    eagle_lerp_backward(dx, dxg, x, P("att.time_mix_g"), m->T, rows);
}

// gptalpha, with the mixes r, k, v:
//     q   = LayerNorm_ln_r(query x_r);  k = LayerNorm_ln_k(key x_k);  v = LayerNorm_ln_v(value x_v)
//     out = output LayerNorm_ln_x(attention(rope(q), rope(k), v))
static const char *const gptalpha_mixes[3] = {"att.time_maa_r", "att.time_maa_k", "att.time_maa_v"};

static void tmix_gptalpha(Ref *m, int l, float *out, const float *x) {
    int rows = m->rows, C = m->C, A = m->A;
    float *xr = mixed_inputs(m, l, x, gptalpha_mixes, 3, P("att.time_maa_w1"), P("att.time_maa_w2"));
    float *xk = xr + rows * C, *xv = xk + rows * C;
    float *q_linear = KEEP("att.q_linear", A), *k_linear = KEEP("att.k_linear", A), *v_linear = KEEP("att.v_linear", A);
    float *q = KEEP("att.q", A), *k = KEEP("att.k", A), *v = KEEP("att.v", A);
    float *y = KEEP("att.y", A), *normed = KEEP("att.normed", A);
    linear(q_linear, xr, P("att.query.weight"), rows);
    linear(k_linear, xk, P("att.key.weight"), rows);
    linear(v_linear, xv, P("att.value.weight"), rows);
    layer_norm(q, q_linear, P("att.ln_r.weight"), P("att.ln_r.bias"), rows);
    layer_norm(k, k_linear, P("att.ln_k.weight"), P("att.ln_k.bias"), rows);
    layer_norm(v, v_linear, P("att.ln_v.weight"), P("att.ln_v.bias"), rows);
    rope(m, q, 1);
    rope(m, k, 1);
    attention(y, q, k, v, m->B, m->T, m->H);
    layer_norm(normed, y, P("att.ln_x.weight"), P("att.ln_x.bias"), rows);
    linear(out, normed, P("att.output.weight"), rows);
}

static void tmix_gptalpha_backward(Ref *m, int l, float *dx, const float *dout, const float *x) {
    int rows = m->rows, C = m->C, A = m->A;
    const float *xr = SAVED("att.x"), *xk = xr + rows * C, *xv = xk + rows * C;
    float *dxr = TEMPORARY(3 * C), *dxk = dxr + rows * C, *dxv = dxk + rows * C;
    float *dnormed = TEMPORARY(A), *dy = TEMPORARY(A), *dq = TEMPORARY(A), *dk = TEMPORARY(A), *dv = TEMPORARY(A);
    float *dq_linear = TEMPORARY(A), *dk_linear = TEMPORARY(A), *dv_linear = TEMPORARY(A);
    linear_backward(dnormed, dout, SAVED("att.normed"), P("att.output.weight"), rows);
    layer_norm_backward(dy, dnormed, SAVED("att.y"), P("att.ln_x.weight"), P("att.ln_x.bias"), rows);
    attention_backward(dq, dk, dv, dy, SAVED("att.q"), SAVED("att.k"), SAVED("att.v"), m->B, m->T, m->H);
    rope(m, dq, -1);
    rope(m, dk, -1);
    layer_norm_backward(dq_linear, dq, SAVED("att.q_linear"), P("att.ln_r.weight"), P("att.ln_r.bias"), rows);
    layer_norm_backward(dk_linear, dk, SAVED("att.k_linear"), P("att.ln_k.weight"), P("att.ln_k.bias"), rows);
    layer_norm_backward(dv_linear, dv, SAVED("att.v_linear"), P("att.ln_v.weight"), P("att.ln_v.bias"), rows);
    linear_backward(dxr, dq_linear, xr, P("att.query.weight"), rows);
    linear_backward(dxk, dk_linear, xk, P("att.key.weight"), rows);
    linear_backward(dxv, dv_linear, xv, P("att.value.weight"), rows);
    mixed_inputs_backward(m, l, dx, dxr, gptalpha_mixes, 3, P("att.time_maa_w1"), P("att.time_maa_w2"));
    (void)x;
}

// llama's attention: out = wo attention(rope(wq x), rope(wk x), wv x)
static void tmix_llama(Ref *m, int l, float *out, const float *x) {
    int rows = m->rows, A = m->A;
    float *q = KEEP("att.q", A), *k = KEEP("att.k", A), *v = KEEP("att.v", A), *y = KEEP("att.y", A);
    linear(q, x, P("att.wq.weight"), rows);
    linear(k, x, P("att.wk.weight"), rows);
    linear(v, x, P("att.wv.weight"), rows);
    rope(m, q, 1);
    rope(m, k, 1);
    attention(y, q, k, v, m->B, m->T, m->H);
    linear(out, y, P("att.wo.weight"), rows);
}

static void tmix_llama_backward(Ref *m, int l, float *dx, const float *dout, const float *x) {
    int rows = m->rows, A = m->A;
    float *dy = TEMPORARY(A), *dq = TEMPORARY(A), *dk = TEMPORARY(A), *dv = TEMPORARY(A);
    linear_backward(dy, dout, SAVED("att.y"), P("att.wo.weight"), rows);
    attention_backward(dq, dk, dv, dy, SAVED("att.q"), SAVED("att.k"), SAVED("att.v"), m->B, m->T, m->H);
    rope(m, dq, -1);
    rope(m, dk, -1);
    linear_backward(dx, dq, x, P("att.wq.weight"), rows);
    linear_backward(dx, dk, x, P("att.wk.weight"), rows);
    linear_backward(dx, dv, x, P("att.wv.weight"), rows);
}

// x052, Eagle's channel mix: as x060 with x_i = x time_mix_i + shift(x) (1 - time_mix_i)
static void cmix_eagle(Ref *m, int l, float *out, const float *x) {
    int rows = m->rows, C = m->C, F = m->F;
    float *xk = KEEP("ffn.xk", C), *xr = KEEP("ffn.xr", C), *k = KEEP("ffn.k", F), *kk = KEEP("ffn.kk", F);
    float *v = KEEP("ffn.v", C), *r = KEEP("ffn.r", C);
    eagle_lerp(xk, x, P("ffn.time_mix_k"), m->T, rows);
    eagle_lerp(xr, x, P("ffn.time_mix_r"), m->T, rows);
    linear(k, xk, P("ffn.key.weight"), rows);
    for (int64_t i = 0; i < (int64_t)rows * F; i++) kk[i] = k[i] > 0 ? k[i] * k[i] : 0;
    store(kk, (int64_t)rows * F);
    linear(v, kk, P("ffn.value.weight"), rows);
    linear(r, xr, P("ffn.receptance.weight"), rows);
    for (int64_t i = 0; i < (int64_t)rows * C; i++) out[i] += v[i] / (1 + exp(-r[i]));
    store(out, (int64_t)rows * C);
}

static void cmix_eagle_backward(Ref *m, int l, float *dx, const float *dout, const float *x) {
    int rows = m->rows, C = m->C, F = m->F;
    const float *r = SAVED("ffn.r"), *v = SAVED("ffn.v"), *k = SAVED("ffn.k");
    float *dr = TEMPORARY(C), *dv = TEMPORARY(C), *dk = TEMPORARY(F), *dxk = TEMPORARY(C), *dxr = TEMPORARY(C);
    for (int64_t i = 0; i < (int64_t)rows * C; i++) {
        double s = 1 / (1 + exp(-r[i]));
        dr[i] = dout[i] * v[i] * s * (1 - s);
        dv[i] = dout[i] * s;
    }
    store(dr, (int64_t)rows * C), store(dv, (int64_t)rows * C);
    linear_backward(dxr, dr, SAVED("ffn.xr"), P("ffn.receptance.weight"), rows);
    linear_backward(dk, dv, SAVED("ffn.kk"), P("ffn.value.weight"), rows);
    for (int64_t i = 0; i < (int64_t)rows * F; i++) dk[i] *= k[i] > 0 ? 2 * k[i] : 0;
    store(dk, (int64_t)rows * F);
    linear_backward(dxk, dk, SAVED("ffn.xk"), P("ffn.key.weight"), rows);
    eagle_lerp_backward(dx, dxk, x, P("ffn.time_mix_k"), m->T, rows);
    eagle_lerp_backward(dx, dxr, x, P("ffn.time_mix_r"), m->T, rows);
}

// llama's channel mix: out = w2 (silu(w1 x) (w3 x))
static void cmix_llama(Ref *m, int l, float *out, const float *x) {
    int rows = m->rows, W = llama_width(m);
    float *a = KEEP("ffn.a", W), *b = KEEP("ffn.b", W), *k = KEEP("ffn.k", W);
    linear(a, x, P("ffn.w1.weight"), rows);
    linear(b, x, P("ffn.w3.weight"), rows);
    for (int64_t i = 0; i < (int64_t)rows * W; i++) k[i] = silu(a[i]) * b[i];
    store(k, (int64_t)rows * W);
    linear(out, k, P("ffn.w2.weight"), rows);
}

static void cmix_llama_backward(Ref *m, int l, float *dx, const float *dout, const float *x) {
    int rows = m->rows, W = llama_width(m);
    const float *a = SAVED("ffn.a"), *b = SAVED("ffn.b");
    float *dk = TEMPORARY(W), *da = TEMPORARY(W), *db = TEMPORARY(W);
    linear_backward(dk, dout, SAVED("ffn.k"), P("ffn.w2.weight"), rows);
    for (int64_t i = 0; i < (int64_t)rows * W; i++) {
        da[i] = dk[i] * b[i] * silu_gradient(a[i]);
        db[i] = dk[i] * silu(a[i]);
    }
    store(da, (int64_t)rows * W), store(db, (int64_t)rows * W);
    linear_backward(dx, da, x, P("ffn.w1.weight"), rows);
    linear_backward(dx, db, x, P("ffn.w3.weight"), rows);
}

typedef struct Mixer {
    const char *name;
    const Row *tensors;
    void (*forward)(Ref *m, int l, float *out, const float *x);
    void (*backward)(Ref *m, int l, float *dx, const float *dout, const float *x);
} Mixer;

static const Mixer time_mixers[] = {{"x060c2", finch_c2_tensors, tmix_finch_c2, tmix_finch_c2_backward},
                                    {"gold", gold_tensors, tmix_gold, tmix_gold_backward},
                                    {"x060", finch_tensors, tmix_finch, tmix_finch_backward},
                                    {"x060b", finch_b_tensors, tmix_finch_b, tmix_finch_b_backward},
                                    {"x052", eagle_tensors, tmix_eagle, tmix_eagle_backward},
                                    {"gptalpha", gptalpha_tensors, tmix_gptalpha, tmix_gptalpha_backward},
                                    {"llama", llama_tensors, tmix_llama, tmix_llama_backward},
                                    {0}};
static const Mixer channel_mixers[] = {{"x060", cmix_tensors, cmix, cmix_backward},
                                       {"x052", cmix_eagle_tensors, cmix_eagle, cmix_eagle_backward},
                                       {"llama", cmix_llama_tensors, cmix_llama, cmix_llama_backward},
                                       {0}};

static const Mixer *find_mixer(const Mixer *mixer, const char *name) {
    while (mixer->name && strcmp(mixer->name, name)) mixer++;
    return mixer->name ? mixer : NULL;
}

// --------------------------------------------------------------------------------------------------------------------
// TokenCat: what the GOLD layers of the whole model share as keys, from R numbers per token and the token's embedding.
//     c = w_kv_cache_a x;  K0 = rms_norm(w_kv_cache_b [x0 ; c])

static void token_cat(Ref *m, const float *x0, const float *x) {
    int l = -1, rows = m->rows, C = m->C, R = m->R;
    float *c = KEEP("token_cat.c", R), *cat = KEEP("token_cat.cat", C + R), *k = KEEP("token_cat.k", m->A);
    linear(c, x, P("w_kv_cache_a.weight"), rows);
    for (int t = 0; t < rows; t++) {
        memcpy(cat + t * (C + R), x0 + t * C, C * sizeof(float));
        memcpy(cat + t * (C + R) + C, c + t * R, R * sizeof(float));
    }
    linear(k, cat, P("w_kv_cache_b.weight"), rows);
    rms_norm(KEEP("k_cache", m->A), k, m->A, rows);
}

static void token_cat_backward(Ref *m, float *dx0, float *dx, const float *dK0, const float *x) {
    int l = -1, rows = m->rows, C = m->C, R = m->R;
    float *dk = TEMPORARY(m->A), *dcat = TEMPORARY(C + R), *dc = TEMPORARY(R);
    rms_norm_backward(dk, dK0, SAVED("token_cat.k"), m->A, rows);
    linear_backward(dcat, dk, SAVED("token_cat.cat"), P("w_kv_cache_b.weight"), rows);
    for (int t = 0; t < rows; t++) {
        for (int i = 0; i < C; i++) dx0[t * C + i] += dcat[t * (C + R) + i];
        memcpy(dc + t * R, dcat + t * (C + R) + C, R * sizeof(float));
    }
    linear_backward(dx, dc, x, P("w_kv_cache_a.weight"), rows);
    free_temporary(m);
}

// --------------------------------------------------------------------------------------------------------------------
// Blocks: x = x + tmix(LayerNorm_ln1(x));  x = x + cmix(LayerNorm_ln2(x)).
// With `parallel`: x = x + tmix(LayerNorm_ln1(x)) + cmix(LayerNorm_ln2(x)).

static const Mixer *time_mixer(const Ref *m, int l) {
    return find_mixer(time_mixers, l < m->G0 ? m->s.tmix : m->s.tmix2);
}

static const Mixer *channel_mixer(const Ref *m, int l) {
    return find_mixer(channel_mixers, l < m->G0 ? m->s.cmix : m->s.cmix2);
}

static int has_gold(const Ref *m) { return m->G0 < m->L && !strcmp(m->s.tmix2, "gold"); }

static void add(float *y, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += x[i];
    store(y, n);
}

static float *block(Ref *m, int l, const float *x) {
    int rows = m->rows, C = m->C;
    float *ln1 = KEEP("ln1", C), *ln2 = KEEP("ln2", C), *mid = KEEP("mid", C), *out = KEEP("out", C);
    float *att = KEEP("att.out", C), *ffn = KEEP("ffn.out", C);
    layer_norm(ln1, x, P("ln1.weight"), P("ln1.bias"), rows);
    time_mixer(m, l)->forward(m, l, att, ln1);
    add(mid, x, (int64_t)rows * C);
    if (!m->s.parallel) add(mid, att, (int64_t)rows * C);
    layer_norm(ln2, mid, P("ln2.weight"), P("ln2.bias"), rows);
    channel_mixer(m, l)->forward(m, l, ffn, ln2);
    add(out, x, (int64_t)rows * C);
    add(out, att, (int64_t)rows * C);
    add(out, ffn, (int64_t)rows * C);
    return out;
}

// dx is the gradient of the block's output when it comes, and of its input x when it leaves.
static void block_backward(Ref *m, int l, float *dx, const float *x) {
    int rows = m->rows, C = m->C;
    float *dln1 = TEMPORARY(C), *dln2 = TEMPORARY(C), *dmid = TEMPORARY(C), *datt = TEMPORARY(C);
    channel_mixer(m, l)->backward(m, l, dln2, dx, SAVED("ln2"));
    layer_norm_backward(dmid, dln2, SAVED("mid"), P("ln2.weight"), P("ln2.bias"), rows);
    add(datt, dx, (int64_t)rows * C);
    if (!m->s.parallel) add(datt, dmid, (int64_t)rows * C);
    add(dx, dmid, (int64_t)rows * C);
    time_mixer(m, l)->backward(m, l, dln1, datt, SAVED("ln1"));
    layer_norm_backward(dx, dln1, x, P("ln1.weight"), P("ln1.bias"), rows);
    free_temporary(m);
}

// --------------------------------------------------------------------------------------------------------------------
// The loss: cross-entropy, averaged over the n targets that count (-1: one that does not). Its gradient on the logits
// gets one more term, which the reported loss does not include: 1e-4 z_max / n at each such position's largest logit
// (the lowest id if several are largest).

typedef struct Loss {
    double cross_entropy;
    double objective; // what the gradient is the gradient of: cross_entropy + mean over positions of 1e-4 z_max² / 2
} Loss;

static int count_targets(const int *targets, int rows) { // at least 1: without any, all sums are zero
    int n = 0;
    for (int t = 0; t < rows; t++) n += targets[t] >= 0;
    return n > 0 ? n : 1;
}

static Loss loss(const float *logits, const int *targets, int V, int rows) {
    Loss result = {0, 0};
    const int n = count_targets(targets, rows);
    for (int t = 0; t < rows; t++, logits += V) {
        if (targets[t] < 0) continue;
        double z_max = logits[0], total = 0;
        for (int i = 1; i < V; i++) z_max = logits[i] > z_max ? logits[i] : z_max;
        for (int i = 0; i < V; i++) total += exp(logits[i] - z_max);
        double cross_entropy = z_max + log(total) - logits[targets[t]];
        result.cross_entropy += cross_entropy / n;
        result.objective += (cross_entropy + 0.5e-4 * z_max * z_max) / n;
    }
    return result;
}

static void loss_backward(float *dlogits, const float *logits, const int *targets, int V, int rows, double scale) {
    const int n = count_targets(targets, rows);
    for (int t = 0; t < rows; t++, logits += V, dlogits += V) {
        if (targets[t] < 0) continue;
        int largest = 0;
        double total = 0;
        for (int i = 1; i < V; i++) largest = logits[i] > logits[largest] ? i : largest;
        for (int i = 0; i < V; i++) total += exp((double)logits[i] - logits[largest]);
        for (int i = 0; i < V; i++) {
            double z_term = i == largest ? 1e-4 * logits[i] : 0;
            double p = exp((double)logits[i] - logits[largest]) / total;
            dlogits[i] += (p - (i == targets[t]) + z_term) * scale / n;
        }
        store(dlogits, V);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// The whole model

// tokens, targets (B, T). Every activation stays for ref_backward.
static Loss ref_forward(Ref *m, const int *tokens, const int *targets, int B, int T) {
    int l = -1, C = m->C, rows = B * T;
    m->B = B;
    m->T = T;
    m->rows = rows;
    float *embedded = KEEP("embedded", C), *x0 = KEEP("x0", C), *x = x0;
    const float *emb = P("emb.weight")->w;
    for (int t = 0; t < rows; t++) memcpy(embedded + t * C, emb + (int64_t)tokens[t] * C, C * sizeof(float));
    layer_norm(x0, embedded, P("blocks.0.ln0.weight"), P("blocks.0.ln0.bias"), rows);
    for (int i = 0; i < m->L; i++) {
        x = block(m, i, x);
        if (i == m->G0 - 1 && has_gold(m)) token_cat(m, x0, x);
    }
    float *ln_out = KEEP("ln_out", C), *logits = KEEP("logits", m->V);
    layer_norm(ln_out, x, P("ln_out.weight"), P("ln_out.bias"), rows);
    linear(logits, ln_out, P("head.weight"), rows);
    return loss(logits, targets, m->V, rows);
}

// Adds to every gradient; scale is 1 / (number of micro-batches of the step).
static void ref_backward(Ref *m, const int *tokens, const int *targets, double scale) {
    int l = -1, C = m->C, rows = m->rows;
    float *dlogits = zeros((int64_t)rows * m->V, sizeof(float)), *dln_out = zeros((int64_t)rows * C, sizeof(float));
    float *dx = zeros((int64_t)rows * C, sizeof(float)), *dembedded = zeros((int64_t)rows * C, sizeof(float));
    m->dx0 = zeros((int64_t)rows * C, sizeof(float));
    m->dK0 = zeros((int64_t)rows * m->A, sizeof(float));
    loss_backward(dlogits, SAVED("logits"), targets, m->V, rows, scale);
    linear_backward(dln_out, dlogits, SAVED("ln_out"), P("head.weight"), rows);
    layer_norm_backward(dx, dln_out, saved(m, m->L - 1, "out"), P("ln_out.weight"), P("ln_out.bias"), rows);
    for (int i = m->L - 1; i >= 0; i--) {
        if (i == m->G0 - 1 && has_gold(m)) token_cat_backward(m, m->dx0, dx, m->dK0, saved(m, i, "out"));
        block_backward(m, i, dx, i ? saved(m, i - 1, "out") : SAVED("x0"));
    }
    add(dx, m->dx0, (int64_t)rows * C);
    layer_norm_backward(dembedded, dx, SAVED("embedded"), P("blocks.0.ln0.weight"), P("blocks.0.ln0.bias"), rows);
    Param *emb = P("emb.weight");
    double *sum = zeros(emb->size, sizeof(double));
    for (int t = 0; t < rows; t++)
        for (int i = 0; i < C; i++) sum[(int64_t)tokens[t] * C + i] += dembedded[t * C + i];
    for (int64_t i = 0; i < emb->size; i++) emb->g[i] += sum[i];
    free(sum);
    free(dlogits);
    free(dln_out);
    free(dx);
    free(dembedded);
    free(m->dx0);
    free(m->dK0);
}

static Settings default_settings(void) {
    Settings s = {
#define DEFAULT(type, group, name, value) .name = value,
        SETTINGS(DEFAULT) NESTED_SETTINGS(DEFAULT)
#undef DEFAULT
    };
    return s;
}

static int ref_supported(const Settings *s) {
    return find_mixer(time_mixers, s->tmix) && find_mixer(channel_mixers, s->cmix) &&
           (!*s->tmix2 || (find_mixer(time_mixers, s->tmix2) && find_mixer(channel_mixers, s->cmix2)));
}

static Ref *ref_create(const Settings *s) {
    Ref *m = zeros(1, sizeof(Ref));
    m->s = *s;
    m->L = s->n_layer;
    m->C = s->n_embd;
    m->A = s->dim_att ? s->dim_att : s->n_embd;
    m->H = m->A / N;
    m->F = s->dim_ffn ? s->dim_ffn : 7 * s->n_embd / 2 / 32 * 32;
    m->V = s->vocab_size;
    m->R = s->n_embd / s->kv_cache_compression_ratio;
    m->G0 = *s->tmix2 ? s->n_layer * (s->inv_other_layer_ratio - 1) / s->inv_other_layer_ratio : s->n_layer;
    if (m->L > 12) fail("the plain-C model is for small sizes: at most 12 layers, not %d", m->L);
    add_tensors(m, -1, model_tensors);
    if (has_gold(m)) add_tensors(m, -1, token_cat_tensors);
    add_tensors(m, 0, ln0_tensors);
    for (int l = 0; l < m->L; l++) {
        add_tensors(m, l, block_tensors);
        add_tensors(m, l, time_mixer(m, l)->tensors);
        add_tensors(m, l, channel_mixer(m, l)->tensors);
    }
    return m;
}

static void ref_free(Ref *m) { // m may be NULL
    if (!m) return;
    for (int i = 0; i < m->n_kept; i++) free(m->kept[i].data);
    for (int i = 0; i < m->n_params; i++) {
        free(m->params[i].w);
        free(m->params[i].g);
        free(m->params[i].m);
        free(m->params[i].v);
    }
    free(m);
}

static void ref_zero_grad(Ref *m) {
    for (int i = 0; i < m->n_params; i++) memset(m->params[i].g, 0, m->params[i].size * sizeof(float));
}

// --------------------------------------------------------------------------------------------------------------------
// AdamW: gradients are first multiplied by min(1, clip / (norm + 1e-6)), norm over all of them. Then
//     m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g²
//     p = p - lr (m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps) + weight_decay p)          n = step + 1
// Returns the norm before clipping.

static double ref_update(Ref *m, int step, double lr) {
    const Settings *s = &m->s;
    double square = 0;
    for (int i = 0; i < m->n_params; i++)
        for (int64_t j = 0; j < m->params[i].size; j++) square += (double)m->params[i].g[j] * m->params[i].g[j];
    double norm = sqrt(square), clip = fmin(1, s->gradient_clip_val / (norm + 1e-6));
    double correct1 = 1 - pow(s->beta1, step + 1), correct2 = 1 - pow(s->beta2, step + 1);
    for (int i = 0; i < m->n_params; i++) {
        Param *p = &m->params[i];
        double rate = lr * (p->row->group == TWICE && s->layerwise_lr ? 2 : 1);
        double weight_decay = p->row->group == DECAY ? s->weight_decay : 0;
        for (int64_t j = 0; j < p->size; j++) {
            double g = p->g[j] * clip;
            p->m[j] = s->beta1 * p->m[j] + (1 - s->beta1) * g;
            p->v[j] = s->beta2 * p->v[j] + (1 - s->beta2) * g * g;
            double update = p->m[j] / correct1 / (sqrt(p->v[j] / correct2) + s->adam_eps);
            p->w[j] -= rate * (update + weight_decay * p->w[j]);
        }
    }
    return norm;
}

// The learning rate of a step (0-based), before a tensor's own factor.
static double ref_learning_rate(const Settings *s, int64_t step) {
    double step_tokens = (double)s->ctx_len * s->micro_bsz * s->accumulate_grad_batches;
    double start = s->warmup_steps * step_tokens + s->lr_wait * s->my_exit_tokens;
    double progress = fmax(0, fmin(1, (step * step_tokens - start) / (s->my_exit_tokens - start)));
    double a = s->lr_init, b = s->lr_final, lr = 0;
    if (!strcmp(s->lr_decay_type, "cos")) lr = b + (a - b) * cos(acos(0) * progress);
    if (!strcmp(s->lr_decay_type, "linear")) lr = b + (a - b) * (1 - progress);
    if (!strcmp(s->lr_decay_type, "exp")) lr = a * pow(b / a, progress);
    if (!strcmp(s->lr_decay_type, "oneminussqrt")) lr = b + (a - b) * (1 - sqrt(progress));
    return step < s->warmup_steps ? lr * (0.2 + 0.8 * step / s->warmup_steps) : lr;
}

// ====================================================================================================================
// Part 2: the checks
// ====================================================================================================================

// What train_goldfinch.cu offers when it is built with GOLDFINCH_TEST.
typedef struct Model Model;
int gf_precision(void);      // 16: weights and activations in bf16, 32: in fp32
const char *gf_device(void); // "CPU" or the GPU's name
int gf_supported(const char *tmix, const char *tmix2, const char *cmix, const char *cmix2); // "" for no second kind
Model *gf_create(int argc, const char **argv, int B, int T); // argv as on the command line, without the program's name
void gf_free(Model *m);
int gf_num_tensors(Model *m);
const char *gf_tensor_name(Model *m, int i);
int gf_tensor_shape(Model *m, int i, int64_t shape[4]);                        // returns the number of dimensions
void gf_tensor_group(Model *m, int i, double *lr_scale, double *weight_decay); // factors
void gf_set_param(Model *m, int i, const float *values);
void gf_get_param(Model *m, int i, float *values); // fp32 master weights
void gf_get_grad(Model *m, int i, float *values);
void gf_init_weights(Model *m, uint64_t seed);
void gf_zero_grad(Model *m);
// One micro-batch; adds gradients / accumulate, returns the mean cross-entropy. targets[t] is tokens[t + 1].
double gf_loss_backward(Model *m, const int *tokens, const int *targets, int B, int T, int accumulate);
// The same where some targets do not count, -1: step_targets do in the whole step, whose mean the gradients are then
// of. Returns this micro-batch's part of the loss.
double gf_masked_loss_backward(Model *m, const int *tokens, const int *targets, int B, int T, int accumulate,
                               int64_t step_targets);
int gf_activation(Model *m, const char *name, float *out); // 0, or -1 if there is none of that name
double gf_update(Model *m, int step, double lr);           // returns the norm of the gradients before clipping
double gf_update_loss(Model *m, int step);                 // the loss, of all ranks' sequences
int gf_ranks(int n);                                       // starts n - 1 more processes; returns this one's rank
double gf_learning_rate(int argc, const char **argv, int64_t step);
// The kernels alone, arrays (B, T, H, 64), u (H, 64) or NULL; inputs are rounded to what this build stores.
// (rows, A) in place, from this position
void gf_rope(int argc, const char **argv, int64_t first, int rows, int A, float *x);
void gf_wkv(int B, int T, int H, const float *r, const float *k, const float *v, const float *w, const float *u,
            int one_minus_w, float *y, const float *dy, float *dr, float *dk, float *dv, float *dw, float *du);
void gf_sampler(int64_t n_tokens, int64_t ctx_len, int64_t *prime, int n, int64_t *offsets);
int64_t gf_binidx(const char *prefix, int64_t *n_docs, int32_t *tokens, int64_t max);
// inference (infer_goldfinch.cu) with the weights of a model; kv 0: c in the storage type, 1: in 8 bits, 2: keys and
// values; chunk: tokens of a pre-fill chunk; window: newest tokens whose keys and values are kept; machine: how blocks
// share older ones, as on a large (0) or a small one (1), or one takes all (2); int8: as with --weights int8
typedef struct Infer Infer;
Infer *gf_infer_create(Model *m, int kv, int64_t capacity, int chunk, int64_t window, int machine, int int8);
void gf_infer_free(Infer *f);
void gf_infer_reset(Infer *f);
void gf_infer_feed(Infer *f, const int *ids, int64_t n, int all, float *logits); // logits (V) of the last, all: (n, V)
double gf_infer_score(Infer *f, const int *ids, int64_t n, int64_t window, int chunk); // mean loss of a text's tokens
// several contexts at once, which f reads; ids (contexts), logits (contexts, V)
Infer *gf_batch_create(Infer *f, int contexts, int64_t capacity, int64_t window);
void gf_batch_take(Infer *b, int slot, Infer *f); // the context that f has read goes on in this slot
void gf_batch_rest(Infer *b, int slot);           // the slot's context is forgotten
void gf_batch_step(Infer *b, const int *ids, float *logits);
void gf_batch_free(Infer *b);
// w (rows, columns) in 8 bits; y (4, rows): its product with x as a step makes it, by its kernel, as pre-fill makes it,
// by the kernel with few slots and three blocks
void gf_int8(int rows, int columns, const float *w, const float *x, int few_slots, signed char *whole, float *scales,
             float *y);
// vocab: path of the World vocabulary, NULL for bytes. ids has room for n + 1, text for 3 n; both return a length
int64_t gf_tokenize(const char *vocab, const unsigned char *text, int64_t n, int *ids);
int64_t gf_detokenize(const char *vocab, const int *ids, int64_t n, unsigned char *text, int64_t max);
int64_t gf_printable(const unsigned char *bytes, int64_t n, unsigned char *text); // as valid UTF-8
void gf_sample_probabilities(const float *logits, int V, const int *history, int n_history, const int *uncounted,
                             int n_uncounted, const int *banned, int n_banned, double temperature, double top_p,
                             int top_k, double presence, double frequency, double decay, float *probabilities,
                             double uniform, int *drawn);

static int n_passed, n_failed, n_skipped;

static void say(const char *label, const char *format, va_list args) {
    printf("%-7s ", label);
    vprintf(format, args);
    printf("\n");
    fflush(stdout);
}

static void check(int good, const char *format, ...) {
    va_list args;
    va_start(args, format);
    say(good ? "ok" : "FAILED", format, args);
    va_end(args);
    if (good) n_passed++;
    else n_failed++;
}

static void note(const char *format, ...) {
    va_list args;
    va_start(args, format);
    say("", format, args);
    va_end(args);
}

static void skip(const char *format, ...) {
    va_list args;
    va_start(args, format);
    say("skipped", format, args);
    va_end(args);
    n_skipped++;
}

// --------------------------------------------------------------------------------------------------------------------
// Numbers from names (dev/golden/README.md): weights, tokens and probes of the golden tables need no files

static uint64_t fnv1a64(const void *bytes, size_t n, uint64_t hash) {
    for (size_t i = 0; i < n; i++) hash = (hash ^ ((const unsigned char *)bytes)[i]) * 0x100000001B3u;
    return hash;
}

static uint64_t name_hash(const char *name) { return fnv1a64(name, strlen(name), 0xCBF29CE484222325u); }

// Number i of a name's sequence, in [-1, 1).
static double uniform(uint64_t hash, int64_t i) {
    uint64_t z = hash + (uint64_t)(i + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z = z ^ (z >> 31);
    return (double)(z >> 40) / 8388608.0 - 1;
}

static int ends_with(const char *name, const char *end) {
    size_t n = strlen(name), k = strlen(end);
    return n >= k && !strcmp(name + n - k, end);
}

static int is_low_rank(const char *name) { return ends_with(name, "_w1") || ends_with(name, "_w2"); }

static void hash_weights(Ref *m) {
    for (int i = 0; i < m->n_params; i++) {
        Param *p = &m->params[i];
        const char *last = strrchr(p->name, '.') + 1;
        double offset = 0, scale = 0;
        if (!strcmp(last, "bias")) scale = 1 / 8.0;
        else if (!strcmp(last, "weight") && p->ndim == 1) offset = 1, scale = 1 / 4.0;
        else if (!strncmp(last, "time_m", 6) && !is_low_rank(last)) offset = scale = 1 / 2.0;
        else if (!strcmp(last, "time_decay")) offset = -3, scale = 2;
        else if (!strcmp(last, "time_faaaa")) scale = 1 / 2.0;
        else if (!strcmp(p->name, "emb.weight")) scale = 1;
        else scale = exp2(rint(log2(sqrt(3.0 / p->shape[p->ndim - (is_low_rank(last) ? 2 : 1)]))));
        uint64_t hash = name_hash(p->name);
        for (int64_t j = 0; j < p->size; j++) p->w[j] = offset + scale * uniform(hash, j);
    }
}

// The batch of the current check, (B, T) each, filled for a table's name.
static int inputs[4096], targets[4096];

static void hash_tokens(const char *name, int B, int T, int V) {
    char full[128];
    snprintf(full, sizeof(full), "tokens:%s", name);
    uint64_t hash = name_hash(full);
    int s[4097];
    if (B * T > 4096) fail("%s: %d x %d tokens, at most 4096 fit", name, B, T);
    for (int b = 0; b < B; b++) {
        for (int i = 0; i <= T; i++) {
            int id = floor((uniform(hash, (int64_t)b * (T + 1) + i) + 1) / 2 * V);
            s[i] = id < V ? id : V - 1;
        }
        for (int i = 7; i <= T; i += 3) s[i] = s[i - 7]; // something to learn
        memcpy(inputs + b * T, s, T * sizeof(int));
        memcpy(targets + b * T, s + 1, T * sizeof(int));
    }
}

static double norm_of(const float *x, int64_t n) {
    double square = 0;
    for (int64_t i = 0; i < n; i++) square += (double)x[i] * x[i];
    return sqrt(square);
}

static double probe_of(const char *name, const float *x, int64_t n) {
    char full[128];
    snprintf(full, sizeof(full), "probe:%s", name);
    uint64_t hash = name_hash(full);
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * uniform(hash, i);
    return sum;
}

static double distance(const float *a, const float *b, int64_t n) {
    double square = 0;
    for (int64_t i = 0; i < n; i++) square += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    return sqrt(square);
}

// --------------------------------------------------------------------------------------------------------------------
// Settings from text, and settings to the kernels' command line

static int settings_set(Settings *s, const char *key, const char *value) {
#define READ_INT(field) s->field = atoll(value)
#define READ_REAL(field) s->field = atof(value)
#define READ_TEXT(field) snprintf(s->field, sizeof(s->field), "%s", value)
#define READ(type, group, name, standard) \
    if (!strcmp(key, #name)) return READ_##type(name), 1;
    SETTINGS(READ)
    NESTED_SETTINGS(READ)
    return 0;
}

// "n_layer=3 tmix2=gold" over the defaults.
static Settings settings_of(const char *text) {
    Settings s = default_settings();
    char copy[256];
    snprintf(copy, sizeof(copy), "%s", text);
    for (char *word = strtok(copy, " "); word; word = strtok(NULL, " ")) {
        char *equals = strchr(word, '=');
        *equals = 0;
        if (!settings_set(&s, word, equals + 1)) fail("unknown setting %s", word);
    }
    return s;
}

typedef struct Arguments {
    int n;
    const char *list[128];
    char text[64][64];
} Arguments;

static void arguments_of(Arguments *a, const Settings *s) {
    a->n = 0;
#define WRITE_INT(field) snprintf(a->text[a->n / 2], 64, "%lld", (long long)s->field)
#define WRITE_REAL(field) snprintf(a->text[a->n / 2], 64, "%.17g", s->field)
#define WRITE_TEXT(field) snprintf(a->text[a->n / 2], 64, "%s", s->field)
#define WRITE(type, group, name, value) \
    WRITE_##type(name); \
    a->list[a->n + 1] = a->text[a->n / 2]; \
    a->list[a->n] = "--" #group "." #name; \
    a->n += 2;
    SETTINGS(WRITE)
    NESTED_SETTINGS(WRITE)
}

// --------------------------------------------------------------------------------------------------------------------
// The kernels' model beside the reference's

static int kernels_supported(const Settings *s) {
    return gf_supported(s->tmix, s->tmix2, s->cmix, *s->tmix2 ? s->cmix2 : "");
}

static Model *kernels_create(const Settings *s, int B, int T) {
    Arguments a;
    arguments_of(&a, s);
    return gf_create(a.n, a.list, B, T);
}

static int kernels_index(Model *k, const char *name) {
    for (int i = 0; i < gf_num_tensors(k); i++)
        if (!strcmp(gf_tensor_name(k, i), name)) return i;
    return -1;
}

// Says what differs between the two tables of tensors: names, shapes, optimizer groups.
static int same_tensors(Ref *m, Model *k) {
    int good = 1;
    for (int i = 0; i < gf_num_tensors(k); i++)
        if (!param(m, -1, gf_tensor_name(k, i))) note("%s: unknown tensor", gf_tensor_name(k, i)), good = 0;
    for (int i = 0; i < m->n_params; i++) {
        Param *p = &m->params[i];
        int at = kernels_index(k, p->name);
        if (at < 0) {
            note("%s: missing in the kernels", p->name);
            good = 0;
            continue;
        }
        int64_t shape[4] = {0};
        int same = gf_tensor_shape(k, at, shape) == p->ndim;
        for (int j = 0; j < p->ndim; j++) same = same && shape[j] == p->shape[j];
        double lr_scale, weight_decay;
        gf_tensor_group(k, at, &lr_scale, &weight_decay);
        int group = lr_scale == (p->row->group == TWICE && m->s.layerwise_lr ? 2 : 1) &&
                    weight_decay == (p->row->group == DECAY);
        if (!same) note("%s: other shape than %s", p->name, p->row->shape);
        if (!group) note("%s: other group: lr x %g, weight decay x %g", p->name, lr_scale, weight_decay);
        good = good && same && group;
    }
    return good;
}

static void load_weights(const Ref *m, Model *k) {
    for (int i = 0; i < m->n_params; i++) gf_set_param(k, kernels_index(k, m->params[i].name), m->params[i].w);
}

// A model of the kernels with the reference's weights, or NULL if the two tables differ.
static Model *kernels_like(Ref *m, int B, int T, const char *title) {
    Model *k = kernels_create(&m->s, B, T);
    if (!same_tensors(m, k)) {
        check(0, "%s: the kernels' table of tensors", title);
        gf_free(k);
        return NULL;
    }
    load_weights(m, k);
    return k;
}

// The reference of these settings with weights and a batch by hash, and the kernels with the same weights (k NULL if
// their table of tensors differs).
static Ref *small_model(const char *settings, const char *title, int B, int T, Model **k) {
    Settings s = settings_of(settings);
    Ref *m = ref_create(&s);
    hash_weights(m);
    hash_tokens(title, B, T, m->V);
    *k = kernels_like(m, B, T, title);
    return m;
}

static void free_both(Ref *m, Model *k) {
    if (k) gf_free(k);
    ref_free(m);
}

static float *kernels_param(Model *k, const Param *p) {
    float *values = zeros(p->size, sizeof(float));
    gf_get_param(k, kernels_index(k, p->name), values);
    return values;
}

static float *kernels_gradient(Model *k, const Param *p) {
    float *values = zeros(p->size, sizeof(float));
    gf_get_grad(k, kernels_index(k, p->name), values);
    return values;
}

static float *kernels_activation(Model *k, const char *name, int64_t size) {
    float *values = zeros(size, sizeof(float));
    if (gf_activation(k, name, values) < 0) fail("the kernels have no activation %s", name);
    return values;
}

// All gradients in the reference's order, then the logits: one block, to compare bit by bit.
typedef struct Bits {
    double loss;
    int64_t size;
    float *data;
} Bits;

static Bits kernels_bits(Ref *m, Model *k, double loss, int rows) {
    Bits b = {loss, (int64_t)rows * m->V, NULL};
    for (int i = 0; i < m->n_params; i++) b.size += m->params[i].size;
    b.data = zeros(b.size, sizeof(float));
    float *at = b.data;
    for (int i = 0; i < m->n_params; at += m->params[i++].size) gf_get_grad(k, kernels_index(k, m->params[i].name), at);
    if (rows && gf_activation(k, "logits", at) < 0) fail("the kernels have no logits"); // rows 0: leave them out
    return b;
}

// Frees both. Names the first tensor that differs.
static int same_bits(Ref *m, Bits a, Bits b) {
    int same = a.loss == b.loss && a.size == b.size && !memcmp(a.data, b.data, a.size * sizeof(float));
    if (!same) {
        int64_t at = 0;
        int i = 0;
        while (i < m->n_params && !memcmp(a.data + at, b.data + at, m->params[i].size * sizeof(float)))
            at += m->params[i++].size;
        note("losses %.9g %.9g; first that differs: %s", a.loss, b.loss,
             i < m->n_params ? m->params[i].name : "no gradient");
    }
    free(a.data);
    free(b.data);
    return same;
}

static uint64_t digest(const Bits *b) {
    return fnv1a64(b->data, b->size * sizeof(float), fnv1a64(&b->loss, sizeof(double), 0xCBF29CE484222325u));
}

// --------------------------------------------------------------------------------------------------------------------
// One comparison: a first number, errors in the order of computation, errors in any order; and how large they may be

typedef struct Limits {
    const char *first, *ordered, *others;                          // what is compared
    double first_limit, ordered_limit, others_limit, median_limit; // the others' median
} Limits;

static const Limits pass_limits = {"loss", "activation", "gradient", 1e-4, 1e-4, 1e-4, INFINITY};
static const Limits run_fp32 = {"learning rate", "step", "final parameter", 1e-6, 1e-4, 1e-3, INFINITY};
static const Limits run_bf16 = {"learning rate", "step", "unjudged final parameter", 1e-6, 5e-2, INFINITY, INFINITY};

typedef struct Error {
    char name[64];
    double value, allowed; // allowed: if not 0, in place of others_limit
} Error;

typedef struct Comparison {
    Limits limits;
    double first;
    int n_ordered, n_others;
    Error ordered[256], others[512];
} Comparison;

static void add_error(Error *list, int *n, const char *name, double value) {
    snprintf(list[*n].name, sizeof(list[*n].name), "%s", name);
    list[(*n)++].value = isnan(value) ? INFINITY : value;
}

static double relative(double got, double want) { return fabs(got - want) / fabs(want); }

static int larger_first(const void *a, const void *b) {
    double x = ((const Error *)a)->value, y = ((const Error *)b)->value;
    return (x < y) - (x > y);
}

static int is_off(const Error *e, const Limits *limit) {
    return e->value > (e->allowed ? e->allowed : limit->others_limit);
}

// The verdict in one line, below it what is off. Sorts the others.
static void judge(Comparison *c, const char *format, ...) {
    char title[256];
    va_list args;
    va_start(args, format);
    vsnprintf(title, sizeof(title), format, args);
    va_end(args);

    const Limits *limit = &c->limits;
    const Error *first_off = NULL;
    double largest = 0;
    for (int i = 0; i < c->n_ordered; i++) {
        if (!first_off && c->ordered[i].value > limit->ordered_limit) first_off = &c->ordered[i];
        largest = fmax(largest, c->ordered[i].value);
    }
    int n = c->n_others, listed = 0;
    qsort(c->others, n, sizeof(Error), larger_first);
    for (int i = 0; i < n; i++) listed += is_off(&c->others[i], limit);
    double median = n ? c->others[n / 2].value : 0;
    int first_good = c->first <= limit->first_limit, median_good = median <= limit->median_limit;
    check(first_good && !first_off && !listed && median_good,
          "%s: %s %.1e, %ss up to %.1e, %ss up to %.1e, median %.1e", title, limit->first, c->first, limit->ordered,
          largest, limit->others, n ? c->others[0].value : 0, median);
    if (!first_good) note("the %s is off by %.2e, allowed %.0e", limit->first, c->first, limit->first_limit);
    if (first_off) {
        note("first %s that is off: %s by %.2e, allowed %.1e", limit->ordered, first_off->name, first_off->value,
             limit->ordered_limit);
    }
    if (!median_good) note("the %ss' median is %.2e, allowed %.1e", limit->others, median, limit->median_limit);
    for (int i = 0; i < n; i++)
        if (is_off(&c->others[i], limit))
            note("%s of %s: %.2e, allowed %.1e", limit->others, c->others[i].name, c->others[i].value,
                 c->others[i].allowed ? c->others[i].allowed : limit->others_limit);
}

// A bf16 build may be off by what bf16 costs the model: the errors of the reference's own pass with rounding (rounded),
// compared to the same numbers. The two differ in what they round, the kernels' sums in registers for one, and each
// rounding is a draw. Seen over all our models and tables: activations at most 2.8 times as far off, the gradients'
// median 1.9 times, the largest 2.0 times. With `each`, for errors of whole tensors: each gradient, or the median of
// all if that is larger, at most 1.5 times. Not so with x060, whose group norm blows up what a small first y was
// rounded by: there single tensors depend on one draw. A table's probe is one draw, too. The loss is off by 1e-3 at
// most.
static void allow_rounding(Comparison *c, Comparison *rounded, int each) {
    double largest = 0;
    Error own[sizeof(c->others) / sizeof(*c->others)];
    memcpy(own, rounded->others, sizeof(own));
    for (int i = 0; i < rounded->n_ordered; i++) largest = fmax(largest, rounded->ordered[i].value);
    qsort(rounded->others, rounded->n_others, sizeof(Error), larger_first);
    double median = rounded->others[rounded->n_others / 2].value;
    c->limits.first_limit = 2e-3;
    c->limits.ordered_limit = 4 * largest;
    c->limits.others_limit = 3 * rounded->others[0].value;
    c->limits.median_limit = 2.5 * median;
    for (int i = 0; i < c->n_others && each; i++) c->others[i].allowed = 3 * fmax(own[i].value, median);
}

// Names of the activations in the order of computation; returns 0 after the last.
static int activation_name(const Ref *m, int i, char name[64]) {
    static const char *const parts[3] = {"att.out", "ffn.out", "out"};
    int gold = has_gold(m);
    if (gold && i == 3 * m->G0) return snprintf(name, 64, "k_cache");
    if (gold && i > 3 * m->G0) i--;
    if (i < 3 * m->L) return snprintf(name, 64, "blocks.%d.%s", i / 3, parts[i % 3]);
    return i == 3 * m->L ? snprintf(name, 64, "logits") : 0;
}

// Some gradients are zero by mathematics: u takes no part under use_v2, and v2's parameters take none without it;
// attention does not feel a shift of all keys, where no positions are added. There the norm itself is the error, beside
// that of the gradient of the same layer's ln_k.weight, or ln_x.weight without ln_k. Returns that tensor, or NULL.
static Param *zero_beside(Ref *m, const Param *p) {
    const char *name = p->row->name;
    int positions = m->s.rope.base > 0 || m->s.brope.rescale > 0;
    int shift = ends_with(name, "ln_k.bias") && !positions;
    int unused = m->s.use_v2 ? ends_with(name, "time_faaaa") : strstr(name, "_v2") || strstr(name, "time_value2");
    unused = unused && param(m, p->layer, "att.time_value2_w1");
    return shift ? param(m, p->layer, "att.ln_k.weight") : unused ? param(m, p->layer, "att.ln_x.weight") : NULL;
}

// Whole tensors in the measure of the tables' rows, NORM and PROBE: what a probe of random numbers in [-1, 1) shows of
// a difference is |got - want| / sqrt(3) on average (rms).
static double tensor_error(const float *got, const float *want, int64_t n) {
    double norm = norm_of(want, n);
    return fmax(fabs(norm_of(got, n) - norm), distance(got, want, n) / sqrt(3)) / norm;
}

// The reference once more as a bf16 build would store its numbers: weights, activations and their gradients (rounds).
// What it is off is what bf16 costs this model, here and in the kernels. Leaves m as it is. *loss: its loss.
// NULL in an fp32 build.
static Ref *ref_rounded(const Ref *m, double *loss) {
    if (gf_precision() == 32) return NULL;
    Ref *r = ref_create(&m->s);
    for (int i = 0; i < m->n_params; i++)
        for (int64_t j = 0; j < m->params[i].size; j++) r->params[i].w[j] = bf16(m->params[i].w[j]);
    rounds = 1;
    *loss = ref_forward(r, inputs, targets, m->B, m->T).cross_entropy;
    ref_backward(r, inputs, targets, 1);
    rounds = 0;
    return r;
}

static float *copy_of(const float *x, int64_t n) { return memcpy(zeros(n, sizeof(float)), x, n * sizeof(float)); }

// The kernels' last pass (k), or that of another reference (k NULL, r), against the reference's, tensor by tensor.
// Where more gradients vanish than zero_beside knows of (with T = 1 no token sees another), they are compared with 0,
// beside the largest one: of tables those below 1e-9, as in compare_to_table, of our own shapes those below 1e-6 of it.
static void compare_tensors(Comparison *c, Ref *m, Model *k, Ref *r, double loss, double want, int golden) {
    *c = (Comparison){.limits = pass_limits, .first = relative(loss, want)};
    char name[64];
    for (int i = 0; activation_name(m, i, name); i++) {
        Array *a = kept(m, -1, name);
        float *got = k ? kernels_activation(k, name, a->size) : copy_of(kept(r, -1, name)->data, a->size);
        add_error(c->ordered, &c->n_ordered, name, tensor_error(got, a->data, a->size));
        free(got);
    }
    double largest = 0;
    for (int i = 0; i < m->n_params; i++) largest = fmax(largest, norm_of(m->params[i].g, m->params[i].size));
    for (int i = 0; i < m->n_params; i++) {
        Param *p = &m->params[i], *beside = zero_beside(m, p);
        float *got = k ? kernels_gradient(k, p) : copy_of(r->params[i].g, p->size);
        double norm = beside ? norm_of(beside->g, beside->size) : norm_of(p->g, p->size);
        double error = beside ? norm_of(got, p->size) / norm : tensor_error(got, p->g, p->size);
        if (norm < (golden ? 1e-9 : 1e-6 * largest)) error = norm_of(got, p->size) / largest;
        add_error(c->others, &c->n_others, p->name, error);
        free(got);
    }
}

// The kernels against the reference, and what they may be off: rounded is the reference's pass with rounding, or NULL.
static void compare_to_reference(Comparison *c, Ref *m, Model *k, Ref *rounded, double loss, double want, int golden) {
    compare_tensors(c, m, k, NULL, loss, want, golden);
    if (!rounded) return;
    Comparison *of_rounded = zeros(1, sizeof(Comparison));
    compare_tensors(of_rounded, m, NULL, rounded, want, want, golden);
    int each = 1;
    for (int l = 0; l < m->L; l++) each = each && time_mixer(m, l)->forward != tmix_finch;
    allow_rounding(c, of_rounded, each);
    free(of_rounded);
}

// --------------------------------------------------------------------------------------------------------------------
// Golden tables

enum { MAX_STEPS = 128 };

typedef struct Step {
    double lr, loss, norm;
} Step;

typedef struct TableRow {
    char kind[8], name[64], shape[32]; // kind: act, grad, param
    double norm, probe;
} TableRow;

typedef struct Table {
    char name[64], unknown[64]; // unknown: a setting that this program does not know
    Settings s;
    int B, T, n_steps, n_rows, n_groups; // n_steps > 0: a training run
    double loss;
    TableRow rows[512];
    Step steps[MAX_STEPS];
    struct {
        double lr_scale, weight_decay;
        char *names;
    } group[8];
} Table;

static Table *table_read(const char *path) {
    FILE *f = fopen(path, "r");
    if (!f) fail("%s: cannot be opened", path);
    Table *t = zeros(1, sizeof(Table));
    t->s = default_settings();
    char *line = NULL;
    size_t capacity = 0;
    int steps_read = 0;
    while (getline(&line, &capacity, f) > 0) {
        TableRow *row = &t->rows[t->n_rows];
        if (!strncmp(line, "config ", 7)) {
            line[strcspn(line, ";\n")] = 0;
            for (char *word = strtok(line + 7, " "); word; word = strtok(NULL, " ")) {
                char *value = strchr(word, '=');
                if (!value) fail("%s: config has %s, expected name=value", path, word);
                *value++ = 0;
                if (!strcmp(word, "name")) snprintf(t->name, sizeof(t->name), "%s", value);
                else if (!strcmp(word, "B")) t->B = atoi(value);
                else if (!strcmp(word, "T")) t->T = atoi(value);
                else if (!strcmp(word, "steps")) t->n_steps = atoi(value);
                else if (!settings_set(&t->s, word, value)) snprintf(t->unknown, sizeof(t->unknown), "%s", word);
            }
        } else if (!strncmp(line, "loss ", 5)) {
            t->loss = atof(line + 5);
        } else if (!strncmp(line, "step ", 5) && steps_read < MAX_STEPS) {
            Step *s = &t->steps[steps_read++];
            if (sscanf(line, "step %*d lr %lf loss %lf grad_norm %lf", &s->lr, &s->loss, &s->norm) != 3)
                fail("%s: cannot read the line %.60s", path, line);
        } else if (!strncmp(line, "group ", 6) && t->n_groups < 8) {
            char names[32];
            int g = t->n_groups++, at = 0;
            line[strcspn(line, "\n")] = 0;
            if (sscanf(line, "group %31s lr_scale=%lf weight_decay=%lf %n", names, &t->group[g].lr_scale,
                       &t->group[g].weight_decay, &at) != 3)
                fail("%s: group %d is malformed", path, g);
            t->group[g].names = strdup(line + at);
        } else if (t->n_rows < 512 && sscanf(line, "%7s %63s %31s %lf %lf", row->kind, row->name, row->shape,
                                             &row->norm, &row->probe) == 5) {
            t->n_rows++;
        } else if (*line != '#' && *line != '\n') {
            fail("%s: cannot read the line %.60s", path, line);
        }
    }
    free(line);
    fclose(f);
    if (!t->B || !t->T || steps_read != t->n_steps) fail("%s: config lacks B or T, or steps are missing", path);
    t->s.micro_bsz = t->B;
    if (t->n_steps) t->s.my_exit_tokens = t->n_steps * t->s.ctx_len * t->B;
    return t;
}

static void table_free(Table *t) {
    for (int i = 0; i < t->n_groups; i++) free(t->group[i].names);
    free(t);
}

static const TableRow *table_row(const Table *t, const char *kind, const char *name) {
    for (int i = 0; i < t->n_rows; i++)
        if (!strcmp(t->rows[i].kind, kind) && !strcmp(t->rows[i].name, name)) return &t->rows[i];
    return NULL;
}

static double row_error(const TableRow *row, const float *x, int64_t n) {
    return fmax(fabs(norm_of(x, n) - row->norm), fabs(probe_of(row->name, x, n) - row->probe)) / row->norm;
}

// Every parameter needs its row of this shape and every row its tensor (two tables leave out an unused time_faaaa).
static int table_complete(const Table *t, Ref *m, const char *kind) {
    int good = 1;
    char text[64];
    for (int i = 0; i < m->n_params; i++) {
        const Param *p = &m->params[i];
        const TableRow *row = table_row(t, kind, p->name);
        int n = 0;
        for (int j = 0; j < p->ndim; j++)
            n += snprintf(text + n, 64 - n, "%s%lld", j ? "x" : "", (long long)p->shape[j]);
        if (row ? strcmp(row->shape, text) : !ends_with(p->name, "time_faaaa")) {
            note("%s: %s in the reference, %s in the table", p->name, text, row ? row->shape : "missing");
            good = 0;
        }
    }
    for (int i = 0; i < t->n_rows; i++) {
        const TableRow *row = &t->rows[i];
        if (!strcmp(row->kind, kind) && !param(m, -1, row->name)) {
            note("%s: a row of the table, unknown to the reference", row->name);
            good = 0;
        }
    }
    if (!good) check(0, "%s: the reference's table of tensors", t->name);
    return good;
}

// Either the kernels' last pass (k) or the reference's (k NULL) against the table.
static void compare_to_table(Comparison *c, const Table *t, Ref *m, Model *k, double loss) {
    *c = (Comparison){.limits = pass_limits, .first = relative(loss, t->loss)};
    char name[64];
    for (int i = 0; activation_name(m, i, name); i++) {
        const TableRow *row = table_row(t, "act", name);
        if (!row) fail("%s: no row for the activation %s", t->name, name);
        Array *a = kept(m, -1, name);
        float *got = k ? kernels_activation(k, name, a->size) : a->data;
        add_error(c->ordered, &c->n_ordered, name, row_error(row, got, a->size));
        if (k) free(got);
    }
    double largest = 0; // with T = 1 more gradients vanish than zero_beside knows of
    for (int i = 0; i < t->n_rows; i++)
        largest = fmax(largest, strcmp(t->rows[i].kind, "grad") == 0 ? t->rows[i].norm : 0);
    for (int i = 0; i < m->n_params; i++) {
        Param *p = &m->params[i], *beside = zero_beside(m, p);
        const TableRow *row = table_row(t, "grad", p->name);
        if (!row) continue;
        float *got = k ? kernels_gradient(k, p) : p->g;
        double error = row_error(row, got, p->size);
        double beside_norm = beside ? table_row(t, "grad", beside->name)->norm : 0;
        if (row->norm < 1e-9) error = norm_of(got, p->size) / (beside_norm < 1e-9 ? largest : beside_norm);
        add_error(c->others, &c->n_others, p->name, error);
        if (k) free(got);
    }
}

// Largest |got - want| / |want| of any of the rows.
static double rows_error(const float *got, const float *want, int rows, int V) {
    double worst = 0;
    for (int i = 0; i < rows; i++) {
        double error = distance(got + (int64_t)i * V, want + (int64_t)i * V, V) / norm_of(want + (int64_t)i * V, V);
        if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
    }
    return worst;
}

static int trainer_only; // --trainer

// Inference against the logits of the kernels' last pass over the parallel model: tokens fed in chunks of 1, 7, 16 and
// all at once, with the logits of every token and with those of each chunk's last (where the last layers see only a few
// tokens), from all three caches, with windows of all tokens, few and one.
static void check_inference(const char *title, int B, int T, Ref *m, Model *k) {
    static const char *const kinds[3] = {"compressed cache", "8-bit cache (--kv int8)", "full keys and values"};
    const int n_kinds = has_gold(m) ? 3 : 1, n_chunks = has_gold(m) ? 6 : 4;
    const int V = m->V, chunks[6] = {1, 7, 16, T, 1, T}, windows[6] = {T, 8, 1, T, 5, 3},
              machine[6] = {0, 1, 0, 0, 1, 2};
    double limit = gf_precision() == 16 ? 5e-2 : 1e-4, compressed = 0;
    float *want = kernels_activation(k, "logits", (int64_t)B * T * V), *got = zeros((int64_t)T * V, sizeof(float));
    float *first = zeros((int64_t)T * V, sizeof(float));
    for (int kv = 0; kv < n_kinds; kv++) {
        double every = 0, last = 0;
        // with full keys and values the window is all there is
        for (int c = 0; c < (kv == 2 ? 4 : n_chunks); c++) {
            Infer *f = gf_infer_create(k, kv, T, chunks[c], windows[c], machine[c], 0);
            for (int b = 0; b < (chunks[c] == 1 ? 1 : B); b++) { // token by token is slow on the CPU
                const int *ids = inputs + b * T;
                const float *row = want + (int64_t)b * T * V;
                gf_infer_reset(f);
                for (int i = 0, n; i < T; i += n) {
                    n = T - i < chunks[c] ? T - i : chunks[c];
                    gf_infer_feed(f, ids + i, n, 1, got + (int64_t)i * V);
                }
                every = fmax(every, rows_error(got, row, T, V));
                if (kv == 0 && b == 0 && c == 1) memcpy(first, got, (size_t)T * V * sizeof(float));
                if (kv == 2 && b == 0 && c == 1) compressed = rows_error(got, first, T, V);
                gf_infer_reset(f);
                for (int i = 0, n; i < T; i += n) {
                    n = T - i < chunks[c] ? T - i : chunks[c];
                    gf_infer_feed(f, ids + i, n, 0, got);
                    last = fmax(last, rows_error(got, row + (int64_t)(i + n - 1) * V, 1, V));
                }
            }
            gf_infer_free(f);
        }
        double allowed = kv == 1 ? fmax(limit, 1e-2) : limit;
        check(every <= allowed && last <= allowed,
              "%s: inference, %s: every token's logits %.1e, each chunk's last %.1e, allowed %.0e", title,
              has_gold(m) ? kinds[kv] : "states and keys", every, last, allowed);
    }
    if (has_gold(m)) {
        check(compressed <= limit, "%s: inference, full keys against the compressed cache: %.1e, allowed %.0e", title,
              compressed, limit);
    }
    double loss[3];
    Infer *f = gf_infer_create(k, 0, T, T, T, 0, 0);
    for (int i = 0; i < 3; i++) loss[i] = gf_infer_score(f, inputs, T, 0, i == 0 ? 1 : i == 1 ? 64 : 0);
    gf_infer_free(f);
    double spread = fmax(relative(loss[0], loss[2]), relative(loss[1], loss[2])),
           allowed = gf_precision() == 16 ? 2e-3 : 1e-5;
    check(spread <= allowed, "%s: scores in chunks of 1, 64 and all at once: %.1e apart, allowed %.0e", title, spread,
          allowed);
    free(want), free(got), free(first);
}

static void check_table(const Table *t, Ref *m) {
    Comparison *c = zeros(1, sizeof(Comparison)), *of_rounded = zeros(1, sizeof(Comparison));
    hash_tokens(t->name, t->B, t->T, m->V);
    double want = ref_forward(m, inputs, targets, t->B, t->T).cross_entropy, rounded_loss;
    ref_backward(m, inputs, targets, 1);
    if (table_complete(t, m, "grad")) {
        compare_to_table(c, t, m, NULL, want);
        judge(c, "%s: C reference against the table", t->name);
    }
    Model *k = NULL;
    if (!kernels_supported(&t->s)) skip("%s: these mixers are not built into the kernels", t->name);
    else k = kernels_like(m, t->B, t->T, t->name);
    if (k) {
        Ref *rounded = ref_rounded(m, &rounded_loss);
        gf_zero_grad(k);
        double loss = gf_loss_backward(k, inputs, targets, t->B, t->T, 1);
        compare_to_table(c, t, m, k, loss);
        if (rounded) {
            compare_to_table(of_rounded, t, rounded, NULL, rounded_loss);
            allow_rounding(c, of_rounded, 0);
        }
        judge(c, "%s: kernels against the table", t->name);
        compare_to_reference(c, m, k, rounded, loss, want, 1);
        judge(c, "%s: kernels against the C reference", t->name);
        ref_free(rounded);
        Bits bits = kernels_bits(m, k, loss, t->B * t->T);
        note("bits of the kernels' loss, gradients and logits: %016llx", (unsigned long long)digest(&bits));
        free(bits.data);
        if (!trainer_only) check_inference(t->name, t->B, t->T, m, k);
        gf_free(k);
    }
    free(c), free(of_rounded);
}

static void check_groups(const Table *t, Ref *m) {
    int good = 1, listed = 0;
    for (int g = 0; g < t->n_groups; g++) {
        for (char *name = strtok(t->group[g].names, ","); name; name = strtok(NULL, ","), listed++) {
            Param *p = param(m, -1, name);
            if (p && t->group[g].lr_scale == (p->row->group == TWICE ? 2 : 1) &&
                t->group[g].weight_decay == (p->row->group == DECAY ? t->s.weight_decay : 0))
                continue;
            note("%s: other group in the table", name);
            good = 0;
        }
    }
    check(good && listed == m->n_params, "%s: optimizer groups, %d of %d tensors", t->name, listed, m->n_params);
}

static int n_ranks = 1, rank; // --ranks

// Trains the kernels (k) or the reference (k NULL) for a table's steps. Ranks share the batch; where they can't, each
// takes all of it, which has the same mean.
static void train(const Table *t, Ref *m, Model *k, Step *steps) {
    Arguments a;
    Settings of_rank = t->s;
    const int shared = t->B % n_ranks == 0, B = shared ? t->B / n_ranks : t->B, first = shared ? rank * B * t->T : 0;
    of_rank.micro_bsz = B;
    if (!shared) of_rank.my_exit_tokens *= n_ranks;
    arguments_of(&a, &of_rank);
    for (int s = 0; s < t->n_steps; s++) {
        char name[80];
        snprintf(name, sizeof(name), "%s:%d", t->name, s % 4);
        hash_tokens(name, t->B, t->T, m->V);
        if (k) {
            steps[s].lr = gf_learning_rate(a.n, a.list, s);
            gf_zero_grad(k);
            gf_loss_backward(k, inputs + first, targets + first, B, t->T, 1);
            steps[s].norm = gf_update(k, s, steps[s].lr);
            steps[s].loss = gf_update_loss(k, s);
        } else {
            steps[s].lr = ref_learning_rate(&t->s, s);
            ref_zero_grad(m);
            steps[s].loss = ref_forward(m, inputs, targets, t->B, t->T).cross_entropy;
            ref_backward(m, inputs, targets, 1);
            steps[s].norm = ref_update(m, s, steps[s].lr);
        }
    }
}

// A run against the table's (to_reference 0) or the reference's. bf16 is judged by its losses alone.
// The final ln_k.bias is no oracle without positions: its gradient is rounding noise, which Adam blows up.
static void compare_run(Comparison *c, const Table *t, Ref *m, Model *k, int to_reference, const Step *got,
                        const Step *want) {
    int bf16 = k && gf_precision() == 16;
    *c = (Comparison){.limits = bf16 ? run_bf16 : run_fp32};
    for (int s = 0; s < t->n_steps; s++) {
        char name[64];
        snprintf(name, sizeof(name), "loss of step %d", s);
        add_error(c->ordered, &c->n_ordered, name, relative(got[s].loss, want[s].loss));
        snprintf(name, sizeof(name), "gradient norm of step %d", s);
        if (!bf16) add_error(c->ordered, &c->n_ordered, name, relative(got[s].norm, want[s].norm));
        c->first = fmax(c->first, relative(got[s].lr, want[s].lr));
    }
    for (int i = 0; i < m->n_params; i++) {
        Param *p = &m->params[i];
        if (ends_with(p->name, "ln_k.bias")) continue;
        float *w = k ? kernels_param(k, p) : p->w;
        add_error(c->others, &c->n_others, p->name,
                  to_reference ? tensor_error(w, p->w, p->size)
                               : row_error(table_row(t, "param", p->name), w, p->size));
        if (k) free(w);
    }
}

static void check_training_table(const Table *t, Ref *m) {
    Comparison *c = zeros(1, sizeof(Comparison));
    Step reference[MAX_STEPS], kernels[MAX_STEPS];
    Model *k = NULL; // made before the reference trains: both start from the same weights
    if (!kernels_supported(&t->s)) skip("%s: these mixers are not built into the kernels", t->name);
    else k = kernels_like(m, t->B, t->T, t->name);
    check_groups(t, m);
    const int complete = table_complete(t, m, "param");
    // The reference knows no ranks: of several, each would do all of its work, which one by itself has done.
    const int with_reference = n_ranks == 1 || !complete;
    if (with_reference) train(t, m, NULL, reference);
    if (with_reference && complete) {
        compare_run(c, t, m, NULL, 0, reference, t->steps);
        judge(c, "%s: C reference against the table", t->name);
    }
    if (k) {
        train(t, m, k, kernels);
        compare_run(c, t, m, k, 0, kernels, t->steps);
        judge(c, "%s: kernels against the table", t->name);
        if (with_reference) {
            compare_run(c, t, m, k, 1, kernels, reference);
            judge(c, "%s: kernels against the C reference", t->name);
        }
        gf_free(k);
    }
    if (has_gold(m)) note("final ln_k.bias left out: its gradient is zero by mathematics, and Adam follows noise");
    free(c);
}

// --------------------------------------------------------------------------------------------------------------------
// Tokenizer and sampler

// The World vocabulary, as prepro_minipile.py leaves it, or as GOLDFINCH_VOCAB names it; NULL if it is not there.
static const char *vocabulary(void) {
    const char *path = getenv("GOLDFINCH_VOCAB");
    if (!path) path = "data/rwkv_vocab_v20230424.txt";
    return access(path, R_OK) == 0 ? path : NULL;
}

// Texts of random characters: a few bytes, letters of several scripts, or any bytes. Encoded and decoded again.
static void check_round_trips(const char *vocab, const char *name) {
    enum { MOST = 4096 };
    static unsigned char text[MOST], back[MOST + 16];
    static int ids[MOST + 1];
    int bad = 0, rounds = 200;
    for (int i = 0; i < rounds; i++) {
        int n = 0, most = 1 + (int)((uniform(31, i) + 1) * MOST / 2) % MOST;
        for (int64_t j = 0; n < most; j++) {
            int x = (int)((uniform(1000 + i, j) + 1) * 32768);
            text[n++] = i % 2 ? x % 256 : x % 5 ? ' ' + x / 8 % 95 : 0xC3 + x % 3 * 13;
        }
        int64_t count = gf_tokenize(vocab, text, n, ids);
        int64_t length = gf_detokenize(vocab, ids, count, back, sizeof(back));
        bad += length != n || memcmp(text, back, n) != 0;
    }
    check(bad == 0, "%s: %d random texts encoded and decoded, %d came back changed", name, rounds, bad);
}

static void check_tokenizer(const char *path) {
    const char *vocab = vocabulary();
    check_round_trips(NULL, "bytes");
    if (!vocab) {
        skip("%s: no vocabulary: GOLDFINCH_VOCAB=FILE names one, prepro_minipile.py fetches it", path);
        return;
    }
    FILE *file = fopen(path, "r");
    if (!file) fail("%s: cannot be read", path);
    static char line[65536];
    static unsigned char text[32768];
    static int got[32768];
    int cases = 0, bad = 0;
    while (fgets(line, sizeof(line), file)) {
        char *hex = strstr(line, "\"hex\": \""), *ids = strstr(line, "\"ids\": [");
        if (!hex || !ids) fail("%s: line %d: expected hex and ids", path, cases + 1);
        int n = 0, wrong = 0;
        unsigned byte;
        for (hex += 8; sscanf(hex, "%2x", &byte) == 1; hex += 2) text[n++] = byte;
        int64_t count = gf_tokenize(vocab, text, n, got), i = 0;
        for (ids += 8; *ids && *ids != ']'; ids += strspn(ids, ", ")) {
            long id = strtol(ids, &ids, 10);
            wrong |= i >= count || got[i] != id;
            i++;
        }
        bad += wrong || i != count;
        cases++;
    }
    fclose(file);
    check(cases > 0 && bad == 0, "%s: %d texts, %d with other ids", path, cases, bad);
    check_round_trips(vocab, "World tokenizer");
    // what is not valid UTF-8 prints as U+FFFD, each byte that cannot belong to a character and each broken beginning
    static const char raw[] = "a\xC3\xA9\xFFz\xE2\x82\xAC\xED\xA0\x80\xF0\x9F\x98",
                      valid[] = "a\xC3\xA9\xEF\xBF\xBDz\xE2\x82\xAC"
                                "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD";
    int64_t n = gf_printable((const unsigned char *)raw, sizeof(raw) - 1, text);
    check(n == sizeof(valid) - 1 && memcmp(text, valid, n) == 0, "bytes that are not UTF-8 print as U+FFFD");
}

static int numbers(const char *text, int *out) { // "5,9,31" or "-"; returns how many
    int n = 0;
    char *end;
    for (; *text >= '0' && *text <= '9'; text = *end == ',' ? end + 1 : end) out[n++] = strtol(text, &end, 10);
    return n;
}

static const char *field(const char *line, const char *name) {
    const char *at = strstr(line, name);
    if (!at) fail("sampling cases: expected a field %s in: %s", name, line);
    return at + strlen(name);
}

static void check_sampling(const char *path) {
    FILE *file = fopen(path, "r");
    if (!file) fail("%s: cannot be read", path);
    size_t room = 1 << 22;
    char *line = zeros(room, 1), name[64], hashed[96];
    while (fgets(line, room, file)) {
        if (strncmp(line, "case ", 5) != 0) continue;
        int history[256], uncounted[256], banned[256], V = atoi(field(line, " V=")), drawn, wrong = 0, listed = 0;
        sscanf(field(line, "name="), "%63s", name);
        double scale = atof(field(line, "scale=")), temperature = atof(field(line, "temperature=")), worst = 0, sum = 0;
        double top_p = atof(field(line, "top_p=")), presence = atof(field(line, "presence="));
        double frequency = atof(field(line, "frequency=")), decay = atof(field(line, "decay="));
        int top_k = atoi(field(line, "top_k=")), n_history = numbers(field(line, "history="), history);
        int n_uncounted = numbers(field(line, "uncounted="), uncounted),
            n_banned = numbers(field(line, "banned="), banned);
        float *logits = zeros(V, sizeof(float)), *p = zeros(V, sizeof(float)), *want = zeros(V, sizeof(float));
        snprintf(hashed, sizeof(hashed), "logits:%s", name);
        for (int i = 0; i < V; i++) logits[i] = scale * uniform(name_hash(hashed), i);
        if (!fgets(line, room, file) || strncmp(line, "probs ", 6) != 0) fail("%s: %s: expected probs", path, name);
        char *at = line + 6;
        for (; *at && *at != '\n'; at += strspn(at, " ")) {
            long id = strtol(at, &at, 10);
            want[id] = strtod(at + 1, &at);
            listed++;
        }
        for (int round = 0; round < 3; round++) { // the number drawn with: 0, 0.5, just below 1
            double number = round / 2.0 - (round == 2) * 1e-12, below = 0;
            gf_sample_probabilities(logits, V, history, n_history, uncounted, n_uncounted, banned, n_banned,
                                    temperature, top_p, top_k, presence, frequency, decay, p, number, &drawn);
            for (int i = 0; i < drawn; i++) below += p[i];
            wrong += !(drawn >= 0 && p[drawn] > 0 && below <= number + 1e-5 && number <= below + p[drawn] + 1e-5);
        }
        for (int i = 0; i < V; i++) {
            worst = fmax(worst, fabs(p[i] - want[i]));
            wrong += (p[i] > 0) != (want[i] > 0) && fmax(p[i], want[i]) > 1e-9;
            sum += p[i];
        }
        gf_sample_probabilities(logits, V, history, n_history, uncounted, n_uncounted, banned, n_banned, 0, top_p,
                                top_k, presence, frequency, decay, p, 0.9, &drawn);
        int likeliest = 0;
        for (int i = 1; i < V; i++) likeliest = want[i] > want[likeliest] ? i : likeliest;
        check(worst <= 1e-5 && wrong == 0 && fabs(sum - 1) < 1e-5 && drawn == likeliest,
              "sampling %s: %d tokens may be drawn, probabilities off by up to %.1e, allowed 1e-05; %d drawn wrong",
              name, listed, worst, wrong);
        free(logits), free(p), free(want);
    }
    free(line);
    fclose(file);
}

static void check_golden(const char *path) {
    if (ends_with(path, "tokenizer.jsonl")) {
        check_tokenizer(path);
        return;
    }
    if (ends_with(path, "sampling.txt")) {
        check_sampling(path);
        return;
    }
    Table *t = table_read(path);
    const Settings *s = &t->s;
    if (*t->unknown) skip("%s: setting %s is not built yet", t->name, t->unknown);
    else if (!ref_supported(s)) skip("%s: tmix %s %s, cmix %s is not built yet", t->name, s->tmix, s->tmix2, s->cmix);
    else {
        Ref *m = ref_create(s);
        hash_weights(m);
        if (t->n_steps) check_training_table(t, m);
        else check_table(t, m);
        ref_free(m);
    }
    table_free(t);
}

// --------------------------------------------------------------------------------------------------------------------
// Data: sampler and a binidx pair. (Damaged files end the program that opens them: dev/test.sh.)

static char golden_folder[1024];

static void check_sampler(void) {
    char path[1100];
    snprintf(path, sizeof(path), "%s/data/sampler.txt", golden_folder);
    FILE *f = fopen(path, "r");
    if (!f) fail("%s: cannot be opened", path);
    long long tokens, ctx_len, want;
    int good = 1, cases = 0;
    while (fscanf(f, " data_size %lld ctx_len %lld magic_prime %lld offsets_of_samples_1_to_12", &tokens, &ctx_len,
                  &want) == 3) {
        int64_t prime, offsets[12];
        gf_sampler(tokens, ctx_len, &prime, 12, offsets);
        cases++;
        if (prime != want) good = 0, note("%lld tokens: prime %lld instead of %lld", tokens, (long long)prime, want);
        for (int i = 0; i < 12 && fscanf(f, "%lld", &want) == 1; i++) {
            if (offsets[i] == want) continue;
            note("%lld tokens, sample %d: starts at %lld instead of %lld", tokens, i + 1, (long long)offsets[i], want);
            good = 0;
        }
    }
    fclose(f);
    check(good && cases == 6, "sampler: primes and offsets of %d datasets", cases);
}

// data/sample.* hold the documents of data/tokenizer.jsonl that have tokens, each with a 0 appended.
static void check_binidx(const char *prefix) {
    char path[1100];
    snprintf(path, sizeof(path), "%s/data/tokenizer.jsonl", golden_folder);
    FILE *f = fopen(path, "r");
    if (!f) fail("%s: cannot be opened", path);
    char line[4096];
    int32_t tokens[4096];
    int64_t n_docs = 0, n = gf_binidx(prefix, &n_docs, tokens, 4096), want = 0, want_docs = 0;
    int same = n <= 4096;
    while (fgets(line, sizeof(line), f)) {
        char *at = strstr(line, "\"ids\": [") + 8, *end;
        if (*at == ']') continue;
        for (; *at != ']'; at = end + strspn(end, ", ")) same = same && tokens[want++ % 4096] == strtol(at, &end, 10);
        same = same && tokens[want++ % 4096] == 0;
        want_docs++;
    }
    fclose(f);
    check(same && n == want && n_docs == want_docs, "binidx: %lld documents, %lld tokens", (long long)n_docs,
          (long long)n);
}

static void check_learning_rates(void) {
    static const char *const types[4] = {"cos", "linear", "exp", "oneminussqrt"};
    for (int i = 0; i < 4; i++) {
        double worst = 0;
        for (int waits = 0; waits < 2; waits++) {
            Settings s = settings_of("micro_bsz=2 accumulate_grad_batches=2 lr_init=6e-3 lr_final=2e-3 tmix2=gold");
            s.my_exit_tokens = 30 * 2 * 2 * 64;
            s.warmup_steps = waits ? 0 : 5;
            s.lr_wait = waits ? 0.25 : 0;
            snprintf(s.lr_decay_type, sizeof(s.lr_decay_type), "%s", types[i]);
            Arguments a;
            arguments_of(&a, &s);
            for (int step = 0; step < 40; step++) // ten of them after the end
                worst = fmax(worst, relative(gf_learning_rate(a.n, a.list, step), ref_learning_rate(&s, step)));
        }
        check(worst <= 1e-6, "learning rate %s, with warmup and lr_wait: %.1e", types[i], worst);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// The reference alone: its gradients against finite differences of its loss

// For each tensor the derivative along d = gradient / |gradient| + random direction / |random direction|.
// The weights are float, so the differences carry noise of about 1e-7 / (2 step) beside the gradient's norm. A large
// divisor (eps 0.1 instead of 6.4e-4) keeps the group norms, whose curvature is 1/eps where y is small, straight over a
// step.
static void check_finite_differences(void) {
    static const char *const variants[] = {
        "tmix2=gold",
        "tmix2=gold parallel=1 use_v2=0 use_one_minus_w=0",
        "tmix2=gold tmix=x060 rope.base=100 head_size_divisor=100",
        "tmix=x060b tmix2=llama cmix2=llama rope.base=50 rope.rescale=2",
        "tmix=x052 cmix=x052 tmix2=gptalpha brope.rescale=2 head_size_divisor=100",
    };
    for (size_t variant = 0; variant < sizeof(variants) / sizeof(*variants); variant++) {
        char text[160];
        snprintf(text, sizeof(text), "n_layer=3 n_embd=64 vocab_size=24 dim_ffn=64 %s", variants[variant]);
        Settings s = settings_of(text);
        Ref *m = ref_create(&s);
        hash_weights(m);
        hash_tokens("finite_differences", 2, 9, m->V);
        ref_forward(m, inputs, targets, 2, 9);
        ref_backward(m, inputs, targets, 1);
        double worst = 0, step = 2e-3;
        const char *where = "";
        for (int i = 0; i < m->n_params; i++) {
            Param *p = &m->params[i];
            if (zero_beside(m, p)) continue;
            float *w = zeros(p->size, sizeof(float)), *d = zeros(p->size, sizeof(float));
            memcpy(w, p->w, p->size * sizeof(float));
            for (int64_t j = 0; j < p->size; j++) d[j] = uniform(name_hash("direction"), j);
            double g_norm = norm_of(p->g, p->size), d_norm = norm_of(d, p->size), expected = 0, loss[2];
            for (int64_t j = 0; j < p->size; j++) {
                d[j] = p->g[j] / g_norm + d[j] / d_norm;
                expected += (double)p->g[j] * d[j];
            }
            for (int side = 0; side < 2; side++) {
                for (int64_t j = 0; j < p->size; j++) p->w[j] = w[j] + (side ? step : -step) * d[j];
                loss[side] = ref_forward(m, inputs, targets, 2, 9).objective;
            }
            memcpy(p->w, w, p->size * sizeof(float));
            double error = fabs((loss[1] - loss[0]) / (2 * step) - expected) / g_norm;
            if (!(error <= worst)) worst = error, where = p->name;
            free(w);
            free(d);
        }
        check(worst <= 2e-3, "C reference's gradients against finite differences (%s): up to %.1e (%s)",
              variants[variant], worst, where);
        ref_free(m);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// WKV at extreme decays and odd lengths, against the recurrence in double, channel by channel

static float to_storage(double x) { // what this build stores: fp32, or bf16 rounded to nearest even
    return gf_precision() == 32 ? (float)x : bf16(x);
}

static float *random_array(const char *name, int salt, int64_t n, double offset, double scale) {
    float *x = zeros(n, sizeof(float));
    uint64_t hash = name_hash(name) + salt;
    for (int64_t i = 0; i < n; i++) x[i] = to_storage(offset + scale * uniform(hash, i));
    return x;
}

// Largest |difference| / |reference| of any channel. got, want (rows, channels).
// A channel of strong decay has gradients of w near exp(w - exp(w)), 1e-22 at w = 4: beyond that they leave the range
// of float. So no channel's norm counts as less than 1e-8 of the average (rms) channel's.
static double channel_error(const float *got, const float *want, int rows, int channels) {
    double floor = 1e-8 * norm_of(want, (int64_t)rows * channels) / sqrt(channels), worst = 0;
    for (int c = 0; c < channels; c++) {
        double off = 0, norm = 0;
        for (int t = 0; t < rows; t++) {
            double a = got[t * channels + c], b = want[t * channels + c];
            off += (a - b) * (a - b);
            norm += b * b;
        }
        double error = off == 0 ? 0 : sqrt(off) / fmax(sqrt(norm), floor);
        if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
    }
    return worst;
}

static void check_wkv(void) {
    static const struct {
        const char *name;
        double offset, scale;
    } decays[] = {
        {"random in [-10, 4]", -3, 7},
        {"-10", -10, 0},
        {"-6", -6, 0},
        {"-1", -1, 0},
        {"2", 2, 0},
        {"4", 4, 0},
        {"random in [-15, 20]", 2.5, 17.5},
        {"-15", -15, 0},
        {"20", 20, 0},
        {"from -10 to 4 over the channels", 0, 0},
    };
    static const int lengths[] = {1, 15, 16, 17, 63, 64, 65, 100, 129};
    static const char *const names[6] = {"y", "dr", "dk", "dv", "dw", "du"};
    const int H = 2, A = H * N;
    double limit = gf_precision() == 16 ? 1 / 128.0 : 1e-5;
    for (int i = 0; i < 10; i++) {
        double worst = 0;
        char where[64] = "";
        for (int j = 0; j < 9; j++) {
            int T = lengths[j], n = T * A, one_minus_w = (i + j) % 2, with_u = (i + j) / 2 % 2;
            float *r = random_array("r", j, n, 0, 1), *k = random_array("k", j, n, 0, 1);
            float *v = random_array("v", j, n, 0, 1), *w = random_array("w", j, n, decays[i].offset, decays[i].scale);
            float *dy = random_array("dy", j, n, 0, 1);
            float *u = with_u ? random_array("u", j, A, 0, 1) : NULL, *kw = zeros(n, sizeof(float)), *got[6], *want[6];
            for (int c = 0; c < n && i == 9; c++) w[c] = to_storage(-10 + 14.0 * (c % A) / (A - 1));
            for (int x = 0; x < 6; x++) {
                got[x] = zeros(n, sizeof(float));
                want[x] = zeros(n, sizeof(float));
                for (int c = 0; c < n; c++) got[x][c] = NAN; // all of it must be written
            }
            for (int c = 0; c < n; c++) kw[c] = one_minus_w ? k[c] * -expm1(-exp(w[c])) : k[c];
            wkv(want[0], r, kw, v, w, u, 1, T, H);
            wkv_backward(want[1], want[2], want[3], want[4], want[5], dy, r, kw, v, w, u, 1, T, H);
            for (int c = 0; c < n && one_minus_w; c++) {
                want[4][c] -= want[2][c] * k[c] * decay_gradient(w[c]);
                want[2][c] *= -expm1(-exp(w[c]));
            }
            gf_wkv(1, T, H, r, k, v, w, u, one_minus_w, got[0], dy, got[1], got[2], got[3], got[4],
                   with_u ? got[5] : NULL);
            for (int x = 0; x < 5 + with_u; x++) {
                // u's gradient is one number per channel, a sum that may cancel: taken as one channel
                double error = x == 5 ? channel_error(got[x], want[x], A, 1) : channel_error(got[x], want[x], T, A);
                if (error <= worst) continue;
                worst = error;
                snprintf(where, sizeof(where), "%s at T = %d%s%s", names[x], T, with_u ? ", u" : "",
                         one_minus_w ? ", 1 - w" : "");
            }
            for (int x = 0; x < 6; x++) free(got[x]), free(want[x]);
            free(r), free(k), free(v), free(w), free(dy), free(u), free(kw);
        }
        check(worst <= limit, "WKV, w %s: worst channel %.1e, allowed %.1e (%s)", decays[i].name, worst, limit, where);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// rope far out, where fp32 angles would be off by 1e-2 and more

static void check_rope(void) {
    static const char *const settings[] = {
        "rope.base=10000",
        "rope.base=500 rope.rebase=4 rope.rescale=3",
        "brope.rescale=1.5 ctx_len=5000",
    };
    const int rows = 7, A = 2 * N;
    const double limit = gf_precision() == 16 ? 4e-3 : 1e-6;
    for (int i = 0; i < 3; i++) {
        Settings s = settings_of(settings[i]);
        Arguments a;
        arguments_of(&a, &s);
        double worst = 0;
        for (int64_t first = 0; first < 3000000; first = 3 * first + 1000) {
            float *x = random_array("rope", i, rows * A, 0, 1), *got = zeros(rows * A, sizeof(float));
            memcpy(got, x, rows * A * sizeof(float));
            gf_rope(a.n, a.list, first, rows, A, got);
            for (int c = 0; c < rows * A; c += 2) {
                double angle = (double)(first + c / A) * rope_velocity(&s, c % N / 2);
                double want[2] = {x[c] * cos(angle) - x[c + 1] * sin(angle), x[c] * sin(angle) + x[c + 1] * cos(angle)};
                for (int e = 0; e < 2; e++) worst = fmax(worst, fabs(got[c + e] - want[e]));
            }
            free(x), free(got);
        }
        check(worst <= limit, "%s, positions up to 2 million: off by %.1e, allowed %.0e", settings[i], worst, limit);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Weights in 8 bits (--weights int8): row = scale * whole numbers, scale = largest |entry| / 127

// w (rows, columns), of which the entries of a row lie `apart`, becomes what 8 bits make of it.
static void round_to_int8(float *w, int64_t rows, int64_t columns, int64_t row_apart, int64_t apart) {
    for (int64_t i = 0; i < rows; i++) {
        float *row = w + i * row_apart, largest = 0;
        for (int64_t j = 0; j < columns; j++) largest = fmaxf(largest, fabsf(to_storage(row[j * apart])));
        float scale = largest / 127;
        for (int64_t j = 0; j < columns && scale > 0; j++)
            row[j * apart] = scale * rintf(to_storage(row[j * apart]) / scale);
    }
}

// A matrix with a row of zeros, one of a single number, one of large numbers and one that is not finite
static void check_int8_matrix(int rows, int columns) {
    const int64_t n = (int64_t)rows * columns;
    float *w = random_array("int8", rows, n, 0, 0.1), *x = random_array("int8 x", columns, columns, 0, 1);
    float *scales = zeros(rows, sizeof(float)), *y = zeros(4 * rows, sizeof(float));
    signed char *whole = zeros(n, 1);
    memset(w, 0, columns * sizeof(float));
    memset(w + columns, 0, columns * sizeof(float));
    w[columns + columns / 2] = to_storage(-3);
    for (int j = 0; j < columns; j++) w[2 * columns + j] = to_storage(1e6 * w[2 * columns + j]);
    w[3 * columns + columns - 1] = INFINITY;
    gf_int8(rows, columns, w, x, 2, whole, scales, y);
    double worst = 0, product[3] = {0, 0, 0}, length = norm_of(x, columns);
    int good = isnan(scales[3]) && isnan(y[3]) && isnan(y[rows + 3]) && isnan(y[2 * rows + 3]);
    good = good && scales[0] == 0 && whole[columns + columns / 2] == -127;
    for (int i = 0; i < rows; i++) {
        const float *row = w + (int64_t)i * columns;
        double want = 0, largest = 1e-30;
        if (i == 3) continue;
        for (int j = 0; j < columns; j++) {
            double number = (double)whole[(int64_t)i * columns + j] * scales[i], error = fabs(number - row[j]);
            if (error > 0) worst = fmax(worst, error / scales[i]);
            want += number * x[j];
            largest = fmax(largest, fabs(row[j]));
        }
        for (int k = 0; k < 3; k++) {
            double error = fabs(y[k * rows + i] - want) / (largest * length);
            if (!(error <= product[k])) product[k] = error;
        }
    }
    const double limit = 1e-5, of_prefill = gf_precision() == 16 ? 1e-2 : limit;
    check(good, "int8, %d x %d: rows of zeros, of one number, and with one that is not finite", rows, columns);
    check(worst <= 0.5001, "int8, %d x %d: entries off by %.4f of a step, allowed 0.5001", rows, columns, worst);
    check(product[0] <= limit && product[1] <= limit && product[2] <= of_prefill,
          "int8, %d x %d: products of a step %.1e, by its kernel %.1e, allowed %.0e; of pre-fill %.1e, allowed %.0e",
          rows, columns, product[0], product[1], limit, product[2], of_prefill);
    check(memcmp(y + rows, y + 3 * rows, 3 * sizeof(float)) == 0 &&
              memcmp(y + rows + 4, y + 3 * rows + 4, (rows - 4) * sizeof(float)) == 0,
          "int8, %d x %d: the same bits where shared memory is small and blocks are few", rows, columns);
    memset(x, 0, columns * sizeof(float));
    gf_int8(rows, columns, w, x, 1, whole, scales, y);
    for (int i = 0; i < rows; i++) good = good && (i == 3 || (y[rows + i] == 0 && y[3 * rows + i] == 0));
    x[columns - 1] = INFINITY;
    gf_int8(rows, columns, w, x, 3, whole, scales, y);
    for (int i = 0; i < rows; i++) good = good && !isfinite(y[rows + i]) && !isfinite(y[3 * rows + i]);
    check(good, "int8, %d x %d: x of zeros, and with one that is not finite", rows, columns);
    free(w), free(x), free(scales), free(y), free(whole);
}

// Pre-fill and decode in 8 bits against the reference with the weights that these stand for
static void check_int8_model(const char *settings, int B, int T) {
    Model *k;
    Ref *m = small_model(settings, settings, B, T, &k);
    const int V = m->V;
    const int64_t n = (int64_t)B * T * V;
    float *got = zeros((int64_t)T * V, sizeof(float)), *first = zeros((int64_t)T * V, sizeof(float));
    ref_forward(m, inputs, targets, B, T);
    float *whole = copy_of(saved(m, -1, "logits"), n); // with the weights as they are
    for (int i = 0; i < m->n_params; i++) {
        const Param *p = &m->params[i];
        const int64_t *shape = p->shape;
        if (p->ndim == 2 && ends_with(p->name, ".weight") && strcmp(p->name, "emb.weight") &&
            strncmp(p->name, "w_kv_cache", 10))
            round_to_int8(p->w, shape[0], shape[1], shape[1], 1);
        // Finch-C2's, whose steps read them beside its matrices
        if ((ends_with(p->name, "att.time_decay_w1") || ends_with(p->name, "att.time_value2_w1")) &&
            !strncmp(m->s.tmix, "x060c2", 7) && param(m, p->layer, "att.time_value2_w1"))
            round_to_int8(p->w, shape[1], shape[0], 1, shape[1]);
    }
    ref_forward(m, inputs, targets, B, T);
    const float *want = saved(m, -1, "logits");
    double prefill = 0, decode = 0, apart = 0, score = 0;
    for (int chunk = 1; chunk <= T; chunk += T - 1) {
        Infer *f = gf_infer_create(k, 0, T, chunk, T > 8 ? 8 : T, 0, 1);
        for (int b = 0; b < B; b++) {
            const float *rows = want + (int64_t)b * T * V;
            gf_infer_reset(f);
            for (int i = 0; i < T && chunk == 1; i++) gf_infer_feed(f, inputs + b * T + i, 1, 0, got + (int64_t)i * V);
            if (chunk > 1) gf_infer_feed(f, inputs + b * T, T, 1, got);
            double *error = chunk == 1 ? &decode : &prefill;
            *error = fmax(*error, rows_error(got, rows, T, V));
            if (b > 0) continue;
            if (chunk > 1) apart = rows_error(got, first, T, V), score = gf_infer_score(f, inputs, T, 0, 0);
            else memcpy(first, got, (size_t)T * V * sizeof(float));
        }
        gf_infer_free(f);
    }
    double limit = gf_precision() == 16 ? 5e-2 : 1e-4, effect = rows_error(want, whole, B * T, V),
           expected = loss(want, inputs + 1, V, T - 1).cross_entropy, off = relative(score, expected);
    check(prefill <= limit && decode <= limit && apart <= limit && off <= limit,
          "%s, int8: logits of pre-fill %.1e, of decode %.1e, the one against the other %.1e, score %.1e; allowed %.0e",
          settings, prefill, decode, apart, off, limit);
    check(effect > 3e-4 && effect < 0.1,
          "%s, int8: other logits than those of the weights as they are: %.1e, expected "
          "3e-4 to 1e-1",
          settings, effect);
    free(got), free(first), free(whole);
    free_both(m, k);
}

// Contexts of different lengths that step together. One (number 5) takes the slot of another (1) that has ended.
enum { CONTEXTS = 6, BATCH_STEPS = 10 };
static const int context_length[CONTEXTS] = {1, 3, 9, 16, 20, 5}, context_begin[CONTEXTS] = {0, 0, 0, 2, 0, 5},
                 context_end[CONTEXTS] = {10, 4, 10, 10, 10, 10}, context_slot[CONTEXTS] = {0, 1, 2, 3, 4, 1};

// Token number i of a context
static int context_token(int context, int i) { return inputs[5 * context + i]; }

static void feed_context(Infer *f, int context, float *logits) {
    int ids[32];
    for (int i = 0; i < context_length[context]; i++) ids[i] = context_token(context, i);
    gf_infer_reset(f);
    gf_infer_feed(f, ids, context_length[context], 0, logits);
}

// Logits (CONTEXTS, BATCH_STEPS, V) after each step of those contexts whose bit is in `who`; slots in the order of the
// contexts, or turned around.
static void run_batch(Infer *f, int V, int slots, int window, unsigned who, int turned, float *got) {
    Infer *b = gf_batch_create(f, slots, 32, window);
    int *ids = zeros(slots, sizeof(int));
    float *logits = zeros((int64_t)slots * V, sizeof(float));
    for (int step = 0; step < BATCH_STEPS; step++) {
        for (int i = 0; i < CONTEXTS; i++) {
            int slot = turned ? slots - 1 - context_slot[i] : context_slot[i], at = step - context_begin[i];
            if (!(who >> i & 1)) continue;
            if (at == 0) feed_context(f, i, logits), gf_batch_take(b, slot, f);
            if (step == context_end[i]) gf_batch_rest(b, slot);
            ids[slot] = step < context_end[i] && at >= 0 ? context_token(i, context_length[i] + at) : ids[slot];
        }
        gf_batch_step(b, ids, logits);
        for (int i = 0; i < CONTEXTS; i++) {
            int slot = turned ? slots - 1 - context_slot[i] : context_slot[i];
            if ((who >> i & 1) && step >= context_begin[i] && step < context_end[i])
                memcpy(got + ((int64_t)i * BATCH_STEPS + step) * V, logits + (int64_t)slot * V, V * sizeof(float));
        }
    }
    gf_batch_free(b);
    free(ids), free(logits);
}

// Several contexts at once: the logits of each are those of the context by itself but for rounding, and the same bits
// whoever is beside it, in whichever slot, in a batch of whatever size. read_window: of what reads the prompts
static void check_batch(const char *settings, int kv, int window, int read_window, int small, int int8) {
    Model *k;
    Ref *m = small_model(settings, settings, 1, 64, &k);
    const int V = m->V;
    const int64_t n = (int64_t)BATCH_STEPS * V, all = CONTEXTS * n;
    float *want = zeros(all, sizeof(float)), *got = zeros(all, sizeof(float)), *other = zeros(all, sizeof(float));
    Infer *f = gf_infer_create(k, kv, 32, 16, read_window, small, int8);
    double apart = 0;
    for (int i = 0; i < CONTEXTS; i++) {
        feed_context(f, i, other);
        for (int step = context_begin[i]; step < context_end[i]; step++) {
            const int id = context_token(i, context_length[i] + step - context_begin[i]);
            gf_infer_feed(f, &id, 1, 0, want + i * n + (int64_t)step * V);
        }
    }
    run_batch(f, V, 5, window, 63, 0, got);
    for (int i = 0; i < CONTEXTS; i++) {
        const int64_t at = i * n + (int64_t)context_begin[i] * V;
        apart = fmax(apart, rows_error(got + at, want + at, context_end[i] - context_begin[i], V));
    }
    // In BF16 a last bit of what a product multiplies is 4e-3 of it; in FP32 what is left is the order of sums.
    const double limit = gf_precision() == 16 ? 2e-2 : 1e-5;
    check(apart <= limit, "%s%s: several contexts at once against one by one, logits %.1e apart, allowed %.0e",
          settings, int8 ? ", int8" : "", apart, limit);
    run_batch(f, V, 11, window, 63, 1, other);
    int same = memcmp(got, other, all * sizeof(float)) == 0;
    check(same, "%s%s: the same bits in other slots of a larger batch", settings, int8 ? ", int8" : "");
    same = 1;
    for (int i = 0; i < CONTEXTS; i += 3) {
        run_batch(f, V, 5, window, 1u << i, 1, other);
        same = same && memcmp(got + i * n, other + i * n, n * sizeof(float)) == 0;
    }
    check(same, "%s%s: and of a context by itself", settings, int8 ? ", int8" : "");
    gf_infer_free(f);
    free(want), free(got), free(other);
    free_both(m, k);
}

static void check_batches(void) {
    const char *plain = "n_layer=3 tmix2=gold";
    check_batch(plain, 0, 32, 32, 0, 0);
    check_batch(plain, 1, 8, 20, 1, 1);
    check_batch("n_layer=3 tmix2=gold n_embd=192 kv_cache_compression_ratio=64 vocab_size=264 dim_ffn=96", 2, 32, 32, 0,
                0);
    check_batch("n_layer=3 tmix2=gold use_v2=0 rope.base=100", 0, 24, 8, 0, 0);
    check_batch("n_layer=2 parallel=1", 0, 32, 32, 0, 0);
}

static void check_int8(void) {
    check_int8_matrix(5, 32);
    check_int8_matrix(1201, 96); // more rows a block than have sums at once
    check_int8_matrix(67, 2080); // more than one part of a row
    check_int8_matrix(37, 7168);
    check_int8_model("n_layer=3 tmix2=gold", 2, 21);
    check_int8_model("n_layer=3 tmix2=gold n_embd=192 kv_cache_compression_ratio=64 vocab_size=264 dim_ffn=96", 1, 13);
    check_int8_model("n_layer=3 tmix2=gold use_v2=0 rope.base=100", 1, 17);
    check_int8_model("n_layer=4 tmix=x060 tmix2=llama cmix2=llama inv_other_layer_ratio=2 rope.base=100", 2, 9);
}

// --------------------------------------------------------------------------------------------------------------------
// Initial values (spec section 7)

// The value of entry i where the initializer is a formula.
static double initial_value(const Ref *m, const Param *p, int64_t i) {
    double L = m->L, l = p->layer, depth = m->L > 1 ? l / (L - 1) : 0, q = 1 - l / L;
    double d = (double)i / p->size; // of a vector over C channels
    double n = (double)i / (p->size - 1);
    switch (p->row->init) {
    case ONE: return 1;
    case MIX: return 1 - pow(d, q);
    case MIX_HALF: return 1 - pow(d, q / 2);
    case MIX_V: return 1 - (pow(d, q) + 0.3 * depth);
    case EAGLE_MIX: return pow(d, q);
    case EAGLE_MIX_HALF: return pow(d, q / 2);
    case EAGLE_MIX_V: return pow(d, q) + 0.3 * depth;
    case TIME_DECAY: return -6 + 5 * pow(n, 0.7 + 1.3 * depth);
    case TIME_FAAAA: return depth * (1 - n) + 0.1 * ((i + 1) % 3 - 1.0);
    case LN_X: return pow((1 + l) / L, 0.7);
    default: return 0;
    }
}

// Largest entry of |W Wᵀ / gain² - 1| over the shorter side's vectors, which are orthogonal. W (out, in)
static double orthogonal_error(const float *W, int out, int in, double gain) {
    int n = out < in ? out : in, length = out < in ? in : out;
    int step = out < in ? in : 1, inner = out < in ? 1 : in; // from one vector to the next, and along a vector
    double worst = 0;
    for (int a = 0; a < n; a++) {
        for (int b = 0; b <= a; b++) {
            double sum = 0;
            for (int i = 0; i < length; i++) sum += (double)W[a * step + i * inner] * W[b * step + i * inner];
            worst = fmax(worst, fabs(sum / (gain * gain) - (a == b)));
        }
    }
    return worst;
}

static int initial_values_good(const Ref *m, const Param *p, const float *w) {
    double gain = 1, limit = 0, mean = 0, square = 0, largest = 0, n = p->size;
    for (int64_t i = 0; i < p->size; i++) {
        mean += w[i] / n;
        square += (double)w[i] * w[i] / n;
        largest = fmax(largest, fabs(w[i]));
    }
    switch (p->row->init) {
    case SMALL: limit = 0.01; break;
    case EMBEDDING: limit = 1e-4; break;
    case ORTHOGONAL: break;
    case ORTHOGONAL_KEY: gain = 0.1; break;
    case ORTHOGONAL_HEAD: gain = m->V > m->C ? 0.5 * sqrt((double)m->V / m->C) : 0.5; break;
    default:
        for (int64_t i = 0; i < p->size; i++)
            if (!(fabs(w[i] - initial_value(m, p, i)) <= 2e-6)) return 0;
        return 1;
    }
    if (!limit) { // orthogonal and random: the mean of n entries of variance `square` within 5 sigma, none dominant
        double error = orthogonal_error(w, p->shape[0], p->shape[1], gain);
        return error <= 1e-4 && fabs(mean) <= 5 * sqrt(square / n) && largest <= 0.7 * gain;
    }
    // uniform in +-limit: mean 0 (sigma limit / sqrt(3 n)), mean square limit² / 3 (sigma limit² sqrt(4 / 45 n))
    return largest <= limit * (1 + 1e-6) && largest > 0.99 * limit && fabs(mean) <= 5 * limit / sqrt(3 * n) &&
           fabs(square / (limit * limit) - 1.0 / 3) <= 5 * sqrt(4 / (45 * n));
}

static void check_initial_values(void) {
    static const char *const settings[] = {
        "n_layer=3 n_embd=128 tmix2=gold",    "n_layer=1 n_embd=192 dim_att=128 vocab_size=64",
        "n_layer=3 tmix=x060 tmix2=gptalpha", "n_layer=4 tmix=x052 cmix=x052 tmix2=x060b inv_other_layer_ratio=2",
        "n_layer=2 tmix=llama cmix=llama",
    };
    for (size_t i = 0; i < sizeof(settings) / sizeof(*settings); i++) {
        Settings s = settings_of(settings[i]);
        Ref *m = ref_create(&s);
        Model *k = kernels_create(&s, 1, 16);
        int good = same_tensors(m, k), again_same = 1, other_same = 0, random = 0;
        for (int seed = 1; seed >= 0 && good; seed--) { // seed 1, seed 0, and seed 0 again
            gf_init_weights(k, seed);
            for (int j = 0; j < m->n_params; j++) {
                Param *p = &m->params[j];
                float *w = kernels_param(k, p);
                if (!initial_values_good(m, p, w)) good = 0, note("%s: initial values, seed %d", p->name, seed);
                int is_random = p->row->init == SMALL || p->row->init == EMBEDDING || p->row->init >= ORTHOGONAL;
                random += is_random;
                other_same += is_random && !memcmp(p->w, w, p->size * sizeof(float));
                memcpy(p->w, w, p->size * sizeof(float));
                free(w);
            }
        }
        gf_init_weights(k, 0);
        for (int j = 0; j < m->n_params && good; j++) {
            float *w = kernels_param(k, &m->params[j]);
            again_same = again_same && !memcmp(m->params[j].w, w, m->params[j].size * sizeof(float));
            free(w);
        }
        check(good && again_same && !other_same, "initial values (%s): %d tensors, %d of them random", settings[i],
              m->n_params, random / 2);
        if (!again_same) note("one seed gave two different sets of weights");
        if (other_same) note("%d random tensors are the same for two seeds", other_same);
        gf_free(k);
        ref_free(m);
    }
    Settings s = settings_of("n_layer=3 tmix2=gold layerwise_lr=0");
    Ref *m = ref_create(&s);
    Model *k = kernels_create(&s, 1, 16);
    check(same_tensors(m, k), "optimizer groups with layerwise_lr 0");
    free_both(m, k);
}

// --------------------------------------------------------------------------------------------------------------------
// The kernels on shapes that the tables do not have

// A window that five blocks share: most of them see nothing of the first token.
static void check_first_token(const char *title, Ref *m, Model *k) {
    float *want = kernels_activation(k, "logits", m->V), *got = zeros(m->V, sizeof(float));
    Infer *f = gf_infer_create(k, 0, 160, 1, 160, 0, 0);
    gf_infer_feed(f, inputs, 1, 0, got);
    double error = rows_error(got, want, 1, m->V), limit = gf_precision() == 16 ? 5e-2 : 1e-4;
    check(error <= limit, "%s: one token by itself, decoded: logits %.1e, allowed %.0e", title, error, limit);
    gf_infer_free(f);
    free(want), free(got);
}

static void check_shapes(void) {
    static const struct {
        const char *settings;
        int B, T;
    } cases[] = {
        {"n_layer=3 tmix2=gold", 1, 1},
        {"n_layer=3 tmix2=gold", 5, 1},
        {"n_layer=3 tmix2=gold", 3, 17},
        {"n_layer=3 tmix2=gold ctx_len=80 kv_cache_compression_ratio=64", 1, 65},
        {"n_layer=3 tmix2=gold n_embd=192 kv_cache_compression_ratio=64 vocab_size=264 dim_ffn=96", 2, 13},
        {"n_layer=4 tmix2=gold inv_other_layer_ratio=2 kv_cache_compression_ratio=2 use_v2=0", 1, 31},
        {"n_layer=3 tmix2=gold kv_cache_compression_ratio=5 use_one_minus_w=0 parallel=1 use_v2=0", 3, 9},
        {"n_layer=1 n_embd=64 dim_att=128 vocab_size=64", 7, 5},
        {"n_layer=2 tmix=x060 head_size_divisor=4", 2, 1},
        {"n_layer=2 tmix=x060 n_embd=192 parallel=1", 2, 17},
        {"n_layer=2 tmix=x060b dim_att=192", 1, 33},
        {"n_layer=2 tmix=x052 cmix=x052 n_embd=192 dim_att=64", 3, 19},
        {"n_layer=6 tmix=x060 tmix2=gold inv_other_layer_ratio=6 head_size_divisor=64 rope.base=500 rope.rebase=3 "
         "rope.rescale=2",
         2, 9},
        {"n_layer=2 tmix=gptalpha dim_att=192 rope.base=10000", 1, 70},
        {"n_layer=4 tmix=x052 tmix2=llama cmix2=llama inv_other_layer_ratio=2 brope.rescale=3 ctx_len=48", 2, 31},
        {"n_layer=3 tmix=llama cmix=llama tmix2=gold cmix2=x052 brope.rescale=0.5", 1, 12},
        {"n_layer=2 tmix=llama cmix=llama n_embd=192 rope.base=10000", 3, 1},
        {"n_layer=3 tmix=llama tmix2=gold rope.base=100", 1, 140},
        // R 64, rank padded to 64: older tokens by warpgroups; two tiles in a block, of 8 stages each
        {"n_layer=3 tmix2=gold kv_cache_compression_ratio=2 vocab_size=64 dim_ffn=64", 1, 66},
        // with the divisor's default, 8, GroupNorm scales a first token's small numbers up so far that five such layers
        // make any rounding 40 times as large as elsewhere
        {"n_layer=6 tmix=x060 tmix2=gold inv_other_layer_ratio=6 rope.base=500 rope.rebase=3 rope.rescale=2", 2, 9},
    };
    const size_t n_cases = sizeof(cases) / sizeof(*cases);
    Comparison *c = zeros(1, sizeof(Comparison));
    for (size_t i = 0; i < n_cases; i++) {
        int B = cases[i].B, T = cases[i].T;
        Model *k;
        Ref *m = small_model(cases[i].settings, cases[i].settings, B, T, &k);
        if (k) {
            double want = ref_forward(m, inputs, targets, B, T).cross_entropy, unused;
            ref_backward(m, inputs, targets, 1);
            gf_zero_grad(k);
            Ref *rounded = ref_rounded(m, &unused);
            compare_to_reference(c, m, k, rounded, gf_loss_backward(k, inputs, targets, B, T, 1), want, 0);
            ref_free(rounded);
            judge(c, "%s, %d x %d tokens", cases[i].settings, B, T);
            if (T > 64) check_inference(cases[i].settings, B, T, m, k); // more than one tile of a cache
            if (B == 1 && T == 1 && has_gold(m)) check_first_token(cases[i].settings, m, k);
        }
        free_both(m, k);
    }
    free(c);
}

// --------------------------------------------------------------------------------------------------------------------
// Micro-batches, recomputation, repetition, independence of sequences, the update, ties

// After a change of inputs: each one's target is the next, the last one's stays.
static void targets_follow(int B, int T) {
    for (int t = 0; t < B * T; t++) targets[t] = t % T < T - 1 ? inputs[t + 1] : targets[t];
}

// One pass over the batch from zero gradients; with `logits` 0 only loss and gradients.
static Bits kernels_pass(Ref *m, Model *k, int B, int T, int logits) {
    gf_zero_grad(k);
    double loss = gf_loss_backward(k, inputs, targets, B, T, 1);
    return kernels_bits(m, k, loss, logits ? B * T : 0);
}

static void check_bits(const char *settings) {
    int B = 2, T = 33;
    Model *k;
    Ref *m = small_model(settings, "determinism", B, T, &k);
    if (!k) return free_both(m, k);
    note("%s", settings);
    Bits first = kernels_pass(m, k, B, T, 1);
    check(same_bits(m, first, kernels_pass(m, k, B, T, 1)), "determinism: two passes, the same bits");
    Model *other = kernels_like(m, B + 1, 64, "determinism"); // has room for more than the batch
    check(same_bits(m, kernels_pass(m, k, B, T, 1), kernels_pass(m, other, B, T, 1)),
          "determinism: two models, one with room for more tokens, the same bits");
    gf_free(other);
    for (int cp = 1; cp <= 2; cp++) {
        m->s.grad_cp = cp;
        other = kernels_like(m, B, T, "grad_cp");
        check(same_bits(m, kernels_pass(m, k, B, T, 0), kernels_pass(m, other, B, T, 0)),
              "grad_cp %d: the bits of grad_cp 0", cp);
        gf_free(other);
    }

    // The second sequence must not notice the first, nor any token a later one.
    int64_t half = (int64_t)T * m->V, seen = 20 * m->V;
    gf_loss_backward(k, inputs, targets, B, T, 1);
    float *before = kernels_activation(k, "logits", B * half);
    for (int t = 0; t < T; t++) inputs[t] = (inputs[t] + 1 + t) % m->V;
    targets_follow(B, T);
    gf_loss_backward(k, inputs, targets, B, T, 1);
    float *after = kernels_activation(k, "logits", B * half);
    check(memcmp(before, after, half * sizeof(float)) && !memcmp(before + half, after + half, half * sizeof(float)),
          "sequences carry nothing over: other tokens in the first, the same logits in the second");
    for (int t = 20; t < T; t++) inputs[t] = inputs[T + t] = (inputs[t] + 1 + t) % m->V;
    targets_follow(B, T);
    gf_loss_backward(k, inputs, targets, B, T, 1);
    float *later = kernels_activation(k, "logits", B * half);
    check(!memcmp(after, later, seen * sizeof(float)) && !memcmp(after + half, later + half, seen * sizeof(float)) &&
              memcmp(after + seen, later + seen, m->V * sizeof(float)),
          "no token sees a later one: other tokens from the 21st on, the same logits before");
    free(before), free(after), free(later);
    free_both(m, k);
}

// The batch once more in micro-batches of one sequence, against the pass just done and its loss (want): the same sums
// in another order, in any precision. n: targets that count.
static void compare_micro_batches(Comparison *c, Ref *m, Model *k, int B, int T, int n, double want) {
    double loss = 0;
    *c = (Comparison){.limits = pass_limits};
    for (int i = 0; i < m->n_params; i++) gf_get_grad(k, kernels_index(k, m->params[i].name), m->params[i].g);
    gf_zero_grad(k);
    for (int b = 0; b < B; b++) loss += gf_masked_loss_backward(k, inputs + b * T, targets + b * T, 1, T, B, n);
    c->first = relative(loss, want);
    for (int i = 0; i < m->n_params; i++) {
        Param *p = &m->params[i];
        if (zero_beside(m, p)) continue;
        float *g = kernels_gradient(k, p);
        add_error(c->others, &c->n_others, p->name, tensor_error(g, p->g, p->size));
        free(g);
    }
}

static void check_accumulation(void) {
    int B = 4, T = 12;
    Model *k;
    Ref *m = small_model("n_layer=3 tmix2=gold", "accumulation", B, T, &k);
    if (!k) return free_both(m, k);
    Comparison *c = zeros(1, sizeof(Comparison));
    gf_zero_grad(k);
    compare_micro_batches(c, m, k, B, T, B * T, gf_loss_backward(k, inputs, targets, B, T, 1));
    judge(c, "accumulation: 4 micro-batches of 1 against 1 of 4");
    free(c);
    free_both(m, k);
}

// Some targets do not count: loss and gradients are means over those that do, whatever micro-batches they lie in.
static void check_mask(const char *settings, int B, int T) {
    Model *k;
    Ref *m = small_model(settings, "mask", B, T, &k);
    if (!k) return free_both(m, k);
    int all[4096], n_all = B * T;
    memcpy(all, targets, n_all * sizeof(int));
    Comparison *c = zeros(1, sizeof(Comparison));
    for (int kind = 0; kind < 3; kind++) { // mixed; only the first sequence's last; only the last one's first half
        for (int t = 0; t < n_all; t++) {
            int counts = kind == 0   ? t % 3 == 1 || t % 7 == 2
                         : kind == 1 ? t == T - 1
                                     : t >= n_all - T && t % T < T / 2;
            targets[t] = counts ? all[t] : -1;
        }
        const int n = count_targets(targets, n_all);
        double want = ref_forward(m, inputs, targets, B, T).cross_entropy, unused;
        ref_zero_grad(m);
        ref_backward(m, inputs, targets, 1);
        Ref *rounded = ref_rounded(m, &unused);
        gf_zero_grad(k);
        double loss = gf_masked_loss_backward(k, inputs, targets, B, T, 1, n);
        compare_to_reference(c, m, k, rounded, loss, want, 0);
        // Each target's rounding is a draw of its own: the mean over few is further off. Seen for one: 2.1e-3.
        if (gf_precision() == 16) c->limits.first_limit *= sqrt(fmax(1, 16. / n));
        ref_free(rounded);
        judge(c, "mask, %s: %d of %d targets count", settings, n, n_all);
        compare_micro_batches(c, m, k, B, T, n, loss);
        judge(c, "mask, %s: the same in micro-batches of one", settings);
    }
    for (int t = 0; t < n_all; t++) targets[t] = -1;
    gf_zero_grad(k);
    double loss = gf_masked_loss_backward(k, inputs, targets, B, T, 1, 0), norm = 0;
    for (int i = 0; i < m->n_params; i++) {
        float *g = kernels_gradient(k, &m->params[i]);
        norm += norm_of(g, m->params[i].size);
        free(g);
    }
    check(loss == 0 && norm == 0, "mask: no target counts: no loss (%g), no gradient (%g)", loss, norm);
    free(c);
    free_both(m, k);
}

// AdamW alone: the reference's update from the kernels' own gradients, so it holds in bf16 too (fp32 master weights).
static void check_update(void) {
    int B = 2, T = 16;
    Model *k;
    Ref *m = small_model("n_layer=3 tmix2=gold weight_decay=0.1 gradient_clip_val=0.5", "AdamW", B, T, &k);
    if (!k) return free_both(m, k);
    double worst = 0, norms = 0;
    const char *where = "";
    for (int step = 0; step < 3; step++) {
        gf_zero_grad(k);
        gf_loss_backward(k, inputs, targets, B, T, 1);
        for (int i = 0; i < m->n_params; i++) {
            Param *p = &m->params[i];
            gf_get_grad(k, kernels_index(k, p->name), p->g);
            gf_get_param(k, kernels_index(k, p->name), p->w);
        }
        double norm = gf_update(k, step, 1e-2);
        norms = fmax(norms, relative(norm, ref_update(m, step, 1e-2)));
        for (int i = 0; i < m->n_params; i++) {
            Param *p = &m->params[i];
            float *w = kernels_param(k, p);
            double error = distance(w, p->w, p->size) / norm_of(p->w, p->size);
            if (!(error <= worst)) worst = error, where = p->name;
            free(w);
        }
    }
    check(worst <= 1e-6 && norms <= 1e-5,
          "AdamW on the kernels' gradients, 3 steps: norms %.1e, weights up to %.1e (%s)", norms, worst, where);
    free_both(m, k);
}

// Two ids share the largest logit: the loss's extra term belongs to the lower one. ln_out is made to give 1/4 in every
// channel, so that every logit is exact: 20.5 for ids 5 and 9, else 20. Their gradients differ by 1e-4 * 20.5 * 1/4.
static void check_tie(void) {
    int B = 2, T = 8;
    Model *k;
    Ref *m = small_model("n_layer=3 tmix2=gold", "ties", B, T, &k);
    for (int t = 0; t < B * T; t++) inputs[t] = targets[t] = 10 + t; // neither 5 nor 9
    targets_follow(B, T);
    Param *head = param(m, -1, "head.weight");
    Param *gain = param(m, -1, "ln_out.weight"), *bias = param(m, -1, "ln_out.bias");
    for (int i = 0; i < m->C; i++) gain->w[i] = 0, bias->w[i] = 0.25;
    for (int64_t i = 0; i < head->size; i++) head->w[i] = i / m->C == 5 || i / m->C == 9 ? 0.640625 : 0.625;
    if (!k) return free_both(m, k);
    load_weights(m, k);
    gf_zero_grad(k);
    gf_loss_backward(k, inputs, targets, B, T, 1);
    float *g = kernels_gradient(k, head);
    double worst = 0, want = 1e-4 * 20.5 * 0.25;
    for (int i = 0; i < m->C; i++) worst = fmax(worst, relative(g[5 * m->C + i] - g[9 * m->C + i], want));
    check(worst <= (gf_precision() == 16 ? 5e-2 : 1e-3),
          "loss: of two equal largest logits the lower id gets the extra term: %.1e", worst);
    free(g);
    free_both(m, k);
}

// --------------------------------------------------------------------------------------------------------------------

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// All of golden_folder/*.txt in the order of their names.
static void check_all_tables(void) {
    DIR *folder = opendir(golden_folder);
    char *paths[64];
    int n = 0;
    if (!folder) fail("%s: cannot be opened (run this in the project's folder)", golden_folder);
    for (struct dirent *entry; (entry = readdir(folder)) && n < 64;) {
        if (!ends_with(entry->d_name, ".txt")) continue;
        paths[n] = zeros(1400, 1);
        snprintf(paths[n++], 1400, "%s/%s", golden_folder, entry->d_name);
    }
    closedir(folder);
    qsort(paths, n, sizeof(char *), by_name);
    for (int i = 0; i < n; i++) {
        check_golden(paths[i]);
        free(paths[i]);
    }
}

int main(int argc, char **argv) {
    if (argc > 1) {
        const int with_ranks = !strcmp(argv[1], "--ranks") && argc > 2;
        trainer_only = !strcmp(argv[1], "--trainer") || with_ranks;
        if (argc == 1 + trainer_only + with_ranks) fail("%s: expected FILE..., found nothing to check", argv[1]);
        if (with_ranks) n_ranks = atoi(argv[2]), rank = gf_ranks(n_ranks);
        for (int i = 1 + trainer_only + with_ranks; i < argc; i++) check_golden(argv[i]);
    } else {
        // dev/golden lies below the working directory or beside the program
        const char *slash = strrchr(argv[0], '/');
        snprintf(golden_folder, sizeof(golden_folder), "dev/golden");
        if (access(golden_folder, R_OK) && slash)
            snprintf(golden_folder, sizeof(golden_folder), "%.*s/dev/golden", (int)(slash - argv[0]), argv[0]);
        char sample[1100];
        snprintf(sample, sizeof(sample), "%s/data/sample", golden_folder);
        check_binidx(sample);
        check_sampler();
        snprintf(sample, sizeof(sample), "%s/data/tokenizer.jsonl", golden_folder);
        check_tokenizer(sample);
        snprintf(sample, sizeof(sample), "%s/data/sampling.txt", golden_folder);
        check_sampling(sample);
        printf("%s, %s\n", gf_device(), gf_precision() == 16 ? "BF16" : "FP32");
        check_learning_rates();
        check_finite_differences();
        check_wkv();
        check_rope();
        if (gf_supported("x060c2", "gold", "x060", "x060")) {
            check_initial_values();
            check_update();
            check_tie();
            check_bits("n_layer=3 tmix2=gold");
            check_bits("n_layer=4 tmix=x060 tmix2=llama cmix2=llama inv_other_layer_ratio=2 rope.base=100");
            check_bits("n_layer=4 tmix=x052 cmix=x052 tmix2=gptalpha inv_other_layer_ratio=2");
            check_bits("n_layer=2 tmix=x060b");
            check_accumulation();
            check_mask("n_layer=3 tmix2=gold", 3, 14);
            check_mask("n_layer=2 tmix=llama cmix=llama vocab_size=4096", 2, 9);
            check_shapes();
            check_int8();
            check_batches();
        } else {
            skip("everything but tables: x060c2 + gold are not built into the kernels");
        }
        check_all_tables();
    }
    printf("%d passed, %d failed, %d skipped\n", n_passed, n_failed, n_skipped);
    return n_failed > 0;
}
