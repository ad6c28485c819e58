"""A loaded model as lm-eval wants it: lm-eval's own class for transformers, with our progress bar and our errors."""

import copy
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any, TextIO

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from depthscope.errors import SettingsError
from depthscope.loading import LoadedModel
from depthscope.progress import Progress, showing_progress

__all__ = ["HarnessModel"]


class HarnessModel(HFLM):
    """A model in memory, for lm-eval.

    Args:
        loaded: the model and its tokenizer.
        batch_size: answers in a forward pass.
        progress: whether to show a bar.
        terminal: where to show it; standard error itself is lm-eval's, which is kept quiet.

    Attributes:
        truncated: questions with an answer that had to lose their beginning, because the model has too few positions.
        asked: all questions with an answer, each a pair that the model gave a log-likelihood to.
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int, progress: bool, terminal: TextIO) -> None:
        # A copy, because lm-eval gives a tokenizer without a padding token one.
        tokenizer = copy.deepcopy(loaded.require_tokenizer())
        super().__init__(pretrained=loaded.model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.truncated = self.asked = 0
        self._visible, self._terminal = progress, terminal

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Give the log-likelihood of each answer after its question, in nats."""
        return self._counted("scoring answers", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Give the log-likelihood of each text, in nats."""
        return self._counted("scoring texts", super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Write an answer after each question."""
        return self._counted("writing answers", super().generate_until, requests)

    def _loglikelihood_tokens(self, requests: list[Any], *positional: Any, **named: Any) -> list[tuple[float, bool]]:
        self._require_positions([continuation for _, _, continuation in requests])
        self.asked += len(requests)
        lengths = (len(context) + len(continuation) for _, context, continuation in requests)
        # The last token of an answer is predicted and not read.
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
        with redirect_stderr(self._terminal), showing_progress(len(requests), visible=self._visible) as shown:
            shown.at(what)
            self.set_cache_hook(_Counter(shown))
            try:
                return answer(requests, disable_tqdm=True)
            finally:
                self.set_cache_hook(CacheHook(None))


class _Counter(CacheHook):
    """Counts the requests as they are answered: lm-eval tells its cache of each."""

    def __init__(self, shown: Progress) -> None:
        super().__init__(None)
        self.shown = shown

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One more is done."""
        self.shown.advance(1)
