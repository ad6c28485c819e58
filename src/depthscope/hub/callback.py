"""`HubCheckpointCallback`: pushes the weights at chosen steps to the Hub during the training.

    trainer = Trainer(..., callbacks=[HubCheckpointCallback("namespace/name", every=1000)])

At a step the main process saves the weights to a temporary folder; one thread pushes them, one after another, to the
branches `step0`, `step1`, `step2`, `step4`, ... A slow or unreachable Hub does not delay the training.
"""

import logging
import queue
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import TrainerCallback

from depthscope.errors import SettingsError
from depthscope.hub.commit import push_trees
from depthscope.hub.errors import hide_tokens, require_repository_name
from depthscope.hub.names import step_branch
from depthscope.hub.push import client
from depthscope.hub.retry import Patience
from depthscope.hub.tree import Tree
from depthscope.runs.layout import is_published
from depthscope.wording.messages import one_line

__all__ = ["HubCheckpointCallback"]

logger = logging.getLogger(__name__)

LAST_WAIT = 10.0  # seconds for the current request when the patience is at its end


@dataclass
class _Checkpoint:
    """Saved weights that wait to be pushed; the folder is deleted with the object."""

    step: int
    folder: Any = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="depthscope-step-"))

    def tree(self, repo_id: str) -> Tree:
        root = Path(self.folder.name)
        files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        return Tree(repo_id, "model", step_branch(self.step), files)


@dataclass
class _Run:
    """The state of one training, shared with its thread; the thread may outlive the training, so each has its own."""

    waiting: int
    pushed: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    submitted: list[int] = field(default_factory=list)  # steps handed to the thread
    retries: list[_Checkpoint] = field(default_factory=list)  # checkpoints whose first push failed
    lock: threading.Lock = field(default_factory=threading.Lock)  # guards `pushed` and `failed`
    queued: queue.Queue[_Checkpoint | None] = field(default_factory=queue.Queue)
    stop: threading.Event = field(default_factory=threading.Event)
    worker: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.slots = threading.Semaphore(self.waiting)  # limits the folders on the disk

    def fail(self, step: int, reason: str) -> None:
        reason = hide_tokens(reason)
        with self.lock:
            self.failed[step] = reason
        logger.warning("step%d is not on the Hub: %s", step, reason)

    def succeed(self, step: int) -> None:
        with self.lock:
            self.pushed.append(step)
            self.failed.pop(step, None)


