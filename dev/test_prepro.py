#!/usr/bin/env python3
"""Tests of prepro_minipile.py and dev/plot.py.   dev/test_prepro.py [tinyshakespeare.txt] [--offline]

Most tests run with bare Python (no packages at all). Those of the tokenizer, .zst, .parquet and pictures need packages:
they are taken from this Python, or from build/venv, which is made when they are missing (not with --offline); where none
can be had, these tests are counted as skipped. No test reaches beyond this machine: downloads come from a server here.
Given tinyshakespeare.txt (or its path in TINYSHAKESPEARE), its tokens are compared with dev/golden/data.
"""

import array
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "prepro_minipile.py")
PLOT = os.path.join(ROOT, "dev", "plot.py")
GOLDEN = os.path.join(ROOT, "dev", "golden", "data")
BARE = [sys.executable, "-S", "-s"]                     # no site-packages
VENV = os.path.join(ROOT, "build", "venv", "bin", "python")
RAW_ROWS = [f"validation text {i}" for i in range(20)]
counts = {"passed": 0, "failed": 0, "skipped": 0}

sys.path.insert(0, ROOT)
import prepro_minipile                                  # noqa: E402


def check(what, right, detail=""):
    counts["passed" if right else "failed"] += 1
    print(f"{'PASS' if right else 'FAIL'} {what}" + ("" if right else f"\n{detail}"), flush=True)


def skip(what, why):
    counts["skipped"] += 1
    print(f"SKIP {what}: {why}", flush=True)


def run(*args, python=None, stdin=None, env=None, **more):
    done = subprocess.run([*(python or BARE), SCRIPT, *map(str, args)], input=stdin, capture_output=True,
                          env={**os.environ, "PYTHONPATH": "", **(env or {})}, **more)
    done.out, done.err = done.stdout.decode(), done.stderr.decode()
    return done


def good(what, *args, **more):
    done = run(*args, **more)
    check(what, done.returncode == 0, f"exit {done.returncode}\n{done.out}{done.err}")
    return done


def refused(code, pattern, *args, **more):
    """Exit code and one line on stderr."""
    done = run(*args, **more)
    line = done.err.replace("prepro_minipile.py: ", "", 1).strip()
    right = done.returncode == code and "\n" not in line and re.fullmatch(pattern, line)
    check(f"refused: {line[:110]}", right, f"exit {done.returncode}, expected {code} and {pattern}\n{done.out}{done.err}")


def write(path, text):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    return path


def read(path):
    with open(path, "rb") as f:
        return f.read()


def read_pair(prefix):
    """Documents as lists of ids, read as the reference's loader does: by size and offset of each sequence."""
    idx, tokens = read(prefix + ".idx"), read(prefix + ".bin")
    assert idx[:9] == b"MMIDIDX\0\0" and struct.unpack_from("<Q", idx, 9) == (1,) and idx[17] == 8
    n, marks = struct.unpack_from("<QQ", idx, 18)
    sizes = struct.unpack_from(f"<{n}i", idx, 34)
    offsets = struct.unpack_from(f"<{n}q", idx, 34 + 4 * n)
    assert struct.unpack_from(f"<{marks}q", idx, 34 + 12 * n) == tuple(range(n + 1)) and len(idx) == 42 + 20 * n
    return [list(struct.unpack_from(f"<{size}H", tokens, at)) for size, at in zip(sizes, offsets)]


def byte_ids(text):
    return [b + 1 for b in (text.encode() if isinstance(text, str) else text)] + [0]


def pair_bytes(documents):
    """A pair as BlinkDL's and Megatron's tools write it: .bin and .idx."""
    sizes = [len(d) for d in documents]
    offsets = [2 * sum(sizes[:i]) for i in range(len(sizes))]
    n = len(sizes)
    idx = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, n, n + 1) + struct.pack(f"<{n}i", *sizes)
    idx += struct.pack(f"<{n}q", *offsets) + struct.pack(f"<{n + 1}q", *range(n + 1))
    return b"".join(struct.pack(f"<{len(d)}H", *d) for d in documents), idx


def leftovers(folder):
    return sorted(f for f in os.listdir(folder) if re.search(r"\.(tmp|new|part)$", f))


def fnv1a64(data):
    h = 0xCBF29CE484222325
    for b in data:
        h = (h ^ b) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return h


# ---------------------------------------- packages

def find_packages(offline):
    """{package: Python that has it}."""
    wanted = {"pyrwkv_tokenizer": "pyrwkv-tokenizer", "zstandard": "zstandard", "pyarrow": "pyarrow",
              "matplotlib": "matplotlib"}
    program = "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(p) is None for p in sys.argv[1:]))"

    def has(python, package):
        return os.path.exists(python) and subprocess.run([python, "-c", program, package]).returncode == 0
    if not all(has(sys.executable, p) for p in wanted) and not offline:
        try:
            if not os.path.exists(VENV):
                subprocess.run([sys.executable, "-m", "venv", os.path.dirname(os.path.dirname(VENV))], check=True,
                               capture_output=True, timeout=60)
            for package, name in wanted.items():
                if not has(VENV, package):
                    subprocess.run([VENV, "-m", "pip", "install", "-q", "--retries", "1", "--timeout", "10", name],
                                   check=True, capture_output=True, timeout=120)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"packages could not be installed: {error}")
    return {p: [python] for p in wanted for python in (VENV, sys.executable) if has(python, p)}


# ---------------------------------------- with nothing but Python

def test_bytes():
    print("-- byte-level ids, with nothing but Python")
    every_byte = bytes(range(256)) * 3
    write("a.txt", every_byte)
    good("any bytes", "a.txt", "-o", "data/a", "--bytes")
    check("id is byte + 1, one 0 at the end", read_pair("data/a") == [byte_ids(every_byte)])
    check("a single document goes whole to training, and there is no folder of leftovers",
          sorted(os.listdir("data")) == ["a.bin", "a.idx"], os.listdir("data"))
    done = good("--check", "--check", "data/a", "--ctx-len", "64")
    check("counts", "data/a: 769 tokens in 1 document; u16, ids 0 to 256" in done.out
          and "768 bytes of text, 1.000 per token" in done.out and "ctx_len 64: 11\n" in done.out, done.out)
    long = random.Random(1).randbytes(3_000_000)
    write("long.txt", long)
    good("a long text", "long.txt", "-o", "data/long", "--bytes")
    check("comes out whole", read_pair("data/long") == [byte_ids(long.replace(b"\r\n", b"\n"))])
    text = "a\n\nb\n\n\nc\n\n"
    good("--split, standard input", "-", "-o", "data/s", "--bytes", "--split", r"\n\n", "--val", "0", stdin=text.encode())
    check("documents, the empty ones left out", read_pair("data/s") == [byte_ids(t) for t in ("a", "b", "\nc")])
    many = "".join(f"document {i} " + "x" * (i * 7919 % 3001) + "\u2603--" for i in range(2000))
    good("--split of many", "-", "-o", "data/m", "--bytes", "--split", "\u2603--", "--val", "0", stdin=many.encode())
    check("documents", read_pair("data/m") == [byte_ids(t) for t in many.split("\u2603--")[:-1]])
    refused(2, r"data/m: .*: there already, and whole; --force replaces it", "a.txt", "-o", "data/m", "--bytes")
    good("--force", "a.txt", "-o", "data/m", "--bytes", "--force")
    check("replaces", read_pair("data/m") == [byte_ids(every_byte)])
    refused(2, "the Python package pyrwkv-tokenizer is missing: python3 -m pip install pyrwkv-tokenizer",
            "a.txt", "-o", "data/x")


