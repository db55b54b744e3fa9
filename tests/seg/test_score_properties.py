"""Every score against cityscapesscripts' own evaluation, over random data sets of up to three small label maps.

What the official evaluation does not have (accuracies, boundary IoU) is held to its definition, pixel by pixel.
PROPERTY_CASES=1000 tries that many data sets in place of 200, and a quarter of them in the other tests.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.errors import UserError
from seg.boundary import BoundaryIoU, band_width
from seg.data import Sample
from seg.labels import INSTANCE_LABEL_IDS, NUM_LABELS, TRAIN_CLASSES, TRAIN_LABEL_IDS, to_label_ids, to_train_ids
from seg.metrics import ConfusionMatrix, Scores
from seg.per_image import ImageScores

CASES = settings(
    max_examples=int(os.environ.get("PROPERTY_CASES", 200)),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FEWER = settings(CASES, max_examples=-(-CASES.max_examples // 4))


class Scene(NamedTuple):
    prediction: np.ndarray
    """uint8 (H, W)."""
    truth: np.ndarray
    """uint8 (H, W)."""
    instances: np.ndarray
    """uint16 (H, W)."""


@st.composite
def maps(draw: st.DrawFn, shape: tuple[int, int], ids: list[int]) -> np.ndarray:
    """A map of some of the ids, uint8: noise, or blocks of 1 x 1 to 4 x 4 pixels."""
    block = draw(st.sampled_from([1, 1, 2, 4]))
    rows, columns = (-(-side // block) for side in shape)
    places = draw(st.binary(min_size=rows * columns, max_size=rows * columns))
    small = np.array(ids, np.uint8)[np.frombuffer(places, np.uint8).reshape(rows, columns) % len(ids)]
    return np.kron(small, np.ones((block, block), np.uint8))[: shape[0], : shape[1]]


shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))
palettes = st.one_of(
    st.lists(st.integers(0, NUM_LABELS - 1), min_size=1, max_size=12),
    st.lists(st.sampled_from(sorted(set(range(NUM_LABELS)) - set(TRAIN_LABEL_IDS))), min_size=1, max_size=4),  # void
    st.lists(st.sampled_from(INSTANCE_LABEL_IDS), min_size=1, max_size=5),
)


@st.composite
def scenes(draw: st.DrawFn, palette: st.SearchStrategy[list[int]] = palettes) -> Scene:
    """Prediction, truth and instance ids; the prediction is of the same labels, of others, or partly the truth."""
    shape, ids = draw(shapes), draw(palette)
    truth = draw(maps(shape, ids))
    prediction = draw(maps(shape, draw(st.one_of(st.just(ids), palette))))
    kept = draw(maps(shape, [0, 1])).astype(bool)
    prediction = np.where(kept, truth, prediction)
    numbers = draw(maps(shape, [0, 1, 2, 250]))
    single = np.isin(truth, INSTANCE_LABEL_IDS) & draw(maps(shape, [1, 1, 0])).astype(bool)  # the others: crowds
    instances = np.where(single, truth.astype(np.uint16) * 1000 + numbers, truth)
    return Scene(prediction, truth, instances.astype(np.uint16))


def official(referee: ModuleType, found: list[Scene], folder: Path, instances: bool) -> Mapping[str, Any]:
    args = referee.args
    args.quiet, args.JSONOutput, args.evalInstLevelScore = True, False, instances
    predictions, truths = [], []
    for number, scene in enumerate(found):
        predictions.append(str(folder / f"a_{number}_0_pred.png"))
        truths.append(str(folder / f"a_{number}_0_gtFine_labelIds.png"))
        Image.fromarray(scene.prediction).save(predictions[-1], compress_level=0)
        Image.fromarray(scene.truth).save(truths[-1], compress_level=0)
        if instances:
            path = folder / f"a_{number}_0_gtFine_instanceIds.png"
            Image.fromarray(scene.instances).save(path, compress_level=0)
    result: Mapping[str, Any] = referee.evaluateImgLists(predictions, truths, args)
    return result


def same(ours: float, theirs: float) -> bool:
    return math.isnan(ours) if math.isnan(theirs) else abs(ours - theirs) < 1e-9


def assert_official(scores: Scores, reference: Mapping[str, Any], instances: bool) -> None:
    assert scores.matrix.tolist() == reference["confMatrix"]
    if not instances:  # the official one then has a zero wherever such a class is predicted
        assert all(map(math.isnan, [*scores.class_iiou.values(), *scores.category_iiou.values(), scores.mean_iiou]))
    for key, values in {
        "classScores": scores.class_iou,
        "classInstScores": scores.class_iiou,
        "categoryScores": scores.category_iou,
        "categoryInstScores": scores.category_iiou,
    }.items():
        if "Inst" in key and not instances:
            continue
        for name, theirs in reference[key].items():
            assert same(values.get(name, math.nan), theirs), (key, name, values.get(name), theirs)
    for key, mean in {
        "averageScoreClasses": scores.mean_iou,
        "averageScoreInstClasses": scores.mean_iiou,
        "averageScoreCategories": scores.mean_category_iou,
        "averageScoreInstCategories": scores.mean_category_iiou,
    }.items():
        assert same(mean, reference[key]) or ("Inst" in key and not instances), (key, mean, reference[key])


def assert_accuracies(scores: Scores, found: list[Scene]) -> None:
    """By their definitions, from the pixels and not from the matrix."""
    true = np.concatenate([scene.truth.ravel() for scene in found])
    right = true == np.concatenate([scene.prediction.ravel() for scene in found])
    evaluated = np.isin(true, TRAIN_LABEL_IDS)
    assert same(scores.pixel_accuracy, right[evaluated].mean() if evaluated.any() else math.nan)
    weighted = 0.0
    for name, label in zip(TRAIN_CLASSES, TRAIN_LABEL_IDS, strict=True):
        here = true == label
        assert same(scores.class_accuracy[name], right[here].mean() if here.any() else math.nan), name
        weighted += here.sum() * np.nan_to_num(scores.class_iou[name]) / max(1, evaluated.sum())
    assert same(scores.frequency_weighted_iou, weighted if evaluated.any() else math.nan)


@CASES
@given(found=st.lists(scenes(), min_size=1, max_size=3), instances=st.booleans(), parts=st.booleans())
@pytest.mark.filterwarnings("ignore:.in1d.:DeprecationWarning")
def test_every_score_is_the_official_one(
    referee: ModuleType, tmp_path: Path, found: list[Scene], instances: bool, parts: bool
) -> None:
    """Counted in one go, or image by image and added up as the ranks of a training do."""
    whole = ConfusionMatrix()
    for scene in found:
        one = ConfusionMatrix() if parts else whole
        one.update(scene.prediction, scene.truth, scene.instances if instances else None)
        if parts:
            whole.merge(one)
    scores = whole.scores()
    reference = official(referee, found, tmp_path, instances)
    assert_official(scores, reference, instances)
    assert_accuracies(scores, found)
    assert scores.images == len(found) and scores.matrix.sum() == sum(scene.truth.size for scene in found)


@FEWER
@given(scene=scenes(), wrong=st.integers(NUM_LABELS, 255), place=st.integers(0, 10**6), side=st.integers(0, 1))
def test_ids_that_are_none_are_refused_as_the_official_evaluation_does(
    referee: ModuleType, tmp_path: Path, scene: Scene, wrong: int, place: int, side: int
) -> None:
    """255 is what an 8-bit file makes of the license plate's -1. Nothing is counted then."""
    bad = Scene(scene.prediction.copy(), scene.truth.copy(), scene.instances)
    bad[side].ravel()[place % bad[side].size] = wrong
    counted = ConfusionMatrix()
    with pytest.raises(UserError, match=f"unknown label ids {wrong} "):
        counted.update(bad.prediction, bad.truth)
    assert counted.matrix.sum() == 0 and counted.counts.sum() == 0
    with pytest.raises((SystemExit, IndexError, KeyError)):
        official(referee, [bad], tmp_path, False)


