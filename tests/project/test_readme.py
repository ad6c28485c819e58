"""The README's code runs as it stands, and what it names exists."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from depthscope.cli import app
from depthscope.report.measures import measures_markdown
from models import WIDTH, random_blocks, tiny_llama
from runs import Sentences
from tiny_tokenizer import save_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"<!-- tested -->\n```python\n(.*?)```", README, flags=re.DOTALL)


def test_all_python_in_the_readme_is_tested() -> None:
    assert len(SNIPPETS) == README.count("```python") == 5


def test_the_code_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "tokenizer")
    names = {
        "model": tiny_llama(vocab_size=300),
        "tokenizer": AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
        "ids": random_blocks(2, 12),
        "weight": torch.eye(WIDTH),
        "bias": torch.zeros(WIDTH),
        "dataset": Sentences(),
        "blocks": random_blocks(4, 12),
    }
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
    torch.testing.assert_close(names["resumed"], names["baseline"])
    assert (tmp_path / "report.html").stat().st_size > 1_000_000


def test_every_link_to_a_file_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_commands_that_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "sweep-demo"):
        assert f"\n{target}:" in makefile
    blocks = re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
    for command in re.findall(r"^depthscope (\w+)", "\n".join(blocks), flags=re.MULTILINE):
        assert command in {name.name or name.callback.__name__ for name in app.registered_commands} | {"sweep"}


def test_the_readme_shows_every_measure() -> None:
    assert measures_markdown() in README
