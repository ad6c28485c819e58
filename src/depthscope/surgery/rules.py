"""Settings whose meaning for single layers no general reading finds, by the names that architectures give them.

Each rule returns the settings that say the same of the kept layers, renumbered, or refuses and names the setting.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from depthscope.errors import SurgeryError
from depthscope.surgery.rewrites import zamba2_blocks
from depthscope.wording.messages import ranges

__all__ = ["FROM_THE_END", "FROM_THE_START", "RULES", "Rule", "Settings"]

Settings = dict[str, Any]
Rule = Callable[[Mapping[str, Any], Sequence[int], int], Settings]

# Numbers of layers counted from the first one, or from the last one.
FROM_THE_START = ("first_k_dense_replace", "num_dense_layers", "num_hash_layers")
FROM_THE_END = ("num_kv_shared_layers",)


def _every_nth(period: str, offset: str) -> Rule:
    """Layers l with l % period == offset (Jamba): the kept ones must lie like that again."""

    def rule(settings: Mapping[str, Any], kept: Sequence[int], num_layers: int) -> Settings:
        chosen = [place for place, layer in enumerate(kept) if layer % settings[period] == settings[offset]]
        for step in range(1, len(kept) + 2):
            for first in range(step):
                if list(range(first, len(kept), step)) == chosen:
                    return {period: step, offset: first}
        raise _unexpressed(f"{period} and {offset}", chosen, "every n-th layer")

    return rule


def _sparse_steps(settings: Mapping[str, Any], kept: Sequence[int], num_layers: int) -> Settings:
    """The MoE layers of Qwen: every n-th, but those that are listed as dense; with n = 1 the list alone decides."""
    step, dense = settings["decoder_sparse_step"], settings.get("mlp_only_layers") or []
    if not step or "mlp_only_layers" not in settings:
        return {}
    listed = [place for place, layer in enumerate(kept) if layer in dense or (layer + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": listed}


def _moe_interval(settings: Mapping[str, Any], kept: Sequence[int], num_layers: int) -> Settings:
    """The MoE layers of ERNIE: every n-th of a range, (l + 1) % n == 0."""
    start, end, interval = (settings[f"moe_layer_{name}"] for name in ("start_index", "end_index", "interval"))
    end = num_layers - 1 if end == -1 else end
    chosen = [p for p, layer in enumerate(kept) if start <= layer <= end and (layer + 1) % interval == 0]
    first, last = (chosen[0], chosen[-1]) if chosen else (len(kept), len(kept))
    for step in range(1, len(kept) + 2):
        if [place for place in range(len(kept)) if first <= place <= last and (place + 1) % step == 0] == chosen:
            return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": step}
    raise _unexpressed("moe_layer_start_index, moe_layer_end_index and moe_layer_interval", chosen, "every n-th layer")


def _attention_types(settings: Mapping[str, Any], kept: Sequence[int], num_layers: int) -> Settings:
    """GPT-Neo's kinds, written as repeated groups; the list of all layers stands beside it."""
    kinds = [kind for group, times in settings["attention_types"] for _ in range(times) for kind in group]
    return {"attention_types": [[[kinds[layer]], 1] for layer in kept], "attention_layers": [kinds[x] for x in kept]}


def _depth_in_the_scale(settings: Mapping[str, Any], kept: Sequence[int], num_layers: int) -> Settings:
    """MiniCPM's factor on each update, scale_depth / sqrt(number of layers), must stay what it was."""
    scale = settings["scale_depth"]
    return {} if scale is None else {"scale_depth": scale * (len(kept) / num_layers) ** 0.5}


def _shared_blocks(settings: Mapping[str, Any], kept: Sequence[int], num_layers: int) -> Settings:
    """Zamba 2's hybrid layers take turns with the shared blocks; out of turn, each gets a block of its own."""
    kinds = settings["layers_block_type"]
    hybrid = [place for place, layer in enumerate(kept) if kinds[layer] == "hybrid"]
    return {"hybrid_layer_ids": hybrid, "num_mem_blocks": zamba2_blocks(settings["num_mem_blocks"], kinds, kept)}


def _no_rescaling(settings: Mapping[str, Any], kept: Sequence[int], num_layers: int) -> Settings:
    """RWKV halves the stream at every n-th layer, and once it has run, the weights in memory with it."""
    if settings["rescale_every"] > 0:
        raise SurgeryError(
            f"rescale_every is {settings['rescale_every']}: the stream and the weights are halved by the numbers of "
            "the layers, which a cut changes. Load the model with rescale_every=0, which computes the same outside of "
            "float16, and cut that."
        )
    return {}


def _depthlm(settings: Mapping[str, Any], kept: Sequence[int], num_layers: int) -> Settings:
    """DepthLM's Post-LN layers come first (Mix-LN); its layers with experts are listed, or every n-th."""
    changed: Settings = {}
    if settings["norm_placement"] == "mix":
        post = sum(layer < settings["mix_post_layers"] for layer in kept)
        changed["mix_post_layers"] = post if 0 < post < len(kept) else None
        if changed["mix_post_layers"] is None:
            changed["norm_placement"] = "post" if post else "pre"
    step = settings["moe_layers"]
    if settings["num_experts"] is not None and step != "all":
        listed = range(step - 1, num_layers, step) if isinstance(step, int) else step
        places = [place for place, layer in enumerate(kept) if layer in listed]
        changed["moe_layers"] = places if places else "all"
        if not places:
            sizes = ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size")
            changed |= dict.fromkeys(sizes)
    return changed


# By the setting that a rule begins with.
RULES: dict[str, Rule] = {
    "attention_types": _attention_types,
    "attn_layer_period": _every_nth("attn_layer_period", "attn_layer_offset"),
    "decoder_sparse_step": _sparse_steps,
    "expert_layer_period": _every_nth("expert_layer_period", "expert_layer_offset"),
    "moe_layer_interval": _moe_interval,
    "norm_placement": _depthlm,
    "num_mem_blocks": _shared_blocks,
    "rescale_every": _no_rescaling,
    "scale_depth": _depth_in_the_scale,
}


def _unexpressed(names: str, chosen: Sequence[int], form: str) -> SurgeryError:
    return SurgeryError(
        f"{names} cannot say which layers of the cut model they are meant for ({ranges(chosen)}): these settings can "
        f"name {form} only. Keep layers that lie so."
    )
