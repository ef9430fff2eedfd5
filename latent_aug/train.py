"""Training a flow by maximum likelihood: resumable, the same after a kill as without one."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from latent_aug.batches import StepSampler, generator_for, random_crop, random_flip
from latent_aug.data import UInt8Images, as_batch, check_sides, images_for
from latent_aug.flows import Flow, Glow
from latent_aug.flows.base import RUN_NAME
from latent_aug.flows.engine import keep_freed_memory
from latent_aug.report import append_to_log, draw, mean_bits_per_dim

AnyFlow = TypeVar("AnyFlow", bound=Flow)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How `train_flow` trains.

    Args:
        output: Directory for the flow, its log, its pictures and the state of the run.
        steps: Optimizer steps.
        batch_size: Images per step.
        lr: Adam's learning rate.
        warmup: Steps over which the learning rate rises from 0.
        decay: Last share of the steps over which it falls to 0.
        clip_norm: Greatest norm of the gradient of the bits/dim.
        ema: Decay of the exponential moving average of the weights, which is what is kept.
        flip: Mirror each image with probability ½.
        crop: Zero-pad by this many pixels and crop back at random.
        network_dtype: Precision of the coupling networks; "auto" measures which is faster here.
        size: Resize and crop images to this side.
        seed: Of order, noise and augmentation.
        checkpoint_minutes: Time between two saves of the run's state.
        validation_images: At most this many held-out images measure a checkpoint.
        workers: Loader processes for images that do not fit into memory.

    Raises:
        ValueError: A number is out of range.
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
    network_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    size: int | None = None
    seed: int = 0
    checkpoint_minutes: float = 3.0
    validation_images: int = 1000
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "clip_norm", "validation_images"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in ("warmup", "crop", "workers", "checkpoint_minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        for name in ("decay", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")
        if self.network_dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(
                f"network_dtype must be 'auto', 'float32' or 'bfloat16', got {self.network_dtype!r}"
            )

    def recipe(self) -> dict[str, Any]:
        """What decides the result: everything but where, how often and by whom it is written."""
        elsewhere = ("output", "checkpoint_minutes", "validation_images", "workers")
        return {k: v for k, v in asdict(self).items() if k not in elsewhere}


def train_flow(
    flow: AnyFlow,
    dataset: Any,
    config: TrainConfig,
    *,
    validation: Any = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> AnyFlow:
    """Train a flow by maximum likelihood on dequantized images and write it to `config.output`.

    Every random choice of a step follows from the seed and the step's number, and the state of
    the run is replaced atomically every few minutes, so a run that is killed and started again
    with the same arguments ends in the weights it would have reached undisturbed. (Two runs in
    two directories agree only with a `network_dtype` other than "auto", which is measured.)

    Args:
        flow: An untrained Glow, a trained one to fine-tune, or another flow with `log_prob` and
            weights; it is trained in place.
        dataset: Images, or tuples that begin with one: PIL, uint8, or float in [0, 1]. Classes
            are used by a class-conditional flow only: the dataset's `targets`, or second in its
            tuples. Augmentation belongs in the config, where it is repeatable.
        config: The recipe.
        validation: Held-out images for the bits/dim at each checkpoint.
        device: Where to train; by default an accelerator if there is one.
        progress: Show a progress bar with bits/dim and images/s.

    Returns:
        The averaged flow, frozen, as it was written: `load_flow(config.output)` gives it again.

    Raises:
        FloatingPointError: The loss or its gradient is not finite; names the step.
        ValueError: The dataset does not fit the flow, or `config.output` holds another run.

    Source: the paper's A.2; Kingma & Dhariwal 2018; Theis et al. 2016 for the dequantization.

    Example:
        >>> import tempfile, torch
        >>> images = torch.rand(64, 1, 8, 8)
        >>> flow = Glow(channels=1, levels=1, steps=1, hidden=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = TrainConfig(output=folder, steps=3, batch_size=8)
        ...     flow = train_flow(flow, images, config, progress=False)
        >>> flow.bits_per_dim(images).shape
        torch.Size([64])
    """
    images = images_for(flow, dataset, config.size)
    held_out = None if validation is None else images_for(flow, validation, config.size)
    check_sides(images, flow)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run = Run(flow.to(device), config, images)
    output = Path(config.output)
    resumed = f"resumed at step {run.step}" if run.step else "training"
    bar = tqdm(
        total=config.steps, initial=run.step, unit="step", desc=resumed, disable=not progress
    )
    last_save, loss = time.monotonic(), None
    for batch, y in run.batches():
        started = time.monotonic()
        loss = run.train_step(batch, y)
        run.seconds += time.monotonic() - started
        bar.update()
        bar.set_postfix_str(
            f"{loss:.3f} bits/dim, {len(batch) / (time.monotonic() - started):.0f} images/s"
        )
        if time.monotonic() - last_save > 60 * config.checkpoint_minutes:
            run.report(held_out, loss)
            run.save()
            last_save = time.monotonic()
    bar.close()
    if loss is not None:
        run.report(held_out, loss)  # first: a run saved as finished has its last report
        run.save()
    flow.network_dtype = None
    averaged = run.averaged()
    averaged.save_pretrained(output)
    return cast(AnyFlow, averaged)


class Run:
    """The state of a training run: the flow, its average, the optimizer and the step.

    Args:
        flow: The flow to train, on the device to train on.
        config: The recipe.
        images: The training images.
    """

    def __init__(self, flow: Flow, config: TrainConfig, images: UInt8Images) -> None:
        self.flow, self.config, self.images = flow, config, images
        self.device = next(flow.parameters()).device
        self.step, self.seconds = 0, 0.0
        self.path = Path(config.output) / RUN_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.identity = self._identity()
        saved = self._load()
        self.dtype_name = saved["dtype_name"] if saved else resolve_dtype(config, flow, self.device)
        if not saved and not flow.is_initialized():
            flow.initialize(
                self.augment(self.first_batch(), torch.Generator().manual_seed(config.seed))
            )
        flow.requires_grad_(True).train()
        keep_freed_memory()
        self.optimizer = torch.optim.Adam(flow.parameters(), lr=config.lr)
        self.average = AveragedModel(flow, multi_avg_fn=warmed_up_ema(config.ema))
        if saved:
            flow.load_state_dict(saved["flow"])
            self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.seconds = saved["step"], saved["seconds"]
        flow.network_dtype = getattr(torch, self.dtype_name)
        if not saved:
            self.save()  # what was decided and initialised is this run's from now on

    def first_batch(self) -> Tensor:
        """Up to 256 images for the data-dependent initialisation."""
        order = torch.randperm(len(self.images), generator=generator_for(self.config.seed, -1))
        return as_batch(self.images.__getitems__(order[:256].tolist()))

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The batches that are left: uint8 (B, C, H, W), and classes (B,) for a flow of classes."""
        size, seed = self.config.batch_size, self.config.seed
        sampler = StepSampler(len(self.images), size, self.step, self.config.steps, seed)
        loader = DataLoader(
            self.images,
            batch_sampler=sampler,
            num_workers=0 if self.images.kept is not None else self.config.workers,
            collate_fn=as_batch,
        )
        for batch, indices in zip(loader, sampler, strict=True):
            yield batch, self.images.classes_at(indices)

    def augment(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 to float in [0, 1] on the device, mirrored and cropped at random."""
        if self.config.flip:
            batch = random_flip(batch, generator)
        if self.config.crop:
            batch = random_crop(batch, self.config.crop, generator)
        return batch.to(self.device) / 255

    def train_step(self, batch: Tensor, y: Tensor | None = None) -> float:
        """One step; the batch's bits/dim."""
        generator = generator_for(self.config.seed, self.step)
        x = self.augment(batch, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        y = None if y is None else y.to(self.device)
        loss = self.flow.bits_per_dim(x, y, generator=generator).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), self.config.clip_norm)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise FloatingPointError(
                f"step {self.step}: loss {loss.item()}, gradient norm {norm.item()}; lower lr or "
                f"raise warmup (last saved state: {self.path})"
            )
        self.optimizer.step()
        self.average.update_parameters(self.flow)
        self.step += 1
        return loss.item()

    def average_flow(self) -> Flow:
        """The averaged flow as it stands."""
        return cast(Flow, self.average.module)

    def averaged(self) -> Flow:
        """The averaged flow, frozen, in evaluation mode and full precision."""
        flow = self.average_flow().requires_grad_(False).eval()
        flow.network_dtype = None
        return flow

    def save(self) -> None:
        """Replace the saved state in one go: a kill leaves the old one or the new one."""
        state = {
            **self.identity,
            "dtype_name": self.dtype_name,
            "step": self.step,
            "seconds": self.seconds,
            "flow": self.flow.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def report(self, held_out: UInt8Images | None, loss: float) -> None:
        """Log where the run stands, and draw what its averaged flow does."""
        output, flow, seed = self.path.parent, self.average_flow(), self.config.seed
        entry: dict[str, Any] = {
            "step": self.step,
            "minutes": round(self.seconds / 60, 2),
            "train_bits_per_dim": loss,
        }
        if held_out is not None:
            entry["validation_bits_per_dim"] = mean_bits_per_dim(
                flow, held_out, self.config.validation_images, seed
            )
        append_to_log(output, entry)
        draw(flow, self.images if held_out is None else held_out, output, seed)

    def _identity(self) -> dict[str, dict[str, Any]]:
        """What makes two runs the same: recipe, architecture, images and where they started."""
        some = [as_batch(self.images.__getitems__(self.images.spread(64)))]
        some += [] if self.images.labels is None else [self.images.labels]
        weights = self.flow.state_dict().values() if self.flow.is_initialized() else ()
        return {
            "recipe": self.config.recipe(),
            "architecture": self.flow.config,
            "data": {"count": len(self.images), "digest": digest(some)},
            "start": {"digest": digest(weights)},  # untrained weights follow from their own seed
        }

    def _load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        saved: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, own in self.identity.items():
            if saved[name] != own:
                changed = {
                    k: (saved[name].get(k), own.get(k)) for k in own if saved[name].get(k) != own[k]
                }
                raise ValueError(
                    f"output {self.path.parent} holds a run of another {name}: {changed} "
                    "(then, now); use the same settings, or another output"
                )
        return saved


def digest(tensors: Iterable[Tensor]) -> str:
    """A fingerprint of tensors' values."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


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
            for _ in range(8):
                out = F.conv2d(x, weight)
            float(out.flatten()[0])  # waits for an accelerator
            seconds[name] = time.perf_counter() - started
    return min(seconds, key=lambda name: seconds[name])
