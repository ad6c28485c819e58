"""Families of a grid become points: products and lists, names, seeds, and points that several families share."""

from pathlib import Path

import pytest
import yaml

from depthscope.errors import SpecificationError
from depthscope.sweep.grid import Grid, expand
from depthscope.sweep.point import identity
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


REFUSED = {
    "{}": "the grid is empty",
    "{f: {}}": "family 'f' is empty",
    "{a b: {num_hidden_layers: 2}}": "'a b' is no name for a family",
    "{f: {num_hidden_layers: []}}": "num_hidden_layers has an empty list",
    "{f: {num_hidden_layers: [2, 2]}}": "num_hidden_layers has a value twice",
    "{f: {num_hidden_layers: [0, 2]}}": "num_hidden_layers must be at least 1, got 0",
    "{f: {num_hiden_layers: [2]}}": "did you mean 'num_hidden_layers'",
    "{f: {seed: [2]}}": "'seed' is no setting",
    "{f: {tokens: [10]}}": "less than one optimiser step",
    "{f: {weight_decay: [some]}}": "weight_decay: Input should be a valid number",
    "{f: {num_key_value_heads: [3]}}": "num_key_value_heads must divide num_attention_heads",
    "{f: {num_experts: 4, num_experts_per_tok: [8]}}": "num_experts_per_tok must be from 1 to num_experts",
    "{f: {sequence_length: [32, 24], batch_tokens: 96}}": "32 is not a multiple of 24",
    "{f: {points: 3}}": "`points` is a list of settings",
    "{f: {points: []}}": "`points` is a list of settings",
    "{f: {num_hidden_layers: 2, points: [{num_hidden_layers: 3}]}}": "both in the point and in its family",
    "{f: {points: [{name: ../x, num_hidden_layers: 3}]}}": "'../x' is no name for a point",
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


def test_what_decides_the_outcome_is_in_the_identity_and_nothing_else(tmp_path: Path) -> None:
    def first(**parts: object) -> str:
        sweep = load_sweep(write_sweep(tmp_path, **parts))
        return identity(expand(sweep).points[0], sweep.specification)

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
