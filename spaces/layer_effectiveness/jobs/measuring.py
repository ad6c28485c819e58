"""Loading a checked model and measuring it in stages, so that the first plots appear early.

Each stage is one `depthscope.analyze` on the same blocks of tokens; the merged report equals that of a single analysis.
Imported only in the process of a job, because torch and transformers take seconds.
"""

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

from depthscope import Blocks, LayerReport, Settings, analyze, load_blocks, load_model
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


def measure(loaded: LoadedModel, blocks: Blocks, settings: Settings, tell: Told) -> Iterator[LayerReport]:
    """Measure in stages and yield the report after each. `tell` is called with the stage and the share that is done."""
    plan = stages(settings)
    weights = work(_shape(loaded), settings)
    total = sum(weights.values())
    done, report = 0.0, None
    for stage, scores in plan.items():
        share, base = weights[stage] / total, done

        def listen(what: str, inner: float, stage: str = stage, share: float = share, base: float = base) -> None:
            tell(f"{stage}: {what}", base + share * inner)

        measured = analyze(loaded.model, blocks=blocks, settings=settings, scores=scores, progress=listen)
        done += share
        report = _named(measured, loaded) if report is None else merge(report, _named(measured, loaded))
        yield report
    if report is not None and (drop := measure_drop(loaded, blocks, report)) is not None:
        yield report.model_copy(update={"notes": [*report.notes, drop.in_words()]})


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
