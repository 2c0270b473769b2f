"""A Dask cluster that solves layers. The only module that imports Dask, and only when one is asked for."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

from comq_np import checks, tasks
from comq_np.schedule import Job, Limits
from comq_np.store import CalibrationFile, Path
from comq_np.version import __version__

#: Size of a task from which on Dask warns of it.
LARGE = "distributed.admin.large-graph-warning-threshold"
LOST = "the Dask scheduler was lost"


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Client of the scheduler at that address, None where there is none."""
    if address is None:
        yield None
        return
    try:
        distributed = importlib.import_module("distributed")
    except ModuleNotFoundError:
        what = "needs the package distributed, of the extra `dask`, which is not installed"
        raise checks.InputError(f"`scheduler` {what}.") from None
    try:
        importlib.import_module("distributed.comm").get_address_host_port(address)
    except ValueError as error:
        what = f"must be an address such as tcp://host:8786, got {address!r}: {error}"
        raise checks.InputError(f"`scheduler` {what}.") from None
    with distributed.Client(address) as client:
        yield client


def check(client: Any, options: tasks.Options) -> None:
    """Refuse what is no client, workers that cannot solve, and options that they refuse."""
    distributed = sys.modules.get("distributed")  # who has a client has imported it
    if distributed is None or not isinstance(client, distributed.Client) or client.asynchronous:
        raise checks.InputError(f"`client` must be a dask.distributed.Client that is not asynchronous, got {client!r}.")
    with _asking():
        workers = client.nthreads()
    if not workers:
        warnings.warn("The Dask cluster has no workers yet: the run begins with the first one.", stacklevel=3)
    try:
        client.submit(tasks.check, options, __version__, pure=False).result()
    except CancelledError:
        raise ConnectionError(LOST) from None
    except tasks.StrangerError as error:
        raise _strange(error) from None
    except ImportError as error:
        raise checks.InputError(f"`client` must have workers with comq_np, one says: {error}.") from None


def _strange(error: tasks.StrangerError) -> checks.InputError:
    return checks.InputError(f"`client` must have workers with comq_np {__version__}, one {error}.")


class Cluster(contextlib.AbstractContextManager["Cluster"]):
    """Workers of a Dask cluster that solve layers of a file, for the length of one run: a context.

    They read the file themselves, until one of them does not see it: from then on, layers are sent, and all of one also
    for a part, which chooses the shrinkage by columns of the whole. Dask runs the tasks of a lost worker again. Leaving
    the context cancels what is not finished.
    """

    def __init__(
        self, client: Any, source: CalibrationFile, path: Path, content: str, options: tasks.Options, limits: Limits
    ) -> None:
        self._client, self._source, self._options, self._limits = client, source, options, limits
        self.memory: float = limits.memory or math.inf
        self._path, self._content, self._seen = os.path.abspath(path), content, True
        self._executor = client.get_executor(pure=False)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # of a scheduler that is gone: what led here is the news
            self._executor.shutdown(wait=False)

    def size(self) -> int:
        """Jobs that can be done at once: one on each thread that the workers have for tasks."""
        with _asking():
            found: int = max(1, sum(self._client.nthreads().values()))
        return min(found, self._limits.workers or found)

    def threads(self, at_once: int) -> int:  # noqa: ARG002
        """Threads for each of so many jobs at once."""
        return self._limits.threads or 1

    def submit(self, job: Job, threads: int) -> Future[tasks.Outcome | tasks.Piece]:
        """Begin with a job."""
        read: tasks.Read = tasks.Stored(self._path, self._content, job.name)
        if not self._seen:
            try:
                read = tasks.Given(self._source[job.name])
            except checks.FileError as error:
                return _done(error)
        options = {**self._options, "bits": job.bits, "threads": threads}
        with _asking(), importlib.import_module("dask").config.set({LARGE: "1024 PiB"}):  # it is as large as it is
            future: Future[Any] = self._executor.submit(tasks.attempt, read, options, __version__, job.part)
        return future

    def outcome(self, future: Future[tasks.Outcome | tasks.Piece]) -> tasks.Outcome | tasks.Piece | None:
        """What came of a job; None where the worker did not see the file."""
        try:
            outcome = future.result()
        except CancelledError:
            raise ConnectionError(LOST) from None
        except Exception as error:  # the workers that tried were lost, or what came of it could not be sent
            return error
        if isinstance(outcome, tasks.StrangerError):
            raise _strange(outcome)
        if isinstance(outcome, tasks.UnseenError):
            self._seen = False
            return None
        return outcome


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """Say that the scheduler is lost, where it cannot be asked."""
    try:
        yield
    except Exception as error:
        raise ConnectionError(f"{LOST}: {error}") from error


def _done(outcome: tasks.Outcome) -> Future[tasks.Outcome | tasks.Piece]:
    future: Future[tasks.Outcome | tasks.Piece] = Future()
    future.set_result(outcome)
    return future
