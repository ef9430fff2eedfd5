"""Draw RESULTS.md, its plots and the README's first table from what run.py has left.

    python examples/paper/draw.py

A recipe with runs has a section: a table of its methods, mean ± standard deviation over seeds,
beside the paper's figure where the recipe names one, and a plot of accuracy against training time.
Validation runs, by which settings are chosen, stand below the test figures. The README stays as it
is while there are no runs for its table.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from records import RECIPES, RESULTS, format_spread, read_lines, read_recipes

ROOT = Path(__file__).parents[2]
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
OURS = {  # of Figure 2, by their names in the README
    "standard": "no augmentation",
    "Randomized-LA, Glow": "LatentPerturb",
    "Adversarial-LA l2 1.0, Glow": "LatentAdversarial",
}
HEAD = """\
# Results

`python examples/paper/draw.py` draws this page from the runs in
[examples/results/paper](examples/results/paper). That folder has a file for each table and a line
of JSON for each run: settings, versions, figures and the command that repeats it.

- Accuracies are in per cent, losses in nats. Both are means ± standard deviations over seeds.
- All methods of a table have the same network and epochs, and each seed the same labelled images.
- The line above a table says whether each seed has a draw of labelled images of its own.
- No setting was chosen by test accuracy, but for rows whose table says so.
- Bold are the best mean and those within its standard deviation, if it has three seeds or more.
- Minutes are those of one CPU core. With a star they are of another processor than the first row's.
- Releases of torch differ between runs, and each run names its own.
- Flows that are not in the repository were trained again for some seeds. Runs name the fingerprints
  of their flows, but for the first ones.
"""


def read_runs(recipe: str, kind: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of each method, in the recipe's order, by seed."""
    found = defaultdict(list)
    for entry in read_lines(RESULTS / f"{recipe}.{kind}.jsonl"):
        found[entry["method"]].append(entry)
    methods = read_recipes(RECIPES)[recipe]["methods"]
    return {
        name: sorted(found[name], key=lambda run: run["seed"]) for name in methods if name in found
    }


def list_accuracies(runs: list[dict[str, Any]]) -> list[float]:
    """Of each run."""
    return [run["accuracy"] for run in runs]


