from __future__ import annotations

import io
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from engine.config import ReportConfig
from engine.errors import UserError
from engine.report import Evaluation, Log, read_metrics

QUIET = ReportConfig(tensorboard=False)


def run(folder: Path, cfg: ReportConfig = QUIET, **more: Any) -> str:
    stream = io.StringIO()
    with Log(folder, cfg, stream=stream, **more) as log:
        log.begin(total_steps=1000, steps_per_epoch=100, images_per_step=8)
        for step in range(20, 101, 20):
            log.train(step, 2.5 - step / 100, {"main": 2.0, "aux": 0.5}, {"backbone": 0.01, "head": 0.1})
        image = np.zeros((4, 6, 3), np.uint8)
        found = Evaluation(
            0.4321, {"IoU/road": 0.9, "IoU/train": math.nan}, {"first": image}, "class  IoU\nroad   0.9\n"
        )
        log.evaluation(100, found, seconds=1.25, best=True)
        log.curves()
    return stream.getvalue()


def test_progress_line(tmp_path: Path) -> None:
    lines = run(tmp_path).splitlines()
    assert lines[0].startswith("step   20/1000  epoch 0.20  ")
    words = ["", *lines[0].removeprefix("step   20/1000  ").split("  ")]
    assert words[1:5] == ["epoch 0.20", "loss 2.3000 (main 2.0000 aux 0.5000)", "lr backbone 0.01", "lr head 0.1"]
    assert words[5].endswith(" img/s") and words[6].endswith(" GiB") and words[7].startswith("left 0:00:0")
    assert lines[5:] == ["class  IoU", "road   0.9", "evaluated after step 100: score 0.4321  (best so far)  in 1.2 s"]


def test_a_share_is_printed_in_percent(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(tmp_path, QUIET, stream=stream) as log:
        log.begin(total_steps=10, steps_per_epoch=10, images_per_step=8)
        log.evaluation(5, Evaluation(0.43214, measure="mIoU"), seconds=1.25, best=False)
        log.curves()
    assert stream.getvalue() == "evaluated after step 5: mIoU 43.21 %  in 1.2 s\n"
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["score"], row["measure"]) == (0.43214, "mIoU")
    assert (tmp_path / "curves.png").is_file()


