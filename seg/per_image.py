"""Scores image by image and city by city, and what long work says of its progress."""

from __future__ import annotations

import math
import time
from collections import Counter
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
    mean_iou: float
    """Mean IoU over the classes that its label or its prediction holds; nan without valid pixels.

    The mean over images differs from the score of a data set, where the pixels are added up first."""
    pixels: int
    """Valid ones."""
    right: int
    """Those whose class was predicted."""
    images: int = 1

    @classmethod
    def of(cls, matrix: Matrix, name: str, city: str, images: int = 1) -> ImageScore:
        """From the valid pixels by true (row) and predicted class, int64 (C, C), which is not kept: with many classes
        those of many images would fill the memory."""
        return cls(name, city, mean_iou(matrix), int(matrix.sum()), int(np.trace(matrix)), images)

    @property
    def wrong(self) -> float:
        """Share of wrong ones among the valid pixels; nan without any."""
        return 1 - self.right / self.pixels if self.pixels else math.nan

    def to_json(self) -> dict[str, Any]:
        values = {"mIoU": self.mean_iou, "wrongPixels": self.wrong}
        return {
            "name": self.name,
            "city": self.city,
            "images": self.images,
            "pixels": self.pixels,
            **{key: None if math.isnan(value) else value for key, value in values.items()},
        }


class ImageScores:
    """Collects the scores of images, in memory that hardly grows with their number."""

    def __init__(self, classes: Sequence[str] = TRAIN_CLASSES) -> None:
        self.classes = tuple(classes)
        self.images: list[ImageScore] = []
        self.total: Matrix = np.zeros((len(self.classes), len(self.classes)), np.int64)
        """Valid pixels of all images by true (row) and predicted class, int64 (C, C)."""
        self._cities: dict[str, Matrix] = {}

    def update(self, prediction: Ids, truth: Ids, sample: Sample) -> Matrix:
        """Add an image: train ids, uint8 (H, W), 255 in the truth where void. Returns its `confusion`."""
        matrix = confusion(prediction, truth, len(self.classes))
        self.images.append(ImageScore.of(matrix, sample.name, sample.city))
        self.total += matrix
        if sample.city:
            self._cities[sample.city] = self._cities.get(sample.city, 0) + matrix
        return matrix

    def worst(self, wanted: int) -> list[ImageScore]:
        """The images with the lowest mean IoU, the worst first; those without valid pixels are left out."""
        known = [one for one in self.images if not math.isnan(one.mean_iou)]
        return sorted(known, key=lambda one: (one.mean_iou, one.name))[:wanted]

    def cities(self) -> list[ImageScore]:
        """The scores of each city, its pixels added up, in the order of the names; most data sets know of none."""
        often = Counter(one.city for one in self.images)
        return [ImageScore.of(matrix, city, city, often[city]) for city, matrix in sorted(self._cities.items())]


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
