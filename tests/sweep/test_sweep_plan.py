"""What a sweep would cost: against sums by hand, and memory against what autograd really keeps."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from depthlm import random_ids
from depthscope.cli import app
from depthscope.errors import SettingsError
from depthscope.models import DepthLMConfig, DepthLMForCausalLM
from depthscope.sweep.cost.memory import activation_bytes, needed_memory
from depthscope.sweep.cost.plan import CostPlan, launcher, plan
from depthscope.sweep.grid import expand
from depthscope.sweep.specification import Training, load_sweep
from depthscope.wording.numbers import format_count
from sweeps import write_sweep

VOCABULARY = 50304
# One point of the depth sweep, which is quicker to reckon than four.
ONE = {"grid": {"depth": {"num_hidden_layers": 4}}}
TWO = {"depth": {"num_hidden_layers": [2, 4]}}


def planned(source: str | Path, changes: dict | None = None, **options: object) -> CostPlan:
    sweep = load_sweep(source, changes)
    return plan(sweep, expand(sweep), **{"gpu": "h100", "gpus": 8, "utilisation": 0.4, **options})


def depthscope(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100", "NO_COLOR": "1"})


def test_a_dense_point_by_hand() -> None:
    """16 layers of the depth sweep: d = 2048, 16 heads of 128, I = 8192, T = 1024."""
    made = planned("paper-depth", {"grid": {"depth": {"num_hidden_layers": 16}}})
    point = made.points[0]
    layer = 4 * 2048 * 2048 + 3 * 2048 * 8192
    parameters = 2 * VOCABULARY * 2048 + 16 * (layer + 2 * 2048) + 2048
    assert point.size.total == point.size.active == parameters
    steps = 5_000_000_000 // (256 * 1024)
    assert (point.steps, point.tokens) == (steps, steps * 256 * 1024)
    # 6 for each weight of a product, the head with them; of attention, 12 for each feature and position attended to.
    per_token = 6 * (16 * layer + VOCABULARY * 2048) + 12 * 16 * 2048 * (1024 + 1) / 2
    assert point.size.training_flops_per_token == round(per_token)
    assert point.flops == round(per_token) * steps * 256 * 1024
    assert point.gpu_hours == pytest.approx(point.flops / (989e12 * 0.4) / 3600)
    memory = point.memory
    assert memory.weights == memory.gradients == 4 * parameters / 8
    assert memory.optimizer == 8 * parameters / 8
    # Under FSDP a token keeps, in each layer, 16 d, 4 h (H + K) and 8 I; 10 d of the last norm; 10 of each logit.
    kept = 16 * (16 * 2048 + 4 * 128 * 32 + 8 * 8192) + 10 * 2048 + 10 * VOCABULARY
    assert memory.activations == 8 * 1024 * kept
    assert memory.total == memory.weights * 4 + memory.copies + memory.activations
    assert point.fits


def test_a_point_with_experts_by_hand() -> None:
    """The MoE of 7B: d = 2048, 16 heads, 64 experts of 1024 of which a token sees 8, T = 4096."""
    point = planned("paper-moe-1b", gpu="h200", gpus=4, utilisation=0.3).points[1]
    attention, expert, router = 4 * 2048 * 2048, 3 * 2048 * 1024, 64 * 2048
    rest = 2 * VOCABULARY * 2048 + 16 * (attention + router + 2 * 2048) + 2048
    assert point.size.total == rest + 16 * 64 * expert
    assert point.size.active == rest + 16 * 8 * expert
    products = VOCABULARY * 2048 + 16 * (attention + router + 8 * expert)
    per_token = round(6 * products + 12 * 16 * 2048 * (4096 + 1) / 2)
    assert point.size.training_flops_per_token == per_token
    tokens = 5_000_000_000 // 262_144 * 262_144
    assert point.gpu_hours == pytest.approx(per_token * tokens / (989e12 * 0.3) / 3600)
    assert point.memory.weights == 4 * (rest + 16 * 64 * expert) / 4
    kept = 16 * (16 * 2048 + 4 * 128 * 32 + 8 * 2 * (2 * 2048 + 4 * 1024)) + 10 * 2048 + 10 * VOCABULARY
    assert point.memory.activations == 2 * 4096 * kept


def kept_for_backward(config: DepthLMConfig, training: Training, rows: int) -> int:
    """Bytes of all tensors that a forward pass keeps, but for weights and their copies, as autograd says."""
    torch.manual_seed(0)
    config._attn_implementation = "eager" if training.attention == "eager" else "sdpa"
    model = DepthLMForCausalLM(config).train()
    if training.fsdp:
        model.to(torch.bfloat16)  # as FSDP's mixed precision hands the weights to the products
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    shapes = {tuple(weight.shape[::step]) for weight in model.parameters() if weight.dim() == 2 for step in (1, -1)}
    shapes = {*shapes, *(shape[::-1] for shape in shapes)}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = random_ids(rows, training.sequence_length)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=training.precision != "float32"),
    ):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(size for size, _ in kept.values())


MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ({}, {}),
        ({"num_key_value_heads": 2}, {}),
        (MOE, {}),
        ({**MOE, "shared_expert_intermediate_size": 40}, {}),
        ({}, {"fsdp": True}),
        (MOE, {"fsdp": True}),
        ({}, {"precision": "float32"}),
        ({}, {"attention": "eager"}),
        ({"norm_placement": "post"}, {}),
        ({"norm_placement": "peri"}, {}),
        ({"norm_scaling": "depth"}, {}),
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(model: dict, training: dict) -> None:
    shape = {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 320, "num_hidden_layers": 4}
    config = DepthLMConfig(**{**shape, "vocab_size": 96, "max_position_embeddings": 72, **model})
    settings = Training(sequence_length=72, batch_tokens=144, **training)
    # Of the loss, autograd keeps the log-probabilities in float32.
    expected = 2 * 72 * (activation_bytes(config, settings) + 4 * 96)
    assert kept_for_backward(config, settings, 2) == pytest.approx(expected, rel=0.05)


def test_checkpointing_keeps_one_layer_at_a_time() -> None:
    config = DepthLMConfig(
        hidden_size=128, num_attention_heads=8, intermediate_size=320, num_hidden_layers=12, vocab_size=96
    )
    plain, checkpointed = (
        Training(sequence_length=72, batch_tokens=144, gradient_checkpointing=on) for on in (False, True)
    )
    inputs = kept_for_backward(config, checkpointed, 2)
    layer = (activation_bytes(config, plain) - 10 * 128) / 12 * 144
    # While the backward pass goes through a layer, what that layer keeps is there too.
    assert activation_bytes(config, checkpointed) * 144 + 4 * 96 * 144 == pytest.approx(inputs + layer, rel=0.02)


def test_gpus_share_the_states_but_not_the_activations() -> None:
    on_8, on_16 = (planned("paper-depth", ONE, gpus=gpus).points[0].memory for gpus in (8, 16))
    assert on_16.weights * 2 == on_8.weights
    assert on_16.optimizer * 2 == on_8.optimizer
    assert (on_16.activations, on_16.copies) == (on_8.activations, on_8.copies)
    alone = planned("paper-depth", {**ONE, "training": {"fsdp": False}}).points[0]
    assert alone.gpus == 1
    assert alone.memory.weights == 8 * on_8.weights


def test_a_model_that_does_not_fit_is_named_with_what_helps() -> None:
    made = planned("paper-moe-1b", gpu="rtx4090", gpus=2)
    assert [point.fits for point in made.points] == [False, False]
    assert "Too large for 90% of 24 GB: dense, moe." in made.notes[-1]
    assert not any("Too large" in note for note in planned("paper-moe-1b").notes)


def test_totals_count_every_seed() -> None:
    one, three = (planned("paper-depth", {"grid": TWO, "seeds": seeds}) for seeds in ([0], [0, 1, 2]))
    assert len(one.points) == len(three.points) == 2
    assert three.flops == 3 * one.flops == 3 * sum(point.flops for point in one.points)
    assert three.tokens == 3 * one.tokens
    assert three.gpu_hours == pytest.approx(3 * one.gpu_hours)
    assert "Total: 6 models, 30B tokens" in three.to_markdown()


def test_the_command_is_torchrun_for_models_that_are_shared(tmp_path: Path) -> None:
    assert planned("paper-depth", ONE).command == "torchrun --nproc-per-node 8 -m depthscope sweep run paper-depth"
    two_nodes = planned("paper-depth", ONE, gpus=16).command
    assert two_nodes.startswith("torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d")
    file = write_sweep(tmp_path)
    assert planned(file).command == f"depthscope sweep run {file}"


@pytest.mark.parametrize(
    ("gpus", "nodes", "a_node"), [(9, 3, 3), (10, 2, 5), (12, 2, 6), (15, 3, 5), (22, 11, 2), (28, 4, 7), (64, 8, 8)]
)
def test_as_many_processes_are_started_as_the_table_counts_gpus(gpus: int, nodes: int, a_node: int) -> None:
    made = planned("paper-depth", {**ONE, "training": {"batch_tokens": 1024 * 8 * gpus}}, gpus=gpus)
    assert made.points[0].gpus == gpus == nodes * a_node
    assert f"torchrun --nnodes {nodes} --nproc-per-node {a_node} " in made.command


@pytest.mark.parametrize("gpus", [11, 13, 121])
def test_gpus_that_equal_nodes_cannot_have_are_refused_with_numbers_that_they_can(gpus: int) -> None:
    shared = {**ONE, "training": {"batch_tokens": 1024 * 8 * gpus}}
    with pytest.raises(SettingsError, match=f"gpus is {gpus}, .* give {gpus - 1} or {gpus + 1}"):
        planned("paper-depth", shared, gpus=gpus)
    for possible in (gpus - 1, gpus + 1):
        assert launcher(possible).startswith("torchrun --nnodes")
    alone = {**shared, "training": {**shared["training"], "fsdp": False}}
    assert planned("paper-depth", alone, gpus=gpus).command == "depthscope sweep run paper-depth"


def test_counts_that_round_up_to_the_next_unit_are_written_in_it() -> None:
    counts = [0, 999, 1000, 97_412, 999_499, 999_500, 475_000_000, 999_999_999, 1_280_000_000, 1.5e12]
    written = ["0", "999", "1 k", "97.4 k", "999 k", "1 M", "475 M", "1 B", "1.28 B", "1.5 T"]
    assert [format_count(count) for count in counts] == written
    assert format_count(1_280_000_000, gap="") == "1.28B"


def test_a_named_tokenizer_is_not_loaded_to_know_its_size(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, tokenizer={"name": "nobody/nothing"})
    made = planned(file)  # write_sweep gives 280 entries beside the name
    assert made.notes == ("nobody/nothing is assumed to have 280 entries.",)
    smaller = load_sweep(file, {"tokenizer": {"name": "nobody/nothing"}})
    smaller.file.content["tokenizer"].pop("vocab_size")
    specification = type(smaller.specification).model_validate(smaller.file.content)
    assumed = plan(type(smaller)(specification, smaller.file, smaller.folder), expand(smaller))
    assert "assumed to have 50,304 entries" in assumed.notes[0]
    assert assumed.points[0].size.total - made.points[0].size.total == 2 * 16 * (50304 - 280)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu": "abacus"}, "gpu is 'abacus'; give one of a100, h100"),
        ({"utilisation": 1.5}, "utilisation is 1.5"),
        ({"utilisation": 0.0}, "utilisation is 0.0"),
        ({"gpus": 0}, "gpus is 0"),
        ({"gpus": 6}, "256 sequences, which 6 GPUs cannot share evenly in micro-batches of 8"),
        ({"gpus": 64}, None),
    ],
)
def test_what_cannot_be_reckoned_is_refused(options: dict, said: str | None) -> None:
    if said is None:
        assert planned("paper-depth", ONE, **options).points[0].micro_batch == 4
    else:
        with pytest.raises(SettingsError, match=re.escape(said)):
            planned("paper-depth", ONE, **options)


def test_names_of_gpus_may_be_written_in_any_way() -> None:
    assert planned("smoke", gpu="RTX 4090").gpu == planned("smoke", gpu="rtx-4090").gpu


def test_memory_grows_with_the_micro_batch() -> None:
    config = DepthLMConfig.from_preset("dense-2m")
    one, four = (needed_memory(config, Training(), 1, sequences).activations for sequences in (1, 4))
    assert four == 4 * one


def test_the_command_line_prints_the_plan_and_trains_nothing(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    table = depthscope("sweep", "plan", file, "--gpu", "a100")
    assert table.exit_code == 0, table.output
    assert "depth-L2" in table.output
    assert "Total: 2 models" in table.output
    markdown = depthscope("sweep", "plan", file, "--markdown")
    assert markdown.output.startswith("| point | parameters |")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_line_refuses_with_one_message() -> None:
    refused = depthscope("sweep", "plan", "smoke", "--gpu", "abacus")
    assert refused.exit_code == 2
    assert "give one of a100" in refused.output
