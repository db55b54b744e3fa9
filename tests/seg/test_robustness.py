"""Robustness: the mean IoU of exactly the corrupted images, and means of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engine.errors import UserError
from seg.corruptions import CORRUPTIONS, corrupt
from seg.per_image import confusion, mean_iou
from seg.robustness import Robustness, measure


class Bright:
    """Predicts 1 where an image is bright, 0 elsewhere."""

    def predict(self, image: np.ndarray) -> np.ndarray:
        return (image.mean(2) > 128).astype(np.uint8)


def items() -> Iterator[tuple[str, Any, Any]]:
    for seed in range(2):
        rng = np.random.default_rng(seed)
        image = np.kron(rng.integers(0, 256, (6, 8, 1)), np.ones((16, 16, 3))).astype(np.uint8)
        truth = Bright().predict(image)
        truth[:10] = 255
        yield f"image{seed}", image, truth


def test_scores_are_those_of_the_corrupted_images() -> None:
    names = ("gaussian_noise", "dark", "jpeg")
    found = measure(Bright(), items(), 2, corruptions=names, severities=(1, 5), seed=3)  # type: ignore[arg-type]
    assert found.clean == 1.0 and found.images == 2 and list(found.scores) == list(names)
    for name in names:
        for value, severity in zip(found.scores[name], (1, 5), strict=True):
            total = np.zeros((2, 2), np.int64)
            for title, image, truth in items():
                total += confusion(Bright().predict(corrupt(image, name, severity, title, 3)), truth, 2)
            assert value == mean_iou(total)
    assert found.scores["dark"][1] < found.scores["dark"][0] < 1


def test_means() -> None:
    found = Robustness(3, 0.8, {"fog": (0.6, 0.2), "rain": (0.4, 0.4), "jpeg": (0.8, 0.6)}, (1, 5))
    assert found.mean_of("fog") == pytest.approx(0.4) and found.mean == pytest.approx((0.4 + 0.4 + 0.7) / 3)
    assert found.groups() == pytest.approx({"weather": 0.4, "digital": 0.7})
    assert found.retained == pytest.approx(0.5 / 0.8)
    stored = found.to_json()
    assert stored["corruptions"]["fog"] == {"bySeverity": [0.6, 0.2], "mean": pytest.approx(0.4)}
    assert Robustness(1, 0.0, {"fog": (0.0,)}, (1,)).to_json()["retained"] is None


def test_unknown_corruptions_stop_before_the_first_image() -> None:
    def never() -> Iterator[Any]:
        raise AssertionError
        yield

    with pytest.raises(UserError, match="corruption: unknown 'hail'"):
        measure(Bright(), never(), 2, corruptions=("hail",))  # type: ignore[arg-type]
    assert len(CORRUPTIONS) == 13
