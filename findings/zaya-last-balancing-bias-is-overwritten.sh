#!/usr/bin/env bash
# The routers of ZAYA have a buffer `balancing_biases`, which is saved with the model: training moves it to balance the
# experts. When the model is loaded, its last entry (that of the class that skips the experts) is -1 again, whatever the
# checkpoint holds, and tokens are routed otherwise: the code that initialises the buffer guards its zeros, which loading
# leaves alone, but not the assignment of the last entry. No message says so.
#
# Seen with transformers 5.23.0, torch 2.13.0. Exits with 0 while that is so, otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import importlib.metadata
import sys

import torch
import transformers

path = sys.argv[1]
torch.manual_seed(0)
config = transformers.AutoConfig.for_model(
    "zaya",
    hidden_size=32,
    num_hidden_layers=2,
    layer_types=["hybrid", "hybrid"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    moe_intermediate_size=16,
    router_hidden_size=32,
    vocab_size=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.2,
)
model = transformers.AutoModelForCausalLM.from_config(config).eval()
trained = torch.tensor([0.1, -0.2, 0.3, -0.1, 0.5])
with torch.no_grad():
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):
            buffer.copy_(trained)
model.save_pretrained(path)
loaded = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
found = [buffer for name, buffer in loaded.named_buffers() if name.endswith("balancing_biases")]
ids = torch.arange(3, 35)[None]
with torch.no_grad():
    difference = float((model(ids).logits - loaded(ids).logits).abs().max())
for package in ("transformers", "torch"):
    print(package, importlib.metadata.version(package))
print("saved: ", [round(value, 2) for value in trained.tolist()])
print("loaded:", [round(value, 2) for value in found[0].tolist()])
print(f"largest difference of logits: {difference:.3f}")
overwritten = all(torch.equal(each[:-1], trained[:-1]) and each[-1] == -1 for each in found)
sys.exit(0 if overwritten and difference > 0.01 else 1)
PYTHON
