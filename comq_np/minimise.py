"""From a problem to the best solution found: starts, sweeps from each, tabu searches from the best, and proof."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import exact
from comq_np.descent import Descent, Solution, Start, nearest_objective
from comq_np.grid import Grid
from comq_np.layouts import Float32, Float64
from comq_np.orders import greedy
from comq_np.parallel import Workers
from comq_np.problem import Problem, Tile
from comq_np.recipes import Recipe
from comq_np.starts import rounded, starts

Callback = Callable[[int, float], object]

#: Nodes that the proof of one column may visit, and how often codes and scales may take turns in it.
NODE_LIMIT, TURNS = 30_000, 20
#: Most rows times levels of a problem that is proven: the search tabulates what each code of a column stands for.
MAX_TABLE = 2**17
#: A turn that gains less than this share of the objective is no gain.
NO_GAIN = 1e-12


@dataclasses.dataclass
class Proof:
    """For each column (n,): what no codes at its scale could go below, and whether its codes are proven optimal."""

    bound: Float64
    optimal: npt.NDArray[np.bool_]


@dataclasses.dataclass
class Outcome:
    """The best solution, the objective that the sweeps started from, and how they went, an entry for each of them.

    `size` is wᵀGw of each column, if it is known.
    """

    best: Solution
    start: float
    notes: list[str]
    objectives: list[float]
    changed: list[int]
    converged: bool
    size: Float64 | None = None
    proof: Proof | None = None


def minimise(
    problem: Problem,
    steps: Recipe,
    given: Grid | None,
    plain: Grid,
    rounding: Float64 | None,
    callback: Callback | None,
    pool: Workers,
) -> Outcome:
    """Find the best codes and grid, or only codes if a grid is given.

    What is to be proven starts from plain rounding on the grid `plain`, if that is better; its objective `rounding` (b
    n,) may be known.
    """
    begun = starts(problem, steps, given, pool)
    if steps.sweeps or steps.leaps or steps.trial:
        known = [rounding if one.grid.equals(plain) else None for one in begun]
        outcome = _swept(problem, steps, begun, known, callback, pool)
    else:
        outcome = _begun(problem, steps, begun, pool)
    rows = problem.W.shape[1]
    if rows <= steps.exact and rows * problem.levels <= MAX_TABLE:
        rounding = nearest_objective(problem, plain, pool)
        keep_rounding(problem, outcome.best, plain, rounding, pool)
        outcome.proof = prove(problem, bool(steps.refit), outcome.best, pool)
    return outcome


def _begun(problem: Problem, steps: Recipe, begun: list[Start], pool: Workers) -> Outcome:
    """Best of the starts."""
    best = best_of(problem, [_solution(problem, steps, one, pool) for one in begun])
    return Outcome(best, problem.total(best.objective), _notes(begun), [], [], converged=False, size=begun[0].size)


def _solution(problem: Problem, steps: Recipe, start: Start, pool: Workers) -> Solution:
    if steps.refit == "ends" and not start.refitted:
        descent = Descent(problem, start, pool)
        descent.refit(last=True)
        return descent.solution
    if start.told is None:
        return measured(problem, start.codes, start.grid, pool)
    return Solution(start.codes, start.grid, start.told.objective)


def _swept(
    problem: Problem,
    steps: Recipe,
    begun: list[Start],
    rounding: list[Float64 | None],
    callback: Callback | None,
    pool: Workers,
) -> Outcome:
    """Sweep from every start, leave the minima on trial, and go on from the best for each column by long searches."""
    sweeps = Sweeps(problem, steps, callback, pool)
    descents = [Descent(problem, one, pool, rounding=known) for one, known in zip(begun, rounding, strict=True)]
    start = _least(problem, [descent.start for descent in descents])
    for descent, one in zip(descents, begun, strict=True):
        if steps.refit == "ends" and not one.refitted:
            descent.refit()
    leaps = steps.leaps if problem.W.shape[1] <= steps.leap_rows else 0
    if steps.trial or not leaps or steps.start != "babai":  # else the first search goes down by itself
        sweeps.run(descents, last=not leaps and not steps.trial)
    if steps.trial:
        sweeps.leap(descents, steps.trial, last=not leaps)
    if leaps and len(descents) > 1:
        best = best_of(problem, [descent.solution for descent in descents])
        descents = [Descent(problem, Start(best.grid, best.codes), pool, begun[0].size)]
    for left in reversed(range(leaps)):
        sweeps.leap(descents, steps.moves, last=not left)
    best = best_of(problem, [descent.solution for descent in descents])
    converged = all(descent.converged for descent in descents)
    size = problem.size() if begun[0].size is None else begun[0].size
    return Outcome(best, start, _notes(begun), sweeps.objectives, sweeps.changed, converged, size)


def _notes(begun: list[Start]) -> list[str]:
    return [note for start in begun for note in start.grid.notes]


class Sweeps:
    """Sweeps of one or several descents: the best `objectives` and the codes `changed`, after each."""

    def __init__(self, problem: Problem, steps: Recipe, callback: Callback | None, pool: Workers) -> None:
        self.problem, self.steps, self.callback, self.pool = problem, steps, callback, pool
        self.objectives: list[float] = []
        self.changed: list[int] = []
        self.order = _greedy(problem, pool) if steps.order == "greedy" and (steps.sweeps or steps.leaps) else None

    def run(self, descents: list[Descent], last: bool) -> None:
        """Sweep until nothing is left to change, or as often as the recipe allows; `last` if no sweep follows."""
        for left in reversed(range(self.steps.sweeps)):
            going = [descent for descent in descents if not descent.converged]
            if not going:
                break
            for descent in going:
                descent.sweep(self.order)
                if self.steps.refit is True:
                    descent.refit()
            over = last and (not left or all(descent.converged for descent in descents))
            self._report(descents, over)
            if over:
                break

    def leap(self, descents: list[Descent], moves: float, last: bool) -> None:
        """Leave the minimum that was reached by a tabu search with so many moves a row, and sweep again."""
        live = int((self.problem.inverse_diagonal > 0).sum(axis=1).max())
        for descent in descents:
            descent.tabu(math.ceil(moves * live))
        self._report(descents, over=last and not self.steps.sweeps)
        self.run(descents, last)

    def _report(self, descents: list[Descent], over: bool) -> None:
        """Write down how it went, after the last refit if it is `over`."""
        for descent in descents if over and self.steps.refit == "ends" else ():
            descent.refit(last=True)
        changed = np.stack([descent.changed for descent in descents])
        objectives = [descent.solution.objective for descent in descents]
        self.objectives.append(max(_least(self.problem, objectives), 0.0))  # rounding may take it below
        self.changed.append(int(_of_the_winner(self.problem, objectives, changed).sum()))
        if self.callback is not None:
            self.callback(len(self.objectives), self.objectives[-1])


def _greedy(problem: Problem, pool: Workers) -> npt.NDArray[np.int32]:
    """Order (b n, m) of the rows of each column."""
    orders = np.empty((problem.count, problem.W.shape[1]), np.int32)

    def one_tile(tile: Tile) -> None:
        orders[tile.where] = greedy(problem.weights_by_column(tile), problem.diagonal[tile.problems])

    pool.map(one_tile, problem.tiles)
    return orders


def _winner(problem: Problem, objectives: list[Float64]) -> npt.NDArray[np.intp]:
    """Number of the least objective, for each column; one for all if they share the scale."""
    stacked = np.stack(objectives)
    if problem.whole:
        apart = stacked.reshape(len(stacked), len(problem.W), -1).sum(axis=2)
        stacked = apart.repeat(problem.W.shape[2], axis=1)
    winner: npt.NDArray[np.intp] = stacked.argmin(axis=0)
    return winner


def _of_the_winner(problem: Problem, objectives: list[Float64], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Those of the `values` (solutions, n) that belong to the least objectives."""
    chosen: npt.NDArray[Any] = np.take_along_axis(values, _winner(problem, objectives)[None], axis=0)[0]
    return chosen


