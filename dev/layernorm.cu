// Layer norm:    out = (x - mean) / sqrt(var + 1e-5) * gain + bias        over the C channels of each row, and its
// backward
//
//     dx = (dn - mean(dn) - n mean(dn n)) / sqrt(var + 1e-5),  n = (x - mean) / sqrt(var + 1e-5),  dn = dout * gain
//     dgain = sum over rows of dout * n,  dbias = sum over rows of dout
//
// Floor: bytes. Forward reads x and writes out, 2 floatX a number, about 8 flops: a thousand times too few to matter.
// Backward reads x and dout and writes dx, 3 floatX. So a version's GB/s against the copy's GB/s says all.
//
// Forward:   1 a thread a row: right, but 32 lanes read 32 rows at once, so each 32-byte sector that comes from memory
//              is used 2 bytes at a time, and must survive in the cache until the next 15 come
//            2 a warp a row: neighbouring lanes read neighbouring numbers; sums by shuffles; x is read twice (once from
//              L2)
//            3 in use: a block a row, a thread 8 channels by one 16-byte load, which then stay in registers
// Backward:  1 a thread a row for dx, a thread a column for dgain and dbias: everything is read twice
//            2 a block walks some rows; the sums over rows stay in registers, and are added up once at the end. Mean,
//              variance and the gradient's two means are three sums over the block, one after the other, while nothing
//              is loaded
//            3 in use: one sum over the block a row, which takes along the next row's mean; the next row is on its way
//              meanwhile
//
//     make -C dev layernorm && dev/layernorm [VERSION [ROWS C]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static int n_rows, C;
static Array<floatX> x, gain, bias, dout, out, dx;
static Array<float> dgain, dbias, scratch;

// ---------------------------------------------------------------------------------------------------------------------
// Forward

__global__ void layernorm_forward_1(floatX *out, const floatX *x, const floatX *gain, const floatX *bias, int rows,
                                    int C) {
    const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    x += row * C, out += row * C;
    float mean = 0, var = 0;
    for (int c = 0; c < C; c++) mean += (float)x[c] / C;
    for (int c = 0; c < C; c++) var += ((float)x[c] - mean) * ((float)x[c] - mean) / C;
    for (int c = 0; c < C; c++)
        out[c] = (floatX)(((float)x[c] - mean) * rsqrtf(var + 1e-5f) * (float)gain[c] + (float)bias[c]);
}

__global__ void layernorm_forward_2(floatX *out, const floatX *x, const floatX *gain, const floatX *bias, int rows,
                                    int C) {
    const int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += row * C, out += row * C;
    float sum = 0, squares = 0;
    for (int c = lane; c < C; c += 32) sum += (float)x[c];
    const float mean = warp_sum(sum) / C;
    for (int c = lane; c < C; c += 32) squares += ((float)x[c] - mean) * ((float)x[c] - mean);
    const float rstd = rsqrtf(warp_sum(squares) / C + 1e-5f);
    for (int c = lane; c < C; c += 32) out[c] = (floatX)(((float)x[c] - mean) * rstd * (float)gain[c] + (float)bias[c]);
}

static LayerNorm norm(void) { return {{gain.p, dgain.p, 1, C, C, nullptr}, {bias.p, dbias.p, 1, C, C, nullptr}}; }
static void layernorm_forward_in_use(void) { layernorm_forward(out.p, x.p, norm(), n_rows); }

