"""The result of loading: the model, its tokenizer, and facts about both."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from depthscope.errors import ModelLoadError

__all__ = ["LoadedModel"]


@dataclass
class LoadedModel:
    """A model in evaluation mode, its tokenizer (None without one) and its facts: the report's `model` section.

    `notes` are remarks on the loading for the report; `tokenizer_problem` says why there is no tokenizer;
    `stored_dtype` is the dtype of the checkpoint's weights, if it is known.
    """

    model: nn.Module
    tokenizer: Any
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    tokenizer_problem: str | None = None
    stored_dtype: torch.dtype | None = None

    def require_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ModelLoadError: there is no tokenizer; the message says why.
        """
        if self.tokenizer is None:
            name = self.facts.get("name", "The model")
            raise ModelLoadError(self.tokenizer_problem or f"{name} has no tokenizer, but text needs one.")
        return self.tokenizer
