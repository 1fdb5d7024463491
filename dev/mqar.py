#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["matplotlib"]
# ///
"""Multi-query associative recall: which models find again what they have read? Makes the task, trains, draws.

  dev/mqar.py make -o mqar                          data for all lengths (no needs but Python)
  dev/mqar.py run -o mqar                           trains models of all widths on all lengths; goes on where it stopped
  dev/mqar.py plot -o mqar mqar.png                 accuracy by width, a panel a length (needs matplotlib)

A sequence of length L holds K pairs of a key and a value, then all keys once more in the gaps of what is left, each
followed by its value, which is what a model must say:  k1 v1 k2 v2 .. 0 0 k2 [v2] 0 0 0 0 k1 [v1] 0 0 ..
Only these values count (--train.mask_file). L and K: 64 and 4, 128 and 8, 256 and 16, 512 and 32, 1024 and 64.

This is _mqar in Zoology's zoology/data/associative_recall.py, and its settings of the paper's figure (arXiv 2312.04927):
keys are K different ids of 1 .. V/2 - 1, values K of V/2 .. V - 1; key i stands at 2 K + 2 g_i, where the g are K
different numbers below (L - 2 K) / 2, g drawn with a probability in proportion to (g + 1)^(a - 1), a = 0.01; what is
between is 0 (--fill random: any id). One thing differs: there an answer is a label beside the sequence, and an unrelated
token follows the key; here it is the next token, as a language model has it. Each key is asked for once, so that gives
nothing away.
"""

import argparse
import array
import concurrent.futures
import csv
import itertools
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from plot import save                                                   # noqa: E402
from prepro_minipile import replacing                                   # noqa: E402
PAIRS = {64: 4, 128: 8, 256: 16, 512: 32, 1024: 64}                     # by length
MODELS = {"GoldFinch": "goldfinch", "GPTAlpha": "gptalpha", "Llama": "llama", "Finch-C2": "finchc2", "Finch": "finch"}
COLUMNS = ["model", "width", "length", "pairs", "lr", "seed", "tokens", "accuracy", "loss", "seconds"]


def stop(message):
    sys.exit(f"mqar.py: {message}")


# ---- the task ----

def distinct(rng, cumulative, count):
    """So many different indices, each drawn among those that are left in proportion to its weight."""
    found = {}                                                          # in the order they were drawn in
    while len(found) < count:
        found.update(dict.fromkeys(rng.choices(range(len(cumulative)), cum_weights=cumulative, k=count)))
    return list(itertools.islice(found, count))


def sequence(rng, length, pairs, vocab, cumulative, fill):
    """Tokens and mask of one."""
    keys, values = rng.sample(range(1, vocab // 2), pairs), rng.sample(range(vocab // 2, vocab), pairs)
    tokens, mask = [0] * length, bytearray(length)
    if fill == "random":
        tokens[2 * pairs:] = rng.choices(range(vocab), k=length - 2 * pairs)
    tokens[0:2 * pairs:2], tokens[1:2 * pairs:2] = keys, values
    for key, value, gap in zip(keys, values, distinct(rng, cumulative, pairs)):
        at = 2 * pairs + 2 * gap
        tokens[at:at + 2] = key, value
        mask[at + 1] = 1
    return tokens, mask


def write_pair(prefix, code, data, sizes):
    """binidx: PREFIX.bin and PREFIX.idx (dev/spec.md, section 9). code: 1 for u8, 8 for u16."""
    width, begins = (1 if code == 1 else 2), [0, *itertools.accumulate(sizes)]
    with replacing(prefix + ".bin") as name, open(name, "wb") as out:
        out.write(data)
    with replacing(prefix + ".idx") as name, open(name, "wb") as out:
        out.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1))
        out.write(struct.pack(f"<{len(sizes)}i", *sizes))
        out.write(struct.pack(f"<{len(sizes)}q", *(width * begin for begin in begins[:-1])))
        out.write(struct.pack(f"<{len(begins)}q", *range(len(begins))))


def write_set(prefix, count, length, pairs, vocab, fill, a, seed, valid):
    """Training samples begin every `length` tokens, those of a validation every `length` + 1 (spec section 9)."""
    rng = random.Random(seed)
    space = (length - 2 * pairs) // 2
    cumulative = list(itertools.accumulate(g ** (a - 1) for g in range(1, space + 1)))
    tokens, mask, sizes = array.array("H"), bytearray(), []
    for number in range(count):
        row, counts = sequence(rng, length, pairs, vocab, cumulative, fill)
        if valid or number == count - 1:                                # what follows the last answer: no matter
            row.append(0)
            counts.append(0)
        tokens.extend(row)
        mask += counts
        sizes.append(len(row))
    if sys.byteorder == "big":
        tokens.byteswap()
    write_pair(prefix, 8, tokens.tobytes(), sizes)
    write_pair(prefix + "_mask", 1, bytes(mask), sizes)


def data_prefix(args, length, kind):
    return os.path.join(args.output, f"length{length}_{kind}")


