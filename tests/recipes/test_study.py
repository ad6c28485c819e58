"""Wherever the study's numbers are told, they are those of its results (benchmarks/study/results.csv)."""

import json
from pathlib import Path

import pandas as pd
import pytest

from depthscope.recipes.evidence import SMALL_MODELS

ROOT = Path(__file__).parents[2]
DEPTHS = ["depth-L4", "depth-L8", "depth-L16", "depth-L32"]
# The names of the Space's scores -> the columns of the results.
COLUMNS = {
    "loss": "loss",
    "variance": "variance_last",
    "usefulness": "usefulness",
    "causal": "causal",
    "permutation": "permutation",
}


@pytest.fixture(scope="module")
def variants():
    """The results, grouped by what differs but for the seed."""
    results = pd.read_csv(ROOT / "benchmarks" / "study" / "results.csv")
    assert len(results) == 30
    assert set(results.status) == {"finished"}
    return results.groupby("variant")


def test_the_space_draws_the_means_over_seeds(variants) -> None:
    results = ROOT / "spaces" / "layer_effectiveness" / "page" / "results"
    drawn = json.loads((results / "depth_sweep.json").read_text())["ours"]
    assert [point["layers"] for point in drawn] == [4, 8, 16, 32]
    for variant, point in zip(DEPTHS, drawn, strict=True):
        for score, column in COLUMNS.items():
            of_seeds = variants.get_group(variant)[column]
            assert point["scores"][score] == pytest.approx(of_seeds.mean(), rel=2e-3)
            assert point["scores"].get(f"{score}_se", 0) == pytest.approx(of_seeds.sem(), rel=0.05)


def test_the_recipe_quotes_the_losses(variants) -> None:
    losses = variants.loss.mean()
    quoted = {
        "depth": DEPTHS,
        "sequence length": ["depth-L16", "length-T256"],
        "weight decay": ["decay-wd0", "depth-L16", "decay-wd1"],
        "GQA groups": ["depth-L16", "gqa-kv1"],
        "experts": ["depth-L16", "moe"],
        "norms": ["depth-L16", "lns"],
    }
    for choice, names in quoted.items():
        for name in names:
            assert f"{losses[name]:.3f}" in SMALL_MODELS[choice].text


def test_the_study_gives_each_loss_with_its_spread(variants) -> None:
    text = (ROOT / "docs" / "study.md").read_text()
    assert len(variants) == 10
    for _, seeds in variants:
        assert f"{seeds.loss.mean():.3f} ± {seeds.loss.std():.3f}" in text


def test_the_study_tells_the_depths_on_pythons_source_as_they_were_measured() -> None:
    text = (ROOT / "docs" / "study.md").read_text().partition("## The same on Python's own source")[2]
    results = pd.read_csv(ROOT / "benchmarks" / "study" / "results-python.csv")
    assert set(results.status) == {"finished"}
    depths = results.groupby("variant")
    assert set(depths.groups) == set(DEPTHS)
    for column, digits in {"loss": 3, "variance_growth": 2, "causal": 3, "permutation": 3, "jacobian_last": 3}.items():
        means, spreads = depths[column].mean(), depths[column].std()
        told = [f"{means[depth]:.{digits}f} ± {spreads[depth]:.{digits}f}" for depth in DEPTHS]
        assert f"| {' | '.join(told)} |" in text
    assert f"| {' | '.join(str(len(depths.get_group(depth))) for depth in DEPTHS)} |" in text


def test_the_study_tells_the_other_axes_on_pythons_source_as_they_were_measured() -> None:
    text = (ROOT / "docs" / "study.md").read_text().partition("## The same on Python's own source")[2]
    results = pd.read_csv(ROOT / "benchmarks" / "study" / "results-python-axes.csv").set_index("variant")
    assert set(results.status) == {"finished"}
    told = results.loc[["depth-L16", "lns", "decay-wd0", "decay-wd1", "gqa-kv1", "moe", "length-T256"]]
    assert len(told) == len(results)
    for column, digits in {"loss": 3, "variance_growth": 2, "causal": 3, "permutation_no0": 4}.items():
        assert f"| {' | '.join(f'{value:.{digits}f}' for value in told[column])} |" in text
    for column in ("linearise_excess_sum_no0", "skip_excess_sum_no0"):
        assert f"| {' | '.join(f'{100 * value:.1f}%' for value in told[column])} |" in text
