"""Saving a cut model: a folder that every tool loads, which appears only when a fresh process has loaded it rightly."""

from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthscope.console.quiet import quiet
from depthscope.errors import SettingsError, SurgeryError
from depthscope.files.atomic import reason
from depthscope.files.new_folder import new_folder
from depthscope.layers.compiled import class_name, written
from depthscope.layers.modes import evaluating
from depthscope.layers.tracing import MODEL_FAILURES, run
from depthscope.surgery.cutting import cut_out, find_layers
from depthscope.surgery.kept import require_kept
from depthscope.surgery.proof import (
    NEW_TOKENS,
    Proof,
    prove_decoding,
    prove_logits,
    relative_difference,
    require_ids,
    rounding_notes,
)
from depthscope.surgery.reload import Saved, reloaded_logits
from depthscope.wording.messages import listed
from depthscope.wording.numeric import require_whole

__all__ = ["prove_saved", "require_new", "save_cut", "save_proved"]


def save_cut(
    model: nn.Module,
    kept: Iterable[int],
    folder: str | PathLike[str],
    tokenizer: Any = None,
    *,
    ids: Tensor | None = None,
    new_tokens: int = NEW_TOKENS,
) -> Proof:
    """Cut a model and save what remains, with the tokenizer; nothing is written that was not proved.

    Args:
        model: as for [`cut`].
        kept: as for [`cut`].
        folder: the folder to write; it must not exist, or be empty.
        tokenizer: the model's tokenizer, to save beside it.
        ids: token ids [B, T] to compare logits on; some of the vocabulary by default.
        new_tokens: tokens to decode with and without a cache.

    Raises:
        SurgeryError: as for [`cut`]; or decoding with a cache differs, or the saved model does not load in a fresh
            process, or has other logits there; or the folder cannot be written.
        SettingsError: as for [`cut`]; or the folder, tokenizer, ids or number of tokens are none.
        NoLayerStackError: as for [`cut`].
        NonFiniteError: as for [`cut`].
    """
    out = require_new(folder)
    stack = find_layers(model)
    layers = require_kept(kept, stack.num_layers)
    ids, new_tokens = require_ids(stack, ids), require_whole("new_tokens", new_tokens, least=0)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise SettingsError(
            f"{type(tokenizer).__name__} is not a tokenizer of transformers; give one, or leave it out."
        )
    if type(written(model)).__module__.split(".")[0] == "transformers_modules":
        raise SurgeryError(
            f"{class_name(model)} is code from the model's repository, which the process that proves what was saved "
            "does not run. cut(model, kept) gives the cut model in memory."
        )
    small = cut_out(stack, layers)
    with quiet():
        difference, tolerance = prove_logits(stack, small, layers, ids)
        decoded, notes = prove_decoding(model, small, new_tokens)
    notes = (*rounding_notes(stack, small, layers), *notes)
    return save_proved(small, out, Proof(difference, tolerance, decoded, notes=notes), ids, tokenizer)


def save_proved(small: Any, folder: Path, proof: Proof, ids: Tensor, tokenizer: Any = None) -> Proof:
    """Save a model that was proved in memory; the folder appears when a fresh process has given the same logits.

    Raises:
        SurgeryError: it did not, or the folder cannot be written.
    """
    with new_folder(folder, SurgeryError) as temporary:
        with quiet():
            small.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        [reloaded] = prove_saved([(small, temporary, ids, proof.tolerance)])
        if isinstance(reloaded, str):
            raise SurgeryError(f"{reloaded} Nothing was written.")
    return replace(proof, reloaded=reloaded)


def prove_saved(models: Iterable[tuple[Any, Path, Tensor, float]]) -> list[float | str]:
    """Load saved models in one fresh process and compare their logits with those in memory.

    Args:
        models: each model with its folder, token ids [B, T], and the largest difference beside the largest logit.

    Returns:
        For each the difference, or what is wrong.
    """
    models = list(models)
    saved = [Saved(str(folder.resolve()), *_choices(small)) for small, folder, _, _ in models]
    found: list[float | str] = []
    answers = reloaded_logits(saved, [ids for _, _, ids, _ in models])
    for (small, folder, ids, tolerance), logits in zip(models, answers, strict=True):
        if isinstance(logits, str):
            found.append(f"The saved {class_name(small)} does not load in a fresh process ({logits}).")
            continue
        with evaluating(small), torch.no_grad():
            difference = relative_difference(logits, run(small, ids).logits)
        if difference <= tolerance:
            found.append(difference)
        else:
            found.append(
                f"The saved {class_name(small)} has other logits in a fresh process: they differ by {difference:.1g} "
                f"of the largest, {tolerance:.1g} is allowed{_changed_by_loading(small, folder)}."
            )
    return found


def _changed_by_loading(small: Any, folder: Path) -> str:
    """The weights that the model's class does not load as they were saved, in words."""
    with quiet():
        try:
            loaded = type(small).from_pretrained(folder, dtype=small.dtype).state_dict()
        except (*MODEL_FAILURES, OSError):
            return ""
    saved = small.state_dict()
    names = [name for name in saved if name not in loaded or not torch.equal(loaded[name], saved[name].cpu())]
    return f"; its class changes {listed(names)} when it loads them" if names else ""


def _choices(model: Any) -> tuple[str, str, str | None]:
    """The dtype, device and attention that a model runs with here."""
    attention = getattr(model.config, "_attn_implementation", None)
    return str(model.dtype).removeprefix("torch."), str(model.device), attention


def require_new(folder: str | PathLike[str]) -> Path:
    """Refuse a folder that has something in it.

    Raises:
        SurgeryError: it has, or cannot be looked into.
        SettingsError: it is no path.
    """
    if not isinstance(folder, str | PathLike) or not str(folder):
        raise SettingsError(f"{folder!r} is not the path of a folder; give one as a string or a Path.")
    out = Path(folder)
    try:
        is_new = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise SurgeryError(f"cannot write {str(out)!r}: {reason(error)}.") from error
    if not is_new:
        raise SurgeryError(f"{str(out)!r} exists already; give the name of a new folder.")
    return out
