"""The confusion matrix and the scores, against the official evaluation's functions."""

from __future__ import annotations

import json
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import id2label

from engine import distributed
from engine.errors import UserError
from seg import labels, metrics
from seg.label_tables import Label, LabelTable
from seg.metrics import ConfusionMatrix, Scores


def scene(seed: int, ids: list[int], size: tuple[int, int] = (48, 96)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, truth and instance ids made of blocks; the prediction is shifted and partly random."""
    rng = np.random.default_rng(seed)
    small = rng.choice(ids, (size[0] // 8, size[1] // 8)).astype(np.uint8)
    truth = np.kron(small, np.ones((8, 8), np.uint8))
    pred = np.roll(truth, 3, axis=1)
    noise = rng.random(truth.shape) < 0.2
    pred[noise] = rng.integers(0, 34, int(noise.sum()))
    numbers = np.kron(rng.integers(0, 4, small.shape), np.ones((8, 8), np.int64))
    single = (truth >= 24) & np.kron(rng.random(small.shape) < 0.8, np.ones((8, 8), bool))  # others: crowds
    instances = np.where(single, truth.astype(np.int64) * 1000 + numbers, truth).astype(np.uint16)
    return pred, truth, instances


def official(
    referee: ModuleType, scenes: list[tuple[np.ndarray, np.ndarray, np.ndarray]], tmp_path: Any
) -> dict[str, Any]:
    from PIL import Image

    args = referee.args
    args.quiet, args.JSONOutput, args.evalInstLevelScore = True, False, True
    predictions, truths = [], []
    for i, (pred, truth, instances) in enumerate(scenes):
        predictions.append(str(tmp_path / f"a_{i}_0_pred.png"))
        truths.append(str(tmp_path / f"a_{i}_0_gtFine_labelIds.png"))
        Image.fromarray(pred).save(predictions[-1])
        Image.fromarray(truth).save(truths[-1])
        Image.fromarray(instances).save(tmp_path / f"a_{i}_0_gtFine_instanceIds.png")
    result: dict[str, Any] = referee.evaluateImgLists(predictions, truths, args)
    return result


def assert_equal_to_official(scores: Scores, reference: dict[str, Any]) -> None:
    ours = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert ours["confMatrix"] == reference["confMatrix"] and ours["labels"] == reference["labels"]
    for key, theirs in reference.items():
        if key in ("confMatrix", "labels"):
            continue
        pairs = (
            [(ours[key][name], value) for name, value in theirs.items()]
            if isinstance(theirs, dict)
            else [(ours[key], theirs)]
        )
        for mine, value in pairs:
            assert math.isnan(value) if mine is None else abs(mine - value) < 1e-12, (key, mine, value)


ALL = list(range(34))


@pytest.mark.parametrize(
    "ids",
    [ALL, list(range(7, 24)), [7, 23, 26], list(range(7)), [24, 25, 29, 30], [26]],
    ids=["all", "no instances", "few classes", "void only", "ignored instances", "one class"],
)
@pytest.mark.filterwarnings("ignore:.in1d.:DeprecationWarning")
def test_equal_to_the_official_scores(referee: ModuleType, tmp_path: Any, ids: list[int]) -> None:
    scenes = [scene(seed, ids) for seed in range(3)]
    confusion = ConfusionMatrix()
    for pred, truth, instances in scenes:
        confusion.update(pred, truth, instances)
    scores = confusion.scores()
    reference = official(referee, scenes, tmp_path)
    assert_equal_to_official(scores, reference)
    if ids is ALL:
        assert 0.1 < scores.mean_iou < 0.9 and 0.1 < scores.mean_iiou < 0.9 and scores.mean_iou != scores.mean_iiou
    if ids == list(range(7)):
        assert math.isnan(scores.mean_iou) and math.isnan(scores.pixel_accuracy)


def test_instance_sizes_are_the_official_ones(referee: ModuleType) -> None:
    assert referee.args.avgClassSize == metrics.INSTANCE_SIZE


def test_scores_by_hand() -> None:
    road, car, void = 7, 26, 0
    truth = np.array([[road, road, car, void]], np.uint8)
    pred = np.array([[road, void, road, car]], np.uint8)
    confusion = ConfusionMatrix()
    confusion.update(pred, truth)
    scores = confusion.scores()
    assert (
        scores.class_iou["road"] == 1 / 3
    )  # the void prediction is a false negative, the pixel of the car a false positive
    assert scores.class_iou["car"] == 0  # the car predicted on void counts nowhere
    assert math.isnan(scores.class_iou["sky"]) and scores.mean_iou == pytest.approx(1 / 6)
    assert scores.pixel_accuracy == 1 / 3
    assert scores.class_accuracy["road"] == 1 / 2 and scores.mean_accuracy == 1 / 4
    assert scores.frequency_weighted_iou == pytest.approx(2 / 3 * 1 / 3)
    assert all(math.isnan(value) for value in scores.class_iiou.values()), "no instance ids were given"
    assert scores.to_json()["averageScoreInstClasses"] is None
    table = scores.table()
    assert "road              33.33      -  50.00" in table and "1 images, 4 pixels" in table


def test_counts_are_exact_in_images_of_more_pixels_than_float32_counts() -> None:
    truth = np.full((4100, 4100), 7, np.uint8)
    truth[0, :5] = 8
    confusion = ConfusionMatrix()
    confusion.update(truth, truth)
    assert confusion.matrix[7, 7] == 4100 * 4100 - 5 and confusion.matrix.sum() == 4100 * 4100


def test_any_integer_type_and_torch_tensors() -> None:
    pred, truth, instances = scene(0, ALL)
    one, other = ConfusionMatrix(), ConfusionMatrix()
    one.update(pred, truth, instances)
    other.update(torch.from_numpy(pred).long(), truth.astype(np.int32), torch.from_numpy(instances.astype(np.int64)))
    assert torch.equal(one.matrix, other.matrix) and torch.equal(one.instances, other.instances)
    with pytest.raises(TypeError, match="integers from 0 to 255"):
        one.update(truth.astype(np.int16) - 50, truth)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_counts_the_same() -> None:
    one, other = ConfusionMatrix(), ConfusionMatrix("cuda")
    for seed in range(3):
        pred, truth, instances = scene(seed, ALL)
        one.update(pred, truth, instances)
        other.update(torch.from_numpy(pred).cuda(), truth, instances)
    assert torch.equal(one.matrix, other.matrix.cpu()) and torch.equal(one.instances, other.instances.cpu())
    assert torch.equal(one.counts, other.counts.cpu())


def test_bad_ids_and_sizes_name_the_image_and_add_nothing() -> None:
    pred, truth, instances = scene(0, ALL)
    confusion = ConfusionMatrix()
    for bad, text in [(255, "255 is the ignored"), (34, "label ids are 0 to 33")]:
        wrong = pred.copy()
        wrong[0, :2] = bad
        with pytest.raises(UserError, match=rf"m\.png \(prediction\): unknown label ids {bad} \(2 pixels\).*{text}"):
            confusion.update(wrong, truth, instances, name="m.png")
        wrong = truth.copy()
        wrong[0, 0] = bad
        with pytest.raises(UserError, match=rf"m\.png \(ground truth\): unknown label ids {bad} \(1 pixels\)"):
            confusion.update(pred, wrong, instances, name="m.png")
    with pytest.raises(UserError, match=r"m\.png: prediction of 95 x 48 pixels for a label of 96 x 48"):
        confusion.update(pred[:, 1:], truth, name="m.png")
    with pytest.raises(UserError, match=r"m\.png: instance ids of 96 x 47 pixels"):
        confusion.update(pred, truth, instances[1:], name="m.png")
    with pytest.raises(UserError, match=r"m\.png: unknown instance id 65000"):
        confusion.update(pred, truth, np.full_like(instances, 65000), name="m.png")
    with pytest.raises(UserError, match=r"m\.png: instance id 7003, but the class 'road' has no instances"):
        confusion.update(pred, truth, np.full_like(instances, 7003), name="m.png")
    assert confusion.matrix.sum() == 0 and confusion.counts.sum() == 0


def test_instance_ids_of_some_images_only_are_refused() -> None:
    pred, truth, instances = scene(0, ALL)
    confusion = ConfusionMatrix()
    confusion.update(pred, truth, instances)
    confusion.update(pred, truth)
    with pytest.raises(UserError, match="1 of 2 images came with instance ids"):
        confusion.scores()


def test_reduce_gives_a_new_sum_and_leaves_the_own_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    pred, truth, instances = scene(0, ALL)
    confusion = ConfusionMatrix()
    confusion.update(pred, truth, instances)
    before = confusion.matrix.clone()
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor * 2)
    total = confusion.reduce()
    assert torch.equal(total.matrix, before * 2) and torch.equal(confusion.matrix, before)
    assert total.counts.tolist() == [2, 2]
    total.update(pred, truth, instances)
    assert torch.equal(confusion.matrix, before)
    monkeypatch.undo()
    again = confusion.reduce()
    again.update(pred, truth, instances)
    assert torch.equal(confusion.matrix, before) and torch.equal(again.matrix, before * 2)


def test_an_empty_matrix_has_no_scores() -> None:
    scores = ConfusionMatrix().scores()
    assert math.isnan(scores.mean_iou) and scores.images == 0 and set(scores.means()) >= {"mIoU", "pixel accuracy"}


def test_labels_of_one_class_count_in_one_category() -> None:
    truth = np.arange(5, dtype=np.uint8).repeat(10).reshape(5, 10)
    names, train_ids = ("road", "curb", "car", "van", "void"), (0, 0, 1, 1, labels.IGNORE)
    for categories in (("flat", "", "", "moving", "void"), ("flat", "built", "moving", "other", "")):
        rows = enumerate(zip(names, train_ids, categories, strict=True))
        table = LabelTable("x", tuple(Label(i, name, (i, 0, 0), t, c) for i, (name, t, c) in rows))
        confusion = ConfusionMatrix(labels=table)
        confusion.update(table.to_label_ids(table.to_train_ids(truth, "x")), truth)
        scores = confusion.scores()
        assert scores.category_iou == {"flat": 1.0, "moving": 1.0} and scores.mean_iou == 1


def test_evaluated_classes_are_the_official_ones() -> None:
    assert set(ConfusionMatrix().scores().class_iou) == {
        id2label[i].name for i in range(34) if not id2label[i].ignoreInEval
    }
    assert set(ConfusionMatrix().scores().category_iou) == set(labels.CATEGORIES) - {"void"}
