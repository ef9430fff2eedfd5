"""What an attack adds to the work that it cannot do without.

    python examples/benchmarks/attack_parts.py

Times one attack at half of a batch of 64 images, of one step and of three, on ResNets of two
sizes. Beside it are its parts on the same images, each on its own: encoding, decoding with its
gradient and the classifier with its gradient at every step, and the last decoding. Prints the whole
as a multiple of their sum. Parts and whole take turns, so that both meet the same moments of the
machine.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from contestants import cifar_resnet
from measurements import keep_measurement
from torch import nn

from latent_aug import LatentAdversarial, load_flow

ATTACKED = 32


def take_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each work, over rounds in which all have a turn."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if i:  # the first round warms up
                found[name].append(1000 * (time.perf_counter() - start))
    return {name: torch.tensor(times).median().item() for name, times in found.items()}


def measure(model: nn.Module, steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds of whole and parts, and their ratio."""
    flow = load_flow()
    attack = LatentAdversarial(model, steps=steps, p=0.5, flow=flow)
    images, labels = torch.rand(2 * ATTACKED, 3, 8, 8), torch.arange(2 * ATTACKED) % 10
    images = F.interpolate(images, size=32, mode="bicubic").clamp(0, 1)
    half = images[:ATTACKED].clone()
    z = flow.encode(half)

    def decode_with_gradient() -> None:
        latents = z.detach().requires_grad_(True)
        torch.autograd.grad(flow.decode(latents).sum(), latents)

    def ask_with_gradient() -> None:
        x = half.detach().requires_grad_(True)
        torch.autograd.grad(F.cross_entropy(model(x), labels[:ATTACKED]), x)

    model.eval()
    with torch.no_grad():
        works = {
            "attack": lambda: attack(images, labels),
            "encode": lambda: flow.encode(half),
            "decode": lambda: flow.decode(z),
            "decode with gradient": torch.enable_grad()(decode_with_gradient),
            "classifier with gradient": torch.enable_grad()(ask_with_gradient),
        }
        found = take_turns(works, rounds)
    each = steps * (found["decode with gradient"] + found["classifier with gradient"])
    found["parts"] = found["encode"] + each + found["decode"]
    found["ratio"] = found["attack"] / found["parts"]
    return found


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, blocks in (("ResNet-10", (1, 1, 1, 1)), ("ResNet-18", (2, 2, 2, 2))):
        for steps in (1, 3):
            found = measure(cifar_resnet(blocks), steps, args.rounds)
            row = {"classifier": name, "steps": steps, "threads": torch.get_num_threads()}
            rows.append(row | {key: round(value, 2) for key, value in found.items()})
            print(rows[-1], flush=True)
    keep_measurement("attack_parts", rows)


if __name__ == "__main__":
    main()
