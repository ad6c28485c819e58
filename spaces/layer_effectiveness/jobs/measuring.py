"""Loading a checked model and measuring it in stages, so that the first plots appear early.

Each stage is an analysis of its own on the same blocks of tokens; the merged report equals that of a single one. Where
the time would be up before, a stage ends with fewer blocks.
Imported only in the process of a job, because torch and transformers take seconds.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
)

from depthscope import Blocks, LayerReport, Settings, load_blocks, load_model
from depthscope.analysis.analyze import analyze_blocks
from depthscope.loading.failures import LOAD_FAILURES
from depthscope.loading.loaded import LoadedModel
from jobs.drops import measure_drop
from jobs.estimate import Shape, work
from jobs.tasks import Task, Text, stages
from safety.config import read_object
from safety.limits import Limits
from safety.problems import Problem
from safety.repository import HubModel
from safety.uploads import Model

__all__ = ["load", "measure", "merge", "read_text"]

Told = Callable[[str, float], None]
Shown = Callable[[LayerReport], None]
LEAST_PART = 0.5  # of the time left, for any stage: what is done before the first block is no part of the work
SLACK = 1.3  # a config may describe more weights than the files hold, because tied weights are stored once
TRIAL = "The layers of a model pass on a stream. " * 5
MOST_TOKENS_A_CHARACTER = 16


def load(task: Task, found: Model, limits: Limits) -> LoadedModel:
    """Load a checked model in evaluation mode; its facts have the visitor's name for it.

    Raises:
        Problem: an unknown architecture, not a causal language model, or a config that does not fit the weights.
        ModelLoadError: depthscope cannot load it.
    """
    with _offline():
        if not found.is_gguf:
            _require_known(found, limits)
        loaded = load_model(str(found.path), dtype=task.dtype)
    facts = {**loaded.facts, "name": task.name}
    if isinstance(task.model, HubModel):
        facts |= {"source": "hub", "revision": task.model.sha}
    _require_sane_tokenizer(loaded)
    return replace(loaded, facts=facts)


def read_text(text: Text, loaded: LoadedModel, settings: Settings) -> Blocks:
    """Cut the chosen text into blocks of tokens.

    Raises:
        CorpusError: the text is too short, or the dataset cannot be read.
    """
    source: Any = None
    if text.kind in ("pasted", "file"):
        source = iter([text.value])  # a list of file names would be read as those files
    names = {"pasted": "pasted text", "file": "uploaded text"}
    return load_blocks(
        source,
        loaded.require_tokenizer(),
        num_blocks=settings.fit_blocks + settings.eval_blocks,
        block_size=settings.block_size,
        dataset=text.value if text.kind == "dataset" else None,
        column=text.column,
        split=text.split,
        bos=settings.bos,
        name=names.get(text.kind),
    )


def measure(
    loaded: LoadedModel, blocks: Blocks, settings: Settings, tell: Told, show: Shown, seconds: float = math.inf
) -> LayerReport:
    """Measure in stages, each on as many of the blocks as fit into its part of `seconds`, and return the report.

    `tell` is called with the stage and the share that is done, `show` with the report so far after each round of
    blocks. A report with `budget` has scores of fewer blocks than were asked for, and notes that name them.
    """
    plan = stages(settings)
    weights = work(_shape(loaded), settings)
    total, end = sum(weights.values()), time.monotonic() + seconds
    done, report = 0.0, None
    for stage, scores in plan.items():
        share, base = weights[stage] / total, done

        def listen(what: str, inner: float, stage: str = stage, share: float = share, base: float = base) -> None:
            tell(f"{stage}: {what}", base + share * inner)

        def so_far(part: LayerReport, before: LayerReport | None = report) -> None:
            show(_merged(before, _named(part, loaded)))

        left = end - time.monotonic()
        measured = analyze_blocks(
            loaded.model,
            blocks,
            settings.with_(scores=scores),
            facts=loaded.facts,
            progress=listen,
            on_partial=so_far,
            time_limit=None if math.isinf(left) else left * max(share / (1 - base), LEAST_PART),
        )
        done += share
        report = _merged(report, _cut(_named(measured, loaded), settings))
        show(report)
    assert report is not None, "settings have a score"
    if report.budget is None and (drop := measure_drop(loaded, blocks, report)) is not None:
        report = report.model_copy(update={"notes": [*report.notes, drop.in_words()]})
        show(report)
    return report


def _cut(report: LayerReport, settings: Settings) -> LayerReport:
    """The report of a stage, with a note of its own if the time was up before all blocks were measured."""
    if report.budget is None:
        return report
    notes = [note for note in report.notes if not note.startswith("budget: ")]
    names = ", ".join(str(name) for name in _names(report))
    note = (
        f"{names}: measured on the first {report.data['eval_blocks']} of {settings.eval_blocks} blocks, because the "
        "time of an analysis on this Space was up. Choose fewer scores or tokens, or run it on your own machine."
    )
    return report.model_copy(update={"notes": [note, *notes]})


def _merged(first: LayerReport | None, second: LayerReport) -> LayerReport:
    return second if first is None else merge(first, second)


def merge(first: LayerReport, second: LayerReport) -> LayerReport:
    """Merge two reports of one model on the same blocks; common entries are taken from the first."""
    scores = ",".join(str(name) for report in (first, second) for name in _names(report))
    rows = [{**other, **row} for row, other in zip(first.layers, second.layers, strict=True)]
    content = {
        "settings": {**first.settings, "scores": list(Settings(scores=scores).scores)},
        "notes": [*first.notes, *(note for note in second.notes if note not in first.notes)],
        "scores": {**second.scores, **first.scores},
        "layers": rows,
        "pairs": {**second.pairs, **first.pairs},
        "budget": first.budget or second.budget,
    }
    return LayerReport.from_json(first.model_copy(update=content).to_json())


def _names(report: LayerReport) -> list[object]:
    names = report.settings["scores"]
    return list(names) if isinstance(names, list) else []


def _named(report: LayerReport, loaded: LoadedModel) -> LayerReport:
    """The report of a model that was passed as an object, with the name and revision of its source."""
    facts = {**loaded.facts, "num_layers": report.model["num_layers"]}
    notes = [*loaded.notes, *report.notes]
    return LayerReport.from_json(report.model_copy(update={"model": facts, "notes": notes}).to_json())


def _shape(loaded: LoadedModel) -> Shape:
    facts = loaded.facts
    layers, width = facts.get("num_layers") or 1, facts.get("hidden_size") or 1
    vocabulary = facts.get("vocab_size") or 1
    inside = max((facts.get("num_parameters") or 1) - vocabulary * width, 1)
    return Shape(layers, width, inside / layers, vocabulary, has_experts=bool(facts.get("num_experts")))


def _require_known(found: Model, limits: Limits) -> None:
    """Refuse an architecture without code in transformers, and a config that does not match the weights."""
    content = read_object(found.path / "config.json", limits.max_json_bytes, "broken_config")
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        what = f"is of the type {kind[:40]!a}" if isinstance(kind, str) else "names no model_type"
        raise Problem(
            "unknown_architecture",
            f"config.json {what}, for which transformers {transformers.__version__} has no code. This Space never runs "
            "code of a model. If you trust the model: depthscope analyze MODEL --trust-remote-code.",
        )
    described = 0
    with suppress(*LOAD_FAILURES):  # load_model explains them
        config = AutoConfig.from_pretrained(found.path)
        _require_causal(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        described = sum(weight.numel() for weight in model.parameters())
    if described > SLACK * found.parameters + 1_000_000:
        raise Problem(
            "broken_config",
            f"config.json describes a model of {described:,} parameters, but the files hold {found.parameters:,}. "
            "Upload the config of these weights.",
        )


def _require_causal(config: Any) -> None:
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or encoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Problem(
            "not_causal",
            f"A model of the type {config.model_type} is not a decoder-only causal language model, and only such "
            "models can be analysed here. Choose one, such as a Llama, Qwen, GPT-2 or Mixtral.",
        )


def _require_sane_tokenizer(loaded: LoadedModel) -> None:
    """Refuse a tokenizer that makes far more tokens from a text than the text has characters."""
    if loaded.tokenizer is None:
        return
    tokens = len(loaded.tokenizer(TRIAL, add_special_tokens=False)["input_ids"])
    if tokens > MOST_TOKENS_A_CHARACTER * len(TRIAL):
        raise Problem(
            "broken_tokenizer", f"The tokenizer makes {tokens:,} tokens of {len(TRIAL)} characters; it is broken."
        )


@contextmanager
def _offline() -> Iterator[None]:
    """Prevent downloads while untrusted files are read."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before
