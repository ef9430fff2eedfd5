"""What a short training on few labels gains from each flow: a table of checkpoints/README.md.

    python examples/flows/gain.py IMAGES [--per-class 250] [--epochs 20] [--flows FLOW ...]
    python examples/flows/gain.py --table

IMAGES holds a folder of images for each class, which are read at 32 pixels. For each seed a ResNet
of 16 channels is trained on another draw of so many images a class, and tested on up to 5,000 of
the others. Beside crop and flip alone stand RandAugment and, for each flow, `LatentPerturb` and
`LatentAdversarial` at their defaults, the attack on half of each batch. What was run before is not
run again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "paper"))  # the same classifier as the tables'
from methods import make_method
from protocol import Protocol, draw_images, read_images, round_figures, run
from records import append_line, format_spread, read_lines

RESULTS = Path(__file__).parents[1] / "results" / "gain.jsonl"
FLOWS = ("glow-cifar10-small", "glow-photographs")
SEEDS = (0, 1, 2)
LOCK = Path(__file__).parents[2] / "runs" / "gain.lock"


def list_methods(flows: list[str]) -> dict[str, dict[str, Any]]:
    """The settings of each method, by its name."""
    methods: dict[str, dict[str, Any]] = {
        "crop and flip": {},
        "RandAugment": {"pixels": "randaugment"},
    }
    for flow in flows:
        methods[f"LatentPerturb, {flow}"] = {"latent": {"flow": flow}}
        methods[f"LatentAdversarial, {flow}"] = {
            "attack": {"preset": "default", "p": 0.5, "flow": flow}
        }
    return methods


def draw_table() -> str:
    """Mean ± standard deviation of each method, a column for each set."""
    rows = read_lines(RESULTS)
    sets = list(dict.fromkeys(row["set"] for row in rows))
    lines = [f"| method | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for name in sets:
            own = [r["accuracy"] for r in rows if (r["set"], r["method"]) == (name, method)]
            cells.append(format_spread(own) if own[1:] else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or draw the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--name", help="the name of the set, by default that of the folder")
    parser.add_argument("--per-class", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--flows", nargs="*", default=FLOWS)
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    args = parser.parse_args()
    if args.table:
        print(draw_table())
        return
    if args.images is None:
        parser.error("IMAGES is needed")
    images = read_images(args.images, 32)
    protocol = Protocol(
        per_class=args.per_class, epochs=args.epochs, width=16, precision="float32", batch_size=64
    )
    name = args.name or args.images.name
    done = {(row["set"], row["method"], row["seed"]) for row in read_lines(RESULTS)}
    for seed in SEEDS:
        train, test = draw_images(images, args.per_class, seed)
        for method, settings in list_methods(args.flows).items():
            if (name, method, seed) in done:
                continue
            found = run(make_method(settings), train, test, protocol, seed=seed)
            row = {
                "set": name,
                "method": method,
                "seed": seed,
                "per_class": args.per_class,
                "epochs": args.epochs,
                **round_figures(found),
            }
            append_line(RESULTS, row, lock=LOCK)
            print(row, flush=True)


if __name__ == "__main__":
    main()
