#!/usr/bin/env bash
# In a task of EleutherAI's harness, templates in a YAML list of choices are not filled in: the model is asked how likely
# the literal text "{{good}}" is. One string that yields a list is filled in.
#
# Seen with lm_eval 0.4.13 and datasets 5.2.0, Python 3.11: `doc_to_choice: ["{{good}}", "{{bad}}"]` gives no error and no
# warning, and an accuracy as of any other task; `doc_to_choice: "{{[good, bad]}}"` asks for the texts of the columns.
#
# Prints what it saw; exit 0 if it is still so, 1 if that has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q lm_eval==0.4.13 datasets==5.2.0 || exit 2
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
cat >"$folder/rows.jsonl" <<'ROWS'
{"question": "Which of these is an animal?", "good": "a cat", "bad": "a stone"}
{"question": "Which of these is a plant?", "good": "a tree", "bad": "a boot"}
ROWS
task() {                                                # task NAME CHOICES: both differ in doc_to_choice alone
    cat >"$folder/$1.yaml" <<TASK
task: $1
dataset_path: json
dataset_kwargs: {data_files: {test: $folder/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: $2
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
TASK
}
task in_a_list '["{{good}}", "{{bad}}"]'
task in_a_string '"{{[good, bad]}}"'
"$folder/venv/bin/python" - "$folder" 2>"$folder/log.txt" <<'PY' || { code=$?; [ $code = 1 ] || cat "$folder/log.txt"; exit 1; }
import sys
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager


class Listener(LM):                                     # a model that remembers what it was asked
    def loglikelihood(self, requests):
        self.asked = [request.args[1] for request in requests]
        return [(-1.0, False)] * len(requests)

    loglikelihood_rolling = generate_until = None


asked = {}
for name in ("in_a_list", "in_a_string"):
    model = Listener()
    tasks = TaskManager(include_path=sys.argv[1], include_defaults=False)
    results = simple_evaluate(model=model, tasks=[name], task_manager=tasks, bootstrap_iters=0)["results"]
    asked[name] = model.asked
    print(f"{name}: asked for {model.asked}, acc {results[name]['acc,none']}")
same = asked == {"in_a_list": [" {{good}}", " {{bad}}"] * 2, "in_a_string": [" a cat", " a stone", " a tree", " a boot"]}
print("templates in a list stay as they are" if same else "this has changed")
sys.exit(0 if same else 1)
PY
