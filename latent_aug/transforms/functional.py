"""Latent perturbations as pure functions on tensors.

Latents are (B, C, H, W), and norms are taken over each sample. `eps` and `alpha` are numbers or
(B, 1, 1, 1) tensors. A `mask` is made of zeros and ones and broadcasts to the latent. Components
where it is 0 stay still, and norms, balls and dimensions are those of the others. Only
`random_start` draws random numbers, and it takes a `generator`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from latent_aug.utils.randomness import sample_normal, sample_uniform

if TYPE_CHECKING:
    from latent_aug.flows import Flow

Norm = Literal["linf", "l2", "rms"]
Size = float | Tensor

FARTHEST_LATENT = 5.0
"""Root mean square of a latent above which a perturbation destroys an image rather than varies it.

It is 1 under the prior. From about 10 on, float32 does not even decode the latent itself exactly,
as examples/benchmarks/off_data.py measures."""


def l2_norm(t: Tensor) -> Tensor:
    """Euclidean norm of each sample: (B, 1, 1, 1)."""
    return t.flatten(1).norm(dim=1)[:, None, None, None]


def root_mean_square(t: Tensor) -> Tensor:
    """Root mean square of each sample: (B, 1, 1, 1)."""
    return l2_norm(t) / dimensions(t) ** 0.5


def dimensions(t: Tensor, mask: Tensor | None = None) -> Size:
    """Count the components of each sample that may move, at least 1: a number, or (B, 1, 1, 1)."""
    if mask is None:
        return max(math.prod(t.shape[1:]), 1)
    moving = mask.expand_as(t).sum(dim=tuple(range(1, t.ndim)), dtype=t.dtype)  # makes no copy
    return moving.clamp(min=1)[:, None, None, None]


def l2_radius(t: Tensor, eps: Size, norm: Norm, mask: Tensor | None = None) -> Size:
    """Convert eps to an l2 radius: itself for "l2", eps·√d for "rms"."""
    if norm not in ("l2", "rms"):
        raise ValueError(
            "norm must be 'linf', 'l2' or 'rms', or None in project and noise_of_norm, got "
            f"{norm!r}"
        )
    return eps * dimensions(t, mask) ** 0.5 if norm == "rms" else eps


def unit(t: Tensor) -> Tensor:
    """Divide each sample by its l2 norm. A zero sample stays zero."""
    # Divide by the greatest component first, as squares of small gradients would underflow.
    largest = t.flatten(1).abs().amax(dim=1)[:, None, None, None]
    scaled = t / torch.where(largest > 0, largest, 1)
    return scaled / torch.where(largest > 0, l2_norm(scaled), 1)


def project(delta: Tensor, eps: Size, norm: Norm | None, *, mask: Tensor | None = None) -> Tensor:
    """Move each sample to the nearest point of the ball of radius eps: Π of the paper's §2.

    Args:
        delta: Perturbations (B, C, H, W).
        eps: The radius of the ball.
        norm: "linf" clips each component, "l2" and "rms" rescale a sample that is outside,
            None leaves everything.
        mask: Ones where components may move. `delta` must be 0 elsewhere.

    Raises:
        ValueError: There is no such norm.

    Example:
        >>> import torch
        >>> project(torch.tensor([[[[3.0, 4.0]]]]), 1.0, "l2")
        tensor([[[[0.6000, 0.8000]]]])
    """
    if norm is None:
        return delta
    if norm == "linf":
        return torch.clamp(delta, -eps, eps)  # type: ignore[arg-type]  # numbers or tensors
    length = l2_norm(delta)
    radius = l2_radius(delta, eps, norm, mask)
    return torch.where(length > radius, unit(delta) * radius, delta)


def noise_of_norm(
    draws: Tensor, eps: Size, norm: Norm | None, *, mask: Tensor | None = None
) -> Tensor:
    """Turn standard normal draws into noise of size eps: Randomized-LA, the paper's §2.1.

    Args:
        draws: Standard normal draws (B, C, H, W).
        eps: The size of the noise.
        norm: "linf" clips eps·draws to ±eps. "l2" scales the draws to the radius eps, "rms" to
            eps·√d. None gives eps·draws.
        mask: Ones where components may move.

    Raises:
        ValueError: There is no such norm.

    Example:
        >>> import torch
        >>> noise_of_norm(torch.tensor([[[[3.0, -4.0]]]]), 1.0, "l2")
        tensor([[[[ 0.6000, -0.8000]]]])
    """
    draws = draws if mask is None else draws * mask
    if norm in ("l2", "rms"):
        return unit(draws) * l2_radius(draws, eps, norm, mask)
    return project(eps * draws, eps, norm)


def away_from_origin(noise: Tensor, z: Tensor) -> Tensor:
    """Give each component of the noise the sign of z. Its size stays.

    Example:
        >>> import torch
        >>> away_from_origin(torch.tensor([1.0, -1.0]), torch.tensor([-3.0, -2.0]))
        tensor([-1., -1.])
    """
    return noise.abs() * torch.where(z < 0, -1.0, 1.0)


def random_start(
    like: Tensor,
    eps: Size,
    norm: Norm,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a point from the uniform distribution on the ball of radius eps, shaped as `like`.

    Raises:
        ValueError: There is no such norm.

    Example:
        >>> import torch
        >>> bool(l2_norm(random_start(torch.zeros(2, 3, 8, 8), 1.0, "l2")).max() <= 1)
        True
    """
    if norm == "linf":
        cube = (2 * sample_uniform(like.shape, like, generator) - 1) * eps
        return cube if mask is None else cube * mask
    draws = sample_normal(like.shape, like, generator)
    direction = unit(draws if mask is None else draws * mask)
    # A d-dimensional ball's volume grows with radius^d, so the radius is a d-th root.
    share = sample_uniform((len(like), 1, 1, 1), like, generator) ** (1 / dimensions(like, mask))
    return direction * share * l2_radius(like, eps, norm, mask)


