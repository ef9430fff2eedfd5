"""What the explorer computes, without a browser or a server."""

import re

import pytest
import torch
from conftest import ByClass, paper_attack, random_glow, same_trace, trace_of
from PIL import Image

from latent_aug import LatentPerturb
from latent_aug.diagnostics import explore
from latent_aug.diagnostics.explore import Settings


@pytest.fixture(scope="module")
def shirt():
    clothes = explore.load_clothes()
    return explore.make_subject("glow-fashionmnist", clothes.images[:1], int(clothes.labels[0]))


def test_the_classifier_is_as_good_as_it_is_said_to_be(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.config.rootpath / "examples"))
    import quickstart

    clothes = explore.load_clothes()
    assert explore.CLOTHES.stat().st_size < 300_000
    assert clothes.labels.tolist() == [k for k in range(10) for _ in range(2)]
    images, labels = quickstart.load_images(train=False)
    found = quickstart.accuracy(clothes.classifier, images, labels)
    said = float(re.search(r"right on ([\d.]+) %", clothes.about)[1])
    assert found == pytest.approx(said, abs=0.15)
    shown = (images[:, None] == clothes.images).flatten(2).all(dim=2).any(dim=0)
    assert shown.all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_uploads_are_converted_and_cropped(tmp_path, mode, channels):
    path = tmp_path / "image.png"
    Image.new("RGB", (60, 40), (204, 204, 204)).convert(mode).save(path)
    x = explore.read_upload(path, channels, 32)
    assert x.shape == (1, channels, 32, 32)
    assert torch.allclose(x, torch.tensor(0.8), atol=0.01)


def test_what_is_no_image_is_refused(tmp_path, monkeypatch):
    good = tmp_path / "good.png"
    Image.effect_noise((64, 64), 50).save(good)
    text, cut, other = tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "other.ppm"
    text.write_text("not an image")
    cut.write_bytes(good.read_bytes()[:500])
    Image.new("RGB", (8, 8)).save(other)
    for path in (text, cut, other):
        with pytest.raises(ValueError, match=f"{path.name} is not an image"):
            explore.read_upload(path, 3, 32)
    monkeypatch.setattr(explore, "MOST_UPLOAD_PIXELS", 64 * 64 - 1)
    with pytest.raises(ValueError, match="pixels"):
        explore.read_upload(good, 3, 32)
    monkeypatch.setattr(explore, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="MiB"):
        explore.read_upload(good, 3, 32)


def test_an_image_moves_as_by_the_transform(shirt):
    settings = Settings(eps=0.4, seed=3)
    generator = torch.Generator().manual_seed(3)
    transform = LatentPerturb(0.4, flow="glow-fashionmnist", generator=generator)
    moved = explore.perturb_subject(shirt, settings)
    torch.testing.assert_close(moved.x, transform(shirt.x))
    assert not moved.fell_back
    assert not torch.equal(explore.perturb_subject(shirt, Settings(eps=0.4, seed=4)).x, moved.x)


def test_a_greater_eps_changes_more(shirt):
    changes = [
        (explore.perturb_subject(shirt, Settings(eps=eps)).x - shirt.x).abs().mean()
        for eps in (0.0, 0.1, 0.3, 0.6)
    ]
    assert changes[0] < 1e-4
    assert changes == sorted(changes)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_box_moves_or_stays(shirt, where):
    settings = Settings(eps=0.5, where=where, box=(0.5, 0.75, 0.25, 0.25))  # the wrong way round
    moved = explore.perturb_subject(shirt, settings).x != shirt.x
    inside = torch.zeros_like(moved)
    inside[..., 7:21, 7:14] = True
    still = moved & (~inside if where == "inside" else inside)
    assert moved.any()
    assert not still.any()


def test_a_level_moves_alone(shirt):
    every, fine, coarse = (
        explore.perturb_subject(shirt, Settings(eps=0.5, level=level)).x for level in (None, 0, 1)
    )
    assert not torch.equal(fine, coarse)
    assert not torch.equal(every, fine)


def test_what_the_flow_cannot_perturb_is_said():
    noise = explore.make_subject("glow-cifar10-small", torch.rand(1, 3, 32, 32))
    moved = explore.perturb_subject(noise, Settings())
    assert moved.fell_back
    assert torch.equal(moved.x, noise.x)


