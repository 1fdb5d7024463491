// GoldFinch inference in plain CUDA C: a prompt is read in linear time, and a token of context costs 1 + C/R numbers.
//
//     make infer && ./infer_goldfinch MODEL.safetensors -p "text"
//
// Kernels, layers, settings and files are the trainer's; here is only what inference adds, in the order of use:
//
//     1. Cache       what is carried from token to token, and nothing else
//     2. Attention   of a GOLD layer over keys and values made on the fly from the cache
//     3. Engine      pre-fill, decode, scoring, saved states
//     4. Tokenizer   5. Sampler   6. Command line
//
// How a prompt goes through (spec section 10): all tokens through the layers before the GOLD layers, in chunks of fixed
// size, leaving states and, per token, its id and c = w_kv_cache_a x. The GOLD layers see only the last 2 G + 1 tokens
// (G of them): each looks back one token in its time mixer and one in its channel mixer, so that the last token's
// logits, and what is carried from there, are exact.

#define GOLDFINCH_NO_MAIN
#include "train_goldfinch.cu"

// ---------------------------------------------------------------------------------------------------------------------
// 1. Cache

enum KvKind { KV_COMPRESSED, KV_INT8, KV_FULL };            // c in floatX; c in 8 bits; the keys and values themselves

// What a GOLD layer needs of tokens to make its keys and values, or has of them already. A token's key and value depend
// on its id, its c, and those of the token before. Whatever depends on an id alone stands in tables over the vocabulary.
struct GoldSource {
    const int *ids;                         // (T)
    const floatX *c;                        // (T, R)                   KV_COMPRESSED
    const int8_t *c8;                       // (T, R) and (T): c = c8 * scale       KV_INT8
    const float *scales;
    const floatX *keys, *values;            // (T, C)                   KV_FULL
    const floatX *id_k0, *id_xo;            // (V, C): W_b[:, :C] x0 and xo = rms_norm(x0)
    const floatX *id_h, *id_h_before;       // (V, 64): the mixes' hidden layer, from the token's id and the one before
    const floatX *w_c;                      // (C, R16): W_b[:, C:], rows padded with zeros to R16, a multiple of 16
    struct Side {                           // of keys; of values
        const floatX *mu, *mix;             // (C): time_maa_k or _v; (C, 32): time_maa_kv_w2[0 or 1] transposed
        const floatX *w1, *w2;              // (rank16, C), (C, rank16): time_key_w1, _w2 or time_value_.. transposed
        const floatX *gain, *bias;          // (C): ln_k or ln_v
    } k, v;
    Rope rope;
    int C, H, R, R16, rank16;
};

struct ReadTask {
    const floatX *q;                        // (M, C)
    int64_t first, T;                       // query m sees tokens 0 .. first + m; tokens in the cache
    float *out, *top, *sum;                 // per split: (M, C), (M, H)
    int M, tiles_per_split;
};

struct KeptKv { floatX *keys, *values; };   // (capacity, A) of a gptalpha or llama layer, keys with their rope

typedef struct Infer {
    Model m;                                // the first member: a layer's forward function finds the rest through it
    KvKind kv;
    int chunk, tail, G;                     // tokens of a pre-fill chunk; 2 G + 1; number of GOLD layers
    int64_t capacity, position;             // most tokens of context; tokens so far
    int64_t row_position;                   // context position of the first row that the GOLD layers work on
    KeptKv *kept;                           // (n_layer); null in layers that keep none
    ReadTask kept_sums;                     // what the shares of a context leave behind, in these layers' attention
    uint64_t model_hash;
    GoldSource *sources;                    // (G)
    int *ids;                               // the cache: (capacity), ..
    floatX *c;
    int8_t *c8;
    float *scales;
    floatX *k0_last, *xo_last;              // (C), KV_FULL: of the last token
    floatX *tail_x[2];                      // (tail, C): residual stream before the GOLD layers of the last tokens; two, to shift
    int tail_rows, tail_now;
    floatX *w_c, *id_k0, *id_xo;            // shared by all GOLD layers
    int tile_rows, queries;                 // of an attention block: cached tokens at a time, plus one; queries at a time
    float *partial_out, *partial_top, *partial_sum;         // (splits, queries, C), (splits, queries, H)
    float *logits;                          // (V), fp32
    int shared_limit;                       // bytes of shared memory a block can have
} Infer;

static const int READ_SPLITS = 264;         // blocks that share a context: two for each of an H100's multiprocessors

__global__ void append_tokens(int *to, const int *ids, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = ids[i];
}

__global__ void append_floats(floatX *to, const floatX *from, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = from[i];
}

// A warp a token: c8 = round(c / scale), scale = largest |c| / 127.
__global__ void append_int8(int8_t *to, float *scales, const floatX *from, int R) {
    const floatX *c = from + (int64_t)blockIdx.x * R;
    float largest = 0;
    for (int i = threadIdx.x; i < R; i += 32) largest = fmaxf(largest, fabsf((float)c[i]));
    const float scale = warp_max(largest) / 127;
    for (int i = threadIdx.x; i < R; i += 32) to[(int64_t)blockIdx.x * R + i] = (int8_t)(scale > 0 ? rintf((float)c[i] / scale) : 0);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

// to (rows, columns) = from (its rows and columns fewer, the rest zero), or from transposed; from's rows are ld apart.
__global__ void pack_matrix(floatX *to, int rows, int columns, const floatX *from, int64_t ld, int from_rows, int from_columns, bool t) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (int64_t)rows * columns) return;
    const int row = (int)(i / columns), column = (int)(i % columns);
    if (row >= (t ? from_columns : from_rows) || column >= (t ? from_rows : from_columns)) to[i] = (floatX)0.f;
    else to[i] = t ? from[column * ld + row] : from[row * ld + column];
}

__global__ void scale_rows(floatX *to, const floatX *from, const floatX *mu, bool rest, int64_t n, int columns) {   // by mu or 1 - mu
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float factor = (float)mu[i / columns];
    to[i] = (floatX)((float)from[i] * (rest ? 1 - factor : factor));
}

__global__ void number_tokens(int *ids, int first, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) ids[i] = first + i;
}

static int blocks_of(int64_t n) { return (int)ceil_div(n, 256); }
static int multiple_of_16(int n) { return (n + 15) / 16 * 16; }

// ---------------------------------------------------------------------------------------------------------------------
// 2. Attention of a GOLD layer over its cache
//
// A block takes a share of the context and walks it in tiles: rows - 1 new tokens, row 0 being the token before them, to
// which the first one's shift looks back. Per tile, in shared memory and nowhere else:
//
//     K0 = rms_norm(id_k0[id] + c w_c^T)                           (rows, C)
//     h  = tanh(id_h[id] + id_h_before[id before])                 (rows, 64)
//     k  = K0 + (shift(K0) - K0) * (time_maa_k + h[:, :32] mix^T)  in place; likewise v from xo = id_xo[id], h[:, 32:]
//     k  = LayerNorm(k + tanh(k w1^T) w2^T)                        in place
//
// then scores of all queries and heads, a softmax with running maxima as in attention_forward_kernel, then the values in
// the keys' place. Partial sums of the blocks are put together by combine_splits (flash-decoding). Flops per token and
// layer: 2 C (R + 4 rank + 64); bytes: the weights, C (R + 4 rank + 64) floatX a tile, from L2: the more rows, the better.

static const int READ_THREADS = 256, READ_WARPS = READ_THREADS / 32;

struct ReadSmem {                           // where things lie in a block's shared memory
    floatX *x, *u, *c, *h;                  // (rows, C), (rows, rank16), (rows, R16), (rows, 64), each row PAD longer
    float *p, *top, *sum, *shrink, *scale;  // (M, H, rows); (M, H) three times; (rows)
    int *ids;                               // (rows): -1 outside the context
    size_t bytes;
};

__host__ __device__ inline ReadSmem read_smem(char *base, const GoldSource &g, int rows, int M) {
    ReadSmem s;
    size_t at = 0;
    auto place = [&](size_t bytes) { char *p = base + at; at += (bytes + 15) / 16 * 16; return p; };
    s.x = (floatX *)place(sizeof(floatX) * rows * (g.C + PAD));
    s.u = (floatX *)place(sizeof(floatX) * rows * (g.rank16 + PAD));
    s.c = (floatX *)place(sizeof(floatX) * rows * (g.R16 + PAD));
    s.h = (floatX *)place(sizeof(floatX) * rows * (64 + PAD));
    s.p = (float *)place(4ul * M * g.H * rows);
    s.top = (float *)place(4ul * M * g.H);
    s.sum = (float *)place(4ul * M * g.H);
    s.shrink = (float *)place(4ul * M * g.H);
    s.scale = (float *)place(4ul * rows);
    s.ids = (int *)place(4ul * rows);
    s.bytes = at;
    return s;
}

// out (16 tiles x 32 columns) += a (16 tiles, K) b^T: a in shared memory, b (32, K) in global memory, K a multiple of 16
template <int tiles> __device__ inline void read_product(TileC (&out)[tiles][4], const floatX *a, int lda, const floatX *b, int K) {
    for (int k = 0; k < K; k += 16) {
        TileB right[4];
        for (int n = 0; n < 4; n++) right[n] = load_b_global(b + (int64_t)8 * n * K + k, K);
        for (int i = 0; i < tiles; i++) mma(out[i], load_a(a + 16 * i * lda + k, lda), right);
    }
}

// Rows of the compressed key cache, before their norm: id_k0[id] + c w_c^T
template <int tiles> __device__ inline void read_k0(const ReadSmem &s, const GoldSource &g) {
    for (int column = threadIdx.x / 32 * 32; column < g.C; column += READ_THREADS) {
        TileC out[tiles][4] = {};
        read_product(out, s.c, g.R16 + PAD, g.w_c + (int64_t)column * g.R16, g.R16);
        for (int j = 0; j < tiles; j++)
            for (int n = 0; n < 4; n++)
                for (int i = 0; i < 4; i++) {
                    const int row = 16 * j + tile_row(i), at = column + 8 * n + tile_col(i), id = s.ids[row];
                    const float from_id = id >= 0 ? (float)g.id_k0[(int64_t)id * g.C + at] : 0;
                    s.x[row * (g.C + PAD) + at] = (floatX)(from_id + out[j][n].x[i]);
                }
    }
}

// x = x + (shift(x) - x) * (mu + h mix^T), x times scale first: in place, each warp its columns
template <int tiles>
__device__ inline void read_mix(const ReadSmem &s, const GoldSource &g, const GoldSource::Side &side, const floatX *h) {
    const int ld = g.C + PAD;
    for (int column = threadIdx.x / 32 * 32; column < g.C; column += READ_THREADS) {
        TileC out[tiles][4] = {};
        read_product(out, h, 64 + PAD, side.mix + (int64_t)column * 32, 32);
        for (int j = 0; j < tiles; j++)
            for (int n = 0; n < 4; n++)
                for (int i = 0; i < 4; i++) {
                    const int row = 16 * j + tile_row(i), at = column + 8 * n + tile_col(i);
                    const float x = (float)s.x[row * ld + at] * s.scale[row];
                    const float before = row > 0 ? (float)s.x[(row - 1) * ld + at] * s.scale[row - 1] : 0;
                    out[j][n].x[i] = x + (before - x) * ((float)side.mu[at] + out[j][n].x[i]);
                }
        __syncwarp();                                       // all have read the rows before
        for (int j = 0; j < tiles; j++)
            for (int n = 0; n < 4; n++)
                for (int i = 0; i < 4; i++) s.x[(16 * j + tile_row(i)) * ld + column + 8 * n + tile_col(i)] = (floatX)out[j][n].x[i];
    }
}

// x = LayerNorm(x + tanh(x w1^T) w2^T) in place
template <int tiles> __device__ inline void read_low_rank_norm(const ReadSmem &s, const GoldSource &g, const GoldSource::Side &side) {
    const int ld = g.C + PAD, ldu = g.rank16 + PAD, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int column = 8 * warp; column < g.rank16; column += 8 * READ_WARPS) {
        TileC out[tiles][1] = {};
        for (int k = 0; k < g.C; k += 16) {
            const TileB right[1] = {load_b_global(side.w1 + (int64_t)column * g.C + k, g.C)};
            for (int i = 0; i < tiles; i++) mma(out[i], load_a(s.x + 16 * i * ld + k, ld), right);
        }
        for (int j = 0; j < tiles; j++)
            for (int i = 0; i < 4; i++) s.u[(16 * j + tile_row(i)) * ldu + column + tile_col(i)] = (floatX)tanhf(out[j][0].x[i]);
    }
    __syncthreads();
    for (int column = 32 * warp; column < g.C; column += READ_THREADS) {
        TileC out[tiles][4] = {};
        read_product(out, s.u, ldu, side.w2 + (int64_t)column * g.rank16, g.rank16);
        for (int j = 0; j < tiles; j++)
            for (int n = 0; n < 4; n++)
                for (int i = 0; i < 4; i++) {
                    floatX *x = &s.x[(16 * j + tile_row(i)) * ld + column + 8 * n + tile_col(i)];
                    *x = (floatX)((float)*x + out[j][n].x[i]);
                }
    }
    __syncthreads();
    for (int row = warp; row < 16 * tiles; row += READ_WARPS) {
        floatX *x = s.x + row * ld;
        float total = 0, squares = 0;
        for (int i = lane; i < g.C; i += 32) total += (float)x[i];
        const float mean = warp_sum(total) / g.C;
        for (int i = lane; i < g.C; i += 32) squares += ((float)x[i] - mean) * ((float)x[i] - mean);
        const float rstd = rsqrtf(warp_sum(squares) / g.C + 1e-5f);
        for (int i = lane; i < g.C; i += 32) x[i] = (floatX)(((float)x[i] - mean) * rstd * (float)side.gain[i] + (float)side.bias[i]);
    }
    __syncthreads();
}

