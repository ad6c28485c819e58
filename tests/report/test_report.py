"""The report: what it accepts, what it refuses, and that it writes the same bytes for the same content."""

import errno
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from depthscope.errors import ReportError
from depthscope.files.atomic import write_atomically
from depthscope.report.measures import GLOBAL_SCORES, LAYER_SCORES
from depthscope.report.report import LayerReport
from depthscope.views.report_page import render_page
from depthscope.wording.messages import ranges
from depthscope.wording.numbers import format_number, format_with_error
from reports import ALL_SCORES, sample_content, sample_report


def saved(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "report.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.quick
@pytest.mark.parametrize("num_layers", [1, 2, 30])
def test_a_saved_report_loads_as_itself(tmp_path: Path, num_layers: int) -> None:
    report = sample_report(num_layers)
    report.save(tmp_path / "r.json")
    assert LayerReport.load(tmp_path / "r.json") == report


def test_the_json_has_the_keys_of_the_schema() -> None:
    content = json.loads(sample_report().to_json())
    assert list(content) == [
        "schema_version", "created", "model", "data", "settings", "versions", "notes", "scores", "layers", "pairs"
    ]  # fmt: skip
    assert content["schema_version"] == 1
    assert {"causal", "causal_se", "permutation", "permutation_se"} == set(content["pairs"])
    assert content["layers"][3]["skip_ratio"] == sample_report().layers[3]["skip_ratio"]


def test_the_order_in_which_a_report_is_put_together_does_not_change_its_bytes() -> None:
    content = sample_content()

    def backwards(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: backwards(value[key]) for key in reversed(list(value))}
        return [backwards(item) for item in value] if isinstance(value, list) else value

    reordered = backwards(content)
    assert list(reordered["scores"]) != list(content["scores"])
    assert LayerReport(**reordered).to_json() == LayerReport(**content).to_json()


def test_loading_and_saving_again_changes_no_byte() -> None:
    text = sample_report().to_json()
    assert LayerReport.from_json(text).to_json() == text


def test_floats_keep_their_full_precision() -> None:
    content = sample_content()
    content["scores"]["loss"] = 0.1 + 0.2
    content["layers"][0]["variance"] = math.pi
    again = LayerReport.from_json(LayerReport(**content).to_json())
    assert again.scores["loss"] == 0.1 + 0.2
    assert again.layers[0]["variance"] == math.pi


def test_an_integer_and_a_float_of_the_same_value_give_the_same_bytes() -> None:
    whole, real = sample_content(), sample_content()
    whole["layers"][0]["variance"] = whole["scores"]["causal"] = 1
    real["layers"][0]["variance"] = real["scores"]["causal"] = 1.0
    assert LayerReport(**whole).to_json() == LayerReport(**real).to_json()


def test_a_row_of_a_matrix_is_one_line_of_the_file() -> None:
    lines = sample_report(5).to_json().splitlines()
    assert sum(line.strip().startswith("[null, null, null") for line in lines) >= 3


def test_names_in_any_script_are_kept(tmp_path: Path) -> None:
    content = sample_content()
    content["model"]["name"] = "组织/模型-é-🙂"
    path = LayerReport(**content).save(tmp_path / "r.json")
    assert "组织/模型-é-🙂" in path.read_text(encoding="utf-8")
    assert LayerReport.load(path).model["name"] == "组织/模型-é-🙂"


def test_further_keys_are_kept_where_they_are_allowed() -> None:
    content = sample_content()
    content["model"]["rope_theta"] = 10000.0
    content["data"]["language"] = "en"
    content["settings"]["nested"] = {"b": [1, {"c": None}], "a": 2}
    content["scores"]["something_new"] = 0.5
    content["layers"][2]["something_new"] = 0.25
    again = LayerReport.from_json(LayerReport(**content).to_json())
    assert again.model["rope_theta"] == 10000.0  # type: ignore[typeddict-item]
    assert again.data["language"] == "en"  # type: ignore[typeddict-item]
    assert again.settings["nested"] == {"a": 2, "b": [1, {"c": None}]}
    assert again.scores["something_new"] == again.layers[2]["something_new"] * 2
    assert again.global_scores[-1] == "something_new"


def test_a_report_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        sample_report().scores = {}


# ----------------------------------------------------------------------------------------------------------- refusals

Change = Callable[[dict[str, Any]], Any]

REFUSED: dict[str, tuple[Change, str]] = {
    "newer schema": (lambda c: c.update(schema_version=3), "newer depthscope: schema 3, this one reads 1; upgrade"),
    "older schema": (lambda c: c.update(schema_version=0), "unknown schema 0"),
    "schema as text": (lambda c: c.update(schema_version="1"), "unknown schema '1'"),
    "schema as bool": (lambda c: c.update(schema_version=True), "unknown schema True"),
    "no schema": (lambda c: c.pop("schema_version"), "no schema_version"),
    "unknown top-level field": (lambda c: c.update(extra=1), "extra"),
    "no layers": (lambda c: c.pop("layers"), "layers"),
    "no model name": (lambda c: c["model"].pop("name"), "model.name"),
    "no fingerprint": (lambda c: c["data"].pop("fingerprint"), "data.fingerprint"),
    "layers no list": (lambda c: c.update(layers={"0": {}}), "layers"),
    "a row too few": (lambda c: c["layers"].pop(), "layers has 5 rows, expected model.num_layers = 6"),
    "wrong layer number": (lambda c: c["layers"][4].update(layer=7), r"layers\[4\].layer is 7, expected 4"),
    "layer number as bool": (lambda c: c["layers"][1].update(layer=True), r"layers\[1\].layer is True"),
    "zero layers": (lambda c: (c["model"].update(num_layers=0), c["layers"].clear(), c["pairs"].clear()), "num_layers"),
    "score as text": (lambda c: c["layers"][2].update(causal="high"), r"\[2\].causal is 'high'"),
    "score as bool": (lambda c: c["layers"][2].update(causal=True), r"\[2\].causal is True"),
    "kind as number": (lambda c: c["layers"][2].update(kind=3), r"\[2\].kind is 3"),
    "negative layer error": (lambda c: c["layers"][2].update(causal_se=-1.0), "causal_se"),
    "negative error": (lambda c: c["scores"].update(loss_se=-0.1), "loss_se is a standard error"),
    "global score as text": (lambda c: c["scores"].update(loss="2.5"), "scores.loss"),
    "matrix not square": (lambda c: c["pairs"]["causal"][3].pop(), "pairs.causal is not a 6 x 6 matrix"),
    "matrix too small": (lambda c: c["pairs"]["permutation_se"].pop(), "pairs.permutation_se is not a 6 x 6"),
    "matrix of texts": (lambda c: c["pairs"]["causal"][0].__setitem__(1, "x"), r"pairs.causal\[0\]\[1\]"),
    "integer beyond 64 bits": (lambda c: c["model"].update(num_parameters=10**30), "num_parameters .* 64 bits"),
    "number beyond any measurement": (lambda c: c["scores"].update(loss=1e200), "scores.loss is 1e"),
    "text too long": (lambda c: c["model"].update(name="x" * 100_000), "model.name is a text of 100,000 characters"),
    "no time": (lambda c: c.update(created="yesterday"), "created: expected a date"),
    "note no text": (lambda c: c.update(notes=[1]), r"notes\[0\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_report_is_refused_by_the_name_of_its_field(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    content = sample_content(6)
    change(content)
    with pytest.raises(ReportError, match=message) as caught:
        LayerReport.load(saved(tmp_path, content))
    assert str(tmp_path / "report.json") in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("not json at all", "not JSON .* line 1"),
        ("[1, 2]", "no schema_version"),
        ("null", "no schema_version"),
        ('{"a": 1}', "no schema_version"),
        ('{"schema_version": 1, "scores": {"loss": NaN}}', "NaN"),
        ('{"schema_version": 1, "scores": {"loss": -Infinity}}', "-Infinity"),
        ('{"schema_version": 1, "schema_version": 1}', "'schema_version' is given twice"),
        ('{"schema_version": ' + "9" * 5000 + "}", "not a valid report"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ('{"schema_version": 1, "notes": ' + "[" * 60 + "]" * 60 + "}", "notes.* is nested deeper"),
    ],
)
def test_a_text_that_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        LayerReport.from_json(text)


def test_a_number_that_overflows_is_refused() -> None:
    text = sample_report(2).to_json().replace("2.7182818", "1e999")
    with pytest.raises(ReportError, match=r"scores\.loss is inf"):
        LayerReport.from_json(text)


def test_a_file_cut_anywhere_is_refused() -> None:
    text = sample_report(3).to_json()
    for length in range(0, len(text) - 2, 37):
        with pytest.raises(ReportError):
            LayerReport.from_json(text[:length])


def test_a_missing_file_a_folder_and_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="there is no file"):
        LayerReport.load(tmp_path / "none.json")
    with pytest.raises(ReportError, match="it is a folder"):
        LayerReport.load(tmp_path)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportError, match="not UTF-8"):
        LayerReport.load(tmp_path / "b.json")
    with pytest.raises(ReportError, match="null"):
        LayerReport.load("a\0b")


