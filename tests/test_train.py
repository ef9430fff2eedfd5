"""Training flows: it learns, it resumes exactly, it stops on nonsense."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import stripes
from PIL import Image

from latent_aug import Glow, LatentPerturb, TrainConfig, load_flow, train_flow
from latent_aug.flows.backend import list_settings
from latent_aug.images.datasets import UInt8Images
from latent_aug.training.processes import Processes
from latent_aug.training.report import PAIRS_NAME, SAMPLES_NAME, append_to_log, read_minutes
from latent_aug.training.train import Run


def small_flow():
    torch.manual_seed(0)
    return Glow(1, levels=1, steps=2, hidden=8)


def config(output, **changes):
    settings = {"steps": 12, "batch_size": 16, "warmup": 2, "network_dtype": "float32"}
    return TrainConfig(output=output, **{**settings, "crop": 1, "noise": 0.02, **changes})


def weights(flow):
    return torch.cat([p.flatten() for p in flow.parameters()])


def test_it_learns_and_writes_what_it_returns(tmp_path):
    untrained = small_flow()
    untrained.initialize(stripes() / 255)
    flow = train_flow(
        small_flow(),
        stripes(),
        config(tmp_path, steps=150, lr=5e-3, ema=0.9, crop=0, noise=0.0),
        validation=stripes(20),
        progress=False,
    )
    before, after = (f.bits_per_dim(stripes() / 255).mean() for f in (untrained, flow))
    assert after < before - 0.5
    assert torch.equal(weights(load_flow(tmp_path)), weights(flow))
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 150
    assert last["validation_bits_per_dim"] == pytest.approx(after.item(), abs=0.3)
    for picture in ("samples.png", "reconstructions.png"):
        assert (tmp_path / picture).stat().st_size > 0


def test_arguments_of_another_type_are_named(tmp_path):
    with pytest.raises(TypeError, match=r"flow must be a Flow, .* got 'glow-fashionmnist'"):
        train_flow("glow-fashionmnist", stripes(), config(tmp_path))
    with pytest.raises(TypeError, match="config must be a TrainConfig, got a dict"):
        train_flow(small_flow(), stripes(), {"steps": 3})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whatever_mode_the_caller_is_in(tmp_path, mode):
    expected = train_flow(small_flow(), stripes(), config(tmp_path / "a"), progress=False)
    with mode():
        found = train_flow(small_flow(), stripes(), config(tmp_path / "b"), progress=False)
    assert torch.equal(weights(found), weights(expected))
    assert not any(p.is_inference() for p in found.parameters())


def test_noise_is_added_to_the_images(tmp_path, monkeypatch):
    seen, log_prob = [], Glow.log_prob

    def recorded(self, x, y=None):
        seen.append(x.detach())
        return log_prob(self, x, y)

    monkeypatch.setattr(Glow, "log_prob", recorded)
    runs = []
    for noise in (0.0, 0.1):
        seen.clear()
        train_flow(small_flow(), stripes(), config(tmp_path / str(noise), noise=noise, steps=2))
        runs.append(torch.cat(seen[:2]))
    plain, noisy = runs
    inside = (plain > 0.3) & (plain < 0.7)  # where three standard deviations are not clamped
    assert (noisy - plain)[inside].std() == pytest.approx(0.1, rel=0.1)
    assert (noisy - plain)[inside].mean().abs() < 0.01
    assert -1 / 255 < noisy.min() < noisy.max() < 256 / 255


def test_interrupted_and_resumed_is_as_if_undisturbed(tmp_path, monkeypatch):
    undisturbed = train_flow(small_flow(), stripes(), config(tmp_path / "a"), progress=False)
    original, calls = Run.train_step, []

    def interrupted(self, *batch):
        calls.append(self.step)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(self, *batch)

    monkeypatch.setattr(Run, "train_step", interrupted)
    every_step = config(tmp_path / "b", checkpoint_minutes=0)
    with pytest.raises(KeyboardInterrupt):
        train_flow(small_flow(), stripes(), every_step, progress=False)
    torch.manual_seed(123)  # the global random state has no say
    resumed = train_flow(small_flow(), stripes(), every_step, progress=False)
    assert calls == [*range(7), *range(6, 12)]
    assert torch.equal(weights(resumed), weights(undisturbed))


KILLED = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_train import *
save = torch.save

def cut_off(state, path):
    save(state, path)
    if state["step"] == 7:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = cut_off
train_flow(small_flow(), stripes(), config(sys.argv[1], checkpoint_minutes=0), progress=False)
"""


