"""SIGTERM and SIGINT as a request to stop after the current step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

PATIENCE = 2  # torchrun passes on a Ctrl-C that its processes have already had from the terminal


class StopRequest:
    """Inside its `with` block the two signals set `requested`; the third one interrupts at once.

    Outside of the main thread Python allows no signal handlers: `requested` then stays false.
    """

    def __init__(self) -> None:
        self.requested = False
        self._count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._handle) for one in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._count += 1
        if self._count > PATIENCE:
            raise KeyboardInterrupt


def ignore_interrupt(worker_id: int) -> None:
    """For a DataLoader's `worker_init_fn`: a Ctrl-C must not kill the workers, the last step still needs their data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