// Rows of a matrix (.., C) by number, or zeros where the number is negative, into x
__device__ inline void read_rows(const ReadSmem &s, const GoldSource &g, int rows, const floatX *from, const int *numbers, int64_t base) {
    for (int i = threadIdx.x; i < rows * g.C / 8; i += READ_THREADS) {
        const int row = i / (g.C / 8), at = i % (g.C / 8) * 8;
        const int64_t number = s.ids[row] < 0 ? -1 : numbers ? numbers[row] : base + row;
        store(s.x + row * (g.C + PAD) + at, number < 0 ? zero_pack() : load(from + number * g.C + at));
    }
}

// Ids of the rows of a tile, row 0 being token t0 - 1; and the c and h that keys and values are made from.
__device__ inline void read_ids(const ReadSmem &s, const GoldSource &g, int rows, int64_t t0, int64_t T) {
    for (int row = threadIdx.x; row < rows; row += READ_THREADS) {
        const int64_t t = t0 - 1 + row;
        s.ids[row] = t >= 0 && t < T ? g.ids[t] : -1;
    }
    __syncthreads();
}

template <KvKind kind> __device__ inline void read_c_and_h(const ReadSmem &s, const GoldSource &g, int rows, int64_t t0) {
    for (int i = threadIdx.x; i < rows * g.R16; i += READ_THREADS) {
        const int row = i / g.R16, at = i % g.R16;
        const int64_t t = t0 - 1 + row;
        float c = 0;
        if (s.ids[row] >= 0 && at < g.R) c = kind == KV_INT8 ? g.c8[t * g.R + at] * g.scales[t] : (float)g.c[t * g.R + at];
        s.c[row * (g.R16 + PAD) + at] = (floatX)c;
    }
    for (int i = threadIdx.x; i < rows * 64; i += READ_THREADS) {
        const int row = i / 64, at = i % 64;
        const int64_t t = t0 - 1 + row;
        float h = 0;
        if (s.ids[row] >= 0) h = (float)g.id_h[(int64_t)s.ids[row] * 64 + at];
        if (s.ids[row] >= 0 && t > 0) h += (float)g.id_h_before[(int64_t)g.ids[t - 1] * 64 + at];
        s.h[row * (64 + PAD) + at] = (floatX)tanhf(h);
    }
    __syncthreads();
}

template <int tiles> __device__ inline void read_keys(const ReadSmem &s, const GoldSource &g) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    read_k0<tiles>(s, g);
    __syncthreads();
    for (int row = warp; row < 16 * tiles; row += READ_WARPS) {             // rms_norm, applied by read_mix
        float squares = 0;
        for (int i = lane; i < g.C; i += 32) squares += (float)s.x[row * (g.C + PAD) + i] * (float)s.x[row * (g.C + PAD) + i];
        squares = warp_sum(squares);
        if (lane == 0) s.scale[row] = 1 / (sqrtf(squares / g.C) + 1e-8f);
    }
    __syncthreads();
    read_mix<tiles>(s, g, g.k, s.h);
    __syncthreads();
    read_low_rank_norm<tiles>(s, g, g.k);
}

__device__ inline void read_rope(const ReadSmem &s, const GoldSource &g, int rows, int64_t t0) {    // the keys' positions: rows of the cache
    for (int i = threadIdx.x; i < rows * g.C / 8; i += READ_THREADS) {
        const int row = i / (g.C / 8), c = i % (g.C / 8) * 8;
        floatX *at = s.x + row * (g.C + PAD) + c;
        store(at, rope_pack(load(at), g.rope, t0 - 1 + row, c, 1));
    }
    __syncthreads();
}

template <int tiles> __device__ inline void read_values(const ReadSmem &s, const GoldSource &g, int64_t t0) {
    read_rows(s, g, 16 * tiles, g.id_xo, s.ids, t0 - 1);
    for (int row = threadIdx.x; row < 16 * tiles; row += READ_THREADS) s.scale[row] = 1;
    __syncthreads();
    read_mix<tiles>(s, g, g.v, s.h + 32);
    __syncthreads();
    read_low_rank_norm<tiles>(s, g, g.v);
}

