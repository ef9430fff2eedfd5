"""Training in two processes: as in one, resumable by any number, and no hang when one dies."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import stripes
from test_train import config, small_flow, weights
from torchvision.transforms.v2.functional import to_pil_image
from typer.testing import CliRunner

from latent_aug import load_flow, train_flow
from latent_aug.cli import app
from latent_aug.training.processes import Processes, make_accelerator

pytest.importorskip("accelerate")

TOGETHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Name of a run: its settings. 15 images over two processes are 7 and 8, accumulated in 3 parts.
RUNS = {
    "even": {"checkpoint_minutes": 0},
    "odd": {"checkpoint_minutes": 0, "batch_size": 15, "accumulate": 3},
    "long": {"checkpoint_minutes": 0, "steps": 16, "crop": 0, "noise": 0.0},
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
        lines = RUNS[name].get("steps", 12) + 1
        assert len(losses(together / name)) == lines  # one process writes: after steps and at last


def test_all_processes_refuse_alike(together):
    for rank in range(2):
        few, other, recipe = json.loads((together / f"{rank}.json").read_text())
        assert "batch_size counts the images of all 2 processes" in few
        assert "must be the same in all processes" in other
        assert "recipe: lr 0.001, now 1.0" in recipe
    assert not (together / "few").exists()
    assert not (together / "other").exists()


DYING = """
import os, signal, sys
from latent_aug.cli import app
from latent_aug.training.train import Run

step = Run.train_step

def dying(run, *batch):
    if os.environ["RANK"] == "1" and run.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run, *batch)

Run.train_step = dying
app()
"""


def test_a_rank_that_dies_ends_the_job_which_any_number_resumes(together, tmp_path, monkeypatch):
    data, script = tmp_path / "data", tmp_path / "dying.py"
    data.mkdir()
    script.write_text(DYING)
    for number, image in enumerate(stripes()):
        to_pil_image(image).save(data / f"{number:02}.png")

    def command(output):
        """`latent-aug train` as in the long run."""
        sizes = "--channels 1 --levels 1 -K 2 -H 8 --batch-size 16 --network-dtype float32 --cpu"
        others = f"--steps 16 --warmup 2 --checkpoint-minutes 0 --output {output}"
        return ["train", str(data), *sizes.split(), *others.split()]

    killed, copy = tmp_path / "killed", tmp_path / "copy"
    died = subprocess.run(
        [*TOGETHER, script, *command(killed)], env=ENVIRONMENT, capture_output=True, timeout=300
    )
    assert died.returncode != 0
    assert 0 < len(losses(killed)) <= 8
    assert not (killed / "model.safetensors").exists()

    shutil.copytree(killed, copy)
    again = subprocess.Popen([*TOGETHER, "-m", "latent_aug", *command(killed)], env=ENVIRONMENT)
    monkeypatch.setattr(sys, "argv", ["latent-aug", *command(copy)])
    alone = CliRunner().invoke(app, command(copy))
    assert alone.exit_code == 0, alone.output
    assert again.wait(timeout=300) == 0
    expected = weights(load_flow(together / "long"))
    assert torch.equal(weights(load_flow(killed)), expected)
    torch.testing.assert_close(weights(load_flow(copy)), expected, atol=1e-3, rtol=0)
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
            make_accelerator(torch.device("cpu"), 1.0)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
