"""A few kills; `tools/killtest.py` by hand does all cases."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import checkpoint, killtest
from engine.checkpoint import KEYS
from engine.errors import UserError
from engine.killtest import Case, Found

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/killtest.py"), "--out", str(tmp_path / "out"), "--kills", "2"]
    command += ["--cases", "classify-deconv_fast-1p-0w", "runtime.deterministic=true"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^1 cases, [12] kills, .* in a write: none with a difference$", done.stdout, re.MULTILINE)


def test_what_cases_differ_in_cannot_be_set() -> None:
    killtest.check(["runtime.deterministic=true", "runtime.seed=3"])
    for key in ("norm.name=gn", "runtime={workers: 1}", "report.checkpoint_every=4 steps"):
        with pytest.raises(UserError, match="cannot be set"):
            killtest.check([key])


def test_a_temporary_checkpoint_counts_for_the_kill_that_left_it(tmp_path: Path) -> None:
    before = killtest._unfinished(tmp_path / "none")
    (tmp_path / ".best.pt.tmp").write_bytes(b"half")
    after = killtest._unfinished(tmp_path)
    assert after - before and not killtest._unfinished(tmp_path) - after
    os.utime(tmp_path / ".best.pt.tmp", (1, 1))
    assert killtest._unfinished(tmp_path) - after


def write(folder: Path, losses: list[float], **more: Any) -> None:
    folder.mkdir(parents=True)
    rows = [f'{{"kind": "train", "step": {i + 1}, "loss": {loss}}}\n' for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(rows))
    for name in ("last.pt", "best.pt"):
        checkpoint.save(folder / name, {**dict.fromkeys(KEYS), "format": 1, "step": len(losses), **more})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        (
            {"score": 0.5},
            ["last.pt differs in 1 places, such as .score", "best.pt differs in 1 places, such as .score"],
        ),
        ({"losses": [3, 2, 1]}, ["metrics.jsonl differs from row 2 on (3 rows, 3 in the killed run)"]),
        ({"losses": [3, 1, 1], "steps": 2}, ["metrics.jsonl differs from row 3 on (3 rows, 2 in the killed run)"]),
    ],
)
def test_differences_are_found(tmp_path: Path, change: dict[str, Any], told: list[str]) -> None:
    write(tmp_path / "whole", [3, 1, 1])
    steps = change.pop("steps", 3)
    write(tmp_path / "killed", change.pop("losses", [3, 1, 1])[:steps], **{"step": 3, **change})
    assert killtest._differences(tmp_path / "whole", tmp_path / "killed") == told


def test_a_checkpoint_that_does_not_load_or_is_too_old_is_found(tmp_path: Path) -> None:
    write(tmp_path / "run", [3, 2, 1, 0], step=1)
    (tmp_path / "run/best.pt").write_bytes(b"PK\x03\x04half")
    found = Found(kills=1)
    killtest._look(tmp_path / "run", found)
    assert found.lost == 3
    assert "best.pt: the checkpoint is truncated" in "".join(found.problems)
    assert "after kill 1: step 4 is logged, last.pt is of 1" in found.problems


def test_a_program_that_fails_by_itself_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(killtest.UserError, match=r"whole.txt: a training that nobody killed ended with status 3; look"):
        killtest.run(Case("x", ()), lambda: 3, tmp_path, kills=1)
