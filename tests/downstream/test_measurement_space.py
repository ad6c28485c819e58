"""The measurement `layer_effectiveness`: evaluate loads it, combines it, and its results go into a model's card."""

import importlib.metadata
import json
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_update
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoTokenizer, PreTrainedModel

import depthscope
from depthlm import tiny_depthlm
from depthscope.errors import SettingsError
from depthscope.hub.cards.eval_results import accuracy_results, effectiveness_results, model_index
from depthscope.report.accuracy import Accuracy
from forks import new_python
from hub import LocalHub
from tiny_tokenizer import SENTENCES, save_tokenizer

evaluate = pytest.importorskip("evaluate", reason="evaluate is not installed")

SPACE = Path(__file__).parents[2] / "spaces" / "layer_effectiveness_measurement"
TEXTS = [sentence * 4 for sentence in SENTENCES]
OPTIONS = {"block_size": 16, "scores": "variance,skip,usefulness"}
WORDS = """
import datasets
import evaluate


class WordCount(evaluate.Measurement):
    def _info(self):
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description="",
            citation="",
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _compute(self, data):
        return {"words": sum(len(text.split()) for text in data)}
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_depthlm("gqa", vocab_size=300, max_position_embeddings=256).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(saved: Path) -> PreTrainedModel:
    return depthscope.load_model(saved).model


@pytest.fixture(scope="module")
def tokenizer(saved: Path) -> Any:
    return AutoTokenizer.from_pretrained(saved)


def load(**options: Any) -> Any:
    return evaluate.load(str(SPACE), **options)


def test_its_numbers_are_those_of_an_analysis_of_all_the_text(
    model: PreTrainedModel, tokenizer: Any, saved: Path
) -> None:
    found = load().compute(data=TEXTS, model=model, tokenizer=tokenizer, **OPTIONS)
    ids = [token for text in TEXTS for token in tokenizer(text, add_special_tokens=False).input_ids]
    blocks = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    measured = len(blocks) // 3
    report = depthscope.analyze(
        model, blocks=blocks, fit_blocks=len(blocks) - measured, eval_blocks=measured, scores=OPTIONS["scores"]
    )
    assert measured >= 1
    assert found["num_layers"] == len(report.layers) == len(found["layer_skip_ratio"])
    assert found["layer_skip_ratio"] == pytest.approx(report.column("skip_ratio"))
    assert found["layer_variance"] == pytest.approx(report.column("variance"))
    for name in ("loss", "skip_ratio", "usefulness_ratio", "variance_growth"):
        assert found[name] == pytest.approx(report.scores[name])
    assert json.loads(json.dumps(found)) == found, "plain numbers and lists"
    by_name = load().compute(data=TEXTS, model=str(saved), **OPTIONS)
    assert by_name["layer_skip_ratio"] == pytest.approx(found["layer_skip_ratio"])


def test_with_bos_it_takes_as_many_blocks_as_the_text_fills(model: PreTrainedModel, tokenizer: Any) -> None:
    held = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in TEXTS) // 15
    options = {"model": model, "tokenizer": tokenizer, "block_size": 16, "scores": "variance"}
    found = load().compute(data=TEXTS, bos="yes", fit_blocks=1, **options)
    assert found["tokens"] == 15 * (held - 1)


def test_texts_that_are_names_of_files_are_texts(model: PreTrainedModel, tokenizer: Any) -> None:
    names = [str(path) for path in sorted(SPACE.glob("*.py"))] * 4
    found = load().compute(data=names, model=model, tokenizer=tokenizer, block_size=8, scores="variance")
    tokens = sum(len(tokenizer(name, add_special_tokens=False).input_ids) for name in names)
    assert found["tokens"] <= tokens


def test_it_combines_with_another_measurement(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "word_count"
    folder.mkdir()
    (folder / "word_count.py").write_text(WORDS)
    layers = load(model=model, tokenizer=tokenizer, **OPTIONS)
    both = evaluate.combine([layers, evaluate.load(str(folder))])
    found = both.compute(data=TEXTS)
    assert found["words"] == sum(len(text.split()) for text in TEXTS)
    assert found["skip_ratio"] == layers.compute(data=TEXTS)["skip_ratio"]


def test_it_takes_texts_in_batches(model: PreTrainedModel, tokenizer: Any) -> None:
    layers = load(model=model, tokenizer=tokenizer, **OPTIONS)
    for text in TEXTS:
        layers.add_batch(data=[text])
    assert layers.compute()["loss"] == layers.compute(data=TEXTS)["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "No model was given"),
        ({"model": "no/such-model"}, "no/such-model"),
        ({"no_such_option": 1}, "some of these are not options"),
        ({"eval_blocks": 10_000}, "Lower the number of blocks"),
    ],
)
def test_what_it_cannot_measure_is_refused(
    options: dict[str, Any], message: str, model: PreTrainedModel, tokenizer: Any
) -> None:
    given = options if not options or "model" in options else {"model": model, "tokenizer": tokenizer, **options}
    with pytest.raises(depthscope.DepthscopeError, match=message):
        load().compute(data=TEXTS, block_size=16, **given)


# ------------------------------------------------------------------------------------------------ into a card


def test_results_survive_the_way_through_a_card(model: PreTrainedModel, tokenizer: Any) -> None:
    found = load().compute(data=TEXTS, model=model, tokenizer=tokenizer, **OPTIONS)
    results = effectiveness_results(found, dataset="wikitext", config="wikitext-2-v1", split="validation")
    assert {result.metric_type for result in results} >= {"loss", "skip_ratio", "usefulness"}
    assert not any(result.metric_type.endswith("_se") for result in results)
    results += accuracy_results([Accuracy(task="arc_easy", metric="acc", value=0.5, stderr=0.1, n=9, shots=0)])
    card = ModelCard.from_template(ModelCardData(model_name="tiny", eval_results=results))
    read = ModelCard(str(card)).data.eval_results
    key = lambda result: (result.dataset_type, result.metric_type)  # noqa: E731
    assert sorted(read, key=key) == sorted(results, key=key)
    metadata = model_index("tiny", results)
    assert metadata["model-index"][0]["name"] == "tiny"
    assert all(
        isinstance(metric["value"], float) for one in metadata["model-index"][0]["results"] for metric in one["metrics"]
    )


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.array, torch.tensor, Fraction])
def test_scores_of_every_kind_of_number_are_numbers_in_a_card(kind: Any) -> None:
    scores = {"loss": kind(3.5), "usefulness": np.int64(2), "skip_ratio": kind(1.25), "variance": [kind(1.0)]}
    arguments = {"tokens": np.int64(4096), "exact": np.bool_(True), "share": np.float32(0.5), "of": (np.int8(1), "a")}
    results = effectiveness_results(scores, dataset="lab/texts", arguments=arguments)
    assert {one.metric_type: one.metric_value for one in results} == {"loss": 3.5, "usefulness": 2, "skip_ratio": 1.25}
    card = str(ModelCard.from_template(ModelCardData(model_name="tiny", eval_results=results)))
    assert "!!python" not in card
    read = ModelCard(card).data.eval_results
    assert read is not None
    assert sorted(read, key=lambda one: one.metric_type) == sorted(results, key=lambda one: one.metric_type)
    assert results[0].metric_args == {"tokens": 4096, "exact": True, "share": 0.5, "of": [1, "a"]}
    for number in (math.nan, -math.inf):
        assert not effectiveness_results({"loss": np.float32(number), "skip_ratio": None}, dataset="lab/texts")


@pytest.mark.parametrize("value", ["3.5", True, np.bool_(False), np.str_("3.5"), {"value": 3.5}, 1j, np.complex64(1)])
def test_a_score_that_is_no_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(SettingsError, match=r"'loss'.*expected a number"):
        effectiveness_results({"loss": value}, dataset="lab/texts")


@pytest.mark.parametrize("value", [object(), torch.float32, {1, 2}, math.nan, [np.float32("inf")], {"a": b"x"}, 1j])
def test_an_argument_that_a_card_cannot_hold_is_refused_by_name(value: Any) -> None:
    with pytest.raises(SettingsError, match="'dtype' holds"):
        effectiveness_results({"loss": 3.5}, dataset="lab/texts", arguments={"dtype": value})


def test_a_number_that_is_measured_again_replaces_the_old_one_on_the_hub(hub: Any) -> None:
    hub.client.create_repo("lab/tiny")
    hub.client.create_repo("lab/texts", repo_type="dataset")
    first = effectiveness_results({"loss": 3.5, "skip_ratio": 1.25}, dataset="lab/texts", split="test")
    again = effectiveness_results({"loss": 3.25, "skip_ratio": 1.5}, dataset="lab/texts", split="test")
    metadata_update("lab/tiny", model_index("tiny", first))
    with pytest.raises(ValueError, match="overwrite=True"):
        metadata_update("lab/tiny", model_index("tiny", again))
    metadata_update("lab/tiny", model_index("tiny", again), overwrite=True)
    usefulness = {"metric_type": "usefulness", "metric_name": "Usefulness", "metric_value": 0.5}
    about = {"model_id": "lab/tiny", "task_type": "text-generation", "dataset_name": "Texts", **usefulness}
    evaluate.push_to_hub(dataset_type="lab/texts", **about)
    with pytest.raises(RepositoryNotFoundError):  # as docs/evaluate.md says
        evaluate.push_to_hub(dataset_type="lab/no-such-texts", **about)
    read = ModelCard.load("lab/tiny").data.eval_results
    assert {result.metric_type: result.metric_value for result in read} == {
        "loss": 3.25,
        "skip_ratio": 1.5,
        "usefulness": 0.5,
    }
    assert len(read) == 3


# ------------------------------------------------------------------------------------------------ the Space


def test_pushed_as_a_space_it_is_loaded_by_its_name(hub: Any, saved: Path, tmp_path: Path) -> None:
    name = f"lab/{SPACE.name}"
    hub.client.create_repo(name, repo_type="space", space_sdk="gradio")
    hub.client.upload_folder(repo_id=name, repo_type="space", folder_path=SPACE, ignore_patterns="__pycache__/*")
    code = (
        "import sys, evaluate\n"
        "layers = evaluate.load(sys.argv[1])\n"
        "found = layers.compute(data=sys.argv[3:], model=sys.argv[2], block_size=16, scores='variance')\n"
        "print(layers.module_type, layers.name, found['num_layers'])"
    )
    run = new_python("-c", code, name, saved, *TEXTS, env=hub.environment(hub.token, tmp_path / "home"))
    assert run.stdout.split() == ["measurement", "layer_effectiveness", "4"], run.stderr


def test_the_folder_is_one_that_the_hub_takes_for_a_space() -> None:
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    assert (SPACE / front["app_file"]).is_file()
    assert {"evaluate", "measurement"} <= set(front["tags"])
    pinned = {
        line.partition("==")[0]: line.partition("==")[2] for line in (SPACE / "requirements.txt").read_text().split()
    }
    assert any(name.startswith("depthscope") for name in pinned)
    gradio = importlib.metadata.version("gradio")
    assert front["sdk_version"] == gradio
    assert SPACE.name == "layer_effectiveness_measurement", "evaluate loads the file that is called as its folder"


PAGE = """
import json, sys
import app
page = app.build()
page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", share=False)
from gradio_client import Client
client = Client(page.local_url, verbose=False)
answers = []
for model in json.loads(sys.argv[1]):
    try:
        table, overall = client.predict(model, sys.argv[2] * 40, ["variance", "skip"], api_name="/measure")
        answers.append([table["headers"], len(table["data"]), overall])
    except Exception as error:
        answers.append(str(error))
print("ANSWERS" + json.dumps(answers))
"""


def test_the_page_measures_a_model_of_the_hub_and_says_what_is_wrong_with_another(saved: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((saved / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    asked = ["org/tiny", "org/pickled", "org/missing", "../etc/passwd"]
    with LocalHub() as running:
        running.add_repository("org/tiny", saved)
        running.add_repository("org/pickled", pickled)
        environment = {
            **os.environ,
            "HF_ENDPOINT": running.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "PYTHONPATH": str(SPACE),
        }
        run = new_python("-c", PAGE, json.dumps(asked), " ".join(SENTENCES), env=environment)
    assert run.returncode == 0, run.stderr
    good, *bad = json.loads(run.stdout.partition("ANSWERS")[2].splitlines()[0])
    headers, rows, overall = good
    assert {"layer", "variance", "skip_ratio"} <= set(headers)
    assert rows == overall["num_layers"] == 4
    assert overall["loss"] > 0
    for message, reason in zip(
        bad, ["no weights as safetensors", "no public model", "not the id of a model"], strict=True
    ):
        assert reason in message
