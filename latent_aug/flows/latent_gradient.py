"""The gradient of a frozen flow's decode to its latents, in little memory.

Weights get no gradients. Of all that a coupling network computes, only the log-scale and the signs
of the hidden activations matter for the way back.

"fast" keeps these: the second hidden activation in half precision, while the first one is cheap
to compute again. "lean" keeps the image only. It undoes one step at a time, as a flow can, and
computes them anew. Gradients pass transposed convolutions: plain ones with flipped kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latent_aug.flows import engine
from latent_aug.flows.backend import use_full_precision
from latent_aug.flows.convolution import Conv, convolve, reorder_weight
from latent_aug.flows.engine import Activations, Level, Step
from latent_aug.flows.graphs import DifferentiableGraph, Graphs

Gradient = Literal["auto", "fast", "lean"]

MOST_KEPT = 2**31
"""The most bytes that "auto" lets autograd keep. It does not ask how much memory is free: the two
ways differ in the last digits, and a run should not depend on its neighbours."""


class Adjoint(NamedTuple):
    """The linear maps of a decoding step, transposed: each is a convolution again.

    Args:
        mix: The transpose of the step's 1x1 convolution.
        network: The transposes of the coupling network's convolutions.
    """

    mix: Conv
    network: engine.Network


Adjoints = tuple[tuple[Adjoint, ...], ...]
"""The adjoint of each step of each level, in the order of decoding."""


Kept = list[list[list[Activations]]]
"""What decoding keeps for the gradient, by level, tile and step."""


def transpose_levels(levels: Sequence[Level]) -> Adjoints:
    """Transpose every convolution of levels that were read for decoding."""
    return tuple(tuple(transpose_step(step) for step in level.steps) for level in levels)


def transpose_step(step: Step) -> Adjoint:
    """Transpose the convolutions of one step."""
    one, two, three = (conv.weight for conv in step.network)
    mix = transpose_conv(step.mix.weight)
    return Adjoint(mix, (transpose_conv(one), transpose_conv(two), transpose_conv(three)))


def transpose_conv(weight: Tensor) -> Conv:
    """Build the convolution that takes gradients of outputs to those of inputs."""
    flipped = weight.flip(2, 3).transpose(0, 1)
    return reorder_weight(Conv(flipped.contiguous(memory_format=torch.channels_last)))


def prefers_lean(z: Tensor, levels: Sequence[Level]) -> bool:
    """Whether "auto" is lean, as "fast" would keep too much."""
    return estimate_kept_bytes(z, levels) > MOST_KEPT


def estimate_kept_bytes(z: Tensor, levels: Sequence[Level]) -> int:
    """Estimate the bytes that "fast" keeps for latents (B, C, H, W)."""
    total, pixels = 0, z.shape[0] * z.shape[2] * z.shape[3]
    for level in levels:
        pixels //= 4
        for step in level.steps:
            weight = step.network[0].weight
            hidden = weight.shape[0] * (8 if weight.dtype == torch.float64 else 2)
            total += pixels * (hidden + 3 * step.half * z.element_size())
    return total


def decode(
    z: Tensor,
    levels: Sequence[Level],
    adjoints: Adjoints,
    encoding_levels: Sequence[Level] | None,
    graphs: Graphs | None = None,
) -> Tensor:
    """Decode latents, differentiably once in z.

    Args:
        z: Latents (B, C, H, W).
        levels: The levels as read for decoding.
        adjoints: The adjoints of their steps.
        encoding_levels: The levels as read for encoding, which "lean" undoes steps with. None is
            "fast".
        graphs: The graphs that "fast" is replayed from and recorded in, or None.
    """
    if graphs is not None and encoding_levels is None:
        graph = graphs.get("gradient", z, lambda: record_graph(z, levels, adjoints))
        if graph is not None:
            return _Replay.apply(z, graph)
    return _Decode.apply(z, levels, adjoints, encoding_levels)


def record_graph(z: Tensor, levels: Sequence[Level], adjoints: Adjoints) -> DifferentiableGraph:
    """Record the decoding of latents like z, "fast", as a graph."""
    return DifferentiableGraph(
        lambda z: decode_and_keep(z, levels),
        lambda grad, x, kept: backpropagate(grad, levels, adjoints, x, None, kept),
        z.detach(),
    )


def decode_and_keep(z: Tensor, levels: Sequence[Level]) -> tuple[Tensor, Kept]:
    """Decode latents, and give what the gradient needs beside the images."""
    kept: Kept = [[] for _ in levels]
    return engine.decode(z, levels, kept), kept


class _Replay(torch.autograd.Function):
    """Replay "fast" from a graph, in whose memory the activations are."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, graph: DifferentiableGraph) -> Tensor:
        x, ctx.call = graph(z)
        ctx.graph = graph
        ctx.save_for_backward(z.clone())  # z itself may be written to before
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with use_full_precision(grad.device):  # as in _Decode
            return ctx.graph.gradient(grad, *ctx.saved_tensors, ctx.call), None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        levels: Sequence[Level],
        adjoints: Adjoints,
        encoding_levels: Sequence[Level] | None,
    ) -> Tensor:
        x, keep = (engine.decode(z, levels), []) if encoding_levels else decode_and_keep(z, levels)
        ctx.levels, ctx.adjoints, ctx.encoding_levels = levels, adjoints, encoding_levels
        ctx.tiles = [len(tiles) for tiles in keep]
        kept = [activations for tiles in keep for tile in tiles for activations in tile]
        ctx.save_for_backward(x, *(t for a in kept for t in (a.z, a.log_scale, a.hidden2)))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, *tensors = ctx.saved_tensors
        kept = unflatten_kept(iter(tensors), ctx.levels, ctx.tiles)
        # It runs in another thread, later: what surrounded decode does not surround it.
        with use_full_precision(grad.device):
            z_grad = backpropagate(grad, ctx.levels, ctx.adjoints, x, ctx.encoding_levels, kept)
        return z_grad, None, None, None


