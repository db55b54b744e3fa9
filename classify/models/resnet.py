"""ResNet for small images: He et al., arXiv 1512.03385, with a 3x3 stem of stride 1 and no pooling after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from classify.models.layers import Width, conv_norm, pooled, scaled, shortcut, stages


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, outputs, 3, stride)
        self.conv2 = conv_norm(outputs, outputs, 3)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 3x3 convolution on a quarter of the channels, between two of 1x1, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        channels = max(1, outputs // 4)
        self.conv1 = conv_norm(inputs, channels, 1)
        self.conv2 = conv_norm(channels, channels, 3, stride)
        self.conv3 = conv_norm(channels, outputs, 1)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A stem of 64 channels, four stages of residual blocks, of which the last three halve height and width.

    Args:
        block: makes a block from its input channels, output channels and stride.
        outputs: channels that the stages give.
        depths: blocks of the stages.
        num_classes: outputs.
        in_channels: channels of the images.
        width: factor on all channel numbers.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        outputs: Sequence[int],
        depths: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        width: Width = 1.0,
    ) -> None:
        super().__init__()
        first, channels = scaled(64, width), [scaled(number, width) for number in outputs]
        self.stem = conv_norm(in_channels, first, 3)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(block, first, channels, depths)
        self.fc = nn.Linear(channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        out = F.relu(self.stem(images))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(pooled(out))


NETWORKS = {
    "resnet18": partial(ResNet, BasicBlock, (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (64, 128, 256, 512), (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (256, 512, 1024, 2048), (3, 4, 6, 3)),
}
