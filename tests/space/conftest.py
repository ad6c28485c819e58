"""The Space's modules, which lie beside its app.py, and small models to show it."""

import signal
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from models import tiny_llama
from served import serving
from tiny_tokenizer import save_tokenizer

SPACE = Path(__file__).parents[2] / "spaces" / "layer_effectiveness"
sys.path.insert(0, str(SPACE))

from safety.limits import Limits  # noqa: E402

GIB = 2**30
LEFT_SECONDS = 3  # of the Space that all tests share


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Llama and its tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny_llama(vocab_size=300).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory):
    """A Llama of many thin layers, which takes a while."""
    folder = tmp_path_factory.mktemp("deep") / "deep-llama"
    tiny_llama(40, vocab_size=300).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def job_limits():
    """Limits that suit tiny models on a machine that others use too."""
    return Limits(max_job_bytes=4 * GIB, max_job_seconds=120, max_jobs=1, max_waiting=3)


def _packed(folder, path):
    with zipfile.ZipFile(path, "w") as opened:
        for file in folder.iterdir():
            opened.write(file, file.name)
    return path


@pytest.fixture(scope="session")
def long_model(deep_folder, tmp_path_factory):
    """A packed model whose analysis takes far longer than a test."""
    return _packed(deep_folder, tmp_path_factory.mktemp("long") / "long.zip")


@pytest.fixture(scope="session")
def short_model(model_folder, tmp_path_factory):
    """A packed model whose analysis takes no time."""
    return _packed(model_folder, tmp_path_factory.mktemp("short") / "short.zip")


@pytest.fixture(scope="session")
def spaces(tmp_path_factory):
    """Gives a served Space whose visitors are said to have left soon, and another one when a test has ended it."""
    settings = {
        "DEPTHSCOPE_SPACE_DESERTED_SECONDS": str(LEFT_SECONDS),
        "DEPTHSCOPE_SPACE_MAX_JOB_BYTES": "4e9",
        "DEPTHSCOPE_SPACE_MAX_WAITING": "3",
    }
    running = []
    with ExitStack() as stack:

        def give():
            if not running or running[-1].process.poll() is not None:
                folder = tmp_path_factory.mktemp("space")
                running.append(stack.enter_context(serving(folder, settings, ending=signal.SIGHUP)))
            return running[-1]

        yield give


@pytest.fixture
def space(spaces):
    return spaces()
