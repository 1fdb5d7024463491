// Twins of some kernels for the CPU, in plain loops: what launches such a kernel calls its twin instead (README.md
// here). train_goldfinch.cu includes this behind its kernels, whose words and equations it shares.
#pragma once

using cuda_on_cpu::fused;

// The kernel's twin for the CPU, to the bit
static void add_partials_in_loops(Targets to, float *matrix, const float *partial, int P, int rows, int n, int C,
                                  int parts) {
    const int64_t all = (int64_t)(rows + n) * C;
    cuda_on_cpu::for_each(all / 32, 32 * P, [&](int64_t block) {
        const int64_t at = block * 32, row = at / C;
        float sums[32][32] = {}, *target = row < rows ? matrix + at : to.g[row - rows] + at % C;
        for (int i = 0; i < P; i++)
            for (int c = 0; c < 32; c++) sums[i % parts][c] += partial[i * all + at + c];
        for (int i = 1; i < parts; i++)
            for (int c = 0; c < 32; c++) sums[0][c] += sums[i][c];
        for (int c = 0; c < 32; c++) target[c] += sums[0][c];
    });
}

// What the kernel's block_sum is of a row
static float sum_of_row(float *x, int C) {
    float sums[MAX_C / 8]; // of each thread
    memset(sums, 0, row_threads(C) * sizeof(float));
    for (int t = 0; t < C / 8; t++)
        for (int i = 0; i < 8; i++) sums[t] += x[8 * t + i];
    return cuda_on_cpu::sum_as_block(sums, row_threads(C));
}

// The kernel's twin for the CPU, to the bit
static void layernorm_forward_in_loops(floatX *out, floatX *sum, const floatX *x, const int *index,
                                       const floatX *branch, const LayerNorm &ln, int rows, int C) {
    cuda_on_cpu::for_each(
        rows, 4 * C,
        [&](int64_t row) {
            const int64_t at = row * C, from = index ? (int64_t)index[row] * C : at;
            float v[MAX_C], squares[MAX_C];
            for (int c = 0; c < C; c++) v[c] = (float)x[from + c];
            for (int c = 0; c < C && branch; c++) {
                sum[at + c] = (floatX)(v[c] + (float)branch[at + c]);
                v[c] = (float)sum[at + c];
            }
            const float mean = sum_of_row(v, C) / C;
            for (int c = 0; c < C; c++) {
                v[c] -= mean;
                squares[c] = v[c] * v[c];
            }
            const float rstd = rsqrtf(sum_of_row(squares, C) / C + 1e-5f);
            for (int c = 0; c < C; c++) out[at + c] = (floatX)(v[c] * rstd * (float)ln.gain.w[c] + (float)ln.bias.w[c]);
        });
}

// The same of x y
static float product_of_rows(const float *x, const float *y, int C) {
    float sums[MAX_C / 8];
    memset(sums, 0, row_threads(C) * sizeof(float));
    for (int t = 0; t < C / 8; t++)
        for (int i = 0; i < 8; i++) sums[t] += x[8 * t + i] * y[8 * t + i];
    return cuda_on_cpu::sum_as_block(sums, row_threads(C));
}

template <bool accumulate> // to the bit
static void layernorm_backward_in_loops(floatX *dx, float *partial, const floatX *dout, const floatX *x,
                                        const int *index, const floatX *gain, int rows, int per, int C) {
    const float per_channel = 1.f / C;
    cuda_on_cpu::for_each(ceil_div(rows, per), 8 * per * C, [&](int64_t part) {
        float n[MAX_C], dy[MAX_C], dn[MAX_C], *dgain = partial + part * 2 * C, *dbias = dgain + C;
        memset(dgain, 0, 2 * C * sizeof(float));
        for (int64_t row = part * per; row < rows && row < (part + 1) * per; row++) {
            const floatX *from = x + (index ? index[row] : row) * C;
            floatX *to = dx + row * C;
            for (int c = 0; c < C; c++) n[c] = (float)from[c];
            const float mean = sum_of_row(n, C) * per_channel;
            for (int c = 0; c < C; c++) {
                n[c] -= mean;
                dy[c] = (float)dout[row * C + c];
                dn[c] = dy[c] * (float)gain[c];
            }
            const float rstd = rsqrtf(product_of_rows(n, n, C) * per_channel + 1e-5f);
            const float dn_mean = sum_of_row(dn, C) * per_channel;
            const float dn_n_mean = product_of_rows(dn, n, C) * rstd * per_channel;
            for (int c = 0; c < C; c++) {
                n[c] *= rstd;
                dgain[c] += dy[c] * n[c];
                dbias[c] += dy[c];
                const float here = rstd * (dy[c] * (float)gain[c] - dn_mean - n[c] * dn_n_mean);
                to[c] = (floatX)(accumulate ? (float)to[c] + here : here);
            }
        }
    });
}

