"""Several processes on this machine that find each other as under torchrun, for measuring and for tests."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from engine import distributed


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def in_processes(function: Callable[..., None], *args: Any, world: int = 2) -> None:
    """Call a function of a module in `world` new processes on CPUs, each with one thread, and wait for them.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them raised; the others are ended.
    """
    # a server that forks them, where a system has one: it may have imported what they need
    method = "forkserver" if "forkserver" in torch.multiprocessing.get_all_start_methods() else "spawn"
    torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        _enter, args=(world, free_port(), function, args), nprocs=world, start_method=method
    )


def _enter(rank: int, world: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    distributed.setup("cpu", timeout_minutes=5)
    try:
        function(*args)
    finally:
        distributed.cleanup()
