"""Programs that do what the fuzzer must find; they take the place of those in tools/."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from engine.errors import UserError, program


def _case() -> Path:
    """The folder of the case, from the arguments."""
    given = next(Path(word) for word in sys.argv[1:] if "/in/" in word or word.endswith("/in"))
    return next(folder for folder in (given, *given.parents) if folder.name == "in").parent


def breaks() -> int:
    return [][1]


def hangs() -> int:
    time.sleep(600)
    return 0


def dies() -> int:
    os._exit(7)


def writes_beside() -> int:
    (_case() / "beside.txt").write_text("x")
    return 0


def writes_elsewhere() -> int:
    (_case().parent / "elsewhere.txt").write_text("x")
    return 0


def runs_code() -> int:
    os.system("true")
    return 0


@program
def says_nothing() -> int:
    raise UserError("something is wrong")


def does_nothing() -> int:
    return 0


TURNS = (breaks, writes_beside, writes_elsewhere, runs_code, says_nothing, does_nothing, hangs, dies)
_turns = iter(TURNS[int(os.environ.get("BAD_PROGRAMS_TURN", 0)) :])  # a process that is started later goes on there


def misbehaves() -> int:
    """In another way each time."""
    return next(_turns)()
