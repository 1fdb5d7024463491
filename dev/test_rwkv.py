#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["rwkv==0.8.32", "torch", "numpy", "safetensors"]
# ///
"""RWKV-6 models run as in the rwkv package (0.8.32, on the CPU in fp32): random weights under the names and shapes of the
public models, the ranks of each size included, through convert.py. Needs ./infer_goldfinch in fp32.
"""

import json
import os
import subprocess
import sys
import tempfile

os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
import torch                                                            # noqa: E402
from rwkv.model import RWKV                                             # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
V, TOKENS = 320, 40
counts = {"passed": 0, "failed": 0}


def check(what, right, detail=""):
    counts["passed" if right else "failed"] += 1
    print(f"{'PASS' if right else 'FAIL'} {what}" + ("" if right else f"\n     | {str(detail)[:600]}"), flush=True)


def weights(C, F, L, mix_rank, decay_rank):
    shapes = {"emb.weight": (V, C), "head.weight": (V, C), "blocks.0.ln0.weight": (C,), "blocks.0.ln0.bias": (C,),
              "ln_out.weight": (C,), "ln_out.bias": (C,)}
    for layer in range(L):
        att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        for name in ("ln1", "ln2", "att.ln_x"):
            shapes[f"blocks.{layer}.{name}.weight"] = shapes[f"blocks.{layer}.{name}.bias"] = (C,)
        for name in "xwkvrg":
            shapes[att + "time_maa_" + name] = (1, 1, C)
        for name in ("receptance", "key", "value", "output", "gate"):
            shapes[att + name + ".weight"] = (C, C)
        shapes.update({att + "time_maa_w1": (C, 5 * mix_rank), att + "time_maa_w2": (5, mix_rank, C),
                       att + "time_decay": (1, 1, C), att + "time_decay_w1": (C, decay_rank),
                       att + "time_decay_w2": (decay_rank, C), att + "time_faaaa": (C // 64, 64),
                       ffn + "time_maa_k": (1, 1, C), ffn + "time_maa_r": (1, 1, C), ffn + "key.weight": (F, C),
                       ffn + "receptance.weight": (C, C), ffn + "value.weight": (C, F)})
    found = {}
    for name, shape in shapes.items():
        scale = shape[-1] ** -0.5 if name.endswith(".weight") and len(shape) == 2 else 0.3
        if name.endswith(("_w1", "_w2")):
            scale = shape[-2] ** -0.5
        offset = 1 if name.endswith("weight") and len(shape) == 1 else 0.5 if "time_maa" in name and scale == 0.3 else 0
        found[name] = offset + scale * torch.randn(shape) - (3 if name.endswith("time_decay") else 0)
    return found


def test_size(folder, title, C, F, L, mix_rank, decay_rank):
    torch.manual_seed(1)
    pth, ours = os.path.join(folder, f"{title}.pth"), os.path.join(folder, f"{title}.safetensors")
    torch.save(weights(C, F, L, mix_rank, decay_rank), pth)
    done = subprocess.run([sys.executable, os.path.join(ROOT, "dev", "convert.py"), pth, ours], capture_output=True, text=True)
    if done.returncode != 0:
        return check(f"{title}: convert.py", False, done.stderr)
    ids = [int(i) for i in torch.randint(1, V, (TOKENS,))]
    model, state, theirs = RWKV(model=pth[:-4], strategy="cpu fp32"), None, 0.0
    logits, state = model.forward(ids[:1], state)
    for i in ids[1:]:
        theirs += torch.log_softmax(logits.double(), -1)[i].item()
        logits, state = model.forward([i], state)
    most = int(logits.argmax())
    lines = [{"context_ids": ids[:1], "continuation_ids": ids[1:]}, {"context_ids": ids, "continuation_ids": [most]}]
    done = subprocess.run([os.path.join(ROOT, "infer_goldfinch"), ours, "--requests", "-"], capture_output=True, text=True,
                          input="".join(json.dumps(line) + "\n" for line in lines))
    if done.returncode != 0:
        return check(f"{title}: infer_goldfinch", False, done.stderr)
    found, greedy = map(json.loads, done.stdout.splitlines())
    check(f"{title}, ranks {mix_rank} and {decay_rank}: the rwkv package's logarithms", "logprob" in found and abs(
        found["logprob"] - theirs) < 1e-5 * abs(theirs), (found, theirs))
    check(f"{title}: and its likeliest next token", greedy.get("greedy") is True and abs(
        greedy["logprob"] - torch.log_softmax(logits.double(), -1)[most].item()) < 1e-4, greedy)


def main():
    with tempfile.TemporaryDirectory() as folder:
        # widths and depths are a sixteenth or less of the public models'
        test_size(folder, "as 1.6B", 128, 448, 3, 32, 64)
        test_size(folder, "as 3B", 192, 672, 2, 32, 64)
        test_size(folder, "as 7B", 256, 896, 2, 64, 128)
        test_size(folder, "as 14B", 256, 896, 3, 64, 128)
        test_size(folder, "odd ranks", 128, 448, 2, 40, 24)
    print(f"{counts['passed']} passed, {counts['failed']} failed")
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
