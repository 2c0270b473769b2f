"""How much to shrink a Gram matrix towards a multiple of the identity, so that what is solved holds on other inputs.

What is minimised on few samples fits their chance correlations. ``(1 - s) G + s mean(diag G) I`` damps these; the best
s differs from layer to layer, so it is chosen by cross-validation on the two folds of a `Gram`.

Half of the samples need more shrinkage than all of them. What s fights is the variance of G, one over the number of
samples, and the best ``s / (1 - s)`` is proportional to it, for the matrix itself [1]_ as for a ridge regression on it,
which each step of Babai's nearest plane is. So what suits a fold is halved in these terms.

.. [1] O. Ledoit, M. Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
   Multivariate Analysis 88 (2004) 365-411.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from comq_np.descent import Descent, Float64, Problem, Real
from comq_np.orders import ORDERS
from comq_np.parallel import Workers
from comq_np.recipes import Recipe
from comq_np.starts import starts

#: What is tried: every second one, then those beside the best of them.
SHRINKAGES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6)
#: Added to a shrinkage before its logarithm is taken.
OFFSET = 1e-3
#: Columns that the choice is made on.
COLUMNS = 16


def shrunk(G: Real, shrinkage: float) -> Real:
    """``(1 - shrinkage) G + shrinkage mean(diag G) I`` over the inputs that are not always zero."""
    alive = G.diagonal() > 0
    if not shrinkage or not alive.any():
        return G
    made = (1 - shrinkage) * G
    made[alive, alive] += shrinkage * G.diagonal()[alive].mean()
    return made


def cross_validated(problem: Problem, folds: tuple[Float64, Float64], steps: Recipe, pool: Workers) -> float:
    """Shrinkage with the least error on one fold of what is solved on the other, made to suit both folds together."""
    some = np.unique(np.linspace(0, len(problem.W) - 1, COLUMNS).astype(np.intp))
    part = dataclasses.replace(problem, W=np.ascontiguousarray(problem.W[some]))
    single = [fold.astype(np.float32) for fold in folds]

    def one_way(trial: tuple[int, int]) -> float:
        number, seen = trial
        share = SHRINKAGES[number]
        # Only a matrix that is not shrunk may be too close to singular for single precision.
        G = shrunk(single[seen], share) if share else folds[seen]
        return _error(part, G, single[1 - seen], steps)

    errors: dict[int, float] = {}

    def judge(numbers: list[int]) -> int:
        """Judge them both ways round; the number with the least error so far."""
        found = pool.map(one_way, [(number, seen) for number in numbers for seen in (0, 1)])
        errors.update(zip(numbers, map(sum, zip(found[::2], found[1::2], strict=True)), strict=True))
        return min(sorted(errors), key=errors.__getitem__)

    best = judge(list(range(1, len(SHRINKAGES), 2)))
    best = judge([best - 1, best + 1])
    inside = 0 < best < len(SHRINKAGES) - 1
    share = _between(best, [errors[k] for k in (best - 1, best, best + 1)]) if inside else SHRINKAGES[best]
    return share / (2 - share)  # half of it, as s / (1 - s)


def _between(best: int, errors: list[float]) -> float:
    """Shrinkage where a parabola has its minimum, through the errors at the best one and at those beside it."""
    at = np.log(np.array(SHRINKAGES[best - 1 : best + 2]) + OFFSET)
    slopes = np.diff(errors) / np.diff(at)
    bend = slopes[1] - slopes[0]
    share = at[:2].mean() - slopes[0] * (at[2] - at[0]) / (2 * bend) if bend > 0 else at[1]
    return float(np.exp(share) - OFFSET)


def _error(part: Problem, seen: Real, unseen: Real, steps: Recipe) -> float:
    """Error on `unseen` of what is solved on `seen`."""
    problem = dataclasses.replace(part, G=seen)
    order = ORDERS[steps.order](problem.W, seen)
    with Workers(1) as pool:
        (start, *_) = starts(problem, steps.replace(neighbours=0, other_orders=(), paths=1), order, None, pool)
        descent = Descent(problem, start.grid, start.codes, pool)
        for _ in range(steps.sweeps):
            descent.sweep(order, steps.refit)
        judged = dataclasses.replace(part, G=unseen)
        solution = descent.solution
        return float(judged.objective(solution.codes, solution.grid, slice(None)).sum())