def make(args):
    os.makedirs(args.output, exist_ok=True)
    jobs = []
    for length in args.lengths:
        pairs = args.pairs or PAIRS.get(length) or stop(f"--pairs: expected for length {length}, which is not the paper's")
        if length % 2 or 4 * pairs > length or args.vocab <= length or args.vocab > 65536 or args.vocab < 4 * pairs:
            stop(f"length {length}, {pairs} pairs, vocabulary {args.vocab}: expected an even length of at least 4 pairs, "
                 "and a vocabulary larger than it, 65536 at most")
        for kind, count, seed in (("train", args.examples, args.seed), ("valid", args.valid_examples, args.seed + 10)):
            jobs.append((data_prefix(args, length, kind), count, length, pairs, args.vocab, args.fill, args.power, seed,
                         kind == "valid"))
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for job, _ in zip(jobs, pool.map(write_set, *zip(*jobs))):
            print(f"{job[0]}.bin: {job[1]} sequences of {job[2]} tokens, {job[3]} pairs, seed {job[7]}", flush=True)


# ---- training ----

def results_path(args):
    return os.path.join(args.output, "results.csv")


def read_results(args):
    try:
        with open(results_path(args), newline="") as f:
            return [row for row in csv.DictReader(f) if row.get("seconds")]
    except OSError:
        return []


