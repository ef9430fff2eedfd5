"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DIGEST = re.compile("[0-9a-f]{32,}")


def compute_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


def claim_directory(
    path: Path, settings: dict[str, Any], content: str, *, is_begun: bool, remedy: str
) -> None:
    """Write the settings that a directory's content follows from, or compare with those it has.

    Settings that nothing was made by yet are replaced.

    Args:
        path: The JSON file of the settings, in the directory.
        settings: Values that JSON knows.
        content: The kind of content, such as "a cache".
        is_begun: Whether the directory has content already.
        remedy: The advice to somebody whose settings differ.

    Raises:
        ValueError: There is content, and it was made by other settings.
    """
    if not path.exists():
        write_json(path, settings)
        return
    then, now = read_json(path), json.loads(json.dumps(settings))
    if not isinstance(then, dict):
        raise ValueError(f"{path} does not hold the settings of {content}")
    changes = describe_changes(then, now)
    if is_begun:
        refuse_changes(path.parent, content, changes, remedy)
    elif changes:
        write_json(path, settings)


def refuse_changes(directory: Path, content: str, changes: list[str], remedy: str) -> None:
    """Refuse to go on with the content of a directory that was made by other settings.

    Raises:
        ValueError: There are changes.
    """
    if changes:
        listed = ", ".join(changes)
        raise ValueError(f"{directory} holds {content} with other settings ({listed}): {remedy}")


def describe_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Name the settings that differ, with their values unless these are digests.

    In a list, None stands for something unknown and equals everything.
    """
    changes = []
    for name, value in now.items():
        before = then.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            changes += [f"{name}: {change}" for change in describe_changes(before, value)]
        elif not is_same_setting(before, value):
            is_digest = isinstance(value, list) or DIGEST.fullmatch(str(value))
            changes.append(f"another {name}" if is_digest else f"{name} {before!r}, now {value!r}")
    return changes


def is_same_setting(then: Any, now: Any) -> bool:
    """Whether two values are equal, or two lists in all that is known of both."""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return all(a == b or None in (a, b) for a, b in zip(then, now, strict=True))
    return bool(then == now)
