"""Geometry of the perturbations."""

import pytest
import torch
from conftest import Identity, length
from hypothesis import given
from hypothesis import strategies as st

from latent_aug.transforms import functional as LF

NORMS = ("linf", "l2", "rms")
sizes = st.floats(0, 50)
seeds = st.integers(0, 2**31)


def latents(seed, scale=3.0):
    return scale * torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", NORMS)
@given(eps=sizes, seed=seeds)
def test_projection_ends_in_the_ball_and_stays_there(norm, eps, seed):
    delta = latents(seed)
    once = LF.project(delta, eps, norm)
    assert (length(once, norm) <= eps * (1 + 1e-5) + 1e-6).all()
    torch.testing.assert_close(LF.project(once, eps, norm), once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [*NORMS, None])
def test_projection_leaves_what_is_inside(norm):
    delta = latents(0, scale=0.01)
    torch.testing.assert_close(LF.project(delta, 50.0, norm), delta)


@pytest.mark.parametrize("norm", ["l2", "rms"])
@given(eps=sizes, seed=seeds)
def test_noise_has_the_radius(norm, eps, seed):
    noise = LF.noise_of_norm(latents(seed), eps, norm)
    torch.testing.assert_close(length(noise, norm), torch.full((4,), eps), rtol=1e-4, atol=1e-5)


def test_linf_noise_is_clipped_gaussian():
    draws = torch.randn(1, 3, 100, 100)
    noise = LF.noise_of_norm(draws, 0.25, "linf")
    assert noise.abs().max() == 0.25
    inside = draws.abs() < 1
    torch.testing.assert_close(noise[inside], 0.25 * draws[inside])
    assert (~inside).float().mean().item() == pytest.approx(0.317, abs=0.01)


def test_noise_without_norm_is_scaled_gaussian():
    draws = latents(0)
    assert torch.equal(LF.noise_of_norm(draws, 0.5, None), 0.5 * draws)


@pytest.mark.parametrize("norm", NORMS)
def test_each_sample_may_have_its_own_eps(norm):
    eps = torch.tensor([0.0, 0.5, 1.0, 2.0])[:, None, None, None]
    for t in (
        LF.project(latents(0, 100), eps, norm),
        LF.ascent_step(torch.zeros(4, 3, 5, 6), latents(0), 100.0, eps, norm),
    ):
        torch.testing.assert_close(length(t, norm), eps.flatten(), rtol=1e-4, atol=1e-6)


def test_away_points_away_and_keeps_the_size():
    z, noise = latents(0), latents(1)
    away = LF.away_from_origin(noise, z)
    assert (away * z >= 0).all()
    assert torch.equal(away.abs(), noise.abs())


@pytest.mark.parametrize("norm", NORMS)
@given(eps=sizes, seed=seeds)
def test_random_start_lies_in_the_ball(norm, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    start = LF.random_start(latents(0), eps, norm, generator=generator)
    assert (length(start, norm) <= eps * (1 + 1e-5) + 1e-6).all()


def test_random_start_is_uniform_in_radius_to_the_dimension():
    like = torch.empty(4000, 1, 1, 2)
    radius = length(LF.random_start(like, 1.0, "l2"), "l2")
    # of a disc's area, a quarter lies within half the radius
    assert (radius < 0.5).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradient_moves_nothing(norm):
    delta = LF.project(latents(0), 1.0, norm)
    grad = torch.zeros_like(delta)
    stepped = LF.ascent_step(delta, grad, 0.5, 1.0, norm)
    torch.testing.assert_close(stepped, delta)


@pytest.mark.parametrize("norm", NORMS)
def test_step_has_length_alpha_along_the_gradient(norm):
    grad = latents(3) * 1e-12
    step = LF.ascent_step(torch.zeros_like(grad), grad, 0.5, 10.0, norm)
    torch.testing.assert_close(length(step, norm), torch.full((4,), 0.5), rtol=1e-4, atol=0)
    assert ((step * grad).flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize(("norm", "measured"), [("linf", "linf"), (None, "linf"), ("rms", "l2")])
def test_clip_limits_the_distance_in_image_space(norm, measured):
    x = torch.rand(4, 3, 5, 6)
    clipped = LF.clip_change(x + latents(0), x, 0.3, norm)
    assert (length(clipped - x, measured) <= 0.3 + 1e-5).all()
    assert torch.equal(LF.clip_change(x + 1, x, None, norm), x + 1)


def test_an_unknown_norm_is_refused():
    for call in (
        lambda norm: LF.project(latents(0), 1.0, norm),
        lambda norm: LF.noise_of_norm(latents(0), 1.0, norm),
        lambda norm: LF.random_start(latents(0), 1.0, norm),
        lambda norm: LF.ascent_step(latents(0), latents(1), 1.0, 1.0, norm),
    ):
        with pytest.raises(ValueError, match="norm must be 'linf'"):
            call("Linf")


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_unit_vectors_of_tiny_and_huge_ones(size):
    vectors = LF.unit(latents(0) * size)
    torch.testing.assert_close(length(vectors, "l2"), torch.ones(4))


def test_perturbation_is_added_in_the_latent():
    x, noise = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(LF.perturb_latent(Identity(), x, noise), x + noise)


@pytest.mark.parametrize("norm", ["linf", "l2", "rms"])
def test_an_empty_batch_stays_one(norm):
    empty = torch.empty(0, 3, 4, 4)
    noise = LF.noise_of_norm(empty, 1.0, norm)
    start = LF.random_start(empty, 1.0, norm)
    moved = LF.ascent_step(start, empty, 0.5, 1.0, norm)
    result, count = LF.restore_unusable(moved, empty, empty)
    assert {t.shape for t in (noise, start, moved, result)} == {empty.shape}
    assert count == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_samples_fall_back_alone(bad):
    original, perturbed = torch.rand(3, 1, 2, 2), torch.rand(3, 1, 2, 2)
    perturbed[1, 0, 0, 0] = bad
    result, count = LF.restore_unusable(perturbed, original, torch.zeros(3, 1, 4, 4))
    assert count.item() == 1
    assert torch.equal(result[1], original[1])
    assert torch.equal(result[[0, 2]], perturbed[[0, 2]])


def test_samples_far_off_the_prior_fall_back():
    original, perturbed = torch.rand(3, 1, 2, 2), torch.rand(3, 1, 2, 2)
    z = torch.full((3, 1, 2, 2), 4.9)
    z[2] = 5.1
    result, count = LF.restore_unusable(perturbed, original, z)
    assert count.item() == 1
    assert torch.equal(result[2], original[2])
    assert torch.equal(result[:2], perturbed[:2])
