"""Threads beside the main one: order, bounds, errors, and none left behind."""

import threading
import time
from collections.abc import Iterator

import pytest

from engine.pipeline import ahead, behind


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [one for one in threading.enumerate() if one.name in ("ahead", "behind")]


def counted(made: list[int], count: int = 100) -> Iterator[int]:
    for number in range(count):
        made.append(number)
        yield number


def test_items_come_in_order_from_another_thread():
    names = []

    def items() -> Iterator[int]:
        names.append(threading.current_thread().name)
        yield from range(50)

    with ahead(items(), 3) as found:
        assert list(found) == list(range(50))
    assert names == ["ahead"]


def test_no_more_items_wait_than_was_said():
    made: list[int] = []
    with ahead(counted(made), 3) as found:
        for number in found:
            time.sleep(0.005)
            assert len(made) <= number + 1 + 3 + 1 + 1  # used, waiting, in hand, and the one that takes its place
            if number == 20:
                break
    assert len(made) <= 26


def test_an_error_comes_where_the_item_would():
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    seen = []
    with pytest.raises(OSError, match="no more"), ahead(items(), 5) as found:
        seen.extend(iter(lambda: next(found), None))
    assert seen == [1]


def test_calls_are_made_in_order_before_the_block_ends():
    seen: list[tuple[int, str]] = []
    with behind(lambda number, word: (time.sleep(0.002), seen.append((number, word))), 2) as call:
        for number in range(20):
            call(number, "x")
            assert number - len(seen) <= 2 + 1
    assert seen == [(number, "x") for number in range(20)]


@pytest.mark.parametrize("calls", [1, 30])
def test_an_error_of_a_call_reaches_the_caller_and_ends_it(calls: int):
    seen = []

    def work(number: int) -> None:
        seen.append(number)
        raise OSError(f"full at {number}")

    with pytest.raises(OSError, match="full at 0"), behind(work, 2) as call:
        for number in range(calls):
            call(number)
    assert seen == [0]


def test_an_error_of_the_block_drops_what_waits():
    seen = []
    with pytest.raises(KeyError), behind(lambda number: (time.sleep(0.05), seen.append(number)), 5) as call:
        for number in range(5):
            call(number)
        raise KeyError
    assert len(seen) < 5
