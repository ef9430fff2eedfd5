"""Draw RESULTS.md, its plots and the README's first table from what run.py has left.

    python examples/paper/draw.py

A section for each recipe of which there are runs: a table of its methods, mean ± standard deviation
over seeds, beside the paper's figure where a recipe names one, and accuracy against training time.
Validation runs, by which the best of the peers was chosen, stand below the test figures.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

ROOT = Path(__file__).parents[2]
RECIPES = Path(__file__).parent / "recipes"
RUNS = ROOT / "examples" / "results" / "paper"
PICTURES = ROOT / "docs" / "pictures"
OUTPUT = ROOT / "RESULTS.md"
README = ROOT / "README.md"
MARKS = ("<!-- drawn by examples/paper/draw.py -->", "<!-- until here -->")
FIRST = "cifar10-low-data"  # its table is the README's
IMAGES, MINUTES = "labelled images", "minutes of training a run"
CURVES = {  # of each picture: title, what is on the other axis, recipes from little to much of that
    "cifar10-time": (
        "CIFAR-10, 5 % of the labels, by the time of training",
        MINUTES,
        [FIRST, "cifar10-longer", "cifar10-160-epochs", "cifar10-320-epochs"],
    ),
    "cifar10-shares": (
        "CIFAR-10, by the share of labels",
        IMAGES,
        ["cifar10-1-percent", FIRST, "cifar10-20-percent"],
    ),
    "figure2": (
        "The paper's Figure 2",
        IMAGES,
        ["figure2-600", "figure2-2400", "figure2-6000", "figure2-50000"],
    ),
}
HEAD = """\
# Results

Drawn by `python examples/paper/draw.py` from the runs in
[examples/results/paper](examples/results/paper): one JSON a run, with its command, settings,
versions, time and figures. Accuracies are in per cent, losses in nats, mean ± standard deviation
over seeds; every method of a table has the same images, network and epochs, and seeds count up from
0. A seed is of the training: the labelled images of a table are one draw from the training set, the
same for all seeds. No setting was chosen by test accuracy, but for rows whose table says so. Bold
are the best mean and those within its standard deviation, if it has three seeds or more. Minutes
are of one CPU core, computing, on average over a row's runs on the processor of its first; the very
first runs did not record them. Minutes with a star are of another processor than the table's first
row: compare them with each other only. Releases of torch differ, and flows that are not in the
repository were trained again by the same command for some seeds: each run's JSON names its release
and, since fingerprints are kept, its flow's.
"""


def runs_of(recipe: str, kind: str) -> dict[str, list[dict[str, Any]]]:
    """Of each method, in the recipe's order, by seed."""
    found = defaultdict(list)
    for path in sorted((RUNS / recipe / kind).glob("*.json")):
        entry = json.loads(path.read_text())
        found[entry["method"]].append(entry)
    return {name: found[name] for name in described(recipe)["methods"] if name in found}


def described(recipe: str) -> dict[str, Any]:
    """What a recipe says."""
    return json.loads((RECIPES / f"{recipe}.json").read_text())


def accuracies(runs: list[dict[str, Any]]) -> list[float]:
    """Of each run."""
    return [run["accuracy"] for run in runs]


