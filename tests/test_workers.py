"""Flows in loader workers, shared or loaded: their draws, their threads, what is left of one."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Identity
from torch.utils.data import DataLoader, Dataset

from latent_aug import LatentPerturb

SHARED = Path("/dev/shm")


class Perturbed(Dataset):
    """Images, perturbed; one of them kills its worker."""

    def __init__(self, transform, deadly=None):
        self.transform, self.deadly = transform, deadly

    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        x = self.transform(torch.full((1, 28, 28), 100, dtype=torch.uint8))
        return x, torch.get_num_threads(), os.getpid()


@pytest.mark.parametrize(("method", "workers", "own"), [("fork", 8, False), ("spawn", 2, True)])
def test_workers_draw_for_themselves_on_one_thread_each(method, workers, own):
    generator = torch.Generator().manual_seed(0) if own else None
    data = Perturbed(LatentPerturb(0.25, flow="glow-fashionmnist", generator=generator))
    loader = DataLoader(data, batch_size=2, num_workers=workers, multiprocessing_context=method)
    images, threads, processes = (torch.cat(part) for part in zip(*loader, strict=True))
    assert len(images.unique(dim=0)) == len(data)
    assert set(threads.tolist()) == {1}
    assert len(set(processes.tolist())) == workers
    assert multiprocessing.active_children() == []


def perturb_in_child(transform, seed=None):
    """What a process that is no loader worker draws."""
    if seed is not None:
        torch.manual_seed(seed)
        if transform._draws.generator is not None:
            transform._draws.generator.manual_seed(seed)
    image = torch.full((3, 8, 8), 0.5)
    return [transform(image).tolist(), transform(image).tolist()]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_are_no_workers_draw_for_themselves(method, own):
    generator = torch.Generator().manual_seed(0) if own else None
    transform = LatentPerturb(0.2, flow=Identity(), generator=generator)
    context = multiprocessing.get_context(method)
    pools = [context.Pool(1) for _ in range(2)]  # each a process of its own
    try:
        drawn = [pool.apply(perturb_in_child, (transform,)) for pool in pools]
        images = torch.tensor(drawn).flatten(0, 1)
        assert len(images.unique(dim=0)) == 4
        seeded = [
            pool.apply(perturb_in_child, (transform, seed)) for seed in (5, 6) for pool in pools
        ]
    finally:
        for pool in pools:
            pool.terminate()
            pool.join()
    assert seeded[0] == seeded[1]  # who seeds has it his way
    assert seeded[2] == seeded[3] != seeded[0]


@pytest.mark.parametrize("own", [False, True])
def test_forks_that_inherit_the_transform_draw_for_themselves(own):
    generator = torch.Generator().manual_seed(0) if own else None
    transform = LatentPerturb(0.2, flow=Identity(), generator=generator)
    context, found = multiprocessing.get_context("fork"), []
    for _ in range(2):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=lambda: send.send(perturb_in_child(transform)))  # noqa: B023
        process.start()
        found += receive.recv()
        process.join()
    assert len(torch.tensor(found).unique(dim=0)) == 4
    assert torch.initial_seed() == 0  # the parent's stay as they are


@pytest.mark.parametrize("own", [False, True])
def test_forks_that_are_given_their_parent_s_seed_draw_the_same_in_each_run(own):
    """In a run of its own, as the number of a process goes by those started before."""
    code = f"""
import multiprocessing, torch
from latent_aug import LatentPerturb
torch.set_num_threads(1)  # a fork hangs in OpenMP where its parent has used threads
generator = torch.Generator() if {own} else None
transform = LatentPerturb(0.2, flow="glow-fashionmnist", generator=generator)
def perturb():
    torch.manual_seed(0) if generator is None else generator.manual_seed(0)
    return transform(torch.full((1, 28, 28), 0.5)).sum().item()
perturb()
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.apply(perturb))
"""
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert first.stdout == second.stdout != ""


def test_a_killed_worker_is_the_loader_s_own_error():
    # The first image: a batch already sent could not be received any more, another error.
    data = Perturbed(LatentPerturb(0.25, flow="glow-fashionmnist"), deadly=0)
    batches = iter(DataLoader(data, 2, num_workers=2, multiprocessing_context="fork"))
    ours = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*\)"):
        list(batches)
    del batches
    assert multiprocessing.active_children() == []
    assert until_empty(lambda: [p for pid in ours for p in SHARED.glob(f"torch_{pid}_*")]) == []


def until_empty(left, tries=50):
    """The queues' threads end a little later, and with them what they shared."""
    while (found := left()) and (tries := tries - 1):
        gc.collect()
        time.sleep(0.1)
    return found
