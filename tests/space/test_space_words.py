"""Limits, estimates, headlines, figures: what the page says before and after a job."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anyio
import pandas as pd
import pytest
from gradio.helpers import special_args

import depthscope
from depthscope import Blocks, LayerReport, Settings
from depthscope.loading.loaded import LoadedModel
from depthscope.views.plots.depth import against_depth, of_reports
from depthscope.views.plots.sparsity import sparsity
from forks import new_python
from jobs.drops import measure_drop, run_to_drop
from jobs.estimate import Estimator, Shape, in_words, shape_of, work
from jobs.measuring import measure
from jobs.service import Service
from jobs.tasks import STAGES, Task, Text, choose_settings, make_text, read_text_file
from jobs.visitor import Choices, Planned, from_upload, read_report
from models import make_identity, random_blocks, tiny_llama
from page.choices_panel import _read_uploaded_text
from page.compare_tab import _one_per_depth
from page.interface import build
from page.results import parts
from page.results.headline import headline, tiles
from page.start_stop import with_token
from reports import sample_content, sample_report
from safety.limits import Limits
from safety.problems import Problem

LIMITS = Limits(max_job_bytes=2**30)
EVERY = tuple(score for scores in STAGES.values() for score in scores)


def loaded(model):
    return LoadedModel(model, None, {"name": "tiny", "num_layers": 6, "hidden_size": 24, "vocab_size": 90})


def test_limits_come_from_the_environment():
    limits = Limits.from_environment({"DEPTHSCOPE_SPACE_MAX_PARAMETERS": "3e9", "DEPTHSCOPE_SPACE_MAX_JOBS": "2"})
    assert (limits.max_parameters, limits.max_jobs, limits.max_waiting) == (3_000_000_000, 2, 20)
    assert 0 < limits.max_job_bytes < Limits.from_environment({}).max_job_bytes


@pytest.mark.parametrize("text", ["many", "-1", "0", "1.5", "", "nan", "inf"])
def test_a_limit_that_is_no_number_is_named(text):
    with pytest.raises(ValueError, match="DEPTHSCOPE_SPACE_MAX_TOKENS"):
        Limits.from_environment({"DEPTHSCOPE_SPACE_MAX_TOKENS": text})


def test_measuring_in_stages_gives_the_report_of_one_analysis():
    model, ids = tiny_llama(6), random_blocks(6, 16)
    settings = Settings(scores=EVERY, fit_blocks=4, eval_blocks=2, block_size=16, probes=2)
    blocks = Blocks.from_ids(ids)
    parts = []
    assert measure(loaded(model), blocks, settings, lambda stage, share: None, parts.append) == parts[-1]
    whole = depthscope.analyze(model, blocks=blocks, settings=settings)
    assert len(parts) >= len(STAGES)
    assert set(parts[0].pairs) == set()
    for name in ("scores", "layers", "pairs", "data"):
        assert getattr(parts[-1], name) == getattr(whole, name)
    assert parts[-1].settings["scores"] == whole.settings["scores"]


def test_progress_goes_up_to_the_whole_and_names_every_stage():
    told = []
    settings = Settings(scores=EVERY, fit_blocks=4, eval_blocks=2, block_size=16, probes=2)
    blocks = Blocks.from_ids(random_blocks(6, 16))
    measure(loaded(tiny_llama(6)), blocks, settings, lambda *line: told.append(line), lambda report: None)
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.2
    assert shares[-1] == pytest.approx(1, abs=1e-6)
    assert {stage.split(":")[0] for stage, _ in told} == set(STAGES)


def test_an_analysis_whose_time_is_up_ends_with_fewer_blocks_and_says_of_which_scores(monkeypatch):
    """The clock is ours: each block takes a second in the last layer."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    blocks = Blocks.from_ids(random_blocks(20, 16))
    settings = Settings(scores="variance,skip,usefulness", fit_blocks=4, eval_blocks=16, block_size=16)

    def measured(seconds):
        model = tiny_llama(6)

        def later(layer, args, output):
            nonlocal now
            now += len(args[0])

        model.model.layers[5].register_forward_hook(later)
        shown, begun = [], now
        report = measure(loaded(model), blocks, settings, lambda *line: None, shown.append, seconds)
        assert shown[-1] == report
        return report, now - begun, shown

    whole, took, _ = measured(10**6)
    assert whole.budget is None
    assert not any("blocks, because the time" in note for note in whole.notes)
    cut, spent, shown = measured(took / 2)
    assert spent <= took / 2
    assert cut.budget["stopped"] == "time"
    assert cut.has("variance")
    assert cut.has("skip_ratio")
    assert cut.has("usefulness_ratio")
    (note,) = [note for note in cut.notes if note.startswith("usefulness: ")]
    count = int(re.search(r"measured on the first (\d+) of 16 blocks", note)[1])
    assert 2 <= count < 16
    alone = depthscope.analyze(tiny_llama(6), blocks=blocks, fit_blocks=4, eval_blocks=count, scores="usefulness")
    assert cut.column("usefulness_ratio") == pytest.approx(alone.column("usefulness_ratio"), rel=1e-5)
    assert sum(part.has("skip_ratio") and not part.has("usefulness_ratio") for part in shown) > 1  # within a stage


