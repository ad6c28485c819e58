"""A model that is larger than the memory: the time, the memory and what is read, beside the same with it in memory.

    python benchmarks/offload.py                    # 6 GiB of random weights, a limit of 2 GiB: about 20 minutes
    python benchmarks/offload.py --gib 0.2          # a quick look
    python benchmarks/offload.py --before /tmp/before/src      # and accelerate's disk offload with another source tree

A random checkpoint of Llama's type in bfloat16 is written to --folder (and kept there for the next time). Each way runs
in a process of its own. The limit is a control group where one can be made (Linux, as root), else RLIMIT_DATA. Read
means the bytes of the checkpoint that safetensors is asked for while an analysis runs, over the size of the layers.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1] / "src"
CONTROL = Path("/sys/fs/cgroup")
WIDTH, INNER, VOCABULARY = 1024, 24576, 32000
LAYER = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH)  # bytes
SCORES = "variance,block_influence,skip,usefulness"
COMPARED = ("variance", "skip_ratio", "usefulness_ratio")
OFFLOADED, IN_MEMORY, ACCELERATE = "offloaded", "in memory", "accelerate's disk offload"


def write_checkpoint(folder: Path, gib: float) -> None:
    """Write random weights, a layer a file."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layers = max(2, round((gib * 2**30 - 4 * WIDTH * VOCABULARY) / LAYER))
    generator, index = torch.Generator().manual_seed(0), {}

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    folder.mkdir(parents=True)
    ends = {"model.embed_tokens.weight": random(VOCABULARY, WIDTH), "lm_head.weight": random(VOCABULARY, WIDTH)}
    write("ends.safetensors", {**ends, "model.norm.weight": torch.ones(WIDTH).bfloat16()})
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}self_attn.{name}_proj.weight": random(WIDTH, WIDTH) for name in "qkvo"}
        tensors |= {f"{prefix}mlp.{name}_proj.weight": random(INNER, WIDTH) for name in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = random(WIDTH, INNER)
        norms = (f"{prefix}{name}_layernorm.weight" for name in ("input", "post_attention"))
        write(f"layer-{layer:03d}.safetensors", {**tensors, **{name: torch.ones(WIDTH).bfloat16() for name in norms}})
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    # The index last: without it there is no checkpoint.
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def analyse(folder: Path, way: str, tokens: int, fit_blocks: int) -> dict[str, Any]:
    """One analysis in this process."""
    import accelerate.utils.offload as fetching
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from depthscope import analyze

    read = 0

    class Counting:
        """Counts what is asked of a file."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> "Counting":
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def get_tensor(self, name: str) -> torch.Tensor:
            nonlocal read
            tensor = self.file.get_tensor(name)
            read += tensor.nbytes
            return tensor

    fetching.safe_open = Counting
    blocks = torch.randint(VOCABULARY, (fit_blocks + 1, tokens), generator=torch.Generator().manual_seed(1))
    settings = {"blocks": blocks, "fit_blocks": fit_blocks, "eval_blocks": 1, "scores": SCORES, "progress": False}
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    begun = time.perf_counter()
    if way == ACCELERATE:
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{layer}": "disk" for layer in range(layers)}
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map=places, offload_folder=folder / "offload", dtype=torch.float32
        )
        report = analyze(model, **settings)
    else:
        more = {"offload": True} if way == OFFLOADED else {}
        report = analyze(folder, device="cpu", **settings, **more)
    return {
        "seconds": time.perf_counter() - begun,
        "processor": sum(os.times()[:2]),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "read": read / (LAYER * layers),
        "layers": [
            {name: row[name] for name in ("variance", "skip_ratio", "usefulness_ratio")} for row in report.layers
        ],
    }


def limited(gib: float) -> Any:
    """What limits the memory of a process that is about to start, and by which means."""
    memory = CONTROL / "memory" if (CONTROL / "memory").is_dir() else CONTROL
    group = memory / "depthscope-benchmark"
    name = "memory.limit_in_bytes" if memory != CONTROL else "memory.max"
    try:
        group.mkdir(exist_ok=True)
        (group / name).write_text(str(int(gib * 2**30)))
    except OSError:
        limit = int(gib * 2**30)
        return lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)), "RLIMIT_DATA"
    return lambda: (group / "cgroup.procs").write_text(str(os.getpid())), "a control group"


def measure(way: str, source: Path, given: argparse.Namespace, limit: Any = None) -> dict[str, Any]:
    """One analysis in a process of its own."""
    command = [sys.executable, __file__, "--run", way, "--folder", str(given.folder), "--tokens", str(given.tokens)]
    command += ["--fit-blocks", str(given.fit_blocks)]
    environment = {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, preexec_fn=limit, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{way} ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run each way and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gib", type=float, default=6, help="size of the checkpoint")
    parser.add_argument("--limit", type=float, default=2, help="GiB of memory for the offloaded model")
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint lies or is written")
    parser.add_argument("--tokens", type=int, default=64, help="in a block")
    parser.add_argument("--fit-blocks", type=int, default=17, help="that fit the linear maps")
    parser.add_argument("--before", type=Path, help="another source tree, its folder src, for accelerate's way")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        print(json.dumps(analyse(given.folder, given.run, given.tokens, given.fit_blocks)))
        return
    given.folder = given.folder or Path(f"/tmp/depthscope-random-{given.gib}")
    if not (given.folder / "model.safetensors.index.json").exists():
        write_checkpoint(given.folder, given.gib)
    limit, means = limited(given.limit)
    results = {OFFLOADED: measure(OFFLOADED, HERE, given, limit), IN_MEMORY: measure(IN_MEMORY, HERE, given)}
    if given.before:
        results[ACCELERATE] = measure(ACCELERATE, given.before.resolve(), given)
    print(f"{given.gib} GiB in bfloat16; {OFFLOADED}: at most {given.limit} GiB by {means}\n")
    print("| way | seconds | of in memory | processor seconds | peak memory, GiB | read, times the layers |")
    print("| --- | --- | --- | --- | --- | --- |")
    for way, result in results.items():
        ratio = result["seconds"] / results[IN_MEMORY]["seconds"]
        row = [
            f"{result['seconds']:.0f}",
            f"{ratio:.2f}",
            f"{result['processor']:.0f}",
            f"{result['peak'] / 2**30:.2f}",
        ]
        print("| " + " | ".join([way, *row, f"{result['read']:.2f}"]) + " |")
    for way, result in results.items():
        if way != IN_MEMORY:
            pairs = zip(result["layers"], results[IN_MEMORY]["layers"], strict=True)
            worst = max(abs(one[name] / other[name] - 1) for one, other in pairs for name in one)
            print(f"\nLargest relative difference of {way} from in memory: {worst:.1e}")


if __name__ == "__main__":
    main()
