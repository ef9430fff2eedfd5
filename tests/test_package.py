"""The package as a whole: names, imports, the examples."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import latent_aug

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_every_public_name_is_there():
    for name in latent_aug.__all__:
        assert getattr(latent_aug, name) is not None
        assert name in dir(latent_aug)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = latent_aug.nothing


def test_importing_loads_no_extra():
    code = "import sys, latent_aug; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    optional = {
        "typer",
        "matplotlib",
        "accelerate",
        "gradio",
        "webdataset",
        "latent_aug.training.train",
    }
    assert optional.isdisjoint(modules)


def test_the_quickstart_runs(tmp_path):
    picture = tmp_path / "picture.png"
    script = str(EXAMPLES / "quickstart.py")
    short = ["--epochs", "1", "--seeds", "1", "--picture", str(picture)]
    done = subprocess.run(
        [sys.executable, script, *short], check=True, capture_output=True, text=True
    )
    for method in ("no augmentation", "LatentPerturb", "LatentAdversarial"):
        assert method in done.stdout
    assert picture.stat().st_size > 1000


def test_the_example_of_unlabelled_images_runs():
    script = str(EXAMPLES / "unlabelled.py")
    short = ["--epochs", "1", "--seeds", "1"]
    done = subprocess.run(
        [sys.executable, script, *short], check=True, capture_output=True, text=True
    )
    assert "labelled images alone" in done.stdout
    assert "pseudo-labels, LatentPerturb" in done.stdout


def test_the_quickstart_s_images_are_few_and_balanced(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import quickstart

    for train in (True, False):
        images, labels = quickstart.load_images(train)
        assert images.shape == (1000, 1, 28, 28)
        assert torch.bincount(labels).tolist() == [100] * 10
    labels = quickstart.load_images(True)[1][: quickstart.TRAIN_IMAGES]
    assert torch.bincount(labels).tolist() == [60] * 10
