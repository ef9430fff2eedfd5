"""LatentCache: what it keeps, what it gives, and that it goes on where it was stopped."""

import json

import pytest
import torch
from conftest import ByClass, Identity, random_glow
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2

from latent_aug import LatentCache, LatentPerturb
from latent_aug.transforms import cache


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 4)


def samples(count=10, size=(3, 8, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, *size), dtype=torch.uint8, generator=generator)
    return [(image, index) for index, image in enumerate(images)]


def test_eps_0_gives_the_data_set_back(tmp_path):
    data = samples()
    cached = LatentCache(data, tmp_path, LatentPerturb(0.0, flow=random_glow()))
    assert len(cached) == 10
    for (image, label), (given, index) in zip(cached, data, strict=True):
        assert torch.equal(image, given)
        assert label == index


def test_its_directory_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached = LatentCache(samples(), "cache", LatentPerturb(0.0, flow=random_glow()))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(cached[0][0], samples()[0][0])
    assert cached.__getitems__([]) == []


def test_it_is_the_transform_on_the_same_images(tmp_path):
    transform = LatentPerturb(0.3, flow=random_glow(), clip=0.2, away=True)
    data = samples()
    batch = torch.stack([image for image, _ in data])
    torch.manual_seed(3)
    expected = transform(batch / 255)
    cached = LatentCache(data, tmp_path, transform)
    torch.manual_seed(3)
    out = torch.stack([image for image, _ in cached.__getitems__(range(10))])
    assert (out - 255 * expected).abs().max() < 0.51


def test_latents_of_downscaled_photographs(tmp_path):
    transform = LatentPerturb(0.3, flow=random_glow(), resolution=8)
    data = samples(size=(3, 24, 30))
    cached = LatentCache(data, tmp_path, transform)
    assert cached._read(0)["latents"].shape == (3, 8, 12)  # 8 x 10, padded
    torch.manual_seed(3)
    expected = transform(torch.stack([image for image, _ in data]) / 255)
    torch.manual_seed(3)
    out = torch.stack([image for image, _ in cached.__getitems__(range(10))])
    assert (out - 255 * expected).abs().max() < 0.51
    with pytest.raises(ValueError, match=r"a cache with other settings .resolution 8, now 16"):
        LatentCache(data, tmp_path, LatentPerturb(0.3, flow=random_glow(), resolution=16))


def test_epochs_differ(tmp_path):
    cached = LatentCache(samples(), tmp_path, LatentPerturb(0.3, flow=random_glow()))
    assert not torch.equal(cached[0][0], cached[0][0])
    assert cached[-1][1] == 9


def test_samples_that_are_mappings(tmp_path):
    data = [{"image": image, "label": label} for image, label in samples()]
    image, label = LatentCache(data, tmp_path, LatentPerturb(0.0, flow=random_glow()))[3]
    assert torch.equal(image, samples()[3][0])
    assert label == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_loader_with_what_comes_after(tmp_path, workers):
    then = v2.Compose([v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])
    cached = LatentCache(samples(), tmp_path, LatentPerturb(0.3, flow=random_glow()), then=then)
    batches = list(DataLoader(cached, 4, num_workers=workers))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert batches[0][0].dtype == torch.float32
    assert batches[0][0].max() <= 1


def test_pil_images_without_labels(tmp_path):
    data = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image, _ in samples()]
    cached = LatentCache(data, tmp_path, LatentPerturb(0.0, flow=random_glow()))
    assert torch.equal(cached[3], samples()[3][0])


def test_sizes_that_are_padded_and_masks(tmp_path):
    mask = torch.zeros(7, 9)
    mask[:, :4] = 1
    transform = LatentPerturb(0.5, flow=random_glow(), mask=mask)
    data = samples(size=(3, 7, 9))
    cached = LatentCache(data, tmp_path, transform)
    image, given = cached[0][0], data[0][0]
    assert torch.equal(image[..., 4:], given[..., 4:])
    assert not torch.equal(image, given)


