"""LatentAdversarial: the attack, the batches it takes, and that it leaves no trace."""

import collections
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    Identity,
    convolutional_classifier,
    length,
    paper_attack,
    random_glow,
    same_trace,
    trace_of,
)
from torch import nn
from torchvision import tv_tensors
from torchvision.datasets import FashionMNIST

from latent_aug import LatentAdversarial, LatentPerturb
from latent_aug.transforms import functional as LF
from latent_aug.transforms.latents import Latents


def textbook_pgd(model, x, y, delta, *, eps, alpha, steps, norm):
    """Projected gradient descent as Madry et al. 2018 write it."""
    for _ in range(steps):
        delta = delta.detach().requires_grad_(True)
        F.cross_entropy(model(x + delta), y, reduction="sum").backward()
        g = delta.grad.flatten(1)
        if norm == "linf":
            delta = (delta.detach() + alpha * g.sign().view_as(x)).clamp(-eps, eps)
        else:
            stepped = delta.detach().flatten(1) + alpha * g / g.norm(dim=1, keepdim=True)
            length = stepped.norm(dim=1, keepdim=True)
            delta = (stepped * (eps / length).clamp(max=1)).view_as(x)
    return x + delta.detach()


@pytest.mark.parametrize(("norm", "eps", "alpha"), [("l2", 1.0, 0.4), ("linf", 0.03, 0.01)])
@pytest.mark.parametrize("random_start", [False, True])
def test_with_the_identity_flow_it_is_textbook_pgd(model, batch, norm, eps, alpha, random_start):
    model.eval()
    images, labels = batch
    generator = torch.Generator().manual_seed(4)
    start = torch.zeros_like(images)
    if random_start:
        start = LF.random_start(images, eps, norm, generator=generator)
    expected = textbook_pgd(model, images, labels, start, eps=eps, alpha=alpha, steps=4, norm=norm)
    attack = paper_attack(
        model,
        eps=eps,
        alpha=alpha,
        steps=4,
        norm=norm,
        flow=Identity(),
        random_start=random_start,
        generator=torch.Generator().manual_seed(4),
    )
    torch.testing.assert_close(attack(images, labels), expected)


@pytest.mark.parametrize("norm", ["l2", "linf", "rms"])
def test_the_latent_stays_in_its_ball(model, batch, glow, norm):
    eps = {"l2": 1.0, "linf": 0.05, "rms": 0.05}[norm]
    attack = paper_attack(model, eps=eps, alpha=eps / 2, steps=5, norm=norm, flow=glow)
    size = length(glow.encode(attack(*batch)) - glow.encode(batch[0]), norm)
    assert (size <= eps * 1.01).all()
    assert (size >= eps * 0.5).all()


@pytest.mark.parametrize("norm", ["l2", "linf", "rms"])
@pytest.mark.parametrize("labels", ["true", "predicted"])
def test_it_raises_the_loss_more_than_chance(model, glow, norm, labels):
    model.eval()
    images = torch.rand(16, 3, 16, 16)
    targets = model(images).argmax(1)  # so that both kinds of labels are the same
    eps = {"l2": 3.0, "linf": 0.15, "rms": 0.15}[norm]
    attack = paper_attack(
        model, eps=eps, alpha=eps / 3, steps=6, norm=norm, flow=glow, labels=labels
    )
    noise = LF.noise_of_norm(torch.randn_like(images), eps, norm)
    random = LF.perturb_latent(glow, images, noise).clamp(0, 1)
    losses = [
        F.cross_entropy(model(x), targets, reduction="none")
        for x in (attack(images, targets), random)
    ]
    assert (losses[0] > losses[1]).float().mean() > 0.9


def test_more_steps_reach_a_higher_loss(model, glow):
    images, targets = torch.rand(16, 3, 16, 16), torch.randint(4, (16,))
    model.eval()
    reached = []
    for steps in (1, 2, 6):
        attack = paper_attack(model, eps=3.0, alpha=0.5, steps=steps, flow=glow, random_start=False)
        reached.append(F.cross_entropy(model(attack(images, targets)), targets).item())
    assert reached == sorted(reached)
    assert reached[0] < reached[2]


