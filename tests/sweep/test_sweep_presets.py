"""The sweeps that come with depthscope: the paper's models have the paper's sizes, and all of them train in shards.

Two processes (gloo, CPU) train a shrunken copy of every model for two steps and write down what they found; the tests
read it. Trainer itself does not shard on a CPU.
"""

import json
import math
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from commands import in_two_processes
from depthlm import random_ids
from depthscope.models import DepthLMConfig, DepthLMForCausalLM, ModelSize, model_size
from depthscope.sweep.cost.plan import plan
from depthscope.sweep.extending import preset_names
from depthscope.sweep.grid import Point, digest, expand
from depthscope.sweep.specification import Training, load_sweep

PAPER = (
    "paper-depth",
    "paper-weight-decay",
    "paper-length",
    "paper-gqa",
    "paper-moe-400m",
    "paper-moe-1b",
    "paper-recipe",
)
VOCABULARY = 50304
STEPS, ROWS, LENGTH = 2, 4, 8


def points(preset: str) -> dict[str, Point]:
    return {point.variant: point for point in expand(load_sweep(preset)).points}


def sizes(preset: str) -> dict[str, ModelSize]:
    return {name: model_size(point.config(VOCABULARY)) for name, point in points(preset).items()}


# --- what they are --------------------------------------------------------------------------------------------------


def test_the_presets_are_these() -> None:
    assert set(preset_names()) == {"smoke", "laptop", "laptop-seeds", "norms", *PAPER}


@pytest.mark.parametrize("preset", PAPER)
def test_the_papers_presets_train_as_the_paper_did(preset: str) -> None:
    for point in points(preset).values():
        training = point.training
        assert training.steps == 5_000_000_000 // (256 * 1024)
        assert training.batch_tokens == 256 * 1024
        assert (training.learning_rate, training.warmup_steps, training.min_learning_rate) == (1e-3, 1000, 0.1)
        assert (training.adam_beta1, training.adam_beta2, training.max_grad_norm) == (0.9, 0.95, 1.0)
        assert (training.schedule, training.precision, training.fsdp) == ("cosine", "bfloat16", True)
        assert training.micro_batch_size is not None
        assert training.micro_batch_size * training.sequence_length == 8192
        config = point.config(VOCABULARY)
        assert (config.initializer_range, config.tie_word_embeddings) == (0.02, False)
        assert (config.norm_placement, config.norm_scaling, config.qk_norm) == ("pre", "none", None)


