"""What more of the paper's tables need: grey images, networks, VAE-GAN, PGD, phases, presets."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_dense, random_glow
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from latent_aug import LatentAdversarial, load_flow
from latent_aug.transforms.regions import mark_levels

EXAMPLES = Path(__file__).parents[1] / "examples" / "paper"
RECIPES = {
    name: recipe
    for path in sorted((EXAMPLES / "recipes").glob("*.json"))
    for name, recipe in json.loads(path.read_text()).items()
}
SMALL = {"num_classes": 2, "dims": 3, "hidden": 4}


@pytest.fixture(autouse=True)
def _driver(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def grey(tmp_path):
    """Two classes of 28 x 28 grey images."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 24), ("test", 6)):
        for index in range(count):
            folder = tmp_path / "data" / "grey" / part / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            image = torch.randint(128, (1, 28, 28), generator=generator, dtype=torch.uint8)
            to_pil_image(image + 127 * (index % 2)).save(folder / f"{index:02}.png")
    return tmp_path


def drive(place, recipe, *options):
    """Run a recipe; each run's figures by method."""
    import run
    from records import read_lines

    (place / "recipes").mkdir()
    (place / "recipes" / "some.json").write_text(json.dumps({"grey": recipe}))
    command = ["run.py", "grey", place / "data", "--precision", "float32", *options]
    for name in ("recipes", "flows", "results", "state"):
        command += [f"--{name}", place / name]
    before, sys.argv = sys.argv, [str(part) for part in command]
    try:
        run.main()
    finally:
        sys.argv = before
    (path,) = (place / "results").iterdir()
    return {entry["method"]: entry for entry in read_lines(path)}


@pytest.mark.parametrize("network", ["cnn", "lenet5"])
def test_grey_images_with_every_kind_of_perturbation(grey, network, monkeypatch):
    import vae_gan

    random_dense(1, 28, classes=2).save_pretrained(grey / "flows" / "dense")
    images, folder = grey / "data" / "grey" / "train", grey / "flows" / "vae-gan"
    command = ["vae_gan.py", images, folder, "--dims", 3, "--hidden", 4]
    monkeypatch.setattr(sys, "argv", [str(c) for c in (*command, "--epochs", 1)])
    vae_gan.main()
    attack = {"eps": 0.05, "alpha": 0.01, "steps": 2, "norm": "linf"}
    methods = {
        "standard": {},
        "dense, random": {"latent": {"eps": 0.15, "flow": "dense"}},
        "dense, attack": {"attack": {**attack, "flow": "dense", "preset": "official notebook"}},
        "VAE-GAN": {"attack": {**attack, "flow": "vae-gan", "levels": -1, "p": 0.5}},
        "PGD": {"attack": {**attack, "flow": "pixels"}},
        "phases": {
            "phases": [[100, {"attack": {**attack, "flow": "pixels"}}], [100, {}]],
        },
    }
    adam = {"optimizer": "adam", "schedule": "exponential", "lr": 0.01, "weight_decay": 1e-4}
    sizes = {"channels": 1, "network": network, "width": 6, "batch_size": 8, "epochs": 2}
    found = drive(
        grey,
        {
            "title": "Grey images",
            "text": "Two classes.",
            "data": "grey",
            "protocol": {**sizes, **adam, "per_class": None},
            "methods": {name: {"pixels": "none", **m, "seeds": [0]} for name, m in methods.items()},
        },
        "--test",
    )
    assert found.keys() == methods.keys()
    losses = {name: entry["loss"] for name, entry in found.items()}
    assert len(set(losses.values())) == len(losses)  # none of them did nothing


