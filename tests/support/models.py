"""Tiny random causal language models that tests build in milliseconds."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma4TextConfig, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

LAYERS, WIDTH, VOCABULARY = 4, 24, 90


def tiny_llama(num_layers: int = LAYERS, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A Llama whose layers really contribute: weights of about 1/sqrt(width)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
            **changes,
        }
    )
    return AutoModelForCausalLM.from_config(config).eval()


def gemma_with_shared_keys_and_values() -> PreTrainedModel:
    """A Gemma 4 whose last three of six layers reuse the keys and values of earlier ones."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        vocab_size=VOCABULARY,
        num_kv_shared_layers=3,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def random_blocks(number: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [number, length]."""
    return torch.randint(3, VOCABULARY, (number, length), generator=torch.Generator().manual_seed(seed))


def make_identity(layer: nn.Module) -> None:
    """Let a Llama layer add nothing to the stream."""
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


class AffineLayer(nn.Module):
    """A decoder layer that is an affine map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
        """Map [B, T, d] to [B, T, d]."""
        return hidden + self.linear(hidden)


class TokenFirst(nn.Module):
    """Lets an attention that takes [B, T, d] work on [T, B, d]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        """Map [T, B, d] to [T, B, d]."""
        out, *rest = self.inner(hidden_states=hidden_states.transpose(0, 1), **kwargs)
        return out.transpose(0, 1), *rest


class TokenFirstModel(LlamaModel):
    """A Llama whose stream is [T, B, d], as some models have it (XLNet, ChatGLM)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Turn the embeddings, and turn back after the last layer."""
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=positions,
        )
        rotary = self.rotary_emb(hidden, positions)
        hidden = hidden.transpose(0, 1).contiguous()
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden.transpose(0, 1)))


def token_first_llama(**changes: object) -> PreTrainedModel:
    """`tiny_llama` with the same weights and a stream [T, B, d]."""
    model = tiny_llama(**changes)
    model.model.__class__ = TokenFirstModel
    for layer in model.model.layers:
        layer.self_attn = TokenFirst(layer.self_attn)
    return model
