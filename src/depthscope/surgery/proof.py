"""The proof that a cut model is what it should be: the original with layers left out.

Its logits are those of the original in which the cut layers return their input; decoding with a cache gives what
decoding without one does; and the model that a fresh process loads from the disk has the same logits (`save.py`).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from depthscope.console.quiet import quiet
from depthscope.errors import NonFiniteError, SettingsError, SurgeryError
from depthscope.layers.compiled import class_name, written
from depthscope.layers.modes import evaluating
from depthscope.layers.stack import LayerStack
from depthscope.layers.tracing import MODEL_FAILURES, example_ids, input_embeddings, run, text_config
from depthscope.surgery.kept import require_kept
from depthscope.surgery.structure import differences, facts_of, new_name, written_name
from depthscope.wording.messages import listed, one_line, ranges
from depthscope.wording.numeric import require_whole

__all__ = ["NEW_TOKENS", "TOLERANCES", "Proof", "proof_ids", "prove", "relative_difference"]

# The largest difference of logits, beside the largest logit. The two models run the same operations on the same
# numbers, so in half precision too they differ by a few roundings at most.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
NEW_TOKENS = 64
PROMPT = 8
BATCH, TOKENS = 2, 40


@dataclass(frozen=True)
class Proof:
    """What was compared, and how far apart it was.

    `difference` is that of the logits from those of the original with the layers left out, beside the largest logit, at
    most `tolerance`; `new_tokens` how many tokens greedy decoding gave alike with and without a cache; `reloaded` the
    difference of the logits in a fresh process (None for a model that was not saved).
    """

    difference: float
    tolerance: float
    new_tokens: int
    reloaded: float | None = None
    notes: tuple[str, ...] = ()


def prove(
    model: nn.Module, small: nn.Module, kept: Sequence[int], ids: Tensor | None = None, *, new_tokens: int = NEW_TOKENS
) -> Proof:
    """Prove that `small` computes what `model` does with all but the kept layers left out.

    Args:
        model: the original.
        small: the cut model, in the same dtype.
        kept: the layers of the original that it has.
        ids: token ids [B, T] to compare the logits on; some of the vocabulary by default.
        new_tokens: tokens to decode with and without a cache; 0 leaves that out.

    Raises:
        SurgeryError: it does not; the message names what differs.
        SettingsError: the layers, ids or number of tokens are none.
        NonFiniteError: the logits are not finite.
    """
    stack = LayerStack(model)
    kept = require_kept(kept, stack.num_layers)
    ids, new_tokens = require_ids(stack, ids), require_whole("new_tokens", new_tokens, least=0)
    with quiet():
        difference, tolerance = prove_logits(stack, small, kept, ids)
        decoded, notes = prove_decoding(model, small, new_tokens)
    return Proof(difference, tolerance, decoded, notes=(*rounding_notes(stack, small, kept), *notes))


def proof_ids(model: nn.Module) -> Tensor:
    """Token ids [B, T] to compare logits on, no longer than the model's positions."""
    return example_ids(model, draw=1, shape=(BATCH, min(TOKENS, positions_of(model))))


def require_ids(stack: LayerStack, ids: Any) -> Tensor:
    """Token ids that the model can read, [B, T]; some of the vocabulary where none are given.

    Raises:
        SettingsError: they are something else.
    """
    if ids is None:
        return proof_ids(stack.model)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        raise SettingsError("ids must be a tensor of whole token ids, [sequences, tokens], with one token at least.")
    rows = getattr(input_embeddings(stack.entry), "num_embeddings", stack.vocabulary)
    if ids.min() < 0 or ids.max() >= rows:
        raise SettingsError(f"ids must be from 0 to {rows - 1}; they go from {int(ids.min())} to {int(ids.max())}.")
    return ids


