"""The steps of a level for one small image on a CPU, as products of matrices.

There the calls of a convolution take longer than its arithmetic, oneDNN's most of all, and the
halves of channels_last tensors are slow to work on. A product of matrices is one short call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latent_aug.flows.convolution import Conv, is_differentiated

im2col, col2im = torch.ops.aten.im2col.default, torch.ops.aten.col2im.default
KERNEL = [3, 3], [1, 1], [1, 1], [1, 1]  # size, dilation, padding, stride

MOST_LEVEL_PIXELS = 1024
"""Up to so many pixels of a level, products are faster than convolutions."""


class Matrices(NamedTuple):
    """A step's convolutions as matrices, each with its bias (outputs, 1).

    Args:
        mix: ActNorm and the 1x1 convolution (C, C).
        gather: The coupling network's first convolution (H, 9 C / 2), of each pixel's neighbours.
        hidden: Its second one (H, H).
        spread: Its third one (9 C, H), to what a pixel adds to each of its neighbours.
        bound: Log-scales lie in [-bound, bound].
    """

    mix: tuple[Tensor, Tensor]
    gather: tuple[Tensor, Tensor]
    hidden: tuple[Tensor, Tensor]
    spread: tuple[Tensor, Tensor]
    bound: float


def suits(z: Tensor, weight: Tensor, *, is_read: bool) -> bool:
    """Whether a level's tensor z (B, C, H, W) is one small image that nothing differentiates.

    Args:
        z: The tensor.
        weight: The weight of one of its coupling networks.
        is_read: Whether the level's matrices were read before. That must not happen while torch
            traces, as they would be tensors without values.
    """
    small = z.is_cpu and len(z) == 1 and z.shape[2] * z.shape[3] <= MOST_LEVEL_PIXELS
    if not small or weight.dtype != z.dtype or is_differentiated(z, weight):
        return False
    if type(z) is Tensor and not torch.compiler.is_compiling():
        return True
    return is_read and not torch.compiler.is_dynamo_compiling()


def read_matrices(mix: Conv, network: tuple[Conv, Conv, Conv], bound: float) -> Matrices:
    """Bring a step's frozen convolutions into the form of matrices."""
    one, two, three = network
    weight, bias = three.weight.detach().flip(2, 3).permute(0, 2, 3, 1), read_bias(three)
    # Outputs of log-scales are doubled for a sigmoid (see engine.separate_outputs), but not here.
    half = len(bias) // 2
    weight, bias = (torch.cat([t[:half], t[half:] / 2]) for t in (weight, bias))
    return Matrices(
        mix=(mix.weight.detach().flatten(1), read_bias(mix)),
        gather=(one.weight.detach().reshape(len(one.weight), -1), read_bias(one)),
        hidden=(two.weight.detach().flatten(1), read_bias(two)),
        spread=(weight.reshape(-1, weight.shape[3]).contiguous(), bias),
        bound=bound,
    )


def read_bias(conv: Conv) -> Tensor:
    """Give a convolution's bias as a column (outputs, 1)."""
    assert conv.bias is not None
    return conv.bias.detach()[:, None]


def encode(z: Tensor, steps: Sequence[Matrices]) -> Tensor:
    """Go all steps of a level towards the latent, with one image (1, C, H, W)."""
    pixels = z.reshape(z.shape[1], -1)
    for step in steps:
        pixels = torch.addmm(step.mix[1], step.mix[0], pixels)
        z1, z2 = pixels.chunk(2)
        shift, scale = run_network(z1, step, z.shape[2:])
        z2.sub_(shift).div_(scale)
    return pixels.view(z.shape)


def decode(z: Tensor, steps: Sequence[Matrices]) -> Tensor:
    """Go all steps of a level towards the image, with one latent (1, C, H, W), overwritten."""
    pixels = z.reshape(z.shape[1], -1)
    for step in steps:
        z1, z2 = pixels.chunk(2)
        shift, scale = run_network(z1, step, z.shape[2:])
        z2.mul_(scale).add_(shift)
        pixels = torch.addmm(step.mix[1], step.mix[0], pixels)
    return pixels.view(z.shape)


def run_network(z1: Tensor, step: Matrices, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Compute a coupling's shift and scale (C / 2, H W) from the half that stays."""
    around = im2col(z1.view(-1, *size), *KERNEL)
    hidden1 = torch.addmm(step.gather[1], step.gather[0], around).relu_()
    hidden2 = torch.addmm(step.hidden[1], step.hidden[0], hidden1).relu_()
    out = col2im(torch.mm(step.spread[0], hidden2), size, *KERNEL)
    shift, log_scale = out.view(-1, z1.shape[1]).add_(step.spread[1]).chunk(2)
    return shift, log_scale.tanh_().mul_(step.bound).exp_()
