#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["matplotlib"]
# ///
"""Runs the kernel lab on this machine's GPU, and where PyTorch (and flash-linear-attention) are installed their kernels at
the same shapes, in one go:

  dev/bench.py [NAME ...] [--no-peers | --eager]     writes dev/results/GPU.csv and .png and the table in dev/README.md
  dev/bench.py --from dev/results/GPU.csv  draws and writes the table again, without running anything

The csv grows by a program and its peers at a time: what an interrupted run has measured stays, and so do results of the
same commit on the same machine for programs that are not named.
Peers are timed as the lab times its own: medians of runs queued one behind the other, after a first run.
"""

import argparse
import csv
import glob
import os
import re
import shlex
import subprocess
import sys
import threading

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path = [path for path in sys.path if os.path.abspath(path) != HERE]      # where PyTorch would find our profile.py as its own
sys.path.insert(0, os.path.dirname(HERE))
from prepro_minipile import replacing                                   # noqa: E402
COLUMNS = ["kernel", "shape", "version", "name", "precision", "ms", "GB/s", "TFLOP/s", "floor_ms", "floor_percent",
           "copy_GB/s", "matmul_TFLOP/s"]   # the last two: this GPU in the same run, what the floor is made of
DEVICE = "cuda"                             # of the peers


# ---- the lab's programs ----

def programs():
    return [os.path.basename(p)[:-3] for p in sorted(glob.glob(f"{HERE}/*.cu")) if '#include "common.h"' in open(p).read()]


