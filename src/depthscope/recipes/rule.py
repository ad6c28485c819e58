"""`depthscope.recipe`: the paper's rule of thumb for deep models, for a shape and a budget of one's own."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from depthscope.errors import SettingsError
from depthscope.recipes.ablation import Step, ablation_steps, sweep_yaml
from depthscope.recipes.draft import Draft, draft
from depthscope.recipes.request import GB, Request
from depthscope.recipes.shape import possible_experts
from depthscope.sweep.cost.hardware import choose_precision
from depthscope.sweep.cost.plan import ROOM
from depthscope.sweep.trainer_fields import trainer_fields
from depthscope.wording.messages import counted

__all__ = ["Recipe", "recipe"]


@dataclass(frozen=True)
class Recipe(Draft):
    """A model, its training, and why: the draft that was chosen, with its cost and its files.

    Attributes:
        request: what was asked for.
        shape: heads, groups, experts, widths.
        config: the model's configuration, ready for `DepthLMForCausalLM`.
        training: the training, in the words of a sweep file.
        evidence: a row for each choice.
        size: parameters and FLOPs.
        memory: bytes that each GPU holds at the most (estimated).
    """

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole training."""
        return float(self.size.training_flops_per_token) * self.training.steps * self.training.batch_tokens

    @property
    def gpu_hours(self) -> float:
        """Hours of one GPU of the request's kind, at its utilisation."""
        return self.flops / self.request.flops_an_hour

    @property
    def extrapolated(self) -> list[str]:
        """The choices with values that the paper did not test."""
        return [row.choice for row in self.evidence if not row.tested]

    @property
    def warnings(self) -> list[str]:
        """What speaks against the combination that was asked for."""
        warnings = []
        if self.config.norm_scaling == "depth" and self.config.depth_scaled_init:
            warnings.append(
                "LayerNorm Scaling loses its effect beside an initialisation that shrinks with depth (arXiv "
                "2502.05795): leave depth_scaled_init out."
            )
        gpu = self.request.kind
        if self.request.memory is None and self.memory > ROOM * gpu.memory:
            warnings.append(
                f"One {gpu.name} has {gpu.memory / GB:.0f} GB: give gpus, to share the "
                "model among them, or memory, to have smaller micro-batches and fewer experts."
            )
        return warnings

    @property
    def steps(self) -> list[Step]:
        """The models of the sweep, from the plain one to the recipe."""
        return ablation_steps(self.request, self.shape, self.training)

    def training_fields(self) -> dict[str, Any]:
        """The fields of `TrainingArguments` that differ from its defaults, but for the folder."""
        return {**trainer_fields(self.training, self.request.gpus), "bf16": True}

    def training_arguments(self, output_dir: str, **changes: Any) -> TrainingArguments:
        """The arguments for transformers' Trainer, on this machine.

        Without an accelerator they ask for the CPU, and for bfloat16 only where the processor computes it faster.

        Args:
            output_dir: the Trainer's folder.
            changes: other fields of `TrainingArguments`, over those of the recipe.
        """
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        here: dict[str, Any] = {"bf16": choose_precision("auto") == "bfloat16", "use_cpu": not accelerated}
        return TrainingArguments(output_dir=output_dir, **{**self.training_fields(), **here, **changes})

    def training_json(self, output_dir: str = "run") -> str:
        """The training arguments as JSON, for `HfArgumentParser(TrainingArguments).parse_json_file`."""
        return json.dumps({"output_dir": output_dir, **self.training_fields()}, indent=1) + "\n"

    def sweep_yaml(self) -> str:
        """A sweep file that goes from the plain model of the same depth to the recipe, step by step."""
        return sweep_yaml(self.request, self.shape, self.training)


def recipe(
    layers: int,
    width: int,
    *,
    tokens: float | None = None,
    flops: float | None = None,
    gpu_hours: float | None = None,
    gpu: str = "h100",
    gpus: int = 1,
    utilisation: float = 0.4,
    memory: float | None = None,
    heads: int | None = None,
    head_multiple: int = 1,
    dense: bool = False,
    max_length: int | None = None,
    vocab_size: int = 50304,
    norm_scaling: str = "none",
    depth_scaled_init: bool = False,
) -> Recipe:
    """The paper's rule of thumb: long sequences, more weight decay, grouped queries and experts, for this shape.

    Source: the recipe ablation and the sweeps of arXiv 2603.15389. What the paper did not test is marked as an
    extrapolation (`Recipe.extrapolated`).

    Args:
        layers: decoder layers, L.
        width: hidden size, d.
        tokens: the budget, in tokens; or
        flops: in floating-point operations; or
        gpu_hours: in hours of one GPU of the kind `gpu`.
        gpu: the kind of GPU.
        gpus: how many share the training.
        utilisation: the share of the peak that training reaches.
        memory: GB that each GPU has, of which a tenth stays free; unlimited where nothing is given.
        heads: attention heads; chosen by the width where nothing is given.
        head_multiple: heads and key/value heads are multiples of this, for tensor parallelism.
        dense: no experts.
        max_length: the longest sequence allowed, in tokens.
        vocab_size: entries of the tokenizer.
        norm_scaling: "depth" adds LayerNorm Scaling, which is not in the paper's recipe.
        depth_scaled_init: shrink the initialisation of what writes to the stream with depth.

    Raises:
        SettingsError: a value is not allowed, or the constraints leave no model; the message says which.
    """
    request = Request(
        layers=layers,
        width=width,
        tokens=tokens,
        flops=flops,
        gpu_hours=gpu_hours,
        gpu=gpu,
        gpus=gpus,
        utilisation=utilisation,
        memory=memory,
        heads=heads,
        head_multiple=head_multiple,
        dense=dense,
        max_length=max_length,
        vocab_size=vocab_size,
        norm_scaling=norm_scaling,
        depth_scaled_init=depth_scaled_init,
    )
    return _largest_that_fits(request)


def _largest_that_fits(request: Request) -> Recipe:
    """With the paper's experts, else with fewer, else without.

    Raises:
        SettingsError: not even a dense model fits.
    """
    for experts in possible_experts(request):
        made = draft(request, experts)
        if made.fits:
            return Recipe(**vars(made))
    raise SettingsError(
        f"Even a dense model with {counted(request.layers, 'layer')} of width {request.width} needs "
        f"{made.memory / GB:.3g} GB on each of {counted(request.gpus, 'GPU')}, and memory is {request.memory:g} GB: "
        "give more gpus or memory, or fewer layers or a smaller width."
    )
