"""Rendering model cards from the record of a model.

    card = card_for(folder, repo_id="namespace/name", license="apache-2.0")
    card.save("README.md")

The text is in `templates/model_card.md.j2`, which escapes all content of a record, since its texts come from files of
strangers. A card contains no time: the same record gives the same bytes.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment

from depthscope.hub.cards.data import LAYER_COLUMNS, DepthCardData
from depthscope.hub.cards.figures import FOLDER, figure_names
from depthscope.hub.cards.front_matter import INDEXED, evaluation, front_matter, perplexity
from depthscope.hub.cards.read import read_card_data
from depthscope.report.measures import GLOBAL_SCORES, LAYER_SCORES, format_score
from depthscope.report.summary import beginning, summarize
from depthscope.views.templates import templates
from depthscope.wording.markdown import Markdown, code, inline
from depthscope.wording.numbers import format_number, format_with_error

__all__ = ["card_for", "render_card"]

MOST_NAMED = 8  # branches
LONG_TABLE = 24  # layers; a longer table is folded
RELATIONS = {
    "adapter": "is an adapter of",
    "finetune": "is fine-tuned from",
    "merge": "is a merge of",
    "quantized": "is quantised from",
}
NORMS = {
    "pre": "RMSNorm before each sublayer",
    "post": "RMSNorm after each sublayer and its residual",
    "peri": "RMSNorm before and after each sublayer",
    "mix": "RMSNorm after the sublayers of the first layers, before those of the others (Mix-LN)",
    "output": "RMSNorm of the output of each sublayer",
}


@dataclass(frozen=True)
class _Score:
    """A row of the table of scores."""

    label: str
    trained: str
    untrained: str
    phrase: str


def card_for(folder: str | os.PathLike[str], *, figures: str | None = FOLDER, **options: Any) -> ModelCard:
    """Write the card of the model in a folder.

    Args:
        folder: a point of a sweep, the output folder of a Trainer, or the folder of a saved model.
        figures: the folder of the figures in the repository; None leaves them out.
        options: `repo_id`, and the other arguments of `read_card_data`.

    Raises:
        SettingsError, ReportError: as `read_card_data`.
    """
    return render_card(read_card_data(folder, **options), figures)


def render_card(data: DepthCardData, figures: str | None = FOLDER) -> ModelCard:
    """Write the card of a record: `str(card)` is the README.md of its repository.

    Args:
        data: the record of the model.
        figures: the folder of the figures, relative to the card; None leaves them out.
    """
    measured, rows = evaluation(data), _rows(data)
    text = (
        _environment()
        .get_template("model_card.md.j2")
        .render(
            front_matter=Markdown(front_matter(data).to_yaml()),
            data=data,
            # Valid names of the Hub, so they need no escaping in code.
            repo=Markdown(data.repo_id),
            native=data.native_repo and Markdown(data.native_repo),
            relation=RELATIONS.get(data.base_model_relation or "", "derives from"),
            revisions=_few(data.revisions),
            kind=_kind(data),
            measured=measured,
            perplexity=perplexity(measured.loss) if measured else None,
            varied=_facts(data.sweep.varied if data.sweep else {}),
            figures=[(name, Markdown(f"{figures}/{name}.png")) for name in figure_names(data)] if figures else [],
            summary=summarize(data.report).splitlines()[1:] if data.report else [],
            text=_text_facts(data),
            threshold=_threshold(data),
            notes=data.report.notes if data.report else [],
            architecture=_architecture(data),
            training=_training(data),
            scores=_scores(data),
            rows=rows,
            folded=len(rows) - 1 > LONG_TABLE,
            versions=_versions(data),
        )
    )
    return ModelCard(text)


@cache
def _environment() -> Environment:
    """The templates of cards, which escape every expression that is not Markdown already."""
    environment = templates(finalize=_escaped)
    environment.filters["code"] = code
    environment.filters["number"] = lambda value, digits=4: Markdown(format_number(value, digits))
    environment.filters["size"] = lambda value: Markdown(_size(value))
    environment.filters["count"] = _counted
    environment.filters["with_error"] = _unbroken
    environment.filters["as_it_is"] = Markdown  # for the template's own text, and names that the record has checked
    return environment


def _escaped(value: Any) -> str:
    if isinstance(value, Markdown):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return inline(f"{value:g}" if isinstance(value, float) else str(value))


def _counted(number: int, noun: str, plural: str = "s") -> Markdown:
    return Markdown(f"{number:,} {noun}{'' if number == 1 else plural}")


def _size(number: float) -> str:
    """Write a number of parameters or tokens with three digits: 460 K, 1.05 M, 7.2 B."""
    for bound, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if number >= bound * 0.9995:
            return f"{number / bound:.3g}{unit}"
    return f"{number:.3g}"


def _few(names: list[str]) -> list[str | None]:
    """Shorten a long list of names: the first ones, None, and the last one."""
    return list(names) if len(names) <= MOST_NAMED else [*names[: MOST_NAMED - 2], None, names[-1]]


def _kind(data: DepthCardData) -> Markdown:
    """The type of the model in a few words."""
    experts = data.num_experts
    if experts is not None:
        chosen = data.whole("num_experts_per_tok")
        return Markdown(f"mixture-of-experts ({experts} experts{f', {chosen} per token' if chosen else ''})")
    return Markdown("dense" if data.config else "causal")


# ------------------------------------------------------------------------------------------------------------- tables


def _architecture(data: DepthCardData) -> list[tuple[str, str]]:
    """The known facts of the architecture."""
    heads, shared = data.whole("num_attention_heads"), data.whole("num_key_value_heads")
    total, active = data.parameters, data.active_parameters
    size = f"{total:,}" if total else None
    if total and active and active != total:
        size = f"{total:,}, of which {active:,} process one token"
    attention = None
    if heads:
        groups = "multi-head" if shared in (None, heads) else "multi-query" if shared == 1 else "grouped-query"
        attention = f"{groups}, {_counted(heads, 'query head')}, {_counted(shared or heads, 'key and value head')}"
        if width := data.whole("head_dim"):
            attention += f" of {width}"
    facts: dict[str, Any] = {
        "Class": _text(data.architecture),
        "Parameters": size,
        "Layers": data.num_layers,
        "Hidden size": data.whole("hidden_size"),
        "Attention": attention,
        "MLP width": None
        if data.num_experts and data.config.get("moe_layers") == "all"
        else data.whole("intermediate_size"),
        "Experts": _experts(data),
        "Norms": _norms(data),
        "Vocabulary": data.whole("vocab_size"),
        "Longest sequence": data.whole("max_position_embeddings"),
        "Embeddings": _embeddings(data),
    }
    return _facts(facts)


def _experts(data: DepthCardData) -> str | None:
    if data.num_experts is None:
        return None
    chosen, width = data.whole("num_experts_per_tok"), data.whole("moe_intermediate_size")
    shared = data.whole("shared_expert_intermediate_size")
    parts = [
        f"{data.num_experts} in each layer with experts",
        f"{chosen} per token" if chosen else "",
        f"of width {width:,}" if width else "",
        f"and one of width {shared:,} for every token" if shared else "",
    ]
    return ", ".join(part for part in parts if part)


def _norms(data: DepthCardData) -> str | None:
    description = NORMS.get(str(data.config.get("norm_placement")))
    if description and data.config.get("norm_scaling") == "depth":
        description += ", scaled by 1/√(layer + 1) (LayerNorm Scaling)"
    if description and data.config.get("qk_norm"):
        description += "; queries and keys are normalised too"
    return description


def _embeddings(data: DepthCardData) -> str | None:
    tied = data.config.get("tie_word_embeddings")
    return None if not isinstance(tied, bool) else "tied to the head" if tied else "not tied to the head"


def _training(data: DepthCardData) -> list[tuple[str, str]]:
    """The known settings of the training."""
    training = data.training
    batch = [
        _counted(training.batch_sequences, "sequence") if training.batch_sequences else "",
        f"{training.batch_tokens:,} tokens" if training.batch_tokens else "",
    ]
    rate = None if training.learning_rate is None else f"{training.learning_rate:g}"
    if rate and training.schedule:
        rate += f", {training.schedule}"
        if training.min_learning_rate is not None and "constant" not in training.schedule:
            rate += f" to {training.min_learning_rate:g} of it"
    if rate and training.warmup_steps:
        rate += f", {_counted(training.warmup_steps, 'step')} of warm-up"
    betas = (training.adam_beta1, training.adam_beta2)
    optimizer = [
        training.optimizer or "",
        f"betas {betas[0]:g} and {betas[1]:g}" if None not in betas else "",
        f"epsilon {training.adam_epsilon:g}" if training.adam_epsilon is not None else "",
    ]
    run = [
        training.processor or "",
        _counted(training.processes, "process", "es") if training.processes else "",
        _duration(training.seconds) if training.seconds else "",
    ]
    facts: dict[str, Any] = {
        "Text": training.text,
        "Tokens": training.tokens,
        "Steps": training.steps,
        "Epochs": training.epochs,
        "Sequence length": training.sequence_length,
        "Batch": ", ".join(filter(None, batch)),
        "Optimiser": ", ".join(filter(None, optimizer)),
        "Learning rate": rate,
        "Weight decay": training.weight_decay,
        "Gradient clipping": training.max_grad_norm,
        "Precision": training.precision,
        "Attention computed by": training.attention,
        "Gradient checkpointing": training.gradient_checkpointing,
        "Seed": None if training.seed is None else str(training.seed),
        "Compute": f"{training.flops:.3g} FLOPs" if training.flops else None,
        "Run on": ", ".join(filter(None, run)),
    }
    return _facts(facts)


def _facts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Facts as text, without unknown ones."""
    return [(name, text) for name, value in facts.items() if (text := _text(value))]


