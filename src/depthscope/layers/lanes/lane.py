"""One experiment, what passes a layer in several of them, and how much is done at once."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Lane", "Limits", "Step"]

# Tokens that go through a layer at once: on a CPU few enough to stay in its caches, elsewhere enough to fill it.
CHUNK_TOKENS = {"cpu": 2048, "elsewhere": 1 << 15}
# Residual streams of all lanes together; lanes beyond it take another pass.
STATE_BYTES = {"cpu": 512 << 20, "elsewhere": 4 << 30}
# Logits that are made at once.
LOGITS_BYTES = {"cpu": 128 << 20, "elsewhere": 1 << 30}


@dataclass(frozen=True, eq=False)
class Lane:
    """One experiment: the model with other modules in the places of some of its layers.

    Attributes:
        key: names the experiment.
        replacements: by layer, what stands there, as `LayerStack.replacing` takes it; at least one.
        rows: which sequences of the batch take part, [R] in rising order; None for all of them.
        logits: whether its logits are wanted.
        watched: whether its residual stream is wanted at the layers after its first.
    """

    key: Hashable
    replacements: Mapping[int, nn.Module]
    rows: Tensor | None = None
    logits: bool = False
    watched: bool = False

    @property
    def start(self) -> int:
        """The first layer that is changed."""
        return min(self.replacements)


@dataclass(frozen=True)
class Step:
    """What passes one layer in some lanes of all rows, and in the model itself.

    Attributes:
        lanes: the K lanes.
        layer: the layer, after the first changed layer of each lane.
        resid_pre: K residual streams before it, one after the other along the axis of the batch.
        resid_post: and after it.
        model_pre: the model's own residual stream before it.
        model_post: and after it.
    """

    lanes: Sequence[Lane]
    layer: int
    resid_pre: Tensor
    resid_post: Tensor
    model_pre: Tensor
    model_post: Tensor


@dataclass
class Limits:
    """How much is done at once.

    Attributes:
        chunk_tokens: how many tokens go through a layer at once; halved where memory runs out.
        logits_bytes: how large the logits may be that are made at once; halved where memory runs out.
        state_bytes: how large the residual streams of all lanes in one pass may be.
        halved: whether memory ran out, and less is done at once since.
    """

    chunk_tokens: int
    logits_bytes: int
    state_bytes: int
    halved: bool = False

    @classmethod
    def of(cls, device: str, *, offloaded: bool) -> "Limits":
        """Those of a type of device; less for a model that does not fit on it."""
        kind, share = ("cpu" if device == "cpu" else "elsewhere"), (2 if offloaded else 1)
        return cls(CHUNK_TOKENS[kind], LOGITS_BYTES[kind] // share, STATE_BYTES[kind] // share)

    def halve(self) -> None:
        """Do less at once, because memory ran out."""
        self.halved = True
        self.chunk_tokens //= 2
        self.logits_bytes //= 2
