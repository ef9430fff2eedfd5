"""The commands that look at a flow: `latent-aug check`, `preview` and `explore`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from latent_aug.cli.options import (
    DATA,
    FLOW,
    NORM,
    PICTURE,
    RESOLUTION,
    ROOT,
    SIZE,
    Norm,
    check_picture,
    echo,
    show_errors,
)
from latent_aug.diagnostics.check import GREY_LEVELS, check_flow
from latent_aug.diagnostics.figures import preview as preview_figure
from latent_aug.flows.hub import bundled_flows, load_flow
from latent_aug.images.datasets import UInt8Images, open_images, read_images
from latent_aug.transforms.random import LatentPerturb


def check(
    flow: Annotated[str, FLOW],
    data: Annotated[str, DATA],
    root: Annotated[Path, ROOT] = Path("data"),
    norm: Annotated[Norm, NORM] = "linf",
    grey_levels: Annotated[
        float, typer.Option(help="Mean change of a pixel that the suggested eps aims at, of 255.")
    ] = GREY_LEVELS,
    classifier: Annotated[
        str | None,
        typer.Option(help="module:name of a trained model, or of a function that returns one."),
    ] = None,
    normalize: Annotated[
        str | None,
        typer.Option(help="module:name of the v2.Normalize or (mean, std) of its inputs."),
    ] = None,
    flips: Annotated[
        float, typer.Option(help="Greatest share of its predictions that eps may flip.")
    ] = 0.05,
    size: Annotated[int | None, SIZE] = None,
    count: Annotated[int, typer.Option(help="Look at no more images than this.")] = 1000,
    picture: Annotated[Path | None, PICTURE] = None,
) -> None:
    """Does a flow suit your images, and which eps does? Exit code 3 if it does not."""
    with show_errors():
        model = None if classifier is None else import_model(classifier)
        scaling = None if normalize is None else import_object("normalize", normalize)
        if picture is not None:
            check_picture(picture, data)
        loaded = load_flow(flow)
        images = read_images(loaded, open_images(data, root=root), size, keep_bytes=0)
        found = check_flow(
            loaded,
            images,
            norm=norm,
            grey_levels=grey_levels,
            classifier=model,
            flips=flips,
            normalize=scaling,
            count=count,
            progress=True,
        )
        if picture is not None:
            save_preview(LatentPerturb(found.eps, norm=norm, flow=loaded), images, picture, None)
    echo(str(found))
    if found.grade == "not usable":
        raise typer.Exit(3)


def preview(
    flow: Annotated[str, FLOW],
    data: Annotated[str, DATA],
    picture: Annotated[Path, PICTURE] = Path("preview.png"),
    root: Annotated[Path, ROOT] = Path("data"),
    eps: Annotated[list[float] | None, typer.Option(help="Sizes to draw; repeat it.")] = None,
    norm: Annotated[Norm, NORM] = "linf",
    size: Annotated[int | None, SIZE] = None,
    resolution: Annotated[int | None, RESOLUTION] = None,
) -> None:
    """Draw images, what becomes of them at several eps, the differences, and samples."""
    with show_errors():
        check_picture(picture, data)
        loaded = load_flow(flow)
        images = read_images(loaded, open_images(data, root=root), size, keep_bytes=0)
        sizes = eps or ([0.1, 0.25, 0.5] if norm in ("linf", "rms") else [5.0, 10.0, 20.0])
        transform = LatentPerturb(sizes[0], norm=norm, flow=loaded, resolution=resolution)
        save_preview(transform, images, picture, sizes)
    echo(f"{picture}")


def explore(
    flow: Annotated[list[str] | None, typer.Option(help="One more to choose; repeat it.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Else the first free one from 7860.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open it in a browser.")] = True,
) -> None:
    """Look at perturbations on a page of this machine: drag eps, choose norm, level and region."""
    with show_errors():
        from latent_aug.diagnostics.app import serve

        flows = [*(flow or []), *reversed(bundled_flows())]
        page, address = serve(flows, port=port, browser=browser)
    typer.echo(f"{address} (Ctrl+C ends it)")
    page.block_thread()


def save_preview(
    transform: LatentPerturb, images: UInt8Images, picture: Path, eps: list[float] | None
) -> None:
    """Save the preview of some images."""
    preview_figure(transform, *images.read_some(6), eps=eps).savefig(
        picture, dpi=120, bbox_inches="tight"
    )


def import_model(name: str) -> nn.Module:
    """Import the model "module:name", or call the function of that name for one."""
    found = import_object("classifier", name)
    if callable(found) and not isinstance(found, nn.Module):
        try:
            found = found()
        except Exception as error:  # the user's own code
            raise ValueError(
                f"--classifier {name}, called without arguments: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"--classifier must name a torch model, or a function that returns one, got {name!r}, "
            f"which gives a {type(found).__name__}"
        )
    return found


def import_object(option: str, name: str) -> Any:
    """Import "module:name" from an installed module or one in the current directory."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"--{option} must be module:name, got {name!r}")
    sys.path.insert(0, "")  # as python -m does
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of the user's own module
        raise ValueError(
            f"--{option} {name}: {type(error).__name__}: {error}; modules are looked for in "
            f"{Path.cwd()} and among the installed ones"
        ) from error
