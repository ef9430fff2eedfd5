"""The share of a batch that is attacked follows what the model has right."""

import copy
import pickle

import pytest
import torch
from conftest import Identity
from torch import nn

from latent_aug import LatentAdversarial
from latent_aug.transforms.share import HIGHEST_SHARE, AdaptiveShare, count_right


def make_labels(count):
    """Two classes in turn, also of every eighth image."""
    places = torch.arange(count)
    return (places + places // 8) % 2


def make_images(labels):
    """Images that are darker or brighter than half by their class."""
    return (labels[:, None, None, None] + torch.rand(len(labels), 3, 8, 8)) / 2


class Answers(nn.Module):
    """A model that has the share `right` of each batch of `make_images` right, its first images."""

    def __init__(self, right: float) -> None:
        super().__init__()
        self.right = right
        seen = []
        self.sizes = lambda: seen  # an attack would put a list of the model's own back
        self.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        means = self.norm(images).mean(dim=(1, 2, 3))
        places = torch.arange(len(images))
        brighter = images.mean(dim=(1, 2, 3)) > 0.5
        answers = brighter.long() ^ (places >= self.right * len(images)).long()
        return 5.0 * nn.functional.one_hot(answers, 2) + 0.01 * means[:, None]


def attack_often(attack, times, count=8):
    shares = []
    for _ in range(times):
        attack(make_images(make_labels(count)), make_labels(count))
        shares.append(attack.share)
    return shares


class TestShare:
    def test_stays_at_nothing_while_the_model_learns(self):
        model = Answers(0.5)
        attack = LatentAdversarial(model, flow=Identity())
        images = make_images(make_labels(64))
        assert attack_often(attack, 5, count=64) == [0.0] * 5
        assert torch.equal(attack(images, make_labels(64)), images)

    def test_looks_at_all_of_the_first_batch_and_at_an_eighth_of_the_next(self):
        model = Answers(0.5)
        attack_often(LatentAdversarial(model, flow=Identity()), 3, count=24)
        assert model.sizes() == [24, 3, 3]

    @pytest.mark.parametrize("count", [2, 5, 8, 15, 20])
    def test_never_looks_at_one_image_of_several(self, count):
        model = Answers(0.5)
        attack_often(LatentAdversarial(model, flow=Identity()), 20, count=count)
        assert min(model.sizes()) >= 2

    @pytest.mark.parametrize("classes", [2, 4, 8])
    def test_does_not_see_one_class_alone_in_batches_with_an_order(self, classes):
        share, labels = AdaptiveShare(), torch.arange(32) % classes
        for _ in range(80):
            seen = labels[share.select_probed(32, labels.device)]
            share.update(count_right(5.0 * nn.functional.one_hot(seen, classes), seen))
        assert share.value == pytest.approx(HIGHEST_SHARE * (1 - 1 / classes), abs=0.01)

    def test_is_there_at_once_for_a_model_that_knows_its_first_batch(self):
        model = Answers(1.0)
        attack = LatentAdversarial(model, flow=Identity())
        images = make_images(make_labels(64))
        attacked = attack(images, make_labels(64))
        assert attack.share == pytest.approx(HIGHEST_SHARE * (1 - 31 / 63))
        assert (attacked != images).flatten(1).any(dim=1).sum() in (16, 17)

    def test_follows_the_mean_accuracy_up_and_down(self):
        model = Answers(0.5)
        attack = LatentAdversarial(model, flow=Identity())
        attack_often(attack, 1, count=64)
        model.right = 1.0
        rising = attack_often(attack, 40, count=64)
        assert rising == sorted(rising)
        assert 0 < rising[5] < rising[10]
        assert rising[0] == 0.0  # the mean is 0.55, with an error of 0.06
        assert 0.23 < rising[-1] < HIGHEST_SHARE / 2 + 0.01
        model.right = 0.0
        assert attack_often(attack, 40, count=64)[-1] == 0.0

    def test_is_p_where_it_was_given(self):
        model = Answers(0.0)
        attack = LatentAdversarial(model, flow=Identity(), p=0.25)
        assert attack_often(attack, 1) == [0.25]
        assert model.sizes() == [2]
        assert "p=0.25" in repr(attack)

    def test_begins_anew_in_a_copy(self):
        attack = LatentAdversarial(Answers(1.0), flow=Identity())
        (before,) = attack_often(attack, 1)
        assert before > 0
        assert f"p=None, now {before:g}" in repr(attack)
        clipped = LatentAdversarial(Answers(1.0), flow=Identity(), norm="linf", clip=0.5)
        assert "clip=0.5" in repr(clipped)
        assert copy.copy(attack).share == 0.0
        assert "_adaptive" in pickle.loads(pickle.dumps(attack.__getstate__().keys() - {"model"}))
        assert attack.with_eps(1.0).share == 1.0

    def test_is_everything_for_unlabelled_images(self):
        model = Answers(0.0)
        images = torch.rand(8, 3, 8, 8)
        LatentAdversarial(model, flow=Identity()).consistency(images)
        assert model.sizes() == [8, 8, 8]

    def test_leaves_the_model_as_it_was(self):
        model = Answers(0.5).train()
        before = copy.deepcopy(model.state_dict())
        attack_often(LatentAdversarial(model, flow=Identity()), 2)
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert model.norm.training

    def test_sees_a_model_in_training_mode_as_it_is_used_afterwards(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 2))
        modes = []
        model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
        attack = LatentAdversarial(model, flow=Identity(), model_mode="unchanged")
        attack._adaptive.value = HIGHEST_SHARE
        attack_often(attack, 1, count=64)
        assert modes[0] is False
        assert model.training

    @pytest.mark.parametrize("listed", [torch.Tensor.tolist, torch.Tensor.numpy])
    def test_lists_of_labels_are_to_be_tensors(self, listed):
        images, labels = make_images(make_labels(8)), listed(make_labels(8))
        for options in ({}, {"p": 0.5, "labels": "true"}):
            attack = LatentAdversarial(Answers(1.0), flow=Identity(), **options)
            with pytest.raises(ValueError, match=r"make a tensor of them, as torch\.as_tensor"):
                attack(images, labels)

    def test_labels_are_no_fractions(self):
        attack = LatentAdversarial(Answers(1.0), flow=Identity())
        with pytest.raises(ValueError, match=r"needs integers \(B,\), got torch.float32"):
            attack(make_images(make_labels(8)), make_labels(8) + 0.7)

    def test_labels_may_be_of_any_integers(self):
        attack = LatentAdversarial(Answers(1.0), flow=Identity())
        attack(make_images(make_labels(8)), make_labels(8).to(torch.uint16))
        assert attack.share > 0

    def test_labels_are_as_many_as_images(self):
        attack = LatentAdversarial(Answers(1.0), flow=Identity())
        for _ in range(2):  # as many as are looked at, the second time
            with pytest.raises(ValueError, match=r"labels must be a tensor of 8 entries, got \(2,"):
                attack(make_images(make_labels(8)), make_labels(2))
            attack(make_images(make_labels(8)), make_labels(8))

    def test_needs_labels(self):
        attack = LatentAdversarial(Answers(1.0), flow=Identity())
        message = r"follows the model's accuracy.*got NoneType.*labels_getter=.*p=0.5"
        with pytest.raises(ValueError, match=message):
            attack(torch.rand(2, 3, 8, 8))

    @pytest.mark.parametrize(
        ("logits", "message"),
        [
            (1, r"at least 2 classes.*p=0.5"),
            (3, r"one class per image, got several.*p=0.5"),
        ],
    )
    def test_needs_one_class_an_image(self, logits, message):
        attack = LatentAdversarial(
            nn.Sequential(nn.Flatten(), nn.Linear(192, logits)),
            flow=Identity(),
            loss=nn.functional.binary_cross_entropy_with_logits,
        )
        with pytest.raises(ValueError, match=message):
            attack(torch.rand(2, 3, 8, 8), torch.ones(2, logits))


