"""Estimated losses of changed models beside exact ones, in one run: time, standard errors, differences.

    python benchmarks/losses.py                                      # SmolLM2-135M
    python benchmarks/losses.py --model gemma-3-270m.gguf --rounds 2

Seconds are of the processor. A difference is told in standard errors of the exact value.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from depthscope import LayerReport, analyze
from depthscope.loading.load import load_model
from depthscope.report.measures import SCORE_NAMES
from smollm2 import gguf_path

COLUMNS = ("skip_ratio", "usefulness_ratio", "permutation")


def measured(exact: bool, options: dict[str, Any]) -> tuple[float, LayerReport]:
    """The seconds of an analysis, and its report."""
    start = time.process_time()
    report = analyze(exact_losses=exact, progress=False, **options)
    return time.process_time() - start, report


def column(report: LayerReport, name: str) -> np.ndarray:
    """A number of all layers, [L]."""
    return np.array([row[name] for row in report.layers], dtype=float)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(gguf_path()), help="a name, a folder or a .gguf file")
    parser.add_argument("--text", help="a text file; by default the standard library's own source")
    parser.add_argument("--scores", default=",".join(name for name in SCORE_NAMES if name != "permutation"))
    parser.add_argument("--fit-blocks", type=int, default=16)
    parser.add_argument("--eval-blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(arguments.model)
    options: dict[str, Any] = {
        "model": loaded.model,
        "tokenizer": loaded.tokenizer,
        "text": arguments.text,
        "scores": arguments.scores,
        "fit_blocks": arguments.fit_blocks,
        "eval_blocks": arguments.eval_blocks,
    }
    seconds: dict[bool, list[float]] = {True: [], False: []}
    reports: dict[bool, LayerReport] = {}
    for _ in range(arguments.rounds):
        for exact, times in seconds.items():
            taken, reports[exact] = measured(exact, options)
            times.append(taken)
    console = Console()
    estimated, exact_time = (np.median(seconds[each]) for each in (False, True))
    console.print(f"estimated {estimated:.1f} s, exact {exact_time:.1f} s: {estimated / exact_time:.2f}")
    console.print(next((note for note in reversed(reports[False].notes) if "estimated" in note), "(not estimated)"))
    table = Table("score", "errors, median", "largest", "differences in errors, root mean square", "largest")
    for name in COLUMNS:
        if name in reports[True].layers[0]:
            errors = column(reports[True], f"{name}_se")
            ratios = column(reports[False], f"{name}_se") / errors
            away = (column(reports[False], name) - column(reports[True], name)) / errors
            far = np.sqrt(np.nanmean(np.square(away)))
            table.add_row(
                name,
                *(
                    f"{number:.3f}"
                    for number in (np.nanmedian(ratios), np.nanmax(ratios), far, np.nanmax(np.abs(away)))
                ),
            )
    console.print(table)


if __name__ == "__main__":
    main()
