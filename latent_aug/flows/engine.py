"""The flow engine: Glow computed fast from normflows' parameters.

normflows holds the parameters and defines the numbers; this file computes the same numbers
with less work. Read it from top to bottom: how a step's parameters are read, one step each
way, the multi-scale recursion each way.

What it saves against normflows' own methods: ActNorm is folded into the 1x1 convolution, the
convolution's inverse is taken once, log-determinants are computed only when asked for, shift
and scale come out of the coupling network as two contiguous halves, convolutions run in the
channels_last layout, and the coupling networks may run in lower precision while everything
that carries the state stays in the input's precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import normflows as nf
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Conv = tuple[Tensor, Tensor]
"""Weight (out, in, k, k) and bias (out,) of a convolution."""

Network = tuple[Conv, Conv, Conv]
"""The coupling network's three convolutions; the last gives shift, then log-scale."""


@dataclass(frozen=True)
class Step:
    """One Glow step (ActNorm, 1x1 convolution, affine coupling) in one direction.

    Args:
        mix: ActNorm folded with the 1x1 convolution: one 1x1 convolution with bias.
        log_det: Log-determinant per pixel of `mix` as encoded, a scalar.
        network: The coupling network.
        bound: Log-scales are ``bound * tanh(.)``, so that no scale leaves [e^-bound, e^bound].
    """

    mix: Conv
    log_det: Tensor
    network: Network
    bound: float


@dataclass(frozen=True)
class Level:
    """One scale: its steps in the order of use and its prior's mean and log-scale (1, C, 1, 1)."""

    steps: tuple[Step, ...]
    loc: Tensor
    log_scale: Tensor


def read_levels(
    multiscale: nf.MultiscaleFlow,
    like: Tensor,
    *,
    bound: float,
    inverse: bool,
    frozen: bool,
    network_dtype: torch.dtype | None = None,
    networks: dict[nn.Module, Network] | None = None,
) -> tuple[Level, ...]:
    """Read normflows' parameters, finest level first.

    Args:
        multiscale: Levels of GlowBlocks followed by a Squeeze, priors GlowBase.
        like: Its device and dtype are the result's.
        bound: See `Step`.
        inverse: False for image -> latent, True for latent -> image.
        frozen: True for use: detached, and folded in float64 on the CPU, since a 1x1
            convolution's inverse deserves it. False for training: differentiable.
        network_dtype: Precision of the coupling networks; None for that of `like`.
        networks: Coupling networks that were read before, by block, to be shared between the
            directions; those read now are added.
    """
    levels, networks = [], {} if networks is None else networks
    for flows, base in zip(reversed(multiscale.flows), reversed(multiscale.q0), strict=True):
        blocks = [flow for flow in flows if isinstance(flow, nf.flows.GlowBlock)]
        # normflows stores blocks in the order latent -> image.
        ordered = blocks if inverse else reversed(blocks)
        steps = []
        for block in ordered:
            if block not in networks:
                networks[block] = read_network(block, like, network_dtype, frozen=frozen)
            mix = read_mix(block, like, inverse=inverse, frozen=frozen)
            steps.append(Step(*mix, networks[block], bound))
        levels.append(Level(tuple(steps), *read_prior(base, like, frozen=frozen)))
    return tuple(levels)


def read_mix(
    block: nf.flows.GlowBlock, like: Tensor, *, inverse: bool, frozen: bool
) -> tuple[Conv, Tensor]:
    """ActNorm and 1x1 convolution as one convolution; its log-determinant as encoded."""
    _, conv, norm = block.flows
    lower, upper, log_diagonal, scale, shift = (
        for_folding(p, frozen) for p in (conv.L, conv.U, conv.log_S, norm.s, norm.t)
    )
    permutation, sign, eye = (b.to(lower) for b in (conv.P, conv.sign_S, conv.eye))
    scale, shift = scale.flatten(), shift.flatten()
    diagonal = torch.diag(sign * torch.exp(log_diagonal))
    matrix = permutation @ (lower.tril(-1) + eye) @ (upper.triu(1) + diagonal)
    if inverse:
        weight, bias = torch.exp(scale)[:, None] * torch.linalg.inv(matrix), shift
    else:
        weight = matrix * torch.exp(-scale)
        bias = -(weight @ shift)
    log_det = log_diagonal.sum() - scale.sum()
    return (weight[:, :, None, None].to(like), bias.to(like)), log_det.to(like)


def read_network(
    block: nf.flows.GlowBlock, like: Tensor, dtype: torch.dtype | None, *, frozen: bool
) -> Network:
    """The coupling network's convolutions, outputs reordered from pairs to two halves."""
    network = block.flows[0].flows[1].param_map
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    convs: list[tuple[Any, Any]] = [(layer.weight, layer.bias) for layer in layers]
    # normflows alternates shift and scale along the channels.
    weight, bias = convs[-1]
    convs[-1] = (torch.cat([weight[0::2], weight[1::2]]), torch.cat([bias[0::2], bias[1::2]]))
    if frozen:
        convs = [(w.detach(), b.detach()) for w, b in convs]
    one, two, three = (
        (
            w.to(like.device, dtype or like.dtype, memory_format=torch.channels_last),
            b.to(like.device, dtype or like.dtype),
        )
        for w, b in convs
    )
    return one, two, three


