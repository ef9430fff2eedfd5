"""Latent perturbations as pure functions on tensors.

Latents are (B, C, H, W); norms are taken per sample over everything but the batch. `eps` and
`alpha` are numbers or (B, 1, 1, 1) tensors. A `mask` of zeros and ones, broadcastable to the
latent, holds still what is 0 in it: norms, balls and dimensions are those of the rest. Nothing
here draws unless it says so, and what draws takes a `generator`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from latent_aug.utils.randomness import sample_normal, sample_uniform

if TYPE_CHECKING:
    from latent_aug.flows import Flow

Norm = Literal["linf", "l2", "rms"]
Size = float | Tensor

FARTHEST_LATENT = 5.0
"""Root mean square of a latent above which a perturbation rather destroys an image than varies it.

It is 1 under the prior. From about 10 on float32 does not even decode the latent itself exactly;
measured by examples/benchmarks/off_data.py."""


def l2_norm(t: Tensor) -> Tensor:
    """Euclidean norm of each sample: (B, 1, 1, 1)."""
    return t.flatten(1).norm(dim=1)[:, None, None, None]


def root_mean_square(t: Tensor) -> Tensor:
    """Root mean square of each sample: (B, 1, 1, 1)."""
    return l2_norm(t) / dimensions(t) ** 0.5


def dimensions(t: Tensor, mask: Tensor | None = None) -> Size:
    """Components of each sample that may move, at least 1: a number, or (B, 1, 1, 1)."""
    if mask is None:
        return max(math.prod(t.shape[1:]), 1)
    return mask.expand_as(t).flatten(1).sum(dim=1, dtype=t.dtype).clamp(min=1)[:, None, None, None]


def l2_radius(t: Tensor, eps: Size, norm: Norm, mask: Tensor | None = None) -> Size:
    """The l2 radius that `eps` stands for: itself, or eps·√d for the root mean square."""
    if norm not in ("l2", "rms"):
        raise ValueError(f"norm must be 'linf', 'l2', 'rms' or None, got {norm!r}")
    return eps * dimensions(t, mask) ** 0.5 if norm == "rms" else eps


def unit(t: Tensor) -> Tensor:
    """Each sample divided by its l2 norm; a zero sample stays zero."""
    # By the greatest component first: squares of small gradients would underflow.
    largest = t.flatten(1).abs().amax(dim=1)[:, None, None, None]
    scaled = t / torch.where(largest > 0, largest, 1)
    return scaled / torch.where(largest > 0, l2_norm(scaled), 1)


def project(delta: Tensor, eps: Size, norm: Norm | None, *, mask: Tensor | None = None) -> Tensor:
    """Π of the paper's §2: the point of the ball of radius eps next to each sample.

    Args:
        delta: Perturbations (B, C, H, W).
        eps: Radius.
        norm: "linf" clips each component, "l2" and "rms" rescale a sample that is outside,
            None leaves everything.
        mask: What may move; `delta` is 0 elsewhere.

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
    """Randomized-LA (§2.1) from standard normal draws (B, C, H, W).

    Args:
        draws: From N(0, I).
        eps: Size of the noise.
        norm: "linf": eps·N(0, I) clipped to ±eps. "l2", "rms": scaled to radius eps, eps·√d.
            None: eps·N(0, I).
        mask: What may move.

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
    """Turn each component of the noise to the side on which z lies; its norms stay.

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
    """A draw from the uniform distribution on the ball of radius eps, shaped as `like`.

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
    """One step of Adversarial-LA (§2.2): up the normalized gradient, then back into the ball.

    Args:
        delta: Perturbations (B, C, H, W).
        grad: Gradient of each sample's loss to its perturbation; a zero gradient moves nothing.
        alpha: Step size, in the unit of eps.
        eps: Radius of the ball.
        norm: "linf" steps along the sign, "l2" and "rms" along the gradient divided by its norm.
        mask: What may move; `delta` is 0 elsewhere.

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


def perturb_latent(flow: Flow, x: Tensor, noise: Tensor, *, y: Tensor | None = None) -> Tensor:
    """F⁻¹(F(x) + noise), the paper's §2.

    Args:
        flow: Maps images of x's size.
        x: Images (B, C, H, W), float in [0, 1].
        noise: Added to the latents; x's shape.
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
    with torch.autocast(x.device.type, enabled=False):
        return flow.decode(flow.encode(x, y) + noise, y)


def restore_unusable(
    perturbed: Tensor, original: Tensor, z: Tensor, *, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Replace samples that the flow could not perturb by their original; count them.

    These are samples that are not finite, or came from such, or whose latent lies so far off the
    prior (`FARTHEST_LATENT`) that there is nothing sensible beside it: white noise, say, under
    a flow of photographs.

    Args:
        perturbed: Results (B, C, H, W).
        original: What they came from, of the same shape.
        z: The originals' latents (B, C, H', W').
        counted: Which samples (B,) to count; all by default.

    Returns:
        The samples, and a 0-d tensor on their device, so that nothing waits for it.

    Example:
        >>> import torch
        >>> original, z = torch.full((2, 1, 1, 1), 0.5), torch.tensor([1.0, 9.0])
        >>> result, count = restore_unusable(original + 0.1, original, z[:, None, None, None])
        >>> result.flatten(), int(count)
        (tensor([0.6000, 0.5000]), 1)
    """
    failed = unusable(perturbed, original, z)
    count = (failed if counted is None else failed & counted).sum()
    return torch.where(failed[:, None, None, None], original, perturbed), count


def unusable(perturbed: Tensor, original: Tensor, z: Tensor) -> Tensor:
    """Which samples (B,) the flow could not perturb; see `restore_unusable`."""
    finite = (perturbed.isfinite() & original.isfinite()).flatten(1).all(dim=1)
    return ~(finite & (root_mean_square(z).flatten() < FARTHEST_LATENT))
