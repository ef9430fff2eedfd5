"""Flows on the paper's 5 % of CIFAR-10: trained on those images alone, and fine-tuned on them.

    python examples/flows/low_data.py CIFAR10 --runs FOLDER

CIFAR10 holds train/<class>/* and test/<class>/*; the images are the 250 of each class that the
tables of examples/paper train on. So few images are soon learned by heart: of the checkpoints, the
one of best bits/dim on 2,000 other training images is kept, and all three flows are then measured
on test images. The flows are written to FOLDER/glow-cifar10-5percent and
FOLDER/glow-cifar10-5percent-tuned, in half precision, for `run.py --flows FOLDER`.
"""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch

from latent_aug import Glow, TrainConfig, load_flow, train_flow
from latent_aug.diagnostics.measure import measure_flow
from latent_aug.images.datasets import UInt8Images

sys.path.append(str(Path(__file__).parents[1] / "paper"))  # the images are the tables' own
from protocol import Protocol, labelled, read_images

RESULTS = Path(__file__).parents[1] / "results" / "low_data_flows.json"
BASE = "glow-cifar10-small"
STAGES = (1000, 2000, 4000)  # optimizer steps of a run; the learning rate ends at 0 in each
TUNING_STAGES = (200, 500)
SCRATCH = {"lr": 1e-3, "crop": 4}
TUNING = {"lr": 2e-4}  # without crops, as the flow was trained
PER_CLASS, HELD_OUT = 250, 200


def train_and_choose(
    start: Glow,
    stages: tuple[int, ...],
    recipe: dict[str, Any],
    images: Any,
    held_out: Any,
    runs: Path,
) -> tuple[Glow, dict[str, float]]:
    """Train for each number of steps; the flow of best held-out bits/dim, and all of those."""
    found: dict[str, float] = {}
    best = None
    for steps in stages:
        config = TrainConfig(output=runs / str(steps), steps=steps, **recipe)
        flow = train_flow(copy.deepcopy(start), images, config)
        found[str(steps)] = measure_flow(flow, held_out, settings=())["bits_per_dim"]
        if found[str(steps)] == min(found.values()):
            best = flow
        print(f"{steps} steps: {found[str(steps)]:.3f} bits/dim held out", flush=True)
    assert best is not None
    return best, {steps: round(bits, 3) for steps, bits in found.items()}


def main() -> None:
    """Train both, measure all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    args = parser.parse_args()
    pool = labelled(read_images(args.data / "train"), Protocol(per_class=PER_CLASS + HELD_OUT))
    first = PER_CLASS * pool.classes
    images, held_out = (UInt8Images(p, 3) for p in (pool.pixels[:first], pool.pixels[first:]))
    test = UInt8Images(read_images(args.data / "test").pixels, 3)
    full = load_flow(BASE)
    assert isinstance(full, Glow)
    torch.manual_seed(0)  # the new flow's first weights are part of its training
    rows = [{"flow": BASE, **measure_flow(full, test)}]
    for name, start, stages, recipe in (
        ("glow-cifar10-5percent", Glow(**full.config), STAGES, SCRATCH),
        ("glow-cifar10-5percent-tuned", full, TUNING_STAGES, TUNING),
    ):
        flow, bits = train_and_choose(
            start, stages, recipe, images, held_out, args.runs / f"{name}-runs"
        )
        flow.half().save_pretrained(args.runs / name)
        loaded = load_flow(args.runs / name)
        assert isinstance(loaded, Glow)
        rows.append({"flow": name, "held_out": bits, **measure_flow(loaded, test)})
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
