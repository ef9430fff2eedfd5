"""Hugging Face Trainer: dict batches from `datasets`, perturbed in the training step.

pip install transformers datasets accelerate
python examples/frameworks/hugging_face_trainer.py
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from latent_aug import LatentAdversarial, LatentPerturb

DATA = Path(__file__).parents[1] / "data"


class LatentTrainer(Trainer):
    """A Trainer whose training batches, and only those, are perturbed."""

    perturb: LatentPerturb
    attack: LatentAdversarial

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Random, then adversarial perturbation of `pixel_values`; labels stay."""
        inputs = self.attack.step(self.perturb(self._prepare_inputs(inputs)))
        return super().training_step(model, inputs, *args)


def to_pixels(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Convert as an image processor would."""
    pixels = [pil_to_tensor(image) / 255 for image in examples["image"]]
    return {"pixel_values": pixels, "labels": examples["label"]}


def main(images: int, epochs: int) -> None:
    """Train and print the loss."""
    samples = FashionMNIST(DATA)
    data = Dataset.from_list(
        [{"image": samples[i][0], "label": samples[i][1]} for i in range(images)]
    ).with_transform(to_pixels)
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
            layer_type="basic", num_labels=10,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            remove_unused_columns=False,  # with_transform needs the columns it reads
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
        )
        trainer = LatentTrainer(model, arguments, train_dataset=data)
        trainer.perturb = LatentPerturb(eps=0.3, flow="glow-fashionmnist")
        trainer.attack = LatentAdversarial(
            model,
            p=0.5,
            flow="glow-fashionmnist",
            forward=lambda model, batch: model(batch["pixel_values"]).logits,
        )
        print(f"loss {trainer.train().training_loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=3)
    main(**vars(parser.parse_args()))
