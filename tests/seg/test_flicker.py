"""Flicker by hand-made frames."""

import math

import numpy as np
import pytest

from seg.flicker import CUT, STILL, Flicker, Motion


def image(value: int = 100) -> np.ndarray:
    return np.full((20, 30, 3), value, np.uint8)


def test_share_of_pixels_that_change_class():
    motion, flicker = Motion(), Flicker()
    ids = np.zeros((20, 30), np.uint8)
    flicker.update(ids, motion.update(image()))
    assert math.isnan(flicker.share) and math.isnan(flicker.still_share)
    other = ids.copy()
    other[:5] = 1
    flicker.update(other, motion.update(image()))
    assert flicker.share == flicker.still_share == 5 / 20
    flicker.update(other, motion.update(image()))
    assert flicker.share == 5 / 40


def test_still_pixels_are_those_where_no_channel_moves():
    motion, flicker = Motion(), Flicker()
    moved = image()
    moved[:10, :, 1] += STILL + 1
    moved[10:, :, 2] += STILL
    ids = np.zeros((20, 30), np.uint8)
    changed = ids.copy()
    changed[8:12] = 3
    flicker.update(ids, motion.update(image()))
    flicker.update(changed, motion.update(moved))
    assert flicker.share == 4 / 20
    assert flicker.still_share == 2 / 10


def test_pairs_across_a_scene_cut_do_not_count():
    motion, flicker = Motion(), Flicker()
    for number, frame in enumerate([image(), image(100 + CUT + 2), image(100 + CUT + 2)]):
        flicker.update(np.full((20, 30), min(number, 1), np.uint8), motion.update(frame))
    assert motion.cuts == 1
    assert flicker.share == 0


@pytest.mark.parametrize("step, cuts", [(CUT - 1, 0), (CUT + 1, 1)])
def test_a_cut_is_a_large_mean_difference(step: int, cuts: int):
    motion = Motion()
    motion.update(image())
    motion.update(image(100 + step))
    assert motion.cuts == cuts
