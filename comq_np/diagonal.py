"""The steps of a solve where the Gram matrix is diagonal, as that of an embedding is.

Then every weight is on its own once the scales are known: the nearest codes are the best. What is left is to find the
scales, by a search and by turns of rounding and refitting them. The matrix is kept as its diagonal, (1, m), in the
place of `Problem.G`.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from comq_np import checks
from comq_np import grid as grids
from comq_np.counts import TokenCounts
from comq_np.descent import MOST_REFITS, STILL, Solution, Start, measured, nearest_objective, refitted
from comq_np.grid import Grid
from comq_np.host import Host, unit_of
from comq_np.layouts import Float32, Float64
from comq_np.parallel import Workers
from comq_np.problem import TILE, Kind, Problem, Tile
from comq_np.proof import Proof
from comq_np.recipes import Recipe
from comq_np.starts import beside, neighbours, rounded, start_grid
from comq_np.teams import search

#: Weights of a tile, which are in double precision several times over.
TILE_WEIGHTS = 2**20


def smoothing(tokens: TokenCounts) -> float:
    """Shrinkage by which every token counts once more than it came up: Laplace's rule of succession.

    Tokens that the calibration lacks may come up all the same.
    """
    return len(tokens) / (len(tokens) + tokens.count)


@dataclass(frozen=True)
class DiagonalProblem(Problem):
    """Problem whose `G` (1, m) is the diagonal of its matrix, and `double` the same in double precision."""

    @functools.cached_property
    def tiles(self) -> list[Tile]:
        """Tiles of columns, few of them where there are many rows."""
        rows, columns = self.W.shape[1:]
        width = min(TILE, max(1, TILE_WEIGHTS // rows))
        return [
            Tile(slice(0, 1), part, part)
            for part in (slice(start, min(start + width, columns)) for start in range(0, columns, width))
        ]

    @property
    def diagonal(self) -> Float32:
        """``G_ii``, (1, m)."""
        return self.G

    @property
    def exact_diagonal(self) -> Float64:
        """The same in double precision."""
        assert self.double is not None, "every such problem has it"
        return self.double

    def shrunk(self, share: float) -> DiagonalProblem:
        """The same with ``(1 - share) G + share mean(diag G) I``; tokens that never came up are among the inputs."""
        if not share:
            return self
        diagonal = (1 - share) * self.exact_diagonal + share * self.exact_diagonal.mean()
        made = dataclasses.replace(self, G=diagonal.astype(np.float32), double=diagonal)
        made._by_column.update(self._by_column)
        return made

    def squares(self, vectors: Float64) -> Float64:
        """``v.T @ G @ v`` of vectors (c, m)."""
        found: Float64 = np.square(vectors) @ self.exact_diagonal[0]
        return found

    def objective(self, codes: Float32, grid: Grid, tile: Tile) -> Float64:
        """Objective of the columns of a tile for its codes and grid."""
        return self.squares(self.double_errors(codes, grid, tile))


@dataclass(frozen=True)
class DiagonalJudge:
    """Objectives on the given matrix."""

    problem: DiagonalProblem
    pool: Workers

    def rounding(self, grid: Grid) -> Float64:
        """Objective of plain rounding on a grid."""
        return nearest_objective(self.problem, grid, self.pool)

    def errors(self, solution: Solution, share: float) -> Float64:  # noqa: ARG002
        """Objective of a solution, whatever it was solved with."""
        return measured(self.problem, solution.codes, solution.grid, self.pool).objective

    def weights(self, size: Float64 | None, share: float) -> Float64:  # noqa: ARG002
        """``w.T @ G @ w`` of each column."""
        columns = [self.problem.weights_by_column(tile).astype(np.float64) for tile in self.problem.tiles]
        return np.concatenate([self.problem.squares(part) for part in columns])


class Turns:
    """Nearest codes and best scales in turns, from one start; `descent.Descent` says what the fields are."""

    def __init__(self, problem: DiagonalProblem, start: Start, pool: Workers) -> None:
        self.problem, self.pool = problem, pool
        self.solution = measured(problem, start.codes, start.grid, pool)
        self.start = self.solution.objective.copy()
        self.changed = np.zeros(problem.count, dtype=np.int64)
        self.converged = False

    def sweep(self, order: Any = None) -> None:  # noqa: ARG002
        """Give every weight its nearest code."""
        self.pool.map(self._round, self.problem.tiles)
        self.converged = not self.changed.any()

    def tabu(self, moves: int) -> None:  # noqa: ARG002
        """Do the same: there is no minimum but one."""
        self.sweep()

    def _round(self, tile: Tile) -> None:
        now, where = self.solution, tile.where
        codes, grid = self.problem.nearest(now.grid.part(where), tile), now.grid.part(where)
        self.changed[where] = (codes != now.codes[where]).sum(axis=1)
        now.codes[where] = codes
        now.objective[where] = self.problem.objective(codes, grid, tile)

    def refit(self, last: bool = False) -> None:
        """Refit the grid in closed form; the `last` time, in turns with the codes until both are at rest."""
        for _ in range(MOST_REFITS if last else 1):
            before = self.solution.grid.copy()
            tiles = self.problem.tiles
            sums = self.problem.pooled(tiles, self.pool.map(self._sums, tiles))
            for tile, part in zip(tiles, sums, strict=True):
                self._regrid(tile, part)
            if last:
                self.sweep()
            self.converged &= self.solution.grid.near(before, STILL)
            if self.converged:
                break

    def _sums(self, tile: Tile) -> Float64:
        """What `refitted` asks of each group, (c, 5, groups)."""
        problem, where = self.problem, tile.where
        grid, codes = self.solution.grid.part(where), self.solution.codes[where]
        diagonal = np.broadcast_to(problem.exact_diagonal, codes.shape)
        weighted = diagonal * problem.double_errors(codes, grid, tile)
        q = codes - problem.spread(grid.zero_point, tile).astype(np.float64)
        first = np.arange(0, codes.shape[1], problem.group_size)
        terms = q * weighted, diagonal * q * q, weighted, diagonal * q, diagonal
        return np.stack([np.add.reduceat(term, first, axis=1) for term in terms], axis=1)

    def _regrid(self, tile: Tile, sums: Float64) -> None:
        now, where = self.solution, tile.where
        before = now.grid.part(where).copy()
        for g in range(before.scale.shape[1]):
            scale, zero_point = refitted(before, g, sums[:, :, g].T, self.problem.real)
            now.grid.scale[where, g], now.grid.zero_point[where, g] = scale, zero_point
        now.objective[where] = self.problem.objective(now.codes[where], now.grid.part(where), tile)


class Diagonal(Host):
    """`backend.Backend` on threads of the CPU, for `TokenCounts`."""

    def matrices(self, G: TokenCounts, problems: int | None, rows: int) -> Float64:  # type: ignore[override]
        """Diagonal of the matrix, (1, m)."""
        if problems is not None:
            raise checks.InputError(
                "`W` must have shape (m, n) with TokenCounts, which are of one problem, got (b, m, n)."
            )
        if len(G) != rows:
            raise checks.InputError(f"`G` must be of {rows} tokens, as `W` has rows, is TokenCounts of {len(G)}.")
        if not G.count:
            raise checks.InputError("`G` must have seen inputs, got TokenCounts with count 0.")
        return G.counts[None].astype(np.float64)

    def problem(
        self,
        columns: Float32,
        matrices: Float64,
        order: str,  # noqa: ARG002
        kind: Kind,
        overwrite: bool,  # noqa: ARG002
    ) -> DiagonalProblem:
        """Problem with its rows as they are: their order makes no difference."""
        unit = unit_of(matrices)
        diagonal = matrices / unit[:, None]
        rows = np.arange(matrices.shape[1])[None]
        return DiagonalProblem(columns, diagonal.astype(np.float32), rows, unit, *kind, diagonal)

    def judge(self, problem: Problem, *_: Any) -> DiagonalJudge:  # type: ignore[override]
        """Judge by the matrix of a problem that has not been shrunk yet."""
        assert isinstance(problem, DiagonalProblem)
        return DiagonalJudge(problem, self.pool)

    def starts(self, problem: Problem, steps: Recipe, given: Grid | None) -> list[Start]:
        """A start from each grid of the recipe, refined if it refines any, or from the given one."""
        found = [given] if given else [start_grid(problem, name, self.pool) for name in steps.grids]
        if steps.start == "babai" and not given:
            refining = grids.refining(problem.symmetric)
            rounds = (refining.rough, refining.fine) if steps.search else (refining.near,)
            for grid in found:
                for candidates in rounds:
                    self._refine(problem, grid, candidates)
            found += [beside(problem, grid, move) for grid in found for move in neighbours(problem, steps)]
        return [Start(grid, rounded(problem, grid, self.pool)) for grid in found]

    def _refine(self, problem: Problem, grid: Grid, candidates: grids.Candidates) -> None:
        """Put the best candidates around a grid in its place."""
        values = [problem.weights_by_column(tile) for tile in problem.tiles]
        better, _ = search(problem, problem.tiles, grid, values, problem.diagonal, candidates, self.pool.map)
        for tile, part in zip(problem.tiles, better, strict=True):
            grid.put(part, tile.where)

    def greedy(self, problem: Problem) -> Any:  # noqa: ARG002
        """No order: it makes no difference."""
        return None

    def descent(self, problem: Problem, start: Start, *_: Any, **known: Any) -> Turns:  # type: ignore[override]  # noqa: ARG002
        """Turns from a start."""
        assert isinstance(problem, DiagonalProblem)
        return Turns(problem, start, self.pool)

    def prove(self, problem: Problem, refit: bool, best: Solution) -> Proof:
        """Turn a solution into the nearest codes, which are the best at its scales."""
        turns = self.descent(problem, Start(best.grid.copy(), best.codes.copy()))
        turns.sweep()
        if refit:
            turns.refit(last=True)
        better = turns.solution.objective <= best.objective
        if problem.whole:
            better[:] = turns.solution.objective.sum() <= best.objective.sum()
        best.take(turns.solution, better)
        return Proof(best.objective.copy(), np.ones(problem.count, dtype=np.bool_))
