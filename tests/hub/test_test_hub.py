"""The local Hub of the tests: the real clients find there what they would find on the real one."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import Dataset, load_dataset
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    ModelCard,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import hf_raise_for_status
from transformers import AutoModelForCausalLM, AutoTokenizer

from hub import LocalHub
from hub.faults import Fault
from models import random_blocks, tiny_llama
from tiny_tokenizer import SENTENCES, save_tokenizer

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def net(hub: LocalHub) -> str:
    """A model repository with a text file and a large file."""
    hub.client.create_repo("ada/net")
    files = {"notes/read.txt": b"first", "model.safetensors": WEIGHTS}
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    hub.client.create_commit("ada/net", operations, commit_message="First files")
    hub.log.clear()
    return "ada/net"


def put(hub: LocalHub, repo: str, content: bytes, path: str = "notes/read.txt", **where: str) -> str:
    return hub.client.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo, **where).oid


def send_commit(hub: LocalHub, repo: str, *operations: dict) -> str:
    """A commit as the client would not send it."""
    lines = [{"key": "header", "value": {"summary": "x"}}, *operations]
    answer = huggingface_hub.get_session().post(
        f"{hub.url}/api/models/{repo}/commit/main",
        content="\n".join(json.dumps(line) for line in lines).encode(),
        headers={"authorization": f"Bearer {hub.token}"},
    )
    hf_raise_for_status(answer)
    return answer.json()["commitOid"]


def read(repo: str, path: str = "notes/read.txt", **where: object) -> bytes:
    return Path(hf_hub_download(repo, path, **where)).read_bytes()


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


# Files and history


def test_a_folder_arrives_as_it_was_with_large_files_in_the_storage(hub: LocalHub, tmp_path: Path) -> None:
    files = {"a.txt": b"text", "deep/er/b.json": b"{}", "w.safetensors": WEIGHTS, "empty.bin": b"", "data": b"\0\1"}
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    hub.client.create_repo("lab/net")
    done = hub.client.upload_folder(repo_id="lab/net", folder_path=tmp_path, commit_message="All of it")
    kept = hub.repository("lab/net").files()
    assert {path: file.content for path, file in kept.items() if path != ".gitattributes"} == files
    assert {path for path, file in kept.items() if file.is_lfs} == {"w.safetensors", "data"}
    assert done.oid == hub.repository("lab/net").head.commit_id
    folder = Path(snapshot_download("lab/net"))
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == {
        path: file.content for path, file in kept.items()
    }
    assert [entry.status for entry in hub.sent("lfs-verify")] == [200, 200]


def test_ids_of_files_folders_and_commits_are_those_that_git_gives(hub: LocalHub, net: str, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    kept = hub.repository(net).files()
    for path, file in kept.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(file.pointer if file.is_lfs else file.content)
    git("-c", "filter.lfs.clean=cat", "-c", "filter.lfs.smudge=cat", "-c", "filter.lfs.required=false", "add", ".")
    expected = dict(reversed(line.split()[2:]) for line in git("ls-tree", "-rt", git("write-tree")).splitlines())
    found = {entry.path: entry for entry in hub.client.list_repo_tree(net, recursive=True)}
    assert {path: getattr(entry, "blob_id", None) or entry.tree_id for path, entry in found.items()} == expected
    assert found["model.safetensors"].lfs.sha256 == kept["model.safetensors"].sha256


def test_every_commit_keeps_its_files_and_names_its_parent(hub: LocalHub, net: str) -> None:
    first = hub.repository(net).head.commit_id
    second = put(hub, net, b"second")
    assert [commit.commit_id for commit in hub.client.list_repo_commits(net)][:2] == [second, first]
    assert hub.repository(net).commits[second].parent == first
    assert (read(net), read(net, revision=first), read(net, revision=second)) == (b"second", b"first", b"second")


def test_one_commit_adds_copies_and_deletes(hub: LocalHub, net: str) -> None:
    operations = [
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
        CommitOperationDelete("model.safetensors"),
        CommitOperationDelete("notes/"),
    ]
    hub.client.create_commit(net, operations, commit_message="Tidy")
    kept = hub.repository(net).files()
    assert {*kept} == {".gitattributes", "new.txt", "copy.safetensors"}
    assert kept["copy.safetensors"].content == WEIGHTS
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        hub.client.delete_file("gone.txt", net)
    assert hub.repository(net).files() == kept


def test_a_commit_that_changes_nothing_is_none(hub: LocalHub, net: str) -> None:
    head = hub.repository(net).head.commit_id
    assert put(hub, net, b"first") == head
    assert hub.sent("commit") == []
    unchanged = {"key": "file", "value": {"path": "notes/read.txt", "content": "first"}}
    assert send_commit(hub, net, unchanged) == head


def test_a_commit_on_an_older_parent_is_refused(hub: LocalHub, net: str) -> None:
    parent = hub.repository(net).head.commit_id
    put(hub, net, b"second")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        put(hub, net, b"third", parent_commit=parent)
    assert status_of(error) == 412
    assert put(hub, net, b"third", parent_commit=hub.repository(net).head.commit_id[:7])


def test_branches_start_where_they_are_told_and_go_their_own_way(hub: LocalHub, net: str) -> None:
    first = hub.repository(net).head.commit_id
    put(hub, net, b"second")
    hub.client.create_branch(net, branch="step4")
    hub.client.create_branch(net, branch="old/step0", revision=first)
    put(hub, net, b"aside", revision="old/step0")
    assert (read(net), read(net, revision="step4"), read(net, revision="old/step0")) == (b"second", b"second", b"aside")
    assert {branch.name for branch in hub.client.list_repo_refs(net).branches} == {"main", "step4", "old/step0"}
    with pytest.raises(HfHubHTTPError) as error:
        hub.client.create_branch(net, branch="step4")
    assert status_of(error) == 409
    hub.client.create_branch(net, branch="step4", exist_ok=True)
    hub.client.delete_branch(net, branch="step4")
    with pytest.raises(RevisionNotFoundError):
        read(net, revision="step4", force_download=True)
    with pytest.raises(RevisionNotFoundError):
        put(hub, net, b"x", revision="step4")


def test_tags_stay_where_they_were_put(hub: LocalHub, net: str) -> None:
    hub.client.create_tag(net, tag="v1", tag_message="The first")
    put(hub, net, b"second")
    assert (read(net), read(net, revision="v1")) == (b"second", b"first")
    with pytest.raises(HfHubHTTPError):
        hub.client.create_tag(net, tag="v1")
    hub.client.delete_tag(net, tag="v1")
    assert hub.client.list_repo_refs(net).tags == []


def test_a_squashed_branch_has_one_commit_and_the_same_files(hub: LocalHub, net: str) -> None:
    kept = hub.repository(net).files()
    hub.client.super_squash_history(net, commit_message="One")
    assert [commit.title for commit in hub.client.list_repo_commits(net)] == ["One"]
    assert hub.repository(net).files() == kept


def test_a_file_is_downloaded_again_only_when_its_etag_is_new(hub: LocalHub, net: str) -> None:
    for content in (b"first", b"first", b"second"):
        put(hub, net, content)
        put(hub, net, content + b" elsewhere", path="other.txt")
        assert read(net) == content
    downloads = [entry.path for entry in hub.sent("download")]
    assert len(downloads) == 2
    commit = hub.repository(net).head.commit_id
    hub.log.clear()
    assert read(net, revision=commit) == b"second"
    assert hub.sent() == []


def test_what_is_not_there_is_told_apart(hub: LocalHub, net: str) -> None:
    with pytest.raises(EntryNotFoundError):
        read(net, "gone.txt")
    with pytest.raises(RevisionNotFoundError):
        read(net, revision="v9")
    for name in ("ada/gone", "gone"):
        with pytest.raises(RepositoryNotFoundError):
            read(name)


def test_trees_of_many_pages_are_listed_whole(net: str, hub: LocalHub) -> None:
    operations = [CommitOperationAdd(f"many/{index:03}.txt", b"%d" % index) for index in range(60)]
    hub.client.create_commit(net, operations, commit_message="Many")
    hub.state.page_size = 7
    names = {path for path in hub.repository(net).files() if path.startswith("many/")}
    assert {entry.path for entry in hub.client.list_repo_tree(net, "many")} == names
    expanded = list(hub.client.list_repo_tree(net, recursive=True, expand=True))
    titles = {entry.path: entry.last_commit.title for entry in expanded}
    assert (titles["many"], titles["many/007.txt"], titles["notes/read.txt"]) == ("Many", "Many", "First files")
    assert [entry.path for entry in hub.client.get_paths_info(net, ["many/001.txt", "gone", "notes"])] == [
        "many/001.txt",
        "notes",
    ]


def test_large_files_may_come_in_parts(tmp_path: Path) -> None:
    with LocalHub(part_size=1000) as hub, hub.connected(hub.add_user("ada")) as api:
        api.create_repo("ada/net")
        api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.bin", repo_id="ada/net")
        assert hub.repository("ada/net").files()["w.bin"].content == WEIGHTS
        assert len(hub.sent("lfs-upload")) == 11


def test_the_storage_takes_only_what_was_announced_and_never_sees_a_token(hub: LocalHub, net: str) -> None:
    read(net, "model.safetensors")
    put(hub, net, WEIGHTS[::-1], path="model.safetensors")
    carried = {entry.operation: entry.had_token for entry in hub.sent()}
    assert (carried["lfs-download"], carried["lfs-upload"], carried["lfs-batch"]) == (False, False, True)
    signature = hub.state.store.allow_upload(f"models/{net}", "0" * 64, 3)
    answer = huggingface_hub.get_session().put(f"{hub.state.storage_url}/lfs/uploads/{signature}", content=b"abc")
    assert answer.status_code == 400
    commit = {"key": "lfsFile", "value": {"path": "x", "algo": "sha256", "oid": "0" * 64, "size": 3}}
    with pytest.raises(HfHubHTTPError) as error:
        send_commit(hub, net, commit)
    assert status_of(error) == 400


# Who may do what


def test_whoami_tells_the_user_the_organisations_and_the_role(hub: LocalHub) -> None:
    said = hub.client.whoami()
    assert (said["name"], said["auth"]["accessToken"]["role"]) == ("ada", "write")
    assert [(one["name"], one["roleInOrg"]) for one in said["orgs"]] == [("lab", "write")]


@pytest.mark.parametrize("state", ["wrong", "expired"])
def test_a_token_that_is_wrong_or_expired_is_refused_everywhere(state: str, hub: LocalHub, net: str) -> None:
    token = "hf_wrong" if state == "wrong" else hub.add_token("ada")
    if state == "expired":
        assert hub.api(token).whoami()["name"] == "ada"
        hub.expire(token)
    api = hub.api(token)
    for attempt in (
        api.whoami,
        lambda: api.model_info(net),
        lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=net),
        lambda: api.create_repo("ada/other"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            attempt()
        assert status_of(error) == 401
        assert token not in str(error.value)
    assert [entry.headers.get("authorization") for entry in hub.sent()] == [None] * len(hub.sent())


def test_who_may_not_write_is_told_so_and_changes_nothing(hub: LocalHub, net: str) -> None:
    reader, eve = hub.api(hub.add_token("ada", role="read")), hub.api(hub.add_user("eve", lab="read"))
    before = hub.repository(net).head.commit_id
    for api in (reader, eve):
        for attempt in (
            lambda api: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=net),
            lambda api: api.create_branch(net, branch="b"),
            lambda api: api.create_tag(net, tag="t"),
            lambda api: api.update_repo_settings(net, private=True),
            lambda api: api.delete_repo(net),
            lambda api: api.create_repo("lab/other"),
        ):
            with pytest.raises(HfHubHTTPError, match="don't have the rights") as error:
                attempt(api)
            assert status_of(error) == 403
    assert hub.repository(net).head.commit_id == before
    assert {*hub.repository(net).branches} == {"main"}


def test_a_permission_that_is_lost_is_lost_at_once(hub: LocalHub) -> None:
    hub.client.create_repo("lab/net")
    put(hub, "lab/net", b"x")
    hub.set_role("ada", "lab", "read")
    with pytest.raises(HfHubHTTPError) as error:
        put(hub, "lab/net", b"y")
    assert status_of(error) == 403


def test_a_private_repository_is_invisible_to_others(hub: LocalHub) -> None:
    hub.client.create_repo("lab/net", private=True)
    put(hub, "lab/net", b"secret")
    eve, member, nobody = hub.api(hub.add_user("eve")), hub.api(hub.add_user("max", lab="read")), hub.api()
    for api, status in ((eve, 404), (nobody, 401)):
        with pytest.raises(RepositoryNotFoundError) as error:
            api.model_info("lab/net")
        assert status_of(error) == status
        assert api.repo_exists("lab/net") is False
        assert list(api.list_models(author="lab")) == []
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download("lab/net", "notes/read.txt")
    assert member.model_info("lab/net").private is True
    hub.client.update_repo_settings("lab/net", private=False)
    assert nobody.model_info("lab/net").private is False
    assert [model.id for model in nobody.list_models(author="lab")] == ["lab/net"]


def test_a_gated_repository_shows_its_page_and_keeps_its_files(hub: LocalHub, net: str) -> None:
    hub.client.update_repo_settings(net, gated="manual")
    eve = hub.api(hub.add_user("eve"))
    assert eve.model_info(net).gated == "manual"
    for api, status in ((eve, 403), (hub.api(), 401)):
        with pytest.raises(GatedRepoError) as error:
            api.hf_hub_download(net, "notes/read.txt")
        assert status_of(error) == status
    hub.repository(net).readers.add("eve")
    assert Path(eve.hf_hub_download(net, "notes/read.txt")).read_bytes() == b"first"


def test_repositories_are_made_once_moved_and_deleted(hub: LocalHub, net: str) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        hub.client.create_repo(net)
    assert status_of(error) == 409
    assert hub.client.create_repo(net, exist_ok=True).repo_id == net
    hub.client.move_repo(net, "lab/moved")
    assert read("lab/moved", "model.safetensors") == WEIGHTS
    hub.client.delete_repo("lab/moved")
    assert not hub.client.repo_exists("lab/moved")
    hub.client.delete_repo("lab/moved", missing_ok=True)


# Cards, collections, Spaces


def test_a_card_is_validated_and_shown(hub: LocalHub, net: str) -> None:
    text = """---
