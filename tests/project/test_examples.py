"""The examples run as a reader would run them."""

from pathlib import Path

from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import depthscope  # noqa: F401  (the Auto classes know DepthLM once it is imported)
from commands import python
from depthscope.callbacks import read_history
from depthscope.cli import app

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_training_example_shows_its_layers(tmp_path: Path) -> None:
    done = python(EXAMPLES / "train.py", "--out", tmp_path / "run", "--steps", 10, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in read_history(tmp_path / "run") if row["kind"] == "variance"] == list(range(1, 11))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.model_type == "depthlm"
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "run")])
    assert shown.exit_code == 0
    assert "steps 1 to 10" in shown.output