@pytest.fixture(scope="module")
def clothes():
    """A classifier of real images, trained on them, with a hundred of them and their labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    data = FashionMNIST(Path(__file__).parents[1] / "examples" / "data", train=True)
    images, labels = data.data[:600, None] / 255, data.targets[:600]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model, images[:100], labels[:100]


@pytest.mark.parametrize(("norm", "eps"), [("l2", 1.5), ("linf", 0.05), ("rms", 0.05)])
def test_on_real_images_and_a_trained_flow(clothes, norm, eps):
    """Every image's loss is above that under noise of the same norm, or nearly so."""
    model, x, y = clothes
    attack = paper_attack(model, eps=eps, alpha=eps / 2, norm=norm, flow="glow-fashionmnist")
    noise = LatentPerturb(eps, norm=norm, flow="glow-fashionmnist")
    with torch.no_grad():
        attacked, random = (
            F.cross_entropy(model(t).double(), y, reduction="none")
            for t in (attack(x, y), noise(x))
        )
    assert (attacked > random).float().mean() >= 0.99
    assert attacked.mean() > 3 * random.mean()


def test_one_hot_probabilities_act_as_indices(model, batch, glow):
    images, labels = batch
    results = []
    for given in (labels, F.one_hot(labels, 4).float()):
        torch.manual_seed(1)
        results.append(paper_attack(model, flow=glow)(images, given))
    torch.testing.assert_close(*results)


def test_a_loss_of_one_s_own_is_ascended(model, batch, glow):
    images, labels = batch
    model.eval()
    attack = paper_attack(model, eps=3.0, flow=glow, loss=lambda logits, y: -logits[:, 2].square())
    assert (model(attack(images, labels))[:, 2].abs() < model(images)[:, 2].abs()).all()


def test_a_constant_loss_gives_no_nan(model, batch, glow):
    attack = paper_attack(
        model, flow=glow, random_start=False, loss=lambda logits, y: 0 * logits.sum()
    )
    images, labels = batch
    torch.testing.assert_close(attack(images, labels), images, atol=1e-4, rtol=0)
    assert attack.fallbacks == 0


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_p_is_an_exact_share(model, batch, glow, p):
    images, labels = batch
    changed = (paper_attack(model, flow=glow, p=p)(images, labels) != images).flatten(1).any(1)
    assert changed.sum() == int(6 * p)


def test_a_share_of_the_batch_stays_in_its_place(model):
    """Each image that is attacked meets its own label, and goes back where it was."""
    images = torch.linspace(0.1, 0.9, 8)[:, None, None, None].expand(8, 3, 16, 16)
    targets, seen = torch.arange(8), []

    def loss(logits, labels):
        seen.append(labels)
        return logits.sum()

    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean((1, 2, 3))))
    attack = paper_attack(model, eps=0.1, alpha=0.05, steps=1, p=0.5, flow=Identity(), loss=loss)
    out = attack(images, targets)
    assert (out - images).abs().max() < 0.05
    changed = (out != images).flatten(1).any(1).nonzero().flatten()
    attacked, labels = seen
    assert torch.equal(labels.sort().values, changed)
    torch.testing.assert_close(attacked, images[labels].mean((1, 2, 3)), atol=0.01, rtol=0)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_eps_and_alpha_are_drawn_for_each_sample(norm):
    """One step of alpha from the centre: its length is alpha's, or eps' where that is less."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    images, labels = torch.full((200, 3, 8, 8), 0.5), torch.zeros(200, dtype=torch.long)
    options = {"norm": norm, "flow": Identity(), "steps": 1, "random_start": False}
    for ranges in (
        {"alpha": (0.1, 0.2), "eps": 0.24},
        {"alpha": 0.3, "eps": (0.1, 0.2)},
        {"alpha": None, "eps": (0.1, 0.2)},  # each image's eps
    ):
        attack = paper_attack(model, **options, **ranges)
        size = length(attack(images, labels) - images, norm)
        assert size.min() == pytest.approx(0.1, abs=0.01)
        assert size.mean() == pytest.approx(0.15, abs=0.01)
        assert size.max() == pytest.approx(0.2, abs=0.01)


class Squeezing(nn.Module):
    """A model whose logits of one image alone have no batch dimension."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8)

    def forward(self, images):
        return self.conv(images).squeeze()


