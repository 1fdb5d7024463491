#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["matplotlib"]
# ///
"""Which model is best? Trains several on the same data, in the same order, with the same seed and schedule, and puts the
outcome in one table and one picture.

  dev/compare.py -c goldfinch -c finch -c llama --data data/minipile --tokens 45e6
  dev/compare.py -c goldfinch -c "goldfinch --model.kv_cache_compression_ratio 1" ...      # a model with flags of its own
  dev/compare.py -c finch -c "goldfinch_upgrade --train.load_model @finch" ...             # begins with finch's weights
  dev/compare.py ... --gpus 8                        # a model on each, as long as there are models
  dev/compare.py -o compare --plot compare.png       # only draws what is there (needs matplotlib)

--data: PREFIX of a binidx pair, with PREFIX_validation beside it. Runs that are whole are not trained again, others go on
from their newest checkpoint: after an interruption, give the same command once more. FOLDER/compare.md is the table.
"""

import argparse
import csv
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from plot import save                                                   # noqa: E402
from prepro_minipile import replacing                                   # noqa: E402
HELD = ("weights", "gradients", "masters and moments", "moments", "activations")    # as the trainer prints memory


def stop(message):
    sys.exit(f"compare.py: {message}")


def name_of(choice):
    """The folder of a run: the config's name and what its own flags set."""
    words = [word.split(".", 1)[-1] for word in choice.split()]
    return re.sub(r"[^\w.=-]+", "_", "-".join(words)).strip("_").replace("@", "")


class Run:
    def __init__(self, args, choice):
        self.args, self.choice, self.child = args, choice, None
        self.name = name_of(choice)
        self.folder = os.path.join(args.output, self.name)
        self.after = [name_of(other) for other in re.findall(r"@(\S+)", choice)]
        self.text = ""                                                  # of the trainer's output, since it was started

    def log(self):
        """Rows of log.csv; a line cut off by a kill is left out."""
        try:
            with open(os.path.join(self.folder, "log.csv"), newline="") as f:
                return [row for row in csv.DictReader(f) if row.get("peak") is not None]
        except OSError:
            return []

    def newest(self):
        try:
            names = [n for n in os.listdir(self.folder) if re.fullmatch(r"model_\d+\.safetensors", n)]
        except OSError:
            names = []
        return os.path.join(self.folder, max(names, key=lambda n: int(n[6:-12]))) if names else None

    def summary(self):
        try:
            with open(os.path.join(self.folder, "summary.json"), encoding="utf-8") as f:
                found = json.load(f)
        except (OSError, ValueError):
            return None
        return found if found["tokens"] == int(self.args.tokens) else None

    def command(self):
        args = self.args
        words = shlex.split(self.choice)
        command = [args.program, "-c", words[0]] + (["-c", args.size] if args.size else []) + [
            "--train.data_file", args.data, "--train.validation_data_file", args.valid or args.data + "_validation",
            "--train.my_exit_tokens", str(int(args.tokens)), "--train.seed_everything", str(args.seed)]
        command += shlex.split(args.set)
        for word in words[1:]:
            if word.startswith("@"):
                other = Run(args, word[1:]).newest()
                word = other or stop(f"{self.choice}: {word}: expected a trained model in {args.output}, found none")
            command.append(word)
        command += ["--train.out", self.folder]
        return command + ["--train.resume", "1"] if self.newest() else command

    def start(self, gpu):
        environment = dict(os.environ, **({"CUDA_VISIBLE_DEVICES": str(gpu)} if self.args.gpus > 1 else {}))
        os.makedirs(self.args.output, exist_ok=True)
        self.gpu, self.text = gpu, ""
        self.output = open(os.path.join(self.args.output, f"{self.name}.txt"), "w+", encoding="utf-8")
        self.child = subprocess.Popen(self.command(), stdout=self.output, stderr=subprocess.STDOUT, env=environment)

    def ended(self):
        return self.child.poll() is not None

    def progress(self):
        """Steps done, steps in all, seconds left; of its last printed line."""
        with open(self.output.name, encoding="utf-8") as f:
            self.text = f.read()
        steps = re.findall(r"^step +(\d+) of (\d+) .*?\| (\d+)h(\d+)m(\d+)s left", self.text, re.M)
        if not steps:
            return 0, 0, math.inf
        done, total, hours, minutes, seconds = map(int, steps[-1])
        return done, total, 3600 * hours + 60 * minutes + seconds

    def finish(self):
        """What the table needs, in summary.json; or an error's text."""
        self.progress()
        rows = [row for row in self.log() if row["val_loss"]]
        if self.child.returncode != 0 or not rows or int(rows[-1]["tokens"]) < self.args.tokens:
            return (self.text.strip().splitlines() or ["it ended without a word"])[-1]
        speeds = [float(row["tok_s"]) for row in self.log()[-200:]]
        mebibytes = sum(float(m[1]) for m in re.findall(rf"^({'|'.join(HELD)}) +([\d.]+) MiB", self.text, re.M))
        parameters = re.search(r"^parameters +(\d+)", self.text, re.M)
        table = subprocess.run([self.args.infer, self.newest(), "--cache-table"], capture_output=True, text=True)
        sizes = re.findall(r"[\d.]+ [KMGT]?B", table.stdout.strip().splitlines()[-1]) if table.stdout.strip() else []
        summary = {"choice": self.choice, "tokens": int(self.args.tokens), "parameters": int(parameters[1]),
                   "tok_s": statistics.median(speeds), "gib": mebibytes / 1024, "val_loss": float(rows[-1]["val_loss"]),
                   "cache_64k": sizes[-3] if len(sizes) >= 6 else "?"}
        with replacing(os.path.join(self.folder, "summary.json")) as name, open(name, "w", encoding="utf-8") as out:
            json.dump(summary, out, indent=1)
        return None


