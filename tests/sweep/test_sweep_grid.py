"""Families of a grid become points: products and lists, names, seeds, and points that several families share."""

import time
from pathlib import Path

import pytest
import yaml

from depthscope.errors import SpecificationError
from depthscope.sweep.grid import Grid, expand
from depthscope.sweep.recorded import settings_of
from depthscope.sweep.specification import load_sweep
from sweeps import write_sweep


def expanded(folder: Path, grid: object, **parts: object) -> Grid:
    return expand(load_sweep(write_sweep(folder, grid=grid, **parts)))


def names(grid: Grid) -> list[str]:
    return [point.name for point in grid.points]


def test_a_family_is_the_product_of_its_lists(tmp_path: Path) -> None:
    grid = expanded(tmp_path, {"f": {"num_hidden_layers": [2, 4], "weight_decay": [0, 0.3], "qk_norm": "head"}})
    assert names(grid) == ["f-L2-wd0-seed0", "f-L2-wd0.3-seed0", "f-L4-wd0-seed0", "f-L4-wd0.3-seed0"]
    assert all(point.model["qk_norm"] == "head" for point in grid.points)
    assert [point.training.weight_decay for point in grid.points] == [0, 0.3, 0, 0.3]
    assert grid.families[0].axes == ("num_hidden_layers", "weight_decay")


def test_points_are_listed_where_a_product_is_too_much(tmp_path: Path) -> None:
    points = [
        {"name": "deep", "num_hidden_layers": 8},
        {"num_hidden_layers": 2, "learning_rate": 0.1},
        {"name": "wide", "hidden_size": [32, 64], "num_hidden_layers": 2},
    ]
    grid = expanded(tmp_path, {"f": {"weight_decay": 0.5, "points": points}})
    assert names(grid) == ["deep-seed0", "f-L2-lr0.1-seed0", "wide-d32-seed0", "wide-d64-seed0"]
    assert {point.training.weight_decay for point in grid.points} == {0.5}


def test_every_point_is_trained_with_every_seed_the_first_seed_first(tmp_path: Path) -> None:
    grid = expanded(tmp_path, {"f": {"num_hidden_layers": [2, 4]}}, seeds=[3, 1])
    assert names(grid) == ["f-L2-seed3", "f-L4-seed3", "f-L2-seed1", "f-L4-seed1"]


def test_a_point_of_two_families_is_trained_once(tmp_path: Path) -> None:
    families = {
        "depth": {"num_hidden_layers": [2, 4]},
        "decay": {"num_hidden_layers": 4, "weight_decay": [0.1, 1.0]},  # 0.1 is the default
    }
    grid = expanded(tmp_path, families)
    assert names(grid) == ["depth-L2-seed0", "depth-L4-seed0", "decay-wd1-seed0"]
    assert [family.variants for family in grid.families] == [("depth-L2", "depth-L4"), ("depth-L4", "decay-wd1")]


def test_a_value_that_is_a_list_is_written_as_a_list_in_the_list(tmp_path: Path) -> None:
    grid = expanded(tmp_path, {"f": {"num_experts": 4, "num_experts_per_tok": 2, "moe_layers": [[0], [0, 1], "all"]}})
    assert [point.model["moe_layers"] for point in grid.points] == [[0], [0, 1], "all"]
    assert len(set(names(grid))) == 3


def test_presets_of_models_can_be_swept_and_overridden(tmp_path: Path) -> None:
    text = "name: a\nmodel: {num_hidden_layers: 3}\ngrid: {f: {preset: [dense-2m, moe-4m]}}\n"
    (tmp_path / "a.yaml").write_text(text)
    grid = expand(load_sweep(tmp_path / "a.yaml"))
    assert names(grid) == ["f-dense-2m-seed0", "f-moe-4m-seed0"]
    assert [point.config(512).num_hidden_layers for point in grid.points] == [3, 3]
    assert [point.config(512).num_experts is None for point in grid.points] == [True, False]


def shapes(folder: Path, text: str) -> list[tuple[int, int]]:
    """Hidden size and layers of every point."""
    (folder / "a.yaml").write_text(text)
    sweep = load_sweep(folder / "a.yaml")
    (folder / "resolved.yaml").write_text(yaml.safe_dump(sweep.specification.model_dump(mode="json")))
    found, again = expand(sweep), expand(load_sweep(folder / "resolved.yaml"))
    assert [point.identity for point in found.points] == [point.identity for point in again.points]
    return [(config.hidden_size, config.num_hidden_layers) for config in (point.config(512) for point in found.points)]


