"""Reading a sweep: its records, the numbers that are derived, tables, words, figures and the page.

The models of the sweep are tiny DepthLMs that are really analysed; only their training is made up, as files of the form
that a training writes. One test trains a real sweep.
"""

import csv
import io
import json
import math
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from depthlm import random_ids, tiny_depthlm
from depthscope.analysis.analyze import analyze_blocks
from depthscope.errors import ReportError, SweepError
from depthscope.layers.facts import model_facts
from depthscope.report.report import LayerReport
from depthscope.settings import Settings
from depthscope.sweep.report.derived import COLUMNS, SCORES
from depthscope.sweep.report.families import cell, lay_out
from depthscope.sweep.report.figures import layer_figures, paper_panels, score_panels, training_figures
from depthscope.sweep.report.page import render_sweep_page, write_report
from depthscope.sweep.report.paper import direction, paper_series
from depthscope.sweep.report.results import SweepResults, load_results
from depthscope.sweep.report.tables import control_table, main_table, print_results, result_rows, to_csv, to_markdown
from depthscope.sweep.report.words import Change, family_words, status_lines
from depthscope.text.blocks import Blocks
from html_page import EVIL, Page

FILES = ("results.csv", "results.parquet", "layers.parquet", "tables.md", "sweep.html")
BATCH = 1024
SETTINGS = Settings(
    scores=("variance", "block_influence", "update", "skip", "causal", "usefulness", "permutation", "jacobian"),
    fit_blocks=4,
    eval_blocks=3,
    block_size=16,
    probes=2,
)
# Variants: what the grid says, and the tiny DepthLM that stands for the trained model.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "depth-L2": ({"num_hidden_layers": 2}, {"num_hidden_layers": 2}),
    "depth-L4": ({"num_hidden_layers": 4}, {"num_hidden_layers": 4}),
    "scaling-L2-depth": (
        {"num_hidden_layers": 2, "norm_scaling": "depth"},
        {"num_hidden_layers": 2, "norm_scaling": "depth"},
    ),
    "scaling-L4-depth": (
        {"num_hidden_layers": 4, "norm_scaling": "depth"},
        {"num_hidden_layers": 4, "norm_scaling": "depth"},
    ),
    "decay-wd0": ({"weight_decay": 0}, {"num_hidden_layers": 4}),
    "sparse-moe": (
        {"num_experts": 8, "num_experts_per_tok": 2},
        {"kind": "moe", "num_hidden_layers": 4},
    ),
    "placement-post": ({"norm_placement": "post"}, {"kind": "post", "num_hidden_layers": 4}),
}
FAMILIES = [
    {"name": "depth", "variants": ["depth-L2", "depth-L4"], "axes": ["num_hidden_layers"]},
    {
        "name": "scaling",
        "variants": ["depth-L2", "scaling-L2-depth", "depth-L4", "scaling-L4-depth"],
        "axes": ["num_hidden_layers", "norm_scaling"],
    },
    {"name": "decay", "variants": ["depth-L4", "decay-wd0"], "axes": ["weight_decay"]},
    {"name": "sparse", "variants": ["depth-L4", "sparse-moe"], "axes": ["num_experts", "num_experts_per_tok"]},
    {"name": "placement", "variants": ["depth-L4", "placement-post"], "axes": ["norm_placement"]},
]


def analysed(name: str, seed: int, changes: dict[str, Any]) -> LayerReport:
    model = tiny_depthlm(seed=seed, **changes)
    blocks = Blocks.from_ids(random_ids(7, 16), name="random", special_ids=[])
    facts = model_facts(model) | {"name": name, "source": "sweep"}
    return analyze_blocks(model, blocks, SETTINGS, facts=facts, progress=False)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))


def write_point(folder: Path, name: str, variant: str, seed: int, place: int) -> None:
    folder.mkdir(parents=True)
    settings, changes = VARIANTS[variant]
    trained, untrained = (analysed(name, start + seed, changes) for start in (10, 50))
    trained.save(folder / "layer_report.json")
    untrained.save(folder / "untrained_report.json")
    write_json(
        folder / "result.json",
        {
            "point": name,
            "variant": variant,
            "seed": seed,
            "settings": settings,
            "status": "finished",
            "parameters": 1000 + place,
            "active_parameters": 900 + place,
            "flops": 10**15 * (place + 1),
            "loss": 3.0 + place / 10 + seed / 100,
            "loss_se": 0.02 + place / 1000,
            "untrained_loss": 4.5 + seed / 100,
        },
    )
    write_json(folder / "environment.json", {"versions": {"torch": "2.13.0"}, "threads": 1, "seconds": 71.25})
    steps = range(1, 5)
    losses = [{"loss": 4.5 - step / 4, "step": step, "epoch": 1.0} for step in steps]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in losses))
    columns = {step: [value * step for value in trained.column("variance") if value is not None] for step in steps}
    rows = [{"step": step, "kind": "variance", "values": {}, "layers": {"variance": columns[step]}} for step in steps]
    (folder / "layer_stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_sweep(root: Path, seeds: tuple[int, ...] = (0, 1)) -> Path:
    """The folder of a sweep whose models are tiny and whose trainings are made up."""
    points = []
    for seed in seeds:
        for place, (variant, (settings, changes)) in enumerate(VARIANTS.items()):
            name = f"{variant}-seed{seed}"
            model = {"hidden_size": 32} | {key: value for key, value in changes.items() if key != "kind"}
            model |= {key: value for key, value in settings.items() if key != "weight_decay"}
            training = {"tokens": 4 * BATCH + 7, "batch_tokens": BATCH, "weight_decay": 0.1}
            training |= {key: value for key, value in settings.items() if key == "weight_decay"}
            points.append(
                {
                    "point": name,
                    "variant": variant,
                    "seed": seed,
                    "settings": settings,
                    "model": model,
                    "training": training,
                }
            )
            write_point(root / "points" / name, name, variant, seed, place)
    index = {
        "schema_version": 1,
        "name": "tiny",
        "description": "Tiny models.",
        "families": FAMILIES,
        "points": points,
        "seeds": list(seeds),
        "block_size": 16,
        "data": {"name": "random", "fingerprint": "0123abcd", "vocab_size": 96},
    }
    write_json(root / "sweep.json", index)
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("sweep") / "tiny")