def test_killed_while_saving_and_resumed_is_as_if_undisturbed(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "a").glob(".*.partial"))
    assert not (tmp_path / "a" / "model.safetensors").exists()
    resumed, undisturbed = (
        train_flow(small_flow(), stripes(), config(tmp_path / name), progress=False)
        for name in "ab"
    )
    assert torch.equal(weights(resumed), weights(undisturbed))
    assert not list((tmp_path / "a").glob(".*.partial"))
    steps = [json.loads(x)["step"] for x in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 8), 12]  # resumed at the sixth, which was whole


def test_a_state_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("unexpected pos 65088 vs 64980")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"run\.pt cannot be written: unexpected pos"):
        train_flow(small_flow(), stripes(), config(tmp_path), progress=False)


def test_seeds_decide(tmp_path):
    trained = []
    for seed in (0, 1, 2**40):
        flow = small_flow()
        flow.initialize(stripes() / 255)  # else the first batch would tell the seeds apart
        settings = config(tmp_path / str(seed), seed=seed)
        trained.append(weights(train_flow(flow, stripes(), settings, progress=False)))
    first, second, third = trained
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_other_images_or_another_start_do_not_resume(tmp_path):
    train_flow(small_flow(), stripes(), config(tmp_path / "a", steps=2), progress=False)
    with pytest.raises(ValueError, match="data: another digest"):
        train_flow(small_flow(), 255 - stripes(), config(tmp_path / "a", steps=2), progress=False)
    trained = load_flow(tmp_path / "a")
    with pytest.raises(ValueError, match="start: another digest"):
        train_flow(trained, stripes(), config(tmp_path / "a", steps=2), progress=False)


def test_a_fine_tuned_flow_does_not_go_by_its_first_name(tmp_path):
    train_flow(small_flow(), stripes(), config(tmp_path / "a", steps=2), progress=False)
    start = load_flow(tmp_path / "a")
    tuned = train_flow(start, stripes(), config(tmp_path / "b", steps=2), progress=False)
    assert (tuned.loaded_from, tuned.read_from, tuned.card) == (None, None, None)
    assert str(tmp_path / "a") not in repr(LatentPerturb(flow=tuned))


def test_another_recipe_does_not_overwrite_a_run(tmp_path):
    train_flow(small_flow(), stripes(), config(tmp_path, steps=2), progress=False)
    with pytest.raises(ValueError, match=r"other settings \(recipe: lr 0.001, now 0.1\)"):
        train_flow(small_flow(), stripes(), config(tmp_path, steps=2, lr=0.1), progress=False)
    with pytest.raises(ValueError, match="architecture: steps 2, now 1"):
        train_flow(
            Glow(1, levels=1, steps=1, hidden=8),
            stripes(),
            config(tmp_path, steps=2),
            progress=False,
        )


def test_a_run_begun_before_there_was_noise_goes_on(tmp_path):
    how = config(tmp_path, steps=2, noise=0.0)
    train_flow(small_flow(), stripes(), how, progress=False)
    saved = torch.load(tmp_path / "run.pt")
    del saved["recipe"]["noise"]
    torch.save(saved, tmp_path / "run.pt")
    train_flow(small_flow(), stripes(), how, progress=False)
    with pytest.raises(ValueError, match=r"recipe: noise 0.0, now 0.02"):
        train_flow(small_flow(), stripes(), config(tmp_path, steps=2), progress=False)


