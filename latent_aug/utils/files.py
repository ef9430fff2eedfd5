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
def replace_file(path: Path, *, flush: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to, which takes the place of `path` at the end.

    After a failure the temporary file is removed, and `path` stays as it was.

    Args:
        path: The file to replace or to create.
        flush: Bring the content to the disk before the file gets its name. Otherwise a crash of
            the machine may leave the name without the content.
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
    """Remove the temporary files of `path` that killed processes have left.

    No process may be writing to `path` meanwhile.
    """
    for left in path.parent.glob(f".{path.name}.*.partial"):
        left.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one go, down to the disk."""
    with replace_file(path, flush=True) as partial:
        partial.write_bytes(content)


def read_json(path: Path) -> Any:
    """Read the value in a JSON file.

    Raises:
        ValueError: The file is damaged. The message names it.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, in one go."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())