def test_a_preset_wins_over_the_shape_that_an_extended_file_gives(tmp_path: Path) -> None:
    base = "name: base\nmodel: {hidden_size: 32, head_dim: 16, num_hidden_layers: 2, qk_norm: head}\n"
    (tmp_path / "base.yaml").write_text(base)
    grid = "grid: {f: {weight_decay: 0}}\n"
    assert shapes(tmp_path, f"extends: base.yaml\nmodel: {{preset: dense-30m}}\n{grid}") == [(384, 16)]
    config = expand(load_sweep(tmp_path / "a.yaml")).points[0].config(512)
    assert (config.head_dim, config.qk_norm) == (48, "head")  # no part of the shape
    beside = "model: {preset: dense-30m, num_hidden_layers: 3}\n"
    assert shapes(tmp_path, f"extends: base.yaml\n{beside}{grid}") == [(384, 3)]
    below = f"name: b\n{beside}{grid}"
    (tmp_path / "b.yaml").write_text(below)
    assert shapes(tmp_path, "extends: b.yaml\nmodel: {hidden_size: 64, head_dim: 8}\n") == [(64, 3)]
    assert shapes(tmp_path, "extends: b.yaml\nmodel: {preset: dense-2m}\n") == [(128, 6)]


def test_presets_in_a_grid_win_over_the_shape_that_an_extended_file_gives(tmp_path: Path) -> None:
    presets = "grid: {d: {preset: [dense-2m, dense-30m]}}\n"
    assert shapes(tmp_path, f"extends: laptop\nseeds: [0]\n{presets}") == [(128, 6), (384, 16)]
    own = "model: {num_hidden_layers: 3}\n"
    assert shapes(tmp_path, f"extends: laptop\nseeds: [0]\n{own}{presets}") == [(128, 3), (384, 3)]
    mixed = "grid: {d: {points: [{preset: dense-2m}, {num_hidden_layers: 5}]}}\n"
    assert shapes(tmp_path, f"extends: laptop\nseeds: [0]\n{mixed}") == [(128, 6), (64, 5)]


def test_too_many_points_or_layers_are_refused_before_they_are_made(tmp_path: Path) -> None:
    axes = {
        "num_hidden_layers": list(range(1, 400)),
        "hidden_size": list(range(2, 800, 2)),
        "weight_decay": [0, 0.1, 1.0],
    }
    started = time.perf_counter()
    with pytest.raises(SpecificationError, match=r"line \d+: 477,603 models are too many"):
        expanded(tmp_path, {"f": axes})
    with pytest.raises(SpecificationError, match=r"101 models with 100 seeds are too many"):
        expanded(tmp_path, {"f": {"num_hidden_layers": list(range(1, 102))}}, seeds=list(range(100)))
    with pytest.raises(SpecificationError, match="the grid has 1,001 families"):
        expanded(tmp_path, {f"f{index}": {"num_hidden_layers": 2} for index in range(1001)})
    for grid in ({"f": {"num_hidden_layers": 10**9}}, {"f": {"weight_decay": 0}}):
        with pytest.raises(SpecificationError, match=r"line \d+: .*num_hidden_layers is 1,000,000,000; .* 10,000"):
            expanded(tmp_path, grid, model={"num_hidden_layers": 10**9})
    assert time.perf_counter() - started < 5


def test_a_whole_number_is_taken_where_a_fraction_is_expected(tmp_path: Path) -> None:
    assert expanded(tmp_path, {"f": {"rms_norm_eps": 1}}).points[0].config(512).rms_norm_eps == 1.0


def test_blocks_are_no_longer_than_the_shortest_sequences(tmp_path: Path) -> None:
    grid = {"f": {"sequence_length": [16, 32]}}
    assert expanded(tmp_path, grid, scoring={"block_size": 16}).shortest == 16
    with pytest.raises(SpecificationError, match=r"line \d+: scoring\.block_size is 32, .* is 16"):
        expanded(tmp_path, grid, scoring={"block_size": 32})