@pytest.fixture(scope="module")
def results(made: Path) -> SweepResults:
    return load_results(made)


@pytest.fixture(scope="module")
def page(results: SweepResults) -> Page:
    return Page(render_sweep_page(results))


@pytest.fixture(scope="module")
def written(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(made, tmp_path_factory.mktemp("report"))[0].parent


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the sweep, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def family(results: SweepResults, name: str) -> Any:
    return next(family for family in results.families if family.name == name)


def keep(folder: Path, *names: str) -> Path:
    """Leave only some families in the index: less to draw."""
    families = [family for family in FAMILIES if family["name"] in names]
    change_json(folder / "sweep.json", families=families)
    return folder


def change_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


# ------------------------------------------------------------------------------------------------------------- records


def test_every_point_is_read_in_the_order_of_the_sweep(made: Path, results: SweepResults) -> None:
    index = json.loads((made / "sweep.json").read_text())
    assert [point.name for point in results.points] == [point["point"] for point in index["points"]]
    assert {point.status for point in results.points} == {"finished"}
    assert [point.seed for point in results.of_variant("depth-L4")] == [0, 1]


def test_curves_are_over_tokens(results: SweepResults) -> None:
    point = results.points[0]
    assert point.losses.tokens == [BATCH, 2 * BATCH, 3 * BATCH, 4 * BATCH]
    assert point.losses.values == [4.25, 4.0, 3.75, 3.5]
    assert point.variances.tokens == point.losses.tokens
    assert point.report is not None
    assert point.variances.values[1] == [2 * value for value in point.report.column("variance") if value is not None]
    assert point.tokens == 4 * BATCH


def test_a_setting_that_a_point_does_not_name_has_its_default(results: SweepResults) -> None:
    point = results.of_variant("decay-wd0")[0]
    assert point.setting("norm_placement") == "pre"
    assert point.setting("weight_decay") == 0
    assert results.of_variant("depth-L4")[0].setting("weight_decay") == 0.1
    assert point.setting("num_experts_per_tok") is None  # it has no experts


def test_what_is_not_finished_is_named_and_the_others_are_shown(folder: Path) -> None:
    points = keep(folder, "depth", "sparse") / "points"
    shutil.rmtree(points / "depth-L2-seed1")
    (points / "decay-wd0-seed1" / "result.json").unlink()
    change_json(points / "depth-L4-seed1" / "result.json", status="diverged", loss=None)
    change_json(points / "scaling-L2-depth-seed0" / "result.json", status="failed", error="OutOfMemory: too large")
    (points / "sparse-moe-seed0" / "layer_report.json").write_text('{"schema_version": 1, "cre')
    results = load_results(folder)
    status = {point.name: point.status for point in results.points}
    assert status["depth-L2-seed1"] == "not run"
    assert status["decay-wd0-seed1"] == "unfinished"
    assert status["depth-L4-seed1"] == "diverged"
    assert status["scaling-L2-depth-seed0"] == "failed"
    assert status["sparse-moe-seed0"] == "unreadable"
    assert list(status.values()).count("finished") == len(status) - 5
    damaged = next(point for point in results.points if point.status == "unreadable")
    assert "is not JSON" in damaged.reason
    assert str(folder) not in damaged.reason
    said = " ".join(status_lines(results))
    assert f"{len(status) - 5} of {len(status)} points are finished" in said
    assert "Diverged (losses or activations were not finite): depth-L4-seed1." in said
    shown = Page(render_sweep_page(results))
    assert "OutOfMemory: too large" in shown.text
    for name in status:
        assert name in shown.text
    assert cell(results, "depth-L4", "loss").seeds == 1
    assert all((path.stat().st_size > 0) for path in write_report(folder))
    assert "Failed: scaling-L2-depth-seed0." in (folder / "report" / "tables.md").read_text()


def test_each_reason_of_a_failure_is_told_once_with_its_points(folder: Path) -> None:
    points = keep(folder, "depth") / "points"
    for name, error in (
        ("depth-L2-seed0", "OutOfMemory: too large."),
        ("depth-L4-seed0", "ValueError: no."),
        ("depth-L2-seed1", "OutOfMemory: too large."),
    ):
        change_json(points / name / "result.json", status="failed", error=error)
    assert status_lines(load_results(folder))[1:] == [
        "Failed: depth-L2-seed0, depth-L2-seed1. OutOfMemory: too large.",
        "Failed: depth-L4-seed0. ValueError: no.",
    ]


def test_a_sweep_of_which_nothing_is_done_still_has_a_report(folder: Path) -> None:
    shutil.rmtree(folder / "points")
    assert [path.name for path in write_report(folder)] == list(FILES)
    assert "0 of 14 points are finished" in (folder / "report" / "tables.md").read_text()
    assert pq.read_table(folder / "report" / "layers.parquet").num_rows == 0
    print_results(load_results(folder), Console(file=io.StringIO(), width=80))


def test_a_folder_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"is not a folder; expected the folder that depthscope sweep run wrote"):
        load_results(tmp_path / "none")
    with pytest.raises(SweepError, match=r"a folder without sweep\.json"):
        load_results(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"points": []}, "points"),
        ({"families": [{"name": "depth", "variants": ["other"], "axes": []}]}, "which no point has"),
        ({"families": [{"name": "<b>", "variants": ["depth-L2"], "axes": []}]}, r"families\.0\.name"),
    ],
)
def test_a_damaged_index_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_json(folder / "sweep.json", **changes)
    with pytest.raises(SweepError, match=message):
        load_results(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"points": NaN}', "\x00"])
