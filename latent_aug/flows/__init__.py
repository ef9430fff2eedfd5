"""Flows: exact, invertible maps between images and latents of the same shape."""

from latent_aug.flows.base import Flow
from latent_aug.flows.dense import ConditionalDenseFlow
from latent_aug.flows.glow import Glow

__all__ = ["ConditionalDenseFlow", "Flow", "Glow"]
