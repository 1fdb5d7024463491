#!/usr/bin/env python3
"""What a machine without a GPU does: decoding, pre-fill, start, initialization and a training step, in figures.

  make GPU=0 PRECISION=BF16 train infer && make GPU=0 PRECISION=FP32 train infer
  dev/bench_cpu.py [--base FOLDER] [--peer PYTHON] [--runs 5] [--work FOLDER]
  dev/bench_cpu.py --whole          # what a newcomer runs, in a fresh clone of HEAD: make and the demo, make test

--base: another checkout of this project, built likewise, to compare with. --peer: a Python that has the packages rwkv,
torch and numpy (pip install rwkv torch numpy): the same Finch with the same weights in PyTorch. All sides run in turn, so
that a machine whose speed changes is the same to each; what counts are the ratios of the medians. Models have L12 D768
V65536 and random weights; they, a vocabulary of pairs of bytes and a prompt of 256 tokens are made in --work (2 GB).
"""

import argparse
import csv
import os
import re
import shutil
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHAPE = ["--model.n_layer", "12", "--model.n_embd", "768", "--model.vocab_size", "65536", "--model.ctx_len", "1024"]
SUMMARY = re.compile(r"prompt (\d+) tokens, ([\d.]+) tok/s \| decode ([\d.]+) tok/s")

PEER = """
import os, sys, time
os.environ["RWKV_JIT_ON"], os.environ["RWKV_CUDA_ON"] = "1", "0"
import torch
from rwkv.model import RWKV
torch.set_num_threads(len(os.sched_getaffinity(0)))
model = RWKV(model=sys.argv[1].removesuffix(".pth"), strategy="cpu fp32")
ids = list(range(100, 356))
begin = time.time()
logits, state = model.forward(ids, None)
prefill = len(ids) / (time.time() - begin)
for id in (5, 6, 7):
    logits, state = model.forward([id], state)
begin = time.time()
for i in range(20):
    logits, state = model.forward([5 + i], state)
print("peer", prefill, 20 / (time.time() - begin))
"""


def stop(message):
    sys.exit(f"bench_cpu.py: {message}")


def program(folder, precision, name):
    path = os.path.join(folder, "build", f"cpu-{precision}", name)
    if not os.path.exists(path):
        stop(f"{path}: expected a program: make GPU=0 PRECISION={precision} train infer, there")
    return path


def output(command, folder=None):
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        stop(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout + done.stderr


def make_vocabulary(path):
    """Every byte, then pairs of bytes: 65,529 ids."""
    texts = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(263, 65536)]
    with open(path, "w") as f:
        for number, text in enumerate(texts, 1):
            f.write(f"{number} {text!r} {len(text)}\n")


