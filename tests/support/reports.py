"""Reports made up for tests: the numbers have the shape of a real model's, but no model was run."""

import math
import random
from typing import Any

from depthscope.report.report import LayerReport

ALL_SCORES = ("variance", "usefulness", "causal", "skip", "permutation", "jacobian", "influence")


def sample_content(num_layers: int = 30, scores: tuple[str, ...] = ALL_SCORES, seed: int = 0) -> dict[str, Any]:
    """The JSON content of a made-up report of `num_layers` layers that holds only the given scores."""
    rng = random.Random(seed)
    layers: list[dict[str, Any]] = [{"layer": layer, "kind": "LlamaDecoderLayer"} for layer in range(num_layers)]
    content: dict[str, Any] = {
        "schema_version": 1,
        "created": "2026-11-23T13:00:00+00:00",
        "model": {
            "name": f"sample/toy-{num_layers}",
            "revision": "0123456789abcdef0123456789abcdef01234567",
            "source": "hub",
            "model_type": "llama",
            "architecture": "LlamaForCausalLM",
            "num_layers": num_layers,
            "hidden_size": 576,
            "num_parameters": 134_515_008,
            "vocab_size": 49152,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "num_experts": None,
            "num_experts_per_tok": None,
            "dtype": "float32",
        },
        "data": {
            "name": "python-stdlib",
            "fingerprint": "9f86d081884c7d65",
            "fit_blocks": 16,
            "eval_blocks": 8,
            "block_size": 256,
            "tokens": 2048,
        },
        "settings": {
            "scores": list(scores),
            "threshold": 1.1,
            "ridge": 1e-6,
            "in_sample": False,
            "paper_code": False,
            "pairs": "all",
            "probes": 16,
            "seed": 0,
            "batch_size": 4,
        },
        "versions": {"depthscope": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "notes": ["The last layer has no later layer, so it has no causal score."],
        "scores": {"loss": 2.7182818, "loss_se": 0.0712},
        "layers": layers,
        "pairs": {},
    }
    for score in scores:
        _FILL[score](content, rng)
    return content


def sample_report(num_layers: int = 30, scores: tuple[str, ...] = ALL_SCORES, seed: int = 0) -> LayerReport:
    """A made-up report of `num_layers` layers that holds only the given scores."""
    return LayerReport(**sample_content(num_layers, scores, seed))


def _put(content: dict[str, Any], name: str, values: list[float | None], error: float = 0.05) -> None:
    for row, value in zip(content["layers"], values, strict=True):
        row[name] = value
        row[f"{name}_se"] = None if value is None else abs(value) * error
    known = [value for value in values if value is not None]
    content["scores"][name] = sum(known) / len(known) if known else None
    content["scores"][f"{name}_se"] = abs(content["scores"][name] or 0.0) * error / 2 if known else None


def _cost(layer: int, num_layers: int, rng: random.Random) -> float:
    """The loss increase of one layer: large at both ends and at one massive layer, small and noisy between."""
    ends = 2.4 * math.exp(-1.5 * layer) + 0.35 * math.exp(-1.2 * (num_layers - 1 - layer))
    massive = 0.45 if layer == num_layers * 2 // 5 - 1 else 0.0
    return ends + massive + 0.06 * math.exp(-2 * layer / num_layers) * rng.uniform(0.1, 1.3)


def _variance(content: dict[str, Any], rng: random.Random) -> None:
    num_layers = len(content["layers"])
    before, rows = 0.02, []
    for layer in range(num_layers):
        after = 0.5 * math.exp(4.3 * (layer + 1) / num_layers) * rng.uniform(0.9, 1.1)
        if num_layers * 2 // 5 <= layer < num_layers - 1:
            after += 3700 * (0.97 ** (layer - num_layers * 2 // 5))  # one token with massive activations
        gap = math.sqrt(after) - math.sqrt(before)
        update = max(gap * gap, 0.02 * after) * rng.uniform(1.0, 1.6)
        rows.append((after, update, after - before - update))
        before = after
    _put(content, "variance", [row[0] for row in rows])
    _put(content, "variance_update", [row[1] for row in rows])
    _put(content, "variance_covariance", [row[2] for row in rows])
    _put(content, "attention_variance", [row[1] * rng.uniform(0.1, 0.5) for row in rows])
    _put(content, "mlp_variance", [row[1] * rng.uniform(0.5, 0.9) for row in rows])
    for name in ("variance_update", "variance_covariance", "attention_variance", "mlp_variance"):
        del content["scores"][name], content["scores"][f"{name}_se"]
    content["scores"] |= {"variance": rows[-1][0], "variance_se": rows[-1][0] * 0.05}
    content["scores"] |= {"variance_growth": rows[-1][0] / rows[0][0], "variance_growth_se": rows[-1][0] * 0.02}


def _effective_depth(content: dict[str, Any], column: str, name: str) -> None:
    costs = [max(0.0, row[column] - 1) for row in content["layers"]]
    squares = sum(cost * cost for cost in costs)
    content["scores"][name] = sum(costs) ** 2 / squares if squares else None
    content["scores"][f"{name}_se"] = 0.31


def _skip(content: dict[str, Any], rng: random.Random) -> None:
    num_layers = len(content["layers"])
    ratios = [1 + _cost(layer, num_layers, rng) for layer in range(num_layers)]
    if num_layers > 4:
        ratios[num_layers * 3 // 4] = 0.9988  # a layer without which the model is a little better
    _put(content, "skip_ratio", ratios, 0.004)
    _effective_depth(content, "skip_ratio", "effective_depth_skip")


def _usefulness(content: dict[str, Any], rng: random.Random) -> None:
    num_layers = len(content["layers"])
    ratios = [1 + 0.4 * _cost(layer, num_layers, rng) for layer in range(num_layers)]
    _put(content, "usefulness_ratio", ratios, 0.002)
    _effective_depth(content, "usefulness_ratio", "effective_depth_linear")
    content["scores"] |= {"usefulness": sum(ratio > 1.1 for ratio in ratios) / num_layers, "usefulness_se": 0.01}
    content["scores"] |= {"usefulness_excess": sum(ratios) - num_layers, "usefulness_excess_se": 0.02}


def _causal(content: dict[str, Any], rng: random.Random) -> None:
    num_layers = len(content["layers"])
    matrix = [
        [
            (1.2 * math.exp(-s) + 0.5 * math.exp(-0.35 * (later - s)) + 0.05) * rng.uniform(0.8, 1.2)
            if s < later
            else None
            for later in range(num_layers)
        ]
        for s in range(num_layers)
    ]
    _put_pairs(content, "causal", matrix)


def _permutation(content: dict[str, Any], rng: random.Random) -> None:
    num_layers = len(content["layers"])
    matrix: list[list[float | None]] = [[None] * num_layers for _ in range(num_layers)]
    for i in range(num_layers):
        for j in range(i + 1, num_layers):
            value = 2.5 * math.exp(-1.5 * i) + 0.002 * (j - i) ** 1.5 * rng.uniform(0.5, 1.5)
            matrix[i][j] = matrix[j][i] = value
    _put_pairs(content, "permutation", matrix)


def _put_pairs(content: dict[str, Any], name: str, matrix: list[list[float | None]]) -> None:
    content["pairs"][name] = matrix
    content["pairs"][f"{name}_se"] = [[None if value is None else 0.04 * value for value in row] for row in matrix]
    known = [[value for value in row if value is not None] for row in matrix]
    _put(content, name, [sum(row) / len(row) if row else None for row in known])


def _jacobian(content: dict[str, Any], rng: random.Random) -> None:
    num_layers = len(content["layers"])
    _put(
        content,
        "jacobian",
        [0.014 * math.exp(-1.5 * i / num_layers) * rng.uniform(0.9, 1.1) for i in range(num_layers)],
    )


def _influence(content: dict[str, Any], rng: random.Random) -> None:
    num_layers = len(content["layers"])
    influence = [0.02 + 0.5 * math.exp(-0.8 * i) + 0.08 * rng.random() for i in range(num_layers)]
    _put(content, "block_influence", influence)
    _put(content, "angular_distance", [math.acos(1 - value) / math.pi for value in influence])
    _put(content, "update_norm", [math.sqrt(2 * value) for value in influence])
    _put(content, "update_cosine", [rng.uniform(-0.3, 0.3) for _ in influence])


_FILL = {
    "variance": _variance,
    "usefulness": _usefulness,
    "causal": _causal,
    "skip": _skip,
    "permutation": _permutation,
    "jacobian": _jacobian,
    "influence": _influence,
}
