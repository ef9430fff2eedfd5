"""Train a flow by maximum likelihood. A run that was killed and resumed ends as if undisturbed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from latent_aug.flows import Flow
from latent_aug.flows.backend import keep_freed_memory, use_full_precision
from latent_aug.flows.base import (
    CARD_NAME,
    CONFIG_NAME,
    RUN_NAME,
    WEIGHTS_NAME,
    compute_bits,
    dequantize,
)
from latent_aug.images.datasets import (
    UInt8Images,
    check_dataset,
    check_same_classes,
    check_sides,
    read_images,
    stack_images,
)
from latent_aug.training.batches import (
    ImageDraws,
    StepSampler,
    choose_places,
    crop_images,
    flip_images,
    make_order_generator,
    sample_draws,
)
from latent_aug.training.processes import Processes
from latent_aug.training.recipe import (
    TrainConfig,
    choose_dtype,
    compute_learning_rate,
    make_average_update,
)
from latent_aug.training.report import (
    FIGURES_NAME,
    LOG_NAME,
    PAIRS_NAME,
    PICTURE_NAME,
    SAMPLES_NAME,
    append_to_log,
    is_log,
    measure_bits_per_dim,
    save_pictures,
)
from latent_aug.utils.files import describe_changes, refuse_changes, remove_partial, replace_file
from latent_aug.utils.hashing import hash_tensors

AnyFlow = TypeVar("AnyFlow", bound=Flow)
WRITTEN = (  # beside the weights
    CARD_NAME,
    FIGURES_NAME,
    CONFIG_NAME,
    PICTURE_NAME,
    SAMPLES_NAME,
    PAIRS_NAME,
    LOG_NAME,
)


@torch.inference_mode(False)  # whatever the caller is in
@torch.enable_grad()
def train_flow(
    flow: AnyFlow,
    dataset: Any,
    config: TrainConfig,
    *,
    validation: Any = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> AnyFlow:
    """Train a copy of a flow by maximum likelihood, and write it to `config.output`.

    Every random choice of a step follows from the seed and the step's number. The state of the
    run is saved every few minutes, and replaces the last one as a whole. A run that is killed and
    started again with the same arguments therefore ends in the weights that it would have reached
    undisturbed. Two runs in two directories agree only with a `network_dtype` other than "auto",
    which is measured.

    Under `accelerate launch` or torchrun each process takes its share of every step's batch, and
    the main one writes. Batches, noise and losses do not depend on the number of processes, so a
    run may be resumed by another number. Only sums of floats come in another order.

    Args:
        flow: An untrained Glow, a trained one to fine-tune, or another flow with `log_prob` and
            weights. It stays as it is, so that the same call resumes the run. A new flow of
            another kind than Glow is resumed by one made after the same `torch.manual_seed`, as
            its first weights belong to the run.
        dataset: Images, or tuples that begin with one: PIL, uint8, or float in [0, 1]. Only a
            class-conditional flow reads classes: the dataset's `targets` or `labels`, or the
            second entries of its tuples. Augment by the config, where it is repeatable.
        config: The recipe.
        validation: Held-out images, which measure the bits/dim of each checkpoint.
        device: The device to train on. By default a CUDA GPU if there is one, each process its
            own.
        progress: Whether to show a progress bar with bits/dim and images/s.

    Returns:
        The trained flow, frozen: the average of its weights over the last steps.
        `load_flow(config.output)` reads the same one.

    Raises:
        FloatingPointError: The loss or its gradient is not finite. The message names the step.
        TypeError: An argument is of another type.
        ValueError: The dataset does not fit the flow, `config.output` holds another run, or the
            processes do not see the same images, or a batch has fewer images than there are
            processes.
        OSError: An image cannot be read, or the saved state is damaged or cannot be written.
        ModuleNotFoundError: There are several processes, and accelerate is missing.

    Source: the paper's A.2, Kingma & Dhariwal 2018, Theis et al. 2016 for the dequantization.

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
    if not isinstance(flow, Flow):
        raise TypeError(f"flow must be a Flow, as load_flow(name) gives, got {flow!r}")
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got a {type(config).__name__}")
    check_dataset("dataset", dataset)
    if validation is not None:
        check_dataset("validation", validation)
    processes = Processes(device, timeout_minutes=config.timeout_minutes)
    if flow.num_classes:
        check_same_classes(dataset, validation)
    images = read_images(flow, dataset, config.size)
    held_out = None if validation is None else read_images(flow, validation, config.size)
    check_sides(images, flow)
    if held_out is not None:
        check_sides(held_out, flow, "validation images")
    if config.crop >= min(images.shape[1:]):
        raise ValueError(
            f"crop must be less than a side of the images, {min(images.shape[1:])} pixels, got "
            f"{config.crop}"
        )
    run = Run(copy.deepcopy(flow).to(processes.device), config, images, processes)
    last_save, loss = time.monotonic(), None
    resumed = f"resumed at step {run.step}" if run.step else "training"
    hidden = not (progress and processes.is_main)
    with tqdm(
        total=config.steps, initial=run.step, unit="step", desc=resumed, disable=hidden
    ) as bar:
        for batch, y in run.read_batches():
            started = time.monotonic()
            loss = run.train_step(batch, y)
            seconds = time.monotonic() - started
            run.seconds += seconds
            bar.update()
            bar.set_postfix_str(f"{loss:.3f} bits/dim, {run.batch_size / seconds:.0f} images/s")
            if time.monotonic() - last_save > 60 * config.checkpoint_minutes:
                run.checkpoint(held_out, loss)
                last_save = time.monotonic()
    if loss is not None:
        run.checkpoint(held_out, loss)
    trained = run.freeze_average()
    if processes.is_main:
        trained.save_pretrained(config.output)
    processes.wait()
    return cast(AnyFlow, trained)


