"""The classifier under attack: precisions, compilers, wrappers; its labels and what it shares."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    Identity,
    convolutional_classifier,
    paper_attack,
    random_glow,
    same_trace,
    trace_of,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel

from latent_aug import LatentAdversarial
from latent_aug.transforms.classifier import check_targets, has_several, scale_up, unwrap
from latent_aug.transforms.lending import lend


def sure_model():
    """A classifier that is so sure of class 0 that its loss's gradient underflows in float16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([25.0, 0.0, 0.0, 0.0]))
    return model


class TestFloat16:
    @pytest.mark.parametrize("how", ["autocast", "half", "accelerate"])
    def test_small_gradients_survive(self, how):
        images, labels = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
        options = {"flow": Identity(), "random_start": False, "eps": 0.3, "alpha": 0.1}
        expected = paper_attack(sure_model(), **options)(images, labels) - images
        model = sure_model()
        if how == "half":
            model, images = model.half(), images.half()
        if how == "accelerate":  # its wrapper casts the outputs back to float32

            class Wrapped(nn.Module):
                def __init__(self, inner):
                    super().__init__()
                    self.inner = inner

                def forward(self, x):
                    with torch.autocast("cpu", torch.float16):
                        return self.inner(x).float()

            model = Wrapped(model)
        with torch.autocast("cpu", torch.float16, enabled=how == "autocast"):
            out = paper_attack(model, **options)(images, labels)
        assert out.dtype == images.dtype
        moved = (out - images).float().flatten(1)
        cosine = F.cosine_similarity(moved, expected.flatten(1))
        assert (moved.norm(dim=1) > 0.25).all()
        assert (cosine > 0.98).all()

    def test_beside_a_grad_scaler(self, batch):
        """The attack before a scaled step leaves scale and step as they were."""
        states = []
        for attacked in (False, True):
            model = convolutional_classifier().train()
            scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(model.parameters())
            with torch.autocast("cpu", torch.bfloat16):
                if attacked:
                    paper_attack(model, flow=random_glow()).step(batch)
                torch.manual_seed(1)
                loss = F.cross_entropy(model(batch[0]), batch[1])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            states.append((model.state_dict(), scaler.get_scale()))
        assert states[0][1] == states[1][1]
        assert all(torch.equal(states[0][0][k], states[1][0][k]) for k in states[0][0])

    def test_a_factor_for_each_sample_or_one_for_all(self):
        grad = torch.tensor([[1e-9, -2e-9], [0.0, 0.0], [3.0, 4.0]])
        torch.testing.assert_close(
            scale_up(grad[:, 0], each=True), grad[:, 0] * 0 + 256 * (grad[:, 0] > 0)
        )
        each = scale_up(grad, each=True)
        torch.testing.assert_close(
            each, torch.tensor([[128.0, -256.0], [0.0, 0.0], [192.0, 256.0]])
        )
        torch.testing.assert_close(scale_up(grad, each=False), grad * 64)
        assert scale_up(torch.rand(2, 4, 8, 8), each=True).shape == (2, 4, 8, 8)

    def test_in_train_mode_samples_keep_their_weights(self, batch):
        """BatchNorm ties the samples: the gradient must be that of the summed loss."""
        model = convolutional_classifier().train()
        model[3].p = 0.0  # no dropout
        with torch.no_grad():
            model[6].weight *= 30  # some samples are sure, so that their gradients are smaller
        images, labels = batch
        x = images.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(
            F.cross_entropy(copy.deepcopy(model)(x), labels, reduction="sum"), x
        )
        attack = paper_attack(
            model, model_mode="unchanged", flow=Identity(), steps=1, random_start=False, alpha=0.1
        )
        moved = (attack(images, labels) - images).flatten(1)
        assert (F.cosine_similarity(moved, grad.flatten(1)) > 0.999).all()


