"""Latents: what becomes of noise in them, for the transform and the attack alike."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Identity, images_and_classes, paper_attack, random_glow
from PIL import Image
from torch import nn

from latent_aug import LatentPerturb
from latent_aug.images import conversion
from latent_aug.transforms import asking, random
from latent_aug.transforms import functional as LF

NORMALIZE = ([0.4] * 3, [0.3] * 3)


def linear(*size):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size[0] * size[1], 4))


def test_decoding_is_the_paper_s_formula(any_flow):
    x, y = images_and_classes(any_flow, 2)
    noise = 0.05 * torch.randn_like(x)
    latents = LatentPerturb(flow=any_flow).encode(x, y=y)
    expected = LF.perturb_latent(any_flow, x, noise, y=y).clamp(0, 1)
    torch.testing.assert_close(latents.decode_with(noise), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (16, 24)])
@pytest.mark.parametrize("resolution", [None, 8])
@pytest.mark.parametrize(
    "options", [{}, {"clip": 0.02}, {"normalize": NORMALIZE}, {"mask": True, "clip": 0.05}]
)
def test_noise_does_the_same_to_pixels_in_both_transforms(size, resolution, options):
    """The attack's last perturbation, as noise of the random transform, gives its very images."""
    flow, labels, decoded = random_glow(), torch.tensor([0, 1, 2]), []
    if "mask" in options:
        options = {**options, "mask": (torch.rand(3, *size) > 0.5).float()}
    images = 0.1 + 0.8 * torch.rand(3, 3, *size)
    if "normalize" in options:
        images = conversion.Normalization(NORMALIZE, 3).apply(images)
    options = {"norm": "l2", "flow": flow, "resolution": resolution, **options}
    attack = paper_attack(linear(*size), eps=3.0, alpha=1.5, **options)
    decode = flow.decode
    flow.decode = lambda z, y=None: decoded.append(z.detach()) or decode(z, y)
    attacked = attack(images, labels)

    class Same(LatentPerturb):
        def noise(self, draws, eps, mask):
            return decoded[-1] - self.encode(images).z

    moved = Same(3.0, **options)(images)
    torch.testing.assert_close(moved, attacked, rtol=0, atol=2e-6)
    assert (attacked - images).abs().max() > 1e-4


@pytest.mark.parametrize("clip", [None, 0.1])
def test_an_attack_by_a_copy_is_textbook_pgd_on_the_copy(clip):
    x, y, model = 0.3 + 0.4 * torch.rand(2, 3, 16, 24), torch.tensor([0, 1]), linear(16, 24)
    small = F.interpolate(x, (8, 12), mode="bilinear", antialias=True)

    def images_at(delta):
        change = F.interpolate(delta, (16, 24), mode="bicubic")
        if clip is not None:
            length = change.flatten(1).norm(dim=1)[:, None, None, None]
            change = change * (clip / length).clamp(max=1)
        return x + change

    generator = torch.Generator().manual_seed(4)
    delta = LF.random_start(small, 0.5, "l2", generator=generator)
    for _ in range(3):
        delta.requires_grad_(True)
        loss = F.cross_entropy(model(images_at(delta)), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, delta)
        delta = LF.ascent_step(delta.detach(), grad, 0.2, 0.5, "l2")
    options = {"flow": Identity(), "resolution": 8, "clip": clip}
    generator = torch.Generator().manual_seed(4)
    attack = paper_attack(model, eps=0.5, alpha=0.2, generator=generator, **options)
    torch.testing.assert_close(attack(x, y), images_at(delta), rtol=0, atol=1e-5)


def test_an_attack_by_a_copy_raises_the_loss():
    images, labels, flow = torch.rand(4, 3, 16, 16), torch.arange(4), random_glow()
    model = nn.Sequential(nn.AvgPool2d(2), linear(8, 8))
    options = {"eps": 3.0, "flow": flow, "resolution": 8}
    attacked = paper_attack(model, alpha=1.0, **options)(images, labels)
    by_chance = LatentPerturb(norm="l2", **options)(images)
    losses = [F.cross_entropy(model(x), labels, reduction="none") for x in (attacked, by_chance)]
    assert (losses[0] > losses[1]).all()


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_an_attack_by_a_copy_keeps_what_it_should(p):
    """The mask's outside, the batch's type and layout, and its other rows."""
    images = torch.rand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    mask, seen = (torch.rand(4, 16, 16) > 0.5).float(), []

    def forward(model, batch):
        seen.append(len(batch["images"]) == len(batch["ids"]) == round(4 * p))
        return model(batch["images"])

    attack = paper_attack(
        linear(16, 16), flow=random_glow(), resolution=8, mask=mask, p=p, forward=forward, eps=3.0
    )
    batch = {"images": images, "labels": torch.arange(4), "ids": list("abcd")}
    out = attack.step(batch)
    still = (mask == 0)[:, None].expand_as(images)
    assert torch.equal(out["images"][still], images[still])
    assert (out["images"] != images).flatten(1).any(1).sum() == round(4 * p)
    assert out["images"].is_contiguous(memory_format=torch.channels_last)
    assert seen == [True] * 3
    assert "resolution=8" in repr(attack)