def normalized(**options):
    """A model that needs several images, as BatchNorm has no statistics of one."""
    norm = nn.BatchNorm1d(8, **options)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), norm, nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (normalized, "unchanged"),
        (lambda: normalized(track_running_stats=False), "eval"),
        (Squeezing, "eval"),
    ],
)
def test_one_image_of_a_batch_is_attacked_in_models_that_take_two(make, mode):
    images, labels = 0.4 + 0.2 * torch.rand(4, 3, 8, 8), torch.arange(4)
    attack = paper_attack(make(), flow=Identity(), p=0.25, model_mode=mode)
    for _ in range(8):  # also the last one, which has no next
        changed = (attack(images, labels) != images).flatten(1).any(1)
        assert changed.sum() == 1
    usual = LatentAdversarial(make(), flow=Identity(), model_mode=mode)
    for count in (4, 4, 3):
        usual(images[:count], labels[:count])


@pytest.mark.parametrize("p", [1.0, 0.5])
def test_a_channels_last_batch_stays_one(model, batch, p):
    seen = []
    model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    images = batch[0].contiguous(memory_format=torch.channels_last)
    out = paper_attack(model, flow=random_glow(), p=p)(images, batch[1])
    assert seen == [True] * len(seen) != []
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_p_of_single_images_is_right_on_average(model):
    attack = paper_attack(model, flow=Identity(), p=0.3, steps=1)
    images = torch.full((1, 3, 4, 4), 0.5)
    share = (
        sum(float((attack(images, torch.tensor([1])) != images).any()) for _ in range(200)) / 200
    )
    assert share == pytest.approx(0.3, abs=0.1)


def test_p_draws_other_images_each_time(model, batch, glow):
    attack = paper_attack(model, flow=glow, p=0.5, steps=1)
    chosen = {tuple((attack(*batch) != batch[0]).flatten(1).any(1).tolist()) for _ in range(10)}
    assert len(chosen) > 1


def test_a_flow_that_detaches_is_named(model, batch):
    class Gone(Identity):
        def decode(self, z, y=None):
            return super().decode(z, y).detach()

    with pytest.raises(ValueError, match=r"Gone\.decode detaches"):
        paper_attack(model, flow=Gone())(*batch)


def test_warns_of_steps_across_the_ball(model, glow):
    with pytest.warns(UserWarning, match="alpha=5 is more than twice eps=1"):
        paper_attack(model, eps=1.0, alpha=5.0, flow=glow)
    with pytest.warns(UserWarning, match="alpha=0.5 is more than twice eps=0.1"):
        paper_attack(model, eps=0.1, norm="linf", flow=glow)  # alpha's default is for l2
    paper_attack(model, eps=1.0, alpha=1.5, flow=glow)
    paper_attack(model, eps=0.0, flow=glow)
    with pytest.warns(UserWarning, match="3 steps of alpha=0.5 do not get half as far as eps=10"):
        paper_attack(model, eps=10.0, flow=glow)
    paper_attack(model, eps=3.0, flow=glow)


def test_warns_of_a_radius_given_as_standard_deviations(model, glow):
    with pytest.warns(UserWarning, match="images dissolve"):
        paper_attack(model, norm="linf", flow=glow)  # with the default of l2
    paper_attack(model, eps=0.1, alpha=0.05, norm="linf", flow=glow)
    with pytest.warns(UserWarning, match="it hardly changes an image"):
        paper_attack(model, eps=8 / 255, alpha=4 / 255, flow=glow)  # as for pixels


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_clip_limits_the_change(model, batch, glow, norm):
    out = paper_attack(model, eps=0.2, alpha=0.2, norm=norm, flow=glow, clip=0.02)(*batch)
    size = length(out - batch[0], norm)
    assert (size <= 0.0201).all()
    assert (size > 0.01).all()


