"""The command line: `latent-aug train`, `check`, `preview`, `augment` and `explore`."""

from __future__ import annotations

import sys

try:
    import typer
except ModuleNotFoundError:  # an optional extra; the library itself does without
    sys.exit("latent-aug's command line needs typer: pip install 'latent-aug[train]'")

from latent_aug.cli.augment import augment
from latent_aug.cli.look import check, explore, preview
from latent_aug.cli.train import train

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main_callback() -> None:
    """Augment images in the latent space of a normalizing flow."""


for command in (train, check, preview, augment, explore):
    app.command()(command)


def main() -> None:
    """Entry point of the `latent-aug` command."""
    app()
