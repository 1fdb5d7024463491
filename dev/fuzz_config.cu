// Feeds the config reader with random bytes, random trees and mutated configs, under the sanitizers:
//
//     make GPU=0 SANITIZE=address,undefined fuzz_config && ./fuzz_config [SECONDS [SEED]]
//
// Every input must be turned away with exit code 2 or give settings that the checks accept, and these must print as a
// config that reads back to the same settings.

#include <setjmp.h>
#include <stdlib.h>

static jmp_buf rejected;
static int exit_code;
[[noreturn]] static void exit_here(int code) { // die() ends here instead of the process
    exit_code = code;
    longjmp(rejected, 1);
}
#define exit exit_here
#define GOLDFINCH_NO_MAIN
#include "train_goldfinch.cu"
#undef exit

// an input turned away leaves its text behind
extern "C" const char *__asan_default_options(void) { return "detect_leaks=0"; }

static uint64_t state = 1;
static unsigned draw(unsigned n) { // 0 .. n - 1
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((state >> 33) % n);
}

static char text[1 << 16];
static size_t length;
static void add(const char *part) {
    const size_t n = strlen(part);
    if (length + n < sizeof(text)) memcpy(text + length, part, n), length += n;
}

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

static void make_input(void) {
    length = 0;
    switch (draw(4)) {
    case 0:
        for (int n = draw(300); n > 0; n--) text[length++] = (char)draw(256);
        break;
    case 1:
        add(draw(2) ? "model:\n" : "train:\n");
        add_yaml_tree(1);
        break;
    case 2: add_json_tree(0); break;
    default: add(built_in_configs[draw(sizeof(built_in_configs) / sizeof(built_in_configs[0]))].yaml);
    }
    for (int n = draw(3) ? 0 : draw(4); n > 0 && length; n--) { // bytes changed, cut, doubled
        const size_t at = draw((unsigned)length);
        if (draw(3) == 0) text[at] = (char)draw(256);
        else if (draw(2)) length = at;
        else if (length + at < sizeof(text)) memmove(text + length, text, at), length += at;
    }
}

int main(int argc, char **argv) {
    const double seconds = argc > 1 ? atof(argv[1]) : 10;
    state = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;
    char path[] = "/tmp/fuzz_config_XXXXXX", printed[] = "/tmp/fuzz_printed_XXXXXX";
    const int file = mkstemp(path), copy = mkstemp(printed), errors = dup(2), output = dup(1),
              nothing = open("/dev/null", O_WRONLY);
    static int64_t accepted, turned_away;
    static Settings s, again;
    const double begin = seconds_now();
    dup2(nothing, 2);
    while (seconds_now() - begin < seconds) {
        make_input();
        if (ftruncate(file, 0) != 0 || pwrite(file, text, length, 0) != (ssize_t)length) return 1;
        settings_default(&s);
        if (setjmp(rejected)) {
            if (exit_code != 2) {
                dprintf(errors, "exit code %d for the input in %s\n", exit_code, path);
                return 1;
            }
            turned_away++;
            continue;
        }
        config_read(&s, path, false);
        settings_folder(&s);
        settings_check(&s);
        settings_check_mixers(&s);
        fflush(stdout);
        dup2(copy, 1);
        if (ftruncate(copy, 0) != 0 || lseek(copy, 0, SEEK_SET) != 0) return 1;
        settings_print_config(&s);
        fflush(stdout);
        dup2(output, 1);
        settings_default(&again);
        config_read(&again, printed, false);
        if (memcmp(&s, &again, sizeof(s)) != 0) {
            dprintf(errors, "what is printed reads back otherwise: %s, %s\n", path, printed);
            return 1;
        }
        accepted++;
    }
    unlink(path);
    unlink(printed);
    printf("%ld configs read, %ld turned away\n", accepted, turned_away);
    return 0;
}
