"""From a problem to the best solution found: starts, sweeps from each, tabu searches from the best, and proof."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np.backend import Backend, Descending
from comq_np.descent import Solution, Start, winner
from comq_np.grid import Grid
from comq_np.layouts import Float64
from comq_np.problem import Problem
from comq_np.proof import Proof, is_provable
from comq_np.recipes import Recipe

Callback = Callable[[int, float], object]


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
    backend: Backend,
) -> Outcome:
    """Find the best codes and grid, or only codes if a grid is given.

    What is to be proven starts from plain rounding on the grid `plain`, if that is better; its objective `rounding` (b
    n,) may be known.
    """
    begun = backend.starts(problem, steps, given)
    if steps.sweeps or steps.leaps or steps.trial:
        known = [rounding if one.grid.equals(plain) else None for one in begun]
        outcome = _swept(problem, steps, begun, known, callback, backend)
    else:
        outcome = _begun(problem, steps, begun, backend)
    if is_provable(problem.W.shape[1], problem.levels, steps):
        rounding = backend.nearest_objective(problem, plain)
        keep_rounding(problem, outcome.best, plain, rounding, backend)
        outcome.proof = backend.prove(problem, bool(steps.refit), outcome.best)
    return outcome


def _begun(problem: Problem, steps: Recipe, begun: list[Start], backend: Backend) -> Outcome:
    """Best of the starts."""
    best = best_of(problem, [_solution(problem, steps, one, backend) for one in begun])
    return Outcome(best, problem.total(best.objective), _notes(begun), [], [], converged=False, size=begun[0].size)


def _solution(problem: Problem, steps: Recipe, start: Start, backend: Backend) -> Solution:
    if steps.refit == "ends" and not start.refitted:
        descent = backend.descent(problem, start)
        descent.refit(last=True)
        return descent.solution
    if start.told is None:
        return backend.measured(problem, start.codes, start.grid)
    return backend.solution(start.codes, start.grid, start.told.objective)


def _swept(
    problem: Problem,
    steps: Recipe,
    begun: list[Start],
    rounding: list[Float64 | None],
    callback: Callback | None,
    backend: Backend,
) -> Outcome:
    """Sweep from every start, leave the minima on trial, and go on from the best for each column by long searches."""
    sweeps = Sweeps(problem, steps, callback, backend)
    descents = [backend.descent(problem, one, rounding=known) for one, known in zip(begun, rounding, strict=True)]
    start = _least(problem, [descent.start for descent in descents])
    for descent, one in zip(descents, begun, strict=True):
        if steps.refit == "ends" and not one.refitted:
            descent.refit()
    leaps = steps.leaps_in(problem.W.shape[1])
    if steps.trial or not leaps or steps.start != "babai":  # else the first search goes down by itself
        sweeps.run(descents, last=not leaps and not steps.trial)
    if steps.trial:
        sweeps.leap(descents, steps.trial, last=not leaps)
    if leaps and len(descents) > 1:
        best = best_of(problem, [descent.solution for descent in descents])
        descents = [backend.descent(problem, Start(best.grid, best.codes), begun[0].size)]
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

    def __init__(self, problem: Problem, steps: Recipe, callback: Callback | None, backend: Backend) -> None:
        self.problem, self.steps, self.callback = problem, steps, callback
        self.objectives: list[float] = []
        self.changed: list[int] = []
        self.order = backend.greedy(problem) if steps.order == "greedy" and (steps.sweeps or steps.leaps) else None

    def run(self, descents: list[Descending], last: bool) -> None:
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

    def leap(self, descents: list[Descending], moves: float, last: bool) -> None:
        """Leave the minimum that was reached by a tabu search with so many moves a row, and sweep again."""
        live = int((self.problem.inverse_diagonal > 0).sum(axis=1).max())
        for descent in descents:
            descent.tabu(math.ceil(moves * live))
        self._report(descents, over=last and not self.steps.sweeps)
        self.run(descents, last)

    def _report(self, descents: list[Descending], over: bool) -> None:
        """Write down how it went, after the last refit if it is `over`."""
        for descent in descents if over and self.steps.refit == "ends" else ():
            descent.refit(last=True)
        changed = np.stack([descent.changed for descent in descents])
        objectives = [descent.solution.objective for descent in descents]
        self.objectives.append(max(_least(self.problem, objectives), 0.0))  # rounding may take it below
        self.changed.append(int(_of_the_winner(self.problem, objectives, changed).sum()))
        if self.callback is not None:
            self.callback(len(self.objectives), self.objectives[-1])


def _of_the_winner(problem: Problem, objectives: list[Float64], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Those of the `values` (solutions, n) that belong to the least objectives."""
    chosen: npt.NDArray[Any] = np.take_along_axis(values, winner(problem, objectives)[None], axis=0)[0]
    return chosen


def _least(problem: Problem, objectives: list[Float64]) -> float:
    return problem.total(_of_the_winner(problem, objectives, np.stack(objectives)))


def best_of(problem: Problem, solutions: list[Solution]) -> Solution:
    """Best solution for each column, the first on a tie."""
    if len(solutions) == 1:
        return solutions[0]
    best_one = winner(problem, [solution.objective for solution in solutions])
    best = solutions[0].copy()
    for number, solution in enumerate(solutions[1:], start=1):
        best.take(solution, best_one == number)
    return best


def keep_rounding(
    problem: Problem, best: Solution, plain: Grid, objective: Float64, backend: Backend
) -> npt.NDArray[np.bool_]:
    """Put plain rounding, on its grid and with its objective, where the best is above it; the columns where it is.

    A column of zeros has no error then, whatever a rounding error may have made of its objective.
    """
    worse: npt.NDArray[np.bool_] = winner(problem, [best.objective, objective]) == 1
    zero: npt.NDArray[np.bool_] = (objective == 0) & (not problem.whole)
    if zero.any():  # else there is no need to look
        zero &= problem.zero_columns
    if (worse | zero).any():
        best.take(backend.solution(backend.rounded(problem, plain), plain, objective), worse | zero)
    return worse & ~zero
