"""LatentPerturb: manners, arguments, randomness."""

import collections
import copy
import io
import math
import pickle
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from conftest import ByClass, Identity, images_and_classes, length, random_glow
from PIL import Image
from torch.utils._pytree import tree_flatten
from torchvision import tv_tensors
from torchvision.transforms import v2

from latent_aug import Flow, LatentAdversarial, LatentPerturb, check_flow


def pil(mode, size=(16, 16)):
    """A PIL image of noise in any mode."""
    pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(pixels)
    if mode in ("LA", "RGBA"):
        alpha = Image.fromarray(pixels[..., 0])
        image = image.convert(mode)
        image.putalpha(alpha)
    return image.convert(mode)


def noise(shape, dtype):
    """A tensor of noise in any dtype."""
    x = torch.rand(shape)
    return (x * 255).byte() if dtype == torch.uint8 else x.to(dtype)


DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((3, 16, 16), (5, 3, 16, 16), (2, 2, 3, 16, 16), (3, 7, 13), (3, 1, 1), (1, 3, 32, 20))
# One line here puts a new kind of input through every test of the transform.
INPUTS = {
    **{f"{d}-{s}": (lambda d=d, s=s: noise(s, d)) for d in DTYPES for s in SHAPES},
    **{f"pil-{m}": (lambda m=m: pil(m)) for m in ("L", "LA", "RGB", "RGBA")},
    "pil-odd": lambda: pil("RGB", (19, 5)),
    "image": lambda: tv_tensors.Image(noise((3, 16, 16), torch.uint8)),
    "image-batch": lambda: tv_tensors.Image(noise((4, 3, 16, 16), torch.float32)),
    "video": lambda: tv_tensors.Video(noise((4, 3, 16, 16), torch.uint8)),
}