def test_validation():
    print("-- validation by documents")
    documents = [f"document {i}" for i in range(1000)]
    write("v.jsonl", "".join(json.dumps({"text": d}) + "\n" for d in documents))
    done = good("a tenth of 1000", "v.jsonl", "-o", "data/v", "--bytes", "--val", "0.1")
    train, valid = read_pair("data/v"), read_pair("data/v_validation")
    check("about that many", 60 < len(valid) < 140, len(valid))
    check("each document once", sorted(train + valid) == sorted(map(byte_ids, documents)))
    check("in their order", [d for d in map(byte_ids, documents) if d in valid] == valid)
    check("the command to train is shown", "./train_goldfinch --train.data_file data/v --model.vocab_size 320 "
          "--train.validation_data_file data/v_validation" in done.out, done.out)
    good("the same again", "v.jsonl", "-o", "data/w", "--bytes", "--val", "0.1")
    check("the same choice", read("data/w_validation.bin") == read("data/v_validation.bin"))
    good("another seed", "v.jsonl", "-o", "data/w", "--bytes", "--val", "0.1", "--seed", "2", "--force")
    check("another choice", read("data/w_validation.bin") != read("data/v_validation.bin"))
    write("two.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    good("two documents", "two.jsonl", "-o", "data/w", "--bytes", "--force")
    check("one for each", (read_pair("data/w"), read_pair("data/w_validation")) == ([byte_ids("one")], [byte_ids("two")]))
    good("one document", "a.txt", "-o", "data/w", "--bytes", "--force")
    check("the old validation set is gone", not os.path.exists("data/w_validation.idx"))


def read_mask(prefix):
    """As read_pair, of u8."""
    idx, mask = read(prefix + ".idx"), read(prefix + ".bin")
    n, = struct.unpack_from("<Q", idx, 18)
    assert idx[17] == 1 and len(idx) == 42 + 20 * n
    sizes, offsets = (struct.unpack_from(f"<{n}{c}", idx, at) for c, at in (("i", 34), ("q", 34 + 4 * n)))
    return [list(mask[at:at + size]) for size, at in zip(sizes, offsets)]


def test_mask():
    print("-- prompts and answers")
    big = prepro_minipile.UNIT * 2 + 5                                  # such a text is tokenized in parts
    pairs = [("Q: 1 + 1?", " 2"), ("", "only an answer"), ("only a prompt", ""), ("W\u00f6?", "\u00fc"),
             ("p" * big, "a" * big), ("last", " one")] + [(f"prompt {i}" * (i % 9), f"answer {i}" * (i % 5)) for i in range(1, 300)]
    lines = "".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in pairs)
    write("qa.jsonl", lines + '{"prompt": "", "answer": ""}\n')
    done = good("--mask", "qa.jsonl", "-o", "data/qa", "--bytes", "--mask", "--val", "0")
    count = [(len(p.encode()), len(a.encode())) for p, a in pairs if p or a]
    check("a prompt and its answer are one document",
          read_pair("data/qa") == [byte_ids(p + a) for p, a in pairs if p or a])
    check("1 for the answer and the end of it", read_mask("data/qa_mask") == [[0] * p + [1] * (a + 1) for p, a in count])
    check("documents without text are left out; the flags for the trainer",
          "document without text" in done.out or "documents without text" in done.out
          and "--train.mask_file data/qa_mask" in done.out, done.out)
    good("--mask with a validation set", "qa.jsonl", "-o", "data/qb", "--bytes", "--mask", "--val", "0.3")
    for name in ("data/qb", "data/qb_validation"):
        check(f"{name}: a mask as long as each document",
              list(map(len, read_pair(name))) == list(map(len, read_mask(name + "_mask"))))
    write("qa2.jsonl", "".join(lines.splitlines(True)[:2]))
    done = good("two of them", "qa2.jsonl", "-o", "data/qc", "--bytes", "--mask", "--val", "0.01", "--seed", "3")
    check("the last one's mask moves with it", read_mask("data/qc_validation_mask") == [[1] * 15] and
          "--train.validation_mask_file data/qc_validation_mask" in done.out, done.out)
    write("bad.jsonl", '{"prompt": "a"}\n')
    refused(2, 'bad.jsonl, line 1: expected an object with texts in the fields "prompt" and "answer".*', "bad.jsonl", "-o",
            "data/x", "--bytes", "--mask")
    refused(2, "--mask takes .jsonl alone.*", "a.txt", "-o", "data/x", "--bytes", "--mask")
    check("nothing is left of these", not [f for f in os.listdir("data") if f.startswith("x")] and not leftovers("data"))


