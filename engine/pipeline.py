"""Work of other threads beside this one, a bounded number of items ahead of it or behind it.

For work that leaves the interpreter's lock, such as decoding and writing by OpenCV. The number of items that wait is
bounded, so that memory does not grow when one side is slower.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
_LOOK = 0.1  # seconds between two looks whether the other side has gone


class _End:
    """The last thing in a queue, with what ended it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Line(Generic[T]):
    """A bounded queue that either side can leave."""

    def __init__(self, size: int) -> None:
        self.queue: Queue[T | _End] = Queue(size)
        self.left = threading.Event()

    def put(self, item: T | _End) -> bool:
        """Whether it was taken; not when the other side has left."""
        while not self.left.is_set():
            try:
                self.queue.put(item, timeout=_LOOK)
                return True
            except Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        """The items up to the end, whose error is raised here, or until the other side has left."""
        while not self.left.is_set():
            try:
                item = self.queue.get(timeout=_LOOK)
            except Empty:
                continue
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item


@contextmanager
def ahead(items: Iterable[T], size: int) -> Iterator[Iterator[T]]:
    """The items, made by another thread, up to `size` of them (and the one in its hands) before they are asked for.

    An error of `items` is raised where the item would have come. On leaving, the thread is stopped and joined, whether
    all items were used or not.
    """
    line: _Line[T] = _Line(size)

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                if not line.put(item):
                    return
        except BaseException as found:
            error = found
        line.put(_End(error))

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        yield iter(line)
    finally:
        line.left.set()
        thread.join()


@contextmanager
def behind(function: Callable[..., Any], size: int) -> Iterator[Callable[..., None]]:
    """A function that has `function` called with its arguments by another thread, one call after the other in order.

    Up to `size` calls wait; one more waits for room. An error of `function` is raised by the next call or on leaving,
    and no further call is made. Leaving waits for all calls, unless the block ends with an error: those that wait are
    dropped then.
    """
    line: _Line[tuple[Any, ...]] = _Line(size)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for arguments in line:
                function(*arguments)
        except BaseException as error:
            errors.append(error)
            line.left.set()

    def call(*arguments: Any) -> None:
        if not line.put(arguments):
            raise errors[0]

    thread = threading.Thread(target=work, name="behind", daemon=True)
    thread.start()
    try:
        yield call
        line.put(_End())
        thread.join()
    finally:
        line.left.set()
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def spread(
    function: Callable[[T], R], items: Iterable[T], threads: int, cost: Callable[[T], int], room: int
) -> Iterator[Iterator[Future[R]]]:
    """Calls of `function` with each item by several threads, ended, in the order of the items.

    The items are made in this thread, as the futures are asked for. While the calls that have not been handed out cost
    more than `room` together, no further item is made; one alone may cost more. A call's error is raised by its
    future's `result`. Leaving waits for the calls that have begun, and for those that wait too unless a signal
    (KeyboardInterrupt) ends the block, which drops them.
    """
    pool = ThreadPoolExecutor(threads, "spread")

    def ended() -> Iterator[Future[R]]:
        waiting: deque[tuple[int, Future[R]]] = deque()
        taken = 0
        for item in items:
            price = cost(item)
            waiting.append((price, pool.submit(function, item)))
            del item  # the call alone holds it, until it has ended
            taken += price
            while waiting and (taken > room or waiting[0][1].done()):
                first, future = waiting.popleft()
                wait([future])
                taken -= first
                yield future
        for _, future in waiting:
            wait([future])
            yield future

    try:
        yield ended()
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown()
