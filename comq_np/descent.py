"""Coordinate descent: codes and scales of all columns, from one grid (paper, algorithms 1 and 2).

Codes and residuals have a row for each column. With q = codes - zero_point and R = (W - Wq) G, the best value of one
coordinate, all else fixed, is ``round(q_i + R_i / (d G_ii))``, clipped; and a group's best scale is ``d + q.R / q.G.q``
with q zero outside the group, which for one group a column is the paper's qᵀGw / qᵀGq. A zero point that may be any
real number is refitted with it: least squares in the two directions q and u, the group's ones.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from comq_np import kernels
from comq_np.checks import MAX_ZERO_POINT
from comq_np.grid import Grid, ZeroPoint, stored
from comq_np.layouts import Float32, Float64, dots
from comq_np.parallel import Workers
from comq_np.problem import Problem, Tile

#: A scale that a refit moves by less than this (relative) is at its best, and a zero point by this of a code.
STILL = 1e-6
#: With more codes, what is left of a weight by a pass, or by its real code, is lost beside it in single precision.
MOST_LEVELS = 256
#: Most refits in a row.
MOST_REFITS = 20
#: Two directions with less room than this between them (squared sine) are taken for one.
FLAT = 1e-6


@dataclass
class Solution:
    """Codes (b n, m), whole numbers, on a grid, with each column's objective (b n,)."""

    codes: Float32
    grid: Grid
    objective: Float64

    def copy(self) -> Solution:
        """Return a solution that shares no memory with this one."""
        return Solution(self.codes.copy(), self.grid.copy(), self.objective.copy())

    def take(self, other: Solution, columns: npt.NDArray[np.bool_]) -> None:
        """Replace some columns by those of another solution."""
        self.codes[columns] = other.codes[columns]
        self.grid.take(other.grid, columns)
        self.objective[columns] = other.objective[columns]


@dataclass
class Told:
    """What a pass tells of the codes that it gave: their `objective` and the `size` of the weights, wᵀGw, (b n,).

    There is their `residual` (b n, m), too, where sweeps may need it; and the scale may be `refitted`.
    """

    objective: Float64
    size: Float64
    residual: Float32 | None
    refitted: bool


@dataclass
class Start:
    """Grid, and codes (b n, m) on it, with what is `told` of them.

    With `real`, they are the real codes that stand for the weights exactly, which the descent puts in.
    """

    grid: Grid
    codes: Float32
    told: Told | None = None
    real: bool = False

    @property
    def size(self) -> Float64 | None:
        """Size of the weights, wᵀGw (b n,), if it is known."""
        return None if self.told is None else self.told.size

    @property
    def refitted(self) -> bool:
        """Whether the scale is the best for the codes."""
        return self.told is not None and self.told.refitted