def output_of(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()
    except OSError:
        return ""


def run_lab(name):
    """(rows, the GPU's name, whether all versions passed)"""
    rows, machine = [], {}
    process = subprocess.Popen([f"{HERE}/{name}"], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
        words = shlex.split(line) if line.startswith(("result ", "machine ")) else []
        fields = dict(word.split("=", 1) for word in words[1:])
        if line.startswith("machine "):
            machine = fields
        elif line.startswith("result ") and "floor" in fields:
            fields["floor_percent"] = fields.pop("floor").rstrip("%")
            rows.append({**fields, **{rate: machine[rate] for rate in COLUMNS[-2:]}})
    return rows, machine.get("device"), process.wait() == 0


# ---- peers: generators of (name, function to time) for a kernel's shape ----

COMPILES = True                             # --eager: no peers by torch.compile, which takes minutes


def as_is_and_compiled(f):
    yield "PyTorch", f
    if COMPILES:
        yield "PyTorch, compiled", torch.compile(f)


def forward_of(f, *inputs):
    for name, forward in as_is_and_compiled(f):
        yield name, lambda: forward(*inputs)


def backward_of(f, *inputs):
    """Gradients of f alone, its forward pass made once."""
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [x for x in inputs if x.requires_grad]
    for name, forward in as_is_and_compiled(f):
        out = forward(*inputs)
        gradient = torch.randn_like(out)
        yield name, lambda: torch.autograd.grad(out, wanted, gradient, retain_graph=True)


def randn(*shape, dtype=None):
    return torch.randn(*shape, device=DEVICE, dtype=dtype or torch.bfloat16)


def shift(x):
    return F.pad(x, (0, 0, 1, -1)) - x


def layernorm_forward(rows, C):
    yield from forward_of(lambda x, w, b: F.layer_norm(x, (C,), w, b), randn(rows, C), randn(C), randn(C))


def layernorm_backward(rows, C):
    yield from backward_of(lambda x, w, b: F.layer_norm(x, (C,), w, b), randn(rows, C), randn(C), randn(C))


def five_mixes(x, h, w2, mu):
    B, T, C = x.shape
    m = torch.bmm(h.view(B * T, 5, 32).transpose(0, 1), w2).view(5, B, T, C)
    return x + shift(x) * (mu.view(5, 1, 1, C) + m)


def ddlerp_forward(B, T, C):
    yield from forward_of(five_mixes, randn(B, T, C), randn(B * T, 160), randn(5, 32, C), randn(5, C))


def ddlerp_backward(B, T, C):
    yield from backward_of(five_mixes, randn(B, T, C), randn(B * T, 160), randn(5, 32, C), randn(5, C))


def ddlerp_hidden(x, mu, w1):
    return torch.tanh((x + shift(x) * mu) @ w1)


def ddlerp_hidden_forward(B, T, C):
    yield from forward_of(ddlerp_hidden, randn(B, T, C), randn(C), randn(C, 160))


def ddlerp_hidden_backward(B, T, C):
    yield from backward_of(ddlerp_hidden, randn(B, T, C), randn(C), randn(C, 160))


def channel_mix(x, mu_k, mu_r, K, V, R):
    k = torch.relu((x + shift(x) * mu_k) @ K.t()) ** 2
    return torch.sigmoid((x + shift(x) * mu_r) @ R.t()) * (k @ V.t())


def channel_mix_inputs(B, T, C):
    hidden = int(3.5 * C) // 32 * 32
    return randn(B, T, C), randn(C), randn(C), randn(hidden, C), randn(C, hidden), randn(C, C)


def channel_mix_forward(B, T, C):
    yield from forward_of(channel_mix, *channel_mix_inputs(B, T, C))


def channel_mix_backward(B, T, C):
    yield from backward_of(channel_mix, *channel_mix_inputs(B, T, C))


def gold_kv(B, T, C):
    rank = max(C // 16, 64)

    def f(k0, xo, mu_x, mu_k, mu_v, w1, w2, k1, k2, v1, v2, norms):
        m = torch.tanh((xo + shift(xo) * mu_x) @ w1)
        k = k0 + shift(k0) * (mu_k + m[..., :32] @ w2[0])
        v = xo + shift(xo) * (mu_v + m[..., 32:] @ w2[1])
        return (F.layer_norm(k + torch.tanh(k @ k1) @ k2, (C,), norms[0], norms[1]),
                F.layer_norm(v + torch.tanh(v @ v1) @ v2, (C,), norms[2], norms[3]))
    yield from forward_of(f, randn(B, T, C), randn(B, T, C), randn(C), randn(C), randn(C), randn(C, 64), randn(2, 32, C),
                          randn(C, rank), randn(rank, C), randn(C, rank), randn(rank, C), randn(4, C))


def classifier(rows, V):
    logits, targets = randn(rows, V).requires_grad_(), torch.randint(V, (rows,), device=DEVICE)
    for name, loss in as_is_and_compiled(F.cross_entropy):
        yield name, lambda: torch.autograd.grad(loss(logits, targets), logits)


def adamw(n):
    p = torch.nn.Parameter(randn(n, dtype=torch.float32))
    p.grad = randn(n, dtype=torch.float32)
    yield "PyTorch, fused", torch.optim.AdamW([p], lr=1e-3, fused=True).step


def matmul(M, O, I):
    x, w = randn(M, I), randn(O, I)
    yield "PyTorch", lambda: x @ w.t()


def attention(B, H, T, backward):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    q, k, v = [randn(B, H, T, 64).requires_grad_() for _ in range(3)]
    for name, backend in (("FlashAttention-2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        def forward():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if backward:
            out = forward()
            gradient = torch.randn_like(out)
            yield name, lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)
        else:
            yield name, forward


def attention_forward(B, H, T):
    yield from attention(B, H, T, False)


def attention_backward(B, H, T):
    yield from attention(B, H, T, True)


def wkv_inputs(B, T, H):
    r, k, v = [randn(B, T, H, 64) for _ in range(3)]
    log_decay = -torch.exp(torch.rand(B, T, H, 64, device=DEVICE) * 5 - 6)
    return [x.to(torch.bfloat16).requires_grad_() for x in (r, k, v, log_decay, randn(H, 64))]


def wkv_forward(B, T, H):
    from fla.ops.rwkv6 import chunk_rwkv6
    inputs = wkv_inputs(B, T, H)
    yield "flash-linear-attention", lambda: chunk_rwkv6(*inputs, scale=1.0)[0]


def wkv_backward(B, T, H):
    from fla.ops.rwkv6 import chunk_rwkv6
    inputs = wkv_inputs(B, T, H)
    out = chunk_rwkv6(*inputs, scale=1.0)[0]
    gradient = torch.randn_like(out)
    yield "flash-linear-attention", lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)


PEERS = [layernorm_forward, layernorm_backward, ddlerp_forward, ddlerp_backward, ddlerp_hidden_forward,
         ddlerp_hidden_backward, channel_mix_forward, channel_mix_backward, gold_kv, classifier, adamw, matmul, attention_forward,
         attention_backward, wkv_forward, wkv_backward]


def median_ms(f):
    n = 1
    for _ in range(3):                      # the first run compiles, the second says how many fit 0.2 s
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for event in events[1:]:
            f()
            event.record()
        torch.cuda.synchronize()
        times = sorted(a.elapsed_time(b) for a, b in zip(events, events[1:]))
        n = max(1, min(50, int(200 / (times[0] + 1e-3)))) if _ == 1 else 1
    return times[len(times) // 2]


def import_peers():
    """Takes as long as some of the lab's programs, and goes on beside the first."""
    global torch, F
    try:
        import torch
        import torch.nn.functional as F
        if COMPILES:
            import torch._functorch.config
            torch._functorch.config.donated_buffer = False              # backward passes are run more than once
    except ImportError:
        torch = None
        print("no peers: PyTorch is not installed")


def run_peers(rows):
    known = {f.__name__: f for f in PEERS}
    found = []
    for kernel, shape, floor in dict.fromkeys((r["kernel"], r["shape"], r["floor_ms"]) for r in rows if r["precision"] == "BF16"):
        if kernel not in known:
            continue
        try:
            if COMPILES:
                torch._dynamo.reset()
            for name, f in known[kernel](*map(int, shape.split("x"))):
                ms = median_ms(f)
                print(f"peer kernel={kernel} shape={shape} ms={ms:.4g} name=\"{name}\"", flush=True)
                found.append({"kernel": kernel, "shape": shape, "version": "peer", "name": name, "precision": "BF16",
                              "ms": f"{ms:.4g}", "floor_ms": floor, "floor_percent": f"{100 * float(floor) / ms:.1f}"})
        except Exception as error:          # a peer that is not installed, or not for this GPU, is no reason to stop
            print(f"no peer for {kernel} {shape}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        torch.cuda.empty_cache()
    return found


# ---- results ----

def write_csv(path, header, rows):
    with replacing(path) as temporary, open(temporary, "w", newline="") as f:
        f.writelines(f"# {line}\n" for line in header)
        table = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_csv(path):
    with open(path, newline="") as f:
        lines = f.readlines()
    header = [line[2:].strip() for line in lines if line.startswith("# ")]
    return header, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def where(device, peers):
    driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0]
    cuda = re.search(r"release ([\d.]+)", output_of(["nvcc", "--version"]))
    commit = output_of(["git", "describe", "--always", "--exclude=*"])
    changed = output_of(["git", "status", "--porcelain", "-uno", "--", ":/", ":!results", ":!README.md"])
    return f"{device}; driver {driver}, CUDA {cuda[1] if cuda else '?'}, {peers}, commit {commit}{'-dirty' if changed else ''}"


def rates(rows):
    """Lines for people: what the floors are made of; it differs a little from program to program."""
    texts = []
    for column, text in ((COLUMNS[-2], "copy {} GB/s"), (COLUMNS[-1], "matrix products {} TFLOP/s")):
        values = sorted(round(float(r[column])) for r in rows if r.get(column))
        if values:
            texts.append(text.format(values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"))
    return [", ".join(texts)] if texts else []


def by_kernel(rows):
    """{(kernel, shape): rows}, in the order of the file"""
    groups = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["shape"]), []).append(row)
    return groups


def draw(path, header, rows):
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    first = {}                              # of each kernel its first shape
    for (kernel, shape), group in by_kernel(rows).items():
        first.setdefault(kernel, (shape, group))
    columns = 3
    lines = -(-len(first) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 2.3 * lines), squeeze=False)
    for ax in axes.flat[len(first):]:
        ax.axis("off")
    for ax, (kernel, (shape, group)) in zip(axes.flat, first.items()):
        labels = [r["name"] if r["version"] == "peer" else f"{r['version']} {r['name']}" for r in group]
        last = max((int(r["version"]) for r in group if r["version"] != "peer"), default=0)
        colors = ["#e0a030" if r["version"] == "peer" else "#2a6f4e" if int(r["version"]) == last else "#9cc5b0" for r in group]
        times = [float(r["ms"]) for r in group]
        ax.barh(range(len(group)), times, color=colors)
        for i, ms in enumerate(times):
            ax.text(ms, i, f" {ms:.3g}", va="center", fontsize=7)
        ax.axvline(float(group[0]["floor_ms"]), color="#c03030", linewidth=1)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
        ax.xaxis.set_minor_formatter(lambda ms, _: "")
        ax.set_xlim(float(group[0]["floor_ms"]) / 2, max(times) * 3)
        ax.set_yticks(range(len(group)), labels, fontsize=7)
        ax.tick_params(axis="x", labelsize=7)
        ax.invert_yaxis()
        ax.set_title(f"{kernel}  {shape}", fontsize=9)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    legend = "ms (log): versions, the one in use (dark), peers (yellow), floor (red line)"
    figure.suptitle("\n".join([legend, *header]), fontsize=10)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    print(f"wrote {os.path.relpath(path)}")


def table(header, rows, picture):
    lines = [*header, "", "| kernel | shape | floor, ms | first version | in use | of the floor | best peer | peer / ours |",
             "|---|---|---|---|---|---|---|---|"]
    for (kernel, shape), group in by_kernel(rows).items():
        ours = sorted((r for r in group if r["version"] != "peer"), key=lambda r: int(r["version"]))
        peers = sorted((r for r in group if r["version"] == "peer"), key=lambda r: float(r["ms"]))
        if not ours:
            continue
        first, last = ours[0], ours[-1]
        if not last["name"].startswith("in use"):
            lines.append(f"| {kernel} | {shape} | {float(last['floor_ms']):.3g} | {float(first['ms']):.3g} | failed its check | | | |")
            continue
        floor, slow, fast = float(last["floor_ms"]), float(first["ms"]), float(last["ms"])
        peer = f"{float(peers[0]['ms']):.3g} ({peers[0]['name']}) | {float(peers[0]['ms']) / fast:.2f}" if peers else "|"
        lines.append(f"| {kernel} | {shape} | {floor:.3g} | {slow:.3g} | {fast:.3g} | {100 * floor / fast:.0f} % | {peer} |")
    if os.path.exists(picture):
        lines += ["", f"![each kernel's versions, the floor and the peers]({os.path.relpath(picture, HERE)})"]
    return "\n".join(lines)


def write_readme(text, path=f"{HERE}/README.md"):
    begin, end = "<!-- results: begin -->", "<!-- results: end -->"
    page = open(path).read()
    if page.count(begin) != 1 or page.count(end) != 1:
        sys.exit(f"bench.py: {path}: expected one line \"{begin}\" and one \"{end}\"")
    page = page[:page.index(begin) + len(begin)] + "\n" + text + "\n" + page[page.index(end):]
    with replacing(path) as temporary, open(temporary, "w") as f:
        f.write(page)


def main():
    global COMPILES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="programs of the lab (default: all)")
    parser.add_argument("--no-peers", action="store_true", help="the lab's own kernels only")
    parser.add_argument("--from", dest="source", metavar="FILE.csv", help="run nothing, take the results in FILE.csv")
    parser.add_argument("--eager", action="store_true", help="peers without torch.compile, which takes minutes")
    args = parser.parse_args()
    COMPILES = not args.eager
    failed = []
    if args.source:
        header, rows = read_csv(args.source)
        base = args.source[:-4]
    else:
        importing = threading.Thread(target=import_peers)
        if not args.no_peers:
            importing.start()
        names = args.names or programs()
        jobs = max(1, (os.cpu_count() or 1) // 2)
        if subprocess.run(["make", f"-j{jobs}", "-C", f"{HERE}/..", *(f"dev/{name}" for name in names)]).returncode != 0:
            sys.exit("bench.py: the build failed")
        base = None
        for name in names:
            new, device, passed = run_lab(name)
            if not passed:
                failed.append(name)
            if not new:
                continue
            if not args.no_peers:
                importing.join()
            with_peers = not args.no_peers and torch is not None
            if base is None:
                base = f"{HERE}/results/" + re.sub(r"\W+", "-", device).strip("-")
                header = [where(device, f"PyTorch {torch.__version__}" if with_peers else "no peers")]
                before, rows = read_csv(base + ".csv") if os.path.exists(base + ".csv") else (None, [])
                rows = rows if before == header else []
            if with_peers:
                new += run_peers(new)
            ran = {r["kernel"] for r in new}
            rows = [r for r in rows if r["kernel"] not in ran] + new
            rows.sort(key=lambda r: (r["kernel"], r["shape"], r["version"] == "peer"))
            os.makedirs(f"{HERE}/results", exist_ok=True)
            write_csv(base + ".csv", header, rows)
        if base is None:
            sys.exit("bench.py: nothing was timed: no GPU here, or no version passed its check")
        print(f"wrote {os.path.relpath(base)}.csv")
    header += rates(rows)
    draw(base + ".png", header, rows)
    write_readme(table(header, rows, base + ".png"))
    if failed:
        sys.exit("bench.py: failed checks in: " + " ".join(failed))


if __name__ == "__main__":
    main()