def test_inputs():
    print("-- inputs")
    rows = ["one", "zwei \u00fc", "\u4e09\n\u4e09", "4 \U0001f426"]
    lines = "".join(json.dumps({"text": r, "other": r[::-1]}, ensure_ascii=i % 2) + "\n\n" for i, r in enumerate(rows))
    write("in/a.jsonl", lines)
    write("in/b.jsonl.gz", gzip.compress(lines.encode()))
    write("in/sub/c.txt", "text")
    write("in/sub/picture.png", b"\xff\xd8")
    good("a folder", "in", "-o", "data/in", "--bytes", "--val", "0")
    expected = [byte_ids(r) for r in rows]
    check("documents of all files in it", read_pair("data/in") == expected * 2 + [byte_ids("text")])
    good("--field", "in/a.jsonl", "-o", "data/other", "--bytes", "--val", "0", "--field", "other")
    check("takes it", read_pair("data/other") == [byte_ids(r[::-1]) for r in rows])
    good("jsonl from standard input", "-", "--format", "jsonl", "-o", "data/f", "--bytes", "--val", "0", stdin=lines.encode())
    check("documents", read_pair("data/f") == expected)

    write("crlf.txt", "\ufeffone\r\ntwo\rthree\r\n\r")
    done = good("a text with carriage returns and a byte order mark", "crlf.txt", "-o", "data/crlf", "--bytes", "--val", "0")
    check("leaves them out", read_pair("data/crlf") == [byte_ids("one\ntwo\rthree\n\r")])
    check("and says so", "left out: 1 byte order mark, 2 carriage returns" in done.out, done.out)
    write("crlf.txt", "x" * (prepro_minipile.BLOCK - 1) + "\r\n" + "y" * (5 << 20) + "\r\n" * 9)
    good("where a block ends between the two", "crlf.txt", "-o", "data/crlf", "--bytes", "--val", "0", "--force")
    check("too", read_pair("data/crlf") == [byte_ids("x" * (prepro_minipile.BLOCK - 1) + "\n" + "y" * (5 << 20) + "\n" * 9)])
    write("pointer.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    refused(2, "pointer.txt: expected the file itself, found a pointer of Git LFS to it: `git lfs pull` brings it",
            "pointer.txt", "-o", "data/x", "--bytes")

    bad = ['{"text": "good"}', '{"text": "cut', '{"text": 5}', '["text"]', '{"txt": "a"}', '{"text": "\\ud800"}', "\xff"]
    write("bad.jsonl", "\n".join(bad[:6]).encode() + b'\n{"text": "\xff"}\n{"text": "also good"}\n')
    for i, (line, why) in enumerate(zip(bad, ("", "broken JSON: .*", *['expected an object with a text .*"text"'] * 3,
                                              "half of a surrogate pair.*", ""))):
        if why:
            write("line.jsonl", f'{{"text": "x"}}\n{line}\n')
            refused(2, rf"line.jsonl, line 2: {why} \(--skip-bad .*\)", "line.jsonl", "-o", "data/x", "--bytes")
    done = good("--skip-bad", "bad.jsonl", "-o", "data/bad", "--bytes", "--val", "0", "--skip-bad")
    check("leaves them out", read_pair("data/bad") == [byte_ids("good"), byte_ids("also good")])
    check("and counts", "left out: 6 broken records" in done.out, done.out)
    write("empty.txt", "")
    refused(2, "no document has any text in it: nothing to write", "empty.txt", "-o", "data/x", "--bytes")
    refused(2, "nowhere.txt: No such file or folder", "nowhere.txt", "-o", "data/x", "--bytes")
    os.makedirs("bare", exist_ok=True)
    refused(2, "bare: the folder holds no .txt, .jsonl or .parquet", "bare", "-o", "data/x", "--bytes")
    write("cut.txt.gz", gzip.compress(random.Random(2).randbytes(99999).hex().encode())[:5000])
    refused(2, "cut.txt.gz: broken compressed data: .*", "cut.txt.gz", "-o", "data/x", "--bytes")
    refused(2, "FILE needs -o PREFIX, as in -o data/mine", "a.txt", "--bytes")
    check("nothing is left of what was refused", not leftovers("data") and not os.path.exists("data/x.bin"),
          os.listdir("data"))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    refused(1, "data/x.*: File too large", "long.txt", "-o", "data/x", "--bytes", preexec_fn=limit)
    check("nothing is left of that either", not leftovers("data") and not os.path.exists("data/x.bin"))
    with open("sparse.txt", "wb") as f:
        f.truncate(shutil.disk_usage(".").free)
    refused(1, r"data/x.bin: needs .*B of disk, .*B are free", "sparse.txt", "-o", "data/x", "--bytes")


