"""From a problem to the best solution found: starts, sweeps from each, tabu searches from the best, and proof."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import exact
from comq_np.descent import Descent, Float64, Problem, Solution, measured
from comq_np.grid import Grid, expand
from comq_np.orders import ORDERS
from comq_np.parallel import Workers, tiles
from comq_np.recipes import Recipe
from comq_np.starts import Start, starts

Callback = Callable[[int, float], object]

#: Nodes that the proof of one column may visit, and how often codes and scales may take turns in it.
NODE_LIMIT, TURNS = 20_000, 20
#: Most rows times levels of a problem that is proven: the search tabulates what each code of a column stands for.
MAX_TABLE = 2**17
#: A turn that gains less than this share of the objective is no gain.
NO_GAIN = 1e-9


@dataclasses.dataclass
class Proof:
    """For each column (n,): what no codes at its scale could go below, and whether its codes are proven optimal."""

    bound: Float64
    optimal: npt.NDArray[np.bool_]


@dataclasses.dataclass
class Outcome:
    """The best solution, the objective that the sweeps started from, and how they went, an entry for each of them."""

    best: Solution
    start: float
    notes: list[str]
    objectives: list[float]
    changed: list[int]
    converged: bool
    proof: Proof | None = None


def minimise(
    problem: Problem, steps: Recipe, given: Grid | None, plain: Solution, callback: Callback | None, pool: Workers
) -> Outcome:
    """Find the best codes and grid, or only codes if a grid is given; what is to be proven starts from `plain`, too."""
    order = ORDERS[steps.order](problem.W, problem.G)
    begun = starts(problem, steps, order, given, pool)
    outcome = _swept(problem, steps, order, begun, callback, pool) if steps.sweeps else _begun(problem, begun, pool)
    rows = problem.W.shape[1]
    if rows <= steps.exact and rows * problem.levels <= MAX_TABLE:
        keep_rounding(problem, outcome.best, measured(problem, plain.codes, plain.grid, pool))
        outcome.proof = prove(problem, steps.refit, outcome.best, pool)
    return outcome


def _begun(problem: Problem, begun: list[Start], pool: Workers) -> Outcome:
    """Best of the starts."""
    best = best_of(problem, [measured(problem, one.codes, one.grid, pool) for one in begun if one.codes is not None])
    return Outcome(best, float(best.objective.sum()), _notes(begun), [], [], converged=False)


def _swept(
    problem: Problem,
    steps: Recipe,
    order: npt.NDArray[np.int32],
    begun: list[Start],
    callback: Callback | None,
    pool: Workers,
) -> Outcome:
    """Sweep from every start, leave the minima on trial, and go on from the best for each column by long searches."""
    sweeps = Sweeps(problem, steps, order, callback, pool)
    descents = [Descent(problem, one.grid, one.codes, pool) for one in begun]
    start = _least(problem, [descent.start for descent in descents])
    sweeps.run(descents)
    if steps.trial:
        sweeps.leap(descents, steps.trial)
    if steps.leaps:
        best = best_of(problem, [descent.solution for descent in descents])
        descents = [Descent(problem, best.grid, best.codes, pool)]
        for _ in range(steps.leaps):
            sweeps.leap(descents, steps.moves)
    best = best_of(problem, [descent.solution for descent in descents])
    converged = all(descent.converged for descent in descents)
    return Outcome(best, start, _notes(begun), sweeps.objectives, sweeps.changed, converged)


def _notes(begun: list[Start]) -> list[str]:
    return [note for start in begun for note in start.grid.notes]


class Sweeps:
    """Sweeps of one or several descents: the best `objectives` and the codes `changed`, after each."""

    def __init__(
        self, problem: Problem, steps: Recipe, order: npt.NDArray[np.int32], callback: Callback | None, pool: Workers
    ) -> None:
        self.problem, self.steps, self.order, self.callback, self.pool = problem, steps, order, callback, pool
        self.objectives: list[float] = []
        self.changed: list[int] = []

    def run(self, descents: list[Descent]) -> None:
        """Sweep until nothing is left to change, or as often as the recipe allows."""
        for _ in range(self.steps.sweeps):
            going = [descent for descent in descents if not descent.converged]
            if not going:
                break
            for descent in going:
                descent.sweep(self.order, self.steps.refit)
            objectives = [descent.solution.objective for descent in descents]
            changed = np.stack([descent.changed for descent in descents])
            self.objectives.append(max(_least(self.problem, objectives), 0.0))  # rounding may take it below
            self.changed.append(int(_of_the_winner(self.problem, objectives, changed).sum()))
            if self.callback is not None:
                self.callback(len(self.objectives), self.objectives[-1])

    def leap(self, descents: list[Descent], moves: float) -> None:
        """Leave the minimum that was reached by a tabu search with so many moves a row, and sweep again."""
        for descent in descents:
            descent.tabu(math.ceil(moves * np.count_nonzero(self.problem.inverse_diagonal)))
        self.run(descents)


def _winner(problem: Problem, objectives: list[Float64]) -> npt.NDArray[np.intp]:
    """Number of the least objective, for each column; one for all if they share the scale."""
    stacked = np.stack(objectives)
    if problem.whole:
        stacked = np.broadcast_to(stacked.sum(axis=1, keepdims=True), stacked.shape)
    winner: npt.NDArray[np.intp] = stacked.argmin(axis=0)
    return winner


def _of_the_winner(problem: Problem, objectives: list[Float64], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Those of the `values` (solutions, n) that belong to the least objectives."""
    chosen: npt.NDArray[Any] = np.take_along_axis(values, _winner(problem, objectives)[None], axis=0)[0]
    return chosen


