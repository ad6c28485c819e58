"""The page: self-contained, deterministic, and safe whatever a stranger's report holds."""

import base64
import hashlib
import os
import re
import shlex
from pathlib import Path

import pytest

from depthscope.errors import ReportError
from depthscope.report.report import LayerReport
from depthscope.views.report_page import render_page, reproduce, write_page
from html_page import EVIL, Page
from reports import ALL_SCORES, sample_content, sample_report


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_page(sample_report()))


def test_every_element_is_closed(page: Page) -> None:
    assert page.open == []


@pytest.mark.quick
def test_the_page_asks_nothing_of_the_network(page: Page) -> None:
    assert page.all("link") == page.all("img") == page.all("iframe") == page.all("a") == []
    assert all("src" not in attributes for attributes, _ in page.scripts)
    policy = next(m["content"] or "" for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "http" not in policy
    (style,) = re.findall(r"<style>(.*?)</style>", render_page(sample_report(2, ())), flags=re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


def test_no_button_sends_the_data_to_a_server(page: Page) -> None:
    (script,) = (text for _, text in page.scripts if "Plotly.newPlot" in text and len(text) < 100_000)
    assert "showSendToCloud: false" in script
    assert 'modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]' in script


def test_the_policy_admits_the_pages_own_scripts_and_no_other(page: Page) -> None:
    policy = next(m["content"] or "" for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    run = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    assert [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run] == allowed
    script_policy = next(part for part in policy.split(";") if "script-src" in part)
    assert "unsafe" not in script_policy


def test_plotly_is_inlined_once() -> None:
    html = render_page([sample_report(3), sample_report(4)])
    assert len([text for _, text in Page(html).scripts if len(text) > 1_000_000]) == 1


def test_the_same_reports_give_the_same_bytes() -> None:
    assert render_page(sample_report()) == render_page(sample_report())
    two = [sample_report(3), sample_report(5)]
    assert render_page(two) == render_page(two)


def test_every_figure_has_its_element_and_its_explanation(page: Page) -> None:
    places = {attributes["id"] for attributes in page.all("div") if attributes.get("class") == "plot"}
    assert places == set(page.figures)
    assert len(places) == len(page.all("figcaption")) == 5
    for figure in page.figures.values():
        assert "title" not in figure["layout"]
        assert figure["layout"]["meta"] in page.text


@pytest.mark.parametrize("scores", [(), *[(score,) for score in ALL_SCORES]])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_any_subset_of_scores_makes_a_page(scores: tuple[str, ...], num_layers: int) -> None:
    page = Page(render_page(sample_report(num_layers, scores)))
    assert page.open == []
    assert f"sample/toy-{num_layers}" in page.text


@pytest.mark.quick
def test_the_words_and_numbers_of_the_report_are_on_the_page(page: Page) -> None:
    report = sample_report()
    for line in report.summary().splitlines():
        assert line.removeprefix("sample/toy-30: ") in page.text
    assert report.notes[0] in page.text
    assert f"{report.layers[7]['skip_ratio']:.4f}" in page.text
    for word in ("2.13.0", "python-stdlib", "9f86d081884c7d65", "LlamaForCausalLM", "1e-06"):
        assert word in page.text


def test_cells_carry_the_full_value_for_sorting() -> None:
    report = sample_report(5)
    values = {attributes.get("data-value") for attributes in Page(render_page(report)).all("td")}
    assert {str(value) for value in report.column("skip_ratio")} <= values


def test_layers_near_the_identity_are_marked_in_more_than_colour(page: Page) -> None:
    near = sample_report().near_identity()
    assert near is not None
    marked = [attributes for attributes in page.all("tr") if attributes.get("class") == "near"]
    assert len(marked) == len(near.layers) > 0
    assert page.text.count("≈") == len(near.layers) + 1


def evil_report(num_layers: int = 3) -> LayerReport:
    content = sample_content(num_layers)
    content["model"] |= {"name": EVIL, "architecture": EVIL, "revision": EVIL, EVIL: EVIL}
    content["data"] |= {"name": EVIL, "fingerprint": EVIL}
    content["settings"] |= {EVIL: [EVIL, {EVIL: EVIL}]}
    content["versions"] |= {EVIL: EVIL}
    content["scores"] |= {EVIL: 1.0}
    content["notes"] = [EVIL]
    for row in content["layers"]:
        row |= {"kind": EVIL, EVIL: EVIL}
    return LayerReport(**content)


@pytest.mark.parametrize("count", [1, 2])
def test_a_strangers_text_stays_text(count: int) -> None:
    reports = [evil_report(), sample_report(3)][:count]
    page = Page(render_page(reports))
    assert page.open == []
    assert page.all("img") == page.all("b") == []
    assert len(page.scripts) == 3
    assert EVIL in page.text
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    (data,) = (text for attributes, text in page.scripts if attributes.get("id") == "figures")
    assert not set("<>&\u2028\u2029") & set(data)


def test_two_reports_are_compared_before_each_is_shown() -> None:
    page = Page(render_page([sample_report(4), sample_report(8)]))
    assert "The depths differ" in page.text
    assert "all-compare-layers" in page.figures
    assert len(page.figures) == 1 + 2 * 5
    assert len(page.all("article")) == 2


def test_reports_without_a_common_score_still_make_a_page() -> None:
    page = Page(render_page([sample_report(4, ("skip",)), sample_report(4, ("jacobian",))]))
    assert "all-compare-layers" not in page.figures


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_page(tmp_path / "r.html", sample_report(2))
    assert path.read_text(encoding="utf-8") == render_page(sample_report(2))
    with pytest.raises(ReportError, match="the folder does not exist"):
        write_page(tmp_path / "none" / "r.html", sample_report(2))
    assert os.listdir(tmp_path) == ["r.html"]


def words_of(command: str) -> list[str]:
    """Split a command as a shell does, which takes a backslash before the end of a line for nothing."""
    return shlex.split(command.replace("\\\n", ""))


def test_the_command_makes_the_same_analysis_again() -> None:
    words = words_of(reproduce(sample_report(3)))
    assert words[:3] == ["depthscope", "analyze", "sample/toy-3"]
    words.remove("--exact-losses")  # this report is older than the option
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options["--revision"] == sample_report(3).model["revision"]
    assert options["--fit-blocks"] == "16"
    assert options["--eval-blocks"] == "8"
    assert options["--block-size"] == "256"
    assert options["--scores"] == ",".join(ALL_SCORES)
    assert options["--seed"] == "0"
    assert "--text" not in options
    assert "--batch-size" not in options


def test_the_command_names_flags_and_a_text_of_ones_own() -> None:
    content = sample_content(3)
    content["settings"] |= {"paper_code": True, "in_sample": True, "sublayers": True, "exact_losses": False}
    content["data"]["name"] = "book.txt"
    words = words_of(reproduce(LayerReport(**content)))
    assert {"--paper-code", "--in-sample", "--sublayers"} <= set(words)
    assert "--exact-losses" not in words
    assert words[words.index("--text") + 1] == "TEXT"


@pytest.mark.parametrize("name", ["$(touch x)", "a; rm -rf b", "it's", "--out=x", "new\nline"])
def test_the_command_cannot_be_made_to_run_something_else(name: str) -> None:
    content = sample_content(2)
    content["model"]["name"] = name
    words = words_of(reproduce(LayerReport(**content)))
    assert words.count(name) == 1
    if name.startswith("-"):
        assert words[words.index(name) - 1] == "--"


def test_a_model_given_as_an_object_is_reproduced_in_python() -> None:
    content = sample_content(2)
    content["model"]["source"] = "object"
    text = reproduce(LayerReport(**content))
    compile(text, "reproduce", "eval")
    assert text.startswith("depthscope.analyze(")
    assert "block_size=" in text or "seed=0" in text
