"""The figures of a card."""

import json
import math

import pytest
import torch
from conftest import Identity, random_glow
from torch.utils.data import TensorDataset

from latent_aug.diagnostics.measure import correlate_neighbours, measure_flow
from latent_aug.diagnostics.verdict import interpret_figures
from latent_aug.images.datasets import UInt8Images


def images(count=30):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


def test_figures_are_those_of_the_flow(glow):
    figures = measure_flow(glow, UInt8Images(images(), 3), settings=[("linf", 0.1)], batch_size=7)
    x = images() / 255
    z = glow.encode(x)
    assert figures["images"] == 30
    assert figures["bits_per_dim"] == pytest.approx(glow.bits_per_dim(x).mean().item(), abs=0.01)
    assert figures["round_trip_max_error"] < 1e-4
    assert figures["uint8_identical"] == 30
    expected = [level.std().item() for level in glow.split_levels(z)]
    assert figures["latent_std"] == pytest.approx(expected, abs=2e-3)
    (perturbation,) = figures["perturbations"]
    assert perturbation["fallbacks"] == 0
    moved = glow.decode(z + 0.1 * torch.randn_like(z).clamp(-1, 1)).clamp(0, 1)
    change = 255 * (moved - x).abs().mean().item()
    assert perturbation["mean_change"] == pytest.approx(change, rel=0.05)


def test_smoothness_tells_patches_from_noise():
    noise = torch.randn(4, 3, 16, 16)
    assert (correlate_neighbours(noise).abs() < 0.15).all()
    patches = noise[..., :4, :4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert (correlate_neighbours(patches) > 0.7).all()
    assert correlate_neighbours(torch.zeros(1, 3, 8, 8)) == 0


def test_latents_that_are_all_the_same_have_no_spread():
    same = torch.full((30, 3, 8, 8), 100, dtype=torch.uint8)
    figures = measure_flow(Identity(), UInt8Images(same, 3), batch_size=10)
    assert figures["latent_std"] == [pytest.approx(0, abs=1e-3)]


def test_a_broken_flow_shows(monkeypatch):
    flow = random_glow()
    decode = flow.decode

    def off_by_two_grey_levels(z, y=None):
        x = decode(z, y) + 2 / 255
        x[0] = float("nan")
        return x

    monkeypatch.setattr(flow, "decode", off_by_two_grey_levels)
    figures = measure_flow(flow, UInt8Images(images(), 3), batch_size=10)
    assert figures["round_trip_max_error"] is None
    assert any(
        "not finite" in found.text
        for found in interpret_figures(figures, figures["perturbations"][1])
    )
    assert figures["uint8_identical"] == 0
    assert all(p["fallbacks"] == pytest.approx(0.1) for p in figures["perturbations"])


def test_latents_that_are_not_finite_show(monkeypatch, glow):
    encode = glow.encode
    monkeypatch.setattr(glow, "encode", lambda x, y=None: encode(x, y) / 0)
    figures = measure_flow(glow, UInt8Images(images(4), 3))
    json.dumps(figures, allow_nan=False)
    assert figures["latent_std"] == [None] * glow.levels
    assert any(
        "not finite" in found.text
        for found in interpret_figures(figures, figures["perturbations"][1])
    )


def test_each_image_is_measured_with_its_class():
    class ByLabel(Identity):
        num_classes = 3

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))  # says where it is

        def log_prob(self, x, y=None):
            return -1000.0 * y

        def decode(self, z, y=None):
            return z + y[:, None, None, None] / 255

    y = torch.tensor([0, 1, 2, 2, 0, 1, 1])
    data = UInt8Images(TensorDataset(images()[:7], y), 3, num_classes=3)
    figures = measure_flow(ByLabel(), data, settings=[], batch_size=3)
    dims = data[0].numel()
    expected = (math.log(255) + 1000 * y.float().mean().item() / dims) / math.log(2)
    assert figures["bits_per_dim"] == pytest.approx(expected)
    assert figures["uint8_identical"] == 2
