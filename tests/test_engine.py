"""The engine against normflows' own methods, and against autograd."""

import math

import pytest
import torch
from conftest import random_glow

from latent_aug.flows import engine
from latent_aug.flows.base import preprocess

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10}


def reference_log_prob(flow, x):
    """What normflows computes from the same parameters."""
    multiscale = flow.multiscale
    for base, level in zip(multiscale.q0, range(flow.levels, 0, -1), strict=True):
        height, width = x.shape[2] >> level, x.shape[3] >> level
        base.num_pix, base.d = height * width, base.shape[0] * height * width
    return multiscale.log_prob(preprocess(x), None) + x[0].numel() * math.log(255 / 256)


def reference_latents(flow, x):
    """Whitened latents by normflows, finest level first."""
    latents, _ = flow.multiscale.inverse_and_log_det(preprocess(x))
    whitened = []
    for latent, base in zip(latents, flow.multiscale.q0, strict=True):
        loc = base.loc * torch.exp(base.loc_logs * base.logscale_factor)
        log_scale = base.log_scale * torch.exp(base.log_scale_logs * base.logscale_factor)
        whitened.append((latent - loc) * torch.exp(-log_scale))
    return whitened[::-1]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_values_and_log_determinants_equal_normflows(channels, levels, dtype):
    flow = random_glow(channels, levels=levels, dtype=dtype)
    x = torch.rand(3, channels, 16, 8, dtype=dtype)
    parts = flow.split_levels(flow.encode(x))
    for ours, theirs in zip(parts, reference_latents(flow, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(
        flow.log_prob(x), reference_log_prob(flow, x), rtol=TOLERANCE[dtype], atol=1e-3
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decode_equals_normflows(dtype):
    flow = random_glow(dtype=dtype)
    x = torch.rand(3, 3, 16, 16, dtype=dtype)
    latents, _ = flow.multiscale.inverse_and_log_det(preprocess(x))
    theirs, _ = flow.multiscale.forward_and_log_det(latents)
    ours = preprocess(flow.decode(flow.encode(x)))
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype], rtol=0)


def test_gradients_of_the_weights_equal_normflows():
    flow = random_glow(dtype=torch.float64).requires_grad_(True)
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    parameters = list(flow.parameters())
    ours = torch.autograd.grad(flow.log_prob(x).sum(), parameters)
    theirs = torch.autograd.grad(reference_log_prob(flow, x).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_gradients_to_the_latents_equal_normflows():
    flow = random_glow(dtype=torch.float64)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    weights = torch.rand_like(x)
    # d<w, F⁻¹(z)>/dz, and J⁻ᵀ w through normflows' encoder: J_encᵀ of it gives w back.
    z = flow.encode(x).requires_grad_(True)
    (grad,) = torch.autograd.grad((flow.decode(z) * weights).sum(), z)
    x.requires_grad_(True)
    pieces = list(zip(reference_latents(flow, x), flow.split_levels(grad), strict=True))
    (back,) = torch.autograd.grad(sum((a * b).sum() for a, b in pieces), x)
    torch.testing.assert_close(back, weights, atol=1e-8, rtol=0)


@pytest.mark.parametrize("part", ["flows.2.s", "param_map.net.4", "q0.0.loc"])
def test_gradients_reach_the_only_weights_that_want_them(part):
    flow = random_glow(dtype=torch.float64)
    for name, parameter in flow.named_parameters():
        parameter.requires_grad_(part in name)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    for result in (flow.encode(x), flow.decode(x), flow.log_prob(x)):
        result.square().sum().backward()
    found = {name: p.grad for name, p in flow.named_parameters() if part in name}
    for parameter in flow.parameters():
        parameter.requires_grad_(True).grad = None
    for result in (flow.encode(x), flow.decode(x), flow.log_prob(x)):
        result.square().sum().backward()
    assert found
    for name, parameter in flow.named_parameters():
        if part in name:
            torch.testing.assert_close(found[name], parameter.grad)


def test_log_determinant_equals_that_of_the_jacobian():
    flow = random_glow(1, levels=1, dtype=torch.float64)
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(flow.encode, x).reshape(16, 16)
    z = flow.encode(x)
    normal = -0.5 * (z.square().sum() + 16 * math.log(2 * math.pi))
    expected = normal + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow.log_prob(x)[0], expected)


def test_prepared_and_differentiable_readings_agree():
    flow = random_glow()
    x = torch.rand(2, 3, 16, 16)
    frozen = flow.encode(x)
    flow.requires_grad_(True)
    trained = flow.encode(x)
    assert trained.requires_grad
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, trained.detach(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("network_dtype", [None, torch.bfloat16])
def test_a_few_images_at_a_time_give_what_all_at_once_do(network_dtype, monkeypatch):
    flow = random_glow(levels=3, hidden=16)
    flow.network_dtype = network_dtype
    x = torch.rand(7, 3, 16, 16)
    z = flow.encode(x)
    image = flow.decode(z)
    monkeypatch.setattr(engine, "TILE_BYTES", 3 * 64 * 16 * 4)  # 3 images at the finest level
    step = flow._prepare(x).read_levels(decoding=False)[0].steps[0]
    assert engine.choose_tile(engine.squeeze(x), step) in (3, 6)
    # In bfloat16 one value may round to its neighbour.
    atol = 1e-5 if network_dtype is None else 2e-2
    torch.testing.assert_close(flow.encode(x), z, atol=atol, rtol=0)
    torch.testing.assert_close(flow.decode(z), image, atol=atol, rtol=0)


def test_neither_input_is_written_to():
    flow = random_glow(levels=1)
    x = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    z = flow.encode(x)
    before = x.clone(), z.clone()
    flow.decode(z)
    flow.decode(z.requires_grad_(True)).sum().backward()
    assert torch.equal(x, before[0])
    assert torch.equal(z, before[1])


def test_low_precision_networks_keep_the_state_in_full_precision():
    flow = random_glow()
    flow.network_dtype = torch.bfloat16
    x = torch.rand(2, 3, 16, 16)
    z = flow.encode(x)
    assert z.dtype == torch.float32
    assert (flow.decode(z) - x).abs().max() < 0.05
    flow.network_dtype = None
    assert not torch.equal(flow.encode(x), z)
