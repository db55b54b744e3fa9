"""How much a network's mean IoU suffers when its images are corrupted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seg.averaging import Averaged
from seg.corruptions import CORRUPTIONS, SEVERITIES, Rgb, check, corrupt
from seg.metrics import mean
from seg.per_image import Ids, Matrix, confusion, mean_iou
from seg.predict import Predictor


@dataclass(frozen=True)
class Robustness:
    """Mean IoUs in [0, 1]; the classes are those that occur in the truth or in a prediction."""

    images: int
    clean: float
    """Of the same images without corruption."""
    scores: dict[str, tuple[float, ...]]
    """Corruption -> mean IoU at each of the severities."""
    severities: tuple[int, ...]

    def mean_of(self, corruption: str) -> float:
        """Mean over the severities."""
        return mean(self.scores[corruption])

    def groups(self) -> dict[str, float]:
        """Mean over the corruptions of each group."""
        names = dict.fromkeys(CORRUPTIONS[name].group for name in self.scores)
        return {group: mean(self.mean_of(n) for n in self.scores if CORRUPTIONS[n].group == group) for group in names}

    @property
    def mean(self) -> float:
        """Mean over all corruptions and severities."""
        return mean(self.mean_of(name) for name in self.scores)

    @property
    def retained(self) -> float:
        """`mean` as a share of `clean`; nan if that is 0."""
        return self.mean / self.clean if self.clean else math.nan

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "severities": list(self.severities),
            "clean": _null(self.clean),
            "mean": _null(self.mean),
            "retained": _null(self.retained),
            "groups": {name: _null(value) for name, value in self.groups().items()},
            "corruptions": {
                name: {"bySeverity": [_null(v) for v in values], "mean": _null(self.mean_of(name))}
                for name, values in self.scores.items()
            },
        }


def measure(
    predictor: Predictor | Averaged,
    items: Iterable[tuple[str, Rgb, Ids]],
    classes: int,
    *,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    wrap: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Robustness:
    """Score images without and with each corruption.

    Args:
        predictor: a trained network's.
        items: name, image RGB uint8 (H, W, 3) and train ids uint8 (H, W), 255 where void.
        classes: their number.
        corruptions, severities: which; all by default.
        seed: of the corruptions' draws, see `seg.corruptions.corrupt`.
        wrap: goes around the items, such as a progress report.

    Raises:
        UserError: an unknown corruption or severity.
    """
    check(corruptions, severities)
    clean: Matrix = np.zeros((classes, classes), np.int64)
    totals = {(name, severity): clean.copy() for name in corruptions for severity in severities}
    images = 0
    for name, image, truth in wrap(items):
        clean += confusion(predictor.predict(image), truth, classes)
        for (corruption, severity), total in totals.items():
            total += confusion(predictor.predict(corrupt(image, corruption, severity, name, seed)), truth, classes)
        images += 1
    scores = {name: tuple(mean_iou(totals[name, severity]) for severity in severities) for name in corruptions}
    return Robustness(images, mean_iou(clean), scores, tuple(severities))


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value
