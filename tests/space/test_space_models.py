"""Models of several architectures through a job of the Space, and a published sweep."""

import json
import threading
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MixtralConfig

import zero_gpu
from depthscope import DepthLMConfig, LayerReport
from limits import Limits
from processes import run, run_apart
from published_sweeps import sweep_of, tell_sweep
from reports import sample_report
from repository import look_up
from tasks import SAMPLE, Task, choose_settings
from tiny_tokenizer import save_tokenizer

LIMITS = Limits(max_job_bytes=4 * 2**30, max_job_seconds=200)
SCORES = ["variance", "skip", "usefulness", "expert_load"]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=300),
    "gpt_neox": GPTNeoXConfig(**SMALL, max_position_embeddings=64),
    "mixtral": MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64),
    "depthlm": DepthLMConfig(**SMALL, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2),
}


def save(config, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def report_of(model, identity="x", name="model"):
    settings = choose_settings(SCORES, 64, 32, layers=3, width=8, limits=LIMITS)
    task = Task(name, model, identity, SAMPLE, settings)
    return LayerReport.from_json(list(run(task, LIMITS, threading.Event()))[-1]["report"])


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_an_uploaded_model_of_each_kind_is_analysed(kind, tmp_path):
    folder = save(CONFIGS[kind], tmp_path / kind)
    report = report_of(tuple(str(path) for path in folder.iterdir() if path.suffix != ".py"))
    assert report.model["model_type"] == kind
    assert len(report.ranked("skip_ratio")) == 3
    assert report.data["fit_blocks"] == 4  # for the 32 features that it turns out to have
    assert report.has("expert_load_max") is (kind in ("mixtral", "depthlm"))


def as_on_zero_gpu(task, folder, limits, emit):
    for message in zero_gpu.on_gpu(task, str(folder), limits, 10.0):
        emit(message)


def test_what_zero_gpu_is_lent_for_gives_the_same_report(tmp_path):
    folder = save(CONFIGS["gpt2"], tmp_path / "model")
    settings = choose_settings(SCORES, 64, 32, layers=3, width=8, limits=LIMITS)
    task = Task("model", tuple(map(str, folder.iterdir())), "x", SAMPLE, settings)
    here, there = (
        LayerReport.from_json(messages[-1]["report"])
        for messages in (
            list(run_apart(partial(as_on_zero_gpu, task), LIMITS, threading.Event())),
            list(run(task, LIMITS, threading.Event())),
        )
    )
    assert here.layers == there.layers
    assert zero_gpu.duration(task, "", LIMITS, 30.0) == 22
    assert zero_gpu.duration(task, "", LIMITS, 1e6) == zero_gpu.LONGEST
    assert not zero_gpu.is_here()


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder = save(CONFIGS["depthlm"], tmp_path / "model")
    witness = tmp_path / "was-here"
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(witness)!r}, 'w')")
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    report = report_of(tuple(map(str, folder.iterdir())))
    assert report.model["model_type"] == "depthlm"
    assert not witness.exists()


def test_a_private_model_is_analysed_with_its_owners_token_and_not_shared(hub, tmp_path):
    folder = save(CONFIGS["gpt2"], tmp_path / "model")
    hub.client.create_repo("ada/secret", private=True)
    hub.client.upload_folder(repo_id="ada/secret", folder_path=folder)
    found = look_up("ada/secret", None, hub.token, LIMITS)
    assert found.restricted
    assert found.weight_bytes == (folder / "model.safetensors").stat().st_size
    assert found.config["model_type"] == "gpt2"
    with pytest.raises(Exception, match="There is no model ada/secret"):
        look_up("ada/secret", None, None, LIMITS)
    task = Task(
        "ada/secret", found, found.sha, SAMPLE, choose_settings(SCORES, 64, 32, layers=3, width=8, limits=LIMITS)
    )
    assert not task.is_shareable


def test_a_published_sweep_is_read_with_its_controls(hub, tmp_path):
    import datasets

    reports = [sample_report(depth, seed=depth) for depth in (4, 8)]
    rows = {
        "report": [report.to_json() for report in reports * 2],
        "trained": [True, True, False, False],
        "model": ["ada/net-4", "ada/net-8"] * 2,
        "layers": [4, 8] * 2,
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "reports.parquet")
    hub.client.create_repo("ada/sweep-reports", repo_type="dataset")
    hub.client.upload_file(
        path_or_fileobj=tmp_path / "reports.parquet",
        path_in_repo="reports.parquet",
        repo_id="ada/sweep-reports",
        repo_type="dataset",
    )
    stats = {
        "step": [1, 1, 2, 2],
        "metric": ["variance"] * 4,
        "layer": [0, 3, 0, 3],
        "value": [0.1, 1.0, 0.2, 2.0],
    }
    datasets.Dataset.from_dict(stats).to_parquet(tmp_path / "layer_stats.parquet")
    hub.client.create_repo("ada/net-4")
    hub.client.upload_file(
        path_or_fileobj=tmp_path / "layer_stats.parquet", path_in_repo="layer_stats.parquet", repo_id="ada/net-4"
    )
    told = []
    tell_sweep("ada/sweep-reports", tmp_path, LIMITS, told.append)  # in this process, which knows this Hub
    sweep = sweep_of(told[-1])
    assert [report.model["num_layers"] for report in sweep.trained] == [4, 8]
    assert len(sweep.untrained) == 2
    assert [(course.name, course.values) for course in sweep.courses] == [("ada/net-4", [1.0, 2.0])]
