"""The command line: `latent-aug train`, `check`, `preview`, `augment` and `explore`."""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
except ModuleNotFoundError:  # an optional extra; the library itself does without
    sys.exit("latent-aug's command line needs typer: pip install 'latent-aug[train]'")

import torch
from torch import nn

from latent_aug.card import write_card
from latent_aug.check import GREY_LEVELS, check_flow
from latent_aug.cli_augment import augment
from latent_aug.cli_options import DATA, FLOW, NORM, PICTURE, ROOT, SIZE, Norm, errors_as_messages
from latent_aug.data import UInt8Images, as_batch, images_for, open_images, to_uint8
from latent_aug.figures import preview
from latent_aug.flows import ConditionalDenseFlow, Glow
from latent_aug.hub import bundled_flows, load_flow
from latent_aug.processes import Processes
from latent_aug.recipe import TrainConfig
from latent_aug.report import minutes_of
from latent_aug.train import train_flow
from latent_aug.transforms import LatentPerturb

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(augment)


@app.callback()
def main_callback() -> None:
    """Augment images in the latent space of a normalizing flow."""


@app.command()
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
    size: Annotated[int | None, SIZE] = None,
    network_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="Coupling networks' precision.")
    ] = "auto",
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
    cpu: Annotated[bool, typer.Option("--cpu", help="Even where there is a GPU.")] = False,
    licence: Annotated[str, typer.Option(help="For the card: the weights' licence.")] = "mit",
    about: Annotated[
        str | None, typer.Option(help="For the card: the training data, in words.")
    ] = None,
    note: Annotated[str, typer.Option(help="For the card: caveats.")] = "",
    dataset: Annotated[
        str | None, typer.Option(help="For the card: the data's name on the Hugging Face hub.")
    ] = None,
) -> None:
    """Train a flow by maximum likelihood; the same command again resumes a stopped run."""
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
            size=size,
            network_dtype=network_dtype,
            seed=seed,
            checkpoint_minutes=checkpoint_minutes,
            workers=workers,
            accumulate=accumulate,
            timeout_minutes=timeout_minutes,
        )
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
        measured = images_for(trained, images if held_out is None else held_out, size)
        found = check_flow(trained, measured) if isinstance(trained, Glow) else None
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
            eps=0.25 if found is None else float(f"{found.eps:.2g}"),
            note=note,
            dataset=dataset,
        )
    whose = "images" if validation else "training images"
    typer.echo(f"{output}: {card['bits_per_dim']:.3f} bits/dim on {card['images']} {whose}")
    if found is not None:
        typer.echo(found.verdict)


@app.command()
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
    flips: Annotated[
        float, typer.Option(help="Greatest share of its predictions that eps may flip.")
    ] = 0.05,
    size: Annotated[int | None, SIZE] = None,
    count: Annotated[int, typer.Option(help="Look at no more images than this.")] = 1000,
    picture: Annotated[Path | None, PICTURE] = None,
) -> None:
    """Does a flow suit your images, and which eps does? Exit code 2 if it does not."""
    with errors_as_messages():
        loaded = load_flow(flow)
        images = images_for(loaded, open_images(data, root=root), size)
        found = check_flow(
            loaded,  # type: ignore[arg-type]  # it says so if it is no Glow
            images,
            norm=norm,
            grey_levels=grey_levels,
            classifier=None if classifier is None else imported_model(classifier),
            flips=flips,
            count=count,
            progress=True,
        )
        if picture is not None:
            draw(LatentPerturb(found.eps, norm=norm, flow=loaded), images, picture, None)
    typer.echo(str(found))
    if not found.fits:
        raise typer.Exit(2)


@app.command("preview")
def preview_command(
    flow: Annotated[str, FLOW],
    data: Annotated[str, DATA],
    picture: Annotated[Path, PICTURE] = Path("preview.png"),
    root: Annotated[Path, ROOT] = Path("data"),
    eps: Annotated[list[float] | None, typer.Option(help="Sizes to draw; repeat it.")] = None,
    norm: Annotated[Norm, NORM] = "linf",
    size: Annotated[int | None, SIZE] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Perturb a copy downscaled to this; for photographs.")
    ] = None,
) -> None:
    """Draw images, what becomes of them at several eps, the differences, and samples."""
    with errors_as_messages():
        loaded = load_flow(flow)
        images = images_for(loaded, open_images(data, root=root), size)
        sizes = eps or ([0.1, 0.25, 0.5] if norm in ("linf", "rms") else [5.0, 10.0, 20.0])
        transform = LatentPerturb(sizes[0], norm=norm, flow=loaded, resolution=resolution)
        draw(transform, images, picture, sizes)
    typer.echo(f"{picture}")


@app.command()
def explore(
    flow: Annotated[list[str] | None, typer.Option(help="One more to choose; repeat it.")] = None,
    port: Annotated[int | None, typer.Option(help="Else the first free one from 7860.")] = None,
    browser: Annotated[bool, typer.Option(help="Open it in a browser.")] = True,
) -> None:
    """Look at perturbations on a page of this machine: drag eps, choose norm, level and region."""
    with errors_as_messages():
        from latent_aug.app import serve

        flows = [*(flow or []), *reversed(bundled_flows())]
        page, address = serve(flows, port=port, browser=browser)
    typer.echo(f"{address} (Ctrl+C ends it)")
    page.block_thread()


def draw(
    transform: LatentPerturb, images: UInt8Images, picture: Path, eps: list[float] | None
) -> None:
    """Write the preview of some images."""
    chosen = images.spread(6)
    some, y = as_batch(images.__getitems__(chosen)), images.classes_at(chosen)
    preview(transform, some, y, eps=eps).savefig(picture, dpi=120, bbox_inches="tight")


def imported_model(name: str) -> nn.Module:
    """The model, or what the function returns, that "module:name" names."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"classifier must be module:name of a torch model, got {name!r}")
    sys.path.insert(0, "")  # as python -m does
    found: Any = getattr(importlib.import_module(module), attribute, None)
    if callable(found) and not isinstance(found, nn.Module):
        found = found()
    if not isinstance(found, nn.Module):
        raise ValueError(f"classifier must be module:name of a torch model, got {name!r}")
    return found


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
            raise ValueError(f"--init must name a Glow, got a {type(flow).__name__}")
        return flow
    if classes is None:
        levels = 3 if levels is None else levels
        return Glow(**{"channels": 3, "levels": levels, "steps": 8, "hidden": 128, **asked})
    if levels is not None:
        raise ValueError("--levels is for Glow: a flow of --classes has one")
    height, width = to_uint8(images[0], asked.setdefault("channels", 1), size).shape[1:]
    return ConditionalDenseFlow(height=height, width=width, num_classes=classes, **asked)


def main() -> None:
    """Entry point of the `latent-aug` command."""
    app()


if __name__ == "__main__":
    main()
