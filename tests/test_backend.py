"""float32 stays float32 in flows, and torch's global settings as they were."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import random_glow

from latent_aug import load_flow
from latent_aug.flows import ConditionalDenseFlow
from latent_aug.flows.backend import list_settings, use_full_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NEW = hasattr(torch.backends.cudnn, "conv")  # torch 2.9 and later


@pytest.fixture
def medium():
    """The setting that Lightning advises for GPUs; CPUs take bfloat16 under it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def bfloat16_products(medium):
    x, weight = torch.rand(64, 784), torch.rand(784, 784)
    if (x @ weight - x.double() @ weight.double()).abs().max() < 1e-2:
        pytest.skip("this CPU does not take bfloat16 for float32")


def values(kind="cpu"):
    return [setting.read() for setting in list_settings(kind)]


def are_full(kind="cpu"):
    return all(setting.read() in setting.wanted for setting in list_settings(kind))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.usefixtures("bfloat16_products")
def test_a_glow_is_exact_whatever_the_precision_of_matrix_products(batch):
    flow = load_flow("glow-cifar10-small")
    x = F.interpolate(torch.rand(batch, 3, 4, 4), size=32, mode="bilinear")
    assert (flow.decode(flow.encode(x)) - x).abs().max() < 1e-4


@pytest.mark.usefixtures("bfloat16_products")
def test_a_dense_flow_is_exact_whatever_the_precision_of_matrix_products():
    flow = ConditionalDenseFlow().eval()
    x, y = torch.rand(8, 1, 28, 28), torch.arange(8)
    assert (flow.decode(flow.encode(x, y), y) - x).abs().max() < 1e-4


@pytest.mark.usefixtures("bfloat16_products")
def test_gradients_are_exact_whatever_the_precision_of_matrix_products():
    flow = random_glow().requires_grad_(False)
    z = flow.encode(torch.rand(1, 3, 16, 16)).requires_grad_(True)
    exact = z.detach().double().requires_grad_(True)
    flow.decode(z).square().sum().backward()
    random_glow().double().requires_grad_(False).decode(exact).square().sum().backward()
    torch.testing.assert_close(z.grad.double(), exact.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_settings_are_full_inside_and_put_back(precision, device):
    torch.set_float32_matmul_precision(precision)
    try:
        before = values(device.type)
        with use_full_precision(device):
            assert are_full(device.type)
        assert values(device.type) == before
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("medium")
def test_the_last_of_several_threads_puts_settings_back():
    before = values()
    first, second = use_full_precision(CPU), use_full_precision(CPU)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert are_full()
    second.__exit__(None, None, None)
    assert values() == before
    assert not are_full()


def run(code):
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()


@pytest.mark.skipif(not NEW, reason="wider settings came with torch 2.9")
def test_on_a_cpu_a_wider_setting_decides_afterwards_as_before():
    code = """
import torch
from latent_aug.flows.backend import use_full_precision
b = torch.backends
b.cudnn.conv.fp32_precision = "none"  # which is a default in some releases of torch only
with use_full_precision(torch.device("cpu")):
    pass
b.fp32_precision = "ieee"
print(b.cudnn.conv.fp32_precision, b.mkldnn.matmul.fp32_precision)
b.fp32_precision = "tf32"
print(b.mkldnn.matmul.fp32_precision)
with use_full_precision(torch.device("cpu")):
    print(b.mkldnn.matmul.fp32_precision)
b.fp32_precision = "ieee"
print(b.mkldnn.matmul.fp32_precision)
"""
    assert run(code) == ["ieee", "ieee", "tf32", "ieee", "ieee"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking with threads
@pytest.mark.usefixtures("medium")
def test_a_process_forked_while_another_thread_is_inside_is_neither_locked_nor_changed():
    before, stop = values(), threading.Event()

    def enter():
        while not stop.is_set():
            with use_full_precision(CPU):
                time.sleep(1e-3)

    thread = threading.Thread(target=enter)
    thread.start()
    try:
        for _ in range(20):
            if (child := os.fork()) == 0:
                with use_full_precision(CPU):
                    inside = are_full()
                os._exit(0 if inside and values() == before else 1)
            assert exit_code(child) == 0
    finally:
        stop.set()
        thread.join()


def exit_code(child, seconds=20):
    """Of a process that may hang; None then."""
    for _ in range(seconds * 100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None