// Grid: splits of the context. Each writes its sums over its tokens, out = sum of exp2(score - top) v, sum, and top.
template <int tiles, KvKind kind>
__global__ void __launch_bounds__(READ_THREADS) cached_attention_kernel(GoldSource g, ReadTask task) {
    const int rows = 16 * tiles, step = rows - 1, warp = threadIdx.x / 32, lane = threadIdx.x % 32, pairs = task.M * g.H;
    const ReadSmem s = read_smem(dynamic_smem<char>(), g, rows, task.M);
    float *out = task.out + (int64_t)blockIdx.x * task.M * g.C;
    for (int i = threadIdx.x; i < pairs; i += READ_THREADS) {
        s.top[i] = -INFINITY;
        s.sum[i] = 0;
    }
    for (int tile = 0; tile < task.tiles_per_split; tile++) {
        const int64_t t0 = ((int64_t)blockIdx.x * task.tiles_per_split + tile) * step;
        if (t0 >= task.T) break;
        __syncthreads();
        read_ids(s, g, rows, t0, task.T);
        if constexpr (kind == KV_FULL) {
            read_rows(s, g, rows, g.keys, nullptr, t0 - 1);
            __syncthreads();
        } else {
            read_c_and_h<kind>(s, g, rows, t0);
            read_keys<tiles>(s, g);
            if (g.rope.used) read_rope(s, g, rows, t0);
        }
        for (int i = threadIdx.x; i < rows * g.H; i += READ_THREADS) {      // scores: a thread, a key of a head
            const int row = i % rows, h = i / rows;
            float k[N];
            for (int j = 0; j < N; j += 8) {
                const Pack part = load(s.x + row * (g.C + PAD) + h * N + j);
                for (int e = 0; e < 8; e++) k[j + e] = part.x[e];
            }
            for (int m = 0; m < task.M; m++) {
                const bool seen = row > 0 && s.ids[row] >= 0 && t0 - 1 + row <= task.first + m;
                float score = 0;
                for (int j = 0; j < N; j += 8) {
                    const Pack q = load(task.q + (int64_t)m * g.C + h * N + j);
                    for (int e = 0; e < 8; e++) score += q.x[e] * k[j + e];
                }
                s.p[(m * g.H + h) * rows + row] = seen ? score * SCALE_LOG2 : -INFINITY;
            }
        }
        __syncthreads();
        for (int i = warp; i < pairs; i += READ_WARPS) {                    // softmax: a warp, a query of a head
            float *p = s.p + i * rows;
            const float score = lane < rows ? p[lane] : -INFINITY;
            const float top = fmaxf(s.top[i], warp_max(score));
            const float weight = top > -INFINITY ? exp2f(score - top) : 0;
            const float shrink = top > -INFINITY ? exp2f(s.top[i] - top) : 1, total = warp_sum(weight);
            __syncwarp();
            if (lane < rows) p[lane] = weight;
            if (lane == 0) {
                s.top[i] = top;
                s.sum[i] = s.sum[i] * shrink + total;
                s.shrink[i] = shrink;
            }
        }
        __syncthreads();
        if constexpr (kind == KV_FULL) {
            read_rows(s, g, rows, g.values, nullptr, t0 - 1);
            __syncthreads();
        } else {
            read_values<tiles>(s, g, t0);
        }
        for (int c = threadIdx.x; c < g.C; c += READ_THREADS) {             // sums: a thread, a channel
            float v[rows];
            for (int row = 0; row < rows; row++) v[row] = (float)s.x[row * (g.C + PAD) + c];
            for (int m = 0; m < task.M; m++) {
                const int pair = m * g.H + c / N;
                float sum = tile > 0 ? out[(int64_t)m * g.C + c] * s.shrink[pair] : 0;
                for (int row = 1; row < rows; row++) sum += s.p[pair * rows + row] * v[row];
                out[(int64_t)m * g.C + c] = sum;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < pairs; i += READ_THREADS) {
        task.top[(int64_t)blockIdx.x * pairs + i] = s.top[i];
        task.sum[(int64_t)blockIdx.x * pairs + i] = s.sum[i];
    }
}

// y (M, C) from the splits' sums; a block a query
__global__ void combine_splits(floatX *y, ReadTask task, int splits, int C, int H) {
    const int m = blockIdx.x;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        const int pair = m * H + c / N, pairs = task.M * H;
        float top = -INFINITY, sum = 0, out = 0;
        for (int i = 0; i < splits; i++) top = fmaxf(top, task.top[i * pairs + pair]);
        for (int i = 0; i < splits; i++) {
            const float weight = exp2f(task.top[i * pairs + pair] - top);
            if (weight == 0) continue;                                      // a split that this query does not see
            sum += task.sum[i * pairs + pair] * weight;
            out += task.out[((int64_t)i * task.M + m) * C + c] * weight;
        }
        y[(int64_t)m * C + c] = (floatX)(out / sum);
    }
}

template <int tiles, KvKind kind> static void cached_attention_launch(const GoldSource &g, const ReadTask &task, int splits) {
    const size_t smem = read_smem(nullptr, g, 16 * tiles, task.M).bytes;
    auto kernel = cached_attention_kernel<tiles, kind>;
    allow_smem(kernel, smem);
    kernel<<<splits, READ_THREADS, smem, stream>>>(g, task);
}

// y (M, C) = causal attention of queries q (M, C), the first at position `first`, over all that is in the cache
static void cached_attention(Infer *f, const GoldSource &g, floatX *y, const floatX *q, int M, int64_t first) {
    const int C = g.C, step = f->tile_rows - 1;
    for (int m = 0; m < M; m += f->queries) {
        const int here = M - m < f->queries ? M - m : f->queries;
        const int64_t T = first + m + here, tiles = ceil_div(T, step), per = ceil_div(tiles, READ_SPLITS);      // later ones unseen
        const int splits = (int)ceil_div(tiles, per);
        const ReadTask task = {q + (int64_t)m * C, first + m, T, f->partial_out, f->partial_top, f->partial_sum, here, (int)per};
        if (f->tile_rows == 16) {
            if (f->kv == KV_COMPRESSED) cached_attention_launch<1, KV_COMPRESSED>(g, task, splits);
            else if (f->kv == KV_INT8) cached_attention_launch<1, KV_INT8>(g, task, splits);
            else cached_attention_launch<1, KV_FULL>(g, task, splits);
        } else {
            if (f->kv == KV_COMPRESSED) cached_attention_launch<2, KV_COMPRESSED>(g, task, splits);
            else if (f->kv == KV_INT8) cached_attention_launch<2, KV_INT8>(g, task, splits);
            else cached_attention_launch<2, KV_FULL>(g, task, splits);
        }
        combine_splits<<<here, 256, 0, stream>>>(y + (int64_t)m * C, task, splits, C, g.H);
    }
}

// The time mixer of GOLD layers during inference: the trainer's queries and output, attention over the cache.
static void gold_cached_forward(Model *m, Layer *layer, floatX *out, const floatX *x) {
    Infer *f = (Infer *)m;
    const Dims &d = m->d;
    const int64_t lead = d.lead * (int64_t)d.C;
    gold_queries(m, layer, x);
    cached_attention(f, f->sources[layer->l - d.G0], layer->gold.y + lead, layer->gold.q + lead, d.BT - d.lead, f->row_position);
    gold_output(m, layer, out);
}

static const Mixer GOLD_FROM_CACHE = {"gold", GOLD, 0, true, false, false, gold_plan, gold_cached_forward, nullptr, nullptr};

// ---- attention of layers that keep their own keys and values (gptalpha, llama) ----
//
// A warp takes 16 queries of a head and a share of the context, in tiles of 64 tokens: attention_forward_kernel, but that
// the queries are the context's last tokens. combine_splits puts the shares together. Floor: bytes, each key and value once
// per 16 queries.

static const int KEPT_QUERIES = 16, KEPT_TILE = 64, KEPT_WARPS = 4 * READ_SPLITS;

__device__ inline void kept_load(floatX (*to)[LD], const floatX *from, int rows, int64_t valid, int A) {    // a head's rows, then zeros
    const int step = 16 / sizeof(floatX), per_row = N / step;
    for (int i = threadIdx.x; i < rows * per_row; i += 32) {
        const int row = i / per_row, c = i % per_row * step;
        async_copy16(&to[row][c], from + (row < valid ? (int64_t)row * A + c : 0), row < valid);
    }
}

// Grid: shares, heads, groups of queries
__global__ void __launch_bounds__(32) kept_attention_kernel(ReadTask task, const floatX *keys, const floatX *values, int A) {
    __shared__ __align__(16) floatX q[KEPT_QUERIES][LD];
    __shared__ __align__(16) floatX k[KEPT_TILE][LD];
    __shared__ __align__(16) floatX v[KEPT_TILE][LD];
    const int h = blockIdx.y, m0 = blockIdx.z * KEPT_QUERIES, queries_here = min(KEPT_QUERIES, task.M - m0);
    const int64_t begin = (int64_t)blockIdx.x * task.tiles_per_split * KEPT_TILE;
    const int64_t end = min(begin + (int64_t)task.tiles_per_split * KEPT_TILE, task.first + m0 + queries_here);
    kept_load(q, task.q + (int64_t)m0 * A + h * N, KEPT_QUERIES, queries_here, A);
    async_commit();
    async_wait<0>();
    __syncthreads();
    TileA queries[4];
    for (int i = 0; i < 4; i++) queries[i] = load_a(&q[0][16 * i], LD);
    TileC out[8] = {};
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};                 // of the two rows in this lane
    for (int64_t t0 = begin; t0 < end; t0 += KEPT_TILE) {
        kept_load(k, keys + t0 * A + h * N, KEPT_TILE, end - t0, A);
        kept_load(v, values + t0 * A + h * N, KEPT_TILE, end - t0, A);
        async_commit();
        async_wait<0>();
        __syncthreads();
        TileC p[8] = {};
        for (int i = 0; i < 4; i++) {
            TileB right[8];
            for (int n = 0; n < 8; n++) right[n] = load_b(&k[8 * n][16 * i], LD);
            mma(p, queries[i], right);
        }
        for (int i = 0; i < 4; i++) {                                       // scores, and the rows' maxima
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
            const bool any = high > -INFINITY;                              // a query may see nothing of this tile
            const float shrink = any ? exp2f(top[i] - high) : 1;
            sum[i] *= shrink;
            top[i] = high;
            for (int n = 0; n < 8; n++)
                for (int e = 2 * i; e < 2 * i + 2; e++) {
                    out[n].x[e] *= shrink;
                    p[n].x[e] = any ? exp2f(p[n].x[e] - high) : 0;
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
        for (int n = 0; n < 8; n++) task.out[row * A + h * N + 8 * n + tile_col(i)] = out[n].x[i];
        if (threadIdx.x % 4 > 0 || i % 2 > 0) continue;
        task.top[row * (A / N) + h] = top[i / 2];
        task.sum[row * (A / N) + h] = total;
    }
}

// A layer's `attend`: keeps the rows' keys and values, then attends over all that is kept.
static void attend_kept(Model *m, Layer *layer) {
    Infer *f = (Infer *)m;
    const Dims &d = m->d;
    const Attention &a = layer->attention;
    const KeptKv &kv = f->kept[layer->l];
    const int M = d.BT - d.lead, A = d.A, groups = (int)ceil_div(M, KEPT_QUERIES);
    const int64_t first = d.first + d.lead, lead = d.lead * (int64_t)A, tiles = ceil_div(first + M, KEPT_TILE);
    const size_t bytes = (size_t)M * A * sizeof(floatX);
    CUDA_CHECK(cudaMemcpyAsync(kv.keys + first * A, a.k + lead, bytes, cudaMemcpyDeviceToDevice, stream));
    CUDA_CHECK(cudaMemcpyAsync(kv.values + first * A, a.v + lead, bytes, cudaMemcpyDeviceToDevice, stream));
    const int64_t wanted = KEPT_WARPS / (d.H * groups), per = ceil_div(tiles, wanted > 1 ? wanted : 1);
    const int splits = (int)ceil_div(tiles, per);
    const ReadTask &sums = f->kept_sums;
    const ReadTask task = {a.q + lead, first, first + M, sums.out, sums.top, sums.sum, M, (int)per};
    kept_attention_kernel<<<dim3(splits, d.H, groups), 32, 0, stream>>>(task, kv.keys, kv.values, A);
    combine_splits<<<M, 256, 0, stream>>>(a.y + lead, task, splits, A, d.H);
}

// For `rows` queries at most
static void kept_allocate(Infer *f, int rows) {
    Model *m = &f->m;
    const Dims &d = m->d;
    const int64_t sums = rows + KEPT_WARPS * KEPT_QUERIES / d.H;            // shares x queries: see attend_kept
    f->kept = (KeptKv *)calloc(d.L, sizeof(KeptKv));
    for (int l = 0; l < d.L; l++) {
        if (!m->layers[l].tmix->keeps_kv) continue;
        m->layers[l].attend = attend_kept;
        for (floatX **p : {&f->kept[l].keys, &f->kept[l].values}) device_alloc((void **)p, f->capacity * d.A * sizeof(floatX));
        if (f->kept_sums.out) continue;
        device_alloc((void **)&f->kept_sums.out, sums * d.A * sizeof(float));
        device_alloc((void **)&f->kept_sums.top, sums * d.H * sizeof(float));
        device_alloc((void **)&f->kept_sums.sum, sums * d.H * sizeof(float));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Engine

// ---- memory ----

static int64_t cache_bytes_per_token(const Infer *f) {
    const Model *m = &f->m;
    const int64_t C = m->d.C, R = m->d.R, width = sizeof(floatX);
    int64_t bytes = 0;
    for (int l = 0; l < m->d.L; l++) bytes += m->layers[l].tmix->keeps_kv ? 2 * m->d.A * width : 0;
    if (!has_cache(m)) return bytes;
    if (f->kv == KV_FULL) return bytes + sizeof(int) + 2 * f->G * C * width;
    return bytes + sizeof(int) + (f->kv == KV_INT8 ? R + (int64_t)sizeof(float) : R * width);
}

// All that is carried after T tokens: states, what shifts see, and the cache
static int64_t carried_bytes(const Infer *f, int64_t T) {
    const Dims &d = f->m.d;
    int64_t bytes = f->G ? 2 * d.C * (int64_t)sizeof(floatX) : 0;
    for (int l = 0; l < d.L; l++) {
        const Mixer *tmix = f->m.layers[l].tmix;
        bytes += 2 * d.C * (int64_t)sizeof(floatX) + (tmix->needs_cache || tmix->keeps_kv ? 0 : (int64_t)d.H * N * N * sizeof(float));
    }
    return bytes + T * cache_bytes_per_token(f);
}

static void alloc_floats(floatX **p, int64_t n) { device_alloc((void **)p, n * sizeof(floatX)); }

static floatX *packed(int rows, int columns, Param from, int from_rows, int from_columns, bool t) {
    floatX *to;
    alloc_floats(&to, (int64_t)rows * columns);
    pack_matrix<<<blocks_of((int64_t)rows * columns), 256, 0, stream>>>(to, rows, columns, from.w, from.ld, from_rows, from_columns, t);
    return to;
}

// How many cached tokens an attention block takes at a time (plus one: 32 or 16) and how many queries: as many of the
// first as fit its shared memory with one query, then as many of the second.
static void choose_attention_shape(Infer *f) {
    const GoldSource &g = f->sources[0];
    const size_t limit = f->shared_limit;
    f->tile_rows = read_smem(nullptr, g, 32, 1).bytes <= limit ? 32 : 16;
    if (read_smem(nullptr, g, f->tile_rows, 1).bytes > limit)
        die(2, "n_embd %d does not fit the %zu bytes of shared memory that a block has here", g.C, limit);
    f->queries = 1;
    while (f->queries < f->tail && read_smem(nullptr, g, f->tile_rows, f->queries + 1).bytes <= limit) f->queries++;
    const int64_t sums = (int64_t)READ_SPLITS * f->queries;
    device_alloc((void **)&f->partial_out, sums * g.C * sizeof(float));
    device_alloc((void **)&f->partial_top, sums * g.H * sizeof(float));
    device_alloc((void **)&f->partial_sum, sums * g.H * sizeof(float));
}

// Tables over the vocabulary and weights in the layout that attention reads; once, after the weights are in place.
static void prepare_gold(Infer *f) {
    Model *m = &f->m;
    const Dims d = m->d;
    const int64_t V = d.V, C = d.C;
    const int R16 = multiple_of_16(d.R), rank = gold_rank(d), rank16 = multiple_of_16(rank);
    const Param W = m->top.w_kv_cache_b;
    f->w_c = packed(d.A, R16, columns_from(W, C), d.A, d.R, false);
    alloc_floats(&f->id_k0, V * C);
    alloc_floats(&f->id_xo, V * C);
    floatX *w1[2];
    for (floatX *&w : w1) alloc_floats(&w, C * 64);
    for (int i = 0; i < f->G; i++) {
        const Params &p = m->layers[d.G0 + i].p;
        GoldSource &g = f->sources[i];
        floatX *id_h, *id_h_before;
        alloc_floats(&id_h, V * 64);
        alloc_floats(&id_h_before, V * 64);
        g.id_k0 = f->id_k0, g.id_xo = f->id_xo, g.id_h = id_h, g.id_h_before = id_h_before, g.w_c = f->w_c;
        g.rope = m->rope, g.C = d.C, g.H = d.H, g.R = d.R, g.R16 = R16, g.rank16 = rank16;
        Param mix_v = p.time_maa_kv_w2;
        mix_v.w += 32 * C;
        g.k = {p.time_maa_k.w, packed(d.C, 32, p.time_maa_kv_w2, 32, d.C, true), packed(rank16, d.C, p.time_key_w1, d.C, rank, true),
               packed(d.C, rank16, p.time_key_w2, rank, d.C, true), p.ln_k_weight.w, p.ln_k_bias.w};
        g.v = {p.time_maa_v.w, packed(d.C, 32, mix_v, 32, d.C, true), packed(rank16, d.C, p.time_value_w1, d.C, rank, true),
               packed(d.C, rank16, p.time_value_w2, rank, d.C, true), p.ln_v_weight.w, p.ln_v_bias.w};
        // (xo + dxo mu) @ w1 = xo_t @ (1 - mu) w1 + xo_{t-1} @ mu w1
        for (int before = 0; before < 2; before++)
            scale_rows<<<blocks_of(C * 64), 256, 0, stream>>>(w1[before], p.time_maa_kv_w1.w, p.time_maa_v_cache.w, !before, C * 64, 64);
        for (int64_t first = 0; first < V; first += m->T) {
            const int here = (int)(V - first < m->T ? V - first : m->T);
            set_batch(m, 1, here);
            number_tokens<<<blocks_of(here), 256, 0, stream>>>(m->tokens, (int)first, here);
            model_embed(m);
            if (i == 0) {
                append_floats<<<blocks_of(here * C), 256, 0, stream>>>(f->id_xo + first * C, m->xo, here * C);
                linear_forward(f->id_k0 + first * C, m->x0, W, here, d.A, d.C);
            }
            matmul(id_h + first * 64, 64, rows(m->xo, C), rows(w1[0], 64), here, 64, d.C);
            matmul(id_h_before + first * 64, 64, rows(m->xo, C), rows(w1[1], 64), here, 64, d.C);
        }
    }
    CUDA_CHECK(cudaStreamSynchronize(stream));
    for (floatX *w : w1) cudaFree(w);
}

// ---- the model's shape, where a file written by others does not say it ----

static int64_t shape_of(const SafeTensors *file, const char *name, int dimension) {     // 0 if there is no such tensor
    const FileTensor *t = safetensors_find(file, name);
    return t && dimension < t->ndim ? t->shape[dimension] : 0;
}

// The mixer all of whose tensors layer l has; NULL if there is none.
template <size_t n> static const char *mixer_from_tensors(const Mixer (&table)[n], const SafeTensors *file, int l) {
    for (const Mixer &mixer : table) {
        bool all = true;
        char full[96];
#define ROW(field, name, s0, s1, s2, init, group, places) \
        snprintf(full, sizeof full, "blocks.%d.%s", l, name); \
        all = all && (!((places) & mixer.tensors) || safetensors_find(file, full));
        TENSORS(ROW)
        VARIANTS(ROW)
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
        snprintf(name, sizeof name, "blocks.%d.ln1.weight", (int)L);
        if (!shape_of(file, name, 0)) break;
        const char *tmix = mixer_from_tensors(TIME_MIXERS, file, (int)L), *cmix = mixer_from_tensors(CHANNEL_MIXERS, file, (int)L);
        if (L == 0) snprintf(s->tmix, sizeof s->tmix, "%s", tmix), snprintf(s->cmix, sizeof s->cmix, "%s", cmix);
        if (G0 < 0 && (strcmp(tmix, s->tmix) != 0 || strcmp(cmix, s->cmix) != 0)) G0 = L;
        snprintf(s->tmix2, sizeof s->tmix2, "%s", tmix), snprintf(s->cmix2, sizeof s->cmix2, "%s", cmix);
    }
    s->n_layer = L;
    s->dim_ffn = shape_of(file, "blocks.0.ffn.key.weight", 0);
    s->dim_att = shape_of(file, "blocks.0.att.output.weight", 1);
    if (!s->dim_att) s->dim_att = shape_of(file, "blocks.0.att.wo.weight", 1);
    if (G0 < 0) s->tmix2[0] = s->cmix2[0] = '\0';
    else s->inv_other_layer_ratio = (double)L / ((double)(L - G0) - 0.5);   // rounds to G0, whatever L is
    if (shape_of(file, "w_kv_cache_a.weight", 0))
        s->kv_cache_compression_ratio = (double)s->n_embd / (double)shape_of(file, "w_kv_cache_a.weight", 0);
    if (find_mixer(TIME_MIXERS, s->tmix)->keeps_kv) {
        s->rope.base = 10000;
        fprintf(stderr, "%s says nothing of positions: taking rope.base 10000, as in the paper's %s\n", file->path, s->tmix);
    }
}

// ---- start ----

// Everything but the weights' values: plan, memory, the cache for `capacity` tokens (0: as many as fit, a million at most).
static Infer *infer_create(const Settings *settings, KvKind kv, int64_t capacity, int chunk) {
    Infer *f = (Infer *)calloc(1, sizeof(Infer));
    Model *m = &f->m;
    Settings s = *settings;
    s.grad_cp = 1;                                                          // layers share what a layer keeps
    s.micro_bsz = 1;
    f->kv = kv;
    f->chunk = chunk;
    const int rows = chunk > 2 * s.n_layer + 1 ? chunk : (int)(2 * s.n_layer + 1);     // the GOLD layers' last tokens fit as well
    model_plan(m, &s, 1, rows + 1);
    const Dims &d = m->d;
    f->G = has_cache(m) ? d.L - d.G0 : 0;
    f->tail = 2 * f->G + 1;
    machine_start();
    cudaDeviceProp device;
    CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    f->shared_limit = (int)device.sharedMemPerBlockOptin;
    size_t available, total;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    const int64_t weights = m->n_block * (int64_t)(sizeof(floatX) + 4), per_token = cache_bytes_per_token(f);
    const int64_t tables = f->G ? (int64_t)d.V * (2 * d.C + 128 * f->G) * sizeof(floatX) : 0, small = CUBLAS_WORKSPACE + (256 << 20);
    const int64_t need = weights + tables + m->activation_bytes + small;
    if (need > (int64_t)available)
        die(2, "%s has %.2f GiB free, and the model needs %.2f GiB", machine_name(), available / 1073741824.0, need / 1073741824.0);
    const int64_t fits = per_token ? ((int64_t)available - need) / per_token : INT64_MAX;
    if (capacity > fits) die(2, "a context of %ld tokens does not fit this machine's memory: %ld tokens do", capacity, fits);
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
    kept_allocate(f, rows);
    if (!f->G) return f;
    f->sources = (GoldSource *)calloc(f->G, sizeof(GoldSource));
    device_alloc((void **)&f->ids, f->capacity * sizeof(int));
    if (kv == KV_COMPRESSED) alloc_floats(&f->c, f->capacity * d.R);
    if (kv == KV_INT8) device_alloc((void **)&f->c8, f->capacity * d.R);
    if (kv == KV_INT8) device_alloc((void **)&f->scales, f->capacity * sizeof(float));
    for (int i = 0; i < f->G; i++) {
        GoldSource &g = f->sources[i];
        floatX *keys = nullptr, *values = nullptr;
        if (kv == KV_FULL) alloc_floats(&keys, f->capacity * d.C);
        if (kv == KV_FULL) alloc_floats(&values, f->capacity * d.C);
        g.ids = f->ids, g.c = f->c, g.c8 = f->c8, g.scales = f->scales, g.keys = keys, g.values = values;
    }
    for (floatX **p : {&f->tail_x[0], &f->tail_x[1]}) alloc_floats(p, (int64_t)f->tail * d.C);
    for (floatX **p : {&f->k0_last, &f->xo_last}) alloc_floats(p, d.C);
    return f;
}

static void infer_prepare(Infer *f) {                                       // after the weights have their values
    if (!f->G) return;
    prepare_gold(f);
    choose_attention_shape(f);
}

// Our checkpoints carry their settings; a file by others tells most of them by its tensors.
void settings_of_model(Settings *s, const SafeTensors *file) {
    if (safetensors_metadata(file, "model.n_layer")) {
        settings_default(s);
        settings_load(s, file);
    } else {
        settings_from_tensors(s, file);
    }
    settings_check(s);
}

Infer *infer_open(const char *path, KvKind kv, int64_t capacity) {
    SafeTensors file;
    Settings s;
    safetensors_open(&file, path);
    settings_of_model(&s, &file);
    Infer *f = infer_create(&s, kv, capacity, 256);
    f->model_hash = hash_bytes(hash_start, file.data, (size_t)file.data_size);
    safetensors_close(&file);
    load_weights(&f->m, path, false);
    if (PRECISION_BF16) {                                                   // inference needs the working copy alone
        CUDA_CHECK(cudaFree(f->m.master));
        f->m.master = nullptr;
    }
    infer_prepare(f);
    return f;
}

const Settings *infer_settings(const Infer *f) { return &f->m.s; }
int64_t infer_position(const Infer *f) { return f->position; }
float *infer_logits(Infer *f) { return f->logits; }

// ---- what is carried: one list for forgetting, saving and loading ----

typedef struct Carried { char name[48]; const char *dtype; void *p; int64_t count, width; } Carried;    // width: bytes of an element

static int infer_carried(const Infer *f, Carried *list) {                   // list: 6 + 4 L; returns how many
    const char *type = PRECISION_BF16 ? "BF16" : "F32";
    const Dims &d = f->m.d;
    const int64_t T = f->position;
    int n = 0;
    auto add = [&](const char *name, int number, const char *dtype, const void *p, int64_t count, int64_t width) {
        if (!p) return;
        snprintf(list[n].name, sizeof list[n].name, name, number);
        list[n].dtype = dtype, list[n].p = (void *)p, list[n].count = count, list[n++].width = width;
    };
    for (int l = 0; l < d.L; l++) {
        const Layer *layer = &f->m.layers[l];
        add("blocks.%d.tmix_shift", l, type, layer->tmix_shift, d.C, sizeof(floatX));
        add("blocks.%d.cmix_shift", l, type, layer->cmix_shift, d.C, sizeof(floatX));
        add("blocks.%d.wkv", l, "F32", layer->wkv_state, (int64_t)d.H * N * N, 4);
        add("blocks.%d.keys", l, type, f->kept[l].keys, T * d.A, sizeof(floatX));
        add("blocks.%d.values", l, type, f->kept[l].values, T * d.A, sizeof(floatX));
    }
    add("logits", 0, "F32", f->logits, d.V, 4);
    if (!f->G) return n;
    add("k0_last", 0, type, f->k0_last, d.C, sizeof(floatX));
    add("xo_last", 0, type, f->xo_last, d.C, sizeof(floatX));
    add("ids", 0, "I32", f->ids, T, 4);
    add("c", 0, type, f->c, T * d.R, sizeof(floatX));
    add("c8", 0, "I8", f->c8, T * d.R, 1);
    add("scales", 0, "F32", f->scales, T, 4);
    for (int i = 0; i < f->G; i++) {
        add("blocks.%d.keys", d.G0 + i, type, f->sources[i].keys, T * d.C, sizeof(floatX));
        add("blocks.%d.values", d.G0 + i, type, f->sources[i].values, T * d.C, sizeof(floatX));
    }
    return n;
}

static Carried *carried_room(const Infer *f) { return (Carried *)calloc(16 + 5 * f->m.d.L, sizeof(Carried)); }

void infer_reset(Infer *f) {                                                // forget the context
    f->position = 0;
    f->tail_rows = 0;
    Carried *list = carried_room(f);
    const int n = infer_carried(f, list);
    for (int i = 0; i < n; i++) CUDA_CHECK(cudaMemsetAsync(list[i].p, 0, list[i].count * list[i].width, stream));
    free(list);
}

// The context to a safetensors file, bound to its model by the hash of the weights.
void infer_save_state(const Infer *f, const char *path) {
    Carried *list = carried_room(f);
    const int n = infer_carried(f, list);
    char *header = nullptr;
    size_t length = 0;
    int64_t offset = 0;
    FILE *text = open_memstream(&header, &length), *out = fopen(path, "wb");
    if (!out) die(1, "%s: %s", path, strerror(errno));
    fprintf(text, "{\"__metadata__\":{\"model_hash\":\"%016lx\",\"position\":\"%ld\"}", f->model_hash, f->position);
    for (int i = 0; i < n; i++) {
        const int64_t bytes = list[i].count * list[i].width;
        fprintf(text, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%ld],\"data_offsets\":[%ld,%ld]}", list[i].name, list[i].dtype, list[i].count,
                offset, offset + bytes);
        offset += bytes;
    }
    fprintf(text, "}");
    fclose(text);
    uint64_t header_length = length;
    fwrite(&header_length, 8, 1, out);
    fwrite(header, 1, length, out);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    for (int i = 0; i < n; i++) {
        const size_t bytes = (size_t)(list[i].count * list[i].width);
        void *host = malloc(bytes + 1);
        CUDA_CHECK(cudaMemcpy(host, list[i].p, bytes, cudaMemcpyDeviceToHost));
        fwrite(host, 1, bytes, out);
        free(host);
    }
    if (fflush(out) != 0 || ferror(out) || fclose(out) != 0) die(1, "%s: could not be written: %s", path, strerror(errno));
    free(header);
    free(list);
}

void infer_load_state(Infer *f, const char *path) {
    SafeTensors file;
    safetensors_open(&file, path);
    char hash[17];
    snprintf(hash, sizeof hash, "%016lx", f->model_hash);
    const char *found = safetensors_metadata(&file, "model_hash");
    if (!found || strcmp(found, hash) != 0)
        die(2, "%s: metadata, field model_hash: expected %s, this model's, found %s", path, hash, found ? found : "nothing");
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
        CUDA_CHECK(cudaMemcpy(list[i].p, file.data + t->begin, t->end - t->begin, cudaMemcpyHostToDevice));
    }
    free(list);
    safetensors_close(&file);
}

void infer_cache_bytes(const Infer *f, int64_t *total, double *per_token, double *transformer_per_token) {
    const Dims &d = f->m.d;
    Carried *list = carried_room(f);
    const int n = infer_carried(f, list);
    *total = 0;
    for (int i = 0; i < n; i++) *total += strcmp(list[i].name, "logits") == 0 ? 0 : list[i].count * list[i].width;
    free(list);
    *per_token = (double)cache_bytes_per_token(f);
    *transformer_per_token = 2.0 * d.A * d.L * 2;                           // keys and values of all layers in bf16
}

// ---- pre-fill and decode ----

// Host ids (n) as rows 1..n of the model at hand; row 0, the token before, is there for the shifts alone.
static void stage_rows(Infer *f, const int *ids, int n) {
    Model *m = &f->m;
    const int slot = (int)(m->micro_steps++ % 4);
    CUDA_CHECK(cudaEventSynchronize(m->staged_done[slot]));
    int *staged = m->staged[slot];
    staged[0] = ids[0];                                                     // any id will do
    memcpy(staged + 1, ids, n * sizeof(int));
    CUDA_CHECK(cudaMemcpyAsync(m->tokens, staged, (n + 1) * sizeof(int), cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaEventRecord(m->staged_done[slot], stream));
    m->d.lead = 1;
    m->d.first = f->position - 1;
    set_batch(m, 1, n + 1);
}

// The rows' ids and c, or keys and values, into the cache at the present position. x: before the GOLD layers.
static void append_to_cache(Infer *f, const floatX *x, int n) {
    Model *m = &f->m;
    const Dims &d = m->d;
    const int64_t at = f->position;
    append_tokens<<<blocks_of(n), 256, 0, stream>>>(f->ids + at, m->tokens + 1, n);
    if (f->kv == KV_FULL) {
        token_cat_forward(m, x);
        carry_shift(m, m->k0, f->k0_last);
        carry_shift(m, m->xo, f->xo_last);
        for (int i = 0; i < f->G; i++) {
            Layer *layer = &m->layers[d.G0 + i];
            gold_keys_values(m, layer);
            const size_t bytes = (size_t)n * d.C * sizeof(floatX);
            floatX *keys = (floatX *)f->sources[i].keys + at * d.C, *values = (floatX *)f->sources[i].values + at * d.C;
            CUDA_CHECK(cudaMemcpyAsync(keys, layer->gold.k + d.C, bytes, cudaMemcpyDeviceToDevice, stream));
            CUDA_CHECK(cudaMemcpyAsync(values, layer->gold.v + d.C, bytes, cudaMemcpyDeviceToDevice, stream));
        }
        return;
    }
    linear_forward(m->cache, x + d.C, m->top.w_kv_cache_a, n, d.R, d.C);
    if (f->kv == KV_INT8) append_int8<<<n, 32, 0, stream>>>(f->c8 + at * d.R, f->scales + at, m->cache, d.R);
    else append_floats<<<blocks_of((int64_t)n * d.R), 256, 0, stream>>>(f->c + at * d.R, m->cache, (int64_t)n * d.R);
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
    add_forward<<<pack_blocks(E), 256, 0, stream>>>(x, m->layers[d.G0 - 1].x_mid, m->branch, E);
    append_to_cache(f, x, n);
    f->row_position = f->position;
    f->position += n;
    if (all) model_layers(m, d.G0, d.L);
    else keep_tail(f, x, n);
}

// Logits (fp32) of `count` rows, the first of them `row`, to device memory.
static void infer_head(Infer *f, float *logits, int row, int count) {
    const Dims &d = f->m.d;
    const floatX *xf = f->m.xf + (int64_t)row * d.C, *head = f->m.top.head.w;
    matmul(logits, d.V, rows(xf, d.C), columns(head, d.C), count, d.V, d.C);
}

// n tokens go on from the context; afterwards the logits of the last one are ready. What the GOLD layers' shifts carry is
// exact before and after: short input goes through them as it stands, of longer input the last 2 G + 1 tokens do.
void infer_feed(Infer *f, const int *ids, int64_t n) {
    Model *m = &f->m;
    const Dims &d = m->d;
    if (f->position + n > f->capacity && cache_bytes_per_token(f) > 0)
        die(2, "the context would be %ld tokens long, expected at most %ld", f->position + n, f->capacity);
    f->tail_rows = 0;
    for (int64_t done = 0; done < n; done += f->chunk) infer_chunk(f, ids + done, (int)(n - done < f->chunk ? n - done : f->chunk), false);
    if (f->G) {
        set_batch(m, 1, f->tail_rows + 1);
        CUDA_CHECK(cudaMemcpyAsync(m->layers[d.G0].x + d.C, f->tail_x[f->tail_now], (size_t)f->tail_rows * d.C * sizeof(floatX),
                                   cudaMemcpyDeviceToDevice, stream));
        f->row_position = f->position - f->tail_rows;
        m->d.first = f->row_position - 1;
        model_layers(m, d.G0, d.L);
    }
    model_final_norm(m);
    infer_head(f, f->logits, d.BT - 1, 1);
}

// ---- scoring: every position of a text through all layers ----

// One context of n + 1 tokens: adds the loss of the n predictions, and how many had the right token first.
static void score_context(Infer *f, const int *ids, int64_t n, int chunk, double *loss_sum, int64_t *correct) {
    Model *m = &f->m;
    const Dims &d = m->d;
    double totals[2] = {0, 0};
    CUDA_CHECK(cudaMemsetAsync(m->totals, 0, sizeof totals, stream));
    infer_reset(f);
    for (int64_t done = 0; done < n; done += chunk) {
        const int here = (int)(n - done < chunk ? n - done : chunk);
        infer_chunk(f, ids + done, here, true);
        model_final_norm(m);
        int *targets = m->tokens + d.BT;
        CUDA_CHECK(cudaMemcpyAsync(targets, ids + done + 1, here * sizeof(int), cudaMemcpyHostToDevice, stream));
        for (int row = 0; row < here; row += m->slice) {
            const int count = here - row < m->slice ? here - row : m->slice;
            head_and_loss(m, m->xf + (int64_t)(1 + row) * d.C, targets, row, count, 0);
        }
        sum_losses<<<1, 256, 0, stream>>>(m->totals, m->losses, m->right, here);
        CUDA_CHECK(cudaStreamSynchronize(stream));                          // ids + done may be the caller's pageable memory
    }
    CUDA_CHECK(cudaMemcpy(totals, m->totals, sizeof totals, cudaMemcpyDeviceToHost));
    *loss_sum += totals[0];
    *correct += (int64_t)totals[1];
}

// n tokens; window 0: one context; otherwise a fresh one for every `window` predictions, as the trainer's validation, which
// leaves out what is left at the end (but not all of it: a text shorter than a window is one context).
// chunk: tokens at a time, at most the engine's own (0: that).
void infer_score(Infer *f, const int *ids, int64_t n, int64_t window, int chunk, double *loss_sum, int64_t *correct, int64_t *targets) {
    *loss_sum = 0, *correct = *targets = 0;
    if (chunk <= 0 || chunk > f->chunk) chunk = f->chunk;
    const int64_t predictions = window && window < n - 1 ? window : n - 1;
    for (int64_t at = 0; at + predictions < n; at += predictions + 1) {
        if (cache_bytes_per_token(f) > 0 && predictions > f->capacity) die(2, "a context of %ld tokens, expected at most %ld", predictions, f->capacity);
        score_context(f, ids + at, predictions, chunk, loss_sum, correct);
        *targets += predictions;
    }
}

#ifdef GOLDFINCH_TEST
extern "C" {

// An engine with the weights of a model; chunk: tokens of a pre-fill chunk.
Infer *gf_infer_create(Model *m, int kv, int64_t capacity, int chunk) {
    Infer *f = infer_create(&m->s, (KvKind)kv, capacity, chunk);
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        CUDA_CHECK(cudaMemcpy(f->m.master + t->offset, m->master + t->offset, t->size * sizeof(float), cudaMemcpyDeviceToDevice));
    }
    model_params_changed(&f->m);
    infer_prepare(f);
    return f;
}

void gf_infer_free(Infer *f) {
    Carried *list = carried_room(f);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    const int n = infer_carried(f, list);
    for (int i = 0; i < n; i++) cudaFree(list[i].p);
    free(list);
    for (int i = 0; i < f->G; i++) {
        const GoldSource &g = f->sources[i];
        for (const floatX *p : {g.id_h, g.id_h_before, g.k.mix, g.k.w1, g.k.w2, g.v.mix, g.v.w1, g.v.w2}) cudaFree((void *)p);
    }
    for (floatX *p : {f->w_c, f->id_k0, f->id_xo, f->tail_x[0], f->tail_x[1]}) cudaFree(p);
    for (float *p : {f->partial_out, f->partial_top, f->partial_sum, f->kept_sums.out, f->kept_sums.top, f->kept_sums.sum}) cudaFree(p);
    free(f->kept);
    free(f->sources);
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

double gf_infer_score(Infer *f, const int *ids, int64_t n, int64_t window, int chunk) {     // mean loss
    double loss;
    int64_t correct, targets;
    infer_score(f, ids, n, window, chunk, &loss, &correct, &targets);
    return loss / targets;
}

}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 4. Tokenizer (spec section 9): text to ids and back. Byte-level models need no vocabulary: an id is a byte + 1. Others
//    take RWKV World's, a text file of lines `ID LITERAL LENGTH`, LITERAL a Python string or bytes literal.

// A trie's node: which bytes may follow, the node of the first of these (the others come after it, in order), and the
// id of the token that ends here (0: none does).
typedef struct TrieNode {
    uint64_t follow[4];
    int first, id;
} TrieNode;

typedef struct Tokenizer {
    LONG_PATH path;                                             // of the vocabulary; empty for bytes
    int n_ids;                                                  // ids 0 .. n_ids - 1 have a text
    uint8_t *texts;                                             // back to back
    int *starts;                                                // (n_ids + 1): where in texts an id's begins
    TrieNode *trie;                                             // NULL for bytes
} Tokenizer;

const char *end_of_text = "<|endoftext|>";                      // id 0
const char *default_vocabulary = "data/rwkv_vocab_v20230424.txt";

int text_length(const Tokenizer *t, int id) { return t->starts[id + 1] - t->starts[id]; }

// ---------------------------------------- Python literals

typedef struct Literal {                                        // where the parser stands
    const char *path;
    int64_t line;
    const char *at, *end;                                       // end: of the line
} Literal;

[[noreturn]] void literal_fail(const Literal *l, const char *expected) {
    const int left = (int)(l->end - l->at < 24 ? l->end - l->at : 24);
    die(2, "%s: line %ld: expected %s, found \"%.*s\"", l->path, l->line, expected, left, l->at);
}

int utf8_encode(uint32_t code, uint8_t *out) {                  // returns the number of bytes
    if (code < 0x80) { out[0] = (uint8_t)code; return 1; }
    const int n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, code >>= 6) { out[i] = (uint8_t)(0x80 | (code & 0x3F)); }
    out[0] = (uint8_t)((n == 2 ? 0xC0 : n == 3 ? 0xE0 : 0xF0) | code);
    return n;
}

uint32_t literal_digits(Literal *l, int least, int most, int base) {
    uint32_t value = 0;
    int n = 0;
    for (; n < most && l->at < l->end; n++, l->at++) {
        const int c = tolower((unsigned char)*l->at), digit = isdigit(c) ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : 99;
        if (digit >= base) { break; }
        value = value * (uint32_t)base + (uint32_t)digit;
    }
    if (n < least) { literal_fail(l, base == 16 ? "the hexadecimal digits of an escape" : "digits"); }
    return value;
}

// What follows a backslash, in a string (a code point, as UTF-8) or in bytes (one byte). Returns its length.
int literal_escape(Literal *l, bool bytes, uint8_t *out) {
    if (l->at == l->end) { literal_fail(l, "an escape"); }
    const char *single = "\\\\''\"\"a\ab\bf\fn\nr\rt\tv\v", c = *l->at;
    for (const char *s = single; *s; s += 2) {
        if (*s == c) { out[0] = (uint8_t)s[1]; l->at++; return 1; }
    }
    uint32_t code;
    if (c >= '0' && c <= '7') { code = literal_digits(l, 1, 3, 8); }
    else if (c == 'x') { l->at++; code = literal_digits(l, 2, 2, 16); }
    else if (c == 'u' && !bytes) { l->at++; code = literal_digits(l, 4, 4, 16); }
    else if (c == 'U' && !bytes) { l->at++; code = literal_digits(l, 8, 8, 16); }
    else if (c == 'N' && !bytes) { literal_fail(l, "no escape by a character's name"); }
    else { out[0] = '\\'; return 1; }                           // Python leaves unknown escapes as they stand
    if (bytes) { out[0] = (uint8_t)code; return 1; }
    if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) { literal_fail(l, "a code point that UTF-8 can hold"); }
    return utf8_encode(code, out);
}

// The literal at l->at; out has room for the line. Returns the number of its bytes.
int literal_parse(Literal *l, uint8_t *out) {
    const bool bytes = l->at < l->end && (*l->at == 'b' || *l->at == 'B');
    if (bytes) { l->at++; }
    const char quote = l->at < l->end ? *l->at : '\0';
    if (quote != '\'' && quote != '"') { literal_fail(l, "a Python string or bytes literal"); }
    int n = 0;
    for (l->at++; l->at < l->end && *l->at != quote; ) {
        if (*l->at == '\\') { l->at++; n += literal_escape(l, bytes, out + n); continue; }
        if (bytes && (uint8_t)*l->at >= 0x80) { literal_fail(l, "only ASCII in a bytes literal"); }
        out[n++] = (uint8_t)*l->at++;
    }
    if (l->at == l->end) { literal_fail(l, quote == '"' ? "a closing \"" : "a closing '"); }
    l->at++;
    return n;
}

// ---------------------------------------- the vocabulary

int64_t literal_number(Literal *l, const char *what) {
    char *end;
    const int64_t value = strtol(l->at, &end, 10);              // stops at the newline at the latest: the file ends with one
    if (!isdigit((unsigned char)*l->at) || end > l->end) { literal_fail(l, what); }
    l->at = end;
    return value;
}

void literal_space(Literal *l) {
    if (l->at == l->end || *l->at != ' ') { literal_fail(l, "a space"); }
    l->at++;
}

// Lines hold the ids 1, 2, 3, .. in order.
void vocabulary_read(Tokenizer *t, const char *path) {
    int64_t size;
    char field[64];
    const char *file = (const char *)map_file(path, &size), *end = file + size;
    if (end[-1] != '\n') { die(2, "%s: expected a newline at the end, found byte 0x%02x", path, (uint8_t)end[-1]); }
    if (size > INT_MAX / 2) { die(2, "%s: size: expected less than 1 GB, found %ld bytes", path, size); }
    int n_lines = 0, at = 0;
    for (const char *c = file; c < end; c++) { n_lines += *c == '\n'; }
    t->texts = (uint8_t *)malloc((size_t)size + sizeof(PATH));  // a literal is at least as long as its bytes
    t->starts = (int *)calloc((size_t)n_lines + 2, sizeof(int));
    at += sprintf((char *)t->texts, "%s", end_of_text);
    t->n_ids = 1;
    Literal l = {path, 0, file, NULL};
    for (const char *next = file; next < end; next = l.end + 1) {
        l.at = next;
        l.end = (const char *)memchr(next, '\n', (size_t)(end - next));
        l.line++;
        t->starts[t->n_ids] = at;
        snprintf(field, sizeof(field), "line %ld: id", l.line);
        expect(path, field, -1, t->n_ids, t->n_ids, literal_number(&l, "an id"));
        literal_space(&l);
        const int length = literal_parse(&l, t->texts + at);
        if (length == 0) { die(2, "%s: line %ld: expected a text, found an empty one", path, l.line); }
        literal_space(&l);
        snprintf(field, sizeof(field), "line %ld: length", l.line);
        expect(path, field, -1, length, length, literal_number(&l, "a length"));
        if (l.at < l.end && *l.at == '\r') { l.at++; }
        if (l.at != l.end) { literal_fail(&l, "the line's end"); }
        at += length;
        t->n_ids++;
    }
    t->starts[t->n_ids] = at;
    munmap((void *)file, (size_t)size);
}

int compare_texts(const void *a, const void *b, void *tokenizer) {
    const Tokenizer *t = (const Tokenizer *)tokenizer;
    const int x = *(const int *)a, y = *(const int *)b, nx = text_length(t, x), ny = text_length(t, y);
    const int order = memcmp(t->texts + t->starts[x], t->texts + t->starts[y], (size_t)(nx < ny ? nx : ny));
    return order ? order : nx != ny ? nx - ny : x - y;
}

// In sorted order the tokens that begin alike lie side by side: a node is a range of them. Level by level, each range
// falls into one range per byte that comes next.
void trie_build(Tokenizer *t) {
    typedef struct Range { int low, high, depth; } Range;
    const int n = t->n_ids - 1;
    int *order = (int *)malloc((size_t)n * sizeof(int)), n_nodes = 1;
    for (int i = 0; i < n; i++) { order[i] = i + 1; }
    qsort_r(order, (size_t)n, sizeof(int), compare_texts, t);
    for (int i = 1; i < n; i++) {
        const int x = order[i - 1], y = order[i], length = text_length(t, x);
        if (length != text_length(t, y) || memcmp(t->texts + t->starts[x], t->texts + t->starts[y], (size_t)length)) { continue; }
        die(2, "%s: line %d: expected a text of its own, found that of line %d", t->path, y, x);
    }
    const size_t most = (size_t)t->starts[t->n_ids] + 1;        // one node per byte, and the root
    t->trie = (TrieNode *)calloc(most, sizeof(TrieNode));
    Range *ranges = (Range *)malloc(most * sizeof(Range));
    ranges[0] = {0, n, 0};
    for (int node = 0; node < n_nodes; node++) {
        Range r = ranges[node];
        if (text_length(t, order[r.low]) == r.depth) { t->trie[node].id = order[r.low++]; }
        t->trie[node].first = n_nodes;
        for (int i = r.low; i < r.high; i++) {
            const uint8_t byte = t->texts[t->starts[order[i]] + r.depth];
            uint64_t *word = &t->trie[node].follow[byte / 64];
            if (*word >> byte % 64 & 1) { ranges[n_nodes - 1].high++; continue; }
            *word |= 1ull << byte % 64;
            ranges[n_nodes++] = {i, i + 1, r.depth + 1};
        }
    }
    free(order);
    free(ranges);
}

int trie_child(const TrieNode *node, uint8_t byte) {            // 0 (the root) if there is none
    const uint64_t word = node->follow[byte / 64], below = word & ((1ull << byte % 64) - 1);
    if (!(word >> byte % 64 & 1)) { return 0; }
    int child = node->first + __builtin_popcountll(below);
    for (int i = 0; i < byte / 64; i++) { child += __builtin_popcountll(node->follow[i]); }
    return child;
}

// path NULL: bytes.
void tokenizer_open(Tokenizer *t, const char *path) {
    memset(t, 0, sizeof(*t));
    if (!path) {
        t->n_ids = 257;
        t->texts = (uint8_t *)malloc(256);
        t->starts = (int *)calloc(258, sizeof(int));            // the text of id 0 is empty
        for (int i = 0; i < 256; i++) { t->texts[i] = (uint8_t)i; t->starts[i + 2] = i + 1; }
        return;
    }
    snprintf(t->path, sizeof(t->path), "%s", path);
    vocabulary_read(t, path);
    trie_build(t);
    for (int byte = 0; byte < 256; byte++) {
        const int child = trie_child(&t->trie[0], (uint8_t)byte);
        if (!child || !t->trie[child].id) { die(2, "%s: expected a token for byte 0x%02x, found none", path, byte); }
    }
}

void tokenizer_close(Tokenizer *t) {
    free(t->texts);
    free(t->starts);
    free(t->trie);
}

// ---------------------------------------- text to ids

// Longest matches from the left; every byte is a token, so there always is one. ids has room for n; returns their number.
int64_t encode_stretch(const Tokenizer *t, const uint8_t *text, int64_t n, int *ids) {
    int64_t count = 0;
    for (int64_t at = 0, next = 0; at < n; at = next) {
        const TrieNode *node = t->trie;
        for (int64_t i = at; i < n; ) {
            const int child = trie_child(node, text[i++]);
            if (!child) { break; }
            node = &t->trie[child];
            if (node->id) { ids[count] = node->id; next = i; }
        }
        count++;
    }
    return count;
}

int64_t encode(const Tokenizer *t, const uint8_t *text, int64_t n, int *ids) {
    int64_t count = 0;
    if (!t->trie) {
        for (int64_t i = 0; i < n; i++) { ids[i] = text[i] + 1; }
        return n;
    }
    for (const uint8_t *at = text, *end = text + n; at < end; ) {
        const uint8_t *mark = (const uint8_t *)memmem(at, (size_t)(end - at), end_of_text, strlen(end_of_text));
        count += encode_stretch(t, at, (mark ? mark : end) - at, ids + count);
        if (mark) { ids[count++] = 0; }
        at = mark ? mark + strlen(end_of_text) : end;
    }
    return count;
}

// ---------------------------------------- ids to text

// A stream of bytes, given out as valid UTF-8 only: bytes wait until their character is complete; U+FFFD takes the place
// of those that can't become one.
typedef struct Utf8 { uint8_t held[4]; int n, length; } Utf8;   // n bytes of a character of so many

const char *replacement = "\xEF\xBF\xBD";                       // U+FFFD

int utf8_end(Utf8 *u, uint8_t *out) {                           // what was held will not be completed
    if (u->n == 0) { return 0; }
    u->n = 0;
    memcpy(out, replacement, 3);
    return 3;
}

int utf8_push(Utf8 *u, uint8_t byte, uint8_t *out) {            // out has room for 6 bytes; returns how many were written
    int n = 0;
    if (u->n > 0) {
        const uint8_t lead = u->held[0];                        // some leads narrow what may come second: no overlong
        const bool second = u->n == 1;                          // forms, no surrogates, nothing above U+10FFFF
        const uint8_t low = second && lead == 0xE0 ? 0xA0 : second && lead == 0xF0 ? 0x90 : 0x80;
        const uint8_t high = second && lead == 0xED ? 0x9F : second && lead == 0xF4 ? 0x8F : 0xBF;
        if (byte >= low && byte <= high) {
            u->held[u->n++] = byte;
            if (u->n < u->length) { return 0; }
            u->n = 0;
            memcpy(out, u->held, (size_t)u->length);
            return u->length;
        }
        n = utf8_end(u, out);
    }
    if (byte < 0x80) { out[n] = byte; return n + 1; }
    u->length = byte < 0xC2 || byte > 0xF4 ? 0 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
    u->n = 1;                                                   // held, or to be replaced at once
    u->held[0] = byte;
    return u->length ? n : n + utf8_end(u, out + n);
}

#ifdef GOLDFINCH_TEST
// The interface of test_goldfinch.c to the tokenizer; vocab NULL: bytes
static const Tokenizer *tokenizer_for_test(const char *vocab) {
    static Tokenizer t;
    if (t.n_ids && strcmp(t.path, vocab ? vocab : "") == 0) { return &t; }
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
        if (at + length <= max) { memcpy(text + at, t->texts + t->starts[ids[i]], (size_t)length); }
        at += length;
    }
    return at;
}

