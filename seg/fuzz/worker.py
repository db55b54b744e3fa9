"""The process in which cases are made, run and judged."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from seg.fuzz.case import Call, Ran, Wrong
from seg.fuzz.ground import Ground

MOST_MEMORY = 12 * 2**30
"""Bytes of address space; what wants more ends in a MemoryError."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = frozenset(
    "os.mkdir os.rename os.remove os.rmdir os.symlink os.link os.truncate os.chmod os.chown shutil.rmtree".split()  # noqa: SIM905
)
_PROGRAMS = frozenset("os.system subprocess.Popen os.exec os.posix_spawn os.startfile pty.spawn".split())  # noqa: SIM905


@dataclass(frozen=True)
class Ending:
    """How a call ended."""

    failure: str = ""
    """What is wrong with it; empty if it ended as it should."""
    refused: int = 0
    """Cases of it that ended in a clear error."""
    program: str = ""
    arguments: tuple[str, ...] = ()
    what: str = ""
    details: str = ""
    seconds: float = 0.0
    """Of the processor, the check included."""
    ended: bool = True
    """False: the program begins only now."""


class _Guard:
    """Notes files that Python writes outside of the folders allowed, and programs that it starts."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.armed, self.seen = False, list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in _PROGRAMS:
            self.seen.append(f"started a program: {event} {arguments[:2]!r}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            self._judge(event, arguments[:1])
        elif event in _CHANGES:
            self._judge(event, arguments[:2] if event in ("os.rename", "os.link") else arguments[:1])

    def _judge(self, event: str, paths: tuple[Any, ...]) -> None:
        for path in paths:
            if not isinstance(path, str | bytes | os.PathLike):
                continue
            place = os.path.abspath(os.fsdecode(path))
            # a link is followed by what opens it, and replaced by what renames to it
            place = (
                os.path.realpath(place)
                if event == "open"
                else os.path.join(os.path.realpath(os.path.dirname(place)), os.path.basename(place))
            )
            if not f"{place}{os.sep}".startswith(self.allowed) and place != os.devnull:
                self.seen.append(f"wrote outside of the output folder: {event} {os.fsdecode(path)!r}")

    @contextlib.contextmanager
    def watching(self, *allowed: Path) -> Iterator[list[str]]:
        self.allowed = tuple(f"{os.path.realpath(path)}{os.sep}" for path in allowed)
        self.armed, self.seen = True, []
        try:
            yield self.seen
        finally:
            self.armed = False


def work(
    pipe: Connection, programs: Mapping[str, Callable[[], int]], ground: Ground, work_dir: Path, traces: Path
) -> None:
    """Take (maker, seeds, folder, count) from the pipe and answer with an Ending, before it one of what begins, until
    None comes."""
    home = work_dir / "home"
    home.mkdir(exist_ok=True)
    # caches, fonts, temporary files: whatever the libraries keep lies there
    os.environ |= {"TMPDIR": str(home), "TORCH_HOME": str(home)}
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "OPENCV_FFMPEG_LOGLEVEL": "-8", "OPENCV_LOG_LEVEL": "SILENT"}
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(traces, "w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        guard = _Guard()
        ground.lay()
        importlib.import_module("matplotlib.font_manager")  # the first time it asks a program for the fonts
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C libraries talk of damaged files; ours goes through sys.stderr
        pipe.send("ready")
        while (job := pipe.recv()) is not None:
            start = time.process_time()
            ending = _one(*job, programs=programs, ground=ground, guard=guard, home=home, begins=pipe.send)
            pipe.send(replace(ending, seconds=time.process_time() - start))


def _one(
    maker: Any,
    seeds: list[int],
    folder: Path,
    count: int,
    *,
    programs: Mapping[str, Callable[[], int]],
    ground: Ground,
    guard: _Guard,
    home: Path,
    begins: Callable[[Ending], None],
) -> Ending:
    for name in ("in", "out"):
        (folder / name).mkdir(parents=True)
    try:
        call: Call = maker(np.random.default_rng(seeds), folder, count, ground)
    except Exception:  # a mistake of the fuzzer, which must not pass for one of a program
        return Ending("the case can't be made: " + traceback.format_exc())
    begins(Ending(program=call.program, arguments=tuple(call.arguments), what=call.what, ended=False))
    before = _listing(folder)
    os.chdir(folder / "in")  # where a relative path of a file would lead, and where its modules would be looked for
    with guard.watching(folder / "out", home) as seen:
        failure, ran = _run(programs[call.program], call)
    if not failure and ran.status in (0, 1):
        try:
            call.check(ran)
        except Wrong as error:
            failure = f"wrong: {error}"
        except Exception:  # what the check looks at is not there, or not as it should be
            failure = "wrong: the output can't be checked: " + traceback.format_exc()
    if _listing(folder) != before:
        changed = set(_listing(folder).items()) ^ set(before.items())
        seen = [*seen, f"changed {sorted({name for name, _ in changed})[:3]}"]
    if (folder / "ran").exists():
        seen = [*seen, "ran code from the file"]
    failure = "; ".join([*seen[:3], *[failure] * bool(failure)])
    refused = 0 if failure else count if ran.status == 2 else call.refused(ran)
    details = f"status {ran.status}\n{ran.out}\n{ran.err}"
    return Ending(failure, refused, call.program, tuple(call.arguments), call.what, details)


def _run(main: Callable[[], int], call: Call) -> tuple[str, Ran]:
    """Run a program; what is wrong with how it ended, and its output."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [f"{call.program}.py", *call.arguments]
    failure, status = "", -1
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main()
        except SystemExit as error:
            failure = f"ended by SystemExit {error.code}"
        except BaseException as error:
            failure = f"a traceback: {type(error).__name__}: {str(error)[:200]}"
            err.write(traceback.format_exc())
    ran = Ran(status, out.getvalue(), err.getvalue())
    if failure:
        return failure, ran
    if status == 2:
        said = [line for line in ran.err.splitlines() if line.startswith("error: ")]
        if len(said) != 1:
            failure = f"{len(said)} errors were told"
        elif call.good:
            failure = f"sound input was refused: {said[0][:300]}"
        elif not any(name in ran.err for name in call.names):
            failure = f"the error names none of {', '.join(call.names[:3])}: {said[0][:300]}"
    elif status not in (0, 1):
        failure = f"status {status}"
    return failure, ran


def _listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What lies in the folder but for `out`: mode, size and time of change by path."""
    found = {}
    for here, folders, files in os.walk(folder):
        if Path(here) == folder:
            folders.remove("out")
        for name in [*folders, *files]:
            path = os.path.join(here, name)
            info = os.lstat(path)
            found[os.path.relpath(path, folder)] = info.st_mode, info.st_size, info.st_mtime_ns
    return found
