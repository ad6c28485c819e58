"""One attempt at a recipe: all choices for one number of experts, with the evidence and the memory that it needs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from depthscope.errors import SettingsError
from depthscope.models import DepthLMConfig, ModelSize, model_size
from depthscope.recipes.evidence import PAPER, SMALL_MODELS, Evidence
from depthscope.recipes.request import BUDGETS, GB, Request
from depthscope.recipes.schedule import (
    PAPER_TOKENS,
    choose_batch,
    choose_decay,
    choose_learning_rate,
    choose_length,
    choose_warmup,
    micro_batches,
)
from depthscope.recipes.shape import (
    PAPER_DEPTHS,
    PAPER_WIDTHS,
    TOP_K,
    Chosen,
    Shape,
    build_config,
    choose_groups,
    choose_heads,
    choose_initialisation,
    choose_mlp,
    choose_norms,
)
from depthscope.sweep.cost.memory import needed_memory
from depthscope.sweep.cost.plan import ROOM
from depthscope.sweep.specification import Training
from depthscope.wording.messages import counted
from depthscope.wording.numbers import format_count

__all__ = ["Draft", "draft"]

MOST_TOKENS = 2**63 - 1  # as a sweep file holds them
COMPUTE_OPTIMAL = 20  # tokens per parameter, for dense models (Hoffmann et al. 2022, arXiv 2203.15556)


@dataclass(frozen=True)
class Draft:
    """All choices for one number of experts. `Recipe`, which adds cost and files, explains the fields."""

    request: Request
    shape: Shape
    config: DepthLMConfig
    training: Training
    evidence: tuple[Evidence, ...]
    size: ModelSize
    memory: float

    @property
    def fits(self) -> bool:
        """Whether the memory of a GPU is large enough."""
        return _has_room(self.request, self.memory)


def draft(request: Request, experts: Chosen[int | None]) -> Draft:
    """Make all choices for one number of experts."""
    heads = choose_heads(request)
    groups = choose_groups(request, heads.value)
    mlp = choose_mlp(request, experts.value)
    std = choose_initialisation(request)
    shape = Shape(heads.value, groups.value, experts.value, mlp.value, std.value)
    tokens_at = _budget(request, shape)

    length = choose_length(request, tokens_at)
    tokens = int(tokens_at(length.value))
    if tokens > MOST_TOKENS:
        name = next(name for name in BUDGETS if getattr(request, name) is not None)
        raise SettingsError(
            f"{name} is {getattr(request, name):g}, which allows {tokens:.3g} tokens; give a budget of at most "
            f"{MOST_TOKENS:.3g} tokens."
        )
    config = build_config(request, shape, length.value)
    size = model_size(config, length.value)
    batch = choose_batch(request, tokens, length.value)
    steps = tokens // batch.value
    rate = choose_learning_rate(request.width)
    decay = choose_decay(request.layers, rate.value, steps)
    warmup = choose_warmup(steps)

    base = Training(
        tokens=tokens,
        sequence_length=length.value,
        batch_tokens=batch.value,
        learning_rate=rate.value,
        warmup_steps=warmup.value,
        weight_decay=decay.value,
        fsdp=request.gpus > 1,
    )
    training, memory = _fit(request, config, base)
    norms = choose_norms(request)
    evidence = (
        _depth(request),
        _width(request),
        _tokens(request, tokens, size),
        _row("sequence length", f"T = {length.value:,}", length),
        _row("weight decay", f"{decay.value:g}", decay),
        _row("GQA groups", _groups(shape), groups),
        _row("experts", _experts(shape), experts),
        _row("MLP width", f"{mlp.value:,}", mlp),
        _row("heads", str(heads.value), heads),
        _row("norms", "Pre-LN" + ", scaled" * (norms.value == "depth"), norms),
        _row("initialisation", f"std {std.value:g}", std),
        _row("batch", f"{batch.value:,} tokens", batch),
        _row("learning rate", f"{rate.value:g}", rate),
        _row("schedule", f"cosine, {warmup.value:,} up", warmup),
        _row("precision", "bfloat16", Chosen("bfloat16", "on a CPU only where it is faster", True)),
    )
    return Draft(request, shape, config, training, evidence, size, memory)


def _budget(request: Request, shape: Shape) -> Callable[[int], float]:
    """A function from the sequence length to the number of tokens that the budget allows."""

    @cache
    def tokens_at(length: int) -> float:
        if request.tokens is not None:
            return request.tokens
        flops = request.flops if request.gpu_hours is None else request.gpu_hours * request.flops_an_hour
        assert flops is not None
        return flops / model_size(build_config(request, shape, length), length).training_flops_per_token

    return tokens_at


def _fit(request: Request, config: DepthLMConfig, base: Training) -> tuple[Training, float]:
    """Choose the largest micro-batch that fits in memory; use gradient checkpointing only if nothing fits without it.

    Returns:
        The training, and the bytes that a GPU holds; those of the last attempt if none fits.
    """
    for checkpointing in (False, True):
        for micro in micro_batches(request, base.batch_tokens, base.sequence_length):
            update = {"micro_batch_size": micro, "gradient_checkpointing": checkpointing}
            training = base.model_copy(update=update)
            memory = needed_memory(config, training, request.gpus, micro).total
            if _has_room(request, memory):
                return training, memory
    return training, memory


def _has_room(request: Request, memory: float) -> bool:
    return request.memory is None or memory <= ROOM * request.memory * GB


def _row(choice: str, value: str, chosen: Chosen) -> Evidence:
    return Evidence(choice, value, chosen.why, chosen.tested, PAPER.get(choice, ""), SMALL_MODELS.get(choice))


def _depth(request: Request) -> Evidence:
    tested = request.layers in PAPER_DEPTHS
    why = "as requested" if tested else "as requested; the paper trained 12, 16, 24 and 32"
    return _row("depth", counted(request.layers, "layer"), Chosen(request.layers, why, tested))


def _width(request: Request) -> Evidence:
    tested = request.width in PAPER_WIDTHS
    return _row("width", f"{request.width:,}", Chosen(request.width, "as requested", tested))


def _tokens(request: Request, tokens: int, size: ModelSize) -> Evidence:
    source = "as requested" if request.tokens is not None else "what the budget allows"
    ratio = tokens / size.active
    per_parameter = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
    why = f"{source}: {per_parameter} per active parameter (dense models do best with about {COMPUTE_OPTIMAL})"
    return _row("tokens", format_count(tokens), Chosen(tokens, why, tokens == PAPER_TOKENS))


def _groups(shape: Shape) -> str:
    return f"G = {shape.group} ({shape.heads // shape.group} KV heads)"


def _experts(shape: Shape) -> str:
    return "none" if shape.experts is None else f"{shape.experts}, top {TOP_K}"