def train(args, cell, gpu):
    """One model's result, as a row of results.csv."""
    model, width, length, lr = cell
    folder = os.path.join(args.output, "_".join(map(str, cell)).lower())
    valid = data_prefix(args, length, "valid")
    batch = max(1, args.batch_tokens // length)
    command = [args.program, "-c", MODELS[model], "--train.out", folder]
    for name, value in {
            "model.n_layer": args.layers, "model.n_embd": width, "model.ctx_len": length, "model.vocab_size": args.vocab,
            "train.data_file": data_prefix(args, length, "train"), "train.validation_data_file": valid,
            "train.mask_file": data_prefix(args, length, "train") + "_mask", "train.validation_mask_file": valid + "_mask",
            "train.micro_bsz": batch, "train.my_exit_tokens": int(args.tokens), "train.lr_init": lr,
            "train.lr_final": lr / 10, "train.warmup_steps": args.warmup, "train.weight_decay": args.weight_decay,
            "train.seed_everything": args.seed, "train.save_every": 0, "train.val_every": args.val_every}.items():
        command += [f"--{name}", str(value)]
    begin = time.time()
    environment = dict(os.environ, **({"CUDA_VISIBLE_DEVICES": str(gpu)} if args.gpus > 1 else {}))
    child = subprocess.Popen(command + args.flag, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    loss = accuracy = None
    steps = total = done = 0
    for line in child.stdout:                                           # errors are one line: no pipe runs full
        step = re.match(r"step +(\d+) of (\d+)", line)
        found = re.match(r"validation: loss ([\d.naif]+), accuracy ([\d.]+) %", line)
        steps, total = map(int, step.groups()) if step else (steps, total)
        if found:
            loss, accuracy = found[1], float(found[2])
            if accuracy >= args.enough and not done:
                done = steps
                child.send_signal(signal.SIGINT)                        # it has learned the task
    error = child.stderr.read()
    if not done and (child.wait() != 0 or accuracy is None or steps < total):
        raise RuntimeError(f"{' '.join(command)}: exit code {child.returncode} after {steps} of {total} steps\n{error}")
    child.wait()
    return [model, width, length, args.pairs or PAIRS[length], lr, args.seed, steps * batch * length, accuracy, loss,
            f"{time.time() - begin:.1f}"]


def run(args):
    for length in args.lengths:
        if not os.path.exists(data_prefix(args, length, "valid_mask") + ".idx"):
            stop(f"{data_prefix(args, length, 'train')}: expected data; `dev/mqar.py make -o {args.output}` makes it")
    done = {(r["model"], int(r["width"]), int(r["length"]), float(r["lr"])) for r in read_results(args)}
    cells = [cell for cell in itertools.product(args.models, args.widths, args.lengths, args.lr) if cell not in done]
    cells.sort(key=lambda cell: (-cell[2], -cell[1]))                   # the long ones first: workers end together
    print(f"{len(cells)} of {len(cells) + len(done)} cells to train, {args.jobs} at a time", flush=True)
    begin, failed = time.time(), []
    gpus = list(range(args.jobs))
    with open(results_path(args), "a", newline="") as out, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        writer = csv.writer(out)
        if not done and out.tell() == 0:
            writer.writerow(COLUMNS)

        def work(cell):
            slot = gpus.pop()                                           # as many as there are workers
            try:
                return train(args, cell, slot % args.gpus)
            finally:
                gpus.append(slot)
        waiting = {pool.submit(work, cell): cell for cell in cells}

        def stop_all(*_):
            pool.shutdown(wait=False, cancel_futures=True)              # those that run end by themselves, or by the signal
            stop("interrupted; the same command goes on")
        signal.signal(signal.SIGTERM, stop_all)
        signal.signal(signal.SIGINT, stop_all)
        for number, future in enumerate(concurrent.futures.as_completed(waiting), 1):
            try:
                row = future.result()
            except (RuntimeError, OSError) as error:
                failed.append(waiting[future])
                print(f"FAILED {waiting[future]}: {error}", file=sys.stderr, flush=True)
                continue
            writer.writerow(row)
            out.flush()
            left = (time.time() - begin) / number * (len(cells) - number)
            print(f"{row[0]:10} width {row[1]:4} length {row[2]:5} lr {row[4]:g}: accuracy {row[7]:5.1f} % after "
                  f"{row[6] / 1e6:.1f} M tokens, {row[9]} s | {number} of {len(cells)}, {left / 60:.1f} min left", flush=True)
    if read_results(args):
        table(args)
    if failed:
        stop(f"{len(failed)} of {len(cells)} cells failed; the next run tries them again")


# ---- what came out ----

def best(args):
    """{(model, width, length): accuracy}: the best of all learning rates."""
    found = {}
    for row in read_results(args):
        key = row["model"], int(row["width"]), int(row["length"])
        found[key] = max(found.get(key, 0), float(row["accuracy"]))
    return found or stop(f"{results_path(args)}: expected results, found none")


def table(args):
    found = best(args)
    widths, lengths = sorted({k[1] for k in found}), sorted({k[2] for k in found})
    print("\n| length | width | " + " | ".join(MODELS) + " |\n|---|---|" + "---|" * len(MODELS))
    for length, width in itertools.product(lengths, widths):
        cells = (found.get((model, width, length)) for model in MODELS)
        print(f"| {length} | {width} | " + " | ".join("" if a is None else f"{a:.1f} %" for a in cells) + " |")


def plot(args):
    try:
        import matplotlib
    except ImportError:
        stop("the Python package matplotlib is missing: python3 -m pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = best(args)
    lengths = sorted({k[2] for k in found})
    figure, panels = plt.subplots(1, len(lengths), figsize=(3 * len(lengths) + 1, 3.6), sharey=True, squeeze=False,
                                  layout="constrained")
    for panel, length in zip(panels[0], lengths):
        for i, model in enumerate(MODELS):
            points = sorted((k[1], a) for k, a in found.items() if k[0] == model and k[2] == length)
            if points:
                panel.plot(*zip(*points), "os^Dv"[i] + ("--" if i == 1 else "-"), color=f"C{i}", label=model, linewidth=1.5,
                           markersize=12 - 2 * i, markerfacecolor="none", clip_on=False)    # of points that are alike all show
                panel.set_xticks([width for width, _ in points])
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_title(f"length {length}", fontsize=11)
        panel.set_xlabel("width")
        panel.grid(alpha=0.3)
        panel.set_ylim(0, 100)
    panels[0][0].set_ylabel("answers that are right, %")
    lines = {line.get_label(): line for panel in panels[0] for line in panel.get_lines()}
    figure.legend(lines.values(), lines, frameon=False, loc="outside right center")
    save(figure, args.picture, 120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "table", "plot"])
    parser.add_argument("picture", nargs="?", default="mqar.png", help="plot: .png, .svg or .pdf (mqar.png)")
    option = parser.add_argument
    option("-o", "--output", default="mqar", metavar="FOLDER", help="of data and results (mqar)")
    option("--lengths", type=int, nargs="+", default=list(PAIRS))
    option("--pairs", type=int, help="in place of the paper's: 4 at length 64, twice as many at twice the length")
    option("--vocab", type=int, default=8192)
    option("--fill", choices=["zero", "random"], default="zero")
    option("--power", type=float, default=0.01, help="a of the gaps' power law (0.01)")
    option("--seed", type=int, default=1)
    option("--examples", type=int, default=100000, help="training sequences of each length")
    option("--valid-examples", type=int, default=3000)
    option("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    option("--widths", type=int, nargs="+", default=[64, 128, 256])
    option("--layers", type=int, default=3)
    option("--lr", type=float, nargs="+", default=[2e-3], help="learning rates; the best one counts")
    option("--warmup", type=int, default=200, help="steps")
    option("--weight-decay", type=float, default=0.1)
    option("--tokens", type=float, default=200e6, help="of a run, at most")
    option("--batch-tokens", type=int, default=32768, help="of a step")
    option("--val-every", type=int, default=500, help="steps")
    option("--enough", type=float, default=99.9, help="%% at which a run may end early")
    option("--jobs", type=int, default=1, help="runs at a time; several share a GPU well")
    option("--gpus", type=int, default=1)
    option("--program", default=os.path.join(ROOT, "train_goldfinch"))
    option("--flag", nargs=argparse.REMAINDER, default=[], help="all that follows goes to train_goldfinch")
    args = parser.parse_intermixed_args() if "--flag" not in sys.argv else parser.parse_args()
    {"make": make, "run": run, "table": table, "plot": plot}[args.what](args)


if __name__ == "__main__":
    main()
