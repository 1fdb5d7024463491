#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pyrwkv-tokenizer", "datasets", "pyarrow", "zstandard"]
# ///
"""Makes training data: tokens in binidx files, PREFIX.bin and PREFIX.idx.

  prepro_minipile.py                             the paper's corpus: data/minipile and data/minipile_validation
  prepro_minipile.py FILE... -o data/mine        your own text: data/mine, and data/mine_validation from 1 % of it
  prepro_minipile.py FILE... -o data/mine --bytes        the same with an id for each byte; needs nothing but Python
  prepro_minipile.py FILE.jsonl -o data/mine --mask      lines of "prompt" and "answer": also data/mine_mask, which tells
                                                 the trainer to learn the answers alone
  prepro_minipile.py --check data/mine           verifies a pair and shows what is in it

FILE: .txt, .jsonl or .parquet, also .gz or .zst of the first two, a folder of them, or - for standard input. Other
endings are read as text. A text is one document (but see --split), a line of .jsonl and a row of .parquet is one.
Every document ends with token 0. Without FILE the training set is fetched as the paper's authors used it, already
tokenized (3 GB; a broken download goes on where it stopped); the validation set is tokenized here.
"""
# Parts, in the order the data flows: 1. reading documents, 2. tokenizing, 3. writing, 4. fetching, 5. checking, 6. main.
# A document travels as pieces (bytes, ends): UTF-8 text, and whether it ends the document, or its prompt (PROMPT_ENDS),
# or neither. So one of any size passes through little memory; where it is cut, no token is.

import argparse
import array
import ast
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import gzip
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib

TOKENIZED = "datasets/BlinkDL/minipile-tokenized/resolve/main/rwkv_vocab_v20230424/minipile"     # .bin and .idx
RAW = "JeanKaddour/minipile"                    # as load_dataset knows it
HOST = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
VOCABULARY = "rwkv_vocab_v20230424.txt"
END_OF_TEXT = b"<|endoftext|>"                  # encodes to 0
LAST_ID = 65529                                 # ids above are unused; a model's vocabulary is 65536
BLOCK = 1 << 20                                 # bytes read at once
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LONGEST_LINE = 1 << 22                          # of a text that is kept whole while its UTF-8 is looked at
UNIT = 1 << 18                                  # bytes of text that a process tokenizes at once
PROMPT_ENDS = 2                                 # after a piece: what follows is the answer


class Fail(Exception):
    """What went wrong, in a line. Exit code 1: the system failed us (disk, network); 2: an argument or a file."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def require(package, pip_name):
    if importlib.util.find_spec(package) is None:
        raise Fail(f"the Python package {pip_name} is missing: python3 -m pip install {pip_name}")


def say(text):
    """A line to standard output. Whoever reads it may have seen enough, which is no fault of the data's."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())          # what is held goes there
        if not isinstance(error, BrokenPipeError):
            raise Fail(f"standard output: {error.strerror}", 1)


def many(n, what):
    return f"{n:,} {what}" + ("s" if n != 1 else "")


def size_text(n):
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            break
        n, unit = n / 1000, "TB"
    return f"{n:.0f} bytes" if unit == "bytes" else f"{n:.1f} {unit}"


def disk_needs(path, n_bytes):
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if n_bytes > free:
        raise Fail(f"{path}: needs {size_text(n_bytes)} of disk, {size_text(free)} are free", 1)