def test_an_index_that_is_no_json_is_refused(folder: Path, content: str) -> None:
    (folder / "sweep.json").write_text(content)
    with pytest.raises(SweepError, match=r"sweep\.json.*[Rr]un the sweep again|run the sweep again"):
        load_results(folder)


@pytest.mark.parametrize("name", ["../../etc", "/etc", "a/b", "", ".."])
def test_a_name_cannot_lead_out_of_the_folder(folder: Path, name: str) -> None:
    index = json.loads((folder / "sweep.json").read_text())
    index["points"][0]["point"] = name
    write_json(folder / "sweep.json", index)
    with pytest.raises(SweepError, match=r"points\.0\.point"):
        load_results(folder)


def test_values_that_are_no_numbers_leave_gaps_in_the_curves(folder: Path) -> None:
    point = keep(folder, "depth") / "points" / "depth-L2-seed0"
    (point / "log.jsonl").write_text('{"loss": null, "step": 1}\n{"loss": 2.0, "step": 2}\n{"eval": 1}\n')
    rows = [{"step": 1, "layers": {"variance": [1.0, None]}}, {"step": 2, "layers": {"variance": ["x", 10**400]}}]
    (point / "layer_stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_results(folder).points[0]
    assert read.losses.values == [None, 2.0]
    assert read.variances.values == [[1.0, None], [None, None]]
    render_sweep_page(load_results(folder))


def test_numbers_beyond_measure_are_refused_or_survived(folder: Path) -> None:
    points = keep(folder, "depth") / "points"
    change_json(points / "depth-L2-seed0" / "result.json", loss=1e300)
    change_json(points / "depth-L2-seed1" / "result.json", loss=1e99, flops=10**90)
    for seed in (0, 1):
        path = points / f"depth-L4-seed{seed}" / "layer_report.json"
        content = json.loads(path.read_text())
        content["layers"][0]["variance"], content["layers"][-1]["variance"] = 1e-320, 1e100
        content["layers"][1]["skip_ratio"] = (-1) ** seed * 1e100
        write_json(path, content)
    results = load_results(folder)
    assert results.points[0].status == "unreadable"
    assert "loss" in results.points[0].reason
    assert results.of_variant("depth-L4")[0].numbers["variance_growth"] is None
    print_results(results, Console(file=io.StringIO(), width=80))
    write_report(folder)


# ------------------------------------------------------------------------------------------------------ derived numbers


def recomputed(path: Path) -> dict[str, float | None]:
    """The derived numbers out of the JSON of a report, one loop after the other."""
    content = json.loads(path.read_text())
    layers, pairs = content["layers"], content["pairs"]
    count = len(layers)
    found: dict[str, float | None] = {
        "variance_first": layers[0]["variance"],
        "variance_last": layers[count - 1]["variance"],
        "variance_growth": layers[count - 1]["variance"] / layers[0]["variance"],
        "variance_later_share": 1 - layers[0]["variance"] / layers[count - 1]["variance"],
        "jacobian_first": layers[0]["jacobian"],
        "jacobian_last": layers[count - 1]["jacobian"],
    }
    for threshold, name in ((1.1, "usefulness"), (1.01, "usefulness_at_1.01")):
        found[name] = sum(1 for row in layers if row["usefulness_ratio"] > threshold) / count
    for prefix, score, less in (
        ("linearise_excess", "usefulness_ratio", 1),
        ("skip_excess", "skip_ratio", 1),
        ("jacobian", "jacobian", 0),
        ("block_influence", "block_influence", 0),
    ):
        for first, suffix in ((0, ""), (1, "_no0")):
            total = 0.0
            for layer in range(first, count):
                total += layers[layer][score] - less
            found[f"{prefix}_sum{suffix}"] = total
            found[f"{prefix}_mean{suffix}"] = total / (count - first)
    for name in ("causal", "permutation"):
        for first, suffix in ((0, ""), (1, "_no0")):
            cells = [pairs[name][i][j] for i in range(first, count) for j in range(i + 1, count)]
            found[f"{name}{suffix}"] = sum(cells) / len(cells) if cells else None
    for way, score in (("skip", "skip_ratio"), ("linear", "usefulness_ratio")):
        rises = [max(row[score] - 1, 0) for row in layers]
        squares = sum(rise * rise for rise in rises)
        found[f"effective_depth_{way}"] = sum(rises) ** 2 / squares if squares else 0.0
    return found


def test_every_derived_number_is_what_its_formula_says(made: Path, results: SweepResults) -> None:
    for point in results.points:
        trained = recomputed(made / "points" / point.name / "layer_report.json")
        control = recomputed(made / "points" / point.name / "untrained_report.json")
        assert set(trained) == {score.name for score in SCORES}
        for name, value in trained.items():
            before = control[name]
            assert point.numbers[name] == (None if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)), name
            if value is None or before is None:
                assert point.numbers[f"gain_{name}"] is None
            else:
                assert point.numbers[f"untrained_{name}"] == pytest.approx(before, rel=1e-9, abs=1e-12), name
                assert point.numbers[f"gain_{name}"] == pytest.approx(value - before, rel=1e-6, abs=1e-12), name


