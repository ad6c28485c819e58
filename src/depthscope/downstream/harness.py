"""A loaded model for lm-eval: its own class for transformers, with our progress bar and our errors."""

import copy
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any, TextIO

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from depthscope.console.progress import Progress, showing_progress
from depthscope.errors import SettingsError
from depthscope.loading.loaded import LoadedModel

__all__ = ["HarnessModel"]


class HarnessModel(HFLM):
    """A model in memory, for lm-eval.

    Args:
        loaded: the model and its tokenizer.
        batch_size: answers per forward pass.
        progress: whether to show a bar.
        terminal: the stream of the bar; standard error itself is silenced for lm-eval.

    Attributes:
        truncated: the number of questions whose beginning was cut, because the model has too few positions.
        questions: the number of pairs of question and answer that the model has scored.
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int, progress: bool, terminal: TextIO) -> None:
        # A copy, because lm-eval adds a missing padding token to the tokenizer.
        tokenizer = copy.deepcopy(loaded.require_tokenizer())
        _give_padding(tokenizer, loaded.model)
        super().__init__(pretrained=loaded.model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.truncated = self.questions = 0
        self._visible, self._terminal = progress, terminal

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Compute the log-likelihood of each answer after its question, in nats."""
        if any(request.args[0] == "" for request in requests):
            self._require_prefix()
        return self._counted("scoring answers", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Compute the log-likelihood of each text, in nats."""
        self._require_prefix()
        return self._counted("scoring texts", super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate an answer to each question."""
        return self._counted("writing answers", super().generate_until, requests)

    # lm-eval uses BOS, or else EOS, at the start of a text, and EOS at the end of answers, without a check that the
    # tokenizer has them.

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Tokenize a text, by default with the special tokens that the tokenizer adds."""
        if add_special_tokens is None and self.prefix_token_id is None:
            add_special_tokens = True
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **options)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """Convert tokens to text; None, a missing EOS, stays None."""
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    def tok_batch_encode(self, strings: list[str], *positional: Any, **named: Any) -> tuple[Any, Any]:
        """Tokenize questions to equal length; the padding id, which is masked, is one that the model has."""
        ids, mask = super().tok_batch_encode(strings, *positional, **named)
        return (ids, mask) if self.tokenizer.pad_token_id < self._size() else (ids.masked_fill(mask == 0, 0), mask)

    def _size(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    def _require_prefix(self) -> None:
        if self.prefix_token_id is None:
            raise SettingsError(
                "A task scores texts without a question, which begin with BOS or EOS, but the tokenizer has neither. "
                "Set its bos_token or eos_token to that of the model's training, or leave the task out."
            )

    def _loglikelihood_tokens(self, requests: list[Any], *positional: Any, **named: Any) -> list[tuple[float, bool]]:
        self._require_positions([continuation for _, _, continuation in requests])
        self.questions += len(requests)
        lengths = (len(context) + len(continuation) for _, context, continuation in requests)
        # The model does not read the last token of an answer.
        self.truncated += sum(length > self.max_length + 1 for length in lengths)
        return super()._loglikelihood_tokens(requests, *positional, **named)

    def _require_positions(self, answers: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, answers), default=0)
        if longest > self.max_length:
            raise SettingsError(
                f"An answer has {longest} tokens, but the model has {self.max_length} positions. Leave out the task, "
                "or evaluate a model with more positions."
            )

    def _counted(self, what: str, answer: Callable[..., Any], requests: list[Any]) -> Any:
        with redirect_stderr(self._terminal), showing_progress(len(requests), visible=self._visible) as bar:
            bar.at(what)
            self.set_cache_hook(_Counter(bar))
            try:
                return answer(requests, disable_tqdm=True)
            finally:
                self.set_cache_hook(CacheHook(None))


def _give_padding(tokenizer: Any, model: Any) -> None:
    """Pad with the end token of the model if the tokenizer has no padding token; lm-eval would add a new one."""
    named = ("pad_token_id", "unk_token_id", "eos_token_id")
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < len(tokenizer) and all(getattr(tokenizer, n, None) is None for n in named):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)


class _Counter(CacheHook):
    """Counts the answered requests, each of which lm-eval reports to its cache."""

    def __init__(self, bar: Progress) -> None:
        super().__init__(None)
        self.bar = bar

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Count one request."""
        self.bar.advance(1)
