"""The command `latent-aug train`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from latent_aug.cli.options import (
    CPU,
    DATA,
    ROOT,
    add_options,
    check_apart,
    echo,
)
from latent_aug.diagnostics.check import HIGHEST_EPS, FlowCheck, check_flow
from latent_aug.flows import ConditionalDenseFlow, Flow, Glow
from latent_aug.flows.hub import load_flow
from latent_aug.images.datasets import (
    KEPT_BYTES,
    UInt8Images,
    open_images,
    pair_with_classes,
    read_images,
    to_uint8,
)
from latent_aug.training.card import write_card
from latent_aug.training.processes import Processes
from latent_aug.training.recipe import TrainConfig
from latent_aug.training.report import measure_bits_per_dim, read_minutes
from latent_aug.training.train import train_flow

COMPARED = 500  # images on which a flow is measured before and after fine-tuning


@add_options(TrainConfig)
def train(
    data: Annotated[str, DATA],
    config: TrainConfig,
    validation: Annotated[
        str | None, typer.Option(help="Held-out images: folder, tar or torchvision:NAME.")
    ] = None,
    root: Annotated[Path, ROOT] = Path("data"),
    init: Annotated[
        str | None, typer.Option(help="Fine-tune this flow: a name, directory or org/repo.")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="1 for grey images, else 3.")] = None,
    levels: Annotated[
        int | None, typer.Option(help="Scales, else 3; sides must be divisible by 2**levels.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("--steps-per-level", "-K", help="Glow steps a level, else 8.")
    ] = None,
    hidden: Annotated[
        int | None, typer.Option("--hidden", "-H", help="Coupling network width, else 128.")
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            help="Train the paper's fully connected flow of so many classes (the folders'), "
            "for small grey images, -K 12 and -H 512 if not given."
        ),
    ] = None,
    cpu: Annotated[bool, CPU] = False,
    licence: Annotated[str, typer.Option(help="For the card: the weights' licence.")] = "mit",
    about: Annotated[
        str | None, typer.Option(help="For the card: the training data, in words.")
    ] = None,
    note: Annotated[str, typer.Option(help="For the card: caveats.")] = "",
    dataset: Annotated[
        str | None, typer.Option(help="For the card: the data's name on the Hugging Face hub.")
    ] = None,
) -> None:
    """Train a flow by maximum likelihood; the same command again resumes a stopped run.

    At the end it is measured on up to 10,000 held-out images, or 2,000 training images, and the
    eps that suits them is printed.
    """
    output = Path(config.output)
    for source in (data, validation):
        if source is not None:
            check_apart(output, source)
    device = "cpu" if cpu else None
    processes = Processes(device, timeout_minutes=config.timeout_minutes)
    with processes.let_one_go_first():  # it may download
        images = open_images(data, root=root)
        held_out = None if validation is None else open_images(validation, root=root, train=False)
        torch.manual_seed(config.seed)
        flow = make_flow(init, channels, levels, k, hidden, classes, images, config.size)
    trained = train_flow(flow, images, config, validation=held_out, device=device)
    processes.leave()
    if not processes.is_main:
        return
    source, most = (images, 2_000) if held_out is None else (held_out, 10_000)
    measured = read_spread(trained, source, config.size, most)
    typer.echo(f"measuring the flow on {len(measured)} images, for its card and eps", err=True)
    directory = output.resolve()  # the verdict names it
    found = check_flow(load_flow(directory, device=trained.device), measured, size=config.size)
    card = write_card(
        trained,
        measured,
        output,
        command=shlex.join([*name_launcher(processes.count), *sys.argv[1:]]),
        training_data=about or data,
        fine_tuned_from=init,
        measured_on=validation or f"{data} (the training images)",
        images_seen=config.steps * min(config.batch_size, len(images)),
        minutes=read_minutes(output),
        licence=licence,
        eps=float(f"{found.eps:.2g}"),
        # Neither where it lies here nor this machine's speed is for others.
        verdict=replace(found, minutes=None).verdict.replace(
            shlex.quote(str(directory)), shlex.quote(directory.name)
        ),
        note=note,
        dataset=dataset,
        size=config.size,
    )
    bits = card["bits_per_dim"]
    density = "no bits/dim" if bits is None else f"{bits:.3f} bits/dim"
    whose = "images" if validation else "training images"
    echo(f"{output}: {density} on {card['images']} {whose}")
    if init is not None and bits is not None:
        echo(compare_with_start(flow, trained, measured, init))
    echo_verdict(found, config.size)


def echo_verdict(found: FlowCheck, size: int | None) -> None:
    """Print the suggested eps, where there is one, and the verdict."""
    if found.eps < HIGHEST_EPS:  # else no eps changes the images by as much as is asked
        larger = f", and resolution={size} for larger images" if size else ""
        echo(f"{found.suggestion}{larger}")
    echo(found.verdict)


def compare_with_start(start: Flow, trained: Flow, images: UInt8Images, name: str) -> str:
    """Say whether fine-tuning brought the flow nearer to these images."""
    count = min(COMPARED, len(images))
    start.to(trained.device)
    before, after = (measure_bits_per_dim(f, images, count, seed=0) for f in (start, trained))
    line = f"fine-tuning: from {before:.3f} bits/dim of {name} to {after:.3f}, on {count} of them"
    if after < before:
        return line
    return f"{line}: that is no better; take more steps or a smaller lr (--steps, --lr)"


def read_spread(flow: Flow, dataset: Any, size: int | None, most: int) -> UInt8Images:
    """Read at most so many images of a data set, spread over it, and no more than fit in memory."""
    images = read_images(flow, dataset, size, keep_bytes=0)
    most = max(1, min(most, KEPT_BYTES // images.shape.numel()))
    return read_images(flow, pair_with_classes(*images.read_some(most)))


def name_launcher(processes: int) -> list[str]:
    """Name what comes before the subcommand in the command."""
    if processes == 1:
        return ["latent-aug"]
    return ["accelerate", "launch", "--num_processes", str(processes), "-m", "latent_aug"]


def make_flow(
    init: str | None,
    channels: int | None,
    levels: int | None,
    k: int | None,
    hidden: int | None,
    classes: int | None,
    images: Any,
    size: int | None,
) -> Glow | ConditionalDenseFlow:
    """Make a new flow of the given sizes, or load the one to fine-tune."""
    sizes = {"channels": channels, "steps": k, "hidden": hidden}
    asked: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    if init is not None:
        if asked or levels is not None or classes is not None:
            raise ValueError(
                "--init brings its own --channels, --levels, --classes, -K and -H; omit them"
            )
        flow = load_flow(init)
        if not isinstance(flow, (Glow, ConditionalDenseFlow)):
            raise ValueError(
                f"--init must name a Glow or a ConditionalDenseFlow, got a {type(flow).__name__}"
            )
        return flow
    if classes is None:
        levels = 3 if levels is None else levels
        return Glow(**{"channels": 3, "levels": levels, "steps": 8, "hidden": 128, **asked})
    if levels is not None:
        raise ValueError("--levels is for Glow: a flow of --classes has one")
    height, width = to_uint8(images[0], asked.setdefault("channels", 1), size).shape[1:]
    return ConditionalDenseFlow(height=height, width=width, num_classes=classes, **asked)
