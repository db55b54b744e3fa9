"""Predictions averaged over several views of an image: scales, mirror images, blended windows. In all combinations.

What is averaged are the probabilities. With blended windows a pixel's probabilities are the mean over all windows that
see it, weighted by its distance from the window's edge, where a network knows least; `seg.predict` alone takes each
pixel from one window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import UserError
from seg.config import SegConfig
from seg.predict import Predictor, enough_memory, in_255ths, scaled

Array = NDArray[np.uint8]

_LARGEST_SCALE = 4.0


@dataclass(frozen=True)
class Views:
    """Which views of an image are averaged."""

    scales: tuple[float, ...] = (1.0,)
    """Factors on the size at which the image enters the network."""
    flip: bool = False
    """Each scale also mirrored."""
    sliding_window: bool = False
    """Blended windows of the size `predict.window`, or of a training crop if that is null."""

    def __post_init__(self) -> None:
        wrong = [scale for scale in self.scales if not 0 < scale <= _LARGEST_SCALE]
        if wrong or not self.scales:
            found = f"found {wrong[0]:g}" if wrong else "none given"
            raise UserError(f"--scales: {found}, expected factors above 0 and up to {_LARGEST_SCALE:g}, such as 0.75 1")
        if len(set(self.scales)) < len(self.scales):
            raise UserError(f"--scales: {' '.join(f'{s:g}' for s in self.scales)}: the same scale twice; give it once")

    def __str__(self) -> str:
        parts = ["scale " + ", ".join(f"{scale:g}" for scale in self.scales)] if self.scales != (1.0,) else []
        parts += ["mirrored"] if self.flip else []
        parts += ["blended sliding window"] if self.sliding_window else []
        return "; ".join(parts) or "one view"


@dataclass(frozen=True)
class Averaged:
    """A predictor whose probabilities are the mean over the views; images as in `Predictor`."""

    predictor: Predictor
    views: Views
    window: tuple[int, int] | None = None
    """Height and width of the blended windows; needed with `views.sliding_window`."""

    def predict(self, image: Array) -> Array:
        """Train ids, uint8 (H, W)."""
        return self.probabilities(image).max(0).indices.to(torch.uint8).cpu().numpy()

    def predict_confident(self, image: Array) -> tuple[Array, Array]:
        """Train ids, and their mean probabilities as `in_255ths`, both uint8 (H, W)."""
        best, ids = self.probabilities(image).max(0)
        return ids.to(torch.uint8).cpu().numpy(), in_255ths(best)

    def predict_batch(self, images: Sequence[Array]) -> list[Array]:
        """Train ids of each image."""
        return [self.predict(image) for image in images]

    def probabilities(self, image: Array) -> Tensor:
        """Mean probabilities over the views, float32 (C, H, W) on the predictor's device; 8 C bytes a pixel.

        Raises UserError where the device's memory does not do.
        """
        height, width = image.shape[:2]
        with enough_memory(
            self.predictor.device, f"the views of {width} x {height} pixels; average over fewer or none"
        ):
            return self._mean(image, height, width)

    def probabilities_batch(self, images: Sequence[Array]) -> list[Tensor]:
        """`probabilities` of each image."""
        return [self.probabilities(image) for image in images]

    def _mean(self, image: Array, height: int, width: int) -> Tensor:
        base = 1.0 if self.predictor.base_size is None else self.predictor.base_size / min(height, width)
        total: Tensor | None = None
        for scale in self.views.scales:
            pixels = scaled(image, base * scale)
            for mirrored in (False, True) if self.views.flip else (False,):
                found = self._view(np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels)
                found = _resized(found.flip(-1) if mirrored else found, (height, width))
                total = found if total is None else total.add_(found)
        assert total is not None
        return total.div_(len(self.views.scales) * (2 if self.views.flip else 1))

    def _view(self, image: Array) -> Tensor:
        whole = replace(self.predictor, base_size=None)
        if not self.views.sliding_window:
            return whole.probabilities(image)
        if self.window is None:
            raise ValueError("blended windows need a window")
        whole = replace(whole, window=self.window)
        height, width = image.shape[:2]
        starts = [starts_of(n, w, self.predictor.overlap) for n, w in zip((height, width), self.window, strict=True)]
        total: Tensor | None = None
        weights = np.zeros((height, width), np.float32)
        for top in starts[0]:
            for left in starts[1]:
                part = (slice(top, top + self.window[0]), slice(left, left + self.window[1]))
                crop = np.ascontiguousarray(image[part])
                weight = _tent(crop.shape[0], crop.shape[1])
                found = whole.probabilities(crop)
                if total is None:
                    total = found.new_zeros(found.shape[0], height, width)
                total[:, part[0], part[1]] += found * torch.from_numpy(weight).to(found.device)
                weights[part] += weight
        assert total is not None
        return total.div_(torch.from_numpy(weights).to(total.device))


def predictor_of(
    model: nn.Module, cfg: SegConfig, device: torch.device | str, views: Views | None = None
) -> Predictor | Averaged:
    """The predictor of an experiment: the plain one, or one that averages over `views`."""
    plain = Predictor.from_config(model, cfg, device)
    if views is None or views == Views():
        return plain
    return Averaged(plain, views, cfg.predict.window or cfg.data.crop)


def starts_of(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along one side: evenly spread, first and last at the edges, at least `overlap` in common."""
    if window >= length:
        return [0]
    count = math.ceil((length - window) / max(1, math.floor(window * (1 - overlap)))) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def _tent(height: int, width: int) -> NDArray[np.float32]:
    """Weights (H, W) that fall towards the edges, above 0 everywhere."""
    rows, columns = (np.minimum(np.arange(n) + 1, n - np.arange(n)) / (n + 1) for n in (height, width))
    return np.outer(rows, columns).astype(np.float32)


def _resized(probabilities: Tensor, size: tuple[int, int]) -> Tensor:
    if probabilities.shape[-2:] == size:
        return probabilities
    return F.interpolate(probabilities[None], size, mode="bilinear", align_corners=False)[0]
