"""Fetch the next shards in the background."""

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence

from data.errors import DataError

_THREADS = 4


class ShardFetcher:
    """Call `fetch(number)` once for each requested shard, in daemon threads.

    Errors are not reported here. The reader that needs the shard fetches it again and gets the error.
    """

    def __init__(self, fetch: Callable[[int], object]) -> None:
        self._asked: set[int] = set()
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for _ in range(_THREADS):
            threading.Thread(target=_work, args=(fetch, self._queue), daemon=True, name="fetch-shard").start()

    def ask(self, numbers: Sequence[int]) -> None:
        """Request those of `numbers` that the last call did not name."""
        for number in numbers:
            if number not in self._asked:
                self._queue.put(number)
        self._asked = set(numbers)

    def close(self) -> None:
        """Drop all pending requests and end the threads."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        for _ in range(_THREADS):
            self._queue.put(None)


def _work(fetch: Callable[[int], object], numbers: "queue.SimpleQueue[int | None]") -> None:
    while (number := numbers.get()) is not None:
        with contextlib.suppress(DataError, OSError):
            fetch(number)
