"""How much further the attack raises a classifier's loss than random noise of the same norm.

    python examples/benchmarks/attack_strength.py                # FashionMNIST, which ships
    python examples/benchmarks/attack_strength.py --cifar10 DIR  # folders train and test/<class>

Trains a classifier on a few real images without augmentation (FashionMNIST: 600, the CNN of the
paper's Table 4; CIFAR-10: 2,500 with crops and flips, a ResNet of one block a stage), then
perturbs 1,000 test images both ways. Prints and keeps, for each setting: the mean loss of the
clean, randomly perturbed and attacked images, the share of images whose loss is higher under the
attack than under the noise, the share whose predicted class changes under each, and each one's
mean change of a pixel in grey levels of 255.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from contestants import cifar_resnet
from measurements import keep_measurement, read_measurement
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from latent_aug import LatentAdversarial, LatentPerturb

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from quickstart import load_images, no_augmentation, train_classifier  # noqa: E402

TEST_IMAGES, BATCH = 1000, 100
SETTINGS = [  # norm, eps, alpha, steps
    *(("l2", 1.0, 0.5, steps) for steps in (1, 2, 3, 5)),
    ("l2", 4.0, 2.0, 2),
    *(("linf", eps, eps / 2, 3) for eps in (0.02, 0.04, 0.1, 0.25)),
    *(("rms", eps, eps / 2, 3) for eps in (0.018, 0.05)),
]


def fashion_mnist() -> tuple[nn.Module, Tensor, Tensor, str]:
    """A trained classifier, test images and labels, and the flow's name."""
    images, labels = (t[:600] for t in load_images(train=True))
    model = train_classifier(images, labels, no_augmentation, seed=0, epochs=60)
    return model, *load_images(train=False), "glow-fashionmnist"


def cifar10(folder: Path) -> tuple[nn.Module, Tensor, Tensor, str]:
    """The same for a folder of CIFAR-10: 250 images a class, 20 epochs."""
    images, labels = read(folder / "train", 250)
    torch.manual_seed(0)
    model = cifar_resnet((1, 1, 1, 1))
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    steps = 20 * len(images) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for step in tqdm(range(steps), desc="training"):
        if step % (len(images) // BATCH) == 0:
            order = torch.randperm(len(images)).view(-1, BATCH)
        chosen = order[step % len(order)]
        x = torch.stack([augment(image) for image in images[chosen]])
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.eval(), *read(folder / "test", TEST_IMAGES // 10), "glow-cifar10"


def read(folder: Path, per_class: int) -> tuple[Tensor, Tensor]:
    """The first images of each class of a folder, in [0, 1], and their labels."""
    convert = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    data = ImageFolder(folder, convert)
    targets = torch.tensor(data.targets)
    chosen = torch.cat([(targets == label).nonzero().flatten()[:per_class] for label in range(10)])
    return torch.stack([data[i][0] for i in chosen.tolist()]), targets[chosen]


def judge(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and predicted class of each image."""
    with torch.no_grad():
        logits = model(images).double()  # in float32 a margin above 16 is a loss of 0
    return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=1)


def compare(model: nn.Module, images: Tensor, labels: Tensor, setting: tuple, flow: str) -> dict:
    """One setting: both perturbations on every image."""
    norm, eps, alpha, steps = setting
    attack = LatentAdversarial(
        model, eps=eps, alpha=alpha, steps=steps, norm=norm, p=1.0, labels="true", flow=flow
    )
    noise = LatentPerturb(eps, norm=norm, flow=flow)
    columns: dict[str, list[Tensor]] = {"clean": [], "random": [], "adversarial": []}
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        for name, perturbed in (("clean", x), ("random", noise(x)), ("adversarial", attack(x, y))):
            change = 255 * (perturbed - x).abs().mean(dim=(1, 2, 3))
            columns[name].append(torch.stack([*judge(model, perturbed, y), change]))
    losses, classes, changes = zip(*(torch.cat(c, dim=1) for c in columns.values()), strict=True)
    return {
        "norm": norm,
        "eps": eps,
        "alpha": alpha,
        "steps": steps,
        **{f"loss_{n}": round(float(v.mean()), 3) for n, v in zip(columns, losses, strict=True)},
        "above_random": round(float((losses[2] > losses[1]).float().mean()), 4),
        "flipped_random": round(float((classes[1] != classes[0]).float().mean()), 4),
        "flipped_adversarial": round(float((classes[2] != classes[0]).float().mean()), 4),
        "change_random": round(float(changes[1].mean()), 2),
        "change_adversarial": round(float(changes[2].mean()), 2),
    }


def main() -> None:
    """Train, attack, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar10", type=Path, metavar="DIR")
    args = parser.parse_args()
    name = "CIFAR-10" if args.cifar10 else "FashionMNIST"
    model, images, labels, flow = cifar10(args.cifar10) if args.cifar10 else fashion_mnist()
    images, labels = images[:TEST_IMAGES], labels[:TEST_IMAGES]
    accuracy = float((judge(model, images, labels)[1] == labels).float().mean())
    rows = []
    for setting in tqdm(SETTINGS, desc="attacking"):
        torch.manual_seed(0)
        rows.append(compare(model, images, labels, setting, flow))
    kept = read_measurement("attack_strength") or {}
    kept[name] = {"flow": flow, "images": len(images), "accuracy": round(accuracy, 4), "rows": rows}
    keep_measurement("attack_strength", kept)
    print(json.dumps(kept[name], indent=1))


if __name__ == "__main__":
    main()
