"""No pixel is lost or shifted, whatever the sizes: prediction by every path, augmentation, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.images import read_image, write_png
from seg.averaging import Averaged, Views
from seg.config import DataConfig
from seg.data import augment
from seg.label_tables import TABLES
from seg.labels import IGNORE, colors_to_ids, read_label_ids
from seg.predict import Predictor
from tests.seg.echo import ONE, ZERO, echo, picture

CASES = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
sides = st.integers(1, 80)
STEPS: dict[str, Any] = {
    "size": st.tuples(st.integers(30, 90), st.integers(30, 90)),
    "place": st.floats(0.3, 0.7),
    "across": st.booleans(),
}
"""A picture of two halves: its size, where they meet, and whether beside or above each other."""


@CASES
@given(
    sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=3),
    multiple=st.sampled_from([1, 8, 32, 37]),
    window=st.none() | st.tuples(st.integers(9, 90), st.integers(9, 90)),
    overlap=st.floats(0, 0.8),
    batch=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_path_gives_the_input_back(
    sizes: list[tuple[int, int]],
    multiple: int,
    window: tuple[int, int] | None,
    overlap: float,
    batch: int,
    seed: int,
) -> None:
    """Whole, cut into windows, averaged over mirror images and over blended windows."""
    images = [picture(*size, seed) for size in sizes]
    one = echo(multiple, window=window, overlap=overlap, batch_size=batch)
    found = one.predict_batch(images)
    for image, ids in zip(images, found, strict=True):
        assert np.array_equal(ids, image[..., 0])
    best = one.probabilities(images[0]).argmax(0).numpy()
    assert np.array_equal(best, images[0][..., 0])
    for views in (Views(flip=True), Views(flip=True, sliding_window=True)):
        averaged = Averaged(one, views, window or (40, 50))
        assert np.array_equal(averaged.predict(images[0]), images[0][..., 0])


class Threshold(nn.Module):
    """Class 1 where red is above a half, surer the farther from it."""

    def forward(self, images: Tensor) -> Tensor:
        return 4 * (images[:, :1] - 0.5) * images.new_tensor([-1.0, 1.0]).view(1, 2, 1, 1)


def step(height: int, width: int, place: int, across: bool) -> np.ndarray:
    """Classes (height, width): 1 from a column on, or from a row on."""
    rows, columns = np.mgrid[:height, :width]
    return np.asarray((rows if across else columns) >= place).astype(np.uint8)


@CASES
@given(
    half=st.tuples(st.integers(20, 50), st.integers(20, 50)),
    place=st.floats(0.3, 0.7),
    across=st.booleans(),
    scales=st.sampled_from([(0.5,), (2.0,), (0.5, 1.0, 2.0)]),
    flip=st.booleans(),
    sliding=st.booleans(),
)
def test_a_step_stays_where_it_is_at_scales_that_sample_it_evenly(
    half: tuple[int, int], place: float, across: bool, scales: tuple[float, ...], flip: bool, sliding: bool
) -> None:
    size = 2 * half[0], 2 * half[1]
    truth = step(*size, round(place * size[0 if across else 1]), across)
    one = Predictor(Threshold().eval(), ZERO, ONE, multiple=8)
    found = Averaged(one, Views(scales, flip, sliding), (48, 64)).predict(np.repeat(truth[..., None] * 255, 3, 2))
    assert np.array_equal(found, truth)


@CASES
@given(
    **STEPS,
    scale=st.floats(0.5, 3),
    base=st.none() | st.integers(24, 120),
)
def test_a_step_moves_by_no_more_than_a_pixel_of_the_coarser_grid(
    size: tuple[int, int], place: float, across: bool, scale: float, base: int | None
) -> None:
    """At scales that do not divide the sides, and with data.eval_base_size."""
    edge = round(place * size[0 if across else 1])
    image = np.repeat(step(*size, edge, across)[..., None] * 255, 3, 2).astype(np.uint8)
    one = Predictor(Threshold().eval(), ZERO, ONE, base_size=base)
    coarser = max(1.0, min(size) / base if base else 1.0)
    for found, most in (
        (one.predict(image), coarser),
        (Averaged(one, Views((scale,))).predict(image), max(1.0, coarser / scale)),
    ):
        assert found.shape == size
        moved = found.sum(0 if across else 1).astype(int) - (size[0 if across else 1] - edge)
        # straight, but where a pixel lies on the threshold to the last bit
        assert np.abs(moved).max() <= most and np.ptp(moved) <= 1


def coded(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image that holds each pixel's row and column, and train ids that follow from them."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 200)], -1), ids_of(rows, columns)


def ids_of(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return ((rows.astype(int) * 7 + columns.astype(int) * 3) % 19).astype(np.uint8)


@CASES
@given(
    size=st.tuples(sides, sides),
    crop=st.tuples(st.integers(16, 80), st.integers(16, 80)),
    flip=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0),
)
def test_a_crop_holds_each_pixel_with_its_label_and_in_order(
    size: tuple[int, int], crop: tuple[int, int], flip: float, seed: int
) -> None:
    image, mask = coded(*size)
    cfg = DataConfig(crop=crop, scale=(1.0, 1.0), flip=flip, color_jitter=0.0)
    out, labels = augment(image, mask, cfg, (seed,))
    assert out.shape == (*crop, 3) and labels.shape == crop and out.dtype == labels.dtype == np.uint8
    seen = out[..., 2] == 200
    assert (out[~seen] == [round(255 * value) for value in cfg.mean]).all() and (labels[~seen] == IGNORE).all()
    height, width = min(size[0], crop[0]), min(size[1], crop[1])
    assert seen.sum() == height * width and np.array_equal(labels[seen], ids_of(out[seen, 0], out[seen, 1]))
    part = out[seen].reshape(height, width, 3).astype(int)
    assert (np.diff(part[..., 0], axis=0) == 1).all() and (np.diff(part[..., 0], axis=1) == 0).all()
    assert (np.diff(part[..., 1], axis=1) == (-1 if flip else 1)).all() and (np.diff(part[..., 1], axis=0) == 0).all()


@CASES
@given(
    **STEPS,
    scale=st.floats(0.5, 2),
    base=st.none() | st.integers(30, 120),
    seed=st.integers(0, 2**32),
)
def test_scaled_images_and_their_labels_stay_together(
    size: tuple[int, int], place: float, across: bool, scale: float, base: int | None, seed: int
) -> None:
    """A contour is within one pixel of each other in both (labels are not mixed), and no label appears that was not."""
    mask = step(*size, round(place * size[0 if across else 1]), across)
    image = np.repeat(mask[..., None] * 255, 3, 2).astype(np.uint8)
    cfg = DataConfig(crop=(64, 64), scale=(scale, scale), base_size=base, flip=0.5, color_jitter=0.0)
    out, labels = augment(image, mask, cfg, (seed,))
    valid = labels != IGNORE
    assert valid.any() and set(np.unique(labels[valid])) <= {0, 1}
    shown = (out[..., 0] > 127).astype(np.uint8)
    factor = scale * (base / min(size) if base else 1)
    near = cv2.dilate(labels * valid, np.ones((3, 3))) != cv2.erode(np.where(valid, labels, 1), np.ones((3, 3)))
    reach = np.ones((2 * max(1, round(factor / 2)) + 1,) * 2)
    near = cv2.dilate(near.astype(np.uint8), reach).astype(bool)
    assert np.array_equal(shown[valid & ~near], labels[valid & ~near])


@CASES
@given(size=st.tuples(sides, sides), seed=st.integers(0, 99))
def test_label_files_give_back_what_was_written(tmp_path: Path, size: tuple[int, int], seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 34, size, dtype=np.uint8)
    write_png(tmp_path / "x.png", ids)
    assert np.array_equal(read_label_ids(tmp_path / "x.png"), ids)
    camvid = TABLES["camvid"]  # whose colours differ, all of them
    ids = ids % len(camvid.labels)
    colors = np.array([label.color for label in camvid.labels], np.uint8)[ids]
    write_png(tmp_path / "c.png", colors)
    back = colors_to_ids(read_image(tmp_path / "c.png"), camvid, "c.png")
    assert np.array_equal(back, np.array([label.id for label in camvid.labels])[ids])
