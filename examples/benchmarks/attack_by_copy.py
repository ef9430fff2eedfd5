"""What the flow's part of an attack on photographs costs, beside the training step itself.

    python examples/benchmarks/attack_by_copy.py [--side 224] [--batch 8]

Times, on random photographs and a ResNet-18: a training step, one step of the attack on half of the
batch by a copy of 32 pixels, and what the classifier does within that attack. The rest of the
attack is the flow's work, with resizing. Prints it as a share of the training step.
"""

import argparse

import torch
import torch.nn.functional as F
from contestants import seconds
from measurements import keep_measurement
from torchvision.models import resnet18

from latent_aug import LatentAdversarial


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    coarse = torch.rand(args.batch, 3, 8, 8)  # smooth, as photographs are
    images = F.interpolate(coarse, size=args.side, mode="bicubic").clamp(0, 1)
    labels = torch.arange(args.batch) % 10
    half = images[: args.batch // 2].clone().requires_grad_(True)
    attack = LatentAdversarial(model, resolution=32)

    def train() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    def ask() -> None:
        model.eval()
        torch.autograd.grad(model(half).sum(), half)
        model.train()

    step, whole, asked = (
        1000 * seconds(work, repeats=5) for work in (train, lambda: attack(images, labels), ask)
    )
    found = {
        "side": args.side,
        "batch": args.batch,
        "threads": torch.get_num_threads(),
        "training_step_ms": round(step, 1),
        "attack_ms": round(whole, 1),
        "classifier_in_attack_ms": round(asked, 1),
        "flow_share": round((whole - asked) / step, 3),
    }
    print(found)
    keep_measurement("attack_by_copy", found)


if __name__ == "__main__":
    main()
