"""The score that docs/architecture.md adds is then everywhere, and what it says of the rooms is true."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SOURCE = ROOT / "src" / "depthscope"

LOOK = r"""
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]  # the tests' helpers, and the Space
import torch
from rich.console import Console
import depthscope
from depthscope import analyze, compare
from depthscope.hub.cards.data import DepthCardData
from depthscope.hub.cards.render import render_card
from depthscope.report.measures import EXPLAINED, measures_markdown
from depthscope.sweep.report.derived import COLUMNS, MAIN, derive
from depthscope.views.report_page import render_page
from depthscope.views.terminal import print_comparison, print_measures, print_report
from models import random_blocks, tiny_llama

torch.set_num_threads(1)
assert depthscope.__file__.startswith(sys.argv[3]), depthscope.__file__
model, blocks = tiny_llama(), random_blocks(6, 12)
report = analyze(model, blocks=blocks, scores="skip,sign_flips", fit_blocks=0, eval_blocks=6, progress=False)
assert "sign_flips" in depthscope.Settings().scores

# The number itself, slowly.
hidden = model(blocks, output_hidden_states=True).hidden_states
first = (hidden[0].sign() != hidden[1].sign()).double().mean().item()
assert abs(report.layers[0]["sign_flips"] - first) < 1e-9, (report.layers[0], first)
assert report.scores["sign_flips_se"] > 0

def shown(show, *content):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    show(*content, console)
    return console.export_text()

assert "Sign flips" in shown(print_measures, EXPLAINED)
assert "Sign flips" in measures_markdown()
assert "flips" in shown(print_report, report) and "mean sign flips" in shown(print_report, report)
assert "flips A" in shown(print_comparison, compare([report, report]))
page = render_page(report)
assert "Sign flips" in page and "mean sign flips" in page
assert "sign_flips" in report.to_frame().columns and "mean sign flips" in report.to_markdown()
card = str(render_card(DepthCardData(repo_id="a/b", report=report)))
front, _, body = card.partition("\n---\n")
assert "sign flips" in body and "ign flips" in front, card
assert derive({}, report, None)["sign_flips"] == report.scores["sign_flips"]
assert "sign_flips" in COLUMNS and "sign_flips" in MAIN

# The Space
from jobs.tasks import STAGES
from page.choices_panel import DEFAULT_SCORES
from depthscope.views.plots.depth import SCORES
from page.results.parts import layer_table
assert "sign_flips" in DEFAULT_SCORES and "sign_flips" in SCORES
assert any("sign_flips" in names for names in STAGES.values())
assert "sign flips" in layer_table(report).columns
"""


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_one_file_and_one_record_put_a_score_everywhere(tmp_path: Path) -> None:
    package = tmp_path / "src" / "depthscope"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert len(list((package / "scores").glob("*.py"))) < 14  # there is room for one more
    (package / "scores" / "sign_flips.py").write_text(block("python"))
    with (package / "report" / "measures.yaml").open("a") as records:
        records.write("\n" + block("yaml"))
    places = [ROOT / "tests" / "support", ROOT / "spaces" / "layer_effectiveness", tmp_path]
    paths = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *map(str, places)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_every_room_has_its_line() -> None:
    table = DOCUMENT.partition("| room |")[2].partition("\n\n")[0]
    named = {name for line in table.splitlines() for name in re.findall(r"`([\w/]+)`", line.split("|")[1])}
    rooms = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert rooms | {"errors", "settings", "processes"} == named


def test_no_package_has_more_than_fourteen_files_and_the_root_six() -> None:
    assert len([path for path in SOURCE.iterdir() if path.is_file()]) <= 6
    for place in (SOURCE, ROOT / "spaces" / "layer_effectiveness"):
        for folder in {path.parent for path in place.rglob("*.py")}:
            files = list(folder.glob("*.py"))
            assert len(files) <= 14, f"{folder.name} has {len(files)} files"


def test_every_file_that_the_document_names_exists() -> None:
    for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml))`", DOCUMENT):
        if "sign_flips" not in name:
            assert (SOURCE / name).exists() or (ROOT / name).exists(), name
