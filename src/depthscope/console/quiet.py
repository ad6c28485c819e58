"""Silencing the log lines and progress bars of the Hugging Face libraries.

depthscope's own errors and notes contain what matters of them; other lines on the terminal would hide those.
"""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr

__all__ = ["quiet"]

LOGGERS = ("transformers", "huggingface_hub", "datasets", "accelerate", "peft", "httpx", "httpx2")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, log lines below CRITICAL and progress bars inside; everything is restored afterwards."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            # Not ERROR: `datasets` logs an error before it raises the exception that we turn into our message.
            logger.setLevel(logging.CRITICAL)
        _hide_progress_bars(stack)
        stack.enter_context(redirect_stderr(io.StringIO()))  # some bars (unpacking a GGUF file) have no switch
        yield


def _hide_progress_bars(stack: ExitStack) -> None:
    """Switch off the bars of the libraries that are imported until `stack` ends."""
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import utils

        # First, so that it is restored last: transformers' own switch below moves this one too.
        stack.callback(
            utils.disable_progress_bars if utils.are_progress_bars_disabled() else utils.enable_progress_bars
        )
        utils.disable_progress_bars()
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        if transformers_logging.is_progress_bar_enabled():
            stack.callback(transformers_logging.enable_progress_bar)
            transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        if not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
