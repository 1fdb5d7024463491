// Matrix times vector, what decoding consists of:      y (O) = W (O, I) x (I)      for several W in a row, as layers
// come
//
// Floor: bytes. Every weight is read once and used once, 2 flops for 2 bytes. To keep memory busy, so many bytes must
// be on their way at any time as it delivers in the time one takes to come: 3 TB/s times 1 us, 3 MB, 23 KB a
// multiprocessor.
//
//   1 a thread a row: 32 lanes read 32 rows, so of each 32-byte sector that comes one number is used at a time
//   2 a warp a row: neighbouring lanes read neighbouring numbers, 2 bytes each; one load is on its way per lane and
//     turn
//   3 16-byte loads: eight times fewer loads for the same bytes, so eight times as many bytes on their way
//   4 early: 2048 numbers of a row, eight loads a lane, are requested at once; x lies in shared memory; and the kernel
//       starts before the one ahead has ended, so that its first row is on its way while that one finishes
//   5 in use: what is on its way lands in shared memory, not in registers: 6 to 8 KB a warp, also while it adds up what
//       has come and while it still waits for x; 13 MB and more in flight instead of at most 8. Where a warp has one
//       row (64x2048x2048) there is nothing to stream, and 4 is ahead; in a chain of large and small matrices 5 is.
//
// decode_int8: the same in 8 bits (--weights int8), W = integers times a scale a row, half the bytes:
//
//   1 16-byte loads, each number converted to a float: conversions go at an eighth of the speed of multiplications
//   2 bytes become bf16 by moving bits, 16 instructions for 8 numbers, and tensor cores multiply them, though only the
//     diagonal of such a product is of use here: 3 instructions a number in all. At 4 TB/s an H200 gets 16 bytes a
//     clock and multiprocessor, and has 128 lanes for them. (With 5's stream this was in use; a chain of 16x9216x2048
//     took 0.151 ms where bf16's twice as many bytes took 0.160.)
//   3 in use: nothing is converted but x, once, to integers of four digits; tensor cores multiply 512 bytes with them
//     by one instruction
//
//     make -C dev decode && dev/decode [VERSION [PRODUCTS O I]]

#define GOLDFINCH_INFER_NO_MAIN
#include "../infer_goldfinch.cu"
#include "common.h"

static int products, O, I;
static Array<floatX> x, W;
static Array<float> out;
static Array<int8_t> whole;
static Array<float> scales;
static Recording recordings[6], int8_recordings[4]; // by version

__global__ void decode_1(float *y, const floatX *W, const floatX *x, int O, int I) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= O) return;
    float sum = 0;
    for (int i = 0; i < I; i++) sum += (float)W[(int64_t)row * I + i] * (float)x[i];
    y[row] = sum;
}

__global__ void decode_2(float *y, const floatX *W, const floatX *x, int O, int I) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= O) return;
    float sum = 0;
    for (int i = lane; i < I; i += 32) sum += (float)W[(int64_t)row * I + i] * (float)x[i];
    sum = warp_sum(sum);
    if (lane == 0) y[row] = sum;
}

__global__ void decode_3(float *y, const floatX *W, const floatX *x, int O, int I) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= O) return;
    float sum = 0;
    for (int i = lane * 8; i < I; i += 32 * 8) {
        const Pack a = load(W + (int64_t)row * I + i), b = load(x + i);
        for (int j = 0; j < 8; j++) sum += a.x[j] * b.x[j];
    }
    sum = warp_sum(sum);
    if (lane == 0) y[row] = sum;
}

__global__ void __launch_bounds__(256, 4) decode_4(float *y, const floatX *W, const floatX *x, int O, int I) {
    floatX *copy = dynamic_smem<floatX>();
    const int lane = threadIdx.x % 32;
    int row = (blockIdx.x * 256 + threadIdx.x) / 32;
    RawPack<floatX> raw[8];
    auto request = [&](int begin) {
        for (int i = 0; i < 8; i++) {
            const int at = begin + (32 * i + lane) * 8;
            if (row < O && at < I) raw[i] = load_raw(W + (int64_t)row * I + at);
        }
    };
    let_next_start();
    request(0);
    wait_for_previous();
    for (int i = threadIdx.x * 8; i < I; i += 256 * 8) store(copy + i, load(x + i));
    __syncthreads();
    while (row < O) {
        float sum = 0;
        for (int begin = 0; begin < I; begin += 2048) {
            if (begin > 0) request(begin);
            for (int i = 0; i < 8; i++) {
                const int at = begin + (32 * i + lane) * 8;
                if (at >= I) break;
                const Pack a = unpack(raw[i]), b = load(copy + at);
                for (int j = 0; j < 8; j++) sum += a.x[j] * b.x[j];
            }
        }
        const int done = row;
        row += gridDim.x * 8;
        request(0);
        sum = warp_sum(sum);
        if (lane == 0) y[done] = sum;
    }
}

static void queue(int version) {
    for (int i = 0; i < products; i++) {
        const floatX *w = W.p + (int64_t)i * O * I;
        float *y = out.p + (int64_t)i * O;
        if (version == 1) decode_1<<<(int)ceil_div(O, 64), 64, 0, stream>>>(y, w, x.p, O, I);
        if (version == 2) decode_2<<<(int)ceil_div(O, 8), 256, 0, stream>>>(y, w, x.p, O, I);
        if (version == 3) decode_3<<<(int)ceil_div(O, 8), 256, 0, stream>>>(y, w, x.p, O, I);
        if (version == 4) {
            const int blocks = (int)ceil_div(O, 8) < 2 * multiprocessors ? (int)ceil_div(O, 8) : 2 * multiprocessors;
            launch_early(decode_4, dim3(blocks), 256, I * sizeof(floatX), y, w, x.p, O, I);
        }
        if (version < 5) continue;
        Product<floatX> job = {};
        job.x = x.p, job.w = {w, nullptr}, job.out = y, job.rows = O, job.K = I;
        matvec(job, I);
    }
}

