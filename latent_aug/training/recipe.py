"""How a flow is trained: the settings, and what follows from them alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from latent_aug.flows import Flow, Glow
from latent_aug.flows.backend import full_precision
from latent_aug.utils.arguments import (
    require_fields,
    require_natural,
    require_number,
    require_positive,
    require_probability,
)

COUNTS = ("steps", "batch_size", "validation_images", "accumulate")
NATURAL = ("warmup", "crop", "workers", "seed")
POSITIVE = ("lr", "clip_norm", "timeout_minutes")
ELSEWHERE = (  # where, how often, by whom and in which portions
    "output",
    "checkpoint_minutes",
    "validation_images",
    "workers",
    "accumulate",
    "timeout_minutes",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How `train_flow` trains.

    Args:
        output: Directory for the flow, its log, its pictures and the state of the run.
        steps: Optimizer steps.
        batch_size: Images per step, of all processes together.
        lr: Adam's learning rate, above 0.
        warmup: Steps over which the learning rate rises from 0.
        decay: Last share of the steps, in [0, 1], over which it falls to 0.
        clip_norm: Greatest norm of the gradient of the bits/dim, above 0.
        ema: Decay in [0, 1] of the exponential moving average of the weights, which is kept.
        flip: Mirror each image with probability ½.
        crop: Zero-pad by this many pixels on each side and crop back at random.
        noise: Standard deviation in [0, 1] of Gaussian noise on the training images, whose values
            lie in [0, 1] and are clamped to that afterwards; 0.1 is 25 grey levels. The bits/dim
            in training are those of noisy images, the validation's of images as they are.
        network_dtype: Precision of a Glow's coupling networks; "auto" measures which is faster.
        size: Resize and crop images to this side.
        seed: Of order, noise and augmentation.
        checkpoint_minutes: Time between two saves of the run's state; 0 saves after each step.
        validation_images: At most this many held-out images measure a checkpoint.
        workers: Loader processes for images that do not fit into memory.
        accumulate: Parts in which each process takes its share of a batch: less memory, and the
            same result.
        timeout_minutes: A process that waits longer than this for another one gives up; it must
            exceed the time that a checkpoint takes.

    Raises:
        ValueError: A number is out of range.
        TypeError: What should be a number is none.

    Example:
        >>> TrainConfig(output="flow", steps=1000, lr=5e-4, flip=False).batch_size
        64
    """

    output: str | Path
    steps: int = 6000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 200
    decay: float = 0.4
    clip_norm: float = 50.0
    ema: float = 0.998
    flip: bool = True
    crop: int = 0
    noise: float = 0.0
    network_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    size: int | None = None
    seed: int = 0
    checkpoint_minutes: float = 3.0
    validation_images: int = 1000
    workers: int = 0
    accumulate: int = 1
    timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        require_fields(self, require_positive, *COUNTS)
        require_fields(self, require_natural, *NATURAL)
        if self.size is not None:
            require_fields(self, require_positive, "size")
        require_fields(self, require_number, *POSITIVE, "checkpoint_minutes")
        require_fields(self, require_probability, "decay", "ema", "noise")
        for name in POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)!r}")
        if not self.checkpoint_minutes >= 0:
            raise ValueError(
                f"checkpoint_minutes must not be negative, got {self.checkpoint_minutes!r}"
            )
        if self.network_dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(
                f"network_dtype must be 'auto', 'float32' or 'bfloat16', got {self.network_dtype!r}"
            )

    def recipe(self) -> dict[str, Any]:
        """What decides the result."""
        return {k: v for k, v in asdict(self).items() if k not in ELSEWHERE}


def warmed_up_ema(ema: float) -> Callable[[Any, Any, Any], None]:
    """An exponential moving average that forgets its first, untrained weights sooner."""

    def update(averaged: Any, current: Any, count: Any) -> None:
        decay = min(ema, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    return update


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last `decay` of the steps."""
    rising = (step + 1) / max(config.warmup, 1)
    falling = (config.steps - step) / max(config.decay * config.steps, 1)
    return config.lr * min(1.0, rising, falling)


def resolve_dtype(config: TrainConfig, flow: Flow, device: torch.device) -> str:
    """Which precision of the coupling networks trains faster on this machine."""
    if not isinstance(flow, Glow):
        if config.network_dtype == "bfloat16":
            raise ValueError(
                f"network_dtype 'bfloat16' is of a Glow's coupling networks, and this flow is a "
                f"{type(flow).__name__}; leave it at 'auto'"
            )
        return "float32"
    if config.network_dtype != "auto":
        return config.network_dtype
    seconds = {}
    for name in ("float32", "bfloat16"):
        dtype: torch.dtype = getattr(torch, name)
        x = torch.ones(32, flow.hidden, 16, 16, dtype=dtype, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = x.new_ones(flow.hidden, flow.hidden, 1, 1)
        for _ in range(4):  # the last, warmed-up run counts
            started = time.perf_counter()
            with full_precision(device):
                for _ in range(8):
                    out = F.conv2d(x, weight)
            float(out.flatten()[0])  # waits for an accelerator
            seconds[name] = time.perf_counter() - started
    return min(seconds, key=lambda name: seconds[name])
