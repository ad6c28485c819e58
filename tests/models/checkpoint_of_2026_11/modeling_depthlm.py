"""DepthLM: a Llama-style decoder with grouped-query attention, experts, LayerNorm Scaling, and norms in several places.

The parts are transformers' own classes; what stands here is only how they are put together. Like its siblings this file
imports nothing of depthscope, because a saved model carries it along (`trust_remote_code=True`).
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

# Checkpoints keep one tensor an expert (as OLMoE's and Qwen's do), the model keeps them fused. This must run wherever
# this file is imported, also as remote code: without it, experts load as fresh random numbers, and no error says so.
register_checkpoint_conversion_mapping("depthlm", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


class DepthLMJointRMSNorm(LlamaRMSNorm):
    """RMSNorm over all heads of a token together (`qk_norm="full"`, as in OLMo 2).

    `[..., heads, head_dim]` in and out.
    """

    # Not the single RMSNorm kernel of the Hub: that one would normalise each head by itself.
    kernel_layer_name = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.flatten(-2)).view_as(hidden_states)


class DepthLMAttention(Qwen3Attention):
    """Qwen3's attention, with the norm of queries and keys that the configuration asks for."""

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
    """One layer: attention, then an MLP or experts, each between the norms that `norm_placement` asks for.

    `norm_factor` multiplies the output of the two norms that precede a sublayer (LayerNorm Scaling). It is a property
    of the layer's place, not of its weights: where two layers change places, each takes the factor of its new place.
    """

    # What stays behind when the layer moves to another place in the stack.
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
                module.writes_to_stream = True  # what depth_scaled_init is about

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """`[B, T, hidden_size]` in and out; the keyword arguments are the attention's."""
        # Written out, because a step of decoding is short: calls to helpers took 4% of it.
        residual = hidden_states
        if (norm := self.input_layernorm) is not None:
            hidden_states = norm(hidden_states)
        # The factor here and not in a norm of our own: kernels that replace RMSNorms would drop it without a word.
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
    """What the two models share: initialisation, and loading that refuses half a checkpoint."""

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
        # Not by the module that holds a projection: for custom code transformers calls this only for modules that have
        # weights of their own.
        if isinstance(module, Qwen2MoeExperts):
            init.normal_(module.down_proj, std=std)
        elif getattr(module, "writes_to_stream", False):
            init.normal_(module.weight, std=std)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its experts decorator in the text of this file; here it comes with Qwen2MoeExperts.
        return True

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, allow_missing_keys: bool = False, **kwargs: Any
    ) -> Any:
        """[`PreTrainedModel.from_pretrained`], except that a checkpoint that does not fit the model is refused.

        Where weights are missing from the checkpoint, transformers fills them with random numbers and logs a table; a
        language model that is random in parts is of no use to anyone. `allow_missing_keys=True` loads it all the same.
        With `output_loading_info=True` nothing is refused either: the second value returned says what did not fit.

        Raises `OSError` naming the weights that are missing from the checkpoint, have no place in the model or do not
        fit theirs, or the file that is damaged.
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
        # transformers too refuses weights that do not fit, but leaves their names to the log. Where it stops calling
        # this, its own RuntimeError is what comes.
        given = [*args, *kwargs.values()]
        info = next((value for value in given if hasattr(value, "conversion_errors")), None)
        ignored = any(getattr(value, "ignore_mismatched_sizes", False) for value in given)
        if info is not None:
            _refuse_misshapen(info, ignored)
        return PreTrainedModel._finalize_model_loading(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """[`torch.nn.Module.load_state_dict`], which takes experts one by one too, as checkpoints keep them.

        The Trainer goes on from a checkpoint, and takes the best one at the end, by handing its tensors to this method:
        without this, the experts would stay as they are, and only a warning would say so.
        """
        return super().load_state_dict(self._with_fused_experts(state_dict), strict=strict, assign=assign)

    @torch.no_grad()
    def _with_fused_experts(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors by the names that the model has: those of single experts are put into their place at once."""
        parameters = dict(self.named_parameters())
        others, parts = {}, Counter[str]()
        for name, tensor in state_dict.items():
            found = _ONE_EXPERT.fullmatch(name)
            fused = found and found["experts"] + ("down_proj" if found["part"] == "down" else "gate_up_proj")
            if found is None or fused not in parameters:
                others[name] = tensor
                continue
            place = parameters[fused][int(found["index"])]
            if found["part"] != "down":
                place = place.chunk(2)[found["part"] == "up"]
            place.copy_(tensor)
            parts[fused] += 1
        for fused, count in parts.items():
            whole = parameters[fused]
            if count == len(whole) * (1 if fused.endswith("down_proj") else 2):
                others[fused] = whole.detach()  # not one too few: it is not missing
        return others

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """[`PreTrainedModel.save_pretrained`]; the saved code serves every Auto class, not only that of this model."""
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
    problems = [f"{name} (some of its experts are missing, or of another shape)" for name in info.conversion_errors]
    if not ignored:
        problems += [
            f"{name} has the shape {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in info.mismatched_keys
        ]
    if problems:
        shown = ", ".join(sorted(problems)[:4]) + (f" and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise OSError(
            f"The checkpoint does not fit the model: {shown}. The files are incomplete or belong to another "
            "configuration."
        )


