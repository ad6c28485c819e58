"""The beginning of a sequence: blocks begin as the tokenizer begins a text, and that token counts for nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from depthscope import Blocks, LayerReport, Settings, analyze, load_blocks
from depthscope.callbacks.effectiveness import EffectivenessCallback
from depthscope.cli import app
from depthscope.errors import SettingsError
from depthscope.report.comparison import compare
from depthscope.text.special_tokens import SpecialTokens
from depthscope.views.report_page import reproduce

WORDS = ["the", "layers", "of", "a", "model", "pass", "on", "stream", "and", "each", "adds", "something", "to", "it"]
TEXT = [" ".join(WORDS[(7 * i + i // 5) % len(WORDS)] for i in range(400))]
MARKS = {"<s>": 0, "</s>": 1, "[CLS]": 2, "[SEP]": 3, "<lang>": 4}
QUICK: dict[str, Any] = {
    "fit_blocks": 0,
    "eval_blocks": 3,
    "block_size": 16,
    "scores": "variance,skip",
    "progress": False,
}


def words(template: str | None, **marks: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words, which puts what the template says around a text."""
    backend = Tokenizer(models.WordLevel({**MARKS, **{w: 5 + i for i, w in enumerate(WORDS)}, "?": 30}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template is not None:
        backend.post_processor = processors.TemplateProcessing(template, special_tokens=list(MARKS.items()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **({"bos_token": "<s>", "eos_token": "</s>"} | marks))


class BySize(PreTrainedTokenizerFast):
    """Puts BOS before long texts only."""

    def __call__(self, text: Any, add_special_tokens: bool = True, **options: Any) -> Any:
        found = super().__call__(text, add_special_tokens=False, **options)
        if add_special_tokens and len(text) > 5:
            found["input_ids"] = [0, *found["input_ids"]]
        return found


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    found = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        found.model.embed_tokens.weight[0] *= 20  # BOS is large, as in trained models
    return found


def blocks_of(tokenizer: Any, bos: str = "auto", num_blocks: int = 3, block_size: int = 16) -> Blocks:
    return load_blocks(TEXT, tokenizer, num_blocks=num_blocks, block_size=block_size, bos=bos)


@pytest.mark.parametrize(
    ("tokenizer", "start"),
    [
        (words("<s> $A"), (0,)),  # Llama 3, Gemma: a post-processor
        (words("<s> $A </s>"), (0,)),
        (words("$A </s>"), ()),  # EOS only
        (words("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]"), (2,)),
        (words("<lang> <s> $A"), (4, 0)),
        (words(None), ()),  # GPT-2, SmolLM2: a name for BOS, and none is added
        (words(None, add_bos_token=True), (0,)),  # Llama 2, and GGUF files with tokenizer.ggml.add_bos_token
        (words(None, bos_token=None, eos_token=None), ()),
    ],
)
def test_by_itself_a_block_begins_as_the_tokenizer_begins_a_text(tokenizer: Any, start: tuple[int, ...]) -> None:
    blocks = blocks_of(tokenizer)
    plain = tokenizer(TEXT[0], add_special_tokens=False).input_ids
    own = 16 - len(start)
    assert blocks.input_ids.shape == (3, 16)
    for row in range(3):
        assert blocks.input_ids[row].tolist() == [*start, *plain[row * own : (row + 1) * own]]
    assert blocks.start == start
    assert blocks.token_mask.int().tolist() == [[0] * len(start) + [1] * own] * 3


def test_yes_takes_the_bos_that_has_a_name_and_no_takes_none() -> None:
    for template in (None, "<s> $A", "$A </s>"):
        assert blocks_of(words(template), "yes").start == (0,)
        assert blocks_of(words(template), "no").start == ()
    assert blocks_of(words("[CLS] $A", bos_token=None), "yes").start == (2,)
    assert [Settings(bos=bos).bos for bos in (True, False)] == ["yes", "no"]  # as YAML reads a bare yes and no


def test_what_cannot_begin_a_block_is_refused() -> None:
    with pytest.raises(SettingsError, match="no beginning-of-sequence token"):
        blocks_of(words(None, bos_token=None), "yes")
    changing = BySize(tokenizer_object=words(None).backend_tokenizer, bos_token="<s>")
    with pytest.raises(SettingsError, match="depend on the text"):
        blocks_of(changing)
    assert blocks_of(changing, "yes").start == (0,)
    with pytest.raises(SettingsError, match="Raise block_size to 3"):
        blocks_of(words("<s> $A"), block_size=2)
    with pytest.raises(SettingsError, match=r"give yes .* no, or auto"):
        Settings(bos="maybe")


def test_ids_that_the_tokenizer_adds_are_special_even_where_none_is_named_so() -> None:
    special = SpecialTokens.of(words("<lang> $A", bos_token=None, eos_token=None))
    assert special.ids == {4}


def test_bos_is_read_and_counts_for_nothing(model: LlamaForCausalLM) -> None:
    tokenizer = words("<s> $A")
    report = analyze(model, tokenizer, text=TEXT, **QUICK)
    ids = blocks_of(tokenizer).input_ids
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    # Neither the position of BOS nor the prediction made there: of 16 tokens, 15 count, and 14 predictions.
    losses = torch.nn.functional.cross_entropy(output.logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())
    variance = output.hidden_states[1][:, 1:].var(-1).mean()
    assert report.scores["loss"] == pytest.approx(losses.item(), rel=1e-5)
    assert report.layers[0]["variance"] == pytest.approx(variance.item(), rel=1e-5)
    assert (report.data["tokens"], report.data["bos"]) == (45, [0])


def test_the_same_tokens_as_text_and_as_a_tensor_are_one_measurement(model: LlamaForCausalLM) -> None:
    tokenizer = words("<s> $A")
    text = analyze(model, tokenizer, text=TEXT, **QUICK)
    ids = blocks_of(tokenizer).input_ids
    for given in (ids, ids.tolist(), ids.numpy(), Blocks.from_ids(ids, special_ids=[0])):
        tensor = analyze(model, tokenizer, blocks=given, **QUICK)
        assert (tensor.layers, tensor.scores) == (text.layers, text.scores)
        assert {**tensor.data, "name": ""} == {**text.data, "name": ""}


def test_the_fingerprint_tells_what_counts() -> None:
    rows = [[0, 5, 6, 7], [0, 8, 9, 10]]
    padding = [[0, 1, 1, 1], [0, 1, 1, 1]]
    kinds = [
        Blocks.from_ids(rows),
        Blocks.from_ids(rows, special_ids=[0]),
        Blocks.from_ids(rows, special_ids=[0, 5]),
        Blocks.from_ids(rows, padding),
    ]
    assert len({blocks.fingerprint for blocks in kinds}) == len(kinds)
    # What is special, but not at a start, changes nothing; and neither does the name.
    assert Blocks.from_ids(rows, special_ids=[0, 9], name="x").fingerprint == kinds[1].fingerprint
    assert Blocks.from_ids(rows, special_ids=[9]).fingerprint == kinds[0].fingerprint


def test_with_and_without_bos_the_fingerprint_differs_and_a_comparison_says_so(model: LlamaForCausalLM) -> None:
    tokenizer = words("<s> $A")
    with_bos, without = (analyze(model, tokenizer, text=TEXT, bos=bos, **QUICK) for bos in ("auto", "no"))
    assert with_bos.data["fingerprint"] != without.data["fingerprint"]
    said = " ".join(compare([with_bos, without]).warnings)
    assert "Not all reports have a beginning-of-sequence token" in said
    assert "settings: bos" not in said
    assert "each beginning with BOS (token 0)" in with_bos.summary()
    assert "BOS" not in without.summary()
    assert any(note.startswith("bos: no block begins") for note in without.notes)
    assert compare([without, without]).warnings == ()


def test_reports_from_before_there_was_bos_load_and_are_made_again_without_it(model: LlamaForCausalLM) -> None:
    report = analyze(model, words("<s> $A"), text=TEXT, bos="no", **QUICK)
    old = report.model_dump()
    del old["data"]["bos"], old["settings"]["bos"]
    old["model"] |= {"source": "hub", "name": "some/model"}
    loaded = LayerReport.model_validate(old)
    assert "--bos no" in reproduce(loaded)
    assert compare([loaded, report]).warnings == ()
    asked = {**old, "settings": {**old["settings"], "bos": "yes"}}
    assert "--bos yes" in reproduce(LayerReport.model_validate(asked))
    asked["settings"]["bos"] = "auto"
    assert "--bos" not in reproduce(LayerReport.model_validate(asked))


def test_blocks_are_measured_as_they_are_or_refused(model: LlamaForCausalLM) -> None:
    tokenizer = words("<s> $A")
    ids = blocks_of(tokenizer).input_ids
    with pytest.raises(SettingsError, match="every block begins with the special token 0"):
        analyze(model, tokenizer, blocks=ids, bos="no", **QUICK)
    with pytest.raises(SettingsError, match="not all blocks begin"):
        analyze(model, tokenizer, blocks=ids[:, 1:], bos="yes", **QUICK)
    assert analyze(model, tokenizer, blocks=ids, bos="yes", **QUICK).data["bos"] == [0]
    assert analyze(model, tokenizer, blocks=ids[:, 1:], **QUICK).data["bos"] == []


def test_padding_before_bos_does_not_hide_it() -> None:
    blocks = Blocks.from_ids([[9, 0, 5, 6], [0, 5, 6, 7]], [[0, 1, 1, 1], [1, 1, 1, 1]], special_ids=[0])
    assert blocks.start == (0,)
    assert Blocks.from_ids([[0, 5, 6], [5, 6, 7]], special_ids=[0]).start == ()


def test_a_callback_leaves_out_the_special_ids_of_the_trainers_tokenizer(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    tokenizer, trained = words("<s> $A", pad_token="</s>"), copy.deepcopy(model)
    blocks = blocks_of(tokenizer)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in blocks.input_ids]
    callback = EffectivenessCallback(blocks.input_ids, "variance", every=1, max_overhead=None)
    options = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        learning_rate=0.0,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(trained, options, train_dataset=rows, processing_class=tokenizer, callbacks=[callback]).train()
    measured = LayerReport.load(tmp_path / "layer_reports" / "step-1.json")
    expected = analyze(model, tokenizer, text=TEXT, **{**QUICK, "scores": "variance"})
    assert measured.data["fingerprint"] == expected.data["fingerprint"] == blocks.fingerprint
    assert measured.column("variance") == pytest.approx(expected.column("variance"), rel=1e-6)


def test_the_command_line_takes_it(model: LlamaForCausalLM, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    model.save_pretrained(tmp_path / "model")
    words("<s> $A").save_pretrained(tmp_path / "model")
    (tmp_path / "t.txt").write_text(TEXT[0], encoding="utf-8")
    common = [str(tmp_path / "model"), "--text", str(tmp_path / "t.txt"), "--block-size", "16", "--quiet", "--out"]
    analysis = ["analyze", *common, str(tmp_path / "a.json"), "--scores", "variance", "--fit-blocks", "0"]
    for options, start in (([], [0]), (["--bos", "no"], [])):
        done = CliRunner().invoke(app, [*analysis, "--eval-blocks", "2", *options])
        assert done.exit_code == 0, done.output
        assert LayerReport.load(tmp_path / "a.json").data["bos"] == start
    done = CliRunner().invoke(app, ["sparsity", *common, str(tmp_path / "s.json"), "--blocks", "2", "--bos", "no"])
    assert LayerReport.load(tmp_path / "s.json").data["bos"] == [], done.output
    assert CliRunner().invoke(app, [*analysis, "--bos", "perhaps"]).exit_code == 2
