"""How much to shrink a Gram matrix towards a multiple of the identity, so that what is solved holds on other inputs.

What is minimised on few samples fits their chance correlations. ``(1 - s) G + s mean(diag G) I`` damps these; the best
s differs from layer to layer, so it is chosen by cross-validation on the two folds of a `Gram`.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from comq_np.descent import Descent, Float64, Problem
from comq_np.orders import ORDERS
from comq_np.parallel import Workers
from comq_np.recipes import Recipe
from comq_np.starts import starts

#: What is tried, from the middle outwards as long as it gets better.
SHRINKAGES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6)
FIRST = 2
#: Columns that the choice is made on.
COLUMNS = 16


def shrunk(G: Float64, shrinkage: float) -> Float64:
    """``(1 - shrinkage) G + shrinkage mean(diag G) I`` over the inputs that are not always zero."""
    alive = G.diagonal() > 0
    if not shrinkage or not alive.any():
        return G
    made = (1 - shrinkage) * G
    made[alive, alive] += shrinkage * G.diagonal()[alive].mean()
    return made


def cross_validated(
    problem: Problem, folds: tuple[Float64, Float64], steps: Recipe, symmetric: bool, pool: Workers
) -> float:
    """Shrinkage with the least error on one fold of what is solved on the other, both ways round, for some columns."""
    some = np.unique(np.linspace(0, len(problem.W) - 1, COLUMNS).astype(np.intp))
    part = dataclasses.replace(problem, W=np.ascontiguousarray(problem.W[some]))

    @functools.cache
    def error(number: int) -> float:
        def one_way(seen: int) -> float:
            return _error(part, shrunk(folds[seen], SHRINKAGES[number]), folds[1 - seen], steps, symmetric)

        return sum(pool.map(one_way, (0, 1)))

    best = FIRST
    for step in (-1, 1):
        while 0 <= best + step < len(SHRINKAGES) and error(best + step) < error(best):
            best += step
    return SHRINKAGES[best]


def _error(part: Problem, seen: Float64, unseen: Float64, steps: Recipe, symmetric: bool) -> float:
    """Error on `unseen` of what is solved on `seen`."""
    problem = dataclasses.replace(part, G=seen)
    order = ORDERS[steps.order](problem.W, seen.diagonal())
    with Workers(1) as pool:
        (start, *_) = starts(problem, steps, order, None, symmetric, pool)
        descent = Descent(problem, start.grid, start.codes, pool)
        for _ in range(steps.sweeps):
            descent.sweep(order, steps.refit)
        judged = dataclasses.replace(part, G=unseen)
        solution = descent.solution
        return float(judged.objective(solution.codes, solution.grid, slice(None)).sum())
