"""What is solved at once: layers or parts of them, next in the file, as many as there are workers and memory for."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol, cast

from comq_np import checks, memory
from comq_np.parts import columns_of, joined
from comq_np.store import CalibrationFile
from comq_np.tasks import Outcome, Piece


@dataclass(frozen=True, eq=False)
class Job:
    """A layer to solve: bits of its codes, shape, its Gram's number and kind, and bytes that it takes by the threads.

    The shape is (b, m, n), with 1 for b where the weights have no such axis.

    Of a layer with very many columns it is a `part` of these, else None. Of a layer that cannot be read there is no
    shape and no Gram, and it takes nothing.
    """

    name: str
    bits: int
    shape: tuple[int, int, int] | None
    gram: int | None
    diagonal: bool
    part: slice | None
    need: Callable[[int], int]


@dataclass(frozen=True)
class Limits:
    """Threads, jobs and bytes at once, each None where that is for the crew to say."""

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
    """Those who solve, and the bytes that jobs may take together."""

    memory: float

    def size(self) -> int:
        """Jobs that can be done at once."""

    def threads(self, at_once: int) -> int:
        """Threads for each of so many jobs at once."""

    def submit(self, job: Job, threads: int) -> Future[Outcome | Piece]:
        """Begin with a job."""

    def outcome(self, future: Future[Outcome | Piece]) -> Outcome | Piece | None:
        """What came of a job; None where it must be submitted once more."""


def jobs(source: CalibrationFile, widths: Mapping[str, int], options: dict[str, Any]) -> list[Job]:
    """Layers to solve at so many bits and with these options of `solve`; the parts of those with very many columns."""
    return [job for name, bits in widths.items() for job in _jobs(source, name, bits, options)]


def _jobs(source: CalibrationFile, name: str, bits: int, options: dict[str, Any]) -> list[Job]:
    try:
        found = source.summary(name)
        shape = found["problems"], found["rows"], found["columns"]
        width, _ = checks.bits_and_levels(bits, options["levels"])
        fit_bias, (size, recipe) = options["fit_bias"] and found["bias"], (options["group_size"], options["recipe"])
        whole = slice(0, shape[2])
        parts = [whole] if found["diagonal"] or found["crossed"] else columns_of(*shape[1:], size)
        widest = max(part.stop - part.start for part in parts)
        codebook, crossed = options.get("codebook", "uniform"), found["crossed"]
        nonlinear = options.get("shrinkage") == "nonlinear"
        how = {"codebook": codebook, "nonlinear": nonlinear, "zero_point": options.get("zero_point", "integer")}
        with_gram = functools.partial(memory.with_gram, shape, width, fit_bias, size, recipe, widest, crossed, **how)
        with_counts = functools.partial(memory.with_counts, *shape[1:], recipe)
        if found.get("groups"):
            with_gram = functools.partial(memory.with_groups, len(found["groups"]), with_gram, shape)
        need = functools.lru_cache(with_counts if found["diagonal"] else with_gram)
        need(1)
    except (checks.FileError, checks.InputError):  # it will be said when the layer is read
        return [Job(name, bits, None, None, False, None, lambda _: 0)]
    diagonal, gram = found["diagonal"], found["gram"]
    return [Job(name, bits, shape, gram, diagonal, None if part == whole else part, need) for part in parts]


def outcomes(jobs: Iterable[Job], crew: Crew) -> Iterator[tuple[str, Outcome]]:
    """Name and outcome of each layer, as soon as it is there.

    Jobs are begun in their order, as many as fit into memory together; one that takes more by itself is done alone.
    Parts of a layer that has failed are not begun any more.
    """
    waiting, running, gathered = deque(jobs), dict[Future[Outcome | Piece], tuple[Job, int]](), Gathered()
    while waiting or running:
        _begin(waiting, running, crew)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, _ = running.pop(future)
            outcome = crew.outcome(future)
            if outcome is None:
                waiting.extendleft([job] * (not gathered.needless(job)))
                continue
            whole = gathered.add(job, outcome)
            if isinstance(outcome, Exception):
                waiting = deque(left for left in waiting if not gathered.needless(left))
            if crew.size() > 1:  # else the caller deals with this one first
                _begin(waiting, running, crew)
            if whole is not None:
                yield job.name, whole


class Gathered:
    """Outcomes of the parts of layers, until there is one of the layer."""

    def __init__(self) -> None:
        self._found: dict[str, dict[int, Any]] = {}
        self._failed: dict[str, int] = {}

    def add(self, job: Job, outcome: Outcome | Piece) -> Outcome | None:
        """Outcome of the layer of a job, once, as soon as it is known: of several errors that of the first part."""
        if job.part is None or job.shape is None:
            return cast(Outcome, outcome)
        if self.needless(job):
            return None
        if isinstance(outcome, Exception):
            self._failed[job.name] = job.part.start
        found = self._found.setdefault(job.name, {})
        found[job.part.start] = outcome
        pieces: list[Any] = []
        for part in columns_of(*job.shape[1:], None):
            piece = found.get(part.start)
            if piece is None:
                return None
            if isinstance(piece, Exception):
                del self._found[job.name]
                return piece
            pieces.append(piece)
        del self._found[job.name]
        return joined(*zip(*pieces, strict=True))

    def needless(self, job: Job) -> bool:
        """Whether a job is a part of a layer of which one before it has failed."""
        return job.part is not None and job.part.start > self._failed.get(job.name, job.part.start)


def _begin(waiting: deque[Job], running: dict[Future[Outcome | Piece], tuple[Job, int]], crew: Crew) -> None:
    """Begin with the jobs that are next, as long as there is room for them."""
    while waiting and (free := crew.size() - len(running)) > 0:
        job, left = waiting[0], crew.memory - sum(need for _, need in running.values())
        threads = crew.threads(len(running) + _fitting(itertools.islice(waiting, free), left))
        while threads > 1 and job.need(threads) > left:
            threads //= 2
        if running and job.need(threads) > left:
            return
        running[crew.submit(waiting.popleft(), threads)] = job, job.need(threads)


def _fitting(some: Iterable[Job], memory: float) -> int:
    """How many of the jobs that are next can be done at once in so much memory, the first of them in any case."""
    needs = itertools.accumulate(job.need(1) for job in some)
    return max(1, sum(1 for _ in itertools.takewhile(lambda need: need <= memory, needs)))
