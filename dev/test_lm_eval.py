#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["lm_eval==0.4.13", "datasets==5.2.0", "numpy"]
# ///
"""Tests of lm_eval_goldfinch.py: four tasks on local files, of each kind that the harness knows, their results held
against a count with a Llama in numpy, which shares no code with ours. Needs ./infer_goldfinch in fp32, no network.
"""

import json
import math
import os
import subprocess
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import numpy as np

from test_requests import check, counts, golden_model, weights

# The harness copies a YAML list of choices as it stands, without a word: one text that yields the list is filled in.
# Its few-shot examples put a space before a target: "" takes that away where targets begin with one.
TASKS = {
    "local_choice": """output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
""", "local_cloze": """output_type: loglikelihood
doc_to_text: "{{text.rsplit(' ', 1)[0]}}"
doc_to_target: "{{' ' + text.rsplit(' ', 1)[1]}}"
target_delimiter: ""
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false},
              {metric: acc, aggregation: mean, higher_is_better: true}]
""", "local_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""", "local_writing": """output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
TEXTS = ["The finch sat on the gold branch", "A recurrence forgets what a cache remembers", "Größe zählt nicht immer",
         "One line, then another.  Two spaces", "short one"]
DOCS = {
    "local_choice": [{"question": f"{text}?", "choices": ["yes", "no, never", text[:9] + " ", "no, éver"], "answer": i % 4}
                     for i, text in enumerate(TEXTS * 4)],
    "local_cloze": [{"text": text} for text in TEXTS],
    "local_rolling": [{"text": text * 3} for text in TEXTS],
    "local_writing": [{"text": text} for text in TEXTS],
}


class Llama:
    """Spec sections 1 to 4 for tmix and cmix llama, in float64."""

    def __init__(self):
        self.w = {}
        for line in open(os.path.join(HERE, "golden", "llama.txt"), encoding="utf-8"):
            words = line.split()
            if words[0] == "grad":
                shape = [int(n) for n in words[2].split("x")]
                self.w[words[1]] = np.array(weights(words[1], shape), dtype=np.float64).reshape(shape)

    def norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * self.w[name + ".weight"] + self.w[name + ".bias"]

    def heads(self, x):                                                 # (T, A) to (H, T, 64)
        return x.reshape(len(x), -1, 64).transpose(1, 0, 2)

    def turn(self, x):                                                  # rope
        angle = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(32) / 32)
        a, b, out = x[..., 0::2], x[..., 1::2], np.empty_like(x)
        out[..., 0::2], out[..., 1::2] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
        return out

    def logprobs(self, ids):                                            # (T, V): of what follows each token
        w, x = self.w, self.norm(self.w["emb.weight"][ids], "blocks.0.ln0")
        later = np.triu(np.ones((len(ids), len(ids)), bool), 1)
        for layer in range(3):
            att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
            n = self.norm(x, f"blocks.{layer}.ln1")
            q, k, v = (self.heads(n @ w[att + name].T) for name in ("wq.weight", "wk.weight", "wv.weight"))
            score = self.turn(q) @ self.turn(k).transpose(0, 2, 1) / 8
            p = np.exp(np.where(later, -np.inf, score - score.max(-1, keepdims=True)))
            out = (p / p.sum(-1, keepdims=True)) @ v
            x = x + out.transpose(1, 0, 2).reshape(len(ids), -1) @ w[att + "wo.weight"].T
            n = self.norm(x, f"blocks.{layer}.ln2")
            gate = n @ w[ffn + "w1.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (n @ w[ffn + "w3.weight"].T)) @ w[ffn + "w2.weight"].T
        z = self.norm(x, "ln_out") @ w["head.weight"].T
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    def score(self, context, continuation):
        """Sum of logarithms, and whether each token is the likeliest; after token 0 without a context."""
        before = [0] if not context else [b + 1 for b in context.encode()]
        ids = [b + 1 for b in continuation.encode()]
        p = self.logprobs(before + ids)[len(before) - 1:-1]
        return p[np.arange(len(ids)), ids].sum(), bool((p.argmax(-1) == ids).all())

    def write(self, context, until, most):
        ids, text = [b + 1 for b in context.encode()], b""
        for _ in range(most):
            p = self.logprobs(ids)[-1]
            ids.append(int(p[:257].argmax()))                           # the others have no text
            if ids[-1] == 0:
                break
            text += bytes([ids[-1] - 1])
            if any(stop.encode() in text for stop in until):
                return min((text.split(stop.encode())[0] for stop in until), key=len).decode("utf-8", "replace")
        return text.decode("utf-8", "replace")


def expected_results(llama):
    choice = [[llama.score(f"Q: {d['question']}\nA:", f" {c}")[0] for c in d["choices"]] for d in DOCS["local_choice"]]
    best = [int(np.argmax(s)) for s in choice]
    # per character, not per byte: the harness divides by len() of a Python string
    best_norm = [int(np.argmax(np.array(s) / [len(c) for c in d["choices"]])) for s, d in zip(choice, DOCS["local_choice"])]
    right = [d["answer"] for d in DOCS["local_choice"]]
    cloze = [llama.score(text.rsplit(" ", 1)[0].rstrip(), text[len(text.rsplit(" ", 1)[0].rstrip()):]) for text in TEXTS]
    rolling = [llama.score("", d["text"])[0] for d in DOCS["local_rolling"]]
    count = sum(len(d["text"].encode()) for d in DOCS["local_rolling"])
    return {"local_choice": {"acc": np.mean([a == b for a, b in zip(best, right)]),
                             "acc_norm": np.mean([a == b for a, b in zip(best_norm, right)])},
            "local_cloze": {"perplexity": math.exp(-np.mean([s for s, _ in cloze])),
                            "acc": np.mean([g for _, g in cloze])},
            "local_rolling": {"byte_perplexity": math.exp(-sum(rolling) / count),
                              "bits_per_byte": -sum(rolling) / count / math.log(2)}}, choice


def write_tasks(folder):
    for name, text in TASKS.items():
        data = os.path.join(folder, f"{name}.jsonl")
        with open(data, "w", encoding="utf-8") as out:
            out.writelines(json.dumps(doc) + "\n" for doc in DOCS[name])
        with open(os.path.join(folder, f"{name}.yaml"), "w", encoding="utf-8") as out:
            out.write(f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\ntest_split: train\n{text}")


def test_tasks(model, folder):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval_goldfinch import GoldFinch
    llama = Llama()
    found = simple_evaluate(model=GoldFinch(model), tasks=list(TASKS), bootstrap_iters=0,
                            task_manager=TaskManager(include_path=folder))
    expected, choice = expected_results(llama)
    for name, metrics in expected.items():
        for metric, value in metrics.items():
            got = found["results"][name][f"{metric},none"]
            check(f"{name}: {metric}", abs(got - value) <= 1e-5 * abs(value), f"{got} for {value}")
    asked = [[r[0] for r in s["filtered_resps"]] for s in sorted(found["samples"]["local_choice"], key=lambda s: s["doc_id"])]
    check("local_choice: each choice's logarithm", np.allclose(asked, choice, rtol=0, atol=1e-3), (asked[:2], choice[:2]))
    for sample in found["samples"]["local_writing"]:
        value = llama.write(sample["doc"]["text"], ["e", "\n"], 12)
        check(f"local_writing: after {sample['doc']['text']!r}", sample["filtered_resps"] == [value],
              (sample["filtered_resps"], value))


def test_batch(model, folder):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval_goldfinch import GoldFinch
    tasks = ["local_choice", "local_writing"]
    found = [simple_evaluate(model=GoldFinch(model, batch_size=n), tasks=tasks, bootstrap_iters=0,
                             task_manager=TaskManager(include_path=folder))["samples"] for n in (1, 3, "auto")]
    one, three, auto = ([s["filtered_resps"] for task in tasks for s in samples[task]] for samples in found)
    check("batch_size 3 and auto: the same answers as one by one", one == three == auto, (one, three, auto))


def test_command_line(model, folder):
    script = os.path.join(HERE, "lm_eval_goldfinch.py")
    flags = ["--tasks", "local_choice", "--include_path", folder]
    done = subprocess.run([sys.executable, script, model, *flags], capture_output=True, text=True)
    check("the harness's table", done.returncode == 0 and "|local_choice|" in done.stdout and "acc_norm" in done.stdout, done)
    again = subprocess.run([sys.executable, script, "run", "--model", "goldfinch", "--model_args", f"path={model}", *flags],
                           capture_output=True, text=True)
    table = done.stdout[done.stdout.find("|"):]
    check("--model goldfinch gives the same", table == again.stdout[again.stdout.find("|"):], again)
    def fails(what, expected, *arguments):
        done = subprocess.run([sys.executable, script, *arguments, *flags], capture_output=True, text=True, timeout=120)
        last = done.stderr.strip().splitlines()[-1]
        check(what, done.returncode == 1 and last.startswith("lm_eval_goldfinch.py: ") and expected in last and
              "Traceback" not in done.stderr, done.stderr[-800:])
    fails("a model that is not there is one clear error", "(exit code 2) after 0 of 80 answers: infer_goldfinch: nowhere",
          "nowhere.safetensors")
    fails("--batch_size reaches the program, which says that this model goes on with one context at a time",
          "answers: infer_goldfinch: --batch: expected a model of x060c2", model, "--batch_size", "3")
    fails("a program that is not there, too", "No such file", "run", "--model", "goldfinch", "--model_args",
          f"path={model},program=./nowhere")
    slow = os.path.join(folder, "slow.sh")                              # answers ten, then is killed
    with open(slow, "w", encoding="utf-8") as out:
        out.write(f'#!/bin/bash\nexec {os.path.join(os.path.dirname(HERE), "infer_goldfinch")} "$@" < <(head -n 10; '
                  'sleep 0.5; kill -9 $$; sleep 1)\n')
    os.chmod(slow, 0o755)
    fails("a killed child, too", "(killed by signal 9) after 10 of 80 answers", "run", "--model", "goldfinch", "--model_args",
          f"path={model},program={slow}")


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder                                  # where the harness keeps its copies
        model = os.path.join(folder, "llama.safetensors")
        rows, loss = golden_model("llama", model)
        llama = Llama()
        mean = -np.mean([llama.logprobs(row)[np.arange(len(row) - 1), row[1:]] for row in rows])
        check("the Llama in numpy has the golden table's loss", abs(mean - loss) < 1e-8, (mean, loss))         # weights rounded to fp32
        write_tasks(folder)
        test_tasks(model, folder)
        goldfinch = os.path.join(folder, "goldfinch.safetensors")
        golden_model("goldfinch", goldfinch)
        test_batch(goldfinch, folder)
        test_command_line(model, folder)
    print(f"{counts['passed']} passed, {counts['failed']} failed")
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
