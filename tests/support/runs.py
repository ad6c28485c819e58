"""Short trainings of tiny models, and what their layers did in them, recomputed from hidden states."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

LENGTH = 16


class Sentences(Dataset):
    """Random tokens; every row has its own, and its own length where they are padded."""

    def __init__(self, rows: int = 64, padded: bool = True, vocabulary: int = 90) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, vocabulary, (rows, LENGTH), generator=generator)
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (rows,), generator=generator)
        self.masks = (torch.arange(LENGTH) < lengths[:, None]).long() if padded else torch.ones_like(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        mask = self.masks[row]
        labels = torch.where(mask.bool(), self.ids[row], -100)
        return {"input_ids": self.ids[row], "attention_mask": mask, "labels": labels}


class Batches(TrainerCallback):
    """Nothing but a witness: does nothing to the training."""


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "logging_steps": 4,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "seed": 3,
            **changes,
        }
    )


def trainer(
    model: PreTrainedModel,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    data: Dataset | None = None,
    **changes: Any,
) -> Trainer:
    return Trainer(model, arguments(folder, **changes), train_dataset=data or Sentences(), callbacks=list(callbacks))


class Recorder(Trainer):
    """A Trainer that keeps, for every microbatch, the inputs and outputs of each layer in the pass that it trains on.

    Through hooks of its own, on the layers' parents' children: nothing of depthscope is used.
    """

    def __init__(self, *args: Any, layers: Sequence[torch.nn.Module] = (), **kwargs: Any) -> None:
        self.seen: list[tuple[int, list[tuple[Tensor, Tensor]], Tensor | None]] = []
        self._now: dict[int, tuple[Tensor, Tensor]] = {}
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._keep(index), with_kwargs=True)
        self._count = len(layers)
        super().__init__(*args, **kwargs)

    def _keep(self, index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            self._now.setdefault(index, (before.detach().clone(), after.detach().clone()))

        return hook

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._now = {}
        loss = super().training_step(model, inputs, *args, **kwargs)
        layers = [self._now[index] for index in range(self._count)]
        self.seen.append((self.state.global_step, layers, inputs.get("attention_mask")))
        return loss


def naive_variances(seen: list[tuple[int, list[tuple[Tensor, Tensor]], Tensor | None]]) -> dict[str, np.ndarray]:
    """Every metric of the stream, token by token in float64."""
    layers = len(seen[0][1])
    total = {name: np.zeros(layers) for name in ("variance", "variance_update", "before", "update", "stream")}
    tokens = 0
    for _, states, mask in seen:
        for layer, (before, after) in enumerate(states):
            real = torch.ones(before.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            into, out = before[real].double().numpy(), after[real].double().numpy()
            for h, k in zip(into, out, strict=True):
                total["variance"][layer] += np.var(k, ddof=1)
                total["variance_update"][layer] += np.var(k - h, ddof=1)
                total["before"][layer] += np.var(h, ddof=1)
                total["update"][layer] += np.linalg.norm(k - h)
                total["stream"][layer] += np.linalg.norm(h)
        tokens += len(into)
    means = {name: values / tokens for name, values in total.items()}
    return {
        "variance": means["variance"],
        "variance_update": means["variance_update"],
        "variance_covariance": means["variance"] - means["before"] - means["variance_update"],
        "update_norm": total["update"] / total["stream"],
    }
