// Inference in figures: cache, pre-fill, decode, for each kind of cache and of weights, on random weights made on the
// device.
//
//     make dev/bench_infer && dev/bench_infer [-o FILE.csv] [LAYERS WIDTH VOCABULARY CONTEXT..]
//
// First it checks what only the machine at hand can show: that the three caches, and pre-fill and decode, give the same
// logits, and weights in 8 bits nearly so; that a saved state goes on with the same tokens; that several contexts at
// once have the logits of each by itself, and the same bits among 8 and among 32; that nothing is allocated on the way.
// Then, for each context: pre-fill of a prompt of so many random tokens, and decode right after it, sampling included;
// in the end decode of 8 and of 32 short contexts at once. `share` is the time that the bytes of the weights would take
// at the speed of a copy, measured in the same run, over the time of a step.

#define GOLDFINCH_INFER_NO_MAIN
#include "../infer_goldfinch.cu"

#ifdef CUDA_ON_CPU
static const bool GPU_HERE = false;
#else
static const bool GPU_HERE = true;
#endif

__global__ void scale_floats(float *x, int64_t n, float factor) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= factor;
}

// Matrices: normal, 1/sqrt(inputs); low-rank ones half of that, whichever side is the input; vectors as a trainer
// begins.
static void random_weights(Model *m) {
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        const bool matrix = t->ndim > 1 && t->shape[0] > 1, low_rank = strstr(t->name, "_w1") || strstr(t->name, "_w2");
        const InitKind kind = t->init.kind;
        if (matrix && (kind == ORTHOGONAL || kind == HEAD_ORTHO || kind == UNIFORM || kind == CONSTANT)) {
            const double inputs = (double)(low_rank ? t->shape[t->ndim - 2] : t->shape[1]);
            const float factor = (float)((low_rank ? 0.5 : 1) / sqrt(inputs));
            const int blocks = (int)ceil_div(t->size, 256);
            fill_normal_kernel<<<blocks, 256, 0, stream>>>(m->master + t->offset, t->size, tensor_key(t->name, 1));
            scale_floats<<<blocks, 256, 0, stream>>>(m->master + t->offset, t->size, factor);
            continue;
        }
        float *x = (float *)malloc(t->size * sizeof(float));
        tensor_init(m, t, x, nullptr, tensor_key(t->name, 1)); // no matrix: no scratch
        CUDA_CHECK(cudaMemcpyAsync(m->master + t->offset, x, t->size * sizeof(float), cudaMemcpyHostToDevice, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        free(x);
    }
    model_params_changed(m);
}

typedef struct Bench {
    Infer *f;
    Sampler sampler;
    Recording recordings[2];
    int *ids;
} Bench;

static const struct Kind {
    const char *name, *cache;
    KvKind kv;
    WeightsKind weights;
    bool least; // as small a window as the engine ever takes by itself
} kinds[] = {{"bf16", "bf16", KV_COMPRESSED, WEIGHTS_FLOAT, false},
             {"cache int8", "int8", KV_INT8, WEIGHTS_FLOAT, false},
             {"cache full", "full", KV_FULL, WEIGHTS_FLOAT, false},
             {"weights int8", "bf16", KV_COMPRESSED, WEIGHTS_INT8, false},
             {"least window", "bf16", KV_COMPRESSED, WEIGHTS_FLOAT, true}};
static const int n_kinds = sizeof(kinds) / sizeof(kinds[0]), full = 2, in_8_bits = 3;
static int failures = 0;

static void say(bool good, const char *what, double found, const char *expected) {
    printf("%-7s %-78s %.3g (%s)\n", good ? "ok" : "FAILED", what, found, expected);
    failures += !good;
}

static double wait_seconds(void) {
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaGetLastError());
    return seconds_now();
}

static void bench_open(Bench *b, const Settings *s, const Kind &kind, int64_t capacity, int64_t window) {
    const Sampling how = {0, 1, 0, 0, 1, 0, 1}; // the likeliest token
    uint8_t *types = (uint8_t *)calloc(s->vocab_size, 1);
    memset(b, 0, sizeof(*b));
    b->f = infer_create(s, kind.kv, capacity, prefill_chunk(), window);
    random_weights(&b->f->m);
    if (PRECISION_BF16) {
        CUDA_CHECK(cudaFree(b->f->m.master));
        b->f->m.master = nullptr;
    }
    if (kind.weights == WEIGHTS_INT8) weights_to_int8(b->f);
    // on the CPU the shares of a context that a large GPU has
    infer_prepare(b->f, GPU_HERE ? multiprocessors : 64, 8, has_warpgroups());
    sampler_allocate(&b->sampler, (int)s->vocab_size, &how, types);
    infer_rehearse(b->f, b->recordings, [=] { step_and_draw(b->f, &b->sampler); });
    b->ids = (int *)malloc((size_t)capacity * sizeof(int));
    for (int64_t i = 0; i < capacity; i++) b->ids[i] = (int)(hash_uniform(99, i) * s->vocab_size);
    free(types);
}

