"""Sweeps and trainings that are killed at any moment, their files damaged in between, and gone on with: `soak.py`.

A sweep is run, killed with SIGKILL at random moments, a random file in its folder is cut, emptied, overwritten with
zeros, flipped in one bit or deleted, and the sweep is run to its end. Then its tables are those of a sweep that nothing
happened to, or the damage was named with its file; what is named is mended as the message says, and the tables are
those in the end. Trainings with callbacks are killed and resumed; their histories and weights are those of one that was
not.

Every run is a process of its own, forked from this one, which has imported what they need.
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from depthscope.callbacks import EffectivenessCallback, SparsityCallback, VarianceCallback, read_history
from depthscope.cli import app

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from models import random_blocks, tiny_llama
from runs import trainer
from sweeps import reported, write_sweep

__all__ = ["sweeps", "trainings"]

LONGEST = 300  # seconds that a run may take: a sweep of two points takes a few
MOST_KILLS = 4
MOST_RUNS = 6  # to the end, each after what the last one named was mended
POINTS = ("depth-L2-seed0", "depth-L3-seed0")
WORDS = ("damaged", "Unreadable", "cannot be read", "is not what", "Damaged")


class Violation(Exception):
    """Something that must not be: a wrong result, a process or a file left behind, damage that was not named."""


@contextlib.contextmanager
def _faults_counted(counts: Counter[str]) -> Iterator[None]:
    """Say what should not have happened, count it, and go on."""
    try:
        yield
    except Violation as violation:
        print(f"fault: {violation}", flush=True)
        counts["fault: a wrong end"] += 1


# ------------------------------------------------------------------------------------------------------------- faults


def _cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def _emptied(path: Path, chance: random.Random) -> None:
    os.truncate(path, 0)


def _zeroed(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def _flipped(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _gone(path: Path, chance: random.Random) -> None:
    path.unlink()


FAULTS: list[Callable[[Path, random.Random], None]] = [_cut, _emptied, _zeroed, _flipped, _gone]


def _damage(out: Path, chance: random.Random) -> tuple[Path, str] | None:
    """Damage one file in the folder of a sweep, and say which and how; None where there is none."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.stat().st_size)
    # Every part of a sweep as often as any other, however many files it has.
    parts: dict[str, list[Path]] = {}
    for path in files:
        inside = path.relative_to(out).parts
        key = "/".join([inside[0], *inside[2:3]]) if inside[0] == "points" else inside[0]
        parts.setdefault(key.partition("-")[0], []).append(path)
    if not parts:
        return None
    path = chance.choice(parts[chance.choice(sorted(parts))])
    fault = chance.choice(FAULTS)
    fault(path, chance)
    return path, fault.__name__.strip("_")


# -------------------------------------------------------------------------------------------------------------- runs


def _forked(function: Callable[..., None], *arguments: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def _end(process: Any, after: float | None) -> int:
    """Wait for a process, or kill it after so many seconds; its exit code, and none of its children is left."""
    children: list[psutil.Process] = []
    if after is not None:
        process.join(timeout=after)
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    process.join(timeout=LONGEST)
    if process.exitcode is None:
        process.kill()
        raise Violation(f"a run took more than {LONGEST} seconds")
    left = psutil.wait_procs(children, timeout=120)[1]  # they end when they have imported what they need
    if left:
        raise Violation(f"processes are left of a killed run: {left}")
    return int(process.exitcode)


def _command(arguments: list[str], said: Path) -> None:
    with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code: Any = 0
        try:
            app(arguments, standalone_mode=True)
        except SystemExit as done:
            code = done.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 70
        file.flush()
        os._exit(int(code))


# ------------------------------------------------------------------------------------------------------------- sweeps


def sweeps(seed: int, seconds: float) -> dict[str, int]:
    """Kill and damage sweeps for so many seconds; gives counts, of which those of `fault: ...` should be absent."""
    chance, counts = random.Random(seed), Counter[str]()
    # Workers and this process alike: with another number of threads the last digits are others.
    os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="depthscope-soak-") as place:
        folder = Path(place)
        sweep = write_sweep(folder)
        begun = time.monotonic()
        _run(sweep, folder / "whole", folder / "said", 1, None)
        length = time.monotonic() - begun
        whole = _came_to(folder / "whole")
        while time.monotonic() - begun < seconds:
            with _faults_counted(counts):
                _one_sweep(sweep, folder / "out", folder / "said", whole, length, chance, counts)
            shutil.rmtree(folder / "out", ignore_errors=True)
    return dict(counts)


