"""Class-specific VAE-GANs behind the contract of a flow, for the baseline of Stutz et al. 2019.

    python examples/paper/vae_gan.py DATA/fashion_mnist/train FOLDER/vae-gan-fashion_mnist

An encoder and a decoder for each class, trained beside a discriminator on that class alone; the
same command goes on with the classes that are missing. With --per-class it has the very images that
the tables' classifiers are trained on. Written anew, with the hyperparameters in
the A.2 of the paper that is reproduced here and without a look at their code; what A.2 does not say
is decided here: the width of the networks (that of the classifier in Table 4), an L1 reconstruction
summed over pixels, and a discriminator that sees reconstructions and samples.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from protocol import Images, Protocol, labelled, read_images
from torch import Tensor, nn
from tqdm import tqdm

from latent_aug import Flow
from latent_aug.utils.files import read_json, replace_file, write_json
from latent_aug.utils.hashing import hash_tensors


class VaeGan(Flow):
    """An encoder and a decoder a class; decoding undoes encoding only about.

    The latent's `dims` numbers are the first of a tensor of the image's shape, its level 1; the
    others, level 0, are zero and mean nothing, so perturb it with ``levels=-1``. There is no
    density. Encoding gives the posterior's mean.

    Args:
        channels: Channels of the images.
        height: Of the images.
        width: Of the images.
        num_classes: Classes, each with networks of its own.
        dims: Length of the latent.
        hidden: Channels of the first of three convolutions, which double.
    """

    levels = 2
    spatial = False

    def __init__(
        self,
        channels: int = 1,
        height: int = 28,
        width: int = 28,
        *,
        num_classes: int = 10,
        dims: int = 10,
        hidden: int = 16,
    ) -> None:
        super().__init__()
        self.channels, self.size, self.num_classes = channels, (height, width), num_classes
        self.dims, self.hidden = dims, hidden
        shape = (channels, height, width)
        self.encoders = nn.ModuleList(
            convolutions(shape, hidden, 2 * dims) for _ in range(num_classes)
        )
        self.decoders = nn.ModuleList(
            transposed_convolutions(shape, hidden, dims) for _ in range(num_classes)
        )

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of classes (B,) to latents of their shape."""
        code = self._by_class(self.encoders, x, y, 2 * self.dims)[:, : self.dims]
        return self.join_levels([x.new_zeros(len(x), x[0].numel() - self.dims), code])

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Latents (B, C, H, W) to images in [0, 1]: about what was encoded."""
        return self._by_class(self.decoders, self.split_levels(z)[1], y, *z.shape[1:])

    def split_levels(self, z: Tensor) -> list[Tensor]:
        """Divide into what means nothing, (B, C H W - dims), and the latent proper, (B, dims)."""
        flat = z.flatten(1)
        return [flat[:, self.dims :], flat[:, : self.dims]]

    def join_levels(self, parts: Sequence[Tensor]) -> Tensor:
        """Undo `split_levels`."""
        assert self.size is not None
        return torch.cat([parts[1], parts[0]], dim=1).view(-1, self.channels, *self.size)

    def _by_class(
        self, networks: nn.ModuleList, t: Tensor, y: Tensor | None, *shape: int
    ) -> Tensor:
        """Each sample through its class's network."""
        if y is None or y.is_floating_point():
            raise ValueError(f"y must give each image's class as an integer, got {y}")
        result = t.new_zeros(len(t), *shape)
        for label in y.unique().tolist():
            where = (y == label).nonzero().flatten()
            result = result.index_copy(0, where, networks[label](t[where]))
        return result

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        assert self.size is not None
        height, width = self.size
        sizes = {"channels": self.channels, "height": height, "width": width}
        return {**sizes, "num_classes": self.num_classes, "dims": self.dims, "hidden": self.hidden}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VaeGan:
        """Build one from one's own training; not checked as a flow from outside would be."""
        return cls(**config)


