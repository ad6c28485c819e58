"""Models of several architectures through a job of the Space, and a published sweep."""

import errno
import json
import threading
import time
from dataclasses import replace
from functools import partial

import gradio as gr
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MixtralConfig

from depthscope import DepthLMConfig, LayerReport, load_model
from depthscope.errors import CorpusError, ModelLoadError, NoLayerStackError, NotCausalError, OutOfMemoryError
from job_functions import as_on_zero_gpu, as_stopped_on_zero_gpu
from jobs import measuring, zero_gpu
from jobs.processes import run, run_apart
from jobs.published_sweeps import sweep_of, tell_sweep
from jobs.queue import Results
from jobs.result_store import ResultStore
from jobs.tasks import SAMPLE, Task, Text, choose_settings
from jobs.visitor import Choices, _pinned
from jobs.worker import _problems
from reports import sample_report
from safety.limits import Limits
from safety.problems import Problem
from safety.repository import HubModel, look_up
from safety.uploads import check_model
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


def test_a_block_begins_as_the_visitor_chose(tmp_path):
    folder = save(CONFIGS["gpt2"], tmp_path / "model")
    settings = choose_settings(["variance"], 64, 32, layers=3, width=8, limits=LIMITS, bos="yes")
    task = Task("model", tuple(str(path) for path in folder.iterdir()), "x", SAMPLE, settings)
    report = LayerReport.from_json(list(run(task, LIMITS, threading.Event()))[-1]["report"])
    assert report.data["bos"] == [0]
    assert report.settings["bos"] == "yes"
    assert report.data["tokens"] == 62
    assert task.key() != replace(task, settings=replace(settings, bos="no")).key()
    with pytest.raises(Problem, match="not a choice for BOS; choose one of auto, yes, no"):
        Choices(("skip",), bos="<b>")


def test_a_pasted_text_that_is_the_name_of_a_file_is_a_text(tmp_path):
    (secret := tmp_path / "secret.txt").write_text("something else entirely " * 50)
    folder = save(CONFIGS["gpt2"], tmp_path / "model")
    loaded = load_model(str(folder))
    settings = choose_settings(["variance"], 4, 2, layers=3, width=8, limits=LIMITS).with_(fit_blocks=0)
    blocks = measuring.read_text(Text("pasted", str(secret)), loaded, settings)
    assert blocks.input_ids.flatten().tolist() == loaded.tokenizer(str(secret)).input_ids[:4]


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
    with pytest.raises(Problem, match="Stopped"):
        list(run_apart(partial(as_stopped_on_zero_gpu, task), LIMITS, threading.Event()))
    assert not zero_gpu.is_here()


def test_a_gpu_is_lent_for_the_measuring_only(monkeypatch):
    settings = choose_settings(SCORES, 64, 32, layers=3, width=8, limits=LIMITS)
    uploaded = Task("model", ("model.gguf",), "x", SAMPLE, settings, seconds=30.0)
    assert zero_gpu.duration(uploaded, "", LIMITS) == 22
    assert zero_gpu.duration(replace(uploaded, seconds=1e6), "", LIMITS) == zero_gpu.LONGEST
    on_hub = HubModel("ada/net", "c0ffee", (), 6 * 10**9, 6 * 10**9, {}, False)
    assert zero_gpu.duration(replace(uploaded, model=on_hub, seconds=130.0), "", LIMITS) == 22  # 100 s of download

    def refused(task, folder, limits):
        yield {"event": "stage", "stage": "Loading the model", "share": 0.0}
        raise gr.Error("your share is used up")

    monkeypatch.setattr("jobs.zero_gpu.lent", lambda: refused)
    with pytest.raises(Problem, match="No GPU was lent: your share is used up"):
        list(zero_gpu.run(uploaded, LIMITS, threading.Event()))
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(Problem, match="Stopped"):
        list(zero_gpu.run(uploaded, LIMITS, stopped))


