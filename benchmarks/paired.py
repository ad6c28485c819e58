"""The time of depthscope's commands with this source tree and with another, in alternation, as ratios.

    git worktree add /tmp/before COMMIT
    python benchmarks/paired.py /tmp/before/src -- scores
    python benchmarks/paired.py /tmp/before/src --times 5 -- show report.json

Of each command the first two runs (one of each tree) are not counted: Python compiles what it imports. Seconds are of
the processor, of the process and its children; wall-clock time stands beside them.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parents[1] / "src"


@dataclass(frozen=True)
class Timing:
    """What one run took."""

    processor: float  # seconds
    wall: float


def run(source: Path, command: list[str]) -> Timing:
    """Run a command of depthscope from a source tree."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "depthscope", *command], env=environment, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{source}: {' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return Timing(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall)


def main() -> None:
    """Time both trees and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, help="the other source tree, its folder src")
    parser.add_argument("--times", type=int, default=3, help="runs of each that count")
    parser.add_argument("command", nargs="+", help="of depthscope, after --")
    given = parser.parse_args()
    trees = {"before": given.before.resolve(), "now": HERE.resolve()}
    timings: dict[str, list[Timing]] = {name: [] for name in trees}
    for _ in range(given.times + 1):
        for name, source in trees.items():
            timings[name].append(run(source, given.command))
    table = Table("depthscope " + " ".join(given.command), "processor", "wall", box=None)
    middle = {}
    for name, found in timings.items():
        middle[name] = Timing(*(median(getattr(each, of) for each in found[1:]) for of in ("processor", "wall")))
        table.add_row(name, f"{middle[name].processor:.2f} s", f"{middle[name].wall:.2f} s")
    ratios = [getattr(middle["now"], of) / getattr(middle["before"], of) for of in ("processor", "wall")]
    table.add_row("ratio", *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)


if __name__ == "__main__":
    main()
