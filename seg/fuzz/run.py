"""Runs cases in a process of its own, watches it, and judges how each ended.

Every case must end in a right result or in one clear error. What is a failure: a traceback, a hang, the death of the
process, a wrong output without a word, an error that names nothing, a file written outside of the output folder, code
run from a file.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.images import check_writable, show
from seg.fuzz import checkpoints, configs, images, labels, videos
from seg.fuzz.case import Maker
from seg.fuzz.ground import Ground
from seg.fuzz.worker import Ending, work

KINDS: dict[str, tuple[Maker, int, int]] = {
    "images": (images.make, 20, 8),
    "labels": (labels.make, 1, 4),
    "configs": (configs.make, 1, 4),
    "checkpoints": (checkpoints.make, 1, 2),
    "videos": (videos.make, 1, 2),
}
"""What can be fuzzed: its maker, how many cases go into a call at most, and its share of the cases."""
Programs = Mapping[str, Callable[[], int]]
"""The programs' `main`s by name; they read `sys.argv`."""


@dataclass
class Report:
    """How the cases ended."""

    cases: Counter[str] = field(default_factory=Counter)
    """By kind."""
    right: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    processor: Counter[str] = field(default_factory=Counter)
    """Seconds of the processor."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"{kind:<12}{count:>6} cases: {self.right[kind]} right results, {self.refused[kind]} clear errors, "
            f"{self.processor[kind]:.0f} s of the processor"
            for kind, count in self.cases.items()
        ]
        lines.append(f"{self.cases.total()} cases in {self.seconds:.0f} s, {len(self.failures)} failures")
        return "\n".join([*lines, *self.failures])


def fuzz(
    programs: Programs,
    cases: int,
    seed: int,
    work_dir: Path,
    only: Sequence[str] = (),
    *,
    limit: float = 60.0,
    say: Callable[[str], None] = print,
) -> Report:
    """Run `cases` cases, a pure function of `seed`, kind and number, and keep those that failed.

    Args:
        programs: see Programs; needed are predict, evaluate, train, inspect, convert_masks.
        cases: how many, of all kinds together.
        seed: another one gives other cases.
        work_dir: what is made lies there; `failures/` in it holds the input of each failure, and how it ended. Those of
            the run before are removed.
        only: kinds of KINDS; default all.
        limit: seconds that a call of one case may take; one of six cases twice as long, and so on.
        say: takes a line for each failure.

    Raises:
        UserError: an unknown kind, no case, no time, or a folder that can't be written or is somebody else's.
    """
    kinds = list(only) or list(KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"--only: found {unknown[0]!r}, expected some of {', '.join(KINDS)}")
    if cases < len(kinds):
        raise UserError(f"--cases: found {cases}, expected at least one for each of {', '.join(kinds)}")
    if not limit > 0:
        raise UserError(f"--limit: found {limit:g}, expected seconds above 0")
    check_writable(work_dir)
    work_dir = work_dir.resolve()
    failures = work_dir / "failures"
    if (failures.exists() or (work_dir / "case").exists()) and not (work_dir / "ground").is_dir():
        raise UserError(
            f"{work_dir}: holds folders called case or failures that are not of this program; choose another"
        )
    shutil.rmtree(failures, ignore_errors=True)
    shares = sum(KINDS[kind][2] for kind in kinds)
    report, start = Report(), time.monotonic()
    worker = _Worker(programs, Ground(work_dir / "ground"), work_dir, limit)
    try:
        for kind in kinds:
            wanted = max(1, round(cases * KINDS[kind][2] / shares))
            for number, count in _calls(wanted, KINDS[kind][1]):
                folder = work_dir / "case"
                ending = worker.call(kind, number, count, seed, folder)
                report.cases[kind] += count
                report.refused[kind] += ending.refused
                report.processor[kind] += ending.seconds  # type: ignore[assignment]
                if ending.failure:
                    text = _keep(ending, f"{kind}-{number}", folder, failures)
                    report.failures.append(text)
                    say(text)
                else:
                    report.right[kind] += count - ending.refused
    finally:
        worker.end()
        shutil.rmtree(work_dir / "case", ignore_errors=True)
    report.seconds = time.monotonic() - start
    return report


def _calls(cases: int, most: int) -> list[tuple[int, int]]:
    """(number, cases in it) of each call."""
    return [(start // most, min(most, cases - start)) for start in range(0, cases, most)]


def _keep(ending: Ending, name: str, folder: Path, failures: Path) -> str:
    kept = failures / name
    kept.parent.mkdir(exist_ok=True)
    os.replace(folder, kept)
    text = f"{name}: {ending.failure}"
    command = f"python tools/{ending.program}.py " + " ".join(map(repr, ending.arguments))
    report = f"{text}\n\n{ending.what}\n\n{command.replace(str(folder), str(kept))}\n\n{ending.details}\n"
    (kept / "what.txt").write_text(show(report.replace("\n", "\0")).replace("\\x00", "\n"))
    return f"{text} ({kept})"


class _Worker:
    """The process that runs the cases; it is started anew after a death or a hang."""

    def __init__(self, programs: Programs, ground: Ground, work_dir: Path, limit: float) -> None:
        self._arguments = (dict(programs), ground, work_dir)
        self._limit, self._traces = limit, work_dir / "hang.txt"
        self._process: Any = None
        self._pipe: Connection | None = None

    def call(self, kind: str, number: int, count: int, seed: int, folder: Path) -> Ending:
        """Make and run a call in the process."""
        for attempt in folder.iterdir() if folder.is_dir() else ():
            shutil.rmtree(attempt) if attempt.is_dir() and not attempt.is_symlink() else attempt.unlink()
        pipe = self._pipe if self._process is not None and self._process.is_alive() else self._start()
        assert pipe is not None
        maker = KINDS[kind][0]
        pipe.send((maker, [seed, sorted(KINDS).index(kind), number], folder, count))
        limit = self._limit * (1 + (count - 1) / 5)
        end, begun = time.monotonic() + limit, Ending()
        while pipe.poll(max(0.0, end - time.monotonic())):
            try:
                ending: Ending = pipe.recv()
            except EOFError:
                self._process.join()
                return replace(begun, failure=f"the process died with status {self._process.exitcode}")
            if ending.ended:
                return ending
            begun = ending
        return replace(begun, failure=f"a hang: no end after {limit:g} s", details=self._stop_hanging())

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=work, args=(other, *self._arguments, self._traces), daemon=True)
        self._process.start()
        other.close()
        while not self._pipe.poll(1):  # a busy machine may take minutes
            if not self._process.is_alive():
                raise UserError("fuzz: the process of the cases did not start; its error stands above")
        self._pipe.recv()
        return self._pipe

    def _stop_hanging(self) -> str:
        """End the process; returns where it was."""
        os.kill(self._process.pid, signal.SIGUSR1)
        time.sleep(1)
        self._process.kill()
        self._process.join()
        return self._traces.read_text() if self._traces.exists() else ""

    def end(self) -> None:
        if self._process is not None and self._process.is_alive():
            assert self._pipe is not None
            self._pipe.send(None)
            self._process.join(20)
            if self._process.is_alive():
                self._process.kill()
