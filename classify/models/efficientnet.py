"""The EfficientNet-B0 of the network deconvolution paper: after Tan and Le (arXiv 1905.11946), for small images.

It differs from theirs: a stem of stride 1, 3x3 kernels only, ReLU, the gate after the projection, no wide convolution
at the end and no dropout. A block that halves height and width adds its ungated output in place of a shortcut.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from classify.models.layers import conv_norm, pooled, shortcut, squeeze_excitation

_STAGES = (
    (1, 16, 1, 2),
    (6, 24, 2, 1),
    (6, 40, 2, 2),
    (6, 80, 3, 2),
    (6, 112, 3, 1),
    (6, 192, 4, 2),
    (6, 320, 1, 2),
)
"""Expansion, output channels, number of blocks and stride of the first of each stage."""


class GatedInvertedResidual(nn.Module):
    """A depthwise 3x3 convolution on `expansion` times the input channels, between two of 1x1, and a gate."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        channels = expansion * inputs
        self.expand = conv_norm(inputs, channels, 1)
        self.depthwise = conv_norm(channels, channels, 3, stride, channels)
        self.project = conv_norm(channels, outputs, 1)
        self.shortcut = shortcut(inputs, outputs) if stride == 1 else None
        self.gate = squeeze_excitation(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        return self.gate(out) + (out if self.shortcut is None else self.shortcut(x))


class EfficientNet(nn.Module):
    """A stem and seven stages that make height and width a thirty-second.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        channels = 32
        self.stem = conv_norm(in_channels, channels, 3)
        blocks = []
        for expansion, outputs, depth, stride in _STAGES:
            for index in range(depth):
                blocks.append(GatedInvertedResidual(channels, outputs, expansion, stride if index == 0 else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        return self.fc(pooled(self.blocks(F.relu(self.stem(images)))))


NETWORKS = {"efficientnet_b0": EfficientNet}