def test_an_estimate_over_the_limit_says_that_fewer_blocks_will_be_measured():
    settings = Settings(scores="skip", eval_blocks=4)
    task = Task("model", ("model.gguf",), "x", Text(), settings)
    said = [Planned(task, Shape(2, 8, 9.0, 9), 1200.0, most_seconds=most).in_words() for most in (900, 1200)]
    assert said[0].endswith("about 20 minutes. This Space gives 15 minutes, so that fewer blocks will be measured.")
    assert said[1].endswith("should take about 20 minutes.")


def test_layers_that_do_nothing_are_the_ones_to_drop_and_cost_nothing():
    model = tiny_llama(6)
    for layer in (2, 3):
        make_identity(model.model.layers[layer])
    blocks = Blocks.from_ids(random_blocks(6, 16))
    report = depthscope.analyze(model, blocks=blocks, scores="skip", fit_blocks=2, eval_blocks=4)
    assert [report.column("skip_ratio")[layer] for layer in (2, 3)] == pytest.approx([1, 1])
    rows = [row if row["layer"] in (2, 3) else dict(row, skip_ratio=2.0) for row in report.layers]
    drop = measure_drop(loaded(model), blocks, report.model_copy(update={"layers": rows}))
    assert (drop.first, drop.last) == (2, 3)
    assert drop.ratio == pytest.approx(1, abs=1e-6)
    noted = report.model_copy(update={"notes": [drop.in_words()]})
    assert headline(noted).endswith("dropping layers 2-3 together costs nothing")


def test_dropping_is_measured_together_and_not_summed_up():
    model, blocks = tiny_llama(8, seed=3), Blocks.from_ids(random_blocks(4, 16))
    report = depthscope.analyze(model, blocks=blocks, scores="skip", fit_blocks=0, eval_blocks=4)
    near = replace(report.near_identity(), layers=(3, 4))
    rows = [dict(row, skip_ratio=1.0 if row["layer"] in near.layers else 2.0) for row in report.layers]
    drop = measure_drop(loaded(model), blocks, report.model_copy(update={"layers": rows}))
    assert (drop.first, drop.last) == (3, 4)
    stack = depthscope.LayerStack(model)
    with stack.skipping(3, 4):
        skipped = depthscope.analyze(model, blocks=blocks, scores="variance", fit_blocks=0, eval_blocks=4)
    assert drop.ratio == pytest.approx(skipped.scores["loss"] / report.scores["loss"], rel=1e-5)


