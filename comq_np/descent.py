"""Coordinate descent: codes and scales of all columns, from one grid (paper, algorithms 1 and 2).

Codes and residuals have a row for each column. With q = codes - zero_point and R = (W - Wq) G, the best value of one
coordinate, all else fixed, is ``round(q_i + R_i / (d G_ii))``, clipped; and a group's best scale is ``d + q.R / q.G.q``
with q zero outside the group, which for one group a column is the paper's qᵀGw / qᵀGq. A zero point that may be any
real number is refitted with it: least squares in the two directions q and u, the group's ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from comq_np import kernels
from comq_np.checks import MAX_ZERO_POINT
from comq_np.grid import Grid, ZeroPoint
from comq_np.layouts import Float32, Float64, Real, dots, rows_of
from comq_np.parallel import Workers
from comq_np.problem import Problem, Tile

#: A scale that a refit moves by less than this (relative) is at its best, and a zero point by this of a code.
STILL = 1e-6
#: With more codes, what is left of a weight by a pass, or by its real code, is lost beside it in single precision.
MOST_LEVELS = 256
#: Most refits in a row.
MOST_REFITS = 20
#: Rows and groups that are refitted at a time, at most, unless a single group has more rows.
ROWS_AT_ONCE, GROUPS_AT_ONCE = 128, 8


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
        self.problem.encode(grid, tile, digit, self.solution.codes[tile.where])

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
        error = self._follow(tile)
        self.solution.objective[tile.where] = dots(error, self.residual[tile.where])

    def _follow(self, tile: Tile) -> Float32:
        """Compute the residual from scratch, and return the error."""
        error, residual = self._error(tile), tile.split(self.residual[tile.where])
        np.matmul(tile.split(error), self.problem.G[tile.problems], out=residual)
        return error

    def _error(self, tile: Tile) -> Float32:
        """``W - Wq`` of a tile, (k c, m), until this thread asks for the next one."""
        grid, codes = self.solution.grid.part(tile.where), self.solution.codes[tile.where]
        return self.problem.errors(codes, grid, tile, self.pool.scratch("error", *codes.shape))

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
        if before.scale.shape[1] > 1:
            self.pool.map(functools.partial(self._refit_groups, last=last), self.problem.tiles)
        else:
            self._refit_one(last)
        self.converged &= self.solution.grid.near(before, STILL)

    def _refit_one(self, last: bool) -> None:
        """Refit the only group of each column."""
        tiles, size = self.problem.tiles, None
        if last and self.problem.double is None:
            size = None if self.problem.real else self._size
            if size is None:  # without what rounding has left in the residual
                self.pool.map(self._measure, tiles)
        terms_of = self._terms if size is None else functools.partial(self._last_terms, size=size)
        terms = self.pool.map(terms_of, tiles)
        sums = self.problem.pooled(tiles, [part.sums.T for part in terms])
        self.pool.map(self._regrid, list(zip(tiles, sums, terms, strict=True)))

    def _refit_groups(self, tile: Tile, last: bool) -> None:
        """Refit the groups of the columns of a tile; the residual follows in the end, all groups at once."""
        problem, grid, size = self.problem, self.solution.grid.part(tile.where), self.problem.group_size
        if problem.double is None:
            error: Real = self._error(tile)
        else:
            error = problem.double_errors(self.solution.codes[tile.where], grid, tile)
        at_once = groups_at_once(size)
        for first in range(0, grid.scale.shape[1], at_once):
            self._refit_some(tile, slice(first, first + at_once), error)
        if not last:
            self._follow(tile)

    def _refit_some(self, tile: Tile, groups: slice, error: Real) -> None:
        """Refit some groups, one after the other, and follow with the error: ``G e`` in their rows is all it takes."""
        problem, size, grid = self.problem, self.problem.group_size, self.solution.grid.part(tile.where)
        codes, objective = self.solution.codes[tile.where], self.solution.objective[tile.where]
        rows = problem.by_group[tile.problems][:, groups.start * size : groups.stop * size]
        G = problem.finest(tile)[np.arange(len(rows))[:, None], rows]
        square = rows_of(G.reshape(-1, G.shape[2]), rows).reshape(*rows.shape, -1)
        residual = (tile.split(error) @ G.transpose(0, 2, 1)).reshape(len(codes), -1)
        starts = range(0, rows.shape[1], size)
        Gq = np.empty((len(starts), *residual.shape), residual.dtype)
        Gu = np.zeros((len(rows), len(starts), rows.shape[1]))
        for g, start in enumerate(starts):
            group = slice(start, start + size)
            zero_point = grid.zero_point[:, groups.start + g, None].astype(residual.dtype)
            q = rows_of(codes, rows[:, group]) - zero_point
            np.matmul(tile.split(q), square[:, group], out=tile.split(Gq[g]))
            if problem.real:
                Gu[:, g] = square[:, group].sum(axis=1, dtype=np.float64)
        arrays = codes, error, residual, Gq, Gu, rows, grid.scale, grid.zero_point, groups.start
        kernels.refit_groups(*arrays, size, problem.real, grid.half, MAX_ZERO_POINT, objective)

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
        return Terms(sums, None)

    def _terms(self, tile: Tile) -> Terms:
        """Terms for a single group, which the residual follows."""
        problem, grid, R = self.problem, self.solution.grid.part(tile.where), self.residual[tile.where]
        codes, scale, sums = self.solution.codes[tile.where], grid.scale[:, 0].copy(), np.zeros((5, len(R)))
        Gu = np.zeros((tile.shape[0], R.shape[1]))
        if problem.real:
            Gu = problem.finest(tile).sum(axis=1, dtype=np.float64)
            sums[4] = Gu.sum(axis=1).repeat(tile.shape[1])
        if problem.double is None:
            products, zero_point = problem.weight_products(tile), grid.zero_point[:, 0].astype(np.float64)
            kernels.refit_sums(codes, zero_point, scale, products, R, sums)
            return Terms(sums, functools.partial(kernels.follow_refit, R, products, scale, Gu))
        q = codes.astype(np.float64) - grid.zero_point
        error = problem.weights_by_column(tile) - grid.scale * q
        G = problem.double[tile.problems]
        residual, Gq = ((tile.split(vectors) @ G).reshape(q.shape) for vectors in (error, q))
        sums[:4] = dots(q, residual), dots(q, Gq), residual.sum(axis=1), Gq.sum(axis=1)

        def follow(change: Float64, offset: Float64) -> None:
            R[:] -= change[:, None] * Gq + (tile.split(offset)[:, :, None] * Gu[:, None]).reshape(R.shape)

        return Terms(sums, follow)

    def _regrid(self, one: tuple[Tile, Float64, Terms]) -> None:
        """Refit the grid by the sums of all columns that share it, and follow with the objective of each by its own."""
        tile, total, terms = one
        now, where, (qR, qGq, uR, uGq, uGu) = self.solution, tile.where, terms.sums
        scale, zero_point = refitted(now.grid.part(where), 0, total.T, self.problem.real)
        offset = scale.astype(np.float64) * (now.grid.zero_point[where, 0].astype(np.float64) - zero_point)
        change = scale.astype(np.float64) - now.grid.scale[where, 0]
        now.grid.scale[where, 0], now.grid.zero_point[where, 0] = scale, zero_point
        now.objective[where] += change * (change * qGq - 2 * qR) + offset * (offset * uGu + 2 * change * uGq - 2 * uR)
        if terms.follow is not None:
            terms.follow(change, offset)


def groups_at_once(size: int) -> int:
    """How many groups of so many rows are refitted at a time."""
    return min(max(ROWS_AT_ONCE // size, 1), GROUPS_AT_ONCE)


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
    """What a refit of a single group needs, for q = codes - zero_point and u = 1.

    The `sums` (5, k c) are q.R, q.G.q, u.R, u.G.q and u.G.u of each column, the last three of use with a real zero
    point; `follow(change, offset)` lets the residual follow with steps (k c,) along q and u, where it is to.
    """

    sums: Float64
    follow: Callable[[Float64, Float64], None] | None


def sums_of_one(grid: Grid, ww: Float64, we: Float64, ee: Float64) -> Float64:
    """Sums for a single group from wᵀGw, wᵀGe and eᵀGe of each column, with e = w - d q."""
    sums, scale = np.zeros((5, len(ww))), grid.scale[:, 0].astype(np.float64)
    sums[0], sums[1] = (we - ee) / scale, (ww - 2 * we + ee) / scale**2
    return sums


def refitted(grid: Grid, g: int, sums: Float64, real: bool) -> tuple[Float32, ZeroPoint]:
    """Scale and zero point of group g that minimise the objective; where that is no positive scale, the old ones."""
    scale, zero_point = grid.scale[:, g].copy(), grid.zero_point[:, g].copy()
    kernels.refit_columns(np.ascontiguousarray(sums), scale, zero_point, real, grid.half, MAX_ZERO_POINT)
    return scale, zero_point
