#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["matplotlib"]
# ///
"""Draws training runs: loss and validation loss above, learning rate and gradient norm below, over tokens, so that runs
with batches of different size compare.

  dev/plot.py out/log.csv [more.csv ...] -o loss.png
"""

import argparse
import csv
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from prepro_minipile import replacing                                   # noqa: E402


def stop(message):
    sys.exit(f"plot.py: {message}")


def save(figure, path, dpi):
    """Writes a picture, in the format that its name ends with."""
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format=os.path.splitext(path)[1][1:] or "png", dpi=dpi)
    except (OSError, ValueError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {path}: {getattr(error, 'strerror', None) or error}")


def read_log(path):
    """{column: [numbers]} of a log.csv; where there is no number, nan. A line cut off by a kill is left out."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.reader(f))
    except OSError as error:
        stop(f"{path}: {error.strerror}")
    header = rows[0] if rows else []
    for name in ("tokens", "loss", "val_loss", "norm", "lr"):
        if name not in header:
            stop(f"{path}: no column {name}: expected the log.csv of a run")
    rows = [row for row in rows[1:] if len(row) == len(header)]
    if not rows:
        stop(f"{path}: no step in it yet")
    try:
        return {name: [float(row[i]) if row[i] else math.nan for row in rows] for i, name in enumerate(header)}
    except ValueError as error:
        stop(f"{path}: {error}")


def smoothed(values, steps):
    """Means with weights that fall by e over so many steps, to both sides; what is no number is passed over."""
    keep, sums = math.exp(-1 / max(steps, 1e-9)), [[0.0, 0.0] for _ in values]
    for order in (range(len(values)), reversed(range(len(values)))):
        total = weight = 0.0
        for i in order:
            if math.isfinite(values[i]):
                total, weight = keep * total + values[i], keep * weight + 1
            sums[i][0] += total
            sums[i][1] += weight
    return [total / weight if weight else math.nan for total, weight in sums]


def label_of(path, paths):
    """The run's folder, or as much of the path as tells it from the others."""
    parts = [os.path.abspath(p).split(os.sep) for p in paths]
    mine = os.path.abspath(path).split(os.sep)
    if mine[-1] == "log.csv" and all(p[-1] == "log.csv" for p in parts):
        mine, parts = mine[:-1], [p[:-1] for p in parts]
    n = 1
    while n < len(mine) and sum(p[-n:] == mine[-n:] for p in parts) > 1:
        n += 1
    return "/".join(mine[-n:]).replace(".csv", "")


def draw(paths, labels, args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter
    plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                         "axes.spines.right": False})
    figure, (top, rate, norm) = plt.subplots(3, 1, figsize=(10, 8), sharex=True, layout="constrained",
                                             height_ratios=(4, 1, 1))
    lows, highs = [], []
    for i, (path, label) in enumerate(zip(paths, labels)):
        log, color = read_log(path), f"C{i % 10}"
        tokens, steps = log["tokens"], args.smooth * len(log["loss"])
        curve = smoothed(log["loss"], steps)
        points = [(t, v) for t, v in zip(tokens, log["val_loss"]) if math.isfinite(v)]
        top.plot(tokens, log["loss"], color=color, alpha=0.25, linewidth=0.7)
        top.plot(tokens, curve, color=color, linewidth=1.8, label=f"{label}: {curve[-1]:.3f}")
        if points:
            top.plot(*zip(*points), "o-", color=color, markersize=4, linewidth=1, markerfacecolor="white",
                     label=f"{label}, validation: {points[-1][1]:.3f}")
        rate.plot(tokens, log["lr"], color=color)
        norm.plot(tokens, log["norm"], color=color, alpha=0.25, linewidth=0.7)
        norm.plot(tokens, smoothed(log["norm"], steps), color=color, linewidth=1.5)
        after = [v for v in log["loss"][len(curve) // 20:] + [v for _, v in points] if math.isfinite(v)]
        lows.append(min(after, default=0))
        highs.append(max(after, default=1))
    room = 0.05 * (max(highs) - min(lows)) or 0.1               # the first twentieth's losses would flatten the rest
    top.set_ylim(min(lows) - room, max(highs) + room)
    top.set_ylabel("loss (nats per token)")
    top.legend(frameon=False)
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    norm.set_ylabel("gradient norm")
    norm.set_yscale("log")
    for axis_formatter in (norm.yaxis.set_major_formatter, norm.yaxis.set_minor_formatter):
        axis_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
    norm.set_xlabel("tokens")
    norm.xaxis.set_major_formatter(EngFormatter(sep=""))
    if args.title:
        top.set_title(args.title)
    figure.align_ylabels()
    save(figure, args.output, args.dpi)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="log.csv")
    parser.add_argument("-o", "--output", default="loss.png", help=".png, .svg or .pdf (loss.png)")
    parser.add_argument("--smooth", type=float, default=0.02, help="part of a run that a point is the mean of (0.02)")
    parser.add_argument("--label", action="append", default=[], help="name of a run, once for each (its folder)")
    parser.add_argument("--title")
    parser.add_argument("--dpi", type=int, default=120)
    args = parser.parse_intermixed_args()
    try:
        import matplotlib                                       # noqa: F401
    except ImportError:
        stop("the Python package matplotlib is missing: python3 -m pip install matplotlib")
    draw(args.logs, args.label + [label_of(path, args.logs) for path in args.logs[len(args.label):]], args)


if __name__ == "__main__":
    main()
