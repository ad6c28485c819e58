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

import torch
from torch import Tensor

from depthscope.scores.base import PerToken, Sums, Values, mean, ratio


class BlockInfluence(PerToken):
    """`1 - cos(h_in, h_out)` of each layer."""

    name = "block_influence"

    def read(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """The influence on each token."""
        # Half the squared distance of the unit vectors: 1 - cos without its cancellation, so an identity layer gives 0.
        return {"influence": _length(_unit(before) - _unit(after)).square() / 2}

    def finish(self, sums: Sums) -> Values:
        """Divide by the number of tokens."""
        influence = ratio(sums["influence"], sums["tokens"])
        return Values(scores={"block_influence": mean(influence)}, layers={"block_influence": influence})


class AngularDistance(PerToken):
    """The angle between a layer's input and output, over pi."""

    name = "angular_distance"

    def read(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """The angle at each token."""
        # Kahan's formula is exact for small angles, where arccos loses half of the digits.
        unit_before, unit_after = _unit(before), _unit(after)
        angle = 2 * torch.atan2(_length(unit_before - unit_after), _length(unit_before + unit_after))
        return {"angle": angle / math.pi}

    def finish(self, sums: Sums) -> Values:
        """Divide by the number of tokens."""
        angle = ratio(sums["angle"], sums["tokens"])
        return Values(scores={"angular_distance": mean(angle)}, layers={"angular_distance": angle})


class Update(PerToken):
    """The length of a layer's update relative to the stream, and its cosine with the stream."""

    name = "update"

    def read(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """Lengths and cosine at each token."""
        update = after - before
        return {
            "update_length": _length(update),
            "stream_length": _length(before),
            "cosine": (_unit(update) * _unit(before)).sum((-2, -1)),
        }

    def finish(self, sums: Sums) -> Values:
        """Divide."""
        norm, cosine = ratio(sums["update_length"], sums["stream_length"]), ratio(sums["cosine"], sums["tokens"])
        return Values(
            scores={"update_norm": mean(norm), "update_cosine": mean(cosine)},
            layers={"update_norm": norm, "update_cosine": cosine},
        )


def _length(streams: Tensor) -> Tensor:
    """The length of each token's streams, taken as one vector: [n, S, d] -> [n]."""
    return torch.linalg.vector_norm(streams, dim=(-2, -1))


def _unit(streams: Tensor) -> Tensor:
    """Streams [n, S, d] of length 1; those of zeros stay zero."""
    length = _length(streams)[:, None, None]
    return streams / torch.where(length == 0, 1.0, length)
