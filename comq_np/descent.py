"""Rounding and coordinate descent: codes and scales of all columns, from one grid (paper, algorithms 1 and 2).

Arrays have a row for each output channel, as in `grid` and `kernels`. With q = codes - zero_point and R = (W - Wq) G,
the best value of one coordinate, all else fixed, is ``round(q_i + R_i / (d G_ii))``, clipped; and a group's best scale
is ``d + q.R / q.G.q`` with q zero outside the group, which for one group a column is the paper's qᵀGw / qᵀGq. A zero
point that may be any real number is refitted with it: least squares in the two directions q and u, the group's ones.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from comq_np import kernels
from comq_np.checks import MAX_ZERO_POINT
from comq_np.grid import Grid, ZeroPoint, decode, encode, expand
from comq_np.parallel import Workers, tiles

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
#: Either of them.
Real = npt.NDArray[Any]

#: A scale that a refit moves by less than this (relative) is at its best, and a zero point by this of a code.
STILL = 1e-6
#: Two directions with less room than this between them (squared sine) are taken for one.
FLAT = 1e-6


@dataclass(frozen=True)
class Problem:
    """What is minimised: weights (n, m) and Gram matrix (m, m), its largest diagonal entry about 1, and the grids.

    `group_size` rows share a scale, with `whole` in all columns alike; there are `levels` codes. The zero point is
    the middle one with `symmetric`, and any number with `real`.
    """

    W: Float32
    G: Real
    group_size: int
    whole: bool
    levels: int
    symmetric: bool = False
    real: bool = False

    @functools.cached_property
    def G_single(self) -> Float32:
        """`G` in the type that the sweeps compute in."""
        return self.G.astype(np.float32, copy=False)

    @functools.cached_property
    def inverse_diagonal(self) -> Float32:
        """``1 / G_ii``, and 0 for a dead row: it has no say in the output, and a zero step leaves it rounded."""
        diagonal = self.G_single.diagonal()
        return np.divide(1, diagonal, out=np.zeros_like(diagonal), where=diagonal >= np.finfo(np.float32).tiny)

    @property
    def top(self) -> np.float32:
        """The largest code."""
        return np.float32(self.levels - 1)

    @property
    def tiles(self) -> list[slice]:
        """Tiles of columns."""
        return tiles(len(self.W))

    def objective(self, codes: Float32, grid: Grid, tile: slice) -> Float64:
        """Objective of a tile's columns, from scratch in float64."""
        Wq = decode(codes[tile], grid.scale[tile], grid.zero_point[tile], self.group_size)
        error = self.W[tile].astype(np.float64) - Wq
        objective: Float64 = np.einsum("ji,ji->j", error, error @ self.G)
        return objective


@dataclass
class Solution:
    """Codes (n, m), whole numbers, on a grid, with each column's objective (n,)."""

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


def nearest(problem: Problem, grid: Grid) -> Float32:
    """Nearest codes (n, m) to the weights, decided in float64: float32 holds real codes of 16 bits to 0.004 only."""
    codes = np.rint(encode(problem.W, grid, problem.group_size))
    return np.clip(codes, 0, problem.top).astype(np.float32)


def measured(problem: Problem, codes: Float32, grid: Grid, pool: Workers) -> Solution:
    """Solution with its objective computed from scratch in float64."""
    objectives = pool.map(lambda tile: problem.objective(codes, grid, tile), problem.tiles)
    return Solution(codes, grid, np.concatenate(objectives))