def test_normalized_batches_are_refused_also_while_nothing_is_attacked(model, batch, glow):
    attack = LatentAdversarial(model, flow=glow, p=0.0)
    attack(*batch)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        attack((batch[0] - 0.5) / 0.05, batch[1])


def test_normalized_batches_are_attacked_as_their_originals(model, batch, glow):
    class OnNormalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x * 0.2 + 0.4)

    images, labels = batch
    torch.manual_seed(1)
    expected = (paper_attack(model, flow=glow)(images, labels) - 0.4) / 0.2
    torch.manual_seed(1)
    attack = paper_attack(OnNormalized(), flow=glow, normalize=([0.4] * 3, [0.2] * 3))
    result = attack((images - 0.4) / 0.2, labels)
    assert (result - expected).abs().max() < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_images_of_any_size_and_dtype(model, glow, dtype):
    images = torch.rand(2, 3, 13, 9).to(dtype)
    out = paper_attack(model.to(dtype), flow=glow)(images, torch.tensor([0, 1]))
    assert (out.dtype, out.shape) == (dtype, images.shape)
    assert not torch.equal(out, images)
    assert out.isfinite().all()


Pair = collections.namedtuple("Pair", ["images", "labels"])


class TestBatches:
    @pytest.mark.parametrize("kind", [tuple, list])
    def test_sequences(self, model, batch, glow, kind):
        given = kind([*batch, "extra"])
        out = paper_attack(model, flow=glow).step(given)
        assert type(out) is kind
        assert not torch.equal(out[0], batch[0])
        assert out[1] is batch[1]
        assert out[2] == "extra"
        assert given[0] is batch[0]

    def test_named_tuple(self, model, batch, glow):
        out = paper_attack(model, flow=glow).step(Pair(*batch))
        assert isinstance(out, Pair)
        assert out.labels is batch[1]

    @pytest.mark.parametrize("key", ["pixel_values", "image", "images"])
    @pytest.mark.parametrize("label", ["labels", "label"])
    @pytest.mark.parametrize("kind", [dict, collections.UserDict])
    def test_mappings(self, model, batch, glow, key, label, kind):
        given = kind({key: batch[0], label: batch[1], "id": 3})
        out = paper_attack(model, flow=glow).step(given)
        assert type(out) is kind
        assert list(out) == list(given)
        assert not torch.equal(out[key], batch[0])
        assert given[key] is batch[0]

    def test_labels_getter(self, model, batch, glow):
        attack = paper_attack(model, flow=glow, labels_getter=lambda b: b["target"]["class"])
        out = attack.step({"image": batch[0], "target": {"class": batch[1]}})
        assert not torch.equal(out["image"], batch[0])

    def test_input_is_left_alone(self, model, batch, glow):
        before = batch[0].clone()
        paper_attack(model, flow=glow).step(batch)
        assert torch.equal(batch[0], before)

    def test_empty_batch(self, model, glow):
        empty = (torch.rand(0, 3, 16, 16), torch.zeros(0, dtype=torch.long))
        out = paper_attack(model, flow=glow).step(empty)
        assert out[0].shape == (0, 3, 16, 16)

    def test_nan_image_comes_back_and_is_counted(self, model, batch, glow):
        images, labels = batch
        images[2, 0, 0, 0] = float("nan")
        attack = paper_attack(model, flow=glow)
        out = attack(images, labels)
        torch.testing.assert_close(out[2], images[2], equal_nan=True, rtol=0, atol=0)
        assert attack.fallbacks == 1
        assert out[[0, 1, 3, 4, 5]].isfinite().all()