def test_sizes_and_losses_are_those_of_the_result(results: SweepResults) -> None:
    numbers = results.points[1].numbers
    assert numbers["parameters"] == 1001
    assert numbers["active_parameters"] == 901
    assert numbers["flops"] == 2 * 10**15
    assert numbers["tokens"] == 4 * BATCH
    assert numbers["loss"] == 3.1
    assert numbers["perplexity"] == pytest.approx(math.exp(3.1))
    assert numbers["gain_loss"] == pytest.approx(3.1 - 4.5)
    assert numbers["loss_se"] == 0.021
    assert numbers["perplexity_se"] == pytest.approx(math.exp(3.1) * 0.021)


def test_a_result_without_the_error_of_its_loss_does_not_take_that_of_the_report(folder: Path) -> None:
    path = folder / "points" / "depth-L2-seed0" / "result.json"
    write_json(path, {key: value for key, value in json.loads(path.read_text()).items() if key != "loss_se"})
    point = load_results(folder).points[0]
    assert point.report is not None
    assert point.report.scores["loss_se"] is not None
    assert (point.numbers["loss"], point.numbers["loss_se"], point.numbers["perplexity_se"]) == (3.0, None, None)


def test_the_error_of_a_mean_over_layers_is_no_less_than_if_layers_were_independent(results: SweepResults) -> None:
    point = results.points[1]
    assert point.report is not None
    errors = [error for error in point.report.column("skip_ratio_se")[1:] if error is not None]
    bound = point.numbers["skip_excess_mean_no0_se"]
    assert bound == pytest.approx(sum(errors) / len(errors))
    assert bound >= math.sqrt(sum(error**2 for error in errors)) / len(errors)


def test_a_model_without_a_score_has_no_number(folder: Path) -> None:
    path = folder / "points" / "depth-L2-seed0" / "layer_report.json"
    content = json.loads(path.read_text())
    for row in content["layers"]:
        row.pop("jacobian")
    content["pairs"].pop("permutation")
    write_json(path, content)
    (folder / "points" / "depth-L2-seed0" / "untrained_report.json").unlink()
    numbers = load_results(folder).points[0].numbers
    assert numbers["jacobian_mean"] is numbers["jacobian_last"] is numbers["permutation_no0"] is None
    assert numbers["untrained_causal"] is numbers["gain_causal"] is None
    assert numbers["causal"] is not None


# ------------------------------------------------------------------------------------------------------------- families


def test_means_and_deviations_are_over_seeds(results: SweepResults) -> None:
    values = [point.numbers["causal"] or 0.0 for point in results.of_variant("depth-L4")]
    found = cell(results, "depth-L4", "causal")
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.deviation == pytest.approx(statistics.stdev(values))
    assert found.seeds == 2


def test_a_family_of_two_axes_is_one_line_for_each_value_of_the_other(results: SweepResults) -> None:
    layout = lay_out(results, family(results, "scaling"))
    assert layout.axis.setting == "num_hidden_layers"
    assert [line.label for line in layout.lines] == ["norm scaling none", "norm scaling depth"]
    assert [[place.variant for place in line.places] for line in layout.lines] == [
        ["depth-L2", "depth-L4"],
        ["scaling-L2-depth", "scaling-L4-depth"],
    ]


