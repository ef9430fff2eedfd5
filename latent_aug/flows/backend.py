"""Settings of the whole process that flows need: full float32, torch's plain defaults, memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch


class Setting(NamedTuple):
    """One of torch's global settings, and the values that flows need.

    Attributes:
        read: Gives the present value.
        write: Sets a value.
        wanted: The values that flows can work with. The first one is written where another is set.
        unset: The value at which a wider setting decides, where there is one.
    """

    read: Callable[[], Any]
    write: Callable[[Any], None]
    wanted: tuple[Any, ...]
    unset: Any = None

    def apply(self) -> None:
        """Write a wanted value where another one is set."""
        if self.read() not in self.wanted:
            self.write(self.wanted[0])

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
def list_settings(kind: str) -> tuple[Setting, ...]:
    """List the settings of one kind.

    Args:
        kind: "cpu" or "cuda" for those by which such a device may compute float32 with factors of
            10 or fewer bits. "dtype" for the dtype that new tensors have by default.
    """
    if kind == "dtype":
        wanted = (torch.float32,)
        return (Setting(torch.get_default_dtype, torch.set_default_dtype, wanted),)
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
        Setting(partial(getattr, conv, name), partial(setattr, conv, name), wanted=(False,)),
        Setting(*products, wanted=("highest",)),
    )


_LOCK = threading.Lock()
# By kind: the values of the settings before, once for each caller that holds them now.
_BEFORE: dict[str, list[list[Any]]] = {}


def _restore(kind: str, before: list[Any]) -> None:
    for setting, value in zip(list_settings(kind), before, strict=True):
        setting.restore(value)


def _reset_after_fork() -> None:
    """In a forked child, restore what other threads, which are not there, were holding."""
    for kind, before in _BEFORE.items():
        if before and kind != "cuda":
            _restore(kind, before[0])
    _BEFORE.clear()
    _LOCK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_reset_after_fork
    )


@contextmanager
def hold_settings(kind: str) -> Iterator[None]:
    """Keep the settings of a kind at values that flows can work with.

    They belong to the process, so the last of several threads restores them.
    """
    with _LOCK:
        held = _BEFORE.setdefault(kind, [])
        held.append(held[0] if held else [setting.read() for setting in list_settings(kind)])
        for setting in list_settings(kind):
            setting.apply()
    try:
        yield
    finally:
        with _LOCK:
            before = held.pop()
            if not held:
                _restore(kind, before)


@contextmanager
def use_full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 in full and without autocast on this device, so that a flow is exact.

    A GPU rounds the factors of convolutions to TF32's 10 bits by default. After
    ``torch.set_float32_matmul_precision("high")`` it does so with those of products, too. After
    "medium" a CPU may take bfloat16's 7 bits for both. Coupling networks in lower precision do
    not mind.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    with hold_settings(kind), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def use_plain_defaults() -> Iterator[None]:
    """Make new tensors float32 on the CPU, whatever torch's default dtype and device are.

    A flow built from modules that take no dtype and device is so the same in every process.
    """
    with hold_settings("dtype"), torch.device("cpu"):
        yield


def keep_freed_memory() -> None:
    """Have the C library keep blocks like hidden activations when they are freed.

    glibc gives a large block back to the system, and its pages are cleared when they are asked
    for again. That is up to a third of the time. Freeing a block of up to 32 MiB raises that limit
    to its size. This one is never written to, so it costs nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
