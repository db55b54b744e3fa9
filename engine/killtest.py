"""Kill a training again and again, go on with it each time, and compare its end with that of an uninterrupted one.

Half of the kills are aimed at the writing of a checkpoint: they come when its temporary file is there. The others come
a random moment after a row of the log, or at any moment since the start.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import checkpoint
from engine.errors import UserError
from engine.grid import refuse
from engine.report import METRICS, read_metrics
from engine.resume import BEST, LAST

AIMS = ("write", "write", "step", "anywhere")
EVERY = 2  # steps from checkpoint to checkpoint
_OWN = {
    "norm.name": "the cases differ in it; choose with --cases",
    "runtime.workers": "the cases differ in it; choose with --cases",
    "report.checkpoint_every": f"what a kill may cost is judged by a checkpoint every {EVERY} steps",
}
LONGEST = 600.0  # seconds for one start; more is a hang
UNEQUAL = ("images_per_second", "peak_memory_bytes")  # what the log tells of the machine, not of the training


@dataclass(frozen=True)
class Case:
    """A training to be killed."""

    name: str
    arguments: tuple[str, ...]
    """Those of tools/train.py, without --work-dir and --resume."""
    processes: int = 1


def check(overrides: Sequence[str]) -> None:
    """Raises UserError for changes to what the cases differ in, or are judged by."""
    refuse(overrides, _OWN)


def cases(seg: Sequence[str], classify: Sequence[str]) -> list[Case]:
    """Both trainers with batch norm and both kinds of deconvolution, 1 and 2 processes, 0 and 4 loader processes.

    The arguments are those of tools/train.py: a config with `checkpoint_every: 2 steps`, and where its data are.
    """
    tasks = {"seg": seg, "classify": classify}
    return [
        Case(
            f"{task}-{norm}-{ranks}p-{workers}w",
            (*tasks[task], f"norm.name={norm}", f"runtime.workers={workers}"),
            ranks,
        )
        for ranks, workers in ((1, 0), (1, 4), (2, 0), (2, 4))
        for task in tasks
        for norm in ("bn", "deconv", "deconv_fast")
    ]


@dataclass
class Found:
    """What became of a case."""

    kills: int = 0
    in_a_write: int = 0
    """Kills that left a temporary checkpoint."""
    lost: int = 0
    """The most steps that a kill has cost, of those in the log."""
    problems: list[str] = field(default_factory=list)


def run(case: Case, train: Callable[[], int], folder: Path, kills: int, seed: int = 0) -> Found:
    """Run `case` undisturbed in folder/whole, and in folder/killed with up to `kills` kills, and compare.

    Args:
        case: what to train.
        train: the program's main function, which reads `sys.argv`; called in processes that are forked from this one,
            so that what it needs should be imported, but nothing computed yet.
        folder: gets both work directories and what the processes print.
        kills: fewer if the training is finished before.
        seed: of the moments.

    Raises:
        UserError: a start failed by itself or hangs.
    """
    rng, found = random.Random(f"{case.name} {seed}"), Found()
    began = time.monotonic()
    _Start(case, train, folder, "whole").wait()
    duration = time.monotonic() - began
    while found.kills < kills:
        before = _unfinished(folder / "killed")
        start = _Start(case, train, folder, "killed")
        if not start.kill(rng.choice(AIMS), rng, duration):
            break
        found.kills += 1
        found.in_a_write += bool(_unfinished(folder / "killed") - before)
        _look(folder / "killed", found)
    _Start(case, train, folder, "killed").wait()
    found.problems += _differences(folder / "whole", folder / "killed")
    return found


def _unfinished(work_dir: Path) -> set[tuple[str, int]]:
    """Temporary checkpoints and their times: one that a kill has left lies there until the next of its name."""
    return {(path.name, path.stat().st_mtime_ns) for path in work_dir.glob(".*.pt.tmp")}


def _look(work_dir: Path, found: Found) -> None:
    """Every checkpoint must load, and hold all steps but those since the last one was due."""
    steps = {}
    for path in work_dir.glob("*.pt"):
        try:
            steps[path.name] = checkpoint.load(path)["step"]
        except UserError as error:
            found.problems.append(f"after kill {found.kills}: {error}")
    logged = max((row["step"] for row in read_metrics(work_dir / METRICS)), default=0)
    lost = logged - steps.get(LAST, 0)
    found.lost = max(found.lost, lost)
    if lost > EVERY:
        found.problems.append(f"after kill {found.kills}: step {logged} is logged, {LAST} is of {steps.get(LAST)}")


def _differences(whole: Path, killed: Path) -> list[str]:
    problems = []
    for name in (LAST, BEST):
        places = checkpoint.differing(checkpoint.load(whole / name), checkpoint.load(killed / name))
        if places:
            problems.append(f"{name} differs in {len(places)} places, such as {places[0]}")
    a, b = (_rows(folder) for folder in (whole, killed))
    if a != b:
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        problems.append(f"{METRICS} differs from row {first + 1} on ({len(a)} rows, {len(b)} in the killed run)")
    return problems


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in UNEQUAL} for row in read_metrics(folder / METRICS)]


def apart(main: Callable[[], int], arguments: Sequence[str], log: Path) -> None:
    """Run a program's main function in a process of its own, which may start threads that a fork would lose.

    Raises:
        UserError: it failed; `log` has what it printed.
    """
    _, status = os.waitpid(_fork(main, arguments, {}, log), 0)
    if status:
        raise UserError(f"{log}: ended with status {os.waitstatus_to_exitcode(status)}; look there")


class _Start:
    """The processes of one start of a training; each leads a process group, to which its loaders belong."""

    def __init__(self, case: Case, train: Callable[[], int], folder: Path, name: str) -> None:
        self.work_dir, self.log = folder / name, folder / f"{name}.txt"
        folder.mkdir(parents=True, exist_ok=True)
        arguments = [*case.arguments, "--work-dir", str(self.work_dir), "--resume", "auto"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": str(case.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{**world, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(case.processes)]
        self.alive = [_fork(train, arguments, one if case.processes > 1 else {}, self.log) for one in ranks]

    def wait(self) -> None:
        """Until the end."""
        if not self._until(lambda: False, LONGEST):
            return
        self._end()
        raise UserError(f"{self.log}: this training has not ended in {LONGEST:.0f} s; look there")

    def kill(self, aim: str, rng: random.Random, duration: float) -> bool:
        """SIGKILL to all processes at a random moment; returns whether one came before the end."""
        if aim == "anywhere":
            condition, wanted, after = (lambda: False), 1, rng.uniform(0, duration)
        elif aim == "step":
            condition, wanted, after = _changes([self.work_dir / METRICS]), rng.randint(1, 5), rng.uniform(0, 0.3)
        else:
            files = [self.work_dir / f".{name}.tmp" for name in (LAST, BEST)]
            condition, wanted, after = _changes(files), rng.randint(1, 6), rng.uniform(0, 0.003)
        if aim != "anywhere":
            for _ in range(wanted):
                if not self._until(condition, LONGEST):
                    return False
        if not self._until(lambda: False, after):
            return False
        self._end()
        return True

    def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Until the condition holds or the time is up (true), or the processes have ended (false)."""
        end = time.monotonic() + seconds
        while self.alive:
            if condition() or time.monotonic() >= end:
                return True
            for pid in list(self.alive):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.alive.remove(pid)
                    if status:
                        self._end()
                        code = os.waitstatus_to_exitcode(status)
                        raise UserError(
                            f"{self.log}: a training that nobody killed ended with status {code}; look there"
                        )
            time.sleep(0.0002)
        return False

    def _end(self) -> None:
        for pid in self.alive:
            os.killpg(pid, signal.SIGKILL)
        for pid in self.alive:
            os.waitpid(pid, 0)
        self.alive = []


def _changes(paths: Sequence[Path]) -> Callable[[], bool]:
    """A function that says whether one of the files is another, or longer, than when it was last asked; not whether one
    has gone."""
    seen = [_state(path) for path in paths]

    def changed() -> bool:
        nonlocal seen
        now = [_state(path) for path in paths]
        result = any(new is not None and new != old for old, new in zip(seen, now, strict=True))
        seen = now
        return result

    return changed


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size


def _fork(main: Callable[[], int], arguments: Iterable[str], environment: dict[str, str], log: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        while os.getpgid(pid) != pid:  # so that a kill finds the group
            time.sleep(0.0001)
        return pid
    status = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(environment)
        sys.argv = ["", *arguments]
        status = main()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # the test's own buffers and exit handlers belong to the test