static void forward_run(int version) {
    if (version == 1)
        layernorm_forward_1<<<(int)ceil_div(n_rows, 64), 64, 0, stream>>>(out.p, x.p, gain.p, bias.p, n_rows, C);
    if (version == 2)
        layernorm_forward_2<<<(int)ceil_div(n_rows, 8), 256, 0, stream>>>(out.p, x.p, gain.p, bias.p, n_rows, C);
    if (version == 3) layernorm_forward_in_use();
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

__global__ void layernorm_backward_rows(floatX *dx, float2 *stats, const floatX *dout, const floatX *x,
                                        const floatX *gain, int rows, int C) {
    const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    x += row * C, dout += row * C, dx += row * C;
    float mean = 0, var = 0, dn_mean = 0, dn_n_mean = 0;
    for (int c = 0; c < C; c++) mean += (float)x[c] / C;
    for (int c = 0; c < C; c++) var += ((float)x[c] - mean) * ((float)x[c] - mean) / C;
    const float rstd = rsqrtf(var + 1e-5f);
    for (int c = 0; c < C; c++) {
        const float dn = (float)dout[c] * (float)gain[c];
        dn_mean += dn / C;
        dn_n_mean += dn * ((float)x[c] - mean) * rstd / C;
    }
    for (int c = 0; c < C; c++)
        dx[c] = (floatX)(rstd * ((float)dout[c] * (float)gain[c] - dn_mean - ((float)x[c] - mean) * rstd * dn_n_mean));
    stats[row] = make_float2(mean, rstd);
}

__global__ void layernorm_backward_columns(float *dgain, float *dbias, const float2 *stats, const floatX *dout,
                                           const floatX *x, int rows, int C) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float by_n = 0, sum = 0;
    for (int64_t row = 0; row < rows; row++) {
        by_n += (float)dout[row * C + c] * ((float)x[row * C + c] - stats[row].x) * stats[row].y;
        sum += (float)dout[row * C + c];
    }
    dgain[c] += by_n;
    dbias[c] += sum;
}

__global__ void layernorm_backward_2(floatX *dx, float *partial, const floatX *dout, const floatX *x,
                                     const floatX *gain, int rows, int rows_per_block, int C) {
    __shared__ float2 shared[32];
    const int c = threadIdx.x * 8;
    const bool mine = c < C;
    const Pack g = mine ? load(gain + c) : zero_pack();
    Pack dgain = zero_pack(), dbias = zero_pack();
    const int64_t begin = (int64_t)blockIdx.x * rows_per_block, end = min((int64_t)rows, begin + rows_per_block);
    for (int64_t row = begin; row < end; row++) {
        Pack n = mine ? load(x + row * C + c) : zero_pack();
        const Pack d = mine ? load(dout + row * C + c) : zero_pack();
        float total = 0, squares = 0;
        for (int i = 0; i < 8; i++) total += n.x[i];
        const float mean = block_sum(total, shared) / C;
        for (int i = 0; i < 8; i++) n.x[i] = mine ? n.x[i] - mean : 0;
        for (int i = 0; i < 8; i++) squares += n.x[i] * n.x[i];
        const float rstd = rsqrtf(block_sum(squares, shared) / C + 1e-5f);
        float2 sums = make_float2(0, 0);
        for (int i = 0; i < 8; i++) {
            n.x[i] *= rstd;
            dgain.x[i] += d.x[i] * n.x[i];
            dbias.x[i] += d.x[i];
            sums = make_float2(sums.x + d.x[i] * g.x[i], sums.y + d.x[i] * g.x[i] * n.x[i]);
        }
        sums = block_sum(sums, shared);
        for (int i = 0; i < 8; i++) n.x[i] = rstd * (d.x[i] * g.x[i] - sums.x / C - n.x[i] * sums.y / C);
        if (mine) store(dx + row * C + c, n);
    }
    if (!mine) return;
    store(partial + (int64_t)blockIdx.x * 2 * C + c, dgain);
    store(partial + (int64_t)blockIdx.x * 2 * C + C + c, dbias);
}

static void layernorm_backward_in_use(void) { layernorm_backward(dx.p, dout.p, x.p, norm(), scratch.p, n_rows); }

static void backward_run(int version) {
    float2 *stats = (float2 *)scratch.p;
    if (version == 1) {
        layernorm_backward_rows<<<(int)ceil_div(n_rows, 64), 64, 0, stream>>>(dx.p, stats, dout.p, x.p, gain.p, n_rows,
                                                                              C);
        layernorm_backward_columns<<<(int)ceil_div(C, 32), 32, 0, stream>>>(dgain.p, dbias.p, stats, dout.p, x.p,
                                                                            n_rows, C);
    }
    if (version == 2) {
        const int blocks = row_blocks(n_rows, C), per = rows_per_block(n_rows, C);
        layernorm_backward_2<<<blocks, row_threads(C), 0, stream>>>(dx.p, scratch.p, dout.p, x.p, gain.p, n_rows, per,
                                                                    C);
        add_partials({{dgain.p, dbias.p}}, scratch.p, blocks, 2, C);
    }
    if (version == 3) layernorm_backward_in_use();
}

