"""The evidence for each choice: the results of the paper, and those of our own small models.

`PAPER` is arXiv 2603.15389, unless a text names another source. `SMALL_MODELS` holds the findings of our own study; the
study did not compare a choice that has no entry.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["PAPER", "SMALL_MODELS", "STUDY", "Evidence", "Finding"]


@dataclass(frozen=True)
class Finding:
    """What our own study found about a choice.

    Attributes:
        verdict: whether the study supports the choice; "open" if the difference is within the noise.
        text: what was measured.
    """

    verdict: Literal["agree", "agree in part", "disagree", "open"]
    text: str


@dataclass(frozen=True)
class Evidence:
    """One row of a recipe: a choice and the reason for it.

    Attributes:
        choice: the name of the choice.
        value: the chosen value, as text.
        why: the reason for this value.
        tested: whether the paper trained a model with this value; if not, the choice is an extrapolation.
        paper: the paper's results for the choice, and where they are in the paper.
        small: the finding of our own study, if it compared this choice.
    """

    choice: str
    value: str
    why: str
    tested: bool
    paper: str
    small: Finding | None


# Accuracy: the mean over downstream tasks in the recipe ablation, with 32 layers unless stated otherwise. Perplexity:
# the sweeps over one setting, with 16 layers.
PAPER: dict[str, str] = {
    "depth": "accuracy 40.1 with 16 layers, 39.5 with 32, plain (recipe ablation); usefulness 1.00, .81, .63, .56 "
    "with 12, 16, 24, 32 (depth sweep)",
    "width": "models of width 768, 1,120, 1,536 and 2,048",
    "tokens": "5 B of FineWeb-Edu",
    "sequence length": "accuracy 39.5, 40.0, 39.5 at T = 1,024, 4,096, 8,192 (recipe ablation); perplexity 18.51, "
    "15.71, 14.77, 14.51, 14.52, 16.30 at 256, 512, ..., 8,192 (length sweep)",
    "weight decay": "accuracy 40.0, 41.4, 41.0, 38.5 at 0.1, 0.3, 0.6, 1 (recipe ablation); perplexity 15.63, 15.20, "
    "14.83, 15.55, 773 at 0, 0.01, 0.1, 1, 3 (decay sweep)",
    "GQA groups": "accuracy 41.4, 42.1 at G = 1, 2 (recipe ablation); perplexity 14.52, 14.50, 14.47 at G = 1, 4, 16 "
    "(GQA sweep)",
    "experts": "accuracy 42.1 dense, 44.1 with experts (recipe ablation); perplexity 14.52 for dense 1B, 13.82 for MoE "
    "7B/1B; 17.56 for dense 400M, 15.89 for MoE 2B/400M (MoE sweep)",
    "MLP width": "4 times the width in dense 1B; 8 experts per token, each as wide as the model, in the recipe's model",
    "heads": "12 or 16",
    "norms": "Pre-LN with RMSNorm; LayerNorm Scaling is from an earlier paper (arXiv 2502.05795) and not in the recipe",
    "initialisation": "normal(0, 0.02) at all widths",
    "batch": "256 sequences of 1,024 tokens (depth sweep)",
    "learning rate": "1e-3 with AdamW (0.9, 0.95) (depth sweep); the released files have 4e-4",
    "schedule": "1,000 warm-up steps, cosine to a tenth of the peak, clipping at 1 (depth sweep)",
    "precision": "bfloat16",
}

STUDY = "width 64, 16 layers, 2 M tokens of books, three seeds; the loss varies by .05 from seed to seed"

SMALL_MODELS: dict[str, Finding] = {
    "depth": Finding(
        "agree", "loss 4.216, 4.196, 4.215, 4.259 with 4, 8, 16, 32 layers, and every score per layer falls"
    ),
    "sequence length": Finding(
        "agree in part",
        "loss 4.215 at T = 128, 4.170 at 256, lower with each seed, and variance 1,060 to 680; the scores do not "
        "differ beyond the noise",
    ),
    "weight decay": Finding(
        "agree", "loss 4.284, 4.215, 4.378 at 0, 0.1, 1, the least at 0.1 with each seed; variance 38,500, 1,060, 0.19"
    ),
    "GQA groups": Finding("open", "loss 4.215, 4.193 at G = 1, 4: no difference beyond the noise"),
    "experts": Finding(
        "open",
        "loss 4.215 dense, 4.177 with 8 experts, top 2, lower with two seeds of three; variance and scores do not "
        "differ beyond the noise",
    ),
    "norms": Finding(
        "disagree",
        "LayerNorm Scaling has the lower loss (4.161 against 4.215, lower with each seed) and an eighth of the "
        "variance",
    ),
    "learning rate": Finding(
        "agree",
        "narrow models need more: loss 5.441, 4.956, 4.788 at 1e-3, 3e-3, 1e-2 (width 64, .6 M tokens, one seed)",
    ),
    "initialisation": Finding(
        "agree",
        "in an earlier run (Python source, one seed) loss 3.639 at std 0.02, 3.619 at 0.113; variance "
        "grows with depth only at 0.113",
    ),
}
