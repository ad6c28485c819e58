"""Exact conversion of DepthLM to the architectures that other tools run, and back.

    native = to_native(model)      # a LlamaForCausalLM, Qwen3ForCausalLM, MixtralForCausalLM, ...
    model = to_depthlm(native)     # a DepthLMForCausalLM with the same logits

A conversion is exact (in float32 the logits differ only by rounding), or it is refused with the reason. LayerNorm
Scaling needs no support in the other architecture: the constant factor of a norm is folded into its weight.
"""

from transformers import CONFIG_MAPPING, PreTrainedModel

from depthscope.conversion.assemble import assemble
from depthscope.conversion.forms import FORMS, Form, State, exactly_scaled
from depthscope.conversion.sources import SOURCES
from depthscope.errors import ConversionError
from depthscope.models.configuration_depthlm import DepthLMConfig
from depthscope.models.modeling_depthlm import DepthLMForCausalLM

__all__ = ["to_depthlm", "to_native"]


def to_native(model: DepthLMForCausalLM, architecture: str | None = None) -> PreTrainedModel:
    """Convert a DepthLM to one of transformers' own architectures; `model` is not changed.

    Dense models become Llama, Mistral, Qwen2, Qwen3 or OLMo 2, models with experts Mixtral, OLMoE, Qwen3-MoE or
    Qwen2-MoE: the first of them that expresses the model exactly, or the one that `architecture` names by its
    `model_type`. LayerNorm Scaling is folded into the weights of the norms.

    Raises:
        ConversionError: no native architecture (or not the named one) expresses this model exactly; the message names
            the traits that each lacks.
    """
    if not isinstance(model, DepthLMForCausalLM):
        raise ConversionError(f"to_native takes a DepthLMForCausalLM, not a {type(model).__name__}.")
    config, state = model.config, model.state_dict()
    form = _choose(config, state, architecture)
    weights = form.weights(_with_factors_folded(config, state), config)
    return assemble(CONFIG_MAPPING[form.model_type](**form.settings(config)), weights, like=model)


def to_depthlm(model: PreTrainedModel) -> DepthLMForCausalLM:
    """Convert a model to a DepthLM; `model` is not changed.

    Takes Llama, Mistral, Qwen2, Qwen3, OLMo 2, Mixtral, OLMoE, Qwen3-MoE, and Qwen2-MoE without a gate on its shared
    expert.

    Raises:
        ConversionError: the model has another architecture, or a trait that DepthLM lacks.
    """
    if isinstance(model, DepthLMForCausalLM):
        return assemble(model.config, model.state_dict(), like=model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in SOURCES or not type(model).__name__.endswith("ForCausalLM"):
        raise ConversionError(
            f"A {type(model).__name__} ({model_type}) cannot be read as a DepthLM. Convert a causal language "
            f"model of {', '.join(SOURCES)}."
        )
    settings, weights = SOURCES[model_type](model.config, model.state_dict())
    return assemble(DepthLMConfig(**settings), weights, like=model)


def _choose(config: DepthLMConfig, state: State, architecture: str | None) -> Form:
    """The first form that expresses the model, of all forms or only the named one."""
    forms = [form for form in FORMS if architecture in (None, form.model_type)]
    if not forms:
        known = ", ".join(form.model_type for form in FORMS)
        raise ConversionError(
            f"{architecture!r} is not an architecture that DepthLM can be converted to; choose from {known}."
        )
    if architecture is None:
        forms = [form for form in forms if (form.experts != "none") == (config.num_experts is not None)]
    lacking = {form: form.lacks(config, state) for form in forms}
    for form, traits in lacking.items():
        if not traits:
            return form
    # Name the nearest forms only: those that lack the fewest traits, grouped by the traits.
    fewest = min(len(traits) for traits in lacking.values())
    nearest: dict[str, list[str]] = {}
    for form, traits in lacking.items():
        if len(traits) == fewest:
            nearest.setdefault(_enumerated(traits, "or"), []).append(form.title)
    reasons = [_enumerated(titles, "and") + " cannot have " + traits for traits, titles in nearest.items()]
    raise ConversionError(f"This DepthLM has no exact native form: {'; '.join(reasons)}.")


def _enumerated(items: list[str], word: str) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"


def _with_factors_folded(config: DepthLMConfig, state: State) -> State:
    """The weights with LayerNorm Scaling's factors folded into the norms."""
    folded = dict(state)
    for layer in range(config.num_hidden_layers):
        factor = config.norm_factor_of(layer)
        for norm in ("input_layernorm", "post_attention_layernorm") if factor != 1.0 else ():
            name = f"model.layers.{layer}.{norm}.weight"
            scaled = exactly_scaled(state[name], factor)
            if scaled is None:
                raise ConversionError(
                    f"LayerNorm Scaling's factors cannot be folded exactly into {state[name].dtype} weights: "
                    "convert in float32 (model.float(), or --dtype float32)."
                )
            folded[name] = scaled
    return folded
