// Feeds a reader of files with damaged and random ones, under the sanitizers:
//
//     make GPU=0 SANITIZE=address,undefined dev/fuzz && dev/fuzz READER|all [SECONDS [SEED]]
//
// READER: checkpoint (a model for inference), pair (what a run goes on from), state (--load-state), index (.idx and
// .bin), vocabulary, config, requests (--requests). But for config, which makes its own, an input is a valid file with
// a few bytes, numbers or stretches changed, mostly where its header is. Each must be read or turned away with exit
// code 2, within ten seconds; requests must all be answered.
// Inputs are numbered by their seeds: dev/fuzz READER 0 SEED tries one alone, and leaves it in the folder it names.
//
// A child process tries some hundreds of inputs, one after the other: what an input that was turned away leaves behind
// is gone with it, and so is what crashes.

#include <ftw.h>
#include <setjmp.h>
#include <stdlib.h>
#include <sys/wait.h>

static jmp_buf rejected;
static int exit_code;
[[noreturn]] static void exit_here(int code) { // die() ends here instead of the process
    exit_code = code;
    longjmp(rejected, 1);
}
#define exit exit_here
#define GOLDFINCH_NO_MAIN
#define GOLDFINCH_INFER_NO_MAIN
#include "../infer_goldfinch.cu"
#undef exit

extern "C" const char *__asan_default_options(void) { return "detect_leaks=0:allocator_may_return_null=1"; }

static uint64_t random_state;
static void seed_random(uint64_t seed) { random_state = seed * 0x9E3779B97F4A7C15ull + 1; }
static unsigned draw(unsigned n) { // 0 .. n - 1
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((random_state >> 33) % n);
}

static char input[1 << 23]; // the file to be tried
static size_t length;
static void add(const char *part) {
    const size_t n = strlen(part);
    if (length + n < sizeof(input)) memcpy(input + length, part, n), length += n;
}

// ---------------------------------------------------------------------------------------------------------------------
// Damage

static void replace_stretch(size_t at, size_t n, const void *by, size_t n_by) {
    if (at + n > length || length - n + n_by > sizeof(input)) return;
    memmove(input + at + n_by, input + at + n, length - at - n);
    memcpy(input + at, by, n_by);
    length += n_by - n;
}

// Another number in the place of one in decimal digits, at `at` or behind it.
static void change_number(size_t at) {
    static const char *numbers[] = {"0",
                                    "1",
                                    "-1",
                                    "2",
                                    "7",
                                    "64",
                                    "255",
                                    "4096",
                                    "2147483647",
                                    "2147483648",
                                    "1e",
                                    "1e9",
                                    "4294967296",
                                    "0.",
                                    "00",
                                    "9223372036854775807",
                                    "18446744073709551615"};
    while (at < length && !isdigit((unsigned char)input[at])) at++;
    size_t n = 0;
    while (at + n < length && isdigit((unsigned char)input[at + n])) n++;
    const char *by = numbers[draw(sizeof(numbers) / sizeof(numbers[0]))];
    replace_stretch(at, n, by, strlen(by));
}

static void put_words(size_t at) { // a whole number of 4 or 8 bytes
    const int64_t values[] = {0,         1,         -1,         2,         255,       65536,
                              INT32_MAX, INT32_MIN, UINT32_MAX, INT64_MAX, INT64_MIN, (int64_t)length};
    const uint64_t value = (uint64_t)values[draw(sizeof(values) / sizeof(values[0]))] + draw(3) - 1;
    const size_t width = draw(2) ? 8 : 4;
    if (at + width <= length) memcpy(input + at, &value, width);
}

static void put_token(size_t at) {
    static const char *tokens[] = {"\"",
                                   "\\",
                                   "{",
                                   "}",
                                   "[",
                                   "]",
                                   ":",
                                   ",",
                                   "\"F32\"",
                                   "\"BF16\"",
                                   "\"I64\"",
                                   "\\u0000",
                                   "\\ud83d",
                                   "\\ud83d\\ude00",
                                   "\"__metadata__\":{},",
                                   "\"shape\":[],",
                                   "\n",
                                   "'",
                                   "b'",
                                   "\\x",
                                   "\\N{",
                                   "\xff",
                                   "\r"};
    const char *by = tokens[draw(sizeof(tokens) / sizeof(tokens[0]))];
    replace_stretch(at, draw(2) ? 0 : draw(8), by, strlen(by));
}