def test_the_latent_can_be_first():
    import methods

    flow = {"flow": "glow-cifar10-small", "eps": 0.25}
    x, y = torch.full((4, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    edges = []
    for first in (True, False):
        augment = methods.make_method({"latent": flow, "latent first": first})(
            nn.Conv2d(3, 1, 1), 1
        )
        torch.manual_seed(0)
        edges.append(augment(x, y)[0] == 0)
    # crop's black border is all zeros where nothing comes after it
    assert edges[0].all(dim=1).any()
    assert edges[0].all(dim=1).sum() > edges[1].all(dim=1).sum()


def test_classes_that_are_trained_are_not_trained_again(grey, monkeypatch):
    import vae_gan
    from protocol import read_images

    images, folder = grey / "data" / "grey" / "train", grey / "flows" / "vae-gan"
    command = ["vae_gan.py", images, folder, "--hidden", 4, "--epochs", 1]
    monkeypatch.setattr(sys, "argv", [str(c) for c in command])
    vae_gan.main()
    first = (folder / "model.safetensors").read_bytes()
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["images"] == 24
    flow, data = load_flow(folder), read_images(images, channels=1)
    x, y = data.pixels / 255, data.labels
    assert figures["l1"] == pytest.approx(
        (flow.decode(flow.encode(x, y), y) - x).abs().mean().item()
    )
    (folder / "class-1.pt").unlink()
    kept = (folder / "class-0.pt").stat().st_mtime_ns
    vae_gan.main()
    assert (folder / "class-0.pt").stat().st_mtime_ns == kept
    assert (folder / "model.safetensors").read_bytes() == first
    monkeypatch.setattr(sys, "argv", [str(c) for c in (*command, "--beta", 3)])
    with pytest.raises(SystemExit, match=r"other settings or images, \{'beta': \(2.75, 3.0\)\}"):
        vae_gan.main()
    monkeypatch.setattr(sys, "argv", [str(c) for c in (*command, "--per-class", 3)])
    with pytest.raises(SystemExit, match=r"other settings or images, \{'images': "):
        vae_gan.main()


def test_a_vae_gan_sees_the_labelled_images(grey, monkeypatch):
    import vae_gan
    from protocol import Protocol, labelled, read_images

    seen = []
    monkeypatch.setattr(vae_gan, "train_class", lambda *a: seen.append(a[3]) or 0.0)
    images = grey / "data" / "grey" / "train"
    command = ["vae_gan.py", images, grey / "out", "--hidden", 4, "--per-class", 3]
    monkeypatch.setattr(sys, "argv", [str(c) for c in command])
    vae_gan.main()
    own = labelled(read_images(images, channels=1), Protocol(per_class=3))
    assert [len(pixels) for pixels in seen] == [3, 3]
    for label, pixels in enumerate(seen):
        assert torch.equal(pixels, own.pixels[own.labels == label])


class TestVaeGan:
    def test_it_learns_to_give_images_back(self):
        import vae_gan

        torch.manual_seed(0)
        flow = vae_gan.VaeGan(1, 12, 12, **SMALL)
        shades = torch.linspace(20, 235, 64)[:, None, None, None].expand(64, 1, 12, 12)
        pixels, how = shades.round().byte(), vae_gan.Training(epochs=12, batch_size=8)
        for label in range(2):
            critic = vae_gan.convolutions((1, 12, 12), 4, 1)
            parts = flow.encoders[label], flow.decoders[label]
            vae_gan.train_class(*parts, critic, pixels, how)
        flow.eval().requires_grad_(False)
        x, y = pixels / 255, torch.arange(64) % 2
        error = (flow.decode(flow.encode(x, y), y) - x).abs().mean()
        assert error < 0.1 < (x - x.mean()).abs().mean()

    @pytest.mark.parametrize("size", [(28, 28), (32, 32), (21, 30)])
    def test_its_latent_is_of_the_image_s_shape(self, size):
        import vae_gan

        flow = vae_gan.VaeGan(3, *size, **SMALL).eval().requires_grad_(False)
        x, y = torch.rand(5, 3, *size), torch.tensor([0, 1, 1, 0, 1])
        z = flow.encode(x, y)
        assert z.shape == x.shape
        assert flow.decode(z, y).shape == x.shape
        assert torch.equal(flow.join_levels(flow.split_levels(z)), z)
        assert mark_levels(flow, z, (1,)).sum() == 3
        alone = torch.cat([flow.encode(x[i : i + 1], y[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(alone, z)

    def test_an_attack_stays_in_its_ball(self, tmp_path):
        import vae_gan

        vae_gan.VaeGan(**SMALL).eval().save_pretrained(tmp_path)
        flow = load_flow(tmp_path)
        seen = []
        decode = flow.decode
        flow.decode = lambda z, y=None: (seen.append(z.detach()), decode(z, y))[1]
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 2))
        attack = LatentAdversarial(
            model, flow=flow, levels=-1, eps=0.3, alpha=0.1, steps=3, norm="l2", p=1.0
        )
        x, y = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 0, 1])
        attack(x, y)
        moved = seen[-1] - flow.encode(x, y)
        assert (moved.flatten(1)[:, 3:] == 0).all()
        lengths = moved.flatten(1).norm(dim=1)
        assert (lengths <= 0.3 + 1e-5).all()
        assert lengths.max() > 0.25


def test_phases_follow_one_another():
    import methods

    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 2))
    pgd = {"flow": "pixels", "eps": 0.5, "alpha": 0.5, "steps": 1, "norm": "linf"}
    settings = {"pixels": "none", "phases": [[130, {"attack": pgd}], [70, {}]]}
    augment = methods.make_method(settings)(model, 2)
    x, y = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    moved = []
    for share in (0.0, 0.64, 0.65, 0.99):
        augment.begin(share)
        moved.append(not torch.equal(augment(x, y)[0], x / 255))
    assert moved == [True, True, False, False]


