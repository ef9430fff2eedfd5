"""Draw RESULTS.md, its plots and the tables of README.md and docs/choose.md from what was run.

    python examples/paper/draw.py

A section has a table, a row for each method and a column for each recipe, its plot and its command.
Pages stay as they are while there are no runs for their tables.
"""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from records import (
    RECIPES,
    RESULTS,
    format_spread,
    read_lines,
    read_recipes,
    write_spread,
    write_table,
)

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
OUTPUT = ROOT / "RESULTS.md"
README = ROOT / "README.md"
CHOICE = ROOT / "docs" / "choose.md"
MARK = "drawn by examples/paper/draw.py"
IMAGES, MINUTES = "labelled images", "minutes of training a run"

Runs = dict[str, list[dict[str, Any]]]
"""The runs of each method, by seed."""
Points = dict[str, dict[float, list[float]]]
"""Accuracies, or gains, of each method by what they are drawn against."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of RESULTS.md.

    Args:
        title: Its heading.
        text: What is compared, and what to see.
        columns: Recipes by the heading of their column, from little to much.
        timed: The column whose minutes are shown; none if empty.
        peer: A method over which the others' gains in equal time are shown, if any.
        gains: What to see in these gains.
        plot: What accuracy is drawn against: `IMAGES`, `MINUTES` of the timed column, or nothing.
        picture: The plot's name.
        digits: Of accuracies.
        kind: "test", or "validation" for runs by which settings were chosen.
    """

    title: str
    text: str
    columns: dict[str, str]
    timed: str = ""
    peer: str = ""
    gains: str = ""
    plot: str = ""
    picture: str = ""
    digits: int = 1
    kind: str = "test"


