#!/usr/bin/env python3
"""Training on 1, 2, 4, .. GPUs of this machine: speed, efficiency, memory, and what communication costs.

    dev/scaling.py                          # L12 and L24 on 1, 2, 4, 8 GPUs, as far as they are here
    dev/scaling.py --gpus 1,2 --models L12 --steps 20
    dev/scaling.py --gpus 2 --models L24 --sockets --accumulate 8       # NCCL over TCP instead of NVLink
    dev/scaling.py --checks                 # same bits twice; resume on fewer GPUs; the paper's settings for 100 steps
    dev/scaling.py --peer FOLDER --gpus 1,2 --models L12    # the authors' code (a checkout of recursal/GoldFinch-paper) in
                                            # PyTorch: DDP, compiled, flash-linear-attention where it is installed
    dev/scaling.py --computed               # no GPU: the table of dev/README.md, 1 to 512 GPUs
    dev/scaling.py --plot TABLE.csv OUT.png # no GPU: a picture of what --csv wrote

Each run trains on random tokens (or --data PREFIX) and is stopped after its steps, before it would save. A step's time is
the median of the second half of the steps. `not hidden` is what a step takes longer than one GPU's, as a part of what the
exchange takes by itself (which needs PyTorch to be measured; otherwise it is left out).
"""
import argparse
import csv
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
from plot import save                                                   # noqa: E402
from prepro_minipile import replacing                                   # noqa: E402

trainer = os.path.join(here, "..", "train_goldfinch")
MODELS = {
    "L12": dict(parameters=186_617_856, flags="-c goldfinch -c L12D768ctx1024minipile --train.grad_cp 0".split(),
                layers=12, channels=768, micro_bsz=32, ctx_len=1024),
    "L24": dict(parameters=1_445_257_216, flags="-c goldfinch -c L24D2048ctx2048minipile --train.grad_cp 2".split(),
                layers=24, channels=2048, micro_bsz=8, ctx_len=2048),
    "tiny": dict(parameters=0, flags="--model.n_layer 3 --model.n_embd 64 --model.ctx_len 32 --model.vocab_size 65536".split(),
                 layers=3, channels=64, micro_bsz=2, ctx_len=32),       # tries this script without a GPU
}


def log_rows(folder):
    try:
        with open(os.path.join(folder, "log.csv")) as f:
            return [r for r in csv.DictReader(f) if r["norm"] and r["ms"]]
    except FileNotFoundError:
        return []


def gpu_memory():
    """MiB in use on each GPU, [] without nvidia-smi."""
    try:
        out = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True,
                             text=True, timeout=20).stdout
        return [int(x) for x in out.split()]
    except (FileNotFoundError, subprocess.TimeoutExpired, ValueError):
        return []


def cards():
    try:
        out = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
        return [line for line in out.stdout.split("\n") if line]
    except FileNotFoundError:
        return []


class Run:
    """One training run; stop() after `steps` lines of its log, or let it end."""

    def __init__(self, flags, folder, environment=None):
        self.folder = folder
        self.error = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([trainer, *flags, "--train.out", folder], stdout=subprocess.DEVNULL, stderr=self.error,
                                        env={**os.environ, **(environment or {})}, start_new_session=True)
        self.memory = []

    def wait(self, steps, limit):
        """True once the log has so many lines (None: once it ended well)."""
        end = time.time() + limit
        looked = 0
        while time.time() < end:
            code = self.process.poll()
            rows = len(log_rows(self.folder))
            if steps is not None and rows >= steps:
                return True
            if code is not None:
                return code == 0 and steps is None
            if rows >= 3 and time.time() - looked > 1:
                looked = time.time()
                used = gpu_memory()
                self.memory = [max(a, b) for a, b in zip(used, self.memory or used)]
            time.sleep(0.05)
        return False

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.error.seek(0)
        return self.error.read().strip()


def train(flags, folder, steps, limit, environment=None, ends=False):
    """Rows of the log, GPU memory in MiB, error text."""
    shutil.rmtree(folder, ignore_errors=True)
    run = Run(flags, folder, environment)
    good = run.wait(None if ends else steps, limit)
    rows = log_rows(folder)
    memory = run.memory
    error = run.stop()
    return rows if good else [], memory, error or ("" if good else f"{len(rows)} of {steps} steps within {limit} s")


