#!/usr/bin/env python3
"""Tests of mqar.py and compare.py, with nothing but Python and ./train_goldfinch (and ./infer_goldfinch for caches).

  dev/test_evidence.py [--quick]             # --quick: without training the recall task to 99 %, a minute on two cores
"""

import collections
import csv
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
counts = {"passed": 0, "failed": 0}

sys.path.insert(0, HERE)
import mqar                                                             # noqa: E402


def check(what, right, detail=""):
    counts["passed" if right else "failed"] += 1
    print(f"{'PASS' if right else 'FAIL'} {what}" + ("" if right else f"\n     | {str(detail)[-900:]}"), flush=True)


def script(name, *arguments, **more):
    return subprocess.run([sys.executable, os.path.join(HERE, name), *map(str, arguments)], capture_output=True, text=True,
                          **more)


def read_pair(prefix):
    """Sequences of a binidx pair."""
    with open(prefix + ".idx", "rb") as f, open(prefix + ".bin", "rb") as g:
        idx, data = f.read(), g.read()
    code, n = idx[17], struct.unpack_from("<Q", idx, 18)[0]
    sizes, offsets = (struct.unpack_from(f"<{n}{c}", idx, at) for c, at in (("i", 34), ("q", 34 + 4 * n)))
    letter = {1: "B", 8: "H"}[code]
    return [struct.unpack_from(f"<{size}{letter}", data, at) for size, at in zip(sizes, offsets)]


# ---- recall ----

