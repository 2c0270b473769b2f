"""The steps of a solve on a GPU: the same as on the host, with the kernels of `cuda`.

Weights, matrix and all that is as large stays on the device. What has one value a column, grids and objectives, comes
to the host, where the same code works on it as for the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from comq_np import checks, cuda, recipes
from comq_np import grid as grids
from comq_np.descent import Solution, Start
from comq_np.feedback import default_damping
from comq_np.gpu import arrays
from comq_np.gpu.arrays import Array
from comq_np.gpu.descent import DeviceDescent
from comq_np.gpu.judge import DeviceJudge
from comq_np.gpu.problem import DeviceProblem, DeviceSolution, form, nearest_objective
from comq_np.gpu.starts import Passes, gram, search, triangular
from comq_np.grid import Candidates, Grid
from comq_np.host import Host, unit_of, visit_order
from comq_np.layouts import Float32, Float64, Real, blocks, by_column, by_row, mean_diagonal
from comq_np.orders import descending
from comq_np.packing import code_type
from comq_np.parallel import Workers
from comq_np.problem import Kind, Problem
from comq_np.proof import Proof, prove
from comq_np.recipes import Recipe
from comq_np.starts import FACTOR_FAILED, beside, neighbours

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Float32 arrays of the size of the weights that a solve has on the device at a time, those of each start besides, and
#: of the size of the matrix, as given, in order, single, shrunk and factored.
ARRAYS, EACH, MATRICES = 14, 2, 7
#: Columns at a time that are worth it.
LEAST = cuda.COLUMNS


def lacking(steps: Recipe, kind: Kind, shape: tuple[int, ...]) -> str | None:
    """Why weights (b, m, n) cannot be solved by these steps here, if they cannot."""
    found = arrays.missing()
    if found:
        return found
    b, m, n = shape
    if steps.paths > 1 or steps.other_orders:
        return f"has no `paths` and no `other_orders`, which the recipe {steps.name!r} has."
    if steps.start == "bitsplit":
        return f"has no `start` 'bitsplit', which the recipe {steps.name!r} has."
    if b > cuda.MOST_PROBLEMS:
        return f"takes at most {cuda.MOST_PROBLEMS} problems in one call, got {b}."
    if m > cuda.MOST_ROWS:
        return f"takes at most {cuda.MOST_ROWS} rows, got {m}."
    if (steps.trial or steps.leaps_in(m)) and m > cuda.MOST_TABU:
        return f"makes tabu searches in at most {cuda.MOST_TABU} rows, got {m}."
    matrices, column, free = *_needed(steps, b, m), arrays.free_bytes()
    least = matrices + column * (n if b > 1 or kind.whole else min(n, LEAST))
    if least > free:
        return f"needs some {least / 2**30:.1f} GiB of the device's memory, where {free / 2**30:.1f} GiB are free."
    return None


def _needed(steps: Recipe, b: int, m: int) -> tuple[int, int]:
    """Bytes for the matrices, and for each column of them."""
    starts = len(steps.grids) * (1 + steps.neighbours)
    return 4 * b * MATRICES * m * m, 4 * b * m * (ARRAYS + EACH * starts)


@dataclass(frozen=True)
class Device:
    """`backend.Backend` on a GPU; what is tiny, the proofs, and checks are done on the host."""

    pool: Workers
    name: str = "cuda"

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results of `function` for each of `items`, in their order."""
        return [function(item) for item in items]

    @contextlib.contextmanager
    def alone(self) -> Iterator[Device]:
        """Backend for one of the functions of `map`."""
        yield self

    def matrices(self, G: Any, problems: int | None, rows: int) -> Array:
        """Gram matrices (b, m, m) on the device, checked; the host looks at any that are not as they should be."""
        if not checks.on_device(G):
            G = checks.gram_numbers(G, problems, rows)
            made = arrays.upload(G, G.dtype)
        else:
            made = arrays.adopted(G)
            if made.dtype not in (np.float32, np.float64) or not made.is_c_contiguous():
                raise checks.InputError(
                    f"`G` must be C-contiguous and of float32 or float64 on the device, got {made.dtype}."
                )
            checks.gram_shape(made.shape, problems, rows)
            made = made.reshape(-1, rows, rows) if made.ndim == 2 else made
        if (arrays.diagonal(made) > 0).all() and arrays.symmetric_and_finite(made):
            return made
        mended = checks.gram_matrices(
            arrays.download(made)[slice(None) if problems else 0], problems, rows, self.pool.map
        )
        return arrays.upload(mended, mended.dtype)

    def parts(self, shape: tuple[int, ...], kind: Kind, steps: Recipe) -> list[slice]:
        """Columns of weights (b, m, n) that fit into the memory of the device at a time."""
        b, m, n = shape
        matrices, column = _needed(steps, b, m)
        most = n if b > 1 or kind.whole else max(LEAST, (arrays.free_bytes() - matrices) // column)
        return blocks(n, -(-n // -(-n // most)))

    def weights(self, columns: Any, some: slice | npt.NDArray[np.intp]) -> Array:
        """Some columns of weights (b, m, n), on the device."""
        if isinstance(columns, np.ndarray):
            return arrays.upload(columns[:, :, some], np.float32)
        numbers = np.arange(columns.shape[2])[some]
        return columns if len(numbers) == columns.shape[2] else _some_columns(columns, numbers)

    def problem(self, columns: Array, matrices: Array, order: str, kind: Kind, overwrite: bool) -> DeviceProblem:
        """Problem with its rows in an order, those of each problem in its own."""
        on_diagonal = arrays.diagonal(matrices)
        unit, rows = unit_of(on_diagonal), _visit_order(matrices, on_diagonal, order)
        twin = None
        if columns.shape[1] <= recipes.MOST_EXACT:
            parts = arrays.download(columns), arrays.download(matrices)
            twin = Host(self.pool).problem(*parts, order, kind, overwrite=False)
        low, high = _extremes(columns, kind)
        W, places = arrays.empty(columns.shape), arrays.upload(rows, np.int32)
        arrays.by_rows(cuda.gather, W, columns, places, W)
        divisor = arrays.upload(unit, matrices.dtype)
        given = arrays.empty(matrices.shape, matrices.dtype)
        arrays.by_rows(cuda.arrange, given, matrices, places, divisor, given)
        G = given if matrices.dtype == np.float32 else arrays.converted(given, np.float32)
        diagonal = np.take_along_axis(on_diagonal, rows, axis=1) / unit[:, None]
        return DeviceProblem(
            W,
            G,
            rows,
            unit,
            *kind,
            given=given,
            low=low,
            high=high,
            on_diagonal=diagonal.astype(np.float32),
            on_host=twin,
        )

    def fold(self, problem: Problem, matrix: Real) -> tuple[Array, Float32, Real | None]:
        """Matrices of one fold, (b, m, m), with their rows in the order of the problem; diagonals; those of a twin."""
        assert isinstance(problem, DeviceProblem)
        twin = None if problem.on_host is None else Host(self.pool).fold(problem.on_host, matrix)
        raw, made = arrays.upload(matrix, np.float32), arrays.empty(matrix.shape)
        arrays.by_rows(
            cuda.arrange,
            made,
            raw,
            arrays.upload(problem.order, np.int32),
            arrays.upload(problem.unit, np.float32),
            made,
        )
        diagonal = np.take_along_axis(np.diagonal(matrix, axis1=1, axis2=2), problem.order, axis=1)
        return made, (diagonal / problem.unit[:, None]).astype(np.float32), twin

    def trial(
        self, problem: Problem, columns: npt.NDArray[np.intp], fold: tuple[Array, Float32, Real | None]
    ) -> DeviceProblem:
        """Some columns of each problem as problems of their own, with the matrices of a fold."""
        assert isinstance(problem, DeviceProblem)
        W = _some_columns(problem.W, columns)
        b, _, n = problem.W.shape
        numbers = (n * np.arange(b)[:, None] + columns).ravel()
        low, high = problem.low[numbers], problem.high[numbers]
        on_host = problem.on_host
        if on_host is not None:
            on_host = dataclasses.replace(on_host, W=np.ascontiguousarray(on_host.W[:, :, columns]))
        return self.with_matrix(dataclasses.replace(problem, W=W, low=low, high=high, on_host=on_host), fold)

    def with_matrix(self, problem: Problem, fold: tuple[Array, Float32, Real | None]) -> DeviceProblem:
        """The same with the matrices of a fold."""
        assert isinstance(problem, DeviceProblem)
        made, diagonal, twin = fold
        on_host = problem.on_host
        if on_host is not None and twin is not None:
            on_host = on_host.with_matrix(twin)
        return dataclasses.replace(problem, G=made, given=made, on_diagonal=diagonal, on_host=on_host)

    def judge(self, problem: Problem, exactly: object, double: bool) -> DeviceJudge:
        """Judge by the matrix of a problem that has not been shrunk yet."""
        assert isinstance(problem, DeviceProblem)
        return DeviceJudge(problem)

    def shrunk(self, problem: Problem, share: float) -> DeviceProblem:
        """The same with a shrunk matrix."""
        assert isinstance(problem, DeviceProblem)
        if not share:
            return problem
        G, diagonal = arrays.copied(problem.G), problem.diagonal
        added = (share * mean_diagonal(diagonal)[:, None] * (diagonal > 0)).astype(np.float32)
        arrays.by_rows(cuda.shrink, G, G, np.float32(share), arrays.upload(added, np.float32))
        shrunk = np.float32(1 - share) * diagonal + added
        twin = None if problem.on_host is None else problem.on_host.shrunk(share)
        return dataclasses.replace(problem, G=G, on_diagonal=shrunk, on_host=twin)

    def start_grid(self, problem: Problem, name: str, candidates: Candidates = grids.SHRINK) -> Grid:
        """Grid called `name`, one of `recipes.GRIDS`; the `candidates` are those of the shrunk one."""
        assert isinstance(problem, DeviceProblem)
        if name == "paper" and problem.whole:
            largest = np.maximum(np.abs(problem.low), np.abs(problem.high)).reshape(problem.W.shape[0], -1)
            return grids.tensor_paper(largest, problem.levels, problem.real, problem.half)
        grid = problem.span.copy()
        if name == "shrunk":
            better, _ = search(problem, grid, problem.W, problem.diagonal, candidates)
            grid.scale, grid.zero_point = better.scale, better.zero_point
        return grid

    def starts(self, problem: Problem, steps: Recipe, given: Grid | None) -> list[Start]:
        """A start from each grid of the recipe, or from the given one."""
        assert isinstance(problem, DeviceProblem)
        candidates = grids.COARSE if steps.start == "babai" else grids.SHRINK
        found = [given] if given else [self.start_grid(problem, name, candidates) for name in steps.grids]
        if steps.start == "float" and steps.sweeps:
            return [Start(grid, arrays.empty((0,)), real=True) for grid in found]
        if steps.start in ("float", "rounding"):
            return [Start(grid, problem.codes_on(grid)) for grid in found]
        if steps.start == "gram":
            passes = Passes(problem, gram(problem), steps)
        else:
            share = default_damping(problem.levels) if steps.damping is None else steps.damping
            passes = Passes(problem, triangular(problem, share), steps)
            if not passes.feedback.factored.all():
                for grid in found:
                    grid.notes.append(FACTOR_FAILED)
        if given or not passes.feedback.factored.any():
            return [passes.start(grid) for grid in found]
        named = zip(found, steps.grids, strict=True)
        searched = [passes.start(grid, steps.search, suited=name == "shrunk") for grid, name in named]
        others = [beside(problem, one.grid, move) for one in searched for move in neighbours(problem, steps)]
        return searched + [passes.start(grid) for grid in others]

    def greedy(self, problem: Problem) -> Array:
        """Rows (b n, m) of each column in its own order."""
        order, size = (
            arrays.empty((problem.count, problem.W.shape[1]), np.int32),
            np.sqrt(problem.diagonal, dtype=np.float64),
        )
        arrays.a_block_each(cuda.order_rows, problem.W, cuda.ROW, problem.W, arrays.upload(size, np.float64), order)
        return order

    def rounded(self, problem: Problem, grid: Grid) -> Array:
        """Nearest codes on a grid."""
        assert isinstance(problem, DeviceProblem)
        return problem.codes_on(grid)

    def nearest_objective(self, problem: Problem, grid: Grid) -> Float64:
        """Objective of plain rounding on a grid."""
        assert isinstance(problem, DeviceProblem)
        return nearest_objective(problem, grid)

    def solution(self, codes: Array, grid: Grid, objective: Float64) -> DeviceSolution:
        """Solution of that objective."""
        return DeviceSolution(codes, grid, objective)

    def measured(self, problem: Problem, codes: Array, grid: Grid) -> DeviceSolution:
        """Solution with its objective computed from scratch."""
        assert isinstance(problem, DeviceProblem)
        return DeviceSolution(codes, grid, form(problem.G, problem.errors_of(codes, grid)))

    def descent(
        self, problem: Problem, start: Start, size: Float64 | None = None, rounding: Float64 | None = None
    ) -> DeviceDescent:
        """Descent from a start."""
        assert isinstance(problem, DeviceProblem)
        return DeviceDescent(problem, start, size, rounding)

    def prove(self, problem: Problem, refit: bool, best: Solution) -> Proof:
        """Turn a solution into the best codes at its scales, on the host: the problem is tiny."""
        assert isinstance(problem, DeviceProblem)
        assert problem.on_host is not None
        codes, shape = arrays.download(best.codes), problem.W.shape
        here = Solution(by_column(codes), best.grid, best.objective)
        proof = prove(problem.on_host, refit, here, self.pool)
        best.codes = arrays.upload(by_row(here.codes, shape[0]), np.float32)
        best.grid, best.objective = here.grid, here.objective
        return proof

    def round_dead_rows(self, problem: Problem, best: Solution) -> int:
        """Round the rows whose input is always zero on the final grid; the number of rows."""
        assert isinstance(problem, DeviceProblem)
        dead = problem.diagonal == 0
        if dead.any():
            marks = arrays.upload(dead, np.uint8)
            arrays.by_rows(
                cuda.encode, problem.W, problem.W, *problem.on_grid(best.grid), problem.top, marks, best.codes
            )
        return int(dead.sum())

    def in_users_order(self, problem: Problem, codes: Array, bits: int) -> npt.NDArray[Any]:
        """Codes (b, m, n) as integers, rows in the order of the given weights."""
        whole = code_type(bits)
        made = arrays.empty(problem.W.shape, whole)
        kernel = cuda.scatter(np.dtype(whole))
        arrays.by_rows(kernel, codes, codes, arrays.upload(problem.order, np.int32), made)
        return arrays.download(made)


def _some_columns(W: Array, columns: npt.NDArray[np.intp]) -> Array:
    """Some columns of each problem, whose weights are on the device."""
    made = arrays.empty((*W.shape[:2], len(columns)))
    arrays.by_rows(cuda.some_columns, made, W, arrays.upload(columns, np.int32), made)
    return made


def _visit_order(matrices: Array, diagonal: Real, order: str) -> npt.NDArray[np.intp]:
    """Row that is visited first, and so on, (b, m)."""
    if order == "shared":
        return descending(diagonal)
    return visit_order(arrays.download(matrices) if order == "pivoted" else diagonal[:, :, None], order)


def _extremes(W: Array, kind: Kind) -> tuple[Float64, Float64]:
    """Least and greatest weight of each group of each column, (b n, groups), of weights in the users' order."""
    b, m, n = W.shape
    groups = math.ceil(m / kind.group_size)
    low, high = arrays.empty((b * n, groups)), arrays.empty((b * n, groups))
    arrays.by_columns(cuda.extremes, W, W, kind.group_size, low, high, others=(groups,))
    return arrays.download(low).astype(np.float64), arrays.download(high).astype(np.float64)