def test_a_mask_that_is_worked_out_sees_uint8_images_and_labels(tmp_path):
    seen = []

    def bright(sample):
        seen.append(sample)
        return (sample[0] > 128).any(dim=-3)

    data = samples()
    cached = LatentCache(data, tmp_path, LatentPerturb(0.5, flow=random_glow(), mask=bright))
    image, given = cached[3][0], data[3][0]
    (images, labels) = seen[0]
    assert torch.equal(images[0], given)
    assert labels.tolist() == [3]
    dark = ~(given > 128).any(dim=0)
    assert torch.equal(image[:, dark], given[:, dark])
    assert not torch.equal(image, given)


def test_a_conditional_flow(tmp_path):
    data = [(torch.full((3, 8, 8), 127, dtype=torch.uint8), label) for label in range(4)]
    cached = LatentCache(data, tmp_path, LatentPerturb(0.01, flow=ByClass()))
    moved = [float((image.float() - 127).abs().max()) for image, _ in cached]
    assert moved == pytest.approx([2.55, 5.1, 10.2, 20.4], abs=1)


def test_p_leaves_some_as_they_are(tmp_path):
    data = samples(40)
    cached = LatentCache(data, tmp_path, LatentPerturb(0.5, flow=random_glow(), p=0.5))
    images = [image for image, _ in cached.__getitems__(range(40))]
    changed = [not torch.equal(a, b) for a, (b, _) in zip(images, data, strict=True)]
    assert 8 < sum(changed) < 32


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_only_what_was_to_be_perturbed_can_fall_back(tmp_path, p, recwarn):
    transform = LatentPerturb(0.1, flow=Scaled(100.0), p=p)  # its latents are far off the prior
    cached = LatentCache(samples(40), tmp_path, transform)
    cached.__getitems__(range(40))
    assert transform.fallbacks == 0 if p == 0 else 8 < transform.fallbacks < 32
    assert bool(recwarn) == (p > 0)  # that none could be perturbed


class Counting(list):
    """A data set that counts how often it is read."""

    reads = 0

    def __getitem__(self, index):
        Counting.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("how", ["missing", "cut off"])
def test_it_encodes_once_and_goes_on_where_it_stopped(tmp_path, how):
    transform = LatentPerturb(0.0, flow=random_glow())
    LatentCache(samples(), tmp_path, transform)
    shard = tmp_path / "000000004.safetensors"
    if how == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    Counting.reads = 0
    again = LatentCache(Counting(samples()), tmp_path, transform)
    assert Counting.reads == 10 + 4  # to recognize the data set, and the missing file
    assert torch.equal(again[5][0], samples()[5][0])


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "flow", "words"),
        [
            (samples(9), random_glow(), "count 10, now 9, another images"),
            (
                [(image, 9) for image, _ in samples()],
                random_glow(),
                "other settings .another labels",
            ),
            (samples(seed=1), random_glow(), "other settings .another images"),
            (samples(), random_glow(seed=1), "other settings .another flow"),
        ],
    )
    def test_of_another_cache(self, tmp_path, data, flow, words):
        LatentCache(samples(), tmp_path, LatentPerturb(flow=random_glow()))
        before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
        with pytest.raises(ValueError, match=words):
            LatentCache(data, tmp_path, LatentPerturb(flow=flow))
        assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before
        assert json.loads((tmp_path / "index.json").read_text())["count"] == 10

    @pytest.mark.parametrize(
        ("data", "error", "words"),
        [
            ([(torch.rand(3, 8, 8), 0)], TypeError, "uint8 or PIL images, got torch.float32"),
            ([], ValueError, "length above 0"),
            ([*samples(1), *samples(1, (3, 9, 9))], ValueError, "images of one size"),
            ([(torch.zeros(1, 8, 8).byte(), 0)], ValueError, "3 channels"),
            ([("a.png", 0)], TypeError, "a PIL image or a tensor, got str"),
            ([(torch.zeros(3, 8, 8).byte(), "cat")], TypeError, "labels"),
            ([(torch.zeros(3, 8, 8).byte(), (3, 0.5))], TypeError, "labels"),
            ([(torch.zeros(3, 8, 8).byte(), label) for label in (1, None)], ValueError, "labels"),
            (
                [(i, tv_tensors.Mask(i[0])) for i, _ in samples()],
                TypeError,
                "plain tensors, got a Mask",
            ),
            # In the second shard:
            ([*samples(4), *(image for image, _ in samples(2))], ValueError, "there for all"),
            ([*samples(4), *((i, float(k)) for i, k in samples(2))], ValueError, "of one type"),
            ([*samples(4), *samples(1, (3, 9, 9))], ValueError, "of one size"),
        ],
    )
    def test_of_data(self, tmp_path, data, error, words):
        with pytest.raises(error, match=words):
            LatentCache(data, tmp_path, LatentPerturb(flow=Identity()))

    def test_of_a_directory_that_is_no_cache(self, tmp_path):
        LatentCache(samples(), tmp_path, LatentPerturb(flow=Identity()))
        (tmp_path / "index.json").write_text("")
        with pytest.raises(ValueError, match=r"index.json cannot be read as JSON"):
            LatentCache(samples(), tmp_path, LatentPerturb(flow=Identity()))
        (tmp_path / "index.json").write_text("[]")
        with pytest.raises(ValueError, match=r"index.json does not hold the settings of a cache"):
            LatentCache(samples(), tmp_path, LatentPerturb(flow=Identity()))
        (tmp_path / "index.json").unlink()
        with pytest.raises(ValueError, match=r"no index\.json: it is not a cache"):
            LatentCache(samples(), tmp_path, LatentPerturb(flow=Identity()))

    def test_of_transforms(self, tmp_path):
        with pytest.raises(TypeError, match="must be a LatentPerturb"):
            LatentCache(samples(), tmp_path, v2.Identity())
        with pytest.raises(ValueError, match="normalize="):
            LatentCache(
                samples(), tmp_path, LatentPerturb(flow=Identity(), normalize=([0.5], [0.5]))
            )


