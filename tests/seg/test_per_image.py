"""Scores of images and cities against sums made by hand."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from seg import per_image
from seg.data import Sample
from seg.per_image import ImageScore, ImageScores, confusion, mean_iou, told


def sample(city: str, number: int) -> Sample:
    return Sample(Path("x.png"), Path("y.png"), None, f"{city}_{number}", city)


def pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, (8, 9)).astype(np.uint8)
    prediction = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, 4, truth.shape)).astype(np.uint8)
    truth[0] = 255
    return prediction, truth


def test_confusion_counts_each_valid_pixel() -> None:
    prediction, truth = pair(0)
    expected = np.zeros((5, 5), np.int64)
    for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
        if t != 255:
            expected[t, p] += 1
    assert np.array_equal(confusion(prediction, truth, 5), expected) and expected.sum() == 63
    ious = [
        ((prediction == i) & (truth == i)).sum()
        / ((((prediction == i) | (truth == i)) & (truth != 255)).sum() or math.nan)
        for i in range(5)
    ]
    np.testing.assert_allclose(per_image.class_iou(expected), ious)
    assert per_image.mean_iou(expected) == pytest.approx(np.nanmean(ious)) and math.isnan(ious[4])


def test_images_cities_and_the_worst() -> None:
    scores = ImageScores(("a", "b", "c", "d"))
    for number in range(4):
        scores.update(*pair(number), sample(("ulm", "jena")[number % 2], number))
    scores.update(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8), sample("ulm", 9))
    void = scores.images[-1]
    assert math.isnan(void.mean_iou) and math.isnan(void.wrong) and void.to_json()["mIoU"] is None
    cities = {city.name: city for city in scores.cities()}
    assert list(cities) == ["jena", "ulm"] and [c.images for c in cities.values()] == [2, 3]
    whole = confusion(*pair(1), 4) + confusion(*pair(3), 4)
    assert cities["jena"] == ImageScore("jena", "jena", mean_iou(whole), whole.sum(), whole.trace(), 2)
    assert np.array_equal(scores.total, whole + confusion(*pair(0), 4) + confusion(*pair(2), 4))
    values = sorted(one.mean_iou for one in scores.images if one.name != "ulm_9")
    assert [one.mean_iou for one in scores.worst(2)] == values[:2] and len(scores.worst(9)) == 4
    wrong = [(p != t)[t != 255].mean() for p, t in (pair(i) for i in range(4))]
    assert [one.wrong for one in scores.images[:4]] == pytest.approx(wrong)


def test_memory_does_not_grow_by_a_matrix_an_image() -> None:
    scores = ImageScores([str(i) for i in range(150)])
    ids = np.zeros((2, 2), np.uint8)
    tracemalloc.start()
    try:
        for number in range(50):
            assert scores.update(ids, ids, sample("ulm", number)).shape == (150, 150)
        scores.cities()
        assert tracemalloc.get_traced_memory()[1] < 10 * scores.total.nbytes  # of 50 images
    finally:
        tracemalloc.stop()


def test_mistakes_of_the_caller() -> None:
    with pytest.raises(ValueError, match="differ in size"):
        confusion(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), 3)
    with pytest.raises(ValueError, match="3 or more with 3 classes"):
        confusion(np.full((2, 2), 3, np.uint8), np.zeros((2, 2), np.uint8), 3)


def test_long_work_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 60))
    monkeypatch.setattr(per_image.time, "monotonic", lambda: float(next(clock)))
    said: list[str] = []
    assert list(told("abc", 3, "letters", said.append)) == ["a", "b", "c"]
    assert said == ["letters: 1 of 3, about 4 min left", "letters: 2 of 3, about 2 min left"]