def test_pgd_takes_sign_steps_on_pixels():
    import methods

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 2))
    pgd = {"flow": "pixels", "eps": 0.03, "alpha": 0.008, "steps": 3, "norm": "linf"}
    attack = methods.make_perturbation(
        {"attack": {**pgd, "preset": "official notebook"}}, None, model
    )
    x, y = 0.4 + 0.2 * torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 0, 1])
    expected = x.clone()
    for _ in range(3):
        expected = expected.detach().requires_grad_()
        nn.functional.cross_entropy(model(expected), y, reduction="sum").backward()
        expected = x + (expected + 0.008 * expected.grad.sign() - x).clamp(-0.03, 0.03)
    torch.testing.assert_close(attack(x, y), expected.detach())


def test_official_attacks_predictions_in_the_mode_it_finds():
    import methods

    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    attack = methods.make_perturbation(
        {"attack": {"flow": "pixels", "preset": "official"}}, None, model
    )
    assert (attack.labels, attack.model_mode) == ("predicted", "unchanged")


@pytest.mark.parametrize(
    ("name", "channels", "side", "parameters"),
    [
        ("lenet5", 1, 28, 61_706),  # of the original, with all maps connected
        ("resnet18", 3, 32, 11_173_962),  # the usual count for CIFAR-10
        ("cnn", 1, 28, 100_262),
        ("resnet", 3, 32, None),
    ],
)
def test_networks(name, channels, side, parameters):
    from networks import NETWORKS

    width = {"lenet5": 6, "cnn": 16, "resnet18": 64}.get(name, 8)
    network = NETWORKS[name](channels, 10, width).eval()
    assert network(torch.rand(2, channels, side, side)).shape == (2, 10)
    if parameters:
        assert sum(p.numel() for p in network.parameters()) == parameters


def test_lenet_starts_from_a_truncated_normal():
    from networks import lenet5

    weights = torch.cat([p.flatten() for p in lenet5(1, 10, 6).parameters()])
    assert weights.abs().max() <= 0.2
    assert weights.std().item() == pytest.approx(0.088, abs=0.003)  # 0.1, its tails cut off


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"atack": {}}, "'atack'"),
        ({"pixels": "mixups"}, "'mixups'"),
        ({"attack": {"flow": "pixels", "preset": "oficial"}}, "'oficial'"),
    ],
)
def test_a_misspelt_setting_is_refused(settings, named):
    import methods

    with pytest.raises(ValueError, match=named):
        methods.make_method(settings)(nn.Sequential(nn.Conv2d(3, 1, 1)), 2)


