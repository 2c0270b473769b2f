"""Compare the CUDA backend with the CPU on this machine's GPU, and its speed with what the GPU can do.

    python benchmarks/gpu_check.py --json gpu.json

First, problems of every kind are solved on both: `difference` is that of the objectives, relative, and `codes_differ`
the share of codes that are not the same, as they may not be at ties of rounding. It ends with exit status 1 if an
objective differs by more than 1e-5 where only ties of rounding can differ (no grid was searched), or is worse by more
than 1e-3 elsewhere: a tie may choose another of two grids that are as good.

Then whole solves of made-up layers are timed, once all is compiled: from arrays of NumPy, and where CuPy is installed
from arrays that are on the GPU (`in_place`). `products` is the time over that of one float32 product ``G @ W``, by
cuBLAS where CuPy is installed, else by our own kernel. Last come the kernels of one such solve, by events of the GPU:
`launches`, the time of all of them in products, and its floors: `of_bandwidth` is the time to move all the arrays that
the kernel is given, once, at the rate at which the GPU copies, and `of_arithmetic` that of its operations, where their
number is known beforehand, at the rate of the product, both over the time it took.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from tqdm import tqdm

import comq_np
import problems
from comq_np import cuda
from comq_np.gpu import arrays
from comq_np.table import Figures

#: Shapes that are solved on both sides, (m, n) or (b, m, n), and arguments of `solve`.
CHECKS: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((64, 32), {}),
    ((300, 70), {}),
    ((512, 130), {}),
    ((1025, 257), {}),
    ((2048, 384), {}),
    ((8200, 32), {}),
    ((672, 9, 1), {}),
    ((24, 80, 12), {}),
    ((300, 70), {"group_size": 128}),
    ((300, 70), {"group_size": "tensor"}),
    ((300, 70), {"zero_point": "real"}),
    ((300, 70), {"symmetric": True}),
    ((300, 70), {"shrinkage": 0.05}),
)
NAMES = ("rtn", "paper", "fast", "balanced")
#: Without a search for the grid, the objectives differ by ties of rounding only.
UNSEARCHED = ("rtn", "paper")
CLOSE, NOT_WORSE = 1e-5, 1e-3
#: Sizes M x M that are timed, runs of each, and elements of the copy that tells the bandwidth.
SIZES, RUNS, COPIED = (512, 1024, 2048, 4096), 5, 2**27
BITS = 4


def layer(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Weights and Gram matrices."""
    *batch, m, n = shape
    if not batch:
        return problems.weights(m, n), problems.matrix(m)
    made = [(problems.weights(m, n, seed), problems.matrix(m, seed)) for seed in range(*batch)]
    W, G = map(np.stack, zip(*made, strict=True))
    return W, G


def check(figures: Figures) -> bool:
    """Solve on both sides; whether they agree."""
    agree = True
    for shape, arguments in tqdm(CHECKS, unit="problem"):
        W, G = layer(shape)
        for name in NAMES:
            one, other = (
                comq_np.solve(W, G, BITS, recipe=name, backend=where, **arguments) for where in ("cpu", "cuda")
            )
            difference = other.report.objective / one.report.objective - 1
            fine = abs(difference) <= CLOSE if name in UNSEARCHED else difference <= NOT_WORSE
            agree &= fine
            case = "x".join(map(str, shape)) + "".join(f" {key}={value}" for key, value in arguments.items())
            differ = float((one.codes != other.codes).mean())
            figures.add(case, BITS, name, difference=difference, codes_differ=differ, agrees=fine)
    return agree


def event_seconds(run: Callable[[], object]) -> float:
    """Time of the fastest run, by events of the GPU."""
    run()
    best = math.inf
    for _ in range(RUNS):
        started, ended = cuda.toolkit.event(), cuda.toolkit.event()
        started.record()
        run()
        ended.record()
        ended.synchronize()
        best = min(best, cuda.toolkit.event_elapsed_time(started, ended) / 1e3)
    return best


def wall_seconds(run: Callable[[], object]) -> float:
    """Time of the fastest run of what ends with its result on the host."""
    run()
    best = math.inf
    for _ in range(RUNS):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def bandwidth() -> float:
    """Bytes a second, read and written, of a copy."""
    source, target = arrays.zeros((COPIED,)), arrays.zeros((COPIED,))
    return 2 * 4 * COPIED / event_seconds(lambda: target.copy_to_device(source))


@dataclasses.dataclass
class Launches:
    """All launches of a kernel: their events, and the bytes and operations that they have at least."""

    events: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)
    bytes: float = 0.0
    operations: float = 0.0

    def timed(self, run: Callable[[], object], arrays: tuple[Any, ...], operations: float) -> None:
        """Run between two events."""
        pair = cuda.toolkit.event(), cuda.toolkit.event()
        pair[0].record()
        run()
        pair[1].record()
        self.events.append(pair)
        self.bytes += sum(array.nbytes for array in arrays if hasattr(array, "nbytes") and hasattr(array, "strides"))
        self.operations += operations

    @property
    def seconds(self) -> float:
        return sum(cuda.toolkit.event_elapsed_time(*pair) for pair in self.events) / 1e3


