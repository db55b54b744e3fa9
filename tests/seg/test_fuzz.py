"""200 cases of damaged and strange input without a failure, and that the fuzzer finds every kind of failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import UserError
from seg.fuzz import run
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


def test_two_hundred_cases_end_well(tmp_path: Path) -> None:
    report = fuzz(PROGRAMS, 200, 0, tmp_path / "fuzz")
    assert not report.failures, "\n".join(report.failures)
    assert report.cases.total() == 200 and set(report.cases) == set(run.KINDS)
    for kind in run.KINDS:
        assert report.right[kind] > 0 and report.refused[kind] > 0, str(report)


@pytest.mark.parametrize(
    ("program", "text"),
    [
        (bad_programs.breaks, "a traceback: IndexError: list index out of range"),
        (bad_programs.hangs, "a hang: no end after 1 s"),
        (bad_programs.dies, "the process died with status 7"),
        (bad_programs.writes_beside, "wrote outside of the output folder: open "),
        (bad_programs.writes_elsewhere, "wrote outside of the output folder: open "),
        (bad_programs.runs_code, "started a program: os.system"),
        (bad_programs.says_nothing, "the error names none of config.yaml"),
        (bad_programs.does_nothing, "not a resolved config"),
    ],
)
def test_every_failure_is_found_and_kept(
    ground: Path, program: Callable[[], int], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    limit = 1 if program is bad_programs.hangs else 60
    report = fuzz({"train": program}, 1, 0, ground, ["configs"], limit=limit, say=said.append)
    assert len(report.failures) == 1 and text in report.failures[0] and said == report.failures
    kept = ground / "failures/configs-0"
    assert (kept / "in/config.yaml").is_file() and text in (kept / "what.txt").read_text()
    assert not report.right["configs"] and not report.refused["configs"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory in which the small network and data set are made once."""
    return tmp_path_factory.mktemp("ground")


def test_mistakes_in_the_call(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--only: found 'sounds', expected some of images, labels"):
        fuzz(PROGRAMS, 10, 0, tmp_path, ["sounds"])
    with pytest.raises(UserError, match="--cases: found 1, expected at least one for each of images, videos"):
        fuzz(PROGRAMS, 1, 0, tmp_path, ["images", "videos"])
