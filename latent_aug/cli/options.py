"""What the commands of the command line have in common."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from latent_aug.transforms.functional import Norm as Norm
from latent_aug.utils.randomness import get_rank_and_count

DATA = typer.Argument(help="A folder of images, a tar of them, or torchvision:NAME.")
ROOT = typer.Option(help="Where torchvision's data sets live.")
FLOW = typer.Argument(help="A bundled name, a directory, or org/repo on the hub.")
PICTURE = typer.Option(help="Where to draw.")
SIZE = typer.Option(help="Resize and crop to this side: that at which you perturb.")
NORM = typer.Option(help="Of eps.")
RESOLUTION = typer.Option(help="Perturb a copy downscaled to this; for photographs.")
NETWORK_DTYPE = typer.Option(help="Coupling networks' precision.")
CPU = typer.Option("--cpu", help="Even where there is a GPU.")


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """What a user can mend is a line and exit code 1, not a traceback; a warning is a line too."""
    own, count = get_rank_and_count()
    who = f"rank {own}: " if count > 1 else ""

    def show(message: Warning | str, *_: object) -> None:
        typer.echo(f"{who}warning: {message}", err=True)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]  # takes what it uses
            yield
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        typer.echo(f"{who}error: {error}", err=True)
        raise typer.Exit(1) from error


def check_apart(target: Path, data: str) -> None:
    """Refuse to write among the images that are read, where the next run would find it.

    Raises:
        ValueError: The target lies in the folder of images.
    """
    if Path(data).is_dir() and target.resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(f"{target} lies among the images of {data}; write elsewhere")


def check_picture(picture: Path, data: str) -> None:
    """Refuse a picture that cannot be drawn, before long work.

    Raises:
        ValueError: Its ending is no format that matplotlib writes, its folder is not there, or it
            lies among the images.
    """
    check_apart(picture, data)
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if picture.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"--picture must end in one of {', '.join(formats)}, got {picture}")
    if not picture.parent.is_dir():
        raise ValueError(f"--picture: there is no directory {picture.parent}")
