"""Training a flow by maximum likelihood: resumable, the same after a kill as without one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from latent_aug.flows import Flow
from latent_aug.flows.backend import full_precision, keep_freed_memory
from latent_aug.flows.base import RUN_NAME, WEIGHTS_NAME, bits_of, dequantized
from latent_aug.images.datasets import (
    UInt8Images,
    as_batch,
    check_dataset,
    check_same_classes,
    check_sides,
    digest,
    images_for,
)
from latent_aug.training.batches import (
    ImageDraws,
    StepSampler,
    cropped,
    draws_for,
    flipped,
    generator_for,
)
from latent_aug.training.processes import Processes
from latent_aug.training.recipe import TrainConfig, learning_rate, resolve_dtype, warmed_up_ema
from latent_aug.training.report import append_to_log, draw_pictures, mean_bits_per_dim
from latent_aug.utils.files import remove_partial, replace_file

AnyFlow = TypeVar("AnyFlow", bound=Flow)
# Weights that a flow's runs started from and left in it, by their state's path: it is trained in
# place, so that a call that is given again, as a notebook's cell, comes with those it left.
STARTS: WeakKeyDictionary[Flow, dict[Path, tuple[str, str]]] = WeakKeyDictionary()


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

    Under `accelerate launch` or torchrun each process takes its share of every step's batch, and
    the main one writes. Batches, noise and losses do not depend on the number of processes, so a
    run may be resumed on another one; only sums of floats come in another order.

    Args:
        flow: An untrained Glow, a trained one to fine-tune, or another flow with `log_prob` and
            weights; it is trained in place. To go on with a run of another new flow than a Glow,
            make it after the same `torch.manual_seed`: its first weights are part of the run.
        dataset: Images, or tuples that begin with one: PIL, uint8, or float in [0, 1]. Classes
            are used by a class-conditional flow only: the dataset's `targets` or `labels`, or
            second in its tuples. Augmentation belongs in the config, where it is repeatable.
        config: The recipe.
        validation: Held-out images for the bits/dim at each checkpoint.
        device: Where to train; by default a CUDA GPU if there is one, each process its own.
        progress: Show a progress bar with bits/dim and images/s.

    Returns:
        The averaged flow, frozen, as it was written: `load_flow(config.output)` gives it again.
        Use this one: `flow` itself is left in training mode, with the last step's weights.

    Raises:
        FloatingPointError: The loss or its gradient is not finite; names the step.
        ValueError: The dataset does not fit the flow, `config.output` holds another run, or the
            processes do not see the same images, or outnumber those of a batch.

    Source: the paper's A.2; Kingma & Dhariwal 2018; Theis et al. 2016 for the dequantization.

    Example:
        >>> import tempfile, torch
        >>> from latent_aug import Glow
        >>> images = torch.rand(64, 1, 8, 8)
        >>> flow = Glow(channels=1, levels=1, steps=1, hidden=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = TrainConfig(output=folder, steps=3, batch_size=8)
        ...     flow = train_flow(flow, images, config, progress=False)
        >>> flow.bits_per_dim(images).shape
        torch.Size([64])
    """
    check_dataset("dataset", dataset)
    if validation is not None:
        check_dataset("validation", validation)
    processes = Processes(device, timeout_minutes=config.timeout_minutes)
    if flow.num_classes:
        check_same_classes(dataset, validation)
    images = images_for(flow, dataset, config.size)
    held_out = None if validation is None else images_for(flow, validation, config.size)
    check_sides(images, flow)
    if held_out is not None:
        check_sides(held_out, flow, "validation images")
    own_dtype = flow.network_dtype
    run = Run(flow.to(processes.device), config, images, processes)
    resumed = f"resumed at step {run.step}" if run.step else "training"
    hidden = not (progress and processes.is_main)
    bar = tqdm(total=config.steps, initial=run.step, unit="step", desc=resumed, disable=hidden)
    last_save, loss = time.monotonic(), None
    try:
        for batch, y in run.batches():
            started = time.monotonic()
            loss = run.train_step(batch, y)
            run.seconds += time.monotonic() - started
            bar.update()
            bar.set_postfix_str(
                f"{loss:.3f} bits/dim, {run.batch_size / (time.monotonic() - started):.0f} images/s"
            )
            if time.monotonic() - last_save > 60 * config.checkpoint_minutes:
                run.checkpoint(held_out, loss)
                last_save = time.monotonic()
    finally:
        run.remember_start()
        flow.network_dtype = own_dtype
    bar.close()
    if loss is not None:
        run.checkpoint(held_out, loss)
    averaged = run.averaged()
    if processes.is_main:
        averaged.save_pretrained(config.output)
    processes.wait()
    return cast(AnyFlow, averaged)


