"""float32 stays float32 in flows, and torch's global settings as they were."""

import os
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import random_glow

from latent_aug import load_flow
from latent_aug.flows import ConditionalDenseFlow
from latent_aug.flows.backend import full_precision, settings

CPU = torch.device("cpu")
NEW = hasattr(torch.backends.cudnn, "conv")  # torch 2.9 and later


@pytest.fixture
def medium():
    """The setting that Lightning advises for GPUs; CPUs take bfloat16 under it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def values():
    return [setting.read() for setting in settings()]


def full():
    return [setting.full for setting in settings()]


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_a_glow_is_exact_whatever_the_precision_of_matrix_products(medium, batch):
    flow = load_flow("glow-cifar10-small")
    x = F.interpolate(torch.rand(batch, 3, 4, 4), size=32, mode="bilinear")
    assert (flow.decode(flow.encode(x)) - x).abs().max() < 1e-4


def test_a_dense_flow_is_exact_whatever_the_precision_of_matrix_products(medium):
    flow = ConditionalDenseFlow().eval()
    x, y = torch.rand(8, 1, 28, 28), torch.arange(8)
    assert (flow.decode(flow.encode(x, y), y) - x).abs().max() < 1e-4


def test_gradients_are_exact_whatever_the_precision_of_matrix_products(medium):
    flow = random_glow().requires_grad_(False)
    z = flow.encode(torch.rand(1, 3, 16, 16)).requires_grad_(True)
    exact = z.detach().double().requires_grad_(True)
    flow.decode(z).square().sum().backward()
    random_glow().double().requires_grad_(False).decode(exact).square().sum().backward()
    torch.testing.assert_close(z.grad.double(), exact.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_settings_are_full_inside_and_put_back(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        before = values()
        with full_precision(CPU):
            assert values() == full()
        assert values() == before
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_last_of_several_threads_puts_settings_back(medium):
    before = values()
    first, second = full_precision(CPU), full_precision(CPU)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert values() == full() != before
    second.__exit__(None, None, None)
    assert values() == before


@pytest.mark.skipif(not NEW, reason="wider settings came with torch 2.9")
def test_a_wider_setting_decides_again_afterwards():
    backends = torch.backends
    conv, wide = backends.cudnn.conv, backends.fp32_precision
    before = conv.fp32_precision
    try:
        backends.fp32_precision = conv.fp32_precision = "tf32"
        conv.fp32_precision = "none"
        with full_precision(CPU):
            assert conv.fp32_precision == "ieee"
        assert conv.fp32_precision == "tf32"
        backends.fp32_precision = "ieee"
        assert conv.fp32_precision == "ieee"
    finally:
        backends.fp32_precision, conv.fp32_precision = wide, before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking with threads
def test_a_process_forked_while_another_thread_enters_is_not_locked():
    stop = threading.Event()

    def enter():
        while not stop.is_set():
            with full_precision(CPU):
                pass

    thread = threading.Thread(target=enter)
    thread.start()
    try:
        for _ in range(20):
            if (child := os.fork()) == 0:
                with full_precision(CPU):
                    os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()
