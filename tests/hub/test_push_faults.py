"""Pushes to a Hub where things go wrong: whole or not at all, one clear message, and complete after the next push."""

import hashlib
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from depthlm import tiny_depthlm
from depthscope.cli import app
from depthscope.errors import HubError
from depthscope.hub.collection import CollectionPlan, Item
from depthscope.hub.commit import Changes, Remote, changes
from depthscope.hub.errors import hide_tokens
from depthscope.hub.plan import PushPlan
from depthscope.hub.push import client, publish, push
from depthscope.hub.retry import Patience
from depthscope.hub.tree import MANIFEST, Digest, Tree, read_manifest
from hub import LocalHub

pytest.importorskip("matplotlib")

PUSHES = 100
REPOSITORIES = 20
STEPS = ("step0", "step1")
# What a push sends, all of which may go wrong.
OPERATIONS = (
    "info",
    "create",
    "refs",
    "commits",
    "branch",
    "validate-yaml",
    "preupload",
    "lfs-batch",
    "lfs-upload",
    "lfs-verify",
    "commit",
    "download",
    "collections",
    "collection-create",
    "item-add",
)
FAULTS = (
    {"status": 429, "retry_after": 0},
    {"status": 500},
    {"status": 503},
    {"cut": "upload"},
    {"cut": "answer"},
    {"cut": "download"},
    {"delay": 0.02},
    {"stale": "commit"},
    {"status": 403},
)
LASTING = 1000  # times: more than anybody has patience for


def patient(**options: float) -> Patience:
    """As patient as always, with waits that a test can afford."""
    return Patience(base=0.001, longest=0.005, **options)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's own waits are a thousandth as long."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 1000))


@dataclass(frozen=True)
class Version:
    """What a push is to leave: files by branch, as text."""

    branches: dict[str, dict[str, str]]

    @classmethod
    def number(cls, version: int) -> "Version":
        """Each version has other weights, another card, and a file that only it has."""
        weights = {"config.json": "{}", "model.safetensors": f"weights {version}"}
        main = weights | {"README.md": f"---\nlicense: mit\n---\n# {version}\n", f"only-{version}.model": "x"}
        return cls({step: weights | {"model.safetensors": f"{step} of {version}"} for step in STEPS} | {"main": main})

    def trees(self, repo_id: str, folder: Path) -> list[Tree]:
        made = []
        for branch, files in self.branches.items():
            (folder / branch).mkdir(parents=True, exist_ok=True)
            for path, text in files.items():
                (folder / branch / path).write_text(text)
            made.append(Tree(repo_id, "model", branch, {path: folder / branch / path for path in files}))
        return made


def there(hub: LocalHub, repo_id: str, branch: str) -> dict[str, str] | None:
    """The files of a branch that a push makes, None where there is no such branch; the manifest must be true."""
    repository = hub.state.repositories.get(("model", repo_id))
    if repository is None or branch not in repository.branches:
        return None
    files = dict(repository.files(branch))
    files.pop(".gitattributes")
    manifest = files.pop(MANIFEST, None)
    listed = read_manifest(manifest.content) if manifest else {}
    assert {path: digest.sha256 for path, digest in listed.items()} == {
        path: hashlib.sha256(file.content).hexdigest() for path, file in files.items()
    }
    return {path: file.content.decode() for path, file in files.items()}


def require_whole(hub: LocalHub, repo_id: str, allowed: list[Version]) -> None:
    """Each branch holds all of one version, or nothing."""
    for branch in ("main", *STEPS):
        found = there(hub, repo_id, branch)
        assert not found or found in [version.branches[branch] for version in allowed], (repo_id, branch, found)


