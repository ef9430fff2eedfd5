"""The command `latent-aug augment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from latent_aug.cli.options import (
    CPU,
    DATA,
    NETWORK_DTYPE,
    NORM,
    RESOLUTION,
    ROOT,
    Norm,
    add_options,
    check_apart,
    echo,
)
from latent_aug.export.copies import AugmentConfig, AugmentReport, augment_images
from latent_aug.flows import Flow, Glow
from latent_aug.flows.hub import load_flow
from latent_aug.images.datasets import open_images
from latent_aug.transforms.random import LatentPerturb
from latent_aug.utils.randomness import get_rank_and_count


@add_options(AugmentConfig, arguments=("output",))
def augment(
    data: Annotated[str, DATA],
    config: AugmentConfig,
    flow: Annotated[
        str, typer.Option(help="A bundled name, a directory, or org/repo on the hub.")
    ] = "glow-photographs",
    eps: Annotated[
        float | None,
        typer.Option(help="The size of the perturbation, else 0.25, or 10 for l2 at 32 x 32."),
    ] = None,
    norm: Annotated[Norm, NORM] = "linf",
    resolution: Annotated[int | None, RESOLUTION] = None,
    network_dtype: Annotated[Literal["float32", "bfloat16"], NETWORK_DTYPE] = "float32",
    root: Annotated[Path, ROOT] = Path("data"),
    cpu: Annotated[bool, CPU] = False,
) -> None:
    """Write perturbed copies of images; the same command again goes on where it stopped.

    Under torchrun or accelerate launch the processes take the shards in turn. Labels are the
    outermost folders of DATA, the .cls members of a tar, or the data set's own.
    """
    output = Path(config.output)
    check_apart(output, data)
    loaded = load_flow(flow)
    if network_dtype != "float32":
        lower_networks(loaded, network_dtype)
    if eps is None:
        eps = 10.0 if norm == "l2" else 0.25  # the paper's
    transform = LatentPerturb(eps, norm=norm, flow=loaded, resolution=resolution)
    images = open_images(data, root=root)
    report = augment_images(images, transform, config, device="cpu" if cpu else None)
    echo(summarize(output, report))


def lower_networks(flow: Flow, dtype: str) -> None:
    """Let the coupling networks of a Glow run in another precision."""
    if not isinstance(flow, Glow):
        raise ValueError(f"--network-dtype is for a Glow, got a {type(flow).__name__}")
    flow.network_dtype = getattr(torch, dtype)


def summarize(output: Path, report: AugmentReport) -> str:
    """Summarize in a line what this process has written."""
    rank, count = get_rank_and_count()
    who = f"worker {rank} of {count}: " if count > 1 else ""
    left = f", {report.fallbacks} of them as they were" if report.fallbacks else ""
    left += f", {report.unreadable} left out" if report.unreadable else ""
    found = f"; {report.found} were there" if report.found else ""
    return f"{output}: {who}{report.written} shards, {report.images} images{left}{found}"