REFUSED = {
    "{}": "the grid is empty",
    "{f: {}}": "family 'f' is empty",
    "{a b: {num_hidden_layers: 2}}": "'a b' is not a valid name of a family",
    "{f: {num_hidden_layers: []}}": "num_hidden_layers has an empty list",
    "{f: {num_hidden_layers: [2, 2]}}": "num_hidden_layers has a value twice",
    "{f: {num_hidden_layers: [0, 2]}}": "num_hidden_layers must be at least 1, got 0",
    "{f: {num_hiden_layers: [2]}}": "did you mean 'num_hidden_layers'",
    "{f: {seed: [2]}}": "'seed' is not a setting",
    "{f: {tokens: [10]}}": "less than one optimiser step",
    "{f: {dtype: [bfloat16]}}": "'dtype' is not a setting",
    "{f: {weight_decay: [false, 0.1]}}": "is not a number",
    "{f: {points: [{name: 8, num_hidden_layers: 3}]}}": "Put a number in quotes",
    "{f: {weight_decay: [some]}}": "weight_decay: Input should be a valid number",
    "{f: {num_key_value_heads: [3]}}": "num_key_value_heads must divide num_attention_heads",
    "{f: {num_experts: 4, num_experts_per_tok: [8]}}": "num_experts_per_tok must be from 1 to num_experts",
    "{f: {sequence_length: [32, 24], batch_tokens: 96}}": "32 is not a multiple of 24",
    "{f: {points: 3}}": "`points` is a list of settings",
    "{f: {points: []}}": "`points` is a list of settings",
    "{f: {num_hidden_layers: 2, points: [{num_hidden_layers: 3}]}}": "both in the point and in its family",
    "{f: {points: [{name: ../x, num_hidden_layers: 3}]}}": "'../x' is not a valid name of a point",
    "{f: {points: [{name: x, num_hidden_layers: 2}, {name: x, num_hidden_layers: 3}]}}": "have the name 'x'",
    "{f: {points: [{name: x, num_hidden_layers: 2}, {name: X, num_hidden_layers: 3}]}}": "have the name 'X'",
    "{f: {points: [{num_hidden_layers: 2}, {num_hidden_layers: 2}]}}": "have the same settings ('f-L2')",
    "{f: {points: [{name: x, num_hidden_layers: 2}]}, g: {points: [{name: y, num_hidden_layers: 2}]}}": "name one",
}


@pytest.mark.parametrize("grid", REFUSED)
def test_a_bad_grid_gets_one_message_with_its_line(tmp_path: Path, grid: str) -> None:
    with pytest.raises(SpecificationError) as refused:
        expanded(tmp_path, yaml.safe_load(grid))
    assert REFUSED[grid] in str(refused.value)
    assert ", line " in str(refused.value)


def test_the_line_of_the_setting_is_named(tmp_path: Path) -> None:
    text = "name: a\ngrid:\n  f:\n    weight_decay: 0\n    points:\n      - num_hidden_layers: 2\n"
    text += "      - learning_rate: -1\n        num_hidden_layers: 0\n"
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SpecificationError, match=r"a\.yaml, line 7: point .*learning_rate"):
        expand(load_sweep(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text(text.replace("-1", "1"))
    with pytest.raises(SpecificationError, match=r"a\.yaml, line 8: point .*num_hidden_layers must be"):
        expand(load_sweep(tmp_path / "a.yaml"))


def test_what_decides_the_outcome_is_kept_with_the_point_and_nothing_else(tmp_path: Path) -> None:
    def first(**parts: object) -> str:
        sweep = load_sweep(write_sweep(tmp_path, **parts))
        grid = expand(sweep)
        return grid.points[0].identity + str(settings_of(sweep.specification, grid.longest, grid.shortest))

    same = first()
    assert first(name="other", description="words", tracking={"log_every": 1}) == same
    assert first(grid={"else": {"num_hidden_layers": 2}}) == same
    changed = [
        first(seeds=[1]),
        first(grid={"f": {"num_hidden_layers": 3}}),
        first(model={"initializer_range": 0.2}),
        first(training={"weight_decay": 0.2}),
        first(scoring={"eval_blocks": 1}),
        first(tokenizer={"vocab_size": 300}),
        first(data={"epochs": 2}),
    ]
    assert len({same, *changed}) == 8
