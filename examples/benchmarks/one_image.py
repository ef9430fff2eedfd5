"""What one PIL image through `LatentPerturb` costs on one thread, beside an image of a batch.

    python examples/benchmarks/one_image.py

Images are 32 x 32, and the flow is the default one. A batch has 64 images. A single image passes
the flow by convolutions, by products of matrices (what the flow does), and by programs that
`Glow.compile_single_images` made. All take turns, so that a busy machine slows them alike. Figures
are medians of CPU milliseconds for an image.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measurements import keep_measurement
from torchvision.transforms.v2.functional import to_pil_image

from latent_aug import LatentPerturb, load_flow
from latent_aug.flows import small_image

ROUNDS = 40
SINGLE = 16


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    flow = copy.deepcopy(load_flow())
    latents = 0.7 * torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    many = (255 * flow.decode(latents).clamp(0, 1)).to(torch.uint8)
    photos = [to_pil_image(image) for image in many[:SINGLE]]
    perturb, compiled = LatentPerturb(), LatentPerturb(flow=flow)
    with TemporaryDirectory() as folder:
        begin = time.perf_counter()
        flow.compile_single_images(32, folder)
        seconds = time.perf_counter() - begin
        most = small_image.MOST_LEVEL_PIXELS

        def perturb_singly(transform: LatentPerturb, most: int = most) -> None:
            small_image.MOST_LEVEL_PIXELS = most
            for photo in photos:
                transform(photo)

        calls: dict[str, tuple[Callable[[], object], int]] = {
            "batch": (lambda: perturb(many), len(many)),
            "convolutions": (lambda: perturb_singly(perturb, most=0), SINGLE),
            "products": (lambda: perturb_singly(perturb), SINGLE),
            "programs": (lambda: perturb_singly(compiled), SINGLE),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, (call, count) in calls.items():
                begin = time.process_time()
                call()
                times[name].append(1000 * (time.process_time() - begin) / count)
    found = {name: statistics.median(values) for name, values in times.items()}
    figures = {
        "ms": {name: round(value, 2) for name, value in found.items()},
        "times_a_batch": {name: round(value / found["batch"], 2) for name, value in found.items()},
        "compile_s": round(seconds, 1),
    }
    print(json.dumps(figures, indent=1))
    keep_measurement(Path(__file__).stem, figures)


if __name__ == "__main__":
    main()
