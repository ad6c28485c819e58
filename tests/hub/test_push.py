"""`depthscope push`: a sweep on a Hub that was empty, and loaded from there by the real clients."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner, Result

import depthscope
from depthlm import random_ids, tiny_depthlm
from depthscope.cli import app
from depthscope.errors import HubError, SettingsError
from depthscope.hub.push import push
from depthscope.hub.tree import MANIFEST
from forks import Forks, new_python
from hub import LocalHub
from sweeps import run

pytest.importorskip("matplotlib")

DENSE, MOE, REPORTS = "ada/tiny-dense-seed0", "ada/tiny-moe-seed0", "ada/tiny-reports"
STEPS = ["step0", "step1", "step2", "step4", "step8"]
GRID = {
    "kind": {
        "num_hidden_layers": 2,
        "points": [
            {"name": "dense", "num_experts": None},
            {"name": "moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ],
    }
}

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
expected = torch.load(sys.argv[1], weights_only=True)

def agrees(repo, name, revision=None, **options):
    model, info = AutoModelForCausalLM.from_pretrained(repo, revision=revision, output_loading_info=True, **options)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected[name]), (repo, revision)
    return model
"""
WITH_DEPTHSCOPE = """
import depthscope
for repo in sys.argv[2:4]:
    last = agrees(repo, repo)
    step = agrees(repo, repo + "@step4", revision="step4")
    assert not torch.equal(last.lm_head.weight, step.lm_head.weight)
from datasets import load_dataset
reports = load_dataset(sys.argv[4], split="train")
assert sorted(reports["model"]) == sorted([*sys.argv[2:4]] * 2), reports["model"]
for row in reports:
    report = depthscope.LayerReport.from_json(row["report"])
    assert row["loss"] == report.scores["loss"] and row["layers"] == 2
layers = load_dataset(sys.argv[4], "layers", split="train")
assert len(layers) == 8 and set(layers["layer"]) == {0, 1} and None not in layers["variance"]
"""
WITHOUT_DEPTHSCOPE = """
import importlib.util
assert importlib.util.find_spec("depthscope") is None, "depthscope is installed after all"
for repo in sys.argv[2:4]:
    model = agrees(repo, repo, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    agrees(repo, repo + "@step4", revision="step4", trust_remote_code=True)
    native = agrees(repo + "-native", repo + "-native")
    assert type(native).__module__.startswith("transformers.models."), type(native)
"""


@dataclass
class Published:
    """A Hub with the sweep on it, and where the sweep lies."""

    hub: LocalHub
    token: str
    sweep: Path
    said: str

    def point(self, repo_id: str) -> Path:
        return self.sweep / "points" / repo_id.removeprefix("ada/tiny-")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """A sweep of a dense model and one with experts, trained, and pushed to an empty Hub by the command."""
    folder = tmp_path_factory.mktemp("push")
    out = folder / "sweep"
    run(folder, out, grid=GRID, tracking={"publish_every": 100})
    with LocalHub() as hub:
        token = hub.add_user("ada", lab="write")
        with hub.connected(token, folder / "home") as api:
            api.create_repo("ada/look", repo_type="space", space_sdk="gradio")
            done = command("push", out, "--to", "ada", "--native", "--license", "apache-2.0", "--space", "ada/look")
            assert done.exit_code == 0, done.output
            yield Published(hub, token, out, done.output)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def local_logits(published: Published) -> dict[str, torch.Tensor]:
    """What the models here say, before they went anywhere."""
    ids = random_ids(2, 12)
    found = {"ids": ids}
    for repo_id in (DENSE, MOE):
        folders = {repo_id: published.point(repo_id) / "model"}
        folders[f"{repo_id}@step4"] = published.point(repo_id) / "steps" / "step-4"
        for name, folder in folders.items():
            with torch.no_grad():
                model = AutoModelForCausalLM.from_pretrained(folder)
                found[name] = model(ids).logits
        with torch.no_grad():
            native = depthscope.conversion.native.to_native(AutoModelForCausalLM.from_pretrained(folders[repo_id]))
            found[f"{repo_id}-native"] = native(ids).logits
    return found


