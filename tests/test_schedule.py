"""LatentSchedule: whose turn it is, and how it is told."""

import copy
import math
import pickle

import pytest
import torch
from conftest import Grey, Identity
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from latent_aug import LatentAdversarial, LatentPerturb, LatentSchedule
from latent_aug.transforms.schedule import holds_attack


def transform(eps):
    return LatentPerturb(eps, norm="linf", flow=Identity())


def hook():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    return LatentAdversarial(model, eps=0.01, alpha=0.01, norm="linf", p=0.5, flow=Identity())


def test_each_has_its_epochs_and_the_last_stays():
    one, two = transform(0.1), transform(0.2)
    schedule = LatentSchedule([(2, one), (3, two), (1, None)])
    seen = []
    for _ in range(8):
        seen.append(schedule.current)
        schedule.step()
    assert seen == [one, one, two, two, two, None, None, None]


def test_set_epoch_goes_anywhere():
    one, two = transform(0.1), transform(0.2)
    schedule = LatentSchedule([(2, one), (3, two)])
    for epoch, current in ((1, one), (2, two), (100, two), (0, one)):
        schedule.set_epoch(epoch)
        assert (schedule.epoch, schedule.current) == (epoch, current)


def test_a_hook_and_a_transform_follow_each_other_with_one_structure():
    schedule = LatentSchedule([(1, transform(0.1)), (1, hook()), (1, None)])
    images, labels = 0.4 + 0.2 * torch.rand(4, 3, 8, 8), torch.arange(4)
    for moved in (0.1, 0.01, 0.0):
        for out in (schedule((images, labels)), schedule(images, labels)):
            assert type(out) is tuple
            assert out[1] is labels
            assert (out[0] - images).abs().max() == pytest.approx(moved, abs=1e-5)
        schedule.step()


def test_in_a_pipeline():
    schedule = LatentSchedule([(1, transform(0.1)), (1, None)])
    pipeline = v2.Compose([v2.RandomHorizontalFlip(0.0), schedule])
    image = torch.rand(3, 8, 8)
    assert not torch.equal(pipeline(image), image)
    schedule.step()
    assert torch.equal(pipeline(image), image)


@pytest.mark.parametrize(
    ("context", "persistent", "copied"),
    [
        ("fork", False, False),
        ("fork", True, False),
        ("fork", True, True),
        ("spawn", True, True),  # of the others, each epoch would start processes that import torch
    ],
)
def test_loader_workers_see_the_epoch(context, persistent, copied):
    schedule = LatentSchedule([(1, transform(0.3)), (1, transform(0.1)), (1, None)])
    schedule = copy.deepcopy(schedule) if copied else schedule
    loader = DataLoader(
        Grey(schedule),
        2,
        num_workers=2 if context == "fork" else 1,
        persistent_workers=persistent,
        multiprocessing_context=context,
    )
    sizes = []
    for epoch in range(3):
        schedule.set_epoch(epoch)
        sizes.append(max(float((batch - 0.5).abs().max()) for batch in loader))
    assert sizes == pytest.approx([0.3, 0.1, 0.0], abs=1e-6)


def test_fallbacks_are_those_of_all_phases():
    schedule = LatentSchedule([(1, transform(0.1)), (1, transform(0.1)), (1, None)])
    for _ in range(2):
        schedule(torch.full((1, 3, 8, 8), float("nan")))
        schedule.step()
    assert schedule.fallbacks == 2


def test_fallbacks_are_counted_once_and_inside_a_compose():
    twice, inside = (LatentPerturb(flow=Identity()) for _ in range(2))
    pipeline = v2.Compose([inside, v2.Identity()])
    schedule, bad = LatentSchedule([(1, twice), (1, pipeline), (1, twice)]), torch.zeros(3, 3, 8, 8)
    bad[:] = math.nan
    for epoch in range(3):
        schedule.set_epoch(epoch)
        schedule(bad)
    assert (twice.fallbacks, inside.fallbacks, schedule.fallbacks) == (6, 3, 9)


def test_pickled_it_keeps_its_epoch():
    schedule = LatentSchedule([(1, transform(0.3)), (1, None)])
    schedule.step()
    assert pickle.loads(pickle.dumps(schedule)).current is None


def test_attacks_are_found():
    assert holds_attack(hook())
    assert holds_attack(hook().step)
    assert holds_attack(LatentSchedule([(1, transform(0.1)), (1, hook())]))
    assert holds_attack(v2.Compose([v2.RandomHorizontalFlip(), LatentSchedule([(1, hook())])]))
    assert not holds_attack(v2.Compose([transform(0.1), LatentSchedule([(1, None)])]))


def test_repr():
    assert "(3, LatentPerturb(eps=0.1" in repr(LatentSchedule([(3, transform(0.1))]))


@pytest.mark.parametrize(
    ("phases", "error", "words"),
    [
        ([], ValueError, "at least one"),
        (None, TypeError, "phases must be .* pairs, got None"),
        ([(0, None)], ValueError, "epochs of a phase .* at least 1, got 0"),
        ([(1.5, None)], ValueError, "integer"),
        ([(1, 0.25)], TypeError, "a transform, a LatentAdversarial or None, got 0.25"),
        ([transform(0.1)], TypeError, "pairs"),
    ],
)
def test_bad_phases(phases, error, words):
    with pytest.raises(error, match=words):
        LatentSchedule(phases)


@pytest.mark.parametrize("epoch", [-1, 1.0, True])
def test_bad_epochs(epoch):
    with pytest.raises(ValueError, match="epoch must be an integer of at least 0"):
        LatentSchedule([(1, None)]).set_epoch(epoch)