def peak_memory(*args, python=None):
    process = subprocess.Popen([*(python or BARE), SCRIPT, *args], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    return usage.ru_maxrss / 1024 if status == 0 else 1e9


def test_memory():
    print("-- memory")
    line = b"the same sentence again and again, until the file is long enough. "
    write("small.txt", line * (4_000_000 // len(line)))
    write("large.txt", line * (64_000_000 // len(line)))
    small, large = (peak_memory(f, "-o", "data/mem", "--bytes", "--force") for f in ("small.txt", "large.txt"))
    check(f"bytes: 4 MB in one line: {small:.0f} MB, 64 MB: {large:.0f} MB", large < small + 16)
    write("small.jsonl", b'{"text": "x"}\n' * 50_000)
    write("large.jsonl", b'{"text": "x"}\n' * 500_000)
    small, large = (peak_memory(f, "-o", "data/mem", "--bytes", "--force") for f in ("small.jsonl", "large.jsonl"))
    check(f"bytes: 50,000 documents: {small:.0f} MB, 500,000: {large:.0f} MB", large < small + 16)
    os.unlink("large.txt")


def test_check():
    print("-- --check")
    documents = [byte_ids(f"document {i}") for i in range(5)]
    tokens, idx = pair_bytes(documents)

    def damaged(pattern, new_idx=idx, new_tokens=tokens):
        write("data/d.bin", new_tokens)
        write("data/d.idx", new_idx)
        refused(2, pattern, "--check", "data/d")

    def patched(data, at, new):
        return data[:at] + new + data[at + len(new):]
    size, n = len(documents[0]), 5
    damaged("data/d.idx: size: expected 42 or more, found 20", idx[:20])
    damaged("data/d.idx: size: expected 142, found 141", idx[:-1])
    damaged("data/d.idx: magic: expected MMIDIDX, found .*", b"x" + idx[1:])
    damaged("data/d.idx: version: expected 1, found 2", patched(idx, 9, b"\2"))
    damaged("data/d.idx: data type: expected 1, 2, 3, 4, 5 or 8, found 7", patched(idx, 17, b"\7"))
    damaged("data/d.idx: size: expected 154, found 142", patched(idx, 18, b"\6"))
    damaged("data/d.idx: document marks: expected 1 or more, found 0", patched(idx, 26, b"\0"))
    damaged(r"data/d.idx: sizes\[1\]: expected 0 or more, found -1", patched(idx, 38, b"\xff" * 4))
    damaged(rf"data/d.idx: offsets\[1\]: expected {2 * size}, found 1", patched(idx, 34 + 4 * n + 8, b"\1\0"))
    damaged(r"data/d.idx: documents\[1\]: expected 0 to 5, found 9", patched(idx, 34 + 12 * n + 8, b"\x09"))
    damaged(f"data/d.bin: size: expected {len(tokens)}, found {len(tokens) - 2}", idx, tokens[:-2])
    damaged(r"data/d.bin: token\[3\]: expected 0 to 65529, found 65530", idx, patched(tokens, 6, b"\xfa\xff"))
    damaged(f"data/d.bin: document 0: expected a 0 at its end, found 7 .token {size - 1}.", idx,
            patched(tokens, 2 * size - 2, b"\7"))
    damaged("data/d.bin: no tokens", pair_bytes([])[1], b"")
    def marked(marks, documents=documents, letter="H", code=8):         # as Megatron and gpt-neox mark documents
        ids = b"".join(struct.pack(f"<{len(d)}{letter}", *d) for d in documents)
        sizes, width = [len(d) for d in documents], struct.calcsize(letter)
        offsets = [width * sum(sizes[:i]) for i in range(len(sizes))]
        write("data/m.bin", ids)
        write("data/m.idx", MAGIC + struct.pack("<QBQQ", 1, code, len(sizes), len(marks)) + struct.pack(
            f"<{len(sizes)}i{len(sizes)}q{len(marks)}q", *sizes, *offsets, *marks))
    MAGIC = b"MMIDIDX\0\0"
    marked([0, 2, 5])
    done = good("documents of several sequences", "--check", "data/m")
    check("are counted", "data/m: 55 tokens in 2 documents; u16" in done.out, done.out)
    marked([0, 1, 1, 5])
    done = good("an empty document", "--check", "data/m")
    check("is told of", "in 3 documents, 1 of them empty" in done.out and "document 1, 0 tokens: ''" in done.out, done.out)
    marked([0])
    refused(2, "data/m.idx: documents: expected marks up to the last sequence, 5, found them to end at 0", "--check", "data/m")
    marked(range(6), letter="i", code=4)
    done = good("tokens of 32 bits", "--check", "data/m")
    check("are called i32", "; i32, ids 0 to" in done.out, done.out)

    write("data/d.bin", tokens)
    write("data/d.idx", idx)
    for command, want in (("head -1", 0), ("true", 0)):
        done = subprocess.run(f"{sys.executable} {SCRIPT} --check data/d 2>err.txt | {command}; exit ${{PIPESTATUS[0]}}", shell=True,
                              executable="/bin/bash", capture_output=True, env={**os.environ, "PYTHONPATH": ""})
        check(f"| {command}: no fault of the data's", done.returncode == want and not read("err.txt"), read("err.txt"))
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*BARE, SCRIPT, "--check", "data/d"], stdout=full, stderr=subprocess.PIPE)
    check("to a full disk", done.returncode == 1 and done.stderr ==
          b"prepro_minipile.py: standard output: No space left on device\n", done.stderr)
    refused(2, "data/nothing.idx: No such file or directory", "--check", "data/nothing")
    write("data/d.bin", tokens)
    write("data/d.idx", idx[:-1])
    refused(2, "data/d.bin and data/d.idx: there, but no valid pair: .*--force replaces it.", "a.txt", "-o", "data/d",
            "--bytes")
    for name in ("sample.bin", "sample.idx"):
        shutil.copy(os.path.join(GOLDEN, name), "data")
    done = good("a pair written by the reference", "--check", "data/sample")
    check("counts", "data/sample: 322 tokens in 43 documents; u16, ids 0 to" in done.out, done.out)
    with open(os.path.join(GOLDEN, "sampler.txt")) as f:
        cases = [line.split() for line in f if line.strip()]
    check(f"magic primes of {len(cases)} data sets",
          all(prepro_minipile.magic_prime(int(c[1]), int(c[3])) == int(c[5]) for c in cases))


# ---------------------------------------- kills

CRASH = """
import os, signal, sys
sys.path.insert(0, {root!r})
import prepro_minipile
left = int(sys.argv.pop(1))
def dying(call):
    def wrapped(*args):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args)
    return wrapped
os.replace, os.unlink = dying(os.replace), dying(os.unlink)
prepro_minipile.main()
"""


def finals_valid(prefixes):
    """Whether --check takes every file under its final name; None if it does not."""
    for prefix in prefixes:
        if any(os.path.exists(prefix + ending) for ending in (".bin", ".idx")):
            done = run("--check", prefix)
            if done.returncode != 0:
                return f"{prefix}: {done.err}{os.listdir('data')}"
    return None


def test_crash_points():
    print("-- kill -9 at every rename and removal")
    old, new = [f"old {i}" for i in range(9)], [f"new {i}" for i in range(7)]
    for name, rows in (("old", old), ("new", new)):
        write(name + ".jsonl", "".join(json.dumps({"text": r}) + "\n" for r in rows))
    wrong, k, finished = [], 0, False
    while not finished and k < 40:
        shutil.rmtree("crash", ignore_errors=True)
        run("old.jsonl", "-o", "crash/p", "--bytes", "--val", "0.3")
        before = read_pair("crash/p") + read_pair("crash/p_validation")
        done = subprocess.run([*BARE, "-c", CRASH.format(root=ROOT), str(k), "new.jsonl", "-o", "crash/p", "--bytes",
                               "--val", "0.3", "--force"], capture_output=True)
        finished, k = done.returncode == 0, k + 1
        for prefix in ("crash/p", "crash/p_validation"):
            checked = run("--check", prefix)
            documents = read_pair(prefix) if checked.returncode == 0 else []
            if not documents or not (all(d in before for d in documents) or all(byte_ids(n) or d in map(byte_ids, new)
                                                                               for n, d in zip(new, documents))):
                wrong.append(f"after {k - 1}: {prefix}: {checked.err}")
        again = run("new.jsonl", "-o", "crash/p", "--bytes", "--val", "0.3", "--force")
        if again.returncode != 0 or leftovers("crash"):
            wrong.append(f"after {k - 1}: {again.err} {leftovers('crash')}")
    check(f"{k - 1} points: --check takes both pairs, old or new", finished and k > 6 and not wrong, "\n".join(wrong))


def test_kills(python):
    with_vocabulary = python is not None
    what = "the tokenizer's processes" if with_vocabulary else "byte-level ids"
    print(f"-- kill -9 at random moments: {what}")
    rng, kills, wrong, present, killed = random.Random(3), 10, [], 0, 0
    words = [bytes(rng.choices(b"abcdefghij", k=rng.randint(1, 9))) for _ in range(1000)]
    size = 6_000_000 if with_vocabulary else 20_000_000
    documents = (b" ".join(rng.choices(words, k=30000)) for _ in range(50))
    text = b"\n\n".join(documents)
    write("kill.txt", (text * (size // len(text) + 1))[:size])
    args = ["kill.txt", "-o", "data/kill", "--val", "0.1", "--split", r"\n\n", "--force"]
    args += [] if with_vocabulary else ["--bytes"]
    begin = time.time()
    run(*args, python=python)
    whole = time.time() - begin
    for prefix in ("data/kill", "data/kill_validation"):
        for ending in (".bin", ".idx"):
            os.unlink(prefix + ending)
    for i in range(kills):
        process = subprocess.Popen([*(python or BARE), SCRIPT, *args], stdout=subprocess.DEVNULL, start_new_session=True)
        time.sleep(rng.uniform(0, 1.1 * whole))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        failure = finals_valid(["data/kill", "data/kill_validation"])
        wrong += [failure] if failure else []
        present += os.path.exists("data/kill.idx")
    for _ in range(100):                                # the tokenizers notice it within a moment, on a busy machine a long one
        alive = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout if shutil.which("pgrep") else b""
        if not alive:
            break
        time.sleep(0.1)
    check(f"{kills} kills ({killed} before the end, {present} times with a pair there): --check took all there was",
          not wrong, "\n".join(wrong))
    check("no process stays behind", not alive, alive)
    done = run(*args, python=python)
    check("then it runs through, and nothing is left over", done.returncode == 0 and not leftovers("data"), done.err)


# ---------------------------------------- downloads

class Corpus(http.server.BaseHTTPRequestHandler):
    """minipile.bin and .idx where the host has them: first a redirect with the file's hash, then the file."""
    files, log = {}, []                                 # {ending: bytes}; [(ending, Range)]
    breaks, errors, delay, extra = {}, {}, 0, 0         # bytes to send before breaking off; statuses to answer with
    ranges = hashes = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        ending = self.path[-4:]
        at_host = self.path == f"/{prepro_minipile.TOKENIZED}{ending}"
        data = self.files.get(ending)
        if data is None or not (at_host or self.path.startswith("/cdn/")):
            self.send_error(404)
            return
        if at_host:
            self.send_response(302)
            self.send_header("Location", f"/cdn/file{ending}")
            if self.hashes:
                self.send_header("X-Linked-ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.end_headers()
            return
        wanted = self.headers.get("Range")
        self.log.append((ending, wanted))
        if self.errors.get(ending):
            self.send_error(self.errors[ending].pop(0))
            return
        begin = int(wanted[6:-1]) if wanted and self.ranges else 0
        if begin >= len(data) and begin > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
            return
        self.send_response(206 if wanted and self.ranges else 200)
        if wanted and self.ranges:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin + self.extra * (ending == ".bin")))
        self.end_headers()
        end = len(data)
        if self.breaks.get(ending):
            end = min(end, begin + self.breaks[ending].pop(0))
        try:
            for at in range(begin, end, 1 << 16):
                self.wfile.write(data[at:min(at + (1 << 16), end)])
                time.sleep(self.delay)
        except OSError:
            pass


DATASETS = """
def load_dataset(name, split=None, streaming=False):
    assert name == "JeanKaddour/minipile"
    import os
    if os.environ.get("NO_NETWORK"):
        raise ConnectionError("Couldn't reach the Hub\\nwith details")
    return [{"text": f"validation text {i}"} for i in range(20 if split == "validation" else 500)]
"""
TOKENIZER = """
class RWKVTokenizer:
    def encode(self, text):
        return [b + 1 for b in text.encode()]
"""


def test_fetch():
    print("-- the corpus, from a server on this machine")
    write("stubs/datasets.py", DATASETS)                # in place of the packages
    write("stubs/pyrwkv_tokenizer.py", TOKENIZER)
    rng = random.Random(4)
    documents = [[rng.randint(1, 65529) for _ in range(rng.randint(1, 9000))] + [0] for _ in range(300)]
    tokens, idx = pair_bytes(documents)
    Corpus.files = {".bin": tokens, ".idx": idx}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Corpus)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "PYTHONPATH": os.path.abspath("stubs"),
           "no_proxy": "127.0.0.1"}
    url = f"http://127.0.0.1:{server.server_port}/{prepro_minipile.TOKENIZED}"

    def reset(keep=False):
        Corpus.breaks, Corpus.errors, Corpus.delay, Corpus.extra, Corpus.log[:] = {}, {}, 0, 0, []
        Corpus.ranges = Corpus.hashes = True
        Corpus.files = {".bin": tokens, ".idx": idx}
        for ending in () if keep else (".bin", ".idx", ".bin.part", ".idx.part"):
            prepro_minipile.remove("data/minipile" + ending)

    def same():
        return read("data/minipile.bin") == tokens and read("data/minipile.idx") == idx and not leftovers("data")
    reset()
    done = good("no arguments", env=env)
    check("the training set as it is on the host", same())
    check("the validation set from the raw data set", read_pair("data/minipile_validation") == list(map(byte_ids, RAW_ROWS)))
    check("as counted", f"data/minipile: {len(tokens) // 2:,} tokens in 300 documents: fetched" in done.out, done.out)
    Corpus.log.clear()
    done = good("a second run", env=env)
    check("finds both there, and fetches nothing", done.out.count("there already, and whole") == 2 and not Corpus.log,
          done.out)
    reset()
    Corpus.breaks = {".bin": [1_000_000, 700_000], ".idx": [100]}
    good("three broken connections", env=env)
    ranges = [r for e, r in Corpus.log if e == ".bin"]
    check("go on where they broke off", same() and ranges == [None, "bytes=1000000-", "bytes=1700000-"], Corpus.log)
    reset()
    Corpus.breaks = {".bin": [1_000_000] + [0] * 4}
    refused(1, rf"{url}.bin: broke off at byte 1,000,000 of .* \(run it again to go on from there\)", env=env)
    check("nothing under the final name", not os.path.exists("data/minipile.bin"))
    reset(keep=True)
    good("the next run", env=env)
    check("goes on from there", same() and Corpus.log == [(".idx", f"bytes={len(idx)}-"), (".bin", "bytes=1000000-")],
          Corpus.log)
    reset()
    Corpus.breaks, Corpus.ranges = {".bin": [1_000_000]}, False
    good("a host that knows no ranges", env=env)
    check("sends all of it again", same())
    reset()
    Corpus.errors = {".bin": [500, 503, 429]}
    good("a host that is busy three times", env=env)
    check("is asked again", same() and len(Corpus.log) == 5, Corpus.log)
    for code in (404, 403):
        reset()
        Corpus.errors = {".bin": [code]}
        refused(1, rf"{url}.bin: {code} .*", env=env)
    reset()
    Corpus.files = {".idx": idx}
    refused(1, rf"{url}.bin: 404 Not Found", env=env)
    reset()
    Corpus.files = {".bin": tokens[:-2], ".idx": idx}
    refused(1, rf"{url}.bin: size: expected {len(tokens)}, found {len(tokens) - 2}", env=env)
    reset(keep=True)
    good("and when the host has it right again", env=env)
    check("it is fetched", same())
    reset()
    Corpus.extra = 1000
    refused(1, rf"{url}.bin: size: expected {len(tokens)}, found {len(tokens) + 1000}", env=env)
    reset()
    Corpus.files = {".bin": tokens, ".idx": idx[:-5]}
    refused(1, rf"data/minipile.idx.part: size: expected {len(idx)}, found {len(idx) - 5}", env=env)
    reset()
    Corpus.files, Corpus.hashes = {".bin": tokens[:-2] + b"\5\0", ".idx": idx}, False
    refused(1, r"data/minipile.bin.part: document 299: expected a 0 at its end, found 5 .*", env=env)
    check("nothing of that is kept", not leftovers("data") and not os.path.exists("data/minipile.bin"))
    reset()
    write("data/minipile.bin.part", b"\1" * 1000)       # of another file
    refused(1, rf"{url}.bin: SHA-256: expected .*, found .*", env=env)
    reset(keep=True)
    good("then it is fetched anew", env=env)
    check("and right", same())
    reset()
    write("data/minipile.bin.part", tokens + b"more")
    good("a part that is too long", env=env)
    check("is fetched anew", same())
    reset()
    n, free = 4000, shutil.disk_usage(".").free
    Corpus.files[".idx"] = (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, n, n + 1)
                            + struct.pack(f"<{n}i", *[2**31 - 1] * n)
                            + struct.pack(f"<{n}q", *range(0, n * (2**32 - 2), 2**32 - 2))
                            + struct.pack(f"<{n + 1}q", *range(n + 1)))
    Corpus.extra = n * (2**32 - 2) - len(tokens)
    if free < n * 2**32:
        refused(1, r"data/minipile.bin.part: needs 17.2 TB of disk, .* are free", env=env)
    reset()
    good("--retokenize", "--retokenize", "--force", env=env)
    check("the training set from the raw data set", len(read_pair("data/minipile")) == 500 and not Corpus.log)
    check("the validation set is there too", len(read_pair("data/minipile_validation")) == 20)
    shutil.rmtree("data/none", ignore_errors=True)
    refused(1, r"JeanKaddour/minipile, validation: ConnectionError: Couldn't reach the Hub", "-o", "data/none/x",
            env={**env, "NO_NETWORK": "1"})
    refused(1, r"http://127.0.0.1:9/.*minipile.idx: .*refused.* \(run it again .*\)", "-o", "data/none/x",
            env={**env, "HF_ENDPOINT": "http://127.0.0.1:9"})

    print("-- kill -9 at random moments of a download")
    reset()
    Corpus.delay, kills, wrong, killed = 0.015, 10, [], 0
    for i in range(kills):
        process = subprocess.Popen([*BARE, SCRIPT, "-o", "data/minipile"], stdout=subprocess.DEVNULL,
                                   env={**os.environ, **env})
        requests = len(Corpus.log)
        for _ in range(500 if i % 2 else 0):                    # every other time while tokens come, on a busy machine too
            if any(e == ".bin" for e, _ in Corpus.log[requests:]):
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0.05, 0.4))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        failure = finals_valid(["data/minipile", "data/minipile_validation"])
        wrong += [failure] if failure else []
    check(f"{kills} kills ({killed} before the end): --check took all there was", not wrong, "\n".join(wrong))
    Corpus.delay = 0
    good("then it runs through", env=env)
    begins = [int(r[6:-1]) if r else 0 for e, r in Corpus.log if e == ".bin"]       # "bytes=1048576-"
    check("and no request went back behind one before", same() and begins == sorted(begins) and begins[-1] > 0, Corpus.log)
    server.shutdown()


