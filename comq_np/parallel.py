"""Tiles of columns on several threads, with BLAS held to one thread meanwhile.

A tile runs on one thread, its products included: BLAS threads of their own beside ours would fight for the same cores.
Tiles never depend on the number of threads, so neither does any bit of the result.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import threadpoolctl

Item = TypeVar("Item")
Result = TypeVar("Result")


@functools.lru_cache(maxsize=1)
def _controller() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()  # looks through every loaded library: once is enough


def _limit_blas() -> Any:
    return _controller().limit(limits=1, user_api="blas")


class _OneBlasThread:
    """Holds BLAS to one thread while any thread is inside: the first to enter sets that, the last gives it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limiter: Any = None

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._take_control()
                self._limiter = _limit_blas()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._take_control()
                self._limiter.restore_original_limits()
                self._take_control()

    @staticmethod
    def _take_control() -> None:
        """Let this thread set OpenBLAS, and then any other.

        Since version 3.8, threadpoolctl heeds one thread at a time and silently ignores the rest; the thread that
        gives the limit back need not be the one that set it.
        """
        controller: Any = getattr(threadpoolctl, "OpenBLASController", None)
        if hasattr(controller, "clear_controlling_thread"):
            controller.clear_controlling_thread(force=True)


_one_blas_thread = _OneBlasThread()
if hasattr(os, "register_at_fork"):  # a child has none of the threads that were inside
    os.register_at_fork(after_in_child=_one_blas_thread.__init__)  # type: ignore[misc]


class Workers:
    """Threads that map functions over tiles, for the length of one solve: a context."""

    def __init__(self, threads: int) -> None:
        self._others = threads - 1
        # Some BLAS libraries keep the limit for each thread, so each sets its own.
        self._pool = ThreadPoolExecutor(self._others, initializer=_limit_blas) if self._others else None
        self._local = threading.local()

    def scratch(self, name: str, *shape: int) -> npt.NDArray[np.float32]:
        """Array of this thread, filled with anything, which the next call with that name on this thread gets again.

        What is freed and allocated for every tile anew goes back to the system and has to be cleared by it each time.
        """
        size, kept = math.prod(shape), self._local.__dict__
        if name not in kept or kept[name].size < size:
            kept[name] = np.empty(size, np.float32)
        array: npt.NDArray[np.float32] = kept[name][:size].reshape(shape)
        return array

    def __enter__(self) -> Workers:
        _one_blas_thread.enter()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._pool is not None:
                self._pool.shutdown()
        finally:
            _one_blas_thread.leave()

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results of `function` for each of `items`, in their order; this thread does its share.

        Of errors, that of the first item is raised, as by a loop, and no item is begun after one.
        """
        if self._pool is None or len(items) == 1:
            return [function(item) for item in items]
        left, results, errors = deque(enumerate(items)), dict[int, Result](), dict[int, BaseException]()

        def work() -> None:
            with contextlib.suppress(IndexError):  # once another thread has taken the last
                while left:
                    attempt(*left.popleft())

        def attempt(place: int, item: Item) -> None:
            try:
                results[place] = function(item)
            except BaseException as error:
                errors[place] = error
                left.clear()

        others = [self._pool.submit(work) for _ in range(min(self._others, len(items) - 1))]
        try:
            work()
        finally:
            left.clear()
            wait(others)
        if errors:
            raise errors[min(errors)]
        return [results[place] for place in range(len(items))]
