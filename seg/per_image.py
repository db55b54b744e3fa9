"""Scores image by image and city by city, and what long work says of its progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from seg.data import Sample
from seg.labels import IGNORE, TRAIN_CLASSES

Ids = NDArray[np.uint8]
Matrix = NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class ImageScore:
    """One image, or all images of a city together."""

    name: str
    city: str
    matrix: Matrix
    """Valid pixels by true (row) and predicted class, int64 (C, C)."""
    images: int = 1

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that its label or its prediction holds; nan without valid pixels.

        The mean over images differs from the score of a data set, where the pixels are added up first."""
        return mean_iou(self.matrix)

    @property
    def wrong(self) -> float:
        """Share of wrong ones among the valid pixels; nan without any."""
        pixels = int(self.matrix.sum())
        return 1 - float(np.trace(self.matrix)) / pixels if pixels else math.nan

    def to_json(self) -> dict[str, Any]:
        values = {"mIoU": self.mean_iou, "wrongPixels": self.wrong}
        return {
            "name": self.name,
            "city": self.city,
            "images": self.images,
            "pixels": int(self.matrix.sum()),
            **{key: None if math.isnan(value) else value for key, value in values.items()},
        }


class ImageScores:
    """Collects the scores of images."""

    def __init__(self, classes: Sequence[str] = TRAIN_CLASSES) -> None:
        self.classes = tuple(classes)
        self.images: list[ImageScore] = []

    def update(self, prediction: Ids, truth: Ids, sample: Sample) -> ImageScore:
        """Add an image: train ids, uint8 (H, W), 255 in the truth where void."""
        one = ImageScore(sample.name, sample.city, confusion(prediction, truth, len(self.classes)))
        self.images.append(one)
        return one

    def worst(self, wanted: int) -> list[ImageScore]:
        """The images with the lowest mean IoU, the worst first; those without valid pixels are left out."""
        known = [one for one in self.images if not math.isnan(one.mean_iou)]
        return sorted(known, key=lambda one: (one.mean_iou, one.name))[:wanted]

    def cities(self) -> list[ImageScore]:
        """The scores of each city, its pixels added up, in the order of the names; most data sets know of none."""
        found = []
        for city in sorted({one.city for one in self.images} - {""}):
            matrices = [one.matrix for one in self.images if one.city == city]
            found.append(ImageScore(city, city, np.sum(matrices, axis=0), len(matrices)))
        return found


def confusion(prediction: Ids, truth: Ids, classes: int) -> Matrix:
    """Valid pixels by true (row) and predicted class, int64 (C, C), of train ids uint8 (H, W).

    Raises ValueError for other sizes or a prediction that is no class.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in size")
    valid = truth != IGNORE
    true, found = truth[valid].astype(np.int64), prediction[valid]
    if max(true.max(initial=0), found.max(initial=0)) >= classes:
        raise ValueError(f"a train id of {classes} or more with {classes} classes")
    return np.bincount(true * classes + found, minlength=classes**2).reshape(classes, classes)


def class_iou(matrix: Matrix) -> NDArray[np.float64]:
    """IoU of each class, float64 (C,); nan where a class is neither in the truth nor predicted."""
    hits = np.diagonal(matrix).astype(np.float64)
    union = matrix.sum(0) + matrix.sum(1) - hits
    return np.divide(hits, union, out=np.full(len(matrix), np.nan), where=union > 0)


def mean_iou(matrix: Matrix) -> float:
    """Mean IoU over the classes that occur; nan if none does."""
    values = class_iou(matrix)
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def told(
    items: Iterable[T], total: int, what: str, say: Callable[[str], None] = print, every: float = 15.0
) -> Iterator[T]:
    """The items; says every so many seconds how many are done and how long the rest may take."""
    start = last = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if number and now - last >= every:
            left = (now - start) / number * (total - number)
            say(f"{what}: {number} of {total}, about {left / 60:.0f} min left")
            last = now
        yield item
