// The matrix product of every linear layer:    out (M, O) = x (M, I) W^T,  W (O, I)
//
// Floor: 2 M O I flops at the rate of the tensor cores. Bytes (x, W and out once) only matter if a side is small.
//
// The question is how often a number is used once it has been read. An H100 does 300 bf16 flops in the time a byte
// takes from memory, and about 60 in the time one takes from shared memory.
//
//     1 a thread a number: two loads for every multiply-add, and neighbouring lanes read rows of W that lie I numbers
//       apart
//     2 tiles of 32 x 32 in shared memory: each number from memory is used 32 times, but each multiply-add still costs
//       two reads from shared memory
//     3 tiles of 128 x 128, of which a thread computes 8 x 8: 16 reads from shared memory for 64 multiply-adds
//     4 tensor cores: a warp computes 64 x 32 out of 16x8 tiles; the next 32 columns of x and W are copied in the
//       background (cp.async, two buffers) while these are multiplied
//     5 in use: cuBLAS. What it has more on Hopper: copies by the TMA unit and products of four warps at once, which
//       read their operands from shared memory themselves (wgmma)
//
//     make -C dev matmul && dev/matmul [VERSION [M O I]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static int M, O, I;
static Array<floatX> x, W, out;

// ---- 1: a thread a number ----

__global__ void matmul_1(floatX *out, const floatX *x, const floatX *W, int M, int O, int I) {
    const int m = blockIdx.y * blockDim.y + threadIdx.y, o = blockIdx.x * blockDim.x + threadIdx.x;
    if (m >= M || o >= O) return;
    float sum = 0;
    for (int i = 0; i < I; i++) sum += (float)x[(int64_t)m * I + i] * (float)W[(int64_t)o * I + i];
    out[(int64_t)m * O + o] = (floatX)sum;
}

// ---- 2: tiles in shared memory ----

__global__ void matmul_2(floatX *out, const floatX *x, const floatX *W, int M, int O, int I) {
    __shared__ float x_tile[32][33]; // 33: a column's numbers lie in different banks
    __shared__ float W_tile[32][33];
    const int m0 = blockIdx.y * 32, o0 = blockIdx.x * 32, row = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = 0;
    for (int i0 = 0; i0 < I; i0 += 32) {
        x_tile[row][lane] = m0 + row < M && i0 + lane < I ? (float)x[(int64_t)(m0 + row) * I + i0 + lane] : 0;
        W_tile[row][lane] = o0 + row < O && i0 + lane < I ? (float)W[(int64_t)(o0 + row) * I + i0 + lane] : 0;
        __syncthreads();
        for (int i = 0; i < 32; i++) sum += x_tile[row][i] * W_tile[lane][i];
        __syncthreads();
    }
    if (m0 + row < M && o0 + lane < O) out[(int64_t)(m0 + row) * O + o0 + lane] = (floatX)sum;
}

// ---- 3: tiles in registers ----

static const int SIDE = 128; // of a block's tile of out

// 128 rows of p from row0, 8 columns from i0, transposed to [column][row]; zeros outside. A thread brings half a row.
__device__ inline void load_columns(float (*to)[SIDE], const floatX *p, int row0, int i0, int rows, int I) {
    const int row = threadIdx.x / 2, i = threadIdx.x % 2 * 4;
    for (int j = i; j < i + 4; j++)
        to[j][row] = row0 + row < rows && i0 + j < I ? (float)p[(int64_t)(row0 + row) * I + i0 + j] : 0;
}

__global__ void __launch_bounds__(256) matmul_3(floatX *out, const floatX *x, const floatX *W, int M, int O, int I) {
    __shared__ __align__(16) float x_tile[8][SIDE];
    __shared__ __align__(16) float W_tile[8][SIDE];
    const int m0 = blockIdx.y * SIDE, o0 = blockIdx.x * SIDE, m = threadIdx.x / 16 * 8, o = threadIdx.x % 16 * 8;
    float sum[8][8] = {};
    for (int i0 = 0; i0 < I; i0 += 8) {
        load_columns(x_tile, x, m0, i0, M, I);
        load_columns(W_tile, W, o0, i0, O, I);
        __syncthreads();
        for (int i = 0; i < 8; i++) {
            const Pack a = load(&x_tile[i][m]), b = load(&W_tile[i][o]);
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int k = 0; k < 8; k++) sum[j][k] += a.x[j] * b.x[k];
        }
        __syncthreads();
    }
    for (int j = 0; j < 8 && m0 + m + j < M; j++)
        for (int k = 0; k < 8 && o0 + o + k < O; k++) out[(int64_t)(m0 + m + j) * O + o0 + o + k] = (floatX)sum[j][k];
}

// ---- 4: tensor cores ----
//
// A block's tile, 8 warps:      o 0   32   64   96        A warp: 4 x 4 tiles of 16 x 8, 64 numbers a lane. In a step
// of 16
//                         m  0  [ 0 | 1  | 2  | 3 ]       columns it loads 4 tiles of x and 4 of W for 16 products.
//                           64  [ 4 | 5  | 6  | 7 ]

