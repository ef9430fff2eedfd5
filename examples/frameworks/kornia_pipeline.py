"""kornia's AugmentationSequential on batches, before LatentPerturb.

pip install kornia
python examples/frameworks/kornia_pipeline.py
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from kornia.augmentation import AugmentationSequential, RandomAffine, RandomHorizontalFlip
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import v2

from latent_aug import LatentPerturb

DATA = Path(__file__).parents[1] / "data"


def main(images: int, epochs: int) -> None:
    """Train and print the loss."""
    convert = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    data = Subset(FashionMNIST(DATA, transform=convert), range(images))
    loader = DataLoader(data, batch_size=32, shuffle=True)
    augment = AugmentationSequential(
        RandomHorizontalFlip(), RandomAffine(degrees=5, translate=(0.05, 0.05)), data_keys=["input"]
    )
    perturb = LatentPerturb(eps=0.3, flow="glow-fashionmnist")
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(perturb(augment(x))), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=3)
    main(**vars(parser.parse_args()))
