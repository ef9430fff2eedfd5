"""Generators: of a seed, of a user, of each loader worker."""

import copy
import pickle

import pytest
import torch
from conftest import Grey, Identity
from torch.utils.data import DataLoader

from latent_aug import LatentPerturb
from latent_aug.utils.randomness import Draws, SharedGenerator, mix_seeds


def test_mixed_seeds_are_all_different():
    seeds = {mix_seeds(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000


def test_a_generator_decides_alone(glow):
    x = torch.rand(3, 16, 16)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(7)
        results.append(LatentPerturb((0.1, 0.3), flow=glow, p=0.99, generator=generator)(x))
    assert torch.equal(*results)


class TwoViews(torch.utils.data.Dataset):
    """The same image through two transforms."""

    def __init__(self, first, second):
        self.transforms = first, second

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return [transform(torch.full((3, 8, 8), 0.5)) for transform in self.transforms]


class TestWorkers:
    @pytest.mark.parametrize("own", [False, True])
    def test_workers_and_epochs_draw_differently(self, own):
        generator = torch.Generator().manual_seed(0) if own else None
        transform = LatentPerturb(0.3, flow=Identity(), generator=generator)
        loader = DataLoader(Grey(transform), 1, num_workers=2)
        images = [batch for _ in range(2) for batch in loader]
        assert len({image.sum().item() for image in images}) == len(images)

    @pytest.mark.parametrize("kind", ["own", "shared", "one"])
    def test_two_transforms_draw_differently(self, kind):
        first = torch.Generator().manual_seed(1)
        second = {"own": torch.Generator().manual_seed(2), "shared": first, "one": None}[kind]
        views = [LatentPerturb(0.3, flow=Identity(), generator=g) for g in (first, second)]
        for one, other in DataLoader(TwoViews(*views), 1, num_workers=2):
            assert not torch.equal(one, other)

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_two_transforms_of_one_generator_do_in_every_kind(self, method):
        shared = torch.Generator().manual_seed(1)
        views = [LatentPerturb(0.3, flow=Identity(), generator=shared) for _ in range(2)]
        loader = DataLoader(TwoViews(*views), 1, num_workers=1, multiprocessing_context=method)
        for one, other in loader:
            assert not torch.equal(one, other)

    def test_a_generator_s_seed_still_counts(self):
        images = []
        for seed in (1, 1, 2):
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(seed)
            transform = LatentPerturb(0.3, flow=Identity(), generator=generator)
            images.append(torch.cat(list(DataLoader(Grey(transform), 2, num_workers=2))))
        assert torch.equal(images[0], images[1])
        assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_of_two_that_share_a_generator_share_one(copied):
    shared, image = torch.Generator().manual_seed(1), torch.full((3, 8, 8), 0.5)
    views = [LatentPerturb(0.3, flow=Identity(), generator=shared) for _ in range(2)]
    others = copied(views)
    drawn = [view(image) for view in (*views, *others)]
    assert torch.equal(torch.stack(drawn[:2]), torch.stack(drawn[2:]))
    assert not torch.equal(*drawn[:2])


def test_a_generator_goes_with_those_who_draw_from_it():
    held = len(SharedGenerator._known)
    draws = Draws(torch.Generator())
    assert len(SharedGenerator._known) == held + 1
    del draws
    assert len(SharedGenerator._known) == held
