"""What flows ask of the process as a whole: float32 as such, and freed memory kept."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

_LOCK = threading.Lock()
_BEFORE: list[list[Any]] = []  # the settings' values, an entry for each inside `full_precision`

if hasattr(os, "register_at_fork"):  # a loader's worker must not start with a lock that is held
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
    )


class Setting(NamedTuple):
    """One of torch's global settings of float32's precision."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    full: Any
    """The value at which float32 is float32."""
    unset: Any = None
    """The value at which a wider setting decides, where there is one."""

    def restore(self, before: Any) -> None:
        """Write what was read, or nothing but that a wider setting decides where that says it."""
        if self.unset is not None:
            self.write(self.unset)
        if self.read() != before:
            self.write(before)


def settings() -> list[Setting]:
    """Those by which convolutions or matrix products may take factors of 10 or fewer bits."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch 2.9 and later
        cuda, cpu = (backends.cudnn.conv, backends.cuda.matmul), backends.mkldnn
        places, name = (*cuda, cpu.conv, cpu.matmul), "fp32_precision"
        return [
            Setting(partial(getattr, p, name), partial(setattr, p, name), "ieee", unset="none")
            for p in places
        ]
    name = "allow_tf32"
    convolutions = partial(getattr, backends.cudnn, name), partial(setattr, backends.cudnn, name)
    products = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    return [Setting(*convolutions, full=False), Setting(*products, full="highest")]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 as such on this device, without autocast; else a flow loses its exactness.

    A GPU rounds the factors of convolutions to TF32's 10 bits by default. So it does with those of
    products after ``torch.set_float32_matmul_precision("high")``, and after "medium" a CPU may take
    bfloat16's 7 for both. Coupling networks in lower precision do not mind.
    """
    with _LOCK:  # settings are the process's: the last thread to leave puts them back
        if not _BEFORE:
            _BEFORE.append([setting.read() for setting in settings()])
            for setting in settings():
                setting.write(setting.full)
        else:
            _BEFORE.append(_BEFORE[0])
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _LOCK:
            before = _BEFORE.pop()
            if not _BEFORE:
                for setting, value in zip(settings(), before, strict=True):
                    setting.restore(value)


def keep_freed_memory() -> None:
    """Have the C library keep blocks like hidden activations when they are freed.

    glibc gives a large block back to the system, and its pages are cleared when they are asked
    for again: up to a third of the time. Freeing a block of up to 32 MiB raises that limit to its
    size; this one is never written to, so it costs nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
