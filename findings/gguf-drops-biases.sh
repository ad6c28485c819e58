#!/usr/bin/env bash
# transformers loads a GGUF file of the architecture `llama` without its attention biases and its rope scaling, and
# reports neither: no missing key, no unexpected key, no warning. llama.cpp uses both.
#
# Seen with transformers 5.23.0, gguf 0.19.0, torch 2.13.0. Exits with 0 while that is so, otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 gguf==0.19.0 torch==2.13.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder/llama.gguf" <<'PYTHON'
import sys

import gguf
import numpy as np
import transformers

path, width, heads = sys.argv[1], 32, 4
writer = gguf.GGUFWriter(path, "llama")
writer.add_block_count(1)
writer.add_context_length(64)
writer.add_embedding_length(width)
writer.add_feed_forward_length(width)
writer.add_head_count(heads)
writer.add_head_count_kv(heads)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_rope_dimension_count(width // heads)
writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
writer.add_rope_scaling_factor(4.0)
writer.add_vocab_size(64)
chance = np.random.default_rng(0)
names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
shapes = {"token_embd.weight": (64, width), "output.weight": (64, width), "output_norm.weight": (width,)}
shapes |= {f"blk.0.{name}.weight": (width, width) for name in names}
shapes |= {f"blk.0.{name}.weight": (width,) for name in ("attn_norm", "ffn_norm")}
shapes |= {f"blk.0.attn_{letter}.bias": (width,) for letter in "qkv"}
for name, shape in shapes.items():
    writer.add_tensor(name, chance.standard_normal(shape).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

folder = path.rsplit("/", 1)[0]
model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=path, output_loading_info=True)
attention = model.model.layers[0].self_attn
print("transformers", transformers.__version__)
print("stored biases:", [name for name in shapes if name.endswith("bias")], "and rope.scaling linear, factor 4")
print("loaded: q_proj.bias is", attention.q_proj.bias, "and rope_parameters are", model.config.rope_parameters)
print("reported:", {key: sorted(value) for key, value in info.items()})
dropped = attention.q_proj.bias is None and model.config.rope_parameters["rope_type"] == "default"
sys.exit(0 if dropped and not info["unexpected_keys"] else 1)
PYTHON