class Descent:
    """The sweeps from one start: `solution` after the last one, and how many codes it `changed` in each column (b n,).

    `start` (b n,) is the objective that the first sweep starts from; with real codes, which have none, that of plain
    rounding. The arrays of the start become those of the descent. The `size` of the weights, and the objective of plain
    `rounding` on the grid of the start, may be known otherwise.
    """

    def __init__(
        self,
        problem: Problem,
        start: Start,
        pool: Workers,
        size: Float64 | None = None,
        rounding: Float64 | None = None,
    ) -> None:
        self.problem, self.pool = problem, pool
        self.changed = np.zeros(problem.count, dtype=np.int64)
        self.converged = False
        self._real, self._size = start.real, start.size if size is None else size
        told, residual = start.told, None if start.told is None else start.told.residual
        self.solution = Solution(start.codes, start.grid, np.zeros(problem.count) if told is None else told.objective)
        self.residual = np.zeros(start.codes.shape, np.float32) if residual is None else residual
        if start.real:
            pool.map(self._begin, problem.tiles)
            self.start = nearest_objective(problem, start.grid, pool) if rounding is None else rounding
            return
        if residual is None:
            pool.map(self._measure, problem.tiles)
        self.start = self.solution.objective.copy()

    def _begin(self, tile: Tile) -> None:
        """Put in the real codes of the weights, which have no error but for their last digit, that of the greatest."""
        grid, digit = self.solution.grid.part(tile.where), float(np.spacing(self.problem.top))
        self.solution.codes[tile.where] = self.problem.encoded(grid, tile, digit)

    def sweep(self, order: npt.NDArray[np.int32] | None) -> None:
        """Visit every coordinate once, in the order (b n, m) of each column or from the first row to the last."""
        self.pool.map(lambda tile: self._visit(tile, order), self.problem.tiles)
        self.converged = not self._real and not self.changed.any()  # each real code has been decided beside real ones
        if self._real and self.problem.levels > MOST_LEVELS:
            self.pool.map(self._measure, self.problem.tiles)
        self._real = False

    def tabu(self, moves: int) -> None:
        """Leave the minimum that the sweeps have reached, for a lower one that is that many moves away at most."""
        self.pool.map(lambda tile: self._tabu(tile, moves), self.problem.tiles)
        self.converged = False

    def _tabu(self, tile: Tile, moves: int) -> None:
        problem, where = self.problem, tile.where
        kernels.tabu_search(
            self.solution.codes[where],
            self.residual[where],
            problem.G[tile.problems],
            problem.inverse_diagonal[tile.problems] > 0,
            np.array(problem.spread(self.solution.grid.scale[where], tile), order="C"),
            problem.top,
            moves,
            self.changed[where],
            self.solution.objective[where],
        )

    def _measure(self, tile: Tile) -> None:
        """Compute residual and objective from scratch."""
        now, where = self.solution, tile.where
        error = self.problem.errors(now.codes[where], now.grid.part(where), tile)
        residual = tile.split(error) @ self.problem.G[tile.problems]
        self.residual[where] = residual.reshape(error.shape)
        now.objective[where] = dots(error, self.residual[where])

    def _visit(self, tile: Tile, order: npt.NDArray[np.int32] | None) -> None:
        now, where, problems, top = self.solution, tile.where, tile.problems, self.problem.top
        arrays = now.codes[where], self.residual[where], self.problem.G[problems]
        rows = self.problem.inverse_diagonal[problems], now.grid.scale[where], self.problem.group[problems]
        if order is None:
            kernels.sweep_rows(*arrays, *rows, top, self.changed[where], now.objective[where])
        else:
            kernels.sweep(*arrays, *rows, order[where], top, self.changed[where], now.objective[where])

    def refit(self, last: bool = False) -> None:
        """Refit the grid in closed form, one group after the other, the others held.

        The `last` refit, after which nothing asks for the residual, leaves it behind if that saves a product.
        """
        before = self.solution.grid.copy()
        groups = before.scale.shape[1]
        size = self._size if last and groups == 1 and not self.problem.real else None
        if last and size is None:  # without what rounding has left in the residual
            self.pool.map(self._measure, self.problem.tiles)
        for g in range(groups):
            by_size = None if size is None else functools.partial(self._last_terms, size=size)
            terms = self.pool.map(by_size or functools.partial(self._terms, g=g), self.problem.tiles)
            sums = self.problem.pooled(self.problem.tiles, [part.sums.T for part in terms])
            for tile, part, total in zip(self.problem.tiles, terms, sums, strict=True):
                self._regrid(tile, g, part, *refitted(before.part(tile.where), g, total.T, self.problem.real))
        self.converged &= self.solution.grid.near(before, STILL)

    def refit_to_rest(self) -> None:
        """Refit until no group of a column moves the scale of another any more."""
        for _ in range(MOST_REFITS):
            self.converged = True
            self.refit()
            if self.converged:
                break

    def _last_terms(self, tile: Tile, size: Float64) -> Terms:
        """Terms for a single group from what is there."""
        where = tile.where
        wR = dots(self.problem.weights_by_column(tile), self.residual[where])
        sums = sums_of_one(self.solution.grid.part(where), size[where], wR, self.solution.objective[where])
        return Terms(sums, None, None)

    def _terms(self, tile: Tile, g: int) -> Terms:
        """What a refit of group g of each column of a tile needs to know."""
        problem, where, G = self.problem, tile.where, self.problem.G[tile.problems]
        grid, codes, residual = self.solution.grid.part(where), self.solution.codes[where], self.residual[where]
        offset, rows = grid.zero_point[:, g, None], None
        if grid.scale.shape[1] == 1:  # from what is there: d G q = G w - R
            q, R = (codes - offset).astype(np.float32), residual
            Gq = here = (problem.weight_products(tile) - residual) / grid.scale
        else:
            rows = problem.by_group[tile.problems][:, g * problem.group_size : (g + 1) * problem.group_size]
            q, R = (_rows(codes, rows) - offset).astype(np.float32), _rows(residual, rows)
            G = np.take_along_axis(G, rows[:, :, None], axis=1)
            Gq = (tile.split(q) @ G).reshape(codes.shape)
            here = _rows(Gq, rows)
        sums = np.zeros((5, len(codes)))
        sums[0], sums[1] = dots(q, R), dots(q, here)
        if not problem.real:
            return Terms(sums, Gq, None)
        Gu = G.sum(axis=1, dtype=np.float64)
        uGu = Gu if rows is None else np.take_along_axis(Gu, rows, axis=1)
        sums[2], sums[3] = R.sum(axis=1, dtype=np.float64), here.sum(axis=1, dtype=np.float64)
        sums[4] = uGu.sum(axis=1).repeat(tile.shape[1])
        return Terms(sums, Gq, Gu)

    def _regrid(self, tile: Tile, g: int, terms: Terms, scale: Float32, zero_point: ZeroPoint) -> None:
        """Put a new scale and zero point in, and follow with residual and objective."""
        now, where, (qR, qGq, uR, uGq, uGu) = self.solution, tile.where, terms.sums
        offset = scale.astype(np.float64) * (now.grid.zero_point[where, g].astype(np.float64) - zero_point)
        change = scale.astype(np.float64) - now.grid.scale[where, g]
        now.grid.scale[where, g], now.grid.zero_point[where, g] = scale, zero_point
        now.objective[where] += change * (change * qGq - 2 * qR) + offset * (offset * uGu + 2 * change * uGq - 2 * uR)
        if terms.Gq is not None:
            self.residual[where] -= change.astype(np.float32)[:, None] * terms.Gq
        if terms.Gu is not None:
            moved = tile.split(offset.astype(np.float32))[:, :, None] * terms.Gu.astype(np.float32)[:, None]
            self.residual[where] -= moved.reshape(len(offset), -1)


