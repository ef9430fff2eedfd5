"""Write perturbed copies of a data set to disk."""

from latent_aug.export.copies import AugmentConfig, AugmentReport, augment_images

__all__ = ["AugmentConfig", "AugmentReport", "augment_images"]
