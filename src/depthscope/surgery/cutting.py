"""Cutting layers out of a model: a new model of the same class that has only the kept ones."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from depthscope.console.quiet import quiet
from depthscope.errors import NonFiniteError, SurgeryError
from depthscope.layers.acting_weights import NoWeightsError, acting_weights, adapters_in
from depthscope.layers.compiled import class_name, written
from depthscope.layers.offloaded import is_offloaded
from depthscope.layers.stack import LayerStack
from depthscope.layers.tracing import text_config
from depthscope.surgery.configuration import build_cut
from depthscope.surgery.kept import require_kept
from depthscope.surgery.proof import proof_ids, prove_logits
from depthscope.surgery.structure import written_name
from depthscope.surgery.weights import cut_weights
from depthscope.wording.messages import listed

__all__ = ["cut", "cut_out", "find_layers"]


def cut(model: nn.Module, kept: Iterable[int]) -> PreTrainedModel:
    """A new model of the same class with only the kept layers; `model` is not changed.

    Its weights are copies. Its configuration says of the kept layers what that of `model` said of them, and has their
    original numbers as `kept_layers`. Before it is returned, its logits are compared with those of `model` with the
    other layers left out (to 1e-5 of the largest, in float32).

    Args:
        model: a causal language model of transformers, or a DepthLM.
        kept: the layers to keep, in rising order; layers count from 0.

    Raises:
        SurgeryError: these layers alone cannot be said in the model's configuration, or compute something else; the
            message names what stands against it.
        SettingsError: `kept` is empty, all layers, or no rising list of the model's layers.
        NoLayerStackError: the model has no plain stack of decoder layers.
        NonFiniteError: a weight or the logits are not finite.
    """
    stack = find_layers(model)
    return cut_out(stack, require_kept(kept, stack.num_layers))


def find_layers(model: nn.Module) -> LayerStack:
    """The layers of a model that can be cut.

    Raises:
        SurgeryError: its weights are not all there as numbers of their own.
        NoLayerStackError: it has no plain stack of decoder layers.
    """
    if isinstance(model, nn.Module):
        _require_plain(model)
    return LayerStack(model)


def cut_out(stack: LayerStack, kept: Sequence[int]) -> Any:
    """The model of the kept layers, its logits proved."""
    model: Any = written(stack.model)
    path = written_name(stack.path)
    with quiet():
        small = build_cut(model, stack.layers, path, kept)
        state = cut_weights(model.state_dict(), small.state_dict(), path, kept, stack.num_layers, text_config(model))
        small.load_state_dict(state, strict=True, assign=True)
        small.tie_weights()
        if model.generation_config is not None:
            small.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
        small = small.to(model.device).train(model.training)
        _require_finite(small)
        prove_logits(stack, small, kept, proof_ids(model))
    return small


def _require_plain(model: nn.Module) -> None:
    """Refuse a model whose weights are made of something else, or lie elsewhere."""
    name = class_name(model)
    if hasattr(model, "get_base_model") or any(adapters_in(model)):
        raise SurgeryError(
            f"{name} carries a PEFT adapter. Merge it into the weights (model.merge_and_unload()), or cut the base "
            "model alone."
        )
    inner: Any = written(model)
    if not isinstance(inner, PreTrainedModel):
        raise SurgeryError(
            f"{name} is no model of transformers (PreTrainedModel), so it has no configuration that could say what is "
            "cut; give the model that from_pretrained returns."
        )
    if is_offloaded(model) or any(weight.is_meta for weight in model.parameters()):
        raise SurgeryError(
            f"Some weights of {name} are not in memory (offloaded); load it without offloading to cut it."
        )
    try:
        others = [key for key, weight in model.named_parameters() if type(weight.data) is not torch.Tensor]
        why = f"{listed(others)} is no plain tensor" if others else ""
        deque(acting_weights(model), maxlen=0)  # looks at each
    except NoWeightsError as error:
        why = str(error)
    if why:
        raise SurgeryError(
            f"The weights of {name} are quantized or spread ({why}), and layers are cut out of weights in full: load "
            "them in full, cut the model, and quantize the result."
        )


def _require_finite(small: nn.Module) -> None:
    broken = [name for name, weight in small.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        raise NonFiniteError(
            f"Weights of the kept layers are not finite: {listed(broken)} (names as in the cut model). Load the model "
            "again from files that are whole."
        )
