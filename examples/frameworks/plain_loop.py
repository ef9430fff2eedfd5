"""A plain PyTorch loop: LatentPerturb in the pipeline, LatentAdversarial in the step.

python examples/frameworks/plain_loop.py
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import v2

from latent_aug import LatentAdversarial, LatentPerturb

DATA = Path(__file__).parents[1] / "data"


def main(images: int, epochs: int) -> None:
    """Train and print the loss."""
    augment = v2.Compose(
        [
            v2.RandomCrop(28, padding=2),
            LatentPerturb(eps=0.3, flow="glow-fashionmnist"),  # training only, before Normalize
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5], [0.25]),
        ]
    )
    data = Subset(FashionMNIST(DATA, transform=augment), range(images))
    loader = DataLoader(data, batch_size=32, shuffle=True, num_workers=2)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip
    attack = LatentAdversarial(
        model, p=0.5, flow="glow-fashionmnist", normalize=([0.5], [0.25])  # batches are normalized
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(epochs):
        for batch in loader:
            x, y = attack.step(batch)
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
