"""The names of the files of a run and the states of a point; no other module lists them. No torch.

    SWEEP/sweep.yaml                  the specification; sweep.json, its points and families
    SWEEP/data/                       the tokens
    SWEEP/points/<point>/             one folder per point, which is a run:
        point.json                    its place in the grid, and its settings of training and measurement
        environment.json              versions, hardware, precision, attention, seconds
        checkpoint-<step>/            to continue from; its file `complete` is written last
        steps/step-<step>/            the weights at steps that are published
        model/                        the trained model
        log.jsonl                     losses, gradient norms and learning rates by step
        layer_stats.jsonl             what the callbacks measured
        layer_report.json             the scores of the trained model; untrained_report.json, before training
        checksums.json                of the finished files
        result.json                   status and held-out loss; written last

The output folder of a Trainer has checkpoints and `layer_stats.jsonl` too, and `trainer_state.json`.
"""

from pathlib import Path

__all__ = [
    "CHECKSUMS",
    "COMPLETE",
    "DATA",
    "DATA_PART",
    "DATA_RECORD",
    "DIVERGED",
    "EARLY_STEPS",
    "ENVIRONMENT",
    "FAILED",
    "FINISHED",
    "HISTORY",
    "LOG",
    "MODEL",
    "NOT_RUN",
    "POINT",
    "POINTS",
    "REPORTS",
    "RESULT",
    "SWEEP_FILE",
    "SWEEP_INDEX",
    "TRAINED_REPORT",
    "TRAINER_STATE",
    "UNFINISHED",
    "UNREADABLE",
    "UNTRAINED_REPORT",
    "checkpoint_folder",
    "checkpoints",
    "is_published",
    "point_folder",
    "published_steps",
    "step_folder",
]

SWEEP_FILE, SWEEP_INDEX = "sweep.yaml", "sweep.json"
DATA, DATA_PART, DATA_RECORD = "data", "data.part", "data.json"  # DATA_PART while they are written
POINTS = "points"

POINT, RESULT, ENVIRONMENT, CHECKSUMS = "point.json", "result.json", "environment.json", "checksums.json"
LOG, HISTORY = "log.jsonl", "layer_stats.jsonl"
TRAINED_REPORT, UNTRAINED_REPORT = "layer_report.json", "untrained_report.json"
REPORTS = {TRAINED_REPORT: True, UNTRAINED_REPORT: False}  # by whether the model is trained
MODEL = "model"
STEPS, STEP, CHECKPOINT = "steps", "step-", "checkpoint-"
COMPLETE = "complete"  # in a checkpoint
TRAINER_STATE = "trainer_state.json"

# The states in a result; and the states of a point without a readable result.
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
UNREADABLE, UNFINISHED, NOT_RUN = "unreadable", "unfinished", "not run"

EARLY_STEPS = (0, *(2**power for power in range(10)))  # 0, 1, 2, 4, ..., 512
MOST_DIGITS = 15  # of a step


def is_published(step: int, every: int) -> bool:
    """Whether the weights at a step are published: at the early steps, and then at every `every`-th."""
    return step in EARLY_STEPS or (step > EARLY_STEPS[-1] and step % every == 0)


def point_folder(sweep: Path, point: str) -> Path:
    """The folder of a point of a sweep."""
    return sweep / POINTS / point


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of a checkpoint to continue from."""
    return run / f"{CHECKPOINT}{step}"


def step_folder(run: Path, step: int) -> Path:
    """The folder of the published weights of a step."""
    return run / STEPS / f"{STEP}{step}"


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run, by step, in order."""
    return _numbered(run, CHECKPOINT)


def published_steps(run: Path) -> dict[int, Path]:
    """The folders of published weights of a run, by step, in order."""
    return _numbered(run / STEPS, STEP)


def _numbered(folder: Path, prefix: str) -> dict[int, Path]:
    names = {path: path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*")}
    numbered = {int(name): path for path, name in names.items() if name.isdecimal() and len(name) <= MOST_DIGITS}
    return dict(sorted(numbered.items()))
