"""The Space's modules, which lie beside its app.py, and small models to show it."""

import sys
from pathlib import Path

import pytest

from models import tiny_llama
from tiny_tokenizer import save_tokenizer

SPACE = Path(__file__).parents[2] / "spaces" / "layer_effectiveness"
sys.path.append(str(SPACE))

from limits import Limits  # noqa: E402

GIB = 2**30


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
