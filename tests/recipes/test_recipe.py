"""The recipe: the paper's own choices at its shape, honest ones elsewhere, and files that others read."""

import itertools
import json
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments
from typer.testing import CliRunner

from commands import depthscope
from depthscope import DepthLMConfig, recipe
from depthscope.cli import app
from depthscope.errors import SettingsError
from depthscope.models import model_size
from depthscope.recipes import Recipe
from depthscope.recipes.evidence import PAPER, SMALL_MODELS
from depthscope.recipes.tables import recipe_markdown
from depthscope.recipes.write import write_recipe
from depthscope.sweep.cost.plan import plan
from depthscope.sweep.grid import Grid, expand
from depthscope.sweep.report.paper import ALL
from depthscope.sweep.specification import Training, load_sweep

PAPER_SHAPE = {"layers": 32, "width": 1120}
SMALL = {"layers": 3, "width": 64, "vocab_size": 300}


def grid_of(made: Recipe, folder: Path) -> Grid:
    path = folder / "sweep.yaml"
    path.write_text(made.sweep_yaml())
    return expand(load_sweep(path))


def value_of(made: Recipe, choice: str) -> str:
    return next(row.value for row in made.evidence if row.choice == choice)


@pytest.fixture(scope="module")
def papers() -> Recipe:
    return recipe(**PAPER_SHAPE, tokens=5e9)


# The paper's own model


def test_at_the_papers_shape_and_budget_the_recipe_is_the_papers_model(papers: Recipe) -> None:
    assert papers.config.to_dict() == DepthLMConfig.from_preset("recipe").to_dict()
    config, training = papers.config, papers.training
    assert (config.num_experts, config.num_experts_per_tok) == (64, 8)
    assert config.num_attention_heads // config.num_key_value_heads == 2
    assert (training.sequence_length, training.weight_decay, training.batch_tokens) == (4096, 0.3, 256 * 1024)
    assert (training.learning_rate, training.warmup_steps, training.schedule) == (1e-3, 1000, "cosine")
    assert papers.size.active == pytest.approx(1.2e9, rel=0.01)


def test_only_the_learning_rate_is_an_extrapolation_there(papers: Recipe) -> None:
    assert papers.extrapolated == ["learning rate"]


def test_its_sweep_takes_the_steps_of_the_papers_ablation(papers: Recipe, tmp_path: Path) -> None:
    points = grid_of(papers, tmp_path).points
    configs = [point.config(50304) for point in points]
    seen = [
        (
            point.training.sequence_length,
            point.training.weight_decay,
            config.num_attention_heads // config.num_key_value_heads,
            config.num_experts,
        )
        for point, config in zip(points, configs, strict=True)
    ]
    assert seen == [
        (1024, 0.1, 1, None),
        (4096, 0.1, 1, None),
        (4096, 0.3, 1, None),
        (4096, 0.3, 2, None),
        (4096, 0.3, 2, 64),
    ]
    assert configs[-1].to_dict() == papers.config.to_dict()
    assert points[-1].training == papers.training
    assert {point.training.batch_tokens for point in points} == {papers.training.batch_tokens}
    dense, sparse = (model_size(config).active for config in configs[-2:])
    assert dense == pytest.approx(sparse, rel=0.01)  # but for the routers


def test_the_evidence_quotes_the_numbers_that_sweeps_are_compared_with() -> None:
    quoted = {
        "sequence_length": "sequence length",
        "weight_decay": "weight decay",
        "num_key_value_heads": "GQA groups",
        "num_experts": "experts",
    }
    for series in ALL:
        if series.score == "perplexity":
            for value in series.values:
                text = PAPER[quoted[series.setting]]
                assert f"{value:.2f}" in text or f"{value:.0f}" in text, (series.axis, value)


def test_every_choice_has_a_reason_and_what_is_known_belongs_to_a_choice(papers: Recipe) -> None:
    choices = {row.choice for row in papers.evidence}
    assert all(row.value and row.why and row.paper for row in papers.evidence)
    assert set(PAPER) == choices
    assert set(SMALL_MODELS) <= choices


# Every shape