def test_a_file_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(256 * 2**20 + 1)  # sparse: it takes no room on the disk
    with pytest.raises(ReportError, match="larger than 256 MiB"):
        LayerReport.load(path)


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + sample_report(2).to_json().encode())
    assert LayerReport.load(path) == sample_report(2)


def test_control_characters_cannot_reach_the_terminal() -> None:
    content = sample_content(2)
    content["model"]["name"] = "evil\x1b]0;title\x07\u202e\ud800"
    content["notes"] = ["line one\nline two\ttab \x9b31m"]
    content["settings"] = {"a\x1bb": "\x1b[2J"}
    text = LayerReport(**content).to_json()
    text.encode("utf-8")
    report = LayerReport.from_json(text)
    assert report.model["name"] == "evil\ufffd]0;title\ufffd\ufffd\ufffd"
    assert report.notes == ["line one\nline two\ttab \ufffd31m"]
    assert "\x1b" not in report.to_json() + report.summary() + report.to_markdown()


def test_a_number_that_is_not_finite_never_gets_into_a_report() -> None:
    for value in (math.nan, math.inf, -math.inf):
        for path in (("scores", "loss"), ("layers", 1, "causal"), ("pairs", "causal", 0, 1)):
            content: Any = sample_content(4)
            place = content
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            with pytest.raises(ValidationError):
                LayerReport(**content)


