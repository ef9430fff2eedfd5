"""Image files with labels on disk: tars as WebDataset reads them, or a folder for each class."""

from __future__ import annotations

import io
import os
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Sample(NamedTuple):
    """An image to be written: its name without a suffix, the encoded file, its class."""

    key: str
    data: bytes
    label: int | None


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside another one, which takes its place at the end, or is gone after a failure."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in one go."""
    with replaced(path) as partial:
        partial.write_text(text)


def write_tar(path: Path, samples: Iterable[Sample], suffix: str) -> None:
    """Write a tar as WebDataset reads it, the same bytes whenever the samples are the same."""
    with replaced(path) as partial, open(partial, "wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for key, data, label in samples:
                add_member(tar, f"{key}.{suffix}", data)
                if label is not None:
                    add_member(tar, f"{key}.cls", str(label).encode())
        file.flush()
        os.fsync(file.fileno())  # else the name may outlive a crash, and the content not


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar, without date and owner."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_files(output: Path, samples: Iterable[Sample], suffix: str, classes: list[str]) -> None:
    """Write image files, each in the folder of its class."""
    for key, data, label in samples:
        folder = output if label is None else output / folder_of(label, classes)
        folder.mkdir(exist_ok=True)
        with replaced(folder / f"{key}.{suffix}") as partial:
            partial.write_bytes(data)


def folder_of(label: int, classes: list[str]) -> str:
    """A class's folder: its name, or its number where the names' order would be another one."""
    usable = classes == sorted(classes) and not any("/" in c or c.startswith(".") for c in classes)
    return classes[label] if usable and label < len(classes) else f"{label:05}"
