"""What latent-aug costs a user: to import, to load a flow, at the first call, for an image.

    python examples/benchmarks/cost.py

Times the default flow on random 8-bit images of 32 and 64 pixels (the cost does not
depend on what is in them, and samples that fall back cost the same), medians. "worker" is one PIL
image at a time on one thread, as in each DataLoader worker; "batch" is 64 images on all threads,
or on one; "bfloat16" has coupling networks of that precision. The attack is on ResNet-18 for small
images, 3 steps. Imports and first calls are timed in fresh processes, which take turns.
"""

import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from contestants import cifar_resnet, seconds
from measurements import keep_measurement
from torch.nn.functional import cross_entropy
from torchvision.transforms.v2.functional import to_pil_image

from latent_aug import LatentAdversarial, LatentPerturb, load_flow

TIMED = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
FIRST_CALL = (
    "import torch, time; from latent_aug import LatentPerturb; p = LatentPerturb(0.25); "
    "x = torch.zeros(3, 32, 32, dtype=torch.uint8); t = time.perf_counter(); p(x); "
    "print(time.perf_counter() - t)"
)


def in_fresh_processes(**codes: str) -> dict[str, float]:
    """Median of the seconds that each code prints, ten processes each, in turn."""
    found: dict[str, list[float]] = {name: [] for name in codes}
    for turn in range(11):
        for name, code in codes.items():
            output = subprocess.check_output([sys.executable, "-c", code], text=True)
            if turn:  # the first one fills the file system's cache
                found[name].append(float(output.splitlines()[-1]))
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def milliseconds(call: Callable[[], object], count: int) -> float:
    """Measure milliseconds per image."""
    return round(1000 * seconds(call, repeats=5, patience=5) / count, 2)


def costs(side: int) -> dict[str, float]:
    """Measure what images of one size cost."""
    threads = torch.get_num_threads()
    flow = load_flow()
    low = copy.deepcopy(flow)
    low.network_dtype = torch.bfloat16
    transform, faster, model = LatentPerturb(0.25), LatentPerturb(0.25, flow=low), cifar_resnet()
    attack, faster_attack = (
        LatentAdversarial(model, steps=3, p=1.0, labels="true", flow=f) for f in (flow, low)
    )
    batch = torch.randint(256, (64, 3, side, side), dtype=torch.uint8)
    photos = [to_pil_image(image) for image in batch[:8]]
    x, y = batch / 255, torch.zeros(64, dtype=torch.long)
    torch.set_num_threads(1)
    worker = milliseconds(lambda: [transform(photo) for photo in photos], 8)
    alone = milliseconds(lambda: transform(batch), 64)
    torch.set_num_threads(threads)
    return {
        "side": side,
        "perturb_worker_ms": worker,
        "perturb_batch_one_thread_ms": alone,
        "perturb_batch_ms": milliseconds(lambda: transform(batch), 64),
        "perturb_batch_bfloat16_ms": milliseconds(lambda: faster(batch), 64),
        "attack_batch_ms": milliseconds(lambda: attack(x, y), 64),
        "attack_batch_bfloat16_ms": milliseconds(lambda: faster_attack(x, y), 64),
        "classifier_forward_backward_ms": milliseconds(
            lambda: cross_entropy(model(x), y).backward(), 64
        ),
    }


def main() -> None:
    """Measure, print, keep."""
    fresh = in_fresh_processes(
        import_torchvision_s=TIMED.format("import torchvision"),
        import_latent_aug_s=TIMED.format("import latent_aug"),
        load_flow_s="from latent_aug import load_flow; " + TIMED.format("load_flow()"),
        first_call_s=FIRST_CALL,
    )
    rows = [costs(32), costs(64)]
    result = {
        **fresh,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    print(json.dumps(result, indent=1))
    keep_measurement("cost", result)


if __name__ == "__main__":
    main()
