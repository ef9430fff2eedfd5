"""torchvision's MixUp and CutMix after LatentPerturb, all on the collated batch.

python examples/frameworks/torchvision_mixup.py
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import v2

from latent_aug import LatentCollate, LatentPerturb

DATA = Path(__file__).parents[1] / "data"


def main(images: int, epochs: int) -> None:
    """Train and print the loss."""
    on_batches = v2.Compose(
        [
            LatentPerturb(eps=0.3, flow="glow-fashionmnist"),
            v2.RandomChoice([v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)]),
            v2.Normalize([0.5], [0.25]),
        ]
    )
    convert = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    data = Subset(FashionMNIST(DATA, transform=convert), range(images))
    loader = DataLoader(
        data, batch_size=32, shuffle=True, num_workers=2, collate_fn=LatentCollate(on_batches)
    )
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(epochs):
        for x, y in loader:  # y: class probabilities (B, 10)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=3)
    main(**vars(parser.parse_args()))
