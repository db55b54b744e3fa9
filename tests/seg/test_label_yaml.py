"""Label tables from files, and what is said about each mistake in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import UserError
from seg import label_yaml
from seg.config import DataConfig
from seg.label_tables import Label
from seg.labels import check_unchanged

GOOD = """
- {id: 9, name: void, color: [0, 0, 0], ignore: true}
- {id: 0, name: road, color: [128, 64, 128], train_id: 0, category: flat}
- {id: 7, name: car, color: [0, 0, 142], train_id: 1}
"""


def read(tmp_path: Path, text: str) -> label_yaml.LabelTable:
    (tmp_path / "labels.yaml").write_text(text)
    return label_yaml.read_table(tmp_path / "labels.yaml")


def test_a_good_table(tmp_path: Path) -> None:
    table = read(tmp_path, GOOD)
    assert table.labels == (
        Label(0, "road", (128, 64, 128), 0, "flat"),
        Label(7, "car", (0, 0, 142), 1),
        Label(9, "void", (0, 0, 0), 255),
    )
    assert table.classes == ("road", "car") and table.name == f"{tmp_path.name}/labels.yaml"
    assert table.colors.tolist() == [[128, 64, 128], [0, 0, 142]] and table.categories == {"flat": (0,)}


ROAD = "- {id: 0, name: road, color: [1, 2, 3], train_id: 0}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ROAD + "- {id: 1, name: car, color: [1, 2, 3], train_id: 2}", r"gap: 1 missing below 2 of entry 2 \('car'\)"),
        (ROAD + "- {id: 0, name: car, color: [1, 2, 3], train_id: 1}", r"'car'\): id 0 is that of entry 1 \('road'\)"),
        (ROAD + "- {id: 1, name: road, color: [1, 2, 3], train_id: 1}", r"2 \('road'\): the name is that of entry 1"),
        (ROAD + "- {id: 1, color: [1, 2, 3], train_id: 1}", r"entry 2: has no name; expected id, name, color"),
        (ROAD + "- {name: car, color: [1, 2, 3], train_id: 1}", r"entry 2 \('car'\): has no id"),
        (ROAD + "- {id: 1, name: car, train_id: 1}", r"entry 2 \('car'\): has no color"),
        (ROAD + "- {id: 1, name: car, color: [1, 2, 3]}", r"entry 2 \('car'\): has no train_id; .* or ignore: true"),
        (ROAD + "- {id: 1, name: car, color: [1, 2, 3], train_id: 255}", r"255 is kept for ignored .* ignore: true in"),
        (ROAD + "- {id: 256, name: car, color: [1, 2, 3], train_id: 1}", r"id: found 256, expected .* 0 to 255"),
        (ROAD + "- {id: -1, name: car, color: [1, 2, 3], train_id: 1}", r"id: found -1, expected a whole number"),
        (ROAD + "- {id: true, name: car, color: [1, 2, 3], train_id: 1}", r"id: found True"),
        (ROAD + "- {id: 1, name: car, color: [1, 2], train_id: 1}", r"color: found \[1, 2\], expected \[red, green,"),
        (ROAD + "- {id: 1, name: car, color: [1, 2, 300], train_id: 1}", r"color: found \[1, 2, 300\]"),
        (ROAD + "- {id: 1, name: no, color: [1, 2, 3], train_id: 1}", r"name: found False, expected text \(in quotes"),
        (ROAD + "- {id: 1, name: car, colour: 3, color: [1, 2, 3], train_id: 1}", r"unknown key 'colour'; known:"),
        (ROAD + "- {id: 1, name: car, color: [1, 2, 3], train_id: 1, ignore: true}", r"both train_id 1 and ignore"),
        (ROAD + "- {id: 1, name: car, color: [1, 2, 3], ignore: 'yes'}", r"ignore: found 'yes', expected true or"),
        ("- {id: 0, name: void, color: [0, 0, 0], ignore: true}", "every label is ignored; give at least one"),
        ("- [0, road]", r"entry 1: found list .* expected keys and values"),
        ("road: 0", r"expected a list of labels, such as `- \{id: 0, name: road.*found dict"),
        ("", "expected a list of labels.*found nothing"),
        ("- {id: 0", "not valid YAML: line 1"),
        (ROAD + "- {id: 1, name: car, color: [1, 2, 3], train_id: 1, id: 2}", "line 2: the key 'id' is written twice"),
    ],
)  # fmt: skip
def test_mistakes_name_file_and_entry(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"labels\.yaml: .*{said}"):
        read(tmp_path, text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: no such file; expected a list of labels, such as"):
        label_yaml.read_table(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=rf"no such file, nor is there a folder {tmp_path / 'mine'}; expected a list"):
        label_yaml.read_table(tmp_path / "mine" / "labels.yaml")


def test_too_many_classes(tmp_path: Path) -> None:
    text = "".join(f"- {{id: {i}, name: c{i}, color: [0, 0, 0], train_id: {i}}}\n" for i in range(255))
    with pytest.raises(UserError, match="255 classes; at most 254 fit"):
        read(tmp_path, text)
    table = read(tmp_path, text.rsplit("\n", 2)[0])
    assert table.num_classes == 254


def test_mapillarys_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config_v1.2.json"
    with pytest.raises(UserError, match=r"has none of config_v2\.0\.json, config_v1\.2\.json.*mapillary\.com"):
        label_yaml.mapillary_config(tmp_path, None)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"v1\.2\.json: is no configuration of Mapillary Vistas.*readable, color"):
        label_yaml.read_mapillary(label_yaml.mapillary_config(tmp_path, None))
    with pytest.raises(UserError, match=r"gone\.json: no such file; download Mapillary Vistas"):
        label_yaml.read_mapillary(tmp_path / "gone.json")
    twins = [{"readable": "Car", "color": [1, 2, 3], "evaluate": True}] * 2
    path.write_text(json.dumps({"labels": twins}))
    with pytest.raises(UserError, match=r"entry 2 \('Car'\): the name is that of entry 1"):
        label_yaml.read_mapillary(path)


ROW = [0, "road", [1, 2, 3], 0, "", False]


@pytest.mark.parametrize(
    ("plain", "text"),
    [
        (None, "found nothing, expected a name and a list of labels"),
        ({"name": "x", "labels": 3}, "expected a name and a list of labels"),
        ({"name": "x", "labels": [ROW, {"id": 1}]}, "entry 2: found dict"),
        ({"name": "x", "labels": [[True, *ROW[1:]]]}, "entry 1: found list"),
        ({"name": "x", "labels": [[999, *ROW[1:]]]}, "entry 1: id: found 999"),
        ({"name": "x", "labels": [[0, "road", [1, 2], 0, "", False]]}, r"entry 1: colour: found \[1, 2\]"),
        ({"name": "x", "labels": [ROW, ROW]}, "id 0 is that of entry 1"),
    ],
)
def test_a_stored_table_that_is_none(plain: object, text: str) -> None:
    assert label_yaml.stored_table({"name": "x", "labels": [ROW]}, "best.pt").classes == ("road",)
    with pytest.raises(UserError, match=f"best.pt: its label table: .*{text}"):
        label_yaml.stored_table(plain, "best.pt")


def test_a_training_goes_on_with_the_labels_it_began_with(tmp_path: Path) -> None:
    """Names and colours may change, what an id is trained as may not."""
    extra = "- {id: 8, name: van, color: [1, 0, 142], train_id: 1}\n"
    meta = {"labels": read(tmp_path, GOOD + extra).to_plain()}
    cfg = DataConfig(name="folder", root=tmp_path)
    check_unchanged(cfg, meta, "last.pt")
    read(tmp_path, GOOD + extra.replace("van", "truck").replace("142", "143"))
    check_unchanged(cfg, meta, "last.pt")
    read(tmp_path, GOOD + extra.replace("train_id: 1", "ignore: true"))
    with pytest.raises(UserError, match=r"last.pt: was trained with other labels: id 8 was of 'car', now ignored; put"):
        check_unchanged(cfg, meta, "last.pt")
    read(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"id 8 was of 'car', now ignored"):
        check_unchanged(cfg, meta, "last.pt")
    read(tmp_path, GOOD.replace("name: car", "name: bus"))
    with pytest.raises(UserError, match=r"the first that differs is 'car', here 'bus'"):
        check_unchanged(cfg, meta, "last.pt")