class Descent:
    """The sweeps from one grid: `solution` after the last one, and how many codes it `changed` in each column (n,).

    Without `codes` to start from, the first sweep starts from the real codes that stand for the weights exactly.
    `start` (n,) is the objective that it starts from; where that would be zero, that of plain rounding.
    """

    def __init__(self, problem: Problem, grid: Grid, codes: Float32 | None, pool: Workers) -> None:
        self.problem, self.pool = problem, pool
        self.products = np.empty_like(problem.W)
        self.residual = np.zeros_like(problem.W)
        self.changed = np.zeros(len(problem.W), dtype=np.int64)
        self.converged = False
        self._real = codes is None
        start = encode(problem.W, grid, problem.group_size).astype(np.float32) if codes is None else codes.copy()
        self.solution = Solution(start, grid.copy(), np.zeros(len(problem.W)))
        pool.map(self._multiply, problem.tiles)
        if codes is None:
            self.start = measured(problem, nearest(problem, grid), grid, pool).objective
        else:
            pool.map(self._measure, problem.tiles)
            self.start = self.solution.objective.copy()

    def sweep(self, order: npt.NDArray[np.int32], refit: bool) -> None:
        """Visit every coordinate once, then refit the scales."""
        before = self.solution.grid.copy()
        self.pool.map(lambda tile: self._visit(tile, order), self.problem.tiles)
        if self._real:  # single precision holds real codes less well than whole ones
            self.pool.map(self._measure, self.problem.tiles)
            self._real = False
        if refit:
            self._refit_whole() if self.problem.whole else self.pool.map(self._refit, self.problem.tiles)
        self.converged = not self.changed.any() and self.solution.grid.near(before, STILL)

    def tabu(self, moves: int) -> None:
        """Leave the minimum that the sweeps have reached, for a lower one that is that many moves away at most."""
        self.pool.map(lambda tile: self._tabu(tile, moves), self.problem.tiles)
        self.converged = False

    def _tabu(self, tile: slice, moves: int) -> None:
        problem, codes = self.problem, self.solution.codes
        step = np.array(expand(self.solution.grid.scale[tile], codes.shape[1], problem.group_size), order="C")
        alive = problem.inverse_diagonal > 0
        kernels.tabu_search(codes[tile], self.residual[tile], problem.G_single, alive, step, problem.top, moves)
        self._measure(tile)

    def _multiply(self, tile: slice) -> None:
        np.matmul(self.problem.W[tile], self.problem.G_single, out=self.products[tile])

    def _measure(self, tile: slice) -> None:
        now = self.solution
        Wq = decode(now.codes[tile], now.grid.scale[tile], now.grid.zero_point[tile], self.problem.group_size)
        error = self.problem.W[tile] - Wq
        np.matmul(error, self.problem.G_single, out=self.residual[tile])
        now.objective[tile] = np.einsum("ji,ji->j", error, self.residual[tile], dtype=np.float64)

    def _visit(self, tile: slice, order: npt.NDArray[np.int32]) -> None:
        kernels.sweep(
            self.solution.codes[tile],
            self.residual[tile],
            self.problem.G_single,
            self.problem.inverse_diagonal,
            self.solution.grid.scale[tile],
            order if len(order) == 1 else order[tile],
            self.problem.group_size,
            self.problem.top,
            self.changed[tile],
            self.solution.objective[tile],
        )

    def _refit(self, tile: slice) -> None:
        """Refit one group's grid after the other, the others held."""
        for g in range(self.solution.grid.scale.shape[1]):
            terms = self._terms(tile, g)
            self._regrid(tile, g, terms, *refitted(self.solution.grid, tile, g, terms.sums, self.problem.real))

    def _refit_whole(self) -> None:
        tiles, grid = self.problem.tiles, self.solution.grid
        parts = self.pool.map(lambda tile: self._terms(tile, 0), tiles)
        total = np.sum([part.sums.sum(axis=1, keepdims=True) for part in parts], axis=0)
        scale, zero_point = refitted(grid, slice(1), 0, total, self.problem.real)
        for tile, part in zip(tiles, parts, strict=True):
            self._regrid(tile, 0, part, scale, zero_point)

    def _terms(self, tile: slice, g: int) -> Terms:
        """What a refit of group g of each column of a tile needs to know."""
        problem, grid = self.problem, self.solution.grid
        rows = slice(g * problem.group_size, (g + 1) * problem.group_size)
        q = (self.solution.codes[tile, rows] - grid.zero_point[tile, g, None]).astype(np.float32)
        if grid.scale.shape[1] == 1:  # from what is there: d G q = G w - R
            Gq = (self.products[tile] - self.residual[tile]) / grid.scale[tile]
        else:
            Gq = q @ problem.G_single[rows]
        R, sums = self.residual[tile, rows], np.zeros((5, len(q)))
        sums[0], sums[1] = (np.einsum("ji,ji->j", q, there, dtype=np.float64) for there in (R, Gq[:, rows]))
        if not problem.real:
            return Terms(sums, Gq, None)
        Gu = problem.G[rows].sum(axis=0)
        sums[2], sums[3], sums[4] = (
            R.sum(axis=1, dtype=np.float64),
            Gq[:, rows].sum(axis=1, dtype=np.float64),
            Gu[rows].sum(),
        )
        return Terms(sums, Gq, Gu.astype(np.float32))

    def _regrid(self, tile: slice, g: int, terms: Terms, scale: Float32, zero_point: ZeroPoint) -> None:
        """Put a new scale and zero point in, and follow with residual and objective."""
        now, (qR, qGq, uR, uGq, uGu) = self.solution, terms.sums
        offset = scale.astype(np.float64) * (now.grid.zero_point[tile, g].astype(np.float64) - zero_point)
        change = scale.astype(np.float64) - now.grid.scale[tile, g]
        now.grid.scale[tile, g], now.grid.zero_point[tile, g] = scale, zero_point
        self.residual[tile] -= change.astype(np.float32)[:, None] * terms.Gq
        now.objective[tile] += change * (change * qGq - 2 * qR)
        if terms.Gu is not None:
            self.residual[tile] -= np.outer(offset.astype(np.float32), terms.Gu)
            now.objective[tile] += offset * (offset * uGu + 2 * change * uGq - 2 * uR)


class Terms(NamedTuple):
    """What a refit needs, for q = codes - zero_point and u = 1 on the rows of one group, both zero outside.

    The `sums` (5, n) are q.R, q.G.q, u.R, u.G.q and u.G.u of each column, the last three 0 without a real zero point;
    then there are G q (n, m) and, with one, G u (m,).
    """

    sums: Float64
    Gq: Float32
    Gu: Float32 | None


def refitted(grid: Grid, tile: slice, g: int, sums: Float64, real: bool) -> tuple[Float32, ZeroPoint]:
    """Scale and zero point that minimise the objective; where that is no positive scale, the old ones.

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
    scale, zero_point = grid.scale[tile, g], grid.zero_point[tile, g]
    better = (scale + a).astype(np.float32)
    fits = better >= np.finfo(np.float32).tiny
    moved = zero_point - np.divide(b, better, out=np.zeros_like(b), where=fits)
    fits &= np.abs(moved) <= MAX_ZERO_POINT
    kept = moved.astype(zero_point.dtype) if real else zero_point
    return np.where(fits, better, scale), np.where(fits, kept, zero_point)