def test_a_hundred_pushes_with_a_fault_each_end_whole(
    hub: LocalHub, hurried: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("DEPTHSCOPE_SEED", random.randrange(2**32)))
    with capsys.disabled():
        print(f" seed {seed} ", end="", flush=True)
    chance, api, failures, used = random.Random(seed), client(hub.token), 0, 0
    for number in range(PUSHES):
        repo_id, version = f"ada/net-{number % REPOSITORIES}", number // REPOSITORIES
        now = Version.number(version)
        before = [Version.number(version - 1)] if version else []
        collection = CollectionPlan("ada", "nets", (Item("paper", "2603.15389"), Item("model", repo_id)))
        plan = PushPlan([now.trees(repo_id, tmp_path / str(version))], collection)
        fault = dict(chance.choice(FAULTS))
        times = chance.choice((1, 1, 2, LASTING))
        rule = hub.faults.next(chance.choice(OPERATIONS), times=times, skip=chance.choice((0, 0, 1, 2)), **fault)
        what = f"seed {seed}, push {number}: {rule}"
        complaint = None
        try:
            publish(api, plan, patient())
        except HubError as error:
            complaint = str(error)
            assert "run the same command again" in complaint or "Cannot" in complaint, what
            assert hub.token not in complaint, what
        used += rule.used > 0
        require_whole(hub, repo_id, [*before, now])
        if complaint is None:
            assert all(there(hub, repo_id, branch) == now.branches[branch] for branch in now.branches), what
        else:
            failures += 1
            # One refusal, or more failures than there are attempts; anything less is got over.
            assert fault.get("status") == 403 or times == LASTING, f"{what}: {complaint}"
        hub.faults.clear()
        again = publish(api, plan, patient())
        assert all(there(hub, repo_id, branch) == now.branches[branch] for branch in now.branches), what
        assert complaint or not any(one.is_changed for one in again.revisions), what
    (listed,) = api.list_collections(owner="ada")
    items = [item.item_id for item in api.get_collection(listed.slug).items]
    assert sorted(items) == sorted(["2603.15389", *(f"ada/net-{number}" for number in range(REPOSITORIES))])
    assert used > PUSHES / 3
    assert failures > 3


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_depthlm("dense").save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def test_waits_are_as_long_as_the_hub_asks_and_bounded(hub: LocalHub, saved: Path) -> None:
    said: list[str] = []
    patience = Patience(attempts=3, base=0.001, longest=0.01, report_wait=said.append)
    waits: list[float] = []
    patience.stop.wait = waits.append  # type: ignore[method-assign,assignment]
    api = client(hub.token)
    hub.faults.always("create", status=429, retry_after=7)
    with pytest.raises(HubError, match=r"in 3 attempts: 429 Too Many Requests"):
        patience.carry_out("make it", lambda: api.create_repo("ada/net"))
    assert waits == [0.01, 0.01]
    patience.longest = 300
    with pytest.raises(HubError):
        patience.carry_out("make it", lambda: api.create_repo("ada/net"))
    assert waits[2:] == pytest.approx([7, 7], abs=0.1)
    assert len(said) == 4
    hub.faults.clear()
    hub.faults.always("create", status=503)
    patience.attempts = 5
    with pytest.raises(HubError):
        patience.carry_out("make it", lambda: api.create_repo("ada/net"))
    backoff = waits[4:]
    assert all(0.001 * 2**i <= wait <= 0.0015 * 2**i for i, wait in enumerate(backoff)), backoff
    assert len(hub.sent("create")) == 11


def test_what_was_uploaded_before_an_interruption_is_not_sent_again(hub: LocalHub, saved: Path, hurried: None) -> None:
    hub.faults.next("commit", status=403)
    with pytest.raises(HubError, match="the token may not"):
        push(saved, "ada", progress=False)
    assert len(hub.sent("lfs-upload")) == 1
    assert hub.repository("ada/net").files().keys() == {".gitattributes"}
    push(saved, "ada", progress=False)
    assert len(hub.sent("lfs-upload")) == 1
    assert "model.safetensors" in hub.repository("ada/net").files()


def test_an_answer_that_got_lost_does_not_make_a_second_commit(hub: LocalHub, saved: Path) -> None:
    hub.faults.next("commit", cut="answer")
    done = push(saved, "ada", progress=False, patience=patient())
    repository = hub.repository("ada/net")
    assert len(list(repository.history(repository.head))) == 2
    assert done.revisions[0].commit == repository.head.commit_id
    assert done.revisions[0].is_changed


