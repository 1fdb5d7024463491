#!/usr/bin/env python3
"""Tests of ./infer_goldfinch --requests. The models' weights are those of the tables in dev/golden, so that sums of
logarithms can be held against losses which the authors' implementation found in float64. Needs nothing but Python.

  dev/test_requests.py [--program ./infer_goldfinch] [--bf16]     # --bf16: of a build that rounds to 8 bits
"""

import argparse
import array
import json
import math
import os
import random
import struct
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
V = 320                                                                 # of the tables
counts = {"passed": 0, "failed": 0}


def check(what, right, detail=""):
    counts["passed" if right else "failed"] += 1
    print(f"{'PASS' if right else 'FAIL'} {what}" + ("" if right else f"\n     | {str(detail)[:600]}"), flush=True)


# ---- a golden table's weights and tokens (dev/golden/README.md) ----

MASK = (1 << 64) - 1


def uniform(name, count):
    start = 0xCBF29CE484222325
    for byte in name.encode():
        start = (start ^ byte) * 0x100000001B3 & MASK
    for i in range(count):
        z = start + (i + 1) * 0x9E3779B97F4A7C15 & MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        yield ((z ^ z >> 31) >> 40) / 8388608 - 1


def weights(name, shape):
    last, size = name.split(".")[-1], math.prod(shape)
    low_rank = last.endswith(("_w1", "_w2"))
    if last == "bias":
        offset, scale = 0, 1 / 8
    elif last == "weight" and len(shape) == 1:
        offset, scale = 1, 1 / 4
    elif last.startswith("time_mix") or (last.startswith("time_maa") and not low_rank):
        offset, scale = 1 / 2, 1 / 2
    elif last == "time_decay":
        offset, scale = -3, 2
    elif last == "time_faaaa":
        offset, scale = 0, 1 / 2
    elif name == "emb.weight":
        offset, scale = 0, 1
    else:
        offset, scale = 0, 2.0 ** round(math.log2(math.sqrt(3 / (shape[-2] if low_rank else shape[-1]))))
    return array.array("f", (offset + scale * u for u in uniform(name, size)))


def golden_model(table, path):
    """Writes the table's model; returns its rows of T + 1 tokens and its mean loss."""
    settings, tensors, loss = {}, {}, 0.0
    for line in open(os.path.join(ROOT, "dev", "golden", f"{table}.txt"), encoding="utf-8"):
        words = line.split()
        if words[0] == "config":
            settings = dict(word.split("=", 1) for word in words[1:])
        elif words[0] == "loss":
            loss = float(words[1])
        elif words[0] == "grad":
            tensors[words[1]] = [int(n) for n in words[2].split("x")]
    for layer in range(int(settings["n_layer"])):                       # takes no part, and two tables leave it out
        if f"blocks.{layer}.att.time_maa_w1" in tensors and f"blocks.{layer}.att.time_decay" in tensors:
            tensors.setdefault(f"blocks.{layer}.att.time_faaaa", [int(settings["dim_att"]) // 64, 64])
    B, T = int(settings["B"]), int(settings["T"])
    header, data = {}, []
    for name, shape in tensors.items():
        begin = sum(map(len, data))
        data.append(weights(name, shape).tobytes())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + len(data[-1])]}
    text = json.dumps(header).encode()
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text + b"".join(data))
    rows = []
    for b in range(B):
        u = list(uniform("tokens:" + table, B * (T + 1)))[b * (T + 1):]
        row = [min(int((x + 1) / 2 * V), V - 1) for x in u[:T + 1]]
        for i in range(7, T + 1, 3):
            row[i] = row[i - 7]
        rows.append(row)
    return rows, loss


# ---- the program ----

def answers(lines, *flags, model):
    """Of all lines at once. lines: objects, or bytes as they stand."""
    text = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    done = subprocess.run([args.program, model, "--requests", "-", *flags], input=text, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr.decode(errors='replace')}")
    return [json.loads(line) for line in done.stdout.decode("utf-8").splitlines()]


