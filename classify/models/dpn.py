"""Dual path network for small images: Chen et al., arXiv 1707.01629, with a 3x3 stem of stride 1 and no pooling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classify.models.layers import conv_norm, pooled


class DualPathBlock(nn.Module):
    """A grouped 3x3 convolution between two of 1x1: its first `residual` outputs are added, the others appended.

    Args:
        inputs: channels that it is given.
        channels: channels of the 3x3 convolution, in 32 groups.
        residual: channels of the path that is added to.
        growth: channels that it appends.
        stride: of the 3x3 convolution.
        first: it is the first of its stage, whose shortcut is a 1x1 convolution.
    """

    def __init__(self, inputs: int, channels: int, residual: int, growth: int, stride: int, first: bool) -> None:
        super().__init__()
        self.residual = residual
        self.reduce = conv_norm(inputs, channels, 1)
        self.grouped = conv_norm(channels, channels, 3, stride, 32)
        self.expand = conv_norm(channels, residual + growth, 1)
        self.shortcut = conv_norm(inputs, residual + growth, 1, stride) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.expand(F.relu(self.grouped(F.relu(self.reduce(x)))))
        beside = self.shortcut(x)
        d = self.residual
        return F.relu(torch.cat([beside[:, :d] + out[:, :d], beside[:, d:], out[:, d:]], 1))


class DPN(nn.Module):
    """A stem of 64 channels and four stages of dual path blocks, of which the last three halve height and width.

    Args:
        depths: blocks of the four stages.
        growths: channels that a block of each stage appends.
        num_classes: outputs.
        in_channels: channels of the images.
    """

    def __init__(
        self, depths: Sequence[int], growths: Sequence[int], num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        inputs = 64
        self.stem = conv_norm(in_channels, inputs, 3)
        made = []
        for number, (depth, growth) in enumerate(zip(depths, growths, strict=True)):
            channels, residual = 96 * 2**number, 256 * 2**number
            blocks = []
            for index in range(depth):
                stride = 2 if number > 0 and index == 0 else 1
                blocks.append(DualPathBlock(inputs, channels, residual, growth, stride, index == 0))
                inputs = residual + (index + 2) * growth
            made.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = made
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        out = F.relu(self.stem(images))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(pooled(out))


NETWORKS = {"dpn92": partial(DPN, (3, 4, 20, 3), (16, 32, 24, 128))}