def deviation(values: list[float]) -> float:
    """The standard deviation, 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation, or the one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def timed(runs: list[dict[str, Any]]) -> tuple[float | None, str]:
    """What a run of a method took of a CPU core, in minutes, and on which processor.

    On average over those that recorded it and were on the same kind of processor as the first of
    them; the first runs of all, on one kind, do not name theirs. Several runs shared a GPU, so that
    their times say nothing.
    """
    on_cpu = [run for run in runs if "cpu_seconds" in run and run["device"] == "cpu"]
    found = [(run.get("processor", ""), run["cpu_seconds"] / 60) for run in on_cpu]
    if not found:
        return None, ""
    usual = found[0][0]
    return statistics.mean(took for processor, took in found if processor == usual), usual


def minutes(runs: list[dict[str, Any]]) -> float | None:
    """What a run of a method took of a CPU core; None where that is not known."""
    return timed(runs)[0]


def best_of(methods: dict[str, list[float]]) -> set[str]:
    """The method of the best mean accuracy, and those within its deviation; see `HEAD`."""
    means = {name: statistics.mean(own) for name, own in methods.items()}
    best = max(means, key=lambda name: means[name])
    if len(methods) < 2 or len(methods[best]) < 3:
        return set()
    least = means[best] - statistics.stdev(methods[best])
    return {name for name, mean in means.items() if mean >= least}


def device_of(run: dict[str, Any]) -> str:
    """Where a run was computed."""
    return f"cpu, {run['threads']} thread(s)" if run["device"] == "cpu" else run["device"]


def table(
    runs: dict[str, list[dict[str, Any]]],
    paper: dict[str, float],
    *,
    digits: int = 1,
    losses: bool = False,
) -> list[str]:
    """A row for each method.

    Args:
        runs: Of each method.
        paper: Its accuracy for some of them.
        digits: Of accuracies.
        losses: Of the evaluated images, too.
    """
    best = best_of({name: accuracies(own) for name, own in runs.items()})
    times = {name: timed(own) for name, own in runs.items()}
    usual = next((where for took, where in times.values() if took is not None), "")
    are_timed = any(took is not None for took, _ in times.values())
    columns = ["method", "accuracy", *["loss"] * losses, "seeds", "train accuracy"]
    lines = [columns + ["minutes a run"] * are_timed + ["the paper"] * bool(paper)]
    lines.append(["---"] * len(lines[0]))
    for name, own in runs.items():
        accuracy, (took, where) = spread(accuracies(own), digits), times[name]
        row = [
            name,
            f"**{accuracy}**" if name in best else accuracy,
            *[spread([r["loss"] for r in own], 3)] * losses,
            str(len(own)),
            spread([r["train_accuracy"] for r in own], digits),
        ]
        if are_timed:
            row.append("" if took is None else f"{took:.1f}{'*' * (where != usual)}")
        if paper:
            row.append(f"{paper[name]:.{digits}f}" if name in paper else "")
        lines.append(row)
    return [f"| {' | '.join(row)} |" for row in lines]


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy against minutes of training, a point a method of which they are known."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, own) in enumerate(runs.items()):
        time = minutes(own)
        if time is None:
            continue
        mean, error = statistics.mean(accuracies(own)), deviation(accuracies(own))
        marker = "osD"[number // 10 % 3]  # as there are ten colours
        axes.errorbar(time, mean, yerr=error, fmt=marker, capsize=2, label=name)
    figure.legend(loc="outside right upper", fontsize=7)
    against(MINUTES, axes)
    figure.savefig(path, dpi=120)


def against(axis: str, axes: Any, ticks: Iterable[int] = ()) -> None:
    """Label the axes of accuracies drawn against minutes or images."""
    axes.set(xscale="log", xlabel=axis, ylabel="accuracy (%)")
    if axis == MINUTES:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def section(recipe: str) -> list[str]:
    """Text, table and plot of a recipe."""
    says = described(recipe)
    lines = [f"\n## {says['title']}\n", says["text"]]
    for kind in ("test", "validation"):
        runs = runs_of(recipe, kind)
        if not runs:
            continue
        some = next(iter(runs.values()))[0]
        lines += [
            "",
            f"Trained on {some['train_images']:,} images for {some['protocol']['epochs']} epochs, "
            f"evaluated on {some['evaluated_on']}; {device_of(some)}, "
            f"{some['protocol'].get('precision', 'bfloat16')}.",
            "",
            *table(
                runs,
                says.get("paper", {}) if kind == "test" else {},
                digits=says.get("digits", 1),
                losses=True,
            ),
        ]
        if kind == "test" and sum(minutes(own) is not None for own in runs.values()) > 1:
            picture = PICTURES / f"{recipe}.png"
            plot(runs, picture)
            lines += ["", f"![accuracy against time]({picture.relative_to(ROOT)})"]
    return lines


def curve(name: str) -> list[str]:
    """Accuracy against images or minutes, a line for each method of several recipes."""
    title, axis, recipes = CURVES[name]
    found: dict[str, dict[Any, list[float]]] = defaultdict(dict)
    for recipe in recipes:
        for method, own in runs_of(recipe, "test").items():
            place = minutes(own) if axis == MINUTES else own[0]["train_images"]
            if place is not None:
                found[method][place] = accuracies(own)
    # What is one point is drawn with its table; but not what was trained for another time only.
    drawn = runs_of(recipes[0], "test") if axis == MINUTES else found
    found = {
        method: points for method, points in found.items() if len(points) > 1 or method not in drawn
    }
    if not found:
        return []
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, points in found.items():
        means = [statistics.mean(values) for values in points.values()]
        errors = [deviation(values) for values in points.values()]
        axes.errorbar(list(points), means, yerr=errors, fmt="o-", capsize=2, label=method)
    against(axis, axes, sorted({place for points in found.values() for place in points}))
    axes.legend(fontsize=7)
    path = PICTURES / f"{name}.png"
    figure.savefig(path, dpi=120)
    text = "Of the runs below, of one seed or several: a point without a bar is one run's."
    return [f"\n## {title}\n", text, "", f"![{title}]({path.relative_to(ROOT)})"]


def in_order(name: str) -> tuple[bool, str, int]:
    """Sort key: the README's table first, figure2-600 before figure2-2400."""
    start, _, end = name.rpartition("-")
    return name != FIRST, *((start, int(end)) if end.isdigit() else (name, 0))


def into_readme(lines: list[str]) -> None:
    """Replace what stands between the two marks."""
    before, rest = README.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    README.write_text("\n".join([before + MARKS[0], *lines, MARKS[1] + after]))


def main() -> None:
    """Every recipe with runs."""
    recipes = sorted((path.name for path in RUNS.iterdir() if path.is_dir()), key=in_order)
    curves = [line for name in CURVES for line in curve(name)]
    lines = [HEAD, *curves, *(line for recipe in recipes for line in section(recipe))]
    OUTPUT.write_text("\n".join(lines) + "\n")
    into_readme(table(runs_of(FIRST, "test"), described(FIRST)["paper"]))


if __name__ == "__main__":
    main()
