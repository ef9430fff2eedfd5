"""The flows that examples/flows compares: each differs from the others in what its name says."""

import sys
from pathlib import Path

import pytest
import torch

from latent_aug import TrainConfig, train_flow

sys.path.append(str(Path(__file__).parents[1] / "examples" / "flows"))
from variants import VARIANTS, new_flow, recipe


def trained(name, folder):
    """A variant's weights after two steps, as one vector."""
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.manual_seed(1))
    settings = {"steps": 2, "network_dtype": "float32", **recipe(name)}
    flow = train_flow(
        new_flow(name), images, TrainConfig(output=folder, **settings), progress=False
    )
    return torch.cat([t.flatten().double() for t in flow.state_dict().values()])


OTHERS = [n for n in VARIANTS if n.startswith("small, ")]


@pytest.mark.parametrize("name", OTHERS)
def test_every_variant_is_another_flow_than_the_one_it_is_compared_with(name, tmp_path):
    own, plain = trained(name, tmp_path / "a"), trained("small", tmp_path / "b")
    assert own.shape != plain.shape or not torch.equal(own, plain)
