"""Which process is gone or hangs: each tells what it is at, so that the others can name the one they wait for.

A collective operation that a process does not come to ends, after minutes, with an error that names an address or
nothing. Here a thread of each process writes a line into the store that torchrun keeps, every two seconds; it is read
only when something is wrong. The numbers of the lines are compared, not the clocks of different machines.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from uuid import uuid4

from torch import distributed as dist

from engine.errors import LostProcess

WATCHERS = 2  # the first processes look after all: one more than needed, since it may be the one that is lost
_LOOK = 0.1  # seconds
ADVICE = "--resume auto goes on from the last checkpoint"


@dataclass(frozen=True)
class Sign:
    """What a process last said of itself."""

    where: str
    """Host and process id."""
    beat: int = 0
    """Grows with each sign."""
    count: int = 0
    """Marks passed, see `Presence.at`. All processes pass the same ones."""
    what: str = "starting"
    """What it has been doing since the last mark."""
    seconds: float = 0.0
    """Since that mark, by its own clock."""
    end: str | None = None
    """Why it has left."""


class Presence:
    """This process among the others.

    `group` is the store to give to `init_process_group`.

    Args:
        host: of the store.
        port: of the store.
        rank: this process.
        world: number of processes.
        timeout: seconds that processes wait for each other.

    Raises:
        LostProcess: not all have come in time; those that are missing are named.
        RuntimeError: there is no store.
    """

    def __init__(self, host: str, port: int, rank: int, world: int, timeout: float) -> None:
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, else by the first process
        self.rank, self.world, self.timeout = rank, world, timeout
        self.interval = min(2.0, timeout / 10)
        self.gap = max(2.5 * self.interval, min(30.0, timeout / 20))  # between two looks; a busy process may be late
        self._beats = 0
        self._lock, self._left = threading.Lock(), threading.Event()
        self._sign, self._since = Sign(f"process id {os.getpid()} on {socket.gethostname()}"), time.monotonic()
        store = dist.TCPStore(
            host,
            port,
            world,
            is_master=rank == 0 and not served,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
        token = self._meet(store, f"{host}:{port}")
        self.group = dist.PrefixStore(f"group/{token}", store)
        mine = store.clone()  # a connection of its own, since the main thread may wait in the other one
        mine.set_timeout(timedelta(seconds=30))  # a store whose machine is down must not hold up the goodbye
        self._store = dist.PrefixStore(f"presence/{token}", mine)
        self._tell()
        self._store.wait([str(rank) for rank in range(world)])
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @property
    def grace(self) -> float:
        """Seconds that torch's own time-out should come later, so that the message here is the first."""
        return 2 * (self.gap + self.interval) + 5

    def at(self, what: str = "") -> None:
        """Pass a mark: from here on this process is at `what` ("reading data for step 7"), or still at what it was.

        Costs microseconds.
        """
        sign = self._sign
        self._sign, self._since = replace(sign, count=sign.count + 1, what=what or sign.what), time.monotonic()

    def leave(self, reason: str) -> None:
        """The last sign: the others shall know why this process is no longer there. May be called twice."""
        if not self._left.is_set():
            self._left.set()
            self._thread.join(2 * self.interval)
            self._sign = replace(self._sign, end=reason)
            try:
                self._tell()
            except RuntimeError as error:  # the store went with another process: nobody is left to be told
                print(f"process {self.rank} leaves, and cannot tell the others: {error}", file=sys.stderr)

    def explain(self, error: Exception) -> LostProcess:
        """The clear error for one that torch raised because another process did not take part; takes seconds."""
        first_line = str(error).splitlines()[0]
        try:
            told = verdict(*self._look_twice())
        except RuntimeError:
            told = (
                "the store that the processes share is gone: torchrun, or process 0, has ended or its machine is down"
            )
        return LostProcess(told or f"the processes lost each other, though all are there ({first_line}); {ADVICE}")

    def _tell(self) -> None:
        with self._lock:
            seconds = time.monotonic() - self._since
            sign = replace(self._sign, beat=self._beats, seconds=seconds)
            self._beats += 1
            self._store.set(str(self.rank), json.dumps(asdict(sign)))

    def _meet(self, store: dist.TCPStore, where: str) -> str:
        """Agree on a name for this start of the processes.

        torchrun keeps its store when it starts them anew, with all that was written into it: who comes first would find
        the addresses of processes that are dead. So the first process makes a name up, and each of the others asks
        under a name of its own whether the one that it has read still holds.
        """
        until, mine = time.monotonic() + self.timeout, uuid4().hex
        if self.rank > 0:
            while time.monotonic() < until:
                if store.check(["start"]):
                    token = store.get("start").decode()
                    store.set(f"{token}/asks/{self.rank}", mine)
                    if store.check([f"{token}/holds/{mine}"]):
                        return token
                time.sleep(_LOOK)  # not there yet, or the name of an earlier start
            raise self._missing([0], where)
        store.set("start", mine)
        others = {rank: f"{mine}/asks/{rank}" for rank in range(1, self.world)}
        try:
            store.wait(list(others.values()), timedelta(seconds=self.timeout))
        except dist.DistStoreError:
            raise self._missing([rank for rank, key in others.items() if not store.check([key])], where) from None
        for asked in store.multi_get(list(others.values())):
            store.set(f"{mine}/holds/{asked.decode()}", "")
        return mine

    def _missing(self, ranks: list[int], where: str) -> LostProcess:
        names = f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        return LostProcess(
            f"{names} of {self.world} did not come to {where} within {self.timeout:.0f} s "
            "(runtime.ddp_timeout_minutes); look for an error or a hang there"
        )

    def _look(self) -> list[Sign]:
        texts = self._store.multi_get([str(rank) for rank in range(self.world)])
        return [Sign(**json.loads(text)) for text in texts]

    def _look_twice(self) -> tuple[list[Sign], list[Sign]]:
        self._tell()
        before = self._look()
        time.sleep(self.gap)
        self._tell()
        return before, self._look()

    def _beat(self) -> None:
        while not self._left.wait(self.interval):
            try:
                self._tell()
                if self.rank < WATCHERS and time.monotonic() - self._since > self.timeout:
                    self._end_if_one_is_lost()
            except RuntimeError:
                return  # no store, so nobody to tell; the next collective operation fails, and `explain` says why

    def _end_if_one_is_lost(self) -> None:
        """In a thread, since the main one is inside an operation that may never end."""
        before, now = self._look_twice()
        waiting = max(sign.count for sign in now)
        if all(sign.seconds > self.timeout for sign in now if sign.count == waiting):
            told = verdict(before, now)
            if told and not self._left.is_set():
                print(f"error (process {self.rank}): {told}", file=sys.stderr, flush=True)
                os._exit(LostProcess.status)


def verdict(before: Sequence[Sign], now: Sequence[Sign]) -> str | None:
    """Name the processes that the others wait for, from two looks at the signs of all ranks.

    Returns:
        The message, or None if all are there and equally far.
    """
    gone, left, there = [], [], {}
    for rank, (old, new) in enumerate(zip(before, now, strict=True)):
        if new.end is not None:
            left.append(f"process {rank} ({new.where}) {new.end}")
        elif new.beat == old.beat:
            gone.append(f"process {rank} ({new.where}) is gone: it was last {new.what}")
        else:
            there[rank] = new
    behind = []
    if there and not gone and not left:
        most = max(sign.count for sign in there.values())
        behind = [
            f"process {rank} ({sign.where}) hangs: it has been {sign.what} for {sign.seconds:.0f} s"
            for rank, sign in there.items()
            if sign.count < most
        ]
    lost = left or gone or behind
    more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
    return f"{'; '.join(lost[:8])}{more}. The other processes cannot go on without it; {ADVICE}" if lost else None