int64_t gf_printable(const unsigned char *bytes, int64_t n, unsigned char *text) {      // text has room for 3 n
    Utf8 u = {};
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) { at += utf8_push(&u, bytes[i], text + at); }
    return at + utf8_end(&u, text + at);
}

}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 5. Sampler (spec section 10), on the device: only the id that was drawn comes to the host.
//
// No sorting. Logits become whole numbers with the same order (keys), probabilities whole numbers too (masses, in units
// of 2^-39 of the likeliest token's): sums of these are the same in any order, so that results are the same bits in
// every run. A token stays if what is likelier than it is lighter than top_p of all and fewer than top_k tokens; ids
// break ties for top_k. So the filters are one number, the smallest key that stays (the cut), and it is found digit by
// digit: per step, every block of threads weighs and counts its tokens by their key's next 4 bits, and the next step adds
// that up and walks down from the largest until too much is above. Eleven small launches, about V exponentials each.

static const int SAMPLE_THREADS = 256, SAMPLE_BLOCKS = 64, SAMPLE_TILE = 1024;
static const int SAMPLE_BINS = 16, SAMPLE_STEPS = 8;            // 8 digits of 4 bits

typedef struct Sampling {                                       // how to sample
    double temperature, top_p, presence, frequency, decay;
    int64_t top_k;                                              // 0: no limit
    uint64_t seed;
} Sampling;