class Likelihood(nn.Module):
    """A flow's bits/dim as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, uniform: Tensor, y: Tensor | None) -> Tensor:
        """Of images (B, C, H, W) in [0, 1], uniform noise in [0, 1), and their classes: (B,)."""
        return bits_of(self.flow.log_prob(dequantized(x, uniform), y), x)


class Run:
    """The state of a training run: the flow, its average, the optimizer and the step.

    Args:
        flow: The flow to train, on the device to train on.
        config: The recipe.
        images: The training images.
        processes: This process among those that train together.
    """

    def __init__(
        self, flow: Flow, config: TrainConfig, images: UInt8Images, processes: Processes
    ) -> None:
        self.flow, self.config, self.images, self.processes = flow, config, images, processes
        self.batch_size = min(config.batch_size, len(images))
        if self.batch_size < processes.count:
            raise ValueError(
                f"batch_size is of all {processes.count} processes, each of which needs an image "
                f"of the {self.batch_size} a step"
            )
        self.step, self.seconds = 0, 0.0
        self.path = Path(config.output) / RUN_NAME
        self.identity = self._identity()
        processes.agree("what is trained on what", self.identity)
        if processes.is_main:
            remove_partial(self.path)
        saved = processes.from_main(self._load)
        self.dtype_name = (
            saved["dtype_name"]
            if saved
            else processes.from_main(lambda: resolve_dtype(config, flow, processes.device))
        )
        if not saved and not flow.is_initialized():
            first = self.first_batch()
            draws = self.draws(range(len(first)), -1)
            flow.initialize(self.augment(first, draws))
        flow.requires_grad_(True).train()
        keep_freed_memory()
        if saved:
            flow.load_state_dict(saved["flow"])
        self.likelihood = processes.shared(Likelihood(flow))  # from here on all have one's weights
        self.optimizer = torch.optim.Adam(flow.parameters(), lr=config.lr)
        self.average = AveragedModel(flow, multi_avg_fn=warmed_up_ema(config.ema))
        if saved:
            self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.seconds = saved["step"], saved["seconds"]
        flow.network_dtype = getattr(torch, self.dtype_name)
        if not saved and processes.is_main:
            self.save()  # what was decided and initialised is this run's from now on

    def first_batch(self) -> Tensor:
        """Up to 256 images for the data-dependent initialisation."""
        order = torch.randperm(len(self.images), generator=generator_for(self.config.seed, -1))
        return as_batch(self.images.__getitems__(order[:256].tolist()))

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This process's shares of the batches that are left.

        uint8 (B, C, H, W), and classes (B,) for a class-conditional flow.
        """
        self.sampler = StepSampler(
            len(self.images),
            self.batch_size,
            self.step,
            self.config.steps,
            self.config.seed,
            rank=self.processes.rank,
            processes=self.processes.count,
        )
        loader = DataLoader(
            self.images,
            batch_sampler=self.sampler,
            num_workers=0 if self.images.kept is not None else self.config.workers,
            collate_fn=as_batch,
            generator=torch.Generator(),  # nothing is drawn by it, but from the caller's otherwise
        )
        for batch, indices in zip(loader, self.sampler, strict=True):
            yield batch, self.images.classes_at(indices)

    def draws(self, places: range, step: int) -> ImageDraws:
        """What is drawn for images at some places of a step's batch."""
        config, shape = self.config, self.images.shape
        return draws_for(config.seed, step, places, shape, padding=config.crop, noise=config.noise)

    def augment(self, batch: Tensor, draws: ImageDraws) -> Tensor:
        """uint8 to float in [0, 1] on the device: mirrored, cropped and noisy as was drawn."""
        if self.config.flip:
            batch = flipped(batch, draws.mirrored)
        if self.config.crop:
            batch = cropped(batch, self.config.crop, draws.corners)
        x = batch.to(self.processes.device) / 255
        if self.config.noise:
            x = (x + draws.gaussian.to(x)).clamp(0, 1)
        return x

    def train_step(self, batch: Tensor, y: Tensor | None = None) -> float:
        """One step with this process's share of a batch; the whole batch's bits/dim."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self.optimizer.zero_grad()
        loss = self.processes.total(self.backward(batch, y)).item()
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), self.config.clip_norm)
        if not math.isfinite(loss) or not math.isfinite(norm.item()):
            raise FloatingPointError(
                f"step {self.step}: loss {loss}, gradient norm {norm.item()}; lower lr or "
                f"raise warmup (last saved state: {self.path})"
            )
        self.optimizer.step()
        self.average.update_parameters(self.flow)
        self.step += 1
        return loss

    def backward(self, batch: Tensor, y: Tensor | None) -> Tensor:
        """Gradients of the whole batch's mean bits/dim; this share's part of that mean, a scalar.

        The share goes through in `accumulate` parts; the last one's backward pass brings the
        gradients of all processes together.
        """
        parts = batch.chunk(self.config.accumulate)
        y = None if y is None else y.to(self.processes.device)
        classes = [None] * len(parts) if y is None else y.chunk(self.config.accumulate)
        first, loss = self.sampler.places.start, torch.zeros((), device=self.processes.device)
        for number, (part, own) in enumerate(zip(parts, classes, strict=True), 1):
            places = range(first, first + len(part))
            draws = self.draws(places, self.step)
            x, uniform = self.augment(part, draws), draws.uniform.to(self.processes.device)
            last = number == len(parts)
            with (
                nullcontext() if last else self.processes.unshared(self.likelihood),
                full_precision(self.processes.device),  # for the backward pass, too
            ):
                bits = self.likelihood(x, uniform, own).sum() / self.batch_size
                self.processes.backward(bits)
            first, loss = places.stop, loss + bits.detach()
        return loss

    def checkpoint(self, held_out: UInt8Images | None, loss: float) -> None:
        """Report and save, in the main process."""
        if self.processes.is_main:
            self.report(held_out, loss)  # first: a run saved as finished has its last report
            self.save()

    def average_flow(self) -> Flow:
        """The averaged flow as it stands."""
        return cast(Flow, self.average.module)

    def averaged(self) -> Flow:
        """The averaged flow, frozen, in evaluation mode and full precision."""
        flow = self.average_flow().requires_grad_(False).eval()
        flow.network_dtype = None
        flow.loaded_from = flow.read_from = flow.card = None  # those of what it started from
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(self.path, flush=True) as partial:
            torch.save(state, partial)

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
        draw_pictures(flow, self.images if held_out is None else held_out, output, seed)

    def _identity(self) -> dict[str, dict[str, Any]]:
        """What makes two runs the same: recipe, architecture, images and where they started."""
        some = [as_batch(self.images.__getitems__(self.images.spread(64)))]
        some += [] if self.images.labels is None else [self.images.labels]
        # Untrained weights follow from their own seed.
        weights = self.flow.state_dict().values() if self.flow.is_initialized() else ()
        self.start = digest(weights)
        before, end = STARTS.get(self.flow, {}).get(self.path.resolve(), ("", ""))
        if end == self.start and self.processes.from_main(self.path.exists):
            self.start = before
        return {
            "recipe": self.config.recipe(),
            "architecture": self.flow.config,
            "data": {"count": len(self.images), "digest": digest(some)},
            "start": {"digest": self.start},
        }

    def remember_start(self) -> None:
        """What the flow started from, with the weights that it is left with."""
        left = digest(self.flow.state_dict().values())
        STARTS.setdefault(self.flow, {})[self.path.resolve()] = self.start, left

    def _load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            if (self.path.parent / WEIGHTS_NAME).exists():
                raise ValueError(
                    f"output {self.path.parent} holds a flow and no state of its training, so it "
                    "would be overwritten; choose another output (to train it further: --init "
                    f"{self.path.parent})"
                )
            return None
        try:
            saved: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise OSError(
                f"{self.path}, the state of the run, cannot be read; delete it to begin anew: "
                f"{error}"
            ) from error
        if not isinstance(saved, dict) or not self.identity.keys() <= saved.keys():
            raise ValueError(
                f"{self.path} is not the state of a training run: choose another output"
            )
        saved["recipe"].setdefault("noise", 0.0)  # runs begun before there was such a setting
        for name, own in self.identity.items():
            if saved[name] != own:
                changed = {
                    k: (saved[name].get(k), own.get(k)) for k in own if saved[name].get(k) != own[k]
                }
                seeded = (
                    " A new flow's weights are drawn: call torch.manual_seed before it is made."
                    if name == "start" and self.flow.loaded_from is None
                    else ""
                )
                raise ValueError(
                    f"output {self.path.parent} holds a run of another {name}: {changed} "
                    "(then, now); use the same settings, or another output (to train a finished "
                    f"flow further: --init {self.path.parent} and another --output).{seeded}"
                )
        return saved
