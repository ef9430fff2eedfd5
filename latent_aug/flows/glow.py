"""Glow: the parameters, which normflows holds, behind the contract of a flow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_aug.flows.backend import keep_freed_memory, use_full_precision, use_plain_defaults
from latent_aug.flows.base import Flow, preprocess, require_config, require_parameter_count
from latent_aug.flows.engine import Target
from latent_aug.flows.latent_gradient import Gradient
from latent_aug.flows.prepared import Prepared
from latent_aug.flows.small_image import MOST_LEVEL_PIXELS
from latent_aug.utils.arguments import require_choice, require_number, require_positive

PROGRAM_TARGET = Target(torch.device("cpu"), torch.float32)
"""What compiled programs compute on and in."""


class Glow(Flow):
    """The multi-scale Glow flow: `levels` scales of `steps` steps each.

    A step is ActNorm, an invertible 1x1 convolution and an affine coupling whose network has
    `hidden` channels. Half the channels of each scale leave as latents. They are put back into
    the image's shape and whitened by the learned prior, so that one unit of a latent is one
    standard deviation of the prior. The log-scale of a coupling is ``log_scale_bound * tanh(.)``.

    Encoding is deterministic: value v of 255 maps to the middle of its bin, (v + ½) / 256.

    A new flow is float32 on the CPU, whatever torch's default dtype and device are. Gradients
    reach the weights only where they require them. A frozen flow, as `load_flow` returns, computes
    from weights that are prepared once per device and dtype of its input. It may so stay on the
    CPU while its inputs are on an accelerator.

    Args:
        channels: The number of image channels.
        levels: The number of scales. Height and width must be divisible by 2 ** levels.
        steps: The number of steps per scale, K.
        hidden: The number of hidden channels of a coupling network, H.
        log_scale_bound: The greatest absolute log-scale of a coupling.

    Attributes:
        network_dtype: Precision of the coupling networks, None for that of the input. The state
            stays in the input's precision. With torch.bfloat16 the flow is faster, and decoding
            undoes encoding only approximately (docs/speed.md).
        cuda_graphs: Whether a frozen flow on a CUDA GPU records CUDA graphs of encode, decode and
            the "fast" gradient of decode. A graph is recorded when a shape of input comes for the
            second time, and replayed from then on. At most sixteen are kept, each with memory for
            its shape, until the weights change. No other thread may record graphs meanwhile.
        compiled_sizes: The height and width of single images for which `compile_single_images` was
            called, and the folder of their programs.

    Raises:
        ValueError: An argument is out of range, an image does not fit, or the flow is untrained.
        TypeError: `log_scale_bound` is no number.

    Source: Kingma & Dhariwal 2018. The paper's A.1 uses 3 levels of 32 steps.

    Example:
        >>> import torch
        >>> flow = Glow(channels=1, levels=2, steps=2, hidden=8)
        >>> x = torch.rand(4, 1, 8, 8)
        >>> flow.initialize(x)
        >>> flow.encode(x).shape
        torch.Size([4, 1, 8, 8])
        >>> torch.allclose(flow.decode(flow.encode(x)), x, atol=1e-4)
        True
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        levels: int = 3,
        steps: int = 32,
        hidden: int = 512,
        log_scale_bound: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "levels": levels, "steps": steps, "hidden": hidden}
        channels, levels, steps, hidden = (require_positive(name, n) for name, n in sizes.items())
        if not 0 < require_number("log_scale_bound", log_scale_bound) <= 8:
            raise ValueError(f"log_scale_bound must lie in (0, 8], got {log_scale_bound!r}")
        self.channels, self.levels, self.steps, self.hidden = channels, levels, steps, hidden
        self.multiple = 2**levels
        self.log_scale_bound = float(log_scale_bound)
        self.network_dtype = None
        self.cuda_graphs = False
        from latent_aug.flows.blocks import build_multiscale  # normflows takes long to import

        with use_plain_defaults():
            self.multiscale = build_multiscale(
                channels, levels, steps, hidden, self.log_scale_bound
            )
        self._initialized = False
        self.compiled_sizes: dict[tuple[int, int], Path] = {}
        # Walking the module tree costs more than a small round trip. Its tables stay.
        tables = (t for m in self.modules() for t in (m._parameters, m._buffers))
        self._tables = [table for table in tables if table]
        # By device and dtype: the version and the storage of the weights that were prepared. What
        # is kept alive here stays at its address, so that no other weights have that version.
        self._prepared: dict[Target, tuple[tuple[Any, ...], list[Tensor], Prepared]] = {}

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Map images to latents of the same shape, which the prior N(0, I) describes.

        Args:
            x: Images (B, C, H, W), float32 or float64 in [0, 1].
            y: Unused, as this flow is unconditional.

        Raises:
            ValueError: x does not fit, or the flow is untrained.
        """
        self._require_input(x, "x")
        self._require_trained()
        if not len(x):
            return x.clone()
        with use_full_precision(x.device):
            return self._prepare(x).encode(x, use_graphs=self.cuda_graphs)

    def decode(self, z: Tensor, y: Tensor | None = None, *, gradient: Gradient = "auto") -> Tensor:
        """Map latents to images (B, C, H, W), not clamped: the exact inverse of `encode`.

        Args:
            z: Latents (B, C, H, W), float32 or float64.
            y: Unused, as this flow is unconditional.
            gradient: How a frozen flow gets the gradient of z, where z requires it. Either way is
                differentiable once. "fast" keeps a part of the activations. "lean" keeps the
                image and recomputes them, in memory that does not grow with the flow's depth.
                "auto" is lean where fast would keep more than 2 GiB.

        Raises:
            ValueError: z does not fit, the flow is untrained, or "lean" is asked of a flow whose
                weights want gradients.
        """
        require_choice("gradient", gradient, ("auto", "fast", "lean"))
        self._require_input(z, "z")
        self._require_trained()
        if not len(z):
            return z.clone()
        if gradient == "lean" and self._wants_weight_gradients():
            raise ValueError("gradient='lean' needs frozen weights: flow.requires_grad_(False)")
        with use_full_precision(z.device):
            return self._prepare(z).decode(z, gradient, use_graphs=self.cuda_graphs)

    def compile_single_images(self, size: int | tuple[int, int], folder: str | Path) -> None:
        """Compile encode and decode of single images on a CPU, for loader workers.

        It takes some minutes and a C++ compiler. The programs are kept in the folder, where the
        same call in the next process finds them. They are machine code: use no folder that others
        write to. After a change of the weights they are left alone. They compute in float32 on one
        thread. Batches and gradients are computed as ever. Call it before the workers start.

        Args:
            size: Height and width of the images, or the side of square ones, as the flow gets
                them: `resolution` where the transform has one.
            folder: Where programs are kept and looked for. It is made if it is missing.

        Raises:
            ValueError: The size does not fit the flow, or has more than 64 x 64 pixels, which
                compiling would not speed up. The flow is untrained, its weights require gradients,
                or its networks are not float32.
            RuntimeError: Torch cannot compile here.
        """
        height, width = self._choose_size(size)
        if height * width > 4 * MOST_LEVEL_PIXELS:
            raise ValueError(f"size must have at most {4 * MOST_LEVEL_PIXELS} pixels, got {size!r}")
        if any(p.requires_grad for p in self._list_weights()):
            raise ValueError("compiling needs frozen weights: flow.requires_grad_(False)")
        if self.network_dtype not in (None, torch.float32):
            raise ValueError(f"network_dtype must be None for compiling, got {self.network_dtype}")
        self._require_trained()
        shape = torch.Size((1, self.channels, height, width))
        folder = Path(folder).absolute()
        with use_full_precision(PROGRAM_TARGET.device):
            self._read(PROGRAM_TARGET, frozen=True).compile(shape, folder, self.fingerprint())
        self.compiled_sizes[height, width] = folder
        self._prepared.clear()

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the log-density of images (B, C, H, W) in [0, 1], exact at x: (B,), in nats."""
        self._require_input(x, "x")
        self._require_trained()
        if not len(x):
            return x.new_zeros(0)
        with use_full_precision(x.device):
            return self._prepare(x).log_prob(x)

    def split_levels(self, z: Tensor) -> list[Tensor]:
        """Split a latent (B, C, H, W) into levels, finest first, each at its own resolution."""
        parts = []
        for _ in range(self.levels - 1):
            z, part = F.pixel_unshuffle(z, 2).chunk(2, dim=1)
            parts.append(part)
        return [*parts, F.pixel_unshuffle(z, 2)]

    def join_levels(self, parts: Sequence[Tensor]) -> Tensor:
        """Undo `split_levels`."""
        *finer, coarsest = parts
        z = F.pixel_shuffle(coarsest, 2)
        for part in reversed(finer):
            z = F.pixel_shuffle(torch.cat([z, part], dim=1), 2)
        return z

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set every ActNorm from one batch, as Glow's §3.1 does.

        Args:
            x: Images (B, C, H, W), float in [0, 1].

        Raises:
            ValueError: The flow is initialised already, or the batch leaves a non-finite scale.
        """
        if self.is_initialized():
            raise ValueError("this flow is initialised (or trained) already")
        self._require_input(x, "x")
        before = {k: v.clone() for k, v in self.state_dict().items()}
        x = x.to(next(self.parameters()))  # normflows computes where and in what its weights are
        with use_plain_defaults():
            self.multiscale.inverse_and_log_det(preprocess(x))
        self.to(x.device)  # normflows puts its new flags on the CPU
        if not all(bool(p.isfinite().all()) for p in self.parameters()):
            self.load_state_dict(before)
            raise ValueError("x gives non-finite ActNorm statistics; use a larger, finite batch")

    def is_initialized(self) -> bool:
        """Whether every ActNorm has seen data (or weights were loaded)."""
        if not self._initialized:  # asked of the flags once: each is a sync on an accelerator
            flags = [b for n, b in self.named_buffers() if n.endswith("data_dep_init_done")]
            self._initialized = all(bool(flag) for flag in flags)
        return self._initialized

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-ready constructor arguments."""
        return {
            "channels": self.channels,
            "levels": self.levels,
            "steps": self.steps,
            "hidden": self.hidden,
            "log_scale_bound": self.log_scale_bound,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Glow:
        """Build a flow from a config that came from outside.

        Raises:
            ValueError: A key is unknown or missing, or a value is of the wrong type or so large
                that building it could exhaust the memory.
        """
        largest = {"channels": 64, "levels": 8, "steps": 256, "hidden": 4096}
        require_config(config, largest, "log_scale_bound")
        require_parameter_count(cls.count_parameters(**config))
        return cls(**config)

    @staticmethod
    def count_parameters(
        channels: int, levels: int, steps: int, hidden: int, log_scale_bound: float
    ) -> int:
        """Estimate how many parameters such a flow has, without building it."""
        widths = [channels * 2 ** (depth + 2) for depth in range(levels)]
        return sum(steps * (2 * w * w + hidden * (hidden + 14 * w)) for w in widths)

    def _require_input(self, t: Tensor, name: str) -> None:
        """Refuse an input that would fail obscurely further down."""
        full = t.dtype in (torch.float32, torch.float64)  # less and it is no inverse any more
        if t.ndim != 4 or t.shape[1] != self.channels or not full:
            raise ValueError(
                f"{name} must be a float32 or float64 tensor (B, {self.channels}, H, W) for a flow "
                f"of {self.channels} channels, got {tuple(t.shape)} of {t.dtype}"
            )
        if t.shape[2] % self.multiple or t.shape[3] % self.multiple:
            raise ValueError(
                f"height and width of {name} must be divisible by {self.multiple}, "
                f"got {tuple(t.shape[2:])}; pad it, or use a transform, which does"
            )

    def _require_trained(self) -> None:
        """Refuse an untrained flow."""
        if not self.is_initialized():
            raise ValueError(
                "this Glow is untrained: load weights with load_flow, train it with train_flow, "
                "or set its ActNorms from a batch of images with initialize"
            )

    def _prepare(self, t: Tensor) -> Prepared:
        """Return what computes on t's device and in its dtype, new where the weights have changed.

        Every in-place change of a parameter that torch counts (its version counter) is noticed, at
        no cost on the device. Weights are read at every call where gradients go to them, and in
        training, as a fused optimizer's step leaves no sign on them.
        """
        target, wanted = Target(t.device, t.dtype), self._wants_weight_gradients()
        if wanted or (self.training and any(p.requires_grad for p in self._list_weights())):
            self._prepared.clear()
            return self._read(target, frozen=not wanted)
        version = self.weights_version()
        before, _, prepared = self._prepared.get(target, (None, None, None))
        if prepared is None or before != version:
            keep_freed_memory()
            prepared = self._read(target, frozen=True)
            weights = [w.detach() for w in self._list_weights()]
            plain = self.network_dtype in (None, torch.float32)
            if self.compiled_sizes and plain and target == PROGRAM_TARGET:
                fingerprint = self.fingerprint()
                for size, folder in self.compiled_sizes.items():
                    shape = torch.Size((1, self.channels, *size))
                    prepared.load_programs(shape, folder, fingerprint)
            self._prepared[target] = version, weights, prepared
        return prepared

    def _read(self, target: Target, *, frozen: bool) -> Prepared:
        return Prepared(
            self.multiscale,
            target,
            bound=self.log_scale_bound,
            network_dtype=self.network_dtype,
            frozen=frozen,
        )

    def _wants_weight_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self._list_weights())

    def _list_weights(self) -> list[Tensor]:
        return [t for table in self._tables for t in table.values() if t is not None]

    def weights_version(self) -> tuple[Any, ...]:
        """Return what changes with the weights and with all else that the engine reads."""
        weights = [(t.data_ptr(), t._version) for t in self._list_weights()]
        settings = (self.network_dtype, self.log_scale_bound, *self.compiled_sizes)
        return (*settings, *weights)

    def train(self, mode: bool = True) -> Glow:
        """Set training or evaluation mode, after which the weights are prepared anew."""
        self._prepared.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Glow:
        self._prepared.clear()
        super()._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}, "_initialized": False}  # as before its first use
