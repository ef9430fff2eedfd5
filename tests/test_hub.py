"""Saving, finding and loading flows."""

import copy
import hashlib
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Identity, random_glow
from safetensors.torch import load_file, save_file
from torchvision.datasets import FashionMNIST

from latent_aug import Glow, LatentAdversarial, LatentPerturb, load_flow
from latent_aug.flows import hub
from latent_aug.flows.hub import bundled_flows
from latent_aug.utils import files


@pytest.fixture
def saved(tmp_path):
    random_glow().save_pretrained(tmp_path / "flow")
    return tmp_path / "flow"


def test_saved_and_loaded_is_the_same_flow(saved):
    flow, x = random_glow(), torch.rand(2, 3, 16, 16)
    for source in (saved, str(saved)):
        loaded = load_flow(source)
        assert isinstance(loaded, Glow)
        assert torch.equal(loaded.encode(x), flow.encode(x))
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())


def clothes(channels):
    """Real images, uint8: FashionMNIST's as they are, or tinted on 32x32."""
    data = Path(__file__).parent.parent / "examples" / "data"
    images = FashionMNIST(data, train=False).data[:40, None]
    if channels == 1:
        return images
    tint = torch.rand(40, channels, 1, 1)
    return torch.nn.functional.pad(tint * images, [2] * 4).byte()


def test_every_bundled_flow_loads_and_is_exact():
    names = {"glow-cifar10", "glow-cifar10-small", "glow-fashionmnist", "glow-photographs"}
    assert names == set(bundled_flows())
    for name, directory in bundled_flows().items():
        flow = load_flow(name)
        pixels = clothes(flow.channels)
        back = flow.decode(flow.encode(pixels / 255))
        assert torch.equal((back.clamp(0, 1) * 255).round().byte(), pixels)
        assert (directory / "README.md").is_file()


def test_a_bundled_flow_that_was_changed_is_refused(monkeypatch):
    for name, directory in bundled_flows().items():
        digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
        assert hub.SHA256[name] == digest
    monkeypatch.setitem(hub.SHA256, "glow-fashionmnist", 64 * "0")
    with pytest.raises(OSError, match="was changed; install"):
        load_flow("glow-fashionmnist")


def test_images_off_a_flow_s_data_come_back_as_they_were():
    checkerboard = 255 * ((torch.arange(32)[:, None] + torch.arange(32)) % 2).byte()
    noise = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    images = torch.stack([checkerboard.expand(3, 32, 32), noise, clothes(3)[0]])
    transform = LatentPerturb(0.25, flow="glow-cifar10-small")
    out = transform(images)
    assert torch.equal(out[:2], images[:2])
    assert not torch.equal(out[2], images[2])
    assert transform.fallbacks == 2


def test_bundled_flows_fit_into_the_wheel():
    weights = [d / "model.safetensors" for d in bundled_flows().values()]
    assert sum(w.stat().st_size for w in weights) < 16 * 2**20


def test_half_precision_weights_are_read(saved):
    path = saved / "model.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path)
    assert next(load_flow(saved).parameters()).dtype == torch.float32


def test_each_caller_gets_a_flow_of_its_own(saved):
    first, second = load_flow(saved), load_flow(saved)
    with torch.no_grad():
        next(first.parameters()).add_(1)
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


def test_transforms_share_a_flow_until_its_file_changes(saved):
    first, second = (LatentPerturb(flow=saved).flow for _ in range(2))
    assert first is second
    random_glow(seed=1).save_pretrained(saved)
    assert LatentPerturb(flow=saved).flow is not first


def test_a_full_disk_leaves_the_flow_that_was_there(saved, monkeypatch):
    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        random_glow(seed=1).save_pretrained(saved)
    assert load_flow(saved).fingerprint() == random_glow().fingerprint()
    assert not list(saved.glob(".*"))