def _one_sweep(
    sweep: Path,
    out: Path,
    said: Path,
    whole: dict[str, Any],
    length: float,
    chance: random.Random,
    counts: Counter[str],
) -> None:
    kills = chance.randrange(MOST_KILLS + 1)
    damaged_after = chance.randrange(kills + 2)  # of the kills, or of none
    story: list[str] = []
    damaged: Path | None = None
    jobs = chance.choice((1, 1, 1, 2))
    for kill in range(kills + 1):
        after = chance.uniform(0, length * (1.0 if jobs == 1 else 2.0)) if kill < kills else None
        if after is not None:
            code = _run(sweep, out, said, jobs, after)
            story.append(f"killed after {after:.2f} s ({code})")
            counts["sweeps killed"] += code == -signal.SIGKILL
        if kill == damaged_after and out.is_dir() and (done := _damage(out, chance)) is not None:
            damaged = done[0].relative_to(out)
            story.append(f"{damaged} {done[1]}")
            counts["files damaged"] += 1
    for _ in range(MOST_RUNS):
        code = _run(sweep, out, said, jobs, None)
        text = said.read_text(errors="replace")
        story.append(f"ended with {code}")
        if "Traceback" in text or code not in (0, 1, 2):
            raise Violation(f"{'; '.join(story)}: {text[-3000:]}")
        if code == 0:
            break
        if damaged is None or not any(word in text for word in WORDS) or not _is_named(damaged, text):
            raise Violation(f"{'; '.join(story)}: refused, and not for the damage: {text[-3000:]}")
        counts["damage named and refused"] += 1
        _mend(out, text)
    else:
        raise Violation(f"{'; '.join(story)}: it does not come to an end")
    if any(word in text for word in WORDS):
        counts["damage named and mended"] += 1
    found = _came_to(out)
    different = [name for name in whole if found.get(name) != whole[name]]
    if different:
        raise Violation(f"{'; '.join(story)}: another {', '.join(different)}; it said {text[-2000:]}")
    left = [str(path.relative_to(out)) for path in out.rglob("*") if _is_left_over(path)]
    if left:
        raise Violation(f"{'; '.join(story)}: left {', '.join(left)}")
    counts["sweeps that came to the same"] += 1


def _run(sweep: Path, out: Path, said: Path, jobs: int, after: float | None) -> int:
    arguments = ["sweep", "run", str(sweep), "--out", str(out), "--jobs", str(jobs)]
    return _end(_forked(_command, arguments, said), after)


def _came_to(out: Path) -> dict[str, Any]:
    """The tables and the page of a sweep, and its weights."""
    models = {str(path.relative_to(out)): load_file(path) for path in sorted(out.glob("points/*/model/*.safetensors"))}
    plain = {name: {key: tensor.tolist() for key, tensor in model.items()} for name, model in models.items()}
    return {**reported(out), **plain}


def _is_named(damaged: Path, text: str) -> bool:
    """Whether a message is about this file: by its name, or that of the folder that it is in."""
    return any(part in text for part in (damaged.name, *damaged.parts[1:]))


