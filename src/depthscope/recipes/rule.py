"""`depthscope.recipe`: the paper's rule of thumb for deep models, for your own shape and budget."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from depthscope.errors import SettingsError
from depthscope.recipes.ablation import AblationStep, ablation_steps, sweep_yaml
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
    """A model, its training and the reasons: the chosen draft, with its cost and its files.

    Attributes:
        request: the request.
        shape: heads, groups, experts, widths.
        config: the model's configuration, ready for `DepthLMForCausalLM`.
        training: the training, with the settings of a sweep file.
        evidence: a row for each choice.
        size: parameters and FLOPs.
        memory: the largest number of bytes that each GPU holds (estimated).
    """

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole training."""
        return float(self.size.training_flops_per_token) * self.training.steps * self.training.batch_tokens

    @property
    def gpu_hours(self) -> float:
        """Hours on one GPU of the requested type, at the requested utilisation."""
        return self.flops / self.request.flops_an_hour

    @property
    def extrapolated(self) -> list[str]:
        """The choices with values that the paper did not test."""
        return [row.choice for row in self.evidence if not row.tested]

    @property
    def warnings(self) -> list[str]:
        """The problems of the requested combination."""
        warnings = []
        if self.config.norm_scaling == "depth" and self.config.depth_scaled_init:
            warnings.append(
                "LayerNorm Scaling loses its effect if the initialisation also shrinks with depth (arXiv "
                "2502.05795): leave depth_scaled_init out."
            )
        gpu = self.request.kind
        if self.request.memory is None and self.memory > ROOM * gpu.memory:
            warnings.append(
                f"One {gpu.name} has {gpu.memory / GB:.0f} GB, which is too little. Give gpus to share the model "
                "among several GPUs, or give memory to get smaller micro-batches and fewer experts."
            )
        return warnings

    @property
    def steps(self) -> list[AblationStep]:
        """The models of the sweep, from the plain one to the recipe."""
        return ablation_steps(self.request, self.shape, self.training)

    def training_fields(self) -> dict[str, Any]:
        """The fields of `TrainingArguments` that differ from its defaults, without the folder."""
        return {**trainer_fields(self.training, self.request.gpus), "bf16": True}

    def training_arguments(self, output_dir: str, **changes: Any) -> TrainingArguments:
        """The arguments for transformers' Trainer, on this machine.

        Without an accelerator they select the CPU, and bfloat16 only if the processor computes it faster.

        Args:
            output_dir: the Trainer's folder.
            changes: other fields of `TrainingArguments`, which replace those of the recipe.
        """
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        device: dict[str, Any] = {"bf16": choose_precision("auto") == "bfloat16", "use_cpu": not accelerated}
        return TrainingArguments(output_dir=output_dir, **{**self.training_fields(), **device, **changes})

    def training_json(self, output_dir: str = "run") -> str:
        """The training arguments as JSON, for `HfArgumentParser(TrainingArguments).parse_json_file`."""
        return json.dumps({"output_dir": output_dir, **self.training_fields()}, indent=1) + "\n"

    def sweep_yaml(self) -> str:
        """A sweep file with the steps from the plain model of the same depth to the recipe."""
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
    """Apply the paper's rule of thumb to a shape: long sequences, more weight decay, grouped queries and experts.

    Source: the recipe ablation and the sweeps of arXiv 2603.15389. Values that the paper did not test are marked as
    extrapolations (`Recipe.extrapolated`).

    Args:
        layers: decoder layers, L.
        width: hidden size, d.
        tokens: the budget in tokens. Give exactly one of `tokens`, `flops` and `gpu_hours`.
        flops: the budget in floating-point operations.
        gpu_hours: the budget in hours of one GPU of the type `gpu`.
        gpu: the type of GPU.
        gpus: the number of GPUs that share the training.
        utilisation: the share of the peak that training reaches.
        memory: GB of memory per GPU, of which a tenth stays free; None is unlimited.
        heads: attention heads; None chooses by the width.
        head_multiple: heads and key/value heads are multiples of this, for tensor parallelism.
        dense: build a model without experts.
        max_length: the longest sequence allowed, in tokens.
        vocab_size: entries of the tokenizer.
        norm_scaling: "depth" adds LayerNorm Scaling, which is not in the paper's recipe.
        depth_scaled_init: shrink the initialisation of the projections that write to the residual stream with depth.

    Raises:
        SettingsError: a value is not allowed, or no model meets the constraints; the message names the cause.
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
    """The recipe with as many experts as fit: the paper's number, or fewer, or none.

    Raises:
        SettingsError: not even a dense model fits.
    """
    for experts in possible_experts(request):
        candidate = draft(request, experts)
        if candidate.fits:
            return Recipe(**vars(candidate))
    raise SettingsError(
        f"Even a dense model with {counted(request.layers, 'layer')} of width {request.width} needs "
        f"{candidate.memory / GB:.3g} GB on each of {counted(request.gpus, 'GPU')}, but memory is "
        f"{request.memory:g} GB: give more gpus or memory, or fewer layers or a smaller width."
    )
