"""How much every layer of a causal language model contributes, as a measurement of the `evaluate` library."""

import dataclasses
from typing import Any

# One import per line: evaluate's loader parses these lines itself and reads `import a, b` as one module.
import datasets
import evaluate

import depthscope
from depthscope.errors import SettingsError
from depthscope.text.choices import bos_choice
from depthscope.text.special_tokens import SpecialTokens

DESCRIPTION = """
Measures how much every layer of a causal language model contributes: the growth of the loss when the layer is left out
(skip ratio) or replaced by its best affine map (usefulness), how much later layers depend on it (causal score), the
cost of swapping layers (permutation score), the distance of its Jacobian from the identity, and the variance of the
residual stream. Layers count from 0, losses are in nats per token.
"""

INPUTS = """
Args:
    data (list of str): the texts to measure on. The first two thirds of the tokens fit linear maps, the rest is scored.
    model: an id on the Hub, a folder, a .gguf file, a PEFT adapter folder, or a loaded model.
    model_id (str): the same as `model`, under the name in the perplexity measurement.
    tokenizer: the tokenizer of a loaded model.
    block_size (int): tokens in a block; 128 by default.
    bos (str): whether each block begins with the beginning-of-sequence token: "yes", "no" or "auto", as the tokenizer
        does by default.
    fit_blocks, eval_blocks (int): blocks to fit on and blocks to score; by default, all blocks of the texts.
    scores (str): scores to compute, separated by commas; "all" by default. `depthscope scores` explains them.
    revision, dtype, device, trust_remote_code: how a model is loaded; no code of its repository runs by default.
    **options: further settings of depthscope.analyze: pairs, probes, threshold, ridge, batch_size, seed, ...

model, tokenizer and options may also be given to evaluate.load, so that several measurements can be combined.

Returns:
    A dictionary of numbers (global scores; <name>_se is the standard error over blocks) and of lists with one number
    per layer, under layer_<name>; None if a score is undefined. num_layers and tokens are the size of the measurement.

Examples:
    >>> layers = evaluate.load("layer_effectiveness_measurement")
    >>> scores = layers.compute(data=texts, model="HuggingFaceTB/SmolLM2-135M", scores="variance,skip")
    >>> scores["skip_ratio"], scores["layer_skip_ratio"][0]
"""

CITATION = """
@inproceedings{muhtar2026sparsity,
    title = {When Does Sparsity Mitigate the Curse of Depth in LLMs},
    author = {Muhtar, Dilxat and Song, Xinyuan and Pokutta, Sebastian and Zimmer, Max and Pelleriti, Nico and
              Hofmann, Thomas and Liu, Shiwei},
    booktitle = {International Conference on Machine Learning},
    year = {2026},
    url = {https://arxiv.org/abs/2603.15389},
}
"""

BLOCK_SIZE = 128
LOADING = ("revision", "dtype", "device", "trust_remote_code")
# The options that evaluate.load also accepts; its own `seed` belongs to evaluate.
OPTIONS = {
    "model",
    "model_id",
    "tokenizer",
    *LOADING,
    *(field.name for field in dataclasses.fields(depthscope.Settings)),
}
OPTIONS -= {"seed"}


class LayerEffectiveness(evaluate.Measurement):
    """How much every layer of a causal language model contributes."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        self.given = {name: named.pop(name) for name in OPTIONS & named.keys()}
        super().__init__(*positional, **named)

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"data": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2603.15389"],
        )

    def _compute(self, data: list[str], **options: Any) -> dict[str, Any]:
        options = {**self.given, **options}
        model, tokenizer = options.pop("model", None), options.pop("tokenizer", None)
        model_id = options.pop("model_id", None)
        model = model if model is not None else model_id
        if model is None:
            raise SettingsError("No model was given; pass model= here or to evaluate.load.")
        loading = {name: options.pop(name) for name in LOADING if name in options}
        if isinstance(model, str):
            loaded = depthscope.load_model(model, **loading)
            model, tokenizer = loaded.model, tokenizer or loaded.require_tokenizer()
        settings = _settings(data, tokenizer, options)
        blocks = depthscope.load_blocks(
            # As a dataset, because a list of texts that are also file names would be read as those files.
            datasets.Dataset.from_dict({"text": list(data)}),
            tokenizer,
            num_blocks=settings.fit_blocks + settings.eval_blocks,
            block_size=settings.block_size,
            bos=settings.bos,
            name="data",
        )
        return flat(depthscope.analyze(model, tokenizer, blocks=blocks, settings=settings))


def _settings(data: list[str], tokenizer: Any, options: dict[str, Any]) -> depthscope.Settings:
    """The settings; missing numbers of blocks are those of the texts."""
    size = options.pop("block_size", BLOCK_SIZE)
    fit, measured = options.pop("fit_blocks", None), options.pop("eval_blocks", None)
    if tokenizer is not None and (fit is None or measured is None):
        own = size - len(SpecialTokens.of(tokenizer).start(bos_choice(options.get("bos", "auto"))))
        tokens = sum(len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in data)
        held = tokens // max(1, own)
        measured = measured or max(1, (held - fit if fit is not None else held // 3))
        fit = fit if fit is not None else max(1, held - measured)
    try:
        return depthscope.Settings(fit_blocks=fit or 1, eval_blocks=measured or 1, block_size=size, **options)
    except TypeError as error:
        raise SettingsError(f"{', '.join(options)}: some of these are not options ({error}).") from error


def flat(report: depthscope.LayerReport) -> dict[str, Any]:
    """A report as numbers and lists of numbers per layer."""
    found: dict[str, Any] = {name: value for name, value in report.scores.items() if value is not None}
    found |= {f"layer_{name}": report.column(name) for name in report.layer_scores}
    return {**found, "num_layers": len(report.layers), "tokens": report.data["tokens"]}