def unflatten_kept(
    tensors: Iterator[Tensor], levels: Sequence[Level], tiles: Sequence[int]
) -> Kept:
    """Sort what was kept by level, tile and step, from the tensors in that order."""
    return [
        [[Activations(*islice(tensors, 3)) for _ in level.steps] for _ in range(count)]
        for level, count in zip(levels, tiles, strict=False)
    ]


def backpropagate(
    grad: Tensor,
    levels: Sequence[Level],
    adjoints: Adjoints,
    x: Tensor,
    encoding_levels: Sequence[Level] | None,
    kept: Kept,
) -> Tensor:
    """Compute the latents' gradient from the images', step by step, a tile at a time.

    Args:
        grad: Gradient of the decoded images (B, C, H, W).
        levels: The levels as read for decoding.
        adjoints: The adjoints of their steps.
        x: The decoded images.
        encoding_levels: The levels as read for encoding, for "lean". None is "fast".
        kept: The activations that decoding kept, for "fast".
    """
    level, *coarser = levels
    grad, x = engine.squeeze(grad), engine.squeeze(x)
    tile = engine.choose_tile(grad, level.steps[0])
    grads, inputs = [], []
    for i, part in enumerate(grad.split(tile)):
        if encoding_levels:
            found = undo_steps(x[i * tile : (i + 1) * tile], encoding_levels[0].steps)
        else:
            found = reversed(kept[0][i])
        for step, adjoint, activations in zip(
            reversed(level.steps), reversed(adjoints[0]), found, strict=True
        ):
            part = backpropagate_step(part, step, adjoint, activations)
        grads.append(part)
        inputs.append(activations.z)
    grad = torch.cat(grads)
    if not coarser:
        return engine.unsqueeze(grad * torch.exp(level.log_scale))
    rest, latent = grad.chunk(2, dim=1)
    rest = backpropagate(
        rest,
        coarser,
        adjoints[1:],
        torch.cat(inputs).chunk(2, dim=1)[0],
        encoding_levels and encoding_levels[1:],
        kept[1:],
    )
    return engine.unsqueeze(torch.cat([rest, latent * torch.exp(level.log_scale)], dim=1))


def undo_steps(x: Tensor, steps: Sequence[Step]) -> Iterator[Activations]:
    """Recompute what each decoding step had, last step first, from the output of the last."""
    for step in steps:
        z = convolve(x, step.mix)
        z1, z2 = z.chunk(2, dim=1)
        hidden1 = engine.compute_first_hidden(z1, step.network)
        out, hidden2 = engine.run_network(z1, step.network, hidden1)
        log_scale = engine.extract_log_scale(out, step, z)
        z2.sub_(engine.extract_shift(out, step, z)).mul_(torch.exp(-log_scale))
        yield Activations(z, log_scale, hidden2, hidden1)
        x = z


def backpropagate_step(grad: Tensor, step: Step, adjoint: Adjoint, kept: Activations) -> Tensor:
    """Compute the gradient of a decoding step's input from that of its output."""
    grad = convolve(grad, adjoint.mix)
    grad1, shift_grad = grad.chunk(2, dim=1)
    z1, z2 = kept.z.chunk(2, dim=1)
    grad2 = shift_grad * torch.exp(kept.log_scale)
    # The derivative of bound * tanh(raw / 2), in terms of its value.
    slope = (kept.log_scale.square() * (-0.5 / step.bound)).add_(0.5 * step.bound)
    network_grad = torch.cat([shift_grad, slope.mul_(grad2).mul_(z2)], dim=1)
    hidden1 = kept.hidden1
    if hidden1 is None:
        hidden1 = engine.compute_first_hidden(z1, step.network)
    grad1.add_(backpropagate_network(network_grad, adjoint, hidden1, kept.hidden2))
    shift_grad.copy_(grad2)
    return grad


def backpropagate_network(
    grad: Tensor, adjoint: Adjoint, hidden1: Tensor, hidden2: Tensor
) -> Tensor:
    """Compute the gradient of the coupling network's input from that of its outputs."""
    one, two, three = adjoint.network
    size = None
    if three.weight.dtype == torch.float16:  # small gradients would underflow
        size = grad.abs().amax(dim=(1, 2, 3), keepdim=True)
        grad = grad / torch.where(size > 0, size, 1)
    back = convolve(grad.to(three.weight.dtype), three)
    back = convolve(backpropagate_relu(back, hidden2), two)
    result = convolve(backpropagate_relu(back, hidden1), one).to(grad.dtype)
    return result if size is None else result * size


def backpropagate_relu(grad: Tensor, activation: Tensor) -> Tensor:
    """Compute the gradient before a ReLU from that after it, in place."""
    return torch.ops.aten.threshold_backward.grad_input(
        grad, activation.to(grad.dtype), 0, grad_input=grad
    )
