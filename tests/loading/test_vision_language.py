"""Models that see or hear beside reading: named by folder, their language model is measured on text."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM, PreTrainedModel

from depthscope import DepthscopeError, LayerStack, analyze
from depthscope.errors import NoLayerStackError
from depthscope.loading.load import load_model
from zoo import VOCAB_SIZE, example_ids, tiny_config

# One of each kind of those that docs/models.md names.
ANALYSED = [
    "aria",
    "aya_vision",
    "deepseek_vl",
    "exaone4_5",
    "fuyu",
    "gemma3",
    "gemma4",
    "git",
    "glm4v",
    "glmasr",
    "got_ocr2",
    "idefics2",
    "internvl",
    "kimi_k25",
    "lfm2_vl",
    "lighton_ocr",
    "llava_onevision",
    "minicpmv4_6",
    "mistral3",
    "ovis2",
    "phi4_multimodal",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
    "smolvlm",
    "step3p7",
    "video_llama_3",
]
# The first has none, the other none by default.
WITHOUT_A_TOWER = ("fuyu", "gemma4")
REFUSED = {
    "blip-2": "missing 1 required positional argument: 'pixel_values'",
    "idefics": "does not run on plain token ids: ValueError: Exactly 1 of pixel_values",
    "voxtral_realtime": "does not run on plain token ids: ValueError: You must specify exactly one of input_features",
    "paligemma": "is not causal: when later tokens",  # without an image, all of the text is its prefix
}
NEEDED = version.parse("5.23")  # the types are those of this version
pytestmark = pytest.mark.skipif(
    version.parse(transformers.__version__) < NEEDED, reason=f"transformers before {NEEDED}"
)


def built(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForMultimodalLM.from_config(tiny_config(CONFIG_MAPPING[model_type], 2)).eval()


def loss(model: PreTrainedModel, ids: Tensor) -> float:
    """The next-token loss by the text stack and the head alone, without what the model puts around them."""
    stack = model.get_decoder() if model.get_decoder() is not model else model
    with torch.no_grad():
        logits = model.get_output_embeddings()(stack(input_ids=ids).last_hidden_state)
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def analysed(model: Any, ids: Tensor) -> Any:
    return analyze(model, blocks=ids, fit_blocks=0, eval_blocks=2, scores="skip", progress=False)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "idefics3", "qwen2_audio", "voxtral"])
def test_a_model_named_by_its_folder_is_analysed_as_its_language_model(model_type: str, tmp_path: Path) -> None:
    model = built(model_type)
    ids = example_ids(model)
    model.save_pretrained(tmp_path)
    report = analysed(tmp_path, ids)
    assert report.scores["loss"] == pytest.approx(loss(model, ids), abs=1e-5)
    in_memory = analysed(model, ids)
    assert report.layers == in_memory.layers
    assert len(report.layers) == 2
    senses = "audio" if "audio_config" in model.config.sub_configs else "vision"
    for notes in (report.notes, in_memory.notes):
        assert f"takes more than text ({senses}): what was measured is its language model, on text alone." in notes[0]


@pytest.mark.parametrize("model_type", ANALYSED)
def test_every_type_is_loaded_by_name_and_gives_what_it_gives_in_memory(model_type: str, tmp_path: Path) -> None:
    model = built(model_type)
    ids = example_ids(model)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    stack = LayerStack(loaded.model)
    assert stack.num_layers == 2
    assert "vision" not in stack.path
    assert any("takes more than text" in note for note in loaded.notes) or model_type in WITHOUT_A_TOWER
    with torch.no_grad():
        assert torch.equal(stack.logits(ids), model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_cannot_do_without_an_image_says_so(model_type: str, tmp_path: Path) -> None:
    model = built(model_type)
    model.save_pretrained(tmp_path)
    with pytest.raises(DepthscopeError) as caught:
        analysed(tmp_path, torch.arange(24).view(2, 12) % VOCAB_SIZE)
    assert REFUSED[model_type] in str(caught.value)


def test_of_a_model_that_also_speaks_the_one_that_writes_is_analysed(tmp_path: Path) -> None:
    config = tiny_config(CONFIG_MAPPING["qwen2_5_omni"], 2)
    config.enable_audio_output = False
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config).eval()
    with pytest.raises(NoLayerStackError, match="no language-modelling head"):
        LayerStack(model)
    model.save_pretrained(tmp_path)
    ids = example_ids(model.thinker)
    assert analysed(tmp_path, ids).layers == analysed(model.thinker, ids).layers