typedef unsigned long long Mass;

struct SampleBin { Mass mass, count; };                         // of tokens with one digit

struct SampleCut {                                              // the cut's digits so far
    unsigned base;                                              // the cut is base or above it by less than the digits left
    float top;                                                  // the largest logit
    Mass mass, count, target;                                   // of the tokens above that; the mass that ends top_p
};

struct SampleState { int64_t position; double uniform; int drawn; };    // uniform: of the draw; below 0: from the seed

enum { TOKEN_BANNED = 1, TOKEN_UNCOUNTED = 2 };

struct Sampler {
    int V, blocks, tokens_of_block;
    float presence, frequency, decay, inverse_temperature;
    double top_p;
    Mass top_k;
    uint64_t seed;
    float *logits;                          // (V): with penalties, -infinity where banned
    float *counts;                          // (V): how often a token was drawn, decayed; NaN (bits 0xff..) if never
    uint8_t *kinds;                         // (V): TOKEN_..
    float *tops;                            // (blocks)
    SampleBin *bins;                        // (SAMPLE_STEPS, blocks, SAMPLE_BINS)
    SampleCut *cuts;                        // (SAMPLE_STEPS)
    Mass *weights, *sums;                   // (V), (blocks): what is drawn from
    SampleState *state;
    int *drawn;                             // on the host
};