static void rms_norm_forward_in_loops(floatX *out, const floatX *x, int rows, int C) { // to the bit
    cuda_on_cpu::for_each(
        rows, 2 * C,
        [&](int64_t row) {
            float squares[MAX_C];
            for (int c = 0; c < C; c++) squares[c] = (float)x[row * C + c] * (float)x[row * C + c];
            const float scale = 1 / (sqrtf(sum_of_row(squares, C) / C) + 1e-8f);
            for (int c = 0; c < C; c++) out[row * C + c] = (floatX)((float)x[row * C + c] * scale);
        });
}

// to the bit
static void classifier_in_loops(floatX *logits, float *losses, int *right, const int *targets, float scale, int V,
                                int count, int threads) {
    cuda_on_cpu::for_each(
        count, 32 * V,
        [&](int64_t row) {
            floatX *z = logits + row * V;
            const int target = targets[row];
            losses[row] = 0, right[row] = 0;
            if (target < 0) {
                for (int c = 0; c < V && scale != 0; c++) z[c] = (floatX)0.f;
                return;
            }
            const float of_target = (float)z[target];
            float top = -INFINITY, sums[1024], x[8 * 1024];
            memset(sums, 0, threads * sizeof(float));
            for (int c = 0; c < V; c++) top = (float)z[c] > top ? (float)z[c] : top;
            int at = 0;
            while (at < V - 1 && (float)z[at] != top) at++;
            for (int begin = 0; begin < V; begin += 8 * threads) {
                const int n = min(8 * threads, V - begin);
                for (int i = 0; i < n; i++) x[i] = fast_exp((float)z[begin + i] - top);
                for (int i = 0; i < n; i++) sums[i / 8] += x[i];
            }
            const float sum = cuda_on_cpu::sum_as_block(sums, threads);
            losses[row] = logf(sum) + top - of_target;
            right[row] = at == target;
            if (scale == 0) return;
            const float inverse = 1 / sum, factor = scale * inverse;
            for (int c = 0; c < V; c++) z[c] = (floatX)(fast_exp((float)z[c] - top) * factor);
            const float of_top = inverse + 1e-4f * top, p = fast_exp(of_target - top) * inverse;
            z[at] = (floatX)(scale * of_top);
            z[target] = (floatX)(scale * ((at == target ? of_top : p) - 1));
        });
}

static void squares_of_pieces_in_loops(double *squares, const float *grads, const Piece *pieces, int n) { // to the bit
    cuda_on_cpu::for_each(
        n, PIECE,
        [&](int64_t i) {
            const float *g = grads + pieces[i].offset;
            float sums[256] = {};
            for (int at = 0; at < pieces[i].count; at += 8)
                for (int j = 0; j < 8; j++) sums[at / 8 % 256] += g[at + j] * g[at + j];
            squares[pieces[i].number] = cuda_on_cpu::sum_as_block(sums, 256);
        });
}

// ---- ddlerp's twins for the CPU: 64 channels of a row at a time, each number by the same operations in the same order
// as in the kernels ----

// to (wide) += h (K) w (K, wide), one row of tile products: sums in ascending k
template <int wide, int K, typename H, typename W>
static void add_row_product(float *to, const H *h, const W *w, int64_t ld) {
    using cuda_on_cpu::Vector, cuda_on_cpu::VL, cuda_on_cpu::load_floats;
    Vector sums[wide / VL];
    memcpy(sums, to, sizeof(sums));
    for (int k = 0; k < K; k++)
#pragma GCC unroll 16
        for (int v = 0; v < wide / VL; v++)
            sums[v] = fused((float)h[k] - Vector{}, load_floats<Vector>(w + k * ld + v * VL), sums[v]);
    memcpy(to, sums, sizeof(sums));
}

// c_i = mu_i + h_i w2_i
template <int n>
static void ddlerp_amounts_in_loops(float *amount, const MixTask<n> &mix, int i, int64_t row, int first, int C) {
    for (int c = 0; c < MIX_CHANNELS; c++) amount[c] = (float)mix.mu[i][first + c];
    add_row_product<MIX_CHANNELS, MIX_RANK>(amount, mix.low.h + row * mix.low.ld + MIX_RANK * i,
                                            mix.low.w2 + (int64_t)MIX_RANK * i * C + first, C);
}

// shift(x) - x
static void shift_difference(float *diff, const floatX *x, int64_t row, int first, int T, int C) {
    const floatX *now = x + row * C + first, *before = row % T ? now - C : nullptr;
    for (int c = 0; c < MIX_CHANNELS; c++) diff[c] = (before ? (float)before[c] : 0) - (float)now[c];
}

template <int n> static void ddlerp_forward_in_loops(const MixTask<n> &mix, const floatX *x, int BT, int T, int C) {
    const int64_t cost = n * MIX_RANK * C;
    cuda_on_cpu::for_each(BT, cost, [&](int64_t row) {
        for (int first = 0; first < C; first += MIX_CHANNELS) {
            const int64_t at = row * C + first;
            float diff[MIX_CHANNELS], amount[MIX_CHANNELS];
            shift_difference(diff, x, row, first, T, C);
            for (int i = 0; i < n; i++) {
                ddlerp_amounts_in_loops(amount, mix, i, row, first, C);
                for (int c = 0; c < MIX_CHANNELS; c++)
                    mix.x[i][at + c] = (floatX)((float)x[at + c] + diff[c] * amount[c]);
            }
        }
    });
}

