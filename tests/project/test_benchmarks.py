"""Benchmarks run: what takes minutes or a GPU is tried at toy size."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CAPTURED: dict[str, Any] = {"capture_output": True, "text": True}


def test_the_script_for_a_gpu_runs_at_toy_size_without_one() -> None:
    script = BENCHMARKS / "gpu.sh"
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script, "--cpu"], env={**os.environ, "PYTHON": sys.executable}, **CAPTURED)
    assert not done.returncode, done.stdout + done.stderr
    assert "| llama | 0.0e+00 |" in done.stdout, "the CPU gives what the CPU gives"
    assert "layers in host memory" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("| toy |")).split(" | ")
    assert float(row[-1].removesuffix(" |")) < 1e-4, "lanes are timed and give the scores of passes of their own"
