// The classifier's loss and its gradient on the logits, in place. For each row z of V logits:
//
//     loss = log sum_i exp(z_i) - z_target
//     dz_i = scale (softmax(z)_i - [i = target] + 1e-4 z_max [i = first of the largest])
//
// Floor: bytes. The logits are read once and written once, 2 V floatX a row. (What comes before and after are the
// head's matrix products: matmul.cu.)
//
//     1 three passes over the row, each the obvious way: the maximum, then the sum of exp(z - maximum), then the
//       gradient
//     2 online softmax (arXiv 1805.02867): one pass for both, a running sum that shrinks whenever the maximum grows;
//       then the gradient
//     3 the same with 16-byte loads. A row of 65536 is 128 KB in bf16; of blocks of 512 threads four fit a
//       multiprocessor, so that 528 rows are under way on an H100, 69 MB: more than its L2 (50 MB) holds until they are
//       read again
//     4 in use: the row stays in the registers of 1024 threads: it is read once
//
// On an H100, to ask for the next block's row to come to the L2 cache while this one takes exponentials made 4 slower
// by 10 %.
//
//     make -C dev classifier && dev/classifier [VERSION [ROWS V]]

#define GOLDFINCH_NO_MAIN
#include "../train_goldfinch.cu"
#include "common.h"

static int n_rows, V;
static Array<floatX> logits;
static Array<float> losses;
static Array<int> right, targets;

// The end of 1 and 2, once the row's maximum and sum are known.
__device__ inline void loss_and_gradient(floatX *z, float *losses, int *right, int target, float top, float sum,
                                         float scale, int V) {
    __shared__ float shared[32];
    float first = -(float)V;
    for (int i = threadIdx.x; i < V; i += blockDim.x)
        if ((float)z[i] == top) first = fmaxf(first, -(float)i);
    first = -block_max(first, shared);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = logf(sum) + top - (float)z[target];
        right[blockIdx.x] = (int)first == target;
    }
    __syncthreads(); // z[target] is read
    for (int i = threadIdx.x; i < V; i += blockDim.x) {
        const float extra = (i == (int)first ? 1e-4f * top : 0) - (i == target ? 1 : 0);
        z[i] = (floatX)(scale * (expf((float)z[i] - top) / sum + extra));
    }
}

__global__ void classifier_1(floatX *logits, float *losses, int *right, const int *targets, float scale, int V) {
    __shared__ float tops[32];
    __shared__ float2 sums[32];
    floatX *z = logits + (int64_t)blockIdx.x * V;
    float top = -INFINITY, sum = 0;
    for (int i = threadIdx.x; i < V; i += blockDim.x) top = fmaxf(top, (float)z[i]);
    top = block_max(top, tops);
    for (int i = threadIdx.x; i < V; i += blockDim.x) sum += expf((float)z[i] - top);
    loss_and_gradient(z, losses, right, targets[blockIdx.x], top, block_sum(sum, sums), scale, V);
}

__global__ void classifier_2(floatX *logits, float *losses, int *right, const int *targets, float scale, int V) {
    __shared__ float tops[32];
    __shared__ float2 sums[32];
    floatX *z = logits + (int64_t)blockIdx.x * V;
    float mine = -FLT_MAX, sum = 0; // of this thread's logits
    for (int i = threadIdx.x; i < V; i += blockDim.x) {
        const float value = (float)z[i];
        if (value > mine) {
            sum *= expf(mine - value);
            mine = value;
        }
        sum += expf(value - mine);
    }
    const float top = block_max(mine, tops);
    loss_and_gradient(z, losses, right, targets[blockIdx.x], top, block_sum(sum * expf(mine - top), sums), scale, V);
}

