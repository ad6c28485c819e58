"""No output of a command overwrites what another of its arguments names, by whatever name or link."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from depthscope.cli import app
from depthscope.cli.paths import FILLS, READS, READS_TREE, WRITES, paths_of, refuse_overwriting
from depthscope.cli.shared import Program
from depthscope.errors import SettingsError, SweepError
from reports import sample_report

# Arguments that are words, not paths; whoever adds an argument decides which it is.
WORDS = {
    "attn_implementation",
    "bos",
    "budget",
    "by",
    "collection",
    "column",
    "device",
    "dtype",
    "gpu",
    "host",
    "language",
    "license",
    "norm_scaling",
    "only",
    "pairs",
    "precision",
    "probes",
    "repair",
    "requirement",
    "scores",
    "space",
    "split",
    "tasks",
    "to",
}
# Of push, which sends no model and so reads none: names on the Hub.
HUB_NAMES = {("push", "base_model"), ("push", "dataset"), ("analyze", "revision")}


def commands(program: typer.Typer = app, before: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    for command in program.registered_commands:
        assert command.callback is not None
        yield f"{before}{command.name or command.callback.__name__}", command.callback
    for group in program.registered_groups:
        assert group.typer_instance is not None
        yield from commands(group.typer_instance, f"{group.name} ")


def test_every_argument_of_every_command_is_a_word_or_says_what_is_done_with_its_path() -> None:
    checked = 0
    for name, command in commands():
        declared = paths_of(command)
        for argument, parameter in inspect.signature(command).parameters.items():
            if not ("str" in str(parameter.annotation) or "Path" in str(parameter.annotation)):
                continue
            checked += 1
            is_word = argument in WORDS or argument == "revision" or (name, argument) in HUB_NAMES
            assert (argument in declared) != is_word, f"{name}: {argument}"
    assert checked > 60


def test_a_path_that_does_not_say_what_is_done_with_it_is_no_command() -> None:
    program = Program()
    for annotation in (Path, Path | None, Annotated[list[Path] | None, typer.Option()]):

        def forgotten(out: annotation = None) -> None:  # type: ignore[valid-type]
            """Write."""

        with pytest.raises(TypeError, match="out is a path"):
            program.command()(forgotten)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of each that commands read, as the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        sample_report(num_layers=3).save(f"{name}.json")
    Path("c.txt").write_text("A text.\n" * 20)
    Path("texts").mkdir()
    Path("texts", "one.md").write_text("One.")
    Path("model").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("model", name).write_text("{}")
    Path("adapter").mkdir()
    Path("adapter", "adapter_config.json").write_text('{"base_model_name_or_path": "model"}')
    for part in ("00001", "00002"):
        Path(f"m-{part}-of-00002.gguf").write_bytes(b"GGUF")
    Path("run").mkdir()
    Path("run", "layer_stats.jsonl").write_text('{"step": 1, "layers": {"variance": [1.0, 2.0]}}\n')
    Path("tasks").mkdir()
    Path("tasks", "boolq.jsonl").write_text("{}")
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What is given, and what the message names.
REFUSED = [
    ("show a.json --html a.json", "--html", "REPORT|RUN"),
    ("show run --html run/layer_stats.jsonl", "--html", "REPORT|RUN"),
    ("show run/layer_stats.jsonl --html run/layer_stats.jsonl", "--html", "REPORT|RUN"),
    ("compare a.json b.json --html b.json", "--html", "REPORT..."),
    ("analyze model --text c.txt --out c.txt", "--out", "--text"),
    ("analyze model --text c.txt --html c.txt", "--html", "--text"),
    ("analyze model --text b.json --text c.txt --html c.txt", "--html", "--text"),
    ("analyze model --text texts --html texts/one.md", "--html", "--text"),
    ("analyze model --dataset a.json --out a.json", "--out", "--dataset"),
    ("analyze model --dataset a.json:plain --out a.json", "--out", "--dataset"),
    ("analyze model --out x.json --html x.json", "--out", "--html"),
    ("analyze model --out model/config.json", "--out", "MODEL"),
    ("analyze model --html model/model.safetensors", "--html", "MODEL"),
    ("analyze adapter --out model/config.json", "--out", "MODEL"),
    ("analyze adapter --base-model model --out model/config.json", "--out", "MODEL"),
    ("analyze hub/name --base-model model --out model/config.json", "--out", "--base-model"),
    ("analyze m-00001-of-00002.gguf --out m-00001-of-00002.gguf", "--out", "MODEL"),
    ("analyze m-00001-of-00002.gguf --out m-00002-of-00002.gguf", "--out", "MODEL"),
    ("sparsity model --text c.txt --out c.txt", "--out", "--text"),
    ("sparsity model --out x --html x", "--out", "--html"),
    ("evaluate model --out model/config.json", "--out", "MODEL"),
    ("evaluate model --report a.json --out a.json", "--out", "--report"),
    ("evaluate model --data tasks --out tasks/boolq.jsonl", "--out", "--data"),
    ("evaluate model --report model/config.json", "--report", "MODEL"),
    ("convert model model", "OUT", "MODEL"),
    ("convert c.txt c.txt", "OUT", "MODEL"),
    ("push run --to me --dry-run --out run", "--out", "DIR"),
    ("sweep run texts --out texts", "--out", "FILE"),
]


@pytest.mark.parametrize(("line", "one", "other"), REFUSED)
def test_an_output_that_would_overwrite_another_argument_is_refused(
    here: Path, line: str, one: str, other: str
) -> None:
    before = contents(here)
    run = CliRunner().invoke(app, line.split())
    assert run.exit_code == 2, run.output
    assert "would overwrite" in run.stderr
    assert one in run.stderr
    assert other in run.stderr
    assert contents(here) == before


def test_it_is_refused_before_anything_that_takes_time_is_imported(here: Path) -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from depthscope.cli import app\n"
        "for line in sys.argv[1:]:\n"
        "    run = CliRunner().invoke(app, line.split())\n"
        "    assert run.exit_code == 2, line\n"
        "    assert 'would overwrite' in run.stderr, line\n"
        "loaded = {'torch', 'transformers', 'pandas', 'plotly', 'datasets'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    lines = [line for line, *_ in REFUSED if not line.startswith(("analyze adapter", "analyze m-"))]
    subprocess.run([sys.executable, "-c", program, *lines], check=True, timeout=60)


def show(
    report: Annotated[Path, typer.Argument(), READS], html: Annotated[Path | None, typer.Option(), WRITES]
) -> None:
    """Read one file, write another."""


def both(
    out: Annotated[Path | None, typer.Option(), WRITES],
    html: Annotated[Path | None, typer.Option(), WRITES],
    text: Annotated[Path | None, typer.Option(), READS_TREE] = None,
) -> None:
    """Write two files."""


@pytest.mark.parametrize(
    "other",
    ["a.json", "./a.json", "run/../a.json", "linked/a.json", "soft.json", "hard.json", "softer.json", "ABSOLUTE"],
)
def test_one_file_is_one_by_whatever_name(here: Path, other: str) -> None:
    Path("linked").symlink_to(here)
    Path("soft.json").symlink_to("a.json")
    Path("softer.json").symlink_to(here / "soft.json")
    os.link("a.json", "hard.json")
    path = here / "a.json" if other == "ABSOLUTE" else Path(other)
    for report, html in (("a.json", path), (path, Path("a.json"))):
        with pytest.raises(SettingsError, match="would overwrite"):
            refuse_overwriting(show, {"report": Path(report), "html": html})


def test_a_file_in_a_folder_that_is_read_is_one_by_whatever_link(here: Path) -> None:
    """As in the cache of the Hub, where a model's folder holds links to files elsewhere."""
    Path("blobs").mkdir()
    Path("model", "config.json").rename("blobs/0123")
    Path("model", "config.json").symlink_to(here / "blobs" / "0123")
    Path("way").symlink_to("model")
    for output in ("blobs/0123", "model/config.json", "way/config.json"):
        with pytest.raises(SettingsError, match="would overwrite"):
            refuse_overwriting(show, {"report": Path("model"), "html": Path(output)})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x.json", "./x.json"),
        ("x.json", "X.JSON"),
        ("caf\u00e9.html", "cafe\u0301.html"),
        ("new", "dangling"),
        ("run/x", "way/X"),
    ],
)
def test_two_outputs_that_are_one_file_are_refused_where_neither_is_there_yet(here: Path, one: str, other: str) -> None:
    """Names that differ by case alone too: on Linux they are two files, elsewhere the second is often the first."""
    Path("dangling").symlink_to("new")
    Path("way").symlink_to("run")
    with pytest.raises(SettingsError, match=r"--out .* and --html .* would overwrite each other"):
        refuse_overwriting(both, {"out": Path(one), "html": Path(other)})