class TestNoTrace:
    @pytest.mark.parametrize("mode", ["eval", "unchanged"])
    def test_of_an_attack(self, model, batch, glow, mode):
        model[0].requires_grad_(False)
        model[1].eval()  # a frozen BatchNorm in a model that trains
        model[6].weight.grad = torch.ones(4, 8)
        before = trace_of(model)
        paper_attack(model, flow=glow, model_mode=mode).step(batch)
        assert same_trace(trace_of(model), before)

    def test_of_an_exception(self, model, batch, glow):
        def fails(logits, labels):
            raise RuntimeError("out of luck")

        before = trace_of(model)
        attack = paper_attack(model, flow=glow, loss=fails, model_mode="unchanged")
        with pytest.raises(RuntimeError, match="out of luck"):
            attack.step(batch)
        assert same_trace(trace_of(model), before)

    def test_the_mode_is_the_one_asked_for(self, batch, glow):
        seen = []

        class Spy(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = convolutional_classifier()

            def forward(self, x):
                seen.append(self.training)
                return self.inner(x)

        model = Spy().train()
        paper_attack(model, flow=glow, steps=1).step(batch)
        paper_attack(model, flow=glow, steps=1, model_mode="unchanged").step(batch)
        assert seen == [False, True]

    def test_on_a_backward_pass_that_waits(self, model, batch, glow):
        model.train()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        paper_attack(model, flow=glow, model_mode="unchanged").step(batch)
        loss.backward()
        assert model[0].weight.grad is not None

    def test_a_training_step_is_as_without_it(self, batch, glow):
        """Given the same images, the model takes the same step whether or not it was attacked."""
        states = []
        for attacked in (False, True):
            model = convolutional_classifier()
            if attacked:
                paper_attack(model, flow=glow).step(batch)
            torch.manual_seed(9)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            states.append(model.state_dict())
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])

    def test_on_buffers_that_come_and_go(self, batch, glow):
        class Lazy(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = convolutional_classifier()
                self.register_buffer("seen", None)
                self.register_buffer("wide", torch.zeros(1).expand(10))

            def forward(self, x):
                self.seen = x.mean()
                if "late" not in self._buffers:
                    self.register_buffer("late", x.mean(), persistent=False)
                return self.inner(x)

        model = Lazy()
        before = trace_of(model)
        paper_attack(model, flow=glow).step(batch)
        assert same_trace(trace_of(model), before)
        assert list(model._buffers) == ["seen", "wide"]
        assert model._non_persistent_buffers_set == set()

    @pytest.mark.parametrize("p", [0.5, 1.0])
    def test_on_the_images_by_a_model_that_works_in_place(self, batch, glow, p):
        model = nn.Sequential(nn.Hardtanh(0.5, 0.6, inplace=True), convolutional_classifier())
        before = batch[0].clone()
        paper_attack(model, flow=glow, labels="predicted", p=p).step(batch)
        assert torch.equal(batch[0], before)

    @pytest.mark.parametrize("labels", ["true", "predicted"])
    def test_on_training_under_autocast(self, batch, glow, labels):
        model = convolutional_classifier()
        with torch.autocast("cpu", torch.bfloat16):
            images, targets = paper_attack(model, flow=glow, labels=labels).step(batch)
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_data_parallel_is_looked_through(self, batch, glow, monkeypatch):
        def refuse(self, *args):
            raise AssertionError("the wrapper was called")

        monkeypatch.setattr(nn.DataParallel, "forward", refuse)
        out = paper_attack(nn.DataParallel(convolutional_classifier()), flow=glow).step(batch)
        assert not torch.equal(out[0], batch[0])

    def test_inside_no_grad(self, model, batch, glow):
        with torch.no_grad():
            out = paper_attack(model, flow=glow).step(batch)
        assert not torch.equal(out[0], batch[0])
        assert not out[0].requires_grad


class TestOutput:
    @pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
    def test_type_and_graph_do_not_depend_on_p(self, model, batch, glow, p):
        images = tv_tensors.Image(batch[0], requires_grad=True)
        out = paper_attack(model, flow=glow, p=p)(images, batch[1])
        assert isinstance(out, tv_tensors.Image)
        assert not out.requires_grad

    def test_predicted_labels_need_none(self, model, batch, glow):
        attack = paper_attack(model, flow=glow, labels="predicted")
        assert not torch.equal(attack(batch[0]), batch[0])
        assert attack.step((batch[0], ["cat"] * 6))[1] == ["cat"] * 6


class TestBadInput:
    def test_inference_mode(self, model, batch, glow):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
            paper_attack(model, flow=glow).step(batch)

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"eps": -1}, ValueError, "eps"),
            ({"alpha": float("nan")}, ValueError, "alpha"),
            ({"steps": 0}, ValueError, "steps"),
            ({"steps": 1.5}, ValueError, "steps"),
            ({"norm": None}, ValueError, "norm must be one of"),
            ({"labels": "guess"}, ValueError, "labels must be one of"),
            ({"p": 2}, ValueError, "p must lie"),
            ({"model_mode": "train"}, ValueError, "model_mode"),
            ({"labels_getter": 3}, TypeError, "labels_getter"),
            ({"flow": None}, TypeError, "flow"),
            ({"loss": "ce"}, TypeError, "loss must be callable"),
            ({"forward": 3}, TypeError, "forward must be callable"),
            ({"gradient": "slow"}, ValueError, "gradient must be one of"),
        ],
    )
    def test_arguments(self, model, arguments, error, words):
        with pytest.raises(error, match=words):
            paper_attack(model, **{"flow": Identity(), **arguments})

    def test_model(self):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
            paper_attack(lambda x: x, flow=Identity())

    @pytest.mark.parametrize(
        ("batch", "error", "words"),
        [
            ((torch.rand(2, 1, 8, 8), torch.zeros(2).long()), ValueError, "3 channels"),
            (
                (torch.zeros(2).long(), torch.rand(2, 3, 8, 8)),
                ValueError,
                r"attack\(images, labels\)",
            ),
            ((torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2).long()), TypeError, "uint8"),
            ((torch.rand(2, 3, 8, 8), torch.zeros(3).long()), ValueError, "2 entries"),
            ((torch.rand(2, 3, 8, 8),), ValueError, "needs labels"),
            ((torch.rand(2, 3, 8, 8) * 9, torch.zeros(2).long()), ValueError, "normalize="),
            ({"x": torch.rand(2, 3, 8, 8)}, ValueError, "pixel_values"),
            (torch.rand(2, 3, 8, 8), TypeError, "batch must be"),
        ],
    )
    def test_batches(self, model, batch, error, words):
        before = trace_of(model)
        with pytest.raises(error, match=words):
            paper_attack(model, flow=Identity()).step(batch)
        assert same_trace(trace_of(model), before)


