"""timm: its loader gives normalized batches, its Mixup comes after the random perturbation.

pip install timm
python examples/frameworks/timm_mixup.py
"""

import argparse
from pathlib import Path

import torch
from timm import create_model
from timm.data import Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from torchvision.datasets import FashionMNIST

from latent_aug import LatentAdversarial, LatentPerturb

DATA = Path(__file__).parents[1] / "data"
NORMALIZE = (0.5,), (0.25,)


def main(images: int, epochs: int) -> None:
    """Train and print the loss."""
    data = FashionMNIST(DATA)
    data.data, data.targets = data.data[:images], data.targets[:images]
    loader = create_loader(
        data,
        input_size=(1, 28, 28),
        batch_size=32,
        is_training=True,
        no_aug=True,
        mean=NORMALIZE[0],
        std=NORMALIZE[1],
        num_workers=0,
        use_prefetcher=False,
        persistent_workers=False,
    )
    model = create_model("resnet10t", in_chans=1, num_classes=10)
    loss_of = SoftTargetCrossEntropy()
    perturb = LatentPerturb(eps=0.3, flow="glow-fashionmnist", normalize=NORMALIZE)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=10)
    # The labels are probabilities by then, which the attack takes as they are.
    attack = LatentAdversarial(model, p=0.5, flow="glow-fashionmnist", normalize=NORMALIZE)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for epoch in range(epochs):
        for x, y in loader:
            x, y = mixup(perturb(x), y)
            x, y = attack.step((x, y))
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=3)
    main(**vars(parser.parse_args()))
