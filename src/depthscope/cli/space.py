"""`depthscope space` and `push-space`."""

import os
import sys
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from depthscope.cli.paths import FILLS
from depthscope.cli.shared import app, errors_for_people, say
from depthscope.errors import DepthscopeError, SettingsError
from depthscope.files.new_folder import new_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NAME = "layer_effectiveness"
# In a checkout, and in an installed package.
PLACES = (Path(__file__).parents[3] / "spaces" / NAME, Path(__file__).parents[1] / "_spaces" / NAME)

OWN_REQUIREMENT = "depthscope["
COMMIT_TITLE = "depthscope's page"
# Files of these kinds that an earlier push left would still be loaded.
PROGRAM_FILES = {".py", ".css", ".js", ".json"}


class YesOrNo(str, Enum):
    """The answer to a question."""

    yes = "yes"
    no = "no"


@app.command()
def space(
    share: Annotated[
        YesOrNo, typer.Option(help="Give a public link for three days, through Gradio's server.")
    ] = YesOrNo.no,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on; by default a free one from 7860 on.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 admits other machines.")] = "127.0.0.1",
) -> None:
    """Serve the page that analyses models in a browser, on this machine."""
    with errors_for_people("The page is no longer served."):
        if find_spec("gradio") is None:
            raise SettingsError("The page needs gradio, which is not installed: pip install 'depthscope[space]'.")
        environment = {"GRADIO_SHARE": str(share is YesOrNo.yes), "GRADIO_SERVER_NAME": host}
        if port is not None:
            environment["GRADIO_SERVER_PORT"] = str(port)
        os.chdir(space_folder())
        # In this process, so that stopping the command stops the server.
        os.execve(sys.executable, [sys.executable, "app.py"], {**os.environ, **environment})


@app.command()
def push_space(
    to: Annotated[str, typer.Option(help="The Space to create or update: NAMESPACE/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new Space private.")] = False,
    requirement: Annotated[
        str | None,
        typer.Option(
            help="The line that installs depthscope in the Space, if not this version from the package index; such as "
            "'depthscope[gguf] @ git+https://...'."
        ),
    ] = None,
    dry_run: Annotated[Path | None, typer.Option(help="Push nothing: write the files to this folder."), FILLS] = None,
) -> None:
    """Put the page on the Hugging Face Hub as a Space, in one commit.

    Files of an earlier push that the page no longer needs are removed; your own files stay.

    Log in first with hf auth login, or set HF_TOKEN.
    """
    with errors_for_people("The Hub holds complete commits only; run the same command again."):
        files = space_files(requirement)
        if dry_run is not None:
            _write(files, dry_run)
            say(f"Written: {dry_run}, {len(files)} files")
            return
        say(f"Space: {_push(files, to, private)}")


def space_folder() -> Path:
    """The folder of the Space's program.

    Raises:
        DepthscopeError: this installation lacks it.
    """
    for place in PLACES:
        if (place / "app.py").is_file():
            return place
    raise DepthscopeError(
        "This installation of depthscope lacks the page; install it again: pip install -U depthscope."
    )


def space_files(requirement: str | None = None) -> dict[str, bytes]:
    """The files of a Space: paths in the repository and their contents.

    Args:
        requirement: the line that installs depthscope there; by default the one of `requirements.txt`.
    """
    folder = space_folder()
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = {path.as_posix(): (folder / path).read_bytes() for path in paths if not any(map(_is_private, path.parts))}
    if requirement is not None:
        if not requirement.startswith("depthscope"):
            raise SettingsError(f"--requirement is {requirement!r}; give a line that installs depthscope.")
        lines = files["requirements.txt"].decode().splitlines()
        changed = [requirement if line.startswith(OWN_REQUIREMENT) else line for line in lines]
        files["requirements.txt"] = ("\n".join(changed) + "\n").encode()
    return files


def _is_private(part: str) -> bool:
    """Whether a file or folder is hidden or compiled code, which running the program leaves behind."""
    return part.startswith(".") or part == "__pycache__"


def _write(files: dict[str, bytes], folder: Path) -> None:
    if folder.exists():
        raise SettingsError(f"{folder} already exists; give the name of a new folder.")
    with new_folder(folder, SettingsError) as temporary:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _push(files: dict[str, bytes], to: str, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    from depthscope.hub.plan import check_names
    from depthscope.hub.push import client
    from depthscope.hub.retry import Patience

    if to.count("/") != 1:
        raise SettingsError(f"--to is {to!r}; give NAMESPACE/NAME, such as ada/layers.")
    check_names(to)
    api, patience = client(), Patience(report_wait=say)

    def open_space() -> str:
        return str(api.create_repo(to, repo_type="space", space_sdk="gradio", private=private, exist_ok=True))

    def commit() -> None:
        write = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        remove = [CommitOperationDelete(path_in_repo=name) for name in _pushed(api, to) if name not in files]
        api.create_commit(to, [*write, *remove], repo_type="space", commit_message=COMMIT_TITLE)

    url = patience.carry_out(f"open {to}", open_space)
    patience.carry_out(f"write {to}", commit)
    return url


def _pushed(api: "HfApi", to: str) -> list[str]:
    """The program files of a Space that push-space was the last to change."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(to, repo_type="space", recursive=True, expand=True)
    files = [entry for entry in entries if isinstance(entry, RepoFile) and Path(entry.path).suffix in PROGRAM_FILES]
    return [file.path for file in files if file.last_commit and file.last_commit.title == COMMIT_TITLE]