class Broken(torch.utils.data.Dataset):
    """Six images that no flow can perturb."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.transform(torch.full((3, 16, 16), float("nan")))


def as_array(image):
    """Values of any input, for comparison."""
    return np.asarray(image) if isinstance(image, Image.Image) else image.float().numpy()


@pytest.fixture(params=INPUTS)
def image(request):
    torch.manual_seed(1)
    return INPUTS[request.param]()


def test_output_is_of_the_input_s_kind(image, glow):
    out = LatentPerturb(0.3, flow=glow)(image)
    assert type(out) is type(image)
    if isinstance(image, Image.Image):
        assert (out.mode, out.size) == (image.mode, image.size)
    else:
        assert (out.dtype, out.shape, out.device) == (image.dtype, image.shape, image.device)
    assert not np.array_equal(as_array(out), as_array(image))


def test_input_stays_as_it_was(image, glow):
    before = copy.deepcopy(image)
    LatentPerturb(0.3, flow=glow)(image)
    assert np.array_equal(as_array(image), as_array(before))


def test_eps_0_gives_the_input_back(image, glow):
    out = LatentPerturb(0.0, flow=glow)(image)
    dtype = getattr(image, "dtype", torch.uint8)
    tolerance = {torch.uint8: 0, torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-4)
    assert np.abs(as_array(out).astype(float) - as_array(image)).max() <= tolerance


def test_p_0_gives_the_very_values_back(image, glow):
    assert np.array_equal(as_array(LatentPerturb(0.3, flow=glow, p=0)(image)), as_array(image))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_the_result_is_never_the_input_s_memory(glow, p):
    """Images made under inference_mode may be trained on afterwards."""
    with torch.inference_mode():
        x = torch.rand(4, 3, 16, 16)
    model = torch.nn.Conv2d(3, 1, 1)
    attack = LatentAdversarial(
        model, flow=glow, p=p, forward=lambda m, b: m(b[0]).mean((2, 3)).expand(-1, 2)
    )
    for out in (LatentPerturb(0.3, flow=glow, p=p)(x), attack(x)):
        assert out.data_ptr() != x.data_ptr()
        model(out).sum().backward()


def test_a_compiled_training_step_leaves_the_transforms_out_of_its_graphs(glow):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    x, y = torch.rand(4, 3, 16, 16), torch.arange(4)
    perturb, attack = LatentPerturb(0.3, flow=glow), LatentAdversarial(model, flow=glow, p=1.0)
    for augment in (perturb, lambda x: attack.step((x, y))[0], lambda x: attack(x, y)):
        graphs.clear()
        torch.compile(lambda x, augment=augment: model(augment(x)).sum(), backend=count)(x)
        assert len(graphs) < 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "I", "F", "I;16"])
def test_a_pil_mask_beside_a_pil_image_passes_through(glow, mode):
    image = pil("RGB")
    mask = Image.new("I;16", (16, 16)) if mode == "I;16" else pil("L").convert(mode)
    for given in ((image, mask), (tv_tensors.Image(torch.rand(3, 16, 16)), mask)):
        out, same = LatentPerturb(0.3, flow=glow)(*given)
        assert same is mask
        assert not np.array_equal(np.asarray(out), np.asarray(given[0]))


@pytest.mark.parametrize(
    "arrange",
    [
        lambda image, mask: (image, (7, mask)),
        lambda image, mask: (image, {"mask": mask}),
        lambda image, mask: ((image, mask), 7),
        lambda image, mask: (image, mask, mask.copy()),
        lambda image, mask: {"x": image, "mask": mask},
        lambda image, mask: {"mask": mask, "x": image},
        lambda image, mask: (image, [mask, mask.copy()]),
        lambda image, mask: (image, {"masks": [mask]}),
        lambda image, mask: {"x": [image], "masks": [mask]},
    ],
)
def test_pil_masks_pass_wherever_they_lie(glow, arrange):
    image = pil("RGB")
    for mask in (pil("L"), pil("L").convert("P")):
        given = arrange(image, mask)
        result = LatentPerturb(1.0, flow=glow)(given)
        before, after = tree_flatten(given)[0], tree_flatten(result)[0]
        for one, other in zip(before, after, strict=True):
            if one is image:
                assert other.mode == "RGB"
                assert other.tobytes() != one.tobytes()
            else:
                assert other is one


@pytest.mark.parametrize("arrange", [lambda x, *m: (x, *m), lambda x, *m: (x, {"masks": m})])
def test_pil_masks_pass_beside_a_plain_tensor(glow, arrange):
    image, mask = torch.rand(3, 16, 16), pil("L")
    first, *_ = out = LatentPerturb(0.3, flow=glow)(arrange(image, mask, mask.convert("P")))
    assert not torch.equal(first, image)
    assert tree_flatten(out)[0][1] is mask
    label = torch.tensor(3)
    assert LatentPerturb(0.3, flow=glow)((label, mask))[0] is label
    assert LatentPerturb(0.3, flow=glow)((label, mask))[1] is not mask


@pytest.mark.parametrize(
    ("sample", "images"),
    [
        (({"mask": torch.rand(3, 8, 8), "image": torch.rand(3, 8, 8)}, 7), [1]),
        ((MappingProxyType({"label": torch.tensor(3), "image": torch.rand(3, 8, 8)}), 7), [1]),
        (({"image": pil("RGB"), "depth": pil("RGB")}, 7), [0]),
        (({"mask": pil("L"), "image": pil("RGB")}, 7), [1]),
        ([{"image": torch.rand(3, 8, 8)}, {"image": torch.rand(3, 8, 8)}], [0, 1]),
        ((torch.rand(3, 8, 8), {"image": torch.rand(3, 8, 8)}), [0]),
        (({"image": torch.rand(3, 8, 8)}, {"image": "name.png"}), [0]),
    ],
)
def test_a_mapping_that_a_sample_begins_with_names_its_image(glow, sample, images):
    def list_leaves(value):
        return [
            leaf
            for part in value
            for leaf in (part.values() if isinstance(part, Mapping) else [part])
        ]

    before, after = list_leaves(sample), list_leaves(LatentPerturb(0.3, flow=glow)(sample))
    changed = [number for number, leaf in enumerate(after) if leaf is not before[number]]
    assert changed == images
    assert all(not np.array_equal(np.asarray(before[k]), np.asarray(after[k])) for k in images)


def test_a_class_beside_a_mapping_reaches_a_conditional_flow():
    transform = LatentPerturb(0.3, flow=ByClass(), generator=torch.Generator().manual_seed(0))
    image = torch.full((3, 8, 8), 0.5)
    for sample in (
        ({"image": image}, 2),
        [{"image": image, "label": 2}, {"image": image, "label": 1}],
    ):
        assert not torch.equal(transform(sample)[0]["image"], image)


def test_a_list_of_colours_and_greys_holds_images(glow):
    given = {"x": [pil("L"), pil("RGB")]}
    result = LatentPerturb(1.0, flow=glow)(given)
    for one, other in zip(result["x"], given["x"], strict=True):
        assert not np.array_equal(np.asarray(one), np.asarray(other))


def test_a_pil_mask_that_may_be_an_image_is_refused(glow, grey_glow):
    with pytest.raises(TypeError, match=r"two PIL images of mode L .* wrap a mask in"):
        LatentPerturb(0.3, flow=grey_glow)((pil("L"), pil("L")))
    with pytest.raises(TypeError, match=r"two PIL images of mode L"):
        LatentPerturb(0.3, flow=grey_glow)((pil("L"), pil("L"), pil("L")))
    two = [pil("L"), pil("L")]
    for one, other in zip(LatentPerturb(0.3, flow=grey_glow)(two), two, strict=True):
        assert not np.array_equal(np.asarray(one), np.asarray(other))
    views = pil("RGB"), pil("RGB")
    for one, other in zip(LatentPerturb(0.3, flow=glow)(views), views, strict=True):
        assert not np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("mark", [lambda x: x, tv_tensors.Image, v2.ToPILImage()])
def test_each_image_beside_a_target_has_its_own_draw(glow, mark):
    images = [mark(torch.full((3, 16, 16), 0.5)) for _ in range(3)]
    transform = LatentPerturb(0.3, flow=glow)
    out, _ = transform((images, [{}] * 3))
    assert len({np.asarray(image).tobytes() for image in out}) == 3
    with pytest.raises(ValueError, match="channels"):
        transform(([torch.rand(3, 16, 16), torch.rand(1, 16, 16)], [{}, {}]))
    rgb, depth = torch.rand(3, 16, 16), torch.rand(1, 16, 16)  # of one sample
    assert transform(([rgb, depth], 7))[0][1] is depth


@pytest.mark.parametrize("kind", [tuple, list])
def test_each_image_of_a_batch_of_detection_is_perturbed(glow, kind):
    images = kind(torch.rand(3, side, 16) for side in (16, 12, 16))
    targets = kind({"boxes": torch.rand(2, 4), "number": i} for i in range(3))
    seen = []

    def mask(sample):
        seen.append(sample[1]["number"])
        return torch.ones(sample[0].shape[1:])

    transform = LatentPerturb(0.3, flow=glow, mask=mask)
    out, same = transform((images, targets))
    assert type(out) is kind
    assert same is targets
    assert seen == [0, 1, 2]
    assert all(
        o.shape == i.shape and not torch.equal(o, i) for o, i in zip(out, images, strict=True)
    )


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_fallbacks_of_loader_workers_are_counted(context):
    transform = LatentPerturb(0.1, flow="glow-cifar10-small")
    data = Broken(transform)
    loader = torch.utils.data.DataLoader(data, 2, num_workers=2, multiprocessing_context=context)
    for count in (6, 12):
        list(loader)
        assert transform.fallbacks == count


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux lists what is open")
def test_many_transforms_keep_few_files_open(glow):
    before = len(list(Path("/proc/self/fd").iterdir()))
    transforms = [LatentPerturb(0.1, flow=glow) for _ in range(100)]
    transforms[0].fallback_counter.add(torch.tensor(1))
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 10
    assert sum(transform.fallbacks for transform in transforms) == 1


def test_params_of_another_image_are_refused(glow):
    transform = LatentPerturb(0.1, flow=glow)
    params = transform.make_params([torch.rand(3, 16, 16)])
    with pytest.raises(ValueError, match=r"params must be.*1, 3, 16, 8"):
        transform.transform(torch.rand(3, 16, 8), params)


@pytest.mark.parametrize("kind", ["random", "adversarial"])
def test_use_changes_neither_pickle_nor_hash(kind):
    fingerprint = pytest.importorskip("datasets").fingerprint
    flow = "glow-cifar10-small"
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    made = {
        "random": lambda: LatentPerturb(0.1, flow=flow, normalize=([0.5] * 3, [0.2] * 3)),
        "adversarial": lambda: LatentAdversarial(model, flow=flow, p=1.0),
    }[kind]()
    before = pickle.dumps(made), fingerprint.Hasher.hash(made)
    images = torch.full((4, 3, 16, 16), 0.5)
    images[0] = float("nan")
    made(images)
    assert made.fallbacks == 1
    assert (pickle.dumps(made), fingerprint.Hasher.hash(made)) == before


def test_same_seed_same_result(image, glow):
    transform = LatentPerturb((0.1, 0.4), flow=glow, p=0.7)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(as_array(transform(image)))
    assert np.array_equal(*results)


@pytest.mark.parametrize("norm", ["linf", "l2", "rms", None])
@pytest.mark.parametrize("away", [False, True])
def test_noise_is_what_the_norm_says(norm, away):
    eps = 0.1
    x = 0.5 + 0.01 * torch.randn(4, 3, 16, 16)
    out = LatentPerturb(eps, flow=Identity(), norm=norm, away=away)(x)
    delta = out - x
    if norm in ("l2", "rms"):
        assert length(delta, norm).tolist() == pytest.approx([eps] * 4, rel=1e-3)
    else:
        assert delta.square().mean().sqrt().item() == pytest.approx(
            eps * (0.72 if norm else 1), rel=0.2
        )
        assert (delta.abs().max() <= eps * 1.001) == (norm == "linf")
    if away:
        assert (delta * x >= 0).all()


def test_eps_range_is_drawn_per_sample():
    x = torch.full((400, 3, 4, 4), 0.5)
    out = LatentPerturb((0.1, 0.3), norm="l2", flow=Identity())(x)
    radius = length(out - x, "l2")
    assert radius.min() >= 0.0999
    assert radius.max() <= 0.3001
    assert radius.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.15)


def test_p_is_a_probability_per_sample():
    x = torch.full((500, 3, 4, 4), 0.5)
    changed = (LatentPerturb(0.1, flow=Identity(), p=0.3)(x) != x).flatten(1).any(dim=1)
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize(("norm", "measure"), [("linf", "linf"), ("l2", "l2"), (None, "linf")])
def test_clip_limits_the_change(glow, norm, measure):
    x = torch.rand(4, 3, 16, 16)
    size = length(LatentPerturb(1.9, norm=norm, flow=glow, clip=0.05)(x) - x, measure)
    assert (size <= 0.05 + 1e-5).all()
    assert (size > 0.01).all()


def test_normalized_images_are_perturbed_as_their_originals(glow):
    x = torch.rand(2, 3, 16, 16)
    normalize = v2.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.1])
    results = []
    for given in (normalize, ([0.4, 0.5, 0.6], [0.2, 0.3, 0.1])):
        torch.manual_seed(3)
        results.append(LatentPerturb(0.3, flow=glow, normalize=given)(normalize(x)))
    torch.manual_seed(3)
    expected = normalize(LatentPerturb(0.3, flow=glow)(x))
    for result in results:
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_results_lie_in_the_unit_interval(glow):
    out = LatentPerturb(1.9, flow=glow)(torch.rand(4, 3, 16, 16))
    assert out.min() >= 0
    assert out.max() <= 1


def test_palette_image_is_read_by_its_colours(glow):
    image = pil("RGB").convert("P")
    out = LatentPerturb(0.0, flow=glow)(image)
    assert out.mode == "RGB"
    assert np.array_equal(np.asarray(out), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["P", "CMYK", "PA"])
def test_the_mode_of_the_result_is_no_matter_of_chance(glow, mode):
    transform = LatentPerturb(0.1, flow=glow, p=0.5)
    assert len({transform(pil("RGBA").convert(mode)).mode for _ in range(20)}) == 1


def test_images_and_videos_of_one_shape_draw_for_themselves(glow):
    frame = torch.rand(3, 16, 16).repeat(4, 1, 1, 1)
    images, video = LatentPerturb(0.3, flow=glow)(
        (tv_tensors.Image(frame), tv_tensors.Video(frame))
    )
    assert not torch.equal(images[0], images[1])
    assert torch.equal(video[0], video[1])


def test_dtypes_of_one_shape_draw_for_themselves(glow):
    images = [tv_tensors.Image(torch.rand(8, 3, 16, 16, dtype=d)) for d in DTYPES[3:]]
    out = LatentPerturb(0.3, flow=glow, p=0.5)(images)
    assert [o.dtype for o in out] == [i.dtype for i in images]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_a_photograph_keeps_its_orientation(mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    pil("RGB").convert(mode).save(file, "PNG", exif=exif)
    image = Image.open(file)
    flow = random_glow(channels=1 if mode == "L" else 3)
    result = LatentPerturb(0.25, flow=flow)(image)
    assert result.size == image.size
    assert result.getexif() == image.getexif() == {0x0112: 6}


def test_alpha_is_kept(glow):
    image = pil("RGBA")
    out = LatentPerturb(0.5, flow=glow)(image)
    assert np.array_equal(np.asarray(out)[..., 3], np.asarray(image)[..., 3])


def test_structure_and_everything_else_pass_through(glow):
    sample = {
        "image": tv_tensors.Image(torch.rand(3, 16, 16)),
        "mask": tv_tensors.Mask(torch.ones(16, 16)),
        "boxes": tv_tensors.BoundingBoxes([[1, 2, 3, 4]], format="XYXY", canvas_size=(16, 16)),
        "label": torch.tensor(3),
        "name": "a.png",
    }
    out = LatentPerturb(0.3, flow=glow)(sample)
    assert not torch.equal(out["image"], sample["image"])
    for key in ("mask", "boxes", "label"):
        assert torch.equal(out[key], sample[key])
    assert out["name"] == "a.png"


def test_two_views_of_one_size_share_their_noise(glow):
    x = tv_tensors.Image(torch.rand(3, 16, 16))
    first, second, other = LatentPerturb(0.3, flow=glow)(
        (x, tv_tensors.Image(x.clone()), tv_tensors.Image(torch.rand(3, 12, 12)))
    )
    assert torch.equal(first, second)
    assert other.shape == (3, 12, 12)


def test_all_frames_of_a_video_share_their_noise(glow):
    frame = torch.rand(3, 16, 16)
    video = tv_tensors.Video(frame.repeat(4, 1, 1, 1))
    out = LatentPerturb(0.3, flow=glow)(video)
    torch.testing.assert_close(out[0].as_subclass(torch.Tensor), out[3].as_subclass(torch.Tensor))
    clips = LatentPerturb(0.3, flow=glow)(tv_tensors.Video(frame.repeat(2, 4, 1, 1, 1)))
    assert torch.equal(clips[:, 0], clips[:, 3])
    assert not torch.equal(clips[0, 0], clips[1, 0])
    batch = LatentPerturb(0.3, flow=glow)(frame.repeat(4, 1, 1, 1))
    assert not torch.allclose(batch[0], batch[3])


def test_params_decide_the_result(glow):
    transform, x = LatentPerturb(0.3, flow=glow), torch.rand(2, 3, 16, 16)
    params = transform.make_params([x])
    assert torch.equal(transform.transform(x, params), transform.transform(x, params))


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"eps": -0.1}, ValueError, "eps"),
            ({"eps": float("nan")}, ValueError, "eps"),
            ({"eps": float("inf")}, ValueError, "eps"),
            ({"eps": (0.3, 0.1)}, ValueError, "eps"),
            ({"eps": "0.1"}, TypeError, "eps"),
            ({"eps": True}, TypeError, "eps"),
            ({"norm": "l1"}, ValueError, "norm must be one of 'linf'"),
            ({"p": 1.1}, ValueError, r"p must lie in \[0, 1\]"),
            ({"p": float("nan")}, ValueError, "p must lie"),
            ({"clip": -1}, ValueError, "clip"),
            ({"clip": "8"}, TypeError, "clip must be a number, got '8'"),
            ({"normalize": 3}, TypeError, "normalize"),
            ({"normalize": ([0.5] * 2, [0.5] * 2)}, ValueError, "normalize"),
            ({"normalize": ([0.5] * 3, [0.0] * 3)}, ValueError, "std above 0"),
            ({"flow": 3}, TypeError, "flow"),
            ({"generator": 3}, TypeError, "generator"),
            ({"resolution": 0}, ValueError, "resolution must be an integer of at least 1"),
            ({"resolution": 32.0}, ValueError, "resolution must be an integer of at least 1"),
            ({"labels_getter": "label"}, TypeError, "labels_getter"),
        ],
    )
    def test_arguments(self, arguments, error, words):
        with pytest.raises(error, match=words):
            LatentPerturb(**{"flow": Identity(), **arguments})

    @pytest.mark.parametrize(
        ("image", "error", "words"),
        [
            (torch.rand(1, 16, 16), ValueError, "3 channels, got a tensor of 1"),
            (torch.rand(16, 16), ValueError, "put images before"),
            (torch.rand(3, 16, 16) * 255, ValueError, "normalize="),
            (torch.rand(3, 16, 16) * 4 - 2, ValueError, "before Normalize"),
            (torch.zeros(3, 16, 16, dtype=torch.int64), TypeError, "int64"),
            (Image.new("F", (16, 16)), TypeError, "mode F"),
            (Image.new("I;16", (16, 16)), TypeError, "mode I;16"),
        ],
    )
    def test_images(self, glow, image, error, words):
        transform = LatentPerturb(flow=glow)
        before = copy.deepcopy(image)
        with pytest.raises(error, match=words):
            transform(image)
        assert np.array_equal(as_array(image), as_array(before))

    def test_a_sample_without_an_image(self, glow):
        with pytest.raises(TypeError, match="ToImage"):
            LatentPerturb(flow=glow)(np.zeros((16, 16, 3), dtype=np.uint8))

    def test_labels_first_in_a_tuple(self, glow):
        with pytest.raises(ValueError, match="put images before labels"):
            LatentPerturb(flow=glow)((torch.arange(4), torch.rand(4, 3, 16, 16)))

    def test_colour_image_for_a_grey_flow(self, grey_glow):
        with pytest.raises(ValueError, match="Grayscale"):
            LatentPerturb(flow=grey_glow)(pil("RGB"))
        assert LatentPerturb(flow=grey_glow)(pil("L")).mode == "L"

    def test_size_for_a_flow_of_one_size(self):
        class Fixed(Identity):
            size = (8, 8)

        with pytest.raises(ValueError, match=r"size \(8, 8\) only"):
            LatentPerturb(flow=Fixed())(torch.rand(3, 16, 16))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_pixels_come_back_and_are_counted(self, glow, bad):
        x = torch.rand(4, 3, 16, 16)
        x[1, 2, 3, 4] = bad
        transform = LatentPerturb(0.3, flow=glow)
        out = transform(x)
        torch.testing.assert_close(out[1], x[1], equal_nan=True, rtol=0, atol=0)
        assert transform.fallbacks == 1
        for index in (0, 2, 3):
            assert out[index].isfinite().all()
            assert not torch.equal(out[index], x[index])

    @pytest.mark.parametrize("shape", [(0, 3, 16, 16), (0, 3, 0, 0), (3, 0, 16)])
    def test_empty_batch_comes_back(self, glow, shape):
        x = torch.rand(shape)
        assert LatentPerturb(flow=glow)(x).shape == shape

    def test_overshoot_of_resizing_is_clamped(self, glow):
        x = torch.rand(3, 16, 16) * 1.2 - 0.1
        out = LatentPerturb(0.0, flow=glow)(x)
        torch.testing.assert_close(out, x.clamp(0, 1), atol=1e-4, rtol=0)


class TestPrivacy:
    def test_the_flow_is_nobody_s_business(self, glow):
        pipeline = torch.nn.Sequential(LatentPerturb(flow=glow), torch.nn.Linear(2, 2))
        assert len(list(pipeline.parameters())) == 2
        assert list(pipeline.state_dict()) == ["1.weight", "1.bias"]
        pipeline.train()
        assert not glow.training

    def test_repr_names_what_matters(self, glow):
        assert "eps=3.0, norm='l2', flow='Glow'" in repr(LatentPerturb(3, norm="l2", flow=glow))
        assert "normalize=..." in repr(LatentPerturb(flow=glow, normalize=(0.5, 0.5)))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
    def test_copies_behave_the_same(self, copied):
        transform, x = LatentPerturb(0.3, flow=random_glow()), torch.rand(3, 16, 16)
        other = copied(transform)
        torch.manual_seed(2)
        expected = transform(x)
        torch.manual_seed(2)
        assert torch.equal(other(x), expected)

    def test_a_loaded_flow_is_pickled_by_name(self, tmp_path):
        random_glow().save_pretrained(tmp_path / "flow")
        transform = LatentPerturb(flow=tmp_path / "flow")
        assert len(pickle.dumps(transform)) < 5000
        assert pickle.loads(pickle.dumps(transform)).flow is transform.flow
        with torch.no_grad():
            next(transform.flow.parameters()).add_(1)
        assert len(pickle.dumps(transform)) > 5000


def test_new_flows_and_old_agree_on_the_contract(any_flow):
    assert isinstance(any_flow, Flow)
    x, y = images_and_classes(any_flow, 2, 9, 11)
    out = LatentPerturb(0.05, flow=any_flow)(*([x] if y is None else [x, y]))
    out = out if y is None else out[0]
    assert out.shape == x.shape
    assert 0 < (out - x).abs().max() <= 1


@pytest.mark.parametrize("key", ["pixel_values", "image", "images", "img"])
@pytest.mark.parametrize("mapping", [dict, collections.UserDict])
def test_a_mapping_s_named_images_are_found_behind_its_labels(glow, mapping, key):
    labels, images = torch.arange(4), torch.rand(4, 3, 16, 16)
    given = mapping({"labels": labels, key: images, "other": torch.rand(4, 3, 16, 16)})
    out = LatentPerturb(0.3, flow=glow)(given)
    assert type(out) is mapping
    assert list(out) == list(given)
    assert out["labels"] is labels
    assert out["other"] is given["other"]
    assert not torch.equal(out[key], images)
    assert given[key] is images


def test_a_mapping_that_is_no_dict_may_hold_a_pil_image(glow):
    given = collections.UserDict(image=pil("RGB"), label=3)
    out = LatentPerturb(0.3, flow=glow)(given)
    assert isinstance(out["image"], Image.Image)
    assert out["label"] == 3
    assert out["image"].tobytes() != given["image"].tobytes()


@pytest.mark.parametrize("mapping", [dict, collections.UserDict])
@pytest.mark.parametrize("mask", [pil("L"), torch.zeros(3, 16, 16), np.zeros((16, 16))])
def test_what_is_beside_a_named_image_stays(glow, mapping, mask):
    given = mapping(image=pil("RGB"), mask=mask)
    out = LatentPerturb(0.3, flow=glow)(given)
    assert out["mask"] is mask
    assert out["image"].tobytes() != given["image"].tobytes()
    with pytest.raises(TypeError, match="for NumPy arrays"):
        LatentPerturb(0.3, flow=glow)(mapping(image=np.zeros((16, 16, 3)), mask=mask))


def test_beside_a_marked_image_only_marked_ones_are_images(glow):
    image, mask = tv_tensors.Image(torch.rand(3, 16, 16)), pil("L")
    given = {"image": image, "mask": mask, "right": tv_tensors.Image(image)}
    out = LatentPerturb(0.3, flow=glow)(given)
    assert out["mask"] is mask
    assert not torch.equal(out["image"], image)
    assert torch.equal(out["right"], out["image"])


@pytest.mark.parametrize("name", ["image", "img"])
def test_a_file_s_name_is_no_image(glow, name):
    image = torch.rand(3, 16, 16)
    out = LatentPerturb(0.3, flow=glow)({name: "a/b.png", "x": tv_tensors.Image(image)})
    assert not torch.equal(out["x"], image)
    out = LatentPerturb(0.3, flow=glow)({"image": image, "img": image})
    assert out["img"] is image
    assert not torch.equal(out["image"], image)


@pytest.mark.parametrize("image", [pil("RGB"), torch.zeros(3, 16, 16, dtype=torch.uint8)])
def test_8_bit_images_cannot_be_normalized(image):
    transform = LatentPerturb(flow=Identity(), normalize=([0.5] * 3, [0.25] * 3))
    with pytest.raises(TypeError, match="images are 8-bit"):
        transform(image)


class TestWarning:
    @pytest.mark.parametrize("norm", ["linf", "rms", None])
    def test_of_a_radius_given_as_standard_deviations(self, norm):
        with pytest.warns(UserWarning, match="images dissolve"):
            LatentPerturb(10.0, norm=norm, flow=Identity())
        LatentPerturb(1.9, norm=norm, flow=Identity())
        LatentPerturb(10.0, norm="l2", flow=Identity())

    def test_of_noise_that_changes_nothing(self, glow):
        with pytest.warns(UserWarning, match="it hardly changes an image"):
            LatentPerturb(norm="l2", flow=glow)
        LatentPerturb(1.1, norm="l2", flow=glow)
        LatentPerturb(0.25, norm="l2", flow=glow, levels=-1)  # of fewer components
        LatentPerturb(0.25, norm="l2", flow=Identity())  # whose latents are its own

    @pytest.mark.parametrize("batches", [[8], [1] * 8, [5, 5]])
    def test_where_no_image_can_be_perturbed(self, batches):
        transform = LatentPerturb(0.3, flow=Identity())
        images = [torch.full((count, 3, 8, 8), float("nan")) for count in batches]
        with pytest.warns(UserWarning, match="images so far came back as they were"):
            list(map(transform, images))
        transform(images[0])  # said once
        with pytest.warns(UserWarning, match="images so far came back as they were"):
            list(map(transform.with_generator(None), images))

    def test_an_accelerator_s_tensors_stay_in_their_process(self):
        transform = LatentPerturb(0.3, flow=Identity(), normalize=([0.5] * 3, [0.25] * 3))
        transform(torch.full((7, 3, 8, 8), float("nan")))
        there = torch.device("meta")
        transform.fallback_counter.add(torch.zeros((), device=there))
        transform.normalization.apply(torch.zeros(1, 3, 8, 8, device=there))
        copied = pickle.loads(pickle.dumps(transform))
        assert copied.fallbacks == 0
        assert copied.normalization._placed == {}
        with pytest.warns(UserWarning, match="8 of 8 images so far"):
            copied(torch.full((8, 3, 8, 8), float("nan")))

    def test_only_the_batch_s_own_device_is_asked(self):
        class Elsewhere:
            def __int__(self):
                raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

        transform = LatentPerturb(0.3, flow=Identity())
        transform.fallback_counter.counts[torch.device("cuda")] = Elsewhere()
        transform(torch.rand(7, 3, 8, 8))

    def test_where_many_cannot(self):
        transform = LatentPerturb(0.3, flow=Identity())
        images = torch.rand(100, 3, 8, 8)
        images[:15] = float("nan")
        transform(images)
        with pytest.warns(UserWarning, match="30 of 200 images so far came back as they were"):
            transform(images)
        transform(images)  # said once

    @pytest.mark.parametrize("good", [0, 3])
    def test_not_where_some_can(self, good):
        transform = LatentPerturb(0.3, flow=Identity())
        images = torch.full((7, 3, 8, 8), float("nan"))
        images[good] = 0.5
        for _ in range(3):
            transform(images)
        assert transform.fallbacks == 18


@pytest.mark.parametrize("kind", ["pil", "tensor"])
def test_a_mapping_of_lists_holds_several_samples(glow, kind):
    """Hugging Face data sets call their transform with such."""
    image = Image.new("RGB", (16, 16), (128, 128, 128)) if kind == "pil" else torch.rand(3, 16, 16)
    given = {"label": [0, 1, 2], "image": [image] * 3}
    out = LatentPerturb(0.3, flow=glow)(given)
    assert out["label"] is given["label"]
    arrays = [as_array(perturbed) for perturbed in out["image"]]
    assert all(type(perturbed) is type(image) for perturbed in out["image"])
    assert len({float(array.sum()) for array in [*arrays, as_array(image)]}) == 4


def test_views_of_one_image_share_what_is_said_once():
    image, half = torch.full((3, 8, 8), 0.5), torch.zeros(8, 8)
    half[:4] = 1
    given = {"image": (image, image), "label": torch.tensor(2), "mask": half, "each": (1, 2)}
    transform = LatentPerturb(0.01, flow=ByClass(), mask=lambda sample: sample["mask"])
    out = transform(given)
    assert isinstance(out["image"], tuple)
    assert not torch.equal(*out["image"])
    for view in out["image"]:
        moved = (view - image).abs()
        assert moved[:, 4:].max() == 0
        assert moved.max() == pytest.approx(0.04, rel=0.01)  # of class 2
    assert out["each"] is given["each"]
    labelled = transform({**given, "label": np.array([0, 3])})["image"]
    assert [float((view - image).abs().max()) for view in labelled] == pytest.approx(
        [0.01, 0.08], rel=0.01
    )


class Inside(MutableMapping):
    """A mapping whose copies share its items."""

    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


def test_a_mapping_whose_copies_share_its_items_is_refused_and_left_alone():
    image = torch.rand(4, 3, 8, 8)
    given = Inside(image=image, label=torch.arange(4))
    with pytest.raises(TypeError, match="copy of a Inside shares its items with it"):
        LatentPerturb(0.3, flow=Identity())(given)
    assert given["image"] is image


def test_a_mapping_that_cannot_be_written_to_gives_a_dict():
    given = MappingProxyType({"image": torch.rand(4, 3, 8, 8), "label": torch.arange(4)})
    out = LatentPerturb(0.3, flow=Identity())(given)
    assert type(out) is dict
    assert out["label"] is given["label"]


@pytest.mark.parametrize(
    ("made", "error", "said"),
    [
        (lambda draws: None, TypeError, "must return a floating-point tensor, got NoneType"),
        (lambda draws: draws.long(), TypeError, "got torch.int64"),
        (lambda draws: draws[:, :, 1:], ValueError, r"shape \(2, 3, 8, 8\).*got \(2, 3, 7, 8\)"),
        (lambda draws: draws / 0, ValueError, "not finite"),
    ],
)
def test_noise_of_one_s_own_that_is_none_is_named(made, error, said):
    class Own(LatentPerturb):
        def noise(self, draws, eps, mask):
            return made(draws)

    with pytest.raises(error, match=rf"Own\.noise.*{said}"):
        Own(flow=Identity())(torch.rand(2, 3, 8, 8))


def test_clip_is_of_images_in_unit_range():
    with pytest.raises(ValueError, match=r"clip must be at most 1.*8 / 255"):
        LatentPerturb(flow=Identity(), clip=8)
    LatentPerturb(5.0, flow=Identity(), clip=8, norm="l2")


@pytest.mark.parametrize(
    ("latents", "error", "said"),
    [
        (lambda x: x.flatten(1), ValueError, r"images' shape \(2, 3, 8, 8\), got \(2, 192\)"),
        (lambda x: (x, 0), TypeError, "return a tensor, got tuple"),
    ],
)
def test_latents_of_another_shape_are_named(latents, error, said):
    class Flat(Identity):
        def encode(self, x, y=None):
            return latents(x)

    x = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    with pytest.raises(error, match=rf"Flat\.encode .*{said}"):
        LatentPerturb(flow=Flat())(x)
    with pytest.raises(error, match=said):
        check_flow(Flat(), x)


def test_noise_of_one_s_own_broadcasts():
    class Shift(LatentPerturb):
        def noise(self, draws, eps, mask):
            return eps * draws[:, :, :1, :1]

    x = torch.full((2, 3, 8, 8), 0.5)
    change = (Shift(0.01, flow=Identity())(x) - x).flatten(2)
    assert change.std(dim=2).max() < 1e-6
    assert change[..., 0].unique().numel() == 6


class Watched(Identity):
    """Remembers the sizes that it was given."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def encode(self, x, y=None):
        self.sizes.append(tuple(x.shape[-2:]))
        return x