library_name: transformers
license: apache-2.0
language: [en]
tags: [depthscope]
datasets: [ada/reports]
model-index:
- name: net
  results:
  - task: {type: text-generation}
    dataset: {type: prose, name: Prose}
    metrics: [{type: perplexity, value: 9.5}]
---
See https://arxiv.org/abs/2603.15389.
"""
    ModelCard(text).push_to_hub(net)
    info = hub.client.model_info(net)
    assert (info.library_name, info.card_data.eval_results[0].metric_value) == ("transformers", 9.5)
    assert {"depthscope", "arxiv:2603.15389", "license:apache-2.0", "dataset:ada/reports"} <= {*info.tags}
    kept = hub.repository(net).files()["README.md"]
    for wrong in (
        "license: nonsense",
        "language: English",
        "model-index: [{name: x, results: [{}]}]",
        "a: [",
        "tags: x",
    ):
        with pytest.raises(ValueError, match="Invalid metadata"):
            put(hub, net, f"---\n{wrong}\n---\n".encode(), path="README.md")
        refused = {"key": "file", "value": {"path": "README.md", "content": f"---\n{wrong}\n---\n"}}
        if wrong != "a: [":
            with pytest.raises(HfHubHTTPError):
                send_commit(hub, net, refused)
    assert hub.repository(net).files()["README.md"] == kept


def test_a_collection_holds_each_item_once(hub: LocalHub, net: str) -> None:
    made = hub.client.create_collection("Depth sweep", namespace="lab", description="Two models")
    for _ in range(2):
        hub.client.add_collection_item(made.slug, net, "model", note="dense", exists_ok=True)
        hub.client.add_collection_item(made.slug, "2603.15389", "paper", exists_ok=True)
    with pytest.raises(HfHubHTTPError) as error:
        hub.client.add_collection_item(made.slug, "ada/gone", "model")
    assert status_of(error) == 404
    again = hub.client.create_collection("Depth sweep", namespace="lab", exists_ok=True)
    assert (again.slug, again.description) == (made.slug, "Two models")
    assert [(item.item_id, item.item_type, item.note) for item in again.items] == [
        (net, "model", "dense"),
        ("2603.15389", "paper", None),
    ]
    hub.client.update_collection_item(made.slug, again.items[1].item_object_id, position=0, note="the paper")
    renamed = hub.client.update_collection_metadata(made.slug, title="Renamed", private=True)
    assert renamed.slug.startswith("lab/renamed-")
    kept = hub.client.get_collection(made.slug)
    assert [(item.item_id, item.note) for item in kept.items] == [("2603.15389", "the paper"), (net, "dense")]
    hub.client.delete_collection_item(kept.slug, kept.items[0].item_object_id)
    assert [one.slug for one in hub.client.list_collections(owner="lab")] == [renamed.slug]
    assert list(hub.api().list_collections(owner="lab")) == []
    with pytest.raises(HfHubHTTPError):
        hub.client.create_collection("x" * 61, namespace="lab")
    hub.client.delete_collection(renamed.slug)
    hub.client.delete_collection(renamed.slug, missing_ok=True)


def test_a_space_has_a_kit(hub: LocalHub) -> None:
    hub.client.create_repo("ada/show", repo_type="space", space_sdk="gradio")
    hub.client.upload_file(path_or_fileobj=b"x = 1", path_in_repo="app.py", repo_id="ada/show", repo_type="space")
    assert hub.client.space_info("ada/show").sdk == "gradio"
    assert {*hub.repository("ada/show", "space").files()} == {".gitattributes", "README.md", "app.py"}
    assert not hub.client.repo_exists("ada/show")


# The other libraries


def test_a_dataset_is_pushed_and_loaded(hub: LocalHub) -> None:
    rows = {"layer": [0, 1, 2], "score": [0.5, 0.25, 0.125]}
    Dataset.from_dict(rows).push_to_hub("lab/reports")
    assert load_dataset("lab/reports", split="train").to_dict() == rows
    hub.client.create_repo("lab/lines", repo_type="dataset")
    lines = "\n".join(json.dumps({"layer": layer}) for layer in rows["layer"])
    put(hub, "lab/lines", lines.encode(), path="data/part.jsonl", repo_type="dataset")
    put(hub, "lab/lines", b'{"layer": 9}', path="data/part.jsonl", repo_type="dataset", revision="main")
    assert load_dataset("lab/lines", split="train")["layer"] == [9]
    first = hub.client.list_repo_commits("lab/lines", repo_type="dataset")[1].commit_id
    assert load_dataset("lab/lines", split="train", revision=first)["layer"] == [0, 1, 2]
    streamed = load_dataset("lab/reports", split="train", streaming=True)
    assert [row["layer"] for row in streamed] == rows["layer"]


def test_a_model_and_its_tokenizer_are_pushed_and_loaded(hub: LocalHub, tmp_path: Path) -> None:
    model, ids = tiny_llama(), random_blocks(1, 8)
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model.push_to_hub("ada/net")
    tokenizer.push_to_hub("ada/net")
    hub.client.create_branch("ada/net", branch="step4")
    other = tiny_llama(seed=1)
    other.push_to_hub("ada/net", revision="step4")
    assert AutoTokenizer.from_pretrained("ada/net")(SENTENCES[0]).input_ids == tokenizer(SENTENCES[0]).input_ids
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained("ada/net")(ids).logits, model(ids).logits)
        loaded = AutoModelForCausalLM.from_pretrained("ada/net", revision="step4")
        assert torch.equal(loaded(ids).logits, other(ids).logits)
    assert hub.repository("ada/net").files()["model.safetensors"].is_lfs


def test_another_process_needs_only_the_environment(hub: LocalHub, net: str, tmp_path: Path) -> None:
    code = f"""
