"""Threads beside the main one: order, bounds, errors, and none left behind."""

import threading
import time
from collections.abc import Iterator

import pytest

from engine.pipeline import ahead, behind, spread


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [one for one in threading.enumerate() if one.name.startswith(("ahead", "behind", "spread"))]


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


def slower_first(number: int) -> int:
    time.sleep(0.02 * (number % 4 == 0))
    return 10 * number


def one(_: int) -> int:
    return 1


def test_spread_calls_come_in_the_order_of_their_items():
    names = set()

    def work(number: int) -> int:
        names.add(threading.current_thread().name)
        return slower_first(number)

    with spread(work, range(20), 3, one, 8) as calls:
        assert [call.result() for call in calls] == [10 * number for number in range(20)]
    assert len(names) > 1 and all(name.startswith("spread") for name in names)


def test_spread_makes_no_item_beyond_its_room():
    made: list[int] = []
    may_end = [threading.Event() for _ in range(30)]
    with spread(lambda number: may_end[number].wait(10), counted(made, 30), 2, lambda _: 3, 10) as calls:
        for number in range(30):
            may_end[number].set()
            assert next(calls).result()
            assert len(made) <= min(30, number + 4), "four of them cost more than 10"


def test_a_spread_item_that_costs_more_than_the_room_goes_alone():
    made: list[int] = []
    with spread(slower_first, counted(made, 5), 2, lambda _: 100, 10) as calls:
        for number, call in enumerate(calls):
            assert call.result() == 10 * number and len(made) == number + 1


def test_an_error_of_a_spread_call_is_its_own():
    def work(number: int) -> int:
        if number == 3:
            raise OSError("full")
        return number

    with spread(work, range(6), 2, one, 4) as calls:
        found = [call.exception() or call.result() for call in calls]
    assert str(found.pop(3)) == "full" and found == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(("error", "finished"), [(KeyError, range(4, 5)), (KeyboardInterrupt, range(1, 3))])
def test_what_waits_is_dropped_by_a_signal_alone(error: type[BaseException], finished: range):
    seen = []

    def items() -> Iterator[int]:
        yield from range(4)
        raise error

    def work(number: int) -> None:
        time.sleep(0.1)
        seen.append(number)

    with pytest.raises(error), spread(work, items(), 1, one, 10) as calls:
        list(calls)
    assert len(seen) in finished and seen == list(range(len(seen)))