@pytest.mark.parametrize("norm", ["linf", "l2", "rms"])
def test_the_attack_by_steps(shirt, norm):
    eps, alpha = {"linf": (0.1, 0.05), "l2": (1.0, 0.5), "rms": (0.03, 0.015)}[norm]
    model = explore.load_clothes().classifier
    before = trace_of(model)
    settings = Settings(eps=eps, norm=norm)
    path = list(explore.attack_subject(shirt, settings, alpha=alpha, steps=3))
    assert [step.number for step in path] == [0, 1, 2, 3]
    assert torch.equal(path[0].x, shirt.x)
    assert path[-1].loss > path[0].loss + 0.5
    for step in path:
        assert step.loss == pytest.approx(-step.probabilities[0].log().item(), rel=1e-4)
    attack = paper_attack(
        model,
        eps=eps,
        alpha=alpha,
        steps=3,
        norm=norm,
        flow="glow-fashionmnist",
        generator=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(path[-1].x, attack(shirt.x, torch.tensor([0])))
    assert same_trace(trace_of(model), before)


def test_an_image_without_a_label_is_attacked_at_what_it_is_taken_for():
    clothes = explore.load_clothes()
    subject = explore.make_subject("glow-fashionmnist", clothes.images[4:5])
    first, *_, last = explore.attack_subject(subject, Settings(0.1), alpha=0.05, steps=2)
    taken_for = first.probabilities.argmax()
    assert last.probabilities[taken_for] < first.probabilities[taken_for]


def test_the_classifier_is_for_grey_images():
    subject = explore.make_subject("glow-cifar10-small", torch.full((1, 3, 32, 32), 0.5))
    with pytest.raises(ValueError, match="grey"):
        next(explore.attack_subject(subject, Settings(), alpha=0.1, steps=1))


def test_examples_and_samples():
    images, labels = explore.make_examples(random_glow())
    assert images.shape == (2, 3, 128, 128)
    assert labels == [None] * 2
    said = explore.PHOTOGRAPHS[0].with_name("photographs.txt").read_text().splitlines()
    for path, line in zip(explore.PHOTOGRAPHS, said, strict=True):
        assert path.stat().st_size < 30_000
        assert re.match(rf"{path.name}: .*(public domain|CC0)", line)
    drawn = explore.sample_at_temperatures(random_glow(1), count=2, temperatures=[0.0, 1.0])
    assert drawn.shape == (2, 2, 1, 28, 28)
    assert torch.equal(drawn[0, 0], drawn[0, 1])
    assert not torch.equal(drawn[1, 0], drawn[1, 1])


def test_a_photograph_moves_by_a_copy():
    images, _ = explore.make_examples(random_glow())
    transform = LatentPerturb(0.25, resolution=32, generator=torch.Generator().manual_seed(0))
    subject = explore.make_subject("glow-photographs", images[1:], resolution=32)
    moved = explore.perturb_subject(subject, Settings())
    torch.testing.assert_close(moved.x, transform(images[1:]))
    whole = explore.make_subject("glow-photographs", images[1:])
    assert not torch.equal(explore.perturb_subject(whole, Settings()).x, moved.x)


@pytest.mark.parametrize("where", ["everywhere", "inside", "outside"])
def test_the_code_does_what_is_shown(where, shirt):
    settings = Settings(0.3, "rms", level=1, where=where, box=(0, 0.25, 0.5, 1))
    names = {"image": shirt.x}
    torch.manual_seed(0)
    exec(explore.write_code(shirt, settings), names)
    torch.testing.assert_close(names["image"], explore.perturb_subject(shirt, settings).x)


def test_the_code_of_an_attack_does_what_is_shown(shirt):
    model = explore.load_clothes().classifier
    names = {"model": model, "batch": (shirt.x, torch.tensor([shirt.label]))}
    torch.manual_seed(0)
    exec(explore.write_code(shirt, Settings(0.1), alpha=0.05, steps=2), names)
    *_, last = explore.attack_subject(shirt, Settings(0.1), alpha=0.05, steps=2)
    torch.testing.assert_close(names["batch"][0], last.x)


def test_flows_of_classes_are_refused(monkeypatch):
    monkeypatch.setattr(explore, "get_shared_flow", lambda name: ByClass())
    with pytest.raises(ValueError, match="without classes"):
        explore.get_flow("by-class")


def test_uploads_are_upright_and_of_8_bits(tmp_path):
    turned, deep = tmp_path / "turned.jpg", tmp_path / "deep.png"
    image = Image.new("L", (32, 32))
    image.paste(255, (0, 0, 32, 16))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned by 180 degrees
    image.save(turned, exif=exif)
    x = explore.read_upload(turned, 1, 32)[0, 0]
    assert x[:14].max() < 0.2 < 0.8 < x[18:].min()
    Image.new("I;16", (32, 32), 40000).save(deep)
    with pytest.raises(TypeError, match="no fixed range"):
        explore.read_upload(deep, 1, 32)