@pytest.mark.parametrize(
    ("layers", "width"), [*itertools.product((1, 7, 24), (32, 48, 96, 200, 250, 768)), (64, 512), (40, 2560)]
)
def test_any_shape_gives_a_model_that_builds_and_a_sweep_that_loads(layers: int, width: int, tmp_path: Path) -> None:
    for tokens, options in ((2e6, {}), (3e8, {"dense": True, "max_length": 700}), (1e11, {"gpus": 3})):
        made = recipe(layers, width, tokens=tokens, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made.config)
        assert sum(parameter.numel() for parameter in model.parameters()) == made.size.total
        training, config = made.training, made.config
        assert config.num_attention_heads * config.head_dim == width
        assert config.num_attention_heads % config.num_key_value_heads == 0
        assert training.steps >= 1000 - 1
        assert training.steps * training.batch_tokens <= tokens
        assert training.sequences % options.get("gpus", 1) == 0
        points = grid_of(made, tmp_path).points
        assert points[-1].config(50304).to_dict() == config.to_dict()
        assert points[-1].training == training
        arguments = made.training_arguments(str(tmp_path), report_to=[])
        assert arguments.max_steps == training.steps
        per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        assert per_step * options.get("gpus", 1) * training.sequence_length == training.batch_tokens


def test_what_the_paper_did_not_train_is_said_to_be_an_extrapolation() -> None:
    made = recipe(20, 512, tokens=1e9)
    assert {"depth", "width", "tokens", "weight decay", "initialisation", "learning rate"} <= set(made.extrapolated)


@pytest.mark.parametrize(("layers", "decay"), [(4, 0.1), (16, 0.1), (23, 0.1), (24, 0.3), (32, 0.3), (80, 0.3)])
def test_weight_decay_is_that_of_the_nearest_depth_that_was_swept(layers: int, decay: float) -> None:
    made = recipe(layers, 64, tokens=1e6, vocab_size=300)
    assert made.training.weight_decay == decay
    assert ("weight decay" in made.extrapolated) == (layers not in (16, 32))


@pytest.mark.parametrize(
    ("width", "rate"), [(32, 1e-2), (64, 1e-2), (128, 5.6e-3), (256, 3.2e-3), (768, 1.3e-3), (1024, 1e-3), (4096, 1e-3)]
)
def test_the_learning_rate_falls_with_the_width_from_the_studys_to_the_papers(width: int, rate: float) -> None:
    made = recipe(16, width, tokens=1e9)
    assert made.training.learning_rate == pytest.approx(rate)


def test_narrow_models_start_with_the_gain_of_the_papers_1b_model() -> None:
    made = recipe(**SMALL, tokens=2e6)
    assert made.config.initializer_range**2 * 64 == pytest.approx(0.02**2 * 2048, rel=0.01)


# Budgets


@pytest.mark.parametrize("budget", [{"flops": 1e15}, {"flops": 3e17}, {"gpu_hours": 1, "gpu": "a100"}])
def test_a_budget_of_operations_is_spent_and_not_exceeded(budget: dict[str, float]) -> None:
    made = recipe(4, 128, **budget)
    spent = made.flops / budget["flops"] if "flops" in budget else made.gpu_hours / budget["gpu_hours"]
    assert 0.99 < spent <= 1


def test_a_small_budget_shortens_sequences_before_it_takes_steps_away() -> None:
    lengths = []
    for tokens in (128_000, 1e6, 2e6, 1e7, 3.3e7, 1e9):
        training = recipe(**SMALL, tokens=tokens).training
        assert training.steps >= 1000
        assert training.sequences >= 8
        lengths.append(training.sequence_length)
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (16, 4096)


# Constraints


@pytest.mark.parametrize(("heads", "group"), [(16, 2), (10, 2), (35, 5), (7, 7), (5, 5), (1, 1), (560, 2)])
def test_the_group_is_the_smallest_that_the_heads_allow(heads: int, group: int) -> None:
    config = recipe(2, 1120, tokens=1e6, vocab_size=300, heads=heads).config
    assert (config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads) == (heads, group)


def test_heads_and_key_value_heads_can_be_split() -> None:
    for multiple in (2, 4, 8):
        config = recipe(2, 1024, tokens=1e6, vocab_size=300, head_multiple=multiple).config
        assert config.num_key_value_heads % multiple == 0
    config = recipe(2, 1120, tokens=1e6, vocab_size=300, heads=16, head_multiple=16).config
    assert config.num_key_value_heads == 16


