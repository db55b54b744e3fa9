"""What is read back from a work directory: configuration, evaluations, training time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import checkpoint, runs
from engine.errors import UserError


def write(folder: Path, rows: list[dict[str, Any]], config: str | None = "task: toy\nbatch_size: 10\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def train(step: int, speed: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1.0, "images_per_second": speed}


def score(step: int, value: float | None) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "score": value, "scalars": {}}


def test_the_config_comes_from_its_file_or_from_a_checkpoint(tmp_path: Path):
    run = write(tmp_path / "run", [])
    assert runs.config(run) == {"task": "toy", "batch_size": 10}
    (run / "config.yaml").unlink()
    state: dict[str, Any] = dict.fromkeys(checkpoint.KEYS)
    checkpoint.save(run / "last.pt", {**state, "format": 1, "config": {"task": "old", "batch_size": 3}})
    assert runs.config(run)["task"] == "old"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no run in this folder (no config.yaml, best.pt or last.pt)"),
        ("- 1", "config.yaml: not the resolved config of a run"),
        ("task: toy", "it has no task or no batch_size"),
        ("task: [", "config.yaml: cannot read the config of this run"),
        ("a: !!python/object/apply:os.getcwd []", "config.yaml: cannot read the config of this run"),
    ],
)
def test_a_folder_without_a_sound_config(tmp_path: Path, text: str | None, said: str):
    run = write(tmp_path / "run", [], text)
    with pytest.raises(UserError) as caught:
        runs.config(run)
    assert said in str(caught.value) and str(run) in str(caught.value)


def test_evaluations_without_a_score_are_left_out(tmp_path: Path):
    run = write(tmp_path, [train(1, 1.0), score(2, 0.5), score(4, None), score(6, 0.7), score(8, 0.7)])
    assert [row["step"] for row in runs.evaluations(run)] == [2, 6, 8]
    assert runs.best_evaluation(run)["step"] == 6
    with pytest.raises(UserError, match="no evaluation in .*none/metrics.jsonl"):
        runs.best_evaluation(tmp_path / "none")


def test_time_is_that_of_the_logged_speeds():
    """10 images a step: 4 steps at 20 images/s are 2 s, 4 more at 5 are 8 s."""
    rows = [train(4, 20.0), score(4, 0.1), score(6, 0.2), train(8, 5.0), score(9, 0.3)]
    assert [row["seconds"] for row in runs.timed(rows, 10)] == pytest.approx([2, 2, 6, 10, 12])
    assert "seconds" not in rows[0]


def test_time_is_unknown_without_a_speed():
    assert all("seconds" not in row for row in runs.timed([score(4, 0.1), {"kind": "train", "step": 5}], 10))
    assert runs.timed([], 10) == []


def test_a_resumed_run_takes_no_time_twice():
    """The row of a step that is logged again, or an earlier one, adds nothing."""
    rows = [train(4, 20.0), train(4, 1.0), train(8, 20.0)]
    assert [row["seconds"] for row in runs.timed(rows, 10)] == pytest.approx([2, 2, 4])


def test_runs_that_were_scored_on_other_data_are_told(tmp_path: Path) -> None:
    text = "task: seg\nbatch_size: 2\ndata: {{name: {}, root: {}, val_split: val}}\n"
    a = write(tmp_path / "a", [], text.format("cityscapes", "/data/x"))
    b = write(tmp_path / "b", [], text.format("cityscapes", "/data/x"))
    c = write(tmp_path / "c", [], text.format("kitti", "/data/y"))
    assert runs.other_data([a, b]) == [] == runs.other_data([a])
    (note,) = runs.other_data([a, b, c])
    assert note.startswith(f"note: {a} and {c} name different data to score ")
    assert note.endswith("(data.name: cityscapes and kitti; data.root: /data/x and /data/y)")