class Bench:
    def __init__(self, work):
        self.vocabulary, self.prompt = os.path.join(work, "vocabulary.txt"), os.path.join(work, "prompt.txt")
        make_vocabulary(self.vocabulary)
        with open(self.prompt, "w") as f:                               # no pair twice: 256 tokens
            f.write("".join(chr(48 + i % 64) + chr(48 + i // 4) for i in range(256)))
        self.figures = {}                                               # {(side, what): [numbers]}

    def add(self, side, what, number):
        self.figures.setdefault((side, what), []).append(number)

    def median(self, side, what):
        return statistics.median(self.figures[side, what])

    def generate(self, side, infer, model, name, tokens):
        text = output([infer, model, "--vocab", self.vocabulary, "-f", self.prompt, "-n", str(tokens), "--ignore-eos"])
        found = SUMMARY.search(text)
        if not found or found[1] != "256":
            stop(f"{infer}: expected a summary of 256 tokens, found {text[-200:]!r}")
        self.add(side, f"{name} pre-fill", float(found[2]))
        self.add(side, f"{name} decode", float(found[3]))

    def first_token(self, side, infer, model):
        begin = time.time()
        with subprocess.Popen([infer, model, "--vocab", self.vocabulary, "-p", "ab", "-n", "1", "--ignore-eos"],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            child.stdout.read(1)
            self.add(side, "start", time.time() - begin)
            child.stdout.read()

    def stage1(self, side, train, kind, out):
        begin = time.time()
        child = subprocess.Popen([train, "-c", kind, *SHAPE, "--train.train_stage", "1", "--train.out", out],
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            stop(f"{train}: exit code {child.returncode}")
        self.add(side, "stage 1", time.time() - begin)
        for file in os.listdir(out):
            if file.startswith("state"):
                os.unlink(os.path.join(out, file))
        model = os.path.join(out, "model_000000.safetensors")
        self.add(side, "stage 1, memory", usage.ru_maxrss * 1024 / os.path.getsize(model))
        return model

    def demo(self, side, train, out):
        output([train, "--train.max_steps", "40", "--train.sample_every", "-1", "--train.val_every", "0", "--train.out",
                out, "--train.data_type", "utf-8", "--train.data_file", os.path.join(HERE, "train_goldfinch.cu"),
                "--model.n_layer", "3", "--model.n_embd", "128", "--model.ctx_len", "128", "--model.vocab_size", "320",
                "--train.micro_bsz", "2", "--train.my_exit_tokens", "588800"])
        with open(os.path.join(out, "log.csv"), newline="") as f:
            self.add(side, "demo step", statistics.median(float(row["ms"]) for row in list(csv.DictReader(f))[5:]))


def whole(work):
    """What a newcomer runs, in a fresh clone: make and the demo, make test."""
    clone = os.path.join(work, "clone")
    shutil.rmtree(clone, ignore_errors=True)
    output(["git", "clone", "-q", HERE, clone])
    times, text = [], ""
    for command in (["make", "GPU=0"], ["./train_goldfinch"], ["make", "GPU=0", "infer", "test_goldfinch"],
                    ["make", "GPU=0", "test"]):
        begin = time.time()
        text += output(command, clone)
        times.append(time.time() - begin)
    print(f"whole demo: make {times[0]:.1f} s, ./train_goldfinch {times[1]:.1f} s, together {sum(times[:2]):.1f} s; "
          + re.search(r"validation loss: [\d.]+", text)[0])
    print(f"make test, programs built: {times[3]:.1f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="another checkout, built")
    parser.add_argument("--peer", help="a Python with rwkv, torch and numpy")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", default="/tmp/bench_cpu")
    parser.add_argument("--quick", action="store_true", help="skip what takes longest: initialization again and again")
    parser.add_argument("--whole", action="store_true", help="only: make, the demo and make test in a fresh clone")
    options = parser.parse_args()
    os.makedirs(options.work, exist_ok=True)
    if options.whole:
        return whole(options.work)
    bench = Bench(options.work)
    folders = {"here": HERE, **({"base": options.base} if options.base else {})}
    models = {}
    for kind in ("goldfinch", "finch"):
        models[kind] = bench.stage1("here", program(HERE, "FP32", "train_goldfinch"), kind,
                                    os.path.join(options.work, kind))
    if options.peer:
        pth = os.path.join(options.work, "finch.pth")
        output([options.peer, os.path.join(HERE, "dev", "convert.py"), models["finch"], pth])
    for run in range(options.runs):
        print(f"run {run + 1} of {options.runs}", file=sys.stderr)
        for side, folder in folders.items():
            infer, train = program(folder, "FP32", "infer_goldfinch"), program(folder, "FP32", "train_goldfinch")
            bench.generate(side, infer, models["finch"], "Finch", 20)
            bench.generate(side, infer, models["goldfinch"], "GoldFinch", 20 if side == "here" else 5)
            bench.first_token(side, infer, models["goldfinch"])
            bench.demo(side, train, os.path.join(options.work, f"demo-{side}"))
            if run > 0 and not options.quick:
                bench.stage1(side, train, "goldfinch", os.path.join(options.work, f"stage1-{side}"))
        bench.generate("BF16", program(HERE, "BF16", "infer_goldfinch"), models["goldfinch"], "GoldFinch", 20)
        if options.peer:
            found = output([options.peer, "-c", PEER, pth]).split("peer ")[-1].split()
            bench.add("peer", "Finch pre-fill", float(found[0]))
            bench.add("peer", "Finch decode", float(found[1]))
    report(bench)


def report(bench):
    cpu = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read())
    print(f"{cpu[1] if cpu else 'a CPU'}, {len(os.sched_getaffinity(0))} cores; medians")
    for (side, what), numbers in bench.figures.items():
        print(f"{side:5} {what:20} {bench.median(side, what):9.3f}   ({min(numbers):.3f} to {max(numbers):.3f})")
    ratios = [("decode, Finch, to the peer's", "here", "Finch decode", "peer", "Finch decode"),
              ("decode, GoldFinch, to the peer's Finch", "here", "GoldFinch decode", "peer", "Finch decode"),
              ("decode, GoldFinch, BF16 to FP32", "BF16", "GoldFinch decode", "here", "GoldFinch decode"),
              ("pre-fill, Finch, to the peer's", "here", "Finch pre-fill", "peer", "Finch pre-fill"),
              ("decode, Finch, to the base's", "here", "Finch decode", "base", "Finch decode"),
              ("decode, GoldFinch, to the base's", "here", "GoldFinch decode", "base", "GoldFinch decode"),
              ("pre-fill, Finch, to the base's", "here", "Finch pre-fill", "base", "Finch pre-fill"),
              ("time to the first token, to the base's", "here", "start", "base", "start"),
              ("time of train_stage 1, to the base's", "here", "stage 1", "base", "stage 1"),
              ("time of a demo step, to the base's", "here", "demo step", "base", "demo step")]
    for name, side, what, other, other_what in ratios:
        if (side, what) in bench.figures and (other, other_what) in bench.figures:
            print(f"{name:45} {bench.median(side, what) / bench.median(other, other_what):8.3f}")


if __name__ == "__main__":
    main()
