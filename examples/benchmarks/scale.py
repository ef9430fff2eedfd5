"""What a data set costs: round trips by image size, where time goes, and what two processes bring.

    python examples/benchmarks/scale.py           # three minutes; measures and draws
    python examples/benchmarks/scale.py --draw    # draws what was measured

Rewrites its line of examples/results/measurements.jsonl and the tables in docs/scale.md. Round
trips are of one core, or on a GPU where there is one; the rest is on the CPU. Coupling networks
also run in bfloat16 where that is faster than float32. Images are samples of the flow, 32 x 32; a
photograph is 500 x 375 pixels of them side by side.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import network_flops, seconds
from measurements import keep_measurement, read_measurement
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from latent_aug import AugmentConfig, Glow, LatentPerturb, TrainConfig, augment_images, load_flow
from latent_aug.images.datasets import UInt8Images, to_uint8
from latent_aug.images.folders import EncodedImages
from latent_aug.training.processes import Processes
from latent_aug.training.recipe import choose_dtype
from latent_aug.training.train import Run

sys.path.append(str(Path(__file__).parents[1] / "paper"))
from records import write_table

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
MARK = "drawn by examples/benchmarks/scale.py"
FLOWS = ("glow-cifar10", "glow-cifar10-small")
SIDES = (32, 64, 96, 128, 160, 192, 224)
IMAGENET = 1_281_167  # training images
# Processes and threads of each, of two cores.
LAYOUTS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes": (2, 1)}
BATCH, TIMED_STEPS, IMAGES = 64, 10, 768
timed = partial(seconds, repeats=20, patience=3.0)


def precisions() -> list[str]:
    """Choose the precisions of the coupling networks that are worth measuring here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fastest = choose_dtype(TrainConfig(output="unused"), glow(FLOWS[0], "float32"), device)
    return sorted({"float32", fastest}, reverse=True)


def samples(count: int) -> Tensor:
    """Images that a flow takes for its own, uint8 (B, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(0)
    drawn = load_flow(FLOWS[0]).sample(count, size=32, temperature=0.7, generator=generator)
    return (drawn * 255).byte()


def glow(name: str, dtype: str) -> Glow:
    """A bundled flow with its coupling networks in a precision."""
    flow = load_flow(name)
    assert isinstance(flow, Glow)
    flow.network_dtype = None if dtype == "float32" else torch.bfloat16
    return flow


@torch.no_grad()
def round_trips() -> dict[str, Any]:
    """Images a second, by flow, precision and side; of one core, or of the GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in FLOWS:
        for dtype in precisions():
            flow, rates = glow(name, dtype).to(device), {}
            for side in SIDES:
                batch = max(2, BATCH * 32**2 // side**2) if device == "cpu" else BATCH
                x = torch.rand(batch, 3, side, side, device=device)
                rates[str(side)] = round(batch / timed(lambda: flow.decode(flow.encode(x))), 2)  # noqa: B023
            found[f"{name}, {dtype}"] = rates
            print(name, dtype, rates, flush=True)
    return found


def stages(tiles: Tensor) -> dict[str, float]:
    """Milliseconds of an image of 224 x 224 in each stage, one thread."""
    rows = [torch.cat(list(tiles[i : i + 16]), dim=2) for i in range(0, 12 * 16, 16)]
    photo = torch.cat(rows, dim=1)[:, :375, :500]
    jpeg = encoded(photo, "jpeg")
    small = to_uint8(photo, 3, 224)
    batch = torch.stack([small] * 4)
    flow = glow(FLOWS[0], "float32")
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "read a JPEG of 500 x 375, resize": (lambda: to_uint8(open_image(jpeg), 3, 224), 1),
        "perturb": (lambda: LatentPerturb(flow=flow)(batch), 4),
        "perturb, resolution=64": (lambda: LatentPerturb(flow=flow, resolution=64)(batch), 4),
        "perturb, resolution=32": (lambda: LatentPerturb(flow=flow, resolution=32)(batch), 4),
        "write PNG": (lambda: encoded(small, "png"), 1),
        "write JPEG": (lambda: encoded(small, "jpeg"), 1),
    }
    found = {name: round(1000 * timed(run) / count, 2) for name, (run, count) in runs.items()}
    print(found, flush=True)
    return found


