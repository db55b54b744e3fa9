"""SIGTERM, SIGINT and SIGUSR1 (SLURM's warning before the time is up) as a request to stop, without losing a step.

A program that a signal has stopped ends with 128 + its number, as a shell reports a process that died of it: 143, 130
and 138. So the status is the same where no handler is set: before the training, where nothing can be lost and a
process may wait in a call that no handler interrupts, the system's own way is best.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE = 2  # torchrun passes on a Ctrl-C that its processes have already had from the terminal


class Interrupted(KeyboardInterrupt):
    """A signal ended the program where nothing could be lost, or its user lost patience."""

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{where and ' ' + where}")
        self.status = 128 + number


class StopRequest:
    """Inside its `with` block the signals set `requested`; the third one interrupts at once.

    Outside of the main thread Python allows no signal handlers: `requested` then stays false.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._count = 0
        self._at_once: str | None = None
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether one of the signals has come."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._handle) for one in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    @contextmanager
    def at_once(self, where: str = "") -> Iterator[None]:
        """For work that loses nothing when it is broken off: a signal, even one from before, raises Interrupted."""
        before, self._at_once = self._at_once, where
        try:
            if self.signal is not None:
                raise Interrupted(self.signal, where)
            yield
        finally:
            self._at_once = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader process that has just been forked, and inherits this until `shield_worker`
        self.signal = number
        self._count += 1
        if self._at_once is not None or self._count > PATIENCE:
            raise Interrupted(number, self._at_once or "")


def shield_worker() -> None:
    """For a DataLoader's worker: only its own parent may end it, since the last step still needs its data.

    A Ctrl-C, torchrun and SLURM signal all processes of a job, the workers too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start later inherit this
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
