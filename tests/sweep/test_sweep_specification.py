"""Sweep files: what they may say, and one clear message with its line where they say something else."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from depthscope.cli import app
from depthscope.errors import SpecificationError
from depthscope.models import PRESETS
from depthscope.sweep.cost.plan import plan
from depthscope.sweep.extending import SHAPE, preset_names
from depthscope.sweep.grid import expand
from depthscope.sweep.report.results import MAX_POINTS
from depthscope.sweep.specification import (
    MOST_POINTS,
    Data,
    Scoring,
    Specification,
    Text,
    Tokenizer,
    Tracking,
    Training,
    load_sweep,
)
from depthscope.sweep.yaml_source import read_yaml
from tiny_tokenizer import save_tokenizer

HEAD = "name: a\ngrid: {depth: {num_hidden_layers: [2]}}\n"  # two lines that are in order


def load(folder: Path, text: str) -> Any:
    (folder / "a.yaml").write_text(text)
    return load_sweep(folder / "a.yaml")


# What the file says -> what the message must hold; `line n` is where the mistake stands.
REFUSED = {
    "": ["holds no settings"],
    "- a": ["holds no settings"],
    "name: [": ["line 1", "this is not YAML"],
    "name: a\nname: b": ["line 2", "'name' occurs twice"],
    "name: 2024-01-01": ["line 1", "put it in quotes"],
    "name: !!python/object:os.system a": ["line 1", "not plain data"],
    "name: &a x\ndescription: *a": ["line 2", "*a refers to another part"],
    "[" * 3000: ["nests too deeply"],
    "name: a": ["'grid' is missing"],
    "grid: {depth: {num_hidden_layers: [2]}}": ["'name' is missing"],
    "name: a b\ngrid: {}": ["line 1", "name is 'a b'"],
    "name: ../a\ngrid: {}": ["line 1", "name is '../a'"],
    HEAD + "extends: nowhere": ["line 3", "no sweep file or preset 'nowhere'", "presets are"],
    HEAD + "extends: smok": ["line 3", "Did you mean the preset 'smoke'?"],
    HEAD + "extends: a.yaml": ["line 3", "circle"],
    HEAD + "extends: [smoke]": ["line 3", "takes the name of a preset or a file"],
    HEAD + "trainig: {}": ["line 3", "no setting 'trainig'", "did you mean 'training'?", "extends"],
    HEAD + "training:\n  tokns: 3": ["line 4", "'training.tokns'", "did you mean 'tokens'?", "batch_tokens"],
    HEAD + "data: {held_out: {txt: a}}": ["line 3", "'data.held_out.txt'", "did you mean 'text'?"],
    HEAD + "training: fast": ["line 3", "training is 'fast'", "give settings"],
    HEAD + "training:": ["line 3", "training is empty; give it a value, or leave it out"],
    HEAD + "training:\n  tokens:": ["line 4", "training.tokens is empty"],
    HEAD + "model:": ["line 3", "model is empty"],
    "name: 8\ngrid: {}": ["line 1", "name is 8", "in quotes"],
    HEAD + "training:\n  weight_decay: no": ["line 4", "training.weight_decay", "false", "is not a number"],
    HEAD + "training:\n  tokens: '5000'": ["line 4", "training.tokens", "'5000'", "without quotes"],
    HEAD + "training:\n  compile: 1": ["line 4", "training.compile", "neither true nor false"],
    HEAD + "training:\n  compile: 'yes'": ["line 4", "training.compile", "neither true nor false"],
    HEAD + "scoring: {probes: yes}": ["line 3", "scoring.probes", "is not a number"],
    HEAD + "seeds: [true]": ["line 3", "true", "is not a number"],
    HEAD + "seeds: [4294967296]": ["line 3", "none above 4,294,967,295"],
    HEAD + "scoring: {seed: 4294967296}": ["line 3", "scoring.seed"],
    HEAD + "model: !!python/object:os.system {hidden_size: 8}": [
        "line 3",
        "python/object:os.system",
        "leave the tag out",
    ],
    HEAD + "seeds: !!python/tuple [0]": ["line 3", "python/tuple", "leave the tag out"],
    HEAD + "seeds: !!set {0}": ["line 3", "!!set is not plain data"],
    HEAD + "!!python/name:os.system model: {}": ["line 3", "keys are plain words"],
    HEAD + "training: {compile: !!bool maybe}": ["line 3", "not plain data"],
    "name: a\ndescription: " + 20_001 * "x": ["line 2", "description is 'xxx", "at most 20000 characters"],
    "name: " + 201 * "x": ["line 1", "at most 200 characters"],
    HEAD + "training:\n  tokens: many": ["line 4", "training.tokens is 'many'", "valid integer"],
    HEAD + "training:\n  schedule: step": ["line 4", "'step'; give 'cosine', 'linear' or 'constant'"],
    HEAD + "training:\n  learning_rate: 0": ["line 4", "training.learning_rate is 0", "greater than 0"],
    HEAD + "training:\n  learning_rate: .inf": ["line 4", "finite"],
    HEAD + "training:\n  batch_tokens: 100": ["not a multiple of sequence_length (128)"],
    HEAD + "training:\n  tokens: 100": ["less than one optimiser step"],
    HEAD + "training:\n  micro_batch_size: 3": ["8 sequences", "not a multiple of micro_batch_size (3)"],
    HEAD + "training:\n  attention: fast": ["line 4", "no attention 'fast'", "eager", "sdpa"],
    HEAD + "data:\n  epochs: 0": ["line 4", "data.epochs is 0"],
    HEAD + "data: {text: a, dataset: b}": ["line 3", "both `text` and `dataset`"],
    HEAD + "data:\n  text: []": ["line 4", "data.text", "give one file or folder, or a list"],
    HEAD + "data:\n  text: ''": ["line 4", "data.text", "give one file or folder, or a list"],
    HEAD + "data:\n  text: a.txt\n  split: train": ["line 5", "only a dataset has splits"],
    HEAD + "data:\n  held_out:\n    split: test": ["line 5", "only a dataset has splits"],
    HEAD + "data:\n  column: text": ["line 4", "`column` needs a table"],
    HEAD + "scoring:\n  block_size: 129": ["line 4", "block_size is 129", "128"],
    HEAD + "tokenizer: {vocab_size: 10}": ["line 3", "tokenizer.vocab_size is 10", "257"],
    HEAD + "scoring: {scores: usefulnes}": ["line 3", "unknown score 'usefulnes'", "usefulness"],
    HEAD + "scoring: {pairs: 3}": ["line 3", "pairs"],
    HEAD + "scoring: {fit_blocks: 0}": ["line 3", "fit_blocks is 0"],
    HEAD + "tracking: {log_every: 0}": ["line 3", "tracking.log_every is 0"],
    HEAD + "seeds: []": ["line 3", "at least one seed"],
    HEAD + "seeds: [1, 1]": ["line 3", "each once"],
    HEAD + "seeds: [-1]": ["line 3", "none negative"],
    HEAD + "model:\n  preset: dense-9b": ["line 4", "no preset 'dense-9b'", "dense-2m"],
    HEAD + "model:\n  preset: [dense-2m]": ["line 4", "no preset"],
    HEAD + "model:\n  hiden_size: 4": ["line 4", "did you mean 'hidden_size'"],
    HEAD + "model:\n  weight_decay: 4": ["line 4", "a setting of `training`, not of `model`"],
    HEAD + "model:\n  vocab_size: 4": ["line 4", "vocab_size follows from the tokenizer"],
    HEAD + "model:\n  bos_token_id: 4": ["line 4", "bos_token_id follows from the tokenizer"],
    HEAD + "model:\n  head_dim: 3": ["line 4", "cannot be built", "head_dim must be even"],
    HEAD + "model:\n  hidden_size: 2.5": ["line 4", "cannot be built", "hidden_size"],
    HEAD + "model:\n  rms_norm_eps: 0": ["line 4", "cannot be built", "rms_norm_eps is 0; give a number above 0"],
    HEAD + "model:\n  initializer_range: -1": ["line 4", "initializer_range is -1"],
    HEAD + "model:\n  initializer_range: 2": ["line 4", "initializer_range: ", "equal to 1"],
    HEAD + "model:\n  initializer_range: .nan": ["line 4", "initializer_range is nan"],
    HEAD + "model:\n  rope_parameters: {rope_type: nonsense}": ["line 4", "no rope_type 'nonsense'", "yarn"],
    HEAD + "model:\n  rope_parameters: {rope_type: linear}": ["line 4", "factor"],
    HEAD + "model:\n  rope_parameters: {rope_theta: -1}": ["line 4", "not finite"],
    **{
        HEAD + f"model:\n  {setting}": ["line 4", "is not a setting of DepthLMConfig"]
        for setting in (
            "dtype: bfloat16",
            "return_dict: false",
            "architectures: x",
            "output_hidden_states: true",
            "use_cache: false",
            "pretraining_tp: 2",
            "output_router_logits: true",
        )
    },
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[-30:]))
def test_a_bad_file_gets_one_message_with_its_line_and_what_is_allowed(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecificationError) as refused:
        expand(load(tmp_path, text))
    message = str(refused.value)
    for part in REFUSED[text]:
        assert part in message
    assert "\n" not in message


def test_the_command_line_ends_with_2_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(HEAD + "training:\n  tokns: 3")
    for options in ([], ["--dry-run"]):
        shown = CliRunner().invoke(
            app, ["sweep", "run", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "out"), *options]
        )
        assert shown.exit_code == 2
        assert shown.output.startswith("Error: ")
        assert "line 4: there is no setting 'training.tokns'" in shown.output
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecificationError, match="no sweep file or preset"):
        load_sweep(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(SpecificationError, match=r"a\.yaml, line 1: this is not UTF-8 text"):
        load_sweep(tmp_path / "a.yaml")
    (tmp_path / "base.yaml").write_bytes(b"name: a\n\ndescription: \xff\n")
    (tmp_path / "b.yaml").write_text("extends: base.yaml")
    with pytest.raises(SpecificationError, match=r"base\.yaml, line 3: this is not UTF-8 text"):
        load_sweep(tmp_path / "b.yaml")
    (tmp_path / "a.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(SpecificationError, match="larger than 1 MiB"):
        load_sweep(tmp_path / "a.yaml")


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    training = load(tmp_path, HEAD + "training: {tokens: 2e6, learning_rate: 3e-3, batch_tokens: 2_048}").specification
    assert training.training.tokens == 2_000_000
    assert training.training.learning_rate == 0.003
    assert training.training.batch_tokens == 2048
    assert training.training.steps == 976
    quoted = load(tmp_path, HEAD + 'description: "1e5"').specification
    assert quoted.description == "1e5"


def test_a_file_that_extends_merges_settings_and_replaces_grid_and_seeds(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "name: base\nmodel: {hidden_size: 32, num_attention_heads: 4}\ntraining: {tokens: 4096, weight_decay: 0.3}\n"
        "grid: {depth: {num_hidden_layers: [2, 4]}}\nseeds: [0, 1, 2]\n"
    )
    text = "extends: base.yaml\nname: b\ntraining: {tokens: 8192}\ngrid: {decay: {weight_decay: [0, 1]}}\n"
    (tmp_path / "b.yaml").write_text(text)
    specification = load_sweep(tmp_path / "b.yaml").specification
    assert specification.name == "b"
    assert (specification.training.tokens, specification.training.weight_decay) == (8192, 0.3)
    assert specification.model == {"hidden_size": 32, "num_attention_heads": 4}
    assert list(specification.grid) == ["decay"]
    assert specification.seeds == [0, 1, 2]


def test_a_circle_of_files_is_told_with_the_line_that_closes_it(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("name: b\n\nextends: a.yaml\n")
    with pytest.raises(SpecificationError, match=r"b\.yaml, line 3: `extends` forms a circle.*a\.yaml"):
        load(tmp_path, HEAD + "extends: b.yaml")


def test_a_file_without_a_name_that_extends_another_is_called_as_the_file_is(tmp_path: Path) -> None:
    (tmp_path / "my first.yaml").write_text("extends: laptop\n")
    sweep = load_sweep(tmp_path / "my first.yaml")
    assert sweep.specification.name == "my-first"
    made = plan(sweep, expand(sweep))
    assert made.command == f"depthscope sweep run '{tmp_path / 'my first.yaml'}'"
    assert load_sweep("laptop-seeds").specification.name == "laptop-seeds"


def test_the_nearer_of_text_and_dataset_replaces_the_other(tmp_path: Path) -> None:
    (tmp_path / "words.yaml").write_text(HEAD + "data: {dataset: words, split: test, column: text, epochs: 2}\n")
    (tmp_path / "text.yaml").write_text(HEAD + "data: {text: a.jsonl, column: words, held_out: {text: b.txt}}\n")
    data = load(tmp_path, "extends: words.yaml\ndata: {text: a.txt}").specification.data
    assert (data.text, data.dataset, data.split, data.column, data.epochs) == ("a.txt", None, None, None, 2)
    text = "extends: text.yaml\ndata: {dataset: a, held_out: {dataset: b, split: test}}"
    data = load(tmp_path, text).specification.data
    assert data == Data(dataset="a", held_out=Text(dataset="b", split="test"))
    data = load(tmp_path, "extends: words.yaml\ndata: {dataset: other}").specification.data
    assert (data.dataset, data.split) == ("other", "test")
    changed = load_sweep(tmp_path / "words.yaml", {"data": {"text": "a.txt"}}).specification.data
    assert (changed.text, changed.dataset) == ("a.txt", None)


def test_relative_paths_count_from_the_file_that_says_them(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_tokenizer(base / "tokens")
    text = "data: {text: [mine.txt, /abs/b.txt], held_out: {text: held/*.txt}}\ntokenizer: {name: tokens}\n"
    (base / "b.yaml").write_text(HEAD + text)
    sweep = load(tmp_path, "extends: base/b.yaml")
    data, tokenizer = sweep.specification.data, sweep.specification.tokenizer
    assert data.text == ["base/mine.txt", "/abs/b.txt"]
    assert data.held_out.text == "base/held/*.txt"
    assert tokenizer.name == "base/tokens"
    assert sweep.folder == tmp_path.resolve()
    assert load_sweep(base / "b.yaml").specification.data.text == ["mine.txt", "/abs/b.txt"]
    (base / "hub.yaml").write_text(HEAD + "tokenizer: {name: t5-base}")
    assert load(tmp_path, "extends: base/hub.yaml").specification.tokenizer.name == "t5-base"


def test_a_resolved_sweep_means_the_same_wherever_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "b.yaml").write_text(HEAD + "data: {text: mine.txt}")
    sweep = load(tmp_path, "extends: base/b.yaml")
    (tmp_path / "out").mkdir()
    resolved = tmp_path / "out" / "sweep.yaml"
    resolved.write_text(yaml.safe_dump(sweep.specification.model_dump(mode="json")))
    again = load_sweep(resolved)
    assert again.specification == sweep.specification
    assert again.folder == sweep.folder
    extending = load(tmp_path / "base", "extends: ../out/sweep.yaml")
    assert extending.specification.data.text == "mine.txt"


def test_a_mistake_in_an_extended_file_is_told_with_that_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\n\ntraining:\n  tokens: none\n")
    with pytest.raises(SpecificationError, match=r"base\.yaml, line 4: training\.tokens"):
        load(tmp_path, HEAD + "extends: base.yaml")
    (tmp_path / "base.yaml").write_text("name: base\ngrid: {depth: {num_hidden_layers: []}}\n")
    with pytest.raises(SpecificationError, match=r"base\.yaml, line 2: num_hidden_layers has an empty list"):
        expand(load(tmp_path, "extends: base.yaml"))


def test_changes_go_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(HEAD)
    changed = load_sweep(tmp_path / "a.yaml", {"training": {"weight_decay": 0.5}, "seeds": [3]}).specification
    assert (changed.training.weight_decay, changed.seeds) == (0.5, [3])


def test_usefulness_alone_asks_for_blocks_to_fit(tmp_path: Path) -> None:
    for scores, blocks in (("variance", 0), ("usefulness", 64), ("all", 64), ("effective_depth", 64)):
        scoring = load(tmp_path, HEAD + f"scoring: {{scores: {scores}}}").specification.scoring
        assert scoring.settings(128).fit_blocks == blocks
        assert scoring.settings(128).block_size == 128


def test_lines_are_those_that_an_editor_shows(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# first\nname: a\n\ngrid:\n  depth:\n    points:\n      - a: 1\n      - b: 2\n")
    file = read_yaml(tmp_path / "a.yaml")
    lines = {path: where.line for path, where in file.places.items()}
    assert lines[("name",)] == 2
    assert lines[("grid", "depth", "points", 1)] == 8
    assert file.where(("grid", "depth", "points", 1, "unknown")).line == 8


@pytest.mark.parametrize("name", ["smoke"])
def test_a_preset_is_found_by_its_name_and_can_be_expanded(name: str) -> None:
    assert name in preset_names()
    sweep = load_sweep(name)
    assert sweep.specification.name == name
    assert expand(sweep).points


def test_the_limits_are_those_of_who_reads_the_results() -> None:
    assert MOST_POINTS == MAX_POINTS
    decided = {key for preset in PRESETS.values() for key in preset} - {"vocab_size", "max_position_embeddings"}
    assert decided < SHAPE


def test_the_guide_names_every_setting() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text()
    for part in (Specification, Data, Tokenizer, Training, Tracking, Scoring):
        for name in part.model_fields:
            assert f"`{name}`" in guide, name


def test_an_embedding_is_padded_only_beside_a_named_tokenizer() -> None:
    assert Tokenizer(name="some", vocab_size=50304).rows(50280) == 50304
    assert Tokenizer(name="some").rows(50280) == 50280
    assert Tokenizer(name="some", vocab_size=300).rows(50280) == 50280
    assert Tokenizer(vocab_size=2048).rows(1900) == 1900