// One to four changes. important: bytes at the beginning where most of them fall.
static void damage(size_t important) {
    for (int n = 1 + (int)draw(4); n > 0 && length > 0; n--) {
        const size_t range = draw(5) && important < length ? important : length, at = draw((unsigned)range);
        switch (draw(9)) {
        case 0: input[at] = (char)draw(256); break;
        case 1: input[at] ^= (char)(1 << draw(8)); break;
        case 2: put_words(at); break;
        case 3: put_words(at / 8 * 8 + draw(2) * 2); break;
        case 4: change_number(at); break;
        case 5: put_token(at); break;
        case 6: replace_stretch(at, draw(40), "", 0); break;
        case 7: { // a stretch twice
            char copy[64];
            const size_t size = draw(sizeof(copy));
            if (at + size > length) break;
            memcpy(copy, input + at, size);
            replace_stretch(draw((unsigned)range), 0, copy, size);
            break;
        }
        default:
            if (draw(4) == 0) length = at;
        }
    }
}

static void take_file(const char *path) {
    FILE *file = fopen(path, "rb");
    length = file ? fread(input, 1, sizeof(input), file) : 0;
    if (file) fclose(file);
}

static void write_file(const char *path, const void *bytes, size_t n) {
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, n, file) != n || fclose(file) != 0) abort();
}

// A safetensors file's header, which the first eight bytes tell the length of.
static size_t header_bytes(void) {
    uint64_t n = 0;
    if (length >= 8) memcpy(&n, input, 8);
    return n < length ? (size_t)n + 8 : length;
}

// ---------------------------------------------------------------------------------------------------------------------
// Readers. make: valid files, once. attempt: one input, with the random numbers seeded.

static Settings settings;
static Model model;      // of the checkpoint
static Infer *engine;    // with its weights
static LONG_PATH folder; // where all files are: the working directory

static void small_model(Settings *s) {
    settings_default(s);
    s->n_layer = 3, s->n_embd = 64, s->ctx_len = 32, s->vocab_size = 264, s->micro_bsz = 1,
    s->kv_cache_compression_ratio = 16;
    s->save_every = 1;
    snprintf(s->data_type, sizeof(s->data_type), "utf-8");
    snprintf(s->out, sizeof(s->out), "run");
    settings_check(s);
}

static void make_checkpoint(void) {
    Progress p = {};
    small_model(&settings);
    folder_create("run");
    model_plan(&model, &settings, 1, 32);
    model_allocate(&model);
    model_init_weights(&model, 1);
    p.step = 5, p.samples = 5, p.tokens = 160;
    checkpoint_save(&model, &settings, &p);
}

static void attempt_checkpoint(void) { // as infer_open, but for the memory that other settings would need
    SafeTensors file;
    Settings s;
    Model planned;
    take_file("run/model_000005.safetensors");
    damage(header_bytes());
    write_file("model", input, length);
    safetensors_open(&file, "model");
    settings_of_model(&s, &file);
    settings_check_mixers(&s);
    if (s.n_layer > 64 || s.vocab_size > 100000 || s.ctx_len > 1 << 20) return;
    model_plan(&planned, &s, 1, 32);
    if (planned.n_parameters == model.n_parameters) take_weights(&model, &file, false);
}

static void attempt_pair(void) {
    SafeTensors state;
    Settings s;
    Progress p = {};
    const bool half = draw(4) == 0;
    for (int i = 0; i < 2; i++) {
        const char *names[] = {"model_000005.safetensors", "state_000005.safetensors"};
        LONG_PATH from, to;
        snprintf(from, sizeof(from), "run/%s", names[i]);
        snprintf(to, sizeof(to), "damaged/%s", names[i]);
        take_file(from);
        if (i != half) damage(header_bytes());
        write_file(to, input, length);
    }
    settings_default(&s);
    checkpoint_open(&state, "damaged", 5, &p);
    settings_load(&s, &state, false);
    settings_check(&s);
    settings_check_mixers(&s);
    checkpoint_load(&model, &state);
}

