"""The sweep from the plain model to the recipe, one change at a time, as in the paper's ablation."""

from dataclasses import dataclass
from typing import Any

import yaml

from depthscope.recipes.request import Request
from depthscope.recipes.schedule import PLAIN_DECAY, PLAIN_LENGTH
from depthscope.recipes.shape import TOP_K, Shape, model_fields
from depthscope.sweep.cost.gpus import GPUS
from depthscope.sweep.cost.plan import launcher
from depthscope.sweep.specification import Training
from depthscope.wording.messages import counted

__all__ = ["AblationStep", "ablation_steps", "sweep_yaml"]

STANDARD_LIBRARY_TOKENS = 5_000_000  # up to this number Python's own source has enough text
FINEWEB = "HuggingFaceFW/fineweb-edu"
SAMPLES = ((9e9, "sample-10BT"), (9e10, "sample-100BT"), (3e11, "sample-350BT"))
CHARACTERS_PER_ENTRY = 2000
FIT_BLOCKS = 64
FIT_TOKENS_PER_FEATURE = 4
# The settings that vary between steps; those that do not are in `model:` or `training:`.
VARIED = ("sequence_length", "weight_decay", "num_key_value_heads", "num_experts", "intermediate_size", "norm_scaling")
LINE = 120


@dataclass(frozen=True)
class AblationStep:
    """One model of the ablation: the previous model with one more change.

    Attributes:
        name: the name of the point in the sweep.
        settings: the values of all settings that vary between steps.
        note: what is new, with the paper's accuracy if the paper has this step.
    """

    name: str
    settings: dict[str, Any]
    note: str


def ablation_steps(request: Request, shape: Shape, training: Training) -> list[AblationStep]:
    """The steps from the plain model of the same depth to the recipe; steps that would change nothing are left out.

    If the recipe has experts, the MLPs of the dense models before them are as wide as all experts of a token together,
    so all models have the same number of active parameters.
    """
    experts = shape.experts
    settings: dict[str, Any] = {
        "sequence_length": min(PLAIN_LENGTH, training.sequence_length),
        "weight_decay": PLAIN_DECAY,
        "num_key_value_heads": shape.heads,
        "num_experts": None,
        "intermediate_size": shape.mlp if experts is None else TOP_K * shape.mlp,
        "norm_scaling": "none",
    }
    changes: list[tuple[str, dict[str, Any], str]] = [
        ("length", {"sequence_length": training.sequence_length}, "longer sequences (paper, T = 4,096: 40.0)"),
        ("decay", {"weight_decay": training.weight_decay}, "more weight decay (paper, 0.3: 41.4)"),
        (
            "groups",
            {"num_key_value_heads": shape.heads // shape.group},
            "heads that share keys and values (paper, G = 2: 42.1)",
        ),
        ("experts", {"num_experts": experts, "intermediate_size": shape.mlp}, "experts (paper: 44.1)"),
        ("norms", {"norm_scaling": request.norm_scaling}, "LayerNorm Scaling (not in the paper)"),
    ]
    steps = [
        AblationStep(
            "1-plain", settings, f"the plain model with {counted(request.layers, 'layer')} (paper, 32 layers: 39.5)"
        )
    ]
    for name, change, note in changes:
        changed = {**steps[-1].settings, **change}
        if changed != steps[-1].settings:
            steps.append(AblationStep(f"{len(steps) + 1}-{name}", changed, f"+ {note}"))
    return _without_constants(steps)


def _without_constants(steps: list[AblationStep]) -> list[AblationStep]:
    """Every step with only the settings that differ between steps."""
    varied = [key for key in VARIED if any(step.settings[key] != steps[0].settings[key] for step in steps)]
    return [AblationStep(step.name, {key: step.settings[key] for key in varied}, step.note) for step in steps]


def sweep_yaml(request: Request, shape: Shape, training: Training) -> str:
    """The sweep file of the ablation, for `depthscope sweep run`."""
    steps = ablation_steps(request, shape, training)
    varied = set(steps[0].settings)
    plain = _plain(request, shape, training)
    layers = counted(request.layers, "layer")
    content: dict[str, Any] = {
        "name": f"recipe-L{request.layers}-d{request.width}",
        "description": f"From the plain model with {layers} of width {request.width} to the recipe.",
        "model": {key: value for key, value in plain["model"].items() if key not in varied},
        "data": _data(training.tokens),
        "tokenizer": {
            "vocab_size": request.vocab_size,
            "characters": max(5_000_000, CHARACTERS_PER_ENTRY * request.vocab_size),
        },
        "training": {key: value for key, value in plain["training"].items() if key not in varied},
        "scoring": {"fit_blocks": _fit_blocks(request, training)},
        "grid": {"ablation": {"points": [{"name": step.name, **step.settings} for step in steps]}},
        "seeds": [0],
    }
    notes = "".join(f"#   {step.name:<11}{step.note}\n" for step in steps)
    head = (
        "# The recipe's ablation: each model is the previous one with one more change. In parentheses: the accuracy\n"
        "# that arXiv 2603.15389 reports for its own step. Use three seeds to separate differences from chance.\n"
        f"#\n{notes}#\n{_commands(request)}"
    )
    return head + "".join("\n" + _dump(key, value) for key, value in content.items() if value)


def _commands(request: Request) -> str:
    """The commands to run with the file, as comments, for the GPUs of the recipe."""
    kind = next(name for name, gpu in GPUS.items() if gpu == request.kind)
    options = f"--gpu {kind} --gpus {request.gpus} --utilisation {request.utilisation}"
    return (
        "# Estimate the cost:\n"
        f"#   depthscope sweep plan sweep.yaml {options}\n"
        "# Train and measure:\n"
        f"#   {launcher(request.gpus)}depthscope sweep run sweep.yaml\n"
    )


def _dump(key: str, value: Any) -> str:
    """One section as YAML; points and seeds are on one line each."""
    flow = None if key in ("grid", "seeds") else False
    return yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=flow, width=2 * LINE, allow_unicode=True)


def _plain(request: Request, shape: Shape, training: Training) -> dict[str, dict[str, Any]]:
    """All settings of the model and the training, as if none varied."""
    model = {key: value for key, value in model_fields(request, shape).items() if key != "moe_intermediate_size"}
    defaults = Training().model_dump()
    always = ("tokens", "sequence_length", "batch_tokens", "weight_decay", "learning_rate", "warmup_steps")
    chosen = training.model_dump()
    return {
        "model": model,
        "training": {key: chosen[key] for key in chosen if key in always or chosen[key] != defaults[key]},
    }


def _data(tokens: int) -> dict[str, str]:
    if tokens <= STANDARD_LIBRARY_TOKENS:
        return {}
    sample = next((name for most, name in SAMPLES if tokens <= most), None)
    return {"dataset": FINEWEB if sample is None else f"{FINEWEB}:{sample}"}


def _fit_blocks(request: Request, training: Training) -> int:
    """The number of blocks to fit affine maps on: several tokens per input feature."""
    block = min(PLAIN_LENGTH, training.sequence_length)
    return max(FIT_BLOCKS, -(-FIT_TOKENS_PER_FEATURE * request.width // block))
