"""Tasks of NumPy work in threads (NumPy releases the GIL), whose results come in the order of the tasks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def in_order(work: Callable[..., Generator[None, None, Any]], tasks: Iterable[tuple], threads: int) -> Iterator[Any]:
    """The values that ``work(*task)`` returns, in the order of the tasks.

    `work` is a generator that yields None every fraction of a second, so that it can be stopped there. Only about as
    many results as there are threads wait to be taken, so that memory does not grow with the number of tasks.
    """
    stopped = threading.Event()

    def one(task: tuple) -> Any:
        steps = work(*task)
        while not stopped.is_set():
            try:
                next(steps)
            except StopIteration as end:
                return end.value
        return None

    if threads == 1:
        yield from map(one, tasks)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(one, task))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # An interrupt, or a caller who wants no more.
            stopped.set()
