"""Writing the settings of a GGUF file that transformers drops into the config, before the model is built.

transformers reads a few settings per architecture and leaves the others at its config's defaults, which are the values
of one checkpoint. For a setting that the file does not state, llama.cpp's default counts. `audit.py` checks the loaded
model against the file independently of this module.
"""

from typing import Any

from transformers import MixtralConfig, PretrainedConfig

from depthscope.errors import ModelLoadError
from depthscope.loading.gguf.header import GgufHeader
from depthscope.loading.gguf.rope import adopt_rope

__all__ = ["adopt_settings", "attention_scale", "first_of", "head_width", "window_layers"]

EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
# A setting that is copied unchanged -> its names in configs.
PLAIN = {
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "attention.head_count_kv": ("num_key_value_heads",),
}
ATTENTION_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_qkv.bias", "attn_output.bias")
MLP_BIASES = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
# The number of layers of the one size whose attention scale follows the model's width.
GEMMAS = {"gemma2": 46, "gemma3": 62}
WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6}
# Architectures whose layers with a window are known; llama.cpp calls Mistral a Llama without a window.
WINDOWED = ("llama", "phi3", "gemma2", "gemma3", "gpt-oss")
TIED_ALWAYS = ("bloom", "falcon")  # transformers ties them, whatever the file holds


def adopt_settings(config: PretrainedConfig, header: GgufHeader) -> PretrainedConfig:
    """The config with the settings of the file that transformers dropped; a Llama with experts gets Mixtral's config.

    Raises:
        ModelLoadError: the file holds an adapter.
    """
    if header.metadata.get("general.type") == "adapter":
        raise ModelLoadError(
            f"{header.name!r} is an adapter in GGUF form, without the model that it belongs to. Give that model, or "
            "the adapter as PEFT saves it."
        )
    setting = header.of_architecture
    if header.architecture == "llama" and setting("expert_count"):
        config = _as_mixtral(config, header)
    for key, names in PLAIN.items():
        value = setting(key)
        if value is not None and not isinstance(value, list):
            _set(config, names, value)
    epsilon = setting("attention.layer_norm_rms_epsilon") or setting("attention.layer_norm_epsilon")
    if epsilon is not None:
        _set(config, EPSILONS, epsilon)
    _adopt_shapes(config, header)
    _adopt_biases(config, header)
    _adopt_attention(config, header)
    adopt_rope(config, header, head_width(header))
    return config


def head_width(header: GgufHeader) -> int:
    """The width of an attention head in the file; 0 without attention."""
    heads = _largest(header.of_architecture("attention.head_count"))
    stated = _largest(header.of_architecture("attention.key_length"))
    return stated or (header.of_architecture("embedding_length") // heads if heads else 0)


def attention_scale(header: GgufHeader) -> float | None:
    """The file's factor of the products of queries and keys."""
    width = head_width(header)
    if stated := header.of_architecture("attention.scale"):
        return float(stated)
    if not width:
        return None
    if header.of_architecture("block_count") == GEMMAS.get(header.architecture or ""):
        width = header.of_architecture("embedding_length") // header.of_architecture("attention.head_count")
    return float(width**-0.5)


def window_layers(header: GgufHeader, layers: int) -> list[bool] | None:
    """Which layers attend within a window in the file; None if the architecture does not mix types of layers."""
    pattern = header.of_architecture("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return [bool(windowed) for windowed in pattern]
    usual = WINDOW_PERIODS.get(header.architecture or "")
    if usual is None:
        return None
    if header.architecture == "gemma3" and not header.of_architecture("attention.sliding_window"):
        return [False] * layers
    period = usual if pattern is None else int(pattern)
    return [index % period < period - 1 if period else False for index in range(layers)]


def first_of(config: PretrainedConfig, names: tuple[str, ...]) -> Any:
    """The value of the first of these fields that exists in the config, or None."""
    return next((getattr(config, name) for name in names if hasattr(config, name)), None)


def _set(config: PretrainedConfig, names: tuple[str, ...], value: Any) -> None:
    for name in names:
        if hasattr(config, name):
            setattr(config, name, value)
            return


def _largest(value: Any) -> int:
    """The number of heads or the width of all layers; the largest if they differ."""
    return max(value, default=0) if isinstance(value, list) else value or 0


def _adopt_shapes(config: PretrainedConfig, header: GgufHeader) -> None:
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    if shape := shapes.get("token_embd.weight"):
        config.vocab_size = shape[0]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value >= config.vocab_size:  # the default belongs to another vocabulary
            setattr(config, name, None)
    if header.architecture == "gpt2":
        config.n_inner = header.of_architecture("feed_forward_length")
        config.n_positions = shapes.get("position_embd.weight", (config.n_positions,))[0]
    is_derived = isinstance(getattr(type(config), "head_dim", None), property)
    if header.architecture != "gemma4" and hasattr(config, "head_dim") and not is_derived:
        config.head_dim = head_width(header)
    if header.architecture in TIED_ALWAYS and "output.weight" in shapes:
        config.tie_word_embeddings = _same_bytes(header, "output.weight", "token_embd.weight")


def _adopt_biases(config: PretrainedConfig, header: GgufHeader) -> None:
    ends = {tensor.name.split(".", 2)[-1] for tensor in header.tensors if tensor.name.startswith("blk.")}
    if ends & set(ATTENTION_BIASES):
        _set(config, ("attention_bias",), True)
    if ends & set(MLP_BIASES):
        _set(config, ("mlp_bias",), True)
    if header.architecture == "falcon":
        config.bias = "attn_qkv.bias" in ends


def _adopt_attention(config: PretrainedConfig, header: GgufHeader) -> None:
    window = header.of_architecture("attention.sliding_window")
    if header.architecture in WINDOWED and (window or header.architecture not in GEMMAS):
        _set(config, ("sliding_window",), window or None)
    if header.architecture not in GEMMAS:
        return
    scale = attention_scale(header)
    if scale and hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = round(scale**-2)
    windowed = window_layers(header, config.num_hidden_layers)
    if windowed is not None and hasattr(config, "layer_types"):
        config.layer_types = ["sliding_attention" if is_windowed else "full_attention" for is_windowed in windowed]


def _as_mixtral(config: PretrainedConfig, header: GgufHeader) -> PretrainedConfig:
    """llama.cpp calls Mixtral a Llama with experts; transformers has its own config and class for it."""
    shared = {
        key: value
        for key, value in config.to_dict().items()
        if key in MixtralConfig.__dataclass_fields__ and key not in ("model_type", "architectures")
    }
    experts = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
    counts = {name: header.of_architecture(key) for name, key in experts.items()}
    return MixtralConfig(**(shared | counts | {"sliding_window": None}))


def _same_bytes(header: GgufHeader, *names: str) -> bool:
    contents = []
    for tensor in header.tensors:
        if tensor.name in names:
            with tensor.path.open("rb") as file:
                file.seek(tensor.start)
                contents.append((tensor.kind, file.read(tensor.length)))
    return len(contents) == len(names) and all(content == contents[0] for content in contents)
