"""The driver of the paper's tables, at a tiny size."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_glow
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from latent_aug import load_flow

EXAMPLES = Path(__file__).parents[1] / "examples" / "paper"
ATTACK = {"eps": 1.0, "steps": 1, "flow": "tiny"}
METHODS = {
    "none": {"pixels": "none", "seeds": [0]},
    "common": {"seeds": [0, 1]},
    "mixup": {"pixels": "mixup", "seeds": [0]},
    "augmix": {"pixels": "augmix", "seeds": [0]},
    "latent": {"latent": {"eps": 0.25}, "seeds": [0]},
    "attack": {"attack": ATTACK, "seeds": [0]},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Images of two classes, a flow, a recipe, and the driver's modules."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("test", 6)):
        for index in range(count):
            folder = tmp_path / "data" / "shapes" / part / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            image = torch.randint(256, (3, 16, 16), generator=generator, dtype=torch.uint8)
            to_pil_image(image).save(folder / f"{index:02}.png")
    random_glow().save_pretrained(tmp_path / "flows" / "tiny")
    # at a width of 4 torch 2.14 corrupts memory in float32, on some processors
    protocol = {"per_class": 10, "epochs": 1, "width": 8, "batch_size": 8}
    protocol |= {"network": "preactivation", "average": 0.5, "label_smoothing": 0.1}
    described = {"title": "Shapes", "text": "Two classes.", "paper": {"common": 64.1}}
    flow = {"flow": "tiny", "network_dtype": "bfloat16"}
    recipe = {"data": "shapes", "protocol": protocol, "flow": flow, "methods": METHODS, **described}
    (tmp_path / "recipes").mkdir()
    write_recipe(tmp_path, recipe)
    return tmp_path


def write_recipe(place, recipe):
    (place / "recipes" / "some.json").write_text(json.dumps({"shapes": recipe}))


def change_recipe(place, **changes):
    """Change the recipe's protocol, or with methods= these."""
    recipe = json.loads((place / "recipes" / "some.json").read_text())["shapes"]
    recipe["methods"] = changes.pop("methods", recipe["methods"])
    recipe["protocol"] |= changes
    write_recipe(place, recipe)


def write_command(place, *options):
    """The driver's command line."""
    command = ["run.py", "shapes", place / "data", "--recipes", place / "recipes"]
    command += ["--flows", place / "flows", "--state", place / "state"]
    if "--results" not in options:
        command += ["--results", place / "results"]
    return [str(part) for part in (*command, *options)]


def drive(place, monkeypatch, *options, results="results"):
    """Run the driver; the runs that it left."""
    import run

    options = ("--results", place / results, *options)
    monkeypatch.setattr(sys, "argv", write_command(place, *options))
    run.main()
    return read_entries(place, results, "test" if "--test" in options else "validation")


def read_entries(place, results="results", kind="validation"):
    """The runs of a results folder."""
    import records

    return records.read_lines(place / results / f"shapes.{kind}.jsonl")


def start(place, *options):
    """The driver in a process of its own, which computes as this one does."""
    command = [sys.executable, str(EXAMPLES / "run.py"), *write_command(place, *options)[1:]]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, env={**os.environ, **threads}, stderr=subprocess.DEVNULL)


def drop_times(entry):
    """A run's entry without what differs from one time to another."""
    return {k: v for k, v in entry.items() if k not in ("seconds", "cpu_seconds")}


def test_every_run_leaves_its_figures_and_is_not_repeated(place, monkeypatch, capsys):
    runs = drive(place, monkeypatch)
    found = {(entry["method"], entry["seed"]): entry for entry in runs}
    assert len(runs) == len(found) == 7
    entry = found["common", 1]
    assert (entry["train_images"], entry["evaluated_on"]) == (20, "20 validation images")
    assert 0 <= entry["accuracy"] <= 100
    assert entry["command"].startswith("python examples/paper/run.py shapes DATA")
    flow = load_flow(place / "flows" / "tiny")
    flow.network_dtype = torch.bfloat16
    assert found["attack", 0]["flows"] == {"tiny": flow.fingerprint()}
    latent = {"eps": 0.25, "flow": "tiny", "network_dtype": "bfloat16"}
    assert found["latent", 0]["settings"]["latent"] == latent
    path = place / "results" / "shapes.validation.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join(others))
    capsys.readouterr()
    drive(place, monkeypatch)
    said = capsys.readouterr().out
    assert said.startswith("Shapes. Two classes.\n1 runs to make; 6 are in")
    *kept, again = path.read_text().splitlines(keepends=True)
    assert kept == others
    assert drop_times(json.loads(again)) == drop_times(json.loads(first))