def test_repr_names_what_matters(model):
    attack = paper_attack(
        model, flow="glow-fashionmnist", eps=(0.5, 1.0), p=0.5, levels=-1, mask=torch.ones(28, 28)
    )
    assert repr(attack) == (
        "LatentAdversarial(eps=(0.5, 1.0), alpha=0.5, steps=3, norm='l2', "
        "flow='glow-fashionmnist', p=0.5, levels=(1,), mask=...)"
    )


def test_with_eps_scales_the_steps(model):
    attack = paper_attack(model, eps=1.0, alpha=(0.25, 0.5), flow=Identity())
    changed = attack.with_eps(2.0)
    assert (changed.eps, changed.alpha) == ((2.0, 2.0), (0.5, 1.0))
    assert (attack.eps, attack.alpha) == ((1.0, 1.0), (0.25, 0.5))


def test_settings_may_be_changed_while_training(model, batch):
    attack = LatentAdversarial(model, flow=Identity())
    assert torch.equal(attack.step(batch)[0], batch[0])
    attack.p = 1.0
    attack.eps = 2
    assert (attack.share, attack.eps, attack.alpha) == (1.0, (2.0, 2.0), (2.0, 2.0))
    assert not attack.fits_size  # as of an eps that is given from the start
    assert LatentAdversarial(model, flow=Identity()).with_eps(2.0).fits_size
    assert (attack.step(batch)[0] != batch[0]).flatten(1).any(1).all()
    attack.alpha = 0.5
    assert attack.alpha == (0.5, 0.5)
    attack.p = None
    assert attack.share == 0.0
    for name in ("eps", "alpha", "p"):
        with pytest.raises(ValueError, match=name):
            setattr(attack, name, -1.0)