__global__ void classifier_3(floatX *logits, float *losses, int *right, const int *targets, float scale, int V) {
    __shared__ float shared[32];
    __shared__ float2 sums[32];
    floatX *z = logits + (int64_t)blockIdx.x * V;
    const int target = targets[blockIdx.x], begin = threadIdx.x * 8, step = blockDim.x * 8;
    float mine = -FLT_MAX, sum = 0, first = -(float)V;
    for (int c = begin; c < V; c += step) {
        const Pack v = load(z + c);
        float high = mine;
        for (int i = 0; i < 8; i++) high = fmaxf(high, v.x[i]);
        sum *= expf(mine - high); // once for eight numbers
        mine = high;
        for (int i = 0; i < 8; i++) sum += expf(v.x[i] - high);
    }
    const float top = block_max(mine, shared), total = block_sum(sum * expf(mine - top), sums);
    if (mine == top) // few threads look again, for the place
        for (int i = threadIdx.x; i < V / 8; i += blockDim.x)
            for (int j = 0; j < 8; j++)
                if ((float)z[8 * i + j] == top) first = fmaxf(first, -(float)(8 * i + j));
    first = -block_max(first, shared);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = logf(total) + top - (float)z[target];
        right[blockIdx.x] = (int)first == target;
    }
    __syncthreads();
    for (int c = begin; c < V; c += step) {
        Pack v = load(z + c);
        for (int i = 0; i < 8; i++) {
            const float extra = (c + i == (int)first ? 1e-4f * top : 0) - (c + i == target ? 1 : 0);
            v.x[i] = scale * (expf(v.x[i] - top) / total + extra);
        }
        store(z + c, v);
    }
}

static void classifier_in_use(float scale) {
    const int threads = V < 4096 ? 64 : 1024; // as head_and_loss has it
    classifier_kernel<<<n_rows, threads, 0, stream>>>(logits.p, losses.p, right.p, targets.p, scale, V);
}

static void run(int version) {
    const float scale = 1.f / n_rows;
    if (version == 1) classifier_1<<<n_rows, 512, 0, stream>>>(logits.p, losses.p, right.p, targets.p, scale, V);
    if (version == 2) classifier_2<<<n_rows, 512, 0, stream>>>(logits.p, losses.p, right.p, targets.p, scale, V);
    if (version == 3) classifier_3<<<n_rows, 512, 0, stream>>>(logits.p, losses.p, right.p, targets.p, scale, V);
    if (version == 4) classifier_in_use(scale);
}

static void setup(const int *shape) {
    n_rows = shape[0], V = shape[1];
    logits.random((int64_t)n_rows * V, 2);
    targets.fill(n_rows, [](int64_t row) { return (int)(lab_uniform(1, row) * V); });
    // the target's logit is the largest, and one of two:
    targets.host[0] = 0;
    for (int i : {0, V - 1}) logits.host[i] = (floatX)20.f; // the first counts
    targets.upload();
    losses.output("loss", 1e-5, n_rows);
    right.output("right", 0, n_rows);
    logits.output("dlogits", by_precision(2e-5, 5e-3));
    logits.relative = true; // most of them are small beside the target's
    for (int64_t row : sample(n_rows, 16)) {
        const int64_t at = row * V, target = targets.host[row];
        int first = 0;
        double sum = 0;
        for (int i = 0; i < V; i++)
            if (logits[at + i] > logits[at + first]) first = i;
        const double top = logits[at + first];
        for (int i = 0; i < V; i++) sum += exp(logits[at + i] - top);
        for (int i = 0; i < V; i++)
            logits.expect(at + i,
                          (exp(logits[at + i] - top) / sum - (i == target) + (i == first) * 1e-4 * top) / n_rows);
        losses.expect(row, log(sum) + top - logits[at + target]);
        right.expect(row, first == target);
    }
}

static Cost cost(const int *shape) {
    const double n = (double)shape[0] * shape[1];
    return {2 * sizeof(floatX) * n, 10 * n};
}

int main(int argc, char **argv) {
    return lab_main({{"classifier",
                      {{"ROWS", 1}, {"V", 8}},
                      {"three passes", "online softmax", "16-byte loads", "in use"},
                      {{1, 8}, {37, 328}, {3, 65528}},
                      {{4096, 65536}},
                      setup,
                      run,
                      cost}},
                    argc, argv);
}