class Progress:
    """One line on the terminal, rewritten; where there is none, a line every ten seconds."""

    def __init__(self, what, total=0):
        self.what, self.total = what, total     # total: how much there is to read, in the unit of .where(); 0: unknown
        self.where = lambda: 0                  # how much of it has been read
        self.begin = self.last = time.monotonic()
        self.bytes = self.tokens = self.skipped = self.empty = self.marks = self.returns = self.ends = 0
        self.begin_at = 0                       # what was there before we began, as after a broken download
        self.terminal = sys.stderr.isatty()

    def add(self, n_bytes, n_tokens=0):
        self.bytes += n_bytes
        self.tokens += n_tokens
        now = time.monotonic()
        if now - self.last >= (0.2 if self.terminal else 10):
            self.last = now
            self.show(now - self.begin)

    def show(self, seconds):
        at, text = self.where(), f"{self.what}: "
        if self.total:
            text += f"{100 * min(at / self.total, 1):.1f} %, "
        text += f"{size_text(self.bytes)}, {self.bytes / 1e6 / seconds:.1f} MB/s"
        if self.tokens:
            text += f", {self.tokens / 1e6:.1f} M tokens"
        if self.total and at > self.begin_at:
            left = int(seconds * (self.total - at) / (at - self.begin_at))
            text += f", {left // 3600}h{left // 60 % 60:02d}m{left % 60:02d}s left"
        sys.stderr.write(f"\r{text}\x1b[K" if self.terminal else text + "\n")
        sys.stderr.flush()

    def done(self):
        if self.terminal:
            sys.stderr.write("\r\x1b[K")
        return max(time.monotonic() - self.begin, 1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Reading documents

class Source:
    """The documents of files, folders or a data set: iterating gives pieces."""

    def __init__(self, args, progress):
        self.args, self.progress = args, progress
        escapes = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}
        self.separator = re.sub(r"\\[nrt\\]", lambda m: escapes[m[0]], args.split or "").encode()

    def bad(self, where, why):
        if not self.args.skip_bad:
            raise Fail(f"{where}: {why} (--skip-bad leaves such out and counts them)")
        self.progress.skipped += 1

    def files(self, paths):
        before = 0
        for path in paths:
            if path == "-":
                yield from self.documents(sys.stdin.buffer, "standard input", None)
                continue
            with open(path, "rb") as raw:
                self.progress.where = lambda: before + raw.tell()
                kind = file_kind(path)
                if raw.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise Fail(f"{path}: expected the file itself, found a pointer of Git LFS to it: `git lfs pull` "
                               "brings it")
                raw.seek(0)
                if kind == "parquet":
                    self.progress.where = lambda: before + size * self.parquet_part
                    size = os.path.getsize(path)
                    yield from self.parquet(path)
                else:
                    try:
                        yield from self.documents(decompressed(path, raw), path, kind)
                    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                        raise Fail(f"{path}: broken compressed data: {error}")
                before += os.path.getsize(path)
                self.progress.where = lambda: before

    def text(self, stream, name):
        """Blocks of valid UTF-8: whole lines, or parts of very long ones. Byte-level ids take any bytes. A byte order mark
        and carriage returns before line feeds are left out, and counted."""
        line, rest, first = 1, b"", True
        while block := rest + stream.read(BLOCK):
            if block[-1:] != b"\n":
                block += stream.readline(LONGEST_LINE)
            tail = 0 if block == rest else incomplete_tail(block)       # block == rest: nothing follows
            block, rest = block[:len(block) - tail], block[len(block) - tail:]
            if first and block.startswith(BYTE_ORDER_MARK):
                block, self.progress.marks = block[3:], self.progress.marks + 1
            first = False
            self.progress.returns += block.count(b"\r\n")
            block = block.replace(b"\r\n", b"\n")
            lines = block.count(b"\n")
            if not self.args.bytes:
                try:
                    block.decode()
                except UnicodeDecodeError:
                    block = self.good_lines(block, name, line)
            line += lines
            yield block

    def good_lines(self, block, name, line):
        good = []
        for i, text in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", block)):
            try:
                text.decode()
                good.append(text)
            except UnicodeDecodeError as error:
                self.bad(f"{name}, line {line + i}", f"broken UTF-8: byte 0x{text[error.start]:02x}, {error.reason}")
        return b"".join(good)

    def documents(self, stream, name, kind):
        if (kind or self.args.format) == "jsonl":
            yield from self.jsonl(stream, name)
            return
        rest = b""
        for block in self.text(stream, name):
            if self.separator:
                *whole, block = (rest + block).split(self.separator)
                yield from ((document, True) for document in whole)
                keep = len(block) - min(len(block), len(self.separator) - 1)    # may be a separator's beginning
                block, rest = block[:keep], block[keep:]
            yield block, False
        yield rest, True

    def jsonl(self, stream, name):
        for number, line in enumerate(stream, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
                if not self.args.mask:
                    yield record[self.args.field].encode(), True
                    continue
                prompt, answer = (record[field].encode() for field in ("prompt", "answer"))
                if prompt or answer:
                    yield prompt, PROMPT_ENDS
                yield answer, True
            except UnicodeDecodeError as error:
                self.bad(f"{name}, line {number}", f"broken UTF-8: {error.reason}")
            except UnicodeEncodeError:
                self.bad(f"{name}, line {number}", "half of a surrogate pair, which is no text")
            except (json.JSONDecodeError, RecursionError) as error:
                self.bad(f"{name}, line {number}", f"broken JSON: {error}")
            except (KeyError, TypeError, IndexError, AttributeError):
                fields = 'texts in the fields "prompt" and "answer"' if self.args.mask else \
                    f'a text in the field "{self.args.field}"'
                self.bad(f"{name}, line {number}", f"expected an object with {fields}")

    def parquet(self, path):
        import pyarrow
        import pyarrow.parquet
        self.parquet_part, row, field = 0, 0, self.args.field
        try:
            table = pyarrow.parquet.ParquetFile(path, memory_map=True)
            if field not in table.schema_arrow.names:
                raise Fail(f'{path}: no field "{field}" (--field), only {", ".join(table.schema_arrow.names)}')
            if table.schema_arrow.names.count(field) > 1:
                raise Fail(f'{path}: field "{field}": expected once, found {table.schema_arrow.names.count(field)} times')
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(field):               # "a.b" brings a struct's a{b}, too
                    row += 1
                    try:
                        yield value.as_py().encode(), True
                    except (AttributeError, UnicodeError):
                        self.bad(f"{path}, row {row}", f'expected a text in the field "{field}"')
                self.parquet_part = row / table.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise Fail(f"{path}: {str(error).splitlines()[0]}")

    def data_set(self, split):
        """The raw minipile; what is fetched of a large split is kept, and not fetched again, by the datasets package."""
        import datasets
        try:
            rows = datasets.load_dataset(RAW, split=split, streaming=split == "validation")
            self.progress.total = 0 if split == "validation" else len(rows)
            for i, row in enumerate(rows):
                self.progress.where = lambda: i
                yield row["text"].encode(), True
        except Exception as error:
            raise Fail(f"{RAW}, {split}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", 1)


def file_kind(path):
    """txt, jsonl or parquet, without regard to compression; None: an ending that only counts if the file is named."""
    stem = re.sub(r"\.(gz|zst)$", "", path)
    return next((kind for kind in ("txt", "jsonl", "parquet") if stem.endswith("." + kind)), None)


def decompressed(path, raw):
    if path.endswith(".gz"):
        return gzip.open(raw)
    if path.endswith(".zst"):
        return io.BufferedReader(ZstdReader(raw), BLOCK)
    return raw


class ZstdReader(io.RawIOBase):
    """Unlike the package's own reader, it does not take a file that was cut off for a whole one."""

    def __init__(self, raw):
        self.raw, self.frame, self.text = raw, None, b""

    def readable(self):
        return True

    def readinto(self, out):
        import zstandard
        while not self.text:
            ended = self.frame is None or self.frame.eof
            block = self.frame.unused_data if self.frame and ended else b""
            block = block or self.raw.read(1 << 14)
            if not block and not ended:
                raise EOFError("it ends in the middle")
            if not block:
                return 0
            try:
                self.frame = zstandard.ZstdDecompressor().decompressobj() if ended else self.frame
                self.text = memoryview(self.frame.decompress(block))
            except zstandard.ZstdError as error:
                raise EOFError(error)
        n = min(len(out), len(self.text))
        out[:n], self.text = self.text[:n], self.text[n:]
        return n


def incomplete_tail(block):
    """How many bytes at the end begin a UTF-8 character that does not end there, or perhaps a line end of two bytes."""
    if block[-1:] == b"\r":
        return 1
    for n in range(1, min(len(block), 3) + 1):
        lead = block[-n]
        if lead < 0x80:
            return 0
        if lead >= 0xC0:
            return n if n < 2 + (lead >= 0xE0) + (lead >= 0xF0) else 0
    return 0


def find_inputs(names):
    found = []
    for name in names:
        if os.path.isdir(name):
            inside = sorted(os.path.join(folder, f) for folder, _, files in os.walk(name) for f in files)
            inside = [path for path in inside if file_kind(path)]
            if not inside:
                raise Fail(f"{name}: the folder holds no .txt, .jsonl or .parquet")
            found.extend(inside)
        elif name == "-" or os.path.exists(name):
            found.append(name)
        else:
            raise Fail(f"{name}: No such file or folder")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# 2. Tokenizing: the RWKV World tokenizer takes the longest token that fits, from the left. Its ids 1 to 256 are the
#    single bytes, so byte-level ids (byte + 1) are a part of it.

def vocabulary_text():
    """The vocabulary file as the tokenizer's package brings it, or as it was written here before."""
    folders = ["data"]
    for package in ("rwkv", "pyrwkv_tokenizer"):
        spec = importlib.util.find_spec(package)
        folders[:0] = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = os.path.join(folder, VOCABULARY)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                return path, f.read()
    return None, ""


def load_vocabulary():
    """{id: bytes} from lines ID LITERAL LENGTH, LITERAL as in Python; None if there is no file."""
    path, text = vocabulary_text()
    if path is None:
        return None
    vocabulary = {0: END_OF_TEXT}
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            token, literal, length = re.fullmatch(r"(\d+) (.+) (\d+)", line).groups()
            value = ast.literal_eval(literal)
            vocabulary[int(token)] = value = value.encode() if isinstance(value, str) else value
            if len(value) != int(length):
                raise ValueError
        except (AttributeError, ValueError, SyntaxError):
            raise Fail(f"{path}, line {number}: expected ID LITERAL LENGTH, found {line[:40]!r}")
    return vocabulary


def write_vocabulary():
    """data/rwkv_vocab_v20230424.txt, which infer_goldfinch reads."""
    target = os.path.join("data", VOCABULARY)
    path, text = vocabulary_text()
    if path == target or path is None:
        return
    os.makedirs("data", exist_ok=True)
    with replacing(target) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)