static void make_state(void) {
    int ids[20];
    FileOut out;
    static SafeTensors file; // the engine hashes it whenever a state is loaded
    const Utf8 nothing = {};
    make_checkpoint();
    safetensors_open(&file, "run/model_000005.safetensors");
    engine = infer_open(&file, KV_COMPRESSED, 64, 0, WEIGHTS_FLOAT);
    for (int i = 0; i < 20; i++) ids[i] = 1 + i;
    infer_feed(engine, ids, 20);
    file_begin(&out, "good.st");
    infer_save_state(engine, &out, &nothing);
}

static void attempt_state(void) {
    Utf8 unfinished;
    take_file("good.st");
    damage(header_bytes());
    write_file("state", input, length);
    infer_load_state(engine, "state", &unfinished);
}

static void make_nothing(void) { small_model(&settings); }

static void attempt_index(void) {
    static const uint8_t letters[] = {1, 2, 3, 4, 5, 8};
    const uint8_t code = letters[draw(6)];
    const int width = dataset_token_size[code];
    const uint64_t n = draw(6), marks = 1 + draw(6), one = 1;
    uint64_t tokens = 0;
    length = 0;
    auto put = [](const void *p, size_t bytes) { memcpy(input + length, p, bytes), length += bytes; };
    put("MMIDIDX\0\0", 9);
    put(&one, 8), put(&code, 1), put(&n, 8), put(&marks, 8);
    int32_t sizes[6];
    for (uint64_t i = 0; i < n; i++) sizes[i] = (int32_t)draw(100), put(&sizes[i], 4);
    for (uint64_t i = 0; i < n; i++) {
        const uint64_t offset = tokens * (uint64_t)width;
        put(&offset, 8);
        tokens += (uint64_t)sizes[i];
    }
    for (uint64_t i = 0; i < marks; i++) {
        const uint64_t mark = i == 0 ? 0 : i + 1 == marks ? n : i < n ? i : n;
        put(&mark, 8);
    }
    if (draw(8)) damage(length);
    write_file("data.idx", input, length);
    length = (size_t)tokens * (size_t)width + (draw(10) == 0);
    for (size_t i = 0; i < length; i++)
        input[i] = (char)(width > 1 && i % (size_t)width ? 0 : draw(draw(50) ? 120 : 256));
    write_file("data.bin", input, length);
    Dataset d;
    int ids[600];
    snprintf(settings.data_type, sizeof(settings.data_type), "binidx");
    dataset_open(&d, &settings, "data");
    dataset_read(&d, 0, d.n_tokens < 600 ? d.n_tokens : 600, 264, ids);
}

static void attempt_vocabulary(void) {
    char line[64];
    Tokenizer t;
    length = 0;
    for (int i = 0; i < 256; i++) {
        snprintf(line, sizeof(line), "%d b'\\x%02x' 1\n", i + 1, i);
        add(line);
    }
    for (int i = 0; i < 40; i++) {
        snprintf(line, sizeof(line), "%d %c%c%c%d%s%c %d\n", 257 + i, '\'', 'a' + i % 26, 'a' + i / 26, i % 10,
                 i % 3 ? "" : "\\n", '\'', i % 3 ? 3 : 4);
        add(line);
    }
    if (draw(8)) damage(length);
    write_file("vocabulary", input, length);
    tokenizer_open(&t, "vocabulary");
    static int ids[sizeof(input)];
    const int64_t n = encode(&t, (const uint8_t *)input, (int64_t)length, ids);
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= t.n_ids) abort();
    tokenizer_close(&t);
}

// ---- configs: random bytes, random trees, damaged ones ----

static void add_key(void) {
    static const char *odd[] = {"__type__", "rope", "brope", "runtime",   "model", "train",
                                "wandb",    "x",    "",      "n_layer.x", "a b"};
    PATH key;
    if (draw(8) == 0) {
        add(odd[draw(11)]);
        return;
    }
    setting_key(&settings_table[draw(n_settings)], key);
    add(draw(20) ? strchr(key, '.') + 1 : key);
}

static void add_value(void) {
    static const char *values[] = {"1",
                                   "12",
                                   "64",
                                   "768",
                                   "-1",
                                   "0",
                                   "1e-4",
                                   "nan",
                                   "inf",
                                   "1e400",
                                   "x060",
                                   "gold",
                                   "llama",
                                   "gptalpha",
                                   "\"quoted\"",
                                   "'it''s'",
                                   "\"open",
                                   "null",
                                   "~",
                                   "true",
                                   "{}",
                                   "[1]",
                                   "|",
                                   "99999999999999999999",
                                   "x060c2 # why",
                                   "data/minipile",
                                   ""};
    add(values[draw(sizeof(values) / sizeof(values[0]))]);
}