def test_a_non_finite_loss_stops_with_the_step(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: loss .*run\.pt"):
        train_flow(
            small_flow(),
            stripes(),
            config(tmp_path, steps=50, lr=1e30, warmup=0, clip_norm=1e30),
            progress=False,
        )
    assert not (tmp_path / "model.safetensors").exists()


def test_a_short_run_is_not_averaged_with_its_untrained_weights(tmp_path):
    """With a constant decay of 0.998 the start would keep nine tenths of the weight."""
    run = config(tmp_path, steps=50, lr=5e-3)
    flow = train_flow(small_flow(), stripes(), run, validation=stripes(40), progress=False)
    before = small_flow()
    before.initialize(stripes() / 255)
    gained = before.bits_per_dim(stripes() / 255).mean() - flow.bits_per_dim(stripes() / 255).mean()
    assert gained > 0.3


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_images_of_other_channels_are_trained_and_drawn_as_colours_or_grey(tmp_path, channels):
    images = stripes().expand(-1, channels, -1, -1)
    flow = Glow(channels, levels=1, steps=1, hidden=4)
    train_flow(flow, images, config(tmp_path, steps=2), progress=False)
    assert load_flow(tmp_path).channels == channels
    for name in (SAMPLES_NAME, PAIRS_NAME):
        with Image.open(tmp_path / name) as picture:
            assert picture.mode == "RGB"


def test_sizes_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"images are 8x8.*divisible by 16"):
        train_flow(Glow(1, levels=4, steps=1, hidden=4), stripes(), config(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_fine_tuning_starts_from_the_given_flow(tmp_path):
    first = train_flow(small_flow(), stripes(), config(tmp_path / "a", steps=60), progress=False)
    start = weights(first).clone()
    tuned = train_flow(
        load_flow(tmp_path / "a"),
        stripes(),
        config(tmp_path / "b", steps=2, lr=1e-6),
        progress=False,
    )
    assert not torch.equal(weights(tuned), start)
    assert (weights(tuned) - start).abs().max() < 1e-4


def test_workers_change_nothing(tmp_path, monkeypatch):
    expected = train_flow(small_flow(), stripes(), config(tmp_path / "a", steps=3), progress=False)
    monkeypatch.setattr(UInt8Images.__init__, "__defaults__", (None, 0))  # keep none in memory
    flow = train_flow(
        small_flow(), stripes(), config(tmp_path / "b", steps=3, workers=2), progress=False
    )
    assert torch.equal(weights(flow), weights(expected))


def test_low_precision_networks_train(tmp_path):
    flow = train_flow(
        small_flow(), stripes(), config(tmp_path, network_dtype="bfloat16"), progress=False
    )
    assert flow.network_dtype is None
    assert next(flow.parameters()).dtype == torch.float32


def test_the_caller_s_flow_keeps_its_precision_also_when_stopped(tmp_path, monkeypatch):
    def stopped(run, *batch):
        assert run.flow.network_dtype is torch.bfloat16
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train_step", stopped)
    for own in (None, torch.float16):
        flow, low = small_flow(), config(tmp_path / str(own), network_dtype="bfloat16")
        flow.network_dtype = own
        with pytest.raises(KeyboardInterrupt):
            train_flow(flow, stripes(), low, progress=False)
        assert flow.network_dtype is own


@pytest.mark.parametrize("left", [0, 1000])
def test_a_damaged_state_is_named(tmp_path, left):
    train_flow(small_flow(), stripes(), config(tmp_path), progress=False)
    os.truncate(tmp_path / "run.pt", left)
    with pytest.raises(OSError, match=r"run\.pt, the state of the run, cannot be read; delete it"):
        train_flow(small_flow(), stripes(), config(tmp_path), progress=False)


def test_what_is_no_state_of_a_run_is_named(tmp_path):
    torch.save([1, 2], tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt is not the state of a training run"):
        train_flow(small_flow(), stripes(), config(tmp_path), progress=False)


def test_gradients_of_float32_are_so_whatever_torch_may_use(tmp_path, monkeypatch):
    def is_full():
        return all(setting.read() in setting.wanted for setting in list_settings("cpu"))

    found = []
    monkeypatch.setattr(
        Processes,
        "backward",
        lambda self, loss: (found.append(is_full()), loss.backward()),
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        train_flow(small_flow(), stripes(), config(tmp_path, steps=1), progress=False)
        assert not is_full()
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == [True]


def test_a_torn_line_of_the_log_harms_no_other(tmp_path):
    append_to_log(tmp_path, {"minutes": 1.0})
    os.truncate(tmp_path / "log.jsonl", 5)
    append_to_log(tmp_path, {"minutes": 2.0})
    assert read_minutes(tmp_path) == 2


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([], "dataset must have a length above 0"),
        (torch.zeros(4, 3, 8, 8).byte(), r"a tensor \(1, H, W\), got \(3, 8, 8\)"),
        ([torch.zeros(1, 8, 8).byte(), torch.zeros(1, 8, 16).byte()], "give a size"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint16), "must be uint8.*got torch.uint16"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.int64), "must be uint8.*got torch.int64"),
    ],
)
def test_bad_data_is_named(tmp_path, dataset, words):
    with pytest.raises((ValueError, TypeError), match=words):
        train_flow(small_flow(), dataset, config(tmp_path), progress=False)


