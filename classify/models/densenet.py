"""DenseNet-BC for small images: Huang et al., arXiv 1608.06993, with a 3x3 stem of stride 1 and no pooling after it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classify.models.layers import conv, pooled
from engine.config import Count


class DenseLayer(nn.Module):
    """Adds `growth` channels to its input: a 1x1 and a 3x3 convolution, a norm and an activation before each."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, 4 * growth, 1)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], 1)


class DenseNet(nn.Module):
    """Four stages of dense layers; between them a 1x1 convolution halves the channels and a pooling height and width.

    Args:
        depths: layers of the four stages.
        num_classes: outputs.
        in_channels: channels of the images.
        growth: channels that a layer adds; the stem has twice as many.
    """

    def __init__(
        self, depths: Sequence[int], num_classes: int = 10, in_channels: int = 3, *, growth: Count = 32
    ) -> None:
        super().__init__()
        channels = 2 * growth
        self.stem = conv(in_channels, channels, 3)
        layers: list[nn.Module] = []
        for number, depth in enumerate(depths):
            if number > 0:
                halves = [nn.BatchNorm2d(channels), nn.ReLU(), conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
                layers.append(nn.Sequential(*halves))
                channels //= 2
            layers.append(nn.Sequential(*(DenseLayer(channels + i * growth, growth) for i in range(depth))))
            channels += depth * growth
        self.features = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        out = F.relu(self.bn(self.features(self.stem(images))))
        return self.fc(pooled(out))


NETWORKS = {"densenet121": partial(DenseNet, (6, 12, 24, 16))}
