"""Normalizing flows behind one contract, and where their weights come from."""

from latent_aug.flows.base import Flow
from latent_aug.flows.dense import ConditionalDenseFlow
from latent_aug.flows.glow import Glow
from latent_aug.flows.hub import bundled_flows, load_flow

__all__ = ["ConditionalDenseFlow", "Flow", "Glow", "bundled_flows", "load_flow"]