class Scaled(Identity):
    """A flow with a setting that is no weight."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def encode(self, x, y=None):
        return x * self.k

    def decode(self, z, y=None):
        return z / self.k


def test_torch_s_defaults_and_a_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data, perturb = samples(), LatentPerturb(0.0, flow=random_glow())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            cached = LatentCache(data, "~/latents", perturb)
            image, label = cached[3]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(image, data[3][0])
    assert label == 3
    assert (tmp_path / "latents").is_dir()
    assert cached._read(0)["latents"].dtype == torch.float32


def test_a_random_data_set_is_refused(tmp_path):
    class Random:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.randint(256, (3, 8, 8), dtype=torch.uint8), index

    with pytest.raises(ValueError, match="leave random transforms out"):
        LatentCache(Random(), tmp_path, LatentPerturb(flow=Identity()))
    assert not any(tmp_path.iterdir())


def test_what_failed_before_anything_was_encoded_can_be_corrected(tmp_path):
    mixed = [*samples(3), *samples(1, size=(3, 8, 12))]
    with pytest.raises(ValueError, match="images of one size"):
        LatentCache(mixed, tmp_path, LatentPerturb(flow=Identity()))
    assert len(LatentCache(samples(3), tmp_path, LatentPerturb(flow=Identity()))) == 3
    with pytest.raises(ValueError, match=r"other settings .count 3, now 4"):
        LatentCache(samples(4), tmp_path, LatentPerturb(flow=Identity()))


def test_transforms_of_images_alone_cannot_follow_where_there_are_labels(tmp_path):
    perturb, then = LatentPerturb(0.0, flow=Identity()), transforms.Compose([])
    with pytest.raises(TypeError, match=r"as v2\.Compose does"):
        LatentCache(samples(), tmp_path, perturb, then=then)
    images = [image for image, _ in samples()]
    assert torch.equal(LatentCache(images, tmp_path, perturb, then=then)[1], images[1])


def test_a_flow_of_another_setting_is_another_flow(tmp_path):
    LatentCache(samples(), tmp_path, LatentPerturb(flow=Scaled(1.0)))
    LatentCache(samples(), tmp_path, LatentPerturb(flow=Scaled(1.0)))
    with pytest.raises(ValueError, match=r"other settings .another flow"):
        LatentCache(samples(), tmp_path, LatentPerturb(flow=Scaled(2.0)))


@pytest.mark.parametrize(("argument", "value"), [("batch_size", 0), ("then", 3)])
def test_arguments_are_checked_at_the_start(argument, value, tmp_path):
    with pytest.raises((ValueError, TypeError), match=argument):
        LatentCache(samples(), tmp_path, LatentPerturb(flow=Identity()), **{argument: value})
