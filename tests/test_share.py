"""The share of a batch that is attacked follows what the model has right."""

import copy
import pickle

import pytest
import torch
from conftest import Identity
from torch import nn

from latent_aug import LatentAdversarial
from latent_aug.transforms.share import HIGHEST, STEP, AdaptiveShare, find_hits


class Answers(nn.Module):
    """A model that has the share `right` of each batch right, its first images, if labels are 0."""

    def __init__(self, right: float) -> None:
        super().__init__()
        self.right = right
        seen = []
        self.sizes = lambda: seen  # an attack would put a list of the model's own back
        self.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        means = self.norm(images).mean(dim=(1, 2, 3))
        wrong = torch.arange(len(images)) >= self.right * len(images)
        return torch.stack([0.01 * means - 5.0 * wrong, -0.01 * means], dim=1)


def attack_often(attack, times, count=8):
    shares = []
    for _ in range(times):
        attack(torch.rand(count, 3, 8, 8), torch.zeros(count, dtype=torch.long))
        shares.append(attack.share)
    return shares


class TestShare:
    def test_stays_at_nothing_while_the_model_learns(self):
        model = Answers(0.5)
        attack = LatentAdversarial(model, flow=Identity())
        images = torch.rand(8, 3, 8, 8)
        assert attack_often(attack, 5) == [0.0] * 5
        assert torch.equal(attack(images, torch.zeros(8, dtype=torch.long)), images)

    def test_looks_at_all_of_the_first_batch_and_at_an_eighth_of_the_next(self):
        model = Answers(0.5)
        attack_often(LatentAdversarial(model, flow=Identity()), 3, count=24)
        assert model.sizes() == [24, 3, 3]

    def test_is_the_highest_at_once_for_a_model_that_knows_its_first_batch(self):
        model = Answers(1.0)
        attack = LatentAdversarial(model, flow=Identity())
        images = torch.rand(8, 3, 8, 8)
        attacked = attack(images, torch.zeros(8, dtype=torch.long))
        assert (attacked != images).flatten(1).any(dim=1).sum() == 4
        assert attack.share == HIGHEST

    def test_grows_and_falls_by_a_step_a_batch(self):
        model = Answers(0.0)
        attack = LatentAdversarial(model, flow=Identity())
        attack_often(attack, 1)
        model.right = 1.0
        shares = attack_often(attack, 60)
        rising = [share for share in shares if 0 < share < HIGHEST]
        assert shares[6] == 0.0  # the mean of the accuracy takes eight batches to reach 0.8
        assert rising == pytest.approx([STEP * (i + 1) for i in range(9)])
        assert shares[-1] == HIGHEST
        model.right = 0.0
        assert attack_often(attack, 60)[-1] == 0.0

    def test_is_p_where_it_was_given(self):
        model = Answers(0.0)
        attack = LatentAdversarial(model, flow=Identity(), p=0.25)
        assert attack_often(attack, 1) == [0.25]
        assert model.sizes() == [2]
        assert "p=0.25" in repr(attack)

    def test_begins_anew_in_a_copy(self):
        attack = LatentAdversarial(Answers(1.0), flow=Identity())
        before = attack_often(attack, 1)
        assert "p=None, now 0.5" in repr(attack)
        assert before == [HIGHEST]
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

    def test_needs_labels(self):
        attack = LatentAdversarial(Answers(1.0), flow=Identity())
        with pytest.raises(ValueError, match=r"follows the model's accuracy.*got NoneType.*p=0.5"):
            attack(torch.rand(2, 3, 8, 8))

    @pytest.mark.parametrize(
        ("logits", "message"),
        [
            (1, r"at least 2 classes.*p=0.5"),
            (3, r"one class an image, got several.*p=0.5"),
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


class TestHits:
    def test_compare_classes_and_probabilities(self):
        logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        assert find_hits(logits, torch.tensor([0, 0])).tolist() == [1.0, 0.0]
        assert find_hits(logits, torch.tensor([[0.4, 0.6], [0.1, 0.9]])).tolist() == [0.0, 1.0]

    def test_leave_ignored_labels_out(self):
        logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        assert find_hits(logits, torch.tensor([-100, 1])).tolist() == [1.0]
        assert find_hits(logits, torch.tensor([255, 1])).tolist() == [1.0]  # void in masks

    def test_are_those_of_pixels_where_each_has_a_class(self):
        logits = torch.rand(2, 3, 4, 4)
        assert find_hits(logits, logits.argmax(dim=1)).mean() == 1.0

    def test_of_nothing_change_nothing(self):
        share = AdaptiveShare()
        share.update(torch.empty(0), 2)
        assert not share.begun

    @pytest.mark.parametrize(("classes", "accuracy"), [(2, 0.8), (10, 0.64), (100, 0.604)])
    def test_count_from_chance(self, classes, accuracy):
        for right, value in ((accuracy - 0.001, 0.0), (accuracy + 0.001, HIGHEST)):
            share = AdaptiveShare()
            share.update(torch.tensor([right]), classes)
            assert share.value == value

    def test_on_an_accelerator_are_read_one_batch_late(self):
        class Elsewhere(torch.Tensor):
            is_cpu = False

        share = AdaptiveShare()
        for right in (0.0, 1.0, 0.0):
            share.update(torch.full((4,), right).as_subclass(Elsewhere), 2)
        assert share.skill == pytest.approx(-0.6)
