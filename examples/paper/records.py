"""Recipes and their runs as files: what is written, by whom, and what a killed process has left."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torchvision
from filelock import FileLock, Timeout

from latent_aug import __version__

RECIPES = Path(__file__).parent / "recipes"
RESULTS = Path(__file__).parents[1] / "results" / "paper"
END_MARK = "<!-- until here -->"


def read_recipes(folder: Path = RECIPES) -> dict[str, dict[str, Any]]:
    """Every recipe by its name. A file holds those of one figure or of tables that belong together.

    Raises:
        ValueError: Two files hold a recipe of the same name.
    """
    recipes: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if twice := recipes.keys() & found.keys():
            raise ValueError(f"{path} has recipes that another file has, too: {sorted(twice)}")
        recipes |= found
    return recipes


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every entry of a JSON-lines file, none if there is no file.

    A last line that a killed process has not finished is left out.

    Raises:
        ValueError: Another line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    if not is_entry(lines[-1]):
        del lines[-1]
    for number, line in enumerate(lines, 1):
        if not is_entry(line):
            raise ValueError(f"line {number} of {path} is damaged")
    return [json.loads(line) for line in lines]


def is_entry(line: bytes) -> bool:
    """Whether this is JSON from its first to its last byte."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def format_spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation, or the one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def write_spread(values: list[float]) -> str:
    """Mean ± standard deviation. Of fewer than three values their number stands in brackets."""
    if not values:
        return ""
    return (
        format_spread(values)
        if len(values) > 2
        else f"{statistics.mean(values):.1f} ({len(values)})"
    )


def write_table(page: Path, mark: str, lines: list[str]) -> None:
    """Replace what stands between a mark of a page and the next end mark.

    Raises:
        ValueError: The page does not have the mark once.
    """
    before, after = page.read_text().split(f"<!-- {mark} -->\n")
    after = after[after.index(END_MARK) :]
    page.write_text("\n".join([f"{before}<!-- {mark} -->", *lines, after]))


def describe_machine() -> dict[str, Any]:
    """Describe what a run was computed with."""
    return {
        "versions": {
            "latent-aug": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": name_processor(),
        "threads": torch.get_num_threads(),
    }


def name_processor() -> str:
    """The CPU's name, as Linux gives it; elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def append_line(path: Path, entry: dict[str, Any], *, lock: Path) -> None:
    """Add a line, down to the disk, while other processes add theirs under the same lock file."""
    for folder in (path.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(lock), path.open("a+b", buffering=0) as file:
        end_last_line(file)
        file.write(json.dumps(entry).encode() + b"\n")
        os.fsync(file.fileno())


def end_last_line(file: BinaryIO) -> None:
    """Remove what a killed process has left of a line, so that the next one begins anew."""
    file.seek(0)
    content = file.read()
    last = content[content.rfind(b"\n") + 1 :]
    if is_entry(last):
        file.write(b"\n")
    elif last:
        file.truncate(len(content) - len(last))


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Claim what a lock file stands for: whether no other process has.

    The claim ends with the block, and with the process, however that is killed. The file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
