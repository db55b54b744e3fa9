"""Masks in colours become masks of ids, or an error that names the colour."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from engine.errors import UserError
from seg.color_masks import convert_masks
from seg.label_tables import ACDC, CAMVID, CITYSCAPES, KITTI, VOC, Label, LabelTable
from seg.labels import colors_to_ids, read_label_ids
from tests import programs


def colored(table: LabelTable, ids: np.ndarray) -> np.ndarray:
    colors = np.zeros((256, 3), np.uint8)
    colors[[label.id for label in table.labels]] = [label.color for label in table.labels]
    return colors[ids]


@pytest.mark.parametrize("table", [CAMVID, VOC], ids=["camvid", "voc"])
def test_colours_become_ids(tmp_path: Path, table: LabelTable) -> None:
    ids = np.random.default_rng(0).choice([label.id for label in table.labels], (9, 13)).astype(np.uint8)
    assert np.array_equal(colors_to_ids(colored(table, ids), table, "x"), ids)
    (tmp_path / "in/deep").mkdir(parents=True)
    Image.fromarray(colored(table, ids)).save(tmp_path / "in/deep/a.png")
    Image.fromarray(colored(table, ids)).save(tmp_path / "in/b.bmp")
    assert convert_masks(tmp_path / "in", tmp_path / "out", table) == 2
    for name in ("deep/a.png", "b.png"):
        assert np.array_equal(read_label_ids(tmp_path / "out" / name), ids)


def test_colours_that_are_no_label_or_two() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0] = (1, 2, 3)
    with pytest.raises(UserError, match=r"m\.png: 1 pixels have the colour \(1, 2, 3\), which no label of CamVid has"):
        colors_to_ids(pixels, CAMVID, "m.png")
    twins = LabelTable("t", (Label(0, "a", (0, 0, 0), 0), Label(1, "b", (0, 0, 0), 1)))
    with pytest.raises(UserError, match="both 'a' and 'b' in the labels of t; give each label a colour of its own"):
        colors_to_ids(np.zeros((2, 2, 3), np.uint8), twins, "m.png")


@pytest.mark.parametrize("table", [CITYSCAPES, KITTI, ACDC], ids=["cityscapes", "kitti", "acdc"])
def test_colours_that_labels_share_and_count_as_the_same(table: LabelTable) -> None:
    """Of Cityscapes' own colours, black is that of five ignored labels, and 'polegroup' has that of 'pole'."""
    every = np.array([[label.id for label in table.labels]], np.uint8)
    found = colors_to_ids(colored(table, every), table, "m.png")
    classes = table.to_train_ids(every, "") != 255
    assert np.array_equal(found[classes], every[classes])
    assert (found[0, :5] == 0).all() and found[0, 18] == 17


def test_a_colour_of_a_class_and_of_an_ignored_label_of_ones_own() -> None:
    black = np.zeros((2, 2, 3), np.uint8)
    mixed = LabelTable("t", (Label(0, "a", (0, 0, 0), 0), Label(1, "b", (0, 0, 0), 255)))
    with pytest.raises(UserError, match="both 'a' and 'b' in the labels of t; give each label a colour of its own"):
        colors_to_ids(black, mixed, "m.png")
    merged = LabelTable("t", (Label(3, "a", (0, 0, 0), 0), Label(4, "b", (0, 0, 0), 0)))
    assert (colors_to_ids(black, merged, "m.png") == 3).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_masks_that_hold_ids_already(tmp_path: Path, mode: str) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.array([[0, 7], [7, 33]], np.uint8)).convert(mode).save(tmp_path / "in/a.png")
    told = r"a\.png: 2 pixels have the colour \(7, 7, 7\), which .* it seems to hold label ids already"
    with pytest.raises(UserError, match=told):
        convert_masks(tmp_path / "in", tmp_path / "out", CITYSCAPES)
    with pytest.raises(
        UserError, match=r"pixels have the colour \(34, 34, 34\), which no label of Cityscapes has. Enter it"
    ):
        colors_to_ids(np.full((2, 2, 3), 34, np.uint8), CITYSCAPES, "m.png")


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "LA", "RGBA"])
def test_ids_in_each_channel(tmp_path: Path, mode: str) -> None:
    (tmp_path / "in").mkdir()
    ids = np.array([[0, 7], [7, 33]], np.uint8)
    Image.fromarray(ids).convert("L" if mode == "P" else mode).save(tmp_path / "in/a.png")
    if mode == "P":
        indices = Image.fromarray(ids)
        indices.putpalette([value for i in range(256) for value in (255 - i, i, 9)])
        indices.save(tmp_path / "in/a.png")
    assert convert_masks(tmp_path / "in", tmp_path / "out", CITYSCAPES, ids=True) == 1
    assert np.array_equal(read_label_ids(tmp_path / "out/a.png"), ids)


