from __future__ import annotations

import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from engine import checkpoint, loading
from engine.checkpoint import KEYS
from engine.config import Loaded
from engine.errors import UserError
from engine.resume import check_data, differences, find_resume, open_work_dir, starts_anew
from tests.engine.toy import ToyConfig, config


def put(folder: Path, cfg: ToyConfig, name: str = "last.pt") -> Path:
    folder.mkdir(exist_ok=True)
    state = {**dict.fromkeys(KEYS), "format": 1, "config": cfg.model_dump(mode="json"), "step": 7}
    checkpoint.save(folder / name, state)
    return folder / name


def test_new_and_empty_folders(tmp_path: Path) -> None:
    assert find_resume(tmp_path / "new", None, config()) is None
    assert find_resume(tmp_path, None, config()) is None
    assert find_resume(tmp_path / "new", "auto", config()) is None


def test_auto_file_and_folder(tmp_path: Path) -> None:
    path = put(tmp_path / "run", config())
    for work_dir, resume in (("run", "auto"), ("run", path), ("run", tmp_path / "run"), ("new", str(path))):
        state = find_resume(tmp_path / work_dir, resume, config())
        assert state is not None and (state["step"], state["path"]) == (7, str(path))
        assert not starts_anew(tmp_path / work_dir, resume)
    for work_dir, how in (("new", "auto"), ("new", None)):
        assert starts_anew(tmp_path / work_dir, how) and find_resume(tmp_path / work_dir, how, config()) is None


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    put(tmp_path, config(), "best.pt")
    with pytest.raises(
        UserError, match=r"holds the checkpoints of a run \(best.pt\); go on with --resume auto, or choose"
    ):
        find_resume(tmp_path, None, config())
    with pytest.raises(
        UserError, match=r"holds best.pt but no last.pt to resume; name a checkpoint with --resume PATH"
    ):
        find_resume(tmp_path, "auto", config())
    other = put(tmp_path / "other", config())
    with pytest.raises(
        UserError, match=r"holds the checkpoints of a run \(best.pt\), and --resume names .*other/last.pt"
    ):
        find_resume(tmp_path, other, config())


def test_scores_whose_checkpoints_are_gone_are_not_overwritten(tmp_path: Path) -> None:
    rows = ['{"kind": "train", "step": 1, "loss": 1.0}\n', '{"kind": "eval", "step": 2, "score": 0.5}\n']
    (tmp_path / "metrics.jsonl").write_text(rows[0])  # killed before its first checkpoint: nothing is lost
    assert find_resume(tmp_path, None, config()) is None and find_resume(tmp_path, "auto", config()) is None
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    for resume in (None, "auto", put(tmp_path / "other", config())):
        with pytest.raises(UserError, match=r"holds the scores of a run \(metrics.jsonl\), which would be overwritten"):
            find_resume(tmp_path, resume, config())
    put(tmp_path, config())
    assert find_resume(tmp_path, "auto", config()) is not None


def on_two(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """As if there were another process, whose part in what is gathered is what `change` makes of this one's."""
    monkeypatch.setattr("engine.distributed.gather", lambda value: [value, change(value)])


@pytest.mark.parametrize("resume", [None, "auto"])
def test_all_processes_go_on_from_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str | None
) -> None:
    """A folder that is not mounted everywhere would average a trained network with a fresh one."""
    loaded = Loaded(config(), {}, "")
    on_two(monkeypatch, lambda value: value)
    with open_work_dir(tmp_path, loaded, resume) as state:
        assert state is None
    put(tmp_path, config())
    with open_work_dir(tmp_path, loaded, "auto") as state:
        assert state is not None
    for other, told in ((None, "no checkpoint"), (3, "one of step 3")):
        on_two(monkeypatch, lambda value, other=other: other)
        with (
            pytest.raises(UserError, match=f"process 0 finds one of step 7 to go on from there, process 1 {told};"),
            open_work_dir(tmp_path, loaded, "auto"),
        ):
            raise AssertionError("it went on")


def test_the_images_are_the_same_everywhere_and_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": loading.digest(3, [b"a", b"b", b"c"]), "val": loading.digest(1, [b"d"])}
    state = {"path": "x/last.pt", "meta": {"data": dict(splits)}}
    for known in (None, state, {**state, "meta": {}}):
        check_data(splits, known)
    other = {**splits, "val": loading.digest(1, [b"e"])}
    assert other["val"] != splits["val"] and other["val"].startswith("1 images, ")
    assert loading.digest(2, [b"ab", b"c"]) != loading.digest(2, [b"a", b"bc"])
    with pytest.raises(UserError, match=r"x/last.pt: was trained with other images: of 'val' it had 1 images, "):
        check_data(other, state)
    check_data({name: f"{one}, 89abcdef" for name, one in splits.items()}, state)  # of before something was added
    with pytest.raises(UserError, match=r"of 'train' it had 3 images, \w+, now there are 3 images, \w{9}, "):
        check_data({name: f"{one}0, 89abcdef" for name, one in splits.items()}, state)
    on_two(monkeypatch, lambda value: {**value, "train": "2 images, 0"})
    with pytest.raises(UserError, match=r"of 'train' process 0 has 3 images, \w+, process 1 2 images, 0 "):
        check_data(splits, None)


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.pt: cannot read the checkpoint: No such file"):
        find_resume(tmp_path, tmp_path / "gone.pt", config())


