"""The threads of this process that solve layers."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from comq_np import checks, tasks
from comq_np.gram import Gram
from comq_np.schedule import Job, Limits
from comq_np.store import CalibrationFile, Layer

Result = TypeVar("Result")


class _Here(Executor):
    """Does at once, on the thread that asks for it, what is submitted."""

    def submit(self, function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        future: Future[Result] = Future()
        future.set_result(function(*args, **kwargs))
        return future


class StoppedError(Exception):
    """Nobody waits for the result any more."""


class Local(contextlib.AbstractContextManager["Local"]):
    """Threads that solve layers of a file, for the length of one run: a context.

    With one worker, it is the thread of the caller. Leaving the context, also by an exception, ends solves after the
    sweep that they are in.
    """

    def __init__(
        self,
        source: CalibrationFile,
        options: tasks.Options,
        limits: Limits,
        jobs: Sequence[Job],
        on_gpu: bool,
    ) -> None:
        self._source, self._options = source, options
        self._threads = checks.thread_count(limits.threads)
        self.memory: float = limits.memory or max((job.need(self._threads) for job in jobs), default=0)
        workers = limits.workers or (1 if on_gpu else self._threads)
        self._workers = max(1, min(workers, len(jobs)))
        self._executor = ThreadPoolExecutor(self._workers) if self._workers > 1 else _Here()
        self._stopped = threading.Event()
        self._reading = threading.Lock()
        self._gram: Gram | None = None
        self._followed = {job.name for job, after in itertools.pairwise(jobs) if job.gram == after.gram is not None}

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._executor.shutdown(cancel_futures=True)

    def size(self) -> int:
        """Layers that can be solved at once."""
        return self._workers

    def threads(self, at_once: int) -> int:
        """Threads for each of so many layers at once."""
        return max(1, self._threads // at_once)

    def submit(self, job: Job, threads: int) -> Future[tasks.Outcome]:
        """Begin to solve a layer."""
        options = {**self._options, "threads": threads, "callback": self._go_on}
        return self._executor.submit(tasks.attempt, lambda: self._read(job.name), options)

    def outcome(self, future: Future[tasks.Outcome]) -> tasks.Outcome:
        """What came of a layer."""
        return future.result()

    def _go_on(self, *_: object) -> None:
        """Stop a solve after a sweep, where it is of no use any more."""
        if self._stopped.is_set():
            raise StoppedError

    def _read(self, name: str) -> Layer:
        with self._reading:
            layer = self._source[name]
            self._gram = layer.gram if name in self._followed else None  # not to read it again for the next layer
        return layer
