"""Times DepthLM against the architectures that it is made of, with the same weights, in one run.

    python benchmarks/models.py            # about ten minutes on one core
    python benchmarks/models.py --quick    # small shapes, about a minute

Training steps (forward, backward, AdamW) of the dense model against Llama, and of one with experts against OLMoE and
against its own eager experts; greedy decoding likewise. float32 on a CPU, bf16 autocast on a GPU. Both sides are first
shown to compute the same; OLMoE computes its load-balancing loss too.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from depthscope.models import DepthLMConfig, DepthLMForCausalLM, to_native
from paired import ratio, rounds

SHAPES: dict[str, dict[str, Any]] = {
    "dense": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "experts": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "qk_norm": "full",
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 128,
    },
}


class Duel:
    """Two models with the same weights, and what is timed on them."""

    def __init__(self, kind: str, device: torch.device, rows: int, length: int, new_tokens: int) -> None:
        torch.manual_seed(0)
        config = DepthLMConfig(**SHAPES[kind], max_position_embeddings=length + new_tokens)
        self.ours = DepthLMForCausalLM(config)
        self.native = to_native(self.ours)
        self.native.config.output_router_logits = kind == "experts"
        self.ours.to(device), self.native.to(device)
        self.ids = torch.randint(config.vocab_size, (rows, length), device=device)
        self.new_tokens = new_tokens
        self._require_equal()

    def sides(self, kind: str) -> dict[str, Callable[[], Any]]:
        """What to time, by name."""
        sides = {"DepthLM": partial(_step, self.ours, _optimizer(self.ours), self.ids)}
        sides[type(self.native).__name__] = partial(_step, self.native, _optimizer(self.native), self.ids)
        if kind == "experts":
            # A copy: the configuration holds the choice of implementation.
            eager = DepthLMForCausalLM._from_config(deepcopy(self.ours.config), experts_implementation="eager")
            eager.to(self.ids.device)
            sides["DepthLM, eager experts"] = partial(_step, eager, _optimizer(eager), self.ids)
        return sides

    def decoding(self) -> dict[str, Callable[[], Any]]:
        """Greedy decoding by either, by name."""
        prompt = self.ids[:1, :64]
        return {
            type(model).__name__: partial(_decode, model, prompt, self.new_tokens) for model in (self.ours, self.native)
        }

    def _require_equal(self) -> None:
        self.ours.eval(), self.native.eval()
        with torch.no_grad():
            difference = (self.ours(self.ids).logits - self.native(self.ids).logits).abs().max().item()
        assert difference < 1e-5, difference


def _optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6)


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model.train()
    with _autocast(ids.device):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _decode(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> Tensor:
    model.eval()
    return model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short sequences and few rounds")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = 3 if options.quick else options.rounds
    rows, length, new_tokens = (2, 64, 8) if options.quick else (8, 256, 32)
    table = Table("what", "side", "ms", "DepthLM / this (95%)", "target")
    for kind in SHAPES:
        duel = Duel(kind, device, rows, length, new_tokens)
        for what, sides in (("training step", duel.sides(kind)), ("decoding", duel.decoding())):
            taken = rounds(sides, count)
            names = list(sides)
            for name in names:
                against = str(ratio(taken[names[0]], taken[name])) if name != names[0] else ""
                target = (
                    "" if name == names[0] else "0.5" if "eager" in name else "1.0" if kind == "experts" else "1.03"
                )
                middle = 1000 * sorted(taken[name])[count // 2]
                table.add_row(f"{kind}, {what}", name, f"{middle:.1f}", against, target)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
