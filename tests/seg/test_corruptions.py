"""Corruptions: deterministic, of the image's size and type, stronger with the severity, from the table."""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.errors import UserError
from seg import corruptions
from seg.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from seg.data import Cityscapes, read_rgb


@pytest.fixture(scope="module")
def image(sample_root: Path) -> np.ndarray:
    """Enlarged, since a blur of a pixel or two at 512 lines is none at 64."""
    small = read_rgb(Cityscapes(sample_root, "val").samples[0].image)
    return cv2.resize(small, (500, 250), interpolation=cv2.INTER_CUBIC).astype(np.uint8)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).mean())


@pytest.mark.filterwarnings("error")  # albumentations only warns of options that it doesn't know
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_is_deterministic_and_grows_with_the_severity(image: np.ndarray, name: str) -> None:
    before = image.copy()
    found = [corrupt(image, name, severity, "a") for severity in SEVERITIES]
    assert np.array_equal(image, before)
    for severity, one in zip(SEVERITIES, found, strict=True):
        assert one.shape == image.shape and one.dtype == np.uint8
        assert np.array_equal(one, corrupt(image, name, severity, "a"))
    changes = [distance(one, image) for one in found]
    assert changes[0] > 0.2 and changes[4] > 1.3 * changes[0]
    assert all(b > 0.93 * a for a, b in zip(changes, changes[1:], strict=False)), changes


@pytest.mark.parametrize("height", [128, 256, 360, 480, 1024])
def test_pixelate_grows_with_the_severity_at_any_size(height: int) -> None:
    """A quarter of the sides changed less than a third did, where it has blocks of whole pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (height, 2 * height, 3), dtype=np.uint8)
    image = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    changes = [distance(corrupt(image, "pixelate", severity, "a"), image) for severity in SEVERITIES]
    assert all(b > 1.02 * a for a, b in zip(changes, changes[1:], strict=False)), changes


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (3, 40)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_of_hardly_a_pixel(name: str, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for severity in SEVERITIES:
        found = corrupt(image, name, severity, "a")
        assert found.shape == image.shape and found.dtype == np.uint8


@pytest.mark.parametrize("name", ["gaussian_noise", "motion_blur", "fog", "rain"])
def test_images_and_seeds_have_draws_of_their_own(image: np.ndarray, name: str) -> None:
    one = corrupt(image, name, 3, "a")
    assert not np.array_equal(one, corrupt(image, name, 3, "b"))
    assert not np.array_equal(one, corrupt(image, name, 3, "a", seed=1))


def test_names_that_are_no_text_have_draws_of_their_own_too(image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [os.fsdecode(b"a\xfe"), os.fsdecode(b"a\xff"), "a\ud800"]
    found = [corrupt(image, "gaussian_noise", 3, name) for name in names]
    assert not any(np.array_equal(one, other) for one, other in combinations(found, 2))
    assert np.array_equal(found[1], corrupt(image, "gaussian_noise", 3, names[1]))
    seen: list[bytes] = []
    monkeypatch.setattr(corruptions.zlib, "crc32", lambda data: seen.append(data) or 0)
    corrupt(image, "fog", 3, "a\u00e9")
    assert seen == ["a\u00e9/fog".encode()]  # other draws would be other scores than those of earlier cards


def test_groups_and_lengths() -> None:
    assert {spec.group for spec in CORRUPTIONS.values()} == {"noise", "blur", "weather", "digital"}
    assert all(len(values) == 5 for spec in CORRUPTIONS.values() for values in spec.values.values())
    small, large = (corruptions.parameters("motion_blur", 3, side)["blur_limit"] for side in (512, 1024))
    assert small == (15, 15) and large == (29, 29)
    assert corruptions.parameters("gaussian_blur", 1, 256)["sigma_limit"] == (0.5, 0.5)
    assert corruptions.parameters("jpeg", 5, 2048)["quality_range"] == (5, 5)
    assert len(corruptions.table()) == len(CORRUPTIONS)


def test_what_there_is_not() -> None:
    with pytest.raises(UserError, match="corruption: unknown 'hail'; known: gaussian_noise, "):
        corrupt(np.zeros((8, 8, 3), np.uint8), "hail", 1, "a")
    with pytest.raises(UserError, match=r"severity: found 6, expected 1 \(slight\) to 5"):
        corrupt(np.zeros((8, 8, 3), np.uint8), "fog", 6, "a")