class Likelihood(nn.Module):
    """A flow's bits/dim as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, uniform: Tensor, y: Tensor | None) -> Tensor:
        """Compute the bits/dim (B,) of images.

        Args:
            x: The images (B, C, H, W), in [0, 1].
            uniform: The dequantization noise, in [0, 1), of the same shape.
            y: The classes (B,), for a class-conditional flow.
        """
        return compute_bits(self.flow.log_prob(dequantize(x, uniform), y), x)


class Run:
    """The state of a training run: the flow, its average, the optimizer and the step.

    Args:
        flow: The flow to train, on its device. It is trained in place.
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
                f"batch_size counts the images of all {processes.count} processes together, and "
                f"each needs one, got {self.batch_size}"
            )
        self.places = choose_places(self.batch_size, processes.rank, processes.count)
        self.step, self.seconds = 0, 0.0
        self.path = Path(config.output) / RUN_NAME
        self.identity = self.describe()
        processes.require_same("the flow, its recipe and its images", self.identity)
        if processes.is_main:
            remove_partial(self.path)
        saved = processes.call_on_main(self.load)
        self.dtype_name = (
            saved["dtype_name"]
            if saved
            else processes.call_on_main(lambda: choose_dtype(config, flow, processes.device))
        )
        if not saved and not flow.is_initialized():
            first = self.read_first_batch()
            draws = self.sample_draws(range(len(first)), -1)
            flow.initialize(self.augment(first, draws))
        flow.requires_grad_(True).train()
        keep_freed_memory()
        if saved:
            flow.load_state_dict(saved["flow"])
        # From here on all processes have the main one's weights.
        self.likelihood = processes.share_gradients(Likelihood(flow))
        self.optimizer = torch.optim.Adam(flow.parameters(), lr=config.lr)
        with torch.device("cpu"):  # its counter, whatever the default device
            self.average = AveragedModel(flow, multi_avg_fn=make_average_update(config.ema))
        if saved:
            self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.seconds = saved["step"], saved["seconds"]
        flow.network_dtype = getattr(torch, self.dtype_name)
        if not saved and processes.is_main:
            self.save()  # what was decided and initialised is this run's from now on

    def read_first_batch(self) -> Tensor:
        """Read up to 256 images for the data-dependent initialisation."""
        order = torch.randperm(
            len(self.images), generator=make_order_generator(self.config.seed, -1), device="cpu"
        )
        return stack_images(self.images.__getitems__(order[:256].tolist()))

    def read_batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Read this process's shares of the batches that are left.

        Images are uint8 (B, C, H, W). A class-conditional flow gets classes (B,) beside them.
        """
        sampler = StepSampler(
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
            batch_sampler=sampler,
            num_workers=0 if self.images.kept is not None else self.config.workers,
            collate_fn=stack_images,
            generator=torch.Generator(),  # without one it would draw from the caller's
        )
        with torch.device("cpu"):  # its generator's, whatever the default device
            batches = iter(loader)
        for batch, indices in zip(batches, sampler, strict=True):
            yield batch, self.images.get_classes(indices)

    def sample_draws(self, places: range, step: int) -> ImageDraws:
        """Sample the draws of the images at some places of a step's batch."""
        config, shape = self.config, self.images.shape
        return sample_draws(
            config.seed, step, places, shape, padding=config.crop, noise=config.noise
        )

    def augment(self, batch: Tensor, draws: ImageDraws) -> Tensor:
        """Mirror, crop and add noise as drawn: uint8 images to floats in [0, 1] on the device."""
        if self.config.flip:
            batch = flip_images(batch, draws.mirrored)
        if self.config.crop:
            batch = crop_images(batch, self.config.crop, draws.corners)
        x = batch.to(self.processes.device, torch.float32) / 255
        if self.config.noise:
            x = (x + draws.gaussian.to(x)).clamp(0, 1)
        return x

    def train_step(self, batch: Tensor, y: Tensor | None = None) -> float:
        """Take a step with this process's share of a batch.

        Returns:
            The mean bits/dim of the whole batch.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = compute_learning_rate(self.step, self.config)
        self.optimizer.zero_grad()
        loss = self.processes.add_up(self.backward(batch, y)).item()
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), self.config.clip_norm)
        if not math.isfinite(loss) or not math.isfinite(norm.item()):
            raise FloatingPointError(
                f"step {self.step}: loss {loss}, gradient norm {norm.item()}. Lower lr or raise "
                f"warmup, with another output (last saved state: {self.path})"
            )
        self.optimizer.step()
        self.average.update_parameters(self.flow)
        self.step += 1
        return loss

    def backward(self, batch: Tensor, y: Tensor | None) -> Tensor:
        """Compute the gradients of the whole batch's mean bits/dim.

        The share goes through in `accumulate` parts. The backward pass of the last one brings the
        gradients of all processes together.

        Returns:
            The summand of that mean that comes from this process, a scalar.
        """
        parts = batch.chunk(self.config.accumulate)
        y = None if y is None else y.to(self.processes.device)
        classes = [None] * len(parts) if y is None else y.chunk(self.config.accumulate)
        first, loss = self.places.start, torch.zeros((), device=self.processes.device)
        for number, (part, own) in enumerate(zip(parts, classes, strict=True), 1):
            places = range(first, first + len(part))
            draws = self.sample_draws(places, self.step)
            x, uniform = self.augment(part, draws), draws.uniform.to(self.processes.device)
            last = number == len(parts)
            with (
                nullcontext() if last else self.processes.keep_gradients(self.likelihood),
                use_full_precision(self.processes.device),  # for the backward pass, too
            ):
                bits = self.likelihood(x, uniform, own).sum() / self.batch_size
                self.processes.backward(bits)
            first, loss = places.stop, loss + bits.detach()
        return loss

    def checkpoint(self, held_out: UInt8Images | None, loss: float) -> None:
        """Report and save the run, in the main process."""
        if self.processes.is_main:
            self.report(held_out, loss)  # first: a run saved as finished has its last report
            self.save()

    @property
    def average_flow(self) -> Flow:
        """The flow with averaged weights, as they are now."""
        return cast(Flow, self.average.module)

    def freeze_average(self) -> Flow:
        """Freeze the averaged flow, in evaluation mode and full precision, and return it."""
        flow = self.average_flow.requires_grad_(False).eval()
        flow.network_dtype = None
        flow.loaded_from = flow.read_from = flow.card = None  # those of what it started from
        return flow

    def save(self) -> None:
        """Replace the saved state as a whole: a kill leaves the old one or the new one.

        Raises:
            OSError: It cannot be written.
        """
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
            try:
                torch.save(state, partial)
            except RuntimeError as error:  # as on a full disk, of which torch says nothing
                raise OSError(f"{self.path} cannot be written: {error}") from error

    def report(self, held_out: UInt8Images | None, loss: float) -> None:
        """Log the bits/dim, and save pictures of the averaged flow's images."""
        output, flow, seed = self.path.parent, self.average_flow, self.config.seed
        entry: dict[str, Any] = {
            "step": self.step,
            "minutes": round(self.seconds / 60, 2),
            "train_bits_per_dim": loss,
        }
        if held_out is not None:
            entry["validation_bits_per_dim"] = measure_bits_per_dim(
                flow, held_out, self.config.validation_images, seed
            )
        append_to_log(output, entry)
        save_pictures(flow, self.images if held_out is None else held_out, output, seed)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Describe all that decides the result: recipe, architecture, images, first weights."""
        some = [stack_images(self.images.__getitems__(self.images.spread_indices(64)))]
        some += [] if self.images.labels is None else [self.images.labels]
        # Untrained weights follow from their own seed.
        weights = self.flow.state_dict().values() if self.flow.is_initialized() else ()
        return {
            "recipe": self.config.recipe(),
            "architecture": self.flow.config,
            "data": {"count": len(self.images), "digest": hash_tensors(some)},
            "start": {"digest": hash_tensors(weights)},
        }

    def load(self) -> dict[str, Any] | None:
        """Read the saved state, or None where there is none.

        Raises:
            ValueError: The output holds something else than a state of this run.
            OSError: The state is damaged.
        """
        output = self.path.parent
        if not self.path.exists():
            if (output / WEIGHTS_NAME).exists():
                raise ValueError(
                    f"output {output} holds a flow and no state of its training, so it would be "
                    f"overwritten. Choose another output (to train it further: --init {output})"
                )
            taken = [name for name in WRITTEN if (output / name).exists()]
            if taken and not is_log(output / LOG_NAME):  # no run was begun there
                raise ValueError(
                    f"output {output} holds {taken[0]}, which would be overwritten. Choose another "
                    "output"
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
        remedy = (
            f"use the same settings, or another output. To train a finished flow further: --init "
            f"{output} and another --output"
        )
        if saved["start"] != self.identity["start"] and self.flow.loaded_from is None:
            remedy += ". A new flow's weights are drawn: call torch.manual_seed before it is made"
        changes = describe_changes(saved, self.identity)
        refuse_changes(output, "a training run", changes, remedy)
        return saved