LABELLED = {  # of the recipes "small-..."
    "signs": 430,
    "tinyimagenet": 1500,
    "fashionmnist": 600,
    "mnist": 100,
    "clothing": 200,
    "hands": 130,
    "nuclei": 128,
    "letters": 680,
    "faces": 128,
}
SMALL_SETS = Section(
    title="Small data sets",
    text="Accuracy by data set and labelled images. Network and settings are those for CIFAR-10, "
    "with less weight decay and 200 epochs. All rows crop, and those of clothing, nuclei and "
    "faces mirror. Three times the epochs with RandAugment take up to 60 % more time than the "
    "attack on its images. Such a training is level with the default attack, or ahead. It is "
    "within a point of the attack at `eps=2`.",
    columns={f"{name}, {count}": f"small-{name}" for name, count in LABELLED.items()},
)
FIGURE_2 = Section(
    title="The paper's Figure 2: FashionMNIST",
    text="The paper's network and protocol, without pixel augmentation. Randomized-LA "
    "(`LatentPerturb`) and Adversarial-LA (`LatentAdversarial`) are the paper's, under its "
    "class-conditional flow. A noisy flow has seen noisy images, as in the authors' code. Glow is "
    "`glow-fashionmnist`, whose attack gains about two points. The plain VAE-GAN has 10 epochs. "
    "All seeds train on one draw of labels.",
    columns={
        "600": "figure2-600",
        "2,400": "figure2-2400",
        "6,000": "figure2-6000",
        "50,000": "figure2-50000",
    },
    timed="6,000",
    plot=IMAGES,
    picture="figure2",
)
SECTIONS = [
    Section(
        title="CIFAR-10 with few labels",
        text="A pre-activation ResNet, tuned for RandAugment on other training images. With 2,500 "
        'labels it has twice the width. All rows crop and mirror. In "A + B" A comes first. A row '
        "of one seed is of the first draw of labels, on which crop and flip has 55.5 and "
        "RandAugment 59.1 with 500 labels. The flow has seen all training images, without labels. "
        "The paper's column is of a ResNet-18: compare gains, not accuracies.",
        columns={
            "500": "cifar10-1-percent",
            "2,500": "cifar10-5-percent",
            "10,000": "cifar10-20-percent",
        },
        timed="500",
        peer="RandAugment",
        gains="The next table has the gain in equal time: over what RandAugment reaches on the "
        "same draws of labels, interpolated between its runs of several lengths. With 500 labels "
        "the attack on RandAugment's images gains one to two points, and more than three at twice "
        "its strength, `eps=2`. With 2,500 labels, in one draw, it gains "
        "nearly two, and between two and three at `eps=2`. So it needs a network that fits its "
        "labels: in [too small a one](#2500-labels-in-too-small-a-network) it gained nothing.",
        plot=MINUTES,
        picture="cifar10",
    ),
    Section(
        title="2,500 labels in too small a network",
        text="The network and settings of 500 labels, first draw of labels. After the shortest "
        "training with RandAugment 90 % of the training images are right, 88 % when attacked as "
        "well. There the attack gains nothing in equal time.",
        columns={"2,500": "cifar10-5-percent-narrow"},
        timed="2,500",
    ),
    Section(
        title="The paper's Table 1 in a tenth of its epochs",
        text="A ResNet-18 of half the paper's width, 20 epochs, at the paper's learning rate of "
        "0.1. All rows crop and mirror, and common does nothing else. The attack makes one step. "
        "With every image attacked at predicted labels, the model in training mode, the network "
        "gains three points. In 60 epochs it gains nine, the mean of three draws, in twice the "
        "time. The least of the three gains is above seven. There common has at least 95 % of its "
        "training images right. In evaluation mode it loses three points in 20 epochs. At true "
        "labels it loses seven in evaluation mode, and twelve in training mode. So short a "
        "training gains nothing by the default.",
        columns={"2,500": "table1-tenth"},
        timed="2,500",
    ),
    Section(
        title="The paper's Table 2: CIFAR-100 with 10 % of the labels",
        text="The network and settings of CIFAR-10 with 500 labels, 60 epochs, the flow for "
        "photographs. The paper has a ResNet-18, 200 epochs and a flow of CIFAR-10.",
        columns={"5,000": "cifar100-10-percent"},
        timed="5,000",
    ),
    SMALL_SETS,
    FIGURE_2,
    Section(
        title="The paper's Table 5: MNIST",
        text="The paper's LeNet-5 and protocol. On 2,000 images the attack gains a point under the "
        "flow trained on noisy images, and loses two under the one without noise. All seeds train "
        "on one draw of labels.",
        columns={"2,000": "table5-mnist-2000", "60,000": "table5-mnist"},
        timed="2,000",
        digits=2,
    ),
    Section(
        title="How the settings for CIFAR-10 were chosen",
        text="RandAugment on 500 labelled images, evaluated on 5,000 other training images. Each "
        "row names what it changes of the first one: width 32, 150 epochs, weight decay 2e-3 and "
        "learning rate 0.05.",
        columns={"500": "tune-1-percent"},
        timed="500",
        kind="validation",
    ),
    Section(
        title="The attack's settings for CIFAR-10",
        text="The attack on RandAugment's images, on the same labelled images, evaluated on the "
        "same 5,000. RandAugment alone is the best row of the table above. In one draw a quarter "
        "of each batch gains as much as the default, which attacks up to a half. At two and "
        "four times the strength it gains two points more. On every image, the model in training "
        "mode, it gains one point more than the default, and takes half as much time again.",
        columns={"500": "tune-attack-1-percent"},
        timed="500",
        kind="validation",
    ),
    Section(
        title="Settings with 2,500 labels",
        text="RandAugment on 2,500 labelled images, one draw, evaluated on 5,000 other training "
        "images. The settings that are best with 500 labels come first, and fit too little: 90 % "
        "of the training images are right at the end. Less weight decay and twice the width fit "
        "better. There the attack at `eps=2` gains three points for the same number of epochs. It "
        "gains 1.6 over RandAugment for twice as many, which take longer. In the network of half "
        "the width it gains half a point.",
        columns={"2,500": "tune-5-percent"},
        timed="2,500",
        kind="validation",
    ),
]
LONGER = re.compile(", (twice|(three|four|six|ten) times) as long")  # in the names of methods
SEEDS = 3  # of a row of the README and of a bold one, at least
README_RECIPE = "cifar10-1-percent"
README_ROWS = (
    "crop and flip",
    "RandAugment",
    "RandAugment, twice as long",
    "RandAugment, four times as long",
    "RandAugment, six times as long",
    "RandAugment + LatentAdversarial",
    "RandAugment + LatentAdversarial, twice as long",
    "RandAugment + LatentAdversarial, eps 2, twice as long",
)
LABELS = {  # of labels.png, by the names in the README
    "standard": "no augmentation",
    "Randomized-LA, Glow": "LatentPerturb",
    "Adversarial-LA l2 1.0, Glow": "LatentAdversarial",
}
HEAD = """\
# Results

`python examples/paper/draw.py` draws this page. Each run is a line of JSON in
[examples/results/paper](examples/results/paper): settings, versions, losses and its command.

- Accuracies are in per cent: means ± standard deviations. Below three seeds their number stands
  in brackets.
- Each column has one network. All methods see the same labelled images at each seed.
- Bold are the best mean and those within its standard deviation, where the best has three seeds.
- Minutes are those of one CPU core. With a star they are of another processor than the first row's.
"""


