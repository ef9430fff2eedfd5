"""What the network sees: photographs cropped, perturbed by a copy, and attacked, as one picture.

    pip install -e '.[photographs,train]' scikit-image
    python examples/photographs/draw.py docs/pictures/pretrained.jpg

The photographs come with scikit-image and are free of copyright. The attack is on the network as it
was pretrained, at the classes that it predicts.
"""

import sys

import torch
from fine_tune_network import make_network
from matplotlib.figure import Figure
from skimage import data
from torchvision.transforms import v2

from latent_aug import LatentAdversarial, LatentPerturb

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")


def main() -> None:
    """Draw the picture."""
    torch.manual_seed(0)
    cut = v2.Compose([v2.ToImage(), v2.Resize(128), v2.CenterCrop(128)])
    images = torch.stack(
        [cut(getattr(data, name)()).as_subclass(torch.Tensor) for name in PHOTOGRAPHS]
    )
    floats = images.float() / 255
    network = make_network("pretrained", None)
    attack = LatentAdversarial(network, resolution=32, p=1.0)
    labels = torch.zeros(len(images), dtype=torch.long)  # it attacks the predicted
    columns = {
        "photograph": images,
        "LatentPerturb\nresolution=32": LatentPerturb(resolution=32)(images),
        "LatentPerturb\nresolution=64": LatentPerturb(resolution=64)(images),
        "LatentAdversarial\nresolution=32": attack(floats, labels),
        "RandAugment": torch.stack([v2.RandAugment()(image) for image in images]),
    }
    figure = Figure(figsize=(7.5, 4.9), layout="constrained")
    grid = figure.subplots(len(images), len(columns))
    for (title, column), axes in zip(columns.items(), grid.T, strict=True):
        axes[0].set_title(title, fontsize=9)
        for image, place in zip(column, axes, strict=True):
            place.imshow(image.permute(1, 2, 0), interpolation="nearest")
            place.axis("off")
    figure.savefig(sys.argv[1], dpi=110, pil_kwargs={"quality": 88})


if __name__ == "__main__":
    main()
