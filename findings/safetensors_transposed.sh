#!/usr/bin/env bash
# safetensors' numpy interface writes a transposed array with its shape, but its numbers in memory's order.
#
# Seen with safetensors 0.8.0 and numpy 2.4.6, Python 3.11: save_file of an array that is not C-contiguous (a.T, a slice)
# raises nothing and warns of nothing; load_file gives the new shape filled with the numbers in the old order. np.ascontiguousarray before saving helps.
#
# Prints what it saw; exit 0 if it is still so, 1 if that has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6 || exit 2
"$folder/venv/bin/python" - "$folder/t.safetensors" <<'PY'
import sys
import numpy as np
from safetensors.numpy import load_file, save_file

array = np.arange(6, dtype=np.float32).reshape(2, 3).T
save_file({"a": array}, sys.argv[1])
found = load_file(sys.argv[1])["a"]
print("saved: ", array.tolist())
print("loaded:", found.tolist())
expected_surprise = found.shape == array.shape and found.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
print("the numbers are in other places" if expected_surprise else "this has changed")
sys.exit(0 if expected_surprise else 1)
PY