// dx and dh. Rows are walked from last to first, so that the next token's part is at hand.
template <int n, typename TX, bool accumulate>
static void ddlerp_backward_x_in_loops(const MixTask<n> &mix, TX *dx, floatX *dh, const floatX *x, int BT, int T,
                                       int C) {
    const int rows = 16, hidden = MIX_RANK * n;
    float *w2 = (float *)malloc((int64_t)hidden * C * sizeof(float)); // transposed: (C, hidden)
    for (int k = 0; k < hidden; k++)
        for (int c = 0; c < C; c++) w2[(int64_t)c * hidden + k] = (float)mix.low.w2[(int64_t)k * C + c];
    cuda_on_cpu::for_each(ceil_div(BT, rows), (int64_t)rows * n * MIX_RANK * C * 2, [&](int64_t part) {
        const int64_t begin = part * rows, end = BT < begin + rows ? BT : begin + rows;
        float dhidden[rows][MIX_RANK * n] = {};
        for (int first = 0; first < C; first += MIX_CHANNELS) {
            float next[MIX_CHANNELS] = {}; // sum_i g_i c_i of the row after this one
            for (int64_t row = end < BT ? end : end - 1; row >= begin; row--) {
                const int64_t at = row * C + first;
                float diff[MIX_CHANNELS], amount[MIX_CHANNELS], dm[MIX_CHANNELS], now[MIX_CHANNELS] = {};
                shift_difference(diff, x, row, first, T, C);
                for (int i = 0; i < n; i++) {
                    const floatX *g = mix.x[i] + at;
                    ddlerp_amounts_in_loops(amount, mix, i, row, first, C);
                    for (int c = 0; c < MIX_CHANNELS; c++) now[c] += (float)g[c] * amount[c];
                    if (row == end) continue;
                    for (int c = 0; c < MIX_CHANNELS; c++) dm[c] = (float)(floatX)((float)g[c] * diff[c]);
                    add_row_product<MIX_RANK, MIX_CHANNELS>(dhidden[row - begin] + MIX_RANK * i, dm,
                                                            w2 + (int64_t)first * hidden + MIX_RANK * i, hidden);
                }
                for (int c = 0; c < MIX_CHANNELS && row < end; c++) {
                    float out = accumulate ? (float)dx[at + c] : 0;
                    out += next[c] - now[c];
                    for (int i = 0; i < n; i++) out += (float)mix.x[i][at + c];
                    dx[at + c] = (TX)out;
                }
                for (int c = 0; c < MIX_CHANNELS; c++) next[c] = row % T ? now[c] : 0;
            }
        }
        for (int64_t row = begin; row < end; row++)
            for (int k = 0; k < hidden; k++) {
                const float h = (float)mix.low.h[row * mix.low.ld + k];
                dh[row * mix.low.ld + k] = (floatX)(dhidden[row - begin][k] * (1 - h * h));
            }
    });
    free(w2);
}

// partial sums of dw2 and dmu
template <int n>
static void ddlerp_backward_w2_in_loops(const MixTask<n> &mix, float *partial, const floatX *x, int BT, int T, int C,
                                        int split) {
    const int64_t cost = ceil_div(BT, split) * MIX_RANK * C;
    const int64_t others = (int64_t)(split - 1) * MIX_W2_ROWS; // rows of other parts between two tiles of a part
    cuda_on_cpu::for_each(split * n, cost, [&](int64_t task) {
        const int64_t part = task / n, i = task % n;
        float *to = partial + part * (MIX_RANK + 1) * n * C;
        for (int first = 0; first < C; first += MIX_CHANNELS) {
            float dw2[MIX_RANK][MIX_CHANNELS] = {}, dmu[4][MIX_CHANNELS] = {}; // dmu: of the lanes that share a column
            for (int64_t row = part * MIX_W2_ROWS; row < BT; row += (row + 1) % MIX_W2_ROWS ? 1 : 1 + others) {
                float diff[MIX_CHANNELS], dm[MIX_CHANNELS];
                shift_difference(diff, x, row, first, T, C);
                for (int c = 0; c < MIX_CHANNELS; c++) dm[c] = (float)mix.x[i][row * C + first + c] * diff[c];
                for (int c = 0; c < MIX_CHANNELS; c++) dmu[row % 8 / 2][c] += dm[c];
                for (int c = 0; c < MIX_CHANNELS; c++) dm[c] = (float)(floatX)dm[c];
                for (int k = 0; k < MIX_RANK; k++) {
                    const float h = (float)mix.low.h[row * mix.low.ld + MIX_RANK * i + k];
                    for (int c = 0; c < MIX_CHANNELS; c++) dw2[k][c] = fused(h, dm[c], dw2[k][c]);
                }
            }
            for (int k = 0; k < MIX_RANK; k++) memcpy(to + (MIX_RANK * i + k) * C + first, dw2[k], sizeof(dw2[k]));
            for (int c = 0; c < MIX_CHANNELS; c++)
                to[(MIX_RANK * n + i) * C + first + c] = (dmu[0][c] + dmu[2][c]) + (dmu[1][c] + dmu[3][c]);
        }
    });
}