def test_a_scale_with_a_zero_and_names_are_drawn_side_by_side(results: SweepResults) -> None:
    depth, decay, placement = (lay_out(results, family(results, name)) for name in ("depth", "decay", "placement"))
    assert depth.axis.is_scale
    assert [position for position, _ in depth.ticks] == [2, 4]
    assert decay.axis.is_ordered
    assert not decay.axis.is_scale
    assert decay.ticks == [(0.0, "0"), (1.0, "0.1")]  # in the order of the numbers, not of the file
    assert not placement.axis.is_ordered
    assert placement.ticks == [(0.0, "pre"), (1.0, "post")]


def test_settings_that_go_together_are_one_axis(results: SweepResults) -> None:
    layout = lay_out(results, family(results, "sparse"))
    assert layout.axis.setting == "num_experts"
    assert layout.ticks == [(0.0, "none"), (1.0, "8")]


def test_variants_that_are_no_grid_stand_under_their_names(folder: Path) -> None:
    index = json.loads((folder / "sweep.json").read_text())
    variants = ["depth-L2", "depth-L4", "decay-wd0", "sparse-moe"]
    axes = ["num_hidden_layers", "weight_decay", "num_experts"]
    index["families"] = [{"name": "recipe", "variants": variants, "axes": axes}]
    write_json(folder / "sweep.json", index)
    layout = lay_out(load_results(folder), load_results(folder).families[0])
    assert layout.axis.setting is None
    assert [label for _, label in layout.ticks] == variants
    table = main_table(load_results(folder), layout.family)
    assert table.headings[:5] == ["variant", "layers", "weight decay", "experts", "seeds"]
    assert table.rows[3][:4] == ["sparse-moe", "4", "0.1", "8"]
    console = Console(width=80, record=True, file=io.StringIO())
    print_results(load_results(folder), console)
    assert any(line.split()[:2] == ["sparse-moe", "2"] for line in console.export_text().splitlines())


# ---------------------------------------------------------------------------------------------------------------- words


def test_a_change_is_clear_beyond_twice_the_noise() -> None:
    assert Change("loss", 3.0, 3.5, 0.2).clear
    assert Change("loss", 3.5, 3.0, 0.2).clear
    assert Change("loss", 3.0, 3.4, 0.2).clear is False
    assert Change("loss", 3.0, 3.4, None).clear is None


def set_losses(folder: Path, losses: dict[str, float]) -> None:
    for name, loss in losses.items():
        change_json(folder / "points" / name / "result.json", loss=loss)


def test_the_words_say_what_moves_by_more_than_the_seeds_do(folder: Path) -> None:
    set_losses(folder, {"depth-L2-seed0": 3.0, "depth-L2-seed1": 3.1, "depth-L4-seed0": 2.0, "depth-L4-seed1": 2.1})
    results = load_results(folder)
    said = family_words(results, lay_out(results, family(results, "depth")))
    assert said[0].startswith("From layers 2 to 4. Clear: held-out loss falls from 3.05 to 2.05")
    set_losses(folder, {"depth-L2-seed0": 3.0, "depth-L2-seed1": 3.9, "depth-L4-seed0": 2.0, "depth-L4-seed1": 2.9})
    results = load_results(folder)
    said = family_words(results, lay_out(results, family(results, "depth")))
    assert "Within the noise: held-out loss" in said[0]


def test_the_noise_is_the_error_of_a_difference_of_two_means(folder: Path) -> None:
    index = json.loads((folder / "sweep.json").read_text())
    for point in list(index["points"]):
        if point["variant"] in ("depth-L2", "depth-L4"):
            more = {**point, "seed": point["seed"] + 2, "point": f"{point['variant']}-seed{point['seed'] + 2}"}
            shutil.copytree(folder / "points" / point["point"], folder / "points" / more["point"])
            change_json(folder / "points" / more["point"] / "result.json", point=more["point"], seed=more["seed"])
            index["points"].append(more)
    write_json(folder / "sweep.json", index | {"seeds": [0, 1, 2, 3]})
    seeds = (2.7, 2.9, 3.1, 3.3)
    deviation = statistics.stdev(seeds)
    error = deviation * math.sqrt(1 / 4 + 1 / 4)
    for shift, kind in ((2.2 * error, "Clear: held-out loss rises"), (1.8 * error, "Within the noise: held-out loss")):
        set_losses(folder, {f"depth-L2-seed{seed}": loss for seed, loss in enumerate(seeds)})
        set_losses(folder, {f"depth-L4-seed{seed}": loss + shift for seed, loss in enumerate(seeds)})
        results = load_results(folder)
        assert kind in family_words(results, lay_out(results, family(results, "depth")))[0]
    assert "standard error of the difference of two means" in to_markdown(results)


