"""The engine against normflows on the same weights: speed, memory, exactness.

    python examples/benchmarks/speed.py IMAGES
    python examples/benchmarks/speed.py           # what was measured, as a table of ratios
    python examples/benchmarks/speed.py --device "NVIDIA H200"    # the same, of another device

IMAGES is a folder or tar of 32 x 32 colour images. For Glow flows of three levels with K steps of
H hidden channels, and the bundled CIFAR-10 flows: images per second of encode, decode, round trip,
the gradient of decode to the latents (fast and lean), a whole adversarial step (3 steps, CIFAR
ResNet-18) and a training step, for normflows' own methods and for ours with coupling networks in
float32 and bfloat16; on a GPU also with CUDA graphs, whose own memory the peaks leave out. On a CPU
each contestant runs in a process of its own, as in use, and they take turns; medians over calls,
then over rounds. "peak" is the machine's own best rate of multiplying matrices of that dtype
(torch.mm or a 1x1 convolution, whichever is faster), "share" what of it the round trip's products
reach. --ways leaves contestants out: bfloat16 on a processor without AVX-512, where it is slow.
"kept" tells normflows after glibc was told to keep freed memory, as our engine does and as a
program full of large tensors may have done anyway.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contestants import (
    Normflows,
    cifar_resnet,
    contestant,
    network_flops,
    peak_bytes,
    seconds,
)
from torch import Tensor

from latent_aug import Flow, Glow, LatentAdversarial
from latent_aug.flows.backend import keep_freed_memory
from latent_aug.images.datasets import UInt8Images, open_images
from latent_aug.utils.files import write_whole

RESULTS = Path(__file__).parents[1] / "results" / "speed.jsonl"
FLOWS = ("8,64", "8,128", "16,128", "16,256", "32,512", "glow-cifar10", "glow-cifar10-small")
WAYS = ("normflows", "normflows kept", "float32", "bfloat16")
GPU_WAYS = ("normflows", "float32", "bfloat16", "float32 graphs", "bfloat16 graphs")
LARGEST = 2**32  # bytes that autograd may keep


def gradient(flow: Flow, z: Tensor, way: str) -> Callable[[], object]:
    """The gradient of the decoded images' sum."""

    def call() -> object:
        latents = z.clone().requires_grad_(True)
        image = (
            flow.decode(latents, gradient=way) if isinstance(flow, Glow) else flow.decode(latents)
        )
        return torch.autograd.grad(image.sum(), latents)

    return call


def training_step(flow: Flow, x: Tensor) -> Callable[[], object]:
    """Gradients of the log-likelihood for all weights."""
    parameters = [p.requires_grad_(True) for p in flow.parameters()]

    def call() -> object:
        return torch.autograd.grad(flow.log_prob(x).mean(), parameters, allow_unused=True)

    return call


def measure(name: str, batch: int, way: str, images: str) -> dict[str, float]:
    """Measure one contestant in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if way == "normflows kept":
        keep_freed_memory()
    flow = contestant(name, way.removesuffix(" kept")).to(device)
    glow = flow.glow if isinstance(flow, Normflows) else flow
    assert isinstance(glow, Glow)
    data = UInt8Images(open_images(images), 3)
    x = torch.stack([data[i] for i in data.spread_indices(batch)]).to(device) / 255
    found: dict[str, float] = {}
    with torch.no_grad():
        z = flow.encode(x)
        found["error"] = float((flow.decode(z) - x).abs().max())
        encode, decode = seconds(lambda: flow.encode(x)), seconds(lambda: flow.decode(z))
        found["decode_peak_mib"] = peak_bytes(lambda: flow.decode(z)) / 2**20
    for key, spent in (("encode", encode), ("decode", decode), ("round_trip", encode + decode)):
        found[key] = batch / spent
    dtype = torch.bfloat16 if way.startswith("bfloat16") else torch.float32
    found["peak_gflops"] = matmul_peak(dtype, device) / 1e9
    products = 2 * network_flops(glow, 32, 32) * batch / (encode + decode)
    found["share"] = products / found["peak_gflops"] / 1e9
    autograd_bytes = 8 * batch * 256 * glow.steps * glow.hidden * 1.4
    if way.startswith("normflows") and autograd_bytes > LARGEST:
        return found
    for mode in ("fast",) if isinstance(flow, Normflows) else ("fast", "lean"):
        call = gradient(flow, z, mode)
        found[f"gradient_{mode}"] = batch / seconds(call)
        found[f"gradient_{mode}_peak_mib"] = peak_bytes(call) / 2**20
    if batch <= 32 or device != "cpu":  # a minute a call for the larger flows; no news
        attack = LatentAdversarial(
            cifar_resnet().to(device), steps=3, p=1.0, labels="true", flow=flow
        )
        y = torch.zeros(batch, dtype=torch.long, device=device)
        found["attack"] = batch / seconds(lambda: attack(x, y), repeats=2)
    if autograd_bytes <= LARGEST:
        found["training"] = batch / seconds(training_step(flow, x), repeats=3)
    return found


def measure_apart(name: str, batch: int, way: str, images: str) -> dict[str, float]:
    """Measure one contestant in its own process; on a GPU in this one, as starting takes long."""
    if torch.cuda.is_available():
        return measure(name, batch, way, images)
    command = [sys.executable, __file__, images, "--one", name, str(batch), way]
    output = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """Products per second, times two, of the machine's best matrix multiplication."""
    side = 1024 if device == "cpu" else 8192  # so that it is busy all over
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    x = torch.randn(32, 256, 16, 16, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 1, 1, device=device).to(dtype)
    return max(
        2 * side**3 / seconds(lambda: a @ b, repeats=15),
        2 * len(x) * 256**3 / seconds(lambda: F.conv2d(x, weight), repeats=15),
    )