@pytest.mark.parametrize(
    ("size", "small"), [((40, 60), (16, 24)), ((33, 16), (33, 16)), ((20, 20), (16, 16))]
)
def test_resolution_perturbs_a_downscaled_copy(size, small):
    flow, x = Watched(), torch.rand(2, 3, *size)
    perturb = LatentPerturb(0.1, flow=flow, resolution=16)
    result = perturb(x)
    assert result.shape == x.shape
    assert set(flow.sizes) == {small}
    assert (result - x).abs().amax() > 0.01
    if size == small:
        torch.manual_seed(5)
        expected = LatentPerturb(0.1, flow=flow)(x)
        torch.manual_seed(5)
        assert torch.equal(perturb(x), expected)


def test_resolution_adds_the_upsampled_difference():
    class Brighter(Identity):
        def decode(self, z, y=None):
            return z + torch.tensor([0.1, 0.0, -0.1])[:, None, None]

    x = 0.3 + 0.4 * torch.rand(1, 3, 64, 48)
    result = LatentPerturb(0.0, flow=Brighter(), resolution=8)(x)
    expected = x + torch.tensor([0.1, 0.0, -0.1])[:, None, None]
    torch.testing.assert_close(result, expected)  # fine detail of x stays


def test_resolution_with_eps_0_gives_8_bit_photographs_back(glow):
    photo = tv_tensors.Image(torch.randint(256, (3, 50, 71), dtype=torch.uint8))
    smooth = v2.functional.gaussian_blur(photo, [9, 9])
    assert torch.equal(LatentPerturb(0.0, flow=glow, resolution=16)(smooth), smooth)