def test_with_one_seed_the_noise_is_that_of_the_blocks(tmp_path: Path, made: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "one"))
    index = json.loads((folder / "sweep.json").read_text())
    index["points"] = [point for point in index["points"] if point["seed"] == 0]
    write_json(folder / "sweep.json", index | {"seeds": [0]})
    results = load_results(folder)
    ends = [cell(results, f"depth-L{layers}", "loss") for layers in (2, 4)]
    assert ends[0].deviation is None
    assert "±" not in " ".join(main_table(results, family(results, "depth")).rows[0])
    noise = math.hypot(ends[0].error or 0.0, ends[1].error or 0.0)
    for shift, kind in ((3 * noise, "Clear: held-out loss rises"), (noise, "Within the noise: held-out loss")):
        set_losses(folder, {"depth-L2-seed0": 3.0, "depth-L4-seed0": 3.0 + shift})
        results = load_results(folder)
        assert kind in family_words(results, lay_out(results, family(results, "depth")))[0]
    assert "one seed" in to_markdown(results)


def test_lines_are_compared_at_the_last_place_that_they_share(results: SweepResults) -> None:
    said = family_words(results, lay_out(results, family(results, "scaling")))
    assert any(line.startswith("At layers 4, from norm scaling none to norm scaling depth.") for line in said)


def test_the_paper_is_told_beside_with_its_turning_points(results: SweepResults) -> None:
    said = " ".join(family_words(results, lay_out(results, family(results, "decay"))))
    assert "The paper, from weight decay 0 to 3.0." in said
    assert "perplexity 15.63 to 773.42 (14.83 at 0.1)" in said
    assert "The paper" not in " ".join(family_words(results, lay_out(results, family(results, "placement"))))


def test_the_paper_is_read_in_the_direction_of_the_sweep() -> None:
    perplexity = paper_series("num_key_value_heads", [4, 2, 1])[0]
    assert direction(perplexity, 1, 4) == (14.47, 14.52)  # from groups of 16 to one head each
    assert direction(perplexity, 4, 1) == (14.52, 14.47)


def test_more_experts_are_not_compared_with_the_papers_dense_model() -> None:
    assert paper_series("num_experts", [None, 8])
    assert not paper_series("num_experts", [4, 8])


# --------------------------------------------------------------------------------------------------------------- tables


def twin(folder: Path, place: Path) -> Path:
    """The same sweep run elsewhere and later: other dates, other seconds."""
    made = Path(shutil.copytree(folder, place))
    for path in made.glob("points/*/*report.json"):
        change_json(path, created="2027-01-01T00:00:00+00:00")
    for path in made.glob("points/*/environment.json"):
        change_json(path, seconds=9999.5)
    return made


def test_two_sweeps_that_came_to_the_same_have_the_same_bytes(made: Path, written: Path, tmp_path: Path) -> None:
    paths = write_report(twin(made, tmp_path / "elsewhere"), tmp_path / "second")
    assert [path.name for path in paths] == list(FILES)
    for path in paths:
        content = path.read_bytes()
        assert content == (written / path.name).read_bytes(), path.name
        for secret in (b"2027-01", b"9999.5", str(tmp_path).encode(), str(made).encode()):
            assert secret not in content, (path.name, secret)


def test_csv_and_parquet_hold_the_same_numbers_to_the_last_digit(written: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((written / "results.csv").read_text())))
    table = pq.read_table(written / "results.parquet").to_pylist()
    assert len(rows) == len(table) == len(VARIANTS) * 2
    for row, other in zip(rows, table, strict=True):
        assert list(row) == list(other)
        for name, text in row.items():
            value = other[name]
            if value is None:
                assert text == ""
            elif isinstance(value, float):
                assert float(text) == value
            else:
                assert text == str(value)
    assert rows[0]["families"] == "depth;scaling"
    assert table[2]["setting_norm_scaling"] == "depth"
    assert table[0]["setting_weight_decay"] == 0.1
    assert set(COLUMNS) <= set(table[0])
    assert {f"untrained_{score.name}" for score in SCORES} | {f"gain_{score.name}" for score in SCORES} <= set(table[0])


@pytest.mark.parametrize(
    "text", ['=HYPERLINK("x")', "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1+1", " =1+1", "\uff1d1"]
)
def test_no_text_in_a_table_is_a_formula(text: str) -> None:
    rows = [{"point": text, text: -0.3, "other": "-0.3", "plain": "depth-L2"}, {"point": -1, text: None}]
    header, first, second = csv.reader(io.StringIO(to_csv(rows)))
    assert header == ["point", f"'{text}", "other", "plain"]
    assert first == [f"'{text}", "-0.3", "-0.3", "depth-L2"]
    assert second == ["-1", ""]


def test_the_layers_are_a_row_each_of_trained_and_untrained_models(made: Path, written: Path) -> None:
    table = pq.read_table(written / "layers.parquet").to_pandas()
    reports = {path: LayerReport.load(path) for path in sorted(made.glob("points/*/*report.json"))}
    assert len(table) == sum(len(report.layers) for report in reports.values())
    for path, report in reports.items():
        kind = "trained" if path.name == "layer_report.json" else "untrained"
        rows = table[(table.point == path.parent.name) & (table.model == kind)]
        assert rows.layer.tolist() == list(range(len(report.layers)))
        assert rows.skip_ratio.tolist() == report.column("skip_ratio")
        assert rows.variance_se.tolist() == report.column("variance_se")