def test_settings_are_chosen_on_images_that_are_not_trained_on(place):
    from protocol import Protocol, read_images, split

    images = read_images(place / "data" / "shapes" / "train")
    own, others = split(images, None, Protocol(per_class=10))
    every, fifth = split(images, None, Protocol(per_class=None))
    assert [len(part.labels) for part in (own, others, every, fifth)] == [20, 20, 32, 8]
    for part, other in ((own, others), (every, fifth)):
        both = torch.cat([part.pixels, other.pixels]).flatten(1)
        assert len(both.unique(dim=0)) == len(images.labels)


def arrange(place, monkeypatch, name):
    """What arrange.py makes of <place>/source, as part/class/file."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import arrange as driver

    command = ["arrange.py", name, place / "source", place / "out"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    driver.main()
    return sorted(str(file.relative_to(place / "out")) for file in place.glob("out/*/*/*"))


def write_image(path, size=(8, 8)):
    """An image of the letters' mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("1", size).save(path)


def test_half_of_each_class_is_for_tests(tmp_path, monkeypatch):
    for number in range(6):
        write_image(tmp_path / "source" / "one" / "deeper" / f"{number}.png")
    (tmp_path / "source" / "one" / "index.txt").touch()
    (tmp_path / "source" / "LICENSE").touch()
    files = arrange(tmp_path, monkeypatch, "hands")
    assert [file.rsplit("/", 1)[0] for file in files] == 3 * ["test/one"] + 3 * ["train/one"]
    assert {Path(file).stem for file in files} == set("012345")


def test_letters_are_tested_on_others_who_drew(tmp_path, monkeypatch):
    for drawer in (1, 10, 11, 20):
        write_image(tmp_path / "source" / "Greek" / "character01" / f"0001_{drawer:02}.png")
    kind = "Greek-character01"
    assert arrange(tmp_path, monkeypatch, "letters") == [
        *(f"test/{kind}/0001_{drawer}.png" for drawer in (11, 20)),
        *(f"train/{kind}/0001_{drawer}.png" for drawer in ("01", "10")),
    ]


def test_nuclei_are_squares_about_their_centres(tmp_path, monkeypatch):
    io = pytest.importorskip("scipy.io")
    folder = tmp_path / "source" / "test" / "img1"
    write_image(folder / "img1.bmp", (100, 60))
    for kind in ("epithelial", "fibroblast", "inflammatory", "others"):
        centres = [[50.4, 20.6], [3.0, 20.0]] if kind == "others" else np.zeros((0, 2))
        io.savemat(folder / f"img1_{kind}.mat", {"detection": centres})
    (file,) = arrange(tmp_path, monkeypatch, "nuclei")  # the other one is at the border
    assert file == "test/others/img1-50-21.png"
    with Image.open(tmp_path / "out" / file) as square:
        assert square.size == (32, 32)


def test_a_method_changes_the_protocol_where_it_is_tuned(place, monkeypatch):
    methods = {"first": {"seeds": [0]}, "longer": {"protocol": {"epochs": 2}, "seeds": [0]}}
    change_recipe(place, methods=methods)
    first, longer = drive(place, monkeypatch)
    assert [run["protocol"].pop("epochs") for run in (first, longer)] == [1, 2]
    assert first["protocol"] == longer["protocol"]
    assert first["settings"] == longer["settings"]
    assert first["loss"] != longer["loss"]


def test_the_average_of_the_weights_is_evaluated(place, monkeypatch):
    last = {"first": {"seeds": [0]}, "no average": {"protocol": {"average": 0.0}, "seeds": [0]}}
    change_recipe(place, methods=last)
    first, other = drive(place, monkeypatch)
    assert first["loss"] != other["loss"]


