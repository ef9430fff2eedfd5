"""One small image by products of matrices, against the same image in a batch."""

import pytest
import torch
from conftest import random_glow
from torch.autograd import forward_ad

from latent_aug.flows import small_image
from latent_aug.flows.compiled import Program


@pytest.fixture
def calls(monkeypatch):
    """How often each direction ran by products."""
    found = []
    for name in ("encode", "decode"):
        function = getattr(small_image, name)
        monkeypatch.setattr(
            small_image, name, lambda *a, f=function, n=name: (found.append(n), f(*a))[1]
        )
    return found


@pytest.mark.parametrize("size", [(16, 8), (8, 24), (32, 32)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bound", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_image_equals_the_same_image_in_a_batch(size, channels, bound, dtype, calls):
    flow = random_glow(channels, levels=2, dtype=dtype)
    flow.log_scale_bound = bound
    x = torch.rand(2, channels, *size, dtype=dtype)
    tolerance = {"atol": 1e-4 if dtype == torch.float32 else 1e-10, "rtol": 0}
    z = flow.encode(x)
    back = flow.decode(z)
    assert not calls
    torch.testing.assert_close(flow.encode(x[:1]), z[:1], **tolerance)
    assert calls == ["encode"] * 2
    torch.testing.assert_close(flow.decode(z[:1]), back[:1], **tolerance)
    assert calls == ["encode"] * 2 + ["decode"] * 2


def test_inputs_are_not_written_to():
    flow = random_glow()
    x = torch.rand(1, 3, 16, 16)
    before, z = x.clone(), flow.encode(x)
    latent = z.clone()
    flow.decode(z)
    assert torch.equal(x, before)
    assert torch.equal(z, latent)


def test_what_is_differentiated_takes_another_way(calls):
    flow = random_glow()
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    z = flow.encode(x)
    flow.decode(z).sum().backward()
    assert x.grad.isfinite().all()
    with forward_ad.dual_level():
        flow.encode(x.detach())
    assert not calls


def test_a_large_image_takes_another_way(calls):
    flow = random_glow(levels=1)
    side = 2 * int(small_image.MOST_LEVEL_PIXELS**0.5)
    flow.encode(torch.rand(1, 3, side + 2, side))
    assert not calls
    flow.encode(torch.rand(1, 3, side, side))
    assert calls == ["encode"]


def test_new_weights_are_noticed():
    flow, x = random_glow(), torch.rand(1, 3, 16, 16)
    before = flow.encode(x)
    with torch.no_grad():
        for weight in flow.parameters():
            weight.mul_(1.1)
    assert (flow.encode(x) - before).abs().max() > 1e-3
    two = flow.encode(x.repeat(2, 1, 1, 1))
    torch.testing.assert_close(flow.encode(x), two[:1], atol=1e-4, rtol=0)


def test_export_leaves_no_trace_in_the_flow():
    flow, x = random_glow(), torch.rand(1, 3, 16, 16)
    flow.encode(x.repeat(2, 1, 1, 1))  # it asks once whether it is initialised
    torch.export.export(Program(flow.encode), (x,), strict=False)
    torch.testing.assert_close(flow.encode(x), random_glow().encode(x))
