"""Every score again, slow and obvious: whole forward passes, modules really replaced, float64 `lstsq`.

Nothing here uses depthscope. Functions take a causal LM of transformers in evaluation mode, its `ModuleList` of decoder
layers, and blocks of token ids [N, T]; layers count from 0 and losses are in nats.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mapped(nn.Module):
    """Puts `function` in a layer's place, in the layer's shape of result."""

    def __init__(self, layer: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function
        for name in ("attention_type", "layer_type", "block_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, ...]:
        """Run the layer for its shape of result, and return the function of its input instead."""
        result = self.layer(hidden, *args, **kwargs)
        return (self.function(hidden), *result[1:]) if isinstance(result, tuple) else self.function(hidden)


@contextmanager
def replaced(layers: nn.ModuleList, index: int, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    original = layers[index]
    layers[index] = Mapped(original, function)
    try:
        yield
    finally:
        layers[index] = original


@torch.no_grad()
def block_losses(model: nn.Module, ids: Tensor) -> np.ndarray:
    """The mean next-token loss of each block, one block at a time: [N]."""
    losses = []
    for block in ids:
        logits = model(input_ids=block[None], use_cache=False).logits[0].double()
        losses.append(F.cross_entropy(logits[:-1], block[1:]).item())
    return np.array(losses)


def loss(model: nn.Module, ids: Tensor) -> float:
    return float(block_losses(model, ids).mean())


@torch.no_grad()
def streams(model: nn.Module, layers: nn.ModuleList, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The input and the output of each layer on all blocks, [N, T, d] in float64."""
    inputs: list[list[Tensor]] = [[] for _ in layers]
    outputs: list[list[Tensor]] = [[] for _ in layers]

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], result: Tensor | tuple[Tensor, ...]) -> None:
            inputs[index].append(args[0].double().clone())
            outputs[index].append((result[0] if isinstance(result, tuple) else result).double().clone())

        return hook

    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    for block in ids:
        model(input_ids=block[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(each) for each in inputs], [torch.cat(each) for each in outputs]


def variance(model: nn.Module, layers: nn.ModuleList, ids: Tensor) -> np.ndarray:
    _, outputs = streams(model, layers, ids)
    return np.array([out.var(-1, unbiased=True).mean().item() for out in outputs])


def growth_split(model: nn.Module, layers: nn.ModuleList, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean `Var(u)` and mean `2 Cov(h_in, u)` of each layer, token by token with numpy."""
    own, shared = [], []
    for before, after in zip(*streams(model, layers, ids), strict=True):
        pairs = [
            np.cov(h.numpy(), u.numpy())
            for h, u in zip(before.flatten(0, 1), (after - before).flatten(0, 1), strict=True)
        ]
        own.append(np.mean([pair[1, 1] for pair in pairs]))
        shared.append(np.mean([2 * pair[0, 1] for pair in pairs]))
    return np.array(own), np.array(shared)


@torch.no_grad()
def submodule_variance(model: nn.Module, modules: list[nn.Module], ids: Tensor) -> np.ndarray:
    """The mean variance of what each of some modules puts out (its first tensor)."""
    seen: list[list[float]] = [[] for _ in modules]

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, result: Tensor | tuple[Tensor, ...]) -> None:
            out = result[0] if isinstance(result, tuple) else result
            seen[index].extend(out.double().var(-1).flatten().tolist())

        return hook

    handles = [module.register_forward_hook(keep(index)) for index, module in enumerate(modules)]
    for block in ids:
        model(input_ids=block[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return np.array([np.mean(values) for values in seen])


def affine_fit(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of `after` on `before` with a bias column, float64: the matrix [d, d] and the bias [d]."""
    x = before.flatten(0, 1).numpy()
    # The streams come from float32: singular values below its rounding are noise (a layer norm's zero-sum direction,
    # say).
    solution, *_ = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), after.flatten(0, 1).numpy(), rcond=1e-6)
    return torch.from_numpy(solution[:-1]), torch.from_numpy(solution[-1])


def usefulness_ratios(
    model: nn.Module,
    layers: nn.ModuleList,
    fit_ids: Tensor,
    eval_ids: Tensor,
    *,
    paper_code: bool = False,
    only: list[int] | None = None,
) -> np.ndarray:
    """The loss ratio with each layer replaced by its affine fit; `paper_code` fits in sample and transposes."""
    baseline = loss(model, eval_ids)
    before, after = streams(model, layers, eval_ids if paper_code else fit_ids)
    ratios = np.full(len(layers), np.nan)
    for index in only if only is not None else range(len(layers)):
        matrix, bias = affine_fit(before[index], after[index])
        matrix = matrix.T if paper_code else matrix
        with replaced(layers, index, lambda h, m=matrix, b=bias: (h.double() @ m + b).to(h.dtype)):
            ratios[index] = loss(model, eval_ids) / baseline
    return ratios


