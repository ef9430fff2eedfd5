"""What flows ask of the process as a whole: float32 as such, and freed memory kept."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch


class Setting(NamedTuple):
    """One of torch's global settings of float32's precision."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    full: tuple[Any, ...]
    """The values at which float32 is float32, the one to write first."""
    unset: Any = None
    """The value at which a wider setting decides, where there is one."""

    def raise_to_full(self) -> None:
        """Write it where it is lower."""
        if self.read() not in self.full:
            self.write(self.full[0])

    def restore(self, before: Any) -> None:
        """Write what was read before, or let a wider setting decide where that says the same.

        A default is written as a choice: torch does not tell the two apart.
        """
        if self.read() == before:
            return
        if self.unset is not None:
            self.write(self.unset)
        if self.read() != before:
            self.write(before)


@cache
def settings(kind: str) -> tuple[Setting, ...]:
    """Those by which a kind of device may compute with factors of 10 or fewer bits."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch 2.9 and later
        cuda, cpu = (backends.cudnn.conv, backends.cuda.matmul), backends.mkldnn
        places, name = cuda if kind == "cuda" else (cpu.conv, cpu.matmul), "fp32_precision"
        return tuple(
            Setting(
                partial(getattr, p, name), partial(setattr, p, name), ("ieee", "none"), unset="none"
            )
            for p in places
        )
    conv, name = backends.cudnn, "allow_tf32"
    products = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    return (
        Setting(partial(getattr, conv, name), partial(setattr, conv, name), full=(False,)),
        Setting(*products, full=("highest",)),
    )


_LOCK = threading.Lock()
# By kind of device: the settings' values before, an entry for each that is inside.
_BEFORE: dict[str, list[list[Any]]] = {}


def _put_back(kind: str, before: list[Any]) -> None:
    for setting, value in zip(settings(kind), before, strict=True):
        setting.restore(value)


def _after_fork_in_child() -> None:
    """Leave what other threads, which are not here, were inside; and their lock."""
    for kind, before in _BEFORE.items():
        if before and kind != "cuda":
            _put_back(kind, before[0])
    _BEFORE.clear()
    _LOCK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_after_fork_in_child
    )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 as such on this device, without autocast; else a flow loses its exactness.

    A GPU rounds the factors of convolutions to TF32's 10 bits by default. So it does with those of
    products after ``torch.set_float32_matmul_precision("high")``, and after "medium" a CPU may take
    bfloat16's 7 for both. Coupling networks in lower precision do not mind.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    with _LOCK:  # settings are the process's: the last thread to leave puts them back
        inside = _BEFORE.setdefault(kind, [])
        inside.append(inside[0] if inside else [setting.read() for setting in settings(kind)])
        for setting in settings(kind):
            setting.raise_to_full()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _LOCK:
            before = inside.pop()
            if not inside:
                _put_back(kind, before)


def keep_freed_memory() -> None:
    """Have the C library keep blocks like hidden activations when they are freed.

    glibc gives a large block back to the system, and its pages are cleared when they are asked
    for again: up to a third of the time. Freeing a block of up to 32 MiB raises that limit to its
    size; this one is never written to, so it costs nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
