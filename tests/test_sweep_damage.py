"""What a sweep makes of damage from outside: files that were cut, overwritten or deleted between two runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from depthscope.cli import app
from depthscope.errors import SweepError
from depthscope.sweep import token_stream
from depthscope.sweep.data import open_corpus, prepare_corpus
from depthscope.sweep.grid import expand
from depthscope.sweep.specification import load_sweep
from depthscope.sweep.token_stream import TokenStream
from sweeps import write_sweep

POINTS = ("depth-L2-seed0", "depth-L3-seed0")


def depthscope(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def flipped(path: Path) -> None:
    """One bit in the middle, which no format notices."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


def gone(path: Path) -> None:
    path.unlink()


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


Damage = Callable[[Path], None]


# -------------------------------------------------------------------------------------------------------- the tokens


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep whose text is tokenized, and of which nothing is trained."""
    folder = tmp_path_factory.mktemp("tokenized")
    sweep = load_sweep(write_sweep(folder))
    prepare_corpus(sweep, expand(sweep), folder / "out")
    return folder


@pytest.mark.parametrize(
    ("name", "damages"),
    [
        ("train.bin", (cut, emptied, zeroed, flipped, longer, gone, folder_instead)),
        ("held_out.bin", (cut, emptied, flipped, gone)),
        ("tokenizer/tokenizer.json", (cut, flipped, gone)),
        ("tokenizer/tokenizer_config.json", (cut, flipped, gone)),
        ("data.json", (cut, emptied, zeroed, flipped, gone, folder_instead)),
    ],
)
def test_a_sweep_trains_nothing_on_damaged_tokens_and_says_which_file_and_what_to_do(
    tokenized: Path, tmp_path: Path, name: str, damages: tuple[Damage, ...]
) -> None:
    for index, damage in enumerate(damages):
        out = Path(shutil.copytree(tokenized / "out", tmp_path / str(index)))
        damage(out / "data" / name)
        shown = depthscope("sweep", "run", tokenized / "tiny.yaml", "--out", out, "--jobs", "1")
        assert shown.exit_code == 2, (damage, shown.output)
        assert Path(name).parts[0] in shown.output
        assert f"Delete the folder {out / 'data'} to have the text tokenized anew" in shown.output
        assert "Traceback" not in shown.output
        assert list((out / "points").glob("*")) == []


@pytest.mark.parametrize("change", [{"dtype": "uint32"}, {"dtype": "object"}, {"needed": 3}, {"name": None}])
def test_a_record_of_the_tokens_that_somebody_changed_is_refused(
    tokenized: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    shutil.copytree(tokenized / "out", tmp_path / "out")
    record = tmp_path / "out" / "data" / "data.json"
    content = json.loads(record.read_text()) | change
    for kept in (content, {key: value for key, value in content.items() if key != "check"}):  # as of an older version
        record.write_text(json.dumps(kept))
        with pytest.raises(SweepError, match=r"Delete the folder .*/out/data"):
            open_corpus(tmp_path / "out", 16)


def test_tokens_of_an_older_version_are_read_and_their_damage_is_found(tokenized: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tokenized / "out", tmp_path / "out"))
    record = out / "data" / "data.json"
    content = json.loads(record.read_text())
    record.write_text(
        json.dumps({k: v for k, v in content.items() if k not in ("check", "train_fingerprint", "tokenizer")})
    )
    sweep = load_sweep(tokenized / "tiny.yaml")
    assert prepare_corpus(sweep, expand(sweep), out).fingerprint == content["fingerprint"]
    flipped(out / "data" / "held_out.bin")
    with pytest.raises(SweepError, match=r"train\.bin or held_out\.bin is damaged"):
        prepare_corpus(sweep, expand(sweep), out)


@pytest.mark.parametrize("damage", [cut, flipped, gone])
@pytest.mark.parametrize("name", ["train.bin", "tokenizer/tokenizer.json", "state.json", "the text"])
def test_tokenizing_does_not_go_on_from_what_is_damaged_or_of_a_text_that_has_changed(
    tokenized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Damage
) -> None:
    monkeypatch.setattr(token_stream, "BATCH_CHARACTERS", 1000)
    append, calls = TokenStream._append, iter(range(100))

    def dying(*args: object) -> None:
        append(*args)  # type: ignore[arg-type]
        if next(calls) == 2:
            raise KeyboardInterrupt

    sweep = load_sweep(write_sweep(tmp_path, training={"tokens": 6000}))
    said: list[str] = []
    monkeypatch.setattr(TokenStream, "_append", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(sweep, expand(sweep), tmp_path / "out")
    monkeypatch.setattr(TokenStream, "_append", append)
    damage(tmp_path / "text" / "000.txt" if name == "the text" else tmp_path / "out" / "data.part" / name)
    prepare_corpus(sweep, expand(sweep), tmp_path / "out", said.append)
    prepare_corpus(sweep, expand(sweep), tmp_path / "whole")
    for file in ("train.bin", "held_out.bin", "data.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "out/data" / file).read_bytes() == (tmp_path / "whole/data" / file).read_bytes()
    assert name == "state.json" or [line for line in said if "so that tokenizing begins anew" in line]
