"""Which layers are solved at once: those next in the file, as many as there are workers and memory for."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from comq_np import checks, memory
from comq_np.store import CalibrationFile
from comq_np.tasks import Outcome


@dataclass(frozen=True)
class Job:
    """A layer to solve: its shape and the number of its Gram in the file, and the bytes it takes with so many threads.

    Of a layer that cannot be read there is no shape and no Gram, and it takes nothing.
    """

    name: str
    shape: tuple[int, int] | None
    gram: int | None
    need: Callable[[int], int]


@dataclass(frozen=True)
class Limits:
    """Threads, layers and bytes at once, each None where that is for the crew to say."""

    threads: int | None
    workers: int | None
    memory: int | None

    @classmethod
    def checked(cls, threads: object, workers: object, memory: object) -> Limits:
        """Limits as a user gives them."""
        return cls(
            None if threads is None else checks.thread_count(threads),
            None if workers is None else checks.integer("workers", workers, 1, checks.MOST_THREADS),
            None if memory is None else checks.bytes_of("memory", memory),
        )


class Crew(Protocol):
    """Those who solve, and the bytes that layers may take together."""

    memory: float

    def size(self) -> int:
        """Layers that can be solved at once."""

    def threads(self, at_once: int) -> int:
        """Threads for each of so many layers at once."""

    def submit(self, job: Job, threads: int) -> Future[Outcome]:
        """Begin to solve a layer."""

    def outcome(self, future: Future[Outcome]) -> Outcome | None:
        """What came of a layer; None where it must be submitted once more."""


def jobs(source: CalibrationFile, names: Iterable[str], options: dict[str, Any]) -> list[Job]:
    """Layers to solve with these options of `solve`."""
    return [_job(source, name, options) for name in names]


def _job(source: CalibrationFile, name: str, options: dict[str, Any]) -> Job:
    try:
        found = source.summary(name)
        shape = found["rows"], found["columns"]
        bits, _ = checks.bits_and_levels(options["bits"], options["levels"])
        fit_bias, (size, recipe) = options["fit_bias"] and found["bias"], (options["group_size"], options["recipe"])
        need = functools.partial(memory.with_gram, *shape, bits, fit_bias, size, recipe)
        need(1)
    except (checks.FileError, checks.InputError):  # it will be said when the layer is read
        return Job(name, None, None, lambda _: 0)
    return Job(name, shape, found["gram"], functools.lru_cache(need))


def outcomes(jobs: Iterable[Job], crew: Crew) -> Iterator[tuple[str, Outcome]]:
    """Name and outcome of each layer, as soon as it is there.

    Layers are begun in their order, as many as fit into memory together; one that takes more by itself is solved alone.
    """
    waiting, running = deque(jobs), dict[Future[Outcome], tuple[Job, int]]()
    while waiting or running:
        _begin(waiting, running, crew)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, _ = running.pop(future)
            outcome = crew.outcome(future)
            if outcome is None:
                waiting.appendleft(job)
                continue
            if crew.size() > 1:  # else the caller deals with this one first
                _begin(waiting, running, crew)
            yield job.name, outcome


def _begin(waiting: deque[Job], running: dict[Future[Outcome], tuple[Job, int]], crew: Crew) -> None:
    """Begin with the layers that are next, as long as there is room for them."""
    while waiting and (free := crew.size() - len(running)) > 0:
        job, left = waiting[0], crew.memory - sum(need for _, need in running.values())
        threads = crew.threads(len(running) + _fitting(itertools.islice(waiting, free), left))
        while threads > 1 and job.need(threads) > left:
            threads //= 2
        if running and job.need(threads) > left:
            return
        running[crew.submit(waiting.popleft(), threads)] = job, job.need(threads)


def _fitting(some: Iterable[Job], memory: float) -> int:
    """How many of the layers that are next can be solved at once in so much memory, the first of them in any case."""
    needs = itertools.accumulate(job.need(1) for job in some)
    return max(1, sum(1 for _ in itertools.takewhile(lambda need: need <= memory, needs)))
