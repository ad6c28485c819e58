"""Holds the theory of the variance against models: the numbers and the picture of docs/theory.md.

    python benchmarks/theory.py init                 # the tables at initialisation: three minutes on one core
    python benchmarks/theory.py train --out runs     # trains five small models: ten minutes; reports and predictions
    python benchmarks/theory.py train --out runs --only dense --steps 20     # shows that it runs

Everything is seeded. Tables are printed in Markdown; `train` writes models, reports and figures into the folder.
"""

import argparse
import math
from collections.abc import Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from depthscope import DepthLMConfig, DepthLMForCausalLM, LayerReport, LayerStack, analyze, load_blocks
from depthscope.text.stdlib import python_stdlib
from depthscope.theory import (
    VariancePrediction,
    decayed_std,
    predict_from_model,
    predict_variance,
    variance_theory,
)

# std 0.113 = 0.02 * sqrt(2048 / 64): the gain of each matrix is that of the paper's model of width 2048.
SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "head_dim": 16,
    "initializer_range": 0.113,
}
LENGTH, BATCH, PEAK, SEEDS, HELD_OUT = 128, 8, 3e-3, 8, 16


def experts(count: int, top_k: int, width: int, **others: Any) -> dict[str, Any]:
    return {"num_experts": count, "num_experts_per_tok": top_k, "moe_intermediate_size": width, **others}


INITIAL: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, std 0.02": {"initializer_range": 0.02},
    "GQA, 2 KV heads": {"num_key_value_heads": 2},
    "GQA, 1 KV head": {"num_key_value_heads": 1},
    "LayerNorm Scaling": {"norm_scaling": "depth"},
    "peri": {"norm_placement": "peri"},
    "mix (4 post, 12 pre)": {"norm_placement": "mix"},
    "post": {"norm_placement": "post"},
    "window of 16": {"sliding_window": 16},
    # The active width k * f is 192 in all of these, as in the dense model.
    "top-1 of 8": experts(8, 1, 192),
    "top-2 of 8": experts(8, 2, 96),
    "top-8 of 8": experts(8, 8, 24),
    "top-2 of 32": experts(32, 2, 96),
    "top-8 of 64": experts(64, 8, 24),
    "top-1 of 8, weights sum to 1": experts(8, 1, 192, norm_topk_prob=True),
    "top-2 of 8, weights sum to 1": experts(8, 2, 96, norm_topk_prob=True),
    "top-8 of 8, weights sum to 1": experts(8, 8, 24, norm_topk_prob=True),
    "top-8 of 64, weights sum to 1": experts(64, 8, 24, norm_topk_prob=True),
}
TRAINED: dict[str, tuple[dict[str, Any], float]] = {
    "dense": ({}, 0.1),
    "weight decay 1": ({}, 1.0),
    "LayerNorm Scaling": ({"norm_scaling": "depth"}, 0.1),
    "top-2 of 8": (experts(8, 2, 96), 0.1),
    "GQA, 1 KV head": ({"num_key_value_heads": 1}, 0.1),
}


def new_model(changes: dict[str, Any], seed: int = 0) -> DepthLMForCausalLM:
    torch.manual_seed(seed)
    return DepthLMForCausalLM(DepthLMConfig(**{**SHAPE, **changes})).eval()


def measured(model: nn.Module, ids: Tensor) -> LayerReport:
    return analyze(model, blocks=ids, scores="variance", fit_blocks=0, eval_blocks=len(ids), progress=False)


# ------------------------------------------------------------------------------------------------------- initialisation


