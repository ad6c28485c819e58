"""The model's shape: heads and their groups, experts, norms, initialisation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from depthscope.errors import SettingsError
from depthscope.models import DepthLMConfig
from depthscope.recipes.request import Request

__all__ = [
    "EXPERT_COUNTS",
    "Chosen",
    "Shape",
    "build_config",
    "choose_groups",
    "choose_heads",
    "choose_initialisation",
    "choose_mlp",
    "choose_norms",
    "model_fields",
    "possible_experts",
]

T = TypeVar("T")

PAPER_DEPTHS = (12, 16, 24, 32)
PAPER_WIDTHS = (768, 1120, 1536, 2048)
PAPER_GROUPS = (1, 2, 4, 16)
MOST_GROUPED = 16
TOP_K = 8
# The paper's number, then fewer for less memory; the width of an expert and the experts per token stay the same.
EXPERT_COUNTS = (64, 32, 16)
DENSE_RATIO = 4
# Grouped matrix products need rows of a multiple of 16 bytes, which is 8 features in bfloat16.
EXPERT_MULTIPLE = 8
PAPER_STD = 0.02
STD_WIDTH = 2048
NARROWEST_HEAD, WIDEST_HEAD = 8, 256
# The paper's heads have 64 or 70 features up to this width, and 128 from 1,536 on.
NARROW = 1120


@dataclass(frozen=True)
class Chosen(Generic[T]):
    """A chosen value, the reason for it, and whether the paper tested it."""

    value: T
    why: str
    tested: bool


def choose_heads(request: Request) -> Chosen[int]:
    """The number of heads whose width is nearest to that of the paper's heads.

    Raises:
        SettingsError: the width has no suitable divisor.
    """
    width, multiple = request.width, request.head_multiple
    if request.heads is not None:
        return Chosen(request.heads, f"as requested: {width // request.heads} features each", False)
    target = min(64 if width <= NARROW else 128, max(NARROWEST_HEAD, width // 4))
    possible = [
        n
        for n in range(1, width // NARROWEST_HEAD + 1)
        if width % n == 0 and (width // n) % 2 == 0 and n % multiple == 0 and width // n <= WIDEST_HEAD
    ]
    if not possible:
        step = 64 * multiple
        also = f", and their number a multiple of {multiple}" if multiple > 1 else ""
        raise SettingsError(
            f"width is {width}, which cannot be split into heads of {NARROWEST_HEAD} to {WIDEST_HEAD} features (an "
            f"even number{also}): give a multiple of {step}, such as {max(1, round(width / step)) * step}."
        )
    heads = min(possible, key=lambda n: (_group(n, multiple) == 1, abs(math.log(width / n / target)), n))
    tested = (width, heads) in ((768, 12), (1120, 16), (1536, 12), (2048, 16))
    return Chosen(heads, f"{width // heads} features each; the paper's have 64, 70 or 128", tested)


def choose_groups(request: Request, heads: int) -> Chosen[int]:
    """The number of heads that share keys and values: two, or the next number that divides the heads."""
    group = _group(heads, request.head_multiple)
    tested = group in PAPER_GROUPS
    if group == 2:
        why = "as in the recipe; in the paper's sweep at 16 layers, 1, 4 and 16 hardly differ"
    elif group > 1:
        why = f"{heads} heads cannot be paired" + _for_split(request) + f"; {group} is the smallest possible group"
    else:
        why = f"{heads} heads have no group of 2 to {MOST_GROUPED}" + _for_split(request) + ": multi-head attention"
    return Chosen(group, why, tested)


def _for_split(request: Request) -> str:
    return f" into a multiple of {request.head_multiple}" if request.head_multiple > 1 else ""


def _group(heads: int, multiple: int) -> int:
    """The smallest group of two or more heads; 1 if there is none."""
    return next((g for g in range(2, MOST_GROUPED + 1) if heads % g == 0 and (heads // g) % multiple == 0), 1)


def possible_experts(request: Request) -> Iterator[Chosen[int | None]]:
    """The numbers of experts to try, from the paper's 64 down to none, which need less and less memory."""
    if request.dense:
        yield Chosen(None, "a dense model, as requested; experts are the step with the largest gain in the paper", True)
    elif request.width % EXPERT_MULTIPLE:
        below = request.width // EXPERT_MULTIPLE * EXPERT_MULTIPLE
        why = (
            f"dense: experts in bfloat16 need a width that is a multiple of {EXPERT_MULTIPLE}, such as "
            f"{below} or {below + EXPERT_MULTIPLE}"
        )
        yield Chosen(None, why, True)
    else:
        most, *fewer = EXPERT_COUNTS
        yield Chosen(most, f"{most} as in the recipe, {TOP_K} per token", True)
        for count in fewer:
            yield Chosen(count, f"{2 * count} need more memory; still {TOP_K} per token", False)
        yield Chosen(None, f"dense: even {EXPERT_COUNTS[-1]} experts need more memory", True)


def choose_mlp(request: Request, experts: int | None) -> Chosen[int]:
    """The hidden width of the MLP, or of one expert."""
    if experts is None:
        return Chosen(DENSE_RATIO * request.width, f"{DENSE_RATIO} times the width, as in the paper's dense 1B", True)
    return Chosen(request.width, f"of one expert; {TOP_K} experts per token", True)


def choose_norms(request: Request) -> Chosen[str]:
    """Pre-LN; LayerNorm Scaling only if it is requested."""
    if request.norm_scaling == "none":
        return Chosen("none", "Pre-LN as in the paper; norm_scaling='depth' is LayerNorm Scaling", True)
    return Chosen("depth", "Pre-LN with LayerNorm Scaling, as requested", False)


def choose_initialisation(request: Request) -> Chosen[float]:
    """The paper's standard deviation at its widths; at other widths the one with the same gain as at 2,048."""
    width = request.width
    shrunk = ", output projections shrunk with depth as requested" if request.depth_scaled_init else ""
    if PAPER_WIDTHS[0] <= width <= PAPER_WIDTHS[-1]:
        return Chosen(PAPER_STD, f"as in the paper{shrunk}", width in PAPER_WIDTHS and not request.depth_scaled_init)
    std = float(f"{PAPER_STD * math.sqrt(STD_WIDTH / width):.3g}")
    return Chosen(std, f"0.02 x sqrt(2,048 / {width:,}): matrices multiply as in the paper's 1B model{shrunk}", False)


@dataclass(frozen=True)
class Shape:
    """The shape of a model: the choices that its configuration is built from."""

    heads: int
    group: int
    experts: int | None
    mlp: int
    std: float


def build_config(request: Request, shape: Shape, length: int) -> DepthLMConfig:
    """The configuration of the recipe's model."""
    return DepthLMConfig(
        vocab_size=request.vocab_size,
        max_position_embeddings=length,
        **model_fields(request, shape),
    )


def model_fields(request: Request, shape: Shape) -> dict[str, Any]:
    """The fields of the configuration, without those that depend on the data."""
    fields: dict[str, Any] = {
        "num_hidden_layers": request.layers,
        "hidden_size": request.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads // shape.group,
        "intermediate_size": shape.mlp,
        "initializer_range": shape.std,
        "tie_word_embeddings": False,
        "norm_scaling": request.norm_scaling,
        "depth_scaled_init": request.depth_scaled_init,
    }
    if shape.experts is not None:
        fields |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": TOP_K,
            "moe_intermediate_size": shape.mlp,
            "router_aux_loss_coef": 0.01,
            "router_z_loss_coef": 0.001,
        }
    return fields