def train(args, runs):
    waiting = [run for run in runs if not run.summary()]
    unknown = [name for run in runs for name in run.after if name not in {other.name for other in runs}]
    if unknown:
        stop(f"@{unknown[0]}: expected one of the models of -c")
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are there, {len(waiting)} to train", flush=True)
    free, running, failed, last = list(range(args.gpus))[::-1], [], {}, 0.0

    def end_all(*_):
        for run in running:
            run.child.send_signal(signal.SIGINT)                        # each saves
        for run in running:
            run.child.wait()
        stop("interrupted; the same command goes on")
    signal.signal(signal.SIGINT, end_all)
    signal.signal(signal.SIGTERM, end_all)
    while waiting or running:
        pending = {run.name for run in waiting + running}
        for run in [run for run in waiting if not pending.intersection(run.after)][:len(free)]:
            waiting.remove(run)
            if any(name in failed for name in run.after):
                failed[run.name] = "what it begins with has failed"
                continue
            run.start(free.pop())
            running.append(run)
        if waiting and not running and not any(not pending.intersection(run.after) for run in waiting):
            stop("models wait for each other: " + ", ".join(run.choice for run in waiting))
        time.sleep(0.2)
        for run in [run for run in running if run.ended()]:
            running.remove(run)
            free.append(run.gpu)
            error = run.finish()
            if error:
                failed[run.name] = error
            print(f"{run.choice}: " + (f"FAILED: {error}" if error else f"validation loss {run.summary()['val_loss']:.4f}"),
                  flush=True)
        if running and time.time() - last > args.report:
            last = time.time()
            parts = []
            for run in running:
                done, total, left = run.progress()
                parts.append(f"{run.choice} {done}/{total}, {left / 60:.1f} min left" if total else f"{run.choice} starts")
            print(" | ".join(parts) + (f" | {len(waiting)} more wait" if waiting else ""), flush=True)
    return failed


def table(args, runs):
    done = [(run, run.summary()) for run in runs if run.summary()]
    if not done:
        return
    first = done[0][1]["val_loss"]
    lines = ["| model | parameters | tokens/s | memory | validation loss | to the first | cache at 64 k |",
             "|---|---|---|---|---|---|---|"]
    for run, s in done:
        lines.append(f"| `{run.choice}` | {s['parameters'] / 1e6:.1f} M | {s['tok_s']:,.0f} | {s['gib']:.1f} GiB | "
                     f"{s['val_loss']:.4f} | {s['val_loss'] - first:+.4f} | {s['cache_64k']} |")
    text = "\n".join(lines) + "\n"
    with replacing(os.path.join(args.output, "compare.md")) as name, open(name, "w", encoding="utf-8") as out:
        out.write(text)
    print("\n" + text)


def plot(args, runs):
    try:
        import matplotlib
    except ImportError:
        stop("the Python package matplotlib is missing: python3 -m pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    ends = []
    for run in runs:
        points = [(float(row["tokens"]), float(row["val_loss"])) for row in run.log() if row["val_loss"]]
        if points:
            axes.plot(*zip(*points), "o-", markersize=3, linewidth=1.4, label=f"{run.choice}: {points[-1][1]:.3f}")
            ends += [loss for tokens, loss in points if tokens >= points[-1][0] / 5]
    if not ends:
        stop(f"{args.output}: expected runs with validations, found none")
    room = 0.05 * (max(ends) - min(ends)) or 0.1                        # the first fifth's losses would flatten the rest
    axes.set_ylim(min(ends) - room, max(ends) + room)
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, args.plot, 120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("-c", dest="choices", action="append", metavar="CONFIG", help="a model's config, perhaps with flags; repeat")
    option("--size", default="L12D768ctx1024minipile", metavar="CONFIG", help="that all share (L12D768ctx1024minipile)")
    option("--data", metavar="PREFIX")
    option("--valid", metavar="PREFIX", help="(DATA_validation)")
    option("--tokens", type=float, help="that each is trained on")
    option("--seed", type=int, default=1)
    option("--set", default="", metavar="FLAGS", help='for all, as in --set "--train.val_every 200"')
    option("--gpus", type=int, default=1)
    option("-o", "--output", default="compare", metavar="FOLDER")
    option("--plot", metavar="FILE", help="draw: .png, .svg or .pdf")
    option("--report", type=float, default=15, help="seconds between lines of progress (15)")
    option("--program", default=os.path.join(ROOT, "train_goldfinch"))
    option("--infer", default=os.path.join(ROOT, "infer_goldfinch"))
    args = parser.parse_args()
    wish = os.path.join(args.output, "compare.json")                    # so that --plot alone knows what there is
    if args.choices:
        if not args.data or not args.tokens:
            stop("expected --data PREFIX and --tokens N")
        os.makedirs(args.output, exist_ok=True)
        with replacing(wish) as name, open(name, "w", encoding="utf-8") as out:
            json.dump({"choices": args.choices, "tokens": args.tokens}, out)
    else:
        try:
            with open(wish, encoding="utf-8") as f:
                vars(args).update(json.load(f))
        except OSError:
            stop(f"expected -c CONFIG, or runs in {args.output}")
    runs = [Run(args, choice) for choice in args.choices]
    if len({run.name for run in runs}) < len(runs):
        stop("each model but once")
    failed = train(args, runs) if args.data else {}
    table(args, runs)
    if args.plot:
        plot(args, runs)
    if failed:
        stop(f"{len(failed)} of {len(runs)} runs failed: " + "; ".join(f"{n}: {e}" for n, e in failed.items()))


if __name__ == "__main__":
    main()
