"""What a perturbation costs per image, by place: in a worker, or on a batch in the main process.

    python examples/benchmarks/cost.py

Times the bundled CIFAR-10 flow on random 8-bit images of 32 and 64 pixels (the cost does not
depend on what is in them, and samples that fall back cost the same), best of five. "worker" is
one image at a time on one thread, as in each DataLoader worker; "batch" is 64 images on all
threads. The attack is on torchvision's ResNet-18 with a 3x3 first convolution and no pooling
after it, 3 steps.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet18

from latent_aug import LatentAdversarial, LatentPerturb, load_flow

RESULTS = Path(__file__).parents[1] / "results" / "cost.json"


def best(call: Callable[[], object], count: int) -> float:
    """Milliseconds per image of the fastest of five calls, after one to warm up."""
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return round(1000 * min(seconds[1:]) / count, 2)


def cifar_resnet18() -> nn.Module:
    """ResNet-18 for small images, as the paper's A.1 describes it."""
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def main() -> None:
    """Measure, print, keep."""
    threads, rows = torch.get_num_threads(), []
    transform, model = LatentPerturb(0.25), cifar_resnet18()
    attack = LatentAdversarial(model, steps=3)
    for side in (32, 64):
        batch = torch.randint(256, (64, 3, side, side), dtype=torch.uint8)
        x, y = batch / 255, torch.zeros(64, dtype=torch.long)
        torch.set_num_threads(1)
        worker = best(lambda: [transform(image) for image in batch[:8]], 8)  # noqa: B023
        torch.set_num_threads(threads)
        rows.append(
            {
                "side": side,
                "threads": threads,
                "perturb_worker_ms": worker,
                "perturb_batch_ms": best(lambda: transform(batch), 64),  # noqa: B023
                "attack_batch_ms": best(lambda: attack(x, y), 64),  # noqa: B023
                "classifier_forward_backward_ms": best(
                    lambda: nn.functional.cross_entropy(model(x), y).backward(),  # noqa: B023
                    64,
                ),
            }
        )
    started = time.perf_counter()
    load_flow()
    load = round(time.perf_counter() - started, 2)
    print(json.dumps({"load_flow_s": load, "rows": rows}, indent=1))
    RESULTS.write_text(json.dumps({"load_flow_s": load, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
