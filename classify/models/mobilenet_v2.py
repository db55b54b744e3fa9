"""MobileNetV2 for small images: Sandler et al., arXiv 1801.04381.

As in the network deconvolution paper's network, the stem and the second stage keep height and width, activations are
plain ReLU, and a shortcut may change the number of channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from classify.models.layers import Width, conv_norm, pooled, scaled, shortcut

_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, output channels, number of blocks and stride of the first of each stage (table 2 of the paper)."""


class InvertedResidual(nn.Module):
    """A depthwise 3x3 convolution on `expansion` times the input channels, between two of 1x1.

    Beside it, where height and width stay, is a shortcut.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        channels = expansion * inputs
        self.expand = conv_norm(inputs, channels, 1)
        self.depthwise = conv_norm(channels, channels, 3, stride, channels)
        self.project = conv_norm(channels, outputs, 1)
        self.shortcut = shortcut(inputs, outputs) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        return out if self.shortcut is None else out + self.shortcut(x)


class MobileNetV2(nn.Module):
    """A stem, seven stages of inverted residuals that make height and width an eighth, and a wide 1x1 convolution.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        width: factor on all channel numbers.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, *, width: Width = 1.0) -> None:
        super().__init__()
        channels, last = scaled(32, width), scaled(1280, width)
        self.stem = conv_norm(in_channels, channels, 3)
        blocks = []
        for expansion, outputs, depth, stride in _STAGES:
            for index in range(depth):
                inputs, channels = channels, scaled(outputs, width)
                blocks.append(InvertedResidual(inputs, channels, expansion, stride if index == 0 else 1))
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_norm(channels, last, 1)
        self.fc = nn.Linear(last, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        out = self.blocks(F.relu(self.stem(images)))
        return self.fc(pooled(F.relu(self.head(out))))


NETWORKS = {"mobilenet_v2": MobileNetV2}
