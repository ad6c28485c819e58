"""The Space in a real browser: whole paths of a visitor, without errors on the console or requests to the outside."""

import json
import os
import re
import signal
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

from depthscope import LayerReport  # noqa: E402
from hub import LocalHub  # noqa: E402
from reports import sample_report  # noqa: E402
from served import serving  # noqa: E402

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)
SCREENSHOTS = Path(os.environ.get("DEPTHSCOPE_SCREENSHOTS", "screenshots"))
PATIENCE = 120_000  # milliseconds
HARMLESS = ("Method not implemented.",)  # a warning of Gradio's own

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium at /usr/bin/chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def model_hub(model_folder, deep_folder, tmp_path_factory):
    """A Hub with tiny models: one to analyse, one that takes a while, one that is gated, one that cannot be served."""
    with LocalHub() as running:
        folders = {"tiny-llama": model_folder, "gated": model_folder, "broken": model_folder, "deep": deep_folder}
        for name, folder in folders.items():
            running.add_repository(f"acme/{name}", folder)
        running.repository("acme/gated").gated = "manual"
        _publish_sweep(running, tmp_path_factory.mktemp("sweep"))
        running.faults.always(path="*acme/broken*", status=500)
        yield running


def _publish_sweep(running, folder):
    """A sweep of three depths as `depthscope push` leaves it: a dataset of reports, and each model's history."""
    import pandas as pd

    rows = []
    for depth in (4, 8, 12):
        for trained in (True, False):
            report = sample_report(depth, seed=depth + trained).to_json()
            rows.append({"report": report, "trained": trained, "model": f"acme/net-{depth}", "layers": depth})
        steps = [{"step": step, "metric": "variance", "layer": depth - 1, "value": 0.5 * step} for step in range(1, 6)]
        (folder / f"net-{depth}").mkdir()
        pd.DataFrame(steps).to_parquet(folder / f"net-{depth}" / "layer_stats.parquet")
        running.add_repository(f"acme/net-{depth}", folder / f"net-{depth}")
    (folder / "reports").mkdir()
    pd.DataFrame(rows).to_parquet(folder / "reports" / "reports.parquet")
    running.add_repository("acme/sweep-reports", folder / "reports", kind="dataset")


@pytest.fixture(scope="module")
def space(model_hub, tmp_path_factory):
    """The Space, connected to that Hub."""
    settings = {
        "HF_ENDPOINT": model_hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "DEPTHSCOPE_SPACE_EXAMPLES": "acme/tiny-llama",
        "DEPTHSCOPE_SPACE_MAX_JOB_BYTES": "4e9",
    }
    with serving(tmp_path_factory.mktemp("space"), settings, ending=signal.SIGINT) as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # A container's root has no user namespaces of its own.
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        # One for all tests, so that it compiles the page's megabytes of scripts once.
        context = opened.new_context(accept_downloads=True)
        context.add_init_script("if (window === top) localStorage.clear()")  # but nobody has been here before
        context.set_default_timeout(PATIENCE)
        yield context
        opened.close()


@pytest.fixture
def visit(browser, space):
    """Open the page as `visit(dark=..., width=...)`; afterwards nothing may have gone wrong or outside."""
    wrong, pages = [], []

    def open_page(*, dark=False, width=1280, height=900):
        page = browser.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda said: said.type == "error" and wrong.append(f"console: {said.text}"))
        page.on(
            "request", lambda request: _is_outside(request.url, space.url) and wrong.append(f"outside: {request.url}")
        )
        page.goto(f"{space.url}/?__theme={'dark' if dark else 'light'}")
        page.locator("#analyze").wait_for()
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not [line for line in wrong if not any(words in line for words in HARMLESS)]


def _is_outside(url, own):
    parts = urlsplit(url)
    return parts.scheme in ("http", "https", "ws", "wss") and parts.netloc != urlsplit(own).netloc


def keep(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(600)  # the plots take the theme's colours
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def serious(page):
    """What axe finds that keeps people from using the page."""
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {violation['nodes'][0]['html'][:200]} ({len(violation['nodes'])})"
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]


def choose(page, source):
    page.get_by_label(source, exact=True).check()


def give(page, where, *paths):
    """Choose files as a person does, so that the page is ready for them."""
    with page.expect_file_chooser() as chooser:
        page.locator(f"{where} button").get_by_text("Click to Upload").click()
    chooser.value.set_files(paths)
    for path in paths:
        page.locator(where).get_by_text(path.suffix).first.wait_for()