def test_loading_leaves_the_random_state_alone(saved):
    state = torch.get_rng_state()
    load_flow(saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_in_inference_mode_gives_a_flow_for_gradients(saved):
    with torch.inference_mode():
        flow = load_flow(saved)
    z = torch.zeros(1, 3, 16, 16, requires_grad=True)
    flow.decode(z).sum().backward()
    assert z.grad is not None


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"no flow 'glow-imagenet'.*glow-fashionmnist"):
        load_flow("glow-imagenet")


def test_a_revision_is_for_the_hub():
    with pytest.raises(ValueError, match="revision is for"):
        load_flow("glow-fashionmnist", revision="main")


def test_weights_are_readable_by_others(saved):
    assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode


def test_a_flow_in_lower_precision_is_pickled_with_it(saved):
    flow = load_flow(saved)
    flow.network_dtype = torch.bfloat16
    transform = pickle.loads(pickle.dumps(LatentPerturb(flow=flow)))
    assert transform.flow.network_dtype == torch.bfloat16


def test_an_unfinished_run_is_said_to_be_one(tmp_path):
    (tmp_path / "run.pt").touch()
    with pytest.raises(OSError, match="unfinished training run"):
        load_flow(tmp_path)


def test_an_empty_directory_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"holds no flow: there is no config\.json"):
        load_flow(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"levels": 3}, "does not fit"),
        ({"hidden": 9}, "has shape"),
        ({"hidden": -1}, "hidden must be"),
        ({"hidden": 10**9}, "hidden must be"),
        ({"channels": 64, "levels": 8, "steps": 256, "hidden": 4096}, "parameters"),
        ({"steps": "2"}, "steps must be"),
        ({"log_scale_bound": None}, "log_scale_bound"),
        ({"log_scale_bound": float("nan")}, "log_scale_bound"),
        ({"architecture": "Identity2"}, "unknown architecture"),
        ({"architecture": ["Glow"]}, "unknown architecture"),
        ({"surprise": 1}, "keys"),
    ],
)
def test_a_config_from_outside_is_checked(saved, change, words):
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=words):
        load_flow(saved)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 60000, "3", "\x00" * 70000])
def test_a_broken_config_is_a_value_error(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config"):
        load_flow(saved)


class TestWeights:
    def change(self, saved, function):
        path = saved / "model.safetensors"
        tensors = load_file(path)
        function(tensors)
        save_file(tensors, path)

    def test_missing_and_unexpected_keys_are_named(self, saved):
        name = next(iter(load_file(saved / "model.safetensors")))
        self.change(saved, lambda t: t.update(extra=t.pop(name)))
        with pytest.raises(ValueError, match=rf"missing: \['{name}'\], unexpected: \['extra'\]"):
            load_flow(saved)

    def test_non_finite_weights_are_refused(self, saved):
        self.change(saved, lambda t: next(iter(t.values())).fill_(float("nan")))
        with pytest.raises(ValueError, match="finite"):
            load_flow(saved)

    def test_a_truncated_file_is_refused(self, saved):
        path = saved / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match="safetensors"):
            load_flow(saved)

    def test_a_pickle_is_never_read(self, saved):
        (saved / "model.safetensors").unlink()
        torch.save({}, saved / "pytorch_model.bin")
        with pytest.raises(OSError, match=r"model\.safetensors"):
            load_flow(saved)


def test_a_home_directory_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    random_glow().save_pretrained("~/copy")
    assert load_flow("~/copy").fingerprint() == load_flow(tmp_path / "copy").fingerprint()


def test_a_card_in_another_encoding_is_no_obstacle(saved):
    (saved / "README.md").write_bytes("Größe".encode("latin-1"))
    assert load_flow(saved).card == saved / "README.md"


def test_a_config_that_from_config_takes_apart(tmp_path):
    class Wide(Identity):
        def __init__(self, width):
            super().__init__()
            self.width = width

        @property
        def config(self):
            return {"width": {2: self.width, 10: 1}}

        @classmethod
        def from_config(cls, config):
            return cls(config.pop("width")["2"])

    Wide(7).save_pretrained(tmp_path)
    assert load_flow(tmp_path).width == 7


