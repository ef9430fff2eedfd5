"""Draw the pictures of those pages in docs that measure little.

    pip install -e '.[train]' scikit-image
    python examples/draw_pages.py docs/pictures                 # all
    python examples/draw_pages.py docs/pictures flows limits    # these

Photographs and clothes come with the package, coins and tissue with scikit-image, all free to use.
Perturbations are stronger than the default, to be seen at a glance.
"""

import argparse
import sys
import textwrap
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from panels import (
    ASTRONAUT,
    BOLD,
    CAT,
    CHANGE,
    amplify,
    describe,
    lay_out,
    perturb,
    read_class,
    read_photograph,
    read_sample,
    read_tissue,
    show,
)
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from latent_aug import LatentAdversarial, check_flow
from latent_aug.diagnostics.explore import CLASSES, load_clothes

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from measurements import read_measurement


def draw_extend() -> Figure:
    """The bundled noise and flow beside the page's own."""
    cat, own, flow = read_photograph(CAT), read_class("LaplacePerturb"), read_class("Standardized")
    made = [
        ("LatentPerturb", perturb(cat)),
        ("your LaplacePerturb", perturb(cat, kind=own)),
        ("your Standardized flow", perturb(cat, flow=flow().eval())),
    ]
    changes = [("", amplify(cat, image)) for _, image in made]
    first = "One photograph, the same draws and eps"
    second = "Their changes, 4 times: the last flow moves each pixel alone"
    return lay_out({first: [("photograph", cat), *made], second: [("", None), *changes]})


def draw_flows() -> Figure:
    """Images that a flow suits more and less, by the grade that check gives."""
    images, made = [], []
    advice = {"suits": "take it", "usable": "fine-tune it", "not usable": "fine-tune or train anew"}
    torch.manual_seed(0)
    for name, level in (("clean", 0.0), ("some noise", 0.04), ("strong noise", 0.12)):
        noisy = v2.GaussianNoise(sigma=level)(read_photograph(CAT, 256))
        patches = noisy.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4)
        grade = check_flow("glow-photographs", patches.flatten(0, 1)).grade
        images.append((name, noisy[:, 48:144, 16:112]))
        made.append((f"{grade}:\n{advice[grade]}", perturb(images[-1][1], 0.4)))
    return lay_out({"A photograph with noise": images, "Perturbed, graded by check": made})


def draw_inputs() -> Figure:
    """Kinds of inputs, and what comes out."""
    cat, odd = read_photograph(CAT), read_photograph(ASTRONAUT, 75)[:, :51] / 255
    coins = read_sample("coins", 150, 130, 150, 96)
    mask = tv_tensors.Mask(255 * (tvf.gaussian_blur(coins, 9)[0] > 104).byte())
    cut, pair = tvf.to_pil_image(cat), (tvf.to_pil_image(coins), mask)
    cut.putalpha(Image.radial_gradient("L").resize(cut.size).point(lambda r: 255 * (r < 128)))
    made = [*map(perturb, (cat, odd, cut)), *perturb(pair)]
    given = [describe(image) for image in (cat, odd, cut, *pair)]
    return lay_out({"What goes in": given, "What comes out": [*map(describe, made)]})


def draw_limits() -> Figure:
    """Where a perturbation does harm, or nothing."""
    warnings.filterwarnings("ignore", ".*images dissolve")  # as is to be seen
    torch.manual_seed(0)
    rows = {}
    for sentence, image, eps in (
        ("Colour is the class: the stain changes", read_tissue(), 0.5),
        ("White noise: it comes back as it was", torch.rand(3, 32, 32), 0.5),
        ("Too large an eps: the object dissolves", read_photograph(CAT), 2.0),
    ):
        made, title = perturb(image, eps), f"LatentPerturb, eps {eps:g}"
        rows[sentence] = [("image", image), (title, made), (CHANGE, amplify(image, made))]
    return lay_out(rows)


def draw_placement() -> Figure:
    """A photograph in the pipeline of the page, and in wrong ones."""
    torch.manual_seed(0)
    photograph = read_photograph(CAT, 80)
    crop = v2.RandomCrop(64)(photograph)
    flip = tvf.horizontal_flip(crop) / 255
    normalized, noisy = (flip - 0.5) / 0.25, v2.GaussianNoise(sigma=0.12)(flip)
    try:
        error = str(perturb(normalized))
    except ValueError as raised:
        error = textwrap.fill(f"ValueError: {raised}".split(";")[0], 17)
    right = [("photograph", photograph), ("1. crop", crop), ("2. flip", flip)]
    right += [("3. LatentPerturb", perturb(flip))]
    wrong = [("GaussianNoise", noisy), ("then LatentPerturb", perturb(noisy))]
    wrong += [("Normalize", normalized.clamp(0, 1)), ("then LatentPerturb", error)]
    first = "Right: after crop and flip, before Normalize"
    return lay_out({first: right, "Wrong: after noise, or after Normalize": wrong})


