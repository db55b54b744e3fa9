"""Plots that know no task: what is drawn where, and that large ones stay readable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from engine import plots
from engine.errors import UserError


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn while a test runs."""
    found: list[Figure] = []
    real = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        found.append(self)
        real(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def rows(factor: float) -> list[dict[str, Any]]:
    train = [{"kind": "train", "step": i, "epoch": i / 4, "loss": factor / i} for i in range(1, 9)]
    return [*train, *({"kind": "eval", "step": i, "epoch": i / 4, "score": factor * i / 20} for i in (4, 8))]


def test_curves_of_several_runs(tmp_path: Path, kept: list[Figure]):
    with plots.figure(tmp_path / "c.png", (8, 4)) as drawn:
        score, loss = drawn.subplots(1, 2)
        plots.curves(score, loss, [("bn", rows(1.0)), ("deconv", rows(1.5)), ("", rows(0.5))], "Accuracy")
    assert score.get_title() == "Accuracy" and score.get_xlabel() == loss.get_xlabel() == "step"
    assert [list(line.get_ydata()) for line in score.lines] == [[20, 40], [30, 60], [10, 20]]
    assert [text.get_text() for text in score.get_legend().get_texts()] == ["bn, best 40.0", "deconv, best 60.0"]
    assert list(loss.lines[1].get_xdata()) == list(range(1, 9)) and score.get_xlim()[0] == score.get_ylim()[0] == 0
    assert len({line.get_color() for line in score.lines}) == 3
    assert len(kept) == 1 and opened(tmp_path / "c.png").shape == (480, 960, 3)


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_are_drawn_without_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with plots.figure(tmp_path / "b.png", (4, 3)) as drawn:
        plots.bars(drawn.add_subplot(), {"a": {"\u2312": 0.5, "\U000105a9": 0.4}}, ["\u2312", "\U000105a9"], "")
    assert all(line.startswith("note: no installed font has") for line in capsys.readouterr().err.splitlines())


def test_many_runs_have_a_colour_each():
    assert plots.cycle(6)[:2] == plots.cycle(2)
    for count in (6, 7, 20, 200):
        assert len(set(plots.cycle(count))) == count


def test_curves_over_another_key_leave_out_rows_without_it(tmp_path: Path):
    found = [{"step": 1, "score": 0.1}, {"step": 2, "time": 5.0, "score": 0.2}, {"time": 7.0, "score": math.nan}]
    with plots.figure(tmp_path / "c.png", (4, 4)) as drawn:
        axes = drawn.subplots()
        plots.curves(axes, None, [("a", found)], "T", x="time", xlabel="time, s", colors=["red"], best=False)
    assert list(axes.lines[0].get_xdata()) == [5.0] and axes.get_xlabel() == "time, s"
    assert axes.get_legend().get_texts()[0].get_text() == "a" and axes.lines[0].get_color() == "red"


def test_a_loss_of_one_point_is_seen(tmp_path: Path):
    with plots.figure(tmp_path / "c.png", (4, 4)) as drawn:
        axes = drawn.subplots()
        plots.curves(None, axes, [("a", [{"step": 3, "loss": 2.0}])], "")
    assert axes.lines[0].get_marker() == "o"


def test_names_that_begin_with_an_underscore_are_in_the_legends(tmp_path: Path):
    with plots.figure(tmp_path / "c.png", (8, 4)) as drawn:
        score, loss, classes = drawn.subplots(1, 3)
        plots.curves(score, loss, [("_one", rows(1.0)), ("two", rows(1.5))], "Accuracy")
        plots.bars(classes, {"_one": {"cat": 0.5}, "two": {"cat": 0.7}}, ["cat"], "B")
        legends = [axes.get_legend() for axes in (score, loss, classes)]
    for legend, count in zip(legends, (2, 2, 2), strict=True):
        words = [text.get_text().strip() for text in legend.get_texts()]
        assert len(words) == count and words[0].startswith("_one") and words[1].startswith("two")


def test_bars_name_their_mean_and_what_has_no_score(tmp_path: Path):
    with plots.figure(tmp_path / "b.png", (6, 3)) as drawn:
        axes = drawn.subplots()
        plots.bars(axes, {"one": {"cat": 0.5, "dog": 0.7}, "two": {"cat": math.nan, "dog": None}}, ["cat", "dog"], "B")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one: mean 60.0", "two: no scores"]
    assert [text.get_text() for text in axes.texts] == ["50.0", "70.0", "–", "–"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([50, 70, 0, 0])


@pytest.mark.parametrize(("count", "numbers", "names"), [(3, 3, True), (40, 40, True), (41, 0, True), (121, 0, False)])
def test_a_confusion_matrix_of_many_classes_stays_readable(
    tmp_path: Path, kept: list[Figure], count: int, numbers: int, names: bool
):
    plots.plot_confusion(np.eye(count, dtype=int) * 7, [f"name {i}" for i in range(count)], tmp_path / "c.png")
    axes = kept[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["100"] * numbers
    assert (axes.get_xticklabels()[1].get_text() == "name 1") is names
    assert axes.get_title() == "Confusion, % of the true class" and kept[0].get_figwidth() < 19
    labels = axes.get_yticklabels()
    if names:  # none is over the next one
        boxes = [label.get_window_extent() for label in labels]
        assert all(a.y0 >= b.y1 - 1 for a, b in zip(boxes, boxes[1:], strict=False))


def test_a_confusion_matrix_shows_shares_of_the_row(tmp_path: Path, kept: list[Figure]):
    plots.plot_confusion([[3, 1], [0, 0]], ["a", "b"], tmp_path / "c.png", "Mine")
    axes = kept[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["75", "25"] and axes.get_title() == "Mine"
    assert np.ma.is_masked(axes.images[0].get_array()[1])
    with pytest.raises(ValueError, match=r"matrix \(2, 2\) does not go with 1 names"):
        plots.plot_confusion([[3, 1], [0, 0]], ["a"], tmp_path / "c.png")


def test_small_shares_among_many_classes_are_not_lost(tmp_path: Path, kept: list[Figure]):
    matrix = np.eye(60) * 97
    matrix[0, 1] = 3
    plots.plot_confusion(matrix, ["x"] * 60, tmp_path / "c.png")
    assert kept[0].axes[0].images[0].norm(0.03) > 0.15


def test_a_picture_of_an_unknown_kind_or_place_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"x.doc: cannot draw a .doc file; choose .png, .pdf or .svg"):
        plots.plot_confusion([[1]], ["a"], tmp_path / "x.doc")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x.png: cannot be written"):
        plots.plot_confusion([[1]], ["a"], tmp_path / "file/x.png")
    plots.plot_confusion([[1]], ["a"], tmp_path / "new/x.svg")
    assert (tmp_path / "new/x.svg").read_text().startswith("<?xml")


def test_records_of_a_file_or_as_they_are(tmp_path: Path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step"')
    assert plots.records(tmp_path / "m.jsonl") == [{"step": 1}] == plots.records([{"step": 1}])
    with pytest.raises(UserError, match="gone.jsonl: missing or without records"):
        plots.records(tmp_path / "gone.jsonl")


def test_names_with_dollar_signs_are_no_formulas(tmp_path: Path, kept: list[Figure]):
    name = "a $x^{2$ b"
    with plots.figure(tmp_path / "bars.png", (6, 3)) as drawn:
        plots.bars(drawn.add_subplot(), {name: {name: 0.5}, "b": {name: 0.25}}, [name], name)
    with plots.figure(tmp_path / "curves.png", (6, 3)) as drawn:
        plots.curves(drawn.add_subplot(), None, [(name, rows(1))], name)
    plots.plot_confusion(np.eye(2), [name, "b"], tmp_path / "confusion.png")
    assert [figure.axes[0].get_title() for figure in kept][:2] == [name, name]
    assert kept[2].axes[0].get_xticklabels()[0].get_text() == name
