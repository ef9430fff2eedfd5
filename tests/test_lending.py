"""What an attack leaves of the user's model: nothing."""

import collections
import functools
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Identity, convolutional_classifier, paper_attack, same_trace, trace_of
from torch import nn
from torch.fx.immutable_collections import immutable_list
from torch.nn.utils import parametrizations, parametrize

from latent_aug.transforms.lending import find_modules, lend, remember


class Linear(nn.Module):
    """A linear classifier of 16 x 16 images, for subclasses that add something to it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))

    def forward(self, x):
        return self.body(x)


def attacked(model, batch, **options):
    return paper_attack(model, flow=Identity(), **{"steps": 2, **options}).step(batch)[0]


class TestWhatFollowsFromWeights:
    """A model may cache it for a whole training step, in which the attack comes first."""

    def test_parametrizations_that_are_cached(self, batch):
        model = nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
            nn.Flatten(),
            parametrizations.spectral_norm(nn.Linear(784, 4)),
        )
        with parametrize.cached():
            images = attacked(model, batch)
            assert not parametrize._cache
            F.cross_entropy(model(images), batch[1]).backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_a_cached_property(self, batch):
        class Turned(Linear):
            def __init__(self):
                super().__init__()
                self.skew = nn.Parameter(torch.randn(4, 4))

            @functools.cached_property
            def turn(self):
                return torch.matrix_exp(self.skew - self.skew.T)

            def forward(self, x):
                return self.body(x) @ self.turn

        model = Turned()
        attacked(model, batch)
        assert "turn" not in vars(model)
        held = model.turn
        attacked(model, batch)
        assert vars(model)["turn"] is held

    def test_a_cache_that_nobody_knows(self, batch):
        class Scaled(Linear):
            def __init__(self):
                super().__init__()
                self.log_scale = nn.Parameter(torch.zeros(4))
                self._scale = None

            def forward(self, x):
                if self._scale is None:
                    self._scale = self.log_scale.exp()
                return self.body(x) * self._scale

        model = Scaled()
        F.cross_entropy(model(attacked(model, batch)), batch[1]).backward()
        assert model.log_scale.grad is not None

    def test_weights_that_are_no_leaves(self, batch):
        outer, inner = Linear(), Linear()
        for one, other in zip(inner.modules(), outer.modules(), strict=True):
            for name, parameter in other._parameters.items():
                one._parameters[name] = parameter.clone()
        F.cross_entropy(inner(attacked(inner, batch)), batch[1]).backward()
        assert all(p.grad is not None for p in outer.parameters())


class TestBuffers:
    class Holder(Linear):
        def __init__(self, buffer, change=None):
            super().__init__()
            self.register_buffer("held", buffer)
            self.change = change

        def forward(self, x):
            if self.change is not None:
                self.change(self.held)
            return self.body(x)

    @pytest.mark.filterwarnings("ignore:Sparse CSR")
    @pytest.mark.parametrize(
        ("buffer", "change"),
        [
            (torch.ones(3), lambda t: t.mul_(2)),
            (torch.ones(3), lambda t: t.data.mul_(2)),
            (torch.ones(0), lambda t: t.resize_(4).fill_(1)),
            (torch.ones(3), lambda t: setattr(t, "data", torch.zeros(5).half())),
            (torch.tensor([float("nan"), 1.0]), lambda t: t.add_(1)),
            (torch.eye(3).to_sparse_coo(), lambda t: t.mul_(2)),
            (torch.eye(3).to_sparse_coo(), lambda t: t.zero_()),
            ("csr", lambda t: t.mul_(2)),
            (torch.ones(3, dtype=torch.bool), lambda t: t.logical_not_()),
            (torch.ones(3, dtype=torch.complex64), lambda t: t.mul_(2)),
        ],
    )
    def test_content_is_put_back(self, batch, buffer, change):
        buffer = torch.eye(3).to_sparse_csr() if isinstance(buffer, str) else buffer
        model, before = self.Holder(buffer.clone(), change), buffer.clone()
        held = model.held
        attacked(model, batch)
        assert model.held is held
        assert held.dtype == before.dtype
        found, expected = (t.to_dense() for t in (held, before))
        torch.testing.assert_close(found, expected, equal_nan=True, atol=0, rtol=0)

    @pytest.mark.filterwarnings("ignore:Sparse CSR")
    @pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
    @pytest.mark.parametrize("kind", ["csr", "read-only", "nan", "expanded", "meta", "inference"])
    def test_what_only_is_read_is_not_written_to(self, batch, kind, tmp_path):
        values = np.full((2, 3), np.nan if kind == "nan" else 1.0, dtype="float32")
        if kind in ("read-only", "nan"):  # a write would end the process
            np.save(tmp_path / "a.npy", values)
            buffer = torch.from_numpy(np.load(tmp_path / "a.npy", mmap_mode="r"))
        elif kind == "inference":
            with torch.inference_mode():
                buffer = torch.ones(3)
        else:
            make = {
                "csr": lambda: torch.eye(3).to_sparse_csr(),
                "expanded": lambda: torch.ones(()).expand(3),
                "meta": lambda: torch.ones(3, device="meta"),
            }
            buffer = make[kind]()
        model = self.Holder(buffer)
        images = attacked(model, batch)
        assert model.held is buffer
        assert not torch.equal(images, batch[0])

    @pytest.mark.parametrize(
        "write",
        [
            lambda mean, x: mean.add_(1),
            # Behind its version:
            lambda mean, x: mean.data.mul_(0.9).add_(x.detach().mean()),
        ],
    )
    def test_of_a_norm_that_the_model_writes_to(self, model, batch, write):
        """A norm in evaluation mode is copied until an attack has left it alone."""

        class Writing(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, x):
                write(self.inner[1].running_mean, x)
                return self.inner(x)

        writing = Writing()
        for _ in range(3):
            before = trace_of(writing)
            attacked(writing, batch)
            assert same_trace(trace_of(writing), before)

    def test_of_norms_are_copied_in_training_mode_only(self, model, monkeypatch):
        copied, clone = [], torch.Tensor.clone
        with lend(model, "eval"):
            pass
        monkeypatch.setattr(torch.Tensor, "clone", lambda t: (copied.append(t), clone(t))[1])
        with lend(model, "eval"):
            assert not copied
        with lend(model, "unchanged"):
            assert len(copied) == 3

    @pytest.mark.parametrize("persistent", [True, False])
    def test_one_that_the_first_pass_makes_stays(self, batch, persistent):
        class Building(Linear):
            def __init__(self):
                super().__init__()
                self.register_buffer("scale", torch.ones(()))
                self._built = False

            def forward(self, x):
                if not self._built:
                    self.register_buffer("place", torch.zeros(4), persistent=persistent)
                    self.register_buffer("scale", torch.zeros(()), persistent=False)
                    self._built = True
                return self.body(x) * self.scale + self.place

        model = Building()
        attacked(model, batch)
        assert model(batch[0]).any()
        assert "scale" in model.state_dict()
        assert ("place" in model.state_dict()) == persistent


class TestStateBesideBuffers:
    @pytest.mark.parametrize(
        ("make", "change"),
        [
            (lambda: torch.zeros(3), lambda v: v.add_(1)),
            (lambda: np.zeros(3), lambda v: v.__iadd__(1)),
            (lambda: {1}, lambda v: v.add(2)),
            (lambda: [1], lambda v: v.append(2)),
            (lambda: {"a": 1}, lambda v: v.update(b=2)),
            (lambda: collections.deque([1], maxlen=1), lambda v: v.append(2)),
            (lambda: collections.Counter("ab"), lambda v: v.update("b")),
            (lambda: collections.defaultdict(list), lambda v: v["a"].append(1)),
            (lambda: {"a": [torch.zeros(3)]}, lambda v: v["a"][0].add_(1)),
            (lambda: [np.zeros(3)], lambda v: v[0].__iadd__(1)),
            (lambda: (torch.zeros(3), 1), lambda v: v[0].add_(1)),
            (lambda: [(1, [2])], lambda v: v[0][1].append(3)),
        ],
    )
    def test_content_of_attributes_is_put_back(self, batch, make, change):
        class Keeping(Linear):
            def __init__(self):
                super().__init__()
                self.state = make()

            def forward(self, x):
                change(self.state)
                return self.body(x)

        model = Keeping()
        state = model.state
        attacked(model, batch)
        assert model.state is state
        assert repr(state) == repr(make())
        change(state)
        assert repr(state) != repr(make())

    def test_containers_that_refuse_changes_are_left_or_put_back(self, batch):
        class Refusing(dict):
            def update(self, *_):
                raise TypeError("no update")

        class Keeping(Linear):
            def __init__(self):
                super().__init__()
                self.sizes = immutable_list([1, 2])
                self.last = Refusing(step=0)

            def forward(self, x):
                self.last["step"] += 1
                return self.body(x)

        model = Keeping()
        attacked(model, batch)
        assert (model.sizes, model.last) == ([1, 2], {"step": 0})

    def test_the_promise_ends_here(self, batch):
        """Private attributes, other objects, and parameters that a forward pass writes to."""

        class Beyond(Linear):
            def __init__(self):
                super().__init__()
                self._seen, self.meter = [], types.SimpleNamespace(count=0)

            def forward(self, x):
                self._seen.append(len(x))
                self.meter.count += 1
                with torch.no_grad():
                    self.body[1].bias.add_(1)
                return self.body(x)

        model = Beyond()
        bias = model.body[1].bias.detach().clone()
        attacked(model, batch, steps=1)
        assert (model._seen, model.meter.count) == ([6], 1)
        assert torch.equal(model.body[1].bias.detach(), bias + 1)

    def test_what_has_no_content_to_keep(self):
        assert [remember(value) for value in (1, "a", (1, 2), nn.Linear(1, 1))] == [None] * 4
        assert remember(nn.Parameter(torch.zeros(1))) is None


class Centred(nn.Module):
    """A loss that keeps a running centre, and has a layer that is not itself in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, logits, labels):
        self.centre.add_(logits.detach().mean(0))
        return F.cross_entropy(self.drop(logits) - self.centre, labels)