def test_each_seed_has_a_draw_of_its_own_unless_the_recipe_names_one(place, monkeypatch):
    import run

    seen, figures = [], {"accuracy": 0.0}
    monkeypatch.setattr(run, "run", lambda m, train, *a, **k: seen.append(train) or figures)
    runs = drive(place, monkeypatch, "--only", "common")
    assert [entry["protocol"]["data_seed"] for entry in runs] == [0, 1]
    assert not torch.equal(seen[0].pixels, seen[1].pixels)
    assert all(part.labels.bincount().tolist() == [10, 10] for part in seen)
    change_recipe(place, data_seed=0)
    runs = drive(place, monkeypatch, "--only", "common", results="others")
    assert [entry["protocol"]["data_seed"] for entry in runs] == [0, 0]
    assert all(torch.equal(part.pixels, seen[0].pixels) for part in seen[2:])


INTERRUPTED = {
    "common": {},
    "mixup": {"pixels": "mixup"},
    "augmix": {"pixels": "augmix"},
    "latent": {"latent": {"eps": 0.25}},
    "attack": {"attack": {**ATTACK, "p": 0.5, "random_start": True}},
    "phases": {"phases": [[1, {"latent": {"eps": 0.25}}], [1, {"attack": ATTACK}]]},
}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("method", INTERRUPTED)
def test_an_interrupted_run_ends_as_an_undisturbed_one(place, monkeypatch, method, optimizer):
    import methods

    schedule = {"sgd": "one cycle", "adam": "exponential"}[optimizer]
    change_recipe(
        place,
        methods={method: {**INTERRUPTED[method], "seeds": [3]}},
        **{"epochs": 4, "batch_size": 5, "optimizer": optimizer, "schedule": schedule},
        precision="float32",
    )
    (undisturbed,) = drive(place, monkeypatch, "--test", results="undisturbed")
    steps, augment = [], methods.Augmentation.__call__

    def stop_at_tenth(self, x, y):
        steps.append(len(x))
        if len(steps) == 10:  # in the third epoch of four batches
            raise KeyboardInterrupt
        return augment(self, x, y)

    monkeypatch.setattr(methods.Augmentation, "__call__", stop_at_tenth)
    with pytest.raises(KeyboardInterrupt):
        drive(place, monkeypatch, "--test", "--save-seconds", "0")
    assert read_entries(place, kind="test") == []
    assert len(list((place / "state").glob("*.pt"))) == 1
    (resumed,) = drive(place, monkeypatch, "--test")
    assert len(steps) == 17  # 16, and the one that was stopped
    assert drop_times(resumed) == drop_times(undisturbed)
    assert list((place / "state").glob("*.pt")) == []


def test_a_state_is_of_one_run_alone(place, monkeypatch):
    import run

    states = []

    def keep(*args, state, **options):
        states.append(state)
        return {"accuracy": 0.0}

    monkeypatch.setattr(run, "run", keep)
    drive(place, monkeypatch, "--only", "common", "attack")
    drive(place, monkeypatch, "--only", "common", results="others")
    drive(place, monkeypatch, "--only", "common", "--test")
    change_recipe(place, lr=0.05)
    drive(place, monkeypatch, "--only", "common", results="more")
    assert len(set(states)) == len(states) == 9


