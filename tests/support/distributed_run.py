"""Trainings in two processes, started by torchrun: `distributed_run.py FOLDER`; each writes a folder in it."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from depthscope.callbacks import EffectivenessCallback, SparsityCallback, VarianceCallback
from models import random_blocks, tiny_llama
from runs import Sentences, arguments, trainer

RHYTHM = {"max_steps": 6, "logging_steps": 3, "learning_rate": 1e-2}
GLOO: dict[str, Any] = {"ddp_backend": "gloo", "ddp_timeout": 60}


def callbacks(**options: Any) -> list[TrainerCallback]:
    blocks = random_blocks(3, 12)
    return [
        VarianceCallback(moments_every=2),
        SparsityCallback(every=3, sequences=4),  # all of a batch, however it is shared out
        EffectivenessCallback(blocks, scores="skip,causal,block_influence", every=3, max_overhead=None, **options),
    ]


def ddp(folder: Path) -> None:
    trainer(tiny_llama(), folder, callbacks(), per_device_train_batch_size=2, **GLOO, **RHYTHM).train()


class FailsInOneProcess(TrainerCallback):
    """Lets the analysis of some steps fail, each in one process only, while the other waits for it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.step, self.passes = 0, 0
        model.model.layers[2].register_forward_hook(self._fail)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step, self.passes = state.global_step + 1, 0

    def _fail(self, layer: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if layer.training or output.shape[1] != 12:  # of another length are the examples that layers are found with
            return output
        self.passes += 1
        if (self.step, dist.get_rank(), self.passes) == (1, 1, 1):  # while linear maps are fitted
            raise torch.OutOfMemoryError("as a device may")
        if (self.step, dist.get_rank(), self.passes) == (2, 0, 2):  # while blocks are measured
            return output * float("nan")
        return output


def failing(folder: Path) -> None:
    model = tiny_llama()
    measuring = EffectivenessCallback(random_blocks(4, 12), scores="skip,usefulness", every=1, max_overhead=None)
    trainer(
        model,
        folder,
        [FailsInOneProcess(model), measuring],
        per_device_train_batch_size=2,
        **GLOO,
        max_steps=3,
        logging_steps=3,
    ).train()


def fsdp(folder: Path) -> None:
    """The Trainer does not shard on a CPU, so its loop is written out, with its own callback handler."""
    # The clock of one process runs ahead; the other one's decides when the time is spent.
    real, rank = time.monotonic, dist.get_rank()
    time.monotonic = lambda: real() * (1 + 10**6 * rank)
    model = tiny_llama()
    args, state, control = arguments(folder, **RHYTHM), TrainerState(), TrainerControl()
    state.is_world_process_zero = dist.get_rank() == 0
    state.max_steps, state.logging_steps, state.eval_steps, state.save_steps = 6, 3, 3, 3
    handler = CallbackHandler([DefaultFlowCallback(), *callbacks(budget=3600)], model, None, None, None)
    control = handler.on_init_end(args, state, control)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = Sentences()
    control = handler.on_train_begin(args, state, control)
    model.train()
    while state.global_step < state.max_steps:
        control = handler.on_step_begin(args, state, control)
        first = 4 * state.global_step + 2 * dist.get_rank()
        rows = [data[row] for row in range(first, first + 2)]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        control = handler.on_step_end(args, state, control)
        if control.should_log:
            logs = {"loss": 0.0}
            state.log_history.append(dict(logs))
            control = handler.on_log(args, state, control, logs)
    handler.on_train_end(args, state, control)
    assert not any(module._forward_hooks for module in model.model.layers[0].self_attn.modules())


if __name__ == "__main__":
    # One after another in the same processes: to start them takes longer than any of these.
    for training in (ddp, failing, fsdp):
        training(Path(sys.argv[1], training.__name__))
    dist.barrier()  # a process that ends before the others takes their connections with it
    dist.destroy_process_group()
