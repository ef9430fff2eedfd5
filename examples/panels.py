"""What `draw_pages.py` draws with: photographs, perturbations, and rows of labelled images."""

import re
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

from latent_aug import Flow, LatentPerturb
from latent_aug.diagnostics.explore import PHOTOGRAPHS

EXTEND = Path(__file__).parents[1] / "docs" / "extend.md"
ASTRONAUT, CAT = PHOTOGRAPHS
CHANGE, BOLD = "its change, 4 times", {"fontsize": 10, "fontweight": "bold"}
Row = list[tuple[str, Any]]  # titles and images


def read_photograph(path: Path, side: int = 64) -> Tensor:
    """Read a photograph as uint8 (3, side, side)."""
    return tvf.resize(tvf.pil_to_tensor(Image.open(path)), [side, side])


def read_sample(name: str, top: int, left: int, width: int, side: int) -> Tensor:
    """Cut a square from a picture of scikit-image, as uint8 (C, side, side)."""
    from skimage import data

    return tvf.resized_crop(
        tvf.to_image(getattr(data, name)()), top, left, width, width, [side, side]
    ).as_subclass(Tensor)


def read_tissue() -> Tensor:
    """Read stained tissue."""
    return read_sample("immunohistochemistry", 0, 256, 256, 128)


def read_class(name: str) -> Any:
    """Define a class as docs/extend.md does."""
    text = EXTEND.read_text()
    found = re.search(rf"class {name}\(.*?(?=\n\n\n|\n```)", text, re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "Flow": Flow, "LatentPerturb": LatentPerturb}
    exec(found[0] if found else "", names)
    return names[name]


def perturb(
    image: Any, eps: float = 0.5, seed: int = 0, kind: type[Any] = LatentPerturb, **options: Any
) -> Any:
    """Perturb by the draws of a seed."""
    torch.manual_seed(seed)
    return kind(eps, **options)(image)


def amplify(before: Tensor, after: Tensor) -> Tensor:
    """Four times the change, on grey."""
    change = tvf.to_dtype(after, scale=True) - tvf.to_dtype(before, scale=True)
    return (4 * change + 0.5).clamp(0, 1)


def describe(image: Any) -> tuple[str, Any]:
    """Say which kind of input it is."""
    if isinstance(image, Image.Image):
        return f"PIL image, {image.mode}\n{image.width} x {image.height}", image
    kind = "tv_tensors.Mask" if isinstance(image, tv_tensors.Mask) else f"{image.dtype} tensor"
    return f"{kind.removeprefix('torch.')}\n{tuple(image.shape)}", image


def show(axes: Any, title: str, image: Any) -> None:
    """Draw an image, PIL or (C, H, W). In its place may be text, or None."""
    axes.set(xticks=[], yticks=[], box_aspect=1)
    axes.set_title(title, fontsize=9)
    if isinstance(image, str):
        axes.text(0.5, 0.5, image, ha="center", va="center", color="firebrick", fontsize=9)
        return
    axes.set_axis_off()
    if image is not None:
        pixels = tvf.to_pil_image(image) if isinstance(image, Tensor) else image
        axes.imshow(pixels, interpolation="nearest", cmap="gray", vmin=0, vmax=255)


def lay_out(rows: dict[str, Row], side: float = 1.7) -> Figure:
    """Draw rows of images, each below a sentence."""
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(columns * side, len(rows) * (side + 0.6)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (sentence, row) in zip(parts, rows.items(), strict=True):
        part.suptitle(sentence, **BOLD)
        for axes, (title, image) in zip(part.subplots(1, columns), row, strict=True):
            show(axes, title, image)
    return figure