def test_a_report_without_a_run_of_idle_layers_has_no_drop():
    rows = [{"layer": layer, "skip_ratio": 1.5} for layer in range(6)]
    report = sample_report(6).model_copy(update={"layers": rows})
    assert run_to_drop(report) is None
    assert (
        headline(report) == "None of the 6 layers is near the identity; dropping layer 0, the cheapest, costs 50% loss"
    )


def test_a_layer_without_a_score_is_not_counted_and_a_depth_of_zero_is_one():
    content = sample_content(6, ("skip", "usefulness"))
    content["layers"][0]["skip_ratio"] = None
    content["scores"] |= {"effective_depth_skip": 0.0, "effective_depth_linear": 3.0}
    report = LayerReport(**content)
    assert "of the 5 layers with a score (6 in all)" in headline(report)
    assert "<strong>0</strong><span>of the 5 layers with a score (6 in all)</span>" in tiles(report)


def test_a_headline_counts_the_layers_that_are_near_the_identity():
    report = sample_report(30)
    near = len(report.near_identity().layers)
    assert headline(report).startswith(f"{near} of 30 layers are near the identity; dropping layer")
    assert tiles(report).count("ds-tile'") == 4


def test_names_from_strangers_are_shown_and_not_read_as_html():
    report = sample_report(6)
    named = report.model_copy(
        update={"model": {**report.model, "name": "<script>alert(1)</script>"}, "notes": ["<b>x</b>"]}
    )
    assert "<script>" not in parts.facts(named) + tiles(named)
    assert "<b>" not in parts.facts(named)
    assert ".." not in parts.files([named])["html"].rsplit("/", 1)[-1]


@pytest.mark.parametrize("count", [1, 2])
def test_a_name_from_a_stranger_is_no_formula_in_the_table_of_layers(tmp_path, count):
    evil = "=cmd|' /C calc'!A0"
    content = sample_content()
    content["model"]["name"] = content["layers"][0]["kind"] = evil
    report = LayerReport.from_json(json.dumps(content))
    text = Path(parts.files([report] * count, tmp_path)["csv"]).read_text(encoding="utf-8")
    frame = pd.read_csv(Path(tmp_path, f"{'comparison' if count == 2 else parts._stem(evil)}.csv"))
    assert f"'{evil}" in list(frame["kind"])
    assert f",{evil}" not in text
    assert not text.startswith("=")
    assert "\n=" not in text
    expected = report.to_frame()["skip_ratio"].to_list()
    assert frame["skip_ratio"].to_list()[: len(expected)] == pytest.approx(expected)


def test_every_figure_of_a_report_is_drawn_without_its_title(tmp_path):
    drawn = parts.drawn(sample_report(12))
    assert list(drawn) == ["effectiveness", "skip_cost", "variance_growth", "causal_map", "permutation_map"]
    for data in drawn.values():
        content = json.loads(data.plot)
        assert "title" not in content["layout"]
        assert content["config"]["toImageButtonOptions"]["format"] == "png"


def test_sparsity_is_drawn_where_it_was_measured():
    report = sample_report(6)
    assert sparsity(report) is None
    rows = [dict(row, weights_below_10pct=0.08, attention_below_fair=0.7) for row in report.layers]
    assert len(sparsity(report.model_copy(update={"layers": rows})).data) == 2


def test_scores_are_drawn_against_depth_only_where_depths_differ():
    assert against_depth(of_reports([sample_report(6), sample_report(6, seed=1)])) is None
    assert len(against_depth(of_reports([sample_report(6), sample_report(12)])).data) >= 5


def test_the_work_of_an_analysis_grows_as_it_should():
    settings = choose_settings(EVERY, 512, 128, layers=12, width=768, limits=LIMITS)
    small = sum(work(Shape(12, 768, 7e6, 50_000), settings).values())
    deep = sum(work(Shape(24, 768, 7e6, 50_000), settings).values())
    assert 3.5 < deep / small < 9  # between L^2 and L^3
    assert set(work(Shape(12, 768, 7e6, 50_000), settings)) == set(STAGES)