def test_task(folder):
    print("-- the recall task")
    length, pairs, vocab = 64, 4, 512
    done = script("mqar.py", "make", "-o", folder, "--lengths", length, "--vocab", vocab, "--examples", 2000,
                  "--valid-examples", 50)
    check("make", done.returncode == 0, done.stderr)
    rows, masks = (read_pair(os.path.join(folder, f"length{length}_train{end}")) for end in ("", "_mask"))
    check("as many sequences as asked for, of the length; one more token at the end, for the last target",
          len(rows) == len(masks) == 2000 and {*map(len, rows[:-1]), *map(len, masks[:-1])} == {length}
          and len(rows[-1]) == len(masks[-1]) == length + 1)
    right, gaps = True, collections.Counter()
    for row, mask in zip(rows, masks):
        known = dict(zip(row[0:2 * pairs:2], row[1:2 * pairs:2]))
        asked = {row[at - 1]: row[at] for at in range(length) if mask[at]}
        right = right and len(known) == pairs and known == asked and sum(mask) == pairs and not any(mask[:2 * pairs])
        right = right and all(1 <= k < vocab // 2 <= v < vocab for k, v in known.items()) and len(set(known.values())) == pairs
        right = right and sum(1 for token in row[2 * pairs:] if token) == 2 * pairs
        gaps.update((at - 1 - 2 * pairs) // 2 for at in range(length) if mask[at])
    check("each key once more, its value behind it, and that alone counts; zeros between", right)
    # the first draw of a sequence falls on gap g in proportion to (g + 1)^-0.99; all four: by counting draws of our own
    rng, expected, weights = random.Random(2), collections.Counter(), [g ** -0.99 for g in range(1, 29)]
    for _ in range(4000):
        left = list(range(28))
        for _ in range(pairs):
            drawn = rng.choices(left, [weights[g] for g in left])[0]
            expected[drawn] += 1
            left.remove(drawn)
    worst = max(abs(gaps[g] / 2000 - expected[g] / 4000) / math.sqrt(expected[g] / 4000 / 2000 * 1.5) for g in range(28))
    check("gaps by the power law, without repetition", worst < 4.5, (worst, gaps))
    valid = read_pair(os.path.join(folder, f"length{length}_valid"))
    check("the validation's sequences begin every length + 1 tokens, and are others",
          {len(row) for row in valid} == {length + 1} and not {row[:length] for row in valid} & set(rows))
    again = script("mqar.py", "make", "-o", folder + "2", "--lengths", length, "--vocab", vocab, "--examples", 2000,
                   "--valid-examples", 50)
    check("the same seed, the same data", again.returncode == 0
          and read_pair(os.path.join(folder + "2", f"length{length}_train")) == rows)
    refused = script("mqar.py", "make", "-o", folder, "--lengths", 64, "--pairs", 17)
    check("more pairs than fit are refused", refused.returncode == 1 and "at least 4 pairs" in refused.stderr, refused.stderr)


CELL = ["--lengths", 64, "--pairs", 4, "--vocab", 128, "--widths", 64, "--layers", 3]
TRAINING = ["--lr", 5e-3, "--tokens", 4e5, "--batch-tokens", 1024, "--warmup", 20, "--val-every", 20, "--enough", 99]


def test_recall(folder, quick):
    print("-- training it")
    made = script("mqar.py", "make", "-o", folder, *CELL[:6], "--examples", 20000, "--valid-examples", 100)
    check("make", made.returncode == 0, made.stderr)
    wrong = script("mqar.py", "run", "-o", folder, *CELL, *TRAINING, "--models", "Finch", "--program", "false")
    check("a trainer that fails is said, and what failed is tried again", wrong.returncode == 1 and
          "1 of 1 cells failed" in wrong.stderr, wrong.stderr)
    begin = time.time()
    more = ["--flag", "--train.max_steps", 60] if quick else []
    done = script("mqar.py", "run", "-o", folder, *CELL, *TRAINING, "--models", "GoldFinch", *more)
    row = next(csv.DictReader(open(os.path.join(folder, "results.csv"))), {})
    check(f"GoldFinch, width 64, length 64: {row.get('accuracy')} % of answers right after {row.get('tokens')} tokens, "
          f"{time.time() - begin:.0f} s", done.returncode == 0 and (quick or float(row["accuracy"]) >= 99),
          done.stdout + done.stderr)
    begin = time.time()
    again = script("mqar.py", "run", "-o", folder, *CELL, *TRAINING, "--models", "GoldFinch")
    check("what is there is not trained again", again.returncode == 0 and "0 of 1 cells" in again.stdout, again.stdout)
    check("the table", "| 64 | 64 | " in script("mqar.py", "table", "-o", folder).stdout)


# ---- ranking ----

SIZE = ("--model.n_layer 3 --model.n_embd 64 --model.ctx_len 32 --model.vocab_size 320 --model.kv_cache_compression_ratio 8 "
        "--train.micro_bsz 2 --train.warmup_steps 2 --train.val_every 20 --train.val_batches 4 --train.save_every 10 "
        "--train.lr_init 1e-3 --train.lr_final 1e-4")


def test_compare(folder):
    print("-- ranking")
    os.makedirs(folder)
    data, out = os.path.join(folder, "text"), os.path.join(folder, "runs")
    text = os.path.join(folder, "text.jsonl")
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f, open(text, "w", encoding="utf-8") as g:
        g.writelines(json.dumps({"text": part}) + "\n" for part in f.read().split("\n\n"))
    made = subprocess.run([sys.executable, os.path.join(ROOT, "prepro_minipile.py"), text, "-o", data, "--bytes", "--val",
                           "0.2"], capture_output=True, text=True)
    check("data", made.returncode == 0, made.stderr)
    command = ["-c", "finch", "-c", "goldfinch", "-c", "goldfinch_upgrade --model.n_layer 6 --train.load_model @finch",
               "--size", "", "--data", data, "--tokens", 3840, "--set", SIZE, "-o", out, "--report", 0.2]
    child = subprocess.Popen([sys.executable, os.path.join(HERE, "compare.py"), *map(str, command)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    log = os.path.join(out, "goldfinch", "log.csv")
    for _ in range(3000):                                               # in the middle of the second run
        if child.poll() is not None or os.path.exists(log) and open(log).read().count("\n") > 25:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=120)
    check("interrupted: each run saves", child.returncode == 1 and "the same command goes on" in error, error)
    done = script("compare.py", *command)
    check("the same command goes on", done.returncode == 0 and "1 of 3 runs are there" in done.stdout, done.stdout + done.stderr)
    check("from where it was", os.path.exists(log) and not [name for name in os.listdir(os.path.dirname(log)) if ".old" in name])
    rows = {}
    for name in os.listdir(out):
        path = os.path.join(out, name, "log.csv")
        if os.path.exists(path):
            rows[name] = list(csv.DictReader(open(path)))
    check("each was trained on the same tokens", len(rows) == 3 and all(int(r[-1]["tokens"]) == 3840 and len(r) == 60
                                                                        for r in rows.values()), rows.keys())
    whole = subprocess.run([os.path.join(ROOT, "train_goldfinch"), "-c", "goldfinch", *SIZE.split(), "--train.data_file", data,
                            "--train.validation_data_file", data + "_validation", "--train.my_exit_tokens", "3840",
                            "--train.out", os.path.join(folder, "whole")], capture_output=True, text=True)
    losses = [[row[key] for key in ("loss", "val_loss", "lr")] for row in csv.DictReader(
        open(os.path.join(folder, "whole", "log.csv")))] if whole.returncode == 0 else whole.stderr
    check("and as if it had not been interrupted", losses == [[row[key] for key in ("loss", "val_loss", "lr")]
                                                            for row in rows["goldfinch"]], losses)
    table = open(os.path.join(out, "compare.md"), encoding="utf-8").read().splitlines()
    last = float(rows["goldfinch"][-1]["val_loss"])
    cells = [cell.strip() for cell in table[3].split("|")] if len(table) > 3 else []
    check("the table", len(table) == 5 and cells[1] == "`goldfinch`" and float(cells[5]) == round(last, 4) and abs(
        float(cells[6]) - (last - float(rows["finch"][-1]["val_loss"]))) < 6e-5 and "B" in cells[7], table)
    check("the upgrade began with the other's weights", "of the model's" in open(os.path.join(
        out, next(n for n in os.listdir(out) if n.startswith("goldfinch_upgrade") and n.endswith(".txt")))).read())
    failing = script("compare.py", "-c", "finch", "-c", "nonsense", *command[6:])
    check("a model that fails is said, the others stay", failing.returncode == 1 and "nonsense: " in failing.stderr and
          "validation loss" in failing.stdout, failing.stderr)


def main():
    quick = "--quick" in sys.argv
    with tempfile.TemporaryDirectory() as folder:
        test_task(os.path.join(folder, "task"))
        test_compare(os.path.join(folder, "compare"))
        test_recall(os.path.join(folder, "recall"), quick)
    print(f"{counts['passed']} passed, {counts['failed']} failed")
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