import huggingface_hub as hub
print(hub.whoami()["name"], open(hub.hf_hub_download({net!r}, "notes/read.txt")).read())
"""
    environment = hub.environment(hub.token, tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ada", "first"]
    assert (tmp_path / "home" / "hub").is_dir()


def test_this_process_is_as_it_was_once_the_hub_is_gone() -> None:
    def settings() -> tuple:
        return constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE, huggingface_hub.hf_api.api.endpoint

    before = settings()
    with LocalHub() as hub, hub.connected(hub.add_user("ada")):
        assert settings() != before
    assert settings() == before
    assert constants.is_offline_mode()


# Faults


def test_an_error_is_answered_as_often_as_asked_and_nothing_is_done(hub: LocalHub, net: str) -> None:
    before = hub.repository(net).head.commit_id
    hub.faults.next("commit", status=503, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as error:
            put(hub, net, b"second")
        assert status_of(error) == 503
        assert hub.repository(net).head.commit_id == before
    assert put(hub, net, b"second") != before
    assert [entry.status for entry in hub.sent("commit")] == [503, 503, 200]


def test_too_many_requests_say_when_to_come_back(hub: LocalHub, net: str) -> None:
    hub.faults.next("create", status=429, retry_after=7)
    with pytest.raises(HfHubHTTPError, match="429") as error:
        hub.client.create_repo("ada/other")
    assert error.value.response.headers["Retry-After"] == "7"
    hub.faults.next("preupload", status=429, retry_after=0, skip=1)
    put(hub, net, b"second")
    put(hub, net, b"third")
    assert [entry.status for entry in hub.sent("preupload")] == [200, 429, 200]


def test_an_upload_that_is_cut_leaves_nothing_and_is_tried_again(hub: LocalHub, net: str) -> None:
    hub.faults.next("lfs-upload", cut="upload")
    put(hub, net, WEIGHTS[::-1], path="model.safetensors")
    assert [entry.status for entry in hub.sent("lfs-upload")] == [None, 200]
    assert hub.repository(net).files()["model.safetensors"].content == WEIGHTS[::-1]
    before = hub.repository(net).head.commit_id
    hub.faults.next("commit", cut="upload")
    with pytest.raises(Exception, match=r"(?i)disconnected|reset|closed") as error:
        put(hub, net, b"second")
    assert not isinstance(error.value, HfHubHTTPError)
    assert hub.repository(net).head.commit_id == before


def test_an_answer_that_is_cut_comes_after_the_deed(hub: LocalHub, net: str) -> None:
    hub.faults.next("commit", cut="answer")
    with pytest.raises(Exception, match=r"(?i)disconnected|reset|closed"):
        put(hub, net, b"second")
    assert hub.repository(net).files()["notes/read.txt"].content == b"second"
    hub.log.clear()
    assert put(hub, net, b"second") == hub.repository(net).head.commit_id
    assert hub.sent("commit") == []


@pytest.mark.parametrize(("path", "operation"), [("notes/read.txt", "download"), ("model.safetensors", "lfs-download")])
def test_a_download_that_is_cut_goes_on_where_it_stopped(
    path: str, operation: str, hub: LocalHub, net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the client keeps of a download at a time; by default more than this file has.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1)
    hub.faults.next(operation, cut="download")
    assert read(net, path) == hub.repository(net).files()[path].content
    first, second = hub.sent(operation)
    half = hub.repository(net).files()[path].size // 2
    assert ("range" in first.headers, second.headers["range"], second.status) == (False, f"bytes={half}-", 206)


def test_a_slow_answer_is_given_up_by_who_does_not_wait(hub: LocalHub, net: str) -> None:
    assert read(net) == b"first"
    put(hub, net, b"second")
    hub.faults.next("head", delay=2)
    assert read(net, etag_timeout=0.5) == b"first"
    assert read(net) == b"second"


def test_a_server_that_is_behind_gives_the_commit_before(hub: LocalHub, net: str) -> None:
    first = hub.repository(net).head.commit_id
    second = put(hub, net, b"second")
    hub.faults.always("info", stale="commit")
    hub.faults.next("head", stale="etag", path="*/read.txt")
    assert hub.client.model_info(net).sha == first
    assert (Path(snapshot_download(net)) / "notes/read.txt").read_bytes() == b"first"
    hub.faults.clear()
    assert hub.client.model_info(net).sha == second


def test_a_stale_etag_names_the_version_before(hub: LocalHub, net: str) -> None:
    files = hub.repository(net).files()
    second = put(hub, net, b"second")
    address = huggingface_hub.hf_hub_url(net, "notes/read.txt")
    hub.faults.next("head", stale="etag")
    metadata = [huggingface_hub.get_hf_file_metadata(address) for _ in range(2)]
    assert [one.commit_hash for one in metadata] == [second, second]
    kept = hub.repository(net).files()["notes/read.txt"]
    assert [one.etag for one in metadata] == [files["notes/read.txt"].etag, kept.etag]


def test_random_faults_are_the_same_for_the_same_seed(hub: LocalHub, net: str) -> None:
    def statuses(seed: int) -> list[int | None]:
        hub.faults.clear()
        hub.log.clear()
        hub.faults.random(seed, rate=0.5, operation="refs", kinds=[Fault(status=500), Fault(status=429)])
        for _ in range(20):
            huggingface_hub.get_session().get(f"{hub.url}/api/models/{net}/refs")
        return [entry.status for entry in hub.sent("refs")]

    first = statuses(3)
    assert {*first} == {200, 429, 500}
    assert statuses(3) == first
    assert statuses(4) != first


def test_many_writers_at_once_lose_nothing(hub: LocalHub, net: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: put(hub, net, b"%d" % index, path=f"{index}.bin"), range(24)))
    assert {f"{index}.bin" for index in range(24)} <= {*hub.repository(net).files()}
    assert len(hub.client.list_repo_commits(net)) == 26
