"""DepthLM on two processes: split by tensors, experts, stages or shards, it computes what one process computes.

Two processes (gloo, CPU) run every case once and write down what they found; the tests read it.
"""

import json
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock
from packaging.version import Version
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from commands import in_two_processes
from depthlm import KINDS, random_ids, tiny_depthlm
from depthscope.models import DepthLMForCausalLM

CLOSE = 1e-5
TWO: dict = {"num_hidden_layers": 2}  # a layer of each kind that a model has
# One head of keys cannot be split; "full" norms need whole heads on every process, so there it need not be.
TENSOR_PARALLEL: dict[str, tuple[str, dict]] = {
    **{kind: (kind, TWO) for kind in KINDS if kind != "mqa"},
    "sliding": ("sliding", TWO | {"layer_types": ["sliding_attention", "full_attention"]}),
    "mix": ("mix", TWO | {"mix_post_layers": 1}),
    "biases": ("gqa", TWO | {"attention_bias": True, "mlp_bias": True}),
    "mqa_qk_norm_full": ("mqa", TWO | {"qk_norm": "full"}),
    "moe_shared_qk_norm_full": ("moe_shared", TWO | {"qk_norm": "full"}),
    "moe_shared_qk_norm_head": ("moe_shared", TWO | {"qk_norm": "head"}),
}
EXPERT_PARALLEL = {
    "tensors_and_experts": {"tp_size": 2, "ep_size": 2},
    "shards_and_experts": {"fsdp_size": 2, "ep_size": 2},
}
DATA_PARALLEL = ("dense", "moe", "moe_shared", "tied")


def saved(name: str) -> DepthLMForCausalLM:
    """The model that two processes load."""
    kind, changes = TENSOR_PARALLEL[name]
    return tiny_depthlm(kind, **changes)


# --- what each of the two processes does ----------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts that other processes hold."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference between tensors of the same names."""
    assert found.keys() == expected.keys()
    return max((whole(found[name]) - tensor).abs().max().item() for name, tensor in expected.items())


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Those of the training loss, for batches of two the mean."""
    model.train()
    for rows in ids.split(2):
        (model(input_ids=rows, labels=rows).loss / (len(ids) / 2)).backward()
    return {name.removeprefix("module."): weight.grad for name, weight in model.named_parameters()}


def split_model(folder: Path, **sizes: int) -> dict[str, float | bool | list[str]]:
    """A saved model loaded in parts, beside the same in one piece."""
    split = DepthLMForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))
    one = DepthLMForCausalLM.from_pretrained(folder)
    # With shards each process has its own rows, otherwise all have the same.
    every, rank = random_ids(4, 12), distributed.get_rank()
    mine = every[2 * rank :][:2] if "fsdp_size" in sizes else every[:2]
    with torch.no_grad():
        outcome: dict = {"logits": (split(mine).logits - one(mine).logits).abs().max().item()}
    if "pp_size" in sizes:
        return outcome
    generated = split.generate(mine, do_sample=False, max_new_tokens=4)
    outcome["generated"] = torch.equal(generated, one.generate(mine, do_sample=False, max_new_tokens=4))
    expected = gradients(one, every if "fsdp_size" in sizes else mine)
    outcome["gradients"] = furthest(gradients(split, mine), expected)
    outcome["split"] = [name for name, weight in split.named_parameters() if isinstance(weight, DTensor)]
    if set(sizes) == {"tp_size"}:
        split.save_pretrained(folder / "again")
        distributed.barrier()
        again = DepthLMForCausalLM.from_pretrained(folder / "again").state_dict()
        outcome["saved"] = all(torch.equal(again[name], weight) for name, weight in one.state_dict().items())
    return outcome


def train_a_step(kind: str, shard: Callable[[DepthLMForCausalLM], nn.Module]) -> dict[str, float]:
    """A step of two processes with two rows each, beside one of a single process with four."""
    ids, rank = random_ids(4, 12), distributed.get_rank()
    model, one = tiny_depthlm(kind, **TWO), tiny_depthlm(kind, **TWO)
    wrapped = shard(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, one)]
    before = {name: weight.clone() for name, weight in one.state_dict().items()}
    found, expected = gradients(wrapped, ids[2 * rank :][:2]), gradients(one, ids)
    outcome = {"gradients": furthest(found, expected)}
    for optimizer in optimizers:
        optimizer.step()
    outcome["weights"] = furthest(dict(model.named_parameters()), dict(one.named_parameters()))
    outcome["moved"] = max((weight - before[name]).abs().max().item() for name, weight in one.state_dict().items())
    return outcome


def shard_by_layer(model: DepthLMForCausalLM) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert len(layers) == model.config.num_hidden_layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    return model


def cases(folder: Path) -> dict[str, Callable[[], dict]]:
    """Everything there is to run, by name."""
    every: dict[str, Callable[[], dict]] = {}
    for name in TENSOR_PARALLEL:
        every[f"tensors-{name}"] = lambda name=name: split_model(folder / name, tp_size=2)
    for how, sizes in EXPERT_PARALLEL.items():
        for name in ("moe", "moe_shared"):
            every[f"{how}-{name}"] = lambda name=name, sizes=sizes: split_model(folder / name, **sizes)
    for name in DATA_PARALLEL:
        every[f"shards-{name}"] = lambda name=name: split_model(folder / name, fsdp_size=2)
        every[f"stages-{name}"] = lambda name=name: split_model(folder / name, pp_size=2)
        every[f"fully_shard-{name}"] = lambda name=name: train_a_step(name, shard_by_layer)
        every[f"copies-{name}"] = lambda name=name: train_a_step(name, DistributedDataParallel)
    return every


def run_every_case(rank: int, folder: Path, rendezvous: str) -> None:
    """The work of one process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    outcomes = {}
    for name, case in cases(folder).items():
        try:
            outcomes[name] = case()
        except Exception:
            outcomes[name] = {"error": traceback.format_exc()}
        distributed.barrier()
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    distributed.barrier()  # a process that ends before the others takes their connections with it
    distributed.destroy_process_group()