def _mend(out: Path, text: str) -> None:
    """What the messages say is to be deleted."""
    for place in (out / "data", *(out / "points" / point for point in POINTS)):
        if f"elete the folder {place} " in text:
            shutil.rmtree(place)
    for point in POINTS:
        folder = out / "points" / point
        if f"{point}/result.json" in text or f"Unreadable: {point}" in text:
            (folder / "result.json").unlink(missing_ok=True)
        if f"Damaged: {point}" in text and folder.is_dir():
            shutil.rmtree(folder)


def _is_left_over(path: Path) -> bool:
    return path.name.startswith("checkpoint-") or path.name.endswith((".tmp", ".part"))


# ---------------------------------------------------------------------------------------------------------- trainings


def trainings(seed: int, seconds: float) -> dict[str, int]:
    """Kill trainings with callbacks and go on with them, for so many seconds; gives counts as `sweeps` does."""
    chance, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="depthscope-soak-") as place:
        folder = Path(place)
        begun = time.monotonic()
        if _end(_forked(_train, folder / "whole", folder / "said"), None) != 0:
            raise Violation(f"a training failed: {(folder / 'said').read_text()}")
        length = time.monotonic() - begun
        whole = _trained(folder / "whole")
        while time.monotonic() - begun < seconds:
            with _faults_counted(counts):
                _one_training(folder / "out", folder / "said", whole, length, chance, counts)
            shutil.rmtree(folder / "out", ignore_errors=True)
    return dict(counts)


def _one_training(
    out: Path, said: Path, whole: dict[str, Any], length: float, chance: random.Random, counts: Counter[str]
) -> None:
    kills = 0
    while (code := _end(_forked(_train, out, said), chance.uniform(0, length) if kills < MOST_KILLS else None)) != 0:
        if code != -signal.SIGKILL:
            raise Violation(f"a training ended with {code}: {said.read_text()}")
        kills += 1
    counts["trainings killed"] += kills
    found = _trained(out)
    for name, value in whole.items():
        if found[name] != value:
            raise Violation(f"after {kills} kills a training has another {name}: {_different(found[name], value)}")
    counts["trainings that came to the same"] += 1


def _different(found: Any, expected: Any) -> str:
    """The first items of two lists that differ, or the names in two mappings."""
    if isinstance(found, dict):
        return ", ".join(key for key in {**found, **expected} if found.get(key) != expected.get(key))[:500]
    missing = [each for each in expected if each not in found]
    more = [each for each in found if each not in expected]
    return f"without {str(missing)[:800]}, with {str(more)[:800]}"


def _train(folder: Path, said: Path) -> None:
    callbacks = [
        VarianceCallback(moments_every=4),
        SparsityCallback(every=4),
        EffectivenessCallback(random_blocks(2, 12), scores="skip,block_influence", every=6, max_overhead=None),
    ]
    rhythm = {"max_steps": 24, "logging_steps": 5, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 3}
    with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            run = trainer(tiny_llama(), folder, callbacks, **rhythm)
            run.train(resume_from_checkpoint=next(_whole_checkpoints(folder), None))
        except BaseException:
            import traceback

            traceback.print_exc()
            file.flush()
            os._exit(70)
    os._exit(0)


def _whole_checkpoints(folder: Path) -> Iterator[str]:
    """The last checkpoint that the Trainer has finished; those that it had not are removed."""
    while folder.is_dir() and (found := get_last_checkpoint(str(folder))) is not None:
        with contextlib.suppress(OSError, ValueError):
            json.loads(Path(found, "trainer_state.json").read_text())
            yield found
            return
        shutil.rmtree(found)


def _trained(folder: Path) -> dict[str, Any]:
    # Of the last checkpoint: gone on from it, the Trainer takes one step more, which is no part of the run.
    last = load_file(folder / "checkpoint-24" / "model.safetensors")
    weights = {name: tensor.tolist() for name, tensor in last.items()}
    reports = sorted(path.name for path in (folder / "layer_reports").iterdir())
    return {"weights": weights, "history": read_history(folder), "reports": reports}
