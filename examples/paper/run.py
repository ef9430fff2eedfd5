"""Train every classifier of a recipe that is not trained yet; each run leaves a line of JSON.

    python examples/paper/run.py NAME DATA [--test]

NAME is a recipe of recipes/*.json. It says which images are used, what of the protocol differs from
its defaults, and for each method its settings and seeds. An unknown NAME lists all recipes.
The images are those of a folder of DATA, as <set>/train/<class>/* and <set>/test/<class>/*. Those
of "torchvision:NAME" are downloaded there.
Without --test, runs are evaluated on other training images, to choose settings.
The test images are read with --test only.

Stop it at any time: the same command goes on with what is missing, and a run that was stopped goes
on from its last minutes. Several processes may share a recipe. They share --results and --state,
and none begins a run that another one is at. Where bfloat16 is slow, give --precision float32, and
another folder as --results if there are runs in bfloat16 already.
"""

import argparse
import copy
import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from methods import make_method, read_arguments
from protocol import Images, Protocol, read_images, run, split, stack_images
from records import (
    RECIPES,
    RESULTS,
    append_line,
    claim,
    describe_machine,
    read_lines,
    read_recipes,
)
from tqdm import tqdm

from latent_aug.images.datasets import open_images
from latent_aug.utils.files import remove_partial

STATE = Path(__file__).parents[2] / "runs" / "paper"


def list_runs(recipe: dict[str, Any], only: list[str] | None) -> Iterator[tuple[str, int]]:
    """Every method with its first seed, then with its second, so that tables fill evenly."""
    unknown = set(only or ()) - set(recipe["methods"])
    if unknown:
        raise SystemExit(f"the recipe has no {sorted(unknown)}, but {list(recipe['methods'])}")
    methods = {k: m for k, m in recipe["methods"].items() if only is None or k in only}
    for place in range(max(len(m["seeds"]) for m in methods.values())):
        for name, method in methods.items():
            if place < len(method["seeds"]):
                yield name, method["seeds"][place]


def list_perturbations(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The perturbations of the latent, in all phases of a method."""
    for holder in (settings, *(phase for _, phase in settings.get("phases", []))):
        yield from (holder[part] for part in ("latent", "attack") if part in holder)


def fill_settings(recipe: dict[str, Any], name: str, precision: str) -> dict[str, Any]:
    """The settings of a method, with the recipe's flow where it names none."""
    given = {k: v for k, v in recipe["methods"][name].items() if k not in ("seeds", "protocol")}
    settings = copy.deepcopy(given)
    for part in list_perturbations(settings):
        part.update({"flow": "glow-cifar10", **recipe.get("flow", {}), **part})
        if precision == "float32":
            part.pop("network_dtype", None)
    return settings


def fill_protocol(recipe: dict[str, Any], name: str, seed: int, **changes: Any) -> Protocol:
    """The protocol of a run: the recipe's, but for what the method changes, to tune it.

    Its labelled images are a draw of its own, unless the recipe names one.
    """
    own = recipe["methods"][name].get("protocol", {})
    return Protocol(**{"data_seed": seed, **recipe["protocol"], **own, **changes})


def find_done(path: Path, precision: str) -> set[tuple[str, int]]:
    """Methods and seeds whose runs are there; refuses to go on in another precision."""
    runs = read_lines(path)
    for entry in runs:
        if (found := entry["protocol"]["precision"]) != precision:
            raise SystemExit(
                f"{path}: {entry['method']}, seed {entry['seed']}, was run in {found}: "
                f"give --precision {found}, or another folder as --results"
            )
    return {(entry["method"], entry["seed"]) for entry in runs}


def find_flows(
    methods: dict[str, dict[str, Any]], folder: Path | None, channels: int
) -> dict[str, dict[str, str]]:
    """The fingerprints of each method's flows: a flow that is trained again is another.

    Refuses to begin where a flow is missing.
    """
    found, problems = {}, []
    for name, settings in methods.items():
        try:
            found[name] = {
                part["flow"]: read_arguments(part, folder, channels)["flow"].fingerprint()
                for part in list_perturbations(settings)
            }
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise SystemExit(
            "\n".join([*problems, "train them, or leave these methods out with --only"])
        )
    return found


def read_data(recipe: dict[str, Any], root: Path, protocol: Protocol) -> dict[str, Images]:
    """The training images, and the test images if the protocol has them."""
    name, how = recipe["data"], (protocol.size, protocol.channels)
    parts = ("train", "test") if protocol.test else ("train",)
    if not name.startswith("torchvision:"):
        return {part: read_images(root / name / part, *how) for part in parts}
    return {
        part: stack_images(open_images(name, root=root, train=part == "train"), *how)
        for part in parts
    }


def name_state(task: dict[str, Any]) -> str:
    """A file name for the state of a task; a task that differs in anything has another one."""
    mark = hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()[:12]
    words = re.sub(r"\W+", "-", f"{task['recipe']} {task['method']} {task['seed']}")
    return f"{words}-{mark}.pt"


def write_command(method: str, args: argparse.Namespace) -> str:
    """Write the command of a method's runs; DATA and FOLDER stand for data sets and flows."""
    command = ["python", "examples/paper/run.py", args.recipe, "DATA"]
    command += [*["--test"] * args.test, *["--flows", "FOLDER"] * bool(args.flows)]
    command += ["--precision", args.precision] * bool(args.precision)
    return shlex.join([*command, "--only", method])


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", metavar="NAME", help="of a recipe")
    parser.add_argument("data", metavar="DATA", type=Path, help="the folder of data sets")
    parser.add_argument("--test", action="store_true", help="evaluate on the test images")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods of the recipe")
    parser.add_argument("--flows", type=Path, help="the folder of flows that are not bundled")
    choices = ("bfloat16", "float32")
    parser.add_argument("--precision", choices=choices, help="in place of the recipe's")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="another folder of recipes")
    parser.add_argument("--state", type=Path, default=STATE, help="the folder of unfinished runs")
    parser.add_argument("--save-seconds", type=float, default=180.0, help="between two savings")
    return parser.parse_args()


