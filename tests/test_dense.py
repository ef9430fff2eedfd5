"""The class-conditional flow of fully connected couplings."""

import json
import warnings
from contextlib import nullcontext

import pytest
import torch
from conftest import paper_attack, random_dense
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import TensorDataset

from latent_aug import LatentPerturb, TrainConfig, load_flow
from latent_aug.flows import ConditionalDenseFlow
from latent_aug.training.train import train_flow

with warnings.catch_warnings():  # its docstrings hold escapes that Python warns of
    warnings.simplefilter("ignore")
    import FrEIA.modules

CONFIG = {"channels": 1, "height": 4, "width": 5, "num_classes": 3, "steps": 2, "hidden": 6}


def of_freia(flow):
    """FrEIA's blocks with a flow's weights."""
    blocks = []
    for coupling in flow.couplings:
        block = FrEIA.modules.GLOWCouplingBlock(
            [(flow.orders.shape[1],)],
            dims_c=[(flow.num_classes,)],
            subnet_constructor=lambda inputs, outputs: nn.Sequential(
                nn.Linear(inputs, flow.hidden), nn.ReLU(), nn.Linear(flow.hidden, outputs)
            ),
            clamp=flow.clamp,
        )
        block.subnet1.load_state_dict(coupling.of_first.state_dict())
        block.subnet2.load_state_dict(coupling.of_second.state_dict())
        blocks.append(block)
    return blocks


@pytest.mark.parametrize("dims", [(1, 4, 4), (3, 3, 5)], ids=["even", "odd"])
def test_numbers_are_freia_s(dims):
    torch.manual_seed(0)
    flow = ConditionalDenseFlow(*dims, num_classes=3, steps=4, hidden=16).requires_grad_(False)
    x, y = torch.rand(6, *dims), torch.arange(6) % 3
    condition = nn.functional.one_hot(y, 3).float()
    state, log_det = x.flatten(1) * (255 / 256) + 0.5 / 256 - 0.5, torch.zeros(6)
    for block, order in zip(of_freia(flow), flow.orders, strict=True):
        (state,), jacobian = block([state], [condition])
        state, log_det = state[:, order], log_det + jacobian
    torch.testing.assert_close(flow.encode(x, y).flatten(1), state)
    prior = torch.distributions.Normal(0, 1).log_prob(state).sum(1)
    count = x[0].numel()
    expected = prior + log_det + count * torch.tensor(255 / 256).log()
    torch.testing.assert_close(flow.log_prob(x, y), expected)
    back = state
    for block, order in zip(of_freia(flow)[::-1], flow.orders.flip(0), strict=True):
        (back,), _ = block([back[:, order.argsort()]], [condition], rev=True)
    pixels = (back + 0.5 - 0.5 / 256) * (256 / 255)
    torch.testing.assert_close(flow.decode(flow.encode(x, y), y).flatten(1), pixels)


def test_density_is_that_of_the_change_of_variables():
    flow = random_dense(1, 3).double()
    x, y = torch.rand(1, 1, 3, 3, dtype=torch.float64), torch.tensor([2])
    jacobian = torch.autograd.functional.jacobian(lambda t: flow.encode(t, y), x).reshape(9, 9)
    z = flow.encode(x, y)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum() + jacobian.slogdet()[1]
    torch.testing.assert_close(flow.log_prob(x, y), expected[None])


def test_the_paper_s_sizes():
    flow = ConditionalDenseFlow()
    assert flow.size == (28, 28)
    assert [tuple(p.shape) for p in flow.couplings[0].of_first.parameters()] == [
        (512, 402),
        (512,),
        (784, 512),
        (784,),
    ]
    assert len(flow.couplings) == 12


def test_the_class_matters_and_may_be_soft():
    flow, x = random_dense(), torch.rand(2, 3, 16, 16)
    first, second = (flow.encode(x, torch.full((2,), c)) for c in (0, 1))
    assert not torch.allclose(first, second)
    soft = nn.functional.one_hot(torch.tensor([0, 0]), 4).float()
    assert torch.equal(flow.encode(x, soft), first)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.rand(2, 3, 16, 16), None, "y must give"),
        (torch.rand(2, 3, 16, 16), torch.zeros(3, dtype=torch.long), "y must be classes"),
        (torch.rand(2, 3, 16, 16), torch.zeros(2, 3), "y must be classes"),
        (torch.rand(2, 3, 16, 16), torch.tensor([0, 4]), "y must lie in 0 to 3"),
        (torch.rand(2, 3, 16, 20), torch.tensor([0, 1]), "must be a float32"),
        (torch.rand(2, 3, 16, 16).half(), torch.tensor([0, 1]), "must be a float32"),
    ],
)
def test_bad_input_is_named(x, y, words):
    flow = random_dense()
    for call in (flow.encode, flow.decode, flow.log_prob):
        with pytest.raises(ValueError, match=words):
            call(x, y)


def test_a_region_is_refused():
    flow = random_dense()
    with pytest.raises(ValueError, match="mask must be None with a ConditionalDenseFlow"):
        LatentPerturb(0.1, flow=flow, mask=torch.ones(4, 5))


