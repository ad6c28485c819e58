"""Hooks that see each layer's input and output once in every training pass, and in no other pass."""

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
    """Calls functions for every decoder layer, and optionally its attention and MLP, in each training pass.

    A training pass runs through the decoder in training mode with gradients. Evaluation, generation and reference
    passes do not count, nor does the recomputation of activation checkpointing in the backward pass.

    Args:
        stack: the layers.
        on_layer: called with a layer's index, and the residual stream before and after it; these are the model's own
            tensors, so a layer's output can be recognised as the next layer's input.
        on_sublayer: called with a layer's index, "attention" or "mlp", and its output; None watches no sublayers.
        extra_modules: further modules to watch, each with a function that is called with its output.
        begin: called when a training pass begins.
        end: called when it ends, with the mask of real tokens [B, T] if the pass has one.
        drop: called instead of `end` when the pass fails.
    """

    def __init__(
        self,
        stack: LayerStack,
        on_layer: Callable[[int, Tensor, Tensor], None] | None = None,
        on_sublayer: Callable[[int, str, Tensor], None] | None = None,
        extra_modules: Mapping[nn.Module, Callable[[Any], None]] | None = None,
        begin: Callable[[], None] = lambda: None,
        end: Callable[[Tensor | None], None] = lambda mask: None,
        drop: Callable[[], None] = lambda: None,
    ) -> None:
        self.measuring = False  # whether passes are measured now
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
        # Also when the pass fails, so that the next pass is not taken for a part of it.
        self._add(decoder.register_forward_hook(self._leave, always_call=True))
        for index, layer in enumerate(stack.layers):
            if on_layer is not None:
                self._awaited.add(("layer", index))
                self._add(layer.register_forward_hook(self._layer_hook(index, on_layer), with_kwargs=True))
            for sublayer in ("attention", "mlp") if on_sublayer is not None else ():
                module = stack.sublayer(index, sublayer)
                if module is not None and on_sublayer is not None:
                    self._awaited.add((sublayer, index))
                    self._add(module.register_forward_hook(self._sublayer_hook(index, sublayer, on_sublayer)))
        for index, (module, function) in enumerate((extra_modules or {}).items()):
            self._awaited.add(("router", index))
            self._add(module.register_forward_hook(self._module_hook(index, function)))

    def unseen(self) -> str:
        """The modules that no measured pass has called so far, in words; empty if all were called."""
        missing: dict[str, list[int]] = {}
        for kind, index in sorted(self._awaited - self._seen):
            missing.setdefault(kind, []).append(index)
        if "a pass" in missing:
            return "any training pass"
        names = {"layer": "layers", "router": "routers"}
        return ", ".join(
            f"{names.get(kind, f'the {kind} of layers')} {', '.join(map(str, indices))}"
            for kind, indices in missing.items()
        )

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._mask = None

    def _add(self, handle: RemovableHandle) -> None:
        self._handles.append(handle)

    def _mask_hook(self, owner: nn.Module) -> Callable[..., None]:
        find_argument = argument(owner, "attention_mask")

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = find_argument(args, kwargs)
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

    def _sublayer_hook(
        self, index: int, sublayer: str, function: Callable[[int, str, Tensor], None]
    ) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if self._inside:
                self._seen.add((sublayer, index))
                with torch.no_grad():
                    function(index, sublayer, hidden_of(result))

        return hook

    def _module_hook(self, index: int, function: Callable[[Any], None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if self._inside:
                self._seen.add(("router", index))
                with torch.no_grad():
                    function(result)

        return hook


def argument(module: nn.Module, name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """A function that returns an argument of a module's forward pass, passed by name or position; None without it."""
    names = list(inspect.signature(module.forward).parameters)
    place = names.index(name) if name in names else None

    def find_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[place] if place is not None and place < len(args) else kwargs.get(name)

    return find_argument