@pytest.mark.parametrize("pixels", ["erasing", "randaugment", "trivialaugment", "augmix"])
def test_peers_come_after_crop_and_flip(pixels, monkeypatch):
    import methods

    x, y = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    found = []
    for method in ("common", pixels):
        torch.manual_seed(0)
        augment = methods.make_method({"pixels": method})(nn.Conv2d(3, 1, 1), 2)
        images, classes = augment(x, y)
        assert torch.equal(classes, y)
        assert images.min() >= 0
        assert images.max() <= 1
        found.append(images)
    assert found[0].shape == found[1].shape == x.shape
    assert not torch.equal(found[0], found[1])
    given = []
    monkeypatch.setitem(methods.PEERS, pixels, lambda _: lambda image: given.append(image) or image)
    torch.manual_seed(0)
    methods.make_method({"pixels": pixels})(nn.Conv2d(3, 1, 1), 2)(x, y)
    torch.testing.assert_close(torch.stack(given) / 255, found[0])
    if pixels == "erasing":
        erased = (found[1] == 0).all(dim=1) & (found[0] != 0).any(dim=1)
        assert (erased.flatten(1).sum(dim=1) > 150).all()  # of 256, but for what was cropped


@pytest.mark.parametrize("pixels", ["mixup", "cutmix"])
def test_mixes_give_probabilities(pixels):
    import methods

    x, y = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    images, classes = methods.make_method({"pixels": pixels})(nn.Conv2d(3, 1, 1), 2)(x, y)
    assert images.shape == x.shape
    assert classes.shape == (4, 2)
    torch.testing.assert_close(classes.sum(dim=1), torch.ones(4))


def test_unmirrored_images_keep_their_sides():
    import methods

    x = torch.arange(256, dtype=torch.uint8).repeat(8, 1, 32, 1)[:, :, :, :32].contiguous()
    torch.manual_seed(0)
    plain, mirrored = (
        methods.crop_and_flip(x, flip)[:, 0, 4, 8:24].int().diff(dim=1) for flip in (False, True)
    )
    assert plain.unique().tolist() == [1]
    assert mirrored.unique().tolist() == [-1, 1]


def test_learning_rates():
    from protocol import Protocol, make_optimizer

    def rates(steps, **changes):
        parameter = nn.Linear(1, 1)
        optimizer, schedule = make_optimizer(parameter, Protocol(**changes), steps)
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    steps = rates(200, schedule="steps")  # the paper's epochs 60, 120 and 160
    at = [steps[i] for i in (0, 59, 60, 119, 120, 159, 160, 199)]
    expected = [0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008]
    assert at == pytest.approx(expected)
    quarters = rates(120, schedule="quarters")  # and 30, 60 and 90 of 120 on SVHN
    assert [quarters[i] for i in (29, 30, 90)] == pytest.approx([0.1, 0.01, 0.0001])
    cycle = rates(100)
    assert cycle[0] == pytest.approx(0.1 / 25)
    assert max(cycle) == pytest.approx(0.1)
    assert cycle.index(max(cycle)) in (29, 30)
    assert cycle[-1] < 1e-6
    for wrong in ({"schedule": "step"}, {"optimizer": "sdg"}):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            rates(1, **wrong)
    fading = rates(100, schedule="exponential", optimizer="adam", lr=0.01, final_lr=0.12)
    assert fading[50] == pytest.approx(0.01 * 0.12**0.5)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_well_formed(name):
    import methods
    import run
    from networks import NETWORKS
    from protocol import Protocol

    recipe = RECIPES[name]
    protocol = Protocol(**recipe["protocol"])
    assert recipe["title"]
    assert recipe["text"]
    assert set(recipe.get("paper", {})) <= set(recipe["methods"])
    model = NETWORKS[protocol.network](protocol.channels, 10, 4 if protocol.width > 6 else 6)
    model.mean = torch.zeros(1, protocol.channels, 1, 1)  # as a classifier of a run has
    for method in recipe["methods"]:
        settings = run.fill_settings(recipe, method, "float32")
        for part in run.list_perturbations(settings):
            part["flow"] = "pixels"  # theirs may not be here
            part.pop("levels", None)
            part.pop("resolution", None)
        assert isinstance(methods.make_method(settings)(model, 10), methods.Augmentation)


def test_a_recipe_is_in_one_file(tmp_path):
    from records import read_recipes

    assert read_recipes() == RECIPES
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"one": {}}))
    with pytest.raises(ValueError, match=r"b\.json has recipes that another file has.*'one'"):
        read_recipes(tmp_path)


