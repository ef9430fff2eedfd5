"""Fixtures and tables that every test module shares."""

import pytest
import torch

from latent_aug import Flow, Glow


class Identity(Flow):
    """The flow that does nothing: latents are pixels."""

    channels = 3

    def encode(self, x, y=None):
        return x

    def decode(self, z, y=None):
        return z


def random_glow(channels=3, *, levels=2, steps=2, hidden=8, dtype=torch.float32, seed=0):
    """A small Glow none of whose parts is the identity, as after training."""
    torch.manual_seed(seed)
    flow = Glow(channels, levels=levels, steps=steps, hidden=hidden).to(dtype)
    flow.initialize(torch.rand(16, channels, 16, 16, dtype=dtype))
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "q0" in name or "net.4" in name:  # priors and last convolutions start at zero
                parameter.normal_(std=0.1)
    return flow.requires_grad_(False).eval()


# One line here puts a new flow through every test of the contract.
FLOWS = {
    "identity": Identity,
    "glow-1-level": lambda: random_glow(levels=1),
    "glow-2-levels": random_glow,
    "glow-3-levels": lambda: random_glow(levels=3),
}


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=FLOWS)
def any_flow(request):
    return FLOWS[request.param]()


@pytest.fixture(scope="session")
def glow():
    return random_glow()


@pytest.fixture(scope="session")
def grey_glow():
    return random_glow(1)
