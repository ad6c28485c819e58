"""From the sums that the scores gathered to the `LayerReport`: values, standard errors, facts and notes."""

import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from typing import Any, cast

import numpy as np

from depthscope.analysis.measure import runs_experiments
from depthscope.layers.lanes.lanes import Lanes
from depthscope.layers.lanes.parts import sublayer_notes
from depthscope.layers.stack import LayerStack
from depthscope.report.report import SCHEMA_VERSION, DataFacts, LayerReport, ModelFacts
from depthscope.scores.base import Array, Score, Values, values_with_errors
from depthscope.scores.jacobian import Jacobian
from depthscope.scores.permutation import Permutation
from depthscope.scores.usefulness import Usefulness
from depthscope.settings import Settings
from depthscope.text.blocks import Blocks
from depthscope.wording.messages import counted

# Rounding that shows in the digits of a report.
VISIBLE = 1e-2


def assemble(
    lanes: Lanes,
    scores: Mapping[str, Score],
    baseline: dict[str, Array],
    blocks: Blocks,
    settings: Settings,
    facts: dict[str, Any],
) -> LayerReport:
    """Turn the sums into the report."""
    stack = lanes.stack
    pairs: dict[str, Any] = {}
    loss, loss_error = values_with_errors(
        lambda sums: Values(scores={"loss": float(sums["loss"] / sums["targets"])}), baseline
    )
    singles = {"loss": _number(loss.scores["loss"]), "loss_se": _number(loss_error.scores["loss"])}
    rows: list[dict[str, Any]] = [{"layer": layer, "kind": kind} for layer, kind in enumerate(stack.layer_type_names)]
    for score in scores.values():
        if isinstance(score, Jacobian):
            values, errors = score.values_with_errors()
        else:
            values, errors = values_with_errors(score.finish, score.sums)
        for name, value in values.scores.items():
            singles |= {name: _number(value), f"{name}_se": _number(errors.scores[name])}
        for name, column in values.layers.items():
            for row, value, error in zip(rows, column, errors.layers[name], strict=True):
                row |= {name: _number(value), f"{name}_se": _number(error)}
        for name, matrix in values.pairs.items():
            pairs |= {name: _matrix(matrix), f"{name}_se": _matrix(errors.pairs[name])}
    singles |= _estimation_errors(scores)
    return LayerReport(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=cast("ModelFacts", {**facts, "num_layers": stack.num_layers}),
        data=_data_facts(blocks, settings),
        settings=settings.to_dict(),
        versions=dict(versions()),
        notes=_notes(lanes, scores, blocks, settings),
        scores=singles,
        layers=rows,
        pairs=pairs,
    )


def _data_facts(blocks: Blocks, settings: Settings) -> DataFacts:
    measured = blocks[settings.fit_blocks : settings.fit_blocks + settings.eval_blocks]
    facts = {
        "name": blocks.name,
        "fingerprint": blocks.fingerprint,
        "fit_blocks": settings.fit_blocks,
        "eval_blocks": settings.eval_blocks,
        "block_size": settings.block_size,
        "tokens": int(measured.token_mask.sum()),
        "bos": list(blocks.start),
    }
    return cast("DataFacts", facts)


def _estimation_errors(scores: Mapping[str, Score]) -> dict[str, float | None]:
    """The errors that come from estimating: sampled pairs, random probes."""
    found: dict[str, float | None] = {}
    swaps, jacobian = scores.get("permutation"), scores.get("jacobian")
    if isinstance(swaps, Permutation) and isinstance(swaps.settings.pairs, float):
        found["permutation_sampling_se"] = _number(swaps.sampling_error())
    if isinstance(jacobian, Jacobian) and jacobian.settings.probes != "exact":
        found["jacobian_probe_se"] = _number(jacobian.probe_error())
    return found


def _notes(lanes: Lanes, scores: Mapping[str, Score], blocks: Blocks, settings: Settings) -> list[str]:
    """What a reader of the report must know."""
    stack, notes = lanes.stack, []
    if settings.paper_code and "usefulness" in scores:
        notes.append(
            "paper_code: usefulness is what the paper's released code computes (linear map applied un-transposed, "
            "fitted on the evaluation text), not what the paper defines."
        )
    elif settings.fits_in_sample and "usefulness" in scores:
        notes.append("in_sample: the linear maps were fitted on the evaluation text itself.")
    notes += _fit_notes(stack, scores.get("usefulness"), blocks, settings)
    if settings.bos == "no":
        notes.append(
            "bos: no block begins with a beginning-of-sequence token, as was asked for. A model that was trained with "
            "one may be far off what it was trained on."
        )
    notes += [note for score in scores.values() for note in score.notes()]
    if settings.sublayers:
        notes += sublayer_notes(stack)
    if runs_experiments(scores):
        notes += [
            f"Layer {layer} cannot be skipped or replaced in this model ({reason}); its scores are empty."
            for layer, reason in stack.unskippable.items()
        ]
        if not stack.resumable:
            notes.append(
                "Later layers of this model read what earlier ones left behind; every experiment ran from the start."
            )
    if lanes.limits.halved:
        notes.append("Memory ran out, so fewer experiments ran side by side from then on; the scores are the same.")
    if stack.virtual_tokens:
        verbs = ("stands", "it counts") if stack.virtual_tokens == 1 else ("stand", "they count")
        notes.append(
            f"{counted(stack.virtual_tokens, 'virtual token')} of the model {verbs[0]} before the text in the stream; "
            f"{verbs[1]} for nothing, nor does the prediction of the first token of the text."
        )
    if stack.batch_effect > VISIBLE:
        notes.append(
            f"The logits of a text move by {stack.batch_effect:.1g} of their spread with the other texts of its batch, "
            "by the model's own rounding: scores depend on the batch size to that extent."
        )
    if settings.eval_blocks == 1:
        notes.append("One evaluation block tells no standard error; raise eval_blocks.")
    return notes


def _fit_notes(stack: LayerStack, score: Score | None, blocks: Blocks, settings: Settings) -> list[str]:
    if not isinstance(score, Usefulness):
        return []
    notes = []
    fitted = slice(settings.fit_blocks, settings.fit_blocks + settings.eval_blocks)
    tokens = int(blocks.token_mask[fitted if settings.fits_in_sample else slice(settings.fit_blocks)].sum())
    if tokens <= 2 * stack.width:
        notes.append(
            f"The linear maps have {stack.width} inputs and were fitted on {tokens} tokens only: usefulness ratios are "
            "too high. Raise fit_blocks."
        )
    if score.undetermined:
        layers = ", ".join(map(str, score.undetermined))
        notes.append(
            f"The fitting text does not determine the linear map of layer {layers} (too few distinct inputs); the one "
            "of least norm was taken. Raise fit_blocks."
        )
    return notes


@cache
def versions() -> dict[str, str | None]:
    """The versions that something was measured with, by package."""
    names = ("depthscope", "torch", "transformers")
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


def _number(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def _matrix(values: Array) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in values]
