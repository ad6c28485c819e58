"""What a training run's history is shown as: a table, figures, a page, a data frame."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from depthscope.callbacks import VarianceCallback, read_history
from depthscope.cli import app
from depthscope.errors import ReportError
from depthscope.runs.layout import HISTORY
from depthscope.views.plots.run import run_figures
from depthscope.views.run_page import render_run_page, summary
from depthscope.views.run_terminal import RunHistory, print_run
from models import tiny_llama
from runs import trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer(tiny_llama(), folder, [VarianceCallback()], max_steps=9, logging_steps=3).train()
    return folder


def test_the_table_shows_the_last_values_at_any_width(run: Path) -> None:
    history = RunHistory.load(run)
    last = read_history(run)[-1]["layers"]["variance"]
    for width in (40, 80, 160):
        console = Console(width=width, record=True)
        print_run(history, console)
        lines = console.export_text().splitlines()
        assert all(len(line.rstrip()) <= width for line in lines)
        assert any(line.split()[:2] == ["3", f"{last[3]:.3g}"] for line in lines)


def test_the_course_of_each_layer_is_drawn(run: Path) -> None:
    history = RunHistory.load(run)
    figure = run_figures(history)["variance_over_time"]
    steps, values = history.over_time("variance")
    assert steps == [3, 6, 9]
    for layer, line in enumerate(figure.data[:4]):
        assert list(line.x) == steps
        assert list(line.y) == [row[layer] for row in values]
    assert list(run_figures(history)["variance_map"].data[0].y) == [0, 1, 2, 3]


def test_the_page_is_whole_and_asks_nothing_of_the_network(run: Path) -> None:
    page = render_run_page(RunHistory.load(run))
    assert "default-src 'none'" in page
    assert 'src="http' not in page
    drawn = json.loads(page.partition('id="figures">')[2].partition("</script>")[0])
    assert {"run-variance-over-time", "run-variance-map"} <= drawn.keys()
    assert all(f'id="{element}"' in page for element in drawn)


def test_the_summary_says_how_the_variance_went(run: Path) -> None:
    history = RunHistory.load(run)
    _, values = history.over_time("variance")
    said = " ".join(summary(history))
    assert f"from {values[0][-1]:.3g}" in said
    assert f"to {values[-1][-1]:.3g}" in said


def test_a_data_frame_has_a_row_for_each_step_and_layer(run: Path) -> None:
    frame = RunHistory.load(run).to_frame()
    assert len(frame) == 3 * 4
    row = read_history(run)[1]
    assert frame[frame.step == 6].variance.tolist() == row["layers"]["variance"]


def test_the_command_shows_a_folder_and_a_file(run: Path, tmp_path: Path) -> None:
    for path in (run, run / HISTORY):
        result = CliRunner().invoke(app, ["show", str(path), "--html", str(tmp_path / "run.html")])
        assert result.exit_code == 0, result.output
        assert "steps 3 to 9" in result.output
    assert (tmp_path / "run.html").stat().st_size > 1_000_000


def test_values_that_were_not_finite_are_named(tmp_path: Path) -> None:
    rows = [{"step": step, "kind": "variance", "layers": {"variance": [1.0, None]}, "values": {}} for step in (1, 2)]
    rows[1]["not_finite"] = {"step": 2, "layer": 1}
    (tmp_path / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = RunHistory.load(tmp_path)
    console = Console(width=80, record=True)
    print_run(history, console)
    assert "not finite: first after layer 1, in step 2" in console.export_text()
    assert "layer 1, in step 2" in render_run_page(history)


def test_a_folder_without_a_history_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"There is no layer_stats\.jsonl"):
        RunHistory.load(tmp_path)
    (tmp_path / HISTORY).write_text('{"step": 1, "kin')
    with pytest.raises(ReportError, match="is empty"):
        RunHistory.load(tmp_path)
    result = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert result.exit_code == 2
