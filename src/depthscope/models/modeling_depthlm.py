"""DepthLM: a Llama-style decoder with grouped-query attention, experts, LayerNorm Scaling, and norms in several places.

The parts are transformers' own classes; this file combines them. It imports nothing from depthscope, because it is
saved with a model (`trust_remote_code=True`).
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeExperts,
    Qwen2MoeMLP,
    Qwen2MoePreTrainedModel,
    Qwen2MoeTopKRouter,
    load_balancing_loss_func,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Model
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.output_capturing import OutputRecorder, install_all_output_capturing_hooks

from .configuration_depthlm import DepthLMConfig

logger = logging.get_logger(__name__)

# The name of one expert's weight in a checkpoint.
_ONE_EXPERT = re.compile(r"(?P<experts>.*\.experts\.)(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.weight")

# Checkpoints hold one tensor per expert (like those of OLMoE and Qwen); the model holds them fused. This must run
# wherever this file is imported, also as remote code: without it, experts get random weights, without an error.
register_checkpoint_conversion_mapping("depthlm", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


class DepthLMJointRMSNorm(LlamaRMSNorm):
    """RMSNorm over all heads of a token together (`qk_norm="full"`, as in OLMo 2).

    `[..., heads, head_dim]` in and out.
    """

    # Not the RMSNorm kernel of the Hub, which would normalise each head separately.
    kernel_layer_name = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.flatten(-2)).view_as(hidden_states)


class DepthLMAttention(Qwen3Attention):
    """Qwen3's attention, with the norm of queries and keys according to `qk_norm`."""

    def __init__(self, config: DepthLMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.q_norm, self.k_norm
        self.q_norm = _qk_norm(config, config.num_attention_heads)
        self.k_norm = _qk_norm(config, config.num_key_value_heads)


def _qk_norm(config: DepthLMConfig, heads: int) -> nn.Module | Callable[[torch.Tensor], torch.Tensor]:
    if config.qk_norm == "head":
        return LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)
    if config.qk_norm == "full":
        return DepthLMJointRMSNorm(heads * config.head_dim, eps=config.rms_norm_eps)
    return _as_it_is


def _as_it_is(hidden_states: torch.Tensor) -> torch.Tensor:
    # Not nn.Identity: calling a module costs several times as much.
    return hidden_states