def test_a_commit_of_somebody_else_in_between_is_not_written_over(
    hub: LocalHub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(saved, "ada", progress=False)
    (saved / "extra.model").write_text("new")
    from depthscope.hub import commit

    original, other = commit.changes, iter(range(1))

    def meanwhile(*arguments: object) -> Changes:
        for _ in other:
            hub.client.upload_file(path_or_fileobj=b"theirs", path_in_repo="NOTES.md", repo_id="ada/net")
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(commit, "changes", meanwhile)
    push(saved, "ada", progress=False, patience=patient())
    repository = hub.repository("ada/net")
    assert {"NOTES.md", "extra.model"} <= repository.files().keys()
    assert [entry.status for entry in hub.sent("commit")][-2:] == [412, 200]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda hub: hub.expire(hub.token), "does not accept the token"),
        (lambda hub: hub.set_role("ada", "lab", "read"), "may only read"),
        (lambda hub: os.environ.update(HF_TOKEN=hub.add_token("ada", role="read")), "may only read"),
        (lambda hub: os.environ.pop("HF_TOKEN"), "no token"),
        (lambda hub: os.environ.update(HF_TOKEN=f"{hub.token} {hub.token}"), "has invalid characters"),
    ],
)
def test_a_token_that_may_not_push_is_one_message_at_once(
    break_it: object, message: str, hub: LocalHub, saved: Path
) -> None:
    break_it(hub)  # type: ignore[operator]
    done = CliRunner().invoke(app, ["push", str(saved), "--to", "lab"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert done.output.count("Error:") == 1
    assert len(hub.sent()) <= 1
    assert hub.token not in done.output


def test_a_permission_lost_half_way_stops_all_repositories(hub: LocalHub, tmp_path: Path) -> None:
    version = Version.number(0)
    plan = PushPlan([version.trees(f"lab/net-{number}", tmp_path / str(number)) for number in range(8)])
    api = client(hub.token)
    lost = hub.faults.next("commit", times=LASTING, skip=3, status=403)
    with pytest.raises(HubError, match="the token may not"):
        publish(api, plan, patient())
    assert 1 <= lost.used <= 4  # those that were under way
    for number in range(8):
        require_whole(hub, f"lab/net-{number}", [version])
    hub.faults.clear()
    publish(api, plan, patient())
    assert all(there(hub, f"lab/net-{number}", "main") == version.branches["main"] for number in range(8))


def test_a_push_that_was_killed_goes_on(hub: LocalHub, saved: Path, tmp_path: Path) -> None:
    """The process is killed while its commit is under way; the branch is empty or whole, and the next push ends it."""
    hub.faults.next("commit", delay=5.0)
    command = [sys.executable, "-m", "depthscope", "push", str(saved), "--to", "ada"]
    environment = hub.environment(hub.token, tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        until = time.monotonic() + 120
        while not hub.sent("commit") and time.monotonic() < until:
            # The token is in no list of processes: nobody can read it off the command.
            seen = Path(f"/proc/{process.pid}/cmdline")
            assert not seen.exists() or hub.token.encode() not in seen.read_bytes()
            time.sleep(0.05)
        process.kill()
        output = process.communicate()[0]
    assert hub.sent("commit"), output
    assert hub.token.encode() not in output
    uploads = len(hub.sent("lfs-upload"))
    done = push(saved, "ada", progress=False)
    assert "model.safetensors" in hub.repository("ada/net").files()
    assert len(hub.sent("lfs-upload")) == uploads == 1
    assert done.revisions[0].commit == hub.repository("ada/net").head.commit_id


def test_tokens_are_in_no_message_and_no_log(
    hub: LocalHub, saved: Path, hurried: None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    for fault in FAULTS:
        hub.faults.next("commit", times=LASTING, **fault)
        try:
            push(saved, "ada", progress=False, patience=patient(report_wait=said.append))
        except HubError as error:
            said.append(repr(error))
        hub.faults.clear()
    assert len(said) > 5
    output = capfd.readouterr()
    for text in (*said, caplog.text, output.out, output.err):
        assert hub.token not in text
    assert hide_tokens(f"Illegal header value b'Bearer {hub.token}x'") == "Illegal header value b'***"
    assert hide_tokens("hf_abcdefghijkl was refused") == "*** was refused"


def test_what_a_push_may_replace_and_remove(tmp_path: Path) -> None:
    """By hand: the file on the Hub (none, ours of before, somebody's), against ours of now."""
    (tmp_path / "new").write_text("new")
    tree = Tree("a/b", "model", "main", {"file": tmp_path / "new"})
    new, old, other = tree.digests["file"], Digest("1" * 64, "1" * 40), Digest("2" * 64, "2" * 40)

    def found(files: dict[str, Digest], made: dict[str, Digest], **options: bool) -> tuple[list[str], ...]:
        result = changes(tree, Remote("c0ffee", files, made), **options)
        return result.write, result.remove, result.kept

    assert found({}, {}) == (["file"], [], [])
    assert found({"file": new}, {}) == ([], [], [])
    assert found({"file": Digest(new.sha256, None)}, {}) == ([], [], [])
    assert found({"file": Digest(None, new.git)}, {}) == ([], [], [])
    assert found({"file": old}, {"file": old}) == (["file"], [], [])
    assert found({"file": other}, {"file": new}) == ([], [], ["file"])
    assert found({"file": other}, {}, overwrite=True) == (["file"], [], [])
    for made in ({}, {"file": old}):
        with pytest.raises(HubError, match="--overwrite"):
            found({"file": other}, made)
    assert found({"file": new, "gone": old}, {"gone": old}) == ([], ["gone"], [])
    assert found({"file": new, "gone": other}, {"gone": old}) == ([], [], ["gone"])
    assert found({"file": new, "theirs": other}, {}) == ([], [], [])
    assert found({"file": new}, {"gone": old}) == ([], [], [])


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"schema_version": 1, "files": 3}', b"\xff\xfe", b"{}" * 9])
def test_a_manifest_that_is_not_ours_lists_nothing(content: bytes) -> None:
    assert read_manifest(content) == {}


@pytest.fixture(autouse=True)
def _environment_as_before() -> Iterator[None]:
    token = os.environ.get("HF_TOKEN")
    yield
    os.environ.pop("HF_TOKEN", None) if token is None else os.environ.update(HF_TOKEN=token)
    assert threading.active_count() < 40
