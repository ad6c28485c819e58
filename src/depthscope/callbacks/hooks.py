"""Hooks on a model in training that see each layer's input and output once, in training passes only."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from depthscope.layers.stack import LayerStack
from depthscope.layers.stand_ins import hidden_among, hidden_of

__all__ = ["Watch", "argument"]


class Watch:
    """Calls back for every decoder layer, and if asked its attention and MLP, in each training pass.

    A training pass is one through the decoder in training mode with gradients: evaluation, generation and reference
    passes do not count, and neither does what activation checkpointing computes again during the backward pass.

    Args:
        stack: the layers.
        on_layer: gets a layer's index, and the stream before it and after it: the model's own tensors, so that one
            layer's output can be known again as the next one's input.
        on_part: gets a layer's index, "attention" or "mlp", and what that returned; None: not watched.
        others: further modules to watch, each with a function that gets what it returned.
        begin: called when a training pass begins.
        end: called when it ends, with the mask of real tokens [B, T] if the pass was given one.
        drop: called instead when it fails: some layers were called, and others will not be.
    """

    def __init__(
        self,
        stack: LayerStack,
        on_layer: Callable[[int, Tensor, Tensor], None] | None = None,
        on_part: Callable[[int, str, Tensor], None] | None = None,
        others: Mapping[nn.Module, Callable[[Any], None]] | None = None,
        begin: Callable[[], None] = lambda: None,
        end: Callable[[Tensor | None], None] = lambda mask: None,
        drop: Callable[[], None] = lambda: None,
    ) -> None:
        self.measuring = False  # whether passes are to be measured now
        self._awaited: set[tuple[str, int]] = {("a pass", 0)}
        self._seen: set[tuple[str, int]] = set()
        self._inside = False
        self._mask: Tensor | None = None
        self._begin, self._end, self._drop = begin, end, drop
        self._handles: list[RemovableHandle] = []
        decoder = stack.around[-1]
        for owner in stack.around:
            self._add(owner.register_forward_pre_hook(self._mask_hook(owner), with_kwargs=True))
        self._add(decoder.register_forward_pre_hook(self._enter))
        # Also when the pass fails, for which there is no result: what comes next must not be taken for a part of it.
        self._add(decoder.register_forward_hook(self._leave, always_call=True))
        for index, layer in enumerate(stack.layers):
            if on_layer is not None:
                self._awaited.add(("layer", index))
                self._add(layer.register_forward_hook(self._layer_hook(index, on_layer), with_kwargs=True))
            for part in ("attention", "mlp") if on_part is not None else ():
                module = stack.sublayer(index, part)
                if module is not None and on_part is not None:
                    self._awaited.add((part, index))
                    self._add(module.register_forward_hook(self._part_hook(index, part, on_part)))
        for index, (module, function) in enumerate((others or {}).items()):
            self._awaited.add(("router", index))
            self._add(module.register_forward_hook(self._other_hook(index, function)))

    def unseen(self) -> str:
        """What no measured pass has called since the watch began, in words; empty where everything was."""
        missing: dict[str, list[int]] = {}
        for what, index in sorted(self._awaited - self._seen):
            missing.setdefault(what, []).append(index)
        if "a pass" in missing:
            return "any training pass"
        names = {"layer": "layers", "router": "routers"}
        return ", ".join(
            f"{names.get(what, f'the {what} of layers')} {', '.join(map(str, where))}"
            for what, where in missing.items()
        )

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._mask = None

    def _add(self, handle: RemovableHandle) -> None:
        self._handles.append(handle)

    def _mask_hook(self, owner: nn.Module) -> Callable[..., None]:
        given = argument(owner, "attention_mask")

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = given(args, kwargs)
            if isinstance(mask, Tensor) and mask.dim() == 2:
                self._mask = mask

        return hook

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inside = self.measuring and module.training and torch.is_grad_enabled()
        if self._inside:
            self._seen.add(("a pass", 0))
            self._begin()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if self._inside:
            self._inside = False
            with torch.no_grad():
                if result is None:
                    self._drop()
                else:
                    self._end(self._mask)
        self._mask = None

    def _layer_hook(self, index: int, function: Callable[[int, Tensor, Tensor], None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            if self._inside:
                self._seen.add(("layer", index))
                with torch.no_grad():
                    function(index, hidden_among(args, kwargs), hidden_of(result))

        return hook

    def _part_hook(self, index: int, part: str, function: Callable[[int, str, Tensor], None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if self._inside:
                self._seen.add((part, index))
                with torch.no_grad():
                    function(index, part, hidden_of(result))

        return hook

    def _other_hook(self, index: int, function: Callable[[Any], None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if self._inside:
                self._seen.add(("router", index))
                with torch.no_grad():
                    function(result)

        return hook


def argument(module: nn.Module, name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """A function that finds an argument of a module's forward pass, given by name or by position; None without it."""
    names = list(inspect.signature(module.forward).parameters)
    place = names.index(name) if name in names else None

    def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[place] if place is not None and place < len(args) else kwargs.get(name)

    return given
