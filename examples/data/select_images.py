"""Cut the quickstart's images out of FashionMNIST: 1,000 for training, 1,000 for the test.

    python examples/data/select_images.py DIR

DIR holds FashionMNIST as folders train/<class>/*.png and test/<class>/*.png. A hundred images a
class of each split are drawn with a fixed seed, shuffled, and written in the data set's own IDX
format, so that torchvision.datasets.FashionMNIST("examples/data", train=...) reads them. The
images are FashionMNIST's, copyright 2017 Zalando SE, MIT licence.
"""

import sys
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor

PER_CLASS = 100


def write_idx(path: Path, values: torch.Tensor) -> None:
    """Write a uint8 tensor in the IDX format of MNIST."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(header + values.contiguous().numpy().tobytes())


def select(folder: ImageFolder, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 28, 28) and labels (N,), classes equally often, in random order."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.tensor(folder.targets)
    picked = torch.cat(
        [
            members[torch.randperm(len(members), generator=generator)[:PER_CLASS]]
            for members in ((targets == c).nonzero().flatten() for c in range(10))
        ]
    )
    # Class by class in turn, so that every beginning of the list is balanced.
    picked = picked.reshape(10, PER_CLASS).T.flatten()
    images = [pil_to_tensor(folder[i][0].convert("L"))[0] for i in picked.tolist()]
    return torch.stack(images), targets[picked].byte()


if __name__ == "__main__":
    raw = Path(__file__).parent / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = select(ImageFolder(Path(sys.argv[1]) / split), seed=0)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)
