#!/usr/bin/env bash
# A `device_map` may hold `torch.device` objects, says transformers' documentation. With some layers on "disk", a model
# loads with `torch.device("cpu")` for the rest, and fails at its first forward pass: accelerate hands the object on to
# `safetensors.safe_open`, which takes names of devices only. With "cpu" in its place the same model runs.
#
# Seen with transformers 5.23.0, accelerate 1.15.0, safetensors 0.8.0, torch 2.13.0. Exits with 0 while that is so,
# otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 torch==2.13.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import importlib.metadata
import sys
import tempfile

import torch
import transformers

path = sys.argv[1]
config = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
)
transformers.LlamaForCausalLM(config).save_pretrained(path)
ids = torch.arange(8)[None]


def outcome(here):
    places = {name: here for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, device_map={**places, "model.layers.1": "disk"}, offload_folder=tempfile.mkdtemp(dir=path)
    )
    try:
        return str(tuple(model(ids).logits.shape))
    except Exception as error:
        return f"{type(error).__module__}.{type(error).__name__}: {error}"


for package in ("transformers", "accelerate", "safetensors", "torch"):
    print(package, importlib.metadata.version(package))
name, device = outcome("cpu"), outcome(torch.device("cpu"))
print('with "cpu":', name)
print('with torch.device("cpu"):', device)
sys.exit(0 if name == "(1, 8, 64)" and "SafetensorError" in device else 1)
PYTHON
