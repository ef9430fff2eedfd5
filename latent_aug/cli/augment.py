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
    SIZE,
    Norm,
    check_apart,
    errors_as_messages,
)
from latent_aug.export.copies import AugmentConfig, AugmentReport, augment_images
from latent_aug.flows import Flow, Glow
from latent_aug.flows.hub import load_flow
from latent_aug.images.datasets import open_images
from latent_aug.transforms.random import LatentPerturb
from latent_aug.utils.randomness import get_rank_and_count


def augment(
    data: Annotated[str, DATA],
    output: Annotated[Path, typer.Argument(help="Where the copies are written.")],
    copies: Annotated[int, typer.Option(help="Of each image.")] = AugmentConfig.copies,
    flow: Annotated[
        str, typer.Option(help="A bundled name, a directory, or org/repo on the hub.")
    ] = "glow-cifar10",
    eps: Annotated[
        float | None,
        typer.Option(help="Else 0.25, or 10 for l2, which is for 32 x 32 images."),
    ] = None,
    norm: Annotated[Norm, NORM] = "linf",
    resolution: Annotated[int | None, RESOLUTION] = None,
    size: Annotated[int | None, SIZE] = None,
    originals: Annotated[
        bool, typer.Option("--originals", help="Write the images themselves as well, as copy 0.")
    ] = False,
    form: Annotated[
        Literal["shards", "folder"],
        typer.Option(help="Tars as WebDataset reads them, or a folder for each class."),
    ] = "shards",
    shard_size: Annotated[
        int, typer.Option(help="Images of a shard, the unit of work.")
    ] = AugmentConfig.shard_size,
    image_format: Annotated[
        Literal["png", "jpeg"], typer.Option(help="Of the files; png is lossless.")
    ] = "png",
    quality: Annotated[int, typer.Option(help="Of jpeg.")] = AugmentConfig.quality,
    batch_size: Annotated[
        int, typer.Option(help="Images of one size that go through the flow together.")
    ] = AugmentConfig.batch_size,
    network_dtype: Annotated[Literal["float32", "bfloat16"], NETWORK_DTYPE] = "float32",
    seed: Annotated[int, typer.Option(help="Of order and noise.")] = AugmentConfig.seed,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read.")
    ] = False,
    root: Annotated[Path, ROOT] = Path("data"),
    cpu: Annotated[bool, CPU] = False,
) -> None:
    """Write perturbed copies of images; the same command again goes on where it stopped.

    Under torchrun or accelerate launch the processes take the shards in turn. Labels are the
    outermost folders of DATA, the .cls members of a tar, or the data set's own.
    """
    with errors_as_messages():
        config = AugmentConfig(
            output=output,
            copies=copies,
            originals=originals,
            form=form,
            shard_size=shard_size,
            image_format=image_format,
            quality=quality,
            size=size,
            batch_size=batch_size,
            seed=seed,
            skip_unreadable=skip_unreadable,
        )
        check_apart(output, data)
        loaded = load_flow(flow)
        if network_dtype != "float32":
            lower_networks(loaded, network_dtype)
        if eps is None:
            eps = 10.0 if norm == "l2" else 0.25  # the paper's
        transform = LatentPerturb(eps, norm=norm, flow=loaded, resolution=resolution)
        images = open_images(data, root=root)
        report = augment_images(images, transform, config, device="cpu" if cpu else None)
    typer.echo(summary(output, report))


def lower_networks(flow: Flow, dtype: str) -> None:
    """Let the coupling networks of a Glow run in another precision."""
    if not isinstance(flow, Glow):
        raise ValueError(f"--network-dtype is for a Glow, got a {type(flow).__name__}")
    flow.network_dtype = getattr(torch, dtype)


def summary(output: Path, report: AugmentReport) -> str:
    """A line on what was done."""
    rank, count = get_rank_and_count()
    who = f"worker {rank} of {count}: " if count > 1 else ""
    left = f", {report.fallbacks} of them as they were" if report.fallbacks else ""
    left += f", {report.unreadable} left out" if report.unreadable else ""
    found = f"; {report.found} were there" if report.found else ""
    return f"{output}: {who}{report.written} shards, {report.images} images{left}{found}"
