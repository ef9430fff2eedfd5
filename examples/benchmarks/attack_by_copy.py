"""What the flow's part of an attack on photographs costs, beside the training step itself.

    python examples/benchmarks/attack_by_copy.py [--side 224] [--batch 8]
    python examples/benchmarks/attack_by_copy.py --device cuda --precision bfloat16 --batch 128

Times, on random photographs and a ResNet-18: a training step, LatentPerturb and one step of the
attack on half of the batch, both by a copy of 32 pixels, and what the classifier does within that
attack. The rest of the attack is the flow's work, with resizing. Prints the flow's work as a share
of the training step. In bfloat16 the classifier runs under autocast and in channels_last, and the
flow's networks in that precision. On a GPU its graphs are recorded.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from contestants import seconds
from measurements import keep_measurement
from torchvision.models import resnet18

from latent_aug import LatentAdversarial, LatentPerturb, load_flow


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    low = args.precision == "bfloat16"
    layout = torch.channels_last if low else torch.contiguous_format
    flow = load_flow(device=args.device)
    flow.network_dtype = torch.bfloat16 if low else None
    flow.cuda_graphs = True  # changes nothing without a GPU
    model = resnet18(num_classes=10).to(args.device, memory_format=layout)
    coarse = torch.rand(args.batch, 3, 8, 8)  # smooth, as photographs are
    images = F.interpolate(coarse, size=args.side, mode="bicubic").clamp(0, 1)
    images = images.to(args.device, memory_format=layout)
    labels = torch.arange(args.batch, device=args.device) % 10
    half = images[: args.batch // 2].clone().requires_grad_(True)
    # By default an untrained classifier would be attacked on no image at all.
    attack = LatentAdversarial(model, resolution=32, p=0.5, flow=flow)
    perturb = LatentPerturb(resolution=32, flow=flow)

    def timed(work: Callable[[], object]) -> float:
        def run() -> None:
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=low):
                work()
            if args.device != "cpu":
                torch.cuda.synchronize()

        return 1000 * seconds(run, repeats=5)

    def train() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    def ask() -> None:
        model.eval()
        torch.autograd.grad(model(half).sum(), half)
        model.train()

    works = (train, lambda: perturb(images), lambda: attack(images, labels), ask)
    step, noise, whole, asked = map(timed, works)
    found = {
        "device": args.device,
        "precision": args.precision,
        "side": args.side,
        "batch": args.batch,
        "threads": torch.get_num_threads(),
        "training_step_ms": round(step, 1),
        "perturb_ms": round(noise, 1),
        "attack_ms": round(whole, 1),
        "classifier_in_attack_ms": round(asked, 1),
        "perturb_share": round(noise / step, 3),
        "flow_share": round((whole - asked) / step, 3),
    }
    print(found)
    if args.device != "cpu":
        keep_measurement(f"attack_by_copy {args.device} {args.precision}", found)
    elif not low:  # bfloat16 on a CPU is for rehearsals
        keep_measurement("attack_by_copy", found)


if __name__ == "__main__":
    main()
