"""LatentCollate and LatentLoader: the batches they give, their draws, what they hand on."""

import collections
import copy
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ByClass, Identity
from PIL import Image
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)
from torchvision import tv_tensors
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from latent_aug import (
    LatentAdversarial,
    LatentCollate,
    LatentLoader,
    LatentPerturb,
    LatentSchedule,
)
from latent_aug.transforms import loaders
from latent_aug.transforms.loaders import move_to, perturb_batch

COUNT = 12


def data():
    return TensorDataset(torch.full((COUNT, 3, 8, 8), 0.5), torch.arange(COUNT))


def perturb(eps=0.2, **options):
    return LatentPerturb(eps, flow=Identity(), **options)


def through(kind, transform, loader_options=None):
    """The same loader with its batches perturbed either way."""
    options = {"batch_size": 4, **(loader_options or {})}
    if kind == "collate":
        return DataLoader(data(), collate_fn=LatentCollate(transform), **options)
    return LatentLoader(DataLoader(data(), **options), transform)


KINDS = pytest.mark.parametrize("kind", ["collate", "loader"])


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_perturbed_and_labels_pass(kind, workers):
    batches = list(through(kind, perturb(), {"num_workers": workers}))
    assert [batch[1].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    images = torch.cat([batch[0] for batch in batches])
    assert type(images) is torch.Tensor
    assert len({float(image.sum()) for image in images}) == COUNT
    assert ((images - 0.5).flatten(1).abs().amax(1) > 0.1).all()


@KINDS
@pytest.mark.parametrize("mapping", [dict, collections.UserDict])
def test_mappings_whose_labels_come_first(kind, mapping):
    batch = mapping(labels=torch.arange(2), pixel_values=torch.full((2, 3, 8, 8), 0.5))
    if kind == "collate":
        out = LatentCollate(perturb(), collate=lambda samples: batch)([])
    else:
        (out,) = LatentLoader([batch], perturb())
    assert type(out) is mapping
    assert list(out) == ["labels", "pixel_values"]
    assert out["labels"] is batch["labels"]
    assert type(out["pixel_values"]) is torch.Tensor
    assert not torch.equal(out["pixel_values"], batch["pixel_values"])


@KINDS
def test_conditional_flows_get_their_labels(kind):
    labels = torch.tensor([0, 3])
    batch = [torch.full((2, 3, 8, 8), 0.5), labels]
    transform = LatentPerturb(0.01, flow=ByClass())
    if kind == "collate":
        out = LatentCollate(transform, collate=lambda samples: batch)([])
    else:
        (out,) = LatentLoader([batch], transform)
    moved = (out[0] - 0.5).abs().flatten(1).amax(1)
    assert torch.allclose(moved, torch.tensor([0.01, 0.08]), atol=1e-4)


def test_what_else_a_transform_does_to_the_batch_stays():
    batch = {"images": torch.rand(4, 3, 8, 8), "labels": torch.arange(4)}
    mixup = v2.MixUp(num_classes=4, labels_getter=lambda sample: sample["labels"])
    out = perturb_batch(v2.Compose([perturb(), mixup]), batch)
    assert out["labels"].shape == (4, 4)
    assert batch["labels"].shape == (4,)


def test_a_plain_tensor_and_a_tv_tensor_as_batches():
    images = torch.rand(4, 3, 8, 8)
    assert type(perturb_batch(perturb(), images)) is torch.Tensor
    out = perturb_batch(perturb(), (tv_tensors.Image(images), torch.arange(4)))
    assert type(out[0]) is tv_tensors.Image


class TestDraws:
    def images(self, loader):
        return torch.cat([batch[0] for batch in loader])

    def epoch(self, workers=0, persistent=False, **options):
        torch.manual_seed(7)
        loader = DataLoader(
            data(), 4, shuffle=True, num_workers=workers, persistent_workers=persistent
        )
        loader = LatentLoader(loader, perturb(), **options)
        return loader, self.images(loader)

    @pytest.mark.parametrize("seed", [None, 3])
    @pytest.mark.parametrize("workers", [1, 2])
    def test_do_not_depend_on_the_number_of_workers(self, workers, seed):
        assert torch.equal(self.epoch(0, seed=seed)[1], self.epoch(workers, seed=seed)[1])

    @pytest.mark.parametrize("seed", [None, 3])
    @pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, True)])
    def test_differ_between_epochs(self, workers, persistent, seed):
        loader, first = self.epoch(workers, persistent, seed=seed)
        assert not torch.equal(self.images(loader), first)

    def test_of_an_epoch_can_be_had_again(self):
        second = LatentLoader(DataLoader(data(), 4), perturb(), seed=3)
        second.set_epoch(1)
        again = LatentLoader(DataLoader(data(), 4), perturb(), seed=3)
        self.images(again)
        assert torch.equal(self.images(again), self.images(second))
        assert not torch.equal(self.images(again), self.images(second.loader))

    def test_differ_between_seeds_and_batches(self):
        images = self.epoch(seed=3)[1]
        assert not torch.equal(images, self.epoch(seed=4)[1])
        assert len({float(image.sum()) for image in images}) == COUNT

    def test_leave_the_global_generator_to_the_user(self):
        drawn = []
        for transform in (perturb(), v2.Identity()):
            torch.manual_seed(7)
            for _ in LatentLoader(DataLoader(data(), 4), transform):
                drawn.append(float(torch.rand(())))
        assert drawn[:3] == drawn[3:]

    def test_of_a_share_in_workers_differ_between_workers(self):
        """Each of two workers collates three batches: none are alike."""
        loader = DataLoader(data(), 2, num_workers=2, collate_fn=LatentCollate(perturb()))
        assert len({float(image.sum()) for image in self.images(loader)}) == COUNT


