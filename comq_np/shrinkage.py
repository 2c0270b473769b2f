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

from comq_np.descent import Descent
from comq_np.layouts import Float32
from comq_np.minimise import measured
from comq_np.parallel import Workers
from comq_np.problem import Problem
from comq_np.recipes import Recipe
from comq_np.starts import starts

#: What is tried: every second one, then those beside the best of them.
SHRINKAGES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6)
#: Added to a shrinkage before its logarithm is taken.
OFFSET = 1e-3
#: Least that is chosen for fewer samples than rows: the matrix is singular then, and what it hides is not small.
LEAST = 0.005
#: Columns that the choice is made on.
COLUMNS = 16
#: Sweeps of a trial.
SWEEPS = 8


def cross_validated(
    problem: Problem, folds: tuple[Float32, Float32], count: int, steps: Recipe, pool: Workers
) -> float:
    """Shrinkage with the least error on one fold of what is solved on the other, made to suit both folds together.

    The `folds` (1, m, m) have their rows in the order of the problem's; `count` is the number of samples in both.
    """
    some = np.unique(np.linspace(0, problem.count - 1, COLUMNS).astype(np.intp))
    part = dataclasses.replace(problem, W=np.ascontiguousarray(problem.W[:, :, some]), double=None)
    quick = steps.replace(neighbours=0, other_orders=(), paths=1)

    def one_way(trial: tuple[int, int]) -> float:
        number, seen = trial
        problem = dataclasses.replace(part, G=folds[seen].copy()).shrunk(SHRINKAGES[number])
        return _error(problem, folds[1 - seen], quick)

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
    share = share / (2 - share)  # half of it, as s / (1 - s)
    return max(share, LEAST) if count < len(folds[0][0]) else share


def _between(best: int, errors: list[float]) -> float:
    """Shrinkage where a parabola has its minimum, through the errors at the best one and at those beside it."""
    at = np.log(np.array(SHRINKAGES[best - 1 : best + 2]) + OFFSET)
    slopes = np.diff(errors) / np.diff(at)
    bend = slopes[1] - slopes[0]
    share = at[:2].mean() - slopes[0] * (at[2] - at[0]) / (2 * bend) if bend > 0 else at[1]
    return float(np.exp(share) - OFFSET)


def _error(problem: Problem, unseen: Float32, steps: Recipe) -> float:
    """Error on `unseen` inputs of what is solved on others."""
    with Workers(1) as pool:
        (start, *_) = starts(problem, steps, None, pool)
        descent = Descent(problem, start, pool)
        for _ in range(SWEEPS):
            descent.sweep(None)
            descent.refit()
        judged = dataclasses.replace(problem, G=unseen)
        return float(measured(judged, descent.solution.codes, descent.solution.grid, pool).objective.sum())
