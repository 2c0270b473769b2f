"""Where the sweeps start, on the device: grids, the factor of the nearest plane, and passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import cuda
from comq_np import grid as grids
from comq_np.descent import MOST_LEVELS, Start, Told, refitted, sums_of_one
from comq_np.feedback import SINGLE
from comq_np.gpu import arrays
from comq_np.gpu.arrays import Array
from comq_np.gpu.problem import DeviceProblem
from comq_np.grid import Candidates, Grid
from comq_np.layouts import Float32, Float64, Real, blocks, mean_diagonal
from comq_np.recipes import Recipe


@dataclass(frozen=True)
class DeviceFeedback:
    """`feedback.Feedback` on the device: U.T below the diagonal of `matrix`, zeros above it, and its `diagonal`."""

    matrix: Array
    diagonal: Float32
    factored: npt.NDArray[np.bool_]
    damping: Float32

    def times(self, error: Array) -> Array:
        """``U.T @ error``, by half a product."""
        made = arrays.empty(error.shape)
        for rows in blocks(error.shape[1], cuda.REACH):
            arrays.multiply(
                self.matrix, error, made, a0=rows.start, c0=rows.start, rows=rows.stop - rows.start, inner=rows.stop
            )
        return made

    def back(self, missed: Array) -> Array:
        """``U @ missed``, by half a product."""
        made = arrays.empty(missed.shape)
        for rows in blocks(missed.shape[1], cuda.REACH):
            arrays.multiply(
                self.matrix,
                missed,
                made,
                a0=rows.start,
                k0=rows.start,
                c0=rows.start,
                rows=rows.stop - rows.start,
                flip=True,
            )
        return made


def gram(problem: DeviceProblem) -> DeviceFeedback:
    """The feedback of COMQ's first sweep."""
    none = np.zeros(len(problem.order), np.float32)
    return DeviceFeedback(problem.G, problem.diagonal, none > 0, none)


def triangular(problem: DeviceProblem, share: float) -> DeviceFeedback:
    """Babai's nearest plane: U with ``U @ U.T = G`` plus a share of its mean diagonal, `gram` where there is none."""
    diagonal = problem.diagonal
    means = mean_diagonal(diagonal)
    damping = (share * np.where(means > 0, means, 1)).astype(np.float32)
    factor, pivots, factored = _factor(problem, damping, np.dtype(np.float32 if share >= SINGLE else np.float64))
    pivots = np.where(factored[:, None], np.where(diagonal == 0, 0, pivots), diagonal).astype(np.float32)
    return DeviceFeedback(factor, pivots, factored, np.where(factored, damping, 0).astype(np.float32))


def _factor(
    problem: DeviceProblem, damping: Float32, real: np.dtype[Any]
) -> tuple[Array, Float32, npt.NDArray[np.bool_]]:
    """``U.T``, the diagonal of U, and which matrices of the batch have one: from the last rows to the first."""
    (b, m), side = problem.order.shape, cuda.CORNER[real]
    factor, work, inverse = (
        arrays.zeros((b, m, m), real),
        arrays.empty((b, side, m), real),
        arrays.empty((b, side, side), real),
    )
    added, diagonal, failed = arrays.upload(damping, real), arrays.empty((b, m)), arrays.zeros((b,), np.int32)
    kernel = cuda.corner(real)
    for corner in reversed(blocks(m, side)):
        start, rows = corner.start, corner.stop - corner.start
        arrays.by_rows(cuda.rows_of, work, problem.G, start, rows, work)
        if corner.stop < m:
            arrays.multiply(
                factor,
                factor,
                work,
                a0=start,
                k0=corner.stop,
                rows=rows,
                columns=corner.stop,
                flip=True,
                subtract_from=True,
            )
        arrays.launch(kernel, b, side, work, start, rows, added, factor, inverse, diagonal, failed)
        if start:
            solved = arrays.empty((b, side, start), real)
            arrays.multiply(inverse, work, solved, rows=rows, inner=rows)
            arrays.by_rows(cuda.put_rows, solved, solved, start, rows, factor)
    if real != np.float32:
        single = arrays.empty((b, m, m))
        arrays.by_rows(cuda.rows_of, single, factor, 0, m, single)
        factor = single
    arrays.by_rows(cuda.fall_back, factor, factor, diagonal, problem.G, failed)
    return factor, arrays.download(diagonal), arrays.download(failed) == 0


@dataclass
class DevicePass:
    """`feedback.Pass` on the device."""

    codes: Array
    error: Array
    targets: Array
    missed: Array
    price: Float64

    def take(self, other: DevicePass, columns: npt.NDArray[np.bool_]) -> None:
        """Replace some columns by those of another pass."""
        chosen = arrays.upload(columns, np.uint8)
        for name in ("codes", "error", "targets", "missed"):
            arrays.by_rows(cuda.take, self.codes, getattr(self, name), getattr(other, name), chosen)
        self.price[columns] = other.price[columns]


