"""The loss on unlabelled images: textbook virtual adversarial training, its options, its traces."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    ByClass,
    Identity,
    convolutional_classifier,
    in_processes,
    random_glow,
    same_trace,
    trace_of,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

from latent_aug import LatentAdversarial, LatentPerturb
from latent_aug.transforms import functional as LF
from latent_aug.transforms.consistency import make_targets, measure_change
from latent_aug.transforms.lending import keep_statistics

IMAGES = 0.4 + 0.2 * torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def hook(model, **options):
    """An attack on every image in pixels, but for the options."""
    generator = torch.Generator().manual_seed(4)
    usual = {"eps": 1.0, "p": 1.0, "flow": Identity(), "generator": generator}
    return LatentAdversarial(model, **usual | options)


def textbook_vat(model, x, *, eps, steps):
    """Virtual adversarial training, Miyato et al. 2018, from a random point of the ball."""
    clean = model(x).softmax(1).detach()
    delta = LF.random_start(x, eps, "l2", generator=torch.Generator().manual_seed(4))
    for _ in range(steps):
        delta = delta.detach().requires_grad_(True)
        F.kl_div(model(x + delta).log_softmax(1), clean, reduction="sum").backward()
        delta = delta.detach() + eps / (1 if steps == 1 else 2) * LF.unit(delta.grad)
        delta = LF.unit(delta) * LF.l2_norm(delta).clamp(max=eps)
    model.zero_grad()
    return F.kl_div(model(x + delta).log_softmax(1), clean, reduction="batchmean")


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def scaled_up(model):
    """The same with predictions that are not all alike."""
    with torch.no_grad():
        model[-1].weight *= 20
    return model


def undropped():
    model = scaled_up(convolutional_classifier()).train()
    model[3].p = 0.0  # its draws would differ between one process and two
    return model


@pytest.mark.parametrize("steps", [1, 3])
def test_with_the_identity_flow_it_is_textbook_vat(model, steps):
    scaled_up(model).eval()
    expected = textbook_vat(model, IMAGES, eps=1.0, steps=steps)
    loss = hook(model, steps=steps).consistency(IMAGES)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-5)


def test_the_attack_raises_it_more_than_chance(model, glow):
    scaled_up(model).eval()
    attack = hook(model, flow=glow, eps=3.0)
    noise = LatentPerturb(3.0, norm="l2", flow=glow)
    assert attack.consistency(IMAGES) > 3 * attack.consistency(IMAGES, perturb=noise) > 0


def test_small_divergences_keep_their_digits(model):
    """In float32 both logarithms of a confident prediction would be 0."""
    with torch.no_grad():
        model[-1].bias += torch.tensor([60.0, 0.0, 0.0, 0.0])
    model.eval()
    loss = hook(model).consistency(IMAGES)
    assert 0 < loss < 1e-20
    assert hook(model, eps=0.0, alpha=0.0).consistency(IMAGES) == 0


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"entropy": 0.3}])
def test_classes_may_be_ruled_out(model, options):
    """As by a head that hides the classes of other tasks: the last class plays no part."""
    scaled_up(model).eval()

    def three(model, batch):
        return model(batch[0])[:, :3]

    def ruled_out(model, batch):
        return model(batch[0]).masked_fill(torch.tensor([False, False, False, True]), -torch.inf)

    expected, found = (
        hook(model, forward=forward).consistency(IMAGES, **options)
        for forward in (three, ruled_out)
    )
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(model, found), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_class_that_is_ruled_out_against_the_targets_costs_without_end():
    targets, counted = torch.tensor([[0.5, 0.5]]), torch.tensor([True])
    assert measure_change(torch.tensor([[0.0, -torch.inf]]), targets, counted) == torch.inf


@pytest.mark.parametrize("options", [{}, {"threshold": 0.26}])
def test_an_image_that_is_not_finite_shows_in_the_loss(model, options):
    model.eval()
    images = IMAGES.clone()
    images[0] = torch.inf
    assert hook(model).consistency(images, **options, perturb=lambda x: x).isnan()


class TestBatches:
    @pytest.mark.parametrize(
        "batch",
        [
            (IMAGES, torch.arange(6)),
            [IMAGES],
            (IMAGES, None, "more"),
            {"image": IMAGES, "label": None},
            {"pixel_values": IMAGES},
        ],
    )
    def test_of_any_form_give_the_same(self, model, batch):
        model.eval()
        assert torch.equal(hook(model).consistency(batch), hook(model).consistency(IMAGES))

    def test_normalized(self, model):
        normalize = v2.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
        plain = nn.Sequential(normalize, model).eval()
        ours = hook(model.eval(), normalize=normalize).consistency(normalize(IMAGES))
        torch.testing.assert_close(ours, hook(plain).consistency(IMAGES), rtol=1e-3, atol=1e-7)

    def test_through_forward(self, model):
        model.eval()
        seen = []

        def forward(model, batch):
            seen.append((batch["name"], len(batch["image"])))
            return model(batch["image"])

        names = list("abcdef")
        loss = hook(model, forward=forward, p=0.5).consistency({"image": IMAGES, "name": names})
        assert torch.equal(loss, hook(model, p=0.5).consistency(IMAGES))
        (first, _), (attacked, count), (last, _) = seen
        assert first == last == names
        assert len(attacked) == count == 3

    def test_p_mask_and_resolution_are_the_attack_s(self, model):
        model.eval()
        seen = []
        model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        mask = torch.zeros(16, 16)
        mask[:8] = 1
        hook(model, p=0.5, mask=mask).consistency(IMAGES)
        changed = (seen[-1] != IMAGES).any(1)
        assert changed.flatten(1).any(1).sum() == 3
        assert not changed[:, 8:].any()
        seen.clear()
        hook(model, resolution=8).consistency(IMAGES)
        change = seen[-1] - IMAGES
        assert change.abs().max() > 0
        assert (change[..., 1::2, :] - change[..., ::2, :]).abs().max() < change.abs().max()

    def test_a_prediction_for_each_pixel(self):
        model = nn.Conv2d(3, 4, 3, padding=1)
        loss = hook(model).consistency(IMAGES, threshold=0.2, temperature=0.5)
        assert loss.shape == ()
        assert loss > 0


class TestOptions:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.1, 0.0, 0.0]])

    def test_threshold_is_on_the_prediction_as_it_is(self):
        _, counted = make_targets(self.logits, threshold=0.5, temperature=0.01)
        assert counted.tolist() == [True, False]

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_temperature_divides_the_logits(self, temperature):
        targets, _ = make_targets(self.logits, temperature=temperature)
        expected = (self.logits.double() / temperature).softmax(1)
        torch.testing.assert_close(targets, expected)

    def test_temperature_zero_is_the_likeliest_class(self):
        targets, _ = make_targets(self.logits, temperature=0.0)
        assert targets.tolist() == [[1, 0, 0]] * 2
        loss = measure_change(self.logits, targets, torch.tensor([True, True]))
        torch.testing.assert_close(loss, F.cross_entropy(self.logits, torch.tensor([0, 0])))

    def test_what_does_not_count_is_averaged_over(self):
        targets, _ = make_targets(-self.logits)
        one, both = (
            measure_change(self.logits, targets, torch.tensor([True, second]), entropy=2.0)
            for second in (False, True)
        )
        first = measure_change(self.logits[:1], targets[:1], torch.tensor([True]), entropy=2.0)
        torch.testing.assert_close(one, first / 2)
        assert both > one

    def test_entropy_is_of_the_perturbed_image(self, model):
        scaled_up(model).eval()
        black = {"perturb": torch.zeros_like}
        found = hook(model).consistency(IMAGES, entropy=0.5, **black)
        entropy = torch.distributions.Categorical(logits=model(0 * IMAGES)).entropy().mean()
        expected = hook(model).consistency(IMAGES, **black) + 0.5 * entropy
        torch.testing.assert_close(found, expected)

    def test_fixmatch_in_five_lines(self, model):
        scaled_up(model).eval()
        probabilities = model(IMAGES).softmax(1)
        confidence, classes = probabilities.max(1)
        least = float(confidence.detach().median())
        each = F.cross_entropy(model(IMAGES.flip(3)), classes, reduction="none")
        expected = (each * (confidence >= least)).mean()
        assert 0 < expected < each.mean()
        found = hook(model).consistency(
            IMAGES,
            augment=lambda images: images.flip(3),
            perturb=lambda images: images,
            threshold=least - 1e-6,
            temperature=0,
        )
        torch.testing.assert_close(found, expected)

    def test_the_augmented_image_is_attacked(self, model):
        seen = []
        model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        hook(model, eps=0.01).consistency(IMAGES, augment=lambda images: images.flip(3))
        clean, attacked, last = seen
        assert torch.equal(clean, IMAGES)
        for images in (attacked, last):
            assert 0 < (images - IMAGES.flip(3)).abs().max() < 0.02

    @pytest.mark.parametrize(("p", "share"), [(1.0, 1.0), (0.5, 0.5), (None, 1.0)])
    def test_only_what_counts_is_attacked(self, model, p, share):
        scaled_up(model).eval()
        seen = []
        confidence = model(IMAGES).softmax(1).amax(1).detach()
        order = confidence.argsort()
        model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        for least, counted in ((order[2], 4), (order[5], 1), (None, 0)):
            threshold = 1.0 if least is None else float(confidence[least]) - 1e-6
            seen.clear()
            loss = hook(model, p=p).consistency(IMAGES, threshold=threshold)
            changed = (seen[-1] != IMAGES).flatten(1).any(1)
            assert set(changed.nonzero()[:, 0].tolist()) <= set(order[6 - counted :].tolist())
            if counted != 1:
                assert changed.sum() == share * counted
            assert (loss > 0) == (changed.sum() > 0)
            asked = [max(2, changed.sum())] * bool(changed.any())  # one does not come alone
            assert [len(images) for images in seen[1:-1]] == asked

    def test_statistics(self, model):
        for update in (True, False):
            before = trace_of(model.train())
            last = before["state"]["1.running_mean"].clone()
            hook(model).consistency(IMAGES, update_statistics=update).backward()
            model.zero_grad()
            assert torch.equal(last, model[1].running_mean) is not update
            assert same_trace(trace_of(model), before) is not update
            assert model[1].track_running_stats

    def test_a_model_that_writes_to_its_input(self, model):
        class Shifting(nn.Module):
            def forward(self, x):
                return model(x.sub_(0.5))

        model.eval()
        before = IMAGES.clone()
        loss = hook(Shifting()).consistency(IMAGES, perturb=lambda images: images)
        assert loss.abs() < 1e-12
        assert torch.equal(IMAGES, before)

    def test_statistics_of_modules_beside_the_model(self):
        body, head = nn.Flatten(), nn.BatchNorm1d(IMAGES[0].numel())
        attack = LatentAdversarial(
            body, flow=Identity(), p=1.0, forward=lambda model, batch: head(model(batch[0]))
        )
        for update in (False, True):
            attack.consistency(IMAGES, update_statistics=update)
            assert head.num_batches_tracked == update

    def test_statistics_of_the_batch_normalize_either_way(self, model):
        model[3].p = 0.0
        losses = [
            hook(model.train()).consistency(IMAGES, update_statistics=update)
            for update in (False, True)
        ]
        assert torch.equal(*losses)

    def test_statistics_are_put_back_after_an_exception(self, model):
        def fail(module, inputs):
            raise RuntimeError("out of luck")

        buffers = dict(model[1]._buffers)
        model[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="luck"), keep_statistics(model.train().modules()):
            model(IMAGES)
        assert all(model[1]._buffers[name] is buffer for name, buffer in buffers.items())
        assert model[1].num_batches_tracked == 0

    def test_activations_may_be_computed_again(self, model):
        class Net(nn.Module):
            """Computes its body again in the backward pass."""

            def __init__(self):
                super().__init__()
                self.body, self.head = model[:3], model[3:]

            def forward(self, images):
                return self.head(checkpoint(self.body, images, use_reentrant=False))

        for update in (True, False):
            hook(Net().train()).consistency(IMAGES, update_statistics=update).backward()
            assert model[0].weight.grad.abs().sum() > 0


class TestPasses:
    """How often the model is asked, and in which mode."""

    @pytest.mark.parametrize(("mode", "first"), [("eval", False), ("unchanged", True)])
    def test_of_consistency(self, model, mode, first):
        seen = []
        model.register_forward_pre_hook(
            lambda module, args: seen.append((module[1].training, args[0].requires_grad))
        )
        hook(model.train(), steps=3, model_mode=mode).consistency(IMAGES)
        assert seen == [(first, False), *[(first, True)] * 3, (True, False)]
        seen.clear()
        hook(model.train()).consistency(IMAGES, perturb=torch.zeros_like)
        assert seen == [(False, False), (True, False)]

    def test_of_an_attack_at_its_predictions(self, model):
        seen = []
        model.register_forward_pre_hook(lambda module, args: seen.append(1))
        hook(model, steps=3)(IMAGES)
        assert len(seen) == 3


class TestTrace:
    @pytest.mark.parametrize("mode", ["eval", "unchanged"])
    def test_a_training_step_is_an_ordinary_one(self, mode):
        """Buffers are as after a pass of the attacked images alone."""
        states, seen = [], []
        for ours in (True, False):
            model = undropped()
            if ours:
                recorded = model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
                loss = hook(model, model_mode=mode).consistency(IMAGES)
                recorded.remove()
            else:
                loss = model(seen[-1].detach()).sum()
            loss.backward()
            states.append(dict(model.state_dict()))
            assert all(p.grad is not None for p in model.parameters())
        torch.testing.assert_close(*states)

    def test_of_an_exception(self, model):
        before = trace_of(model.train())
        for options in ({"perturb": lambda images: 1 / 0}, {"augment": lambda images: 1 / 0}):
            with pytest.raises(ZeroDivisionError):
                hook(model).consistency(IMAGES, **options)
        assert same_trace(trace_of(model), before)

    def test_both_losses_in_one_backward_pass(self, batch):
        images, labels = batch
        found = []
        for together in (True, False):
            model = undropped()
            loss = F.cross_entropy(model(images), labels)
            if together:
                (loss + hook(model).consistency(IMAGES)).backward()
            else:
                loss.backward()
                hook(model).consistency(IMAGES).backward()
            found.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*found)

    def test_under_autocast_weights_get_their_gradients(self, model):
        scaled_up(model)
        model[3].p = 0.0
        found = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = hook(model).consistency(IMAGES, perturb=lambda images: images / 2)
            assert loss.dtype == torch.float32
            found.append(torch.cat([g.flatten() for g in gradients(model, loss)]))
        assert F.cosine_similarity(*found, dim=0) > 0.98

    def test_inside_no_grad_it_is_a_number(self, model):
        with torch.no_grad():
            loss = hook(model.eval()).consistency(IMAGES)
        assert not loss.requires_grad
        assert torch.equal(loss, hook(model).consistency(IMAGES))

    def test_draws_are_the_generator_s(self, model):
        model.eval()
        state = torch.get_rng_state()
        first, second = (hook(model).consistency(IMAGES) for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(torch.get_rng_state(), state)


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "options", "error", "words"),
        [
            ({"random_start": False}, {}, ValueError, "random_start=True.*no gradient"),
            ({"loss": F.cross_entropy}, {}, ValueError, "without loss="),
            ({"flow": ByClass()}, {}, ValueError, "ByClass of 4"),
            ({}, {"threshold": 1.5}, ValueError, "threshold must lie in"),
            ({}, {"temperature": -1}, ValueError, "temperature must be finite and at least 0"),
            ({}, {"entropy": "all"}, TypeError, "entropy must be a number"),
            ({}, {"perturb": 0.25}, TypeError, "perturb must be callable"),
            ({}, {"augment": lambda x: [x]}, TypeError, "augment must give a tensor"),
            ({}, {"perturb": lambda x: (255 * x).byte()}, TypeError, "perturb must give floats"),
            ({}, {"augment": lambda x: x[:2]}, ValueError, r"augment must give .*\(6, 3, 16, 16\)"),
        ],
    )
    def test_settings(self, model, settings, options, error, words):
        before = trace_of(model)
        with pytest.raises(error, match=words):
            hook(model, **settings).consistency(IMAGES, **options)
        assert same_trace(trace_of(model), before)

    def test_the_centre_and_classes_do_not_matter_to_another_perturbation(self, model):
        for settings in ({"random_start": False}, {"flow": ByClass()}):
            assert hook(model, **settings).consistency(IMAGES, perturb=torch.zeros_like) > 0

    @pytest.mark.parametrize("classes", [1, None])
    def test_a_single_logit(self, classes):
        layers = [nn.Flatten(), nn.Linear(768, 1)]
        model = nn.Sequential(*layers) if classes else nn.Sequential(*layers, nn.Flatten(0))
        with pytest.raises(ValueError, match=r"at least 2 classes .*\(0, z\)"):
            hook(model).consistency(IMAGES)

    @pytest.mark.parametrize(
        ("batch", "error", "words"),
        [
            (IMAGES[:, :1], ValueError, "3 channels"),
            (IMAGES[0], ValueError, r"\(B, C, H, W\)"),
            ((255 * IMAGES).byte(), TypeError, "uint8"),
            ({"x": IMAGES}, ValueError, "pixel_values"),
            (9 * IMAGES, ValueError, "normalize="),
        ],
    )
    def test_batches(self, model, batch, error, words):
        with pytest.raises(error, match=words):
            hook(model).consistency(batch)

    @pytest.mark.parametrize("threshold", [0.0, 0.95])
    @pytest.mark.parametrize("perturb", [None, lambda images: images])
    def test_no_images_have_no_loss(self, model, perturb, threshold):
        loss = hook(model).consistency(IMAGES[:0], perturb=perturb, threshold=threshold)
        assert loss == 0
        loss.backward()

    def test_a_divergence_as_loss_of_predicted_classes_names_it(self, model):
        loss = nn.KLDivLoss(reduction="batchmean")
        attack = hook(model, loss=loss, labels="predicted")
        with pytest.raises(ValueError, match=r"labels='predicted' .*consistency\(images\)"):
            attack(IMAGES)


STEPS = 2


def train(rank, model, wrapped):
    """Training steps with both losses: the images of the last pass of each, and weights."""
    generator = torch.Generator().manual_seed(100 + rank)
    attack = hook(wrapped, flow=random_glow(), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        drawn = torch.Generator().manual_seed(10 * rank + step)
        labelled, unlabelled = torch.rand(2, 4, 3, 16, 16, generator=drawn)
        optimizer.zero_grad()
        loss = F.cross_entropy(wrapped(labelled), torch.arange(4))
        yield loss + attack.consistency(unlabelled)
        optimizer.step()


def train_together():
    model = undropped()
    options = {"find_unused_parameters": False, "broadcast_buffers": False}
    wrapped = nn.parallel.DistributedDataParallel(model, **options)
    for loss in train(dist.get_rank(), model, wrapped):
        loss.backward()
    return model.state_dict()


def test_two_processes_train_as_one(tmp_path):
    models = [undropped() for _ in range(2)]
    runs = [train(rank, model, model) for rank, model in enumerate(models)]
    for losses in zip(*runs, strict=True):
        sum(losses).backward()
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            mean = sum(p.grad for p in parameters) / 2
            for parameter in parameters:
                parameter.grad.copy_(mean)
    for weights, model in zip(in_processes(train_together, tmp_path), models, strict=True):
        torch.testing.assert_close(weights, dict(model.state_dict()), atol=1e-5, rtol=1e-3)
