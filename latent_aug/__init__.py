"""Torchvision-style transforms that augment images in a normalizing flow's latent space."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latent_aug.adversarial import LatentAdversarial
from latent_aug.cache import LatentCache
from latent_aug.flows import Flow, Glow
from latent_aug.hub import load_flow
from latent_aug.loaders import LatentCollate, LatentLoader
from latent_aug.schedules import LatentSchedule
from latent_aug.transforms import LatentPerturb

if TYPE_CHECKING:
    from latent_aug.augment import AugmentConfig, augment_images
    from latent_aug.check import check_flow
    from latent_aug.figures import preview
    from latent_aug.recipe import TrainConfig
    from latent_aug.train import train_flow

__version__ = "0.1.0"

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
    "load_flow",
    "preview",
    "train_flow",
]


_LAZY = {
    "AugmentConfig": "augment",
    "TrainConfig": "recipe",
    "augment_images": "augment",
    "check_flow": "check",
    "preview": "figures",
    "train_flow": "train",
}


def __getattr__(name: str) -> Any:
    """Import what training and looking need only when somebody asks for it."""
    if name in _LAZY:
        return getattr(import_module(f"latent_aug.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
