"""Times DepthLM against the architectures that it is made of, with the same weights, in one run.

    python benchmarks/architectures.py            # about a quarter of an hour on one core
    python benchmarks/architectures.py --only dense
    python benchmarks/architectures.py --quick    # small shapes, some seconds: shows that it runs, not how fast
    python benchmarks/architectures.py --bf16     # training steps under bfloat16 autocast

Greedy decoding with a cache, and training steps (forward, backward, AdamW): the dense model against Llama, the one with
experts against OLMoE and, in training, against its own eager experts. Decoding is in float32 always. A ratio below 1
says that DepthLM takes less time.

In training DepthLM always has a load-balancing loss and a router z-loss. OLMoE has the first of them where
`output_router_logits` is set and never the second, so it is timed with and without.

Before anything is timed, both sides are shown to compute the same. The two sides of a comparison then take turns in
short rounds, in an order drawn anew for each; a machine whose speed drifts is the same machine for both of a round.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from depthscope.conversion import to_native
from depthscope.models import DepthLMConfig, DepthLMForCausalLM
from paired import ratio

SEED = 0
PROMPT = 64
DENSE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
# OLMoE's architecture.
EXPERTS: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "qk_norm": "full",
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 128,
}
# Twice as wide, experts too: 52 million parameters in two layers, of whose steps the experts are the largest part.
WIDER = {**EXPERTS, "hidden_size": 512, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}
SHAPES = {"dense": (DENSE, "llama"), "experts": (EXPERTS, "olmoe"), "wider experts": (WIDER, "olmoe")}


@dataclass(frozen=True)
class Effort:
    """How much is computed in one round, and how many rounds there are."""

    rows: int
    length: int
    new_tokens: int
    layers: int | None
    rounds: int


class Benchmark:
    """The comparisons, printed as the rows of a Markdown table."""

    def __init__(self, effort: Effort, device: torch.device, bf16: bool) -> None:
        self.effort, self.device, self.bf16 = effort, device, bf16
        self.chance = random.Random(SEED)

    def run(self, kinds: Iterable[str]) -> None:
        """Print the table, a row as soon as it is measured."""
        print("| what | DepthLM, ms | against | ms | ratio of medians | median ratio of a round (95%) | target |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for kind in kinds:
            self._compare(kind)

    def _compare(self, kind: str) -> None:
        ours, native, ids = self._models(kind)
        require_same_function(ours, native, ids, self.bf16)
        prompt = ids[:1, :PROMPT]
        # First, while the weights of both sides are still the same.
        sides = [partial(decode, model, prompt, self.effort.new_tokens) for model in (ours, native)]
        require_same_tokens(*(side() for side in sides), PROMPT + self.effort.new_tokens)
        self._add(f"{kind}, decoding {self.effort.new_tokens} tokens", *sides, type(native).__name__, "<= 1.03")

        steps = partial(training_step, ids=ids, bf16=self.bf16)
        what = f"{kind}, training step, {'bf16' if self.bf16 else 'fp32'}, {ids.numel()} tokens"
        step = partial(steps, ours, optimizer_of(ours))
        theirs = partial(steps, native, optimizer_of(native))
        if ours.config.num_experts is None:
            self._add(what, step, theirs, type(native).__name__, "<= 1.03")
            return
        # A configuration of its own, for it holds the implementation: shared, both sides would be eager.
        eager = DepthLMForCausalLM._from_config(deepcopy(ours.config), experts_implementation="eager").to(self.device)
        eager.load_state_dict(ours.state_dict())
        implementations = [model.config._experts_implementation for model in (ours, native, eager)]
        assert implementations == ["grouped_mm", "grouped_mm", "eager"], implementations
        require_same_training_loss(ours, eager, ids, self.bf16)
        name = type(native).__name__
        with_loss, without = (partial(theirs, output_router_logits=wanted) for wanted in (True, False))
        self._add(what, step, with_loss, f"{name}, with its load-balancing loss", "<= 1")
        self._add(what, step, without, f"{name}, without", "")
        self._add(what, step, partial(steps, eager, optimizer_of(eager)), "DepthLM, eager experts", "<= 0.5")

    def _models(self, kind: str) -> tuple[DepthLMForCausalLM, PreTrainedModel, Tensor]:
        """DepthLM, the native model with the same weights, and token ids."""
        torch.manual_seed(SEED)
        shape, architecture = SHAPES[kind]
        layers = self.effort.layers or shape["num_hidden_layers"]
        positions = max(self.effort.length, PROMPT + self.effort.new_tokens)
        config = DepthLMConfig(**{**shape, "num_hidden_layers": layers}, max_position_embeddings=positions)
        ours = DepthLMForCausalLM(config)
        native = to_native(ours, architecture)
        for model in (ours, native):
            model.to(self.device)
            model.generation_config.eos_token_id = None  # both decode to the end
        ids = torch.randint(config.vocab_size, (self.effort.rows, self.effort.length))
        return ours, native, ids.to(self.device)

    def _add(
        self, what: str, ours: Callable[[], object], theirs: Callable[[], object], against: str, target: str
    ) -> None:
        """Time two sides against each other and print the row."""
        sides, taken = [ours, theirs], ([], [])
        for side in sides:
            side()
        for _ in range(self.effort.rounds):
            for number in self.chance.sample(range(2), 2):
                taken[number].append(self._seconds(sides[number]))
        middle, other = (statistics.median(seconds) for seconds in taken)
        cells = (
            what,
            f"{1000 * middle:.1f}",
            against,
            f"{1000 * other:.1f}",
            f"{middle / other:.3f}",
            str(ratio(*taken, seed=SEED)),
            target,
        )
        print(f"| {' | '.join(cells)} |", flush=True)

    def _seconds(self, work: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1000
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


def optimizer_of(model: PreTrainedModel) -> torch.optim.Optimizer:
    # So small a rate that the experts chosen, and with them the work, stay what they are.
    return torch.optim.AdamW(model.parameters(), lr=1e-6)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def training_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: Tensor, bf16: bool, **options: bool
) -> None:
    """Forward, backward, AdamW."""
    model.train()
    with autocast(ids.device, bf16):
        loss = model(ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def decode(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> Tensor:
    """Greedy, with a cache: the prompt and what follows it."""
    model.eval()
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )


def require_same_function(ours: DepthLMForCausalLM, native: PreTrainedModel, ids: Tensor, bf16: bool) -> None:
    """Logits, losses and gradients of the two models, the router losses apart from the rest."""
    sides = []
    for model in (ours, native):
        output = model.eval()(ids, labels=ids, use_cache=False)
        output.loss.backward()
        norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm().item()
        model.zero_grad()
        sides.append((output.logits.detach(), output.loss.item(), norm))
    (logits, loss, norm), (other_logits, other_loss, other_norm) = sides
    torch.testing.assert_close(logits, other_logits, rtol=0, atol=1e-5)
    require_close("loss", loss, other_loss, 1e-6)
    require_close("norm of the gradient", norm, other_norm, 1e-5)
    if ours.config.num_experts is None:
        require_same_training_loss(ours, native, ids, bf16)
    else:
        require_router_losses(ours, native, ids, loss)


def require_router_losses(ours: DepthLMForCausalLM, native: PreTrainedModel, ids: Tensor, alone: float) -> None:
    """The loss that either has in training, as the router logits of the other say.

    They are not one number: DepthLM averages the balance of each layer, OLMoE takes that of all layers together.
    """
    config = ours.config
    balance = partial(load_balancing_loss_func, num_experts=config.num_experts, top_k=config.num_experts_per_tok)
    with torch.no_grad():
        one, other = (
            model.train()(ids, labels=ids, use_cache=False, output_router_logits=True) for model in (ours, native)
        )
        count = config.num_hidden_layers
        per_layer = sum(balance((layer,)).item() for layer in other.router_logits) / count
        z = sum(layer.logsumexp(-1).square().mean().item() for layer in other.router_logits) / count
        together = balance(tuple(one.router_logits)).item()
    expected = alone + config.router_aux_loss_coef * per_layer + config.router_z_loss_coef * z
    require_close("training loss of DepthLM", one.loss.item(), expected, 1e-5)
    expected = alone + config.router_aux_loss_coef * together
    require_close("training loss of the native model", other.loss.item(), expected, 1e-5)


def require_same_training_loss(one: PreTrainedModel, other: PreTrainedModel, ids: Tensor, bf16: bool) -> None:
    with torch.no_grad(), autocast(ids.device, bf16):
        losses = [model.train()(ids, labels=ids, use_cache=False).loss.item() for model in (one, other)]
    # bfloat16 has 8 significant bits, and experts of close rank may be chosen differently.
    require_close("training loss", *losses, 1e-2 if bf16 else 1e-6)


def require_same_tokens(one: Tensor, other: Tensor, length: int) -> None:
    if one.shape[1] != length or not torch.equal(one, other):
        sys.exit(f"The two sides do not decode the same {length} tokens: {one.tolist()} and {other.tolist()}.")


def require_close(what: str, one: float, other: float, relative: float) -> None:
    if not abs(one - other) <= relative * abs(other):
        sys.exit(f"The two sides differ in the {what}: {one!r} and {other!r}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--bf16", action="store_true", help="training steps under bfloat16 autocast")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (default: 20, with --quick 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=SHAPES, action="append", help="this shape alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    torch.set_num_threads(options.threads)
    on_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_cuda else "cpu")
    effort = (
        Effort(2, 64, 8, 2, options.rounds or 5) if options.quick else Effort(8, 256, 64, None, options.rounds or 20)
    )
    where = torch.cuda.get_device_name() if on_cuda else f"CPU, threads: {options.threads}"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}, rounds: {effort.rounds}\n")
    Benchmark(effort, device, options.bf16).run(options.only or SHAPES)


if __name__ == "__main__":
    main()
