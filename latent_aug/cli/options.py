"""Options and checks that several commands share."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from latent_aug.transforms.functional import Norm as Norm
from latent_aug.utils.randomness import get_rank_and_count


def expand_home(path: Path | None) -> Path | None:
    """Expand the tilde of a home directory, which shells leave in ``--option=~/...``."""
    return path and path.expanduser()


DATA = typer.Argument(help="A folder of images, a tar of them, or torchvision:NAME.")
ROOT = typer.Option(help="The directory of torchvision's data sets.")
FLOW = typer.Argument(help="A bundled name, a directory, or org/repo on the hub.")
PICTURE = typer.Option(help="The file to draw.", callback=expand_home)
SIZE = typer.Option(help="Resize and crop to this side, the one at which you perturb.")
NORM = typer.Option(help="The norm of eps.")
RESOLUTION = typer.Option(help="Perturb a copy downscaled to this; for photographs.")
NETWORK_DTYPE = typer.Option(help="The precision of the coupling networks.")
CPU = typer.Option("--cpu", help="Use the CPU even where there is a GPU.")


def add_options(
    config: type[Any], *, arguments: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a dataclass, in place of its `config` parameter.

    Names, types, defaults and help are those of the fields and of the dataclass' docstring. The
    command runs with errors shown as messages.

    Args:
        config: The dataclass, whose docstring describes each field under ``Args:``.
        arguments: The fields that become arguments by position.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            settings = {field.name: given.pop(field.name) for field in fields(config)}
            with show_errors():
                command(config=config(**settings), **given)

        parameters = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name == "config":
                parameters += make_parameters(config, arguments)
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def make_parameters(config: type[Any], arguments: tuple[str, ...]) -> list[inspect.Parameter]:
    """Make a parameter that typer understands for each field of a dataclass."""
    types, descriptions = get_type_hints(config), read_descriptions(config)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=Annotated[
                Path if types[field.name] == str | Path else types[field.name],
                make_option(field, descriptions[field.name], field.name in arguments),
            ],
        )
        for field in fields(config)
    ]


def make_option(field: Field[Any], description: str, is_argument: bool) -> Any:
    """Make the option or argument of a field; what is off by default has no opposite."""
    if is_argument:
        return typer.Argument(help=description)
    names = [f"--{field.name.replace('_', '-')}"] if field.default is False else []
    return typer.Option(*names, help=description)


def read_descriptions(config: type[Any]) -> dict[str, str]:
    """Read what a class' docstring says of each argument, without the marks of code."""
    section = inspect.getdoc(config).partition("Args:\n")[2]  # type: ignore[union-attr]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section.partition("\n\n")[0], re.MULTILINE)
    return {name: " ".join(text.split()).replace("`", "") for name, text in found}


@contextmanager
def show_errors() -> Iterator[None]:
    """Show an error that a user can mend as a line, and end with exit code 1; warnings, too."""
    who = ""

    def show(message: Warning | str, *_: object) -> None:
        typer.echo(f"{who}warning: {message}", err=True)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]  # takes what it uses
            rank, count = get_rank_and_count()
            who = f"rank {rank}: " if count > 1 else ""
            yield
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        typer.echo(f"{who}error: {error}", err=True)
        raise typer.Exit(1) from error


def echo(text: str) -> None:
    """Print a line, also one with the name of a file that is no UTF-8."""
    typer.echo(text.encode("utf-8", "backslashreplace").decode())


def check_apart(target: Path, data: str) -> None:
    """Refuse to write among the images that are read, where the next run would read it.

    Raises:
        ValueError: The target lies in the folder of images.
    """
    folder = Path(data).expanduser()
    if folder.is_dir() and target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{target} lies among the images of {data}; write elsewhere")


def check_picture(picture: Path, data: str) -> None:
    """Refuse a picture that cannot be drawn, before long work.

    Raises:
        ValueError: Matplotlib does not write files of this ending, the folder does not exist, or
            the picture would lie among the images.
    """
    check_apart(picture, data)
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if picture.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"--picture must end in one of {', '.join(formats)}, got {picture}")
    if not picture.parent.is_dir():
        raise ValueError(f"--picture: there is no directory {picture.parent}")