static void add_yaml_tree(int depth) {
    for (int i = draw(5); i >= 0; i--) {
        for (int j = 0; j < 2 * depth - (draw(30) == 0); j++) add(draw(60) ? " " : "\t");
        add_key();
        add(draw(30) ? ":" : "");
        if (depth < 5 && draw(4) == 0) {
            add("\n");
            add_yaml_tree(depth + 1);
            continue;
        }
        add(draw(30) ? " " : "");
        add_value();
        add("\n");
    }
}

static void add_json_tree(int depth) {
    add("{");
    for (int i = draw(5); i >= 0; i--) {
        add("\"");
        add_key();
        add("\":");
        if (depth < 40 && draw(3) == 0) add_json_tree(depth + 1);
        else if (draw(2)) {
            add("\"");
            add_value();
            add("\"");
        } else add_value();
        add(i ? "," : "");
    }
    add(draw(30) ? "}" : "");
}

static void make_config(void) {
    length = 0;
    switch (draw(4)) {
    case 0:
        for (int n = draw(300); n > 0; n--) input[length++] = (char)draw(256);
        break;
    case 1:
        add(draw(2) ? "model:\n" : "train:\n");
        add_yaml_tree(1);
        break;
    case 2: add_json_tree(0); break;
    default: add(built_in_configs[draw(sizeof(built_in_configs) / sizeof(built_in_configs[0]))].yaml);
    }
    if (draw(3) == 0) damage(length);
}

// What the checks accept must print as a config that reads back to the same settings.
static void attempt_config(void) {
    static Settings s, again;
    make_config();
    write_file("config", input, length);
    settings_default(&s);
    config_read(&s, "config", false);
    settings_folder(&s);
    settings_check(&s);
    settings_check_mixers(&s);
    fflush(stdout);
    const int output = dup(1), printed = open("printed", O_CREAT | O_TRUNC | O_WRONLY, 0666);
    dup2(printed, 1);
    settings_print_config(&s);
    fflush(stdout);
    dup2(output, 1);
    close(printed);
    close(output);
    settings_default(&again);
    config_read(&again, "printed", false);
    if (memcmp(&s, &again, sizeof(s)) != 0) abort();
}

static Requests requests[2]; // one by one; two continuations at once

static void make_requests(void) {
    static Options options[2];
    static char flag[] = "--requests", from_stdin[] = "-", batch[] = "--batch", two[] = "2";
    static char *arguments[] = {flag, from_stdin, batch, two};
    make_checkpoint();
    for (int i = 0; i < 2; i++) {
        SafeTensors file;
        safetensors_open(&file, "run/model_000005.safetensors");
        options_parse(&options[i], i ? 4 : 2, arguments);
        requests_open(&requests[i], &options[i], &file, KV_COMPRESSED, WEIGHTS_FLOAT, 48);
    }
}

// Up to four lines, whose contexts are often the same
static void attempt_requests(void) {
    static const char *contexts[] = {"\"context\":\"a\\u00e9\"", "\"context_ids\":[1,2,3]", "\"context\":\"\""};
    static const char *asked[] = {
        ",\"continuation\":\"bc\"", ",\"continuation_ids\":[4,5]",
        ",\"until\":[\"a\",\"\\n\"],\"max_tokens\":3,\"temperature\":0.7,\"top_p\":0.9,\"seed\":3",
        ",\"max_tokens\":2,\"top_k\":2"};
    static const char *ids[] = {"", ",\"id\":\"x\"", ",\"id\":-12"};
    length = 0;
    for (int n = 1 + (int)draw(4); n > 0; n--) {
        if (draw(5) == 0) add("{\"text\":\"abc \\ud83d\\ude00\"");
        else add("{"), add(contexts[draw(2 + (draw(4) == 0))]), add(asked[draw(4)]);
        add(ids[draw(3)]), add("}\n");
    }
    if (draw(30) == 0) {
        length = draw(3000);
        for (size_t i = 0; i < length; i++) input[i] = (char)draw(256);
    } else if (draw(8)) {
        damage(length);
    }
    write_file("requests", input, length);
    if (setjmp(rejected)) abort(); // no line ends the program
    const int file = open("requests", O_RDONLY);
    Requests *q = &requests[draw(4) == 0];
    q->kept.n = -1;
    answer_lines(q, file);
    close(file);
}

