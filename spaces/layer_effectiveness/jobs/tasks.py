"""The task of a visitor: the model, the text, the scores and the settings; and the key of its cached result."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from depthscope import Settings
from depthscope.errors import SettingsError
from depthscope.report.measures import SCORE_NAMES
from safety.limits import Limits
from safety.problems import Problem
from safety.repository import HubModel

__all__ = [
    "DTYPES",
    "HAS_GPU",
    "PRECISIONS",
    "SAMPLE",
    "STAGES",
    "Task",
    "Text",
    "choose_settings",
    "fitted",
    "make_text",
    "read_text_file",
    "stages",
]

# Scores that share their passes through the model, the quickest first: each stage's results are shown as it ends.
STAGES: dict[str, tuple[str, ...]] = {
    "Watching the residual stream": ("variance", "block_influence", "angular_distance", "update"),
    "Measuring sparsity": ("weight_sparsity", "attention_sparsity", "expert_load"),
    "Leaving out each layer": ("skip", "causal"),
    "Replacing each layer by an affine map": ("usefulness",),
    "Estimating Jacobians": ("jacobian",),
    "Swapping layers": ("permutation",),
}
# A score in no stage is measured with the first stage.
_WATCHED = next(iter(STAGES))
STAGES[_WATCHED] += tuple(name for name in SCORE_NAMES if not any(name in names for names in STAGES.values()))
PRECISIONS = {"as the hardware likes it": "auto", "float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
DTYPES = frozenset(PRECISIONS.values())
DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?", re.ASCII)
WORD = re.compile(r"[\w.\[\]:%-]{1,100}", re.ASCII)

TextKind = Literal["sample", "pasted", "file", "dataset"]
ORDERED_PAIRS = 60.0  # to swap: all pairs up to 7 layers, 7% of them at 30 layers
PROBES = 4
HAS_GPU = Path("/dev/nvidiactl").exists()  # numbers differ a little, and `auto` may choose another dtype
FITTING = 3.5  # tokens to fit a linear map, per input feature


@dataclass(frozen=True)
class Text:
    """The text to measure on: `value` is the pasted text, the content of a file, or a dataset's name."""

    kind: TextKind = "sample"
    value: str = ""
    column: str | None = None
    split: str | None = None
    commit: str | None = None  # of a dataset, when it was looked up

    def fingerprint(self) -> str:
        """The identity of this text, for the key."""
        value = self.value.encode("utf-8", "surrogatepass")
        return hashlib.sha256(repr((self.kind, self.column, self.split, self.commit)).encode() + value).hexdigest()


SAMPLE = Text()


@dataclass(frozen=True)
class Task:
    """One analysis. `model` is a model on the Hub or the paths of an upload; `name` is its name in the report."""

    name: str
    model: HubModel | tuple[str, ...]
    identity: str  # the commit, or the fingerprint of the upload
    text: Text
    settings: Settings
    dtype: str = "auto"
    token: str | None = field(default=None, repr=False)
    seconds: float = 60.0  # as estimated

    @property
    def is_shareable(self) -> bool:
        """Whether the result may be shown to other visitors: only if the model is public."""
        return not (isinstance(self.model, HubModel) and self.model.restricted)

    @property
    def is_storable(self) -> bool:
        """Whether the result may be published: only if neither model nor text is a visitor's own."""
        return isinstance(self.model, HubModel) and self.is_shareable and self.text.kind in ("sample", "dataset")

    def key(self) -> str:
        """The key of the result: a hash of model, text, settings and versions."""
        versions = [version(name) for name in ("depthscope", "torch", "transformers")]
        text, settings = self.text.fingerprint(), asdict(self.settings)
        content = [self.name, self.identity, text, settings, self.dtype, HAS_GPU, versions]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_text(
    kind: str,
    *,
    pasted: str = "",
    file: str | None = None,
    dataset: str = "",
    column: str = "",
    split: str = "",
    limits: Limits,
) -> Text:
    """Check the visitor's choice of a text; `file` is the content of an uploaded file.

    Raises:
        Problem: there is no text, too much text, or an invalid name of a dataset.
    """
    if kind == "pasted":
        if not pasted.strip():
            raise Problem("text", "The pasted text is empty. Paste some text, or choose the embedded sample.")
        _require_length(len(pasted.encode("utf-8", "replace")), limits)
        return Text("pasted", pasted)
    if kind == "file":
        if not file:
            raise Problem("text", "No text file was uploaded. Upload one, or choose the embedded sample.")
        return Text("file", file)
    if kind == "dataset":
        name = dataset.strip()
        if not DATASET.fullmatch(name):
            raise Problem(
                "text",
                f"{name[:80]!a} is not the name of a dataset. Give one such as Salesforce/wikitext:wikitext-2-v1.",
            )
        for word in (column, split):
            if word and not WORD.fullmatch(word):
                raise Problem(
                    "text", f"{word[:80]!a} is not a column or split; leave the field empty to choose it automatically."
                )
        return Text("dataset", name, column or None, split or None)
    if kind == "sample":
        return SAMPLE
    raise Problem("settings", f"{kind[:40]!a} is not a type of text; choose sample, pasted, file or dataset.")


