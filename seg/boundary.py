"""Boundary IoU: the overlap of true and predicted classes within a band along their contours.

The definition is that of Cheng et al., "Boundary IoU" (CVPR 2021, arXiv 2103.16562): G_d are the pixels of a class
whose distance to the outside of it is at most d, P_d those of the prediction, and

    Boundary IoU = |G_d and P_d| / |G_d or P_d|,      d = 0.02 x diagonal of the image

Distances are those of the paper's code: d erosions with a 3 x 3 square (Chebyshev), and what lies beyond the image is
outside of every class. Pixels are summed over the data set, class by class, before they are divided.

Void pixels are left out, and the prediction is void where the truth is: else a perfect prediction would miss the
contours that the truth has along its void regions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from seg.labels import IGNORE, TRAIN_CLASSES

Ids = NDArray[np.uint8]

RATIO = 0.02
"""Width of the band as a share of the image's diagonal, as the paper recommends."""


def band_width(height: int, width: int, ratio: float = RATIO) -> int:
    """d in pixels, at least 1."""
    return max(1, round(ratio * math.hypot(height, width)))


def boundary(ids: Ids, distance: int) -> NDArray[np.bool_]:
    """The pixels of a label map that are at most `distance` from a pixel of another id or from beyond the image.

    Args:
        ids: uint8 (H, W).
        distance: in pixels, Chebyshev; at least 1.

    Returns:
        bool (H, W); for the pixels of one id it is the paper's boundary of that id's mask.
    """
    # one window of 2d + 1 pixels holds several ids if its smallest and largest differ: all classes in two passes
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    smallest = cv2.erode(ids, kernel, borderType=cv2.BORDER_REPLICATE)
    largest = cv2.dilate(ids, kernel, borderType=cv2.BORDER_REPLICATE)
    near = smallest != largest
    for edge in (near, near.T):
        edge[:distance] = True
        edge[max(0, len(edge) - distance) :] = True
    return near


class BoundaryIoU:
    """Sums the pixels of the bands of a data set.

    Attributes:
        counts: int64 (3, classes): pixels in both bands, in the true one, in the predicted one.
    """

    def __init__(self, classes: Sequence[str] = TRAIN_CLASSES, ratio: float = RATIO) -> None:
        if not 0 < ratio < 1:
            raise ValueError(f"ratio: {ratio}, expected a share of the diagonal between 0 and 1")
        self.classes, self.ratio = tuple(classes), ratio
        self.counts = np.zeros((3, len(self.classes)), np.int64)

    def update(self, prediction: Ids, truth: Ids) -> None:
        """Add one image.

        Args:
            prediction: train ids, uint8 (H, W).
            truth: train ids, uint8 (H, W), 255 where void.

        Raises:
            ValueError: other sizes, or a train id that is no class.
        """
        if prediction.shape != truth.shape or prediction.ndim != 2:
            raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in size")
        distance = band_width(truth.shape[0], truth.shape[1], self.ratio)
        prediction = np.where(truth == IGNORE, IGNORE, prediction).astype(np.uint8)
        true, found = boundary(truth, distance), boundary(prediction, distance)
        both = true & found & (truth == prediction)
        parts = (truth[both], truth[true], prediction[found])
        self.counts += np.stack([self._histogram(part) for part in parts])

    def _histogram(self, ids: Ids) -> NDArray[np.int64]:
        counts = np.bincount(ids, minlength=256)
        if counts[len(self.classes) : IGNORE].any():
            raise ValueError(f"train id {int(ids[ids != IGNORE].max())} with {len(self.classes)} classes")
        return counts[: len(self.classes)]

    def class_iou(self) -> dict[str, float]:
        """Boundary IoU of each class in [0, 1]; nan for one that is in no label and no prediction."""
        both, true, found = self.counts
        union = true + found - both
        return {n: float(b / u) if u else math.nan for n, b, u in zip(self.classes, both, union, strict=True)}
