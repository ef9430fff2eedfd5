"""The container of a Glow's parameters: normflows' own modules, with a bounded coupling."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import normflows as nf
import torch
from torch import Tensor


class BoundedConvNet2d(nf.nets.ConvNet2d):
    """The coupling network of normflows with its log-scale outputs bounded by ``bound * tanh``.

    With ``scale_map="exp"`` a coupling then multiplies by no more than e^bound either way, so
    that decoding a latent off the data cannot blow up as it does with sigmoid(s + 2).
    """

    def __init__(self, channels: Sequence[int], bound: float) -> None:
        super().__init__(tuple(channels), (3, 1, 3), init_zeros=True)
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        """Shift and bounded log-scale, alternating along the channels as normflows reads them."""
        shift, raw = self.net(x).unflatten(1, (-1, 2)).unbind(2)
        return torch.stack([shift, self.bound * torch.tanh(raw)], dim=2).flatten(1, 2)


def glow_block(channels: int, hidden: int, bound: float) -> nf.flows.GlowBlock:
    """A GlowBlock of normflows with a bounded affine coupling."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # normflows still calls torch.lu, which is deprecated
        block = nf.flows.GlowBlock(channels, hidden, scale_map="exp")
    half = channels // 2
    block.flows[0].flows[1].param_map = BoundedConvNet2d((half, hidden, hidden, channels), bound)
    return block


def multiscale_glow(
    channels: int, levels: int, steps: int, hidden: int, bound: float
) -> nf.MultiscaleFlow:
    """A multi-scale flow of normflows: coarsest level first, priors over one pixel's channels."""
    priors, flows, merges = [], [], []
    for depth in reversed(range(levels)):  # halvings before this level
        width = channels * 2 ** (depth + 2)
        blocks = [glow_block(width, hidden, bound) for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        coarsest = depth == levels - 1
        priors.append(nf.distributions.GlowBase((width if coarsest else width // 2, 1, 1)))
        if not coarsest:
            merges.append(nf.flows.Merge())
    return nf.MultiscaleFlow(priors, flows, merges, class_cond=False)