@functools.lru_cache(None)
def inner_pairs():
    """The vocabulary, and for two bytes a, b, at a * 256 + b, whether they are neighbours in some token."""
    vocabulary, inside = load_vocabulary(), bytearray(65536)
    for token in vocabulary.values():
        for a, b in zip(token, token[1:]):
            inside[a << 8 | b] = 1
    return vocabulary, inside


def safe_cut(text):
    """Where a long text can be cut so that its parts encode to what the whole encodes to, UNIT bytes from its beginning
    or less. Between bytes that are neighbours in no token a token ends: nearly every text has such a place nearby. Else
    (a megabyte of spaces, say) a part is encoded to see where its tokens end; the last ones, which more text could
    change, do not count."""
    vocabulary, inside = inner_pairs()
    for i in range(UNIT, UNIT // 2, -1):
        if not inside[text[i - 1] << 8 | text[i]] and not is_continuation(text[i]):
            return i
    at = end = next(i for i in range(UNIT, 0, -1) if not is_continuation(text[i]))
    longest = max(map(len, vocabulary.values()))
    for token in reversed(encode(bytes(text[:end]))):
        if at <= end - longest and not is_continuation(text[at]):
            break
        at -= len(vocabulary[token])
    return at


def is_continuation(byte):                                      # not the first of a UTF-8 character
    return byte & 0xC0 == 0x80


def units(pieces, anywhere, progress):
    """Lists of pieces, about UNIT bytes each, long texts cut (anywhere, or where no token is). Documents without text
    are left out."""
    unit, size, rest, begun = [], 0, bytearray(), False
    for text, ends in pieces:
        rest += text
        while len(rest) >= 2 * UNIT:
            at = UNIT if anywhere else safe_cut(rest)
            yield unit + [(bytes(rest[:at]), False)]
            unit, size, begun = [], 0, True
            del rest[:at]
        if ends:
            if rest or begun or ends == PROMPT_ENDS:
                unit.append((bytes(rest), ends))
                size += len(rest)
            else:
                progress.empty += 1
            rest, begun = bytearray(), ends == PROMPT_ENDS
            if size >= UNIT or len(unit) >= 4096:
                yield unit
                unit, size = [], 0
    if unit:
        yield unit


tokenizer = None                                                # one per process, made when first needed


def encode(text):
    global tokenizer
    if tokenizer is None:
        import pyrwkv_tokenizer
        tokenizer = pyrwkv_tokenizer.RWKVTokenizer()
    first, *others = text.split(END_OF_TEXT)                    # the package would spell it out
    ids = tokenizer.encode(first.decode())
    for part in others:
        ids.append(0)
        ids += tokenizer.encode(part.decode())
    return ids


def encode_unit(unit):
    """The ids of all pieces as u16, [(number of ids, ends)], bytes of text, how often <|endoftext|> stands in it."""
    pieces = [(encode(text), ends) for text, ends in unit]
    ids = b"".join(struct.pack(f"<{len(ids)}H", *ids) for ids, _ in pieces)
    counts = [(len(ids), ends) for ids, ends in pieces]
    return ids, counts, sum(len(text) for text, _ in unit), sum(text.count(END_OF_TEXT) for text, _ in unit)


LOW_BYTE = bytes((b + 1) & 255 for b in range(256))             # of byte + 1
HIGH_BYTE = bytes((b + 1) >> 8 for b in range(256))


def encode_unit_bytes(unit):
    text = b"".join(text for text, _ in unit)
    ids = bytearray(2 * len(text))
    ids[0::2], ids[1::2] = text.translate(LOW_BYTE), text.translate(HIGH_BYTE)
    return ids, [(len(text), ends) for text, ends in unit], len(text), 0


def in_order(function, items, processes):
    """function of every item, in the items' order, by several processes (by this one if there is but one item).
    No more than three items a process wait or are worked on, so memory stays bounded."""
    items = iter(items)
    first = list(itertools.islice(items, 2))
    items = itertools.chain(first, items)
    if processes == 1 or len(first) < 2:
        yield from map(function, items)
        return
    pool = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_with_parent)
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 3 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise Fail("a process of ours was killed (out of memory?)", 1)
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent():                                          # in each process: kill -9 of the first leaves none
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C: the first one stops us

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


