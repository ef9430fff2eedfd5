"""The container of a Glow's parameters: normflows' own modules, with a bounded coupling."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import normflows as nf
import torch
from torch import Tensor


class BoundedConvNet2d(nf.nets.ConvNet2d):
    """normflows' coupling network, with log-scales of ``bound * tanh(raw)``.

    With ``scale_map="exp"`` a coupling then multiplies by no more than e^bound either way.
    Decoding a latent off the data cannot blow up, as it does with sigmoid(s + 2).

    Args:
        channels: The channels of the input, of the two hidden activations and of the output.
        bound: The greatest absolute log-scale.
    """

    def __init__(self, channels: Sequence[int], bound: float) -> None:
        super().__init__(tuple(channels), (3, 1, 3), init_zeros=True)
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        """Compute shift and log-scale, alternating along the channels as normflows reads them."""
        shift, raw = self.net(x).unflatten(1, (-1, 2)).unbind(2)
        return torch.stack([shift, self.bound * torch.tanh(raw)], dim=2).flatten(1, 2)


def build_block(channels: int, hidden: int, bound: float) -> nf.flows.GlowBlock:
    """Build a GlowBlock of normflows with a bounded affine coupling."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # normflows still calls torch.lu, which is deprecated
        block = nf.flows.GlowBlock(channels, hidden, scale_map="exp")
    half = channels // 2
    block.flows[0].flows[1].param_map = BoundedConvNet2d((half, hidden, hidden, channels), bound)
    return block


def build_multiscale(
    channels: int, levels: int, steps: int, hidden: int, bound: float
) -> nf.MultiscaleFlow:
    """Build a multi-scale flow of normflows, coarsest level first.

    A level's prior has one mean and one scale per channel, the same for all pixels.

    Args:
        channels: The number of image channels.
        levels: The number of scales.
        steps: The number of steps in each scale.
        hidden: The number of hidden channels of each coupling network.
        bound: The greatest absolute log-scale of a coupling.
    """
    priors, flows, merges = [], [], []
    for depth in reversed(range(levels)):  # halvings before this level
        width = channels * 2 ** (depth + 2)
        blocks = [build_block(width, hidden, bound) for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        coarsest = depth == levels - 1
        priors.append(nf.distributions.GlowBase((width if coarsest else width // 2, 1, 1)))
        if not coarsest:
            merges.append(nf.flows.Merge())
    return nf.MultiscaleFlow(priors, flows, merges, class_cond=False)
