"""The comparison on unlabelled images: every method learns, a line a run, the page's table."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

sys.path.append(str(Path(__file__).parents[1] / "examples" / "paper"))
import compare_unlabelled as unlabelled
from records import read_lines


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(unlabelled, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(unlabelled, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(unlabelled, "UNLABELLED", 4)
    for number in range(80):
        part, kind = ("test" if number % 10 == 9 else "train"), "ab"[number % 2]
        folder = tmp_path / "images" / part / kind
        folder.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 32, 32) * (0.4 + 0.6 * (kind == "b")), folder / f"{number}.png")
    return tmp_path / "images"


def compare(images, monkeypatch, *options):
    settings = ["--labels", "64", "--minutes", "0.002", "--seeds", "0", *options]
    monkeypatch.setattr(sys, "argv", ["compare_unlabelled.py", str(images), *settings])
    unlabelled.main()
    return read_lines(unlabelled.RESULTS)


def test_each_method_leaves_one_line_and_is_not_run_again(images, monkeypatch):
    rows = compare(images, monkeypatch)
    assert [row["method"] for row in rows] == list(unlabelled.METHODS)
    assert all(0 <= row["accuracy"] <= 100 and row["steps"] >= 1 for row in rows)
    assert compare(images, monkeypatch) == rows


def test_images_to_validate_on_are_not_among_the_unlabelled_ones(images, monkeypatch):
    seen = []
    monkeypatch.setattr(
        unlabelled, "train", lambda m, method, few, many, *a, **k: seen.append(many) or 1
    )
    monkeypatch.setattr(unlabelled, "evaluate", lambda model, found: seen.append(found) or (0, 0))
    monkeypatch.setattr("protocol.VALIDATION_IMAGES", 6)
    monkeypatch.setattr(unlabelled, "VALIDATION_IMAGES", 6)
    for options in (("--validate",), ()):
        compare(images, monkeypatch, "--only", "FixMatch", *options)
    first, many, found, all_of_them, test = seen
    assert len(first) == len(many)
    assert len(many) == 66
    assert len(found.pixels) == 6
    assert not any((image == many).flatten(1).all(1).any() for image in found.pixels)
    assert (len(all_of_them), len(test.pixels)) == (72, 8)


@pytest.mark.parametrize("labels", ["1", "63"])
def test_labels_are_as_many_of_each_class(labels, images, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        compare(images, monkeypatch, "--labels", labels)
    assert f"multiple of 2, got {labels}" in capsys.readouterr().err


def test_another_weight_decay_or_split_is_another_run(images, monkeypatch):
    own = ("--only", "FixMatch")
    compare(images, monkeypatch, *own)
    for other in (("--weight-decay", "0"), ("--validate",)):
        rows = compare(images, monkeypatch, *own, *other)
    assert [(row["weight_decay"], row["validate"]) for row in rows] == [
        (5e-3, False),
        (0.0, False),
        (5e-3, True),
    ]


@pytest.mark.parametrize("name", [n for n, m in unlabelled.METHODS.items() if m.term is not None])
def test_unlabelled_images_reach_the_weights(name):
    torch.manual_seed(0)
    model = unlabelled.NETWORKS["preactivation"](3, 4, 8)
    options = unlabelled.METHODS[name].term | {"threshold": 0.0}  # this model is sure of nothing
    term = unlabelled.make_term(model, **options)
    loss = term(torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8))
    loss.backward()
    assert loss > 0
    assert model[0].weight.grad.norm() > 0


def test_the_learning_rate_grows_then_falls_to_nothing():
    rates = [unlabelled.choose_rate(share / 100) for share in range(101)]
    top = rates.index(max(rates))
    assert top == 30
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[0] < 0.01
    assert rates[-1] == pytest.approx(0)


def test_batches_are_new_orders_of_all():
    batches = unlabelled.draw_batches(10, 5)
    passes = [torch.cat([next(batches), next(batches)]) for _ in range(2)]
    assert all(sorted(each.tolist()) == list(range(10)) for each in passes)
    assert not torch.equal(*passes)


def test_the_table_has_test_runs_at_the_defaults_alone(images, monkeypatch):
    usual = {"labels": 40, "validate": False, "minutes": 12.0, "weight_decay": 0.005}
    many = {"labels": 2500}  # at which another weight decay is the default
    taken = ({}, {}, many | {"weight_decay": 0.002})
    others = (*taken, many, {"validate": True}, {"minutes": 1.0}, {"weight_decay": 0.0})
    for seed, other in enumerate(others):
        row = {"method": "FixMatch", "seed": seed, **usual, **other}
        unlabelled.append_line(
            unlabelled.RESULTS, row | {"accuracy": 50.0 + seed, "steps": 1000}, lock=images / "lock"
        )
    assert unlabelled.draw_table() == [
        "| method | 40 labels | steps | 2,500 labels | steps |",
        "|---|---|---|---|---|",
        "| FixMatch | 50.5 (2) | 1,000 | 52.0 (1) | 1,000 |",
    ]


def test_only_images_of_which_the_model_is_sure_are_taken(monkeypatch):
    class Bright(torch.nn.Module):
        seen = 0

        def forward(self, x):
            self.seen = len(x)
            return torch.stack([6 * x.mean((1, 2, 3)), torch.zeros(len(x))], 1)

    model = Bright()
    monkeypatch.setattr(unlabelled, "UNLABELLED", 4)
    term = unlabelled.make_term(model, noise=0.0, threshold=0.95, temperature=0.0)
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    assert term(images) == 0
    images[2:5] = 255
    found = term(images)
    assert model.seen == 3
    assert 0 < found < 3 / 4 * math.log(2)
    images[:] = 255
    term(images)
    assert model.seen == 4


def test_the_first_part_is_learned_once(images, monkeypatch):
    trained = []
    train = unlabelled.train
    monkeypatch.setattr(
        unlabelled,
        "train",
        lambda m, method, *a, **k: trained.append(method) or train(m, method, *a, **k),
    )
    names = "FixMatch", "pseudo-labels"
    compare(images, monkeypatch, "--only", *names)
    assert trained == [unlabelled.Training(), *(unlabelled.METHODS[name] for name in names)]


def test_the_page_shows_the_runs():
    table = [f"<!-- {unlabelled.MARK} -->", *unlabelled.draw_table(), "<!--"]
    assert "\n".join(table) in unlabelled.PAGE.read_text()