// ---------------------------------------------------------------------------------------------------------------------
// What to expect

static void inputs(const int *shape) {
    n_rows = shape[0], C = shape[1];
    x.random((int64_t)n_rows * C, 2, 0.5);
    gain.random(C, 0.5, 1);
    bias.random(C);
}

static std::vector<double> normed(int64_t row, double *rstd) { // n of a row
    std::vector<double> n(C);
    double mean = 0, var = 0;
    for (int c = 0; c < C; c++) mean += x[row * C + c] / C;
    for (int c = 0; c < C; c++) var += (x[row * C + c] - mean) * (x[row * C + c] - mean) / C;
    *rstd = 1 / sqrt(var + 1e-5);
    for (int c = 0; c < C; c++) n[c] = (x[row * C + c] - mean) * *rstd;
    return n;
}

static void forward_setup(const int *shape) {
    inputs(shape);
    out.output("out", by_precision(1e-5, 4e-3), (int64_t)n_rows * C);
    for (int64_t row : sample(n_rows, 100)) {
        double rstd;
        const std::vector<double> n = normed(row, &rstd);
        for (int c = 0; c < C; c++) out.expect(row * C + c, n[c] * gain[c] + bias[c]);
    }
}

static void backward_setup(const int *shape) {
    inputs(shape);
    dout.random((int64_t)n_rows * C);
    dgain.random(C); // gradients are added to what is there
    dbias.random(C);
    scratch.allocate(std::max<int64_t>(2 * n_rows, (int64_t)row_blocks(n_rows, C) * 2 * C));
    dx.output("dx", by_precision(1e-5, 4e-3), (int64_t)n_rows * C);
    dgain.output("dgain", 5e-5);
    dbias.output("dbias", 5e-5);
    std::vector<double> by_n(C), sum(C);
    for (int64_t row = 0; row < n_rows; row++) {
        double rstd, dn_mean = 0, dn_n_mean = 0;
        const std::vector<double> n = normed(row, &rstd);
        for (int c = 0; c < C; c++) {
            by_n[c] += dout[row * C + c] * n[c];
            sum[c] += dout[row * C + c];
            dn_mean += dout[row * C + c] * gain[c] / C;
            dn_n_mean += dout[row * C + c] * gain[c] * n[c] / C;
        }
        for (int c = 0; c < C && (row < 50 || row == n_rows - 1); c++)
            dx.expect(row * C + c, rstd * (dout[row * C + c] * gain[c] - dn_mean - n[c] * dn_n_mean));
    }
    for (int c = 0; c < C; c++) {
        dgain.expect(c, dgain[c] + by_n[c]);
        dbias.expect(c, dbias[c] + sum[c]);
    }
}

static Cost forward_cost(const int *shape) {
    return {2. * sizeof(floatX) * shape[0] * shape[1], 8. * shape[0] * shape[1]};
}
static Cost backward_cost(const int *shape) {
    return {3. * sizeof(floatX) * shape[0] * shape[1], 16. * shape[0] * shape[1]};
}

int main(int argc, char **argv) {
    const Shapes small = {{1, 64}, {37, 320}, {1030, 192}}, large = {{32768, 768}, {16384, 2048}};
    return lab_main({{"layernorm_forward",
                      {{"ROWS", 1}, {"C", 64}},
                      {"a thread a row", "a warp a row", "in use: a block a row"},
                      small,
                      large,
                      forward_setup,
                      forward_run,
                      forward_cost},
                     {"layernorm_backward",
                      {{"ROWS", 1}, {"C", 64}},
                      {"a thread a row, a thread a column", "a block some rows", "in use: one sum a row"},
                      small,
                      large,
                      backward_setup,
                      backward_run,
                      backward_cost}},
                    argc, argv);
}
