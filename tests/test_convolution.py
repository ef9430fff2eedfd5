"""Convolutions by oneDNN's own operators, against torch's."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from latent_aug.flows import convolution
from latent_aug.flows.convolution import Conv, can_reorder, convolve, reorder_weight

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.1}


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layer(kernel, inputs, dtype, *, bias=True):
    weight = torch.randn(20, inputs, kernel, kernel) / (kernel**2 * inputs) ** 0.5
    return Conv(weight.to(dtype), torch.randn(20).to(dtype) if bias else None)


@pytest.mark.parametrize("size", [(1, 4, 4), (3, 20, 30), (40, 6, 5)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kernel", "inputs"), [(1, 5), (1, 70), (3, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_torch_s_convolution(kernel, inputs, dtype, size, bias, threads):
    conv = layer(kernel, inputs, dtype, bias=bias)
    x = torch.randn(size[0], inputs, *size[1:]).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(
        x.double(), *(None if t is None else t.double() for t in conv[:2]), padding=kernel // 2
    )
    before = x.clone()
    for c, relu in itertools.product((conv, reorder_weight(conv)), (False, True)):
        found = convolve(x, c, relu=relu)
        assert found.dtype == dtype
        wanted = expected.clamp(min=0) if relu else expected
        assert (found.double() - wanted).abs().max() < TOLERANCE[dtype]
    assert torch.equal(x, before)


def test_large_inputs_take_the_reordered_weight(monkeypatch):
    if not can_reorder(torch.float32):
        pytest.skip("no oneDNN")
    conv = reorder_weight(layer(3, 6, torch.float32))
    assert conv.reordered is not None
    other = conv._replace(weight=torch.zeros_like(conv.weight))
    assert convolve(torch.randn(4, 6, 16, 16), other).std() > 0.1
    small = convolve(torch.randn(1, 6, 16, 16), other)
    torch.testing.assert_close(small, other.bias[:, None, None].expand_as(small))
    monkeypatch.setattr(convolution, "can_reorder", lambda dtype: False)
    assert reorder_weight(layer(3, 6, torch.float32)).reordered is None


@pytest.mark.parametrize("outputs", [12, 24, 32, 48])
def test_outputs_are_filled_up_with_zeros(outputs):
    if not can_reorder(torch.float32):
        pytest.skip("no oneDNN")
    conv = reorder_weight(Conv(torch.randn(outputs, 5, 3, 3), torch.randn(outputs)), fill=True)
    x = torch.randn(8, 5, 16, 16)
    found, expected = convolve(x, conv), F.conv2d(x, conv.weight, conv.bias, padding=1)
    assert found.shape[1] == (outputs if outputs in (12, 32) else -(-outputs // 32) * 32)
    torch.testing.assert_close(found[:, :outputs], expected, atol=1e-4, rtol=1e-4)
    assert not found[:, outputs:].any()


def test_float64_is_not_reordered():
    assert reorder_weight(layer(3, 6, torch.float64)).reordered is None


@pytest.mark.parametrize("kernel", [1, 3])
def test_gradients_pass(kernel):
    conv = reorder_weight(layer(kernel, 70, torch.float32))
    x = torch.randn(4, 70, 16, 16, requires_grad=True)
    out = convolve(x, conv, relu=True)
    (grad,) = torch.autograd.grad(out.sum(), x)
    expected = F.conv2d(x, conv.weight, conv.bias, padding=kernel // 2).relu()
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(grad, wanted, atol=1e-4, rtol=1e-4)
    weight = conv.weight.clone().requires_grad_(True)
    assert convolve(x.detach(), Conv(weight)).requires_grad
    with torch.no_grad():
        assert not convolve(x, conv).requires_grad


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_forward_mode_derivatives_are_not_lost():
    """Right, or refused; never silently without them."""
    conv = reorder_weight(layer(3, 6, torch.float32))
    x = torch.randn(4, 6, 16, 16)
    try:
        _, tangent = torch.func.jvp(lambda t: convolve(t, conv), (x,), (torch.ones_like(x),))
    except (NotImplementedError, RuntimeError):
        return
    wanted = F.conv2d(torch.ones_like(x), conv.weight, padding=1)
    torch.testing.assert_close(tangent, wanted, atol=1e-4, rtol=1e-4)
