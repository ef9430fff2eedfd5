"""Draw samples of a flow, and what perturbing them does.

    python examples/draw_flow.py glow-photographs docs/pictures/flow.png
    python examples/draw_flow.py glow-photographs docs/pictures/parts.png --parts

Rows: samples at temperature 0.7; the same perturbed with linf 0.1, 0.25 and 0.4 and with l2 10;
four times the difference for linf 0.25. With --parts, all with linf 0.4 and each followed by four
times its difference: each level of the flow alone, finest first, then everything but a square in
the middle. Prints the mean absolute change of a pixel in grey levels. Samples stand in for
photographs, whose licence may not allow to show them.
"""

import argparse
from pathlib import Path

import torch
from panels import amplify
from torch import Tensor
from torchvision.utils import save_image

from latent_aug import Flow, LatentPerturb, load_flow

COLUMNS, SCALE = 12, 2


def sizes(flow: Flow, samples: Tensor) -> list[Tensor]:
    """One row for each size of perturbation, and a difference."""
    rows = []
    for norm, eps in (("linf", 0.1), ("linf", 0.25), ("linf", 0.4), ("l2", 10.0)):
        rows.append(LatentPerturb(eps, norm=norm, flow=flow)(samples))
        print(f"{norm} {eps}: {255 * (rows[-1] - samples).abs().mean():.1f} grey levels")
    return [*rows, amplify(samples, rows[1])]


def parts(flow: Flow, samples: Tensor) -> list[Tensor]:
    """Two rows for each level, and for a mask: the result and the difference."""
    mask = torch.ones(samples.shape[-2:])
    quarter = mask.shape[0] // 4
    mask[quarter:-quarter, quarter:-quarter] = 0
    rows: list[Tensor] = []
    for options in (*({"levels": level} for level in range(flow.levels)), {"mask": mask}):
        perturbed = LatentPerturb(0.4, flow=flow, **options)(samples)
        rows += [perturbed, amplify(samples, perturbed)]
        name = f"level {options['levels']}" if "levels" in options else "mask"
        print(f"linf 0.4, {name}: {255 * (perturbed - samples).abs().mean():.1f} grey levels")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flow", help="a name or path for load_flow")
    parser.add_argument("picture", type=Path, help="where to draw")
    parser.add_argument("--parts", action="store_true", help="levels and a mask, not sizes")
    args = parser.parse_args()
    flow = load_flow(args.flow)
    torch.manual_seed(0)
    side = 32 if flow.channels == 3 else 28
    samples = flow.sample(COLUMNS, size=side, temperature=0.7)
    rows = [samples, *(parts if args.parts else sizes)(flow, samples)]
    large = torch.cat(rows).repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)
    save_image(large, args.picture, nrow=COLUMNS, padding=2)
