"""Which images a step sees, and what is drawn for them."""

import pytest
import torch

from latent_aug.training.batches import StepSampler, choose_places, crop_images, sample_draws


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shares_are_the_whole_batch_in_order(processes):
    parts = [choose_places(16, rank, processes) for rank in range(processes)]
    assert [place for part in parts for place in part] == list(range(16))
    whole = list(StepSampler(50, 16, 2, 9, 3))
    each = [
        StepSampler(50, 16, 2, 9, 3, rank=rank, processes=processes) for rank in range(processes)
    ]
    for batch, *found in zip(whole, *each, strict=True):
        assert [index for part in found for index in part] == batch


def test_draws_are_each_image_s_own():
    whole = sample_draws(0, 3, range(8), (1, 4, 4), padding=2, noise=0.1)
    part = sample_draws(0, 3, range(5, 8), (1, 4, 4), padding=2, noise=0.1)
    assert torch.equal(whole.uniform[5:], part.uniform)
    assert torch.equal(whole.gaussian[5:], part.gaussian)
    assert torch.equal(whole.mirrored[5:], part.mirrored)
    assert torch.equal(whole.corners[:, 5:], part.corners)
    assert len(whole.uniform.flatten(1).unique(dim=0)) == 8
    assert len(whole.gaussian.flatten(1).unique(dim=0)) == 8
    without = sample_draws(0, 3, range(8), (1, 4, 4), padding=2)
    assert torch.equal(without.uniform, whole.uniform)
    assert not without.gaussian.any()
    for seed, step in ((1, 3), (0, 4)):
        assert not torch.equal(sample_draws(seed, step, range(8), (1, 4, 4)).uniform, whole.uniform)


def test_crops_are_windows_of_the_padded_image():
    batch = torch.arange(1, 1 + 5 * 2 * 4 * 6).reshape(5, 2, 4, 6)
    top, left = corners = torch.tensor([[0, 4, 2, 1, 3], [0, 4, 2, 3, 1]])
    padded = torch.nn.functional.pad(batch, [2] * 4)
    for image, source, i, j in zip(crop_images(batch, 2, corners), padded, top, left, strict=True):
        assert torch.equal(image, source[:, i : i + 4, j : j + 6])