class HubCheckpointCallback(TrainerCallback):
    """Pushes the weights at steps 0, 1, 2, 4, ..., 512, then every `every` steps, to branches `step<N>` in background.

    It works with any model in any Trainer script; only the main process pushes. It never stops a training: a checkpoint
    that cannot be saved or pushed gives a warning, is retried once when the training ends, and is listed in `failed`.
    The branch `main` is not changed: push the trained model with `trainer.push_to_hub()` or `depthscope push`.

    Weights that FSDP 2 shards are gathered. Weights that DeepSpeed's stage 3 or FSDP 1 shards are not pushed, with a
    warning: push their checkpoints from the Trainer's output folder with `depthscope push`.

    Args:
        repo_id: the repository; it is created if missing.
        every: steps between two pushes after step 512.
        private: make the repository private.
        waiting: the most checkpoints that may wait on the disk; while there are as many, no other is saved.
        patience: seconds that the end of the training waits for the remaining pushes.
        token: a token, instead of the one that huggingface_hub finds.

    Raises:
        SettingsError: an argument is not allowed.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        every: int = 1000,
        private: bool = False,
        waiting: int = 16,
        patience: float = 600.0,
        token: str | None = None,
    ) -> None:
        if not isinstance(repo_id, str):
            raise SettingsError(f"repo_id is {repo_id!r}; give the name of a repository, namespace/name.")
        require_repository_name(repo_id, repr(repo_id))
        if "/" not in repo_id:
            raise SettingsError(f"{repo_id!r} has no namespace: give namespace/{repo_id}.")
        for name, number in (("every", every), ("waiting", waiting)):
            if not isinstance(number, int) or number < 1:
                raise SettingsError(f"{name} is {number!r}; give a whole number, at least 1.")
        self.repo_id, self.every, self.private = repo_id, every, private
        self.waiting, self.patience = waiting, patience
        self._token = token
        self._run = _Run(waiting)

    @property
    def pushed(self) -> list[int]:
        """A copy of the list of steps that are on the Hub."""
        with self._run.lock:
            return list(self._run.pushed)

    @property
    def failed(self) -> dict[int, str]:
        """A copy of the reasons why steps are not on the Hub, by step."""
        with self._run.lock:
            return dict(self._run.failed)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Push the weights before the first step; a resumed run pushes nothing here."""
        self._run = _Run(self.waiting)
        if state.global_step == 0:
            self._publish(state, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Push the weights if the step is published."""
        if is_published(state.global_step, self.every):
            self._publish(state, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the remaining pushes, retry failed ones once, and warn of steps that are not on the Hub."""
        run = self._run
        if run.worker is not None:
            run.queued.put(None)
            run.worker.join(self.patience)
            if run.worker.is_alive():
                run.stop.set()
                run.worker.join(LAST_WAIT)
            run.worker = None
            with run.lock:
                for step in run.submitted:
                    if step not in run.pushed:
                        run.failed.setdefault(step, "it was still being pushed when the training ended")
        if failed := self.failed:
            listed = "; ".join(f"step{step}: {reason}" for step, reason in sorted(failed.items()))
            logger.warning("Not on the Hub (%s): %s", self.repo_id, listed)

    # In the training's thread

    def _publish(self, state: Any, arguments: dict[str, Any]) -> None:
        run, model, step = self._run, arguments.get("model"), state.global_step
        if model is None:
            return
        # Every process takes part in gathering; only the main process gets the result.
        can_gather, weights = _gathered(model)
        if not state.is_world_process_zero:
            return
        if not can_gather:
            run.fail(step, "its weights are sharded among processes in a way that this callback cannot gather")
            return
        if not run.slots.acquire(blocking=False):
            run.fail(step, f"{self.waiting} earlier checkpoints were still waiting for the Hub")
            return
        try:
            checkpoint = _Checkpoint(step)
            _save(model, weights, arguments.get("processing_class"), checkpoint.folder.name)
        except Exception as error:  # whatever the model's saving raises, the training continues
            run.slots.release()
            run.fail(step, f"could not be saved: {one_line(error)}")
            return
        if run.worker is None:
            run.worker = threading.Thread(target=self._work, args=(run,), name="hub-checkpoints", daemon=True)
            run.worker.start()
        run.submitted.append(step)
        run.queued.put(checkpoint)

    # In the worker's thread

    def _work(self, run: _Run) -> None:
        while (checkpoint := run.queued.get()) is not None:
            if not self._push(run, checkpoint):
                run.retries.append(checkpoint)  # its folder is kept until the end
                continue
            run.slots.release()
        for checkpoint in run.retries:
            self._push(run, checkpoint)
        run.retries = []

    def _push(self, run: _Run, checkpoint: _Checkpoint) -> bool:
        try:
            api: HfApi = client(self._token)
            patience = Patience(stop=run.stop, report_wait=lambda line: logger.info("%s", line))
            push_trees(api, [checkpoint.tree(self.repo_id)], patience, private=self.private)
        except Exception as error:  # an exception in a thread would be lost; the training continues in any case
            run.fail(checkpoint.step, one_line(error))
            return False
        run.succeed(checkpoint.step)
        checkpoint.folder.cleanup()
        return True


def _gathered(model: torch.nn.Module) -> tuple[bool, dict[str, Any] | None]:
    """Whether the complete weights of a model are available, and the state dict if it had to be gathered."""
    parameters = list(model.parameters())
    # DeepSpeed's stage 3 marks the parameters that it shards; FSDP 1 flattens them.
    if any(hasattr(parameter, "ds_id") or type(parameter).__name__ == "FlatParameter" for parameter in parameters):
        return False, None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from torch.distributed.tensor import DTensor

        if any(isinstance(parameter, DTensor) for parameter in parameters):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return True, get_model_state_dict(model, options=options)
    return True, None


def _save(model: Any, weights: dict[str, Any] | None, tokenizer: Any, folder: str) -> None:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, **({"state_dict": weights} if weights is not None else {}))
    else:
        from safetensors.torch import save_file, save_model

        file = str(Path(folder, "model.safetensors"))
        save_model(model, file) if weights is None else save_file(weights, file)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