@pytest.mark.parametrize("margin", [25, 120])
def test_confident_samples_are_attacked_in_the_right_direction(margin):
    """From a margin of 17 float32's softmax is exactly 1; from 103 the others' are exactly 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[2.0 * margin, 0, 0, 0], [0, 1.0, 0, 0]]))
    images = torch.full((1, 1, 2, 2), 0.5)

    class Grey(Identity):
        channels = 1

    attack = paper_attack(model, eps=0.1, alpha=0.1, steps=1, flow=Grey(), random_start=False)
    moved = (attack(images, torch.tensor([0])) - images).flatten()
    assert moved[1] > 0
    assert moved[0] == pytest.approx(-0.1 if margin < 36 else 0, abs=1e-4)
    assert moved.norm() == pytest.approx(0.1, abs=1e-4)


class TestKindsOfModels:
    """Each is attacked as the plain model is, and left as it was."""

    def attacked(self, model, batch, **options):
        torch.manual_seed(3)
        attack = paper_attack(model, flow=random_glow(), steps=2, **options)
        torch.manual_seed(4)
        return attack.step(batch)[0]

    # torch hides this warning of its own from everybody but those who make warnings errors
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
    @pytest.mark.parametrize("mode", ["eval", "unchanged"])
    def test_compiled(self, model, batch, mode):
        model.eval()
        expected = self.attacked(model, batch, model_mode=mode)
        model.train(mode == "eval")
        compiled = torch.compile(model, backend="aot_eager")
        before = trace_of(compiled)
        out = self.attacked(compiled, batch, model_mode=mode)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)
        assert same_trace(trace_of(compiled), before)
        F.cross_entropy(compiled(batch[0]), batch[1]).backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_with_synchronized_batch_norm(self, model, batch):
        expected = self.attacked(model, batch)
        synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
        before = trace_of(synchronized)
        torch.testing.assert_close(self.attacked(synchronized, batch), expected)
        assert same_trace(trace_of(synchronized), before)

    def test_an_average_of_weights(self, model, batch):
        expected = self.attacked(model, batch)
        average = AveragedModel(model, use_buffers=True)
        before = trace_of(average)
        torch.testing.assert_close(self.attacked(average, batch), expected)
        assert same_trace(trace_of(average), before)

    def test_beside_an_average_of_weights(self, model, batch):
        average = AveragedModel(model, use_buffers=True)
        before = trace_of(average)
        self.attacked(model, batch, model_mode="unchanged")
        average.update_parameters(model)
        after = trace_of(average)
        after["state"]["n_averaged"] -= 1
        assert same_trace(after, before)

    @pytest.mark.parametrize("frozen", ["first layer", "everything"])
    def test_frozen_in_part(self, model, batch, frozen):
        expected = self.attacked(model, batch)
        (model if frozen == "everything" else model[0]).requires_grad_(False)
        before = trace_of(model)
        torch.testing.assert_close(self.attacked(model, batch), expected)
        assert same_trace(trace_of(model), before)

    def test_lazy(self, batch):
        model = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
        with pytest.raises(ValueError, match="run one batch through it first"):
            self.attacked(model, batch)
        model(batch[0])
        assert not torch.equal(self.attacked(model, batch), batch[0])

    def test_weights_keep_their_flags_unless_compiled(self, model, batch):
        """What an eager model caches of them stays trainable. Compiled, it would compute all."""
        for lent, wanted in ((model, True), (torch.compile(model, backend="eager"), False)):
            with lend(lent, "eval"):
                assert {p.requires_grad for p in model.parameters()} == {wanted}
            assert all(p.requires_grad for p in model.parameters())

    def test_whose_train_does_more_than_set_a_flag(self, batch):
        class Merging(nn.Linear):
            """As LoRA layers: evaluation mode merges the small weights into the large ones."""

            def __init__(self):
                super().__init__(768, 4)
                self.small, self.merged = nn.Parameter(torch.ones(4, 768)), False

            def train(self, mode=True):
                super().train(mode)
                if self.merged == mode:
                    self.weight.data += -self.small if mode else self.small
                    self.merged = not mode
                return self

            def forward(self, x):
                return super().forward(x) + (0 if self.merged else x @ self.small.T)

        model = nn.Sequential(nn.Flatten(), Merging()).train()
        before = trace_of(model)
        self.attacked(model, batch)
        assert same_trace(trace_of(model), before)
        assert not model[1].merged

    @pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
    def test_scripted(self, model, batch):
        expected = self.attacked(model, batch)
        scripted = torch.jit.trace(model.eval(), batch[0]).train()
        before = trace_of(scripted)
        torch.testing.assert_close(self.attacked(scripted, batch), expected, atol=1e-4, rtol=0)
        assert same_trace(trace_of(scripted), before)

    def test_recurrent_layers_without_dropout_stay_in_training_mode(self):
        """cuDNN goes backwards through them in that mode only."""
        model = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4, 2, dropout=0.5), nn.GRU(4, 4)]).train()
        with lend(model, "eval") as borrowed:
            assert [m.training for m in borrowed] == [True, False, True]
        assert all(m.training for m in model)


class TestOutputs:
    """Whatever a model gives: the step goes up the gradient of the loss."""

    def cosines(self, model, true_loss, batch, **options):
        """Between the attack's step and the true gradient, of each sample."""
        images, labels = batch
        x = images.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(true_loss(model(x), labels).sum(), x)
        attack = paper_attack(
            model, eps=1.0, alpha=0.1, steps=1, random_start=False, flow=Identity(), **options
        )
        moved = attack(images, labels) - images
        return F.cosine_similarity(moved.flatten(1), grad.flatten(1))

    @pytest.mark.parametrize("model_mode", ["eval", "unchanged"])
    def test_one_logit_for_each_sample_or_for_all(self, batch, model_mode):
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 1), nn.Flatten(0)).eval()
        losses = [
            lambda logits, y: F.binary_cross_entropy_with_logits(logits, (y > 1).float()),
            lambda logits, y: F.binary_cross_entropy_with_logits(
                logits, (y > 1).float(), reduction="none"
            ),
        ]
        for loss in losses:
            assert (
                self.cosines(model, loss, batch, loss=loss, model_mode=model_mode) > 0.999
            ).all()
        attack = paper_attack(
            model,
            flow=Identity(),
            forward=lambda model, batch: model(batch[0]).square().sum(),
            loss=lambda value, labels: value,
            model_mode=model_mode,
        )
        assert not torch.equal(attack(*batch), batch[0])

    def test_several_heads_keep_their_weights(self, batch):
        class Heads(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = (nn.Sequential(nn.Flatten(), nn.Linear(768, 4)) for _ in "ab")

            def forward(self, x):
                return torch.stack([self.one(x), self.two(x)])

        def loss(logits, labels):
            return F.cross_entropy(logits[0], labels) + 1e-4 * F.cross_entropy(logits[1], labels)

        assert (self.cosines(Heads(), loss, batch, loss=loss) > 0.999).all()

    def test_samples_that_meet_in_evaluation_mode(self, model, batch):
        model[1] = nn.BatchNorm2d(8, track_running_stats=False)
        with torch.no_grad():
            model[6].weight *= 30
        assert (self.cosines(model.eval(), F.cross_entropy, batch) > 0.999).all()

    @pytest.mark.parametrize("classes", [1, None])
    def test_predicted_labels_need_two_classes(self, batch, classes):
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 1), nn.Flatten(0 if not classes else 1))
        attack = paper_attack(
            model, flow=Identity(), labels="predicted", loss=lambda logits, y: logits.sum()
        )
        with pytest.raises(ValueError, match="labels='predicted' takes the largest"):
            attack.step(batch)

    @pytest.mark.parametrize("p", [0.5, 1.0])
    def test_labels_of_any_kind_with_a_loss_of_one_s_own(self, model, batch, p):
        images, labels = batch
        seen = []

        def mixed(logits, targets):
            one, two, share = targets
            seen.append((len(one), len(logits), share))
            return share * F.cross_entropy(logits, one) + (1 - share) * F.cross_entropy(logits, two)

        attack = paper_attack(
            model,
            flow=Identity(),
            loss=mixed,
            p=p,
            steps=1,
            labels_getter=lambda batch: (batch[1], batch[2], 0.3),
        )
        out = attack.step((images, labels, labels.flip(0)))
        assert (out[0] != images).flatten(1).any(1).sum() == 6 * p
        assert seen == [(6 * p, 6 * p, 0.3)]

    def test_a_loss_that_is_a_number(self, model, batch):
        attack = paper_attack(model, flow=Identity(), loss=lambda logits, y: 1.0)
        with pytest.raises(TypeError, match="loss must give a tensor, got float"):
            attack.step(batch)

    def test_a_loss_of_weights_of_its_own_alone(self, model, batch):
        centre = nn.Parameter(torch.zeros(4))
        attack = paper_attack(
            model, flow=Identity(), loss=lambda logits, y: (logits.detach() - centre).sum()
        )
        with pytest.raises(ValueError, match="no gradient to the images"):
            attack.step(batch)