// ---- WKV's twins for the CPU, to the bit: tile by tile as the kernels, but all channels of a token side by side ----

typedef float WkvRows[TILE][N]; // (tokens, channels)
typedef float WkvSquare[N][N];

// c (m x n) += a b, b (K x n), a[i][k] = a[i * si + k * sk]. Each sum in ascending k, as mma's.
template <int m, int n, int K>
static void add_product(float (*c)[n], const float *a, int si, int sk, const float (*b)[n]) {
    using cuda_on_cpu::Vector, cuda_on_cpu::VL;
    constexpr int wide = n / VL < 2 ? 1 : 2;
    for (int i = 0; i < m; i += 4)
        for (int j = 0; j < n; j += wide * VL) {
            Vector sums[4][wide];
            for (int r = 0; r < 4; r++)
                for (int v = 0; v < wide; v++) sums[r][v] = cuda_on_cpu::load_floats<Vector>(&c[i + r][j + v * VL]);
            for (int k = 0; k < K; k++)
#pragma GCC unroll 2
                for (int v = 0; v < wide; v++) {
                    const Vector right = cuda_on_cpu::load_floats<Vector>(&b[k][j + v * VL]);
#pragma GCC unroll 4
                    for (int r = 0; r < 4; r++)
                        sums[r][v] = fused(a[(i + r) * si + k * sk] - Vector{}, right, sums[r][v]);
                }
            for (int r = 0; r < 4; r++)
                for (int v = 0; v < wide; v++) memcpy(&c[i + r][j + v * VL], &sums[r][v], sizeof(Vector));
        }
}

// to[j][i] = from[i][j], rounded to floatX or not
template <typename X, int rows, int columns> static void transpose(float (*to)[rows], const float (*from)[columns]) {
    for (int i = 0; i < rows; i += 4)
        for (int j = 0; j < columns; j += 4) {
            cuda_on_cpu::Vector4 column[4];
            cuda_on_cpu::transpose_4x4(column, &from[i][j], columns);
            for (int l = 0; l < 4; l++)
                for (int r = 0; r < 4; r++) to[j + l][i + r] = (float)(X)column[l][r];
        }
}

// A sum over the lanes of a channel
static void add_lanes(float *sum, const float (*lanes)[N]) {
    for (int c = 0; c < N; c++) sum[c] = (lanes[0][c] + lanes[2][c]) + (lanes[1][c] + lanes[3][c]);
}

static void multiply(WkvRows &to, const WkvRows &a, const WkvRows &b) {
    for (int t = 0; t < TILE; t++)
        for (int c = 0; c < N; c++) to[t][c] = a[t][c] * b[t][c];
}

struct WkvTileInLoops {                        // a tile and what belongs to it
    WkvRows r, k, v, e, d;                     // k times 1 - exp(-e) if one_minus_w
    WkvRows before, after;                     // decays to the tile's beginning and end
    float twos[8][N], fours[8][N], half[2][N]; // products of d: of two tokens (2 i, 2 i + 1), of four, of eight
    float D[N], D_minus_1[N];

    // as wkv_factors
    void factors(WkvRows &f, int L) const {
        static const struct Ones {
            float x[N];
            Ones() {
                for (float &one : x) one = 1;
            }
        } ones;
        for (int t = 0; t < TILE; t++) {
            const int two = t / 2;
            const bool later = L == 16 || t & L;
            if (L == 1) {
                memcpy(f[t], ones.x, sizeof(f[t]));
                continue;
            }
            const float *beside = L != 2 && later == (two & 1) ? twos[two ^ 1] : ones.x;
            const float *beyond = L != 2 && L != 4 && later == (two >> 1 & 1) ? fours[two ^ 2] : ones.x;
            const float *other = L == 16 && t >= 8 ? half[0] : L == 0 && t < 8 ? half[1] : ones.x;
            const float *own = later == t % 2 ? d[t ^ 1] : ones.x;
            for (int c = 0; c < N; c++) f[t][c] = beside[c] * beyond[c] * other[c] * own[c];
        }
    }

