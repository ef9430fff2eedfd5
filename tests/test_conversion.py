"""What becomes a batch, and how it comes back."""

import pytest
import torch
from conftest import Identity
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from latent_aug import LatentPerturb
from latent_aug.images import conversion as images

SMOOTH = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32).expand(40, -1, -1, -1)


@given(st.integers(0, 255))
def test_every_byte_survives_the_way_there_and_back(value):
    pixels = torch.full((1, 3, 2, 2), value, dtype=torch.uint8)
    x, restore = images.to_batch(pixels, 3)
    assert x.dtype == torch.float32
    assert torch.equal(restore(x), pixels)


def test_results_are_rounded_not_cut():
    _, restore = images.to_batch(torch.zeros(3, 1, 3, dtype=torch.uint8), 3)
    x = torch.tensor([4.6 / 255, 1.02, -0.02]).expand(1, 3, 1, 3)
    assert restore(x)[0].tolist() == [[5, 255, 0]]


@given(multiple=st.integers(1, 16), height=st.integers(1, 20), width=st.integers(1, 20))
def test_padding_repeats_the_border(multiple, height, width):
    flow = Identity()
    flow.multiple = multiple
    x = torch.rand(2, 3, height, width)
    padded = images.fit_to_flow(x, flow)
    assert padded.shape[2] % multiple == padded.shape[3] % multiple == 0
    assert padded.shape[2] - height < multiple
    assert torch.equal(padded[..., :height, :width], x)
    assert (padded[..., height:, :width] == x[..., -1:, :]).all()
    assert (padded[..., width:] == padded[..., width - 1 : width]).all()


def test_normalization_is_that_of_torchvision():
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    ours, x = images.Normalization((mean, std), 3), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(ours.apply(x), v2.functional.normalize(x, mean, std))
    torch.testing.assert_close(ours.undo(ours.apply(x)), x)
    assert torch.equal(images.Normalization(0.5 * torch.ones(2, 1), 3).apply(x), (x - 0.5) / 0.5)


@pytest.mark.parametrize("value", [-0.51, 1.51, 255.0, -2.0])
def test_one_sample_out_of_range_is_enough(value):
    x = torch.rand(4, 3, 2, 2)
    x[2, 1, 0, 0] = value
    with pytest.raises(ValueError, match=r"normalize="):
        images.check_range(x)


def test_a_nan_sample_does_not_hide_another_s_range():
    x = torch.rand(4, 3, 2, 2)
    x[0], x[1, 0, 0, 0] = float("nan"), 9
    with pytest.raises(ValueError, match="9"):
        images.check_range(x)
    images.check_range(x[[0, 2]])
    x[0] = float("inf")  # counted as a fallback later, like NaN
    images.check_range(x[[0, 2]])


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.45, 0.22), (0.13, 0.31)])
def test_erased_pixels_pass_where_images_come_normalized(mean, std):
    attack = LatentPerturb(0.0, flow=Identity(), normalize=(mean, std))
    erase = v2.RandomErasing(p=1, value="random")
    x = torch.stack([erase(images.Normalization((mean, std), 3).apply(x)) for x in SMOOTH])
    assert ((x * std + mean) < images.LOWEST).any()
    assert torch.isfinite(attack(x)).all()
    twice = images.Normalization((mean, std), 3).apply(x)
    with pytest.raises(ValueError, match="another one, or none"):
        attack(twice)