def nearest_objective(problem: Problem, grid: Grid, pool: Workers) -> Float64:
    """Objective (b n,) of plain rounding on a grid."""

    def of_tile(tile: Tile) -> Float64:
        part = grid.part(tile.where)
        return problem.objective(problem.nearest(part, tile), part, tile)

    return np.concatenate(pool.map(of_tile, problem.tiles))


def measured(problem: Problem, codes: Float32, grid: Grid, pool: Workers) -> Solution:
    """Solution with its objective computed from scratch."""

    def of_tile(tile: Tile) -> Float64:
        return problem.objective(codes[tile.where], grid.part(tile.where), tile)

    return Solution(codes, grid, np.concatenate(pool.map(of_tile, problem.tiles)))


def winner(problem: Problem, objectives: list[Float64]) -> npt.NDArray[np.intp]:
    """Number of the least objective, for each column; one for all if they share the scale."""
    stacked = np.stack(objectives)
    if problem.whole:
        apart = stacked.reshape(len(stacked), problem.W.shape[0], -1).sum(axis=2)
        stacked = apart.repeat(problem.W.shape[2], axis=1)
    winner: npt.NDArray[np.intp] = stacked.argmin(axis=0)
    return winner


class Terms(NamedTuple):
    """What a refit needs, for q = codes - zero_point and u = 1 on the rows of one group, both zero outside.

    The `sums` (5, k c) are q.R, q.G.q, u.R, u.G.q and u.G.u of each column, the last three 0 without a real zero point;
    then there are, where the residual is to follow, G q (k c, m) and, with a real zero point, G u (k, m).
    """

    sums: Float64
    Gq: Float32 | None
    Gu: Float64 | None


def sums_of_one(grid: Grid, ww: Float64, we: Float64, ee: Float64) -> Float64:
    """Sums for a single group from wᵀGw, wᵀGe and eᵀGe of each column, with e = w - d q."""
    sums, scale = np.zeros((5, len(ww))), grid.scale[:, 0].astype(np.float64)
    sums[0], sums[1] = (we - ee) / scale, (ww - 2 * we + ee) / scale**2
    return sums


def refitted(grid: Grid, g: int, sums: Float64, real: bool) -> tuple[Float32, ZeroPoint]:
    """Scale and zero point of group g that minimise the objective; where that is no positive scale, the old ones.

    Along q and u the error changes by ``a q + b u``: a is that of the scale, -b / scale that of the zero point.
    """
    qR, qGq, uR, uGq, uGu = sums
    a, b = np.zeros_like(qR), np.zeros_like(qR)
    np.divide(qR, qGq, out=a, where=qGq > 0)
    if real:
        room = qGq * uGu - uGq * uGq
        sure = room > FLAT * qGq * uGu
        np.divide(qR * uGu - uR * uGq, room, out=a, where=sure)
        np.divide(uR * qGq - qR * uGq, room, out=b, where=sure)
    scale, zero_point = grid.scale[:, g], grid.zero_point[:, g]
    wanted = scale + a
    better, fits = stored(wanted, grid.half), wanted.astype(np.float32) >= np.finfo(np.float32).tiny
    if real and grid.half:  # what suits the scale as it is stored
        np.divide(uR - (better - scale.astype(np.float64)) * uGq, uGu, out=b, where=sure)
    moved = zero_point - np.divide(b, better, out=np.zeros_like(b), where=fits)
    fits &= np.abs(moved) <= MAX_ZERO_POINT
    kept = moved.astype(zero_point.dtype) if real else zero_point
    return np.where(fits, better, scale), np.where(fits, kept, zero_point)


def _rows(values: npt.NDArray[np.float32], rows: npt.NDArray[np.intp]) -> Float32:
    """Some rows (k, s) of values (k c, m): (k c, s)."""
    return np.take_along_axis(values, rows.repeat(len(values) // len(rows), axis=0), axis=1)
