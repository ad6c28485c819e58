"""Benchmarks run: what takes minutes or a GPU is tried at toy size."""

import subprocess
from pathlib import Path

from commands import python

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_lanes_are_timed_and_give_the_scores_of_passes_of_their_own() -> None:
    done = python(BENCHMARKS / "lanes.py", "--tiny", "--rounds", "1")
    assert not done.returncode, done.stderr
    row = done.stdout.splitlines()[-1].split(" | ")
    assert row[0] == "| toy"
    assert float(row[-1].removesuffix(" |")) < 1e-4


def test_the_script_for_a_gpu_can_be_read_by_bash() -> None:
    subprocess.run(["bash", "-n", BENCHMARKS / "gpu.sh"], check=True)
