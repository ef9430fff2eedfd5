"""Peak memory and time of the gradient of decode to the latents, by depth.

    python examples/benchmarks/gradient_memory.py

For Glow flows of three levels and 256 hidden channels on 32 images of 3 x 32 x 32: normflows'
own methods under autograd, and ours on the same weights, fast (our engine under autograd) and
lean (which recomputes). Each contestant runs in a process of its own, in turn, three times;
medians are kept of the greatest memory that torch allocated for one gradient and of its seconds.
With --images FOLDER also how far the lean gradient is from the fast one on 256 images under the
bundled flow of CIFAR-10, relative to its norm.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from latent_aug import Glow, load_flow
from latent_aug.data import UInt8Images, open_images

RESULTS = Path(__file__).parents[1] / "results" / "gradient_memory.json"
HIDDEN, BATCH, DEPTHS, ROUNDS = 256, 32, (4, 8, 16, 32), 3
WAYS = ("normflows", "fast", "lean")


def flow_of(steps: int, device: str) -> Glow:
    """A Glow none of whose parts is the identity."""
    torch.manual_seed(0)
    flow = Glow(3, levels=3, steps=steps, hidden=HIDDEN)
    flow.initialize(torch.rand(8, 3, 32, 32))
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "q0" in name or "net.4" in name:
                parameter.normal_(std=0.01)
    return flow.requires_grad_(False).eval().to(device)


def gradient_of(flow: Glow, way: str) -> Callable[[Tensor], object]:
    """The gradient of the image's sum to the latent z, one way."""

    def ours(z: Tensor) -> object:
        z = z.clone().requires_grad_(True)
        return torch.autograd.grad(flow.decode(z, gradient=way).sum(), z)

    def normflows(z: Tensor) -> object:
        parts = [part.clone().requires_grad_(True) for part in reversed(flow.split_levels(z))]
        image, _ = flow.multiscale.forward_and_log_det(list(parts))
        return torch.autograd.grad(image.sum(), parts)

    return normflows if way == "normflows" else ours


def peak_of(call: Callable[[], object], device: str) -> int:
    """The most bytes that torch held at once during a call, beyond those it held before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def measure(steps: int, way: str, device: str) -> None:
    """One contestant, in this process; prints JSON."""
    flow = flow_of(steps, device)
    gradient = gradient_of(flow, way)
    z = torch.randn(BATCH, 3, 32, 32, device=device)
    gradient(z)  # prepares the weights
    peak, seconds = peak_of(lambda: gradient(z), device), []
    for _ in range(5):
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        gradient(z)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"mib": peak / 2**20, "s": min(seconds)}))


def difference(folder: Path) -> dict[str, float]:
    """Of the lean gradient from the fast one on real images, relative to its norm."""
    flow = load_flow("glow-cifar10")
    assert isinstance(flow, Glow)
    found = []
    images = UInt8Images(open_images(folder), flow.channels)
    for chosen in torch.tensor(images.spread(256)).split(BATCH):
        x = torch.stack([images[i] for i in chosen.tolist()]) / 255
        z = flow.encode(x).requires_grad_(True)
        weights = torch.randn_like(x)
        fast, lean = (
            torch.autograd.grad((flow.decode(z, gradient=way) * weights).sum(), z)[0]
            for way in ("fast", "lean")
        )
        found.append((lean - fast).flatten(1).norm(dim=1) / fast.flatten(1).norm(dim=1))
    relative = torch.cat(found)
    return {"median": float(relative.median()), "greatest": float(relative.max())}


def main() -> None:
    """Measure all, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("STEPS", "WAY", "DEVICE"))
    parser.add_argument("--images", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.one:
        return measure(int(args.one[0]), args.one[1], args.one[2])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for steps in DEPTHS:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _, way in itertools.product(range(ROUNDS), WAYS):
            command = [sys.executable, __file__, "--one", str(steps), way, device]
            output = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
            found[way].append(json.loads(output))
        row: dict[str, object] = {"steps": steps, "hidden": HIDDEN, "batch": BATCH}
        for way, runs in found.items():
            row[f"{way}_mib"] = round(statistics.median(run["mib"] for run in runs), 1)
            row[f"{way}_s"] = round(statistics.median(run["s"] for run in runs), 3)
        rows.append(row)
        print(json.dumps(row))
    result: dict[str, object] = {"device": device, "threads": torch.get_num_threads(), "rows": rows}
    if args.images:
        result["lean_against_fast"] = difference(args.images)
        print(result["lean_against_fast"])
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
