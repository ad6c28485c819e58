"""The endpoints of a served Space, asked with what they do not take."""

import json

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")

from reports import sample_report
from rest import Refused, Visitor

MEASURED = {"scores": "variance", "tokens": 64, "block_size": 64, "precision": "float32", "text": "", "bos": "auto"}
MODEL = {"model": "acme/model", "revision": ""}
ENDPOINTS = {
    "analyze": {**MODEL, **MEASURED},
    "analyze_upload": {"upload": {"path": "/tmp/model.zip", "meta": {"_type": "gradio.FileData"}}, **MEASURED},
    "estimate": {**MODEL, **MEASURED},
    "summarize": {"report": {"path": "/tmp/report.json", "meta": {"_type": "gradio.FileData"}}},
}


def refusal(space, endpoint, *data):
    """What is said instead of a traceback, in the answer and in the log."""
    logged = len(space.log.read_text())
    with pytest.raises(Refused) as refused:
        Visitor(space.url).call(endpoint, *data)
    assert "Traceback" not in space.log.read_text()[logged:]
    return str(refused.value)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_null_for_an_argument_is_refused_with_what_is_expected(space, endpoint):
    arguments = ENDPOINTS[endpoint]
    for name in arguments:
        said = refusal(space, endpoint, *{**arguments, name: None}.values())
        kind = name if name in ("upload", "report") else "settings"
        assert said.startswith(f"{kind}: {name} is null; give "), said
    assert " is null; give " in refusal(space, endpoint, *[None] * len(arguments))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tokens", "512", "settings: tokens is '512'; give a whole number"),
        ("tokens", 64.5, "settings: tokens is 64.5; give a whole number"),
        ("tokens", True, "settings: tokens is True; give"),
        ("tokens", -1, "settings: -1 tokens were asked for"),
        ("block_size", 10**400, "settings: block_size is 1000"),
        ("scores", ["variance"], "settings: scores is ['variance']; give names"),
        ("scores", "", "settings: "),
        ("precision", "float8", "settings: 'float8' is not a precision"),
        ("bos", "perhaps", "settings: 'perhaps' is not a choice for BOS"),
        ("text", {}, "settings: text is {}; give a text"),
        ("text", " \n\t", "text: The pasted text is empty."),
        ("upload", "/etc/passwd", "upload: upload is '/etc/passwd'; give an uploaded .zip"),
        ("upload", {"path": 5}, "upload: upload is {'path': 5, 'meta': {'_type': 'gradio.FileData'}}; give"),
        ("upload", {"path": "/etc/passwd"}, "upload: "),
        ("upload", {"path": "https://example.org/model.zip"}, "upload: Links are not accepted."),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_expected(space, short_model, name, value, said):
    if isinstance(value, dict) and "path" in value:
        value = {**value, "meta": {"_type": "gradio.FileData"}}
    arguments = {**ENDPOINTS["analyze_upload"], "upload": Visitor(space.url).upload(short_model), name: value}
    told = refusal(space, "analyze_upload", *arguments.values())
    assert said in told, told


@pytest.mark.parametrize("data", [[], [None], ["a"] * 20])
def test_a_wrong_number_of_arguments_is_refused_with_their_names(space, data):
    assert "analyze_upload takes 7 arguments (upload, scores, tokens, " in refusal(space, "analyze_upload", *data)


def test_an_analysis_and_its_answer_leave_no_file(space, short_model):
    visitor = Visitor(space.url)
    before = space.left()
    arguments = {**MEASURED, "text": "The layers of a model add to a stream of numbers. " * 50}
    report = visitor.call("analyze_upload", visitor.upload(short_model), *arguments.values())
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2, 3]
    assert set(space.left()) <= set(before)


def test_a_report_is_told_in_words_and_leaves_nothing_but_itself(space, tmp_path):
    visitor = Visitor(space.url)
    before = space.left()
    report = visitor.upload(sample_report(12).save(tmp_path / "report.json"))
    assert "of 12 layers" in visitor.call("summarize", report)
    assert {str(path) for path in space.left()} - set(map(str, before)) == {report["path"]}


def test_programs_that_do_not_read_cannot_go_around_the_queue(space):
    answer = Visitor(space.url).client.post("/run/summarize", json={"data": [None]})
    assert answer.status_code == 404
    assert "join the queue" in json.loads(answer.text)["detail"]
