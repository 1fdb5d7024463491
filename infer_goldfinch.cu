// GoldFinch inference in plain CUDA C: a prompt is read in linear time, and a token of context costs 1 + C/16 numbers.
//
//     make infer && ./infer_goldfinch MODEL.safetensors -p "text"
//
// Kernels, layers, settings and files are the trainer's, and its letters and words; here is only what inference adds:
//
//     0. Machine     launch_early, run_recorded: kernels that start early, steps that are recorded
//     1. Cache       GoldSource, Infer: what is carried from token to token, and nothing else
//     2. Attention   gold_attention: of a GOLD layer, over keys and values made on the fly from the cache
//     3. One token   queue_step, matvec: decode
//     4. Engine      infer_open, infer_feed: pre-fill, scoring, saved states; batch_open: several contexts at once
//     5. Tokenizer   6. Sampler   7. Command line   8. Requests
//
// More words with a meaning of their own:
//     window    the newest tokens, whose keys and values are ready, in a ring; past: all tokens before it, whose keys
//               and values are made as they are needed, and never written
//     side      keys, or values, of a GOLD layer: both come about in the same way
//     split     a share of the context, which one block attends to; the splits' sums are combined in the end
//     kept      here also: keys and values of layers that have their own, gptalpha's and llama's
//     tail      the last 2 G + 1 tokens of a prompt (G GOLD layers), all that these layers are to see of it
//     place     where a step stands in the context, in device memory
//     early     before the kernel ahead is done: what that one does not write may be asked for
//     job       what a matrix-vector product is for: how its vector is made and what becomes of its results
//     batch     contexts that step together; slot: the place of one of them
//
// How a prompt goes through (spec section 10): all tokens through the layers before the GOLD layers, in chunks of fixed
// size, leaving states and, per token, its id and c = w_kv_cache_a x. The GOLD layers see only the last 2 G + 1 tokens
// (G of them): keys and values of all tokens are made from ids and c, never from a GOLD layer's output, so no older
// token need pass these layers; and each looks back one token in its time mixer and one in its channel mixer. So the
// last token's logits, and what is carried from there, are exact. Then, token by token, a step of matrix-vector kernels
// (section 3).

#define GOLDFINCH_NO_MAIN
#include "train_goldfinch.cu"
#include <poll.h>
#include <type_traits>

// ---------------------------------------------------------------------------------------------------------------------
// 0. Machine: kernels that start early, steps that are recorded

// A kernel launched early may start while the one before it still runs.
#ifdef CUDA_ON_CPU
__device__ inline void wait_for_previous(void) {}
__device__ inline void let_next_start(void) {}
#else
__device__ inline void wait_for_previous(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_start(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

// launch_early is to start the next kernel when all before it are done
[[maybe_unused]] static bool next_starts_late = false;

// The kernel may start while the one launched before it still runs (programmatic dependent launch): it asks for its
// weights, and then waits in wait_for_previous until all before it is done. Every thread must do so, and must not touch
// what a kernel that may still run writes until then; let_next_start says when the next early launch may begin (all
// blocks must).
template <typename... P, typename... Args>
static void launch_early(void (*kernel)(P...), dim3 grid, int threads, size_t smem, const Args &...args) {
#ifdef CUDA_ON_CPU
    kernel<<<grid, threads, smem, stream>>>(args...);
#else
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = smem, config.stream = stream;
    static int major = 0; // sm_90 and newer can
    if (major == 0) CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    config.attrs = &early, config.numAttrs = major >= 9 && !next_starts_late ? 1 : 0;
    next_starts_late = false;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, P(args)...));
#endif
}

// Contexts that step together have memory of their own, all laid out alike: vectors `apart` bytes from one context's to
// the next one's, states and caches `far` bytes. Were all as far apart, a product would read its 32 vectors from as
// many pages, and wait for these to be looked up (23 us in place of 17, H200, K 7168). Kernels get pointers into the
// first context's, and blockIdx.z says which one a block works for. A null stays null.
template <typename... P> __host__ __device__ inline void move_each(int64_t bytes, P *&...p) {
    ((p = p ? (P *)((char *)p + bytes) : nullptr), ...);
}

// `queue` launches the same work with the same arguments every time: what changes lies in device memory. At first it
// runs as it stands (which loads the kernels) and is recorded as a CUDA graph; from then on the device gets the whole
// sequence in one launch. The CPU has no graphs.
typedef struct Recording {
    void *graph; // cudaGraphExec_t
} Recording;

template <typename F> static void run_recorded(Recording *r, const F &queue) {
#ifdef CUDA_ON_CPU
    (void)r;
    queue();
#else
    if (r->graph) {
        CUDA_CHECK(cudaGraphLaunch((cudaGraphExec_t)r->graph, stream));
        return;
    }
    cudaGraph_t graph;
    queue();
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    queue();
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate((cudaGraphExec_t *)&r->graph, graph, 0));
    CUDA_CHECK(cudaGraphUpload((cudaGraphExec_t)r->graph, stream));
    CUDA_CHECK(cudaGraphDestroy(graph));
#endif
}

[[maybe_unused]] static void recording_free(Recording *r) {
#ifndef CUDA_ON_CPU
    if (r->graph) CUDA_CHECK(cudaGraphExecDestroy((cudaGraphExec_t)r->graph));
#endif
    *r = {};
}

// ---------------------------------------------------------------------------------------------------------------------
// 1. Cache

// c in floatX; c in 8 bits; the keys and values themselves; these if there is room for the whole context's, else c
enum KvKind { KV_COMPRESSED, KV_INT8, KV_FULL, KV_IF_IT_FITS };

// large matrices as floatX; or in 8 bits (section 3)
enum WeightsKind { WEIGHTS_FLOAT, WEIGHTS_INT8 };
static const char *const weights_names[] = {"bf16", "int8"};

// right operands of two steps of 16 of a product's inner index
struct alignas(16) TilePair {
    TileB b[2];
};

// What a GOLD layer needs of tokens to make its keys and values, or has of them already. A token's key and value depend
// on its id, its c, and those of the token before. Whatever depends on an id alone stands in tables over the
// vocabulary.
struct GoldSource {
    const int *ids;   // (T)
    const floatX *c;  // (T, R)
    const int8_t *c8; // (T, R) and (T): c = c8 * scale, in its place with KV_INT8
    const float *scales;
    const floatX *id_k0, *id_xo;      // (V, C): W_b[:, :C] x0 and xo = rms_norm(x0)
    const floatX *id_c;               // (V, R32): id_k0 W_b[:, C:]
    const float *id_squares;          // (V): |id_k0|^2
    const floatX *id_h, *id_h_before; // (V, 64): the mixes' hidden layer, from the token's id and the one before
    const floatX *w_c;                // (C, R32): W_b[:, C:]
    const TilePair *c_gram;           // W_b[:, C:]^T W_b[:, C:]
    struct Side {                     // of keys; of values
        const floatX *mu, *mix;       // (C): time_maa_k or _v; (32, C): time_maa_kv_w2[0 or 1]
        // (rank_pad, C): time_key_w1 or .. transposed; (C, rank_pad): _w2, less its mean
        const floatX *w1, *w2;
        const floatX *gain, *bias;    // (C): ln_k or ln_v
        const TilePair *tiles, *gram; // the weights in tensor cores' order (section 2); w2^T w2
        int stage;                    // pairs of tiles for 32 channels
        floatX *ring;                 // (window, C): keys or values of the newest tokens
    } k, v;
    const TilePair *rotated_tiles; // what keys with a rope take in the end
    int rotated_stage, stage;      // pairs of these for 32 channels; most pairs of any stage
    Rope rope;
    // R32: R up to a multiple of 32, zeros behind R. rank_pad: 64 or a multiple of 128
    int C, H, R, R32, rank_pad;
    bool warpgroups; // multiply the weights: `tiles` has them in cores' order, and a block four or eight warps
};

// What blocks that share a context have found, sums of p = exp2(score - top) v and of p, or what is put together in the
// end:
// per split: (M, C), (M, H), (M, H)
struct SplitSums {
    float *out, *top, *sum;
};
// per split: (M, C), (M H, rank), (M H) three times
struct PastSums {
    float *out, *u, *top, *sum, *mean;
};

struct PastQuery {     // made of the queries by past_queries_kernel
    TilePair *q, *u;   // q~ as right operand of k1; W2^T q~ as right operand of u
    float *sum, *bias; // (H M): sum of q~ over the head; q . bias
};

// Where a step stands, in device memory: a recorded step must not have it in its arguments.
// context position of the first query; of the first token in the window; nobody's context, which steps leave as it is
struct Place {
    int64_t first, begin;
    bool rests;
};

static const int MIXES_HIDDEN = 5 * MIX_RANK; // most numbers of a time mixer's mixes' hidden layer

struct Row {                              // vectors of the token at hand
    float *x, *x_mid;                     // (C): the residual stream before a layer, and after its time mixer
    floatX *ln, *xs;                      // (C), (5, C): normed; mixed
    float *hidden;                        // hidden layers: MIXES_HIDDEN; DECAY_RANK, VALUE2_RANK of Finch-C2's w, v2
    float *r, *k, *v, *v2, *y, *q, *gate; // (A) each; gate (C)
    floatX *ffn;                          // (F)
    // (R); (2, C): two tokens' K0 before its norm; (G, 2, C): keys, values likewise
    float *c, *z, *kv2;
    floatX *kv1, *u; // (G, 2, C), (G, 2, rank_pad): mixed; hidden layer
};

// (capacity, A) of a gptalpha or llama layer, keys with their rope
struct KeptKv {
    floatX *keys, *values;
};

// A matrix (rows, K) that a step reads row by row: floatX; or int8, with a scale for each row.
struct StepMatrix {
    const void *w;
    const float *scales; // null: floatX
};
struct StepRow {
    StepMatrix matrix;
    int row;
};

// a layer's first low-rank matrices, transposed: rows of C
struct Packed {
    StepMatrix mix_w1, decay_w1, value2_w1;
};

// Of several contexts that step together, one's place, where the host knows it
typedef struct Slot {
    bool used;
    int64_t position, window_begin;
} Slot;

// Where a sampler stands (section 6). uniform: number of the draw; below 0: from the seed
struct SampleState {
    int64_t position;
    double uniform;
    int drawn;
};

typedef struct Infer {
    Model m; // the first member: a layer's forward function finds the rest through it
    KvKind kv;
    WeightsKind weights;
    int chunk, tail, G;                       // tokens of a pre-fill chunk; 2 G + 1; number of GOLD layers
    int64_t capacity, position;               // most tokens of context; tokens so far
    int64_t window, window_begin, window_end; // tokens that the window can hold; those it holds
    KeptKv *kept;                             // (n_layer); null in layers that keep none
    SplitSums kept_sums;                      // what the shares of a context leave behind, in these layers' attention
    Place *place;
    bool last_only;                       // of the rows at hand only the last one's logits count
    Int8Matrix *int8_matrices;            // (n_tensors), of those that are kept so
    const SafeTensors *file;              // the model's, open until no more states are saved: they need its hash
    GoldSource *sources, *device_sources; // (G)
    Row row;
    Packed *packed; // (L)
    bool decodes;   // all mixers can decode
    int *token;     // the token of a step that is not drawn on the device
    // of such a step: with a context that fits the window, and with a longer one
    Recording recordings[2];
    int *ids; // the cache: (capacity), ..
    floatX *c;
    int8_t *c8;
    float *scales;
    // (tail, C): residual stream before the GOLD layers of the last tokens; two, to shift
    floatX *tail_x[2];
    int tail_rows, tail_now;
    floatX *w_c, *id_k0, *id_xo, *id_c; // shared by all GOLD layers
    float *id_squares;
    TilePair *c_gram;
    int queries, past_warps;        // of attention: queries at a time; warps of a block
    int past_splits, window_splits; // blocks that share a context: its older tokens, its window
    SplitSums sums;
    PastSums past_sums;
    PastQuery past_query;
    float *logits; // (V), fp32
    // Contexts that step together (section 4): 1, or those of a batch, in whose Infer all pointers to what a context
    // has of its own are the first one's.
    int contexts;
    int64_t apart, far; // bytes from a context's vectors to those of the next; from its states and caches
    char *memory;       // (contexts, apart), (contexts, far)
    Slot *slots;        // (contexts)
    SampleState *state; // of the sampler, null with one context
    floatX *input;      // what the rows of a product are multiplied with: 2 C numbers or more
} Infer;

static const int MOST_SPLITS = 256; // blocks that share a context: one a multiprocessor
// tokens of a window: as many as a sixteenth of the machine's memory holds, between these
static const int64_t LEAST_WINDOW = 4096, MOST_WINDOW = 65536;

__global__ void append_tokens_kernel(int *to, const int *ids, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = ids[i];
}

__global__ void append_floats_kernel(floatX *to, const floatX *from, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = from[i];
}

// A warp a token: c8 = round(c / scale), scale = largest |c| / 127.
__global__ void append_int8_kernel(int8_t *to, float *scales, const floatX *from, int R) {
    const floatX *c = from + (int64_t)blockIdx.x * R;
    float largest = 0;
    for (int i = threadIdx.x; i < R; i += 32) largest = fmaxf(largest, fabsf((float)c[i]));
    const float scale = warp_max(largest) / 127;
    for (int i = threadIdx.x; i < R; i += 32)
        to[(int64_t)blockIdx.x * R + i] = (int8_t)(scale > 0 ? rintf((float)c[i] / scale) : 0);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

// to (rows, columns) = from (its rows and columns fewer, the rest zero), or from transposed; from's rows are ld apart.
__global__ void pack_matrix_kernel(floatX *to, int rows, int columns, const floatX *from, int64_t ld, int from_rows,
                                   int from_columns, bool t) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (int64_t)rows * columns) return;
    const int row = (int)(i / columns), column = (int)(i % columns);
    if (row >= (t ? from_columns : from_rows) || column >= (t ? from_rows : from_columns)) to[i] = (floatX)0.f;
    else to[i] = t ? from[column * ld + row] : from[row * ld + column];
}

// by mu or 1 - mu
__global__ void scale_rows_kernel(floatX *to, const floatX *from, const floatX *mu, bool rest, int64_t n, int columns) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float factor = (float)mu[i / columns];
    to[i] = (floatX)((float)from[i] * (rest ? 1 - factor : factor));
}

__global__ void number_tokens_kernel(int *ids, int first, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) ids[i] = first + i;
}

static int blocks_of(int64_t n) { return (int)ceil_div(n, 256); }
static int multiple_of_32(int n) { return (n + 31) / 32 * 32; }
static int padded_rank(int rank) { return rank <= 64 ? 64 : (rank + 127) / 128 * 128; }

// to (n, rows) = from (rows, columns) transposed, columns up to n zeros, less the mean over a column. A block a column.
__global__ void pack_centered_kernel(floatX *to, const floatX *from, int rows, int columns) {
    __shared__ float2 shared[32];
    const int column = blockIdx.x;
    float sum = 0;
    for (int i = threadIdx.x; i < columns && column < rows; i += blockDim.x)
        sum += (float)from[(int64_t)column * columns + i];
    const float mean = block_sum(sum, shared) / columns;
    for (int i = threadIdx.x; i < columns; i += blockDim.x)
        to[(int64_t)i * gridDim.x + column] =
            (floatX)(column < rows ? (float)from[(int64_t)column * columns + i] - mean : 0);
}

__global__ void sum_squares_kernel(float *to, const floatX *from, int columns) { // of rows, a warp each
    float sum = 0;
    from += (int64_t)blockIdx.x * columns;
    for (int i = threadIdx.x; i < columns; i += 32) sum += (float)from[i] * (float)from[i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) to[blockIdx.x] = sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Attention of a GOLD layer over its cache
//
// Two sources: the window, where keys and values are ready, and all that is older.
//
// ---- the window ----
//
// Making keys and values costs as much for one token as for a hundred (the weights must be read), so those of the
// newest `window` tokens are kept, in a ring: token t's in row t % window. It holds nothing that (id, c) do not give:
// scratch of a fixed size. With KV_FULL it is as long as the context, and the rest of this section has nothing to do.

// Sums of a softmax are kept as sums of exp2(score - top), top being the largest score so far. What is added later, or
// was summed elsewhere with another top, is weighed by these two (where top can't be -infinity, by exp2f alone).
__device__ inline float softmax_weight(float score, float top) { return top > -INFINITY ? exp2f(score - top) : 0; }
__device__ inline float softmax_shrink(float top, float higher) { return top < higher ? exp2f(top - higher) : 1; }

static const int WINDOW_THREADS = 256, WINDOW_SPLITS = 8, WINDOW_GROUPS = WINDOW_THREADS / 8,
                 WINDOW_WARPS = WINDOW_THREADS / 32;

struct QuerySource {
    const floatX *q; // (M, C), normed; or null:
    // (C), not normed yet, with ln_q's gain and bias (M = 1), and without its rope
    const float *q0;
    const floatX *gain, *bias;
    const Rope *rope;
    const Place *place;
};

struct WindowTask {
    QuerySource query;
    const floatX *keys, *values; // (window, C)
    SplitSums to;
    const Place *place;
    int64_t window;
    int m0, M, C, H;    // m0: number of the first query here
    int64_t apart, far; // 0, or several contexts, of one query each
    __device__ void move(int64_t context) {
        move_each(context * apart, query.q0, query.place, place, to.out, to.top, to.sum);
        move_each(context * far, keys, values);
    }
};

// Mean and 1/deviation of C numbers over the block, of so many threads. pack(c) gives eight of them; own: the thread's,
// `threads` packs apart
template <int threads, typename F>
__device__ inline float2 block_norm(const F &pack, int C, float2 *shared, Pack (&own)[MAX_C / 8 / threads]) {
    float total = 0, squares = 0;
    for (int n = 0; n < MAX_C / 8 / threads; n++) {
        const int c = (threadIdx.x + n * threads) * 8;
        own[n] = c < C ? pack(c) : zero_pack();
        for (int i = 0; i < 8; i++) total += own[n].x[i];
    }
    const float mean = block_sum(total, shared, threads / 32) / C;
    for (int n = 0; n < MAX_C / 8 / threads; n++) {
        if ((int)(threadIdx.x + n * threads) * 8 >= C) continue;
        for (int i = 0; i < 8; i++) squares += (own[n].x[i] - mean) * (own[n].x[i] - mean);
    }
    return make_float2(mean, rsqrtf(block_sum(squares, shared, threads / 32) / C + 1e-5f));
}

// Eight channels of query m, from c on; the whole block (WINDOW_THREADS) must call it. gain, bias: of ln_q there, where
// the query still needs it
__device__ inline Pack query_pack(const QuerySource &s, int m, int c, int C, const Pack &gain, const Pack &bias,
                                  float2 *shared) {
    if (s.q) return load(s.q + (int64_t)m * C + c);
    Pack own[MAX_C / 8 / WINDOW_THREADS], q = load(s.q0 + c);
    const float2 norm = block_norm<WINDOW_THREADS>([&](int at) { return load(s.q0 + at); }, C, shared, own);
    for (int i = 0; i < 8; i++) q.x[i] = (float)(floatX)((q.x[i] - norm.x) * norm.y * gain.x[i] + bias.x[i]);
    return s.rope->used ? rope_pack(q, *s.rope, s.place->first, c, 1) : q;
}

// Grid: (H, splits, M or contexts). Eight lanes hold a token, each eight channels; such a group of lanes keeps its own
// running sums of every (32 splits)th token, four tokens on their way at a time. Floor: bytes, 2 floatX a channel and
// token. A single query's first keys and values are asked for early: no kernel that may still run writes the cache (see
// cache_decode).
HAS_TWIN __global__ void __launch_bounds__(WINDOW_THREADS, 2) window_attention_kernel(WindowTask p) {
    __shared__ float2 shared[32];
    __shared__ float tops[WINDOW_WARPS];
    __shared__ float sums[WINDOW_WARPS];
    __shared__ __align__(16) float outs[WINDOW_WARPS][N];
    const int group = threadIdx.x / 8, lane = threadIdx.x % 8, h = blockIdx.x, split = blockIdx.y,
              m = p.apart ? 0 : blockIdx.z;
    if (p.apart) p.move(blockIdx.z);
    const int c = h * N + lane * 8, step = WINDOW_GROUPS * gridDim.y;
    RawPack<floatX> k[4], v[4];
    let_next_start();
    const Pack gain = p.query.q ? zero_pack() : load(p.query.gain + c),
               bias = p.query.q ? zero_pack() : load(p.query.bias + c);
    if (p.query.q) wait_for_previous();
    const int64_t begin = p.place->begin, end = p.place->first + p.m0 + m + 1; // of what this query sees
    int64_t t0 = begin + split * WINDOW_GROUPS + group, rounds = (end - begin + 4 * step - 1) / (4 * step);
    auto request = [&] {
        for (int i = 0; i < 4; i++) {
            const int64_t at =
                (int64_t)((unsigned)(t0 + i * step < end ? t0 + i * step : end - 1) % (unsigned)p.window) * p.C + c;
            k[i] = load_raw(p.keys + at);
            v[i] = load_raw(p.values + at);
        }
    };
    request();
    if (!p.query.q) wait_for_previous();
    const Pack q = query_pack(p.query, m, c, p.C, gain, bias, shared);
    Pack out = zero_pack();
    float top = -INFINITY, sum = 0;
    auto shrink_to = [&](float high) {
        const float shrink = softmax_shrink(top, high);
        sum *= shrink;
        for (int j = 0; j < 8; j++) out.x[j] *= shrink;
        top = high;
    };
    for (; rounds > 0; rounds--) {
        float score[4], high = top;
        for (int i = 0; i < 4; i++) {
            const Pack key = unpack(k[i]);
            score[i] = 0;
            for (int j = 0; j < 8; j++) score[i] += q.x[j] * key.x[j];
        }
        warp_sum(score, 8);
        for (int i = 0; i < 4; i++) {
            score[i] = t0 + i * step < end ? score[i] * SCALE_LOG2 : -INFINITY;
            high = fmaxf(high, score[i]);
        }
        shrink_to(high);
        for (int i = 0; i < 4; i++) {
            const Pack value = unpack(v[i]);
            const float weight = softmax_weight(score[i], high);
            sum += weight;
            for (int j = 0; j < 8; j++) out.x[j] += weight * value.x[j];
        }
        t0 += 4 * step;
        if (rounds > 1) request();
    }
    shrink_to(warp_max(top)); // the warp's four groups, then the block's warps
    for (int apart = 8; apart < 32; apart *= 2) {
        Pack other;
        sum += __shfl_xor_sync(0xffffffffu, sum, apart);
        shuffle_xor(other.x, out.x, apart);
        for (int j = 0; j < 8; j++) out.x[j] += other.x[j];
    }
    if (threadIdx.x % 32 < 8) {
        tops[threadIdx.x / 32] = top;
        sums[threadIdx.x / 32] = sum;
        store(&outs[threadIdx.x / 32][lane * 8], out);
    }
    __syncthreads();
    if (threadIdx.x >= N) return;
    float all = 0, result = 0, high = -INFINITY;
    for (int i = 0; i < WINDOW_WARPS; i++) high = fmaxf(high, tops[i]);
    for (int i = 0; i < WINDOW_WARPS && high > -INFINITY; i++) {
        const float weight = exp2f(tops[i] - high);
        all += sums[i] * weight;
        result += outs[i][threadIdx.x] * weight;
    }
    const int64_t row = (int64_t)split * p.M + m, at = row * p.C + h * N + threadIdx.x;
    p.to.out[at] = result;
    if (threadIdx.x > 0) return;
    p.to.top[row * p.H + h] = high;
    p.to.sum[row * p.H + h] = all;
}

// Rows at.. of the ring; a block a row.
__global__ void append_to_ring_kernel(floatX *ring, const floatX *from, int64_t at, int64_t window, int C) {
    const int c = threadIdx.x * 8;
    if (c < C) store(ring + (at + blockIdx.x) % window * C + c, load(from + (int64_t)blockIdx.x * C + c));
}

// ---- older tokens: keys and values from (id, c), made in registers and used at once ----
//
//     z  = id_k0[id] + W_c c
//     K0 = z / (|z| / sqrt(C) + 1e-8)
//     h  = tanh(id_h[id] + id_h_before[id before])
//     k1 = K0 + (shift(K0) - K0) * (time_maa_k + h_k mix_k)       v1 likewise from id_xo
//     k  = LayerNorm(k1 + W2 u),   u = tanh(w1 k1)                v likewise from v1
//
// What makes it affordable is that neither W2 u nor the norm is needed channel by channel. With W2's mean over channels
// taken off (a LayerNorm does not see it), and for a query q with q~ = q * gain:
//
//     mean(k)    = mean(k1)
//     C var(k)   = |k1|^2 + 2 u . (W2^T k1) + u . (W2^T W2) u - C mean^2
//     q . k      = (q~ . k1 + (W2^T q~) . u - mean sum(q~)) / deviation + q . bias      W2^T q~: once a query and head
//     sum of p v = gain * (sum p' v1 + W2 sum p' u - sum p' mean) + bias sum p          p' = p / deviation; W2 once
//     |z|^2      = |id_k0|^2 + 2 (W_c^T id_k0) . c + c . (W_c^T W_c) c                  tables over the vocabulary
//
// So a token's channels pass by once, 32 at a time (a sweep), and what stays is in registers: [u's input | W2^T k1]. A
// warp has 16 tokens, the first of them only for the shift of the others. Weights come from L2 through shared memory,
// in the order in which lanes need them, while those before are multiplied; a block's warps share them:
//
//     keys:    z (16 x 32) = c W_c^T;  mixes (16 x 32) = h mix;  U (16 x 2 rank) += k1 [w1 | W2];  scores += k1 q~
//     values:                          mixes;                    U += v1 [w1 | W2]
//     then softmax, and for each head once more v1, to add p' v1
//
// Flops per token and layer: 2 C (R + 4 rank + 96), 3.0 M at D 2048: with 8 such layers a million tokens are 24 T, 30
// ms at 800 TFLOP/s. By single warps (16 x 8 tiles) shared memory is the limit: a tile's 256 bytes of weights serve 16
// tokens. On Hopper a warpgroup's 64 tokens share them, and most products run in the background:
//
//     a warp          | mix k1 of stage j        | round | mix k1 of stage j + 1    | round | ..
//     tensor cores     U += k1 of stage j - 1            | z, mixes of j + 1; U += k1 of stage j    | ..
//     copy engine      weights of stages j + 1, j + 2, as soon as the last warp is done with j - 2, j - 1
//
// Decode after 1,000,000 tokens, L24 D2048, H200, ms a token, by bench_infer: single warps 167; U by warpgroups 146;
// weights by the copy engine, and no barrier at each stage 126; z and mixes by warpgroups, too 123; not one thread but
// the last warp asks for weights (the one had to wait for all) 111; a loop that is not unrolled, mixes that begin at
// time_maa_k 109; sizes of products that nvcc knows 104 (for that R must be rank, and 64 or 128 when padded; elsewhere
// single warps do it). Left: 1,000 instructions a stage of a warp, and two warps a scheduler, as U takes half of all
// registers. They find an instruction to issue in 36 % of the cycles; the rest waits for shuffles, rows and tiles'
// ends.

// A lane owns 8 neighbouring channels of 32 (one 16-byte load), though a tile gives it two of each 8: so tiles are made
// of channels in another order. Tile n, column j of 32 channels is channel 8 (j / 2) + 2 n + j % 2.
__host__ __device__ inline int tile_channel(int i) { return i / 32 * 32 + i % 8 / 2 * 8 + i % 32 / 8 * 2 + i % 2; }

// Right operands of a matrix B[k][n] = p[k ld_k + n ld_n], in lanes' order; the pair of tiles (n / 8, k / 32) goes to
// position n / 8 % per * inner + n / 8 / per * outer + k / 32 * step. Channels in tiles' order where asked for. A warp
// a pair. In cores' order, for warpgroups, a pair is 4 cores, 8 rows k each: (8 columns n, 8 rows k).
struct PackTiles {
    const floatX *p;
    int64_t ld_k, ld_n;
    int K, per, inner, outer, step;
    bool k_channels, n_channels, cores;
};

__global__ void pack_tiles_kernel(TilePair *to, PackTiles s) {
    const int k32 = blockIdx.x % (s.K / 32), n8 = blockIdx.x / (s.K / 32), lane = threadIdx.x;
    to += (int64_t)(n8 % s.per * s.inner + n8 / s.per * s.outer + k32 * s.step) * 32;
    if (s.cores) {
        Pack x;
        for (int i = 0; i < 8; i++) {
            const int k = 32 * k32 + lane / 8 * 8 + i, n = 8 * n8 + lane % 8;
            x.x[i] =
                (float)
                    s.p[(s.k_channels ? tile_channel(k) : k) * s.ld_k + (s.n_channels ? tile_channel(n) : n) * s.ld_n];
        }
        store((floatX *)to + 8 * lane, x);
        return;
    }
    const int n = 8 * n8 + lane / 4, column = s.n_channels ? tile_channel(n) : n;
    TilePair pair;
    for (int half = 0; half < 2; half++) {
        float x[4];
        for (int i = 0; i < 4; i++) {
            const int k = 32 * k32 + 16 * half + lane % 4 * 2 + i % 2 + i / 2 * 8,
                      row = s.k_channels ? tile_channel(k) : k;
            x[i] = (float)s.p[row * s.ld_k + column * s.ld_n];
        }
        pair.b[half] = make_b(x[0], x[1], x[2], x[3]);
    }
    to[lane] = pair;
}

// to[j stage 32 + lane] = the lane's eight channels of 32 j..; a warp a stage
__global__ void pack_mu_kernel(TilePair *to, const floatX *mu, int stage) {
    const int lane = threadIdx.x;
    store((floatX *)(to + (int64_t)blockIdx.x * stage * 32 + lane), load(mu + 32 * blockIdx.x + lane % 4 * 8));
}

struct PastTask {
    PastQuery query;
    PastSums to;
    const Place *place;
    int m0, M; // number of the first query; queries
};

struct PastSmem {    // where things lie in a block's shared memory
    TilePair *stage; // past_buffers stages of weights for 32 channels each, past_stage pairs apart
    floatX *patch;   // (warps, 16, 64), in the stages' place
    // (warps, 2, 16, 64): 64 channels of tables' rows, and the next ones on their way
    floatX *rows;
    floatX *c, *h, *u; // (warps, 16, R), (warps, 16, 64), (warps, 16, rank), each row PAD longer; see u_replaces_c
    float *p;          // (H M, tokens): scores, then p'
    float *top, *sum, *mean, *shrink; // (H M)
    float *v_mean, *v_rstd;           // (tokens)
    int *ids;                         // (tokens): -1 outside
    // of each buffer, with warpgroups: its weights are there; how many warps are done with them
    Signal *there;
    int *done;
    int ld; // of p
    size_t bytes;
};

// Off by 1e-7 at most, also where x is smaller: u is added to numbers around 1, in bf16
__device__ inline float fast_tanh(float x) {
#if PRECISION_BF16 && !defined(CUDA_ON_CPU)
    return 1 - __fdividef(2, 1 + exp2_fast(2 * 1.44269504f * x));
#else
    return tanhf(x);
#endif
}

// Whether u lies where c was: rows are as long, and the one sweep that reads c is over when the first u is written.
// This holds for the paper's sizes (compression ratio 16, rank C / 16) without a rope. Elsewhere u takes room of its
// own, and a block may have fewer warps or take fewer queries at a time (choose_attention_shape).
__host__ __device__ inline bool u_replaces_c(const GoldSource &g) {
    return g.rank_pad <= 128 && !g.rope.used && g.R32 == g.rank_pad;
}

__host__ __device__ inline int past_stage(const GoldSource &g) { return g.stage + 1; } // with the queries' tiles
// One is being multiplied, and one on its way; with warpgroups those of the stages before and after it, too.
__host__ __device__ constexpr int past_buffers(bool warpgroups) { return warpgroups ? 3 : 2; }

__host__ __device__ inline PastSmem past_smem(char *base, const GoldSource &g, int warps, int M) {
    PastSmem s;
    size_t at = 0;
    auto place = [&](size_t bytes) {
        char *p = base + at;
        at += (bytes + 15) / 16 * 16;
        return p;
    };
    const int tokens = 16 * warps, pairs = M * g.H;
    s.stage = (TilePair *)place(past_buffers(g.warpgroups) * sizeof(TilePair) * 32 * past_stage(g));
    s.patch = (floatX *)s.stage;
    s.rows = (floatX *)place(sizeof(floatX) * tokens * 2 * 64);
    s.c = (floatX *)place(sizeof(floatX) * tokens * (g.R32 + PAD));
    s.h = (floatX *)place(sizeof(floatX) * tokens * (64 + PAD));
    s.u = u_replaces_c(g) ? s.c : (floatX *)place(sizeof(floatX) * tokens * (g.rank_pad + PAD));
    s.ld = tokens + 4;
    s.p = (float *)place(4ul * s.ld * ((pairs + 23) / 16 * 16)); // tiles reach beyond the last pair
    s.top = (float *)place(4ul * pairs);
    s.sum = (float *)place(4ul * pairs);
    s.mean = (float *)place(4ul * pairs);
    s.shrink = (float *)place(4ul * pairs);
    s.v_mean = (float *)place(4ul * tokens);
    s.v_rstd = (float *)place(4ul * tokens);
    s.ids = (int *)place(4ul * tokens);
    s.there = (Signal *)place(past_buffers(true) * sizeof(Signal));
    s.done = (int *)place(past_buffers(true) * sizeof(int));
    s.bytes = at;
    return s;
}

struct PastRows {           // of a lane's two rows, tile_row(0) and tile_row(2)
    int id[2];              // -1 outside
    float scale[2];         // of K0: 1 / (|z| / sqrt(C) + 1e-8)
    float mean[2], rstd[2]; // of keys, then of values
};

__device__ inline void stage_copy(TilePair *to, const TilePair *from, int pairs) {
    for (int i = threadIdx.x; i < pairs * 32 * (int)sizeof(TilePair) / 16; i += blockDim.x)
        async_copy16((char *)to + 16 * i, (const char *)from + 16 * i, true);
}

// Long code of which nvcc is to compile one copy, not one for each place that it is called from. An fp32 product is a
// long sequence of shuffles.
#ifdef CUDA_ON_CPU
#define OUT_OF_LINE inline
#else
#define OUT_OF_LINE __noinline__
#endif
#if PRECISION_BF16
#define INLINE_PRODUCT inline
#else
#define INLINE_PRODUCT OUT_OF_LINE
#endif

// c[i] += a[0] b[i][0] + a[1] b[i][1], b in lanes' order, `apart` pairs from one i to the next
template <int n>
__device__ INLINE_PRODUCT void mma_pairs(TileC (&c)[n], const TileA &a0, const TileA &a1, const TilePair *b,
                                         int apart) {
    TileB left[n], right[n];
    for (int i = 0; i < n; i++) {
        const TilePair pair = b[i * apart * 32 + threadIdx.x % 32];
        left[i] = pair.b[0];
        right[i] = pair.b[1];
    }
    mma(c, a0, left);
    mma(c, a1, right);
}

// By warpgroups (see the trainer's section 2), with operands in cores' order: a core is 8 rows, or columns, of 8
// numbers each along k, one after the other. In a pair of tiles cores follow each other along k; in c (16 rows of ld
// numbers for each warp) as well, and the next 8 rows lie 8 ld numbers on.
__device__ inline int core_at(int row, int k, int ld) { return row / 8 * 8 * ld + k / 8 * 64 + row % 8 * 8 + k % 8; }

// A[m][k] from k on of c; B[k][n] from k = 16 half on of a pair, for products of one warp
__device__ inline TileA core_a(const floatX *c, int k, int ld) {
#if PRECISION_BF16 && !defined(CUDA_ON_CPU)
    const int lane = threadIdx.x % 32;
    return load_a_from(c + core_at(lane % 16, k + lane / 16 * 8, ld));
#else
    TileC left, right;
    for (int i = 0; i < 4; i++) {
        left.x[i] = (float)c[core_at(tile_row(i), k + tile_col(i), ld)];
        right.x[i] = (float)c[core_at(tile_row(i), k + tile_col(i) + 8, ld)];
    }
    return to_a(left, right);
#endif
}
__device__ inline TileB core_b(const TilePair *pair, int half) {
    const int lane = threadIdx.x % 32;
    const floatX *p = (const floatX *)pair + 128 * half + lane / 4 * 8 + lane % 4 * 2;
    return make_b((float)p[0], (float)p[1], (float)p[64], (float)p[65]);
}

#if defined(WARPGROUPS) && !defined(CUDA_ON_CPU)
// How wgmma is told of cores: address / 16; units of 16 bytes to the core of the next k, and of the next rows or
// columns. 16 k on it is low + 16.
struct Cores {
    unsigned low, high;
};
__device__ inline Cores cores(const void *p, int along_k, int across) {
    return {(smem_address(p) & 0x3ffff) >> 4 | (unsigned)along_k << 16, (unsigned)across};
}
#define NUMBERS16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#endif

// The lane's channels of m: in all rows the same
__device__ inline void start_at(TileC (&m)[4], const Pack &mu) {
    for (int n = 0; n < 4; n++)
        for (int i = 0; i < 4; i++) m[n].x[i] = mu.x[2 * n + i % 2];
}

// For the warpgroup's 64 tokens and 32 channels, in the background, as a group of its own: for keys x = c W_c^T, c the
// first warp's; m = mu + h mix, h in registers. w: W_c's pairs (keys only), then mix's, w1's, W2's, and mu.
template <int groups, bool keys>
__device__ inline void multiply_inputs(TileC (&x)[4], TileC (&m)[4], const floatX *c, const TileA (&hidden)[2],
                                       const TilePair *w) {
    constexpr int R32 = 32 * groups, ld = R32 + PAD;
    const TilePair *mix = keys ? w + 4 * R32 : w; // 4 R32 / 32 pairs of tiles
    for (int n = 0; n < 4; n++) x[n] = {};
    start_at(m, load((const floatX *)(mix + (4 + 8 * groups) * 32 + threadIdx.x % 32)));
#ifdef CUDA_ON_CPU
    c += threadIdx.x % 128 / 32 * 16 * ld;
    for (int k = 0; k < R32 && keys; k += 16) {
        TileB b[4];
        for (int n = 0; n < 4; n++) b[n] = core_b(w + n * R32 + k / 32 * 32, k / 16 % 2);
        mma(x, core_a(c, k, ld), b);
    }
    for (int half = 0; half < 2; half++) {
        TileB b[4];
        for (int n = 0; n < 4; n++) b[n] = core_b(mix + n * 32, half);
        mma(m, hidden[half], b);
    }
#elif defined(WARPGROUPS)
    hold(x); // all in their registers before the products
    hold(m);
    warpgroup_begin();
    const Cores left = cores(c, 8, ld), of_c = cores(w, 8, R32), of_mix = cores(mix, 8, 32);
#pragma unroll
    for (int i = 0; i < R32 / 16 && keys; i++)
        asm volatile("{\n .reg .b64 a, b;\n mov.b64 a, {%16, %17};\n mov.b64 b, {%18, %19};\n"
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" NUMBERS16 "}, a, b, 1, 1, 1, 0, 0;\n}"
                     : TILES4(x, 0)
                     : "r"(left.low + 16 * i), "r"(left.high), "r"(of_c.low + 16 * i), "r"(of_c.high));
#pragma unroll
    for (int half = 0; half < 2; half++)
        asm volatile("{\n .reg .b64 b;\n mov.b64 b, {%20, %21};\n"
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" NUMBERS16
                     "}, {%16,%17,%18,%19}, b, 1, 1, 1, 0;\n}"
                     : TILES4(m, 0)
                     : "r"(hidden[half].x[0]), "r"(hidden[half].x[1]), "r"(hidden[half].x[2]), "r"(hidden[half].x[3]),
                       "r"(of_mix.low + 16 * half), "r"(of_mix.high));
    warpgroup_commit();
#endif
}
// Until they are there; so many groups begun after them may go on.
template <int newer>
__device__ inline void until_inputs([[maybe_unused]] TileC (&x)[4], [[maybe_unused]] TileC (&m)[4]) {
#if defined(WARPGROUPS) && !defined(CUDA_ON_CPU)
    warpgroup_wait<newer>();
    hold(x);
    hold(m);
#endif
}

// U += x w, x the warps' 32 channels, likewise. until_multiplied waits for all groups.
template <int groups>
__device__ inline void multiply_by_warpgroup(TileC (&U)[2][groups][4], const TileA (&x)[2], const TilePair *w) {
    [[maybe_unused]] TileC(*c)[16] = (TileC(*)[16])U;
#ifdef CUDA_ON_CPU
    for (int part = 0; part < groups / 2; part++)
        for (int half = 0; half < 2; half++) {
            TileB b[16];
            for (int n = 0; n < 16; n++) b[n] = core_b(w + (16 * part + n) * 32, half);
            mma(c[part], x[half], b);
        }
#elif defined(WARPGROUPS)
    const Cores right = cores(w, 8, 32);
    warpgroup_begin();
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int part = 0; part < groups / 2; part++)
            asm volatile("{\n .reg .b64 b;\n mov.b64 b, {%68, %69};\n"
                         "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NUMBERS64
                         "}, {%64,%65,%66,%67}, b, 1, 1, 1, 0;\n}"
                         : TILES4(c[part], 0), TILES4(c[part], 4), TILES4(c[part], 8), TILES4(c[part], 12)
                         : "r"(x[half].x[0]), "r"(x[half].x[1]), "r"(x[half].x[2]), "r"(x[half].x[3]),
                           "r"(right.low + 512 * part + 16 * half), "r"(right.high));
    warpgroup_commit();
#endif
}
template <int groups> __device__ inline void until_multiplied([[maybe_unused]] TileC (&U)[2][groups][4]) {
#if defined(WARPGROUPS) && !defined(CUDA_ON_CPU)
    warpgroup_wait<0>();
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < groups; i++) hold(U[half][i]);
#endif
}

// bytes, a multiple of 16, from global to shared memory by the copy engine, which tells `there`
__device__ inline void copy_bytes(void *to, const void *from, int bytes, Signal *there) {
#ifdef CUDA_ON_CPU
    memcpy(to, from, bytes);
    cuda_on_cpu::signal_bytes(there, bytes);
#elif defined(WARPGROUPS)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     smem_address(to)),
                 "l"(from), "r"(bytes), "r"(smem_address(there))
                 : "memory");
#endif
}
// Shared memory, as this thread has written and read it, comes before what the copy engine writes and wgmma reads.
__device__ inline void show_to_engine(void) {
#if defined(WARPGROUPS) && !defined(CUDA_ON_CPU)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Operands from fp32 numbers in shared memory: A[m][k] = p[m ld + k]; B[k][n] = p[n ld + k]
__device__ inline TileA float_a(const float *p, int ld) {
    TileC left, right;
    for (int i = 0; i < 4; i++) {
        left.x[i] = p[tile_row(i) * ld + tile_col(i)];
        right.x[i] = p[tile_row(i) * ld + tile_col(i) + 8];
    }
    return to_a(left, right);
}
__device__ inline TileB float_b(const float *p, int ld) {
    p += threadIdx.x % 32 / 4 * ld + threadIdx.x % 4 * 2;
    return make_b(p[0], p[1], p[8], p[9]);
}

// sum over x's columns of x_row . (gram x_row), for the lane's two rows; x (16, K) in shared memory, maybe in cores
template <bool cores> __device__ inline float2 quadratic(const floatX *x, int ld, const TilePair *gram, int K) {
    auto left = [&](int k) { return cores ? core_a(x, k, ld) : load_a(x + k, ld); };
    float2 sum = make_float2(0, 0);
    for (int n = 0; n < K; n += 32) {
        TileC y[4] = {};
#pragma unroll 4 // loads, from L2, on their way together
        for (int k = 0; k < K; k += 32)
            mma_pairs(y, left(k), left(k + 16), gram + (n / 8 * (K / 32) + k / 32) * 32, K / 32);
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < 4; i++) {
                const int row = tile_row(i), column = n + 8 * j + tile_col(i);
                const float term = y[j].x[i] * (float)x[cores ? core_at(row, column, ld) : row * ld + column];
                if (i < 2) sum.x += term;
                else sum.y += term;
            }
    }
    return make_float2(warp_sum(sum.x, 4), warp_sum(sum.y, 4));
}

// Eight numbers of token t's c, from `at` on; zeros behind the last
__device__ inline Pack cache_pack(const GoldSource &g, int64_t t, int at) {
    Pack c = zero_pack();
    if (at >= g.R) return c;
    const bool aligned = g.R % 8 == 0;
    if (g.c && aligned) return load(g.c + t * g.R + at);
    __align__(8) int8_t whole[8] = {};
    if (g.c8 && aligned) *(int2 *)whole = *(const int2 *)(g.c8 + t * g.R + at);
    for (int i = 0; i < 8 && at + i < g.R; i++)
        if (g.c8) c.x[i] = (aligned ? whole[i] : g.c8[t * g.R + at + i]) * g.scales[t];
        else c.x[i] = (float)g.c[t * g.R + at + i];
    return c;
}

// The warp's tokens, row 0 being the one before token t0: ids, c, h, and the norm of z.
template <bool warpgroups>
__device__ inline void past_rows(PastRows &rows, const PastSmem &s, const GoldSource &g, int64_t t0, int64_t T) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, ldc = g.R32 + PAD;
    floatX *c = s.c + warp * 16 * ldc, *h = s.h + warp * 16 * (64 + PAD);
    int *ids = s.ids + 16 * warp;
    const int64_t first = t0 - 1; // of row 0
    auto place = [=](int row, int at) { return warpgroups ? core_at(row, at, ldc) : row * ldc + at; };
    if (lane < 16) ids[lane] = first + lane >= 0 && first + lane < T ? g.ids[first + lane] : -1;
    __syncwarp();
#pragma unroll 8
    // by packs: few loads, all on their way at once
    for (int i = lane; i < 2 * g.R32; i += 32) {
        const int row = i / (g.R32 / 8), at = i % (g.R32 / 8) * 8;
        store(c + place(row, at), ids[row] >= 0 ? cache_pack(g, first + row, at) : zero_pack());
    }
#pragma unroll
    for (int i = lane; i < 16 * 8; i += 32) {
        const int row = i / 8, at = i % 8 * 8;
        Pack x = zero_pack();
        if (ids[row] >= 0) x = load(g.id_h + (int64_t)ids[row] * 64 + at);
        if (ids[row] >= 0 && row > 0 && ids[row - 1] >= 0) { // row 0's is not used
            const Pack before = load(g.id_h_before + (int64_t)ids[row - 1] * 64 + at);
            for (int j = 0; j < 8; j++) x.x[j] += before.x[j];
        }
        for (int j = 0; j < 8; j++) x.x[j] = tanhf(x.x[j]);
        store(h + row * (64 + PAD) + at, x);
    }
    __syncwarp();
    const float2 squares = quadratic<warpgroups>(c, ldc, g.c_gram, g.R32);
    for (int i = 0; i < 2; i++) {
        const int row = tile_row(2 * i), id = ids[row];
        float dot = 0;
#pragma unroll 4
        for (int at = lane % 4 * 8; at < g.R32; at += 32) {
            const Pack table = load(g.id_c + (int64_t)max(id, 0) * g.R32 + at), own = load(c + place(row, at));
            for (int j = 0; j < 8; j++) dot += table.x[j] * own.x[j];
        }
        dot = warp_sum(dot, 4);
        const float all = id >= 0 ? g.id_squares[id] + 2 * dot + (i ? squares.y : squares.x) : 0;
        rows.id[i] = id;
        rows.scale[i] = id >= 0 ? 1 / (sqrtf(fmaxf(all, 0) / g.C) + 1e-8f) : 0;
    }
}

// x (16 tokens x 32 channels, as 4 tiles) = x + (shift(x) - x) * m, along the rows; row 0 is not used
__device__ inline void past_mix(TileC (&x)[4], const TileC (&m)[4]) {
    const int lane = threadIdx.x % 32;
    for (int n = 0; n < 4; n++) {
        float up[4]; // of the row above, rows 8 apart in a lane
        for (int i = 0; i < 4; i++) up[i] = __shfl_sync(0xffffffffu, x[n].x[i], (lane + 28) % 32);
        for (int i = 0; i < 4; i++) {
            const float before = lane < 4 && i >= 2 ? up[i - 2] : up[i];
            x[n].x[i] += (before - x[n].x[i]) * m[n].x[i];
        }
    }
}

// Rows of a table are far apart in memory, and a warp that waits for one makes its block wait. So they come in the
// background, 64 channels at once (128 bytes), the next ones while these are multiplied. Odd rows have their halves
// swapped: a lane and its neighbour a row below then read from different banks.
__device__ inline int past_at(int row, int channel) { return row * 64 + (channel ^ row % 2 * 32); }

// ids (16): of the rows; negative where there is none
__device__ inline void past_request(floatX *rows, const floatX *table, const int *ids, int channel, int C) {
    const int step = 16 / sizeof(floatX), per_row = 64 / step, rows_at_once = 32 / per_row, lane = threadIdx.x % 32;
    rows += past_at(lane / per_row, lane % per_row * step); // rows_at_once is even: the others lie likewise
    table += channel + lane % per_row * step;
    ids += lane / per_row;
#pragma unroll
    for (int i = 0; i < 16; i += rows_at_once) async_copy16(rows + i * 64, table + (int64_t)max(ids[i], 0) * C, true);
}

// x = the lane's channels of its two rows, or with `add` x and these; channel: 0 or 32
template <bool add> __device__ inline void past_take(TileC (&x)[4], const floatX *rows, int channel) {
    rows += past_at(tile_row(0), channel + threadIdx.x % 4 * 8);
    const Pack own[2] = {load(rows), load(rows + 8 * 64)}; // tile_row(2), 8 rows on
    for (int n = 0; n < 4; n++)
        for (int i = 0; i < 4; i++) x[n].x[i] = (add ? x[n].x[i] : 0) + own[i / 2].x[2 * n + i % 2];
}

__device__ inline void past_scale(TileC (&x)[4], const float (&scale)[2]) { // of two rows; 0 where there is none
    for (int n = 0; n < 4; n++)
        for (int i = 0; i < 4; i++) x[n].x[i] *= scale[i / 2];
}

// Where a stage's weights are: number `at` of a tile's stages, first the keys', then the values'; a buffer; and for
// which time that is full, 0 or 1 in turn. Without warpgroups all threads copy, and the block meets at each stage. With
// them the copy engine does, and whoever is the last warp to be done with a buffer asks it for what goes there next: no
// warp waits for another that is less than a stage behind.
struct PastStage {
    int at, buffer, time;
    template <bool warpgroups> __device__ PastStage next(void) const {
        const bool turns = buffer == past_buffers(warpgroups) - 1;
        return {at + 1, turns ? 0 : buffer + 1, turns ? time ^ 1 : time};
    }
};

__device__ inline TilePair *past_buffer(const PastSmem &s, const GoldSource &g, int buffer) {
    return s.stage + buffer * 32 * past_stage(g);
}

// Without warpgroups: weights to a buffer, and behind them a pair of tiles of the queries, or none
__device__ inline void past_copy(const PastSmem &s, const GoldSource &g, int buffer, const TilePair *weights, int pairs,
                                 const TilePair *queries) {
    TilePair *to = past_buffer(s, g, buffer);
    stage_copy(to, weights, pairs);
    if (queries) stage_copy(to + pairs * 32, queries, 1);
    async_commit();
}
// With them: those of stage `at`. of_sweep: stages of a sweep, in all passes
__device__ inline void past_ask(const PastSmem &s, const GoldSource &g, const PastTask &task, int at, int buffer,
                                int of_sweep) {
#ifdef WARPGROUPS
    const bool keys = at < of_sweep, scores = at < g.C / 32;
    const int pairs = keys ? g.k.stage : g.v.stage, a_pair = 32 * sizeof(TilePair);
    const TilePair *tiles = keys ? g.k.tiles : g.v.tiles;
    TilePair *to = past_buffer(s, g, buffer);
    signal_expect(s.there + buffer, (pairs + scores) * a_pair);
    copy_bytes(to, tiles + (int64_t)(keys ? at : at - of_sweep) * pairs * 32, pairs * a_pair, s.there + buffer);
    if (scores) copy_bytes(to + pairs * 32, task.query.q + at * 32, a_pair, s.there + buffer);
#endif
}
__device__ inline void past_there(const PastSmem &s, PastStage stage) { // with warpgroups: until the weights are
#ifdef WARPGROUPS
    signal_wait(s.there + stage.buffer, stage.time);
#endif
}
__device__ inline void past_done(const PastSmem &s, const GoldSource &g, const PastTask &task, PastStage stage,
                                 int of_sweep) { // with warpgroups: the warp is, with the weights
#ifdef WARPGROUPS
    __syncwarp();
    if (threadIdx.x % 32 > 0) return;
    __threadfence_block(); // all reading before, and the copy behind
    if (atomicAdd(s.done + stage.buffer, 1) + 1 < (int)blockDim.x / 32) return;
    __threadfence_block();
    s.done[stage.buffer] = 0;
    const int next = stage.at + past_buffers(true);
    if (next < 2 * of_sweep) past_ask(s, g, task, next, stage.buffer, of_sweep);
#endif
}

// Before each stage of a sweep: a half, 0 or 1, of a head. With every head the table's rows are there, and the next
// ones are asked for; without warpgroups also the weights, and those of the next stage (null: there is none). Returns
// the rows.
template <bool warpgroups>
__device__ inline const floatX *past_advance(const PastSmem &s, const GoldSource &g, const floatX *table, int head,
                                             int half, int buffer, const TilePair *weights, int pairs,
                                             const TilePair *queries) {
    const int warp = threadIdx.x / 32;
    floatX *rows = s.rows + warp * 2 * 16 * 64;
    if (half == 0) async_wait<0>();
    else if (!warpgroups) async_wait<1>(); // the next head's rows may come later
    if (!warpgroups) __syncthreads();
    else if (half == 0) __syncwarp();
    if (!warpgroups && weights) past_copy(s, g, buffer ^ 1, weights, pairs, queries);
    if (half == 0) {
        if (head + 1 < g.H)
            past_request(rows + (head + 1) % 2 * 16 * 64, table, s.ids + 16 * warp, 64 * (head + 1), g.C);
        async_commit();
    }
    return rows + head % 2 * 16 * 64;
}

// All channels of the warp's tokens, for keys with scores: leaves u in shared memory and mean and 1/deviation in rows.
// The first stage is on its way. Ranks above 32 `groups` take several passes.
template <int groups, bool keys, bool warpgroups>
__device__ inline void past_sweep(PastRows &rows, const PastSmem &s, const GoldSource &g, const PastTask &task,
                                  PastStage &stage) {
    const GoldSource::Side &side = keys ? g.k : g.v;
    const int warp = threadIdx.x / 32, ldc = g.R32 + PAD, ldh = 64 + PAD, ldu = g.rank_pad + PAD, stages = g.C / 32,
              passes = g.rank_pad / (32 * groups);
    const floatX *c = s.c + (warpgroups ? warp / 4 * 4 : warp) * 16 * ldc, *h = s.h + warp * 16 * ldh + (keys ? 0 : 32),
                 *table = keys ? g.id_k0 : g.id_xo;
    floatX *u = s.u + warp * 16 * ldu;
    const TileA hidden[2] = {load_a(h, ldh), load_a(h + 16, ldh)};
    float scale[2];
    for (int i = 0; i < 2; i++) scale[i] = keys ? rows.scale[i] : rows.id[i] >= 0 ? 1 : 0;
    const bool complete = __all_sync(0xffffffffu, rows.id[0] >= 0 && rows.id[1] >= 0); // no row is to be zero
    if (!warpgroups) stage = {0, 0, 0};                                                // each sweep begins anew
    float sum[2] = {0, 0}, squares[2] = {0, 0}; // of k1; |k1|^2 + 2 u . (W2^T k1)
    for (int pass = 0; pass < passes; pass++) {
        TileC U[2][groups][4] = {}, score[1] = {}, x[4], m[4];
        PastStage before = stage;
        past_request(s.rows + warp * 2 * 16 * 64, table, s.ids + 16 * warp, 0, g.C);
        async_commit();
        const bool scores = keys && pass == 0;
        auto advance = [&](int head, int half) {
            const int j = 2 * head + half, next = pass * stages + j + 1; // of the sweep
            return past_advance<warpgroups>(s, g, table, head, half, stage.buffer,
                                            next < passes * stages ? side.tiles + (int64_t)next * side.stage * 32
                                                                   : nullptr,
                                            side.stage,
                                            scores && j + 1 < stages ? task.query.q + (j + 1) * 32 : nullptr);
        };
        if (warpgroups) {
            past_there(s, stage);
            multiply_inputs<groups, keys>(x, m, c, hidden, past_buffer(s, g, stage.buffer));
        }
        const floatX *own = advance(0, 0);
        if (warpgroups) until_inputs<0>(x, m);
        for (int head = 0; head < g.H; head++)
#pragma unroll 1 // longer code than this does not stay in the cache for it
            for (int half = 0; half < 2; half++) {
                const bool first = 2 * head + half == 0, last = 2 * head + half + 1 == stages;
                const TilePair *w = past_buffer(s, g, stage.buffer);
                const PastStage next = stage.next<warpgroups>();
                if (!warpgroups) {
                    for (int n = 0; n < 4; n++) x[n] = {};
                    for (int k = 0; k < g.R32 && keys; k += 32)
                        mma_pairs(x, load_a(c + k, ldc), load_a(c + k + 16, ldc), w + k, g.R32 / 32);
                }
                w += (keys ? 4 * g.R32 : 0) + 4 * 32; // 4 R32 / 32 pairs, and 4
                if (!warpgroups) {
                    start_at(m, load((const floatX *)(w + 8 * groups * 32 + threadIdx.x % 32)));
                    mma_pairs(m, hidden[0], hidden[1], w - 4 * 32, 1);
                }
                past_take<keys>(x, own, half * 32);
                if (keys || !complete) past_scale(x, scale);
                past_mix(x, m);
                for (int n = 0; n < 4 && pass == 0; n++)
                    for (int i = 0; i < 4; i++) {
                        sum[i / 2] += x[n].x[i];
                        squares[i / 2] += x[n].x[i] * x[n].x[i];
                    }
                if (warpgroups) { // the stage before: its channels' registers are free
                    until_multiplied(U);
                    if (!first) past_done(s, g, task, before, passes * stages);
                }
                const TileA left = to_a(x[0], x[1]), right = to_a(x[2], x[3]);
                if (scores) mma_pairs(score, left, right, w + (8 * groups + 1) * 32, 1);
                if (warpgroups) {
                    if (!last) past_there(s, next);
                    // once too often, as nvcc wants to know what is under way
                    multiply_inputs<groups, keys>(x, m, c, hidden,
                                                  past_buffer(s, g, last ? stage.buffer : next.buffer));
                    multiply_by_warpgroup(U, {left, right}, w);
                } else {
#pragma unroll
                    for (int i = 0; i < 2 * groups; i++)
                        mma_pairs(U[i / groups][i % groups], left, right, w + i * 4 * 32, 1);
                }
                before = stage;
                stage = next;
                for (int i = 0; i < 4 && scores && half == 1; i++) {
                    const int query = tile_col(i), pair = head * task.M + query;
                    if (query < task.M) s.p[pair * s.ld + 16 * warp + tile_row(i)] = score[0].x[i];
                    score[0].x[i] = 0;
                }
                if (!last) own = advance(head + half, 1 - half);
                if (warpgroups) until_inputs<1>(x, m);
            }
        if (warpgroups) {
            until_multiplied(U);
            past_done(s, g, task, before, passes * stages);
            if (keys && pass == passes - 1) __syncthreads(); // c has been read: u may replace it
        }
#pragma unroll
        for (int a = 0; a < groups; a++)
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    floatX *to = &u[tile_row(i) * ldu + 32 * groups * pass + 32 * a + 8 * n + tile_col(i)];
                    *to = (floatX)fast_tanh(U[0][a][n].x[i]);
                    squares[i / 2] += 2 * (float)*to * U[1][a][n].x[i];
                }
    }
    __syncwarp();
    const float2 more = quadratic<false>(u, ldu, side.gram, g.rank_pad);
    for (int i = 0; i < 2; i++) {
        rows.mean[i] = warp_sum(sum[i], 4) / g.C;
        const float var = (warp_sum(squares[i], 4) + (i ? more.y : more.x)) / g.C - rows.mean[i] * rows.mean[i];
        rows.rstd[i] = rsqrtf(fmaxf(var, 0) + 1e-5f);
    }
}

// What the scores lack after the sweep over the keys; -infinity where a query does not see a token.
__device__ inline void past_scores(const PastRows &rows, const PastSmem &s, const GoldSource &g, const PastTask &task,
                                   int64_t t0) {
    const int warp = threadIdx.x / 32, ldu = g.rank_pad + PAD, pairs = task.M * g.H;
    const floatX *u = s.u + warp * 16 * ldu;
    for (int n = 0; n < pairs; n += 8) {
        TileC low_rank[1] = {};
        const TilePair *w = task.query.u + n / 8 * g.rank_pad;
        for (int k = 0; k < g.rank_pad; k += 32)
            mma_pairs(low_rank, load_a(u + k, ldu), load_a(u + k + 16, ldu), w + k, 1);
        for (int i = 0; i < 4; i++) {
            const int pair = n + tile_col(i), row = tile_row(i);
            if (pair >= pairs) continue;
            float *p = &s.p[pair * s.ld + 16 * warp + row];
            const bool seen =
                row > 0 && rows.id[i / 2] >= 0 && t0 - 1 + row <= task.place->first + task.m0 + pair % task.M;
            const float centered = *p + low_rank[0].x[i] - rows.mean[i / 2] * task.query.sum[pair];
            *p = seen ? rows.rstd[i / 2] * centered + task.query.bias[pair] : -INFINITY;
        }
    }
}

// The scores of keys with a rope: those must be made channel by channel, in another sweep, from k1 and u.
__device__ OUT_OF_LINE void past_rotated_scores(PastRows rows, const GoldSource &g, const PastTask &task, int64_t t0) {
    const PastSmem s = past_smem(dynamic_smem<char>(), g, blockDim.x / 32, task.M);
    const int warp = threadIdx.x / 32, ldc = g.R32 + PAD, ldh = 64 + PAD, ldu = g.rank_pad + PAD, stages = g.C / 32;
    const floatX *c = s.c + warp * 16 * ldc, *h = s.h + warp * 16 * ldh, *u = s.u + warp * 16 * ldu;
    const TileA hidden[2] = {load_a(h, ldh), load_a(h + 16, ldh)};
    TileC score[1] = {};
    past_request(s.rows + warp * 2 * 16 * 64, g.id_k0, s.ids + 16 * warp, 0, g.C);
    async_commit();
    for (int j = 0; j < stages; j++) {
        const bool more = j + 1 < stages;
        const floatX *own =
            past_advance<false>(s, g, g.id_k0, j / 2, j % 2, j % 2,
                                more ? g.rotated_tiles + (int64_t)(j + 1) * g.rotated_stage * 32 : nullptr,
                                g.rotated_stage, more ? task.query.q + (j + 1) * 32 : nullptr);
        const TilePair *w = past_buffer(s, g, j % 2);
        TileC x[4] = {}, m[4], y[4] = {};
        start_at(m, load(g.k.mu + 32 * j + threadIdx.x % 4 * 8));
        for (int k = 0; k < g.R32; k += 32)
            mma_pairs(x, load_a(c + k, ldc), load_a(c + k + 16, ldc), w + k, g.R32 / 32);
        w += 4 * g.R32;
        mma_pairs(m, hidden[0], hidden[1], w, 1);
        w += 4 * 32;
        for (int k = 0; k < g.rank_pad; k += 32)
            mma_pairs(y, load_a(u + k, ldu), load_a(u + k + 16, ldu), w + k, g.rank_pad / 32);
        w += g.rank_pad / 8 * 32; // 4 rank_pad / 32 pairs of tiles
        past_take<true>(x, own, j % 2 * 32);
        past_scale(x, rows.scale);
        past_mix(x, m);
        const int channel = 32 * j + threadIdx.x % 4 * 8;
        const Pack gain = load(g.k.gain + channel), bias = load(g.k.bias + channel);
        for (int i = 0; i < 2; i++) {
            Pack k;
            for (int e = 0; e < 8; e++) {
                const int at = 2 * i + e % 2;
                k.x[e] = (x[e / 2].x[at] - rows.mean[i] + y[e / 2].x[at]) * rows.rstd[i] * gain.x[e] + bias.x[e];
            }
            k = rope_pack(k, g.rope, t0 - 1 + tile_row(2 * i), channel, 1);
            for (int e = 0; e < 8; e++) x[e / 2].x[2 * i + e % 2] = k.x[e];
        }
        mma_pairs(score, to_a(x[0], x[1]), to_a(x[2], x[3]), w, 1);
        if (j % 2 == 0) continue;
        for (int i = 0; i < 4; i++) {
            const int query = tile_col(i), row = tile_row(i);
            const bool seen = row > 0 && rows.id[i / 2] >= 0 && t0 - 1 + row <= task.place->first + task.m0 + query;
            if (query < task.M)
                s.p[(j / 2 * task.M + query) * s.ld + 16 * warp + row] = seen ? score[0].x[i] : -INFINITY;
            score[0].x[i] = 0;
        }
    }
}

// Scores to p', with running maxima and sums: a warp a query of a head.
__device__ inline void past_softmax(const PastSmem &s, int pairs) {
    const int lane = threadIdx.x % 32, tokens = blockDim.x / 2;
    for (int pair = threadIdx.x / 32; pair < pairs; pair += blockDim.x / 32) {
        float *p = s.p + pair * s.ld, top = -INFINITY, sum = 0, mean = 0;
        for (int t = lane; t < tokens; t += 32) top = fmaxf(top, p[t]);
        top = fmaxf(s.top[pair], warp_max(top));
        for (int t = lane; t < tokens; t += 32) {
            const float weight = softmax_weight(p[t], top);
            sum += weight;
            p[t] = weight * s.v_rstd[t];
            mean += p[t] * s.v_mean[t];
        }
        sum = warp_sum(sum);
        mean = warp_sum(mean);
        __syncwarp(); // all have read s.top
        if (lane > 0) continue;
        const float shrink = softmax_shrink(s.top[pair], top);
        s.top[pair] = top;
        s.sum[pair] = s.sum[pair] * shrink + sum;
        s.mean[pair] = s.mean[pair] * shrink + mean;
        s.shrink[pair] = shrink;
    }
}

// out = out shrink + sum of p' v1 over the block's tokens: a warp a head, v1 made once more
template <bool warpgroups>
__device__ inline void past_values(const PastSmem &s, const GoldSource &g, const PastTask &task, float *out,
                                   bool first) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, ldp = 64 + PAD;
    floatX *patch = s.patch + warp * 16 * ldp, *rows = s.rows + warp * 2 * 16 * 64;
    int step = 0; // rows are asked for one step ahead
    auto request = [&](int head, int group) {
        if (group == warps) group = 0, head += warps;
        if (head < g.H) past_request(rows + step % 2 * 16 * 64, g.id_xo, s.ids + group * 16, 64 * head, g.C);
        async_commit();
    };
    request(warp, 0);
    for (int head = warp; head < g.H; head += warps) {
        TileC sums[4][1] = {}, old[4] = {}; // 64 channels x 8 queries
        auto place = [&](int j, int i) { return out + (int64_t)tile_col(i) * g.C + 64 * head + 16 * j + tile_row(i); };
        for (int j = 0; j < 4 && !first; j++)
            for (int i = 0; i < 4; i++)
                if (tile_col(i) < task.M) old[j].x[i] = *place(j, i);
        // of the head's two halves: two steps of 16, tiles
        TileB mix[2][2][4];
        RawPack<floatX> mu[2];
        for (int j = 0; j < 2; j++) {
            const TilePair *w = g.v.tiles + (int64_t)(2 * head + j) * g.v.stage * 32;
            for (int n = 0; n < 4; n++)
                for (int half = 0; half < 2; half++)
                    mix[j][half][n] = warpgroups ? core_b(w + n * 32, half) : w[n * 32 + lane].b[half];
            mu[j] = load_raw(g.v.mu + 64 * head + 32 * j + lane % 4 * 8);
        }
        for (int group = 0; group < warps; group++) {
            const floatX *own = rows + step++ % 2 * 16 * 64;
            request(head, group + 1);
            async_wait<1>();
            __syncwarp();
            const floatX *h = s.h + group * 16 * ldp + 32;
            const int *ids = s.ids + 16 * group;
            const TileA hidden[2] = {load_a(h, ldp), load_a(h + 16, ldp)};
            const float scale[2] = {ids[tile_row(0)] >= 0 ? 1.f : 0.f, ids[tile_row(2)] >= 0 ? 1.f : 0.f};
            const bool complete = __all_sync(0xffffffffu, scale[0] * scale[1] > 0);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                TileC x[4], m[4];
                past_take<false>(x, own, 32 * j);
                start_at(m, unpack(mu[j]));
                for (int k = 0; k < 2; k++) mma(m, hidden[k], mix[j][k]);
                if (!complete) past_scale(x, scale);
                past_mix(x, m);
                for (int i = 0; i < 2; i++) {
                    Pack v;
                    for (int n = 0; n < 4; n++) v.x[2 * n] = x[n].x[2 * i], v.x[2 * n + 1] = x[n].x[2 * i + 1];
                    store(patch + tile_row(2 * i) * ldp + 32 * j + lane % 4 * 8, v);
                }
            }
            __syncwarp();
            const TileB p[1] = {float_b(s.p + head * task.M * s.ld + 16 * group, s.ld)};
            for (int i = 0; i < 4; i++) mma(sums[i], load_a_t(patch + 16 * i, ldp), p);
            __syncwarp();
        }
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < 4; i++) {
                if (tile_col(i) >= task.M) continue;
                const float shrink = first ? 0 : s.shrink[head * task.M + tile_col(i)];
                *place(j, i) = old[j].x[i] * shrink + sums[j][0].x[i];
            }
    }
}

// u_sum (H M, rank) = u_sum shrink + sum of p' u over the block's tokens, u of the values: a warp eight columns
__device__ inline void past_low_rank(const PastSmem &s, const GoldSource &g, int pairs, float *u_sum, bool first) {
    const int warps = blockDim.x / 32, ldu = g.rank_pad + PAD;
    for (int column = threadIdx.x / 32 * 8; column < g.rank_pad; column += 8 * warps)
        for (int pair = 0; pair < pairs; pair += 16) {
            TileC sum[1] = {};
            for (int group = 0; group < warps; group++) {
                const TileB u[1] = {load_b_t(s.u + group * 16 * ldu + column, ldu)};
                mma(sum, float_a(s.p + pair * s.ld + 16 * group, s.ld), u);
            }
            for (int i = 0; i < 4; i++) {
                const int row = pair + tile_row(i);
                if (row >= pairs) continue;
                float *to = &u_sum[(int64_t)row * g.rank_pad + column + tile_col(i)];
                *to = (first ? 0 : *to * s.shrink[row]) + sum[0].x[i];
            }
        }
}

// Grid: splits of the tokens before the window. Each writes its sums over its tokens.
template <int groups, bool warpgroups>
__global__ void __launch_bounds__(256, 1)
    past_attention_kernel(const __grid_constant__ GoldSource g, const __grid_constant__ PastTask task) {
#ifndef WARPGROUPS
    if (warpgroups) return; // this code is for another GPU
#endif
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, pairs = task.M * g.H, step = 15 * warps;
    const PastSmem s = past_smem(dynamic_smem<char>(), g, warps, task.M);
    let_next_start();
    wait_for_previous();
    const int64_t T = task.place->begin, tiles = (T + step - 1) / step;
    const int64_t per = (tiles + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * per;
    float *out = task.to.out + (int64_t)blockIdx.x * task.M * g.C,
          *u_sum = task.to.u + (int64_t)blockIdx.x * pairs * g.rank_pad;
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        s.top[i] = -INFINITY;
        s.sum[i] = s.mean[i] = 0;
    }
#ifdef WARPGROUPS
    for (int i = 0; i < past_buffers(true) && warpgroups && threadIdx.x == 0; i++) {
        signal_init(s.there + i, 1);
        s.done[i] = 0;
    }
#endif
    const int stages = g.rank_pad / (32 * groups) * (g.C / 32); // of a sweep
    PastStage stage = {0, 0, 0};
    for (int64_t tile = begin; tile < begin + per && tile < tiles; tile++) {
        const int64_t t0 = tile * step + 15 * warp; // of this warp's row 1
        PastRows rows;
        stage.at = 0;
        if (warpgroups) show_to_engine(); // what lay in the buffers since the last sweep
        __syncthreads();
        if (!warpgroups) past_copy(s, g, 0, g.k.tiles, g.k.stage, task.query.q);
        const int buffers = past_buffers(true);
        for (int i = 0; i < buffers && warpgroups && threadIdx.x == 0; i++)
            past_ask(s, g, task, i, (stage.buffer + i) % buffers, stages);
        past_rows<warpgroups>(rows, s, g, t0, T);
        if (warpgroups) {
            show_to_engine(); // c
            __syncthreads();
        }
        past_sweep<groups, true, warpgroups>(rows, s, g, task, stage);
        if (!warpgroups && g.rope.used) {
            __syncthreads();
            past_copy(s, g, 0, g.rotated_tiles, g.rotated_stage, task.query.q);
            past_rotated_scores(rows, g, task, t0);
        } else {
            past_scores(rows, s, g, task, t0);
        }
        if (!warpgroups) {
            __syncthreads();
            past_copy(s, g, 0, g.v.tiles, g.v.stage, nullptr);
        }
        past_sweep<groups, false, warpgroups>(rows, s, g, task, stage);
        for (int i = 0; i < 2 && threadIdx.x % 4 == 0; i++) {
            const bool finite = rows.id[i] >= 0;
            s.v_mean[16 * warp + tile_row(2 * i)] = finite ? rows.mean[i] : 0;
            s.v_rstd[16 * warp + tile_row(2 * i)] = finite ? rows.rstd[i] : 0;
        }
        __syncthreads();
        past_softmax(s, pairs);
        __syncthreads();
        past_values<warpgroups>(s, g, task, out, tile == begin);
        past_low_rank(s, g, pairs, u_sum, tile == begin);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        task.to.top[(int64_t)blockIdx.x * pairs + i] = s.top[i];
        task.to.sum[(int64_t)blockIdx.x * pairs + i] = s.sum[i];
        task.to.mean[(int64_t)blockIdx.x * pairs + i] = s.mean[i];
    }
}

// q~ = q * ln_k's gain (with rope: q), W2^T q~ and two sums, of all queries of a head: a block. q~ includes log2(e) /
// sqrt(N): softmax goes by powers of 2.
__global__ void __launch_bounds__(WINDOW_THREADS)
    past_queries_kernel(PastQuery to, QuerySource q, GoldSource g, int M) {
    __shared__ float2 shared[32];
    __shared__ __align__(16) float qs[8][N];
    __shared__ float low_rank[8][32];
    const int h = blockIdx.x, thread = threadIdx.x, lane = thread % 32, c = h * N + thread % 8 * 8;
    const Pack gain = q.q ? zero_pack() : load(q.gain + c), bias = q.q ? zero_pack() : load(q.bias + c);
    let_next_start();
    wait_for_previous();
    for (int i = thread; i < 8 * N; i += WINDOW_THREADS) qs[i / N][i % N] = 0;
    __syncthreads();
    for (int m = 0; m < M; m++) {
        const Pack part = query_pack(q, m, c, g.C, gain, bias, shared);
        if (thread >= 8) continue;
        store(&qs[m][8 * thread], part);
    }
    __syncthreads();
    for (int m = 0; m < M; m++) {
        float2 sum = make_float2(0, 0); // of q~, of q . bias
        if (thread < N) {
            const float scaled = qs[m][thread] * SCALE_LOG2;
            qs[m][thread] = (float)(floatX)(scaled * (g.rope.used ? 1 : (float)g.k.gain[h * N + thread]));
            sum = make_float2(qs[m][thread], scaled * (float)g.k.bias[h * N + thread]);
        }
        sum = block_sum(sum, shared);
        if (thread == 0) to.sum[h * M + m] = sum.x;
        if (thread == 0) to.bias[h * M + m] = sum.y;
    }
    __syncthreads();
    if (thread < 64) { // k1's channels 32 (2 h + thread / 32) ..
        TilePair pair;
        for (int half = 0; half < 2; half++) {
            const int first = 32 * (thread / 32) + 16 * half + lane % 4 * 2;
            float x[4];
            for (int i = 0; i < 4; i++) x[i] = qs[lane / 4][tile_channel(first + i % 2 + i / 2 * 8)];
            pair.b[half] = make_b(x[0], x[1], x[2], x[3]);
        }
        to.q[(2 * h + thread / 32) * 32 + lane] = pair;
    }
    for (int column = 0; column < g.rank_pad; column += 32) {
        for (int m = thread / 32; m < M; m += WINDOW_THREADS / 32) {
            float sum = 0;
#pragma unroll 16
            for (int i = 0; i < N; i++)
                sum += qs[m][i] * (float)g.k.w2[(int64_t)(h * N + i) * g.rank_pad + column + lane];
            low_rank[m][lane] = sum;
        }
        __syncthreads();
        // a query's column of a tile is in four lanes
        for (int i = thread; i < 4 * M; i += WINDOW_THREADS) {
            const int m = i / 4, n = h * M + m, k = i % 4 * 2;
            const float *x = low_rank[m];
            TilePair pair;
            pair.b[0] = make_b(x[k], x[k + 1], x[k + 8], x[k + 9]);
            pair.b[1] = make_b(x[k + 16], x[k + 17], x[k + 24], x[k + 25]);
            to.u[(n / 8 * (g.rank_pad / 32) + column / 32) * 32 + n % 8 * 4 + i % 4] = pair;
        }
        __syncthreads();
    }
}

// ---- both ----

// y (M, C) from what the splits found; a block a head of a query. The older tokens' sums still lack W2 and the norm's
// gain.
template <typename T>
__global__ void __launch_bounds__(256)
    combine_splits_kernel(T *y, SplitSums window, PastSums past, GoldSource g, int window_splits, int past_splits) {
    __shared__ float2 shared[32];
    __shared__ float weights[WINDOW_SPLITS + MOST_SPLITS];
    __shared__ __align__(16) float low_rank[MAX_C / 16];
    __shared__ float parts[4][N];
    __shared__ float past_parts[4][N];
    const int h = blockIdx.x, m = blockIdx.y, M = gridDim.y, pair = h * M + m, pairs = g.H * M;
    const int splits = window_splits + past_splits, thread = threadIdx.x, channel = h * N + thread % N,
              part = thread / N;
    let_next_start();
    wait_for_previous();
    for (int i = thread; i < splits; i += 256)
        weights[i] =
            i < window_splits ? window.top[(i * M + m) * g.H + h] : past.top[(i - window_splits) * pairs + pair];
    __syncthreads();
    float top = -INFINITY;
    for (int i = 0; i < splits; i++) top = fmaxf(top, weights[i]);
    __syncthreads();
    float sum = 0;
    float2 past_sum = make_float2(0, 0); // of p, of p' mean
    for (int i = thread; i < splits; i += 256) {
        weights[i] = exp2f(weights[i] - top); // top is finite; 0 for a split that saw nothing
        const int at = (i - window_splits) * pairs + pair;
        if (i < window_splits) sum += weights[i] * window.sum[(i * M + m) * g.H + h];
        else past_sum = make_float2(past_sum.x + weights[i] * past.sum[at], past_sum.y + weights[i] * past.mean[at]);
    }
    sum = block_sum(sum, shared);
    past_sum = block_sum(past_sum, shared);
    float out = 0, past_out = 0;
    for (int i = part; i < splits; i += 4) {
        if (weights[i] == 0) continue;
        if (i < window_splits) out += weights[i] * window.out[((int64_t)i * M + m) * g.C + channel];
        else past_out += weights[i] * past.out[((int64_t)(i - window_splits) * M + m) * g.C + channel];
    }
    if (past_splits > 0) {
        for (int r = thread; r < g.rank_pad; r += 256) {
            float u = 0;
            for (int i = 0; i < past_splits; i++) {
                const float weight = weights[window_splits + i];
                if (weight > 0) u += weight * past.u[((int64_t)i * pairs + pair) * g.rank_pad + r];
            }
            low_rank[r] = u;
        }
        __syncthreads();
        for (int r = 8 * part; r < g.rank_pad; r += 32) {
            const Pack w = load(g.v.w2 + (int64_t)channel * g.rank_pad + r), u = load(low_rank + r);
            for (int i = 0; i < 8; i++) past_out += w.x[i] * u.x[i];
        }
    }
    parts[part][thread % N] = out;
    past_parts[part][thread % N] = past_out;
    __syncthreads();
    if (part > 0) return;
    out = past_out = 0;
    for (int i = 0; i < 4; i++) {
        out += parts[i][thread];
        past_out += past_parts[i][thread];
    }
    out += (past_out - past_sum.y) * (float)g.v.gain[channel] + past_sum.x * (float)g.v.bias[channel];
    y[(int64_t)m * g.C + channel] = (T)(out / (sum + past_sum.x));
}

#ifdef CUDA_ON_CPU // in dev/cpu/twins_infer.h
static void window_attention_in_loops(const WindowTask &p, int splits);
#endif

// y (M, C) = causal attention of queries m0.. of M over all that is in the cache. task: what the caller knows of them.
// y null, for a context that fits the window: the window's splits are left as they are.
template <typename T> static void gold_attention(Infer *f, const GoldSource &g, T *y, WindowTask task, int m0, int M) {
    task.keys = g.k.ring, task.values = g.v.ring, task.to = f->sums, task.place = f->place, task.window = f->window;
    task.C = g.C, task.H = g.H, task.apart = f->apart, task.far = f->far;
    const int splits = f->window_begin > 0 ? f->past_splits : 0;
    for (int m = m0; m < M; m += f->queries) {
        const int here = M - m < f->queries ? M - m : f->queries;
        WindowTask part = task;
        part.m0 = m, part.M = here;
        if (task.query.q) part.query.q += (int64_t)m * g.C;
#ifdef CUDA_ON_CPU
        for (int context = 0; cuda_on_cpu::twins && context < f->contexts; context++) {
            WindowTask own = part;
            own.move(context);
            window_attention_in_loops(own, f->window_splits);
        }
        if (!cuda_on_cpu::twins)
#endif
            launch_early(window_attention_kernel, dim3(g.H, f->window_splits, f->apart ? f->contexts : here),
                         WINDOW_THREADS, 0, part);
        if (y == nullptr && splits == 0) continue;                // the caller combines
        for (int context = 0; context < f->contexts; context++) { // one after the other
            GoldSource own = g;
            PastTask past = {f->past_query, f->past_sums, f->place, m, here};
            QuerySource query = part.query;
            SplitSums sums = f->sums;
            T *to = y + (int64_t)m * g.C;
            move_each(context * f->apart, past.place, query.q0, query.place, sums.out, sums.top, sums.sum, to);
            move_each(context * f->far, own.ids, own.c, own.c8, own.scales);
            if (splits > 0) {
                const size_t smem = past_smem(nullptr, g, f->past_warps, here).bytes;
                auto kernel = g.rank_pad == 64 ? past_attention_kernel<2, false> : past_attention_kernel<4, false>;
#if WARPGROUP_KERNELS
                if (g.warpgroups)
                    kernel = g.rank_pad == 64 ? past_attention_kernel<2, true> : past_attention_kernel<4, true>;
#endif
                allow_smem(kernel, smem);
                launch_early(past_queries_kernel, dim3(g.H), WINDOW_THREADS, 0, f->past_query, query, own, here);
                launch_early(kernel, dim3(splits), 32 * f->past_warps, smem, own, past);
            }
            launch_early(combine_splits_kernel<T>, dim3(g.H, here), 256, 0, to, sums, f->past_sums, own,
                         f->window_splits, splits);
        }
    }
}

// ---- attention of layers that keep their own keys and values (gptalpha, llama) ----
//
// A warp takes 16 queries of a head and a share of the context, in tiles of 64 tokens: attention_forward_kernel, but
// that the queries are the context's last tokens. combine_kept_kernel puts the shares together. Floor: bytes, each key
// and value once per 16 queries.

// warps: eight for each of an H100's multiprocessors
static const int KEPT_QUERIES = 16, KEPT_TILE = 64, KEPT_WARPS = 1056;

// Grid: shares, heads, groups of queries
struct KeptTask {
    const floatX *q, *keys, *values; // (M, A); (.., A) twice
    int64_t first;                   // query m sees tokens 0 .. first + m
    SplitSums to;
    int M, tiles_per_split, A;
};

__global__ void __launch_bounds__(32) kept_attention_kernel(KeptTask task) {
    __shared__ __align__(16) floatX q[KEPT_QUERIES][LD];
    __shared__ __align__(16) floatX k[KEPT_TILE][LD];
    __shared__ __align__(16) floatX v[KEPT_TILE][LD];
    const int h = blockIdx.y, m0 = blockIdx.z * KEPT_QUERIES, queries_here = min(KEPT_QUERIES, task.M - m0), A = task.A;
    const int64_t begin = (int64_t)blockIdx.x * task.tiles_per_split * KEPT_TILE;
    const int64_t end = min(begin + (int64_t)task.tiles_per_split * KEPT_TILE, task.first + m0 + queries_here);
    async_tile<KEPT_QUERIES, N, 32>(&q[0][0], task.q + (int64_t)m0 * A + h * N, 0, queries_here, A);
    async_commit();
    async_wait<0>();
    __syncthreads();
    TileA queries[4];
    for (int i = 0; i < 4; i++) queries[i] = load_a(&q[0][16 * i], LD);
    TileC out[8] = {};
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}; // of the two rows in this lane
    for (int64_t t0 = begin; t0 < end; t0 += KEPT_TILE) {
        const int valid = (int)min((int64_t)KEPT_TILE, end - t0);
        async_tile<KEPT_TILE, N, 32>(&k[0][0], task.keys + t0 * A + h * N, 0, valid, A);
        async_tile<KEPT_TILE, N, 32>(&v[0][0], task.values + t0 * A + h * N, 0, valid, A);
        async_commit();
        async_wait<0>();
        __syncthreads();
        TileC p[8] = {};
        for (int i = 0; i < 4; i++) {
            TileB right[8];
            for (int n = 0; n < 8; n++) right[n] = load_b(&k[8 * n][16 * i], LD);
            mma(p, queries[i], right);
        }
        for (int i = 0; i < 4; i++) { // scores, and the rows' maxima
            const int64_t position = task.first + m0 + tile_row(i);
            for (int n = 0; n < 8; n++) {
                const bool seen = t0 + 8 * n + tile_col(i) <= position;
                p[n].x[i] = seen ? p[n].x[i] * SCALE_LOG2 : -INFINITY;
            }
        }
        for (int i = 0; i < 2; i++) {
            float high = top[i];
            for (int n = 0; n < 8; n++) high = fmaxf(high, fmaxf(p[n].x[2 * i], p[n].x[2 * i + 1]));
            high = warp_max(high, 4);
            const float shrink = softmax_shrink(top[i], high); // a query may see nothing of this tile
            sum[i] *= shrink;
            top[i] = high;
            for (int n = 0; n < 8; n++)
                for (int e = 2 * i; e < 2 * i + 2; e++) {
                    out[n].x[e] *= shrink;
                    p[n].x[e] = softmax_weight(p[n].x[e], high);
                    sum[i] += p[n].x[e];
                }
        }
        for (int i = 0; i < 4; i++) {
            TileB right[8];
            for (int n = 0; n < 8; n++) right[n] = load_b_t(&v[16 * i][8 * n], LD);
            mma(out, to_a(p[2 * i], p[2 * i + 1]), right);
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; i++) {
        const int m = m0 + tile_row(i);
        const float total = warp_sum(sum[i / 2], 4);
        if (m >= task.M) continue;
        const int64_t row = (int64_t)blockIdx.x * task.M + m;
        for (int n = 0; n < 8; n++) task.to.out[row * A + h * N + 8 * n + tile_col(i)] = out[n].x[i];
        if (threadIdx.x % 4 > 0 || i % 2 > 0) continue;
        task.to.top[row * (A / N) + h] = top[i / 2];
        task.to.sum[row * (A / N) + h] = total;
    }
}

// y (M, A) from the splits' sums; a block a query
__global__ void combine_kept_kernel(floatX *y, SplitSums sums, int splits, int M, int A) {
    const int m = blockIdx.x, H = A / N;
    for (int c = threadIdx.x; c < A; c += blockDim.x) {
        const int pair = m * H + c / N, pairs = M * H;
        float top = -INFINITY, sum = 0, out = 0;
        for (int i = 0; i < splits; i++) top = fmaxf(top, sums.top[i * pairs + pair]);
        for (int i = 0; i < splits; i++) {
            const float weight = exp2f(sums.top[i * pairs + pair] - top); // top is finite
            if (weight == 0) continue;                                    // a split that this query does not see
            sum += sums.sum[i * pairs + pair] * weight;
            out += sums.out[((int64_t)i * M + m) * A + c] * weight;
        }
        y[(int64_t)m * A + c] = (floatX)(out / sum);
    }
}

// M queries, the context's last tokens, the first of them at position `first`, over keys and values (.., A) of all.
static void attend_in_tiles(Infer *f, floatX *y, const floatX *q, const floatX *keys, const floatX *values,
                            int64_t first, int M) {
    const Dims &d = f->m.d;
    const int groups = (int)ceil_div(M, KEPT_QUERIES);
    const int64_t tiles = ceil_div(first + M, KEPT_TILE);
    const int64_t wanted = KEPT_WARPS / (d.H * groups), per = ceil_div(tiles, wanted > 1 ? wanted : 1);
    const int splits = (int)ceil_div(tiles, per);
    const KeptTask task = {q, keys, values, first, f->kept_sums, M, (int)per, d.A};
    kept_attention_kernel<<<dim3(splits, d.H, groups), 32, 0, stream>>>(task);
    combine_kept_kernel<<<M, 256, 0, stream>>>(y, task.to, splits, M, d.A);
}

// A layer's `attend`: keeps the rows' keys and values, then attends over all that is kept.
static void attend_kept(Model *m, Layer *layer) {
    Infer *f = (Infer *)m;
    const Dims &d = m->d;
    const Attention &a = layer->attention;
    const KeptKv &kv = f->kept[layer->index];
    const int M = d.BT - d.lead, A = d.A;
    const int64_t first = d.first + d.lead, lead = d.lead * (int64_t)A;
    const size_t bytes = (size_t)M * A * sizeof(floatX);
    CUDA_CHECK(cudaMemcpyAsync(kv.keys + first * A, a.k + lead, bytes, cudaMemcpyDeviceToDevice, stream));
    CUDA_CHECK(cudaMemcpyAsync(kv.values + first * A, a.v + lead, bytes, cudaMemcpyDeviceToDevice, stream));
    attend_in_tiles(f, a.y + lead, a.q + lead, kv.keys, kv.values, first, M);
}

// The time mixer of GOLD layers during inference: the trainer's queries and output, attention over the cache. Where
// only the last token's logits count, a layer's last tokens are enough: two more with every layer that follows.
static void gold_cached_forward(Model *m, Layer *layer, floatX *out, const floatX *x) {
    Infer *f = (Infer *)m;
    const Dims &d = m->d;
    const int64_t lead = d.lead * (int64_t)d.C;
    gold_queries(m, layer, x);
    const int M = d.BT - d.lead, needed = 2 * (d.L - layer->index), skip = f->last_only && M > needed ? M - needed : 0;
    const GoldSource &g = f->sources[layer->index - d.G0];
    CUDA_CHECK(cudaMemsetAsync(layer->gold.y, 0, (d.lead + skip) * (int64_t)d.C * sizeof(floatX), stream));
    if (f->window_begin == 0 && M - skip >= KEPT_QUERIES) { // all keys and values are at hand, in order
        attend_in_tiles(f, layer->gold.y + lead, layer->gold.q + lead, g.k.ring, g.v.ring, f->position - M, M);
    } else {
        WindowTask task = {};
        task.query.q = layer->gold.q + lead;
        gold_attention(f, g, layer->gold.y + lead, task, skip, M);
    }
    gold_output(m, layer, out);
}

static Mixer gold_from_cache(void) { // the trainer's row, but for the forward pass
    Mixer row = *find_mixer(TIME_MIXERS, "gold");
    row.forward = gold_cached_forward, row.backward = nullptr, row.remake = nullptr;
    return row;
}
static const Mixer GOLD_FROM_CACHE = gold_from_cache();

// For `rows` queries at most
static void kept_allocate(Infer *f, int rows) {
    Model *m = &f->m;
    const Dims &d = m->d;
    const int64_t sums = rows + KEPT_WARPS * KEPT_QUERIES / d.H; // shares x queries: see attend_in_tiles
    f->kept = (KeptKv *)calloc(d.L, sizeof(KeptKv));
    bool any = f->G > 0;
    for (int l = 0; l < d.L; l++) {
        if (!m->layers[l].tmix->keeps_kv) continue;
        any = true;
        m->layers[l].attend = attend_kept;
        // not cleared: rows are written before they are read
        for (floatX **p : {&f->kept[l].keys, &f->kept[l].values})
            CUDA_CHECK(cudaMalloc((void **)p, (size_t)f->capacity * d.A * sizeof(floatX)));
    }
    if (!any) return;
    device_alloc((void **)&f->kept_sums.out, sums * d.A * sizeof(float));
    device_alloc((void **)&f->kept_sums.top, sums * d.H * sizeof(float));
    device_alloc((void **)&f->kept_sums.sum, sums * d.H * sizeof(float));
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. One token at a time
//
// With one row there are no tiles to multiply: every weight is read once and used once. Floor: bytes, those of all
// weights but the embedding; at 3 TB/s 0.9 ms for the 1.3 billion of L24 D2048. So a step is a chain of kernels that
// each read a few matrices as fast as memory gives them, seven a layer, recorded as one CUDA graph. Four things keep
// the memory busy:
//
//   - a block a multiprocessor, and each of its 16 warps has 6 to 8 KB of its rows on their way to shared memory: 13 MB
//     and more together, where memory that takes 1 us to answer needs 3 to be busy. The rest evens out which warps it
//     serves first.
//   - kernels are launched early: a block takes its place when the one before it there ends, asks for its first rows,
//     and only then waits for what other blocks of the kernel before are still making
//   - what goes on between two products (norm, shift, mix, gate) is done by every block of the next product for itself:
//     C numbers, from L2, instead of a launch of its own
//   - what a kernel needs besides comes in one trip to memory where it can: a trip costs about as much as 2 MB of
//     weights. Code of 800 instructions that is cold costs less than that: a product of 160 rows in a chain of seven
//     kernels in turn took 1.83 us, in a chain of one 1.82; with 32 contexts 3.59 and 3.42 (H200).
//
// The residual stream is fp32 here; a product's inputs are rounded to floatX, as everywhere.
//
// With --weights int8 half the bytes stream. Each row has a scale, which its sum is multiplied by in the end. A scale
// for each 64 columns would be little finer: a trained model's weights are off by 0.59 % instead of 0.67 %, and its
// loss moves by less than 1e-4 with either. Pre-fill multiplies many rows by the same numbers: it has a matrix made
// into floatX before each product (linear_forward; in bf16 that rounds them once more).

// 512: a thread has a pack of a vector, or none
static const int MV_THREADS = MAX_C / 8, MV_WARPS = MV_THREADS / 32;
// parts of a warp's rows in shared memory; where that is small
static const int MV_SLOTS = 4, MV_FEW_SLOTS = 2;
// bytes of a part; elements; packs that a lane reads of it
static const int MV_PART_BYTES = 2048, MV_PART = MV_PART_BYTES / (int)sizeof(floatX), MV_PACKS = MV_PART / (32 * 8);

template <typename T> __device__ inline void async_pack(T *to, const T *from, int n = 8) {
    for (int i = 0; i < n; i += 16 / (int)sizeof(T)) async_copy16(to + i, from + i, true);
}

// A warp's rows of weights, row, row + step, ..: each in parts of MV_PART elements. A part is there after
// async_wait<MV_SLOTS - 1>: a lane reads only what it has copied. With MV_FEW_SLOTS, two empty groups follow each part,
// so that this waits for all but one of them.
template <typename Job> struct WeightStream {
    const Job &job;
    floatX *slots; // (n_slots, MV_PART), or as many as there are parts
    int n_slots, row, step, k, slot;
    const floatX *weights;          // of the row
    __device__ void request(void) { // the next part, if there is one, is a group of its own
        const int lane = threadIdx.x % 32 * 8;
        if (row < job.rows) {
            if (k == 0) {
                const StepRow own = job.weights(row);
                weights = (const floatX *)own.matrix.w + (int64_t)own.row * job.K;
            }
            const floatX *from = weights + k + lane;
            floatX *to = slots + slot * MV_PART + lane;
            for (int i = 0; i < MV_PART; i += 32 * 8)
                if (k + i + lane < job.K) async_pack(to + i, from + i);
            k += MV_PART;
            if (k >= job.K) {
                k = 0;
                row += step;
            }
            slot = (slot + 1) & (n_slots - 1);
        }
        async_commit();
        if (n_slots == MV_SLOTS) return;
        async_commit();
        async_commit();
    }
};

// A row's sum of products, eight numbers a lane at a time
struct RowSum {
    float lane;
    __device__ void add(const RawPack<floatX> &w, const RawPack<floatX> &x) {
        const Pack a = unpack(w), b = unpack(x);
        for (int i = 0; i < 8; i++) lane += a.x[i] * b.x[i];
    }
    __device__ float total(void) const { return warp_sum(lane); }
};

// y[row] = weights(row) . x for rows 0..rows-1, x made by `before` in shared memory, y handed to `after`. A row may
// have a second x. `early` asks for what `before` needs and no kernel that may still run writes, `beside` for what
// `after` needs. Grid: (any number of blocks, problems). vectors: floatX that `early` and `before` use; used: slots
// that a warp fills.
template <typename Job>
HAS_TWIN __global__ void __launch_bounds__(MV_THREADS, 1) matvec_kernel(Job job, int vectors, int n_slots, int used) {
    floatX *x = dynamic_smem<floatX>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32 * 8, step = gridDim.x * MV_WARPS;
    int row = warp * gridDim.x + blockIdx.x, slot = 0; // so that blocks differ by one row at most
    WeightStream<Job> stream = {job, x + vectors + warp * used * MV_PART, n_slots, row, step, 0, 0, nullptr};
    let_next_start();
    job.early(x);
#pragma unroll 1
    for (int i = 0; i < n_slots; i++) stream.request();
    wait_for_previous();
    async_wait<MV_SLOTS - 1>(); // what is early came with the first part
    job.before(x);
    __syncthreads();
    for (; row < job.rows; row += step) {
        const floatX *first = x + job.first(row), *second = x + job.second(row);
        const float4 beside = job.beside(row);
        RowSum of_first = {}, of_second = {};
        for (int k = lane; k - lane < job.K; k += MV_PART) {
            const floatX *part = stream.slots + slot * MV_PART + lane;
            async_wait<MV_SLOTS - 1>();
#pragma unroll 4
            for (int i = 0; i < MV_PACKS; i++) {
                const int at = k + 256 * i;
                if (at >= job.K) break;
                const RawPack<floatX> w = load_raw(part + 256 * i);
                of_first.add(w, load_raw(first + at));
                if (second != x) of_second.add(w, load_raw(second + at));
            }
            slot = (slot + 1) & (n_slots - 1);
            stream.request();
        }
        const float2 sum = make_float2(of_first.total(), second == x ? 0 : of_second.total());
        if (lane == 0) job.after(row, sum.x, beside, 0);
        if (lane == 0 && second != x) job.after(row, sum.y, beside, 1);
    }
}

static bool matvec_fits(int64_t vectors, int n_slots) {
    // 1024: what is static
    return vectors * (int64_t)sizeof(floatX) + MV_WARPS * n_slots * MV_PART_BYTES + 1024 <= block_smem;
}

#ifdef CUDA_ON_CPU
template <typename Job>
__global__ void __launch_bounds__(MV_THREADS) matvec_input_kernel(Job job, floatX *x, int vectors) {
    x += (int64_t)blockIdx.y * vectors;
    job.early(x);
    async_commit();
    async_wait<0>();
    job.before(x);
}

// The twin, for the CPU, of the kernels that multiply: each number is a dot product, its sum in another order. x:
// (problems, vectors) of the first of the contexts
template <typename W, typename Job>
static void products_in_loops(const Job &job, const floatX *x, int vectors, int problems, int64_t apart, int64_t far,
                              int contexts) {
    static float *floats = nullptr;
    static int64_t capacity = 0;
    const int64_t of_context = (int64_t)vectors * problems, n = of_context * contexts;
    if (n > capacity) {
        CUDA_CHECK(cudaFree(floats));
        CUDA_CHECK(cudaMalloc(&floats, n * sizeof(float)));
        capacity = n;
    }
    std::vector<Job> jobs((size_t)contexts, job);
    for (int64_t context = 0; context < contexts; context++) {
        const floatX *from = x;
        move_each(context * apart, from);
        jobs[context].move(context * apart, context * far);
        for (int64_t i = 0; i < of_context; i++) floats[context * of_context + i] = (float)from[i];
    }
    cuda_on_cpu::for_each((int64_t)problems * job.rows, (int64_t)job.K * contexts, [&](int64_t i) {
        const int row = (int)(i % job.rows);
        blockIdx.y = (unsigned)(i / job.rows);
        const StepRow from = job.weights(row);
        const W *w = (const W *)from.matrix.w + (int64_t)from.row * job.K;
        const float scale = sizeof(W) == 1 ? from.matrix.scales[from.row] : 1;
        const int to_second = job.second(row) ? job.second(row) - job.first(row) : 0;
        for (int64_t context = 0; context < contexts; context++) {
            const float *first = floats + context * of_context + (int64_t)blockIdx.y * vectors + job.first(row);
            const Job &own = jobs[context];
            float2 sum = make_float2(0, 0);
            if (to_second) cuda_on_cpu::dots<2>(&sum.x, w, first, to_second, job.K);
            else cuda_on_cpu::dots<1>(&sum.x, w, first, 0, job.K);
            const float4 beside = own.beside(row);
            own.after(row, sum.x * scale, beside, 0);
            if (to_second) own.after(row, sum.y * scale, beside, 1);
        }
    });
}

template <typename W, typename Job> static void matvec_in_loops(const Job &job, int vectors, int problems) {
    static floatX *x = nullptr;
    static int64_t capacity = 0;
    const int64_t n = (int64_t)vectors * problems;
    if (n > capacity) {
        CUDA_CHECK(cudaFree(x));
        CUDA_CHECK(cudaMalloc(&x, n * sizeof(floatX)));
        capacity = n;
    }
    matvec_input_kernel<Job><<<dim3(1, problems), MV_THREADS, 0, stream>>>(job, x, vectors);
    products_in_loops<W>(job, x, vectors, problems, 0, 0, 1);
}
#endif

template <typename Job> static void matvec_launch(const Job &job, int vectors, int problems) {
    const int64_t blocks = ceil_div(job.rows, MV_WARPS), grid = blocks < multiprocessors ? blocks : multiprocessors;
    const int n_slots = matvec_fits(vectors, MV_SLOTS) ? MV_SLOTS : MV_FEW_SLOTS;
    const int64_t parts = ceil_div(blocks, grid) * ceil_div(job.K, MV_PART), used = parts < n_slots ? parts : n_slots;
    // little, so that more kernels have room
    const size_t smem = vectors * sizeof(floatX) + MV_WARPS * used * MV_PART_BYTES;
    if (smem > 40 << 10) allow_smem(matvec_kernel<Job>, smem);
    launch_early(matvec_kernel<Job>, dim3((int)grid, problems), MV_THREADS, smem, job, vectors, n_slots, (int)used);
}

template <typename Job> static void matvec(const Job &job, int vectors, int problems = 1) {
    TWIN(matvec_in_loops<floatX>(job, vectors, problems));
    matvec_launch(job, vectors, problems);
}

// ---- several contexts at once ----
//
// The weights are still what is read, once for all contexts, and tensor cores have time for up to 32 of them: a tile is
// 16 rows of weights times 8 contexts. What the rows are multiplied with, (contexts, K) in floatX, is made once, by a
// block a context (step_inputs_kernel), as otherwise each block would make all of it.
//
// A block has a share of the rows, and takes up to STEP_TILES tiles of them at a time; its warps share K: each streams
// its own 32 columns of each 512, and in the end the warps' sums come together. A lane needs eight neighbouring columns
// of two rows of a tile: they are what it has copied itself, so nobody waits for anybody until then. What it has read
// of x serves all the tiles.
//
// Bytes: weights from memory, and from L2 contexts K floatX for each STEP_TILES tiles: with 32 contexts half as many as
// the weights, or as many as 32 rows where a block has only 16. A number is the same sum in the same order, whatever
// the number of contexts and the place among them.
//
// Measured on an H200 (L24 D2048, 8 and 32 contexts after 256 tokens): 1.40 and 2.49 ms a step, in 8 bits 1.23 and
// 2.14. Other ways were no quicker: 8 warps with 128 bytes of a row each 1.96 and 3.40; x in shared memory 1.77 and
// 3.08; that, and a warp a tile of rows 1.55 and 2.50, in 8 bits 1.48 and 2.69. There a product of 0.7 MB of weights
// took 6 to 7 us, one of 38 MB 17 to 21: what a launch costs beside its bytes is what is left.

static const int MOST_CONTEXTS = 32;
// elements that a lane copies of a row; parts of a warp's rows on their way, 8 or 4 KB of them; room for a context's 16
// sums
template <typename W> constexpr int MV_COPIED = sizeof(W) == 1 ? 16 : 8;
template <typename W> constexpr int STEP_PART = 64 * MV_COPIED<W>;
template <typename W, int groups>
constexpr int STEP_SLOTS = (groups == 1 ? 8192 : 4096) / (STEP_PART<W> * (int)sizeof(W));
// tiles of 16 rows that are multiplied with the same x, as many as have room for their sums in registers
template <typename W, int groups> constexpr int STEP_TILES = groups == 1 ? 5 : sizeof(W) == 1 ? 3 : 4;
template <int groups> constexpr int STEP_ADDED = groups == 1 ? 4 : 1; // tiles whose sums have room at a time
template <int groups> constexpr int STEP_SUMS_APART = 16 * STEP_ADDED<groups> + 4;

// x of a context: (inputs, K)
template <typename Job>
__global__ void __launch_bounds__(MV_THREADS)
    step_inputs_kernel(Job job, floatX *to, int numbers, int64_t apart, int64_t far) {
    floatX *x = dynamic_smem<floatX>();
    job.move(blockIdx.z * apart, blockIdx.z * far);
    move_each(blockIdx.z * apart, to);
    let_next_start();
    job.early(x);
    async_commit();
    wait_for_previous();
    async_wait<0>();
    job.before(x);
    __syncthreads();
    for (int i = threadIdx.x * 8; i < numbers; i += MV_THREADS * 8) store(to + i, load(x + i));
}

// A row's product with its second vector is as good as another row: these are numbered behind the rows.
struct ProductRow {
    int row, which, vector; // 0 or 1: first or second; where the vector lies
};
template <typename Job> __device__ inline ProductRow product_row(const Job &job, int number) {
    if (number < job.rows) return {number, 0, job.first(number)};
    return {number - job.rows, 1, job.second(number - job.rows)};
}

// How many rows from `number` on are of one matrix and multiplied with the same vectors, up to `end`, and as many as
// there is room for sums
template <int tiles, typename Job> __device__ inline int rows_at_once(const Job &job, int number, int end) {
    int other = number < job.rows ? job.alike(number) : end;
    if (job.pairs() && number < job.rows) other = min(other, job.rows);
    return min(min(other, end) - number, 16 * tiles);
}

// A block's share of the rows, in eights: as many for each, and one more for the first blocks.
struct Shares {
    int rows, each, longer;
    __device__ int begin(int block) const { return min(8 * (block * each + min(block, longer)), rows); }
};
static Shares shares_of(int64_t rows, int64_t blocks) {
    const int64_t eights = ceil_div(rows, 8);
    return {(int)rows, (int)(eights / blocks), (int)(eights % blocks)};
}

// A warp's columns of the block's rows: a part is those of 4 MV_COPIED columns and a tile of 16 rows, or 8; tile after
// tile of rows_at_once. It is there after async_wait<n_slots - 1>.
template <typename W, int n_slots, int most_tiles, typename Job> struct TileStream {
    static const int PER = MV_COPIED<W>;
    const Job &job;
    W *slots;                        // (n_slots, 2, 32, PER), from the lane's first on
    int row, end, k, slot, rows, at; // at: of the next tile among the rows
    const W *weights, *tile;         // the lane's, of the first row, of the tile at column k
    __device__ void request(void) {
        const int begin = threadIdx.x / 32 * 4 * PER, lane = threadIdx.x % 32;
        if (row < end && begin < job.K) {
            if (k == begin && at == 0) {
                const StepRow own = job.weights(product_row(job, row).row);
                rows = rows_at_once<most_tiles>(job, row, end);
                weights = (const W *)own.matrix.w + (int64_t)(own.row + lane / 4) * job.K + lane % 4 * PER;
            }
            if (at == 0) tile = weights + k;
            const bool valid = k + lane % 4 * PER < job.K; // zeros behind the last column; no rows behind the last
            const int left = rows - at - lane / 4;
#pragma unroll
            for (int half = 0; half < 2; half++)
                for (int i = 0; i < PER && 8 * half < left; i += 16 / (int)sizeof(W))
                    async_copy16(slots + slot * STEP_PART<W> + half * 32 * PER + i,
                                 valid ? tile + (int64_t)8 * half * job.K + i : weights, valid);
            at += 16;
            tile += (int64_t)16 * job.K;
            if (at >= rows) at = 0, k += MV_WARPS * 4 * PER;
            if (k >= job.K) k = begin, row += rows;
        }
        slot = (slot + 1) % n_slots;
        async_commit();
    }
};

// ---- one context, weights in 8 bits ----
//
// Half the bytes come in half the time, too short to convert each of them to a float. But they are integers, and tensor
// cores multiply integers as they are, with sums in 32 bits. So it is x that becomes integers. A warp takes as its unit
// 2^-29 of the power of two below the largest of its numbers, and writes each of them with four digits:
//
//     x = unit (d0 2^24 + d1 2^16 + d2 2^8 + d3),   -128 <= d < 128
//
// At most half a unit is lost: nothing of a bf16 that is at least 2^-22 of the largest. (A largest below 2^-63 counts
// as 2^-63, so that the unit and its inverse are normal floats.) W x is then four products of integers, all of them
// exact, that are put together in fp32. A tile is 16 rows of W times the 8 columns that tensor cores have: the four
// digits of x, and the four of a row's second x, where it has one.
//
// A block has a share of the rows, in eights; its warps share K, each streams its own 64 columns of each 1024. In the
// end the warps' sums come together.
//
// Measured on an H200 (L24 D2048 after 256 tokens): 0.80 ms a token; before, when bytes became bf16 one by one, 0.94.
// Short code counts, as each kernel of a step fetches its own: with tiles unrolled, 2,000 instructions, 0.99 ms; as a
// loop of 1,400 0.90; of 700 to 1,400 0.85, though a chain of one such kernel was quicker than before with each. Then
// parts on their way: 2 or 3 0.92, 4 0.85, 6 0.82, 8 0.85; and rows clipped once, not at each part: 0.80.

// a part's bytes; parts of a warp's rows on their way: 6, 3, 2 or 1, as shared memory allows; tiles whose sums come
// together at once
static const int INT8_PART = 1024, INT8_SLOTS = 6, INT8_TILES = 5, INT8_ROWS = 16 * INT8_TILES;

// c += a b, (16, 8) += (16, 32) (32, 8). A lane has of a, in rows lane / 4 and eight below, and of b, in column
// lane / 4, the numbers 4 (lane % 4) to + 3 as one word and those 16 behind as another; of c what it has of a TileC.
#ifdef CUDA_ON_CPU
__device__ inline void mma_int8(int (&c)[4], const int2 &upper, const int2 &lower, const int2 &b) {
    const int lane = threadIdx.x % 32;
    auto from = [](int word, int source) { return __shfl_sync(0xffffffffu, word, source); };
    auto dot = [](int x, int y) {
        int sum = 0;
        for (int i = 0; i < 4; i++) sum += ((const int8_t *)&x)[i] * ((const int8_t *)&y)[i];
        return sum;
    };
    for (int holder = 0; holder < 4; holder++)
        for (int half = 0; half < 2; half++) {
            const int row = from(half ? upper.y : upper.x, lane / 4 * 4 + holder),
                      below = from(half ? lower.y : lower.x, lane / 4 * 4 + holder);
            for (int i = 0; i < 2; i++) {
                const int column = from(half ? b.y : b.x, (lane % 4 * 2 + i) * 4 + holder);
                c[i] += dot(row, column);
                c[2 + i] += dot(below, column);
            }
        }
}
#else
__device__ inline void mma_int8(int (&c)[4], const int2 &upper, const int2 &lower, const int2 &b) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(upper.x), "r"(lower.x), "r"(upper.y), "r"(lower.y), "r"(b.x), "r"(b.y));
}
#endif

// The digits of a warp's columns of one or two vectors: digit i of column k at [i * apart + k], the second's behind.
struct Digits {
    int8_t *at;
    int apart;
    // whole chunks of 64 columns; an odd number of them, so that lanes that read two digits at once use different banks
    static __host__ __device__ int distance(int K) { return ((K + 63) / 64 | 1) * 64; }

    // Returns the unit. Behind the last column digits are 0.
    __device__ float make(int vector, const floatX *x, int K) const {
        const int chunk = 64 * MV_WARPS, lane = threadIdx.x % 32,
                  begin = threadIdx.x / 32 * 64 + lane / 16 * chunk + lane % 16 * 4;
        unsigned top = 0; // of floats as bits, which are in the numbers' order
#pragma unroll 1
        for (int k = begin; k < K; k += 2 * chunk)
            for (int i = 0; i < 4; i++) top = max(top, __float_as_uint(fabsf((float)x[k + i])));
        for (int bits = 16; bits > 0; bits /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, bits));
        const unsigned exponent = max(top >> 23, 64u); // with its bias of 127
        const float per_unit = __uint_as_float((127 + 29 + 127 - exponent) << 23);
#pragma unroll 1
        for (int k = begin; k < (K + 63) / 64 * 64; k += 2 * chunk) {
            unsigned q[4]; // a number's digits: + 128 carries to the next one what - 128 takes back
            for (int i = 0; i < 4; i++)
                q[i] = ((unsigned)__float2int_rn(k < K ? (float)x[k + i] * per_unit : 0) + 0x00808080u) ^ 0x00808080u;
            const unsigned low01 = __byte_perm(q[0], q[1], 0x5140), low23 = __byte_perm(q[2], q[3], 0x5140),
                           high01 = __byte_perm(q[0], q[1], 0x7362), high23 = __byte_perm(q[2], q[3], 0x7362);
            unsigned *to = (unsigned *)(at + 4 * vector * apart + k); // d0 of four columns, d1, d2, d3
            to[0] = __byte_perm(high01, high23, 0x7632);
            to[apart / 4] = __byte_perm(high01, high23, 0x5410);
            to[apart / 2] = __byte_perm(low01, low23, 0x7632);
            to[apart / 4 * 3] = __byte_perm(low01, low23, 0x5410);
        }
        __syncwarp();
        return top < 0x7f800000u ? __uint_as_float((exponent - 29) << 23) : NAN; // of infinity or NaN
    }
};

// A warp's columns of the block's rows, tile after tile of rows_at_once; a part is 64 columns of 16 rows, or of what is
// left. It is there after async_wait<INT8_SLOTS - 1>, for those that read only what they have copied: where fewer
// parts are on their way, empty groups make them INT8_SLOTS. Whatever lies in a slot are numbers: those of absent rows
// go nowhere, those of absent columns are multiplied by 0.
template <typename Job> struct Int8Stream {
    const Job &job;
    int8_t *slots; // (n_slots, 2, 32, 16), from the lane's first on
    int n_slots, row, end, k, slot;
    int rows, tile, left;  // rows at once from `row` on; the tile's first of them; how many follow the lane's own
    const int8_t *weights; // the lane's row of this tile
    __device__ void request(void) {
        const int begin = threadIdx.x / 32 * 64, lane = threadIdx.x % 32;
        if (row < end && begin < job.K) {
            if (rows == 0) {
                const StepRow own = job.weights(row);
                rows = rows_at_once<INT8_TILES>(job, row, end);
                left = rows - lane / 4;
                weights = (const int8_t *)own.matrix.w + (int64_t)(own.row + lane / 4) * job.K + lane % 4 * 16;
            }
            int8_t *to = slots + slot * INT8_PART;
            const bool there = k + lane % 4 * 16 < job.K;
            if (there && left > 0) async_copy16(to, weights + k, true);
            if (there && left > 8) async_copy16(to + 512, weights + k + (int64_t)8 * job.K, true);
            slot = slot + 1 == n_slots ? 0 : slot + 1;
            k += 64 * MV_WARPS;
            if (k >= job.K) {
                k = begin, tile += 16, left -= 16;
                weights += (int64_t)16 * job.K;
                if (tile >= rows) row += rows, rows = tile = 0;
            }
        }
        async_commit();
        for (int i = n_slots; i < INT8_SLOTS; i += n_slots) async_commit();
    }
};

// matvec_kernel for weights in 8 bits. K a multiple of 16. Grid: the blocks that have shares. n_slots: of a warp;
// divides INT8_SLOTS
template <typename Job>
HAS_TWIN __global__ void __launch_bounds__(MV_THREADS, 2)
    matvec_int8_kernel(Job job, Shares shares, int vectors, int n_slots) {
    floatX *x = dynamic_smem<floatX>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Digits digits = {(int8_t *)(x + vectors), Digits::distance(job.K)};
    float *partial = (float *)(digits.at + (job.pairs() ? 8 : 4) * digits.apart); // (MV_WARPS, 2, INT8_ROWS)
    int8_t *slots = (int8_t *)(partial + MV_WARPS * 2 * INT8_ROWS) + (warp * n_slots * 64 + lane) * 16;
    const int end = shares.begin(blockIdx.x + 1);
    int row = shares.begin(blockIdx.x), slot = 0, first = -1, second = -1;
    float unit = 0, second_unit = 0;
    Int8Stream<Job> stream = {job, slots, n_slots, row, end, warp * 64, 0, 0, 0, 0, nullptr};
    // of the thread's result
    const int which = threadIdx.x / (MV_THREADS / 2), result_row = threadIdx.x % (MV_THREADS / 2);
    auto scale_of = [&](int row) {
        const StepRow own = job.weights(min(row, job.rows - 1));
        return own.matrix.scales[own.row];
    };
    float scale = 0;
    let_next_start();
    job.early(x);
#pragma unroll 1
    for (int i = 0; i < n_slots; i++) stream.request();
    if (result_row < INT8_ROWS) scale = scale_of(row + result_row);
    wait_for_previous();
    async_wait<INT8_SLOTS - 1>(); // what is early came with the first part
    job.before(x);
    __syncthreads();
#pragma unroll 1
    for (int rows; row < end; row += rows) {
        rows = rows_at_once<INT8_TILES>(job, row, end);
        const int mine = row + result_row;
        const bool writes = result_row < rows && (which == 0 || job.second(row));
        const float4 beside = writes ? job.beside(mine) : make_float4(0, 0, 0, 0);
        if (first != job.first(row) || second != job.second(row)) {
            first = job.first(row), second = job.second(row);
            unit = digits.make(0, x + first, job.K);
            if (second) second_unit = digits.make(1, x + second, job.K);
        }
        // A lane has two digits' sums of vector lane % 4 / 2, its neighbour the two others.
        const float of_lane = (lane % 4 < 2 ? unit : second_unit) * (lane % 2 ? 1 : 65536);
        const int8_t *digit = digits.at + lane / 4 % (job.pairs() ? 8 : 4) * digits.apart + lane % 4 * 16;
#pragma unroll 1
        for (int tile = 0; tile < rows; tile += 16) {
            int sums[4] = {};
#pragma unroll 1
            for (int k = warp * 64; k < job.K; k += 64 * MV_WARPS) {
                async_wait<INT8_SLOTS - 1>();
                const int4 *from = (const int4 *)(slots + slot * INT8_PART), upper = from[0], lower = from[32],
                           d = *(const int4 *)(digit + k);
                mma_int8(sums, {upper.x, upper.y}, {lower.x, lower.y}, {d.x, d.y});
                mma_int8(sums, {upper.z, upper.w}, {lower.z, lower.w}, {d.z, d.w});
                slot = slot + 1 == n_slots ? 0 : slot + 1;
                stream.request();
            }
            for (int i = 0; i < 2; i++) {
                float sum = ((float)sums[2 * i] * 256 + (float)sums[2 * i + 1]) * of_lane;
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                if (lane % 2 == 0) partial[(warp * 2 + lane % 4 / 2) * INT8_ROWS + tile + 8 * i + lane / 4] = sum;
            }
        }
        __syncthreads();
        float sum = 0;
        for (int w = 0; w < MV_WARPS && writes; w++) sum += partial[(w * 2 + which) * INT8_ROWS + result_row];
        if (writes) job.after(mine, sum * scale, beside, which);
        if (row + rows == end) break;
        if (result_row < INT8_ROWS) scale = scale_of(mine + rows);
        __syncthreads(); // the sums have been read
    }
}

static int64_t matvec_int8_smem(int64_t vectors, int K, bool pairs, int n_slots) {
    return vectors * (int64_t)sizeof(floatX) + (pairs ? 8 : 4) * Digits::distance(K) +
           MV_WARPS * (2 * INT8_ROWS * (int64_t)sizeof(float) + n_slots * INT8_PART);
}

// slots of a warp, at most so many, for which a block has room; 0: for none
static int matvec_int8_slots(int64_t vectors, int K, bool pairs, int most = INT8_SLOTS) {
    const int64_t room = block_smem - 1024; // 1024: what is static
    while (most > 0 && (INT8_SLOTS % most || matvec_int8_smem(vectors, K, pairs, most) > room)) most--;
    return most;
}

template <typename Job>
static void matvec_int8_launch(const Job &job, int vectors, int most_slots = INT8_SLOTS, int blocks = 0) {
    const int64_t eights = ceil_div(job.rows, 8), most = blocks ? blocks : multiprocessors,
                  grid = eights < most ? eights : most;
    const bool pairs = job.pairs() > 0;
    const int n_slots = matvec_int8_slots(vectors, job.K, pairs, most_slots);
    const size_t smem = matvec_int8_smem(vectors, job.K, pairs, n_slots);
    allow_smem(matvec_int8_kernel<Job>, smem);
    launch_early(matvec_int8_kernel<Job>, dim3((int)grid), MV_THREADS, smem, job, shares_of(job.rows, grid), vectors,
                 n_slots);
}

template <typename Job> static void matvec_int8(const Job &job, int vectors) {
    TWIN(matvec_in_loops<int8_t>(job, vectors, 1));
    matvec_int8_launch(job, vectors);
}

// sums += 16 rows times the groups' contexts, eight columns a lane
template <int groups>
__device__ inline void multiply_rows(TileC (&sums)[groups], const RawPack<floatX> (&w)[2],
                                     const RawPack<floatX> (&x)[groups]) {
    for (int half = 0; half < 2; half++) {
        RawPack<floatX> both; // four numbers of each row
        TileB b[groups];
        for (int i = 0; i < 4; i++) ((Pair *)both.q)[i] = ((const Pair *)w[i / 2].q)[2 * half + i % 2];
        for (int j = 0; j < groups; j++) b[j] = half_as_b(x[j], half);
        mma(sums, eight_as_a(both), b);
    }
}

// matvec_kernel for up to 8 groups contexts. x: (problems, vectors) of the first. Grid: (any number of blocks,
// problems)
template <typename W, int groups, typename Job>
HAS_TWIN __global__ void __launch_bounds__(MV_THREADS, 1)
    step_product_kernel(Job job, Shares shares, const floatX *x, int vectors, int64_t apart, int64_t far,
                        int contexts) {
    constexpr int PER = MV_COPIED<W>, n_slots = STEP_SLOTS<W, groups>, apart_sums = STEP_SUMS_APART<groups>,
                  n_sums = 8 * groups * apart_sums, added = STEP_ADDED<groups>, most_tiles = STEP_TILES<W, groups>;
    constexpr bool ahead = groups == 1; // x is read a turn before it is needed: of few contexts there is room for it
    float *partial = dynamic_smem<float>(); // (MV_WARPS, 8 groups, apart_sums)
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // of the thread's results
    const int context = threadIdx.x / (16 * added), result_row = threadIdx.x % (16 * added);
    const int end = shares.begin(blockIdx.x + 1);
    int row = shares.begin(blockIdx.x), slot = 0;
    W *slots = (W *)(partial + MV_WARPS * n_sums) + warp * n_slots * STEP_PART<W> + lane * PER;
    TileStream<W, n_slots, most_tiles, Job> stream = {job, slots, row, end, warp * 4 * PER, 0, 0, 0, nullptr, nullptr};
    let_next_start();
#pragma unroll 1
    for (int i = 0; i < n_slots; i++) stream.request();
    const floatX *columns[groups]; // of the lane's contexts; of absent ones, another's
    for (int j = 0; j < groups; j++) {
        columns[j] = x + (int64_t)blockIdx.y * vectors;
        move_each(min(8 * j + lane / 4, contexts - 1) * apart, columns[j]);
    }
    wait_for_previous();
    for (int rows; row < end; row += rows) {
        rows = rows_at_once<most_tiles>(job, row, end);
        const ProductRow from = product_row(job, row);
        TileC sums[most_tiles][groups] = {};
        using Columns = RawPack<floatX>[PER / 8][groups];
        auto read = [&](Columns &to, int k) { // behind the last column weights are zero
            for (int i = 0; i < PER / 8; i++)
                for (int j = 0; j < groups; j++)
                    to[i][j] = load_raw(columns[j] + from.vector + min(k + lane % 4 * PER + 8 * i, job.K - 8));
        };
        const int begin = warp * 4 * PER, turn = MV_WARPS * 4 * PER;
        Columns now, next = {};
        if (ahead) read(next, begin);
#pragma unroll 1
        for (int k = begin; k < job.K; k += turn) {
            for (int i = 0; i < PER / 8; i++)
                for (int j = 0; j < groups; j++) now[i][j] = next[i][j];
            if (ahead) read(next, k + turn);
            else read(now, k);
#pragma unroll
            for (int t = 0; t < most_tiles; t++) {
                if (16 * t >= rows) break;
                async_wait<n_slots - 1>();
                const W *part = slots + slot * STEP_PART<W>;
                const bool both = 16 * t + 8 < rows; // eights of rows
                for (int i = 0; i < PER / 8; i++) {
                    const RawPack<floatX> w[2] = {load_raw(part + 8 * i),
                                                  both ? load_raw(part + 32 * PER + 8 * i) : RawPack<floatX>{}};
                    multiply_rows(sums[t], w, now[i]);
                }
                slot = (slot + 1) % n_slots;
                stream.request();
            }
        }
        auto add_up = [&](const TileC(&of_warp)[most_tiles][groups], int t) { // over the warps, in the same order
            float total = 0;
            __syncthreads(); // the last sums may still be read
#pragma unroll
            for (int tile = 0; tile < most_tiles; tile++) // so that sums lie in registers
                if (tile >= t && tile < t + added)
                    for (int j = 0; j < groups; j++)
                        for (int i = 0; i < 4; i++)
                            partial[warp * n_sums + (8 * j + tile_col(i)) * apart_sums + 16 * (tile - t) +
                                    tile_row(i)] = of_warp[tile][j].x[i];
            __syncthreads();
            for (int w = 0; w < MV_WARPS; w++) total += partial[w * n_sums + context * apart_sums + result_row];
            return total;
        };
        Job own = job;
        own.move(context * apart, context * far);
#pragma unroll 1
        for (int t = 0; 16 * t < rows; t += added) {
            const int at = 16 * t + result_row, mine = from.row + at;
            const bool writes = context < contexts && at < rows;
            const float4 beside = writes ? own.beside(mine) : make_float4(0, 0, 0, 0);
            float sum = add_up(sums, t);
            if (!writes) continue;
            if (sizeof(W) == 1) {
                const StepRow weights = job.weights(mine);
                sum *= weights.matrix.scales[weights.row];
            }
            own.after(mine, sum, beside, from.which);
        }
    }
}

template <typename W, int groups, typename Job>
static void step_product_launch(const Infer *f, const Job &job, const floatX *x, int vectors, int problems) {
    const int64_t rows = job.rows + job.pairs(), eights = ceil_div(rows, 8),
                  grid = eights < multiprocessors ? eights : multiprocessors;
    const size_t smem = MV_WARPS * (8 * groups * STEP_SUMS_APART<groups> * sizeof(float) +
                                    STEP_SLOTS<W, groups> * STEP_PART<W> * sizeof(W));
    allow_smem(step_product_kernel<W, groups, Job>, smem);
    launch_early(step_product_kernel<W, groups, Job>, dim3((int)grid, problems), MV_THREADS, smem, job,
                 shares_of(rows, grid), x, vectors, f->apart, f->far, f->contexts);
}

// A product of a step: of one context's vector, which takes room for `vectors` numbers to make, or of several's.
template <typename W = floatX, typename Job>
static void step_product(const Infer *f, const Job &job, int vectors, int problems = 1) {
    if (f->contexts == 1) {
        if constexpr (sizeof(W) == 1) matvec_int8(job, vectors);
        else matvec(job, vectors, problems);
        return;
    }
    const floatX *x = f->input;
    if constexpr (Job::makes) {
        const size_t smem = vectors * sizeof(floatX);
        if (smem > 40 << 10) allow_smem(step_inputs_kernel<Job>, smem);
        launch_early(step_inputs_kernel<Job>, dim3(1, 1, f->contexts), MV_THREADS, smem, job, f->input,
                     Job::inputs * job.K, f->apart, f->far);
        vectors = Job::inputs * job.K;
    } else {
        x = job.ready();
    }
    TWIN(products_in_loops<W>(job, x, vectors, problems, f->apart, f->far, f->contexts));
    if constexpr (!Job::rare)
        if (f->contexts <= 8) return step_product_launch<W, 1>(f, job, x, vectors, problems);
    step_product_launch<W, 4>(f, job, x, vectors, problems);
}

// with one of the matrices that may be in 8 bits
template <typename Job> static void step_product_large(const Infer *f, const Job &job, int vectors) {
    if (f->weights == WEIGHTS_INT8) step_product<int8_t>(f, job, vectors);
    else step_product(f, job, vectors);
}

static StepMatrix step_matrix(const Param &W) {
    if (W.in_int8) return {W.in_int8->whole, W.in_int8->scales};
    return {W.w, nullptr};
}

struct OneVector { // what most jobs have in common
    // for several contexts: vectors that rows are multiplied with; `before` makes them, or else `ready` says where
    // they are
    static const int inputs = 1;
    static const bool makes = true;
    static const bool rare = false; // once a step: not worth a kernel of its own for few contexts
    __device__ int first(int) const { return 0; }
    __device__ int second(int) const { return 0; } // 0: there is none
    // the first row behind this one of another matrix, or with other vectors: a multiple of 8
    __device__ int alike(int) const { return 1 << 30; }
    __host__ __device__ int pairs(void) const { return 0; } // of the first so many rows there is one
    __device__ void early(floatX *) const {}
    __device__ float4 beside(int) const { return make_float4(0, 0, 0, 0); }
};

template <typename T> __device__ inline void copy_vector(floatX *to, const T *from, int n) {
    const int most = 5, apart = MV_THREADS * 8; // packs on their way at a time
#pragma unroll 1
    for (int begin = threadIdx.x * 8; begin < n; begin += most * apart) {
        Pack v[most];
        for (int i = 0; i < most; i++) v[i] = begin + i * apart < n ? load(from + begin + i * apart) : zero_pack();
        for (int i = 0; i < most; i++)
            if (begin + i * apart < n) store(to + begin + i * apart, v[i]);
    }
}

// What a thread asks for here it alone reads.
__device__ inline void early_vector(floatX *to, const floatX *from, int C) {
    const int c = threadIdx.x * 8;
    if (c < C) async_pack(to + c, from + c);
}

// to = LayerNorm of C numbers, of which pack(c) gives eight; gain and bias may lie in shared memory
template <typename S, typename F>
__device__ inline void norm_packs(S *to, const F &pack, const floatX *gain, const floatX *bias, int C) {
    __shared__ float2 shared[32];
    Pack own[1];
    const float2 norm = block_norm<MV_THREADS>(pack, C, shared, own);
    const int c = threadIdx.x * 8;
    if (c >= C) return;
    const Pack g = load(gain + c), b = load(bias + c);
    for (int i = 0; i < 8; i++) own[0].x[i] = (own[0].x[i] - norm.x) * norm.y * g.x[i] + b.x[i];
    store(to + c, own[0]);
}

template <typename S, typename T>
__device__ inline void norm_vector(S *to, const T *x, const floatX *gain, const floatX *bias, int C) {
    norm_packs(
        to, [&](int c) { return load(x + c); }, gain, bias, C);
}

// n mixes of a normed vector with that of the token before: x_i = ln + (shift - ln) * mu_i, ln = LayerNorm(from). In
// shared memory at x: (n, C) mu, which become the x_i; gain, bias, shift (C) each.
template <int n> struct NormShiftMix {
    const float *from;
    const floatX *gain, *bias, *shift, *mu[n];
    floatX *ln; // block 0 stores it
    static int vectors(int C) { return (n + 3) * C; }
    __device__ void move(int64_t bytes, int64_t) { move_each(bytes, from, shift, ln); }
    __device__ void early(floatX *x, int C) const {
        for (int i = 0; i < n; i++) early_vector(x + i * C, mu[i], C);
        early_vector(x + n * C, gain, C);
        early_vector(x + (n + 1) * C, bias, C);
        early_vector(x + (n + 2) * C, shift, C);
    }
    __device__ void make(floatX *x, int C) const {
        floatX *v = x + n * C; // takes the place of the gain
        norm_vector(v, from, v, v + C, C);
        const int c = threadIdx.x * 8; // a thread's pack stays its own: no barrier
        if (c >= C) return;
        const Pack now = load(v + c), before = load(v + 2 * C + c);
        if (blockIdx.x == 0) store(ln + c, now);
        for (int i = 0; i < n; i++) {
            Pack mu_i = load(x + i * C + c);
            for (int j = 0; j < 8; j++) mu_i.x[j] = now.x[j] + (before.x[j] - now.x[j]) * mu_i.x[j];
            store(x + i * C + c, mu_i);
        }
    }
};

// A mixer's end: out = residual + gate * product; and what was normed at its start becomes what the next token's shift
// sees.
struct MixerEnd {
    const float *residual, *gate; // gate null: 1
    const floatX *ln;
    floatX *shift;
    float *out;
    __device__ void move(int64_t bytes, int64_t) { move_each(bytes, residual, gate, ln, shift, out); }
    __device__ float4 beside(int row) const {
        return make_float4(residual[row], gate ? gate[row] : 1, (float)ln[row], 0);
    }
    __device__ void after(int row, float sum, float4 beside) const {
        out[row] = beside.x + beside.y * sum;
        shift[row] = (floatX)beside.z;
    }
};

// ---- jobs ----

// hidden = tanh(w (ln1 + diff * time_maa_x)): the hidden layer of a time mixer's mixes
struct MixHidden : OneVector {
    NormShiftMix<1> mix;
    StepMatrix w;
    float *hidden;
    int rows, K;
    __device__ void move(int64_t bytes, int64_t far) {
        mix.move(bytes, far);
        move_each(bytes, hidden);
    }
    __device__ StepRow weights(int row) const { return {w, row}; }
    __device__ void early(floatX *x) const { mix.early(x, K); }
    __device__ void before(floatX *x) const { mix.make(x, K); }
    __device__ void after(int row, float sum, float4, int) const { hidden[row] = tanhf(sum); }
};

// Finch-C2's products: v and v2 (which share their weights), r, k, and the hidden layers of w and v2
struct FinchProducts : OneVector {
    const floatX *xs; // (5 or 4, C): x_r, x_k, x_v, x_w, x_v2
    StepMatrix value, receptance, key, decay_w1, value2_w1;
    float *v, *v2, *r, *k, *hidden; // (A) each, (128)
    bool use_v2;
    int A, rows, K;
    static const bool makes = false;
    const floatX *ready(void) const { return xs; }
    __device__ void move(int64_t bytes, int64_t) { move_each(bytes, xs, v, v2, r, k, hidden); }
    __device__ StepRow weights(int row) const {
        if (row < A) return {value, row};
        if (row < 2 * A) return {receptance, row - A};
        if (row < 3 * A) return {key, row - 2 * A};
        if (row < 3 * A + DECAY_RANK) return {decay_w1, row - 3 * A};
        return {value2_w1, row - 3 * A - DECAY_RANK};
    }
    __device__ int first(int row) const {
        return (row < A ? 2 : row < 2 * A ? 0 : row < 3 * A ? 1 : row < 3 * A + DECAY_RANK ? 3 : 4) * K;
    }
    __device__ int second(int row) const { return row < A && use_v2 ? 4 * K : 0; }
    __device__ int alike(int row) const {
        return row < 3 * A ? (row / A + 1) * A : row < 3 * A + DECAY_RANK ? 3 * A + DECAY_RANK : rows;
    }
    __host__ __device__ int pairs(void) const { return use_v2 ? A : 0; }
    __device__ void before(floatX *x) const { copy_vector(x, xs, (use_v2 ? 5 : 4) * K); }
    __device__ void after(int row, float sum, float4, int which) const {
        if (row < A) (which ? v2 : v)[row] = sum;
        else if (row < 2 * A) r[row - A] = sum;
        else if (row < 3 * A) k[row - 2 * A] = sum;
        else hidden[row - 3 * A] = tanhf(sum);
    }
};

template <typename T> struct Product : OneVector { // out = w x
    const T *x;
    StepMatrix w;
    float *out;
    int rows, K;
    static const bool makes = !std::is_same_v<T, floatX>, rare = makes;
    const floatX *ready(void) const { return x; }
    __device__ void move(int64_t bytes, int64_t) { move_each(bytes, x, out); }
    __device__ StepRow weights(int row) const { return {w, row}; }
    __device__ void before(floatX *v) const { copy_vector(v, x, K); }
    __device__ void after(int row, float sum, float4, int) const { out[row] = sum; }
};

struct NormProduct : OneVector { // w LayerNorm(x)
    const float *x;
    const floatX *gain, *bias;
    StepMatrix w;
    int rows, K;
    __device__ void move(int64_t bytes, int64_t) { move_each(bytes, x); }
    __device__ StepRow weights(int row) const { return {w, row}; }
    __device__ void early(floatX *v) const {
        early_vector(v, gain, K);
        early_vector(v + K, bias, K);
    }
    __device__ void before(floatX *v) const { norm_vector(v, x, v, v + K, K); }
};

// out = residual + w LayerNorm_x(x); of a GOLD layer x may still lie in the window's splits
struct TmixOut : NormProduct {
    MixerEnd end;
    SplitSums window; // or nulls
    int splits;
    const Place *place; // of several contexts: x is there of those that are longer than the window; null: of none
    __device__ void move(int64_t bytes, int64_t far) {
        NormProduct::move(bytes, far);
        end.move(bytes, far);
        move_each(bytes, window.out, window.top, window.sum, place);
    }
    __device__ float4 beside(int row) const { return end.beside(row); }
    __device__ void after(int row, float sum, float4 beside, int) const { end.after(row, sum, beside); }
    __device__ void before(floatX *v) const {
        if (!window.out || (place && place->begin > 0)) {
            NormProduct::before(v);
            return;
        }
        norm_packs(
            v,
            [&](int c) {
                const int h = c / N;
                float top = -INFINITY, sum = 0;
                Pack y = zero_pack();
                for (int begin = 0; begin < splits; begin += 4) { // four at once
                    float tops[4], sums[4];
                    Pack outs[4];
                    for (int i = 0; i < 4; i++) {
                        const int at = begin + i < splits ? begin + i : begin;
                        tops[i] = begin + i < splits ? window.top[at * (K / N) + h] : -INFINITY;
                        sums[i] = window.sum[at * (K / N) + h];
                        outs[i] = load(window.out + at * K + c);
                    }
                    // the first split sees a token: top is finite from there
                    const float last = top;
                    for (int i = 0; i < 4; i++) top = fmaxf(top, tops[i]);
                    const float shrink = exp2f(last - top);
                    sum *= shrink;
                    for (int j = 0; j < 8; j++) y.x[j] *= shrink;
                    for (int i = 0; i < 4; i++) {
                        const float weight = exp2f(tops[i] - top); // 0 for a split that saw nothing
                        sum += weight * sums[i];
                        for (int j = 0; j < 8; j++) y.x[j] += weight * outs[i].x[j];
                    }
                }
                for (int j = 0; j < 8; j++) y.x[j] /= sum;
                return y;
            },
            v, v + K, K);
    }
};

struct Head : NormProduct { // logits = w LayerNorm_out(x)
    float *logits;
    static const bool rare = true;
    __device__ void move(int64_t bytes, int64_t) { move_each(bytes, x, logits); }
    __device__ void after(int row, float sum, float4, int) const { logits[row] = sum; }
};

// k = relu(key x_k)^2,  gate = sigmoid(receptance x_r)
struct CmixIn : OneVector {
    static const int inputs = 2;
    NormShiftMix<2> mix;
    StepMatrix key, receptance;
    floatX *k;
    float *gate;
    int F, rows, K;
    __device__ void move(int64_t bytes, int64_t far) {
        mix.move(bytes, far);
        move_each(bytes, k, gate);
    }
    __device__ StepRow weights(int row) const {
        if (row < F) return {key, row};
        return {receptance, row - F};
    }
    __device__ int first(int row) const { return row < F ? 0 : K; }
    __device__ int alike(int row) const { return row < F ? F : rows; }
    __device__ void early(floatX *x) const { mix.early(x, K); }
    __device__ void before(floatX *x) const { mix.make(x, K); }
    __device__ void after(int row, float sum, float4, int) const {
        if (row < F) k[row] = (floatX)(sum > 0 ? sum * sum : 0);
        else gate[row - F] = 1 / (1 + expf(-sum));
    }
};

struct CmixOut : OneVector { // out = residual + gate * (value k)
    const floatX *k;
    StepMatrix value;
    MixerEnd end;
    int rows, K;
    static const bool makes = false;
    const floatX *ready(void) const { return k; }
    __device__ void move(int64_t bytes, int64_t far) {
        move_each(bytes, k);
        end.move(bytes, far);
    }
    __device__ StepRow weights(int row) const { return {value, row}; }
    __device__ void before(floatX *x) const { copy_vector(x, k, K); }
    __device__ float4 beside(int row) const { return end.beside(row); }
    __device__ void after(int row, float sum, float4 beside, int) const { end.after(row, sum, beside); }
};

// ---- the small kernels between ----

// The token's place in the context, and x = x0 = LayerNorm_ln0(emb[token]). A block a context.
__global__ void __launch_bounds__(MV_THREADS)
    decode_begin_kernel(float *x, Place *place, int *ids, const int *token, const floatX *emb, const floatX *gain,
                        const floatX *bias, int64_t window, int C, int64_t apart, int64_t far) {
    move_each(blockIdx.z * apart, x, place, token);
    move_each(blockIdx.z * far, ids);
    let_next_start();
    const int id = max(*token, 0); // negative: nothing could be drawn, the host will say
    norm_vector(x, emb + (int64_t)id * C, gain, bias, C);
    if (threadIdx.x > 0) return;
    if (!place->rests) place->first++;
    const int64_t t = place->first;
    if (ids) ids[t] = id;
    if (place->begin < t + 1 - window) place->begin = t + 1 - window;
}

// A pack of 8 columns of h (32) w (32, C): the block's four warps take 8 of the 32 rows each, on the same 256 columns;
// the sums come to warp 0.
struct MixSum {
    RawPack<floatX> raw[8];
    __device__ void request(const floatX *w, int c, int C) {
        for (int j = 0; j < 8; j++)
            if (c < C) raw[j] = load_raw(w + (int64_t)(threadIdx.x / 32 * 8 + j) * C + c);
    }
    __device__ Pack sum(const float *h, float (&parts)[4][256]) const {
        const int warp = threadIdx.x / 32, at = threadIdx.x % 32 * 8;
        Pack total = zero_pack();
        for (int j = 0; j < 8; j++) {
            const Pack w = unpack(raw[j]);
            for (int i = 0; i < 8; i++) total.x[i] += h[8 * warp + j] * w.x[i];
        }
        store(&parts[warp][at], total);
        __syncthreads();
        for (int other = 1; other < 4 && warp == 0; other++) {
            const Pack part = load(&parts[other][at]);
            for (int i = 0; i < 8; i++) total.x[i] += part.x[i];
        }
        return total;
    }
};

// x_i = ln + diff * (mu_i + hidden_i w_i): grid (columns / 256, mixes, contexts), 128 threads
struct Mixed {
    const floatX *ln, *shift, *mu[5], *w; // w (mixes, 32, C)
    const float *hidden;                  // (mixes, 32)
    floatX *xs;                           // (mixes, C)
    __device__ void move(int64_t bytes) { move_each(bytes, ln, shift, hidden, xs); }
};

HAS_TWIN __global__ void __launch_bounds__(128) decode_mixes_kernel(Mixed p, int C, int64_t apart) {
    __shared__ __align__(16) float parts[4][256];
    const int i = blockIdx.y, c = blockIdx.x * 256 + threadIdx.x % 32 * 8;
    MixSum mix = {};
    p.move(blockIdx.z * apart);
    let_next_start();
    mix.request(p.w + (int64_t)i * 32 * C, c, C);
    // no mu[i]: that would copy the parameters to the stack
    const floatX *mu_i = i == 0 ? p.mu[0] : i == 1 ? p.mu[1] : i == 2 ? p.mu[2] : i == 3 ? p.mu[3] : p.mu[4];
    const Pack mu = c < C ? load(mu_i + c) : zero_pack(), before = c < C ? load(p.shift + c) : zero_pack();
    wait_for_previous();
    const Pack v = c < C ? load(p.ln + c) : zero_pack();
    Pack m = mix.sum(p.hidden + 32 * i, parts);
    if (threadIdx.x >= 32 || c >= C) return;
    for (int j = 0; j < 8; j++) m.x[j] = v.x[j] + (before.x[j] - v.x[j]) * (mu.x[j] + m.x[j]);
    store(p.xs + (int64_t)i * C + c, m);
}

// One step of WKV. Grid (H, 4, contexts): 16 values j of a head, all its keys i; S^T in registers, a thread one j and
// eight i.
struct WkvStep {
    const float *r, *k, *v, *v2, *hidden;                // (A); hidden layers of w and v2 (64) each
    const floatX *decay_w2, *value2_w2, *time_decay, *u; // (64, A) twice, (A), (A) or null
    float *state, *y;                                    // (H, N values, N keys), (A)
    bool use_v2, one_minus_w;
    int H;
    __device__ void move(int64_t bytes, int64_t far) {
        move_each(bytes, r, k, v, v2, hidden, y);
        move_each(far, state);
    }
};

HAS_TWIN __global__ void __launch_bounds__(128) wkv_step_kernel(WkvStep p, int64_t apart, int64_t far) {
    __shared__ __align__(16) float parts[16][N];
    __shared__ __align__(16) float parts2[VALUE2_RANK][16];
    __shared__ float r[N];
    __shared__ float k[N];
    __shared__ float d_minus_1[N];
    __shared__ float u[N];
    __shared__ float v2[16];
    const int thread = threadIdx.x, h = blockIdx.x, A = p.H * N, head = h * N, j0 = head + 16 * blockIdx.y,
              j = thread / 8, i0 = thread % 8 * 8;
    p.move(blockIdx.z * apart, blockIdx.z * far);
    float *at = p.state + ((int64_t)j0 + j) * N + i0;
    RawPack<floatX> w[4], w2 = {};
    let_next_start();
    for (int i = 0; i < 4; i++) w[i] = load_raw(p.decay_w2 + (int64_t)(4 * j + i) * A + head + i0);
    if (p.use_v2) w2 = load_raw(p.value2_w2 + (int64_t)(thread / 2) * A + j0 + thread % 2 * 8);
    Pack S = load(at);
    const float decay_bias = (float)p.time_decay[head + thread % N], bonus = p.u ? (float)p.u[head + thread % N] : 0;
    wait_for_previous(); // and all that the kernel before has made at once
    const float own_r = p.r[head + thread % N], own_k = p.k[head + thread % N], v = p.v[j0 + j];
    const float own_v2 = p.use_v2 ? p.v2[j0 + thread % 16] : 0, h2 = p.use_v2 ? p.hidden[DECAY_RANK + thread / 2] : 0;
    const float4 hidden = *(const float4 *)(p.hidden + 4 * j);
    Pack sum = zero_pack(), extra = unpack(w2);
    for (int i = 0; i < 4; i++) {
        const Pack row = unpack(w[i]);
        for (int e = 0; e < 8; e++) sum.x[e] += ((const float *)&hidden)[i] * row.x[e];
    }
    for (int e = 0; e < 8; e++) extra.x[e] *= h2;
    store(&parts[j][i0], sum);
    store(&parts2[thread / 2][thread % 2 * 8], extra);
    __syncthreads();
    if (thread < N) {
        float decay = decay_bias;
        for (int i = 0; i < 16; i++) decay += parts[i][thread];
        d_minus_1[thread] = expm1f(-fminf(expf(decay), 128.f));
        r[thread] = own_r;
        k[thread] = own_k * (p.one_minus_w ? -d_minus_1[thread] : 1);
        u[thread] = bonus;
    } else if (thread < N + 16) {
        float value = own_v2;
        for (int i = 0; i < VALUE2_RANK; i++) value += parts2[i][thread - N];
        v2[thread - N] = value;
    }
    __syncthreads();
    float y = 0;
    for (int e = 0; e < 8; e++) {
        const float kv = k[i0 + e] * v;
        y += r[i0 + e] * (S.x[e] + u[i0 + e] * kv);
        S.x[e] += S.x[e] * d_minus_1[i0 + e] + kv;
    }
    store(at, S);
    y = warp_sum(y, 8);
    if (thread % 8 == 0) p.y[j0 + j] = y + v2[j];
}

#ifdef CUDA_ON_CPU
#include "dev/cpu/twins_infer.h"
#endif

// ---- the new token's entry in the cache, and its keys and values for the window, all GOLD layers at once ----

// z = id_k0[id] + w_c c, K0 before its norm, of this token and the one before. Block 0 writes c to the cache; what
// counts is what can be read from there.
struct KeySums : OneVector {
    GoldSource g;
    floatX *cache;  // writable: KV_COMPRESSED and KV_FULL
    int8_t *cache8; // KV_INT8
    float *scales;
    const float *c;
    float *z; // (2, C): of this token, of the one before (zeros at first)
    const Place *place;
    int rows, K; // C, R32
    static const int inputs = 2;
    static const bool rare = true;
    __device__ void move(int64_t bytes, int64_t far) {
        move_each(bytes, c, z, place);
        move_each(far, g.ids, cache, cache8, scales);
    }
    __device__ StepRow weights(int row) const { return {{g.w_c, nullptr}, row}; }
    __device__ int second(int) const { return K; }
    __host__ __device__ int pairs(void) const { return rows; }
    __device__ void before(floatX *x) const {
        const int64_t t = place->first;
        float largest = 0;
        // every warp
        for (int i = threadIdx.x % 32; i < g.R; i += 32) largest = fmaxf(largest, fabsf((float)(floatX)c[i]));
        const float scale = warp_max(largest) / 127;
        for (int i = threadIdx.x; i < K; i += MV_THREADS) {
            float now = i < g.R ? (float)(floatX)c[i] : 0, last = 0;
            if (cache8) {
                const float whole = scale > 0 ? rintf(now / scale) : 0;
                if (blockIdx.x == 0 && i < g.R) cache8[t * g.R + i] = (int8_t)whole;
                now = whole * scale;
                if (t > 0 && i < g.R) last = cache8[(t - 1) * g.R + i] * scales[t - 1];
            } else {
                if (blockIdx.x == 0 && i < g.R) cache[t * g.R + i] = (floatX)now;
                if (t > 0 && i < g.R) last = (float)cache[(t - 1) * g.R + i];
            }
            x[i] = (floatX)now;
            x[K + i] = (floatX)last;
        }
        if (cache8 && blockIdx.x == 0 && threadIdx.x == 0) scales[t] = scale;
    }
    __device__ float4 beside(int row) const { // at t = 0 there is no token before
        const int64_t t = place->first;
        const float now = (float)g.id_k0[(int64_t)g.ids[t] * rows + row];
        return make_float4(now, t > 0 ? (float)g.id_k0[(int64_t)g.ids[t - 1] * rows + row] : 0, 0, 0);
    }
    __device__ void after(int row, float sum, float4 beside, int which) const {
        z[which * rows + row] = sum + (which ? beside.y : beside.x);
    }
};

// k1 = K0 + (shift(K0) - K0) * (time_maa_k + m_k), and v1 likewise from xo. Grid (columns / 256, 2 G, contexts): layer,
// side
__global__ void __launch_bounds__(128)
    decode_keys_values_kernel(floatX *kv1, const GoldSource *sources, const float *z, const Place *place, int C,
                              int64_t apart, int64_t far) {
    __shared__ __align__(16) float parts[4][256];
    __shared__ float2 shared[32];
    __shared__ float h[32];
    const int side = blockIdx.y % 2, lane = threadIdx.x % 32, c = blockIdx.x * 256 + lane * 8;
    const GoldSource &g = sources[blockIdx.y / 2];
    const GoldSource::Side &s = side ? g.v : g.k;
    MixSum mix = {};
    const int *ids = g.ids;
    move_each(blockIdx.z * apart, kv1, z, place);
    move_each(blockIdx.z * far, ids);
    let_next_start();
    mix.request(s.mix, c, C);
    const Pack mu = c < C ? load(s.mu + c) : zero_pack();
    wait_for_previous();
    const int64_t t = place->first, id = ids[t], id_before = t > 0 ? ids[t - 1] : -1;
    if (threadIdx.x < 32) {
        float hidden = (float)g.id_h[id * 64 + 32 * side + lane];
        if (t > 0) hidden += (float)g.id_h_before[id_before * 64 + 32 * side + lane];
        h[lane] = tanhf(hidden);
    }
    float2 squares = make_float2(0, 0); // of z: this token's, the one's before
    for (int i = threadIdx.x; i < C && side == 0; i += 128) {
        squares.x += z[i] * z[i];
        squares.y += z[C + i] * z[C + i];
    }
    squares = block_sum(squares, shared);
    Pack m = mix.sum(h, parts); // block_sum had a barrier after h
    if (threadIdx.x >= 32 || c >= C) return;
    Pack now, before = zero_pack();
    if (side) {
        now = load(g.id_xo + id * C + c);
        if (t > 0) before = load(g.id_xo + id_before * C + c);
    } else {
        const float scale = 1 / (sqrtf(squares.x / C) + 1e-8f), scale_before = 1 / (sqrtf(squares.y / C) + 1e-8f);
        now = load(z + c);
        before = load(z + C + c);
        for (int i = 0; i < 8; i++) {
            now.x[i] *= scale;
            before.x[i] *= scale_before;
        }
    }
    for (int i = 0; i < 8; i++) m.x[i] = now.x[i] + (before.x[i] - now.x[i]) * (mu.x[i] + m.x[i]);
    store(kv1 + (int64_t)blockIdx.y * C + c, m);
}

struct KvHidden : OneVector { // u = tanh(w1 x), x: k1 or v1 of a layer
    const GoldSource *sources;
    const floatX *kv1;
    floatX *u;
    int rows, K;
    static const bool makes = false, rare = true;
    const floatX *ready(void) const { return kv1; }
    __device__ void move(int64_t bytes, int64_t) { move_each(bytes, kv1, u); }
    __device__ const GoldSource::Side &side(void) const {
        return blockIdx.y % 2 ? sources[blockIdx.y / 2].v : sources[blockIdx.y / 2].k;
    }
    __device__ StepRow weights(int row) const { return {{side().w1, nullptr}, row}; }
    __device__ void before(floatX *x) const { copy_vector(x, kv1 + (int64_t)blockIdx.y * K, K); }
    __device__ void after(int row, float sum, float4, int) const { u[blockIdx.y * rows + row] = (floatX)tanhf(sum); }
};

// kv2 = kv1 + w2 u. Grid (columns / 256, 2 G, contexts): layer, side; eight lanes take 64 numbers of a row, eight rows
// at a time
__global__ void __launch_bounds__(256)
    decode_kv_low_rank_kernel(float *kv2, const GoldSource *sources, const floatX *kv1, const floatX *u, int rank,
                              int C, int64_t apart) {
    move_each(blockIdx.z * apart, kv2, kv1, u);
    const GoldSource &g = sources[blockIdx.y / 2];
    const int lane = threadIdx.x % 8, first = blockIdx.x * 256 + threadIdx.x / 8;
    const floatX *w = (blockIdx.y % 2 ? g.v.w2 : g.k.w2) + 8 * lane;
    RawPack<floatX> raw[8];
    float sums[8] = {};
    let_next_start();
    for (int k = 0; k < rank; k += 64) {
        for (int i = 0; i < 8; i++)
            if (first + 32 * i < C) raw[i] = load_raw(w + (int64_t)(first + 32 * i) * rank + k);
        if (k == 0) wait_for_previous();
        const Pack x = load(u + (int64_t)blockIdx.y * rank + k + 8 * lane);
        for (int i = 0; i < 8; i++) {
            const Pack row = unpack(raw[i]);
            for (int j = 0; j < 8; j++) sums[i] += first + 32 * i < C ? row.x[j] * x.x[j] : 0;
        }
    }
    for (int i = 0; i < 8; i++) {
        const int64_t at = (int64_t)blockIdx.y * C + first + 32 * i;
        const float sum = warp_sum(sums[i], 8);
        if (lane == 0 && first + 32 * i < C) kv2[at] = (float)kv1[at] + sum;
    }
}

// Their norms, into the window. A block for each layer and side, and context.
__global__ void __launch_bounds__(MV_THREADS)
    decode_window_append_kernel(const GoldSource *sources, const float *kv2, const Place *place, int64_t window, int C,
                                int64_t apart, int64_t far) {
    const GoldSource &g = sources[blockIdx.x / 2];
    const GoldSource::Side &s = blockIdx.x % 2 ? g.v : g.k;
    floatX *to = s.ring;
    move_each(blockIdx.z * apart, kv2, place);
    move_each(blockIdx.z * far, to);
    let_next_start();
    wait_for_previous();
    to += place->first % window * C;
    norm_vector(to, kv2 + (int64_t)blockIdx.x * C, s.gain, s.bias, C);
    if (blockIdx.x % 2 == 1 || !g.rope.used) return;
    const int c = threadIdx.x * 8;
    if (c < C) store(to + c, rope_pack(load(to + c), g.rope, place->first, c, 1));
}

// ---- layers ----

// A time mixer's last step: row.x_mid = row.x + output ln_x(what `before` makes)
static void tmix_out_decode(Infer *f, Layer *layer, TmixOut job) {
    const Params &p = layer->p;
    const Row &row = f->row;
    job.x = row.y, job.gain = p.ln_x.gain.w, job.bias = p.ln_x.bias.w, job.w = step_matrix(p.output);
    job.end = {row.x, nullptr, row.ln, layer->tmix_shift, row.x_mid}, job.rows = f->m.d.C, job.K = f->m.d.A;
    step_product_large(f, job, 2 * job.K);
}

static void mix_hidden_decode(Infer *f, Layer *layer, int mixes) {
    const Dims &d = f->m.d;
    const Params &p = layer->p;
    MixHidden job = {};
    job.mix = {f->row.x, p.ln1.gain.w, p.ln1.bias.w, layer->tmix_shift, {p.time_maa_x.w}, f->row.ln};
    job.w = f->packed[layer->index].mix_w1, job.hidden = f->row.hidden, job.rows = MIX_RANK * mixes, job.K = d.C;
    step_product(f, job, job.mix.vectors(d.C));
}

static void decode_mixes(const Infer *f, const Mixed &mixed, int mixes) {
    const int C = f->m.d.C;
#ifdef CUDA_ON_CPU
    for (int context = 0; cuda_on_cpu::twins && context < f->contexts; context++) {
        Mixed own = mixed;
        own.move(context * f->apart);
        decode_mixes_in_loops(own, mixes, C);
    }
    if (cuda_on_cpu::twins) return;
#endif
    launch_early(decode_mixes_kernel, dim3((int)ceil_div(C, 256), mixes, f->contexts), 128, 0, mixed, C, f->apart);
}

static void finch_c2_decode(Infer *f, Layer *layer) {
    const Dims &d = f->m.d;
    const Params &p = layer->p;
    const Packed &packed = f->packed[layer->index];
    const Row &row = f->row;
    const bool v2 = f->m.s.use_v2;
    const int mixes = v2 ? 5 : 4;
    mix_hidden_decode(f, layer, mixes);
    const Mixed mixed = {row.ln,
                         layer->tmix_shift,
                         {p.time_maa_r.w, p.time_maa_k.w, p.time_maa_v.w, p.time_maa_w.w, p.time_maa_v2.w},
                         p.time_maa_w2.w,
                         row.hidden,
                         row.xs};
    decode_mixes(f, mixed, mixes);
    FinchProducts products = {};
    products.xs = row.xs, products.value = step_matrix(p.value), products.receptance = step_matrix(p.receptance),
    products.key = step_matrix(p.key);
    products.decay_w1 = packed.decay_w1, products.value2_w1 = packed.value2_w1,
    products.hidden = row.hidden + MIXES_HIDDEN;
    products.v = row.v, products.v2 = row.v2, products.r = row.r, products.k = row.k, products.use_v2 = v2,
    products.A = d.A;
    products.rows = 3 * d.A + DECAY_RANK + (v2 ? VALUE2_RANK : 0), products.K = d.C;
    step_product_large(f, products, mixes * d.C);
    const WkvStep step = {row.r,
                          row.k,
                          row.v,
                          row.v2,
                          row.hidden + MIXES_HIDDEN,
                          p.time_decay_w2.w,
                          p.time_value2_w2.w,
                          p.time_decay.w,
                          v2 ? nullptr : p.time_faaaa.w,
                          layer->wkv_state,
                          row.y,
                          v2,
                          f->m.s.use_one_minus_w != 0,
                          d.H};
#ifdef CUDA_ON_CPU
    for (int context = 0; cuda_on_cpu::twins && context < f->contexts; context++) {
        WkvStep own = step;
        own.move(context * f->apart, context * f->far);
        wkv_step_in_loops(own);
    }
    if (!cuda_on_cpu::twins)
#endif
        launch_early(wkv_step_kernel, dim3(d.H, 4, f->contexts), 128, 0, step, f->apart, f->far);
    tmix_out_decode(f, layer, TmixOut());
}

// The token's id and c are in x now, all that the GOLD layers will ever know of it.
static void cache_decode(Infer *f) {
    const Dims &d = f->m.d;
    const Row &row = f->row;
    const GoldSource &g = f->sources[0];
    Product<float> entry = {};
    entry.x = row.x, entry.w = step_matrix(f->m.top.w_kv_cache_a), entry.out = row.c, entry.rows = d.R, entry.K = d.C;
    step_product(f, entry, d.C);
    KeySums sums = {};
    sums.g = g, sums.cache = f->c, sums.cache8 = f->c8, sums.scales = f->scales, sums.c = row.c, sums.z = row.z,
    sums.place = f->place;
    sums.rows = d.C, sums.K = g.R32;
    step_product(f, sums, 2 * g.R32);
    const dim3 sides((int)ceil_div(d.C, 256), 2 * f->G, f->contexts);
    launch_early(decode_keys_values_kernel, sides, 128, 0, row.kv1, f->device_sources, row.z, f->place, d.C, f->apart,
                 f->far);
    KvHidden hidden = {};
    hidden.sources = f->device_sources, hidden.kv1 = row.kv1, hidden.u = row.u, hidden.rows = g.rank_pad,
    hidden.K = d.C;
    step_product(f, hidden, d.C, 2 * f->G);
    launch_early(decode_kv_low_rank_kernel, sides, 256, 0, row.kv2, f->device_sources, row.kv1, row.u, g.rank_pad, d.C,
                 f->apart);
    launch_early(decode_window_append_kernel, dim3(2 * f->G, 1, f->contexts), MV_THREADS, 0, f->device_sources, row.kv2,
                 f->place, f->window, d.C, f->apart, f->far);
    next_starts_late = true; // so all that follows may read the cache early
}

static void gold_decode(Infer *f, Layer *layer) {
    const Dims &d = f->m.d;
    const Params &p = layer->p;
    const Row &row = f->row;
    const GoldSource &g = f->sources[layer->index - d.G0];
    mix_hidden_decode(f, layer, 1);
    const Mixed mixed = {row.ln, layer->tmix_shift, {p.time_maa_q.w}, p.time_maa_q_w2.w, row.hidden, row.xs};
    decode_mixes(f, mixed, 1);
    Product<floatX> query = {};
    query.x = row.xs, query.w = step_matrix(p.query), query.out = row.q, query.rows = d.C, query.K = d.C;
    step_product_large(f, query, d.C);
    WindowTask task = {};
    task.query = {nullptr, row.q, p.ln_q.gain.w, p.ln_q.bias.w, &f->device_sources[layer->index - d.G0].rope, f->place};
    const bool in_splits = f->window_begin == 0;
    gold_attention(f, g, in_splits ? nullptr : row.y, task, 0, 1);
    TmixOut out = {};
    if (in_splits || f->contexts > 1) out.window = f->sums, out.splits = f->window_splits;
    if (!in_splits) out.place = f->place;
    tmix_out_decode(f, layer, out);
}

static void cmix_decode(Infer *f, Layer *layer) { // row.x = row.x_mid + ..
    const Dims &d = f->m.d;
    const Params &p = layer->p;
    const Row &row = f->row;
    CmixIn in = {};
    in.mix = {f->m.s.parallel ? row.x : row.x_mid,      p.ln2.gain.w, p.ln2.bias.w, layer->cmix_shift,
              {p.ffn_time_maa_k.w, p.ffn_time_maa_r.w}, row.ln};
    in.key = step_matrix(p.ffn_key), in.receptance = step_matrix(p.ffn_receptance), in.k = row.ffn, in.gate = row.gate;
    in.F = d.F, in.rows = d.F + d.C, in.K = d.C;
    step_product_large(f, in, in.mix.vectors(d.C));
    CmixOut out = {};
    out.k = row.ffn, out.value = step_matrix(p.ffn_value),
    out.end = {row.x_mid, row.gate, row.ln, layer->cmix_shift, row.x};
    out.rows = d.C, out.K = d.F;
    step_product_large(f, out, d.F);
}

// How the mixers decode: row.x_mid from row.x, row.x from row.x_mid. A model with another mixer decodes as it
// pre-fills.
typedef struct Decoder {
    const char *name;
    void (*decode)(Infer *, Layer *);
} Decoder;
static const Decoder TIME_DECODERS[] = {{"x060c2", finch_c2_decode}, {"gold", gold_decode}};
static const Decoder CHANNEL_DECODERS[] = {{"x060", cmix_decode}};

// null: there is none
template <size_t n> static const Decoder *find_decoder(const Decoder (&table)[n], const char *name) {
    for (const Decoder &decoder : table)
        if (strcmp(decoder.name, name) == 0) return &decoder;
    return nullptr;
}

// Queues a step: *token goes on from the context, f->logits are what comes next. The same launches every time. With
// several contexts: of each of them.
static void queue_step(Infer *f, const int *token) {
    const Model *m = &f->m;
    const Dims &d = m->d;
    const Row &row = f->row;
    const Params &top = m->top, &first = m->layers[0].p;
    const dim3 contexts(1, 1, f->contexts);
    decode_begin_kernel<<<contexts, MV_THREADS, 0, stream>>>(row.x, f->place, f->ids, token, top.emb.w,
                                                             first.ln0.gain.w, first.ln0.bias.w, f->window, d.C,
                                                             f->apart, f->far);
    for (int l = 0; l < d.L; l++) {
        Layer *layer = &f->m.layers[l];
        if (f->G && l == d.G0) cache_decode(f);
        find_decoder(TIME_DECODERS, layer->tmix->name)->decode(f, layer);
        find_decoder(CHANNEL_DECODERS, layer->cmix->name)->decode(f, layer);
    }
    Head head = {};
    head.x = row.x, head.gain = top.ln_out.gain.w, head.bias = top.ln_out.bias.w, head.w = step_matrix(top.head),
    head.logits = f->logits;
    head.rows = d.V, head.K = d.C;
    step_product_large(f, head, 2 * d.C);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Engine

// ---- memory ----

static int64_t cache_bytes_per_token(const Infer *f) {
    const Model *m = &f->m;
    const int64_t C = m->d.C, R = m->d.R, width = sizeof(floatX);
    int64_t bytes = 0;
    for (int l = 0; l < m->d.L; l++) bytes += m->layers[l].tmix->keeps_kv ? 2 * m->d.A * width : 0;
    if (!has_cache(m)) return bytes;
    if (f->kv == KV_FULL) bytes += 2 * f->G * C * width;
    return bytes + sizeof(int) + (f->kv == KV_INT8 ? R + (int64_t)sizeof(float) : R * width);
}

// All that is carried after T tokens: states, what shifts see, and the cache
static int64_t carried_bytes(const Infer *f, int64_t T) {
    const Dims &d = f->m.d;
    int64_t bytes = 0;
    for (int l = 0; l < d.L; l++) {
        const Mixer *tmix = f->m.layers[l].tmix;
        bytes += 2 * d.C * (int64_t)sizeof(floatX);
        if (!tmix->needs_cache && !tmix->keeps_kv) bytes += (int64_t)d.H * N * N * sizeof(float);
    }
    return bytes + T * cache_bytes_per_token(f);
}

static void alloc_floats(floatX **p, int64_t n) { device_alloc((void **)p, n * sizeof(floatX)); }

static floatX *packed(int rows, int columns, Param from, int from_rows, int from_columns, bool t) {
    floatX *to;
    alloc_floats(&to, (int64_t)rows * columns);
    pack_matrix_kernel<<<blocks_of((int64_t)rows * columns), 256, 0, stream>>>(to, rows, columns, from.w, from.ld,
                                                                               from_rows, from_columns, t);
    return to;
}

// At most so many blocks with so many warps (a block's shared memory may hold fewer, a short context need fewer); then
// as many queries at a time as there is room for.
static void choose_attention_shape(Infer *f, int splits_wanted, int warps_wanted) {
    const GoldSource &g = f->sources[0];
    const size_t limit = block_smem;
    const int least = g.warpgroups ? 4 : 1;
    f->past_splits = splits_wanted < MOST_SPLITS ? splits_wanted : MOST_SPLITS;
    f->past_warps = warps_wanted;
    const int splits_of_window = WINDOW_SPLITS * g.H > splits_wanted ? WINDOW_SPLITS / 2 : WINDOW_SPLITS;
    f->window_splits =
        f->window < splits_of_window * WINDOW_GROUPS ? (int)ceil_div(f->window, WINDOW_GROUPS) : splits_of_window;
    while (f->past_warps > least && past_smem(nullptr, g, f->past_warps, 1).bytes > limit) f->past_warps /= 2;
    if (f->past_warps < warps_wanted && f->capacity > f->window)
        fprintf(stderr,
                "%s: kv_cache_compression_ratio %g%s: attention to tokens before the newest %ld has %d of %d warps a "
                "block, as shared memory holds no more; it is slower than with n_embd / 16 numbers cached a token\n",
                program_name, f->m.s.kv_cache_compression_ratio, g.rope.used ? " and rope" : "", f->window,
                f->past_warps, warps_wanted);
    while (f->past_warps > least && f->past_warps / 2 * 15ll * f->past_splits >= f->capacity) f->past_warps /= 2;
    if (past_smem(nullptr, g, f->past_warps, 1).bytes > limit)
        die(2, "n_embd %d does not fit the %zu bytes of shared memory that a block has here", g.C, limit);
    f->queries = 1;
    while (f->queries < 8 && past_smem(nullptr, g, f->past_warps, f->queries + 1).bytes <= limit) f->queries++;
    const int64_t M = f->queries, pairs = M * g.H, splits = f->past_splits;
    for (float **p : {&f->sums.top, &f->sums.sum}) device_alloc((void **)p, WINDOW_SPLITS * pairs * sizeof(float));
    device_alloc((void **)&f->sums.out, WINDOW_SPLITS * M * g.C * sizeof(float));
    for (float **p : {&f->past_sums.top, &f->past_sums.sum, &f->past_sums.mean})
        device_alloc((void **)p, splits * pairs * sizeof(float));
    device_alloc((void **)&f->past_sums.out, splits * M * g.C * sizeof(float));
    device_alloc((void **)&f->past_sums.u, splits * pairs * g.rank_pad * sizeof(float));
    device_alloc((void **)&f->past_query.q, g.C / 32 * 32 * sizeof(TilePair));
    device_alloc((void **)&f->past_query.u, ceil_div(pairs, 8) * g.rank_pad / 32 * 32 * sizeof(TilePair));
    for (float **p : {&f->past_query.sum, &f->past_query.bias}) device_alloc((void **)p, pairs * sizeof(float));
}

// A warp a row: whole = round(from / scale), scale = largest |from| / 127; a row with a number that is not finite gets
// such a scale.
__global__ void to_int8_kernel(int8_t *whole, float *scales, const floatX *from, int columns) {
    const int64_t row = blockIdx.x;
    float largest = 0, not_finite = 0; // 0 or NaN
    for (int i = threadIdx.x * 8; i < columns; i += 32 * 8) {
        const Pack v = load(from + row * columns + i);
        for (int j = 0; j < 8; j++) {
            largest = fmaxf(largest, fabsf(v.x[j]));
            not_finite += 0 * v.x[j];
        }
    }
    largest = warp_max(largest);
    const float scale = largest / 127 + warp_sum(not_finite);
    for (int i = threadIdx.x * 8; i < columns; i += 32 * 8) {
        const Pack v = load(from + row * columns + i);
        for (int j = 0; j < 8; j++) whole[row * columns + i + j] = (int8_t)(scale > 0 ? rintf(v.x[j] / scale) : 0);
    }
    if (threadIdx.x == 0) scales[row] = scale;
}

static Int8Matrix to_int8(const floatX *from, int rows, int columns) {
    Int8Matrix to = {};
    device_alloc((void **)&to.whole, (int64_t)rows * columns);
    device_alloc((void **)&to.scales, rows * sizeof(float));
    to_int8_kernel<<<rows, 32, 0, stream>>>(to.whole, to.scales, from, columns);
    return to;
}

// Large matrices into 8 bits, and the block of weights into a smaller one without them. That is all matrices but the
// embedding, of which a token reads a row, and the GOLD cache's two, 0.3 % of the weights, on which all keys and values
// hang. (Finch-C2's decay_w1 and value2_w1 are packed in 8 bits, too: packed_rows.)
static void weights_to_int8(Infer *f) {
    Model *m = &f->m;
    f->weights = WEIGHTS_INT8;
    f->int8_matrices = (Int8Matrix *)calloc(m->n_tensors, sizeof(Int8Matrix));
    int n = 0;
    int64_t room_size = 0, kept = 0;
    auto convert = [&](Param *p) {
        if (p->columns % 16) // copied 16 bytes at a time
            die(2, "--weights int8: expected matrices with a multiple of 16 columns, found %d", (int)p->columns);
        f->int8_matrices[n] = to_int8(p->w, p->rows, p->columns);
        p->in_int8 = &f->int8_matrices[n++];
        const int64_t size = (int64_t)p->rows * p->columns;
        // the head comes in slices
        if (p != &m->top.head && size > room_size) room_size = size;
    };
    for (int l = 0; l < m->d.L; l++) {
        Params &params = m->layers[l].p;
#define ROW(field, name, sizes, init, group, places) \
    if (group == MATRIX && params.field.w) convert(&params.field);
#define NORM_ROW(...)
        TENSORS(ROW, NORM_ROW)
#undef NORM_ROW
#undef ROW
    }
    convert(&m->top.head);
    floatX *room, *block, *to;
    alloc_floats(&room, room_size);
    for (int i = 0; i < n; i++) f->int8_matrices[i].room = room, f->int8_matrices[i].room_size = room_size;
    for (int i = 0; i < m->n_tensors; i++)
        if (!m->fields[i]->in_int8) kept += m->tensors[i].size;
    alloc_floats(&block, kept);
    to = block;
    for (int i = 0; i < m->n_tensors; i++) {
        const int64_t size = m->tensors[i].size;
        if (!m->fields[i]->in_int8) {
            CUDA_CHECK(cudaMemcpyAsync(to, m->fields[i]->w, size * sizeof(floatX), cudaMemcpyDeviceToDevice, stream));
            m->fields[i]->w = to, to += size;
        } else {
            m->fields[i]->w = nullptr;
        }
    }
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaFree(m->params));
    m->params = block;
    if (!PRECISION_BF16) m->master = (float *)block;
}

// w1 (C, rank) transposed, for products with a token. In 8 bits w1 is set to what these stand for: so pre-fill goes by
// the same numbers.
static StepMatrix packed_rows(const Infer *f, Param w1) {
    const int C = w1.rows, rank = w1.columns;
    floatX *to = packed(rank, C, w1, C, rank, true);
    if (f->weights != WEIGHTS_INT8) return {to, nullptr};
    const Int8Matrix w = to_int8(to, rank, C);
    from_int8_kernel<<<pack_blocks((int64_t)rank * C), 256, 0, stream>>>(to, w.whole, w.scales, rank, C);
    pack_matrix_kernel<<<blocks_of((int64_t)rank * C), 256, 0, stream>>>(w1.w, C, rank, to, C, rank, C, true);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaFree(to));
    return {w.whole, w.scales};
}

// each(p, n) for every vector of a step
template <typename F> static void row_vectors(Infer *f, const F &each) {
    const Dims &d = f->m.d;
    Row &row = f->row;
    const int64_t kv = 2 * f->G;
    each(row.ln, d.C);
    each(row.xs, 5 * d.C);
    each(row.ffn, d.F);
    for (float **p : {&row.r, &row.k, &row.v, &row.v2, &row.y, &row.q}) each(*p, d.A);
    for (float **p : {&row.x, &row.x_mid, &row.gate}) each(*p, d.C);
    each(row.hidden, MIXES_HIDDEN + DECAY_RANK + VALUE2_RANK);
    if (!f->G) return;
    each(row.kv1, kv * d.C);
    each(row.u, kv * padded_rank(gold_rank(d)));
    each(row.c, d.R);
    each(row.z, 2 * d.C);
    each(row.kv2, kv * d.C);
}

// Matrices that a step reads by rows of C, and its vectors.
static void prepare_decode(Infer *f) {
    const Dims &d = f->m.d;
    f->packed = (Packed *)calloc(d.L, sizeof(Packed));
    f->decodes = matvec_fits(d.F > 5 * d.C ? d.F : 5 * d.C, MV_FEW_SLOTS);
    if (f->weights == WEIGHTS_INT8)
        f->decodes = f->decodes && matvec_int8_slots(d.F, d.F, false) && matvec_int8_slots(5 * d.C, d.C, true);
    for (int l = 0; l < d.L; l++) {
        const Layer &layer = f->m.layers[l];
        const Params &p = layer.p;
        if (!find_decoder(TIME_DECODERS, layer.tmix->name)) f->decodes = false;
        if (!find_decoder(CHANNEL_DECODERS, layer.cmix->name)) f->decodes = false;
        if (p.time_maa_q_w1.w) f->packed[l].mix_w1 = {packed(32, d.C, p.time_maa_q_w1, d.C, 32, true), nullptr};
        if (!p.time_maa_w1.w || !p.time_value2_w1.w) continue;
        f->packed[l] = {{packed(160, d.C, p.time_maa_w1, d.C, 160, true), nullptr},
                        packed_rows(f, p.time_decay_w1),
                        packed_rows(f, p.time_value2_w1)};
    }
    row_vectors(f, [](auto *&p, int64_t n) { device_alloc((void **)&p, n * sizeof(*p)); });
}

static void pack_pairs(TilePair *to, const floatX *p, int64_t ld_k, int64_t ld_n, int K, int columns, int per,
                       int inner, int outer, int step, bool k_channels, bool n_channels, bool cores = false) {
    const PackTiles how = {p, ld_k, ld_n, K, per, inner, outer, step, k_channels, n_channels, cores};
    pack_tiles_kernel<<<columns / 8 * (K / 32), 32, 0, stream>>>(to, how);
}

// w^T w of w (rows, n), as right operand
static TilePair *gram_of(const floatX *w, int rows_of_w, int n, floatX *scratch) {
    TilePair *to;
    device_alloc((void **)&to, n / 8 * (n / 32) * 32 * sizeof(TilePair));
    matmul(scratch, n, columns(w, n), rows(w, n), n, n, rows_of_w);
    pack_pairs(to, scratch, n, 1, n, n, n / 8, n / 32, 0, 1, false, false);
    return to;
}

static int past_groups(const GoldSource &g) { return g.rank_pad == 64 ? 2 : 4; }
static int side_stage(const GoldSource &g, bool keys) {
    return (keys ? 4 * g.R32 / 32 : 0) + 4 + 8 * past_groups(g) + 1;
}

// The weights of a side in the order in which past_sweep takes them: for each pass over the rank and each 32 channels,
// tiles of W_c (keys only), of the mix, of w1 and of w2, and in a pair's place mu, eight channels a lane.
static void prepare_side(GoldSource &g, GoldSource::Side &side, bool keys, Param w1, Param w2, int rank,
                         floatX *scratch) {
    const int C = g.C, groups = past_groups(g), passes = g.rank_pad / (32 * groups), from_c = keys ? 4 * g.R32 / 32 : 0;
    floatX *centered;
    TilePair *tiles;
    side.stage = side_stage(g, keys);
    side.w1 = packed(g.rank_pad, C, w1, C, rank, true);
    alloc_floats(&centered, (int64_t)C * g.rank_pad);
    pack_centered_kernel<<<g.rank_pad, 256, 0, stream>>>(centered, w2.w, rank, C);
    side.w2 = centered;
    side.gram = gram_of(centered, C, g.rank_pad, scratch);
    device_alloc((void **)&tiles, (int64_t)passes * C / 32 * side.stage * 32 * sizeof(TilePair));
    side.tiles = tiles;
    for (int pass = 0; pass < passes; pass++) {
        TilePair *to = tiles + (int64_t)pass * C / 32 * side.stage * 32;
        if (keys) pack_pairs(to, g.w_c, 1, g.R32, g.R32, C, 4, g.R32 / 32, side.stage, 1, false, true, g.warpgroups);
        to += from_c * 32;
        pack_pairs(to, side.mix, C, 1, 32, C, 4, 1, side.stage, 0, false, true, g.warpgroups);
        to += 4 * 32;
        const int of = 32 * groups, tiles_of = 4 * groups; // ranks of a pass
        pack_pairs(to, side.w1 + (int64_t)pass * of * C, 1, C, C, of, tiles_of, 1, 0, side.stage, true, false,
                   g.warpgroups);
        pack_pairs(to + tiles_of * 32, side.w2 + pass * of, g.rank_pad, 1, C, of, tiles_of, 1, 0, side.stage, true,
                   false, g.warpgroups);
        pack_mu_kernel<<<C / 32, 32, 0, stream>>>(to + 2 * tiles_of * 32, side.mu, side.stage);
    }
}

static int rotated_stage(const GoldSource &g) { return 4 * g.R32 / 32 + 4 + 4 * g.rank_pad / 32; }

// Likewise for past_rotated_scores: tiles of W_c, of the mix, of w2.
static void prepare_rotated(GoldSource &g) {
    const int C = g.C, from_c = 4 * g.R32 / 32;
    TilePair *to;
    device_alloc((void **)&to, (int64_t)C / 32 * g.rotated_stage * 32 * sizeof(TilePair));
    g.rotated_tiles = to;
    pack_pairs(to, g.w_c, 1, g.R32, g.R32, C, 4, g.R32 / 32, g.rotated_stage, 1, false, true);
    pack_pairs(to + from_c * 32, g.k.mix, C, 1, 32, C, 4, 1, g.rotated_stage, 0, false, true);
    pack_pairs(to + (from_c + 4) * 32, g.k.w2, 1, g.rank_pad, g.rank_pad, C, 4, g.rank_pad / 32, g.rotated_stage, 1,
               false, true);
}

// Tables over the vocabulary and weights in the layout that attention reads; once, after the weights are in place.
// warpgroups: where they can, these multiply in the attention to older tokens
static void prepare_gold(Infer *f, bool warpgroups) {
    Model *m = &f->m;
    const Dims d = m->d;
    const int64_t V = d.V, C = d.C;
    const int R32 = multiple_of_32(d.R), rank = gold_rank(d), rank_pad = padded_rank(rank);
    const int largest = R32 > rank_pad ? R32 : rank_pad;
    const Param W = m->top.w_kv_cache_b;
    f->w_c = packed(d.A, R32, columns_of(W, d.C, d.R), d.A, d.R, false);
    alloc_floats(&f->id_k0, V * C);
    alloc_floats(&f->id_xo, V * C);
    alloc_floats(&f->id_c, V * R32);
    device_alloc((void **)&f->id_squares, V * sizeof(float));
    floatX *w1[2], *scratch;
    for (floatX *&w : w1) alloc_floats(&w, C * 64);
    alloc_floats(&scratch, (int64_t)largest * largest);
    f->c_gram = gram_of(f->w_c, d.C, R32, scratch);
    for (int64_t first = 0; first < V; first += m->T) {
        const int here = (int)(V - first < m->T ? V - first : m->T);
        set_batch(m, 1, here);
        number_tokens_kernel<<<blocks_of(here), 256, 0, stream>>>(m->tokens, (int)first, here);
        model_embed(m);
        CUDA_CHECK(
            cudaMemcpyAsync(f->id_xo + first * C, m->xo, here * C * sizeof(floatX), cudaMemcpyDeviceToDevice, stream));
        linear_forward(f->id_k0 + first * C, m->x0, columns_of(W, 0, d.C), here);
    }
    for (int i = 0; i < f->G; i++) {
        const Params &p = m->layers[d.G0 + i].p;
        GoldSource &g = f->sources[i];
        floatX *id_h, *id_h_before;
        alloc_floats(&id_h, V * 64);
        alloc_floats(&id_h_before, V * 64);
        g.id_k0 = f->id_k0, g.id_xo = f->id_xo, g.id_c = f->id_c, g.id_squares = f->id_squares;
        g.id_h = id_h, g.id_h_before = id_h_before;
        g.w_c = f->w_c, g.c_gram = f->c_gram;
        g.rope = m->rope, g.C = d.C, g.H = d.H, g.R = d.R, g.R32 = R32, g.rank_pad = rank_pad;
        g.k.mu = p.time_maa_k.w, g.k.mix = p.time_maa_kv_w2.w, g.k.gain = p.ln_k.gain.w, g.k.bias = p.ln_k.bias.w;
        g.v.mu = p.time_maa_v.w, g.v.mix = p.time_maa_kv_w2.w + 32 * C, g.v.gain = p.ln_v.gain.w,
        g.v.bias = p.ln_v.bias.w;
        g.rotated_stage = g.rope.used ? rotated_stage(g) : 0;
        g.stage = side_stage(g, true) > g.rotated_stage ? side_stage(g, true) : g.rotated_stage;
        g.warpgroups = warpgroups && !g.rope.used && R32 == 32 * past_groups(g);
        if (past_smem(nullptr, g, 4, 1).bytes > (size_t)block_smem) g.warpgroups = false;
        prepare_side(g, g.k, true, p.time_key_w1, p.time_key_w2, rank, scratch);
        prepare_side(g, g.v, false, p.time_value_w1, p.time_value_w2, rank, scratch);
        if (g.rope.used) prepare_rotated(g);
        // (xo + diff mu) @ w1 = xo_t @ (1 - mu) w1 + xo_{t-1} @ mu w1
        for (int before = 0; before < 2; before++)
            scale_rows_kernel<<<blocks_of(C * 64), 256, 0, stream>>>(w1[before], p.time_maa_kv_w1.w,
                                                                     p.time_maa_v_cache.w, !before, C * 64, 64);
        matmul(id_h, 64, rows(f->id_xo, C), rows(w1[0], 64), d.V, 64, d.C);
        matmul(id_h_before, 64, rows(f->id_xo, C), rows(w1[1], 64), d.V, 64, d.C);
    }
    matmul(f->id_c, R32, rows(f->id_k0, C), rows(f->w_c, R32), d.V, R32, d.C);
    sum_squares_kernel<<<d.V, 32, 0, stream>>>(f->id_squares, f->id_k0, d.C);
    CUDA_CHECK(
        cudaMemcpyAsync(f->device_sources, f->sources, f->G * sizeof(GoldSource), cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    for (floatX *w : {w1[0], w1[1], scratch}) cudaFree(w);
}

// ---- the model's shape, where a file written by others does not say it ----

static int64_t shape_of(const SafeTensors *file, const char *name, int dimension) { // 0 if there is no such tensor
    const FileTensor *t = safetensors_find(file, name);
    return t && dimension < t->ndim ? t->shape[dimension] : 0;
}

static int64_t rank_of(const SafeTensors *file, const char *name) {
    const int64_t rank = shape_of(file, name, 1);
    if (rank < 8 || rank > 4096 || rank % 8)
        die(2, "%s: tensor %s: shape[1]: expected a rank from 8 to 4096, a multiple of 8, found %ld", file->path, name,
            rank);
    return rank;
}

// The mixer all of whose tensors layer l has
template <size_t n> static const char *mixer_from_tensors(const Mixer (&table)[n], const SafeTensors *file, int l) {
    for (const Mixer &mixer : table) {
        bool all = true;
        char full[96];
#define ROW(field, name, sizes, init, group, places) \
    snprintf(full, sizeof(full), "blocks.%d.%s", l, name); \
    all = all && (!((places)&mixer.tensors) || safetensors_find(file, full));
#define NORM_ROW(field, name, sizes, init, places) \
    ROW(field, name ".weight", sizes, init, VECTOR, places) \
    ROW(field, name ".bias", sizes, init, VECTOR, places)
        TENSORS(ROW, NORM_ROW)
        VARIANTS(ROW, NORM_ROW)
#undef NORM_ROW
#undef ROW
        if (all) return mixer.name;
    }
    die(2, "%s: layer %d: expected the tensors of one of the mixers, found others", file->path, l);
}

static void settings_from_tensors(Settings *s, const SafeTensors *file) {
    char name[64];
    settings_default(s);
    s->vocab_size = shape_of(file, "emb.weight", 0), s->n_embd = shape_of(file, "emb.weight", 1);
    if (!s->n_embd) die(2, "%s: tensor emb.weight: expected, not found", file->path);
    int64_t L = 0, G0 = -1;
    for (;; L++) {
        snprintf(name, sizeof(name), "blocks.%d.ln1.weight", (int)L);
        if (!shape_of(file, name, 0)) break;
        const char *tmix = mixer_from_tensors(TIME_MIXERS, file, (int)L);
        const char *cmix = mixer_from_tensors(CHANNEL_MIXERS, file, (int)L);
        if (L == 0) snprintf(s->tmix, sizeof(s->tmix), "%s", tmix), snprintf(s->cmix, sizeof(s->cmix), "%s", cmix);
        if (G0 < 0 && (strcmp(tmix, s->tmix) != 0 || strcmp(cmix, s->cmix) != 0)) G0 = L;
        snprintf(s->tmix2, sizeof(s->tmix2), "%s", tmix), snprintf(s->cmix2, sizeof(s->cmix2), "%s", cmix);
    }
    s->n_layer = L;
    s->dim_ffn = shape_of(file, "blocks.0.ffn.key.weight", 0);
    if (strcmp(s->tmix, "x060") == 0) {
        s->mix_rank = rank_of(file, "blocks.0.att.time_maa_w2");
        s->decay_rank = rank_of(file, "blocks.0.att.time_decay_w1");
    }
    s->dim_att = shape_of(file, "blocks.0.att.output.weight", 1);
    if (!s->dim_att) s->dim_att = shape_of(file, "blocks.0.att.wo.weight", 1);
    if (G0 < 0) s->tmix2[0] = s->cmix2[0] = '\0';
    else s->inv_other_layer_ratio = (double)L / ((double)(L - G0) - 0.5); // rounds to G0, whatever L is
    if (shape_of(file, "w_kv_cache_a.weight", 0))
        s->kv_cache_compression_ratio = (double)s->n_embd / (double)shape_of(file, "w_kv_cache_a.weight", 0);
    if (find_mixer(TIME_MIXERS, s->tmix)->keeps_kv) s->rope.base = 10000; // as in the paper's models
}

// ---- the window ----

// Rows of the cache: c of tokens first.. (zeros before the context) for a block each, as the trainer's layers want it
__global__ void read_cache_rows_kernel(floatX *to, int *ids, GoldSource g, int64_t first) {
    const int64_t t = first + blockIdx.x;
    for (int i = threadIdx.x; i < g.R; i += blockDim.x) {
        float c = 0;
        if (t >= 0) c = g.c8 ? g.c8[t * g.R + i] * g.scales[t] : (float)g.c[t * g.R + i];
        to[(int64_t)blockIdx.x * g.R + i] = (floatX)c;
    }
    if (threadIdx.x == 0) ids[blockIdx.x] = t >= 0 ? g.ids[t] : 0;
}

// Keys and values of tokens begin..end-1, which are in the cache, into the window: by the trainer's layers, in chunks,
// row 0 being the token before.
static void fill_window(Infer *f, int64_t begin, int64_t end) {
    Model *m = &f->m;
    const Dims &d = m->d;
    const Param W = m->top.w_kv_cache_b;
    for (int64_t at = begin; at < end; at += f->chunk) {
        const int n = (int)(end - at < f->chunk ? end - at : f->chunk);
        m->d.lead = 1;
        m->d.first = at - 1;
        set_batch(m, 1, n + 1);
        read_cache_rows_kernel<<<n + 1, 128, 0, stream>>>(m->cache, m->tokens, f->sources[0], at - 1);
        model_embed(m);
        linear_forward(m->k0_sum, m->x0, columns_of(W, 0, d.C), d.BT);
        linear_forward(m->k0_sum, m->cache, columns_of(W, d.C, d.R), d.BT, 1);
        rms_norm_forward(m->k0, m->k0_sum, d.BT, d.A);
        for (floatX *row : {m->k0, m->xo}) // before the first token there is nothing
            if (at == 0) CUDA_CHECK(cudaMemsetAsync(row, 0, d.C * sizeof(floatX), stream));
        for (int i = 0; i < f->G; i++) {
            Layer *layer = &m->layers[d.G0 + i];
            gold_keys_values(m, layer);
            append_to_ring_kernel<<<n, row_threads(d.C), 0, stream>>>(f->sources[i].k.ring, layer->gold.k + d.C, at,
                                                                      f->window, d.C);
            append_to_ring_kernel<<<n, row_threads(d.C), 0, stream>>>(f->sources[i].v.ring, layer->gold.v + d.C, at,
                                                                      f->window, d.C);
        }
    }
    if (begin != f->window_end) f->window_begin = begin; // no longer joined to what was there
    if (f->window_begin < end - f->window) f->window_begin = end - f->window;
    f->window_end = end;
}

// The newest tokens, as far as they are not there yet.
static void extend_window(Infer *f) {
    const int64_t begin = f->position - f->window > f->window_end ? f->position - f->window : f->window_end;
    if (f->G && begin < f->position) fill_window(f, begin, f->position);
}

__global__ void set_place_kernel(Place *place, Place now) { *place = now; }

// Tells the device where the context stands; first: the position of the first query to come, less one for a recorded
// step.
static void move_place(Infer *f, int64_t first) {
    const Place now = {first, f->window_begin, false};
    set_place_kernel<<<1, 1, 0, stream>>>(f->place, now);
}

static void make_window(Infer *f) { // from what is saved
    f->window_begin = f->window_end = 0;
    extend_window(f);
    move_place(f, f->position - 1);
}

// ---- start ----

// Everything but the weights' values: plan, memory, the cache for `capacity` tokens (0: as many as fit, a million at
// most). chunk: tokens of a pre-fill chunk; window: most tokens whose keys and values are kept (KV_FULL: all; 0: as
// many as are worth their memory).
static Infer *infer_create(const Settings *settings, KvKind kv, int64_t capacity, int chunk, int64_t window) {
    Infer *f = (Infer *)calloc(1, sizeof(Infer));
    Model *m = &f->m;
    Settings s = *settings;
    s.grad_cp = REMAKE_LAYERS; // layers share what a layer keeps
    s.micro_bsz = 1;
    f->kv = kv == KV_IF_IT_FITS ? KV_FULL : kv;
    f->contexts = 1;
    f->chunk = chunk;
    // the GOLD layers' last tokens fit as well
    const int rows = chunk > 2 * s.n_layer + 1 ? chunk : (int)(2 * s.n_layer + 1);
    model_plan(m, &s, 1, rows + 1);
    const Dims &d = m->d;
    f->G = has_cache(m) ? d.L - d.G0 : 0;
    f->tail = 2 * f->G + 1;
    machine_start();
    size_t available, total;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    const int64_t weights = m->n_block * (int64_t)(sizeof(floatX) + 4);
    const int64_t tables = f->G ? (int64_t)d.V * (2 * d.C + 128 * f->G) * sizeof(floatX) : 0,
                  small = CUBLAS_WORKSPACE + (256 << 20);
    int64_t need = weights + tables + m->activation_bytes + small;
    if (kv == KV_IF_IT_FITS && capacity * cache_bytes_per_token(f) > (int64_t)available - need) f->kv = KV_COMPRESSED;
    kv = f->kv;
    const int64_t most = capacity ? capacity : 1 << 20, per_token = cache_bytes_per_token(f);
    const int64_t a_token = kv == KV_FULL ? 0 : 2 * f->G * d.C * (int64_t)sizeof(floatX); // of the window
    if (kv != KV_FULL) {
        auto too_large = [&] {
            const int64_t bytes = window * a_token;
            return bytes > (int64_t)total / 16 || need + bytes + most * per_token > (int64_t)available;
        };
        if (window == 0) {
            window = most < MOST_WINDOW ? most : MOST_WINDOW;
            while (window > LEAST_WINDOW && too_large()) window = window / 2 > LEAST_WINDOW ? window / 2 : LEAST_WINDOW;
        }
        if (window > most) window = most;
        need += window * a_token;
    }
    const int64_t fits = per_token ? ((int64_t)available - need) / per_token : INT64_MAX;
    if (need > (int64_t)available || fits < 1)
        die(2, "%s has %.2f GiB free, and the model needs %.2f GiB, %.2f of them for the window of keys and values",
            machine_name(), available / 1073741824.0, need / 1073741824.0, window * a_token / 1073741824.0);
    if (capacity > fits)
        die(2, "a context of %ld tokens does not fit this machine's memory: %ld tokens do", capacity, fits);
    f->capacity = capacity ? capacity : fits < 1 << 20 ? fits : 1 << 20;

    model_allocate_weights(m);
    model_allocate_activations(m);
    for (int l = 0; l < d.L; l++) {
        Layer *layer = &m->layers[l];
        alloc_floats(&layer->tmix_shift, d.C);
        alloc_floats(&layer->cmix_shift, d.C);
        if (layer->tmix->needs_cache) layer->tmix = &GOLD_FROM_CACHE;
        else if (!layer->tmix->keeps_kv) device_alloc((void **)&layer->wkv_state, (int64_t)d.H * N * N * sizeof(float));
    }
    device_alloc((void **)&f->logits, d.V * sizeof(float));
    device_alloc((void **)&f->place, sizeof(Place));
    device_alloc((void **)&f->token, sizeof(int));
    kept_allocate(f, rows);
    f->window = kv == KV_FULL || window > f->capacity ? f->capacity : window;
    if (!f->G) return f;
    f->sources = (GoldSource *)calloc(f->G, sizeof(GoldSource));
    device_alloc((void **)&f->device_sources, f->G * sizeof(GoldSource));
    device_alloc((void **)&f->ids, f->capacity * sizeof(int));
    if (kv != KV_INT8) alloc_floats(&f->c, f->capacity * d.R);
    if (kv == KV_INT8) device_alloc((void **)&f->c8, f->capacity * d.R);
    if (kv == KV_INT8) device_alloc((void **)&f->scales, f->capacity * sizeof(float));
    for (int i = 0; i < f->G; i++) {
        GoldSource &g = f->sources[i];
        g.ids = f->ids, g.c = f->c, g.c8 = f->c8, g.scales = f->scales;
        for (floatX **p : {&g.k.ring, &g.v.ring}) alloc_floats(p, f->window * d.C);
    }
    for (floatX **p : {&f->tail_x[0], &f->tail_x[1]}) alloc_floats(p, (int64_t)f->tail * d.C);
    return f;
}

// Our checkpoints carry their settings; a file by others tells most of them by its tensors.
static void settings_of_model(Settings *s, const SafeTensors *file) {
    if (safetensors_has_settings(file)) {
        settings_default(s);
        settings_load(s, file, true);
    } else {
        settings_from_tensors(s, file);
        settings_assumed(s, file->path);
    }
    settings_check(s);
}

// Tokens of a pre-fill chunk: enough that matrix products fill the machine.
static int prefill_chunk(void) {
    return multiprocessors < 8 ? 256 : multiprocessors < 128 ? 32 * multiprocessors : 4096;
}

static const Settings *infer_settings(const Infer *f) { return &f->m.s; }
static int64_t infer_position(const Infer *f) { return f->position; }
static float *infer_logits(Infer *f) { return f->logits; }

// ---- what is carried: one list for forgetting, saving and loading ----

// width: bytes of an element; grows: with the context, and what is there is not written again
typedef struct Carried {
    char name[48];
    const char *dtype;
    void *p;
    int64_t count, width;
    bool grows;
} Carried;

static int infer_carried(const Infer *f, Carried *list) { // list: 6 + 4 L; returns how many
    const char *type = PRECISION_BF16 ? "BF16" : "F32";
    const Dims &d = f->m.d;
    const int64_t T = f->position;
    int n = 0;
    auto add = [&](const char *name, int number, const char *dtype, const void *p, int64_t count, int64_t width,
                   bool grows = false) {
        if (!p) return;
        snprintf(list[n].name, sizeof(list[n].name), name, number);
        list[n].dtype = dtype, list[n].p = (void *)p, list[n].count = count, list[n].width = width,
        list[n++].grows = grows;
    };
    for (int l = 0; l < d.L; l++) {
        const Layer *layer = &f->m.layers[l];
        add("blocks.%d.tmix_shift", l, type, layer->tmix_shift, d.C, sizeof(floatX));
        add("blocks.%d.cmix_shift", l, type, layer->cmix_shift, d.C, sizeof(floatX));
        add("blocks.%d.wkv", l, "F32", layer->wkv_state, (int64_t)d.H * N * N, 4);
        add("blocks.%d.keys", l, type, f->kept[l].keys, T * d.A, sizeof(floatX), true);
        add("blocks.%d.values", l, type, f->kept[l].values, T * d.A, sizeof(floatX), true);
    }
    add("logits", 0, "F32", f->logits, d.V, 4);
    if (!f->G) return n;
    add("ids", 0, "I32", f->ids, T, 4, true);
    add("c", 0, type, f->c, T * d.R, sizeof(floatX), true);
    add("c8", 0, "I8", f->c8, T * d.R, 1, true);
    add("scales", 0, "F32", f->scales, T, 4, true);
    return n;
}

static Carried *carried_room(const Infer *f) { return (Carried *)calloc(16 + 5 * f->m.d.L, sizeof(Carried)); }

void infer_reset(Infer *f) { // forget the context
    f->position = f->window_begin = f->window_end = 0;
    f->tail_rows = 0;
    move_place(f, -1);
    Carried *list = carried_room(f);
    const int n = infer_carried(f, list);
    for (int i = 0; i < n; i++) CUDA_CHECK(cudaMemsetAsync(list[i].p, 0, list[i].count * list[i].width, stream));
    free(list);
}

// Records a step in both forms before the first token: nothing is allocated later.
template <typename F> static void infer_rehearse(Infer *f, Recording (&recordings)[2], const F &queue) {
    for (int i = 0; i < 2; i++) {
        infer_reset(f);
        // for the host: there are tokens before the window
        f->window_begin = i;
        run_recorded(&recordings[i], queue);
    }
    infer_reset(f);
}

static void infer_prepare(Infer *f, int splits, int warps, bool warpgroups) { // after the weights have their values
    prepare_decode(f);
    if (f->G) {
        prepare_gold(f, warpgroups);
        choose_attention_shape(f, splits, warps);
    }
    if (f->decodes) infer_rehearse(f, f->recordings, [=] { queue_step(f, f->token); });
}

// Binds a saved state to its model; only asked for then, as it reads all of the file
static uint64_t model_hash(const Infer *f) {
    return f->file ? hash_bytes(hash_start, f->file->data, (size_t)f->file->data_size) : 0;
}

static Infer *infer_open(const SafeTensors *file, KvKind kv, int64_t capacity, int64_t window, WeightsKind weights) {
    Settings s;
    settings_of_model(&s, file);
    machine_start();
    Infer *f = infer_create(&s, kv, capacity, prefill_chunk(), window);
    f->file = file;
    take_weights(&f->m, file, false);
    if (PRECISION_BF16) { // inference needs the working copy alone
        CUDA_CHECK(cudaFree(f->m.master));
        f->m.master = nullptr;
    }
    if (weights == WEIGHTS_INT8) weights_to_int8(f);
    infer_prepare(f, multiprocessors, 8, has_warpgroups());
    return f;
}

// The context to a safetensors file, bound to its model by the hash of the weights. Whoever loads it makes the window
// anew, to bits that may differ from those it has grown to here: so it is made anew here as well, and both go on alike.
// unfinished: bytes of a character that the context ends in.
static void infer_save_state(Infer *f, FileOut *out, const Utf8 *unfinished) {
    make_window(f);
    Carried *list = carried_room(f);
    const int n = infer_carried(f, list);
    char *header = nullptr;
    size_t length = 0;
    int64_t offset = 0;
    FILE *text = open_memstream(&header, &length);
    fprintf(text,
            "{\"__metadata__\":{\"model_hash\":\"%016lx\",\"weights\":\"%s\",\"position\":\"%ld\",\"unfinished\":\"",
            model_hash(f), weights_names[f->weights], f->position);
    for (int i = 0; i < unfinished->n; i++) fprintf(text, "%02x", unfinished->held[i]);
    fprintf(text, "\"}");
    for (int i = 0; i < n; i++) {
        const int64_t bytes = list[i].count * list[i].width;
        fprintf(text, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%ld],\"data_offsets\":[%ld,%ld]}", list[i].name,
                list[i].dtype, list[i].count, offset, offset + bytes);
        offset += bytes;
    }
    fprintf(text, "}");
    fclose(text);
    uint64_t header_length = length;
    file_write(out, &header_length, 8);
    file_write(out, header, length);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    for (int i = 0; i < n; i++) {
        const size_t bytes = (size_t)(list[i].count * list[i].width);
        void *host = malloc(bytes + 1);
        CUDA_CHECK(cudaMemcpy(host, list[i].p, bytes, cudaMemcpyDeviceToHost));
        file_write(out, host, bytes);
        free(host);
    }
    file_end(out);
    free(header);
    free(list);
}

static void infer_load_state(Infer *f, const char *path, Utf8 *unfinished) {
    SafeTensors file;
    safetensors_open(&file, path);
    const char *weights = safetensors_metadata(&file, "weights"), *ours = weights_names[f->weights];
    if (!weights) weights = weights_names[WEIGHTS_FLOAT]; // all were, before states said so
    if (strcmp(weights, ours) != 0)
        die(2, "%s: metadata, field weights: expected %s, found %s: go on with --weights %s, or make it anew with %s",
            path, ours, weights, weights, ours);
    char hash[17];
    snprintf(hash, sizeof(hash), "%016lx", model_hash(f));
    const char *found = safetensors_metadata(&file, "model_hash");
    if (!found || strcmp(found, hash) != 0)
        die(2,
            "%s: metadata, field model_hash: expected %s, this model's, found %s: it was made with other weights, and "
            "must be made anew with these: --save-state",
            path, hash, found ? found : "nothing");
    infer_reset(f);
    f->position = safetensors_number(&file, "position");
    expect(path, "position", -1, 0, f->capacity, f->position);
    Carried *list = carried_room(f);
    const int n = infer_carried(f, list);
    for (int i = 0; i < n; i++) {
        const FileTensor *t = safetensors_find(&file, list[i].name);
        if (!t) die(2, "%s: tensor %s: expected, not found (saved with another --kv?)", path, list[i].name);
        if (strcmp(t->dtype, list[i].dtype) != 0)
            die(2, "%s: tensor %s: dtype: expected %s, found %s", path, t->name, list[i].dtype, t->dtype);
        expect(path, list[i].name, -1, list[i].count * list[i].width, list[i].count * list[i].width, t->end - t->begin);
        for (int64_t token = 0; list[i].p == f->ids && token < list[i].count; token++) { // they look up the embedding
            int32_t id;
            memcpy(&id, file.data + t->begin + 4 * token, 4);
            expect(path, "ids", token, 0, f->m.d.V - 1, id);
        }
        CUDA_CHECK(cudaMemcpy(list[i].p, file.data + t->begin, t->end - t->begin, cudaMemcpyHostToDevice));
    }
    free(list);
    const char *hex = safetensors_metadata(&file, "unfinished");
    memset(unfinished, 0, sizeof(*unfinished));
    for (unsigned byte; hex && strlen(hex) >= 2 && sscanf(hex, "%2x", &byte) == 1; hex += 2) {
        uint8_t whole[6];
        utf8_push(unfinished, (uint8_t)byte, whole);
    }
    unfinished->given = unfinished->n;
    safetensors_close(&file);
    make_window(f);
}

static void infer_cache_bytes(const Infer *f, int64_t *total, double *per_token, double *transformer_per_token) {
    const Dims &d = f->m.d;
    Carried *list = carried_room(f);
    const int n = infer_carried(f, list);
    *total = 0;
    for (int i = 0; i < n; i++) *total += strcmp(list[i].name, "logits") == 0 ? 0 : list[i].count * list[i].width;
    free(list);
    // a saved state does without these
    if (f->kv == KV_FULL) *total += f->position * 2 * f->G * d.C * (int64_t)sizeof(floatX);
    *per_token = (double)cache_bytes_per_token(f);
    *transformer_per_token = 2.0 * d.A * d.L * 2; // keys and values of all layers in bf16
}

// ---- pre-fill and decode ----

// Where stderr is a terminal: a line about work of more than a second or two, which the next one replaces.
static void show_progress(const char *what, int64_t done, int64_t n, double begin) {
    static bool shown = false;
    const double seconds = seconds_now() - begin;
    if (done == n && shown) fprintf(stderr, "\r\033[K");
    if (done == n) shown = false;
    if (done == 0 || done == n || seconds < 1 || !isatty(STDERR_FILENO)) return;
    CUDA_CHECK(cudaStreamSynchronize(stream));
    const long left = (long)((seconds_now() - begin) / (double)done * (double)(n - done) + 0.5);
    fprintf(stderr, "\r\033[K%s: %ld of %ld tokens, %ld:%02ld left", what, done, n, left / 60, left % 60);
    shown = true;
}

// Host ids (n) as rows 1..n of the model at hand; row 0, the token before, is there for the shifts alone.
static void stage_rows(Infer *f, const int *ids, int n) {
    Model *m = &f->m;
    const int slot = (int)(m->micro_steps++ % 4);
    CUDA_CHECK(cudaEventSynchronize(m->staged_done[slot]));
    int *staged = m->staged[slot];
    staged[0] = ids[0]; // any id will do
    memcpy(staged + 1, ids, n * sizeof(int));
    CUDA_CHECK(cudaMemcpyAsync(m->tokens, staged, (n + 1) * sizeof(int), cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaEventRecord(m->staged_done[slot], stream));
    m->d.lead = 1;
    m->d.first = f->position - 1;
    set_batch(m, 1, n + 1);
}

// The rows' ids and c into the cache at the present position. x: before the GOLD layers.
static void append_to_cache(Infer *f, const floatX *x, int n) {
    Model *m = &f->m;
    const Dims &d = m->d;
    const int64_t at = f->position;
    append_tokens_kernel<<<blocks_of(n), 256, 0, stream>>>(f->ids + at, m->tokens + 1, n);
    linear_forward(m->cache, x + d.C, m->top.w_kv_cache_a, n);
    if (f->kv == KV_INT8) append_int8_kernel<<<n, 32, 0, stream>>>(f->c8 + at * d.R, f->scales + at, m->cache, d.R);
    else
        append_floats_kernel<<<blocks_of((int64_t)n * d.R), 256, 0, stream>>>(f->c + at * d.R, m->cache,
                                                                              (int64_t)n * d.R);
}

// Keeps the last rows of x (n rows from row 1) for the GOLD layers: the newest `tail` of them.
static void keep_tail(Infer *f, const floatX *x, int n) {
    const int64_t C = f->m.d.C;
    const int fresh = n < f->tail ? n : f->tail, old = f->tail_rows + fresh < f->tail ? f->tail_rows : f->tail - fresh;
    floatX *to = f->tail_x[1 - f->tail_now], *from = f->tail_x[f->tail_now] + (f->tail_rows - old) * C;
    const size_t row = C * sizeof(floatX);
    if (old) CUDA_CHECK(cudaMemcpyAsync(to, from, old * row, cudaMemcpyDeviceToDevice, stream));
    CUDA_CHECK(cudaMemcpyAsync(to + old * C, x + (1 + n - fresh) * C, fresh * row, cudaMemcpyDeviceToDevice, stream));
    f->tail_now = 1 - f->tail_now;
    f->tail_rows = old + fresh;
}

// A chunk of n tokens through the layers before the GOLD layers and into the cache; then, if `all`, through these too.
static void infer_chunk(Infer *f, const int *ids, int n, bool all) {
    Model *m = &f->m;
    const Dims &d = m->d;
    stage_rows(f, ids, n);
    model_embed(m);
    model_layers(m, 0, f->G ? d.G0 : d.L);
    if (!f->G) {
        f->position += n;
        return;
    }
    floatX *x = m->layers[d.G0].x;
    const int64_t E = (int64_t)d.BT * d.C;
    add_forward_kernel<<<pack_blocks(E), 256, 0, stream>>>(x, m->layers[d.G0 - 1].x_mid, m->branch, E);
    append_to_cache(f, x, n);
    f->position += n;
    if (!all) {
        keep_tail(f, x, n);
        return;
    }
    extend_window(f);
    set_batch(m, 1, n + 1);
    m->d.first = f->position - n - 1;
    move_place(f, f->position - n);
    f->last_only = false;
    model_layers(m, d.G0, d.L);
    move_place(f, f->position - 1);
}

// Logits (fp32) of `count` rows, the first of them `row`, to device memory.
static void infer_head(Infer *f, float *logits, int row, int count) {
    linear_forward(logits, f->m.xf + (int64_t)row * f->m.d.C, f->m.top.head, count);
}

// A step, recorded: `queue` is queue_step and perhaps more.
template <typename F> static void infer_step(Infer *f, Recording (&recordings)[2], const F &queue) {
    if (f->position == f->capacity && f->G) die(2, "the context has %ld tokens, the most that it can", f->capacity);
    f->position++;
    if (f->window_end < f->position) f->window_end = f->position;
    if (f->window_begin < f->position - f->window) f->window_begin = f->position - f->window;
    run_recorded(&recordings[f->window_begin > 0], queue);
}

// n tokens go on from the context; afterwards the logits of the last one are ready. What the GOLD layers' shifts carry
// is exact before and after: short input goes through them as it stands, of longer input the last 2 G + 1 tokens do.
// Returns n, or after a signal how many went in; then there are no logits.
static int64_t infer_feed(Infer *f, const int *ids, int64_t n) {
    Model *m = &f->m;
    const Dims &d = m->d;
    if (f->position + n > f->capacity && cache_bytes_per_token(f) > 0)
        die(2, "the context would be %ld tokens long, expected at most %ld", f->position + n, f->capacity);
    if (n == 1 && f->decodes) {
        CUDA_CHECK(cudaMemcpyAsync(f->token, ids, sizeof(int), cudaMemcpyHostToDevice, stream));
        infer_step(f, f->recordings, [=] { queue_step(f, f->token); });
        return n;
    }
    f->tail_rows = 0;
    const double begin = seconds_now();
    for (int64_t done = 0; done < n; done += f->chunk) {
        if (stop_requested) return done;
        show_progress("prompt", done, n, begin);
        infer_chunk(f, ids + done, (int)(n - done < f->chunk ? n - done : f->chunk), false);
    }
    show_progress("prompt", n, n, begin);
    if (f->G) {
        extend_window(f);
        set_batch(m, 1, f->tail_rows + 1);
        CUDA_CHECK(cudaMemcpyAsync(m->layers[d.G0].x + d.C, f->tail_x[f->tail_now],
                                   (size_t)f->tail_rows * d.C * sizeof(floatX), cudaMemcpyDeviceToDevice, stream));
        move_place(f, f->position - f->tail_rows);
        m->d.first = f->position - f->tail_rows - 1;
        f->last_only = true;
        model_layers(m, d.G0, d.L);
    }
    model_final_norm(m);
    infer_head(f, f->logits, d.BT - 1, 1);
    move_place(f, f->position - 1);
    return n;
}

// ---- scoring: every position of a text through all layers ----

typedef struct Score {
    double loss;              // sum over the predictions
    int64_t correct, targets; // how many had the right token first; how many there were
    int64_t all;              // how many there were to be
    double begin;
} Score;

// One context of n + 1 tokens: adds its n predictions, or after a signal those up to there.
static void score_context(Infer *f, const int *ids, int64_t n, int chunk, Score *score) {
    Model *m = &f->m;
    const Dims &d = m->d;
    double totals[2] = {0, 0};
    CUDA_CHECK(cudaMemsetAsync(m->totals, 0, sizeof(totals), stream));
    infer_reset(f);
    for (int64_t done = 0; done < n && !stop_requested; done += chunk) {
        const int here = (int)(n - done < chunk ? n - done : chunk);
        show_progress("score", score->targets, score->all, score->begin);
        infer_chunk(f, ids + done, here, true);
        model_final_norm(m);
        int *targets = m->tokens + d.BT;
        CUDA_CHECK(cudaMemcpyAsync(targets, ids + done + 1, here * sizeof(int), cudaMemcpyHostToDevice, stream));
        for (int row = 0; row < here; row += m->slice) {
            const int count = here - row < m->slice ? here - row : m->slice;
            head_and_loss(m, m->xf + (int64_t)(1 + row) * d.C, targets, row, count, 0);
        }
        sum_losses_kernel<<<1, 256, 0, stream>>>(m->totals, m->losses, m->right, here);
        // ids + done may be the caller's pageable memory
        CUDA_CHECK(cudaStreamSynchronize(stream));
        score->targets += here;
    }
    CUDA_CHECK(cudaMemcpy(totals, m->totals, sizeof(totals), cudaMemcpyDeviceToHost));
    score->loss += totals[0];
    score->correct += (int64_t)totals[1];
}

// n tokens, 2 or more; window 0: one context; otherwise a fresh one for every `window` predictions, as the trainer's
// validation, which leaves out what is left at the end (but not all of it: a text shorter than a window is one
// context). chunk: tokens at a time, at most the engine's own (0: that).
static Score infer_score(Infer *f, const int *ids, int64_t n, int64_t window, int chunk) {
    Score score = {};
    score.begin = seconds_now();
    if (chunk <= 0 || chunk > f->chunk) chunk = f->chunk;
    const int64_t predictions = window && window < n - 1 ? window : n - 1;
    score.all = predictions > 0 ? n / (predictions + 1) * predictions : 0;
    for (int64_t at = 0; at + predictions < n && !stop_requested; at += predictions + 1) {
        if (cache_bytes_per_token(f) > 0 && predictions > f->capacity)
            die(2, "a context of %ld tokens, expected at most %ld", predictions, f->capacity);
        score_context(f, ids + at, predictions, chunk, &score);
    }
    show_progress("score", score.all, score.all, score.begin);
    return score;
}

// ---- several contexts at once ----
//
// A batch is an Infer beside the one that reads prompts, with the same weights. Each of its contexts has a slot:
// states, cache, window, the vectors of a step, all in one piece of memory. A context is read by the other Infer and
// copied into a slot; from then on each step takes every context one token further, long or short. Slots without one go
// through the step as well, and stay at position 0.

// Vectors of the same name in L1 lie in different places.
static int64_t slot_apart(const Infer *b, int64_t bytes) {
    return ceil_div(bytes, 1 << 17) * (1 << 17) + ceil_div(b->m.d.C * (int64_t)sizeof(floatX), 256) * 256;
}

// Sizes a context's memory, apart and far; and where base is given, places what is the first one's.
static void slot_layout(Infer *b, char *base) {
    const Dims &d = b->m.d;
    int64_t at = 0, apart = b->apart;
    const bool placed = base != nullptr;
    auto place = [&](auto *&p, int64_t n) {
        using T = std::remove_reference_t<decltype(*p)>;
        if (base) p = (T *)(base + at);
        at += n * (int64_t)sizeof(T);
        const int64_t next = ceil_div(at + GUARD_BYTES, 256) * 256;
        for (int i = 0; placed && i < b->contexts; i++) guard_gap(base + i * apart + at, next - at);
        at = next;
    };
    row_vectors(b, place);
    const int R32 = b->G ? b->sources[0].R32 : 0, most = 2 * R32 > 2 * d.C ? 2 * R32 : 2 * d.C;
    place(b->input, most > d.A ? most : d.A);
    place(b->place, 1);
    place(b->token, 1);
    place(b->state, 1);
    place(b->logits, d.V);
    for (int l = 0; l < d.L; l++) {
        place(b->m.layers[l].tmix_shift, d.C);
        place(b->m.layers[l].cmix_shift, d.C);
    }
    if (b->G) {
        place(b->sums.out, (int64_t)b->window_splits * d.C);
        place(b->sums.top, b->window_splits * d.H);
        place(b->sums.sum, b->window_splits * d.H);
    }
    if (base) base += b->contexts * b->apart;
    else b->apart = slot_apart(b, at);
    at = 0, apart = b->far;
    for (int l = 0; l < d.L; l++)
        if (b->m.layers[l].wkv_state) place(b->m.layers[l].wkv_state, (int64_t)d.H * N * N);
    if (b->G) {
        place(b->ids, b->capacity);
        if (b->c) place(b->c, b->capacity * d.R);
        if (b->c8) place(b->c8, b->capacity * d.R);
        if (b->scales) place(b->scales, b->capacity);
    }
    for (int i = 0; i < b->G; i++) {
        GoldSource &g = b->sources[i];
        place(g.k.ring, b->window * d.C);
        place(g.v.ring, b->window * d.C);
        g.ids = b->ids, g.c = b->c, g.c8 = b->c8, g.scales = b->scales;
    }
    if (!base) b->far = slot_apart(b, at);
}

static void batch_rest(Infer *b, int slot) { // nobody's context from now on
    Place *place = b->place;
    const Place nowhere = {0, 0, true};
    move_each(slot * b->apart, place);
    b->slots[slot] = {};
    set_place_kernel<<<1, 1, 0, stream>>>(place, nowhere);
}

// A batch of f's model without memory yet: so many contexts, of so many tokens each, `window` of them with keys and
// values at hand
static Infer *batch_describe(const Infer *f, int contexts, int64_t capacity, int64_t window) {
    Infer *b = (Infer *)malloc(sizeof(Infer));
    const size_t layers = f->m.d.L * sizeof(Layer), sources = f->G * sizeof(GoldSource);
    *b = *f;
    b->contexts = contexts, b->capacity = capacity, b->window = window < capacity ? window : capacity;
    for (Recording &r : b->recordings) r = {};
    b->m.layers = (Layer *)memcpy(malloc(layers), f->m.layers, layers);
    if (f->G) b->sources = (GoldSource *)memcpy(malloc(sources), f->sources, sources);
    // contexts are as good as shares of one
    const int64_t splits = ceil_div(256, (int64_t)contexts * f->m.d.H);
    b->window_splits = splits < f->window_splits ? (int)splits : f->window_splits;
    b->slots = (Slot *)calloc(contexts, sizeof(Slot));
    b->memory = nullptr, b->device_sources = nullptr;
    slot_layout(b, nullptr);
    return b;
}

static Infer *batch_create(const Infer *f, int contexts, int64_t capacity, int64_t window) {
    Infer *b = batch_describe(f, contexts, capacity, window);
    device_alloc((void **)&b->memory, contexts * (b->apart + b->far));
    slot_layout(b, b->memory);
    if (f->G) {
        device_alloc((void **)&b->device_sources, f->G * sizeof(GoldSource));
        CUDA_CHECK(cudaMemcpy(b->device_sources, b->sources, f->G * sizeof(GoldSource), cudaMemcpyHostToDevice));
    }
    for (int i = 0; i < contexts; i++) batch_rest(b, i);
    return b;
}

static void batch_free(Infer *b) {
    CUDA_CHECK(cudaStreamSynchronize(stream));
    for (Recording &r : b->recordings) recording_free(&r);
    CUDA_CHECK(cudaFree(b->memory));
    CUDA_CHECK(cudaFree(b->device_sources));
    if (b->G) free(b->sources);
    free(b->m.layers);
    free(b->slots);
    free(b);
}

// As many tokens and as long windows as there is memory for
static Infer *batch_open(const Infer *f, int contexts) {
    if (!f->decodes)
        die(2, "--batch: expected a model of x060c2 and gold time mixers and x060 channel mixers, found %s and %s",
            f->m.s.tmix, f->m.s.cmix);
    size_t available, total;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    Infer *empty = batch_describe(f, contexts, 0, 0);
    const int64_t room = ((int64_t)available - (256 << 20)) / contexts - empty->apart - empty->far; // for its tokens
    const int64_t ring = f->kv == KV_FULL ? 0 : 2 * f->G * f->m.d.C * (int64_t)sizeof(floatX);      // bytes a token
    batch_free(empty);
    int64_t window = f->window, capacity = f->capacity;
    while (window > 1 && window * ring > room / 2) window = ceil_div(window, 2);
    const int64_t per_token = cache_bytes_per_token(f),
                  fits = per_token ? (room - window * ring) / per_token : capacity;
    if (fits < capacity) capacity = fits;
    if (room < 0 || capacity < 1)
        die(2, "--batch %d: expected memory for so many contexts, found %.2f GiB free", contexts,
            available / 1073741824.0);
    return batch_create(f, contexts, capacity, f->kv == KV_FULL ? capacity : window);
}

// Row y of a grid is a layer's keys or values; a block copies a token's, from one ring into another.
__global__ void copy_ring_kernel(const GoldSource *to, const GoldSource *from, int64_t begin, int64_t to_window,
                                 int64_t from_window, int C, int64_t bytes) {
    const GoldSource &a = to[blockIdx.y / 2], &b = from[blockIdx.y / 2];
    floatX *ring = blockIdx.y % 2 ? a.v.ring : a.k.ring;
    const floatX *old = blockIdx.y % 2 ? b.v.ring : b.k.ring;
    const int64_t t = begin + blockIdx.x;
    const int c = threadIdx.x * 8;
    move_each(bytes, ring);
    if (c < C) store(ring + t % to_window * C + c, load(old + t % from_window * C + c));
}

// The context that f has read goes on in a slot.
static void batch_take(Infer *b, int slot, const Infer *f) {
    Carried *from = carried_room(f), *to = carried_room(f);
    const int n = infer_carried(f, from);
    b->position = f->position;
    infer_carried(b, to);
    for (int i = 0; i < n; i++) {
        const bool far = (char *)to[i].p >= b->memory + b->contexts * b->apart;
        CUDA_CHECK(cudaMemcpyAsync((char *)to[i].p + slot * (far ? b->far : b->apart), from[i].p,
                                   (size_t)(from[i].count * from[i].width), cudaMemcpyDeviceToDevice, stream));
    }
    free(from);
    free(to);
    int64_t begin = f->window_begin;
    if (begin < f->position - b->window) begin = f->position - b->window;
    const int count = (int)(f->position - begin);
    if (f->G && count > 0)
        copy_ring_kernel<<<dim3(count, 2 * f->G), row_threads(f->m.d.C), 0, stream>>>(b->device_sources,
                                                                                      f->device_sources, begin,
                                                                                      b->window, f->window, f->m.d.C,
                                                                                      slot * b->far);
    Place *place = b->place;
    const Place now = {f->position - 1, begin, false};
    move_each(slot * b->apart, place);
    set_place_kernel<<<1, 1, 0, stream>>>(place, now);
    b->slots[slot] = {true, f->position, begin};
}

// A step of all contexts: `queue` is queue_step and perhaps more. recordings: of a step whose contexts all fit their
// windows, and of one with longer ones
template <typename F> static void batch_step(Infer *b, Recording (&recordings)[2], const F &queue) {
    b->window_begin = 0;
    for (int i = 0; i < b->contexts; i++) {
        Slot *slot = &b->slots[i];
        if (!slot->used) continue;
        if (slot->position == b->capacity && b->G)
            die(2, "the context has %ld tokens, the most that it can", b->capacity);
        slot->position++;
        if (slot->window_begin < slot->position - b->window) slot->window_begin = slot->position - b->window;
        if (slot->window_begin > 0) b->window_begin = 1; // for the host: there are tokens before a window
    }
    run_recorded(&recordings[b->window_begin > 0], queue);
}

// Records a step in both forms. Until a slot is taken, steps change nothing that counts.
template <typename F> static void batch_rehearse(Infer *b, Recording (&recordings)[2], const F &queue) {
    for (int i = 0; i < 2; i++) {
        b->window_begin = i;
        run_recorded(&recordings[i], queue);
    }
}

#ifdef GOLDFINCH_TEST
extern "C" {

// An engine with the weights of a model; chunk: tokens of a pre-fill chunk; window: most tokens whose keys and values
// are kept; machine: all older tokens are shared by 64 blocks of up to eight warps (0), by two blocks of one warp (1),
// or are one block's of four (2), so that a block has one tile to walk, or several.
Infer *gf_infer_create(Model *m, int kv, int64_t capacity, int chunk, int64_t window, int machine, int int8) {
    Infer *f = infer_create(&m->s, (KvKind)kv, capacity, chunk, window);
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        CUDA_CHECK(cudaMemcpy(f->m.master + t->offset, m->master + t->offset, t->size * sizeof(float),
                              cudaMemcpyDeviceToDevice));
    }
    model_params_changed(&f->m);
    if (int8) weights_to_int8(f);
#ifdef CUDA_ON_CPU
    const bool warpgroups = machine != 1;
#else
    const bool warpgroups = machine != 1 && has_warpgroups();
#endif
    static const int splits[3] = {64, 2, 1}, warps[3] = {8, 1, 4};
    infer_prepare(f, splits[machine], warps[machine], warpgroups);
    return f;
}

void gf_infer_free(Infer *f) {
    Carried *list = carried_room(f);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    for (Recording &r : f->recordings) recording_free(&r);
    const int n = infer_carried(f, list);
    for (int i = 0; i < n; i++) cudaFree(list[i].p);
    free(list);
    for (int i = 0; i < f->G; i++) {
        const GoldSource &g = f->sources[i];
        for (const floatX *p : {g.id_h, g.id_h_before}) cudaFree((void *)p);
        cudaFree((void *)g.rotated_tiles);
        for (const GoldSource::Side *side : {&g.k, &g.v}) {
            for (const floatX *p : {side->w1, side->w2, (const floatX *)side->ring}) cudaFree((void *)p);
            for (const TilePair *p : {side->tiles, side->gram}) cudaFree((void *)p);
        }
    }
    for (int l = 0; l < f->m.d.L; l++)
        for (const StepMatrix &p : {f->packed[l].mix_w1, f->packed[l].decay_w1, f->packed[l].value2_w1})
            cudaFree((void *)p.w), cudaFree((void *)p.scales);
    for (int i = 0; f->int8_matrices && i < f->m.n_tensors; i++) {
        const Int8Matrix &w = f->int8_matrices[i];
        for (void *p : {(void *)w.whole, (void *)w.scales, i == 0 ? (void *)w.room : nullptr}) cudaFree(p);
    }
    free(f->int8_matrices);
    const Row &row = f->row;
    for (floatX *p : {f->w_c, f->id_k0, f->id_xo, f->id_c, f->tail_x[0], f->tail_x[1]}) cudaFree(p);
    for (floatX *p : {row.ln, row.xs, row.ffn, row.kv1, row.u}) cudaFree(p);
    const PastSums &past = f->past_sums;
    for (TilePair *p : {f->c_gram, f->past_query.q, f->past_query.u}) cudaFree(p);
    for (float *p : {f->sums.out, f->sums.top, f->sums.sum, past.out, past.u, past.top, past.sum, past.mean})
        cudaFree(p);
    for (float *p : {f->past_query.sum, f->past_query.bias, f->id_squares, row.x, row.x_mid, row.hidden, row.r, row.k})
        cudaFree(p);
    for (float *p : {row.v, row.v2, row.y, row.q, row.gate, row.c, row.z, row.kv2}) cudaFree(p);
    for (float *p : {f->kept_sums.out, f->kept_sums.top, f->kept_sums.sum}) cudaFree(p);
    free(f->kept);
    for (void *p : {(void *)f->place, (void *)f->token, (void *)f->device_sources}) cudaFree(p);
    free(f->sources);
    free(f->packed);
    model_free(&f->m);
    free(f);
}

void gf_infer_reset(Infer *f) { infer_reset(f); }

// Feeds n tokens. logits: (V) of the last token; or if all, n at most the chunk, (n, V) of every token.
void gf_infer_feed(Infer *f, const int *ids, int64_t n, int all, float *logits) {
    const int64_t V = f->m.d.V;
    float *to = f->logits;
    if (all) {
        infer_chunk(f, ids, (int)n, true);
        model_final_norm(&f->m);
        device_alloc((void **)&to, n * V * sizeof(float));
        infer_head(f, to, 1, (int)n);
    } else {
        infer_feed(f, ids, n);
    }
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaMemcpy(logits, to, (all ? n : 1) * V * sizeof(float), cudaMemcpyDeviceToHost));
    if (all) cudaFree(to);
}

// w (rows, columns) in 8 bits; y (4, rows): its product with x as a step makes it, by its kernel, as pre-fill makes it,
// by the kernel with few slots and three blocks
void gf_int8(int rows, int columns, const float *w, const float *x, int few_slots, signed char *whole, float *scales,
             float *y) {
    machine_start();
    floatX *device_w, *device_x, *host = (floatX *)malloc(((size_t)rows * columns + columns) * sizeof(floatX));
    float *device_y;
    alloc_floats(&device_w, (int64_t)rows * columns + columns);
    device_alloc((void **)&device_y, 4 * rows * sizeof(float));
    device_x = device_w + (int64_t)rows * columns;
    for (int64_t i = 0; i < (int64_t)rows * columns; i++) host[i] = (floatX)w[i];
    for (int i = 0; i < columns; i++) host[(int64_t)rows * columns + i] = (floatX)x[i];
    CUDA_CHECK(cudaMemcpy(device_w, host, ((size_t)rows * columns + columns) * sizeof(floatX), cudaMemcpyHostToDevice));
    Int8Matrix in_int8 = to_int8(device_w, rows, columns);
    Product<floatX> job = {};
    job.x = device_x, job.w = {in_int8.whole, in_int8.scales}, job.rows = rows, job.K = columns;
    job.out = device_y;
    matvec_int8(job, columns);
    job.out = device_y + rows;
    matvec_int8_launch(job, columns);
    job.out = device_y + 3 * rows;
    matvec_int8_launch(job, columns, few_slots, 3);
    alloc_floats(&in_int8.room, 5 * columns); // five rows at a time
    in_int8.room_size = 5 * columns;
    linear_forward(device_y + 2 * rows, device_x, {nullptr, nullptr, rows, columns, columns, &in_int8}, 1);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaMemcpy(whole, in_int8.whole, (size_t)rows * columns, cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(scales, in_int8.scales, rows * sizeof(float), cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(y, device_y, 4 * rows * sizeof(float), cudaMemcpyDeviceToHost));
    for (void *p :
         {(void *)device_w, (void *)device_y, (void *)in_int8.whole, (void *)in_int8.scales, (void *)in_int8.room})
        cudaFree(p);
    free(host);
}

// Contexts at once of a model that f reads for them
Infer *gf_batch_create(Infer *f, int contexts, int64_t capacity, int64_t window) {
    Infer *b = batch_create(f, contexts, capacity, window);
    batch_rehearse(b, b->recordings, [=] { queue_step(b, b->token); });
    return b;
}

void gf_batch_take(Infer *b, int slot, Infer *f) { batch_take(b, slot, f); }
void gf_batch_rest(Infer *b, int slot) { batch_rest(b, slot); }
void gf_batch_free(Infer *b) { batch_free(b); }

// ids (contexts), logits (contexts, V): a token more of each
void gf_batch_step(Infer *b, const int *ids, float *logits) {
    const int V = b->m.d.V;
    for (int i = 0; i < b->contexts; i++)
        CUDA_CHECK(cudaMemcpy((char *)b->token + i * b->apart, ids + i, sizeof(int), cudaMemcpyHostToDevice));
    batch_step(b, b->recordings, [=] { queue_step(b, b->token); });
    CUDA_CHECK(cudaStreamSynchronize(stream));
    for (int i = 0; i < b->contexts; i++)
        CUDA_CHECK(cudaMemcpy(logits + (int64_t)i * V, (char *)b->logits + i * b->apart, V * sizeof(float),
                              cudaMemcpyDeviceToHost));
}

double gf_infer_score(Infer *f, const int *ids, int64_t n, int64_t window, int chunk) { // mean loss
    const Score score = infer_score(f, ids, n, window, chunk);
    return score.loss / (double)score.targets;
}
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 5. Tokenizer (spec section 9): text to ids and back. Byte-level models need no vocabulary: an id is a byte + 1.
// Others
//    take RWKV World's, a text file of lines `ID LITERAL LENGTH`, LITERAL a Python string or bytes literal.

// A trie's node: which bytes may follow, the node of the first of these (the others come after it, in order), and the
// id of the token that ends here (0: none does).
typedef struct TrieNode {
    uint64_t follow[4];
    int first, id;
} TrieNode;

typedef struct Tokenizer {
    LONG_PATH path; // of the vocabulary; empty for bytes
    int n_ids;      // ids 0 .. n_ids - 1 have a text
    uint8_t *texts; // back to back
    int *starts;    // (n_ids + 1): where in texts an id's begins
    TrieNode *trie; // null for bytes
} Tokenizer;

static const char *end_of_text = "<|endoftext|>"; // id 0
static const char *default_vocabulary = "data/rwkv_vocab_v20230424.txt";

static int text_length(const Tokenizer *t, int id) { return t->starts[id + 1] - t->starts[id]; }

// ---------------------------------------- Python literals

typedef struct Literal { // where the parser stands
    const char *path;
    int64_t line;
    const char *at, *end; // end: of the line
} Literal;

[[noreturn]] static void literal_fail(const Literal *l, const char *expected) {
    const int left = (int)(l->end - l->at < 24 ? l->end - l->at : 24);
    die(2, "%s: line %ld: expected %s, found \"%.*s\"", l->path, l->line, expected, left, l->at);
}

static uint32_t literal_digits(Literal *l, int least, int most, int base) {
    uint32_t value = 0;
    int n = 0;
    for (; n < most && l->at < l->end; n++, l->at++) {
        const int c = tolower((unsigned char)*l->at), digit = isdigit(c)             ? c - '0'
                                                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                                                                     : 99;
        if (digit >= base) break;
        value = value * (uint32_t)base + (uint32_t)digit;
    }
    if (n < least) literal_fail(l, base == 16 ? "the hexadecimal digits of an escape" : "digits");
    return value;
}

// What follows a backslash, in a string (a code point, as UTF-8) or in bytes (one byte). Returns its length.
static int literal_escape(Literal *l, bool bytes, uint8_t *out) {
    if (l->at == l->end) literal_fail(l, "an escape");
    const char *single = "\\\\''\"\"a\ab\bf\fn\nr\rt\tv\v", c = *l->at;
    for (const char *s = single; *s; s += 2) {
        if (*s == c) {
            out[0] = (uint8_t)s[1];
            l->at++;
            return 1;
        }
    }
    uint32_t code;
    if (c >= '0' && c <= '7') {
        code = literal_digits(l, 1, 3, 8);
    } else if (c == 'x') {
        l->at++;
        code = literal_digits(l, 2, 2, 16);
    } else if (c == 'u' && !bytes) {
        l->at++;
        code = literal_digits(l, 4, 4, 16);
    } else if (c == 'U' && !bytes) {
        l->at++;
        code = literal_digits(l, 8, 8, 16);
    } else if (c == 'N' && !bytes) {
        literal_fail(l, "no escape by a character's name");
    } else {
        out[0] = '\\';
        return 1;
    } // Python leaves unknown escapes as they stand
    if (bytes) {
        out[0] = (uint8_t)code;
        return 1;
    }
    if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) literal_fail(l, "a code point that UTF-8 can hold");
    return utf8_encode(code, out);
}

// The literal at l->at; out has room for the line. Returns the number of its bytes.
static int literal_parse(Literal *l, uint8_t *out) {
    const bool bytes = l->at < l->end && (*l->at == 'b' || *l->at == 'B');
    if (bytes) l->at++;
    const char quote = l->at < l->end ? *l->at : '\0';
    if (quote != '\'' && quote != '"') literal_fail(l, "a Python string or bytes literal");
    int n = 0;
    for (l->at++; l->at < l->end && *l->at != quote;) {
        if (*l->at == '\\') {
            l->at++;
            n += literal_escape(l, bytes, out + n);
            continue;
        }
        if (bytes && (uint8_t)*l->at >= 0x80) literal_fail(l, "only ASCII in a bytes literal");
        out[n++] = (uint8_t)*l->at++;
    }
    if (l->at == l->end) literal_fail(l, quote == '"' ? "a closing \"" : "a closing '");
    l->at++;
    return n;
}

// ---------------------------------------- the vocabulary

static int64_t literal_number(Literal *l, const char *what) {
    char *end;
    // stops at the newline at the latest: the file ends with one
    const int64_t value = strtol(l->at, &end, 10);
    if (!isdigit((unsigned char)*l->at) || end > l->end) literal_fail(l, what);
    l->at = end;
    return value;
}

static void literal_space(Literal *l) {
    if (l->at == l->end || *l->at != ' ') literal_fail(l, "a space");
    l->at++;
}

// Lines hold the ids 1, 2, 3, .. in order.
static void vocabulary_read(Tokenizer *t, const char *path) {
    int64_t size;
    char field[64];
    const char *file = (const char *)map_file(path, &size), *end = file + size;
    if (end[-1] != '\n') die(2, "%s: expected a newline at the end, found byte 0x%02x", path, (uint8_t)end[-1]);
    if (size > INT_MAX / 2) die(2, "%s: size: expected less than 1 GB, found %ld bytes", path, size);
    int n_lines = 0, at = 0;
    for (const char *c = file; c < end; c++) n_lines += *c == '\n';
    t->texts = (uint8_t *)malloc((size_t)size + sizeof(PATH)); // a literal is at least as long as its bytes
    t->starts = (int *)calloc((size_t)n_lines + 2, sizeof(int));
    at += sprintf((char *)t->texts, "%s", end_of_text);
    t->n_ids = 1;
    Literal l = {path, 0, file, nullptr};
    for (const char *next = file; next < end; next = l.end + 1) {
        l.at = next;
        l.end = (const char *)memchr(next, '\n', (size_t)(end - next));
        l.line++;
        t->starts[t->n_ids] = at;
        snprintf(field, sizeof(field), "line %ld: id", l.line);
        expect(path, field, -1, t->n_ids, t->n_ids, literal_number(&l, "an id"));
        literal_space(&l);
        const int length = literal_parse(&l, t->texts + at);
        if (length == 0) die(2, "%s: line %ld: expected a text, found an empty one", path, l.line);
        literal_space(&l);
        snprintf(field, sizeof(field), "line %ld: length", l.line);
        expect(path, field, -1, length, length, literal_number(&l, "a length"));
        if (l.at < l.end && *l.at == '\r') l.at++;
        if (l.at != l.end) literal_fail(&l, "the line's end");
        at += length;
        t->n_ids++;
    }
    t->starts[t->n_ids] = at;
    munmap((void *)file, (size_t)size);
}

static int compare_texts(const void *a, const void *b, void *tokenizer) {
    const Tokenizer *t = (const Tokenizer *)tokenizer;
    const int x = *(const int *)a, y = *(const int *)b, nx = text_length(t, x), ny = text_length(t, y);
    const int order = memcmp(t->texts + t->starts[x], t->texts + t->starts[y], (size_t)(nx < ny ? nx : ny));
    return order ? order : nx != ny ? nx - ny : x - y;
}

// In sorted order the tokens that begin alike lie side by side: a node is a range of them. Level by level, each range
// falls into one range per byte that comes next.
static void trie_build(Tokenizer *t) {
    typedef struct Range {
        int low, high, depth;
    } Range;
    const int n = t->n_ids - 1;
    int *order = (int *)malloc((size_t)n * sizeof(int)), n_nodes = 1;
    for (int i = 0; i < n; i++) order[i] = i + 1;
    qsort_r(order, (size_t)n, sizeof(int), compare_texts, t);
    for (int i = 1; i < n; i++) {
        const int x = order[i - 1], y = order[i], length = text_length(t, x);
        if (length != text_length(t, y) || memcmp(t->texts + t->starts[x], t->texts + t->starts[y], (size_t)length))
            continue;
        die(2, "%s: line %d: expected a text of its own, found that of line %d", t->path, y, x);
    }
    const size_t most = (size_t)t->starts[t->n_ids] + 1; // one node per byte, and the root
    t->trie = (TrieNode *)calloc(most, sizeof(TrieNode));
    Range *ranges = (Range *)malloc(most * sizeof(Range));
    ranges[0] = {0, n, 0};
    for (int node = 0; node < n_nodes; node++) {
        Range r = ranges[node];
        if (text_length(t, order[r.low]) == r.depth) t->trie[node].id = order[r.low++];
        t->trie[node].first = n_nodes;
        for (int i = r.low; i < r.high; i++) {
            const uint8_t byte = t->texts[t->starts[order[i]] + r.depth];
            uint64_t *word = &t->trie[node].follow[byte / 64];
            if (*word >> byte % 64 & 1) {
                ranges[n_nodes - 1].high++;
                continue;
            }
            *word |= 1ull << byte % 64;
            ranges[n_nodes++] = {i, i + 1, r.depth + 1};
        }
    }
    free(order);
    free(ranges);
}

int trie_child(const TrieNode *node, uint8_t byte) { // 0 (the root) if there is none
    const uint64_t word = node->follow[byte / 64], below = word & ((1ull << byte % 64) - 1);
    if (!(word >> byte % 64 & 1)) return 0;
    int child = node->first + __builtin_popcountll(below);
    for (int i = 0; i < byte / 64; i++) child += __builtin_popcountll(node->follow[i]);
    return child;
}

// path null: bytes.
static void tokenizer_open(Tokenizer *t, const char *path) {
    memset(t, 0, sizeof(*t));
    if (!path) {
        t->n_ids = 257;
        t->texts = (uint8_t *)malloc(256);
        t->starts = (int *)calloc(258, sizeof(int)); // the text of id 0 is empty
        for (int i = 0; i < 256; i++) {
            t->texts[i] = (uint8_t)i;
            t->starts[i + 2] = i + 1;
        }
        return;
    }
    snprintf(t->path, sizeof(t->path), "%s", path);
    vocabulary_read(t, path);
    trie_build(t);
    for (int byte = 0; byte < 256; byte++) {
        const int child = trie_child(&t->trie[0], (uint8_t)byte);
        if (!child || !t->trie[child].id) die(2, "%s: expected a token for byte 0x%02x, found none", path, byte);
    }
}

static void tokenizer_close(Tokenizer *t) {
    free(t->texts);
    free(t->starts);
    free(t->trie);
}

// ---------------------------------------- text to ids

// Longest matches from the left; every byte is a token, so there always is one. ids has room for n; returns their
// number.
static int64_t encode_stretch(const Tokenizer *t, const uint8_t *text, int64_t n, int *ids) {
    int64_t count = 0;
    for (int64_t at = 0, next = 0; at < n; at = next) {
        const TrieNode *node = t->trie;
        for (int64_t i = at; i < n;) {
            const int child = trie_child(node, text[i++]);
            if (!child) break;
            node = &t->trie[child];
            if (node->id) {
                ids[count] = node->id;
                next = i;
            }
        }
        count++;
    }
    return count;
}

static int64_t encode(const Tokenizer *t, const uint8_t *text, int64_t n, int *ids) {
    int64_t count = 0;
    if (!t->trie) {
        for (int64_t i = 0; i < n; i++) ids[i] = text[i] + 1;
        return n;
    }
    for (const uint8_t *at = text, *end = text + n; at < end;) {
        const uint8_t *mark = (const uint8_t *)memmem(at, (size_t)(end - at), end_of_text, strlen(end_of_text));
        count += encode_stretch(t, at, (mark ? mark : end) - at, ids + count);
        if (mark) ids[count++] = 0;
        at = mark ? mark + strlen(end_of_text) : end;
    }
    return count;
}

#ifdef GOLDFINCH_TEST
// The interface of test_goldfinch.c to the tokenizer; vocab null: bytes
static const Tokenizer *tokenizer_for_test(const char *vocab) {
    static Tokenizer t;
    if (t.n_ids && strcmp(t.path, vocab ? vocab : "") == 0) return &t;
    tokenizer_close(&t);
    tokenizer_open(&t, vocab);
    return &t;
}

extern "C" {

int64_t gf_tokenize(const char *vocab, const unsigned char *text, int64_t n, int *ids) {
    return encode(tokenizer_for_test(vocab), text, n, ids);
}

int64_t gf_detokenize(const char *vocab, const int *ids, int64_t n, unsigned char *text, int64_t max) {
    const Tokenizer *t = tokenizer_for_test(vocab);
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        const int length = text_length(t, ids[i]);
        if (at + length <= max) memcpy(text + at, t->texts + t->starts[ids[i]], (size_t)length);
        at += length;
    }
    return at;
}

int64_t gf_printable(const unsigned char *bytes, int64_t n, unsigned char *text) { // text has room for 3 n
    Utf8 u = {};
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) at += utf8_push(&u, bytes[i], text + at);
    return at + utf8_end(&u, text + at);
}
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 6. Sampler (spec section 10), on the device: only the id that was drawn comes to the host. In this order: bans and
// penalties, softmax, top_p, top_k, then temperature (after the filters, as in the authors' code), the draw.
//
// No sorting. Logits become whole numbers with the same order (keys), probabilities whole numbers too (masses, in units
// of 2^-39 of the likeliest token's): sums of these are the same in any order, so that results are the same bits in
// every run. A token stays if what is likelier than it is lighter than top_p of all and fewer than top_k tokens; ids
// break ties for top_k. So the filters are one number, the smallest key that stays (the cut), and it is found digit by
// digit: per step, every block of threads weighs and counts its tokens by their key's next 8 bits, and the next step
// walks down from the largest until too much is above. Seven small launches, three where no cut is to be found (greedy,
// or no filter).

// most blocks; tokens of one, if that suffices
static const int SAMPLE_THREADS = 256, SAMPLE_BLOCKS = 256, SAMPLE_TILE = 1024;
static const int SAMPLE_BINS = SAMPLE_THREADS, SAMPLE_STEPS = 4; // 4 digits of 8 bits
// of masses: sums over a block's tokens, at most 2^16, fit 32 bits
static const int SAMPLE_DIGITS = 3, SAMPLE_BITS = 14;

typedef struct Sampling { // how to sample
    double temperature, top_p, presence, frequency, decay;
    int64_t top_k; // 0: no limit
    uint64_t seed;
} Sampling;

typedef unsigned long long Mass;

// of tokens with one digit
struct SampleBin {
    Mass mass, count;
};

struct SampleCut { // the cut's digits so far
    // the cut is base or above it by less than the digits left
    unsigned base;
    float top;                // the largest logit
    Mass mass, count, target; // of the tokens above that; the mass that ends top_p
};

enum { TOKEN_BANNED = 1, TOKEN_UNCOUNTED = 2 };

struct Sampler {
    int V, blocks, tokens_of_block;
    float presence, frequency, decay, inverse_temperature;
    double top_p;
    Mass top_k;
    uint64_t seed;
    float *logits;        // (V): with penalties, -infinity where banned
    float *counts;        // (V): how often a token was drawn, decayed; NaN (bits 0xff..) if never
    uint8_t *kinds;       // (V): TOKEN_..
    float *tops;          // (blocks)
    bool searches;        // there is a cut to be found
    SampleBin *bins;      // (SAMPLE_STEPS, SAMPLE_BINS)
    SampleCut *cuts;      // (SAMPLE_STEPS)
    Mass *weights, *sums; // (V), (blocks): what is drawn from
    SampleState *state;
    int *drawn; // on the host, where the device can write
    // of several contexts: each one's sampler, on the device; what it draws from
    const Sampler *each;
    const float *source;
};

// Kernels for one context have its sampler as an argument. For several, blockIdx.z is a context.
template <bool several> __device__ inline Sampler sampler_here(const Sampler &s) {
    if constexpr (several) return s.each[blockIdx.z];
    else return s;
}

__device__ inline unsigned sample_key(float z) {    // orders as z does
    const unsigned bits = __float_as_uint(z + 0.f); // -0 becomes +0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline Mass sample_mass(float below_top) { // e^below_top, at most 1
    const float e = expf(below_top);
    return e > 0 ? (Mass)(e * 549755813888.f) : 0; // 2^39; NaN: 0
}

// logits with penalties and bans, and the largest of each block's. Before that, the last drawn token is counted.
template <bool several> __global__ void sample_adjust_kernel(Sampler sampler, const float *logits) {
    __shared__ float tops[SAMPLE_THREADS / 32];
    const Sampler s = sampler_here<several>(sampler);
    if (several) logits = s.source;
    let_next_start();
    wait_for_previous();
    const int begin = blockIdx.x * s.tokens_of_block, end = min(begin + s.tokens_of_block, s.V), drawn = s.state->drawn;
    float top = -INFINITY;
    for (int i = begin + threadIdx.x; i < end; i += SAMPLE_THREADS) {
        const int kind = s.kinds[i];
        float count = s.counts[i] * s.decay, z = logits[i];
        if (i == drawn) count = (count >= 0 ? count : 0) + (kind & TOKEN_UNCOUNTED ? 0 : 1);
        s.counts[i] = count;
        if (count >= 0) z -= s.presence + count * s.frequency;
        // NaN: infinity, with which nothing is drawn
        z = kind & TOKEN_BANNED ? -INFINITY : z < INFINITY ? z : INFINITY;
        s.logits[i] = z;
        top = fmaxf(top, z);
    }
    for (int i = blockIdx.x * SAMPLE_THREADS + threadIdx.x; s.searches && i < SAMPLE_STEPS * SAMPLE_BINS;
         i += gridDim.x * SAMPLE_THREADS)
        s.bins[i] = {0, 0};
    top = warp_max(top);
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < SAMPLE_THREADS / 32; i++) top = fmaxf(top, tops[i]);
    s.tops[blockIdx.x] = top;
}

// Sum of what this thread and those before it have; sums (SAMPLE_THREADS) keeps every thread's
__device__ inline Mass sample_sum_up(Mass own, Mass *sums) {
    sums[threadIdx.x] = own;
    __syncthreads();
    for (int apart = 1; apart < SAMPLE_THREADS; apart *= 2) {
        const Mass more = (int)threadIdx.x >= apart ? sums[threadIdx.x - apart] : 0;
        __syncthreads();
        sums[threadIdx.x] += more;
        __syncthreads();
    }
    return sums[threadIdx.x];
}

// The cut with its first digits, `step` of them; the same in every block
__device__ inline SampleCut sample_cut(const Sampler &s, int step) {
    __shared__ Mass masses[SAMPLE_THREADS];
    __shared__ Mass counts[SAMPLE_THREADS];
    __shared__ float tops[SAMPLE_THREADS / 32];
    __shared__ SampleCut chosen;
    SampleCut cut = {0, -INFINITY, 0, 0, ~0ull};
    if (step == 0) {
        for (int b = threadIdx.x; b < s.blocks; b += SAMPLE_THREADS) cut.top = fmaxf(cut.top, s.tops[b]);
        cut.top = warp_max(cut.top);
        if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = cut.top;
        __syncthreads();
        for (int i = 0; i < SAMPLE_THREADS / 32; i++) cut.top = fmaxf(cut.top, tops[i]);
        if (!s.searches && s.top_k == 1) cut.base = sample_key(cut.top);
        if (blockIdx.x == 0 && threadIdx.x == 0) s.cuts[0] = cut;
        return cut;
    }
    const unsigned digit = SAMPLE_BINS - 1 - threadIdx.x; // from the likeliest down
    const SampleBin own = s.bins[(step - 1) * SAMPLE_BINS + digit];
    cut = s.cuts[step - 1];
    const Mass mass = cut.mass + sample_sum_up(own.mass, masses), count = cut.count + sample_sum_up(own.count, counts);
    if (step == 1 && s.top_p < 1) { // all tokens have one of these first digits
        cut.target = (Mass)ceil(s.top_p * (double)masses[SAMPLE_THREADS - 1]);
        cut.target = cut.target > 1 ? cut.target : 1; // the likeliest token always stays
    }
    const bool here = mass >= cut.target || count >= s.top_k || digit == 0;
    const bool before = mass - own.mass >= cut.target || count - own.count >= s.top_k;
    if (here && (threadIdx.x == 0 || !before)) {
        cut.mass = mass - own.mass;
        cut.count = count - own.count;
        cut.base += digit << (32 - 8 * step);
        chosen = cut;
        if (blockIdx.x == 0 && step < SAMPLE_STEPS) s.cuts[step] = cut;
    }
    __syncthreads();
    return chosen;
}

// Weighs and counts the block's tokens that may be the cut, by the next digit of their keys. Whole numbers: atomics in
// any order give the same sums. Masses have 40 bits, added up in three digits.
template <bool several> __global__ void sample_narrow_kernel(Sampler sampler, int step) {
    __shared__ unsigned masses[SAMPLE_DIGITS][SAMPLE_BINS];
    __shared__ unsigned counts[SAMPLE_BINS];
    const Sampler s = sampler_here<several>(sampler);
    const int t = threadIdx.x, begin = blockIdx.x * s.tokens_of_block, end = min(begin + s.tokens_of_block, s.V);
    let_next_start();
    counts[t] = 0;
    for (int i = 0; i < SAMPLE_DIGITS; i++) masses[i][t] = 0;
    wait_for_previous();
    if (several && !s.searches) return;
    const SampleCut cut = sample_cut(s, step); // and a barrier
    for (int i = begin + t; i < end; i += SAMPLE_THREADS) {
        const float z = s.logits[i];
        const unsigned digit = (sample_key(z) - cut.base) >> (24 - 8 * step); // huge for a key below base
        if (digit >= (unsigned)SAMPLE_BINS) continue;
        atomicAdd(&counts[digit], 1u);
        Mass mass = sample_mass(z - cut.top);
        for (int k = 0; k < SAMPLE_DIGITS && mass > 0; k++, mass >>= SAMPLE_BITS)
            atomicAdd(&masses[k][digit], (unsigned)mass & ((1u << SAMPLE_BITS) - 1));
    }
    __syncthreads();
    if (counts[t] == 0) return;
    SampleBin *bin = s.bins + step * SAMPLE_BINS + t;
    for (int k = 0; k < SAMPLE_DIGITS; k++) atomicAdd(&bin->mass, (Mass)masses[k][t] << SAMPLE_BITS * k);
    atomicAdd(&bin->count, (Mass)counts[t]);
}

// The part of the block's tokens that the thread has; in a row, so that order by thread is order by id.
__device__ inline int2 sample_part(const Sampler &s, int block) {
    const int begin = block * s.tokens_of_block, end = min(begin + s.tokens_of_block, s.V);
    const int each = (end - begin + SAMPLE_THREADS - 1) / SAMPLE_THREADS, first = begin + (int)threadIdx.x * each;
    return make_int2(min(first, end), min(first + each, end));
}

// weights = p^(1/temperature) of the tokens that stay, 0 for others
template <bool several> __global__ void sample_weigh_kernel(Sampler sampler) {
    __shared__ int ties_of_thread[SAMPLE_THREADS];
    __shared__ Mass sums[SAMPLE_THREADS];
    __shared__ float2 shared[32];
    const Sampler s = sampler_here<several>(sampler);
    let_next_start();
    wait_for_previous();
    const SampleCut cut = sample_cut(s, s.searches ? SAMPLE_STEPS : 0);
    const int t = threadIdx.x, begin = blockIdx.x * s.tokens_of_block;
    const int2 part = sample_part(s, blockIdx.x);
    // for tokens whose key is the cut: those of the lowest ids
    Mass room = s.top_k - cut.count;
    const bool greedy = s.top_k == 1;
    if (greedy || (s.searches && s.bins[(SAMPLE_STEPS - 1) * SAMPLE_BINS + cut.base % SAMPLE_BINS].count > room)) {
        // in blocks before (greedy: or as many blocks), in this one
        float2 ties = make_float2(0, 0);
        for (int b = t; greedy && b < (int)blockIdx.x; b += SAMPLE_THREADS) ties.x += sample_key(s.tops[b]) == cut.base;
        for (int i = t; !greedy && i < begin; i += SAMPLE_THREADS) ties.x += sample_key(s.logits[i]) == cut.base;
        for (int i = part.x; i < part.y; i++) ties.y += sample_key(s.logits[i]) == cut.base;
        ties_of_thread[t] = (int)ties.y;
        ties = block_sum(ties, shared);
        room -= min(room, (Mass)ties.x);
        for (int i = 0; i < t && (Mass)ties.y > room; i++) room -= min(room, (Mass)ties_of_thread[i]);
    }
    Mass sum = 0;
    for (int i = part.x; i < part.y; i++) {
        const float z = s.logits[i];
        const unsigned key = sample_key(z);
        const bool stays = key > cut.base || (key == cut.base && room > 0);
        if (key == cut.base && room > 0) room--;
        const Mass weight = stays ? sample_mass((z - cut.top) * s.inverse_temperature) : 0;
        s.weights[i] = weight;
        sum += weight;
    }
    sum = sample_sum_up(sum, sums);
    if (t == SAMPLE_THREADS - 1) s.sums[blockIdx.x] = sum;
}

// Walks up the weights in the order of the ids to a number drawn below their sum: first by blocks, then by threads'
// parts, then by tokens. One block a context. A random number depends on the seed and the position in the context
// alone.
template <bool several> __global__ void sample_draw_kernel(Sampler sampler) {
    __shared__ Mass sums[SAMPLE_THREADS];
    __shared__ Mass rest; // of the number, within the block that was hit
    __shared__ int block;
    const Sampler s = sampler_here<several>(sampler);
    const int t = threadIdx.x;
    SampleState *state = s.state;
    let_next_start();
    wait_for_previous();
    const int64_t position = state->position;
    const uint64_t bits = splitmix64(splitmix64(s.seed, 0) + (uint64_t)position, 0) >> 11;
    const double uniform = state->uniform >= 0 ? state->uniform : (double)bits / 9007199254740992.0; // 2^53
    Mass own = t < s.blocks ? s.sums[t] : 0, up_to_here = sample_sum_up(own, sums);
    const Mass total = sums[SAMPLE_THREADS - 1];
    if (t == 0) state->position = position + 1;
    if (total == 0) { // nothing to draw from
        if (t == 0) *s.drawn = state->drawn = -1;
        return;
    }
    const Mass number = min((Mass)(uniform * (double)total), total - 1);
    if (number < up_to_here && number >= up_to_here - own) {
        rest = number - (up_to_here - own);
        block = t;
    }
    __syncthreads();
    const int2 part = sample_part(s, block);
    own = 0;
    for (int i = part.x; i < part.y; i++) own += s.weights[i];
    up_to_here = sample_sum_up(own, sums);
    if (rest >= up_to_here || rest < up_to_here - own) return;
    Mass left = rest - (up_to_here - own);
    int id = part.x;
    while (left >= s.weights[id]) left -= s.weights[id++];
    *s.drawn = state->drawn = id;
}

// ---------------------------------------- the host's part

// " 12" and the like are never counted: repeating them is no fault.
static bool text_uncounted(const uint8_t *text, int n) {
    const char *plain = " \t0123456789";
    return n > 0 && memmem(plain, strlen(plain), text, (size_t)n) != nullptr;
}

static void sampler_set(Sampler *s, const Sampling *how) {
    s->presence = (float)how->presence;
    s->frequency = (float)how->frequency;
    s->decay = (float)how->decay;
    s->inverse_temperature = how->temperature > 0 ? (float)(1 / how->temperature) : 1;
    s->top_p = how->top_p;
    s->top_k = how->temperature == 0 ? 1 : how->top_k == 0 ? ~0ull : (Mass)how->top_k;
    s->searches = s->top_k > 1 && (s->top_p < 1 || s->top_k < (Mass)s->V);
    s->seed = how->seed;
}

void sampler_allocate(Sampler *s, int V, const Sampling *how, const uint8_t *kinds) { // kinds (V)
    memset(s, 0, sizeof(*s));
    s->V = V;
    int64_t tokens = ceil_div(V, SAMPLE_BLOCKS); // of a block; a machine of few multiprocessors gains nothing from more
    if (tokens < ceil_div(V, multiprocessors)) tokens = ceil_div(V, multiprocessors);
    if (tokens < SAMPLE_TILE) tokens = SAMPLE_TILE;
    if (tokens > 1 << 16) tokens = 1 << 16;
    s->blocks = (int)ceil_div(V, tokens);
    s->tokens_of_block = (int)ceil_div(V, s->blocks);
    sampler_set(s, how);
    device_alloc((void **)&s->logits, V * sizeof(float));
    device_alloc((void **)&s->counts, V * sizeof(float));
    device_alloc((void **)&s->kinds, V);
    device_alloc((void **)&s->tops, s->blocks * sizeof(float));
    device_alloc((void **)&s->bins, SAMPLE_STEPS * SAMPLE_BINS * sizeof(SampleBin));
    device_alloc((void **)&s->cuts, SAMPLE_STEPS * sizeof(SampleCut));
    device_alloc((void **)&s->weights, V * sizeof(Mass));
    device_alloc((void **)&s->sums, s->blocks * sizeof(Mass));
    device_alloc((void **)&s->state, sizeof(SampleState));
    CUDA_CHECK(cudaMallocHost((void **)&s->drawn, sizeof(int)));
    CUDA_CHECK(cudaMemcpy(s->kinds, kinds, (size_t)V, cudaMemcpyHostToDevice));
}

static void sampler_free(const Sampler *s) { // all but its state and the host's number
    for (void *p : {(void *)s->logits, (void *)s->counts, (void *)s->kinds, (void *)s->tops, (void *)s->bins,
                    (void *)s->cuts, (void *)s->weights, (void *)s->sums})
        CUDA_CHECK(cudaFree(p));
}

// (V), of each token: 0 stops, or is banned if ends_are_ignored; ids without a text are banned.
static uint8_t *token_kinds(int V, const Tokenizer *t, bool ends_are_ignored) {
    uint8_t *kinds = (uint8_t *)calloc((size_t)V, 1);
    for (int id = 0; id < V; id++) {
        if (id >= t->n_ids || (id == 0 && ends_are_ignored)) {
            kinds[id] = TOKEN_BANNED;
            continue;
        }
        if (text_uncounted(t->texts + t->starts[id], text_length(t, id))) kinds[id] = TOKEN_UNCOUNTED;
    }
    return kinds;
}

static void sampler_open(Sampler *s, int V, const Sampling *how, const Tokenizer *t, bool ends_are_ignored) {
    uint8_t *kinds = token_kinds(V, t, ends_are_ignored);
    sampler_allocate(s, V, how, kinds);
    free(kinds);
}

// Forgets what was drawn. position: of the next token in the context. uniform: the number to draw with, -1: from the
// seed.
static void sampler_begin(Sampler *s, int64_t position, double uniform) {
    const SampleState state = {position, uniform, -1};
    CUDA_CHECK(cudaMemsetAsync(s->counts, 0xff, s->V * sizeof(float), stream));
    CUDA_CHECK(cudaMemcpyAsync(s->state, &state, sizeof(state), cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
}

// Queues a draw from logits (V); its id comes to *s->drawn. The arguments are the same every time: fit for a CUDA
// graph.
template <bool several = false> static void sampler_queue(const Sampler *s, const float *logits, int contexts = 1) {
    const dim3 grid(s->blocks, 1, contexts);
    launch_early(sample_adjust_kernel<several>, grid, SAMPLE_THREADS, 0, *s, logits);
    for (int step = 0; s->searches && step < SAMPLE_STEPS; step++)
        launch_early(sample_narrow_kernel<several>, grid, SAMPLE_THREADS, 0, *s, step);
    launch_early(sample_weigh_kernel<several>, grid, SAMPLE_THREADS, 0, *s);
    launch_early(sample_draw_kernel<several>, dim3(1, 1, contexts), SAMPLE_THREADS, 0, *s);
}

// Queues a step and the next draw: the token drawn last goes in.
static void step_and_draw(Infer *f, const Sampler *s) {
    queue_step(f, &s->state->drawn);
    sampler_queue(s, infer_logits(f));
}

static int sampler_result(const Sampler *s) {
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaGetLastError());
    if (*s->drawn < 0) die(3, "the logits are not finite: there is nothing to draw from");
    return *s->drawn;
}

// ---- several contexts at once ----

// Of each of a batch's contexts, how it draws. The ids come to `drawn` (contexts), on the host.
typedef struct Samplers {
    Infer *batch;
    Sampler *each, *device_each; // (contexts)
    int *drawn;
    // [1]: of steps where a context has a cut to be found; see batch_step
    Recording recordings[2][2];
} Samplers;

// The slot's context draws in this way from now on.
static void samplers_set(Samplers *s, int slot, const Sampling *how) {
    sampler_set(&s->each[slot], how);
    CUDA_CHECK(cudaMemcpyAsync(s->device_each + slot, &s->each[slot], sizeof(Sampler), cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
}

// Queues a step of all contexts and their next draws.
static void batch_queue(const Samplers *s, bool searches) {
    Sampler all = s->each[0];
    all.each = s->device_each, all.searches = searches;
    queue_step(s->batch, &s->batch->state->drawn);
    sampler_queue<true>(&all, nullptr, s->batch->contexts);
}

// kinds (V): see token_kinds
static void samplers_open(Samplers *s, Infer *batch, const uint8_t *kinds) {
    const int n = batch->contexts;
    const Sampling greedy = {0, 1, 0, 0, 1, 0, 0};
    memset(s, 0, sizeof(*s));
    s->batch = batch;
    s->each = (Sampler *)calloc(n, sizeof(Sampler));
    device_alloc((void **)&s->device_each, n * sizeof(Sampler));
    CUDA_CHECK(cudaMallocHost((void **)&s->drawn, n * sizeof(int)));
    for (int i = 0; i < n; i++) {
        Sampler *own = &s->each[i];
        sampler_allocate(own, batch->m.d.V, &greedy, kinds);
        CUDA_CHECK(cudaFree(own->state));
        CUDA_CHECK(cudaFreeHost(own->drawn));
        SampleState *state = batch->state;
        const float *logits = batch->logits;
        move_each(i * batch->apart, state, logits);
        own->state = state, own->source = logits, own->drawn = s->drawn + i;
        samplers_set(s, i, &greedy);
    }
    for (int searches = 0; searches < 2; searches++)
        batch_rehearse(batch, s->recordings[searches], [=] { batch_queue(s, searches); });
}

static void samplers_close(Samplers *s) {
    for (auto &row : s->recordings)
        for (Recording &r : row) recording_free(&r);
    for (int i = 0; i < s->batch->contexts; i++) sampler_free(&s->each[i]);
    CUDA_CHECK(cudaFree(s->device_each));
    CUDA_CHECK(cudaFreeHost(s->drawn));
    free(s->each);
}

// A context that has just come to a slot draws its first token, as `how` says.
static void samplers_begin(Samplers *s, int slot, const Sampling *how) {
    samplers_set(s, slot, how);
    sampler_begin(&s->each[slot], s->batch->slots[slot].position, -1);
    sampler_queue(&s->each[slot], s->each[slot].source);
}

// The tokens drawn last go in, and each context draws the next one.
static void samplers_step(Samplers *s) {
    bool searches = false;
    for (int i = 0; i < s->batch->contexts; i++)
        searches = searches || (s->batch->slots[i].used && s->each[i].searches);
    batch_step(s->batch, s->recordings[searches], [=] { batch_queue(s, searches); });
}

#ifdef GOLDFINCH_TEST
// The interface of test_goldfinch.c to the sampler
extern "C" {

// history: ids drawn before, oldest first. probabilities (V): of the next token, drawn with the number uniform.
void gf_sample_probabilities(const float *logits, int V, const int *history, int n_history, const int *uncounted,
                             int n_uncounted, const int *banned, int n_banned, double temperature, double top_p,
                             int top_k, double presence, double frequency, double decay, float *probabilities,
                             double uniform, int *drawn) {
    const Sampling how = {temperature, top_p, presence, frequency, decay, top_k, 0};
    Sampler s;
    uint8_t *kinds = (uint8_t *)calloc((size_t)V, 1);
    float *device_logits;
    double total = 0;
    machine_start();
    for (int i = 0; i < n_uncounted; i++) kinds[uncounted[i]] |= TOKEN_UNCOUNTED;
    for (int i = 0; i < n_banned; i++) kinds[banned[i]] |= TOKEN_BANNED;
    sampler_allocate(&s, V, &how, kinds);
    device_alloc((void **)&device_logits, V * sizeof(float));
    CUDA_CHECK(cudaMemcpy(device_logits, logits, V * sizeof(float), cudaMemcpyHostToDevice));
    sampler_begin(&s, 0, uniform);
    for (int i = 0; i < n_history; i++) { // as if each of these had been drawn
        CUDA_CHECK(cudaMemcpy(&s.state->drawn, &history[i], sizeof(int), cudaMemcpyHostToDevice));
        if (i + 1 < n_history) sample_adjust_kernel<false><<<s.blocks, SAMPLE_THREADS, 0, stream>>>(s, device_logits);
        CUDA_CHECK(cudaStreamSynchronize(stream));
    }
    sampler_queue(&s, device_logits);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    *drawn = *s.drawn;
    Mass *weights = (Mass *)malloc((size_t)V * sizeof(Mass));
    CUDA_CHECK(cudaMemcpy(weights, s.weights, V * sizeof(Mass), cudaMemcpyDeviceToHost));
    for (int i = 0; i < V; i++) total += (double)weights[i];
    for (int i = 0; i < V; i++) probabilities[i] = (float)((double)weights[i] / total);
    sampler_free(&s);
    for (void *p : {(void *)s.state, (void *)device_logits}) cudaFree(p);
    cudaFreeHost(s.drawn);
    free(kinds);
    free(weights);
}
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 7. Command line: flags, prompt, continuation, score

typedef const char *TEXT;
typedef bool SWITCH;

// As SETTINGS in section 1 of the trainer. The values of sampling are those of the reference's demo.
#define OPTIONS(X) \
    X("-p", TEXT, prompt, nullptr, 0, 0, "TEXT", "the prompt") \
    X("-f", TEXT, prompt_file, nullptr, 0, 0, "FILE", "the prompt from a file, - for stdin") \
    X("-i", SWITCH, interactive, nullptr, 0, 0, "", "then read lines from stdin; each goes on in the same context") \
    X("-n", INT, n, "256", 0, 1e12, "N", "tokens to go on for, at most") \
    X("-t", REAL, temperature, "1", 0, 100, "X", "temperature (0: always the likeliest token)") \
    X("--top-p", REAL, top_p, "0.7", 0, 1, "X", "draw among the likeliest tokens that make up so much probability") \
    X("--top-k", INT, top_k, "100", 0, 1e9, "N", "and among so many at most (0: no limit)") \
    X("--presence", REAL, presence, "0.25", -100, 100, "X", "taken off the logit of a token that was drawn before") \
    X("--frequency", REAL, frequency, "0.25", -100, 100, "X", "and once more for each time") \
    X("--penalty-decay", REAL, decay, "0.996", 0, 1, "X", "what is left of such a count after a token") \
    X("-s", INT, seed, "1", 0, 1e18, "N", "seed: the same one draws the same tokens") \
    X("--ignore-eos", SWITCH, ignore_eos, nullptr, 0, 0, "", "never draw token 0 (otherwise it ends the text)") \
    X("--score", TEXT, score, nullptr, 0, 0, "FILE", \
      "loss, perplexity and accuracy of a text, in place of a continuation") \
    X("--window", INT, window, "0", 0, 1e12, "N", \
      "score: start afresh every N tokens, as the trainer's validation (0: one context)") \
    X("--requests", TEXT, requests, nullptr, 0, 0, "FILE", \
      "answer JSON objects, one a line (- for stdin): scores and continuations (README.md)") \
    X("--batch", INT, batch, "1", 1, MOST_CONTEXTS, "N", "requests: go on with up to N contexts at once") \
    X("--prefix-ids", TEXT, prefix_ids, "0", 0, 0, "IDS", "requests: what an empty context stands for: 0 or 0,11") \
    X("--save-state", TEXT, save_state, nullptr, 0, 0, "FILE", "write the state after the prompt") \
    X("--load-state", TEXT, load_state, nullptr, 0, 0, "FILE", "go on from such a state") \
    X("--kv", TEXT, kv, "bf16", 0, 0, "KIND", "the cache: bf16, int8 (half of it), full (all keys and values)") \
    X("--kv-window", INT, kv_window, "0", 0, 1e12, "N", \
      "keys and values of the N newest tokens are kept at hand (0: what a 16th of memory holds, 4096 to 65536)") \
    X("--weights", TEXT, weights, "bf16", 0, 0, "KIND", \
      "bf16: as the build stores them; int8: large matrices in 8 bits, once they are loaded") \
    X("--vocab", TEXT, vocab, nullptr, 0, 0, "FILE", "RWKV World vocabulary; byte-level models need none") \
    X("--cache-table", SWITCH, cache_table, nullptr, 0, 0, "", \
      "print how large caches are: MODEL's, or those of the paper's models")

typedef struct Options {
#define FIELD(flag, kind, name, ...) kind name;
    OPTIONS(FIELD)
#undef FIELD
    const char *model;
} Options;

typedef struct Option {
    const char *flag, *kind, *initial;
    double low, high;
    const char *value, *help;
    size_t offset; // of the field in Options
} Option;

static const Option options_table[] = {
#define ROW(flag, kind, name, initial, low, high, value, help) \
    {flag, #kind, initial, low, high, value, help, offsetof(Options, name)},
    OPTIONS(ROW)
#undef ROW
};
static const int n_options = sizeof(options_table) / sizeof(options_table[0]);

static void options_help(void) {
    printf("usage: %s [MODEL.safetensors] [-p TEXT | -f FILE] [FLAG ...]\n\n"
           "Goes on with a text. Without a MODEL: the newest checkpoint in out/.\n\n",
           program_name);
    for (int i = 0; i < n_options; i++) {
        const Option *row = &options_table[i];
        printf("  %-15s %-5s %s", row->flag, row->value, row->help);
        printf(row->initial ? "; default %s\n" : "\n", row->initial);
    }
}

static void option_set(Options *o, const Option *row, const char *text) {
    char *field = (char *)o + row->offset, *end = nullptr;
    if (strcmp(row->kind, "TEXT") == 0) {
        memcpy(field, &text, sizeof(text));
        return;
    }
    const bool whole = strcmp(row->kind, "INT") == 0;
    errno = 0;
    const int64_t integer = whole ? strtoll(text, &end, 10) : 0;
    const double value = whole ? (double)integer : strtod(text, &end);
    if (end != text && !*end && !whole && (errno == ERANGE || value != 0) && fabs(value) < (double)FLT_MIN)
        die(2, "%s: expected 0 or a size of at least %g, as the sampler computes in fp32, found \"%s\"", row->flag,
            (double)FLT_MIN, text);
    if (end == text || *end || errno == ERANGE || !(value >= row->low && value <= row->high)) {
        die(2, "%s: expected a %snumber from %.10g to %.10g, found \"%s\"", row->flag, whole ? "whole " : "", row->low,
            row->high, text);
    }
    memcpy(field, whole ? (const void *)&integer : (const void *)&value, 8);
}

void options_parse(Options *o, int argc, char **argv) { // argv without the program's name
    memset(o, 0, sizeof(*o));
    for (int i = 0; i < n_options; i++)
        if (options_table[i].initial) option_set(o, &options_table[i], options_table[i].initial);
    for (int i = 0; i < argc; i++) {
        if (strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--help") == 0) {
            options_help();
            exit(0);
        }
        const Option *row = nullptr;
        for (int k = 0; k < n_options; k++)
            if (strcmp(argv[i], options_table[k].flag) == 0) row = &options_table[k];
        if (!row && argv[i][0] == '-') die(2, "unknown flag \"%s\" (-h lists them all)", argv[i]);
        if (!row && o->model) die(2, "expected one MODEL, found \"%s\" and \"%s\"", o->model, argv[i]);
        if (!row) {
            o->model = argv[i];
            continue;
        }
        if (strcmp(row->kind, "SWITCH") == 0) {
            *((bool *)o + row->offset) = true;
            continue;
        }
        if (++i == argc) die(2, "%s: a value is missing", row->flag);
        option_set(o, row, argv[i]);
    }
    const bool prompt = o->prompt || o->prompt_file;
    if (o->prompt && o->prompt_file) die(2, "-p and -f: expected one prompt, found two");
    if (o->prompt_file && strcmp(o->prompt_file, "-") == 0 && o->interactive) die(2, "-f - and -i: both read stdin");
    if (o->score && (prompt || o->interactive || o->save_state || o->load_state))
        die(2, "--score: expected no prompt and no state beside it");
    if (o->requests && (prompt || o->interactive || o->score || o->save_state || o->load_state || o->cache_table))
        die(2, "--requests: expected nothing else to do beside it");
    if (o->batch > 1 && !o->requests) die(2, "--batch: expected --requests beside it");
    if (o->window && !o->score) die(2, "--window: expected only with --score");
    if (o->save_state && !prompt && !o->load_state) die(2, "--save-state: expected a prompt to read before");
    if (!prompt && !o->interactive && !o->load_state && !o->score && !o->cache_table && !o->requests)
        die(2, "a prompt is missing: -p TEXT, -f FILE or -i (-h lists all flags)");
}

// ---------------------------------------- what is read

// MODEL, or the newest checkpoint in out/. A trainer at work replaces that one: if it is gone when it is to be opened,
// there is a newer one. Once open it stays.
static void open_model(SafeTensors *f, const char *model) {
    LONG_PATH newest;
    int fd = -1;
    if (model) {
        safetensors_open(f, model);
        return;
    }
    for (int tries = 0; fd < 0; tries++) {
        const int64_t step = checkpoint_newest("out");
        if (step < 0 && tries >= 10)
            die(2, "no MODEL is named and out/ holds no checkpoint; ./train_goldfinch makes one");
        if (tries > 0) usleep(1000);
        if (step < 0) continue;
        checkpoint_path(newest, "out", "model", step, "");
        fd = open(newest, O_RDONLY);
        if (fd < 0 && (errno != ENOENT || tries >= 1000)) die(2, "%s: %s", newest, strerror(errno));
    }
    safetensors_opened(f, fd, newest);
}

// The World vocabulary in the working directory or beside the program.
static const char *find_vocabulary(void) {
    static PATH path;
    if (access(default_vocabulary, R_OK) == 0) return default_vocabulary;
    if (beside_program(path, default_vocabulary)) return path;
    die(2, "%s: expected here or beside the program, found in neither place; --vocab FILE names it",
        default_vocabulary);
}

// A vocabulary of the model's size, which is a multiple of 8; World has 65530 ids.
static void model_tokenizer(Tokenizer *t, const SafeTensors *model, const char *vocab, int64_t *vocab_size) {
    const FileTensor *embedding = safetensors_find(model, "emb.weight");
    const char *type = safetensors_metadata(model, "train.data_type");
    if (!embedding || embedding->ndim != 2)
        die(2, "%s: tensor emb.weight: expected two dimensions, found no such tensor", model->path);
    *vocab_size = embedding->shape[0];
    const bool bytes = *vocab_size <= 320 || (type && strcmp(type, "utf-8") == 0);
    tokenizer_open(t, vocab ? vocab : bytes ? nullptr : find_vocabulary());
    const int64_t needed = *vocab_size < 65530 ? *vocab_size - 7 : 65530;
    expect(t->trie ? t->path : model->path, t->trie ? "ids" : "vocab_size, for bytes", -1, t->trie ? needed : 257,
           INT64_MAX, t->trie ? t->n_ids : *vocab_size);
}

// All of a file, a pipe, or stdin ("-").
static uint8_t *read_text(const char *path, int64_t *size) {
    FILE *file = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    if (!file) die(2, "%s: %s", path, strerror(errno));
    size_t room = 1 << 16, n = 0, got;
    uint8_t *text = (uint8_t *)malloc(room);
    while ((got = fread(text + n, 1, room - n, file)) > 0) {
        n += got;
        if (n == room) text = (uint8_t *)realloc(text, room *= 2);
    }
    if (ferror(file)) die(2, "%s: %s", path, strerror(errno));
    if (file != stdin) fclose(file);
    *size = (int64_t)n;
    return text;
}

// Tokens that the model has; ids has room for n.
static int64_t encode_for_model(const Tokenizer *t, const char *name, const uint8_t *text, int64_t n,
                                int64_t vocab_size, int *ids) {
    const int64_t count = encode(t, text, n, ids);
    for (int64_t i = 0; i < count; i++) expect(name, "token", i, 0, vocab_size - 1, ids[i]);
    return count;
}

// ---------------------------------------- what is written

// last: byte that was written
typedef struct Printer {
    Utf8 utf8;
    uint8_t last;
} Printer;

// To stdout at once. Whoever reads it may have had enough: no error.
static void output_bytes(Printer *out, const uint8_t *bytes, int n) {
    for (int done = 0; done < n;) {
        const ssize_t wrote = write(STDOUT_FILENO, bytes + done, (size_t)(n - done));
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote < 0 && errno == EPIPE) exit(0);
        if (wrote < 0) die(1, "stdout: %s", strerror(errno));
        done += (int)wrote;
    }
    if (n > 0) out->last = bytes[n - 1];
}

static void output_token(Printer *out, const Tokenizer *t, int id) {
    static uint8_t text[1 << 16];
    const uint8_t *bytes = t->texts + t->starts[id];
    int n = 0;
    for (int i = 0; i < text_length(t, id); i++) {
        n += utf8_push(&out->utf8, bytes[i], text + n);
        if (n > (int)sizeof(text) - 6) {
            output_bytes(out, text, n);
            n = 0;
        }
    }
    output_bytes(out, text, n);
}

void output_end(Printer *out) { // of a continuation: what is held, and a newline
    uint8_t text[4];
    int n = utf8_end(&out->utf8, text);
    if (n > 0 || (out->last && out->last != '\n')) text[n++] = '\n';
    output_bytes(out, text, n);
    out->last = '\0';
}

static const char *bytes_text(char *text, double bytes) { // "1.23 GB"; text has room for 32
    const char *units[] = {"B", "KB", "MB", "GB", "TB", "PB"};
    int unit = 0;
    for (; unit < 5 && bytes >= 999.5; unit++) bytes /= 1000;
    snprintf(text, 32, "%.*f %s", unit == 0 || bytes >= 99.95 ? 0 : bytes >= 9.995 ? 1 : 2, bytes, units[unit]);
    return text;
}

// ---------------------------------------- a session

typedef struct Session {
    const Options *o;
    Infer *m;
    Tokenizer tokenizer;
    Sampler sampler;
    Printer out;
    int64_t vocab_size, prompt_tokens, decoded; // decoded: tokens drawn but for the first ones
    double prompt_seconds, decode_seconds;
    int pending;             // drawn, but not fed yet; -1: none
    Recording recordings[2]; // of a step and the next draw
} Session;

// Reads a prompt, n > 0; false after a signal. What is printed then begins with a character that the prompt ends in.
static bool session_read(Session *s, const int *ids, int64_t n) {
    const double begin = seconds_now();
    const int64_t read = infer_feed(s->m, ids, n);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    s->prompt_seconds += seconds_now() - begin;
    s->prompt_tokens += read;
    if (read < n) fprintf(stderr, "stopped by a signal: %ld of the prompt's %ld tokens were read\n", read, n);
    s->out.utf8 = {};
    for (int64_t i = n > 4 ? n - 4 : 0; i < n; i++) {
        const Tokenizer *t = &s->tokenizer;
        uint8_t whole[6];
        for (int k = t->starts[ids[i]]; k < t->starts[ids[i] + 1]; k++) utf8_push(&s->out.utf8, t->texts[k], whole);
    }
    s->out.utf8.given = s->out.utf8.n;
    return read == n;
}

// Draws and prints up to o->n tokens, each fed before the next is drawn.
static void session_write(Session *s) {
    double begin = 0;
    sampler_begin(&s->sampler, infer_position(s->m), -1);
    for (int64_t i = 0; i < s->o->n && !stop_requested; i++) {
        if (s->pending >= 0 && s->m->decodes) { // it is the one that was drawn last: the device has it
            infer_step(
                s->m, s->recordings, [=] { step_and_draw(s->m, &s->sampler); });
        } else {
            if (s->pending >= 0) infer_feed(s->m, &s->pending, 1);
            sampler_queue(&s->sampler, infer_logits(s->m));
        }
        s->pending = -1;
        const int id = sampler_result(&s->sampler);
        const double now = seconds_now();
        if (i > 0) {
            s->decode_seconds += now - begin;
            s->decoded++;
        } // the first comes with the prompt
        begin = now;
        if (id == 0) break;
        output_token(&s->out, &s->tokenizer, id);
        s->pending = id;
    }
    output_end(&s->out);
}

// Each line goes on where the text ended, on a line of its own.
static void session_interact(Session *s) {
    char *line = nullptr;
    size_t room = 0;
    ssize_t n;
    bool first = true, said = false;
    while (!stop_requested) {
        if (isatty(STDIN_FILENO)) fprintf(stderr, "> ");
        if ((n = getline(&line, &room, stdin)) <= 0) break;
        if (line[n - 1] == '\n') n--;
        const bool mark = first && n >= 3 && memcmp(line, "\xEF\xBB\xBF", 3) == 0;
        const bool crlf = n > 0 && line[n - 1] == '\r';
        if (mark) memmove(line, line + 3, (size_t)(n - 3)), n -= 3;
        if (crlf) n--;
        if ((mark || crlf) && !said)
            fprintf(stderr, "%s: stdin: left out: %s\n", program_name,
                    mark && crlf ? "a byte order mark, and carriage returns at the lines' ends"
                    : mark       ? "a byte order mark"
                                 : "carriage returns at the lines' ends");
        said = said || mark || crlf;
        first = false;
        if (n == 0) continue;
        int *ids = (int *)malloc((size_t)(n + 2) * sizeof(int));
        int64_t count = 0;
        if (s->pending >= 0) ids[count++] = s->pending;
        s->pending = -1;
        if (infer_position(s->m) + count > 0) {
            const uint8_t newline = '\n';
            count += encode_for_model(&s->tokenizer, "stdin", &newline, 1, s->vocab_size, ids + count);
        }
        count += encode_for_model(&s->tokenizer, "stdin", (const uint8_t *)line, n, s->vocab_size, ids + count);
        const bool read = session_read(s, ids, count);
        free(ids);
        if (read) session_write(s);
    }
    free(line);
}

void session_close(Session *s) { // the closing line
    int64_t cache;
    double per_token, transformer;
    char now[32], other[32];
    infer_cache_bytes(s->m, &cache, &per_token, &transformer);
    fprintf(stderr, "prompt %ld tokens, ", s->prompt_tokens);
    if (s->prompt_seconds > 0) fprintf(stderr, "%.0f tok/s | ", (double)s->prompt_tokens / s->prompt_seconds);
    if (s->decoded > 0) fprintf(stderr, "decode %.1f tok/s | ", (double)s->decoded / s->decode_seconds);
    fprintf(stderr, "context %ld tokens | cache %s, %.0f bytes per token (a transformer: %s, %.0f)\n",
            infer_position(s->m), bytes_text(now, (double)cache), per_token,
            bytes_text(other, transformer * (double)infer_position(s->m)), transformer);
}

// Loss of a text under the model, all layers at every position.
static void session_score(Session *s, const int *ids, int64_t n, int64_t n_bytes) {
    const Score score = infer_score(s->m, ids, n, s->o->window, 0);
    const double seconds = seconds_now() - score.begin, mean = score.loss / (double)score.targets;
    if (stop_requested) fprintf(stderr, "stopped by a signal: %ld of %ld predictions\n", score.targets, score.all);
    if (score.targets == 0) return;
    printf("%s: %ld tokens, %ld bytes | loss %.6f per token, %.6f per byte | perplexity %.4f | accuracy %.2f %% | "
           "%.0f tok/s\n",
           s->o->score, n, n_bytes, mean, mean * (double)n / (double)n_bytes, exp(mean),
           100 * (double)score.correct / (double)score.targets, (double)score.targets / seconds);
}

// ---------------------------------------- the paper's comparison: what a context costs to remember

// A row: parameters, bytes per token, and all that is carried at 1 k .. 1 M tokens. Plans the model, allocates nothing.
static void cache_table_row(const char *label, const Settings *settings, KvKind kv) {
    Infer f = {};
    char text[32];
    f.kv = kv;
    model_plan(&f.m, settings, 1, 1);
    f.G = has_cache(&f.m) ? f.m.d.L - f.m.d.G0 : 0;
    printf("%-34s %8.3f G %9ld", label, (double)f.m.n_parameters * 1e-9, cache_bytes_per_token(&f));
    for (int64_t T = 1024; T <= 1 << 20; T *= 4) printf(" %9s", bytes_text(text, (double)carried_bytes(&f, T)));
    printf("\n");
    model_free_plan(&f.m);
}

static void cache_table_head(const char *title) {
    printf("%-34s %10s %9s", title, "parameters", "B/token");
    for (const char *tokens : {"1 k", "4 k", "16 k", "64 k", "256 k", "1 M"}) printf(" %9s", tokens);
    printf("\n");
}

void cache_table(void) { // the families of the paper at its sizes
    const struct {
        const char *config, *how;
        double compression;
        KvKind kv;
    } families[] = {
        {"llama", "", 16, KV_COMPRESSED},
        {"gptalpha", "", 16, KV_COMPRESSED},
        {"goldfinch_ablation_gptalpha", "", 16, KV_COMPRESSED},
        {"goldfinch", " --kv full", 16, KV_FULL},
        {"goldfinch", ", compression 1", 1, KV_COMPRESSED},
        {"goldfinch", "", 16, KV_COMPRESSED},
        {"goldfinch", " --kv int8", 16, KV_INT8},
        {"goldfinch_ablation_gold_invratio_2", "", 16, KV_COMPRESSED},
        {"goldfinch_ablation_gold_invratio_6", "", 16, KV_COMPRESSED},
        {"goldfinch_upgrade", "", 16, KV_COMPRESSED},
        {"finchc2", "", 16, KV_COMPRESSED},
        {"finch", "", 16, KV_COMPRESSED},
    };
    const int sizes[3][2] = {{12, 768}, {24, 2048}, {32, 4096}};
    for (const auto &size : sizes) {
        char label[64];
        snprintf(label, sizeof(label), "L%d D%d, %s", size[0], size[1], PRECISION_BF16 ? "bf16" : "fp32");
        cache_table_head(label);
        for (const auto &family : families) {
            Settings s;
            settings_default(&s);
            config_read(&s, family.config, true);
            s.n_layer = size[0], s.n_embd = size[1], s.kv_cache_compression_ratio = family.compression;
            settings_check(&s);
            snprintf(label, sizeof(label), "%s%s", family.config, family.how);
            cache_table_row(label, &s, family.kv);
        }
        printf("\n");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 8. Requests: one JSON object a line, one answer a line, for programs that evaluate a model or converse with it.
//
//     {"context": "The cat sat on the", "continuation": " mat"}    {"logprob": -1.25, "greedy": true, "tokens": 1}
//     {"text": "a whole text"}                                     {"logprob": -9.5, "tokens": 3}
//     {"context": "Once", "until": ["\n"], "max_tokens": 9}        {"text": " upon a time", "tokens": 4}
//
// In place of a text, its tokens: context_ids, continuation_ids, text_ids. A field "id" comes back in the answer. A
// line that asks for nothing sensible is answered with "error", and the next one is read. "temperature" (0, unless
// given), "top_p" (1), "top_k" (0) and "seed" are those of a continuation that is drawn; nothing is penalized.
//
// With --batch N, continuations of up to N lines are drawn at once: a line takes a free slot as soon as it is there,
// and answers wait for those of the lines before them. What is drawn for a line depends neither on the others nor on N,
// for N > 1; it may differ from --batch 1 where two tokens are as likely up to rounding.
//
// A token may lie across the end of the context. Then the context's own tokens are taken, and of the tokens of both
// texts together those after as many: what evaluation harnesses do.

enum RequestKind { REQUEST_SCORE, REQUEST_ROLLING, REQUEST_WRITE };

// A field that is a text or a list of ids.
typedef struct RequestText {
    const char *text; // null: none
    int *ids;         // null: none
    int64_t n;        // ids; bytes of the text
} RequestText;

typedef struct Request {
    RequestKind kind;
    const char *id_text; // the caller's: a text,
    char id_number[24];  // or a number; both empty: none
    RequestText context, continuation, text;
    const char **until;
    int64_t n_until, max_tokens;
    bool writes; // a field of a continuation to be drawn was there
    Sampling how;
    int64_t n_context, n; // tokens: of the context, which never is empty; of all
    // the answer: of what was scored; of what was drawn, its tokens and bytes
    double logprob;
    bool greedy;
    int64_t drawn, n_written, room; // drawn: -1 if there was nothing to draw from
    char *written;
    int64_t line, number; // its line; number of its answer
    char *text_of_line;   // where its texts lie, in a batch
} Request;

// A context that was read, with what is carried after it: it stays while requests have it in common.
typedef struct KeptContext {
    int64_t n, window_begin, window_end; // n: tokens; -1: none
    int *ids;
    Carried *copies; // in the order of infer_carried; of what grows with the context nothing
} KeptContext;

typedef struct Requests {
    const Options *o;
    Infer *m;
    Tokenizer tokenizer;
    Sampler sampler;
    KeptContext kept;
    Infer *batch; // null: one request after the other
    Samplers samplers;
    Request *running; // (contexts of the batch), by slot
    int n_running;
    // of a batch: answers that wait for those before them, the first of them number first_answer; null: not there yet
    char **answers;
    int64_t first_answer, n_answers, answers_room;
    JsonError error;
    Json json;
    char part[32];                                   // "line 12, "
    int64_t vocab_size, lines, line, errors, tokens; // line: number of the one at hand
    int *prefix;                                     // what an empty context stands for
    int64_t n_prefix;
    // Of a line's length: nothing has more tokens than bytes, but for the prefix.
    int64_t room;
    int *ids, *whole, *list;
    char *joined;
    const char **until;
    float *logits, *logprobs; // on the device: (SCORE_ROWS, V), (SCORE_ROWS)
    int *greedy, *targets;
} Requests;

static const int SCORE_ROWS = 128; // positions whose logits are at hand
static const int SCORE_STEPS = 4;  // tokens of a continuation that are better fed one by one

// ---------------------------------------- reading a line

[[noreturn]] __attribute__((format(printf, 2, 3))) static void request_fail(Requests *q, const char *format, ...) {
    JsonError *error = &q->error;
    const int n = snprintf(error->message, sizeof(error->message), "%s: line %ld: ", q->json.path, q->line);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->message + n, sizeof(error->message) - (size_t)n, format, arguments);
    va_end(arguments);
    longjmp(error->back, 1);
}

static double request_number(Requests *q, const char *field, double low, double high) {
    Json *j = &q->json;
    json_peek(j);
    char *end = j->at;
    const size_t length = strspn(j->at, "+-.0123456789eE");
    const double value = length ? strtod(j->at, &end) : 0;
    if (!length || end != j->at + length) json_fail(j, "a number");
    if (!(value >= low && value <= high))
        request_fail(q, "%s: expected a number from %.10g to %.10g, found %g", field, low, high, value);
    j->at = end;
    return value;
}

// `each` reads one item of a list, or of an object, with its name.
template <typename F> static void request_items(Json *j, const char *brackets, const F &each) {
    json_expect(j, brackets[0]);
    if (json_peek(j) == brackets[1]) {
        j->at++;
        return;
    }
    do each();
    while (json_more(j, brackets[1]));
}

static void request_text(Requests *q, RequestText *to, const char *field) {
    if (to->text || to->ids) request_fail(q, "%s: expected once, as a text or as ids, found twice", field);
    to->text = json_string(&q->json);
    to->n = (int64_t)strlen(to->text);
}

static void request_ids(Requests *q, RequestText *to, const char *field, int **room) {
    if (to->text || to->ids) request_fail(q, "%s: expected once, as a text or as ids, found twice", field);
    to->ids = *room;
    request_items(&q->json, "[]", [&] {
        const int64_t id = json_integer(&q->json);
        if (id >= q->vocab_size)
            request_fail(q, "%s: id %ld: expected 0 to %ld, found %ld", field, to->n, q->vocab_size - 1, id);
        to->ids[to->n++] = (int)id;
    });
    *room += to->n;
}

static void request_id(Requests *q, Request *r) { // it goes back as it came
    Json *j = &q->json;
    if (json_peek(j) == '"') {
        r->id_text = json_string(j);
        return;
    }
    const bool negative = *j->at == '-';
    j->at += negative;
    const int64_t number = json_integer(j);
    snprintf(r->id_number, sizeof(r->id_number), "%s%ld", negative ? "-" : "", number);
}

static void request_field(Requests *q, Request *r, const char *field, int **room) {
    auto is = [&](const char *name) { return strcmp(field, name) == 0; };
    Json *j = &q->json;
    if (is("id")) return request_id(q, r);
    if (is("context")) return request_text(q, &r->context, field);
    if (is("continuation")) return request_text(q, &r->continuation, field);
    if (is("text")) return request_text(q, &r->text, field);
    if (is("context_ids")) return request_ids(q, &r->context, field, room);
    if (is("continuation_ids")) return request_ids(q, &r->continuation, field, room);
    if (is("text_ids")) return request_ids(q, &r->text, field, room);
    r->writes = true;
    if (is("temperature")) r->how.temperature = request_number(q, field, 0, 100);
    else if (is("top_p")) r->how.top_p = request_number(q, field, 0, 1);
    else if (is("top_k")) r->how.top_k = (int64_t)request_number(q, field, 0, 1e9);
    else if (is("seed")) r->how.seed = (uint64_t)json_integer(j);
    else if (is("max_tokens")) r->max_tokens = json_integer(j);
    else if (is("until"))
        request_items(&q->json, "[]", [&] {
            r->until[r->n_until] = json_string(j);
            if (!*r->until[r->n_until++])
                request_fail(q, "until: expected texts that are not empty, found an empty one");
        });
    else request_fail(q, "expected a field of a request, found \"%.40s\"", field);
}

static int64_t request_encode(Requests *q, const char *text, int64_t n, int *ids) {
    const int64_t count = encode(&q->tokenizer, (const uint8_t *)text, n, ids);
    for (int64_t i = 0; i < count; i++)
        if (ids[i] >= q->vocab_size)
            request_fail(q, "token %ld: expected 0 to %ld, as the model has them, found %d", i, q->vocab_size - 1,
                         ids[i]);
    return count;
}

// The context's tokens, or the prefix, to q->ids, and after them those of the continuation or of the text.
static void request_tokens(Requests *q, Request *r) {
    const RequestText *context = &r->context, *rest = r->kind == REQUEST_ROLLING ? &r->text : &r->continuation;
    if (context->n == 0) {
        memcpy(q->ids, q->prefix, (size_t)q->n_prefix * sizeof(int));
        r->n_context = q->n_prefix;
    } else if (context->ids) {
        memcpy(q->ids, context->ids, (size_t)context->n * sizeof(int));
        r->n_context = context->n;
    } else {
        r->n_context = request_encode(q, context->text, context->n, q->ids);
    }
    const int *from = rest->ids;
    int64_t n = rest->n, before = 0;
    if (rest->text) {
        const bool joins = context->text && context->n > 0; // a token may lie across
        const int64_t at = joins ? context->n : 0;
        if (joins) memcpy(q->joined, context->text, (size_t)at);
        memcpy(q->joined + at, rest->text, (size_t)rest->n);
        n = request_encode(q, q->joined, at + rest->n, q->whole);
        before = joins ? r->n_context : 0;
        from = q->whole;
    }
    if (r->kind == REQUEST_SCORE && n <= before)
        request_fail(q, "continuation: expected tokens of its own after the context's, found none");
    r->n = r->n_context;
    for (int64_t i = before; i < n; i++) q->ids[r->n++] = from[i];
}

// All of a line, up to its end, or longjmp to q->error.back. Texts and ids lie in the line and in q.
static void request_read(Requests *q, Request *r, const char *end) {
    Json *j = &q->json;
    int *room = q->list;
    r->until = q->until;
    r->max_tokens = q->o->n;
    r->how = {0, 1, 0, 0, 1, 0, (uint64_t)q->o->seed};
    request_items(j, "{}", [&] {
        const char *field = json_string(j);
        json_expect(j, ':');
        request_field(q, r, field, &room);
    });
    if (json_peek(j)) json_fail(j, "the end of the line");
    if (j->at != end) request_fail(q, "expected the end of the line, found a zero byte");
    const bool context = r->context.text || r->context.ids, continuation = r->continuation.text || r->continuation.ids,
               text = r->text.text || r->text.ids;
    if (text + continuation + r->writes > 1 || (text && context) || !(text || continuation || context))
        request_fail(q, "expected one of: text; context and continuation; context, with until, max_tokens, ..");
    r->kind = text ? REQUEST_ROLLING : continuation ? REQUEST_SCORE : REQUEST_WRITE;
    request_tokens(q, r);
    const Infer *f = q->batch && r->kind == REQUEST_WRITE ? q->batch : q->m;
    const int64_t most = cache_bytes_per_token(f) > 0 ? f->capacity : INT64_MAX;
    const int64_t more = r->kind == REQUEST_WRITE ? r->max_tokens : 0;
    if (r->n > most || more > most - r->n)
        request_fail(q, "expected at most %ld tokens, found %ld and %ld more to come", most, r->n, more);
}

static void requests_make_room(Requests *q, int64_t bytes) { // for a line of so many
    if (q->room >= bytes) return;
    q->room = 2 * bytes;
    const size_t n = (size_t)(q->room + q->n_prefix);
    for (int **ids : {&q->ids, &q->whole, &q->list}) *ids = (int *)realloc(*ids, n * sizeof(int));
    q->joined = (char *)realloc(q->joined, n);
    q->until = (const char **)realloc(q->until, n * sizeof(char *));
}

// ---------------------------------------- the context

// Reads n tokens in a fresh context, or goes back to where the last such context ended, if it was the same; `more` are
// to come. The bits are those of a context that is read anew.
static void context_begin(Requests *q, const int *ids, int64_t n, int64_t more) {
    Infer *f = q->m;
    KeptContext *kept = &q->kept;
    Carried *now = carried_room(f);
    if (kept->n == n && memcmp(kept->ids, ids, (size_t)n * sizeof(int)) == 0) {
        f->position = n;
        f->window_begin = kept->window_begin, f->window_end = kept->window_end;
        const int count = infer_carried(f, now);
        for (int i = 0; i < count; i++)
            if (!now[i].grows)
                CUDA_CHECK(cudaMemcpyAsync(now[i].p, kept->copies[i].p, (size_t)(now[i].count * now[i].width),
                                           cudaMemcpyDeviceToDevice, stream));
        move_place(f, n - 1);
    } else {
        infer_reset(f);
        if (n > 0) infer_feed(f, ids, n);
        q->tokens += n;
        const int count = infer_carried(f, now);
        if (!kept->copies) {
            kept->copies = carried_room(f);
            for (int i = 0; i < count; i++)
                if (!now[i].grows) device_alloc(&kept->copies[i].p, (size_t)(now[i].count * now[i].width));
        }
        for (int i = 0; i < count; i++)
            if (!now[i].grows)
                CUDA_CHECK(cudaMemcpyAsync(kept->copies[i].p, now[i].p, (size_t)(now[i].count * now[i].width),
                                           cudaMemcpyDeviceToDevice, stream));
        kept->n = n, kept->window_begin = f->window_begin, kept->window_end = f->window_end;
        kept->ids = (int *)realloc(kept->ids, (size_t)(n + 1) * sizeof(int));
        memcpy(kept->ids, ids, (size_t)n * sizeof(int));
    }
    free(now);
    // What comes may overwrite the window's oldest keys and values. Those of a long context are made anew, each time
    // alike; a short one with much to come is read again.
    if (n > f->window / 2 && f->window < f->capacity) make_window(f);
    else if (n + more > f->window) kept->n = -1;
}

// ---------------------------------------- scoring

// A block a row of V logits: the logarithm of the target's probability, and whether no other token is likelier (of
// equals, the lowest id counts).
__global__ void __launch_bounds__(256)
    logprob_kernel(float *logprobs, int *greedy, const float *logits, const int *targets, int V) {
    __shared__ float tops[32];
    __shared__ float sums[32];
    const float *z = logits + (int64_t)blockIdx.x * V;
    float high = -INFINITY, sum = 0, first = -INFINITY;
    for (int i = threadIdx.x; i < V; i += 256) high = fmaxf(high, z[i]);
    const float top = block_max(high, tops);
    for (int i = threadIdx.x; i < V; i += 256) {
        sum += expf(z[i] - top);
        if (z[i] == top) first = fmaxf(first, -(float)i); // ids are exact in fp32 up to 2^24
    }
    sum = block_sum(sum, sums);
    first = block_max(first, tops);
    if (threadIdx.x > 0) return;
    const int target = targets[blockIdx.x];
    logprobs[blockIdx.x] = z[target] - top - logf(sum);
    greedy[blockIdx.x] = -first == (float)target;
}

// Adds what `count` rows of logits say of their targets (count, on the host).
static void score_rows(Requests *q, const float *logits, const int *targets, int count, double *logprob, bool *greedy) {
    float logprobs[SCORE_ROWS];
    int likeliest[SCORE_ROWS];
    CUDA_CHECK(cudaMemcpyAsync(q->targets, targets, count * sizeof(int), cudaMemcpyHostToDevice, stream));
    logprob_kernel<<<count, 256, 0, stream>>>(q->logprobs, q->greedy, logits, q->targets, q->m->m.d.V);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaMemcpy(logprobs, q->logprobs, count * sizeof(float), cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(likeliest, q->greedy, count * sizeof(int), cudaMemcpyDeviceToHost));
    for (int i = 0; i < count; i++) *logprob += logprobs[i], *greedy = *greedy && likeliest[i];
}

// ids (n): the sum of the logarithms of their probabilities from number n_context on, and whether each is the
// likeliest. The context's logits tell of the first. What follows goes through as a chunk or, a word's few tokens, step
// by step: at L24 D2048 a short chunk is bound by its 600 launches (6 ms), a step is one (1.2 ms).
static void score_ids(Requests *q, const int *ids, int64_t n_context, int64_t n, double *logprob, bool *greedy) {
    Infer *f = q->m;
    *logprob = 0, *greedy = true;
    if (n == n_context) return;
    context_begin(q, ids, n_context, n - n_context);
    score_rows(q, infer_logits(f), ids + n_context, 1, logprob, greedy);
    if (n - 1 - n_context <= SCORE_STEPS) {
        for (int64_t at = n_context; at < n - 1; at++) {
            infer_feed(f, ids + at, 1);
            score_rows(q, infer_logits(f), ids + at + 1, 1, logprob, greedy);
        }
    } else {
        for (int64_t at = n_context; at < n - 1; at += f->chunk) {
            const int here = (int)(n - 1 - at < f->chunk ? n - 1 - at : f->chunk);
            infer_chunk(f, ids + at, here, true);
            model_final_norm(&f->m);
            for (int row = 0; row < here; row += SCORE_ROWS) {
                const int count = here - row < SCORE_ROWS ? here - row : SCORE_ROWS;
                infer_head(f, q->logits, 1 + row, count);
                score_rows(q, q->logits, ids + at + row + 1, count, logprob, greedy);
            }
        }
    }
    q->tokens += n - n_context;
}

// ---------------------------------------- writing

// Where one of the texts to stop at begins, if it ends in the last `fresh` bytes; n: nowhere.
static int64_t find_stop(const Request *r, const uint8_t *text, int64_t n, int64_t fresh) {
    int64_t first = n;
    for (int64_t i = 0; i < r->n_until; i++) {
        const int64_t length = (int64_t)strlen(r->until[i]), back = fresh + length - 1, from = n > back ? n - back : 0;
        const uint8_t *found = (const uint8_t *)memmem(text + from, (size_t)(n - from), r->until[i], (size_t)length);
        if (found && found - text < first) first = found - text;
    }
    return first;
}

// A token that was drawn for r: its text is added, or what of it comes before a text to stop at. Returns whether r has
// all that it asked for.
static bool request_take(const Requests *q, Request *r, int id) {
    if (id < 0) r->drawn = -1;
    if (id <= 0) return true;
    const int length = text_length(&q->tokenizer, id);
    if (r->n_written + length > r->room)
        r->written = (char *)realloc(r->written, (size_t)(r->room = 2 * (r->n_written + length)));
    memcpy(r->written + r->n_written, q->tokenizer.texts + q->tokenizer.starts[id], (size_t)length);
    r->n_written += length;
    r->drawn++;
    const int64_t stop = find_stop(r, (const uint8_t *)r->written, r->n_written, length);
    if (stop == r->n_written) return r->drawn == r->max_tokens;
    r->n_written = stop;
    return true;
}

// Draws tokens until the text ends, stops or is long enough.
static void write_text(Requests *q, Request *r) {
    Infer *f = q->m;
    if (r->max_tokens == 0) return;
    context_begin(q, q->ids, r->n, r->max_tokens);
    sampler_set(&q->sampler, &r->how);
    sampler_begin(&q->sampler, infer_position(f), -1);
    for (;;) {
        sampler_queue(&q->sampler, infer_logits(f));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        const int id = *q->sampler.drawn;
        if (request_take(q, r, id)) return;
        infer_feed(f, &id, 1);
    }
}

// ---------------------------------------- answers

static void answer_text(FILE *out, const char *name, const char *text, int64_t n) { // "name": "text", in valid UTF-8
    Utf8 utf8 = {};
    uint8_t bytes[8];
    fprintf(out, "\"%s\": \"", name);
    for (int64_t i = 0; i <= n; i++) {
        const int count = i < n ? utf8_push(&utf8, (uint8_t)text[i], bytes) : utf8_end(&utf8, bytes);
        for (int k = 0; k < count; k++)
            if (bytes[k] < ' ') fprintf(out, "\\u%04x", bytes[k]);
            else fprintf(out, bytes[k] == '"' || bytes[k] == '\\' ? "\\%c" : "%c", bytes[k]);
    }
    fputc('"', out);
}

static void request_written(Requests *q, const Request *r) {
    if (r->drawn < 0) request_fail(q, "the logits are not finite: there is nothing to draw from");
    q->tokens += r->drawn;
}

// Does what a line asks for, or longjmp to q->error.back.
static void request_run(Requests *q, Request *r) {
    if (r->kind == REQUEST_WRITE) {
        write_text(q, r);
        request_written(q, r);
        return;
    }
    score_ids(q, q->ids, r->n_context, r->n, &r->logprob, &r->greedy);
    if (!isfinite(r->logprob)) request_fail(q, "the logits are not finite: there is no probability");
}

static void answer_print(const Request *r, FILE *out, const char *error) {
    fputc('{', out);
    if (r->id_text) answer_text(out, "id", r->id_text, (int64_t)strlen(r->id_text));
    else if (r->id_number[0]) fprintf(out, "\"id\": %s", r->id_number);
    fputs(r->id_text || r->id_number[0] ? ", " : "", out);
    if (error) {
        answer_text(out, "error", error, (int64_t)strlen(error));
    } else if (r->kind == REQUEST_WRITE) {
        answer_text(out, "text", r->written, r->n_written);
        fprintf(out, ", \"tokens\": %ld", r->drawn);
    } else {
        fprintf(out, "\"logprob\": %.10g", r->logprob);
        if (r->kind == REQUEST_SCORE) fprintf(out, ", \"greedy\": %s", r->greedy ? "true" : "false");
        fprintf(out, ", \"tokens\": %ld", r->n - r->n_context);
    }
    fputs("}\n", out);
}

// The answer of a request, which is over: printed, or, in a batch, when those before it are.
static void answer_write(Requests *q, Request *r, const char *error) {
    q->errors += error != nullptr;
    if (!q->batch) {
        answer_print(r, stdout, error);
    } else {
        size_t length;
        FILE *text = open_memstream(&q->answers[r->number - q->first_answer], &length);
        answer_print(r, text, error);
        fclose(text);
        int64_t n = 0;
        for (; n < q->n_answers && q->answers[n]; n++) {
            fputs(q->answers[n], stdout);
            free(q->answers[n]);
        }
        memmove(q->answers, q->answers + n, (size_t)(q->n_answers - n) * sizeof(char *));
        q->first_answer += n, q->n_answers -= n;
    }
    free(r->written);
    r->written = nullptr;
    if (fflush(stdout) != 0) die(1, "stdout: %s", strerror(errno)); // whoever asked may be waiting
}

// ---------------------------------------- a batch

// The answer of the request in a slot, whose place becomes free.
static void slot_end(Requests *q, int slot) {
    Request *r = &q->running[slot];
    batch_rest(q->batch, slot);
    q->n_running--;
    q->line = r->line;
    if (setjmp(q->error.back) == 0) {
        request_written(q, r);
        answer_write(q, r, nullptr);
    } else {
        answer_write(q, r, q->error.message);
    }
    free(r->until);
    free(r->text_of_line);
    memset(r, 0, sizeof(*r));
}

// r goes on in a slot, which there must be; its line is the slot's from now on.
static void slot_begin(Requests *q, const Request *r, char *line) {
    int slot = 0;
    while (q->batch->slots[slot].used) slot++;
    Request *own = &q->running[slot];
    context_begin(q, q->ids, r->n, 0);
    *own = *r;
    own->text_of_line = line;
    own->until = (const char **)malloc((size_t)(r->n_until + 1) * sizeof(char *));
    memcpy(own->until, r->until, (size_t)r->n_until * sizeof(char *));
    batch_take(q->batch, slot, q->m);
    q->n_running++;
    samplers_begin(&q->samplers, slot, &own->how);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    if (request_take(q, own, q->samplers.drawn[slot])) slot_end(q, slot);
}

// A token more for each
static void slots_step(Requests *q) {
    samplers_step(&q->samplers);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaGetLastError());
    for (int i = 0; i < q->batch->contexts; i++)
        if (q->batch->slots[i].used && request_take(q, &q->running[i], q->samplers.drawn[i])) slot_end(q, i);
}

// Whatever is wrong with a line comes back to setjmp: no more is lost than this answer. What is written after setjmp
// and read after an error lies in memory, not in a local variable. Returns whether a slot has taken the line over.
static bool answer_line(Requests *q, Request *r, char *line, int64_t length) {
    memset(r, 0, sizeof(*r));
    r->line = q->line = q->lines, r->number = q->first_answer + q->n_answers;
    if (q->batch && ++q->n_answers > q->answers_room) {
        q->answers_room = 2 * q->n_answers;
        q->answers = (char **)realloc(q->answers, (size_t)q->answers_room * sizeof(char *));
    }
    if (q->batch) q->answers[q->n_answers - 1] = nullptr;
    snprintf(q->part, sizeof(q->part), "line %ld, ", q->lines);
    q->json.at = q->json.start = line;
    if (setjmp(q->error.back) == 0) {
        request_read(q, r, line + length);
        if (q->batch && r->kind == REQUEST_WRITE && r->max_tokens > 0) {
            slot_begin(q, r, line);
            return true;
        }
        request_run(q, r);
        answer_write(q, r, nullptr);
    } else {
        answer_write(q, r, q->error.message);
    }
    return false;
}

// ---------------------------------------- a file of them

static void requests_prefix(Requests *q, const char *text) { // "0" or "0,11"
    q->prefix = (int *)malloc((strlen(text) + 1) * sizeof(int));
    for (const char *at = text;; at++) {
        char *end;
        const long id = strtol(at, &end, 10);
        if (end == at || (*end && *end != ',') || id < 0 || id >= q->vocab_size)
            die(2, "--prefix-ids: expected ids from 0 to %ld with commas between, found \"%s\"", q->vocab_size - 1,
                text);
        q->prefix[q->n_prefix++] = (int)id;
        at = end;
        if (!*at) return;
    }
}

static void requests_open(Requests *q, const Options *o, SafeTensors *model, KvKind kv, WeightsKind weights,
                          int64_t capacity) {
    const Sampling how = {0, 1, 0, 0, 1, 0, 0}; // each request has its own
    q->o = o;
    q->kept.n = -1;
    q->json.path = strcmp(o->requests, "-") == 0 ? "stdin" : o->requests;
    q->json.part = q->part;
    q->json.error = &q->error;
    model_tokenizer(&q->tokenizer, model, o->vocab, &q->vocab_size);
    requests_prefix(q, o->prefix_ids);
    q->m = infer_open(model, kv, capacity, o->kv_window, weights);
    safetensors_close(model);
    device_alloc((void **)&q->logits, SCORE_ROWS * q->vocab_size * sizeof(float));
    device_alloc((void **)&q->logprobs, SCORE_ROWS * sizeof(float));
    device_alloc((void **)&q->greedy, SCORE_ROWS * sizeof(int));
    device_alloc((void **)&q->targets, SCORE_ROWS * sizeof(int));
    sampler_open(&q->sampler, (int)q->vocab_size, &how, &q->tokenizer, false);
    if (o->batch == 1) return;
    uint8_t *kinds = token_kinds((int)q->vocab_size, &q->tokenizer, false);
    q->batch = batch_open(q->m, (int)o->batch);
    samplers_open(&q->samplers, q->batch, kinds);
    q->running = (Request *)calloc((size_t)o->batch, sizeof(Request));
    free(kinds);
}

// Lines of a file, as they come. While contexts go on nobody may wait for a line, and of a FILE's buffer getline cannot
// be asked whether the rest of one is there.
typedef struct Lines {
    int fd;
    char *text; // what was read, from begin to end; without a line's end up to `seen`
    int64_t begin, seen, end, room;
    bool ended;
} Lines;

// The next line, '\0' behind it, which is the caller's then, or null: there is none, or, unless `waits`, not yet.
static char *next_line(const Requests *q, Lines *l, bool waits, int64_t *length) {
    for (;;) {
        const char *newline = (const char *)memchr(l->text + l->seen, '\n', (size_t)(l->end - l->seen));
        l->seen = newline ? newline + 1 - l->text : l->end;
        if (newline || (l->ended && l->begin < l->end)) {
            *length = l->seen - l->begin;
            char *line = (char *)malloc((size_t)*length + 1);
            memcpy(line, l->text + l->begin, (size_t)*length);
            line[*length] = '\0';
            l->begin = l->seen;
            return line;
        }
        struct pollfd ready = {l->fd, POLLIN, 0};
        if (l->ended || (!waits && poll(&ready, 1, 0) < 1)) return nullptr;
        if (l->room - l->end < 1 << 16) {
            memmove(l->text, l->text + l->begin, (size_t)(l->end - l->begin));
            l->end -= l->begin, l->seen -= l->begin, l->begin = 0;
            l->room = 2 * l->end + (1 << 17);
            l->text = (char *)realloc(l->text, (size_t)l->room);
        }
        const ssize_t n = read(l->fd, l->text + l->end, (size_t)(l->room - l->end));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) die(2, "%s: %s", q->json.path, strerror(errno));
        l->ended = n == 0;
        l->end += n;
    }
}

static int64_t answer_lines(Requests *q, int fd) { // returns how many
    static Request request;
    const int slots = q->batch ? q->batch->contexts : 1;
    Lines lines = {};
    int64_t answers = 0;
    lines.fd = fd;
    lines.text = (char *)malloc(lines.room = 1 << 17);
    for (;;) {
        int64_t n;
        char *line;
        while (q->n_running < slots && (line = next_line(q, &lines, q->n_running == 0, &n))) {
            q->lines++;
            bool taken = false;
            if (strspn(line, " \t\r\n") < (size_t)n) {
                requests_make_room(q, n);
                taken = answer_line(q, &request, line, n);
                answers++;
            }
            if (!taken) free(line);
        }
        if (q->n_running == 0) break;
        slots_step(q);
    }
    free(lines.text);
    return answers;
}

static void answer_requests(const Options *o, SafeTensors *model, KvKind kv, WeightsKind weights) {
    static Requests requests; // zeros
    Requests *q = &requests;
    const int fd = strcmp(o->requests, "-") == 0 ? STDIN_FILENO : open(o->requests, O_RDONLY);
    if (fd < 0) die(2, "%s: %s", o->requests, strerror(errno));
    requests_open(q, o, model, kv, weights, 0); // as large a context as fits
    const double begin = seconds_now();
    const int64_t answers = answer_lines(q, fd);
    fprintf(stderr, "%ld requests, %ld of them in error | %ld tokens | %.1f s\n", answers, q->errors, q->tokens,
            seconds_now() - begin);
}

#if !defined(GOLDFINCH_TEST) && !defined(GOLDFINCH_INFER_NO_MAIN)
int main(int argc, char **argv) {
    program_begin("infer_goldfinch");
    static Session session; // zeros
    Session *s = &session;
    Options options, *o = &options;
    SafeTensors model;
    FileOut state_file;
    options_parse(o, argc - 1, argv + 1);
    s->o = o;
    s->pending = -1;
    const int kind = strcmp(o->kv, "bf16") == 0   ? KV_COMPRESSED
                     : strcmp(o->kv, "int8") == 0 ? KV_INT8
                     : strcmp(o->kv, "full") == 0 ? KV_FULL
                                                  : -1;
    if (kind < 0) die(2, "--kv: expected bf16, int8 or full, found \"%s\"", o->kv);
    if (kind == KV_FULL && o->kv_window) die(2, "--kv-window: expected no --kv full beside it, which keeps all");
    const WeightsKind weights = strcmp(o->weights, weights_names[WEIGHTS_INT8]) == 0 ? WEIGHTS_INT8 : WEIGHTS_FLOAT;
    if (strcmp(o->weights, weights_names[weights]) != 0)
        die(2, "--weights: expected bf16 or int8, found \"%s\"", o->weights);
    if (o->cache_table && !o->model) {
        cache_table();
        return 0;
    }
    open_model(&model, o->model);
    if (o->cache_table) {
        Settings settings;
        settings_of_model(&settings, &model);
        cache_table_head("model");
        cache_table_row("this one", &settings, (KvKind)kind);
        return 0;
    }
    machine_start();
    if (o->requests) {
        answer_requests(o, &model, (KvKind)kind, weights);
        return 0;
    }
    if (o->save_state) file_begin(&state_file, o->save_state); // now: a long prompt is not read for nothing
    model_tokenizer(&s->tokenizer, &model, o->vocab, &s->vocab_size);

    // The text first: its length says how much context is needed.
    const char *name = o->score ? o->score : o->prompt_file ? o->prompt_file : o->prompt ? "-p" : nullptr;
    int64_t n = 0, n_bytes = 0, before = 0;
    int *ids = nullptr;
    if (name) {
        const uint8_t *text = (const uint8_t *)o->prompt;
        if (text) n_bytes = (int64_t)strlen(o->prompt);
        else text = read_text(name, &n_bytes);
        if (n_bytes == 0) die(2, "%s: expected a %s, found an empty one", name, o->score ? "text" : "prompt");
        ids = (int *)malloc((size_t)n_bytes * sizeof(int));
        n = encode_for_model(&s->tokenizer, name, text, n_bytes, s->vocab_size, ids);
        if (!o->prompt) free((void *)text);
    }
    if (o->load_state) {
        SafeTensors state;
        safetensors_open(&state, o->load_state);
        before = safetensors_number(&state, "position");
        safetensors_close(&state);
    }
    const int64_t context = o->interactive ? 0
                            : o->score     ? (o->window && o->window < n ? o->window + 1 : n)
                                           : before + n + o->n;
    if (o->score) expect(name, "tokens", -1, 2, INT64_MAX, n);
    catch_signals(0); // what waits for a line is interrupted
    // the same loss, quicker
    const KvKind scored = kind == KV_COMPRESSED && !o->kv_window ? KV_IF_IT_FITS : (KvKind)kind;
    // 0: as much as the engine sees fit
    s->m = infer_open(&model, o->score ? scored : (KvKind)kind, context, o->kv_window, weights);
    if (o->score) {
        safetensors_close(&model);
        session_score(s, ids, n, n_bytes);
        free(ids);
        return stop_requested ? 130 : 0;
    }

    const Sampling how = {o->temperature, o->top_p, o->presence, o->frequency, o->decay, o->top_k, (uint64_t)o->seed};
    sampler_open(&s->sampler, (int)s->vocab_size, &how, &s->tokenizer, o->ignore_eos);
    if (s->m->decodes) infer_rehearse(s->m, s->recordings, [=] { step_and_draw(s->m, &s->sampler); });
    if (o->load_state) infer_load_state(s->m, o->load_state, &s->out.utf8);
    const bool read = n == 0 || session_read(s, ids, n);
    free(ids);
    if (o->save_state && read) infer_save_state(s->m, &state_file, &s->out.utf8);
    safetensors_close(&model);
    if (read && (n > 0 || !o->interactive)) session_write(s);
    if (read && o->interactive) session_interact(s);
    session_close(s);
    return read ? 0 : 130; // as a shell has it for Ctrl-C
}
#endif