@pytest.mark.parametrize("kind", ["random", "adversarial"])
def test_the_mask_of_the_copy_s_latent_is_that_of_the_image(kind, monkeypatch):
    flow, decoded, mask = Identity(), [], torch.zeros(32, 48)
    mask[20:, 25:] = 1  # of the copy the pixels from row 10 and column 12 on
    monkeypatch.setattr(flow, "decode", lambda z, y=None: decoded.append(z.detach()) or z)
    images, options = torch.rand(2, 3, 32, 48), {"flow": flow, "mask": mask, "resolution": 16}
    if kind == "random":
        LatentPerturb(0.3, **options)(images)
    else:
        paper_attack(linear(32, 48), **options)(images, torch.tensor([0, 1]))
    moved = decoded[-1] - conversion.downscale(images, 16)
    assert (moved[..., 10:, 12:] != 0).all()
    moved[..., 10:, 12:] = 0
    assert (moved == 0).all()


def test_images_no_larger_than_the_resolution_are_attacked_as_they_are(batch):
    results = []
    for resolution in (None, 16, 100):
        torch.manual_seed(3)
        attack = paper_attack(linear(16, 16), flow=random_glow(), resolution=resolution)
        results.append(attack(*batch))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("resolution", [0, 32.0, -1, True])
def test_a_resolution_that_is_no_positive_integer(resolution):
    with pytest.raises(ValueError, match="resolution must be an integer of at least 1"):
        paper_attack(linear(8, 8), flow=Identity(), resolution=resolution)


def test_a_slight_radius_depends_on_the_resolution(glow):
    with pytest.warns(UserWarning, match="it hardly changes an image"):
        LatentPerturb(1.5, norm="l2", flow=glow, resolution=64)
    LatentPerturb(2.5, norm="l2", flow=glow, resolution=64)
    LatentPerturb(0.75, norm="l2", flow=glow, resolution=16)


def test_only_what_is_counted_falls_back_in_the_count(glow):
    x = torch.rand(4, 3, 16, 16)
    x[1:3, 0, 0, 0] = float("nan")
    transform = LatentPerturb(flow=glow)
    latents = transform.encode(x)
    out = latents.perturb(
        0.1 * torch.randn_like(x), counted=torch.tensor([True, True, False, True])
    )
    torch.testing.assert_close(out[1:3], x[1:3], equal_nan=True, rtol=0, atol=0)
    assert not torch.equal(out[[0, 3]], x[[0, 3]])
    assert transform.fallbacks == 1
    assert latents.decode_with(torch.zeros_like(x))[1].isnan().any()
    assert transform.fallbacks == 1


def test_known_latents_are_not_encoded_again(glow, monkeypatch):
    x, transform = torch.rand(2, 3, 40, 40), LatentPerturb(0.2, flow=glow, resolution=16)
    z = transform.to_latents(x)
    torch.manual_seed(1)
    expected = transform(x)
    monkeypatch.setattr(type(glow), "encode", None)
    torch.manual_seed(1)
    torch.testing.assert_close(transform.from_latents(z, x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_are_of_the_images_dtype_and_layout(glow, dtype, layout):
    images = torch.rand(2, 3, 13, 18).to(dtype).contiguous(memory_format=layout)
    latents = LatentPerturb(flow=glow).encode(images)
    assert latents.x.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    out = latents.perturb(torch.randn_like(latents.z))
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)


def test_an_image_is_converted_once(glow, monkeypatch):
    calls = []

    def counted(image, mode):
        calls.append(mode)
        return convert(image, mode)

    convert = conversion.pil_to_uint8
    monkeypatch.setattr(conversion, "pil_to_uint8", counted)
    transform, image = LatentPerturb(flow=glow), Image.new("RGB", (16, 16), (90, 120, 150))
    assert transform(image).tobytes() != image.tobytes()
    assert calls == ["RGB"]
    transform.make_params([image])
    assert calls == ["RGB"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 3, 5, 7), (2, 4, 3, 5, 7), (0, 3, 5, 7)])
def test_a_stand_in_is_like_the_batch(dtype, shape):
    image = torch.zeros(shape, dtype=dtype)
    like, (x, _) = conversion.make_stand_in(image, 3), conversion.to_batch(image, 3)
    assert (like.shape, like.dtype, like.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_a_stand_in_of_a_pil_image(mode):
    image = Image.new(mode, (7, 5))
    for channels in (3, 1) if mode == "L" else (3,):
        like, (x, _) = (f(image, channels) for f in (conversion.make_stand_in, conversion.to_batch))
        assert (like.shape, like.dtype) == (x.shape, x.dtype)


def test_one_draw_serves_other_images_of_its_kind(glow):
    transform = LatentPerturb(0.2, flow=glow)
    x, other = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    params = transform.make_params([x])
    noise = params["draws"][random.find_kind(x, x)].noise
    expected = transform.encode(other).perturb(noise)
    assert torch.equal(transform.transform(other, params), expected)


@pytest.mark.parametrize("forward", [None, lambda model, batch: model(batch[0])])
def test_a_batch_is_packed_for_forward_only(batch, monkeypatch, forward):
    packed, replace_images = [], asking.replace_images
    monkeypatch.setattr(asking, "replace_images", lambda *a: packed.append(1) or replace_images(*a))
    attack = paper_attack(linear(16, 16), flow=Identity(), steps=4, forward=forward)
    attack.step(batch)
    assert len(packed) == (0 if forward is None else 4)
