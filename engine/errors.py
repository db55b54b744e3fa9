"""The one exception for what a user can put right, and how programs end with it."""

import contextlib
import errno
import functools
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec, TextIO

from engine.signals import Interrupted

P = ParamSpec("P")
_QUIET = {"OPENCV_LOG_LEVEL": "SILENT", "OPENCV_FFMPEG_LOGLEVEL": "-8"}
"""What OpenCV takes from the environment when it is imported: one error of ours tells what is wrong with a file."""


_FULL = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT)
_ROOMS = ("norm", "engine", "seg", "classify", "tools")


class UserError(Exception):
    """Bad input, a bad configuration or a broken environment.

    The message names the file or key, what was found, what was expected and what to do. The programs in `tools/`
    print it as one line `error: ...` and end with `status`; it is never shown as a traceback.
    """

    status = 2


class LostProcess(UserError):
    """Another process of this run is gone or hangs: nothing is wrong with the input, the same command may go on.

    Programs end with status 75 (EX_TEMPFAIL of sysexits.h).
    """

    status = 75


class NotFiniteError(UserError):
    """A network's outputs are NaN or infinite; a training goes on where only an evaluation finds them so."""


def is_lost_worker(error: BaseException) -> bool:
    """Whether a process of a DataLoader has died.

    Torch says so anywhere, from a signal handler; but who was just fetching a batch from that process finds the
    connection gone first.
    """
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    fetching = "torch.utils.data.dataloader" in names and any(name.startswith("multiprocessing.") for name in names)
    return fetching and isinstance(error, ConnectionError | EOFError | FileNotFoundError)


def one_process(what: str) -> None:
    """For work that is not divided among processes: end unless this process is the only one.

    Args:
        what: the program, and the option that asks for the work.

    Raises:
        UserError: in the first of several processes that torchrun has started.
        SystemExit: in the others, with status 0. torchrun ends all as soon as one has failed: failing too, they could
            keep the first one from telling why.
    """
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "")
    if rank is None or not world.isdigit() or int(world) < 2:
        return
    if rank != "0":
        raise SystemExit(0)
    raise UserError(
        f"{what}: works in one process, and torchrun has started {world}; start it without torchrun: python {what} ..."
    )


def _missing(module: str) -> str:
    return (
        f"{sys.executable} has no module {module!r}, which this program needs. `make install` makes the environment "
        ".venv with all that is needed; `pip install -e .`, in the folder of README.md, installs it into another one."
    )


def silence(stream: TextIO) -> None:
    """Drop what is printed there from now on: it cannot be written, and the end of the program would fail for it."""
    with contextlib.suppress(OSError):  # a stream of no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _unread(stream: TextIO) -> bool:
    """Whether it is a pipe whose reader has gone."""
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(state & select.POLLERR for _, state in poll.poll(0))


def program(main: Callable[P, int]) -> Callable[P, int]:
    """Decorator for a program's `main`: a UserError and `Interrupted` become one line and their status, Ctrl-C 130.

    A library that is not installed is told of in one line too, and so is a standard output that takes no more; where
    nobody reads it any more (`| head`), the status is that of other programs, 141.

    Characters that the standard output's encoding lacks are escaped.

    OpenCV, which `main` imports, is told to be silent, unless the environment says otherwise.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        for name, level in _QUIET.items():
            os.environ.setdefault(name, level)
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # as the standard error's are: a name ends no work
        try:
            status = main(*args, **kwargs)
            if sys.stdout is not None:  # as it is where the standard output was closed at the start (`>&-`)
                sys.stdout.flush()
            return status
        except UserError as error:
            rank = os.environ.get("RANK")  # of several processes, the one that has the error
            print(f"error{f' (process {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)
            return error.status
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in _ROOMS:
                raise
            print(f"error: {_missing(error.name)}", file=sys.stderr, flush=True)
            return UserError.status
        except OSError as error:
            if error.filename is not None or error.errno not in _FULL:  # what files are written says so itself
                raise
            if isinstance(error, BrokenPipeError):
                if not _unread(sys.stdout):  # another pipe
                    raise
                silence(sys.stdout)
                return 128 + signal.SIGPIPE
            silence(sys.stdout)
            print(f"error: the standard output takes no more: {error.strerror}", file=sys.stderr, flush=True)
            return UserError.status
        except KeyboardInterrupt as error:
            print(error if isinstance(error, Interrupted) else "interrupted", file=sys.stderr, flush=True)
            return error.status if isinstance(error, Interrupted) else 128 + signal.SIGINT

    return run
