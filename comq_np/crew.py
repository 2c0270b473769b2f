"""The threads of this process that solve layers."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

from comq_np import checks, tasks
from comq_np.gramfile import AnyGram
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
        self._kept: Layer | AnyGram | None = None
        self._next = dict(itertools.pairwise(jobs))

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._executor.shutdown(cancel_futures=True)

    def size(self) -> int:
        """Jobs that can be done at once."""
        return self._workers

    def threads(self, at_once: int) -> int:
        """Threads for each of so many jobs at once."""
        return max(1, self._threads // at_once)

    def submit(self, job: Job, threads: int) -> Future[tasks.Outcome | tasks.Piece]:
        """Begin with a job."""
        options = {**self._options, "bits": job.bits, "threads": threads, "callback": self._go_on}
        return self._executor.submit(tasks.attempt, lambda: self._read(job), options, part=job.part)

    def outcome(self, future: Future[tasks.Outcome | tasks.Piece]) -> tasks.Outcome | tasks.Piece:
        """What came of a job."""
        return future.result()

    def _go_on(self, *_: object) -> None:
        """Stop a solve after a sweep, where it is of no use any more."""
        if self._stopped.is_set():
            raise StoppedError

    def _read(self, job: Job) -> Layer:
        with self._reading:
            here = isinstance(self._kept, Layer) and self._kept.name == job.name
            layer = cast(Layer, self._kept) if here else self._source[job.name]
            after, self._kept = self._next.get(job), None
            if after is not None and job.gram == after.gram is not None:  # not to read again what the next one needs
                self._kept = layer if after.name == job.name else layer.gram
        return layer
