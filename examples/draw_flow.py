"""Draw samples of a flow, and what perturbing them does.

    python examples/draw_flow.py glow-cifar10 docs/pictures/glow-cifar10.png

Rows: samples at temperature 0.7; the same perturbed with linf 0.1, 0.25 and 0.4 and with l2 10;
four times the difference for linf 0.25. Samples stand in for photographs, whose licence may not
allow to show them.
"""

import sys

import torch
from torchvision.utils import save_image

from latent_aug import LatentPerturb, load_flow

COLUMNS, SIDE, SCALE = 12, 32, 2

if __name__ == "__main__":
    flow = load_flow(sys.argv[1])
    torch.manual_seed(0)
    side = SIDE if flow.channels == 3 else 28
    samples = flow.decode(0.7 * torch.randn(COLUMNS, flow.channels, side, side)).clamp(0, 1)
    rows = [samples]
    for norm, eps in (("linf", 0.1), ("linf", 0.25), ("linf", 0.4), ("l2", 10.0)):
        rows.append(LatentPerturb(eps, norm=norm, flow=flow)(samples))
    rows.append(((rows[2] - samples) * 4 + 0.5).clamp(0, 1))
    large = torch.cat(rows).repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)
    save_image(large, sys.argv[2], nrow=COLUMNS, padding=2)
