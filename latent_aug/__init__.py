"""Torchvision-style transforms that augment images in a normalizing flow's latent space."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latent_aug.flows import Flow, Glow, load_flow
from latent_aug.transforms import (
    LatentAdversarial,
    LatentCache,
    LatentCollate,
    LatentLoader,
    LatentPerturb,
    LatentSchedule,
    functional,
)

if TYPE_CHECKING:
    from latent_aug.diagnostics import check_flow, preview
    from latent_aug.export import AugmentConfig, augment_images
    from latent_aug.training import TrainConfig, train_flow

__version__ = "0.2.0"

__all__ = [
    "AugmentConfig",
    "Flow",
    "Glow",
    "LatentAdversarial",
    "LatentCache",
    "LatentCollate",
    "LatentLoader",
    "LatentPerturb",
    "LatentSchedule",
    "TrainConfig",
    "augment_images",
    "check_flow",
    "functional",
    "load_flow",
    "preview",
    "train_flow",
]


_LAZY = {
    "AugmentConfig": "export",
    "TrainConfig": "training",
    "augment_images": "export",
    "check_flow": "diagnostics",
    "preview": "diagnostics",
    "train_flow": "training",
}


def __getattr__(name: str) -> Any:
    """Import what training and looking need only when somebody asks for it."""
    if name in _LAZY:
        return getattr(import_module(f"latent_aug.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
