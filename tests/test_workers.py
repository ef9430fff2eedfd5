"""Flows in loader workers: shared or loaded, and what is left when one dies."""

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


@pytest.mark.parametrize(("method", "workers"), [("fork", 8), ("spawn", 2)])
def test_workers_perturb_on_one_thread_each(method, workers):
    data = Perturbed(LatentPerturb(0.25, flow="glow-fashionmnist"))
    loader = DataLoader(data, batch_size=2, num_workers=workers, multiprocessing_context=method)
    images, threads, processes = (torch.cat(part) for part in zip(*loader, strict=True))
    assert not torch.equal(images[0], images[-1])
    assert set(threads.tolist()) == {1}
    assert len(set(processes.tolist())) == workers
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_killed_worker_is_the_loader_s_own_error(method):
    shared = set(Path("/dev/shm").iterdir())
    # The first image: a batch already sent could not be received any more, another error.
    data = Perturbed(LatentPerturb(0.25, flow="glow-fashionmnist"), deadly=0)
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=method)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*\)"):
        list(loader)
    del loader
    assert multiprocessing.active_children() == []
    for _ in range(50):  # the queues' threads end a little later, and with them what they shared
        gc.collect()
        left = set(Path("/dev/shm").iterdir()) - shared
        if not left:
            break
        time.sleep(0.1)
    assert left == set()
