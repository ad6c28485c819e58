"""Prompt tuning: virtual tokens stand before the text in the stream, are read by the model and count for nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from depthscope import LayerStack, analyze
from depthscope.conversion.checkpoint import convert_checkpoint
from depthscope.errors import ConversionError, NoLayerStackError, SettingsError
from depthscope.text.blocks import Blocks
from models import VOCABULARY, random_blocks, tiny_llama

peft = pytest.importorskip("peft")

VIRTUAL, LAYERS = 5, 3
KINDS = {
    "prompt_tuning": lambda **how: peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL, **how),
    "p_tuning": lambda **how: peft.PromptEncoderConfig(num_virtual_tokens=VIRTUAL, encoder_hidden_size=16, **how),
}
HOW: dict[str, Any] = {"fit_blocks": 2, "eval_blocks": 2, "probes": 2, "progress": False}


def tuned(config: Any, folder: Path | None = None) -> nn.Module:
    base = tiny_llama(LAYERS)
    if folder is not None:
        base.save_pretrained(folder / "base")
        base.name_or_path = str(folder / "base")
    model = peft.get_peft_model(base, config(task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def by_hand(model: nn.Module) -> nn.Module:
    """The same model with the virtual tokens as plain ones: rows of the embedding behind the vocabulary's."""
    with torch.no_grad():
        prompt = model.get_prompt(batch_size=1)[0]
    plain = tiny_llama(LAYERS)
    plain.model.embed_tokens = nn.Embedding.from_pretrained(torch.cat([plain.model.embed_tokens.weight, prompt]))

    def never_predicted(head: nn.Module, args: object, logits: Tensor) -> Tensor:
        return nn.functional.pad(logits, (0, VIRTUAL), value=-1e30)

    plain.lm_head.register_forward_hook(never_predicted)
    return plain


def behind_virtual(ids: Tensor) -> Blocks:
    virtual = torch.arange(VOCABULARY, VOCABULARY + VIRTUAL)
    return Blocks.from_ids(torch.cat([virtual.repeat(len(ids), 1), ids], 1), special_ids=virtual.tolist())


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What a row of a report has a value for, but for the weights, which the two models have not the same of."""
    return {name: value for name, value in row.items() if isinstance(value, float) and not name.startswith("weight")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_score_is_that_of_the_model_with_the_virtual_tokens_as_plain_ones(kind: str) -> None:
    model, ids = tuned(KINDS[kind]), random_blocks(4, 11)
    report = analyze(model, blocks=ids, scores="all", **HOW)
    expected = analyze(by_hand(model), blocks=behind_virtual(ids), scores="all", **HOW)
    for found, wanted in zip([report.scores, *report.layers], [expected.scores, *expected.layers], strict=True):
        assert numbers(found) == pytest.approx(numbers(wanted), rel=1e-3, abs=1e-5)
        assert found.keys() - numbers(found).keys() == wanted.keys() - numbers(wanted).keys()
    assert report.data["tokens"] == 2 * 11
    assert report.data["block_size"] == 11
    assert f"{VIRTUAL} virtual tokens of the model stand before the text" in " ".join(report.notes)


def test_the_loss_is_that_of_the_text(tmp_path: Path) -> None:
    model, ids = tuned(KINDS["prompt_tuning"], tmp_path), random_blocks(2, 11)
    model.save_pretrained(tmp_path / "adapter")
    report = analyze(tmp_path / "adapter", blocks=ids, scores="skip", **HOW | {"fit_blocks": 0})
    with torch.no_grad():
        logits = model(ids).logits[:, VIRTUAL:]
    assert report.scores["loss"] == pytest.approx(
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    )


def test_padding_is_left_out_as_ever() -> None:
    model, ids = tuned(KINDS["prompt_tuning"]), random_blocks(2, 11)
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    how = HOW | {"fit_blocks": 0, "scores": "skip,variance"}
    padded = analyze(model, blocks=Blocks.from_ids(ids, mask), **how)
    short = analyze(model, blocks=ids[:, :8], **how)
    assert padded.scores["loss"] == pytest.approx(short.scores["loss"], rel=1e-5)
    assert padded.layers[1]["variance"] == pytest.approx(short.layers[1]["variance"], rel=1e-4)


def test_the_stream_is_longer_than_the_text() -> None:
    stack, ids = LayerStack(tuned(KINDS["prompt_tuning"])), random_blocks(2, 11)
    assert (stack.num_layers, stack.virtual_tokens, stack.resumable) == (LAYERS, VIRTUAL, True)
    with torch.no_grad(), stack.capture() as seen:
        assert stack.logits(ids).shape[:2] == (2, VIRTUAL + 11)
    assert stack.flat(seen.resid_pre[1]).shape[:2] == (2, VIRTUAL + 11)


def test_prefix_tuning_leaves_the_stream_as_long_as_the_text() -> None:
    model, ids = tuned(lambda **how: peft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL, **how)), random_blocks(2, 11)
    assert LayerStack(model).virtual_tokens == 0
    report = analyze(model, blocks=ids, scores="skip", **HOW | {"fit_blocks": 0})
    with torch.no_grad():
        logits = model(ids).logits
    assert report.scores["loss"] == pytest.approx(
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    )


def test_virtual_tokens_take_positions() -> None:
    with pytest.raises(SettingsError, match="block_size is 125 and 5 virtual tokens stand before the text"):
        analyze(tuned(KINDS["prompt_tuning"]), blocks=random_blocks(2, 125), scores="skip", **HOW | {"fit_blocks": 0})


def test_a_prompt_that_wants_to_know_the_task_is_refused() -> None:
    config = peft.MultitaskPromptTuningConfig
    with pytest.raises(NoLayerStackError, match="task_ids cannot be None"):
        LayerStack(tuned(lambda **how: config(num_virtual_tokens=VIRTUAL, num_tasks=2, **how)))


def test_a_prompt_cannot_be_converted(tmp_path: Path) -> None:
    tuned(KINDS["prompt_tuning"], tmp_path).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConversionError, match="virtual tokens"):
        convert_checkpoint(str(tmp_path / "adapter"), tmp_path / "out")
