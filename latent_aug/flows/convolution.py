"""Convolutions that keep height and width, as fast as torch can be asked for them on a CPU.

torch's CPU convolutions bring the weights into oneDNN's layout at every call, run a ReLU after
them on its own, and with one thread and few images leave oneDNN out. Frozen weights are reordered
once here, by the operators that torch.compile emits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

REORDERED_PIXELS = 1024
"""With fewer pixels, calling the operator for reordered weights costs more than it saves."""

REORDERED_IMAGE, REORDERED_PATCH = 256, 576
"""For kernels wider than a pixel so many pixels, with so many values under it, are enough."""


class Conv(NamedTuple):
    """A convolution of stride 1 whose output has the size of its input.

    Args:
        weight: The kernel (out, in, k, k), k odd.
        bias: The bias (out,), or None.
        reordered: The weight in oneDNN's layout and its bias, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    reordered: tuple[Tensor, Tensor | None] | None = None


def reorder_weight(conv: Conv, *, fill: bool = False) -> Conv:
    """Add the weight in oneDNN's layout, where this torch and this CPU can compute with it.

    Args:
        conv: A convolution whose weight is frozen.
        fill: Add output channels of zeros up to a multiple of 32, where that is faster (up to 1.8
            times). `convolve` may then give more channels than the weight has.
    """
    weight, bias = conv.weight.detach(), conv.bias
    if weight.device.type != "cpu" or not can_reorder(weight.dtype):
        return conv
    if fill and len(weight) > 16:
        missing = -len(weight) % 32
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing))
        weight = weight.contiguous(memory_format=torch.channels_last)
        bias = None if bias is None else F.pad(bias, (0, missing))
    pad = weight.shape[2] // 2
    example = [8, weight.shape[1], 16, 16]  # oneDNN may choose the layout by it
    layout = torch.ops.mkldnn._reorder_convolution_weight(
        weight, [pad, pad], [1, 1], [1, 1], 1, example
    )
    return conv._replace(reordered=(layout, bias))


def can_reorder(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, and computes in this precision."""
    if not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def convolve(x: Tensor, conv: Conv, *, relu: bool = False) -> Tensor:
    """Convolve, then apply a ReLU if asked for.

    The result is differentiable where x or the weight require gradients.
    """
    weight, bias, reordered = conv
    pad = weight.shape[2] // 2
    if reordered is not None and is_untracked(x, weight):
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        wide = pad > 0 and weight[0].numel() >= REORDERED_PATCH
        if pixels >= (REORDERED_IMAGE if wide else REORDERED_PIXELS):
            then = "relu" if relu else "none"
            result: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
                x, *reordered, [pad, pad], [1, 1], [1, 1], 1, then, [], ""
            )
            return result
    out = F.conv2d(x, weight, bias, padding=pad)
    return F.relu_(out) if relu else out


def is_untracked(x: Tensor, weight: Tensor) -> bool:
    """Whether operators that nothing can differentiate or trace may run."""
    return x.is_cpu and not (is_differentiated(x, weight) or torch.compiler.is_compiling())


def is_differentiated(x: Tensor, weight: Tensor) -> bool:
    """Whether torch records derivatives of what is computed of x and the weight."""
    backward = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return backward or forward_ad._current_level >= 0