# ----------------------------------------------------------------------------------------------------------------------
# 3. Writing. PREFIX.bin: the tokens back to back. PREFIX.idx: "MMIDIDX\0\0", u64 version 1, u8 data type, u64 n
#    documents, u64 n + 1, i32 sizes[n] in tokens, i64 offsets[n] in bytes, i64 marks[n + 1]: the numbers 0 to n.
#    Little-endian. Data types: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16.

MAGIC = b"MMIDIDX\0\0"
TYPE_LETTER = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}  # as array and memoryview name them
U8, U16 = 1, 8


def open_locked(path):
    """Opens for appending; fails if another run of ours has it open."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    f = open(path, "a+b")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Fail(f"{path}: another run is writing it", 1)
    return f


class Writer:
    """PREFIX.bin.tmp and PREFIX.idx.tmp. Memory does not grow with the number of documents."""

    def __init__(self, prefix, kind=U16):
        self.prefix, self.kind, self.width = prefix, kind, 2 if kind == U16 else 1
        self.bin = open_locked(prefix + ".bin.tmp")
        self.bin.truncate(0)
        self.idx = open(prefix + ".idx.tmp", "w+b")
        self.idx.seek(34)
        self.tokens = self.documents = self.size = 0            # size: of the document being written

    def add(self, ids):
        self.bin.write(ids)
        self.size += len(ids) // self.width

    def end(self, last=b"\0\0"):
        self.add(last)
        if self.size >= 1 << 31:
            raise Fail(f"a document of {self.size:,} tokens, binidx holds up to 2,147,483,647: see --split")
        self.idx.write(struct.pack("<i", self.size))
        self.tokens += self.size
        self.documents += 1
        self.size = 0

    def take_last(self):
        """Removes the last document and returns its ids, the closing one left out."""
        self.idx.seek(-4, os.SEEK_END)
        size = struct.unpack("<i", self.idx.read(4))[0]
        self.idx.seek(-4, os.SEEK_END)
        self.idx.truncate()
        self.tokens -= size
        self.documents -= 1
        self.bin.seek(self.width * self.tokens)
        ids = self.bin.read(self.width * (size - 1))
        self.bin.truncate(self.width * self.tokens)
        return ids

    def finish(self):
        n, at, offset = self.documents, 34, 0
        while at < 34 + 4 * n:                                  # a stretch of sizes, and its offsets
            self.idx.seek(at)
            sizes = array.array("i", self.idx.read(min(BLOCK, 34 + 4 * n - at)))
            *offsets, offset = itertools.accumulate((self.width * size for size in sizes), initial=offset)
            self.idx.seek(34 + 4 * n + 2 * (at - 34))
            self.idx.write(array.array("q", offsets))
            at += 4 * len(sizes)
        for begin in range(0, n + 1, BLOCK):
            self.idx.write(array.array("q", range(begin, min(begin + BLOCK, n + 1))))
        self.idx.seek(0)
        self.idx.write(MAGIC + struct.pack("<QBQQ", 1, self.kind, n, n + 1))
        for f in (self.bin, self.idx):
            f.flush()
            os.fsync(f.fileno())

    def close(self):
        self.idx.close()
        self.bin.close()

    def discard(self):
        remove(self.idx.name)
        remove(self.bin.name)
        self.close()


def remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def replacing(path):
    """A name to write a file under, which becomes PATH once it is whole and on the disk; else PATH stays as it is."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        remove(temporary)


