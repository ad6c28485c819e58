"""The configuration of DepthLM.

This file, `modeling_depthlm.py` and `presets_depthlm.py` import only transformers and one another. They are saved with
a model, so that it loads without depthscope installed.
"""

import difflib
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.utils import logging

from .presets_depthlm import PRESETS

logger = logging.get_logger(__name__)

NORM_PLACEMENTS = ("pre", "post", "peri", "mix", "output")
NORM_SCALINGS = ("none", "depth")
QK_NORMS = (None, "head", "full")
ATTENTION_TYPES = ("full_attention", "sliding_attention")
# Options of older configuration files, which are not misspelt options of ours.
_LEGACY_OPTIONS = ("rope_theta", "rope_scaling", "num_local_experts")


@strict
class DepthLMConfig(LlamaConfig):
    r"""Configuration of [`DepthLMModel`] and [`DepthLMForCausalLM`].

    A Llama-style decoder with options that change how much its deep layers contribute. Other options are those of
    [`LlamaConfig`]. Layers count from 0. The defaults are the dense 1B model of "When Does Sparsity Mitigate the
    Curse of Depth in LLMs" (arXiv 2603.15389).

    Args:
        num_key_value_heads (`int`, *optional*): heads of keys and values; must divide `num_attention_heads`. The same
            number (the default) is multi-head attention, fewer is grouped-query, 1 is multi-query attention.
        head_dim (`int`, *optional*): width of one head, even; `hidden_size / num_attention_heads` by default.
        qk_norm (`str`, *optional*): RMSNorm of queries and keys before the rotation: "head" over each head by itself
            (Qwen3), "full" over all heads together (OLMo 2, OLMoE), or `None`.
        sliding_window (`int`, *optional*): tokens that a sliding layer sees, itself included.
        layer_types (`list[str]`, *optional*): "full_attention" or "sliding_attention" for each layer. By default every
            layer slides where `sliding_window` is given, and none otherwise.
        num_experts (`int`, *optional*): experts of each mixture-of-experts layer; `None` is a dense model.
        num_experts_per_tok (`int`, defaults to 8): experts per token.
        moe_intermediate_size (`int`, *optional*): hidden width of one expert; `intermediate_size` by default.
        shared_expert_intermediate_size (`int`, *optional*): hidden width of an expert for all tokens, added
            without a gate; none by default.
        moe_layers (`str`, `int` or `list[int]`, defaults to `"all"`): which layers have experts: "all", a number n for
            every n-th (layers n-1, 2n-1, ...), or their indices. The others have a dense MLP of `intermediate_size`.
        norm_topk_prob (`bool`, defaults to `False`): make the weights of a token's experts sum to 1.
        router_aux_loss_coef (`float`, defaults to 0.01): weight of the load-balancing loss (Switch Transformer,
            eq. 4-6), the mean over layers. As transformers computes it: `num_experts_per_tok` where the load is even.
        router_z_loss_coef (`float`, defaults to 0.001): weight of the router z-loss (ST-MoE, eq. 5), the mean over
            layers.
        output_router_logits (`bool`, defaults to `False`): return the router logits, and the two router losses also in
            evaluation. In training both are always part of the loss.
        norm_placement (`str`, defaults to `"pre"`): the place of the RMSNorms of a sublayer F. "pre": `x + F(norm(x))`;
            "post": `norm(x + F(x))`; "peri": `x + norm(F(norm(x)))`; "output": `x + norm(F(x))` (OLMo 2); "mix": the
            first `mix_post_layers` layers "post" and the rest "pre" (Mix-LN, arXiv 2412.13795). A final norm follows in
            all of them.
        mix_post_layers (`int`, *optional*): number of Post-LN layers of "mix"; a quarter of the layers by default.
        norm_scaling (`str`, defaults to `"none"`): "depth" multiplies the output of each norm that precedes a sublayer
            by `1 / sqrt(l + 1)` (LayerNorm Scaling, arXiv 2502.05795); for "pre" and "peri" only.
        depth_scaled_init (`bool`, defaults to `False`): initialise the output projections of the sublayers with a
            standard deviation of `initializer_range / sqrt(2 * num_hidden_layers)` (GPT-2) instead of
            `initializer_range`.
        kept_layers (`list[int]`, *optional*): of a model that layers were cut out of, the number that each layer had
            before; LayerNorm Scaling goes on with those.

    Raises `huggingface_hub.errors.StrictDataclassError`, with the allowed values, for a value of the wrong type or an
    impossible combination.
    """

    model_type = "depthlm"
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}
    base_model_ep_plan: ClassVar[dict[str, str]] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 50304
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    max_position_embeddings: int = 4096
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    qk_norm: str | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    num_experts: int | None = None
    num_experts_per_tok: int = 8
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    moe_layers: str | int | list[int] = "all"
    norm_topk_prob: bool = False
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    output_router_logits: bool = False
    norm_placement: str = "pre"
    mix_post_layers: int | None = None
    norm_scaling: str = "none"
    depth_scaled_init: bool = False
    kept_layers: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_misspelt(kwargs, self.__dataclass_fields__)
        _require_positive(self, "num_hidden_layers", "hidden_size", "num_attention_heads")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}): change one of them, or give head_dim."
            )
        if self.num_experts is not None and self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.norm_placement == "mix" and self.mix_post_layers is None:
            self.mix_post_layers = max(1, self.num_hidden_layers // 4)
        if self.layer_types is None:
            attention = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [attention] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = _tensor_parallel_plan(self)
        if self.depth_scaled_init and self.norm_scaling == "depth":
            logger.warning(
                "norm_scaling='depth' loses its effect with depth_scaled_init=True, which also shrinks the output of "
                "deep layers (arXiv 2502.05795): use a plain normal initialisation instead."
            )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DepthLMConfig":
        """The configuration of a preset (`depthscope.models.PRESETS` lists them), with `overrides` of its values.

        Raises `ValueError` for an unknown preset.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}. The presets are: {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def moe_layer_indices(self) -> list[int]:
        """The layers that have experts, in order; empty for a dense model."""
        if self.num_experts is None:
            return []
        if self.moe_layers == "all":
            return list(range(self.num_hidden_layers))
        if isinstance(self.moe_layers, int):
            return list(range(self.moe_layers - 1, self.num_hidden_layers, self.moe_layers))
        return sorted(self.moe_layers)

    def norm_placement_of(self, layer: int) -> str:
        """The norm placement of one layer: `norm_placement`, with "mix" resolved to "post" or "pre"."""
        if self.norm_placement != "mix":
            return self.norm_placement
        return "post" if layer < self.mix_post_layers else "pre"

    def norm_factor_of(self, layer: int) -> float:
        """The factor on the output of the norms before the sublayers: 1, or LayerNorm Scaling's factor."""
        number = layer if self.kept_layers is None else self.kept_layers[layer]
        return (number + 1) ** -0.5 if self.norm_scaling == "depth" else 1.0

    def validate_architecture(self) -> None:
        """Refuse impossible combinations, with the allowed values (called by `@strict` after construction)."""
        _validate_names(self)
        _validate_kept_layers(self.kept_layers, self.num_hidden_layers)
        _validate_attention(self)
        _validate_norms(self)
        if self.num_experts is None:
            _validate_dense(self)
        else:
            _validate_experts(self)


def _tensor_parallel_plan(config: DepthLMConfig) -> dict[str, str]:
    """The split of a layer's weights by `tp_plan="auto"`, by the names of the weights that the model has."""
    # A norm over all heads together needs them on one device.
    gather = config.qk_norm == "full"
    plan = {f"self_attn.{name}_proj": "colwise_gather_output" if gather else "colwise" for name in ("q", "k", "v")}
    plan["self_attn.o_proj"] = "rowwise_split_input" if gather else "rowwise"
    if config.qk_norm == "head":
        plan |= {
            "self_attn.q_norm": "replicated_with_grad_allreduce",
            "self_attn.k_norm": "replicated_with_grad_allreduce",
        }
    mlp = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    if config.num_experts is None or config.moe_layers not in ("all", 1):
        plan |= {f"mlp.{name}": style for name, style in mlp.items()}
    if config.num_experts is not None:
        plan |= {
            "mlp.experts.gate_up_proj": "packed_colwise",
            "mlp.experts.down_proj": "rowwise",
            "mlp.experts": "moe_tp_experts",
        }
        if config.shared_expert_intermediate_size is not None:
            plan |= {f"mlp.shared_expert.{name}": style for name, style in mlp.items()}
    return {f"layers.*.{name}": style for name, style in plan.items()}


def _refuse_misspelt(options: dict[str, Any], known: Any) -> None:
    """Refuse an unknown option with nearly the name of a known one; transformers would keep it as an attribute."""
    known = [*known, *_LEGACY_OPTIONS]
    for name in options:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if near and name not in known and not hasattr(PreTrainedConfig, name):
            raise ValueError(f"DepthLMConfig has no option {name!r}: did you mean {near[0]!r}?")


def _require_positive(config: DepthLMConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def _require_one_of(config: DepthLMConfig, name: str, allowed: tuple) -> None:
    if getattr(config, name) not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name} must be one of {choices}, got {getattr(config, name)!r}.")


def _validate_names(config: DepthLMConfig) -> None:
    _require_one_of(config, "norm_placement", NORM_PLACEMENTS)
    _require_one_of(config, "norm_scaling", NORM_SCALINGS)
    _require_one_of(config, "qk_norm", QK_NORMS)
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {config.hidden_act!r}.")


def _validate_kept_layers(kept: list[int] | None, layers: int) -> None:
    if kept is not None and (len(kept) != layers or sorted(set(kept)) != kept or kept[0] < 0):
        raise ValueError(
            f"kept_layers must hold a number from 0 for each of the {layers} layers, in rising order; got {kept}."
        )


def _validate_attention(config: DepthLMConfig) -> None:
    _require_positive(
        config, "vocab_size", "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"
    )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"num_key_value_heads must divide num_attention_heads ({heads}): one of {divisors}, got {kv_heads}."
        )
    if config.head_dim % 2:
        raise ValueError(
            f"head_dim must be even, because rotary embeddings rotate pairs of features; got {config.head_dim}."
        )
    if not 0 <= config.attention_dropout < 1:
        raise ValueError(f"attention_dropout must be at least 0 and below 1, got {config.attention_dropout}.")
    unknown = set(config.layer_types) - set(ATTENTION_TYPES)
    if unknown:
        raise ValueError(f"layer_types may hold {' and '.join(ATTENTION_TYPES)}, got {', '.join(sorted(unknown))}.")
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        raise ValueError(
            "layer_types has sliding layers: give sliding_window, the number of tokens that they attend to."
        )