__device__ inline unsigned sample_key(float z) {                // orders as z does
    const unsigned bits = __float_as_uint(z + 0.f);             // -0 becomes +0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline Mass sample_mass(float below_top) {           // e^below_top, at most 1
    const float e = expf(below_top);
    return e > 0 ? (Mass)(e * 549755813888.f) : 0;              // 2^39; NaN: 0
}

// logits with penalties and bans, and the largest of each block's. Before that, the last drawn token is counted.
__global__ void sample_adjust(Sampler s, const float *logits) {
    __shared__ float tops[SAMPLE_THREADS / 32];
    const int begin = blockIdx.x * s.tokens_of_block, end = min(begin + s.tokens_of_block, s.V), drawn = s.state->drawn;
    float top = -INFINITY;
    for (int i = begin + threadIdx.x; i < end; i += SAMPLE_THREADS) {
        const int kind = s.kinds[i];
        float count = s.counts[i] * s.decay, z = logits[i];
        if (i == drawn) count = (count >= 0 ? count : 0) + (kind & TOKEN_UNCOUNTED ? 0 : 1);
        s.counts[i] = count;
        if (count >= 0) z -= s.presence + count * s.frequency;
        z = kind & TOKEN_BANNED ? -INFINITY : z < INFINITY ? z : INFINITY;      // NaN: infinity, with which nothing is drawn
        s.logits[i] = z;
        top = fmaxf(top, z);
    }
    top = warp_max(top);
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < SAMPLE_THREADS / 32; i++) top = fmaxf(top, tops[i]);
    s.tops[blockIdx.x] = top;
}

