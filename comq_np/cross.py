"""Weights that give the outputs of the float model on the inputs of the quantized one: sequential calibration.

With X~ (`G` = X~'X~) from the quantized model and X from the float one (`cross` = X~'X), the outputs of W on X~ are off
by (X - X~) W. Least squares would add D = G^-1 X~'(X - X~) W and so fit the chance correlations of few samples too; a
ridge, D = (G + ridge I)^-1 X~'(X - X~) W, fits less of them. How strong it must be, the data say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg

from comq_np import checks
from comq_np.gram import Fold, Gram
from comq_np.parallel import Workers

#: Ridges to choose from, in units of mean(diag(G)); at infinity the weights stay as they are.
RIDGES = (np.inf, *map(float, np.logspace(3, -7, 101)))
#: Float32 products leave the Gram matrix eigenvalues of up to this share of its trace where it has none.
ROUNDING = float(np.finfo(np.float32).eps)
Float64 = npt.NDArray[np.float64]


def matched_weights(W: npt.ArrayLike, G: npt.ArrayLike | Gram, cross: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Weights that give on the quantized model's inputs the outputs of `W` on the float model's.

    Minimises ``||Xq @ weights - X @ W||**2`` over `weights`, with a ridge towards `W` against what few samples show by
    chance. ``solve(W, G, cross=cross)`` solves for these weights, and its report refers to them.

    Parameters
    ----------
    W : array_like of real, shape (m, n), (m,) or (b, m, n)
        Weights of a layer that computes ``X @ W``, or of many small ones. Taken as float32.
    G : array_like of real, shape (m, m) or (b, m, m), or Gram
        Gram matrix ``Xq.T @ Xq`` of the layer's inputs `Xq` in the quantized model.
    cross : array_like of real, shape ([b,] m, m) or (2, [b,] m, m)
        ``Xq.T @ X`` with the inputs `X` of the same samples in the float model, in the unit of `G`: summed over all
        samples, or for each fold of a `Gram`.

    Returns
    -------
    ndarray of float32, of the shape of `W`
        `W` itself where the samples do not show that other weights are better.

    Raises
    ------
    InputError
        If the arguments do not fit together or are not finite.

    Notes
    -----
    With one matrix, the ridge is the most likely one (empirical Bayes): along each eigenvector of `G`, divided by the
    root of its eigenvalue, what `cross` differs by from `G` is as large as anywhere where it is noise, and grows with
    the eigenvalue where it is not. So it takes up less than it could where all eigenvalues are alike, or where the
    error is in directions of small ones. And it takes the samples for independent: where a few texts or images give
    many of them each, what these have in common passes for more than noise.

    With a matrix for each fold, the ridge is the one by which the corrections found on either fold do most on the
    other, the worse way round. That holds for such samples too, if the folds share no text or image. Where a fold has
    no more samples than `G` has rows, chance may still favour a weak ridge; it is then at least the most likely one.

    Either way the ridge does not depend on `W`, so each column is matched on its own.

    Examples
    --------
    >>> import numpy as np, comq_np
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.normal(size=(500, 8)) * np.arange(1, 9), rng.normal(size=(8, 3))
    >>> Xq = X + 0.1 * X[:, ::-1]
    >>> weights = comq_np.matched_weights(W, Xq.T @ Xq, Xq.T @ X)
    >>> bool(np.linalg.norm(Xq @ weights - X @ W) < 0.1 * np.linalg.norm(Xq @ W - X @ W))
    True
    """
    weights = checks.weights(W, ndim=(1, 2, 3))
    if weights.ndim == 3:
        return np.stack([_matched(*one) for one in _problems(weights, G, cross)])
    return _matched(weights, G, cross)


def _problems(
    weights: npt.NDArray[np.float32], G: npt.ArrayLike | Gram, cross: npt.ArrayLike
) -> Iterator[tuple[npt.NDArray[np.float32], npt.ArrayLike | Gram, npt.NDArray[np.float64]]]:
    """Weights, `G` and `cross` of each of many problems."""
    count = len(weights)
    crosses = checks.real_array("cross", cross, (3, 4))
    if crosses.shape[-3] != count:
        raise checks.InputError(f"`cross` must be of {count} problems, as `W` has, got {crosses.shape}.")
    if not isinstance(G, Gram):
        grams: list[Any] = list(checks.real_array("G", G, (3,)))
    elif G.problems == count:
        first, second = G.folds
        grams = [
            Gram.from_folds(
                (Fold(first.matrix[p], first.sum[p], first.count), Fold(second.matrix[p], second.sum[p], second.count))
            )
            for p in range(count)
        ]
    else:
        grams = []
    if len(grams) != count:
        raise checks.InputError(f"`G` must be of {count} problems, as `W` has.")
    return zip(weights, grams, np.moveaxis(crosses, -3, 0), strict=True)


