"""What only reads starts without torch and transformers, which take seconds to import."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from depthscope.models.configuration_depthlm import DepthLMConfig
from depthscope.models.defaults import DEFAULTS
from depthscope.sweep.grid import OF_MODEL
from reports import sample_report

pytest.importorskip("matplotlib")

# The commands run in one process, one after the other; what any of them imports is found at the end.
PROGRAM = """
import pkgutil, sys
from importlib import import_module
from typer.testing import CliRunner
from depthscope.cli import app

def heavy():
    return {"torch", "transformers", "accelerate", "datasets"} & set(sys.modules)

def run(*words):
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    assert not heavy(), (words, heavy())
    return done.output

assert "num_hidden_layers" in open("sweep/sweep.json").read()
assert "plotly" not in sys.modules
run("sweep", "report", "sweep")
said = run("push", "sweep", "--to", "ada", "--dry-run", "--out", "pushed")
assert "layers.parquet" in said and "ada/tiny-L2-seed0" in said, said
for room in ("depthscope.sweep.report", "depthscope.hub.cards", "depthscope.runs", "depthscope.files"):
    for module in pkgutil.iter_modules(import_module(room).__path__, room + "."):
        import_module(module.name)
        assert not heavy(), (module.name, heavy())
"""


def test_reading_and_describing_a_sweep_needs_neither_torch_nor_transformers_nor_datasets(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    # A setting that no file names is the default of the class, which was not imported.
    table = (tmp_path / "sweep" / "report" / "results.csv").read_text().splitlines()
    row = dict(zip(table[0].split(","), table[1].split(","), strict=False))
    assert row["setting_rms_norm_eps"] == str(DepthLMConfig().rms_norm_eps)


def test_the_defaults_for_readers_are_those_of_the_class() -> None:
    fields = DepthLMConfig.__dataclass_fields__
    plain = {name: fields[name].default for name in OF_MODEL if isinstance(fields[name].default, (str, int, float))}
    assert plain == DEFAULTS
    assert {name: type(value) for name, value in plain.items()} == {name: type(DEFAULTS[name]) for name in plain}
    assert fields["num_key_value_heads"].default is None  # as many as heads, which readers know too


def write_sweep(root: Path) -> None:
    """A sweep of one finished point, as `depthscope sweep run` leaves it."""
    folder = root / "points" / "L2-seed0"
    (folder / "model").mkdir(parents=True)
    report = sample_report(num_layers=2)
    report.save(folder / "layer_report.json")
    report.save(folder / "untrained_report.json")
    point: dict[str, Any] = {
        "point": "L2-seed0",
        "variant": "L2",
        "seed": 0,
        "settings": {"num_hidden_layers": 2},
        "model": {"num_hidden_layers": 2},
        "training": {"tokens": 4096, "batch_tokens": 1024, "weight_decay": 0.1},
    }
    result = {**point, "status": "finished", "loss": 3.0, "untrained_loss": 4.0, "parameters": 1000}
    history = {"step": 1, "kind": "variance", "values": {}, "layers": {"variance": [1.0, 2.0]}}
    index = {
        "schema_version": 1,
        "name": "tiny",
        "families": [{"name": "depth", "variants": ["L2"], "axes": ["num_hidden_layers", "rms_norm_eps"]}],
        "points": [point],
        "seeds": [0],
        "block_size": 16,
        "data": {"name": "text", "fingerprint": "00000000", "vocab_size": 512},
    }
    files = {"point.json": point, "result.json": result, "layer_stats.jsonl": history, "../../sweep.json": index}
    files["model/config.json"] = {"model_type": "depthlm", "num_hidden_layers": 2}
    files["log.jsonl"] = {"loss": 3.5, "step": 1}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content) + "\n")
    save_file({"weight": np.zeros((2, 2), np.float32)}, folder / "model" / "model.safetensors")