static void copy_logits(Bench *b, float *to) {
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaMemcpy(to, b->f->logits, b->f->m.d.V * sizeof(float), cudaMemcpyDeviceToHost));
}

static double distance(const float *a, const float *b, int n) { // relative to b's norm
    double difference = 0, norm = 0;
    for (int i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    return sqrt(difference / norm);
}

// Draws n tokens, each fed; returns seconds a token. The first steps are not counted.
static double decode(Bench *b, int n, int *drawn) {
    double begin = 0;
    sampler_begin(&b->sampler, infer_position(b->f), -1);
    sampler_queue(&b->sampler, infer_logits(b->f));
    for (int i = -3; i < n; i++) {
        if (i == 0) begin = wait_seconds();
        const int id = sampler_result(&b->sampler);
        if (drawn && i >= 0) drawn[i] = id;
        infer_step(b->f, b->recordings, [=] { step_and_draw(b->f, &b->sampler); });
    }
    return (wait_seconds() - begin) / n;
}

// ---- checks ----

// Logits after T + 2 tokens: all pre-filled; T pre-filled, two decoded.
static void check_logits(Bench *benches, int64_t T) {
    const int V = benches[0].f->m.d.V;
    float *at_once[n_kinds], *decoded = (float *)malloc(V * sizeof(float));
    char text[100];
    for (int kind = 0; kind < n_kinds; kind++) {
        Bench *b = &benches[kind];
        at_once[kind] = (float *)malloc(V * sizeof(float));
        infer_reset(b->f);
        infer_feed(b->f, b->ids, T + 2);
        copy_logits(b, at_once[kind]);
        infer_reset(b->f);
        infer_feed(b->f, b->ids, T);
        for (int i = 0; i < 2; i++) infer_feed(b->f, b->ids + T + i, 1);
        copy_logits(b, decoded);
        const double error = distance(decoded, at_once[kind], V), limit = PRECISION_BF16 ? 5e-2 : 1e-3;
        snprintf(text, sizeof(text), "%s: logits after %ld tokens, two of them decoded, against all pre-filled",
                 kinds[kind].name, T + 2);
        say(error < limit, text, error, PRECISION_BF16 ? "below 5e-2" : "below 1e-3");
    }
    for (int kind = 0; kind < n_kinds; kind++) {
        if (kind == full) continue;
        const bool rounded = kinds[kind].weights == WEIGHTS_INT8;
        const bool exact = !PRECISION_BF16 && !rounded && kinds[kind].kv == KV_COMPRESSED;
        const double error = distance(at_once[kind], at_once[full], V), limit = exact ? 1e-3 : rounded ? 2e-1 : 5e-2;
        snprintf(text, sizeof(text), "%s: logits after %ld tokens against full keys and values", kinds[kind].name,
                 T + 2);
        say(error < limit, text, error, exact ? "below 1e-3" : rounded ? "below 2e-1" : "below 5e-2");
    }
    for (float *p : at_once) free(p);
    free(decoded);
}

static void check_state(Bench *b, const Kind &kind, int64_t T) {
    const int n = 16;
    int first[n], second[n], same = 0;
    char path[64], text[100];
    snprintf(path, sizeof(path), "/tmp/bench_infer.%d.state", (int)getpid());
    infer_reset(b->f);
    infer_feed(b->f, b->ids, T);
    FileOut file;
    Utf8 unfinished = {};
    file_begin(&file, path);
    infer_save_state(b->f, &file, &unfinished);
    decode(b, n, first);
    infer_load_state(b->f, path, &unfinished);
    decode(b, n, second);
    unlink(path);
    for (int i = 0; i < n; i++) same += first[i] == second[i];
    snprintf(text, sizeof(text), "%s: tokens that a state saved after %ld tokens goes on with, as before", kind.name,
             T);
    say(same == n, text, same, "16");
}

// ---- several contexts at once ----

static const int BATCHES[2] = {8, 32}, BATCH_STEPS = 8, ROOM = 256; // tokens that may follow a prompt
static int batch_tokens(int64_t longest) { return longest < 256 ? (int)longest / 2 : 256; }

static const int *batch_ids(const Bench *b, int context) { return b->ids + context; } // its prompt, and what follows

// Context number i has T - i % 5 tokens.
static void batch_read(Bench *b, int i, int64_t T) {
    infer_reset(b->f);
    infer_feed(b->f, batch_ids(b, i), T - i % 5);
}

// Logits (n, V) after BATCH_STEPS tokens more
static void batch_logits(Bench *b, int n, int64_t T, float *to) {
    const int V = b->f->m.d.V;
    Infer *batch = batch_create(b->f, n, T + ROOM, b->f->window);
    batch_rehearse(batch, batch->recordings, [=] { queue_step(batch, batch->token); });
    for (int i = 0; i < n; i++) {
        batch_read(b, i, T);
        batch_take(batch, i, b->f);
    }
    for (int step = 0; step < BATCH_STEPS; step++) {
        for (int i = 0; i < n; i++)
            CUDA_CHECK(cudaMemcpyAsync((char *)batch->token + i * batch->apart, batch_ids(b, i) + T - i % 5 + step,
                                       sizeof(int), cudaMemcpyHostToDevice, stream));
        batch_step(batch, batch->recordings, [=] { queue_step(batch, batch->token); });
    }
    CUDA_CHECK(cudaStreamSynchronize(stream));
    for (int i = 0; i < n; i++)
        CUDA_CHECK(cudaMemcpy(to + (int64_t)i * V, (char *)batch->logits + i * batch->apart, V * sizeof(float),
                              cudaMemcpyDeviceToHost));
    batch_free(batch);
}

static void check_batches(Bench *b, const Kind &kind, int64_t T) {
    const int V = b->f->m.d.V, most = BATCHES[1];
    float *batch[2], *alone = (float *)malloc(V * sizeof(float));
    char text[120];
    double worst = 0;
    for (int i = 0; i < 2; i++) {
        batch[i] = (float *)malloc((int64_t)BATCHES[i] * V * sizeof(float));
        batch_logits(b, BATCHES[i], T, batch[i]);
    }
    for (int i = 0; i < most; i++) {
        batch_read(b, i, T);
        for (int step = 0; step < BATCH_STEPS; step++) infer_feed(b->f, batch_ids(b, i) + T - i % 5 + step, 1);
        copy_logits(b, alone);
        const double error = distance(batch[1] + (int64_t)i * V, alone, V);
        if (!(error <= worst)) worst = error;
    }
    // as between pre-fill and decode: sums in another order, then roundings to bf16
    snprintf(text, sizeof(text), "%s: logits of %d contexts at once after %d steps, against one by one", kind.name,
             most, BATCH_STEPS);
    say(worst < (PRECISION_BF16 ? 5e-2 : 1e-3), text, worst, PRECISION_BF16 ? "below 5e-2" : "below 1e-3");
    const bool same = memcmp(batch[0], batch[1], (size_t)BATCHES[0] * V * sizeof(float)) == 0;
    snprintf(text, sizeof(text), "%s: the same bits among %d contexts and among %d", kind.name, BATCHES[0], most);
    say(same, text, same, "1");
    for (float *p : {batch[0], batch[1], alone}) free(p);
}

// ---- figures ----

static double copy_bandwidth(void) { // bytes/s, read and written
    const size_t bytes = GPU_HERE ? 1 << 30 : 1 << 24;
    void *from, *to;
    double best = 1e30;
    CUDA_CHECK(cudaMalloc(&from, bytes));
    CUDA_CHECK(cudaMalloc(&to, bytes));
    for (int i = 0; i < 10; i++) {
        const double begin = wait_seconds();
        for (int k = 0; k < 4; k++) CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
        const double seconds = (wait_seconds() - begin) / 4;
        if (seconds < best) best = seconds;
    }
    CUDA_CHECK(cudaFree(from));
    CUDA_CHECK(cudaFree(to));
    return 2 * bytes / best;
}

static double all_weight_bytes(const Infer *f) { // in memory
    double bytes = 0;
    for (int i = 0; i < f->m.n_tensors; i++) {
        const Param &p = *f->m.fields[i];
        bytes += (double)p.rows * p.columns * (p.in_int8 ? 1 : sizeof(floatX)) + (p.in_int8 ? p.rows * 4. : 0);
    }
    return bytes + (f->int8_matrices ? (double)f->int8_matrices[0].room_size * sizeof(floatX) : 0);
}

// Of the weights that a step reads: all but the embedding and what tables over the vocabulary have taken in.
static double weight_bytes(const Infer *f) {
    const Dims &d = f->m.d;
    const double room = f->int8_matrices ? (double)f->int8_matrices[0].room_size : 0;
    const int64_t unread = (int64_t)d.V * d.C + (f->G ? (int64_t)d.A * d.C + (int64_t)f->G * d.C * 64 : 0);
    return all_weight_bytes(f) - (double)(unread + room) * sizeof(floatX);
}

static void csv_line(FILE *csv, const Infer *f, const Kind &kind, int64_t T, int contexts, int64_t cache,
                     double per_token, double prefill, double ms, double rate, double share, double bandwidth) {
    const Dims &d = f->m.d;
    const double grows = per_token * T;
    if (csv)
        fprintf(csv, "%s,%s,%d,%d,%d,%s,%s,%ld,%ld,%d,%.0f,%.0f,%.0f,%.0f,%.4f,%.1f,%.4f,%.0f\n", machine_name(),
                PRECISION_BF16 ? "BF16" : "FP32", d.L, d.C, d.V, weights_names[kind.weights], kind.cache, f->window, T,
                contexts, grows, cache - grows, per_token, prefill, ms, rate, share, bandwidth * 1e-9);
}

// n contexts of T tokens or up to 4 less, each drawing its own; `one`: tokens/s of one
static void batch_figures(Bench *b, const Kind &kind, int n, int64_t T, double one, double bandwidth, FILE *csv) {
    const int steps = GPU_HERE ? 192 : 4;
    const Sampling how = {0, 1, 0, 0, 1, 0, 1};
    uint8_t *types = (uint8_t *)calloc(b->f->m.d.V, 1);
    Samplers samplers;
    Infer *batch = batch_create(b->f, n, T + ROOM, b->f->window);
    samplers_open(&samplers, batch, types);
    for (int i = 0; i < n; i++) {
        batch_read(b, i, T);
        batch_take(batch, i, b->f);
        samplers_begin(&samplers, i, &how);
    }
    double begin = 0;
    for (int i = -3; i < steps; i++) {
        if (i <= 0) begin = wait_seconds();
        samplers_step(&samplers);
        CUDA_CHECK(cudaStreamSynchronize(stream)); // whoever serves looks at what was drawn
    }
    const double seconds = (wait_seconds() - begin) / steps, rate = n / seconds;
    const double share = weight_bytes(b->f) / bandwidth / seconds;
    int64_t cache;
    double per_token, transformer;
    infer_cache_bytes(b->f, &cache, &per_token, &transformer);
    printf("%-12s %9ld %9d contexts %12.3f ms a step %10.1f tok/s, %.2f times one's\n", kind.name, T, n, seconds * 1e3,
           rate, rate / one);
    csv_line(csv, b->f, kind, T, n, cache, per_token, 0, seconds * 1e3, rate, share, bandwidth);
    fflush(stdout);
    samplers_close(&samplers);
    batch_free(batch);
    free(types);
}

// Returns tokens/s of decoding.
static double figures(Bench *b, const Kind &kind, int64_t T, double bandwidth, FILE *csv) {
    Infer *f = b->f;
    const int steps = !GPU_HERE ? 4 : T > 500000 ? 12 : T > 10000 ? 48 : 192, repeats = !GPU_HERE || T > 10000 ? 1 : 4;
    double prefill = 1e30, per_token, transformer;
    int64_t cache;
    for (int i = 0; i < repeats; i++) {
        infer_reset(f);
        const double begin = wait_seconds();
        infer_feed(f, b->ids, T);
        const double seconds = wait_seconds() - begin;
        if (seconds < prefill) prefill = seconds;
    }
    infer_cache_bytes(f, &cache, &per_token, &transformer);
    const double seconds = decode(b, steps, nullptr), share = weight_bytes(f) / bandwidth / seconds;
    const double ms = seconds * 1e3, rate = 1 / seconds;
    const double grows = per_token * T; // what is left of `cache` are states
    printf("%-12s %9ld %10.4f %10.1f %12.0f %15.0f %12.3f %8.1f %8.1f %%\n", kind.name, T, grows * 1e-9,
           (cache - grows) * 1e-6, per_token, T / prefill, ms, rate, 100 * share);
    csv_line(csv, f, kind, T, 1, cache, per_token, T / prefill, ms, rate, share, bandwidth);
    fflush(stdout);
    return rate;
}

int main(int argc, char **argv) {
    program_name = "bench_infer";
    const char *path = nullptr;
    int64_t numbers[16], n = 0;
    for (int i = 1; i < argc; i++) {
        char *end;
        if (strcmp(argv[i], "-o") == 0 && i + 1 < argc) {
            path = argv[++i];
            continue;
        }
        if (n == 16) die(2, "expected at most 13 contexts");
        numbers[n++] = strtoll(argv[i], &end, 10);
        if (*end || numbers[n - 1] < 1)
            die(2, "\"%s\": expected -o FILE, or LAYERS WIDTH VOCABULARY CONTEXT..", argv[i]);
    }
    if (n > 0 && n < 4) die(2, "expected LAYERS WIDTH VOCABULARY CONTEXT.., found %ld numbers", n);
    const int64_t large[9] = {24, 2048, 65536, 256, 4096, 4352, 16384, 65536, 1000000},
                  small[6] = {6, 128, 320, 48, 160, 300};
    if (n == 0) {
        n = GPU_HERE ? 9 : 6;
        memcpy(numbers, GPU_HERE ? large : small, n * sizeof(int64_t));
    }
    Settings s;
    settings_default(&s);
    config_read(&s, "goldfinch", true);
    s.n_layer = numbers[0], s.n_embd = numbers[1], s.vocab_size = numbers[2];
    settings_check(&s);
    machine_start();
    const int64_t longest = numbers[n - 1], most_full = GPU_HERE ? 65536 : 300;
    FILE *csv = path ? fopen(path, "w") : nullptr;
    if (path && !csv) die(1, "%s: %s", path, strerror(errno));
    static Bench benches[n_kinds];
    for (int kind = 0; kind < n_kinds; kind++) {
        const int64_t most = kind == full && longest > most_full ? most_full : longest;
        const int64_t on_cpu = kinds[kind].least ? 32 : 64, window = kinds[kind].least ? LEAST_WINDOW : 0;
        bench_open(&benches[kind], &s, kinds[kind], most + ROOM, GPU_HERE ? window : on_cpu);
    }
    const double bandwidth = copy_bandwidth();
    const Infer *f = benches[0].f;
    printf("%s, %s, L%ld D%ld V%ld: %.3f G parameters\n", machine_name(), PRECISION_BF16 ? "bf16" : "fp32", s.n_layer,
           s.n_embd, s.vocab_size, f->m.n_parameters * 1e-9);
    for (int kind : {0, in_8_bits}) {
        const double weights = weight_bytes(benches[kind].f);
        printf("%s: %.3f GB of weights; a token reads %.3f GB of them; a copy moves %.0f GB/s, so %.3f ms at best\n",
               kinds[kind].name, all_weight_bytes(benches[kind].f) * 1e-9, weights * 1e-9, bandwidth * 1e-9,
               weights / bandwidth * 1e3);
    }
    printf("chunks of %d tokens; keys and values of the newest %ld tokens are kept, %.3f GB\n\n", f->chunk, f->window,
           f->window * 2e-9 * f->G * f->m.d.C * sizeof(floatX));
    check_logits(benches, longest < 5000 ? longest : 5000);
    for (int kind = 0; kind < n_kinds; kind++)
        if (kind != full) check_state(&benches[kind], kinds[kind], longest < 100000 ? longest : 100000);
    for (int kind : {0, in_8_bits}) check_batches(&benches[kind], kinds[kind], batch_tokens(longest));
    size_t before, after, total;
    CUDA_CHECK(cudaMemGetInfo(&before, &total));
    printf("\n%-12s %9s %10s %10s %12s %15s %12s %8s %10s\n", "", "context", "cache, GB", "states, MB", "bytes/token",
           "pre-fill tok/s", "decode, ms", "tok/s", "share");
    if (csv)
        fprintf(csv,
                "gpu,precision,layers,width,vocabulary,weights,cache,window,context,contexts,cache_bytes,state_bytes,"
                "bytes_per_token,prefill_tok_s,decode_ms,decode_tok_s,share,copy_gb_s\n");
    for (int kind = 0; kind < n_kinds; kind++)
        for (int64_t i = 3; i < n; i++)
            if (kind != full || numbers[i] <= most_full)
                figures(&benches[kind], kinds[kind], numbers[i], bandwidth, csv);
    CUDA_CHECK(cudaMemGetInfo(&after, &total));
    printf("\n");
    for (int kind : {0, in_8_bits}) {
        const int64_t T = batch_tokens(longest);
        const double one = figures(&benches[kind], kinds[kind], T, bandwidth, nullptr);
        for (int n : BATCHES) batch_figures(&benches[kind], kinds[kind], n, T, one, bandwidth, csv);
    }
    printf("\n");
    if (GPU_HERE) say(after == before, "bytes allocated while measuring", (double)before - (double)after, "0");
    else printf("This is no GPU: the times say nothing.\n");
    if (csv) fclose(csv);
    return failures > 0;
}
