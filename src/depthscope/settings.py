"""The settings of an analysis: what is measured, on how much text, and how exactly."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from depthscope.errors import SettingsError
from depthscope.report.measures import SCORE_NAMES, SPARSITY_NAMES
from depthscope.text.choices import bos_choice, require_tokens
from depthscope.wording.numeric import LARGEST_SEED, MOST, require_number, require_whole
from depthscope.wording.units import seconds_of, share_of

# The scores that attention and MLP can have of their own.
OF_SUBLAYERS = ("skip", "causal", "usefulness")


class ByDefault(int):
    """A number that nobody has chosen."""


# Evaluation blocks if their number is not chosen: of an analysis of fixed size, and the most that a budget or a
# precision may take.
USUAL_BLOCKS, MOST_BLOCKS = ByDefault(8), 256


@dataclass(frozen=True)
class Settings:
    """How to analyse a model.

    Attributes:
        scores: which scores to compute, of `SCORE_NAMES` and `SPARSITY_NAMES`; also as one string with commas, or
            "all", which means all of the former.
        fit_blocks: how many blocks, from the start of the text, fit the linear maps of the usefulness score.
        eval_blocks: how many blocks, after those, measure everything: 8. With a budget or a precision it is the most
            that are measured, 256 by default, or as many as the text holds; at least 2 are.
        block_size: tokens in a block, T, special tokens at its start included.
        bos: whether each block of text begins with the beginning-of-sequence token: "yes", "no", or "auto", what the
            tokenizer puts before a text by itself. No score includes that token or the
            prediction of the token after it. Blocks that are passed in are measured as they are.
        batch_size: blocks in a forward pass; None chooses one that keeps the logits small. Scores do not depend on it.
        threshold: a layer is useful when linearising it multiplies the loss by more than this (the paper's is 1.1).
        ridge: ridge of the linear fit, relative to the mean variance of a feature; it pulls the maps towards the
            identity. 0 is plain least squares.
        in_sample: fit the linear maps on the evaluation blocks themselves, as the paper does.
        paper_code: compute what the paper's released code computes: an in-sample fit whose matrix is applied
            un-transposed.
        pairs: "all" pairs of layers for the permutation score, "adjacent" ones, or the share of (pair, block) cells to
            sample, in (0, 1); a sampled score carries its sampling error.
        probes: backward passes per layer that estimate the Jacobian distance, each with a random vector for every
            block, or "exact" for one per feature; as many as there are features, or more, are exact too.
        seed: seeds the probes, the sampled pairs and the sampled positions.
        sublayers: measure skip, causal and usefulness, those of them that are chosen, for the attention and the MLP of
            each layer too.
        budget: the seconds that the analysis may take, or a text such as "60s", "5m" or "1h": blocks are added, batch
            after batch, as long as the next is expected to end in time. Loading the model and reading the text come
            on top; the fit of the linear maps is a part of it.
        precision: how precise the ranking of the layers is to be, as a share or a text such as "2%": blocks are added
            until no layer's loss ratio (of skip and usefulness, whichever are measured) has a larger relative standard
            error, which is its standard error divided by its value.
        exact_losses: compute the losses of changed models from all logits, also where the head is most of the work. By
            default they are estimated there, from 8 blocks on, to about the same standard errors; the report says so.
    """

    scores: tuple[str, ...] | str = SCORE_NAMES
    fit_blocks: int = 16
    eval_blocks: int = USUAL_BLOCKS
    block_size: int = 256
    bos: str | bool = "auto"
    batch_size: int | None = None
    threshold: float = 1.1
    ridge: float = 0.0
    in_sample: bool = False
    paper_code: bool = False
    pairs: str | float = "all"
    probes: int | str = 16
    seed: int = 0
    sublayers: bool = False
    budget: float | str | None = None
    precision: float | str | None = None
    exact_losses: bool = False
    _blocks_by_default: ClassVar[bool] = True  # of each object, but not one of its settings

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", _checked_scores(self.scores))
        if self.budget is not None:
            object.__setattr__(self, "budget", seconds_of("budget", self.budget))
        if self.precision is not None:
            object.__setattr__(self, "precision", share_of("precision", self.precision, "a relative standard error"))
        object.__setattr__(self, "_blocks_by_default", isinstance(self.eval_blocks, ByDefault))
        if self._blocks_by_default and self.is_bounded:
            object.__setattr__(self, "eval_blocks", MOST_BLOCKS)
        needs_fit = "usefulness" in self.scores and not self.fits_in_sample
        self._set_whole("fit_blocks", 1 if needs_fit else 0, "blocks to fit the linear maps on")
        meaning = "the most blocks to measure on; standard errors need 2" if self.is_bounded else "blocks to measure on"
        self._set_whole("eval_blocks", 2 if self.is_bounded else 1, meaning)
        self._set_whole("block_size", 2, "tokens in a block")
        require_tokens(self.fit_blocks + self.eval_blocks, self.block_size)
        object.__setattr__(self, "bos", bos_choice(self.bos))
        if self.batch_size is not None:
            self._set_whole("batch_size", 1, "blocks in a forward pass")
        if self.probes != "exact":
            self._set_whole("probes", 1, 'random probes, or "exact"')
        self._set_whole("seed", 0, "a seed", LARGEST_SEED)
        self._check_sublayers()
        self._check_precision()
        require_number("threshold", self.threshold, "a loss ratio above 0, such as the paper's 1.1", above=0)
        require_number("ridge", self.ridge, "a number from 0 up to 1, such as 0 or 1e-6", least=0, below=1)
        if self.pairs not in ("all", "adjacent") and not (isinstance(self.pairs, float) and 0 < self.pairs < 1):
            raise SettingsError(
                f'pairs is {self.pairs!r}; give "all", "adjacent", or the share to sample as a number between 0 and 1.'
            )

    def _set_whole(self, name: str, least: int, meaning: str, most: int = MOST) -> None:
        """Check a whole number, and store it as a Python int."""
        object.__setattr__(self, name, require_whole(name, getattr(self, name), least, meaning, most))

    def _check_sublayers(self) -> None:
        for name in ("sublayers", "exact_losses"):
            if not isinstance(getattr(self, name), bool):
                raise SettingsError(f"{name} is {getattr(self, name)!r}; give True or False.")
        if self.sublayers and not set(OF_SUBLAYERS).intersection(self.scores):
            raise SettingsError(
                f"sublayers was asked for without any of the scores that it is for: {', '.join(OF_SUBLAYERS)}. Choose "
                "some of them, or leave it out."
            )
        if self.sublayers and self.paper_code and "usefulness" in self.scores:
            raise SettingsError(
                "sublayers and paper_code were both asked for; the paper's released code linearises whole layers only. "
                "Leave out one of the two, or the usefulness score."
            )

    def _check_precision(self) -> None:
        ranking = {"skip", *(() if self.fits_in_sample else ("usefulness",))}
        if self.precision is not None and not ranking.intersection(self.scores):
            raise SettingsError(
                "precision was asked for without a score that it is told of: skip, or usefulness (whose linear maps "
                "are fitted on other text than they are measured on). Choose one of them, or give a budget of time."
            )

    @property
    def is_bounded(self) -> bool:
        """Whether blocks are added until a budget or a precision ends it, and `eval_blocks` is the most of them."""
        return self.budget is not None or self.precision is not None

    @property
    def least_blocks(self) -> int:
        """The least number of evaluation blocks that the text must hold."""
        return 2 if self.is_bounded else self.eval_blocks

    @property
    def fits_in_sample(self) -> bool:
        """Whether the linear maps are fitted on the evaluation blocks: chosen, or implied by `paper_code`."""
        # Not written into `in_sample`, where it would stay after `paper_code` is switched off again.
        return self.in_sample or self.paper_code

    def to_dict(self) -> dict[str, Any]:
        """The settings as a report keeps them; `in_sample` is true also where `paper_code` implies it."""
        return {**asdict(self), "scores": list(self.scores), "in_sample": self.fits_in_sample}

    def with_(self, **changes: Any) -> "Settings":
        """The same settings but for `changes`; an `eval_blocks` that was not chosen follows budget and precision."""
        return replace(self, **({"eval_blocks": USUAL_BLOCKS, **changes} if self._blocks_by_default else changes))


def _checked_scores(scores: Any) -> tuple[str, ...]:
    if not isinstance(scores, (str, Iterable)):
        raise SettingsError(f"scores is {scores!r}; give names of scores, separated by commas or as a list.")
    names = scores.split(",") if isinstance(scores, str) else list(scores)
    chosen = [name.strip() if isinstance(name, str) else name for name in names]
    # The effective depths are derived from two scores and have no measurement of their own.
    if others := [item for item in chosen if not isinstance(item, str)]:
        raise SettingsError(f"a score is {others[0]!r}; give its name.")
    requested = {name for item in chosen for name in (("skip", "usefulness") if item == "effective_depth" else (item,))}
    if "all" in requested:
        requested = requested - {"all"} | set(SCORE_NAMES)
    available = (*SCORE_NAMES, *SPARSITY_NAMES)
    unknown = sorted(requested - set(available))
    if unknown or not requested:
        problem = f"unknown score {', '.join(map(repr, unknown))}" if unknown else "no score was chosen"
        raise SettingsError(f"{problem}; choose from {', '.join(available)}, effective_depth, all.")
    return tuple(name for name in available if name in requested)
