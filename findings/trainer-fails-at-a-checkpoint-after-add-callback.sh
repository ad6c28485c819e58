#!/usr/bin/env bash
# A callback that keeps a state (here EarlyStoppingCallback) and is added to a Trainer while it trains works until the
# next checkpoint, where the training ends in a KeyError of the name of its class.
# One that is added before the training begins is kept as it should be.
#
# Seen with transformers 5.23.0, torch 2.13.0, accelerate 1.15.0. Exits with 0 while that is so, otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import sys

import torch
import transformers
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([1.0]))

    def forward(self, x, labels):
        return {"loss": (self.slope * x - labels).square().mean()}


class Adds(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            trainer.add_callback(EarlyStoppingCallback(50))


ROWS = [{"x": torch.tensor([1.0]), "labels": torch.tensor([0.0])}] * 16
found = {}
for when in ("before", "during"):
    args = TrainingArguments(
        output_dir=f"{sys.argv[1]}/{when}", max_steps=3, eval_strategy="steps", eval_steps=1, save_steps=2,
        per_device_train_batch_size=1, metric_for_best_model="loss", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(Line(), args, train_dataset=ROWS, eval_dataset=ROWS[:2])
    trainer.add_callback(EarlyStoppingCallback(50) if when == "before" else Adds())
    try:
        trainer.train()
        found[when] = "trained"
    except KeyError as error:
        found[when] = f"KeyError: {error}"
    print("transformers", transformers.__version__, "added", when, "the training:", found[when],
          sorted(os.listdir(f"{sys.argv[1]}/{when}")))  # fmt: skip
sys.exit(0 if found == {"before": "trained", "during": "KeyError: 'EarlyStoppingCallback'"} else 1)
PYTHON
