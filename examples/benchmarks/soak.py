"""A long run on small flows: memory stays flat, nothing non-finite comes out, counters are right.

    python examples/benchmarks/soak.py

A million images of 8 x 8 through LatentPerturb, every thousandth of which the flow cannot perturb
(NaN), then ten thousand attack steps on a small classifier. Memory is the process's resident set,
read twenty times on the way; the first tenth is warm-up.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measurements import keep_measurement
from torch import nn

from latent_aug import Glow, LatentAdversarial, LatentPerturb

IMAGES, BATCH, BAD = 1_000_000, 500, 1000
STEPS, PER_ATTACK = 10_000, 4


def tiny_flow() -> Glow:
    """One level of two steps of four channels."""
    torch.manual_seed(0)
    flow = Glow(3, levels=1, steps=2, hidden=4)
    flow.initialize(torch.rand(64, 3, 8, 8))
    return flow.requires_grad_(False).eval()


def resident_mib() -> float:
    """Measure the memory of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def perturbations(flow: Glow) -> Iterator[dict[str, int]]:
    """A million images; totals after each batch."""
    transform = LatentPerturb(0.25, flow=flow)
    images = torch.rand(BATCH, 3, 8, 8)
    done = bad = non_finite = 0
    for _ in range(IMAGES // BATCH):
        x = images.roll(1, 0)
        if done % BAD == 0:
            x[0] = float("nan")
            bad += 1
        out = transform(x)
        non_finite += int((~out.isfinite()).flatten(1).any(dim=1).sum())
        done += BATCH
        yield {
            "images": done,
            "not_finite_given": bad,
            "not_finite_returned": non_finite,
            "fallbacks": transform.fallbacks,
        }


def attacks(flow: Glow) -> Iterator[dict[str, int]]:
    """Ten thousand ascent steps; totals after each attack."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5))
    attack = LatentAdversarial(model, flow=flow, steps=PER_ATTACK, p=1.0, labels="true")
    x, y = torch.rand(16, 3, 8, 8), torch.arange(16) % 5
    statistics = model[1].running_mean.clone()
    non_finite = 0
    for number in range(STEPS // PER_ATTACK):
        out = attack(x, y)
        non_finite += int((~out.isfinite()).any())
        yield {
            "attack_steps": (number + 1) * PER_ATTACK,
            "not_finite_attacked": non_finite,
            "attack_fallbacks": attack.fallbacks,
            "statistics_changed": int(not torch.equal(model[1].running_mean, statistics)),
        }


def watched(run: Iterator[dict[str, int]], count: int) -> dict[str, object]:
    """The last totals, the memory at twenty times and the seconds."""
    memory, totals, started = [], {}, time.perf_counter()
    for number, found in enumerate(run):
        totals = found
        if number % (count // 20) == 0:
            memory.append(round(resident_mib(), 1))
    late = memory[2:]
    return {
        **totals,
        "seconds": round(time.perf_counter() - started),
        "resident_mib": memory,
        "growth_mib": round(late[-1] - late[0], 1),
    }


def main() -> None:
    """Run, print, keep; fail where something is wrong."""
    flow = tiny_flow()
    result = {
        "perturbations": watched(perturbations(flow), IMAGES // BATCH),
        "attacks": watched(attacks(flow), STEPS // PER_ATTACK),
    }
    print(json.dumps(result, indent=1))
    keep_measurement("soak", result)
    first, second = result["perturbations"], result["attacks"]
    counts = {first[k] for k in ("not_finite_given", "not_finite_returned", "fallbacks")}
    if len(counts) > 1:
        raise SystemExit("an image came back as it should not")
    if second["not_finite_attacked"] or second["statistics_changed"]:
        raise SystemExit("an attack left a trace, or something non-finite")


if __name__ == "__main__":
    main()