def encoded(image: Tensor, kind: str) -> bytes:
    """An image file."""
    file = io.BytesIO()
    tvf.to_pil_image(image).save(file, kind)
    return file.getvalue()


def open_image(file: bytes) -> Image.Image:
    """Decode an image file."""
    return Image.open(io.BytesIO(file))


def training(place: Path, dtype: str) -> dict[str, float]:
    """Images a second of the flow's training, of all processes, in steps of one batch."""
    torch.manual_seed(0)
    processes = Processes("cpu")
    config = TrainConfig(
        output=place / f"training-{dtype}", batch_size=BATCH, network_dtype=dtype, steps=1000
    )
    flow = Glow(3, levels=3, steps=8, hidden=128)
    run = Run(flow, config, UInt8Images(EncodedImages(place / "images"), 3), processes)
    taken = []
    for _, batch in zip(range(3 + TIMED_STEPS), run.read_batches(), strict=False):
        started = time.perf_counter()
        run.train_step(*batch)  # ends where all have met
        taken.append(time.perf_counter() - started)
    step = statistics.median(taken[3:])
    result = {"images_per_second": round(BATCH / step, 1), "step_ms": round(1000 * step, 1)}
    if processes.count > 1:
        gradients = torch.zeros(sum(p.numel() for p in flow.parameters()))
        result["gradient_mib"] = round(gradients.numel() * 4 / 2**20, 1)
        result["all_reduce_ms"] = round(1000 * all_reduce_seconds(gradients), 1)
    return result


