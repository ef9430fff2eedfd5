"""What a flow makes of CUDA graphs, with a stand-in for them that needs no GPU."""

import copy
import threading

import pytest
import torch
from conftest import random_glow

from latent_aug import LatentAdversarial
from latent_aug.flows import engine, graphs, prepared


class Standin:
    """As a graph has it, results lie in memory of its own, which the next call overwrites."""

    recorded = 0

    def __init__(self, function, like, replays=None):
        type(self).recorded += 1
        self.function, self.input = function, like.detach().clone()
        with torch.no_grad():
            result = function(self.input)
        self.output, self.more = result if isinstance(result, tuple) else (result, None)

    def __call__(self, x):
        self.input.copy_(x.detach())
        with torch.no_grad():
            result = self.function(self.input)
        output, more = result if isinstance(result, tuple) else (result, None)
        self.output.copy_(output)
        for own, new in zip(tensors_in(self.more), tensors_in(more), strict=True):
            own.copy_(new)
        return self.output.clone()


class Shared:
    def __init__(self, device):
        self.lock = threading.RLock()


def tensors_in(kept):
    if isinstance(kept, torch.Tensor):
        yield kept
    elif kept is not None:
        for part in kept:
            yield from tensors_in(part)


@pytest.fixture
def flow(monkeypatch):
    monkeypatch.setattr(Standin, "recorded", 0)
    monkeypatch.setattr(graphs, "Graph", Standin)
    monkeypatch.setattr(graphs, "Replays", Shared)
    monkeypatch.setattr(prepared, "Graph", Standin)
    monkeypatch.setattr(prepared, "can_record", lambda t: True)
    flow = random_glow()
    flow.cuda_graphs = True
    return flow


def plain(flow):
    flow = copy.deepcopy(flow)
    flow.cuda_graphs = False
    return flow


def gradient(flow, z):
    z = z.clone().requires_grad_(True)
    return torch.autograd.grad(flow.decode(z).square().sum(), z)[0]


def test_results_are_the_same(flow):
    expected = plain(flow)
    for _ in range(4):
        x = torch.rand(3, 3, 16, 16)
        z = flow.encode(x)
        assert torch.equal(z, expected.encode(x))
        assert torch.equal(flow.decode(z), expected.decode(z))
        assert torch.equal(gradient(flow, z), gradient(expected, z))
    assert Standin.recorded == 4  # encode, decode, decode for gradients and those


def test_a_result_outlives_the_next_call(flow):
    one, two = (torch.rand(3, 3, 16, 16) for _ in range(2))
    flow.encode(one)
    first = flow.encode(one)
    before = first.clone()
    flow.encode(two)
    assert torch.equal(first, before)


def test_gradients_of_several_calls(flow):
    """Each call's activations lie in the same memory, so that only the last one's are there."""
    z = [torch.randn(2, 3, 16, 16) for _ in range(3)]
    expected = [gradient(plain(flow), t) for t in z]
    gradient(flow, z[0])
    latents = [t.clone().requires_grad_(True) for t in z]
    losses = [flow.decode(t).square().sum() for t in latents]
    assert Standin.recorded == 2
    with torch.no_grad():
        latents[1] += 1  # it is used no more
    for place in (2, 0, 1, 2, 0):
        latents[place].grad = None
        losses[place].backward(retain_graph=True)
        torch.testing.assert_close(latents[place].grad, expected[place])


def test_a_shape_is_recorded_when_it_comes_again(flow, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 3)
    for count in (1, 2, 3, 4, 5):
        flow.encode(torch.rand(count, 3, 16, 16))
    assert Standin.recorded == 0
    for count in (5, 4, 3, 3, 2, 2, 5):
        flow.encode(torch.rand(count, 3, 16, 16))
    assert Standin.recorded == 3


def test_changed_weights_are_recorded_anew(flow):
    x = torch.rand(2, 3, 16, 16)
    for _ in range(3):
        flow.encode(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.01)
    for _ in range(3):
        assert torch.equal(flow.encode(x), plain(flow).encode(x))
    assert Standin.recorded == 2


def test_where_gradients_are_wanted_of_weights_or_images(flow):
    x = torch.rand(2, 3, 16, 16)
    for _ in range(3):
        flow.encode(x.clone().requires_grad_(True)).sum().backward()
    flow.requires_grad_(True)
    for _ in range(3):
        flow.decode(flow.encode(x)).sum().backward()
    assert Standin.recorded == 0


def test_lean_keeps_nothing(flow):
    z = torch.randn(2, 3, 16, 16)
    for _ in range(3):
        flow.decode(z.clone().requires_grad_(True), gradient="lean").sum().backward()
    assert Standin.recorded == 0


def test_what_fails_half_way_leaves_nothing(flow, monkeypatch):
    x = torch.rand(2, 3, 16, 16)
    expected = plain(flow).encode(x)
    read, calls = engine.read_mix, []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("not while it is recorded")
        return read(*args, **kwargs)

    monkeypatch.setattr(engine, "read_mix", fails)
    with pytest.raises(RuntimeError, match="not while"):
        flow.encode(x)
    ((_, _, half_way),) = flow._prepared.values()
    assert not half_way._networks
    assert torch.equal(flow.encode(x), expected)


def test_not_on_a_cpu():
    assert not graphs.can_record(torch.rand(1))


def test_attack(flow, model, batch):
    images, labels = batch
    settings = {"steps": 3, "p": 0.5, "generator": torch.Generator()}

    def attacked(flow):
        settings["generator"].manual_seed(0)
        return LatentAdversarial(model, flow=flow, **settings)(images, labels)

    expected = attacked(plain(flow))
    for _ in range(2):
        assert torch.equal(attacked(flow), expected)
    assert Standin.recorded == 4