    // the tile at token t0 of the sequence whose first number is at `head`, its channel of A
    void load(const Wkv &p, int64_t head, int channel, int t0) {
        float decay[N];
        for (int c = 0; c < N; c++) decay[c] = p.time_decay ? (float)p.time_decay[channel + c] : 0;
        for (int t = 0; t < TILE; t++) {
            const bool inside = t0 + t < p.T;
            const int64_t at = head + (int64_t)(t0 + t) * p.H * N;
            for (int c = 0; c < N; c++) {
                r[t][c] = inside ? (float)p.r[at + c] : 0;
                k[t][c] = inside ? (float)p.k[at + c] : 0;
                v[t][c] = inside ? (float)p.v[at + c] : 0;
                e[t][c] = !inside ? -INFINITY : p.w ? (float)p.w[at + c] : 0;
            }
            for (int c = 0; c < N; c++) {
                const float x = fast_exp(e[t][c] + decay[c]);
                e[t][c] = x < 128 ? x : 128;
            }
            for (int c = 0; c < N; c++) d[t][c] = fast_exp(-e[t][c]);
            for (int c = 0; c < N && p.one_minus_w; c++) k[t][c] *= one_minus(d[t][c], e[t][c]);
        }
        for (int i = 0; i < 8; i++)
            for (int c = 0; c < N; c++) twos[i][c] = d[2 * i][c] * d[2 * i + 1][c];
        for (int i = 0; i < 8; i++)
            for (int c = 0; c < N; c++) fours[i][c] = twos[i][c] * twos[i ^ 1][c];
        for (int i = 0; i < 2; i++)
            for (int c = 0; c < N; c++) half[i][c] = fours[4 * i][c] * fours[4 * i + 2][c];
        factors(before, 16);
        factors(after, 0);
        float lanes[4][N], sum[N];
        for (int l = 0; l < 4; l++)
            for (int c = 0; c < N; c++) lanes[l][c] = e[2 * l][c] + e[2 * l + 1][c] + e[2 * l + 8][c] + e[2 * l + 9][c];
        add_lanes(sum, lanes);
        for (int c = 0; c < N; c++) D[c] = fast_exp(-sum[c]);
        for (int c = 0; c < N; c++) D_minus_1[c] = -one_minus(D[c], sum[c]);
    }

    // as wkv_level
    template <int L> void level(WkvRows &x, WkvRows &factor) const {
        factors(factor, L);
        for (int t = 0; t < TILE; t++)
            for (int c = 0; c < N; c++) x[t][c] = (t & L ? r : k)[t][c] * factor[t][c];
    }

    // The scores of a level, of each warp's channels, which lie side by side here, then of all
    template <int L> static void scores(float (&a)[TILE][TILE], const WkvRows &x) {
        WkvRows rounded;
        cuda_on_cpu::Vector4 warps[TILE][16];
        for (int t = 0; t < TILE; t++)
            for (int c = 0; c < N; c++) rounded[t][c] = (float)(floatX)x[t][c];
        for (int t = 0; t < TILE; t++)
            for (int c = 0; c < 16; c += 4)
                cuda_on_cpu::transpose_4x4((cuda_on_cpu::Vector4(&)[4])warps[t][c], &rounded[t][c], 16);
        for (int t = 0; t < TILE; t++) {
            if (!(t & L)) continue;
            const int first = t & -2 * L;
            cuda_on_cpu::Vector4 sums[L] = {};
            for (int i = 0; i < 16; i++) { // of a warp's channels, the even ones first: see Share
                const int c = i % 8 * 2 + i / 8;
                for (int s = 0; s < L; s++) sums[s] = fused(warps[t][c], warps[first + s][c], sums[s]);
            }
            for (int s = 0; s < L; s++) a[t][first + s] = (sums[s][0] + sums[s][1]) + (sums[s][2] + sums[s][3]);
        }
    }

    // the diagonal, as wkv_scores_bonus
    void bonus(float (&a)[TILE][TILE], const floatX *u) const {
        for (int t = 0; t < TILE; t++) {
            float x[N / 2];
            for (int c = 0; c < N / 2; c++)
                x[c] = (float)u[2 * c] * r[t][2 * c] * k[t][2 * c] +
                       (float)u[2 * c + 1] * r[t][2 * c + 1] * k[t][2 * c + 1];
            for (int n = N / 4; n > 0; n /= 2)
                for (int c = 0; c < n; c++) x[c] = x[2 * c] + x[2 * c + 1];
            a[t][t] = x[0];
        }
    }

    // S^T (values, keys) <- D S^T + v^T left, left: k~
    void update(WkvSquare &S, const WkvRows &rows, const WkvRows &left) const {
        for (int j = 0; j < N; j++)
            for (int i = 0; i < N; i++) S[j][i] += S[j][i] * D_minus_1[i];
        add_product<N, N, TILE>(S, rows[0], 1, N, left);
    }
};

static void wkv_forward_in_loops(floatX *y, const Wkv &p, int B) {
    const int A = p.H * N, chunks = ceil_div(p.T, CHUNK);
    const int64_t cost = (int64_t)p.T * N * N;
    cuda_on_cpu::for_each(B * p.H, cost, [&](int64_t bh) {
        const int64_t head = bh / p.H * p.T * A + bh % p.H * N;
        const int channel = bh % p.H * N;
        WkvSquare S = {}, rounded; // S: (values, keys); rounded: (keys, values)
        float *carry = p.carry ? p.carry + bh * N * N : nullptr;
        if (carry) memcpy(S, carry, sizeof(S));
        for (int t0 = 0; t0 < p.T; t0 += TILE) {
            if (p.states && !carry && t0 % CHUNK == 0)
                memcpy(p.states + (bh * chunks + t0 / CHUNK) * N * N, S, sizeof(S));
            WkvTileInLoops t;
            WkvRows x, factor, out = {};
            float a[TILE][TILE] = {};
            t.load(p, head, channel, t0);
            t.level<8>(x, factor), t.scores<8>(a, x);
            t.level<4>(x, factor), t.scores<4>(a, x);
            t.level<2>(x, factor), t.scores<2>(a, x);
            t.level<1>(x, factor), t.scores<1>(a, x);
            if (p.u) t.bonus(a, p.u + channel);
            for (int i = 0; i < TILE; i++)
                for (int c = 0; c < N; c++) {
                    t.before[i][c] = (float)(floatX)(t.r[i][c] * t.before[i][c]);
                    t.after[i][c] = (float)(floatX)(t.k[i][c] * t.after[i][c]);
                }
            transpose<floatX, N, N>(rounded, S);
            add_product<TILE, N, N>(out, t.before[0], N, 1, rounded);
            add_product<TILE, N, TILE>(out, a[0], TILE, 1, t.v);
            t.update(S, t.v, t.after);
            for (int i = 0; i < TILE && t0 + i < p.T; i++) {
                const int64_t at = head + (int64_t)(t0 + i) * A;
                for (int c = 0; c < N; c++) y[at + c] = (floatX)(out[i][c] + (p.v2 ? (float)p.v2[at + c] : 0));
            }
        }
        if (carry) memcpy(carry, S, sizeof(S));
    });
}

