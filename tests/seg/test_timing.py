"""What the speed tables count and how they take turns; that something is fast is not tested."""

import math
from pathlib import Path

import numpy as np
import pytest

from engine.config import load
from seg import timing
from seg.config import SegConfig
from seg.evaluate import evaluate_folder
from seg.timing import Row, Timed, computed_pixels, in_turn, render_split, windows
from tools import benchmark_seg as program

CONFIG = """
task: seg
length: 1 step
batch_size: 2
data: {crop: [64, 64]}
model: {name: lraspp_mobilenet_v3_large, output_stride: 16}
runtime: {workers: 0, device: cpu, threads: 1}
"""


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return render_split(tmp_path_factory.mktemp("split"), 2, size=(64, 128))


def test_turns_are_taken_and_the_median_counts(monkeypatch: pytest.MonkeyPatch):
    clock, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    seconds = {"a": iter([9.0, 1.0, 2.0, 30.0]), "b": iter([9.0, 4.0, 4.0, 4.0])}

    def work(name: str) -> None:
        order.append(name)
        clock[0] += next(seconds[name])

    def before() -> None:
        clock[0] += 100

    assert in_turn([Timed(lambda: work("a"), before), Timed(lambda: work("b"))], 3) == [2.0, 4.0]
    assert order == ["a", "b"] * 4


def test_rendered_predictions_are_fair(split: tuple[Path, Path]):
    scores = evaluate_folder(*split)
    assert scores.images == 2 and 0.5 < scores.pixel_accuracy < 0.97
    assert not math.isnan(scores.mean_iiou), "with instance ids"


def test_both_scorers_see_the_same_files(split: tuple[Path, Path]):
    run, _ = timing._official(*split)
    assert run()["averageScoreClasses"] == pytest.approx(evaluate_folder(*split).mean_iou, abs=1e-12)
    rows = timing.scorer(*split, rounds=1)
    assert all(row.value > 0 and row.other.startswith("cityscapesscripts, ") for row in rows)
    assert rows[0].other_value == rows[1].other_value


@pytest.mark.parametrize("overlap", [0.0, 0.25, 1 / 3, 0.5, 0.75])
@pytest.mark.parametrize("window", [(32, 64), (96, 96), (64, 160)])
def test_no_window_more_than_the_overlap_asks_for(window: tuple[int, int], overlap: float):
    """One window fewer on either side would leave less overlap than was asked for."""
    size = (192, 416)
    counts = []
    for length, side in zip(size, window, strict=True):
        step = max(1, math.floor(side * (1 - overlap)))
        counts.append(next(n for n in range(1, 999) if side + (n - 1) * step >= length))
    assert computed_pixels(window, overlap, size) == counts[0] * counts[1] * window[0] * window[1]


def test_pixels_are_told_beside_those_of_the_overlap():
    (whole, parts) = windows([(None, 0.0), ((64, 64), 0.5)], size=(128, 256))
    assert (whole.value, whole.other_value) == (1.0, 1.0)
    assert parts.value == 3 * 7 * 64 * 64 / (128 * 256) and parts.other_value == 4.0
    assert parts.what == "windows 64 x 64, overlap 0.5"


def test_the_input_and_the_step_of_a_config(tmp_path: Path, sample_root: Path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    cfg = load(tmp_path / "tiny.yaml", [f"data.root={sample_root}"], SegConfig).config
    (row,), stages = timing.loader(cfg, rounds=1)
    assert (row.what, row.other) == ("input, 0 workers", "training step on cpu")
    assert row.value > 0 and row.other_value > 0 and row.ratio == row.value / row.other_value
    assert all(seconds > 0 for seconds in stages)


def test_the_program_prints_a_table(
    tmp_path: Path, sample_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    monkeypatch.setattr(timing, "render_split", lambda folder, images: render_split(folder, images, size=(64, 128)))
    arguments = [str(tmp_path / "tiny.yaml"), f"data.root={sample_root}", "--rounds", "1", "--images", "1"]
    assert program.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].split(",")[0] for line in lines[1:]] == [
        "whole image",
        *["windows 512 x 1024", "windows 769 x 769", "windows 769 x 769", "windows 512 x 512"],
        *["scorer", "scorer", "input", "input"],
    ]
    assert "decode" in lines[-1] and "augment" in lines[-1] and "collate" in lines[-1]


def test_lines_are_aligned():
    text = timing.text([Row("a", 1.0, "b", 2.0, "x/s"), Row("longer", 123.456, "other", 2.0, "x/s")])
    lines = text.splitlines()
    assert lines[2].split() == ["longer", "123.46", "other", "2.00", "61.73", "x/s"]
    assert len({line.index("x/s") for line in lines[1:]}) == 1
    assert np.allclose([float(line.split()[-2]) for line in lines[1:]], [0.5, 61.73])


def test_data_that_are_missing_are_told_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "scorer", lambda *_: pytest.fail("timed"))
    assert program.main(["configs/seg/sample.yaml", f"data.root={tmp_path}", "--images", "1"]) == 2
    assert "has no folder leftImg8bit/" in capsys.readouterr().err
