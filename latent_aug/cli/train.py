"""The command `latent-aug train`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from latent_aug.cli.options import (
    CPU,
    DATA,
    NETWORK_DTYPE,
    ROOT,
    SIZE,
    check_apart,
    errors_as_messages,
)
from latent_aug.diagnostics.check import check_flow
from latent_aug.flows import ConditionalDenseFlow, Glow
from latent_aug.flows.hub import load_flow
from latent_aug.images.datasets import KEPT_BYTES, images_for, open_images, to_uint8, with_classes
from latent_aug.training.card import write_card
from latent_aug.training.processes import Processes
from latent_aug.training.recipe import TrainConfig
from latent_aug.training.report import minutes_of
from latent_aug.training.train import train_flow


def train(
    data: Annotated[str, DATA],
    output: Annotated[Path, typer.Option(help="Where the flow and the run's state are written.")],
    validation: Annotated[
        str | None, typer.Option(help="Held-out images: folder, tar or torchvision:NAME.")
    ] = None,
    root: Annotated[Path, ROOT] = Path("data"),
    init: Annotated[
        str | None, typer.Option(help="Fine-tune this flow: a name, directory or org/repo.")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="1 for grey images, else 3.")] = None,
    levels: Annotated[
        int | None, typer.Option(help="Scales, else 3; sides must divide by 2**levels.")
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
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = TrainConfig.steps,
    batch_size: Annotated[
        int, typer.Option(help="Images a step, of all processes together.")
    ] = TrainConfig.batch_size,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = TrainConfig.lr,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = TrainConfig.warmup,
    decay: Annotated[
        float, typer.Option(help="Last share of the steps, falling to 0.")
    ] = TrainConfig.decay,
    clip_norm: Annotated[
        float, typer.Option(help="Greatest gradient norm.")
    ] = TrainConfig.clip_norm,
    ema: Annotated[float, typer.Option(help="Decay of the weights' average.")] = TrainConfig.ema,
    flip: Annotated[bool, typer.Option(help="Mirror half of the images.")] = TrainConfig.flip,
    crop: Annotated[int, typer.Option(help="Zero-pad by so much, crop.")] = TrainConfig.crop,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of Gaussian noise; 0.1 is 25 grey levels.")
    ] = TrainConfig.noise,
    size: Annotated[int | None, SIZE] = None,
    network_dtype: Annotated[Literal["auto", "float32", "bfloat16"], NETWORK_DTYPE] = "auto",
    seed: Annotated[int, typer.Option(help="Of weights, order and noise.")] = TrainConfig.seed,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Between saves of the run's state.")
    ] = TrainConfig.checkpoint_minutes,
    workers: Annotated[int, typer.Option(help="Loader processes.")] = TrainConfig.workers,
    accumulate: Annotated[
        int, typer.Option(help="Parts in which a process takes its share of a batch.")
    ] = TrainConfig.accumulate,
    timeout_minutes: Annotated[
        float, typer.Option(help="A process that waits longer for another one gives up.")
    ] = TrainConfig.timeout_minutes,
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

    At the end it is measured on up to 10,000 held-out images, or 2,000 training images.
    """
    with errors_as_messages():
        config = TrainConfig(
            output=output,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            warmup=warmup,
            decay=decay,
            clip_norm=clip_norm,
            ema=ema,
            flip=flip,
            crop=crop,
            noise=noise,
            size=size,
            network_dtype=network_dtype,
            seed=seed,
            checkpoint_minutes=checkpoint_minutes,
            workers=workers,
            accumulate=accumulate,
            timeout_minutes=timeout_minutes,
        )
        for source in (data, validation):
            if source is not None:
                check_apart(output, source)
        device = "cpu" if cpu else None
        processes = Processes(device, timeout_minutes=timeout_minutes)
        with processes.one_first():  # it may download
            images = open_images(data, root=root)
            held_out = (
                None if validation is None else open_images(validation, root=root, train=False)
            )
            torch.manual_seed(seed)
            flow = starting_flow(init, channels, levels, k, hidden, classes, images, size)
        trained = train_flow(flow, images, config, validation=held_out, device=device)
        processes.leave()
        if not processes.is_main:
            return
        source, most = (images, 2_000) if held_out is None else (held_out, 10_000)
        some = images_for(trained, source, size, keep_bytes=0)
        most = max(1, min(most, KEPT_BYTES // some.shape.numel()))
        measured = images_for(trained, with_classes(*some.some(most)))
        typer.echo(f"measuring the flow on {len(measured)} images, for its card and eps", err=True)
        directory = output.resolve()  # the verdict names it
        where = next(trained.parameters()).device
        found = check_flow(load_flow(directory, device=where), measured, size=size)
        card = write_card(
            trained,
            measured,
            output,
            command=shlex.join([*launcher(processes.count), *sys.argv[1:]]),
            training_data=about or data,
            fine_tuned_from=init,
            measured_on=validation or f"{data} (the training images)",
            images_seen=steps * min(batch_size, len(images)),
            minutes=minutes_of(output),
            licence=licence,
            eps=float(f"{found.eps:.2g}"),
            problems=found.problems,
            note=note,
            dataset=dataset,
        )
    whose = "images" if validation else "training images"
    bits = card["bits_per_dim"]
    density = "no bits/dim" if bits is None else f"{bits:.3f} bits/dim"
    typer.echo(f"{output}: {density} on {card['images']} {whose}")
    typer.echo(found.verdict)


def launcher(processes: int) -> list[str]:
    """What comes before the subcommand."""
    if processes == 1:
        return ["latent-aug"]
    return ["accelerate", "launch", "--num_processes", str(processes), "-m", "latent_aug"]


def starting_flow(
    init: str | None,
    channels: int | None,
    levels: int | None,
    k: int | None,
    hidden: int | None,
    classes: int | None,
    images: Any,
    size: int | None,
) -> Glow | ConditionalDenseFlow:
    """A new flow, or the one to fine-tune, whose sizes are its own."""
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
