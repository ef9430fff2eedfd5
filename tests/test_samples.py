"""Structures of samples and batches: the same decision for every batch size and every type."""

import collections
import typing

import numpy as np
import pytest
import torch
from conftest import Identity
from PIL import Image
from torch import nn
from torchvision import tv_tensors

from latent_aug import LatentAdversarial, LatentPerturb
from latent_aug.images.samples import (
    find_image_key,
    flatten_structure,
    get_image_key,
    select_entry,
    select_rows,
)

SIZES = (6, 4, 3, 2)


class Pair(typing.NamedTuple):
    """A structure of two."""

    first: typing.Any
    second: typing.Any


class Sample(dict):
    """A dict of a user's own type."""


class Row(list):
    """A list of a user's own type."""


def numbers(count):
    return torch.arange(count)


# Structures that belong to the whole batch, whatever its size: each as a function of the size.
STRUCTURES = {
    "mixup": lambda n: (numbers(n), numbers(n).flip(0), 0.3),
    "mixup as a list": lambda n: [numbers(n), numbers(n), 0.3],
    "a share for each": lambda n: (numbers(n), numbers(n), torch.rand(n)),
    "a share as a tensor": lambda n: (numbers(n), numbers(n), torch.tensor(0.3)),
    "two targets": lambda n: (numbers(n), numbers(n)),
    "two soft targets": lambda n: (torch.rand(n, 4), torch.rand(n, 4)),
    "arrays": lambda n: (numbers(n).numpy(), numbers(n).numpy(), 0.3),
    "a pair and a share": lambda n: ((numbers(n), numbers(n)), 0.3),
    "a name and a share": lambda n: ("cutmix", 0.3, numbers(n)),
    "a named pair": lambda n: Pair(numbers(n), 0.5),
    "a mapping of three": lambda n: {"a": numbers(n), "b": numbers(n), "share": 0.3},
    "a mapping in a tuple": lambda n: ({"a": numbers(n)}, numbers(n), 0.3),
}
# Sequences with an entry for each sample.
EACH = {
    "names": lambda n: [f"{i}.png" for i in range(n)],
    "numbers": lambda n: list(range(n)),
    "a tuple of numbers": lambda n: tuple(range(n)),
    "scalars": lambda n: list(numbers(n)),
    "boxes": lambda n: tuple(torch.full((7, 4), float(i)) for i in range(n)),
    "targets": lambda n: [{"boxes": torch.rand(n, 4), "label": i} for i in range(n)],
    "images": lambda n: [Image.new("L", (2, 2), i) for i in range(n)],
    "missing ones": lambda n: [None, *range(1, n)],
}


def leaves(structure):
    """The tensors and arrays in a structure."""
    return [leaf for leaf in flatten_structure(structure)[0] if hasattr(leaf, "shape")]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_keep_their_form_at_every_size(name, count):
    value, chosen = STRUCTURES[name](count), torch.tensor([count - 1])
    found = select_entry(value, chosen, count)
    assert type(found) is type(value)
    assert len(found) == len(value)
    for before, after in zip(leaves(value), leaves(found), strict=True):
        expected = before[chosen.numpy()] if getattr(before, "ndim", 0) else before
        assert np.array_equal(after, expected)
    batch = select_rows((torch.rand(count, 3), value), chosen, count)
    assert len(batch[0]) == 1
    assert len(batch[1]) == len(value)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", EACH)
def test_entries_of_samples_are_selected_at_every_size(name, count):
    value = EACH[name](count)
    for place in range(count):
        found = select_entry(value, torch.tensor([place]), count)
        assert type(found) is type(value)
        assert len(found) == 1
        assert found[0] is value[place]


@pytest.mark.parametrize("count", SIZES)
def test_a_batch_of_as_many_parts_as_samples_is_no_list_of_samples(count):
    batch = tuple(torch.rand(count, 2) for _ in range(3))
    found = select_rows(batch, torch.tensor([0]), count)
    assert [part.shape for part in found] == [(1, 2)] * 3