def read_text_file(path: Path, limits: Limits) -> str:
    """Read an uploaded text.

    Raises:
        Problem: the file is deleted, too large, empty or not text.
    """
    try:
        _require_length(path.stat().st_size, limits)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Problem("text", "The text file has been deleted. Upload it again.") from error
    except UnicodeDecodeError as error:
        raise Problem("text", f"{path.name!a} is not UTF-8 text. Save it as plain text and upload it again.") from error
    if not text.strip():
        raise Problem("text", f"{path.name!a} has no words. Upload a text of a few thousand words.")
    return text


def _require_length(length: int, limits: Limits) -> None:
    if length > limits.max_text_bytes:
        raise Problem(
            "text",
            f"The text is larger than {limits.max_text_bytes / 2**20:g} MiB; the first few thousand words are enough.",
        )


def choose_settings(
    scores: Sequence[str], tokens: int, block_size: int, *, layers: int, width: int, limits: Limits, bos: str = "auto"
) -> Settings:
    """Choose the settings of the measurement for the model's shape and the number of tokens.

    Raises:
        Problem: a choice exceeds the limits, or no score is chosen.
    """
    if not 2 <= block_size <= limits.max_block_size:
        raise Problem("settings", f"Blocks of {block_size} tokens were asked for; choose 2 to {limits.max_block_size}.")
    if not block_size <= tokens <= limits.max_tokens:
        raise Problem("settings", f"{tokens} tokens were asked for; choose {block_size} to {limits.max_tokens}.")
    fit_tokens = min(max(2 * tokens, math.ceil(FITTING * width)), 4 * limits.max_tokens)
    share = ORDERED_PAIRS / layers**2
    try:
        chosen = Settings(
            scores=tuple(scores),
            fit_blocks=math.ceil(fit_tokens / block_size),
            eval_blocks=math.ceil(tokens / block_size),
            block_size=block_size,
            bos=bos,
            pairs="all" if share >= 1 else max(0.01, round(share, 2)),
            probes=PROBES,
        )
    except SettingsError as error:
        raise Problem("settings", str(error)) from error
    return chosen if "usefulness" in chosen.scores else chosen.with_(fit_blocks=0)


def fitted(settings: Settings, facts: Mapping[str, Any], limits: Limits) -> Settings:
    """The settings for the same choices, now that the facts of the model are known."""
    layers, width = facts.get("num_layers"), facts.get("hidden_size")
    if not layers or not width:
        return settings
    tokens, size, bos = settings.eval_blocks * settings.block_size, settings.block_size, str(settings.bos)
    return choose_settings(settings.scores, tokens, size, layers=layers, width=width, limits=limits, bos=bos)


def stages(settings: Settings) -> dict[str, tuple[str, ...]]:
    """The stages that the chosen scores need, with the scores of each."""
    chosen = {name: tuple(score for score in scores if score in settings.scores) for name, scores in STAGES.items()}
    return {name: scores for name, scores in chosen.items() if scores}
