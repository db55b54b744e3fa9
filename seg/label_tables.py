"""Label tables: what the ids in a data set's masks mean, and which of them a network learns.

A table's *label ids* are what the mask files hold, its *train ids* are 0 .. C - 1 and 255 for pixels that count neither
in the loss nor in the scores. Cityscapes' numbers come from cityscapesscripts, the others are written down here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cityscapesscripts.helpers.labels import labels as _OFFICIAL

from engine.errors import UserError

Ids = npt.NDArray[np.uint8]

IGNORE = 255
"""Train id of pixels that count neither in the loss nor in the scores."""
_UNKNOWN = 254
MAX_CLASSES = 254
"""A table has at most as many classes, since masks and predictions are 8 bit."""


@dataclass(frozen=True)
class Label:
    """One kind of pixel."""

    id: int
    """Its value in the mask files, 0 to 255."""
    name: str
    color: tuple[int, int, int]
    """RGB, 0 to 255."""
    train_id: int
    """The class it is trained and scored as; 255: ignored. Several labels may share one."""
    category: str = ""
    """The group that category scores count its class in; empty: none."""
    has_instances: bool = False
    """Whether instance-weighted scores count its single objects."""


@dataclass(frozen=True)
class LabelTable:
    """The labels of a data set, in the order of their ids.

    A class is named and coloured after the first label that has its train id, and is in the category of the first one
    that has any. `name` is what messages call the data set. Tables come checked from `seg.label_yaml` or are those
    below.
    """

    name: str
    labels: tuple[Label, ...]

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """For each train id its labels' places in `labels`; one place each unless labels are merged."""
        count = 1 + max((label.train_id for label in self.labels if label.train_id != IGNORE), default=-1)
        return tuple(tuple(i for i, label in enumerate(self.labels) if label.train_id == t) for t in range(count))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Name of each train id."""
        return tuple(self.labels[group[0]].name for group in self.groups)

    @property
    def num_classes(self) -> int:
        return len(self.groups)

    @cached_property
    def label_ids(self) -> tuple[int, ...]:
        """Label id of each train id (the first one, where several are merged)."""
        return tuple(self.labels[group[0]].id for group in self.groups)

    @cached_property
    def colors(self) -> Ids:
        """RGB colour of each train id, uint8 (num_classes, 3)."""
        return np.array([self.labels[group[0]].color for group in self.groups], np.uint8).reshape(-1, 3)

    @cached_property
    def categories(self) -> dict[str, tuple[int, ...]]:
        """Category -> the places in `labels` of its labels, in the order of the table."""
        found: dict[str, tuple[int, ...]] = {}
        for i, label in enumerate(self.labels):
            if label.category:
                found[label.category] = (*found.get(label.category, ()), i)
        return found

    @cached_property
    def class_categories(self) -> dict[str, list[int]]:
        """Category -> the places in `labels` of all labels of its classes; none for one without a class.

        By class, since a network predicts one label for all those of a class."""
        members = {name: list[int]() for name in self.categories}
        for group in self.groups:
            if category := next((self.labels[i].category for i in group if self.labels[i].category), ""):
                members[category] += group
        return members

    @property
    def has_instances(self) -> bool:
        """Whether there are instance-weighted scores."""
        return any(label.has_instances for label in self.labels)

    @cached_property
    def places(self) -> npt.NDArray[np.int64]:
        """Place in `labels` of each value 0 .. 255, int64 (256,); -1 where the table doesn't know it."""
        table = np.full(256, -1, np.int64)
        table[[label.id for label in self.labels]] = np.arange(len(self.labels))
        return table

    @cached_property
    def _to_train(self) -> Ids:
        table = np.full(256, _UNKNOWN, np.uint8)
        table[[label.id for label in self.labels]] = [label.train_id for label in self.labels]
        return table

    @cached_property
    def _to_label(self) -> Ids:
        table = np.full(256, _UNKNOWN, np.uint8)
        table[: self.num_classes] = self.label_ids
        void = next((label.id for label in self.labels if label.train_id == IGNORE), None)
        if void is not None:
            table[IGNORE] = void
        return table

    @property
    def is_official(self) -> bool:
        """Whether its label ids are Cityscapes'."""
        return [label.id for label in self.labels] == [label.id for label in CITYSCAPES.labels]

    def to_train_ids(self, label_ids: Ids, path: Path | str) -> Ids:
        """Train ids (uint8, 255 where ignored) of a uint8 array of label ids.

        Raises:
            UserError: an id that the table doesn't know; `path` is named in the message.
        """
        train_ids = self._to_train[label_ids]
        if (train_ids == _UNKNOWN).any():
            values, counts = np.unique(label_ids[train_ids == _UNKNOWN], return_counts=True)
            raise self.unknown_ids(path, dict(zip(values.tolist(), counts.tolist(), strict=True)))
        return train_ids

    def to_label_ids(self, train_ids: Ids) -> Ids:
        """Label ids (uint8) of a uint8 array of train ids; 255 becomes the table's first ignored label.

        Raises:
            ValueError: a value that is no train id, or 255 when the table ignores nothing.
        """
        known = train_ids < self.num_classes
        if any(label.train_id == IGNORE for label in self.labels):
            known |= train_ids == IGNORE
        if not known.all():
            raise ValueError(f"not train ids: {np.unique(train_ids[~known]).tolist()}")
        return self._to_label[train_ids]

    def unknown_ids(self, path: Path | str, counts: Mapping[int, int]) -> UserError:
        """The error for label ids outside the table; `counts` gives the pixels of each such id."""
        first = list(counts.items())[:5]
        shown = ", ".join(f"{i} ({n} pixels)" for i, n in first) + (", ..." if len(counts) > 5 else "")
        if self.is_official:
            hint = " 255 is the ignored *train* id: this looks like a train-id PNG." if IGNORE in counts else ""
            return UserError(
                f"{path}: unknown label ids {shown}; {self.name} label ids are 0 to {len(self.labels) - 1}, without "
                f"gaps.{hint} Write label ids (as in the _labelIds.png files, seg.labels.to_label_ids)."
            )
        return UserError(
            f"{path}: unknown label ids {shown}; the labels of {self.name} have the ids "
            f"{_ranges([label.id for label in self.labels])}. Check data.name and the label table, or enter the ids in "
            "the table, with `ignore: true` if they are not to count."
        )

    def to_plain(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint; `seg.label_yaml.stored_table` reads them back."""
        rows = [[x.id, x.name, list(x.color), x.train_id, x.category, x.has_instances] for x in self.labels]
        return {"name": self.name, "labels": rows}


def _ranges(ids: Sequence[int]) -> str:
    """Such as '0 to 18, 255'."""
    runs: list[list[int]] = []
    for i in sorted(ids):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)


CITYSCAPES = LabelTable(
    "Cityscapes",
    tuple(
        Label(x.id, x.name, tuple(x.color), x.trainId, x.category, x.hasInstances)
        for x in sorted(_OFFICIAL, key=lambda x: x.id)
        if x.id >= 0  # the license plate, -1, is in no image
    ),
)
"""The 34 label ids of Cityscapes, 19 of them classes; the only table with instance scores."""


def _renamed(name: str) -> LabelTable:
    """Cityscapes' labels for a data set that has no instance scores."""
    return LabelTable(name, tuple(replace(label, has_instances=False) for label in CITYSCAPES.labels))


KITTI = _renamed("KITTI")
"""KITTI's semantic labels of 2015 have Cityscapes' label ids (Alhaija et al., IJCV 2018)."""
ACDC = _renamed("ACDC")
"""ACDC's labels have Cityscapes' label ids (Sakaridis et al., ICCV 2021)."""

BDD100K = LabelTable(
    "BDD100K",
    (
        *(
            Label(train_id, label.name, label.color, train_id, label.category)
            for train_id, place in enumerate(group[0] for group in CITYSCAPES.groups)
            for label in [CITYSCAPES.labels[place]]
        ),
        Label(255, "unlabeled", (0, 0, 0), IGNORE, "void"),
    ),
)
"""BDD100K's semantic masks hold Cityscapes' train ids, and 255 where nothing is labelled (Yu et al., CVPR 2020)."""

_CAMVID = (
    ("Sky", (128, 128, 128)),
    ("Building", (128, 0, 0)),
    ("Pole", (192, 192, 128)),
    ("Road", (128, 64, 128)),
    ("Pavement", (60, 40, 222)),
    ("Tree", (128, 128, 0)),
    ("SignSymbol", (192, 128, 128)),
    ("Fence", (64, 64, 128)),
    ("Car", (64, 0, 128)),
    ("Pedestrian", (64, 64, 0)),
    ("Bicyclist", (0, 128, 192)),
)
CAMVID = LabelTable(
    "CamVid",
    (
        *(Label(i, name, color, i) for i, (name, color) in enumerate(_CAMVID)),
        Label(11, "Unlabelled", (0, 0, 0), IGNORE),
    ),
)
"""The 11 classes of CamVid that papers score, and 11 for the rest (Badrinarayanan et al., SegNet, PAMI 2017)."""

# fmt: off
_VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on


def voc_color(index: int) -> tuple[int, int, int]:
    """RGB of an index in VOC's palette: its bits, from the lowest, go in turn to red, green, blue from the highest."""
    channels = [0, 0, 0]
    for bit in range(8):
        channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


VOC = LabelTable(
    "Pascal VOC",
    (
        *(Label(i, name, voc_color(i), i) for i, name in enumerate(_VOC)),
        Label(255, "boundary", voc_color(255), IGNORE),
    ),
)
"""The 21 classes of Pascal VOC 2012, and 255 for the contours that don't count."""

TABLES: dict[str, LabelTable] = {
    "cityscapes": CITYSCAPES,
    "camvid": CAMVID,
    "bdd100k": BDD100K,
    "kitti": KITTI,
    "acdc": ACDC,
    "voc": VOC,
}
"""The table of each `data.name` whose labels are fixed; those of mapillary and folder are read from a file."""
