"""Train every classifier of a recipe that is not trained yet; each run leaves a JSON.

    python examples/paper/run.py examples/paper/recipes/NAME.json DATA [--test]

A recipe names a data set of DATA (a folder with <set>/train/<class>/* and <set>/test/<class>/*), or
"torchvision:NAME", which is downloaded there; what of the protocol differs from its defaults, the
flow, and for each method its settings and seeds. Without --test, runs are evaluated on a part of
the labelled training images, to choose settings; the test images are read with --test only. Stop it
at any time; the same command goes on with what is missing. Runs of one recipe may share out its
methods by --only, on several machines. On a processor that is slow in a recipe's bfloat16, give
--precision float32, and another folder as --results if there are runs in bfloat16 already.
"""

import argparse
import copy
import json
import platform
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from methods import arguments_of, method_of
from protocol import Images, Protocol, in_memory, read_images, run, split
from tqdm import tqdm

from latent_aug import __version__
from latent_aug.images.datasets import open_images
from latent_aug.utils.files import write_json

RESULTS = Path(__file__).parents[1] / "results" / "paper"


def methods_and_seeds(recipe: dict[str, Any], only: list[str] | None) -> Iterator[tuple[str, int]]:
    """Every method with its first seed, then with its second, so that tables fill evenly."""
    unknown = set(only or ()) - set(recipe["methods"])
    if unknown:
        raise SystemExit(f"the recipe has no {sorted(unknown)}, but {list(recipe['methods'])}")
    methods = {k: m for k, m in recipe["methods"].items() if only is None or k in only}
    for place in range(max(len(m["seeds"]) for m in methods.values())):
        for name, method in methods.items():
            if place < len(method["seeds"]):
                yield name, method["seeds"][place]


def parts_of(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Its perturbations of the latent, in all its phases."""
    for holder in (settings, *(phase for _, phase in settings.get("phases", []))):
        yield from (holder[part] for part in ("latent", "attack") if part in holder)


def settings_of(recipe: dict[str, Any], name: str, precision: str) -> dict[str, Any]:
    """A method's, with the recipe's flow where it names none."""
    settings = copy.deepcopy({k: v for k, v in recipe["methods"][name].items() if k != "seeds"})
    for part in parts_of(settings):
        part.update({"flow": "glow-cifar10", **recipe.get("flow", {}), **part})
        if precision == "float32":
            part.pop("network_dtype", None)
    return settings


def missing_runs(
    recipe: dict[str, Any], only: list[str] | None, folder: Path, precision: str
) -> list[tuple[str, int, Path]]:
    """Methods, seeds and files of what has not been run; says what has been."""
    missing, found = [], 0
    for name, seed in methods_and_seeds(recipe, only):
        path = folder / f"{name} {seed}.json"
        if path.exists():
            check_precision(path, precision)
            found += 1
        else:
            missing.append((name, seed, path))
    print(f"{len(missing)} runs to make; {found} are in {folder}", flush=True)
    return missing


def flows_by_method(
    methods: dict[str, dict[str, Any]], folder: Path | None, channels: int
) -> dict[str, dict[str, str]]:
    """`flows_of` each method; refuses to begin where a flow is missing."""
    found, problems = {}, []
    for name, settings in methods.items():
        try:
            found[name] = flows_of(settings, folder, channels)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise SystemExit(
            "\n".join([*problems, "train them, or leave these methods out with --only"])
        )
    return found


def flows_of(settings: dict[str, Any], folder: Path | None, channels: int) -> dict[str, str]:
    """The fingerprint of each flow of a method: a flow that is trained again is another."""
    return {
        part["flow"]: arguments_of(part, folder, channels)["flow"].fingerprint()
        for part in parts_of(settings)
    }


def images_of(recipe: dict[str, Any], root: Path, protocol: Protocol) -> tuple[Images, Images]:
    """What to train and to evaluate on; the test images are read if the protocol has them."""
    name, parts = recipe["data"], {}
    how = (protocol.size, protocol.channels)
    for part in ("train", "test") if protocol.test else ("train",):
        if name.startswith("torchvision:"):
            parts[part] = in_memory(open_images(name, root=root, train=part == "train"), *how)
        else:
            parts[part] = read_images(root / name / part, *how)
    return split(parts["train"], parts.get("test"), protocol)


def check_precision(path: Path, precision: str) -> None:
    """Refuse to go on in another precision than that of a run that is there.

    The first runs do not name theirs, bfloat16.
    """
    found = json.loads(path.read_text())["protocol"].get("precision", "bfloat16")
    if found != precision:
        raise SystemExit(
            f"{path} was run in {found}: give --precision {found}, or another folder as --results"
        )


def processor() -> str:
    """The CPU's name, as Linux gives it; elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def command_of(recipe: str, method: str, args: argparse.Namespace) -> str:
    """What repeats a method's runs; DATA and FOLDER stand for those of data sets and flows."""
    command = ["python", "examples/paper/run.py", f"examples/paper/recipes/{recipe}.json", "DATA"]
    command += [*["--test"] * args.test, *["--flows", "FOLDER"] * bool(args.flows)]
    command += ["--precision", args.precision] * bool(args.precision)
    return shlex.join([*command, "--only", method])


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--test", action="store_true", help="evaluate on the test images")
    parser.add_argument("--only", nargs="+", help="these methods of the recipe")
    parser.add_argument(
        "--flows", type=Path, help="a folder of flows that are neither bundled nor in flows/"
    )
    choices = ("bfloat16", "float32")
    parser.add_argument("--precision", choices=choices, help="in place of the recipe's")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    recipe = json.loads(args.recipe.read_text())
    protocol = Protocol(**recipe["protocol"], test=args.test)
    if args.precision:
        protocol = replace(protocol, precision=args.precision)
    kind = "test" if args.test else "validation"
    place = args.results / args.recipe.stem / kind
    missing = missing_runs(recipe, args.only, place, protocol.precision)
    methods = {name: settings_of(recipe, name, protocol.precision) for name, _, _ in missing}
    flows = flows_by_method(methods, args.flows, protocol.channels)
    data = images_of(recipe, args.data, protocol) if missing else None
    for name, seed, path in missing:
        settings = methods[name]
        with tqdm(total=protocol.epochs, unit="epoch", desc=f"{name}, seed {seed}") as bar:

            def advance(loss: float, bar: Any = bar) -> None:
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}")

            method = method_of(settings, args.flows)
            figures = run(method, *data, protocol, seed=seed, on_epoch=advance)
        entry = {
            "recipe": args.recipe.stem,
            "method": name,
            "settings": settings,
            "flows": flows[name],
            "seed": seed,
            "protocol": vars(protocol),
            "train_images": len(data[0].labels),
            "evaluated_on": f"{len(data[1].labels)} {kind} images",
            **figures,
            "command": command_of(args.recipe.stem, name, args),
            "versions": {
                "latent-aug": __version__,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "python": platform.python_version(),
            },
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "processor": processor(),
            "threads": torch.get_num_threads(),
        }
        place.mkdir(parents=True, exist_ok=True)
        write_json(path, entry)
        print(f"{name}, seed {seed}: {figures['accuracy']:.2f} %", flush=True)


if __name__ == "__main__":
    main()
