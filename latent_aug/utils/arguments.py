"""Checks of users' arguments: each returns the value in its plain form, or raises."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

Range = float | tuple[float, float]


def require_fields(config: Any, require: Callable[[str, Any], Any], *names: str) -> None:
    """Check fields of a frozen dataclass, and replace each by what the check returns."""
    for name in names:
        object.__setattr__(config, name, require(name, getattr(config, name)))


def require_number(name: str, value: Any) -> float:
    """Accept a real number, NumPy's included, and return it as a float.

    Raises:
        TypeError: It is no number, or a bool.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def require_range(name: str, value: Any) -> tuple[float, float]:
    """Accept a finite number of at least 0, or a (low, high) pair, and return a pair.

    Raises:
        TypeError: It is neither.
        ValueError: A bound is negative or not finite, or low exceeds high.
    """
    low, high = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    for bound in (low, high):
        if isinstance(bound, bool) or not isinstance(bound, Real):
            raise TypeError(f"{name} must be a number or a (low, high) pair, got {value!r}")
        if not (math.isfinite(bound) and float(bound) >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    if low > high:
        raise ValueError(f"{name} must be (low, high) with low at most high, got {value!r}")
    return float(low), float(high)


def require_path(name: str, value: Any) -> Path:
    """Accept a path, and expand the tilde of a home directory.

    Raises:
        TypeError: It is no path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {value!r}")
    return Path(value).expanduser()


def require_nonnegative(name: str, value: Any) -> float:
    """Accept a finite number of at least 0."""
    return require_range(name, require_number(name, value))[0]


def require_probability(name: str, value: Any) -> float:
    """Accept a number in [0, 1]."""
    if not 0 <= (number := require_number(name, value)) <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    return number


def require_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Accept one of a few values."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def require_distance(name: str, value: Any, norm: str | None) -> float | None:
    """Accept None, or a distance between images in [0, 1], measured by a norm.

    A distance per pixel (norm "linf" or None) is at most 1.
    """
    if value is None:
        return None
    found = require_nonnegative(name, value)
    if found > 1 and norm in ("linf", None):
        raise ValueError(
            f"{name} must be at most 1 with norm={norm!r}, as images lie in [0, 1], got {value!r}; "
            "8 grey levels are 8 / 255"
        )
    return found


def require_natural(name: str, value: Any) -> int:
    """Accept an integer of at least 0."""
    return require_integer(name, value, 0)


def require_positive(name: str, value: Any) -> int:
    """Accept an integer of at least 1."""
    return require_integer(name, value, 1)


def require_integer(name: str, value: Any, least: int) -> int:
    """Accept an integer of at least `least`, NumPy's included, and return it as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)