def test_missing_seeds_leave_empty_rows_and_are_counted(folder: Path) -> None:
    shutil.rmtree(folder / "points" / "depth-L2-seed1")
    results = load_results(folder)
    row = next(row for row in result_rows(results) if row["point"] == "depth-L2-seed1")
    assert row["status"] == "not run"
    assert row["setting_num_hidden_layers"] == 2
    assert row["loss"] is row["causal"] is row["layers"] is None
    table = main_table(results, family(results, "depth"))
    assert [cells[1] for cells in table.rows] == ["1 of 2", "2"]
    assert "±" not in table.rows[0][2]
    assert "±" in table.rows[1][2]


def test_the_table_of_a_family_has_means_and_deviations(results: SweepResults) -> None:
    table = main_table(results, family(results, "depth"))
    assert table.headings[:3] == ["layers", "seeds", "held-out loss [nats/token]"]
    assert table.rows[0][:3] == ["2", "2", "3.0050 ± 0.0071"]
    control = control_table(results, family(results, "depth"))
    assert control.rows[0][2] == "4.5050 ± 0.0071"


def test_markdown_cannot_be_broken_by_a_name(folder: Path) -> None:
    evil = "a|b`c<img src=x>\n# d"
    change_json(folder / "sweep.json", description=evil)
    text = to_markdown(load_results(folder))
    assert "a\\|b\\`c\\<img src=x\\> \\# d" in text


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_terminal_shows_every_family_at_any_width(results: SweepResults, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    print_results(results, console)
    lines = console.export_text().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    assert {line.split(":")[0] for line in lines} >= {family.name for family in results.families}
    if width >= 80:
        assert any(line.split()[:4] == ["2", "2", "3.0050", "±"] for line in lines)
    wide = Console(width=400, record=True, file=io.StringIO())
    print_results(results, wide)
    assert "Jacobian" in wide.export_text()


# -------------------------------------------------------------------------------------------------------------- figures


def test_a_panel_shows_each_seed_the_mean_with_its_spread_and_the_control(results: SweepResults) -> None:
    layout = lay_out(results, family(results, "depth"))
    panel = next(drawn for drawn in score_panels(results, layout) if drawn.name == "causal")
    control, seeds, means = panel.figure.data
    assert control.line.dash == "dot"
    variants = ["depth-L2", "depth-L4"]
    for index, variant in enumerate(variants):
        found, before = cell(results, variant, "causal"), cell(results, variant, "untrained_causal")
        assert means.y[index] == pytest.approx(found.mean, rel=1e-4)
        assert means.error_y.array[index] == pytest.approx(found.deviation, rel=1e-4)
        assert control.y[index] == pytest.approx(before.mean, rel=1e-4)
    every = [point.numbers["causal"] for variant in variants for point in results.of_variant(variant)]
    assert list(seeds.y) == pytest.approx(every, rel=1e-4)
    assert list(means.x) == [2, 4]


def test_a_family_of_two_axes_is_drawn_as_several_lines(results: SweepResults) -> None:
    layout = lay_out(results, family(results, "scaling"))
    panel = next(drawn for drawn in score_panels(results, layout) if drawn.name == "loss")
    lines = [trace for trace in panel.figure.data if trace.mode == "lines+markers"]
    assert len(lines) == 2
    assert len({(trace.line.color, trace.line.dash) for trace in lines}) == 2


def test_layers_are_drawn_by_relative_depth_where_depths_differ(results: SweepResults) -> None:
    drawn = {name: layer_figures(results, lay_out(results, family(results, name))) for name in ("depth", "decay")}
    mean = drawn["depth"][0].figure.data[-1]
    assert list(mean.x) == [0.125, 0.375, 0.625, 0.875]
    columns = [point.report.column("variance") for point in results.of_variant("depth-L4") if point.report]
    assert list(mean.y) == pytest.approx([statistics.fmean(pair) for pair in zip(*columns, strict=True)], rel=1e-4)
    assert list(drawn["decay"][0].figure.data[-1].x) == [0, 1, 2, 3]


def test_the_course_is_the_mean_over_seeds_and_each_of_them(results: SweepResults) -> None:
    losses = training_figures(results, lay_out(results, family(results, "depth")))[0].figure.data
    assert len(losses) == 2 * 3
    assert list(losses[2].y) == [4.25, 4.0, 3.75, 3.5]
    assert losses[0].opacity < 1


def test_the_papers_numbers_are_drawn_for_its_axes(results: SweepResults) -> None:
    depth = {drawn.title: drawn.figure.data[0] for drawn in paper_panels(lay_out(results, family(results, "depth")))}
    assert list(depth["Mean causal score"].y) == [0.355, 0.336, 0.289, 0.259]
    assert depth["Mean causal score"].mode == "lines+markers"
    assert paper_panels(lay_out(results, family(results, "placement"))) == []


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_whole_and_asks_nothing_of_the_network(page: Page) -> None:
    assert page.open == []
    assert page.all("link") == page.all("img") == page.all("iframe") == page.all("a") == []
    assert all("src" not in attributes for attributes, _ in page.scripts)
    policy = next(m["content"] or "" for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert policy.count("'sha256-") == 2


def test_every_figure_of_the_page_has_its_place_and_its_explanation(page: Page) -> None:
    places = {attributes["id"] for attributes in page.all("div") if attributes.get("class") == "plot"}
    assert places == set(page.figures)
    assert len(places) > 5 * 12
    for figure in page.figures.values():
        assert figure["layout"]["meta"] in page.text
        assert figure["layout"]["paper_bgcolor"] == "rgba(0, 0, 0, 0)"


def test_the_page_says_what_the_tables_say(page: Page, results: SweepResults) -> None:
    for each in results.families:
        for line in family_words(results, lay_out(results, each)):
            assert line in page.text
        for row in main_table(results, each).rows:
            assert all(text in page.text for text in row)
    assert "2.13.0" in page.text
    assert "71.25" not in page.text


def evil_sweep(folder: Path) -> SweepResults:
    index = json.loads((folder / "sweep.json").read_text())
    index["description"] = EVIL
    index["data"] = {"name": EVIL, "fingerprint": EVIL, "vocab_size": 96}
    index["families"] = [FAMILIES[0], FAMILIES[3]]
    index["families"].append({"name": "evil", "variants": ["depth-L2", "depth-L4"], "axes": [EVIL]})
    for point in index["points"]:
        point["settings"][EVIL] = f"{EVIL}{point['variant']}"
    write_json(folder / "sweep.json", index)
    environment = {"versions": {EVIL: EVIL}, "processor": EVIL, "seconds": EVIL}
    write_json(folder / "points" / "depth-L2-seed0" / "environment.json", environment)
    change_json(folder / "points" / "depth-L4-seed1" / "result.json", status="failed", error=EVIL)
    return load_results(folder)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def test_a_strangers_text_stays_text(folder: Path) -> None:
    page = Page(render_sweep_page(evil_sweep(folder)))
    assert page.open == []
    assert page.all("img") == page.all("b") == []
    assert len(page.scripts) == 3
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    (data,) = (text for attributes, text in page.scripts if attributes.get("id") == "figures")
    assert not set("<>&\u2028\u2029") & set(data)
    drawn = [text for figure in page.figures.values() for text in strings(figure)]
    assert not any("<img" in text or "<b>" in text for text in drawn)
    print_results(load_results(folder), Console(file=io.StringIO(), width=80))
    assert not re.search(r"(?<!\\)[<>]", to_markdown(load_results(folder)))


# -------------------------------------------------------------------------------------------------------------- writing


def test_the_report_is_written_beside_the_points_or_where_it_is_told(folder: Path, tmp_path: Path) -> None:
    keep(folder, "depth")
    assert write_report(folder) == [folder / "report" / name for name in FILES]
    assert write_report(folder, tmp_path / "a" / "b")[0].parent == tmp_path / "a" / "b"
    assert sorted(path.name for path in (folder / "report").iterdir()) == sorted(FILES)
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match="cannot be created"):
        write_report(folder, tmp_path / "file")
    (tmp_path / "a" / "b" / "tables.md").unlink()
    (tmp_path / "a" / "b" / "tables.md").mkdir()
    with pytest.raises(ReportError, match="it is a folder"):
        write_report(folder, tmp_path / "a" / "b")


SWEEP = """
name: real
model: {hidden_size: 16, head_dim: 8, num_attention_heads: 2, intermediate_size: 24}
data: {text: text.txt, epochs: 1000, held_out: {text: text.txt}}
tokenizer: {vocab_size: 300, characters: 20_000}
training: {tokens: 1024, sequence_length: 16, batch_tokens: 128, warmup_steps: 1, precision: float32}
scoring: {fit_blocks: 3, eval_blocks: 2, loss_tokens: 64, probes: 2, scores: "variance,skip"}
grid:
  depth: {num_hidden_layers: [1, 2]}
"""


def test_what_a_sweep_writes_can_be_read(tmp_path: Path) -> None:
    from depthscope.sweep.runner import run_sweep
    from depthscope.sweep.specification import load_sweep

    (tmp_path / "text.txt").write_text("".join(f"The number {n} is followed by {n + 1}.\n" for n in range(600)))
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    outcome = run_sweep(load_sweep(tmp_path / "sweep.yaml"), tmp_path / "out", jobs=1, progress=False)
    results = load_results(outcome.out)
    assert [point.status for point in results.points] == ["finished", "finished"]
    for point in results.points:
        assert point.losses.tokens[-1] == point.variances.tokens[-1] == 1024
        assert point.numbers["loss"] is not None
        assert point.numbers["gain_loss"] is not None
        assert point.variances.values[-1][-1] > 0
    assert all(path.is_file() for path in write_report(outcome.out))
