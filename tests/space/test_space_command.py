"""`depthscope space` and `push-space`."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
import yaml
from packaging.requirements import Requirement
from typer.testing import CliRunner

from depthscope.cli import app, space
from depthscope.cli.space import space_files, space_folder
from forks import new_python


def run(*words):
    return CliRunner().invoke(app, list(words))


def test_the_space_on_the_hub_is_the_folder_and_nothing_else(hub):
    ended = run("push-space", "--to", "ada/layers")
    assert ended.exit_code == 0, ended.output
    repository = hub.repository("ada/layers", kind="space")
    pushed = {name: file.content for name, file in repository.files("main").items() if name != ".gitattributes"}
    assert pushed == space_files()
    files = {"app.py", "requirements.txt", "README.md", "page/style.css", "page/results/depth_sweep.json"}
    assert files <= pushed.keys()


def test_pushing_again_brings_it_up_to_date(hub):
    assert run("push-space", "--to", "ada/layers").exit_code == 0
    line = "depthscope[gguf] @ git+https://example.org/depthscope"
    assert run("push-space", "--to", "ada/layers", "--requirement", line).exit_code == 0
    files = hub.repository("ada/layers", kind="space").files("main")
    assert line in files["requirements.txt"].content.decode().splitlines()


def test_a_push_goes_on_where_the_hub_was_busy_for_a_moment(hub):
    hub.faults.next("commit", status=503)
    ended = run("push-space", "--to", "ada/layers")
    assert ended.exit_code == 0, ended.output
    assert "app.py" in hub.repository("ada/layers", kind="space").files("main")


def pushed_from(folder, files, monkeypatch):
    """Push a page that consists of these files."""
    for name, content in {"app.py": "", "requirements.txt": "depthscope[gguf]\n", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    monkeypatch.setattr(space, "PLACES", (folder,))
    ended = run("push-space", "--to", "ada/layers")
    assert ended.exit_code == 0, ended.output


def test_what_programs_left_in_hidden_folders_is_not_published(hub, tmp_path, monkeypatch):
    left = dict.fromkeys(
        (".gradio/certificate.pem", ".venv/lib/x.py", "tabs/.cache/x.json", "tabs/__pycache__/x.py"), ""
    )
    # A checkout may itself lie below a hidden folder.
    pushed_from(tmp_path / ".work", {**left, ".hidden.py": "", "tabs/analyze.py": ""}, monkeypatch)
    files = hub.repository("ada/layers", kind="space").files("main").keys() - {".gitattributes", "README.md"}
    assert files == {"app.py", "requirements.txt", "tabs/analyze.py"}


def test_modules_that_the_page_has_no_more_are_removed_and_the_owners_files_stay(hub, tmp_path, monkeypatch):
    program = {
        "old.py": "old",
        "old/style.css": "",
        "old/page.js": "",
        "old.json": "{}",
        "mine.py": "",
        "notes.txt": "",
    }
    pushed_from(tmp_path / "before", program, monkeypatch)
    for name in ("own.py", "own.json", "mine.py"):
        hub.client.upload_file(
            path_or_fileobj=b"own", path_in_repo=name, repo_id="ada/layers", repo_type="space", commit_message="Mine"
        )
    repository = hub.repository("ada/layers", kind="space")
    commits = len(repository.commits)
    pushed_from(tmp_path / "after", {"new.py": ""}, monkeypatch)
    assert len(repository.commits) == commits + 1
    files = repository.files("main").keys() - {".gitattributes", "README.md"}
    assert files == {"app.py", "requirements.txt", "new.py", "own.py", "own.json", "mine.py", "notes.txt"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "layers"], "give NAMESPACE/NAME"),
        (["--to", "nobody/layers"], "the token may not"),
        (["--to", "ada/la yers"], "The Hub does not accept"),
        (["--to", "ada/layers", "--requirement", "numpy"], "installs depthscope"),
    ],
)
def test_what_cannot_be_pushed_ends_with_one_message(hub, words, said):
    ended = run("push-space", *words)
    assert ended.exit_code == 2
    assert said in " ".join(ended.output.split())


def test_a_dry_run_writes_what_would_be_pushed(tmp_path):
    assert run("push-space", "--to", "ada/layers", "--dry-run", str(tmp_path / "out")).exit_code == 0
    assert (tmp_path / "out" / "app.py").read_bytes() == (space_folder() / "app.py").read_bytes()
    assert run("push-space", "--to", "ada/layers", "--dry-run", str(tmp_path / "out")).exit_code == 2


def test_the_front_matter_and_the_requirements_name_the_versions_that_are_tested():
    front = yaml.safe_load((space_folder() / "README.md").read_text().split("---")[1])
    lines = (space_folder() / "requirements.txt").read_text().splitlines()
    pinned = {requirement.name: str(requirement.specifier) for requirement in map(Requirement, lines)}
    assert pinned["gradio"] == f"=={front['sdk_version']}"
    assert front["app_file"] == "app.py"
    assert len(front["short_description"]) <= 60
    tested = (space_folder().parents[1] / "requirements-dev.txt").read_text().splitlines()
    for name in ("gradio", "torch", "transformers", "huggingface-hub"):
        assert f"{name}{pinned[name]}" in tested


def test_each_room_of_the_space_imports_from_those_below_it_only():
    rooms = ["safety", "jobs", "page.results", "page", "app"]
    for path in space_folder().rglob("*.py"):
        own = ".".join(path.relative_to(space_folder()).parent.parts) or "app"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in rooms:
                room = next(room for room in rooms if f"{node.module}.".startswith(f"{room}."))
                assert rooms.index(room) <= rooms.index(own), f"{path.name} imports {node.module}"


def test_nothing_else_is_called_as_the_rooms_of_the_space():
    names = {path.name for path in space_folder().iterdir() if (path / "__init__.py").is_file()}
    assert names == {"page", "jobs", "safety"}
    assert not names & {*sys.stdlib_module_names, *packages_distributions()}


def test_every_module_of_the_space_is_imported_by_its_program():
    code = "from page import interface, serving; from jobs import measuring, worker"
    code += "; import sys; print(*sys.modules, sep='\\n')"
    done = new_python("-c", code, cwd=space_folder())
    assert done.returncode == 0, done.stderr
    paths = [path.relative_to(space_folder()).with_suffix("") for path in space_folder().rglob("*.py")]
    modules = {".".join(path.parts).removesuffix(".__init__") for path in paths} - {"app"}
    assert modules <= set(done.stdout.split())


def test_the_page_leaves_torch_to_the_jobs():
    code = "import sys; from page import interface, serving; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=space_folder(), check=True)