def _least(problem: Problem, objectives: list[Float64]) -> float:
    return problem.total(_of_the_winner(problem, objectives, np.stack(objectives)))


def best_of(problem: Problem, solutions: list[Solution]) -> Solution:
    """Best solution for each column, the first on a tie."""
    if len(solutions) == 1:
        return solutions[0]
    winner = _winner(problem, [solution.objective for solution in solutions])
    best = solutions[0].copy()
    for number, solution in enumerate(solutions[1:], start=1):
        best.take(solution, winner == number)
    return best


def measured(problem: Problem, codes: Float32, grid: Grid, pool: Workers) -> Solution:
    """Solution with its objective computed from scratch."""

    def of_tile(tile: Tile) -> Float64:
        return problem.objective(codes[tile.where], grid.part(tile.where), tile)

    return Solution(codes, grid, np.concatenate(pool.map(of_tile, problem.tiles)))


def keep_rounding(
    problem: Problem, best: Solution, plain: Grid, objective: Float64, pool: Workers
) -> npt.NDArray[np.bool_]:
    """Put plain rounding, on its grid and with its objective, where the best is above it; the columns where it is.

    A column of zeros has no error then, whatever a rounding error may have made of its objective.
    """
    worse: npt.NDArray[np.bool_] = _winner(problem, [best.objective, objective]) == 1
    zero = ~problem.W.any(axis=1).ravel() & (not problem.whole)
    if (worse | zero).any():
        best.take(Solution(rounded(problem, plain, pool), plain, objective), worse | zero)
    return worse & ~zero