def test_ids_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    made = {
        "has colours, so its channels do not all hold label ids": (Image.new("RGB", (2, 2), (7, 7, 8)), "a.png"),
        "unknown label ids 34": (Image.new("RGB", (2, 2), (34, 34, 34)), "a.png"),
        "unknown label ids 99": (Image.new("L", (2, 2), 99), "a.png"),
        "is no PNG of 8 bits a channel": (Image.new("RGB", (8, 8), (7, 7, 7)), "a.jpg"),
    }
    for text, (mask, name) in made.items():
        mask.save(tmp_path / "in" / name)
        with pytest.raises(UserError, match=f"{name}: {text}"):
            convert_masks(tmp_path / "in", tmp_path / "out", CITYSCAPES, ids=True)
        (tmp_path / "in" / name).unlink()
    cv2.imwrite(str(tmp_path / "in/a.png"), np.full((2, 2, 3), 7, np.uint16))
    with pytest.raises(UserError, match="is no PNG of 8 bits a channel"):
        convert_masks(tmp_path / "in", tmp_path / "out", CITYSCAPES, ids=True)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_have_the_colour_that_the_file_holds(tmp_path: Path, mode: str) -> None:
    (tmp_path / "in").mkdir()
    table = LabelTable("t", (Label(3, "a", (0, 0, 0), 0), Label(4, "b", (9, 9, 9), 1)))
    ids = np.array([[3, 4, 3], [4, 4, 3]], np.uint8)
    mask = Image.fromarray(colored(table, ids))
    if mode == "P":
        mask = Image.fromarray(ids)
        mask.putpalette([value for i in range(5) for value in ((0, 0, 0) if i < 4 else (9, 9, 9))])
        mask.save(tmp_path / "in/a.png", transparency=3)
    else:
        mask = mask.convert(mode)
        mask.putalpha(Image.fromarray(np.array([[0, 0, 255], [255, 128, 0]], np.uint8)))
        mask.save(tmp_path / "in/a.png")
    assert convert_masks(tmp_path / "in", tmp_path / "out", table) == 1
    assert np.array_equal(read_label_ids(tmp_path / "out/a.png"), ids)


def test_folders_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: no such folder"):
        convert_masks(tmp_path / "none", tmp_path / "out", VOC)
    with pytest.raises(UserError, match="is the folder of the masks, which would be overwritten"):
        convert_masks(tmp_path, tmp_path, VOC)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in it"):
        convert_masks(tmp_path / "empty", tmp_path / "out", VOC)


def test_masks_in_a_folder_within_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "color/deep").mkdir(parents=True)
    for name, value in (("a", (0, 0, 0)), ("deep/b", (128, 0, 0))):
        Image.new("RGB", (2, 2), value).save(tmp_path / f"color/{name}.png")
    for _ in range(2):  # what was written lies beside the folder of the masks, and is none of them
        assert convert_masks(tmp_path / "color", tmp_path, VOC) == 2
        assert (read_label_ids(tmp_path / "a.png") == 0).all() and (read_label_ids(tmp_path / "deep/b.png") == 1).all()
    assert Image.open(tmp_path / "color/a.png").mode == "RGB"


def test_a_mask_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "color/color").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "color/a.png")
    Image.new("RGB", (2, 2), (128, 0, 0)).save(tmp_path / "color/color/a.jpg")
    Image.new("RGB", (2, 2), (128, 0, 0)).save(tmp_path / "color/0.png")
    told = r"color/a\.png is one of the masks and would be overwritten by the ids of .*color/color/a\.jpg; name another"
    with pytest.raises(UserError, match=told):
        convert_masks(tmp_path / "color", tmp_path, VOC)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["color"]  # nothing was written before


@pytest.mark.parametrize("name", ["a.png", "b.png"])
def test_a_link_to_a_file_in_the_output_folder(tmp_path: Path, name: str) -> None:
    for folder in ("in", "out", "other"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (2, 2), (128, 0, 0)).save(tmp_path / f"out/{name}")
    Image.new("RGB", (2, 2)).save(tmp_path / "in/b.png")
    (tmp_path / "in/a.png").symlink_to(tmp_path / f"out/{name}")
    before = (tmp_path / f"out/{name}").read_bytes()
    told = (
        rf"out/{name}, where the link .*in/a\.png leads, is one of the masks and would be overwritten by .*in/{name};"
    )
    with pytest.raises(UserError, match=told):
        convert_masks(tmp_path / "in", tmp_path / "out", VOC)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / f"out/{name}").read_bytes() == before
    (tmp_path / "other/b.png").symlink_to(tmp_path / "in/b.png")  # is replaced, and the mask stays
    assert convert_masks(tmp_path / "in", tmp_path / "other", VOC) == 2
    assert not (tmp_path / "other/b.png").is_symlink() and Image.open(tmp_path / "in/b.png").mode == "RGB"


def test_the_program(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "in/a.png")
    (tmp_path / "labels.yaml").write_text("- {id: 5, name: road, color: [9, 9, 9], train_id: 0}\n")
    folders = tmp_path / "in", tmp_path / "out"
    done = programs.run("convert_masks", *folders, "--labels", tmp_path / "labels.yaml")
    assert done.returncode == 0 and done.stdout == f"1 masks converted, in {tmp_path / 'out'}\n"
    assert (read_label_ids(tmp_path / "out/a.png") == 5).all()
    done = programs.run("convert_masks", *folders, "--table", "voc", "--ids")
    assert done.returncode == 0 and (read_label_ids(tmp_path / "out/a.png") == 9).all()
    done = programs.run("convert_masks", *folders, "--table", "voc")
    assert done.returncode == 2 and "a.png: 16 pixels have the colour (9, 9, 9)" in done.stderr
