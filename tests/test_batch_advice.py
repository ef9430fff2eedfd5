"""The advice to perturb batches where a loader's worker perturbs single images."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from latent_aug import LatentCollate, LatentPerturb, load_flow
from latent_aug.transforms import batch_advice


class Images(torch.utils.data.Dataset):
    """Grey images, each through a transform."""

    def __init__(self, transform, size=8, count=80):
        self.transform, self.size, self.count = transform, size, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.transform(torch.rand(1, self.size, self.size))


def perturb():
    return LatentPerturb(eps=0.1, flow="glow-fashionmnist")


@pytest.fixture
def count_advice(tmp_path, monkeypatch):
    """Counts how often it is given, by whatever process, while a loader runs some epochs."""
    said = tmp_path / "said"
    said.touch()

    def write(message, **_):
        with said.open("a") as file:
            file.write(message + "\n")

    def count(loader, epochs=1):
        batch_advice._seen[0] = 0
        for _ in range(epochs):
            list(loader)
        return said.read_text().count("collate_fn=LatentCollate")

    monkeypatch.setattr(batch_advice, "warnings", SimpleNamespace(warn=write))
    return count


def test_it_comes_once_from_all_workers_and_epochs(count_advice):
    given = count_advice(DataLoader(Images(perturb()), 16, num_workers=2), epochs=3)
    assert given in (1, 2)  # both workers may come to it in the same moment


def perturb_compiled():
    flow = copy.deepcopy(load_flow("glow-fashionmnist"))
    flow.compiled_sizes[8, 8] = Path("programs")
    return LatentPerturb(eps=0.1, flow=flow)


@pytest.mark.parametrize(
    ("transform", "kwargs", "collate"),
    [
        (perturb_compiled(), {}, None),
        (v2.Identity(), {}, LatentCollate(perturb())),
        (perturb(), {"count": 40}, None),
        (perturb(), {"size": 40, "count": 70}, None),
    ],
    ids=["compiled", "batches", "few", "large"],
)
def test_it_does_not_come_for(transform, kwargs, collate, count_advice):
    loader = DataLoader(Images(transform, **kwargs), 1, num_workers=1, collate_fn=collate)
    assert count_advice(loader) == 0


@pytest.mark.filterwarnings("error:a loader")
def test_it_does_not_come_outside_workers():
    batch_advice._seen[0] = batch_advice.PATIENCE
    perturb()(torch.rand(1, 8, 8))
