"""What is read: folders, tars, torchvision data sets, as uint8 tensors."""

import gzip
import io
import os
import shutil
import sys
import tarfile
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import stripes
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision import datasets, transforms
from torchvision.transforms.v2.functional import to_pil_image

from latent_aug.images.datasets import UInt8Images, open_images, spread_indices
from latent_aug.images.folders import EncodedImages
from latent_aug.utils.hashing import hash_tensors


@pytest.fixture(params=["w", "w:gz"])
def tar(request, folder, tmp_path):
    path = tmp_path / "images.tar"
    with tarfile.open(path, request.param) as archive:
        archive.add(folder, "images")
    return path


def test_folders_are_classes(folder, tar):
    for path in (folder, tar):
        assert EncodedImages(path).labels == [0] * 12 + [1] * 12


def test_a_tar_is_read_like_its_folder(folder, tar):
    from_tar, from_folder = (UInt8Images(open_images(p), 1) for p in (tar, folder))
    assert len(from_tar) == 24
    assert all(torch.equal(a, b) for a, b in zip(from_tar, from_folder, strict=True))


def test_a_torchvision_data_set_is_read(tmp_path, monkeypatch):
    """FashionMNIST as torchvision stores it, made here; nothing is downloaded."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = stripes(20)[:, 0]
    for prefix in ("train", "t10k"):
        for kind, values in (("images-idx3", images), ("labels-idx1", torch.zeros(20).byte())):
            header = bytes([0, 0, 8, values.ndim])
            header += b"".join(n.to_bytes(4, "big") for n in values.shape)
            data = header + values.numpy().tobytes()
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(data)
            (raw / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))
    dataset = open_images("torchvision:FashionMNIST", root=tmp_path)
    assert isinstance(dataset, datasets.FashionMNIST)
    assert torch.equal(torch.stack(list(UInt8Images(dataset, 1)))[:, 0], images)


@pytest.mark.parametrize(
    "error", [URLError("no network"), RuntimeError("not found"), IncompleteRead(b"")]
)
def test_a_failed_download_names_its_data_set(tmp_path, monkeypatch, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(datasets.SVHN, "__init__", download)
    with pytest.raises(OSError, match=r"SVHN cannot be downloaded to .*: .*(network|found|Read)"):
        open_images("torchvision:SVHN", root=tmp_path)


def test_a_package_that_torchvision_needs_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    monkeypatch.setattr(datasets.SVHN, "download", lambda self: None)
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    with pytest.raises(ModuleNotFoundError, match=r"torchvision's SVHN needs a package: .*scipy"):
        open_images("torchvision:SVHN", root=tmp_path)


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_classes_are_the_outermost_folders_that_differ(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    png = file.getvalue()
    for names, classes, labels in (
        (["a/1.png", "b/2.png"], ["a", "b"], [0, 1]),
        (["all/a/1.png", "all/b/2.png"], ["a", "b"], [0, 1]),
        (["a/1.png", "a/2.png"], ["a"], [0, 0]),
        (["a/x/1.png", "b/2.png"], ["a", "b"], [0, 1]),
        (["1.png", "b/2.png"], [], None),
    ):
        images = EncodedImages(tar_of(tmp_path / "x.tar", dict.fromkeys(names, png)))
        assert (images.classes, images.labels) == (classes, labels)
    for number in (b"", b"cat"):
        content = {"1.png": png, "1.cls": b"3", "2.png": png, "2.cls": number}
        with pytest.raises(ValueError, match=r"2\.png has no \.cls"):
            EncodedImages(tar_of(tmp_path / "y.tar", content))


def test_a_tar_may_hold_images_without_a_class_and_no_absurd_number(tmp_path):
    def opened(number):
        content = {"1.png": b"png", "1.cls": b"1", "2.png": b"png", "2.cls": number}
        return EncodedImages(tar_of(tmp_path / "z.tar", content))

    images = opened(b"-1\n")
    assert (images.classes, images.labels) == (["0", "1"], [1, -1])
    for number in (b"-2", b"99999999999"):
        with pytest.raises(ValueError, match=r"\.cls members must hold numbers from 0"):
            opened(number)


def test_images_are_converted_resized_and_cropped():
    image = Image.new("P", (30, 20), 3)
    assert UInt8Images([image], 3, 8)[0].shape == (3, 8, 8)
    assert UInt8Images([image], 1)[0].shape == (1, 20, 30)


def test_colours_are_not_dropped_for_a_grey_flow():
    greys = torch.arange(64, dtype=torch.uint8).view(1, 8, 8).expand(3, 8, 8)
    assert UInt8Images([to_pil_image(greys)], 1)[0].unique().numel() == 64  # RGB that is grey
    colours = greys + 20 * torch.arange(3, dtype=torch.uint8)[:, None, None]
    with pytest.raises(ValueError, match="have colours, and the flow maps grey ones"):
        UInt8Images([to_pil_image(colours)], 1)
    assert UInt8Images([to_pil_image(colours)], 3)[0].equal(colours)


def test_a_palette_with_transparency_loses_it(recwarn):
    image = Image.new("P", (8, 8))
    image.info["transparency"] = bytes([0, 255])
    assert UInt8Images([image], 3)[0].shape == (3, 8, 8)
    assert not recwarn


def test_indices_are_spread_from_the_first_to_the_last():
    assert spread_indices(3, 16) == [0, 1, 2]
    assert spread_indices(1, 1) == spread_indices(5, 1) == [0]
    assert spread_indices(101, 5) == [0, 25, 50, 75, 100]
    assert spread_indices(2**24 + 4, 16)[-1] == 2**24 + 3  # more than float32 can count


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_without_a_fixed_range_are_refused(mode):
    with pytest.raises(TypeError, match=f"mode {mode} has no fixed range"):
        UInt8Images([Image.new(mode, (8, 8), 300)], 1)


def test_encoded_images_that_are_cut_off_are_named(tmp_path):
    data = io.BytesIO()
    to_pil_image(stripes(1)[0]).save(data, "PNG")
    (tmp_path / "a.png").write_bytes(data.getvalue()[:40])
    with pytest.raises(OSError, match=r"image a\.png cannot be read"):
        EncodedImages(tmp_path)[0]


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(stripes(), torch.zeros(96)),
        [(image, 0) for image in stripes()],
        stripes() / 255,
    ],
    ids=["tensor-dataset", "list-of-tuples", "floats"],
)
def test_data_of_many_kinds_are_the_same_images(dataset):
    assert torch.equal(torch.stack(list(UInt8Images(dataset, 1))), stripes())


def test_linked_folders_are_classes_and_hidden_ones_are_not(folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("class0", "class1", ".ipynb_checkpoints"):
        (data / name).symlink_to(folder / "class0")
    images = EncodedImages(data)
    assert images.classes == ["class0", "class1"]
    assert images.labels == [0] * 12 + [1] * 12


@pytest.mark.parametrize("outer", ["", "all"])
@pytest.mark.parametrize("content", [None, "1.gif", "notes.txt"])
def test_a_class_of_no_images_is_warned_of(folder, tmp_path, outer, content, recwarn):
    data = tmp_path / "data"
    shutil.copytree(folder, data / "all")
    (data / "all" / ".hidden").mkdir()
    (data / "all" / "class0" / "empty").mkdir()
    (data / "all" / "class0" / "1.gif").write_text("beside images that are read")
    with tarfile.open(tmp_path / "before.tar", "w") as tar:
        tar.add(data, ".")
    assert len(EncodedImages(data)) == len(EncodedImages(tmp_path / "before.tar")) == 24
    assert not recwarn
    other = data / outer / "class2"
    other.mkdir()
    if content:
        (other / content).write_text("no image")
    name = (Path(outer) / "class2").as_posix()
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(data, ".")
    for path in (data, tmp_path / "data.tar"):
        with pytest.warns(UserWarning, match=rf"no image is read in {name}, .* no such class"):
            images = EncodedImages(path)
        assert images.classes == ["class0", "class1"]


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "class0":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match=r"Permission denied.*class0"):
        EncodedImages(folder)


def test_images_beside_the_folders_of_classes_are_named(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    assert EncodedImages(data).stray == []
    for name in ("a.png", "b.png"):
        shutil.copy(data / "class0" / "000.png", data / name)
    images = EncodedImages(data)
    assert (images.stray, images.classes) == (["a.png", "b.png"], [])
    with pytest.raises(ValueError, match=r"a\.png and 1 others beside the folders of the classes"):
        UInt8Images(images, 1, num_classes=2)


def test_hidden_members_of_a_tar_are_left_out(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    shutil.copytree(folder / "class0", data / ".ipynb_checkpoints")
    shutil.copytree(folder / "class0", data / "class1" / ".thumbs")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(data, "./data")
    one, other = EncodedImages(data), EncodedImages(tmp_path / "x.tar")
    assert (one.classes, one.labels) == (other.classes, other.labels)


def test_a_sample_of_a_tar_has_one_image(tmp_path):
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    content = {"0.png": file.getvalue(), "0.mask.png": file.getvalue(), "0.cls": b"1"}
    with pytest.raises(ValueError, match=r"0\.mask\.png and 0\.png are of one sample"):
        EncodedImages(tar_of(tmp_path / "x.tar", content))


def test_images_that_do_not_fit_are_named(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    Image.new("RGB", (16, 16), "red").save(data / "class1" / "colour.png")
    with pytest.raises(ValueError, match=r"image class1/colour\.png: the images have colours"):
        UInt8Images(EncodedImages(data), 1)
    Image.new("L", (20, 16)).save(data / "class1" / "colour.png")
    with pytest.raises(ValueError, match=r"image class1/colour\.png is \(1, 16, 20\)"):
        UInt8Images(EncodedImages(data), 1)


def test_a_flat_tar_has_no_classes(tmp_path):
    image = to_pil_image(stripes(1)[0])
    file = io.BytesIO()
    image.save(file, "png")
    images = EncodedImages(tar_of(tmp_path / "flat.tar", {"./0.png": file.getvalue()}))
    assert (images.names, images.classes, images.labels) == (["0.png"], [], None)


def test_linked_members_of_a_tar_are_images_too(tmp_path):
    file = io.BytesIO()
    to_pil_image(stripes(1)[0]).save(file, "png")
    path = tar_of(tmp_path / "linked.tar", {"a/0.png": file.getvalue()})
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("b/0.png", tarfile.LNKTYPE, "a/0.png"),
            ("c/0.png", tarfile.SYMTYPE, "../a/0.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    images = EncodedImages(path)
    assert (images.classes, images.labels) == (["a", "b", "c"], [0, 1, 2])
    assert len({images[i].tobytes() for i in range(3)}) == 1
    with tarfile.open(path, "a") as tar:
        info.name, info.linkname = "c/1.png", "../a/1.png"
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"c/1\.png is a link to \.\./a/1\.png, which is"):
        EncodedImages(path)


def test_classes_are_what_a_data_set_gives(folder):
    grey = transforms.Grayscale()
    data = datasets.ImageFolder(folder, grey, target_transform=lambda label: 1 - label)
    assert UInt8Images(data, 1, num_classes=2).labels.tolist() == [1] * 12 + [0] * 12
    data = TensorDataset(stripes(3), torch.arange(3))
    data.classes = np.array(["a", "b", "c"])
    assert UInt8Images(data, 1, num_classes=3).labels.tolist() == [0, 1, 2]


def test_tensors_of_any_dtype_have_a_digest():
    values = torch.rand(3, 2)
    digests = {hash_tensors([values.to(dtype)]) for dtype in (torch.float32, torch.bfloat16)}
    assert hash_tensors([values.bfloat16()]) in digests
    assert len(digests) == 2
    assert hash_tensors([torch.tensor(2.0)]) != hash_tensors([torch.tensor(3.0)])


@pytest.mark.parametrize("how", ["damaged", "16 bits"])
def test_every_image_that_cannot_be_read_is_named(how, tmp_path):
    path = tmp_path / "one.png"
    if how == "damaged":
        to_pil_image(stripes(1)[0]).save(path)
        content = path.read_bytes()
        path.write_bytes(content.replace(b"IDAT", b"\xffDAT"))
    else:
        Image.new("I;16", (8, 8)).save(path)
    with pytest.raises(OSError, match=r"image one\.png cannot be read"):
        EncodedImages(tmp_path)[0]


def test_a_link_to_a_folder_around_it_ends(folder, tmp_path):
    data = tmp_path / "data"
    for name in ("a", "b"):
        (data / name).mkdir(parents=True)
        (data / name / "loop").symlink_to(data)
        to_pil_image(stripes(1)[0]).save(data / name / "0.png")
    assert EncodedImages(data).names == ["a/0.png", "b/0.png"]