def _least(problem: Problem, objectives: list[Float64]) -> float:
    return float(_of_the_winner(problem, objectives, np.stack(objectives)).sum())


def best_of(problem: Problem, solutions: list[Solution]) -> Solution:
    """Best solution for each column, the first on a tie."""
    winner = _winner(problem, [solution.objective for solution in solutions])
    best = solutions[0].copy()
    for number, solution in enumerate(solutions[1:], start=1):
        best.take(solution, winner == number)
    return best


def keep_rounding(problem: Problem, best: Solution, plain: Solution) -> npt.NDArray[np.bool_]:
    """Put plain rounding where the best is above it; the columns where it is.

    A column of zeros has no error then, whatever a rounding error may have made of its objective.
    """
    worse: npt.NDArray[np.bool_] = _winner(problem, [best.objective, plain.objective]) == 1
    zero = ~problem.W.any(axis=1) & (not problem.whole)
    best.take(plain, worse | zero)
    return worse & ~zero


def prove(problem: Problem, refit: bool, best: Solution, pool: Workers) -> Proof:
    """Turn a solution into the best codes at its scales, as far as that can be proven.

    The best codes have other best scales, and these other best codes: both take turns as long as that gains anything.
    """
    proof = Proof(np.zeros(len(problem.W)), np.zeros(len(problem.W), dtype=np.bool_))
    _search(problem, best, proof, np.arange(len(problem.W)), pool)
    order = ORDERS["cyclic"](problem.W, problem.G)
    for _ in range(TURNS if refit else 0):
        descent = Descent(problem, best.grid, best.codes, pool)
        descent.sweep(order, refit=True)
        better = measured(problem, descent.solution.codes, descent.solution.grid, pool)
        gains = better.objective < (1 - NO_GAIN) * best.objective
        if problem.whole:
            gains[:] = better.objective.sum() < (1 - NO_GAIN) * best.objective.sum()
        if not gains.any():
            break
        best.take(better, gains)
        _search(problem, best, proof, np.flatnonzero(gains), pool)
    return proof


def _search(problem: Problem, best: Solution, proof: Proof, columns: npt.NDArray[np.intp], pool: Workers) -> None:
    """Put the best codes in, and the proof, for some columns."""

    def one_part(part: npt.NDArray[np.intp]) -> None:
        rows = problem.W.shape[1]
        scale, zero_point = (
            expand(values[part], rows, problem.group_size) for values in (best.grid.scale, best.grid.zero_point)
        )
        found = exact.search(
            problem.W[part], problem.G, best.codes[part].astype(np.int64), scale, zero_point, problem.levels, NODE_LIMIT
        )
        best.codes[part], best.objective[part] = found.codes, found.objective
        proof.bound[part], proof.optimal[part] = found.bound, found.optimal

    pool.map(one_part, [columns[tile] for tile in tiles(len(columns))])
