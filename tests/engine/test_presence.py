"""Several processes are played by one here, each with a connection of its own; test_torchrun.py has real ones."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine import distributed
from engine.errors import LostProcess
from engine.presence import Presence, Sign, verdict

HERE = r"\(process id \d+ on \S+\)"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


@pytest.fixture
def three() -> Iterator[list[Presence]]:
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        all_three = list(pool.map(lambda rank: Presence("127.0.0.1", port, rank, 3, timeout=4.0), range(3)))
    for one in all_three:
        one.at("reading data for step 7")
    yield all_three
    for one in reversed(all_three):  # the first one keeps the store
        one.leave("has finished")


def test_who_is_behind_is_named(three: list[Presence]) -> None:
    for one in three[:2]:
        one.at("computing step 7")
    told = str(three[0].explain(RuntimeError("Timed out")))
    expected = rf"process 2 {HERE} hangs: it has been reading data for step 7 for \d+ s\. The other processes cannot"
    assert re.match(expected, told), told


def test_who_gives_no_sign_is_named(three: list[Presence]) -> None:
    three[1]._left.set()  # its thread stops, as that of a process that is gone
    three[1]._thread.join()
    with pytest.raises(LostProcess, match=rf"^process 1 {HERE} is gone: it was last .*; --resume auto goes on"):
        raise three[0].explain(RuntimeError("Connection closed"))


def test_who_left_is_named_with_the_reason(three: list[Presence]) -> None:
    three[2].leave("has ended: x.png: broken")
    with pytest.raises(LostProcess, match=rf"^process 2 {HERE} has ended: x.png: broken\. The other"):
        raise three[1].explain(RuntimeError("Connection closed"))


def test_nobody_is_to_blame(three: list[Presence]) -> None:
    with pytest.raises(LostProcess, match=r"lost each other, though all are there \(a cable\); --resume auto"):
        raise three[0].explain(RuntimeError("a cable\nand more"))


def test_who_does_not_come_is_named() -> None:
    port = free_port()
    with pytest.raises(
        LostProcess, match=rf"processes 1, 2 of 3 did not come to 127.0.0.1:{port} within 1 s \(runtime.ddp_timeout_min"
    ):
        Presence("127.0.0.1", port, 0, 3, timeout=1.0)


def test_many_are_counted() -> None:
    before = [Sign(f"host {rank}", beat=rank) for rank in range(12)]
    now = [Sign(f"host {rank}", beat=rank + (rank > 9)) for rank in range(12)]
    told = verdict(before, now)
    assert (
        told is not None and told.count(" is gone") == 8 and "process 7 (host 7) is gone: it was last starting" in told
    )
    assert " and 2 more. The other processes" in told
    assert verdict(now[10:], [Sign("a", beat=20), Sign("b", beat=21)]) is None


def test_an_error_that_is_no_lost_process_stays(monkeypatch: pytest.MonkeyPatch, three: list[Presence]) -> None:
    monkeypatch.setattr(distributed, "_presence", three[0])
    error = torch.OutOfMemoryError("no memory")
    assert distributed.explained(error) is error
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert isinstance(distributed.explained(gloo), LostProcess)
    monkeypatch.setattr(distributed, "_presence", None)
    assert distributed.explained(gloo) is gloo
