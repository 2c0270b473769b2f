"""Coordinate descent on the codes and scales of all columns, from one grid (paper, algorithms 1 and 2).

Arrays have a row for each output channel, as in `grid` and `kernels`. With q = codes - zero_point and R = (W - Wq) G,
the best value of one coordinate, all else fixed, is ``round(q_i + R_i / (d G_ii))``, clipped; and a group's best scale
is ``d + q.R / q.G.q`` with q zero outside the group, which for one group a column is the paper's qᵀGw / qᵀGq.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from comq_np import kernels
from comq_np.grid import Grid, decode, encode
from comq_np.parallel import Workers, tiles

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Weights (n, m), Gram with its largest diagonal entry about 1, rows in a group, one scale for all or not, codes."""

    W: npt.NDArray[np.float32]
    G: Float64
    group_size: int
    whole: bool
    levels: int

    def objective(self, codes: npt.NDArray[np.float32], grid: Grid, tile: slice) -> tuple[Float64, Float64]:
        """Objective (n,) and residual (n, m) of a tile's codes, from scratch in float64."""
        Wq = decode(codes[tile], grid.scale[tile], grid.zero_point[tile], self.group_size)
        error = self.W[tile].astype(np.float64) - Wq
        residual = error @ self.G
        return np.einsum("ji,ji->j", error, residual), residual


class Descent:
    """Codes and scales of one grid on their way down.

    `objective` (n,) and `changed` (n,) are those after the last sweep; before the first, those of plain rounding.
    """

    def __init__(self, problem: Problem, grid: Grid, pool: Workers) -> None:
        self.problem, self.pool = problem, pool
        self.tiles = tiles(len(problem.W))
        self.grid = Grid(grid.scale.copy(), grid.zero_point, list(grid.notes))
        # Rounding comes first only to be measured; the first sweep starts from the real codes, whose error is zero.
        self.codes = encode(problem.W, grid, problem.group_size)
        self.residual = np.zeros_like(self.codes)
        self.objective = np.empty(len(problem.W))
        self.changed = np.zeros(len(problem.W), dtype=np.int64)
        self.sweeps = 0
        self.converged = False
        pool.map(self._measure_rounding, self.tiles)

    def rounded(self) -> npt.NDArray[np.float32]:
        """Codes rounded to integers; after a sweep they are."""
        codes = self.codes.copy()
        kernels.round_codes(codes, np.float32(self.problem.levels - 1))
        return codes

    def sweep(self, order: npt.NDArray[np.int32], refit: bool) -> None:
        """Visit every coordinate once, then refit the scales."""
        before = self.codes.copy(), self.grid.scale.copy(), self.objective.copy()
        G = self.problem.G.astype(np.float32)
        diagonal = G.diagonal()
        # A dead row has no say in the output: a zero step leaves it at plain rounding.
        inverse = np.divide(1, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)
        self.pool.map(lambda tile: self._visit(tile, G, inverse, order), self.tiles)
        if refit and self.problem.whole:
            self._refit_whole()
        self.pool.map(self._refit_groups if refit and not self.problem.whole else self._measure, self.tiles)
        if self.sweeps:
            self._take_back(*before)
        self.sweeps += 1
        self.converged = not self.changed.any() and bool((self.grid.scale == before[1]).all())

    def _measure_rounding(self, tile: slice) -> None:
        codes = self.codes[tile].copy()
        kernels.round_codes(codes, np.float32(self.problem.levels - 1))
        part = Grid(self.grid.scale[tile], self.grid.zero_point[tile])
        problem = self.problem
        Wq = decode(codes, part.scale, part.zero_point, problem.group_size)
        error = problem.W[tile].astype(np.float64) - Wq
        self.objective[tile] = np.einsum("ji,ji->j", error, error @ problem.G)

    def _measure(self, tile: slice) -> None:
        self.objective[tile], residual = self.problem.objective(self.codes, self.grid, tile)
        self.residual[tile] = residual

    def _visit(
        self, tile: slice, G: npt.NDArray[np.float32], inverse: npt.NDArray[np.float32], order: npt.NDArray[np.int32]
    ) -> None:
        kernels.sweep(
            self.codes[tile],
            self.residual[tile],
            G,
            inverse,
            self.grid.scale[tile],
            order if len(order) == 1 else order[tile],
            self.problem.group_size,
            np.float32(self.problem.levels - 1),
            self.changed[tile],
        )

    def _refit_groups(self, tile: slice) -> None:
        problem, scale, zero_point = self.problem, self.grid.scale[tile], self.grid.zero_point[tile]
        _, residual = problem.objective(self.codes, self.grid, tile)
        for g in range(scale.shape[1]):
            rows = slice(g * problem.group_size, (g + 1) * problem.group_size)
            q = self.codes[tile, rows].astype(np.float64) - zero_point[:, g, None]
            Gq = q @ problem.G[rows]
            better = refitted(
                scale[:, g], np.einsum("ji,ji->j", q, residual[:, rows]), np.einsum("ji,ji->j", q, Gq[:, rows])
            )
            residual -= (better.astype(np.float64) - scale[:, g])[:, None] * Gq
            scale[:, g] = better
        Wq = decode(self.codes[tile], scale, zero_point, problem.group_size)
        self.objective[tile] = np.einsum("ji,ji->j", problem.W[tile].astype(np.float64) - Wq, residual)
        self.residual[tile] = residual

    def _refit_whole(self) -> None:
        def terms(tile: slice) -> tuple[float, float]:
            _, residual = self.problem.objective(self.codes, self.grid, tile)
            q = self.codes[tile].astype(np.float64) - self.grid.zero_point[tile]
            return float((q * residual).sum()), float((q * (q @ self.problem.G)).sum())

        slope, curvature = np.add.reduce(self.pool.map(terms, self.tiles))
        self.grid.scale[:] = refitted(self.grid.scale[:1, 0], np.array([slope]), np.array([curvature]))

    def _take_back(
        self, codes: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], objective: Float64
    ) -> None:
        """Undo the sweep where float32 rounding made it a step up, so that the objective never rises."""
        rose = self.objective > objective
        if self.problem.whole:
            rose[:] = self.objective.sum() > objective.sum()
        if rose.any():
            self.codes[rose], self.grid.scale[rose], self.changed[rose] = codes[rose], scale[rose], 0
            self.pool.map(self._measure, [tile for tile in self.tiles if rose[tile].any()])
            self.objective[rose] = objective[rose]


def refitted(scale: npt.NDArray[np.float32], slope: Float64, curvature: Float64) -> npt.NDArray[np.float32]:
    """Scales d + slope / curvature that minimise the objective; where that is no positive number, the old ones."""
    step = np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0)
    better = (scale + step).astype(np.float32)
    return np.where(better >= np.finfo(np.float32).tiny, better, scale)
