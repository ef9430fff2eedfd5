"""How the cost of a perturbation grows: with batch, image size, depth, width and workers.

    python examples/benchmarks/growth.py            # measures and draws
    python examples/benchmarks/growth.py --draw     # draws what was measured

Round trips per second of a Glow of three levels (K 8, H 128, 32 x 32, batch 32 unless another is
named), medians. "workers" is LatentPerturb on single images in loader processes of one thread.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from contestants import NETWORK_DTYPES, random_glow, seconds
from measurements import keep_measurement, read_measurement
from torch.utils.data import DataLoader, Dataset

from latent_aug import LatentPerturb

PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "speed.png"
USUAL = {"batch": 32, "side": 32, "K": 8, "H": 128}
SWEEPS = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "side": (32, 64, 96, 128, 224),
    "K": (4, 8, 16, 32),
    "H": (32, 64, 128, 256, 512),
}
TITLES = {
    "batch": "batch size",
    "side": "side of the image (pixels)",
    "K": "steps a level, K",
    "H": "hidden channels, H",
    "workers": "loader workers, one image each",
}


class Images(Dataset[torch.Tensor]):
    """Random 8-bit images, perturbed one at a time."""

    def __init__(self, transform: Callable[..., torch.Tensor], count: int) -> None:
        self.transform, self.count = transform, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(torch.full((3, 32, 32), index % 256, dtype=torch.uint8))


@torch.no_grad()
def images_per_second(dtype: str, *, batch: int, side: int, K: int, H: int) -> float:  # noqa: N803
    """Measure the speed of the round trip."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flow = random_glow(K, H).to(device)
    flow.network_dtype = NETWORK_DTYPES[dtype]
    x = torch.rand(batch, 3, side, side, device=device)
    return batch / seconds(lambda: flow.decode(flow.encode(x)), repeats=9)


def with_workers(count: int) -> float:
    """Images per second of an epoch of 800, after one that starts the workers."""
    if not count:
        torch.set_num_threads(1)
    transform = LatentPerturb(0.25, flow=random_glow(USUAL["K"], USUAL["H"]))
    loader = DataLoader(Images(transform, 800), 32, num_workers=count, persistent_workers=count > 0)
    for _ in range(2):
        started = time.perf_counter()
        for _ in loader:
            pass
    return 800 / (time.perf_counter() - started)


def measure() -> dict[str, object]:
    """Every sweep."""
    result: dict[str, object] = {"threads": torch.get_num_threads(), "usual": USUAL}
    for name, values in SWEEPS.items():
        result[name] = {
            dtype: {
                str(value): round(images_per_second(dtype, **{**USUAL, name: value}), 1)
                for value in values
            }
            for dtype in ("float32", "bfloat16")
        }
        print(name, result[name], flush=True)
    counts = sorted({1, 2, min(4, os.cpu_count() or 1)} & set(range(1, 1 + (os.cpu_count() or 1))))
    result["workers"] = {"float32": {str(n): round(with_workers(n), 1) for n in (0, *counts)}}
    print("workers", result["workers"], flush=True)
    return result


def draw(result: dict[str, dict[str, dict[str, float]]]) -> None:
    """One panel for each sweep, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(TITLES)), TITLES, strict=True):
        for dtype, points in result[name].items():
            axes.plot([float(x) for x in points], list(points.values()), marker="o", label=dtype)
        axes.set_xlabel(TITLES[name])
        if name == "workers":
            axes.set_ylim(0)
        else:
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.minorticks_off()
        axes.set_xticks([float(x) for x in points], list(points))
        axes.grid(alpha=0.3, which="both")
    axes = figure.axes[0]
    axes.set_ylabel("round trips per second")
    axes.legend(title="coupling networks")
    figure.savefig(PICTURE, dpi=80)


def main() -> None:
    """Measure, keep, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true")
    if not parser.parse_args().draw:
        keep_measurement("growth", measure())
    draw(read_measurement("growth"))


if __name__ == "__main__":
    main()
