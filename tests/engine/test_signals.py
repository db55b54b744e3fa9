from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection

import pytest

from engine.errors import program
from engine.signals import Interrupted, StopRequest, shield_worker


def test_request_and_restore() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_nothing_is_handled() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


def test_at_once() -> None:
    with StopRequest() as stop:
        told = "stopped by SIGUSR1 while it was evaluated"
        with pytest.raises(Interrupted, match=told) as caught, stop.at_once("while it was evaluated"):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert caught.value.status == 138 and stop.requested
        with pytest.raises(Interrupted), stop.at_once():  # one that came before ends it too
            pytest.fail("went on")


def test_a_worker_that_has_just_been_forked_is_not_broken_off() -> None:
    def work() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    with StopRequest() as stop, stop.at_once():
        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start()
        worker.join(20)
    assert worker.exitcode == 0 and not stop.requested


def test_a_worker_lives_until_its_parent_ends_it() -> None:
    def work(ready: Connection) -> None:
        shield_worker()
        ready.send(None)
        time.sleep(60)

    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    worker = context.Process(target=work, args=(its,), daemon=True)
    worker.start()
    mine.recv()
    code = f"import os; [os.kill({worker.pid}, number) for number in (2, 10, 15)]"
    subprocess.run([sys.executable, "-c", code], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_programs_status(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    @program
    def main() -> int:
        with StopRequest() as stop, stop.at_once("at work"):
            os.kill(os.getpid(), number)
        return 0

    assert main() == 128 + number
    assert capsys.readouterr().err == f"stopped by {number.name} at work\n"
