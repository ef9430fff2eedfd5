"""Glow, built from normflows' blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_aug.flows import engine, latent_gradient
from latent_aug.flows.backend import full_precision, keep_freed_memory
from latent_aug.flows.base import Flow, check_config, check_parameters, postprocess, preprocess
from latent_aug.flows.graphs import Graph, Graphs, can_record
from latent_aug.flows.latent_gradient import Gradient
from latent_aug.utils.arguments import require_choice, require_number, require_positive


@dataclass(frozen=True)
class Prepared:
    """Frozen parameters as the engine reads them, for one device and dtype.

    Args:
        version: Of the weights they were read from.
        tensors: Those weights; the old storage stays allocated, so that no other weights can
            take its address.
        networks: What both directions share.
        levels: By direction, True for decoding; read when first asked for.
        adjoints: Of the decoding levels; empty until a gradient is asked for.
        graphs: CUDA graphs of all of this.
    """

    version: tuple[Any, ...]
    tensors: list[Tensor]
    networks: dict[nn.Module, engine.Network] = field(default_factory=dict)
    levels: dict[bool, tuple[engine.Level, ...]] = field(default_factory=dict)
    adjoints: list[latent_gradient.Adjoints] = field(default_factory=list)
    graphs: Graphs = field(default_factory=Graphs)


class Glow(Flow):
    """The multi-scale Glow flow: `levels` scales of `steps` steps each.

    A step is ActNorm, an invertible 1x1 convolution and an affine coupling whose network has
    `hidden` channels; half the channels of each scale leave as latents. The latent is packed
    back into the image's shape and whitened by the learned prior, so that one unit of it is one
    standard deviation of the prior. The log-scale of a coupling is ``log_scale_bound * tanh(.)``.

    Encoding is deterministic: value v of 255 maps to the middle of its bin, (v + ½) / 256.

    Gradients reach the weights only where they require them; a frozen flow (`load_flow` returns
    one) computes from weights prepared once per device and dtype of its input, so it may stay
    on the CPU while its inputs are on an accelerator.

    Args:
        channels: Channels of the images.
        levels: Scales; height and width must divide by 2 ** levels.
        steps: Steps per scale, K.
        hidden: Channels of a coupling network, H.
        log_scale_bound: Greatest absolute log-scale of a coupling.

    Attributes:
        network_dtype: Precision of the coupling networks; None is that of the input. The state
            stays in the input's precision, but with torch.bfloat16 decoding undoes encoding only
            about, and faster (docs/speed.md).
        compiled: Have torch.compile fuse each step, where no gradient is wanted. Every new shape
            of input is compiled, a time a level, which takes seconds; torch gives up after eight
            (`torch._dynamo.config.recompile_limit`), so it is for one or two batch sizes.
        cuda_graphs: On a CUDA GPU, record what a frozen flow's encode, decode and "fast" gradient
            of decode do for a shape of input, when it comes for the second time, and replay it
            from then on. Each of these, of sixteen at most, takes memory for its shape until it
            runs on other weights; a recording for which there is none fails. Nothing else may be
            recorded at the same time, by other threads.

    Raises:
        ValueError: An argument is out of range; an image does not fit; the flow is untrained.
        TypeError: `log_scale_bound` is no number.

    Source: Kingma & Dhariwal 2018; the paper's A.1 uses 3 levels of 32 steps.

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
        self.compiled = False
        self.cuda_graphs = False
        from latent_aug.flows.blocks import multiscale_glow  # normflows takes long to import

        self.multiscale = multiscale_glow(channels, levels, steps, hidden, self.log_scale_bound)
        self._initialized = False
        # Walking the module tree costs more than a small flow's round trip; its tables stay.
        self._tables = [t for m in self.modules() for t in (m._parameters, m._buffers)]
        self._prepared: dict[Any, Prepared] = {}

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), float in [0, 1], to latents of the same shape, prior N(0, I)."""
        self._check(x, "x")
        if not len(x):
            return x.clone()

        def encode(x: Tensor) -> Tensor:
            return engine.encode(preprocess(x), levels).contiguous()

        with full_precision(x.device):
            prepared = self._prepared_for(x)
            levels = self._levels(prepared, x, inverse=False)
            return self._run("encode", encode, x, prepared)

    def decode(self, z: Tensor, y: Tensor | None = None, *, gradient: Gradient = "auto") -> Tensor:
        """Exact inverse of `encode`; (B, C, H, W), not clamped.

        Args:
            z: Latents (B, C, H, W).
            y: Unused; this flow is unconditional.
            gradient: How a frozen flow gets the gradient of z, where z requires it; either way
                is differentiable once. "fast" keeps a part of the activations; "lean" keeps the
                image and recomputes them, in memory that does not grow with the flow's depth;
                "auto" is lean where fast would keep more than 2 GiB.

        Raises:
            ValueError: z does not fit; or "lean" is asked of a flow whose weights want gradients.
        """
        require_choice("gradient", gradient, ("auto", "fast", "lean"))
        self._check(z, "z")
        if not len(z):
            return z.clone()
        with full_precision(z.device):
            return self._decode(z, gradient)

    def _decode(self, z: Tensor, gradient: Gradient) -> Tensor:
        """Choose the way by who wants gradients, and how much may be kept for them."""

        def decode(z: Tensor) -> Tensor:
            return postprocess(engine.decode(z, levels)).contiguous()

        if gradient == "lean" and self._weights_want_gradients():
            raise ValueError("gradient='lean' needs frozen weights: flow.requires_grad_(False)")
        prepared = self._prepared_for(z)
        levels = self._levels(prepared, z, inverse=True)
        if prepared is None or not (torch.is_grad_enabled() and z.requires_grad):
            return self._run("decode", decode, z, prepared)
        lean = gradient == "lean" or (
            gradient == "auto" and latent_gradient.prefers_lean(z, levels)
        )
        inverse = self._levels(prepared, z, inverse=False) if lean else None
        graphs = self._graphs(prepared, z)
        x = latent_gradient.decode(z, levels, self._adjoints(prepared, z), inverse, graphs)
        return postprocess(x).contiguous()

    def _run(
        self,
        name: str,
        function: Callable[[Tensor], Tensor],
        t: Tensor,
        prepared: Prepared | None,
    ) -> Tensor:
        """The function of t; by a graph, if there is one and nobody wants gradients."""
        wanted = torch.is_grad_enabled() and t.requires_grad
        graphs = None if wanted else self._graphs(prepared, t)
        graph = None if graphs is None else graphs.get(name, t, lambda: Graph(function, t))
        return function(t) if graph is None else graph(t)

    def _graphs(self, prepared: Prepared | None, t: Tensor) -> Graphs | None:
        """Those for t, where graphs are asked for and may be."""
        if prepared is None or not (self.cuda_graphs and can_record(t)):
            return None
        return prepared.graphs

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Log-density of x in [0, 1], exact at x: (B,), in nats."""
        self._check(x, "x")
        if not len(x):
            return x.new_zeros(0)
        dims = x[0].numel()
        terms: list[Tensor] = []
        with full_precision(x.device):
            levels = self._levels(self._prepared_for(x), x, inverse=False)
            z = engine.encode(preprocess(x), levels, terms)
        prior = -0.5 * (z.square().sum(dim=(1, 2, 3)) + dims * math.log(2 * math.pi))
        return prior + sum(terms) + dims * math.log(255 / 256)

    def split_levels(self, z: Tensor) -> list[Tensor]:
        """A packed latent's parts, finest level first, each at its own resolution."""
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
        """Set every ActNorm from one batch (B, C, H, W) in [0, 1], as Glow's §3.1 does.

        Raises:
            ValueError: The flow is initialised already, or the batch leaves a non-finite scale.
        """
        if self.is_initialized():
            raise ValueError("this flow is initialised (or trained) already")
        self._check(x, "x", initialized=True)
        before = {k: v.clone() for k, v in self.state_dict().items()}
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
        """Build from a config that came from outside.

        Raises:
            ValueError: A key is unknown or missing, or a value is of the wrong type or so large
                that building it could exhaust the memory.
        """
        largest = {"channels": 64, "levels": 8, "steps": 256, "hidden": 4096}
        check_config(config, largest, "log_scale_bound")
        check_parameters(cls.count_parameters(**config))
        return cls(**config)

    @staticmethod
    def count_parameters(
        channels: int, levels: int, steps: int, hidden: int, log_scale_bound: float
    ) -> int:
        """About how many parameters such a flow has, without building it."""
        widths = [channels * 2 ** (depth + 2) for depth in range(levels)]
        return sum(steps * (2 * w * w + hidden * (hidden + 14 * w)) for w in widths)

    def _check(self, t: Tensor, name: str, *, initialized: bool = False) -> None:
        """Refuse what would fail obscurely further down."""
        full = t.dtype in (torch.float32, torch.float64)  # less and it is no inverse any more
        if t.ndim != 4 or t.shape[1] != self.channels or not full:
            raise ValueError(
                f"{name} must be a float32 or float64 tensor (B, {self.channels}, H, W) for a flow "
                f"of {self.channels} channels, got {tuple(t.shape)} of {t.dtype}"
            )
        if t.shape[2] % self.multiple or t.shape[3] % self.multiple:
            raise ValueError(
                f"height and width of {name} must divide by {self.multiple}, "
                f"got {tuple(t.shape[2:])}; pad it, or use a transform, which does"
            )
        if not (initialized or self.is_initialized()):
            raise ValueError(
                "this Glow is untrained: load weights with load_flow, train it with train_flow, "
                "or set its ActNorms from a batch of images with initialize"
            )

    def _prepared_for(self, t: Tensor) -> Prepared | None:
        """What was prepared for t's device and dtype; new where the weights have changed.

        It notices every in-place change of a parameter that torch counts (its version counter) at
        no cost on the device. None where weights are to be read at every call: gradients go to
        them, or they are in training, as a fused optimizer's step leaves no sign on them.
        """
        in_training = self.training and any(p.requires_grad for p in self._tensors())
        if in_training or self._weights_want_gradients():
            self._prepared.clear()
            return None
        version, key = self.weights_version(), (t.device, t.dtype)
        prepared = self._prepared.get(key)
        if prepared is None or prepared.version != version:
            keep_freed_memory()
            prepared = Prepared(version, [w.detach() for w in self._tensors()])
            self._prepared[key] = prepared
        return prepared

    def _levels(
        self, prepared: Prepared | None, t: Tensor, *, inverse: bool
    ) -> tuple[engine.Level, ...]:
        """The parameters as the engine reads them, on t's device and in its dtype."""
        if prepared is None:
            frozen = not self._weights_want_gradients()
            return self._read(t, inverse=inverse, frozen=frozen, networks={})
        if inverse not in prepared.levels:
            networks = dict(prepared.networks)
            # Tensors made in inference mode could not serve a later attack's backward pass.
            with torch.inference_mode(False):
                levels = self._read(t, inverse=inverse, frozen=True, networks=networks)
            wait_for(t)
            prepared.networks.update(networks)
            prepared.levels[inverse] = levels
        return prepared.levels[inverse]

    def _adjoints(self, prepared: Prepared, t: Tensor) -> latent_gradient.Adjoints:
        """The transposed maps of the decoding levels that were prepared for t."""
        if not prepared.adjoints:
            adjoints = latent_gradient.read_adjoints(prepared.levels[True])
            wait_for(t)
            prepared.adjoints.append(adjoints)
        return prepared.adjoints[0]

    def _weights_want_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [t for table in self._tables for t in table.values() if t is not None]

    def weights_version(self) -> tuple[Any, ...]:
        """As the base class says; what else the engine reads counts as well."""
        tensors = tuple((t.data_ptr(), t._version) for t in self._tensors())
        return (self.network_dtype, self.compiled, self.log_scale_bound, *tensors)

    def _read(
        self, t: Tensor, *, inverse: bool, frozen: bool, networks: dict[nn.Module, engine.Network]
    ) -> tuple[engine.Level, ...]:
        return engine.read_levels(
            self.multiscale,
            t,
            bound=self.log_scale_bound,
            inverse=inverse,
            frozen=frozen,
            network_dtype=self.network_dtype,
            networks=networks,
            compiled=self.compiled and frozen,
        )

    def train(self, mode: bool = True) -> Glow:
        """Training or evaluation mode; what was read of the weights is read anew."""
        self._prepared.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Glow:
        self._prepared.clear()
        super()._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}


def wait_for(t: Tensor) -> None:
    """Block until the current stream of t's GPU is done: any other may read then what it wrote."""
    if t.is_cuda:
        torch.cuda.current_stream(t.device).synchronize()
