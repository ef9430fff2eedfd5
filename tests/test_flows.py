"""The contract of a flow, and what is Glow's own."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import (
    ByClass,
    Identity,
    convolutional_classifier,
    images_and_classes,
    random_dense,
    random_glow,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_aug import (
    Flow,
    Glow,
    LatentAdversarial,
    LatentPerturb,
    check_flow,
    functional,
    load_flow,
    preview,
)
from latent_aug.flows import engine


def test_round_trip(any_flow):
    x, y = images_and_classes(any_flow, 4, 16, 24)
    z = any_flow.encode(x, y)
    assert z.shape == x.shape
    assert z.is_contiguous()
    back = any_flow.decode(z, y)
    assert (back - x).abs().max() < 1e-4
    assert back.is_contiguous()


def test_every_byte_comes_back(any_flow):
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    _, y = images_and_classes(any_flow, 1)
    back = any_flow.decode(any_flow.encode(pixels / 255, y), y)
    assert torch.equal((back.clamp(0, 1) * 255).round().byte(), pixels)


def test_encoding_is_deterministic_and_leaves_its_input(any_flow):
    x, y = images_and_classes(any_flow, 2)
    before = x.clone()
    assert torch.equal(any_flow.encode(x, y), any_flow.encode(x, y))
    assert torch.equal(x, before)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_precision_is_that_of_the_input_also_under_autocast(any_flow, dtype, error):
    x, y = images_and_classes(any_flow, 2)
    x = x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        z = any_flow.encode(x, y)
        assert z.dtype == dtype
        assert (any_flow.decode(z, y) - x).abs().max() < error


class Turned(Identity):
    """A flow of a convolution, which autocast would run in bfloat16."""

    def __init__(self):
        super().__init__()
        matrix, _ = torch.linalg.qr(torch.randn(3, 3))
        self.register_buffer("matrix", matrix[:, :, None, None])

    def encode(self, x, y=None):
        return torch.nn.functional.conv2d(x, self.matrix)

    def decode(self, z, y=None):
        return torch.nn.functional.conv2d(z, self.matrix.transpose(0, 1))


def test_a_flow_of_one_s_own_does_not_see_the_user_s_autocast(model):
    x, y, flow = 0.3 + 0.4 * torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), Turned()
    with torch.autocast("cpu", torch.bfloat16):
        assert (flow.decode(flow.encode(x)) - x).abs().max() > 1e-3  # alone it does
        attack = LatentAdversarial(model, eps=1e-5, alpha=1e-5, steps=1, p=0.5, flow=flow)
        for same in (
            LatentPerturb(0.0, flow=flow)(x),
            attack(x, y),
            functional.perturb_latent(flow, x, torch.zeros_like(x)),
        ):
            torch.testing.assert_close(same, x, atol=2e-5, rtol=0)


def test_gradients_reach_the_latents(any_flow):
    x, y = images_and_classes(any_flow, 2)
    z = any_flow.encode(x, y).requires_grad_()
    any_flow.decode(z, y)[0].sum().backward()
    assert z.grad[0].abs().sum() > 0
    assert z.grad[1].abs().sum() == 0  # samples do not see each other


def test_an_empty_batch_stays_empty(any_flow):
    x, y = (None if t is None else t[:0] for t in images_and_classes(any_flow, 1))
    assert any_flow.decode(any_flow.encode(x, y), y).shape == x.shape


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies_are_equal_and_independent(any_flow, copied):
    x, y = images_and_classes(any_flow, 1)
    z = any_flow.encode(x, y)
    other = copied(any_flow)
    assert torch.equal(other.encode(x, y), z)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(any_flow.encode(x, y), z)


@settings(max_examples=15, deadline=None)
@given(
    levels=st.integers(1, 3),
    channels=st.integers(1, 4),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    batch=st.integers(1, 3),
)
def test_round_trip_of_any_size(levels, channels, height, width, batch):
    flow = random_glow(channels, levels=levels, steps=1, hidden=4)
    x = torch.rand(batch, channels, height * flow.multiple, width * flow.multiple)
    assert (flow.decode(flow.encode(x)) - x).abs().max() < 1e-4


def test_samples_do_not_see_each_other(glow):
    x = torch.rand(3, 3, 16, 16)
    other = x.clone()
    other[1] = float("nan")
    torch.testing.assert_close(glow.encode(other)[[0, 2]], glow.encode(x)[[0, 2]])


def test_prior_is_whitened():
    flow = random_glow(levels=1)
    x = torch.rand(4, 3, 16, 16)
    before = flow.encode(x)
    base = flow.multiscale.q0[0]
    with torch.no_grad():
        base.loc.fill_(0.5)
        base.loc_logs.zero_()
        base.log_scale.fill_(1.0)
        base.log_scale_logs.zero_()
    after = flow.encode(x)
    assert not torch.allclose(before, after)
    # one unit of the latent is one standard deviation of the prior
    assert (flow.decode(after) - x).abs().max() < 1e-4
    raw, _ = flow.multiscale.inverse_and_log_det(x * (255 / 256) + 0.5 / 256 - 0.5)
    whitened = (raw[0] - 0.5) / torch.e
    torch.testing.assert_close(flow.split_levels(after)[0], whitened, atol=1e-4, rtol=0)


def test_decode_is_bounded_far_from_the_data():
    flow = random_glow(steps=8)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "net.4" in name:
                parameter.mul_(1000)  # scales at their bound everywhere
    assert flow.decode(20 * torch.randn(8, 3, 16, 16)).isfinite().all()


def test_density_integrates_the_bits(glow):
    x = torch.randint(256, (2, 3, 16, 16)) / 255
    generator = torch.Generator().manual_seed(1)
    bits = glow.bits_per_dim(x, generator=generator)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    nats = glow.log_prob(x + noise / 255)
    expected = -(nats / x[0].numel() - torch.tensor(255.0).log()) / torch.tensor(2.0).log()
    torch.testing.assert_close(bits, expected)


def test_uniform_images_cost_eight_bits():
    class Uniform(Identity):
        def log_prob(self, x, y=None):
            return torch.full((len(x),), x[0].numel() * torch.tensor(255 / 256).log().item())

    assert Uniform().bits_per_dim(torch.rand(2, 3, 4, 4)).tolist() == pytest.approx([8.0, 8.0])


def test_bits_of_8_bit_values_want_floats(glow):
    with pytest.raises(TypeError, match=r"x must be floats, got torch\.uint8: divide"):
        glow.bits_per_dim(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))


class TestSample:
    def test_classes_may_be_a_list(self):
        flow = ByClass()
        assert torch.equal(
            flow.sample(2, [0, 1], size=8, temperature=0.0),
            flow.sample(2, torch.tensor([0, 1]), size=8, temperature=0.0),
        )

    def test_images_are_decoded_normal_latents(self, any_flow):
        height, width = any_flow.size or (8, 24)
        generator = torch.Generator().manual_seed(1)
        found = any_flow.sample(3, size=(height, width), temperature=0.5, generator=generator)
        shape = (3, any_flow.channels, height, width)
        z = 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
        y = torch.arange(3) % any_flow.num_classes if any_flow.num_classes else None
        assert torch.equal(found, any_flow.decode(z, y).clamp(0, 1))
        assert found.dtype == torch.float32
        assert not found.requires_grad

    def test_the_global_generator_is_the_default(self, any_flow):
        torch.manual_seed(0)
        first, second = any_flow.sample(2, size=16), any_flow.sample(2, size=16)
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(any_flow.sample(2, size=16), first)

    def test_sizes_by_default(self, any_flow):
        assert any_flow.sample(1).shape[2:] == (any_flow.size or (32, 32))
        assert any_flow.sample(0).shape[0] == 0

    def test_the_default_size_divides_by_the_multiple(self):
        class Coarse(Identity):
            multiple = 12

        assert Coarse().sample(1).shape == (1, 3, 36, 36)
        assert Coarse().sample(1, size=(12, 24)).shape == (1, 3, 12, 24)
        with pytest.raises(ValueError, match="size must be divisible by 12"):
            Coarse().sample(1, size=32)

    def test_classes_may_be_given(self):
        flow = random_dense()
        generator = torch.Generator()

        def sample(y):
            return flow.sample(2, y, generator=generator.manual_seed(1))

        first, both, other = (sample(y) for y in (None, torch.tensor([0, 1]), torch.tensor([0, 3])))
        assert torch.equal(first, both)
        assert torch.equal(first[0], other[0])
        assert not torch.equal(first[1], other[1])
        assert torch.equal(sample(torch.eye(4)[:2]), first)

    def test_trainable_flows_give_no_gradients(self):
        assert not random_glow().requires_grad_(True).sample(1).requires_grad

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"count": -1}, "count must"),
            ({"count": 2.0}, "count must"),
            ({"size": 10}, "size must be divisible by 4"),
            ({"size": 0}, "size must"),
            ({"size": (8, 8, 8)}, "height, width"),
            ({"temperature": -1.0}, "temperature must"),
            ({"temperature": float("nan")}, "temperature must"),
            ({"temperature": float("inf")}, "temperature must"),
        ],
    )
    def test_bad_arguments_are_named(self, glow, arguments, words):
        with pytest.raises(ValueError, match=words):
            glow.sample(**{"count": 1, **arguments})

    def test_the_only_size_may_be_a_list_as_in_json(self):
        flow = Identity()
        flow.size = [8, 16]
        assert flow.sample(1).shape == flow.sample(1, size=(8, 16)).shape == (1, 3, 8, 16)
        assert check_flow(flow, torch.full((4, 3, 8, 16), 90, dtype=torch.uint8)).eps > 0

    def test_another_size_than_the_only_one_is_refused(self):
        with pytest.raises(ValueError, match=r"size must be \(16, 16\)"):
            random_dense().sample(1, size=8)

    def test_a_user_s_own_method_is_theirs(self, tmp_path):
        class Sampling(Identity):
            def sample(self, n):
                return f"{n} images"

        flow = Sampling()
        assert flow.sample(3) == "3 images"
        preview(LatentPerturb(0.1, flow=flow), torch.rand(1, 3, 8, 8), temperatures=[0.5])


class TestDevice:
    def test_it_is_that_of_the_weights(self, any_flow):
        assert any_flow.device == torch.device("cpu")
        weights = [*any_flow.parameters(), *any_flow.buffers()]
        assert any_flow.to("meta").device.type == ("meta" if weights else "cpu")

    def test_buffers_count(self):
        flow = Turned()
        assert not [*flow.parameters()]
        assert flow.to("meta").device.type == "meta"

    @pytest.mark.parametrize("device", ["meta", torch.device("meta")])
    def test_a_user_s_class_may_assign_it(self, device):
        class Placed(Identity):
            def __init__(self):
                super().__init__()
                self.device = device

        flow = Placed()
        assert flow.device == torch.device("meta")
        assert copy.deepcopy(flow).device == pickle_by_hand(flow).device == flow.device
        flow.register_buffer("weight", torch.zeros(1))
        assert flow.device == torch.device("cpu")  # what is there decides


def pickle_by_hand(flow):
    """A flow of a local class, rebuilt from its state."""
    other = Identity()
    other.__class__ = type(flow)
    other.__dict__.update(pickle.loads(pickle.dumps(flow.__dict__)))
    return other


class TestUse:
    def test_an_untrained_flow_is_refused(self):
        flow = Glow(3, levels=1, steps=1, hidden=4)
        for call in (flow.encode, flow.decode, flow.log_prob):
            with pytest.raises(ValueError, match="untrained"):
                call(torch.rand(2, 3, 8, 8))
        assert not flow.is_initialized()

    def test_it_initialises_once_and_whitens_each_step(self):
        flow = Glow(3, levels=1, steps=1, hidden=4)
        flow.initialize(torch.rand(64, 3, 8, 8) * 0.2)
        z = flow.encode(torch.rand(64, 3, 8, 8) * 0.2)
        assert z.std().item() == pytest.approx(1, abs=0.1)
        with pytest.raises(ValueError, match="already"):
            flow.initialize(torch.rand(64, 3, 8, 8))

    def test_a_bad_batch_initialises_nothing(self):
        flow = Glow(3, levels=1, steps=1, hidden=4)
        with pytest.raises(ValueError, match="non-finite"):
            flow.initialize(torch.full((4, 3, 8, 8), float("nan")))
        assert not flow.is_initialized()

    @pytest.mark.parametrize(
        ("images", "words"),
        [
            (torch.rand(2, 1, 16, 16), "3 channels"),
            (torch.rand(3, 16, 16), "3 channels"),
            (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8"),
            (torch.zeros(2, 3, 16, 16, dtype=torch.bfloat16), "bfloat16"),
            (torch.rand(2, 3, 16, 18), "divisible by 4"),
        ],
    )
    def test_bad_input_is_named(self, glow, images, words):
        for call in (glow.encode, glow.decode, glow.log_prob):
            with pytest.raises(ValueError, match=words):
                call(images)

    @pytest.mark.parametrize(
        "arguments", [{"channels": 0}, {"levels": 2.0}, {"steps": True}, {"log_scale_bound": 0}]
    )
    def test_bad_sizes_are_named(self, arguments):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Glow(**{"levels": 1, "steps": 1, "hidden": 4, **arguments})

    def test_a_changed_weight_is_noticed(self):
        flow = random_glow()
        x = torch.rand(1, 3, 16, 16)
        before = flow.encode(x)
        with torch.no_grad():
            next(flow.parameters()).add_(0.1)
        assert not torch.equal(flow.encode(x), before)

    def test_loading_other_weights_is_noticed(self):
        flow, other = random_glow(seed=0), random_glow(seed=1)
        x = torch.rand(1, 3, 16, 16)
        flow.encode(x)
        flow.load_state_dict(other.state_dict())
        torch.testing.assert_close(flow.encode(x), other.encode(x))

    def test_replaced_weights_are_noticed(self):
        flow, x = random_glow(), torch.rand(1, 3, 16, 16)
        for seed in (1, 2):
            other = random_glow(seed=seed)
            flow.load_state_dict(other.state_dict(), assign=True)
            torch.testing.assert_close(flow.encode(x), other.encode(x))
        before = flow.encode(x)
        parameter = next(flow.parameters())
        parameter.data = parameter.data + 0.1
        assert not torch.equal(flow.encode(x), before)

    def test_an_empty_batch_has_no_density(self, glow):
        assert glow.log_prob(torch.rand(0, 3, 16, 16)).shape == (0,)

    def test_first_use_in_inference_mode_does_not_spoil_gradients(self):
        flow = random_glow()
        with torch.inference_mode():
            flow.decode(flow.encode(torch.zeros(1, 3, 16, 16)))
        for call in (flow.decode, flow.encode):
            t = torch.zeros(1, 3, 16, 16, requires_grad=True)
            call(t).sum().backward()
            assert t.grad is not None


def test_the_count_of_parameters_is_about_right(glow):
    counted = Glow.count_parameters(**glow.config)
    assert counted == pytest.approx(sum(p.numel() for p in glow.parameters()), rel=0.1)


def test_a_name_of_the_package_s_is_not_taken():
    with pytest.raises(TypeError, match="choose another class name"):
        type("Glow", (Flow,), {})


def test_levels_are_taken_apart(glow):
    z = torch.rand(2, 3, 16, 16)
    fine, coarse = glow.split_levels(z)
    assert fine.shape == (2, 6, 8, 8)
    assert coarse.shape == (2, 24, 4, 4)


def test_the_base_class_says_what_is_missing():
    for call in ("encode", "decode", "log_prob"):
        with pytest.raises(NotImplementedError, match=f"Flow .*{call}"):
            getattr(Flow(), call)(torch.rand(1, 3, 4, 4))
    with pytest.raises(NotImplementedError, match="cannot be saved"):
        _ = Identity().config


class Tinted(Identity):
    """A flow whose settings are no weights: a colour, and a part with a number of its own."""

    def __init__(self, colour=(0.1, 0.2, 0.3), slope=0.5):
        super().__init__()
        self.colour, self.part = colour, torch.nn.LeakyReLU(slope)


class Savable(Tinted):
    """The same with a config."""

    @property
    def config(self):
        return {"colour": list(self.colour)}


@pytest.mark.parametrize("kind", [Tinted, Savable])
def test_settings_that_are_no_weights_count_in_the_fingerprint(kind):
    assert kind().fingerprint() == kind().fingerprint()
    assert kind((0.2, 0.2, 0.3)).fingerprint() != kind().fingerprint()


def test_so_do_those_of_submodules_where_there_is_no_config():
    assert Tinted(slope=0.4).fingerprint() != Tinted().fingerprint()
    flow = Tinted()
    assert flow.train().fingerprint() == flow.eval().fingerprint()


@pytest.mark.parametrize("training", [False, True])
def test_what_a_fused_optimizer_writes_is_used(batch, training):
    """Its steps leave no sign on the parameters."""
    images, _ = batch
    flow = random_glow()
    flow.encode(images)
    flow.train(training).requires_grad_(True)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=0.01, fused=True)
    with torch.no_grad():
        flow.encode(images)
    flow.log_prob(images).mean().backward()
    if training:
        with torch.no_grad():
            flow.encode(images)
    optimizer.step()
    for frozen in (False, True):
        flow.requires_grad_(not frozen)
        with torch.no_grad():
            assert torch.equal(flow.encode(images), copy.deepcopy(flow).encode(images))


def test_moved_in_inference_mode_it_still_serves_outside(batch):
    images, labels = batch
    flow = random_glow()
    with torch.inference_mode():
        flow.double()
    moved = LatentAdversarial(convolutional_classifier(), flow=flow, steps=1, p=0.5)(images, labels)
    assert not torch.equal(moved, images)


def test_no_images_have_no_bits(glow):
    assert glow.bits_per_dim(torch.empty(0, 3, 8, 8)).shape == (0,)


def test_sizes_may_be_numpy_s(tmp_path):
    flow = Glow(np.int64(1), levels=np.int64(1), steps=np.int64(1), hidden=np.int64(4))
    flow.save_pretrained(tmp_path)
    assert load_flow(tmp_path).config == flow.config


def test_in_evaluation_mode_weights_are_read_once(batch, monkeypatch):
    flow, reads = random_glow().requires_grad_(True), []
    read = engine.read_levels
    monkeypatch.setattr(engine, "read_levels", lambda *a, **k: reads.append(1) or read(*a, **k))
    for mode, expected in ((False, 1), (True, 2)):
        flow.train(mode)
        reads.clear()
        for _ in range(2):
            with torch.no_grad():
                flow.encode(batch[0])
        assert len(reads) == expected


def test_use_does_not_change_a_glow_s_pickle():
    flow = random_glow()
    before = pickle.dumps(flow)
    flow.decode(flow.encode(torch.rand(2, 3, 16, 16)))
    assert pickle.dumps(flow) == before
    assert pickle.loads(before).is_initialized()