def analyse(page):
    page.locator("#analyze").click()
    page.locator("#downloads").wait_for()  # they come with the whole report


def downloaded(page, button, folder):
    with page.expect_download() as download:
        page.locator(button).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


@pytest.fixture
def archive(model_folder, tmp_path):
    path = tmp_path / "my-model.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for file in model_folder.iterdir():
            opened.write(file, f"my-model/{file.name}")
    return path


def test_a_model_on_the_hub_is_estimated_analysed_and_downloaded_in_every_form(visit, space, model_hub, tmp_path):
    page = visit()
    model = page.locator("#model input")
    model.fill("acme/tiny-llama")
    model.press("Enter")
    page.locator("#estimate").get_by_text("should take about").wait_for()
    analyse(page)
    assert re.search(r"of (the )?4 layers", page.locator("#headline h2").inner_text())
    assert page.locator("#results .js-plotly-plot:visible").count() == 6
    keep(page, "hub-light")
    report = LayerReport.load(downloaded(page, "#download-json", tmp_path))
    assert report.model["name"] == "acme/tiny-llama"
    assert report.model["revision"] == model_hub.repository("acme/tiny-llama").branches["main"]
    assert {"skip", "usefulness", "causal", "permutation", "jacobian"} <= set(report.settings["scores"])
    csv = downloaded(page, "#download-csv", tmp_path).read_text()
    assert csv.splitlines()[0].startswith("layer,")
    assert len(csv.splitlines()) == 5
    assert "Content-Security-Policy" in downloaded(page, "#download-html", tmp_path).read_text()
    assert downloaded(page, "#download-png", tmp_path).read_bytes().startswith(b"\x89PNG")
    assert "depthscope analyze acme/tiny-llama" in page.locator("#code").inner_text()
    assert serious(page) == []
    assert space.leftovers() == []


def test_a_zip_is_analysed_in_the_dark_and_deleted(visit, space, archive):
    page = visit(dark=True)
    choose(page, "Upload a model")
    give(page, "#upload", archive)
    page.locator("#estimate").get_by_text("should take about").wait_for()
    analyse(page)
    assert "my-model" in page.locator("#headline").inner_text()
    keep(page, "upload-dark")
    colors = page.evaluate(
        "[...document.querySelectorAll('#results .js-plotly-plot')].map(plot => plot.layout.font.color)"
    )
    assert set(colors) == {"#e6e8ec"}  # light letters on the dark ground
    assert serious(page) == []
    assert space.leftovers() == []
    assert not list(space.folder.glob("gradio/**/my-model.zip"))


