"""Stored tensors that the model has no place for: those that do not matter, and those that would change its function.

Some are judged by their names (a vision tower, a head that predicts further tokens), some by their values (a bias of
zeros, rotary frequencies that the config gives too). All others are assumed to change the function.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch

from depthscope.loading.audit.codes import is_runtime_scale, is_scale
from depthscope.loading.audit.placement import Placement
from depthscope.loading.audit.stored import FLOATS, StoredTensor, StoredTensors

__all__ = ["Leftovers"]

Group = tuple[str, list[str]]  # a description, and the names of the tensors that it describes

# Parts of names of modules that a language model does not use on text.
NOT_TEXT = re.compile(
    r"(^|\.)[a-z_]*(vision|visual|image|audio|speech|video|talker|token2wav|code2wav|multi_?modal|mm_projector|resampler"
    r"|vqmodel)[a-z_0-9]*\."
)
FURTHER_TOKENS = re.compile(r"(^|\.)[a-z_]*(mtp|nextn|medusa|eagle|speculator)[a-z_0-9]*(\.|$)", re.IGNORECASE)
# Parts that only a layer that predicts a further token has.
FURTHER_LAYER = re.compile(r"(^|\.)(eh_proj|enorm|hnorm|shared_head|embed_tokens|[a-z_]*(mtp|nextn)[a-z_]*)(\.|$)")
OTHER_HEADS = re.compile(r"(^|\.)(v_head|value_head|pooler|seq_relationship|nsp_cls)\.")
BOOKKEEPING = re.compile(r"(^|\.)(_extra_state|num_batches_tracked|(encoder|decoder)\.version|version)$")
ADAPTER = re.compile(r"(^|[._])(lora_[A-Za-z_]+|ia3_l|hada_w\d_[ab]|vera_lambda_[bd]|oft_r|boft_r)(\.|$)")
# The second matrix of a LoRA pair is zero until it is trained; until then the pair adds nothing.
ADAPTER_OUT = re.compile(r"(^|[._])(lora_(embedding_)?B)(\.|$)")
ROTARY = re.compile(r"(inv_freq|cos_cached|sin_cached)$")
LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.(?P<rest>.+)$")
TOLERANCE = 1e-4  # between rotary frequencies: float32 and another order of operations
ANGLE = 0.02  # between cosines: float32 angles of some thousand radians, tables in half precision


class Leftovers:
    """The tensors without a place, sorted into `harmless` and `harmful` ones."""

    def __init__(self, model: Any, stored: StoredTensors, placed: Placement) -> None:
        self.model, self.stored, self.placed = model, stored, placed
        self.kind = type(model).__name__
        self.text = model.config.get_text_config(decoder=True)
        harmless: dict[str, list[str]] = defaultdict(list)
        harmful: dict[str, list[str]] = defaultdict(list)
        for tensor in placed.unplaced:
            description = self._describe_harmless(tensor)
            if description is not None:
                harmless[description].append(tensor.name)
            else:
                harmful[self._describe_harmful(tensor)].append(tensor.name)
        for name in placed.unexpected_names:
            harmful["of another kind"].append(name)
        self.harmless: list[Group] = [(description, sorted(names)) for description, names in harmless.items()]
        self.harmful: list[Group] = [(description, sorted(names)) for description, names in harmful.items()]

    def _describe_harmless(self, tensor: StoredTensor) -> str | None:
        """What the tensor is, if it does not matter; else None."""
        name = tensor.name
        beyond, rotary = self._layer_beyond(tensor) is not None, bool(ROTARY.search(name))
        by_name = (
            (tensor.size == 0 or bool(BOOKKEEPING.search(name)), "bookkeeping"),
            (name.endswith("masked_bias") and tensor.size == 1, "causal masks"),
            (is_runtime_scale(name), "scales of activations"),
            (bool(NOT_TEXT.search(name)), "parts that are not for text"),
            (bool(FURTHER_TOKENS.search(name)), "heads for further tokens"),
            (bool(OTHER_HEADS.search(name)), "other heads"),
            (not beyond and not rotary and self._left_out_on_purpose(name), f"tensors that {self.kind} ignores"),
        )
        by_value: tuple[tuple[bool, str, Callable[[StoredTensor], bool]], ...] = (
            (beyond, "heads for further tokens", self._is_further),
            (rotary, "rotary frequencies", self._is_rotary),
            (name.endswith("position_ids"), "position ids", self._counts_up),
            (not rotary and name in self._buffers, f"buffers that {self.kind} computes", self._is_buffer),
            (bool(ADAPTER.search(name)), "an adapter that adds nothing", lambda _: self._adapters_are_zero),
            (_is_square(tensor), "causal masks", self._is_mask),
            (name.endswith("bias"), "biases of zero", partial(self._is_all, 0)),
            (is_scale(tensor), "scales of one", partial(self._is_all, 1)),
            (name.endswith("lm_head.weight"), "a copy of the embedding", self._is_embedding),
        )
        matching_names = (description for applies, description in by_name if applies)
        matching_values = (description for applies, description, is_so in by_value if applies and is_so(tensor))
        return next(matching_names, None) or next(matching_values, None)

    def _describe_harmful(self, tensor: StoredTensor) -> str:
        name = tensor.name
        if self._layer_beyond(tensor) is not None:
            return f"of layers beyond the {self._num_layers(tensor)} that config.json counts (num_hidden_layers)"
        if ADAPTER.search(name):
            return "of an adapter that was never merged (merge_and_unload of PEFT merges it)"
        if ROTARY.search(name):
            return "for rotary positions, other than config.json gives (rope_theta, rope_scaling)"
        if is_scale(tensor):
            return "that scale others"
        if name.endswith("lm_head.weight"):
            return "of a head other than the embedding, which this model uses as its head"
        if name.endswith("bias"):
            return "that are biases"
        if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
            return "of norms"
        return "of another kind"

    # Checks of the values

    def _is_all(self, value: float, tensor: StoredTensor) -> bool:
        values = self.stored.read(tensor) if tensor.dtype in FLOATS else None
        return values is not None and bool((values == value).all())

    def _counts_up(self, tensor: StoredTensor) -> bool:
        values = self.stored.read(tensor)
        return values is not None and bool(torch.equal(values.flatten(), torch.arange(values.numel()).to(values)))

    def _is_mask(self, tensor: StoredTensor) -> bool:
        """Whether it is a causal mask of ones and zeros."""
        values = self.stored.read(tensor)
        return (
            values is not None
            and bool(((values == 0) | (values == 1)).all())
            and not bool(values.triu(1).any())
            and bool(values.diagonal(dim1=-2, dim2=-1).all())
        )

    def _is_rotary(self, tensor: StoredTensor) -> bool:
        """Whether rotary frequencies, or a table made of them, equal those of the model."""
        values = self.stored.read(tensor)
        if values is None or values.dim() == 0:
            return False
        expected = self._frequencies or self._plain_frequencies([values.shape[-1]])
        if tensor.name.endswith("inv_freq"):
            return any(_are_close(values, frequencies) for frequencies in expected)
        function = torch.cos if tensor.name.endswith("cos_cached") else torch.sin
        return any(_ends_a_table(values, frequencies, function) for frequencies in expected)

    def _is_buffer(self, tensor: StoredTensor) -> bool:
        """Whether it equals a buffer of that name that the model computes itself, such as an old table of positions."""
        values, own = self.stored.read(tensor), self._buffers[tensor.name]
        if values is None or values.shape != own.shape or own.device.type == "meta":
            return False
        return torch.allclose(values.float(), own.float().cpu(), rtol=ANGLE, atol=ANGLE)

    def _is_embedding(self, tensor: StoredTensor) -> bool:
        embedding = self.model.get_input_embeddings()
        names = [name for name, module in self.model.named_modules() if module is embedding]
        sources = [source for name in names for source in self.placed.used.get(f"{name}.weight", [])]
        return any(self.stored.are_equal(tensor, source) for source in sources)

    @cached_property
    def _buffers(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_buffers())

    @cached_property
    def _adapters_are_zero(self) -> bool:
        last = [tensor for tensor in self.placed.unplaced if ADAPTER_OUT.search(tensor.name)]
        adapters = [tensor for tensor in self.placed.unplaced if ADAPTER.search(tensor.name)]
        others = [tensor for tensor in adapters if "lora_" not in tensor.name]
        return bool(last) and not others and all(self._is_all(0, tensor) for tensor in last)

    @cached_property
    def _frequencies(self) -> list[torch.Tensor]:
        """The model's rotary frequencies, and those before any scaling, which old files hold."""
        buffers = (buffer for name, buffer in self.model.named_buffers() if name.endswith("inv_freq"))
        own = [buffer.float().cpu() for buffer in buffers if buffer.device.type != "meta"]
        return own + self._plain_frequencies(sorted({len(frequencies) for frequencies in own}))

    def _plain_frequencies(self, sizes: list[int]) -> list[torch.Tensor]:
        settings = getattr(self.text, "rope_parameters", None) or {}
        nested = [entry for entry in settings.values() if isinstance(entry, dict)] or [settings]
        bases = {entry["rope_theta"] for entry in nested if isinstance(entry.get("rope_theta"), int | float)}
        exponents = [torch.arange(size, dtype=torch.float64) / size for size in sizes]
        return [(base**-exponent).float() for base in bases for exponent in exponents]

    # Layers

    def _layer_beyond(self, tensor: StoredTensor) -> int | None:
        """The index of the tensor's layer, if the model has no such layer."""
        found = LAYER.match(tensor.name)
        if found is None:
            return None
        count = self._counts.get(found["stack"], 0)
        return int(found["index"]) if count and int(found["index"]) >= count else None

    def _num_layers(self, tensor: StoredTensor) -> int:
        found = LAYER.match(tensor.name)
        return self._counts[found["stack"]] if found else 0

    @cached_property
    def _counts(self) -> dict[str, int]:
        """The number of layers of the model, by the name of their list in the files."""
        counts: dict[str, int] = {}
        for tensors in self.placed.used.values():
            for tensor in tensors:
                if found := LAYER.match(tensor.name):
                    counts[found["stack"]] = max(counts.get(found["stack"], 0), int(found["index"]) + 1)
        return counts

    def _is_further(self, tensor: StoredTensor) -> bool:
        """Whether the layer has a part that only layers for further tokens have, and that the model's layers lack."""
        found = LAYER.match(tensor.name)
        assert found is not None
        names = self._parts[found["stack"]][int(found["index"])]
        return any(FURTHER_LAYER.search(part) for part in names - self._ordinary[found["stack"]])

    @cached_property
    def _parts(self) -> dict[str, dict[int, set[str]]]:
        parts: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for tensor in self.stored:
            if found := LAYER.match(tensor.name):
                parts[found["stack"]][int(found["index"])].add(found["rest"])
        return parts

    @cached_property
    def _ordinary(self) -> dict[str, set[str]]:
        return {
            stack: {part for index, names in layers.items() if index < self._counts.get(stack, 0) for part in names}
            for stack, layers in self._parts.items()
        }

    def _left_out_on_purpose(self, name: str) -> bool:
        """Whether the class declares that it ignores tensors of this name."""
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns)