def test_results_are_told_apart_by_the_commit_of_the_dataset(hub):
    hub.client.create_repo("ada/texts", repo_type="dataset")
    choices = Choices(("skip",), text=Text("dataset", "ada/texts:default"))
    keys = []
    for content in (b"one", b"two"):
        hub.client.upload_file(path_or_fileobj=content, path_in_repo="a.txt", repo_id="ada/texts", repo_type="dataset")
        keys.append(_pinned(choices.text).fingerprint())
    assert keys[0] != keys[1] == _pinned(choices.text).fingerprint()
    hub.client.create_repo("ada/private-texts", repo_type="dataset", private=True)
    with pytest.raises(Problem, match="no public dataset"):  # although this process is ada's
        _pinned(Text("dataset", "ada/private-texts"))


def test_reports_are_kept_in_a_dataset_of_the_owner_and_found_again(hub):
    hub.client.create_repo("ada/results", repo_type="dataset")
    settings = choose_settings(SCORES, 64, 32, layers=3, width=8, limits=LIMITS)
    model = HubModel("ada/net", "c0ffee", (), 0, 0, {}, False)
    public = Task("ada/net", model, "c0ffee", SAMPLE, settings)
    own = [
        replace(public, text=Text("pasted", "my words")),
        replace(public, model=("model.gguf",), identity="fingerprint"),
        replace(public, model=replace(model, restricted=True)),
    ]
    report = sample_report(4).to_json()
    results = Results(10, ResultStore("ada/results", hub.token))
    for task in (public, *own):
        results.put(task, report)
    place = f"reports/{public.key()}.json"
    end = time.monotonic() + 30
    while place not in (files := hub.repository("ada/results", kind="dataset").files("main")):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert [name for name in files if name.startswith("reports/")] == [place]
    elsewhere = Results(10, ResultStore("ada/results", hub.token))
    assert LayerReport.from_json(elsewhere.get(public)).layers == sample_report(4).layers
    assert [elsewhere.get(task) for task in own] == [None] * 3


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


def test_a_sweep_that_is_not_there_is_no_missing_model(hub, tmp_path):
    told = []
    tell_sweep("ada/no-such-sweep", tmp_path, LIMITS, told.append)
    assert told[-1]["kind"] == "report"
    assert "There is no dataset ada/no-such-sweep on the Hub" in told[-1]["message"]


def because(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NotCausalError("looks ahead"), "not_causal"),
        (NoLayerStackError("no layers"), "unknown_architecture"),
        (CorpusError("too short"), "text"),
        (ModelLoadError("cut off"), "broken_weights"),
        (OSError(errno.ENOSPC, "No space left on device"), "crashed"),
        (OutOfMemoryError("lower something"), "out_of_memory"),
        (because(ModelLoadError("cannot be loaded"), RuntimeError("can't allocate memory")), "out_of_memory"),
        (because(RuntimeError("a layer failed"), MemoryError()), "out_of_memory"),
    ],
)
def test_the_kind_of_a_problem_is_that_of_its_message(error, kind, tmp_path):
    model = Task("model", (), "", SAMPLE, choose_settings(SCORES, 64, 32, layers=3, width=8, limits=LIMITS))
    with pytest.raises(Problem) as problem, _problems(tmp_path, model):
        raise error
    assert problem.value.kind == kind


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


def test_an_upload_of_codes_without_scales_is_refused(tmp_path):
    folder = save(CONFIGS["gpt2"], tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if name.endswith("c_fc.weight"))
    codes = {name: torch.full_like(state[name], 448).to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1) / 448}
    save_file(state | codes, folder / "model.safetensors", metadata={"format": "pt"})
    task = Task("model", (), "x", SAMPLE, choose_settings(SCORES, 64, 32, layers=3, width=8, limits=LIMITS))
    with pytest.raises(ModelLoadError, match="codes of a quantisation"):
        measuring.load(task, check_model(folder, LIMITS), LIMITS)