def test_a_flow_is_not_overwritten(tmp_path):
    small_flow().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a flow and no state of its training"):
        train_flow(load_flow(tmp_path), stripes(), config(tmp_path), progress=False)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["README.md", "config.json", "figures.json", "log.jsonl"])
def test_other_files_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=f"holds {name}, which would be overwritten"):
        train_flow(small_flow(), stripes(), config(tmp_path), progress=False)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        (name, b"somebody's")
    ]


def test_a_run_killed_before_its_first_state_begins_anew(tmp_path):
    expected = train_flow(small_flow(), stripes(), config(tmp_path / "a"), progress=False)
    train_flow(small_flow(), stripes(), config(tmp_path / "b"), progress=False)
    for name in ("run.pt", "model.safetensors", "config.json"):
        (tmp_path / "b" / name).unlink(missing_ok=True)
    again = train_flow(small_flow(), stripes(), config(tmp_path / "b"), progress=False)
    assert again.fingerprint() == expected.fingerprint()


def test_the_caller_s_random_state_stays(tmp_path):
    flow, before = small_flow(), torch.get_rng_state()
    train_flow(flow, stripes(), config(tmp_path, steps=2), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_crop_that_may_lie_beside_the_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="crop must be less than a side of the images, 8 pixels"):
        train_flow(small_flow(), stripes(), config(tmp_path, crop=8), progress=False)


def test_validation_images_that_do_not_fit_are_refused_at_the_start(tmp_path):
    odd = torch.zeros(4, 1, 7, 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match="sides divisible by 2"):
        train_flow(small_flow(), stripes(), config(tmp_path), validation=odd, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_notebook_s_cell_goes_on_when_it_is_run_again(tmp_path, monkeypatch):
    """The call gets the flow that it got before: training has left it as it was."""
    expected = train_flow(small_flow(), stripes(), config(tmp_path / "a"), progress=False)
    flow, step = small_flow(), Run.train_step
    before = [parameter.clone() for parameter in flow.parameters()]

    def stopped(run, *batch):
        if run.step == 5:
            run.save()
            raise KeyboardInterrupt
        return step(run, *batch)

    monkeypatch.setattr(Run, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_flow(flow, stripes(), config(tmp_path / "b"), progress=False)
    monkeypatch.setattr(Run, "train_step", step)
    again = train_flow(flow, stripes(), config(tmp_path / "b"), progress=False)
    assert torch.equal(weights(again), weights(expected))
    assert not flow.is_initialized()
    assert all(map(torch.equal, before, flow.parameters()))
    with pytest.raises(ValueError, match="start: another digest"):
        train_flow(again, stripes(), config(tmp_path / "b"), progress=False)


@pytest.mark.parametrize("trained", [False, True])
def test_the_flow_that_is_given_stays_as_it_is(tmp_path, trained):
    flow = small_flow()
    if trained:
        flow.initialize(stripes() / 255)
        flow.requires_grad_(False).eval()
    state = {name: value.clone() for name, value in flow.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in flow.parameters()]
    result = train_flow(flow, stripes(), config(tmp_path), progress=False)
    assert result is not flow
    assert flow.training is not trained
    assert [(p.requires_grad, p.grad) for p in flow.parameters()] == flags
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())
