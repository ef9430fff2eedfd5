"""Latent perturbations as transforms, attacks and loaders."""

from latent_aug.transforms import functional
from latent_aug.transforms.adversarial import LatentAdversarial
from latent_aug.transforms.cache import LatentCache
from latent_aug.transforms.loaders import LatentCollate, LatentLoader
from latent_aug.transforms.random import LatentPerturb
from latent_aug.transforms.schedule import LatentSchedule

__all__ = [
    "LatentAdversarial",
    "LatentCache",
    "LatentCollate",
    "LatentLoader",
    "LatentPerturb",
    "LatentSchedule",
    "functional",
]
