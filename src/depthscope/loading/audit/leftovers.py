"""Stored tensors that the model has no place for: what cannot matter to its function, and what would change it.

Names decide where they cannot mislead (a vision tower, a head that predicts further tokens), values where a look
decides (a bias of zeros, rotary frequencies that the config gives too). Whatever is neither is taken to change the
function.
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

Group = tuple[str, list[str]]  # what is said of some names, and the names

# Parts of names that belong to what a language model does not run on text.
NOT_TEXT = re.compile(
    r"(^|\.)[a-z_]*(vision|visual|image|audio|speech|video|talker|token2wav|code2wav|multi_?modal|mm_projector|resampler"
    r"|vqmodel)[a-z_0-9]*\."
)
FURTHER_TOKENS = re.compile(r"(^|\.)[a-z_]*(mtp|nextn|medusa|eagle|speculator)[a-z_0-9]*(\.|$)", re.IGNORECASE)
# What a layer that predicts a further token has and an ordinary layer has not.
FURTHER_LAYER = re.compile(r"(^|\.)(eh_proj|enorm|hnorm|shared_head|embed_tokens|[a-z_]*(mtp|nextn)[a-z_]*)(\.|$)")
OTHER_HEADS = re.compile(r"(^|\.)(v_head|value_head|pooler|seq_relationship|nsp_cls)\.")
BOOKKEEPING = re.compile(r"(^|\.)(_extra_state|num_batches_tracked|(encoder|decoder)\.version|version)$")
ADAPTER = re.compile(r"(^|[._])(lora_[A-Za-z_]+|ia3_l|hada_w\d_[ab]|vera_lambda_[bd]|oft_r|boft_r)(\.|$)")
# In a pair of these the second is zero until it is trained, and then the pair adds nothing.
ADAPTER_OUT = re.compile(r"(^|[._])(lora_(embedding_)?B)(\.|$)")
ROTARY = re.compile(r"(inv_freq|cos_cached|sin_cached)$")
LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.(?P<rest>.+)$")
TOLERANCE = 1e-4  # between rotary frequencies: float32 and another order of operations
ANGLE = 0.02  # between cosines: float32 angles of some thousand radians, tables in half precision


class Leftovers:
    """The tensors without a place, sorted into what cannot matter and what would change the function."""

    def __init__(self, model: Any, stored: StoredTensors, placed: Placement) -> None:
        self.model, self.stored, self.placed = model, stored, placed
        self.kind = type(model).__name__
        self.text = model.config.get_text_config(decoder=True)
        harmless: dict[str, list[str]] = defaultdict(list)
        harmful: dict[str, list[str]] = defaultdict(list)
        for tensor in placed.left:
            why = self._why_harmless(tensor)
            if why is not None:
                harmless[why].append(tensor.name)
            else:
                harmful[self._what_it_is(tensor)].append(tensor.name)
        for name in placed.lost:
            harmful["of another kind"].append(name)
        self.harmless: list[Group] = [(what, sorted(names)) for what, names in harmless.items()]
        self.harmful: list[Group] = [(what, sorted(names)) for what, names in harmful.items()]

    def _why_harmless(self, tensor: StoredTensor) -> str | None:
        """What the tensor is, if it cannot matter."""
        name = tensor.name
        beyond, rotary = self._layer_beyond(tensor) is not None, bool(ROTARY.search(name))
        by_name = (
            (tensor.size == 0 or bool(BOOKKEEPING.search(name)), "bookkeeping"),
            (name.endswith("masked_bias") and tensor.size == 1, "causal masks"),
            (is_runtime_scale(name), "scales of activations"),
            (bool(NOT_TEXT.search(name)), "what is not for text"),
            (bool(FURTHER_TOKENS.search(name)), "heads for further tokens"),
            (bool(OTHER_HEADS.search(name)), "other heads"),
            (not beyond and not rotary and self._left_out_on_purpose(name), f"what {self.kind} does without"),
        )
        by_value: tuple[tuple[bool, str, Callable[[StoredTensor], bool]], ...] = (
            (beyond, "heads for further tokens", self._is_further),
            (rotary, "rotary frequencies", self._is_rotary),
            (name.endswith("position_ids"), "position ids", self._counts_up),
            (not rotary and name in self._buffers, f"what {self.kind} computes by itself", self._is_buffer),
            (bool(ADAPTER.search(name)), "an adapter that adds nothing", lambda _: self._adapters_are_zero),
            (_is_square(tensor), "causal masks", self._is_mask),
            (name.endswith("bias"), "biases of zero", partial(self._is_all, 0)),
            (is_scale(tensor), "scales of one", partial(self._is_all, 1)),
            (name.endswith("lm_head.weight"), "a copy of the embedding", self._is_embedding),
        )
        found = (what for applies, what in by_name if applies)
        looked = (what for applies, what, is_so in by_value if applies and is_so(tensor))
        return next(found, None) or next(looked, None)

    def _what_it_is(self, tensor: StoredTensor) -> str:
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

    # What a look at the values says

    def _is_all(self, value: float, tensor: StoredTensor) -> bool:
        values = self.stored.read(tensor) if tensor.dtype in FLOATS else None
        return values is not None and bool((values == value).all())

    def _counts_up(self, tensor: StoredTensor) -> bool:
        values = self.stored.read(tensor)
        return values is not None and bool(torch.equal(values.flatten(), torch.arange(values.numel()).to(values)))

    def _is_mask(self, tensor: StoredTensor) -> bool:
        """Whether it is ones and zeros that let no token see a later one."""
        values = self.stored.read(tensor)
        return (
            values is not None
            and bool(((values == 0) | (values == 1)).all())
            and not bool(values.triu(1).any())
            and bool(values.diagonal(dim1=-2, dim2=-1).all())
        )

    def _is_rotary(self, tensor: StoredTensor) -> bool:
        """Whether rotary frequencies, or a table made of some, are those that the model has."""
        values = self.stored.read(tensor)
        if values is None or values.dim() == 0:
            return False
        known = self._frequencies or self._plain_frequencies([values.shape[-1]])
        if tensor.name.endswith("inv_freq"):
            return any(_are_close(values, frequencies) for frequencies in known)
        function = torch.cos if tensor.name.endswith("cos_cached") else torch.sin
        return any(_ends_a_table(values, frequencies, function) for frequencies in known)

    def _is_buffer(self, tensor: StoredTensor) -> bool:
        """Whether it is what the model has under the same name without loading it, as old tables of positions are."""
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
        last = [tensor for tensor in self.placed.left if ADAPTER_OUT.search(tensor.name)]
        others = [tensor for tensor in self.placed.left if ADAPTER.search(tensor.name) and "lora_" not in tensor.name]
        return bool(last) and not others and all(self._is_all(0, tensor) for tensor in last)

    @cached_property
    def _frequencies(self) -> list[torch.Tensor]:
        """The model's own rotary frequencies, and those of its bases before any scaling: old files keep these."""
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
        """The number of the layer, if the tensor is of one that the model has not."""
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
        """The number of layers that the model has, by the name of their list in the files."""
        counts: dict[str, int] = {}
        for tensors in self.placed.used.values():
            for tensor in tensors:
                if found := LAYER.match(tensor.name):
                    counts[found["stack"]] = max(counts.get(found["stack"], 0), int(found["index"]) + 1)
        return counts

    def _is_further(self, tensor: StoredTensor) -> bool:
        """Whether the layer has what only layers have that predict a further token, and the model's own have not."""
        found = LAYER.match(tensor.name)
        assert found is not None
        mine = self._parts[found["stack"]][int(found["index"])]
        return any(FURTHER_LAYER.search(part) for part in mine - self._ordinary[found["stack"]])

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
            stack: {part for index, mine in layers.items() if index < self._counts.get(stack, 0) for part in mine}
            for stack, layers in self._parts.items()
        }

    def _left_out_on_purpose(self, name: str) -> bool:
        """Whether the class says that it does without a tensor of this name."""
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns)