def test_what_overwrites_nothing_is_allowed(here: Path) -> None:
    refuse_overwriting(both, {"out": Path("run/x"), "html": Path("texts/x"), "text": Path("run")})
    refuse_overwriting(both, {"out": Path("x.json"), "html": Path("x.html")})
    refuse_overwriting(both, {"out": Path("model/report.json"), "html": None, "text": Path("model")})
    refuse_overwriting(show, {"report": Path("A.JSON"), "html": Path("a.json")})  # no such file on this file system
    refuse_overwriting(show, {"report": Path("a.json"), "html": Path("a-link.json")})
    for device in ("/dev/null", "/dev/full"):
        if Path(device).exists():
            refuse_overwriting(both, {"out": Path(device), "html": Path(device)})


def test_a_report_or_page_beside_what_it_is_of_is_written_again_but_not_in_a_folder_of_texts(here: Path) -> None:
    for _ in range(2):
        run = CliRunner().invoke(app, ["show", "run", "--html", "run/run.html"])
        assert run.exit_code == 0, run.output
    sample_report(num_layers=3).save("model/report.json")
    refuse_overwriting(show, {"report": Path("model"), "html": Path("model/report.json")})
    Path("run", "run.html").rename("texts/run.html")
    with pytest.raises(SettingsError, match=r"--html .* would overwrite what --text names"):
        refuse_overwriting(both, {"text": Path("texts"), "html": Path("texts/run.html"), "out": None})


