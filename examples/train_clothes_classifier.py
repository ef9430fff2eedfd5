"""Train the small classifier that `latent-aug explore` attacks, and pack it with a few images.

    python examples/train_clothes_classifier.py

Trains on the 1,000 FashionMNIST training images that ship with the repository, without
augmentation, measures it on the 1,000 test images, and writes weights, twenty of those test images
and what is to be said of it to latent_aug/diagnostics/clothes.safetensors. About a minute on two
CPU cores.
"""

import torch
import torch.nn.functional as F
from quickstart import accuracy, load_images
from safetensors.torch import save

from latent_aug.diagnostics.explore import CLOTHES, build_classifier

EPOCHS, BATCH, SHOWN = 30, 50, 2  # shown of each class


def main() -> None:
    """Train, measure, write."""
    torch.manual_seed(0)
    images, labels = load_images(train=True)
    test_images, test_labels = load_images(train=False)
    model = build_classifier()
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-4)
    steps = EPOCHS * len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    right = accuracy(model.eval(), test_images, test_labels)
    shown = torch.cat([(test_labels == k).nonzero()[:SHOWN, 0] for k in range(10)])
    about = (
        f"A small convolutional network, trained on {len(images):,} images of FashionMNIST without "
        f"augmentation; right on {right:.1f} % of {len(test_images):,} test images. The clothes "
        "here are among the test images."
    )
    tensors = {**model.state_dict(), "labels": test_labels[shown].to(torch.uint8)}
    tensors["images"] = (test_images[shown] * 255).round().to(torch.uint8)
    CLOTHES.write_bytes(save(tensors, {"about": about}))
    print(about, f"{CLOTHES.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
