"""The hub's own client against a hub on 127.0.0.1."""

import copy
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import HUB, random_glow

from latent_aug import LatentPerturb, load_flow

REPO = "someone/my-flow"

# The client's own, of the library it sends requests with.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one flow, and an empty cache."""
    constants = huggingface_hub.constants
    assert HUB.url == constants.ENDPOINT
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    HUB.forget()
    random_glow().save_pretrained(tmp_path / "flow")
    HUB.commit(REPO, contents(tmp_path / "flow"))
    return HUB


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def same(flow, other):
    x = torch.rand(2, 3, 16, 16)
    return torch.equal(flow.encode(x), other.encode(x))


def load_again(name):
    """Clients before 1.0 leave it to the user to try a broken download again."""
    try:
        return load_flow(name)
    except OSError:
        assert int(huggingface_hub.__version__.split(".")[0]) < 1
        return load_flow(name)


def test_a_flow_is_downloaded_once(hub):
    assert same(load_flow(REPO), random_glow())
    assert any("/cdn/" in call for call in hub.calls)
    hub.calls.clear()
    assert same(load_flow(REPO), random_glow())
    assert not any("/cdn/" in call for call in hub.calls)


def test_a_cached_pinned_commit_needs_no_network(hub):
    commit = hub.heads[REPO]
    load_flow(REPO, revision=commit)
    hub.calls.clear()
    assert same(load_flow(REPO, revision=commit), random_glow())
    assert hub.calls == []


def test_another_commit_is_another_flow(hub, tmp_path):
    before = hub.heads[REPO]
    random_glow(seed=1).save_pretrained(tmp_path / "other")
    hub.commit(REPO, contents(tmp_path / "other"))
    assert same(load_flow(REPO, revision=before), random_glow())
    assert same(load_flow(REPO), random_glow(seed=1))


def test_only_config_and_weights_are_fetched(hub):
    hub.commit(REPO, {"pytorch_model.bin": b"a pickle", "big.bin": bytes(1000)})
    directory = Path(load_flow(REPO).loaded_from[0])
    assert not directory.exists()  # it is remembered by its name
    assert not any("bin" in call for call in hub.calls)


def test_a_cut_download_goes_on_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults["/cdn/"] = "cut"
    assert same(load_again(REPO), random_glow())
    assert sum("GET /cdn/" in call for call in hub.calls) == 2
    weights = hub.commits[REPO, hub.heads[REPO]]["model.safetensors"]
    assert 0 < hub.ranges[-1] <= len(weights) // 2


def test_a_server_error_is_tried_again(hub):
    hub.faults["/cdn/"] = "500"
    assert same(load_flow(REPO), random_glow())


def test_wrong_bytes_are_refused_and_not_kept(hub):
    hub.faults["/cdn/"] = "wrong"
    with pytest.raises((ValueError, OSError), match=r"(?i)sha|checksum|consistency|safetensors"):
        load_flow(REPO)
    assert same(load_flow(REPO), random_glow())


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9", "html"])
def test_what_is_no_hub_is_named(hub, monkeypatch, endpoint):
    if endpoint == "html":
        hub.faults["/api/"] = "html"
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    with pytest.raises(OSError, match=rf"{REPO} could not be read from the hub at .*HF_ENDPOINT"):
        load_flow(REPO)


@pytest.mark.parametrize("name", ["my flows/x", "nothere/", "a/..", "a/b/c"])
def test_what_is_no_repository_s_name_is_a_missing_directory(hub, name):
    with pytest.raises(ValueError, match=f"there is no flow {name!r}"):
        load_flow(name)
    assert hub.calls == []


@pytest.mark.parametrize("name", ["someone/nothing", "nobody/my-flow"])
def test_an_unknown_repository_lists_what_is_bundled(hub, name):
    with pytest.raises(OSError, match=r"glow-cifar10.*glow-fashionmnist"):
        load_flow(name)


def test_an_unknown_revision_is_named(hub):
    with pytest.raises(OSError, match="v9"):
        load_flow(REPO, revision="v9")


def test_a_repository_without_a_flow_is_an_error(hub):
    hub.commit("someone/text", {"README.md": b"hello"})
    with pytest.raises(OSError, match=r"config\.json"):
        load_flow("someone/text")


def test_a_private_repository_takes_the_usual_token(hub, monkeypatch):
    hub.private.add(REPO)
    with pytest.raises(OSError, match=r"(?i)gated|access|token"):
        load_flow(REPO)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert same(load_flow(REPO), random_glow())


