"""Copies of a data set on disk: what is in them, shard by shard, by any number of workers."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings

import pytest
import torch
import torch.nn.functional as F
import webdataset
from conftest import ByClass, Identity, random_dense, random_glow
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from typer.testing import CliRunner

from latent_aug import AugmentConfig, LatentPerturb, augment_images
from latent_aug.cli import app
from latent_aug.export.shards import name_folder
from latent_aug.images.datasets import to_uint8
from latent_aug.images.folders import EncodedImages

CLASSES = ("bird", "cat", "dog")


@pytest.fixture
def data(tmp_path):
    """An ImageFolder of 10 images in three classes, of two sizes."""
    generator = torch.Generator().manual_seed(1)
    for number in range(10):
        folder = tmp_path / "data" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = torch.rand(1, 3, 3, 3, generator=generator)
        size = (16, 16) if number < 8 else (12, 20)
        image = F.interpolate(coarse, size=size, mode="bilinear")[0]
        to_pil_image((60 + 140 * image).byte()).save(folder / f"{number}.png")
    return tmp_path / "data"


def augment(data, output, *, eps=0.25, flow=None, **changes):
    settings = {"output": output, "copies": 2, "shard_size": 8, "batch_size": 4, **changes}
    transform = LatentPerturb(eps, flow=flow or random_glow())
    dataset = data if isinstance(data, list) else EncodedImages(data)
    return augment_images(dataset, transform, AugmentConfig(**settings), progress=False)


def read(output, suffix="png"):
    """What WebDataset reads: image and label by key."""
    shards = sorted(str(path) for path in output.glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the collector
        samples = webdataset.WebDataset(shards, shardshuffle=False).decode("pilrgb")
        found = list(samples.to_tuple("__key__", suffix, "cls"))
        del samples
        gc.collect()
    return {key: (image, label) for key, image, label in found}


def contents(output):
    """Bytes of every file, by name."""
    files = (path for path in output.rglob("*") if path.is_file())
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def as_worker(monkeypatch, rank, count):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))


def test_ranks_are_counted_from_0(data, tmp_path, monkeypatch):
    as_worker(monkeypatch, 3, 3)
    with pytest.raises(ValueError, match="RANK must lie in 0 to WORLD_SIZE - 1, which is 2, got 3"):
        augment(data, tmp_path / "out")


def test_other_labels_are_other_images(tmp_path):
    images = [Image.new("RGB", (16, 16), (60 + 20 * i, 100, 100)) for i in range(8)]
    augment([(image, 0) for image in images], tmp_path / "out")
    with pytest.raises(ValueError, match="another data"):
        augment([(image, 1) for image in images], tmp_path / "out")


def test_an_image_beside_the_classes_takes_all_labels(data, tmp_path):
    shutil.copy(data / "cat" / "1.png", data / "preview.png")
    with pytest.warns(UserWarning, match=r"no labels: preview\.png beside the folders of the cl"):
        augment(data, tmp_path / "out")


def test_shards_hold_every_copy_with_its_label(data, tmp_path):
    report = augment(data, tmp_path / "out")
    assert (report.written, report.found, report.images) == (3, 0, 20)
    samples, dataset = read(tmp_path / "out"), EncodedImages(data)
    assert sorted(samples) == [f"{i:08}-{copy}" for i in range(10) for copy in (1, 2)]
    for index in range(10):
        first, second = (pil_to_tensor(samples[f"{index:08}-{copy}"][0]) for copy in (1, 2))
        original = to_uint8(dataset[index], 3)
        assert first.shape == original.shape
        for a, b in ((first, second), (first, original), (second, original)):
            assert not torch.equal(a, b)
        assert samples[f"{index:08}-1"][1] == samples[f"{index:08}-2"][1] == dataset.labels[index]
    assert (tmp_path / "out" / "classes.txt").read_text().split() == list(CLASSES)
    settings = json.loads((tmp_path / "out" / "augment.json").read_text())
    assert (settings["shards"], settings["images"], settings["seed"]) == (3, 10, 0)


def test_copies_without_noise_are_the_images(data, tmp_path):
    augment(data, tmp_path / "out", eps=0.0, originals=True, copies=1)
    samples, dataset = read(tmp_path / "out"), EncodedImages(data)
    for index in range(10):
        for copy in (0, 1):
            image = pil_to_tensor(samples[f"{index:08}-{copy}"][0])
            assert torch.equal(image, to_uint8(dataset[index], 3))


def test_each_copy_is_shuffled(data, tmp_path):
    augment(data, tmp_path / "out", shard_size=10)
    orders = []
    for shard in range(2):
        with tarfile.open(tmp_path / "out" / f"shard-{shard:06}.tar") as tar:
            names = [name for name in tar.getnames() if name.endswith("png")]
        orders.append([int(name.split("-")[0]) for name in names])
        assert {name.split("-")[1] for name in names} == {f"{shard + 1}.png"}
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1] != list(range(10))


@pytest.mark.parametrize("form", ["shards", "folder"])
def test_any_number_of_workers_writes_the_same(data, tmp_path, monkeypatch, form):
    augment(data, tmp_path / "alone", form=form)
    torch.manual_seed(123)  # the global random state has no say
    written = []
    for rank in (1, 2, 0):
        as_worker(monkeypatch, rank, 3)
        written.append(augment(data, tmp_path / "three", form=form).written)
    assert written == [1, 1, 1]
    assert contents(tmp_path / "three") == contents(tmp_path / "alone")
    monkeypatch.undo()
    augment(data, tmp_path / "other", form=form, seed=1)
    assert contents(tmp_path / "other") != contents(tmp_path / "alone")


def test_a_folder_is_an_image_folder(data, tmp_path):
    augment(data, tmp_path / "out", form="folder", image_format="jpeg")
    written, original = ImageFolder(tmp_path / "out"), ImageFolder(data)
    assert written.class_to_idx == original.class_to_idx
    assert len(written) == 20
    assert all(path.endswith(".jpg") for path, _ in written.samples)
    labels = EncodedImages(data).labels
    for path, label in written.samples:
        assert label == labels[int(os.path.basename(path).split("-")[0])]


@pytest.mark.parametrize("form", ["shards", "folder"])
def test_what_was_stopped_goes_on(data, tmp_path, monkeypatch, form):
    augment(data, tmp_path / "undisturbed", form=form)
    original, calls = LatentPerturb.transform, []

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 4:  # in the second shard
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(LatentPerturb, "transform", stopped)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        augment(data, out, form=form)
    shards = sorted(p.name for p in out.iterdir() if "shard-" in p.name)
    assert shards == [".shard-000000.done" if form == "folder" else "shard-000000.tar"]
    name = ".shard-000001.done" if form == "folder" else "shard-000001.tar"
    (out / f".{name}.x.partial").touch()  # as a kill leaves it
    report = augment(data, out, form=form)
    assert (report.written, report.found) == (2, 1)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_accelerate_s_processes_share_the_work(data, tmp_path):
    pytest.importorskip("accelerate")
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no --main_process_port 0"
    arguments = [str(data), str(tmp_path / "two"), "--flow", "glow-cifar10-small", "--size", "16"]
    arguments += ["--copies", "2", "--shard-size", "5", "--cpu"]
    done = subprocess.run(
        [sys.executable, *launch.split(), "-m", "latent_aug", "augment", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"worker {rank} of 2: 2 shards, 10 images" in done.stdout
    arguments[1] = str(tmp_path / "one")
    result = CliRunner().invoke(app, ["augment", *arguments])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'one'}: 4 shards, 20 images" in result.output
    ours, expected = read(tmp_path / "two"), read(tmp_path / "one")
    assert {key: label for key, (_, label) in ours.items()} == {
        key: label for key, (_, label) in expected.items()
    }
    for key, (image, _) in ours.items():  # another number of threads may round otherwise
        difference = pil_to_tensor(image).int() - pil_to_tensor(expected[key][0]).int()
        assert difference.abs().max() <= 1
    result = CliRunner().invoke(app, ["augment", *arguments])
    assert "0 shards, 0 images; 4 were there" in result.output


def test_a_conditional_flow_is_told_the_labels(tmp_path):
    images = [(torch.full((3, 8, 8), 0.5), label) for label in range(4)]
    augment(images, tmp_path / "out", flow=ByClass(), copies=1)
    changes = []
    for key, (image, label) in sorted(read(tmp_path / "out").items()):
        assert int(key.split("-")[0]) == label
        changes.append((pil_to_tensor(image).float() - 128).abs().mean())
    assert changes == sorted(changes)  # the scale grows with the class
    with pytest.raises(ValueError, match="the data set has no labels"):
        augment([image for image, _ in images], tmp_path / "none", flow=ByClass())


def test_a_conditional_flow_needs_all_of_its_classes(data, tmp_path):
    with pytest.raises(ValueError, match=r"the images are of 3 classes .* the flow has 4"):
        augment(data, tmp_path / "out", flow=ByClass())


def test_a_mask_is_one_for_all_images(data, tmp_path):
    masks = torch.ones(10, 16, 16)
    perturb = LatentPerturb(0.25, flow=random_glow(), mask=masks)
    with pytest.raises(ValueError, match=r"mask must be \(H, W\).*\(10, 16, 16\)"):
        augment_images(EncodedImages(data), perturb, AugmentConfig(output=tmp_path / "out"))


def test_settings_of_a_transform_of_one_s_own_are_settings(data, tmp_path):
    class Scaled(LatentPerturb):
        def __init__(self, scale, **options):
            super().__init__(0.25, **options)
            self.scale = scale

        def noise(self, draws, eps, mask):
            return self.scale * super().noise(draws, eps, mask)

    def write(scale):
        transform = Scaled(scale, flow=random_glow())
        transform(torch.rand(1, 3, 16, 16))  # what it has counted is no setting
        settings = AugmentConfig(output=tmp_path / "out", shard_size=4)
        return augment_images(EncodedImages(data), transform, settings, progress=False)

    assert write(1.0).written == 3
    assert write(1.0).found == 3
    for scale in (2.0, torch.ones(1)):
        with pytest.raises(ValueError, match="copies with other settings"):
            write(scale)


def test_images_that_the_flow_cannot_perturb_are_counted(tmp_path):
    class Broken(Identity):
        def decode(self, z, y=None):
            return z * float("nan")

    images = [torch.full((3, 8, 8), 0.5)] * 3
    assert augment(images, tmp_path / "out", flow=Broken(), copies=1).fallbacks == 3


def test_classes_out_of_order_are_folders_by_number(tmp_path):
    class Named(list):
        classes = ("top/shirt", "boot")

    images = Named((torch.full((3, 8, 8), 0.5), label) for label in (0, 1))
    augment(images, tmp_path / "out", form="folder")
    assert ImageFolder(tmp_path / "out").classes == ["00000", "00001"]
    assert (tmp_path / "out" / "classes.txt").read_text() == "top/shirt\nboot\n"
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["top/shirt", "boot"]


@pytest.mark.parametrize(
    "classes",
    [("crane", "crane"), ("Cat", "cat"), ("a:b", "c"), ("a", "b."), ("", "a"), ("a", "b\udce9")],
)
def test_classes_that_are_no_folders_everywhere_are_numbers(classes):
    assert name_folder(1, list(classes)) == "00001"
    assert name_folder(1, ["grey wolf", "wolf-2.0 (ä)"]) == "wolf-2.0 (ä)"


@pytest.mark.parametrize("form", ["shards", "folder"])
@pytest.mark.parametrize(
    "names",
    [
        (b"caf\xe9", b"the"),
        (b"a\nb", b"c"),
        (b'"a"', b"b\xc2\x85c\xe2\x80\xa8d"),  # line breaks to Python's splitlines
        (b"a\\nb", "größe".encode()),
    ],
)
def test_folders_of_any_name_are_classes(tmp_path, names, form):
    for name in names:
        folder = os.path.join(os.fsencode(tmp_path), b"data", name)
        os.makedirs(folder)
        with open(os.path.join(folder, b"1.png"), "wb") as file:
            to_pil_image(torch.full((3, 8, 8), 90, dtype=torch.uint8)).save(file, "PNG")
    out = tmp_path / "out"
    report = augment(tmp_path / "data", out, form=form, copies=1)
    assert report.images == 2
    found = json.loads((out / "classes.json").read_text())
    assert [os.fsencode(name) for name in found] == sorted(names)
    lines = (out / "classes.txt").read_text(encoding="utf-8").splitlines()
    assert [json.loads(x) if x.startswith('"') else x for x in lines] == found
    assert augment(tmp_path / "data", out, form=form, copies=1).found == 1
    if form == "folder":
        assert len(ImageFolder(out).classes) == 2


def test_what_failed_before_any_copy_can_be_corrected(data, tmp_path):
    with pytest.raises(ValueError, match="maps images of size"):
        augment(data, tmp_path / "out", flow=random_dense(side=8, classes=3))
    augment(data, tmp_path / "out", eps=0.1)
    with pytest.raises(ValueError, match="copies with other settings"):
        augment(data, tmp_path / "out", eps=0.2)


def test_unlabelled_images_have_no_label(tmp_path):
    augment([torch.full((3, 8, 8), 0.5)], tmp_path / "out", copies=1)
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert tar.getnames() == ["00000000-1.png"]
    assert not (tmp_path / "out" / "classes.txt").exists()


def test_other_settings_do_not_go_into_the_same_output(data, tmp_path):
    augment(data, tmp_path / "out")
    before = contents(tmp_path / "out")
    for changes in ({"seed": 1}, {"eps": 0.3}, {"copies": 3}, {"flow": random_glow(seed=1)}):
        with pytest.raises(ValueError, match="copies with other settings"):
            augment(data, tmp_path / "out", **changes)
    (data / "dog").rename(data / "duck")  # in the same order
    with pytest.raises(ValueError, match=r"copies with other settings \(another labels\)"):
        augment(data, tmp_path / "out")
    next(data.rglob("*.png")).unlink()
    with pytest.raises(ValueError, match=r"other settings \(images 10, now 9, another data"):
        augment(data, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match="must be empty, it holds"):
        augment(data, data)


def test_copies_go_on_when_their_flow_was_moved(data, tmp_path):
    flow = tmp_path / "flow"
    random_glow().save_pretrained(flow)
    augment(data, tmp_path / "out", flow=str(flow))
    (tmp_path / "out" / "shard-000001.tar").unlink()
    moved = flow.rename(tmp_path / "moved")
    assert augment(data, tmp_path / "out", flow=str(moved)).written == 1


def test_an_image_that_cannot_be_read_is_named(data, tmp_path):
    (data / "cat" / "7.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"image cat/7\.png cannot be read"):
        augment(data, tmp_path / "out")
    assert not list((tmp_path / "out").glob("shard*"))


@pytest.mark.parametrize("form", ["shards", "folder"])
def test_images_that_cannot_be_read_are_left_out_if_asked(data, tmp_path, form):
    whole = augment(data, tmp_path / "whole", form=form)
    (data / "cat" / "7.png").write_bytes(b"no image")
    settings = {"form": form, "shard_size": 4}
    with pytest.raises(OSError, match=r"cat/7\.png cannot be read.* or leave such images out"):
        augment(data, tmp_path / "out", **settings)
    with pytest.warns(UserWarning, match=r"left out: image cat/7\.png cannot be read"):
        report = augment(data, tmp_path / "out", **settings, skip_unreadable=True)
    assert (report.images, report.unreadable) == (18, 2)
    assert (whole.images, whole.unreadable) == (20, 0)
    if form == "folder":
        keys = {path.stem for path in (tmp_path / "out").rglob("*.png")}
    else:
        keys = set(read(tmp_path / "out"))
    bad = EncodedImages(data).names.index("cat/7.png")
    assert keys == {f"{i:08}-{copy}" for i in range(10) if i != bad for copy in (1, 2)}


def test_what_stopped_at_an_image_goes_on_without_it(tmp_path):
    class Torn(list):
        def __getitem__(self, index):
            if index == 9:  # not among those that settings are told by
                raise OSError("image 9 cannot be read")
            return super().__getitem__(index)

    images = Torn(torch.full((3, 8, 8), shade / 50) for shade in range(40))
    with pytest.raises(OSError, match="image 9 cannot be read; mend or replace"):
        augment(images, tmp_path / "out", copies=1, shard_size=4)
    before = len(list((tmp_path / "out").glob("*.tar")))
    assert 0 < before < 10
    with pytest.warns(UserWarning, match="left out: image 9"):
        report = augment(images, tmp_path / "out", copies=1, shard_size=4, skip_unreadable=True)
    assert (report.found, report.written, report.unreadable) == (before, 10 - before, 1)
    assert report.images == 4 * (10 - before) - 1


def test_a_grey_image_comes_back_grey_from_a_flow_of_colours(data, tmp_path):
    grey = to_pil_image(torch.full((1, 16, 16), 90, dtype=torch.uint8))
    colour = to_pil_image(torch.full((3, 16, 16), 90, dtype=torch.uint8))
    samples = [(grey, 0), (colour, 1)]
    augment(samples, tmp_path / "out", copies=1, originals=True)
    files = EncodedImages(tmp_path / "out" / "shard-000000.tar")
    modes = {name: files[place].mode for place, name in enumerate(files.names)}
    assert modes == {f"{i:08}-{copy}.png": ["L", "RGB"][i] for i in (0, 1) for copy in (0, 1)}
    values = {name: pil_to_tensor(files[i]).unique() for i, name in enumerate(files.names)}
    assert values["00000000-0.png"].tolist() == [90]
    assert len(values["00000000-1.png"]) > 1


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_photograph_is_still_turned_as_it_was(tmp_path, image_format, suffix):
    """Some loaders turn images by their EXIF, others do not: copies are to be as originals are."""
    (tmp_path / "data" / "photos").mkdir(parents=True)
    pixels = torch.full((3, 8, 16), 90, dtype=torch.uint8)
    for orientation in (None, 1, 6):
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        to_pil_image(pixels).save(
            tmp_path / "data" / "photos" / f"{orientation}.{suffix}", exif=exif
        )
    images = EncodedImages(tmp_path / "data")
    settings = {"copies": 1, "originals": True, "shard_size": 6, "image_format": image_format}
    augment(tmp_path / "data", tmp_path / "out", **settings)
    files = EncodedImages(tmp_path / "out" / "shard-000000.tar")
    assert len(files) == 6
    for place, name in enumerate(files.names):
        found, expected = files[place], images[int(name[:8])]
        assert found.size == expected.size
        assert ImageOps.exif_transpose(found).size == ImageOps.exif_transpose(expected).size
        assert (0x0112 in found.getexif()) == (expected.getexif().get(0x0112) == 6)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_does_not_matter(tmp_path, suffix):
    (tmp_path / "data").mkdir()
    image = to_pil_image(torch.full((3, 8, 8), 90, dtype=torch.uint8))
    image.save(tmp_path / "data" / f"a.{suffix}", exif=b"Exif\0\0MM nonsense")
    report = augment(tmp_path / "data", tmp_path / "out")
    assert report.images == 2


def test_images_that_are_turned_otherwise_are_others(tmp_path):
    exif, image = Image.Exif(), to_pil_image(torch.full((3, 8, 8), 90, dtype=torch.uint8))
    (tmp_path / "data").mkdir()
    for orientation in (1, 3):
        exif[0x0112] = orientation
        image.save(tmp_path / "data" / "a.png", exif=exif)
        if orientation == 1:
            augment(tmp_path / "data", tmp_path / "out")
    with pytest.raises(ValueError, match="another data"):
        augment(tmp_path / "data", tmp_path / "out")


def test_a_folder_without_classes_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="have no classes"):
        augment([torch.full((3, 8, 8), 0.5)], tmp_path / "out", form="folder")
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"copies": 0}, "copies"),
        ({"shard_size": 1.5}, "shard_size"),
        ({"form": "zip"}, "form"),
        ({"image_format": "webp"}, "image_format"),
        ({"quality": 101}, "quality"),
        ({"seed": -1}, "seed"),
        ({"size": 0}, "size"),
    ],
)
def test_bad_settings_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        AugmentConfig(output="x", **changes)


def test_bad_data_is_named(tmp_path):
    image = torch.full((3, 8, 8), 0.5)
    with pytest.raises(ValueError, match=r"class indices, image 0 has 'cat'"):
        augment([(image, "cat")], tmp_path / "a")
    with pytest.raises(ValueError, match="length above 0"):
        augment([], tmp_path / "b")
    with pytest.raises(TypeError, match="must be a LatentPerturb"):
        augment_images([image], torch.nn.Identity(), AugmentConfig(output=tmp_path / "c"))
    assert [place.name for place in tmp_path.iterdir()] == ["a"]
    assert not list((tmp_path / "a").glob("*shard*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "out"], "there is no folder and no tar nowhere"),
        (["data", "data/out"], "lies among the images"),
        (["data", "out", "--copies", "0"], "copies must be"),
        (["data", "out", "--flow", "nothing"], "nothing"),
        (["data", "out"], "RANK must lie in 0 to WORLD_SIZE - 1"),
    ],
)
def test_errors_are_one_line(data, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    if "RANK" in words:
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["augment", *arguments])
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert words in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.25), ("l2", 10.0), ("rms", 0.25)])
def test_the_command_s_eps_follows_its_norm(data, tmp_path, norm, eps):
    random_glow().save_pretrained(tmp_path / "flow")
    arguments = ["augment", data, tmp_path / "out", "--flow", tmp_path / "flow", "--norm", norm]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "out" / "augment.json").read_text())
    assert f"eps={eps}, norm='{norm}'" in settings["transform"]


@pytest.mark.filterwarnings("default")
def test_the_command_leaves_out_what_cannot_be_read(data, tmp_path):
    random_glow().save_pretrained(tmp_path / "flow")
    (data / "cat" / "7.png").write_bytes(b"no image")
    arguments = ["augment", data, tmp_path / "out", "--flow", tmp_path / "flow"]
    result = CliRunner().invoke(app, list(map(str, [*arguments, "--skip-unreadable"])))
    assert result.exit_code == 0, result.output
    assert result.output.count("warning: left out: image cat/7.png cannot be read") == 1
    assert "9 images, 1 left out" in result.output


def test_shards_can_be_read_back(data, tmp_path):
    augment(data, tmp_path / "out", copies=1, shard_size=10)
    shard = EncodedImages(tmp_path / "out" / "shard-000000.tar")
    labels = EncodedImages(data).labels
    assert shard.labels == [labels[int(name.split("-")[0])] for name in shard.names]
    assert shard.classes == ["0", "1", "2"]


def test_masks_are_told_apart(tmp_path):
    images = [torch.rand(3, 8, 8) for _ in range(4)]
    mask = torch.zeros(8, 8).bool()
    mask[:4] = True
    for index, changed in enumerate((mask, mask, ~mask)):
        job = LatentPerturb(flow=Identity(), mask=changed), AugmentConfig(output=tmp_path)
        if index < 2:
            augment_images(images, *job, progress=False)
        else:
            with pytest.raises(ValueError, match="mask"):
                augment_images(images, *job, progress=False)


def test_a_mask_that_is_worked_out_is_refused(tmp_path):
    transform = LatentPerturb(flow=Identity(), mask=lambda sample: sample)
    with pytest.raises(ValueError, match="mask must be None or a tensor: a callable"):
        augment_images([torch.rand(3, 8, 8)], transform, AugmentConfig(output=tmp_path / "out"))


def test_an_image_that_was_mended_lets_the_job_go_on(data, tmp_path):
    path = data / "cat" / "7.png"
    kept = path.read_bytes()
    path.write_bytes(b"no image")
    with pytest.warns(UserWarning, match="left out"):
        augment(data, tmp_path / "out", copies=1, shard_size=4, skip_unreadable=True)
    path.write_bytes(kept)
    assert augment(data, tmp_path / "out", copies=1, shard_size=4).written == 0


@pytest.mark.parametrize("form", ["shards", "folder"])
def test_unlabelled_images_do_not_become_some_class_s(tmp_path, form):
    images = [(torch.full((3, 8, 8), 0.5), label) for label in (0, -1)]
    images = Named(images)
    if form == "folder":
        with pytest.raises(ValueError, match=r"labels of at least 0, got -1.*form='shards'"):
            augment(images, tmp_path / "out", form=form)
    else:
        augment(images, tmp_path / "out", form=form)
    assert not list((tmp_path / "out").glob("cat/*"))


class Named(list):
    """Samples of a data set that names its classes."""

    classes = ("bird", "cat")
