#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["torch", "numpy", "safetensors"]
# ///
"""Turns checkpoints of the authors' code (.pth) into ours (.safetensors) and back. The tensors' names are the same.
What torch saved may also end in .pt, .bin or .ckpt and be wrapped, as by Lightning, DeepSpeed or torch.compile.

  dev/convert.py rwkv-final.pth model.safetensors --config model.yaml
  dev/convert.py out/model_001000.safetensors rwkv-1000.pth

A .pth holds no settings: most can be told from its tensors, but not positions (rope) and switches (parallel, use_v2, ..).
--config gives them: what `./train_goldfinch -c goldfinch -c .. --print-config` prints, in a file.
"""

import argparse
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from prepro_minipile import replacing                                   # noqa: E402

TORCH = (".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "module", "model_state_dict", "model")        # where others keep the tensors: Lightning, DeepSpeed, ..
PREFIXES = ("module.", "model.", "_forward_module.")                    # what they put before the names
PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")     # and between their parts


def stop(message):
    sys.exit(f"convert.py: {message}")


def read_config(path):
    """{"model.rope.base": "10000", ..} of nested maps in YAML, as --print-config prints them."""
    values, open_maps = {}, []                                          # open_maps: (indentation, key) of the maps around a line
    try:
        lines = open(path, encoding="utf-8").read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path}: {getattr(error, 'strerror', None) or error}")
    for number, line in enumerate(lines, 1):
        parts = re.fullmatch(r'( *)(\w+):(?: +(?:"((?:[^"\\]|\\.)*)"|([^"#]*?)))? *(?:#.*)?', line)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not parts:
            stop(f"{path}: line {number}: expected \"key: value\", found {line.strip()!r}")
        indent, key, quoted, plain = len(parts[1]), parts[2], parts[3], parts[4]
        while open_maps and indent <= open_maps[-1][0]:
            open_maps.pop()
        if quoted is None and not plain:
            open_maps.append((indent, key))
        else:
            name = ".".join([map_key for _, map_key in open_maps] + [key])
            values[name] = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
    if "model.n_layer" not in values:
        stop(f"{path}: expected model.n_layer and all other settings, as --print-config prints them")
    return values


def bare_name(name):
    name = ".".join(part for part in name.split(".") if part not in PARTS)
    while name.startswith(PREFIXES):
        name = name[name.index(".") + 1:]
    return name


def look_at(path, torch_saved):
    """Stops at what stands in a file's place, or under a wrong ending."""
    try:
        with open(path, "rb") as f:
            start = f.read(64)
    except OSError as error:
        stop(f"{path}: {error.strerror}")
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        stop(f"{path}: expected the file itself, found a pointer of Git LFS to it: `git lfs pull` brings it")
    if not torch_saved and start[:2] in (b"PK", b"\x80\x02"):
        stop(f"{path}: expected safetensors, found what torch.save writes: it ends in .pth elsewhere")
    if torch_saved and start[8:9] == b"{" and start[:2] not in (b"PK", b"\x80\x02"):
        stop(f"{path}: expected what torch.save writes, found safetensors")


def load_torch(path):
    import torch
    look_at(path, True)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                          # its kinds depend on torch's version
        if "weights_only" in str(error):
            stop(f"{path}: holds Python objects beside tensors, which are not run here; where you trust the file: "
                 f"torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'plain.pth'), or ['module']")
        stop(f"{path}: expected a state_dict saved by torch: {str(error).splitlines()[0]}")
    while isinstance(weights, dict) and not any(isinstance(w, torch.Tensor) for w in weights.values()):
        inner = [key for key in WRAPPERS if isinstance(weights.get(key), dict)]
        if not inner:
            break
        weights = weights[inner[0]]
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        stop(f"{path}: expected a state_dict, that is names and tensors")
    named = {}
    for name, w in weights.items():
        if bare_name(name) in named:
            stop(f"{path}: tensor {bare_name(name)}: expected once, found twice, the second time as {name}")
        # bf16 and fp32 are taken as they stand; fp16 and fp64 become fp32. Tensors of their own memory, row by row.
        named[bare_name(name)] = (w if w.dtype in (torch.bfloat16, torch.float32) else w.float()).clone().contiguous()
    return named


def load_safetensors(path):
    import safetensors
    from safetensors.torch import load_file
    look_at(path, False)
    try:
        weights = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        stop(f"{path}: {error}")
    return weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="FROM", help=".pth or .safetensors")
    parser.add_argument("target", metavar="TO", help="the other one of these")
    parser.add_argument("--config", metavar="FILE", help="settings of a .pth, from --print-config")
    args = parser.parse_args()
    from_torch, to_torch = (os.path.splitext(path)[1] in TORCH for path in (args.source, args.target))
    ours = [os.path.splitext(path)[1] == ".safetensors" for path in (args.source, args.target)]
    if not (from_torch and ours[1] or ours[0] and to_torch):
        stop(f"expected a .pth and a .safetensors file, found {args.source} and {args.target}")
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError as error:
        stop(f"the Python package {error.name} is missing: python3 -m pip install torch numpy safetensors")
    weights = load_torch(args.source) if from_torch else load_safetensors(args.source)
    if "emb.weight" not in weights:
        stop(f"{args.source}: tensor emb.weight: expected, not found")
    if "head.weight" not in weights:
        weights["head.weight"] = weights["emb.weight"].clone()
        print(f"{args.source}: no tensor head.weight: taken to be emb.weight, as of a model whose head is tied to it")
    settings = read_config(args.config) if args.config else None
    try:
        with replacing(args.target) as temporary:
            if from_torch:
                save_file(weights, temporary, metadata=settings)
            else:
                with open(temporary, "wb") as f:
                    torch.save(weights, f)
    except Exception as error:                                          # torch and safetensors have errors of their own
        cause = error
        while isinstance(cause, BaseException) and not isinstance(cause, OSError) and cause.__context__:
            cause = cause.__context__
        why = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        stop(f"{args.target}: could not be written: {why}")
    types = sorted({str(w.dtype).replace("torch.", "") for w in weights.values()})
    print(f"{args.target}: {len(weights)} tensors, {sum(w.numel() for w in weights.values())} parameters, {', '.join(types)}")


if __name__ == "__main__":
    main()