evaluated_ids = st.lists(st.sampled_from(TRAIN_LABEL_IDS), min_size=1, max_size=8)


@FEWER
@given(found=st.lists(scenes(evaluated_ids), min_size=1, max_size=3), void=st.data())
def test_scores_of_an_image_and_of_a_city_are_those_of_its_images_alone(
    referee: ModuleType, tmp_path: Path, found: list[Scene], void: st.DataObject
) -> None:
    cities, scorer = ["aachen", "bonn", "aachen"], ImageScores()
    seen = []
    for number, scene in enumerate(found):
        hidden = void.draw(maps(scene.truth.shape, [0, 0, 1])).astype(bool)
        truth = np.where(hidden, 0, scene.truth).astype(np.uint8)
        seen.append(Scene(scene.prediction, truth, scene.instances))
        sample = Sample(Path("x.png"), None, None, f"{cities[number]}_{number}", cities[number])
        scorer.update(to_train_ids(scene.prediction, "p"), to_train_ids(truth, "t"), sample)
        one = scorer.images[-1]
        reference = official(referee, [seen[-1]], tmp_path, False)
        assert same(one.mean_iou, reference["averageScoreClasses"])
        valid = np.isin(truth, TRAIN_LABEL_IDS)
        wrong = (scene.prediction != truth)[valid]
        assert same(one.wrong, wrong.mean() if wrong.size else math.nan)
    for city in scorer.cities():
        images = [scene for name, scene in zip(cities, seen, strict=False) if name == city.name]
        reference = official(referee, images, tmp_path, False)
        assert city.images == len(images) and same(city.mean_iou, reference["averageScoreClasses"])
    ranked = [one.mean_iou for one in scorer.worst(3)]
    assert ranked == sorted(ranked) and len(ranked) == sum(not math.isnan(one.mean_iou) for one in scorer.images)


