"""What a solve needs of the machine that it runs on: `host` has it on the CPU, `gpu` on a GPU.

Codes and whatever else is as large as the weights stay where the backend has them; what has one value a column comes as
NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from comq_np.descent import Solution, Start
from comq_np.grid import Grid
from comq_np.layouts import Float64, Real
from comq_np.problem import Kind, Problem
from comq_np.proof import Proof
from comq_np.recipes import Recipe

Item = TypeVar("Item")
Result = TypeVar("Result")


class Descending(Protocol):
    """Sweeps from one start, as `descent.Descent` makes them."""

    solution: Solution
    start: Float64
    changed: npt.NDArray[np.int64]
    converged: bool

    def sweep(self, order: Any) -> None:
        """Visit every coordinate once."""

    def tabu(self, moves: int) -> None:
        """Leave the minimum that the sweeps have reached."""

    def refit(self, last: bool = False) -> None:
        """Refit the grid in closed form."""


class Judging(Protocol):
    """Objectives on the given matrix, as `judge.Judge` has them."""

    def rounding(self, grid: Grid) -> Float64:
        """Objective of plain rounding on a grid."""

    def errors(self, solution: Solution, share: float) -> Float64:
        """Objective of a solution whose own is that of the shrunk matrix."""

    def weights(self, size: Float64 | None, share: float) -> Float64:
        """``w.T @ G @ w``, from that of the shrunk matrix, if it is known."""


class Backend(Protocol):
    """Makes each step of a solve on some machine."""

    @property
    def name(self) -> str:
        """Name of the backend, for the report."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results of `function` for each of `items`, in their order."""

    def alone(self) -> AbstractContextManager[Backend]:
        """Backend for one of the functions of `map`."""

    def parts(self, shape: tuple[int, ...], kind: Kind, steps: Recipe) -> list[slice]:
        """Columns of weights (b, m, n) that are solved at a time: all of them, if they fit."""

    def weights(self, columns: Any, some: slice | npt.NDArray[np.intp]) -> Any:
        """Some columns of weights (b, m, n), where the backend has them."""

    def matrices(self, G: Any, problems: int | None, rows: int) -> Any:
        """Gram matrices (b, m, m), checked: the given array itself where that is one."""

    def problem(
        self, columns: npt.NDArray[np.float32], matrices: Any, order: str, kind: Kind, overwrite: bool
    ) -> Problem:
        """Problem with its rows in an order, those of each problem in its own."""

    def trial(self, problem: Problem, columns: npt.NDArray[np.intp], fold: Any) -> Problem:
        """Some columns of each problem as problems of their own, with the matrices of a fold."""

    def fold(self, problem: Problem, matrix: Real) -> Any:
        """Matrices of one fold (b, m, m) with their rows in the order of the problem."""

    def with_matrix(self, problem: Problem, fold: Any) -> Problem:
        """The same with the matrices of a fold."""

    def judge(self, problem: Problem, exactly: Callable[[], Real] | None, double: bool) -> Judging:
        """Judge by the matrix of a problem that has not been shrunk yet."""

    def shrunk(self, problem: Problem, share: float) -> Problem:
        """The same with a shrunk matrix."""

    def start_grid(self, problem: Problem, name: str) -> Grid:
        """Grid called `name`, one of `recipes.GRIDS`."""

    def starts(self, problem: Problem, steps: Recipe, given: Grid | None) -> list[Start]:
        """A start from each grid of the recipe, or from the given one."""

    def greedy(self, problem: Problem) -> Any:
        """Order of the rows of each column, for its sweeps."""

    def rounded(self, problem: Problem, grid: Grid) -> Any:
        """Nearest codes on a grid."""

    def nearest_objective(self, problem: Problem, grid: Grid) -> Float64:
        """Objective of plain rounding on a grid."""

    def solution(self, codes: Any, grid: Grid, objective: Float64) -> Solution:
        """Solution of that objective."""

    def measured(self, problem: Problem, codes: Any, grid: Grid) -> Solution:
        """Solution with its objective computed from scratch."""

    def descent(
        self, problem: Problem, start: Start, size: Float64 | None = None, rounding: Float64 | None = None
    ) -> Descending:
        """Descent from a start; the size of the weights and the objective of plain rounding may be known otherwise."""

    def prove(self, problem: Problem, refit: bool, best: Solution) -> Proof:
        """Turn a solution into the best codes at its scales, as far as that can be proven."""

    def round_dead_rows(self, problem: Problem, best: Solution) -> int:
        """Round the rows whose input is always zero on the final grid; the number of rows."""

    def in_users_order(self, problem: Problem, codes: Any, bits: int) -> npt.NDArray[Any]:
        """Codes (b, m, n) as integers, rows in the order of the given weights."""