// Adds up what the blocks found in the step before and chooses that digit of the cut; the same in every block.
__device__ inline SampleCut sample_cut(const Sampler &s, int step) {
    __shared__ SampleBin parts[SAMPLE_THREADS];
    __shared__ SampleCut chosen;
    const int bin = threadIdx.x / 16, lane = threadIdx.x % 16;
    const SampleBin *bins = s.bins + (int64_t)(step - 1) * s.blocks * SAMPLE_BINS;
    SampleBin sum = {0, 0};
    for (int b = lane; step > 0 && b < s.blocks; b += 16) {
        sum.mass += bins[b * SAMPLE_BINS + bin].mass;
        sum.count += bins[b * SAMPLE_BINS + bin].count;
    }
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (lane == 0) {                                            // its own is there already
        for (int i = 1; i < 16; i++) {
            parts[threadIdx.x].mass += parts[threadIdx.x + i].mass;
            parts[threadIdx.x].count += parts[threadIdx.x + i].count;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        SampleCut cut = {0, s.tops[0], 0, 0, ~0ull};
        if (step == 0) {
            for (int b = 1; b < s.blocks; b++) cut.top = fmaxf(cut.top, s.tops[b]);
        } else {
            cut = s.cuts[step - 1];
            if (step == 1 && s.top_p < 1) {                     // all tokens have one of these first digits
                Mass all = 0;
                for (int i = 0; i < SAMPLE_BINS; i++) all += parts[i * 16].mass;
                cut.target = (Mass)ceil(s.top_p * (double)all);
                cut.target = cut.target > 1 ? cut.target : 1;   // the likeliest token always stays
            }
            int digit = SAMPLE_BINS - 1;
            for (; digit > 0; digit--) {
                const SampleBin here = parts[digit * 16];
                if (cut.mass + here.mass >= cut.target || cut.count + here.count >= s.top_k) break;
                cut.mass += here.mass;
                cut.count += here.count;
            }
            cut.base += (unsigned)digit << (32 - 4 * step);
        }
        chosen = cut;
        if (blockIdx.x == 0 && step < SAMPLE_STEPS) s.cuts[step] = cut;
    }
    __syncthreads();
    return chosen;
}

// Weighs and counts the block's tokens that may be the cut, by the next digit of their keys.
__global__ void sample_narrow(Sampler s, int step) {
    __shared__ Mass masses[SAMPLE_TILE];
    __shared__ int digits[SAMPLE_TILE];                         // SAMPLE_BINS: not among them
    __shared__ SampleBin parts[SAMPLE_THREADS];
    const SampleCut cut = sample_cut(s, step);
    const int begin = blockIdx.x * s.tokens_of_block, end = min(begin + s.tokens_of_block, s.V), shift = 28 - 4 * step;
    const int bin = threadIdx.x / 16, lane = threadIdx.x % 16;
    SampleBin sum = {0, 0};
    for (int tile = begin; tile < end; tile += SAMPLE_TILE) {
        const int n = min(end - tile, SAMPLE_TILE);
        for (int i = threadIdx.x; i < n; i += SAMPLE_THREADS) {
            const float z = s.logits[tile + i];
            const unsigned digit = (sample_key(z) - cut.base) >> shift;         // huge for a key below base
            digits[i] = digit < (unsigned)SAMPLE_BINS ? (int)digit : SAMPLE_BINS;
            masses[i] = digit < (unsigned)SAMPLE_BINS ? sample_mass(z - cut.top) : 0;
        }
        __syncthreads();
        for (int i = lane; i < n; i += 16) {
            if (digits[i] != bin) continue;
            sum.mass += masses[i];
            sum.count++;
        }
        __syncthreads();
    }
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (lane > 0) return;
    for (int i = 1; i < 16; i++) {
        sum.mass += parts[threadIdx.x + i].mass;
        sum.count += parts[threadIdx.x + i].count;
    }
    s.bins[((int64_t)step * s.blocks + blockIdx.x) * SAMPLE_BINS + bin] = sum;
}

// The part of the block's tokens that the thread has; in a row, so that order by thread is order by id.
__device__ inline int2 sample_part(const Sampler &s, int block) {
    const int begin = block * s.tokens_of_block, end = min(begin + s.tokens_of_block, s.V);
    const int each = (end - begin + SAMPLE_THREADS - 1) / SAMPLE_THREADS, first = begin + (int)threadIdx.x * each;
    return make_int2(min(first, end), min(first + each, end));
}

// weights = p^(1/temperature) of the tokens that stay, 0 for others
__global__ void sample_weigh(Sampler s) {
    __shared__ int ties_of_thread[SAMPLE_THREADS];
    __shared__ Mass sums[SAMPLE_THREADS];
    const SampleCut cut = sample_cut(s, SAMPLE_STEPS);
    const SampleBin *ties = s.bins + (int64_t)(SAMPLE_STEPS - 1) * s.blocks * SAMPLE_BINS + cut.base % SAMPLE_BINS;
    const int2 part = sample_part(s, blockIdx.x);
    Mass room = s.top_k - cut.count;                            // for tokens whose key is the cut: those of the lowest ids
    for (int b = 0; b < (int)blockIdx.x; b++) room -= min(room, ties[b * SAMPLE_BINS].count);
    if (ties[blockIdx.x * SAMPLE_BINS].count > room) {          // the same for all threads
        int own = 0;
        for (int i = part.x; i < part.y; i++) own += sample_key(s.logits[i]) == cut.base;
        ties_of_thread[threadIdx.x] = own;
        __syncthreads();
        for (int i = 0; i < (int)threadIdx.x; i++) room -= min(room, (Mass)ties_of_thread[i]);
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
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x % 16 == 0) {
        for (int i = 1; i < 16; i++) sums[threadIdx.x] += sums[threadIdx.x + i];
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 16; i < SAMPLE_THREADS; i += 16) sums[0] += sums[i];
    s.sums[blockIdx.x] = sums[0];
}

__device__ inline uint64_t sample_mix(uint64_t z) {             // splitmix64
    z += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// Walks up the weights in the order of the ids to a number drawn below their sum: first by blocks, then by threads' parts,
// then by tokens. One block. A random number depends on the seed and the position in the context alone.
__global__ void sample_draw(Sampler s) {
    __shared__ Mass sums[SAMPLE_THREADS];
    __shared__ Mass rest;                                       // of the number, within the block that was hit
    __shared__ int block;
    const int t = threadIdx.x;
    SampleState *state = s.state;
    if (t < s.blocks) sums[t] = s.sums[t];
    __syncthreads();
    if (t == 0) {
        Mass total = 0;
        for (int b = 0; b < s.blocks; b++) total += sums[b];
        const uint64_t bits = sample_mix(sample_mix(s.seed) + (uint64_t)state->position) >> 11;
        const double uniform = state->uniform >= 0 ? state->uniform : (double)bits / 9007199254740992.0;   // 2^53
        rest = (Mass)(uniform * (double)total);
        if (total > 0) rest = min(rest, total - 1);
        for (block = 0; block < s.blocks && rest >= sums[block]; block++) rest -= sums[block];
        state->position++;
        if (total == 0) state->drawn = -1;
    }
    __syncthreads();
    if (block == s.blocks) return;                              // nothing to draw from
    const int2 part = sample_part(s, block);
    Mass sum = 0, before = 0;
    for (int i = part.x; i < part.y; i++) sum += s.weights[i];
    sums[t] = sum;
    __syncthreads();
    for (int i = 0; i < t; i++) before += sums[i];
    if (rest < before || rest - before >= sum) return;
    Mass left = rest - before;
    int id = part.x;
    while (left >= s.weights[id]) left -= s.weights[id++];
    state->drawn = id;
}

// ---------------------------------------- the host's part

// " 12" and the like are never counted: repeating them is no fault.
static bool text_uncounted(const uint8_t *text, int n) {
    const char *plain = " \t0123456789";
    return n > 0 && memmem(plain, strlen(plain), text, (size_t)n) != NULL;
}

void sampler_allocate(Sampler *s, int V, const Sampling *how, const uint8_t *kinds) {      // kinds (V)
    memset(s, 0, sizeof(*s));
    s->V = V;
    s->blocks = (int)(ceil_div(V, SAMPLE_TILE) < SAMPLE_BLOCKS ? ceil_div(V, SAMPLE_TILE) : SAMPLE_BLOCKS);
    s->tokens_of_block = (int)ceil_div(V, s->blocks);
    s->presence = (float)how->presence;
    s->frequency = (float)how->frequency;
    s->decay = (float)how->decay;
    s->inverse_temperature = how->temperature > 0 ? (float)(1 / how->temperature) : 1;
    s->top_p = how->top_p;
    s->top_k = how->temperature == 0 ? 1 : how->top_k == 0 ? ~0ull : (Mass)how->top_k;
    s->seed = how->seed;
    device_alloc((void **)&s->logits, V * sizeof(float));
    device_alloc((void **)&s->counts, V * sizeof(float));
    device_alloc((void **)&s->kinds, V);
    device_alloc((void **)&s->tops, s->blocks * sizeof(float));
    device_alloc((void **)&s->bins, SAMPLE_STEPS * s->blocks * SAMPLE_BINS * sizeof(SampleBin));
    device_alloc((void **)&s->cuts, SAMPLE_STEPS * sizeof(SampleCut));
    device_alloc((void **)&s->weights, V * sizeof(Mass));
    device_alloc((void **)&s->sums, s->blocks * sizeof(Mass));
    device_alloc((void **)&s->state, sizeof(SampleState));
    CUDA_CHECK(cudaMallocHost((void **)&s->drawn, sizeof(int)));
    CUDA_CHECK(cudaMemcpy(s->kinds, kinds, (size_t)V, cudaMemcpyHostToDevice));
}

// Token 0 stops, or is banned if ends_are_ignored; ids without a text are banned.
void sampler_open(Sampler *s, int V, const Sampling *how, const Tokenizer *t, bool ends_are_ignored) {
    uint8_t *kinds = (uint8_t *)calloc((size_t)V, 1);
    for (int id = 0; id < V; id++) {
        if (id >= t->n_ids || (id == 0 && ends_are_ignored)) { kinds[id] = TOKEN_BANNED; continue; }
        if (text_uncounted(t->texts + t->starts[id], text_length(t, id))) { kinds[id] = TOKEN_UNCOUNTED; }
    }
    sampler_allocate(s, V, how, kinds);
    free(kinds);
}

// Forgets what was drawn. position: of the next token in the context. uniform: the number to draw with, -1: from the seed.
void sampler_begin(Sampler *s, int64_t position, double uniform) {
    const SampleState state = {position, uniform, -1};
    CUDA_CHECK(cudaMemsetAsync(s->counts, 0xff, s->V * sizeof(float), stream));
    CUDA_CHECK(cudaMemcpyAsync(s->state, &state, sizeof(state), cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
}

// Queues a draw from logits (V); its id comes to *s->drawn. The arguments are the same every time: fit for a CUDA graph.
void sampler_queue(const Sampler *s, const float *logits) {
    sample_adjust<<<s->blocks, SAMPLE_THREADS, 0, stream>>>(*s, logits);
    for (int step = 0; step < SAMPLE_STEPS; step++) sample_narrow<<<s->blocks, SAMPLE_THREADS, 0, stream>>>(*s, step);
    sample_weigh<<<s->blocks, SAMPLE_THREADS, 0, stream>>>(*s);
    sample_draw<<<1, SAMPLE_THREADS, 0, stream>>>(*s);
    CUDA_CHECK(cudaMemcpyAsync(s->drawn, &s->state->drawn, sizeof(int), cudaMemcpyDeviceToHost, stream));
}

int sampler_result(const Sampler *s) {
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaGetLastError());
    if (*s->drawn < 0) { die(3, "the logits are not finite: there is nothing to draw from"); }
    return *s->drawn;
}

#ifdef GOLDFINCH_TEST
// The interface of test_goldfinch.c to the sampler
extern "C" {

// history: ids drawn before, oldest first. probabilities (V): of the next token, drawn with the number uniform.
void gf_sample_probabilities(const float *logits, int V, const int *history, int n_history, const int *uncounted, int n_uncounted,
                             const int *banned, int n_banned, double temperature, double top_p, int top_k, double presence,
                             double frequency, double decay, float *probabilities, double uniform, int *drawn) {
    const Sampling how = {temperature, top_p, presence, frequency, decay, top_k, 0};
    Sampler s;
    uint8_t *kinds = (uint8_t *)calloc((size_t)V, 1);
    float *device_logits;
    double total = 0;
    machine_start();
    for (int i = 0; i < n_uncounted; i++) { kinds[uncounted[i]] |= TOKEN_UNCOUNTED; }
    for (int i = 0; i < n_banned; i++) { kinds[banned[i]] |= TOKEN_BANNED; }
    sampler_allocate(&s, V, &how, kinds);
    device_alloc((void **)&device_logits, V * sizeof(float));
    CUDA_CHECK(cudaMemcpy(device_logits, logits, V * sizeof(float), cudaMemcpyHostToDevice));
    sampler_begin(&s, 0, uniform);
    for (int i = 0; i < n_history; i++) {                       // as if each of these had been drawn
        CUDA_CHECK(cudaMemcpy(&s.state->drawn, &history[i], sizeof(int), cudaMemcpyHostToDevice));
        if (i + 1 < n_history) { sample_adjust<<<s.blocks, SAMPLE_THREADS, 0, stream>>>(s, device_logits); }
        CUDA_CHECK(cudaStreamSynchronize(stream));
    }
    sampler_queue(&s, device_logits);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    *drawn = *s.drawn;
    Mass *weights = (Mass *)malloc((size_t)V * sizeof(Mass));
    CUDA_CHECK(cudaMemcpy(weights, s.weights, V * sizeof(Mass), cudaMemcpyDeviceToHost));
    for (int i = 0; i < V; i++) { total += (double)weights[i]; }
    for (int i = 0; i < V; i++) { probabilities[i] = (float)((double)weights[i] / total); }
    for (void *p : {(void *)s.logits, (void *)s.counts, (void *)s.kinds, (void *)s.tops, (void *)s.bins, (void *)s.cuts,
                    (void *)s.weights, (void *)s.sums, (void *)s.state, (void *)device_logits}) { cudaFree(p); }
    cudaFreeHost(s.drawn);
    free(kinds);
    free(weights);
}

}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 6. Command line: flags, prompt, continuation, score

typedef const char *TEXT;
typedef bool SWITCH;

// As SETTINGS in section 1 of the trainer. The values of sampling are those of the reference's demo.
#define OPTIONS(X) \
    X("-p", TEXT, prompt, NULL, 0, 0, "TEXT", "the prompt") \
    X("-f", TEXT, prompt_file, NULL, 0, 0, "FILE", "the prompt from a file, - for stdin") \
    X("-i", SWITCH, interactive, NULL, 0, 0, "", "then read lines from stdin; each goes on in the same context") \
    X("-n", INT, n, "256", 0, 1e12, "N", "tokens to go on for, at most") \
    X("-t", REAL, temperature, "1", 0, 100, "X", "temperature (0: always the likeliest token)") \
    X("--top-p", REAL, top_p, "0.7", 0, 1, "X", "draw among the likeliest tokens that make up so much probability") \
    X("--top-k", INT, top_k, "100", 0, 1e9, "N", "and among so many at most (0: no limit)") \
    X("--presence", REAL, presence, "0.25", -100, 100, "X", "taken off the logit of a token that was drawn before") \
    X("--frequency", REAL, frequency, "0.25", -100, 100, "X", "and once more for each time") \
    X("--penalty-decay", REAL, decay, "0.996", 0, 1, "X", "what is left of such a count after a token") \
    X("-s", INT, seed, "1", 0, 1e18, "N", "seed: the same one draws the same tokens") \
    X("--ignore-eos", SWITCH, ignore_eos, NULL, 0, 0, "", "never draw token 0 (otherwise it ends the text)") \
    X("--score", TEXT, score, NULL, 0, 0, "FILE", "loss, perplexity and accuracy of a text, in place of a continuation") \
    X("--window", INT, window, "0", 0, 1e12, "N", "score: start afresh every N tokens, as the trainer's validation (0: one context)") \
    X("--save-state", TEXT, save_state, NULL, 0, 0, "FILE", "write the state after the prompt") \
    X("--load-state", TEXT, load_state, NULL, 0, 0, "FILE", "go on from such a state") \
    X("--kv", TEXT, kv, "bf16", 0, 0, "KIND", "the cache: bf16, int8 (half of it), full (all keys and values)") \
    X("--vocab", TEXT, vocab, NULL, 0, 0, "FILE", "RWKV World vocabulary; byte-level models need none") \
    X("--cache-table", SWITCH, cache_table, NULL, 0, 0, "", "print how large caches are: MODEL's, or those of the paper's models")

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
    size_t offset;                                              // of the field in Options
} Option;

const Option options_table[] = {
#define ROW(flag, kind, name, initial, low, high, value, help) \
    {flag, #kind, initial, low, high, value, help, offsetof(Options, name)},
    OPTIONS(ROW)
#undef ROW
};
const int n_options = sizeof(options_table) / sizeof(options_table[0]);

void options_help(void) {
    printf("usage: %s [MODEL.safetensors] [-p TEXT | -f FILE] [FLAG ...]\n\n"
           "Goes on with a text. Without a MODEL: the newest checkpoint in out/.\n\n", program_name);
    for (int i = 0; i < n_options; i++) {
        const Option *row = &options_table[i];
        printf("  %-15s %-5s %s", row->flag, row->value, row->help);
        printf(row->initial ? "; default %s\n" : "\n", row->initial);
    }
}

void option_set(Options *o, const Option *row, const char *text) {
    char *field = (char *)o + row->offset, *end = NULL;
    if (strcmp(row->kind, "TEXT") == 0) { memcpy(field, &text, sizeof(text)); return; }
    const bool whole = strcmp(row->kind, "INT") == 0;
    const int64_t integer = whole ? strtoll(text, &end, 10) : 0;
    const double value = whole ? (double)integer : strtod(text, &end);
    if (end == text || *end || !(value >= row->low && value <= row->high)) {
        die(2, "%s: expected a %snumber from %.10g to %.10g, found \"%s\"", row->flag, whole ? "whole " : "", row->low, row->high, text);
    }
    memcpy(field, whole ? (const void *)&integer : (const void *)&value, 8);
}

void options_parse(Options *o, int argc, char **argv) {         // argv without the program's name
    memset(o, 0, sizeof(*o));
    for (int i = 0; i < n_options; i++) {
        if (options_table[i].initial) { option_set(o, &options_table[i], options_table[i].initial); }
    }
    for (int i = 0; i < argc; i++) {
        if (strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--help") == 0) { options_help(); exit(0); }
        const Option *row = NULL;
        for (int k = 0; k < n_options; k++) {
            if (strcmp(argv[i], options_table[k].flag) == 0) { row = &options_table[k]; }
        }
        if (!row && argv[i][0] == '-') { die(2, "unknown flag \"%s\" (-h lists them all)", argv[i]); }
        if (!row && o->model) { die(2, "expected one MODEL, found \"%s\" and \"%s\"", o->model, argv[i]); }
        if (!row) { o->model = argv[i]; continue; }
        if (strcmp(row->kind, "SWITCH") == 0) { *((bool *)o + row->offset) = true; continue; }
        if (++i == argc) { die(2, "%s: a value is missing", row->flag); }
        option_set(o, row, argv[i]);
    }
    const bool prompt = o->prompt || o->prompt_file;
    if (o->prompt && o->prompt_file) { die(2, "-p and -f: expected one prompt, found two"); }
    if (o->prompt_file && strcmp(o->prompt_file, "-") == 0 && o->interactive) { die(2, "-f - and -i: both read stdin"); }
    if (o->score && (prompt || o->interactive || o->save_state || o->load_state)) {
        die(2, "--score: expected no prompt and no state beside it");
    }
    if (o->window && !o->score) { die(2, "--window: expected only with --score"); }
    if (o->save_state && !prompt && !o->load_state) { die(2, "--save-state: expected a prompt to read before"); }
    if (!prompt && !o->interactive && !o->load_state && !o->score && !o->cache_table) {
        die(2, "a prompt is missing: -p TEXT, -f FILE or -i (-h lists all flags)");
    }
}

// ---------------------------------------- what is read

// The newest checkpoint in out/.
void default_model(char *path) {
    const int64_t step = checkpoint_newest("out");
    if (step < 0) { die(2, "no MODEL is named and out/ holds no checkpoint; ./train_goldfinch makes one"); }
    checkpoint_path(path, "out", "model", step, "");
}

// The World vocabulary in the working directory or beside the program.
const char *find_vocabulary(void) {
    static LONG_PATH path;
    if (access(default_vocabulary, R_OK) == 0) { return default_vocabulary; }
    const ssize_t n = readlink("/proc/self/exe", path, sizeof(PATH) - 1);
    char *slash = n > 0 ? (char *)memrchr(path, '/', (size_t)n) : NULL;
    if (!slash) { slash = path; }
    snprintf(slash, sizeof(path) - (size_t)(slash - path), "%s%s", slash > path ? "/" : "", default_vocabulary);
    if (access(path, R_OK) == 0) { return path; }
    die(2, "%s: expected here or beside the program, found in neither place; --vocab FILE names it", default_vocabulary);
}

// A vocabulary of the model's size, which is a multiple of 8; World has 65530 ids.
void model_tokenizer(Tokenizer *t, const char *model, const char *vocab, int64_t *vocab_size) {
    SafeTensors f;
    safetensors_open(&f, model);
    const FileTensor *embedding = safetensors_find(&f, "emb.weight");
    const char *type = safetensors_metadata(&f, "train.data_type");
    if (!embedding || embedding->ndim != 2) { die(2, "%s: tensor emb.weight: expected two dimensions, found no such tensor", model); }
    *vocab_size = embedding->shape[0];
    const bool bytes = *vocab_size <= 320 || (type && strcmp(type, "utf-8") == 0);
    safetensors_close(&f);
    tokenizer_open(t, vocab ? vocab : bytes ? NULL : find_vocabulary());
    const int64_t needed = *vocab_size < 65530 ? *vocab_size - 7 : 65530;
    expect(t->trie ? t->path : model, t->trie ? "ids" : "vocab_size, for bytes", -1, t->trie ? needed : 257, INT64_MAX,
           t->trie ? t->n_ids : *vocab_size);
}

// All of a file, a pipe, or stdin ("-").
uint8_t *read_text(const char *path, int64_t *size) {
    FILE *file = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    if (!file) { die(2, "%s: %s", path, strerror(errno)); }
    size_t room = 1 << 16, n = 0, got;
    uint8_t *text = (uint8_t *)malloc(room);
    while ((got = fread(text + n, 1, room - n, file)) > 0) {
        n += got;
        if (n == room) { text = (uint8_t *)realloc(text, room *= 2); }
    }
    if (ferror(file)) { die(2, "%s: %s", path, strerror(errno)); }
    if (file != stdin) { fclose(file); }
    *size = (int64_t)n;
    return text;
}

// Tokens that the model has; ids has room for n.
int64_t encode_for_model(const Tokenizer *t, const char *name, const uint8_t *text, int64_t n, int64_t vocab_size, int *ids) {
    const int64_t count = encode(t, text, n, ids);
    for (int64_t i = 0; i < count; i++) { expect(name, "token", i, 0, vocab_size - 1, ids[i]); }
    return count;
}

// ---------------------------------------- what is written

typedef struct Output { Utf8 utf8; uint8_t last; } Output;      // last: byte that was written

// To stdout at once. Whoever reads it may have had enough: no error.
void output_bytes(Output *out, const uint8_t *bytes, int n) {
    for (int done = 0; done < n; ) {
        const ssize_t wrote = write(STDOUT_FILENO, bytes + done, (size_t)(n - done));
        if (wrote < 0 && errno == EINTR) { continue; }
        if (wrote < 0 && errno == EPIPE) { exit(0); }
        if (wrote < 0) { die(1, "stdout: %s", strerror(errno)); }
        done += (int)wrote;
    }
    if (n > 0) { out->last = bytes[n - 1]; }
}

void output_token(Output *out, const Tokenizer *t, int id) {
    static uint8_t text[1 << 16];
    const uint8_t *bytes = t->texts + t->starts[id];
    int n = 0;
    for (int i = 0; i < text_length(t, id); i++) {
        n += utf8_push(&out->utf8, bytes[i], text + n);
        if (n > (int)sizeof(text) - 6) { output_bytes(out, text, n); n = 0; }
    }
    output_bytes(out, text, n);
}

void output_end(Output *out) {                                  // of a continuation: what is held, and a newline
    uint8_t text[4];
    int n = utf8_end(&out->utf8, text);
    if (n > 0 || (out->last && out->last != '\n')) { text[n++] = '\n'; }
    output_bytes(out, text, n);
    out->last = '\0';
}

const char *bytes_text(char *text, double bytes) {              // "1.23 GB"; text has room for 32
    const char *units[] = {"B", "KB", "MB", "GB", "TB", "PB"};
    int unit = 0;
    for (; unit < 5 && bytes >= 999.5; unit++) { bytes /= 1000; }
    snprintf(text, 32, "%.*f %s", unit == 0 || bytes >= 99.95 ? 0 : bytes >= 9.995 ? 1 : 2, bytes, units[unit]);
    return text;
}

// ---------------------------------------- a session

typedef struct Session {
    const Options *o;
    Infer *m;
    Tokenizer tokenizer;
    Sampler sampler;
    Output out;
    int64_t vocab_size, prompt_tokens, decoded;                 // decoded: tokens drawn but for the first ones
    double prompt_seconds, decode_seconds;
    int pending;                                                // drawn, but not fed yet; -1: none
} Session;

void session_read(Session *s, const int *ids, int64_t n) {      // reads a prompt, n > 0
    const double begin = seconds_now();
    infer_feed(s->m, ids, n);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    s->prompt_seconds += seconds_now() - begin;
    s->prompt_tokens += n;
}

// Draws and prints up to o->n tokens, each fed before the next is drawn.
void session_write(Session *s) {
    double begin = 0;
    sampler_begin(&s->sampler, infer_position(s->m), -1);
    for (int64_t i = 0; i < s->o->n && !stop_requested; i++) {
        if (s->pending >= 0) { infer_feed(s->m, &s->pending, 1); }
        s->pending = -1;
        sampler_queue(&s->sampler, infer_logits(s->m));
        const int id = sampler_result(&s->sampler);
        const double now = seconds_now();
        if (i > 0) { s->decode_seconds += now - begin; s->decoded++; }         // the first comes with the prompt
        begin = now;
        if (id == 0) { break; }
        output_token(&s->out, &s->tokenizer, id);
        s->pending = id;
    }
    output_end(&s->out);
}

// Each line goes on where the text ended, on a line of its own.
void session_interact(Session *s) {
    char *line = NULL;
    size_t room = 0;
    ssize_t n;
    while (!stop_requested) {
        if (isatty(STDIN_FILENO)) { fprintf(stderr, "> "); }
        if ((n = getline(&line, &room, stdin)) <= 0) { break; }
        if (line[n - 1] == '\n') { n--; }
        if (n == 0) { continue; }
        int *ids = (int *)malloc((size_t)(n + 2) * sizeof(int));
        int64_t count = 0;
        if (s->pending >= 0) { ids[count++] = s->pending; }
        s->pending = -1;
        if (infer_position(s->m) + count > 0) {
            const uint8_t newline = '\n';
            count += encode_for_model(&s->tokenizer, "stdin", &newline, 1, s->vocab_size, ids + count);
        }
        count += encode_for_model(&s->tokenizer, "stdin", (const uint8_t *)line, n, s->vocab_size, ids + count);
        session_read(s, ids, count);
        free(ids);
        session_write(s);
    }
    free(line);
}

void session_close(Session *s) {                                // the closing line
    int64_t cache;
    double per_token, transformer;
    char now[32], other[32];
    infer_cache_bytes(s->m, &cache, &per_token, &transformer);
    fprintf(stderr, "prompt %ld tokens, ", s->prompt_tokens);
    if (s->prompt_seconds > 0) { fprintf(stderr, "%.0f tok/s | ", (double)s->prompt_tokens / s->prompt_seconds); }
    if (s->decoded > 0) { fprintf(stderr, "decode %.1f tok/s | ", (double)s->decoded / s->decode_seconds); }
    fprintf(stderr, "context %ld tokens | cache %s, %.0f bytes per token (a transformer: %s, %.0f)\n", infer_position(s->m),
            bytes_text(now, (double)cache), per_token, bytes_text(other, transformer * (double)infer_position(s->m)), transformer);
}

// Loss of a text under the model, all layers at every position.
void session_score(Session *s, const int *ids, int64_t n, int64_t n_bytes) {
    const double begin = seconds_now();
    double loss;
    int64_t correct, targets;
    infer_score(s->m, ids, n, s->o->window, 0, &loss, &correct, &targets);
    const double seconds = seconds_now() - begin, mean = loss / (double)targets;
    printf("%s: %ld tokens, %ld bytes | loss %.6f per token, %.6f per byte | perplexity %.4f | accuracy %.2f %% | %.0f tok/s\n",
           s->o->score, n, n_bytes, mean, mean * (double)n / (double)n_bytes, exp(mean), 100 * (double)correct / (double)targets,
           (double)targets / seconds);
}

// ---------------------------------------- the paper's comparison: what a context costs to remember

// A row: parameters, bytes per token, and all that is carried at 1 k .. 1 M tokens. Plans the model, allocates nothing.
void cache_table_row(const char *label, const Settings *settings, KvKind kv) {
    Infer f = {};
    char text[32];
    f.kv = kv;
    model_plan(&f.m, settings, 1, 1);
    f.G = has_cache(&f.m) ? f.m.d.L - f.m.d.G0 : 0;
    printf("%-22s %8.3f G %10ld", label, (double)f.m.n_parameters * 1e-9, cache_bytes_per_token(&f));
    for (int64_t T = 1024; T <= 1 << 20; T *= 4) { printf(" %9s", bytes_text(text, (double)carried_bytes(&f, T))); }
    printf("\n");
    model_free_plan(&f.m);
}

void cache_table_head(const char *title) {
    printf("%-22s %10s %10s %9s %9s %9s %9s %9s %9s\n", title, "parameters", "B/token", "1 k", "4 k", "16 k", "64 k", "256 k", "1 M");
}

void cache_table(void) {                                        // the families of the paper at its sizes
    const struct { const char *label, *config; double compression; KvKind kv; } families[] = {
        {"Llama", "llama", 16, KV_COMPRESSED}, {"GPTAlpha", "gptalpha", 16, KV_COMPRESSED},
        {"Finch-C2 + GPTAlpha", "goldfinch_ablation_gptalpha", 16, KV_COMPRESSED},
        {"GoldFinch, --kv full", "goldfinch", 16, KV_FULL}, {"GoldFinch 1:1", "goldfinch", 1, KV_COMPRESSED},
        {"GoldFinch 1:16", "goldfinch", 16, KV_COMPRESSED}, {"GoldFinch, --kv int8", "goldfinch", 16, KV_INT8},
        {"Finch", "finch", 16, KV_COMPRESSED}, {"Finch-C2", "finchc2", 16, KV_COMPRESSED},
    };
    const int sizes[3][2] = {{12, 768}, {24, 2048}, {32, 4096}};
    for (const auto &size : sizes) {
        char title[32];
        snprintf(title, sizeof(title), "L%d D%d, %d-byte c", size[0], size[1], (int)sizeof(floatX));
        cache_table_head(title);
        for (const auto &family : families) {
            Settings s;
            settings_default(&s);
            config_read(&s, family.config, true);
            s.n_layer = size[0], s.n_embd = size[1], s.kv_cache_compression_ratio = family.compression;
            settings_check(&s);
            cache_table_row(family.label, &s, family.kv);
        }
        printf("\n");
    }
}

#if !defined(GOLDFINCH_TEST) && !defined(GOLDFINCH_INFER_NO_MAIN)
int main(int argc, char **argv) {
    program_name = "infer_goldfinch";
    static Session session;                                     // zeros
    Session *s = &session;
    Options options, *o = &options;
    LONG_PATH model;
    options_parse(o, argc - 1, argv + 1);
    s->o = o;
    s->pending = -1;
    const int kind = strcmp(o->kv, "bf16") == 0 ? KV_COMPRESSED : strcmp(o->kv, "int8") == 0 ? KV_INT8 :
                     strcmp(o->kv, "full") == 0 ? KV_FULL : -1;
    if (kind < 0) { die(2, "--kv: expected bf16, int8 or full, found \"%s\"", o->kv); }
    if (o->cache_table && !o->model) { cache_table(); return 0; }
    if (o->model) { snprintf(model, sizeof(model), "%s", o->model); } else { default_model(model); }
    if (o->cache_table) {
        SafeTensors file;
        Settings settings;
        safetensors_open(&file, model);
        settings_of_model(&settings, &file);
        cache_table_head("model");
        cache_table_row("this one", &settings, (KvKind)kind);
        return 0;
    }
    model_tokenizer(&s->tokenizer, model, o->vocab, &s->vocab_size);

    // The text first: its length says how much context is needed.
    const char *name = o->score ? o->score : o->prompt_file ? o->prompt_file : o->prompt ? "-p" : NULL;
    int64_t n = 0, n_bytes = 0, before = 0;
    int *ids = NULL;
    if (name) {
        const uint8_t *text = (const uint8_t *)o->prompt;
        if (text) { n_bytes = (int64_t)strlen(o->prompt); } else { text = read_text(name, &n_bytes); }
        if (n_bytes == 0) { die(2, "%s: expected a %s, found an empty one", name, o->score ? "text" : "prompt"); }
        ids = (int *)malloc((size_t)n_bytes * sizeof(int));
        n = encode_for_model(&s->tokenizer, name, text, n_bytes, s->vocab_size, ids);
        if (!o->prompt) { free((void *)text); }
    }
    if (o->load_state) {
        SafeTensors state;
        safetensors_open(&state, o->load_state);
        before = safetensors_number(&state, "position");
        safetensors_close(&state);
    }
    const int64_t context = o->interactive ? 0 : o->score ? (o->window && o->window < n ? o->window + 1 : n) : before + n + o->n;
    if (o->score) { expect(name, "tokens", -1, 2, INT64_MAX, n); }
    s->m = infer_open(model, (KvKind)kind, context);            // 0: as much as the engine sees fit
    if (o->score) { session_score(s, ids, n, n_bytes); return 0; }

    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_handler = SIG_IGN;
    sigaction(SIGPIPE, &action, NULL);                          // write() says so
    action.sa_handler = request_stop;
    action.sa_flags = (int)SA_RESETHAND;                        // a second Ctrl-C ends the program at once
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    const Sampling how = {o->temperature, o->top_p, o->presence, o->frequency, o->decay, o->top_k, (uint64_t)o->seed};
    sampler_open(&s->sampler, (int)s->vocab_size, &how, &s->tokenizer, o->ignore_eos);
    if (o->load_state) { infer_load_state(s->m, o->load_state); }
    if (n > 0) { session_read(s, ids, n); }
    free(ids);
    if (o->save_state) { infer_save_state(s->m, o->save_state); }
    if (n > 0 || !o->interactive) { session_write(s); }
    if (o->interactive) { session_interact(s); }
    session_close(s);
    return 0;
}
#endif
