"""Pre-activation ResNet for small images: He et al., arXiv 1603.05027.

As in the network deconvolution paper's network, there is no norm after the stem and none after the last block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from classify.models.layers import Width, conv, pooled, scaled, stages


class PreactBlock(nn.Module):
    """Two 3x3 convolutions, a norm and an activation before each, beside a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.shortcut = None if stride == 1 and inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        beside = x if self.shortcut is None else self.shortcut(active)
        return self.residual(active) + beside

    def residual(self, active: Tensor) -> Tensor:
        """What the block adds to its shortcut."""
        return self.conv2(F.relu(self.bn2(self.conv1(active))))


class PreactResNet(nn.Module):
    """A stem, four stages of blocks with 64 to 512 channels, of which the last three halve height and width.

    Args:
        depths: blocks of the four stages.
        num_classes: outputs.
        in_channels: channels of the images.
        width: factor on all channel numbers.
    """

    def __init__(
        self, depths: Sequence[int], num_classes: int = 10, in_channels: int = 3, *, width: Width = 1.0
    ) -> None:
        super().__init__()
        channels = [scaled(number, width) for number in (64, 128, 256, 512)]
        self.stem = conv(in_channels, channels[0], 3)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(PreactBlock, channels[0], channels, depths)
        self.fc = nn.Linear(channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(images)))))
        return self.fc(pooled(out))


NETWORKS = {"preact_resnet18": partial(PreactResNet, (2, 2, 2, 2))}