// ---------------------------------------------------------------------------------------------------------------------
// Trying

typedef struct Reader {
    const char *name;
    void (*make)(void);
    void (*attempt)(void);
} Reader;

static const Reader readers[] = {
    {"checkpoint", make_checkpoint, attempt_checkpoint},
    {"pair", make_checkpoint, attempt_pair},
    {"state", make_state, attempt_state},
    {"index", make_nothing, attempt_index},
    {"vocabulary", make_nothing, attempt_vocabulary},
    {"config", make_nothing, attempt_config},
    {"requests", make_requests, attempt_requests},
};

typedef struct Tally { // shared with the children
    int64_t accepted, refused, other;
    uint64_t seed; // of the input at hand
} Tally;

static const int INPUTS_OF_A_CHILD = 200, LONGEST = 10; // seconds

static void try_one(const Reader *reader, Tally *tally, uint64_t seed) {
    tally->seed = seed;
    seed_random(seed);
    alarm(LONGEST);
    if (setjmp(rejected)) {
        if (exit_code == 2) tally->refused++;
        else tally->other++;
        return;
    }
    reader->attempt();
    tally->accepted++;
}

// Returns how many inputs crashed, hung or ended otherwise than with exit code 2.
static int64_t fuzz(const Reader *reader, double seconds, uint64_t seed, bool one) {
    Tally *tally = (Tally *)mmap(nullptr, sizeof(Tally), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int64_t crashes = 0, hangs = 0;
    reader->make();
    fflush(stdout);
    for (const double begin = seconds_now(); one || seconds_now() - begin < seconds; one = false) {
        const pid_t child = fork();
        if (child == 0) {
            const int nothing = open("/dev/null", O_WRONLY);
            if (!one) dup2(nothing, 2), dup2(nothing, 1);
            for (int i = 0; i < (one ? 1 : INPUTS_OF_A_CHILD) && (one || seconds_now() - begin < seconds); i++)
                try_one(reader, tally, seed + (uint64_t)i);
            _exit(0);
        }
        int status;
        if (child < 0 || waitpid(child, &status, 0) != child)
            die(1, "a child could not be started: %s", strerror(errno));
        const bool fine = WIFEXITED(status) && WEXITSTATUS(status) == 0,
                   hung = WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM;
        if (!fine) printf("%s: seed %lu %s\n", reader->name, (unsigned long)tally->seed, hung ? "hangs" : "crashes");
        hangs += hung;
        crashes += !fine && !hung;
        seed = fine ? seed + (uint64_t)INPUTS_OF_A_CHILD : tally->seed + 1;
        if (one) printf("the input is in %s\n", folder);
    }
    const Tally t = *tally;
    printf("%-10s %9ld inputs: %ld accepted, %ld refused, %ld crashes, %ld hangs", reader->name,
           t.accepted + t.refused + t.other + crashes + hangs, t.accepted, t.refused, crashes, hangs);
    printf(t.other ? ", %ld ended with another exit code than 2\n" : "\n", t.other);
    fflush(stdout);
    return crashes + hangs + t.other;
}

int main(int argc, char **argv) {
    const double seconds = argc > 2 ? atof(argv[2]) : 10;
    const uint64_t seed = argc > 3 ? strtoull(argv[3], nullptr, 10) : 1;
    const bool one = argc > 2 && seconds == 0, all = argc > 1 && strcmp(argv[1], "all") == 0;
    int64_t faults = 0;
    bool known = false;
    program_name = "fuzz";
    snprintf(folder, sizeof(folder), "%s/fuzz_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(folder) || chdir(folder) != 0 || mkdir("damaged", 0777) != 0) return 1;
    for (const Reader &reader : readers) {
        if (!all && (argc < 2 || strcmp(argv[1], reader.name) != 0)) continue;
        known = true;
        faults += fuzz(&reader, seconds, seed, one);
    }
    if (!known)
        printf("usage: %s checkpoint|pair|state|index|vocabulary|config|requests|all [SECONDS [SEED]]\n", argv[0]);
    if (!one && nftw(
                    folder, [](const char *path, const struct stat *, int, struct FTW *) { return remove(path); }, 16,
                    FTW_DEPTH | FTW_PHYS) != 0)
        return 1;
    return !known || faults > 0;
}
