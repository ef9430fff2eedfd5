"""Checks of what users pass, shared by the transforms and the hook."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

Range = float | tuple[float, float]


def store(config: Any, check: Callable[[str, Any], Any], *names: str) -> None:
    """Check fields of a frozen dataclass, and keep what the check gives: plain numbers."""
    for name in names:
        object.__setattr__(config, name, check(name, getattr(config, name)))


def real(name: str, value: Any) -> float:
    """A number, also one of NumPy."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def number_range(name: str, value: Any) -> tuple[float, float]:
    """A finite number of at least 0, or a (low, high) pair of such, as a pair."""
    low, high = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    for bound in (low, high):
        if isinstance(bound, bool) or not isinstance(bound, Real):
            raise TypeError(f"{name} must be a number or a (low, high) pair, got {value!r}")
        if not (math.isfinite(bound) and float(bound) >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    if low > high:
        raise ValueError(f"{name} must be (low, high) with low at most high, got {value!r}")
    return float(low), float(high)


def probability(name: str, value: Any) -> float:
    """A number in [0, 1]."""
    if not 0 <= (number := real(name, value)) <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    return number


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """One of a few values."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def distance(name: str, value: Any, norm: str | None) -> float | None:
    """None, or a finite number of at least 0: of [0, 1] images, so a pixel's is at most 1."""
    if value is None:
        return None
    found = number_range(name, real(name, value))[0]
    if found > 1 and norm in ("linf", None):
        raise ValueError(
            f"{name} must be at most 1 with norm={norm!r}, as images lie in [0, 1], got {value!r}; "
            "8 grey levels are 8 / 255"
        )
    return found


def natural(name: str, value: Any) -> int:
    """An integer of at least 0."""
    return integer(name, value, 0)


def positive(name: str, value: Any) -> int:
    """An integer of at least 1."""
    return integer(name, value, 1)


def integer(name: str, value: Any, least: int) -> int:
    """An integer, also one of NumPy, of at least so much."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)