def near(a, b, scale=1.0):
    return abs(a - b) <= (2e-2 if args.bf16 else 2e-5) * scale


def test_scores(model, rows, loss, table):
    lines = [{"id": b, "context_ids": row[:1], "continuation_ids": row[1:]} for b, row in enumerate(rows)]
    found = answers(lines, model=model)
    T = len(rows[0]) - 1
    mean = -sum(a["logprob"] for a in found) / (len(rows) * T)
    check(f"{table}: loss of the golden table", near(mean, loss) and [a["tokens"] for a in found] == [T] * len(rows),
          f"{mean} for {loss}")
    prefixed = answers([{"text_ids": row[1:]} for row in rows], "--prefix-ids", f"{rows[0][0]}", model=model)
    check(f"{table}: a rolling sum is that of the text after the prefix",
          prefixed[0] == {"logprob": found[0]["logprob"], "tokens": T}, prefixed)


def test_sums(model, rows):
    context = rows[0][:20]
    found = answers([{"context_ids": context, "continuation_ids": [i]} for i in range(V)], model=model)
    total = math.fsum(math.exp(a["logprob"]) for a in found)
    check("the probabilities of all next tokens add up to 1", abs(total - 1) < 1e-5, total)
    best = max(range(V), key=lambda i: found[i]["logprob"])
    check("the likeliest one alone is greedy", [i for i in range(V) if found[i]["greedy"]] == [best])
    a, ab, b = answers([{"context_ids": context, "continuation_ids": [5, 6]},
                        {"context_ids": context, "continuation_ids": [5, 6, best, 9, 10]},
                        {"context_ids": context + [5, 6], "continuation_ids": [best, 9, 10]}], model=model)
    check("scores of two parts add up to that of both", near(a["logprob"] + b["logprob"], ab["logprob"], 10), (a, b, ab))


def test_text(model, folder):
    path, text = os.path.join(folder, "text.txt"), "Ein Wörterbuch – for \"all\" \\ of us\t€\n" * 9
    with open(path, "w", encoding="utf-8") as out:
        out.write(text)
    scored = subprocess.run([args.program, model, "--score", path], capture_output=True, text=True).stdout
    mean, n = float(scored.split("loss ")[1].split()[0]), len(text.encode())
    split, empty, whole = answers([{"context": text[0], "continuation": text[1:]}, {"context": "", "continuation": text},
                                   {"text": text}], model=model)
    check("a text's sum is --score's", near(-split["logprob"] / (n - 1), mean) and split["tokens"] == n - 1, (split, mean))
    check("an empty context is token 0", empty["logprob"] == whole["logprob"] and whole["tokens"] == n)
    pair = answers([{"text": text}, {"context_ids": [0, 11], "continuation": text}], "--prefix-ids", "0,11", model=model)
    check("--prefix-ids of two", pair[0]["logprob"] == pair[1]["logprob"] != whole["logprob"], pair)
    escaped = answers([b'{"text":"\\u00d6\\ud83d\\ude00\\n"}\n', '{"text":"Ö😀\\n"}\n'.encode()], model=model)
    check("escapes are the characters they stand for", escaped[0] == escaped[1] and escaped[0]["tokens"] == 7, escaped)
    check("texts of no tokens", answers([{"text": ""}], model=model) == [{"logprob": 0, "tokens": 0}])


def test_shared(model, rows):
    random.seed(3)
    lines = []
    for number in range(1000):
        row, group = rows[number % 2], number // 25                     # 25 requests a context
        context = row[:1 + group] + [group]
        lines.append({"id": number, "context_ids": context,
                      "continuation_ids": [random.randrange(V) for _ in range(1 + number % 7)]})
    lines.sort(key=lambda line: (line["context_ids"], line["id"]))
    together = {a["id"]: a for a in answers(lines, model=model)}
    mixed = [line for step in range(25) for line in lines[step::25]]    # neighbours differ: each context is read anew
    apart = {a["id"]: a for a in answers(mixed, model=model)}
    check("1,000 requests with shared contexts: the bits of contexts read anew", together == apart and len(apart) == 1000)
    alone = [answers([line], model=model)[0] for line in lines[::111]]
    check("and of requests alone", all(together[a["id"]] == a for a in alone))