def test_dense_means_no_experts_anywhere(tmp_path: Path) -> None:
    made = recipe(**SMALL, tokens=2e6, dense=True)
    assert made.config.num_experts is None
    assert all(point.config(300).num_experts is None for point in grid_of(made, tmp_path).points)


def test_a_width_that_experts_cannot_be_computed_at_gives_a_dense_model_and_says_so() -> None:
    made = recipe(2, 100, tokens=1e6)
    assert made.config.num_experts is None
    assert "multiple of 8" in next(row.why for row in made.evidence if row.choice == "experts")


def test_sequences_are_no_longer_than_is_allowed() -> None:
    assert recipe(**SMALL, tokens=1e9, max_length=3000).training.sequence_length == 2048
    assert recipe(**SMALL, tokens=1e9, max_length=512).config.max_position_embeddings == 512


def test_less_memory_means_smaller_micro_batches_then_checkpointing_then_fewer_experts_then_none() -> None:
    shape = {"layers": 8, "width": 256, "vocab_size": 300, "tokens": 1e9}
    needs = recipe(**shape).memory / 1e9
    seen = []
    for share in (1.2, 0.6, 0.4, 0.15, 0.1, 0.06):
        made = recipe(**shape, memory=needs * share)
        assert made.memory <= 0.9 * needs * share * 1e9
        seen.append((made.config.num_experts or 0, made.training.gradient_checkpointing))
    assert seen == [(64, False), (64, False), (64, True), (32, True), (16, True), (0, True)]
    assert recipe(**shape, memory=needs * 0.6).training.micro_batch_size < recipe(**shape).training.micro_batch_size


def test_more_gpus_share_a_model_that_one_cannot_hold() -> None:
    alone = recipe(**PAPER_SHAPE, tokens=5e9)
    assert "One H100 SXM has 80 GB" in alone.warnings[0]
    shared = recipe(**PAPER_SHAPE, tokens=5e9, gpus=8, memory=80)
    assert shared.config.num_experts == 64
    assert shared.training.fsdp
    assert shared.memory < 80e9


def test_the_cost_is_that_of_the_last_model_in_the_plan_of_the_sweep(tmp_path: Path) -> None:
    made = recipe(**PAPER_SHAPE, tokens=5e9, gpus=8, memory=80)
    (tmp_path / "sweep.yaml").write_text(made.sweep_yaml())
    sweep = load_sweep(tmp_path / "sweep.yaml")
    point = plan(sweep, expand(sweep), gpu="h100", gpus=8).points[-1]
    assert point.size == made.size
    assert point.flops == made.flops
    assert point.gpu_hours == pytest.approx(made.gpu_hours)
    assert point.memory.total == made.memory
    assert point.fits


def test_a_sweep_of_a_recipe_that_is_the_plain_model_has_one_point(tmp_path: Path) -> None:
    made = recipe(**SMALL, tokens=2e6, dense=True, heads=1)
    assert [point.variant for point in grid_of(made, tmp_path).points] == ["1-plain"]


def test_layernorm_scaling_is_a_step_of_its_own_and_warns_beside_an_initialisation_scaled_by_depth(
    tmp_path: Path,
) -> None:
    made = recipe(**SMALL, tokens=2e6, norm_scaling="depth")
    points = grid_of(made, tmp_path).points
    assert [point.config(300).norm_scaling for point in points] == ["none"] * (len(points) - 1) + ["depth"]
    assert made.warnings == []
    (warning,) = recipe(**SMALL, tokens=2e6, norm_scaling="depth", depth_scaled_init=True).warnings
    assert "loses its effect" in warning


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs one budget"),
        ({"tokens": 1e6, "flops": 1e15}, "needs one budget"),
        ({"tokens": 1000}, "a training needs at least 128,000"),
        ({"tokens": float("nan")}, "tokens is nan; give a finite number"),
        ({"flops": float("inf")}, "flops is inf; give a finite number"),
        ({"gpu_hours": -float("inf")}, "gpu_hours is -inf; give a finite number"),
        ({"tokens": 1e9, "gpus": 11}, "gpus is 11, .* give 10 or 12"),
        ({"tokens": 1e6, "layers": 0}, "layers is 0"),
        ({"tokens": 1e6, "width": 1009}, "cannot be split into heads"),
        ({"tokens": 1e6, "heads": 15}, "heads is 15, which does not divide the width"),
        ({"tokens": 1e6, "heads": 32, "head_multiple": 3}, "not a multiple of head_multiple"),
        ({"tokens": 1e6, "heads": 64}, "an even number"),
        ({"tokens": 1e6, "memory": 1e-5}, "give more gpus or memory"),
        ({"tokens": 1e6, "gpus": 1000}, "a step has"),
        ({"gpu_hours": 1, "gpu": "abacus"}, "gpu is 'abacus'; give one of"),
        ({"tokens": 1e6, "max_length": 4}, "max_length is 4"),
        ({"tokens": 1e6, "norm_scaling": "width"}, "'none' or 'depth'"),
        ({"gpu_hours": 1, "utilisation": 1.5}, "at most 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        recipe(**{**SMALL, **options})


@pytest.mark.parametrize("name", ["layers", "width", "gpus", "heads", "head_multiple", "max_length", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 10**12, 10**400, 1.5, True, "x", float("nan"), float("inf")])
def test_absurd_counts_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"^{name} is "):
        recipe(**{**SMALL, "tokens": 2e6, name: value})


