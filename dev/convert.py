#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["torch", "numpy", "safetensors"]
# ///
"""Turns checkpoints of the authors' code (.pth) into ours (.safetensors) and back. The tensors' names are the same.

  dev/convert.py rwkv-final.pth model.safetensors --config model.yaml
  dev/convert.py out/model_001000.safetensors rwkv-1000.pth

A .pth holds no settings: most can be told from its tensors, but not positions (rope) and switches (parallel, use_v2, ..).
--config gives them: what `./train_goldfinch -c goldfinch -c .. --print-config` prints, in a file.
"""

import argparse
import os
import re
import sys

PREFIXES = ("module.", "_forward_module.", "_orig_mod.", "model.")      # what wrappers put before the names


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
    while name.startswith(PREFIXES):
        name = name[name.index(".") + 1:]
    return name


def load_pth(path):
    import torch
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                          # its kinds depend on torch's version
        stop(f"{path}: expected a state_dict saved by torch: {str(error).splitlines()[0]}")
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]                                 # Lightning's checkpoints
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        stop(f"{path}: expected a state_dict, that is names and tensors")
    weights = {bare_name(name): w for name, w in weights.items()}
    # bf16 and fp32 are taken as they stand; fp16 and fp64 become fp32. Tensors of their own memory, row by row.
    kept = (torch.bfloat16, torch.float32)
    return {name: (w if w.dtype in kept else w.float()).clone().contiguous() for name, w in weights.items()}


def load_safetensors(path):
    import safetensors
    from safetensors.torch import load_file
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
    kinds = [os.path.splitext(path)[1] for path in (args.source, args.target)]
    if kinds not in ([".pth", ".safetensors"], [".safetensors", ".pth"]):
        stop(f"expected a .pth and a .safetensors file, found {args.source} and {args.target}")
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError as error:
        stop(f"the Python package {error.name} is missing: python3 -m pip install torch numpy safetensors")
    to_ours = kinds[0] == ".pth"
    weights = load_pth(args.source) if to_ours else load_safetensors(args.source)
    if "emb.weight" not in weights:
        stop(f"{args.source}: tensor emb.weight: expected, not found")
    if to_ours:
        save_file(weights, args.target, metadata=read_config(args.config) if args.config else None)
    else:
        torch.save(weights, args.target)
    types = sorted({str(w.dtype).replace("torch.", "") for w in weights.values()})
    print(f"{args.target}: {len(weights)} tensors, {sum(w.numel() for w in weights.values())} parameters, {', '.join(types)}")


if __name__ == "__main__":
    main()