def test_long(model, rows):
    """Keys and values of 512 tokens are at hand: what comes after a context takes the place of its oldest."""
    window = ("--kv-window", "512")
    for length, more in ((250, 275), (510, 20), (525, 20)):
        context = [(7 * i + i // 64) % V for i in range(length)]
        lines = [{"context_ids": context, "continuation_ids": (rows[0] * 50)[:n]} for n in (5, more, 5)]
        found = answers(lines + [{"context_ids": [1], "continuation_ids": [2]}] + lines[1:2], *window, model=model)
        check(f"a context of {length} tokens: the same bits each time", found[0] == found[2] and found[1] == found[4], found)
        ids = lines[1]["continuation_ids"]
        head, tail = answers([{"context_ids": context, "continuation_ids": ids[:10]},
                              {"context_ids": context + ids[:10], "continuation_ids": ids[10:]}], *window, model=model)
        check("and two parts add up", near(head["logprob"] + tail["logprob"], found[1]["logprob"], more), found)


def test_writing(model, rows):
    context, drawn = rows[1][:9], []
    for _ in range(6):                                                  # the likeliest each time
        found = answers([{"context_ids": context + drawn, "continuation_ids": [i]} for i in range(V)], model=model)
        allowed = [i for i in range(V) if i <= 256]
        drawn.append(max(allowed, key=lambda i: found[i]["logprob"]))
        if drawn[-1] == 0:
            break
    expected = bytes(i - 1 for i in drawn if i > 0)
    request = {"context_ids": context, "max_tokens": 6}
    found = answers([request, dict(request, max_tokens=4), dict(request, temperature=1, seed=1),
                     dict(request, temperature=1, seed=2), dict(request, temperature=1, seed=1),
                     dict(request, temperature=1, top_k=1), dict(request, max_tokens=0), request], model=model)
    check("greedy: the likeliest token each time", found[0]["text"] == expected.decode("utf-8", "replace"), (found, expected))
    check("max_tokens", found[1]["tokens"] == min(4, found[0]["tokens"]) and found[6] == {"text": "", "tokens": 0}, found)
    check("the same seed draws the same, another one something else", found[2] == found[4] != found[3], found)
    check("top_k 1 is greedy; what was drawn before leaves no trace", found[5] == found[0] == found[7], found)
    plain = [i for i in range(1, len(expected)) if 32 <= expected[i] < 127]
    if plain:
        stop = chr(expected[plain[0]])
        stopped, = answers([dict(request, until=["\n\n\n", stop])], model=model)
        first = expected.index(stop.encode())
        check("until", stopped == {"text": expected[:first].decode("utf-8", "replace"), "tokens": first + 1},
              (stopped, expected, stop))
    longer = dict(request, temperature=1, top_p=1, max_tokens=200, seed=5)  # until two tokens' bytes
    whole = answers([longer], model=model)[0]["text"]
    stop = next(whole[i:i + 2] for i in range(9, len(whole)) if len(whole[i:i + 2].encode("ascii", "ignore")) == 2)
    stopped, = answers([dict(longer, until=[stop])], model=model)
    check("until a text of two tokens", stopped["text"] == whole[:whole.index(stop)], (stopped, whole, stop))


def test_split(model, folder):
    path = os.path.join(folder, "vocabulary.txt")
    with open(path, "w", encoding="latin-1") as out:
        for byte in range(256):
            out.write(f"{byte + 1} {bytes([byte])!r} 1\n")
        for number, text in enumerate(["bc", "cd", " mat"] + [f"q{i:03}" for i in range(57)]):
            out.write(f"{257 + number} {text!r} {len(text)}\n")
    a, b, d = 98, 99, 101
    found = answers([{"context": "ab", "continuation": "cd"}, {"context_ids": [a, b], "continuation_ids": [d]},
                     {"context": "a", "continuation": "bc"}, {"context_ids": [a], "continuation_ids": [257]},
                     {"context": "ab", "continuation": "c"}], "--vocab", path, model=model)
    check("a token across the end of the context: as many are taken off the tokens of both",
          found[0] == found[1] and found[0]["tokens"] == 1, found)
    check("without one, each has its own", found[2] == found[3], found)
    check("nothing left for the continuation is an error", "tokens of its own" in found[4].get("error", ""), found)


def test_batch(model, rows):
    """Several continuations at once: what a line is answered with depends on nobody beside it."""
    window = ("--kv-window", "24")                                      # some contexts are longer, some become so
    random.seed(7)
    lines = []
    for number in range(24):
        line = {"id": number, "context_ids": (rows[number % 2] * 2)[:3 + number * 5 % 41], "max_tokens": 1 + number * 7 % 30}
        if number % 3 == 1:
            line.update(temperature=1, seed=number, top_p=0.9 if number % 2 else 1, top_k=number % 5 * 3)
        if number % 4 == 2:
            line["until"] = ["e", "\n", bytes([65 + number]).decode()]
        if number % 6 == 5:
            line = {"id": number, "context_ids": [1, 2, number], "continuation_ids": [3]}
        if number % 8 == 7:
            line = {"id": number, "context": 1}
        lines.append(line)
    lines.append({"id": 24, "context_ids": [5], "max_tokens": 0})
    one = answers(lines, *window, model=model)
    found = {n: answers(lines, *window, "--batch", str(n), model=model) for n in (2, 5, 32)}
    check("--batch: answers in the order of the lines", all([a["id"] for a in f] == list(range(25)) for f in found.values()))
    check("--batch: the same texts for 2, 5 and 32 at once", found[2] == found[5] == found[32],
          [pair for pair in zip(found[2], found[5], found[32]) if not pair[0] == pair[1] == pair[2]])
    same = sum(a == b for a, b in zip(one, found[5]))                   # but for tokens that are as likely up to rounding
    check("--batch: and as one by one", same == 25 or (args.bf16 and same > 12),
          [pair for pair in zip(one, found[5]) if pair[0] != pair[1]])
    drawn = [a["tokens"] for a, line in zip(found[5], lines) if "max_tokens" in line]
    check("--batch: continuations of many lengths", len(set(drawn)) > 5, drawn)
    mixed = random.sample(lines, len(lines))
    by_id = {a["id"]: a for a in answers(mixed, *window, "--batch", "5", model=model)}
    differing = [(a, by_id[a["id"]]) for a in found[5] if "error" not in a and by_id[a["id"]] != a]
    check("--batch: the same texts in another order of the lines", not differing, differing)
    alone = [answers([line], *window, "--batch", "5", model=model)[0] for line in lines[:15:5]]
    check("--batch: and of lines alone", alone == found[5][:15:5], (alone, found[5][:15:5]))


def test_errors(model, llama, folder):
    good = b'{"id": "x", "context": "a", "continuation": "b"}\n'
    bad = [(b'{"context": "a", "continuation": "b"\n', "byte 37: expected '}', found the end"),
           (b'[1]\n', "expected '{'"), (b'{} \n', "expected one of"), (b'nonsense\n', "expected '{'"),
           (b'{"text": "a", "context": "b"}\n', "expected one of"), (b'{"contxt": "a"}\n', 'found "contxt"'),
           (b'{"text": "a", "max_tokens": 3}\n', "expected one of"), (b'{"until": ["a"]}\n', "expected one of"),
           (b'{"context": "a", "until": [""]}\n', "not empty"), (b'{"context": "a", "until": "a"}\n', "expected '['"),
           (b'{"context": "a", "continuation": ""}\n', "tokens of its own"),
           (b'{"context_ids": [320], "continuation": "a"}\n', "context_ids: id 0: expected 0 to 319, found 320"),
           (b'{"context_ids": [-1], "continuation": "a"}\n', "expected a number"),
           (b'{"context_ids": [1.5], "continuation": "a"}\n', "whole number"),
           (b'{"context": "a", "context_ids": [1], "continuation": "a"}\n', "found twice"),
           (b'{"context": "a", "temperature": -1}\n', "temperature: expected a number from 0 to 100, found -1"),
           (b'{"context": "a", "temperature": 1e}\n', "expected a number"), (b'{"text": "a"} x\n', "the end of the line"),
           (b'{"text": "a"}\0x\n', "found a zero byte"),
           (b'{"text": "a\0b"}\n', "the end of a text"), (b'{"text": "\\u12"}\n', "an escape"),
           (b'{"text": "\\ud800"}\n', "both halves"),
           (b'{"context": "a", "max_tokens": 99999999999999}\n', "tokens")]
    lines = [line for case in bad for line in (good, b"\n", case[0])] + [good]
    found = answers(lines, model=model)
    check("each line has its answer", len(found) == 2 * len(bad) + 1 and all(a == found[0] for a in found[::2]) and
          found[0]["id"] == "x" and "logprob" in found[0], found)
    for number, (line, expected) in enumerate(bad):
        message = found[2 * number + 1].get("error", "")
        check(f"{line!r} is an error, with its line", expected in message and
              message.startswith(f"stdin: line {3 * number + 3}"), message)
    path = os.path.join(folder, "requests.jsonl")
    with open(path, "wb") as out:
        out.write(good + b'{"id": -7, "context": 1}\n' + good[:-1])
    done = subprocess.run([args.program, model, "--requests", path], capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    check("a file: its name, the line and the id in the answer; no newline at the end",
          len(found) == 3 and found[1]["id"] == -7 and found[1]["error"].startswith(path + ": line 2") and
          found[0] == found[2] and done.returncode == 0 and "3 requests, 1 of them" in done.stderr, done)
    for flags, expected in ((["--requests", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
                            (["--requests", path, "-p", "x"], "--requests: expected nothing else"),
                            (["--requests", path, "--prefix-ids", "0,320"], "--prefix-ids: expected ids from 0 to 319"),
                            (["--requests", path, "--prefix-ids", ""], "--prefix-ids: expected ids"),
                            (["-p", "x", "--batch", "2"], "--batch: expected --requests beside it"),
                            (["--requests", path, "--batch", "33"], "--batch: expected a whole number from 1 to 32, found")):
        done = subprocess.run([args.program, model, *flags], capture_output=True, text=True)
        check(f"exit 2, {expected!r}", done.returncode == 2 and done.stderr.startswith("infer_goldfinch: " + expected) and
              done.stderr.count("\n") == 1, done)
    done = subprocess.run([args.program, llama, "--requests", path, "--batch", "2"], capture_output=True, text=True)
    check("--batch needs a model that decodes step by step", done.returncode == 2 and
          done.stderr.splitlines()[-1].startswith("infer_goldfinch: --batch: expected a model of x060c2"), done)


def test_conversation(model, *flags):
    child = subprocess.Popen([args.program, model, "--requests", "-", *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)
    context, right = "Hello", True
    for turn in range(4):
        child.stdin.write(json.dumps({"id": turn, "context": context, "max_tokens": 3}).encode() + b"\n")
        child.stdin.flush()
        answer = json.loads(child.stdout.readline())                    # would hang if the answer were held back
        right = right and answer["id"] == turn
        context += answer["text"] + "\nAnd?"
    child.stdin.close()
    check(f"a conversation through pipes {' '.join(flags)}", right and child.wait() == 0)


def test_reader(model, *flags):
    """Lines in pieces, with what other systems put at their ends, or with nothing."""
    line = b'{"context": "Hello", "max_tokens": 3}'
    plain, = answers([line + b"\n"], *flags, model=model)
    name = "".join(random.choices("abcdefgh", k=3_000_000))
    found = answers([line + b"\r\n", b" \t\r\n\n", dict(json.loads(line), id=name), line], *flags, model=model)
    check(f"CRLF, blank lines, 3 MB in a line, an end without newline {' '.join(flags)}",
          found == [plain, dict(plain, id=name), plain], [str(a)[:200] for a in found])
    none = answers([], *flags, model=model) + answers([b"\n"], *flags, model=model) + answers([b" "], *flags, model=model)
    cut, = answers([line[:20]], *flags, model=model)
    check(f"an end within a line {' '.join(flags)}", "found the end" in cut.get("error", "") and none == [], (cut, none))
    child = subprocess.Popen([args.program, model, "--requests", "-", *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)
    got = []
    for piece in (line[:9], line[9:] + b"\n" + line[:9], line[9:] + b"\n"):
        child.stdin.write(piece)
        child.stdin.flush()
        if b"\n" in piece:
            got.append(json.loads(child.stdout.readline()))             # would hang if half a line were waited for
    rest, _ = child.communicate(line)
    check(f"a line is answered although half of the next one is there {' '.join(flags)}",
          got + [json.loads(rest)] == 3 * [plain] and child.returncode == 0, (got, rest))


def test_noise(model):
    """10 million random bytes; lines of requests with bytes changed, some of them in the middle of texts."""
    random.seed(5)
    seeds = [b'{"id": 1, "context": "ab\\u00e9", "continuation": "c"}', b'{"text_ids": [1, 2, 3], "id": "a"}',
             b'{"context_ids": [1, 2], "until": ["a", "b"], "max_tokens": 2, "temperature": 0.5, "top_p": 0.9}']
    lines = []
    for _ in range(3000):
        line = bytearray(random.choice(seeds))
        for _ in range(random.randrange(1, 4)):
            at = random.randrange(len(line))
            line[at:at + random.randrange(2)] = random.choice([bytes([random.randrange(256)]), b"9", b'"', b"\\", b"[", b"]"])
        lines.append(bytes(line) + b"\n")
    for what, text, flags in (("10 million random bytes", random.randbytes(10_000_000), ()),
                              ("changed requests", b"".join(lines), ()),
                              ("changed requests, --batch 3", b"".join(lines), ("--batch", "3"))):
        done = subprocess.run([args.program, model, "--requests", "-", *flags], input=text, capture_output=True)
        asked = sum(1 for line in text.split(b"\n") if line.split(b"\0")[0].strip(b" \t\r") or b"\0" in line)
        valid = True
        try:
            given = [json.loads(line) for line in done.stdout.decode("utf-8").splitlines() if line]
        except (ValueError, UnicodeDecodeError):
            valid = False
        check(f"{what}: an answer in JSON for each line",
              done.returncode == 0 and valid and len(given) == asked and all("error" in a or "tokens" in a for a in given),
              (done.returncode, done.stderr[-300:], valid and len(given), asked))


def main():
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for table in ("llama", "gptalpha", "finch", "goldfinch"):
            path = os.path.join(folder, f"{table}.safetensors")
            rows, loss = golden_model(table, path)
            models[table] = (path, rows)
            test_scores(path, rows, loss, table)
        for table in ("goldfinch", "llama"):
            test_shared(*models[table])
        path, rows = models["goldfinch"]
        test_sums(path, rows)
        test_text(path, folder)
        test_writing(path, rows)
        test_split(path, folder)
        test_errors(path, models["llama"][0], folder)
        test_batch(path, rows)
        test_conversation(path)
        test_conversation(path, "--batch", "4")
        test_reader(path)
        test_reader(path, "--batch", "4")
        test_noise(path)
        test_long(path, rows)
    print(f"{counts['passed']} passed, {counts['failed']} failed")
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=os.path.join(ROOT, "infer_goldfinch"))
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    main()