class TestLatentLoader:
    def test_hands_on_what_the_loader_has(self):
        inner = DataLoader(data(), 5, shuffle=True, drop_last=True)
        loader = LatentLoader(inner, perturb())
        assert len(loader) == 2
        assert loader.dataset is inner.dataset
        assert loader.sampler is inner.sampler
        assert loader.batch_size == 5
        assert loader.drop_last
        with pytest.raises(AttributeError, match="nothing"):
            loader.nothing  # noqa: B018

    def test_set_epoch_reaches_sampler_and_schedule(self):
        sampler = DistributedSampler(data(), num_replicas=2, rank=0)
        schedule = LatentSchedule([(3, perturb()), (1, None)])
        loader = LatentLoader(DataLoader(data(), 3, sampler=sampler), v2.Compose([schedule]))
        loader.set_epoch(3)
        assert sampler.epoch == 3
        assert schedule.current is None
        assert all((batch[0] == 0.5).all() for batch in loader)

    def test_moves_the_batch(self):
        batch = {"image": torch.rand(2, 3, 8, 8), "more": [torch.arange(2), "a"]}
        there = move_to(batch, torch.device("meta"))
        assert there["image"].is_meta
        assert there["more"][0].is_meta
        assert there["more"][1] == "a"
        assert move_to(batch, None) is batch

    @pytest.mark.parametrize("name", ["batch_size", "drop_last", "sampler", "dataset"])
    def test_settings_of_the_loader_inside_are_its_own(self, name):
        loader = LatentLoader(DataLoader(data(), 4), perturb())
        for one in (loader, copy.copy(loader)):
            with pytest.raises(ValueError, match=f"{name} attribute should not be set"):
                setattr(one, name, 2)
        assert [len(images) for images, _ in loader] == [4, 4, 4]

    def test_set_epoch_reaches_schedules_of_data_sets_inside_others(self):
        schedules = [LatentSchedule([(1, None), (1, None)]) for _ in range(3)]
        data = [FakeData(2, transform=v2.Compose([schedule])) for schedule in schedules]
        chained = ConcatDataset([Subset(data[0], [0]), data[1]])
        LatentLoader(DataLoader(chained), v2.Identity()).set_epoch(1)
        LatentLoader(DataLoader(StackDataset(image=data[2])), v2.Identity()).set_epoch(1)
        assert [schedule.epoch for schedule in schedules] == [1, 1, 1]

    def test_set_epoch_reaches_schedules_under_any_attribute_of_a_data_set(self):
        told, schedule = data(), LatentSchedule([(1, None), (1, None)])
        told.augment = v2.Compose([schedule])
        LatentLoader(DataLoader(told), v2.Identity()).set_epoch(1)
        assert schedule.epoch == 1

    def test_labels_before_images_are_named(self):
        turned = TensorDataset(*reversed(data().tensors))
        with pytest.raises(ValueError, match="put images before labels"):
            next(iter(LatentLoader(DataLoader(turned, 4), perturb())))

    def test_set_epoch_reaches_batch_sampler_data_set_and_collate(self):
        class Told(TensorDataset):
            def set_epoch(self, epoch):
                self.epoch = epoch

        told, schedule = Told(*data().tensors), LatentSchedule([(3, perturb()), (1, None)])
        sampler = DistributedSampler(told, num_replicas=2, rank=0)
        inner = DataLoader(
            told,
            batch_sampler=BatchSampler(sampler, 3, False),
            collate_fn=LatentCollate(schedule),
        )
        LatentLoader(inner, v2.Identity()).set_epoch(3)
        assert (sampler.epoch, told.epoch, schedule.epoch) == (3, 3, 3)