def draw_recipes() -> Figure:
    """Draw what three of the recipes do."""
    tissue, cat, large = read_tissue(), read_photograph(CAT), read_photograph(ASTRONAUT, 224)
    made, details = perturb(large, resolution=32), perturb(tissue, levels=[0, 1])
    copy = [("photograph", large), ("its copy", tvf.resize(large, [32, 32])), ("perturbed", made)]
    copy += [(CHANGE, amplify(large, made))]
    rare = [(f"repetition {seed}", perturb(cat, seed=seed)) for seed in (1, 2, 3)]
    cells = [("tissue", tissue), ("all levels", perturb(tissue)), ("levels=[0, 1]", details)]
    cells += [(CHANGE, amplify(tissue, details))]
    rows = {"Fine-tune at 224: the flow sees a small copy": copy}
    rows["Class imbalance: each repetition differs"] = [("rare image", cat), *rare]
    return lay_out({**rows, "Cells and stains: details change, colours stay": cells})


def draw_reproducibility() -> Figure:
    """One seed twice, and another one."""
    first, again, other = (perturb(read_photograph(CAT), seed=seed) for seed in (0, 0, 1))
    row = [("seed 0", first), ("seed 0 again", again), ("difference", amplify(first, again))]
    row += [("seed 1", other), ("difference, 4 times", amplify(first, other))]
    return lay_out({"The same seed gives the same image": row})


def draw_scale() -> Figure:
    """Draw what two processes bring, as examples/benchmarks/scale.py measured it."""
    found = read_measurement("scale")["scaling"]
    figure = Figure(figsize=(7.5, 2.4), layout="constrained")
    figure.suptitle("Images a second, on the same two cores", **BOLD)
    titles = {"augment": "augment: write copies", "training, float32": "train: learn a flow"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        rates = [figures[key]["images_per_second"] for figures in found.values()]
        bars = axes.barh([*found], rates, color=["silver", "silver", "tab:orange"])
        axes.bar_label(bars, fmt="%.0f", padding=-28)
        axes.set_title(title, fontsize=9)
    axes.invert_yaxis()
    return figure


def draw_unlabelled() -> Figure:
    """An unlabelled image, the attacked one, and the predictions at both."""
    clothes, asked = load_clothes(), []
    model, image = clothes.classifier, clothes.images[9:10]
    hook = model.register_forward_pre_hook(lambda _, given: asked.append(given[0].detach()))
    torch.manual_seed(0)
    LatentAdversarial(model, p=1.0, flow="glow-fashionmnist").consistency(image)
    hook.remove()
    shown = {"unlabelled image": image, "attacked": asked[-1], CHANGE: amplify(image, asked[-1])}
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    figure.suptitle("The loss pulls the two predictions together", **BOLD)
    *places, axes = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.4])
    for place, (title, pixels) in zip(places, shown.items(), strict=True):
        show(place, title, pixels[0])
    for offset, (title, pixels) in zip((-0.2, 0.2), [*shown.items()][:2], strict=True):
        predicted = model(pixels).softmax(1)[0].detach()
        axes.barh(torch.arange(10) + offset, predicted, 0.4, label=title)
    axes.set_yticks(range(10), CLASSES, fontsize=8)
    axes.set_title("predicted probability", fontsize=9)
    axes.legend(fontsize=8)
    axes.invert_yaxis()
    return figure


PAGES = {name[5:]: f for name, f in [*globals().items()] if name.startswith("draw_")}


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", nargs="*", default=[*PAGES], help="without them all")
    args = parser.parse_args()
    if unknown := {*args.pages} - PAGES.keys():
        parser.error(f"no pictures of {unknown}, only of {', '.join(PAGES)}")
    for page in args.pages:
        is_plot = page in ("scale", "unlabelled")
        options = {} if is_plot else {"pil_kwargs": {"quality": 82}}
        PAGES[page]().savefig(args.folder / f"{page}.{'png' if is_plot else 'jpg'}", **options)


if __name__ == "__main__":
    main()