def visit(problem: DeviceProblem, grid: Grid, feedback: DeviceFeedback) -> DevicePass:
    """Make the pass for all columns on their grid."""
    shape, found = problem.W.shape, [arrays.empty(problem.W.shape) for _ in range(4)]
    codes, error, targets, missed = found
    diagonal = arrays.upload(feedback.diagonal, np.float32)
    on_grid = problem.on_grid(grid)
    across = -(-shape[2] // cuda.NARROW), shape[0]
    kernel = cuda.visit(grid.scale.shape[1] > 1)
    for rows in blocks(shape[1], cuda.REACH):
        arrays.multiply(
            feedback.matrix, error, targets, a0=rows.start, c0=rows.start, rows=rows.stop - rows.start, inner=rows.start
        )
        arrays.launch(
            kernel,
            across,
            cuda.NARROW,
            problem.W,
            feedback.matrix,
            diagonal,
            *on_grid,
            problem.top,
            rows.start,
            rows.stop,
            targets,
            codes,
            error,
            missed,
        )
    return DevicePass(codes, error, targets, missed, arrays.dots(missed, missed))


def search(
    problem: DeviceProblem, grid: Grid, values: Array, weight: Real, candidates: Candidates
) -> tuple[Grid, Float64]:
    """Candidates around the grid with the least rounding error of the values, weighted by `weight` (b, m).

    Beside it, the share of its error that each column loses by that, (b n,).
    """
    count = len(candidates.factors)
    found = arrays.empty((*grid.scale.shape, count))
    arrays.by_columns(
        cuda.grid_errors,
        values,
        values,
        arrays.upload(weight, np.float32),
        problem.rows_by_group,
        problem.group_size,
        arrays.upload(grid.scale, np.float32),
        arrays.upload(grid.zero_point, np.float32),
        arrays.upload(candidates.factors, np.float32),
        arrays.upload(candidates.shifts, np.float64),
        candidates.middle(problem.levels),
        grid.zero_point.dtype.kind == "i",
        problem.top,
        found,
        others=(-(-count // cuda.TRIALS), grid.scale.shape[1]),
    )
    error = arrays.download(found) * np.square(candidates.factors, dtype=np.float64)
    judged = problem.summed(error)
    return grids.picked(grid, candidates, judged.argmin(axis=2), problem.levels), grids.promised(grid, judged)


@dataclass(frozen=True)
class Passes:
    """Passes over the rows, and the starts that they give."""

    problem: DeviceProblem
    feedback: DeviceFeedback
    steps: Recipe

    def start(self, grid: Grid, rounds: int = 0, suited: bool = False) -> Start:
        """Start from the pass, after so many rounds of refining the grid to suit it, or what can be told before it."""
        grid = grid.copy()
        best = self._refined(grid, rounds, suited)
        return Start(grid, best.codes, self._tell(best, grid))

    def _refined(self, grid: Grid, rounds: int, suited: bool) -> DevicePass:
        problem, feedback = self.problem, self.feedback
        pivots = np.square(feedback.diagonal)
        rows = problem.W.shape[1]
        refining = grids.refining(problem.symmetric, quick=not self.steps.leaps_in(rows))
        sure = feedback.factored.repeat(problem.W.shape[2])
        if rounds or suited:
            weight = np.sqrt(pivots * problem.diagonal)
            for candidates in (refining.rough, refining.close) if rounds else (refining.near,):
                grid.take(search(problem, grid, problem.W, weight, candidates)[0], sure)
        best, least = visit(problem, grid, feedback), self.steps.least_promise(rows)
        for _ in range(rounds):
            refined, promise = search(problem, grid, best.targets, pivots, refining.fine)
            again = visit(problem, refined, feedback)
            better = (problem.summed(again.price) < problem.summed(best.price)) & sure & (promise > least)
            grid.take(refined, better)
            best.take(again, better)
        return best

    def _tell(self, found: DevicePass, grid: Grid) -> Told | None:
        """What a pass tells of residual, objective and size, after a refit of the scale."""
        problem, feedback, steps = self.problem, self.feedback, self.steps
        if not feedback.factored.all() or problem.levels > MOST_LEVELS:
            return None
        single = grid.scale.shape[1] == 1 and not problem.whole and not problem.real
        alive, columns = arrays.upload(problem.diagonal != 0, np.float32), problem.W.shape[2]
        W, error, missed = arrays.empty(problem.W.shape), found.error, found.missed
        arrays.by_rows(cuda.weigh, W, problem.W, alive, W)
        arrays.by_rows(cuda.weigh, error, error, alive, error)
        reached = feedback.times(W)
        damping = feedback.damping.repeat(columns)
        rr, mm = arrays.dots(reached, reached), arrays.dots(missed, missed)
        size = rr - damping.astype(np.float64) * arrays.dots(W, W)
        fits = single and steps.refit == "ends"
        if fits:
            before = grid.scale[:, 0].astype(np.float64)
            grid.scale[:, 0], _ = refitted(grid, 0, sums_of_one(grid, rr, arrays.dots(reached, missed), mm), real=False)
            ratio = arrays.upload(grid.scale[:, 0] / before, np.float32)
            arrays.by_rows(cuda.move_towards, missed, missed, reached, ratio)
            arrays.by_rows(cuda.move_towards, error, error, W, ratio)
            mm = arrays.dots(missed, missed)
        objective, residual = mm - damping.astype(np.float64) * arrays.dots(error, error), None
        if steps.sweeps or steps.leaps or steps.trial:
            residual = feedback.back(missed)
            arrays.by_rows(cuda.subtract, residual, residual, arrays.upload(damping, np.float32), error)
        return Told(objective, size, residual, fits)
