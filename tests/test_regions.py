"""Masks and levels: only what they name moves, for the transform and the attack alike."""

import pytest
import torch
from conftest import Identity, length, paper_attack, random_glow
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from latent_aug import LatentPerturb, check_flow
from latent_aug.transforms import functional as LF
from latent_aug.transforms.regions import build_mask, mark_levels

NORMS = ["linf", "l2", "rms"]
EPS = {"linf": 0.3, "l2": 3.0, "rms": 0.3}


def linear(size=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 4))


class Recorder:
    """A flow's double that remembers the perturbations it decodes."""

    def __init__(self, flow, monkeypatch):
        self.latents, self.decoded = [], []
        encode, decode = flow.encode, flow.decode

        def encoded(x, y=None):
            self.latents.append(encode(x))
            return self.latents[-1]

        def recorded(z, y=None, **options):
            self.decoded.append(z.detach())
            return decode(z, **options)

        monkeypatch.setattr(flow, "encode", encoded)
        monkeypatch.setattr(flow, "decode", recorded)

    @property
    def noise(self):
        return self.decoded[-1] - self.latents[-1]


def perturb(kind, flow, images, norm, **options):
    """The two perturbations with the same arguments."""
    eps = EPS[norm]
    if kind == "random":
        return LatentPerturb(eps, norm=norm, flow=flow, **options)(images)
    attack = paper_attack(
        linear(images.shape[-1]), eps=eps, alpha=eps / 2, norm=norm, flow=flow, **options
    )
    return attack(images, torch.zeros(len(images), dtype=torch.long))


KINDS = pytest.mark.parametrize("kind", ["random", "adversarial"])


def assert_as_long_as_eps(noise, norm):
    """The radius is that of the part that moves."""
    size = length(noise, norm)
    assert (size <= EPS[norm] * 1.001).all()
    assert (size >= EPS[norm] * 0.9).all()


def left_half(size=16):
    mask = torch.zeros(size, size)
    mask[:, : size // 2] = 1
    return mask


@KINDS
@pytest.mark.parametrize("norm", NORMS)
def test_only_the_mask_moves(kind, norm):
    images = torch.rand(4, 3, 16, 16)
    out = perturb(kind, random_glow(), images, norm, mask=left_half())
    assert torch.equal(out[..., 8:], images[..., 8:])
    assert ((out - images)[..., :8].abs() > 1e-4).float().mean() > 0.9


@KINDS
@pytest.mark.parametrize("norm", NORMS)
def test_the_latent_stays_where_the_mask_is_0(kind, norm, monkeypatch):
    flow = random_glow()
    recorder = Recorder(flow, monkeypatch)
    perturb(kind, flow, torch.rand(4, 3, 16, 16), norm, mask=left_half())
    assert recorder.noise[..., 8:].abs().max() < 1e-6
    assert_as_long_as_eps(recorder.noise[..., :8], norm)


@KINDS
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("levels", "moving"), [(0, {0}), (-1, {2}), ([0, 1], {0, 1}), ([2], {2})])
def test_only_the_levels_move(kind, norm, levels, moving, monkeypatch):
    flow = random_glow(levels=3)
    recorder = Recorder(flow, monkeypatch)
    images = torch.rand(4, 3, 16, 16)
    out = perturb(kind, flow, images, norm, levels=levels)
    parts = flow.split_levels(recorder.noise)
    assert {i for i, part in enumerate(parts) if part.abs().max() > 1e-5} == moving
    assert_as_long_as_eps(torch.cat([parts[i].flatten(1) for i in moving], dim=1), norm)
    assert not torch.equal(out, images)


@KINDS
def test_mask_and_levels_together(kind, monkeypatch):
    flow = random_glow(levels=2)
    recorder = Recorder(flow, monkeypatch)
    images = torch.rand(2, 3, 16, 16)
    out = perturb(kind, flow, images, "l2", levels=1, mask=left_half())
    fine, _ = flow.split_levels(recorder.noise)
    assert fine.abs().max() < 1e-6
    assert torch.equal(out[..., 8:], images[..., 8:])


@KINDS
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_each_image_has_its_own_mask(kind, p):
    images = torch.rand(8, 3, 16, 16)
    masks = torch.stack([left_half() if i % 2 else 1 - left_half() for i in range(8)])
    out = perturb(kind, random_glow(), images, "l2", mask=masks, p=p)
    moved = (out != images).flatten(1).any(1)
    assert moved.any()
    for i in range(8):
        still = slice(8, 16) if i % 2 else slice(0, 8)
        assert torch.equal(out[i, :, :, still], images[i, :, :, still])