def positions_of(model: nn.Module) -> int:
    """The number of positions that a model has at least."""
    positions = getattr(text_config(model), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else 2048


def prove_logits(stack: LayerStack, small: Any, kept: Sequence[int], ids: Tensor) -> tuple[float, float]:
    """Compare logits with those of the original with layers left out; returns the difference and the tolerance."""
    left_out = [layer for layer in range(stack.num_layers) if layer not in kept]
    name = class_name(stack.model)
    with evaluating(stack.model), torch.no_grad():
        try:
            with stack.skipping(*left_out):
                wanted = stack.logits(ids)
        except MODEL_FAILURES as error:
            raise SurgeryError(
                f"{name} does not run without layers {ranges(left_out)} ({type(error).__name__}: {one_line(error)}) "
                f"Later layers need what they make ({_suspects(stack, small, kept)}); keep them."
            ) from error
    if not torch.isfinite(wanted).any() or wanted.isnan().any():
        raise NonFiniteError(f"The logits of {name} without layers {ranges(left_out)} are not finite.")
    with evaluating(small), torch.no_grad(), _rounded_as_in(stack, small, kept):
        try:
            logits = run(small, ids).logits
        except MODEL_FAILURES as error:
            raise SurgeryError(
                f"{name} with layers {ranges(kept)} alone does not run ({type(error).__name__}: {one_line(error)}) "
                f"What depends on the number of a layer there: {_suspects(stack, small, kept)}. Keep other layers."
            ) from error
    difference, tolerance = relative_difference(logits, wanted), tolerance_of(small)
    if not difference <= tolerance:
        raise SurgeryError(
            f"{name} with layers {ranges(kept)} alone does not compute what it does with the others left out: logits "
            f"differ by {difference:.1g} of the largest, {tolerance:.1g} is allowed. Something in its layers depends "
            f"on their number ({_suspects(stack, small, kept)}). Keep other layers, the first ones for example."
        )
    return difference, tolerance


def rounded_buffers(stack: LayerStack, small: nn.Module, kept: Sequence[int]) -> dict[str, Tensor]:
    """Buffers of the original that are those of the cut model, rounded, by their names there.

    `model.to(torch.bfloat16)` rounds also what is saved nowhere, such as rotary frequencies; a model that is loaded in
    that dtype, and so a cut one, has them in full.
    """
    before = {new_name(name, written_name(stack.path), kept): it for name, it in written(stack.model).named_buffers()}
    return {
        name: before[name]
        for name, own in small.named_buffers()
        if name in before and before[name].dtype != own.dtype and torch.equal(own.to(before[name]), before[name])
    }


@contextmanager
def _rounded_as_in(stack: LayerStack, small: nn.Module, kept: Sequence[int]) -> Iterator[None]:
    """Let the cut model round its buffers as the original does, so that the two compute the same."""
    with ExitStack() as undo:
        for name, rounded in rounded_buffers(stack, small, kept).items():
            owner, _, last = name.rpartition(".")
            buffers = small.get_submodule(owner)._buffers
            undo.callback(buffers.__setitem__, last, buffers[last])
            buffers[last] = rounded
        yield


def rounding_notes(stack: LayerStack, small: nn.Module, kept: Sequence[int]) -> tuple[str, ...]:
    """A note where the original rounds what the cut model has in full."""
    names = list(rounded_buffers(stack, small, kept))
    if not names:
        return ()
    return (
        f"The model that was cut has {listed(names)} rounded to its dtype (model.to(dtype) does that). The cut model "
        "has them in full, as every model that is loaded in a dtype; the two were compared with the same rounding.",
    )


def relative_difference(logits: Tensor, wanted: Tensor) -> float:
    """The largest difference beside the largest logit; infinite where shapes or infinities differ."""
    logits, wanted = logits.detach().double().cpu(), wanted.detach().double().cpu()
    finite = torch.isfinite(wanted)
    if logits.shape != wanted.shape or not torch.equal(torch.isfinite(logits), finite):
        return float("inf")
    difference = (logits[finite] - wanted[finite]).abs().max()
    return float(difference / wanted[finite].abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def tolerance_of(model: Any) -> float:
    """The tolerance for the coarsest dtype of a model's weights."""
    dtypes = {weight.dtype for weight in model.parameters() if weight.dtype in TOLERANCES}
    return max((TOLERANCES[dtype] for dtype in dtypes), default=TOLERANCES[torch.float32])


def prove_decoding(model: nn.Module, small: Any, new_tokens: int) -> tuple[int, tuple[str, ...]]:
    """Decode greedily with a cache, and hold each token against the logits of one pass over all of them.

    By induction that is what decoding without a cache gives: its prefix is the same, so the next token is.
    """
    new_tokens = min(new_tokens, positions_of(small) - PROMPT)
    if new_tokens < 1:
        return 0, ()
    if not (hasattr(small, "can_generate") and small.can_generate()):
        return 0, (f"{class_name(small)} does not generate text, so decoding was not compared.",)
    problem = _decoding_problem(small, new_tokens)
    if problem is None:
        return new_tokens, ()
    if _decoding_problem(written(model), new_tokens) is not None:
        return 0, (f"Decoding with a cache does not work in the original either ({problem}).",)
    raise SurgeryError(
        f"{class_name(small)} with these layers alone does not decode with a cache as it does without ({problem}). "
        f"{_mixers(small)}"
    )


def _mixers(model: Any) -> str:
    kinds = getattr(text_config(model), "layer_types", None)
    if not isinstance(kinds, list | tuple):
        return "Keep other layers."
    return f"Its layer_types are {', '.join(map(str, dict.fromkeys(kinds)))} now; keep a layer of another type too."


def _decoding_problem(model: Any, new_tokens: int) -> str | None:
    prompt = example_ids(model, draw=2, shape=(1, PROMPT)).to(model.device)
    # No token ends it; None would be that of the model's own settings.
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=-1
    )
    with evaluating(model), torch.no_grad():
        try:
            tokens: Any = model.generate(prompt, generation_config=settings, attention_mask=torch.ones_like(prompt))
            logits = run(model, tokens[:, :-1]).logits[0, PROMPT - 1 :].float()
        except MODEL_FAILURES as error:
            return f"{type(error).__name__}: {one_line(error)}"
    if tokens.shape[1] != PROMPT + new_tokens:
        return f"{tokens.shape[1] - PROMPT} tokens instead of {new_tokens}"
    chosen = logits.gather(1, tokens[0, PROMPT:, None])[:, 0]
    best = logits.max(1).values
    # Two tokens may be equally likely: rounding decides then.
    behind = (best - chosen) / best.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    wrong = [place for place, amount in enumerate(behind.tolist()) if amount > 10 * tolerance_of(model)]
    return f"another token at position {wrong[0]}" if wrong else None


def _suspects(stack: LayerStack, small: Any, kept: Sequence[int]) -> str:
    """What may depend on the number of a layer: attributes that changed, or settings that are named so."""
    layers: Any = written(small).get_submodule(written_name(stack.path))
    wanted, built = [facts_of(stack.layers[layer]) for layer in kept], [facts_of(layer) for layer in layers]
    if found := differences(wanted, built, kept):
        return listed(found)
    settings = text_config(small).to_dict()
    names = [name for name in sorted(settings) if _names_layers(name) and type(settings[name]) in (int, float, list)]
    return f"perhaps {listed(names)}" if names else "no setting names it"


def _names_layers(name: str) -> bool:
    words = ("layer", "indexer", "interval", "period", "offset", "every", "shared", "depth", "block")
    counts = ("num_hidden_layers", "kept_layers", "num_layers", "n_layer", "n_layers", "layer_types")
    return any(word in name for word in words) and name not in counts and "norm" not in name
