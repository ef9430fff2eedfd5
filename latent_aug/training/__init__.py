"""Train a flow on images."""

from latent_aug.training.recipe import TrainConfig
from latent_aug.training.train import train_flow

__all__ = ["TrainConfig", "train_flow"]