def halved(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Sizes after each of three halvings, largest first."""
    return [(shape[1] // 2**i, shape[2] // 2**i) for i in range(4)]


def convolutions(shape: tuple[int, ...], hidden: int, outputs: int) -> nn.Sequential:
    """Three convolutions that halve the image, and a linear layer."""
    layers: list[nn.Module] = []
    widths = [shape[0], hidden, 2 * hidden, 4 * hidden]
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(widths[-1] * math.prod(halved(shape)[-1]), outputs)
    )


def transposed_convolutions(shape: tuple[int, ...], hidden: int, inputs: int) -> nn.Sequential:
    """The mirror image of `convolutions`, into [0, 1]."""
    widths, sizes = [4 * hidden, 2 * hidden, hidden, shape[0]], halved(shape)[::-1]
    layers: list[nn.Module] = [
        nn.Linear(inputs, widths[0] * math.prod(sizes[0])),
        nn.Unflatten(1, (widths[0], *sizes[0])),
    ]
    for i, (before, after) in enumerate(pairwise(widths)):
        odd = (sizes[i + 1][0] - 2 * sizes[i][0], sizes[i + 1][1] - 2 * sizes[i][1])
        layers += [nn.BatchNorm2d(before), nn.ReLU()]
        layers.append(nn.ConvTranspose2d(before, after, 4, 2, 1, output_padding=odd))
    return nn.Sequential(*layers, nn.Sigmoid())


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one class is trained; the paper's A.2 for FashionMNIST.

    Args:
        beta: Weight of the reconstruction.
        gamma: Weight of fooling the discriminator. The paper's third weight, eta, is 0.
        epochs: Passes over the class.
        batch_size: Images a step.
        lr: Adam's, at first.
        decay: Factor of the learning rate an epoch.
        weight_decay: Adam's.
    """

    beta: float = 2.75
    gamma: float = 1.0
    epochs: int = 60
    batch_size: int = 100
    lr: float = 0.005
    decay: float = 0.9
    weight_decay: float = 1e-4


def train_class(
    encoder: nn.Module, decoder: nn.Module, critic: nn.Module, pixels: Tensor, how: Training
) -> float:
    """Train one class's networks on its images (N, C, H, W), uint8; the last epoch's L1 a pixel."""
    parts = (encoder, decoder, critic)
    optimizers = [
        torch.optim.Adam(part.parameters(), how.lr, weight_decay=how.weight_decay) for part in parts
    ]
    error = 0.0
    for _ in range(how.epochs):
        order, error = torch.randperm(len(pixels)), 0.0
        batches = [part for part in order.split(how.batch_size) if len(part) > 1]
        for chosen in batches:
            x = pixels[chosen] / 255
            losses, reconstruction = compute_losses(*parts, x, how)
            for part, optimizer, loss in zip(parts, optimizers, losses, strict=True):
                optimizer.zero_grad()
                loss.backward(inputs=list(part.parameters()), retain_graph=True)
            for optimizer in optimizers:
                optimizer.step()
            error += reconstruction / len(batches)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= how.decay
    return error


def compute_losses(
    encoder: nn.Module, decoder: nn.Module, critic: nn.Module, x: Tensor, how: Training
) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Compute what encoder, decoder and discriminator minimise, and the L1 error of a pixel."""
    mean, log_variance = encoder(x).chunk(2, dim=1)
    log_variance = log_variance.clamp(-10, 10)
    code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    images = decoder(torch.cat([code, torch.randn_like(code)]))  # reconstructions and samples
    reconstruction = (images[: len(x)] - x).abs().flatten(1).sum(dim=1).mean()
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()
    fake, real = critic(images), critic(x)
    fooled = F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
    told = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    told = told + F.binary_cross_entropy_with_logits(critic(images.detach()), fake.detach() * 0)
    weighted = how.beta * reconstruction
    losses = (weighted + divergence, weighted + how.gamma * fooled, told)
    return losses, reconstruction.item() / x[0].numel()


@torch.no_grad()
def reconstruction_error(model: VaeGan, images: Images) -> float:
    """L1 of a pixel in [0, 1] that is encoded and decoded, on average."""
    total = 0.0
    for pixels, y in zip(images.pixels.split(500), images.labels.split(500), strict=True):
        x = pixels / 255
        total += (model.decode(model.encode(x, y), y) - x).abs().sum().item()
    return total / images.pixels.numel()


def check_settings(path: Path, own: dict[str, Any]) -> None:
    """Keep the settings of a training that begins; refuse others where it goes on."""
    if path.exists() and (then := read_json(path)) != own:
        other = {name: (then.get(name), own[name]) for name in own if then.get(name) != own[name]}
        raise SystemExit(
            f"{path.parent} is of other settings or images, {other} (then, now): choose another"
        )
    write_json(path, own)


def main() -> None:
    """Train the classes that are missing, then write the whole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="a folder of <class>/<image>")
    parser.add_argument("output", type=Path)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--per-class", type=int, help="the labelled images of a table; else all")
    parser.add_argument("--dims", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    parser.add_argument("--beta", type=float, default=Training.beta)
    parser.add_argument("--decay", type=float, default=Training.decay, help="of the rate, an epoch")
    args = parser.parse_args()
    how = dataclasses.replace(Training(), epochs=args.epochs, beta=args.beta, decay=args.decay)
    every = read_images(args.images, channels=args.channels)
    images = labelled(every, Protocol(per_class=args.per_class))
    shape = tuple(images.pixels.shape[1:])
    torch.manual_seed(0)
    model = VaeGan(*shape, num_classes=images.classes, dims=args.dims, hidden=args.hidden)
    args.output.mkdir(parents=True, exist_ok=True)
    seen = {"images": hash_tensors([images.pixels, images.labels])[:16]}
    settings = {**model.config, **dataclasses.asdict(how), **seen}
    check_settings(args.output / "training.json", settings)
    for label in tqdm(range(images.classes), unit="class"):
        path = args.output / f"class-{label}.pt"
        own = nn.ModuleList([model.encoders[label], model.decoders[label]])
        if not path.exists():
            torch.manual_seed(label)
            pixels = images.pixels[images.labels == label]
            error = train_class(*own, convolutions(shape, args.hidden, 1), pixels, how)
            with replace_file(path) as partial:
                torch.save(own.state_dict(), partial)
            print(f"class {label}: L1 of a pixel {error:.4f}", flush=True)
        own.load_state_dict(torch.load(path, weights_only=True))
    model.eval().save_pretrained(args.output)
    error = reconstruction_error(model, images)
    write_json(args.output / "figures.json", {"images": len(images.labels), "l1": error})
    print(f"L1 of a pixel, encoded and decoded: {error:.4f}")


if __name__ == "__main__":
    main()
