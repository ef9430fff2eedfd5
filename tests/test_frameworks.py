"""The examples with other people's training loops, run as a user runs them, with the real thing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples" / "frameworks"
NEEDS = {
    "accelerate_loop.py": ("accelerate",),
    "hugging_face_trainer.py": ("transformers", "datasets", "accelerate"),
    "kornia_pipeline.py": ("kornia",),
    "lightning_module.py": ("lightning",),
    "timm_mixup.py": ("timm",),
}
ALONE = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "accelerate_loop.py")


def run(name, *options, launcher=()):
    """What an example prints; it is skipped where extra [frameworks] is not installed."""
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(printed):
    return [float(found) for found in re.findall(r"loss (\d+\.\d+)$", printed, re.MULTILINE)]


@pytest.mark.parametrize("name", ALONE)
def test_it_runs(name):
    found = losses(run(name, "--images", "96", "--epochs", "2"))
    assert found
    assert all(0 < loss < 4 for loss in found)


def test_accelerate_runs_on_two_processes():
    printed = run(
        *("accelerate_loop.py", "--cpu", "--images", "96", "--epochs", "2"),
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    )
    assert printed.count("2 processes") == 2  # once an epoch
    found = losses(printed)
    assert found
    assert all(0 < loss < 4 for loss in found)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_it_is_short(path):
    assert len(path.read_text().splitlines()) < 80