@KINDS
def test_sizes_that_are_padded(kind):
    images = torch.rand(2, 3, 14, 14)
    out = perturb(kind, random_glow(), images, "rms", mask=left_half(14))
    assert torch.equal(out[..., 7:], images[..., 7:])
    assert not torch.equal(out, images)


def test_the_padding_follows_the_mask_s_edge():
    mask = build_mask(random_glow(), torch.rand(1, 3, 16, 16), left_half(14)[None, None] == 0, None)
    assert torch.equal(mask[0, 0, 3], torch.tensor([0.0] * 7 + [1.0] * 9))


def test_the_model_sees_only_the_mask_move():
    images, seen = torch.rand(2, 3, 16, 16), []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, x):
            seen.append(x.detach().clone())
            return self.inner(x)

    attack = paper_attack(Spy(), flow=random_glow(), mask=left_half(), steps=2)
    attack(images, torch.tensor([0, 1]))
    assert all(torch.equal(x[..., 8:], images[..., 8:]) for x in seen)
    assert not torch.equal(seen[1], images)


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_has_its_length_within_the_mask(norm, monkeypatch):
    flow = random_glow()
    recorder = Recorder(flow, monkeypatch)
    attack = paper_attack(
        linear(),
        eps=1.9,
        alpha=0.1,
        norm=norm,
        flow=flow,
        steps=1,
        random_start=False,
        mask=left_half(),
    )
    attack(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    size = length(recorder.noise[..., :8], norm)
    torch.testing.assert_close(size, torch.full((2,), 0.1), rtol=1e-3, atol=0)


@KINDS
def test_an_empty_mask_changes_nothing(kind):
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(
        perturb(kind, random_glow(), images, "rms", mask=torch.zeros(16, 16)), images
    )


@KINDS
def test_normalized_images_stay_exactly_outside_the_mask(kind):
    images = (torch.rand(2, 3, 16, 16) - 0.4) / 0.3  # numbers that do not come back exactly
    out = perturb(
        kind, random_glow(), images, "l2", mask=left_half(), normalize=([0.4] * 3, [0.3] * 3)
    )
    assert torch.equal(out[..., 8:], images[..., 8:])
    assert not torch.equal(out, images)


@KINDS
def test_a_full_mask_and_all_levels_are_no_mask(kind):
    images, flow = torch.rand(2, 3, 16, 16), random_glow(levels=2)
    results = []
    for options in ({}, {"mask": torch.ones(16, 16)}, {"levels": [0, 1]}):
        torch.manual_seed(5)
        results.append(perturb(kind, flow, images, "rms", **options))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def background(sample):
    return 1 - sample[1]


class TestMaskOfASample:
    @pytest.mark.parametrize("image", ["pil", "uint8", "tv_tensor"])
    def test_beside_its_image(self, image):
        pixels = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
        image = {
            "pil": Image.fromarray(pixels.permute(1, 2, 0).numpy()),
            "uint8": pixels,
            "tv_tensor": tv_tensors.Image(pixels),
        }[image]
        mask = tv_tensors.Mask(left_half().to(torch.uint8)[None])
        transform = LatentPerturb(0.5, flow=random_glow(), mask=background)
        out, same = transform(image, mask)
        assert type(out) is type(image)
        assert same is mask
        before, after = (v2.functional.to_image(i) for i in (image, out))
        assert torch.equal(before[..., :8], after[..., :8])
        assert not torch.equal(before[..., 8:], after[..., 8:])

    def test_of_a_dict_and_a_video(self):
        video = tv_tensors.Video(torch.rand(4, 3, 16, 16))
        transform = LatentPerturb(0.5, flow=random_glow(), mask=lambda s: s["mask"])
        out = transform({"video": video, "mask": left_half().bool()})
        assert torch.equal(out["video"][..., 8:], video[..., 8:])
        assert not torch.equal(out["video"], video)

    def test_of_each_frame_is_refused(self):
        sample = tv_tensors.Video(torch.rand(4, 3, 16, 16)), torch.zeros(4, 16, 16)
        of_each = LatentPerturb(0.5, flow=random_glow(), mask=lambda s: s[1])
        with pytest.raises(ValueError, match=r"one \(H, W\) for all 4 frames.*amax\(0\)"):
            of_each(sample)
        of_all = LatentPerturb(0.5, flow=random_glow(), mask=lambda s: s[1].amax(0))
        assert torch.equal(of_all(sample)[0], sample[0])

    def test_of_each_clip(self):
        video = tv_tensors.Video(torch.rand(2, 4, 3, 16, 16))
        masks = torch.stack([left_half(), 1 - left_half()])
        out = LatentPerturb(0.5, flow=random_glow(), mask=masks)(video)
        assert torch.equal(out[0, ..., 8:], video[0, ..., 8:])
        assert torch.equal(out[1, ..., :8], video[1, ..., :8])
        assert (out != video).flatten(2).any(2).all()

    def test_of_an_attacked_batch(self):
        images, labels = torch.rand(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)
        masks = left_half().expand(4, 16, 16)
        attack = paper_attack(linear(), flow=random_glow(), mask=lambda batch: batch["mask"])
        out = attack.step({"image": images, "label": labels, "mask": masks})
        assert out["mask"] is masks
        assert torch.equal(out["image"][..., 8:], images[..., 8:])
        assert not torch.equal(out["image"], images)


def test_levels_partition_the_latent(any_flow):
    z = torch.rand(2, 3, 16, 16)
    assert torch.equal(any_flow.join_levels(any_flow.split_levels(z)), z)
    masks = [mark_levels(any_flow, z, (level,)) for level in range(any_flow.levels)]
    assert torch.equal(sum(masks), torch.ones(1, 3, 16, 16))
    sizes = [int(mask.sum()) for mask in masks]
    assert sizes == sorted(sizes, reverse=True)


def test_nothing_asked_for_is_no_mask():
    assert build_mask(random_glow(), torch.rand(2, 3, 8, 8), None, None) is None


@pytest.mark.parametrize("norm", NORMS)
def test_a_masked_start_is_uniform_in_its_own_dimensions(norm):
    like, mask = torch.zeros(2000, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    mask[..., :2, 0] = 1  # a disc, or a square
    start = LF.random_start(like, 1.0, norm, mask=mask)
    assert (start[(mask == 0).expand_as(start)] == 0).all()
    size = length(start[..., :2, 0], norm)
    # of a uniform point in two dimensions, the share within half the radius is a quarter
    assert (size < 0.5).float().mean() == pytest.approx(0.25, abs=0.04)
    assert (size <= 1 + 1e-6).all()


class TestBadInput:
    @KINDS
    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"mask": "background"}, TypeError, "mask must be a tensor"),
            ({"mask": torch.rand(16, 16)}, ValueError, "mask must be of zeros and ones"),
            (
                {"mask": torch.full((16, 16), 255)},
                ValueError,
                "zeros and ones, got values from 255 to 255",
            ),
            ({"mask": torch.ones(8, 8)}, ValueError, "size of its images"),
            ({"mask": torch.ones(3, 16, 16)}, ValueError, "size of its images"),
            ({"mask": torch.ones(2, 3, 16, 16)}, ValueError, r"mask must be \(H, W\)"),
            ({"mask": torch.ones(16)}, ValueError, r"mask must be \(H, W\)"),
            ({"mask": lambda sample: [1]}, TypeError, "mask must return a tensor"),
            ({"levels": 2}, ValueError, r"levels must be among 0 \(finest\) to 1 \(coarsest\)"),
            ({"levels": -3}, ValueError, "levels must be among"),
            ({"levels": []}, ValueError, "levels must be among"),
            ({"levels": "coarse"}, TypeError, "levels must be an integer"),
            ({"levels": True}, TypeError, "levels must be an integer"),
        ],
    )
    def test_of_masks_and_levels(self, kind, options, error, words):
        with pytest.raises(error, match=words):
            perturb(kind, random_glow(), torch.rand(2, 3, 16, 16), "l2", **options)


def test_a_network_as_mask_stays_out_of_the_transform():
    class Saliency(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16, 16))

        def forward(self, sample):
            return self.weight.detach()

    transform = LatentPerturb(0.3, flow=random_glow(), mask=Saliency())
    assert not torch.equal(transform(torch.full((3, 16, 16), 0.5)), torch.full((3, 16, 16), 0.5))
    assert not transform.state_dict()
    assert not list(transform.parameters())


def test_a_flow_that_miscounts_its_levels():
    class Miscounting(Identity):
        levels = 3

    with pytest.raises(ValueError, match="says it has 3 levels, but its split_levels gives 1"):
        LatentPerturb(0.3, flow=Miscounting(), levels=-1)(torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match="says it has 3 levels, but its split_levels gives 1"):
        check_flow(Miscounting(), torch.full((4, 3, 8, 8), 90, dtype=torch.uint8))