def all_reduce_seconds(tensor: Tensor) -> float:
    """Median of the sum of a tensor over the processes."""
    taken = []
    for _ in range(20):  # in all processes alike
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def augmenting(place: Path) -> tuple[float, float]:
    """When this worker of `augment_images` began and ended."""
    data, perturb = EncodedImages(place / "images"), LatentPerturb(flow="glow-cifar10")
    perturb(samples(BATCH))  # warms up
    config = AugmentConfig(output=place / "copies", shard_size=IMAGES // 4)
    if dist.is_initialized():
        dist.barrier()
    began = time.time()
    augment_images(data, perturb, config, device="cpu", progress=False)
    return began, time.time()


def worker(place: Path, dtypes: list[str]) -> None:
    """Measure in each process of a layout, all of them the same."""
    found: dict[str, Any] = {}
    Processes("cpu")
    found["augment"] = augmenting(place)
    for dtype in dtypes:
        found[f"training, {dtype}"] = training(place, dtype)
    rank = os.environ.get("RANK", "0")
    (place / f"{rank}.json").write_text(json.dumps(found))


def scaling(tiles: Tensor) -> dict[str, Any]:
    """Training and augmenting in each layout."""
    result: dict[str, Any] = {}
    dtypes = precisions()
    for layout, (processes, threads) in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            (place / "images" / "one").mkdir(parents=True)
            for number, tile in enumerate(tiles[:IMAGES]):
                tvf.to_pil_image(tile).save(place / "images" / "one" / f"{number:05}.png")
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            launcher = [*launch, str(processes)] if processes > 1 else []
            subprocess.run(
                [sys.executable, *launcher, __file__, "--worker", folder, *dtypes],
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
            found = [json.loads((place / f"{r}.json").read_text()) for r in range(processes)]
        began, ended = zip(*(f["augment"] for f in found), strict=True)
        result[layout] = {
            "augment": {"images_per_second": round(IMAGES / (max(ended) - min(began)), 1)},
            **{name: value for name, value in found[0].items() if name != "augment"},
        }
        print(layout, result[layout], flush=True)
    return result


def gigaflops(flow: Glow) -> dict[str, float]:
    """Count those of a round trip, by side."""
    return {str(s): round(2 * network_flops(flow, s, s) / 1e9, 2) for s in (32, 224)}


def measure() -> dict[str, Any]:
    """Everything."""
    load, tiles = os.getloadavg()[0], samples(IMAGES)
    started = time.time()
    result = {
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "others_load": round(load, 1),
        "gflop": {name: gigaflops(glow(name, "float32")) for name in FLOWS},
        "round_trips": round_trips(),
        "stages_ms": stages(tiles),
        "scaling": scaling(tiles),
    }
    return {**result, "minutes": round((time.time() - started) / 60, 1)}


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Format a table as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def hours(images_per_second: float) -> str:
    """Format the hours of a pass over ImageNet's training images."""
    found = IMAGENET / images_per_second / 3600
    return f"{found:.1f}" if found < 10 else f"{found:.0f}"


def tables(r: dict[str, Any]) -> dict[str, str]:
    """The page's tables by name."""
    rates, stage, scaled = r["round_trips"], r["stages_ms"], r["scaling"]
    shared = "idle" if r["others_load"] < 0.5 else "shared with other work"
    one, two = scaled["1 process, 1 thread"], scaled["2 processes"]

    def row(layout: str) -> list[Any]:
        cells: list[Any] = [layout]
        for what, base in one.items():
            rate = scaled[layout][what]["images_per_second"]
            cells.append(f"{rate:g} ({rate / base['images_per_second']:.2f})")
        return cells

    ways = {
        "as it is": "perturb",
        "`resolution=64`": "perturb, resolution=64",
        "`resolution=32`": "perturb, resolution=32",
    }
    around = stage["read a JPEG of 500 x 375, resize"] + stage["write JPEG"]
    steps = {name: found for name, found in two.items() if "step_ms" in found}
    megabytes = two["training, float32"]["gradient_mib"]
    return {
        "machine": f"Measured on {r['device']}, {r['cores']} cores, {shared} (load "
        f"{r['others_load']:g} when it began), torch {r['torch']}, {r['minutes']:g} minutes.",
        "round trips": table(
            ["images a second", *(f"{s} x {s}" for s in SIDES)],
            [[name, *(f"{rate:.3g}" for rate in found.values())] for name, found in rates.items()],
        ),
        "stages": table(
            ["stage of an image of 224 x 224, one thread", "ms"],
            [[name, f"{ms:g}"] for name, ms in stage.items()],
        ),
        "imagenet": table(
            ["how ImageNet is perturbed", "images/s of a core", "core hours a pass",
             "one copy offline, with reading and writing JPEG"],
            [
                [way, f"{1000 / stage[name]:.3g}", hours(1000 / stage[name]),
                 hours(1000 / (stage[name] + around))]
                for way, name in ways.items()
            ],
        ),
        "work": table(
            ["GFLOP a round trip", "32 x 32", "224 x 224"],
            [[name, *(f"{n:g}" for n in found.values())] for name, found in r["gflop"].items()],
        ),
        "scaling": table(
            ["images a second (over the first row)", *one], [row(layout) for layout in LAYOUTS]
        ),
        "all-reduce": table(
            ["two processes", "a step (ms)", f"all-reduce of {megabytes:g} MiB alone (ms)"],
            [[name, f"{f['step_ms']:g}", f"{f['all_reduce_ms']:g}"] for name, f in steps.items()],
        ),
    }  # fmt: skip


def draw(result: dict[str, Any]) -> None:
    """Rewrite the tables in the page."""
    for name, drawn in tables(result).items():
        write_table(PAGE, f"{MARK}: {name}", ["", drawn, ""])


def main() -> None:
    """Measure, keep, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(Path(options.worker[0]), options.worker[1:])
        return
    if not options.draw:
        keep_measurement("scale", measure())
    draw(read_measurement("scale"))


if __name__ == "__main__":
    main()
