"""accelerate on two processes: LatentLoader around the prepared loader, the attack in the step.

    pip install accelerate
    torchrun --nproc_per_node 2 examples/frameworks/accelerate_loop.py --cpu

`accelerate launch` starts it as well; on CPUs it wants a configuration for several processes.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import v2

from latent_aug import LatentAdversarial, LatentLoader, LatentPerturb

DATA = Path(__file__).parents[1] / "data"


def main(images: int, epochs: int, cpu: bool) -> None:
    """Train and print the mean loss of all processes."""
    accelerator = Accelerator(cpu=cpu)
    convert = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    data = Subset(FashionMNIST(DATA, transform=convert), range(images))
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.Adam(model.parameters(), 1e-3),
        DataLoader(data, batch_size=16, shuffle=True, num_workers=1),
    )
    perturb = LatentPerturb(eps=0.3, flow="glow-fashionmnist")
    loader = LatentLoader(loader, perturb, accelerator.device)  # after prepare
    attack = LatentAdversarial(model, p=0.5, flow="glow-fashionmnist")  # looks through DDP
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            x, y = attack.step(batch)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        mean = accelerator.reduce(loss.detach(), reduction="mean").item()
        accelerator.print(f"{accelerator.num_processes} processes, epoch {epoch}: loss {mean:.3f}")
    del model, optimizer, loader, attack  # before the processes part: torch 2.6 would hang
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--cpu", action="store_true")
    main(**vars(parser.parse_args()))
