"""What loader workers cost in memory: eight forked, eight spawned, each with LatentPerturb.

    python examples/benchmarks/processes.py

Every worker perturbs images with the default flow, then says how much memory is its own
(private pages, from Linux's smaps_rollup) and how many threads torch would use in it. The same
without the transform stands beside it, so that the difference is what latent-aug adds.
"""

import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

import torch
from measurements import keep_measurement
from torch.utils.data import DataLoader, Dataset

from latent_aug import LatentPerturb

WORKERS, EACH = 8, 4


class Measured(Dataset[dict[str, float]]):
    """Perturbs an image, or not, and measures the process it is in."""

    def __init__(self, transform: LatentPerturb | None) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return WORKERS * EACH

    def __getitem__(self, index: int) -> dict[str, float]:
        x = torch.full((3, 32, 32), index, dtype=torch.uint8)
        if self.transform is not None:
            self.transform(x)
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        private = sizes["Private_Clean"] + sizes["Private_Dirty"]
        return {"mib": private / 1024, "threads": torch.get_num_threads()}


def measure(method: str, transform: LatentPerturb | None) -> dict[str, Any]:
    """Summarize one epoch's last images, one a worker."""
    loader = DataLoader(
        Measured(transform),
        batch_size=None,
        num_workers=WORKERS,
        multiprocessing_context=method,
    )
    found = list(loader)[-WORKERS:]
    return {
        "private_mib": round(statistics.median(f["mib"] for f in found), 1),
        "threads": max(f["threads"] for f in found),
    }


def main() -> None:
    """Measure, print, keep."""
    shared_memory = set(Path("/dev/shm").iterdir())
    result: dict[str, Any] = {"workers": WORKERS}
    for method in ("fork", "spawn"):
        for name, transform in (("without", None), ("LatentPerturb", LatentPerturb(0.25))):
            result[f"{method}, {name}"] = measure(method, transform)
    result["children_left"] = len(multiprocessing.active_children())
    result["shared_memory_left"] = len(set(Path("/dev/shm").iterdir()) - shared_memory)
    print(json.dumps(result, indent=1))
    keep_measurement("processes", result)


if __name__ == "__main__":
    main()