def loads(
    python: Callable[..., subprocess.CompletedProcess[str]],
    code: str,
    published: Published,
    home: Path,
    **settings: str,
) -> None:
    """Run a script in a new process that knows the Hub alone; its cache is empty."""
    home.mkdir()
    torch.save(local_logits(published), home / "expected.pt")
    environment = published.hub.environment(published.token, home / "cache") | settings
    done = python("-c", LOAD + code, home / "expected.pt", DENSE, MOE, REPORTS, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr
    assert published.token not in done.stdout + done.stderr


def test_all_revisions_load_with_depthscope_and_the_reports_with_datasets(published: Published, tmp_path: Path) -> None:
    loads(new_python, WITH_DEPTHSCOPE, published, tmp_path / "with")


def test_the_code_and_the_native_export_load_without_depthscope(
    published: Published, elsewhere: Forks, tmp_path: Path
) -> None:
    loads(elsewhere.run, WITHOUT_DEPTHSCOPE, published, tmp_path / "without", PYTHONPATH="")


def test_every_repository_is_there_with_its_branches_and_files(published: Published) -> None:
    for repo_id in (DENSE, MOE):
        repository = published.hub.repository(repo_id)
        assert sorted(repository.branches) == ["main", *STEPS]
        files = repository.files()
        code = {"configuration_depthlm.py", "modeling_depthlm.py", "presets_depthlm.py"}
        tokenizer = {"tokenizer.json", "tokenizer_config.json"}
        measured = {"layer_report.json", "untrained_report.json", "layer_stats.parquet"}
        figures = {f"figures/{name}_by_layer.png" for name in ("variance", "effectiveness")}
        expected = {"config.json", "model.safetensors", "README.md", "figures/learning_curve.png", MANIFEST}
        assert files.keys() - {".gitattributes", "generation_config.json"} == (
            expected | code | tokenizer | measured | figures
        )
        for path in ("model.safetensors", "config.json", "tokenizer.json"):
            assert files[path].content == (published.point(repo_id) / "model" / path).read_bytes()
        assert {"model.safetensors", "config.json", *code, *tokenizer} <= repository.files("step8").keys()
        assert len(list(repository.history(repository.head))) == 2  # the first commit, and all of ours
        assert all(len(list(repository.history(repository.at(step)))) == 2 for step in STEPS)
    assert {"config.json", "model.safetensors", "README.md"} <= published.hub.repository(f"{MOE}-native").files().keys()


@pytest.mark.parametrize("fault", ["a bit", "gone"])
def test_a_model_that_is_not_what_was_trained_is_not_pushed(published: Published, tmp_path: Path, fault: str) -> None:
    point = tmp_path / "point"
    shutil.copytree(published.point(DENSE), point)
    weights = point / "model" / "model.safetensors"
    if fault == "gone":
        (point / "model" / "tokenizer.json").unlink()
    else:
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    done = command("push", point, "--to", "ada/other", "--dry-run", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert ("tokenizer.json is missing" if fault == "gone" else "model.safetensors has changed since") in done.output
    (point / "checksums.json").unlink()  # changed on purpose
    done = command("push", point, "--to", "ada/other", "--dry-run", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output


def test_cards_name_what_belongs_together(published: Published) -> None:
    card = ModelCard.load(MOE)
    assert card.data.license == "apache-2.0"
    assert "moe" in card.data.tags
    for named in (f"{MOE}-native", REPORTS, "step8"):
        assert named in card.text
    native = ModelCard.load(f"{MOE}-native")
    assert native.data.base_model == MOE
    assert "trust_remote_code" not in native.text


def test_the_collection_lists_everything_once(published: Published) -> None:
    api = published.hub.api(published.token)
    (listed,) = list(api.list_collections(owner="ada"))
    items = [(item.item_type, item.item_id) for item in api.get_collection(listed.slug).items]
    models = [("model", name) for repo_id in (DENSE, MOE) for name in (repo_id, f"{repo_id}-native")]
    assert items == [("paper", "2603.15389"), *models, ("dataset", REPORTS), ("space", "ada/look")]


def test_layer_stats_are_the_history_in_rows(published: Published) -> None:
    import pandas as pd

    frame = pd.read_parquet(hf_hub_download(DENSE, "layer_stats.parquet"))
    lines = (published.point(DENSE) / "layer_stats.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        found = frame[(frame.step == line["step"]) & (frame.metric == "variance") & frame.layer.notna()]
        assert list(found.sort_values("layer").value) == line["layers"]["variance"]
    assert set(frame.columns) == {"step", "epoch", "kind", "metric", "layer", "value"}


def test_pushing_again_sends_nothing_and_one_change_is_one_commit(published: Published) -> None:
    hub, report = published.hub, published.point(DENSE) / "layer_report.json"
    options = {"native": True, "license": "apache-2.0", "space": "ada/look", "progress": False}
    hub.log.clear()
    again = push(published.sweep, "ada", **options)
    assert not [one for one in again.revisions if one.is_changed]
    for operation in ("create", "commit", "lfs-upload", "branch", "collection-create", "item-add", "preupload"):
        assert not hub.sent(operation), operation
    kept = report.read_text()
    report.write_text(kept + "\n")
    try:
        hub.log.clear()
        push(published.sweep, "ada", only=["*dense*"], **options)
        # The data set holds fewer points now, so it is one of the three that change.
        assert {entry.path.split("/")[4] for entry in hub.sent("commit")} == {
            "tiny-dense-seed0",
            "tiny-dense-seed0-native",
            "tiny-reports",
        }
        main = [entry for entry in hub.sent("commit") if entry.path.endswith("dense-seed0/commit/main")]
        written = [line["value"]["path"] for line in main[0].lines[1:]]
        assert written == ["layer_report.json", MANIFEST]
        assert not [entry for entry in hub.sent("lfs-upload") if "model" in entry.path]
    finally:
        report.write_text(kept)
        push(published.sweep, "ada", **options)


def test_a_dry_run_writes_exactly_what_a_push_leaves(published: Published, tmp_path: Path) -> None:
    published.hub.log.clear()
    arguments = ("--to", "ada", "--native", "--license", "apache-2.0", "--dry-run", "--out", tmp_path / "dry")
    done = command("push", published.sweep, *arguments)
    assert done.exit_code == 0, done.output
    assert not published.hub.sent()
    there = {}
    for (kind, repo_id), repository in published.hub.state.repositories.items():
        for branch in repository.branches if kind != "space" else ():
            for path, file in repository.files(branch).items():
                if path != ".gitattributes":
                    there[f"{kind}s/{repo_id}/{branch}/{path}"] = hashlib.sha256(file.content).hexdigest()
    written = {
        path.relative_to(tmp_path / "dry").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "dry").rglob("*")
        if path.is_file()
    }
    assert written == there
    for path in ("layer_stats.parquet", MANIFEST, "figures/learning_curve.png"):
        assert path in done.output
    again = command("push", published.sweep, *arguments)
    assert again.exit_code == 2
    assert "not empty" in again.output


def test_trainer_pushes_a_depthlm_to_the_hub(published: Published, tmp_path: Path) -> None:
    model = tiny_depthlm("moe_shared")
    rows = [{"input_ids": row, "labels": row} for row in random_ids(4, 8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        hub_model_id="ada/trained",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    loaded = AutoModelForCausalLM.from_pretrained("ada/trained")
    with torch.no_grad():
        ids = random_ids(1, 8)
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert {"modeling_depthlm.py", "README.md"} <= published.hub.repository("ada/trained").files().keys()


def test_what_others_made_is_not_touched(published: Published, tmp_path: Path) -> None:
    """A run pushed twice: a note of somebody else's stays, a card that they edited too, our own old file goes."""
    api, folder = published.hub.api(published.token), tmp_path / "mine"
    tiny_depthlm("dense").save_pretrained(folder)
    (folder / "extra.model").write_text("of us")
    push(folder, "ada", progress=False)
    for path in ("NOTES.md", "README.md"):
        api.upload_file(path_or_fileobj=b"of somebody else", path_in_repo=path, repo_id="ada/mine")
    (folder / "extra.model").unlink()
    done = push(folder, "ada", progress=False)
    files = published.hub.repository("ada/mine").files()
    assert files["NOTES.md"].content == files["README.md"].content == b"of somebody else"
    assert "extra.model" not in files
    assert done.revisions[0].kept == ("README.md",)
    with pytest.raises(HubError, match=r"changed on the Hub: README\.md.*--overwrite"):
        push(folder, "ada", license="mit", progress=False)
    push(folder, "ada", license="mit", overwrite=True, progress=False)
    files = published.hub.repository("ada/mine").files()
    assert b"license: mit" in files["README.md"].content
    assert files["NOTES.md"].content == b"of somebody else"


def test_a_repository_of_somebody_else_is_refused_as_a_whole(published: Published, tmp_path: Path) -> None:
    api = published.hub.api(published.token)
    api.create_repo("ada/theirs")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="ada/theirs")
    before = published.hub.repository("ada/theirs").head
    tiny_depthlm("dense").save_pretrained(tmp_path / "theirs")
    with pytest.raises(HubError, match=r"no push made.*config\.json"):
        push(tmp_path / "theirs", "ada", progress=False)
    assert published.hub.repository("ada/theirs").head is before


def test_private_means_private(published: Published, tmp_path: Path) -> None:
    tiny_depthlm("dense").save_pretrained(tmp_path / "secret")
    push(tmp_path / "secret", "lab/secret", private=True, progress=False)
    assert published.hub.repository("lab/secret").private
    api = published.hub.api(published.token)
    api.update_repo_settings("lab/secret", private=False)
    with pytest.raises(HubError, match="public"):
        push(tmp_path / "secret", "lab/secret", private=True, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--to", "ada"), "There is no folder"),
        (("empty", "--to", "ada"), "holds no model"),
        (("pickled", "--to", "ada"), "pickled"),
        (("saved", "--to", "a b"), "The Hub does not accept"),
        (("saved", "--to", "ada/x--y"), "The Hub does not accept"),
        (("saved", "--to", "eve"), "not a namespace of ada"),
        (("saved", "--to", "ada", "--license", "My Licence"), "licence"),
        (("saved", "--to", "ada", "--only", "x"), "--only"),
        (("sweep", "--to", "ada/name"), "several repositories"),
        (("sweep", "--to", "ada", "--only", "nothing*"), "matches no point"),
    ],
)
def test_bad_input_is_one_message(
    arguments: tuple[str, ...], message: str, published: Published, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    tiny_depthlm("dense").save_pretrained(tmp_path / "saved")
    folder = published.sweep if arguments[0] == "sweep" else tmp_path / arguments[0]
    published.hub.log.clear()
    done = command("push", folder, *arguments[1:])
    assert done.exit_code == 2, done.output
    assert message in done.output.replace("\n", " ")
    assert not published.hub.sent("create")


def test_two_points_of_one_name_are_refused(tmp_path: Path) -> None:
    names = ["a/b", "a"]
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "s", "points": [{"point": name} for name in names]}))
    with pytest.raises(HubError, match="not the name of a folder"):
        push(tmp_path, "ada", dry_run=tmp_path / "out", progress=False)
    with pytest.raises(SettingsError, match="--space"):
        push(tmp_path, "ada", space="no name", dry_run=tmp_path / "out", progress=False)


def test_the_token_is_in_nothing_that_a_push_leaves(published: Published) -> None:
    assert published.token not in published.said
    for repository in published.hub.state.repositories.values():
        for commit in repository.commits.values():
            assert published.token not in commit.title + commit.description
            assert not [path for path, file in commit.files.items() if published.token.encode() in file.content]
    assert published.token not in json.dumps([one.as_json() for one in published.hub.state.collections.of(None)])
