"""Pictures: colours are exact, legends name what is there and fit, plots are written whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from engine.errors import UserError
from seg import draw, labels
from seg.draw import Example, Run
from seg.label_tables import VOC, Label, LabelTable

ALL = np.arange(19, dtype=np.uint8)


def test_colorize_uses_the_official_palette() -> None:
    ids = np.append(ALL, 255).reshape(4, 5).astype(np.uint8)
    colors = draw.colorize(ids)
    assert colors.dtype == np.uint8 and colors.shape == (4, 5, 3)
    assert colors[0, 0].tolist() == [128, 64, 128] and colors[2, 3].tolist() == [0, 0, 142]
    assert colors[3, 4].tolist() == [0, 0, 0]
    assert np.array_equal(draw.colorize(ids.astype(np.int64)), colors)


def test_colorize_takes_label_ids_with_their_palette_and_no_other() -> None:
    label_ids = np.array([[7, 23, 33]], np.uint8)
    train_ids = labels.to_train_ids(label_ids, "x")
    assert np.array_equal(draw.colorize(label_ids, labels.LABEL_COLORS), draw.colorize(train_ids))
    with pytest.raises(ValueError, match=r"ids \[23, 33\] are not in a palette of 19 colours"):
        draw.colorize(label_ids)
    with pytest.raises(ValueError, match=r"ids \[-1\]"):
        draw.colorize(np.array([[-1, 0]]))


def test_void_has_the_colour_of_no_class() -> None:
    ids = np.array([[0, 20, 255]], np.uint8)
    assert draw.void(VOC.colors) == "white" and draw.void(labels.TRAIN_COLORS) == "black"
    colors = draw.colorize(ids, VOC.colors)[0]
    assert colors[0].tolist() == [0, 0, 0] and colors[2].tolist() == [255, 255, 255]
    assert draw.void(np.array([[0, 0, 0], [255, 255, 255]], np.uint8)) == "grey"


def test_the_legend_shows_void_in_the_colour_that_it_has() -> None:
    ids = np.full((40, 400), labels.IGNORE, np.uint8)
    table = LabelTable("x", (Label(0, "a", (0, 0, 0), 0), Label(1, "b", (255, 255, 255), 1)))
    image = np.zeros((40, 400, 3), np.uint8)
    whole = draw.panel(image, ids, np.zeros_like(ids), table=table)
    above = draw.panel(image, ids, np.zeros_like(ids), legend=False, table=table)
    assert (above == 128).all(-1).sum() >= ids.size  # grey
    assert (whole[len(above) :] == 128).all(-1).sum() > 50


def test_overlay_mixes_and_leaves_void_alone() -> None:
    image = np.full((2, 3, 3), 100, np.uint8)
    ids = np.array([[0, 0, 255], [8, 8, 8]], np.uint8)
    mixed = draw.overlay(image, ids, alpha=0.25, legend=False)
    assert mixed.shape == image.shape
    assert mixed[0, 0].tolist() == [107, 91, 107] and mixed[0, 2].tolist() == [100, 100, 100]
    assert image.max() == 100
    assert np.array_equal(draw.overlay(image, ids, alpha=0, legend=False), image)
    with pytest.raises(ValueError, match="differ in size"):
        draw.overlay(image, ids[:1])


def swatches(strip: np.ndarray) -> set[tuple[int, ...]]:
    """Colours that fill at least 9 x 9 pixels somewhere."""
    found = set()
    for color in np.unique(strip.reshape(-1, 3), axis=0):
        mask = np.all(strip == color, axis=-1)
        windows = np.lib.stride_tricks.sliding_window_view(mask, (9, 9)) if min(mask.shape) >= 9 else np.zeros(0)
        if windows.size and windows.all(axis=(-1, -2)).any():
            found.add(tuple(color.tolist()))
    return found


@pytest.mark.parametrize("size", [(1, 1), (64, 128), (360, 480)])
def test_the_legend_shows_the_classes_present_below_the_image(size: tuple[int, int]) -> None:
    ids = np.zeros(size, np.uint8)
    ids[0, 0] = 13
    picture = draw.overlay(np.zeros((*size, 3), np.uint8), ids)
    height, width = size
    assert np.array_equal(picture[:height, :width], draw.overlay(np.zeros((*size, 3), np.uint8), ids, legend=False))
    present = {tuple(labels.TRAIN_COLORS[i].tolist()) for i in np.unique(ids)}
    assert swatches(picture[height:]) == present | {(255, 255, 255)}


@pytest.mark.parametrize("width", [19, 320, 2048])
def test_all_classes_fit_without_overlap(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[tuple[float, float, float, float]] = []
    real = draw.ImageDraw.Draw

    def spy(strip: Image.Image) -> Any:
        pen = real(strip)
        text, rectangle = pen.text, pen.rectangle

        def note(place: Any, words: str, **options: Any) -> None:
            box = pen.textbbox(place, words, font=options["font"], anchor=options["anchor"])
            assert box[0] >= 0 and box[1] >= 0 and box[2] <= strip.width and box[3] <= strip.height
            boxes.append(box)
            text(place, words, **options)

        monkeypatch.setattr(pen, "text", note)
        monkeypatch.setattr(pen, "rectangle", lambda box, **o: (boxes.append(box), rectangle(box, **o)))
        return pen

    monkeypatch.setattr(draw.ImageDraw, "Draw", spy)
    ids = np.append(np.resize(ALL, width - 1), 255)[None].astype(np.uint8)
    strip = draw.overlay(np.zeros((1, width, 3), np.uint8), ids)
    assert len(boxes) == 2 * len(np.unique(ids)) and strip.shape[1] >= width
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_panel_stands_image_label_and_prediction_side_by_side() -> None:
    image = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    label, prediction = np.full((200, 300), 255, np.uint8), np.full((200, 300), 10, np.uint8)
    picture = draw.panel(image, label, prediction, legend=False)
    assert picture.shape[1] == 3 * 300 + 2 * 4
    body = picture[-200:]
    assert np.array_equal(body[:, :300], image)
    assert not body[:, 304:604].any() and (body[:, 608:] == labels.TRAIN_COLORS[10]).all()
    assert draw.panel(image, None, prediction, legend=False).shape[1] == 2 * 300 + 4
    assert draw.panel(image, label, prediction).shape[0] > picture.shape[0]


@pytest.mark.parametrize(("size", "width"), [((1, 1), 160), ((64, 128), 256), ((1000, 2000), 640), ((20, 3000), 640)])
def test_panel_tiles_are_neither_tiny_nor_huge(size: tuple[int, int], width: int) -> None:
    picture = draw.panel(np.zeros((*size, 3), np.uint8), None, np.zeros(size, np.uint8), legend=False)
    assert picture.shape[1] == 2 * width + 4


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_confusion_is_drawn_by_row_and_shows_empty_rows_grey(tmp_path: Path) -> None:
    matrix = np.array([[8, 2, 0], [0, 0, 0], [0, 0, 5]])
    draw.plot_confusion(matrix, ["road", "train", "sky"], tmp_path / "new/c.png")
    pixels = opened(tmp_path / "new/c.png")
    dark, grey = (8, 48, 107), (224, 224, 224)
    for color in (dark, grey):  # the sky's 100 % and the train's row
        assert np.all(pixels == color, axis=-1).sum() > 500
    assert not np.array_equal(pixels, confusion(tmp_path, matrix[::-1]))
    assert np.array_equal(pixels, confusion(tmp_path, matrix * 10))
    with pytest.raises(ValueError, match=r"matrix \(3, 3\) does not go with 2 names"):
        draw.plot_confusion(matrix, ["road", "sky"], tmp_path / "c.png")


def confusion(folder: Path, matrix: np.ndarray) -> np.ndarray:
    draw.plot_confusion(matrix, ["road", "train", "sky"], folder / "other.png")
    return opened(folder / "other.png")


def test_class_iou_of_one_run_and_of_several(tmp_path: Path) -> None:
    scores: dict[str, float | None] = {"road": 0.9, "train": math.nan, "bus": None, "sky": 0.0}
    draw.plot_class_iou(scores, tmp_path / "one.png")
    draw.plot_class_iou({"bn": scores, "deconv": {"road": 0.95}}, tmp_path / "two.png")
    draw.plot_class_iou({"road": math.nan}, tmp_path / "none.png")
    blue, orange = (31, 119, 180), (217, 95, 2)
    bars = {name: opened(tmp_path / f"{name}.png") for name in ("one", "two", "none")}
    assert np.all(bars["one"] == blue, axis=-1).sum() > 1000
    assert not np.all(bars["one"] == orange, axis=-1).any()
    widths = [np.all(bars["two"] == color, axis=-1).any(axis=0).sum() for color in (blue, orange)]
    assert widths[1] > widths[0] * 1.02  # 95 and 90


def records(factor: float) -> list[dict[str, Any]]:
    train: list[dict[str, Any]] = [{"kind": "train", "step": i, "loss": factor / i, "rates": {}} for i in range(1, 9)]
    return [
        *train,
        *({"kind": "eval", "step": i, "score": factor * i / 20} for i in (4, 8)),
        {"step": 9, "score": None},
    ]


def test_runs_make_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records(1.0)))
    image = np.zeros((40, 60, 3), np.uint8)
    scores = {"road": 0.8, "sky": math.nan}
    ids = np.full((40, 60), 1, np.uint8)
    runs = [Run("bn", file, scores), Run("deconv", records(1.5), scores)]
    examples = [Example(image, ids, {"bn": ids, "deconv": ids + 7}), Example(image, None, {"bn": ids})]
    draw.plot_runs(runs, tmp_path / "all.png", examples, title="Sample")
    pixels = opened(tmp_path / "all.png")
    shown = {i: np.all(pixels == labels.TRAIN_COLORS[i], axis=-1).sum() for i in (1, 8)}
    assert shown[1] > 2.9 * shown[8] > 5000  # label and bn, bn again; deconv once
    drawn: list[Figure] = []
    with monkeypatch.context() as patched:
        patched.setattr(Figure, "savefig", lambda self, data, **_: drawn.append(self) or data.write(b"x"))
        draw.plot_runs(runs, tmp_path / "x.png", examples)
    (legend,) = drawn[0].subfigs[1].legends
    assert [text.get_text() for text in legend.get_texts()] == ["sidewalk", "vegetation"]
    draw.plot_runs([Run("b\udcfc", file, scores)], tmp_path / "x.png")  # a name that is no text
    odd = LabelTable("odd", (Label(0, "b", (0, 0, 0), 0), Label(1, "a $x^{2$", (1, 2, 3), 1)))
    draw.plot_runs(runs, tmp_path / "x.png", examples[1:], table=odd)  # a name with dollar signs is no formula
    void = Example(image, np.full((40, 60), labels.IGNORE, np.uint8), {})
    draw.plot_runs(runs, tmp_path / "x.png", [void])  # without a class to name
    (tmp_path / "x.png").unlink()
    draw.plot_runs([Run("bn", [])], tmp_path / "bare.png")
    assert opened(tmp_path / "bare.png").shape[0] < pixels.shape[0]
    with pytest.raises(UserError, match="gone.jsonl: missing or without records"):
        draw.plot_runs([Run("bn", tmp_path / "gone.jsonl")], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_plot_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x.png: cannot be written"):
        draw.plot_class_iou({"road": 0.5}, tmp_path / "file/x.png")
    (tmp_path / "there.png").mkdir()
    with pytest.raises(UserError, match="there.png: cannot be written"):
        draw.plot_class_iou({"road": 0.5}, tmp_path / "there.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there.png"]


def test_plots_leave_pyplot_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    draw.plot_class_iou({"road": 0.5}, tmp_path / "x.png")
    assert plt.get_fignums() == before
