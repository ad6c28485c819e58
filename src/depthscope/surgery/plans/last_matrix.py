"""The last matrix of a layer's MLP, where all that it makes is added to the stream: other weights there repair a gap.

Which module it is, and whether that holds (it does not where a norm follows, or experts mix), is tried on the small
example that the layers were found with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from depthscope.layers.modes import evaluating
from depthscope.layers.stack import LayerStack
from depthscope.layers.stand_ins import LayerResult, StandIn
from depthscope.layers.tracing import MODEL_FAILURES

__all__ = ["LastMatrix", "OtherWeights", "last_matrix"]


@dataclass(frozen=True)
class LastMatrix:
    """A matrix `m -> W m` of a layer.

    Attributes:
        layer: the layer.
        name: of the module in the layer.
        module: an `nn.Linear`, or transformers' `Conv1D`, whose weight is the transpose.
    """

    layer: int
    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """W as `nn.Linear` has it, [G, F]."""
        weight: Any = self.module.weight
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, [G]."""
        bias: Any = self.module.bias
        return bias

    def made(self, given: Tensor) -> Tensor:
        """What the matrix makes of its input [..., F], with its own weights: [..., G]."""
        return functional.linear(given, self.weight, self.bias)

    def updated(self, update: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """The module's parameters with an update added: of the map [F, G], and of the bias [G]."""
        changed = (self.weight.double() + update.T.to(self.weight.device)).to(self.weight.dtype)
        parameters = {"weight": changed.T.contiguous() if isinstance(self.module, Conv1D) else changed}
        if self.bias is not None:
            parameters["bias"] = (self.bias.double() + bias.to(self.bias.device)).to(self.bias.dtype)
        return parameters


class OtherWeights(StandIn):
    """A layer with other parameters in one of its modules."""

    layer_forwards = 1

    def __init__(self, layer: nn.Module, matrix: LastMatrix, parameters: dict[str, Tensor]) -> None:
        super().__init__(nn.Identity())
        self.parameters_there = parameters
        # They stay submodules of the model alone.
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "_whole", layer)

    def forward(self, *args: Any, **kwargs: Any) -> LayerResult:
        """Run the layer."""
        with self.installed():
            return self._whole(*args, **kwargs)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the module have the other parameters inside, and its own back afterwards."""
        there = self.matrix.module._parameters
        own = {name: there[name] for name in self.parameters_there}
        try:
            for name, value in self.parameters_there.items():
                there[name] = nn.Parameter(value, requires_grad=False)
            yield
        finally:
            there.update(own)


def last_matrix(stack: LayerStack, layer: int) -> LastMatrix | None:
    """The last matrix of a layer's MLP; None where there is none, or what it makes is not just added to the stream."""
    mlp = stack.sublayer(layer, "mlp")
    if mlp is None or stack.width != stack.features(_stream(stack, layer)).shape[-1]:
        return None
    whole = stack.layers[layer]
    names = {id(module): name for name, module in whole.named_modules()}
    candidates = [module for module in mlp.modules() if type(module) in (nn.Linear, Conv1D)]
    for module in reversed(candidates):
        if _adds_to_the_stream(stack, layer, module):
            return LastMatrix(layer, names[id(module)], module)
    return None


def _stream(stack: LayerStack, layer: int) -> Tensor:
    with evaluating(stack.model), torch.no_grad(), stack.capture(resid_pre=False, first=layer, last=layer) as seen:
        stack.run_through(layer, stack.example_ids)
    return seen.resid_post[layer]


def _adds_to_the_stream(stack: LayerStack, layer: int, module: nn.Module) -> bool:
    """Whether twice what a module makes changes the stream after the layer by just that."""
    made: list[Tensor] = []

    def twice(module: nn.Module, args: Any, result: Any) -> Any:
        made.append(result)
        return 2 * result

    before = stack.flat(_stream(stack, layer))
    handle = module.register_forward_hook(twice)
    try:
        after = stack.flat(_stream(stack, layer))
    except MODEL_FAILURES:
        return False
    finally:
        handle.remove()
    if len(made) != 1 or made[0].numel() != before.numel():
        return False
    change, added = after - before, made[0].view(before.shape) if made[0].shape != before.shape else made[0]
    return torch.allclose(change.float(), added.float(), rtol=1e-2, atol=1e-3 * float(added.abs().max()))
