"""The next batch is made while the step computes the one before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Callable, Optional, TypeVar

T = TypeVar("T")


@contextmanager
def ahead(make: Callable[[int], T], indices: Iterable[int]) -> Iterator[Iterator[T]]:
    """An iterator over ``make(index)`` for all `indices`, each begun in a thread when the one before it is handed out.

    `make` is called by one thread, in order; what it raises is raised where its result is due.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="msqkd-data") as pool:
        yield _results(make, iter(indices), pool)


def _results(make: Callable[[int], T], indices: Iterator[int], pool: ThreadPoolExecutor) -> Iterator[T]:
    def begin() -> Optional[Future[T]]:
        index = next(indices, None)
        return None if index is None else pool.submit(make, index)

    due = begin()
    while due is not None:
        made = due.result()
        due = begin()
        yield made
