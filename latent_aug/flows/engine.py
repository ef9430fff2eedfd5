"""The flow engine: Glow computed fast from normflows' parameters.

normflows holds the parameters and defines the numbers. This file computes the same numbers with
less work. Read it from top to bottom: how a step's parameters are read, one step each way, the
multi-scale recursion each way.

What it saves against normflows' own methods: ActNorm is folded into the 1x1 convolution, the
convolution's inverse is taken once, log-determinants are computed only when asked for, shift
and scale come out of the coupling network as two halves, convolutions run in the channels_last
layout, and the coupling networks may run in lower precision while everything that carries the
state stays in the input's precision. Where nobody wants gradients, steps also work in place and,
on a CPU, on a few images at a time (see `run_in_tiles`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_aug.flows import small_image
from latent_aug.flows.convolution import Conv, convolve, reorder_weight

if TYPE_CHECKING:
    import normflows as nf

Network = tuple[Conv, Conv, Conv]
"""The coupling network's three convolutions. The last one gives `shift`, then `raw`, of which
``bound * tanh(raw / 2)`` is the log-scale. Further outputs may follow, see `reorder_weight`."""

TILE_BYTES = 2**22
"""The most bytes of one hidden activation of a tile, see `run_in_tiles`."""


class Target(NamedTuple):
    """The device and dtype that parameters are read for: those of the images and latents."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """One Glow step (ActNorm, 1x1 convolution, affine coupling) in one direction.

    Args:
        mix: ActNorm folded with the 1x1 convolution: one 1x1 convolution with bias.
        log_det: Log-determinant per pixel of `mix` as encoded, a scalar.
        network: The coupling network.
        bound: Log-scales lie in [-bound, bound].
    """

    mix: Conv
    log_det: Tensor
    network: Network
    bound: float

    @property
    def half(self) -> int:
        """The number of channels that stay in the coupling, and as many that move."""
        return self.mix.weight.shape[0] // 2


class Activations(NamedTuple):
    """What the gradient of a decoding step to its input needs.

    Args:
        z: The step's input (B, C, H, W).
        log_scale: The log-scale of its coupling (B, C/2, H, W).
        hidden2: The network's second hidden activation. Only where it is above 0 matters.
        hidden1: The first hidden activation, or None where it is to be computed again.
    """

    z: Tensor
    log_scale: Tensor
    hidden2: Tensor
    hidden1: Tensor | None = None


@dataclass(frozen=True)
class Level:
    """One scale of the flow, in one direction.

    Args:
        steps: Its steps in the order of use.
        loc: The mean of its prior (1, C, 1, 1).
        log_scale: The log-scale of its prior (1, C, 1, 1).
        frozen: Whether no gradient goes to its weights.
    """

    steps: tuple[Step, ...]
    loc: Tensor
    log_scale: Tensor
    frozen: bool = True

    @cached_property
    def matrices(self) -> tuple[small_image.Matrices, ...]:
        """Its steps as `latent_aug.flows.small_image` computes with them, read at the first use."""
        return tuple(small_image.read_matrices(s.mix, s.network, s.bound) for s in self.steps)

    def suits_small_image(self, z: Tensor) -> bool:
        """Whether z (B, C, H, W) goes through its `matrices`."""
        weight = self.steps[0].network[0].weight
        return small_image.suits(z, weight, is_read="matrices" in vars(self))


def read_levels(
    multiscale: nf.MultiscaleFlow,
    target: Target,
    *,
    bound: float,
    decoding: bool,
    frozen: bool,
    network_dtype: torch.dtype | None = None,
    networks: dict[nn.Module, Network] | None = None,
) -> tuple[Level, ...]:
    """Read normflows' parameters, finest level first.

    Args:
        multiscale: Levels of GlowBlocks followed by a Squeeze, priors GlowBase.
        target: The device and dtype of the result.
        bound: The greatest absolute log-scale of a coupling.
        decoding: Whether the levels are for latent -> image.
        frozen: True for use: detached, and folded in float64 on the CPU, since a 1x1
            convolution's inverse deserves it. False for training: differentiable.
        network_dtype: Precision of the coupling networks, None for the dtype of the target.
        networks: Coupling networks that were read before, by block, which both directions share.
            Those read now are added.
    """
    levels, networks = [], {} if networks is None else networks
    for flows, base in zip(reversed(multiscale.flows), reversed(multiscale.q0), strict=True):
        blocks = flows[:-1]  # the last is the squeeze
        # normflows stores blocks in the order latent -> image.
        ordered = blocks if decoding else reversed(blocks)
        steps = []
        for block in ordered:
            if block not in networks:
                networks[block] = read_network(block, target, network_dtype, frozen=frozen)
            mix = read_mix(block, target, decoding=decoding, frozen=frozen)
            steps.append(Step(*mix, networks[block], bound))
        levels.append(Level(tuple(steps), *read_prior(base, target, frozen=frozen), frozen))
    return tuple(levels)


def read_mix(
    block: nf.flows.GlowBlock, target: Target, *, decoding: bool, frozen: bool
) -> tuple[Conv, Tensor]:
    """Fold ActNorm and 1x1 convolution into one, and give its log-determinant as encoded."""
    _, conv, norm = block.flows
    lower, upper, log_diagonal, scale, shift = (
        read_parameter(p, frozen=frozen) for p in (conv.L, conv.U, conv.log_S, norm.s, norm.t)
    )
    permutation, sign, eye = (b.to(lower) for b in (conv.P, conv.sign_S, conv.eye))
    scale, shift = scale.flatten(), shift.flatten()
    diagonal = torch.diag(sign * torch.exp(log_diagonal))
    matrix = permutation @ (lower.tril(-1) + eye) @ (upper.triu(1) + diagonal)
    if decoding:
        weight, bias = torch.exp(scale)[:, None] * torch.linalg.inv(matrix), shift
    else:
        weight = matrix * torch.exp(-scale)
        bias = -(weight @ shift)
    log_det = log_diagonal.sum() - scale.sum()
    return Conv(weight[:, :, None, None].to(*target), bias.to(*target)), log_det.to(*target)


def read_network(
    block: nf.flows.GlowBlock, target: Target, dtype: torch.dtype | None, *, frozen: bool
) -> Network:
    """Read the coupling network's convolutions, with its outputs in two halves."""
    network = block.flows[0].flows[1].param_map
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    convs: list[tuple[Any, Any]] = [(layer.weight, layer.bias) for layer in layers]
    convs[-1] = separate_outputs(*convs[-1])
    if frozen:
        convs = [(w.detach(), b.detach()) for w, b in convs]
    place = Target(target.device, dtype or target.dtype)
    one, two, three = (
        Conv(w.to(*place, memory_format=torch.channels_last), b.to(*place)) for w, b in convs
    )
    if not frozen:
        return one, two, three
    return reorder_weight(one), reorder_weight(two), reorder_weight(three, fill=True)