def test_all_seeds_share_the_images_that_a_model_was_trained_on():
    own = {"glow-cifar10-5percent", "vae-gan-cifar10", "vae-gan-cifar10-600-epochs"}
    for name, recipe in RECIPES.items():
        if any(f'"{flow}"' in json.dumps(recipe) for flow in own):
            assert recipe["protocol"]["data_seed"] == 0, name


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["test", "validation"])
def test_runs_are_of_their_recipe(name, kind):
    import run
    from protocol import Protocol
    from records import RESULTS, read_lines

    recipe, found = RECIPES[name], []
    for entry in read_lines(RESULTS / f"{name}.{kind}.jsonl"):
        method, seed = entry["method"], entry["seed"]
        protocol = vars(run.fill_protocol(recipe, method, seed, test=kind == "test"))
        assert entry["recipe"] == name
        assert vars(Protocol(**entry["protocol"])) == protocol
        assert entry["settings"] == run.fill_settings(recipe, method, protocol["precision"])
        assert seed in recipe["methods"][method]["seeds"]
        found.append((method, seed))
    assert len(set(found)) == len(found)


def test_the_readme_names_every_recipe():
    readme = (EXAMPLES / "README.md").read_text()
    assert [name for name in RECIPES if f"`{name}`" not in readme] == []


def test_results_are_of_recipes():
    from records import RESULTS

    kinds = (".test.jsonl", ".validation.jsonl")
    known = {name + kind for name in RECIPES for kind in kinds}
    found = {path.name for path in RESULTS.iterdir()}
    assert found
    assert found <= known


def test_each_result_is_in_one_section():
    import draw
    from records import RESULTS

    drawn = [f"{name}.{s.kind}.jsonl" for s in draw.SECTIONS for name in s.columns.values()]
    assert len(set(drawn)) == len(drawn)
    assert {path.name for path in RESULTS.iterdir()} <= set(drawn)


def test_accuracy_is_drawn_against_images(tmp_path, monkeypatch):
    import draw

    for place in ("RESULTS", "PICTURES", "ROOT"):
        monkeypatch.setattr(draw, place, tmp_path)
    assert draw.draw_section(draw.FIGURE_2) == []
    drawn = []
    monkeypatch.setattr(draw, "Figure", lambda **_: Canvas(drawn))
    for method, size, seed, accuracy in (
        ("standard", 2400, 0, 80.0),
        ("standard", 600, 0, 70.0),
        ("standard", 600, 1, 72.0),
        ("VAE-GAN", 600, 0, 75.0),  # a single point is no line
    ):
        entry = {"method": method, "seed": seed, "train_images": size, "accuracy": accuracy}
        with (tmp_path / f"figure2-{size}.test.jsonl").open("a") as file:
            file.write(json.dumps({**entry, "device": "cpu"}) + "\n")
    assert any("figure2.png" in line for line in draw.draw_section(draw.FIGURE_2))
    draw.draw_labels()
    lines = {options["label"]: (points, options["yerr"]) for points, options in drawn}
    assert lines.keys() == {"standard", "no augmentation"}  # the README's own plot, too
    (sizes, means), errors = lines["standard"]
    assert (sizes, means) == ([600, 2400], [71.0, 80.0])
    assert errors == pytest.approx([2**0.5, 0])


class Canvas:
    """In place of a figure and its axes: keeps what is drawn."""

    def __init__(self, drawn):
        self.errorbar = lambda *points, **options: drawn.append((points, options))

        self.xaxis = self

    def subplots(self):
        return self

    def ignored(self, *arguments, **options):
        pass

    set = set_xticks = set_minor_formatter = legend = savefig = ignored


def test_a_flow_of_the_folder_comes_before_a_bundled_one(tmp_path):
    from methods import read_flow

    name = "glow-fashionmnist"
    bundled, other = load_flow(name).fingerprint(), random_glow()
    assert read_flow(name, tmp_path, None).fingerprint() == bundled
    other.save_pretrained(tmp_path / "flows" / name)
    assert read_flow(name, tmp_path / "flows", None).fingerprint() == other.fingerprint() != bundled