class TestWrappers:
    def test_data_parallel_is_opened(self, model):
        assert unwrap(nn.DataParallel(model)) is model

    def test_compiled_outside_a_wrapper_is_opened(self, model):
        assert unwrap(torch.compile(nn.DataParallel(model))) is model

    def test_compiled_inside_a_wrapper_stays_compiled(self, model):
        compiled = torch.compile(model)
        assert unwrap(nn.DataParallel(compiled)) is compiled
        assert unwrap(compiled) is compiled

    def test_a_model_of_that_attribute_is_none(self, model):
        model._orig_mod = None
        assert unwrap(model) is model


@pytest.mark.parametrize("mode", ["eval", "unchanged"])
def test_lent_puts_flags_back_after_an_exception(model, mode):
    model[0].requires_grad_(False)
    before = trace_of(model)

    def fail():
        with lend(model, mode) as borrowed:
            borrowed(torch.rand(2, 3, 8, 8))
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fail()
    assert same_trace(trace_of(model), before)


class TestTargets:
    logits = torch.randn(3, 4)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
    def test_indices_of_any_integer_type(self, dtype):
        labels = torch.tensor([0, 3, 1], dtype=dtype)
        assert torch.equal(check_targets(self.logits, labels), labels.long())

    def test_ignored_labels_pass(self):
        labels = torch.tensor([0, -100, 1])
        assert torch.equal(check_targets(self.logits, labels), labels)

    def test_probabilities_take_the_logits_type(self):
        labels = torch.rand(3, 4).double().softmax(1)
        assert check_targets(self.logits, labels).dtype == torch.float32

    def test_a_label_for_each_pixel(self):
        labels = torch.zeros(3, 8, 8, dtype=torch.long)
        assert check_targets(torch.randn(3, 4, 8, 8), labels) is not None

    @pytest.mark.parametrize(
        ("logits", "labels", "words"),
        [
            (torch.randn(3, 4), torch.tensor([0, 4, 1]), "labels must lie in 0 to 3, .* got 4"),
            (torch.randn(3, 4), torch.tensor([0, -1, 1]), "labels must lie in 0 to 3, .* got -1"),
            (torch.randn(3, 4), torch.tensor([0.0, 1.0, 2.0]), "labels must be integers"),
            (torch.randn(3, 4), torch.rand(3, 5), "probabilities of the logits' shape"),
            (torch.randn(3, 4), torch.zeros(3, 1).long(), r"class indices \(B,\)"),
            (torch.randn(3, 4), torch.ones(3, 4).long(), "several labels per image pass loss="),
            (torch.randn(3, 1), torch.zeros(3).long(), "at least 2 classes"),
            (torch.randn(3), torch.zeros(3).long(), "at least 2 classes"),
        ],
    )
    def test_what_does_not_fit(self, logits, labels, words):
        with pytest.raises(ValueError, match=words):
            check_targets(logits, labels)


