"""GPU models: their peak speed and their memory."""

from dataclasses import dataclass

from depthscope.errors import SettingsError

__all__ = ["GPUS", "Gpu", "find_gpu"]


@dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        name: its name for people.
        peak: dense bfloat16 operations per second, with sums in float32; data sheets often print twice that, for
            matrices that are half zeros.
        memory: memory in bytes.
    """

    name: str
    peak: float
    memory: float


# From the makers' data sheets (NVIDIA A100, H100, H200, DGX B200, L40S; AMD Instinct MI300X) and, for the RTX cards,
# NVIDIA's white papers on the Ampere GA102 and Ada architectures.
GPUS: dict[str, Gpu] = {
    "a100": Gpu("A100 80 GB", 312e12, 80e9),
    "h100": Gpu("H100 SXM", 989e12, 80e9),
    "h200": Gpu("H200", 989e12, 141e9),
    "b200": Gpu("B200", 2250e12, 180e9),
    "l40s": Gpu("L40S", 362e12, 48e9),
    "mi300x": Gpu("MI300X", 1307e12, 192e9),
    "rtx3090": Gpu("RTX 3090", 71e12, 24e9),
    "rtx4090": Gpu("RTX 4090", 165e12, 24e9),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, which may be written in several ways.

    Raises:
        SettingsError: the GPU is unknown; the message lists the known ones.
    """
    key = "".join(char for char in str(name).casefold() if char.isalnum())
    if key not in GPUS:
        raise SettingsError(f"gpu is {name!r}; give one of {', '.join(GPUS)}.")
    return GPUS[key]
