#!/usr/bin/env bash
# A Trainer with two callbacks of one class that keep a state (here two EarlyStoppingCallbacks) adds both states to
# trainer_state.json again at every checkpoint, after those of the start; one alone is replaced. Where the states are
# restored, the callbacks get the first of the list: those of the start, not those of the checkpoint.
#
# Seen with transformers 5.23.0, torch 2.13.0, accelerate 1.15.0. Exits with 0 while that is so, otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys

import torch
import transformers
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([1.0]))

    def forward(self, x, labels):
        return {"loss": (self.slope * x - labels).square().mean()}


ROWS = [{"x": torch.tensor([1.0]), "labels": torch.tensor([0.0])}] * 16


def trained(folder, count, **more):
    """Three evaluations, none better than the first at this learning rate of 0, so that the patience counts 2."""
    args = TrainingArguments(
        output_dir=folder, max_steps=3, learning_rate=0.0, eval_strategy="steps", eval_steps=1, save_steps=1,
        per_device_train_batch_size=1, metric_for_best_model="loss", load_best_model_at_end=False, report_to=[],
        disable_tqdm=True, use_cpu=True, **more,
    )  # fmt: skip
    callbacks = [EarlyStoppingCallback(50 + number) for number in range(count)]
    return Trainer(Line(), args, train_dataset=ROWS, eval_dataset=ROWS[:2], callbacks=callbacks)


def kept(folder, step):
    state = json.load(open(f"{folder}/checkpoint-{step}/trainer_state.json"))["stateful_callbacks"]
    found = state["EarlyStoppingCallback"]
    return [entry["attributes"]["early_stopping_patience_counter"] for entry in (found if type(found) is list else [found])]


found = {}
for count in (1, 2):
    folder = f"{sys.argv[1]}/{count}"
    trained(folder, count).train()
    found[count] = [kept(folder, step) for step in (1, 2, 3)]
    print(f"{count} callback(s): patience counters in checkpoints 1, 2, 3:", found[count])
again = trained(f"{sys.argv[1]}/2", 2, restore_callback_states_from_checkpoint=True)
counters = []
original = Trainer._load_callback_state


def loaded(self):
    original(self)
    callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    counters.extend(c.early_stopping_patience_counter for c in callbacks)


Trainer._load_callback_state = loaded
again.train(resume_from_checkpoint=f"{sys.argv[1]}/2/checkpoint-3")
print("transformers", transformers.__version__, "restores these counters from checkpoint 3:", counters)
grows = [len(entries) for entries in found[2]] == [4, 6, 8] and [len(entries) for entries in found[1]] == [1, 1, 1]
sys.exit(0 if grows and set(found[2][2][-2:]) != {0} and counters == [0, 0] else 1)
PYTHON
