"""Objectives on the given matrix, after the minimisation of a shrunk one in single precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from comq_np import checks
from comq_np.descent import Solution
from comq_np.grid import Grid
from comq_np.layouts import Float32, Float64, Real, double_forms, forms, mean_diagonal, squares
from comq_np.parallel import Workers
from comq_np.problem import Problem, Tile

#: Of a smaller share of ``sum_i G_ii e_i**2``, single precision leaves too few digits.
DOUBTFUL = 1e-2
#: With more shrinkage, what it leaves of the given matrix is computed anew.
MOST_SHRINKAGE = 0.9
#: Rounding in a float32 Gram can make an objective negative by this share of (sum_i sqrt(G_ii) |e_i|)**2.
INDEFINITE = 1e-6

#: Vectors (k c, m) of a tile, in double precision or not.
Vectors = Callable[[Tile, bool], Real]


class Judge:
    """Judges solutions by the matrix of a problem that has not been shrunk yet.

    `exactly` returns it as it was given, (b, m, m), for what single precision cannot tell; None if it is lost. Where it
    was given in `double` precision, all objectives of a solution are computed in that.
    """

    def __init__(self, problem: Problem, exactly: Callable[[], Real] | None, double: bool, pool: Workers) -> None:
        self.problem, self.exactly, self.double, self.pool = problem, exactly, double, pool
        self.diagonal, self.mean = problem.diagonal, mean_diagonal(problem.diagonal)

    def errors(self, solution: Solution, share: float) -> Float64:
        """``e.T @ G @ e`` (b n,) of each column of a solution whose objective is that of the shrunk matrix."""

        def error(tile: Tile, double: bool) -> Real:
            codes, grid = solution.codes[tile.where], solution.grid.part(tile.where)
            return self._error(codes, grid, tile, double)

        return self.of(error, solution.objective, share)

    def of(self, errors: Vectors, objective: Float64, share: float) -> Float64:
        """The same of any errors (k c, m) of the tiles, whose objective is that of the shrunk matrix."""
        return self._forms(errors, objective, share, self.double)

    def rounding(self, grid: Grid) -> Float64:
        """The same of plain rounding on a grid, by the matrix as it is."""

        def error(tile: Tile, double: bool) -> Real:
            part, shape = grid.part(tile.where), (tile.where.stop - tile.where.start, self.problem.W.shape[1])
            codes = self.problem.nearest(part, tile, self.pool.scratch("best 0", *shape))
            return self._error(codes, part, tile, double)

        return self._forms(error, None, 0.0)

    def _error(self, codes: Float32, grid: Grid, tile: Tile, double: bool) -> Real:
        if double:
            return self.problem.double_errors(codes, grid, tile)
        return self.problem.errors(codes, grid, tile, self.pool.scratch("best 1", *codes.shape))

    def weights(self, size: Float64 | None, share: float) -> Float64:
        """``w.T @ G @ w`` (b n,) of each column, from that of the shrunk matrix, if it is known."""

        def weights(tile: Tile, double: bool) -> Real:
            return self.problem.weights_by_column(tile).astype(np.float64 if double else np.float32, copy=False)

        return self._forms(weights, size, share)

    def _forms(self, vectors: Vectors, known: Float64 | None, share: float, doubt: bool = False) -> Float64:
        """``v.T @ G @ v`` of vectors, from that of the shrunk matrix, if it is known; with `doubt`, from scratch."""
        found = np.empty(self.problem.count)
        doubtful = np.full(self.problem.count, doubt or share > MOST_SHRINKAGE)

        def one_tile(tile: Tile) -> None:
            where, double = tile.where, self.problem.double
            value = vectors(tile, double is not None)
            if double is not None:
                found[where] = double_forms(double[tile.problems], tile.split(value))
                return
            G = self.problem.G[tile.problems]
            shrunk = forms(G, value, self.pool.scratch("best 2", *value.shape)) if known is None else known[where]
            diagonal = self.diagonal[tile.problems]
            if share:
                added = np.where(diagonal > 0, self.mean[tile.problems][:, None], np.float32(0))
                shrunk = (shrunk - share * squares(value, added)) / (1 - min(share, MOST_SHRINKAGE))
            found[where] = shrunk
            doubtful[where] |= shrunk < DOUBTFUL * squares(value, diagonal)

        exactly = self.exactly if self.problem.double is None else None
        if exactly is None or not doubtful.all():
            self.pool.map(one_tile, self.problem.tiles)
        if exactly is not None and doubtful.any():
            self._recompute(exactly(), vectors, found, doubtful)
        self._refuse_negative(vectors, found)
        return np.maximum(found, 0.0)

    def _recompute(self, given: Real, vectors: Vectors, found: Float64, doubtful: npt.NDArray[np.bool_]) -> None:
        """Compute some columns in double precision from the given matrices."""
        problem = self.problem

        def one_tile(tile: Tile) -> None:
            if not doubtful[tile.where].any():
                return
            value = vectors(tile, True)
            for p in range(tile.problems.start, tile.problems.stop):
                first = p - tile.problems.start
                some = np.flatnonzero(tile.split(doubtful[tile.where])[first])
                part = np.empty((len(some), value.shape[1]))
                part[:, problem.order[p]] = tile.split(value)[first][some]
                exact = double_forms(given[p : p + 1], part[None]) / problem.unit[p]
                found[tile.where][first * tile.shape[1] + some] = exact

        self.pool.map(one_tile, problem.tiles)

    def _refuse_negative(self, vectors: Vectors, found: Float64) -> None:
        """Refuse what no Gram matrix can give, beyond what rounding may take below zero."""
        for tile in self.problem.tiles if (found < 0).any() else ():
            size = tile.split(np.abs(vectors(tile, True))) @ np.sqrt(self.diagonal[tile.problems])[:, :, None]
            if (found[tile.where] < -INDEFINITE * np.square(size).ravel()).any():
                refuse_indefinite(self.problem, found)


def refuse_indefinite(problem: Problem, found: Float64) -> NoReturn:
    """Say that the objectives `found` are none that a Gram matrix gives."""
    raise checks.InputError(
        f"`G` must be positive semidefinite, as a Gram matrix is, got one with e.T @ G @ e = "
        f"{problem.total(found):g} for the weights or their errors e."
    )