def at_initialisation() -> None:
    ids = torch.randint(SHAPE["vocab_size"], (4, LENGTH), generator=torch.Generator().manual_seed(0))
    print("| model | v_0 | v_15 | attention, layer 15 | MLP, layer 15 | correlation of positions |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, changes in INITIAL.items():
        predicted = predict_variance(DepthLMConfig(**{**SHAPE, **changes}), ids)
        reports = [measured(new_model(changes, seed), ids) for seed in range(SEEDS)]
        cells = [
            beside(values[layer], [report.column(column)[layer] for report in reports])
            for column, values, layer in (
                ("variance", predicted.variance, 0),
                ("variance", predicted.variance, -1),
                ("attention_variance", predicted.attention_variance, -1),
                ("mlp_variance", predicted.mlp_variance, -1),
            )
        ]
        print(f"| {name} | {' | '.join(cells)} | {predicted.position_correlation[-1]:.2f} |", flush=True)
    masked_weights(ids)
    masked_attention(ids)


def masked_weights(ids: Tensor) -> None:
    print("\n| weights kept | v_0 | v_15 | attention, layer 0 | MLP, layer 0 |\n| --- | --- | --- | --- | --- |")
    for density in (1.0, 0.7, 0.5, 0.3, 0.1):
        predicted = predict_variance(DepthLMConfig(**SHAPE), ids, density=density)
        reports = []
        for seed in range(SEEDS):
            model = new_model({}, seed)
            mask_weights(model, density)
            reports.append(measured(model, ids))
        print(f"| {density} | {cells_of(predicted, reports)} |", flush=True)


@torch.no_grad()
def mask_weights(model: DepthLMForCausalLM, density: float) -> None:
    """Set each element of the layers' matrices to zero with probability 1 - density."""
    for weight in model.model.layers.parameters():
        if weight.dim() == 2:
            weight.mul_(torch.rand_like(weight) < density)


def cells_of(predicted: VariancePrediction, reports: Sequence[LayerReport]) -> str:
    wanted = (
        ("variance", predicted.variance, 0),
        ("variance", predicted.variance, -1),
        ("attention_variance", predicted.attention_variance, 0),
        ("mlp_variance", predicted.mlp_variance, 0),
    )
    return " | ".join(
        beside(values[at], [report.column(name)[at] for report in reports]) for name, values, at in wanted
    )


def masked_attention(ids: Tensor) -> None:
    print("\n| positions kept | attention, layer 0 | attention, layer 15 | v_15 |\n| --- | --- | --- | --- |")
    for density in (1.0, 0.5, 0.2, 0.1):
        predicted = predict_variance(DepthLMConfig(**SHAPE), ids, attention_density=density)
        seen = [attended(seed, ids, density) for seed in range(SEEDS)]
        wanted = (predicted.attention_variance[0], predicted.attention_variance[-1], predicted.variance[-1])
        cells = [beside(value, [row[column] for row in seen]) for column, value in enumerate(wanted)]
        print(f"| {density} | {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def attended(seed: int, ids: Tensor, density: float) -> tuple[float, float, float]:
    """Variances of the first and the last attention and of the last stream, each position seeing itself and a share."""
    model = new_model({}, seed)
    model.set_attn_implementation("eager")
    length = ids.shape[1]
    kept = torch.rand(len(ids), 1, length, length) < density
    kept = (kept | torch.eye(length, dtype=torch.bool)).tril()
    mask = torch.zeros(kept.shape).masked_fill(~kept, torch.finfo(torch.float32).min)
    stack = LayerStack(model)
    with stack.capture(sublayers=True) as seen:
        model(ids, attention_mask=mask)
    last = stack.num_layers - 1
    found = [seen.attn_out[0], seen.attn_out[last], seen.resid_post[last]]
    return tuple(hidden.var(-1).mean().item() for hidden in found)  # type: ignore[return-value]


def beside(predicted: float, values: Sequence[float]) -> str:
    """Predicted, and the mean over seeds with its standard error."""
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return f"{predicted:.3g} / {np.mean(values):.3g} ± {error:.1g}"


# ------------------------------------------------------------------------------------------------------------- training


def train_all(out: Path, steps: int, only: str | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    ids = load_blocks(None, tokenizer, num_blocks=HELD_OUT + BATCH * steps, block_size=LENGTH).input_ids
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    held_out, text = ids[:HELD_OUT], ids[HELD_OUT:]
    print(
        "| model | loss | v_15 before | v_15 | v_15, shuffled | Var(u), sum | 2 Cov, sum | attention | MLP "
        "| RMS of weights |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, (changes, decay) in TRAINED.items():
        if only in (None, name):
            model = new_model(changes)
            before = measured(model, held_out), predict_from_model(model, held_out)
            train(model, text, steps, decay)
            after = measured(model, held_out), predict_from_model(model, held_out)
            print(row(name, model, before, after, held_out, decay, steps), flush=True)
            save(out, name, model, before, after)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2,048 entries, trained on the first 500 slices of the embedded corpus."""
    trained = ByteLevelBPETokenizer()
    documents = islice(python_stdlib().documents, 500)
    trained.train_from_iterator(
        (document.read(None) for document in documents), vocab_size=SHAPE["vocab_size"], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)


def rates(steps: int) -> list[float]:
    """Cosine from the peak to a tenth of it, after a warm-up of 20 steps."""
    cosine = [0.55 + 0.45 * math.cos(math.pi * step / steps) for step in range(steps)]
    return [PEAK * min(1.0, (step + 1) / 20) * share for step, share in enumerate(cosine)]


def train(model: DepthLMForCausalLM, text: Tensor, steps: int, decay: float) -> None:
    model.train()
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    norms = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))
    for step, rate in enumerate(rates(steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = text[BATCH * step : BATCH * (step + 1)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


Pair = tuple[LayerReport, VariancePrediction]


def row(
    name: str, model: DepthLMForCausalLM, before: Pair, after: Pair, held_out: Tensor, decay: float, steps: int
) -> str:
    report, predicted = after
    with torch.no_grad():
        loss = model(held_out, labels=held_out).loss.item()
    mixed = shuffled(model)
    of_mixed = predict_from_model(mixed, held_out)
    updates = float(predicted.attention_variance.sum() + predicted.mlp_variance.sum())
    weights = [weight.detach().square().mean() for weight in model.model.layers.parameters() if weight.dim() > 1]
    rms = float(torch.stack(weights).mean().sqrt())
    cells = [
        f"{loss:.3f}",
        f"{before[1].variance[-1]:.3g} / {before[0].column('variance')[-1]:.3g}",
        f"{predicted.variance[-1]:.3g} / {report.column('variance')[-1]:.3g}",
        f"{of_mixed.variance[-1]:.3g} / {measured(mixed, held_out).column('variance')[-1]:.3g}",
        f"{updates:.3g} / {total(report, 'variance_update'):.3g}",
        f"0 / {total(report, 'variance_covariance'):.3g}",
        f"{predicted.attention_variance.sum():.3g} / {total(report, 'attention_variance'):.3g}",
        f"{predicted.mlp_variance.sum():.3g} / {total(report, 'mlp_variance'):.3g}",
        f"{decayed_std(SHAPE['initializer_range'], rates(steps), decay):.3f} / {rms:.3f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


@torch.no_grad()
def shuffled(model: DepthLMForCausalLM) -> DepthLMForCausalLM:
    """A copy whose layers have the elements of each matrix in random order: the same sizes, and nothing learnt."""
    mixed = deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for weight in mixed.model.layers.parameters():
        if weight.dim() > 1:
            order = torch.randperm(weight.numel(), generator=generator)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return mixed


def total(report: LayerReport, column: str) -> float:
    return sum(value for value in report.column(column) if value is not None)


def save(out: Path, name: str, model: DepthLMForCausalLM, before: Pair, after: Pair) -> None:
    stem = name.replace(" ", "-").replace(",", "")
    model.save_pretrained(out / stem)
    after[0].save(out / f"{stem}.json")
    before[0].save(out / f"{stem}-initial.json")
    variance_theory(*after, initial=before).write_html(out / f"{stem}.html", include_plotlyjs=True)
    for column in ("variance", "attention_variance", "mlp_variance"):
        measured_values, predicted_values = after[0].column(column), getattr(after[1], column)
        pairs = [f"{p:.3g}/{m:.3g}" for p, m in zip(predicted_values, measured_values, strict=True)]
        with (out / "layers.txt").open("a") as file:
            file.write(f"{name}: {column}, predicted/measured: {' '.join(pairs)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["init", "train"])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", choices=TRAINED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "init":
        at_initialisation()
    else:
        train_all(options.out, options.steps, options.only)


if __name__ == "__main__":
    main()