class DepthLMSparseMoeBlock(nn.Module):
    """The experts that the router chooses for each token, and the shared expert if there is one."""

    def __init__(self, config: DepthLMConfig) -> None:
        super().__init__()
        self.gate = Qwen2MoeTopKRouter(config)
        self.experts = Qwen2MoeExperts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = None if shared is None else Qwen2MoeMLP(config, intermediate_size=shared)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, T, hidden_size]` in and out."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, chosen = self.gate(tokens)
        output = self.experts(tokens, chosen, weights)
        if self.shared_expert is not None:
            output = output + self.shared_expert(tokens)
        return output.view_as(hidden_states)


class DepthLMDecoderLayer(GradientCheckpointingLayer):
    """One layer: attention, then an MLP or experts, each with norms according to `norm_placement`.

    `norm_factor` multiplies the output of the two norms that precede a sublayer (LayerNorm Scaling). It belongs to the
    position of the layer, not to its weights: if two layers are swapped, each gets the factor of its new position.
    """

    # Attributes that belong to the position in the stack and do not move with the layer.
    positional_attributes = ("norm_factor",)

    def __init__(self, config: DepthLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.norm_factor = config.norm_factor_of(layer_idx)
        self.self_attn = DepthLMAttention(config, layer_idx)
        self.mlp = DepthLMSparseMoeBlock(config) if layer_idx in config.moe_layer_indices else LlamaMLP(config)

        placement = config.norm_placement_of(layer_idx)
        # The names of Llama, whose placement is "pre": the second one stands before the MLP.
        self.input_layernorm = _norm(config, placement in ("pre", "peri"))
        self.post_attention_layernorm = _norm(config, placement in ("pre", "peri"))
        self.attention_output_layernorm = _norm(config, placement in ("peri", "output"))
        self.mlp_output_layernorm = _norm(config, placement in ("peri", "output"))
        self.attention_sum_layernorm = _norm(config, placement == "post")
        self.mlp_sum_layernorm = _norm(config, placement == "post")

        for name, module in self.named_modules():
            if name.endswith((".o_proj", ".down_proj")):
                module.writes_to_stream = True  # for depth_scaled_init

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """`[B, T, hidden_size]` in and out; the keyword arguments go to the attention."""
        # Without helper functions: calling them took 4% of a decoding step.
        residual = hidden_states
        if (norm := self.input_layernorm) is not None:
            hidden_states = norm(hidden_states)
        # Not in a norm class of our own: kernels that replace RMSNorms would drop the factor without an error.
        if self.norm_factor != 1.0:
            hidden_states = hidden_states * self.norm_factor
        hidden_states, _ = self.self_attn(hidden_states, **kwargs)
        if (norm := self.attention_output_layernorm) is not None:
            hidden_states = norm(hidden_states)
        hidden_states = residual + hidden_states
        if (norm := self.attention_sum_layernorm) is not None:
            hidden_states = norm(hidden_states)

        residual = hidden_states
        if (norm := self.post_attention_layernorm) is not None:
            hidden_states = norm(hidden_states)
        if self.norm_factor != 1.0:
            hidden_states = hidden_states * self.norm_factor
        hidden_states = self.mlp(hidden_states)
        if (norm := self.mlp_output_layernorm) is not None:
            hidden_states = norm(hidden_states)
        hidden_states = residual + hidden_states
        if (norm := self.mlp_sum_layernorm) is not None:
            hidden_states = norm(hidden_states)
        return hidden_states


def _norm(config: DepthLMConfig, present: bool) -> nn.Module | None:
    return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) if present else None


class DepthLMPreTrainedModel(Qwen2MoePreTrainedModel):
    """The base class of both models: initialisation, and loading that refuses an incomplete checkpoint."""

    config: DepthLMConfig
    config_class = DepthLMConfig
    _no_split_modules = ["DepthLMDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(Qwen2MoeTopKRouter, index=0),
        "hidden_states": DepthLMDecoderLayer,
        "attentions": DepthLMAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not self.config.depth_scaled_init:
            return
        std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
        # Not in the module that holds a projection: for custom code, transformers calls this only for modules with
        # their own weights.
        if isinstance(module, Qwen2MoeExperts):
            init.normal_(module.down_proj, std=std)
        elif getattr(module, "writes_to_stream", False):
            init.normal_(module.weight, std=std)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches this file for its experts decorator, which Qwen2MoeExperts has.
        return True

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, allow_missing_keys: bool = False, **kwargs: Any
    ) -> Any:
        """[`PreTrainedModel.from_pretrained`], but a checkpoint that does not fit the model is refused.

        transformers gives random values to weights that are missing in the checkpoint and only logs a table.
        `allow_missing_keys=True` does the same. With `output_loading_info=True` nothing is refused either: the second
        return value lists the weights that do not fit.

        Raises `OSError` with the names of the weights that are missing in the checkpoint, have no place in the model or
        have another shape, or with the name of the damaged file.
        """
        source = str(args[0] if args else kwargs.get("pretrained_model_name_or_path", "The checkpoint"))
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise OSError(f"{_damaged_file(source)} is damaged or incomplete ({error}): fetch it again.") from error
        if output_loading_info:
            return model, info
        if not allow_missing_keys:
            _refuse_misfit(info, source)
        return model

    @staticmethod
    def _finalize_model_loading(*args: Any, **kwargs: Any) -> Any:
        # transformers also refuses weights that do not fit, but only logs their names. If a later version does not call
        # this method, its own RuntimeError is raised.
        arguments = [*args, *kwargs.values()]
        info = next((value for value in arguments if hasattr(value, "conversion_errors")), None)
        ignored = any(getattr(value, "ignore_mismatched_sizes", False) for value in arguments)
        if info is not None:
            _refuse_misshapen(info, ignored)
        return PreTrainedModel._finalize_model_loading(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """[`torch.nn.Module.load_state_dict`], which also accepts one tensor per expert, as in checkpoints.

        The Trainer uses this method to resume from a checkpoint and to load the best one at the end. Without this
        override the experts would not be loaded, with only a warning.
        """
        return super().load_state_dict(self._with_fused_experts(state_dict), strict=strict, assign=assign)

    @torch.no_grad()
    def _with_fused_experts(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors by the model's names; the tensors of single experts are copied into the fused parameters."""
        parameters = dict(self.named_parameters())
        others, parts = {}, Counter[str]()
        for name, tensor in state_dict.items():
            expert = _ONE_EXPERT.fullmatch(name)
            fused = expert and expert["experts"] + ("down_proj" if expert["part"] == "down" else "gate_up_proj")
            if expert is None or fused not in parameters:
                others[name] = tensor
                continue
            place = parameters[fused][int(expert["index"])]
            if expert["part"] != "down":
                place = place.chunk(2)[expert["part"] == "up"]
            place.copy_(tensor)
            parts[fused] += 1
        for fused, count in parts.items():
            whole = parameters[fused]
            if count == len(whole) * (1 if fused.endswith("down_proj") else 2):
                others[fused] = whole.detach()  # complete, so it is not reported as missing
        return others

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """[`PreTrainedModel.save_pretrained`], with an `auto_map` for all Auto classes, not only that of this model."""
        self.config.auto_map = {
            "AutoConfig": "configuration_depthlm.DepthLMConfig",
            "AutoModel": "modeling_depthlm.DepthLMModel",
            "AutoModelForCausalLM": "modeling_depthlm.DepthLMForCausalLM",
        }
        super().save_pretrained(*args, **kwargs)


def _damaged_file(source: str) -> str:
    for file in sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return str(file)
    return f"A file with weights of {source}"


def _refuse_misshapen(info: Any, ignored: bool) -> None:
    problems = [f"{name} (some of its experts are missing or have another shape)" for name in info.conversion_errors]
    if not ignored:
        problems += [
            f"{name} has the shape {tuple(stored)}, not {tuple(expected)}"
            for name, stored, expected in info.mismatched_keys
        ]
    if problems:
        listed = ", ".join(sorted(problems)[:4]) + (f" and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise OSError(
            f"The checkpoint does not fit the model: {listed}. The files are incomplete or belong to another "
            "configuration."
        )


def _refuse_misfit(info: dict[str, Any], source: str) -> None:
    problems = []
    for kind, text in (("missing_keys", "lacks"), ("unexpected_keys", "has, with no place in the model,")):
        keys = sorted(info.get(kind) or [])
        if keys:
            listed = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            problems.append(f"{text} {len(keys)} weight{'s' if len(keys) > 1 else ''}: {listed}")
    if problems:
        raise OSError(
            f"{source} {'; it '.join(problems)}. The files are incomplete or belong to another configuration: fetch "
            "them again, or pass allow_missing_keys=True to give missing weights random values."
        )


class DepthLMModel(DepthLMPreTrainedModel, Qwen3Model):
    """The decoder without a head.

    Its forward is Qwen3's: masks for full and for sliding layers, then the layers in turn, then the final norm.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: DepthLMConfig) -> None:
        PreTrainedModel.__init__(self, config)  # Qwen3Model's would build Qwen3's layers first
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DepthLMDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in config.layer_types
        self.post_init()
        if config.num_experts is not None:
            # Training always records the router logits. The hooks are installed here: in the first forward pass it
            # would take a lock, which torch.compile(fullgraph=True) cannot trace.
            install_all_output_capturing_hooks(self)


@dataclass
class DepthLMCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """The output of [`DepthLMForCausalLM`].

    `loss` is the mean next-token cross-entropy in nats, plus the weighted router losses in training; `aux_loss` and
    `z_loss` are the load-balancing loss and the router z-loss before weighting, each the mean over the MoE layers.
    """

    z_loss: torch.FloatTensor | None = None


class DepthLMForCausalLM(DepthLMPreTrainedModel, GenerationMixin):
    """[`DepthLMModel`] with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DepthLMConfig) -> None:
        super().__init__(config)
        self.model = DepthLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DepthLMCausalLMOutputWithPast:
        """Next-token logits `[B, T, vocab_size]`, and the loss if `labels` `[B, T]` are given (-100 is ignored).

        In training the router losses are always part of `loss`. In evaluation they are computed, and as in transformers
        added to `loss`, only with `output_router_logits`. Without labels they are returned separately.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        # A decoding step does not need the losses, and masks for a cache of fixed length do not fit them.
        has_experts = self.config.num_experts is not None
        with_router_losses = has_experts and (self.training or (output_router_logits and past_key_values is None))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=has_experts and (with_router_losses or output_router_logits),
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))

        loss = aux_loss = z_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if with_router_losses:
            aux_loss, z_loss = self._router_losses(getattr(outputs, "router_logits", None), attention_mask)
            if loss is None:
                self._warn_of_lone_router_losses()
            else:
                router_loss = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
                loss = loss + _share_of_step(labels, kwargs) * router_loss.to(loss.device)
        return DepthLMCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits and has_experts else None,
        )

    def _router_losses(
        self, router_logits: tuple[torch.Tensor, ...] | None, attention_mask: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Load-balancing loss (Switch Transformer, eq. 4-6) and router z-loss (ST-MoE, eq. 5).

        Each is computed for every MoE layer and averaged. `router_logits` has one tensor `[B * T, num_experts]` per MoE
        layer; padding is ignored.
        """
        if not router_logits:
            raise RuntimeError(
                "The router logits were not recorded, so there are no router losses, because the class of model.model "
                "was replaced. Shard or wrap its layers and the whole model, not model.model."
            )
        if self.training and torch.is_grad_enabled() and not router_logits[0].requires_grad:
            self._refuse_detached_router()
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
        if mask is not None and mask.numel() != router_logits[0].shape[0]:
            mask = None
        # In float32 and on one device, because device_map may have placed layers on several.
        logits = [layer.to(router_logits[0].device, torch.float32) for layer in router_logits]
        experts, top_k = self.config.num_experts, self.config.num_experts_per_tok
        balance = [load_balancing_loss_func((layer,), experts, top_k, mask) for layer in logits]
        squares = [torch.logsumexp(layer, dim=-1).square() for layer in logits]
        if mask is None:
            z = [square.mean() for square in squares]
        else:
            real = mask.reshape(-1).to(logits[0])
            z = [(square * real).sum() / real.sum() for square in squares]
        return torch.stack(balance).mean(), torch.stack(z).mean()

    def _warn_of_lone_router_losses(self) -> None:
        """Warn once that a training without labels must add the router losses itself."""
        weighed = self.config.router_aux_loss_coef or self.config.router_z_loss_coef
        if self.training and weighed and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            logger.warning_once(
                "This training pass has no labels, so no loss includes the router losses yet. Add them to yours: "
                "router_aux_loss_coef * outputs.aux_loss + router_z_loss_coef * outputs.z_loss."
            )

    def _refuse_detached_router(self) -> None:
        # Frozen routers (with LoRA, for example) need no gradient; others would lose it with re-entrant checkpointing.
        gate = self.model.layers[self.config.moe_layer_indices[0]].mlp.gate
        if any(weight.requires_grad for weight in gate.parameters()):
            raise RuntimeError(
                "The router losses would have no gradient, because re-entrant gradient checkpointing hides the "
                'routers: use gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )


def _share_of_step(labels: torch.Tensor, loss_kwargs: dict[str, Any]) -> torch.Tensor | float:
    """The share of these labels in the whole optimiser step.

    With `num_items_in_batch`, the Trainer sums the losses of a step's microbatches, each divided by the tokens of the
    whole step. Without this factor, the router loss would be added once per microbatch.
    """
    items = loss_kwargs.get("num_items_in_batch")
    if items is None:
        return 1.0
    shifted = loss_kwargs.get("shift_labels")
    counted = labels[..., 1:] if shifted is None else shifted
    return (counted != loss_kwargs.get("ignore_index", -100)).sum() / items


# generate reads the signature of forward at every token, and computing it each time took 1% of decoding.
DepthLMForCausalLM.forward.__signature__ = inspect.signature(DepthLMForCausalLM.forward)

DepthLMModel.register_for_auto_class("AutoModel")
DepthLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["DepthLMForCausalLM", "DepthLMModel", "DepthLMPreTrainedModel"]
