"""The steps of a solve on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from comq_np import checks, recipes
from comq_np.descent import Descent, Solution, Start, measured, nearest_objective
from comq_np.grid import Grid
from comq_np.judge import Judge
from comq_np.layouts import Float32, Float64, Real, arranged, arranged_in_place, by_row, mirrored
from comq_np.orders import ORDERS, greedy
from comq_np.packing import code_type
from comq_np.parallel import Workers
from comq_np.problem import Kind, Problem, Tile
from comq_np.proof import Proof, prove
from comq_np.recipes import Recipe
from comq_np.starts import rounded, start_grid, starts

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Host:
    """`backend.Backend` on threads of the CPU."""

    pool: Workers
    name: str = "cpu"

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results of `function` for each of `items`, in their order."""
        return self.pool.map(function, items)

    @contextlib.contextmanager
    def alone(self) -> Iterator[Host]:
        """Backend for one of the functions of `map`."""
        with Workers(1) as pool:
            yield Host(pool)

    def parts(self, shape: tuple[int, ...], kind: Kind, steps: Recipe) -> list[slice]:  # noqa: ARG002
        """All columns: what is made of them takes no more memory than they do."""
        return [slice(0, shape[2])]

    def weights(self, columns: Float32, some: slice | npt.NDArray[np.intp]) -> Float32:
        """Some columns of weights (b, m, n), which are here."""
        return columns[:, :, some]

    def matrices(self, G: npt.ArrayLike, problems: int | None, rows: int) -> Real:
        """Gram matrices (b, m, m), checked: the given array itself where that is one."""
        return checks.gram_matrices(G, problems, rows, self.pool.map, mirrored)

    def problem(
        self, columns: npt.NDArray[np.float32], matrices: Real, order: str, kind: Kind, overwrite: bool
    ) -> Problem:
        """Problem with its rows in an order, those of each problem in its own."""
        rows, unit = visit_order(matrices, order), unit_of(np.diagonal(matrices, axis1=1, axis2=2))
        if columns.shape[1] <= recipes.MOST_EXACT:
            double = arranged(matrices, rows, unit, self.pool, np.float64)
            return Problem(columns, double.astype(np.float32), rows, unit, *kind, double)
        G = (arranged_in_place if overwrite else arranged)(matrices, rows, unit, self.pool)
        return Problem(columns, G, rows, unit, *kind)

    def fold(self, problem: Problem, matrix: Real) -> Real:
        """Matrices of one fold with their rows in the order of the problem, (b, m, m), in its precision."""
        dtype = np.float32 if problem.double is None else np.float64
        return arranged(matrix, problem.order, problem.unit, self.pool, dtype)

    def trial(self, problem: Problem, columns: npt.NDArray[np.intp], fold: Real) -> Problem:
        """Some columns of each problem as problems of their own, with the matrices of a fold."""
        some = dataclasses.replace(problem, W=np.ascontiguousarray(problem.W[:, :, columns]))
        return some.with_matrix(fold)

    def with_matrix(self, problem: Problem, fold: Real) -> Problem:
        """The same with the matrices of a fold."""
        return problem.with_matrix(fold)

    def judge(self, problem: Problem, exactly: Callable[[], Real] | None, double: bool) -> Judge:
        """Judge by the matrix of a problem that has not been shrunk yet."""
        return Judge(problem, exactly, double, self.pool)

    def shrunk(self, problem: Problem, share: float) -> Problem:
        """The same with a shrunk matrix, in the place of its own."""
        return problem.shrunk(share)

    def start_grid(self, problem: Problem, name: str) -> Grid:
        """Grid called `name`, one of `recipes.GRIDS`."""
        return start_grid(problem, name, self.pool)

    def starts(self, problem: Problem, steps: Recipe, given: Grid | None) -> list[Start]:
        """A start from each grid of the recipe, or from the given one."""
        return starts(problem, steps, given, self.pool)

    def greedy(self, problem: Problem) -> npt.NDArray[np.int32]:
        """Order (b n, m) of the rows of each column."""
        orders = np.empty((problem.count, problem.W.shape[1]), np.int32)

        def one_tile(tile: Tile) -> None:
            orders[tile.where] = greedy(problem.weights_by_column(tile), problem.diagonal[tile.problems])

        self.pool.map(one_tile, problem.tiles)
        return orders

    def rounded(self, problem: Problem, grid: Grid) -> Float32:
        """Nearest codes on a grid, (b n, m)."""
        return rounded(problem, grid, self.pool)

    def nearest_objective(self, problem: Problem, grid: Grid) -> Float64:
        """Objective of plain rounding on a grid."""
        return nearest_objective(problem, grid, self.pool)

    def solution(self, codes: Float32, grid: Grid, objective: Float64) -> Solution:
        """Solution of that objective."""
        return Solution(codes, grid, objective)

    def measured(self, problem: Problem, codes: Float32, grid: Grid) -> Solution:
        """Solution with its objective computed from scratch."""
        return measured(problem, codes, grid, self.pool)

    def descent(
        self, problem: Problem, start: Start, size: Float64 | None = None, rounding: Float64 | None = None
    ) -> Descent:
        """Descent from a start."""
        return Descent(problem, start, self.pool, size, rounding)

    def prove(self, problem: Problem, refit: bool, best: Solution) -> Proof:
        """Turn a solution into the best codes at its scales, as far as that can be proven."""
        return prove(problem, refit, best, self.pool)

    def round_dead_rows(self, problem: Problem, best: Solution) -> int:
        """Round the rows whose input is always zero, of which no code matters, on the final grid; how many they are."""
        dead = problem.diagonal == 0

        def one_tile(tile: Tile) -> None:
            chosen = dead[tile.problems].repeat(tile.shape[1], axis=0)
            np.copyto(best.codes[tile.where], problem.nearest(best.grid.part(tile.where), tile), where=chosen)

        if dead.any():
            self.pool.map(one_tile, problem.tiles)
        return int(dead.sum())

    def in_users_order(self, problem: Problem, codes: Float32, bits: int) -> npt.NDArray[Any]:
        """Codes (b, m, n) from those with a row for each column, in the order of the visit."""
        made = np.empty(problem.W.shape, code_type(bits))

        def one_tile(tile: Tile) -> None:
            part = by_row(codes[tile.where], tile.shape[0]).astype(made.dtype)
            some = np.arange(tile.problems.start, tile.problems.stop)[:, None]
            made[some, problem.order[tile.problems], tile.columns] = part

        self.pool.map(one_tile, problem.tiles)
        return made


def visit_order(matrices: Real, order: str) -> npt.NDArray[np.intp]:
    """Row that is visited first, and so on, (b, m); with a greedy order, each column has its own."""
    return ORDERS["cyclic" if order == "greedy" else order](matrices)


def unit_of(diagonal: Real) -> Float64:
    """The power of two (b,) that brings the largest entry of a diagonal (b, m) near 1."""
    found: Float64 = np.exp2(np.frexp(diagonal.max(axis=1))[1] - 1.0)
    return found