def test_estimates_learn_from_what_jobs_took():
    estimator, shape = Estimator(), Shape(12, 768, 7e6, 50_000)
    settings = choose_settings(EVERY, 512, 128, layers=12, width=768, limits=LIMITS)
    before = estimator.seconds(shape, settings)
    estimator.learn(shape, settings, 3 * (before + 3))
    assert estimator.seconds(shape, settings) > 1.3 * before


def test_an_absurd_config_is_refused_before_anything_is_reckoned():
    with pytest.raises(Problem, match=r"num_hidden_layers in config\.json is 1,000,000,000"):
        shape_of({"num_hidden_layers": 10**9}, None, LIMITS)
    assert shape_of({"n_layer": 12, "n_embd": 768, "vocab_size": 50257}, None, LIMITS).layers == 12


@pytest.mark.parametrize(
    ("seconds", "words"), [(2, "5 seconds"), (31, "30 seconds"), (70, "a minute"), (200, "3 minutes")]
)
def test_times_are_said_as_people_say_them(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("pasted", {"pasted": "  "}, "pasted text is empty"),
        ("pasted", {"pasted": "x" * 5_000_000}, "larger than 4 MiB"),
        ("file", {}, "No text file"),
        ("dataset", {"dataset": "/etc/passwd"}, "not the name of a dataset"),
        ("dataset", {"dataset": "../secret"}, "not the name of a dataset"),
        ("dataset", {"dataset": "org/name", "column": "a b; c"}, "not a column or split"),
        ("poem", {}, "not a type of text"),
    ],
)
def test_a_text_that_cannot_be_had_is_refused(kind, given, words):
    with pytest.raises(Problem, match=words):
        make_text(kind, **given, limits=LIMITS)


def test_the_file_of_a_text_is_read_once_and_deleted(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("words")
    content, _ = _read_uploaded_text(str(path), LIMITS)
    for _ in range(2):  # as often as it is wanted
        assert make_text("file", file=content, limits=LIMITS) == Text("file", "words")
    assert not path.exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * 5_000_000, b"", b" \n\t ", None])
def test_a_text_file_that_cannot_be_read_is_taken_off_the_page(tmp_path, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Problem):
        read_text_file(path, LIMITS)
    assert _read_uploaded_text(str(path), LIMITS) == (None, None)
    assert not path.exists()


def test_an_upload_that_is_gone_is_said_to_be_gone(tmp_path):
    with pytest.raises(Problem, match="have been deleted"):
        from_upload([str(tmp_path / "model.zip")], Choices(("skip",)), LIMITS, Estimator())
    with pytest.raises(Problem, match="have been deleted"):
        read_report(str(tmp_path / "report.json"), LIMITS)


def test_the_estimate_of_separate_files_knows_their_config(tmp_path):
    for name, content in (
        ("config.json", '{"num_hidden_layers": 7, "hidden_size": 64}'),
        ("a.safetensors", "x" * 4000),
    ):
        (tmp_path / name).write_text(content)
    planned = from_upload([str(path) for path in tmp_path.iterdir()], Choices(("skip",)), LIMITS, Estimator())
    assert planned.shape.layers == 7
    assert planned.in_words().startswith("uploaded model: 7 layers.")
    (tmp_path / "model.zip").write_bytes(b"zip")
    guessed = from_upload([str(tmp_path / "model.zip")], Choices(("skip",)), LIMITS, Estimator())
    assert guessed.in_words().startswith("model. Analysing it")  # nobody has looked into it yet
    assert guessed.task.seconds == guessed.seconds


