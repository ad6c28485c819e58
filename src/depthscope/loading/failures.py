"""Why a model could not be loaded or run: exceptions of other libraries become one message per cause.

The cause is found by the class of the exception, and by checking the files after a failure, not by the wording of a
message, which changes between versions.
"""

import struct
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError

from depthscope.errors import ModelLoadError, OutOfMemoryError
from depthscope.layers.memory import is_out_of_memory
from depthscope.loading.checkpoint import CONFIG, Checkpoint, damaged_file, explain_hub_error
from depthscope.loading.gguf.header import read_header
from depthscope.wording.messages import listed, one_line

__all__ = ["LOAD_FAILURES", "causes", "load_errors", "memory_errors"]

# The exceptions of transformers for a config, weights or a tokenizer that it cannot load.
LOAD_FAILURES = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    EOFError,
    struct.error,
    StrictDataclassError,
    SafetensorError,
)
HUB_FAILURES = (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError)


@contextmanager
def load_errors(checkpoint: Checkpoint, part: str) -> Iterator[None]:
    """Turn an exception of transformers while it loads a `part` ("config" or "weights") into a `ModelLoadError`."""
    try:
        yield
    except (MemoryError, *LOAD_FAILURES) as error:
        if is_out_of_memory(error):
            raise ModelLoadError(
                f"{checkpoint.name!r} does not fit in memory. Load it as bfloat16, or split it over devices with "
                "device auto."
            ) from error
        raise ModelLoadError(_explain(checkpoint, part, error)) from error


@contextmanager
def memory_errors(lower: str, *others: str) -> Iterator[None]:
    """Turn an out-of-memory error into an `OutOfMemoryError` whose message says what to lower or what else to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        steps = [f"Lower {lower}", "use a narrower dtype (bfloat16)", 'split the model over devices with device="auto"']
        *steps, last = *steps, *others
        raise OutOfMemoryError(f"The device ran out of memory. {', '.join(steps)}, or {last}.") from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain(checkpoint: Checkpoint, part: str, error: BaseException) -> str:
    for cause in causes(error):
        if isinstance(cause, HUB_FAILURES):
            return explain_hub_error(cause, checkpoint.name, checkpoint.revision)
    details = _unconverted_weights(error) or f"{type(error).__name__}: {one_line(error)}"
    if checkpoint.gguf_file:
        return _explain_gguf(checkpoint, details)
    if damaged := damaged_file(checkpoint):
        return f"{damaged[0]} of {checkpoint.name!r} is damaged ({damaged[1]}) Fetch the file again."
    quantization = checkpoint.read_json(CONFIG).get("quantization_config")
    if part == "weights" and isinstance(quantization, dict):
        return (
            f"{checkpoint.name!r} is quantised with {quantization.get('quant_method')!r}, which cannot be loaded here "
            f"({details}) Install what it needs, or give the model that it was made from."
        )
    if isinstance(error, ImportError):
        return f"{checkpoint.name!r} needs a package that is not installed ({details}) Install it and try again."
    if part == "config":
        return f"config.json of {checkpoint.name!r} is not valid ({details}) Repair the file, or fetch it again."
    return f"{checkpoint.name!r} cannot be loaded ({details}) Check that config.json and weights belong together."


def _unconverted_weights(error: BaseException) -> str:
    """The weights that could not be converted from the stored ones; transformers names them in its log only."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            if type(value).__name__ == "LoadStateDictInfo" and (failures := getattr(value, "conversion_errors", None)):
                names = sorted(failures)
                # The last lines: the traceback's error, the error again, and the step.
                lines = [line.strip() for line in str(failures[names[0]]).splitlines() if line.strip()]
                reason = one_line(ValueError(lines[-2] if len(lines) > 1 else "".join(lines)))
                count = f"{len(names)} weight{'s' * (len(names) > 1)}"
                return f"{count} cannot be put together from what is stored: {listed(names)}. {reason}"
    return ""


def _explain_gguf(checkpoint: Checkpoint, details: str) -> str:
    architecture = read_header(Path(checkpoint.gguf_file or ""), checkpoint.name).architecture
    if architecture is None:
        return (
            f"{checkpoint.name!r} names no architecture (general.architecture in its header). Convert the model again."
        )
    return (
        f"{checkpoint.name!r} is a GGUF file of the architecture {architecture!r}, which transformers "
        f"{transformers.__version__} cannot load ({details}) Give the original model instead."
    )
