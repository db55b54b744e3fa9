"""VGG for small images.

Configurations A, B, D and E of Simonyan and Zisserman (arXiv 1409.1556) with batch norm; one linear layer on the mean
of the last map takes the place of their three.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from classify.models.layers import Dropout, Width, conv, pooled, scaled


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each with a pooling by 2 at its end: for images of 32x32 or more.

    Args:
        depths: convolutions of the five stages.
        num_classes: outputs.
        in_channels: channels of the images.
        width: factor on all channel numbers, which are 64, 128, 256, 512 and 512.
        dropout: probability that a feature is dropped before the classifier.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        width: Width = 1.0,
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for depth, outputs in zip(depths, (64, 128, 256, 512, 512), strict=True):
            for _ in range(depth):
                inputs, channels = channels, scaled(outputs, width)
                layers += [conv(inputs, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        return self.fc(self.dropout(pooled(self.features(images))))


NETWORKS = {
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
}
