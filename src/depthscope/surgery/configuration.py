"""The configuration of a cut model: read as the layers that it keeps, and chosen by building the model on no memory."""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from depthscope.errors import SurgeryError
from depthscope.surgery.kept import KEPT_LAYERS, composed
from depthscope.surgery.rules import Settings
from depthscope.surgery.settings import Readings, read_settings
from depthscope.surgery.structure import LayerFacts, differences, facts_of, kinds_that_differ
from depthscope.wording.messages import listed, one_line, ranges

__all__ = ["build_cut"]


def build_cut(model: PreTrainedModel, layers: nn.ModuleList, path: str, kept: Sequence[int]) -> Any:
    """A model, without values in its weights, that is configured to have only the kept layers of `model`.

    Args:
        model: the model.
        layers: its layers.
        path: the name of the list of layers in a model of its class.
        kept: the layers to keep.

    Raises:
        SurgeryError: a setting cannot be said of the kept layers; the message names it.
    """
    config: Any = model.config
    place = _place_of_text(config)
    settings = config.to_dict()
    settings.pop("quantization_config", None)  # of a file that was unpacked; weights that still are codes are refused
    text = _at(settings, place)
    count = _at_config(config, place).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    readings = read_settings(text, count, kept, len(layers))
    readings.settings[KEPT_LAYERS] = composed(config, kept, len(layers))
    _require_images_in_place(settings, kept)
    wanted = [facts_of(layers[layer]) for layer in kept]
    built = _Search(model, path, kept, wanted, settings, place).best(readings)
    if len(built.get_submodule(path)) != len(kept):
        raise SurgeryError(
            f"{count} of the configuration is {text.get(count)}, and the model has {len(layers)} layers in {path!r}: "
            "layers were taken out or put in since it was built, or other settings make their number. Save the model "
            "so that it loads again, or load it anew, and cut that."
        )
    found = differences(wanted, [facts_of(layer) for layer in built.get_submodule(path)], kept)
    if other := kinds_that_differ(found):
        raise SurgeryError(
            f"{type(model).__name__} with layers {ranges(kept)} alone would see other tokens in them: {listed(other)}. "
            f"{type(config).__name__} has no settings for these layers in this order; keep other layers."
        )
    return built


def _build(config: PreTrainedConfig, like: PreTrainedModel, device: str) -> Any:
    """A model of the class of `like`, its weights as memory happens to be, or on `meta`."""
    with no_init_weights(), torch.device(device):
        return type(like)._from_config(
            deepcopy(config), dtype=like.dtype, attn_implementation=like.config._attn_implementation
        )


class _Search:
    """Builds models of several readings of the settings, until one has the layers that are wanted."""

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        kept: Sequence[int],
        wanted: Sequence[LayerFacts],
        settings: Settings,
        place: Sequence[str],
    ) -> None:
        self.model, self.path, self.kept, self.wanted = model, path, kept, wanted
        self.settings, self.place = settings, place
        self.failure: Exception | None = None  # of the likeliest reading
        self.overruled: list[str] = []  # settings of which the class has an opinion of its own

    def best(self, readings: Readings) -> Any:
        """The model of the likeliest configuration; others are tried only where it has other layers than are wanted."""
        chosen = dict(readings.settings)
        built, wrong = self.tried(chosen, "cpu")
        if not wrong and built is not None:
            return built
        fewest = math.inf if built is None else wrong
        for name, value in ((name, value) for name, values in readings.others.items() for value in values):
            if fewest == 0:
                break
            tried, wrong = self.tried({**chosen, name: value}, "meta")
            if tried is not None and wrong < fewest:
                chosen, fewest = {**chosen, name: value}, wrong
        if math.isinf(fewest):
            raise SurgeryError(self.refusal(readings.settings)) from self.failure
        return built if chosen == readings.settings else _build(self.configuration(chosen), self.model, "cpu")

    def refusal(self, text: Settings) -> str:
        before = _at(self.settings, self.place)
        changed = sorted(name for name in text if text[name] != before.get(name) and name != KEPT_LAYERS)
        why = f"{type(self.failure).__name__}: {one_line(self.failure)}" if self.failure else "no reason given."
        own = f" Of itself it changes {', '.join(self.overruled)}." if self.overruled else ""
        return (
            f"{type(self.model).__name__} cannot be built with layers {ranges(self.kept)} alone, described by "
            f"{', '.join(changed)} ({why}).{own} Keep other layers."
        )

    def tried(self, text: Settings, device: str) -> tuple[Any, int]:
        """A model of these settings, None where its class refuses them; and in how many respects its layers differ."""
        try:
            config = self.configuration(text)
            if self.failure is None and not self.overruled:
                self.overruled = _overruled(text, _at(config.to_dict(), self.place))
            built: Any = _build(config, self.model, device)
            layers = built.get_submodule(self.path)
        except Exception as error:  # whatever a class raises where settings do not go together
            self.failure = self.failure or error
            return None, 0
        return built, len(differences(self.wanted, [facts_of(layer) for layer in layers], self.kept))

    def configuration(self, text: Settings) -> PreTrainedConfig:
        """The whole configuration with these settings of the language model."""
        settings = deepcopy(self.settings)
        if not self.place:
            settings = deepcopy(text)
        else:
            _at(settings, self.place[:-1])[self.place[-1]] = deepcopy(text)
        return type(self.model.config).from_dict(settings)


def _overruled(given: Settings, taken: Settings) -> list[str]:
    """The lists of a value for each layer that the class of the configuration did not take as they were given."""
    return sorted(
        name for name, value in given.items() if isinstance(value, list) and taken.get(name, value) != value and value
    )


def _require_images_in_place(settings: Any, kept: Sequence[int]) -> None:
    """Refuse a cut among layers that get features of an image each, which text alone would not show."""
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if "deepstack" in str(name) and value:
            number = len(value) if name == "deepstack_visual_indexes" else None
            if number is None or list(kept[:number]) != list(range(number)):
                these = f"the first {number} layers" if number else "layers that it names"
                raise SurgeryError(
                    f"{name}: {these} get features of an image each, by their numbers, and would get those of others. "
                    + (f"Keep layers 0 to {number - 1}." if number else "Such a model cannot be cut yet.")
                )
        _require_images_in_place(value, kept)


def _place_of_text(config: Any) -> tuple[str, ...]:
    """The names that lead from a configuration to that of its language model; none where it is that itself."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return ()
    for name, value in vars(config).items():
        if value is text:
            return (name,)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and value.get_text_config(decoder=True) is text:
            return (name, *_place_of_text(value))
    return ()


def _at(settings: Settings, place: Sequence[str]) -> Settings:
    for name in place:
        settings = settings[name]
    return settings


def _at_config(config: Any, place: Sequence[str]) -> Any:
    for name in place:
        config = getattr(config, name)
    return config
