"""Tiles of columns on several threads, with BLAS held to one thread meanwhile.

A tile runs on one thread, its products included: BLAS threads of their own beside ours would fight for the same cores.
Tiles never depend on the number of threads, so neither does any bit of the result.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import threadpoolctl

Item = TypeVar("Item")
Result = TypeVar("Result")

TILE = 128


def tiles(columns: int) -> list[slice]:
    """Slices of at most `TILE` columns that cover all of them."""
    return [slice(start, min(start + TILE, columns)) for start in range(0, columns, TILE)]


@functools.lru_cache(maxsize=1)
def _controller() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()  # looks through every loaded library: once is enough


class _OneBlasThread:
    """Context that any number of threads may enter: the first holds BLAS to one thread, the last gives it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limits = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limits.enter_context(_controller().limit(limits=1, user_api="blas"))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limits.close()


one_blas_thread = _OneBlasThread()


class Workers:
    """A pool of `threads` threads that maps functions over tiles."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results of `function` for each of `items`, in their order."""
        if self._pool is None or len(items) == 1:
            return [function(item) for item in items]
        return list(self._pool.map(function, items))


@contextlib.contextmanager
def workers(threads: int) -> Iterator[Workers]:
    """Workers for one solve."""
    pool = Workers(threads)
    with one_blas_thread, pool._pool or contextlib.nullcontext():
        yield pool