def random_tokens(prefix, n):
    with open(prefix + ".bin", "wb") as f:
        f.write(os.urandom(2 * n))
    with open(prefix + ".idx", "wb") as f:
        f.write(b"MMIDIDX\0\0" + struct.pack("<QBQQiqqq", 1, 8, 1, 2, n, 0, 0, 1))


EXCHANGE = """
import os, sys, torch, torch.distributed as dist
rank, n, numbers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(sys.argv[1])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
numbers = numbers // n * n
g = torch.zeros(numbers, device="cuda")
w = torch.zeros(numbers, device="cuda", dtype=torch.bfloat16)
share_g, share_w = torch.zeros(numbers // n, device="cuda"), torch.zeros(numbers // n, device="cuda", dtype=torch.bfloat16)
def timed(f, k=5):
    for _ in range(2): f()
    torch.cuda.synchronize(); dist.barrier(); torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(k): f()
    end.record(); torch.cuda.synchronize()
    return begin.elapsed_time(end) / k
a = timed(lambda: dist.reduce_scatter_tensor(share_g, g))
b = timed(lambda: dist.all_gather_into_tensor(w, share_w))
if rank == 0: print("exchange", a, b, flush=True)
os._exit(0)
"""


# Less work than ours: bf16 weights, gradients and moments, so half the bytes to sum, and no term on the largest logit
PEER = """
import os, sys, time, types
folder, layers, channels, T, B, again, steps = sys.argv[1], *map(int, sys.argv[2:])
rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
os.chdir(folder)
sys.path.insert(0, ".")
os.environ.update(RWKV_MODEL_TYPE="x060c2", RWKV_CTXLEN=str(T), RWKV_HEAD_SIZE_A="64", RWKV_JIT_ON="0", RWKV_TORCH_COMPILE="1")
import torch, torch.distributed as dist, torch.nn.functional as F
torch._dynamo.config.cache_size_limit = 128
device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
if device.type == "cuda":
    torch.cuda.set_device(device)
try:
    from fla.ops.rwkv6 import chunk_rwkv6
    def wkv(r, k, v, w, u, s):
        heads = lambda z: z.view(*r.shape[:2], -1, 64)
        return chunk_rwkv6(heads(r), heads(k), heads(v), heads(-torch.exp(w)), u.to(r.dtype), scale=1.0)[0].view(r.shape)
    import cuda
    sys.modules["cuda.rwkv6_cuda"] = types.ModuleType("cuda.rwkv6_cuda")
    sys.modules["cuda.rwkv6_cuda"].RUN_CUDA_RWKV6 = wkv
    kernel = "flash-linear-attention"
except ImportError:
    kernel = "the authors' WKV"
from configs import FinchC2_Config, TrainerCLI_Config, Train_Config
from src.model import Transformer
torch.manual_seed(rank)
with device:
    config = FinchC2_Config(tmix="x060c2", tmix2="gold", inv_other_layer_ratio=3, n_layer=layers, n_embd=channels, ctx_len=T,
                            vocab_size=65536)
    model = Transformer(TrainerCLI_Config(train=Train_Config(grad_cp=again), model=config)).to(torch.bfloat16).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.001, fused=True)
parameters = list(model.parameters())
if n > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
x, y = [torch.randint(1, 60000, (B, T), device=device) for _ in range(2)]
def step():
    with torch.amp.autocast(device.type, dtype=torch.bfloat16):
        logits, _ = model(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=n == 1)
for _ in range(3):
    step()
wait()
if n > 1: dist.barrier()
begin = time.time()
for _ in range(steps):
    step()
wait()
if n > 1: dist.barrier()
ms = (time.time() - begin) / steps * 1e3
gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0
if rank == 0: print("peer", ms, gib, "torch " + torch.__version__ + ", " + kernel, flush=True)
os._exit(0)
"""


def ranks_of(program, arguments, n, limit, environment=None):
    """Runs a Python program once a rank; the first rank's output, and the end of what all say to stderr."""
    base = {**os.environ, **(environment or {}), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    with tempfile.TemporaryFile("w+") as error:
        runs = [subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=error,
                                 env={**base, "RANK": str(r), "LOCAL_RANK": str(r)}, text=True) for r in range(n)]
        try:
            out = runs[0].communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            return "", f"not done within {limit} s"
        finally:
            for r in runs:
                r.kill()
                r.wait()
        error.seek(0)
        return out, error.read().strip()[-300:]