def measure_rows(args: argparse.Namespace) -> Iterator[list[dict[str, object]]]:
    """Every contestant in turn, a few rounds; medians, one list for each flow and batch."""
    for name, batch in itertools.product(args.flows, args.batches):
        rows = []
        found: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
        for _, way in itertools.product(range(args.rounds), args.ways):
            found[way].append(measure_apart(name, batch, way, args.images))
        for way, runs in found.items():
            row: dict[str, object] = {"flow": name, "batch": batch, "way": way}
            for key in runs[0]:
                row[key] = float(f"{statistics.median(run[key] for run in runs):.4g}")
            rows.append(row)
            print(json.dumps(row), flush=True)
        yield rows


def keep(rows: list[dict[str, object]], path: Path) -> None:
    """Write rows beside those of other devices, flows and batches."""
    cpu = f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    rows = [{"device": device, "threads": torch.get_num_threads(), **row} for row in rows]
    measured = {(device, row["flow"], row["batch"]) for row in rows}
    before = [r for r in read_rows(path) if (r["device"], r["flow"], r["batch"]) not in measured]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in before + rows).encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row that was kept."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(path: Path, device: str) -> None:
    """Format what a device measured as Markdown: ratios to normflows, shares of the peak."""
    rows = [row for row in read_rows(path) if row["device"] == device]
    found = {(row["flow"], row["batch"], row["way"]): row for row in rows}
    keys = ("round_trip", "gradient_fast", "attack", "training")
    head = ("K, H", "batch", "networks", "round trips a second", "round trip", "gradient")
    head += ("attack with ResNet-18", "training step", "share of the peak")
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n")
    place = {flow: number for number, flow in enumerate(FLOWS)}
    order = sorted(found, key=lambda key: (place.get(key[0], len(place)), key[1]))
    for flow, batch, way in order:
        row = found[flow, batch, way]
        if way.startswith("normflows"):
            continue
        bars = [found.get((flow, batch, way), {}) for way in WAYS if way.startswith("normflows")]
        cells = [ratios(row, bars, key) for key in keys]
        named = flow.replace(",", ", ") if "," in flow else f"`{flow}`"
        rate = f"{row['round_trip']:.0f}"
        share = f"{row['share']:.0%}" if "share" in row else ""
        print(f"| {' | '.join((named, str(batch), way, rate, *cells))} | {share} |")


def ratios(row: dict[str, float], bars: list[dict[str, float]], key: str) -> str:
    """Format a figure over normflows', and in brackets over normflows' kept, if measured."""
    plain, kept = (f"{row[key] / bar[key]:.1f}" if key in bar else "" for bar in bars)
    return f"{plain} ({kept})" if kept else plain


def main() -> None:
    """Measure all, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="?", help="a folder or tar of 32 x 32 colour images")
    parser.add_argument("--flows", nargs="*", default=FLOWS)
    parser.add_argument("--batches", nargs="*", type=int, default=[32, 128])
    ways = GPU_WAYS if torch.cuda.is_available() else WAYS
    parser.add_argument("--ways", nargs="*", default=ways, choices=sorted({*WAYS, *GPU_WAYS}))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu", help="of the table; as its rows name it")
    parser.add_argument("--one", nargs=3, metavar=("FLOW", "BATCH", "WAY"))
    args = parser.parse_args()
    if args.images is None:
        return table(args.out, args.device)
    if args.one:
        name, batch, way = args.one
        return print(json.dumps(measure(name, int(batch), way, args.images)))
    for rows in measure_rows(args):
        keep(rows, args.out)


if __name__ == "__main__":
    main()
