"""What fine-tuning a bundled flow on other images does: bits/dim, fallbacks, suggested eps.

    python examples/flows/fine_tune.py DATA --runs FOLDER

DATA holds <set>/train and <set>/test for gtsrb_small and tinyimagenet100_small, read at 32 x 32.
For each, `glow-cifar10-small` is measured as it is, after a few minutes of training on all of the
set's training images, unlabelled, and after the same number of steps on a tenth of them. The same
steps from untrained weights stand beside it. `latent-aug train DATA --init glow-cifar10-small
--lr 5e-4 --steps 1000 --size 32` does the same, for signs with --no-flip. What classifiers gain
from the flows, left in FOLDER, is measured by `examples/paper/run.py` with the recipes
gtsrb-transfer and tinyimagenet-transfer, `--flows FOLDER`.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from latent_aug import Glow, TrainConfig, load_flow, train_flow
from latent_aug.diagnostics.check import check_flow
from latent_aug.images.datasets import UInt8Images, open_images, stack_images
from latent_aug.training.report import read_minutes

RESULTS = Path(__file__).parents[1] / "results" / "fine_tune.json"
BASE = "glow-cifar10-small"
SETS = {"gtsrb_small": False, "tinyimagenet100_small": True}  # whether images may be mirrored
STEPS, TENTH = 1000, 0.1


def read_images(folder: Path) -> UInt8Images:
    """Read images into memory at 32 x 32."""
    return UInt8Images(open_images(folder), 3, 32)


def figures(flow: Glow, test: UInt8Images) -> dict[str, Any]:
    """Measure what `latent-aug check` finds on up to 2,000 test images."""
    found = check_flow(flow, test, count=2000)
    at_eps = found.at_eps
    return {
        "bits_per_dim": round(found.figures["bits_per_dim"], 3),
        "latent_std": found.figures["latent_std"],
        "suggested_linf": found.eps,
        "fallbacks": at_eps["fallbacks"],
        "saturated": round(at_eps["saturated"], 4),
        "uint8_identical": found.figures["uint8_identical"],
        "problems": found.problems,
    }


def tuned(start: Glow, images: UInt8Images, output: Path, flip: bool) -> tuple[Glow, float]:
    """The flow after training, and the minutes that took."""
    config = TrainConfig(output=output, steps=STEPS, lr=5e-4, flip=flip)
    return train_flow(start, images, config), round(read_minutes(output), 1)


def main() -> None:
    """Train what is missing, measure, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    args = parser.parse_args()
    base = load_flow(BASE)
    assert isinstance(base, Glow)
    rows = []
    for name, flip in SETS.items():
        train, test = (read_images(args.data / name / part) for part in ("train", "test"))
        chosen = train.spread_indices(int(len(train) * TENTH))
        tenth = UInt8Images(stack_images(train.__getitems__(chosen)), 3)
        rows.append({"images": name, "flow": f"{BASE} as it is", **figures(base, test)})
        for kind, images, start in (
            ("fine-tuned", train, copy.deepcopy(base)),
            ("fine-tuned on a tenth", tenth, copy.deepcopy(base)),
            ("from scratch", train, Glow(**base.config)),
        ):
            output = args.runs / f"{name}-{kind.replace(' ', '-')}"
            flow, minutes = tuned(start, images, output, flip)
            rows.append(
                {
                    "images": name,
                    "flow": kind,
                    "train_images": len(images),
                    "steps": STEPS,
                    "minutes": minutes,
                    **figures(flow, test),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
