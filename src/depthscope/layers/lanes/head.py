"""The head on some tokens, or on some of the vocabulary: where the vocabulary is large, the head is most of the work.

What comes before the head (final norm) and after it (scale, soft cap) stays the model's own code; a stand-in takes the
place of the matrix alone. Whether the model's logits are then those of the chosen tokens is tried on a small example.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from depthscope.layers.memory import is_out_of_memory
from depthscope.layers.modes import evaluating
from depthscope.layers.stack import LayerStack
from depthscope.layers.tracing import MODEL_FAILURES, output_embeddings

__all__ = ["Head", "Vocabulary"]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Some of the vocabulary, with its rows of the head's matrix.

    Attributes:
        ids: the tokens, [K].
        weight: [K, d].
        bias: [K], where the head has one.
    """

    ids: Tensor
    weight: Tensor
    bias: Tensor | None


class Head:
    """The head of a layer stack's model."""

    def __init__(self, stack: LayerStack) -> None:
        self.stack = stack

    @cached_property
    def is_selective(self) -> bool:
        """Whether `on_tokens` and `on_vocabularies` give the model's own logits here, as tried on a small example."""
        stack, ids, expected = self.stack, self.stack.example_ids, self.stack.example_logits
        if self._matrix is None:
            return False
        tokens = torch.zeros_like(ids, dtype=torch.bool)
        tokens[:, 1::2] = True
        tokens[0, 0] = True
        some = torch.arange(1, stack.vocabulary, 3)
        try:
            with evaluating(stack.model), torch.no_grad():
                with self.on_tokens(tokens):
                    few = stack.logits(ids)
                others = [some, (some + 1) % stack.vocabulary]
                chosen = [others[row % 2] for row in range(len(ids))]
                with self.on_vocabularies([self.vocabulary(ids) for ids in chosen]):
                    narrow = stack.logits(ids)
        except MODEL_FAILURES as error:
            if is_out_of_memory(error):
                raise
            return False
        wide = torch.stack([row[:, of.to(row.device)] for row, of in zip(expected, chosen, strict=True)])
        there = expected[tokens.to(expected.device)][None]
        return all(
            one.shape == other.shape and stack.is_close(one, other) for one, other in ((few, there), (narrow, wide))
        )

    def vocabulary(self, ids: Tensor) -> Vocabulary:
        """Some tokens of the vocabulary: ids [K]."""
        matrix = self._required
        there = ids.to(matrix.weight.device)
        return Vocabulary(ids, matrix.weight[there], None if matrix.bias is None else matrix.bias[there])

    @contextmanager
    def on_tokens(self, tokens: Tensor) -> Iterator[None]:
        """Let the model have logits [1, M, V] for M of its tokens only, chosen by a mask [B, T], row by row."""
        with self._replaced(_OnTokens(self._required, tokens)):
            yield

    @contextmanager
    def on_vocabularies(self, vocabularies: Sequence[Vocabulary]) -> Iterator[None]:
        """Let the model have logits [B, T, K] of K tokens of the vocabulary, others for each of the B sequences."""
        with self._replaced(_OnVocabularies(self._required, vocabularies)):
            yield

    @cached_property
    def _matrix(self) -> nn.Linear | None:
        """The module that makes the logits, if it is a matrix and nothing more."""
        module = output_embeddings(self.stack.model)
        plain = type(module) is nn.Linear and not module.weight.is_meta and len(module.weight) == self.stack.vocabulary
        return cast("nn.Linear", module) if plain else None

    @property
    def _required(self) -> nn.Linear:
        if self._matrix is None:
            raise ValueError("The model has no head that is a plain matrix; ask `is_selective` first.")
        return self._matrix

    @contextmanager
    def _replaced(self, stand_in: nn.Module) -> Iterator[None]:
        matrix = self._required
        places = [
            (parent, name)
            for parent in self.stack.model.modules()
            for name, child in parent.named_children()
            if child is matrix
        ]
        try:
            for parent, name in places:
                setattr(parent, name, stand_in)
            yield
        finally:
            for parent, name in places:
                setattr(parent, name, matrix)


class _StandIn(nn.Module):
    """Stands in for the head, and has its attributes; its weights stay the head's own."""

    def __init__(self, matrix: nn.Linear) -> None:
        super().__init__()
        object.__setattr__(self, "matrix", matrix)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "matrix" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["matrix"], name)


class _OnTokens(_StandIn):
    def __init__(self, matrix: nn.Linear, tokens: Tensor) -> None:
        super().__init__(matrix)
        self.tokens = tokens

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [B, T, d] to [1, M, V]."""
        logits: Tensor = self.matrix(hidden[self.tokens.to(hidden.device)])
        return logits[None]


class _OnVocabularies(_StandIn):
    def __init__(self, matrix: nn.Linear, vocabularies: Sequence[Vocabulary]) -> None:
        super().__init__(matrix)
        self.vocabularies = vocabularies

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [B, T, d] to [B, T, K]: the sequences of one vocabulary in one product."""
        rows: dict[Vocabulary, list[int]] = {}
        for row, of_row in enumerate(self.vocabularies):
            rows.setdefault(of_row, []).append(row)
        if len(rows) == 1:
            return _product(hidden, self.vocabularies[0])
        size = len(self.vocabularies[0].ids)
        logits = hidden.new_empty((*hidden.shape[:-1], size))
        for of_rows, which in rows.items():
            logits[which] = _product(hidden[which], of_rows).to(logits.device)
        return logits


def _product(hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
    return functional.linear(hidden.to(vocabulary.weight.device), vocabulary.weight, vocabulary.bias)