class Watched:
    """A kernel that books its launches."""

    def __init__(self, kernel: Any, launches: Launches, operations: Callable[..., float]) -> None:
        self.kernel, self.launches, self.operations = kernel, launches, operations

    def __getitem__(self, how: Any) -> Callable[..., None]:
        configured = self.kernel[how]

        def launch(*arguments: Any) -> None:
            self.launches.timed(lambda: configured(*arguments), arguments, self.operations(*arguments))

        return launch


def of_search(values: Any, *others: Any) -> float:
    """Operations of the kernel `grid_errors`."""
    *_, found = others
    return 8.0 * found.size * values.shape[1] / found.shape[1]


def of_order(W: Any, *_: Any) -> float:
    """Operations of the kernel `order_rows`."""
    return 2.0 * W.size * W.shape[1]


def of_product(_: Any, B: Any, C: Any, **parts: Any) -> float:
    """Operations of `cuda.multiply`."""
    rows = parts.get("rows") or C.shape[1]
    inner = parts["inner"] if "inner" in parts else B.shape[1] - parts.get("k0", 0)
    return 2.0 * C.shape[0] * rows * inner * (parts.get("columns") or C.shape[2])


OPERATIONS = {"grid_errors": of_search, "order_rows": of_order}
#: Functions of `cuda` that make a kernel.
MAKERS = ("sweep", "tabu", "visit", "corner", "scatter", "errors")


@contextlib.contextmanager
def watched() -> Iterator[dict[str, Launches]]:
    """Book what is launched."""
    found: dict[str, Launches] = collections.defaultdict(Launches)

    def kernel(name: str, one: Any) -> Watched:
        return Watched(one, found[name], OPERATIONS.get(name, lambda *_: 0.0))

    def maker(name: str, make: Callable[..., Any]) -> Callable[..., Watched]:
        return lambda *arguments: kernel(name, make(*arguments))

    def multiply(*arguments: Any, **parts: Any) -> None:  # may launch something else than a kernel of ours
        operations = of_product(*arguments, **parts)
        found["multiply"].timed(lambda: product(*arguments, **parts), arguments, operations)

    product = arrays.multiply
    kernels = {one.kernel for one in cuda.KERNELS.values()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(arrays, "multiply", multiply))
        for name, value in list(vars(cuda).items()):
            if name in MAKERS:
                stack.enter_context(mock.patch.object(cuda, name, maker(name, value)))
            elif any(value is one for one in kernels):
                stack.enter_context(mock.patch.object(cuda, name, kernel(name, value)))
        yield found


def time_size(figures: Figures, size: int, rate: float, names: list[str]) -> None:
    """Add the times of solves of a square layer."""
    W, G = problems.weights(size, size), problems.matrix(size)
    case = f"{size}x{size}"
    parts = [arrays.upload(values[None], np.float32) for values in (G, W)]
    out = arrays.empty(parts[1].shape)
    unit = event_seconds(lambda: arrays.multiply(*parts, out))
    figures.add(case, BITS, "product", seconds=unit, products=1.0, tflops=2 * size**3 / unit / 1e12)
    there = [arrays.cupy.asarray(values) for values in (W, G)] if arrays.cupy else None
    for name in names:
        spent = wall_seconds(lambda name=name: comq_np.solve(W, G, BITS, recipe=name, backend="cuda"))
        placed = there and wall_seconds(lambda name=name: comq_np.solve(*there, BITS, recipe=name))
        inside = {"in_place_seconds": placed, "in_place_products": placed / unit} if placed else {}
        figures.add(case, BITS, f"solve {name}", seconds=spent, products=spent / unit, **inside)
    for name in names:
        with watched() as launches:
            comq_np.solve(*(there or (W, G)), BITS, recipe=name, backend="cuda")
        add_kernels(figures, f"{case} {name}", launches, unit, rate, 2 * size**3 / unit)


def add_kernels(
    figures: Figures, case: str, launches: dict[str, Launches], unit: float, rate: float, arithmetic: float
) -> None:
    """Add the kernels of a solve, the slowest first."""
    used = {name: found for name, found in launches.items() if found.events}
    for name, found in sorted(used.items(), key=lambda item: -item[1].seconds):
        figures.add(
            case,
            BITS,
            name,
            launches=len(found.events),
            seconds=found.seconds,
            products=found.seconds / unit,
            of_bandwidth=found.bytes / rate / found.seconds,
            of_arithmetic=found.operations / arithmetic / found.seconds,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="*", type=int, default=list(SIZES), metavar="M", help="sizes M x M to time")
    parser.add_argument("--recipe", nargs="+", default=["fast", "balanced", "paper"], help="recipes to time")
    parser.add_argument("--skip-checks", action="store_true", help="time only")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    lacking = arrays.missing()
    if lacking:
        raise SystemExit(f"gpu_check {lacking}")

    card, rate = cuda.toolkit.get_current_device(), bandwidth()
    name = card.name.decode() if isinstance(card.name, bytes) else card.name
    print(f"{name}, compute capability {'.'.join(map(str, card.compute_capability))}; copies {rate / 1e12:.2f} TB/s")
    print(f"NumPy {np.__version__}; products by {'cuBLAS (CuPy)' if arrays.cupy else 'our own kernel'}\n")
    figures = Figures()
    agree = options.skip_checks or check(figures)
    for size in tqdm(options.size, unit="size"):
        time_size(figures, size, rate, options.recipe)
    figures.show(options.json)
    if not agree:
        sys.exit(1)


if __name__ == "__main__":
    main()