@pytest.mark.parametrize(("tokens", "block_size"), [(256, 64), (100, 1024), (8192, 1024), (600, 100)])
def test_the_owner_may_set_limits_below_the_defaults(tokens, block_size):
    page = build(Service(replace(LIMITS, max_tokens=tokens, max_block_size=block_size)))
    for label, most in (("Tokens to measure on", tokens), ("Tokens in a block", min(tokens, block_size))):
        found = [block for block in page.blocks.values() if getattr(block, "label", None) == label]
        assert len(found) == 2
        for dropdown in found:
            numbers = [number for _, number in dropdown.choices]
            assert dropdown.value in numbers
            assert max(numbers) == most


def test_a_limit_that_is_none_ends_the_program_with_one_sentence():
    environment = {**os.environ, "DEPTHSCOPE_SPACE_MAX_TOKENS": "abc"}
    ended = new_python("app.py", cwd=Path(parts.__file__).parents[2], env=environment)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "DEPTHSCOPE_SPACE_MAX_TOKENS is 'abc'" in ended.stderr


def test_who_has_signed_in_brings_their_token():
    async def work(owner, token, values):
        yield owner, token, values

    async def first(changes):
        return await anext(changes)

    service = Service(LIMITS)
    request, token = SimpleNamespace(session_hash="me"), SimpleNamespace(token="secret")
    assert anyio.run(first, with_token(service, work)(request, 1, 2)) == ("me", None, (1, 2))
    service.offers_login = True
    signed_in = with_token(service, work)
    assert special_args(signed_in, [1, 2])[0][:2] == [None, None]  # what Gradio puts before the values
    assert anyio.run(first, signed_in(request, token, 1, 2)) == ("me", "secret", (1, 2))
    assert anyio.run(first, signed_in(request, None, 1, 2)) == ("me", None, (1, 2))


def test_of_a_deep_sweep_some_depths_are_set_side_by_side():
    reports = [sample_report(depth) for depth in (4, 8, 8, 12, 16, 24, 32)]
    assert [len(report.layers) for report in _one_per_depth(reports, 6)] == [4, 8, 12, 16, 24, 32]
    assert [len(report.layers) for report in _one_per_depth(reports, 3)] == [4, 12, 32]
    assert _one_per_depth(reports, 0) == []


def test_a_note_that_only_looks_like_ours_breaks_nothing():
    report = sample_report(4)
    note = "Dropping layers 1-2 together multiplies the loss by ..., measured"
    assert headline(report.model_copy(update={"notes": [note]})) == headline(report.model_copy(update={"notes": []}))


@pytest.mark.parametrize(("tokens", "block"), [(64, 128), (10**6, 128), (512, 1), (4096, 4096)])
def test_sizes_beyond_the_limits_are_refused(tokens, block):
    with pytest.raises(Problem, match="choose"):
        choose_settings(["skip"], tokens, block, layers=12, width=64, limits=LIMITS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "not JSON"),
        ("[" * 100_000, "nested too deep|not JSON"),
        ("{}", "no schema_version"),
        ('{"schema_version": 99}', "newer depthscope"),
        ("x" * (33 << 20), "larger than 32 MiB"),
    ],
)
def test_a_report_that_is_none_is_refused_without_its_place(content, words, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(Problem, match=words) as problem:
        read_report(str(path), LIMITS)
    assert str(tmp_path) not in str(problem.value)


def test_a_report_of_as_many_layers_as_are_taken_is_read_with_all_its_maps(tmp_path):
    content = sample_content(LIMITS.max_layers, scores=("skip",))
    row = [1.2345678901234567e-05] * LIMITS.max_layers  # as many digits as a number is written with
    maps = {name: [row] * LIMITS.max_layers for name in ("causal", "causal_se", "permutation", "permutation_se")}
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**content, "pairs": maps}, indent=None))
    assert path.stat().st_size > 23 << 20
    assert read_report(str(path), LIMITS).pairs == maps


def test_a_report_is_shown_as_it_was_saved(tmp_path):
    report = sample_report(6)
    assert read_report(str(report.save(tmp_path / "r.json")), LIMITS) == LayerReport.from_json(report.to_json())
