#!/usr/bin/env python3
"""One training step by kernel: time, share, launches, and how near to the speed of memory each one comes.

  dev/profile.py -- ./train_goldfinch -c goldfinch -c L12D768ctx1024minipile        profiles its third step with ncu
  dev/profile.py --tool nsys -- ./train_goldfinch ...     times alone, where the GPU's counters are for root only
  dev/profile.py --csv FILE                               a table from what ncu or nsys left before (--save FILE)

Bytes are those that went through DRAM. "of copy" compares them with the rate of a copy (--copy, in GB/s; dev/bench.py
measures it): a kernel bound by memory is done when it stands near 100 % and moves no more bytes than its floor says.
Kernels run one by one under ncu, so that their sum is more than a step takes.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile

METRICS = {"gpu__time_duration.sum": "ns", "dram__bytes_read.sum": "bytes", "dram__bytes_write.sum": "bytes"}
UNITS = {"ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9,
         "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def stop(message):
    sys.exit(f"profile.py: {message}")


def record(tool, command, path):
    """Runs the command's third step under the profiler and leaves the profiler's csv at path."""
    if not shutil.which(tool):
        stop(f"{tool} is not on the PATH; it comes with the CUDA Toolkit")
    folder = tempfile.mkdtemp()                                                 # the run's own, with the checkpoint at its end
    try:
        record_into(folder, tool, command + ["--train.profile_step", "3", "--train.max_steps", "3", "--train.val_every", "0",
                                             "--train.sample_every", "-1", "--train.out", f"{folder}/out"], path)
    finally:
        shutil.rmtree(folder)


def record_into(folder, tool, command, path):
    if tool == "ncu":
        profiler = ["ncu", "--profile-from-start", "off", "--metrics", ",".join(METRICS), "--csv", "--print-units", "base",
                    "--clock-control", "none", "--cache-control", "none", "--log-file", path]
        if subprocess.run(profiler + command).returncode != 0:
            stop(f"ncu failed; its last words are in {path}. Where it lacks permission: --tool nsys")
        return
    report = f"{folder}/step"
    profiler = ["nsys", "profile", "--capture-range=cudaProfilerApi", "--trace=cuda", "--cuda-graph-trace=node", "-o", report]
    if subprocess.run(profiler + command).returncode != 0:
        stop("nsys failed")
    stats = ["nsys", "stats", "--report", "cuda_gpu_kern_sum", "--format", "csv", f"{report}.nsys-rep"]
    with open(path, "w") as f:
        if subprocess.run(stats, stdout=f).returncode != 0:
            stop("nsys stats failed")


def short(name, each_product):
    """A kernel's name without its arguments; all products of cuBLAS under one name unless each_product."""
    name = re.sub(r"^void ", "", name.strip())
    name = re.sub(r"\((?:int|bool|long|unsigned int)\)", "", name)              # ncu writes mix<(int)5>
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:i]
            break
    if re.match(r"(nvjet|sm\d+_xmma|cutlass|ampere_|gemm|gemv|splitKreduce|cublasLt|volta_|turing_|hopper_)", name.split("::")[-1].split("<")[0]) \
            or name.startswith(("cutlass::", "cublasLt::")):
        return name[:60] if each_product else "matrix products (cuBLAS)"
    return name.replace("__nv_bfloat16", "bf16")


def number(text):
    return float(text.replace(",", ""))


def read_launches(path, each_product):
    """{kernel: [launches, ns, bytes or None]}"""
    with open(path, newline="") as f:
        lines = f.readlines()
    start = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line or "Total Time (ns)" in line), None)
    if start is None:
        stop(f"{path}: no table of kernels: expected a line with \"Kernel Name\" (ncu --csv) or \"Total Time (ns)\" (nsys stats)")
    kernels = {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Total Time (ns)"):                                          # nsys: a line a kernel
            kernel = kernels.setdefault(short(row["Name"], each_product), [0, 0.0, None])
            kernel[0] += int(number(row["Instances"]))
            kernel[1] += number(row["Total Time (ns)"])
            continue
        metric = row.get("Metric Name")                                         # ncu: a line a launch and metric
        if metric not in METRICS:
            continue
        unit = row["Metric Unit"]
        if unit not in UNITS:
            stop(f"{path}: unknown unit \"{unit}\" of {metric}")
        kernel = kernels.setdefault(short(row["Kernel Name"], each_product), [0, 0.0, 0.0])
        value = number(row["Metric Value"]) * UNITS[unit]
        if METRICS[metric] == "ns":
            kernel[0] += 1
            kernel[1] += value
        else:
            kernel[2] += value
    if not kernels:
        stop(f"{path}: no kernel in it: was a step recorded?")
    return kernels


def print_table(kernels, copy):
    total = sum(ns for _, ns, _ in kernels.values())
    width = max(len(name) for name in kernels) + 2
    print(f"{'kernel':{width}}{'ms':>9}{'share':>8}{'launches':>10}{'GB':>9}{'GB/s':>8}{'of copy':>9}")
    for name, (launches, ns, moved) in sorted(kernels.items(), key=lambda item: -item[1][1]):
        line = f"{name:{width}}{ns / 1e6:9.3f}{100 * ns / total:7.1f}%{launches:10d}"
        if moved is not None:
            line += f"{moved / 1e9:9.3f}{moved / ns:8.0f}" + (f"{100 * moved / ns / copy:8.0f}%" if copy else "")
        print(line)
    print(f"{'all':{width}}{total / 1e6:9.3f}{100:7.1f}%{sum(k[0] for k in kernels.values()):10d}"
          f"{sum(k[2] or 0 for k in kernels.values()) / 1e9:9.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="do not run anything, read FILE")
    parser.add_argument("--save", metavar="FILE", help="keep the profiler's csv")
    parser.add_argument("--tool", choices=["ncu", "nsys"], default="ncu")
    parser.add_argument("--copy", type=float, metavar="GB/s", help="rate of a copy, read and written bytes counted")
    parser.add_argument("--each-product", action="store_true", help="cuBLAS' kernels one by one")
    parser.add_argument("command", nargs="*", help="after --: the trainer and its flags")
    args = parser.parse_args()
    if bool(args.csv) == bool(args.command):
        parser.error("expected either --csv FILE or a command after --")
    path = args.csv or args.save
    with tempfile.TemporaryDirectory() as folder:
        if not path:
            path = os.path.join(folder, "profile.csv")
        if not args.csv:
            record(args.tool, args.command, path)
        print_table(read_launches(path, args.each_product), args.copy)


if __name__ == "__main__":
    main()
