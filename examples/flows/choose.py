"""Which flow to ship: variants trained for the same CPU time on the same images.

    python examples/flows/choose.py train CIFAR10/train --runs FOLDER --minutes 15
    python examples/flows/choose.py measure CIFAR10/test --runs FOLDER

Each variant gets as many steps of 64 images as fit into the given minutes of CPU time, measured
on its first steps; a stopped script goes on where it was. `measure` writes what `latent-aug
check` looks at for every variant that is trained.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from variants import VARIANTS, new_flow, recipe

from latent_aug import Glow, TrainConfig, train_flow
from latent_aug.data import UInt8Images, open_images
from latent_aug.measure import measure_flow

RESULTS = Path(__file__).parents[1] / "results" / "flow_choices.json"
TIMED_STEPS = 30


def steps_within(seconds: float, name: str, images: UInt8Images) -> int:
    """How many steps of a variant take that much CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        spent = []
        for steps in (TIMED_STEPS, 3 * TIMED_STEPS):  # the difference leaves out what is once
            config = TrainConfig(output=f"{folder}/{steps}", steps=steps, **recipe(name))
            started = time.process_time()
            train_flow(new_flow(name), images, config, progress=False)
            spent.append(time.process_time() - started)
    return int(seconds / (spent[1] - spent[0]) * 2 * TIMED_STEPS)


def directory(runs: Path, name: str) -> Path:
    """Of a variant's run."""
    return runs / name.replace(", ", "-").replace(" ", "-")


def train(name: str, images: UInt8Images, output: Path, minutes: float) -> None:
    """One variant, if it is not finished."""
    output.mkdir(parents=True, exist_ok=True)
    plan = output / "plan.json"
    if not plan.exists():
        steps = steps_within(60 * minutes, name, images)
        plan.write_text(json.dumps({"name": name, "minutes": minutes, "steps": steps}))
    steps = json.loads(plan.read_text())["steps"]
    if not (output / "model.safetensors").exists():
        config = TrainConfig(output=output, steps=steps, **recipe(name))
        train_flow(new_flow(name), images, config, progress=False)


def trained(name: str, output: Path) -> Glow:
    """A variant's flow, frozen."""
    flow = new_flow(name)
    flow.load_state_dict(load_file(output / "model.safetensors"))
    return flow.requires_grad_(False).eval()


def measure(runs: Path, images: UInt8Images, count: int) -> None:
    """Every trained variant."""
    chosen = UInt8Images(torch.stack([images[i] for i in images.spread(count)]), 3)
    rows = []
    for name in VARIANTS:
        output = directory(runs, name)
        if (output / "model.safetensors").exists():
            plan = json.loads((output / "plan.json").read_text())
            rows.append({**plan, **measure_flow(trained(name, output), chosen)})
            print(name, rows[-1]["bits_per_dim"], flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    """Train, or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("train", "measure"))
    parser.add_argument("images", help="a folder or tar of images")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--count", type=int, default=2000, help="images to measure on")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    args = parser.parse_args()
    images = UInt8Images(open_images(args.images), 3)
    if args.task == "measure":
        measure(args.runs, images, args.count)
        return
    for name in args.only:
        train(name, images, directory(args.runs, name), args.minutes)


if __name__ == "__main__":
    main()
