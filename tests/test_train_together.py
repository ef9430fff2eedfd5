"""Training in two processes: as in one, resumable by any number, and no hang when one dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import stripes
from test_train import config, small_flow, weights
from torchvision.transforms.v2.functional import to_pil_image

from latent_aug import load_flow, train_flow
from latent_aug.processes import Processes, accelerator_for

psutil = pytest.importorskip("psutil", reason="accelerate brings it")
pytest.importorskip("accelerate")

TOGETHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Name of a run: its settings. 15 images over two processes are 7 and 8, accumulated in 3 parts.
RUNS = {
    "even": {"checkpoint_minutes": 0},
    "odd": {"checkpoint_minutes": 0, "batch_size": 15, "accumulate": 3},
}
WORKER = f"""
import json, sys, warnings
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_train_together import *

warnings.simplefilter("error")
place, together = Path(sys.argv[1]), Processes()
flows = {{n: train_flow(small_flow(), stripes(), config(place / n, **RUNS[n])) for n in RUNS}}
torch.save({{n: weights(flow) for n, flow in flows.items()}}, place / f"{{together.rank}}.pt")
images = stripes() + together.rank
said = []
for data, name, changes in (
    (stripes(), "few", {{"batch_size": 1}}),
    (images, "other", {{}}),
    (stripes(), "even", {{"lr": 1.0}}),
):
    try:
        train_flow(small_flow(), data, config(place / name, **changes))
    except ValueError as error:
        said.append(str(error))
(place / f"{{together.rank}}.json").write_text(json.dumps(said))
together.leave()
"""


def losses(output):
    lines = (output / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["train_bits_per_dim"] for line in lines]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes left."""
    place = tmp_path_factory.mktemp("together")
    script = place / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [*TOGETHER, script, place], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return place


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(together, tmp_path, name):
    alone = train_flow(small_flow(), stripes(), config(tmp_path, **RUNS[name]), progress=False)
    assert losses(together / name) == pytest.approx(losses(tmp_path), abs=2e-5)
    ours = weights(load_flow(together / name))
    torch.testing.assert_close(ours, weights(alone), atol=1e-4, rtol=0)
    assert not torch.equal(ours, weights(small_flow()))


def test_all_processes_return_what_one_has_written(together):
    returned = [torch.load(together / f"{rank}.pt") for rank in range(2)]
    for name in RUNS:
        written = weights(load_flow(together / name))
        assert all(torch.equal(each[name], written) for each in returned)
        assert len(losses(together / name)) == 13  # one process writes: a line a step, and the last


def test_all_processes_refuse_alike(together):
    for rank in range(2):
        few, other, recipe = json.loads((together / f"{rank}.json").read_text())
        assert "batch_size is of all 2 processes" in few
        assert "must be the same in all processes" in other
        assert "another recipe: {'lr'" in recipe
    assert not (together / "few").exists()
    assert not (together / "other").exists()


def command(output, data):
    """`latent-aug train` for seconds, its state saved after each step."""
    options = (
        "--channels 1 --levels 1 -K 2 -H 8 --steps 40 --batch-size 16 --warmup 2 "
        "--network-dtype float32 --checkpoint-minutes 0 --cpu"
    )
    return ["-m", "latent_aug", "train", str(data), "--output", str(output), *options.split()]


def rank_of(process):
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def test_a_rank_that_dies_ends_the_job_which_any_number_resumes(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number, image in enumerate(stripes(48)):
        to_pil_image(image).save(data / f"{number}.png")
    killed, copy, undisturbed = (tmp_path / name for name in ("killed", "copy", "undisturbed"))
    job = subprocess.Popen([*TOGETHER, *command(killed, data)], env=ENVIRONMENT, stderr=-3)
    log = killed / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 8:
        assert job.poll() is None
        time.sleep(0.01)
    (second,) = (p for p in psutil.Process(job.pid).children() if rank_of(p) == "1")
    second.send_signal(signal.SIGKILL)
    assert job.wait(timeout=120) != 0
    assert not (killed / "model.safetensors").exists()

    shutil.copytree(killed, copy)
    runs = [
        subprocess.Popen([*launcher, *command(output, data)], env=ENVIRONMENT, stderr=-3)
        for launcher, output in (
            (TOGETHER, killed),
            ((sys.executable,), copy),
            (TOGETHER, undisturbed),
        )
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0, 0]
    again, alone, expected = (weights(load_flow(d)) for d in (killed, copy, undisturbed))
    assert torch.equal(again, expected)
    torch.testing.assert_close(alone, expected, atol=1e-3, rtol=0)
    assert "accelerate launch --num_processes 2 -m latent_aug" in (killed / "README.md").read_text()
    assert "latent-aug train" in (copy / "README.md").read_text()


def test_alone_accelerate_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    alone = Processes("cpu")
    assert (alone.rank, alone.count, alone.is_main) == (0, 1, True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModuleNotFoundError, match=r"latent-aug\[train\]"):
        Processes("cpu")


def test_processes_that_cannot_be_joined_are_refused():
    from accelerate.state import AcceleratorState

    try:
        with pytest.raises(ValueError, match="set up as NO: start them with torchrun"):
            accelerator_for(torch.device("cpu"), 1.0)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