def read_runs(recipe: str, kind: str) -> Runs:
    """Read the runs of a recipe in its order, by seed."""
    found = defaultdict(list)
    for entry in read_lines(RESULTS / f"{recipe}.{kind}.jsonl"):
        found[entry["method"]].append(entry)
    methods = read_recipes(RECIPES)[recipe]["methods"] if found else {}
    return {
        name: sorted(found[name], key=lambda run: run["seed"]) for name in methods if name in found
    }


def list_accuracies(runs: list[dict[str, Any]]) -> list[float]:
    """List the accuracy of each run."""
    return [run["accuracy"] for run in runs]


def measure_deviation(values: list[float]) -> float:
    """The standard deviation, 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0


def measure_time(runs: list[dict[str, Any]]) -> tuple[float | None, str]:
    """Measure what a run of a method took of a CPU core, in minutes, and on which processor.

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


def find_best(methods: dict[str, list[float]]) -> set[str]:
    """The method of the best mean accuracy, and those within its deviation; see `HEAD`."""
    means = {name: statistics.mean(own) for name, own in methods.items()}
    best = max(means, key=lambda name: means[name], default="")
    if len(methods) < 2 or len(methods[best]) < SEEDS:
        return set()
    least = means[best] - statistics.stdev(methods[best])
    return {name for name, mean in means.items() if mean >= least}


def write_accuracies(runs: Runs, digits: int) -> dict[str, str]:
    """A cell for each method: the best are bold, and seeds are numbered where there are few."""
    best, cells = find_best({name: list_accuracies(own) for name, own in runs.items()}), {}
    for name, own in runs.items():
        cell = format_spread(list_accuracies(own), digits)
        cell = f"**{cell}**" if name in best else cell
        cells[name] = cell + f" ({len(own)})" * (len(own) < SEEDS)
    return cells


def write_minutes(runs: Runs) -> dict[str, str]:
    """A cell for each method whose time is known; a star marks another processor."""
    times = {name: measure_time(own) for name, own in runs.items()}
    known = {name: (took, where) for name, (took, where) in times.items() if took is not None}
    usual = next((where for _, where in known.values()), "")
    return {name: f"{took:.1f}{'*' * (where != usual)}" for name, (took, where) in known.items()}


def measure_gains(runs: Runs, peer: str) -> dict[str, list[float]]:
    """Subtract what the peer reaches in the same time from each run of other methods.

    Both on the same draws of labels. Runs that take less time than the shortest of the peer's, or
    more than the longest, are left out.
    """
    others = {name: own for name, own in runs.items() if LONGER.sub("", name) != peer}
    known: dict[int, dict[float, float]] = defaultdict(dict)  # by seed and seconds
    for run in (run for name, own in runs.items() if name not in others for run in own):
        known[run["seed"]][run["cpu_seconds"]] = run["accuracy"]
    found = {}
    for name, own in others.items():
        gains = [
            run["accuracy"] - interpolate(known[run["seed"]], run["cpu_seconds"]) for run in own
        ]
        found[name] = [gain for gain in gains if not math.isnan(gain)]
    return found


def write_gains(gains: dict[str, list[float]]) -> dict[str, str]:
    """A cell for each method that has some."""
    return {name: "+" * (sum(own) > 0) + write_spread(own) for name, own in gains.items() if own}


def interpolate(known: dict[float, float], seconds: float) -> float:
    """An accuracy between those known by their seconds, linear in the logarithm of time.

    It is nan where nothing is known on either side.
    """
    times = sorted(known)
    if not times:
        return math.nan
    values = [known[time] for time in times]
    return float(np.interp(math.log(seconds), np.log(times), values, left=math.nan, right=math.nan))


def draw_table(columns: dict[str, dict[str, str]]) -> list[str]:
    """A row for each method, in their order in the longest column; empty columns are left out."""
    columns = {heading: cells for heading, cells in columns.items() if cells}
    longest = max(columns.values(), key=len)
    names = dict.fromkeys([*longest, *(name for cells in columns.values() for name in cells)])
    rows = [["method", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(cells.get(name, "") for cells in columns.values())] for name in names]
    return [f"| {' | '.join(row)} |" for row in rows]


def read_columns(section: Section) -> dict[str, Runs]:
    """The runs of each column that has some."""
    found = {heading: read_runs(name, section.kind) for heading, name in section.columns.items()}
    return {heading: own for heading, own in found.items() if own}


def write_columns(columns: dict[str, Runs], digits: int) -> dict[str, dict[str, str]]:
    """The accuracies of each column."""
    return {heading: write_accuracies(own, digits) for heading, own in columns.items()}