@pytest.mark.parametrize("name", ["mixup", "two targets", "a mapping of three"])
@pytest.mark.parametrize("count", SIZES)
def test_an_attack_of_a_share_takes_targets_of_any_form(name, count):
    def loss(logits, targets):
        parts = list(targets.values()) if isinstance(targets, dict) else targets
        return sum(
            nn.functional.cross_entropy(logits, part, reduction="none")
            for part in parts
            if isinstance(part, torch.Tensor)
        )

    attack = LatentAdversarial(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 8)),
        flow=Identity(),
        steps=1,
        p=0.5,
        loss=loss,
        labels_getter=lambda batch: batch[1],
    )
    images, targets = attack.step((torch.rand(count, 3, 8, 8), STRUCTURES[name](count)))
    assert images.shape == (count, 3, 8, 8)
    assert len(targets) == len(STRUCTURES[name](count))


def grey(kind):
    """A grey image."""
    image = torch.full((3, 8, 8), 0.5)
    kinds = {"tv": tv_tensors.Image(image), "pil": Image.new("RGB", (8, 8), "grey")}
    return kinds.get(kind, image)


MAPPINGS = [dict, Sample, collections.OrderedDict, collections.UserDict]


@pytest.mark.parametrize("kind", ["tensor", "tv", "pil"])
@pytest.mark.parametrize("key", ["image", "picture"])
@pytest.mark.parametrize(
    "mapping",
    [dict, Sample, collections.OrderedDict, collections.UserDict],
    ids=lambda m: m.__name__,
)
def test_a_sample_of_any_mapping_is_perturbed(mapping, key, kind):
    image = grey(kind)
    given = mapping({key: image, "label": 3})
    out = LatentPerturb(0.3, flow=Identity())(given)
    assert type(out) is mapping
    assert list(out) == [key, "label"]
    assert out["label"] == 3
    assert type(out[key]) is type(image)
    assert not np.array_equal(np.asarray(image), np.asarray(out[key]))
    assert given[key] is image


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: (s, 3),
        lambda s: [s],
        lambda s: {"inner": s},
        lambda s: Row([s, 3]),
        lambda s: Pair(s, 3),
        lambda s: Sample(inner=Row([s])),
    ],
)
def test_a_sample_inside_other_structures_is_perturbed(wrap):
    given = wrap(Sample(picture=grey("tv"), label=3))
    out = LatentPerturb(0.3, flow=Identity())(given)
    assert type(out) is type(given)
    (image, *rest), (before, *same) = flatten_structure(out)[0], flatten_structure(given)[0]
    assert not torch.equal(image, before)
    assert rest == same


class TestTwoImageKeys:
    LISTS = ("image", [Image.new("RGB", (8, 8))] * 2), ("pixel_values", [torch.rand(3, 8, 8)] * 2)

    @pytest.mark.parametrize("mapping", [dict, Sample, collections.UserDict])
    @pytest.mark.parametrize(
        "pairs",
        [
            LISTS,
            LISTS[::-1],
            (("image", Image.new("RGB", (8, 8))), ("pixel_values", torch.rand(3, 8, 8))),
            (("images", torch.rand(2, 3, 8, 8)), ("pixel_values", torch.rand(2, 3, 8, 8))),
            (("image", tv_tensors.Image(torch.rand(3, 8, 8))), ("images", torch.rand(3, 8, 8))),
        ],
    )
    def test_are_refused(self, mapping, pairs):
        sample = mapping([*pairs, ("labels", [0, 1])])
        names = sorted(name for name, _ in pairs)
        for use in (LatentPerturb(0.3, flow=Identity()), find_image_key, get_image_key):
            with pytest.raises(ValueError, match="got values under") as refused:
                use(sample)
            assert all(name in str(refused.value) for name in names)

    def test_of_marked_images_are_both_perturbed(self):
        sample = {"image": grey("tv"), "images": grey("tv")}
        out = LatentPerturb(0.3, flow=Identity())(sample)
        assert torch.equal(out["image"], out["images"])
        assert not torch.equal(out["image"], sample["image"])

    def test_one_of_which_is_a_file_s_name_are_one(self):
        assert find_image_key({"image": "a.png", "pixel_values": torch.rand(3, 8, 8)}) == (
            "pixel_values"
        )