TWO = torch.eye(4)[:3] + torch.eye(4)[3]  # two labels for each of three images


class TestSeveralLabels:
    images = torch.full((3, 3, 16, 16), 0.5)
    several = (TWO, 0.9 * TWO + 0.05, TWO / 4, 0 * TWO, TWO.half(), TWO.long(), TWO.int())

    @pytest.mark.parametrize("labels", several)
    def test_need_a_loss_unless_predictions_are_asked_for(self, model, labels):
        attack = LatentAdversarial(model, flow=Identity())
        with pytest.raises(ValueError, match=r"pass loss=.*pass labels='predicted'"):
            attack.step((self.images, labels))
        with pytest.raises(ValueError, match="pass loss="):
            LatentAdversarial(model, flow=Identity(), labels="true").step((self.images, labels))
        predicted = LatentAdversarial(model, flow=Identity(), labels="predicted", p=0.5)
        predicted.step((self.images, labels))
        loss = nn.BCEWithLogitsLoss() if labels.is_floating_point() else F.multilabel_margin_loss
        LatentAdversarial(model, flow=Identity(), loss=loss, p=0.5).step(
            (self.images, labels.float() if labels.is_floating_point() else labels.long())
        )

    @pytest.mark.parametrize("labels", [torch.tensor([True, False, True]), TWO.bool()])
    @pytest.mark.parametrize("choice", [None, "true"])
    def test_booleans_are_refused(self, model, labels, choice):
        attack = LatentAdversarial(model, flow=Identity(), labels=choice)
        with pytest.raises(ValueError, match=r"labels must be .* torch.bool; .* pass loss="):
            attack.step((self.images, labels))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_probabilities_are_none(self, dtype):
        labels = torch.randn(20, 100).softmax(1)
        smooth = 0.9 * torch.eye(100)[:20] + 0.001
        assert not any(has_several(t.to(dtype)) for t in (labels, smooth))
        assert not has_several(torch.eye(4).long())
        assert not has_several(torch.arange(4))
        assert not has_several(torch.rand(4, 8, 8).mul(20).long())

    def test_predicted_classes_do_not_suit_a_loss_of_several(self, model):
        options = {"flow": Identity(), "labels": "predicted", "p": 0.5}
        for loss in (nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits):
            with pytest.raises(ValueError, match=r"labels='predicted' .*; pass labels='true'"):
                LatentAdversarial(model, loss=loss, **options)
        attack = LatentAdversarial(
            model, loss=lambda z, y: F.binary_cross_entropy_with_logits(z, y.float()), **options
        )
        with pytest.raises(ValueError, match=r"labels='predicted' .* it fails: .*labels='true'"):
            attack.step((self.images, TWO))

    def test_a_loss_of_true_labels_raises_its_own_error(self, model):
        attack = LatentAdversarial(model, flow=Identity(), loss=nn.BCEWithLogitsLoss(), p=1)
        with pytest.raises(ValueError, match=r"^Target size"):
            attack.step((self.images, torch.zeros(3)))


