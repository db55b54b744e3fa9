"""A run of two processes under torchrun survives what may become of one of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine import checkpoint
from engine.report import read_metrics
from tests.engine.torchrun_toy import PASSES_ON

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    options += ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"] if PASSES_ON else []
    options += [str(ROOT / "tests/engine/torchrun_toy.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", *options, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.slow
def test_a_hang_a_death_and_a_warning_of_the_scheduler(tmp_path: Path) -> None:
    """One test, since each start takes seconds. test_loop.py compares a resumed run of two with a whole one."""
    done = torchrun(tmp_path, "5:1:hang", "5:1:die", "6:0:stop", restarts=2)
    process = r"error \(process \d\): process 1 \(process id \d+ on \S+\)"
    for told in (rf"{process} hangs: it has been computing step 5 for \d+ s\. The", rf"{process} is gone"):
        assert re.search(told, done.stderr), done.stderr
    assert done.stdout.count("resumed after step 3 of 8") == 2  # what torchrun started anew
    assert "stopped by a signal after step" in done.stdout, done.stderr
    saved = checkpoint.load(tmp_path / "last.pt")["step"]
    assert saved in (6, 7)  # the processes agree one step later than the first of them knows
    rows = [(row["kind"], row["step"]) for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rows == [("train", 2), ("train", 4), ("eval", 5), ("train", 6)]
