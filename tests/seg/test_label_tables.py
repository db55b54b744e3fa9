"""Tables of data sets: facts, conversion of ids both ways, and the way through a checkpoint."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from engine.errors import UserError
from seg import label_tables, labels
from seg.label_tables import ACDC, BDD100K, CAMVID, CITYSCAPES, KITTI, TABLES, VOC, Label, LabelTable


@pytest.mark.parametrize("name", TABLES)
def test_ids_go_both_ways(name: str) -> None:
    table = TABLES[name]
    train_ids = np.array([[*range(table.num_classes), 255]], np.uint8)
    label_ids = table.to_label_ids(train_ids)
    assert label_ids[0, :-1].tolist() == list(table.label_ids)
    assert np.array_equal(table.to_train_ids(label_ids, "x"), train_ids)
    assert table.colors.shape == (table.num_classes, 3) and len(set(table.classes)) == table.num_classes
    assert [label.id for label in table.labels] == sorted(label.id for label in table.labels)
    with pytest.raises(ValueError, match=rf"not train ids: \[{table.num_classes}\]"):
        table.to_label_ids(np.array([table.num_classes], np.uint8))


def test_the_default_is_cityscapes() -> None:
    assert CITYSCAPES.classes == labels.TRAIN_CLASSES and CITYSCAPES.label_ids == labels.TRAIN_LABEL_IDS
    assert np.array_equal(CITYSCAPES.colors, labels.TRAIN_COLORS)
    assert CITYSCAPES.categories == labels.CATEGORIES and CITYSCAPES.has_instances
    for other in (KITTI, ACDC, BDD100K):
        assert other.classes == CITYSCAPES.classes and not other.has_instances
        assert np.array_equal(other.colors, CITYSCAPES.colors)


def test_other_data_sets() -> None:
    assert (CAMVID.num_classes, VOC.num_classes) == (11, 21)
    assert CAMVID.to_train_ids(np.array([0, 10, 11], np.uint8), "x").tolist() == [0, 10, 255]
    assert VOC.classes[15] == "person" and VOC.labels[15].color == (192, 128, 128)
    assert label_tables.voc_color(20) == (0, 64, 128) and label_tables.voc_color(255) == (224, 224, 192)
    assert BDD100K.to_train_ids(np.array([18, 255], np.uint8), "x").tolist() == [18, 255]


def test_unknown_ids_name_the_table() -> None:
    with pytest.raises(UserError, match=r"a\.png: unknown label ids 12 \(2 pixels\); the labels of CamVid.* 0 to 11\."):
        CAMVID.to_train_ids(np.array([12, 12, 0], np.uint8), "a.png")


def test_a_table_without_ignored_labels_has_no_void() -> None:
    table = LabelTable("x", (Label(3, "a", (0, 0, 0), 0),))
    with pytest.raises(ValueError, match=r"not train ids: \[255\]"):
        table.to_label_ids(np.array([255], np.uint8))


def test_tables_survive_checkpoints_and_processes() -> None:
    for table in TABLES.values():
        assert table.colors is table.colors
        assert pickle.loads(pickle.dumps(table)) == table
        assert labels.table_of({"labels": table.to_plain()}) == table
    assert labels.table_of({"classes": ["road"]}) == CITYSCAPES