def measure_peer(a):
    print(f"{'model':6} {'GPUs':>4} {'ms':>9} {'tok/s':>9} {'times one':>9} {'efficiency':>10} {'GiB a GPU':>9}", flush=True)
    for name in a.models.split(","):
        model, one = MODELS[name], None
        for n in a.gpus:
            out, error = ranks_of(PEER, [os.path.abspath(a.peer), model["layers"], model["channels"], model["ctx_len"],
                                         model["micro_bsz"], int(name == "L24"), a.steps], n, a.limit)
            words = [line.split(" ", 3) for line in out.split("\n") if line.startswith("peer ")]
            if not words:
                print(f"{name:6} {n:4} did not run: {error}", flush=True)
                continue
            ms, gib = float(words[0][1]), float(words[0][2])
            speed = n * model["micro_bsz"] * model["ctx_len"] / ms * 1e3
            one = one or (n, speed)
            times = speed / one[1] * one[0]
            print(f"{name:6} {n:4} {ms:9.2f} {speed:9.0f} {times:9.3f} {100 * times / n:8.1f} % {gib:9.1f}  {words[0][3]}", flush=True)


def exchange_ms(n, parameters, environment=None):
    """ms of the reduce-scatter of fp32 gradients and of the all-gather of bf16 weights, alone; None without PyTorch."""
    if n < 2 or not parameters:
        return None
    out = ranks_of(EXCHANGE, [parameters], n, 60, environment)[0].split()
    return (float(out[1]), float(out[2])) if out[:1] == ["exchange"] else None


