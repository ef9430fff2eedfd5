"""The gradient of decode to the latents, written out: two ways to the same numbers.

Autograd would keep more than is needed and run slower convolutions backwards. Here weights get no
gradients, and the transposed convolutions are plain ones whose kernels were flipped beforehand.

- "fast" keeps what the coupling networks computed on the way to the image.
- "lean" keeps the image only. On the way back it undoes one step at a time, as a flow can, and
  computes that step's activations anew, so that its memory does not grow with the flow's depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from latent_aug.flows import engine
from latent_aug.flows.engine import Activations, Level, Step

Gradient = Literal["auto", "fast", "lean"]

MOST_KEPT = 2**31
"""Bytes that "auto" lets the fast way keep before it takes the lean one. Not by what is free at
the moment: the two differ in the last digits, and a run should not depend on its neighbours."""


@dataclass(frozen=True)
class Adjoint:
    """The linear maps of a decoding step, transposed: each is a convolution again."""

    mix: Tensor
    network: tuple[Tensor, Tensor, Tensor]


Adjoints = tuple[tuple[Adjoint, ...], ...]
"""One for each step of each level, in the order of decoding."""


def read_adjoints(levels: Sequence[Level]) -> Adjoints:
    """Transpose every convolution of levels that were read for decoding."""
    return tuple(
        tuple(
            Adjoint(transposed(step.mix[0]), tuple(transposed(w) for w, _ in step.network))  # type: ignore[arg-type]  # three
            for step in level.steps
        )
        for level in levels
    )


def transposed(weight: Tensor) -> Tensor:
    """The kernel of the convolution that takes gradients of outputs to those of inputs."""
    flipped = weight.flip(2, 3).transpose(0, 1)
    return flipped.contiguous(memory_format=torch.channels_last)


def kept_bytes(z: Tensor, levels: Sequence[Level]) -> int:
    """About what the fast way keeps for latents (B, C, H, W)."""
    total, pixels = 0, z.shape[0] * z.shape[2] * z.shape[3]
    for level in levels:
        pixels //= 4
        for step in level.steps:
            (first, _), _, (last, _) = step.network
            hidden = 2 * first.shape[0] * first.element_size()
            total += pixels * (hidden + last.shape[0] * z.element_size())
    return total


def decode(
    z: Tensor, levels: Sequence[Level], adjoints: Adjoints, inverse: Sequence[Level] | None
) -> Tensor:
    """`engine.decode`, differentiable once in z.

    Args:
        z: Latents (B, C, H, W).
        levels: Read for decoding.
        adjoints: Of those levels.
        inverse: The same levels read for encoding, for the lean way; None for the fast one.
    """
    return _Decode.apply(z, levels, adjoints, inverse)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        levels: Sequence[Level],
        adjoints: Adjoints,
        inverse: Sequence[Level] | None,
    ) -> Tensor:
        kept: list[Activations] | None = [] if inverse is None else None
        x = engine.decode(z, levels, kept)
        ctx.levels, ctx.adjoints, ctx.inverse = levels, adjoints, inverse
        ctx.save_for_backward(*([x] if kept is None else [t for step in kept for t in step]))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        saved = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.inverse is not None:
                (x,) = saved
                z_grad = lean_gradient(x, grad, ctx.levels, ctx.adjoints, ctx.inverse)
            else:
                count = len(Activations._fields)
                kept = [Activations(*saved[i : i + count]) for i in range(0, len(saved), count)]
                z_grad = fast_gradient(grad, ctx.levels, ctx.adjoints, kept)
        return z_grad, None, None, None


def fast_gradient(
    grad: Tensor, levels: Sequence[Level], adjoints: Adjoints, kept: list[Activations]
) -> Tensor:
    """Gradient of the latents from the image's; takes its activations off the end of `kept`."""
    level, *coarser = levels
    grad = engine.squeeze(grad)
    for step, adjoint in zip(reversed(level.steps), reversed(adjoints[0]), strict=True):
        grad = step_gradient(grad, step, adjoint, kept.pop())
    if not coarser:
        return engine.unsqueeze(grad * torch.exp(level.log_scale))
    rest, latent = grad.chunk(2, dim=1)
    rest = fast_gradient(rest, coarser, adjoints[1:], kept)
    return engine.unsqueeze(torch.cat([rest, latent * torch.exp(level.log_scale)], dim=1))


def lean_gradient(
    x: Tensor,
    grad: Tensor,
    levels: Sequence[Level],
    adjoints: Adjoints,
    inverse: Sequence[Level],
) -> Tensor:
    """The same from the decoded image alone, which is encoded again, step by step."""
    level, *coarser = levels
    x, grad = engine.squeeze(x), engine.squeeze(grad)
    steps = zip(reversed(level.steps), reversed(adjoints[0]), inverse[0].steps, strict=True)
    for step, adjoint, undoing in steps:
        x, activations = undo_step(x, undoing)
        grad = step_gradient(grad, step, adjoint, activations)
    if not coarser:
        return engine.unsqueeze(grad * torch.exp(level.log_scale))
    rest, latent = grad.chunk(2, dim=1)
    rest = lean_gradient(x.chunk(2, dim=1)[0], rest, coarser, adjoints[1:], inverse[1:])
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
