"""The confusion matrix over label ids and the official Cityscapes scores, and the same for any other label table.

The definitions are those of cityscapesscripts' evaluation (evalPixelLevelSemanticLabeling), to which the numbers are
equal: pixels whose true label is not evaluated are left out; a void *prediction* on an evaluated pixel is a false
negative; a score with an empty denominator is nan and no part of an average.

    IoU  = TP / (TP + FP + FN)          over pixels, for classes and for categories
    iIoU = iTP / (iTP + FP + iFN)       a true pixel counts (average size of its class) / (size of its instance)

Other tables have category scores if their labels have categories, and no iIoU: the average sizes are Cityscapes'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import UserError
from seg.labels import CATEGORIES, CITYSCAPES, INSTANCE_LABEL_IDS, LABEL_NAMES, NUM_LABELS, TRAIN_LABEL_IDS, LabelTable

Matrix = npt.NDArray[np.int64]
Pixels = npt.NDArray[Any] | Tensor

INSTANCE_SIZE = {
    "bicycle": 4672.3249222261,
    "caravan": 36771.8241758242,
    "motorcycle": 6298.7200839748,
    "rider": 3930.4788056518,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "car": 12794.0202738185,
    "person": 3462.4756337644,
    "truck": 27855.1264367816,
    "trailer": 16926.9763313609,
}
"""Average pixels of an instance in the Cityscapes training set, as the official evaluation has them."""

_EVALUATED = list(TRAIN_LABEL_IDS)
_INSTANCE_CLASSES = tuple(i for i in INSTANCE_LABEL_IDS if i in _EVALUATED)
_INSTANCE_CATEGORIES = tuple(name for name, ids in CATEGORIES.items() if set(ids) <= set(INSTANCE_LABEL_IDS))
_CATEGORY_OF = {i: list(CATEGORIES[name]) for name in _INSTANCE_CATEGORIES for i in CATEGORIES[name]}


@dataclass(frozen=True)
class Scores:
    """Scores in [0, 1]; nan where there is nothing to score, in the iIoUs also where no instance ids were given."""

    matrix: Matrix
    """Pixels by true (row) and predicted (column) label, in the order of the table, int64 (L, L): Cityscapes' 34 label
    ids."""
    class_iou: dict[str, float]
    """IoU of each class: Cityscapes' 19."""
    class_iiou: dict[str, float]
    """Instance-weighted IoU of each class with instances: Cityscapes' 8, else empty."""
    category_iou: dict[str, float]
    """IoU of each category that has classes: Cityscapes' 7; empty for a table without categories."""
    category_iiou: dict[str, float]
    """Instance-weighted IoU of Cityscapes' categories 'human' and 'vehicle', else empty."""
    class_accuracy: dict[str, float]
    """Share of a class's true pixels that is predicted as it."""
    pixel_accuracy: float
    """Share of correct ones among the evaluated pixels."""
    frequency_weighted_iou: float
    """Mean of the class IoUs, weighted by the classes' true pixels."""
    images: int
    """Images scored."""
    labels: LabelTable = CITYSCAPES
    """The table of the labels."""

    @property
    def mean_iou(self) -> float:
        """The score that papers call mIoU."""
        return mean(self.class_iou.values())

    @property
    def mean_iiou(self) -> float:
        return mean(self.class_iiou.values())

    @property
    def mean_category_iou(self) -> float:
        return mean(self.category_iou.values())

    @property
    def mean_category_iiou(self) -> float:
        return mean(self.category_iiou.values())

    @property
    def mean_accuracy(self) -> float:
        return mean(self.class_accuracy.values())

    def means(self) -> dict[str, float]:
        """The overall scores by name, for logs; those that the table has."""
        without = [*["iIoU", "category iIoU"] * (not self.class_iiou), *["category IoU"] * (not self.category_iou)]
        every = {
            "mIoU": self.mean_iou,
            "iIoU": self.mean_iiou,
            "category IoU": self.mean_category_iou,
            "category iIoU": self.mean_category_iiou,
            "pixel accuracy": self.pixel_accuracy,
            "mean accuracy": self.mean_accuracy,
            "frequency-weighted IoU": self.frequency_weighted_iou,
        }
        return {name: value for name, value in every.items() if name not in without}

    def class_matrix(self) -> Matrix:
        """Pixels by true (row) and predicted (column) class, int64 (C, C); predictions of no class are left out."""
        member = np.zeros((self.labels.num_classes, len(self.labels.labels)), np.int64)
        for train_id, group in enumerate(self.labels.groups):
            member[train_id, list(group)] = 1
        return member @ self.matrix @ member.T

    def table(self) -> str:
        """All scores in percent as text."""
        width = max(16, 1 + max(map(len, [*self.class_iou, *self.category_iou]), default=0))
        iious = [{"iIoU": self.class_iiou}, {"iIoU": self.category_iiou}] if self.class_iiou else [{}, {}]
        lines = _table("class", width, {"IoU": self.class_iou, **iious[0], "acc": self.class_accuracy})
        if self.category_iou:
            lines += ["", *_table("category", width, {"IoU": self.category_iou, **iious[1]})]
        lines += [
            "",
            f"pixel accuracy {_percent(self.pixel_accuracy).strip()}, frequency-weighted IoU "
            f"{_percent(self.frequency_weighted_iou).strip()}, {self.images} images, {self.matrix.sum()} pixels",
            *self.absent(),
        ]
        return "\n".join(lines)

    def absent(self) -> list[str]:
        """Lines about classes that are in no label file: those that no mean counts, and those that are predicted and so
        count as 0."""
        absent = [name for name, accuracy in self.class_accuracy.items() if math.isnan(accuracy)]
        left_out = [name for name in absent if math.isnan(self.class_iou[name])]
        wrong = [name for name in absent if name not in left_out]
        said = {"so '-' and no part of the mean IoU": left_out, "but predicted, so 0 in the mean IoU": wrong}
        return [f"in no label file, {what}: {', '.join(names)}" for what, names in said.items() if names]

    def to_json(self) -> dict[str, Any]:
        """Plain containers for a JSON file: the official result file's keys and values (null where it has NaN), and the
        accuracies."""
        total = max(1, int(self.matrix.sum()))
        names = [label.name for label in self.labels.labels]
        return {
            "confMatrix": self.matrix.tolist(),
            "labels": {label.name: label.id for label in self.labels.labels},
            "priors": dict(zip(names, (self.matrix.sum(1) / total).tolist(), strict=True)),
            "classScores": _nullable(self.class_iou, names),
            "classInstScores": _nullable(self.class_iiou, names),
            "categoryScores": _nullable(self.category_iou, self.labels.categories),
            "categoryInstScores": _nullable(self.category_iiou, self.labels.categories),
            "averageScoreClasses": _null(self.mean_iou),
            "averageScoreInstClasses": _null(self.mean_iiou),
            "averageScoreCategories": _null(self.mean_category_iou),
            "averageScoreInstCategories": _null(self.mean_category_iiou),
            "classAccuracies": _nullable(self.class_accuracy, self.labels.classes),
            "averageAccuracy": _null(self.mean_accuracy),
            "pixelAccuracy": _null(self.pixel_accuracy),
            "frequencyWeightedIoU": _null(self.frequency_weighted_iou),
            "images": self.images,
        }