def separate_outputs(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Bring shift and log-scale, which alternate in normflows, one after the other.

    The log-scale's outputs are doubled, as tanh(a) = 2 sigmoid(2 a) - 1. A sigmoid takes a tenth
    of the time of a tanh on a CPU.
    """
    return (
        torch.cat([weight[0::2], 2 * weight[1::2]]),
        torch.cat([bias[0::2], 2 * bias[1::2]]),
    )


def read_prior(
    base: nf.distributions.GlowBase, target: Target, *, frozen: bool
) -> tuple[Tensor, Tensor]:
    """Read mean and log-scale of a level's Gaussian prior, (1, C, 1, 1)."""
    loc, loc_logs, log_scale, log_scale_logs = (
        read_parameter(p, frozen=frozen)
        for p in (base.loc, base.loc_logs, base.log_scale, base.log_scale_logs)
    )
    loc = loc * torch.exp(loc_logs * base.logscale_factor)
    log_scale = log_scale * torch.exp(log_scale_logs * base.logscale_factor)
    return loc.to(*target), log_scale.to(*target)


def read_parameter(parameter: Tensor, *, frozen: bool) -> Tensor:
    """Give the parameter itself for training, a detached float64 copy on the CPU for use."""
    return parameter.detach().to("cpu", torch.float64) if frozen else parameter


def run_network(
    z1: Tensor, network: Network, hidden1: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the coupling network's outputs, and its second hidden activation."""
    _, two, three = network
    if hidden1 is None:
        hidden1 = compute_first_hidden(z1, network)
    hidden2 = convolve(hidden1, two, relu=True)
    return convolve(hidden2, three), hidden2


def compute_first_hidden(z1: Tensor, network: Network) -> Tensor:
    """Compute the coupling network's first hidden activation."""
    one = network[0]
    return convolve(z1.to(one.weight.dtype), one, relu=True)


def encode_step(z: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Go one step towards the latent, and give the coupling's log-scale (B, C/2, H, W)."""
    z1, z2 = convolve(z, step.mix).chunk(2, dim=1)
    shift, log_scale = compute_shift_and_log_scale(z1, step)
    return torch.cat([z1, (z2 - shift) * torch.exp(-log_scale)], dim=1), log_scale


def decode_step(z: Tensor, step: Step) -> Tensor:
    """Go one step towards the image."""
    z1, z2 = z.chunk(2, dim=1)
    shift, log_scale = compute_shift_and_log_scale(z1, step)
    z2 = torch.addcmul(shift, z2, torch.exp(log_scale))
    return convolve(torch.cat([z1, z2], dim=1), step.mix)


def compute_shift_and_log_scale(z1: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Compute the coupling's two outputs from the half that stays, each of its shape."""
    out, _ = run_network(z1, step.network)
    shift, raw = out.to(z1.dtype)[:, : 2 * step.half].chunk(2, dim=1)
    return shift, (2 * step.bound) * torch.sigmoid(raw) - step.bound


def encode_in_place(z: Tensor, level: Level) -> Tensor:
    """Go a level's steps towards the latent, without gradients and with fewer tensors."""
    if level.suits_small_image(z):
        return small_image.encode(z, level.matrices)
    z = z.contiguous(memory_format=torch.channels_last)
    for step in level.steps:
        z = convolve(z, step.mix)
        z1, z2 = z.chunk(2, dim=1)
        out, _ = run_network(z1, step.network)
        z2.sub_(extract_shift(out, step, z)).mul_(extract_log_scale(out, step, z, -1).exp_())
    return z


def decode_in_place(z: Tensor, level: Level, keep: list[Activations] | None = None) -> Tensor:
    """Go a level's steps towards the image, without autograd.

    Args:
        z: The latents, which are overwritten.
        level: The level.
        keep: A list to which what the gradient of each step needs is appended, or None.
    """
    if keep is None and level.suits_small_image(z):
        return small_image.decode(z, level.matrices)
    z = z.contiguous(memory_format=torch.channels_last)
    for step in level.steps:
        z1, z2 = z.chunk(2, dim=1)
        out, hidden = run_network(z1, step.network)
        log_scale = extract_log_scale(out, step, z)
        if keep is not None:
            keep.append(Activations(z.clone(), log_scale, shrink_hidden(hidden)))
        scale = log_scale.exp_() if keep is None else log_scale.exp()
        z2.mul_(scale).add_(extract_shift(out, step, z))
        z = convolve(z, step.mix)
    return z


def extract_shift(out: Tensor, step: Step, like: Tensor) -> Tensor:
    """Take the shift from the network's outputs, in the dtype of `like`."""
    return out[:, : step.half].to(like.dtype)


def extract_log_scale(out: Tensor, step: Step, like: Tensor, sign: int = 1) -> Tensor:
    """Compute log-scale times `sign` from the network's outputs, in the dtype of `like`."""
    raw = out[:, step.half : 2 * step.half].to(like.dtype)
    return raw.sigmoid().mul_(sign * 2 * step.bound).sub_(sign * step.bound)


def shrink_hidden(hidden: Tensor) -> Tensor:
    """Halve the memory, as only the zeros matter: bfloat16 has the range of float32."""
    return hidden.to(torch.bfloat16) if hidden.dtype == torch.float32 else hidden


def run_in_tiles(run: Callable[[Tensor], Tensor], z: Tensor, step: Step) -> Tensor:
    """Run the steps of a level on as many images at a time as fit a CPU's caches.

    A whole batch's hidden activations would go to memory and back. The allocator gives such blocks
    back to the system, so that the kernel would clear their pages at every step.

    Args:
        run: Runs the steps on a tensor (B, C, H, W).
        z: The tensor to run them on.
        step: One of these steps. All have the same sizes.
    """
    tile = choose_tile(z, step)
    return run(z) if tile >= len(z) else torch.cat([run(part) for part in z.split(tile)])


def choose_tile(z: Tensor, step: Step) -> int:
    """Choose how many images (C, H, W) to run at a time."""
    if not z.is_cpu:
        return len(z)
    weight = step.network[0].weight
    return max(1, TILE_BYTES // (weight.shape[0] * z[0, 0].numel() * weight.element_size()))


def squeeze(x: Tensor) -> Tensor:
    """Bring (B, C, H, W) to (B, 4 C, H/2, W/2), channels last in memory."""
    return F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)


def unsqueeze(z: Tensor) -> Tensor:
    """Undo `squeeze`."""
    return F.pixel_shuffle(z, 2)


def encode(x: Tensor, levels: Sequence[Level], log_dets: list[Tensor] | None = None) -> Tensor:
    """Map images (B, C, H, W) to latents of the same shape, whitened by the prior.

    Half of the finer level's channels are latents at once, the other half goes on to the coarser
    levels. Undoing the squeeze puts both back where they came from.

    Args:
        x: Preprocessed images, H and W divisible by 2 ** len(levels).
        levels: The levels as read for encoding.
        log_dets: A list to which every term of the log-determinant, (B,) or (), is appended.
    """
    level, *coarser = levels
    z = squeeze(x)
    if log_dets is None and not wants_gradients(z, level):
        z = run_in_tiles(partial(encode_in_place, level=level), z, level.steps[0])
    else:
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


def decode(
    z: Tensor, levels: Sequence[Level], keep: list[list[list[Activations]]] | None = None
) -> Tensor:
    """Map latents (B, C, H, W) to images: the exact inverse of `encode`.

    Args:
        z: Latents (B, C, H, W).
        levels: The levels as read for decoding.
        keep: A list for each level, or None. What the gradient of the steps needs is appended to
            it, one list per tile.
    """
    level, *coarser = levels
    rest, latent = None, squeeze(z)
    if coarser:
        rest, latent = latent.chunk(2, dim=1)
    latent = torch.addcmul(level.loc, latent, torch.exp(level.log_scale))
    if rest is not None:
        rest = decode(rest, coarser, keep[1:] if keep else None)
        latent = torch.cat([rest, latent], dim=1)
    if wants_gradients(latent, level):
        for step in level.steps:
            latent = decode_step(latent, step)
        return unsqueeze(latent)

    def run(tile: Tensor) -> Tensor:
        kept: list[Activations] | None = None
        if keep:
            kept = []
            keep[0].append(kept)
        return decode_in_place(tile, level, kept)

    return unsqueeze(run_in_tiles(run, latent, level.steps[0]))


def wants_gradients(z: Tensor, level: Level) -> bool:
    """Whether autograd must see what happens to z."""
    return torch.is_grad_enabled() and (z.requires_grad or not level.frozen)