def test_resolution_with_a_mask_and_a_limit(glow):
    x = 0.25 + 0.5 * torch.rand(2, 3, 48, 64)
    mask = torch.zeros(48, 64)
    mask[10:30, 5:50] = 1
    result = LatentPerturb(1.0, flow=glow, resolution=16, mask=mask, clip=0.05)(x)
    assert torch.equal(result[..., mask == 0], x[..., mask == 0])
    change = (result - x)[..., mask == 1].abs()
    assert 0.01 < change.max() <= 0.05 + 1e-6
    assert "resolution=16" in repr(LatentPerturb(flow=glow, resolution=16))


def test_eps_and_p_may_be_changed(glow):
    image = torch.rand(3, 16, 16)
    transform = LatentPerturb(0.0, flow=glow)
    transform.eps = 0.5
    assert not torch.equal(transform(image), image)
    transform.p = 0.0
    assert torch.equal(transform(image), image)
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        transform.eps = -1
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
        transform.p = 2
    assert (transform.eps, transform.p) == ((0.5, 0.5), 0.0)


def test_with_eps_gives_a_copy(glow):
    original = LatentPerturb((0.1, 0.2), flow=glow, p=0.5)
    changed = original.with_eps(2.0)
    assert (changed.eps, changed.p) == ((2.0, 2.0), 1.0)
    assert (original.eps, original.p) == ((0.1, 0.2), 0.5)
    changed(torch.full((1, 3, 16, 16), float("nan")))
    assert (changed.fallbacks, original.fallbacks) == (1, 0)


@pytest.mark.parametrize("resolution", [None, 4])
def test_what_is_decoded_to_infinity_falls_back(resolution):
    class Unbounded(Identity):
        def decode(self, z, y=None):
            return torch.where(z > 1, math.inf, z)

    transform = LatentPerturb(0.3, flow=Unbounded(), resolution=resolution)
    x = torch.stack([torch.full((3, 8, 8), 0.3), torch.full((3, 8, 8), 0.95)])
    out = transform(x)
    assert transform.fallbacks == 1
    assert torch.equal(out[1], x[1])
    assert not torch.equal(out[0], x[0])


def test_a_module_that_holds_it_can_be_moved():
    perturb = LatentPerturb(0.2, flow=Identity())
    model = torch.nn.Sequential(perturb, torch.nn.Flatten(), torch.nn.Linear(192, 2))
    moved = model.to(torch.float64)
    assert moved[2].weight.dtype == torch.float64
    assert moved(torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)).shape == (2, 2)
