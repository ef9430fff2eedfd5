"""What the benchmarks share: one Glow by normflows or by our engine, ResNets, seconds and bytes."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models.resnet import BasicBlock, ResNet

from latent_aug import Flow, Glow, load_flow
from latent_aug.flows.base import postprocess, preprocess

NETWORK_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Normflows(Flow):
    """A Glow computed by normflows' own methods; latents are packed, not whitened."""

    def __init__(self, glow: Glow) -> None:
        super().__init__()
        self.glow, self.channels, self.multiple = glow, glow.channels, glow.multiple

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Images to latents."""
        parts, _ = self.glow.multiscale.inverse_and_log_det(preprocess(x))
        return self.glow.join_levels(parts[::-1])

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Latents to images."""
        parts = self.glow.split_levels(z)[::-1]
        image, _ = self.glow.multiscale.forward_and_log_det(parts)
        return postprocess(image)

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute what normflows trains on, in nats up to a constant."""
        multiscale = self.glow.multiscale
        for base, level in zip(multiscale.q0, range(self.glow.levels, 0, -1), strict=True):
            pixels = (x.shape[2] >> level) * (x.shape[3] >> level)
            base.num_pix, base.d = pixels, base.shape[0] * pixels
        return multiscale.log_prob(preprocess(x), None)


def random_glow(steps: int, hidden: int) -> Glow:
    """A frozen three-level Glow for 3 x 32 x 32 none of whose parts is the identity."""
    torch.manual_seed(0)
    flow = Glow(3, levels=3, steps=steps, hidden=hidden)
    flow.initialize(torch.rand(8, 3, 32, 32))
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "q0" in name or "net.4" in name:  # priors and last convolutions start at zero
                parameter.normal_(std=0.01)
    return flow.requires_grad_(False).eval()


def contestant(name: str, way: str) -> Flow:
    """A flow by a bundled name or "K,H", computed one way.

    That is "normflows" or a network dtype, which may be followed by "graphs".
    """
    flow = random_glow(*map(int, name.split(","))) if "," in name else load_flow(name)
    if not isinstance(flow, Glow):
        raise TypeError(f"{name} is no Glow")
    flow = copy.deepcopy(flow)
    if way == "normflows":
        return Normflows(flow)
    dtype, *graphs = way.split()
    flow.network_dtype, flow.cuda_graphs = NETWORK_DTYPES[dtype], graphs == ["graphs"]
    return flow


def network_flops(flow: Glow, height: int, width: int) -> int:
    """Count those of one image one way: two a product of coupling networks and convolutions."""
    flops = 0
    for level in range(flow.levels):
        channels = flow.channels * 2 ** (level + 2)
        networks = 9 * channels // 2 * flow.hidden + flow.hidden**2 + 9 * flow.hidden * channels
        pixels = (height >> (level + 1)) * (width >> (level + 1))
        flops += 2 * pixels * flow.steps * (networks + channels**2)
    return flops


def cifar_resnet(blocks: Sequence[int] = (2, 2, 2, 2)) -> nn.Module:
    """A ResNet for small images with so many blocks a stage; the paper's A.1 has ResNet-18."""
    model = ResNet(BasicBlock, list(blocks), num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def wait() -> None:
    """Wait for an accelerator to be done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], *, repeats: int = 5, patience: float = 2.0) -> float:
    """Median over some calls after one to warm up; fewer once they took `patience` seconds.

    On a GPU calls are many times as many, and two more warm up: the second may record a graph.
    """
    found: list[float] = []
    if torch.cuda.is_available():
        repeats, patience = 10 * repeats, patience / 5
        call(), call()
    for _ in range(repeats + 1):
        wait()
        started = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - started)
        if sum(found) > patience and len(found) > 1:
            break
    return statistics.median(found[1:])


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that torch held at once during a call, beyond those it held before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events: Any = profiler.profiler
    changes = [e.nbytes() for e in events.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)