def prove(problem: Problem, refit: bool, best: Solution, pool: Workers) -> Proof:
    """Turn a solution into the best codes at its scales, as far as that can be proven.

    The best codes have other best scales, and these other best codes: both take turns as long as that gains anything.
    """
    proof = Proof(np.zeros(problem.count), np.zeros(problem.count, dtype=np.bool_))
    _search(problem, best, proof, np.ones(problem.count, dtype=np.bool_), pool)
    for _ in range(TURNS if refit else 0):
        descent = Descent(problem, Start(best.grid.copy(), best.codes.copy()), pool)
        descent.refit_to_rest()
        descent.sweep(None)
        better = measured(problem, descent.solution.codes, descent.solution.grid, pool)
        gains = _winner(problem, [best.objective * (1 - NO_GAIN), better.objective]) == 1
        if not gains.any():
            break
        best.take(better, gains)
        _search(problem, best, proof, gains, pool)
    return proof


def _search(problem: Problem, best: Solution, proof: Proof, columns: npt.NDArray[np.bool_], pool: Workers) -> None:
    """Put the best codes in, and the proof, for some columns."""
    double = problem.double
    assert double is not None, "MOST_EXACT rows have it"

    def one_tile(tile: Tile) -> None:
        some, where = columns[tile.where], tile.where
        if not some.any():
            return
        G = double[tile.problems]
        grid = [problem.spread(values[where], tile) for values in (best.grid.scale, best.grid.zero_point)]
        parts = problem.weights_by_column(tile), best.codes[where], *grid
        if some.all():
            W, codes, scale, zero_point = (tile.split(values) for values in parts)
        else:  # each column as a problem of its own
            G = G.repeat(tile.shape[1], axis=0)[some]
            W, codes, scale, zero_point = (values[some][:, None] for values in parts)
        found = exact.search(W, G, codes, scale, zero_point, problem.levels, NODE_LIMIT)
        numbers = where.start + np.flatnonzero(some)
        best.codes[numbers], best.objective[numbers] = found.codes.reshape(len(numbers), -1), found.objective.ravel()
        proof.bound[numbers], proof.optimal[numbers] = found.bound.ravel(), found.optimal.ravel()

    pool.map(one_tile, problem.tiles)