def test_pushed_and_pulled_back_bit_for_bit(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    flow = random_glow(seed=3)
    address = flow.push_to_hub("someone/pushed")
    assert address.startswith(f"{hub.url}/someone/pushed/commit/")
    loaded = load_flow("someone/pushed", revision=address.rsplit("/", 1)[1])
    for name, tensor in flow.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    files = hub.commits["someone/pushed", hub.heads["someone/pushed"]]
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    assert "library_name: latent-aug" in files["README.md"].decode()


def test_a_push_without_a_hub_is_an_os_error(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        random_glow().push_to_hub(REPO)


def test_a_new_repository_is_private_if_asked_for(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    random_glow().push_to_hub("someone/secret", private=True)
    random_glow().push_to_hub(REPO, private=True)
    assert hub.private == {"someone/secret"}
    assert same(load_flow("someone/secret"), random_glow())


def test_a_bundled_flow_is_pushed_with_its_card(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    load_flow("glow-fashionmnist").push_to_hub("someone/fashion")
    files = hub.commits["someone/fashion", hub.heads["someone/fashion"]]
    card = files["README.md"].decode()
    assert f"`{hashlib.sha256(files['model.safetensors']).hexdigest()}`" in card
    assert "bits per dimension" in card
    assert 'LatentPerturb(eps=0.33, flow="someone/fashion")' in card


@pytest.mark.parametrize("change", [copy.copy, copy.deepcopy])
def test_a_card_names_the_repository_wherever_the_flow_lay(hub, monkeypatch, tmp_path, change):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    shutil.copytree(load_flow("glow-fashionmnist").card.parent, tmp_path / "renamed")
    with (tmp_path / "renamed" / "README.md").open("a") as card:
        card.write("`latent-aug train DATA --init glow-fashionmnist --output DIRECTORY`\n")
    change(load_flow(tmp_path / "renamed")).push_to_hub("someone/moved")
    card = hub.commits["someone/moved", hub.heads["someone/moved"]]["README.md"].decode()
    assert 'flow="someone/moved"' in card
    assert "DATA --init someone/moved --output" in card


def test_a_card_s_pictures_are_pushed_with_it_until_the_weights_change(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    (tmp_path / "flow" / "README.md").write_text("![samples](samples.png)")
    (tmp_path / "flow" / "samples.png").write_bytes(b"a picture")
    (tmp_path / "flow" / "reconstructions.png").write_bytes(b"training images")
    flow = load_flow(tmp_path / "flow")
    flow.push_to_hub("someone/pictured")
    files = hub.commits["someone/pictured", hub.heads["someone/pictured"]]
    assert files["samples.png"] == b"a picture"
    assert "reconstructions.png" not in files
    assert files["README.md"] == b"![samples](samples.png)"
    with torch.no_grad():
        next(flow.parameters()).add_(1)
    flow.push_to_hub("someone/changed")
    files = hub.commits["someone/changed", hub.heads["someone/changed"]]
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    assert b"samples.png" not in files["README.md"]


def test_a_card_of_other_weights_is_not_pushed(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    flow = load_flow("glow-photographs")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "README.md").write_bytes(flow.card.read_bytes())
    for name, changed in (("same", 0.0), ("other", 1.0)):
        with torch.no_grad():
            next(flow.parameters()).add_(changed)
        flow.save_pretrained(tmp_path / "copy")
        load_flow(tmp_path / "copy").push_to_hub(f"someone/{name}")
        card = hub.commits[f"someone/{name}", hub.heads[f"someone/{name}"]]["README.md"]
        assert (b"SHA-256 of" in card) is (name == "same")


def test_a_transform_is_pickled_by_the_commit_it_holds(hub, tmp_path):
    held = pickle.dumps(LatentPerturb(flow=REPO))
    random_glow(seed=1).save_pretrained(tmp_path / "other")
    hub.commit(REPO, contents(tmp_path / "other"))
    assert len(held) < 5000
    assert same(pickle.loads(held).flow, random_glow())


LOAD_TWO = f"""
from latent_aug import load_flow
for name in ("someone/nothing", {REPO!r}):
    try:
        print(load_flow(name).hidden)
    except OSError as error:
        print(error)
"""


def test_the_environment_s_variables_are_obeyed(hub, tmp_path):
    """As a user sets them, each time in a fresh process: a mirror and a cache, then offline."""
    settings = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}

    def run(offline):
        environment = {**settings, "HF_HUB_OFFLINE": offline}
        command = [sys.executable, "-c", LOAD_TWO]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    *_, width = run("0")
    assert width == "8"
    hub.calls.clear()
    nothing, width = run("1")
    assert "someone/nothing; as a repository on the hub" in nothing
    assert width == "8"
    assert hub.calls == []
