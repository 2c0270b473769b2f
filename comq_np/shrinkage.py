"""How much to shrink a Gram matrix, so that what is solved holds on other inputs.

What is minimised on few samples fits their chance correlations. ``(1 - s) G + s mean(diag G) I`` damps these; the best
s differs from layer to layer, so it is chosen by cross-validation on the two folds of a `Gram`.

Half of the samples need more shrinkage than all of them. What s fights is the variance of G, one over the number of
samples, and the best ``s / (1 - s)`` is proportional to it, for the matrix itself [1]_ as for a ridge regression on it,
which each step of Babai's nearest plane is. So what suits a fold is halved in these terms.

.. [1] O. Ledoit, M. Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
   Multivariate Analysis 88 (2004) 365-411.

One s for all directions leaves the most of the largest ones, which a few inputs may have made, and the least of those
that these inputs happen to miss. Nonlinear shrinkage asks of each direction by itself how much other samples vary
along it [2]_: the eigenvectors are those of one fold, their variances those of the other, made to rise with the
eigenvalues of the first [3]_. It takes an eigendecomposition of each fold.

.. [2] C. Lam, "Nonparametric eigenvalue-regularized precision or covariance matrix estimator", Annals of Statistics 44
   (2016) 928-953.
.. [3] D. Bartz, "Cross-validation based nonlinear shrinkage", arXiv:1611.00798.
.. [4] T. Hastie, R. Tibshirani, J. Friedman, "The Elements of Statistical Learning", 2nd edition, section 7.10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from comq_np.backend import Backend
from comq_np.gram import Gram
from comq_np.layouts import Float64
from comq_np.problem import Problem
from comq_np.proof import is_provable
from comq_np.recipes import Recipe

#: What is tried: every second one, then those beside the best of them.
SHRINKAGES = (0.0, 0.01, 0.03, 0.1, 0.3, 0.6, 0.8)
#: Added to a shrinkage before its logarithm is taken.
OFFSET = 1e-3
#: The largest is chosen of those whose errors are within this (relative) of the least. Folds are more like each other
#: than like what comes later, and so ask for too little; the same is meant by the one standard error of [4]_, of which
#: two folds tell nothing.
EQUAL = 0.015
#: Least that is chosen for fewer samples than rows: the matrix is singular then, and what it hides is not small.
LEAST = 0.005
#: Columns that the choice is made on; of many problems, at least one of each.
COLUMNS = 16
#: Sweeps of a trial.
SWEEPS = 8


@dataclass(frozen=True)
class Nonlinear:
    """Matrices (b, m, m) in the place of the given ones, and the `share` of their eigenvalues' spread that is lost.

    The spread is their standard deviation in units of their mean; with one s for all directions, s of it is lost.
    """

    matrices: Float64
    share: float


def nonlinear(gram: Gram, centred: bool, backend: Backend) -> Nonlinear | float:
    """Matrices whose eigenvalues are those that the other fold confirms, the sum of what comes of both folds.

    Where nothing varies in a fold, or it has no samples, nothing can be told, and the shrinkage is 0.
    """
    shape = gram.problems or 1, len(gram), len(gram)
    folds = [gram.fold_matrix(fold, centred).reshape(shape) for fold in (0, 1)]
    counts = [fold.count for fold in gram.folds]
    if not all(fold.any() for fold in folds):
        return 0.0

    def confirmed(seen: int) -> Float64:
        made = np.zeros(shape)
        for p in range(len(made)):
            _confirm(folds[seen][p], folds[1 - seen][p], counts[seen] / counts[1 - seen], made[p])
        return made

    found, other = backend.map(confirmed, [0, 1])
    found += other
    before, after = _spread(folds[0] + folds[1]), _spread(found)
    return Nonlinear(found, 1 - after / before if after < before else 0.0)


def _confirm(own: Float64, other: Float64, share: float, made: Float64) -> None:
    """Fill a matrix of zeros with that of the eigenvectors of one fold, and of a share of the other along them."""
    from scipy.optimize import isotonic_regression  # which takes longer to import than all of this package

    live = np.flatnonzero(np.diagonal(own) + np.diagonal(other) > 0)  # else eigenvectors could mix what must stay zero
    square = np.ix_(live, live)
    _, vectors = scipy.linalg.eigh(own[square], driver="evd", check_finite=False)
    variances = np.einsum("ij,ij->j", vectors, other[square] @ vectors)
    rising = isotonic_regression(np.maximum(variances, 0)).x
    product = (vectors * (share * rising)) @ vectors.T
    made[square] = (product + product.T) / 2


def _spread(matrices: Float64) -> float:
    """Standard deviation of the eigenvalues of matrices (b, m, m), in units of their mean, of all together."""
    scaled, rows = matrices / np.trace(matrices, axis1=1, axis2=2).sum(), matrices[:, 0].size
    return float(np.sqrt(max(rows * np.vdot(scaled, scaled) - 1, 0)))


def sampled(count: int, problems: int = 1) -> npt.NDArray[np.intp]:
    """Columns, of so many in each problem, that the choice is made on."""
    return np.unique(np.linspace(0, count - 1, max(1, COLUMNS // problems)).astype(np.intp))


def cross_validated(problem: Problem, folds: list[Any], count: int, steps: Recipe, backend: Backend) -> float:
    """Shrinkage with the least error on one fold of what is solved on the other, made to suit both folds together.

    All problems have it in common: what counts is the error of all of them.

    The `folds` are those of the backend; `count` is the number of samples in both.
    """
    some = sampled(problem.W.shape[2], problem.W.shape[0])
    quick = steps.replace(neighbours=0, other_orders=(), paths=1)

    def one_way(trial: tuple[int, int]) -> float:
        number, seen = trial
        with backend.alone() as machine:
            here = machine.shrunk(machine.trial(problem, some, folds[seen]), SHRINKAGES[number])
            (start, *_) = machine.starts(here, quick, None)
            descent = machine.descent(here, start)
            for _ in range(SWEEPS):
                descent.sweep(None)
                descent.refit()
            if is_provable(
                here.W.shape[1], here.levels, steps
            ):  # else the minima that sweeps end in would decide, not the samples
                machine.prove(here, False, descent.solution)
            judged = machine.trial(problem, some, folds[1 - seen])
            found = machine.measured(judged, descent.solution.codes, descent.solution.grid)
            return judged.scaled_total(found.objective)

    errors: dict[int, float] = {}

    def judge(numbers: list[int]) -> int:
        """Judge them both ways round; the number with the least error so far."""
        found = backend.map(one_way, [(number, seen) for number in numbers for seen in (0, 1)])
        errors.update(zip(numbers, map(sum, zip(found[::2], found[1::2], strict=True)), strict=True))
        return min(sorted(errors), key=errors.__getitem__)

    best = judge(list(range(1, len(SHRINKAGES), 2)))
    best = judge([best - 1, best + 1])
    largest = max([best, *(number for number, error in errors.items() if error < (1 + EQUAL) * errors[best])])
    alone = 0 < best == largest < len(SHRINKAGES) - 1  # then the errors beside it tell where the least would be
    share = _between(best, [errors[k] for k in (best - 1, best, best + 1)]) if alone else SHRINKAGES[largest]
    share = share / (2 - share)  # half of it, as s / (1 - s)
    return max(share, LEAST) if count < problem.W.shape[1] else share


def _between(best: int, errors: list[float]) -> float:
    """Shrinkage where a parabola has its minimum, through the errors at the best one and at those beside it."""
    at = np.log(np.array(SHRINKAGES[best - 1 : best + 2]) + OFFSET)
    slopes = np.diff(errors) / np.diff(at)
    bend = slopes[1] - slopes[0]
    share = at[:2].mean() - slopes[0] * (at[2] - at[0]) / (2 * bend) if bend > 0 else at[1]
    return float(np.exp(share) - OFFSET)