// The levels' part of the gradients, as wkv_backward_levels
template <int L>
static void wkv_backward_level_in_loops(const WkvTileInLoops &t, float (&a)[TILE][TILE], const float (&da)[TILE][TILE],
                                        WkvRows &dr, WkvRows &dk, WkvRows &passing) {
    WkvRows x, factor, z = {};
    t.level<L>(x, factor);
    t.scores<L>(a, x);
    for (int i = 0; i < TILE; i++) {
        const int first = (i & -2 * L) + (i & L ? 0 : L); // of those that i has pairs with
        for (int s = first; s < first + L; s++)
            for (int c = 0; c < N; c++) z[i][c] = fused(da[i > s ? i : s][i > s ? s : i], x[s][c], z[i][c]);
    }
    for (int i = 0; i < TILE; i++)
        for (int c = 0; c < N; c++) (i & L ? dr : dk)[i][c] += z[i][c] * factor[i][c];
    multiply(z, z, x);
    for (int i = 0; i < TILE && L > 1; i++)
        for (int s = i & -L; s < (i & -L) + L; s++)
            for (int c = 0; c < N && (i & L ? s > i : s < i); c++) passing[i][c] += z[s][c];
}

static void wkv_backward_in_loops(const WkvGradients &g, const Wkv &p, int B) {
    const int A = p.H * N, chunks = ceil_div(p.T, CHUNK);
    const int64_t cost = (int64_t)p.T * N * N * 3;
    cuda_on_cpu::for_each(B * p.H, cost, [&](int64_t bh) {
        const int64_t head = bh / p.H * p.T * A + bh % p.H * N;
        const int channel = bh % p.H * N;
        const floatX *u = p.u ? p.u + channel : nullptr;
        WkvTileInLoops tile[TILES];
        WkvSquare S0[TILES], dS = {}, dS_rounded; // (values, keys); rounded: (keys, values)
        float dw_sum[4][N] = {}, du[4][N] = {};   // of the lanes that share a channel
        for (int chunk = chunks - 1; chunk >= 0; chunk--) {
            const int c0 = chunk * CHUNK, tiles = min(TILES, (p.T - c0 + TILE - 1) / TILE);
            memcpy(S0[0], p.states + (bh * chunks + chunk) * N * N, sizeof(S0[0]));
            for (int q = 0; q < tiles; q++) {
                tile[q].load(p, head, channel, c0 + q * TILE);
                if (q == tiles - 1) continue;
                WkvRows left;
                multiply(left, tile[q].k, tile[q].after);
                memcpy(S0[q + 1], S0[q], sizeof(S0[q]));
                tile[q].update(S0[q + 1], tile[q].v, left);
            }
            for (int q = tiles - 1; q >= 0; q--) {
                const WkvTileInLoops &t = tile[q];
                const int t0 = c0 + q * TILE;
                WkvRows dy, dr = {}, dk = {}, dv = {}, passing, tilde;
                float da[TILE][TILE] = {}, a[TILE][TILE] = {}, v_t[N][TILE], lanes[4][N] = {}, past[N];
                for (int i = 0; i < TILE; i++)
                    for (int c = 0; c < N; c++)
                        dy[i][c] = t0 + i < p.T ? (float)g.dy[head + (int64_t)(t0 + i) * A + c] : 0;
                // as wkv_backward_products
                transpose<float, TILE, N>(v_t, t.v);
                add_product<TILE, N, N>(dr, dy[0], N, 1, S0[q]);
                add_product<TILE, N, N>(dk, t.v[0], N, 1, dS);
                add_product<TILE, TILE, N>(da, dy[0], N, 1, v_t);
                for (int j = 0; j < N; j++)
                    for (int i = 0; i < N; i++) lanes[j % 8 / 2][i] += S0[q][j][i] * dS[j][i];
                transpose<floatX, N, N>(dS_rounded, dS);
                // as wkv_backward_states
                for (int l = 0; l < 4; l++)
                    for (int c = 0; c < N; c++) lanes[l][c] *= t.D[c];
                add_lanes(past, lanes);
                for (int i = 0; i < TILE; i++) memcpy(passing[i], past, sizeof(past));
                multiply(tilde, t.r, t.before);
                t.update(dS, dy, tilde);
                multiply(tilde, tilde, dr);
                multiply(dr, dr, t.before);
                for (int i = 0; i < TILE; i++)
                    for (int s = i + 1; s < TILE; s++)
                        for (int c = 0; c < N; c++) passing[i][c] += tilde[s][c];
                multiply(tilde, t.k, t.after);
                WkvRows after;
                for (int i = 0; i < TILE; i++)
                    for (int c = 0; c < N; c++) after[i][c] = (float)(floatX)tilde[i][c];
                multiply(tilde, tilde, dk);
                multiply(dk, dk, t.after);
                for (int i = 0; i < TILE; i++)
                    for (int s = 0; s < i; s++)
                        for (int c = 0; c < N; c++) passing[i][c] += tilde[s][c];
                wkv_backward_level_in_loops<8>(t, a, da, dr, dk, passing);
                wkv_backward_level_in_loops<4>(t, a, da, dr, dk, passing);
                wkv_backward_level_in_loops<2>(t, a, da, dr, dk, passing);
                wkv_backward_level_in_loops<1>(t, a, da, dr, dk, passing);
                if (u) t.bonus(a, u);
                for (int i = 0; i < TILE && u; i++) // as wkv_backward_bonus
                    for (int c = 0; c < N; c++) {
                        const float own = da[i][i];
                        dr[i][c] += (float)u[c] * t.k[i][c] * own;
                        dk[i][c] += (float)u[c] * t.r[i][c] * own;
                        du[i % 8 / 2][c] += t.r[i][c] * t.k[i][c] * own;
                    }
                add_product<TILE, N, N>(dv, after[0], N, 1, dS_rounded);
                add_product<TILE, N, TILE>(dv, a[0], 1, TILE, dy);
                for (int i = 0; i < TILE && t0 + i < p.T; i++) { // as wkv_backward_store
                    const int64_t at = head + (int64_t)(t0 + i) * A;
                    float dw[N];
                    for (int c = 0; c < N; c++) dw[c] = -t.e[i][c] * passing[i][c];
                    for (int c = 0; c < N && p.one_minus_w; c++) {
                        dw[c] += dk[i][c] * (float)p.k[at + c] * t.e[i][c] * t.d[i][c];
                        dk[i][c] *= one_minus(t.d[i][c], t.e[i][c]);
                    }
                    for (int c = 0; c < N; c++) {
                        dw_sum[i % 8 / 2][c] += dw[c];
                        g.dr[at + c] = (floatX)dr[i][c];
                        g.dk[at + c] = (floatX)dk[i][c];
                        g.dv[at + c] = (floatX)dv[i][c];
                        if (g.dw) g.dw[at + c] = (floatX)dw[c];
                    }
                }
            }
        }
        const int64_t at = bh / p.H * A + channel;
        add_lanes(g.dw_sum + at, dw_sum);
        add_lanes(g.du + at, du);
    });
}