def test_a_lower_rate_and_less_memory_are_taken_where_that_is_said(tmp_path: Path) -> None:
    path = put(tmp_path, config())
    other = config(optim__lr=0.05, optim__clip_norm=1.0, micro=1)
    told = ["micro_batch: was None, now 1", "optim.lr: was 0.1, now 0.05", "optim.clip_norm: was None, now 1.0"]
    with pytest.raises(
        UserError, match=r"configuration:\n  micro_batch(.|\n)*or accept these with --accept-changes \("
    ):
        find_resume(tmp_path, "auto", other)
    state = find_resume(tmp_path, "auto", other, accept=True)
    assert state is not None and state["path"] == str(path) and state["changed"] == told
    for accept in (False, True):
        with pytest.raises(UserError, match="norm.name: was bn, now deconv") as caught:
            find_resume(tmp_path, "auto", config(optim__lr=0.05, norm__name="deconv"), accept=accept)
        assert "--accept-changes" not in str(caught.value)


def test_another_configuration(tmp_path: Path) -> None:
    path = put(tmp_path, config(norm__name="deconv", norm__block=32))
    with pytest.raises(UserError) as caught:
        find_resume(tmp_path, "auto", config(optim__lr=0.05))
    assert str(caught.value).splitlines() == [
        f"{path}: was trained with another configuration:",
        "  optim.lr: was 0.1, now 0.05",
        "  norm.name: was deconv, now bn",
        "  norm.block: was 32, now not set",
        "  choose another --work-dir, or resume with the same configuration (length, report.*, where the data are and "
        "runtime.* but for runtime.seed may differ)",
    ]


def test_keys_that_came_since_have_their_defaults(tmp_path: Path) -> None:
    stored = config().model_dump(mode="json")
    del stored["optim"]["head_lr_factor"]
    state = {**dict.fromkeys(KEYS), "format": 1, "config": stored, "step": 7}
    checkpoint.save(tmp_path / "last.pt", state)
    assert find_resume(tmp_path, "auto", config()) is not None
    with pytest.raises(UserError, match="optim.head_lr_factor: was 1.0, now 3.0"):
        find_resume(tmp_path, "auto", config(optim__head_lr_factor=3.0))
    state["config"]["optim"]["gone_since"] = 1
    checkpoint.save(tmp_path / "last.pt", state)
    with pytest.raises(UserError, match="optim.gone_since: was 1, now not set"):
        find_resume(tmp_path, "auto", config())


def test_another_course_does_not_overwrite_a_later_best(tmp_path: Path) -> None:
    put(tmp_path, config())
    early = put(tmp_path, config(), "step-00000003.pt")
    later = checkpoint.load(put(tmp_path, config(), "best.pt"))
    checkpoint.save(tmp_path / "best.pt", {**later, "step": 9})
    with pytest.raises(UserError, match=r"step-00000003.pt: is of step 7, and .*best.pt of step 9, which another"):
        find_resume(tmp_path, early, config())
    assert find_resume(tmp_path / "new", early, config()) is not None
    assert find_resume(tmp_path, "auto", config()) is not None
    assert find_resume(tmp_path, tmp_path / "best.pt", config()) is not None
    checkpoint.save(tmp_path / "best.pt", {**later, "step": 7})
    assert find_resume(tmp_path, early, config()) is not None
    checkpoint.save(tmp_path / "last.pt", {**later, "step": 8})
    for name in ("best.pt", "step-00000003.pt"):
        with pytest.raises(UserError, match=rf"{name}: is of step 7, and .*last.pt of step 8, which another"):
            find_resume(tmp_path, tmp_path / name, config())
    assert find_resume(tmp_path / "new", tmp_path / "best.pt", config()) is not None


def test_the_error_names_no_key_that_it_refuses(tmp_path: Path) -> None:
    put(tmp_path, config())
    with pytest.raises(UserError, match=r"runtime.seed: was 0, now 1(.|\n)*runtime.\* but for runtime.seed may differ"):
        find_resume(tmp_path, "auto", config(runtime__seed=1))


def test_what_may_differ(tmp_path: Path) -> None:
    put(tmp_path, config(steps=10))
    other = config(steps=20, runtime__compile=True, report__images=1, recipes={"gn": {"groups": 4}})
    assert find_resume(tmp_path, "auto", other) is not None
    then, now = config().model_dump(mode="json"), config(runtime__seed=1).model_dump(mode="json")
    assert differences(then, now) == ["runtime.seed: was 0, now 1"]
    then = {"data": {"download": True, "check_files": True, "name": "a"}}
    now = {"data": {"download": False, "check_files": False, "name": "b"}}
    assert differences(then, now) == ["data.name: was a, now b"]


def opened(folder: Path, resume: str | None = None) -> AbstractContextManager[Any]:
    return open_work_dir(folder, Loaded(config(), {}, "task: toy\n"), resume)


def test_open_work_dir_writes_the_configuration(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "b") as state:
        assert state is None
    assert (tmp_path / "a" / "b" / "config.yaml").read_text() == "task: toy\n"
    assert sorted(one.name for one in (tmp_path / "a" / "b").iterdir()) == [".lock", "config.yaml"]


def test_work_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"file/x: cannot write the work directory: Not a directory; choose another --work"
    ):
        opened(tmp_path / "file" / "x").__enter__()
    (tmp_path / "run" / "config.yaml").mkdir(parents=True)  # even root cannot write a file over a folder
    with pytest.raises(UserError, match=r"run: cannot write the work directory: Is a directory; choose another --work"):
        opened(tmp_path / "run").__enter__()


HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from engine.config import Loaded
from engine.resume import open_work_dir
from tests.engine.toy import config
with open_work_dir(Path({folder!r}), Loaded(config(), {{}}, ""), None):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_directory_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    code = HOLD.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path))
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(
            UserError,
            match=rf"another run works in this directory \(process {first.pid} on \S+, since 20.*\); wait for",
        ):
            opened(tmp_path, "auto").__enter__()
    finally:
        first.kill()  # so that it cannot tidy up
        first.wait()
    with opened(tmp_path, "auto"):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
