"""The gradient of decode: the lean way against autograd, and what it keeps."""

import pytest
import torch
from conftest import random_glow

from latent_aug import Glow
from latent_aug.flows import latent_gradient

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-9}
WAYS = ["fast", "lean"]


def gradient(flow, z, weights, way):
    z = z.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad((flow.decode(z, gradient=way) * weights).sum(), z)
    return grad


def autograd_gradient(flow, z, weights):
    """Its plain twin: weights that want gradients are read anew and go through autograd."""
    flow.requires_grad_(True)
    grad = gradient(flow, z, weights, "auto")
    flow.requires_grad_(False)
    return grad


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_autograd_s(way, levels, dtype):
    flow = random_glow(levels=levels, dtype=dtype)
    z = flow.encode(torch.rand(3, 3, 16, 8, dtype=dtype))
    weights = torch.randn_like(z)
    expected = autograd_gradient(flow, z, weights)
    tolerance = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(gradient(flow, z, weights, way), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_the_image_is_the_one_without_gradients(way):
    flow = random_glow()
    z = flow.encode(torch.rand(3, 3, 16, 16))
    image = flow.decode(z.clone().requires_grad_(True), gradient=way)
    assert torch.equal(image.detach(), flow.decode(z))


@pytest.mark.parametrize(
    ("way", "network_dtype", "size"),
    [
        ("fast", torch.bfloat16, 1),
        ("lean", torch.bfloat16, 1),
        ("lean", torch.float16, 1e-9),  # far below what float16 can hold
        ("auto", torch.float16, 1e-9),
    ],
)
def test_low_precision_networks(way, network_dtype, size):
    flow = random_glow(hidden=32)
    z = flow.encode(torch.rand(3, 3, 16, 16))
    weights = size * torch.randn_like(z)
    expected = gradient(flow, z, weights, "fast")
    flow.network_dtype = network_dtype
    error = (gradient(flow, z, weights, way) - expected).norm() / expected.norm()
    assert error < 0.05


@pytest.mark.parametrize("way", WAYS)
def test_autocast_around_it_changes_nothing(way):
    flow = random_glow()
    z = flow.encode(torch.rand(2, 3, 8, 8))
    weights = torch.randn_like(z)
    plain = gradient(flow, z, weights, way)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(flow, z, weights, way), plain)


def kept_between(flow, z, way):
    """Bytes that wait between decoding and the backward pass, without the weights."""
    levels = flow._prepare(z).read_levels(decoding=True)
    steps = [step for level in levels for step in level.steps]
    convolutions = [conv for step in steps for conv in (step.mix, *step.network)]
    stored, weights = {}, {t.data_ptr() for conv in convolutions for t in conv[:2]}

    def remember(tensor):
        if tensor.data_ptr() not in weights:
            stored[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        flow.decode(z.clone().requires_grad_(True), gradient=way)
    return sum(stored.values())


def test_what_lean_keeps_does_not_grow_with_depth():
    kept = {}
    for steps in (2, 8):
        flow = random_glow(steps=steps, hidden=32)
        z = flow.encode(torch.rand(4, 3, 16, 16))
        kept[steps] = {way: kept_between(flow, z, way) for way in WAYS}
        levels = flow._prepare(z).read_levels(decoding=True)
        estimate = latent_gradient.estimate_kept_bytes(z, levels)
        assert estimate == pytest.approx(kept[steps]["fast"], rel=0.25)
    assert kept[8]["lean"] == kept[2]["lean"]
    assert kept[8]["lean"] < kept[2]["fast"] / 8
    assert kept[8]["fast"] > 3 * kept[2]["fast"]


def test_auto_is_lean_where_fast_would_keep_too_much(monkeypatch):
    flow = random_glow()
    z = flow.encode(torch.rand(2, 3, 16, 16))
    assert kept_between(flow, z, "auto") == kept_between(flow, z, "fast")
    monkeypatch.setattr(latent_gradient, "MOST_KEPT", 1000)
    assert kept_between(flow, z, "auto") == kept_between(flow, z, "lean")


@pytest.mark.parametrize("way", WAYS)
def test_changed_weights_are_noticed(way):
    flow = random_glow()
    z = flow.encode(torch.rand(2, 3, 8, 8))
    weights = torch.randn_like(z)
    before = gradient(flow, z, weights, way)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.1)
    after = gradient(flow, z, weights, way)
    assert not torch.allclose(after, before, rtol=1e-3)
    expected = autograd_gradient(flow, z, weights)
    tolerance = 2e-3 * float(expected.abs().max())
    torch.testing.assert_close(after, expected, atol=tolerance, rtol=0)


def test_a_second_derivative_is_refused():
    flow = random_glow()
    z = flow.encode(torch.rand(1, 3, 8, 8)).requires_grad_(True)
    image = flow.decode(z, gradient="lean")
    (grad,) = torch.autograd.grad(image.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bad_arguments():
    flow = random_glow()
    z = flow.encode(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="gradient must be one of 'auto', 'fast', 'lean'"):
        flow.decode(z, gradient="slow")
    flow.requires_grad_(True)
    with pytest.raises(ValueError, match="needs frozen weights"):
        flow.decode(z, gradient="lean")


def test_a_deep_flow_in_float32():
    torch.manual_seed(0)
    flow = Glow(3, levels=3, steps=16, hidden=16)
    flow.initialize(torch.rand(16, 3, 16, 16))
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "net.4" in name:
                parameter.normal_(std=0.02)
    flow.requires_grad_(False).eval()
    z = flow.encode(torch.rand(4, 3, 16, 16))
    weights = torch.randn_like(z)
    fast, lean = (gradient(flow, z, weights, way) for way in WAYS)
    assert (lean - fast).norm() / fast.norm() < 1e-3
