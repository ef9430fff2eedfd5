"""One training run of a classifier on few labelled images: data, network, loop, figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from networks import NETWORKS
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import ImageFolder

from latent_aug.images.datasets import to_uint8
from latent_aug.utils.files import replace_file

if TYPE_CHECKING:
    from methods import Method

VALIDATION_IMAGES = 5000  # at most, of those without labels
VALIDATION_SHARE = 0.2  # of the labelled images, where there are no others


@dataclass(frozen=True)
class Images:
    """8-bit images (N, C, H, W) in memory, and their classes (N,)."""

    pixels: Tensor
    labels: Tensor
    classes: int


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What every method of a table shares.

    Args:
        per_class: Labelled images of each class; all of them if None.
        epochs: Passes over them.
        network: Of networks.py: "resnet" (small), "preactivation", "resnet18", "cnn" or "lenet5".
        channels: Of the images.
        width: Channels of the network's first stage.
        batch_size: Images a step.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adam".
        schedule: Of the learning rate: "one cycle", "exponential" decay to `final_lr`, "steps", a
            fifth after 30, 60 and 80 % (the paper's CIFAR setting), or "quarters", a tenth after
            each quarter (its SVHN setting).
        lr: Greatest learning rate.
        final_lr: Share of it at the end of an exponential decay.
        weight_decay: Of the optimizer.
        label_smoothing: Share of the label that all classes divide among themselves.
        average: Decay a step of the moving average of weights and statistics that is evaluated. At
            0 the weights themselves are.
        test: Evaluate on the test images. Otherwise on up to 5,000 training images that are not
            labelled, or, where all are, on a fifth of them, which is not trained on.
        data_seed: Which images of a class are labelled. If None, each seed has a draw of its own,
            of the same number.
        size: Resize images to this side; None leaves them.
        precision: In which the classifier computes, and coupling networks where a recipe lowers
            theirs: "bfloat16", or "float32" on processors that are slow in it.
    """

    per_class: int | None = 250
    epochs: int = 60
    network: str = "resnet"
    channels: int = 3
    width: int = 32
    batch_size: int = 128
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Literal["one cycle", "exponential", "steps", "quarters"] = "one cycle"
    lr: float = 0.1
    final_lr: float = 0.1
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    average: float = 0.0
    test: bool = False
    data_seed: int | None = None
    size: int | None = None
    precision: Literal["bfloat16", "float32"] = "bfloat16"


def read_images(folder: Path, size: int | None = None, channels: int = 3) -> Images:
    """Every image of <folder>/<class>/*, in order."""
    return stack_images(ImageFolder(str(folder)), size, channels)


def stack_images(
    samples: Iterable[tuple[Any, int]], size: int | None = None, channels: int = 3
) -> Images:
    """Every image and class of a data set, in its order."""
    read = [(to_uint8(sample, channels, size), int(sample[1])) for sample in samples]
    labels = torch.tensor([label for _, label in read])
    return Images(torch.stack([image for image, _ in read]), labels, int(labels.max()) + 1)


def labelled(train: Images, protocol: Protocol) -> Images:
    """The labelled images of each class: draw 0 where the protocol names none."""
    return select(train, divide(train, protocol)[0])


def select(images: Images, index: Tensor | slice) -> Images:
    """Some of them."""
    return Images(images.pixels[index], images.labels[index], images.classes)