def _matched(
    weights: npt.NDArray[np.float32], G: npt.ArrayLike | Gram, cross: npt.ArrayLike
) -> npt.NDArray[np.float32]:
    """Weights of one problem, (m, n) or (m,)."""
    H = checks.gram_matrix(G.matrix if isinstance(G, Gram) else G, len(weights))
    folds = G.folds if isinstance(G, Gram) else ()
    fewest = min((fold.count for fold in folds), default=0)
    C = checks.cross(cross, H, folded=fewest > 0)
    columns = weights.reshape(len(weights), -1).astype(np.float64)
    with Workers(1):
        unit = H.diagonal().max() or 1.0  # squares of what is far from 1 would overflow
        fit = _fit(H / unit, (C if C.ndim == 2 else C.sum(axis=0)) / unit)
        ridge = 0.0 if C.ndim == 2 else _cross_validated([fold.matrix for fold in folds], list(C))
        if C.ndim == 2 or fewest <= len(H):
            ridge = max(ridge, _likeliest(fit))
        matched = columns + fit.correction(ridge, columns)
    return checks.weights(matched.reshape(weights.shape), "matched_weights")


class _Fit(NamedTuple):
    """Regression of X - X~ on X~, in the eigenvectors V of H = X~'X~."""

    vectors: Float64  # V, (m, k)
    eigenvalues: Float64  # (k,)
    errors: Float64  # V'X~'(X - X~), (k, m)
    unit: float  # mean(diag(H))

    def correction(self, ridge: float, W: Float64) -> Float64:
        """What to add to `W`."""
        made: Float64 = self.vectors @ (self.shrunk(ridge)[:, None] * (self.errors @ W))
        return made

    def shrunk(self, ridge: float) -> Float64:
        """Inverses of the eigenvalues with the ridge added."""
        made: Float64 = 1 / (self.eigenvalues + ridge * self.unit)
        return made


def _fit(H: Float64, C: Float64) -> _Fit:
    """Fit along the eigenvectors whose eigenvalues are more than rounding."""
    eigenvalues, vectors = scipy.linalg.eigh(H, driver="evd")
    kept = eigenvalues > ROUNDING * H.trace()
    vectors = vectors[:, kept]
    return _Fit(vectors, eigenvalues[kept], vectors.T @ (C - H), float(H.trace()) / len(H))


def _likeliest(fit: _Fit) -> float:
    """Ridge that makes the projections of X - X~ on the directions of X~ the most likely.

    Where the coefficients of the regression are drawn alike in all directions, with noise of variance s besides, these
    are normal with variance s (1 + eigenvalue / ridge). The likelihood is that of the best s.
    """
    if not fit.errors.any():
        return np.inf
    squares = np.square(fit.errors).mean(axis=1) / fit.eigenvalues

    def cost(ridge: float) -> float:
        spread = 1 + fit.eigenvalues / (ridge * fit.unit)
        return len(spread) * float(np.log((squares / spread).mean())) + float(np.log(spread).sum())

    return min(RIDGES, key=cost)


def _cross_validated(H: list[Float64], C: list[Float64]) -> float:
    """Ridge by which the correction found on either fold gains most on the other, the worse way round."""
    gains = [_gains(_fit(H[k], C[k]), H[1 - k], C[1 - k]) for k in (0, 1)]
    return RIDGES[int(np.minimum(*gains).argmax())]


def _gains(fit: _Fit, H: Float64, C: Float64) -> Float64:
    """What the corrections of a fit take off ``||X~ - X||**2`` on the other fold, for each ridge."""
    gained = np.einsum("km,km->k", fit.errors, fit.vectors.T @ (C - H))
    spent = (fit.errors @ fit.errors.T) * (fit.vectors.T @ H @ fit.vectors)
    return np.array([shrunk @ (2 * gained - spent @ shrunk) for shrunk in map(fit.shrunk, RIDGES)])