def ascent_step(
    delta: Tensor,
    grad: Tensor,
    alpha: Size,
    eps: Size,
    norm: Norm,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Take a step up the normalized gradient, then back into the ball: Adversarial-LA, §2.2.

    Args:
        delta: Perturbations (B, C, H, W).
        grad: The gradient of each sample's loss with respect to its perturbation. A zero gradient
            moves nothing.
        alpha: The step size, in the unit of eps.
        eps: The radius of the ball.
        norm: "linf" steps along the sign, "l2" and "rms" along the gradient divided by its norm.
        mask: Ones where components may move. `delta` must be 0 elsewhere.

    Raises:
        ValueError: There is no such norm.

    Example:
        >>> import torch
        >>> grad = torch.tensor([[[[3.0, -4.0]]]])
        >>> ascent_step(torch.zeros(1, 1, 1, 2), grad, alpha=0.5, eps=1.0, norm="l2")
        tensor([[[[ 0.3000, -0.4000]]]])
    """
    grad = grad if mask is None else grad * mask
    if norm == "linf":
        return project(delta + alpha * grad.sign(), eps, norm)
    moved = delta + unit(grad) * l2_radius(grad, alpha, norm, mask)
    return project(moved, eps, norm, mask=mask)


def clip_change(
    perturbed: Tensor, original: Tensor, clip: float | None, norm: Norm | None
) -> Tensor:
    """Limit the distance from the original in image space: linf for "linf" and None, else l2.

    Example:
        >>> import torch
        >>> clip_change(torch.tensor([[[[0.9]]]]), torch.tensor([[[[0.5]]]]), 0.1, "linf")
        tensor([[[[0.6000]]]])
    """
    if clip is None:
        return perturbed
    return original + project(
        perturbed - original, clip, "linf" if norm in ("linf", None) else "l2"
    )


def encode(flow: Flow, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Encode images of a size that the flow maps, whatever autocast is on.

    Raises:
        TypeError, ValueError: The flow returns something else than a tensor of the images' shape.
    """
    name = f"{type(flow).__name__}.encode"
    with torch.autocast(x.device.type, enabled=False):  # in bfloat16 a flow is no inverse
        z = flow.encode(x, y)
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(z).__name__}")
    if z.shape != x.shape:
        raise ValueError(
            f"{name} must return latents of the images' shape {tuple(x.shape)}, got "
            f"{tuple(z.shape)}"
        )
    return z


def decode(flow: Flow, z: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
    """Decode latents, whatever autocast is on. `options` are for the flow's own `decode`."""
    with torch.autocast(z.device.type, enabled=False):
        return flow.decode(z, y, **options)


def perturb_latent(flow: Flow, x: Tensor, noise: Tensor, *, y: Tensor | None = None) -> Tensor:
    """Compute F⁻¹(F(x) + noise), the formula of the paper's §2.

    The transforms do this and more: `transforms.latents.Latents` adds sizes, masks and limits.

    Args:
        flow: A flow that maps images of x's size.
        x: Images (B, C, H, W), float in [0, 1].
        noise: The noise that is added to the latents, of x's shape.
        y: Labels (B,), for a conditional flow.

    Returns:
        Images of x's shape, not clamped.

    Example:
        >>> import torch
        >>> from latent_aug import load_flow
        >>> x = torch.rand(2, 1, 28, 28)
        >>> same = perturb_latent(load_flow("glow-fashionmnist"), x, torch.zeros_like(x))
        >>> torch.allclose(same, x, atol=1e-4)
        True
    """
    return decode(flow, encode(flow, x, y) + noise, y)


def restore_unusable(
    perturbed: Tensor, original: Tensor, z: Tensor, *, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Replace samples that the flow could not perturb by their original, and count them.

    Such a sample is not finite, or its latent lies so far off the prior (`FARTHEST_LATENT`) that
    there is no sensible image beside it. White noise under a flow of photographs is an example.

    Args:
        perturbed: The perturbed images (B, C, H, W).
        original: The images before, of the same shape.
        z: The latents of the originals (B, C, H', W').
        counted: Which samples (B,) to count, by default all.

    Returns:
        The samples, and their count as a 0-d tensor on their device, so that nothing waits for it.

    Example:
        >>> import torch
        >>> original, z = torch.full((2, 1, 1, 1), 0.5), torch.tensor([1.0, 9.0])
        >>> result, count = restore_unusable(original + 0.1, original, z[:, None, None, None])
        >>> result.flatten(), int(count)
        (tensor([0.6000, 0.5000]), 1)
    """
    failed = is_unusable(perturbed, original, z)
    count = (failed if counted is None else failed & counted).sum()
    return torch.where(failed[:, None, None, None], original, perturbed), count


def is_unusable(perturbed: Tensor, original: Tensor, z: Tensor) -> Tensor:
    """Which samples (B,) the flow could not perturb, as `restore_unusable` says."""
    finite = (perturbed.isfinite() & original.isfinite()).flatten(1).all(dim=1)
    return ~(finite & (root_mean_square(z).flatten() < FARTHEST_LATENT))
