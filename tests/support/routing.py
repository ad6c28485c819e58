"""Which experts a model of any type really runs, and how sure its routers are: slow, obvious, without depthscope.

Experts are seen where they are called, with the numbers of the experts and their weights among the arguments. How a
router turns logits into scores is written down here by type, as the code of the type has it.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPERTS = 4  # as in the zoo
# Where the logits are in what a router returns; first in all others.
LOGITS_AT = {"llama4": 1, "llama4_text": 1, "doge": 1, "jetmoe": 4}
PROBABILITIES = ("gemma4", "gemma4_text")
NAMES_OF_SIGMOID = """
    afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note dots3_note_text exaone_moe flint
    glm4_moe glm4_moe_lite glm_moe_dsa hy_v3 hy_v4 inkling_text inkling2_text kimi_linear kolibri1 laguna lfm2_moe
    llama4 llama4_text mimo_v2_flash minimax_m2 minimax_m3_vl_text nemotron_h solar_open
"""
SIGMOID = NAMES_OF_SIGMOID.split()
ROOT_OF_SOFTPLUS = ("deepseek_v4",)
# Weights that say nothing of the scores: scaled by expert (Gemma 4), or sampled (PhiMoE).
OTHER_WEIGHTS = (*PROBABILITIES, "phimoe")

Run = tuple[Tensor, Tensor | None]  # which experts, and their weights [tokens, k]


def probabilities(model_type: str, logits: Tensor) -> Tensor:
    """What the router of a type makes of its logits, over the sum of each token."""
    if model_type in PROBABILITIES:
        return logits.double()
    if model_type == "doge":  # a pair of keys for each expert
        first, second = torch.softmax(logits.double(), -1)
        return torch.einsum("ti,tj->tij", first, second).flatten(1)
    if model_type in SIGMOID or model_type in ROOT_OF_SOFTPLUS:
        scores = torch.sigmoid(logits.double()) if model_type in SIGMOID else F.softplus(logits.double()).sqrt()
        return scores / scores.sum(-1, keepdim=True)
    return torch.softmax(logits.double(), -1)


def expert_metrics(model: nn.Module, layers: nn.ModuleList, ids: Tensor, model_type: str) -> dict[int, list[float]]:
    """The metrics of each layer that has experts, in the order of `EXPERT_METRICS`; a block at a time."""
    by_layer: dict[int, list[list[tuple[Tensor, Run]]]] = defaultdict(list)
    for block in ids:
        said, ran = _one_block(model, layers, block[None], model_type)
        assert {layer: len(each) for layer, each in said.items()} == {layer: len(each) for layer, each in ran.items()}
        for layer, each in said.items():
            by_layer[layer].append(
                [(probabilities(model_type, logits), run) for logits, run in zip(each, ran[layer], strict=True)]
            )
    return {layer: _metrics(model_type, list(zip(*blocks, strict=True))) for layer, blocks in by_layer.items()}


def _one_block(
    model: nn.Module, layers: nn.ModuleList, ids: Tensor, model_type: str
) -> tuple[dict[int, list[Tensor]], dict[int, list[Run]]]:
    """The logits of each layer's routers, and which experts were run."""
    said: dict[int, list[Tensor]] = defaultdict(list)
    ran: dict[int, list[Run]] = defaultdict(list)

    def keep_logits(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            logits = output[LOGITS_AT.get(model_type, 0)] if isinstance(output, tuple) else output
            said[layer].append(logits)
            if model_type in ("llama4", "llama4_text"):  # runs all experts on all tokens, most of them on zeros
                used = output[0] != 0
                ran[layer].append((used.nonzero()[:, 1].view(len(used), -1), output[0][used].view(len(used), -1)))
            if model_type == "jetmoe":  # tokens are sorted by expert, of which each has so many
                choice = torch.empty_like(output[0])
                choice[output[0]] = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(output[3]))
                ran[layer].append((choice.view(len(logits), -1), None))

        return hook

    def keep_run(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            for choice in [x.flatten(0, -2) for x in given if not x.is_floating_point()]:
                weights = [x for x in given if x.is_floating_point() and x.shape == choice.shape]
                ran[layer].append((choice, weights[0] if weights else None))

        return hook

    handles = []
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            kind = type(module).__name__
            if kind.endswith("Experts") or name.endswith("down_embed"):
                handles.append(module.register_forward_pre_hook(keep_run(index), with_kwargs=True))
            if kind.endswith(("Router", "Gating", "V1Gate")) or kind == "DogeCDMoE":
                handles.append(module.register_forward_hook(keep_logits(index)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return said, ran


def _metrics(model_type: str, routers: list[Any]) -> list[float]:
    relative, others = [], []
    for blocks in routers:
        p = torch.cat([each for each, _ in blocks])
        choice = torch.cat([choice for _, (choice, _) in blocks])
        weights = None if blocks[0][1][1] is None else torch.cat([weights for _, (_, weights) in blocks]).double()
        if model_type == "zaya":  # a choice without weight is that of no expert at all, the last
            choice = torch.where(weights == 0, EXPERTS, choice)
        chosen = p.gather(-1, choice)
        if weights is not None and choice.shape[1] > 1 and model_type not in OTHER_WEIGHTS:
            # The table above is right: experts are weighted in proportion to these probabilities.
            shares = [each / each.sum(-1, keepdim=True) for each in (weights, chosen)]
            torch.testing.assert_close(*shares, rtol=1e-3, atol=1e-4)
        load = np.bincount(choice.flatten().numpy(), minlength=EXPERTS)[:EXPERTS].astype(float)
        share = load / load.sum()
        relative.append(share * EXPERTS)
        spread = -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(EXPERTS)
        entropy = torch.special.entr(p).sum(-1).mean().item() / np.log(p.shape[-1])
        others.append([spread, chosen.sum(-1).mean().item(), p.amax(-1).mean().item(), entropy])
    loads, (spread, *rest) = np.concatenate(relative), np.mean(others, 0)
    return [loads.max(), loads.min(), spread, (loads < 0.01).mean(), *rest]
