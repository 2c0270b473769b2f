"""The Gram matrix of an embedding's inputs: diagonal, since each of them is one row of the identity."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from comq_np import checks

#: No token can have come up more often.
MOST = 2**53


class CountFold(NamedTuple):
    """How often each token came up among the samples of one fold, (m,), and how many samples there were."""

    counts: npt.NDArray[np.int64]
    count: int  # type: ignore[assignment]  # hides tuple.count


class TokenCounts:
    """Gram matrix of the inputs of an embedding, which looks rows of its weights up: how often each one is.

    Seen as a layer, an embedding multiplies one-hot vectors x by its weights W (m, n), so that ``X.T @ X`` is diagonal.
    `solve` takes it in the place of a `Gram`. The samples are kept apart in two folds, as in a `Gram`.

    Parameters
    ----------
    m : int >= 1
        Number of tokens: rows of the weights `W`.

    Raises
    ------
    InputError
        If `m` is not such an integer.

    Examples
    --------
    >>> import comq_np
    >>> tokens = comq_np.TokenCounts(4)
    >>> tokens.update([[0, 3, 3], [0, 1, 3]])
    >>> tokens.counts, tokens.count
    (array([2, 1, 0, 3]), 6)
    """

    def __init__(self, m: int) -> None:
        self._m = checks.integer("m", m, 1, 2**31 - 1)
        self._counts = np.zeros((2, self._m), np.int64)

    @classmethod
    def from_folds(cls, folds: tuple[npt.ArrayLike, npt.ArrayLike]) -> TokenCounts:
        """Token counts of two folds.

        Parameters
        ----------
        folds : tuple of two array_like of int >= 0, shape (m,)
            How often each token came up in either fold.

        Returns
        -------
        TokenCounts
            Counts of their own, sharing no memory with them.

        Raises
        ------
        InputError
            If they are not two such arrays of one shape.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.TokenCounts.from_folds(([1, 0], [2, 5])).counts
        array([3, 5])
        """
        parts = [np.asarray(part) for part in folds]
        shapes = {part.shape for part in parts}
        whole = all(part.dtype.kind in "iu" for part in parts)
        if len(parts) != 2 or len(shapes) > 1 or parts[0].ndim != 1 or not whole:
            raise checks.InputError("`folds` must be two arrays of integers of one shape (m,).")
        if any(part.size and (part.min() < 0 or part.max() > MOST) for part in parts):
            raise checks.InputError(f"`folds` must hold integers from 0 to {MOST}.")
        made = cls(parts[0].size)
        made._counts[:] = parts
        return made

    def update(self, tokens: npt.ArrayLike, fold: int | None = None) -> None:
        """Count tokens, half of them for each fold.

        Parameters
        ----------
        tokens : array_like of int from 0 to m - 1
            Numbers of tokens, of any shape; an entry of the first axis stays whole.
        fold : {0, 1}, optional
            Fold to count all of them in.

        Raises
        ------
        InputError
            If `tokens` are not such integers; nothing is counted then.

        Examples
        --------
        >>> import comq_np
        >>> tokens = comq_np.TokenCounts(3)
        >>> tokens.update([2, 2, 0], fold=1)
        >>> tokens.counts
        array([1, 0, 2])
        """
        array = np.atleast_1d(np.asarray(tokens))
        if fold is not None:
            fold = checks.integer("fold", fold, 0, 1)
        if not array.size:
            return
        if array.dtype.kind not in "iu":
            raise checks.InputError(f"`tokens` must hold integers, got dtype {array.dtype}.")
        if array.min() < 0 or array.max() >= self._m:
            raise checks.InputError(f"`tokens` must lie from 0 to {self._m - 1}, got {array.min()} to {array.max()}.")
        first = int(self._counts[1].sum() < self._counts[0].sum()) if fold is None else fold
        half = len(array) - len(array) // 2 if fold is None else len(array)
        for number, part in ((first, array[:half]), (1 - first, array[half:])):
            self._counts[number] += np.bincount(part.ravel().astype(np.int64), minlength=self._m)

    def merge(self, other: TokenCounts) -> None:
        """Add the counts of others, fold by fold.

        Parameters
        ----------
        other : TokenCounts
            Counts of as many tokens.

        Raises
        ------
        InputError
            If they are no such counts.

        Examples
        --------
        >>> import comq_np
        >>> one, two = comq_np.TokenCounts(2), comq_np.TokenCounts(2)
        >>> one.update([0])
        >>> two.update([0, 1])
        >>> one.merge(two)
        >>> one.counts
        array([2, 1])
        """
        if not isinstance(other, TokenCounts) or other._m != self._m:
            what = f"of {other._m}" if isinstance(other, TokenCounts) else repr(type(other).__name__)
            raise checks.InputError(f"`other` must be TokenCounts of {self._m} tokens, got {what}.")
        self._counts += other._counts

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How often each token came up, (m,): the diagonal of ``X.T @ X``."""
        total: npt.NDArray[np.int64] = self._counts.sum(axis=0)
        return total

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self._counts.sum())

    @property
    def nbytes(self) -> int:
        """Bytes that the counts take."""
        return self._counts.nbytes

    @property
    def folds(self) -> tuple[CountFold, CountFold]:
        """What the two folds have counted: (counts, count) each, not to be written to."""
        first, second = self._counts.view()
        for part in (first, second):
            part.flags.writeable = False
        return CountFold(first, int(first.sum())), CountFold(second, int(second.sum()))

    @property
    def problems(self) -> None:
        """None: they are those of a single problem, unlike a `Gram` of many."""

    def __len__(self) -> int:
        return self._m

    def __repr__(self) -> str:
        return f"TokenCounts({self._m}, count={self.count})"