# ------------------------------------------------------------------------------------------------------------ writing


def test_saving_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    sample_report(3).save(path)
    sample_report(4).save(path)
    assert LayerReport.load(path) == sample_report(4)
    assert os.listdir(tmp_path) == ["r.json"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_keeps_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "r.json"
    sample_report(3).save(path)

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    expected = ReportError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="no space is left" if isinstance(error, OSError) else None):
        sample_report(4).save(path)
    assert os.listdir(tmp_path) == ["r.json"]
    assert LayerReport.load(path) == sample_report(3)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_disk_that_takes_only_a_part_gets_no_file(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from depthscope.errors import ReportError\n"
        "from depthscope.files.atomic import write_atomically\n"
        "try:\n"
        "    write_atomically(sys.argv[1], 'x' * 100_000)\n"
        "except ReportError as error:\n"
        "    print(error)\n"
    )
    target = tmp_path / "r.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True, env=environment
    )
    assert "larger than the system allows" in done.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_device_is_one_clear_message() -> None:
    with pytest.raises(ReportError, match="no space is left on the device"):
        sample_report(2).save("/dev/full")
    assert not os.path.isfile("/dev/full")


def test_a_path_that_cannot_be_written_is_one_clear_message(tmp_path: Path) -> None:
    report = sample_report(2)
    with pytest.raises(ReportError, match="the folder does not exist"):
        report.save(tmp_path / "none" / "r.json")
    with pytest.raises(ReportError, match="it is a folder"):
        report.save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="a part of the path is a file"):
        report.save(tmp_path / "file" / "r.json")
    with pytest.raises(ReportError, match="name is too long"):
        report.save(tmp_path / ("x" * 300))
    with pytest.raises(ReportError, match="null"):
        report.save(str(tmp_path / "a\0b"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_clear_message(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ReportError, match="permission denied"):
        sample_report(2).save(tmp_path / "r.json")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_files_have_ordinary_permissions_and_keep_their_own(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    path = write_atomically(tmp_path / "new", "text")
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    write_atomically(path, b"bytes")
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.read_bytes() == b"bytes"


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege there")
def test_a_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "r.json")
    sample_report(2).save(link)
    assert link.is_symlink()
    assert LayerReport.load(tmp_path / "real" / "r.json") == sample_report(2)


# -------------------------------------------------------------------------------------------------------- other forms


def test_the_frame_has_one_row_a_layer_and_nan_where_undefined() -> None:
    report = sample_report(7)
    frame = report.to_frame()
    assert list(frame["layer"]) == list(range(7))
    assert frame["skip_ratio"].tolist() == report.column("skip_ratio")
    assert math.isnan(frame["causal"].iloc[-1])
    assert frame["causal"].dtype == "float64"


def test_datasets_of_different_reports_can_be_put_together() -> None:
    datasets = pytest.importorskip("datasets")
    reports = [sample_report(5), sample_report(3, ("skip",)), sample_report(1, ())]
    table = datasets.concatenate_datasets([report.to_dataset() for report in reports])
    assert len(table) == 9
    assert table["layer"][5:8] == [0, 1, 2]
    assert table[6]["model"] == "sample/toy-3"
    assert table[6]["fingerprint"] == reports[1].data["fingerprint"]
    assert table[6]["skip_ratio"] == reports[1].layers[1]["skip_ratio"]
    assert table[6]["causal"] is None
    assert table[4]["causal"] is None
    assert table[3]["causal"] == reports[0].layers[3]["causal"]


def test_markdown_tables_have_a_row_for_each_score_and_each_layer() -> None:
    report = sample_report(4)
    scores, layers = report.to_markdown().strip().split("\n\n")
    assert len(scores.splitlines()) == 2 + len(report.global_scores)
    assert len(layers.splitlines()) == 2 + 4
    for table in (scores, layers):
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1
    assert f"{report.layers[2]['skip_ratio']:.4f}" in layers.splitlines()[4]


def test_markdown_cannot_be_broken_by_a_name() -> None:
    content = sample_content(2, ())
    content["scores"]["a|b<img>\n`x`"] = 1.0
    line = LayerReport(**content).to_markdown().splitlines()[3]
    assert line.startswith(r"| a\|b\<img\> \`x\` |")


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.quick
def test_the_summary_says_what_the_numbers_say() -> None:
    content = sample_content(4, ("skip",))
    for row, ratio in zip(content["layers"], (3.0, 1.015, 1.5, 0.99), strict=True):
        row["skip_ratio"] = ratio
    content["scores"] |= {"effective_depth_skip": 2.25, "effective_depth_skip_se": 0.5}
    summary = LayerReport(**content).summary()
    assert "sample/toy-4: 4 layers, measured on python-stdlib, 8 blocks of 256 tokens." in summary
    assert "Effective depth: 2.25 ± 0.50 of 4 layers by skipping." in summary
    assert "2 of 4 layers: 1, 3." in summary
    assert "one at a time: 3 (loss ×0.9900), 1 (loss ×1.0150)." in summary
    assert "Costliest: 0 (loss ×3.0000), 2 (loss ×1.5000)." in summary


def test_layers_without_a_score_are_not_counted() -> None:
    content = sample_content(6, ("skip", "usefulness"))
    for row in content["layers"][:2]:
        row |= {"skip_ratio": None, "usefulness_ratio": None}
    for row, ratio in zip(content["layers"][2:], (1.5, 1.5, 1.0, 1.5), strict=True):
        row |= {"skip_ratio": ratio, "usefulness_ratio": ratio}
    content["scores"] |= {"effective_depth_skip": 3.0, "effective_depth_linear": 0.0, "usefulness": 0.75}
    del content["scores"]["effective_depth_skip_se"], content["scores"]["effective_depth_linear_se"]
    report = LayerReport(**content)
    counted = "of the 4 layers with a score (6 in all)"
    assert f"Effective depth: 3.00 {counted} by skipping, 0 by linearising." in report.summary()
    assert f"raises the loss by less than 2%): 1 {counted}: 4." in report.summary()
    assert f"by more than 1.1 for 3 {counted}." in report.summary()
    assert render_page([report]).count(counted) >= 4  # in the summary and in the tiles


@pytest.mark.parametrize("score", ALL_SCORES)
def test_the_summary_speaks_only_of_scores_that_are_present(score: str) -> None:
    words = {
        "variance": "Variance of the residual stream",
        "usefulness": "affine",
        "skip": "Cheapest layers",
    }
    summary = sample_report(8, (score,)).summary()
    for name, word in words.items():
        assert (word in summary) == (name == score)


def test_without_any_score_the_summary_still_says_what_was_measured() -> None:
    assert sample_report(3, ()).summary() == (
        "sample/toy-3: 3 layers, measured on python-stdlib, 8 blocks of 256 tokens."
    )


def test_layers_near_the_identity_are_judged_by_skipping_before_influence() -> None:
    content = sample_content(3, ("skip", "influence"))
    for row, ratio, influence in zip(content["layers"], (1.5, 1.019, 1.021), (0.01, 0.5, 0.01), strict=True):
        row |= {"skip_ratio": ratio, "block_influence": influence}
    near = LayerReport(**content).near_identity()
    assert near is not None
    assert near.layers == (1,)
    for row in content["layers"]:
        del row["skip_ratio"]
    near = LayerReport(**content).near_identity()
    assert near is not None
    assert near.layers == (0, 2)
    assert sample_report(3, ("causal",)).near_identity() is None


def test_every_score_of_the_sample_is_in_the_glossary() -> None:
    report = sample_report()
    assert set(report.layer_scores) <= set(LAYER_SCORES)
    assert set(report.global_scores) <= set(GLOBAL_SCORES)
    assert report.layer_scores == [name for name in LAYER_SCORES if report.has(name)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (None, "–"), (3701.4, "3,701"), (1.04, "1.040"), (0.0123456, "0.01235"), (-0.5, "-0.5000"),
     (9.9996, "10.00"), (1e-7, "1.000e-07"), (1234567.0, "1,235,000")],
)  # fmt: skip
def test_numbers_are_written_with_four_digits(value: float | None, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(1.04721, 0.00312, "1.0472 ± 0.0031"), (3701.0, 12.0, "3,701 ± 12"), (2.0, None, "2.000"), (2.0, 0.0, "2.000"),
     (0.5, 0.0999, "0.50 ± 0.10"), (None, 0.1, "–"), (1234567.0, 500.0, "1,234,570 ± 500"),
     (98765.4, 150.0, "98,770 ± 150"), (123456.0, 99.6, "123,460 ± 100"), (-3.0, 500.0, "0 ± 500"),
     (1.23456789e-9, 1e-14, "1.234568e-09 ± 1.0e-14"), (0.0, 1e-12, "0 ± 1.0e-12"), (0.1217, 1e-18, "0.1217"),
     (1.23456e20, 1e15, "1.234560e+20 ± 1.0e+15"), (1.0, float("nan"), "1.000"), (float("inf"), 1.0, "inf")],
)  # fmt: skip
def test_a_value_is_rounded_to_its_error(value: float | None, error: float | None, text: str) -> None:
    assert format_with_error(value, error) == text


def test_rounding_changes_a_value_by_less_than_its_error() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        value, error = rng.choice((-1, 1)) * 10 ** rng.uniform(-12, 18), 10 ** rng.uniform(-15, 17)
        shown, _, its_error = format_with_error(value, error).partition(" ± ")
        if its_error:
            assert abs(float(shown.replace(",", "")) - value) <= error / 2, (value, error)
            assert float(its_error.replace(",", "")) == pytest.approx(error, rel=0.06)


def test_runs_of_layers_are_shortened() -> None:
    assert ranges([0, 2, 3, 5, 6, 7, 9]) == "0, 2, 3, 5-7, 9"
    assert ranges([]) == ""
