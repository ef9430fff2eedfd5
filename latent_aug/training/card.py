"""The card of a trained flow: its training data, its command and its figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torchvision

from latent_aug.diagnostics.figures import preview
from latent_aug.diagnostics.measure import measure_flow, write_rows
from latent_aug.flows import ConditionalDenseFlow, Flow, Glow
from latent_aug.flows.base import CARD_NAME, WEIGHTS_NAME
from latent_aug.images.datasets import UInt8Images
from latent_aug.training.report import FIGURES_NAME, PICTURE_NAME
from latent_aug.transforms.random import LatentPerturb
from latent_aug.utils.files import compute_sha256

PICTURED = 4  # samples
TEMPERATURE = 0.7

TEMPLATE = """\
---
license: {quoted_licence}
library_name: latent-aug
pipeline_tag: unconditional-image-generation
tags: [normalizing-flow, {tag}, data-augmentation, image-classification]
{datasets}metrics: [bits-per-dimension]
model-index:
- name: {quoted_name}
  results:
  - task: {{type: unconditional-image-generation}}
    dataset: {{name: {quoted_images}, type: image-folder}}
    metrics:
    - {{type: bits-per-dimension, value: {bits_per_dim:.3f}}}
    - {{type: round-trip-max-error, value: {round_trip_max_error:.1e}}}
---
# {name}

A {kind} flow for latent perturbations with [latent-aug](https://pypi.org/project/latent-aug/),
after Yüksel et al. 2021, [Semantic Perturbations with Normalizing Flows for Improved
Generalization](https://arxiv.org/abs/2108.07958).

```python
from latent_aug import LatentPerturb

augment = LatentPerturb(eps={eps:g}, flow="{name}"{copy})
```

## The flow

{architecture}

SHA-256 of `{weights}`: `{sha256}`.

## Training

{origin} by maximum likelihood on {training_data}.
It saw {images_seen:,} images in {minutes:.0f} minutes. The command was

```
{command}
```

with torch {torch} and torchvision {torchvision}. Licence of the weights: {licence}.
{note}
## Measured

On {images:,} images, {measured_on}:

- {bits_per_dim:.3f} bits per dimension.
- The greatest error of a round trip in float32 is {round_trip_max_error:.1e}, on pixels in [0, 1].
- {uint8_identical:,} of {images:,} images come back byte for byte as uint8.
- The standard deviation of the latents, finest level first, is {latent_std}.
  The prior's is 1. Encoding images at the middle of their bins, without dequantization noise,
  lowers it.

The table shows what random perturbations change. Images that *fall back* cannot be perturbed by the
flow and come back unchanged. Values *out of range* leave [0, 1] by more than one grey level.

{table}

{verdict}

Suggested: eps {eps:g} with the linf norm. `latent-aug check` finds one for your images.

![Samples of the flow, perturbed, and samples at several temperatures]({picture})
"""

GLOW = """\
It maps images of {channels} channel(s) by {levels} levels of {steps} steps. Its coupling networks
have {hidden} channels, and log-scales are bounded by {log_scale_bound:g}. It has {parameters:,}
parameters. Height and width must be multiples of {multiple}. Transforms pad and crop to that."""
DENSE = """\
This is the paper's class-conditional flow (Table 3). It has {steps} fully connected couplings, each
followed by a fixed permutation. Their networks have a hidden layer of {hidden}, and log-scales are
clamped to {clamp:g}. It has {parameters:,} parameters.

Images are {channels} x {height} x {width}, of {num_classes} classes. The flow needs the classes, so
call a transform with (image, class) samples, see `labels_getter`."""


def write_card(
    flow: Glow | ConditionalDenseFlow,
    images: UInt8Images,
    output: Path,
    *,
    command: str,
    training_data: str,
    fine_tuned_from: str | None = None,
    measured_on: str,
    images_seen: int,
    minutes: float,
    licence: str,
    eps: float = 0.25,
    verdict: str,
    note: str = "",
    dataset: str | None = None,
    size: int | None = None,
) -> dict[str, Any]:
    """Measure a flow that was saved in `output`, write its card there, and return the figures.

    The card's picture shows samples of the flow, so that no training image is published.

    Args:
        flow: The flow as saved in `output`.
        images: The held-out images to measure it on.
        output: The directory of the flow. Its name becomes the flow's name.
        command: The command that made the flow.
        training_data: The training images, in words.
        fine_tuned_from: The flow that training began with, if it was not a new one.
        measured_on: The held-out images, in words.
        images_seen: The number of images that went through training.
        minutes: The time that training took.
        licence: The licence of the weights.
        eps: The suggested linf eps.
        verdict: What `check_flow` finds, its `verdict`.
        note: A paragraph on the training, such as caveats of the data.
        dataset: The name of the training data on the Hugging Face hub, for the card's metadata.
        size: The side that images were resized to. Larger ones are perturbed by such a copy.
    """
    figures = measure_flow(flow, images, progress=True)
    height, width = images[0].shape[1:]
    save_samples(flow, (height, width), eps, output / PICTURE_NAME)
    parameters = sum(p.numel() for p in flow.parameters())
    kind = GLOW if isinstance(flow, Glow) else DENSE
    sizes = {**flow.config, "parameters": parameters, "multiple": flow.multiple}
    text = TEMPLATE.format(
        **{name: math.nan if value is None else value for name, value in figures.items()},
        name=output.resolve().name,
        quoted_name=json.dumps(output.resolve().name),
        quoted_images=json.dumps(measured_on),
        kind="Glow" if isinstance(flow, Glow) else "class-conditional",
        tag="glow" if isinstance(flow, Glow) else "conditional",
        architecture=kind.format(**sizes),
        weights=WEIGHTS_NAME,
        picture=PICTURE_NAME,
        sha256=compute_sha256(output / WEIGHTS_NAME),
        table="\n".join(write_rows(figures)),
        verdict=verdict,
        command=command,
        training_data=training_data,
        origin=f"Fine-tuned from {fine_tuned_from}" if fine_tuned_from else "Trained",
        measured_on=measured_on,
        images_seen=images_seen,
        minutes=minutes,
        licence=licence,
        quoted_licence=json.dumps(licence),
        eps=eps,
        copy=f", resolution={size}" if size else "",
        note=f"\n{note}\n" if note else "",
        datasets=f"datasets: [{json.dumps(dataset)}]\n" if dataset else "",
        torch=torch.__version__,
        torchvision=torchvision.__version__,
    )
    # A path that is no UTF-8 comes with surrogates, which cannot be encoded otherwise.
    (output / CARD_NAME).write_bytes(text.encode("utf-8", "backslashreplace"))
    (output / FIGURES_NAME).write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def save_samples(flow: Flow, size: tuple[int, int], eps: float, path: Path) -> None:
    """Save a picture of samples (H, W), perturbed by half of eps, by eps and by twice eps."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(PICTURED, device=flow.device) % flow.num_classes if flow.num_classes else None
    samples = flow.sample(PICTURED, y, size=size, temperature=TEMPERATURE, generator=generator)
    preview(LatentPerturb(eps, flow=flow), samples, y).savefig(path, dpi=100)
