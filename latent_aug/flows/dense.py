"""The paper's class-conditional flow for small grey images: fully connected couplings."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_aug.flows.backend import use_full_precision, use_plain_defaults
from latent_aug.flows.base import (
    Flow,
    postprocess,
    preprocess,
    require_config,
    require_parameter_count,
)
from latent_aug.utils.arguments import require_number, require_positive

ATAN = 0.636  # about 2 / π: the soft clamp's values lie in (-1, 1)


class DenseCoupling(nn.Module):
    """An affine map of each half of a vector, given the other half and the class.

    Args:
        dims: The length of the vector.
        num_classes: The length of the condition.
        hidden: The width of the two networks.
        clamp: The greatest absolute log-scale.
    """

    def __init__(self, dims: int, num_classes: int, hidden: int, clamp: float) -> None:
        super().__init__()
        self.sizes = (dims // 2, dims - dims // 2)
        self.clamp = clamp
        first, second = self.sizes
        self.of_first = build_network(first + num_classes, hidden, 2 * second)
        self.of_second = build_network(second + num_classes, hidden, 2 * first)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, dims), given conditions y (B, num_classes), and give log-determinants (B,)."""
        first, second = x.split(self.sizes, dim=1)
        log_scale, shift = self.compute_affine(self.of_second, second, y)
        first, log_det = first * log_scale.exp() + shift, log_scale.sum(dim=1)
        log_scale, shift = self.compute_affine(self.of_first, first, y)
        second = second * log_scale.exp() + shift
        return torch.cat([first, second], dim=1), log_det + log_scale.sum(dim=1)

    def decode(self, x: Tensor, y: Tensor) -> Tensor:
        """Undo `forward`."""
        first, second = x.split(self.sizes, dim=1)
        log_scale, shift = self.compute_affine(self.of_first, first, y)
        second = (second - shift) * (-log_scale).exp()
        log_scale, shift = self.compute_affine(self.of_second, second, y)
        first = (first - shift) * (-log_scale).exp()
        return torch.cat([first, second], dim=1)

    def compute_affine(self, net: nn.Module, passive: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Compute clamped log-scale and shift of the other half from the passive one."""
        log_scale, shift = net(torch.cat([passive, y], dim=1)).chunk(2, dim=1)
        return self.clamp * ATAN * torch.atan(log_scale), shift


class Linear(nn.Linear):
    """A linear layer that computes on its input's device and in its dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs) to (B, outputs)."""
        return F.linear(x, self.weight.to(x), self.bias.to(x))


def build_network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Build a coupling's network: linear, ReLU, linear."""
    return nn.Sequential(Linear(inputs, hidden), nn.ReLU(), Linear(hidden, outputs))


class ConditionalDenseFlow(Flow):
    """The paper's flow for MNIST and FashionMNIST: 12 fully connected couplings given the class.

    Images are vectors to it, so it maps one size only. Its latents have no regions and no levels,
    and a `mask` is refused. It needs labels, which `LatentPerturb` reads from the sample
    (`labels_getter`). A new flow is float32 on the CPU, whatever torch's default dtype and device.

    Args:
        channels: The number of image channels.
        height: The height of the images.
        width: The width of the images.
        num_classes: The number of classes that y may name.
        steps: The number of couplings, each followed by a fixed random permutation.
        hidden: The width of the couplings' networks.
        clamp: The greatest absolute log-scale of a coupling.
        seed: The seed of the permutations.

    Raises:
        ValueError: An argument is out of range, or an image or label does not fit.
        TypeError: `clamp` is no number.

    Source: the paper's Table 3. The coupling is that of Ardizzone et al. 2019, after Kingma &
    Dhariwal 2018, with FrEIA's soft clamp.

    Example:
        >>> import torch
        >>> from latent_aug.flows import ConditionalDenseFlow
        >>> flow = ConditionalDenseFlow(height=8, width=8, steps=2, hidden=16)
        >>> x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 9])
        >>> torch.allclose(flow.decode(flow.encode(x, y), y), x, atol=1e-5)
        True
    """

    spatial = False

    def __init__(
        self,
        channels: int = 1,
        height: int = 28,
        width: int = 28,
        *,
        num_classes: int = 10,
        steps: int = 12,
        hidden: int = 512,
        clamp: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "height": height, "width": width}
        sizes |= {"num_classes": num_classes, "steps": steps, "hidden": hidden}
        channels, height, width, num_classes, steps, hidden = (
            require_positive(name, n) for name, n in sizes.items()
        )
        dims = channels * height * width
        if dims < 2:
            raise ValueError("an image must have at least two values to be split, got 1")
        if not 0 < require_number("clamp", clamp) <= 8:
            raise ValueError(f"clamp must lie in (0, 8], got {clamp!r}")
        self.channels, self.size, self.num_classes = channels, (height, width), num_classes
        self.hidden, self.clamp = hidden, float(clamp)
        with use_plain_defaults():
            self.couplings = nn.ModuleList(
                DenseCoupling(dims, num_classes, hidden, self.clamp) for _ in range(steps)
            )
            generator = torch.Generator().manual_seed(seed)
            orders = torch.stack([torch.randperm(dims, generator=generator) for _ in range(steps)])
        self.orders: Tensor
        self.register_buffer("orders", orders)  # saved with the weights
        self.register_load_state_dict_post_hook(require_permutations)  # type: ignore[no-untyped-call]

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Map images to latents of the same shape, which the prior N(0, I) describes.

        Args:
            x: Images (B, C, H, W), float in [0, 1].
            y: Their classes (B,), or class probabilities (B, num_classes).
        """
        return self._encode(x, y)[0]

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map latents to images, not clamped: the exact inverse of `encode` with the same y.

        Args:
            z: Latents (B, C, H, W).
            y: Classes (B,), or class probabilities (B, num_classes).
        """
        y = self._require_classes(z, "z", y)
        state, orders = z.flatten(1), self.orders.to(z.device).argsort(dim=1)
        with use_full_precision(z.device):
            for coupling, order in zip(self.couplings[::-1], orders.flip(0), strict=True):
                state = cast(DenseCoupling, coupling).decode(state[:, order], y)
        return postprocess(state).view(z.shape)

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the log-density of images x in [0, 1] given y, exact at x: (B,), in nats."""
        z, log_det = self._encode(x, y)
        dims = self.orders.shape[1]
        prior = -0.5 * (z.square().sum(dim=(1, 2, 3)) + dims * math.log(2 * math.pi))
        return prior + log_det + dims * math.log(255 / 256)

    def _encode(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute latents and log-determinants."""
        y = self._require_classes(x, "x", y)
        state, total = preprocess(x).flatten(1), x.new_zeros(len(x))
        with use_full_precision(x.device):
            for coupling, order in zip(self.couplings, self.orders.to(x.device), strict=True):
                state, log_det = coupling(state, y)
                state, total = state[:, order], total + log_det
        return state.view(x.shape), total

    def _require_classes(self, t: Tensor, name: str, y: Tensor | None) -> Tensor:
        """Return the classes as (B, num_classes) like t, or refuse t or y."""
        shape = (self.channels, *(self.size or ()))
        if t.shape[1:] != shape or t.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} must be a float32 or float64 tensor (B, {', '.join(map(str, shape))}), "
                f"got {tuple(t.shape)} of {t.dtype}"
            )
        if y is None:
            raise ValueError("y must give each image's class for a conditional flow, got None")
        if not y.is_floating_point() and y.shape == t.shape[:1]:
            if y.is_cpu and bool(((y < 0) | (y >= self.num_classes)).any()):
                raise ValueError(f"y must lie in 0 to {self.num_classes - 1}, got {y.tolist()}")
            return F.one_hot(y.long(), self.num_classes).to(t)
        if not y.is_floating_point() or y.shape != (len(t), self.num_classes):
            raise ValueError(
                f"y must be classes ({len(t)},) or probabilities ({len(t)}, {self.num_classes}), "
                f"got {tuple(y.shape)} of {y.dtype}"
            )
        return y.to(t)

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-ready constructor arguments. The permutations are stored with the weights."""
        assert self.size is not None
        return {
            "channels": self.channels,
            "height": self.size[0],
            "width": self.size[1],
            "num_classes": self.num_classes,
            "steps": len(self.couplings),
            "hidden": self.hidden,
            "clamp": self.clamp,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ConditionalDenseFlow:
        """Build a flow from a config that came from outside.

        Raises:
            ValueError: A key is unknown or missing, or a value is of the wrong type or so large
                that building it could exhaust the memory.
        """
        largest = {"channels": 64, "height": 256, "width": 256, "num_classes": 10_000}
        largest |= {"steps": 256, "hidden": 2**16}
        require_config(config, largest, "clamp")
        dims = config["channels"] * config["height"] * config["width"]
        a_step = (config["hidden"] + 1) * (3 * dims + 2 * config["num_classes"])
        require_parameter_count(config["steps"] * a_step)
        return cls(**config)


def require_permutations(flow: nn.Module, _: object) -> None:
    """Refuse loaded weights whose orders are no permutations.

    Raises:
        ValueError: An order lacks an index.
    """
    assert isinstance(flow, ConditionalDenseFlow)
    orders = flow.orders.sort(dim=1).values
    places = torch.arange(orders.shape[1], dtype=orders.dtype, device=orders.device)
    if not torch.equal(orders, places.expand_as(orders)):
        raise ValueError("orders must hold a permutation in each row")