def near_the_edge(mask: np.ndarray, distance: int) -> np.ndarray:
    """The pixels of a mask that have one outside of it, or of the image, at most `distance` away in each direction."""
    beyond = np.pad(mask, distance)
    windows = np.lib.stride_tricks.sliding_window_view(beyond, (2 * distance + 1, 2 * distance + 1))
    return mask & ~windows.all((2, 3))


@FEWER
@given(found=st.lists(scenes(evaluated_ids), min_size=1, max_size=2), ratio=st.sampled_from([0.02, 0.1, 0.3, 0.9]))
def test_boundary_iou_is_that_of_its_definition(found: list[Scene], ratio: float) -> None:
    scorer = BoundaryIoU(ratio=ratio)
    both, either = np.zeros(len(TRAIN_CLASSES)), np.zeros(len(TRAIN_CLASSES))
    for scene in found:
        hidden = scene.instances % 3 == 1
        truth = np.where(hidden, 255, to_train_ids(scene.truth, "t")).astype(np.uint8)
        prediction = to_train_ids(scene.prediction, "p")
        scorer.update(prediction, truth)
        distance = band_width(*truth.shape, ratio)
        for i in range(len(TRAIN_CLASSES)):
            true = near_the_edge(truth == i, distance)
            mine = near_the_edge((prediction == i) & ~hidden, distance)
            both[i] += (true & mine).sum()
            either[i] += (true | mine).sum()
    for i, value in enumerate(scorer.class_iou().values()):
        assert same(value, both[i] / either[i] if either[i] else math.nan)


@FEWER
@given(scene=scenes(evaluated_ids))
def test_train_ids_and_label_ids_are_two_names_of_the_same(scene: Scene) -> None:
    assert np.array_equal(to_label_ids(to_train_ids(scene.truth, "t")), scene.truth)