# ---------------------------------------- with packages

class PlainTokenizer:
    """The longest token that fits, from the left, in plain Python: an oracle that shares nothing with the package."""

    def __init__(self, path):
        import ast
        self.by_start = {}
        with open(path, encoding="utf-8", newline="\n") as f:
            for line in f:
                number, rest = line.rstrip("\n").split(" ", 1)
                token = ast.literal_eval(rest.rsplit(" ", 1)[0])
                token = token.encode() if isinstance(token, str) else token
                self.by_start.setdefault(token[:2], []).append((token, int(number)))
        for tokens in self.by_start.values():
            tokens.sort(key=lambda t: -len(t[0]))

    def encode(self, text):
        out = []
        for i, part in enumerate(text.split(b"<|endoftext|>")):
            out += [0] if i else []
            at = 0
            while at < len(part):
                for token, number in self.by_start.get(part[at:at + 2], ()):
                    if part.startswith(token, at):
                        break
                else:
                    token, number = self.by_start[part[at:at + 1]][0]
                out.append(number)
                at += len(token)
        return out


def mixed_text(rng, size):
    """Random text of many scripts, with runs of spaces and line ends, digits, and pieces of the special token."""
    scripts = [(0x20, 0x7E), (0x61, 0x7A), (0xA1, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x621, 0x64A),
               (0x905, 0x939), (0xE01, 0xE3A), (0x3041, 0x30FE), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F),
               (0x0, 0x1F), (0x2000, 0x206F)]
    out, length = [], 0
    while length < size:
        low, high = rng.choice(scripts)
        kind = rng.random()
        text = ("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 20))) if kind < 0.6
                else rng.choice((" the", " and", "\n\n", "  ", "\t", "return ", "\u7684", "\u3002")) * rng.randint(1, 9)
                if kind < 0.85 else rng.choice(("<|endoftext|>", "<|endof", "|>", "<|")) if kind < 0.9
                else str(rng.randrange(10 ** rng.randint(1, 12))))
        out.append(text)
        length += len(text.encode())
    return "".join(out).encode()


