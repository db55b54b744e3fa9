"""ResNeXt-29 for small images: Xie et al., arXiv 1611.05431, 32 groups of 4 channels in the first stage.

As in the network deconvolution paper's network, the stem is a 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from classify.models.layers import conv_norm, pooled, shortcut, stages


class GroupedBlock(nn.Module):
    """A grouped 3x3 convolution on half the channels, between two of 1x1, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        channels = outputs // 2
        self.reduce = conv_norm(inputs, channels, 1)
        self.grouped = conv_norm(channels, channels, 3, stride, groups)
        self.expand = conv_norm(channels, outputs, 1)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.expand(F.relu(self.grouped(F.relu(self.reduce(x)))))
        return F.relu(out + self.shortcut(x))


class ResNeXt(nn.Module):
    """A stem and three stages of three blocks, of which the last two halve height and width.

    Args:
        groups: groups of the 3x3 convolutions.
        outputs: channels that the stages give.
        num_classes: outputs.
        in_channels: channels of the images.
    """

    def __init__(self, groups: int, outputs: Sequence[int], num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        block = partial(GroupedBlock, groups=groups)
        self.stem = conv_norm(in_channels, 64, 1)
        self.layer1, self.layer2, self.layer3 = stages(block, 64, outputs, (3, 3, 3))
        self.fc = nn.Linear(outputs[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        out = self.layer3(self.layer2(self.layer1(F.relu(self.stem(images)))))
        return self.fc(pooled(out))


NETWORKS = {"resnext29_32x4d": partial(ResNeXt, 32, (256, 512, 1024))}
