"""How well flows fit images of many kinds: the tables of checkpoints/README.md.

    python examples/flows/fit.py DATA [FLOW ...] [--photographs FOLDER]
    python examples/flows/fit.py --table

DATA holds <set>/test/<class>/* of cifar10, cifar100, gtsrb_small and tinyimagenet100_small, and of
fashion_mnist, mnist, letters and faces for a flow of one channel. Each flow is looked at as
`latent-aug check` does, on a thousand images of each kind: lossless, saved as JPEG, halved, of 64
pixels, noisy. FOLDER may hold further sets of photographs, a folder each, which are resized to 32
pixels. What is measured already is not measured again.
"""

import argparse
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from latent_aug import Flow, check_flow, load_flow
from latent_aug.images.folders import EncodedImages

sys.path.append(str(Path(__file__).parents[1] / "paper"))
from records import append_line, read_lines

RESULTS = Path(__file__).parents[1] / "results" / "fit.jsonl"
LOCK = Path(__file__).parents[2] / "runs" / "fit.lock"
FLOWS = ("glow-photographs", "glow-cifar10-small", "glow-cifar10", "glow-fashionmnist")
COUNT = 1000
Change = Callable[[Image.Image], Image.Image]


def keep(image: Image.Image) -> Image.Image:
    """The image as it is."""
    return image


def save_as_jpeg(image: Image.Image) -> Image.Image:
    """The image as a JPEG of quality 75, PIL's default."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file).convert("RGB")


def halve(image: Image.Image) -> Image.Image:
    """The image at half its size, as torchvision's Resize does it."""
    size = (image.width // 2, image.height // 2)
    return image.resize(size, Image.Resampling.BILINEAR)


def add_noise(levels: float) -> Change:
    """A function that adds Gaussian noise of so many grey levels."""

    def change(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image, dtype=np.float64)
        seed = int(pixels.sum())
        noisy = pixels + levels * np.random.default_rng(seed).normal(size=pixels.shape)
        return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))

    return change


KINDS: dict[str, tuple[str, Change]] = {
    "CIFAR-10": ("cifar10", keep),
    "CIFAR-100": ("cifar100", keep),
    "CIFAR-10, JPEG": ("cifar10", save_as_jpeg),
    "CIFAR-100, JPEG": ("cifar100", save_as_jpeg),
    "traffic signs": ("gtsrb_small", keep),
    "Tiny ImageNet, halved": ("tinyimagenet100_small", halve),
    "Tiny ImageNet, 64 pixels": ("tinyimagenet100_small", keep),
    "CIFAR-10, noise of 2 levels": ("cifar10", add_noise(2)),
    "CIFAR-10, noise of 5 levels": ("cifar10", add_noise(5)),
    "CIFAR-10, noise of 10 levels": ("cifar10", add_noise(10)),
}
GREY = {  # of 28 pixels
    "FashionMNIST": "fashion_mnist",
    "MNIST": "mnist",
    "letters": "letters",
    "faces": "faces",
    "CIFAR-10, grey": "cifar10",
}


def make_grey(image: Image.Image) -> Image.Image:
    """The image in one channel."""
    return image.convert("L")


def read_some(folder: Path, change: Change) -> list[Image.Image]:
    """Up to `COUNT` changed images of a folder tree, evenly spread."""
    images = EncodedImages(folder)
    places = np.linspace(0, len(images) - 1, min(COUNT, len(images))).round().astype(int)
    return [change(images[int(place)].convert("RGB")) for place in places]


def list_kinds(
    channels: int, data: Path, photographs: Path | None
) -> Iterator[tuple[str, Path, Change, int]]:
    """Name, folder, change and side of each kind of image, for flows of so many channels."""
    if channels == 1:
        for name, source in GREY.items():
            yield name, data / source / "test", make_grey, 28
        return
    for name, (source, change) in KINDS.items():
        yield name, data / source / "test", change, 64 if "64" in name else 32
    for folder in sorted(photographs.iterdir()) if photographs else ():
        yield f"photographs: {folder.name}", folder, keep, 32


def measure_fit(flow: Flow, images: list[Image.Image], side: int) -> dict[str, Any]:
    """The figures of a flow on images, as JSON knows them."""
    found = check_flow(flow, images, size=side, count=COUNT)
    at_eps = found.at_eps
    return {
        "images": found.figures["images"],
        "bits_per_dim": round(found.figures["bits_per_dim"], 3),
        "latent_std": found.figures["latent_std"],
        "uint8_identical": found.figures["uint8_identical"],
        "eps": found.eps,
        "fallbacks": at_eps["fallbacks"],
        "saturated": round(at_eps["saturated"], 4),
        "smoothness": round(at_eps["smoothness"], 3),
        "grade": found.grade,
        "fingerprint": flow.fingerprint(),
    }


def draw_table(flow: str, rows: list[dict[str, Any]]) -> str:
    """A flow's figures as Markdown."""
    lines = [
        "| images | bits/dim | std a level, finest first | eps | cannot be perturbed | check |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['kind']} | {row['bits_per_dim']:.2f} | "
        f"{' '.join(f'{std:.2f}' for std in row['latent_std'])} | {row['eps']:.2f} | "
        f"{row['fallbacks']:.1%} | {row['grade']} |"
        for row in rows
        if row["flow"] == flow
    ]
    return "\n".join([f"`{flow}`:", "", *lines, ""])


def main() -> None:
    """Measure what is missing, or draw the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("flows", nargs="*", default=FLOWS)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--table", action="store_true", help="print the tables, measure nothing")
    args = parser.parse_args()
    rows = read_lines(RESULTS)
    if args.table:
        print("\n".join(draw_table(flow, rows) for flow in FLOWS))
        return
    if args.data is None:
        parser.error("DATA is needed")
    torch.set_grad_enabled(False)
    done = {(row["flow"], row["kind"], row["fingerprint"]) for row in rows}
    for name in args.flows:
        flow = load_flow(name)
        kinds = [*list_kinds(flow.channels, args.data, args.photographs)]
        for kind, folder, change, side in tqdm(kinds, desc=name):
            if (name, kind, flow.fingerprint()) not in done:
                found = measure_fit(flow, read_some(folder, change), side)
                append_line(RESULTS, {"flow": name, "kind": kind, **found}, lock=LOCK)


if __name__ == "__main__":
    main()
