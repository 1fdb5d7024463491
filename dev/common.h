// What the programs of the kernel lab share: random inputs, poisoned outputs, checks against the CPU, timing, the
// floor. Included after the trainer, whose types and functions (floatX, Pack, matmul, stream, ...) it uses.
//
// A program describes its subject in a struct Lab and ends in `return lab_main(...)`. For every shape lab_main calls
// `setup`, which makes the inputs and says what to expect of the outputs; then it runs each version on poisoned outputs
// and compares. A version is timed only if it passed.
#pragma once

#include <algorithm>
#include <vector>

// ---------------------------------------------------------------------------------------------------------------------
// Arrays on the device

static uint64_t lab_seed;       // of all random numbers: from the clock, or the environment's SEED
static uint64_t lab_series = 1; // the next array's are of its own; 0 to 4 are free for other uses

// A number uniform in [0, 1) that depends on (seed, series, i) alone, so that loops may draw in any order.
static double lab_uniform(uint64_t series, uint64_t i) {
    const uint64_t key = lab_seed * 0xd1342543de82ef95ull + series * 0xf1357aea2e62a9c5ull;
    return (double)(splitmix64(key, i) >> 11) * 0x1p-53;
}

struct Output { // what a kernel writes, and what the CPU expects of it
    const char *name = nullptr;
    double tolerance = 0;
    bool relative = false; // errors count against each number by itself, however small it is
    struct Expected {
        int64_t index;
        double value, scale;
    };
    std::vector<Expected> expected; // of all elements, or of a sample

    // Errors are compared to the value itself and to the root mean square of all expected values, or a larger scale
    void expect(int64_t index, double value, double scale = 0) { expected.push_back({index, value, scale}); }
    virtual ~Output() {}
    virtual void reset(void) = 0;   // before a version runs
    virtual double error(void) = 0; // after it ran
};
static std::vector<Output *> lab_outputs; // those of the shape at hand

