"""The command line: `latent-aug train`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
except ModuleNotFoundError:  # an optional extra; the library itself does without
    sys.exit("latent-aug's command line needs typer: pip install 'latent-aug[train]'")

import torch

from latent_aug.card import write_card
from latent_aug.data import UInt8Images, open_images
from latent_aug.flows import Glow
from latent_aug.hub import load_flow
from latent_aug.report import minutes_of
from latent_aug.train import TrainConfig, train_flow

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main_callback() -> None:
    """Augment images in the latent space of a normalizing flow."""


@app.command()
def train(
    data: Annotated[
        str, typer.Argument(help="A folder of images, a tar of them, or torchvision:NAME.")
    ],
    output: Annotated[Path, typer.Option(help="Where the flow and the run's state are written.")],
    validation: Annotated[
        str | None, typer.Option(help="Held-out images: folder, tar or torchvision:NAME.")
    ] = None,
    root: Annotated[Path, typer.Option(help="Where torchvision's data sets live.")] = Path("data"),
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
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = TrainConfig.steps,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = TrainConfig.batch_size,
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
    size: Annotated[int | None, typer.Option(help="Resize and crop to this side.")] = None,
    network_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="Coupling networks' precision.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of weights, order and noise.")] = TrainConfig.seed,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Between saves of the run's state.")
    ] = TrainConfig.checkpoint_minutes,
    workers: Annotated[int, typer.Option(help="Loader processes.")] = TrainConfig.workers,
    licence: Annotated[str, typer.Option(help="For the card: the weights' licence.")] = "mit",
    about: Annotated[
        str | None, typer.Option(help="For the card: the training data, in words.")
    ] = None,
    note: Annotated[str, typer.Option(help="For the card: caveats.")] = "",
) -> None:
    """Train a Glow by maximum likelihood; the same command again resumes a stopped run."""
    try:
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
            size=size,
            network_dtype=network_dtype,
            seed=seed,
            checkpoint_minutes=checkpoint_minutes,
            workers=workers,
        )
        dataset = open_images(data, root=root)
        held_out = None if validation is None else open_images(validation, root=root, train=False)
        torch.manual_seed(seed)
        flow = starting_flow(init, channels, levels, k, hidden)
        trained = train_flow(flow, dataset, config, validation=held_out)
        measured = held_out if held_out is not None else dataset
        card = write_card(
            trained,
            UInt8Images(measured, trained.channels, size),
            output,
            command=shlex.join(["latent-aug", *sys.argv[1:]]),
            training_data=about or data,
            fine_tuned_from=init,
            measured_on=validation or data,
            images_seen=steps * min(batch_size, len(dataset)),
            minutes=minutes_of(output),
            licence=licence,
            note=note,
        )
    except (ValueError, OSError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{output}: {card['bits_per_dim']:.3f} bits/dim on {card['images']} images")


def starting_flow(
    init: str | None, channels: int | None, levels: int | None, k: int | None, hidden: int | None
) -> Glow:
    """A new Glow, or the one to fine-tune, whose sizes are its own."""
    sizes = {"channels": channels, "levels": levels, "steps": k, "hidden": hidden}
    asked: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if init is None:
        return Glow(**{"channels": 3, "levels": 3, "steps": 8, "hidden": 128, **asked})
    if asked:
        raise ValueError("--init brings its own --channels, --levels, -K and -H; omit them")
    flow = load_flow(init)
    if not isinstance(flow, Glow):
        raise ValueError(f"--init must name a Glow, got a {type(flow).__name__}")
    return flow


def main() -> None:
    """Entry point of the `latent-aug` command."""
    app()


if __name__ == "__main__":
    main()
