"""What becomes a batch, and how it comes back."""

import numpy as np
import pytest
import torch
from conftest import Identity
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from latent_aug import LatentAdversarial, LatentPerturb
from latent_aug.images import conversion as images

SMOOTH = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32).expand(40, -1, -1, -1)


@given(st.integers(0, 255))
def test_every_byte_survives_the_way_there_and_back(value):
    pixels = torch.full((1, 3, 2, 2), value, dtype=torch.uint8)
    x, restore = images.to_batch(pixels, 3)
    assert x.dtype == torch.float32
    assert torch.equal(restore(x), pixels)


def test_results_are_rounded_not_cut():
    _, restore = images.to_batch(torch.zeros(3, 1, 3, dtype=torch.uint8), 3)
    x = torch.tensor([4.6 / 255, 1.02, -0.02]).expand(1, 3, 1, 3)
    assert restore(x)[0].tolist() == [[5, 255, 0]]


@given(multiple=st.integers(1, 16), height=st.integers(1, 20), width=st.integers(1, 20))
def test_padding_repeats_the_border(multiple, height, width):
    flow = Identity()
    flow.multiple = multiple
    x = torch.rand(2, 3, height, width)
    padded = images.fit_to_flow(x, flow)
    assert padded.shape[2] % multiple == padded.shape[3] % multiple == 0
    assert padded.shape[2] - height < multiple
    assert torch.equal(padded[..., :height, :width], x)
    assert (padded[..., height:, :width] == x[..., -1:, :]).all()
    assert (padded[..., width:] == padded[..., width - 1 : width]).all()


def test_normalization_is_that_of_torchvision():
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    ours, x = images.Normalization((mean, std), 3), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(ours.apply(x), v2.functional.normalize(x, mean, std))
    torch.testing.assert_close(ours.undo(ours.apply(x)), x)
    assert torch.equal(images.Normalization(0.5 * torch.ones(2, 1), 3).apply(x), (x - 0.5) / 0.5)


@pytest.mark.parametrize("value", [-0.51, 1.51, 255.0, -2.0])
def test_one_sample_out_of_range_is_enough(value):
    x = torch.rand(4, 3, 2, 2)
    x[2, 1, 0, 0] = value
    with pytest.raises(ValueError, match=r"normalize="):
        images.check_range(x)


def test_a_nan_sample_does_not_hide_another_s_range():
    x = torch.rand(4, 3, 2, 2)
    x[0], x[1, 0, 0, 0] = float("nan"), 9
    with pytest.raises(ValueError, match="9"):
        images.check_range(x)
    images.check_range(x[[0, 2]])
    x[0] = float("inf")  # counted as a fallback later, like NaN
    images.check_range(x[[0, 2]])


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.45, 0.22), (0.13, 0.31)])
def test_erased_pixels_pass_where_images_come_normalized(mean, std):
    attack = LatentPerturb(0.0, flow=Identity(), normalize=(mean, std))
    erase = v2.RandomErasing(p=1, value="random")
    x = torch.stack([erase(images.Normalization((mean, std), 3).apply(x)) for x in SMOOTH])
    assert ((x * std + mean) < images.LOWEST_PIXEL).any()
    assert torch.isfinite(attack(x)).all()
    twice = images.Normalization((mean, std), 3).apply(x)
    with pytest.raises(ValueError, match="another one, or none"):
        attack(twice)


def transparent(kind):
    """A PIL image with transparent pixels, of the kinds that PIL knows."""
    colours = torch.randint(60, 200, (16, 16, 3), dtype=torch.uint8).numpy()
    colours[:4] = (70, 80, 90)
    alpha = torch.randint(1, 256, (16, 16), dtype=torch.uint8).numpy()
    rgba = Image.fromarray(np.dstack([colours, alpha]))
    if kind == "quantized":
        return rgba.quantize(32)
    if kind == "keyed palette":
        image = Image.fromarray(colours).quantize(8)
        image.info["transparency"] = int(np.asarray(image)[0, 0])
        return image
    if kind in ("RGB", "L", "1"):
        image = Image.fromarray(colours).convert(kind)
        image.info["transparency"] = (70, 80, 90) if kind == "RGB" else image.getpixel((0, 0))
        return image
    return rgba.convert("LA").convert(kind) if kind == "La" else rgba.convert(kind)


@pytest.mark.parametrize(
    "kind", ["RGBA", "LA", "PA", "RGBa", "La", "quantized", "keyed palette", "RGB", "L", "1"]
)
def test_transparency_is_kept(kind):
    image = transparent(kind)
    expected = np.asarray(images.convert_premultiplied(image).convert("RGBA"))[..., 3]
    assert expected.min() < 255
    out = LatentPerturb(0.3, flow=Identity())(image)
    assert out.mode == (kind if kind in ("RGBA", "LA", "RGBa", "La", "RGB", "L") else "RGBA")
    found = images.convert_premultiplied(out).convert("RGBA")
    assert np.array_equal(np.asarray(found)[..., 3], expected)
    before = images.convert_premultiplied(image).convert("RGBA")
    assert not np.array_equal(np.asarray(found), np.asarray(before))


class Scan(torch.Tensor):
    """As MONAI's MetaTensor: it knows more than its values."""


class Picture(tv_tensors.Image):
    """A user's subclass of torchvision's."""


@pytest.mark.parametrize("kind", [Scan, Picture])
def test_subclasses_keep_their_type_and_attributes(kind):
    image = (0.4 + 0.2 * torch.rand(6, 3, 16, 16)).as_subclass(kind)
    image.meta = {"subject": 7}
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    attack = LatentAdversarial(model, flow=Identity())
    for out in (LatentPerturb(flow=Identity())(image), attack.step((image, torch.arange(6)))[0]):
        assert type(out) is kind
        assert out.meta == {"subject": 7}
        assert out.meta is not image.meta


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint16, torch.bool])
def test_the_advice_for_other_dtypes_works(dtype):
    image = torch.tensor([0, 65535 if dtype == torch.uint16 else 255]).to(dtype).expand(3, 8, 2)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
    with pytest.raises(TypeError) as perturbed:
        LatentPerturb(flow=Identity())(image)
    with pytest.raises(TypeError) as attacked:
        LatentAdversarial(model, flow=Identity())(image[None], torch.zeros(1).long())
    follow = {
        "v2.ToDtype(torch.float32, scale=True)": v2.ToDtype(torch.float32, scale=True),
        "images.float() / 255": lambda images: images.float() / 255,
        "with .float()": lambda images: images.float(),
    }
    for error in (perturbed, attacked):
        (advice,) = (work for words, work in follow.items() if words in str(error.value))
        assert advice(image).unique().tolist() == [0, 1]
