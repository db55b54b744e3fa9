"""A network that returns its input: what prediction, windows, scales and flips must not lose or shift."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seg.predict import Predictor

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
CLASSES = 19


class Echo(nn.Module):
    """Its class at a pixel is the red value there; notes the sizes that it is given."""

    def __init__(self, multiple: int = 1, as_dict: bool = False) -> None:
        super().__init__()
        self.multiple, self.as_dict = multiple, as_dict
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Any:
        self.sizes.append(tuple(images.shape))
        assert images.shape[-1] % self.multiple == 0 and images.shape[-2] % self.multiple == 0
        red = (images[:, 0] * 255).round()
        logits = -(red[:, None] - torch.arange(CLASSES).view(1, -1, 1, 1)).abs()
        return {"out": logits, "aux": logits * 0} if self.as_dict else logits


def echo(multiple: int = 1, **options: Any) -> Predictor:
    return Predictor(Echo(multiple).eval(), ZERO, ONE, multiple=multiple, **options)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise whose red values are classes, uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, CLASSES, (height, width, 3), dtype=np.uint8)
