"""The clock of `speed.py`: time of a solve by stages, of a product, and of other processes meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import threadpoolctl

Float32 = npt.NDArray[np.float32]
#: Quantizes, with so many threads.
Task = Callable[[int], Any]

#: What each stage of a solve consists of. Time within several of these belongs to the innermost.
STAGES = {
    "check": ("comq_np.checks:weights", "comq_np.checks:gram_matrices"),
    "arrange": ("comq_np.layouts:arranged", "comq_np.host:Host.in_users_order"),
    "rounding": ("comq_np.judge:Judge.rounding",),
    "grid": ("comq_np.starts:start_grid",),
    "factor": ("comq_np.feedback:_factor", "comq_np.feedback:_restore"),
    "passes": ("comq_np.starts:Passes.start",),
    "residual": ("comq_np.descent:Descent.__init__",),
    "sweep": ("comq_np.descent:Descent.sweep",),
    "tabu": ("comq_np.descent:Descent.tabu",),
    "refit": ("comq_np.descent:Descent.refit",),
    "proof": ("comq_np.proof:prove",),
    "objective": ("comq_np.judge:Judge.errors", "comq_np.judge:Judge.weights"),
}
#: The stage of all the rest.
OTHER = "other"

#: Where Linux says what the cores do: in ticks, user, nice, system, idle, waiting, interrupts of two kinds, and stolen.
STAT = pathlib.Path("/proc/stat")

#: Seconds before each measurement: OpenBLAS' threads keep their cores busy for some 70 ms after a product.
PAUSE = 0.1
#: Seconds that products are made for to time one: a single one may take less than a thread takes to wake up.
BLOCK = 0.1


class Stopwatch:
    """Seconds of each stage on the thread that made it; time within several stages is the innermost one's.

    What other threads do, this one waits for.
    """

    def __init__(self) -> None:
        self.stages = dict.fromkeys([*STAGES, OTHER], 0.0)
        #: Seconds of the first call of each stage, with all that is within.
        self.first: dict[str, float] = {}
        self._open = [OTHER]
        self._thread = threading.get_ident()
        self._since = 0.0

    def start(self) -> None:
        """Begin to measure."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Book the time since the last lap on the stage that is open; the time now."""
        now = time.perf_counter()
        self.stages[self._open[-1]] += now - self._since
        self._since = now
        return now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as a part of that stage."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            started = self.lap()
            self._open.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.first.setdefault(stage, self.lap() - started)
                self._open.pop()

        return call


def places_of(name: str) -> tuple[Callable[..., Any], list[tuple[Any, str]]]:
    """Function called ``module:name`` or ``module:Class.name``, and all that has it: as an attribute of which name."""
    module, _, path = name.partition(":")
    *parents, attribute = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    function = getattr(owner, attribute)
    if parents:
        return function, [(owner, attribute)]
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "comq_np"]
    return function, [(module, key) for module in modules for key, value in vars(module).items() if value is function]


@contextlib.contextmanager
def watched() -> Iterator[Stopwatch]:
    """Stopwatch that knows when the stages of a solve begin and end."""
    places = [(stage, *places_of(name)) for stage, names in STAGES.items() for name in names]
    watch = Stopwatch()
    with contextlib.ExitStack() as stack:
        for stage, function, owners in places:
            for owner, attribute in owners:
                stack.enter_context(mock.patch.object(owner, attribute, watch.timed(stage, function)))
        yield watch


@dataclasses.dataclass
class Timing:
    """Seconds of every run, each over those of the product just before it, and what the last one returned.

    The stages are those of the fastest.
    """

    runs: list[float] = dataclasses.field(default_factory=list)
    ratios: list[float] = dataclasses.field(default_factory=list)
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    first: dict[str, float] = dataclasses.field(default_factory=dict)
    found: Any = None

    @property
    def seconds(self) -> float:
        """Seconds of the fastest run."""
        return min(self.runs, default=math.inf)

    @property
    def slowest(self) -> float:
        """Seconds of the slowest one."""
        return max(self.runs, default=0.0)

    @property
    def spent(self) -> float:
        """Seconds of all of them together."""
        return sum(self.runs)

    def run(self, task: Task, threads: int) -> None:
        """Run a task once more."""
        time.sleep(PAUSE)
        with watched() as watch:
            watch.start()
            self.found = task(threads)
            watch.lap()
        self.runs.append(sum(watch.stages.values()))
        if self.runs[-1] == self.seconds:
            self.stages, self.first = watch.stages, watch.first

    def run_product(self, W: Float32, G: Float32) -> None:
        """Time the product ``G @ W`` once more."""
        out, number = np.empty_like(W), 0
        time.sleep(PAUSE)
        started = time.perf_counter()
        while (spent := time.perf_counter() - started) < BLOCK or not number:
            np.matmul(G, W, out=out)
            number += 1
        self.runs.append(spent / number)


@contextlib.contextmanager
def limited(threads: int) -> Iterator[None]:
    """Let BLAS, and PyTorch where it is loaded, have so many threads."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    with threadpoolctl.threadpool_limits(threads):
        if torch:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)


def busy_seconds() -> float:
    """Seconds of all cores that processes other than this one have had since the start; NaN but on Linux."""
    if not STAT.exists():
        return math.nan
    user, nice, system, _, _, *rest = map(int, STAT.read_text(encoding="ascii").split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()
