"""Runs of classification side by side: the table, the picture, and which runs go together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from classify.compare import compare
from engine.errors import UserError
from tools import compare as tool


def write(folder: Path, factor: float, classes: int = 3, speed: float = 100.0, task: str = "classify") -> Path:
    """A run of 8 steps of 50 images with two evaluations."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"task: {task}\nbatch_size: 50\n")
    rows: list[dict[str, Any]] = []
    for step in range(1, 9):
        parts = {"top1": factor * step / 10}
        rows.append({"kind": "train", "step": step, "loss": 1 / step, "parts": parts, "images_per_second": speed})
        if step % 4 == 0:
            accuracies = {f"accuracy/class {i}": factor * step / 10 for i in range(classes)}
            top1 = factor * (step if step == 4 else 3) / 10
            rows.append(
                {
                    "kind": "eval",
                    "step": step,
                    "epoch": step / 4,
                    "score": top1,
                    "scalars": {"top1": top1, **accuracies},
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, data, **_: found.append(self) or data.write(b"x"))
    return found


def test_the_table_and_the_picture(tmp_path: Path, kept: list[Figure]):
    runs = [write(tmp_path / "bn", 1.0), write(tmp_path / "nd", 1.5, speed=20.0)]
    text = compare(runs, ["bn", "deconvolution"], tmp_path / "c.png")
    lines = text.splitlines()
    assert lines[1].split() == ["bn", "40.00%", "4", "30.00%", "4", "s"]
    assert lines[2].split() == ["deconvolution", "60.00%", "4", "45.00%", "20", "s"]
    assert len({len(line) for line in lines[:3]}) == 1 and lines[3] == f"drawn in {tmp_path / 'c.png'}"
    metrics = runs[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"score": 0.45', '"score": null'))
    lines = compare(runs, ["bn", "deconvolution"], tmp_path / "c.png").splitlines()
    assert lines[2].split() == ["deconvolution", "60.00%", "4", "not", "finite", "20", "s"]
    axes = {one.get_title().partition("\n")[0]: one for one in kept[0].axes}
    assert set(axes) == {
        "Top-1 accuracy on the validation split",
        "The same over training time",
        "Training loss",
        "Class accuracy, %",
    }
    clock = axes["The same over training time"]
    assert clock.get_xlabel() == "training time, s"
    scored = [list(line.get_xdata()) for line in clock.lines if len(line.get_xdata()) == 2]
    assert scored == [pytest.approx([2, 4]), pytest.approx([10, 20])] and len(clock.lines) == 4
    bars = axes["Class accuracy, %"].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([40] * 3 + [60] * 3)  # of the best evaluations
    steps = axes["Top-1 accuracy on the validation split"]
    assert [list(line.get_ydata()) for line in steps.lines if len(line.get_xdata()) == 2] == [
        pytest.approx([40, 30]),
        pytest.approx([60, 45]),
    ]


@pytest.mark.parametrize(("speed", "unit"), [(1.0, "min"), (0.01, "h")])
def test_long_trainings_are_told_in_minutes_or_hours(tmp_path: Path, kept: list[Figure], speed: float, unit: str):
    compare([write(tmp_path / "a", 1.0, speed=speed)], ["a"], tmp_path / "c.png")
    assert [one for one in kept[0].axes if one.get_xlabel() == f"training time, {unit}"]


@pytest.mark.parametrize(("classes", "drawn"), [(20, True), (21, False), (0, False)])
def test_bars_for_few_classes_only(tmp_path: Path, kept: list[Figure], classes: int, drawn: bool):
    compare([write(tmp_path / "a", 1.0, classes)], ["a"], tmp_path / "c.png")
    assert any(one.get_title() == "Class accuracy, %" for one in kept[0].axes) is drawn


def test_a_run_without_speeds_has_no_time(tmp_path: Path):
    run = write(tmp_path / "a", 1.0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["kind"] == "eval"))
    assert compare([run], ["a"], tmp_path / "c.png").splitlines()[1].endswith("-")
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_mistakes(tmp_path: Path):
    run = write(tmp_path / "a", 1.0)
    with pytest.raises(UserError, match="two runs are called the same, a, a; give each a name with --names"):
        compare([run, run], ["a", "a"], tmp_path / "c.png")
    with pytest.raises(UserError, match="none: no evaluation in"):
        compare([tmp_path / "none"], ["a"], tmp_path / "c.png")


def start(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    return tool.main()


def test_the_program_tells_the_task_from_the_runs(tmp_path: Path, monkeypatch, capsys):
    runs = [write(tmp_path / "bn", 1.0), write(tmp_path / "nd", 1.5)]
    assert start(monkeypatch, *runs, "--out", tmp_path / "c.png") == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:3]] == [
        ["bn", "40.00%"],
        ["nd", "60.00%"],
    ]
    other = write(tmp_path / "other", 1.0, task="seg")
    assert start(monkeypatch, *runs, other, "--out", tmp_path / "c.png") == 2
    assert f"{other}: seg); compare runs of one task" in capsys.readouterr().err
    assert start(monkeypatch, write(tmp_path / "p", 1.0, task="paint"), "--out", tmp_path / "c.png") == 2
    assert "a run of the task 'paint', expected 'seg' or 'classify'" in capsys.readouterr().err
    assert start(monkeypatch, tmp_path / "none", "--out", tmp_path / "c.png") == 2
    assert "none: no run in this folder" in capsys.readouterr().err


def test_a_run_that_is_named_by_dots_has_its_folders_name(tmp_path: Path, monkeypatch, capsys):
    folder = write(tmp_path / "bn", 1.0) / "deep"
    folder.mkdir()
    for here, run in ((tmp_path / "bn", "."), (folder, "..")):
        monkeypatch.chdir(here)
        assert start(monkeypatch, run, "--out", tmp_path / "c.png") == 0
        assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["bn", "40.00%"]
    (tmp_path / "link").symlink_to(tmp_path / "bn")
    assert tool.names_of([tmp_path / "link", Path("..")]) == ["link", "bn"]


def test_folders_of_one_name_are_two_runs_but_by_names_seeds(tmp_path: Path, monkeypatch, capsys):
    runs = [write(tmp_path / "a/run", 1.0), write(tmp_path / "b/run", 1.5)]
    assert start(monkeypatch, *runs, "--out", tmp_path / "c.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [[str(runs[0]), "40.00%"], [str(runs[1]), "60.00%"]]
    assert start(monkeypatch, *runs, "--out", tmp_path / "c.png", "--names", "x", "x") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["x", "2"]


def test_options_that_would_do_nothing_are_refused(tmp_path: Path, monkeypatch, capsys):
    run = write(tmp_path / "bn", 1.0)
    for option in (["--examples", "1"], ["--set", "data.root=x"], ["--allow-imports"]):
        with pytest.raises(SystemExit):
            start(monkeypatch, run, "--out", tmp_path / "c.png", *option)
        assert "go with segmentation runs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start(monkeypatch, run, "--out", tmp_path / "c.png", "--examples", -1)
    assert "--examples: -1; expected 0 or more" in capsys.readouterr().err