centred = Centred()


global_norm = nn.BatchNorm2d(3)


def call_global(logits, labels):
    return centred(logits, labels)


class TestModulesBesideTheModel:
    class Caller:
        def __init__(self, loss):
            self.parts = {"loss": [loss]}

        def __call__(self, logits, labels):
            return self.parts["loss"][0](logits, labels)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda loss: loss,
            lambda loss: loss.forward,
            lambda loss: lambda logits, y: loss(logits, y),
            lambda loss: lambda logits, y, loss=loss: loss(logits, y),
            lambda loss: functools.partial(loss),
            lambda loss: TestModulesBesideTheModel.Caller(loss),
            lambda loss: TestModulesBesideTheModel.Caller(loss).__call__,
            lambda loss: call_global,
        ],
    )
    def test_of_a_loss_are_lent_too(self, batch, wrap):
        loss = wrap(centred)
        assert list(find_modules(loss)) == [centred]
        before = trace_of(centred)
        attacked(Linear(), batch, loss=loss)
        assert same_trace(trace_of(centred), before)
        with lend(Linear(), "eval", beside=[loss]):
            assert not centred.drop.training

    def test_of_a_forward_are_lent_too(self, batch):
        neck = convolutional_classifier().train()
        before = trace_of(neck)
        attacked(Linear(), batch, forward=lambda model, batch: model(batch[0]) + neck(batch[0]))
        assert same_trace(trace_of(neck), before)

    def test_of_a_nested_function_are_lent_too(self, batch):
        before = trace_of(global_norm)

        def ask(model, batch):
            views = (batch[0], batch[0].flip(3))
            return sum(map(lambda view: model(global_norm(view)), views))

        attacked(Linear(), batch, forward=ask)
        assert same_trace(trace_of(global_norm), before)

    def test_of_an_object_of_many_attributes_are_lent_too(self):
        trainer = types.SimpleNamespace(**{f"setting{i}": i for i in range(200)})
        trainer.model = nn.Linear(2, 2)
        assert list(find_modules(lambda: trainer)) == [trainer.model]

    @pytest.mark.parametrize(
        "hide",
        [
            lambda norm: [norm],
            lambda norm: norm,
            lambda norm: functools.partial(norm),
            lambda norm: norm.forward,
            lambda norm: lambda x: norm(x),
        ],
    )
    def test_that_the_model_does_not_know_are_lent_too(self, batch, hide):
        class Hiding(Linear):
            def __init__(self):
                super().__init__()
                object.__setattr__(self, "norm", hide(norm))

            def forward(self, x):
                return self.body(self.norm[0](x) if isinstance(self.norm, list) else self.norm(x))

        norm = nn.BatchNorm2d(3)
        attacked(Hiding().train(), batch)
        assert norm.training
        assert norm.num_batches_tracked == 0

    def test_a_data_set_beside_a_loss_is_not_searched(self):
        class Entries(list):
            def __iter__(self):
                raise AssertionError("it is long")

        trainer = types.SimpleNamespace(model=nn.Linear(2, 2))
        trainer.data = types.SimpleNamespace(samples=Entries([("path", 0)] * 1000))
        assert list(find_modules(lambda: trainer)) == [trainer.model]

    def test_a_callable_without_modules_reaches_none(self):
        assert not list(find_modules(F.cross_entropy))
        assert not list(find_modules(None))


def test_threads_attack_one_model_in_turn(model):
    before, entered = trace_of(model), []

    def work():
        with lend(model[1], "eval"), lend(model, "eval"):
            entered.append(model[1].training)

    thread = threading.Thread(target=work)
    with lend(model, "eval"):
        thread.start()
        thread.join(0.5)  # it can only wait, however slow it is
        assert not entered
    thread.join()
    assert entered == [False]
    assert same_trace(trace_of(model), before)


def test_all_is_put_back_even_if_a_part_cannot_be(model):
    before, weight = trace_of(model), model[0].weight

    def fail():
        with lend(model, "eval"):
            model[0].weight = nn.Parameter(weight.detach())
            model[1]._buffers = None
            raise RuntimeError("out of luck")

    buffers = model[1]._buffers
    with pytest.raises(TypeError, match="NoneType"):
        fail()
    vars(model[1])["_buffers"] = buffers
    assert [m.training for m in model if m is not model[1]] == [True] * 6
    assert before["flags"] == [p.requires_grad for p in model.parameters()]
