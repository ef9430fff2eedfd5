"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced(path: Path, *, flush: bool = False) -> Iterator[Path]:
    """A path beside another one, which takes its place at the end, or is gone after a failure.

    Args:
        path: Of the file to be.
        flush: Bring the content to the disk first: else the name may outlive a crash of the
            machine, and the content not.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        if flush:
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(path: Path) -> None:
    """Remove what killed processes have left of a file that no other one is writing now."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        left.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one go, down to the disk."""
    with replaced(path, flush=True) as partial:
        partial.write_bytes(content)


def read_json(path: Path) -> Any:
    """A value that was written as JSON.

    Raises:
        ValueError: The file is damaged; names it.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, likewise."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())