def _refuse_misfit(info: dict[str, Any], source: str) -> None:
    problems = []
    for kind, text in (("missing_keys", "lacks"), ("unexpected_keys", "has, without a place in the model,")):
        keys = sorted(info.get(kind) or [])
        if keys:
            shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            problems.append(f"{text} {len(keys)} weight{'s' if len(keys) > 1 else ''}: {shown}")
    if problems:
        raise OSError(
            f"{source} {'; it '.join(problems)}. The files are incomplete or belong to another configuration: fetch "
            "them again, or pass allow_missing_keys=True to fill what is missing with random numbers."
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
            # Training always records what the routers say. Left to the first forward, hooking them takes a lock, which
            # torch.compile(fullgraph=True) cannot trace.
            install_all_output_capturing_hooks(self)


@dataclass
class DepthLMCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """What [`DepthLMForCausalLM`] returns.

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
        """Next-token logits `[B, T, vocab_size]`, and the loss where `labels` `[B, T]` are given (-100 is left out).

        In training the router losses are part of `loss`, whatever `output_router_logits` says; elsewhere they are
        computed, and as in transformers added to `loss`, only where it is set. Without labels they are returned alone.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        # A step of decoding has no use for them, and masks made for a cache of fixed length do not fit them.
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

        Each is computed for every MoE layer and averaged. `router_logits` are `[B * T, num_experts]`, one tensor an MoE
        layer; padding is left out.
        """
        if not router_logits:
            raise RuntimeError(
                "The routers' logits were not recorded, so that there are no router losses: something has replaced the "
                "class of model.model. Shard or wrap its layers and the whole model, not model.model."
            )
        if self.training and torch.is_grad_enabled() and not router_logits[0].requires_grad:
            self._refuse_detached_router()
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
        if mask is not None and mask.numel() != router_logits[0].shape[0]:
            mask = None
        # In float32, and gathered on one device, because device_map may have spread the layers.
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
        """A training that computes its loss from the logits has to add the router losses itself: say so once."""
        weighed = self.config.router_aux_loss_coef or self.config.router_z_loss_coef
        if self.training and weighed and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            logger.warning_once(
                "This training pass has no labels, so the router losses are in no loss yet. Add them to yours: "
                "router_aux_loss_coef * outputs.aux_loss + router_z_loss_coef * outputs.z_loss."
            )

    def _refuse_detached_router(self) -> None:
        # Frozen routers (LoRA, for one) have no gradient to lose; with re-entrant checkpointing they would lose theirs.
        gate = self.model.layers[self.config.moe_layer_indices[0]].mlp.gate
        if any(weight.requires_grad for weight in gate.parameters()):
            raise RuntimeError(
                "The router losses would have no gradient, because re-entrant gradient checkpointing hides the "
                'routers: use gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )


def _share_of_step(labels: torch.Tensor, loss_kwargs: dict[str, Any]) -> torch.Tensor | float:
    """The share that these labels are of the whole optimiser step.

    With `num_items_in_batch`, the Trainer adds up the losses of a step's microbatches, each divided by the tokens of
    the whole step; a router loss added in full in each would count once for every microbatch.
    """
    items = loss_kwargs.get("num_items_in_batch")
    if items is None:
        return 1.0
    shifted = loss_kwargs.get("shift_labels")
    counted = labels[..., 1:] if shifted is None else shifted
    return (counted != loss_kwargs.get("ignore_index", -100)).sum() / items


# generate asks custom code for the signature of its forward at every token, and to make one out of a function anew each
# time took 1% of decoding.
DepthLMForCausalLM.forward.__signature__ = inspect.signature(DepthLMForCausalLM.forward)

DepthLMModel.register_for_auto_class("AutoModel")
DepthLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["DepthLMForCausalLM", "DepthLMModel", "DepthLMPreTrainedModel"]