static const int DEPTH = 32; // columns of x and W that are copied together

struct MatmulTiles {
    floatX x[SIDE][DEPTH + PAD], W[SIDE][DEPTH + PAD];
};

__device__ inline void copy_tile(floatX (*to)[DEPTH + PAD], const floatX *p, int row0, int i0, int rows, int I) {
    const int step = 16 / sizeof(floatX), per_row = DEPTH / step; // copies of 16 bytes
    for (int at = threadIdx.x; at < SIDE * per_row; at += 256) {
        const int row = at / per_row, i = at % per_row * step;
        const bool inside = row0 + row < rows && i0 + i < I;
        async_copy16(&to[row][i], p + (inside ? (int64_t)(row0 + row) * I + i0 + i : 0), inside);
    }
}

__global__ void __launch_bounds__(256) matmul_4(floatX *out, const floatX *x, const floatX *W, int M, int O, int I) {
    MatmulTiles *tiles = dynamic_smem<MatmulTiles>(); // two: one to multiply, one on its way
    const int m0 = blockIdx.y * SIDE, o0 = blockIdx.x * SIDE, warp = threadIdx.x / 32, m = warp / 4 * 64,
              o = warp % 4 * 32;
    const int steps = (I + DEPTH - 1) / DEPTH;
    TileC sum[4][4] = {};
    for (int step = -1; step < steps; step++) {
        if (step + 1 < steps) {
            MatmulTiles &next = tiles[(step + 1) % 2];
            copy_tile(next.x, x, m0, (step + 1) * DEPTH, M, I);
            copy_tile(next.W, W, o0, (step + 1) * DEPTH, O, I);
        }
        async_commit();
        if (step < 0) continue;
        async_wait<1>(); // all but the newest group
        __syncthreads();
        const MatmulTiles &now = tiles[step % 2];
        for (int i = 0; i < DEPTH; i += 16) {
            TileB b[4];
            for (int k = 0; k < 4; k++) b[k] = load_b(&now.W[o + 8 * k][i], DEPTH + PAD);
            for (int j = 0; j < 4; j++) mma(sum[j], load_a(&now.x[m + 16 * j][i], DEPTH + PAD), b);
        }
        __syncthreads(); // before this buffer is filled again
    }
    for (int j = 0; j < 4; j++)
        for (int k = 0; k < 4; k++)
            for (int e = 0; e < 4; e++) {
                const int row = m0 + m + 16 * j + tile_row(e), column = o0 + o + 8 * k + tile_col(e);
                if (row < M && column < O) out[(int64_t)row * O + column] = (floatX)sum[j][k].x[e];
            }
}

// ---- 5: in use ----

static void matmul_in_use(void) { linear_forward(out.p, x.p, {W.p, nullptr, O, I, I, nullptr}, M); }

static void run(int version) {
    const dim3 grid((int)ceil_div(O, 32), (int)ceil_div(M, 8)), tiles((int)ceil_div(O, SIDE), (int)ceil_div(M, SIDE));
    if (version == 1) matmul_1<<<grid, dim3(32, 8), 0, stream>>>(out.p, x.p, W.p, M, O, I);
    if (version == 2)
        matmul_2<<<dim3((int)ceil_div(O, 32), (int)ceil_div(M, 32)), 1024, 0, stream>>>(out.p, x.p, W.p, M, O, I);
    if (version == 3) matmul_3<<<tiles, 256, 0, stream>>>(out.p, x.p, W.p, M, O, I);
    if (version == 4) {
        allow_smem(matmul_4, 2 * sizeof(MatmulTiles));
        matmul_4<<<tiles, 256, 2 * sizeof(MatmulTiles), stream>>>(out.p, x.p, W.p, M, O, I);
    }
    if (version == 5) matmul_in_use();
}

static void setup(const int *shape) {
    M = shape[0], O = shape[1], I = shape[2];
    x.random((int64_t)M * I);
    W.random((int64_t)O * I);
    out.output("out", by_precision(1e-5, 5e-3), (int64_t)M * O);
    for (int64_t at : sample((int64_t)M * O, 20000)) {
        double sum = 0;
        for (int i = 0; i < I; i++) sum += x[at / O * I + i] * W[at % O * I + i];
        out.expect(at, sum);
    }
}

static Cost cost(const int *shape) {
    const double m = shape[0], o = shape[1], i = shape[2];
    return {sizeof(floatX) * (m * i + o * i + m * o), 2 * m * o * i};
}

int main(int argc, char **argv) {
    return lab_main({{"matmul",
                      {{"M", 1}, {"O", 8}, {"I", 8}},
                      {"a thread a number", "tiles in shared memory", "8 x 8 in registers", "tensor cores, two buffers",
                       "in use: cuBLAS"},
                      {{1, 8, 8}, {37, 136, 88}, {130, 72, 200}},
                      {{4096, 4096, 4096}, {32768, 2688, 768}},
                      setup,
                      run,
                      cost}},
                    argc, argv);
}