template <typename T> struct Array : Output {
    T *p = nullptr; // on the device
    int64_t n = 0;
    std::vector<T> host; // an input's values; empty if it is none

    double operator[](int64_t i) const { return (double)(float)host[i]; }

    void allocate(int64_t count) {
        CUDA_CHECK(cudaFree(p));
        n = count;
        CUDA_CHECK(cudaMalloc(&p, n * sizeof(T)));
    }
    void upload(void) { CUDA_CHECK(cudaMemcpy(p, host.data(), n * sizeof(T), cudaMemcpyHostToDevice)); }

    // An input: f(i) for each element, rounded to T, which is what the CPU's computation reads, too.
    template <typename F> void fill(int64_t count, F f) {
        allocate(count);
        host.resize(n);
#pragma omp parallel for
        for (int64_t i = 0; i < n; i++) host[i] = (T)f(i);
        upload();
    }
    void random(int64_t count, double deviation = 1, double mean = 0) { // a bell curve, nearly: a sum of four
        const uint64_t series = lab_series += 4;
        fill(count, [=](int64_t i) {
            double sum = -2;
            for (int j = 0; j < 4; j++) sum += lab_uniform(series + j, i);
            return (float)(mean + deviation * sqrt(3.) * sum);
        });
    }

    // Kernels write this array: `count` new elements, or, with count 0, what was filled before, in place.
    void output(const char *name_, double tolerance_, int64_t count = 0) {
        name = name_, tolerance = tolerance_;
        if (count) {
            host.clear();
            allocate(count);
        }
        expected.clear();
        lab_outputs.push_back(this);
    }
    void reset(void) override {
        if (host.empty()) CUDA_CHECK(cudaMemset(p, 0xff, n * sizeof(T))); // NaN, or -1: all must be written
        else upload();
    }
    // The largest |found - expected| / (|expected| + scale, none if `relative`); infinite if not all are finite.
    double error(void) override {
        std::vector<T> found(n);
        CUDA_CHECK(cudaMemcpy(found.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        int64_t not_finite = 0;
#pragma omp parallel for reduction(+ : not_finite)
        for (int64_t i = 0; i < n; i++) not_finite += !isfinite((float)found[i]);
        double squares = 0, worst = 0;
        for (const Expected &e : expected) squares += e.value * e.value;
        const double rms = sqrt(squares / expected.size());
        for (const Expected &e : expected) {
            const double scale = relative ? 1e-300 : fmax(e.scale, rms) + 1e-300;
            worst = fmax(worst, fabs((float)found[e.index] - e.value) / (fabs(e.value) + scale));
        }
        return not_finite || !(rms < INFINITY) ? INFINITY : worst;
    }
};

static double by_precision(double fp32, double bf16) { return PRECISION_BF16 ? bf16 : fp32; }

// 0..n-1, or, where these are too many for the CPU, `most` of them: the first, the last, and random ones.
static std::vector<int64_t> sample(int64_t n, int64_t most) {
    std::vector<int64_t> chosen;
    for (int64_t i = 0; i < std::min(n, most); i++)
        chosen.push_back(n <= most ? i : i == 0 ? 0 : i == 1 ? n - 1 : (int64_t)(lab_uniform(0, i) * n));
    return chosen;
}

// A model for the subjects that are parts of a layer, of `layers` layers; its weights are zero. Where the kernels in
// use read and write is set afterwards: layer->p.NAME, layer->gold.k and so on take pointers to arrays.
static Model *lab_model(int layers, int B, int T, int C) {
    // one has memory at a time: the large blocks of the one before go
    static auto &made = *new std::vector<Model *>;
    if (!made.empty()) {
        Model *before = made.back();
        for (float *p : {before->master, before->grads, before->moment1, before->moment2}) CUDA_CHECK(cudaFree(p));
        if (PRECISION_BF16) CUDA_CHECK(cudaFree(before->params));
        CUDA_CHECK(cudaFree(before->activations));
    }
    Model *m = (Model *)malloc(sizeof(*m));
    made.push_back(m);
    char numbers[2][16];
    snprintf(numbers[0], sizeof(numbers[0]), "%d", layers);
    snprintf(numbers[1], sizeof(numbers[1]), "%d", C);
    const char *flags[] = {"--model.n_layer",
                           numbers[0],
                           "--model.n_embd",
                           numbers[1],
                           "--model.vocab_size",
                           "64",
                           "--model.inv_other_layer_ratio",
                           "2",
                           "--model.tmix2",
                           layers > 1 ? "gold" : ""};
    Settings s;
    settings_default(&s);
    settings_parse(&s, sizeof(flags) / sizeof(flags[0]), flags);
    settings_check(&s);
    model_plan(m, &s, B, T);
    model_allocate(m);
    return m;
}

// ---------------------------------------------------------------------------------------------------------------------
// Time and floor

#ifdef CUDA_ON_CPU
static const bool ON_GPU = false;
#else
static const bool ON_GPU = true;
#endif

// Median of the times of up to 50 runs, in ms. They are queued one behind the other, so that the GPU never waits.
template <typename F> static double median_ms(F f) {
    std::vector<cudaEvent_t> events(2);
    std::vector<double> times(1, 0);
    for (int n : {1, 0}) { // the first run says how many fit 0.2 s
        if (n == 0) n = (int)std::min(50., std::max(1., 200 / (times[0] + 1e-3)));
        events.resize(n + 1);
        times.resize(n);
        for (cudaEvent_t &event : events) CUDA_CHECK(cudaEventCreate(&event));
        CUDA_CHECK(cudaEventRecord(events[0], stream));
        for (int i = 1; i <= n; i++) {
            f();
            CUDA_CHECK(cudaEventRecord(events[i], stream));
        }
        CUDA_CHECK(cudaStreamSynchronize(stream));
        for (int i = 0; i < n; i++) {
            float ms;
            CUDA_CHECK(cudaEventElapsedTime(&ms, events[i], events[i + 1]));
            times[i] = ms;
        }
        for (cudaEvent_t event : events) CUDA_CHECK(cudaEventDestroy(event));
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

// the least that any version must move and compute
struct Cost {
    double bytes, flops;
};

// What this GPU can do, bytes/s of a copy (read and written) and flop/s of a large matrix product, measured once.
static Cost machine_rates(void) {
    static Cost rates = {0, 0};
    if (rates.bytes > 0) return rates;
    const int64_t bytes = 1 << 30;
    const int n = PRECISION_BF16 ? 8192 : 4096;
    Array<char> from, to;
    Array<floatX> a, b, c;
    from.allocate(bytes);
    to.allocate(bytes);
    const auto copy = [&] { CUDA_CHECK(cudaMemcpyAsync(to.p, from.p, bytes, cudaMemcpyDeviceToDevice, stream)); };
    rates.bytes = 2e3 * bytes / median_ms(copy);
    a.random((int64_t)n * n);
    b.random((int64_t)n * n);
    c.allocate((int64_t)n * n);
    rates.flops = 2e3 * n * n * n / median_ms([&] { matmul(c.p, n, rows(a.p, n), rows(b.p, n), n, n, n); });
    for (void *p : {(void *)from.p, (void *)to.p, (void *)a.p, (void *)b.p, (void *)c.p}) CUDA_CHECK(cudaFree(p));
    printf("machine device=\"%s\" copy_GB/s=%.0f matmul_TFLOP/s=%.1f\n", machine_name(), rates.bytes / 1e9,
           rates.flops / 1e12);
    return rates;
}

// ---------------------------------------------------------------------------------------------------------------------
// The program

// Whether versions for Hopper's warpgroups run here: on such a GPU, and on the CPU.
static bool lab_has_warpgroups(void) {
#if WARPGROUP_KERNELS
    machine_start();
    return !ON_GPU || has_warpgroups();
#else
    return false;
#endif
}

// of a shape, and what it must be a multiple of
struct Dimension {
    const char *name;
    int multiple;
};
typedef std::vector<std::vector<int>> Shapes;

struct Lab {
    const char *name;
    std::vector<Dimension> dimensions;
    std::vector<const char *> versions; // number 1 is the naive one, the last one is in use
    Shapes check_shapes, time_shapes;   // small and odd; as in training
    void (*setup)(const int *shape);    // inputs, outputs, what to expect
    void (*run)(int version);           // launches it on `stream`
    Cost (*cost)(const int *shape);
};

static bool lab_check(const Lab &lab, int version) { // of the shape that was set up
    double worst = 0;
    for (Output *output : lab_outputs) output->reset();
    lab.run(version);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaStreamSynchronize(stream));
    printf("  %d %-40s", version, lab.versions[version - 1]);
    for (Output *output : lab_outputs) {
        const double error = output->error();
        worst = fmax(worst, error / output->tolerance);
        printf(" %s %.1e%s", output->name, error, error <= output->tolerance ? "" : "!");
    }
    printf("   %s\n", worst <= 1 ? "ok" : "FAILED");
    return worst <= 1;
}

// One line that people and dev/bench.py read.
static void lab_time(const Lab &lab, int version, const std::vector<int> &shape) {
    const Cost cost = lab.cost(shape.data()), rates = ON_GPU ? machine_rates() : Cost{0, 0};
    const double ms = median_ms([&] { lab.run(version); });
    printf("result kernel=%s version=%d shape=", lab.name, version);
    for (size_t i = 0; i < shape.size(); i++) printf("%s%d", i ? "x" : "", shape[i]);
    printf(" precision=%s ms=%.4g", PRECISION_BF16 ? "BF16" : "FP32", ms);
    printf(" GB/s=%.4g TFLOP/s=%.4g", cost.bytes / ms / 1e6, cost.flops / ms / 1e9);
    if (ON_GPU) {
        const double floor = 1e3 * fmax(cost.bytes / rates.bytes, cost.flops / rates.flops);
        printf(" floor_ms=%.4g floor=%.1f%%", floor, 100 * floor / ms);
    } else {
        printf(" device=\"CPU: this is no GPU\"");
    }
    printf(" name=\"%s\"\n", lab.versions[version - 1]);
}

// NAME: checks and times all versions; NAME check: checks only; NAME VERSION [SHAPE..]: one version (0: all), any
// shape.
static int lab_main(const std::vector<Lab> &labs, int argc, char **argv) {
    program_name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    setvbuf(stdout, nullptr, _IOLBF, 0);
    const bool check_only = argc == 2 && strcmp(argv[1], "check") == 0;
    std::vector<int> numbers;
    for (int i = 1; i < argc && !check_only; i++) {
        char *end;
        numbers.push_back((int)strtol(argv[i], &end, 10));
        if (*end || numbers.back() < (i > 1))
            die(2, "\"%s\": expected `check`, or VERSION [SHAPE..] as numbers", argv[i]);
    }
    const int only = numbers.empty() ? 0 : numbers[0];
    machine_start();
    lab_seed = getenv("SEED") ? strtoull(getenv("SEED"), nullptr, 10) : (uint64_t)time(nullptr);
    printf("%s: %s, %s, SEED=%lu\n", program_name, machine_name(), PRECISION_BF16 ? "BF16" : "FP32", lab_seed);

    int passed = 0, failed = 0;
    for (const Lab &lab : labs) {
        const int n = (int)lab.versions.size();
        Shapes shapes = lab.check_shapes;
        size_t timed_from = shapes.size(); // the shapes from here on are timed
        if (numbers.size() > 1) {
            shapes = {{numbers.begin() + 1, numbers.end()}};
            timed_from = 0;
        } else if (ON_GPU && !check_only) {
            shapes.insert(shapes.end(), lab.time_shapes.begin(), lab.time_shapes.end());
        }
        std::vector<bool> good(n + 1, true);
        for (size_t i = 0; i < shapes.size(); i++) {
            if (shapes[i].size() != lab.dimensions.size())
                die(2, "%s: expected a shape of %zu numbers", lab.name, lab.dimensions.size());
            printf("%s", lab.name);
            for (size_t j = 0; j < shapes[i].size(); j++) {
                const Dimension &d = lab.dimensions[j];
                if (shapes[i][j] % d.multiple)
                    die(2, "%s %d: expected a multiple of %d", d.name, shapes[i][j], d.multiple);
                printf(" %s %d", d.name, shapes[i][j]);
            }
            printf("\n");
            lab_outputs.clear();
            lab.setup(shapes[i].data());
            for (int version = only ? only : 1; version <= std::min(n, only ? only : n); version++) {
                if (!lab_check(lab, version)) good[version] = false;
                ++(good[version] ? passed : failed);
                if (good[version] && i >= timed_from) lab_time(lab, version, shapes[i]);
            }
        }
    }
    if (!ON_GPU && !check_only && numbers.size() < 2)
        printf("no times: this is no GPU (%s VERSION SHAPE.. times them all the same)\n", argv[0]);
    if (passed + failed == 0) die(2, "there is no version %d", only);
    printf("%s: %d passed, %d failed\n", program_name, passed, failed);
    return failed > 0;
}