class TestForward:
    def test_of_several_inputs_and_outputs(self, batch):
        class TwoInputs(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = convolutional_classifier()

            def forward(self, pixel_values, shift, labels=None):
                return {"logits": self.inner(pixel_values) + shift, "loss": None}

        images, labels = batch
        model, shift = TwoInputs(), torch.zeros(6, 4)
        given = {"pixel_values": images, "labels": labels, "shift": shift}
        flow = random_glow()
        attack = paper_attack(
            model, flow=flow, forward=lambda model, batch: model(**batch)["logits"]
        )
        torch.manual_seed(1)
        out = attack.step(given)
        torch.manual_seed(1)
        plain = paper_attack(model.inner, flow=flow)(images, labels)
        torch.testing.assert_close(out["pixel_values"], plain)
        assert out["shift"] is shift
        assert given["pixel_values"] is images

    def test_of_a_share_of_the_batch_sees_its_rows(self, model, batch):
        images, labels = batch
        seen = []

        def forward(model, batch):
            seen.append(batch)
            return model(batch[0])

        attack = paper_attack(model, flow=Identity(), p=0.5, forward=forward, steps=1)
        names, boxes = list("abcdef"), [torch.full((3, 4), i) for i in range(6)]
        extra = {"n": torch.arange(6), "array": torch.arange(6).numpy(), "weights": torch.ones(4)}
        columns = [torch.arange(6) for _ in range(6)]  # by chance as many as images
        out = attack.step((images, labels, names, boxes, extra, 2.0, columns))
        changed = (out[0] != images).flatten(1).any(1).nonzero().flatten()
        x, y, letters, corners, extra, scale, columns = seen[-1]
        order = extra["n"]
        assert torch.equal(order.sort().values, changed)
        assert torch.equal(y, labels[order])
        assert letters == [names[i] for i in order]
        assert len(x) == 3
        assert [int(c[0, 0]) for c in corners] == order.tolist()
        assert all(c.shape == (3, 4) for c in corners)
        assert len(columns) == 6
        assert all(torch.equal(column, order) for column in columns)
        assert extra["array"].tolist() == order.tolist()
        assert len(extra["weights"]) == 4
        assert scale == 2.0
        assert out[2] is names

    def test_of_a_share_of_a_mapping_that_has_rows(self, model, batch):
        class Table(dict):  # as TensorDict is
            shape = property(lambda self: self["image"].shape[:1])

            def __setitem__(self, key, value):
                if self and len(value) != len(self["image"]):
                    raise ValueError("other rows")
                super().__setitem__(key, value)

            def __getitem__(self, key):
                if isinstance(key, str):
                    return super().__getitem__(key)
                return Table({name: value[key] for name, value in self.items()})

        seen = []

        def forward(model, batch):
            seen.append(batch)
            return model(batch["image"])

        attack = paper_attack(model, flow=Identity(), p=0.5, forward=forward, steps=1)
        given = Table(image=batch[0], label=batch[1], number=torch.arange(6))
        changed = (attack.step(given)["image"] != batch[0]).flatten(1).any(1).nonzero().flatten()
        assert type(seen[-1]) is Table
        assert torch.equal(seen[-1]["number"].sort().values, changed)

    def test_predicted_labels_come_through_it(self, model, batch):
        attack = paper_attack(
            model,
            flow=random_glow(),
            labels="predicted",
            forward=lambda model, batch: model(batch[0]),
        )
        assert not torch.equal(attack(batch[0]), batch[0])

    def test_an_output_that_is_no_tensor(self, batch):
        class Detector(nn.Module):
            def forward(self, x):
                return {"logits": x.mean(dim=(2, 3))}

        before = batch[0].clone()
        with pytest.raises(
            TypeError, match="tensor of logits is needed, got dict; pass a forward="
        ):
            paper_attack(Detector(), flow=Identity()).step(batch)
        assert torch.equal(batch[0], before)

    @pytest.mark.parametrize("where", ["forward", "loss"])
    def test_one_that_detaches(self, model, batch, where):
        given = {
            "forward": lambda model, batch: model(batch[0]).detach(),
            "loss": lambda logits, labels: F.cross_entropy(logits.detach(), labels),
        }
        attack = paper_attack(model, flow=Identity(), **{where: given[where]})
        before = trace_of(model)
        with pytest.raises(ValueError, match="no gradient to the images"):
            attack.step(batch)
        assert same_trace(trace_of(model), before)


class Caching(nn.Module):
    """Keeps what follows from its weights in evaluation mode, as LeViT and TinyViT do."""

    def __init__(self):
        super().__init__()
        self.inner, self.cache, self.bias = convolutional_classifier(), {"kept": None}, None
        self.seen = self.cache

    def forward(self, x):
        if self.training:
            return self.inner(x) + self.inner[6].bias
        self.cache.setdefault("bias", self.inner[6].bias.detach().clone())
        if self.bias is None:
            self.bias = self.inner[6].bias.detach().clone()
        return self.inner(x) + self.cache["bias"] + self.bias


def test_what_a_model_caches_during_an_attack_does_not_stay(batch):
    model = Caching().train()
    attack = paper_attack(model, steps=1, flow=Identity())
    attack(*batch)
    assert model.seen is model.cache
    assert (model.cache, model.bias) == ({"kept": None}, None)
    model.eval()(batch[0])
    held = model.cache["bias"], model.bias
    attack(*batch)
    assert (model.cache["bias"], model.bias) == held


def test_what_a_model_collects_during_an_attack_does_not_stay(batch):
    class Collecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = convolutional_classifier(), ["before"]
            self._built = False

        def forward(self, x):
            self.seen.append(x)
            if not self._built:
                self.factor, self._built = 2.0, True
            return self.factor * self.inner(x)

    model = Collecting()
    seen = model.seen
    paper_attack(model, steps=1, flow=Identity())(*batch)
    assert model.seen is seen
    assert seen == ["before"]
    model(batch[0])  # what a first pass sets up is there


def test_a_cache_and_what_it_is_of_stay_together(batch):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.size, self.mask, self.head = convolutional_classifier(), (), None, 4

        def forward(self, x):
            if x.shape[2:] != self.size:
                self.size, self.mask = x.shape[2:], torch.ones(x.shape[2:])
            if self.head == 4:  # its width, until it is there
                del self.head
                self.head = nn.Linear(4, 4)
            return self.head(self.inner(x * self.mask))

    model, (images, labels) = Sized(), batch
    attack = paper_attack(model, steps=1, flow=Identity())
    attack(images, labels)
    head = model.head.weight
    assert model(images).shape == (6, 4)
    attack(images[..., :8], labels)
    assert model(images).shape == (6, 4)
    assert model.head.weight is head


def test_targets_of_each_sample_follow_it(batch):
    """With p below 1: a list of targets is one a sample, a tuple of batched tensors is not."""
    seen, images = [], batch[0]

    def loss(logits, targets):
        seen.append((len(logits), targets))
        return logits.square().sum()

    attack = paper_attack(convolutional_classifier(), p=0.5, steps=1, flow=Identity(), loss=loss)
    values = images.mean((1, 2, 3))
    moved = attack(images, [{"value": value} for value in values])
    count, targets = seen.pop()
    attacked = (moved != images).flatten(1).any(1)
    assert count == len(targets) == 3
    assert sorted(t["value"].item() for t in targets) == sorted(values[attacked].tolist())
    attack(images, (values, values + 1))
    count, (first, second) = seen.pop()
    assert count == len(first) == len(second) == 3


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("mode", ["eval", "unchanged"])
def test_a_torchscript_model_is_left_as_it_was(model, batch, glow, mode):
    model = torch.jit.script(model)
    before = trace_of(model)
    out = paper_attack(model, flow=glow, model_mode=mode)(*batch)
    assert not torch.equal(out, batch[0])
    assert same_trace(trace_of(model), before)
