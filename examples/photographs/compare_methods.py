"""Compare augmentations for a pretrained network on few photographs: docs/pretrained.md.

    pip install -e '.[photographs]'
    python examples/photographs/compare_methods.py PHOTOS [--methods METHOD ...] [--seeds SEED ...]
    python examples/photographs/compare_methods.py --table

PHOTOS holds train/ and test/, each with a folder of photographs for each class. A run, of a method
and a seed, is a line of JSON of `RESULTS`. What was run before is not run again.
"""

import argparse
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import Any

from fine_tune_network import fine_tune

sys.path.append(str(Path(__file__).parents[1] / "paper"))
from records import append_line, read_lines, write_spread, write_table

RESULTS = Path(__file__).parents[1] / "results" / "photographs.jsonl"
LOCK = Path(__file__).parents[2] / "runs" / "photographs.lock"
PAGE = Path(__file__).parents[2] / "docs" / "pretrained.md"
COMMAND = "examples/photographs/compare_methods.py"
SETTINGS = ("per_class", "size", "epochs", "batch", "lr", "network", "validate")
MEANS = {"accuracy": 1, "loss": 2, "minutes": 1}  # over the sets, with so many digits
COPY = {"resolution": 32}
HALF = {"resolution": 32, "p": 0.5}
COMPARED: dict[str, dict[str, Any]] = {  # "pixels" come after crop and flip
    "crop and flip": {},
    "RandAugment": {"pixels": "RandAugment"},
    "LatentPerturb": {"perturb": COPY},
    "attack on half": {"attack": HALF},
    "attack on half, true labels": {"attack": HALF | {"labels": "true"}},
}
TESTED = COMPARED | {
    "RandAugment, LatentPerturb": {"pixels": "RandAugment", "perturb": COPY},
    "RandAugment, attack on half": {"pixels": "RandAugment", "attack": HALF},
    "TrivialAugment": {"pixels": "TrivialAugment"},
}
SEARCHED = COMPARED | {  # on validation photographs
    "attack by default": {"attack": COPY},
    "LatentPerturb, copy of 64": {"perturb": {"resolution": 64}},
    "LatentPerturb, eps 0.5": {"perturb": {"resolution": 32, "eps": 0.5}},
    "LatentPerturb, coarsest level": {"perturb": {"resolution": 32, "levels": -1}},
    "LatentPerturb, finest level": {"perturb": {"resolution": 32, "levels": 0}},
    "LatentPerturb, the set's flow": {"perturb": COPY, "own flow": True},
    "attack on half, copy of 64": {"attack": {"resolution": 64, "p": 0.5}},
    "attack on half, eps 2": {"attack": HALF | {"eps": 2.0}},
}

METHODS = TESTED | SEARCHED
TABLES: dict[str, tuple[list[str], dict[str, Any]]] = {  # their methods and settings
    "methods": (list(TESTED), {}),
    "25 labels": (["crop and flip", "RandAugment", "attack on half"], {"per_class": 25}),
    "search": (list(SEARCHED), {"validate": True, "seed": 0}),
}


def draw_table(methods: list[str], **settings: Any) -> list[str]:
    """A row for each method with such settings: accuracies by set, and means over the sets."""
    settings = {k: v for k, v in vars(parse([])).items() if k in SETTINGS} | settings
    rows = [
        row
        for row in read_lines(RESULTS)
        if row["method"] in methods and settings.items() <= row.items()
    ]
    sets = list(dict.fromkeys(row["photos"] for row in rows))
    lines = [f"| augmentation | {' | '.join(sets)} | mean | mean loss | CPU minutes |"]
    lines += ["|---" * (len(sets) + 4) + "|"]
    for method in [m for m in methods if any(row["method"] == m for row in rows)]:
        made = [row for row in rows if row["method"] == method]
        each = [[row for row in made if row["photos"] == name] for name in sets]
        means = ["", "", ""]
        if all(each):
            means = [f"{average(each, key):.{digits}f}" for key, digits in MEANS.items()]
        cells = [write_spread([row["accuracy"] for row in rows]) for rows in each]
        lines.append(f"| {' | '.join([method, *cells, *means])} |")
    return lines


def average(each: list[list[dict[str, Any]]], key: str) -> float:
    """Average over the sets of what their runs have on average."""
    return statistics.mean(statistics.mean(row[key] for row in rows) for rows in each)


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
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
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: those of its table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--flow", help="the flow that was fine-tuned on the set's own photographs")
    parser.add_argument("--table", action="store_true")
    return parser.parse_args(given)


def main() -> None:
    """Run what is missing, or draw the tables of the page."""
    args = parse()
    if args.table:
        for name, (methods, settings) in TABLES.items():
            write_table(PAGE, f"drawn by {COMMAND}: {name}", draw_table(methods, **settings))
        return
    options = {name: getattr(args, name) for name in SETTINGS}
    usual = [name for name in SEARCHED if "own flow" not in METHODS[name]]
    methods = args.methods or (usual if args.validate else list(TESTED))
    for seed, name in product(args.seeds, methods):
        settings = options | {"photos": args.photos.name, "method": name, "seed": seed}
        if any(settings.items() <= row.items() for row in read_lines(RESULTS)):
            continue
        method = dict(METHODS[name])
        if method.pop("own flow", False):
            if args.flow is None:
                raise SystemExit(f"{name!r} needs --flow")
            method["perturb"] = {**method["perturb"], "flow": args.flow}
            settings["flow"] = Path(args.flow).name
        row = settings | fine_tune(args, method, seed)
        append_line(RESULTS, row, lock=LOCK)
        print(row, flush=True)


if __name__ == "__main__":
    main()
