"""Cases of damaged and strange input without a failure, and that the fuzzer finds every kind of failure."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.errors import UserError
from engine.video import Reader
from seg.fuzz import run, videos
from seg.fuzz.run import fuzz
from tests.seg import bad_programs
from tools import convert_masks, evaluate, inspect, predict, train

PROGRAMS = {
    "predict": predict.main,
    "evaluate": evaluate.main,
    "train": train.main,
    "inspect": inspect.main,
    "convert_masks": convert_masks.main,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory in which the small network and data set are made once."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("cases, seed", [(60, 1), pytest.param(200, 0, marks=pytest.mark.slow)])
def test_all_cases_end_well(place: Path, cases: int, seed: int) -> None:
    report = fuzz(PROGRAMS, cases, seed, place)
    assert not report.failures, "\n".join(report.failures)
    assert report.cases.total() == cases and set(report.cases) == set(run.KINDS)
    for kind in run.KINDS:
        assert report.right[kind] > 0 and report.refused[kind] > 0, str(report)


def test_every_failure_is_found_and_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [
        "a traceback: IndexError: list index out of range",
        "wrote outside of the output folder: open ",
        "wrote outside of the output folder: open ",
        "started a program: os.system",
        "the error names none of config.yaml",
        "not a resolved config",
        "a hang: no end after 3 s",
        "the process died with status 7",
    ]
    said: list[str] = []

    def say(failure: str) -> None:
        said.append(failure)
        monkeypatch.setenv("BAD_PROGRAMS_TURN", str(len(said)))

    report = fuzz({"train": bad_programs.misbehaves}, len(expected), 0, place, ["configs"], limit=3, say=say)
    assert said == report.failures and len(said) == len(expected) == report.cases["configs"], said
    for number, (failure, text) in enumerate(zip(said, expected, strict=True)):
        kept = place / f"failures/configs-{number}"
        assert text in failure and text in (kept / "what.txt").read_text() and (kept / "in/config.yaml").is_file()
    assert "in hangs" in (place / "failures/configs-6/what.txt").read_text()
    for number in range(len(expected)):
        assert "python tools/train.py '" in (place / f"failures/configs-{number}/what.txt").read_text()
    assert not report.right["configs"] and not report.refused["configs"]


def test_mistakes_in_the_call(place: Path) -> None:
    with pytest.raises(UserError, match="--only: found 'sounds', expected some of images, labels"):
        fuzz(PROGRAMS, 10, 0, place, ["sounds"])
    with pytest.raises(UserError, match="--cases: found 1, expected at least one for each of images, videos"):
        fuzz(PROGRAMS, 1, 0, place, ["images", "videos"])


def test_folders_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures/mine.txt").touch()
    with pytest.raises(UserError, match="holds folders called case or failures that are not of this program"):
        fuzz(PROGRAMS, 10, 0, tmp_path)
    with pytest.raises(UserError, match="--limit: found -1, expected seconds above 0"):
        fuzz(PROGRAMS, 10, 0, tmp_path, limit=-1)
    assert (tmp_path / "failures/mine.txt").exists()


def test_a_damaged_video_gives_the_same_pictures_each_time(tmp_path: Path) -> None:
    """Else its labels would be others in each run; several decoding threads race where its frames lean on lost ones."""
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng([0, sorted(run.KINDS).index("videos"), 0])
    call = videos.make(rng, tmp_path, 1, SimpleNamespace(weights="best.pt"))  # type: ignore[arg-type]
    assert not call.good
    (path,) = (tmp_path / "in").iterdir()
    found = set()
    for _ in range(30):
        with Reader(path) as reader:
            found.add(b"".join(frame.tobytes() for frame in reader))
    assert len(found) == 1
