"""Loading saved models in a fresh process, which knows nothing of the one that saved them, and asking for their logits.

    python -m depthscope.surgery.reload FOLDER      # FOLDER holds job.json and ids.safetensors; the answers go there

One process may load many models, since most of its time is the import of torch and transformers. It runs no code of
models and asks no network.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Saved", "reloaded_logits"]

JOB, IDS = "job.json", "ids.safetensors"
MOST_WORDS = 2000


@dataclass(frozen=True)
class Saved:
    """A saved model: its folder, and the dtype, device and attention to load it with."""

    folder: str
    dtype: str = "float32"
    device: str = "cpu"
    attn_implementation: str | None = None


def reloaded_logits(saved: Sequence[Saved], ids: Sequence[Tensor]) -> list[Tensor | str]:
    """Load models in one fresh process and return their logits on their token ids, or why one could not be loaded.

    Raises:
        OSError: the process could not be started, or the disk is full.
    """
    import depthscope

    with tempfile.TemporaryDirectory(prefix="depthscope-reload-") as name:
        folder = Path(name)
        (folder / JOB).write_text(json.dumps([asdict(each) for each in saved]), encoding="utf-8")
        save_file({str(index): each.cpu().contiguous() for index, each in enumerate(ids)}, folder / IDS)
        package = str(Path(depthscope.__file__).resolve().parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-m", __name__, name],
            cwd=name,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        return [_answer(folder, index, done) for index in range(len(saved))]


def _answer(folder: Path, index: int, done: "subprocess.CompletedProcess[str]") -> Tensor | str:
    if (logits := folder / f"{index}.safetensors").is_file():
        return load_file(logits)["logits"]
    if (words := folder / f"{index}.txt").is_file():
        return words.read_text(encoding="utf-8")
    last = " ".join(done.stderr.split()[-40:])
    return f"the process that was to load it ended with status {done.returncode}: {last}"


def _main(folder: Path) -> None:
    """Load each model of a job, and write its logits or the reason why there are none."""
    import torch
    import transformers  # noqa: F401

    from depthscope.errors import DepthscopeError
    from depthscope.layers.tracing import MODEL_FAILURES, run

    gc.collect()
    gc.freeze()  # what was imported stays
    ids = load_file(folder / IDS)
    for index, job in enumerate(json.loads((folder / JOB).read_text(encoding="utf-8"))):
        saved = Saved(**job)
        try:
            model = _load(saved)
            with torch.no_grad():
                logits = run(model, ids[str(index)]).logits
        except (DepthscopeError, *MODEL_FAILURES) as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            (folder / f"{index}.txt").write_text(words[:MOST_WORDS], encoding="utf-8")
            continue
        unfinished = folder / "unfinished"
        save_file({"logits": logits.contiguous().cpu()}, unfinished)
        unfinished.rename(folder / f"{index}.safetensors")


def _load(saved: Saved) -> Any:
    """The model of a folder, by the class that transformers has for its type, else by the class that it names."""
    import torch
    import transformers

    from depthscope.loading.load import load_model

    config = transformers.AutoConfig.from_pretrained(saved.folder)
    known = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING)
    if any(type(config) in mapping for mapping in known):
        attention = saved.attn_implementation
        return load_model(saved.folder, dtype=saved.dtype, device=saved.device, attn_implementation=attention).model
    # The language model of a larger one, say, which has a model type of its own.
    loaded, info = getattr(transformers, config.architectures[0]).from_pretrained(
        saved.folder,
        dtype=getattr(torch, saved.dtype),
        attn_implementation=saved.attn_implementation,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"weights do not fit: {info}")
    return loaded.to(saved.device).eval()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
