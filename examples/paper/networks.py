"""The classifiers of the tables, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


def small_resnet(channels: int, classes: int, width: int) -> nn.Module:
    """Four stages of one basic block, from `width` to 8 `width` channels, for small images."""
    return build_resnet(block, channels, classes, width)


def build_resnet(
    build: Callable[[int, int, int], nn.Module], channels: int, classes: int, width: int
) -> nn.Module:
    """A 3 x 3 stem, four stages, one linear layer."""
    network = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        *make_stages(build, width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )
    return network.to(memory_format=torch.channels_last)


def make_stages(build: Callable[[int, int, int], nn.Module], width: int) -> list[nn.Module]:
    """Four stages, each but the first at half the size with twice the channels."""
    stages = [build(width, width, 1)]
    return stages + [build(width * 2**i, width * 2 ** (i + 1), 2) for i in range(3)]


def block(inputs: int, outputs: int, stride: int) -> BasicBlock:
    """A basic block of torchvision's, a 1x1 convolution on its shortcut where shapes differ."""
    shortcut = None
    if inputs != outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
    return BasicBlock(inputs, outputs, stride, shortcut)


class PreactivationBlock(nn.Module):
    """Normalize, ReLU, convolve, twice, beside a shortcut (He et al. 2016, Zagoruyko 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)])
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of a batch (B, C, H, W)."""
        hidden = F.relu(self.norms[0](x))
        if self.shortcut is not None:
            x = self.shortcut(hidden)
        return x + self.second(F.relu(self.norms[1](self.first(hidden))))


def preactivation_resnet(channels: int, classes: int, width: int) -> nn.Module:
    """Build a `small_resnet` of pre-activation blocks."""
    stages = make_stages(PreactivationBlock, width)
    network = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        *stages,
        nn.BatchNorm2d(8 * width),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )
    return network.to(memory_format=torch.channels_last)


def cifar_resnet18(channels: int, classes: int, width: int) -> nn.Module:
    """The paper's ResNet-18 for 32 x 32 images at `width` 64: no pooling after the stem (A.1).

    Its convolutions start as torchvision's do.
    """
    network = build_resnet(two_blocks, channels, classes, width)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network


def two_blocks(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A stage of a ResNet-18."""
    return nn.Sequential(block(inputs, outputs, stride), block(outputs, outputs, 1))


def cnn(channels: int, classes: int, width: int) -> nn.Module:
    """Table 4's CNN of Stutz et al. 2019 at `width` 16, for 28 x 28 images."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
        convolution = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    # 28 pixels are 3 after three halvings
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36 * width, 100), nn.Linear(100, classes))


def lenet5(channels: int, classes: int, width: int) -> nn.Module:
    """Table 4's LeNet-5 at `width` 6, weights from a truncated normal of 0.1 (A.1).

    Its last line, a ReLU on the logits, is left out as a slip: no class could be ruled out.
    """
    network = nn.Sequential(
        nn.Conv2d(channels, width, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(width, 16, 5),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )
    for parameter in network.parameters():
        nn.init.trunc_normal_(parameter, std=0.1, a=-0.2, b=0.2)
    return network


NETWORKS = {
    "resnet": small_resnet,
    "preactivation": preactivation_resnet,
    "resnet18": cifar_resnet18,
    "cnn": cnn,
    "lenet5": lenet5,
}
