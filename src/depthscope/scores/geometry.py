"""How far each layer moves the residual stream: direction, angle and length of its update.

For a token, with `h` the stream before the layer, `u` the layer's update and `h + u` the stream after it (all streams
of a token taken as one vector):

    block influence    1 - cos(h, h + u)                            mean over tokens    (ShortGPT, arXiv 2403.03853)
    angular distance   arccos(cos(h, h + u)) / pi                   mean over tokens    (arXiv 2403.17887)
    update norm        sum over tokens ||u|| / sum over tokens ||h||
    update cosine      cos(u, h)                                    mean over tokens

No units; influence in [0, 2], angle in [0, 1], cosine in [-1, 1].
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from depthscope.layers.precision import wide
from depthscope.scores.base import Batch, Score, Sums, Values, mean, ratio


class _Geometry(Score):
    """Scores that are a sum over tokens of something read off the stream before and after a layer, over another sum."""

    def measure(self, batch: Batch, tick: Callable[[float], None]) -> None:
        """Add the batch's sums, read off its baseline pass."""
        for layer in range(self.stack.num_layers):
            before = wide(self.stack.flat(batch.resid_pre[layer]))  # [B, T, S * d]
            after = wide(self.stack.flat(batch.resid_post[layer]))
            for name, per_token in self.read(before, after).items():
                self.table(name, self.stack.num_layers)[batch.rows, layer] = batch.masked_sum(per_token)

    def read(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """What to sum over tokens, [B, T] each."""
        raise NotImplementedError


class BlockInfluence(_Geometry):
    """`1 - cos(h_in, h_out)` of each layer."""

    name = "block_influence"

    def read(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """The influence on each token."""
        # Half the squared distance of the unit vectors: 1 - cos without its cancellation, so an identity layer gives 0.
        return {
            "influence": (_unit(before) - _unit(after)).square().sum(-1) / 2,
            "tokens": torch.ones_like(before[..., 0]),
        }

    def finish(self, sums: Sums) -> Values:
        """Divide by the number of tokens."""
        influence = ratio(sums["influence"], sums["tokens"])
        return Values(scores={"block_influence": mean(influence)}, layers={"block_influence": influence})


class AngularDistance(_Geometry):
    """The angle between a layer's input and output, over pi."""

    name = "angular_distance"

    def read(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """The angle at each token."""
        # Kahan's formula is exact for small angles, where arccos loses half of the digits.
        unit_before, unit_after = _unit(before), _unit(after)
        angle = 2 * torch.atan2((unit_before - unit_after).norm(dim=-1), (unit_before + unit_after).norm(dim=-1))
        return {"angle": angle / math.pi, "tokens": torch.ones_like(before[..., 0])}

    def finish(self, sums: Sums) -> Values:
        """Divide by the number of tokens."""
        angle = ratio(sums["angle"], sums["tokens"])
        return Values(scores={"angular_distance": mean(angle)}, layers={"angular_distance": angle})


class Update(_Geometry):
    """The length of a layer's update relative to the stream, and its cosine with the stream."""

    name = "update"

    def read(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """Lengths and cosine at each token."""
        update = after - before
        return {
            "update_length": update.norm(dim=-1),
            "stream_length": before.norm(dim=-1),
            "cosine": (_unit(update) * _unit(before)).sum(-1),
            "tokens": torch.ones_like(before[..., 0]),
        }

    def finish(self, sums: Sums) -> Values:
        """Divide."""
        norm, cosine = ratio(sums["update_length"], sums["stream_length"]), ratio(sums["cosine"], sums["tokens"])
        return Values(
            scores={"update_norm": mean(norm), "update_cosine": mean(cosine)},
            layers={"update_norm": norm, "update_cosine": cosine},
        )


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1; a zero vector stays zero."""
    length = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(length == 0, 1.0, length)