def _validate_norms(config: DepthLMConfig) -> None:
    if config.norm_scaling == "depth" and config.norm_placement not in ("pre", "peri"):
        raise ValueError(
            "norm_scaling='depth' scales the norm that precedes each sublayer, and norm_placement="
            f"{config.norm_placement!r} has layers without one: use 'pre' or 'peri', or norm_scaling='none'."
        )
    if config.norm_placement == "mix":
        if not 1 <= config.mix_post_layers < config.num_hidden_layers:
            raise ValueError(
                f"mix_post_layers must be from 1 to {config.num_hidden_layers - 1} (num_hidden_layers - 1), "
                f"got {config.mix_post_layers}."
            )
    elif config.mix_post_layers is not None:
        raise ValueError(f"mix_post_layers is for norm_placement='mix', got norm_placement={config.norm_placement!r}.")


def _validate_dense(config: DepthLMConfig) -> None:
    _require_positive(config, "intermediate_size")
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} is for models with experts: give num_experts too, or leave it out.")
    if config.moe_layers != "all":
        raise ValueError("moe_layers is for models with experts: give num_experts too, or leave it out.")


def _validate_experts(config: DepthLMConfig) -> None:
    _require_positive(
        config,
        "intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    )
    if config.num_experts_per_tok > config.num_experts:
        raise ValueError(
            f"num_experts_per_tok must be from 1 to num_experts ({config.num_experts}), "
            f"got {config.num_experts_per_tok}."
        )
    if config.mlp_bias:
        raise ValueError("mlp_bias=True is for dense models: experts have no biases.")
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must be 0 or more, got {getattr(config, name)}.")
    _validate_moe_layers(config.moe_layers, config.num_hidden_layers)


def _validate_moe_layers(chosen: str | int | list[int], layers: int) -> None:
    allowed = f"'all', a step from 1 to {layers}, or a list of different layers from 0 to {layers - 1}"
    if isinstance(chosen, str):
        valid = chosen == "all"
    elif isinstance(chosen, int):
        valid = 1 <= chosen <= layers
    else:
        valid = len(chosen) > 0 and len(set(chosen)) == len(chosen) and all(0 <= layer < layers for layer in chosen)
    if not valid:
        raise ValueError(f"moe_layers must be {allowed}; got {chosen!r}.")


DepthLMConfig.register_for_auto_class()

__all__ = ["DepthLMConfig"]