// ---- attention's twins for the CPU, to the bit: squares of 32 queries by 32 keys as in the kernels ----

static const int ATTENTION_SQUARE = 32;
typedef float HeadRows[ATTENTION_SQUARE][N]; // so many tokens of a head
typedef float AttentionSquare[ATTENTION_SQUARE][ATTENTION_SQUARE];

static void head_rows(HeadRows &to, const floatX *from, int t0, int T, int A) { // zeros past the end
    for (int i = 0; i < ATTENTION_SQUARE; i++)
        for (int c = 0; c < N; c++) to[i][c] = t0 + i < T ? (float)from[(int64_t)(t0 + i) * A + c] : 0;
}

static void attention_square(AttentionSquare &p, const HeadRows &a, const HeadRows &b) { // p = a b^T
    float b_t[N][ATTENTION_SQUARE];
    transpose<float, ATTENTION_SQUARE, N>(b_t, b);
    memset(p, 0, sizeof(p));
    add_product<ATTENTION_SQUARE, ATTENTION_SQUARE, N>(p, a[0], N, 1, b_t);
}

static void attention_forward_in_loops(floatX *y, float *log_sum, const floatX *q, const floatX *k, const floatX *v,
                                       int B, int T, int H) {
    const int A = H * N, squares = ceil_div(T, ATTENTION_SQUARE);
    cuda_on_cpu::for_each((int64_t)B * H * squares, T * ATTENTION_SQUARE * N, [&](int64_t i) {
        const int t0 = (squares - 1 - i % squares) * ATTENTION_SQUARE;
        const int64_t bh = i / squares, head = bh / H * T * A + bh % H * N;
        HeadRows queries, rows, out = {};
        AttentionSquare p;
        float top[ATTENTION_SQUARE], sum[ATTENTION_SQUARE][4] = {}; // sums: of the lanes that share a row
        for (float &x : top) x = -INFINITY;
        head_rows(queries, q + head, t0, T, A);
        for (int s0 = 0; s0 <= t0; s0 += ATTENTION_SQUARE) {
            auto keys = [&](int row) { return s0 == t0 ? row + 1 : ATTENTION_SQUARE; }; // that the row has
            float high[ATTENTION_SQUARE];
            bool grows = false;
            head_rows(rows, k + head, s0, T, A);
            attention_square(p, queries, rows);
            for (int r = 0; r < ATTENTION_SQUARE; r++) {
                high[r] = -INFINITY;
                for (int s = 0; s < keys(r); s++) high[r] = p[r][s] > high[r] ? p[r][s] : high[r];
                grows |= high[r] * SCALE_LOG2 > top[r] + ATTENTION_MARGIN;
            }
            for (int r = 0; r < ATTENTION_SQUARE && grows; r++) {
                const float now = fmaxf(top[r], high[r] * SCALE_LOG2), shrink = exp2_fast(top[r] - now);
                top[r] = now;
                for (float &x : sum[r]) x *= shrink;
                for (float &x : out[r]) x *= shrink;
            }
            for (int r = 0; r < ATTENTION_SQUARE; r++) {
                float x[ATTENTION_SQUARE] = {};
                for (int s = 0; s < keys(r); s++) x[s] = exp2_fast(p[r][s] * SCALE_LOG2 - top[r]);
                for (int s = 0; s < ATTENTION_SQUARE; s += 8)
                    for (int l = 0; l < 4; l++) sum[r][l] = sum[r][l] + x[s + 2 * l] + x[s + 2 * l + 1];
                for (int s = 0; s < ATTENTION_SQUARE; s++) p[r][s] = (float)(floatX)x[s];
            }
            head_rows(rows, v + head, s0, T, A);
            add_product<ATTENTION_SQUARE, N, ATTENTION_SQUARE>(out, p[0], ATTENTION_SQUARE, 1, rows);
        }
        for (int r = 0; r < ATTENTION_SQUARE && t0 + r < T; r++) {
            const float all = (sum[r][0] + sum[r][2]) + (sum[r][1] + sum[r][3]), inverse = 1 / all;
            log_sum[bh * T + t0 + r] = top[r] + log2f(all);
            for (int c = 0; c < N; c++) y[head + (int64_t)(t0 + r) * A + c] = (floatX)(out[r][c] * inverse);
        }
    });
}

