#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["torch", "numpy", "safetensors"]
# ///
"""Tests of convert.py: files with random weights under the names and shapes of the authors' models (dev/golden lists
them) survive both ways, and ./infer_goldfinch runs them. Needs ./train_goldfinch and ./infer_goldfinch.
"""

import argparse
import math
import os
import re
import resource
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONVERT = os.path.join(ROOT, "dev", "convert.py")
TEXT = os.path.join(ROOT, "LICENSE")
counts = {"passed": 0, "failed": 0}


def check(what, right, detail=""):
    counts["passed" if right else "failed"] += 1
    print(f"{'PASS' if right else 'FAIL'} {what}" + ("" if right else f"\n{detail}"), flush=True)


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def read_table(name):
    """Settings, and {tensor's name: shape}, of a golden table."""
    settings, shapes = {}, {}
    for line in open(os.path.join(ROOT, "dev", "golden", f"{name}.txt"), encoding="utf-8"):
        words = line.split(";")[0].split()
        if words[:1] == ["config"]:
            settings = dict(word.split("=", 1) for word in words[1:])
        elif words[:1] == ["grad"]:
            shapes[words[1]] = [int(n) for n in words[2].split("x")]
    return {key: value for key, value in settings.items() if key not in ("name", "B", "T", "steps")}, shapes


def random_weights(shapes):
    weights = {}
    for name, shape in shapes.items():
        scale, offset = 0.1, 0.0
        if name.endswith("weight"):
            scale, offset = (0.2, 1.0) if len(shape) == 1 else (shape[-1] ** -0.5, 0.0)
        weights[name] = offset + scale * torch.randn(shape) - (3 if name.endswith("time_decay") else 0)
    return weights


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def score(model):
    """Loss per token of the text, by ./infer_goldfinch."""
    code, out, err = run(os.path.join(ROOT, "infer_goldfinch"), model, "--score", TEXT)
    found = re.search(r"loss ([0-9.]+) per token", out)
    return float(found[1]) if code == 0 and found else err


def llama_loss(w, n_layer, base):
    """The text's loss under spec section 3's Llama, in float64."""
    w = {name: tensor.double() for name, tensor in w.items()}
    ids = torch.tensor([byte + 1 for byte in open(TEXT, "rb").read()])
    T, C = len(ids) - 1, w["emb.weight"].shape[1]
    norm = lambda x, name: F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"])
    angle = torch.outer(torch.arange(T), base ** (-torch.arange(0, 64, 2).double() / 64))
    turn = torch.polar(torch.ones_like(angle), angle)

    def heads(x, rotate):
        x = x.view(T, -1, 64).transpose(0, 1)
        return torch.view_as_real(torch.view_as_complex(x.reshape(-1, T, 32, 2)) * turn).flatten(2) if rotate else x

    x = norm(w["emb.weight"][ids[:-1]], "blocks.0.ln0")
    for l in range(n_layer):
        p = f"blocks.{l}."
        y = norm(x, p + "ln1")
        q, k, v = (heads(y @ w[f"{p}att.w{i}.weight"].T, i != "v") for i in "qkv")
        scores = (q @ k.transpose(1, 2) / 8).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1) @ w[p + "att.wo.weight"].T
        y = norm(x, p + "ln2")
        x = x + (F.silu(y @ w[p + "ffn.w1.weight"].T) * (y @ w[p + "ffn.w3.weight"].T)) @ w[p + "ffn.w2.weight"].T
    return F.cross_entropy(norm(x, "ln_out") @ w["head.weight"].T, ids[1:]).item()


def test_model(name):
    settings, shapes = read_table(name)
    weights = random_weights(shapes)
    flags = [part for key, value in settings.items() for part in (f"--model.{key}", value)]
    if "tmix2" not in settings:
        flags += ["--model.tmix2", ""]
    code, config, err = run(os.path.join(ROOT, "train_goldfinch"), *flags, "--print-config")
    check(f"{name}: settings", code == 0, err)
    open("config.yaml", "w", encoding="utf-8").write(config)
    torch.save(weights, "model.pth")
    code, out, err = run(sys.executable, CONVERT, "model.pth", "model.safetensors", "--config", "config.yaml")
    check(f"{name}: .pth to .safetensors", code == 0 and same(load_file("model.safetensors"), weights), out + err)
    code, out, err = run(sys.executable, CONVERT, "model.safetensors", "back.pth")
    check(f"{name}: and back, the same bits", code == 0 and same(torch.load("back.pth", weights_only=True), weights), out + err)
    loss = score("model.safetensors")
    check(f"{name}: runs, loss {loss}", isinstance(loss, float) and 4 < loss < 12)
    run(sys.executable, CONVERT, "model.pth", "guessed.safetensors")
    guessed = score("guessed.safetensors")
    check(f"{name}: the same from its tensors alone", guessed == loss, f"{guessed}, with its settings {loss}")
    return weights, settings, loss


