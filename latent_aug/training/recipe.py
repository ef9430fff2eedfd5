"""The settings of a training, and the learning rate, average and precision they lead to."""

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
from latent_aug.flows.backend import use_full_precision
from latent_aug.utils.arguments import (
    require_choice,
    require_fields,
    require_natural,
    require_number,
    require_path,
    require_positive,
    require_probability,
)

COUNTS = ("steps", "batch_size", "validation_images", "accumulate")
NATURAL = ("crop", "workers", "seed")
POSITIVE = ("lr", "clip_norm", "timeout_minutes")
NOT_DECISIVE = (  # settings that do not decide the result
    "output",
    "checkpoint_minutes",
    "validation_images",
    "workers",
    "accumulate",
    "timeout_minutes",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of `train_flow`.

    Args:
        output: The directory for the flow, its log, its pictures and the state of the run.
        steps: The number of optimizer steps.
        batch_size: The number of images a step, in all processes together.
        lr: The learning rate of Adam, above 0.
        warmup: The number of steps over which the learning rate rises from 0. None is a tenth of
            all steps, and 200 at most.
        decay: The share of the steps, in [0, 1], over which the learning rate falls to 0 at last.
        clip_norm: The greatest norm of the gradient of the bits/dim, above 0.
        ema: The decay, in [0, 1], of the moving average of the weights. The average is what is
            kept.
        flip: Mirror each image with probability ½.
        crop: The number of pixels that are added on each side, as zeros, before a random crop to
            the old size.
        noise: The standard deviation, in [0, 1], of Gaussian noise on the training images. The
            images lie in [0, 1] and are clamped to it afterwards: 0.1 is 25 grey levels. Held-out
            images get none.
        network_dtype: The precision of a Glow's coupling networks. "auto" measures which is
            faster.
        size: The side to resize and crop images to. By default images keep their size.
        seed: The seed of order, noise and augmentation.
        checkpoint_minutes: The time between two saves of the run's state. 0 saves after each step.
        validation_images: The greatest number of held-out images that measure a checkpoint.
        workers: The number of loader processes for images that do not fit into memory.
        accumulate: The number of parts in which each process takes its share of a batch. More
            parts need less memory, and the result is the same.
        timeout_minutes: The time that a process waits for another one before it gives up. It must
            exceed the time that a checkpoint takes.

    Raises:
        ValueError: A number is out of range, or is no integer where one is needed.
        TypeError: A value that must be a number is none.

    Example:
        >>> TrainConfig(output="flow", steps=1000, lr=5e-4, flip=False).batch_size
        64
    """

    output: str | Path
    steps: int = 6000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int | None = None
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
        require_fields(self, require_path, "output")
        require_fields(self, require_positive, *COUNTS)
        require_fields(self, require_natural, *NATURAL)
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2 ** 64, got {self.seed!r}")
        if self.size is not None:
            require_fields(self, require_positive, "size")
        if self.warmup is not None:
            require_fields(self, require_natural, "warmup")
        require_fields(self, require_number, *POSITIVE, "checkpoint_minutes")
        require_fields(self, require_probability, "decay", "ema", "noise")
        for name in POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)!r}")
        if not self.checkpoint_minutes >= 0:
            raise ValueError(
                f"checkpoint_minutes must not be negative, got {self.checkpoint_minutes!r}"
            )
        require_choice("network_dtype", self.network_dtype, ("auto", "float32", "bfloat16"))

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the result."""
        return {k: v for k, v in asdict(self).items() if k not in NOT_DECISIVE}


def make_average_update(ema: float) -> Callable[[Any, Any, Any], None]:
    """Make the update of a moving average that soon forgets its first, untrained weights."""

    def update(averaged: Any, current: Any, count: Any) -> None:
        decay = min(ema, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    return update


def compute_learning_rate(step: int, config: TrainConfig) -> float:
    """Compute the learning rate of a step.

    It rises linearly over the warm-up, and falls linearly over the last `decay` of the steps.
    """
    warmup = min(200, config.steps // 10) if config.warmup is None else config.warmup
    rising = (step + 1) / max(warmup, 1)
    falling = (config.steps - step) / max(config.decay * config.steps, 1)
    return config.lr * min(1.0, rising, falling)


def choose_dtype(config: TrainConfig, flow: Flow, device: torch.device) -> str:
    """Choose the precision of the coupling networks: the config's, or else the faster one here."""
    if not isinstance(flow, Glow):
        if config.network_dtype == "bfloat16":
            raise ValueError(
                f"network_dtype 'bfloat16' is for the coupling networks of a Glow, got a "
                f"{type(flow).__name__}: leave it at 'auto'"
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
            with use_full_precision(device):
                for _ in range(8):
                    out = F.conv2d(x, weight)
            float(out.flatten()[0])  # waits for an accelerator
            seconds[name] = time.perf_counter() - started
    return min(seconds, key=lambda name: seconds[name])
