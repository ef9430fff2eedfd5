"""The settings of a training run, and the learning rate that follows from them."""

import math

import numpy as np
import pytest

from latent_aug import TrainConfig
from latent_aug.training.recipe import compute_learning_rate


def test_learning_rate_rises_stays_and_falls():
    c = TrainConfig(output="x", steps=100, warmup=10, decay=0.4, lr=1.0)
    rates = [compute_learning_rate(step, c) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:61] == [1.0] * 52
    assert rates[80] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 40)


@pytest.mark.parametrize(("steps", "warmup"), [(5, 1), (500, 50), (6000, 200)])
def test_a_short_training_warms_up_for_a_tenth_of_it(steps, warmup):
    c = TrainConfig(output="x", steps=steps, decay=0.0, lr=1.0)
    rates = [compute_learning_rate(step, c) for step in range(steps)]
    assert rates[warmup - 1 :] == [1.0] * (steps - warmup + 1)
    assert all(rate < 1 for rate in rates[: warmup - 1])


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"decay": 1.5},
        {"seed": -1},
        {"warmup": -1},
        {"ema": 2},
        {"crop": -1},
        {"noise": 25},
        {"seed": 2**64},
        {"network_dtype": "float16"},
    ],
)
def test_bad_settings_are_named(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainConfig(output="x", **changes)


@pytest.mark.parametrize("name", ["lr", "decay", "checkpoint_minutes"])
def test_numbers_are_no_text(name):
    with pytest.raises(TypeError, match=f"{name} must be a number, got '1e-3'"):
        TrainConfig(output="x", **{name: "1e-3"})


@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulate", "size", "workers", "crop"])
def test_counts_are_integers(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer"):
        TrainConfig(output="x", **{name: 2.0})
    assert type(getattr(TrainConfig(output="x", **{name: np.int64(2)}), name)) is int


def test_numbers_are_plain():
    config = TrainConfig(output="x", lr=np.float64(0.1), ema=np.float32(0.5))
    assert (type(config.lr), type(config.ema)) == (float, float)
