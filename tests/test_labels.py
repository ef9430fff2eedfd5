"""Class-conditional flows: where their labels come from, for the transform and the attack."""

import pytest
import torch
from conftest import ByClass, Identity, paper_attack
from torch import nn
from torchvision import tv_tensors

from latent_aug import LatentPerturb
from latent_aug.transforms.labels import prepare_labels


def grey(*shape):
    return torch.full((*shape, 3, 8, 8), 0.5)


def change(out, image):
    """Greatest change of a pixel; linf noise of class y changes it by up to eps times its scale."""
    return (out - image).abs().flatten(-3).amax(-1)


@pytest.mark.parametrize(
    "sample",
    [
        lambda image: (image, 2),
        lambda image: (image, torch.tensor(2)),
        lambda image: (image, torch.tensor([2])),
        lambda image: (image, torch.tensor([0.0, 0.0, 1.0, 0.0])),
        lambda image: {"image": image, "label": 2},
        lambda image: {"labels": 2, "image": image},
    ],
)
def test_one_image(sample):
    given = sample(grey())
    out = LatentPerturb(0.01, flow=ByClass())(given)
    assert type(out) is type(given)
    image = out["image"] if isinstance(out, dict) else out[0]
    assert change(image, grey()) == pytest.approx(0.04, abs=1e-4)
    label = given[1] if isinstance(given, tuple) else given.get("label", given.get("labels"))
    assert label is (out[1] if isinstance(out, tuple) else out.get("label", out.get("labels")))


@pytest.mark.parametrize("p", [1.0, 0.5])
@pytest.mark.parametrize("soft", [False, True])
def test_a_batch(soft, p):
    labels = torch.tensor([0, 1, 2, 3] * 2)
    given = nn.functional.one_hot(labels, 4).float() if soft else labels
    out, same = LatentPerturb(0.01, flow=ByClass(), p=p)((grey(8), given))
    assert same is given
    moved = change(out, grey(8))
    expected = 0.01 * 2.0**labels
    assert torch.allclose(moved[moved > 0], expected[moved > 0], atol=1e-4)
    assert (moved > 0).any()


def test_a_video_s_frames_share_their_label():
    video = tv_tensors.Video(grey(2, 5))
    out, _ = LatentPerturb(0.01, flow=ByClass())((video, torch.tensor([0, 3])))
    assert torch.allclose(change(out, video), torch.tensor([[0.01] * 5, [0.08] * 5]), atol=1e-4)


def test_labels_getter():
    transform = LatentPerturb(0.01, flow=ByClass(), labels_getter=lambda s: s["target"]["class"])
    out = transform({"image": grey(), "target": {"class": 3}})
    assert change(out["image"], grey()) == pytest.approx(0.08, abs=1e-4)


@pytest.mark.parametrize("labels", ["true", "predicted"])
def test_the_attack_conditions_on_the_batch_s_labels(labels):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    y = torch.tensor([0, 1, 2, 3])
    attack = paper_attack(model, eps=0.01, alpha=0.02, norm="linf", flow=ByClass(), labels=labels)
    assert torch.allclose(change(attack(grey(4), y), grey(4)), 0.01 * 2.0**y, atol=1e-4)


def test_the_attack_on_a_share_conditions_on_its_labels():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    y = torch.tensor([0, 1, 2, 3])
    attack = paper_attack(model, eps=0.01, alpha=0.02, norm="linf", flow=ByClass(), p=0.5)
    moved = change(attack(grey(4), y), grey(4))
    assert (moved > 0).sum() == 2
    assert torch.allclose(moved[moved > 0], (0.01 * 2.0**y)[moved > 0], atol=1e-4)


def test_one_label_serves_several_images():
    assert prepare_labels(ByClass(), 2, 3, grey(3)).tolist() == [2, 2, 2]


def test_an_unconditional_flow_looks_at_no_label():
    assert LatentPerturb(0.1, flow=Identity())((torch.rand(3, 8, 8), "cat"))[1] == "cat"


class TestBadInput:
    def test_an_image_alone(self):
        with pytest.raises(ValueError, match="LatentCollate or LatentLoader"):
            LatentPerturb(flow=ByClass())(grey())

    @pytest.mark.parametrize(
        ("labels", "words"),
        [
            (4, "labels must lie in 0 to 3"),
            (-1, "labels must lie in 0 to 3"),
            ("cat", "labels must be class indices"),
            (torch.tensor([0, 1, 2]), r"labels must be indices \(2,\)"),
            (torch.rand(2, 3), r"probabilities \(2, 4\)"),
            (torch.rand(3), r"labels must be"),
            (torch.rand(4), r"labels must be"),  # of one image, not of two
        ],
    )
    def test_labels(self, labels, words):
        with pytest.raises(ValueError, match=words):
            prepare_labels(ByClass(), labels, 2, grey(2))