static void attention_backward_in_loops(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int B,
                                        int T, int H) {
    const int A = H * N, squares = ceil_div(T, ATTENTION_SQUARE);
    HeadRows *dkv = (HeadRows *)calloc((size_t)B * H * squares * 2, sizeof(HeadRows)); // dk, dv
    cuda_on_cpu::for_each((int64_t)B * H, (int64_t)T * T * N, [&](int64_t bh) {
        const int64_t head = bh / H * T * A + bh % H * N;
        HeadRows *const dk = dkv + bh * squares * 2, *const dv = dk + squares;
        auto store = [&](floatX *to, const HeadRows &x, float scale, int t0) {
            for (int r = 0; r < ATTENTION_SQUARE && t0 + r < T; r++)
                for (int c = 0; c < N; c++) to[head + (int64_t)(t0 + r) * A + c] = (floatX)(x[r][c] * scale);
        };
        for (int i = 0; i < squares; i++) {
            const int t0 = i * ATTENTION_SQUARE;
            HeadRows queries, dy, keys, values, dq = {};
            head_rows(queries, q + head, t0, T, A);
            head_rows(dy, g.dy + head, t0, T, A);
            for (int j = 0; j <= i; j++) {
                AttentionSquare p, ds;
                head_rows(keys, k + head, j * ATTENTION_SQUARE, T, A);
                head_rows(values, v + head, j * ATTENTION_SQUARE, T, A);
                attention_square(p, queries, keys);
                attention_square(ds, dy, values);
                for (int r = 0; r < ATTENTION_SQUARE; r++)
                    for (int s = 0; s < ATTENTION_SQUARE; s++) {
                        const bool here = t0 + r < T && (j < i || s <= r);
                        const int64_t row = bh * T + t0 + r;
                        const float weight = here ? exp2_fast(p[r][s] * SCALE_LOG2 - g.log_sum[row]) : 0;
                        ds[r][s] = here ? (float)(floatX)(weight * (ds[r][s] - g.delta[row])) : 0;
                        p[r][s] = (float)(floatX)weight;
                    }
                add_product<ATTENTION_SQUARE, N, ATTENTION_SQUARE>(dv[j], p[0], 1, ATTENTION_SQUARE, dy);
                add_product<ATTENTION_SQUARE, N, ATTENTION_SQUARE>(dk[j], ds[0], 1, ATTENTION_SQUARE, queries);
                add_product<ATTENTION_SQUARE, N, ATTENTION_SQUARE>(dq, ds[0], ATTENTION_SQUARE, 1, keys);
            }
            store(g.dq, dq, SCALE, t0);
        }
        for (int j = 0; j < squares; j++) {
            store(g.dk, dk[j], SCALE, j * ATTENTION_SQUARE);
            store(g.dv, dv[j], 1, j * ATTENTION_SQUARE);
        }
    });
    free(dkv);
}
