"""Boundary IoU against the definition, one class and one erosion after the other."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from seg.boundary import BoundaryIoU, band_width, boundary

CLASSES = ("a", "b", "c")


def eroded_boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """As the paper defines it: the mask without what `distance` erosions leave, zeros around the image."""
    height, width = mask.shape
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)
    return (mask.astype(np.uint8) - inner[1 : height + 1, 1 : width + 1]) > 0


def reference(pairs: list[tuple[np.ndarray, np.ndarray]], ratio: float = 0.02) -> list[float]:
    """Mask by mask in float64, from the formula."""
    sums = np.zeros((len(CLASSES), 2))
    for prediction, truth in pairs:
        prediction = np.where(truth == 255, 255, prediction)
        distance = max(1, int(round(ratio * np.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))))
        for i in range(len(CLASSES)):
            a, b = eroded_boundary(truth == i, distance), eroded_boundary(prediction == i, distance)
            sums[i] += (a & b).sum(), (a | b).sum()
    return [float(both / union) if union else math.nan for both, union in sums]


def blobs(seed: int, shape: tuple[int, int], void: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A truth of smooth regions, with void, and a prediction that is the truth moved and speckled."""
    rng = np.random.default_rng(seed)
    field = cv2.GaussianBlur(rng.normal(size=shape).astype(np.float32), (0, 0), 5)
    truth = np.digitize(field, np.quantile(field, [0.4, 0.7])).astype(np.uint8)
    prediction = np.roll(truth, (2, 3), (0, 1))
    prediction[rng.random(shape) < 0.01] = 1
    if void:
        truth[shape[0] // 3 : shape[0] // 2, : shape[1] // 2] = 255
    return prediction, truth


@pytest.mark.parametrize("ratio", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("shape", [(60, 90), (91, 40)])
def test_equal_to_the_definition(shape: tuple[int, int], ratio: float) -> None:
    pairs = [blobs(seed, shape) for seed in range(3)]
    scorer = BoundaryIoU(CLASSES, ratio)
    for prediction, truth in pairs:
        scorer.update(prediction, truth)
    assert list(scorer.class_iou().values()) == reference(pairs, ratio)
    assert all(0 < value < 1 for value in scorer.class_iou().values())


@pytest.mark.parametrize("distance", [1, 3, 40])
def test_the_band_of_all_classes_at_once_is_that_of_each_mask(distance: int) -> None:
    truth = blobs(5, (50, 70))[1]
    found = boundary(truth, distance)
    for i in np.unique(truth):
        assert np.array_equal(found & (truth == i), eroded_boundary(truth == i, distance))


def test_a_square_by_hand() -> None:
    truth = np.zeros((30, 30), np.uint8)
    truth[10:20, 10:20] = 1
    prediction = np.zeros_like(truth)
    prediction[10:20, 11:21] = 1
    scorer = BoundaryIoU(CLASSES)  # the diagonal is 42.4 pixels, so d is 1: bands of 36 pixels each
    scorer.update(prediction, truth)
    assert scorer.counts[:, 1].tolist() == [18, 36, 36]  # the top and bottom lines share 9 pixels each
    assert scorer.class_iou()["b"] == 18 / 54


def test_width_follows_the_diagonal() -> None:
    assert band_width(1024, 2048) == 46 and band_width(360, 480) == 12 and band_width(4, 4) == 1


def test_perfect_outside_of_void_is_perfect() -> None:
    truth = blobs(1, (60, 90))[1]
    prediction = np.where(truth == 255, np.random.default_rng(0).integers(0, 3, truth.shape), truth).astype(np.uint8)
    scorer = BoundaryIoU(CLASSES)
    scorer.update(prediction, truth)
    assert set(scorer.class_iou().values()) == {1.0}


def test_blurred_contours_cost_more_here_than_in_the_plain_iou() -> None:
    truth = np.zeros((200, 200), np.uint8)
    truth[20:180, 20:180] = 1
    prediction = cv2.erode(truth, np.ones((3, 3), np.uint8), iterations=3)
    scorer = BoundaryIoU(CLASSES)
    scorer.update(prediction, truth)
    plain = prediction.sum() / truth.sum()
    assert plain > 0.9 and scorer.class_iou()["b"] < 0.6


def test_classes_without_pixels_are_nan_and_mistakes_are_errors() -> None:
    scorer = BoundaryIoU(CLASSES)
    scorer.update(np.zeros((9, 9), np.uint8), np.full((9, 9), 255, np.uint8))
    assert all(math.isnan(value) for value in scorer.class_iou().values())
    with pytest.raises(ValueError, match=r"\(9, 9\) and truth \(9, 8\) differ in size"):
        scorer.update(np.zeros((9, 9), np.uint8), np.zeros((9, 8), np.uint8))
    with pytest.raises(ValueError, match="train id 3 with 3 classes"):
        scorer.update(np.full((9, 9), 3, np.uint8), np.zeros((9, 9), np.uint8))
    with pytest.raises(ValueError, match="ratio: 0"):
        BoundaryIoU(CLASSES, 0)
