"""Where the sweeps start: a grid for every column, and the codes of one pass over the rows on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from comq_np import feedback as feedbacks
from comq_np import grid as grids
from comq_np.descent import Float32, Float64, Problem, nearest
from comq_np.feedback import Feedback, Pass, visit
from comq_np.grid import Grid
from comq_np.orders import ORDERS
from comq_np.parallel import Workers
from comq_np.recipes import Recipe

FACTOR_FAILED = (
    "`G` could not be factored, it is not positive semidefinite: the sweeps start from COMQ's own first pass."
)
#: Grids beside a good one: factor of the scale, and shift of the zero point.
NEIGHBOURS = ((1.0, 1), (1.0, -1), (0.95, 0), (1.05, 0), (0.92, 1), (0.92, -1), (1.08, 0), (0.97, 0))


@dataclass
class Start:
    """Grid, and codes (n, m) on it, or None for the real codes that stand for the weights exactly."""

    grid: Grid
    codes: Float32 | None


def start_grid(problem: Problem, name: str, pool: Workers) -> Grid:
    """Grid called `name`, one of `recipes.GRIDS`."""
    W, levels, size, whole = problem.W, problem.levels, problem.group_size, problem.whole
    if name == "paper" and whole:
        return grids.tensor_paper(W, levels, problem.real)
    grid = grids.spanning(W, levels, size, whole, problem.symmetric, problem.real)
    if name != "shrunk":
        return grid
    return grids.search(W, problem.G.diagonal(), grid, grids.SHRINK, levels, size, whole, pool)


def starts(
    problem: Problem, steps: Recipe, order: npt.NDArray[np.int32], given: Grid | None, pool: Workers
) -> list[Start]:
    """A start from each grid of the recipe, or from the given one."""
    found = [given] if given else [start_grid(problem, name, pool) for name in steps.grids]
    if steps.start == "float" and steps.sweeps:
        return [Start(grid, None) for grid in found]
    if steps.start in ("float", "rounding"):
        return [Start(grid, nearest(problem, grid)) for grid in found]
    orders = [order[0], *(ORDERS[name](problem.W, problem.G)[0] for name in steps.other_orders)]
    passes = Passes(problem, _feedbacks(problem, steps, orders, found), steps.paths, pool)
    if given or steps.start == "gram" or not passes.factored:  # only the nearest plane's error can judge other grids
        return [passes.start(grid) for grid in found]
    searched = [passes.searched(grid, steps.search) for grid in found]
    moves = [move for move in NEIGHBOURS if not (problem.symmetric and move[1])][: steps.neighbours]
    return searched + [passes.start(_beside(problem, one.grid, move)) for one in searched for move in moves]


def _feedbacks(
    problem: Problem, steps: Recipe, orders: list[npt.NDArray[np.int32]], found: list[Grid]
) -> list[Feedback]:
    """Feedback of the passes that the recipe starts by; where `G` cannot be factored, that which needs no factor."""
    if steps.start == "babai":
        damping = feedbacks.default_damping(problem.levels) if steps.damping is None else steps.damping
        factored = [feedbacks.triangular(problem.G, order, damping) for order in orders]
        passes = [feedback for feedback in factored if feedback]
        if passes:
            return passes
        for grid in found:
            grid.notes.append(FACTOR_FAILED)
    return [feedbacks.gram(problem.G, orders[0])]


@dataclass(frozen=True)
class Passes:
    """Passes over the rows in one order or several; the one that gives the codes has so many paths."""

    problem: Problem
    feedbacks: list[Feedback]
    paths: int
    pool: Workers

    @property
    def factored(self) -> bool:
        """Whether the errors of the passes are objectives, which can be compared."""
        return self.feedbacks[0].factored

    def start(self, grid: Grid) -> Start:
        """Best pass for each column."""
        best, *others = (visit(self.problem, grid, feedback, self.pool, self.paths) for feedback in self.feedbacks)
        for other in others:
            best.take(other, other.error < best.error)
        return Start(grid, best.codes)

    def searched(self, grid: Grid, rounds: int) -> Start:
        """Refine a grid for each order to round the targets of the pass before, and start from the best of these."""
        (best, made), *others = (self._searched(grid.copy(), feedback, rounds) for feedback in self.feedbacks)
        for refined, other in others:
            better = self._better(other.error, made.error)
            best.take(refined, better)
            made.take(other, better)
        return self.start(best) if self.paths > 1 else Start(best, made.codes)

    def _searched(self, grid: Grid, feedback: Feedback, rounds: int) -> tuple[Grid, Pass]:
        problem = self.problem
        best = visit(problem, grid, feedback, self.pool)
        candidates = grids.REFINE_SCALE if problem.symmetric else grids.REFINE
        for _ in range(rounds):
            shape = problem.levels, problem.group_size, problem.whole
            refined = grids.search(best.targets, feedback.pivots, grid, candidates, *shape, self.pool)
            again = visit(problem, refined, feedback, self.pool)
            better = self._better(again.error, best.error)
            grid.take(refined, better)
            best.take(again, better)
        return grid, best

    def _better(self, error: Float64, than: Float64) -> npt.NDArray[np.bool_]:
        """Columns with the lower error; all or none if they share the scale."""
        if self.problem.whole:
            return np.full(error.shape, error.sum() < than.sum())
        return error < than


def _beside(problem: Problem, grid: Grid, move: tuple[float, int]) -> Grid:
    """Grid with its scale times a factor and its zero point shifted."""
    factor, shift = move
    candidate = grids.Candidates(np.array([factor]), (shift,) if shift or factor != 1 else ())
    scale, zero_point = candidate.around(grid, slice(None), problem.levels)
    number = np.zeros(grid.scale.shape, dtype=np.intp)
    return grids.picked(scale, zero_point, number, grid.zero_point.dtype)