def train_one(
    task: dict[str, Any],
    protocol: Protocol,
    images: dict[str, Images],
    state: Path,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The figures of a run, under a progress bar."""
    train, evaluated = split(images["train"], images.get("test"), protocol)
    title = f"{task['method']}, seed {task['seed']}"
    with tqdm(total=protocol.epochs, unit="epoch", desc=title) as bar:

        def advance(epoch: int, loss: float) -> None:
            bar.update(epoch - bar.n)
            bar.set_postfix_str(f"loss {loss:.3f}")

        figures = run(
            make_method(task["settings"], args.flows),
            train,
            evaluated,
            protocol,
            seed=task["seed"],
            on_epoch=advance,
            state=state,
            save_seconds=args.save_seconds,
        )
    kind = "test" if protocol.test else "validation"
    return {
        "train_images": len(train.labels),
        "evaluated_on": f"{len(evaluated.labels)} {kind} images",
        **figures,
    }


def main() -> None:
    """Train what is missing."""
    args = read_options()
    recipes = read_recipes(args.recipes)
    if args.recipe not in recipes:
        known = "\n".join(f"  {name}: {own['title']}" for name, own in recipes.items())
        raise SystemExit(f"there is no recipe {args.recipe!r}, but\n{known}")
    recipe, kind = recipes[args.recipe], "test" if args.test else "validation"
    changes = {"test": args.test, **({"precision": args.precision} if args.precision else {})}
    protocol = fill_protocol(recipe, next(iter(recipe["methods"])), 0, **changes)
    results = args.results / f"{args.recipe}.{kind}.jsonl"
    done = find_done(results, protocol.precision)
    missing = [run for run in list_runs(recipe, args.only) if run not in done]
    print(f"{recipe['title']}. {recipe['text']}")
    print(f"{len(missing)} runs to make; {len(done)} are in {results}", flush=True)
    methods = {name: fill_settings(recipe, name, protocol.precision) for name, _ in missing}
    flows = find_flows(methods, args.flows, protocol.channels)
    images = read_data(recipe, args.data, protocol) if missing else {}
    machine = describe_machine()
    for name, seed in missing:
        protocol = fill_protocol(recipe, name, seed, **changes)
        task = {
            "recipe": args.recipe,
            "method": name,
            "settings": methods[name],
            "flows": flows[name],
            "seed": seed,
            "protocol": vars(protocol),
        }
        identity = {**task, "results": str(results.resolve()), "device": machine["device"]}
        state = args.state / name_state(identity)
        with claim(state.with_suffix(".lock")) as is_ours:
            if not is_ours or (name, seed) in find_done(results, protocol.precision):
                print(f"{name}, seed {seed}: another process has it", flush=True)
                continue
            remove_partial(state)
            figures = train_one(task, protocol, images, state, args)
            command = {"command": write_command(name, args)}
            entry = {**task, **figures, **command, **machine}
            append_line(results, entry, lock=args.state / f"{results.stem}.lock")
            state.unlink(missing_ok=True)
            print(f"{name}, seed {seed}: {figures['accuracy']:.2f} %", flush=True)


if __name__ == "__main__":
    main()
