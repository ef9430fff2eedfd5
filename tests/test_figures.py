"""Previews: what is drawn, and that nothing else happens."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ByClass, Identity, random_glow
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import nn
from torchvision import tv_tensors

from latent_aug import LatentAdversarial, LatentPerturb, preview


def pictures(figure):
    """Arrays and titles of what was drawn."""
    subfigures = figure.subfigs or [figure]
    axes = [a for part in subfigures for a in part.axes]
    return [(a.get_title(), torch.as_tensor(a.images[0].get_array())) for a in axes]


def test_originals_perturbed_and_differences():
    flow, images = random_glow(), torch.rand(3, 3, 16, 16)
    transform = LatentPerturb(0.2, flow=flow, p=0.0)
    sizes = [0.1, np.float32(0.4)]
    drawn = pictures(preview(transform, images, eps=sizes, amplify=3, temperatures=()))
    assert len(drawn) == 3 * 5
    assert [title for title, _ in drawn[:5]] == [
        "original",
        "linf 0.1",
        "difference times 3",
        "linf 0.4",
        "difference times 3",
    ]
    original, small, difference, large, _ = (image for _, image in drawn[:5])
    torch.testing.assert_close(original, images[0].permute(1, 2, 0))
    change = (small - original).abs().max()
    assert 0 < change < (large - original).abs().max()
    torch.testing.assert_close(difference, ((small - original) * 3 + 0.5).clamp(0, 1))


def test_nothing_of_the_transform_or_the_generator_changes():
    transform = LatentPerturb((0.1, 0.2), flow=random_glow(), p=0.5)
    state = torch.get_rng_state()
    first = pictures(preview(transform, torch.rand(2, 3, 16, 16)))
    assert (transform.eps, transform.p, transform.fallbacks) == ((0.1, 0.2), 0.5, 0)
    torch.set_rng_state(state)
    again = pictures(preview(transform, torch.rand(2, 3, 16, 16)))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
    assert [title for title, _ in first if title.startswith("linf")] == [
        "linf 0.1",
        "linf 0.2",
        "linf 0.4",
    ]


def test_samples_over_temperature():
    figure = preview(LatentPerturb(flow=random_glow()), torch.rand(1, 3, 16, 16))
    samples = {title: image for title, image in pictures(figure) if "temperature" in title}
    assert list(samples) == [f"samples, temperature {t}" for t in ("0", "0.5", "0.7", "1")]
    assert samples["samples, temperature 0"].shape == (16, 64, 3)
    four = samples["samples, temperature 0"].split(16, dim=1)
    assert all(torch.allclose(four[0], one) for one in four)
    assert not torch.allclose(samples["samples, temperature 1"], samples["samples, temperature 0"])


def test_samples_are_of_the_size_that_is_perturbed():
    transform = LatentPerturb(flow=random_glow(), resolution=16)
    (*_, (_, last)) = pictures(preview(transform, torch.rand(1, 3, 64, 48)))
    assert last.shape[0] in (20, 24)  # 64 x 48 to 21 x 16, padded


@pytest.mark.parametrize("normalize", [None, ([0.5] * 3, [0.25] * 3)])
def test_kinds_of_images(normalize):
    x = torch.rand(1, 3, 16, 16)
    images = [x[0]] if normalize is None else [(x[0] - 0.5) / 0.25]
    transform = LatentPerturb(flow=random_glow(), normalize=normalize)
    ((_, original), *_) = pictures(preview(transform, images))
    torch.testing.assert_close(original, x[0].permute(1, 2, 0))
    if normalize is None:
        photo = Image.new("RGB", (20, 12), (255, 0, 0))
        ((_, original), *_) = pictures(preview(transform, [photo]))
        assert original.shape == (12, 20, 3)


def test_attacks_and_conditional_flows():
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([1, 2])
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    attack = LatentAdversarial(model, eps=1.0, alpha=(0.25, 0.5), flow=random_glow())
    drawn = pictures(preview(attack, x, y))
    assert (drawn[3][1] - drawn[0][1]).abs().max() > 0
    for given in ((x, y), ([*zip(x, y, strict=True)],), ([*zip(x, y.tolist(), strict=True)],)):
        for transform in (attack, LatentPerturb(0.1, flow=ByClass())):
            drawn = pictures(preview(transform, *given))
            assert (drawn[3][1] - drawn[0][1]).abs().max() > 0


def test_an_attack_on_a_model_of_half_precision():
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([1, 2])
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).to(torch.bfloat16)
    attack = LatentAdversarial(model, eps=4.0, flow=random_glow())
    drawn = pictures(preview(attack, x.to(torch.bfloat16), y))
    assert (drawn[3][1] - drawn[0][1]).abs().max() > 0


@pytest.mark.parametrize("channels", [2, 5])
def test_images_of_other_channels_are_drawn_as_colours_or_grey(channels):
    images = torch.rand(1, channels, 8, 8)
    figure = preview(LatentPerturb(0.3, flow=random_glow(channels=channels)), images, eps=[0.3])
    FigureCanvasAgg(figure).draw()
    drawn = figure.subfigs[0].axes[0].images[0].get_array()
    kept = images[0, : 3 if channels == 5 else 1].permute(1, 2, 0)
    assert np.allclose(np.atleast_3d(drawn), kept)


def test_what_cannot_be_drawn_is_an_error():
    with pytest.raises(ValueError, match="at least one image"):
        preview(LatentPerturb(flow=random_glow()), torch.rand(0, 3, 16, 16))
    normalized = LatentPerturb(flow=random_glow(), normalize=([0.5] * 3, [0.25] * 3))
    with pytest.raises(TypeError, match="8-bit"):
        preview(normalized, torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="eps must be finite"):
        preview(LatentPerturb(flow=random_glow()), torch.rand(1, 3, 16, 16), eps=[-1.0])
    for images in ("photos", Path("photos"), Image.new("RGB", (16, 16)), 3):
        with pytest.raises(TypeError, match="a list or a data set of images"):
            preview(LatentPerturb(flow=random_glow()), images)
    x = torch.rand(2, 3, 16, 16)
    with pytest.raises(
        ValueError, match=r"batch \(B, C, H, W\), got a tensor of shape \(3, 16, 16\)"
    ):
        preview(LatentPerturb(flow=random_glow()), x[0])
    with pytest.raises(ValueError, match=r"preview\(transform, \*batch\)"):
        preview(LatentPerturb(flow=random_glow()), (x, torch.zeros(2)))
    with pytest.raises(TypeError, match=r"labels must be a tensor.*eps="):
        preview(LatentPerturb(flow=random_glow()), x, [0.1, 0.2])
    for labels in (torch.zeros(3), torch.tensor(1)):
        with pytest.raises(ValueError, match="labels must be one for each of the 2 images"):
            preview(LatentPerturb(flow=random_glow()), x, labels)
    preview(LatentPerturb(flow=random_glow()), x, temperatures=0.7)
    with pytest.raises(TypeError, match="a LatentAdversarial or a flow, got a Flatten"):
        preview(nn.Flatten(), x)


def test_a_flow_is_perturbed_with_the_defaults(tmp_path):
    flow, x = random_glow(), torch.rand(2, 3, 16, 16)
    flow.save_pretrained(tmp_path / "flow")
    for given in (flow, tmp_path / "flow"):
        titles = [title for title, _ in pictures(preview(given, x, temperatures=()))]
        assert "linf 0.25" in titles


def test_a_noise_of_one_s_own_has_no_norm():
    class Own(LatentPerturb):
        def noise(self, draws, eps, mask):
            return eps * draws

    own = Own(3.0, flow=Identity())  # not warned of either
    assert "norm" not in repr(own)
    titles = [t for t, _ in pictures(preview(own, torch.rand(1, 3, 8, 8), eps=0.5))]
    assert "eps 0.5" in titles


def test_titles_have_room_for_one_eps():
    images = torch.full((1, 1, 28, 28), 128, dtype=torch.uint8)
    figure = preview(LatentPerturb(flow="glow-fashionmnist"), images, eps=0.2)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [axes.title.get_window_extent(renderer) for axes in figure.subfigs[1].axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert boxes[0].x0 >= 0
    assert boxes[-1].x1 <= figure.bbox.x1


def test_images_are_spread_over_a_data_set():
    x = torch.linspace(0, 1, 57)[:, None, None, None].expand(57, 3, 8, 8)
    drawn = pictures(preview(LatentPerturb(flow=Identity()), x, eps=0.1, temperatures=()))
    originals = [image.mean().item() for _, image in drawn[::3]]
    assert originals == pytest.approx([i / 7 for i in range(8)], abs=0.02)


def test_a_data_set_is_drawn_as_its_images_are():
    images = [torch.full((1, 28, 28), 40 * i, dtype=torch.uint8) for i in range(3)]
    transform = LatentPerturb(0.25, flow="glow-fashionmnist")
    one, other = (
        pictures(preview(transform, given, eps=[0.25], temperatures=()))
        for given in (images, [(image, 7) for image in images])
    )
    assert len(one) == 3 * 3
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


def test_samples_that_are_mappings_are_refused():
    with pytest.raises(TypeError, match="tuples that begin with one, got a dict"):
        preview(LatentPerturb(flow=Identity()), [{"image": torch.rand(3, 8, 8)}])


def test_a_mask_that_is_worked_out_sees_the_sample():
    def left(sample):
        _, mask = sample
        return mask

    mask = torch.zeros(1, 8, 8).bool()
    mask[..., :4] = True
    data = [(torch.full((3, 8, 8), 0.5), tv_tensors.Mask(mask)) for _ in range(2)]
    figure = preview(LatentPerturb(0.3, flow=Identity(), mask=left), data, temperatures=())
    moved = dict(pictures(figure))["linf 0.3"]
    assert (moved[:, 4:] == 0.5).all()
    assert (moved[:, :4] != 0.5).any()


@pytest.mark.parametrize("paired", [False, True])
def test_an_attack_whose_mask_is_worked_out(paired):
    def left(batch):
        images, labels = batch
        assert len(images) == len(labels) == 1
        return torch.arange(8).expand(8, 8) < 4

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    attack = LatentAdversarial(model, steps=1, flow=Identity(), mask=left)
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    given = [list(zip(images, labels, strict=True))] if paired else [images, labels]
    drawn = dict(pictures(preview(attack, *given, eps=1.0, temperatures=())))
    changed = drawn["l2 1 at 32x32"] != drawn["original"]  # the attack fits its size
    assert changed[:, :4].any()
    assert not changed[:, 4:].any()


def test_an_image_that_the_flow_cannot_perturb_is_called_unchanged():
    images = torch.full((2, 3, 8, 8), 0.5)
    images[1] = float("nan")
    figure = preview(LatentPerturb(0.1, flow=Identity()), images, eps=0.1, temperatures=[])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[2] == "difference times 4"
    assert titles[5].startswith("unchanged")
    assert titles[3:5] == ["", ""]
