"""The driver of the paper's tables, at a tiny size."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_glow
from torchvision.transforms.v2.functional import to_pil_image

from latent_aug import load_flow

EXAMPLES = Path(__file__).parents[1] / "examples" / "paper"
METHODS = {
    "none": {"pixels": "none", "seeds": [0]},
    "common": {"seeds": [0, 1]},
    "mixup": {"pixels": "mixup", "seeds": [0]},
    "augmix": {"pixels": "augmix", "seeds": [0]},
    "latent": {"latent": {"eps": 0.25}, "seeds": [0]},
    "attack": {"attack": {"eps": 1.0, "steps": 1, "flow": "tiny"}, "seeds": [0]},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Images of two classes, a flow, a recipe, and the driver's modules."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("test", 6)):
        for index in range(count):
            folder = tmp_path / "data" / "shapes" / part / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            image = torch.randint(256, (3, 16, 16), generator=generator, dtype=torch.uint8)
            to_pil_image(image).save(folder / f"{index:02}.png")
    random_glow().save_pretrained(tmp_path / "flows" / "tiny")
    protocol = {"per_class": 10, "epochs": 1, "width": 4, "batch_size": 8}
    described = {"title": "Shapes", "text": "Two classes.", "paper": {"common": 64.1}}
    flow = {"flow": "tiny", "network_dtype": "bfloat16"}
    recipe = {"data": "shapes", "protocol": protocol, "flow": flow, "methods": METHODS, **described}
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "shapes.json").write_text(json.dumps(recipe))
    return tmp_path


def drive(place, monkeypatch, *options):
    """Run the driver; the files of runs that it left."""
    import run

    command = ["run.py", place / "recipes" / "shapes.json", place / "data"]
    command += ["--flows", place / "flows", "--results", place / "results", *options]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    run.main()
    return sorted((place / "results").rglob("*.json"))


def test_every_run_leaves_its_figures_and_is_not_repeated(place, monkeypatch, capsys):
    files = drive(place, monkeypatch)
    assert len(files) == 7
    entry = json.loads((place / "results/shapes/validation/common 1.json").read_text())
    assert (entry["train_images"], entry["evaluated_on"]) == (16, "4 validation images")
    assert 0 <= entry["accuracy"] <= 100
    assert entry["seed"] == 1
    assert entry["command"].startswith("python examples/paper/run.py")
    entry = json.loads((place / "results/shapes/validation/attack 0.json").read_text())
    flow = load_flow(place / "flows" / "tiny")
    flow.network_dtype = torch.bfloat16
    assert entry["flows"] == {"tiny": flow.fingerprint()}
    entry = json.loads((place / "results/shapes/validation/latent 0.json").read_text())
    assert entry["settings"]["latent"] == {"eps": 0.25, "flow": "tiny", "network_dtype": "bfloat16"}
    before = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    capsys.readouterr()
    assert drive(place, monkeypatch) == files
    assert "1 runs to make; 6 are in" in capsys.readouterr().out
    assert [file.stat().st_mtime_ns for file in files][1:] == before[1:]


def test_the_same_seed_gives_the_same_figures(place, monkeypatch):
    (first,) = drive(place, monkeypatch, "--only", "attack")
    before = json.loads(first.read_text())
    first.unlink()
    drive(place, monkeypatch, "--only", "attack")
    after = json.loads(first.read_text())
    for entry in (before, after):
        del entry["seconds"], entry["cpu_seconds"]
    assert before == after


def test_what_cannot_be_run_is_said_before_training(place, monkeypatch):
    import run

    monkeypatch.setattr(run, "run", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(SystemExit, match=r"no \['atack'\], but \['none', 'common'"):
        drive(place, monkeypatch, "--only", "atack")
    (place / "flows" / "tiny").rename(place / "flows" / "other")
    with pytest.raises(SystemExit, match=r"attack: there is no flow 'tiny'.*\n.*--only"):
        drive(place, monkeypatch, "--only", "none", "attack")


def test_a_data_set_of_torchvision(place, monkeypatch):
    import run

    def fake(name, *, root, train):
        assert (name, root) == ("torchvision:SVHN", place / "data")
        size, low = (20, 0) if train else (6, 128)
        images = torch.randint(low, low + 128, (size, 3, 16, 16), dtype=torch.uint8)
        return [(to_pil_image(image), i % 2) for i, image in enumerate(images)]

    monkeypatch.setattr(run, "open_images", fake)
    path = place / "recipes" / "shapes.json"
    path.write_text(path.read_text().replace('"data": "shapes"', '"data": "torchvision:SVHN"'))
    (file,) = drive(place, monkeypatch, "--test", "--only", "none")
    entry = json.loads(file.read_text())
    assert (entry["train_images"], entry["evaluated_on"]) == (20, "6 test images")


def test_test_images_are_read_with_test_only(place, monkeypatch):
    (file,) = drive(place, monkeypatch, "--test", "--only", "none")
    entry = json.loads(file.read_text())
    assert (entry["train_images"], entry["evaluated_on"]) == (20, "6 test images")


def test_results_are_drawn_from_the_runs(place, monkeypatch):
    import draw

    drive(place, monkeypatch, "--test", "--only", "common", "none")
    places = {"RECIPES": "recipes", "RUNS": "results", "PICTURES": "", "OUTPUT": "RESULTS.md"}
    for name, part in {**places, "ROOT": "", "README": "README.md"}.items():
        monkeypatch.setattr(draw, name, place / part)
    monkeypatch.setattr(draw, "FIRST", "shapes")
    monkeypatch.setattr(draw, "CURVES", {})
    readme = "\n".join(["Before.", draw.MARKS[0], "old", draw.MARKS[1], "After."])
    (place / "README.md").write_text(readme)
    draw.main()
    lines = (place / "RESULTS.md").read_text().splitlines()
    accuracies = [
        json.loads((place / f"results/shapes/test/common {seed}.json").read_text())["accuracy"]
        for seed in (0, 1)
    ]
    (row,) = [line for line in lines if line.startswith("| common")]
    assert f"{sum(accuracies) / 2:.1f} ±" in row
    assert row.endswith("| 64.1 |")
    assert next(line for line in lines if line.startswith("| method")).split(" | ")[2] == "loss"
    assert (place / "shapes.png").is_file()
    first, _, *drawn, last = (place / "README.md").read_text().splitlines()
    assert (first, last) == ("Before.", "After.")
    assert [cell for i, cell in enumerate(row.split(" | ")) if i != 2] in [
        cells.split(" | ") for cells in drawn
    ]
    assert "old" not in drawn


def test_minutes_are_what_was_computed_where_that_is_known(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import draw

    by_clock = {"seconds": 600.0, "device": "cpu"}
    known = {"seconds": 900.0, "cpu_seconds": 120.0, "device": "cpu"}
    assert draw.minutes([by_clock, known]) == 2.0
    assert draw.minutes([by_clock, by_clock]) is None
    assert draw.minutes([{**known, "device": "NVIDIA"}]) is None  # it was shared
    elsewhere = {"cpu_seconds": 60.0, "processor": "another", "device": "cpu"}
    assert draw.minutes([known, elsewhere]) == 2.0
    figures = {"accuracy": 50.0, "train_accuracy": 60.0, "loss": 1.0}
    rows = {"untimed": [by_clock], "usual": [known, elsewhere], "late": [by_clock, elsewhere]}
    runs = {name: [{**run, **figures} for run in own] for name, own in rows.items()}
    ends = [row.split(" | ")[-1] for row in draw.table(runs, {})[2:]]
    assert ends == [" |", "2.0 |", "1.0* |"]
    assert "minutes" not in draw.table({"untimed": runs["untimed"]}, {})[0]


def test_bold_is_what_the_best_is_not_clearly_above(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import draw

    assert draw.best_of({"a": [70.0, 71.0, 72.0]}) == set()  # nothing to be better than
    best = {"a": [70.0, 71.0, 72.0], "b": [70.5], "c": [69.9]}
    assert draw.best_of(best) == {"a", "b"}
    assert draw.best_of({**best, "d": [74.0]}) == set()


def test_runs_of_two_precisions_do_not_meet_in_a_table(place, monkeypatch):
    drive(place, monkeypatch, "--only", "none", "--precision", "float32")
    with pytest.raises(SystemExit, match=r"none 0\.json was run in float32: give --precision"):
        drive(place, monkeypatch, "--only", "none")


def test_cutout_is_a_square_about_any_pixel(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import methods

    image, colour = torch.zeros(3, 32, 32, dtype=torch.uint8), torch.tensor([[[9]], [[8]], [[7]]])
    cut = torch.stack([methods.cutout(image, colour.byte()) for _ in range(500)])
    assert image.max() == 0
    hole = cut[:, 0] == 9
    assert ((cut[:, 2] == 7) == hole).all()
    assert hole.any(dim=0).all()
    sizes = hole.flatten(1).sum(dim=1)
    assert sizes.max() == 16 * 16
    assert sizes.min() < 100
    # a side is 14 on average, as the centre may be at the border
    assert sizes.float().mean() == pytest.approx(14**2, rel=0.05)


def test_the_readme_and_the_results_are_those_of_the_runs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import draw

    kept, readme = draw.OUTPUT.read_text(), draw.README.read_text()
    monkeypatch.setattr(draw, "OUTPUT", tmp_path / "RESULTS.md")
    monkeypatch.setattr(draw, "README", tmp_path / "README.md")
    monkeypatch.setattr(draw, "plot", lambda runs, path: None)
    monkeypatch.setattr(draw, "CURVES", {})
    (tmp_path / "README.md").write_text(readme)
    draw.main()
    assert draw.README.read_text() == readme
    drawn = [line for line in draw.OUTPUT.read_text().split("\n") if line.startswith("|")]
    assert set(drawn) <= set(kept.split("\n"))
    table = readme.split(draw.MARKS[0])[1].split(draw.MARKS[1])[0]
    cells = [row.split(" | ") for row in table.strip().split("\n")]
    means = {method: mean.strip("*").split()[0] for method, mean, *_ in cells}
    first = readme.split("```")[0]  # its first paragraph quotes these
    for method in ("common", "randaugment", "LatentPerturb linf 0.25", "LatentAdversarial k3 p0.5"):
        assert means[f"| {method}"] in first, method
