"""The gradient of decode to the latents in memory that does not grow with the flow's depth.

Autograd keeps what the coupling networks computed on the way to the image. Here only the image
is kept: on the way back one step at a time is undone, as a flow can, and its activations are
computed anew. Weights get no gradients, so transposed convolutions are all that is left, and
those are plain convolutions whose kernels were flipped beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from latent_aug.flows import engine
from latent_aug.flows.engine import Level, Step

Gradient = Literal["auto", "fast", "lean"]

MOST_KEPT = 2**31
"""Bytes that "auto" lets autograd keep. Not by what is free at the moment: the two ways differ in
the last digits, and a run should not depend on its neighbours."""


class Adjoint(NamedTuple):
    """The linear maps of a decoding step, transposed: each is a convolution again."""

    mix: Tensor
    network: tuple[Tensor, Tensor, Tensor]


Adjoints = tuple[tuple[Adjoint, ...], ...]
"""One for each step of each level, in the order of decoding."""


class Activations(NamedTuple):
    """What the gradient of a decoding step needs of it."""

    hidden1: Tensor  # (B, hidden, H, W), after their ReLU
    hidden2: Tensor
    log_scale: Tensor  # (B, C/2, H, W)
    z2: Tensor  # the half that moves, before it did


def read_adjoints(levels: Sequence[Level]) -> Adjoints:
    """Transpose every convolution of levels that were read for decoding."""
    return tuple(tuple(adjoint_of(step) for step in level.steps) for level in levels)


def adjoint_of(step: Step) -> Adjoint:
    """Transpose the convolutions of one step."""
    (one, _), (two, _), (three, _) = step.network
    return Adjoint(transposed(step.mix[0]), (transposed(one), transposed(two), transposed(three)))


def transposed(weight: Tensor) -> Tensor:
    """The kernel of the convolution that takes gradients of outputs to those of inputs."""
    flipped = weight.flip(2, 3).transpose(0, 1)
    return flipped.contiguous(memory_format=torch.channels_last)


def prefers_lean(z: Tensor, levels: Sequence[Level]) -> bool:
    """Whether "auto" is lean: autograd would keep too much, or underflow in float16."""
    network_dtype = levels[0].steps[0].network[0][0].dtype
    return kept_bytes(z, levels) > MOST_KEPT or network_dtype == torch.float16


def kept_bytes(z: Tensor, levels: Sequence[Level]) -> int:
    """About what autograd keeps for latents (B, C, H, W): hidden activations, and the state."""
    total, pixels = 0, z.shape[0] * z.shape[2] * z.shape[3]
    for level in levels:
        pixels //= 4
        for step in level.steps:
            (first, _), _, (last, _) = step.network
            hidden = 2 * first.shape[0] * first.element_size()
            total += pixels * (hidden + 4 * last.shape[0] * z.element_size())
    return total


def decode(
    z: Tensor, levels: Sequence[Level], adjoints: Adjoints, inverse: Sequence[Level]
) -> Tensor:
    """`engine.decode`, differentiable once in z.

    Args:
        z: Latents (B, C, H, W).
        levels: Read for decoding.
        adjoints: Of those levels.
        inverse: The same levels read for encoding.
    """
    return _LeanDecode.apply(z, levels, adjoints, inverse)


class _LeanDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, levels: Sequence[Level], adjoints: Adjoints, inverse: Sequence[Level]
    ) -> Tensor:
        x = engine.decode(z, levels)
        ctx.levels, ctx.adjoints, ctx.inverse = levels, adjoints, inverse
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        # It runs in another thread, later: what surrounded decode does not surround it.
        with (
            torch.autocast(grad.device.type, enabled=False),
            engine.full_precision(grad.device),
        ):
            z_grad = gradient(x, grad, ctx.levels, ctx.adjoints, ctx.inverse)
        return z_grad, None, None, None


def gradient(
    x: Tensor,
    grad: Tensor,
    levels: Sequence[Level],
    adjoints: Adjoints,
    inverse: Sequence[Level],
) -> Tensor:
    """Gradient of the latents from the decoded image x and its gradient, undoing step by step."""
    level, *coarser = levels
    x, grad = engine.squeeze(x), engine.squeeze(grad)
    steps = zip(reversed(level.steps), reversed(adjoints[0]), inverse[0].steps, strict=True)
    for step, adjoint, undoing in steps:
        x, activations = undo_step(x, undoing)
        grad = step_gradient(grad, step, adjoint, activations)
    if not coarser:
        return engine.unsqueeze(grad * torch.exp(level.log_scale))
    rest, latent = grad.chunk(2, dim=1)
    rest = gradient(x.chunk(2, dim=1)[0], rest, coarser, adjoints[1:], inverse[1:])
    return engine.unsqueeze(torch.cat([rest, latent * torch.exp(level.log_scale)], dim=1))


def undo_step(x: Tensor, step: Step) -> tuple[Tensor, Activations]:
    """What went into a decoding step, and its activations, from what came out of it."""
    z1, moved = F.conv2d(x, *step.mix).chunk(2, dim=1)
    hidden: list[Tensor] = []
    shift, log_scale = engine.shift_and_log_scale(z1, step, hidden)
    z2 = (moved - shift) * torch.exp(-log_scale)
    return torch.cat([z1, z2], dim=1), Activations(hidden[0], hidden[1], log_scale, z2)


def step_gradient(grad: Tensor, step: Step, adjoint: Adjoint, kept: Activations) -> Tensor:
    """Through one decoding step: from its output's gradient to its input's."""
    grad1, shift_grad = F.conv2d(grad, adjoint.mix).chunk(2, dim=1)
    grad2 = shift_grad * torch.exp(kept.log_scale)
    # The derivative of bound * tanh, in terms of its value.
    slope = step.bound - kept.log_scale.square() / step.bound
    network_grad = torch.cat([shift_grad, grad2 * kept.z2 * slope], dim=1)
    return torch.cat([grad1 + network_gradient(network_grad, adjoint, kept), grad2], dim=1)


def network_gradient(grad: Tensor, adjoint: Adjoint, kept: Activations) -> Tensor:
    """Through the coupling network: from its outputs' gradient to its input's."""
    one, two, three = adjoint.network
    size = None
    if three.dtype == torch.float16:  # small gradients would underflow
        size = grad.abs().amax(dim=(1, 2, 3), keepdim=True)
        grad = grad / torch.where(size > 0, size, 1)
    hidden = F.conv2d(grad.to(three.dtype), three, padding=1)
    hidden = F.conv2d(torch.ops.aten.threshold_backward(hidden, kept.hidden2, 0), two)
    hidden = torch.ops.aten.threshold_backward(hidden, kept.hidden1, 0)
    result = F.conv2d(hidden, one, padding=1).to(grad.dtype)
    return result if size is None else result * size