def _is_square(tensor: StoredTensor) -> bool:
    return (
        tensor.name.endswith(("bias", "mask"))
        and len(tensor.shape) >= 3
        and tensor.shape[-1] == tensor.shape[-2] == math.isqrt(tensor.size)
    )


def _are_close(values: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two sets of frequencies are equal, within the precision in which they are or once were stored."""
    if values.shape != expected.shape:
        return False
    return torch.allclose(values.float(), expected, rtol=TOLERANCE, atol=0.0) or any(
        torch.equal(values.to(half).to(values), values) and _are_rounded(values, expected, half)
        for half in (torch.float16, torch.bfloat16)
    )


def _are_rounded(values: torch.Tensor, expected: torch.Tensor, half: torch.dtype) -> bool:
    rounded, step = expected.to(half).float(), torch.finfo(half)
    return torch.allclose(values.float(), rounded, rtol=2 * step.eps, atol=2 * step.smallest_normal * step.eps)


def _ends_a_table(
    values: torch.Tensor, frequencies: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
) -> bool:
    """Whether the last row of a table of cosines or sines follows from the frequencies."""
    if values.dim() < 2:
        return False
    row = values.reshape(-1, values.shape[-1])[-1].float()
    expected = function(frequencies.double() * (values.shape[-2] - 1)).float()
    orders = (torch.cat([expected, expected]), expected.repeat_interleave(2), expected)
    return any(row.shape == order.shape and torch.allclose(row, order, atol=ANGLE) for order in orders)
