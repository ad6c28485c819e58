"""A training as arguments of transformers' Trainer, for the points of a sweep and for recipes."""

from typing import Any

from depthscope.sweep.specification import Training

__all__ = ["trainer_fields"]

SCHEDULES = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}


def trainer_fields(training: Training, devices: int) -> dict[str, Any]:
    """The fields of `TrainingArguments` for a training on `devices` devices, except the precision."""
    per_device = training.sequences // devices
    micro = min(training.micro_batch_size or per_device, per_device)
    fields: dict[str, Any] = {
        "max_steps": training.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": per_device // micro,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": SCHEDULES[training.schedule],
        "lr_scheduler_kwargs": {"min_lr_rate": training.min_learning_rate} if training.schedule == "cosine" else {},
        "warmup_steps": min(training.warmup_steps, training.steps),
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": training.adam_epsilon,
        "max_grad_norm": training.max_grad_norm,
    }
    if training.gradient_checkpointing:
        fields["gradient_checkpointing"] = True
    if training.fsdp and devices > 1:  # Trainer refuses it in a single process
        fields |= {"fsdp": True, "fsdp_config": {"version": 2}}
    return fields