def test_a_sweep_does_not_write_its_record_over_the_file_that_it_is_made_from(here: Path) -> None:
    from depthscope.sweep.runner import run_sweep
    from depthscope.sweep.specification import load_sweep

    Path("sweeps/mine").mkdir(parents=True)
    file = Path("sweeps/mine/sweep.yaml")
    file.write_text("# why it is so\nname: mine\ngrid: {depth: {num_hidden_layers: [2]}}\n")
    for out in (None, Path("sweeps/mine"), Path("sweeps/../sweeps/mine")):
        with pytest.raises(SweepError, match=r"would overwrite .*sweep.yaml"):
            run_sweep(load_sweep(file), out, progress=False)
    assert file.read_text().startswith("# why")
    Path("longer.yaml").write_text("extends: other.yaml\nname: longer\n")
    Path("other.yaml").write_text("extends: sweeps/mine/sweep.yaml\nseeds: [1]\n")
    with pytest.raises(SweepError, match=r"would overwrite .*sweep.yaml"):
        run_sweep(load_sweep("longer.yaml"), Path("sweeps/mine"), progress=False)
    assert file.read_text().startswith("# why")
    assert sorted(path.name for path in file.parent.iterdir()) == ["sweep.yaml"]


@pytest.mark.parametrize("there", [["config.json"], ["sweep.yaml", "sweep.json"], ["recipe.md", "model.safetensors"]])
def test_a_recipe_takes_the_place_of_an_earlier_one_only(tmp_path: Path, there: list[str]) -> None:
    words = ["recipe", "--layers", "4", "--width", "64", "--tokens", "2e6", "--vocab-size", "300", "--out"]
    for name in there:
        (tmp_path / name).write_text("of a model, or of a sweep")
    shown = CliRunner().invoke(app, [*words, str(tmp_path)])
    assert (shown.exit_code, "would be overwritten" in shown.stderr) == (2, True), shown.output
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        there, "of a model, or of a sweep"
    )
    for layers in ("4", "5"):
        again = [*words[:2], layers, *words[3:], str(tmp_path / "new")]
        assert CliRunner().invoke(app, again).exit_code == 0
    assert '"num_hidden_layers": 5' in (tmp_path / "new" / "config.json").read_text()


def test_push_looks_for_room_before_it_writes_cards(here: Path) -> None:
    from depthscope.hub.push import push

    with pytest.raises(SettingsError, match="not empty"):
        push("model", "me", dry_run="texts", progress=False)


def fill(source: Annotated[Path, typer.Argument(), READS], out: Annotated[Path, typer.Argument(), FILLS]) -> None:
    """Read a folder, fill another."""


def test_a_new_folder_within_the_one_that_is_read_is_allowed(here: Path) -> None:
    refuse_overwriting(fill, {"source": Path("model"), "out": Path("model/native")})
    with pytest.raises(SettingsError, match=r"OUT .* would overwrite what SOURCE names"):
        refuse_overwriting(fill, {"source": Path("model/../model"), "out": here / "model"})
