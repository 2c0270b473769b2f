"""Where the sweeps start: a grid for every column, and the codes of one pass over the rows on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from comq_np import feedback as feedbacks
from comq_np import grid as grids
from comq_np.descent import Float32, Problem, nearest
from comq_np.feedback import Feedback, visit
from comq_np.grid import Grid
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
    feedback = _feedback(problem, steps, order[0], found)
    if given or steps.start == "gram" or not feedback.factored:  # only the nearest plane's error can judge other grids
        return [Start(grid, visit(problem, grid, feedback, pool).codes) for grid in found]
    searched = [_searched(problem, grid, feedback, steps.search, pool) for grid in found]
    moves = [move for move in NEIGHBOURS if not (problem.symmetric and move[1])][: steps.neighbours]
    return searched + [_beside(problem, one.grid, move, feedback, pool) for one in searched for move in moves]


def _feedback(problem: Problem, steps: Recipe, order: npt.NDArray[np.int32], found: list[Grid]) -> Feedback:
    """Feedback of the pass that the recipe starts by; where `G` cannot be factored, that which needs no factor."""
    if steps.start == "babai":
        damping = feedbacks.default_damping(problem.levels) if steps.damping is None else steps.damping
        feedback = feedbacks.triangular(problem.G, order, damping)
        if feedback:
            return feedback
        for grid in found:
            grid.notes.append(FACTOR_FAILED)
    return feedbacks.gram(problem.G, order)


def _searched(problem: Problem, grid: Grid, feedback: Feedback, rounds: int, pool: Workers) -> Start:
    """Pass from the grid, and from grids refined to round the targets of the pass before; the best for each column."""
    best = visit(problem, grid, feedback, pool)
    candidates = grids.REFINE_SCALE if problem.symmetric else grids.REFINE
    for _ in range(rounds):
        shape = problem.levels, problem.group_size, problem.whole
        refined = grids.search(best.targets, feedback.pivots, grid, candidates, *shape, pool)
        again = visit(problem, refined, feedback, pool)
        better = again.error < best.error
        if problem.whole:
            better[:] = again.error.sum() < best.error.sum()
        grid.take(refined, better)
        best.take(again, better)
    return Start(grid, best.codes)


def _beside(problem: Problem, grid: Grid, move: tuple[float, int], feedback: Feedback, pool: Workers) -> Start:
    """Pass from the grid with its scale times a factor and its zero point shifted."""
    factor, shift = move
    candidate = grids.Candidates(np.array([factor]), (shift,) if shift or factor != 1 else ())
    scale, zero_point = candidate.around(grid, slice(None), problem.levels)
    number = np.zeros(grid.scale.shape, dtype=np.intp)
    moved = grids.picked(scale, zero_point, number, grid.zero_point.dtype)
    return Start(moved, visit(problem, moved, feedback, pool).codes)
