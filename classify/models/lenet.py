"""LeNet-5 (LeCun et al. 1998) with ReLU, maximum pooling, and batch norm after its convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from classify.models.layers import Dropout


class LeNet(nn.Module):
    """Two 5x5 convolutions and three linear layers, for images of 12x12 or more.

    An image of 28x28 gives maps of 5x5, which the linear layers are made for; maps of other images are averaged to it.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        dropout: probability that a feature is dropped before each of the last two linear layers.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, *, dropout: Dropout = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5, padding=2, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(5),
            nn.Flatten(),
        )
        self.hidden = nn.Sequential(
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.fc = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        return self.fc(self.hidden(self.features(images)))


NETWORKS = {"lenet": LeNet}
