"""Compare augmentations for a pretrained network on few photographs: docs/pretrained.md.

    pip install -e '.[photographs]'
    python examples/photographs/compare_methods.py PHOTOS [--methods METHOD ...] [--seeds SEED ...]
    python examples/photographs/compare_methods.py --table

PHOTOS holds train/ and test/, each with a folder of photographs for each class. A run, of a method
and a seed, is a line of JSON of `RESULTS`. What was run before is not run again.
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

from fine_tune_network import fine_tune

sys.path.append(str(Path(__file__).parents[1] / "paper"))
from records import append_line, format_spread, read_lines

RESULTS = Path(__file__).parents[1] / "results" / "photographs.jsonl"
LOCK = Path(__file__).parents[2] / "runs" / "photographs.lock"
COPY = {"resolution": 32}
HALF = {"resolution": 32, "p": 0.5}
METHODS: dict[str, dict[str, Any]] = {  # "pixels" come after crop and flip
    "crop and flip": {},
    "RandAugment": {"pixels": "RandAugment"},
    "LatentPerturb": {"perturb": COPY},
    "attack on half": {"attack": HALF},
    "RandAugment, LatentPerturb": {"pixels": "RandAugment", "perturb": COPY},
    "RandAugment, attack on half": {"pixels": "RandAugment", "attack": HALF},
    "TrivialAugment": {"pixels": "TrivialAugment"},
    "attack by default": {"attack": COPY},
    "LatentPerturb, copy of 64": {"perturb": {"resolution": 64}},
    "LatentPerturb, eps 0.5": {"perturb": {"resolution": 32, "eps": 0.5}},
    "LatentPerturb, coarsest level": {"perturb": {"resolution": 32, "levels": -1}},
    "LatentPerturb, finest level": {"perturb": {"resolution": 32, "levels": 0}},
    "LatentPerturb, the set's flow": {"perturb": COPY, "own flow": True},
    "attack on half, copy of 64": {"attack": {"resolution": 64, "p": 0.5}},
    "attack on half, true labels": {"attack": HALF | {"labels": "true"}},
    "attack on half, eps 2": {"attack": HALF | {"eps": 2.0}},
}


def draw_tables() -> str:
    """For each setting a table: mean ± standard deviation of each method, a column for each set."""
    rows, lines = read_lines(RESULTS), []
    kinds = ("per_class", "size", "network", "epochs", "lr", "validate")
    for kind in dict.fromkeys(tuple(row[k] for k in kinds) for row in rows):
        own = [row for row in rows if tuple(row[k] for k in kinds) == kind]
        sets = list(dict.fromkeys(row["photos"] for row in own))
        lines += ["", ", ".join(f"{k} {v}" for k, v in zip(kinds, kind, strict=True)), ""]
        lines += [f"| method | {' | '.join(sets)} | minutes |", "|---" * (len(sets) + 2) + "|"]
        for method in [m for m in METHODS if any(row["method"] == m for row in own)]:
            made = [row for row in own if row["method"] == method]
            cells = [[row["accuracy"] for row in made if row["photos"] == name] for name in sets]
            drawn = [f"{format_spread(cell)} ({len(cell)})" if cell else "" for cell in cells]
            minutes = format_spread([row["minutes"] for row in made if row["photos"] == sets[0]])
            lines.append(f"| {method} | {' | '.join(drawn)} | {minutes} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or draw the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, nargs="?")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    kinds = ("pretrained", "frozen", "scratch")
    parser.add_argument("--network", choices=kinds, default="pretrained")
    parser.add_argument("--validate", action="store_true", help="test on images of train/")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--flow", help="the flow that was fine-tuned on the set's own photographs")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        return print(draw_tables())
    left_out = ("methods", "seeds", "flow", "table")
    options = {k: v for k, v in vars(args).items() if k not in left_out}
    for seed, name in product(args.seeds, args.methods):
        settings = options | {"photos": args.photos.name, "method": name, "seed": seed}
        if any(settings.items() <= row.items() for row in read_lines(RESULTS)):
            continue
        method = dict(METHODS[name])
        if method.pop("own flow", False):
            if args.flow is None:
                parser.error(f"{name!r} needs --flow")
            method["perturb"] = {**method["perturb"], "flow": args.flow}
        row = settings | fine_tune(args, method, seed)
        append_line(RESULTS, row, lock=LOCK)
        print(row, flush=True)


if __name__ == "__main__":
    main()
