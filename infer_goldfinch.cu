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
    int C, H, R, R16, rank16;
};

typedef struct Infer {
    Model m;                                // the first member: a layer's forward function finds the rest through it
    KvKind kv;
    int chunk, tail, G;                     // tokens of a pre-fill chunk; 2 G + 1; number of GOLD layers
    int64_t capacity, position;             // most tokens of context; tokens so far
    int64_t row_position;                   // context position of the first row that the GOLD layers work on
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

struct ReadTask {
    const floatX *q;                        // (M, C)
    int64_t first, T;                       // query m sees tokens 0 .. first + m; tokens in the cache
    float *out, *top, *sum;                 // per split: (M, C), (M, H)
    int M, tiles_per_split;
};

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
template <int tiles> __device__ inline void read_mix(const ReadSmem &s, const GoldSource &g, const GoldSource::Side &side, const floatX *h) {
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

static const Mixer GOLD_FROM_CACHE = {"gold", GOLD, 0, true, gold_plan, gold_cached_forward, nullptr};

// ---------------------------------------------------------------------------------------------------------------------
// 3. Engine

// ---- memory ----

static int64_t cache_bytes_per_token(const Infer *f) {
    const int64_t C = f->m.d.C, R = f->m.d.R;
    if (!has_cache(&f->m)) return 0;
    if (f->kv == KV_FULL) return sizeof(int) + 2 * f->G * C * (int64_t)sizeof(floatX);
    return sizeof(int) + (f->kv == KV_INT8 ? R + (int64_t)sizeof(float) : R * (int64_t)sizeof(floatX));
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
        g.C = d.C, g.H = d.H, g.R = d.R, g.R16 = R16, g.rank16 = rank16;
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

static void settings_from_tensors(Settings *s, const SafeTensors *file) {
    char name[64];
    settings_default(s);
    s->vocab_size = shape_of(file, "emb.weight", 0), s->n_embd = shape_of(file, "emb.weight", 1);
    if (!s->n_embd) die(2, "%s: tensor emb.weight: expected, not found", file->path);
    int64_t L = 0, G0 = -1;
    for (;; L++) {
        snprintf(name, sizeof name, "blocks.%d.ln1.weight", (int)L);
        if (!shape_of(file, name, 0)) break;
        snprintf(name, sizeof name, "blocks.%d.att.time_maa_q_w1", (int)L);
        if (G0 < 0 && shape_of(file, name, 0)) G0 = L;
    }
    s->n_layer = L;
    s->dim_ffn = shape_of(file, "blocks.0.ffn.key.weight", 0);
    s->dim_att = shape_of(file, "blocks.0.att.output.weight", 1);
    if (G0 < 0) s->tmix2[0] = s->cmix2[0] = '\0';
    else s->inv_other_layer_ratio = (double)L / (double)(L - G0);
    if (G0 >= 0 && shape_of(file, "w_kv_cache_a.weight", 0))
        s->kv_cache_compression_ratio = (double)s->n_embd / (double)shape_of(file, "w_kv_cache_a.weight", 0);
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
    const int64_t weights = m->n_block * (int64_t)(sizeof(floatX) + 4), tables = f->G ? (int64_t)d.V * (2 * d.C + 128 * f->G) * sizeof(floatX) : 0;
    const int64_t need = weights + tables + m->activation_bytes + (int64_t)CUBLAS_WORKSPACE + (256 << 20), per_token = cache_bytes_per_token(f);
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
        else device_alloc((void **)&layer->wkv_state, (int64_t)d.H * N * N * sizeof(float));
    }
    device_alloc((void **)&f->logits, d.V * sizeof(float));
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

Infer *infer_open(const char *path, KvKind kv, int64_t capacity) {
    SafeTensors file;
    Settings s;
    safetensors_open(&file, path);
    if (safetensors_metadata(&file, "model.n_layer")) {
        settings_default(&s);
        settings_load(&s, &file);
    } else {
        settings_from_tensors(&s, &file);
    }
    settings_check(&s);
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
        if (strcmp(t->dtype, list[i].dtype) != 0) die(2, "%s: tensor %s: dtype: expected %s, found %s", path, t->name, list[i].dtype, t->dtype);
        expect(path, list[i].name, -1, list[i].count * list[i].width, list[i].count * list[i].width, t->end - t->begin);
        CUDA_CHECK(cudaMemcpy(list[i].p, file.data + t->begin, t->end - t->begin, cudaMemcpyHostToDevice));
    }
    free(list);
    safetensors_close(&file);
}

void infer_cache_bytes(const Infer *f, int64_t *total, double *per_token, double *transformer_per_token) {
    const Dims &d = f->m.d;
    int64_t states = 0;
    for (int l = 0; l < d.L; l++)
        states += 2 * d.C * sizeof(floatX) + (f->m.layers[l].wkv_state ? (int64_t)d.H * N * N * 4 : 0);
    *per_token = (double)cache_bytes_per_token(f);
    *total = states + f->position * cache_bytes_per_token(f);
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
            CUDA_CHECK(cudaMemcpyAsync((floatX *)f->sources[i].keys + at * d.C, layer->gold.k + d.C, bytes, cudaMemcpyDeviceToDevice, stream));
            CUDA_CHECK(cudaMemcpyAsync((floatX *)f->sources[i].values + at * d.C, layer->gold.v + d.C, bytes, cudaMemcpyDeviceToDevice, stream));
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
    matmul(logits, d.V, rows((const floatX *)f->m.xf + (int64_t)row * d.C, d.C), columns((const floatX *)f->m.top.head.w, d.C), count, d.V, d.C);
}

// n tokens go on from the context; afterwards the logits of the last one are ready. What the GOLD layers' shifts carry is
// exact before and after: short input goes through them as it stands, of longer input the last 2 G + 1 tokens do.
void infer_feed(Infer *f, const int *ids, int64_t n) {
    Model *m = &f->m;
    const Dims &d = m->d;
    if (f->position + n > f->capacity && f->G)
        die(2, "the context would be %ld tokens long, expected at most %ld", f->position + n, f->capacity);
    f->tail_rows = 0;
    for (int64_t done = 0; done < n; done += f->chunk) infer_chunk(f, ids + done, (int)(n - done < f->chunk ? n - done : f->chunk), false);
    if (f->G) {
        set_batch(m, 1, f->tail_rows + 1);
        CUDA_CHECK(cudaMemcpyAsync(m->layers[d.G0].x + d.C, f->tail_x[f->tail_now], (size_t)f->tail_rows * d.C * sizeof(floatX),
                                   cudaMemcpyDeviceToDevice, stream));
        f->row_position = f->position - f->tail_rows;
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
            linear_forward(m->logits, m->xf + (int64_t)(1 + row) * d.C, m->top.head, count, d.V, d.C);
            classifier_kernel<<<count, d.V < 4096 ? 64 : 512, 0, stream>>>(m->logits, m->losses + row, m->right + row, targets + row, 0, d.V);
        }
        sum_losses<<<1, 256, 0, stream>>>(m->totals, m->losses, m->right, here);
        CUDA_CHECK(cudaStreamSynchronize(stream));                          // ids + done may be the caller's pageable memory
    }
    CUDA_CHECK(cudaMemcpy(totals, m->totals, sizeof totals, cudaMemcpyDeviceToHost));
    *loss_sum += totals[0];
    *correct += (int64_t)totals[1];
}

// n tokens; window 0: one context; otherwise a fresh one for every `window` predictions, as the trainer's validation.
// chunk: tokens at a time, at most the engine's own (0: that).
void infer_score(Infer *f, const int *ids, int64_t n, int64_t window, int chunk, double *loss_sum, int64_t *correct, int64_t *targets) {
    *loss_sum = 0, *correct = *targets = 0;
    if (chunk <= 0 || chunk > f->chunk) chunk = f->chunk;
    for (int64_t at = 0; at + 1 < n; at += window ? window + 1 : n) {
        const int64_t predictions = window && n - at - 1 > window ? window : n - at - 1;
        if (f->G && predictions > f->capacity) die(2, "a context of %ld tokens, expected at most %ld", predictions, f->capacity);
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
    for (float *p : {f->partial_out, f->partial_top, f->partial_sum}) cudaFree(p);
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
