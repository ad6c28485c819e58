"""`HubCheckpointCallback`: the weights at chosen steps go to the Hub while the training goes on.

    trainer = Trainer(..., callbacks=[HubCheckpointCallback("namespace/name", every=1000)])

At a step the main process saves the weights into a temporary folder; one thread pushes them, one after another, to the
branches `step0`, `step1`, `step2`, `step4`, ... A Hub that is slow or gone costs the training nothing but that folder.
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

LAST_WAIT = 10.0  # seconds, for the request that is under way when the patience is at its end


@dataclass
class _Checkpoint:
    """Saved weights that wait to be pushed; the folder goes when the object does."""

    step: int
    folder: Any = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="depthscope-step-"))

    def tree(self, repo_id: str) -> Tree:
        root = Path(self.folder.name)
        files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        return Tree(repo_id, "model", step_branch(self.step), files)


@dataclass
class _Run:
    """What one training has published: shared with its thread, which may outlive it and must not touch the next one."""

    waiting: int
    pushed: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    given: list[int] = field(default_factory=list)  # steps that the thread was given
    again: list[_Checkpoint] = field(default_factory=list)  # those whose first push failed
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the steps that were pushed or failed
    queued: queue.Queue[_Checkpoint | None] = field(default_factory=queue.Queue)
    stop: threading.Event = field(default_factory=threading.Event)
    worker: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.kept = threading.Semaphore(self.waiting)  # folders on the disk

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
    """Pushes the weights at steps 0, 1, 2, 4, ..., 512 and then at every n-th to branches `step<N>`, in the background.

    It works with any model in any Trainer script, and only the main process pushes. It never stops a training: what
    cannot be saved or pushed is warned of, tried once more when the training ends, and listed in `failed`. `main` is
    left alone: push the trained model with `trainer.push_to_hub()` or `depthscope push`.

    Weights that FSDP (version 2) shards are gathered; those that DeepSpeed's stage 3 or FSDP's version 1 shard are not
    pushed, with a warning: their checkpoints can be pushed from the Trainer's output folder with `depthscope push`.

    Args:
        repo_id: the repository, which is made if it is not there.
        every: steps between two pushes after step 512.
        private: make the repository private.
        waiting: checkpoints that may wait on the disk; at a step at which there are as many, none is saved.
        patience: seconds that the end of the training waits for what is left to be pushed.
        token: instead of the one that huggingface_hub finds.

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
        """Steps that are on the Hub by now: a copy, since the thread goes on."""
        with self._run.lock:
            return list(self._run.pushed)

    @property
    def failed(self) -> dict[int, str]:
        """Why a step is not on the Hub, by step: a copy, since the thread goes on."""
        with self._run.lock:
            return dict(self._run.failed)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Push the weights before the first step; in a run that goes on, nothing."""
        self._run = _Run(self.waiting)
        if state.global_step == 0:
            self._publish(state, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Push the weights if it is a step to be published."""
        if is_published(state.global_step, self.every):
            self._publish(state, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for what is being pushed, try once more what failed, and list what is not on the Hub."""
        run = self._run
        if run.worker is not None:
            run.queued.put(None)
            run.worker.join(self.patience)
            if run.worker.is_alive():
                run.stop.set()
                run.worker.join(LAST_WAIT)
            run.worker = None
            with run.lock:
                for step in run.given:
                    if step not in run.pushed:
                        run.failed.setdefault(step, "it was still being pushed when the training ended")
        if failed := self.failed:
            listed = "; ".join(f"step{step}: {reason}" for step, reason in sorted(failed.items()))
            logger.warning("Not on the Hub (%s): %s", self.repo_id, listed)

    # In the training's thread

    def _publish(self, state: Any, found: dict[str, Any]) -> None:
        run, model, step = self._run, found.get("model"), state.global_step
        if model is None:
            return
        # Every process takes part in gathering; only the main one has what comes of it.
        whole, weights = _gathered(model)
        if not state.is_world_process_zero:
            return
        if not whole:
            run.fail(step, "its weights are shared out among processes in a way that is not gathered here")
            return
        if not run.kept.acquire(blocking=False):
            run.fail(step, f"{self.waiting} checkpoints before it were still waiting for the Hub")
            return
        try:
            checkpoint = _Checkpoint(step)
            _save(model, weights, found.get("processing_class"), checkpoint.folder.name)
        except Exception as error:  # whatever a model's own saving raises, the training goes on
            run.kept.release()
            run.fail(step, f"could not be saved: {one_line(error)}")
            return
        if run.worker is None:
            run.worker = threading.Thread(target=self._work, args=(run,), name="hub-checkpoints", daemon=True)
            run.worker.start()
        run.given.append(step)
        run.queued.put(checkpoint)

    # In the worker's thread

    def _work(self, run: _Run) -> None:
        while (checkpoint := run.queued.get()) is not None:
            if not self._push(run, checkpoint):
                run.again.append(checkpoint)  # its folder stays until the end
                continue
            run.kept.release()
        for checkpoint in run.again:
            self._push(run, checkpoint)
        run.again = []

    def _push(self, run: _Run, checkpoint: _Checkpoint) -> bool:
        try:
            api: HfApi = client(self._token)
            patience = Patience(stop=run.stop, said=lambda line: logger.info("%s", line))
            push_trees(api, [checkpoint.tree(self.repo_id)], patience, private=self.private)
        except Exception as error:  # in a thread it would go unseen, and the training goes on in any case
            run.fail(checkpoint.step, one_line(error))
            return False
        run.succeed(checkpoint.step)
        checkpoint.folder.cleanup()
        return True


def _gathered(model: torch.nn.Module) -> tuple[bool, dict[str, Any] | None]:
    """Whether the whole weights of a model can be had, and those that had to be gathered from other processes."""
    parameters = list(model.parameters())
    # DeepSpeed's stage 3 marks what it shares out; FSDP's version 1 puts parameters into flat ones.
    if any(hasattr(one, "ds_id") or type(one).__name__ == "FlatParameter" for one in parameters):
        return False, None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from torch.distributed.tensor import DTensor

        if any(isinstance(one, DTensor) for one in parameters):
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
