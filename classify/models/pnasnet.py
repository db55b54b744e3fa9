"""Two small networks of cells after progressive architecture search (Liu et al., arXiv 1712.00559).

They are those of the network deconvolution paper: a cell's "separable" convolution is its depthwise part alone.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classify.models.layers import conv_norm, pooled


class Pooling(nn.Sequential):
    """A 3x3 maximum, and a 1x1 convolution to `outputs` channels where it halves height and width."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(nn.MaxPool2d(3, stride, padding=1))
        if stride == 2:
            self.append(conv_norm(inputs, outputs, 1))


class CellA(nn.Module):
    """A depthwise 7x7 convolution plus a pooling."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv7 = conv_norm(inputs, outputs, 7, stride, inputs)
        self.pooling = Pooling(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv7(x) + self.pooling(x))


class CellB(nn.Module):
    """Depthwise 7x7 plus 3x3 convolutions, beside a depthwise 5x5 one plus a pooling, and a 1x1 convolution of both."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv7 = conv_norm(inputs, outputs, 7, stride, inputs)
        self.conv3 = conv_norm(inputs, outputs, 3, stride, inputs)
        self.conv5 = conv_norm(inputs, outputs, 5, stride, inputs)
        self.pooling = Pooling(inputs, outputs, stride)
        self.reduce = conv_norm(2 * outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.conv7(x) + self.conv3(x))
        right = F.relu(self.conv5(x) + self.pooling(x))
        return F.relu(self.reduce(torch.cat([left, right], 1)))


class PNASNet(nn.Module):
    """A stem, and three times six cells; between them a cell doubles the channels and halves height and width.

    Args:
        cell: CellA or CellB.
        channels: channels of the stem and the first six cells.
        num_classes: outputs.
        in_channels: channels of the images.
    """

    def __init__(
        self, cell: type[CellA] | type[CellB], channels: int, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.stem = conv_norm(in_channels, channels, 3)
        cells: list[nn.Module] = []
        for number in range(3):
            if number > 0:
                cells.append(cell(channels, 2 * channels, 2))
                channels *= 2
            cells += [cell(channels, channels, 1) for _ in range(6)]
        self.cells = nn.Sequential(*cells)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        return self.fc(pooled(self.cells(F.relu(self.stem(images)))))


NETWORKS = {"pnasnet_a": partial(PNASNet, CellA, 44), "pnasnet_b": partial(PNASNet, CellB, 32)}
