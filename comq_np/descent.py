"""Rounding and coordinate descent: the codes and scales of all columns, from one grid (paper, algorithms 1 and 2).

Arrays have a row for each output channel, as in `grid` and `kernels`. With q = codes - zero_point and R = (W - Wq) G,
the best value of one coordinate, all else fixed, is ``round(q_i + R_i / (d G_ii))``, clipped; and a group's best scale
is ``d + q.R / q.G.q`` with q zero outside the group, which for one group a column is the paper's qᵀGw / qᵀGq.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from comq_np import kernels
from comq_np.grid import Grid, decode, encode
from comq_np.parallel import Workers, tiles

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """What is minimised: weights (n, m) and Gram matrix (m, m), its largest diagonal entry about 1, and the grids.

    `group_size` rows share a scale, with `whole` in all columns alike; there are `levels` codes.
    """

    W: Float32
    G: Float64
    group_size: int
    whole: bool
    levels: int

    @functools.cached_property
    def G_single(self) -> Float32:
        """`G` in the type that the sweeps compute in."""
        return self.G.astype(np.float32)

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

    def measure(self, codes: Float32, grid: Grid, tile: slice) -> tuple[Float64, Float64]:
        """Objective (columns,) and residual (W - Wq) G (columns, m) of a tile, from scratch in float64."""
        Wq = decode(codes[tile], grid.scale[tile], grid.zero_point[tile], self.group_size)
        error = self.W[tile].astype(np.float64) - Wq
        residual = error @ self.G
        return np.einsum("ji,ji->j", error, residual), residual


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
        self.grid.scale[columns] = other.grid.scale[columns]
        self.grid.zero_point[columns] = other.grid.zero_point[columns]
        self.objective[columns] = other.objective[columns]


def nearest(problem: Problem, grid: Grid) -> Float32:
    """Nearest codes (n, m) to the weights."""
    codes = encode(problem.W, grid, problem.group_size)
    kernels.round_codes(codes, problem.top)
    return codes


def rounding(problem: Problem, grid: Grid, pool: Workers) -> Solution:
    """Round every weight to the nearest code."""
    codes = nearest(problem, grid)
    objectives = pool.map(lambda tile: problem.measure(codes, grid, tile)[0], problem.tiles)
    return Solution(codes, grid.copy(), np.concatenate(objectives))


class Descent:
    """The sweeps from one grid: `solution` after the last one, and how many codes it `changed` in each column (n,).

    Before the first sweep the codes are the real numbers that stand for the weights exactly.
    """

    def __init__(self, problem: Problem, grid: Grid, pool: Workers) -> None:
        self.problem, self.pool = problem, pool
        self.solution = Solution(
            encode(problem.W, grid, problem.group_size), grid.copy(), np.full(len(problem.W), np.inf)
        )
        self.residual = np.zeros_like(self.solution.codes)
        self.changed = np.zeros(len(problem.W), dtype=np.int64)
        self.converged = False

    def sweep(self, order: npt.NDArray[np.int32], refit: bool) -> None:
        """Visit every coordinate once, then refit the scales."""
        problem, now = self.problem, self.solution
        before = now.copy()
        self.pool.map(lambda tile: self._visit(tile, order), problem.tiles)
        if refit and problem.whole:
            self._refit_whole()
        self.pool.map(self._refit_groups if refit and not problem.whole else self._measure, problem.tiles)
        rose = now.objective > before.objective
        if problem.whole:
            rose[:] = now.objective.sum() > before.objective.sum()
        if rose.any():  # by float32 rounding: take it back, so that the objective never rises
            now.take(before, rose)
            self.changed[rose] = 0
            self.pool.map(self._measure, [tile for tile in problem.tiles if rose[tile].any()])
        self.converged = not self.changed.any() and np.array_equal(now.grid.scale, before.grid.scale)

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
        )

    def _measure(self, tile: slice) -> None:
        now = self.solution
        now.objective[tile], self.residual[tile] = self.problem.measure(now.codes, now.grid, tile)

    def _refit_groups(self, tile: slice) -> None:
        """Refit one group's scale after the other, the others held."""
        problem, now = self.problem, self.solution
        scale, zero_point = now.grid.scale[tile], now.grid.zero_point[tile]
        _, residual = problem.measure(now.codes, now.grid, tile)
        for g in range(scale.shape[1]):
            rows = slice(g * problem.group_size, (g + 1) * problem.group_size)
            q = now.codes[tile, rows].astype(np.float64) - zero_point[:, g, None]
            Gq = q @ problem.G[rows]
            along, length = (np.einsum("ji,ji->j", q, values[:, rows]) for values in (residual, Gq))
            better = refitted(scale[:, g], along, length)
            residual -= (better.astype(np.float64) - scale[:, g])[:, None] * Gq
            scale[:, g] = better
        self._measure(tile)

    def _refit_whole(self) -> None:
        problem, grid = self.problem, self.solution.grid

        def terms(tile: slice) -> tuple[float, float]:
            q = self.solution.codes[tile].astype(np.float64) - grid.zero_point[tile]
            _, residual = problem.measure(self.solution.codes, grid, tile)
            return float((q * residual).sum()), float((q * (q @ problem.G)).sum())

        along, length = np.add.reduce(self.pool.map(terms, problem.tiles))
        grid.scale[:] = refitted(grid.scale[:1, 0], along, length)


def refitted(scale: Float32, along: npt.ArrayLike, length: npt.ArrayLike) -> Float32:
    """Scales ``d + along / length`` that minimise the objective; where that is no positive number, the old ones."""
    length = np.asarray(length)
    step = np.divide(along, length, out=np.zeros_like(length), where=length > 0)
    better = (scale + step).astype(np.float32)
    return np.where(better >= np.finfo(np.float32).tiny, better, scale)