def main():
    torch.manual_seed(1)
    for name in ("goldfinch", "goldfinch_upgrade", "goldfinch_gptalpha", "finch_x060b", "eagle", "gptalpha"):
        test_model(name)
    weights, settings, loss = test_model("llama")
    want = llama_loss(weights, int(settings["n_layer"]), float(settings["rope.base"]))
    check(f"llama: the loss that torch gets in float64, {want:.6f}", abs(loss - want) < 2e-3 * want, f"{loss}")

    for dtype in (torch.bfloat16, torch.float16):
        torch.save({f"model.{name}": w.to(dtype) for name, w in weights.items()}, "half.pth")
        code, out, err = run(sys.executable, CONVERT, "half.pth", "half.safetensors")
        found = load_file("half.safetensors") if code == 0 else {}
        kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        check(f"{dtype} is stored as {kept}", same(found, {name: w.to(dtype).to(kept) for name, w in weights.items()}), out + err)
    wrapped = {"deepspeed.pt": {"module": {f"module.{k}": w for k, w in weights.items()}, "ds_version": "0.16"},
               "lightning.ckpt": {"state_dict": {f"_forward_module.model.{k}": w for k, w in weights.items()}, "epoch": 3},
               "compiled.bin": {f"_orig_mod.{k.replace('blocks.0.', 'blocks.0._orig_mod.')}": w for k, w in weights.items()},
               "nested.pth": {"model": {"module": {f"module.model._orig_mod.{k}": w for k, w in weights.items()}}, "step": 7}}
    for name, saved in wrapped.items():
        torch.save(saved, name)
        code, out, err = run(sys.executable, CONVERT, name, "wrapped.safetensors")
        check(f"{name} is unwrapped", code == 0 and same(load_file("wrapped.safetensors"), weights), out + err)
    tied = {k: w for k, w in weights.items() if k != "head.weight"}
    torch.save(tied, "tied.pth")
    code, out, err = run(sys.executable, CONVERT, "tied.pth", "tied.safetensors")
    check("a tied head is written out, and said", code == 0 and "no tensor head.weight: taken to be emb.weight" in out and
          same(load_file("tied.safetensors"), {**tied, "head.weight": weights["emb.weight"]}), out + err)

    before = open("wrapped.safetensors", "rb").read()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    for source, target in (("compiled.bin", "wrapped.safetensors"), ("compiled.bin", "new.safetensors"),
                           ("wrapped.safetensors", "new.pth")):
        done = subprocess.run((sys.executable, CONVERT, source, target), capture_output=True, text=True, preexec_fn=limit)
        check(f"a full disk: {target}", done.returncode == 1 and len(done.stderr.splitlines()) == 1
              and re.match(f"convert.py: {target}: could not be written: .*File too large", done.stderr), done.stderr)
    check("keeps what was there", open("wrapped.safetensors", "rb").read() == before)
    check("and leaves nothing", not [f for f in os.listdir(".") if f.startswith("new") or f.endswith(".tmp")], os.listdir("."))

    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    for name in ("pointer.pth", "pointer.safetensors"):
        open(name, "w", encoding="utf-8").write(pointer)
    os.link("tied.pth", "zip.safetensors")
    os.link("tied.safetensors", "tensors.pth")
    torch.save({"hyper": argparse.Namespace(x=1), **wrapped["lightning.ckpt"]}, "objects.ckpt")
    torch.save({"a.weight": torch.ones(1), "module.a.weight": torch.ones(1)}, "twice.pth")
    for pattern, arguments in (("pointer.pth: .*Git LFS", ("pointer.pth", "b.safetensors")),
                               ("pointer.safetensors: .*Git LFS", ("pointer.safetensors", "b.pth")),
                               ("zip.safetensors: .*found what torch.save writes", ("zip.safetensors", "b.pth")),
                               ("tensors.pth: .*found safetensors", ("tensors.pth", "b.safetensors")),
                               ("objects.ckpt: holds Python objects", ("objects.ckpt", "b.safetensors")),
                               ("twice.pth: tensor a.weight: expected once", ("twice.pth", "b.safetensors"))):
        code, out, err = run(sys.executable, CONVERT, *arguments)
        check(f"refused: {pattern}", code == 1 and len(err.splitlines()) == 1 and re.match(f"convert.py: {pattern}", err), err)

    for what, arguments in (("two files of a kind", ("a.pth", "b.pth")), ("no such file", ("none.pth", "b.safetensors")),
                            ("no state_dict", ("config.pth", "b.safetensors")), ("no model", ("empty.pth", "b.safetensors"))):
        os.replace("config.yaml", "config.pth") if os.path.exists("config.yaml") else None
        torch.save({}, "empty.pth")
        code, out, err = run(sys.executable, CONVERT, *arguments)
        check(f"refused: {what}", code == 1 and len(err.splitlines()) == 1 and err.startswith("convert.py: "), out + err)
    print(f"{counts['passed']} passed, {counts['failed']} failed")
    return counts["failed"] > 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.exit(main())