def divide(train: Images, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """The indices of the labelled images of each class, and of all others in an order of chance."""
    generator = torch.Generator().manual_seed(protocol.data_seed or 0)
    order = torch.randperm(len(train.labels), generator=generator)
    chosen = [order[train.labels[order] == c][: protocol.per_class] for c in range(train.classes)]
    # One of each class in turn, so that any first part is as balanced as the whole.
    places = torch.cat([torch.arange(len(part)) for part in chosen])
    index = torch.cat(chosen)[places.argsort(stable=True)]
    return index, order[~torch.isin(order, index)]


def draw_images(images: Images, per_class: int, seed: int) -> tuple[Images, Images]:
    """Some images of each class, drawn by the seed, and up to 5,000 of the others."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))
    labels = images.labels[order]
    chosen = torch.cat([order[labels == c][:per_class] for c in range(images.classes)])
    rest = torch.cat([order[labels == c][per_class:] for c in range(images.classes)])
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    return select(images, chosen), select(images, rest[:VALIDATION_IMAGES])


def split(train: Images, test: Images | None, protocol: Protocol) -> tuple[Images, Images]:
    """Divide images into those to train and to evaluate on."""
    index, others = divide(train, protocol)
    own = select(train, index)
    if protocol.test:
        if test is None:
            raise ValueError("test=True needs test images")
        return own, test
    if len(others):
        return own, select(train, others[:VALIDATION_IMAGES])
    last = round(len(own.labels) * (1 - VALIDATION_SHARE))
    return select(own, slice(None, last)), select(own, slice(last, None))


class Standardized(nn.Module):
    """A network that takes images in [0, 1]."""

    def __init__(self, network: nn.Module, pixels: Tensor, precision: str) -> None:
        super().__init__()
        self.lower = precision == "bfloat16"
        sample = pixels.float() / 255
        self.register_buffer("mean", sample.mean(dim=(0, 2, 3), keepdim=True))
        self.register_buffer("std", sample.std(dim=(0, 2, 3), keepdim=True))
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits, in float32 also where bfloat16 computes them."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.lower):
            logits: Tensor = self.network((x - self.mean) / self.std)
        return logits.float()


def make_optimizer(
    model: nn.Module, protocol: Protocol, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Make an optimizer with its schedule over all steps of a run."""
    parameters, decay = model.parameters(), protocol.weight_decay
    optimizer: torch.optim.Optimizer
    if protocol.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, protocol.lr, weight_decay=decay)
    elif protocol.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters, protocol.lr, momentum=0.9, nesterov=True, weight_decay=decay
        )
    else:
        raise ValueError(f"optimizer must be sgd or adam, got {protocol.optimizer!r}")
    schedulers = torch.optim.lr_scheduler
    if protocol.schedule == "one cycle":
        return optimizer, schedulers.OneCycleLR(optimizer, protocol.lr, total_steps=steps)
    if protocol.schedule == "exponential":
        final = protocol.final_lr
        return optimizer, schedulers.LambdaLR(optimizer, lambda step: final ** (step / steps))
    if protocol.schedule == "steps":
        shares, factor = (0.3, 0.6, 0.8), 0.2
    elif protocol.schedule == "quarters":
        shares, factor = (0.25, 0.5, 0.75), 0.1
    else:
        raise ValueError(f"there is no schedule {protocol.schedule!r}")
    milestones = [round(share * steps) for share in shares]
    return optimizer, schedulers.MultiStepLR(optimizer, milestones, factor)


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """A moving average of weights and of statistics."""
    average = get_ema_multi_avg_fn(decay)
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def run(
    method: Method,
    train: Images,
    evaluated: Images,
    protocol: Protocol,
    *,
    seed: int,
    on_epoch: Callable[[int, float], object] = lambda epoch, loss: None,
    state: Path | None = None,
    save_seconds: float = 180.0,
) -> dict[str, float]:
    """Train and evaluate; accuracies in per cent, losses in nats, seconds.

    Args:
        method: See methods.py.
        train: Images to train on.
        evaluated: Images to evaluate on.
        protocol: What all methods share.
        seed: Seed of the weights, of the order of images and of all augmentations.
        on_epoch: Called after each epoch with the number of epochs so far and the mean loss.
        state: A file that keeps the training state. A run that finds it goes on from there, to the
            same figures.
        save_seconds: Time between two savings of it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True  # on a GPU: nearly all batches are of one shape
    torch.manual_seed(seed)
    network = NETWORKS[protocol.network](protocol.channels, train.classes, protocol.width)
    model = Standardized(network, train.pixels, protocol.precision).to(device)
    augment = method(model, train.classes)
    per_epoch = len(train.labels) // protocol.batch_size
    if per_epoch == 0:
        raise ValueError(f"a batch of {protocol.batch_size} needs more than {len(train.labels)}")
    steps = protocol.epochs * per_epoch
    optimizer, schedule = make_optimizer(model, protocol, steps)
    averaged = average_weights(model, protocol.average) if protocol.average else None
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    parts |= {"averaged": averaged} if averaged else {}
    at = {"step": 0, "order": torch.empty(0), "total": torch.zeros(()), "spent": (0.0, 0.0)}
    if state is not None and state.exists():
        at = load_state(state, parts)
    order, total = at["order"], at["total"].to(device)
    started = time.perf_counter() - at["spent"][0]
    computed = time.process_time() - at["spent"][1]
    saved = time.perf_counter()
    for step in range(at["step"], steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.randperm(len(train.labels))
            total = torch.zeros((), device=device)
        augment.begin(epoch / protocol.epochs)
        chosen = order[place * protocol.batch_size : (place + 1) * protocol.batch_size]
        x, y = augment(train.pixels[chosen].to(device), train.labels[chosen].to(device))
        loss = F.cross_entropy(model(x), y, label_smoothing=protocol.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if averaged:
            averaged.update_parameters(model)
        total += loss.detach()
        if place == per_epoch - 1:
            on_epoch(epoch + 1, float(total) / per_epoch)
        if state is not None and time.perf_counter() - saved >= save_seconds:
            spent = (time.perf_counter() - started, time.process_time() - computed)
            at = {"step": step + 1, "order": order, "total": total, "spent": spent}
            save_state(state, parts, at)
            saved = time.perf_counter()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - computed
    accuracy, loss = evaluate(averaged or model, evaluated)
    train_accuracy, train_loss = evaluate(averaged or model, train)
    return {
        "accuracy": accuracy,
        "loss": loss,
        "train_accuracy": train_accuracy,
        "train_loss": train_loss,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),  # other work on the machine hardly matters to it
    }


def round_figures(found: dict[str, float]) -> dict[str, float]:
    """Round what a line of results keeps of a run."""
    return {
        "accuracy": round(found["accuracy"], 2),
        "loss": round(found["loss"], 4),
        "train_accuracy": round(found["train_accuracy"], 2),
        "cpu_seconds": round(found["cpu_seconds"], 1),
    }


def save_state(path: Path, parts: dict[str, Any], at: dict[str, Any]) -> None:
    """Keep all that the next step depends on; what was kept before stays until this is whole.

    Transforms keep nothing themselves: they draw from torch's global generators.
    """
    generators = [torch.get_rng_state()]
    if torch.cuda.is_available():
        generators += torch.cuda.get_rng_state_all()
    content = {name: part.state_dict() for name, part in parts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path, flush=True) as partial:
        torch.save({**content, "at": at, "generators": generators}, partial)


def load_state(path: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """Put the parts and torch's generators back; the place in the training, as `save_state` got."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(content[name])
    own, *others = content["generators"]
    torch.set_rng_state(own)
    if torch.cuda.is_available() and others:
        torch.cuda.set_rng_state_all(others)
    return content["at"]


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Accuracy in per cent and mean cross-entropy."""
    model.eval()
    device = next(model.parameters()).device
    right, total = 0, 0.0
    for pixels, labels in zip(images.pixels.split(500), images.labels.split(500), strict=True):
        logits = model(pixels.to(device) / 255)
        right += int((logits.argmax(dim=1) == labels.to(device)).sum())
        total += F.cross_entropy(logits, labels.to(device), reduction="sum").item()
    model.train()
    return 100 * right / len(images.labels), total / len(images.labels)