def test_a_home_made_flow_can_be_saved_and_loaded(tmp_path):
    class Shifted(Identity):
        def __init__(self, channels):
            super().__init__()
            self.channels = channels
            self.shift = torch.nn.Parameter(torch.rand(channels, 1, 1))
            self.register_buffer("order", torch.arange(3))

        def encode(self, x, y=None):
            return x - self.shift

        @property
        def config(self):
            return {"channels": self.channels}

        @classmethod
        def from_config(cls, config):
            return cls(**config)

    flow = Shifted(3)
    flow.save_pretrained(tmp_path)
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(load_flow(tmp_path).encode(x), flow.encode(x))


def test_a_copy_has_the_weights_of_a_file_that_is_another_now(saved):
    transform = LatentPerturb(flow=saved)
    kept = transform.flow.state_dict()
    random_glow(seed=1).save_pretrained(saved)
    for copied in (copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))):
        state = copied(transform).flow.state_dict()
        assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_a_directory_named_like_a_bundled_flow_is_mentioned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_glow().save_pretrained("glow-fashionmnist")
    with pytest.warns(UserWarning, match=r"directory of this name is '\./glow-fashionmnist'"):
        assert load_flow("glow-fashionmnist").channels == 1
    assert load_flow("./glow-fashionmnist").channels == 3


def test_a_flow_tuned_by_a_fused_optimizer_is_pickled_with_its_weights(saved):
    flow = load_flow(saved).requires_grad_(True)
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1, fused=True)
    flow.log_prob(torch.rand(2, 3, 8, 8)).mean().backward()
    optimizer.step()
    assert not flow.is_as_loaded()
    other = pickle.loads(pickle.dumps(LatentPerturb(flow=flow))).flow
    assert torch.equal(next(other.parameters()), next(flow.parameters()))


def test_weights_can_be_pinned_by_their_sha256():
    known = hub.SHA256["glow-fashionmnist"]
    assert load_flow("glow-fashionmnist", sha256=known.upper()).channels == 1
    with pytest.raises(OSError, match=f"'glow-fashionmnist' have SHA-256 {known}.*trained anew"):
        load_flow("glow-fashionmnist", sha256=64 * "0")
    with pytest.raises(TypeError, match="sha256 must be a string"):
        load_flow("glow-fashionmnist", sha256=5)


def test_a_pickle_imports_the_class_of_a_user_s_flow(tmp_path):
    (tmp_path / "own_flows.py").write_text(
        "from latent_aug import Flow\n"
        "class Own(Flow):\n"
        "    channels = 3\n"
        "    config = {}\n"
        "    @classmethod\n"
        "    def from_config(cls, config): return cls()\n"
        "    def encode(self, x, y=None): return x\n"
        "    def decode(self, z, y=None): return z\n"
    )
    (tmp_path / "make.py").write_text(
        "import pickle, own_flows\n"
        "from latent_aug import LatentPerturb, load_flow\n"
        "own_flows.Own().save_pretrained('saved')\n"
        "transform = LatentPerturb(flow=load_flow('saved'))\n"
        "open('pickled', 'wb').write(pickle.dumps(transform))\n"
    )
    read = "import pickle; print(type(pickle.load(open('pickled', 'rb')).flow).__name__)"
    for arguments in (["make.py"], ["-c", read]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
    assert done.stdout.split() == ["Own"]


def test_a_pickle_refuses_other_weights_of_the_same_name(saved):
    pickled = pickle.dumps(LatentPerturb(flow=saved))
    assert pickle.loads(pickled).flow.channels == 3
    random_glow(seed=1).save_pretrained(saved)
    with pytest.raises(OSError, match=r"made with other weights of .*trained anew"):
        pickle.loads(pickled)


def test_the_same_flow_is_the_default_everywhere():
    typer = pytest.importorskip("typer")
    from latent_aug.cli import app

    functions = (LatentPerturb, LatentAdversarial)
    names = {inspect.signature(function).parameters["flow"].default for function in functions}
    names.add(inspect.signature(load_flow).parameters["name_or_path"].default)
    options = typer.main.get_command(app).commands["augment"].params
    names.add(next(option.default for option in options if option.name == "flow"))
    assert names == {"glow-photographs"}