def test_a_killed_process_goes_on_from_its_last_state(place, monkeypatch):
    change_recipe(place, epochs=60, methods={"common": {"seeds": [0]}})
    process = start(place, "--save-seconds", "0")
    while not list((place / "state").glob("*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() < 0
    (state,) = (place / "state").glob("*.pt")
    assert 0 < torch.load(state, weights_only=True)["at"]["step"] < 120
    assert read_entries(place) == []
    (resumed,) = drive(place, monkeypatch)
    (undisturbed,) = drive(place, monkeypatch, results="undisturbed")
    assert drop_times(resumed) == drop_times(undisturbed)
    assert {path.suffix for path in (place / "state").iterdir()} == {".lock"}


def test_processes_share_a_recipe(place):
    processes = [start(place, "--only", "none", "common", "mixup") for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    found = sorted((entry["method"], entry["seed"]) for entry in read_entries(place))
    assert found == [("common", 0), ("common", 1), ("mixup", 0), ("none", 0)]


def test_a_run_of_another_process_is_not_begun(place, monkeypatch, capsys):
    import run

    train_one, trained = run.train_one, []

    def meet(task, *args):
        trained.append((task["method"], task["seed"]))
        if len(trained) == 1:
            drive(place, monkeypatch, "--only", "none", "common")
        return train_one(task, *args)

    monkeypatch.setattr(run, "train_one", meet)
    runs = drive(place, monkeypatch, "--only", "none", "common")
    assert trained == [("none", 0), ("common", 0), ("common", 1)]
    assert len(runs) == 3
    said = capsys.readouterr().out.splitlines()
    assert said.count("none, seed 0: another process has it") == 1  # while it was trained
    assert said.count("common, seed 1: another process has it") == 1  # when it was


def test_lines_are_added_one_after_another(place):
    import records

    path, lock = place / "results" / "lines.jsonl", place / "lock"
    threads = [
        threading.Thread(target=records.append_line, args=(path, {"n": n}), kwargs={"lock": lock})
        for n in range(2)
    ]
    with records.claim(lock):
        for thread in threads:
            thread.start()
        threads[0].join(0.2)
        assert all(thread.is_alive() for thread in threads)
        assert records.read_lines(path) == []
    for thread in threads:
        thread.join()
    assert sorted(line["n"] for line in records.read_lines(path)) == [0, 1]


def test_a_torn_last_line_is_left_out_and_its_run_made_again(place, monkeypatch):
    drive(place, monkeypatch, "--only", "common")
    path = place / "results" / "shapes.validation.jsonl"
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    path.write_bytes(first + second[:50])
    assert [entry["seed"] for entry in read_entries(place)] == [0]
    drive(place, monkeypatch, "--only", "common")
    assert path.read_bytes().startswith(first)
    assert [entry["seed"] for entry in read_entries(place)] == [0, 1]
    path.write_bytes(whole[:-1])  # all but the line's end
    assert [entry["seed"] for entry in read_entries(place)] == [0, 1]
    drive(place, monkeypatch, "--only", "none")
    assert path.read_bytes().startswith(whole)
    assert [entry["method"] for entry in read_entries(place)] == ["common", "common", "none"]
    path.write_bytes(first[:50] + b"\n" + second)
    with pytest.raises(ValueError, match=r"line 1 of .*shapes.validation.jsonl is damaged"):
        read_entries(place)


def test_what_cannot_be_run_is_said_before_training(place, monkeypatch):
    import run

    monkeypatch.setattr(run, "run", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr(sys, "argv", ["run.py", "shape", "data", *write_command(place)[3:]])
    with pytest.raises(SystemExit, match=r"no recipe 'shape', but\n  shapes: Shapes$"):
        run.main()
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
    path = place / "recipes" / "some.json"
    path.write_text(path.read_text().replace('"data": "shapes"', '"data": "torchvision:SVHN"'))
    (entry,) = drive(place, monkeypatch, "--test", "--only", "none")
    assert (entry["train_images"], entry["evaluated_on"]) == (20, "6 test images")


def test_test_images_are_read_with_test_only(place, monkeypatch):
    (entry,) = drive(place, monkeypatch, "--test", "--only", "none")
    assert (entry["train_images"], entry["evaluated_on"]) == (20, "6 test images")


def test_results_are_drawn_from_the_runs(place, monkeypatch):
    import draw

    runs = drive(place, monkeypatch, "--test", "--only", "common", "none")
    places = {"RECIPES": "recipes", "RESULTS": "results", "PICTURES": "", "OUTPUT": "RESULTS.md"}
    for name, part in {**places, "ROOT": "", "README": "README.md"}.items():
        monkeypatch.setattr(draw, name, place / part)
    section = draw.Section(
        title="Shapes",
        text="Two classes.",
        columns={"20": "shapes", "40": "others"},
        timed="20",
        plot=draw.MINUTES,
        picture="shapes",
    )
    monkeypatch.setattr(draw, "SECTIONS", [section])
    monkeypatch.setattr(draw, "SMALL_SETS", section)
    monkeypatch.setattr(draw, "CHOICE", place / "choose.md")
    readme = "\n".join(["Before.", f"<!-- {draw.MARK} -->", "old", "<!-- until here -->", "After."])
    (place / "README.md").write_text(readme)
    (place / "choose.md").write_text(readme)
    recipe = json.loads((place / "recipes" / "some.json").read_text())["shapes"]
    path = place / "recipes" / "some.json"
    path.write_text(json.dumps({"shapes": recipe, "others": recipe}))
    monkeypatch.setattr(draw, "README_RECIPE", "others")
    monkeypatch.setattr(draw, "README_ROWS", ("common", "none"))
    monkeypatch.setattr(draw, "SEEDS", 2)  # "none" has one
    draw.main()
    assert (place / "README.md").read_text() == readme  # there are no runs for its table
    monkeypatch.setattr(draw, "README_RECIPE", "shapes")
    draw.main()
    lines = (place / "RESULTS.md").read_text().splitlines()
    accuracies = [entry["accuracy"] for entry in runs if entry["method"] == "common"]
    mean = f"{sum(accuracies) / 2:.1f} ±"
    (row,) = [line for line in lines if line.startswith("| common")]
    assert mean in row
    assert row.endswith("| 64.1 |")
    assert "| method | 20 | minutes | the paper |" in lines  # no column without runs
    assert "python examples/paper/run.py shapes DATA --test" in lines
    assert (place / "shapes.png").is_file()
    first, _, *drawn, last = (place / "README.md").read_text().splitlines()
    assert (first, last) == ("Before.", "After.")
    assert [line.split(" |")[0] for line in drawn[:-1]] == ["| method", "| ---", "| common"]
    assert mean in drawn[2]
    assert any(mean in line for line in (place / "choose.md").read_text().splitlines()[2:-2])


def test_one_table_has_columns_of_several_recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import draw

    columns = {"few": {"a": "1", "b": "2"}, "none": {}, "many": {"c": "3", "b": "4"}}
    assert draw.draw_table(columns) == [
        "| method | few | many |",
        "| --- | --- | --- |",
        "| a | 1 |  |",
        "| b | 2 | 4 |",
        "| c |  | 3 |",
    ]


def test_minutes_are_what_was_computed_where_that_is_known(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import draw

    by_clock = {"seconds": 600.0, "device": "cpu"}
    known = {"seconds": 900.0, "cpu_seconds": 120.0, "device": "cpu"}
    assert draw.measure_time([by_clock, known]) == (2.0, "")
    assert draw.measure_time([by_clock, by_clock])[0] is None
    assert draw.measure_time([{**known, "device": "NVIDIA"}])[0] is None  # it was shared
    elsewhere = {"cpu_seconds": 60.0, "processor": "another", "device": "cpu"}
    assert draw.measure_time([known, elsewhere])[0] == 2.0
    rows = {"untimed": [by_clock], "usual": [known, elsewhere], "late": [by_clock, elsewhere]}
    assert draw.write_minutes(rows) == {"usual": "2.0", "late": "1.0*"}


def test_longer_trainings_are_points_of_one_line(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import draw

    section = draw.Section(
        title="", text="", columns={"few": "few"}, timed="few", plot=draw.MINUTES
    )
    names = ("A", "A, twice as long", "A, four times as long", "A, stronger")
    runs = {
        name: [{"accuracy": 50.0 + n, "cpu_seconds": 60.0 * 2**n, "device": "cpu"}]
        for n, name in enumerate(names)
    }
    assert draw.find_points(section, {"few": runs}) == {
        "A": {1.0: [50.0], 2.0: [51.0], 4.0: [52.0]},
        "A, stronger": {8.0: [53.0]},
    }


def test_a_gain_is_over_what_the_peer_reaches_in_that_time(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import draw

    def took(*runs):
        return [{"seed": s, "cpu_seconds": 60.0 * m, "accuracy": a} for s, m, a in runs]

    runs = {
        "peer": took((0, 5, 50.0), (1, 5, 40.0)),
        "peer, four times as long": took((0, 20, 58.0)),
        "shorter": took((0, 4, 60.0)),
        "longer": took((0, 21, 60.0)),
        "both": took((0, 10, 60.0), (1, 5, 60.0), (2, 10, 60.0)),  # no peer on the third draw
    }
    found = draw.measure_gains(runs, "peer")
    assert found == {"shorter": [], "longer": [], "both": pytest.approx([6.0, 20.0])}
    assert draw.write_gains(found) == {"both": "+13.0 (2)"}


def test_bold_is_what_the_best_is_not_clearly_above(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import draw

    assert draw.find_best({"a": [70.0, 71.0, 72.0]}) == set()  # nothing to be better than
    best = {"a": [70.0, 71.0, 72.0], "b": [70.5], "c": [69.9]}
    assert draw.find_best(best) == {"a", "b"}
    assert draw.find_best({**best, "d": [74.0]}) == set()
    runs = {name: [{"accuracy": value} for value in own] for name, own in best.items()}
    cells = draw.write_accuracies(runs, 1)
    assert cells == {"a": "**71.0 ± 1.0**", "b": "**70.5** (1)", "c": "69.9 (1)"}


def test_runs_of_two_precisions_do_not_meet_in_a_table(place, monkeypatch):
    drive(place, monkeypatch, "--only", "none", "--precision", "float32")
    with pytest.raises(SystemExit, match=r"none, seed 0, was run in float32: give --precision"):
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
    choice = draw.CHOICE.read_text()
    monkeypatch.setattr(draw, "OUTPUT", tmp_path / "RESULTS.md")
    monkeypatch.setattr(draw, "README", tmp_path / "README.md")
    monkeypatch.setattr(draw, "draw_plot", lambda *arguments: None)
    monkeypatch.setattr(draw, "CHOICE", tmp_path / "choose.md")
    (tmp_path / "README.md").write_text(readme)
    (tmp_path / "choose.md").write_text(choice)
    draw.main()
    assert draw.README.read_text() == readme
    assert draw.CHOICE.read_text() == choice
    drawn = [line for line in draw.OUTPUT.read_text().split("\n") if line.startswith("|")]
    assert drawn == [line for line in kept.split("\n") if line.startswith("|")]


def test_each_strategy_attacks_a_batch_and_keeps_its_classes(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import strategies
    from networks import NETWORKS
    from protocol import Standardized

    x = torch.nn.functional.interpolate(torch.rand(16, 3, 4, 4), 32, mode="bilinear")
    for name, strategy in strategies.STRATEGIES.items():
        if name in ("none", "own BatchNorm"):  # the latter needs timm
            continue
        torch.manual_seed(0)
        network = NETWORKS["resnet"](3, 2, 4)
        model = Standardized(network, (255 * x).to(torch.uint8), "float32")
        perturb = strategy(model, 3)
        perturb.begin(0.5)
        with torch.no_grad():
            classes = model.eval()(x).argmax(dim=1)  # so that all is right
        model.train()
        images, kept = perturb(x, classes)
        assert (images.shape, kept.tolist()) == (x.shape, classes.tolist()), name
        assert model.training, name
        if name.startswith("predicted labels"):
            changed = (images != x).flatten(1).any(dim=1).sum()
            assert changed == (16 if "every" in name else 8), name


def test_a_scaled_share_is_that_part_of_the_default(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import strategies

    tally = torch.tensor([5000.0, *[500.0] * 10])
    share = {}
    for highest, power in ((0.5, 1.0), (0.25, 1.0), (0.5, 2.0)):
        scaled = strategies.ScaledShare(highest, power)
        scaled.update(tally)
        scaled.update(tally)
        share[highest, power] = scaled.value
    assert share[0.5, 1.0] == pytest.approx(0.45, abs=1e-3)
    assert share[0.25, 1.0] == pytest.approx(0.225, abs=1e-3)
    assert share[0.5, 2.0] == pytest.approx(0.405, abs=1e-3)


def test_draws_of_a_set_count_where_each_method_has_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import strategies
    from records import append_line

    monkeypatch.setattr(strategies, "RESULTS", tmp_path / "results.jsonl")
    for number, (pixels, strategy, seed) in enumerate(
        [
            ("common", "none", 0),
            ("common", "none", 1),
            ("common", "the default", 0),
            ("common", "predicted labels", 0),
            ("randaugment", "none", 1),
            ("randaugment", "the default", 1),
        ]
    ):
        row = {"set": "hands", "pixels": pixels, "per_class": 13, "strategy": strategy}
        row |= {"seed": seed, "accuracy": 50.0 + number}
        append_line(strategies.RESULTS, row, lock=tmp_path / "lock")
    assert strategies.draw_page_table("common")[2:] == [
        "| hands, 130 | 10 | 1 | 50.0 (1) | 52.0 (1) | 53.0 (1) |"
    ]
    assert strategies.draw_page_table("randaugment")[2:] == [
        "| hands, 130 | 10 | 1 | 54.0 (1) | 55.0 (1) |"
    ]


@pytest.mark.parametrize("pixels", ["common", "randaugment"])
def test_the_page_of_the_attack_shows_its_runs(pixels, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import strategies

    table = [f"<!-- {strategies.MARK}: {pixels} -->", *strategies.draw_page_table(pixels), "<!--"]
    assert "\n".join(table) in strategies.PAGE.read_text()