def test_tokenizer(python, shakespeare):
    print("-- the tokenizer")
    with open(os.path.join(GOLDEN, "tokenizer.jsonl")) as f:
        cases = [json.loads(line) for line in f]
    texts = [bytes.fromhex(c["hex"]).decode() for c in cases]
    write("cases.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))
    done = good("all cases of tokenizer.jsonl", "cases.jsonl", "-o", "data/cases", "--val", "0", python=python)
    check("have the expected ids", read_pair("data/cases") == [c["ids"] + [0] for c in cases if c["ids"]], done.out)
    check("the same bytes as the reference's writer", all(
        read("data/cases" + e) == read(os.path.join(GOLDEN, "sample" + e)) for e in (".bin", ".idx")))
    vocabulary = os.path.join("data", prepro_minipile.VOCABULARY)
    check("the vocabulary is written", os.path.exists(vocabulary) and read(vocabulary).count(b"\n") == 65529
          and b"\r" not in read(vocabulary))
    write("ends.txt", "one<|endoftext|>two <|endoftext|>")
    done = good("<|endoftext|> in a text", "ends.txt", "-o", "data/ends", "--val", "0", python=python)
    check("is counted", "<|endoftext|> stands in the text 2 times: it became token 0" in done.out, done.out)
    before = read(vocabulary)
    os.unlink(vocabulary)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
    refused(1, "data/ends: File too large", "ends.txt", "-o", "data/ends", "--val", "0", "--force", python=python,
            preexec_fn=limit)
    check("of a vocabulary that does not fit the disk nothing stays", not os.path.exists(vocabulary) and not leftovers("data"))
    write(vocabulary, before)
    plain = PlainTokenizer(vocabulary)
    check("a tokenizer in plain Python agrees on them", all(plain.encode(t.encode()) == c["ids"]
                                                            for t, c in zip(texts, cases)))
    rng = random.Random(5)
    mixed = mixed_text(rng, 1_200_000)
    hard = (b" " * 700_001 + b"\n" * 600_003 + "\u3042".encode() * 250_000 + b"ACGT" * 150_000
            + b"x<|endoftext|>" * 40_000 + b"=" * 600_000)
    for name, text in (("mixed", mixed), ("hard", hard)):
        write(name + ".txt", text)
        good(f"{len(text) / 1e6:.1f} MB of {name} text", name + ".txt", "-o", "data/" + name, python=python)
        check("as in plain Python: no cut changes a token", read_pair("data/" + name) == [
            plain.encode(text.replace(b"\r\n", b"\n")) + [0]])
    write("mixed.jsonl", "".join(json.dumps({"text": mixed[i:i + 5000].decode(errors="replace")}) + "\n"
                                 for i in range(0, len(mixed), 5000)))
    hashes = set()
    for processes in (1, 2, 3):
        run("mixed.jsonl", "mixed.txt", "hard.txt", "-o", "data/p", "--val", "0.2", "--processes", processes, "--force",
            python=python)
        hashes.add(hashlib.sha256(b"".join(read(f"data/p{v}{e}") for v in ("", "_validation") for e in (".bin", ".idx")))
                   .hexdigest())
    check("1, 2 and 3 processes write the same bytes", len(hashes) == 1)
    done = run("--check", "data/p", python=python)
    check("--check", done.returncode == 0 and done.out.endswith("data/p: valid\n"), done.out + done.err)

    lines = ["good line", "sn\u00f6w", "third"]
    broken = "\n".join(lines).encode().replace(b"w", b"w\xff")
    write("broken.txt", broken)
    refused(2, r"broken.txt, line 2: broken UTF-8: byte 0xff, .* \(--skip-bad .*\)", "broken.txt", "-o", "data/x",
            python=python)
    good("--skip-bad", "broken.txt", "-o", "data/broken", "--skip-bad", python=python)
    check("leaves that line out", read_pair("data/broken") == [plain.encode(b"good line\nthird") + [0]])
    write("cut.txt", b"a" * (3 << 20) + "\u2603".encode()[:2])
    refused(2, r"cut.txt, line 1: broken UTF-8: byte 0xe2, .*", "cut.txt", "-o", "data/x", python=python)
    small, large = (peak_memory(f, "-o", "data/mem", "--force", "--processes", "2", python=python)
                    for f in ("mixed.txt", "kill.txt"))
    check(f"memory of the first process: 1 MB of text: {small:.0f} MB, 6 MB: {large:.0f} MB", large < small + 24)

    if shakespeare:
        with open(os.path.join(GOLDEN, "tinyshakespeare.txt")) as f:
            expected = {line.split()[0]: line.split()[1:] for line in f}
        good("tinyshakespeare.txt", shakespeare, "-o", "data/mine", python=python)
        ids = read("data/mine.bin")
        check("count, hash, one closing 0, one document", len(read_pair("data/mine")) == 1 and ids[-2:] == b"\0\0"
              and len(ids) == 2 * int(expected["tokens"][0]) + 2 and not os.path.exists("data/mine_validation.bin")
              and f"{fnv1a64(ids[:-2]):016x}" == expected["fnv1a64_of_little_endian_uint16"][0])
        check("first ids", list(array.array("H", ids[:60])) == list(map(int, expected["first"][:30])))
    else:
        skip("tinyshakespeare.txt", "not given")


def test_zst(python):
    print("-- .zst")
    text = read("in/a.jsonl")
    make = "import sys, zstandard as z; d = sys.stdin.buffer.read(); c = z.ZstdCompressor().compress; " \
           "sys.stdout.buffer.write(c(d[:50]) + c(d[50:]))"
    data = subprocess.run([*python, "-c", make], input=text, capture_output=True).stdout
    write("z.jsonl.zst", data)
    good("two frames", "z.jsonl.zst", "-o", "data/z", "--bytes", "--val", "0", python=python)
    check("the documents of the .jsonl", read_pair("data/z") == read_pair("data/f"))
    write("z.jsonl.zst", data[:-20])
    refused(2, "z.jsonl.zst: broken compressed data: it ends in the middle", "z.jsonl.zst", "-o", "data/x", "--bytes",
            python=python)
    refused(2, "the Python package zstandard is missing: .*", "z.jsonl.zst", "-o", "data/x", "--bytes")


def test_parquet(python):
    print("-- .parquet")
    make = "import sys, json, pyarrow as p, pyarrow.parquet as q; rows = [json.loads(r)['text'] for r in sys.stdin if " \
           "r.strip()]; q.write_table(p.table({'text': rows + [None] * int(sys.argv[2])}), sys.argv[1], row_group_size=3)"
    for name, nothing in (("q.parquet", "0"), ("null.parquet", "1")):
        subprocess.run([*python, "-c", make, name, nothing], input=read("in/a.jsonl"), check=True)
    good("rows", "q.parquet", "-o", "data/q", "--bytes", "--val", "0", python=python)
    check("the documents of the .jsonl", read_pair("data/q") == read_pair("data/f"))
    refused(2, r'null.parquet, row 5: expected a text in the field "text" .*', "null.parquet", "-o", "data/x", "--bytes",
            python=python)
    refused(2, r'q.parquet: no field "body" \(--field\), only text', "q.parquet", "-o", "data/x", "--bytes", "--field",
            "body", python=python)
    make = "import pyarrow as p, pyarrow.parquet as q; q.write_table(p.table({'a': [{'b': 'no'}], 'a.b': ['yes']}), 's.parquet')"
    subprocess.run([*python, "-c", make], check=True)
    good("a column whose name reads like a struct's field", "s.parquet", "-o", "data/dotted", "--bytes", "--val", "0", "--field",
         "a.b", python=python)
    check("is taken by its name", read_pair("data/dotted") == [byte_ids("yes")])
    write("cut.parquet", read("q.parquet")[:-9])
    refused(2, "cut.parquet: .+", "cut.parquet", "-o", "data/x", "--bytes", python=python)


def test_plot(python):
    print("-- dev/plot.py")
    for name, batch in (("runs/a", 1024), ("runs/b", 4096)):
        rows = "".join(f"{s},{s * batch},{10 / s + 2},{f'{10 / s + 2.1}' if s % 10 == 0 else ''},1.5,1e-3,9,9,\n"
                       for s in range(1, 101))
        write(name + "/log.csv", "step,tokens,loss,val_loss,norm,lr,ms,tok_s,peak\n" + rows + "101,1")
    write("runs/none.csv", "step,tokens\n")

    def plot(*args):
        return subprocess.run([*python, PLOT, *args], capture_output=True, text=True)
    done = plot("runs/a/log.csv", "runs/b/log.csv", "-o", "loss.png")
    check("a picture of two runs", done.returncode == 0 and read("loss.png")[:8] == b"\x89PNG\r\n\x1a\n", done.stderr)
    width, height = struct.unpack(">II", read("loss.png")[16:24])
    check("of a readable size", width >= 1000 and height >= 800, (width, height))
    done = plot("runs/a/log.csv", "runs/b/log.csv", "-o", "loss.svg")
    check("a vector picture", done.returncode == 0 and b"<svg" in read("loss.svg"), done.stderr)
    done = plot("runs/none.csv")
    check("another table is refused in a line", done.returncode == 1
          and done.stderr == "plot.py: runs/none.csv: no column loss: expected the log.csv of a run\n", done.stderr)
    done = plot("runs/nowhere.csv")
    check("and no table too", done.stderr == "plot.py: runs/nowhere.csv: No such file or directory\n", done.stderr)


def test_trainer():
    program = os.path.join(ROOT, "train_goldfinch")
    if not os.path.exists(program):
        skip("the trainer reads what we write", "./train_goldfinch is not built")
        return
    print("-- the trainer")
    model = {"model.n_layer": 3, "model.n_embd": 64, "model.ctx_len": 32, "model.vocab_size": 320, "train.out": "run",
             "model.kv_cache_compression_ratio": 8, "train.micro_bsz": 2, "train.max_steps": 2, "train.sample_every": -1,
             "train.my_exit_tokens": 100000, "train.data_file": "data/v", "train.warmup_steps": 1,
             "train.validation_data_file": "data/v_validation"}
    done = subprocess.run([program, *(str(x) for k, v in model.items() for x in ("--" + k, v))], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    tokens = sum(map(len, read_pair("data/v")))
    check("the trainer trains on a pair of ours", done.returncode == 0, done.stdout + done.stderr)
    prime = prepro_minipile.magic_prime(tokens, 32)
    masked = {**model, "train.data_file": "data/qb", "train.validation_data_file": "data/qb_validation", "train.out": "masked",
              "train.mask_file": "data/qb_mask", "train.validation_mask_file": "data/qb_validation_mask",
              "train.val_batches": 20}                                  # of 2 sequences

    def train(**more):
        settings = {**masked, **{"train." + k: v for k, v in more.items()}}
        return subprocess.run([program, *(str(x) for k, v in settings.items() for x in ("--" + k, v))], capture_output=True,
                              text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    again, mask = train(), [d for d in read_mask("data/qb_validation_mask")]
    flat = sum(mask, [])
    counted = sum(sum(flat[at + 1:at + 33]) for at in range(0, min(len(flat) // 33, 40) * 33, 33))
    check("and with a mask: the targets that count", again.returncode == 0 and f" {counted} tokens, " in again.stdout,
          again.stdout + again.stderr)
    index = read("data/qb.idx")                                         # all tokens count: the bits of no mask
    n, = struct.unpack_from("<Q", index, 18)
    sizes = struct.unpack_from(f"<{n}i", index, 34)
    write("data/ones.bin", b"\1" * sum(sizes))
    write("data/ones.idx", index[:17] + b"\1" + index[18:34 + 4 * n] + struct.pack(f"<{n}q", *(sum(sizes[:i]) for i in range(n)))
          + index[34 + 12 * n:])
    ones = train(mask_file="data/ones", out="ones", validation_mask_file="")
    none = train(mask_file="", out="none", validation_mask_file="")

    def outcome(run):
        """Losses and norms, and the weights; the settings before these differ."""
        model = read(f"{run}/model_000002.safetensors")
        rows = [line.split(",")[:5] for line in read(f"{run}/log.csv").decode().splitlines()]
        return rows, model[8 + struct.unpack_from("<Q", model)[0]:]
    check("a mask of ones gives the bits of none", ones.returncode == none.returncode == 0 and outcome("ones") == outcome("none")
          and outcome("ones")[0] != outcome("masked")[0], ones.stderr + none.stderr)
    wrong = train(mask_file="data/qa_mask", out="wrong")
    check("a mask of another length is refused", wrong.returncode == 2 and
          "data/qa_mask.bin: tokens, as many as the data: expected" in wrong.stderr, wrong.stderr)
    wrong = train(mask_file="data/v", out="wrong")
    check("tokens are no mask", wrong.returncode == 2 and "data type, 1 for u8: expected 1" in wrong.stderr, wrong.stderr)
    check("counts and magic prime as here", f"{tokens} tokens in" in done.stdout and f"magic prime {prime}" in done.stdout,
          done.stdout)


def main():
    args = [a for a in sys.argv[1:] if a != "--offline"]
    shakespeare = args[0] if args else os.environ.get("TINYSHAKESPEARE")
    shakespeare = os.path.abspath(shakespeare) if shakespeare else None
    packages = find_packages("--offline" in sys.argv)
    begin = time.time()
    folder = tempfile.mkdtemp(prefix="goldfinch_prepro.")
    os.chdir(folder)
    try:
        for test in (test_bytes, test_validation, test_mask, test_inputs, test_memory, test_check, test_crash_points):
            test()
        test_kills(None)
        test_fetch()
        for package, tests in (("pyrwkv_tokenizer", (test_kills, lambda python: test_tokenizer(python, shakespeare))),
                               ("zstandard", (test_zst,)), ("pyarrow", (test_parquet,)), ("matplotlib", (test_plot,))):
            for test in tests:
                if package in packages:
                    test(packages[package])
                else:
                    skip(f"what needs {package}", "the package is not here")
        test_trainer()
    finally:
        os.chdir(ROOT)
        shutil.rmtree(folder)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped ({time.time() - begin:.0f} s)")
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
