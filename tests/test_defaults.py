"""torch.set_default_dtype and torch.set_default_device change no number of a flow."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from conftest import FLOWS, Identity, images_and_classes, random_dense, random_glow, stripes

from latent_aug import (
    Flow,
    Glow,
    LatentLoader,
    LatentPerturb,
    LatentSchedule,
    TrainConfig,
    load_flow,
)
from latent_aug.flows import ConditionalDenseFlow
from latent_aug.flows.backend import use_plain_defaults
from latent_aug.training.train import train_flow
from latent_aug.utils import randomness

DEFAULTS = [torch.float64, torch.bfloat16, torch.float16, "meta"]
PIXELS = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@contextmanager
def use_default(default):
    """Set a default dtype or device, as a program may do at its start."""
    if isinstance(default, torch.dtype):
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
    else:
        with torch.device(default):
            yield


def compare(found, expected):
    """Both have the same dtypes, devices and values, to the last bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].device == value.device, name
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.fixture(params=DEFAULTS, ids=str)
def same(request):
    """Check that a function returns the same tensors, by name, under another default."""

    def check(function):
        torch.manual_seed(0)
        expected = function()
        torch.manual_seed(0)
        with use_default(request.param):
            found = function()
        compare(found, expected)
        return expected

    return check


@pytest.mark.parametrize(
    "build",
    [
        lambda: Glow(1, levels=2, steps=2, hidden=8),
        lambda: ConditionalDenseFlow(1, 8, 8, steps=2, hidden=8),
    ],
    ids=["glow", "conditional-dense"],
)
def test_a_new_flow_s_weights(same, build):
    state = same(lambda: build().state_dict())
    assert {t.dtype for t in state.values()} <= {torch.float32, torch.int64}
    assert {t.device.type for t in state.values()} == {"cpu"}


def test_initialized_weights(same):
    def initialize():
        flow = Glow(1, levels=2, steps=2, hidden=8)
        flow.initialize(PIXELS)
        return flow.state_dict()

    same(initialize)


def test_images_of_the_default_dtype_initialize_a_flow():
    flow = Glow(1, levels=1, steps=1, hidden=4)
    flow.initialize(PIXELS.double())
    assert flow.is_initialized()
    assert {p.dtype for p in flow.parameters()} == {torch.float32}


@pytest.mark.parametrize("flow", [random_glow(1), random_dense(1, 8)], ids=["glow", "dense"])
def test_loaded_weights(same, flow, tmp_path):
    flow.save_pretrained(tmp_path)
    same(lambda: load_flow(tmp_path).state_dict())


def test_weights_loaded_into_a_flow_that_is_there(same):
    flow, state = random_dense(1, 8), random_dense(1, 8, seed=1).state_dict()

    def load():
        flow.load_state_dict(state)
        return flow.state_dict()

    same(load)


def test_a_loaded_flow_of_a_user_s(same, tmp_path):
    class Scaled(Flow):
        channels = 1

        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.full((1,), 2.0))
            self.register_buffer("mean", torch.tensor(0.5))

        @property
        def config(self):
            return {}

        @classmethod
        def from_config(cls, config):
            return cls(**config)

    Scaled().save_pretrained(tmp_path)
    same(lambda: load_flow(tmp_path).state_dict())


@pytest.mark.parametrize("name", [name for name in FLOWS if name != "identity"])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_a_flow_computes(same, name, frozen):
    flow = FLOWS[name]().requires_grad_(not frozen).train(not frozen)
    x, y = images_and_classes(flow, 2)

    def compute():
        z = flow.encode(x, y).detach().requires_grad_()
        back = flow.decode(z, y)
        (gradient,) = torch.autograd.grad(back.square().sum(), z)
        found = {"z": z, "back": back, "gradient": gradient, "nats": flow.log_prob(x, y)}
        found["bits"] = flow.bits_per_dim(x, y)
        return {key: value.detach() for key, value in found.items()}

    same(compute)


def test_what_a_flow_samples(same, any_flow):
    def sample():
        generator = torch.Generator().manual_seed(1)
        return {
            "global": any_flow.sample(2, size=16),
            "own": any_flow.sample(2, size=16, generator=generator),
        }

    same(sample)


def test_random_draws(same, monkeypatch):
    def draw():
        generator = torch.Generator().manual_seed(1)
        draws = randomness.Draws(generator)
        found = {
            "normal": draws.sample_normal((3, 2), PIXELS),
            "uniform": draws.sample_uniform((3, 2), PIXELS),
            "between": draws.sample_between(0.1, 0.2, 3, PIXELS),
            "seed": torch.tensor(randomness.sample_seed(), device="cpu"),
        }
        for name, other in (
            ("copied", copy.deepcopy(draws)),
            ("pickled", pickle.loads(pickle.dumps(draws))),
        ):
            found[name] = other.sample_normal((3, 2), PIXELS)
        with randomness.use_seed(3, torch.device("cpu")):
            found["seeded"] = randomness.sample_normal((2,), PIXELS)
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "1")
            patch.setenv("WORLD_SIZE", "2")
            found["rank"] = randomness.Draws().sample_normal((2,), PIXELS)
        return found

    same(draw)


def test_what_a_transform_gives(same):
    flow = random_glow(1)
    same(lambda: {"images": LatentSchedule([(1, LatentPerturb(0.3, flow=flow, p=0.5))])(PIXELS)})


def test_what_a_loader_gives(same):
    transform = LatentPerturb(0.3, flow=random_glow(1))

    def load():
        (images,) = LatentLoader([PIXELS], transform, seed=1)
        return {"images": images}

    same(load)


def test_what_training_gives(same, tmp_path):
    runs, images = iter(range(2)), stripes(24)

    def train():
        flow = Glow(1, levels=1, steps=1, hidden=4)
        output = tmp_path / str(next(runs))
        settings = {"steps": 2, "batch_size": 8, "warmup": 1, "crop": 1, "noise": 0.02}
        config = TrainConfig(output=output, network_dtype="float32", **settings)
        return train_flow(flow, images, config, validation=images[:8], progress=False).state_dict()

    same(train)


def test_a_cached_flow_s_fingerprint_stays_the_same(tmp_path):
    random_glow(1).save_pretrained(tmp_path)
    before = load_flow(tmp_path).fingerprint()
    with use_default(torch.float64):
        assert load_flow(tmp_path).fingerprint() == before


def kind_of(tensor):
    return tensor.dtype, tensor.device.type


@pytest.mark.parametrize("default", [torch.float64, "meta"], ids=str)
def test_defaults_are_put_back(default):
    with use_default(default):
        before = kind_of(torch.empty(0))
        outer, inner = use_plain_defaults(), use_plain_defaults()
        outer.__enter__()
        with inner:
            pass
        inside = kind_of(torch.empty(0))
        outer.__exit__(None, None, None)
        assert kind_of(torch.empty(0)) == before
    assert inside == (torch.float32, "cpu")


def test_a_flow_without_weights_is_on_the_cpu_whatever_the_default():
    with torch.device("meta"):
        assert Identity().device == torch.device("cpu")