def test_a_flow_without_a_choice_of_gradient(model, batch):
    assert paper_attack(model, flow=Identity(), gradient="auto").step(batch)
    with pytest.raises(ValueError, match=r"Identity\.decode takes no gradient argument"):
        paper_attack(model, flow=Identity(), gradient="lean")


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_lean_and_fast_attacks_agree(model, batch, norm):
    flow, results, ways = random_glow(steps=4, dtype=torch.float64), [], []
    images, decode = batch[0].double(), flow.decode

    def recorded(z, y=None, *, gradient="auto"):
        ways.append(gradient)
        return decode(z, y, gradient=gradient)

    flow.decode = recorded
    for gradient in ("fast", "lean"):
        torch.manual_seed(2)
        attack = paper_attack(
            model.double(), eps=0.2, alpha=0.1, norm=norm, flow=flow, gradient=gradient
        )
        results.append(attack(images, batch[1]))
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=0)
    assert ways == ["fast"] * 4 + ["lean"] * 4


def test_it_is_pickled_with_the_flow_s_name(tmp_path):
    random_glow().save_pretrained(tmp_path)
    attack = paper_attack(nn.Identity(), flow=tmp_path)
    assert pickle.loads(pickle.dumps(attack)).flow is attack.flow


class TestDefaults:
    """The setting that a user gets who names none."""

    @pytest.mark.parametrize(
        ("shape", "resolution", "radius"),
        [
            ((3, 32, 32), None, 1.0),
            ((1, 28, 28), None, (784 / 3072) ** 0.5),
            ((3, 64, 64), None, 2.0),
            ((3, 64, 64), 32, 1.0),
        ],
    )
    def test_are_of_one_strength_at_any_size(self, shape, resolution, radius, monkeypatch):
        noises = []
        perturb = Latents.perturb

        def remember(latents, noise):
            noises.append(noise)
            return perturb(latents, noise)

        monkeypatch.setattr(Latents, "perturb", remember)
        model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 3))
        flow = Identity()
        flow.channels = shape[0]
        attack = LatentAdversarial(model, flow=flow, resolution=resolution, p=1.0)
        attack(torch.full((4, *shape), 0.5), torch.arange(4) % 3)
        assert length(noises[0], "l2") == pytest.approx([radius] * 4, rel=0.01)

    def test_of_alpha_reach_the_edge_of_the_ball(self, model):
        for given, alpha in [
            ({}, (1.0, 1.0)),
            ({"steps": 3}, (0.5, 0.5)),
            ({"eps": (0.2, 0.4)}, (0.2, 0.4)),
            ({"norm": "rms"}, (0.018, 0.018)),
        ]:
            attack = LatentAdversarial(model, flow=Identity(), **given)
            assert attack.alpha == alpha
            assert attack.fits_size == (given.get("norm") != "rms" and "eps" not in given)

    def test_attack_at_predictions_in_one_pass(self, model):
        images, calls = torch.rand(6, 3, 8, 8), []
        model.register_forward_hook(lambda *_: calls.append(1))
        attack = LatentAdversarial(model, flow=Identity(), p=0.5)
        torch.manual_seed(0)
        one = attack(images, torch.zeros(6, dtype=torch.long))
        assert len(calls) == 1
        torch.manual_seed(0)
        other = attack(images, torch.ones(6, dtype=torch.long))
        assert torch.equal(one, other)
        assert (one != images).flatten(1).any(1).sum() == 3

    def test_use_the_batch_s_labels_with_a_loss_of_one_s_own(self, model):
        seen = []

        def loss(logits, labels):
            seen.append(labels)
            return nn.functional.cross_entropy(logits, labels)

        labels = torch.tensor([1, 0])
        LatentAdversarial(model, flow=Identity(), loss=loss, p=1.0)(torch.rand(2, 3, 8, 8), labels)
        assert seen[0].tolist() == [1, 0]

    def test_say_that_they_follow_the_size(self, model):
        assert repr(LatentAdversarial(model, flow=Identity())).endswith(", at 3x32x32)")
        assert "at 3x32x32" not in repr(LatentAdversarial(model, eps=1.0, flow=Identity()))