@pytest.mark.parametrize("name", ["tokens", "flops", "gpu_hours", "memory", "utilisation"])
@pytest.mark.parametrize("value", [0, -1, 1e300, 10**400, True, "x", float("nan"), float("inf")])
def test_absurd_amounts_are_refused_by_name(name: str, value: object) -> None:
    budget = {"tokens": 2e6} if name in ("memory", "utilisation") else {}
    with pytest.raises(SettingsError, match=f"^{name} is "):
        recipe(**{**SMALL, **budget, name: value})


def test_a_budget_as_large_as_is_allowed_and_no_size_at_all_are_told_apart() -> None:
    assert recipe(**SMALL, tokens=9e18).training.steps > 1e13
    for too_much in ({"tokens": 1e19}, {"flops": 1e40}, {"gpu_hours": 1e30}):
        with pytest.raises(SettingsError, match=f"^{next(iter(too_much))} is .* allows .* tokens"):
            recipe(**SMALL, **too_much)
    for missing in ({"layers": None}, {"width": None}, {"vocab_size": None}, {"gpus": None}, {"gpu": None}):
        with pytest.raises(SettingsError, match=f"^{next(iter(missing))} is "):
            recipe(**{**SMALL, "tokens": 2e6, **missing})


def test_a_recipe_of_many_layers_builds_no_more_layers_than_one_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recipe takes does not grow with its depth: 10,000 layers were minutes, most of them in building layers."""
    from depthscope.models import modeling_depthlm

    built = []

    class Counted(modeling_depthlm.DepthLMDecoderLayer):
        def __init__(self, *args: object) -> None:
            built.append(1)
            super().__init__(*args)

    monkeypatch.setattr(modeling_depthlm, "DepthLMDecoderLayer", Counted)
    numbers = []
    for layers in (10, 10_000):
        built.clear()
        made = recipe(layers, 64, vocab_size=300, tokens=1e9, gpus=2, memory=1e6)
        recipe_markdown(made), made.sweep_yaml(), made.training_json()
        numbers.append(len(built))
    assert 0 < numbers[1] <= numbers[0] < 100
    ten, eleven = (recipe(layers, 64, vocab_size=300, tokens=1e9).size.total for layers in (10, 11))
    assert made.size.total == ten + 9990 * (eleven - ten)


# What comes out


def test_the_name_stays_the_function_when_its_modules_are_imported() -> None:
    import depthscope.cli.recipe
    import depthscope.recipes.rule

    assert callable(depthscope.recipe)


def test_a_model_trains_with_what_the_recipe_says(tmp_path: Path) -> None:
    made = recipe(**SMALL, tokens=128_000)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made.config)
    ids = torch.randint(300, (64, made.training.sequence_length))
    data = Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")
    arguments = made.training_arguments(str(tmp_path), max_steps=8, warmup_steps=1, report_to=[], disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 8
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decays == {0.0, made.training.weight_decay}


def test_the_files_are_read_by_those_who_read_such_files(tmp_path: Path) -> None:
    made = recipe(**SMALL, tokens=2e6, gpus=2, memory=80)
    names = [path.name for path in write_recipe(made, tmp_path / "new" / "folder")]
    assert names == ["config.json", "training_arguments.json", "sweep.yaml", "recipe.md"]
    folder = tmp_path / "new" / "folder"
    loaded = AutoConfig.from_pretrained(folder)
    assert type(loaded) is DepthLMConfig
    assert loaded.to_diff_dict() == made.config.to_diff_dict()
    fields = json.loads((folder / "training_arguments.json").read_text())
    fields |= {"bf16": False, "use_cpu": True, "fsdp": False}  # of the machine that trains, not of this one
    (arguments,) = HfArgumentParser(TrainingArguments).parse_dict(fields)
    assert (arguments.weight_decay, arguments.max_steps) == (made.training.weight_decay, made.training.steps)
    assert expand(load_sweep(folder / "sweep.yaml")).points[-1].training == Training(**made.training.model_dump())
    assert (folder / "recipe.md").read_text() == recipe_markdown(made)


@pytest.mark.parametrize(
    ("options", "launched"),
    [
        ({}, "depthscope sweep run"),
        ({"gpus": 6, "gpu": "RTX 4090"}, "torchrun --nproc-per-node 6 -m depthscope sweep run"),
        ({"gpus": 9, "utilisation": 0.25}, "torchrun --nnodes 3 --nproc-per-node 3 "),
    ],
)
def test_the_commands_at_the_head_of_the_sweep_do_what_they_say(
    options: dict, launched: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(**SMALL, tokens=1e9, **options)
    write_recipe(made, tmp_path)
    monkeypatch.chdir(tmp_path)
    head = (tmp_path / "sweep.yaml").read_text().partition("\nname:")[0]
    commands = [line.removeprefix("#   ") for line in head.splitlines() if "depthscope sweep" in line]
    reckon, run = (shlex.split(command.partition("depthscope ")[2]) for command in commands)
    planned = CliRunner().invoke(app, [*reckon, "--markdown"])
    assert planned.exit_code == 0, planned.output
    assert commands[1].startswith(launched)
    assert f"`{commands[1].partition('sweep.yaml')[0]}" in planned.output
    assert f"{made.request.kind.name} at {made.request.utilisation:.0%}" in planned.output
    assert f"over {made.request.gpus} GPUs" in planned.output or made.request.gpus == 1
    listed = CliRunner().invoke(app, [*run, "--dry-run"])
    assert listed.exit_code == 0, listed.output


def test_the_markdown_has_a_row_for_each_choice(papers: Recipe) -> None:
    rows = [line for line in recipe_markdown(papers).splitlines() if line.startswith("| ")]
    assert len(rows) == len(papers.evidence) + 2
    assert {line.count(" | ") for line in rows} == {4}
    assert r"| learning rate \* | 0.001 |" in recipe_markdown(papers)


def test_the_documented_table_is_current() -> None:
    document = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
    table = document.partition("<!-- recipe -->\n")[2].partition("<!-- /recipe -->")[0]
    assert table == recipe_markdown(recipe(**PAPER_SHAPE, tokens=5e9, gpus=8, memory=80))


# The command


def test_the_command_prints_the_reasons_and_writes_the_files(tmp_path: Path) -> None:
    arguments = ["--layers", "32", "--width", "1120", "--tokens", "5e9", "--out", str(tmp_path)]
    run = depthscope("recipe", *arguments, COLUMNS="80")
    assert run.returncode == 0, run.stderr
    assert max(map(len, run.stdout.splitlines())) <= 80
    for said in ("T = 4,096", "G = 2 (8 KV heads)", "64, top 8", "small models disagree", "7.94 B parameters"):
        assert said in run.stdout
    assert AutoConfig.from_pretrained(tmp_path).num_experts == 64
    assert len(expand(load_sweep(tmp_path / "sweep.yaml")).points) == 5


def test_the_command_refuses_what_cannot_be_with_one_message_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    budget = ["--tokens", "1e6"]
    for arguments, message in (
        (["--width", "64"], "needs one budget"),
        (["--width", "1120", *budget, "--heads", "15"], "does not divide the width"),
        (["--width", "64", *budget, "--memory", "0.00001"], "give more gpus or memory"),
        (["--width", "64", *budget, "--out", str(tmp_path / "file")], "cannot create the folder"),
    ):
        run = CliRunner().invoke(app, ["recipe", "--layers", "4", *arguments])
        assert run.exit_code == 2
        assert message in run.stderr
        assert run.stdout == ""
        assert len(run.stderr.strip().splitlines()) == 1
