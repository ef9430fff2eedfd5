"""Look at flows and perturbations: does a flow fit, which eps, what changes."""

from latent_aug.diagnostics.check import FlowCheck, check_flow
from latent_aug.diagnostics.figures import preview
from latent_aug.diagnostics.measure import measure_flow

__all__ = ["FlowCheck", "check_flow", "measure_flow", "preview"]