def test_single_part_and_rate_are_not_repeated(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Log(tmp_path, QUIET, stream=stream) as log:
        log.begin(total_steps=10, steps_per_epoch=10, images_per_step=8)
        log.train(5, 1.0, {"main": 1.0}, {"lr": 0.1})
    assert stream.getvalue().startswith("step  5/10  epoch 0.50  loss 1.0000  lr 0.1  ")


def test_throughput_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    with Log(tmp_path, QUIET, stream=stream) as log:
        log.begin(total_steps=100, steps_per_epoch=10, images_per_step=8)
        clock[0] = 3.0
        with log.pause():
            clock[0] = 5.0
        log.train(10, 1.0, {}, {"lr": 0.1})
    line = stream.getvalue()
    assert "  26.7 img/s  " in line  # 80 images in the 3 s that were not paused
    assert line.endswith("left 0:00:45\n")  # but pauses will come again: 90 steps at 0.5 s


def test_metrics_are_json_without_nan(tmp_path: Path) -> None:
    run(tmp_path)
    rows = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [20, 40, 60, 80, 100, 100]
    assert rows[0]["rates"] == {"backbone": 0.01, "head": 0.1} and rows[0]["images_per_second"] > 0
    assert rows[-1]["scalars"] == {"IoU/road": 0.9, "IoU/train": None}


def test_resume_drops_what_is_done_again(tmp_path: Path) -> None:
    run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')  # cut off by a crash
    with Log(tmp_path, QUIET, resume={"step": 60, "score": None}) as log:
        log.begin(total_steps=1000, steps_per_epoch=100, images_per_step=8)
        log.train(80, 1.0, {}, {"lr": 0.1})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [20, 40, 60, 80]
    with Log(tmp_path, QUIET):
        pass
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_resumed_run_knows_what_its_last_start_had_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the speed of the steps since the resume would stand for all since the last row."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    sizes = {"total_steps": 1000, "steps_per_epoch": 100, "images_per_step": 8}
    with Log(tmp_path, QUIET, stream=io.StringIO()) as log:
        log.begin(**sizes)
        now[0] += 20
        log.train(20, 1.0, {}, {"lr": 0.1})
        now[0] += 15
        with log.pause():
            now[0] += 1000
        elapsed = log.elapsed(35)
    assert elapsed == {"steps": 15, "seconds": 15.0}
    now[0] += 9999
    with Log(tmp_path, QUIET, resume={"step": 35, "score": None, "elapsed": elapsed}, stream=io.StringIO()) as log:
        log.begin(**sizes)
        now[0] += 9
        log.train(40, 1.0, {}, {"lr": 0.1})
    speeds = [row["images_per_second"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert speeds == pytest.approx([8, 8 * 20 / 24])


def test_tensorboard_has_an_evaluation_once_that_a_kill_made_come_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume in (None, {"step": 4, "score": None}, {"step": 4, "score": 0.5}):
        with Log(tmp_path, ReportConfig(), resume=resume, stream=io.StringIO()) as log:
            log.begin(total_steps=10, steps_per_epoch=10, images_per_step=8)
            if resume is None:
                log.train(4, 1.5, {"main": 1.5}, {"lr": 0.1})
            if resume is None or resume["score"] is None:
                log.evaluation(4, Evaluation(0.5), seconds=1, best=True)
            log.train(5, 1.0, {"main": 1.0}, {"lr": 0.1})
        time.sleep(1.1)  # files are read in the order of the seconds in their names
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [one.step for one in events.Scalars("score")] == [4]
    assert [(one.step, one.value) for one in events.Scalars("loss/main")] == [(4, 1.5), (5, 1.0)]
    assert [one.step for one in events.Scalars("rate/lr")] == [4, 5]


def test_tensorboard_forgets_what_a_run_without_a_checkpoint_wrote(tmp_path: Path) -> None:
    """As metrics.jsonl does: else a run that was killed and starts anew is drawn twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((1, 2, 3), (1, 2)):
        with Log(tmp_path, ReportConfig(), stream=io.StringIO()) as log:
            log.begin(total_steps=10, steps_per_epoch=10, images_per_step=8)
            for step in steps:
                log.train(step, 1.0, {"main": 1.0}, {"lr": 0.1})
        time.sleep(1.1)  # files are read in the order of the seconds in their names
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [one.step for one in events.Scalars("loss/total")] == [1, 2]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, ReportConfig())
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    expected = {"loss/total", "loss/main", "loss/aux", "rate/backbone", "rate/head", "score", "IoU/road", "IoU/train"}
    assert expected | {"speed/images_per_second", "memory/peak_GiB"} == set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["images/first"]
    assert [one.step for one in events.Scalars("loss/total")] == [20, 40, 60, 80, 100]
    assert events.Scalars("score")[0].value == pytest.approx(0.4321)


def test_tensorboard_takes_pictures_of_names_that_are_no_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name = os.fsdecode(b"stra\xdfe")
    with Log(tmp_path, ReportConfig(), stream=io.StringIO()) as log:
        log.begin(total_steps=10, steps_per_epoch=10, images_per_step=1)
        log.evaluation(1, Evaluation(0.5, {}, {name: np.zeros((4, 4, 3), np.uint8)}), seconds=1, best=True)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [one.startswith("images/stra") for one in events.Tags()["images"]] == [True]


def test_curves(tmp_path: Path) -> None:
    run(tmp_path)
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 1000
    assert float(np.std(picture[..., :3])) > 0.02


def test_a_folder_whose_name_looks_like_a_formula(tmp_path: Path) -> None:
    run(tmp_path / r"q$\x$")
    assert (tmp_path / r"q$\x$" / "curves.png").stat().st_size > 10_000


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"b\xfc")
    run(place)
    assert imread(place / "curves.png").any()
    with pytest.raises(UserError, match=r"TensorBoard writes into no folder whose name is not UTF-8; .*=false"):
        Log(place, ReportConfig(), stream=io.StringIO())


def test_no_rows_no_curves(tmp_path: Path) -> None:
    with Log(tmp_path, QUIET) as log:
        log.curves()
    assert not (tmp_path / "curves.png").exists()


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.distributed.is_main", lambda: False)
    assert run(tmp_path / "x", ReportConfig()) == ""
    assert not (tmp_path / "x").exists()


def test_work_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/x: cannot write the work directory: Not a directory"):
        Log(tmp_path / "file" / "x", QUIET)
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(UserError, match=r"curves.png: cannot write: Is a directory"):
        run(tmp_path)


def test_an_output_that_nobody_reads_does_not_end_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream, Log(tmp_path, QUIET, stream=stream) as log:
        log.begin(total_steps=10, steps_per_epoch=10, images_per_step=8)
        for step in (1, 2):
            log.train(step, 1.0, {"main": 1.0}, {"lr": 0.1})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "cannot print any more (Broken pipe)" in told and "metrics.jsonl" in told