# --- what the tests see ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """The outcome of each case on each of the two processes, computed once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "depthlm-distributed"
    files = [folder / f"outcomes-{rank}.json" for rank in range(2)]
    with FileLock(f"{folder}.lock"):
        if not all(file.exists() for file in files):
            for name in TENSOR_PARALLEL:
                model = saved(name)
                for weight_name, weight in model.named_parameters():
                    if weight_name.endswith("bias"):
                        nn.init.normal_(weight, std=0.2)
                model.save_pretrained(folder / name)
            with pytest.MonkeyPatch.context() as patch:
                # Two processes cannot share one accelerator by gloo.
                patch.setenv("CUDA_VISIBLE_DEVICES", "")
                # A file, because a port that is free now may be taken when it is used.
                rendezvous = f"file://{tempfile.mkdtemp(dir=folder)}/rendezvous"
                in_two_processes(run_every_case, folder, rendezvous)
    return [json.loads(file.read_text()) for file in files]


def of_both(outcomes: list[dict[str, dict]], case: str) -> list[dict]:
    for outcome in outcomes:
        assert "error" not in outcome[case], outcome[case]["error"]
    return [outcome[case] for outcome in outcomes]


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_tensor_parallel_is_one_model(outcomes: list[dict], name: str) -> None:
    for outcome in of_both(outcomes, f"tensors-{name}"):
        assert outcome["logits"] < CLOSE
        assert outcome["gradients"] < CLOSE
        assert outcome["generated"]
        assert outcome["saved"]
        # All the matrices of all layers are split, but for the small one of the router.
        model = saved(name)
        matrices = {name for name, weight in model.model.layers.named_parameters("model.layers") if weight.dim() > 1}
        assert matrices - set(outcome["split"]) == {name for name in matrices if name.endswith("mlp.gate.weight")}


@pytest.mark.parametrize("name", ["moe", "moe_shared"])
@pytest.mark.parametrize(
    "how",
    [
        "tensors_and_experts",
        pytest.param(
            "shards_and_experts",
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.23"), reason="fails in transformers before 5.23"
            ),
        ),
    ],
)
def test_expert_parallel_is_one_model(outcomes: list[dict], how: str, name: str) -> None:
    for outcome in of_both(outcomes, f"{how}-{name}"):
        assert outcome["logits"] < CLOSE
        assert outcome["gradients"] < CLOSE
        assert outcome["generated"]
        assert {name for name in outcome["split"] if "mlp.experts." in name} == {
            name for name, _ in saved(name).named_parameters() if "mlp.experts." in name
        }


@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_shards_of_transformers_are_one_model(outcomes: list[dict], name: str) -> None:
    for outcome in of_both(outcomes, f"shards-{name}"):
        assert outcome["logits"] < CLOSE
        assert outcome["gradients"] < CLOSE
        assert outcome["generated"]
        assert len(outcome["split"]) == len(list(saved(name).parameters()))


@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_stages_are_one_model(outcomes: list[dict], name: str) -> None:
    for outcome in of_both(outcomes, f"stages-{name}"):
        assert outcome["logits"] < CLOSE


@pytest.mark.parametrize("name", DATA_PARALLEL)
@pytest.mark.parametrize("how", ["fully_shard", "copies"])
def test_a_step_on_two_processes_is_the_step_of_one(outcomes: list[dict], how: str, name: str) -> None:
    for outcome in of_both(outcomes, f"{how}-{name}"):
        assert outcome["gradients"] < CLOSE
        assert outcome["weights"] < CLOSE
        assert outcome["moved"] > 0.01


# --- the plans, without any process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "head"}, {"qk_norm": "full"}])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tensor_parallel_plan_names_what_is_there_and_all_of_it(kind: str, changes: dict) -> None:
    model = tiny_depthlm(kind, **changes).model
    layers = {f"layers.{index}": f"layers.{index}." for index in range(len(model.layers))}
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()]]
    expanded = {
        rule.replace("*", prefix.split(".")[1], 1): rule
        for rule in model.config.base_model_tp_plan
        for prefix in layers.values()
    }
    used = {expanded[name] for name in names if name in expanded}
    assert used == set(model.config.base_model_tp_plan)
    for name, weight in model.named_parameters():
        if name.startswith("layers.") and weight.dim() > 1 and not name.endswith("mlp.gate.weight"):
            assert name in expanded or name.removesuffix(".weight") in expanded, name


def test_the_expert_parallel_plan_names_the_experts() -> None:
    model = tiny_depthlm("moe_shared").model
    names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    assert {rule.replace("*", "1") for rule in model.config.base_model_ep_plan} <= names
