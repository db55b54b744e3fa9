"""Multi-layer perceptron on the pixels of an image, as in the network deconvolution paper's comparison."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from classify.models.layers import Dropout
from engine.config import Count


class MLP(nn.Module):
    """Hidden layers, each a linear layer, batch norm and an activation, and a classifier.

    The features pass the batch norm as maps of one pixel, so that it is a BatchNorm2d, which every recipe knows.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        size: their height and width; the weights fit no other.
        hidden: features of a hidden layer.
        layers: hidden layers; the authors' code counts the classifier too, so that its three are two here.
        activation: sigmoid as in the authors' code, or relu.
        dropout: probability that a feature is dropped after each hidden layer.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        size: int = 28,
        hidden: Count = 128,
        layers: Count = 3,
        activation: Literal["sigmoid", "relu"] = "sigmoid",
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Flatten()]
        features = in_channels * size * size
        for _ in range(layers):
            parts += [nn.Linear(features, hidden), nn.Unflatten(1, (hidden, 1, 1)), nn.BatchNorm2d(hidden)]
            parts += [nn.Sigmoid() if activation == "sigmoid" else nn.ReLU(), nn.Flatten(), nn.Dropout(dropout)]
            features = hidden
        self.hidden = nn.Sequential(*parts)
        self.fc = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, size, size) -> logits (N, classes)."""
        return self.fc(self.hidden(images))


NETWORKS = {"mlp": MLP}