def read_prior(
    base: nf.distributions.GlowBase, like: Tensor, *, frozen: bool
) -> tuple[Tensor, Tensor]:
    """Mean and log-scale of a level's Gaussian prior, (1, C, 1, 1)."""
    loc, loc_logs, log_scale, log_scale_logs = (
        for_folding(p, frozen)
        for p in (base.loc, base.loc_logs, base.log_scale, base.log_scale_logs)
    )
    loc = loc * torch.exp(loc_logs * base.logscale_factor)
    log_scale = log_scale * torch.exp(log_scale_logs * base.logscale_factor)
    return loc.to(like), log_scale.to(like)


def for_folding(parameter: Tensor, frozen: bool) -> Tensor:
    """The parameter itself for training, a detached float64 copy on the CPU for use."""
    return parameter.detach().to("cpu", torch.float64) if frozen else parameter


def shift_and_log_scale(
    z: Tensor, step: Step, kept: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Run the coupling network on the half that stays: two tensors of its shape.

    If `kept` is given, the two hidden activations are appended to it.
    """
    (w1, b1), (w2, b2), (w3, b3) = step.network
    hidden = F.relu_(F.conv2d(z.to(w1.dtype), w1, b1, padding=1))
    if kept is not None:
        kept.append(hidden)
    hidden = F.relu_(F.conv2d(hidden, w2, b2))
    if kept is not None:
        kept.append(hidden)
    out = F.conv2d(hidden, w3, b3, padding=1).to(z.dtype)
    shift, raw = out.chunk(2, dim=1)
    return shift, step.bound * torch.tanh(raw)


def encode_step(z: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """One step towards the latent; also the coupling's log-scale (B, C/2, H, W)."""
    z1, z2 = F.conv2d(z, *step.mix).chunk(2, dim=1)
    shift, log_scale = shift_and_log_scale(z1, step)
    return torch.cat([z1, (z2 - shift) * torch.exp(-log_scale)], dim=1), log_scale


def decode_step(z: Tensor, step: Step) -> Tensor:
    """One step towards the image."""
    z1, z2 = z.chunk(2, dim=1)
    shift, log_scale = shift_and_log_scale(z1, step)
    z2 = torch.addcmul(shift, z2, torch.exp(log_scale))
    return F.conv2d(torch.cat([z1, z2], dim=1), *step.mix)


def squeeze(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 4 C, H/2, W/2), channels last in memory."""
    return F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)


def unsqueeze(z: Tensor) -> Tensor:
    """Undo `squeeze`."""
    return F.pixel_shuffle(z, 2)


def encode(x: Tensor, levels: Sequence[Level], log_dets: list[Tensor] | None = None) -> Tensor:
    """Image-shaped (B, C, H, W) to latent of the same shape, whitened by the prior.

    The finer level's half of the channels is a latent at once, the other half goes on to the
    coarser levels; both are put back where they came from by undoing the squeeze.

    Args:
        x: Preprocessed images, H and W divisible by 2 ** len(levels).
        levels: From `read_levels(..., inverse=False)`.
        log_dets: If given, every term of the log-determinant, (B,) or (), is appended to it.
    """
    level, *coarser = levels
    z = squeeze(x)
    for step in level.steps:
        z, log_scale = encode_step(z, step)
        if log_dets is not None:
            log_dets += [-log_scale.sum(dim=(1, 2, 3)), step.log_det * z[0, 0].numel()]
    rest, latent = z.chunk(2, dim=1) if coarser else (None, z)
    if log_dets is not None:
        log_dets += [-level.log_scale.sum() * latent[0, 0].numel()]
    latent = (latent - level.loc) * torch.exp(-level.log_scale)
    if rest is not None:
        latent = torch.cat([encode(rest, coarser, log_dets), latent], dim=1)
    return unsqueeze(latent)


def decode(z: Tensor, levels: Sequence[Level]) -> Tensor:
    """Exact inverse of `encode`; `levels` come from `read_levels(..., inverse=True)`."""
    level, *coarser = levels
    rest, latent = None, squeeze(z)
    if coarser:
        rest, latent = latent.chunk(2, dim=1)
    latent = torch.addcmul(level.loc, latent, torch.exp(level.log_scale))
    if rest is not None:
        latent = torch.cat([decode(rest, coarser), latent], dim=1)
    for step in level.steps:
        latent = decode_step(latent, step)
    return unsqueeze(latent)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 convolutions as such: by default a GPU rounds their factors to TF32's 10 bits.

    That would cost the flow its exactness. Coupling networks in lower precision do not mind.
    """
    if device.type != "cuda":
        yield
        return
    backend: Any = torch.backends.cudnn
    name: str = "allow_tf32"
    full: Any = False
    if hasattr(backend, "conv"):  # torch 2.9 and later
        backend, name, full = backend.conv, "fp32_precision", "ieee"
    before = getattr(backend, name)
    setattr(backend, name, full)
    try:
        yield
    finally:
        setattr(backend, name, before)