class TestOneAhead:
    """The order of work on a GPU, with streams that do nothing."""

    @pytest.fixture
    def run(self, monkeypatch):
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(loaders, "keep_for_stream", lambda batch, stream: batch)
        return lambda batches: LatentLoader([], perturb())._one_ahead(batches, stream)

    def test_the_next_batch_is_prepared_before_this_one_is_used(self, run):
        events = []

        def batches():
            for number in range(3):
                events.append(f"prepare {number}")
                yield number

        for number in run(batches()):
            events.append(f"use {number}")
        assert events == [
            *("prepare 0", "prepare 1", "use 0", "prepare 2", "use 1", "use 2"),
        ]

    def test_a_failure_comes_after_the_batches_before_it(self, run):
        def batches():
            yield 0
            yield 1
            raise OSError("no such image")

        ahead = run(batches())
        assert [next(ahead), next(ahead)] == [0, 1]
        with pytest.raises(OSError, match="no such image"):
            next(ahead)


class TestBadInput:
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_hooks(self, wrapped):
        hook = LatentAdversarial(nn.Identity(), flow=Identity())
        transform = LatentSchedule([(1, perturb()), (1, hook)]) if wrapped else hook
        with pytest.raises(TypeError, match="LatentLoader is for transforms: an attack needs"):
            LatentLoader(DataLoader(data()), transform)
        with pytest.raises(TypeError, match="LatentCollate is for transforms"):
            LatentCollate(transform)

    def test_a_gpu_in_a_worker(self):
        collate = LatentCollate(perturb(), device="cuda")
        loader = DataLoader(data(), 2, num_workers=1, collate_fn=collate)
        with pytest.raises(RuntimeError, match=r"wrap the loader in LatentLoader\("):
            next(iter(loader))

    @pytest.mark.parametrize(
        ("make", "error", "words"),
        [
            (lambda: LatentLoader(3, perturb()), TypeError, "loader must be iterable"),
            (lambda: LatentLoader([], 0.25), TypeError, "transform must be callable"),
            (lambda: LatentLoader([], perturb(), seed=0.5), ValueError, "seed must be an integer"),
            (
                lambda: LatentLoader([], perturb(generator=torch.Generator()), seed=1),
                ValueError,
                "two sources",
            ),
            (lambda: LatentCollate(perturb(), 3), TypeError, "collate must be callable"),
            (lambda: list(LatentLoader([3], perturb())), TypeError, "batch must be a tuple"),
            (lambda: list(LatentLoader([["a", 1]], perturb())), TypeError, "must be a tensor"),
        ],
    )
    def test_arguments(self, make, error, words):
        with pytest.raises(error, match=words):
            make()