def _is_square(tensor: StoredTensor) -> bool:
    return (
        tensor.name.endswith(("bias", "mask"))
        and len(tensor.shape) >= 3
        and tensor.shape[-1] == tensor.shape[-2] == math.isqrt(tensor.size)
    )


def _are_close(values: torch.Tensor, known: torch.Tensor) -> bool:
    """Whether two sets of frequencies are one, as far as the type can tell that they are stored in, or once were."""
    if values.shape != known.shape:
        return False
    return torch.allclose(values.float(), known, rtol=TOLERANCE, atol=0.0) or any(
        torch.equal(values.to(half).to(values), values) and _are_rounded(values, known, half)
        for half in (torch.float16, torch.bfloat16)
    )


def _are_rounded(values: torch.Tensor, known: torch.Tensor, half: torch.dtype) -> bool:
    rounded, step = known.to(half).float(), torch.finfo(half)
    return torch.allclose(values.float(), rounded, rtol=2 * step.eps, atol=2 * step.smallest_normal * step.eps)


def _ends_a_table(
    values: torch.Tensor, frequencies: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
) -> bool:
    """Whether the last row of a table of cosines or sines is what the frequencies give at its position."""
    if values.dim() < 2:
        return False
    row = values.reshape(-1, values.shape[-1])[-1].float()
    expected = function(frequencies.double() * (values.shape[-2] - 1)).float()
    orders = (torch.cat([expected, expected]), expected.repeat_interleave(2), expected)
    return any(row.shape == order.shape and torch.allclose(row, order, atol=ANGLE) for order in orders)