def draw_section(section: Section) -> list[str]:
    """Text, table, plot and commands; nothing where nothing was run."""
    runs = read_columns(section)
    if not runs:
        return []
    columns, recipes = write_columns(runs, section.digits), read_recipes(RECIPES)
    if section.timed in runs:
        minutes = f"minutes, {section.timed}" if len(runs) > 1 else "minutes"
        columns[minutes] = write_minutes(runs[section.timed])
    for heading in runs:
        published = recipes[section.columns[heading]].get("paper", {})
        paper = f"the paper, {heading}" if len(runs) > 1 else "the paper"
        columns[paper] = {name: str(value) for name, value in published.items()}
    lines = [f"\n## {section.title}\n", section.text, "", *draw_table(columns), ""]
    if section.plot:
        path = PICTURES / f"{section.picture}.png"
        draw_plot(find_points(section, runs), section.plot, path)
        lines += [f"![Accuracy against {section.plot}]({path.relative_to(ROOT)})", ""]
    lines += draw_gains(section, runs) if section.peer else []
    test = " --test" * (section.kind == "test")
    commands = [
        f"python examples/paper/run.py {section.columns[heading]} DATA{test}" for heading in runs
    ]
    return [*lines, "```bash", *commands, "```"]


def draw_gains(section: Section, runs: dict[str, Runs]) -> list[str]:
    """Table and plot of what methods gain over the section's peer, by labelled images."""
    gains = {heading: measure_gains(own, section.peer) for heading, own in runs.items()}
    path = PICTURES / f"{section.picture}_gains.png"
    label = f"gain over {section.peer} in equal time (points)"
    draw_plot(place_by_images(runs, gains), IMAGES, path, label)
    table = draw_table({heading: write_gains(own) for heading, own in gains.items()})
    picture = f"![Gain against {IMAGES}]({path.relative_to(ROOT)})"
    return [section.gains, "", *table, "", picture, ""]


def draw_plot(points: Points, axis: str, path: Path, label: str = "accuracy (%)") -> None:
    """Mean and standard deviation of each method's accuracies, by images or minutes."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (method, own) in enumerate(points.items()):
        means = [statistics.mean(values) for values in own.values()]
        errors = [measure_deviation(values) for values in own.values()]
        style = "osD"[number // 10 % 3] + "-"  # as there are ten colours
        axes.errorbar(list(own), means, yerr=errors, fmt=style, capsize=2, label=method)
    label_axes(axis, label, axes, sorted({place for own in points.values() for place in own}))
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)


def find_points(section: Section, runs: dict[str, Runs]) -> Points:
    """Find each method's accuracies by images, for methods of two columns; or by minutes.

    By minutes, "RandAugment, twice as long" is a point of RandAugment.
    """
    if section.plot == IMAGES:
        accuracies = {
            heading: {method: list_accuracies(own) for method, own in column.items()}
            for heading, column in runs.items()
        }
        return place_by_images(runs, accuracies)
    points: Points = defaultdict(dict)
    for method, own in runs.get(section.timed, {}).items():
        if (took := measure_time(own)[0]) is not None:
            points[LONGER.sub("", method)][took] = list_accuracies(own)
    return points


def place_by_images(runs: dict[str, Runs], values: dict[str, dict[str, list[float]]]) -> Points:
    """The values of each column by its labelled images, of methods of two columns or more."""
    points: Points = defaultdict(dict)
    for heading, column in values.items():
        for method, own in column.items():
            if own:
                points[method][runs[heading][method][0]["train_images"]] = own
    return {method: own for method, own in points.items() if len(own) > 1}


def label_axes(axis: str, label: str, axes: Any, ticks: Iterable[float]) -> None:
    """Label the axes of what is drawn against minutes or images."""
    axes.set(xscale="log", xlabel=axis, ylabel=label)
    if axis == MINUTES:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_labels() -> None:
    """The README's plot: three methods of Figure 2, by labelled images."""
    points = find_points(FIGURE_2, read_columns(FIGURE_2))
    drawn = {label: points[name] for name, label in LABELS.items() if name in points}
    if drawn:
        draw_plot(drawn, IMAGES, PICTURES / "labels.png")


def main() -> None:
    """RESULTS.md, the README's plot, and the tables of both pages."""
    lines = [HEAD, *(line for section in SECTIONS for line in draw_section(section))]
    OUTPUT.write_text("\n".join(lines) + "\n")
    draw_labels()
    runs = read_runs(README_RECIPE, "test")
    if runs := {name: runs[name] for name in README_ROWS if len(runs.get(name, ())) >= SEEDS}:
        columns = {"accuracy": write_accuracies(runs, 1), "minutes": write_minutes(runs)}
        write_table(README, MARK, draw_table(columns))
    if columns := read_columns(SMALL_SETS):
        write_table(CHOICE, MARK, draw_table(write_columns(columns, SMALL_SETS.digits)))


if __name__ == "__main__":
    main()