def test_the_papers_presets_vary_what_the_paper_varied() -> None:
    depth, decay, length, gqa = (points(preset).values() for preset in PAPER[:4])
    assert [point.model["num_hidden_layers"] for point in depth] == [12, 16, 24, 32]
    assert [point.training.weight_decay for point in decay] == [0, 0.01, 0.1, 1.0, 3.0]
    assert [point.training.sequence_length for point in length] == [256, 512, 1024, 2048, 4096, 8192]
    assert [16 // point.model["num_key_value_heads"] for point in gqa] == [1, 4, 16]
    recipe = [
        (
            point.config(VOCABULARY).num_hidden_layers,
            point.training.sequence_length,
            point.training.weight_decay,
            point.config(VOCABULARY).num_key_value_heads,
            point.config(VOCABULARY).num_experts,
        )
        for point in points("paper-recipe").values()
    ]
    assert recipe == [
        (16, 1024, 0.1, 16, None),
        (32, 1024, 0.1, 16, None),
        (32, 4096, 0.1, 16, None),
        (32, 4096, 0.3, 16, None),
        (32, 4096, 0.3, 8, None),
        (32, 4096, 0.3, 8, 64),
        (32, 8192, 0.1, 16, None),
        (32, 4096, 0.6, 16, None),
        (32, 4096, 1.0, 16, None),
    ]


def dense(width: int, layers: int, mlp: int, kv_share: float = 1.0) -> float:
    """Parameters of a dense model by hand: two embeddings, attention, a gated MLP, norms."""
    attention = (2 + 2 * kv_share) * width**2
    return 2 * VOCABULARY * width + layers * (attention + 3 * width * mlp + 2 * width) + width


def test_the_papers_models_have_their_sizes() -> None:
    """Within 1%: 1B is 1.28B, as in the paper's files, and 400M is without the input embedding (docs say why)."""
    depth = sizes("paper-depth")
    for (name, size), billions in zip(depth.items(), (1.01, 1.28, 1.82, 2.35), strict=True):
        assert size.total == size.active == dense(2048, int(name.partition("L")[2]), 8192)
        assert size.total == pytest.approx(billions * 1e9, rel=0.01)
    small, large, recipe = sizes("paper-moe-400m"), sizes("paper-moe-1b"), sizes("paper-recipe")
    assert small["dense"].total == dense(1536, 16, 2304)
    assert small["dense"].total - VOCABULARY * 1536 == pytest.approx(400e6, rel=0.01)
    assert (small["moe"].total, small["moe"].active) == (pytest.approx(2e9, rel=0.01), pytest.approx(400e6, rel=0.01))
    assert large["dense"].total == dense(2048, 16, 8192)
    assert large["moe"].total == pytest.approx(6.92e9, rel=0.01)
    assert large["moe"].active == pytest.approx(large["dense"].total, rel=0.01)
    assert [size.total for size in sizes("paper-gqa").values()] == [
        dense(2048, 16, 8192, share) for share in (1, 1 / 4, 1 / 16)
    ]
    assert recipe["5-groups"].total == dense(2048, 32, 8192, 1 / 2)
    assert recipe["6-experts"].total == pytest.approx(7.94e9, rel=0.01)
    assert recipe["6-experts"].active == pytest.approx(1.2e9, rel=0.01)


def test_the_weight_decay_and_length_sweeps_are_one_model() -> None:
    for preset in ("paper-weight-decay", "paper-length"):
        models = [point.model for point in points(preset).values()]
        assert all(model == models[0] == points("paper-depth")["depth-L16"].model for model in models)


def test_the_laptops_models_share_their_baseline() -> None:
    laptop, seeds = expand(load_sweep("laptop")), expand(load_sweep("laptop-seeds"))
    assert len(laptop.points) == 7
    assert len(seeds.points) == 3 * 10
    for family in (*laptop.families, *seeds.families):
        assert "depth-L16" in family.variants, family.name
    assert {point.variant for point in laptop.points} <= {point.variant for point in seeds.points}
    # The embedded corpus, about ten million tokens, none of them twice.
    sweep = load_sweep("laptop-seeds").specification
    assert (sweep.data.text, sweep.data.dataset) == (None, None)
    assert max(point.training.tokens for point in seeds.points) < 8_000_000


def test_the_laptops_experts_have_the_active_parameters_of_the_dense_model() -> None:
    found = {
        name: model_size(point.config(2048)) for name, point in points("laptop").items() if name in ("depth-L16", "moe")
    }
    routers = 16 * 8 * 64
    assert found["moe"].active - routers == found["depth-L16"].active
    assert found["moe"].total > 2 * found["depth-L16"].total


def test_the_norms_preset_compares_five() -> None:
    configs = {name: point.config(32_100) for name, point in points("norms").items()}
    assert {name: config.norm_placement for name, config in configs.items()} == {
        "pre": "pre",
        "post": "post",
        "mix": "mix",
        "peri": "peri",
        "lns": "pre",
    }
    assert [config.norm_scaling for config in configs.values()] == ["none"] * 4 + ["depth"]
    assert configs["mix"].mix_post_layers == 3
    assert model_size(configs["pre"]).total == pytest.approx(134e6, rel=0.01)


# --- two steps in two shards ----------------------------------------------------------------------------------------


def shrunken(point: Point) -> DepthLMConfig:
    """The same structure, small: as many heads, groups and kinds of parts, but few layers and narrow ones."""
    config = point.config(VOCABULARY)
    changes: dict = {
        "num_hidden_layers": max(2, config.num_hidden_layers // 8),
        "hidden_size": 4 * config.num_attention_heads,
        "intermediate_size": 32,
    }
    if config.num_experts is not None:
        changes |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    if config.shared_expert_intermediate_size is not None:
        changes["shared_expert_intermediate_size"] = 24
    if config.norm_placement == "mix":
        changes["mix_post_layers"] = 1
    fields = {**point.model, **changes, "vocab_size": 96, "max_position_embeddings": LENGTH}
    return DepthLMConfig(**fields)


def sharded(model: DepthLMForCausalLM) -> DepthLMForCausalLM:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: DepthLMForCausalLM, training: Training, shares: list[slice]) -> list[dict[str, float]]:
    """Steps of a point's own optimiser over these shares of the rows: the mean loss and the norm of the gradient."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
    )
    model.train()
    outcomes = []
    for step in range(STEPS):
        ids = random_ids(ROWS, LENGTH, seed=step)
        total = 0.0
        for share in shares:
            loss = model(input_ids=ids[share], labels=ids[share]).loss / len(shares)
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        outcomes.append({"loss": total, "norm": whole(norm).item()})
    return outcomes


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def two_steps(point: Point) -> dict:
    """A point's shrunken model in two shards, beside the same in one piece that takes both shares of the rows."""
    rank, half = distributed.get_rank(), ROWS // 2
    halves = [slice(0, half), slice(half, ROWS)]
    torch.manual_seed(0)
    one = DepthLMForCausalLM(shrunken(point))
    torch.manual_seed(0)
    model = sharded(DepthLMForCausalLM(shrunken(point)))
    before = {name: weight.clone() for name, weight in one.named_parameters()}
    found, expected = train(model, point.training, halves[rank : rank + 1]), train(one, point.training, halves)
    alone = dict(one.named_parameters())
    differences = {name: whole(weight) - alone[name] for name, weight in model.named_parameters()}
    return {
        "loss": [step["loss"] for step in found],
        "norm": [step["norm"] for step in found],
        "expected_loss": [step["loss"] for step in expected],
        "expected_norm": [step["norm"] for step in expected],
        "difference": max(difference.abs().max().item() for difference in differences.values()),
        "moved": max((weight - before[name]).abs().max().item() for name, weight in one.named_parameters()),
        "all_sharded": all(isinstance(weight, DTensor) for weight in model.parameters()),
    }


def train_every_point(rank: int, folder: Path, rendezvous: str) -> None:
    """The work of one process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    outcomes: dict[str, dict] = {}
    trained: dict[str, dict] = {}  # points that differ in length alone are one model here
    for preset in (*PAPER, "norms"):
        for name, point in points(preset).items():
            key = digest([shrunken(point).to_dict(), point.training.weight_decay, point.training.learning_rate])
            if key not in trained:
                try:
                    trained[key] = two_steps(point)
                except Exception:
                    trained[key] = {"error": traceback.format_exc()}
                distributed.barrier()
            outcomes[f"{preset}/{name}"] = trained[key]
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    distributed.barrier()  # a process that ends before the others takes their connections with it
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """What each of the two processes found, computed once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sweep-presets"
    folder.mkdir(exist_ok=True)
    files = [folder / f"outcomes-{rank}.json" for rank in range(2)]
    with FileLock(f"{folder}.lock"):
        if not all(file.exists() for file in files):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CUDA_VISIBLE_DEVICES", "")  # two processes cannot share one accelerator by gloo
                rendezvous = f"file://{tempfile.mkdtemp(dir=folder)}/rendezvous"
                in_two_processes(train_every_point, folder, rendezvous)
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("preset", [*PAPER, "norms"])
def test_two_steps_in_two_shards_are_those_of_one_process(outcomes: list[dict], preset: str) -> None:
    for name in points(preset):
        first, second = (outcome[f"{preset}/{name}"] for outcome in outcomes)
        for found in (first, second):
            assert "error" not in found, found["error"]
            assert found["all_sharded"]
            assert found["norm"] == pytest.approx(found["expected_norm"], rel=1e-3)
            assert all(math.isfinite(value) for value in (*found["loss"], *found["norm"]))
            # Adam's first steps are as long as the learning rate, whatever the gradient: rounding may turn a few.
            assert found["difference"] < 0.1 * found["moved"]
            assert found["moved"] > 1e-4
        # Each process has its own rows: the mean of the two losses is that of one process with all of them.
        mean = [(one + other) / 2 for one, other in zip(first["loss"], second["loss"], strict=True)]
        assert mean == pytest.approx(first["expected_loss"], rel=1e-4)


# --- what they cost -------------------------------------------------------------------------------------------------


def test_every_preset_has_a_plan_and_the_documentation_has_it() -> None:
    document = (Path(__file__).parents[2] / "docs" / "sweep-presets.md").read_text()
    for preset in PAPER:
        sweep = load_sweep(preset)
        made = plan(sweep, expand(sweep))
        assert all(point.fits for point in made.points)
        assert made.command == f"torchrun --nproc-per-node 8 -m depthscope sweep run {preset}"
        table = document.partition(f"<!-- plan {preset} -->\n")[2].partition("\n<!-- /plan -->")[0]
        assert table == made.to_markdown()
    for preset in preset_names():
        assert f"`{preset}`" in document