class Ready(IterableDataset):
    """Ready batches, as WebDataset's stream them."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "make", [lambda x, y: (x, y), lambda x, y: [x, y], lambda x, y: {"image": x, "label": y}]
)
def test_ready_batches_are_perturbed_as_they_are(make, workers, count):
    x, y = torch.full((count, 3, 8, 8), 0.5), torch.arange(count)
    loader = DataLoader(
        Ready(make(x, y)),
        batch_size=None,
        num_workers=workers,
        collate_fn=LatentCollate(perturb()),
    )
    (out,) = loader
    images, labels = out.values() if isinstance(out, dict) else out
    assert images.shape == x.shape
    assert (images != x).flatten(1).any(1).all()
    assert torch.equal(labels, y)
    (again,) = LatentLoader(DataLoader(Ready(make(x, y)), batch_size=None), perturb())
    assert (next(iter(again.values())) if isinstance(again, dict) else again[0]).shape == x.shape


@pytest.mark.parametrize("count", [2, 3, 4])
def test_videos_alone_are_samples_at_every_size(count):
    out = LatentCollate(perturb())([torch.full((4, 3, 8, 8), 0.5)] * count)
    assert out.shape == (count, 4, 3, 8, 8)


class TestDetection:
    """Images of several sizes with a target each, in tuples or lists."""

    def samples(self):
        boxes = tv_tensors.BoundingBoxes(torch.ones(2, 4), format="XYXY", canvas_size=(8, 8))
        return [(torch.full((3, 8, 8 + i), 0.5), {"boxes": boxes, "label": i}) for i in range(3)]

    @KINDS
    @pytest.mark.parametrize("container", [tuple, list])
    def test_images_are_perturbed_one_by_one(self, kind, container):
        def collate(samples):
            return container(container(part) for part in zip(*samples, strict=True))

        batches = DataLoader(self.samples(), 3, collate_fn=collate)
        if kind == "collate":
            batches = DataLoader(self.samples(), 3, collate_fn=LatentCollate(perturb(), collate))
        else:
            batches = LatentLoader(batches, perturb())
        ((images, targets),) = batches
        assert type(images) is type(targets) is container
        for place, (image, target) in enumerate(zip(images, targets, strict=True)):
            assert type(image) is torch.Tensor
            assert image.shape == (3, 8, 8 + place)
            assert (image != 0.5).any()
            assert target["label"] == place
            assert torch.equal(target["boxes"], torch.ones(2, 4))

    def test_mappings_and_labels_in_a_tensor(self):
        batch = {"image": [torch.full((3, 8, 8), 0.5)] * 2, "label": torch.tensor([0, 3])}
        out = perturb_batch(LatentPerturb(0.01, flow=ByClass()), batch)
        size = [float((image - 0.5).abs().max()) for image in out["image"]]
        assert size == pytest.approx([0.01, 0.08], abs=1e-4)
        assert out["label"] is batch["label"]
        assert (batch["image"][0] == 0.5).all()

    def test_boxes_follow_a_flip(self):
        images, targets = zip(*self.samples(), strict=True)
        out = perturb_batch(
            v2.Compose([v2.RandomHorizontalFlip(1.0), perturb()]), (images, targets)
        )
        assert out[1][0]["boxes"].tolist() == [[7.0, 1.0, 7.0, 1.0]] * 2

    def test_other_images_are_named(self):
        batch = ([Image.new("RGB", (8, 8))] * 2, [{}, {}])
        with pytest.raises(TypeError, match=r"or a list of tensors, got a list with Image"):
            perturb_batch(perturb(), batch)


class TestMadeAnew:
    """Loaders that frameworks make of a LatentLoader's parts."""

    def loader(self, **options):
        loader = DataLoader(data(), 2, collate_fn=self.collate)
        return LatentLoader(loader, perturb(), **options)

    @staticmethod
    def collate(samples):
        """Of the user's own: labels above 100."""
        images, labels = default_collate(samples)
        return images, labels + 100

    def check(self, batches, count):
        batches = list(batches)
        assert len(batches) == count
        for images, labels in batches:
            assert (images != 0.5).flatten(1).any(1).all()
            assert (labels >= 100).all()

    def test_of_attributes(self):
        given = self.loader()
        assert isinstance(given, DataLoader)
        self.check(given, 6)
        sampler = BatchSampler(range(4), 2, False)
        again = DataLoader(given.dataset, batch_sampler=sampler, collate_fn=given.collate_fn)
        self.check(again, 2)

    def test_by_accelerate(self):
        accelerate = pytest.importorskip("accelerate")
        try:
            accelerator = accelerate.Accelerator(cpu=True)
            self.check(accelerate.skip_first_batches(self.loader(), 2), 4)
            self.check(accelerator.prepare_data_loader(self.loader()), 6)
            self.check(accelerator.prepare(self.loader()), 6)
            inside = LatentLoader(accelerator.prepare(self.loader().loader), perturb())
            assert accelerator.prepare(inside) is inside
            self.check(inside, 6)
            self.check(accelerate.skip_first_batches(inside, 2), 4)
        finally:
            accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    @pytest.mark.parametrize("inside_hook", [False, True])
    @pytest.mark.parametrize("batches", [False, True])
    @pytest.mark.parametrize("seed", [None, 3])
    def test_by_lightning(self, inside_hook, batches, seed):
        utilities = pytest.importorskip("lightning.pytorch.utilities.data")
        patched = pytest.importorskip("lightning.fabric.utilities.data")._replace_dunder_methods

        def make():
            if batches:
                sampler = RandomBatches(SequentialSampler(data()), 2, False)
                loader = DataLoader(data(), batch_sampler=sampler, collate_fn=self.collate)
                return LatentLoader(loader, perturb(), seed=seed)
            return self.loader(seed=seed)

        if inside_hook:
            with patched(DataLoader, "dataset"), patched(BatchSampler):
                given = make()
        else:
            given = make()
        share = DistributedSampler(data(), num_replicas=2, rank=1, shuffle=False)
        again = utilities._update_dataloader(given, share)
        assert type(again) is type(given)
        assert again.seed == seed
        self.check(again, 3)
        assert sorted(int(y) for _, labels in again for y in labels) == list(range(101, 112, 2))

    def test_without_its_seed_are_refused(self):
        accelerate = pytest.importorskip("accelerate")
        with pytest.raises(ValueError, match="with seed= cannot be built anew"):
            accelerate.skip_first_batches(self.loader(seed=3), 2)

    def test_on_a_gpu_in_workers_are_refused(self):
        given = LatentLoader(DataLoader(data(), 2, num_workers=1), perturb(), "cuda")
        again = DataLoader(given.dataset, 2, num_workers=1, collate_fn=given.collate_fn)
        with pytest.raises(RuntimeError, match=r"wrap the loader in LatentLoader\("):
            next(iter(again))

    def test_of_a_class_whose_arguments_are_not_known_are_refused(self):
        class Own(DataLoader):
            pass

        with pytest.raises(TypeError, match="only a DataLoader can be given another sampler"):
            LatentLoader(Own(data(), 2), perturb(), sampler=range(4))
        with pytest.raises(TypeError, match="unexpected keyword argument 'sed'"):
            LatentLoader(DataLoader(data(), 2), perturb(), sed=3)

    def test_what_is_no_data_loader_stays_so(self):
        assert not isinstance(LatentLoader([data()[:2]], perturb()), DataLoader)

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
    def test_copies_are_loaders_too(self, copied):
        again = copied(self.loader())
        assert isinstance(again, DataLoader)
        self.check(again, 6)

    def test_pickled(self):
        again = pickle.loads(pickle.dumps(self.loader(seed=2)))
        assert again.seed == 2
        self.check(again, 6)


class RandomBatches(BatchSampler):
    """A batch sampler of a class that frameworks do not know."""


def test_collate_takes_the_user_s():
    def collate(samples):
        images, labels = default_collate(samples)
        return {"image": images, "label": labels}

    out = LatentCollate(perturb(), collate)([data()[0], data()[1]])
    assert out["label"].tolist() == [0, 1]


def test_a_gpu_that_is_not_there_is_said():
    loader = LatentLoader(
        [torch.rand(2, 1, 28, 28)], LatentPerturb(flow="glow-fashionmnist"), "cuda"
    )
    with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
        next(iter(loader))
