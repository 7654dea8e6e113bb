"""A function of many plans, computed ahead by threads: the results in order, and few of them at a time.

Knows neither batches nor sources. At most `2 * num_threads` results are in the making or wait to be taken; a
consumer that is slow holds the threads up, and memory stays bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

P = TypeVar("P")
R = TypeVar("R")


def ahead(fn: Callable[[P], R], plans: Iterable[P], *, num_threads: int) -> Iterator[R]:
    """`fn(plan)` for each plan. An error in `fn` is raised in its turn; closing the iterator ends the
    threads.
    """
    remaining = iter(plans)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="selfmask-data") as pool:
        waiting: deque[Future[R]] = deque(
            pool.submit(fn, plan) for plan in islice(remaining, 2 * num_threads)
        )
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(fn, plan) for plan in islice(remaining, 1))
        finally:
            pool.shutdown(cancel_futures=True)
