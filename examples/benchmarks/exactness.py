"""What low-precision coupling networks do to the exactness of trained flows.

    python examples/benchmarks/exactness.py glow-cifar10=DIR glow-fashionmnist=DIR

Each FLOW=DIR names a bundled flow (or a directory) and a folder of test images of its size. Every
image is encoded and decoded with coupling networks in float32 and bfloat16, on a GPU also in
float16 (a CPU takes minutes for a thousand images). Beside them, how far the lean gradient is from
the fast one on 256 of the images, relative to its norm.
"""

import argparse

import torch
from contestants import contestant
from measurements import keep_measurement

from latent_aug import Glow
from latent_aug.diagnostics.measure import load_batches
from latent_aug.images.conversion import from_float
from latent_aug.images.datasets import UInt8Images, open_images, stack_images


@torch.no_grad()
def round_trip(flow: Glow, images: UInt8Images) -> dict[str, float]:
    """Compare every image with its decoded latent."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flow.to(device)
    greatest, total, identical = 0.0, 0.0, 0
    for pixels in load_batches(images, 200):
        x = pixels.to(device) / 255
        back = flow.decode(flow.encode(x))
        error = (back - x).abs()
        greatest, total = max(greatest, error.max().item()), total + error.mean().item() * len(x)
        same = from_float(back, torch.uint8) == pixels.to(device)
        identical += int(same.flatten(1).all(dim=1).sum())
    return {
        "images": len(images),
        "greatest_error": greatest,
        "mean_error": total / len(images),
        "uint8_identical": identical,
    }


def lean_against_fast(flow: Glow, images: UInt8Images) -> dict[str, float]:
    """Their distance on real images, relative to the gradient's norm."""
    found = []
    generator = torch.Generator().manual_seed(0)
    for chosen in torch.tensor(images.spread_indices(256)).split(32):
        x = stack_images(images.__getitems__(chosen.tolist())) / 255
        z = flow.encode(x).requires_grad_(True)
        weights = torch.randn(x.shape, generator=generator)
        fast, lean = (
            torch.autograd.grad((flow.decode(z, gradient=way) * weights).sum(), z)[0]
            for way in ("fast", "lean")
        )
        found.append((lean - fast).flatten(1).norm(dim=1) / fast.flatten(1).norm(dim=1))
    relative = torch.cat(found)
    return {"median": float(relative.median()), "greatest": float(relative.max())}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="FLOW=DIR")
    result: dict[str, object] = {}
    for pair in parser.parse_args().pairs:
        name, _, folder = pair.partition("=")
        rows: dict[str, object] = {}
        for way in ("float32", "bfloat16", *(["float16"] if torch.cuda.is_available() else [])):
            flow = contestant(name, way)
            assert isinstance(flow, Glow)
            images = UInt8Images(open_images(folder), flow.channels)
            rows[way] = round_trip(flow, images)
            if way == "float32":
                rows["lean_against_fast"] = lean_against_fast(flow.cpu(), images)
            print(name, way, rows[way], flush=True)
            result[name] = rows
            keep_measurement("exactness", result)


if __name__ == "__main__":
    main()
