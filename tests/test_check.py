"""Whether a flow suits images, and which eps does."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import ByClass, Identity, random_dense, random_glow
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2.functional import to_pil_image

from latent_aug import TrainConfig, check_flow, load_flow, train_flow
from latent_aug.diagnostics.check import (
    estimate_minutes,
    find_greatest,
    pad_images,
    word_remedy,
)
from latent_aug.diagnostics.verdict import interpret_figures
from latent_aug.images.datasets import UInt8Images


def smooth(count=12, side=28):
    """Grey images a little like clothes: bright in the middle."""
    axis = torch.linspace(-1, 1, side)
    bump = (-(axis[:, None] ** 2 + axis**2) * torch.linspace(1, 4, count)[:, None, None]).exp()
    return (bump * 255).byte()[:, None]


@pytest.fixture(scope="module")
def usual():
    """What is found on images that the flow can take for its own."""
    return check_flow("glow-fashionmnist", smooth())


def test_the_suggested_eps_changes_pixels_as_asked(usual):
    found = check_flow("glow-fashionmnist", smooth(), grey_levels=6.0)
    at_eps = found.figures["perturbations"][1]
    assert at_eps["eps"] == found.eps == found.by_change
    assert at_eps["mean_change"] == pytest.approx(6.0, rel=0.1)
    assert usual.eps > found.eps  # for 10 grey levels


@pytest.mark.parametrize("norm", ["linf", "l2", "rms"])
def test_it_is_in_the_norm_asked_for(norm):
    found = check_flow("glow-fashionmnist", smooth(), norm=norm)
    assert found.norm == norm
    assert found.figures["perturbations"][1]["mean_change"] == pytest.approx(10.0, rel=0.1)
    assert f"norm={norm!r}" in str(found)


class Projection(nn.Module):
    """Two classes, by whether the images lie beyond a threshold in a random direction."""

    def __init__(self, threshold=0.0, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.direction = scale * torch.randn(784, generator=generator)
        self.threshold = threshold

    def forward(self, x):
        score = x.flatten(1) @ self.direction - self.threshold
        return torch.stack([-score, score], dim=1)


def test_a_classifier_limits_the_label_flips():
    images = smooth(24)
    threshold = Projection()(images / 255)[:, 1].quantile(0.5)  # between two images
    classifier = Projection(threshold).train()
    found = check_flow("glow-fashionmnist", images, classifier=classifier, flips=0.05)
    assert found.by_flips < found.by_change
    assert found.eps == found.by_flips
    assert "by label flips" in str(found)
    shares = [p["flipped"] for p in found.figures["perturbations"]]
    assert shares[1] <= 0.05 < shares[2]
    assert f"| {shares[2]:.1%} |" in str(found)
    assert classifier.training
    more = check_flow("glow-fashionmnist", images, classifier=classifier, flips=0.4)
    assert more.by_flips > found.by_flips
    shifted = check_flow(
        "glow-fashionmnist",
        images,
        classifier=Projection(threshold - 0.5 * classifier.direction.sum(), scale=0.25),
        normalize=([0.5], [0.25]),
        flips=0.05,
    )
    assert shifted.by_flips == pytest.approx(found.by_flips, rel=0.05)


def test_images_like_the_training_data_fit_and_noise_does_not(usual):
    noise = torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8)
    off = check_flow("glow-fashionmnist", noise)
    assert usual.fits
    assert not off.fits
    assert any("prior's scale" in problem for problem in off.problems)
    assert "The flow is not usable on these images as it is (about" in str(off)
    assert off.grade == "not usable"
    assert "fine-tune" in str(off)
    assert usual.figures["bits_per_dim"] < off.figures["bits_per_dim"]


def test_a_flow_that_is_a_little_off_is_usable(usual):
    images = (smooth() + 30 * torch.randn(12, 1, 28, 28)).clamp(0, 255).to(torch.uint8)
    found = check_flow("glow-fashionmnist", images)
    assert found.grade == "usable"
    assert not found.fits
    assert found.minutes > 0
    assert f"usable on these images at linf eps {found.eps:.3g}. Fine-tuning helps" in str(found)
    assert usual.minutes is None


def test_minutes_are_for_batches_of_the_images_that_there_are():
    flow, pixels = load_flow("glow-fashionmnist"), smooth()[:2].to(torch.uint8)
    few, many = (estimate_minutes(flow, pixels, size) for size in (2, 64))
    assert many > 8 * few


def test_mostly_black_images_are_a_remark(usual):
    at_eps = {**usual.figures["perturbations"][1], "saturated": 0.3}
    findings = tuple(interpret_figures(usual.figures, at_eps))
    found = replace(usual, findings=findings)
    assert found.fits
    assert found.problems == ()
    assert "30.0% of all pixel values" in found.remarks[0]
    assert f"- {found.remarks[0]}" in str(found)


@pytest.mark.parametrize(
    ("side", "size", "wanted"),
    [
        (72, None, "the images are 72x72: .* resolution=32 in the transform"),
        (40, 28, "resized to 28 pixels for this: .* give it resolution=28"),
        (28, 28, None),
        (64, None, None),
    ],
)
def test_large_images_are_to_be_perturbed_by_a_copy(side, size, wanted):
    found = check_flow("glow-fashionmnist", smooth(4, side), size=size)
    said = [text for text in found.remarks if "resolution=" in text]
    assert len(said) == (wanted is not None)
    assert wanted is None or re.search(wanted, said[0])


def test_what_no_eps_can_do_is_said():
    class Random(nn.Module):
        def forward(self, x):
            return torch.rand(len(x), 2)

    found = check_flow("glow-fashionmnist", smooth(20), classifier=Random())
    assert any("no eps flips 5%" in remark for remark in found.remarks)
    assert found.eps == found.by_change > found.by_flips
    assert found.fits
    found = check_flow("glow-fashionmnist", smooth(), grey_levels=250)
    assert any("no eps changes pixels by 250" in problem for problem in found.problems)
    assert "suggested" not in str(found)


def test_find_greatest():
    assert find_greatest(lambda eps: eps <= 0.37) == pytest.approx(0.37, rel=0.03)
    assert find_greatest(lambda eps: False) == pytest.approx(0.001, rel=0.03)


def test_sides_that_the_transforms_pad():
    images = smooth(12, 30)[..., 2:28]  # 30 x 26, 32 x 28 for the flow
    seen = []

    class Looking(nn.Module):
        def forward(self, x):
            seen.append(x.shape[2:])
            return x.mean(dim=(1, 2, 3))[:, None] * torch.tensor([1.0, -1.0])

    found = check_flow("glow-fashionmnist", images, classifier=Looking())
    assert set(seen) == {(30, 26)}
    assert found.figures["uint8_identical"] == 12
    usual = check_flow("glow-fashionmnist", smooth())
    assert found.eps == pytest.approx(usual.eps, rel=0.3)
    flow, both = load_flow("glow-fashionmnist"), []
    flow.bits_per_dim = lambda x, y, generator: both.append(x.shape[2:]) or torch.zeros(len(x))
    check_flow(flow, images)
    assert set(both) == {(32, 28)}
    edge = pad_images(images, flow)
    assert torch.equal(edge[..., :30, :26], images)
    assert torch.equal(edge[..., 31, 27], images[..., 29, 25])
    with pytest.raises(ValueError, match="are 30x26, this flow maps 28x28 only: resize them"):
        check_flow(random_dense(1, 28), TensorDataset(images, torch.zeros(12).long()))


def test_what_is_not_padded_is_not_copied():
    images = smooth()
    assert pad_images(images, load_flow("glow-fashionmnist")) is images


@pytest.mark.parametrize(("size", "advised"), [(None, 28), (30, 32), (28, 28)])
def test_the_remedy_is_of_a_size_that_can_be_trained(tmp_path, size, advised):
    noise = torch.randint(256, (4, 1, 30, 26), dtype=torch.uint8)
    found = check_flow("glow-fashionmnist", noise, size=size)
    assert f"--size {advised} " in found.remedy
    config = TrainConfig(output=tmp_path, size=advised, steps=1, batch_size=2, flip=False)
    train_flow(load_flow("glow-fashionmnist"), noise, config, progress=False)


def test_bad_arguments():
    images = smooth(2)
    for arguments, said in [
        ({"norm": "l1"}, "norm must be one of"),
        ({"grey_levels": 0}, "grey_levels must be above 0"),
        ({"flips": 1}, "flips must lie in"),
    ]:
        with pytest.raises(ValueError, match=said):
            check_flow("glow-fashionmnist", images, **arguments)
    with pytest.raises(ValueError, match="count must be"):
        check_flow("glow-fashionmnist", images, count=0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        check_flow("glow-fashionmnist", [images[0].float()])
    with pytest.raises(ValueError, match="length above 0, got an empty list"):
        check_flow("glow-fashionmnist", [])
    with pytest.raises(FileNotFoundError, match="there is no folder and no tar nowhere"):
        check_flow("glow-fashionmnist", "nowhere")
    with pytest.raises(TypeError, match=r"return logits .* got a tensor of shape \(2, 1, 28, 28\)"):
        check_flow("glow-fashionmnist", images, classifier=nn.Identity())
    with pytest.raises(TypeError, match="must be a Flow, a name or a path, got a Identity"):
        check_flow(nn.Identity(), images)
    with pytest.raises(ValueError, match="normalize is of the classifier's inputs"):
        check_flow("glow-fashionmnist", images, normalize=([0.5], [0.25]))
    with pytest.raises(TypeError, match=r"must be a data set or a sequence.*got a DataLoader"):
        check_flow("glow-fashionmnist", DataLoader(images))
    with pytest.raises(ValueError, match="leave Normalize out of the data set"):
        check_flow("glow-fashionmnist", list(images / 50 - 1))


def test_a_flow_of_one_s_own_and_one_of_classes():
    images = smooth(side=8).expand(-1, 3, -1, -1)
    found = check_flow(Identity(), images)
    assert found.figures["bits_per_dim"] is None
    assert "no bits/dim" in str(found)
    assert found.figures["perturbations"][1]["mean_change"] == pytest.approx(10, rel=0.1)
    labels = torch.arange(12) % 3
    found = check_flow(ByClass(), TensorDataset(images, labels))
    changed = check_flow(ByClass(), TensorDataset(images, 2 - labels))
    assert found.figures["uint8_identical"] == 12
    assert found.figures["latent_std"] != changed.figures["latent_std"]
    with pytest.raises(ValueError, match="class-conditional flow needs"):
        check_flow(ByClass(), images)


def test_the_remedy_names_flow_and_size(tmp_path):
    noise = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8)
    found = check_flow("glow-fashionmnist", noise, size=28)
    assert "latent-aug train DATA --init glow-fashionmnist --size 28 --output" in found.verdict
    random_glow(channels=1).save_pretrained(tmp_path / "my flow")
    found = check_flow(tmp_path / "my flow", noise)
    assert f"--init '{tmp_path / 'my flow'}' --output" in found.remedy
    assert "labels not needed" in found.remedy
    assert "with their classes" in word_remedy(random_dense(), UInt8Images(noise, 1))
    assert "whiten its latents" in check_flow(Identity(), noise.expand(-1, 3, -1, -1)).remedy


def test_few_images_are_called_rough(usual):
    assert "12 images" in str(usual)
    assert "few, so that all of this is rough" in str(usual)
    assert "rough" not in str(replace(usual, figures={**usual.figures, "images": 100}))


def test_a_classifier_of_one_answer_is_no_measure():
    found = check_flow("glow-fashionmnist", smooth(), classifier=Projection(threshold=1e6))
    assert any("puts 100% of the images into one class" in p for p in found.remarks)
    assert found.fits
    with pytest.raises(ValueError, match=r"classifier fails on images of shape \(12, 1, 28, 28\)"):
        check_flow("glow-fashionmnist", smooth(), classifier=nn.Conv2d(3, 1, 1))
    with pytest.raises(TypeError, match=r"classifier must be an nn\.Module, got a str"):
        check_flow("glow-fashionmnist", smooth(), classifier="mine:net")
    one = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 1))
    with pytest.raises(ValueError, match="at least 2 classes are needed"):
        check_flow("glow-fashionmnist", smooth(), classifier=one)


def test_a_folder_is_opened(tmp_path, usual):
    for index, image in enumerate(smooth()):
        to_pil_image(image).save(tmp_path / f"{index:02}.png")
    assert check_flow("glow-fashionmnist", tmp_path).figures == usual.figures


def test_the_flow_is_left_as_it_is():
    flow = random_glow(channels=1)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    state = torch.get_rng_state()
    check_flow(flow, smooth(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
