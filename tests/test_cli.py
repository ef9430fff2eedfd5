"""The command line."""

import importlib
import json
import re
import shutil
import sys
from dataclasses import MISSING, fields

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from test_check import smooth
from torchvision.transforms.v2.functional import to_pil_image
from typer.main import get_command
from typer.testing import CliRunner

from latent_aug import AugmentConfig, TrainConfig, check_flow, load_flow
from latent_aug.cli import app
from latent_aug.cli.options import read_descriptions
from latent_aug.images.datasets import open_images, read_images
from latent_aug.images.folders import EncodedImages

train_module = importlib.import_module("latent_aug.cli.train")  # its name is that of the command
SMALL = ["--channels", "1", "--levels", "1", "-K", "1", "-H", "8", "--steps", "5"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(*arguments):
    return call("train", *arguments)


def test_train_writes_a_flow_and_its_card(folder, tmp_path):
    output = tmp_path / "flow"
    more = ["--batch-size", 8, "--noise", 0.02, *SMALL]
    result = run(folder, "--output", output, "--validation", folder, *more)
    assert result.exit_code == 0, result.output
    assert torch.load(output / "run.pt")["recipe"]["noise"] == 0.02
    assert "bits/dim on 24 images" in result.output
    flow = load_flow(output)
    assert (flow.channels, flow.steps, flow.hidden) == (1, 1, 8)
    card = (output / "README.md").read_text()
    assert "24 of 24 images come back byte for byte" in card
    assert "It saw 40 images" in card
    figures = json.loads((output / "figures.json").read_text())
    assert figures["images"] == 24
    assert f"{figures['bits_per_dim']:.3f} bits per dimension" in card
    found = check_flow(output, EncodedImages(folder))
    assert f"suggested for LatentPerturb: norm='linf', eps={found.eps:.3g}" in result.output
    assert f"Suggested: eps {float(f'{found.eps:.2g}'):g} with" in card
    assert all(finding.text in result.output for finding in found.findings)
    assert f"latent-aug train DATA --init {output}" in result.output
    assert f"latent-aug train DATA --init {output.name} " in card
    assert "on this machine" in result.output
    assert "on this machine" not in card
    assert "(preview.png)" in card
    with Image.open(output / "preview.png") as picture:
        assert picture.width > 300
    data = ModelCard(card).data
    assert (data.datasets, data.license) == (None, "mit")
    assert data.eval_results[0].metric_value == round(figures["bits_per_dim"], 3)


@pytest.mark.parametrize(
    ("command", "config"), [("train", TrainConfig), ("augment", AugmentConfig)]
)
def test_a_command_has_an_option_for_each_setting(command, config):
    parameters = {p.name: p for p in get_command(app).commands[command].params}
    described = read_descriptions(config)
    for field in fields(config):
        option = parameters[field.name]
        assert option.required is (field.default is MISSING)
        assert option.required or option.default == field.default
        assert option.help == described[field.name] != ""
        names = [*option.opts, *option.secondary_opts]
        name = field.name.replace("_", "-")
        if option.param_type_name == "option":
            opposite = [f"--no-{name}"] if field.default is True else []
            assert names == [f"--{name}", *opposite]
    assert "config" not in parameters


def test_options_reach_the_settings(folder, tmp_path, monkeypatch):
    seen = []
    module = sys.modules["latent_aug.cli.train"]  # the package has the function of that name
    monkeypatch.setattr(module, "train_flow", lambda flow, images, config, **_: seen.append(config))
    given = {"lr": 0.5, "warmup": 3, "size": 8, "seed": 4, "accumulate": 2, "ema": 0.5}
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    run(folder, "--output", tmp_path, *options, "--no-flip", "--validation-images", 7)
    assert seen == [TrainConfig(output=tmp_path, flip=False, validation_images=7, **given)]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Where a flow was trained without held-out images, the command for it and what it said."""
    output = tmp_path_factory.mktemp("trained")
    command = [folder, "--output", output, "--batch-size", 8, "--dataset", "someone/stripes"]
    result = run(*command, *SMALL)
    assert result.exit_code == 0, result.output
    return output, [*command, *SMALL], result.output


def test_figures_on_training_images_say_so(trained):
    output, _, said = trained
    assert "bits/dim on 24 training images" in said
    assert "(the training images)" in (output / "README.md").read_text()


def test_the_data_s_name_on_the_hub_is_in_the_card(trained):
    assert ModelCard.load(trained[0] / "README.md").data.datasets == ["someone/stripes"]


def test_the_same_command_again_resumes(trained):
    output, command, _ = trained
    before = (output / "model.safetensors").read_bytes()
    assert run(*command).exit_code == 0
    assert (output / "model.safetensors").read_bytes() == before
    assert len((output / "log.jsonl").read_text().splitlines()) == 1  # no step was taken again


def test_a_flow_of_classes(folder, tmp_path):
    output = tmp_path / "flow"
    sizes = ["--classes", 2, "-K", 2, "-H", 8, "--steps", 5, "--batch-size", 8, "--size", 8]
    result = run(folder, "--output", output, "--validation", folder, *sizes)
    assert result.exit_code == 0, result.output
    assert f"with their classes, with `latent-aug train DATA --init {output}" in result.output
    assert f"{output} --size 8 --output" in result.output
    flow = load_flow(output)
    assert (flow.num_classes, flow.size, flow.hidden, len(flow.couplings)) == (2, (8, 8), 8, 2)
    card = (output / "README.md").read_text()
    assert "class-conditional flow (Table 3). It has 2 fully connected couplings" in card
    assert "24 of 24 images come back byte for byte" in card
    assert (output / "preview.png").stat().st_size > 0
    drawn = call("preview", output, folder, "--picture", tmp_path / "drawn.png")
    assert drawn.exit_code == 0, drawn.output
    again = run(folder, "--output", tmp_path / "b", "--init", output, "--steps", 2, "--size", 8)
    assert again.exit_code == 0, again.output
    for wrong, words in (
        (["--classes", 2, "--levels", 2], "--levels is for Glow"),
        (["--classes", 3], "the images are of 2 classes (class0, class1, ...), the flow has 3"),
        (["--init", output, "--classes", 2], "omit them"),
    ):
        refused = run(folder, "--output", tmp_path / "c", *wrong)
        assert refused.exit_code == 1
        assert words in refused.output


def test_held_out_images_are_of_the_same_classes(folder, tmp_path):
    for name in ("class1", "class2"):
        shutil.copytree(folder / "class1", tmp_path / "others" / name)
    sizes = ["--classes", 2, "-K", 1, "-H", 4, "--steps", 1]
    result = run(folder, "--output", tmp_path / "a", "--validation", tmp_path / "others", *sizes)
    assert result.exit_code == 1
    assert "of one of the two only: class0, class2" in result.output
    assert not (tmp_path / "a").exists()
    assert run(folder, "--output", tmp_path / "b", *sizes).exit_code == 0
    tuned = ["--init", tmp_path / "b", "--steps", 1, "--validation", tmp_path / "others"]
    assert "of one of the two only" in run(folder, "--output", tmp_path / "c", *tuned).output


def test_names_of_any_kind_are_text_in_the_card_s_header(folder, tmp_path):
    output = tmp_path / "runs: v2"
    result = run(folder, "--output", output, "--licence", "mit: mine", *SMALL)
    assert result.exit_code == 0, result.output
    data = ModelCard.load(output / "README.md").data
    assert (data.model_name, data.license) == ("runs: v2", "mit: mine")


def test_init_fine_tunes(folder, trained, tmp_path):
    again = [folder, "--output", tmp_path / "b", "--init", trained[0], "--steps", 2]
    result = run(*again, "--lr", 1e-7)
    assert result.exit_code == 0, result.output
    before, after = (next(load_flow(d).parameters()) for d in (trained[0], tmp_path / "b"))
    assert torch.allclose(after, before, atol=1e-4)
    assert not torch.equal(after, before)
    assert f"bits/dim of {trained[0]} to " in result.output
    assert "resolution=" not in result.output


def test_a_fine_tuning_that_worsens_the_flow_says_so(folder, trained, monkeypatch):
    figures = iter([3.0, 3.5, 3.0, 2.5])
    monkeypatch.setattr(train_module, "measure_bits_per_dim", lambda *_, **__: next(figures))
    flow = load_flow(trained[0])
    images = read_images(flow, open_images(folder), 8)
    worse, better = (train_module.compare_with_start(flow, flow, images, "a") for _ in range(2))
    assert worse.startswith("fine-tuning: from 3.000 bits/dim of a to 3.500, on 24 of them: that")
    assert better == "fine-tuning: from 3.000 bits/dim of a to 2.500, on 24 of them"


def test_images_that_were_made_smaller_are_perturbed_by_a_copy(folder, tmp_path):
    result = run(folder, "--output", tmp_path / "b", *SMALL, "--size", 8)
    assert result.exit_code == 0, result.output
    assert ", and resolution=8 for larger images" in result.output
    assert "resolution=8)" in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--output", "x"], "there is no folder and no tar nowhere"),
        (["torchvision:CIFAR11", "--output", "x"], "CIFAR11"),
        (["torchvision:folder", "--output", "x"], "folder"),
        (["torchvision:EMNIST", "--output", "x"], "EMNIST"),
        ([__file__, "--output", "x"], "no readable tar"),
        ([__file__, "--output", "x", "--channels", "0"], "no readable tar"),
        (["nowhere", "--output", "x", "--steps", "0"], "steps must be an integer of at least 1"),
    ],
)
def test_errors_are_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert words in result.output
    assert list(tmp_path.iterdir()) == []


def smooth_folder(root):
    """Images that the FashionMNIST flow can take for its own."""
    for index, image in enumerate(smooth(10)):
        root.mkdir(exist_ok=True)
        to_pil_image(image).save(root / f"{index}.png")
    return root


def test_check_says_what_it_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture = tmp_path / "picture.png"
    smooth_folder(tmp_path / "images")
    result = call("check", "glow-fashionmnist", "~/images", "--picture=~/picture.png")
    assert "bits/dim" in result.output
    assert "suggested for LatentPerturb: norm='linf', eps=" in result.output
    assert "suits these images" in result.output
    assert result.exit_code == 0
    with Image.open(picture) as drawn:
        assert drawn.width > 300


def test_check_with_a_classifier(tmp_path, monkeypatch):
    (tmp_path / "mymodels.py").write_text(
        "from torch import nn\n"
        "def load():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
        "nothing = 3\n"
        "def logits(x):\n    return nn.Identity()\n"
        "scaling = ([0.5], [0.25])\n"
    )
    monkeypatch.chdir(tmp_path)
    data = smooth_folder(tmp_path / "images")
    arguments = ("check", "glow-fashionmnist", data, "--classifier", "mymodels:load")
    result = call(*arguments)
    assert "by label flips" in result.output
    assert "by label flips" in call(*arguments, "--normalize", "mymodels:scaling").output
    result = call(*arguments, "--normalize", "mymodels:nothing")
    assert result.exit_code == 1
    assert "error: normalize must be a v2.Normalize" in result.output
    (tmp_path / "broken.py").write_text("raise RuntimeError('no such weights')\n")
    (tmp_path / "fails.py").write_text(
        "from torch import nn\n"
        "class Model(nn.Module):\n    def forward(self, x):\n        return {}[3]\n"
        "model = Model()\n"
    )
    for name in (
        "mymodels:nothing",
        "mymodels:absent",
        "absent:load",
        "broken:model",
        "fails:model",
    ):
        result = call("check", "glow-fashionmnist", data, "--classifier", name)
        assert result.exit_code == 1
        assert "error:" in result.output


def test_a_flow_that_is_not_usable_is_exit_code_3(tmp_path):
    noise = tmp_path / "noise"
    noise.mkdir()
    for index in range(5):
        image = torch.randint(256, (1, 28, 28), dtype=torch.uint8)
        to_pil_image(image).save(noise / f"{index}.png")
    result = call("check", "glow-fashionmnist", noise)
    assert result.exit_code == 3  # 2 is of wrong usage
    assert "is not usable on these images" in result.output


def test_colours_are_not_checked_against_a_grey_flow(tmp_path):
    Image.new("RGB", (28, 28), "red").save(tmp_path / "red.png")
    result = call("check", "glow-fashionmnist", tmp_path)
    assert result.exit_code == 1
    assert "error: image red.png: the images have colours" in result.output


def test_pictures_are_known_to_be_drawable_early(tmp_path):
    for command in ("check", "preview"):
        result = call(command, "nowhere", "nothing", "--picture", tmp_path / "a.xyz")
        assert result.exit_code == 1
        assert "--picture must end in one of" in result.output
        result = call(command, "nowhere", "nothing", "--picture", tmp_path / "no" / "a.png")
        assert result.exit_code == 1
        assert "there is no directory" in result.output


def test_preview_draws(tmp_path):
    data, picture = smooth_folder(tmp_path / "images"), tmp_path / "preview.png"
    options = ("--picture", picture, "--eps", 0.2, "--eps", 0.4)
    result = call("preview", "glow-fashionmnist", data, *options)
    assert result.exit_code == 0, result.output
    with Image.open(picture) as drawn:
        assert drawn.height > 300
    result = call("preview", "glow-fashionmnist", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "error:" in result.output


def test_nothing_is_written_among_the_images(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    for arguments in (
        ["train", ".", "--output", "flow", *SMALL],
        ["train", tmp_path, "--validation", ".", "--output", "flow", *SMALL],
        ["preview", "glow-fashionmnist", "."],
        ["check", "glow-fashionmnist", ".", "--picture", "check.png"],
        ["augment", ".", "copies"],
        ["augment", "~", folder / "copies"],
    ):
        result = call(*arguments)
        assert result.exit_code == 1
        assert re.search(r"lies among the images of [.~];", result.output)
    assert {path.name for path in folder.iterdir()} >= {"class0", "class1"}
    assert not {"flow", "preview.png", "check.png", "copies"} & {p.name for p in folder.iterdir()}


def test_a_flow_named_like_a_bundled_one_is_the_one_on_the_card(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(folder, "--output", "glow-fashionmnist", *SMALL)
    assert result.exit_code == 0, result.output
    found = check_flow("./glow-fashionmnist", EncodedImages(folder))
    card = (tmp_path / "glow-fashionmnist" / "README.md").read_text()
    assert f"Suggested: eps {float(f'{found.eps:.2g}'):g} with" in card


@pytest.mark.parametrize("command", ["check", "preview"])
def test_a_size_that_is_none_is_refused(command, folder):
    result = call(command, "glow-fashionmnist", folder, "--size", 0)
    assert result.exit_code == 1
    assert "error: size must be an integer of at least 1, got 0" in result.output