def test_a_report_is_shown_on_a_telephone(visit, tmp_path):
    path = sample_report(30).save(tmp_path / "report.json")
    page = visit(width=390, height=844)
    choose(page, "Upload a report")
    give(page, "#report", path)
    analyse(page)
    assert "of 30 layers are near the identity" in page.locator("#headline h2").inner_text()
    keep(page, "report-telephone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    first, second = (page.locator(f"#plot-{name}").bounding_box() for name in ("causal_map", "permutation_map"))
    assert first["width"] > 250  # one below the other, and not two in half the width
    assert first["y"] + first["height"] <= second["y"]
    page.locator("#layers th").nth(2).click()
    assert serious(page) == []


def test_reports_are_compared(visit, tmp_path):
    paths = [sample_report(depth, seed=depth).save(tmp_path / f"{depth}.json") for depth in (12, 30)]
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    give(page, "#compare-reports", *paths)
    page.locator("#compare-models textarea").fill("acme/tiny-llama")
    page.locator("#compare").click()
    page.locator("#plot-depth .js-plotly-plot").wait_for()
    assert page.locator("#compared h2").inner_text() == "sample/toy-12 and sample/toy-30 and acme/tiny-llama"
    keep(page, "compare")
    assert downloaded(page, "#compare-csv", tmp_path).read_text().count("\n") == 1 + 12 + 30 + 4
    assert downloaded(page, "#compare-html", tmp_path).stat().st_size > 1_000_000
    assert serious(page) == []


def test_a_published_sweep_is_compared_with_a_report_of_ones_own_on_a_telephone(visit, tmp_path):
    page = visit(width=390, height=844)
    page.get_by_role("tab", name="Compare").click()
    give(page, "#compare-reports", sample_report(30).save(tmp_path / "mine.json"))
    page.locator("#compare-sweep input, #compare-sweep textarea").first.fill("acme/sweep-reports")
    page.locator("#compare").click()
    page.locator("#plot-course .js-plotly-plot").wait_for()
    assert page.locator("#plot-depth .js-plotly-plot").is_visible()
    names = "sample/toy-30 and sample/toy-4 and sample/toy-8 and sample/toy-12"
    assert page.locator("#compared h2").inner_text() == names
    keep(page, "compare-sweep-telephone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert serious(page) == []


def test_a_text_of_ones_own_is_used_as_often_as_wanted_and_not_kept(visit, space, tmp_path):
    text = tmp_path / "my-words.txt"
    text.write_text("The layers of a model pass on a stream of numbers, and each adds a little. " * 400)
    page = visit()
    page.get_by_text("Text, scores and precision").first.click()
    page.get_by_label("Text file").first.check()
    give(page, "#analyze-text", text)
    page.locator("#estimate").get_by_text("should take about").wait_for()
    for block_size in ("64", "128"):
        page.get_by_label("Tokens in a block").first.fill(block_size)
        page.get_by_label("Tokens in a block").first.press("Enter")
        page.locator("#analyze").click()
        page.locator("#results").get_by_text("Partial results").first.wait_for(state="hidden")
        page.locator("#downloads").wait_for()
        assert "tokens of uploaded text" in page.locator("#results").inner_text()
    assert not list(space.folder.glob("gradio/**/my-words.txt"))


def test_stop_stops(visit, space):
    page = visit()
    page.locator("#model input").fill("acme/deep")
    page.locator("#model input").press("Enter")
    page.get_by_text("Text, scores and precision").first.click()
    page.get_by_label("Tokens to measure on").first.fill("1024")
    page.get_by_label("Tokens to measure on").first.press("Enter")
    page.locator("#analyze").click()
    page.locator("#status").get_by_text("Leaving out each layer").wait_for()
    page.locator("#stop").click()
    page.locator("#status").get_by_text("Stopped, as you asked.").wait_for()
    assert page.locator("#results h2").is_visible()  # what was measured until then
    assert page.locator("#analyze").is_enabled()
    assert space.leftovers() == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("acme/no-such-model", "There is no model acme/no-such-model on the Hub"),
        ("acme/gated", "acme/gated is gated"),
        ("acme/broken", "The Hub answered 500"),
        ("../../etc/passwd", "is not the id of a model"),
    ],
)
def test_a_model_that_cannot_be_had_gets_its_own_message(visit, name, words):
    page = visit()
    page.locator("#model input").fill(name)
    page.locator("#model input").press("Enter")
    page.locator("#analyze").click()
    page.locator("#status .ds-problem").wait_for()
    assert words in page.locator("#status").inner_text()


def test_the_explanations_can_be_read_by_everybody(visit):
    page = visit()
    for name, sign in (("Explain", "#plot-depth-paper .js-plotly-plot"), ("For programs", ".ds-code:visible")):
        page.get_by_role("tab", name=name).click()
        page.locator(sign).first.wait_for()
        keep(page, name.lower().replace(" ", "-"))
        assert serious(page) == []


def test_a_program_gets_reports_and_messages(space, archive, tmp_path):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(space.url, verbose=False)
    report = client.predict("acme/tiny-llama", scores="variance,skip", tokens=128, block_size=64, api_name="/analyze")
    assert [row["layer"] for row in LayerReport.from_json(json.dumps(report)).layers] == [0, 1, 2, 3]
    uploaded = client.predict(
        handle_file(archive), scores="variance", tokens=64, block_size=64, api_name="/analyze_upload"
    )
    assert uploaded["model"]["name"] == "my-model"
    assert client.predict("acme/tiny-llama", api_name="/estimate")["layers"] == 4
    words = client.predict(handle_file(sample_report(12).save(tmp_path / "r.json")), api_name="/summarize")
    assert "of 12 layers" in words
    with pytest.raises(AppError, match="no_such_model"):
        client.predict("acme/no-such-model", api_name="/analyze")
    client.predict(api_name="/stop")
    with pytest.raises(AppError, match="Links are not accepted"):
        client.predict(handle_file("https://example.org/report.json"), api_name="/summarize")