static void run(int version) { // recorded: the host could not launch them fast enough
    run_recorded(
        &recordings[version], [=] { queue(version); });
}

static void setup(const int *shape) {
    for (Recording &r : recordings) recording_free(&r);
    products = shape[0], O = shape[1], I = shape[2];
    x.random(I);
    W.random((int64_t)products * O * I, 1 / sqrt(I));
    out.output("y", 1e-5, (int64_t)products * O);
    for (int64_t row : sample((int64_t)products * O, 500)) {
        double sum = 0;
        for (int i = 0; i < I; i++) sum += W[row * I + i] * x[i];
        out.expect(row, sum);
    }
}

static Cost cost(const int *shape) {
    const double weights = (double)shape[0] * shape[1] * shape[2];
    return {weights * sizeof(floatX), 2 * weights};
}

__global__ void decode_int8_1(float *y, const int8_t *whole, const float *scales, const floatX *x, int O, int I) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= O) return;
    float sum = 0;
    for (int i = lane * 16; i < I; i += 32 * 16) {
        const int4 raw = *(const int4 *)(whole + (int64_t)row * I + i);
        const Pack b[2] = {load(x + i), load(x + i + 8)};
        for (int j = 0; j < 16; j++) sum += (float)((const int8_t *)&raw)[j] * b[j / 8].x[j % 8];
    }
    sum = warp_sum(sum);
    if (lane == 0) y[row] = sum * scales[row];
}

__global__ void decode_int8_2(float *y, const int8_t *whole, const float *scales, const floatX *x, int O, int I) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= O) return;
    TileC c[2][1] = {}; // of the first four of a lane's numbers, in rows 0..7; of the others, in rows 8..15
    for (int i = 0; i < I; i += 32 * 8) { // the warp must be together
        const bool mine = i + lane * 8 < I;
        const int at = mine ? i + lane * 8 : 0;
        const TileA a = eight_as_a(load_raw(whole + (int64_t)row * I + at));
        const RawPack<floatX> b = mine ? load_raw(x + at) : RawPack<floatX>{};
        for (int half = 0; half < 2; half++) {
            const TileB of_half[1] = {half_as_b(b, half)};
            mma(c[half], a, of_half);
        }
    }
    float sum = 0;
    for (int i = 0; i < 2; i++)
        if (tile_row(i) == tile_col(i)) sum = c[0][0].x[i] + c[1][0].x[i + 2];
    sum = warp_sum(sum);
    if (lane == 0) y[row] = sum * scales[row];
}

static void queue_int8(int version) {
    for (int i = 0; i < products; i++) {
        const int8_t *w = whole.p + (int64_t)i * O * I;
        float *y = out.p + (int64_t)i * O;
        if (version == 1)
            decode_int8_1<<<(int)ceil_div(O, 8), 256, 0, stream>>>(y, w, scales.p + (int64_t)i * O, x.p, O, I);
        if (version == 2)
            decode_int8_2<<<(int)ceil_div(O, 8), 256, 0, stream>>>(y, w, scales.p + (int64_t)i * O, x.p, O, I);
        if (version < 3) continue;
        Product<floatX> job = {};
        job.x = x.p, job.w = {w, scales.p + (int64_t)i * O}, job.out = y, job.rows = O, job.K = I;
        matvec_int8(job, I);
    }
}

static void run_int8(int version) {
    run_recorded(
        &int8_recordings[version], [=] { queue_int8(version); });
}

static void setup_int8(const int *shape) {
    for (Recording &r : int8_recordings) recording_free(&r);
    products = shape[0], O = shape[1], I = shape[2];
    x.random(I);
    whole.random((int64_t)products * O * I, 36);
    scales.random((int64_t)products * O, 1 / (36 * sqrt(I)));
    out.output("y", 1e-5, (int64_t)products * O);
    for (int64_t row : sample((int64_t)products * O, 500)) {
        double sum = 0;
        for (int i = 0; i < I; i++) sum += whole[row * I + i] * x[i];
        out.expect(row, sum * scales[row]);
    }
}

static Cost cost_int8(const int *shape) {
    const double weights = (double)shape[0] * shape[1] * shape[2];
    return {weights, 2 * weights};
}

int main(int argc, char **argv) {
    return lab_main({{"decode",
                      {{"PRODUCTS", 1}, {"O", 1}, {"I", 8}},
                      {"a thread a row", "a warp a row", "16-byte loads", "8 loads on their way, early",
                       "in use: a stream to shared memory"},
                      {{1, 5, 64}, {2, 67, 2056}, {3, 40, 7168}},
                      {{64, 2048, 2048}, {16, 9216, 2048}, {16, 2048, 7168}},
                      setup,
                      run,
                      cost},
                     {"decode_int8",
                      {{"PRODUCTS", 1}, {"O", 1}, {"I", 16}},
                      {"a warp a row, 16-byte loads", "bits moved to bf16, tensor cores", "in use: integers"},
                      {{1, 5, 64}, {2, 67, 2080}, {3, 40, 7168}},
                      {{64, 2048, 2048}, {16, 9216, 2048}, {16, 2048, 7168}},
                      setup_int8,
                      run_int8,
                      cost_int8}},
                    argc, argv);
}
