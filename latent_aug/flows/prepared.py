"""A Glow ready to run: its parameters read once for a device and dtype, then encode and decode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latent_aug.flows import engine, latent_gradient
from latent_aug.flows.base import postprocess, preprocess
from latent_aug.flows.compiled import Function, can_run, compile_program, load_program, name_file
from latent_aug.flows.engine import Level, Network, Target
from latent_aug.flows.graphs import Graph, Graphs, can_record
from latent_aug.flows.latent_gradient import Adjoints, Gradient

if TYPE_CHECKING:
    import normflows as nf


class Prepared:
    """A Glow's parameters as the engine computes with them.

    Each direction is read when it is first used, and kept. The caller sees to it that the
    parameters stay as they are meanwhile.

    Args:
        multiscale: The parameters.
        target: The device and dtype of images and latents.
        bound: The greatest absolute log-scale of a coupling.
        network_dtype: Precision of the coupling networks, None for the dtype of the target.
        frozen: Whether no gradient goes to the parameters.
    """

    def __init__(
        self,
        multiscale: nf.MultiscaleFlow,
        target: Target,
        *,
        bound: float,
        network_dtype: torch.dtype | None,
        frozen: bool,
    ) -> None:
        self._multiscale, self._target, self._bound = multiscale, target, bound
        self._network_dtype, self._frozen = network_dtype, frozen
        self._networks: dict[nn.Module, Network] = {}  # those that both directions share
        self._levels: dict[bool, tuple[Level, ...]] = {}  # by whether they are for decoding
        self._adjoints: Adjoints | None = None
        self.graphs = Graphs()
        # By direction and shape of input: functions that were compiled ahead of time.
        self.programs: dict[tuple[str, torch.Size], Function] = {}

    def encode(self, x: Tensor, *, use_graphs: bool = False) -> Tensor:
        """Map images (B, C, H, W), float in [0, 1], to latents of the same shape.

        Args:
            x: The images, on the target's device and in its dtype.
            use_graphs: Whether CUDA graphs may be recorded and replayed.
        """
        function = partial(encode_images, levels=self.read_levels(decoding=False))
        return self._run("encode", function, x, use_graphs)

    def decode(self, z: Tensor, gradient: Gradient = "auto", *, use_graphs: bool = False) -> Tensor:
        """Map latents (B, C, H, W) to images: the exact inverse of `encode`.

        Args:
            z: The latents, on the target's device and in its dtype.
            gradient: How frozen parameters give the gradient of z, see `Glow.decode`.
            use_graphs: Whether CUDA graphs may be recorded and replayed.
        """
        levels = self.read_levels(decoding=True)
        if not (self._frozen and torch.is_grad_enabled() and z.requires_grad):
            return self._run("decode", partial(decode_latents, levels=levels), z, use_graphs)
        lean = gradient == "lean" or (
            gradient == "auto" and latent_gradient.prefers_lean(z, levels)
        )
        encoding_levels = self.read_levels(decoding=False) if lean else None
        graphs = self.graphs if use_graphs and can_record(z) else None
        x = latent_gradient.decode(z, levels, self._read_adjoints(), encoding_levels, graphs)
        return postprocess(x).contiguous()

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the log-density of images (B, C, H, W) in [0, 1]: (B,), in nats."""
        dims = x[0].numel()
        log_dets: list[Tensor] = []
        z = engine.encode(preprocess(x), self.read_levels(decoding=False), log_dets)
        prior = -0.5 * (z.square().sum(dim=(1, 2, 3)) + dims * math.log(2 * math.pi))
        return prior + sum(log_dets) + dims * math.log(255 / 256)

    def compile(self, shape: torch.Size, folder: Path, fingerprint: str) -> None:
        """Compile programs for inputs of a shape (1, C, H, W), where there are none that load.

        Args:
            shape: The shape of the input.
            folder: The folder of programs.
            fingerprint: The fingerprint of the flow.
        """
        functions: dict[str, Function] = {
            "encode": partial(encode_images, levels=self.read_levels(decoding=False)),
            "decode": partial(decode_latents, levels=self.read_levels(decoding=True)),
        }
        example = torch.zeros(shape, device=self._target.device, dtype=self._target.dtype)
        for name, function in functions.items():
            file = name_file(folder, name, shape, fingerprint)
            if load_program(file) is None:
                function(example)  # what is read at first use is not read while torch traces
                compile_program(function, example, file)

    def load_programs(self, shape: torch.Size, folder: Path, fingerprint: str) -> None:
        """Load what was compiled for inputs of a shape, see `compile`."""
        for name in ("encode", "decode"):
            program = load_program(name_file(folder, name, shape, fingerprint))
            if program is not None:
                self.programs[name, shape] = program

    def read_levels(self, *, decoding: bool) -> tuple[Level, ...]:
        """Return the parameters for encoding or for decoding, finest level first."""
        if decoding not in self._levels:
            networks = dict(self._networks)  # what fails half-way leaves none behind
            # Tensors made in inference mode could not serve a later attack's backward pass.
            with torch.inference_mode(False) if self._frozen else nullcontext():
                levels = engine.read_levels(
                    self._multiscale,
                    self._target,
                    bound=self._bound,
                    decoding=decoding,
                    frozen=self._frozen,
                    network_dtype=self._network_dtype,
                    networks=networks,
                )
            if self._frozen:
                synchronize(self._target.device)
            self._networks.update(networks)
            self._levels[decoding] = levels
        return self._levels[decoding]

    def _read_adjoints(self) -> Adjoints:
        if self._adjoints is None:
            adjoints = latent_gradient.transpose_levels(self.read_levels(decoding=True))
            synchronize(self._target.device)
            self._adjoints = adjoints
        return self._adjoints

    def _run(
        self, name: str, function: Callable[[Tensor], Tensor], t: Tensor, use_graphs: bool
    ) -> Tensor:
        """Compute the function of t, by a graph if there is one and nobody wants gradients."""
        wanted = torch.is_grad_enabled() and (t.requires_grad or not self._frozen)
        program = self.programs.get((name, t.shape))
        if program is not None and not wanted and can_run(t):
            return program(t.contiguous())
        if wanted or not (use_graphs and can_record(t)):
            return function(t)
        graph = self.graphs.get(name, t, lambda: Graph(function, t))
        return function(t) if graph is None else graph(t)


def encode_images(x: Tensor, levels: Sequence[Level]) -> Tensor:
    """Map images in [0, 1] to contiguous latents."""
    return engine.encode(preprocess(x), levels).contiguous()


def decode_latents(z: Tensor, levels: Sequence[Level]) -> Tensor:
    """Map latents to contiguous images, not clamped."""
    return postprocess(engine.decode(z, levels)).contiguous()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's current stream, so that any other one may read what it wrote."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