def publish(prefix, suffix):
    """Gives a whole pair its final names, all or nothing: when both are named .new, it is a pair, and settle finishes
    the work even if we are killed meanwhile."""
    os.replace(f"{prefix}.idx.{suffix}", prefix + ".idx.new")
    os.replace(f"{prefix}.bin.{suffix}", prefix + ".bin.new")
    settle(prefix)


def settle(prefix):
    """Finishes what publish began. Nothing that reads pairs ever sees a .bin beside an .idx that is not its own."""
    if os.path.exists(prefix + ".bin.new"):
        if os.path.exists(prefix + ".idx.new"):
            remove(prefix + ".bin")
            os.replace(prefix + ".idx.new", prefix + ".idx")
        os.replace(prefix + ".bin.new", prefix + ".bin")


def there(prefix):
    """Whether a valid pair is there, as a text; None if nothing is."""
    settle(prefix)
    names = [prefix + ending for ending in (".bin", ".idx") if os.path.exists(prefix + ending)]
    if not names:
        return None
    try:
        index = Index(prefix + ".bin", prefix + ".idx")
    except (Fail, OSError) as error:
        raise Fail(f"{' and '.join(names)}: there, but no valid pair: {error} (--force replaces it)")
    return f"{index}: there already, and whole"


class Documents:
    """The pair PREFIX, and with --mask the pair PREFIX_mask beside it: 1 for each token of an answer, and for the 0 that
    ends it."""

    def __init__(self, prefix, masked):
        self.tokens = Writer(prefix)
        self.mask = Writer(prefix + "_mask", U8) if masked else None
        self.writers = [self.tokens] + ([self.mask] if masked else [])

    def add(self, ids, answers):
        self.tokens.add(ids)
        if self.mask:
            self.mask.add((b"\1" if answers else b"\0") * (len(ids) // 2))

    def end(self):
        self.tokens.end()
        if self.mask:
            self.mask.end(b"\1")

    def move_last(self, other):
        for mine, its in zip(self.writers, other.writers):
            its.add(mine.take_last())
        other.end()

    def publish(self):                                          # the mask first: tokens are never without theirs
        for writer in reversed(self.writers):
            publish(writer.prefix, "tmp")


def write_pairs(args, pieces, progress, prefix, val):
    """Tokenizes pieces into the pair PREFIX and, if val > 0, PREFIX_validation: each document but the first falls there
    with probability val, and if none did, the last one."""
    sets = []
    try:
        for name in (prefix, prefix + "_validation")[:2 if val > 0 else 1]:
            sets.append(Documents(name, args.mask))
        train, valid = sets[0], sets[-1]
        draw, document, into, answers = random.Random(args.seed), 0, None, False
        function, processes = (encode_unit_bytes, 1) if args.bytes else (encode_unit, args.processes)
        for ids, counts, n_bytes, ends_inside in in_order(function, units(pieces, args.bytes, progress), processes):
            view, at = memoryview(ids), 0
            for count, ends in counts:
                into = into or (valid if document > 0 and draw.random() < val else train)
                into.add(view[at:at + 2 * count], answers)
                at += 2 * count
                answers = ends == PROMPT_ENDS or (answers and not ends)
                if ends and not answers:
                    into.end()
                    into, document = None, document + 1
            progress.add(n_bytes, at // 2)
            progress.ends += ends_inside
        if document == 0:
            raise Fail("no document has any text in it: nothing to write")
        if val > 0 and document > 1 and valid.tokens.documents == 0:
            train.move_last(valid)
        if valid.tokens.documents == 0:                         # one document: an older run's set has no part in this
            sets.pop()
            for writer in valid.writers:
                writer.discard()
                remove(writer.prefix + ".bin")
                remove(writer.prefix + ".idx")
        for documents in sets:
            for writer in documents.writers:
                writer.finish()
        seconds = progress.done()
        for documents in reversed(sets):
            documents.publish()
    except BaseException:
        for documents in sets:
            for writer in documents.writers:
                writer.discard()
        raise
    for documents in sets:
        for writer in documents.writers:
            writer.close()
            say(f"{writer.prefix}: {many(writer.tokens, 'token')} in {many(writer.documents, 'document')}")
    left_out = [many(n, what) for n, what in ((progress.skipped, "broken record"),
                                              (progress.empty, "document without text"),
                                              (progress.marks, "byte order mark"),
                                              (progress.returns, "carriage return")) if n]
    say(f"{size_text(progress.bytes)} of text in {seconds:.1f} s: {progress.bytes / 1e6 / seconds:.1f} MB/s"
          + (f"; left out: {', '.join(left_out)}" if left_out else ""))
    if progress.ends:
        say(f"<|endoftext|> stands in the text {many(progress.ends, 'time')}: it became token 0, as at a document's end")
    return sets


# ----------------------------------------------------------------------------------------------------------------------
# 4. Fetching

class Redirects(urllib.request.HTTPRedirectHandler):
    """Remembers the file's SHA-256, which the host tells as it sends us on to where the file lies."""
    sha256 = None

    def redirect_request(self, request, fp, code, message, headers, url):
        self.sha256 = sha256_of(headers) or self.sha256
        return super().redirect_request(request, fp, code, message, headers, url)


def sha256_of(headers):
    tag = (headers.get("X-Linked-ETag") or headers.get("ETag") or "").strip('W/"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else None


def size_of(reply):
    """The whole file's size, as a reply announces it; None if it does not."""
    size = (reply.headers.get("Content-Range", "").rpartition("/")[2] if reply.status in (206, 416)
            else reply.headers.get("Content-Length", ""))
    return int(size) if size.isdigit() else None


def fetch(url, path, expected=None):
    """Fetches url into path, going on from what is there. expected: the size it must have."""
    out, progress, failures = open_locked(path), Progress(f"fetching {os.path.basename(url)}"), 0
    progress.where = lambda: out.seek(0, os.SEEK_END)
    progress.begin_at = progress.where()
    while True:
        have, redirects = progress.where(), Redirects()
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            try:
                reply = urllib.request.build_opener(redirects).open(request, timeout=30)
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (408, 416, 429):
                    raise Fail(f"{url}: {error.code} {error.reason}", 1)
                if error.code != 416:
                    raise
                reply = error                                   # 416: it has nothing from there on
            with reply:
                sha256, progress.total = redirects.sha256 or sha256_of(reply.headers), size_of(reply)
                if progress.total is None or expected not in (None, progress.total):
                    raise Fail(f"{url}: size: expected {expected or 'to be told'}, found {progress.total}")
                if reply.status == 200 or have > progress.total:        # it sends all, or ours is another file's
                    out.truncate(0)
                disk_needs(path, progress.total - progress.where())
                while reply.status != 416 and (block := reply.read(BLOCK)):
                    append(out, block)
                    progress.add(len(block))
                    failures = 0
            if progress.where() == progress.total:
                break
            raise ConnectionError(f"broke off at byte {progress.where():,} of {progress.total:,}")
        except (OSError, http.client.HTTPException) as error:
            failures += 1
            if failures == 5:
                raise Fail(f"{url}: {getattr(error, 'reason', error)} (run it again to go on from there)", 1)
            time.sleep(0.25 * 2 ** failures)
    progress.done()
    digest = hashlib.sha256()
    out.seek(0)
    while sha256 and (block := out.read(BLOCK)):
        digest.update(block)
    if sha256 and digest.hexdigest() != sha256:
        out.truncate(0)
        raise Fail(f"{url}: SHA-256: expected {sha256}, found {digest.hexdigest()}")
    out.close()


def append(out, block):
    try:
        out.write(block)
        out.flush()
    except OSError as error:                                    # no trouble of the network, so not tried again
        raise Fail(f"{out.name}: {error.strerror}", 1)


def fetch_pair(prefix, processes):
    """The tokenized corpus. The index comes first: it knows the size of the rest."""
    idx, tokens = prefix + ".idx.part", prefix + ".bin.part"
    if os.path.exists(prefix + ".idx.new") and not os.path.exists(idx):
        os.replace(prefix + ".idx.new", idx)                    # we were killed as we began to publish
    url = f"{HOST}/{TOKENIZED}"
    try:
        fetch(url + ".idx", idx)
        index = Index(None, idx)
        fetch(url + ".bin", tokens, index.tokens * index.width)
        verify(tokens, idx, processes)
    except Fail as error:
        if error.code == 2:                                     # the two don't fit: fetch them anew, next time
            remove(idx)
            if os.path.exists(tokens) and os.path.getsize(tokens) == index.tokens * index.width:
                remove(tokens)
        raise Fail(str(error), 1)
    publish(prefix, "part")
    say(f"{Index(prefix + '.bin', prefix + '.idx')}: fetched")


# ----------------------------------------------------------------------------------------------------------------------
# 5. Checking

class Index:
    """PREFIX.idx, checked against itself and, if given, the size of PREFIX.bin."""

    def __init__(self, bin_path, idx_path):
        self.path = idx_path
        with open(idx_path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            self.expect(idx_path, "size", size >= 42, "42 or more", size)
            idx = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        self.expect(idx_path, "magic", idx[:9] == MAGIC, "MMIDIDX", bytes(idx[:9]))
        version, self.code, n, marks = struct.unpack("<QBQQ", idx[9:34])
        self.expect(idx_path, "version", version == 1, 1, version)
        self.expect(idx_path, "data type", self.code in TYPE_LETTER, "1, 2, 3, 4, 5 or 8", self.code)
        self.expect(idx_path, "document marks", marks >= 1, "1 or more", marks)
        self.expect(idx_path, "size", size == 34 + 12 * n + 8 * marks, 34 + 12 * n + 8 * marks, size)
        self.letter, self.documents, self.empty = TYPE_LETTER[self.code], marks - 1, 0
        self.width = array.array(self.letter).itemsize
        self.sizes, self.offsets, self.marks = (idx[34:34 + 4 * n].cast("i"), idx[34 + 4 * n:34 + 12 * n].cast("q"),
                                                idx[34 + 12 * n:].cast("q"))
        offset = mark = 0
        for i, (length, found) in enumerate(zip(self.sizes, self.offsets)):
            if length < 0 or found != offset:
                self.expect(idx_path, f"sizes[{i}]", length >= 0, "0 or more", length)
                self.expect(idx_path, f"offsets[{i}]", False, offset, found)
            offset += length * self.width
        for i, found in enumerate(self.marks):
            low, high = (mark, n) if i else (0, 0)              # a document: sequences, one as a rule, or none
            if not low <= found <= high:
                self.expect(idx_path, f"documents[{i}]", False, f"{low} to {high}", found)
            mark = found
        self.expect(idx_path, "documents", mark == n, f"marks up to the last sequence, {n}", f"them to end at {mark}")
        self.tokens = offset // self.width
        if bin_path:
            found = os.path.getsize(bin_path)
            self.expect(bin_path, "size", found == offset, offset, found)

    @staticmethod
    def expect(path, field, right, expected, found):
        if not right:
            raise Fail(f"{path}: {field}: expected {expected}, found {found}")

    def __str__(self):
        name = self.path.rpartition(".idx")[0]
        return f"{name}: {many(self.tokens, 'token')} in {many(self.documents, 'document')}"

    def document(self, i):
        """Its first token and the one after its last."""
        begin, last = self.marks[i], self.marks[i + 1] - 1
        if begin > last:
            return 0, 0
        return self.offsets[begin] // self.width, self.offsets[last] // self.width + self.sizes[last]


def count_ids(stretch):
    path, letter, offset, n_bytes = stretch
    with open(path, "rb") as f:
        f.seek(offset)
        return collections.Counter(memoryview(f.read(n_bytes)).cast(letter))


def verify(bin_path, idx_path, processes):
    """Looks at all of a pair. Returns its index, its tokens (the mapped file), how often each id is in it."""
    index = Index(bin_path, idx_path)
    if index.tokens == 0:
        raise Fail(f"{bin_path}: no tokens")
    n_bytes, stretch, counts = index.tokens * index.width, 1 << 23, collections.Counter()
    stretches = ((bin_path, index.letter, at, min(stretch, n_bytes - at)) for at in range(0, n_bytes, stretch))
    progress = Progress(f"checking {os.path.basename(bin_path)}", n_bytes)
    progress.where = lambda: progress.bytes
    for found in in_order(count_ids, stretches, processes):
        counts.update(found)
        progress.add(sum(found.values()) * index.width)
    progress.done()
    with open(bin_path, "rb") as f:
        tokens = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)).cast(index.letter)
    if min(counts) < 0 or max(counts) > LAST_ID:
        wrong = next(i for i, token in enumerate(tokens) if not 0 <= token <= LAST_ID)
        raise Fail(f"{bin_path}: token[{wrong}]: expected 0 to {LAST_ID}, found {tokens[wrong]}")
    for i in range(index.documents):
        begin, end = index.document(i)
        index.empty += begin == end
        if begin < end and tokens[end - 1] != 0:
            raise Fail(f"{bin_path}: document {i}: expected a 0 at its end, found {tokens[end - 1]} (token {end - 1})")
    return index, tokens, counts


def magic_prime(tokens, ctx_len):
    """The largest prime P = 2 (mod 3) with P samples of ctx_len + 1 tokens: the trainer's sampler runs modulo P."""
    for p in range((tokens - 1) // ctx_len, 1, -1):
        if p % 3 == 2 and all(p % q for q in range(2, math.isqrt(p) + 1)):
            return p
    return None


def check(prefix, args):
    settle(prefix)
    index, tokens, counts = verify(prefix + ".bin", prefix + ".idx", args.processes)
    vocabulary = {0: END_OF_TEXT, **{b + 1: bytes([b]) for b in range(256)}}
    if max(counts) > 256:
        vocabulary = load_vocabulary()
    kind = ("u" if index.letter.isupper() else "i") + str(8 * index.width)
    say(f"{index}{f', {index.empty} of them empty' if index.empty else ''}; {kind}, ids {min(counts)} to {max(counts)}")
    if vocabulary:
        closing = index.documents - index.empty
        text = index.tokens - closing
        n_bytes = sum(n * len(vocabulary[token]) for token, n in counts.items()) - closing * len(END_OF_TEXT)
        say(f"{many(n_bytes, 'byte')} of text, {n_bytes / max(text, 1):.3f} per token, closing 0s not counted")
    prime = magic_prime(index.tokens, args.ctx_len)
    say(f"magic prime for --model.ctx_len {args.ctx_len}: {prime or 'none, that is too little text'}")
    for i in sorted({0, index.documents // 2, index.documents - 1}):
        begin, end = index.document(i)
        ids = tokens[begin:max(begin, min(end - 1, begin + 64))].tolist()
        shown = b"".join(map(vocabulary.get, ids)).decode(errors="replace")[:80] if vocabulary else ids
        say(f"document {i}, {many(end - begin, 'token')}: {shown!r}")
    say(f"{prefix}: valid")


# ----------------------------------------------------------------------------------------------------------------------
# 6. main

def from_files(args):
    inputs = find_inputs(args.files)
    for ending, package in ((".parquet", "pyarrow"), (".zst", "zstandard")):
        if any(path.endswith(ending) for path in inputs):
            require(package, package)
    if args.mask and not all((file_kind(path) or args.format) == "jsonl" if path != "-" else args.format == "jsonl"
                             for path in inputs):
        raise Fail("--mask takes .jsonl alone, each line an object with texts in the fields prompt and answer")
    prefixes = (args.output, args.output + "_validation")[:2 if args.val > 0 else 1]
    for prefix in [prefix + ending for prefix in prefixes for ending in ("", "_mask")[:2 if args.mask else 1]]:
        found = None if args.force else there(prefix)
        if found:
            raise Fail(f"{found}; --force replaces it")
    total = sum(os.path.getsize(path) for path in inputs if path != "-")
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    if args.bytes and all(path != "-" and file_kind(path) in ("txt", None) for path in inputs):
        disk_needs(args.output + ".bin", 2 * total)
    if not args.bytes:
        write_vocabulary()
    progress = Progress("tokenizing", total if "-" not in inputs else 0)
    sets = write_pairs(args, Source(args, progress).files(inputs), progress, args.output, args.val)
    flags = f"--train.data_file {args.output}" + (" --model.vocab_size 320" if args.bytes else "")
    flags += f" --train.mask_file {args.output}_mask" if args.mask else ""
    if len(sets) == 2:
        flags += f" --train.validation_data_file {args.output}_validation"
        flags += f" --train.validation_mask_file {args.output}_validation_mask" if args.mask else ""
    say(f"./train_goldfinch {flags}")


def minipile(args):
    require("datasets", "datasets")
    write_vocabulary()
    for prefix, split in ((args.output + "_validation", "validation"), (args.output, "train")):
        found = None if args.force else there(prefix)
        if found:
            say(found)
        elif split == "train" and not args.retokenize:
            fetch_pair(prefix, args.processes)
        else:
            progress = Progress(f"tokenizing {RAW}, {split}")
            write_pairs(args, Source(args, progress).data_set(split), progress, prefix, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)
    option = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    option("files", nargs="*", metavar="FILE", help="what to tokenize (none: minipile)")
    option("-o", "--output", metavar="PREFIX", help="where to: PREFIX.bin and PREFIX.idx")
    option("--val", type=float, default=0.01, metavar="PART", help="part of the documents for PREFIX_validation (0.01)")
    option("--seed", type=int, default=1, help="of the choice of these (1)")
    option("--field", default="text", help='the field of .jsonl and .parquet to take ("text")')
    option("--mask", action="store_true", help='of .jsonl with "prompt" and "answer", mark what the trainer is to learn')
    option("--split", metavar="STRING", help=r'ends documents in a text, as in --split "\n\n"')
    option("--format", choices=("txt", "jsonl"), help="of standard input or of files with other endings (txt)")
    option("--bytes", action="store_true", help="byte-level ids, byte + 1, in place of the RWKV World vocabulary")
    option("--skip-bad", action="store_true", help="leave out and count lines that are broken UTF-8 or JSON")
    option("--force", action="store_true", help="replace an output that exists")
    option("--retokenize", action="store_true", help="make minipile's training set from the raw data set too")
    option("--processes", type=int, default=cores, help=f"that tokenize (default: one a core, {cores})")
    option("--check", metavar="PREFIX", help="verify PREFIX.bin and PREFIX.idx")
    option("--ctx-len", type=int, default=512, help="for which --check prints the magic prime (512)")
    args = parser.parse_intermixed_args()
    try:
        if args.processes < 1 or args.ctx_len < 1 or not 0 <= args.val < 1:
            raise Fail("--processes and --ctx-len are at least 1, --val is from 0 to below 1")
        if args.check:
            if args.files:
                raise Fail("--check takes one PREFIX and no FILE")
            check(args.check, args)
            return
        if args.files and not args.output:
            raise Fail("FILE needs -o PREFIX, as in -o data/mine")
        if args.mask and not args.files:
            raise Fail("--mask needs a FILE of prompts and answers")
        if args.bytes and not args.files:
            raise Fail("--bytes needs a FILE: minipile comes tokenized with the RWKV World vocabulary")
        if not args.bytes:
            require("pyrwkv_tokenizer", "pyrwkv-tokenizer")
        args.output = args.output or "data/minipile"
        (from_files if args.files else minipile)(args)
    except Fail as error:
        code, message = error.code, error
    except OSError as error:
        code = 2 if isinstance(error, FileNotFoundError) else 1
        message = f"{error.filename or args.output or args.check}: {error.strerror or error}"
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    else:
        return
    sys.stderr.write(("\r\x1b[K" if sys.stderr.isatty() else "") + f"prepro_minipile.py: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