def skip_ratios(model: nn.Module, layers: nn.ModuleList, ids: Tensor, only: list[int] | None = None) -> np.ndarray:
    baseline = loss(model, ids)
    ratios = np.full(len(layers), np.nan)
    for index in only if only is not None else range(len(layers)):
        with replaced(layers, index, lambda hidden: hidden):
            ratios[index] = loss(model, ids) / baseline
    return ratios


def causal_matrix(model: nn.Module, layers: nn.ModuleList, ids: Tensor, only: list[int] | None = None) -> np.ndarray:
    """`C[s, l]`, NaN where s >= l (and in rows not asked for)."""
    count = len(layers)
    before, after = streams(model, layers, ids)
    updates = [b - a for a, b in zip(before, after, strict=True)]
    effects = np.full((count, count), np.nan)
    for skipped in only if only is not None else range(count):
        with replaced(layers, skipped, lambda hidden: hidden):
            before, after = streams(model, layers, ids)
        for later in range(skipped + 1, count):
            change = (after[later] - before[later] - updates[later]).norm(dim=-1).mean()
            effects[skipped, later] = (change / updates[later].norm(dim=-1).mean()).item()
    return effects


def permutation_score(model: nn.Module, layers: nn.ModuleList, ids: Tensor, i: int, j: int) -> float:
    baseline = loss(model, ids)
    layers[i], layers[j] = layers[j], layers[i]
    swapped = loss(model, ids)
    layers[i], layers[j] = layers[j], layers[i]
    return abs(baseline - swapped) / baseline


def permutation_matrix(model: nn.Module, layers: nn.ModuleList, ids: Tensor) -> np.ndarray:
    """`P[i, j]`, symmetric, NaN on the diagonal."""
    count = len(layers)
    scores = np.full((count, count), np.nan)
    for i in range(count):
        for j in range(i + 1, count):
            scores[i, j] = scores[j, i] = permutation_score(model, layers, ids, i, j)
    return scores


def jacobian_distance(model: nn.Module, layers: nn.ModuleList, ids: Tensor) -> np.ndarray:
    """`||J_l - I||_F / d` by one backward pass for every output feature, block by block, through the whole model."""
    sums: dict[int, Tensor] = {}
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], result: Tensor | tuple[Tensor, ...]) -> None:
            seen[index] = (args[0], result[0] if isinstance(result, tuple) else result)

        return hook

    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    for block in ids:
        model(input_ids=block[None], use_cache=False)
        for index, (into, out) in seen.items():
            rows = [
                torch.autograd.grad(out[..., feature].sum(), into, retain_graph=True)[0].double().sum((0, 1))
                for feature in range(out.shape[-1])
            ]
            sums[index] = sums.get(index, 0) + torch.stack(rows)
    for handle in handles:
        handle.remove()
    width = sums[0].shape[0]
    eye = torch.eye(width, dtype=torch.float64)
    return np.array([((sums[index] / ids.numel() - eye).norm() / width).item() for index in range(len(layers))])


def geometry(model: nn.Module, layers: nn.ModuleList, ids: Tensor) -> dict[str, np.ndarray]:
    """Block influence, angular distance, update norm and update cosine of each layer."""
    found: dict[str, list[float]] = {
        name: [] for name in ("block_influence", "angular_distance", "update_norm", "update_cosine")
    }
    for before, after in zip(*streams(model, layers, ids), strict=True):
        update = after - before
        cosine = F.cosine_similarity(before, after, dim=-1)
        found["block_influence"].append((1 - cosine.mean()).item())
        found["angular_distance"].append((cosine.clamp(-1, 1).arccos() / math.pi).mean().item())
        found["update_norm"].append((update.norm(dim=-1).mean() / before.norm(dim=-1).mean()).item())
        found["update_cosine"].append(F.cosine_similarity(update, before, dim=-1).mean().item())
    return {name: np.array(values) for name, values in found.items()}


def participation_ratio(increases: np.ndarray) -> float:
    clipped = np.maximum(increases, 0)
    if not clipped.any():
        return 0.0
    return float(clipped.sum() ** 2 / (clipped**2).sum())


def jackknife_se(per_block: np.ndarray, statistic: Callable[[np.ndarray], float]) -> float:
    """The delete-one standard error of a statistic of per-block values [N, ...]."""
    count = len(per_block)
    without = np.array([statistic(np.delete(per_block, block, axis=0)) for block in range(count)])
    return float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))
