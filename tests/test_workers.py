"""Flows in loader workers, shared or loaded: their draws, their threads, what is left of one."""

import gc
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
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