class TestCounts:
    def test_compare_classes_and_probabilities(self):
        logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        assert count_right(logits, torch.tensor([0, 0])).tolist() == [1, 2, 0]
        assert count_right(logits, torch.tensor([[0.4, 0.6], [0.1, 0.9]])).tolist() == [1, 0, 2]

    def test_leave_labels_of_no_class_out(self):
        logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        for label in (-100, 255):  # the latter is void in masks
            assert count_right(logits, torch.tensor([label, 1])).tolist() == [1, 0, 1]

    def test_are_those_of_pixels_where_each_has_a_class(self):
        logits = torch.rand(2, 3, 4, 4)
        right, *counts = count_right(logits, logits.argmax(dim=1)).tolist()
        assert right == sum(counts) == 32

    def test_do_not_depend_on_the_usual_dtype(self, request):
        request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
        torch.set_default_dtype(torch.float64)
        assert count_right(torch.eye(2), torch.tensor([0, 0])).tolist() == [1, 2, 0]

    def test_of_nothing_change_nothing(self):
        share = AdaptiveShare()
        share.update(torch.zeros(3))
        assert not share.begun

    @pytest.mark.parametrize(
        ("accuracy", "counts", "value"),
        [
            (0.5, (50, 50), 0.0),
            (0.4, (50, 50), 0.0),
            (0.58, (50, 50), 0.0),  # perhaps by chance
            (0.8, (5000, 5000), 0.5 * (1 - 0.5 / 0.792)),  # an error of 0.004, twice
            (1.0, (5000, 5000), 0.25),
            (0.2, (1000,) * 10, 0.5 * (1 - 0.1 / 0.192)),
            (1.0, (1000,) * 10, 0.45),
            (0.1, (2,) * 50, 0.5 * (1 - (1 / 99) / 0.04)),
            (0.82, (900, 100), 0.0),  # as many as by guessing the first class nine times of ten
            (1.0, (800, 200), 0.16),
            (0.0, (1, 1), 0.0),
        ],
    )
    def test_leave_the_rest_of_the_batch_above_chance(self, accuracy, counts, value):
        share = AdaptiveShare()
        share.update(torch.tensor([accuracy * sum(counts), *counts]))
        assert share.value == pytest.approx(value, abs=2e-3)

    def test_that_are_all_right_stay_so_whatever_rounds(self):
        share = AdaptiveShare()
        for _ in range(300):
            share.update(torch.tensor([6.0, 3.0, 3.0]))
            assert 0 < share.value < HIGHEST_SHARE
        assert share.accuracy == pytest.approx(1)

    def test_on_an_accelerator_are_read_one_batch_late(self):
        class Elsewhere(torch.Tensor):
            is_cpu = False

        share = AdaptiveShare()
        for right in (0.0, 4.0, 0.0):
            share.update(torch.tensor([right, 2.0, 2.0]).as_subclass(Elsewhere))
        assert share.accuracy == pytest.approx(0.1)
