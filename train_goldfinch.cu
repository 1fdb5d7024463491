// GoldFinch in plain CUDA C: all of training, from the settings to the loop over steps, in the order the data flows.
//
//     make train && ./train_goldfinch        for the GPU that is here, or for the CPU; -h lists every setting
//
//     1. Settings   SETTINGS, settings_check             7. Data          dataset_open, sample_start, data_batch
//     2. Machine    matmul, load, block_sum, mma         8. Checkpoints   safetensors_open, checkpoint_save
//     3. Tensors    TENSORS: names, shapes, groups       9. Several GPUs  one process each
//     4. Kernels    layernorm, lerp, ddlerp, wkv,       10. main          train, begin_step, validate
//                   attention, classifier, adamw        11. Config files  JSON, YAML, the paper's models by name
//     5. Layers     finch_c2_forward, gold_forward, token_cat_forward, cmix_forward, .., each beside its backward
//     6. Model      model_plan, model_forward, model_backward, model_update
//
// Names: x_forward_kernel runs on the device; x_forward launches it; finch_c2_forward and its like are layers and call
// these. x_backward goes back. dX is the gradient of X. time_maa_k and its like are tensors of the checkpoint.
// Letters, as in dev/spec.md: B sequences of T tokens, BT of both; C channels (n_embd); A channels inside a time mixer
// (dim_att), in H heads of N = 64; F inside a channel mixer (dim_ffn; FL: Llama's); V ids (vocab_size); L layers, of
// which G0 is the first of the last ones; R numbers cached a token. In tiles, lower case: m, n, k.
// Words with a meaning of their own:
//     row       one token's channels, or numbers of another kind; matrices are stored row by row, ld apart
//     pack      eight neighbouring numbers: what a thread loads and stores at once
//     tile      a small matrix: 16 x 16, 16 x 8, 8 x 8, what tensor cores multiply; or what shared memory holds of a
//               larger one; in WKV 16 tokens, of which a lane's part is its Share, in chunks of 64 (32 in fp32)
//     slice     a few channels (ddlerp) or rows (the logits) of what does not fit at once
//     partial   a block's part of a sum over all tokens; add_partials adds the parts, always in the same order
//     kept      stays from the forward to the backward pass; scratch (tmp): all layers use the same
//     remake    to compute again in the backward pass what was not kept (grad_cp)
//     lead      1 if row 0 is the token before the first, which only a shift sees (inference); else 0
//     rank      one of several processes, each with a GPU of its own (section 9), also its number; in TENSORS the width
//               of GOLD's low-rank function. hidden: the width of any function x -> tanh(x w1) w2
//     floor     the time that the least bytes or flops would take: what a kernel is measured by

// ---------------------------------------------------------------------------------------------------------------------
// 1. Settings: one table gives the struct, the command line, -h, the block printed at the start and the checkpoint's
//    metadata. Every key is --model.NAME or --train.NAME.

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <glob.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <initializer_list>

static const char *program_name = "train_goldfinch";

// Of this process among those of a run, one per GPU (section 9); one process alone is rank 0 of 1.
static int rank = 0, n_ranks = 1;
static void ranks_before_words(void);
[[noreturn]] static void ranks_fail(int code); // ends this rank and tells the others, which end too

// Exit codes: 1 the system failed us (disk, device), 2 a setting or a file that can't be used, 3 numbers that are not
// finite. What stops all ranks, rank 0 alone says: the others give it a second before they speak.
[[noreturn]] __attribute__((format(printf, 2, 3))) void die(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fflush(stdout);
    if (n_ranks > 1) ranks_before_words();
    fprintf(stderr, "%s: ", program_name);
    if (n_ranks > 1) fprintf(stderr, "rank %d: ", rank);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    if (n_ranks > 1) ranks_fail(code);
    exit(code);
}

// The check of every number read from a file: dies unless low <= found <= high. index: of a list's entry, or -1.
static void expect(const char *file, const char *field, int64_t index, int64_t low, int64_t high, int64_t found) {
    if (low <= found && found <= high) return;
    char entry[32] = "", most[32] = "";
    if (index >= 0) snprintf(entry, sizeof(entry), "[%ld]", index);
    if (high == INT64_MAX) snprintf(most, sizeof(most), " or more");
    else if (high > low) snprintf(most, sizeof(most), " to %ld", high);
    die(2, "%s: %s%s: expected %ld%s, found %ld", file, field, entry, low, most, found);
}

// Kinds: whole (INT) and REAL numbers with their least and largest value (whole ones with what they are a multiple of),
// a WORD (a name) and a PATH. The defaults are the paper's L12 D768 model. The settings of the part "start" say how a
// run is started and stopped, not what it computes: a checkpoint carries all others, and --train.resume 1 takes those
// from there. NESTED rows are those whose name has a dot.
// clang-format off
#define SETTINGS(X, NESTED) \
    X(model, INT,  n_layer, "12", 1, 4096, 1, "layers") \
    X(model, INT,  n_embd, "768", 64, 65536, 64, "channels C") \
    X(model, INT,  ctx_len, "1024", 1, 4194304, 1, "tokens of one training sequence") \
    X(model, INT,  vocab_size, "65536", 8, 16777208, 8, "token ids V") \
    X(model, INT,  head_size, "64", 64, 64, 64, "channels of a head; only 64") \
    X(model, INT,  dim_att, "0", 0, 65536, 64, "channels inside a time mixer (0: n_embd)") \
    X(model, INT,  dim_ffn, "0", 0, 1048576, 32, "channels inside a channel mixer (0: 3.5 n_embd)") \
    X(model, WORD, tmix, "x060c2", 0, 0, 0, "time mixer of the first layers") \
    X(model, WORD, tmix2, "gold", 0, 0, 0, "time mixer of the last layers (empty: tmix everywhere)") \
    X(model, WORD, cmix, "x060", 0, 0, 0, "channel mixer of the first layers") \
    X(model, WORD, cmix2, "x060", 0, 0, 0, "channel mixer of the last layers") \
    X(model, REAL, inv_other_layer_ratio, "3", 1, 1e9, 0, "one layer in so many is one of the last layers") \
    X(model, REAL, kv_cache_compression_ratio, "16", 1, 65536, 0, "n_embd / numbers cached per token (GOLD)") \
    X(model, INT,  use_one_minus_w, "1", 0, 1, 1, "Finch-C2: scale keys by one minus the decay") \
    X(model, INT,  use_v2, "1", 0, 1, 1, "Finch-C2: second value instead of the bonus u") \
    X(model, INT,  parallel, "0", 0, 1, 1, "time and channel mixer read the same input") \
    X(model, REAL, head_size_divisor, "8", 1e-3, 1e3, 0, "of the group norms of Finch and Eagle") \
    NESTED(model, REAL, rope.base, "0", 0, 1e30, 0, "of attention layers' rotary positions, usually 10000 (0: none)") \
    NESTED(model, REAL, rope.rebase, "1", 1e-9, 1e30, 0, "a factor on base") \
    NESTED(model, REAL, rope.rescale, "1", 1e-9, 1e9, 0, "angles are divided by it") \
    NESTED(model, REAL, brope.rescale, "0", 0, 1e9, 0, "binary rotary positions: angles are divided by it (0: none)") \
    X(model, REAL, dropout, "0", 0, 0, 0, "only 0") \
    X(optimizer, INT,  micro_bsz, "32", 1, 65536, 1, "sequences of one micro-batch") \
    X(optimizer, INT,  accumulate_grad_batches, "1", 1, 1e6, 1, "micro-batches of one step") \
    X(optimizer, REAL, lr_init, "6e-4", 0, 1e38, 0, "learning rate after the warmup") \
    X(optimizer, REAL, lr_final, "2e-4", 0, 1e38, 0, "learning rate at my_exit_tokens") \
    X(optimizer, WORD, lr_decay_type, "cos", 0, 0, 0, "cos, linear, exp or oneminussqrt") \
    X(optimizer, REAL, lr_wait, "0", 0, 0.999, 0, "fraction of my_exit_tokens before the decay begins") \
    X(optimizer, INT,  warmup_steps, "10", -1, 1e9, 1, "steps from a fifth of the learning rate to all (-1: 10)") \
    X(optimizer, INT,  my_exit_tokens, "0", 0, 1e15, 1, "tokens of the run and its schedule (0: data_file's size)") \
    X(optimizer, REAL, beta1, "0.9", 0, 0.999999, 0, "decay of AdamW's first moment") \
    X(optimizer, REAL, beta2, "0.99", 0, 0.999999, 0, "decay of AdamW's second moment") \
    X(optimizer, REAL, adam_eps, "1e-8", 1e-30, 1, 0, "AdamW's epsilon") \
    X(optimizer, REAL, weight_decay, "0.001", 0, 1e3, 0, "of the matrices") \
    X(optimizer, REAL, weight_decay_final, "-1", -1, 1e3, 0, "weight decay at my_exit_tokens (0 or less: no change)") \
    X(optimizer, REAL, gradient_clip_val, "1", 0, 1e9, 0, "largest norm of the gradient (0: any)") \
    X(optimizer, INT,  layerwise_lr, "1", 0, 1, 1, "groups have factors on the learning rate: 2 for time_decay") \
    X(optimizer, INT,  grad_cp, "0", 0, 2, 1, "recompute in backward: 0 nothing, 2 what is cheap, 1 whole layers") \
    X(optimizer, INT,  train_stage, "3", 1, 3, 1, "1: initialize, save, stop; 2: train, own rate factors; 3: train") \
    X(optimizer, INT,  seed_everything, "1", 0, 1e15, 1, "of the initial weights and the samples") \
    X(data, PATH, data_file, "", 0, 0, 0, "binidx: PREFIX of PREFIX.bin and .idx; utf-8: a text") \
    X(data, WORD, data_type, "binidx", 0, 0, 0, "binidx (Megatron's format) or utf-8 (ids are bytes + 1)") \
    X(data, PATH, validation_data_file, "", 0, 0, 0, "as data_file (empty: none, or a tenth of a utf-8 data_file)") \
    X(data, PATH, mask_file, "", 0, 0, 0, "PREFIX of a binidx of u8 beside data_file: 1: a token's prediction counts") \
    X(data, PATH, validation_mask_file, "", 0, 0, 0, "the same beside validation_data_file") \
    X(data, INT,  val_every, "100", 0, 1e15, 1, "steps between validations (0: none, not even at the end)") \
    X(data, INT,  val_batches, "0", 0, 1e9, 1, "micro-batches of one validation (0: the whole file)") \
    X(data, INT,  sample_every, "0", -1, 1e15, 1, "steps between samples, utf-8 only (0: one at the end; -1: none)") \
    X(start, INT,  devices, "1", -1, 4096, 1, "GPUs of each machine, a process each (-1: all; started by mpirun,") \
    X(start, INT,  num_nodes, "1", 1, 65536, 1, "torchrun or srun: as many as they start); machines") \
    X(start, INT,  overlap_comm, "-1", -1, 1, 1, "sum gradients during the backward pass (-1: across machines only)") \
    X(start, INT,  max_steps, "0", 0, 1e15, 1, "stop after so many steps; the schedule stays (0: at my_exit_tokens)") \
    X(start, INT,  save_every, "1000", 0, 1e15, 1, "steps between checkpoints (0: only at the end)") \
    X(start, INT,  keep_every, "0", 0, 1e15, 1, "steps between checkpoints that stay when newer ones come (0: none)") \
    X(start, INT,  keep_best, "1", 0, 1, 1, "model_best.safetensors: the weights of the lowest validation loss") \
    X(start, INT,  profile_step, "0", 0, 1e15, 1, "step that a profiler records (ncu --profile-from-start off)") \
    X(start, PATH, out, "", 0, 0, 0, "folder of the run (empty: proj_dir/proj_name-proj_suffix, or out)") \
    X(start, PATH, proj_dir, "", 0, 0, 0, "folder of runs (empty: out); with one of these three set and no out,") \
    X(start, PATH, proj_name, "", 0, 0, 0, "a run's name (empty: as L12-D768-x060c2_gold)") \
    X(start, PATH, proj_suffix, "", 0, 0, 0, "and what follows it (empty: 0), the run's folder is named by them") \
    X(start, INT,  resume, "0", 0, 1, 1, "go on from the newest checkpoint in out, with its settings") \
    X(start, PATH, load_model, "", 0, 0, 0, "safetensors file to take the first weights from") \
    X(start, INT,  load_partial, "0", 0, 1, 1, "load_model may lack or have other tensors: take those that fit")
// clang-format on

typedef int64_t INT;
typedef double REAL;
typedef char WORD[16], PATH[1024], LONG_PATH[1024 + 272]; // LONG_PATH: a PATH and a file name of ours

typedef struct Settings {
#define FIELD(part, kind, name, ...) kind name;
#define NO_FIELD(...)
    SETTINGS(FIELD, NO_FIELD)
#undef FIELD
#undef NO_FIELD
    struct {
        REAL base, rebase, rescale;
    } rope;
    struct {
        REAL rescale;
    } brope;
    INT mix_rank, decay_rank; // of x060, where a file by others has other ranks: no settings, its tensors say it
} Settings;

typedef struct Setting {
    const char *part, *kind, *name, *initial;
    double low, high, multiple;
    const char *help;
    size_t offset, size; // of the field in Settings, in bytes
} Setting;

static const Setting settings_table[] = {
#define ROW(part, kind, name, initial, low, high, multiple, help) \
    {#part, #kind, #name, initial, low, high, multiple, help, offsetof(Settings, name), sizeof(kind)},
    SETTINGS(ROW, ROW)
#undef ROW
};
static const int n_settings = sizeof(settings_table) / sizeof(settings_table[0]);

static bool setting_in_checkpoint(const Setting *row) { return strcmp(row->part, "start") != 0; }

static void setting_key(const Setting *row, char *key) { // "model.n_layer"; key has room for a PATH
    snprintf(key, sizeof(PATH), "%s.%s", strcmp(row->part, "model") == 0 ? "model" : "train", row->name);
}

const Setting *setting_find(const char *key) { // null if there is no such key
    PATH name;
    for (int i = 0; i < n_settings; i++) {
        setting_key(&settings_table[i], name);
        if (strcmp(key, name) == 0) return &settings_table[i];
    }
    return nullptr;
}

// Writes text's value into the field; returns what was expected if it is no such value, else null.
static const char *setting_set(Settings *s, const Setting *row, const char *text) {
    static char expected[96];
    char *field = (char *)s + row->offset, *end = nullptr;
    const bool whole = strcmp(row->kind, "INT") == 0;
    if (!whole && strcmp(row->kind, "REAL") != 0) {
        snprintf(expected, sizeof(expected), "at most %d letters", (int)row->size - 1);
        if (strlen(text) >= row->size) return expected;
        memset(field, 0, row->size);
        memcpy(field, text, strlen(text));
        return nullptr;
    }
    char number[64]; // without the underscores of 10_000
    size_t length = 0;
    for (const char *t = text; *t; t++) {
        const bool between = *t == '_' && t > text && isdigit((unsigned char)t[-1]) && isdigit((unsigned char)t[1]);
        if (!between && length + 1 < sizeof(number)) number[length++] = *t;
    }
    number[length] = '\0';
    int n = snprintf(expected, sizeof(expected), "a %snumber from %.10g to %.10g", whole ? "whole " : "", row->low,
                     row->high);
    if (row->multiple > 1) snprintf(expected + n, sizeof(expected) - n, ", a multiple of %.0f", row->multiple);
    const int64_t integer = whole ? strtoll(number, &end, 10) : 0;
    const double value = whole ? (double)integer : strtod(number, &end);
    const bool in_range = value >= row->low && value <= row->high; // not so if it is nan
    if (end == number || *end || !in_range || (whole && integer % (int64_t)row->multiple != 0)) return expected;
    if (value != 0 && fabs(value) < FLT_MIN) return "0 or a number that a float holds (1.2e-38 or more)";
    memcpy(field, whole ? (const void *)&integer : (const void *)&value, row->size);
    return nullptr;
}

// The field as text, in the shortest form that setting_set reads back to the same value. text has room for a PATH.
static void setting_get(const Settings *s, const Setting *row, char *text) {
    const void *field = (const char *)s + row->offset;
    if (strcmp(row->kind, "INT") == 0) {
        snprintf(text, sizeof(PATH), "%ld", *(const int64_t *)field);
    } else if (strcmp(row->kind, "REAL") == 0) {
        for (int digits = 6; digits <= 17; digits++) {
            snprintf(text, sizeof(PATH), "%.*g", digits, *(const double *)field);
            if (strtod(text, nullptr) == *(const double *)field) break;
        }
    } else {
        snprintf(text, sizeof(PATH), "%s", (const char *)field);
    }
}

// Section 11 reads these from configs and the command line, and prints them.
static void settings_preset(Settings *s);                             // what holds without a data_file
static void settings_parse(Settings *s, int argc, const char **argv); // argv without the program's name
static void settings_print_config(const Settings *s);                 // in a form that -c reads back
static bool print_config = false;                                     // --print-config: print all settings and stop
static bool names_config(int argc, const char **argv);                // whether there is a -c
static int64_t paper_batch(int argc, const char **argv); // sequences of the paper's step, 0 without a named training

static void settings_default(Settings *s) {
    memset(s, 0, sizeof(*s));
    for (int i = 0; i < n_settings; i++) setting_set(s, &settings_table[i], settings_table[i].initial);
    s->mix_rank = 32, s->decay_rank = 64;
}

static void settings_derive(Settings *s) { // what stands for a default that depends on others
    if (s->warmup_steps < 0) s->warmup_steps = 10;
    if (s->dim_att == 0) s->dim_att = s->n_embd;
    if (s->dim_ffn == 0) s->dim_ffn = (int64_t)(s->n_embd * 3.5) / 32 * 32;
}

// Turns away what can't work together, before anything is allocated.
static void settings_check(Settings *s) {
    const char *type = s->lr_decay_type;
    settings_derive(s);
    if (s->kv_cache_compression_ratio > (double)s->n_embd) {
        die(2, "--model.kv_cache_compression_ratio: expected at most n_embd %ld, found %g", s->n_embd,
            s->kv_cache_compression_ratio);
    }
    if (s->rope.base > 0 && s->rope.base * s->rope.rebase < 1) {
        die(2, "--model.rope.base: expected 0, or with rebase as a factor at least 1, found %g",
            s->rope.base * s->rope.rebase);
    }
    if (s->rope.base > 0 && s->brope.rescale > 0)
        die(2, "--model.rope.base: expected 0 where brope.rescale is set, found %g", s->rope.base);
    if (strcmp(type, "cos") && strcmp(type, "linear") && strcmp(type, "exp") && strcmp(type, "oneminussqrt"))
        die(2, "--train.lr_decay_type: expected cos, linear, exp or oneminussqrt, found \"%s\"", type);
    if (strcmp(type, "exp") == 0 && (s->lr_init == 0 || s->lr_final == 0))
        die(2, "--train.lr_decay_type exp: expected rates above 0, found %g, %g", s->lr_init, s->lr_final);
    if (s->weight_decay_final > 0 && s->weight_decay == 0)
        die(2, "--train.weight_decay: expected more than 0 where weight_decay_final is, found 0");
    if (strcmp(s->data_type, "binidx") && strcmp(s->data_type, "utf-8"))
        die(2, "--train.data_type: expected binidx or utf-8, found \"%s\"", s->data_type);
    if (strcmp(s->data_type, "utf-8") == 0 && s->vocab_size < 257)
        die(2, "--model.vocab_size: expected 264 or more for utf-8 (an id is a byte + 1), found %ld", s->vocab_size);
}

// Where the run's files go: out, or as the reference names it once a config or a flag says anything of proj_*.
static void settings_folder(Settings *s) {
    if (s->out[0]) return;
    PATH name;
    snprintf(name, sizeof(name), "L%ld-D%ld-%s%s%s", s->n_layer, s->n_embd, s->tmix, s->tmix2[0] ? "_" : "", s->tmix2);
    const char *dir = s->proj_dir[0] ? s->proj_dir : "out", *suffix = s->proj_suffix[0] ? s->proj_suffix : "0";
    int n = snprintf(s->out, sizeof(s->out), "%s", dir);
    if (!s->proj_dir[0] && !s->proj_name[0] && !s->proj_suffix[0]) return;
    n += snprintf(s->out + n, sizeof(s->out) - n, "/%s-%s", s->proj_name[0] ? s->proj_name : name, suffix);
    if (n >= (int)sizeof(s->out)) die(2, "--train.proj_name: expected a shorter one");
}

static void settings_print(const Settings *s) {
    int column = 0;
    for (int i = 0; i < n_settings; i++) {
        const Setting *row = &settings_table[i];
        const bool new_part = i == 0 || strcmp(row->part, row[-1].part) != 0;
        PATH value;
        setting_get(s, row, value);
        if (new_part || column + strlen(row->name) + strlen(value) > 114)
            column = printf("%s%-10s", i ? "\n" : "", new_part ? row->part : "");
        else column += printf(" |");
        column += printf(" %s %s", row->name, value[0] ? value : "\"\"");
    }
    printf("\n");
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Machine: error checks, the stream, matrix products (cuBLAS), 16-byte loads, sums over threads, warp tiles

#include <cublas_v2.h>
#ifndef CUDA_ON_CPU
#include <cuda.h>
#include <cudaTypedefs.h>
#endif
#include <cuda_bf16.h>
#include <cuda_profiler_api.h>
#include <cuda_runtime.h>
#include <limits.h>
#include <nvtx3/nvToolsExt.h>

#ifndef PRECISION_BF16
#define PRECISION_BF16 1
#endif

// floatX is the type in which weights and activations are stored; all arithmetic is fp32.
#if PRECISION_BF16
typedef __nv_bfloat16 floatX;
#else
typedef float floatX;
#endif

#define CUDA_CHECK(call) cuda_check((call), __FILE__, __LINE__)
static void cuda_check(cudaError_t error, const char *file, int line) {
    if (error != cudaSuccess) die(1, "CUDA error at %s:%d: %s", file, line, cudaGetErrorString(error));
}
#define CUBLAS_CHECK(call) cublas_check((call), __FILE__, __LINE__)
static void cublas_check(cublasStatus_t status, const char *file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) die(1, "cuBLAS error %d at %s:%d", (int)status, file, line);
}

static cudaStream_t stream; // everything runs on one stream, in order (section 9 has a second one)
static cublasHandle_t cublas;
static const size_t CUBLAS_WORKSPACE = 32 << 20;
static int device_number; // of the GPU in use
static int multiprocessors;
[[maybe_unused]] static int compute_capability; // 90 for 9.0
[[maybe_unused]] static int block_smem;         // bytes of shared memory that a block can have

#ifdef GPU_ARCH
__global__ void no_work_kernel(void) {}
#endif

static int ranks_device(int devices); // section 9: which of them is this rank's

static void machine_start(void) { // once, before the first allocation
    static bool started = false;
    if (started) return;
    started = true;
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
        die(2,
            "this build is for an NVIDIA GPU and finds none; `make train GPU=0` builds the same kernels for the CPU");
    cudaDeviceProp device;
    device_number = ranks_device(devices);
    CUDA_CHECK(cudaSetDevice(device_number));
    CUDA_CHECK(cudaGetDeviceProperties(&device, device_number));
    if (device.major < 8)
        die(2, "%s has compute capability %d.%d, expected 8.0 or newer; `make train GPU=0` builds for the CPU",
            device.name, device.major, device.minor);
    compute_capability = 10 * device.major + device.minor;
#ifdef GPU_ARCH // what the Makefile built for
    cudaFuncAttributes attributes;
    const cudaError_t code = cudaFuncGetAttributes(&attributes, no_work_kernel);
    if (code != cudaSuccess)
        die(2,
            "%s is sm_%d%d, and this build, made with GPU_ARCH=\"%s\", holds no code for it (%s); "
            "`make GPU_ARCH=%d%d` makes one that does",
            device.name, device.major, device.minor, GPU_ARCH, cudaGetErrorString(code), device.major, device.minor);
#endif
    multiprocessors = device.multiProcessorCount, block_smem = (int)device.sharedMemPerBlockOptin;
    CUDA_CHECK(cudaStreamCreate(&stream));
    CUBLAS_CHECK(cublasCreate(&cublas));
    CUBLAS_CHECK(cublasSetStream(cublas, stream));
    void *workspace; // fixed, so that products give the same bits in every run
    CUDA_CHECK(cudaMalloc(&workspace, CUBLAS_WORKSPACE));
    CUBLAS_CHECK(cublasSetWorkspace(cublas, workspace, CUBLAS_WORKSPACE));
    CUBLAS_CHECK(cublasSetMathMode(cublas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)); // and no TF32
}

// What a profiler sees when it is told to wait for a start (dev/profile.py).
static void profile_begin(void) {
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaProfilerStart());
}
static void profile_end(void) {
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaProfilerStop());
}

// Names what is launched until the end of the scope, for the timeline of Nsight Systems (dev/README.md).
struct NamedRange {
    NamedRange(const char *format, ...) {
        char name[64];
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(name, sizeof(name), format, arguments);
        va_end(arguments);
        nvtxRangePushA(name);
    }
    ~NamedRange() { nvtxRangePop(); }
};

static const char *machine_name(void) {
    static char name[300];
    cudaDeviceProp device;
    machine_start();
    CUDA_CHECK(cudaGetDeviceProperties(&device, device_number));
    snprintf(name, sizeof(name), "%s", device.name);
    return name;
}

// Dense peak of the device in this build's precision, flop/s (vendors' data sheets); 0 where unknown.
static double machine_peak_flops(void) {
    static const struct {
        const char *name;
        double bf16, fp32;
    } known[] = {
        {"H100 PCIe", 756e12, 51e12}, {"H100", 989e12, 67e12},   {"H200", 989e12, 67e12},   {"GH200", 989e12, 67e12},
        {"B200", 2250e12, 80e12},     {"A100", 312e12, 19.5e12}, {"A800", 312e12, 19.5e12}, {"L40", 181e12, 90e12},
        {"A40", 150e12, 37e12},       {"4090", 165e12, 83e12},   {"3090", 71e12, 36e12},    {"L4", 121e12, 30e12},
    };
    for (const auto &k : known)
        if (strstr(machine_name(), k.name)) return PRECISION_BF16 ? k.bf16 : k.fp32;
    return 0;
}

// A kernel that plain loops stand in for on the CPU (dev/cpu/README.md): compiled for size there, which is quick.
// TWIN(call): these loops, unless kernels are to run as they are; the function's work is done then.
#ifdef CUDA_ON_CPU
#define HAS_TWIN __attribute__((cold))
#define TWIN(...) \
    if (cuda_on_cpu::twins) return __VA_ARGS__
#else
#define HAS_TWIN
#define TWIN(...)
#endif

// ---- matrix products ----

// A matrix in memory, row-major: element (i, j) at p[i * ld + j], or at p[j * ld + i] if t (it is used transposed).
// A batch repeats it every `stride` elements.
template <typename T> struct Matrix {
    const T *p;
    int64_t ld;
    bool t;
    int64_t stride;
};
template <typename T> static Matrix<T> rows(const T *p, int64_t ld, int64_t stride = 0) {
    return {p, ld, false, stride};
}
template <typename T> static Matrix<T> columns(const T *p, int64_t ld, int64_t stride = 0) {
    return {p, ld, true, stride};
}

template <typename T> static cudaDataType_t data_type(const T *) { return sizeof(T) == 2 ? CUDA_R_16BF : CUDA_R_32F; }

// c (m, n) = alpha a (m, k) b (k, n) + beta c. Products and sums in fp32. cuBLAS counts columns first: to it, this is
// cᵀ = bᵀ aᵀ.
template <typename TC, typename T>
static void matmul(TC *c, int64_t ldc, Matrix<T> a, Matrix<T> b, int m, int n, int k, float beta = 0, int batch = 1,
                   int64_t stride_c = 0, float alpha = 1) {
    CUBLAS_CHECK(cublasGemmStridedBatchedEx(cublas, b.t ? CUBLAS_OP_T : CUBLAS_OP_N, a.t ? CUBLAS_OP_T : CUBLAS_OP_N, n,
                                            m, k, &alpha, b.p, data_type(b.p), (int)b.ld, b.stride, a.p, data_type(a.p),
                                            (int)a.ld, a.stride, &beta, c, data_type(c), (int)ldc, stride_c, batch,
                                            CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// ---- hashes ----

// The i-th random number of the stream `key` (Steele, Lea and Flood's SplitMix64)
__host__ __device__ static inline uint64_t splitmix64(uint64_t key, uint64_t i) {
    uint64_t z = key + (i + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// FNV-1a: hashes begin with hash_start and take in one byte, or more, at a time.
static const uint64_t hash_start = 0xCBF29CE484222325ull;
static uint64_t hash_step(uint64_t hash, uint64_t bytes) { return (hash ^ bytes) * 0x100000001B3ull; }

// ---- loads, stores, sums ----

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// more than 48 KB a block must be asked for
template <typename Kernel> static void allow_smem(Kernel kernel, size_t bytes) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

// Eight neighbouring elements: the unit in which kernels load and store, 16 bytes in bf16 (p is 16-byte aligned).
struct Pack {
    float x[8];
};

template <typename T> struct RawPack { uint4 q[sizeof(T) / 2]; }; // as loaded: eight T, not converted yet

template <typename T> __device__ inline RawPack<T> load_raw(const T *p) {
    RawPack<T> raw;
    for (size_t i = 0; i < sizeof(T) / 2; i++) raw.q[i] = ((const uint4 *)p)[i];
    return raw;
}

// Two neighbours; in bf16 one register, so what is kept for later stays packed.
#if PRECISION_BF16
typedef unsigned Pair;
__device__ inline float first_of(Pair p) { return __uint_as_float(p << 16); }
__device__ inline float second_of(Pair p) { return __uint_as_float(p & 0xffff0000u); }
__device__ inline Pair pair_of(float x, float y) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    return *(const Pair *)&both;
}
__device__ inline void store_pair(float *p, float x, float y) { *(float2 *)p = make_float2(x, y); }
#else
typedef float2 Pair;
__device__ inline float first_of(Pair p) { return p.x; }
__device__ inline float second_of(Pair p) { return p.y; }
__device__ inline Pair pair_of(float x, float y) { return make_float2(x, y); }
#endif
__device__ inline Pair load_pair(const floatX *p) { return *(const Pair *)p; }
__device__ inline void store_pair(floatX *p, float x, float y) { *(Pair *)p = pair_of(x, y); }

__device__ inline Pack unpack(const RawPack<floatX> &raw) {
    Pack v;
    for (int i = 0; i < 4; i++) {
        const Pair pair = ((const Pair *)raw.q)[i];
        v.x[2 * i] = first_of(pair), v.x[2 * i + 1] = second_of(pair);
    }
    return v;
}
__device__ inline Pack load(const floatX *p) { return unpack(load_raw(p)); }
__device__ inline void store(floatX *p, const Pack &v) {
    RawPack<floatX> raw;
    for (int i = 0; i < 4; i++) ((Pair *)raw.q)[i] = pair_of(v.x[2 * i], v.x[2 * i + 1]);
    for (size_t i = 0; i < sizeof(floatX) / 2; i++) ((uint4 *)p)[i] = raw.q[i];
}
#if PRECISION_BF16
__device__ inline Pack load(const float *p) {
    const float4 low = ((const float4 *)p)[0], high = ((const float4 *)p)[1];
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}
__device__ inline void store(float *p, const Pack &v) {
    ((float4 *)p)[0] = make_float4(v.x[0], v.x[1], v.x[2], v.x[3]);
    ((float4 *)p)[1] = make_float4(v.x[4], v.x[5], v.x[6], v.x[7]);
}
#endif

// Eight numbers of 8 bits as eight floatX (p 8-byte aligned). Conversions from integers are slow, so the bits of a byte
// take the place of a float's last ones.
#if PRECISION_BF16
__device__ inline RawPack<floatX> load_raw(const int8_t *p) {
    const uint2 raw = *(const uint2 *)p;
    RawPack<floatX> v;
    for (int i = 0; i < 4; i++) {
        // two of them: 0x4300 is 128, the bits below count ones; but the sign, which is worth -128, makes it 256
        const unsigned two = __byte_perm(i < 2 ? raw.x : raw.y, 0x43434343u, i % 2 ? 0x4342 : 0x4140),
                       low = two & 0xff7fff7fu, high = two & 0xff80ff80u;
        *((__nv_bfloat162 *)v.q + i) = __hsub2(*(const __nv_bfloat162 *)&low, *(const __nv_bfloat162 *)&high);
    }
    return v;
}
#else
__device__ inline RawPack<floatX> load_raw(const int8_t *p) {
    const uint2 raw = *(const uint2 *)p;
    RawPack<floatX> v;
    for (int i = 0; i < 8; i++) { // 2^23 + x + 128
        const unsigned bits = __byte_perm((i < 4 ? raw.x : raw.y) ^ 0x80808080u, 0x4B000000u, 0x7440 + i % 4);
        *((float *)v.q + i) = __uint_as_float(bits) - (8388608.f + 128);
    }
    return v;
}
#endif

__device__ inline Pack zero_pack(void) { return Pack{{0, 0, 0, 0, 0, 0, 0, 0}}; }

// Wrappers with a twin for the CPU (dev/cpu/): the only places that know which machine they run on.
#ifdef CUDA_ON_CPU
template <typename T> __device__ inline T *dynamic_smem(void) { return cuda_on_cpu::dynamic_smem<T>(); }
using cuda_on_cpu::Site; // where a call stands, for messages
template <int n>
__device__ inline void shuffle_xor(float (&to)[n], const float (&from)[n], int bits, Site site = Site::here()) {
    cuda_on_cpu::shuffle_xor(to, from, bits, site);
}
template <int n> __device__ inline void warp_sum(float (&x)[n], int width = 32, Site site = Site::here()) {
    cuda_on_cpu::warp_sum(n, x, width, site);
}
__device__ inline float warp_sum(float x, int width = 32, Site site = Site::here()) {
    cuda_on_cpu::warp_sum(1, &x, width, site);
    return x;
}
__device__ inline float warp_max(float x, int width = 32, Site site = Site::here()) {
    return cuda_on_cpu::warp_max(x, width, site);
}
__device__ inline float exp2_fast(float x) { return exp2f(x); }
__device__ inline float fast_exp(float x) { return expf(x); }
__device__ inline void async_copy16(void *to, const void *from, bool valid) {
    cuda_on_cpu::async_copy16(to, from, valid);
}
__device__ inline void async_commit(void) { cuda_on_cpu::async_commit(); }
template <int newest> __device__ inline void async_wait(void) { cuda_on_cpu::async_wait<newest>(); }
static const int64_t GUARD_BYTES = cuda_on_cpu::guard_bytes; // 0 but under the sanitizers
static void guard_gap(void *p, size_t bytes) { cuda_on_cpu::guard_gap(p, bytes); }
#else
// the block's shared memory whose size is given at launch
template <typename T> __device__ inline T *dynamic_smem(void) {
    extern __shared__ __align__(1024) unsigned char dynamic_smem_bytes[];
    return (T *)dynamic_smem_bytes;
}

// n numbers at a time: no gain here, but on the CPU the lanes meet once instead of n times.
// What the lane has in `from` whose number differs from this one's in `bits`
template <int n> __device__ inline void shuffle_xor(float (&to)[n], const float (&from)[n], int bits) {
    for (int i = 0; i < n; i++) to[i] = __shfl_xor_sync(0xffffffffu, from[i], bits);
}
// sums, sum, maximum over aligned groups of `width` lanes, returned to all of them
template <int n> __device__ inline void warp_sum(float (&x)[n], int width = 32) {
    for (int w = width / 2; w > 0; w /= 2)
        for (int i = 0; i < n; i++) x[i] += __shfl_xor_sync(0xffffffffu, x[i], w);
}
__device__ inline float warp_sum(float x, int width = 32) {
    for (int w = width / 2; w > 0; w /= 2) x += __shfl_xor_sync(0xffffffffu, x, w);
    return x;
}
__device__ inline float warp_max(float x, int width = 32) {
    for (int w = width / 2; w > 0; w /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, w));
    return x;
}

// 2^x by the one instruction there is for it, to 2 units in the last place; exp2f adds three for results under 2^-126.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 2 ulp and 1e-7 |x| beside it
__device__ inline float fast_exp(float x) { return PRECISION_BF16 ? exp2_fast(x * 1.44269504f) : expf(x); }

// 16 bytes from global to shared memory in the background; zeros if not valid. They land at the wait of their group.
__device__ inline void async_copy16(void *to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ inline void async_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int newest> __device__ inline void async_wait(void) { // for all groups but so many of the newest
    asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

static const int64_t GUARD_BYTES = 0; // between tensors, where the CPU's sanitizers watch
static void guard_gap(void *, size_t) {}
#endif

// Sum over the block, whole warps, to all threads, in fixed order: of a float, float2 or float4. shared: 32 of them, or
// of a larger type. Where blockDim.x is a part of a warp, over this part.
template <typename V, typename S> __device__ inline V block_sum(V v, S *shared, int warps = blockDim.x / 32) {
    const int n = sizeof(V) / sizeof(float);
    V *sums = (V *)shared;
    if (warps == 0) {
        warp_sum((float(&)[n])v, blockDim.x);
        return v;
    }
#ifdef CUDA_ON_CPU
    if (cuda_on_cpu::twins && warps > 1) {
        cuda_on_cpu::block_sum(n, (float *)&v, Site::here());
        return v;
    }
#endif
    warp_sum((float(&)[n])v);
    if (warps == 1) return v;
    __syncthreads(); // the last call's values may still be read
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    v = sums[0];
    for (int w = 1; w < warps; w++) {
        const V other = sums[w];
        for (int i = 0; i < n; i++) ((float *)&v)[i] += ((const float *)&other)[i];
    }
    return v;
}

// ---- warp tiles: what tensor cores multiply ----
//
// A warp holds A (16x16), B (16x8) and C (16x8, fp32) spread over its lanes; mma adds A B to C. Outside these functions
// nobody knows a lane's share of A or B; of C a lane holds x[0..3] at (tile_row(i), tile_col(i)):
//
//     lane = 4 g + t:   x[0], x[1] at row g, columns 2t, 2t+1        x[2], x[3] at row g + 8, the same columns
//
// The lanes' shares are those of the PTX instruction mma.m16n8k16; FP32 builds and the CPU keep the same shares as
// floats.
static const int N = 64; // head size
// Tiles in shared memory have rows of 64 numbers (those of a head, or as many channels), 16 bytes longer, so that rows
// fall into different banks.
static const int PAD = 16 / sizeof(floatX), LD = 64 + PAD;
struct TileC {
    float x[4];
};
__device__ inline int tile_row(int i) { return threadIdx.x % 32 / 4 + 8 * (i / 2); }
__device__ inline int tile_col(int i) { return 2 * (threadIdx.x % 4) + i % 2; }
// row of element i of a B, see to_floats
__device__ inline int tile_k(int i) { return 2 * (threadIdx.x % 4) + i % 2 + i / 2 * 8; }

#if PRECISION_BF16 && !defined(CUDA_ON_CPU)
struct TileA {
    unsigned x[4];
};
struct TileB {
    unsigned x[2];
};

__device__ inline unsigned bf16_pair(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(unsigned *)&pair;
}
__device__ inline unsigned smem_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// p in shared memory, rows 16-byte aligned (ld a multiple of 8).
__device__ inline TileA load_a_from(const floatX *own) { // own: where A[lane % 16][lane / 16 * 8] lies, and seven more
    TileA a;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3])
                 : "r"(smem_address(own))
                 : "memory");
    return a;
}
__device__ inline TileA load_a(const floatX *p, int ld) { // A[m][k] = p[m * ld + k]
    const int lane = threadIdx.x % 32;
    return load_a_from(p + lane % 16 * ld + lane / 16 * 8);
}
__device__ inline TileA load_a_t(const floatX *p, int ld) { // A[m][k] = p[k * ld + m]
    const int lane = threadIdx.x % 32;
    TileA a;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3])
                 : "r"(smem_address(p + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8))
                 : "memory");
    return a;
}
__device__ inline TileB load_b(const floatX *p, int ld) { // B[k][n] = p[n * ld + k]
    const int lane = threadIdx.x % 16;
    TileB b;
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(b.x[0]), "=r"(b.x[1])
                 : "r"(smem_address(p + lane % 8 * ld + lane / 8 * 8))
                 : "memory");
    return b;
}
__device__ inline TileB load_b_t(const floatX *p, int ld) { // B[k][n] = p[k * ld + n]
    const int lane = threadIdx.x % 16;
    TileB b;
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(b.x[0]), "=r"(b.x[1])
                 : "r"(smem_address(p + lane * ld))
                 : "memory");
    return b;
}
// Two of them side by side, B[k][n] with n up to 16, by one instruction instead of two.
__device__ inline void load_b_pair(TileB *b, const floatX *p, int ld) { // B[k][n] = p[n * ld + k]
    const int lane = threadIdx.x % 32;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0].x[0]), "=r"(b[0].x[1]), "=r"(b[1].x[0]), "=r"(b[1].x[1])
                 : "r"(smem_address(p + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8))
                 : "memory");
}
__device__ inline void load_b_pair_t(TileB *b, const floatX *p, int ld) { // B[k][n] = p[k * ld + n]
    const int lane = threadIdx.x % 32;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0].x[0]), "=r"(b[0].x[1]), "=r"(b[1].x[0]), "=r"(b[1].x[1])
                 : "r"(smem_address(p + lane % 16 * ld + lane / 16 * 8))
                 : "memory");
}
// as load_a, from global memory; the last of so many
__device__ inline TileA load_a_global(const floatX *p, int ld, int rows) {
    // rows stands for those after it; ld even
    const int lane = threadIdx.x % 32, k = lane % 4 * 2;
    const floatX *upper = p + (int64_t)min(lane / 4, rows - 1) * ld + k,
                 *lower = p + (int64_t)min(lane / 4 + 8, rows - 1) * ld + k;
    return {{*(const unsigned *)upper, *(const unsigned *)lower, *(const unsigned *)(upper + 8),
             *(const unsigned *)(lower + 8)}};
}
__device__ inline void to_floats(float (&x)[4], const TileB &b) { // B[tile_k(i)][lane / 4]
    const float2 upper = __bfloat1622float2(*(const __nv_bfloat162 *)&b.x[0]),
                 lower = __bfloat1622float2(*(const __nv_bfloat162 *)&b.x[1]);
    x[0] = upper.x, x[1] = upper.y, x[2] = lower.x, x[3] = lower.y;
}
// Two results side by side, (16x8 | 16x8), as the left operand of the next product.
__device__ inline TileA to_a(const TileC &left, const TileC &right) {
    return {{bf16_pair(left.x[0], left.x[1]), bf16_pair(left.x[2], left.x[3]), bf16_pair(right.x[0], right.x[1]),
             bf16_pair(right.x[2], right.x[3])}};
}
__device__ inline TileB make_b(float x0, float x1, float x2, float x3) {
    return {{bf16_pair(x0, x1), bf16_pair(x2, x3)}};
}
// Eight numbers of each lane: as an A, the first four in row lane / 4, the others eight rows below; either four as a B,
// in column lane / 4. So where row and column are the same, their product has products of a lane's own numbers.
__device__ inline TileA eight_as_a(const RawPack<floatX> &v) {
    const unsigned *pairs = (const unsigned *)v.q;
    return {{pairs[0], pairs[2], pairs[1], pairs[3]}};
}
__device__ inline TileB half_as_b(const RawPack<floatX> &v, int half) {
    const unsigned *pairs = (const unsigned *)v.q + 2 * half;
    return {{pairs[0], pairs[1]}};
}
// B[k][column] = A[8 n + column][k]
__device__ inline TileB as_b(const TileA &a, int n) { return {{a.x[n], a.x[n + 2]}}; }
template <int n> __device__ inline void mma(TileC (&c)[n], const TileA &a, const TileB (&b)[n]) { // c[i] += a b[i]
#pragma unroll
    for (int i = 0; i < n; i++)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[i].x[0]), "+f"(c[i].x[1]), "+f"(c[i].x[2]), "+f"(c[i].x[3])
            : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b[i].x[0]), "r"(b[i].x[1]));
}
#else
struct TileA {
    float x[8];
};
struct TileB {
    float x[4];
};

// A's element i of this lane: row,
__device__ inline int a_row(int i) { return threadIdx.x % 32 / 4 + i / 2 % 2 * 8; }
__device__ inline int a_col(int i) { return threadIdx.x % 4 * 2 + i % 2 + i / 4 * 8; } // column;
// B's column; its row is tile_k(i)
__device__ inline int b_col(void) { return threadIdx.x % 32 / 4; }

__device__ inline TileA load_a(const floatX *p, int ld) {
    TileA a;
    for (int i = 0; i < 8; i++) a.x[i] = (float)p[a_row(i) * ld + a_col(i)];
    return a;
}
__device__ inline TileA load_a_t(const floatX *p, int ld) {
    TileA a;
    for (int i = 0; i < 8; i++) a.x[i] = (float)p[a_col(i) * ld + a_row(i)];
    return a;
}
__device__ inline TileB load_b(const floatX *p, int ld) {
    TileB b;
    for (int i = 0; i < 4; i++) b.x[i] = (float)p[b_col() * ld + tile_k(i)];
    return b;
}
__device__ inline TileA load_a_global(const floatX *p, int ld, int rows) {
    TileA a;
    for (int i = 0; i < 8; i++) a.x[i] = (float)p[(int64_t)min(a_row(i), rows - 1) * ld + a_col(i)];
    return a;
}
__device__ inline void to_floats(float (&x)[4], const TileB &b) {
    for (int i = 0; i < 4; i++) x[i] = b.x[i];
}
__device__ inline TileB load_b_t(const floatX *p, int ld) {
    TileB b;
    for (int i = 0; i < 4; i++) b.x[i] = (float)p[tile_k(i) * ld + b_col()];
    return b;
}
__device__ inline void load_b_pair(TileB *b, const floatX *p, int ld) {
    for (int j = 0; j < 2; j++) b[j] = load_b(p + 8 * j * ld, ld);
}
__device__ inline void load_b_pair_t(TileB *b, const floatX *p, int ld) {
    for (int j = 0; j < 2; j++) b[j] = load_b_t(p + 8 * j, ld);
}
__device__ inline TileA to_a(const TileC &left, const TileC &right) {
    TileA a;
    for (int i = 0; i < 4; i++) {
        a.x[i] = (float)(floatX)left.x[i];
        a.x[4 + i] = (float)(floatX)right.x[i];
    }
    return a;
}
__device__ inline TileB make_b(float x0, float x1, float x2, float x3) {
    return {{(float)(floatX)x0, (float)(floatX)x1, (float)(floatX)x2, (float)(floatX)x3}};
}
__device__ inline TileA eight_as_a(const RawPack<floatX> &v) {
    const Pack all = unpack(v);
    const float *x = all.x;
    return {{x[0], x[1], x[4], x[5], x[2], x[3], x[6], x[7]}};
}
__device__ inline TileB half_as_b(const RawPack<floatX> &v, int half) {
    const Pack all = unpack(v);
    const float *x = all.x + 4 * half;
    return {{x[0], x[1], x[2], x[3]}};
}
__device__ inline TileB as_b(const TileA &a, int n) {
    return {{a.x[2 * n], a.x[2 * n + 1], a.x[2 * n + 4], a.x[2 * n + 5]}};
}
#ifdef CUDA_ON_CPU
template <int n>
__device__ inline void mma(TileC (&c)[n], const TileA &a, const TileB (&b)[n], Site site = Site::here()) {
    cuda_on_cpu::mma(1, n, c[0].x, 0, a.x, b[0].x, 0, site);
}
#else
// true fp32, by shuffles
template <int n> __device__ inline void mma(TileC (&c)[n], const TileA &a, const TileB (&b)[n]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < 16; k++) {
        // which of four lanes has column k of A, row k of B
        const int holder = k % 8 / 2;
        const float upper = __shfl_sync(0xffffffffu, a.x[k % 2 + k / 8 * 4], lane / 4 * 4 + holder);
        const float lower = __shfl_sync(0xffffffffu, a.x[k % 2 + k / 8 * 4 + 2], lane / 4 * 4 + holder);
#pragma unroll
        for (int i = 0; i < n; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float right =
                    __shfl_sync(0xffffffffu, b[i].x[k % 2 + k / 8 * 2], (lane % 4 * 2 + e) * 4 + holder);
                c[i].x[e] = fmaf(upper, right, c[i].x[e]);
                c[i].x[2 + e] = fmaf(lower, right, c[i].x[2 + e]);
            }
    }
}
#endif
#endif

// Several of these in one call, as for sums:  c += a[0] b[0] + a[1] b[1] + ..,  and  c[j] += a[j] b
#ifdef CUDA_ON_CPU
template <int k, int n>
__device__ inline void mma(TileC (&c)[n], const TileA (&a)[k], const TileB (&b)[k][n], Site site = Site::here()) {
    cuda_on_cpu::mma(k, n, c[0].x, 0, a[0].x, b[0][0].x, 4 * n, site);
}
template <int m, int n>
__device__ inline void mma(TileC (&c)[m][n], const TileA (&a)[m], const TileB (&b)[n], Site site = Site::here()) {
    cuda_on_cpu::mma(m, n, c[0][0].x, 4 * n, a[0].x, b[0].x, 0, site);
}
#else
template <int k, int n> __device__ inline void mma(TileC (&c)[n], const TileA (&a)[k], const TileB (&b)[k][n]) {
#pragma unroll
    for (int i = 0; i < k; i++) mma(c, a[i], b[i]);
}
template <int m, int n> __device__ inline void mma(TileC (&c)[m][n], const TileA (&a)[m], const TileB (&b)[n]) {
#pragma unroll
    for (int j = 0; j < m; j++) mma(c[j], a[j], b);
}
#endif

// Products whose left operand stays in fp32: results, as they stand in their lanes' registers. Nothing is converted:
// tensor cores read 11 significant bits of a number (tf32), where a bf16 has 8, and drop the others.
#if PRECISION_BF16 && !defined(CUDA_ON_CPU)
// c += a b, a (16x8), b (8x8): its rows tile_col(0) and tile_col(1) of column lane / 4
__device__ inline void mma_half(TileC &c, const TileC &a, float b0, float b1) {
    // the instruction's k are columns 0, 2, 4, 6, 1, 3, 5, 7
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
        : "r"(__float_as_uint(a.x[0])), "r"(__float_as_uint(a.x[2])), "r"(__float_as_uint(a.x[1])),
          "r"(__float_as_uint(a.x[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
// c[i] += [a[0] | a[1]] b[i]
template <int n> __device__ inline void mma_wide(TileC (&c)[n], const TileC (&a)[2], const TileB (&b)[n]) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < n; i++) mma_half(c[i], a[half], first_of(b[i].x[half]), second_of(b[i].x[half]));
}
#else
__device__ inline void mma_half(TileC &c, const TileC &a, float b0, float b1) {
    TileC sum[1] = {c};
    const TileB b[1] = {{{b0, b1, 0, 0}}};
    mma(sum, TileA{{a.x[0], a.x[1], a.x[2], a.x[3], 0, 0, 0, 0}}, b);
    c = sum[0];
}
template <int n> __device__ inline void mma_wide(TileC (&c)[n], const TileC (&a)[2], const TileB (&b)[n]) {
    const float *left = a[0].x, *right = a[1].x;
    mma(c, TileA{{left[0], left[1], left[2], left[3], right[0], right[1], right[2], right[3]}}, b);
}
#endif

// ---- warpgroup tiles: what Hopper's tensor cores multiply (sm_90a) ----
//
// Four warps, a warpgroup, multiply 64 rows at a time (wgmma), each warp 16 of them: C (64 x n, fp32) is n / 8 TileC of
// each warp. The other operands are tiles in shared memory, rows of N channels. Products run in the background, in
// groups: warpgroup_begin, products, warpgroup_commit. warpgroup_wait<n> waits for all groups but the n newest; before
// that nobody may read C or write what is being multiplied, and `hold` keeps the compiler from moving C across it.
//
// Tiles come by the copy engine (TMA). One thread asks for them, and a Signal in shared memory (mbarrier) tells all
// when they are there: it counts arrivals and bytes, and each time that all have come its phase, 0 or 1, ends. The
// engine stores the eight 16-byte pieces of row r at places piece ^ r % 8, so that the rows of a column of pieces fall
// into different banks; only products read such tiles.

typedef floatX SharedTile[64][N]; // at a multiple of 1024 bytes
typedef uint64_t Signal;
#if defined(CUDA_ON_CPU) || PRECISION_BF16
#define WARPGROUP_KERNELS 1 // in this build; in fp32 only on the CPU, to check them closely
#else
#define WARPGROUP_KERNELS 0
#endif

#ifdef CUDA_ON_CPU
#define WARPGROUPS 1 // this compiler pass has them
struct HeadMap {     // an array (B, T, A), of which the copy engine brings 64 tokens of a head at a time
    const floatX *p;
    int T, A;
};
static HeadMap head_map(const floatX *p, int, int T, int A) { return {p, T, A}; }
__device__ inline void signal_init(Signal *s, int arrivals) { cuda_on_cpu::signal_init(s, arrivals); }
__device__ inline void signal_expect(Signal *s, int bytes) { cuda_on_cpu::signal_arrive(s, bytes); }
__device__ inline void signal_arrive(Signal *s) { cuda_on_cpu::signal_arrive(s, 0); }
__device__ inline void signal_wait(Signal *s, int phase, Site site = Site::here()) {
    cuda_on_cpu::signal_wait(s, phase, site);
}
__device__ inline void copy_tile(SharedTile *to, const HeadMap &from, Signal *s, int h, int t, int b) {
    for (int row = 0; row < 64; row++) {
        floatX *out = (*to)[row];
        if (t + row >= from.T) memset(out, 0, sizeof(floatX) * N);
        else memcpy(out, from.p + ((int64_t)b * from.T + t + row) * from.A + h * N, sizeof(floatX) * N);
    }
    cuda_on_cpu::signal_bytes(s, sizeof(SharedTile));
}
__device__ inline void warpgroup_begin(void) {}
__device__ inline void warpgroup_commit(void) {}
template <int n> __device__ inline void warpgroup_wait(void) {}
template <int n> __device__ inline void hold(TileC (&)[n]) {}
template <int n> __device__ inline void registers_more(void) {}
template <int n> __device__ inline void registers_fewer(void) {}

// A warp's part of the products, at once
template <int n> __device__ inline void warpgroup_rows(TileC (&c)[n], const SharedTile &a, const SharedTile *b) {
    for (TileC &tile : c) tile = {};
    for (int k = 0; k < N; k += 16) {
        TileB right[n];
        for (int j = 0; j < n; j++) right[j] = load_b(&b[j / 8][j % 8 * 8][k], N);
        mma(c, load_a(&a[threadIdx.x % 128 / 32 * 16][k], N), right);
    }
}
template <int k> __device__ inline void warpgroup_columns(TileC (&c)[8], const TileA (&p)[k], const SharedTile *b) {
    for (int i = 0; i < k; i++) {
        TileB right[8];
        for (int j = 0; j < 8; j++) right[j] = load_b_t(&b[i / 4][i % 4 * 16][8 * j], N);
        mma(c, p[i], right);
    }
}
#elif PRECISION_BF16
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WARPGROUPS 1
#endif
struct HeadMap {
    CUtensorMap map;
};
static HeadMap head_map(const floatX *p, int B, int T, int A) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode, 12000,
                                                    cudaEnableDefault, &found));
#else
        CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", (void **)&encode, cudaEnableDefault, &found));
#endif
        if (!encode) die(1, "this driver has no cuTensorMapEncodeTiled: expected one of CUDA 12 or newer");
    }
    const cuuint64_t size[3] = {(cuuint64_t)A, (cuuint64_t)T, (cuuint64_t)B};
    const cuuint64_t step[2] = {A * sizeof(floatX), (cuuint64_t)T * A * sizeof(floatX)};
    const cuuint32_t box[3] = {N, 64, 1}, every[3] = {1, 1, 1};
    HeadMap m;
    const CUresult error = encode(&m.map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)p, size, step, box, every,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) die(1, "cuTensorMapEncodeTiled (%d, %d, %d): error %d", B, T, A, (int)error);
    return m;
}
#endif

#if defined(WARPGROUPS) && !defined(CUDA_ON_CPU)
__device__ inline void signal_init(Signal *s, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n fence.mbarrier_init.release.cluster;" ::"r"(
                     smem_address(s)),
                 "r"(arrivals)
                 : "memory");
}
// an arrival that also announces so many bytes
__device__ inline void signal_expect(Signal *s, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(s)), "r"(bytes)
                 : "memory");
}
__device__ inline void signal_arrive(Signal *s) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(s)) : "memory");
}
__device__ inline void signal_wait(Signal *s, int phase) { // until this phase has ended
    asm volatile(
        "{\n .reg .pred there;\n"
        "again_%=:\n mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n @!there bra again_%=;\n}" ::"r"(
            smem_address(s)),
        "r"(phase)
        : "memory");
}
__device__ inline void copy_tile(SharedTile *to, const HeadMap &from, Signal *s, int h, int t, int b) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem_address(to)),
                 "l"(&from.map), "r"(smem_address(s)), "r"(h * N), "r"(t), "r"(b)
                 : "memory");
}
__device__ inline void warpgroup_begin(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_commit(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int n> __device__ inline void warpgroup_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}
template <int n> __device__ inline void hold(TileC (&c)[n]) {
#pragma unroll
    for (int i = 0; i < 4 * n; i++) asm volatile("" : "+f"(c[i / 4].x[i % 4])::"memory");
}
// Warpgroups that only copy give registers to those that multiply: n a thread.
template <int n> __device__ inline void registers_more(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n> __device__ inline void registers_fewer(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}

// How wgmma is told of a tile: address / 16; 64 units of 16 bytes from one group of 8 rows to the next; the swizzle.
__device__ inline uint64_t tile_descriptor(const SharedTile *p) {
    return (smem_address(p) & 0x3ffff) >> 4 | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}

// clang-format off
#define TILES4(c, i) "+f"((c)[i].x[0]), "+f"((c)[i].x[1]), "+f"((c)[i].x[2]), "+f"((c)[i].x[3]), \
    "+f"((c)[i + 1].x[0]), "+f"((c)[i + 1].x[1]), "+f"((c)[i + 1].x[2]), "+f"((c)[i + 1].x[3]), \
    "+f"((c)[i + 2].x[0]), "+f"((c)[i + 2].x[1]), "+f"((c)[i + 2].x[2]), "+f"((c)[i + 2].x[3]), \
    "+f"((c)[i + 3].x[0]), "+f"((c)[i + 3].x[1]), "+f"((c)[i + 3].x[2]), "+f"((c)[i + 3].x[3])
#define NUMBERS32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NUMBERS64 NUMBERS32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// clang-format on

// c (64 x 8 n) = a (64 x N) b^T, b: 8 n rows
__device__ inline void warpgroup_rows(TileC (&c)[8], const SharedTile &a, const SharedTile *b) {
    const uint64_t left = tile_descriptor(&a), right = tile_descriptor(b);
#pragma unroll
    for (int k = 0; k < 4; k++) // 16 channels, 32 bytes, at a time; the first product does not add
        asm volatile("{\n .reg .pred add;\n setp.ne.b32 add, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NUMBERS32
                     "}, %32, %33, add, 1, 1, 0, 0;\n}"
                     : TILES4(c, 0), TILES4(c, 4)
                     : "l"(left + 2 * k), "l"(right + 2 * k), "r"(k));
}
__device__ inline void warpgroup_rows(TileC (&c)[16], const SharedTile &a, const SharedTile *b) {
    const uint64_t left = tile_descriptor(&a), right = tile_descriptor(b);
#pragma unroll
    for (int k = 0; k < 4; k++)
        asm volatile("{\n .reg .pred add;\n setp.ne.b32 add, %66, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NUMBERS64
                     "}, %64, %65, add, 1, 1, 0, 0;\n}"
                     : TILES4(c, 0), TILES4(c, 4), TILES4(c, 8), TILES4(c, 12)
                     : "l"(left + 2 * k), "l"(right + 2 * k), "r"(k));
}
// c (64 x N) += p (64 x 16 k, in registers) b, b: 16 k rows
template <int k> __device__ inline void warpgroup_columns(TileC (&c)[8], const TileA (&p)[k], const SharedTile *b) {
    const uint64_t right = tile_descriptor(b);
#pragma unroll
    for (int i = 0; i < k; i++) // 16 rows, 2048 bytes, at a time
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NUMBERS32
                     "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                     : TILES4(c, 0), TILES4(c, 4)
                     : "r"(p[i].x[0]), "r"(p[i].x[1]), "r"(p[i].x[2]), "r"(p[i].x[3]), "l"(right + 128 * i));
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 3. Tensors: every parameter of the model, named once

// Initial values (spec section 7). For layer l: p = l/(L-1), q = 1 - l/L; d = i/C over channels.
enum InitKind { CONSTANT, CURVE, POWER, UNIFORM, ORTHOGONAL, HEAD_ORTHO, TIME_DECAY, TIME_FAAAA, LN_X_GAIN };
typedef struct Init {
    InitKind kind;
    double a, b;
} Init;
static Init constant(double value) { return {CONSTANT, value, 0}; }
static Init curve(double a, double b) { return {CURVE, a, b}; } // 1 - (d^(a q) + b p)
static Init power(double a, double b) { return {POWER, a, b}; } // d^(a q) + b p
static Init uniform(double range) { return {UNIFORM, range, 0}; }
static Init orthogonal(double gain) { return {ORTHOGONAL, gain, 0}; }
static Init rule(InitKind kind) { return {kind, 0, 0}; }

// Optimizer groups (spec section 8), and who is in them. A matrix with a dimension of 1 gets no weight decay either.
enum Group { MATRIX, SHIFT, WKV_DECAY, VECTOR };
static const struct {
    bool weight_decay;
    double rate, rate_stage_2; // factors on the learning rate (1 with layerwise_lr 0): usually; with train_stage 2
} GROUPS[4] = {
    {true, 1, 1},  // MATRIX: of linear layers, embedding, head
    {false, 1, 2}, // SHIFT: time_maa, time_mix, time_faaaa
    {false, 2, 3}, // WKV_DECAY: time_decay
    {false, 1, 1}, // VECTOR: all others, that is norms and the low-rank w1 and w2
};

// Which layers have a tensor: once at the top; once with TokenCat; in block 0; in every block; or in blocks of a mixer.
// clang-format off
enum Where {
    TOP = 1, KV = 2, FIRST = 4, BLOCK = 8,
    FINCH_C2 = 16, GOLD = 32, FINCH = 64, FINCH_B = 128, EAGLE = 256, GPTALPHA = 512, LLAMA = 1024, // time mixers
    CMIX = 2048, CMIX_EAGLE = 4096, CMIX_LLAMA = 8192, CMIXES = CMIX | CMIX_EAGLE,                  // channel mixers
    FINCHES = FINCH_C2 | FINCH | FINCH_B, RWKV = FINCHES | EAGLE, NOT_LLAMA = RWKV | GOLD | GPTALPHA,
    MIXED = FINCH_C2 | FINCH | GPTALPHA, SHIFTED = MIXED | FINCH_B
};
// clang-format on

typedef struct Shape {
    int ndim;
    int64_t size[3]; // 1 beyond ndim
} Shape;
static Shape shape(int64_t a) { return {1, {a, 1, 1}}; }
static Shape shape(int64_t a, int64_t b) { return {2, {a, b, 1}}; }
static Shape shape(int64_t a, int64_t b, int64_t c) { return {3, {a, b, c}}; }

static const int MIX_RANK = 32;                     // of a mix
static const int DECAY_RANK = 64, VALUE2_RANK = 64; // of what depends on the data in w and v2
// x060 may have others, mix_rank and decay_rank, as public RWKV-6 models of 7 and 14 G parameters do: inference alone.

// The table: field, name in a checkpoint, shape, initial values, group, where. Letters as in the spec, beside
// R: numbers per token in the cache; mixes: how many inputs a time mixer mixes; rank: of GOLD's key and value;
// FL: width of Llama's channel mixer. A NORM is two tensors of the group VECTOR, NAME.weight with these initial values
// and NAME.bias with zeros. The slices of time_maa_w2 (and time_maa_w1's groups of 32 columns) belong to the mixed
// inputs in this order: r, k, v, w, v2 of Finch-C2; w, k, v, r, g of Finch; r, k, v, w of Finch without a gate;
// r (which makes the queries), k, v of GPTAlpha; k, v of GOLD's time_maa_kv_w2.
// clang-format off
//    field             name in a checkpoint     shape                  initial values    group      where
#define TENSORS(X, NORM) \
    X(emb,              "emb.weight",            (V, C),                uniform(1e-4),    MATRIX,    TOP) \
    X(head,             "head.weight",           (V, C),                rule(HEAD_ORTHO), MATRIX,    TOP) \
    NORM(ln_out,        "ln_out",                (C),                   constant(1),                 TOP) \
    X(w_kv_cache_a,     "w_kv_cache_a.weight",   (R, C),                orthogonal(1),    MATRIX,    KV) \
    X(w_kv_cache_b,     "w_kv_cache_b.weight",   (A, C + R),            orthogonal(1),    MATRIX,    KV) \
    NORM(ln0,           "ln0",                   (C),                   constant(1),                 FIRST) \
    NORM(ln1,           "ln1",                   (C),                   constant(1),                 BLOCK) \
    NORM(ln2,           "ln2",                   (C),                   constant(1),                 BLOCK) \
    X(time_maa_x,       "att.time_maa_x",        (1, 1, C),             curve(1, 0),      SHIFT,     SHIFTED | GOLD) \
    X(time_maa_r,       "att.time_maa_r",        (1, 1, C),             curve(0.5, 0),    SHIFT,     SHIFTED) \
    X(time_maa_q,       "att.time_maa_q",        (1, 1, C),             curve(0.5, 0),    SHIFT,     GOLD) \
    X(time_maa_v_cache, "att.time_maa_v_cache",  (1, 1, C),             curve(1, 0),      SHIFT,     GOLD) \
    X(time_maa_k,       "att.time_maa_k",        (1, 1, C),             curve(1, 0),      SHIFT,     SHIFTED | GOLD) \
    X(time_maa_v,       "att.time_maa_v",        (1, 1, C),             curve(1, 0.3),    SHIFT,     SHIFTED | GOLD) \
    X(time_maa_w,       "att.time_maa_w",        (1, 1, C),             curve(1, 0),      SHIFT,     FINCHES) \
    X(time_maa_g,       "att.time_maa_g",        (1, 1, C),             curve(0.5, 0),    SHIFT,     FINCH) \
    X(time_maa_v2,      "att.time_maa_v2",       (1, 1, C),             curve(1, 0.3),    SHIFT,     FINCH_C2) \
    X(time_maa_w1,      "att.time_maa_w1",       (C, mix_rank * mixes), constant(0),      VECTOR,    MIXED) \
    X(time_maa_w2,      "att.time_maa_w2",       (mixes, mix_rank, C),  uniform(0.01),    VECTOR,    MIXED) \
    X(time_maa_q_w1,    "att.time_maa_q_w1",     (C, MIX_RANK),         constant(0),      VECTOR,    GOLD) \
    X(time_maa_q_w2,    "att.time_maa_q_w2",     (MIX_RANK, C),         uniform(0.01),    VECTOR,    GOLD) \
    X(time_maa_kv_w1,   "att.time_maa_kv_w1",    (C, 2 * MIX_RANK),     constant(0),      VECTOR,    GOLD) \
    X(time_maa_kv_w2,   "att.time_maa_kv_w2",    (2, MIX_RANK, C),      uniform(0.01),    VECTOR,    GOLD) \
    X(time_decay,       "att.time_decay",        (1, 1, A),             rule(TIME_DECAY), WKV_DECAY, FINCHES) \
    X(time_decay_w1,    "att.time_decay_w1",     (C, decay_rank),       constant(0),      VECTOR,    FINCHES) \
    X(time_decay_w2,    "att.time_decay_w2",     (decay_rank, A),       uniform(0.01),    VECTOR,    FINCHES) \
    X(time_value2_w1,   "att.time_value2_w1",    (C, VALUE2_RANK),      constant(0),      VECTOR,    FINCH_C2) \
    X(time_value2_w2,   "att.time_value2_w2",    (VALUE2_RANK, A),      uniform(0.01),    VECTOR,    FINCH_C2) \
    X(time_faaaa,       "att.time_faaaa",        (H, N),                rule(TIME_FAAAA), SHIFT,     RWKV) \
    X(time_key_w1,      "att.time_key_w1",       (C, rank),             constant(0),      VECTOR,    GOLD) \
    X(time_key_w2,      "att.time_key_w2",       (rank, C),             uniform(0.01),    VECTOR,    GOLD) \
    X(time_value_w1,    "att.time_value_w1",     (C, rank),             constant(0),      VECTOR,    GOLD) \
    X(time_value_w2,    "att.time_value_w2",     (rank, C),             uniform(0.01),    VECTOR,    GOLD) \
    X(receptance,       "att.receptance.weight", (A, C),                orthogonal(1),    MATRIX,    RWKV) \
    X(key,              "att.key.weight",        (A, C),                orthogonal(0.1),  MATRIX,    RWKV | GPTALPHA) \
    X(value,            "att.value.weight",      (A, C),                orthogonal(1),    MATRIX,    RWKV | GPTALPHA) \
    X(query,            "att.query.weight",      (A, C),                orthogonal(1),    MATRIX,    GOLD | GPTALPHA) \
    X(gate,             "att.gate.weight",       (A, C),                orthogonal(0.1),  MATRIX,    FINCH | EAGLE) \
    X(output,           "att.output.weight",     (C, A),                constant(0),      MATRIX,    NOT_LLAMA) \
    NORM(ln_q,          "att.ln_q",              (A),                   constant(1),                 GOLD) \
    NORM(ln_k,          "att.ln_k",              (A),                   constant(1),                 GOLD | GPTALPHA) \
    NORM(ln_v,          "att.ln_v",              (A),                   constant(1),                 GOLD | GPTALPHA) \
    NORM(ln_x,          "att.ln_x",              (A),                   rule(LN_X_GAIN),             NOT_LLAMA) \
    X(ffn_time_maa_k,   "ffn.time_maa_k",        (1, 1, C),             curve(1, 0),      SHIFT,     CMIX) \
    X(ffn_time_maa_r,   "ffn.time_maa_r",        (1, 1, C),             curve(1, 0),      SHIFT,     CMIX) \
    X(ffn_key,          "ffn.key.weight",        (F, C),                orthogonal(1),    MATRIX,    CMIXES) \
    X(ffn_receptance,   "ffn.receptance.weight", (C, C),                constant(0),      MATRIX,    CMIXES) \
    X(ffn_value,        "ffn.value.weight",      (C, F),                constant(0),      MATRIX,    CMIXES) \
    X(ffn_w1,           "ffn.w1.weight",         (FL, C),               orthogonal(1),    MATRIX,    CMIX_LLAMA) \
    X(ffn_w2,           "ffn.w2.weight",         (C, FL),               orthogonal(1),    MATRIX,    CMIX_LLAMA) \
    X(ffn_w3,           "ffn.w3.weight",         (FL, C),               orthogonal(1),    MATRIX,    CMIX_LLAMA)

// Fields that have another name, shape or beginning in some models.
#define VARIANTS(X, NORM) \
    X(time_maa_w1,      "att.time_maa_rkvw_w1",  (C, mix_rank * mixes), constant(0),      VECTOR,    FINCH_B) \
    X(time_maa_w2,      "att.time_maa_rkvw_w2",  (mixes, mix_rank, C),  uniform(0.01),    VECTOR,    FINCH_B) \
    X(time_maa_r,       "att.time_mix_r",        (1, 1, C),             power(0.5, 0),    SHIFT,     EAGLE) \
    X(time_maa_k,       "att.time_mix_k",        (1, 1, C),             power(1, 0),      SHIFT,     EAGLE) \
    X(time_maa_v,       "att.time_mix_v",        (1, 1, C),             power(1, 0.3),    SHIFT,     EAGLE) \
    X(time_maa_g,       "att.time_mix_g",        (1, 1, C),             power(0.5, 0),    SHIFT,     EAGLE) \
    X(time_decay,       "att.time_decay",        (H, N),                rule(TIME_DECAY), WKV_DECAY, EAGLE) \
    NORM(ln_q,          "att.ln_r",              (A),                   constant(1),                 GPTALPHA) \
    X(query,            "att.wq.weight",         (A, C),                orthogonal(1),    MATRIX,    LLAMA) \
    X(key,              "att.wk.weight",         (A, C),                orthogonal(1),    MATRIX,    LLAMA) \
    X(value,            "att.wv.weight",         (A, C),                orthogonal(1),    MATRIX,    LLAMA) \
    X(output,           "att.wo.weight",         (C, A),                orthogonal(1),    MATRIX,    LLAMA) \
    X(ffn_time_maa_k,   "ffn.time_mix_k",        (1, 1, C),             power(1, 0),      SHIFT,     CMIX_EAGLE) \
    X(ffn_time_maa_r,   "ffn.time_mix_r",        (1, 1, C),             power(1, 0),      SHIFT,     CMIX_EAGLE)
// clang-format on

// One tensor of this model. offset: in elements, the same in the blocks of weights, gradients, masters and moments.
typedef struct Tensor {
    char name[64];
    int ndim, layer; // layer: -1 at the top
    int64_t shape[3], size, offset;
    Init init;
    double lr_scale;   // factor on the learning rate
    bool weight_decay; // whether it applies
} Tensor;

// A matrix in 8 bits, as inference may keep it: w[row][column] = whole[row][column] * scales[row]. A product with many
// rows of x gets it as floatX, as many of its rows at a time as there is room for.
typedef struct Int8Matrix {
    int8_t *whole; // (rows, columns), -127 to 127
    float *scales; // (rows)
    floatX *room;  // (room_size), which all such matrices share
    int64_t room_size;
} Int8Matrix;

// Weights and gradients, as a matrix: `rows` rows of `columns` numbers, ld apart (all dimensions but the last: rows).
typedef struct Param {
    floatX *w;
    float *g;
    int rows, columns;
    int64_t ld;
    const Int8Matrix *in_int8; // null: w it is
} Param;

typedef struct LayerNorm {
    Param gain, bias;
} LayerNorm;

// All tensors of one layer (or of the top) by field; those that it does not have are null.
#define FIELD(field, ...) Param field;
#define NORM_FIELD(field, ...) LayerNorm field;
typedef struct Params {
    TENSORS(FIELD, NORM_FIELD)
} Params;
#undef FIELD
#undef NORM_FIELD

// ---------------------------------------------------------------------------------------------------------------------
// 4. Kernels, forward beside backward, in the order a token meets them
//
// Most kernels walk rows: a row is one token's channels, a thread owns a Pack of 8 of them, a block one row at a time
// (so that the norm's sums are sums over the block, and the previous token of a shift is what the thread held a moment
// ago). Gradients of vectors are sums over all tokens: each block sums its rows and leaves a partial row, add_partials
// adds these in a fixed order. No atomics anywhere: the same bits in every run.

static const int MAX_C = 4096; // a row's threads must fit a block

static int row_threads(int C) { return (int)ceil_div(C / 8, 32) * 32; }
// A block where a row's threads meet: those of a row, or a warp for several narrow rows
static dim3 row_block(int C) { return C < 256 && 256 % C == 0 ? dim3(C / 8, 256 / C) : dim3(row_threads(C)); }
// Blocks that share the rows: as many as an H100 (132 multiprocessors) holds of 512 to 768 threads in all; the same
// number on every device, as it says how sums are split.
static int most_row_blocks(int C) { return 132 * (C < 4608 ? 4608 / C : 1); }
static int rows_per_block(int rows, int C) {
    return rows > 8 * most_row_blocks(C) ? (int)ceil_div(rows, most_row_blocks(C)) : 8;
}
static int row_blocks(int rows, int C) { return (int)ceil_div(rows, rows_per_block(rows, C)); }

// gradients of up to six vectors of C numbers
struct Targets {
    float *g[6];
};

// Sums over the P parts of partial (P, rows + n, C), always in the same order: of the first `rows` rows to matrix
// (rows, C), which adds them up, of the others to g[0..n-1]. Blocks of 32 columns x 32 parts, or x 8 or x 2 where there
// are few.
HAS_TWIN __global__ void __launch_bounds__(1024)
    add_partials_kernel(Targets to, float *matrix, const float *partial, int P, int rows, int n, int C) {
    __shared__ float sums[32][32];
    const int64_t at = (int64_t)blockIdx.x * 32 + threadIdx.x % 32;
    const int part = threadIdx.x / 32, parts = blockDim.x / 32;
    const int LOADS = 16; // on their way at a time
    float sum = 0;
    for (int begin = part; begin < P; begin += LOADS * parts) {
        float x[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            const int i = begin + j * parts;
            x[j] = i < P ? partial[(int64_t)i * (rows + n) * C + at] : 0;
        }
#pragma unroll
        for (int j = 0; j < LOADS; j++) sum += x[j];
    }
    sums[part][threadIdx.x % 32] = sum;
    __syncthreads();
    if (part > 0) return;
    for (int i = 1; i < parts; i++) sum += sums[i][threadIdx.x];
    if (at < (int64_t)rows * C) matrix[at] += sum;
#pragma unroll
    for (int i = 0; i < 6; i++)
        if (i < n && at / C == rows + i) to.g[i][at % C] += sum;
}

#ifdef CUDA_ON_CPU // in dev/cpu/twins.h
static void add_partials_in_loops(Targets to, float *matrix, const float *partial, int P, int rows, int n, int C);
#endif

static void add_partials(Targets to, const float *partial, int P, int n, int C, float *matrix = nullptr, int rows = 0) {
    TWIN(add_partials_in_loops(to, matrix, partial, P, rows, n, C));
    const int threads = P > 256 ? 1024 : P > 32 ? 256 : 64;
    add_partials_kernel<<<(rows + n) * C / 32, threads, 0, stream>>>(to, matrix, partial, P, rows, n, C);
}

// ---- layer norm ----
//
//     out = (x - mean) / sqrt(var + eps) * gain + bias         over the C channels of a row, two passes in fp32
//
// x may be a sum, residual stream + branch, which is then stored in `sum`; or row index[i] of a table (the embedding).
// Bytes a row: C (2 read + 2 written), each in floatX, with a sum; half of it without.
HAS_TWIN __global__ void layernorm_forward_kernel(floatX *out, floatX *sum, const floatX *x, const int *index,
                                                  const floatX *branch, const floatX *gain, const floatX *bias,
                                                  int rows, int C) {
    __shared__ float2 shared[32];
    const int c = threadIdx.x * 8;
    const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    const bool mine = c < C && row < rows;
    const int64_t from = index && mine ? index[row] : row;
    Pack v = mine ? load(x + from * C + c) : zero_pack();
    if (branch && mine) {
        const Pack b = load(branch + row * C + c);
        for (int i = 0; i < 8; i++) v.x[i] = (float)(floatX)(v.x[i] + b.x[i]); // what the backward pass will read
        store(sum + row * C + c, v);
    }
    float total = 0;
    for (int i = 0; i < 8; i++) total += v.x[i];
    const float mean = block_sum(total, shared) / C;
    float squares = 0;
    for (int i = 0; i < 8 && mine; i++) squares += (v.x[i] - mean) * (v.x[i] - mean);
    const float rstd = rsqrtf(block_sum(squares, shared) / C + 1e-5f);
    if (!mine) return;
    const Pack g = load(gain + c), b = load(bias + c);
    for (int i = 0; i < 8; i++) v.x[i] = (v.x[i] - mean) * rstd * g.x[i] + b.x[i];
    store(out + row * C + c, v);
}

#ifdef CUDA_ON_CPU // in dev/cpu/twins.h
static void layernorm_forward_in_loops(floatX *out, floatX *sum, const floatX *x, const int *index,
                                       const floatX *branch, const LayerNorm &ln, int rows, int C);
#endif

static void layernorm_forward_launch(floatX *out, floatX *sum, const floatX *x, const int *index, const floatX *branch,
                                     const LayerNorm &ln, int rows) {
    const int C = ln.gain.columns;
    const dim3 block = row_block(C);
    TWIN(layernorm_forward_in_loops(out, sum, x, index, branch, ln, rows, C));
    layernorm_forward_kernel<<<(int)ceil_div(rows, block.y), block, 0, stream>>>(out, sum, x, index, branch, ln.gain.w,
                                                                                 ln.bias.w, rows, C);
}

static void layernorm_forward(floatX *out, const floatX *x, const LayerNorm &ln, int rows) {
    layernorm_forward_launch(out, nullptr, x, nullptr, nullptr, ln, rows);
}

// sum = x + branch,  out = LayerNorm(sum)
static void add_layernorm_forward(floatX *out, floatX *sum, const floatX *x, const floatX *branch, const LayerNorm &ln,
                                  int rows) {
    layernorm_forward_launch(out, sum, x, nullptr, branch, ln, rows);
}

// out = LayerNorm(emb[id])
static void embedding_layernorm_forward(floatX *out, const floatX *emb, const int *ids, const LayerNorm &ln, int rows) {
    layernorm_forward_launch(out, nullptr, emb, ids, nullptr, ln, rows);
}

// dx = (dn - mean(dn) - n mean(dn n)) / sqrt(var + eps),  n = (x - mean) / sqrt(var + eps),  dn = dout * gain;
// added to what dx holds if `accumulate`. partial (blocks, 2, C): sums of dout * n and of dout.
// What is summed over a row, (x - mean)^2, dn and dn (x - mean), asks for no more than its mean. So that one sum over
// the block does for a row, it takes along the x of the next row, which gives that one's mean. Loads are a row ahead of
// their use. Bytes a row: C (2 read + 1 written) in floatX, one more read if `accumulate`. 768: threads that a
// multiprocessor's registers are to suffice for.
template <bool accumulate>
HAS_TWIN __global__ void __launch_bounds__(PRECISION_BF16 ? 768 : MAX_C / 8)
    layernorm_backward_kernel(floatX *dx, float *partial, const floatX *dout, const floatX *x, const int *index,
                              const floatX *gain, int rows, int rows_per_block, int C) {
    __shared__ float4 shared[32];
    const int c = threadIdx.x * 8, part = blockIdx.x * blockDim.y + threadIdx.y, begin = part * rows_per_block;
    const int end = min(rows, begin + rows_per_block);
    const int last = begin + min(rows_per_block, rows - (int)(blockIdx.x * blockDim.y) * rows_per_block); // of a warp
    const bool mine = c < C;
    const float per_channel = 1.f / C;
    const Pack g = mine ? load(gain + c) : zero_pack();
    Pack dgain = zero_pack(), dbias = zero_pack();
    auto fetch = [&](const floatX *from, int row, const int *rows_of = nullptr) {
        const int64_t at = rows_of && row < end ? rows_of[row] : row;
        return mine && row < end ? load_raw(from + at * C + c) : RawPack<floatX>{};
    };
    auto fetch_x = [&](int row) { return fetch(x, row, index); };
    RawPack<floatX> next_x = fetch_x(begin + 1), next_dy = fetch(dout, begin), next_dx = {};
    if (accumulate) next_dx = fetch(dx, begin);
    Pack n = unpack(fetch_x(begin));
    float total = 0;
    for (int i = 0; i < 8; i++) total += n.x[i];
    float mean = block_sum(total, shared) * per_channel;
    for (int row = begin; row < last; row++) {
        const Pack after = unpack(next_x), dy = unpack(next_dy);
        Pack out = unpack(next_dx);
        next_x = fetch_x(row + 2);
        next_dy = fetch(dout, row + 1);
        if (accumulate) next_dx = fetch(dx, row + 1);
        float4 sums = make_float4(0, 0, 0, 0);
        for (int i = 0; i < 8; i++) {
            n.x[i] = mine ? n.x[i] - mean : 0;
            const float dn = dy.x[i] * g.x[i];
            sums = make_float4(sums.x + n.x[i] * n.x[i], sums.y + dn, sums.z + dn * n.x[i], sums.w + after.x[i]);
        }
        sums = block_sum(sums, shared);
        const float rstd = rsqrtf(sums.x * per_channel + 1e-5f);
        const float dn_mean = sums.y * per_channel, dn_n_mean = sums.z * rstd * per_channel;
        for (int i = 0; i < 8; i++) {
            n.x[i] *= rstd;
            dgain.x[i] += dy.x[i] * n.x[i];
            dbias.x[i] += dy.x[i];
            const float here = rstd * (dy.x[i] * g.x[i] - dn_mean - n.x[i] * dn_n_mean);
            out.x[i] = accumulate ? out.x[i] + here : here;
        }
        if (mine && row < end) store(dx + (int64_t)row * C + c, out);
        n = after;
        mean = sums.w * per_channel;
    }
    if (!mine || begin >= rows) return;
    store(partial + (int64_t)part * 2 * C + c, dgain);
    store(partial + (int64_t)part * 2 * C + C + c, dbias);
}

#ifdef CUDA_ON_CPU // in dev/cpu/twins.h
template <bool accumulate>
static void layernorm_backward_in_loops(floatX *dx, float *partial, const floatX *dout, const floatX *x,
                                        const int *index, const floatX *gain, int rows, int per, int C);
#endif

template <bool accumulate>
static void layernorm_backward_launch(floatX *dx, const floatX *dout, const floatX *x, const int *index,
                                      const LayerNorm &ln, float *partial, int rows) {
    const int C = ln.gain.columns, parts = row_blocks(rows, C), per = rows_per_block(rows, C);
    const dim3 block = row_block(C);
#ifdef CUDA_ON_CPU
    if (cuda_on_cpu::twins)
        layernorm_backward_in_loops<accumulate>(dx, partial, dout, x, index, ln.gain.w, rows, per, C);
    else
#endif
        layernorm_backward_kernel<accumulate>
            <<<(int)ceil_div(parts, block.y), block, 0, stream>>>(dx, partial, dout, x, index, ln.gain.w, rows, per, C);
    add_partials({{ln.gain.g, ln.bias.g}}, partial, parts, 2, C);
}

static void layernorm_backward(floatX *dx, const floatX *dout, const floatX *x, const LayerNorm &ln, float *partial,
                               int rows) {
    layernorm_backward_launch<false>(dx, dout, x, nullptr, ln, partial, rows);
}

// dx += ..: the sum's gradient, where that of the branch has come by another way
static void add_layernorm_backward(floatX *dx, const floatX *dout, const floatX *sum, const LayerNorm &ln,
                                   float *partial, int rows) {
    layernorm_backward_launch<true>(dx, dout, sum, nullptr, ln, partial, rows);
}

// dx: of the rows emb[id]
static void embedding_layernorm_backward(floatX *dx, const floatX *dout, const floatX *emb, const int *ids,
                                         const LayerNorm &ln, float *partial, int rows) {
    layernorm_backward_launch<false>(dx, dout, emb, ids, ln, partial, rows);
}

// ---- rms norm, without parameters ----
//
//     out = x / (|x| / sqrt(C) + 1e-8)
HAS_TWIN __global__ void rms_norm_forward_kernel(floatX *out, const floatX *x, int rows, int C) {
    __shared__ float2 shared[32];
    const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, at = row * C + threadIdx.x * 8;
    const bool mine = threadIdx.x * 8 < (unsigned)C && row < rows;
    Pack v = mine ? load(x + at) : zero_pack();
    float squares = 0;
    for (int i = 0; i < 8; i++) squares += v.x[i] * v.x[i];
    const float scale = 1 / (sqrtf(block_sum(squares, shared) / C) + 1e-8f);
    for (int i = 0; i < 8; i++) v.x[i] *= scale;
    if (mine) store(out + at, v);
}

// With n = |x| / sqrt(C), e = n + 1e-8:  dx = dout / e - x (dout . x) / (C n e^2),  and 0 where x = 0.
// dout in fp32; plus `add` (fp32, may be null); added to what dx holds if `accumulate`.
template <bool accumulate>
__global__ void rms_norm_backward_kernel(floatX *dx, const float *dout, const float *add, const floatX *x, int rows,
                                         int C) {
    __shared__ float2 shared[32];
    const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, at = row * C + threadIdx.x * 8;
    const bool mine = threadIdx.x * 8 < (unsigned)C && row < rows;
    const Pack v = mine ? load(x + at) : zero_pack(), dy = mine ? load(dout + at) : zero_pack();
    float2 sums = make_float2(0, 0);
    for (int i = 0; i < 8; i++) sums = make_float2(sums.x + v.x[i] * v.x[i], sums.y + dy.x[i] * v.x[i]);
    sums = block_sum(sums, shared);
    if (!mine) return;
    const float n = sqrtf(sums.x / C), e = n + 1e-8f;
    Pack out = accumulate ? load(dx + at) : zero_pack();
    const Pack extra = add ? load(add + at) : zero_pack();
    for (int i = 0; i < 8; i++)
        out.x[i] += extra.x[i] + (n > 0 ? dy.x[i] / e - v.x[i] * (sums.y / C / (n * e * e)) : 0);
    store(dx + at, out);
}

#ifdef CUDA_ON_CPU // in dev/cpu/twins.h
static void rms_norm_forward_in_loops(floatX *out, const floatX *x, int rows, int C);
#endif

static void rms_norm_forward(floatX *out, const floatX *x, int rows, int C) {
    const dim3 block = row_block(C);
    TWIN(rms_norm_forward_in_loops(out, x, rows, C));
    rms_norm_forward_kernel<<<(int)ceil_div(rows, block.y), block, 0, stream>>>(out, x, rows, C);
}

template <bool accumulate>
static void rms_norm_backward(floatX *dx, const float *dout, const float *add, const floatX *x, int rows, int C) {
    const dim3 block = row_block(C);
    rms_norm_backward_kernel<accumulate><<<(int)ceil_div(rows, block.y), block, 0, stream>>>(dx, dout, add, x, rows, C);
}

// ---- embedding ----
//
// Forward is layernorm_forward over rows emb[token]. Backward: demb[id] += the rows of dx whose token is id. The host
// sorts the tokens by id as it hands them over; a block sums 64 channels of one id's rows, 16 rows at a time (some ids
// are in every twentieth place), always in the same order.
// ids (distinct), starts (distinct + 1), order (B T): order[starts[i]..starts[i+1]) are the positions of ids[i].
static const int EMBEDDING_ROWS = 16, EMBEDDING_CHANNELS = 64;

__global__ void embedding_backward_kernel(float *demb, const floatX *dx, const int *ids, const int *starts,
                                          const int *order, int C) {
    __shared__ __align__(16) float sums[EMBEDDING_ROWS][EMBEDDING_CHANNELS];
    const int row = threadIdx.x / 8, c = blockIdx.y * EMBEDDING_CHANNELS + threadIdx.x % 8 * 8,
              end = starts[blockIdx.x + 1];
    Pack sum = zero_pack();
#pragma unroll 4
    for (int j = starts[blockIdx.x] + row; j < end; j += EMBEDDING_ROWS) {
        const Pack part = load(dx + (int64_t)order[j] * C + c);
        for (int i = 0; i < 8; i++) sum.x[i] += part.x[i];
    }
    store(&sums[row][threadIdx.x % 8 * 8], sum);
    __syncthreads();
    if (threadIdx.x >= EMBEDDING_CHANNELS) return;
    float total = 0;
    for (int i = 0; i < EMBEDDING_ROWS; i++) total += sums[i][threadIdx.x];
    demb[(int64_t)ids[blockIdx.x] * C + blockIdx.y * EMBEDDING_CHANNELS + threadIdx.x] += total;
}

// ---- token shift and its mixes (spec section 2) ----
//
//     diff  = shift(x) - x,  shift(x)_t = x_{t-1}, zero before a sequence
//     out_i = x + diff * (mu_i + m_i)        n mixes of one x in one pass
//     m_i   = h_i @ w2_i                     ddlerp: h_i (BT, 32) @ w2_i (32, C); lerp: no m
//
// The names are the RWKV-6 paper's: lerp mixes by amounts that are parameters (Eagle, the channel mixers), ddlerp by
// amounts that depend on the data. On each level one: lerp_forward_kernel, ddlerp_forward_kernel are kernels;
// lerp_forward, ddlerp_forward launch them; and mixed_inputs_forward (section 5) makes all the inputs of a mixer.
//
// Bytes a row: C (1 + n) floatX, and for ddlerp 32 n more: m is made on the fly by tensor cores, never written.
template <int n> struct MixTask {
    const floatX *mu[n];
    struct {
        const floatX *h; // h_i at columns 32 i of (BT, ld)
        int ld;
        const floatX *w2;    // (n, 32, C)
    } low;                   // ddlerp alone
    floatX *x[n];            // the outputs; in the backward pass their gradients
    bool complement = false; // Eagle: the parameters are 1 - mu
};

// ---- lerp: a thread walks down a few rows of its 8 channels ----

template <int n> __device__ inline Pack load_mu(const MixTask<n> &mix, int i, int c) {
    Pack mu = load(mix.mu[i] + c);
    for (int j = 0; j < 8 && mix.complement; j++) mu.x[j] = 1 - mu.x[j];
    return mu;
}

template <int n>
__global__ void lerp_forward_kernel(MixTask<n> mix, const floatX *x, int BT, int T, int C, int rows_per_block) {
    const int c = threadIdx.x * 8;
    if (c >= C) return;
    Pack mu[n];
    for (int i = 0; i < n; i++) mu[i] = load_mu(mix, i, c);
    const int64_t begin = (int64_t)blockIdx.x * rows_per_block, end = min((int64_t)BT, begin + rows_per_block);
    Pack before = begin % T ? load(x + (begin - 1) * C + c) : zero_pack();
    for (int64_t row = begin; row < end; row++) {
        const int64_t at = row * C + c;
        const Pack v = load(x + at);
        if (row % T == 0) before = zero_pack();
        for (int i = 0; i < n; i++) {
            Pack out;
            for (int j = 0; j < 8; j++) out.x[j] = v.x[j] + (before.x[j] - v.x[j]) * mu[i].x[j];
            store(mix.x[i] + at, out);
        }
        before = v;
    }
}

template <int n> static void lerp_forward(MixTask<n> mix, const floatX *x, int BT, int T, int C) {
    // so few that multiprocessors do not wait long for the last block
    const int per = 4, blocks = (int)ceil_div(BT, per);
    lerp_forward_kernel<n><<<blocks, row_threads(C), 0, stream>>>(mix, x, BT, T, C, per);
}

// With c_i = mu_i + m_i and g_i the gradient of out_i:
//     dx_t = sum_i g_i,t (1 - c_i,t)  +  sum_i g_i,t+1 c_i,t+1 (of the next token, if it is in the same sequence)
//     dm_i = g_i * (x_{t-1} - x_t),   dmu_i = the sum of dm_i over all tokens
//     dh_i = dm_i w2_i^T,             dw2_i = h_i^T dm_i
// (lerp: no m, h and w2)
//
// Backward, rows are walked from last to first, so that the next token's part is at hand. partial (blocks, n, C).
template <int n>
__global__ void lerp_backward_kernel(MixTask<n> mix, floatX *dx, float *partial, const floatX *x, int BT, int T, int C,
                                     int rows_per_block) {
    const int c = threadIdx.x * 8;
    if (c >= C) return;
    Pack mu[n], dmu[n], later = zero_pack(); // later: what the next token gives to this one
    for (int i = 0; i < n; i++) {
        mu[i] = load_mu(mix, i, c);
        dmu[i] = zero_pack();
    }
    const int64_t begin = (int64_t)blockIdx.x * rows_per_block, end = min((int64_t)BT, begin + rows_per_block);
    if (end < BT && end % T)
        for (int i = 0; i < n; i++) {
            const Pack g = load(mix.x[i] + end * C + c);
            for (int j = 0; j < 8; j++) later.x[j] += g.x[j] * mu[i].x[j];
        }
    Pack v = load(x + (end - 1) * C + c);
    for (int64_t row = end - 1; row >= begin; row--) {
        const int64_t at = row * C + c;
        const Pack before = row > 0 ? load(x + at - C) : zero_pack();
        const float inside = row % T ? 1.f : 0.f; // the first token of a sequence sees zeros
        Pack out = later;
        later = zero_pack();
        for (int i = 0; i < n; i++) {
            const Pack g = load(mix.x[i] + at);
            for (int j = 0; j < 8; j++) {
                const float mixed = g.x[j] * mu[i].x[j];
                out.x[j] += g.x[j] - mixed;
                later.x[j] += inside * mixed;
                dmu[i].x[j] += g.x[j] * (inside * before.x[j] - v.x[j]);
            }
        }
        store(dx + at, out);
        v = before;
    }
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < 8 && mix.complement; j++) dmu[i].x[j] = -dmu[i].x[j];
        store(partial + ((int64_t)blockIdx.x * n + i) * C + c, dmu[i]);
    }
}

template <int n>
static void lerp_backward(MixTask<n> mix, floatX *dx, Targets dmu, float *partial, const floatX *x, int BT, int T,
                          int C) {
    const int blocks = row_blocks(BT, C), per = rows_per_block(BT, C), threads = row_threads(C);
    lerp_backward_kernel<n><<<blocks, threads, 0, stream>>>(mix, dx, partial, x, BT, T, C, per);
    add_partials(dmu, partial, blocks, n, C);
}

// ---- ddlerp ----

// A tile to shared memory in the background; rows not in [0, limit) become zeros, nothing is read where they would lie.
// `from`: the tile's columns in row 0.
template <int rows, int columns, int threads>
__device__ inline void async_tile(floatX *to, const floatX *from, int row0, int limit, int ld) {
    const int step = 16 / sizeof(floatX), per_row = columns / step, at_once = threads / per_row; // at_once: rows
    const int first = threadIdx.x / per_row, column = threadIdx.x % per_row * step;
    if (threads % per_row && first >= at_once) return;
    const floatX *p = from + (int64_t)(row0 + first) * ld + column;
#pragma unroll
    for (int i = 0; i < rows; i += at_once) {
        if (rows % at_once && i + first >= rows) break;
        const bool inside = (unsigned)(row0 + first + i) < (unsigned)limit;
        async_copy16(to + (i + first) * (columns + PAD) + column, p + (int64_t)i * ld, inside);
    }
}

// Forward, a block owns 64 channels, keeps their part of w2 in shared memory and walks down the rows, 64 at a
// time (32 in FP32); a warp takes 16 of them and 32 channels, c_i = mu_i + m_i being a result of mma. w2's columns are
// permuted so that a lane gets 8 neighbouring channels of a row, 16 bytes: column 8 j + 2 l + e of 32 is channel 8 l +
// 2 j + e. x and h of the next rows come by asynchronous copies meanwhile (bf16): 30 KB a block at n = 5, two blocks a
// multiprocessor.
static const int MIX_STAGES = PRECISION_BF16 ? 2 : 1; // tiles of rows in shared memory
static const int MIX_CHANNELS = 64, MIX_FORWARD_ROWS = PRECISION_BF16 ? 64 : 32,
                 MIX_FORWARD_THREADS = 4 * MIX_FORWARD_ROWS;

template <int n> struct DdlerpWeights {
    alignas(16) floatX w2[n][MIX_RANK][LD];
    alignas(16) float mu[n][MIX_CHANNELS]; // permuted like w2
};

// of channel c of 64
__device__ inline int ddlerp_column(int c) { return c / 32 * 32 + c % 2 + c % 32 / 8 * 2 + c % 8 / 2 * 8; }

template <int n>
__device__ inline void ddlerp_load_weights(DdlerpWeights<n> &s, const MixTask<n> &mix, int first, int C) {
    for (int i = threadIdx.x; i < n * MIX_RANK * MIX_CHANNELS / 8; i += blockDim.x) {
        const int c = i % (MIX_CHANNELS / 8) * 8, k = i / (MIX_CHANNELS / 8);
        const Pack w = load(mix.low.w2 + (int64_t)k * C + first + c);
        for (int j = 0; j < 8; j += 2) store_pair(&s.w2[0][0][0] + k * LD + ddlerp_column(c + j), w.x[j], w.x[j + 1]);
    }
#pragma unroll
    for (int i = 0; i < n; i++)
        for (int c = threadIdx.x; c < MIX_CHANNELS; c += blockDim.x)
            s.mu[i][ddlerp_column(c)] = (float)mix.mu[i][first + c];
}

// c (16 tokens x 32 permuted channels from `group` on) = mu_i + h_i w2_i
template <int n>
__device__ inline void ddlerp_amounts(TileC (&c)[4], const DdlerpWeights<n> &s, int i, int group, const TileA (&h)[2]) {
    for (int j = 0; j < 4; j++) {
        const float2 mu = *(const float2 *)&s.mu[i][group + 8 * j + tile_col(0)];
        c[j] = {{mu.x, mu.y, mu.x, mu.y}};
    }
    TileB b[2][4];
    for (int k = 0; k < 2; k++)
        for (int j = 0; j < 4; j += 2) load_b_pair_t(&b[k][j], &s.w2[i][16 * k][group + 8 * j], LD);
    mma(c, h, b);
}

template <int n> struct DdlerpRows {
    alignas(16) floatX x[1 + MIX_FORWARD_ROWS][LD],
        h[MIX_FORWARD_ROWS][MIX_RANK * n + PAD]; // x from the row before on
};

template <int n> struct DdlerpForward {
    DdlerpWeights<n> w;
    DdlerpRows<n> rows[MIX_STAGES];
};

template <int n>
__device__ inline void ddlerp_copy_rows(DdlerpRows<n> &s, const MixTask<n> &mix, const floatX *x, int row0, int BT,
                                        int first, int C) {
    async_tile<1 + MIX_FORWARD_ROWS, MIX_CHANNELS, MIX_FORWARD_THREADS>(&s.x[0][0], x + first, row0 - 1, BT, C);
    async_tile<MIX_FORWARD_ROWS, MIX_RANK * n, MIX_FORWARD_THREADS>(&s.h[0][0], mix.low.h, row0, BT, mix.low.ld);
    async_commit();
}

template <int n>
HAS_TWIN __global__ void __launch_bounds__(MIX_FORWARD_THREADS, 2)
    ddlerp_forward_kernel(MixTask<n> mix, const floatX *x, int BT, int T, int C) {
    DdlerpForward<n> &s = *dynamic_smem<DdlerpForward<n>>();
    const int first = blockIdx.x * MIX_CHANNELS, warp = threadIdx.x / 32, step = gridDim.y * MIX_FORWARD_ROWS;
    // the warp's
    const int strip = warp % (MIX_FORWARD_ROWS / 16) * 16, group = warp / (MIX_FORWARD_ROWS / 16) * 32;
    const int c = group + threadIdx.x % 4 * 8;
    ddlerp_copy_rows(s.rows[0], mix, x, blockIdx.y * MIX_FORWARD_ROWS, BT, first, C);
    ddlerp_load_weights(s.w, mix, first, C);
    for (int row0 = blockIdx.y * MIX_FORWARD_ROWS, turn = 0; row0 < BT; row0 += step, turn++) {
        const DdlerpRows<n> &here = s.rows[turn % MIX_STAGES];
        async_wait<0>();
        // nor does anyone read the other tile any more
        __syncthreads();
        if (MIX_STAGES > 1 && row0 + step < BT)
            ddlerp_copy_rows(s.rows[(turn + 1) % MIX_STAGES], mix, x, row0 + step, BT, first, C);
        Pack v[2], diff[2]; // x and shift(x) - x, of two rows
        for (int half = 0; half < 2; half++) {
            const int local = strip + tile_row(2 * half);
            v[half] = load(&here.x[1 + local][c]);
            diff[half] = (row0 + local) % T ? load(&here.x[local][c]) : zero_pack();
            for (int j = 0; j < 8; j++) diff[half].x[j] -= v[half].x[j];
        }
#pragma unroll
        for (int i = 0; i < n; i++) {
            TileA h[2];
            for (int k = 0; k < 2; k++) h[k] = load_a(&here.h[strip][MIX_RANK * i + 16 * k], MIX_RANK * n + PAD);
            TileC amount[4];
            ddlerp_amounts(amount, s.w, i, group, h);
            for (int half = 0; half < 2; half++) {
                const int64_t row = row0 + strip + tile_row(2 * half);
                Pack out;
                for (int j = 0; j < 8; j++)
                    out.x[j] = v[half].x[j] + diff[half].x[j] * amount[j / 2].x[2 * half + j % 2];
                if (row < BT) store(mix.x[i] + row * C + first + c, out);
            }
        }
        if (MIX_STAGES == 1 && row0 + step < BT) {
            __syncthreads();
            ddlerp_copy_rows(s.rows[0], mix, x, row0 + step, BT, first, C);
        }
    }
}

#ifdef CUDA_ON_CPU // in dev/cpu/twins.h
template <int n> static void ddlerp_forward_in_loops(const MixTask<n> &mix, const floatX *x, int BT, int T, int C);
#endif

template <int n> static void ddlerp_forward(MixTask<n> mix, const floatX *x, int BT, int T, int C) {
    TWIN(ddlerp_forward_in_loops(mix, x, BT, T, C));
    const int slices = C / MIX_CHANNELS, tiles = (int)ceil_div(BT, MIX_FORWARD_ROWS);
    // two blocks a multiprocessor
    const int split = slices < 2 * multiprocessors ? 2 * multiprocessors / slices : 1;
    const dim3 grid(slices, split < tiles ? split : tiles);
    const size_t smem = sizeof(DdlerpForward<n>);
    allow_smem(ddlerp_forward_kernel<n>, smem);
    ddlerp_forward_kernel<n><<<grid, MIX_FORWARD_THREADS, smem, stream>>>(mix, x, BT, T, C);
}

// Forward where the m_i are there already, in the place of the x_i (see mixed_inputs_part_forward)
template <int n> __global__ void ddlerp_from_amounts_kernel(MixTask<n> mix, const floatX *x, int T, int C) {
    const int c = threadIdx.x * 8;
    if (c >= C) return;
    const int64_t row = blockIdx.x, at = row * C + c;
    const Pack v = load(x + at), before = row % T ? load(x + at - C) : zero_pack();
    for (int i = 0; i < n; i++) {
        const Pack mu = load(mix.mu[i] + c);
        Pack out = load(mix.x[i] + at);
        for (int j = 0; j < 8; j++) out.x[j] = v.x[j] + (before.x[j] - v.x[j]) * (mu.x[j] + out.x[j]);
        store(mix.x[i] + at, out);
    }
}

// Backward, first dx and dh: a block takes 64 rows, a warp 16 of them, and walks over all channels, 32 at a time,
// its part of dh in registers. All that a slice of channels takes comes by asynchronous copies while the one before is
// worked on: 44 KB a block and two blocks a multiprocessor at n = 5, where 18 KB must be on their way to be as fast as
// the memory (3 TB/s, which answers in 0.8 us).
// The last of the 64 rows is there for what the shift gives to the one before it; the next block begins with it. dh is
// given as the gradient before the tanh that made h. Bytes a row: C (1 + n read + 1 written) in floatX; w2 comes from
// the L2 cache.
static const int MIX_THREADS = 128, MIX_ROWS = MIX_THREADS / 2, MIX_SLICE = PRECISION_BF16 ? 32 : 16,
                 LD_SLICE = MIX_SLICE + PAD;

template <int n> struct DdlerpSlice {
    alignas(16) floatX g[n][MIX_ROWS][LD_SLICE], x[1 + MIX_ROWS][LD_SLICE]; // x from the row before on
    alignas(16) floatX w2[n * MIX_RANK][LD_SLICE], mu[n][LD_SLICE];
};

template <int n> struct DdlerpBackward {
    DdlerpSlice<n> slice[2];
    alignas(16) float shifted[MIX_ROWS][MIX_SLICE + 8]; // sum_i g_i c_i
};

template <int n>
__device__ inline void ddlerp_copy_slice(DdlerpSlice<n> &s, const MixTask<n> &mix, const floatX *x, int row0, int first,
                                         int BT, int C) {
#pragma unroll
    for (int i = 0; i < n; i++) {
        async_tile<MIX_ROWS, MIX_SLICE, MIX_THREADS>(&s.g[i][0][0], mix.x[i] + first, row0, BT, C);
        async_tile<1, MIX_SLICE, MIX_THREADS>(s.mu[i], mix.mu[i] + first, 0, 1, C);
    }
    async_tile<1 + MIX_ROWS, MIX_SLICE, MIX_THREADS>(&s.x[0][0], x + first, row0 - 1, BT, C);
    async_tile<n * MIX_RANK, MIX_SLICE, MIX_THREADS>(&s.w2[0][0], mix.low.w2 + first, 0, n * MIX_RANK, C);
    async_commit();
}

// 16 rows x 16 channels from c on, of a warp: sum_i g_i c_i, and what they add to dh
template <int n>
__device__ inline void ddlerp_backward_16(TileC (&shifted)[2], TileC (&dhidden)[n][4], const DdlerpSlice<n> &s,
                                          const TileA (&h)[n][2], const float (&inside)[2], int c) {
    const int row = threadIdx.x / 32 * 16 + tile_row(0), column = c + tile_col(0); // of x[0]; x[2]: 8 rows down
    TileC diff[2];                                                                 // shift(x) - x
    for (int j = 0; j < 2; j++)
        for (int e = 0; e < 4; e += 2) {
            const Pair before = load_pair(&s.x[row + 4 * e][column + 8 * j]);
            const Pair now = load_pair(&s.x[1 + row + 4 * e][column + 8 * j]);
            diff[j].x[e] = inside[e / 2] * first_of(before) - first_of(now);
            diff[j].x[e + 1] = inside[e / 2] * second_of(before) - second_of(now);
        }
#pragma unroll
    for (int i = 0; i < n; i++) {
        TileC amount[2]; // c_i, then dm_i
        for (int j = 0; j < 2; j++) {
            const Pair mu = load_pair(&s.mu[i][column + 8 * j]);
            amount[j] = {{first_of(mu), second_of(mu), first_of(mu), second_of(mu)}};
        }
        TileB w2[2][2];
        for (int k = 0; k < 2; k++) load_b_pair_t(w2[k], &s.w2[MIX_RANK * i + 16 * k][c], LD_SLICE);
        mma(amount, h[i], w2);
        for (int j = 0; j < 2; j++)
            for (int e = 0; e < 4; e += 2) {
                const Pair g = load_pair(&s.g[i][row + 4 * e][column + 8 * j]);
                shifted[j].x[e] += first_of(g) * amount[j].x[e];
                shifted[j].x[e + 1] += second_of(g) * amount[j].x[e + 1];
                amount[j].x[e] = first_of(g) * diff[j].x[e];
                amount[j].x[e + 1] = second_of(g) * diff[j].x[e + 1];
            }
        TileB b[4];
        for (int j = 0; j < 4; j += 2) load_b_pair(&b[j], &s.w2[MIX_RANK * i + 8 * j][c], LD_SLICE);
        mma(dhidden[i], to_a(amount[0], amount[1]), b);
    }
}

// TX: floatX, or float where layers add up
template <int n, typename TX, bool accumulate>
HAS_TWIN __global__ void __launch_bounds__(MIX_THREADS, 2)
    ddlerp_backward_x_kernel(MixTask<n> mix, TX *dx, floatX *dh, const floatX *x, int BT, int T, int C) {
    DdlerpBackward<n> &s = *dynamic_smem<DdlerpBackward<n>>();
    // the block's first row, the warp's
    const int row0 = blockIdx.x * (MIX_ROWS - 1), own = row0 + threadIdx.x / 32 * 16;
    // of a row; of a thread in a slice
    const int packs = MIX_SLICE / 8, turns = MIX_ROWS * packs / MIX_THREADS;
    ddlerp_copy_slice(s.slice[0], mix, x, row0, 0, BT, C);
    TileA h[n][2];
    TileC dhidden[n][4] = {};
#pragma unroll
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 2; k++)
            h[i][k] = load_a_global(mix.low.h + (int64_t)own * mix.low.ld + MIX_RANK * i + 16 * k,
                                    // past the end: the last row's, times g, which is zero
                                    mix.low.ld, BT - own);
    const float inside[2] = {(own + tile_row(0)) % T ? 1.f : 0.f, (own + tile_row(2)) % T ? 1.f : 0.f};
    bool mine[turns], shifts[turns]; // rows of dx that this thread writes
    for (int k = 0; k < turns; k++) {
        const int local = threadIdx.x / packs + k * (MIX_ROWS / turns);
        mine[k] = local < MIX_ROWS - 1 && row0 + local < BT;
        shifts[k] = mine[k] && (row0 + local + 1) % T;
    }
    for (int first = 0, turn = 0; first < C; first += MIX_SLICE, turn++) {
        const DdlerpSlice<n> &here = s.slice[turn % 2];
        async_wait<0>();
        // nor does anyone read the other slice any more
        __syncthreads();
        if (first + MIX_SLICE < C) ddlerp_copy_slice(s.slice[(turn + 1) % 2], mix, x, row0, first + MIX_SLICE, BT, C);
        const int c = threadIdx.x % packs * 8;
        Pack out[turns];
        for (int k = 0; k < turns; k++) {
            const int64_t row = row0 + threadIdx.x / packs + k * (MIX_ROWS / turns);
            out[k] = accumulate && mine[k] ? load(dx + row * C + first + c) : zero_pack();
        }
        for (int c16 = 0; c16 < MIX_SLICE; c16 += 16) {
            TileC shifted[2] = {};
            ddlerp_backward_16(shifted, dhidden, here, h, inside, c16);
            for (int j = 0; j < 2; j++)
                for (int e = 0; e < 4; e += 2)
                    store_pair(&s.shifted[own - row0 + tile_row(e)][c16 + 8 * j + tile_col(e)], shifted[j].x[e],
                               shifted[j].x[e + 1]);
        }
        __syncthreads();
        for (int k = 0; k < turns; k++) {
            const int local = threadIdx.x / packs + k * (MIX_ROWS / turns);
            if (!mine[k]) continue;
            const Pack now = load(&s.shifted[local][c]),
                       next = shifts[k] ? load(&s.shifted[local + 1][c]) : zero_pack();
            for (int j = 0; j < 8; j++) out[k].x[j] += next.x[j] - now.x[j];
            for (int i = 0; i < n; i++) {
                const Pack g = load(&here.g[i][local][c]);
                for (int j = 0; j < 8; j++) out[k].x[j] += g.x[j];
            }
            store(dx + (int64_t)(row0 + local) * C + first + c, out[k]);
        }
    }
#pragma unroll
    for (int i = 0; i < n; i++)
        for (int j = 0; j < 4; j++)
            for (int e = 0; e < 4; e += 2) {
                const int64_t row = own + tile_row(e), k = MIX_RANK * i + 8 * j + tile_col(e);
                if (row >= BT || row == row0 + MIX_ROWS - 1) continue;
                const Pair tanh = load_pair(mix.low.h + row * mix.low.ld + k);
                const float h0 = first_of(tanh), h1 = second_of(tanh);
                store_pair(dh + row * mix.low.ld + k, dhidden[i][j].x[e] * (1 - h0 * h0),
                           dhidden[i][j].x[e + 1] * (1 - h1 * h1));
            }
}

// Then dw2 and dmu: a block owns 64 channels, 8 a warp, and walks down its share of the rows in tiles of 32.
// partial (blocks of rows, 32 n + n, C): dw2's rows, then dmu's.
static const int MIX_W2_THREADS = 256, MIX_W2_ROWS = 32;

template <int n> struct DdlerpTile {
    alignas(16) floatX g[n][MIX_W2_ROWS][LD], x[1 + MIX_W2_ROWS][LD]; // x from the row before on
    alignas(16) floatX h[MIX_W2_ROWS][MIX_RANK * n + PAD];
};

template <int n>
__device__ inline void ddlerp_copy_tile(DdlerpTile<n> &s, const MixTask<n> &mix, const floatX *x, int row0, int BT,
                                        int first, int C) {
    async_tile<1 + MIX_W2_ROWS, MIX_CHANNELS, MIX_W2_THREADS>(&s.x[0][0], x + first, row0 - 1, BT, C);
#pragma unroll
    for (int i = 0; i < n; i++)
        async_tile<MIX_W2_ROWS, MIX_CHANNELS, MIX_W2_THREADS>(&s.g[i][0][0], mix.x[i] + first, row0, BT, C);
    async_tile<MIX_W2_ROWS, MIX_RANK * n, MIX_W2_THREADS>(&s.h[0][0], mix.low.h, row0, BT, mix.low.ld);
    async_commit();
}

template <int n>
HAS_TWIN __global__ void __launch_bounds__(MIX_W2_THREADS)
    ddlerp_backward_w2_kernel(MixTask<n> mix, float *partial, const floatX *x, int BT, int T, int C) {
    DdlerpTile<n> *tiles = dynamic_smem<DdlerpTile<n>>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * MIX_CHANNELS,
              step = gridDim.y * MIX_W2_ROWS;
    TileC dw2[n][2][1] = {};
    float dmu[n] = {};
    ddlerp_copy_tile(tiles[0], mix, x, blockIdx.y * MIX_W2_ROWS, BT, first, C);
    for (int row0 = blockIdx.y * MIX_W2_ROWS, turn = 0; row0 < BT; row0 += step, turn++) {
        DdlerpTile<n> &s = tiles[turn % MIX_STAGES];
        if (MIX_STAGES > 1) ddlerp_copy_tile(tiles[(turn + 1) % MIX_STAGES], mix, x, row0 + step, BT, first, C);
        async_wait<MIX_STAGES - 1>();
        __syncthreads();
        for (int r = 0; r < MIX_W2_ROWS; r += 16) {
            float diff[4], now[4]; // of the rows in this lane
            to_floats(now, load_b_t(&s.x[1 + r][8 * warp], LD));
            to_floats(diff, load_b_t(&s.x[r][8 * warp], LD));
            for (int e = 0; e < 4; e++) diff[e] = ((row0 + r + tile_k(e)) % T ? diff[e] : 0) - now[e];
#pragma unroll
            for (int i = 0; i < n; i++) {
                float dm[4];
                to_floats(dm, load_b_t(&s.g[i][r][8 * warp], LD));
                for (int e = 0; e < 4; e++) {
                    dm[e] *= diff[e];
                    dmu[i] += dm[e];
                }
                const TileB b[1] = {make_b(dm[0], dm[1], dm[2], dm[3])};
                const int ld = MIX_RANK * n + PAD;
                const TileA h[2] = {load_a_t(&s.h[r][MIX_RANK * i], ld), load_a_t(&s.h[r][MIX_RANK * i + 16], ld)};
                mma(dw2[i], h, b);
            }
        }
        __syncthreads();
        if (MIX_STAGES == 1) ddlerp_copy_tile(tiles[0], mix, x, row0 + step, BT, first, C);
    }
    float *to = partial + (int64_t)blockIdx.y * (MIX_RANK + 1) * n * C + first + 8 * warp;
    warp_sum(dmu, 4);
    for (int i = 0; i < n; i++) {
        for (int k = 0; k < 2; k++)
            for (int e = 0; e < 4; e += 2)
                store_pair(to + (int64_t)(MIX_RANK * i + 16 * k + tile_row(e)) * C + tile_col(e), dw2[i][k][0].x[e],
                           dw2[i][k][0].x[e + 1]);
        if (lane % 4 == 0) to[(int64_t)(MIX_RANK * n + i) * C + lane / 4] = dmu[i];
    }
}

// Blocks of rows for dw2, the same for every GPU, as it says how sums are split: so that in all there are twice as many
// blocks as an H100 holds at a time at n = 5.
static int ddlerp_splits(int C) { return 4 * 132 * MIX_CHANNELS / C; }

static int64_t ddlerp_partial_floats(int C) { return (int64_t)ddlerp_splits(C) * (MIX_RANK + 1) * 5 * C; }

struct DdlerpGradients { // of the hidden layer before its tanh; of w2; of the mu_i
    floatX *dh;
    float *dw2;
    Targets dmu;
};

#ifdef CUDA_ON_CPU // in dev/cpu/twins.h
template <int n, typename TX, bool accumulate>
static void ddlerp_backward_in_loops(const MixTask<n> &mix, const DdlerpGradients &grads, TX *dx, const floatX *x,
                                     int BT, int T, int C);
#endif

template <int n, typename TX, bool accumulate>
static void ddlerp_backward(const MixTask<n> &mix, const DdlerpGradients &g, TX *dx, const floatX *x, float *partial,
                            int BT, int T, int C) {
    TWIN(ddlerp_backward_in_loops<n, TX, accumulate>(mix, g, dx, x, BT, T, C));
    const int slices = C / MIX_CHANNELS, tiles = (int)ceil_div(BT, MIX_W2_ROWS);
    const int split = tiles < ddlerp_splits(C) ? tiles : ddlerp_splits(C), blocks = (int)ceil_div(BT, MIX_ROWS - 1);
    const size_t smem = sizeof(DdlerpBackward<n>), smem_w2 = MIX_STAGES * sizeof(DdlerpTile<n>);
    allow_smem(ddlerp_backward_x_kernel<n, TX, accumulate>, smem);
    ddlerp_backward_x_kernel<n, TX, accumulate><<<blocks, MIX_THREADS, smem, stream>>>(mix, dx, g.dh, x, BT, T, C);
    allow_smem(ddlerp_backward_w2_kernel<n>, smem_w2);
    ddlerp_backward_w2_kernel<n><<<dim3(slices, split), MIX_W2_THREADS, smem_w2, stream>>>(mix, partial, x, BT, T, C);
    add_partials(g.dmu, partial, split, n, C, g.dw2, MIX_RANK * n);
}

// ---- ddlerp's hidden layer ----
//
//     h = tanh((x + diff * mu) @ w1)              w1: the first hidden = 32 n columns of (C, ld)
//
// The shift is linear, so it may as well come after the product, where a token has hidden numbers, not C:
//
//     both = [ (1 - mu) w1 | mu w1 ]  (C, 2 hidden)
//     z    = x @ both                 (BT, 2 hidden, fp32): what a token gives to itself, and to the next
//     h_t  = tanh(z_t[:hidden] + z_{t-1}[hidden:])
//
// and back, with dz_t = [ dh_t | dh_{t+1} ] (dh before the tanh; zero past the end of a sequence) and P, Q the halves
// of dboth:
//
//     x's gradient += dz @ both^T                  dboth = x^T @ dz
//     dw1 = (1 - mu) P + mu Q                      dmu = sum over the columns of w1 (Q - P)
//
// So x + diff * mu and its gradient are never written: of BT C floatX, 1 unit goes through memory forward and 3
// backward. The price: twice the flops, and z and dz (at C = 768, n = 5 the bytes of 1.7 units, and of 1.2). The
// products are cuBLAS'.
__global__ void ddlerp_hidden_weights_kernel(floatX *both, const floatX *w1, const floatX *mu, int C, int hidden,
                                             int ld) {
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * 8, c = at / hidden, r = at % hidden;
    if (c >= C) return;
    const Pack v = load(w1 + (int64_t)c * ld + r);
    Pack here, next;
    for (int j = 0; j < 8; j++) {
        next.x[j] = (float)mu[c] * v.x[j];
        here.x[j] = v.x[j] - next.x[j];
    }
    store(both + (int64_t)c * 2 * hidden + r, here);
    store(both + (int64_t)c * 2 * hidden + hidden + r, next);
}

__global__ void ddlerp_hidden_forward_kernel(floatX *h, const float *z, int BT, int T, int hidden) {
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8, row = at / hidden;
    if (row >= BT) return;
    Pack v = load(z + row * hidden + at); // row * 2 hidden + column
    const Pack before = row % T ? load(z + (row - 1) * hidden + at) : zero_pack();
    for (int j = 0; j < 8; j++) v.x[j] = tanhf(v.x[j] + before.x[j]);
    store(h + at, v);
}

__global__ void ddlerp_hidden_backward_kernel(floatX *dz, const floatX *dh, int BT, int T, int hidden) {
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8, row = at / hidden;
    if (row >= BT) return;
    store(dz + row * hidden + at, load(dh + at));
    store(dz + (row + 1) * hidden + at, (row + 1) % T ? load(dh + at + hidden) : zero_pack());
}

// dw1 and dmu, which are added to, from dboth: a warp a channel
__global__ void ddlerp_hidden_weights_backward_kernel(float *dw1, float *dmu, const float *dboth, const floatX *w1,
                                                      const floatX *mu, int C, int hidden, int ld) {
    const int c = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (c >= C) return;
    float sum = 0;
    for (int r = lane; r < hidden; r += 32) {
        const int64_t at = (int64_t)c * ld + r;
        const float P = dboth[(int64_t)c * 2 * hidden + r], Q = dboth[(int64_t)c * 2 * hidden + hidden + r];
        dw1[at] += P + (float)mu[c] * (Q - P);
        sum += (float)w1[at] * (Q - P);
    }
    sum = warp_sum(sum);
    if (lane == 0) dmu[c] += sum;
}

// ---- element by element ----

// to (rows, columns) = whole * scales; columns: a multiple of 8
__global__ void from_int8_kernel(floatX *to, const int8_t *whole, const float *scales, int rows, int columns) {
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= (int64_t)rows * columns) return;
    Pack v = unpack(load_raw(whole + at));
    for (int i = 0; i < 8; i++) v.x[i] *= scales[at / columns];
    store(to + at, v);
}

// One function of each Pack, n elements (a multiple of 8): h = tanh(h)
__global__ void tanh_forward_kernel(floatX *h, int64_t n) {
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    Pack v = load(h + at);
    for (int i = 0; i < 8; i++) v.x[i] = tanhf(v.x[i]);
    store(h + at, v);
}

__global__ void tanh_backward_kernel(floatX *dh, const floatX *h, int64_t n) { // dh *= 1 - h^2
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    Pack out = load(dh + at);
    const Pack v = load(h + at);
    for (int i = 0; i < 8; i++) out.x[i] *= 1 - v.x[i] * v.x[i];
    store(dh + at, out);
}

__global__ void add_forward_kernel(floatX *out, const floatX *a, const floatX *b, int64_t n) {
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    Pack v = load(a + at);
    const Pack w = load(b + at);
    for (int i = 0; i < 8; i++) v.x[i] += w.x[i];
    store(out + at, v);
}

static int pack_blocks(int64_t n) { return (int)ceil_div(n, 8 * 256); } // for blocks of 256 threads

// ---- WKV (spec section 3): the recurrence at the heart of RWKV-6, in chunks ----
//
// Per head, S is (N keys i, N values j), zero at the start; e_t = exp(w_t), d_t = exp(-e_t):
//
//     y_t[j]   = sum_i r_t[i] (S[i][j] + u[i] k_t[i] v_t[j])
//     S[i][j] <- d_t[i] S[i][j] + k_t[i] v_t[j]
//
// A block owns a head of a sequence (of a long prompt, of a segment) and walks it in tiles of 16 tokens. With W(s,t)
// the product of the decays strictly between s and t, a tile is
//
//     a[t][s] = sum_i r_t[i] k_s[i] W(s,t)[i]  (s < t),  sum_i r_t[i] u[i] k_t[i]  (s = t)
//     y       = r~ S + a v          r~_t = r_t * (the tile's decays before t)
//     S       = D S + k~^T v        k~_s = k_s * (the tile's decays after s),  D: all 16
//
// Scores by levels. W(s,t) splits at any token between s and t; we split where the binary numbers of s and t part.
// Level L = 8, 4, 2, 1 holds the pairs whose highest differing bit is L: t has that bit, s has not, and W(s,t) =
// (decays after s up to there) * (decays from there up to t). So one matrix X_L (16 tokens x channels) is all that a
// level needs:
//
//     token
//         0 1 2 3 4 5 6 7 8 9 ..15         X_L[t] = r_t * (decays from its group's middle to t)    if t has bit L
//     L = 8      k k k k k k k k r r .. r         X_L[s] = k_s * (decays from s to its group's middle)    if not
//     L = 4      k k k k r r r r k k .. r
//     L = 2      k k r r k k r r k k .. r         a[t][s] = (X_L X_L^T)[t][s]    on tensor cores
//     L = 1      k r k r k r k r k r .. r
//
// All factors are products of numbers in [0, 1]: nothing overflows, whatever w is, and what underflows is zero. e is
// capped at 128, where exp(-e) is 0 in fp32 anyway. D - 1 = -(1 - exp(-sum of e)) keeps slow decays exact: S += S (D -
// 1).
//
// A warp owns 16 channels, a lane 2 of them for 4 tokens: a Share, laid out as two results of mma (channels as rows,
// tokens as columns), so that it is an operand as it stands. Row g is channel 2 g, row g + 8 channel 2 g + 1: a lane's
// two are neighbours in memory. A token's bits 1 and 2 are bits of the lane, so decays are multiplied up by two
// exchanges. Floor, forward: r, k, v, w in, y out, 5 BTA floatX, and 2 for states: limited by
// memory bandwidth.

static const int TILE = 16; // tokens of a tile
// Tokens from one state kept for the backward pass to the next. Longer: fewer states in memory (B H T / CHUNK of N^2
// floats a layer), but more of those between its tiles in the backward kernel's shared memory: what fits (WkvBackward).
static const int CHUNK = PRECISION_BF16 ? 64 : 32;
static const int LDT = TILE + PAD;
static const int WKV_THREADS = 128;

struct Wkv {                     // (B, T, A) each, head h at channels h N .. h N + N - 1
    const floatX *r, *k, *v, *w; // w null: zero
    const floatX *time_decay;    // (A), added to w; or null
    const floatX *u;             // (A); or null for zero
    const floatX *v2;            // added to y; or null
    bool one_minus_w;            // k <- k (1 - exp(-e)) first
    // (B, H, chunks, N N): S at the start of every chunk, numbers at wkv_state_at (the CPU's loops: as carry); or null.
    // With carry: memory for segments
    float *states;
    // (B, H, N values, N keys), inference: S^T to begin with, then to go on from; null: begin with 0
    float *carry;
    int T, H;
};

// [n].x[i]: token tile_col(i) + 8 n, channel 2 (lane / 4) + i / 2 of the warp's 16
typedef TileC Share[2];
#define EACH(n, i) \
    for (int n = 0; n < 2; n++) \
        for (int i = 0; i < 4; i++)

// a Share as it stands in memory: pairs of channels; pair m: token wkv_token(m)
struct WkvRaw {
    Pair r[4], k[4], w[4];
};

__device__ inline int wkv_token(int m) { return threadIdx.x % 4 * 2 + m % 2 + m / 2 * 8; }
// the first of two
__device__ inline int wkv_channel(void) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 * 2; }

// The tile at token t0. Past the end: r = k = 0, and w such that e is 0.
__device__ inline void wkv_fetch(WkvRaw &raw, const Wkv &p, int64_t base, int t0) {
    const int A = p.H * N;
    const int64_t at = base + wkv_channel() + wkv_token(0) * A;
    if (t0 + TILE <= p.T) {
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const int next = (m % 2 + m / 2 * 8) * A;
            raw.r[m] = load_pair(p.r + at + next);
            raw.k[m] = load_pair(p.k + at + next);
            raw.w[m] = p.w ? load_pair(p.w + at + next) : pair_of(0, 0);
        }
        return;
    }
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const bool inside = t0 + wkv_token(m) < p.T;
        const int next = (m % 2 + m / 2 * 8) * A;
        raw.r[m] = inside ? load_pair(p.r + at + next) : pair_of(0, 0);
        raw.k[m] = inside ? load_pair(p.k + at + next) : pair_of(0, 0);
        raw.w[m] = !inside ? pair_of(-INFINITY, -INFINITY) : p.w ? load_pair(p.w + at + next) : pair_of(0, 0);
    }
}

__device__ inline void wkv_share(Share &to, const Pair (&from)[4]) {
    EACH(n, i) to[n].x[i] = i / 2 ? second_of(from[2 * n + i % 2]) : first_of(from[2 * n + i % 2]);
}

// 1 - exp(-e), with all its digits where e is small; d = exp(-e)
__device__ inline float one_minus(float d, float e) {
    return e < 0.125f ? e * (1 + e * (-1 / 2.f + e * (1 / 6.f + e * (-1 / 24.f + e * (1 / 120.f))))) : 1 - d;
}

__device__ inline void wkv_decay(Share &e, Share &d, const WkvRaw &raw, const float (&decay)[2]) {
    wkv_share(e, raw.w);
    EACH(n, i) {
        e[n].x[i] = fminf(fast_exp(e[n].x[i] + decay[i / 2]), 128.f);
        d[n].x[i] = fast_exp(-e[n].x[i]);
    }
}

__device__ inline void wkv_keys(Share &k, const WkvRaw &raw, const Share &e, const Share &d, bool one_minus_w) {
    wkv_share(k, raw.k);
    if (one_minus_w) EACH(n, i) k[n].x[i] *= one_minus(d[n].x[i], e[n].x[i]);
}

// The tile's decay D of the lane's two channels, and D - 1
struct WkvTileDecay {
    float2 D, D_minus_1;
};

__device__ inline WkvTileDecay wkv_decay_of_tile(const Share &e) {
    float sum[2], D[2];
    for (int c = 0; c < 2; c++) sum[c] = e[0].x[2 * c] + e[0].x[2 * c + 1] + e[1].x[2 * c] + e[1].x[2 * c + 1];
    warp_sum(sum, 4);
    for (int c = 0; c < 2; c++) D[c] = fast_exp(-sum[c]);
    return {{D[0], D[1]}, {-one_minus(D[0], sum[0]), -one_minus(D[1], sum[1])}};
}

// Products of decays, at 2 half of the tile + channel: of the two tokens beside the lane's two, of the four beyond
// these, of all eight.
struct WkvProducts {
    float beside[4], beyond[4], half[4];
};

__device__ inline void wkv_products(WkvProducts &q, const Share &d) {
    float two[4], four[4];
    for (int m = 0; m < 4; m++) two[m] = d[m / 2].x[m % 2 * 2] * d[m / 2].x[m % 2 * 2 + 1];
    shuffle_xor(q.beside, two, 1);
    for (int m = 0; m < 4; m++) four[m] = two[m] * q.beside[m];
    shuffle_xor(q.beyond, four, 2);
    for (int m = 0; m < 4; m++) q.half[m] = four[m] * q.beyond[m];
}

// Decays from a token to the middle of its group of 2 L tokens: before the token if it has bit L, after it if not. L =
// 16: to the tile's beginning, L = 0: to its end; these two for every token.
__device__ inline void wkv_factors(Share &f, int L, const Share &d, const WkvProducts &q) {
    // of the lane's tokens, 2 (lane % 4) + (0, 1) + (0, 8)
    const bool bit2 = threadIdx.x & 1, bit4 = threadIdx.x & 2;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const bool later = L == 16 ? true : L == 8 ? n == 1 : L == 4 ? bit4 : L == 2 ? bit2 : false;
            float product = 1; // without the lane's own two
            if (L != 2 && later == bit2) product *= q.beside[2 * n + c];
            if (L != 2 && L != 4 && later == bit4) product *= q.beyond[2 * n + c];
            if (L == 16 && n == 1) product *= q.half[c];
            if (L == 0 && n == 0) product *= q.half[2 + c];
            f[n].x[2 * c] = later ? product : product * d[n].x[2 * c + 1];
            f[n].x[2 * c + 1] = later ? product * d[n].x[2 * c] : product;
        }
}

__device__ inline bool wkv_has_bit(int L, int n, int i) { // a token of a Share; L = 8, 4, 2, 1
    return L == 8 ? n == 1 : L == 1 ? i % 2 : threadIdx.x % 4 * 2 & L;
}

// X_L: r where the token has bit L, else k; times its factor
__device__ inline void wkv_level(Share &x, Share &factor, int L, const Share &r, const Share &k, const Share &d,
                                 const WkvProducts &q) {
    if (L > 1) wkv_factors(factor, L, d, q);
    EACH(n, i) {
        if (L == 1) factor[n].x[i] = 1;
        x[n].x[i] = (wkv_has_bit(L, n, i) ? r[n].x[i] : k[n].x[i]) * factor[n].x[i];
    }
}

// A Share to rows (channels) of an array in shared memory; `row` is this lane's first channel's, `next` rows before the
// other
__device__ inline void wkv_store_share(floatX (*to)[LDT], int row, int next, const Share &x) {
    for (int n = 0; n < 2; n++) {
        store_pair(&to[row][8 * n + tile_col(0)], x[n].x[0], x[n].x[1]);
        store_pair(&to[row + next][8 * n + tile_col(0)], x[n].x[2], x[n].x[3]);
    }
}

// This warp's part of the scores, summed over its 16 channels: level by level, 0: L = 8. transposed: rows are s.
typedef floatX WkvScratch[4][TILE][LDT];  // X_L of one level, [warp]
typedef float WkvPart[4][TILE][TILE + 8]; // [warp]: 8 more, so that rows fall into different banks

__device__ inline void wkv_scores(TileC (&a)[2], WkvScratch &scratch, int level, const Share &x, bool transposed) {
    floatX(*own)[LDT] = scratch[threadIdx.x / 32];
    const int g = threadIdx.x % 32 / 4;
    __syncwarp();
    wkv_store_share(own, g, 8, x);
    __syncwarp();
    const TileA rows = load_a_t(&own[0][0], LDT);
    const TileB b[2] = {as_b(rows, 0), as_b(rows, 1)};
    TileC product[2] = {};
    mma(product, rows, b);
    for (int i = 0; i < 2; i++) {
        const int column = tile_col(i);
        const bool here = (g ^ column) >> (3 - level) == 1 && (transposed ? g < column : g > column);
        if (level == 0 && transposed) a[1].x[i] = product[1].x[i]; // from one half of the tile to the other
        if (level == 0 && !transposed) a[0].x[2 + i] = product[0].x[2 + i];
        for (int n = 0; n < 2 && level > 0; n++) a[n].x[2 * n + i] = here ? product[n].x[2 * n + i] : a[n].x[2 * n + i];
    }
}

// The diagonal, one by one: sums over the lanes of a token.
__device__ inline void wkv_scores_bonus(TileC (&a)[2], const Share &r, const Share &k, const float (&u)[2]) {
    float sum[4], other[4];
    for (int m = 0; m < 4; m++) {
        const int n = m / 2, i = m % 2;
        sum[m] = u[0] * r[n].x[i] * k[n].x[i] + u[1] * r[n].x[i + 2] * k[n].x[i + 2];
    }
    for (int lanes = 4; lanes < 32; lanes *= 2) {
        shuffle_xor(other, sum, lanes);
        for (int m = 0; m < 4; m++) sum[m] += other[m];
    }
    for (int m = 0; m < 4; m++)
        for (int j = m % 2; j < 4; j += 2)
            if (tile_row(j) == wkv_token(m)) a[m / 2].x[j] = sum[m];
}

__device__ inline void wkv_store_scores(WkvPart &part, const TileC (&a)[2]) {
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i += 2)
            store_pair(&part[threadIdx.x / 32][tile_row(i)][8 * n + tile_col(i)], a[n].x[i], a[n].x[i + 1]);
}

__device__ inline void wkv_sum_scores(TileC (&a)[2], const WkvPart &parts) {
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i++) {
            const float *part = &parts[0][tile_row(i)][8 * n + tile_col(i)];
            const int next = TILE * (TILE + 8);
            a[n].x[i] = (part[0] + part[next]) + (part[2 * next] + part[3 * next]);
        }
}

// ---- forward: warp j has values 16 j .. 16 j + 15 of the state, as rows of S^T, in fp32 in its registers ----
//
//          i 0     8    ..  56
//     j  [ C0 | C1 | .. | C7 ]  one warp
//         y (16 t x 16 j) = r~ (16 t x 64 i) S + a v        S^T <- D S^T + v^T (16 j x 16 t) k~
//
// Blocks of 128 threads, dynamic shared memory sizeof(WkvForward). What all warps read of a tile is there
// twice, for even and odd tiles, so that one barrier a tile is enough.
struct WkvForward {
    alignas(16) floatX v[2][TILE][LD];
    alignas(16) floatX before[2][N][LDT], after[2][N][LDT]; // r~ and k~, rows are channels
    float D_minus_1[2][N];
    alignas(16) WkvScratch scratch;
    WkvPart part[2];
};

// 16 tokens of a head (row t0 of from) to shared memory; zeros past the end
__device__ inline void wkv_copy_tile(floatX (*to)[LD], const floatX *from, int64_t head, int t0, int T, int A) {
    async_tile<TILE, N, WKV_THREADS>(&to[0][0], from + head, t0, T, A);
}

// Where a number of a state is kept for the backward kernel, whose thread finds what it has of it in 8 pieces of 16
// bytes, WKV_THREADS of them apart: keys k, k + 1 of value v, then of v + 1. Here k is even.
__device__ inline int wkv_state_at(int value, int key) {
    const int thread = key / 16 * 32 + key % 16 / 2 * 4 + value % 8 / 2;
    return (value / 8 * WKV_THREADS + thread) * 4 + value % 2 * 2;
}

__device__ inline void wkv_state_out(float *to, const TileC (&S)[8], bool carry) { // carry: (values, keys)
    for (int n = 0; n < 8; n++)
        for (int i = 0; i < 4; i += 2) {
            const int value = threadIdx.x / 32 * 16 + tile_row(i), key = 8 * n + tile_col(i);
            store_pair(to + (carry ? value * N + key : wkv_state_at(value, key)), S[n].x[i], S[n].x[i + 1]);
        }
}

// A long sequence alone has too few heads to fill a GPU. So in inference its segments go side by side: first the state
// that each makes from zero, and its decay (wkv_segment_kernel: no scores, no y), then the states they start with, one
// after the other (wkv_starts_kernel), then y of all (wkv_forward_kernel, a segment a block).
static const int WKV_SEGMENT = 512; // tokens

struct WkvSegment {
    float S[N * N]; // (values, keys): what it makes from zero, then what it starts with
    float D[N];     // the decay of all its tokens
};

static_assert(WKV_SEGMENT % (2 * TILE) == 0 && WKV_SEGMENT >= 2 * CHUNK,
              "segments are kept in the place of chunks' states");

// segment z of a head
__device__ inline WkvSegment &wkv_segment_of(const Wkv &p, int segments, int h, int b, int z) {
    return ((WkvSegment *)p.states)[((int64_t)b * p.H + h) * segments + z];
}

// Grid (H, B, segments)
HAS_TWIN __global__ void __launch_bounds__(WKV_THREADS) wkv_forward_kernel(floatX *y, Wkv p) {
    WkvForward &s = *dynamic_smem<WkvForward>();
    const int warp = threadIdx.x / 32, h = blockIdx.x, b = blockIdx.y, A = p.H * N, channel = wkv_channel();
    const int chunks = (p.T + CHUNK - 1) / CHUNK, segments = gridDim.z, first = blockIdx.z * WKV_SEGMENT;
    const int end = (int)blockIdx.z + 1 < segments ? first + WKV_SEGMENT : p.T;
    float u[2] = {0, 0}, decay[2] = {0, 0};
    for (int c = 0; c < 2; c++) {
        if (p.u) u[c] = (float)p.u[h * N + channel + c];
        if (p.time_decay) decay[c] = (float)p.time_decay[h * N + channel + c];
    }
    TileC S[8] = {};
    float *carry = p.carry ? p.carry + ((int64_t)b * p.H + h) * N * N : nullptr;
    const float *start = segments > 1 ? wkv_segment_of(p, segments, h, b, blockIdx.z).S : carry;
    for (int n = 0; n < 8 && start; n++)
        for (int i = 0; i < 4; i++) S[n].x[i] = start[(16 * warp + tile_row(i)) * N + 8 * n + tile_col(i)];
    const int64_t head = (int64_t)b * p.T * A + h * N;
    WkvRaw raw;
    wkv_fetch(raw, p, head + (int64_t)first * A, first);
    wkv_copy_tile(s.v[0], p.v, head, first, p.T, A);
    async_commit();
    for (int t0 = first; t0 < end; t0 += TILE) {
        const int side = t0 / TILE % 2;
        const int64_t base = head + (int64_t)t0 * A;
        if (p.states && !carry && t0 % CHUNK == 0)
            wkv_state_out(p.states + (((int64_t)b * p.H + h) * chunks + t0 / CHUNK) * N * N, S, false);
        {
            Share r, k, e, d, x, factor;
            TileC a[2] = {};
            wkv_share(r, raw.r);
            wkv_decay(e, d, raw, decay);
            wkv_keys(k, raw, e, d, p.one_minus_w);
            if (t0 + TILE < end) wkv_fetch(raw, p, base + (int64_t)TILE * A, t0 + TILE);
            WkvProducts q;
            wkv_products(q, d);
#pragma unroll
            for (int level = 0; level < 4; level++) {
                wkv_level(x, factor, 8 >> level, r, k, d, q);
                wkv_scores(a, s.scratch, level, x, false);
            }
            if (p.u) wkv_scores_bonus(a, r, k, u);
            wkv_store_scores(s.part[side], a);
            wkv_factors(factor, 16, d, q);
            EACH(n, i) x[n].x[i] = r[n].x[i] * factor[n].x[i];
            wkv_store_share(s.before[side], channel, 1, x);
            wkv_factors(factor, 0, d, q);
            EACH(n, i) x[n].x[i] = k[n].x[i] * factor[n].x[i];
            wkv_store_share(s.after[side], channel, 1, x);
            const float2 D = wkv_decay_of_tile(e).D_minus_1;
            if (threadIdx.x % 4 == 0) store_pair(&s.D_minus_1[side][channel], D.x, D.y);
        }
        const int64_t at = base + (int64_t)tile_row(0) * A + 16 * warp + tile_col(0); // of y's element out[0].x[0]
        Pair v2[4];
        for (int m = 0; m < 4; m++) {
            // out[m % 2].x[m / 2 * 2], and its neighbour
            const bool there = p.v2 && t0 + tile_row(m) < p.T;
            v2[m] = there ? load_pair(p.v2 + at + m / 2 * 8 * A + m % 2 * 8) : pair_of(0, 0);
        }
        async_wait<0>();
        __syncthreads();
        if (t0 + TILE < end) wkv_copy_tile(s.v[1 - side], p.v, head, t0 + TILE, p.T, A);
        async_commit();
        TileC out[2] = {};
        for (int i = 0; i < 4; i++) {
            // rows are values: as right operand, columns
            const TileA state = to_a(S[2 * i], S[2 * i + 1]);
            const TileB values[2] = {as_b(state, 0), as_b(state, 1)};
            mma(out, load_a_t(&s.before[side][16 * i][0], LDT), values);
        }
        TileB v[2], keys[8];
        TileC scores[2];
        load_b_pair_t(v, &s.v[side][0][16 * warp], LD);
        wkv_sum_scores(scores, s.part[side]);
        mma_wide(out, scores, v);
        for (int n = 0; n < 8; n++) {
            if (n % 2 == 0) load_b_pair(&keys[n], &s.after[side][8 * n][0], LDT);
            for (int i = 0; i < 4; i++) S[n].x[i] += S[n].x[i] * s.D_minus_1[side][8 * n + tile_col(i)];
        }
        mma(S, load_a_t(&s.v[side][0][16 * warp], LD), keys);
        for (int m = 0; m < 4; m++) {
            const float *from = &out[m % 2].x[m / 2 * 2];
            if (t0 + tile_row(m) >= p.T) continue;
            store_pair(y + at + m / 2 * 8 * A + m % 2 * 8, from[0] + first_of(v2[m]), from[1] + second_of(v2[m]));
        }
    }
    if (carry && (int)blockIdx.z == segments - 1) wkv_state_out(carry, S, true);
}

// ---- backward ----
//
// dS is the gradient of the state after a tile; it decays backwards as S does forwards. In a tile, with S0 the state
// before it and dS the gradient after it:
//
//     da[t][s]  = dy_t . v_s             X[t][i] = sum_j dy_t[j] S0[i][j]        Y[s][i] = sum_j v_s[j] dS[i][j]
//     dv        = k~ dS + a^T dy         dS <- D dS + r~^T dy
//
// r and k get their gradients from S0 and dS and from the levels of the scores. In level L a row of X_L is either r's
// or k's, so one product with the level's pairs of da serves both: Z_L = (da_L + da_L^T) X_L, and
//
//     dr_t = (decays before t) X[t] + sum of (t's factor in level L) Z_L[t]  over the levels in which t has the bit
//     dk_s = (decays after s)  Y[s] + sum of (s's factor in level L) Z_L[s]  over the others
//
// The decay: w_t is felt by every pair s < t < t', dw_t = -e_t sum over them of r_t' k_s W(s,t') da[t'][s], where s may
// lie before the tile and t' after it. In a level such pairs lie on both sides of a group's middle, so t has its half
// of the group to itself: if t is in r's half, what passes it is what reaches the tokens t' > t there, sum of X_L[t']
// Z_L[t']; if in k's half, what left s < t there, sum of X_L[s] Z_L[s]. The same for r~ X (all t' > t of the tile), k~
// Y (all s < t) and sum_j D S0 dS (past the whole tile). These sums are products with a 0/1 matrix. No differences of
// running sums, which would lose a small dw behind large ones.
//
// Here warp i has keys 16 i .. 16 i + 15 of S0 and dS as rows, so that Shares are operands without a detour. S0 of a
// chunk's tiles is made again from the chunk's state. S0, dS and the sums' terms are multiplied with more bits than
// bf16 has (mma_half): much cancels in dw. Sums over all tiles are in shared memory: there are too few registers, and
// what does not fit goes to memory. Floor: r, k, v, w, dy in, dr, dk, dv, dw out, 9 BTA floatX, 2 for states: limited
// by memory bandwidth.
static const int TILES = CHUNK / TILE;

struct WkvBackward {
    alignas(16) floatX v[TILES][TILE][LD], dy[TILES][TILE][LD];
    alignas(16) floatX dS[N][LD], after[N][LDT]; // rows are keys; after: k~
    alignas(16) WkvScratch scratch;
    WkvPart part;
    float dw_sum[2][WKV_THREADS], du[2][WKV_THREADS]; // each thread's own sums over the tiles
    // each thread's own. [0]: the chunk's state, then tile 1's, then that of the chunk before. [1]: tile 2's, then the
    // chunk's again, for tile 0
    float4 states[2][8][WKV_THREADS];
};

static_assert(sizeof(WkvBackward) <= 99 * 1024, "what the smaller GPUs give a block");
static_assert(TILES <= 4, "there are places for the states of tiles 0, 1, 2 and the last");

struct WkvGradients {
    const floatX *dy;
    floatX *dr, *dk, *dv, *dw; // (B, T, A); dw may be null
    float *dw_sum, *du;        // (B, A): summed over T, for time_decay and u
};

// v and dy of tile q of the chunk at c0, to `place`
__device__ inline void wkv_copy_tiles(WkvBackward &s, const Wkv &p, const WkvGradients &g, int64_t head, int c0, int q,
                                      int place) {
    const int t0 = c0 + q * TILE, A = p.H * N;
    wkv_copy_tile(s.v[place], p.v, head, t0, p.T, A);
    wkv_copy_tile(s.dy[place], g.dy, head, t0, p.T, A);
}

// The walk frees places of v and dy from the last tile's to the first's, and the tiles of the chunk before move in,
// first tile first. So every other chunk lies in reverse order (turned), and the copy that is begun last is that of a
// last tile, which wkv_remake_states does not read.
__device__ inline int wkv_place(int q, bool turned) { return turned ? TILES - 1 - q : q; }

// This thread's part of a state, whose rows are keys as in a Share. Begins to copy it from memory to shared memory:
__device__ inline void wkv_state_copy(float4 (&to)[8][WKV_THREADS], const Wkv &p, int chunk) {
    const int chunks = (p.T + CHUNK - 1) / CHUNK;
    const float *own = p.states + (((int64_t)blockIdx.y * p.H + blockIdx.x) * chunks + chunk) * N * N + threadIdx.x * 4;
    for (int n = 0; n < 8; n++) async_copy16(&to[n][threadIdx.x], own + n * WKV_THREADS * 4, true);
}

// from there to registers,
__device__ inline void wkv_state_in(TileC (&S)[8], const float4 (&from)[8][WKV_THREADS]) {
    for (int n = 0; n < 8; n++) {
        const float4 piece = from[n][threadIdx.x];
        S[n] = {piece.x, piece.z, piece.y, piece.w};
    }
}

// and back.
__device__ inline void wkv_state_keep(float4 (&to)[8][WKV_THREADS], const TileC (&S)[8]) {
    for (int n = 0; n < 8; n++) to[n][threadIdx.x] = make_float4(S[n].x[0], S[n].x[2], S[n].x[1], S[n].x[3]);
}

// S <- D S + left rows: left (16 keys x 16 tokens), rows (16 tokens x N values)
__device__ inline void wkv_update(TileC (&S)[8], const Share &left, const floatX (*rows)[LD], float2 D_minus_1) {
    TileB b[8];
    for (int n = 0; n < 8; n++) {
        if (n % 2 == 0) load_b_pair_t(&b[n], &rows[0][8 * n], LD);
        for (int i = 0; i < 4; i++) S[n].x[i] += S[n].x[i] * (i / 2 ? D_minus_1.y : D_minus_1.x);
    }
    mma_wide(S, left, b);
}

// Of the tile in raw: e, and its keys as an update takes them (k~). Then raw is on its way to be the tile at `next`, if
// there is more.
__device__ inline void wkv_keys_after(Share &k, Share &e, WkvRaw &raw, const Wkv &p, const float (&decay)[2],
                                      int64_t head, int next, bool more) {
    Share d, factor;
    WkvProducts products;
    wkv_decay(e, d, raw, decay);
    wkv_keys(k, raw, e, d, p.one_minus_w);
    if (more) wkv_fetch(raw, p, head + (int64_t)next * p.H * N, next);
    wkv_products(products, d);
    wkv_factors(factor, 0, d, products);
    EACH(n, i) k[n].x[i] *= factor[n].x[i];
}

// The sums that dw needs, as right operands: ones where token `from` (row) passes token t (column), both of the same
// half of the tile. upward: from > t, downward: from < t; level4, level2: of one group of 8 or 4, upward for those
// with the bit, downward for the others.
struct WkvPassing {
    Pair upward, downward, level4, level2; // rows tile_col(0) and tile_col(1), column lane / 4
};

__device__ inline WkvPassing wkv_passing_patterns(void) {
    const int t = threadIdx.x % 32 / 4;
    float one[4][2];
    for (int i = 0; i < 2; i++) {
        const int from = tile_col(i);
        const bool up = from > t, down = from < t;
        one[0][i] = up, one[1][i] = down;
        one[2][i] = (t ^ from) < 4 && (t & 4 ? up : down);
        one[3][i] = (t ^ from) < 2 && (t & 2 ? up : down);
    }
    return {pair_of(one[0][0], one[0][1]), pair_of(one[1][0], one[1][1]), pair_of(one[2][0], one[2][1]),
            pair_of(one[3][0], one[3][1])};
}

// passing (16 channels x 8 tokens) += terms (16 x 8) pattern
__device__ inline void wkv_pass(TileC &passing, const TileC &terms, Pair pattern) {
    mma_half(passing, terms, first_of(pattern), second_of(pattern));
}

// What a warp knows of the tile at hand: its operands, and its gradients as they are put together.
struct WkvTile {
    Share r, k, e, d;                  // k times 1 - exp(-e) if one_minus_w
    WkvProducts products;              // of d
    Share dr = {}, dk = {};            // at first X and Y, then the gradients
    Share passing;                     // what passes each token, see above; at last dw
    float near_da[2][2], far_da[2][2]; // da of pairs in one half of the tile; across, both ways
    float past[2] = {0, 0};            // sum_j S0 dS
};

__device__ inline void wkv_operands(WkvTile &t, const WkvRaw &raw, const float (&decay)[2], bool one_minus_w) {
    wkv_share(t.r, raw.r);
    wkv_decay(t.e, t.d, raw, decay);
    wkv_keys(t.k, raw, t.e, t.d, one_minus_w);
}

// From the state before a chunk forwards to the one before its last tile, those between to shared memory. raw: the
// first tile's, then the last one's.
__device__ inline void wkv_remake_states(TileC (&S0)[8], WkvBackward &s, WkvRaw &raw, const Wkv &p, int64_t head,
                                         int c0, int tiles, bool turned, const float (&decay)[2]) {
    for (int i = 0; i < tiles - 1; i++) {
        Share k, e;
        wkv_keys_after(k, e, raw, p, decay, head, c0 + (i + 1) * TILE, true);
        wkv_update(S0, k, s.v[wkv_place(i, turned)], wkv_decay_of_tile(e).D_minus_1);
        if (i < tiles - 2) wkv_state_keep(s.states[i], S0);
    }
}

// da, X and Y, and what passes the whole tile, still without D; dS to shared memory
__device__ inline void wkv_backward_products(WkvTile &t, WkvBackward &s, const TileC (&S0)[8], const TileC (&dS)[8],
                                             int q) {
    Share da = {}, da_t = {};
#pragma unroll
    for (int i = 0; i < 4; i++) { // 16 values at a time
        const TileA dy = load_a(&s.dy[q][0][16 * i], LD), v = load_a(&s.v[q][0][16 * i], LD);
        const TileB dy_b[2] = {as_b(dy, 0), as_b(dy, 1)}, v_b[2] = {as_b(v, 0), as_b(v, 1)};
        mma_wide(t.dr, {S0[2 * i], S0[2 * i + 1]}, dy_b); // X^T
        mma_wide(t.dk, {dS[2 * i], dS[2 * i + 1]}, v_b);  // Y^T
        mma(da, dy, v_b);
        mma(da_t, v, dy_b);
        for (int n = 2 * i; n < 2 * i + 2; n++)
            for (int j = 0; j < 4; j++) {
                t.past[j / 2] += S0[n].x[j] * dS[n].x[j];
                if (j % 2 == 0)
                    store_pair(&s.dS[wkv_channel() + j / 2][8 * n + tile_col(j)], dS[n].x[j], dS[n].x[j + 1]);
            }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bool below = (int)(threadIdx.x % 32 / 4) >= tile_col(i);
        for (int n = 0; n < 2; n++) t.near_da[n][i] = below ? da[n].x[2 * n + i] : da_t[n].x[2 * n + i];
        t.far_da[0][i] = da_t[1].x[i], t.far_da[1][i] = da[0].x[2 + i];
    }
}

// Through r~ and S0, k~ and dS; and dS to the tile's beginning
__device__ inline void wkv_backward_states(WkvTile &t, WkvBackward &s, TileC (&dS)[8], const WkvPassing &pass, int q) {
    const WkvTileDecay whole = wkv_decay_of_tile(t.e);
    wkv_products(t.products, t.d);
    t.past[0] *= whole.D.x, t.past[1] *= whole.D.y;
    warp_sum(t.past, 4);
    EACH(n, i) t.passing[n].x[i] = t.past[i / 2];
    Share tilde, factor;
    wkv_factors(factor, 16, t.d, t.products);
    EACH(n, i) tilde[n].x[i] = t.r[n].x[i] * factor[n].x[i];
    wkv_update(dS, tilde, s.dy[q], whole.D_minus_1);
    EACH(n, i) {
        tilde[n].x[i] *= t.dr[n].x[i];
        t.dr[n].x[i] *= factor[n].x[i];
    }
    for (int n = 0; n < 2; n++) wkv_pass(t.passing[n], tilde[n], pass.upward);
    mma_half(t.passing[0], tilde[1], 1, 1);
    wkv_factors(factor, 0, t.d, t.products);
    EACH(n, i) tilde[n].x[i] = t.k[n].x[i] * factor[n].x[i];
    wkv_store_share(s.after, wkv_channel(), 1, tilde);
    EACH(n, i) {
        tilde[n].x[i] *= t.dk[n].x[i];
        t.dk[n].x[i] *= factor[n].x[i];
    }
    mma_half(t.passing[1], tilde[0], 1, 1);
    for (int n = 0; n < 2; n++) wkv_pass(t.passing[n], tilde[n], pass.downward);
}

// Through the levels of the scores a, which are made again on the way
__device__ inline void wkv_backward_levels(WkvTile &t, TileC (&a)[2], WkvScratch &scratch, const WkvPassing &pass) {
#pragma unroll
    for (int level = 0; level < 4; level++) {
        const int L = 8 >> level;
        Share x, factor, z = {};
        wkv_level(x, factor, L, t.r, t.k, t.d, t.products);
        wkv_scores(a, scratch, level, x, true);
#pragma unroll
        for (int n = 0; n < 2; n++) { // all pairs of L = 8 lie across the halves of the tile, all others in one half
            float da[2];
            for (int i = 0; i < 2; i++) {
                const bool here = (threadIdx.x % 32 / 4 ^ tile_col(i)) >> (3 - level) == 1;
                da[i] = L == 8 ? t.far_da[n][i] : here ? t.near_da[n][i] : 0;
            }
            mma_half(z[n], x[L == 8 ? 1 - n : n], da[0], da[1]);
        }
        EACH(n, i) {
            const bool has = wkv_has_bit(L, n, i);
            const float own = z[n].x[i] * factor[n].x[i];
            t.dr[n].x[i] = fmaf(own, has, t.dr[n].x[i]); // by a factor: half the instructions of a choice
            t.dk[n].x[i] = fmaf(own, !has, t.dk[n].x[i]);
            z[n].x[i] *= x[n].x[i];
        }
        for (int n = 0; n < 2 && L > 1; n++)
            wkv_pass(t.passing[n], z[n], L == 4 ? pass.level4 : L == 2 ? pass.level2 : n ? pass.upward : pass.downward);
    }
}

// Through the bonus u: da[t][t] of the lane's tokens comes from the lane that has it.
__device__ inline void wkv_backward_bonus(WkvTile &t, WkvBackward &s, const float (&u)[2]) {
    float du[2] = {s.du[0][threadIdx.x], s.du[1][threadIdx.x]};
    for (int m = 0; m < 4; m++) {
        const int n = m / 2, token = m % 2, from = (threadIdx.x % 4 * 2 + token) * 4 + threadIdx.x % 4;
        const float own = __shfl_sync(0xffffffffu, t.near_da[n][token], from);
        for (int c = 0; c < 2; c++) {
            const int i = 2 * c + token;
            t.dr[n].x[i] += u[c] * t.k[n].x[i] * own;
            t.dk[n].x[i] += u[c] * t.r[n].x[i] * own;
            du[c] += t.r[n].x[i] * t.k[n].x[i] * own;
        }
    }
    for (int c = 0; c < 2; c++) s.du[c][threadIdx.x] = du[c];
}

// dw, the keys' factor 1 - exp(-e), and dr, dk and dw to memory. e is computed again from raw: to keep it would take
// registers that are not there.
__device__ inline void wkv_backward_store(WkvTile &t, WkvBackward &s, const WkvGradients &g, const Wkv &p,
                                          const WkvRaw &raw, const float (&decay)[2], int64_t head, int t0) {
    float dw_sum[2] = {s.dw_sum[0][threadIdx.x], s.dw_sum[1][threadIdx.x]};
    wkv_decay(t.e, t.d, raw, decay);
    wkv_share(t.k, raw.k);
    EACH(n, i) {
        float dw = -t.e[n].x[i] * t.passing[n].x[i];
        if (p.one_minus_w) { // the key was k (1 - exp(-e)), e = exp(w)
            dw += t.dk[n].x[i] * t.k[n].x[i] * t.e[n].x[i] * t.d[n].x[i];
            t.dk[n].x[i] *= one_minus(t.d[n].x[i], t.e[n].x[i]);
        }
        dw_sum[i / 2] += dw;
        t.passing[n].x[i] = dw;
    }
    for (int c = 0; c < 2; c++) s.dw_sum[c][threadIdx.x] = dw_sum[c];
    const int A = p.H * N;
    const int64_t at = head + (int64_t)t0 * A + wkv_channel() + wkv_token(0) * A;
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const int n = m / 2, i = m % 2, next_token = (m % 2 + m / 2 * 8) * A;
        if (t0 + wkv_token(m) >= p.T) continue;
        store_pair(g.dr + at + next_token, t.dr[n].x[i], t.dr[n].x[i + 2]);
        store_pair(g.dk + at + next_token, t.dk[n].x[i], t.dk[n].x[i + 2]);
        if (g.dw) store_pair(g.dw + at + next_token, t.passing[n].x[i], t.passing[n].x[i + 2]);
    }
}

// dv = k~ dS + a^T dy: 16 tokens x this warp's 16 values
__device__ inline void wkv_backward_values(WkvBackward &s, const WkvGradients &g, const Wkv &p, int64_t head, int t0,
                                           int q) {
    const int warp = threadIdx.x / 32, A = p.H * N;
    TileC dv[2] = {};
    for (int i = 0; i < 4; i++) {
        TileB state_b[2];
        load_b_pair_t(state_b, &s.dS[16 * i][16 * warp], LD);
        mma(dv, load_a_t(&s.after[16 * i][0], LDT), state_b);
    }
    TileB dy_b[2];
    TileC a[2];
    load_b_pair_t(dy_b, &s.dy[q][0][16 * warp], LD);
    wkv_sum_scores(a, s.part);
    mma_wide(dv, a, dy_b);
    const int64_t at = head + (int64_t)(t0 + tile_row(0)) * A + 16 * warp + tile_col(0);
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const float *from = &dv[m % 2].x[m / 2 * 2];
        if (t0 + tile_row(m) < p.T) store_pair(g.dv + at + m / 2 * 8 * A + m % 2 * 8, from[0], from[1]);
    }
}

HAS_TWIN __global__ void __launch_bounds__(WKV_THREADS, PRECISION_BF16 ? 3 : 1)
    wkv_backward_kernel(WkvGradients g, Wkv p) {
    WkvBackward &s = *dynamic_smem<WkvBackward>();
    const int h = blockIdx.x, b = blockIdx.y, A = p.H * N, channel = wkv_channel();
    const int chunks = (p.T + CHUNK - 1) / CHUNK;
    const int64_t head = (int64_t)b * p.T * A + h * N;
    const WkvPassing pass = wkv_passing_patterns();
    float u[2] = {0, 0}, decay[2] = {0, 0};
    for (int c = 0; c < 2; c++) {
        s.dw_sum[c][threadIdx.x] = s.du[c][threadIdx.x] = 0;
        if (p.u) u[c] = (float)p.u[h * N + channel + c];
        if (p.time_decay) decay[c] = (float)p.time_decay[h * N + channel + c];
    }
    TileC dS[8] = {};
    WkvRaw raw;
    wkv_fetch(raw, p, head + (int64_t)(chunks - 1) * CHUNK * A, (chunks - 1) * CHUNK);
    const int c_last = (chunks - 1) * CHUNK; // places that a short chunk leaves free go to the one before
    for (int q = 0; q < TILES; q++)
        if (c_last + q * TILE < p.T) wkv_copy_tiles(s, p, g, head, c_last, q, q);
        else if (chunks > 1) wkv_copy_tiles(s, p, g, head, c_last - CHUNK, TILES - 1 - q, q);
    wkv_state_copy(s.states[0], p, chunks - 1);
    async_commit();
    async_commit(); // the group of a last tile, here empty
    bool turned = false;
    for (int chunk = chunks - 1; chunk >= 0; chunk--, turned = !turned) {
        const int c0 = chunk * CHUNK, tiles = min(TILES, (p.T - c0 + TILE - 1) / TILE);
        async_wait<1>();
        __syncthreads();
        for (int q = tiles - 1; q >= 0; q--) {
            const int t0 = c0 + q * TILE;
            TileC S0[8];
            // All states are made again from the chunk's. Then tiles 1 and 2 find theirs where these were put, and tile
            // 0 finds the chunk's, which has come once more to where tile 2's had been.
            if (q == 0) async_wait<1>();
            wkv_state_in(S0, s.states[q == tiles - 1 || q == 1 ? 0 : 1]);
            if (q == tiles - 1) {
                wkv_remake_states(S0, s, raw, p, head, c0, tiles, turned, decay);
                async_wait<0>();
                __syncthreads();
            }
            const int place = wkv_place(q, turned);
            if (q == 1 || (q == 0 && chunk > 0)) wkv_state_copy(s.states[q], p, q == 1 ? chunk : chunk - 1);
            async_commit();
            WkvTile t;
            wkv_backward_products(t, s, S0, dS, place);
            wkv_operands(t, raw, decay, p.one_minus_w);
            wkv_backward_states(t, s, dS, pass, place);
            TileC a[2] = {};
            wkv_backward_levels(t, a, s.scratch, pass);
            if (p.u) wkv_scores_bonus(a, t.r, t.k, u);
            wkv_store_scores(s.part, a);
            const WkvRaw now = raw;
            // the tile before this one; or the first of the chunk before, where wkv_remake_states begins
            const int next = q > 0 ? t0 - TILE : c0 - CHUNK;
            if (next >= 0) wkv_fetch(raw, p, head + (int64_t)next * A, next);
            if (p.u) wkv_backward_bonus(t, s, u);
            wkv_backward_store(t, s, g, p, now, decay, head, t0);
            __syncthreads();

            wkv_backward_values(s, g, p, head, t0, place);
            __syncthreads();
            // this tile's v and dy have been read by all: room for one of the chunk before
            if (chunk > 0) wkv_copy_tiles(s, p, g, head, c0 - CHUNK, TILES - 1 - q, place);
            async_commit();
        }
    }
    for (int c = 0; c < 2; c++) {
        const float dw_sum = warp_sum(s.dw_sum[c][threadIdx.x], 4), du = warp_sum(s.du[c][threadIdx.x], 4);
        if (threadIdx.x % 4 > 0) continue;
        g.dw_sum[(int64_t)b * A + h * N + channel + c] = dw_sum;
        g.du[(int64_t)b * A + h * N + channel + c] = du;
    }
}

// ---- segments: grids (H, B, segments - 1), blocks of WKV_THREADS, and (N N / 256, H, B), blocks of 256 ----

HAS_TWIN __global__ void __launch_bounds__(WKV_THREADS) wkv_segment_kernel(Wkv p, int segments) {
    __shared__ __align__(16) floatX v[2][TILE][LD];
    const int h = blockIdx.x, b = blockIdx.y, first = blockIdx.z * WKV_SEGMENT, A = p.H * N, channel = wkv_channel();
    const int64_t head = (int64_t)b * p.T * A + h * N;
    float decay[2] = {0, 0}, sum[2] = {0, 0};
    for (int c = 0; c < 2 && p.time_decay; c++) decay[c] = (float)p.time_decay[h * N + channel + c];
    TileC S[8] = {}; // rows are keys
    WkvRaw raw;
    wkv_fetch(raw, p, head + (int64_t)first * A, first);
    wkv_copy_tile(v[0], p.v, head, first, p.T, A);
    async_commit();
    for (int t0 = first; t0 < first + WKV_SEGMENT; t0 += TILE) {
        const int side = t0 / TILE % 2, next = t0 + TILE;
        const bool more = next < first + WKV_SEGMENT;
        Share k, e;
        wkv_keys_after(k, e, raw, p, decay, head, next, more);
        EACH(n, i) sum[i / 2] += e[n].x[i];
        async_wait<0>();
        __syncthreads();
        if (more) wkv_copy_tile(v[1 - side], p.v, head, next, p.T, A);
        async_commit();
        wkv_update(S, k, v[side], wkv_decay_of_tile(e).D_minus_1);
    }
    WkvSegment &to = wkv_segment_of(p, segments, h, b, blockIdx.z);
    for (int n = 0; n < 8; n++)
        for (int i = 0; i < 2; i++) store_pair(to.S + (8 * n + tile_col(i)) * N + channel, S[n].x[i], S[n].x[i + 2]);
    warp_sum(sum, 4);
    if (threadIdx.x % 4 == 0) store_pair(to.D + channel, fast_exp(-sum[0]), fast_exp(-sum[1]));
}

HAS_TWIN __global__ void wkv_starts_kernel(Wkv p, int segments) {
    const int h = blockIdx.y, b = blockIdx.z, at = blockIdx.x * blockDim.x + threadIdx.x;
    float S = p.carry[((int64_t)b * p.H + h) * N * N + at];
    for (int z = 0; z < segments - 1; z++) {
        WkvSegment &segment = wkv_segment_of(p, segments, h, b, z);
        const float made = segment.S[at];
        segment.S[at] = S;
        S = segment.D[at % N] * S + made;
    }
    wkv_segment_of(p, segments, h, b, segments - 1).S[at] = S;
}

#ifdef CUDA_ON_CPU // in dev/cpu/twins.h
static void wkv_forward_in_loops(floatX *y, const Wkv &p, int B);
static void wkv_backward_in_loops(const WkvGradients &g, const Wkv &p, int B);
#endif

static void wkv_forward(floatX *y, const Wkv &p, int B) {
    TWIN(wkv_forward_in_loops(y, p, B));
    const int segments = p.carry && p.states && p.T > WKV_SEGMENT ? (int)ceil_div(p.T, WKV_SEGMENT) : 1;
    if (segments > 1) {
        wkv_segment_kernel<<<dim3(p.H, B, segments - 1), WKV_THREADS, 0, stream>>>(p, segments);
        wkv_starts_kernel<<<dim3(N * N / 256, p.H, B), 256, 0, stream>>>(p, segments);
    }
    allow_smem(wkv_forward_kernel, sizeof(WkvForward));
    wkv_forward_kernel<<<dim3(p.H, B, segments), WKV_THREADS, sizeof(WkvForward), stream>>>(y, p);
}

static void wkv_backward(const WkvGradients &g, const Wkv &p, int B) {
    TWIN(wkv_backward_in_loops(g, p, B));
    allow_smem(wkv_backward_kernel, sizeof(WkvBackward));
    wkv_backward_kernel<<<dim3(p.H, B), WKV_THREADS, sizeof(WkvBackward), stream>>>(g, p);
}

// ---- causal attention, without any T x T buffer ----
//
//     y_t       = sum_{s<=t} p_ts v_s
//     p_ts      = exp(q_t . k_s / sqrt(N) - log_sum_t)
//     log_sum_t = log sum_{s<=t} exp(q_t . k_s / sqrt(N))
//
// q, k, v, y are (B, T, A), head h at channels h N; log_sum (B, H, T) in units of log 2. A block takes 128 queries of a
// head, each of its four warps 32, and walks the keys with a running maximum and sum (FlashAttention-2, arXiv
// 2307.08691); the next 64 are copied while these are multiplied. Squares of 32 queries by 32 keys that lie above the
// diagonal are left out:
//
//                   keys  0   32   64   96  128
//     queries  0 warp 0   \    .    .    .
//             32 warp 1   #    \    .    .         # all 32 x 32 scores     \ those with s <= t     . none
//             64 warp 2   #    #    \    .
//             96 warp 3   #    #    #    \         (and the same shifted by 128, 256, .. for the next blocks)
//
// Floor: flops, 2 N for each product of each pair. Forward has 2 products, backward 5. We do 7, in two kernels, one for
// dk and dv, one for dq: scores and their gradients twice, so that every sum stays in one warp, without atomics. Beside
// a tile product (16 x 8 x 16), which costs an H100 1 clock by its data sheet and 1.6 by mma.sync, it must load 128
// bytes from shared memory, 1 clock, because a fragment (256 bytes) feeds two products and the left operands stay in
// registers; and make 16 exponentials forward, 1 clock.

static const int ATTENTION_THREADS = 128, ATTENTION_ROWS = 128; // of a block: threads; queries or keys
static const int ATTENTION_TILE = 64;                           // keys or queries that it walks at a time
static const float SCALE = 0.125f;                              // 1 / sqrt(N)
#define SCALE_LOG2 (0.125f * 1.4426950408889634f)               // SCALE log2(e): exp(x SCALE) = exp2(x SCALE_LOG2)

typedef floatX HeadRow[LD]; // a token's N channels of a head in shared memory
// 36 KB in bf16: blocks are limited by registers
static const size_t ATTENTION_SMEM = 4 * ATTENTION_TILE * sizeof(HeadRow);

// `count` tokens of a head, starting at t0, on their way to shared memory; zeros past the end
template <int count> __device__ inline void attention_load(HeadRow *to, const floatX *from, int t0, int T, int A) {
    async_tile<count, N, ATTENTION_THREADS>(&to[0][0], from, t0, T, A);
}

// 32 rows as left operands: two row tiles of four 16 x 16 pieces
struct Left {
    TileA x[2][4];
};
__device__ inline void attention_left(Left &a, const HeadRow *rows) {
#pragma unroll
    for (int i = 0; i < 8; i++) a.x[i / 4][i % 4] = load_a(&rows[i / 4 * 16][i % 4 * 16], LD);
}

// out (32 x 8 n) = a (32 x N) rows[0..8 n)^T
template <int n> __device__ inline void attention_scores(TileC (&out)[2][n], const Left &a, const HeadRow *rows) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        TileB b[n];
#pragma unroll
        for (int j = 0; j < n; j += 2) load_b_pair(&b[j], &rows[8 * j][16 * i], LD);
        mma(out[0], a.x[0][i], b);
        mma(out[1], a.x[1][i], b);
    }
}

// out (32 x N) += p (32 x 8 n) rows[0..8 n)
template <int n>
__device__ inline void attention_values(TileC (&out)[2][8], const TileC (&p)[2][n], const HeadRow *rows) {
#pragma unroll
    for (int i = 0; i < n / 2; i++) {
        TileB b[8];
#pragma unroll
        for (int j = 0; j < 8; j += 2) load_b_pair_t(&b[j], &rows[16 * i][8 * j], LD);
        mma(out[0], to_a(p[0][2 * i], p[0][2 * i + 1]), b);
        mma(out[1], to_a(p[1][2 * i], p[1][2 * i + 1]), b);
    }
}

// this warp's 32 rows, times a factor for each row of the lane, from its tiles to memory
__device__ inline void attention_store(floatX *to, const TileC (&x)[2][8], const float (&factor)[4], int t0, int T,
                                       int A) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int t = t0 + i / 4 * 16 + tile_row(i % 4);
#pragma unroll
        for (int n = 0; n < 8; n++)
            if (t < T) to[(int64_t)t * A + 8 * n + tile_col(i)] = (floatX)(x[i / 4][n].x[i % 4] * factor[i / 2]);
    }
}

// A square on the diagonal, `offset` columns in: scores of keys after their query become -infinity.
template <bool rows_are_keys, int n> __device__ inline void attention_mask(TileC (&p)[2][n], int offset) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int j = 0; j < n; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = 16 * m + tile_row(i), column = offset + 8 * j + tile_col(i);
                if (rows_are_keys ? row > column : column > row) p[m][j].x[i] = -INFINITY;
            }
}

// The running softmax of this lane's four rows. exp2(score - top) needs top near the maximum only to stay in range, and
// y is the same for any top. So top is moved, and out and sum are scaled anew, only when a score is more than 2^8 times
// too large: rarely.
struct Softmax {
    float top[4], sum[4];
};
static const float ATTENTION_MARGIN = 8;

template <int n> __device__ inline void attention_softmax(Softmax &s, TileC (&p)[2][n], TileC (&out)[2][8]) {
    float high[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    bool grows = false;
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
        for (int j = 0; j < n; j++)
            high[r] = fmaxf(high[r], fmaxf(p[r / 2][j].x[r % 2 * 2], p[r / 2][j].x[r % 2 * 2 + 1]));
        grows |= high[r] * SCALE_LOG2 > s.top[r] + ATTENTION_MARGIN;
    }
    if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float top = fmaxf(s.top[r], warp_max(high[r], 4) * SCALE_LOG2), shrink = exp2_fast(s.top[r] - top);
            s.top[r] = top;
            s.sum[r] *= shrink;
#pragma unroll
            for (int j = 0; j < 16; j++) out[r / 2][j / 2].x[r % 2 * 2 + j % 2] *= shrink;
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int j = 0; j < 2 * n; j++) {
            float &x = p[r / 2][j / 2].x[r % 2 * 2 + j % 2];
            x = exp2_fast(x * SCALE_LOG2 - s.top[r]);
            s.sum[r] += x;
        }
}

HAS_TWIN __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_forward_kernel(floatX *y, float *log_sum, const floatX *q, const floatX *k, const floatX *v, int T,
                             int H) {
    // 64 keys, 64 values; the next 64 of each, at first the queries
    HeadRow *smem = dynamic_smem<HeadRow>();
    const int warp = threadIdx.x / 32, h = blockIdx.y, b = blockIdx.z, A = H * N;
    // the longest rows first
    const int t0 = (gridDim.x - 1 - blockIdx.x) * ATTENTION_ROWS, mine = t0 + 32 * warp;
    const int end = min(T, t0 + ATTENTION_ROWS);
    const int64_t head = (int64_t)b * T * A + h * N;
    attention_load<ATTENTION_ROWS>(smem + 128, q + head, t0, T, A);
    attention_load<ATTENTION_TILE>(smem, k + head, 0, T, A);
    attention_load<ATTENTION_TILE>(smem + 64, v + head, 0, T, A);
    async_commit();
    async_wait<0>();
    __syncthreads();
    Left queries;
    attention_left(queries, smem + 128 + 32 * warp);
    TileC out[2][8] = {};
    Softmax s = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}, {0, 0, 0, 0}};
    for (int tile = 0; tile * ATTENTION_TILE < end; tile++) {
        const HeadRow *keys = smem + tile % 2 * 128, *values = keys + 64;
        HeadRow *next = smem + (tile + 1) % 2 * 128;
        async_wait<0>();
        __syncthreads(); // this tile is there for all, and nobody needs the last one
        if ((tile + 1) * ATTENTION_TILE < end) {
            attention_load<ATTENTION_TILE>(next, k + head, (tile + 1) * ATTENTION_TILE, T, A);
            attention_load<ATTENTION_TILE>(next + 64, v + head, (tile + 1) * ATTENTION_TILE, T, A);
            async_commit();
        }
        for (int part = 0; part < ATTENTION_TILE && tile * ATTENTION_TILE + part <= mine; part += 32) {
            TileC p[2][4] = {};
            attention_scores(p, queries, keys + part);
            if (tile * ATTENTION_TILE + part == mine) attention_mask<false>(p, 0);
            attention_softmax(s, p, out);
            attention_values(out, p, values + part);
        }
    }
    for (int r = 0; r < 4; r++) {
        const int t = mine + r / 2 * 16 + tile_row(r % 2 * 2);
        s.sum[r] = warp_sum(s.sum[r], 4);
        if (threadIdx.x % 4 == 0 && t < T) log_sum[((int64_t)b * H + h) * T + t] = s.top[r] + log2f(s.sum[r]);
        s.sum[r] = 1 / s.sum[r];
    }
    attention_store(y + head, out, s.sum, mine, T, A);
}

// delta (B, H, T): dy_t . y_t per head, what the softmax's gradient subtracts. Blocks of a row; 8 lanes hold a head.
__global__ void attention_delta_kernel(float *delta, const floatX *dy, const floatX *y, int rows, int T, int H) {
    const int c = threadIdx.x * 8;
    const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, at = row * H * N + c;
    const bool mine = c < H * N && row < rows;
    const Pack a = mine ? load(dy + at) : zero_pack(), b = mine ? load(y + at) : zero_pack();
    float sum = 0;
    for (int i = 0; i < 8; i++) sum += a.x[i] * b.x[i];
    sum = warp_sum(sum, 8);
    if (mine && threadIdx.x % 8 == 0) delta[(row / T * H + c / N) * T + row % T] = sum;
}

static void attention_delta(float *delta, const floatX *dy, const floatX *y, int B, int T, int H) {
    const dim3 block = row_block(H * N);
    attention_delta_kernel<<<(int)ceil_div(B * T, block.y), block, 0, stream>>>(delta, dy, y, B * T, T, H);
}

// With ds = p * (dy v^T - delta):   dv = p^T dy,  dk = ds^T q / sqrt(N)     (a block: 128 keys, walking the queries)
//                                   dq = ds k / sqrt(N)                     (a block: 128 queries, walking the keys)
struct AttentionGradients {
    floatX *dq, *dk, *dv;
    const floatX *dy;
    const float *log_sum, *delta;
};

// The block's own 128 rows of two arrays, of which each warp takes 32 into registers
__device__ inline void attention_own(Left &a, Left &b, HeadRow *smem, const floatX *pa, const floatX *pb, int t0, int T,
                                     int A) {
    attention_load<ATTENTION_ROWS>(smem, pa, t0, T, A);
    attention_load<ATTENTION_ROWS>(smem + 128, pb, t0, T, A);
    async_commit();
    async_wait<0>();
    __syncthreads();
    attention_left(a, smem + threadIdx.x / 32 * 32);
    attention_left(b, smem + 128 + threadIdx.x / 32 * 32);
    __syncthreads();
}

HAS_TWIN __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_backward_kv_kernel(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int T,
                                 int H) {
    HeadRow *smem = dynamic_smem<HeadRow>();    // 64 queries, 64 dy; the next 64 of each
    __shared__ float2 stats[2][ATTENTION_TILE]; // log_sum, delta of these queries
    const int warp = threadIdx.x / 32, h = blockIdx.y, b = blockIdx.z, A = H * N;
    const int t0 = blockIdx.x * ATTENTION_ROWS, mine = t0 + 32 * warp;
    const int64_t head = (int64_t)b * T * A + h * N, row = ((int64_t)b * H + h) * T;
    Left keys, values;
    attention_own(keys, values, smem, k + head, v + head, t0, T, A);
    auto fetch = [&](int t) {
        attention_load<ATTENTION_TILE>(smem + t % 128 * 2, q + head, t, T, A);
        attention_load<ATTENTION_TILE>(smem + (t % ATTENTION_ROWS * 2 + ATTENTION_TILE), g.dy + head, t, T, A);
        async_commit();
        const int mine = t + threadIdx.x % 64;
        // past the end: p = 0
        return mine < T ? make_float2(g.log_sum[row + mine], g.delta[row + mine]) : make_float2(INFINITY, 0);
    };
    float2 next = fetch(t0);
    TileC dk[2][8] = {}, dv[2][8] = {};
    for (int t = t0; t < T; t += ATTENTION_TILE) {
        if (threadIdx.x < 64) stats[t / ATTENTION_TILE % 2][threadIdx.x] = next;
        async_wait<0>();
        __syncthreads(); // this tile is there for all, and nobody needs the last one
        if (t + ATTENTION_TILE < T) next = fetch(t + ATTENTION_TILE);
#pragma unroll 1
        for (int part = max(0, mine - t); part < ATTENTION_TILE; part += 16) { // 16 queries at a time: registers
            const HeadRow *queries = smem + t % 128 * 2 + part, *dy = queries + 64;
            TileC p[2][2] = {}, ds[2][2] = {}; // transposed: rows are keys
            attention_scores(p, keys, queries);
            attention_scores(ds, values, dy);
            if (t + part < mine + 32) attention_mask<true>(p, t + part - mine);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 s = stats[t / ATTENTION_TILE % 2][part + j / 2 * 8 + tile_col(j % 2)];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float &weight = p[i / 2][j / 2].x[i % 2 * 2 + j % 2],
                          &gradient = ds[i / 2][j / 2].x[i % 2 * 2 + j % 2];
                    weight = exp2_fast(weight * SCALE_LOG2 - s.x);
                    gradient = weight * (gradient - s.y);
                }
            }
            attention_values(dv, p, dy);
            attention_values(dk, ds, queries);
        }
    }
    const float one[4] = {1, 1, 1, 1}, scale[4] = {SCALE, SCALE, SCALE, SCALE};
    attention_store(g.dv + head, dv, one, mine, T, A);
    attention_store(g.dk + head, dk, scale, mine, T, A);
}

HAS_TWIN __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_backward_q_kernel(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int T, int H) {
    HeadRow *smem = dynamic_smem<HeadRow>(); // 64 keys, 64 values; the next 64 of each
    const int warp = threadIdx.x / 32, h = blockIdx.y, b = blockIdx.z, A = H * N;
    // the longest rows first
    const int t0 = (gridDim.x - 1 - blockIdx.x) * ATTENTION_ROWS, mine = t0 + 32 * warp;
    const int end = min(T, t0 + ATTENTION_ROWS);
    const int64_t head = (int64_t)b * T * A + h * N, row = ((int64_t)b * H + h) * T;
    Left queries, dy;
    attention_own(queries, dy, smem, q + head, g.dy + head, t0, T, A);
    auto fetch = [&](int t) {
        attention_load<ATTENTION_TILE>(smem + t % 128 * 2, k + head, t, T, A);
        attention_load<ATTENTION_TILE>(smem + (t % ATTENTION_ROWS * 2 + ATTENTION_TILE), v + head, t, T, A);
        async_commit();
    };
    fetch(0);
    float log_sum[4], delta[4]; // of this lane's rows
    for (int r = 0; r < 4; r++) {
        const int t = mine + r / 2 * 16 + tile_row(r % 2 * 2);
        log_sum[r] = t < T ? g.log_sum[row + t] : INFINITY;
        delta[r] = t < T ? g.delta[row + t] : 0;
    }
    TileC dq[2][8] = {};
    for (int t = 0; t < end; t += ATTENTION_TILE) {
        async_wait<0>();
        __syncthreads();
        if (t + ATTENTION_TILE < end) fetch(t + ATTENTION_TILE);
#pragma unroll 1
        for (int part = 0; part < min(ATTENTION_TILE, mine + 32 - t); part += 32) {
            const HeadRow *keys = smem + t % 128 * 2 + part, *values = keys + 64;
            TileC p[2][4] = {}, ds[2][4] = {};
            attention_scores(p, queries, keys);
            attention_scores(ds, dy, values);
            if (t + part == mine) attention_mask<false>(p, 0);
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float &gradient = ds[r / 2][j / 2].x[r % 2 * 2 + j % 2];
                    const float weight = exp2_fast(p[r / 2][j / 2].x[r % 2 * 2 + j % 2] * SCALE_LOG2 - log_sum[r]);
                    gradient = weight * (gradient - delta[r]);
                }
            attention_values(dq, ds, keys);
        }
    }
    const float scale[4] = {SCALE, SCALE, SCALE, SCALE};
    attention_store(g.dq + head, dq, scale, mine, T, A);
}

#ifdef CUDA_ON_CPU // in dev/cpu/twins.h
static void attention_forward_in_loops(floatX *y, float *log_sum, const floatX *q, const floatX *k, const floatX *v,
                                       int B, int T, int H);
static void attention_backward_in_loops(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int B,
                                        int T, int H);
#endif

static void attention_forward_by_warps(floatX *y, float *log_sum, const floatX *q, const floatX *k, const floatX *v,
                                       int B, int T, int H) {
    TWIN(attention_forward_in_loops(y, log_sum, q, k, v, B, T, H));
    allow_smem(attention_forward_kernel, ATTENTION_SMEM);
    const dim3 grid((int)ceil_div(T, ATTENTION_ROWS), H, B);
    attention_forward_kernel<<<grid, ATTENTION_THREADS, ATTENTION_SMEM, stream>>>(y, log_sum, q, k, v, T, H);
}

static void attention_backward_by_warps(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v, int B,
                                        int T, int H) {
    TWIN(attention_backward_in_loops(g, q, k, v, B, T, H));
    const dim3 grid((int)ceil_div(T, ATTENTION_ROWS), H, B);
    allow_smem(attention_backward_kv_kernel, ATTENTION_SMEM);
    attention_backward_kv_kernel<<<grid, ATTENTION_THREADS, ATTENTION_SMEM, stream>>>(g, q, k, v, T, H);
    allow_smem(attention_backward_q_kernel, ATTENTION_SMEM);
    attention_backward_q_kernel<<<grid, ATTENTION_THREADS, ATTENTION_SMEM, stream>>>(g, q, k, v, T, H);
}

// ---- the same attention by warpgroups (sm_90a) ----
//
// One warpgroup of the block copies, the others own 64 rows each and multiply. Copies run several tiles ahead through a
// ring of stages: `there` tells that a stage is full, `free` that all warpgroups are done with it. A warpgroup works
// while its products run: it takes exponentials of one tile while the tensor cores multiply the tile before, and while
// it waits others multiply. Backward adds in the same order as the kernels above and gives the same bits.
//
// Forward walks the keys from the diagonal down, 128 at a time; S (64 x 128) of the next tile is being multiplied
// together with p v of this one:
//
//     tensor cores     S_1 |     S_2, p_1 v_1     |     S_3, p_2 v_2     | ..
//     the warpgroup        | exponentials of S_1  | exponentials of S_2  | ..
//
// Floor: as above; an exponential takes as long as its pair's products, so at best half of it if nothing overlaps.

#if WARPGROUP_KERNELS
static const int STAGES = PRECISION_BF16 ? 3 : 2; // that fit a block's shared memory
struct AttentionMaps {
    HeadMap q, k, v, dy;
};
struct ForwardTiles { // in shared memory
    SharedTile q[3], k[STAGES][2], v[STAGES][2];
    Signal q_there, k_there[STAGES], v_there[STAGES], k_free[STAGES], v_free[STAGES];
};
struct KeyValueTiles {
    SharedTile k[2], v[2], q[STAGES], dy[STAGES];
    float log_sum[STAGES][64], delta[STAGES][64];
    Signal own_there, there[STAGES], free[STAGES];
};
struct QueryTiles {
    SharedTile q[3], dy[3], k[STAGES], v[STAGES];
    Signal own_there, there[STAGES], free[STAGES];
};
#ifdef WARPGROUPS
__device__ inline bool leads_warpgroup(void) { return threadIdx.x % 128 == 0; }

// Which of the warpgroup's 64 rows this lane's x[0] and x[1] are of; x[2] and x[3] are 8 rows on
__device__ inline int warpgroup_row(void) { return threadIdx.x % 128 / 32 * 16 + tile_row(0); }

// x (64 x N), times a factor for each of the lane's two rows, to memory; t: of the lane's first row
__device__ inline void warpgroup_store(floatX *to, const TileC (&x)[8], float upper, float lower, int t, int T, int A) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < 8; n++)
            if (t + 8 * i < T)
                store_pair(to + (int64_t)(t + 8 * i) * A + 8 * n + tile_col(0), x[n].x[2 * i] * (i ? lower : upper),
                           x[n].x[2 * i + 1] * (i ? lower : upper));
}

// One thread: the queries, then tiles of 128 keys and values, the last ones first.
__device__ inline void attention_forward_copy(ForwardTiles &s, const AttentionMaps &maps, int h, int b, int t0,
                                              int tiles) {
    signal_expect(&s.q_there, sizeof(s.q));
    for (int i = 0; i < 3; i++) copy_tile(&s.q[i], maps.q, &s.q_there, h, t0 + 64 * i, b);
    for (int i = 0; i < tiles; i++) {
        const int stage = i % STAGES, t = (tiles - 1 - i) * 128, phase = (i / STAGES - 1) & 1;
        if (i >= STAGES) signal_wait(&s.k_free[stage], phase);
        signal_expect(&s.k_there[stage], sizeof(s.k[0]));
        for (int j = 0; j < 2; j++) copy_tile(&s.k[stage][j], maps.k, &s.k_there[stage], h, t + 64 * j, b);
        if (i >= STAGES) signal_wait(&s.v_free[stage], phase);
        signal_expect(&s.v_there[stage], sizeof(s.v[0]));
        for (int j = 0; j < 2; j++) copy_tile(&s.v[stage][j], maps.v, &s.v_there[stage], h, t + 64 * j, b);
    }
}

// The running softmax of the lane's two rows, as in attention_softmax. `moved`: what was summed so far is still to be
// multiplied by shrink, when it is not being added to.
struct SoftmaxRows {
    float top[2], sum[2], shrink[2];
    bool moved;
};

// p (64 x 128): scores, of keys that come after their query, too; `ahead`: by how much the lane's first query is ahead
// of the first key
__device__ inline void softmax_rows(SoftmaxRows &s, TileC (&p)[16], int ahead, bool on_diagonal) {
    if (on_diagonal)
#pragma unroll
        for (int i = 0; i < 64; i++)
            if (8 * (i / 4) + tile_col(i % 4) > ahead + i % 4 / 2 * 8) p[i / 4].x[i % 4] = -INFINITY;
    float high[2] = {-INFINITY, -INFINITY};
    bool grows = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int j = 0; j < 16; j++) high[r] = fmaxf(high[r], fmaxf(p[j].x[2 * r], p[j].x[2 * r + 1]));
        grows |= high[r] * SCALE_LOG2 > s.top[r] + ATTENTION_MARGIN;
    }
    s.moved = __any_sync(0xffffffffu, grows);
    if (s.moved)
        for (int r = 0; r < 2; r++) {
            const float top = fmaxf(s.top[r], warp_max(high[r], 4) * SCALE_LOG2);
            s.shrink[r] = exp2_fast(s.top[r] - top);
            s.top[r] = top;
            s.sum[r] *= s.shrink[r];
        }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float top = s.top[r] == -INFINITY ? 0 : s.top[r]; // no key of this tile is before these queries
        float sums[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < 32; j++) {
            float &x = p[j / 2].x[2 * r + j % 2];
            x = exp2_fast(x * SCALE_LOG2 - top);
            sums[j % 2] += x;
        }
        s.sum[r] += sums[0] + sums[1];
    }
}

// A warpgroup's 64 queries
__device__ inline void attention_forward_group(ForwardTiles &s, floatX *y, float *log_sum, int group, int first_row,
                                               int tiles, int T, int A) {
    const int row = first_row + warpgroup_row();
    TileC p[16], out[8] = {};
    TileA rounded[8];
    SoftmaxRows softmax = {{-INFINITY, -INFINITY}, {0, 0}, {0, 0}, false};
    auto take_exponentials = [&](int tile) {
        softmax_rows(softmax, p, row - tile * 128, tile * 128 + 127 > first_row);
    };
    auto round = [&] {
#pragma unroll
        for (int i = 0; i < 8; i++) rounded[i] = to_a(p[2 * i], p[2 * i + 1]);
    };
    signal_wait(&s.q_there, 0);
    signal_wait(&s.k_there[0], 0);
    warpgroup_begin();
    warpgroup_rows(p, s.q[group], s.k[0]);
    warpgroup_commit();
    warpgroup_wait<0>();
    hold(p);
    if (leads_warpgroup()) signal_arrive(&s.k_free[0]);
    take_exponentials(tiles - 1);
    round();
    for (int i = 1; i < tiles; i++) {
        const int stage = i % STAGES, before = (i - 1) % STAGES;
        signal_wait(&s.k_there[stage], i / STAGES & 1);
        warpgroup_begin();
        warpgroup_rows(p, s.q[group], s.k[stage]);
        warpgroup_commit();
        signal_wait(&s.v_there[before], (i - 1) / STAGES & 1);
        warpgroup_begin();
        warpgroup_columns(out, rounded, s.v[before]);
        warpgroup_commit();
        warpgroup_wait<1>();
        hold(p);
        if (leads_warpgroup()) signal_arrive(&s.k_free[stage]);
        take_exponentials(tiles - 1 - i);
        warpgroup_wait<0>();
        hold(out);
        if (leads_warpgroup()) signal_arrive(&s.v_free[before]);
        round();
        if (softmax.moved)
#pragma unroll
            for (int j = 0; j < 32; j++) out[j / 4].x[j % 4] *= softmax.shrink[j % 4 / 2];
    }
    signal_wait(&s.v_there[(tiles - 1) % STAGES], (tiles - 1) / STAGES & 1);
    warpgroup_begin();
    warpgroup_columns(out, rounded, s.v[(tiles - 1) % STAGES]);
    warpgroup_commit();
    warp_sum(softmax.sum, 4);
    warpgroup_wait<0>();
    hold(out);
    for (int r = 0; r < 2; r++)
        if (threadIdx.x % 4 == 0 && row + 8 * r < T) log_sum[row + 8 * r] = softmax.top[r] + log2f(softmax.sum[r]);
    warpgroup_store(y, out, 1 / softmax.sum[0], 1 / softmax.sum[1], row, T, A);
}

// A warp: the block's keys and values, then tiles of 64 queries with their dy, log_sum and delta
__device__ inline void attention_backward_kv_copy(KeyValueTiles &s, const AttentionMaps &maps, const float *log_sum,
                                                  const float *delta, int h, int b, int k0, int T) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) {
        signal_expect(&s.own_there, sizeof(s.k) + sizeof(s.v));
        for (int i = 0; i < 2; i++) copy_tile(&s.k[i], maps.k, &s.own_there, h, k0 + 64 * i, b);
        for (int i = 0; i < 2; i++) copy_tile(&s.v[i], maps.v, &s.own_there, h, k0 + 64 * i, b);
    }
    for (int i = 0; k0 + 64 * i < T; i++) {
        const int stage = i % STAGES, t = k0 + 64 * i;
        if (i >= STAGES) signal_wait(&s.free[stage], (i / STAGES - 1) & 1);
        if (lane == 0) {
            signal_expect(&s.there[stage], 2 * sizeof(SharedTile));
            copy_tile(&s.q[stage], maps.q, &s.there[stage], h, t, b);
            copy_tile(&s.dy[stage], maps.dy, &s.there[stage], h, t, b);
        }
        for (int j = lane; j < 64; j += 32) { // past the end: p = 0
            s.log_sum[stage][j] = t + j < T ? log_sum[t + j] : INFINITY;
            s.delta[stage][j] = t + j < T ? delta[t + j] : 0;
        }
        signal_arrive(&s.there[stage]);
    }
}

// A warpgroup's 64 keys, from k0 on, against all queries from q0 on: p and ds are transposed, a row a key.
__device__ inline void attention_backward_kv_group(KeyValueTiles &s, floatX *dk_out, floatX *dv_out, int group, int k0,
                                                   int q0, int T, int A) {
    const int row = warpgroup_row();
    TileC p[8], dp[8], dk[8] = {}, dv[8] = {};
    TileA left[4];
    signal_wait(&s.own_there, 0);
    hold(dk), hold(dv);
    for (int i = 0; q0 + 64 * i < T; i++) {
        const int stage = i % STAGES, ahead = q0 + 64 * i - k0; // of the first query to the first key
        signal_wait(&s.there[stage], i / STAGES & 1);
        warpgroup_begin();
        warpgroup_rows(p, s.k[group], &s.q[stage]);
        warpgroup_commit();
        warpgroup_rows(dp, s.v[group], &s.dy[stage]);
        warpgroup_commit();
        warpgroup_wait<1>(); // p is there, and the tile before is done with
        hold(p), hold(dk), hold(dv);
        if (i > 0 && leads_warpgroup()) signal_arrive(&s.free[(i - 1) % STAGES]);
#pragma unroll
        for (int j = 0; j < 32; j++) {
            float &x = p[j / 4].x[j % 4];
            x = exp2_fast(x * SCALE_LOG2 - s.log_sum[stage][j / 4 * 8 + tile_col(j % 4)]);
        }
        if (ahead < 63)
#pragma unroll
            for (int j = 0; j < 32; j++)
                if (ahead + j / 4 * 8 + tile_col(j % 4) < row + j % 4 / 2 * 8) p[j / 4].x[j % 4] = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) left[j] = to_a(p[2 * j], p[2 * j + 1]);
        warpgroup_begin();
        warpgroup_columns(dv, left, &s.dy[stage]);
        warpgroup_commit();
        warpgroup_wait<1>();
        hold(dp);
        TileA ds[4];
#pragma unroll
        for (int j = 0; j < 32; j++)
            p[j / 4].x[j % 4] *= dp[j / 4].x[j % 4] - s.delta[stage][j / 4 * 8 + tile_col(j % 4)];
#pragma unroll
        for (int j = 0; j < 4; j++) ds[j] = to_a(p[2 * j], p[2 * j + 1]);
        warpgroup_begin();
        warpgroup_columns(dk, ds, &s.q[stage]);
        warpgroup_commit();
    }
    warpgroup_wait<0>();
    hold(dk), hold(dv);
    warpgroup_store(dv_out, dv, 1, 1, k0 + row, T, A);
    warpgroup_store(dk_out, dk, SCALE, SCALE, k0 + row, T, A);
}

// One thread: the block's queries and dy, then tiles of 64 keys and values
__device__ inline void attention_backward_q_copy(QueryTiles &s, const AttentionMaps &maps, int h, int b, int t0,
                                                 int tiles) {
    signal_expect(&s.own_there, sizeof(s.q) + sizeof(s.dy));
    for (int i = 0; i < 3; i++) copy_tile(&s.q[i], maps.q, &s.own_there, h, t0 + 64 * i, b);
    for (int i = 0; i < 3; i++) copy_tile(&s.dy[i], maps.dy, &s.own_there, h, t0 + 64 * i, b);
    for (int i = 0; i < tiles; i++) {
        const int stage = i % STAGES;
        if (i >= STAGES) signal_wait(&s.free[stage], (i / STAGES - 1) & 1);
        signal_expect(&s.there[stage], 2 * sizeof(SharedTile));
        copy_tile(&s.k[stage], maps.k, &s.there[stage], h, 64 * i, b);
        copy_tile(&s.v[stage], maps.v, &s.there[stage], h, 64 * i, b);
    }
}

// A warpgroup's 64 queries, from first_row on, against all keys before them
__device__ inline void attention_backward_q_group(QueryTiles &s, floatX *dq_out, const float *log_sum,
                                                  const float *delta, int group, int first_row, int tiles, int T,
                                                  int A) {
    const int row = first_row + warpgroup_row();
    TileC p[8], dp[8], dq[8] = {};
    TileA ds[4];
    float row_log_sum[2], row_delta[2];
    for (int r = 0; r < 2; r++) {
        const int t = row + 8 * r;
        row_log_sum[r] = t < T ? log_sum[t] : INFINITY, row_delta[r] = t < T ? delta[t] : 0;
    }
    signal_wait(&s.own_there, 0);
    hold(dq);
    for (int i = 0; i < tiles; i++) {
        const int stage = i % STAGES, ahead = row - 64 * i;
        signal_wait(&s.there[stage], i / STAGES & 1);
        warpgroup_begin();
        warpgroup_rows(p, s.q[group], &s.k[stage]);
        warpgroup_commit();
        warpgroup_rows(dp, s.dy[group], &s.v[stage]);
        warpgroup_commit();
        warpgroup_wait<1>();
        hold(p), hold(dq);
        if (i > 0 && leads_warpgroup()) signal_arrive(&s.free[(i - 1) % STAGES]);
#pragma unroll
        for (int j = 0; j < 32; j++) {
            float &x = p[j / 4].x[j % 4];
            x = exp2_fast(x * SCALE_LOG2 - row_log_sum[j % 4 / 2]);
        }
        if (64 * i + 63 > first_row)
#pragma unroll
            for (int j = 0; j < 32; j++)
                if (j / 4 * 8 + tile_col(j % 4) > ahead + j % 4 / 2 * 8) p[j / 4].x[j % 4] = 0;
        warpgroup_wait<0>();
        hold(dp);
#pragma unroll
        for (int j = 0; j < 32; j++) p[j / 4].x[j % 4] *= dp[j / 4].x[j % 4] - row_delta[j % 4 / 2];
#pragma unroll
        for (int j = 0; j < 4; j++) ds[j] = to_a(p[2 * j], p[2 * j + 1]);
        warpgroup_begin();
        warpgroup_columns(dq, ds, &s.k[stage]);
        warpgroup_commit();
    }
    warpgroup_wait<0>();
    hold(dq);
    warpgroup_store(dq_out, dq, SCALE, SCALE, row, T, A);
}
#endif

// Blocks: (heads of all sequences, rows); the first warpgroup copies. The longest rows come first.
HAS_TWIN __global__ void __launch_bounds__(512, 1)
    attention_forward_warpgroups_kernel(floatX *y, float *log_sum, const __grid_constant__ AttentionMaps maps, int T,
                                        int H) {
#ifdef WARPGROUPS
    ForwardTiles &s = *dynamic_smem<ForwardTiles>();
    const int b = blockIdx.x / H, h = blockIdx.x % H, group = threadIdx.x / 128 - 1;
    const int t0 = (gridDim.y - 1 - blockIdx.y) * 192, tiles = (min(T, t0 + 192) + 127) / 128;
    if (threadIdx.x == 0) {
        signal_init(&s.q_there, 1);
        for (int i = 0; i < STAGES; i++) {
            signal_init(&s.k_there[i], 1), signal_init(&s.v_there[i], 1);
            signal_init(&s.k_free[i], 3), signal_init(&s.v_free[i], 3);
        }
    }
    __syncthreads();
    if (group < 0) {
        registers_fewer<32>();
        if (threadIdx.x == 0) attention_forward_copy(s, maps, h, b, t0, tiles);
    } else {
        registers_more<160>();
        attention_forward_group(s, y + (int64_t)b * T * H * N + h * N, log_sum + (int64_t)blockIdx.x * T, group,
                                t0 + 64 * group, tiles, T, H * N);
    }
#endif
}

HAS_TWIN __global__ void __launch_bounds__(384, 1)
    attention_backward_kv_warpgroups_kernel(AttentionGradients g, const __grid_constant__ AttentionMaps maps, int T,
                                            int H) {
#ifdef WARPGROUPS
    KeyValueTiles &s = *dynamic_smem<KeyValueTiles>();
    const int b = blockIdx.x / H, h = blockIdx.x % H, group = threadIdx.x / 128 - 1, k0 = blockIdx.y * 128;
    const int64_t head = (int64_t)b * T * H * N + h * N, row = (int64_t)blockIdx.x * T;
    if (threadIdx.x == 0) {
        signal_init(&s.own_there, 1);
        // a warp's 32 arrivals and one that announces bytes; two warpgroups
        for (int i = 0; i < STAGES; i++) signal_init(&s.there[i], 33), signal_init(&s.free[i], 2);
    }
    __syncthreads();
    if (group < 0) {
        registers_fewer<24>();
        if (threadIdx.x < 32) attention_backward_kv_copy(s, maps, g.log_sum + row, g.delta + row, h, b, k0, T);
    } else {
        registers_more<240>();
        attention_backward_kv_group(s, g.dk + head, g.dv + head, group, k0 + 64 * group, k0, T, H * N);
    }
#endif
}

HAS_TWIN __global__ void __launch_bounds__(512, 1)
    attention_backward_q_warpgroups_kernel(AttentionGradients g, const __grid_constant__ AttentionMaps maps, int T,
                                           int H) {
#ifdef WARPGROUPS
    QueryTiles &s = *dynamic_smem<QueryTiles>();
    const int b = blockIdx.x / H, h = blockIdx.x % H, group = threadIdx.x / 128 - 1;
    const int t0 = (gridDim.y - 1 - blockIdx.y) * 192, tiles = (min(T, t0 + 192) + 63) / 64;
    const int64_t row = (int64_t)blockIdx.x * T;
    if (threadIdx.x == 0) {
        signal_init(&s.own_there, 1);
        for (int i = 0; i < STAGES; i++) signal_init(&s.there[i], 1), signal_init(&s.free[i], 3);
    }
    __syncthreads();
    if (group < 0) {
        registers_fewer<32>();
        if (threadIdx.x == 0) attention_backward_q_copy(s, maps, h, b, t0, tiles);
    } else {
        registers_more<160>();
        attention_backward_q_group(s, g.dq + (int64_t)b * T * H * N + h * N, g.log_sum + row, g.delta + row, group,
                                   t0 + 64 * group, tiles, T, H * N);
    }
#endif
}

static void attention_forward_by_warpgroups(floatX *y, float *log_sum, const floatX *q, const floatX *k,
                                            const floatX *v, int B, int T, int H) {
    const int A = H * N;
    const size_t smem = sizeof(ForwardTiles);
    const AttentionMaps maps = {head_map(q, B, T, A), head_map(k, B, T, A), head_map(v, B, T, A), {}};
    allow_smem(attention_forward_warpgroups_kernel, smem);
    attention_forward_warpgroups_kernel<<<dim3(B * H, (int)ceil_div(T, 192)), 512, smem, stream>>>(y, log_sum, maps, T,
                                                                                                   H);
}

static void attention_backward_by_warpgroups(AttentionGradients g, const floatX *q, const floatX *k, const floatX *v,
                                             int B, int T, int H) {
    const int A = H * N;
    const AttentionMaps maps = {head_map(q, B, T, A), head_map(k, B, T, A), head_map(v, B, T, A),
                                head_map(g.dy, B, T, A)};
    allow_smem(attention_backward_kv_warpgroups_kernel, sizeof(KeyValueTiles));
    attention_backward_kv_warpgroups_kernel<<<dim3(B * H, (int)ceil_div(T, 128)), 384, sizeof(KeyValueTiles), stream>>>(
        g, maps, T, H);
    allow_smem(attention_backward_q_warpgroups_kernel, sizeof(QueryTiles));
    attention_backward_q_warpgroups_kernel<<<dim3(B * H, (int)ceil_div(T, 192)), 512, sizeof(QueryTiles), stream>>>(
        g, maps, T, H);
}
#endif

// Whether this GPU and this build have warpgroups: compute capability 9.0, and code that was made for it.
[[maybe_unused]] static bool has_warpgroups(void) {
#if defined(CUDA_ON_CPU) || !WARPGROUP_KERNELS
    return false; // the CPU: lab and tests check them there; the model takes what is quicker to emulate
#else
    static int known = -1;
    if (known < 0) {
        cudaFuncAttributes code;
        CUDA_CHECK(cudaFuncGetAttributes(&code, attention_forward_warpgroups_kernel));
        known = compute_capability == 90 && code.ptxVersion >= 90;
    }
    return known;
#endif
}

static void attention_forward(floatX *y, float *log_sum, const floatX *q, const floatX *k, const floatX *v, int B,
                              int T, int H) {
#if WARPGROUP_KERNELS
    if (has_warpgroups()) return attention_forward_by_warpgroups(y, log_sum, q, k, v, B, T, H);
#endif
    attention_forward_by_warps(y, log_sum, q, k, v, B, T, H);
}

static void attention_backward(floatX *dq, floatX *dk, floatX *dv, float *delta, const floatX *dy, const floatX *y,
                               const float *log_sum, const floatX *q, const floatX *k, const floatX *v, int B, int T,
                               int H) {
    const AttentionGradients g = {dq, dk, dv, dy, log_sum, delta};
    attention_delta(delta, dy, y, B, T, H);
#if WARPGROUP_KERNELS
    if (has_warpgroups()) return attention_backward_by_warpgroups(g, q, k, v, B, T, H);
#endif
    attention_backward_by_warps(g, q, k, v, B, T, H);
}

// ---- channel mix (spec section 4) ----
//
//     k = relu(key x_k)^2        out = sigmoid(receptance x_r) * (value k)

__global__ void relu_squared_forward_kernel(floatX *k, int64_t n) {
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    Pack v = load(k + at);
    for (int i = 0; i < 8; i++) v.x[i] = v.x[i] > 0 ? v.x[i] * v.x[i] : 0;
    store(k + at, v);
}

__global__ void relu_squared_backward_kernel(floatX *dk, const floatX *k,
                                             int64_t n) { // dk *= 2 relu, and relu = sqrt(k)
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    Pack out = load(dk + at);
    const Pack v = load(k + at);
    for (int i = 0; i < 8; i++) out.x[i] *= 2 * sqrtf(v.x[i]);
    store(dk + at, out);
}

__global__ void gate_forward_kernel(floatX *out, const floatX *r, const floatX *v, int64_t n) { // out = sigmoid(r) v
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    Pack gate = load(r + at);
    const Pack value = load(v + at);
    for (int i = 0; i < 8; i++) gate.x[i] = value.x[i] / (1 + expf(-gate.x[i]));
    store(out + at, gate);
}

__global__ void gate_backward_kernel(floatX *dr, floatX *dv, const floatX *dout, const floatX *r, const floatX *v,
                                     int64_t n) {
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    Pack gate = load(r + at), value = load(v + at);
    const Pack dy = load(dout + at);
    for (int i = 0; i < 8; i++) {
        const float sigmoid = 1 / (1 + expf(-gate.x[i]));
        gate.x[i] = dy.x[i] * value.x[i] * sigmoid * (1 - sigmoid);
        value.x[i] = dy.x[i] * sigmoid;
    }
    store(dr + at, gate);
    store(dv + at, value);
}

// ---- rope: positions as rotations (spec section 3) ----
//
//     (a, b) = channels (2i, 2i + 1) of each head  ->  (a cos z - b sin z, a sin z + b cos z)
//     z      = position * velocity_i
//     rope:    velocity_i = base^(-2i/N) / rescale
//     brope:   velocity_i = pi 2^-i / rescale,  0 for i >= int(log2(ctx_len))
//
// An fp32 z would be off by 1e-2 at position 262,144: whole turns are taken away in fp64 first. The gradient is
// rotated back.
struct Rope {
    bool used;
    double turns[N / 2]; // of each pair, per token: velocity / 2 pi
};

static Rope make_rope(const Settings *s) {
    const bool rope = s->rope.base > 0, brope = s->brope.rescale > 0;
    Rope r = {rope || brope, {}};
    for (int i = 0; i < N / 2; i++) {
        if (rope) r.turns[i] = pow(s->rope.base * s->rope.rebase, -2.0 * i / N) / s->rope.rescale / (2 * M_PI);
        if (brope) r.turns[i] = i < (int)log2((double)s->ctx_len) ? 0.5 * pow(2, -i) / s->brope.rescale : 0;
    }
    return r;
}

// Channels c.. of a row at this position. direction: 1, or -1 to rotate back.
__device__ inline Pack rope_pack(Pack v, const Rope &rope, int64_t position, int c, float direction) {
    for (int i = 0; i < 8; i += 2) {
        const double turns = (double)position * rope.turns[c % N / 2 + i / 2];
        float sine, cosine;
        sincospif(2 * (float)(turns - rint(turns)), &sine, &cosine);
        sine *= direction;
        const float a = v.x[i], b = v.x[i + 1];
        v.x[i] = a * cosine - b * sine;
        v.x[i + 1] = a * sine + b * cosine;
    }
    return v;
}

// x (rows, A) in place; row 0 has position `first`, every T rows it begins again.
__global__ void rope_rotate_kernel(floatX *x, Rope rope, int64_t first, int T, int A, float direction) {
    const int c = threadIdx.x * 8;
    if (c >= A) return;
    floatX *at = x + (int64_t)blockIdx.x * A + c;
    store(at, rope_pack(load(at), rope, first + blockIdx.x % T, c, direction));
}

// ---- group norm and gate of Finch and Eagle (spec section 3) ----
//
//     out = GroupNorm(y) * silu(g):  every head normed by itself, eps 1e-5 divisor^2;  silu(g) = g sigmoid(g)
//
// Eagle's GroupNorm(y / divisor) with eps 1e-5 is the same function. Eight lanes hold a head. Bytes a row: 3 A floatX.
__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }
__device__ inline float silu_gradient(float x) { return sigmoid(x) * (1 + x * (1 - sigmoid(x))); }

__device__ inline Pack head_norm(Pack y, float eps, float *rstd) { // (y - mean) / sqrt(var + eps)
    float total = 0, squares = 0;
    for (int i = 0; i < 8; i++) total += y.x[i];
    const float mean = warp_sum(total, 8) / N;
    for (int i = 0; i < 8; i++) squares += (y.x[i] - mean) * (y.x[i] - mean);
    *rstd = rsqrtf(warp_sum(squares, 8) / N + eps);
    for (int i = 0; i < 8; i++) y.x[i] = (y.x[i] - mean) * *rstd;
    return y;
}

__global__ void gated_group_norm_forward_kernel(floatX *out, const floatX *y, const floatX *g, const floatX *gain,
                                                const floatX *bias, float eps, int A) {
    const int c = threadIdx.x * 8;
    const bool mine = c < A;
    const int64_t at = (int64_t)blockIdx.x * A + c;
    float rstd;
    Pack n = head_norm(mine ? load(y + at) : zero_pack(), eps, &rstd);
    if (!mine) return;
    const Pack gate = load(g + at), a = load(gain + c), b = load(bias + c);
    for (int i = 0; i < 8; i++) n.x[i] = (n.x[i] * a.x[i] + b.x[i]) * gate.x[i] * sigmoid(gate.x[i]);
    store(out + at, n);
}

static void gated_group_norm_forward(floatX *out, const floatX *y, const floatX *g, const LayerNorm &ln, float eps,
                                     int rows) {
    const int A = ln.gain.columns;
    gated_group_norm_forward_kernel<<<rows, row_threads(A), 0, stream>>>(out, y, g, ln.gain.w, ln.bias.w, eps, A);
}

// With z = n gain + bias, n = the head's norm, dz = dout silu(g), dn = dz gain:
// dy = (dn - mean(dn) - n mean(dn n)) rstd,
// dg = dout z silu'(g);   partial (blocks, 2, A): sums of dz n and of dz.
__global__ void gated_group_norm_backward_kernel(floatX *dy, floatX *dg, float *partial, const floatX *dout,
                                                 const floatX *y, const floatX *g, const floatX *gain,
                                                 const floatX *bias, float eps, int rows, int rows_per_block, int A) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * 8; // blocks share a row: heads do not meet
    const bool mine = c < A;
    const Pack a = mine ? load(gain + c) : zero_pack(), b = mine ? load(bias + c) : zero_pack();
    Pack dgain = zero_pack(), dbias = zero_pack();
    const int64_t end = min((int64_t)rows, (int64_t)(blockIdx.x + 1) * rows_per_block);
    for (int64_t row = (int64_t)blockIdx.x * rows_per_block; row < end; row++) {
        const int64_t at = row * A + c;
        float rstd, sum = 0, sum_n = 0;
        const Pack n = head_norm(mine ? load(y + at) : zero_pack(), eps, &rstd);
        Pack dz = mine ? load(dout + at) : zero_pack(), gate = mine ? load(g + at) : zero_pack();
        for (int i = 0; i < 8; i++) {
            const float all = dz.x[i], x = gate.x[i];
            gate.x[i] = all * (n.x[i] * a.x[i] + b.x[i]) * silu_gradient(x);
            dz.x[i] = all * x * sigmoid(x);
            dgain.x[i] += dz.x[i] * n.x[i];
            dbias.x[i] += dz.x[i];
            dz.x[i] *= a.x[i];
            sum += dz.x[i];
            sum_n += dz.x[i] * n.x[i];
        }
        const float mean = warp_sum(sum, 8) / N, mean_n = warp_sum(sum_n, 8) / N;
        for (int i = 0; i < 8; i++) dz.x[i] = (dz.x[i] - mean - n.x[i] * mean_n) * rstd;
        if (!mine) continue;
        store(dg + at, gate);
        store(dy + at, dz);
    }
    if (!mine) return;
    store(partial + (int64_t)blockIdx.x * 2 * A + c, dgain);
    store(partial + (int64_t)blockIdx.x * 2 * A + A + c, dbias);
}

static void gated_group_norm_backward(floatX *dy, floatX *dg, const floatX *dout, const floatX *y, const floatX *g,
                                      const LayerNorm &ln, float eps, float *partial, int rows) {
    const int A = ln.gain.columns, blocks = row_blocks(rows, A), per = rows_per_block(rows, A);
    const dim3 grid(blocks, (int)ceil_div(A, 8 * 128));
    gated_group_norm_backward_kernel<<<grid, 128, 0, stream>>>(dy, dg, partial, dout, y, g, ln.gain.w, ln.bias.w, eps,
                                                               rows, per, A);
    add_partials({{ln.gain.g, ln.bias.g}}, partial, blocks, 2, A);
}

// ---- Llama's gate ----

// out = silu(a) b
__global__ void swiglu_forward_kernel(floatX *out, const floatX *a, const floatX *b, int64_t n) {
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    Pack v = load(a + at);
    const Pack w = load(b + at);
    for (int i = 0; i < 8; i++) v.x[i] *= sigmoid(v.x[i]) * w.x[i];
    store(out + at, v);
}

__global__ void swiglu_backward_kernel(floatX *da, floatX *db, const floatX *dout, const floatX *a, const floatX *b,
                                       int64_t n) {
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    const Pack dy = load(dout + at);
    Pack v = load(a + at), w = load(b + at);
    for (int i = 0; i < 8; i++) {
        const float x = v.x[i];
        v.x[i] = dy.x[i] * w.x[i] * silu_gradient(x);
        w.x[i] = dy.x[i] * x * sigmoid(x);
    }
    store(da + at, v);
    store(db + at, w);
}

// ---- classifier (spec section 5): loss and its gradient on the logits in one kernel, in place ----
//
//     loss_t = log sum_i exp(z_i) - z_target
//     dz_i   = scale (softmax(z)_i - [i = target] + 1e-4 z_max [i = first of the largest])        scale = 1 / targets
//
// The last term keeps logits small (RWKV's L2Wrap, akin to a z-loss). It is in the gradient alone: no loss that is
// printed has it.
// A block takes a row of V logits and keeps it in registers, in bf16 up to 65536 of them; what is beyond is read three
// times. losses[row]: loss; right[row]: 1 if the largest logit is the target's. scale 0 leaves the logits as they are
// (validation). target -1: the row does not count, and all of it is 0.
static const int CLASSIFIER_KEEPS = PRECISION_BF16 ? 8 : 1; // packs a thread

__device__ inline float block_max(float v, float *shared) { // shared: 32 floats
    v = warp_max(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    v = shared[0];
    for (int i = 1; i < (int)blockDim.x / 32; i++) v = fmaxf(v, shared[i]);
    return v;
}

HAS_TWIN __global__ void __launch_bounds__(1024)
    classifier_kernel(floatX *logits, float *losses, int *right, const int *targets, float scale, int V) {
    __shared__ float tops[32];
    __shared__ float2 sums[32];
    floatX *z = logits + (int64_t)blockIdx.x * V;
    const int begin = threadIdx.x * 8, step = blockDim.x * 8, target = targets[blockIdx.x];
    if (target < 0) { // the whole block
        for (int c = begin; c < V && scale != 0; c += step) store(z + c, zero_pack());
        if (threadIdx.x == 0) losses[blockIdx.x] = 0, right[blockIdx.x] = 0;
        return;
    }
    const float of_target = (float)z[target];
    RawPack<floatX> kept[CLASSIFIER_KEEPS];
#pragma unroll
    for (int i = 0; i < CLASSIFIER_KEEPS; i++)
        kept[i] = begin + i * step < V ? load_raw(z + begin + i * step) : RawPack<floatX>{};
    auto each_pack = [&](auto function) { // function(pack, its first id)
#pragma unroll
        for (int i = 0; i < CLASSIFIER_KEEPS; i++)
            if (begin + i * step < V) function(unpack(kept[i]), begin + i * step);
        for (int c = begin + CLASSIFIER_KEEPS * step; c < V; c += step) function(load(z + c), c);
    };
    float high = -INFINITY, sum = 0, first = -INFINITY;
    each_pack([&](const Pack &v, int) {
        for (int i = 0; i < 8; i++) high = fmaxf(high, v.x[i]);
    });
    const float top = block_max(high, tops);
    each_pack([&](const Pack &v, int) {
        for (int i = 0; i < 8; i++) sum += fast_exp(v.x[i] - top);
    });
    if (high == top) // ids are exact in fp32 up to 2^24
        each_pack([&](const Pack &v, int c) {
            for (int i = 0; i < 8; i++) first = v.x[i] == top ? fmaxf(first, -(float)(c + i)) : first;
        });
    sum = block_sum(sum, sums);
    // the lowest id on ties; some id if there are only NaN
    const int at = (int)fminf(-block_max(first, tops), (float)(V - 1));
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = logf(sum) + top - of_target;
        right[blockIdx.x] = at == target;
    }
    if (scale == 0) return;
    const float inverse = 1 / sum, factor = scale * inverse;
    each_pack([&](Pack v, int c) {
        for (int i = 0; i < 8; i++) v.x[i] = fast_exp(v.x[i] - top) * factor;
        store(z + c, v);
    });
    __syncthreads();
    if (threadIdx.x > 0) return; // the two that have more terms
    const float of_top = inverse + 1e-4f * top, p = fast_exp(of_target - top) * inverse;
    z[at] = (floatX)(scale * of_top);
    z[target] = (floatX)(scale * ((at == target ? of_top : p) - 1));
}

// Sum over a block of 256 threads in double, in fixed order
__device__ inline double block_sum_256(double v, double (&sums)[256]) {
    sums[threadIdx.x] = v;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < (unsigned)half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    return sums[0];
}

// totals[0] += the sum of losses, totals[1] += the number right; one block
__global__ void sum_losses_kernel(double *totals, const float *losses, const int *right, int n) {
    __shared__ double loss_sums[256];
    __shared__ double right_sums[256];
    double loss = 0, count = 0;
    for (int i = threadIdx.x; i < n; i += 256) {
        loss += losses[i];
        count += right[i];
    }
    loss = block_sum_256(loss, loss_sums);
    count = block_sum_256(count, right_sums);
    if (threadIdx.x > 0) return;
    totals[0] += loss;
    totals[1] += count;
}

// ---- gradient norm and AdamW (spec section 8) ----

// The block of parameters, cut at every tensor's beginning and after every PIECE numbers: one block of threads a piece.
struct Piece {
    int64_t offset; // in the block
    int count;
    float lr_scale, weight_decay; // factors on the rates of the step
    int number;                   // among all pieces; with several GPUs (section 9) a rank works on some of them only
    int64_t kept;                 // where masters and moments are, of which a rank keeps only what it works on
};
static const int PIECE = 16384;

struct UpdateState {        // on the device; the host reads it a step later
    float loss, norm, clip; // clip: factor on the gradients; 0 if not to be applied
    int skip;               // set once the norm was not finite, for good: the host sees it and ends the run
};

HAS_TWIN __global__ void squares_of_pieces_kernel(double *squares, const float *grads, const Piece *pieces) {
    __shared__ float2 shared[32];
    const Piece piece = pieces[blockIdx.x];
    float sum = 0;
    for (int i = threadIdx.x * 8; i < piece.count; i += blockDim.x * 8) {
        const Pack g = load(grads + piece.offset + i);
        for (int j = 0; j < 8; j++) sum += g.x[j] * g.x[j];
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) squares[piece.number] = sum;
}

#ifdef CUDA_ON_CPU // in dev/cpu/twins.h
static void squares_of_pieces_in_loops(double *squares, const float *grads, const Piece *pieces, int n);
#endif

static void squares_of_pieces(double *squares, const float *grads, const Piece *pieces, int n) {
    TWIN(squares_of_pieces_in_loops(squares, grads, pieces, n));
    if (n > 0) squares_of_pieces_kernel<<<n, 256, 0, stream>>>(squares, grads, pieces);
}

__global__ void norm_and_clip_kernel(UpdateState *state, const double *squares, int n, const double *totals,
                                     float per_target, float limit) {
    __shared__ double sums[256];
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += 256) sum += squares[i];
    sum = block_sum_256(sum, sums);
    if (threadIdx.x > 0) return;
    const float norm = (float)sqrt(sum);
    state->loss = (float)(totals[0] * per_target);
    state->norm = norm;
    if (!(norm < INFINITY)) state->skip = 1;
    state->clip = state->skip ? 0 : fminf(1.f, limit / (norm + 1e-6f));
}

// correction: 1 - beta^(step + 1)
struct AdamW {
    float lr, beta1, beta2, eps, weight_decay, correction1, correction2;
};

// m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  p -= lr (m^ / (sqrt(v^) + eps) + wd p);  28 bytes a
// parameter in fp32 (4 moved twice, g once), 30 with a bf16 copy.
__global__ void adamw_kernel(floatX *params, float *master, float *m, float *v, const float *grads, const Piece *pieces,
                             const UpdateState *state, AdamW a) {
    const float clip = state->clip;
    if (clip == 0) return;
    const Piece piece = pieces[blockIdx.x];
    const float lr = a.lr * piece.lr_scale, decay = a.weight_decay * piece.weight_decay;
    for (int i = threadIdx.x * 8; i < piece.count; i += blockDim.x * 8) {
        const int64_t at = piece.offset + i, kept = piece.kept + i, of_master = PRECISION_BF16 ? kept : at;
        const Pack g = load(grads + at);
        Pack first = load(m + kept), second = load(v + kept), p = load(master + of_master);
        for (int j = 0; j < 8; j++) {
            const float gradient = g.x[j] * clip;
            first.x[j] = a.beta1 * first.x[j] + (1 - a.beta1) * gradient;
            second.x[j] = a.beta2 * second.x[j] + (1 - a.beta2) * gradient * gradient;
            const float step = first.x[j] / a.correction1 / (sqrtf(second.x[j] / a.correction2) + a.eps);
            p.x[j] -= lr * (step + decay * p.x[j]);
        }
        store(m + kept, first);
        store(v + kept, second);
        store(master + of_master, p);
        if (PRECISION_BF16) store(params + at, p);
    }
}

// the working copy of fp32 masters
__global__ void round_params_kernel(floatX *params, const float *master, const Piece *pieces) {
    const Piece piece = pieces[blockIdx.x];
    for (int i = threadIdx.x * 8; i < piece.count; i += blockDim.x * 8)
        store(params + piece.offset + i, load(master + piece.kept + i));
}

#ifdef CUDA_ON_CPU
#include "dev/cpu/twins.h"
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 5. Layers: each a forward and a backward, out of the kernels above
//
// x is what a layer gets, already normed (ln1 or ln2), out what it adds to the residual stream, both (BT, C). A
// backward function takes dout, adds to the gradients of the layer's parameters and writes dx. Beside its parameters a
// layer has what it keeps from forward to backward, and `tmp`, scratch that all layers share. In equations diff is
// shift(x) - x, x of the token before less x.
//
// What changed from Finch (RWKV-6) to Finch-C2 and to GOLD, and where it stands:
//
//                     Finch, x060               Finch-C2, x060c2          GOLD
//     mixed inputs    w, k, v, r, g             r, k, v, w, v2            q from x; k and v from K0 and xo
//                     finch_plan                finch_c2_plan             gold_plan
//     keys            key x_k                   times 1 - exp(-exp(w))    K0 and a low rank of it, normed
//                     finch_forward             wkv_keys                  gold_keys_values
//     values          value x_v                 value x_v                 xo and a low rank of it, normed
//     the token       bonus u                   second value v2           is one of the keys
//     itself          wkv_scores_bonus          finch_c2_forward          attention_forward
//     y               group norm, times gate    one LayerNorm, no gate    one LayerNorm, no gate
//                     gated_group_norm_forward  finch_c2_forward          gold_output
//     carried on      a state and two shifts    a state and two shifts    two shifts; for all layers c per token
//                     wkv_forward_kernel        wkv_forward_kernel        token_cat_forward
//
// Inference goes on from what came before. There, row 0 stands for the token before the first (lead = 1, otherwise 0):
// its normed input is all that a shift needs of it, and what the row gives after the shift is not used. `first` is the
// position of row 0, 0 in training.
typedef struct Dims {
    int B, T, BT, C, A, F, H, V, R, L, G0, lead;
    int64_t first;
} Dims;

// A block of memory handed out piece by piece; without a base it only counts. Under the sanitizers a guarded gap
// follows each piece of memory that is handed out once.
typedef struct Arena {
    char *base;
    int64_t used;
    bool once;
} Arena;

template <typename T> static void take(Arena *arena, T **p, int64_t count) {
    char *end = arena->base + arena->used + count * sizeof(T);
    *p = arena->base ? (T *)(arena->base + arena->used) : nullptr;
    arena->used = ceil_div(arena->used + count * (int64_t)sizeof(T) + GUARD_BYTES, 256) * 256;
    if (arena->base && arena->once) guard_gap(end, arena->base + arena->used - end);
}

// The inputs of a mixer that mix a token with the one before (section 4), in the order of time_maa_w2's slices. What
// is pointed to are fields of the layer, which change with the micro-batch at hand.
struct MixedInput {
    const Param *mu;  // time_maa_..
    floatX **x, **dx; // (BT, C): the input, and its gradient
};
typedef struct MixedInputs {
    int n = 0, rank = MIX_RANK;
    MixedInput input[5] = {};
    const Param *mu_x = nullptr, *w1 = nullptr, *w2 = nullptr; // ddlerp: time_maa_x, _w1, _w2; lerp: null
    bool complement = false;                                   // lerp: the parameters are 1 - mu
    floatX *both = nullptr, *h = nullptr; // ddlerp: (C, 64 n): w1 times 1 - mu_x | mu_x; (BT, 32 n)
    struct {                              // (BT, 64 n), (BT, 32 n), (BT, 64 n), (C, 64 n)
        float *z;
        floatX *dh, *dz;
        float *dboth;
    } tmp = {};
} MixedInputs;

typedef struct FinchC2 {
    MixedInputs mixed;
    floatX *xr, *xk, *xw, *xv, *xv2; // (BT, C) each; xv and xv2 adjacent
    floatX *r, *k, *w, *v, *v2;      // (BT, A) each; v and v2 adjacent
    floatX *hw, *hv2;                // (BT, 64): hidden layers of w and v2
    floatX *y, *yn;                  // (BT, A): WKV's output, and normed
    float *states;                   // WKV's states at the start of every chunk
    struct {
        floatX *dxr, *dxk, *dxw, *dxv, *dxv2; // (BT, C); dxv and dxv2 adjacent
        floatX *dr, *dk, *dw, *dv, *dv2;      // (BT, A); dv and dv2 adjacent
        floatX *dy, *dyn;                     // (BT, A); dy is dv2: v2 is added to y, so their gradients are one
        floatX *dh;                           // (BT, 64)
        float *dw_sum, *du;                   // (B, A)
    } tmp;
} FinchC2;

typedef struct Gold {
    MixedInputs mixed_q, mixed_kv; // q from x; k and v by amounts that depend on xo
    floatX *xq, *q0, *q;           // queries: mixed, query x_q, normed
    floatX *k1, *hk, *k2, *k;      // keys: mixed, hidden layer (BT, rank), + low rank, normed
    floatX *v1, *hv, *v2, *v;      // values, likewise
    floatX *y, *yn;                // attention's output, and normed
    float *log_sum;                // (B, H, T): attention's
    struct {
        floatX *low_rank;                // (BT, C)
        floatX *dq, *dk, *dv, *dy, *dyn; // (BT, A)
        floatX *dq0, *dk2, *dv2;         // (BT, A)
        floatX *dxq;                     // (BT, C)
        floatX *dh;                      // (BT, rank)
        float *delta;                    // (B, H, T)
    } tmp;
} Gold;

typedef struct Cmix {
    MixedInputs mixed;
    floatX *xk, *xr, *k, *v, *r; // (BT, C) but k (BT, F): relu squared
    struct {
        floatX *dxk, *dxr, *dk, *dv, *dr;
    } tmp;
} Cmix;

typedef struct CmixLlama {
    floatX *a, *b, *k; // (BT, FL): w1 x, w3 x, silu(a) b
    struct {
        floatX *da, *db, *dk;
    } tmp;
} CmixLlama;

typedef struct Finch { // Finch, its gateless variant and Eagle
    MixedInputs mixed;
    floatX *xr, *xk, *xv, *xw, *xg; // (BT, C)
    floatX *r, *k, *v, *w, *g;      // (BT, A)
    floatX *hw;                     // (BT, 64): hidden layer of w
    floatX *y, *yn;                 // (BT, A): WKV's output; normed and gated
    float *states;                  // WKV's states at the start of every chunk
    struct {
        floatX *dxr, *dxk, *dxv, *dxw, *dxg;
        floatX *dr, *dk, *dv, *dw, *dg, *dy, *dyn;
        floatX *dh;         // (BT, 64)
        float *dw_sum, *du; // (B, A)
    } tmp;
} Finch;

typedef struct Attention {               // GPTAlpha and Llama
    MixedInputs mixed;                   // GPTAlpha
    floatX *xq, *xk, *xv, *q0, *k0, *v0; // GPTAlpha: mixed inputs; queries, keys and values before their norms
    floatX *q, *k, *v;                   // (BT, A), q and k rotated
    floatX *y, *yn;                      // (BT, A): attention's output; GPTAlpha: normed
    float *log_sum;                      // (B, H, T): attention's
    struct {
        floatX *dxq, *dxk, *dxv, *dq0, *dk0, *dv0;
        floatX *dq, *dk, *dv, *dy, *dyn;
        float *delta; // (B, H, T)
    } tmp;
} Attention;

// The values of grad_cp, in the order of what they save: what is kept of each layer from the forward to the backward
// pass, the rest being made again there, in scratch.
enum Remake {
    KEEP_ALL = 0,      // everything
    REMAKE_CHEAP = 2,  // all but ln1, the mixed inputs of Finch-C2 and GOLD, and GOLD's normed q, k and v
    REMAKE_LAYERS = 1, // x alone, its input
};

typedef struct Buckets { // section 9
    int n;               // 1 with one GPU
    int64_t size;        // elements of each; the last one may be smaller
    int *first_piece;    // (n + 1): of m->pieces
    int left, gathered;  // those whose gradients are not yet sent; those whose weights the forward pass waited for
    bool sum;            // the micro-batch at hand is the step's last: its gradients are sent as they become final
} Buckets;

struct Mixer;
struct Model;
typedef struct Layer {
    int index;
    const struct Mixer *tmix, *cmix;
    Params p;
    // (BT, C): residual stream before the layer, normed; after its time mixer, normed
    floatX *x, *ln1, *x_mid, *ln2;
    floatX *tmix_shift, *cmix_shift;  // (C), inference: ln1 and ln2 of the last token; null in training
    float *wkv_state;                 // (H, N, N), inference: WKV's state; null in training
    void (*attend)(Model *, Layer *); // inference: attention over all keys and values so far; null in training
    FinchC2 finch_c2;
    Gold gold;
    Finch finch;
    Attention attention;
    Cmix ffn;
    CmixLlama ffn_llama;
} Layer;

typedef struct Model {
    Settings s;
    int B, T; // capacity: sequences of a micro-batch, tokens of a sequence
    Dims d;   // sizes of the micro-batch at hand
    Rope rope;
    Tensor *tensors;
    Param **fields; // where the layers keep each tensor's pointers
    int n_tensors;
    bool first_micro_batch; // of a step: gradients of matrices are written, not added to (weight_backward)
    // n_block: elements of a block of parameters, what fills it up included
    int64_t n_parameters, n_block;
    // The block's parts, in the order of the forward pass: 0 the embedding, 1 + l layer l (TokenCat with the first GOLD
    // layer), L + 1 the final norm and the head. Part p begins at part_begin[p]; part_begin[L + 2] is n_block.
    int64_t *part_begin;
    Buckets buckets; // section 9: how several GPUs share the block
    Params top;
    Layer *layers;
    // device blocks; FP32 builds: params is master. Several GPUs: each has a shard of the moments and, in BF16 builds,
    // master
    floatX *params;
    float *grads, *master, *moment1, *moment2;
    char *activations;
    int64_t activation_bytes;
    int64_t gradients_at; // bytes into the activations where the gradients lie; -1: they have memory of their own
    // inside the activation block
    // ln0's output; rms_norm(x0); c (BT, R); K0 before and after its norm (BT, A)
    floatX *x0, *xo, *cache, *k0_sum, *k0;
    float *dxo, *dk0, *dx0; // their gradients in fp32: summed over the GOLD layers
    floatX *dk0_sum, *dcache;
    floatX *x_out, *xf, *branch; // residual stream after the last layer, normed; what a mixer adds to it
    floatX *dx, *dln1, *dln2;    // gradients of the residual stream and of the norms' outputs
    floatX *logits;              // a slice of rows (slice, V)
    float *losses, *partial;
    int *right, slice;
    // small device arrays
    int *tokens; // as staged by the host: inputs, targets, and the inputs sorted by id
    Piece *pieces;
    int n_pieces, n_squares;  // of this rank; of the block
    double *squares, *totals; // (n_squares); behind them loss sum and number right
    UpdateState *state;
    // host
    int *staged[4]; // pinned; a ring, so that a copy is not overwritten before it is done
    cudaEvent_t staged_done[4];
    // of the step that is queued, of the one that is read, of the one before that
    cudaEvent_t result_done[3];
    int64_t micro_steps, targets_in_step;
    int micro_in_step;
    UpdateState *results; // pinned, of the current step and the one before
    int distinct;         // ids in the micro-batch at hand
} Model;

typedef struct Mixer {
    const char *name;
    int tensors;              // which (enum Where)
    int mixes = 0;            // inputs mixed by time_maa_w1 and _w2
    bool needs_cache = false; // K0, so layers before it
    bool keeps_kv = false;    // attention with its own keys and values
    bool complement = false;  // its time_mix is 1 - time_maa
    void (*plan)(Model *, Layer *, Arena *kept, Arena *scratch);
    void (*forward)(Model *, Layer *, floatX *out, const floatX *x);
    void (*backward)(Model *, Layer *, floatX *dx, const floatX *dout, const floatX *x);
    void (*remake)(Model *, Layer *, const floatX *x) = nullptr; // REMAKE_CHEAP: what was not kept; null: all was
} Mixer;

// ---- products with weights ----

// out (M, O) = x (M, I) W^T + beta out, W (O, I)
template <typename T> static void linear_forward(T *out, const floatX *x, Param W, int M, float beta = 0) {
    const int I = W.columns, O = W.rows;
    if (!W.in_int8) {
        matmul(out, O, rows(x, I), columns(W.w, W.ld), M, O, I, beta);
        return;
    }
    const Int8Matrix &w = *W.in_int8;
    const int64_t most = w.room_size / I;
    for (int64_t first = 0; first < O; first += most) {
        const int here = (int)(O - first < most ? O - first : most);
        from_int8_kernel<<<pack_blocks((int64_t)here * I), 256, 0, stream>>>(w.room, w.whole + first * I,
                                                                             w.scales + first, here, I);
        matmul(out + first, O, rows(x, I), columns(w.room, I), M, here, I, beta);
    }
}

// dW += dout^T x; or dW = dout^T x where it is the first of a step, so that gradients of matrices need not be cleared
static void weight_backward(Param W, const floatX *dout, const floatX *x, int M, bool first) {
    matmul(W.g, W.ld, columns(dout, W.rows), rows(x, W.columns), W.rows, W.columns, M, first ? 0 : 1);
}

// dx (M, I) = dout (M, O) W + beta dx
template <typename TX> static void input_backward(TX *dx, const floatX *dout, Param W, int M, float beta = 0) {
    matmul(dx, W.columns, rows(dout, W.rows), rows(W.w, W.ld), M, W.columns, W.rows, beta);
}

static void linear_backward(const Model *m, floatX *dx, const floatX *dout, const floatX *x, Param W, int M,
                            float beta = 0) {
    weight_backward(W, dout, x, M, m->first_micro_batch);
    input_backward(dx, dout, W, M, beta);
}

// out (M, O) = tanh(x (M, I) w1) w2 + beta out: w1 (I, hidden), w2 (hidden, O). h (M, hidden): the hidden layer, kept.
static void low_rank_forward(floatX *out, floatX *h, const floatX *x, Param w1, Param w2, int M, float beta = 0) {
    const int I = w1.rows, hidden = w1.columns, O = w2.columns;
    matmul(h, hidden, rows(x, I), rows(w1.w, hidden), M, hidden, I);
    tanh_forward_kernel<<<pack_blocks((int64_t)M * hidden), 256, 0, stream>>>(h, (int64_t)M * hidden);
    matmul(out, O, rows(h, hidden), rows(w2.w, O), M, O, hidden, beta);
}

// dx = d(hidden layer's input) w1^T + beta dx. dx may be dout itself (it is written last). dh (M, hidden): scratch.
static void low_rank_backward(floatX *dx, floatX *dh, const floatX *dout, const floatX *h, const floatX *x, Param w1,
                              Param w2, int M, float beta = 0) {
    const int I = w1.rows, hidden = w1.columns, O = w2.columns;
    matmul(dh, hidden, rows(dout, O), columns(w2.w, O), M, hidden, O);
    matmul(w2.g, O, columns(h, hidden), rows(dout, O), hidden, O, M, 1);
    tanh_backward_kernel<<<pack_blocks((int64_t)M * hidden), 256, 0, stream>>>(dh, h, (int64_t)M * hidden);
    matmul(w1.g, hidden, columns(x, I), rows(dh, hidden), I, hidden, M, 1);
    matmul(dx, I, rows(dh, hidden), columns(w1.w, hidden), M, I, hidden, beta);
}

// ---- positions: q and k (BT, A) of an attention are rotated in place, their gradients back ----

static void rope_layer(const Model *m, floatX *x, float direction) {
    const Dims &d = m->d;
    if (m->rope.used)
        rope_rotate_kernel<<<d.BT, row_threads(d.A), 0, stream>>>(x, m->rope, d.first, d.T, d.A, direction);
}
static void rope_forward(const Model *m, floatX *q_or_k) { rope_layer(m, q_or_k, 1); }
static void rope_backward(const Model *m, floatX *gradient) { rope_layer(m, gradient, -1); }

// ---- mixed inputs: what most mixers begin with ----
//
//     x_i = x + diff * mu_i                     lerp
//     x_i = x + diff * (mu_i + m_i)             ddlerp
//     m_i = h[:, 32 i : 32 i + 32] @ w2[i],     h = tanh((x + diff * mu_x) @ w1)        w1 (C, 32 n), w2 (n, 32, C)
//
// with diff = shift(x) - x and i = 0 .. n-1.

static void mixed_inputs_plan(const Dims &d, MixedInputs *a, Arena *kept, Arena *scratch) { // ddlerp's hidden layer
    const int hidden = a->w1->columns;
    take(kept, &a->both, (int64_t)d.C * 2 * hidden);
    take(kept, &a->h, (int64_t)d.BT * hidden);
    take(scratch, &a->tmp.z, (int64_t)d.BT * 2 * hidden);
    take(scratch, &a->tmp.dh, (int64_t)d.BT * hidden);
    take(scratch, &a->tmp.dz, (int64_t)d.BT * 2 * hidden);
    take(scratch, &a->tmp.dboth, (int64_t)d.C * 2 * hidden);
}

template <int n> static MixTask<n> mix_task(const Dims &d, const MixedInputs &a, int first) {
    MixTask<n> task = {};
    for (int i = 0; i < n; i++) task.mu[i] = a.input[first + i].mu->w, task.x[i] = *a.input[first + i].x;
    if (a.w2) task.low = {a.h + MIX_RANK * first, MIX_RANK * a.n, a.w2->w + (int64_t)MIX_RANK * d.C * first};
    task.complement = a.complement;
    return task;
}
template <int n> static MixTask<n> mix_backward_task(const Dims &d, const MixedInputs &a, int first, Targets *dmu) {
    MixTask<n> task = mix_task<n>(d, a, first);
    for (int i = 0; i < n; i++) task.x[i] = *a.input[first + i].dx, dmu->g[i] = a.input[first + i].mu->g;
    return task;
}

static void mixed_inputs_hidden(const Dims &d, const MixedInputs &a, const floatX *x) { // h
    const int hidden = a.rank * a.n, ld = (int)a.w1->ld, blocks = pack_blocks((int64_t)d.C * hidden);
    ddlerp_hidden_weights_kernel<<<blocks, 256, 0, stream>>>(a.both, a.w1->w, a.mu_x->w, d.C, hidden, ld);
    matmul(a.tmp.z, 2 * hidden, rows(x, d.C), rows(a.both, 2 * hidden), d.BT, 2 * hidden, d.C);
    ddlerp_hidden_forward_kernel<<<pack_blocks((int64_t)d.BT * hidden), 256, 0, stream>>>(a.h, a.tmp.z, d.BT, d.T,
                                                                                          hidden);
}

// From tmp.dh: w1's and mu_x's gradients; adds x's to dx.
template <typename TX>
static void mixed_inputs_hidden_backward(const Dims &d, const MixedInputs &a, TX *dx, const floatX *x) {
    const int hidden = MIX_RANK * a.n, ld = (int)a.w1->ld, blocks = (int)ceil_div(d.C, 8);
    const auto &tmp = a.tmp;
    ddlerp_hidden_backward_kernel<<<pack_blocks((int64_t)d.BT * hidden), 256, 0, stream>>>(tmp.dz, tmp.dh, d.BT, d.T,
                                                                                           hidden);
    matmul(tmp.dboth, 2 * hidden, columns(x, d.C), rows(tmp.dz, 2 * hidden), d.C, 2 * hidden, d.BT);
    ddlerp_hidden_weights_backward_kernel<<<blocks, 256, 0, stream>>>(a.w1->g, a.mu_x->g, tmp.dboth, a.w1->w, a.mu_x->w,
                                                                      d.C, hidden, ld);
    matmul(dx, d.C, rows(tmp.dz, 2 * hidden), columns(a.both, 2 * hidden), d.BT, d.C, 2 * hidden, 1);
}

// n inputs, which mix the same x, from `first` on; the hidden layer is there. ddlerp_forward knows one rank: of
// another, the m_i are products, to where the x_i will be.
template <int n>
static void mixed_inputs_part_forward(const Dims &d, const MixedInputs &a, const floatX *x, int first = 0) {
    const MixTask<n> task = mix_task<n>(d, a, first);
    if (a.rank == MIX_RANK) {
        ddlerp_forward(task, x, d.BT, d.T, d.C);
        return;
    }
    for (int i = 0; i < n; i++) {
        const floatX *h = a.h + a.rank * (first + i), *w2 = a.w2->w + (int64_t)a.rank * d.C * (first + i);
        matmul(task.x[i], d.C, rows(h, a.rank * a.n), rows(w2, d.C), d.BT, d.C, a.rank);
    }
    ddlerp_from_amounts_kernel<n><<<d.BT, row_threads(d.C), 0, stream>>>(task, x, d.T, d.C);
}

// Their gradients to the hidden layer's, w2's and mu's, and to dx, which is added to if `accumulate`.
template <int n, typename TX, bool accumulate>
static void mixed_inputs_part_backward(const Model *m, const MixedInputs &a, TX *dx, const floatX *x, int first = 0) {
    const Dims &d = m->d;
    DdlerpGradients g = {a.tmp.dh + MIX_RANK * first, a.w2->g + (int64_t)MIX_RANK * d.C * first, {}};
    const MixTask<n> task = mix_backward_task<n>(d, a, first, &g.dmu);
    ddlerp_backward<n, TX, accumulate>(task, g, dx, x, m->partial, d.BT, d.T, d.C);
}

// All inputs, where the hidden layer is there. Kernels are compiled for as many as the mixers have.
static void mixed_inputs_remake(const Dims &d, const MixedInputs &a, const floatX *x) {
    const bool lerp = !a.w2;
    if (lerp && a.n == 2) lerp_forward(mix_task<2>(d, a, 0), x, d.BT, d.T, d.C);
    if (lerp && a.n == 4) lerp_forward(mix_task<4>(d, a, 0), x, d.BT, d.T, d.C);
    if (!lerp && a.n == 1) mixed_inputs_part_forward<1>(d, a, x);
    if (!lerp && a.n == 3) mixed_inputs_part_forward<3>(d, a, x);
    if (!lerp && a.n == 4) mixed_inputs_part_forward<4>(d, a, x);
    if (!lerp && a.n == 5) mixed_inputs_part_forward<5>(d, a, x);
}

static void mixed_inputs_forward(const Dims &d, const MixedInputs &a, const floatX *x) {
    if (a.w2) mixed_inputs_hidden(d, a, x);
    mixed_inputs_remake(d, a, x);
}

template <int n> static void lerp_inputs_backward(const Model *m, const MixedInputs &a, floatX *dx, const floatX *x) {
    const Dims &d = m->d;
    Targets dmu = {};
    const MixTask<n> task = mix_backward_task<n>(d, a, 0, &dmu);
    lerp_backward(task, dx, dmu, m->partial, x, d.BT, d.T, d.C);
}

static void mixed_inputs_backward(const Model *m, const MixedInputs &a, floatX *dx, const floatX *x) {
    const bool lerp = !a.w2;
    if (lerp && a.n == 2) lerp_inputs_backward<2>(m, a, dx, x);
    if (lerp && a.n == 4) lerp_inputs_backward<4>(m, a, dx, x);
    if (!lerp && a.n == 1) mixed_inputs_part_backward<1, floatX, false>(m, a, dx, x);
    if (!lerp && a.n == 3) mixed_inputs_part_backward<3, floatX, false>(m, a, dx, x);
    if (!lerp && a.n == 4) mixed_inputs_part_backward<4, floatX, false>(m, a, dx, x);
    if (!lerp && a.n == 5) mixed_inputs_part_backward<5, floatX, false>(m, a, dx, x);
    if (!lerp) mixed_inputs_hidden_backward(m->d, a, dx, x);
}

// ---- Finch-C2 time mix, x060c2 ----
//
//     x_i = mixed inputs, i: r, k, v, w, v2
//     r = receptance x_r;  k = key x_k;  v = value x_v;  v2 = value x_v2 + tanh(x_v2 @ time_value2_w1) @ time_value2_w2
//     w = time_decay + tanh(x_w @ time_decay_w1) @ time_decay_w2
//     k = k * (1 - exp(-exp(w)))                               if use_one_minus_w
//     y = WKV(r, k, v, w, u) + v2                              use_v2: u = 0;  else u = time_faaaa and no v2
//     out = output LayerNorm_ln_x(y)

static void finch_c2_plan(Model *m, Layer *layer, Arena *kept, Arena *scratch) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    FinchC2 &a = layer->finch_c2;
    auto &tmp = a.tmp;
    a.mixed = {.n = m->s.use_v2 ? 5 : 4,
               .input = {{&p.time_maa_r, &a.xr, &tmp.dxr},
                         {&p.time_maa_k, &a.xk, &tmp.dxk},
                         {&p.time_maa_v, &a.xv, &tmp.dxv},
                         {&p.time_maa_w, &a.xw, &tmp.dxw},
                         {&p.time_maa_v2, &a.xv2, &tmp.dxv2}},
               .mu_x = &p.time_maa_x,
               .w1 = &p.time_maa_w1,
               .w2 = &p.time_maa_w2};
    Arena *again = m->s.grad_cp == REMAKE_CHEAP ? scratch : kept;
    const int64_t E = (int64_t)d.BT * d.C, EA = (int64_t)d.BT * d.A;
    mixed_inputs_plan(d, &a.mixed, kept, scratch);
    for (floatX **to : {&a.xr, &a.xk, &a.xw}) take(again, to, E);
    take(again, &a.xv, 2 * E);
    for (floatX **to : {&a.r, &a.k, &a.w, &a.y, &a.yn}) take(kept, to, EA);
    take(kept, &a.v, 2 * EA);
    take(kept, &a.hw, (int64_t)d.BT * DECAY_RANK);
    take(kept, &a.hv2, (int64_t)d.BT * VALUE2_RANK);
    take(kept, &a.states, d.B * d.H * ceil_div(d.T, CHUNK) * N * N);
    for (floatX **to : {&tmp.dxr, &tmp.dxk, &tmp.dxw}) take(scratch, to, E);
    take(scratch, &tmp.dxv, 2 * E);
    for (floatX **to : {&tmp.dr, &tmp.dk, &tmp.dw, &tmp.dyn}) take(scratch, to, EA);
    take(scratch, &tmp.dv, 2 * EA);
    take(scratch, &tmp.dh, (int64_t)d.BT * DECAY_RANK);
    for (float **to : {&tmp.dw_sum, &tmp.du}) take(scratch, to, (int64_t)d.B * d.A);
}

// The tensors that lie behind one another, for the micro-batch at hand.
static void finch_c2_adjacent(const Dims &d, FinchC2 &a) {
    a.xv2 = a.xv + (int64_t)d.BT * d.C;
    a.v2 = a.v + (int64_t)d.BT * d.A;
    a.tmp.dxv2 = a.tmp.dxv + (int64_t)d.BT * d.C;
    a.tmp.dy = a.tmp.dv2 = a.tmp.dv + (int64_t)d.BT * d.A;
}

static Wkv finch_c2_wkv(const Model *m, const Layer *layer) {
    const FinchC2 &a = layer->finch_c2;
    const bool v2 = m->s.use_v2;
    const int64_t lead = m->d.lead * (int64_t)m->d.A;
    return {.r = a.r + lead,
            .k = a.k + lead,
            .v = a.v + lead,
            .w = a.w + lead,
            .time_decay = layer->p.time_decay.w,
            .u = v2 ? nullptr : layer->p.time_faaaa.w,
            .v2 = v2 ? a.v2 + lead : nullptr,
            .one_minus_w = m->s.use_one_minus_w != 0,
            .states = a.states,
            .carry = layer->wkv_state,
            .T = m->d.T - m->d.lead,
            .H = m->d.H};
}

static void finch_c2_forward(Model *m, Layer *layer, floatX *out, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    FinchC2 &a = layer->finch_c2;
    const bool v2 = m->s.use_v2;
    finch_c2_adjacent(d, a);
    mixed_inputs_forward(d, a.mixed, x);
    linear_forward(a.r, a.xr, p.receptance, d.BT);
    linear_forward(a.k, a.xk, p.key, d.BT);
    linear_forward(a.v, a.xv, p.value, v2 ? 2 * d.BT : d.BT); // x_v and x_v2 in one product
    if (v2) low_rank_forward(a.v2, a.hv2, a.xv2, p.time_value2_w1, p.time_value2_w2, d.BT, 1);
    low_rank_forward(a.w, a.hw, a.xw, p.time_decay_w1, p.time_decay_w2, d.BT);
    wkv_forward(a.y + d.lead * (int64_t)d.A, finch_c2_wkv(m, layer), d.B);
    layernorm_forward(a.yn, a.y, p.ln_x, d.BT);
    linear_forward(out, a.yn, p.output, d.BT);
}

static void finch_c2_remake(Model *m, Layer *layer, const floatX *x) {
    mixed_inputs_remake(m->d, layer->finch_c2.mixed, x);
}

static void finch_c2_backward(Model *m, Layer *layer, floatX *dx, const floatX *dout, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    FinchC2 &a = layer->finch_c2;
    auto &tmp = a.tmp;
    const bool v2 = m->s.use_v2;
    finch_c2_adjacent(d, a);
    linear_backward(m, tmp.dyn, dout, a.yn, p.output, d.BT);
    layernorm_backward(tmp.dy, tmp.dyn, a.y, p.ln_x, m->partial, d.BT);
    wkv_backward({tmp.dy, tmp.dr, tmp.dk, tmp.dv, tmp.dw, tmp.dw_sum, tmp.du}, finch_c2_wkv(m, layer), d.B);
    add_partials({{p.time_decay.g}}, tmp.dw_sum, d.B, 1, d.A);
    if (!v2) add_partials({{p.time_faaaa.g}}, tmp.du, d.B, 1, d.A);
    linear_backward(m, tmp.dxr, tmp.dr, a.xr, p.receptance, d.BT);
    linear_backward(m, tmp.dxk, tmp.dk, a.xk, p.key, d.BT);
    linear_backward(m, tmp.dxv, tmp.dv, a.xv, p.value, v2 ? 2 * d.BT : d.BT); // and with dv2 that of x_v2
    if (v2) low_rank_backward(tmp.dxv2, tmp.dh, tmp.dv2, a.hv2, a.xv2, p.time_value2_w1, p.time_value2_w2, d.BT, 1);
    low_rank_backward(tmp.dxw, tmp.dh, tmp.dw, a.hw, a.xw, p.time_decay_w1, p.time_decay_w2, d.BT);
    mixed_inputs_backward(m, a.mixed, dx, x);
}

// ---- TokenCat: the compressed key cache (spec section 1) ----
//
//     c  = w_kv_cache_a x                      (BT, R): all that is stored per token beside its id
//     K0 = rms_norm(w_kv_cache_b [x0; c])      (BT, A)
//
// [x0; c] is never written: the product splits by its inputs, w_kv_cache_b = [W_x | W_c].

static Param columns_of(Param W, int first, int count) {
    return {W.w + first, W.g + first, W.rows, count, W.ld, nullptr};
}

static void token_cat_forward(Model *m, const floatX *x) {
    const Dims &d = m->d;
    const Param W = m->top.w_kv_cache_b, W_x = columns_of(W, 0, d.C), W_c = columns_of(W, d.C, d.R);
    linear_forward(m->cache, x, m->top.w_kv_cache_a, d.BT);
    linear_forward(m->k0_sum, m->x0, W_x, d.BT);
    linear_forward(m->k0_sum, m->cache, W_c, d.BT, 1);
    rms_norm_forward(m->k0, m->k0_sum, d.BT, d.A);
}

// Adds to dx, the gradient of x; x0's share goes to dx0 in fp32.
static void token_cat_backward(Model *m, floatX *dx, const floatX *x) {
    const Dims &d = m->d;
    const Param W = m->top.w_kv_cache_b, W_x = columns_of(W, 0, d.C), W_c = columns_of(W, d.C, d.R);
    rms_norm_backward<false>(m->dk0_sum, m->dk0, nullptr, m->k0_sum, d.BT, d.A);
    linear_backward(m, m->dcache, m->dk0_sum, m->cache, W_c, d.BT);
    weight_backward(W_x, m->dk0_sum, m->x0, d.BT, m->first_micro_batch);
    input_backward(m->dx0, m->dk0_sum, W_x, d.BT);
    linear_backward(m, dx, m->dcache, x, m->top.w_kv_cache_a, d.BT, 1);
}

// ---- the GOLD attention, gold ----
//
//     x_q = x + diff * (time_maa_q + m_q)                          the one mixed input from x: time_maa_q_w1, _w2
//     q   = LayerNorm_ln_q(query x_q)
//     xo  = rms_norm(x0)
//     k   = K0 + (shift(K0) - K0) * (time_maa_k + m_k)             m_k, m_v from xo: time_maa_v_cache in time_maa_x's
//     v   = xo + (shift(xo) - xo) * (time_maa_v + m_v)             place, time_maa_kv_w1, _w2
//     k   = LayerNorm_ln_k(k + tanh(k @ time_key_w1) @ time_key_w2)
//     v   = LayerNorm_ln_v(v + tanh(v @ time_value_w1) @ time_value_w2)
//     out = output LayerNorm_ln_x(causal_attention(q, k, v))       with rope, q and k are rotated first
//
// No key or value projection: k and v depend on K0 and the token ids alone.

// of time_key_w1 .. time_value_w2; a sixteenth whatever the cache's compression is
static int gold_rank(const Dims &d) {
    const int least = 64, sixteenth = d.C / 16;
    return sixteenth > least ? sixteenth : least;
}

static void gold_plan(Model *m, Layer *layer, Arena *kept, Arena *scratch) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Gold &a = layer->gold;
    auto &tmp = a.tmp;
    a.mixed_q = {.n = 1,
                 .input = {{&p.time_maa_q, &a.xq, &tmp.dxq}},
                 .mu_x = &p.time_maa_x,
                 .w1 = &p.time_maa_q_w1,
                 .w2 = &p.time_maa_q_w2};
    a.mixed_kv = {.n = 2,
                  .input = {{&p.time_maa_k, &a.k1, &tmp.dk2}, {&p.time_maa_v, &a.v1, &tmp.dv2}},
                  .mu_x = &p.time_maa_v_cache,
                  .w1 = &p.time_maa_kv_w1,
                  .w2 = &p.time_maa_kv_w2};
    Arena *again = m->s.grad_cp == REMAKE_CHEAP ? scratch : kept;
    const int64_t E = (int64_t)d.BT * d.C; // A = C in this layer
    mixed_inputs_plan(d, &a.mixed_q, kept, scratch);
    mixed_inputs_plan(d, &a.mixed_kv, kept, scratch);
    for (floatX **to : {&a.q0, &a.k2, &a.v2, &a.y, &a.yn}) take(kept, to, E);
    for (floatX **to : {&a.xq, &a.q, &a.k1, &a.k, &a.v1, &a.v}) take(again, to, E);
    for (floatX **to : {&a.hk, &a.hv}) take(kept, to, (int64_t)d.BT * gold_rank(d));
    take(kept, &a.log_sum, (int64_t)d.BT * d.H);
    for (floatX **to :
         {&tmp.low_rank, &tmp.dq, &tmp.dk, &tmp.dv, &tmp.dy, &tmp.dyn, &tmp.dq0, &tmp.dk2, &tmp.dv2, &tmp.dxq})
        take(scratch, to, E);
    take(scratch, &tmp.dh, (int64_t)d.BT * gold_rank(d));
    take(scratch, &tmp.delta, (int64_t)d.BT * d.H);
}

static void gold_mix_kv(const Model *m, const Layer *layer) { // a.k1, a.v1 from m->k0 and m->xo
    const MixedInputs &mixed = layer->gold.mixed_kv;
    mixed_inputs_part_forward<1>(m->d, mixed, m->k0, 0);
    mixed_inputs_part_forward<1>(m->d, mixed, m->xo, 1);
}

static void gold_queries(Model *m, Layer *layer, const floatX *x) { // a.q
    const Dims &d = m->d;
    const Params &p = layer->p;
    Gold &a = layer->gold;
    mixed_inputs_forward(d, a.mixed_q, x);
    linear_forward(a.q0, a.xq, p.query, d.BT);
    layernorm_forward(a.q, a.q0, p.ln_q, d.BT);
    rope_forward(m, a.q);
}

static void gold_keys_values(Model *m, Layer *layer) { // a.k, a.v from m->k0 and m->xo
    const Dims &d = m->d;
    const Params &p = layer->p;
    Gold &a = layer->gold;
    mixed_inputs_hidden(d, a.mixed_kv, m->xo);
    gold_mix_kv(m, layer);
    low_rank_forward(a.tmp.low_rank, a.hk, a.k1, p.time_key_w1, p.time_key_w2, d.BT);
    add_layernorm_forward(a.k, a.k2, a.k1, a.tmp.low_rank, p.ln_k, d.BT);
    rope_forward(m, a.k);
    low_rank_forward(a.tmp.low_rank, a.hv, a.v1, p.time_value_w1, p.time_value_w2, d.BT);
    add_layernorm_forward(a.v, a.v2, a.v1, a.tmp.low_rank, p.ln_v, d.BT);
}

static void gold_output(Model *m, Layer *layer, floatX *out) { // from a.y
    const Dims &d = m->d;
    const Params &p = layer->p;
    Gold &a = layer->gold;
    layernorm_forward(a.yn, a.y, p.ln_x, d.BT);
    linear_forward(out, a.yn, p.output, d.BT);
}

static void gold_forward(Model *m, Layer *layer, floatX *out, const floatX *x) {
    const Dims &d = m->d;
    Gold &a = layer->gold;
    gold_queries(m, layer, x);
    gold_keys_values(m, layer);
    attention_forward(a.y, a.log_sum, a.q, a.k, a.v, d.B, d.T, d.H);
    gold_output(m, layer, out);
}

static void gold_remake(Model *m, Layer *layer, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Gold &a = layer->gold;
    mixed_inputs_remake(d, a.mixed_q, x);
    gold_mix_kv(m, layer);
    layernorm_forward(a.q, a.q0, p.ln_q, d.BT);
    layernorm_forward(a.k, a.k2, p.ln_k, d.BT);
    layernorm_forward(a.v, a.v2, p.ln_v, d.BT);
    for (floatX *rotated : {a.q, a.k}) rope_forward(m, rotated);
}

static void gold_backward(Model *m, Layer *layer, floatX *dx, const floatX *dout, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Gold &a = layer->gold;
    auto &tmp = a.tmp;
    linear_backward(m, tmp.dyn, dout, a.yn, p.output, d.BT);
    layernorm_backward(tmp.dy, tmp.dyn, a.y, p.ln_x, m->partial, d.BT);
    attention_backward(tmp.dq, tmp.dk, tmp.dv, tmp.delta, tmp.dy, a.y, a.log_sum, a.q, a.k, a.v, d.B, d.T, d.H);
    for (floatX *gradient : {tmp.dq, tmp.dk}) rope_backward(m, gradient);

    layernorm_backward(tmp.dk2, tmp.dk, a.k2, p.ln_k, m->partial, d.BT);
    layernorm_backward(tmp.dv2, tmp.dv, a.v2, p.ln_v, m->partial, d.BT);
    low_rank_backward(tmp.dk2, tmp.dh, tmp.dk2, a.hk, a.k1, p.time_key_w1, p.time_key_w2, d.BT, 1);
    low_rank_backward(tmp.dv2, tmp.dh, tmp.dv2, a.hv, a.v1, p.time_value_w1, p.time_value_w2, d.BT, 1);
    mixed_inputs_part_backward<1, float, true>(m, a.mixed_kv, m->dk0, m->k0, 0);
    mixed_inputs_part_backward<1, float, true>(m, a.mixed_kv, m->dxo, m->xo, 1);
    mixed_inputs_hidden_backward(d, a.mixed_kv, m->dxo, m->xo);

    layernorm_backward(tmp.dq0, tmp.dq, a.q0, p.ln_q, m->partial, d.BT);
    linear_backward(m, tmp.dxq, tmp.dq0, a.xq, p.query, d.BT);
    mixed_inputs_backward(m, a.mixed_q, dx, x);
}

// ---- channel mixes, x060 and x052 ----
//
//     x_i = mixed inputs (lerp), i: k, r
//     k = relu(key x_k)^2;   out = sigmoid(receptance x_r) * (value k)
//
// x052, Eagle's, has time_mix_i = 1 - time_maa_i:  x_i = x * time_mix_i + shift(x) * (1 - time_mix_i).

static void cmix_plan(Model *m, Layer *layer, Arena *kept, Arena *scratch) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Cmix &a = layer->ffn;
    const int64_t E = (int64_t)d.BT * d.C;
    a.mixed = {.n = 2,
               .input = {{&p.ffn_time_maa_k, &a.xk, &a.tmp.dxk}, {&p.ffn_time_maa_r, &a.xr, &a.tmp.dxr}},
               .complement = layer->cmix->complement};
    for (floatX **to : {&a.xk, &a.xr, &a.v, &a.r}) take(kept, to, E);
    take(kept, &a.k, (int64_t)d.BT * d.F);
    for (floatX **to : {&a.tmp.dxk, &a.tmp.dxr, &a.tmp.dv, &a.tmp.dr}) take(scratch, to, E);
    take(scratch, &a.tmp.dk, (int64_t)d.BT * d.F);
}

static void cmix_forward(Model *m, Layer *layer, floatX *out, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Cmix &a = layer->ffn;
    const int64_t E = (int64_t)d.BT * d.C, EF = (int64_t)d.BT * d.F;
    mixed_inputs_forward(d, a.mixed, x);
    linear_forward(a.k, a.xk, p.ffn_key, d.BT);
    relu_squared_forward_kernel<<<pack_blocks(EF), 256, 0, stream>>>(a.k, EF);
    linear_forward(a.v, a.k, p.ffn_value, d.BT);
    linear_forward(a.r, a.xr, p.ffn_receptance, d.BT);
    gate_forward_kernel<<<pack_blocks(E), 256, 0, stream>>>(out, a.r, a.v, E);
}

static void cmix_backward(Model *m, Layer *layer, floatX *dx, const floatX *dout, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Cmix &a = layer->ffn;
    auto &tmp = a.tmp;
    const int64_t E = (int64_t)d.BT * d.C, EF = (int64_t)d.BT * d.F;
    gate_backward_kernel<<<pack_blocks(E), 256, 0, stream>>>(tmp.dr, tmp.dv, dout, a.r, a.v, E);
    linear_backward(m, tmp.dxr, tmp.dr, a.xr, p.ffn_receptance, d.BT);
    linear_backward(m, tmp.dk, tmp.dv, a.k, p.ffn_value, d.BT);
    relu_squared_backward_kernel<<<pack_blocks(EF), 256, 0, stream>>>(tmp.dk, a.k, EF);
    linear_backward(m, tmp.dxk, tmp.dk, a.xk, p.ffn_key, d.BT);
    mixed_inputs_backward(m, a.mixed, dx, x);
}

// ---- Finch (RWKV-6) time mix, x060 ----
//
//     x_i = mixed inputs, i: w, k, v, r, g
//     r = receptance x_r;  k = key x_k;  v = value x_v;  g = gate x_g
//     w = time_decay + tanh(x_w @ time_decay_w1) @ time_decay_w2
//     y = WKV(r, k, v, w, time_faaaa)
//     out = output (GroupNorm_ln_x(y) * silu(g))               H groups, eps 1e-5 head_size_divisor^2

// Memory of x060, x060b and x052, with a.mixed filled in
static void finch_memory(const Dims &d, Layer *layer, Arena *kept, Arena *scratch) {
    Finch &a = layer->finch;
    auto &tmp = a.tmp;
    const int64_t E = (int64_t)d.BT * d.C, EA = (int64_t)d.BT * d.A,
                  low_rank = (int64_t)d.BT * layer->p.time_decay_w1.columns;
    if (a.mixed.w1) mixed_inputs_plan(d, &a.mixed, kept, scratch);
    for (floatX **p : {&a.xr, &a.xk, &a.xv}) take(kept, p, E);
    for (floatX **p : {&a.r, &a.k, &a.v, &a.y, &a.yn}) take(kept, p, EA);
    take(kept, &a.states, d.B * d.H * ceil_div(d.T, CHUNK) * N * N);
    for (floatX **p : {&tmp.dxr, &tmp.dxk, &tmp.dxv}) take(scratch, p, E);
    for (floatX **p : {&tmp.dr, &tmp.dk, &tmp.dv, &tmp.dy, &tmp.dyn}) take(scratch, p, EA);
    for (float **p : {&tmp.dw_sum, &tmp.du}) take(scratch, p, (int64_t)d.B * d.A);
    if (layer->p.time_decay_w1.rows) { // decays that depend on the data
        take(kept, &a.xw, E), take(kept, &a.w, EA), take(kept, &a.hw, low_rank);
        take(scratch, &tmp.dxw, E), take(scratch, &tmp.dw, EA), take(scratch, &tmp.dh, low_rank);
    }
    if (layer->p.gate.rows) {
        take(kept, &a.xg, E), take(kept, &a.g, EA);
        take(scratch, &tmp.dxg, E), take(scratch, &tmp.dg, EA);
    }
}

static void finch_plan(Model *m, Layer *layer, Arena *kept, Arena *scratch) {
    const Params &p = layer->p;
    Finch &a = layer->finch;
    auto &tmp = a.tmp;
    a.mixed = {.n = 5,
               .rank = (int)m->s.mix_rank,
               .input = {{&p.time_maa_w, &a.xw, &tmp.dxw},
                         {&p.time_maa_k, &a.xk, &tmp.dxk},
                         {&p.time_maa_v, &a.xv, &tmp.dxv},
                         {&p.time_maa_r, &a.xr, &tmp.dxr},
                         {&p.time_maa_g, &a.xg, &tmp.dxg}},
               .mu_x = &p.time_maa_x,
               .w1 = &p.time_maa_w1,
               .w2 = &p.time_maa_w2};
    finch_memory(m->d, layer, kept, scratch);
}

static Wkv finch_wkv(const Model *m, const Layer *layer) {
    const Finch &a = layer->finch;
    const int64_t lead = m->d.lead * (int64_t)m->d.A;
    return {.r = a.r + lead,
            .k = a.k + lead,
            .v = a.v + lead,
            .w = a.w ? a.w + lead : nullptr,
            .time_decay = layer->p.time_decay.w,
            .u = layer->p.time_faaaa.w,
            .v2 = nullptr,
            .one_minus_w = false,
            .states = a.states,
            .carry = layer->wkv_state,
            .T = m->d.T - m->d.lead,
            .H = m->d.H};
}

// From dy: dr, dk, dv, dw, and the gradients of time_decay and time_faaaa
static void finch_wkv_backward(const Model *m, const Layer *layer) {
    const Dims &d = m->d;
    const auto &tmp = layer->finch.tmp;
    wkv_backward({tmp.dy, tmp.dr, tmp.dk, tmp.dv, tmp.dw, tmp.dw_sum, tmp.du}, finch_wkv(m, layer), d.B);
    add_partials({{layer->p.time_decay.g}}, tmp.dw_sum, d.B, 1, d.A);
    add_partials({{layer->p.time_faaaa.g}}, tmp.du, d.B, 1, d.A);
}

static float group_norm_eps(const Model *m) { return (float)(1e-5 * m->s.head_size_divisor * m->s.head_size_divisor); }

static void finch_forward(Model *m, Layer *layer, floatX *out, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Finch &a = layer->finch;
    mixed_inputs_forward(d, a.mixed, x);
    linear_forward(a.r, a.xr, p.receptance, d.BT);
    linear_forward(a.k, a.xk, p.key, d.BT);
    linear_forward(a.v, a.xv, p.value, d.BT);
    linear_forward(a.g, a.xg, p.gate, d.BT);
    low_rank_forward(a.w, a.hw, a.xw, p.time_decay_w1, p.time_decay_w2, d.BT);
    wkv_forward(a.y + d.lead * (int64_t)d.A, finch_wkv(m, layer), d.B);
    gated_group_norm_forward(a.yn, a.y, a.g, p.ln_x, group_norm_eps(m), d.BT);
    linear_forward(out, a.yn, p.output, d.BT);
}

static void finch_backward(Model *m, Layer *layer, floatX *dx, const floatX *dout, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Finch &a = layer->finch;
    auto &tmp = a.tmp;
    linear_backward(m, tmp.dyn, dout, a.yn, p.output, d.BT);
    gated_group_norm_backward(tmp.dy, tmp.dg, tmp.dyn, a.y, a.g, p.ln_x, group_norm_eps(m), m->partial, d.BT);
    finch_wkv_backward(m, layer);
    linear_backward(m, tmp.dxr, tmp.dr, a.xr, p.receptance, d.BT);
    linear_backward(m, tmp.dxk, tmp.dk, a.xk, p.key, d.BT);
    linear_backward(m, tmp.dxv, tmp.dv, a.xv, p.value, d.BT);
    linear_backward(m, tmp.dxg, tmp.dg, a.xg, p.gate, d.BT);
    low_rank_backward(tmp.dxw, tmp.dh, tmp.dw, a.hw, a.xw, p.time_decay_w1, p.time_decay_w2, d.BT);
    mixed_inputs_backward(m, a.mixed, dx, x);
}

// ---- Finch without a gate, x060b ----
//
//     as x060, with i: r, k, v, w (time_maa_rkvw_w1, _w2 in a checkpoint);   out = output LayerNorm_ln_x(y)

static void finch_b_plan(Model *m, Layer *layer, Arena *kept, Arena *scratch) {
    const Params &p = layer->p;
    Finch &a = layer->finch;
    auto &tmp = a.tmp;
    a.mixed = {.n = 4,
               .input = {{&p.time_maa_r, &a.xr, &tmp.dxr},
                         {&p.time_maa_k, &a.xk, &tmp.dxk},
                         {&p.time_maa_v, &a.xv, &tmp.dxv},
                         {&p.time_maa_w, &a.xw, &tmp.dxw}},
               .mu_x = &p.time_maa_x,
               .w1 = &p.time_maa_w1,
               .w2 = &p.time_maa_w2};
    finch_memory(m->d, layer, kept, scratch);
}

static void finch_b_forward(Model *m, Layer *layer, floatX *out, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Finch &a = layer->finch;
    mixed_inputs_forward(d, a.mixed, x);
    linear_forward(a.r, a.xr, p.receptance, d.BT);
    linear_forward(a.k, a.xk, p.key, d.BT);
    linear_forward(a.v, a.xv, p.value, d.BT);
    low_rank_forward(a.w, a.hw, a.xw, p.time_decay_w1, p.time_decay_w2, d.BT);
    wkv_forward(a.y + d.lead * (int64_t)d.A, finch_wkv(m, layer), d.B);
    layernorm_forward(a.yn, a.y, p.ln_x, d.BT);
    linear_forward(out, a.yn, p.output, d.BT);
}

static void finch_b_backward(Model *m, Layer *layer, floatX *dx, const floatX *dout, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Finch &a = layer->finch;
    auto &tmp = a.tmp;
    linear_backward(m, tmp.dyn, dout, a.yn, p.output, d.BT);
    layernorm_backward(tmp.dy, tmp.dyn, a.y, p.ln_x, m->partial, d.BT);
    finch_wkv_backward(m, layer);
    linear_backward(m, tmp.dxr, tmp.dr, a.xr, p.receptance, d.BT);
    linear_backward(m, tmp.dxk, tmp.dk, a.xk, p.key, d.BT);
    linear_backward(m, tmp.dxv, tmp.dv, a.xv, p.value, d.BT);
    low_rank_backward(tmp.dxw, tmp.dh, tmp.dw, a.hw, a.xw, p.time_decay_w1, p.time_decay_w2, d.BT);
    mixed_inputs_backward(m, a.mixed, dx, x);
}

// ---- Eagle (RWKV-5) time mix, x052 ----
//
//     x_i = x * time_mix_i + shift(x) * (1 - time_mix_i),  i: k, v, r, g          nothing depends on the data,
//     r = receptance x_r;  k = key x_k;  v = value x_v;  g = gate x_g
//     y = WKV(r, k, v, time_decay, time_faaaa)                                    nor does the decay
//     out = output (GroupNorm_ln_x(y / head_size_divisor) * silu(g))              H groups, eps 1e-5
//
// The fields are x060's: time_maa_i holds time_mix_i, which is one minus what x060 would mix by.

static void eagle_plan(Model *m, Layer *layer, Arena *kept, Arena *scratch) {
    const Params &p = layer->p;
    Finch &a = layer->finch;
    auto &tmp = a.tmp;
    a.mixed = {.n = 4,
               .input = {{&p.time_maa_k, &a.xk, &tmp.dxk},
                         {&p.time_maa_v, &a.xv, &tmp.dxv},
                         {&p.time_maa_r, &a.xr, &tmp.dxr},
                         {&p.time_maa_g, &a.xg, &tmp.dxg}},
               .complement = true};
    finch_memory(m->d, layer, kept, scratch);
}

static void eagle_forward(Model *m, Layer *layer, floatX *out, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Finch &a = layer->finch;
    mixed_inputs_forward(d, a.mixed, x);
    linear_forward(a.r, a.xr, p.receptance, d.BT);
    linear_forward(a.k, a.xk, p.key, d.BT);
    linear_forward(a.v, a.xv, p.value, d.BT);
    linear_forward(a.g, a.xg, p.gate, d.BT);
    wkv_forward(a.y + d.lead * (int64_t)d.A, finch_wkv(m, layer), d.B);
    gated_group_norm_forward(a.yn, a.y, a.g, p.ln_x, group_norm_eps(m), d.BT);
    linear_forward(out, a.yn, p.output, d.BT);
}

static void eagle_backward(Model *m, Layer *layer, floatX *dx, const floatX *dout, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Finch &a = layer->finch;
    auto &tmp = a.tmp;
    linear_backward(m, tmp.dyn, dout, a.yn, p.output, d.BT);
    gated_group_norm_backward(tmp.dy, tmp.dg, tmp.dyn, a.y, a.g, p.ln_x, group_norm_eps(m), m->partial, d.BT);
    finch_wkv_backward(m, layer);
    linear_backward(m, tmp.dxr, tmp.dr, a.xr, p.receptance, d.BT);
    linear_backward(m, tmp.dxk, tmp.dk, a.xk, p.key, d.BT);
    linear_backward(m, tmp.dxv, tmp.dv, a.xv, p.value, d.BT);
    linear_backward(m, tmp.dxg, tmp.dg, a.xg, p.gate, d.BT);
    mixed_inputs_backward(m, a.mixed, dx, x);
}

// ---- GPTAlpha time mix, gptalpha ----
//
//     x_i = mixed inputs, i: r, k, v
//     q = LayerNorm_ln_r(query x_r);  k = LayerNorm_ln_k(key x_k);  v = LayerNorm_ln_v(value x_v);  q and k rotated
//     out = output LayerNorm_ln_x(causal_attention(q, k, v))

static void attention_plan(Model *m, Layer *layer, Arena *kept, Arena *scratch) { // llama's too
    const Dims &d = m->d;
    const Params &p = layer->p;
    Attention &a = layer->attention;
    auto &tmp = a.tmp;
    const int64_t E = (int64_t)d.BT * d.C, EA = (int64_t)d.BT * d.A;
    for (floatX **to : {&a.q, &a.k, &a.v, &a.y}) take(kept, to, EA);
    take(kept, &a.log_sum, (int64_t)d.BT * d.H);
    for (floatX **to : {&tmp.dq, &tmp.dk, &tmp.dv, &tmp.dy}) take(scratch, to, EA);
    take(scratch, &tmp.delta, (int64_t)d.BT * d.H);
    if (!layer->tmix->mixes) return;
    a.mixed = {.n = 3,
               .input = {{&p.time_maa_r, &a.xq, &tmp.dxq},
                         {&p.time_maa_k, &a.xk, &tmp.dxk},
                         {&p.time_maa_v, &a.xv, &tmp.dxv}},
               .mu_x = &p.time_maa_x,
               .w1 = &p.time_maa_w1,
               .w2 = &p.time_maa_w2};
    mixed_inputs_plan(d, &a.mixed, kept, scratch);
    for (floatX **to : {&a.xq, &a.xk, &a.xv}) take(kept, to, E);
    for (floatX **to : {&a.q0, &a.k0, &a.v0, &a.yn}) take(kept, to, EA);
    for (floatX **to : {&tmp.dxq, &tmp.dxk, &tmp.dxv}) take(scratch, to, E);
    for (floatX **to : {&tmp.dq0, &tmp.dk0, &tmp.dv0, &tmp.dyn}) take(scratch, to, EA);
}

static void attend_forward(Model *m, Layer *layer) { // y from q, k and v
    const Dims &d = m->d;
    Attention &a = layer->attention;
    for (floatX *x : {a.q, a.k}) rope_forward(m, x);
    if (layer->attend) layer->attend(m, layer);
    else attention_forward(a.y, a.log_sum, a.q, a.k, a.v, d.B, d.T, d.H);
}

static void attend_backward(Model *m, Layer *layer) { // dq, dk and dv from dy
    const Dims &d = m->d;
    Attention &a = layer->attention;
    auto &tmp = a.tmp;
    attention_backward(tmp.dq, tmp.dk, tmp.dv, tmp.delta, tmp.dy, a.y, a.log_sum, a.q, a.k, a.v, d.B, d.T, d.H);
    for (floatX *gradient : {tmp.dq, tmp.dk}) rope_backward(m, gradient);
}

static void gptalpha_forward(Model *m, Layer *layer, floatX *out, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Attention &a = layer->attention;
    mixed_inputs_forward(d, a.mixed, x);
    linear_forward(a.q0, a.xq, p.query, d.BT);
    linear_forward(a.k0, a.xk, p.key, d.BT);
    linear_forward(a.v0, a.xv, p.value, d.BT);
    layernorm_forward(a.q, a.q0, p.ln_q, d.BT);
    layernorm_forward(a.k, a.k0, p.ln_k, d.BT);
    layernorm_forward(a.v, a.v0, p.ln_v, d.BT);
    attend_forward(m, layer);
    layernorm_forward(a.yn, a.y, p.ln_x, d.BT);
    linear_forward(out, a.yn, p.output, d.BT);
}

static void gptalpha_backward(Model *m, Layer *layer, floatX *dx, const floatX *dout, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Attention &a = layer->attention;
    auto &tmp = a.tmp;
    linear_backward(m, tmp.dyn, dout, a.yn, p.output, d.BT);
    layernorm_backward(tmp.dy, tmp.dyn, a.y, p.ln_x, m->partial, d.BT);
    attend_backward(m, layer);
    layernorm_backward(tmp.dq0, tmp.dq, a.q0, p.ln_q, m->partial, d.BT);
    layernorm_backward(tmp.dk0, tmp.dk, a.k0, p.ln_k, m->partial, d.BT);
    layernorm_backward(tmp.dv0, tmp.dv, a.v0, p.ln_v, m->partial, d.BT);
    linear_backward(m, tmp.dxq, tmp.dq0, a.xq, p.query, d.BT);
    linear_backward(m, tmp.dxk, tmp.dk0, a.xk, p.key, d.BT);
    linear_backward(m, tmp.dxv, tmp.dv0, a.xv, p.value, d.BT);
    mixed_inputs_backward(m, a.mixed, dx, x);
}

// ---- Llama's attention, llama ----
//
//     q = wq x;  k = wk x;  v = wv x;  q and k rotated;   out = wo causal_attention(q, k, v)           no token shift

static void llama_forward(Model *m, Layer *layer, floatX *out, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Attention &a = layer->attention;
    linear_forward(a.q, x, p.query, d.BT);
    linear_forward(a.k, x, p.key, d.BT);
    linear_forward(a.v, x, p.value, d.BT);
    attend_forward(m, layer);
    linear_forward(out, a.y, p.output, d.BT);
}

static void llama_backward(Model *m, Layer *layer, floatX *dx, const floatX *dout, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    Attention &a = layer->attention;
    auto &tmp = a.tmp;
    linear_backward(m, tmp.dy, dout, a.y, p.output, d.BT);
    attend_backward(m, layer);
    linear_backward(m, dx, tmp.dq, x, p.query, d.BT);
    linear_backward(m, dx, tmp.dk, x, p.key, d.BT, 1);
    linear_backward(m, dx, tmp.dv, x, p.value, d.BT, 1);
}

// ---- Llama's channel mix, llama ----
//
//     out = w2 (silu(w1 x) * (w3 x))            FL = 8C/3 wide, rounded down to a multiple of 32; no token shift

static int llama_width(const Dims &d) { return d.C * 4 * 2 / 3 / 32 * 32; }

static void cmix_llama_plan(Model *m, Layer *layer, Arena *kept, Arena *scratch) {
    CmixLlama &a = layer->ffn_llama;
    const int64_t EF = (int64_t)m->d.BT * llama_width(m->d);
    for (floatX **p : {&a.a, &a.b, &a.k}) take(kept, p, EF);
    for (floatX **p : {&a.tmp.da, &a.tmp.db, &a.tmp.dk}) take(scratch, p, EF);
}

static void cmix_llama_forward(Model *m, Layer *layer, floatX *out, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    CmixLlama &a = layer->ffn_llama;
    const int FL = llama_width(d);
    const int64_t EF = (int64_t)d.BT * FL;
    linear_forward(a.a, x, p.ffn_w1, d.BT);
    linear_forward(a.b, x, p.ffn_w3, d.BT);
    swiglu_forward_kernel<<<pack_blocks(EF), 256, 0, stream>>>(a.k, a.a, a.b, EF);
    linear_forward(out, a.k, p.ffn_w2, d.BT);
}

static void cmix_llama_backward(Model *m, Layer *layer, floatX *dx, const floatX *dout, const floatX *x) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    CmixLlama &a = layer->ffn_llama;
    auto &tmp = a.tmp;
    const int FL = llama_width(d);
    const int64_t EF = (int64_t)d.BT * FL;
    linear_backward(m, tmp.dk, dout, a.k, p.ffn_w2, d.BT);
    swiglu_backward_kernel<<<pack_blocks(EF), 256, 0, stream>>>(tmp.da, tmp.db, tmp.dk, a.a, a.b, EF);
    linear_backward(m, dx, tmp.da, x, p.ffn_w1, d.BT);
    linear_backward(m, dx, tmp.db, x, p.ffn_w3, d.BT, 1);
}

// The mixers, under the names that settings use.

// clang-format off
static const Mixer TIME_MIXERS[] = {
    {.name = "x060c2", .tensors = FINCH_C2, .mixes = 5,
     .plan = finch_c2_plan, .forward = finch_c2_forward, .backward = finch_c2_backward, .remake = finch_c2_remake},
    {.name = "gold", .tensors = GOLD, .needs_cache = true,
     .plan = gold_plan, .forward = gold_forward, .backward = gold_backward, .remake = gold_remake},
    {.name = "x060", .tensors = FINCH, .mixes = 5,
     .plan = finch_plan, .forward = finch_forward, .backward = finch_backward},
    {.name = "x060b", .tensors = FINCH_B, .mixes = 4,
     .plan = finch_b_plan, .forward = finch_b_forward, .backward = finch_b_backward},
    {.name = "x052", .tensors = EAGLE,
     .plan = eagle_plan, .forward = eagle_forward, .backward = eagle_backward},
    {.name = "gptalpha", .tensors = GPTALPHA, .mixes = 3, .keeps_kv = true,
     .plan = attention_plan, .forward = gptalpha_forward, .backward = gptalpha_backward},
    {.name = "llama", .tensors = LLAMA, .keeps_kv = true,
     .plan = attention_plan, .forward = llama_forward, .backward = llama_backward},
};
static const Mixer CHANNEL_MIXERS[] = {
    {.name = "x060", .tensors = CMIX,
     .plan = cmix_plan, .forward = cmix_forward, .backward = cmix_backward},
    {.name = "x052", .tensors = CMIX_EAGLE, .complement = true,
     .plan = cmix_plan, .forward = cmix_forward, .backward = cmix_backward},
    {.name = "llama", .tensors = CMIX_LLAMA,
     .plan = cmix_llama_plan, .forward = cmix_llama_forward, .backward = cmix_llama_backward},
};
// clang-format on

// null if there is none
template <size_t n> static const Mixer *find_mixer(const Mixer (&table)[n], const char *name) {
    for (const Mixer &mixer : table)
        if (strcmp(mixer.name, name) == 0) return &mixer;
    return nullptr;
}

template <size_t n> static const Mixer *check_mixer(const Mixer (&table)[n], const char *key, const char *name) {
    const Mixer *mixer = find_mixer(table, name);
    char known[128] = "";
    for (const Mixer &row : table) snprintf(known + strlen(known), sizeof(known) - strlen(known), " %s", row.name);
    if (!mixer) die(2, "--model.%s: expected one of%s, found \"%s\"", key, known, name);
    return mixer;
}

// First layer of the last ones, which have tmix2 and cmix2
static int second_layers_begin(const Settings *s) {
    const double ratio = s->inv_other_layer_ratio;
    return s->tmix2[0] ? (int)(s->n_layer * (ratio - 1) / ratio) : (int)s->n_layer;
}

// Turns away mixers that do not exist or do not go together; after settings_check.
static void settings_check_mixers(const Settings *s) {
    const Mixer *tmix = check_mixer(TIME_MIXERS, "tmix", s->tmix), *last = tmix;
    check_mixer(CHANNEL_MIXERS, "cmix", s->cmix);
    if (s->tmix2[0]) last = check_mixer(TIME_MIXERS, "tmix2", s->tmix2);
    if (s->cmix2[0]) check_mixer(CHANNEL_MIXERS, "cmix2", s->cmix2);
    const bool rope = s->rope.base > 0, attends = tmix->keeps_kv || last->keeps_kv || last->needs_cache;
    if ((rope || s->brope.rescale > 0) && !attends)
        die(2, "--model.%s: expected 0, as %s has no attention that could use positions, found %g",
            rope ? "rope.base" : "brope.rescale", s->tmix, rope ? s->rope.base : s->brope.rescale);
    if (tmix->needs_cache || (last->needs_cache && second_layers_begin(s) == 0))
        die(2, "--model.%s: '%s' needs a layer before it: n_layer %ld is too small for inv_other_layer_ratio %g",
            tmix->needs_cache ? "tmix" : "tmix2", last->name, s->n_layer, s->inv_other_layer_ratio);
    for (const Mixer *mixer : {tmix, last}) // the kernels of the others have these ranks
        if (mixer->tensors != FINCH && mixer->mixes > 0 && (s->mix_rank != MIX_RANK || s->decay_rank != DECAY_RANK))
            die(2, "blocks.0.att: expected ranks %d and %d with tmix %s, found %ld and %ld", MIX_RANK, DECAY_RANK,
                mixer->name, s->mix_rank, s->decay_rank);
    if (last->needs_cache && s->dim_att != s->n_embd)
        die(2, "--model.dim_att: with gold layers it must be n_embd, %ld, found %ld", s->n_embd, s->dim_att);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. Model: sizes, memory, initial weights; forward, backward, update

// Several GPUs (section 9). With one of them there is one bucket, which is the whole block, and these do nothing.
static void buckets_plan(Model *m);                                  // rounds n_block up
static void ranks_connect_devices(void);                             // before the first allocation
static void gathered_alloc(void **p, int64_t bytes);                 // zeros, for weights: part comes from other ranks
static void gradients_final(Model *m, int part);                     // of this part and those after it, in this step
static void gradients_finish(Model *m);                              // this rank's shard holds the sum over ranks
static void sum_over_ranks(double *sums, int n);                     // on the device
static void weights_spread(Model *m, int bucket);                    // this rank's share of a bucket was updated
static void weights_needed(Model *m, int part);                      // those up to this part will be read
static const float *whole_block(const Model *m, const float *shard); // of m, v or master, until there are gradients
static void bucket_share(const Model *m, int bucket, int64_t *begin, int64_t *end, int64_t *kept); // this rank's

// ---- plan: the table of tensors and the size of every block; nothing is allocated on the device ----

static void add_tensor(Model *m, int layer, Param *field, const char *name, Shape shape, Init init, Group group) {
    Tensor *t = &m->tensors[m->n_tensors];
    if (layer < 0) snprintf(t->name, sizeof(t->name), "%s", name);
    else snprintf(t->name, sizeof(t->name), "blocks.%d.%s", layer, name);
    t->layer = layer;
    t->ndim = shape.ndim;
    t->size = 1;
    int wide = 0; // dimensions other than 1
    for (int i = 0; i < 3; i++) {
        t->shape[i] = shape.size[i];
        t->size *= shape.size[i];
        wide += shape.size[i] > 1;
    }
    t->init = init;
    t->weight_decay = GROUPS[group].weight_decay && wide >= 2;
    t->lr_scale = !m->s.layerwise_lr ? 1 : m->s.train_stage == 2 ? GROUPS[group].rate_stage_2 : GROUPS[group].rate;
    field->ld = field->columns = (int)t->shape[t->ndim - 1];
    field->rows = (int)(t->size / field->columns);
    m->fields[m->n_tensors++] = field;
    m->n_parameters += t->size;
}

static int tensor_part(const Model *m, int i) {
    const Param *field = m->fields[i];
    if (field == &m->top.ln_out.gain || field == &m->top.ln_out.bias || field == &m->top.head) return m->d.L + 1;
    if (field == &m->top.w_kv_cache_a || field == &m->top.w_kv_cache_b) return 1 + m->d.G0;
    return 1 + m->tensors[i].layer;
}

// Where each tensor lies in the block: part by part in the order of the forward pass, so that the backward pass
// finishes the gradients from the end of the block to its beginning.
static void place_tensors(Model *m) {
    m->part_begin = (int64_t *)calloc(m->d.L + 3, sizeof(int64_t));
    for (int part = 0; part < m->d.L + 2; part++) {
        m->part_begin[part] = m->n_block;
        for (int i = 0; i < m->n_tensors; i++) {
            if (part != tensor_part(m, i)) continue;
            m->tensors[i].offset = m->n_block;
            m->n_block += m->tensors[i].size + GUARD_BYTES / (int64_t)sizeof(floatX);
        }
    }
    buckets_plan(m);
    m->part_begin[m->d.L + 2] = m->n_block;
}

static void add_tensors(Model *m, int layer, Params *params, int where, int mixes) {
    const int64_t V = m->d.V, C = m->d.C, A = m->d.A, F = m->d.F, R = m->d.R, H = m->d.H;
    const int64_t rank = gold_rank(m->d), FL = llama_width(m->d);
    const int64_t mix_rank = m->s.mix_rank, decay_rank = m->s.decay_rank;
#define ROW(field, name, sizes, init, group, places) \
    if ((places)&where) add_tensor(m, layer, &params->field, name, shape sizes, init, group);
#define NORM_ROW(field, name, sizes, init, places) \
    ROW(field.gain, name ".weight", sizes, init, VECTOR, places) \
    ROW(field.bias, name ".bias", sizes, constant(0), VECTOR, places)
    TENSORS(ROW, NORM_ROW)
    VARIANTS(ROW, NORM_ROW)
#undef ROW
#undef NORM_ROW
}

static bool has_cache(const Model *m) { return m->layers[m->d.L - 1].tmix->needs_cache; }

// Hands out the activation block; without a base it only measures it. The pieces at the front stay for the whole pass,
// then comes what each layer keeps (enum Remake; with REMAKE_LAYERS all layers but for their inputs share one place),
// then scratch.
//
// Several GPUs, one micro-batch a step: the gradients of a layer come to lie where the layers above it, which are done
// with then, kept their activations. What does not fit there (the head's and the last layer's) follows the layers.
static void model_layout(Model *m, char *base) {
    const Dims &d = m->d;
    const int64_t E = (int64_t)d.BT * d.C, EA = (int64_t)d.BT * d.A;
    Arena arena = {base, 0, true};
    take(&arena, &m->x0, E);
    for (floatX **p : {&m->x_out, &m->xf, &m->branch, &m->dx, &m->dln1, &m->dln2}) take(&arena, p, E);
    if (has_cache(m)) {
        take(&arena, &m->xo, E);
        for (floatX **p : {&m->cache, &m->dcache}) take(&arena, p, (int64_t)d.BT * d.R);
        for (floatX **p : {&m->k0_sum, &m->k0, &m->dk0_sum}) take(&arena, p, EA);
        for (float **p : {&m->dxo, &m->dx0}) take(&arena, p, E);
        take(&arena, &m->dk0, EA);
    }
    // rows of logits at a time: half a GiB in bf16
    m->slice = (int)ceil_div(d.BT, ceil_div((int64_t)d.BT * d.V, 1 << 28));
    take(&arena, &m->logits, (int64_t)m->slice * d.V);
    take(&arena, &m->losses, d.BT);
    take(&arena, &m->right, d.BT);
    int64_t partial = ddlerp_partial_floats(d.C);
    for (int width : {d.C, d.A})
        if (partial < (int64_t)row_blocks(d.BT, width) * 5 * width)
            partial = (int64_t)row_blocks(d.BT, width) * 5 * width;
    take(&arena, &m->partial, partial);
    floatX *ln1 = nullptr; // REMAKE_CHEAP: of the layer at hand
    if (m->s.grad_cp == REMAKE_CHEAP) take(&arena, &ln1, E);
    for (int l = 0; l < d.L; l++) {
        // block 0 reads the embedding itself
        m->layers[l].x = m->x0;
        if (l > 0) take(&arena, &m->layers[l].x, E);
    }
    const int64_t layers_begin = arena.used;
    const bool overlay = n_ranks > 1 && m->s.accumulate_grad_batches == 1 && m->s.grad_cp != REMAKE_LAYERS;
    arena.once = m->s.grad_cp != REMAKE_LAYERS && !overlay;
    int64_t layers_end = arena.used, gradients = arena.used;
    // scratch comes after the last layer's
    for (int pass = 0; pass < 2; pass++) {
        for (int l = 0; l < d.L; l++) {
            Layer *layer = &m->layers[l];
            if (l == 0 || m->s.grad_cp == REMAKE_LAYERS) arena.used = layers_begin;
            Arena scratch = {pass ? base : nullptr, layers_end, false};
            for (floatX **p : {&layer->x_mid, &layer->ln2}) take(&arena, p, E);
            layer->ln1 = ln1;
            if (m->s.grad_cp != REMAKE_CHEAP) take(&arena, &layer->ln1, E);
            layer->tmix->plan(m, layer, &arena, &scratch);
            if (pass && scratch.used > m->activation_bytes) m->activation_bytes = scratch.used;
            scratch.used = layers_end;
            layer->cmix->plan(m, layer, &arena, &scratch);
            if (pass && scratch.used > m->activation_bytes) m->activation_bytes = scratch.used;
            if (!pass && arena.used > layers_end) layers_end = arena.used;
            const int64_t first_free = arena.used - m->part_begin[l + 1] * (int64_t)sizeof(float);
            if (!pass && first_free > gradients) gradients = ceil_div(first_free, 256) * 256;
        }
        if (pass || !overlay) continue;
        const int64_t end = gradients + m->n_block * (int64_t)sizeof(float);
        if (end > layers_end) layers_end = ceil_div(end, 256) * 256;
    }
    m->gradients_at = overlay ? gradients : -1;
}

static void set_batch(Model *m, int B, int T) { // sizes of the micro-batch at hand
    if (B > m->B || T > m->T) die(2, "a batch of %d x %d tokens, expected at most %d x %d", B, T, m->B, m->T);
    m->d.B = B, m->d.T = T, m->d.BT = B * T;
}

static void model_plan(Model *m, const Settings *s, int B, int T) {
    memset(m, 0, sizeof(*m));
    m->s = *s;
    m->B = B, m->T = T;
    m->rope = make_rope(s);
    Dims &d = m->d;
    d.L = (int)s->n_layer, d.C = (int)s->n_embd, d.A = (int)s->dim_att, d.F = (int)s->dim_ffn, d.V = (int)s->vocab_size;
    d.H = d.A / N, d.R = (int)(d.C / s->kv_cache_compression_ratio);
    d.G0 = second_layers_begin(s);
    settings_check_mixers(s);
    if ((int64_t)B * T > INT_MAX / 8)
        die(2, "micro_bsz x ctx_len is %lld tokens, expected at most %d", (long long)B * T, INT_MAX / 8);
    set_batch(m, B, T);
    m->layers = (Layer *)calloc(d.L, sizeof(Layer));
    for (int l = 0; l < d.L; l++) {
        const char *tmix = l >= d.G0 && s->tmix2[0] ? s->tmix2 : s->tmix,
                   *cmix = l >= d.G0 && s->cmix2[0] ? s->cmix2 : s->cmix;
        Layer *layer = &m->layers[l];
        layer->index = l;
        layer->tmix = find_mixer(TIME_MIXERS, tmix);
        layer->cmix = find_mixer(CHANNEL_MIXERS, cmix);
        if (layer->tmix->needs_cache && d.R < 1)
            die(2, "kv_cache_compression_ratio is %g, expected at most n_embd, %d", s->kv_cache_compression_ratio, d.C);
    }
    if (d.C > MAX_C || d.A > MAX_C) die(2, "n_embd and dim_att are %d and %d, expected at most %d", d.C, d.A, MAX_C);
    if (d.V >= 1 << 24) die(2, "vocab_size is %d, expected less than %d", d.V, 1 << 24);
    const int most = 64 * (d.L + 1); // tensors: fewer than 64 a layer
    m->tensors = (Tensor *)calloc(most, sizeof(Tensor));
    m->fields = (Param **)calloc(most, sizeof(Param *));
    add_tensors(m, -1, &m->top, TOP | (has_cache(m) ? KV : 0), 0);
    for (int l = 0; l < d.L; l++) {
        Layer *layer = &m->layers[l];
        add_tensors(m, l, &layer->p, BLOCK | (l == 0 ? FIRST : 0) | layer->tmix->tensors | layer->cmix->tensors,
                    layer->tmix->mixes);
    }
    place_tensors(m);
    model_layout(m, nullptr);
}

static void model_free_plan(Model *m) {
    free(m->layers);
    free(m->tensors);
    free(m->fields);
    free(m->part_begin);
    free(m->buckets.first_piece);
}

// Bytes of the four blocks: weights; gradients; masters and moments; activations.
static void model_bytes(const Model *m, int64_t bytes[4]) {
    bytes[0] = m->n_block * (int64_t)sizeof(floatX);
    bytes[1] = m->gradients_at < 0 ? m->n_block * 4 : 0;
    // FP32: the weights are their own masters
    bytes[2] = m->n_block / n_ranks * (PRECISION_BF16 ? 12 : 8);
    bytes[3] = m->activation_bytes;
}

static const int PANEL = 16; // rows of a matrix that become orthonormal at a time

// Floats that orthonormal_rows needs for the largest of the tensors.
static int64_t init_scratch_floats(const Model *m) {
    int64_t most = 0;
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        if (t->init.kind != ORTHOGONAL && t->init.kind != HEAD_ORTHO) continue;
        const int64_t count = t->shape[0] < t->shape[1] ? t->shape[0] : t->shape[1];
        if (most < t->size + PANEL * count) most = t->size + PANEL * count;
    }
    return most;
}

static int64_t model_total_bytes(const Model *m) {
    int64_t bytes[4];
    model_bytes(m, bytes);
    const int64_t scratch = init_scratch_floats(m) * (int64_t)sizeof(float) + (int64_t)CUBLAS_WORKSPACE;
    return bytes[0] + bytes[1] + bytes[2] + bytes[3] + scratch + (64 << 20); // and what is small
}

static void model_print_memory(const Model *m) {
    int64_t bytes[4];
    model_bytes(m, bytes);
    printf("%-28s %lld\n", "parameters", (long long)m->n_parameters);
    const char *names[4] = {"weights", "gradients", "masters and moments", "activations"};
    if (!PRECISION_BF16) names[2] = "moments";
    if (n_ranks > 1) names[2] = PRECISION_BF16 ? "shard of masters and moments" : "shard of moments";
    if (m->gradients_at >= 0) names[3] = "activations and gradients";
    for (int i = 0; i < 4; i++)
        if (bytes[i]) printf("%-28s %.1f MiB\n", names[i], bytes[i] / 1048576.0);
}

// ---- memory ----

static void device_alloc(void **p, int64_t bytes) {
    CUDA_CHECK(cudaMalloc(p, bytes));
#ifdef CUDA_ON_CPU
    if (cuda_on_cpu::comes_as_zeros(bytes)) return;
#endif
    CUDA_CHECK(cudaMemset(*p, 0, bytes));
}

static void model_too_large(const Model *m, int64_t available) { // says what would fit
    const int64_t missing = model_total_bytes(m) - available;
    char advice[200] = "not even micro_bsz 1 with grad_cp 1 would fit";
    // cp saves at least as much as grad_cp does
    bool more = false;
    for (int cp : {KEEP_ALL, REMAKE_CHEAP, REMAKE_LAYERS}) {
        more = more || cp == m->s.grad_cp;
        if (!more) continue;
        Settings s = m->s;
        s.grad_cp = cp;
        int fits = 0;
        for (int B = m->B; B >= 1 && !fits; B = B > 1 ? B / 2 : 0) {
            Model smaller;
            model_plan(&smaller, &s, B, m->T);
            if (model_total_bytes(&smaller) <= available) fits = B;
            model_free_plan(&smaller);
        }
        if (!fits) continue;
        int n = snprintf(advice, sizeof(advice), "micro_bsz %d", fits);
        if (cp != m->s.grad_cp) n += snprintf(advice + n, sizeof(advice) - n, " with grad_cp %d", cp);
        snprintf(advice + n, sizeof(advice) - n, " would fit");
        if (fits == m->B) break;
    }
    die(2, "%s has %.2f GiB free, %.2f GiB less than needed: %s", machine_name(), available / 1073741824.0,
        missing / 1073741824.0, advice);
}

// The pieces of the block that are this rank's, in the order of the block.
static void model_make_pieces(Model *m) {
    Piece *pieces = nullptr;
    for (int b = 0; b < m->buckets.n; b++) {
        int64_t begin, end, kept;
        m->buckets.first_piece[b] = m->n_pieces;
        bucket_share(m, b, &begin, &end, &kept);
        for (int i = 0, number = 0; i < m->n_tensors; i++) {
            const Tensor *t = &m->tensors[i];
            for (int64_t at = t->offset, next; at < t->offset + t->size; at = next, number++) {
                next = at / PIECE * PIECE + PIECE;
                next = next < t->offset + t->size ? next : t->offset + t->size;
                if (at < begin || at >= end) continue;
                pieces = (Piece *)realloc(pieces, (m->n_pieces + 1) * sizeof(Piece));
                pieces[m->n_pieces++] = {at,     (int)(next - at), (float)t->lr_scale, (float)t->weight_decay,
                                         number, kept + at - begin};
            }
            m->n_squares = number;
        }
    }
    m->buckets.first_piece[m->buckets.n] = m->n_pieces;
    device_alloc((void **)&m->pieces, (m->n_pieces + 1) * sizeof(Piece));
    CUDA_CHECK(cudaMemcpy(m->pieces, pieces, m->n_pieces * sizeof(Piece), cudaMemcpyHostToDevice));
    free(pieces);
}

static void guard_gaps(const Model *m, float *block) { // of a block that no other rank reads
    for (int i = 0; i < m->n_tensors && n_ranks == 1; i++)
        guard_gap(block + m->tensors[i].offset + m->tensors[i].size, GUARD_BYTES);
}

static void model_allocate_weights(Model *m) { // masters, weights, pieces
    const int64_t n_kept = m->n_block / n_ranks;
    device_alloc((void **)&m->master, (PRECISION_BF16 ? n_kept : m->n_block) * sizeof(float));
    m->params = (floatX *)m->master;
    if (PRECISION_BF16) gathered_alloc((void **)&m->params, m->n_block * sizeof(floatX));
    guard_gaps(m, m->master);
    for (int i = 0; i < m->n_tensors; i++) {
        m->fields[i]->w = m->params + m->tensors[i].offset;
        if (PRECISION_BF16 && n_ranks == 1) guard_gap(m->fields[i]->w + m->tensors[i].size, GUARD_BYTES);
    }
    model_make_pieces(m);
}

// and what carries tokens and losses
static void model_allocate_activations(Model *m) {
    device_alloc((void **)&m->activations, m->activation_bytes);
    model_layout(m, m->activations);
    // inputs, targets, ids, starts + 1, order
    const int64_t staged = ((int64_t)m->B * m->T * 5 + 1) * sizeof(int);
    device_alloc((void **)&m->tokens, staged);
    device_alloc((void **)&m->squares, (m->n_squares + 2) * sizeof(double));
    m->totals = m->squares + m->n_squares;
    for (int i = 0; i < 4; i++) {
        CUDA_CHECK(cudaMallocHost((void **)&m->staged[i], staged));
        CUDA_CHECK(cudaEventCreate(&m->staged_done[i]));
    }
}

void model_allocate(Model *m) { // all that training needs
    machine_start();
    ranks_connect_devices();
    size_t available, total;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    if (model_total_bytes(m) > (int64_t)available) model_too_large(m, (int64_t)available);
    model_allocate_weights(m);
    model_allocate_activations(m);
    for (float **block : {&m->moment1, &m->moment2}) {
        device_alloc((void **)block, m->n_block / n_ranks * sizeof(float));
        guard_gaps(m, *block);
    }
    if (m->gradients_at >= 0) m->grads = (float *)(m->activations + m->gradients_at);
    else device_alloc((void **)&m->grads, m->n_block * sizeof(float));
    guard_gaps(m, m->grads);
    for (int i = 0; i < m->n_tensors; i++) m->fields[i]->g = m->grads + m->tensors[i].offset;
    device_alloc((void **)&m->state, sizeof(UpdateState));
    CUDA_CHECK(cudaMallocHost((void **)&m->results, 2 * sizeof(UpdateState)));
    for (int i = 0; i < 3; i++) CUDA_CHECK(cudaEventCreate(&m->result_done[i]));
}

// ---- initial weights (spec section 7) ----

// Random numbers from a hash of (key, i), so that they depend neither on the order of work nor on the number of
// threads.
__host__ __device__ static inline double hash_uniform(uint64_t key, uint64_t i) { // in (0, 1)
    return ((double)(splitmix64(key, i) >> 12) + 0.5) / 4503599627370496.0;       // 52 bits
}

__global__ void fill_normal_kernel(float *x, int64_t n, uint64_t key) { // Box-Muller
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float radius = sqrtf(-2 * logf((float)hash_uniform(key, 2 * i)));
    x[i] = radius * cosf(6.2831853071795865f * (float)hash_uniform(key, 2 * i + 1));
}

// Makes the `count` <= 16 rows of a panel (length n) orthonormal by Gram-Schmidt. One block.
HAS_TWIN __global__ void __launch_bounds__(1024) orthonormalize_panel_kernel(float *panel, int count, int64_t n) {
    __shared__ float2 shared[32];
    for (int row = 0; row < count; row++) {
        float *x = panel + row * n;
        float dots[PANEL] = {};
        for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
            for (int j = 0; j < PANEL; j++)
                if (j < row) dots[j] += x[i] * panel[j * n + i];
        for (int j = 0; j < PANEL; j++)
            if (j < row) dots[j] = block_sum(dots[j], shared);
        for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
            for (int j = 0; j < PANEL; j++)
                if (j < row) x[i] -= dots[j] * panel[j * n + i];
        float squares = 0;
        for (int64_t i = threadIdx.x; i < n; i += blockDim.x) squares += x[i] * x[i];
        const float scale = rsqrtf(block_sum(squares, shared));
        for (int64_t i = threadIdx.x; i < n; i += blockDim.x) x[i] *= scale;
    }
}

static void orthonormalize_panel(float *panel, int count, int64_t n) {
    TWIN(orthonormalize_panel_in_loops(panel, count, n));
    const int threads = n < 32 * 32 ? 32 : n < 32 * 1024 ? (int)ceil_div(n, 1024) * 32 : 1024;
    orthonormalize_panel_kernel<<<1, threads, 0, stream>>>(panel, count, n);
}

// count random orthonormal rows of n >= count numbers into work (count, n) on the device; 16 count more numbers follow
// it.
static void orthonormal_rows(float *work, int count, int n, uint64_t key) {
    float *dots = work + (int64_t)count * n;
    fill_normal_kernel<<<(int)ceil_div((int64_t)count * n, 256), 256, 0, stream>>>(work, (int64_t)count * n, key);
    for (int done = 0; done < count; done += PANEL) {
        const int here = count - done < PANEL ? count - done : PANEL;
        float *panel = work + (int64_t)done * n;
        // twice: a row of which little is left has large errors beside it
        for (int pass = 0; pass < 2; pass++) {
            if (done > 0) { // panel -= (panel doneᵀ) done
                matmul(dots, done, rows(panel, n), columns(work, n), here, done, n);
                matmul(panel, n, rows(dots, done), rows(work, n), here, n, done, 1, 1, 0, -1);
            }
            orthonormalize_panel(panel, here, n);
        }
    }
}

static uint64_t tensor_key(const char *name, uint64_t seed) {
    uint64_t hash = hash_start;
    for (; *name; name++) hash = hash_step(hash, (unsigned char)*name);
    return hash ^ (seed * 0xD6E8FEB86659FD93ull);
}

// x: host, t->size; scratch: on the device
static void tensor_init(const Model *m, const Tensor *t, float *x, float *scratch, uint64_t key) {
    const double L = m->d.L, l = t->layer, C = m->d.C, p = m->d.L > 1 ? l / (L - 1) : 0, q = 1 - l / L;
    const int64_t n = t->size, out = t->shape[0], in = t->shape[1];
    switch (t->init.kind) {
    case CONSTANT:
        for (int64_t i = 0; i < n; i++) x[i] = (float)t->init.a;
        return;
    case CURVE:
        for (int64_t i = 0; i < n; i++) x[i] = (float)(1 - (pow(i / C, t->init.a * q) + t->init.b * p));
        return;
    case POWER:
        for (int64_t i = 0; i < n; i++) x[i] = (float)(pow(i / C, t->init.a * q) + t->init.b * p);
        return;
    case UNIFORM:
#pragma omp parallel for
        for (int64_t i = 0; i < n; i++) x[i] = (float)(t->init.a * (2 * hash_uniform(key, i) - 1));
        return;
    case TIME_DECAY:
        for (int64_t i = 0; i < n; i++) x[i] = (float)(-6 + 5 * pow((double)i / (n - 1), 0.7 + 1.3 * p));
        return;
    case TIME_FAAAA:
        for (int64_t i = 0; i < n; i++) x[i] = (float)(p * (1 - (double)i / (n - 1)) + 0.1 * ((i + 1) % 3 - 1));
        return;
    case LN_X_GAIN:
        for (int64_t i = 0; i < n; i++) x[i] = (float)pow((1 + l) / L, 0.7);
        return;
    case ORTHOGONAL:
    // orthonormal along the shorter side
    case HEAD_ORTHO: {
        const double gain = t->init.kind == ORTHOGONAL ? t->init.a : out > in ? 0.5 * sqrt((double)out / in) : 0.5;
        const int64_t count = out < in ? out : in, length = out < in ? in : out;
        const int64_t most = 16; // rows at a time
        float *q = (float *)malloc(most * length * sizeof(float));
        orthonormal_rows(scratch, (int)count, (int)length, key);
        CUDA_CHECK(cudaStreamSynchronize(stream));
        for (int64_t row = 0; row < count; row += most) {
            const int64_t here = count - row < most ? count - row : most;
            CUDA_CHECK(cudaMemcpy(q, scratch + row * length, here * length * sizeof(float), cudaMemcpyDeviceToHost));
            for (int64_t k = 0; k < here && out < in; k++)
                for (int64_t i = 0; i < length; i++) x[(row + k) * in + i] = (float)(gain * q[k * length + i]);
            for (int64_t i = 0; i < length && out >= in; i++)
                for (int64_t k = 0; k < here; k++) x[i * in + row + k] = (float)(gain * q[k * length + i]);
        }
        free(q);
        return;
    }
    }
}

// A tensor's values on the host (null: zeros) to one of the blocks master, m and v, or to what this rank keeps of it.
static void block_write(const Model *m, float *block, const Tensor *t, const float *values) {
    const bool whole = !PRECISION_BF16 && block == m->master;
    for (int b = 0; b < (whole ? 1 : m->buckets.n); b++) {
        int64_t begin = 0, end = m->n_block, kept = 0;
        if (!whole) bucket_share(m, b, &begin, &end, &kept);
        const int64_t from = begin > t->offset ? begin : t->offset,
                      to = end < t->offset + t->size ? end : t->offset + t->size;
        if (from >= to) continue;
        float *target = block + kept + from - begin;
        const size_t bytes = (to - from) * sizeof(float);
        if (!values) CUDA_CHECK(cudaMemset(target, 0, bytes));
        else CUDA_CHECK(cudaMemcpy(target, values + from - t->offset, bytes, cudaMemcpyHostToDevice));
    }
}

// masters were written: round them again
static void model_params_changed(Model *m) {
    if (PRECISION_BF16 && m->n_pieces)
        round_params_kernel<<<m->n_pieces, 256, 0, stream>>>(m->params, m->master, m->pieces);
    for (int b = 0; b < m->buckets.n; b++) weights_spread(m, b);
    weights_needed(m, m->d.L + 1);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaStreamSynchronize(stream));
}

static void model_init_weights(Model *m, uint64_t seed) {
    float *scratch;
    device_alloc((void **)&scratch, init_scratch_floats(m) * sizeof(float));
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        float *x = (float *)malloc(t->size * sizeof(float));
        tensor_init(m, t, x, scratch, tensor_key(t->name, seed));
        block_write(m, m->master, t, x);
        for (float *moment : {m->moment1, m->moment2})
            if (moment) block_write(m, moment, t, nullptr);
        free(x);
    }
    CUDA_CHECK(cudaFree(scratch));
    model_params_changed(m);
}

// ---- forward ----

// Inference: what a shift sees of the token before comes from `last` into row 0, and the last row goes there
// afterwards.
static void carry_shift(const Model *m, floatX *x, floatX *last) {
    if (!last) return;
    const size_t row = m->d.C * sizeof(floatX);
    CUDA_CHECK(cudaMemcpyAsync(x, last, row, cudaMemcpyDeviceToDevice, stream));
    CUDA_CHECK(cudaMemcpyAsync(last, x + (int64_t)(m->d.BT - 1) * m->d.C, row, cudaMemcpyDeviceToDevice, stream));
}

// From x and ln1: time mixer, ln2, channel mixer. Leaves x_mid, and in m->branch what is still to be added to it.
static void layer_forward(Model *m, Layer *layer) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    const int64_t E = (int64_t)d.BT * d.C;
    carry_shift(m, layer->ln1, layer->tmix_shift);
    layer->tmix->forward(m, layer, m->branch, layer->ln1);
    if (m->s.parallel) { // both mixers see the same x
        add_forward_kernel<<<pack_blocks(E), 256, 0, stream>>>(layer->x_mid, layer->x, m->branch, E);
        layernorm_forward(layer->ln2, layer->x, p.ln2, d.BT);
    } else {
        add_layernorm_forward(layer->ln2, layer->x_mid, layer->x, m->branch, p.ln2, d.BT);
    }
    carry_shift(m, layer->ln2, layer->cmix_shift);
    layer->cmix->forward(m, layer, m->branch, layer->ln2);
}

// x0 = LayerNorm_ln0(emb[token]), xo
static void model_embed(Model *m) {
    const Dims &d = m->d;
    const Params &first = m->layers[0].p;
    weights_needed(m, 1);
    embedding_layernorm_forward(m->x0, m->top.emb.w, m->tokens, first.ln0, d.BT);
    if (has_cache(m)) rms_norm_forward(m->xo, m->x0, d.BT, d.C);
}

// Layers begin..end-1; the first one's x is in place. Every residual sum is made by the norm that reads it first.
static void model_layers(Model *m, int begin, int end) {
    const Dims &d = m->d;
    for (int l = begin; l < end; l++) {
        Layer *layer = &m->layers[l];
        const Params &p = layer->p;
        NamedRange range("layer %d %s forward", l, layer->tmix->name);
        weights_needed(m, 1 + l);
        if (l == begin) layernorm_forward(layer->ln1, layer->x, p.ln1, d.BT);
        else add_layernorm_forward(layer->ln1, layer->x, m->layers[l - 1].x_mid, m->branch, p.ln1, d.BT);
        if (l == d.G0 && has_cache(m) && d.lead == 0) token_cat_forward(m, layer->x);
        layer_forward(m, layer);
    }
}

static void model_final_norm(Model *m) { // xf = LayerNorm_ln_out(x)
    const Dims &d = m->d;
    weights_needed(m, d.L + 1);
    add_layernorm_forward(m->xf, m->x_out, m->layers[d.L - 1].x_mid, m->branch, m->top.ln_out, d.BT);
}

static void model_forward(Model *m) { // the stack of spec section 1
    model_embed(m);
    model_layers(m, 0, m->d.L);
    model_final_norm(m);
}

// Logits of `count` rows of xf, their losses (to m->losses from `row` on), and with scale > 0 their gradients in place.
static void head_and_loss(Model *m, const floatX *xf, const int *targets, int64_t row, int count, float scale) {
    const Dims &d = m->d;
    const int threads = d.V < 4096 ? 64 : 1024;
    linear_forward(m->logits, xf, m->top.head, count);
    TWIN(classifier_in_loops(m->logits, m->losses + row, m->right + row, targets + row, scale, d.V, count));
    classifier_kernel<<<count, threads, 0, stream>>>(m->logits, m->losses + row, m->right + row, targets + row, scale,
                                                     d.V);
}

// Logits, loss and, with scale > 0, their gradients, in slices of rows: dxf goes to m->dln1, the head's gradient is
// added.
static void model_classifier(Model *m, float scale) {
    const Dims &d = m->d;
    NamedRange range("head and loss");
    for (int64_t row = 0; row < d.BT; row += m->slice) {
        const int here = (int)(d.BT - row < m->slice ? d.BT - row : m->slice);
        const floatX *xf = m->xf + row * d.C;
        head_and_loss(m, xf, m->tokens + d.BT, row, here, scale);
        if (scale == 0) continue;
        weight_backward(m->top.head, m->logits, xf, here, m->first_micro_batch && row == 0);
        input_backward(m->dln1 + row * d.C, m->logits, m->top.head, here);
    }
    sum_losses_kernel<<<1, 256, 0, stream>>>(m->totals, m->losses, m->right, d.BT);
}

// ---- backward ----

// In a step's first micro-batch, before a part's gradients are made: clears all but the matrices' (weight_backward).
static void gradients_clear(Model *m, int part) {
    int64_t begin = 0, end = 0; // neighbours in one go
    for (int i = 0; i <= m->n_tensors && m->first_micro_batch; i++) {
        const Tensor *t = &m->tensors[i];
        const bool clears =
            i < m->n_tensors && tensor_part(m, i) == part && (!t->weight_decay || m->fields[i] == &m->top.emb);
        if (clears && t->offset == end) {
            end += t->size;
            continue;
        }
        if (end > begin) CUDA_CHECK(cudaMemsetAsync(m->grads + begin, 0, (end - begin) * sizeof(float), stream));
        begin = clears ? t->offset : 0, end = clears ? t->offset + t->size : 0;
    }
}

// m->dx: of the layer's output, then of its input
static void layer_backward(Model *m, Layer *layer) {
    const Dims &d = m->d;
    const Params &p = layer->p;
    if (m->s.grad_cp == REMAKE_LAYERS) {
        layernorm_forward(layer->ln1, layer->x, p.ln1, d.BT);
        layer_forward(m, layer);
    }
    const floatX *ln2_input = m->s.parallel ? layer->x : layer->x_mid;
    layer->cmix->backward(m, layer, m->dln2, m->dx, layer->ln2);
    if (!m->s.parallel) add_layernorm_backward(m->dx, m->dln2, ln2_input, p.ln2, m->partial, d.BT);
    if (m->s.grad_cp == REMAKE_CHEAP) {
        layernorm_forward(layer->ln1, layer->x, p.ln1, d.BT);
        if (layer->tmix->remake) layer->tmix->remake(m, layer, layer->ln1);
    }
    layer->tmix->backward(m, layer, m->dln1, m->dx, layer->ln1);
    if (m->s.parallel) add_layernorm_backward(m->dx, m->dln2, ln2_input, p.ln2, m->partial, d.BT);
    add_layernorm_backward(m->dx, m->dln1, layer->x, p.ln1, m->partial, d.BT);
}

// after model_classifier with a scale
static void model_backward(Model *m) {
    const Dims &d = m->d;
    const Params &top = m->top, &first = m->layers[0].p;
    const int64_t E = (int64_t)d.BT * d.C;
    if (has_cache(m))
        // A = C here
        for (float *sum : {m->dxo, m->dk0}) CUDA_CHECK(cudaMemsetAsync(sum, 0, E * sizeof(float), stream));
    gradients_clear(m, d.L + 1);
    layernorm_backward(m->dx, m->dln1, m->x_out, top.ln_out, m->partial, d.BT);
    gradients_final(m, d.L + 1);
    for (int l = d.L - 1; l >= 0; l--) {
        NamedRange range("layer %d %s backward", l, m->layers[l].tmix->name);
        gradients_clear(m, 1 + l);
        layer_backward(m, &m->layers[l]);
        if (l == d.G0 && has_cache(m)) token_cat_backward(m, m->dx, m->layers[l].x);
        if (l > 0) gradients_final(m, 1 + l); // not of ln0, among layer 0's
    }
    if (has_cache(m)) rms_norm_backward<true>(m->dx, m->dxo, m->dx0, m->x0, d.BT, d.C);
    gradients_clear(m, 0);
    embedding_layernorm_backward(m->dln1, m->dx, top.emb.w, m->tokens, first.ln0, m->partial, d.BT);
    const int *ids = m->tokens + 2 * d.BT, *starts = ids + m->distinct, *order = starts + m->distinct + 1;
    embedding_backward_kernel<<<dim3(m->distinct, d.C / EMBEDDING_CHANNELS), 8 * EMBEDDING_ROWS, 0, stream>>>(
        top.emb.g, m->dln1, ids, starts, order, d.C);
    gradients_final(m, 0);
}

// ---- a step ----

// Host tokens (B, T + 1) to the device: inputs, targets, and the positions sorted by input id for
// embedding_backward_kernel. mask (B, T + 1): 1 where a token counts as a target; null: all do.
static void stage_tokens(Model *m, const int *tokens, const uint8_t *mask, int B, int T) {
    set_batch(m, B, T);
    const int slot = (int)(m->micro_steps++ % 4), BT = m->d.BT, V = m->d.V;
    CUDA_CHECK(cudaEventSynchronize(m->staged_done[slot])); // its copy of four micro-steps ago
    int *inputs = m->staged[slot], *targets = inputs + BT, *ids = targets + BT;
    for (int b = 0; b < B; b++) {
        memcpy(inputs + (int64_t)b * T, tokens + (int64_t)b * (T + 1), T * sizeof(int));
        memcpy(targets + (int64_t)b * T, tokens + (int64_t)b * (T + 1) + 1, T * sizeof(int));
        for (int t = 0; mask && t < T; t++)
            if (!mask[(int64_t)b * (T + 1) + t + 1]) targets[(int64_t)b * T + t] = -1;
    }
    int *count = (int *)calloc((size_t)V + 1, sizeof(int)); // counting sort, stable
    for (int i = 0; i < BT; i++) count[inputs[i] + 1]++;
    m->distinct = 0;
    for (int id = 0; id < V; id++)
        if (count[id + 1]) ids[m->distinct++] = id;
    for (int id = 0; id < V; id++) count[id + 1] += count[id];
    int *starts = ids + m->distinct, *order = starts + m->distinct + 1;
    for (int i = 0; i < m->distinct; i++) starts[i] = count[ids[i]];
    starts[m->distinct] = BT;
    for (int i = 0; i < BT; i++) order[count[inputs[i]]++] = i;
    free(count);
    const size_t bytes = (3 * (size_t)BT + 2 * m->distinct + 1) * sizeof(int);
    CUDA_CHECK(cudaMemcpyAsync(m->tokens, inputs, bytes, cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaEventRecord(m->staged_done[slot], stream));
}

static void model_step_begin(Model *m) {
    m->first_micro_batch = true;
    CUDA_CHECK(cudaMemsetAsync(m->totals, 0, 2 * sizeof(double), stream));
    m->targets_in_step = m->micro_in_step = 0;
}

// mask: see stage_tokens. step_targets: targets that count in the whole step, of all its micro-batches and ranks, so
// that losses and gradients are means over these.
static void model_micro_step(Model *m, const int *tokens, const uint8_t *mask, int B, int T, int accumulate,
                             int64_t step_targets) {
    m->targets_in_step = step_targets > 0 ? step_targets : 1;
    stage_tokens(m, tokens, mask, B, T);
    m->buckets.sum = ++m->micro_in_step == accumulate;
    model_forward(m);
    model_classifier(m, 1.f / (float)m->targets_in_step);
    model_backward(m);
    m->first_micro_batch = false;
}

static void model_update(Model *m, int64_t step, double lr, double weight_decay) {
    const Settings &s = m->s;
    NamedRange range("optimizer");
    gradients_finish(m);
    squares_of_pieces(m->squares, m->grads, m->pieces, m->n_pieces);
    sum_over_ranks(m->squares, m->n_squares + 2); // a piece's from its rank; and of m->totals
    const float per_target = (float)(1.0 / m->targets_in_step),
                limit = s.gradient_clip_val > 0 ? (float)s.gradient_clip_val : FLT_MAX;
    norm_and_clip_kernel<<<1, 256, 0, stream>>>(m->state, m->squares, m->n_squares, m->totals, per_target, limit);
    const AdamW a = {(float)lr,
                     (float)s.beta1,
                     (float)s.beta2,
                     (float)s.adam_eps,
                     (float)weight_decay,
                     (float)(1 - pow(s.beta1, step + 1.0)),
                     (float)(1 - pow(s.beta2, step + 1.0))};
    for (int b = 0; b < m->buckets.n; b++) {
        const Piece *pieces = m->pieces + m->buckets.first_piece[b];
        const int n = m->buckets.first_piece[b + 1] - m->buckets.first_piece[b];
        if (n)
            adamw_kernel<<<n, 256, 0, stream>>>(m->params, m->master, m->moment1, m->moment2, m->grads, pieces,
                                                m->state, a);
        weights_spread(m, b);
    }
    CUDA_CHECK(cudaGetLastError()); // of all launches of the step
    CUDA_CHECK(cudaMemcpyAsync(&m->results[step % 2], m->state, sizeof(UpdateState), cudaMemcpyDeviceToHost, stream));
    CUDA_CHECK(cudaEventRecord(m->result_done[step % 3], stream));
}

typedef struct StepResult {
    float loss, norm;
} StepResult;

static StepResult model_result(Model *m, int64_t step) {
    CUDA_CHECK(cudaEventSynchronize(m->result_done[step % 3]));
    return {m->results[step % 2].loss, m->results[step % 2].norm};
}

// from the end of step - 1 to that of step, on the device
static double seconds_since_last_step(Model *m, int64_t step) {
    float ms;
    CUDA_CHECK(cudaEventElapsedTime(&ms, m->result_done[(step + 2) % 3], m->result_done[step % 3]));
    return ms * 1e-3;
}

static bool model_step_done(Model *m, int64_t step) { return cudaEventQuery(m->result_done[step % 3]) == cudaSuccess; }

static void model_evaluate(Model *m, const int *tokens, const uint8_t *mask, int B, int T, double *loss_sum,
                           double *correct) {
    double totals[2];
    CUDA_CHECK(cudaMemsetAsync(m->totals, 0, sizeof(totals), stream));
    stage_tokens(m, tokens, mask, B, T);
    model_forward(m);
    model_classifier(m, 0);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaMemcpy(totals, m->totals, sizeof(totals), cudaMemcpyDeviceToHost));
    *loss_sum = totals[0], *correct = totals[1];
}

// rows (n) of device floats in floatX to host floats
static void copy_to_host(float *to, const floatX *from, int64_t n) {
    floatX *raw = (floatX *)malloc(n * sizeof(floatX));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaMemcpy(raw, from, n * sizeof(floatX), cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < n; i++) to[i] = (float)raw[i];
    free(raw);
}

static void model_logits_last(Model *m, const int *tokens, int n, float *logits) { // tokens (n), logits (V)
    int *padded = (int *)calloc(n + 1, sizeof(int));                               // the last target does not matter
    memcpy(padded, tokens, n * sizeof(int));
    stage_tokens(m, padded, nullptr, 1, n);
    free(padded);
    model_forward(m);
    linear_forward(m->logits, m->xf + (int64_t)(n - 1) * m->d.C, m->top.head, 1);
    copy_to_host(logits, m->logits, m->d.V);
}

// Forward and backward flops per token: 6 for every weight in a product (the embedding is none), and the attention's.
static double model_flops_per_token(const Model *m) {
    double flops = 6.0 * (m->n_parameters - (double)m->d.V * m->d.C);
    for (int l = 0; l < m->d.L; l++)
        if (m->layers[l].tmix->needs_cache || m->layers[l].tmix->keeps_kv)
            // 2 products of A T / 2, three times
            flops += 6.0 * m->d.A * m->T;
    return flops;
}

// The activation called `name` in the golden tables, to host floats; false if there is none. After a pass with grad_cp
// 0.
static bool model_activation(Model *m, const char *name, float *out) {
    const Dims &d = m->d;
    const int64_t E = (int64_t)d.BT * d.C;
    char part[64];
    int l;
    if (strcmp(name, "k_cache") == 0 && has_cache(m)) {
        copy_to_host(out, m->k0, (int64_t)d.BT * d.A);
    } else if (strcmp(name, "logits") == 0) {
        for (int64_t row = 0; row < d.BT; row += m->slice) {
            const int here = (int)(d.BT - row < m->slice ? d.BT - row : m->slice);
            linear_forward(m->logits, m->xf + row * d.C, m->top.head, here);
            copy_to_host(out + row * d.V, m->logits, (int64_t)here * d.V);
        }
    } else if (sscanf(name, "blocks.%d.%63s", &l, part) == 2 && l >= 0 && l < d.L) {
        const floatX *after = l + 1 < d.L ? m->layers[l + 1].x : m->x_out, *x_mid = m->layers[l].x_mid;
        const bool att = strcmp(part, "att.out") == 0, ffn = strcmp(part, "ffn.out") == 0;
        if (!att && !ffn && strcmp(part, "out") != 0) return false;
        copy_to_host(out, att ? x_mid : after, E);
        if (!att && !ffn) return true;
        float *before = (float *)malloc(E * sizeof(float)); // a mixer's output: what it added
        copy_to_host(before, att ? m->layers[l].x : x_mid, E);
        for (int64_t i = 0; i < E; i++) out[i] -= before[i];
        free(before);
    } else {
        return false;
    }
    return true;
}

// Runs one micro-batch and names the first tensor, in the order of computation, that is not finite; null if all are.
static const char *model_find_nonfinite(Model *m, const int *tokens, int B, int T) {
    static char found[128];
    const int64_t most = (int64_t)m->B * m->T * (m->d.V > m->d.C ? m->d.V : m->d.C);
    float *values = (float *)malloc((most > m->n_parameters ? most : m->n_parameters) * sizeof(float));
    auto bad = [&](int64_t n) {
        for (int64_t i = 0; i < n; i++)
            if (!isfinite(values[i])) return true;
        return false;
    };
    auto gradient_bad = [&](int i) {
        const Tensor *t = &m->tensors[i];
        CUDA_CHECK(cudaMemcpy(values, m->grads + t->offset, t->size * sizeof(float), cudaMemcpyDeviceToHost));
        snprintf(found, sizeof(found), "gradient of %s", t->name);
        return bad(t->size);
    };
    const int64_t grad_cp = m->s.grad_cp;
    stage_tokens(m, tokens, nullptr, B, T);
    model_forward(m);
    bool yes = false;
    for (int i = 0; i < m->n_tensors && !yes; i++) { // a weight itself?
        snprintf(found, sizeof(found), "%s", m->tensors[i].name);
        copy_to_host(values, m->fields[i]->w, m->tensors[i].size);
        yes = bad(m->tensors[i].size);
    }
    for (int l = 0; l < m->d.L && !yes; l++)
        for (const char *part : {"att.out", "ffn.out", "out"}) {
            if (yes || (grad_cp == REMAKE_LAYERS && // keeps the layers' outputs only
                        strcmp(part, "out") != 0))
                continue;
            snprintf(found, sizeof(found), "blocks.%d.%s", l, part);
            model_activation(m, found, values);
            yes = bad((int64_t)m->d.BT * m->d.C);
        }
    if (!yes) {
        model_activation(m, "logits", values);
        snprintf(found, sizeof(found), "logits");
        yes = bad((int64_t)m->d.BT * m->d.V);
    }
    model_step_begin(m);
    m->micro_in_step = 1; // so that none is the step's last: the gradients are this rank's alone
    model_micro_step(m, tokens, nullptr, B, T, 1, (int64_t)B * T * n_ranks);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    // gradients: head first, then from the last block down
    for (int layer = m->d.L; layer >= -1 && !yes; layer--)
        for (int i = 0; i < m->n_tensors && !yes; i++) {
            const bool head =
                strncmp(m->tensors[i].name, "head", 4) == 0 || strncmp(m->tensors[i].name, "ln_out", 6) == 0;
            if (layer == m->d.L ? head : m->tensors[i].layer == layer) yes = gradient_bad(i);
        }
    free(values);
    return yes ? found : nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. Data: a stream of tokens in a mapped file (binidx, or the bytes of a text), the sampler that draws sequences from
//    it, the validation walk, and the demo: the project's own source text.

typedef struct Dataset {
    LONG_PATH name;       // of the file, for messages
    const uint8_t *bytes; // tokens back to back, little-endian
    int64_t n_tokens, n_documents;
    int code;              // data type as in .idx; 0: text, an id is a byte + 1
    bool allocated;        // bytes are a copy
    bool had_mark;         // of a text: a byte order mark was left out
    int64_t returns, ends; // of a text: carriage returns before a newline, left out; "<|endoftext|>"
} Dataset;

// Bytes of a token by .idx's data type code (1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16); 0: can't hold tokens.
static const int dataset_token_size[9] = {1, 1, 1, 2, 4, 8, 0, 0, 2};

// Says what a file is that can't be what was asked for: one that others' tools put in its place.
static void refuse_stand_ins(const char *path, const uint8_t *bytes, int64_t size) {
    const char *pointer = "version https://git-lfs.github.com/spec/";
    if (size < 1024 && size > (int64_t)strlen(pointer) && memcmp(bytes, pointer, strlen(pointer)) == 0)
        die(2, "%s: expected the file itself, found a pointer of Git LFS to it: `git lfs pull` brings it", path);
}

// As well for a file that begins as no text and no safetensors file does.
static void refuse_archives(const char *path, const uint8_t *bytes, int64_t size) {
    if (size >= 4 && (memcmp(bytes, "PK\3\4", 4) == 0 || memcmp(bytes, "\x80\x02\x8a\x0a", 4) == 0))
        die(2,
            "%s: expected no archive, found a zip or a PyTorch checkpoint: dev/convert.py makes .safetensors of .pth",
            path);
    if (size >= 2 && memcmp(bytes, "\x1f\x8b", 2) == 0)
        die(2, "%s: expected no archive, found a compressed file: `gunzip` opens it", path);
}

// The whole file, read-only.
static const uint8_t *map_opened(int fd, const char *path, int64_t *size) { // fd: of open(path, O_RDONLY)
    struct stat status;
    if (fd < 0 || fstat(fd, &status) != 0) die(2, "%s: %s", path, strerror(errno));
    if (!S_ISREG(status.st_mode)) die(2, "%s: expected a file, found a folder or a device", path);
    *size = status.st_size;
    if (*size == 0) die(2, "%s: the file is empty", path);
    void *bytes = mmap(nullptr, (size_t)*size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (bytes == MAP_FAILED) die(1, "%s: %s", path, strerror(errno));
    close(fd);
    refuse_stand_ins(path, (const uint8_t *)bytes, *size);
    return (const uint8_t *)bytes;
}

static const uint8_t *map_file(const char *path, int64_t *size) { return map_opened(open(path, O_RDONLY), path, size); }

static uint64_t read_u64(const uint8_t *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

// FNV-1a over 8-byte words, its high bits folded back. It tells damaged and mixed up files, not forged ones.
static uint64_t hash_bytes(uint64_t hash, const void *bytes, size_t n) {
    const uint8_t *p = (const uint8_t *)bytes;
    auto add = [&](uint64_t word) {
        hash = hash_step(hash, word);
        hash ^= hash >> 29;
    };
    for (; n >= 8; n -= 8, p += 8) add(read_u64(p));
    uint64_t rest = 0;
    memcpy(&rest, p, n);
    if (n > 0) add(rest);
    return hash;
}

// PREFIX.idx: "MMIDIDX\0\0", u64 version, u8 data type, u64 n sequences, u64 m marks, i32 sizes[n] in tokens, i64
// offsets[n] in bytes, i64 marks[m]: a document is the sequences from one mark to the next, often one, or none. All of
// it is checked against itself and against the size of PREFIX.bin.
static void dataset_open_binidx(Dataset *d, const char *prefix) {
    LONG_PATH path;
    int64_t size, bin_size;
    const char *dot = strrchr(prefix, '.'); // PREFIX.bin is as good a name
    const bool named = dot && (strcmp(dot, ".bin") == 0 || strcmp(dot, ".idx") == 0);
    const int length = (int)(named ? dot - prefix : (ptrdiff_t)strlen(prefix));
    snprintf(path, sizeof(path), "%.*s.idx", length, prefix);
    const uint8_t *idx = map_file(path, &size);
    expect(path, "size", -1, 34, INT64_MAX, size);
    if (memcmp(idx, "MMIDIDX\0\0", 9) != 0) die(2, "%s: magic: expected \"MMIDIDX\", found other bytes", path);
    expect(path, "version", -1, 1, 1, (int64_t)read_u64(idx + 9));
    d->code = idx[17];
    if (d->code < 1 || d->code > 8 || dataset_token_size[d->code] == 0)
        die(2, "%s: data type: expected 1, 2, 3, 4, 5 or 8 (whole numbers), found %d", path, d->code);
    const int64_t n = (int64_t)read_u64(idx + 18), width = dataset_token_size[d->code];
    expect(path, "sequences", -1, 0, size / 12, n);
    const int64_t n_marks = (int64_t)read_u64(idx + 26);
    expect(path, "document marks", -1, 1, size / 8, n_marks);
    expect(path, "size", -1, 34 + 12 * n + 8 * n_marks, 34 + 12 * n + 8 * n_marks, size);
    const uint8_t *sizes = idx + 34, *offsets = sizes + 4 * n, *marks = offsets + 8 * n;
    int64_t tokens = 0, mark = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t length;
        memcpy(&length, sizes + 4 * i, 4);
        expect(path, "sizes", i, 0, INT32_MAX, length);
        expect(path, "offsets", i, tokens * width, tokens * width, (int64_t)read_u64(offsets + 8 * i));
        tokens += length;
    }
    for (int64_t i = 0; i < n_marks; i++) {
        expect(path, "documents", i, mark, i ? n : 0, (int64_t)read_u64(marks + 8 * i));
        mark = (int64_t)read_u64(marks + 8 * i);
    }
    if (mark < n)
        die(2,
            "%s: documents: expected marks up to the last sequence, %ld, found them to end at %ld (lost by a merge?)",
            path, n, mark);
    munmap((void *)idx, (size_t)size);
    snprintf(path, sizeof(path), "%.*s.bin", length, prefix);
    d->bytes = map_file(path, &bin_size);
    expect(path, "size", -1, tokens * width, tokens * width, bin_size);
    snprintf(d->name, sizeof(d->name), "%s", path);
    d->n_tokens = tokens;
    d->n_documents = n_marks - 1;
}

// count tokens from position start. Ids are checked here, as they are used: reading 3 GB at the start would take long.
static void dataset_read(const Dataset *d, int64_t start, int64_t count, int64_t vocab_size, int *out) {
    const int width = dataset_token_size[d->code];
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *p = d->bytes + (start + i) * width;
        int64_t id = 0;
        if (d->code == 0) {
            id = p[0] + 1;
        } else if (d->code == 1) {
            id = p[0];
        } else if (d->code == 2) {
            id = (int8_t)p[0];
        } else if (d->code == 8) {
            uint16_t x;
            memcpy(&x, p, 2);
            id = x;
        } else if (d->code == 3) {
            int16_t x;
            memcpy(&x, p, 2);
            id = x;
        } else if (d->code == 4) {
            int32_t x;
            memcpy(&x, p, 4);
            id = x;
        } else {
            memcpy(&id, p, 8);
        }
        expect(d->name, "token", start + i, 0, vocab_size - 1, id);
        out[i] = (int)id;
    }
}

// The largest prime P <= slots with P mod 3 = 2: i -> i^3 mod P then visits every slot once in P samples.
static int64_t magic_prime(int64_t n_tokens, int64_t ctx_len) {
    for (int64_t p = (n_tokens - 1) / ctx_len; p >= 2; p--) {
        bool prime = p % 3 == 2;
        for (int64_t q = 2; prime && q * q <= p; q++) prime = p % q != 0;
        if (prime) return p;
    }
    return 0;
}

// A ctx_len near this one with which the sampler sees at least 0.99 of the tokens; 0 if there is none.
static int64_t better_ctx_len(int64_t n_tokens, int64_t ctx_len) {
    for (int64_t d = 1; d <= ctx_len / 2; d++)
        for (int64_t other : {ctx_len - d, ctx_len + d})
            if (100 * magic_prime(n_tokens, other) * other >= 99 * n_tokens) return other;
    return 0;
}

// First token of sample i = 1, 2, .. of the whole run: ((floor(P (sqrt 5 - 1) / 2) i^3) mod P) ctx_len, in 128 bits.
static int64_t sample_start(int64_t prime, int64_t ctx_len, int64_t i) {
    unsigned __int128 P = (unsigned __int128)prime, x = (unsigned __int128)i % P;
    unsigned __int128 factor = (unsigned __int128)(int64_t)((double)prime * ((sqrt(5.0) - 1) / 2));
    return (int64_t)(x * x % P * x % P * factor % P) * ctx_len;
}

// ---------------------------------------- the demo's text and other texts

// The path of a file of the project: in the folder of the program, or one or two above it, as for a program in
// build/VARIANT. If it is in none of them, the program's folder and false.
static bool beside_program(PATH path, const char *name) {
    PATH folder;
    const ssize_t n = readlink("/proc/self/exe", folder, sizeof(folder) - 1);
    folder[n > 0 ? n : 0] = '\0';
    for (int up = 0; up < 3; up++) {
        char *slash = strrchr(folder, '/');
        if (!slash) break;
        *slash = '\0';
        if (up == 0) snprintf(path, sizeof(PATH), "%s", folder);
        LONG_PATH there;
        snprintf(there, sizeof(there), "%s/%s", folder, name);
        if (access(there, R_OK) != 0 || strlen(there) >= sizeof(PATH)) continue;
        strcpy(path, there);
        return true;
    }
    return false;
}

// The project's source text, in a fixed order.
static uint8_t *demo_text(int64_t *size) {
    const char *patterns[] = {
        "{train_goldfinch.cu,infer_goldfinch.cu,test_goldfinch.c,prepro_minipile.py,Makefile,README.md}",
        "dev/{,cpu/}{Makefile,*.md,*.cu,*.h,*.c,*.cpp,*.py,*.sh}"};
    PATH folder;
    if (!beside_program(folder, "train_goldfinch.cu"))
        die(2, "--train.data_file: expected one, as the project's source text is not in the program's folder, %s",
            folder);
    *strrchr(folder, '/') = '\0';
    uint8_t *text = nullptr;
    *size = 0;
    for (size_t i = 0; i < sizeof(patterns) / sizeof(patterns[0]); i++) {
        char pattern[sizeof(PATH) + 64];
        snprintf(pattern, sizeof(pattern), "%s/%s", folder, patterns[i]);
        glob_t found;
        if (glob(pattern, GLOB_BRACE, nullptr, &found) != 0) continue;
        for (size_t j = 0; j < found.gl_pathc; j++) {
            int64_t length;
            const uint8_t *bytes = map_file(found.gl_pathv[j], &length);
            text = (uint8_t *)realloc(text, (size_t)(*size + length));
            memcpy(text + *size, bytes, (size_t)length);
            *size += length;
            munmap((void *)bytes, (size_t)length);
        }
        globfree(&found);
    }
    return text;
}

// Holds back a tenth of the text for validation: the middles of equal stretches of 25,000 bytes, so that each part of
// the text has its share.
static void text_split(const Dataset *text, Dataset *train, Dataset *valid) {
    const int64_t n = text->n_tokens, pieces = n / 25000 + 1;
    uint8_t *train_bytes = (uint8_t *)malloc((size_t)n + 1), *valid_bytes = (uint8_t *)malloc((size_t)n + 1);
    *train = *valid = *text;
    train->n_tokens = valid->n_tokens = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t in_stretch = i * pieces % n; // 0 .. n - 1 within each stretch
        bool held_back = in_stretch >= n * 9 / 20 && in_stretch < n * 11 / 20;
        if (held_back) valid_bytes[valid->n_tokens++] = text->bytes[i];
        else train_bytes[train->n_tokens++] = text->bytes[i];
    }
    train->bytes = train_bytes;
    valid->bytes = valid_bytes;
}

// What counting gets: nats per byte of text under the counts of up to two bytes of context in the training text, each
// order mixed with the one below by Witten and Bell's rule: p_k = (count + kinds p_(k-1)) / (total + kinds), kinds the
// number of different bytes seen after the context.
static double order2_loss(const Dataset *train, const Dataset *text) {
    const size_t contexts[3] = {1, 256, 65536};
    uint32_t *count[3], *total[3], *kinds[3];
    for (int k = 0; k < 3; k++) {
        count[k] = (uint32_t *)calloc(contexts[k] * 256, sizeof(uint32_t));
        total[k] = (uint32_t *)calloc(contexts[k], sizeof(uint32_t));
        kinds[k] = (uint32_t *)calloc(contexts[k], sizeof(uint32_t));
    }
    for (int64_t i = 2; i < train->n_tokens; i++) {
        const uint8_t *b = train->bytes + i;
        const size_t context[3] = {0, b[-1], b[-2] * (size_t)256 + b[-1]};
        for (int k = 0; k < 3; k++) {
            if (count[k][context[k] * 256 + b[0]]++ == 0) kinds[k][context[k]]++;
            total[k][context[k]]++;
        }
    }
    double sum = 0;
    for (int64_t i = 2; i < text->n_tokens; i++) {
        const uint8_t *b = text->bytes + i;
        const size_t context[3] = {0, b[-1], b[-2] * (size_t)256 + b[-1]};
        double p = 1.0 / 256;
        for (int k = 0; k < 3; k++) {
            const uint32_t n = total[k][context[k]], different = kinds[k][context[k]];
            if (n > 0) p = (count[k][context[k] * 256 + b[0]] + different * p) / (n + different);
        }
        sum -= log(p);
    }
    for (int k = 0; k < 3; k++) {
        free(count[k]);
        free(total[k]);
        free(kinds[k]);
    }
    return sum / (double)(text->n_tokens - 2);
}

// ---------------------------------------- what a run trains and validates on

typedef struct Data {
    Dataset train, valid;                            // valid.n_tokens is 0 where there is none
    Dataset train_mask, valid_mask;                  // u8 a token; bytes null: every token counts as a target
    int64_t file_tokens, ctx_len, vocab_size, prime; // file_tokens: data_file's, what is held back included
    uint64_t hash;                                   // of data_file and mask_file
    bool text, held_back;                            // held_back: valid was cut out of data_file
} Data;

static int64_t count_of(const char *what, const uint8_t *text, const uint8_t *end) {
    const size_t n = strlen(what);
    int64_t count = 0;
    for (const uint8_t *at = (const uint8_t *)memmem(text, (size_t)(end - text), what, n); at; count++)
        at = (const uint8_t *)memmem(at + n, (size_t)(end - at) - n, what, n);
    return count;
}

// A text, as UTF-8 with "\n" at the end of a line: a byte order mark and the "\r" of every "\r\n" are left out.
static void dataset_open_text(Dataset *d, const char *name) {
    int64_t size;
    const uint8_t *file = map_file(name, &size);
    snprintf(d->name, sizeof(d->name), "%s", name);
    refuse_archives(name, file, size);
    if (size >= 2 && (memcmp(file, "\xFF\xFE", 2) == 0 || memcmp(file, "\xFE\xFF", 2) == 0))
        die(2, "%s: expected UTF-8, found UTF-16: `iconv -f UTF-16 -t UTF-8` turns it", name);
    d->had_mark = size >= 3 && memcmp(file, "\xEF\xBB\xBF", 3) == 0;
    const uint8_t *from = file + (d->had_mark ? 3 : 0), *end = file + size;
    d->returns = count_of("\r\n", from, end);
    d->ends = count_of("<|endoftext|>", from, end);
    d->bytes = from;
    d->n_tokens = end - from - d->returns;
    if (d->returns == 0) return;
    uint8_t *text = (uint8_t *)malloc((size_t)d->n_tokens), *to = text;
    for (; from < end; from++)
        if (from[0] != '\r' || from + 1 == end || from[1] != '\n') *to++ = *from;
    munmap((void *)file, (size_t)size);
    d->bytes = text;
    d->allocated = true;
}

static void dataset_open(Dataset *d, const Settings *s, const char *name) {
    memset(d, 0, sizeof(*d));
    if (strcmp(s->data_type, "binidx") == 0) dataset_open_binidx(d, name);
    else dataset_open_text(d, name);
}

// Of 64 places of 4 KiB, evenly spread, or of all where that is less: tells that a file was changed, most of the time.
static uint64_t dataset_hash(const Dataset *d) {
    const int64_t n = d->n_tokens * dataset_token_size[d->code], places = 64, length = 4096;
    if (n <= places * length) return hash_bytes(hash_start, d->bytes, (size_t)n);
    uint64_t hash = hash_start;
    for (int64_t i = 0; i < places; i++)
        hash = hash_bytes(hash, d->bytes + (n - length) / (places - 1) * i, (size_t)length);
    return hash;
}

// Which tokens count as targets: beside a dataset, as long as it.
static void mask_open(Dataset *mask, const char *prefix, const Dataset *beside, const char *setting) {
    if (!prefix[0]) return;
    if (beside->code == 0) die(2, "--train.%s: expected with data_type binidx alone, found it beside a text", setting);
    dataset_open_binidx(mask, prefix);
    expect(mask->name, "data type, 1 for u8", -1, 1, 1, mask->code);
    expect(mask->name, "tokens, as many as the data", -1, beside->n_tokens, beside->n_tokens, mask->n_tokens);
}

static void mask_read(const Dataset *mask, int64_t start, int64_t count, uint8_t *out) {
    for (int64_t i = 0; i < count; i++) {
        out[i] = mask->bytes[start + i];
        if (out[i] > 1) expect(mask->name, "token", start + i, 0, 1, out[i]);
    }
}

static void data_open(Data *data, const Settings *s) {
    memset(data, 0, sizeof(*data));
    data->ctx_len = s->ctx_len;
    data->vocab_size = s->vocab_size;
    data->text = strcmp(s->data_type, "utf-8") == 0;
    if (s->data_file[0]) {
        dataset_open(&data->train, s, s->data_file);
    } else if (data->text) {
        data->train.bytes = demo_text(&data->train.n_tokens);
        data->train.allocated = true;
        snprintf(data->train.name, sizeof(data->train.name), "the project's own source text");
    } else {
        die(2, "--train.data_file: expected the PREFIX of a binidx pair, found nothing");
    }
    data->file_tokens = data->train.n_tokens;
    data->hash = dataset_hash(&data->train);
    if (s->validation_data_file[0]) {
        dataset_open(&data->valid, s, s->validation_data_file);
    } else if (data->text) {
        Dataset train, valid;
        text_split(&data->train, &train, &valid);
        data->held_back = valid.n_tokens > s->ctx_len; // fewer could not be used
        if (!data->held_back) {
            free((void *)train.bytes);
            free((void *)valid.bytes);
        } else {
            if (data->train.allocated) free((void *)data->train.bytes);
            data->train = train, data->valid = valid;
        }
    }
    expect(data->train.name, "tokens, at least 2 ctx_len + 1", -1, 2 * s->ctx_len + 1, INT64_MAX, data->train.n_tokens);
    if (s->validation_data_file[0])
        expect(data->valid.name, "tokens, at least ctx_len + 1", -1, s->ctx_len + 1, INT64_MAX, data->valid.n_tokens);
    data->prime = magic_prime(data->train.n_tokens, s->ctx_len);
    mask_open(&data->train_mask, s->mask_file, &data->train, "mask_file");
    if (data->train_mask.bytes) data->hash ^= dataset_hash(&data->train_mask);
    if (s->validation_mask_file[0] && !s->validation_data_file[0])
        die(2, "--train.validation_mask_file: expected with a validation_data_file, found none");
    mask_open(&data->valid_mask, s->validation_mask_file, &data->valid, "validation_mask_file");
}

static void dataset_print_changes(const Dataset *d) { // what a reader of the file might not expect
    if (d->had_mark) printf("           %s: its byte order mark is left out\n", d->name);
    if (d->returns) printf("           %s: %ld times \\r\\n, taken as \\n\n", d->name, d->returns);
    if (d->ends)
        printf("           %s: %ld times <|endoftext|>, which is text like other text here\n", d->name, d->ends);
}

static void data_print(const Data *data) {
    const Dataset *train = &data->train, *valid = &data->valid;
    printf("data       %s: %ld tokens", train->name, train->n_tokens);
    if (train->n_documents) printf(" in %ld documents", train->n_documents);
    printf(", magic prime %ld; validation: ", data->prime);
    if (data->held_back) printf("%ld tokens held back\n", valid->n_tokens);
    else if (valid->n_tokens) printf("%s, %ld tokens\n", valid->name, valid->n_tokens);
    else if (data->text) printf("none, as a tenth of the text is less than ctx_len + 1 tokens\n");
    else printf("none\n");
    dataset_print_changes(train);
    if (valid->n_tokens && !data->held_back) dataset_print_changes(valid);

    const int64_t slots = (train->n_tokens - 1) / data->ctx_len;
    if (100 * data->prime >= 99 * slots) return;
    const int64_t other = better_ctx_len(train->n_tokens, data->ctx_len);
    char remedy[64] = "more text helps";
    if (other) snprintf(remedy, sizeof(remedy), "--model.ctx_len %ld would see nearly all", other);
    fprintf(stderr, "%s: %s: the sampler sees %ld of %ld stretches of ctx_len tokens, a prime number of them; %s\n",
            program_name, train->name, data->prime, slots, remedy);
}

// B training samples, number first, first + 1, .. (from 1, over the whole run): tokens and, if there is a mask, mask
// (B, ctx_len + 1).
static void data_batch(const Data *data, int64_t first, int B, int *tokens, uint8_t *mask) {
    const int64_t row = data->ctx_len + 1;
    for (int b = 0; b < B; b++) {
        const int64_t start = sample_start(data->prime, data->ctx_len, first + b);
        dataset_read(&data->train, start, row, data->vocab_size, tokens + b * row);
        if (mask) mask_read(&data->train_mask, start, row, mask + b * row);
    }
}

// Targets that count in n training samples; the first token of each is none.
static int64_t data_targets(const Data *data, int64_t first, int64_t n) {
    int64_t count = 0;
    for (int64_t i = first; data->train_mask.bytes && i < first + n; i++) {
        const uint8_t *mask = data->train_mask.bytes + sample_start(data->prime, data->ctx_len, i);
        for (int64_t t = 1; t <= data->ctx_len; t++) count += mask[t];
    }
    return data->train_mask.bytes ? count : n * data->ctx_len;
}

// The validation set is walked in steps of ctx_len + 1; a rest at the end is left out.
static int64_t data_validation_samples(const Data *data) { return data->valid.n_tokens / (data->ctx_len + 1); }

// tokens, mask (B, ctx_len + 1); mask: null if there is none.
static void data_validation_batch(const Data *data, int64_t first, int B, int *tokens, uint8_t *mask) {
    const int64_t row = data->ctx_len + 1;
    dataset_read(&data->valid, first * row, B * row, data->vocab_size, tokens);
    if (mask) mask_read(&data->valid_mask, first * row, B * row, mask);
}

// Targets that count in the first `samples` of these.
static int64_t data_validation_targets(const Data *data, int64_t samples) {
    const int64_t row = data->ctx_len + 1;
    if (!data->valid_mask.bytes) return samples * data->ctx_len;
    int64_t count = 0;
    for (int64_t i = 0; i < samples * row; i++) count += i % row > 0 && data->valid_mask.bytes[i];
    return count;
}

// ---------------------------------------------------------------------------------------------------------------------
// 8. Checkpoints: safetensors files, that is u64 length of a header, the header in JSON ({"NAME": {"dtype": "F32",
//    "shape": [..], "data_offsets": [begin, end]}, .., "__metadata__": {KEY: TEXT}}), the tensors' bytes.
//
//    A checkpoint after step 123 is a pair in the run's folder: model_000123.safetensors holds the weights under the
//    reference's names, state_000123.safetensors all else that the run goes on from: the fp32 masters and AdamW's
//    moments as master.NAME, m.NAME, v.NAME. Both carry the settings, the step and the hash of their bytes, and the
//    state carries its model's hash too. Both are written and synced under temporary names, then the state is renamed,
//    then the model, and only then the pair before is removed: where a model file stands, its state stands beside it.

// ---------------------------------------- one way to write a file

// What stands under the name stays whole until the new file is: that is written beside it under a temporary name,
// checked, synced and renamed. Temporary files that don't get so far go when the program ends, however it does that.
// Devices and pipes are written directly.
typedef struct FileOut {
    FILE *stream;
    char *path, *target, *temporary; // target: path, or where a link leads; temporary: null for devices and pipes
    struct FileOut *next;            // another one that is not finished
} FileOut;

static FileOut *unfinished_files = nullptr;

static void remove_unfinished_files(void) {
    for (const FileOut *f = unfinished_files; f; f = f->next)
        if (f->temporary) unlink(f->temporary);
}

static void file_begin(FileOut *f, const char *path) {
    static bool first = true;
    struct stat before;
    memset(f, 0, sizeof(*f));
    const bool exists = stat(path, &before) == 0;
    if (exists && S_ISDIR(before.st_mode)) die(2, "%s: expected a file, found a folder", path);
    f->path = strdup(path);
    f->target = exists ? realpath(path, nullptr) : strdup(path);
    if (!f->target) die(1, "%s: %s", path, strerror(errno));
    if ((!exists || S_ISREG(before.st_mode)) && asprintf(&f->temporary, "%s.%d.tmp", f->target, (int)getpid()) < 0)
        die(1, "%s: out of memory", path);
    f->stream = fopen(f->temporary ? f->temporary : path, "wb");
    if (!f->stream) die(1, "%s: could not be written: %s", path, strerror(errno));
    if (exists && f->temporary && fchmod(fileno(f->stream), before.st_mode & 0777) != 0)
        die(1, "%s: could not be written: %s", path, strerror(errno));
    f->next = unfinished_files;
    unfinished_files = f;
    if (first) atexit(remove_unfinished_files);
    first = false;
}

static void file_write(FileOut *f, const void *bytes, size_t n) {
    if (fwrite(bytes, 1, n, f->stream) != n) die(1, "%s: could not be written: %s", f->path, strerror(errno));
}

// A hole, which reads as zeros and takes no room on the disk
static void file_write_zeros(FileOut *f, size_t n) {
    if (f->temporary && n > 0 && fseek(f->stream, (long)n - 1, SEEK_CUR) == 0) n = 1;
    for (; n > 0; n--) file_write(f, "", 1);
}

// The first half of file_end: all bytes are on the disk, under the temporary name.
static void file_sync(FileOut *f) {
    const bool written = fflush(f->stream) == 0 && !ferror(f->stream);
    const bool synced = !f->temporary || fsync(fileno(f->stream)) == 0 || errno == EINVAL; // not all file systems can
    if (!written || !synced || fclose(f->stream) != 0) die(1, "%s: could not be written: %s", f->path, strerror(errno));
}

// The second half: the file has its name, and the folder with it is on the disk.
static void file_rename(FileOut *f) {
    if (f->temporary && rename(f->temporary, f->target) != 0)
        die(1, "%s: could not be renamed: %s", f->temporary, strerror(errno));
    FileOut **link = &unfinished_files;
    while (*link != f) link = &(*link)->next;
    *link = f->next;
    char *end = strrchr(f->target, '/');
    if (end) end[1] = '\0';
    const int folder = open(end ? f->target : ".", O_RDONLY);
    if (folder >= 0 && fsync(folder) != 0 && errno == EIO) die(1, "%s: its folder: %s", f->path, strerror(errno));
    if (folder >= 0) close(folder);
    free(f->path);
    free(f->target);
    free(f->temporary);
}

static void file_end(FileOut *f) {
    file_sync(f);
    file_rename(f);
}

static void check_stdout(void) { // at the end of the program: what was printed has come to where it goes
    struct stat status;
    const bool pipe = fstat(STDOUT_FILENO, &status) == 0 && (S_ISFIFO(status.st_mode) || S_ISSOCK(status.st_mode));
    const bool failed = ferror(stdout);
    if ((fclose(stdout) == 0 && !failed) || pipe) return; // a pipe fails where its reader has seen enough
    fprintf(stderr, "%s: stdout: could not be written: %s\n", program_name, strerror(errno));
    _exit(1);
}

// The first call of every main.
static void program_begin(const char *name) {
    program_name = name;
    int null; // a file of ours must not get the number of a closed stdout, where printf would write to it
    do null = open("/dev/null", O_RDWR);
    while (null >= 0 && null <= STDERR_FILENO);
    close(null);
    signal(SIGXFSZ, SIG_IGN); // too large a file (ulimit -f) is an error like others
    atexit(check_stdout);
}

// ---------------------------------------- what a checkpoint's file holds

// Where reading goes on after an error, for whoever answers with its message and does not end.
typedef struct JsonError {
    jmp_buf back;
    char message[sizeof(LONG_PATH) + 256];
} JsonError;
// The reader of JSON, which section 11 has for config files. Strings are unescaped in place.
// the text ends with '\0'; part: of the file; error: null where an error ends the program
typedef struct Json {
    char *at, *start;
    const char *path, *part;
    JsonError *error;
} Json;
[[noreturn]] static void json_fail(const Json *j, const char *expected);
static char json_peek(Json *j); // the next character that is not white space
static void json_expect(Json *j, char c);
static bool json_more(Json *j, char close); // after an item: true if a comma announces another one
static int64_t json_integer(Json *j);
static char *json_string(Json *j);

typedef struct FileTensor {
    char *name, *dtype;
    int ndim;
    int64_t shape[8], begin, end; // begin, end: bytes within data
} FileTensor;

typedef struct SafeTensors {
    LONG_PATH path;
    char *header; // its copy; names and texts point into it
    FileTensor *tensors;
    int n_tensors, n_metadata;
    char **metadata; // key, value, key, value, ..
    const uint8_t *file, *data;
    int64_t file_size, data_size;
} SafeTensors;

static int64_t dtype_size(const char *dtype) { // bytes; 0 if unknown
    const char *names[] = {"F64", "I64", "U64", "F32", "I32", "U32", "F16", "BF16", "I16", "U16", "I8", "U8", "BOOL"};
    const int sizes[] = {8, 8, 8, 4, 4, 4, 2, 2, 2, 2, 1, 1, 1};
    for (int i = 0; i < 13; i++)
        if (strcmp(dtype, names[i]) == 0) return sizes[i];
    return 0;
}

static void json_tensor(Json *j, FileTensor *t) {
    t->ndim = -1;
    t->begin = -1;
    json_expect(j, '{');
    do {
        const char *field = json_string(j);
        json_expect(j, ':');
        if (strcmp(field, "dtype") == 0) {
            t->dtype = json_string(j);
        } else if (strcmp(field, "shape") == 0) {
            t->ndim = 0;
            json_expect(j, '[');
            if (json_peek(j) == ']') {
                j->at++;
                continue;
            }
            do {
                if (t->ndim == 8) die(2, "%s: tensor %s: shape: expected at most 8 dimensions", j->path, t->name);
                t->shape[t->ndim++] = json_integer(j);
            } while (json_more(j, ']'));
        } else if (strcmp(field, "data_offsets") == 0) {
            json_expect(j, '[');
            t->begin = json_integer(j);
            json_expect(j, ',');
            t->end = json_integer(j);
            json_expect(j, ']');
        } else {
            die(2, "%s: tensor %s: expected dtype, shape and data_offsets, found %s", j->path, t->name, field);
        }
    } while (json_more(j, '}'));
    const char *missing = !t->dtype ? "dtype" : t->ndim < 0 ? "shape" : t->begin < 0 ? "data_offsets" : nullptr;
    if (missing) die(2, "%s: tensor %s: expected a field %s, found none", j->path, t->name, missing);
}

static int compare_begins(const void *a, const void *b) {
    const FileTensor *x = (const FileTensor *)a, *y = (const FileTensor *)b;
    return x->begin != y->begin ? (x->begin < y->begin ? -1 : 1) : x->end < y->end ? -1 : x->end > y->end;
}

static const FileTensor *safetensors_find(const SafeTensors *f, const char *name) {
    for (int i = 0; i < f->n_tensors; i++)
        if (strcmp(f->tensors[i].name, name) == 0) return &f->tensors[i];
    return nullptr;
}

static const char *safetensors_metadata(const SafeTensors *f, const char *key) {
    for (char **pair = f->metadata; pair < f->metadata + 2 * f->n_metadata; pair += 2)
        if (strcmp(pair[0], key) == 0) return pair[1];
    return nullptr;
}

static int64_t safetensors_number(const SafeTensors *f, const char *key) {
    const char *text = safetensors_metadata(f, key);
    char *end = nullptr;
    int64_t value = text ? strtoll(text, &end, 10) : 0;
    if (!text || end == text || *end || value < 0)
        die(2, "%s: metadata, field %s: expected a number, found %s", f->path, key, text ? text : "nothing");
    return value;
}

// Opens and checks all of the header: sizes, every field, and that the tensors cover the data without gap or overlap.
static void safetensors_opened(SafeTensors *f, int fd, const char *path) { // fd: of open(path, O_RDONLY)
    memset(f, 0, sizeof(*f));
    snprintf(f->path, sizeof(f->path), "%s", path);
    f->file = map_opened(fd, path, &f->file_size);
    refuse_archives(path, f->file, f->file_size);
    expect(path, "size", -1, 10, INT64_MAX, f->file_size);
    const int64_t length = (int64_t)read_u64(f->file);
    expect(path, "header length", -1, 2, f->file_size - 8, length);
    f->header = strndup((const char *)f->file + 8, (size_t)length);
    expect(path, "header, bytes before a zero", -1, length, length, (int64_t)strlen(f->header));
    f->data = f->file + 8 + length;
    f->data_size = f->file_size - 8 - length;
    Json json = {f->header, f->header, path, "header, ", nullptr}, *j = &json;
    json_expect(j, '{');
    if (json_peek(j) == '}') {
        j->at++;
    } else do {
            char *name = json_string(j);
            json_expect(j, ':');
            if (strcmp(name, "__metadata__") != 0) {
                if (safetensors_find(f, name)) die(2, "%s: tensor %s: expected once, found twice", path, name);
                f->tensors = (FileTensor *)realloc(f->tensors, (size_t)(f->n_tensors + 1) * sizeof(FileTensor));
                memset(&f->tensors[f->n_tensors], 0, sizeof(FileTensor));
                f->tensors[f->n_tensors].name = name;
                json_tensor(j, &f->tensors[f->n_tensors++]);
                continue;
            }
            json_expect(j, '{');
            if (json_peek(j) == '}') {
                j->at++;
                continue;
            }
            do {
                f->metadata = (char **)realloc(f->metadata, (size_t)(f->n_metadata + 1) * 2 * sizeof(char *));
                f->metadata[2 * f->n_metadata] = json_string(j);
                json_expect(j, ':');
                f->metadata[2 * f->n_metadata++ + 1] = json_string(j);
            } while (json_more(j, '}'));
        } while (json_more(j, '}'));
    if (json_peek(j) != '\0') json_fail(j, "the end");

    if (f->n_tensors) qsort(f->tensors, (size_t)f->n_tensors, sizeof(FileTensor), compare_begins);
    int64_t position = 0;
    for (int i = 0; i < f->n_tensors; i++) {
        const FileTensor *t = &f->tensors[i];
        int64_t bytes = dtype_size(t->dtype);
        if (bytes == 0)
            die(2, "%s: tensor %s: dtype: expected F32, BF16 or the like, found %s", path, t->name, t->dtype);
        for (int k = 0; k < t->ndim; k++)
            if (__builtin_mul_overflow(bytes, t->shape[k], &bytes))
                die(2, "%s: tensor %s: shape: expected fewer than 2^63 bytes", path, t->name);
        if (t->begin != position || t->end < t->begin || t->end - t->begin != bytes || t->end > f->data_size) {
            die(2, "%s: tensor %s: data_offsets: expected [%ld, %ld] within %ld bytes of data, found [%ld, %ld]", path,
                t->name, position, position + bytes, f->data_size, t->begin, t->end);
        }
        position = t->end;
    }
    expect(path, "bytes of data", -1, position, position, f->data_size);
}

static void safetensors_open(SafeTensors *f, const char *path) { safetensors_opened(f, open(path, O_RDONLY), path); }

// Whether the data's hash is the one in the metadata; true for files by others, which have none. found: room for 17.
static bool safetensors_intact(const SafeTensors *f, char *found) {
    const char *hash = safetensors_metadata(f, "hash");
    uint64_t h = hash_start;
    if (!hash) return true;
    for (int i = 0; i < f->n_tensors; i++)
        h = hash_bytes(h, f->data + f->tensors[i].begin, (size_t)(f->tensors[i].end - f->tensors[i].begin));
    snprintf(found, 17, "%016lx", h);
    return strcmp(hash, found) == 0;
}

static void safetensors_close(SafeTensors *f) {
    munmap((void *)f->file, (size_t)f->file_size);
    free(f->header);
    free(f->tensors);
    free(f->metadata);
}

// ---------------------------------------- writing

typedef struct FileBlock { // one of the model's blocks
    const char *prefix, *dtype;
    const float *sharded; // device memory: a shard of it, or
    const void *whole;    // all; neither: zeros
    int64_t width;        // bytes of an element
} FileBlock;

static void json_print(FILE *out, const char *text) {
    fputc('"', out);
    for (const char *c = text; *c; c++)
        if ((unsigned char)*c < ' ') fprintf(out, "\\u%04x", *c);
        else fprintf(out, *c == '"' || *c == '\\' ? "\\%c" : "%c", *c);
    fputc('"', out);
}

static const char *block_to_write(const Model *m, const FileBlock *block) {
    return (const char *)(block->whole ? block->whole : whole_block(m, block->sharded));
}

typedef struct Progress {
    int64_t step, samples, tokens; // done so far; samples: tokens / ctx_len
    int64_t step_tokens;           // of a step when the run began: what warmup_steps counts
    int64_t data_tokens;           // of data_file: it must be the same one
    uint64_t data_hash;            // as well; 0 in older checkpoints
    double best_loss;              // of all validations, INFINITY before the first
    int64_t ranks;                 // that the checkpoint was written by
} Progress;

// Writes a file of blocks; returns the hash of their bytes, which is also the last field of the metadata.
static uint64_t safetensors_write(FileOut *out, const Model *m, const Settings *s, const Progress *p,
                                  uint64_t model_hash, const FileBlock *blocks, int n_blocks) {
    char *header = nullptr;
    size_t length = 0;
    int64_t offset = 0, largest = 0;
    FILE *text = open_memstream(&header, &length);
    fprintf(text, "{");
    for (int b = 0; b < n_blocks; b++) {
        for (int i = 0; i < m->n_tensors; i++) {
            const Tensor *t = &m->tensors[i];
            int64_t bytes = t->size * blocks[b].width;
            fprintf(text, "\"%s%s\":{\"dtype\":\"%s\",\"shape\":[", blocks[b].prefix, t->name, blocks[b].dtype);
            for (int k = 0; k < t->ndim; k++) fprintf(text, "%s%ld", k ? "," : "", t->shape[k]);
            fprintf(text, "],\"data_offsets\":[%ld,%ld]},", offset, offset + bytes);
            offset += bytes;
            largest = bytes > largest ? bytes : largest;
        }
    }
    fprintf(text, "\"__metadata__\":{");
    for (int i = 0; i < n_settings; i++) {
        PATH key, value;
        if (!setting_in_checkpoint(&settings_table[i])) continue;
        setting_key(&settings_table[i], key);
        setting_get(s, &settings_table[i], value);
        json_print(text, key);
        fprintf(text, ":");
        json_print(text, value);
        fprintf(text, ",");
    }
    fprintf(text, "\"step\":\"%ld\",\"samples\":\"%ld\",\"tokens\":\"%ld\",\"step_tokens\":\"%ld\",", p->step,
            p->samples, p->tokens, p->step_tokens);
    fprintf(text, "\"data_tokens\":\"%ld\",\"data_hash\":\"%016lx\",\"best_loss\":\"%.17g\",", p->data_tokens,
            p->data_hash, p->best_loss);
    fprintf(text, "\"ranks\":\"%d\",", n_ranks);
    fprintf(text, "\"model_hash\":\"%016lx\",\"hash\":\"", model_hash);
    fflush(text);
    const long hash_at = 8 + (long)length;
    fprintf(text, "0000000000000000\"}}");
    fflush(text);
    while (length % 8 != 0) {
        fputc(' ', text);
        fflush(text);
    }
    fclose(text);

    uint64_t header_length = length, hash = hash_start;
    file_write(out, &header_length, 8);
    file_write(out, header, length);
    void *host = malloc((size_t)largest);
    for (int b = 0; b < n_blocks; b++) {
        const char *block = block_to_write(m, &blocks[b]);
        for (int i = 0; i < m->n_tensors; i++) {
            const Tensor *t = &m->tensors[i];
            const size_t bytes = (size_t)(t->size * blocks[b].width);
            if (block == nullptr) memset(host, 0, bytes);
            else CUDA_CHECK(cudaMemcpy(host, block + t->offset * blocks[b].width, bytes, cudaMemcpyDeviceToHost));
            hash = hash_bytes(hash, host, bytes);
            if (block == nullptr) file_write_zeros(out, bytes);
            else file_write(out, host, bytes);
        }
    }
    fseek(out->stream, hash_at, SEEK_SET);
    fprintf(out->stream, "%016lx", hash);
    free(host);
    free(header);
    return hash;
}

// ---------------------------------------- a run's folder

static void checkpoint_path(char *path, const char *folder, const char *kind, int64_t step, const char *suffix) {
    snprintf(path, sizeof(LONG_PATH), "%s/%s_%06ld.safetensors%s", folder, kind, step, suffix);
}

// The step of a checkpoint's file name, -1 for another file.
static int64_t checkpoint_step(const char *name, const char *kind) {
    LONG_PATH expected;
    long step = -1;
    size_t n = strlen(kind);
    if (strncmp(name, kind, n) != 0 || sscanf(name + n, "_%ld", &step) != 1) return -1;
    snprintf(expected, sizeof(expected), "%s_%06ld.safetensors", kind, step);
    return strcmp(name, expected) == 0 ? step : -1;
}

static const char *const best_name = "model_best.safetensors";

// Filters for scandir, which sorts the names: models; both halves of checkpoints; these and the best model; all of a
// run's files; its *.old ones; those that a killed program left half written.
static int is_model(const struct dirent *e) { return checkpoint_step(e->d_name, "model") >= 0; }
static int is_checkpoint(const struct dirent *e) { return is_model(e) || checkpoint_step(e->d_name, "state") >= 0; }
static int is_weights(const struct dirent *e) { return is_checkpoint(e) || strcmp(e->d_name, best_name) == 0; }
static int is_run_file(const struct dirent *e) {
    return is_weights(e) || strcmp(e->d_name, "log.csv") == 0 || strcmp(e->d_name, "val.txt") == 0;
}
static int is_run_file_before(const struct dirent *e, size_t n) { // whether the name's first n letters are a run file's
    struct dirent without = {};
    memcpy(without.d_name, e->d_name, n);
    return is_run_file(&without);
}
static int is_old_file(const struct dirent *e) {
    const size_t n = strlen(e->d_name);
    return n > 4 && strcmp(e->d_name + n - 4, ".old") == 0 && is_run_file_before(e, n - 4);
}
static int is_temporary(const struct dirent *e) { // as NAME.123.tmp
    size_t n = strlen(e->d_name);
    if (n <= 4 || strcmp(e->d_name + n - 4, ".tmp") != 0) return 0;
    for (n -= 4; n > 1 && isdigit((unsigned char)e->d_name[n - 1]);) n--;
    return e->d_name[n - 1] == '.' && is_run_file_before(e, n - 1);
}

static void names_free(struct dirent **names, int n) {
    for (int i = 0; i < n; i++) free(names[i]);
    if (n >= 0) free(names);
}

// The step of the newest checkpoint in the folder, -1 if there is none.
static int64_t checkpoint_newest(const char *folder) {
    struct dirent **names;
    int64_t newest = -1;
    int n = scandir(folder, &names, is_model, alphasort);
    for (int i = 0; i < n; i++) {
        int64_t step = checkpoint_step(names[i]->d_name, "model");
        newest = step > newest ? step : newest;
    }
    names_free(names, n);
    return newest;
}

static void folder_remove(const char *folder, int (*filter)(const struct dirent *)) { // what the filter lets through
    struct dirent **names;
    const int n = scandir(folder, &names, filter, alphasort);
    for (int i = 0; i < n; i++) {
        LONG_PATH path;
        snprintf(path, sizeof(path), "%s/%s", folder, names[i]->d_name);
        unlink(path);
    }
    names_free(names, n);
}

// One run at a time writes to a folder: it holds a lock on a file there, which ends with the program.
static void folder_lock(const char *folder) {
    LONG_PATH path;
    char host[256] = "", holder[300] = "another program";
    static bool held = false;     // a lock stands in the way of a second one, even of the same program's
    if (held || rank > 0) return; // rank 0 writes
    held = true;
    snprintf(path, sizeof(path), "%s/.lock", folder);
    const int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) die(2, "%s: %s", path, strerror(errno));
    const bool locked = flock(fd, LOCK_EX | LOCK_NB) == 0;
    if (!locked && errno != EWOULDBLOCK) {
        fprintf(stderr, "%s: %s: %s; take care that no other run writes there\n", program_name, path, strerror(errno));
    } else if (!locked) {
        const ssize_t n = read(fd, holder, sizeof(holder) - 1);
        if (n > 0) holder[n] = '\0';
        die(1, "%s/ is in use by another run, %s; choose another folder: --train.out", folder, holder);
    }
    gethostname(host, sizeof(host) - 1);
    if (ftruncate(fd, 0) == 0) dprintf(fd, "process %d on %s", (int)getpid(), host);
}

// Where a run was killed between the two renames of its first checkpoint: makes up for the second.
static void folder_complete(const char *folder) {
    struct dirent **names;
    const int n = scandir(folder, &names, is_temporary, alphasort);
    for (int i = 0; i < n; i++) {
        LONG_PATH from, model, state;
        long step;
        if (sscanf(names[i]->d_name, "model_%ld.safetensors", &step) != 1) continue;
        snprintf(from, sizeof(from), "%s/%s", folder, names[i]->d_name);
        checkpoint_path(model, folder, "model", step, "");
        checkpoint_path(state, folder, "state", step, "");
        if (access(state, F_OK) == 0) rename(from, model);
    }
    names_free(names, n);
}

// A new run keeps the files of the one before as *.old, for one generation.
static void folder_begin(const char *folder) {
    struct dirent **names;
    LONG_PATH from, to;
    const int n = scandir(folder, &names, is_run_file, alphasort);
    if (n > 0) folder_remove(folder, is_old_file);
    for (int i = 0; i < n; i++) {
        snprintf(from, sizeof(from), "%s/%s", folder, names[i]->d_name);
        snprintf(to, sizeof(to), "%s/%s.old", folder, names[i]->d_name);
        if (rename(from, to) != 0) die(1, "%s: could not be renamed to *.old: %s", from, strerror(errno));
    }
    if (n > 0) printf("%s/ held a run: its %d files are now *.old (resume 1 would go on with it)\n", folder, n);
    names_free(names, n);
}

void folder_create(const char *folder) { // with its parents
    PATH path;
    snprintf(path, sizeof(path), "%s", folder);
    for (char *c = path + 1;; c++) {
        if (*c != '/' && *c != '\0') continue;
        char end = *c;
        *c = '\0';
        if (mkdir(path, 0777) != 0 && errno != EEXIST) die(2, "--train.out %s: %s", folder, strerror(errno));
        if (end == '\0') break;
        *c = end;
    }
    struct stat status;
    if (stat(folder, &status) != 0 || !S_ISDIR(status.st_mode)) die(2, "--train.out %s: expected a folder", folder);
    if (access(folder, W_OK | X_OK) != 0) die(2, "--train.out %s: %s", folder, strerror(errno));
}

static FileBlock weights_block(const Model *m) {
    return {"", sizeof(floatX) == 2 ? "BF16" : "F32", nullptr, m->params, sizeof(floatX)};
}

static bool due(int64_t steps, int64_t every) { return every > 0 && steps % every == 0; }

// The pair of this step; then the pairs before it go, but for those that keep_every keeps.
static void checkpoint_save(const Model *m, const Settings *s, const Progress *p) {
    LONG_PATH path;
    FileOut model, state;
    const FileBlock weights = weights_block(m);
    const FileBlock others[] = {{"master.", "F32", m->master, PRECISION_BF16 ? nullptr : m->master, 4},
                                {"m.", "F32", m->moment1, nullptr, 4},
                                {"v.", "F32", m->moment2, nullptr, 4}};
    for (int b = 0; b < 3 && rank > 0; b++) block_to_write(m, &others[b]); // of which rank 0 writes all shards
    if (rank > 0) return;
    checkpoint_path(path, s->out, "model", p->step, "");
    file_begin(&model, path);
    checkpoint_path(path, s->out, "state", p->step, "");
    file_begin(&state, path);
    const uint64_t hash = safetensors_write(&model, m, s, p, 0, &weights, 1);
    safetensors_write(&state, m, s, p, hash, others, 3);
    file_sync(&model);
    file_sync(&state);
    file_rename(&state);
    file_rename(&model);

    struct dirent **names;
    const int n = scandir(s->out, &names, is_checkpoint, alphasort); // a model goes before its state
    for (int i = 0; i < n; i++) {
        const char *name = names[i]->d_name;
        int64_t step = checkpoint_step(name, "model");
        if (step < 0) step = checkpoint_step(name, "state");
        snprintf(path, sizeof(path), "%s/%s", s->out, name);
        if (step != p->step && !due(step, s->keep_every)) unlink(path);
    }
    names_free(names, n);
}

// Beside the checkpoints: the weights with the lowest validation loss so far.
static void checkpoint_save_best(const Model *m, const Settings *s, const Progress *p) {
    LONG_PATH path;
    FileOut model;
    const FileBlock weights = weights_block(m);
    if (rank > 0) return;
    snprintf(path, sizeof(path), "%s/%s", s->out, best_name);
    file_begin(&model, path);
    safetensors_write(&model, m, s, p, 0, &weights, 1);
    file_end(&model);
}

// ---------------------------------------- reading

static int shape_text(char *text, int ndim, const int64_t *shape) { // "(320, 64)"; returns its length
    int n = sprintf(text, "(");
    for (int k = 0; k < ndim; k++) n += sprintf(text + n, "%s%ld", k ? ", " : "", shape[k]);
    return n + sprintf(text + n, ")");
}

// The file's tensor NAME if it fits t, else null and why not.
static const FileTensor *tensor_fitting(const SafeTensors *f, const char *name, const Tensor *t, PATH problem) {
    const FileTensor *found = safetensors_find(f, name);
    int n = snprintf(problem, sizeof(PATH) - 500, "tensor %s: ", name);
    if (!found) {
        const char *tied =
            strcmp(name, "head.weight") == 0 ? " (a tied head? then save emb.weight as head.weight, too)" : "";
        sprintf(problem + n, "expected in the file, found none%s", tied);
    } else if (found->ndim != t->ndim || memcmp(found->shape, t->shape, (size_t)t->ndim * sizeof(int64_t)) != 0) {
        n += sprintf(problem + n, "shape: expected ");
        n += shape_text(problem + n, t->ndim, t->shape);
        n += sprintf(problem + n, ", found ");
        shape_text(problem + n, found->ndim, found->shape);
    } else if (strcmp(found->dtype, "F32") != 0 && strcmp(found->dtype, "BF16") != 0) {
        sprintf(problem + n, "dtype: expected F32 or BF16, found %s", found->dtype);
    } else {
        return found;
    }
    return nullptr;
}

// All tensors of one of the model's blocks, under their names after the prefix. partial: those that fit, listing the
// others. Returns how many were taken.
static int block_load(const Model *m, const SafeTensors *f, const char *prefix, float *block, bool partial) {
    int taken = 0;
    for (int i = 0; i < m->n_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        PATH name, problem;
        snprintf(name, sizeof(name), "%s%s", prefix, t->name);
        const FileTensor *from = tensor_fitting(f, name, t, problem);
        if (!from && !partial) die(2, "%s: %s", f->path, problem);
        if (!from) {
            printf("%s: %s: keeps its initial values\n", f->path, problem);
            continue;
        }
        const uint8_t *bytes = f->data + from->begin;
        taken++;
        if (strcmp(from->dtype, "F32") == 0) {
            block_write(m, block, t, (const float *)bytes);
            continue;
        }
        float *host = (float *)malloc((size_t)t->size * sizeof(float));
        for (int64_t k = 0; k < t->size; k++) { // bf16 is the upper half of an fp32 number
            uint32_t bits = (uint32_t)bytes[2 * k] << 16 | (uint32_t)bytes[2 * k + 1] << 24;
            memcpy(host + k, &bits, 4);
        }
        block_write(m, block, t, host);
        free(host);
    }
    return taken;
}

// Weights by the reference's names; partial takes those that fit and lists the others of both sides.
static int take_weights(Model *m, const SafeTensors *f, bool partial) { // returns how many tensors were taken
    const char *path = f->path;
    char found[17];
    if (!safetensors_intact(f, found)) {
        fprintf(stderr,
                "%s: %s: not the bytes that were saved here (hash %s, now %s): fine if another program saved the "
                "file again, else it is damaged\n",
                program_name, path, safetensors_metadata(f, "hash"), found);
    }
    const int taken = block_load(m, f, "", m->master, partial);
    for (int i = 0; i < f->n_tensors; i++) {
        const char *name = f->tensors[i].name;
        bool known = false;
        for (int k = 0; k < m->n_tensors && !known; k++) known = strcmp(m->tensors[k].name, name) == 0;
        if (!known && !partial) die(2, "%s: tensor %s: the model has none of this name", path, name);
        if (!known) printf("%s: tensor %s: not taken, the model has none of this name\n", path, name);
    }
    model_params_changed(m);
    return taken;
}

int load_weights(Model *m, const char *path, bool partial) {
    SafeTensors f;
    safetensors_open(&f, path);
    const int taken = take_weights(m, &f, partial);
    safetensors_close(&f);
    return taken;
}

// The settings a file of ours carries replace those in s: all of them, or the model's alone.
static void settings_load(Settings *s, const SafeTensors *f, bool model_only) {
    for (int i = 0; i < n_settings; i++) {
        PATH key;
        const bool model = strcmp(settings_table[i].part, "model") == 0;
        if (!setting_in_checkpoint(&settings_table[i]) || (model_only && !model)) continue;
        setting_key(&settings_table[i], key);
        const char *value = safetensors_metadata(f, key);
        if (!value && !model) continue; // the file is older than the setting
        const char *expected = value ? setting_set(s, &settings_table[i], value) : "a value";
        if (!expected) continue;
        die(2, "%s: metadata, field %s: expected %s, found %s", f->path, key, expected, value ? value : "none");
    }
}

static bool safetensors_has_settings(const SafeTensors *f) {
    return safetensors_metadata(f, "model.n_layer") != nullptr;
}

// Says of a file without settings what none of its tensors shows.
static void settings_assumed(const Settings *s, const char *path) {
    fprintf(stderr, "%s: %s: no settings in its metadata, so these were assumed:", program_name, path);
    for (int i = 0; i < n_settings; i++) {
        const Setting *row = &settings_table[i];
        PATH value;
        bool hidden = strchr(row->name, '.') != nullptr; // rope.base and the like
        for (const char *name : {"use_one_minus_w", "use_v2", "parallel", "head_size_divisor"})
            hidden = hidden || strcmp(row->name, name) == 0;
        setting_get(s, row, value);
        if (hidden) fprintf(stderr, " %s %s", row->name, value);
    }
    fprintf(stderr, "\n");
}

// A model is what its file says: dies where a flag or a config says something else. ctx_len is the training's own.
static void settings_agree(const Settings *s, const Settings *in_file, const char *path) {
    for (int i = 0; i < n_settings; i++) {
        PATH key, expected, found;
        if (strcmp(settings_table[i].part, "model") != 0) continue;
        setting_key(&settings_table[i], key);
        setting_get(in_file, &settings_table[i], expected);
        setting_get(s, &settings_table[i], found);
        if (strcmp(expected, found) == 0) continue;
        if (strcmp(key, "model.ctx_len") != 0)
            die(2, "--%s: expected %s, as in %s, found %s", key, expected[0] ? expected : "\"\"", path,
                found[0] ? found : "\"\"");
        if (s->brope.rescale > 0)
            fprintf(stderr, "%s: --%s %s: with brope another one than %s, as in %s, gives other positions\n",
                    program_name, key, found, expected, path);
    }
}

// Opens one half of a checkpoint.
static void checkpoint_open_half(SafeTensors *f, const char *folder, const char *kind, int64_t step) {
    LONG_PATH path;
    char found[17];
    checkpoint_path(path, folder, kind, step, "");
    if (access(path, F_OK) != 0)
        die(2,
            "%s: %s, so no run can go on from here: put the file back, or begin a new one with the weights, "
            "--train.load_model %s/model_%06ld.safetensors",
            path, strerror(errno), folder, step);
    safetensors_open(f, path);
    if (safetensors_intact(f, found)) return;
    die(2,
        "%s: hash of the data: expected %s, found %s: the file is damaged, or was saved again by another program (then "
        "begin a new run with it: --train.load_model)",
        path, safetensors_metadata(f, "hash"), found);
}

// Opens the pair of a step and checks that its halves belong together.
static void checkpoint_open(SafeTensors *state, const char *folder, int64_t step, Progress *p) {
    SafeTensors model;
    checkpoint_open_half(&model, folder, "model", step);
    checkpoint_open_half(state, folder, "state", step);
    const char *hash = safetensors_metadata(&model, "hash"), *bound_to = safetensors_metadata(state, "model_hash");
    if (!hash || !bound_to || strcmp(hash, bound_to) != 0) {
        die(2,
            "%s: metadata, field model_hash: expected %s as in %s, found %s: the two are of different runs, or the "
            "model was saved again by another program (then begin a new run with it: --train.load_model %s)",
            state->path, hash ? hash : "a hash", model.path, bound_to ? bound_to : "none", model.path);
    }
    safetensors_close(&model);
    p->step = safetensors_number(state, "step");
    p->tokens = safetensors_number(state, "tokens");
    p->data_tokens = safetensors_number(state, "data_tokens");
    expect(state->path, "metadata, field step", -1, step, step, p->step);
    // older checkpoints lack these
    const char *best = safetensors_metadata(state, "best_loss"), *data = safetensors_metadata(state, "data_hash");
    const bool knows = safetensors_metadata(state, "step_tokens") != nullptr;
    p->step_tokens = knows ? safetensors_number(state, "step_tokens") : p->step > 0 ? p->tokens / p->step : 0;
    p->best_loss = best ? strtod(best, nullptr) : INFINITY;
    p->data_hash = data ? strtoull(data, nullptr, 16) : 0;
    p->ranks = safetensors_metadata(state, "ranks") ? safetensors_number(state, "ranks") : 1;
}

static void checkpoint_load(Model *m, SafeTensors *state) {
    block_load(m, state, "master.", m->master, false);
    block_load(m, state, "m.", m->moment1, false);
    block_load(m, state, "v.", m->moment2, false);
    expect(state->path, "tensors", -1, 3 * m->n_tensors, 3 * m->n_tensors, state->n_tensors);
    model_params_changed(m);
    safetensors_close(state);
}

// ---------------------------------------------------------------------------------------------------------------------
// 9. Several GPUs: one process a GPU, called a rank, on any number of machines
//
//    Each rank takes its own sequences of the batch through the whole model. So each has whole: weights, activations
//    and, while the backward pass makes them, gradients. Sharded, every rank having one n-th: the sum of the gradients
//    over all ranks, the fp32 masters (of a BF16 build) and AdamW's moments (ZeRO stage 1).
//
//    The block of parameters (section 6) is cut into buckets; of each bucket every rank owns an equal share:
//
//        block    emb           | blocks.0 blocks.1 ..                        | .. ln_out head     in the order of the
//        buckets  0             | 1             | 2             | 3             | 4                forward pass
//        owners   r0 r1 r2 r3   | r0 r1 r2 r3   | r0 r1 r2 r3   | r0 r1 r2 r3   | r0 r1 r2 r3
//
//    A step, on two streams; what stands beside each other runs at the same time:
//
//        `stream`                                     `beside`
//        forward and backward of all micro-batches
//          but the last: gradients add up
//        the last micro-batch's forward
//        its backward, from the head to emb           reduce-scatter of each bucket whose gradients are final,
//                                                       from the last to the first: its owner gets the sum
//                                                       (GPUs of one machine: all after it, see sums_early)
//        sums of squares of the shares                all-reduce of these (and of the loss): norm, clip
//        AdamW on the shares, bucket by bucket        all-gather of each bucket's new weights
//        the next step's forward, which waits,
//          layer by layer, for the weights it reads
//
//    Events order the two streams; the host waits for nothing. Sums have a fixed order (NCCL's for gradients, the
//    block's for the norm), so that the same number of ranks gives the same bits.
//
//    Ranks find each other by TCP at rank 0, which hands out NCCL's id. These connections stay: over them rank 0 says
//    before each step whether all go on, and a thread in each rank says once a second that the process lives. A rank
//    that hears nothing for 20 s (GOLDFINCH_PATIENCE) or finds the connection closed ends itself.

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <omp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/wait.h>

#ifndef GOLDFINCH_NCCL
#define GOLDFINCH_NCCL 0
#endif
#if GOLDFINCH_NCCL
#include <nccl.h>
#define NCCL_CHECK(call) nccl_check((call), __FILE__, __LINE__)
static void nccl_check(ncclResult_t result, const char *file, int line) {
    if (result != ncclSuccess) die(1, "NCCL error at %s:%d: %s", file, line, ncclGetErrorString(result));
}
#else
#define NCCL_CHECK(call) ((void)0) // without NCCL there is one rank only, and nothing calls it
typedef struct ncclUniqueId {
    char internal[128];
} ncclUniqueId;
typedef struct ncclComm *ncclComm_t;
#endif

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static struct Ranks {
    int local, n_local; // this rank among those of its machine
    bool forked;        // the other ranks are rank 0's children
    pid_t *pids;        // rank 0: of its children, by rank; others: [0] is rank 0's
    int *sockets;       // rank 0: to each rank; others: [0] to rank 0; -1: none
    double *heard;      // when a rank last gave a sign of life
    bool *left;         // a rank said that it ends as it should
    ncclUniqueId id;
    ncclComm_t comm;
    cudaStream_t beside;
    cudaEvent_t passed;    // of one stream, for the other one
    cudaEvent_t *gathered; // a bucket's weights
    int64_t told, taken;   // rank 0's words on going on: come, and looked at
    bool stop;             // the last of them was no
    int failing;           // a thread is ending this process
    pthread_mutex_t mutex;
    pthread_cond_t news;
} ranks;

// ---------------------------------------- the block's shares

static const int MOST_BUCKETS = 16; // few enough for long exchanges, enough for them to begin early

static void buckets_plan(Model *m) {
    Buckets *b = &m->buckets;
    *b = {1, m->n_block, nullptr, 0, 0, false};
    if (n_ranks > 1) { // shares begin where pieces do
        const int64_t unit = (int64_t)n_ranks * PIECE;
        m->n_block = ceil_div(m->n_block, unit) * unit;
        b->size = ceil_div(m->n_block, MOST_BUCKETS * unit) * unit;
        b->n = (int)ceil_div(m->n_block, b->size);
    }
    b->first_piece = (int *)calloc(b->n + 1, sizeof(int));
    b->gathered = b->n; // nothing is on its way
}

static int64_t bucket_begin(const Model *m, int bucket) {
    return bucket < m->buckets.n ? bucket * m->buckets.size : m->n_block;
}
static int64_t share_size(const Model *m, int bucket) {
    return (bucket_begin(m, bucket + 1) - bucket_begin(m, bucket)) / n_ranks;
}

// Where this rank's share of a bucket lies in the block, and where among all that the rank keeps.
static void bucket_share(const Model *m, int bucket, int64_t *begin, int64_t *end, int64_t *kept) {
    *kept = bucket_begin(m, bucket) / n_ranks;
    *begin = bucket_begin(m, bucket) + rank * share_size(m, bucket);
    *end = *begin + share_size(m, bucket);
}

// ---------------------------------------- what a step exchanges

// What is queued on `later` from now on waits for what is queued on `first` by now.
static void stream_waits(cudaStream_t later, cudaStream_t first) {
    CUDA_CHECK(cudaEventRecord(ranks.passed, first));
    CUDA_CHECK(cudaStreamWaitEvent(later, ranks.passed, 0));
}

// A sum that runs beside the backward pass takes multiprocessors, and a product whose blocks just fill the GPU then
// needs a second turn for those few that found no place. On two H200 with NVLink, L12's step took 82.9 ms with sums
// beside the backward pass and 79.6 with sums after it; over a network, sums beside it are what hides them.
static bool sums_early(const Model *m) {
    return m->s.overlap_comm < 0 ? ranks.n_local < n_ranks : m->s.overlap_comm == 1;
}

static void gradients_final(Model *m, int part) {
    Buckets *buckets = &m->buckets;
    if (n_ranks == 1 || !buckets->sum) return;
    if (part == m->d.L + 1) buckets->left = buckets->n;
    if (part > 0 && !sums_early(m)) return;
    stream_waits(ranks.beside, stream);
    NCCL_CHECK(ncclGroupStart()); // one launch for all that are final by now
    while (buckets->left > 0 && bucket_begin(m, buckets->left - 1) >= m->part_begin[part]) {
        const int b = --buckets->left;
        float *bucket = m->grads + bucket_begin(m, b), *share = bucket + rank * share_size(m, b);
        NCCL_CHECK(ncclReduceScatter(bucket, share, share_size(m, b), ncclFloat, ncclSum, ranks.comm, ranks.beside));
        (void)share;
    }
    NCCL_CHECK(ncclGroupEnd());
}

static void gradients_finish(Model *m) {
    if (n_ranks == 1) return;
    CUDA_CHECK(cudaMemsetAsync(m->squares, 0, m->n_squares * sizeof(double), stream)); // of the others' pieces
    stream_waits(stream, ranks.beside);
}

static void sum_over_ranks(double *sums, int n) {
    if (n_ranks == 1) return;
    stream_waits(ranks.beside, stream);
    NCCL_CHECK(ncclAllReduce(sums, sums, n, ncclDouble, ncclSum, ranks.comm, ranks.beside));
    stream_waits(stream, ranks.beside);
    (void)sums, (void)n;
}

// On one machine the bf16 weights are a window of NCCL's (2.27 and later): its kernels write into the other GPUs'
// memory, not by way of buffers. Two H200: L12's step 78.7 ms in place of 79.6; four: 79.6 in place of 80.0. The
// gradients are none: sums in windows were no quicker, and on one pair of GPUs NCCL 2.28.9 made wrong ones of 16 in one
// launch.
static void gathered_alloc(void **p, int64_t bytes) {
#ifdef NCCL_WIN_COLL_SYMMETRIC
    if (n_ranks > 1 && ranks.n_local == n_ranks) {
        ncclWindow_t window;
        NCCL_CHECK(ncclMemAlloc(p, bytes));
        CUDA_CHECK(cudaMemset(*p, 0, bytes));
        NCCL_CHECK(ncclCommWindowRegister(ranks.comm, *p, bytes, &window, NCCL_WIN_COLL_SYMMETRIC));
        return;
    }
#endif
    device_alloc(p, bytes);
}

static void weights_spread(Model *m, int bucket) {
    if (n_ranks == 1) return;
    floatX *to = m->params + bucket_begin(m, bucket), *share = to + rank * share_size(m, bucket);
    stream_waits(ranks.beside, stream);
    NCCL_CHECK(ncclAllGather(share, to, share_size(m, bucket) * sizeof(floatX), ncclChar, ranks.comm, ranks.beside));
    CUDA_CHECK(cudaEventRecord(ranks.gathered[bucket], ranks.beside));
    m->buckets.gathered = 0;
    (void)share;
}

static void weights_needed(Model *m, int part) {
    Buckets *buckets = &m->buckets;
    while (buckets->gathered < buckets->n && bucket_begin(m, buckets->gathered) < m->part_begin[part + 1]) {
        const int b = buckets->gathered++;
        if (n_ranks > 1) CUDA_CHECK(cudaStreamWaitEvent(stream, ranks.gathered[b], 0));
    }
}

static const float *whole_block(const Model *m, const float *shard) { // it lies where the gradients were
    if (n_ranks == 1) return shard;
    stream_waits(ranks.beside, stream);
    for (int b = 0; b < m->buckets.n; b++) {
        const int64_t begin = bucket_begin(m, b);
        NCCL_CHECK(ncclAllGather(shard + begin / n_ranks, m->grads + begin, share_size(m, b), ncclFloat, ranks.comm,
                                 ranks.beside));
        (void)begin;
    }
    CUDA_CHECK(cudaStreamSynchronize(ranks.beside));
    return m->grads;
}

// Numbers of the host, summed over ranks: exact where all but one have 0.
static void host_sum_over_ranks(double *sums, int n) {
    if (n_ranks == 1) return;
    double *device;
    device_alloc((void **)&device, n * sizeof(double));
    CUDA_CHECK(cudaMemcpy(device, sums, n * sizeof(double), cudaMemcpyHostToDevice));
    sum_over_ranks(device, n);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaMemcpy(sums, device, n * sizeof(double), cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaFree(device));
}

// Each rank has a text or an empty one. Replaces it by that of the first rank which has one, and returns this rank,
// or -1.
static int first_rank_that_says(char *text, int size) {
    char *device, *all = (char *)calloc(n_ranks, size);
    device_alloc((void **)&device, (int64_t)n_ranks * size);
    CUDA_CHECK(cudaMemcpy(device + rank * size, text, size, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    if (n_ranks > 1) {
        NCCL_CHECK(ncclAllGather(device + rank * size, device, size, ncclChar, ranks.comm, ranks.beside));
        CUDA_CHECK(cudaStreamSynchronize(ranks.beside));
    }
    CUDA_CHECK(cudaMemcpy(all, device, (int64_t)n_ranks * size, cudaMemcpyDeviceToHost));
    int first = 0;
    while (first < n_ranks && !all[first * size]) first++;
    if (first < n_ranks) memcpy(text, all + first * size, size);
    free(all);
    CUDA_CHECK(cudaFree(device));
    return first < n_ranks ? first : -1;
}

// ---------------------------------------- living and ending together

// What ranks say to each other is single letters: '.' I live, 'g' go on and 's' stop (rank 0, before a step), 'e' I
// end as I should, 'x' and a number: I failed with this exit code.
static void say(int to, const char *letters, int n) {
    const int socket = ranks.sockets ? ranks.sockets[to] : -1;
    if (socket >= 0 && send(socket, letters, n, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) return; // its end is seen elsewhere
}
static void say_to_all(const char *letters, int n) { // rank 0 to all, the others to rank 0
    for (int i = 0; i < (rank == 0 ? n_ranks : 1); i++) say(i, letters, n);
}

// Rank 0 waits for the ranks it started; those still there after `patience` seconds it kills. False if one failed.
static bool wait_for_children(double patience) {
    bool well = true;
    const double begin = seconds_now();
    for (int i = 1; i < n_ranks && ranks.forked && rank == 0; i++) {
        int status = 0;
        while (ranks.pids[i] > 0 && waitpid(ranks.pids[i], &status, WNOHANG) == 0) {
            if (seconds_now() - begin > patience) kill(ranks.pids[i], SIGKILL); // a stopped process, too
            usleep(10000);
        }
        ranks.pids[i] = 0;
        well = well && WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
    return well;
}

[[noreturn]] static void ranks_fail(int code) { // not exit: a device may be amid an exchange that never ends
    while (__atomic_exchange_n(&ranks.failing, 1, __ATOMIC_ACQ_REL)) pause(); // the other thread does it
    const char letters[2] = {'x', (char)code};
    say_to_all(letters, 2);
    if (rank == 0) remove_unfinished_files();
    wait_for_children(2);
    usleep(200000); // a connection that closes at once may take along what was said
    _exit(code);
}

static void ranks_before_words(void) { // of an error
    if (rank > 0) sleep(1);
    while (__atomic_load_n(&ranks.failing, __ATOMIC_ACQUIRE)) pause(); // another thread ends this process
}

[[noreturn]] static void rank_lost(int which, const char *how) {
    while (__atomic_load_n(&ranks.failing, __ATOMIC_ACQUIRE)) pause(); // the other thread does
    fprintf(stderr, "%s: rank %d: rank %d %s; this run ends\n", program_name, rank, which, how);
    if (rank > 0 && ranks.forked && getppid() == ranks.pids[0]) kill(ranks.pids[0], SIGKILL); // it may be stopped
    ranks_fail(1);
}

// Reads what a rank said. False if the connection is closed.
static bool listen_to(int from) {
    char letters[256];
    const ssize_t n = recv(ranks.sockets[from], letters, sizeof(letters), MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) return false;
    for (ssize_t i = 0; i < n; i++) {
        if (letters[i] == 'e') ranks.left[from] = true;
        if (letters[i] == 'x') { // it has said why
            if (rank > 0) _exit(i + 1 < n ? letters[i + 1] : 1);
            ranks_fail(i + 1 < n ? letters[i + 1] : 1);
        }
        if (letters[i] != 'g' && letters[i] != 's') continue;
        pthread_mutex_lock(&ranks.mutex);
        ranks.told++;
        ranks.stop = letters[i] == 's';
        pthread_cond_signal(&ranks.news);
        pthread_mutex_unlock(&ranks.mutex);
    }
    ranks.heard[from] = seconds_now();
    return true;
}

static double patience(void) { // seconds
    const char *text = getenv("GOLDFINCH_PATIENCE");
    return text && atof(text) > 0 ? atof(text) : 20;
}

static void *watch(void *) { // a thread's life
    const int n = rank == 0 ? n_ranks : 1;
    struct pollfd *polled = (struct pollfd *)calloc(n, sizeof(struct pollfd));
    double said = 0, looked = seconds_now();
    for (;;) {
        for (int i = 0; i < n; i++) polled[i] = {ranks.left[i] ? -1 : ranks.sockets[i], POLLIN, 0};
        poll(polled, n, 500);
        const double now = seconds_now();
        for (int i = 0; i < n; i++) {
            if (polled[i].fd < 0) continue;
            if (now - looked > 5) ranks.heard[i] = now; // it was this process that slept
            if (polled[i].revents && !listen_to(i) && !ranks.left[i]) rank_lost(i, "has ended");
            if (now - ranks.heard[i] > patience()) rank_lost(i, "gives no sign of life");
        }
        looked = now;
        if (now - said >= 1) say_to_all(".", 1), said = now;
#if GOLDFINCH_NCCL
        ncclResult_t state = ncclSuccess;
        ncclComm_t comm = __atomic_load_n(&ranks.comm, __ATOMIC_ACQUIRE);
        if (comm && ncclCommGetAsyncError(comm, &state) == ncclSuccess && state != ncclSuccess &&
            state != ncclInProgress) {
            fprintf(stderr, "%s: rank %d: NCCL: %s\n", program_name, rank, ncclGetErrorString(state));
            ranks_fail(1);
        }
#endif
    }
}

// Rank 0's answer, in every rank, to whether the run stops here. All ranks ask as often.
static bool ranks_agree(bool stop) {
    static bool stopped = false; // once they stop, nobody asks again
    if (n_ranks == 1 || stopped) return stop || stopped;
    if (rank == 0) {
        say_to_all(stop ? "s" : "g", 1);
        return stopped = stop;
    }
    pthread_mutex_lock(&ranks.mutex);
    while (ranks.told == ranks.taken) pthread_cond_wait(&ranks.news, &ranks.mutex);
    stopped = ++ranks.taken == ranks.told && ranks.stop; // an 's' is the last
    pthread_mutex_unlock(&ranks.mutex);
    return stopped;
}

static void ranks_leave(void) { // at exit
    say_to_all("e", 1);
    if (!wait_for_children(patience())) _exit(1);
}

static void ranks_end(void) { // all together, when nothing is left to exchange
    if (n_ranks == 1) return;
    CUDA_CHECK(cudaDeviceSynchronize());
    [[maybe_unused]] ncclComm_t comm = ranks.comm;
    __atomic_store_n(&ranks.comm, nullptr, __ATOMIC_RELEASE);
    NCCL_CHECK(ncclCommDestroy(comm));
}

// ---------------------------------------- meeting

typedef struct Hello {
    uint64_t run, settings; // a number of this run; a hash
    int32_t rank, n;
} Hello;

static int open_socket(const char *host, int port, bool listens) { // -1: not now
    struct addrinfo hints = {}, *found = nullptr;
    char service[16];
    snprintf(service, sizeof(service), "%d", port);
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = listens ? AI_PASSIVE : 0;
    if (getaddrinfo(listens && strcmp(host, "127.0.0.1") ? nullptr : host, service, &hints, &found) != 0) return -1;
    int result = -1, on = 1;
    for (struct addrinfo *a = found; a && result < 0; a = a->ai_next) {
        const int s = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
        setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
        const bool good = listens ? bind(s, a->ai_addr, a->ai_addrlen) == 0 && listen(s, 1024) == 0
                                  : connect(s, a->ai_addr, a->ai_addrlen) == 0;
        if (good) result = s;
        else close(s);
    }
    freeaddrinfo(found);
    return result;
}

static bool receive(int socket, void *to, size_t n) { // within 5 s
    struct timeval limit = {5, 0};
    setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    return recv(socket, to, n, MSG_WAITALL) == (ssize_t)n;
}

static void meet_as_first(int listener, const Hello *mine) {
    const double begin = seconds_now(), limit = 3 * patience();
    NCCL_CHECK(ncclGetUniqueId(&ranks.id));
    for (int missing = n_ranks - 1; missing > 0;) {
        for (int i = 1; i < n_ranks && ranks.forked; i++)
            if (ranks.sockets[i] < 0 && waitpid(ranks.pids[i], nullptr, WNOHANG) > 0) {
                ranks.pids[i] = 0;
                die(1, "rank %d has ended before it came", i);
            }
        if (seconds_now() - begin > limit)
            die(1, "%d of %d ranks have not come within %.0f s", missing, n_ranks, limit);
        struct pollfd polled = {listener, POLLIN, 0};
        if (poll(&polled, 1, 200) <= 0) continue;
        const int socket = accept(listener, nullptr, nullptr);
        Hello other;
        if (socket < 0 || !receive(socket, &other, sizeof(other)) || other.run != mine->run || other.rank < 1 ||
            other.rank >= n_ranks || ranks.sockets[other.rank] >= 0) {
            close(socket); // another program
            continue;
        }
        if (other.n != n_ranks || other.settings != mine->settings)
            die(2, "rank %d was started with other settings, or a checkpoint of another step", other.rank);
        ranks.sockets[other.rank] = socket;
        missing--;
    }
    for (int i = 1; i < n_ranks; i++) send(ranks.sockets[i], &ranks.id, sizeof(ranks.id), MSG_NOSIGNAL);
    close(listener);
}

static void meet_first(const char *host, int port, const Hello *mine) {
    const double begin = seconds_now(), limit = 3 * patience();
    while (ranks.sockets[0] < 0) {
        const int socket = open_socket(host, port, false);
        if (socket >= 0 && send(socket, mine, sizeof(*mine), MSG_NOSIGNAL) == sizeof(*mine)) {
            struct pollfd polled = {socket, POLLIN, 0}; // it answers when all have come
            if (poll(&polled, 1, (int)(1e3 * limit)) > 0 && receive(socket, &ranks.id, sizeof(ranks.id)))
                ranks.sockets[0] = socket;
        }
        if (ranks.sockets[0] >= 0) return;
        if (socket >= 0) close(socket);
        if (ranks.forked || seconds_now() - begin > limit) die(1, "rank 0 does not answer at %s, port %d", host, port);
        usleep(200000);
    }
}

// How a launcher tells a process its place: names of environment variables.
typedef struct Launcher {
    const char *name, *rank, *n, *local, *n_local, *job;
} Launcher;
static const Launcher launchers[] = {
    {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_NAMESPACE"},
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"},
    {"srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_ID"},
    {"mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "HYDRA_JOB_ID"},
};
static const Launcher *launcher = nullptr; // that started this process

static int environment_number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text && *text ? atoi(text) : otherwise;
}

static void take_rank(int number, int n, int local, int n_local) {
    rank = number, n_ranks = n, ranks.local = local, ranks.n_local = n_local;
    if (rank > 0 && !freopen("/dev/null", "w", stdout)) die(1, "/dev/null: %s", strerror(errno)); // rank 0 prints
}

static void ranks_from_launcher(void) { // first of all
    for (const Launcher &known : launchers) {
        const int number = environment_number(known.rank, -1), n = environment_number(known.n, 0);
        if (launcher || number < 0 || n < 2 || number >= n) continue;
        launcher = &known;
        const int n_local = environment_number(known.n_local, n);
        take_rank(number, n, environment_number(known.local, number % n_local), n_local);
    }
}

static int count_devices(void) { // in another process: once CUDA was called, this one could not be forked
    const pid_t child = fork();
    int status = 0, n = 0;
    if (child == 0) _exit(cudaGetDeviceCount(&n) != cudaSuccess ? 0 : n < 255 ? n : 255);
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return 0;
    return WEXITSTATUS(status);
}

static int64_t devices_to_start(const Settings *s) {
    if (s->num_nodes > 1)
        die(2, "--train.num_nodes %ld: expected mpirun, torchrun or srun to start a process per GPU, found none",
            s->num_nodes);
    if (s->devices == 0) die(2, "--train.devices: expected -1 or 1 or more, found 0");
    if (s->devices == 1) return 1;
    if (!GOLDFINCH_NCCL)
        die(2,
            "--train.devices %ld: this build has no NCCL, which joins GPUs; the package libnccl-dev (or pip install "
            "nvidia-nccl-cu13) brings it: then build again",
            s->devices);
    const int64_t here = count_devices(), micro_batches = s->devices * s->accumulate_grad_batches;
    if (s->devices == -1 || s->devices <= here) return s->devices == -1 ? (here > 1 ? here : 1) : s->devices;
    int64_t instead = here > 1 ? here : 1;
    while (micro_batches % instead != 0) instead--;
    die(2,
        "--train.devices %ld: found %ld here; --train.devices %ld --train.accumulate_grad_batches %ld is the same "
        "batch",
        s->devices, here, instead, micro_batches / instead);
}

// Starts the other ranks of this machine (where no launcher did), or takes the place that the launcher says; then all
// meet. Before anything of CUDA is called.
static void ranks_start(const Settings *s, int64_t resumed) {
    uint64_t run = 0;
    int port = 0, listener = -1;
    const char *host = "127.0.0.1";
    if (!launcher) {
        const int n = (int)devices_to_start(s);
        if (n == 1) return;
        listener = open_socket(host, 0, true);
        struct sockaddr_in address = {};
        socklen_t length = sizeof(address);
        if (listener < 0 || getsockname(listener, (struct sockaddr *)&address, &length) != 0)
            die(1, "no port to meet at: %s", strerror(errno));
        port = ntohs(address.sin_port);
        const double now = seconds_now();
        const pid_t parent = getpid();
        run = hash_bytes(hash_bytes(hash_start, &now, sizeof(now)), &parent, sizeof(parent));
        ranks.pids = (pid_t *)calloc(n, sizeof(pid_t));
        ranks.forked = true;
        fflush(stdout);
        int number = 0;
        for (int i = 1; i < n && number == 0; i++) {
            ranks.pids[i] = fork();
            if (ranks.pids[i] < 0) die(1, "rank %d could not be started: %s", i, strerror(errno));
            if (ranks.pids[i] == 0) number = i;
        }
        if (number > 0) close(listener);
        ranks.pids[0] = parent;
        take_rank(number, n, number, n);
    } else {
        const int64_t n = s->devices * s->num_nodes;
        if (n > 1 && n != n_ranks)
            die(2, "--train.devices %ld, num_nodes %ld: expected as many as %s started, %d", s->devices, s->num_nodes,
                launcher->name, n_ranks);
        if (!GOLDFINCH_NCCL) die(2, "%s started %d ranks, but this build has no NCCL", launcher->name, n_ranks);
        const char *job = getenv(launcher->job);
        run = hash_bytes(hash_start, job ? job : "", job ? strlen(job) : 0);
        host = getenv("MASTER_ADDR") ? getenv("MASTER_ADDR") : host;
        // torchrun listens at MASTER_PORT itself
        port = getenv("MASTER_PORT") ? environment_number("MASTER_PORT", 0) + 1 : 20000 + (int)(run % 10000);
        if (ranks.n_local < n_ranks && !getenv("MASTER_ADDR"))
            die(2, "MASTER_ADDR: expected the address of rank 0's machine, found nothing");
        if (rank == 0 && (listener = open_socket(host, port, true)) < 0)
            die(1, "port %d: %s; MASTER_PORT chooses another one", port, strerror(errno));
    }
    if (!getenv("OMP_NUM_THREADS"))
        omp_set_num_threads(omp_get_num_procs() > ranks.n_local ? omp_get_num_procs() / ranks.n_local : 1);
    ranks.sockets = (int *)malloc(n_ranks * sizeof(int));
    ranks.heard = (double *)calloc(n_ranks, sizeof(double));
    ranks.left = (bool *)calloc(n_ranks, sizeof(bool));
    for (int i = 0; i < n_ranks; i++) ranks.sockets[i] = -1;
    const Hello mine = {run, hash_bytes(hash_bytes(hash_start, s, sizeof(*s)), &resumed, 8), rank, n_ranks};
    if (rank == 0) meet_as_first(listener, &mine);
    else meet_first(host, port, &mine);
    for (int i = 0; i < n_ranks; i++) ranks.heard[i] = seconds_now();
    pthread_mutex_init(&ranks.mutex, nullptr);
    pthread_cond_init(&ranks.news, nullptr);
    atexit(ranks_leave);
    pthread_t thread;
    if (pthread_create(&thread, nullptr, watch, nullptr) != 0) die(1, "no thread to watch the other ranks");
}

static int ranks_device(int devices) { // a process may see one GPU only, its own
    if (devices > 1 && ranks.local >= devices)
        die(2, "number %d of this machine's ranks finds %d GPUs", ranks.local, devices);
    return devices > 1 ? ranks.local : 0;
}

static void ranks_connect_devices(void) {
    if (n_ranks == 1) return;
    int least, greatest;
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest)); // its few blocks go first
    CUDA_CHECK(cudaStreamCreateWithPriority(&ranks.beside, cudaStreamDefault, greatest));
    CUDA_CHECK(cudaEventCreateWithFlags(&ranks.passed, cudaEventDisableTiming));
    ranks.gathered = (cudaEvent_t *)calloc(MOST_BUCKETS, sizeof(cudaEvent_t));
    for (int b = 0; b < MOST_BUCKETS; b++)
        CUDA_CHECK(cudaEventCreateWithFlags(&ranks.gathered[b], cudaEventDisableTiming));
    ncclComm_t comm = nullptr;
    NCCL_CHECK(ncclCommInitRank(&comm, n_ranks, ranks.id, rank));
    __atomic_store_n(&ranks.comm, comm, __ATOMIC_RELEASE);
}

// A run that goes on on another number of GPUs: accumulation makes up for them, if it can.
static void ranks_keep_batch(Settings *s, const Progress *p) {
    const int64_t batch = s->micro_bsz * s->accumulate_grad_batches * p->ranks, here = s->micro_bsz * n_ranks;
    if (p->ranks == n_ranks) return;
    if (batch % here == 0) s->accumulate_grad_batches = batch / here;
    printf("%ld GPUs before, %d now: ", p->ranks, n_ranks);
    if (batch % here == 0) printf("accumulate_grad_batches %ld keeps", s->accumulate_grad_batches);
    else printf("no accumulate_grad_batches keeps");
    printf(" the batch of %ld sequences\n", batch);
}

// ---------------------------------------------------------------------------------------------------------------------
// 10. main: schedules, validation, samples, the log, and the loop over steps.

static int64_t samples_per_step(const Settings *s) { return s->micro_bsz * s->accumulate_grad_batches * n_ranks; }
static int64_t tokens_per_step(const Settings *s) { return samples_per_step(s) * s->ctx_len; }

// Schedules go by the tokens done before a step, as a step's size may change when a run goes on. warmup_steps are steps
// of step_tokens tokens: the size that the run began with.

// 0 at the start of the decay, 1 at its end.
static double schedule_progress(const Settings *s, int64_t tokens, int64_t step_tokens) {
    const double wait = (double)s->warmup_steps * (double)step_tokens + s->lr_wait * (double)s->my_exit_tokens;
    const double left = (double)s->my_exit_tokens - wait, done = (double)tokens - wait;
    if (done <= 0) return 0;
    return done >= left ? 1 : done / left;
}

double learning_rate(const Settings *s, int64_t tokens, int64_t step_tokens) {
    const double progress = schedule_progress(s, tokens, step_tokens), range = s->lr_init - s->lr_final;
    const double steps = (double)tokens / (double)step_tokens;
    double lr;
    if (strcmp(s->lr_decay_type, "cos") == 0) lr = s->lr_final + range * cos(M_PI / 2 * progress);
    else if (strcmp(s->lr_decay_type, "linear") == 0) lr = s->lr_final + range * (1 - progress);
    else if (strcmp(s->lr_decay_type, "exp") == 0) lr = s->lr_init * pow(s->lr_final / s->lr_init, progress);
    else lr = s->lr_final + range * (1 - sqrt(progress));
    return steps < (double)s->warmup_steps ? lr * (0.2 + 0.8 * steps / (double)s->warmup_steps) : lr;
}

double weight_decay(const Settings *s, int64_t tokens, int64_t step_tokens) { // falls by equal factors
    if (s->weight_decay_final <= 0) return s->weight_decay;
    return s->weight_decay * pow(s->weight_decay_final / s->weight_decay, schedule_progress(s, tokens, step_tokens));
}

typedef struct Run {
    Settings s;
    Model m;
    Data data;
    Progress p;
    SafeTensors state; // of the checkpoint that the run goes on from
    int64_t resumed;   // its step; -1 for a new run
    int64_t saved;     // step of the newest checkpoint, -1 if there is none
    FILE *log;
    int64_t n_steps;     // of the whole run
    int *tokens;         // (micro_bsz, ctx_len + 1)
    uint8_t *mask;       // as many
    double step_seconds; // running mean of a step; 0 before the first
    double val_loss;     // the last validation's
} Run;

typedef struct Step {              // a step that was queued
    int64_t step, samples, tokens; // done before it
    double lr, begin;
} Step;

// Opens log.csv; a run that goes on after some steps keeps their lines and drops what came after its checkpoint.
static FILE *log_open(const char *folder, int64_t steps) {
    LONG_PATH path;
    FileOut file;
    snprintf(path, sizeof(path), "%s/log.csv", folder);
    file_begin(&file, path);
    FILE *out = file.stream, *in = steps > 0 ? fopen(path, "r") : nullptr;
    fprintf(out, "step,tokens,loss,val_loss,norm,lr,ms,tok_s,peak\n");
    char *line = nullptr;
    size_t room = 0;
    ssize_t n;
    while (in && (n = getline(&line, &room, in)) > 0) {
        char *end;
        long step = strtol(line, &end, 10);
        if (line[n - 1] == '\n' && *end == ',' && step > 0 && step <= steps) fputs(line, out);
    }
    free(line);
    if (in) fclose(in);
    file_end(&file);
    out = fopen(path, "a");
    if (!out) die(1, "%s: %s", path, strerror(errno));
    return out;
}

static volatile sig_atomic_t stop_requested = 0;

// The first signal asks the run to end and save; the ones that follow must not keep it from that.
static void request_stop(int signal) {
    static const char text[] = "stopping, as soon as all is saved (Ctrl-\\ ends the program at once)\n";
    if (stop_requested && signal != SIGPIPE && write(STDERR_FILENO, text, sizeof(text) - 1) < 0) return;
    stop_requested = 1;
}

static bool stops(void) { return ranks_agree(stop_requested); }

static void catch_signals(int flags) { // SA_RESTART: what waits for input goes on waiting
    struct sigaction action, before;
    memset(&action, 0, sizeof(action));
    action.sa_handler = rank == 0 ? request_stop : SIG_IGN; // the others stop with rank 0
    action.sa_flags = flags;
    for (int signal : {SIGINT, SIGTERM, SIGPIPE}) // SIGPIPE: Ctrl-C may end the reader of our output before us
        sigaction(signal, &action, nullptr);
    if (sigaction(SIGHUP, nullptr, &before) == 0 && before.sa_handler != SIG_IGN) // not so under nohup
        sigaction(SIGHUP, &action, nullptr);
}

// Mean loss and accuracy over the validation set, or the first val_batches of it. False if a signal came before the
// end.
static bool validate(Run *r) {
    const double begin = seconds_now();
    const int64_t all = data_validation_samples(&r->data), some = r->s.val_batches * r->s.micro_bsz;
    const int64_t samples = some > 0 && some < all ? some : all;
    uint8_t *mask = r->data.valid_mask.bytes ? r->mask : nullptr;
    const int batches = (int)ceil_div(samples, r->s.micro_bsz);
    double loss = 0, correct = 0, *sums = (double *)calloc(2 * batches, sizeof(double));
    for (int next = 0; next < batches; next += n_ranks) { // the next ones, a rank each
        if (stops()) {
            printf("validation: ended by a signal after %ld of %ld samples\n", next * r->s.micro_bsz, samples);
            free(sums);
            return false;
        }
        const int i = next + rank;
        if (i >= batches) continue;
        const int64_t first = i * r->s.micro_bsz;
        const int B = (int)(samples - first < r->s.micro_bsz ? samples - first : r->s.micro_bsz);
        data_validation_batch(&r->data, first, B, r->tokens, mask);
        model_evaluate(&r->m, r->tokens, mask, B, (int)r->s.ctx_len, &sums[2 * i], &sums[2 * i + 1]);
    }
    host_sum_over_ranks(sums, 2 * batches); // each from the rank that has it
    for (int i = 0; i < batches; i++) loss += sums[2 * i], correct += sums[2 * i + 1];
    free(sums);
    const int64_t counted = data_validation_targets(&r->data, samples);
    const double targets = counted > 0 ? (double)counted : 1;
    r->val_loss = loss / targets;
    printf("validation: loss %.4f, accuracy %.1f %%, %ld tokens, %.1f s\n", r->val_loss, 100 * correct / targets,
           counted, seconds_now() - begin);
    return true;
}

// A stream of bytes, given out as valid UTF-8 only: bytes wait until their character is complete; U+FFFD takes the
// place of those that can't become one.
typedef struct Utf8 {
    uint8_t held[4];
    int n, length; // n bytes of a character of `length` are held
    int given;     // of these: bytes that stood in what was read, not in what was written
} Utf8;

static const char *replacement = "\xEF\xBF\xBD"; // U+FFFD

int utf8_end(Utf8 *u, uint8_t *out) { // what was held will not be completed
    const bool any = u->n > u->given;
    u->n = u->given = 0;
    if (!any) return 0;
    memcpy(out, replacement, 3);
    return 3;
}

// out has room for 6 bytes; returns how many were written
static int utf8_push(Utf8 *u, uint8_t byte, uint8_t *out) {
    int n = 0;
    if (u->n > 0) {
        const uint8_t lead = u->held[0]; // some leads narrow what may come second: no overlong
        const bool second = u->n == 1;   // forms, no surrogates, nothing above U+10FFFF
        const uint8_t low = second && lead == 0xE0 ? 0xA0 : second && lead == 0xF0 ? 0x90 : 0x80;
        const uint8_t high = second && lead == 0xED ? 0x9F : second && lead == 0xF4 ? 0x8F : 0xBF;
        if (byte >= low && byte <= high) {
            u->held[u->n++] = byte;
            if (u->n < u->length) return 0;
            u->n = u->given = 0;
            memcpy(out, u->held, (size_t)u->length);
            return u->length;
        }
        n = utf8_end(u, out);
    }
    if (byte < 0x80) {
        out[n] = byte;
        return n + 1;
    }
    u->length = byte < 0xC2 || byte > 0xF4 ? 0 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
    u->n = 1; // held, or to be replaced at once
    u->held[0] = byte;
    return u->length ? n : n + utf8_end(u, out + n);
}

static const char *demo_sample_prompt = "static void ";
static const int demo_sample_bytes = 300;
static const double demo_sample_temperature = 0.7;

// Draws bytes from the model and prints them, the same ones for the same weights and seed.
static void print_sample(Run *r, int64_t step) {
    const int T = (int)r->s.ctx_len;
    int n = 0, *context = (int *)malloc((size_t)T * sizeof(int));
    float *logits = (float *)malloc((size_t)r->s.vocab_size * sizeof(float));
    Utf8 utf8 = {};
    uint8_t text[8];
    const uint64_t random = hash_bytes(hash_start, &step, sizeof(step)) ^ (uint64_t)r->s.seed_everything;
    for (const char *c = demo_sample_prompt; *c && n < T; c++) context[n++] = (uint8_t)*c + 1;
    printf("sample, at temperature %g:\n%s", demo_sample_temperature, demo_sample_prompt);
    for (int i = 0; i < demo_sample_bytes && !stop_requested; i++) {
        double p[257], total = 0;
        float largest = -INFINITY; // float: g++ 12 for aarch64 fails on fmax of doubles here
        model_logits_last(&r->m, context, n, logits);
        for (int id = 1; id <= 256; id++) largest = fmaxf(largest, logits[id]);
        for (int id = 1; id <= 256; id++) total += p[id] = exp((logits[id] - largest) / demo_sample_temperature);
        double rest = (double)(splitmix64(random, (uint64_t)i) >> 11) / 9007199254740992.0 * total; // 2^53
        int id = 1;
        while (id < 256 && rest >= p[id]) rest -= p[id++];
        if (n == T) memmove(context, context + 1, (size_t)(--n) * sizeof(int));
        context[n++] = id;
        const int shown = id - 1 < ' ' && !isspace(id - 1) ? '?' : id - 1;
        fwrite(text, 1, (size_t)utf8_push(&utf8, (uint8_t)shown, text), stdout);
    }
    fwrite(text, 1, (size_t)utf8_end(&utf8, text), stdout);
    printf("\n");
    free(context);
    free(logits);
}

// Takes a batch whose gradient norm is not finite through the model once more, with checks, and ends the run.
[[noreturn]] static void stop_nonfinite(Run *r, const Step *step, double norm) {
    const int B = (int)r->s.micro_bsz;
    const char *where = nullptr;
    int64_t micro = 0;
    for (; !where && micro < r->s.accumulate_grad_batches; micro++) {
        data_batch(&r->data, step->samples + (micro * n_ranks + rank) * B + 1, B, r->tokens, nullptr);
        where = model_find_nonfinite(&r->m, r->tokens, B, (int)r->s.ctx_len);
    }
    char found[256] = "";
    if (where) snprintf(found, sizeof(found), "first in %s, micro-batch %ld", where, micro);
    const int of = first_rank_that_says(found, sizeof(found));
    if (of < 0) snprintf(found, sizeof(found), "every tensor is finite, the norm itself overflows");
    else if (n_ranks > 1) snprintf(found + strlen(found), sizeof(found) - strlen(found), " of rank %d", of);
    LONG_PATH kept = "none";
    int64_t newest = checkpoint_newest(r->s.out);
    if (newest >= 0) checkpoint_path(kept, r->s.out, "model", newest, "");
    die(3, "step %ld: not finite (gradient norm %g): %s; the update was skipped; last good checkpoint: %s",
        step->step + 1, norm, found, kept);
}

// Queues a step on the device; nothing is waited for. False if a signal came between its micro-batches: it never was.
static bool begin_step(Run *r, Step *step) {
    const int B = (int)r->s.micro_bsz, accumulate = (int)r->s.accumulate_grad_batches;
    const double lr = learning_rate(&r->s, r->p.tokens, r->p.step_tokens);
    const double decay = weight_decay(&r->s, r->p.tokens, r->p.step_tokens);
    *step = {r->p.step, r->p.samples, r->p.tokens, lr, seconds_now()};
    uint8_t *mask = r->data.train_mask.bytes ? r->mask : nullptr;
    const int64_t targets = data_targets(&r->data, step->samples + 1, (int64_t)B * accumulate * n_ranks);
    model_step_begin(&r->m);
    for (int micro = 0; micro < accumulate; micro++) { // the next samples, rank after rank
        if (micro > 0 && stops()) return false;
        data_batch(&r->data, step->samples + ((int64_t)micro * n_ranks + rank) * B + 1, B, r->tokens, mask);
        model_micro_step(&r->m, r->tokens, mask, B, (int)r->s.ctx_len, accumulate, targets);
    }
    model_update(&r->m, step->step, lr, decay);
    r->p.step++;
    r->p.samples += samples_per_step(&r->s);
    r->p.tokens += tokens_per_step(&r->s);
    return true;
}

// Waits for a step's numbers; prints and logs them, after a validation if one is due.
static void end_step(Run *r, const Step *step, bool validation) {
    const StepResult result = model_result(&r->m, step->step);
    // too long where the step waited for the one before, or was read late
    double seconds = seconds_now() - step->begin;
    // too long after a pause
    if (r->step_seconds > 0) seconds = fmin(seconds, seconds_since_last_step(&r->m, step->step));
    const int64_t tokens = tokens_per_step(&r->s);
    const double speed = (double)tokens / seconds; // tokens per second
    const double peak = 100 * speed * model_flops_per_token(&r->m) / (machine_peak_flops() * n_ranks);
    r->step_seconds = r->step_seconds > 0 ? 0.95 * r->step_seconds + 0.05 * seconds : seconds;
    const long left = lround((double)(r->n_steps - step->step - 1) * r->step_seconds);
    char peak_text[32] = "", val_text[32] = "", peak_column[64] = "";
    if (machine_peak_flops() > 0) {
        snprintf(peak_text, sizeof(peak_text), "%.1f", peak);
        snprintf(peak_column, sizeof(peak_column), " | %s %% of peak", peak_text);
    }
    printf("step %5ld of %ld | loss %.4f | norm %.4f | lr %.2e | %.1f ms | %.0f tok/s%s | %ldh%02ldm%02lds left\n",
           step->step + 1, r->n_steps, result.loss, result.norm, step->lr, 1e3 * seconds, speed, peak_column,
           left / 3600, left / 60 % 60, left % 60);
    if (validation && isfinite(result.norm) && validate(r)) {
        snprintf(val_text, sizeof(val_text), "%.9g", r->val_loss);
        const bool best = r->val_loss < r->p.best_loss;
        if (best) r->p.best_loss = r->val_loss;
        if (best && r->s.keep_best) checkpoint_save_best(&r->m, &r->s, &r->p);
    }
    fprintf(r->log, "%ld,%ld,%.9g,%s,%.9g,%.9g,%.2f,%.0f,%s\n", step->step + 1, step->tokens + tokens, result.loss,
            val_text, result.norm, step->lr, 1e3 * seconds, speed, peak_text);
    if (fflush(r->log) != 0) die(1, "%s/log.csv: could not be written: %s", r->s.out, strerror(errno));
    if (!isfinite(result.norm) || !isfinite(result.loss)) stop_nonfinite(r, step, result.norm);
}

static void run_save(Run *r) {
    checkpoint_save(&r->m, &r->s, &r->p);
    r->saved = r->p.step;
}

// Trains until the run ends or a signal asks to stop; all that was done is saved.
static void train(Run *r) {
    const bool validates = r->s.val_every > 0 && data_validation_samples(&r->data) > 0;
    bool first = true, waiting = false;
    Step step, late; // late: if waiting, the step whose result is still to be read
    while (r->p.step < r->n_steps && !stops()) {
        const bool profiled = r->p.step + 1 == r->s.profile_step;
        if (profiled) profile_begin();
        const bool begun = begin_step(r, &step);
        if (profiled) profile_end();
        if (waiting) end_step(r, &late, false);
        waiting = false;
        if (!begun) break;
        const bool last = r->p.step == r->n_steps;
        const bool saves = last || due(r->p.step, r->s.save_every) || due(r->p.step, r->s.keep_every);
        const bool validation = validates && (last || due(r->p.step, r->s.val_every));
        const bool samples = r->data.text && !last && due(r->p.step, r->s.sample_every);
        waiting = !(first || saves || validation || samples || model_step_done(&r->m, step.step));
        late = step;
        first = false;
        if (!waiting) end_step(r, &step, validation);
        if (saves) run_save(r);
        if (samples) print_sample(r, r->p.step);
    }
    if (waiting) end_step(r, &late, false);
    if (r->saved != r->p.step) run_save(r);
}

#if !defined(GOLDFINCH_TEST) && !defined(GOLDFINCH_NO_MAIN)

// The step to go on from. Where there is none, -1: the run is to begin, which needs to be told what it trains on, lest
// a folder's misspelt name starts a demo. Files that are of no use without others are left alone.
static int64_t find_resumed(const Settings *s, bool says_what) {
    struct dirent **names;
    struct stat status;
    if (checkpoint_newest(s->out) < 0 && !print_config && rank == 0) folder_complete(s->out);
    const int64_t newest = checkpoint_newest(s->out);
    if (newest >= 0) return newest;
    const int n = scandir(s->out, &names, is_weights, alphasort);
    if (n > 0)
        die(2,
            "--train.resume 1: %s/ holds %s, but no model_*.safetensors to go on from: put it back, or choose another "
            "--train.out",
            s->out, names[n - 1]->d_name);
    const bool exists = stat(s->out, &status) == 0;
    if (!says_what)
        die(2, "--train.resume 1: %s/ %s; to begin a run there, say what it trains on (-c or --train.data_file)",
            s->out, exists ? "holds no checkpoint" : "does not exist");
    return -1;
}

// The settings, each on top of the ones before: the table's defaults, what holds without a data_file, those of the
// checkpoint to go on from or of the model to begin with, the command line's.
static void run_settings(Run *r, int argc, const char **argv) {
    Settings *s = &r->s, base;
    SafeTensors file;
    LONG_PATH path = "";
    PATH folder;
    settings_default(s);
    settings_parse(s, argc, argv);
    const bool says_what = s->data_file[0] || names_config(argc, argv);
    settings_default(&base);
    if (!s->data_file[0]) settings_preset(&base);
    *s = base;
    settings_parse(s, argc, argv);
    settings_folder(s);
    snprintf(folder, sizeof(folder), "%s", s->out);
    if (s->resume && access(folder, F_OK) == 0 && !print_config) folder_lock(folder);
    r->resumed = s->resume ? find_resumed(s, says_what) : -1;
    r->saved = r->resumed;
    r->p.best_loss = INFINITY;

    const bool resumes = r->resumed >= 0, loads = !resumes && s->load_model[0], partial = loads && s->load_partial;
    bool in_file = false; // whether a file says what the model is
    if (resumes) {
        checkpoint_open(&r->state, folder, r->resumed, &r->p);
        snprintf(path, sizeof(path), "%s", r->state.path);
        settings_default(&base);
        settings_load(&base, &r->state, false);
        if (base.train_stage == 1) base.train_stage = 3; // it was initialized; now train
        in_file = true;
    } else if (loads) {
        safetensors_open(&file, s->load_model);
        snprintf(path, sizeof(path), "%s", s->load_model);
        in_file = safetensors_has_settings(&file);
        if (in_file) settings_load(&base, &file, true);
        safetensors_close(&file);
    }
    *s = base;
    settings_parse(s, argc, argv);
    snprintf(s->out, sizeof(s->out), "%s", folder);
    settings_check(s);
    settings_check_mixers(s);
    settings_derive(&base);
    if (in_file && !partial) settings_agree(s, &base, path);
    if (loads && !in_file) settings_assumed(s, path);
}

// Opens the data and counts what is left to do.
static void run_data(Run *r) {
    Settings *s = &r->s;
    Progress *p = &r->p;
    data_open(&r->data, s);
    const int64_t n = r->data.file_tokens, step = tokens_per_step(s);
    const char *name = r->data.train.name;
    if (p->data_tokens) expect(name, "tokens, as before in this run", -1, p->data_tokens, p->data_tokens, n);
    if (p->data_hash && p->data_hash != r->data.hash)
        die(2,
            "%s%s%s: expected the data that this run began with, found as many tokens, but other ones; a new run on "
            "them can take over the weights: --train.load_model",
            name, s->mask_file[0] ? ", " : "", s->mask_file);
    p->data_tokens = n;
    p->data_hash = r->data.hash;
    if (s->my_exit_tokens == 0) s->my_exit_tokens = n;
    if (p->step == 0 || p->step_tokens == 0) p->step_tokens = step;
    p->samples = p->tokens / s->ctx_len;
    const int64_t left = s->my_exit_tokens - p->tokens;
    r->n_steps = p->step + (left > 0 ? (left + step - 1) / step : 0);
    if (s->max_steps && s->max_steps < r->n_steps) r->n_steps = s->max_steps;
}

static void run_print(const Run *r, int64_t paper) { // paper: sequences of the paper's step, if known
    const int64_t ours = samples_per_step(&r->s);
    settings_print(&r->s);
    if (r->data.train.bytes) data_print(&r->data);
    if (paper && paper != ours) {
        printf("batch      %ld sequences a step, %.3g of the paper's %ld", ours, (double)ours / (double)paper, paper);
        if (paper % ours == 0)
            printf(": --train.accumulate_grad_batches %ld makes it whole", r->s.accumulate_grad_batches * paper / ours);
        printf("\n");
    }
    printf("machine    %s", machine_name());
    printf(n_ranks > 1 ? ", one of %d GPUs\n" : "\n", n_ranks);
    model_print_memory(&r->m);
}

static void run_resume(Run *r) {
    const bool counts_on = safetensors_number(&r->state, "samples") == r->p.samples || r->s.train_stage == 1;
    checkpoint_load(&r->m, &r->state);
    printf("goes on after step %ld of %s/, %ld of %ld tokens\n", r->resumed, r->s.out, r->p.tokens,
           r->s.my_exit_tokens);
    if (!counts_on)
        printf("ctx_len is not what it was: from here on samples come in another order, and some text comes again\n");
}

static void run_begin(Run *r) {
    const Settings *s = &r->s;
    if (s->resume) printf("no checkpoint in %s/, starting at the first step\n", s->out);
    if (!s->load_model[0] || s->load_partial) model_init_weights(&r->m, (uint64_t)s->seed_everything);
    if (s->load_model[0]) {
        const int taken = load_weights(&r->m, s->load_model, s->load_partial);
        printf("%s: %d of the model's %d tensors loaded\n", s->load_model, taken, r->m.n_tensors);
    }
}

static void run_train(Run *r) {
    const Settings *s = &r->s;
    if (r->data.held_back && rank == 0) {
        LONG_PATH path;
        FileOut file;
        snprintf(path, sizeof(path), "%s/val.txt", s->out);
        file_begin(&file, path);
        file_write(&file, r->data.valid.bytes, (size_t)r->data.valid.n_tokens);
        file_end(&file);
    }
    r->log = rank == 0 ? log_open(s->out, r->p.step) : fopen("/dev/null", "w");
    r->tokens = (int *)malloc((size_t)(s->micro_bsz * (s->ctx_len + 1)) * sizeof(int));
    r->mask = (uint8_t *)malloc((size_t)(s->micro_bsz * (s->ctx_len + 1)));
    train(r);
    if (stop_requested) printf("stopped by a signal; --train.resume 1 goes on\n");
}

static void run_close(Run *r) { // what is there at the end
    LONG_PATH path;
    checkpoint_path(path, r->s.out, "model", r->p.step, "");
    printf("checkpoint %s\n", path);
    if (!r->data.text || r->p.step < r->n_steps || stop_requested) return;
    if (r->s.sample_every >= 0) print_sample(r, r->p.step);
    if (r->val_loss > 0 && !stop_requested) {
        printf("validation loss: %.4f nats per byte; what an order-2 byte count gets on the same text: %.4f\n",
               r->val_loss, order2_loss(&r->data.train, &r->data.valid));
    }
}

static bool flag_given(int argc, char **argv, const char *flag) {
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], flag) == 0) return true;
    return false;
}

int main(int argc, char **argv) {
    static Run run; // zeros
    Run *r = &run;
    Settings *s = &r->s;
    const char **arguments = (const char **)argv + 1;
    program_begin("train_goldfinch");
    setvbuf(stdout, nullptr, _IOLBF, 0);
    ranks_from_launcher();
    run_settings(r, argc - 1, arguments);
    if (print_config) {
        settings_print_config(s);
        return 0;
    }
    ranks_start(s, r->resumed); // before anything of CUDA is called
    if (r->resumed >= 0 && !flag_given(argc, argv, "--train.accumulate_grad_batches") &&
        !flag_given(argc, argv, "--train.micro_bsz"))
        ranks_keep_batch(s, &r->p);
    machine_start();
    const bool trains = s->train_stage != 1;
    if (trains) run_data(r);
    model_plan(&r->m, s, (int)s->micro_bsz, (int)s->ctx_len);
    run_print(r, paper_batch(argc - 1, arguments));
    if (rank == 0) folder_create(s->out);
    folder_lock(s->out);
    if (trains || r->resumed >= 0 || n_ranks > 1) model_allocate(&r->m);
    else model_allocate_weights(&r->m); // moments that have not begun are saved as zeros
    if (r->resumed >= 0) run_resume(r);
    else run_begin(r);
    if (trains && r->p.step >= r->n_steps) {
        printf("nothing to do: the run ends at step %ld\n", r->n_steps);
        return 0;
    }
    catch_signals(SA_RESTART); // from here on there is something to lose
    if (rank == 0) folder_remove(s->out, is_temporary);
    if (rank == 0 && r->resumed < 0) folder_begin(s->out);
    if (trains) run_train(r);
    else run_save(r);
    ranks_end();
    if (rank == 0) run_close(r);
    return 0;
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 11. Config files: the demo's preset, the named configs, -h, JSON and YAML, the command line

// What is in force where no data_file is given: the demo, a byte-level model of the project's own source text, or
// minipile where data/minipile.bin lies. Flags override both.
typedef struct Preset {
    const char *key, *value;
} Preset;
static const Preset demo_preset[] = {
    {"model.n_layer", "3"},       {"model.n_embd", "128"},
    {"model.ctx_len", "128"},     {"model.vocab_size", "320"},
    {"train.micro_bsz", "2"},     {"train.lr_init", "2.5e-3"},
    {"train.lr_final", "2.5e-5"}, {"train.lr_decay_type", "linear"},
    {"train.warmup_steps", "40"}, {"train.my_exit_tokens", "588800"}, // 2300 steps
    {"train.data_type", "utf-8"}, {"train.save_every", "1150"},
    {"train.val_every", "2300"},
};
static const int n_demo_preset = sizeof(demo_preset) / sizeof(demo_preset[0]);
static void settings_preset(Settings *s) {
    if (access("data/minipile.bin", R_OK) == 0) {
        setting_set(s, setting_find("train.data_file"), "data/minipile");
        if (access("data/minipile_validation.bin", R_OK) == 0)
            setting_set(s, setting_find("train.validation_data_file"), "data/minipile_validation");
        return;
    }
    for (int i = 0; i < n_demo_preset; i++) setting_set(s, setting_find(demo_preset[i].key), demo_preset[i].value);
}

// Built-in configs: models, then trainings, under the names of the reference's files.
typedef struct BuiltIn {
    const char *name, *yaml;
    int64_t batch; // of a training: sequences of a step, on all GPUs of the paper
} BuiltIn;
static const BuiltIn built_in_configs[] = {
    {"goldfinch", "model:\n  tmix: x060c2\n  tmix2: gold\n  inv_other_layer_ratio: 3\n", 0},
    {"goldfinch_ablation_gold_invratio_2", "model:\n  tmix: x060c2\n  tmix2: gold\n  inv_other_layer_ratio: 2\n", 0},
    {"goldfinch_ablation_gold_invratio_6", "model:\n  tmix: x060c2\n  tmix2: gold\n  inv_other_layer_ratio: 6\n", 0},
    {"goldfinch_ablation_gptalpha", "model:\n  tmix: x060c2\n  tmix2: gptalpha\n  inv_other_layer_ratio: 3\n", 0},
    {"goldfinch_ablation_rope10k",
     "model:\n  tmix: x060c2\n  tmix2: gold\n  inv_other_layer_ratio: 3\n  rope:\n    base: 10000\n", 0},
    {"goldfinch_upgrade",
     "model:\n  tmix: x060\n  tmix2: gold\n  inv_other_layer_ratio: 6\n"
     "train:\n  load_partial: 1\n  lr_final: 1e-5\n",
     0},
    {"finch", "model:\n  tmix: x060\n", 0},
    {"finchc2", "model:\n  tmix: x060c2\n", 0},
    {"finchc2_ablation_no_one_minus_w", "model:\n  tmix: x060c2\n  use_one_minus_w: 0\n", 0},
    {"finchc2_ablation_no_v2", "model:\n  tmix: x060c2\n  use_v2: 0\n", 0},
    {"gptalpha", "model:\n  tmix: gptalpha\n  rope:\n    base: 10000\n", 0},
    {"llama", "model:\n  tmix: llama\n  cmix: llama\n  rope:\n    base: 10000\n", 0},
#define MINIPILE(layers, width, context, first, last, micro, accumulate) \
    "model:\n  n_layer: " #layers "\n  n_embd: " #width "\n  ctx_len: " #context "\n  vocab_size: 65536\n" \
    "train:\n  data_type: binidx\n  data_file: data/minipile\n  validation_data_file: data/minipile_validation\n" \
    "  val_check_interval: 100\n  my_exit_tokens: 1498226207\n  lr_init: " #first "\n  lr_final: " #last "\n" \
    "  warmup_steps: 10\n  beta1: 0.9\n  beta2: 0.99\n  adam_eps: 1e-8\n  weight_decay: 0.001\n" \
    "  micro_bsz: " #micro "\n  accumulate_grad_batches: " #accumulate "\n  grad_cp: 1\n  proj_dir: out\n"
    {"L6D768minipile", MINIPILE(6, 768, 512, 6e-4, 2e-4, 64, 1), 64},
    {"L12D768ctx1024minipile", MINIPILE(12, 768, 1024, 6e-4, 2e-4, 32, 1), 64},
    {"L24D2048ctx2048minipile", MINIPILE(24, 2048, 2048, 3e-4, 1e-4, 8, 4), 128},
    {"L24D2048ctx4096minipile", MINIPILE(24, 2048, 4096, 3e-4, 1e-4, 4, 8), 128},
#undef MINIPILE
};

static void settings_help(void) {
    printf("usage: %s [-c CONFIG] .. [--model.KEY VALUE | --train.KEY VALUE] .. [--print-config]\n\n"
           "A config is a file (YAML or JSON, in the layout of the reference) or a built-in one, later ones win:\n",
           program_name);
    int column = 0;
    for (const BuiltIn &known : built_in_configs) {
        if (column + strlen(known.name) > 108) {
            column = 0;
            printf("\n");
        }
        column += printf("  %s", known.name);
    }
    printf("\n--print-config prints what they and the flags add up to, as a config. To start with:\n"
           "  %s -c goldfinch -c L12D768ctx1024minipile --train.max_steps 10\n\n"
           "Without a data_file: trains on data/minipile if data/minipile.bin is there, else the demo, a\n"
           "small byte-level model of the project's own source text (its values: demo).\n",
           program_name);
    for (int i = 0; i < n_settings; i++) {
        const Setting *row = &settings_table[i];
        if (i == 0 || strcmp(row->part, row[-1].part) != 0) printf("\n%s\n", row->part);
        PATH key, value;
        setting_key(row, key);
        int n = snprintf(value, sizeof(value), "%s", row->initial[0] ? row->initial : "\"\"");
        for (int j = 0; j < n_demo_preset; j++) {
            if (strcmp(demo_preset[j].key, key) != 0) continue;
            snprintf(value + n, sizeof(value) - n, " (demo %s)", demo_preset[j].value);
        }
        printf("  --%-33s %-18s %s\n", key, value, row->help);
    }
}

// ---------------------------------------- JSON, for config files and the headers of safetensors

[[noreturn]] static void json_fail(const Json *j, const char *expected) {
    char found[8] = "the end";
    if (*j->at) snprintf(found, sizeof(found), "'%c'", isprint((unsigned char)*j->at) ? *j->at : '?');
    if (j->error) {
        snprintf(j->error->message, sizeof(j->error->message), "%s: %sbyte %ld: expected %s, found %s", j->path,
                 j->part, (j->at - j->start), expected, found);
        longjmp(j->error->back, 1);
    }
    die(2, "%s: %sbyte %ld: expected %s, found %s", j->path, j->part, (j->at - j->start), expected, found);
}

static char json_peek(Json *j) {
    while (*j->at == ' ' || *j->at == '\n' || *j->at == '\t' || *j->at == '\r') j->at++;
    return *j->at;
}

static void json_expect(Json *j, char c) {
    char expected[4] = {'\'', c, '\'', '\0'};
    if (json_peek(j) != c) json_fail(j, expected);
    j->at++;
}

// After an item: true if a comma announces another one, false if the list or object is closed.
static bool json_more(Json *j, char close) {
    if (json_peek(j) == ',') {
        j->at++;
        return true;
    }
    json_expect(j, close);
    return false;
}

static int64_t json_integer(Json *j) {
    if (!isdigit((unsigned char)json_peek(j))) json_fail(j, "a number");
    char *end;
    errno = 0;
    int64_t value = strtoll(j->at, &end, 10);
    if (errno || strchr(".eE", *end)) json_fail(j, "a whole number below 2^63");
    j->at = end;
    return value;
}

int utf8_encode(uint32_t code, uint8_t *out) { // returns the number of bytes
    if (code < 0x80) {
        out[0] = (uint8_t)code;
        return 1;
    }
    const int n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, code >>= 6) out[i] = (uint8_t)(0x80 | (code & 0x3F));
    out[0] = (uint8_t)((n == 2 ? 0xC0 : n == 3 ? 0xE0 : 0xF0) | code);
    return n;
}

static uint32_t json_hex(Json *j) { // the number of an escape, from its u on
    if (*j->at != 'u' || strspn(j->at + 1, "0123456789abcdefABCDEF") < 4) json_fail(j, "an escape");
    char digits[5] = "";
    memcpy(digits, j->at + 1, 4);
    j->at += 5;
    return (uint32_t)strtoul(digits, nullptr, 16);
}

char *json_string(Json *j) { // unescaped in place
    json_expect(j, '"');
    char *text = j->at, *out = text;
    while (*j->at != '"') {
        unsigned char c = (unsigned char)*j->at;
        if (c < ' ') json_fail(j, "the end of a text");
        j->at++;
        if (c != '\\') {
            *out++ = (char)c;
            continue;
        }
        const char *escapes = "\"\"\\\\//b\bf\fn\nr\rt\t", *e = escapes;
        while (*e && *e != *j->at) e += 2;
        if (*e && *j->at) {
            *out++ = e[1];
            j->at++;
            continue;
        }
        uint32_t code = json_hex(j);
        if (code == 0) json_fail(j, "an escape");
        if (code >= 0xD800 && code < 0xE000) { // half of a character past U+FFFF
            if (code >= 0xDC00 || *j->at != '\\') json_fail(j, "both halves of a character, \\ud8.. \\udc..");
            j->at++;
            const uint32_t low = json_hex(j);
            if (low < 0xDC00 || low > 0xDFFF) json_fail(j, "both halves of a character, \\ud8.. \\udc..");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        out += utf8_encode(code, (uint8_t *)out);
    }
    j->at++;
    *out = '\0';
    return text;
}

// ---------------------------------------- config files, in the reference's layout

// Keys of the reference that have no meaning here; they are accepted and reported.
static const char *unused_keys[] = {
    "train.wandb",
    "train.strategy",
    "train.epoch_begin",
    "train.epoch_save",
    "train.ds_bucket_mb",
    "train.accelerator",
    "train.precision",
    "train.magic_prime",
    "train.log_every_n_steps",
    "train.check_val_every_n_epoch",
};

typedef struct Config { // a file that is being read
    Settings *s;
    const char *path;
    int line;
    // the command line was read before; it says something of these
    bool read_before, tmix, tmix2, rope, brope;
    bool seen[sizeof(settings_table) / sizeof(settings_table[0])];
} Config;

static bool config_unused(const char *key) {
    bool unused = strncmp(key, "runtime.", 8) == 0;
    for (const char *name : unused_keys) unused = unused || strcmp(name, key) == 0;
    return unused;
}

// The reference's name for one of our keys.
static const char *config_key(const char *key) {
    return strcmp(key, "train.val_check_interval") == 0 ? "train.val_every" : key;
}

[[noreturn]] static void config_fail(const Config *c, const char *key, const char *expected, const char *found) {
    die(2, "%s: line %d: %s%sexpected %s, found %s%s%s", c->path, c->line, key, *key ? ": " : "", expected,
        *found ? "\"" : "", *found ? found : "nothing", *found ? "\"" : "");
}

// A value of the file; key with its path, "model.rope.base". An empty value stands for null: the default.
static void config_set(Config *c, const char *key, const char *value) {
    const size_t n = strlen(key), type = strlen(".__type__");
    if (!*value && strcmp(key, "model.rope") == 0) {
        c->s->rope.base = 0;
        return;
    }
    if (!*value && strcmp(key, "model.brope") == 0) {
        c->s->brope.rescale = 0;
        return;
    }
    c->rope = c->rope || strncmp(key, "model.rope.", 11) == 0;
    c->brope = c->brope || strncmp(key, "model.brope.", 12) == 0;
    if (n > type && strcmp(key + n - type, ".__type__") == 0) { // names one of the reference's classes
        for (const char *section : {"model", "train", "model.rope", "model.brope"})
            if (strlen(section) == n - type && strncmp(key, section, n - type) == 0) return;
    }
    if (strcmp(key, "model.alibi") == 0) {
        if (*value) config_fail(c, key, "null, as there is none here", value);
        return;
    }
    key = config_key(key);
    if (config_unused(key)) {
        if (!c->read_before) fprintf(stderr, "%s: line %d: %s is not used here\n", c->path, c->line, key);
        return;
    }
    const Setting *row = setting_find(key);
    if (!row) config_fail(c, "", "a setting (-h lists them all)", key);
    if (c->seen[row - settings_table]) config_fail(c, key, "once", "twice");
    c->seen[row - settings_table] = true;
    c->tmix = c->tmix || strcmp(key, "model.tmix") == 0;
    c->tmix2 = c->tmix2 || strcmp(key, "model.tmix2") == 0;
    const bool text = strcmp(row->kind, "WORD") == 0 || strcmp(row->kind, "PATH") == 0;
    if (!*value && !text) return;
    const char *expected = setting_set(c->s, row, value);
    if (expected) config_fail(c, key, expected, value);
}

// A YAML scalar that begins at text, unquoted in place; what follows it may be a comment.
static char *yaml_scalar(Config *c, const char *key, char *text) {
    char *in = text, *out = text;
    const char quote = *in == '"' || *in == '\'' ? *in : 0;
    if (quote) {
        for (in++;; in++) {
            if (!*in) config_fail(c, key, "a closing quote", "");
            if (*in == quote && quote == '\'' && in[1] == '\'') {
                in++;
            } else if (*in == quote) {
                break;
            } else if (*in == '\\' && quote == '"') {
                in++;
                if (!strchr("\"\\/", *in) || !*in) config_fail(c, key, "the escape \\\" or \\\\", "another one");
            }
            *out++ = *in;
        }
        in++;
        while (*in == ' ') in++;
        if (*in && *in != '#') config_fail(c, key, "the end of the line", in);
        *out = '\0';
        return text;
    }
    if (*in && strchr("|>&*!%@`[]{},-?", *in) && !(*in == '-' && (isdigit((unsigned char)in[1]) || in[1] == '.'))) {
        if (strcmp(in, "{}") != 0) config_fail(c, key, "a plain or quoted value", in);
        *in = '\0';
    }
    for (; *in && !(*in == '#' && (in == text || in[-1] == ' ')); in++) *out++ = *in;
    while (out > text && out[-1] == ' ') out--;
    *out = '\0';
    if (strcmp(text, "null") == 0 || strcmp(text, "~") == 0) *text = '\0';
    if (strcmp(text, "true") == 0) strcpy(text, "1");
    if (strcmp(text, "false") == 0) strcpy(text, "0");
    return text;
}

// The YAML that these configs need: nested maps by indentation, scalars, comments.
static void config_yaml(Config *c, char *text) {
    // open maps: where they stand, how long their path is
    struct {
        int indent;
        size_t length;
    } level[8] = {};
    int depth = 0;
    bool opened = true; // the last line opened a map, or may have
    PATH path = "";
    for (char *line = text, *next; line; line = next) {
        next = strchr(line, '\n');
        if (next) *next++ = '\0';
        c->line++;
        int indent = 0, end = (int)strlen(line);
        while (end > 0 && strchr(" \r\t", line[end - 1])) line[--end] = '\0';
        while (line[indent] == ' ') indent++;
        char *key = line + indent;
        if (!*key || *key == '#' || strcmp(line, "---") == 0) continue;
        if (strchr(line, '\t')) config_fail(c, "", "spaces", "a tab");
        if (indent > level[depth].indent) {
            if (!opened) config_fail(c, "", "the indentation of the line above", key);
            if (depth == 7) config_fail(c, "", "at most 7 levels", key);
            level[++depth] = {indent, strlen(path)};
        }
        while (indent < level[depth].indent) depth--;
        if (indent != level[depth].indent || (depth == 0 && indent != 0))
            config_fail(c, "", "the indentation of a map above", key);
        char *colon = key;
        while (isalnum((unsigned char)*colon) || *colon == '_') colon++;
        if (colon == key || *colon != ':' || (colon[1] && colon[1] != ' ')) config_fail(c, "", "\"key: value\"", key);
        *colon++ = '\0';
        while (*colon == ' ') colon++;
        path[level[depth].length] = '\0';
        size_t n = strlen(path);
        const int room = (int)(sizeof(path) - n);
        if (snprintf(path + n, room, "%s%s", n ? "." : "", key) >= room) config_fail(c, "", "a shorter key", key);
        opened = !*colon || *colon == '#';
        if (!opened) config_set(c, path, yaml_scalar(c, path, colon));
    }
}

static void config_json(Config *c, Json *j, PATH path) { // a map; path: where it stands
    const size_t n = strlen(path);
    json_expect(j, '{');
    if (json_peek(j) == '}') {
        j->at++;
        return;
    }
    do {
        const char *key = json_string(j);
        json_expect(j, ':');
        if (snprintf(path + n, sizeof(PATH) - n, "%s%s", n ? "." : "", key) >= (int)(sizeof(PATH) - n))
            json_fail(j, "a shorter key");
        c->line = 1;
        for (const char *at = j->start; at < j->at; at++) c->line += *at == '\n';
        const char kind = json_peek(j);
        if (kind == '{') {
            config_json(c, j, path);
            continue;
        }
        PATH value = "";
        if (kind == '"') {
            snprintf(value, sizeof(value), "%s", json_string(j));
        } else {
            const size_t length = strspn(j->at, "+-.0123456789eEaflnrstu");
            if (length == 0 || length >= sizeof(value)) json_fail(j, "a value");
            memcpy(value, j->at, length);
            j->at += length;
            if (strcmp(value, "null") == 0) value[0] = '\0';
            else if (strcmp(value, "true") == 0) strcpy(value, "1");
            else if (strcmp(value, "false") == 0) strcpy(value, "0");
        }
        config_set(c, path, value);
    } while (path[n] = '\0', json_more(j, '}'));
    path[n] = '\0';
}

// The built-in config of this name; also of a file's name, as in configs/goldfinch.yaml, where no such file is.
static const BuiltIn *built_in_find(const char *name) {
    const char *slash = strrchr(name, '/'), *base = slash ? slash + 1 : name, *dot = strrchr(base, '.');
    const bool file = dot && (strcmp(dot, ".yaml") == 0 || strcmp(dot, ".yml") == 0) && access(name, F_OK) != 0;
    for (const BuiltIn &known : built_in_configs) {
        if (strcmp(known.name, name) == 0) return &known;
        if (file && strlen(known.name) == (size_t)(dot - base) && strncmp(known.name, base, dot - base) == 0)
            return &known;
    }
    return nullptr;
}

static bool names_config(int argc, const char **argv) {
    for (int i = 0; i + 1 < argc; i++)
        if (strcmp(argv[i], "-c") == 0) return true;
    return false;
}

static int64_t paper_batch(int argc, const char **argv) {
    int64_t batch = 0;
    for (int i = 0; i + 1 < argc; i++) {
        const BuiltIn *known = strcmp(argv[i], "-c") == 0 ? built_in_find(argv[i + 1]) : nullptr;
        if (known && known->batch) batch = known->batch;
    }
    return batch;
}

// A built-in config, or a file in YAML or JSON, on top of what s holds.
static void config_read(Settings *s, const char *name, bool read_before) {
    Config config = {s, name, 0, read_before, false, false, false, false, {}}, *c = &config;
    char *text = nullptr;
    const BuiltIn *known = built_in_find(name);
    if (known) {
        text = strdup(known->yaml);
        if (strcmp(known->name, name) != 0 && !read_before)
            fprintf(stderr, "-c %s: no such file here, so the built-in config %s\n", name, known->name);
    } else {
        FILE *file = fopen(name, "rb");
        if (!file) die(2, "-c %s: no built-in config, and no file: %s", name, strerror(errno));
        size_t room = 1 << 20, n;
        text = (char *)malloc(room + 1);
        n = fread(text, 1, room, file);
        text[n] = '\0';
        const bool whole = !ferror(file) && feof(file);
        fclose(file);
        if (!whole) die(2, "%s: expected a file of less than 1 MiB", name);
        if (strlen(text) != n) die(2, "%s: expected text, found a zero byte", name);
    }
    char *content = text + (strncmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0); // without a byte order mark
    if (content[strspn(content, " \t\r\n")] == '{') {
        Json json = {content, content, name, "", nullptr};
        PATH path = "";
        config_json(c, &json, path);
        if (json_peek(&json) != '\0') json_fail(&json, "the end");
    } else {
        config_yaml(c, content);
    }
    // the reference's default: one mixer everywhere
    if (c->tmix && !c->tmix2) memset(s->tmix2, 0, sizeof(s->tmix2));
    auto seen = [&](const char *key) { return c->seen[setting_find(key) - settings_table]; };
    if (c->rope && s->rope.base == 0 && !seen("model.rope.base")) { s->rope.base = 10000; } // a section's defaults
    if (c->brope && s->brope.rescale == 0 && !seen("model.brope.rescale")) s->brope.rescale = 1;
    free(text);
}

// All settings in a form that -c reads back.
static void settings_print_config(const Settings *s) {
    PATH section = "", group = "";
    for (int i = 0; i < n_settings; i++) {
        const Setting *row = &settings_table[i];
        PATH key, value;
        setting_key(row, key);
        setting_get(s, row, value);
        char *name = strchr(key, '.') + 1, *dot = strchr(name, '.');
        name[-1] = '\0';
        if (strcmp(key, section) != 0) printf("%s:\n", key);
        snprintf(section, sizeof(section), "%s", key);
        if (dot) {
            *dot = '\0';
            if (strcmp(name, group) != 0) printf("  %s:\n", name);
            snprintf(group, sizeof(group), "%s", name);
            name = dot + 1;
        }
        const bool text = strcmp(row->kind, "WORD") == 0 || strcmp(row->kind, "PATH") == 0;
        printf("  %s%s: ", dot ? "  " : "", name);
        if (text) putchar('"');
        for (const char *t = value; *t; t++) printf(text && (*t == '"' || *t == '\\') ? "\\%c" : "%c", *t);
        printf(text ? "\"\n" : "\n");
    }
}

// A command line without the program's name, on top of what s holds: first its configs in their order, then its flags.
static void settings_parse(Settings *s, int argc, const char **argv) {
    static bool read_before = false;
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < argc; i += 2) {
            if (strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--help") == 0) {
                settings_help();
                exit(0);
            }
            if (strcmp(argv[i], "--print-config") == 0) {
                print_config = true;
                i--;
                continue;
            }
            const bool config = strcmp(argv[i], "-c") == 0, key = strncmp(argv[i], "--", 2) == 0;
            const bool unused = key && config_unused(argv[i] + 2);
            const Setting *row = key ? setting_find(config_key(argv[i] + 2)) : nullptr;
            if (!row && !config && !unused) die(2, "unknown setting \"%s\" (-h lists them all)", argv[i]);
            if (i + 1 == argc) die(2, "%s: a value is missing", argv[i]);
            if (config && pass == 0) config_read(s, argv[i + 1], read_before);
            if (unused && pass == 0 && !read_before) fprintf(stderr, "%s is not used here\n", argv[i]);
            if (config || unused || pass == 0) continue;
            const char *expected = setting_set(s, row, argv[i + 1]);
            if (expected) die(2, "%s: expected %s, found \"%s\"", argv[i], expected, argv[i + 1]);
        }
    }
    read_before = true;
}

#ifdef GOLDFINCH_TEST
// The interface of test_goldfinch.c to this file's data and schedules.
extern "C" {

double gf_learning_rate(int argc, const char **argv, int64_t step) {
    Settings s;
    settings_default(&s);
    settings_parse(&s, argc, argv);
    settings_check(&s);
    return learning_rate(&s, step * tokens_per_step(&s), tokens_per_step(&s));
}

void gf_sampler(int64_t n_tokens, int64_t ctx_len, int64_t *prime, int n, int64_t *offsets) {
    *prime = magic_prime(n_tokens, ctx_len);
    for (int i = 0; i < n; i++) offsets[i] = sample_start(*prime, ctx_len, i + 1);
}

int64_t gf_binidx(const char *prefix, int64_t *n_docs, int32_t *tokens, int64_t max) {
    Dataset d;
    memset(&d, 0, sizeof(d));
    dataset_open_binidx(&d, prefix);
    *n_docs = d.n_documents;
    dataset_read(&d, 0, d.n_tokens < max ? d.n_tokens : max, INT32_MAX, tokens);
    munmap((void *)d.bytes, (size_t)(d.n_tokens * dataset_token_size[d.code]));
    return d.n_tokens;
}
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The interface through which test_goldfinch.c reaches the model and the kernels; host arrays of floats throughout

#ifdef GOLDFINCH_TEST

static void model_free(Model *m) {
    CUDA_CHECK(cudaStreamSynchronize(stream));
    if (PRECISION_BF16) cudaFree(m->params);
    if (m->gradients_at >= 0) m->grads = nullptr;
    for (void *p : {(void *)m->master, (void *)m->grads, (void *)m->moment1, (void *)m->moment2, (void *)m->activations,
                    (void *)m->pieces, (void *)m->tokens, (void *)m->squares, (void *)m->state})
        cudaFree(p);
    for (int i = 0; i < 4; i++) {
        cudaFreeHost(m->staged[i]);
        cudaEventDestroy(m->staged_done[i]);
    }
    // null where only inference was asked for
    for (int i = 0; i < 3 && m->results; i++) cudaEventDestroy(m->result_done[i]);
    cudaFreeHost(m->results);
    model_free_plan(m);
}

extern "C" {

int gf_precision(void) { return PRECISION_BF16 ? 16 : 32; }

const char *gf_device(void) {
    machine_start();
    return machine_name();
}

int gf_supported(const char *tmix, const char *tmix2, const char *cmix, const char *cmix2) {
    return find_mixer(TIME_MIXERS, tmix) && (!tmix2[0] || find_mixer(TIME_MIXERS, tmix2)) &&
           find_mixer(CHANNEL_MIXERS, cmix) && (!cmix2[0] || find_mixer(CHANNEL_MIXERS, cmix2));
}

Model *gf_create(int argc, const char **argv, int B, int T) {
    Settings s;
    settings_default(&s);
    settings_parse(&s, argc, argv);
    settings_check(&s);
    Model *m = (Model *)malloc(sizeof(*m));
    model_plan(m, &s, B, T);
    model_allocate(m);
    return m;
}

void gf_free(Model *m) {
    model_free(m);
    free(m);
}

int gf_num_tensors(Model *m) { return m->n_tensors; }
const char *gf_tensor_name(Model *m, int i) { return m->tensors[i].name; }

int gf_tensor_shape(Model *m, int i, int64_t shape[4]) {
    for (int j = 0; j < m->tensors[i].ndim; j++) shape[j] = m->tensors[i].shape[j];
    return m->tensors[i].ndim;
}

void gf_tensor_group(Model *m, int i, double *lr_scale, double *weight_decay) {
    *lr_scale = m->tensors[i].lr_scale;
    *weight_decay = m->tensors[i].weight_decay;
}

void gf_set_param(Model *m, int i, const float *values) {
    block_write(m, m->master, &m->tensors[i], values);
    model_params_changed(m);
}

void gf_get_param(Model *m, int i, float *values) {
    CUDA_CHECK(cudaStreamSynchronize(stream));
    const float *master = PRECISION_BF16 ? (const float *)whole_block(m, m->master) : m->master;
    CUDA_CHECK(
        cudaMemcpy(values, master + m->tensors[i].offset, m->tensors[i].size * sizeof(float), cudaMemcpyDeviceToHost));
}

void gf_get_grad(Model *m, int i, float *values) {
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaMemcpy(values, m->grads + m->tensors[i].offset, m->tensors[i].size * sizeof(float),
                          cudaMemcpyDeviceToHost));
}

void gf_init_weights(Model *m, uint64_t seed) { model_init_weights(m, seed); }
void gf_zero_grad(Model *m) { model_step_begin(m); }

// targets (B, T): the inputs one later, or -1 where they do not count. Returns the sum of losses over step_targets.
double gf_masked_loss_backward(Model *m, const int *tokens, const int *targets, int B, int T, int accumulate,
                               int64_t step_targets) {
    const size_t n = (size_t)B * (T + 1);
    // the model takes T + 1 tokens in a row, and a mask if any does not count
    int *both = (int *)malloc(n * sizeof(int));
    uint8_t *mask = (uint8_t *)calloc(n, 1);
    bool masked = false;
    double before[2], after[2];
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaMemcpy(before, m->totals, sizeof(before), cudaMemcpyDeviceToHost));
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < T; t++) {
            const int target = targets[b * T + t];
            both[b * (T + 1) + t] = tokens[b * T + t];
            if (t + 1 < T && target >= 0 && tokens[b * T + t + 1] != target)
                die(1, "gf_loss_backward: targets are not the next tokens");
            mask[b * (T + 1) + t + 1] = target >= 0;
            masked = masked || target < 0;
        }
        both[b * (T + 1) + T] = targets[b * T + T - 1] >= 0 ? targets[b * T + T - 1] : 0;
    }
    model_micro_step(m, both, masked ? mask : nullptr, B, T, accumulate, step_targets);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaMemcpy(after, m->totals, sizeof(after), cudaMemcpyDeviceToHost));
    free(both);
    free(mask);
    return (after[0] - before[0]) / (double)m->targets_in_step;
}

double gf_loss_backward(Model *m, const int *tokens, const int *targets, int B, int T, int accumulate) {
    const int micro_batches = accumulate * n_ranks;
    return gf_masked_loss_backward(m, tokens, targets, B, T, accumulate, (int64_t)B * T * micro_batches) *
           micro_batches;
}

int gf_activation(Model *m, const char *name, float *out) { return model_activation(m, name, out) ? 0 : -1; }

double gf_update(Model *m, int step, double lr) {
    model_update(m, step, lr, m->s.weight_decay);
    return model_result(m, step).norm;
}

int gf_ranks(int n) { // starts n - 1 more processes; returns this one's rank
    Settings s;
    settings_default(&s);
    s.devices = n;
    ranks_start(&s, -1);
    return rank;
}

double gf_update_loss(Model *m, int step) { return model_result(m, step).loss; } // of all ranks

// x (rows, A) rotated in place as q and k of positions first, first + 1, ..
void gf_rope(int argc, const char **argv, int64_t first, int rows, int A, float *x) {
    Settings s;
    floatX *device, *host = (floatX *)malloc((size_t)rows * A * sizeof(floatX));
    settings_default(&s);
    settings_parse(&s, argc, argv);
    machine_start();
    device_alloc((void **)&device, (int64_t)rows * A * sizeof(floatX));
    for (int i = 0; i < rows * A; i++) host[i] = (floatX)x[i];
    CUDA_CHECK(cudaMemcpy(device, host, (size_t)rows * A * sizeof(floatX), cudaMemcpyHostToDevice));
    rope_rotate_kernel<<<rows, row_threads(A), 0, stream>>>(device, make_rope(&s), first, rows, A, 1);
    copy_to_host(x, device, (int64_t)rows * A);
    cudaFree(device);
    free(host);
}

void gf_wkv(int B, int T, int H, const float *r, const float *k, const float *v, const float *w, const float *u,
            int one_minus_w, float *y, const float *dy, float *dr, float *dk, float *dv, float *dw, float *du) {
    machine_start();
    const int64_t A = H * N, n = (int64_t)B * T * A;
    const float *inputs[6] = {r, k, v, w, dy, u};
    float *outputs[5] = {y, dr, dk, dv, dw};
    floatX *device[11]; // r k v w dy u, y dr dk dv dw
    floatX *host = (floatX *)malloc(n * sizeof(floatX));
    for (int i = 0; i < 11; i++) {
        const int64_t count = i == 5 ? A : n;
        device_alloc((void **)&device[i], n * sizeof(floatX));
        // NaN: every element must be written
        if (i >= 6) CUDA_CHECK(cudaMemset(device[i], 0xff, n * sizeof(floatX)));
        if (i >= 6 || !inputs[i]) continue;
        for (int64_t j = 0; j < count; j++) host[j] = (floatX)inputs[i][j];
        CUDA_CHECK(cudaMemcpy(device[i], host, count * sizeof(floatX), cudaMemcpyHostToDevice));
    }
    float *states, *sums;
    device_alloc((void **)&states, B * H * ceil_div(T, CHUNK) * N * N * sizeof(float));
    device_alloc((void **)&sums, 2 * B * A * sizeof(float));
    const Wkv p = {device[0], device[1],        device[2], device[3], nullptr, u ? device[5] : nullptr,
                   nullptr,   one_minus_w != 0, states,    nullptr,   T,       H};
    wkv_forward(device[6], p, B);
    wkv_backward({device[4], device[7], device[8], device[9], device[10], sums, sums + B * A}, p, B);
    for (int i = 0; i < 5; i++) copy_to_host(outputs[i], device[6 + i], n);
    float *du_of = (float *)malloc(B * A * sizeof(float));
    CUDA_CHECK(cudaMemcpy(du_of, sums + B * A, B * A * sizeof(float), cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < A && du; i++) {
        du[i] = 0;
        for (int b = 0; b < B; b++) du[i] += du_of[b * A + i];
    }
    CUDA_CHECK(cudaGetLastError());
    for (floatX *array : device) cudaFree(array);
    cudaFree(states);
    cudaFree(sums);
    free(host);
    free(du_of);
}
}
#endif
