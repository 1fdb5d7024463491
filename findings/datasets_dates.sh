#!/usr/bin/env bash
# A JSON column whose strings all look like dates does not come back as the strings that stand in the file.
#
# Seen with datasets 5.2.0 and pyarrow 26.0.1, Python 3.11: load_dataset("json") makes timestamps of "2024-01-02", without
# a word; a prompt that is made of them, as harnesses for evaluation do with str or a template, reads
# "2024-01-02 00:00:00". So it does where the feature is named as a string, too: the timestamps are cast back. With one row
# of another kind all texts stay as they are.
#
# Prints what it saw; exit 0 if it is still so, 1 if that has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 || exit 2
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
printf '%s\n' '{"answer": "2024-01-02"}' '{"answer": "1999-12-31"}' >"$folder/dates.jsonl"
printf '%s\n' '{"answer": "2024-01-02"}' '{"answer": "long ago"}' >"$folder/mixed.jsonl"
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from datasets import Features, Value, load_dataset


def read(name, **how):
    rows = load_dataset("json", data_files=f"{sys.argv[1]}/{name}.jsonl", split="train", **how)
    return [str(answer) for answer in rows["answer"]]


dates, mixed = read("dates"), read("mixed")
named = read("dates", features=Features({"answer": Value("string")}))
print("all dates:       ", dates)
print("one other text:  ", mixed)
print("features named:  ", named)
same = (dates == ["2024-01-02 00:00:00", "1999-12-31 00:00:00"] and mixed == ["2024-01-02", "long ago"]
        and named == dates)
print("texts became timestamps" if same else "this has changed")
sys.exit(0 if same else 1)
PY