def _text(value: Any) -> str:
    if value is None or isinstance(value, (dict, list)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _scores(data: DepthCardData) -> list[_Score]:
    """The global scores of the report, and those of the same model before training."""
    if data.report is None:
        return []
    trained, before = data.report.scores, data.untrained.scores if data.untrained else {}
    return [
        _Score(
            GLOBAL_SCORES[name].label,
            _with_error(trained, name),
            _with_error(before, name),
            " ".join(
                filter(None, (GLOBAL_SCORES[name].phrase, GLOBAL_SCORES[name].unit and f"({GLOBAL_SCORES[name].unit})"))
            ),
        )
        for name in INDEXED
        if trained.get(name) is not None
    ]


def _text_facts(data: DepthCardData) -> dict[str, Any]:
    """Facts about the text that the scores were measured on; None for unknown ones."""
    names = ("name", "fingerprint", "eval_blocks", "block_size", "fit_blocks")
    facts = {name: data.report.data.get(name) if data.report else None for name in names}
    return {**facts, "beginning": beginning(data.report.data) if data.report else ""}


def _threshold(data: DepthCardData) -> float | None:
    """The linearise ratio above which a layer counts as useful; None if the report lacks usefulness."""
    if data.report is None or data.report.scores.get("usefulness") is None:
        return None
    threshold = data.report.settings.get("threshold")
    return float(threshold) if isinstance(threshold, (int, float)) else None


def _with_error(scores: dict[str, float | None], name: str) -> Markdown:
    return _unbroken(scores.get(name), scores.get(f"{name}_se"))


def _unbroken(value: float | None, error: float | None) -> Markdown:
    """A value with its error, without line breaks."""
    return Markdown(format_with_error(value, error).replace(" ", "\u00a0"))


def _rows(data: DepthCardData) -> Sequence[list[str]]:
    """The table of layers: its headings, then one row per layer."""
    names = [name for name in LAYER_COLUMNS if data.report is not None and data.report.has(name)]
    if data.report is None or not names:
        return []
    columns = [data.report.column(name) for name in names]
    heads = ["layer", *(LAYER_SCORES[name].label for name in names)]
    layers = range(len(data.report.layers))
    cells = [
        [format_score(name, values[layer]) for name, values in zip(names, columns, strict=True)] for layer in layers
    ]
    return [heads, *([str(layer), *row] for layer, row in enumerate(cells))]


def _versions(data: DepthCardData) -> list[tuple[str, list[tuple[str, str]]]]:
    """The versions of the packages that trained and measured the model."""
    measured = data.report.versions if data.report else {}
    groups: list[tuple[str, Mapping[str, str | None]]] = [
        ("Trained with", data.versions),
        ("Measured with", measured),
    ]
    return [(heading, [(name, value) for name, value in group.items() if value]) for heading, group in groups if group]