def measure(a, data, folder):
    environment = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"} if a.sockets else {}
    print(f"{'model':6} {'GPUs':>4} {'accumulate':>10} {'ms':>9} {'tok/s':>9} {'times one':>9} {'efficiency':>10} {'GiB a GPU':>9} "
          f"{'exchange ms':>11} {'not hidden':>10}", flush=True)
    table = []
    for name in a.models.split(","):
        model = MODELS[name]
        one = None
        for n in a.gpus:
            flags = [*model["flags"], "--train.data_type", "binidx", "--train.data_file", data, "--train.validation_data_file", "",
                     "--train.val_every", "0", "--train.save_every", "0", "--train.max_steps", "1000000", "--train.devices", str(n),
                     "--train.micro_bsz", str(model["micro_bsz"]), "--train.accumulate_grad_batches", str(a.accumulate), *a.flags]
            rows, memory, error = train(flags, folder, a.steps, a.limit, environment)
            if not rows:
                print(f"{name:6} {n:4} did not run: {error}", flush=True)
                continue
            ms = statistics.median(float(r["ms"]) for r in rows[len(rows) // 2:])
            speed = n * a.accumulate * model["micro_bsz"] * model["ctx_len"] / ms * 1e3
            one = (n, speed, ms) if one is None else one
            alone = exchange_ms(n, model["parameters"], environment)
            times, gib = speed / one[1] * one[0], max(memory[:n]) / 1024 if memory else 0
            total = f"{sum(alone):.2f}" if alone else ""
            rest = f"{100 * max(0, ms - one[2]) / sum(alone):.0f} %" if alone and one[0] == 1 else ""
            print(f"{name:6} {n:4} {a.accumulate:10} {ms:9.2f} {speed:9.0f} {times:9.3f} {100 * times / n:8.1f} % {gib:9.1f} {total:>11} "
                  f"{rest:>10}", flush=True)
            table.append(dict(model=name, gpus=n, accumulate=a.accumulate, sockets=int(a.sockets), ms=f"{ms:.2f}", tok_s=f"{speed:.0f}",
                              times=f"{times:.4f}", gib=f"{gib:.2f}", exchange_ms=total, not_hidden=rest,
                              card=(cards() or ["CPU"])[0]))
    if a.csv and table:
        with replacing(a.csv) as name, open(name, "w") as f:
            out = csv.DictWriter(f, table[0].keys())
            out.writeheader()
            out.writerows(table)


def columns(rows):
    return [tuple(r[k] for k in ("step", "tokens", "loss", "norm", "lr")) for r in rows]


def checks(a, data, folder):
    """Each with the first of the models, on the most GPUs."""
    model, most = MODELS[a.models.split(",")[0]], max(a.gpus)
    base = [*model["flags"], "--train.data_type", "binidx", "--train.data_file", data, "--train.validation_data_file", "",
            "--train.val_every", "0", "--train.micro_bsz", str(max(1, model["micro_bsz"] // 4)), *a.flags]
    runs = [train([*base, "--train.devices", str(most), "--train.max_steps", "12", "--train.save_every", "6"], f"{folder}{i}", 12,
                  a.limit, ends=True) for i in range(2)]
    hashes = []
    for i in range(2):
        for kind in ("model", "state"):
            try:
                with open(f"{folder}{i}/{kind}_000012.safetensors", "rb") as f:
                    header = f.read(8 + struct.unpack("<Q", f.read(8))[0])
                hashes.append(header[header.index(b'"hash":"') + 8:][:16])
            except (FileNotFoundError, ValueError, struct.error):
                hashes.append(f"none {len(hashes)}")
    same = runs[0][0] and columns(runs[0][0]) == columns(runs[1][0]) and hashes[:2] == hashes[2:]
    print(f"{most} GPUs, 12 steps twice: {'the same losses, norms and tensors, bit for bit' if same else 'DIFFERENT ' + runs[1][2]}",
          flush=True)

    fewer = max([n for n in a.gpus if n < most], default=1)
    shutil.rmtree(folder + "2", ignore_errors=True)
    train([*base, "--train.devices", str(most), "--train.max_steps", "6"], folder + "2", 6, a.limit, ends=True)
    run = Run(["--train.resume", "1", "--train.max_steps", "12", "--train.devices", str(fewer), "--train.data_file", data],
              folder + "2")
    run.wait(None, a.limit)
    error = run.stop()
    rows = log_rows(folder + "2")
    apart = [abs(float(x["loss"]) / float(y["loss"]) - 1) for x, y in zip(rows, runs[0][0])]
    kept = len(rows) == 12 and [r[k] for r in rows for k in ("tokens", "lr")] == [r[k] for r in runs[0][0] for k in ("tokens", "lr")]
    print(f"6 steps on {most} GPUs, 6 more on {fewer}: "
          f"{'the same tokens and rates, losses up to %.1e apart' % max(apart) if kept else 'DIFFERENT ' + error}", flush=True)

    for name, n in (("L12", 2), ("L24", 4)):
        if name not in a.models.split(",") or n not in a.gpus:
            continue
        flags = [f for f in MODELS[name]["flags"] if f not in ("--train.grad_cp", "0", "2")]
        rows, memory, error = train([*flags, "--train.data_file", data, "--train.validation_data_file", "", "--train.devices", str(n)],
                                    folder + "3", 100, 3 * a.limit)
        ms = statistics.median(float(r["ms"]) for r in rows[50:]) if rows else 0
        print(f"the paper's {name} on {n} GPUs, 100 steps: " + (f"{ms:.1f} ms, loss {rows[0]['loss']} to {rows[-1]['loss']}, "
              f"{max(memory, default=0) / 1024:.1f} GiB" if rows else "did not run: " + error), flush=True)
    for i in range(4):
        shutil.rmtree(f"{folder}{i}", ignore_errors=True)


def computed():
    """Step time and memory for 1 to 512 GPUs. Measured on H200 of one host: a step and its memory on one; the sums of L12's
    gradients on 2 and 4, after the backward pass; how much longer the slowest of the cards takes than the first; AdamW; how
    much longer a step takes whose sums run beside the backward pass, which is 62 % of it; what NCCL keeps for itself. Assumed:
    8 GPUs of a host are as 4; 40 GB/s a GPU between hosts (400 Gb/s each); machines of 8 GPUs. All else is computed: a ring
    sends (n - 1) / n of a block, 4 bytes a parameter for the sums and 2 for the weights."""
    gib, bandwidths, between, beside, nccl = 2**30, {2: 263e9, 4: 313e9, 8: 313e9}, 40e9, 4 / 83, 0.85
    slower = {1: 0, 2: 0.01, 4: 0.02}
    measured = {"L12": (76.25, 19.6, 12, 768), "L24": (296.3, 55.0, 24, 2048)}     # ms, GiB, layers, channels
    print("| model | GPUs | sums, ms | weights, ms | step, ms | tokens/s | efficiency | GiB a GPU |\n|---|---|---|---|---|---|---|---|")
    for name, (ms, memory, layers, channels) in measured.items():
        parameters, head = MODELS[name]["parameters"], 65536 * channels
        for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
            sums, weights = (parameters * width * (n - 1) / n / bandwidths.get(n, between) * 1e3 for width in (4, 2))
            step = ms * (1 + slower.get(n, slower[4]))                  # the slowest card sets the pace
            backward, rest = 0.62 * step, 0.38 * step
            last = sums * head / parameters                             # the embedding's gradients: nothing hides them
            step += sums if n <= 8 else ms * beside + max(last, sums - backward)
            step -= 1.48 / 187e6 * parameters * (1 - 1 / n)             # AdamW on a share
            step += max(0, weights - rest)                              # beside the update and the next forward pass
            # two or more: masters and moments sharded; gradients where activations were, but for the head's and a layer's
            freed = 0 if n == 1 else parameters * (12 * (1 - 1 / n) + 4) - 4 * (head + (parameters - 2 * head) / layers)
            tokens = n * MODELS[name]["micro_bsz"] * MODELS[name]["ctx_len"] / step * 1e3
            print(f"| {name} | {n} | {sums:.1f} | {weights:.1f} | {step:.1f} | {tokens:,.0f} | {100 * ms / step:.1f} % | "
                  f"{memory - freed / gib + (nccl if n > 1 else 0):.1f} |")


def plot(path, output):
    """Efficiency over GPUs from a table that --csv wrote."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    with open(path) as f:
        rows = [r for r in csv.DictReader(f) if r["sockets"] == "0"]
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    for i, name in enumerate(dict.fromkeys(r["model"] for r in rows)):
        mine = [r for r in rows if r["model"] == name]
        points = [(int(r["gpus"]), 100 * float(r["times"]) / int(r["gpus"])) for r in mine]
        line, = axes.plot(*zip(*points), "o-", label=name)
        for r, point in zip(mine, points):
            axes.annotate(f"{int(r['tok_s']):,}", point, xytext=(4, 5 - 18 * i), textcoords="offset points", fontsize=8,
                          color=line.get_color())
    ticks = sorted({int(r["gpus"]) for r in rows})
    axes.set(xscale="log", xticks=ticks, xticklabels=ticks, ylim=(90, 101.5), xlabel=f"GPUs ({rows[0]['card']}, one host)",
             ylabel="tokens/s of one GPU, %", title="Tokens/s, and each GPU's part of what one does alone")
    axes.set_xlim(ticks[0] * 0.9, ticks[-1] * 1.3)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.tight_layout()
    save(figure, output, 120)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpus", default="1,2,4,8", help="numbers of GPUs")
    p.add_argument("--models", default="L12,L24", help=", ".join(MODELS))
    p.add_argument("--steps", type=int, default=24, help="of each run")
    p.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    p.add_argument("--sockets", action="store_true", help="NCCL without NVLink and shared memory")
    p.add_argument("--data", help="PREFIX of a binidx pair; random tokens without it")
    p.add_argument("--limit", type=int, default=150, help="seconds that a run may take")
    p.add_argument("--csv", help="file for the table")
    p.add_argument("--checks", action="store_true", help="same bits, resume, the paper's settings, in place of the table")
    p.add_argument("--peer", metavar="FOLDER", help="a checkout of the authors' code, timed in place of ours")
    p.add_argument("--computed", action="store_true", help="the computed table")
    p.add_argument("--plot", nargs=2, metavar=("CSV", "PNG"), help="a picture of a table that --csv wrote")
    p.add_argument("flags", nargs="*", help="behind --: more flags of the trainer")
    a = p.parse_args()
    if a.computed:
        computed()
        return
    if a.plot:
        plot(*a.plot)
        return
    available = len(cards()) or int(os.environ.get("CUDA_ON_CPU_DEVICES", os.cpu_count()))
    a.gpus = [int(n) for n in a.gpus.split(",") if int(n) <= available]
    print(f"{', '.join(sorted(set(cards()))) or 'CPU'} x {available}", flush=True)
    if a.peer:
        measure_peer(a)
        return
    with tempfile.TemporaryDirectory() as tmp:
        data = a.data or os.path.join(tmp, "tokens")
        if not a.data:
            random_tokens(data, 20_000_000)
        (checks if a.checks else measure)(a, data, os.path.join(tmp, "out"))


if __name__ == "__main__":
    main()