class ConfusionMatrix:
    """Counts pixels by true and predicted label id, and weighted instance pixels, on one device.

    Attributes:
        labels: the table of the label ids.
        matrix: int64 (L, L), true label by row, in the table's order (Cityscapes': 34 label ids); its sum is the number
            of pixels seen.
        instances: float64 (34, 4) by label id: weighted pixels of instances that are true positives and false negatives
            of the class, then of its category.
        counts: int64 (2,), images seen, and those of them that came with instance ids.
    """

    def __init__(self, device: torch.device | str = "cpu", labels: LabelTable = CITYSCAPES) -> None:
        self.labels = labels
        self._ids = torch.tensor([label.id for label in labels.labels], device=device)
        self.matrix = torch.zeros(len(labels.labels), len(labels.labels), dtype=torch.int64, device=device)
        self.instances = torch.zeros(NUM_LABELS, 4, dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def update(self, prediction: Pixels, truth: Pixels, instances: Pixels | None = None, name: str = "image") -> None:
        """Add one image.

        Args:
            prediction: predicted label ids, uint8 (H, W).
            truth: true label ids, uint8 (H, W).
            instances: instance ids, any integer type (H, W), None if there are none.
            name: what errors call the image.

        Raises:
            UserError: other sizes, ids that the table doesn't have, or instance ids with a table that has none; nothing
                is added then.
        """
        device = self.matrix.device
        pred, true = _label_pixels(prediction, device), _label_pixels(truth, device)
        if pred.shape != true.shape or pred.ndim != 2:
            raise UserError(
                f"{name}: prediction of {_size(pred)} pixels for a label of {_size(true)}; the sizes must be equal, "
                "predictions are made at the label's size."
            )
        counts = _count(true, pred)
        known = counts[self._ids][:, self._ids]
        if int(known.sum()) != pred.numel():
            for side, what in ((counts.sum(1), "ground truth"), (counts.sum(0), "prediction")):
                wrong = {i: int(n) for i, n in enumerate(side.tolist()) if n and self.labels.places[i] < 0}
                if wrong:
                    raise self.labels.unknown_ids(f"{name} ({what})", wrong)
        if instances is not None and not self.labels.has_instances:
            raise UserError(f"{name}: came with instance ids, but {self.labels.name} has no instance scores.")
        weighted = None if instances is None else _instances(pred, _instance_pixels(instances, device), name)
        self.matrix += known
        self.counts[0] += 1
        if weighted is not None:
            self.instances += weighted
            self.counts[1] += 1

    def reduce(self) -> ConfusionMatrix:
        """The sum over all ranks, a new object; this one goes on counting its own images."""
        from engine import distributed

        total = ConfusionMatrix(self.matrix.device, self.labels)
        total.matrix = distributed.all_reduce_sum(self.matrix)
        total.instances = distributed.all_reduce_sum(self.instances)
        total.counts = distributed.all_reduce_sum(self.counts)
        return total

    def merge(self, other: ConfusionMatrix) -> None:
        """Add what another one has counted on the same device."""
        self.matrix += other.matrix
        self.instances += other.instances
        self.counts += other.counts

    def scores(self) -> Scores:
        """The scores of what was counted (of this rank alone: see `reduce`).

        Raises:
            UserError: instance ids were given for some images only.
        """
        matrix: Matrix = self.matrix.cpu().numpy().copy()
        weighted = self.instances.cpu().numpy()
        images, with_instances = self.counts.tolist()
        if 0 < with_instances < images:
            raise UserError(
                f"{with_instances} of {images} images came with instance ids; the iIoU needs those of all images. "
                "Add the missing _gtFine_instanceIds.png files, or remove all of them."
            )
        groups = dict(zip(self.labels.classes, map(list, self.labels.groups), strict=True))
        evaluated = sorted(i for group in groups.values() for i in group)
        hits = {name: matrix[np.ix_(group, group)].sum() for name, group in groups.items()}
        true = {name: matrix[group].sum() for name, group in groups.items()}
        pixels = sum(true.values())
        class_iou = {name: _iou(matrix, group, evaluated) for name, group in groups.items()}
        frequency = np.array(list(true.values())) / max(1, pixels)
        return Scores(
            matrix=matrix,
            class_iou=class_iou,
            class_iiou={
                LABEL_NAMES[i]: _instance_iou(matrix, [i], weighted[i, :2]) if with_instances else math.nan
                for i in (_INSTANCE_CLASSES if self.labels.has_instances else ())
            },
            category_iou={
                name: _iou(matrix, ids, evaluated) for name, ids in self.labels.class_categories.items() if ids
            },
            category_iiou={
                name: _instance_iou(matrix, list(CATEGORIES[name]), weighted[list(CATEGORIES[name]), 2:].sum(0))
                if with_instances
                else math.nan
                for name in (_INSTANCE_CATEGORIES if self.labels.has_instances else ())
            },
            class_accuracy={name: _ratio(hits[name], true[name]) for name in groups},
            pixel_accuracy=_ratio(sum(hits.values()), pixels),
            frequency_weighted_iou=float(np.nansum(frequency * list(class_iou.values()))) if pixels else math.nan,
            images=images,
            labels=self.labels,
        )


def nothing_scored(where: str) -> UserError:
    """The error for labels (`where`) of which no pixel counts: the means over nothing are nan, and nan is no score."""
    return UserError(
        f"{where}: no pixel has an evaluated class, so there is nothing to score; expected labels that are not all "
        "ignored. Look at the split with tools/inspect.py, check data.name and the label table."
    )


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not nan; nan if there are none."""
    valid = [value for value in values if not math.isnan(value)]
    return sum(valid) / len(valid) if valid else math.nan


def _iou(matrix: Matrix, ids: list[int], evaluated: list[int]) -> float:
    """IoU of the union of some of the evaluated labels."""
    positive = matrix[np.ix_(ids, ids)].sum()
    return _ratio(positive, matrix[ids].sum() + _false_positives(matrix, ids, evaluated))


def _instance_iou(matrix: Matrix, ids: list[int], weighted: npt.NDArray[np.float64]) -> float:
    """iIoU from weighted (true positives, false negatives); false positives are plain pixels."""
    return _ratio(weighted[0], weighted[0] + _false_positives(matrix, ids, _EVALUATED) + weighted[1])


def _false_positives(matrix: Matrix, ids: list[int], evaluated: list[int]) -> int:
    """Pixels of other evaluated labels that are predicted as one of `ids`."""
    others = [i for i in evaluated if i not in ids]
    return int(matrix[np.ix_(others, ids)].sum())


def _ratio(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else math.nan


def _instances(pred: Tensor, instances: Tensor, name: str) -> Tensor:
    """Weighted pixels of one image's instances, float64 (34, 4), see ConfusionMatrix."""
    if instances.shape != pred.shape:
        raise UserError(f"{name}: instance ids of {_size(instances)} pixels for a label of {_size(pred)}.")
    totals = np.zeros((NUM_LABELS, 4))
    for instance, row in _instance_rows(pred, instances):
        label = instance_label(instance, name)
        if label is None:
            continue
        size, hits, near = row.sum(), row[label], row[_CATEGORY_OF[label]].sum()
        weight = INSTANCE_SIZE[LABEL_NAMES[label]] / float(size)
        totals[label] += np.array([hits, size - hits, near, size - near]) * weight
    return torch.from_numpy(totals).to(pred.device)


def instance_label(instance: int, name: str) -> int | None:
    """The label of an instance id above 1000; None if it is not evaluated.

    Raises:
        UserError: no such label, or one that has no instances; `name` is named.
    """
    label = instance // 1000
    if label >= NUM_LABELS:
        raise UserError(f"{name}: unknown instance id {instance}; expected label id (0-33) * 1000 + number.")
    if label not in _EVALUATED:
        return None
    if label not in _CATEGORY_OF:
        raise UserError(f"{name}: instance id {instance}, but the class {LABEL_NAMES[label]!r} has no instances.")
    return label


def _instance_rows(pred: Tensor, instances: Tensor) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Each instance id above 1000 with its pixels by predicted label id, (34,)."""
    table: npt.NDArray[np.int64]
    if pred.device.type == "cpu":  # numpy selects ten times as fast as torch here
        objects = instances.numpy() > 1000
        inside = instances.numpy()[objects]
        low = int(inside.min()) if inside.size else 0
        table = np.bincount((inside - low).astype(np.int64) * NUM_LABELS + pred.numpy()[objects])
    else:
        mask = instances > 1000
        pairs = instances[mask].long() * NUM_LABELS + pred[mask]
        low = int(pairs.min()) // NUM_LABELS if pairs.numel() else 0
        table = torch.bincount(pairs - low * NUM_LABELS).cpu().numpy()
    table = np.pad(table, (0, -len(table) % NUM_LABELS)).reshape(-1, NUM_LABELS)
    for row in np.flatnonzero(table.any(1)):
        yield low + int(row), table[row]


def _count(true: Tensor, pred: Tensor) -> Tensor:
    """Pixels by true and predicted value of uint8 tensors: int64 (256, 256)."""
    if true.device.type == "cpu":
        if true.numel() >= 2**24 and len(true) > 1:  # beyond that cv2's float32 counts would not be exact
            half = len(true) // 2
            return _count(true[:half], pred[:half]) + _count(true[half:], pred[half:])
        pair = [true.numpy(), pred.numpy()]  # cv2 counts four times as fast as torch here
        return torch.from_numpy(cv2.calcHist(pair, [0, 1], None, [256, 256], [0, 256, 0, 256])).long()
    return torch.bincount((true.long() * 256 + pred).flatten(), minlength=65536).view(256, 256)


def _label_pixels(values: Pixels, device: torch.device) -> Tensor:
    """Label ids as uint8 on the device, whatever integer type they came in."""
    tensor = torch.as_tensor(values)
    if tensor.dtype != torch.uint8:
        if tensor.is_floating_point() or bool(((tensor < 0) | (tensor > 255)).any()):
            raise TypeError(f"label ids must be integers from 0 to 255, got {tensor.dtype}")
        tensor = tensor.to(torch.uint8)
    return tensor.to(device).contiguous()


def _instance_pixels(values: Pixels, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(values)
    return tensor if device.type == "cpu" else tensor.to(torch.int32).to(device)


def _size(pixels: Tensor) -> str:
    return " x ".join(str(n) for n in reversed(pixels.shape))


def _percent(value: float) -> str:
    return f"{'-':>7}" if math.isnan(value) else f"{100 * value:7.2f}"


def _table(head: str, width: int, columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each name of the first column, and one of the means."""
    lines = [f"{head:<{width}}" + "".join(f"{column:>7}" for column in columns)]
    for name in next(iter(columns.values())):
        values = [column.get(name, math.nan) for column in columns.values()]
        lines.append(f"{name:<{width}}" + "".join(map(_percent, values)))
    return [*lines, f"{'mean':<{width}}" + "".join(_percent(mean(column.values())) for column in columns.values())]


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nullable(values: Mapping[str, float], names: Iterable[str]) -> dict[str, float | None]:
    return {name: _null(values.get(name, math.nan)) for name in names}
