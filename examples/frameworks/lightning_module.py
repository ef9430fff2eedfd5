"""Lightning: perturb batches where they have arrived on the device, in training only.

pip install lightning
python examples/frameworks/lightning_module.py
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import v2

from latent_aug import LatentAdversarial, LatentPerturb

DATA = Path(__file__).parents[1] / "data"


class Classifier(lightning.LightningModule):
    """A small classifier with both perturbations."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU(), nn.Flatten(),
            nn.Linear(512, 10),
        )  # fmt: skip
        self.perturb = LatentPerturb(eps=0.3, flow="glow-fashionmnist")
        self.attack = LatentAdversarial(self.net, p=0.5, flow="glow-fashionmnist")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Random perturbation on the device; not in validation, test and prediction."""
        return self.perturb(batch) if self.trainer.training else batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The adversarial one needs the weights of this very step."""
        x, y = self.attack.step(batch)
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Clean images."""
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize the classifier only: the flow is not among the parameters."""
        return torch.optim.Adam(self.parameters(), 1e-3)


def main(images: int, epochs: int) -> None:
    """Train and print the last loss."""
    convert = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    loaders = [
        DataLoader(Subset(FashionMNIST(DATA, train, convert), range(images)), 32, shuffle=train)
        for train in (True, False)
    ]
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(Classifier(), *loaders)
    print(f"loss {trainer.callback_metrics['loss']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=3)
    main(**vars(parser.parse_args()))
