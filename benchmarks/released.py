"""The released algorithms, re-implemented by us from their description, to be timed against.

"When Does Sparsity Mitigate the Curse of Depth in LLMs" (arXiv 2603.15389) publishes its scores as functions over its
own two model classes (github pUmpKin-Co/SparsityAndCoD). What is kept here is how they go about it: the whole model
runs again for every layer or pair, weights are copied to swap layers, all hidden states are held, the Jacobian takes
one backward pass for each of the d dimensions. What is ordinary good practice (no_grad, batches, library kernels) is
kept too.

Each function takes a causal LM of transformers, its `ModuleList` of decoder layers, blocks of token ids [N, T] and a
batch size, and does the layers or pairs named in `only`, so that a share can be timed and scaled up: all layers cost
the same here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def batches(ids: Tensor, size: int) -> Sequence[Tensor]:
    """Consecutive batches of blocks."""
    return ids.split(size)


@torch.no_grad()
def mean_loss(model: nn.Module, ids: Tensor, batch_size: int) -> float:
    """Mean next-token cross-entropy in nats, over flattened logits."""
    total = 0.0
    for batch in batches(ids, batch_size):
        logits = model(input_ids=batch, use_cache=False).logits
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()).item() * len(batch)
    return total / len(ids)


@contextmanager
def watching(layers: Sequence[nn.Module], keep: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `keep(index, input, output)` for each layer in each forward pass."""

    def hook(index: int) -> Callable[..., None]:
        def inner(module: nn.Module, args: tuple[Tensor, ...], result: Tensor | tuple[Tensor, ...]) -> None:
            keep(index, args[0], result[0] if isinstance(result, tuple) else result)

        return inner

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Replacement(nn.Module):
    """A module in the place of a decoder layer that returns a bare tensor; it gets the hidden state only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Map the hidden state [B, T, d]."""
        return self.inner(hidden)


@torch.no_grad()
def usefulness(
    model: nn.Module,
    layers: nn.ModuleList,
    ids: Tensor,
    batch_size: int,
    only: Sequence[int],
    *,
    fit_ids: Tensor | None = None,
    transpose: bool = False,
) -> dict[int, float]:
    """Loss ratios of linearised layers, fitted and evaluated on the same tokens, or fitted on `fit_ids`.

    For every layer the whole model runs over all tokens to collect that layer's inputs and outputs, float32 `lstsq`
    fits them, and an `nn.Linear` whose weight is the solution, un-transposed as released, takes the layer's place;
    `transpose` mends that.
    """
    baseline = mean_loss(model, ids, batch_size)
    ratios = {}
    for index in only:
        seen: list[tuple[Tensor, Tensor]] = []
        with watching([layers[index]], lambda _, into, out, seen=seen: seen.append((into, out))):
            for batch in batches(ids if fit_ids is None else fit_ids, batch_size):
                model(input_ids=batch, use_cache=False)
        x = torch.cat([into.flatten(0, 1) for into, _ in seen])
        y = torch.cat([out.flatten(0, 1) for _, out in seen])
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), y).solution
        linear = nn.Linear(x.shape[1], y.shape[1])
        linear.weight.data = solution[:-1].T.contiguous() if transpose else solution[:-1].contiguous()
        linear.bias.data = solution[-1]
        original, layers[index] = layers[index], Replacement(linear)
        ratios[index] = mean_loss(model, ids, batch_size) / baseline
        layers[index] = original
    return ratios


@torch.no_grad()
def causal(
    model: nn.Module, layers: nn.ModuleList, ids: Tensor, batch_size: int, only: Sequence[int]
) -> dict[int, Tensor]:
    """For each skipped layer the relative change of all later layers' updates, [L] with zeros up to the layer itself.

    One whole forward pass a skipped layer and batch, all hidden states held, compared with the baseline's.
    """
    changes = {index: ids.new_zeros(len(layers), dtype=torch.float32) for index in only}
    lengths = ids.new_zeros(len(layers), dtype=torch.float32)
    for batch in batches(ids, batch_size):
        baseline = _updates(model, layers, batch)
        lengths += torch.stack([update.norm(dim=-1).sum() for update in baseline])
        for index in only:
            original, layers[index] = layers[index], Replacement(nn.Identity())
            skipped = _updates(model, layers, batch)
            layers[index] = original
            for later in range(index + 1, len(layers)):
                changes[index][later] += (skipped[later] - baseline[later]).norm(dim=-1).sum()
    return {index: change / lengths for index, change in changes.items()}


def _updates(model: nn.Module, layers: nn.ModuleList, batch: Tensor) -> list[Tensor]:
    updates: list[Tensor] = []
    with watching(list(layers), lambda _, into, out: updates.append(out - into)):
        model(input_ids=batch, use_cache=False)
    return updates


@torch.no_grad()
def permutation(
    model: nn.Module, layers: nn.ModuleList, ids: Tensor, batch_size: int, only: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], float]:
    """Relative loss changes of swapped pairs: copy the weights over, run the whole model, copy them back."""
    baseline = mean_loss(model, ids, batch_size)
    scores = {}
    for i, j in only:
        _swap_weights(layers[i], layers[j])
        scores[i, j] = abs(baseline - mean_loss(model, ids, batch_size)) / baseline
        _swap_weights(layers[i], layers[j])
    return scores


def _swap_weights(one: nn.Module, other: nn.Module) -> None:
    first = {name: weight.clone() for name, weight in one.state_dict().items()}
    second = {name: weight.clone() for name, weight in other.state_dict().items()}
    one.load_state_dict(second)
    other.load_state_dict(first)


def jacobian(
    model: nn.Module,
    layers: nn.ModuleList,
    ids: Tensor,
    batch_size: int,
    only: Sequence[int],
    dimensions: int | None = None,
) -> dict[int, float]:
    """`||J - I||_F / d` of each layer by one backward pass a dimension and batch.

    `dimensions` stops after the first so many, for timing; the value is then that of a part of the rows.
    """
    distances = {}
    for index in only:
        rows: Tensor | None = None
        for batch in batches(ids, batch_size):
            part = _jacobian_rows(model, layers, index, batch, dimensions)
            rows = part if rows is None else rows + part
        assert rows is not None
        width = rows.shape[1]
        eye = torch.eye(width, device=rows.device)[: len(rows)]
        distances[index] = ((rows / ids.numel() - eye).norm() / width).item()
    return distances


def _jacobian_rows(
    model: nn.Module, layers: nn.ModuleList, index: int, batch: Tensor, dimensions: int | None
) -> Tensor:
    seen: list[tuple[Tensor, Tensor]] = []
    with watching([layers[index]], lambda _, into, out: seen.append((into, out))):
        model(input_ids=batch, use_cache=False)
    ((into, out),) = seen
    rows = [
        torch.autograd.grad(out[..., feature].sum(), into, retain_graph=True)[0].sum((0, 1))
        for feature in range(dimensions or out.shape[-1])
    ]
    return torch.stack(rows)