def test_decode_is_bounded_far_from_the_data():
    flow = random_dense()
    with torch.no_grad():
        for coupling in flow.couplings:
            for net in (coupling.of_first, coupling.of_second):
                net[2].weight[: len(net[2].weight) // 2].mul_(1000)  # scales at their bound
    z, y = 20 * torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    assert flow.decode(z, y).isfinite().all()


class TestFiles:
    def test_it_loads_as_saved(self, tmp_path):
        flow = random_dense(seed=1)
        flow.save_pretrained(tmp_path)
        loaded = load_flow(tmp_path)
        x, y = torch.rand(2, 3, 16, 16), torch.tensor([0, 3])
        assert torch.equal(loaded.encode(x, y), flow.encode(x, y))
        assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 4

    @pytest.mark.parametrize("value", [-1, 0, 768, 2**62])
    def test_orders_that_are_no_permutation_are_refused(self, tmp_path, value):
        random_dense().save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["orders"][1, tensors["orders"][1] == 5] = value
        save_file(tensors, tmp_path / "model.safetensors")  # without a digest
        with pytest.raises(ValueError, match="orders"):
            load_flow(tmp_path)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"extra": 1}, "keys"),
            ({"steps": 0}, "steps must"),
            ({"steps": True}, "steps must"),
            ({"hidden": 2**20}, "hidden must"),
            ({"num_classes": 0}, "num_classes must"),
            ({"height": 1.0}, "height must"),
            ({"channels": 64, "height": 256, "width": 256, "hidden": 2**16}, "parameters"),
            ({"steps": 256, "num_classes": 10_000, "hidden": 2**16}, "parameters"),
            ({"height": 1, "width": 1}, "two values"),
            ({"clamp": "2"}, "clamp must be a number"),
            ({"clamp": 0}, "clamp must lie"),
            ({"clamp": float("nan")}, "clamp must lie"),
        ],
    )
    def test_configs_that_harm_are_refused(self, change, words):
        ConditionalDenseFlow.from_config({**CONFIG, "clamp": 2.0})
        with pytest.raises(ValueError, match=words):
            ConditionalDenseFlow.from_config({**CONFIG, "clamp": 2.0, **change})


@pytest.mark.parametrize("norm", ["linf", "l2", "rms"])
def test_the_attack_raises_the_loss(model, norm):
    eps = {"linf": 0.3, "l2": 8.0, "rms": 0.3}[norm]
    attack = paper_attack(model, eps=eps, alpha=eps / 2, norm=norm, flow=random_dense())
    x, y = 0.4 + 0.2 * torch.rand(6, 3, 16, 16), torch.arange(6) % 4
    model.eval()
    before, after = (nn.functional.cross_entropy(model(i), y) for i in (x, attack(x, y)))
    assert after > before


class TestTraining:
    @staticmethod
    def by_class(count=96):
        """Dark images of class 0, bright ones of class 1."""
        torch.manual_seed(0)
        y = torch.arange(count) % 2
        x = 0.25 + 0.5 * y[:, None, None, None] + 0.05 * torch.randn(count, 1, 4, 4)
        return TensorDataset((x.clamp(0, 1) * 255).round().byte(), y)

    @staticmethod
    def new_flow():
        torch.manual_seed(0)
        return ConditionalDenseFlow(1, 4, 4, num_classes=2, steps=2, hidden=16)

    def train(self, output, **changes):
        config = TrainConfig(
            output=output, **{"steps": 150, "batch_size": 32, "lr": 5e-3, "ema": 0.9, **changes}
        )
        data = self.by_class()
        return train_flow(self.new_flow(), data, config, validation=data, progress=False)

    def test_classes_reach_training(self, tmp_path):
        flow, (x, y) = self.train(tmp_path), self.by_class().tensors
        x = x / 255
        right, wrong = (flow.bits_per_dim(x, t).mean() for t in (y, 1 - y))
        before = self.new_flow().bits_per_dim(x, y).mean()
        assert right < before - 0.5
        assert wrong > right + 0.5
        last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
        assert last["validation_bits_per_dim"] == pytest.approx(right.item(), abs=0.3)
        loaded = load_flow(tmp_path)
        assert torch.equal(loaded.encode(x, y), flow.encode(x, y))

    def test_a_glow_s_precision_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="got a ConditionalDenseFlow"):
            self.train(tmp_path, network_dtype="bfloat16")
        assert not any(tmp_path.iterdir())

    def test_images_without_classes_are_refused(self, tmp_path):
        config = TrainConfig(output=tmp_path, steps=1)
        with pytest.raises(ValueError, match="needs \\(image, class\\) samples"):
            train_flow(self.new_flow(), torch.rand(8, 1, 4, 4), config, progress=False)
        data = TensorDataset(torch.rand(8, 1, 4, 4), torch.arange(8))
        with pytest.raises(ValueError, match="0 to 1"):
            train_flow(self.new_flow(), data, config, progress=False)

    def test_another_start_is_explained(self, tmp_path):
        data = TensorDataset(torch.rand(8, 1, 4, 4), torch.arange(8) % 2)
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            refused = pytest.raises(ValueError, match=r"A new flow's weights are drawn")
            with refused if seed else nullcontext():
                flow = ConditionalDenseFlow(1, 4, 4, num_classes=2, steps=1, hidden=4)
                train_flow(flow, data, TrainConfig(output=tmp_path, steps=1), progress=False)

    def test_images_of_another_size_are_refused(self, tmp_path):
        data = TensorDataset(torch.rand(8, 1, 4, 6), torch.zeros(8, dtype=torch.long))
        with pytest.raises(ValueError, match="4x6, this flow maps 4x4 only"):
            train_flow(self.new_flow(), data, TrainConfig(output=tmp_path, steps=1))
