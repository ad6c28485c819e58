"""The folder of a run: what its files are called, and what is read of them."""

import json
from pathlib import Path

import pytest

from depthscope.errors import ReportError
from depthscope.hub.cards.read import read_card_data
from depthscope.runs.layout import checkpoint_folder, checkpoints, is_published, published_steps, step_folder
from depthscope.runs.read import losses, read_sealed, variances


def test_steps_are_found_by_their_number_and_in_its_order(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        checkpoint_folder(tmp_path, step).mkdir()
        step_folder(tmp_path, step).mkdir(parents=True)
    for name in ("checkpoint-last", "checkpoint-", "checkpoint-" + "9" * 200, "steps/step-1.part"):
        (tmp_path / name).mkdir()
    assert list(checkpoints(tmp_path)) == list(published_steps(tmp_path)) == [2, 9, 10]
    assert checkpoints(tmp_path)[10].name == "checkpoint-10"


def test_early_steps_are_published_and_then_every_nth() -> None:
    assert [step for step in range(1301) if is_published(step, 300)] == [0, *(2**i for i in range(10)), 600, 900, 1200]


@pytest.mark.parametrize("loss", ["1" + "0" * 400, "1e200", "NaN", "true", '"3"', "null"])
def test_a_loss_that_is_no_number_is_null_for_the_report_and_for_the_card(tmp_path: Path, loss: str) -> None:
    """An integer of hundreds of digits is no float; the card once ended with an OverflowError for it."""
    (tmp_path / "point.json").write_text('{"training": {}}')
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "loss": {loss}}}\n{{"step": 2, "loss": 3.5}}\n')
    history = {"step": 1, "layers": {"variance": [1.0, 1e200]}}
    (tmp_path / "layer_stats.jsonl").write_text(json.dumps(history) + "\n")
    assert (losses(tmp_path).steps, losses(tmp_path).values) == ([1, 2], [None, 3.5])
    card = read_card_data(tmp_path, repo_id="ada/model")
    assert card.losses is not None
    assert card.losses.values == [None, 3.5]
    assert card.variances is not None
    assert card.variances.values == variances(tmp_path).values == [[1.0, None]]


def test_a_line_that_is_cut_is_counted_and_no_card_is_made_of_it(tmp_path: Path) -> None:
    (tmp_path / "point.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.5}\n{"step": 2, "lo\n')
    assert (losses(tmp_path).steps, losses(tmp_path).unread) == ([1], 1)
    with pytest.raises(ReportError, match=r"log.jsonl' has a line that is not JSON"):
        read_card_data(tmp_path, repo_id="ada/model")


@pytest.mark.parametrize("content", ['{"status": "finished", "check": "00000000"}', "[1]", '{"status": "fin'])
def test_a_record_that_is_not_what_was_written_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ReportError, match=r"^result.json (was changed or damaged|is not JSON)"):
        read_sealed(tmp_path / "result.json")