def measure_deviation(values: list[float]) -> float:
    """The standard deviation, 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0


def measure_time(runs: list[dict[str, Any]]) -> tuple[float | None, str]:
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


def find_minutes(runs: list[dict[str, Any]]) -> float | None:
    """What a run of a method took of a CPU core; None where that is not known."""
    return measure_time(runs)[0]


def find_best(methods: dict[str, list[float]]) -> set[str]:
    """The method of the best mean accuracy, and those within its deviation; see `HEAD`."""
    means = {name: statistics.mean(own) for name, own in methods.items()}
    best = max(means, key=lambda name: means[name])
    if len(methods) < 2 or len(methods[best]) < 3:
        return set()
    least = means[best] - statistics.stdev(methods[best])
    return {name for name, mean in means.items() if mean >= least}


def describe_device(run: dict[str, Any]) -> str:
    """Where a run was computed."""
    return f"cpu, {run['threads']} thread(s)" if run["device"] == "cpu" else run["device"]


def describe_draws(recipe: dict[str, Any]) -> str:
    """Whether all seeds of a table have the same labelled images."""
    if recipe["protocol"].get("data_seed") is None:
        return "Each seed has a draw of labelled images of its own."
    return "All seeds have the same labelled images."


def draw_table(
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
    best = find_best({name: list_accuracies(own) for name, own in runs.items()})
    times = {name: measure_time(own) for name, own in runs.items()}
    usual = next((where for took, where in times.values() if took is not None), "")
    are_timed = any(took is not None for took, _ in times.values())
    columns = ["method", "accuracy", *["loss"] * losses, "seeds", "train accuracy"]
    lines = [columns + ["minutes a run"] * are_timed + ["the paper"] * bool(paper)]
    lines.append(["---"] * len(lines[0]))
    for name, own in runs.items():
        accuracy, (took, where) = format_spread(list_accuracies(own), digits), times[name]
        row = [
            name,
            f"**{accuracy}**" if name in best else accuracy,
            *[format_spread([r["loss"] for r in own], 3)] * losses,
            str(len(own)),
            format_spread([r["train_accuracy"] for r in own], digits),
        ]
        if are_timed:
            row.append("" if took is None else f"{took:.1f}{'*' * (where != usual)}")
        if paper:
            row.append(f"{paper[name]:.{digits}f}" if name in paper else "")
        lines.append(row)
    return [f"| {' | '.join(row)} |" for row in lines]


def draw_plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy against minutes of training, a point a method of which they are known."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, own) in enumerate(runs.items()):
        time = find_minutes(own)
        if time is None:
            continue
        mean, error = statistics.mean(list_accuracies(own)), measure_deviation(list_accuracies(own))
        marker = "osD"[number // 10 % 3]  # as there are ten colours
        axes.errorbar(time, mean, yerr=error, fmt=marker, capsize=2, label=name)
    figure.legend(loc="outside right upper", fontsize=7)
    label_axes(MINUTES, axes)
    figure.savefig(path, dpi=120)


def label_axes(axis: str, axes: Any, ticks: Iterable[int] = ()) -> None:
    """Label the axes of accuracies drawn against minutes or images."""
    axes.set(xscale="log", xlabel=axis, ylabel="accuracy (%)")
    if axis == MINUTES:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_section(recipe: str) -> list[str]:
    """Text, table and plot of a recipe."""
    says = read_recipes(RECIPES)[recipe]
    lines = [f"\n## {says['title']}\n", says["text"]]
    for kind in ("test", "validation"):
        runs = read_runs(recipe, kind)
        if not runs:
            continue
        some = next(iter(runs.values()))[0]
        lines += [
            "",
            f"Trained on {some['train_images']:,} images for {some['protocol']['epochs']} epochs, "
            f"evaluated on {some['evaluated_on']}. The runs were on {describe_device(some)}, "
            f"in {some['protocol']['precision']}. {describe_draws(says)}",
            "",
            *draw_table(
                runs,
                says.get("paper", {}) if kind == "test" else {},
                digits=says.get("digits", 1),
                losses=True,
            ),
        ]
        if kind == "test" and sum(find_minutes(own) is not None for own in runs.values()) > 1:
            picture = PICTURES / f"{recipe}.png"
            draw_plot(runs, picture)
            lines += ["", f"![accuracy against time]({picture.relative_to(ROOT)})"]
    return lines


def draw_curve(name: str) -> list[str]:
    """Accuracy against images or minutes, a line for each method of several recipes."""
    title, axis, recipes = CURVES[name]
    found: dict[str, dict[Any, list[float]]] = defaultdict(dict)
    for recipe in recipes:
        for method, own in read_runs(recipe, "test").items():
            place = find_minutes(own) if axis == MINUTES else own[0]["train_images"]
            if place is not None:
                found[method][place] = list_accuracies(own)
    # What is one point is drawn with its table; but not what was trained for another time only.
    drawn = read_runs(recipes[0], "test") if axis == MINUTES else found
    found = {
        method: points for method, points in found.items() if len(points) > 1 or method not in drawn
    }
    if not found:
        return []
    path = PICTURES / f"{name}.png"
    draw_lines(found, axis, path)
    if name == "figure2":
        ours = {ours: found[method] for method, ours in OURS.items() if method in found}
        draw_lines(ours, axis, PICTURES / "labels.png")
    text = "Of the runs below, of one seed or several: a point without a bar is one run's."
    return [f"\n## {title}\n", text, "", f"![{title}]({path.relative_to(ROOT)})"]


def draw_lines(found: dict[str, dict[Any, list[float]]], axis: str, path: Path) -> None:
    """Mean and standard deviation of each method's accuracies, by images or minutes."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, points in found.items():
        means = [statistics.mean(values) for values in points.values()]
        errors = [measure_deviation(values) for values in points.values()]
        axes.errorbar(list(points), means, yerr=errors, fmt="o-", capsize=2, label=method)
    label_axes(axis, axes, sorted({place for points in found.values() for place in points}))
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def sort_key(name: str) -> tuple[bool, str, int]:
    """Sort key: the README's table first, figure2-600 before figure2-2400."""
    start, _, end = name.rpartition("-")
    return name != FIRST, *((start, int(end)) if end.isdigit() else (name, 0))


def write_readme(lines: list[str]) -> None:
    """Replace what stands between the two marks."""
    before, rest = README.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    README.write_text("\n".join([before + MARKS[0], *lines, MARKS[1] + after]))


def main() -> None:
    """Every recipe with runs."""
    names = {path.stem.rpartition(".")[0] for path in RESULTS.glob("*.jsonl")}
    curves = [line for name in CURVES for line in draw_curve(name)]
    sections = [line for name in sorted(names, key=sort_key) for line in draw_section(name)]
    lines = [HEAD, *curves, *sections]
    OUTPUT.write_text("\n".join(lines) + "\n")
    if runs := read_runs(FIRST, "test"):
        write_readme(draw_table(runs, read_recipes(RECIPES)[FIRST]["paper"]))


if __name__ == "__main__":
    main()
