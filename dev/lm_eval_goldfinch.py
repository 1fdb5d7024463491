#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["lm_eval==0.4.13", "datasets==5.2.0"]
# ///
"""EleutherAI's evaluation harness on a model of ours: its tasks, flags and table; ./infer_goldfinch does the counting.

  python3 -m pip install lm_eval==0.4.13 datasets==5.2.0          # or: uv run dev/lm_eval_goldfinch.py ..
  python3 dev/lm_eval_goldfinch.py MODEL --tasks lambada_openai,piqa,hellaswag,arc_easy,arc_challenge,winogrande,sciq
  python3 dev/lm_eval_goldfinch.py MODEL --tasks mine --include_path folder/      # tasks of your own, in the harness's YAML
  python3 dev/lm_eval_goldfinch.py run --model goldfinch --model_args path=MODEL,prefix_ids=11 --tasks ..
  python3 dev/lm_eval_goldfinch.py ls tasks

Everything after MODEL is the harness's own; with `--batch_size N`, up to 32 (`auto`), tasks that generate go on with N
contexts at once. The last two lines are its whole command line, with our model known to it.
model_args: path; program (./infer_goldfinch), prefix_ids (0: what precedes a text without a context), kv, vocab.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from importlib import metadata

VERSION = "0.4.13"                                      # of the harness: others may call a model in other ways
PROGRAM = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "infer_goldfinch")


def stop(message):
    sys.exit(f"lm_eval_goldfinch.py: {message}")


try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ImportError as error:
    stop(f"the Python package {error.name} is missing: python3 -m pip install lm_eval=={VERSION} datasets==5.2.0")


@register_model("goldfinch")
class GoldFinch(LM):
    tokenizer_name = "goldfinch"                        # the harness names its cache of requests after it

    def __init__(self, path, program=PROGRAM, prefix_ids="0", kv="bf16", vocab=None, batch_size=1, **unused):
        super().__init__()
        batch = 32 if str(batch_size).startswith("auto") else batch_size
        flags = ["--requests", "-", "--prefix-ids", str(prefix_ids), "--kv", kv, "--batch", str(batch)]
        flags += ["--vocab", vocab] if vocab else []
        self.messages = tempfile.TemporaryFile()        # what the child says on stderr
        try:
            self.child = subprocess.Popen([program, path, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                          stderr=self.messages)
        except OSError as error:
            stop(f"{program}: {error.strerror}: `make infer` builds it")

    def failed(self, done, asked):
        code = self.child.wait()
        self.messages.seek(0)
        said = self.messages.read().decode(errors="replace").strip().splitlines()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        stop(f"infer_goldfinch ended ({how}) after {done} of {asked} answers" + (f": {said[-1]}" if said else ""))

    def send(self, lines):
        try:
            for line in lines:
                self.child.stdin.write(line)
            self.child.stdin.flush()
        except OSError:
            pass                                        # the child has ended: whoever reads its answers will say so

    def ask(self, requests, what, disable_tqdm=False):
        """The answers to requests, in their order. Those with the same context are asked one after another."""
        order = sorted(range(len(requests)), key=lambda i: requests[i].get("context", ""))
        lines = [json.dumps(dict(requests[i], id=i), ensure_ascii=False).encode("utf-8", "replace") + b"\n" for i in order]
        answers = [None] * len(requests)
        sender = threading.Thread(target=self.send, args=(lines,), daemon=True)
        sender.start()
        for done, i in enumerate(tqdm(order, desc=what, disable=disable_tqdm)):
            line = self.child.stdout.readline()
            if not line.endswith(b"\n"):
                self.failed(done, len(order))
            answer = json.loads(line)
            if "error" in answer or answer.get("id") != i:
                stop(f"{what}, request {i}: {answer.get('error', f'expected its answer, found {answer}')}")
            answers[i] = answer
        sender.join()
        return answers

    def loglikelihood(self, requests, disable_tqdm=False):
        asked = []
        for context, continuation in (request.args for request in requests):
            bare = context.rstrip()                     # as the harness's own models: spaces begin what follows
            asked.append({"context": bare, "continuation": context[len(bare):] + continuation})
        return [(a["logprob"], a["greedy"]) for a in self.ask(asked, "loglikelihood", disable_tqdm)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        asked = [{"text": request.args[0]} for request in requests]         # in one context, however long
        return [a["logprob"] for a in self.ask(asked, "loglikelihood_rolling", disable_tqdm)]

    def generate_until(self, requests, disable_tqdm=False):
        asked = []
        for number, (context, settings) in enumerate(request.args for request in requests):
            how = dict(normalize_gen_kwargs(settings, 256))
            request = {"context": context, "until": [text for text in how.pop("until") if text], "seed": number,
                       "max_tokens": how.pop("max_gen_toks"), "temperature": how.pop("temperature", 0)}
            if not how.pop("do_sample"):
                request["temperature"] = 0
            request.update({key: how.pop(key) for key in ("top_p", "top_k") if key in how})
            if how and how != {"num_beams": 1}:
                stop(f"generate_until: expected temperature, top_p, top_k, until and max_gen_toks, found {', '.join(how)}")
            asked.append(request)
        return [a["text"] for a in self.ask(asked, "generate_until", disable_tqdm)]


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    found = metadata.version("lm_eval")
    if found != VERSION:
        print(f"lm_eval_goldfinch.py: made for lm_eval {VERSION}, found {found}", file=sys.stderr)
    if sys.argv[1] not in ("run", "ls", "validate") and not sys.argv[1].startswith("-"):
        model = json.dumps({"path": sys.argv[1]})
        sys.argv[1:2] = ["run", "--model", "goldfinch", "--model_args", model]
    from lm_eval.__main__ import cli_evaluate
    cli_evaluate()


if __name__ == "__main__":
    main()
