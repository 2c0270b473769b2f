"""Gram matrices of layer inputs, accumulated as the inputs stream by."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from comq_np import checks

#: Samples of one float32 product: so many that adding it up in float64 costs little beside it. BLAS sums in blocks, so
#: that its rounding stays below that of float32 inputs.
CHUNK = 2048
#: Inputs multiplied by all others at a time: so few that their product is still in the cache when it is added up.
PANEL = 384
#: Inputs of all problems, samples times widths, that are multiplied at a time, unless the samples are `FEW`.
BATCH = 2**20
#: Samples of one float32 sum, and of the probe that tells which inputs may vary little about their mean.
FEW = 128
#: An input whose centred square is below this share of its square does not vary: float64 sums leave that much.
STILL = 1e-12
#: Inputs beyond this size would overflow where float32 products of a chunk are summed.
MAX_INPUT = 1e17
#: Sums of so many bytes have pages of their own, which are the system's again once a Gram is let go. Among what a model
#: allocates and frees with each batch, malloc would leave holes as large as that.
OWN_PAGES = 2**20
#: Widest inputs, and most problems.
MOST = 2**29


class Fold(NamedTuple):
    """Sums over the samples of one fold: X.T @ X ([b,] m, m), X.sum(axis=0) ([b,] m), and how many there were."""

    matrix: npt.NDArray[np.float64]
    sum: npt.NDArray[np.float64]
    count: int  # type: ignore[assignment]  # hides tuple.count


class Gram:
    """Gram matrix ``X.T @ X`` of a layer's inputs, with their mean and count.

    Products are float32, their sums float64. The samples are kept apart in two folds, half of every update in each, so
    that what is fitted on one can be judged on the other.

    With `problems`, it is as many Grams in one, of inputs that always come together, such as those of the groups of a
    convolution: for weights (b, m, n). Its arrays have a leading axis then.

    Parameters
    ----------
    m : int >= 1
        Width of the inputs: rows of the weights `W`.
    problems : int >= 1, optional
        Number of problems, b; None is one problem, without an axis for it.

    Raises
    ------
    InputError
        If an argument is not such an integer.

    Examples
    --------
    >>> import comq_np, numpy as np
    >>> gram = comq_np.Gram(2)
    >>> gram.update([[1.0, 2.0], [3.0, 4.0]])
    >>> gram.matrix
    array([[10., 14.],
           [14., 20.]])
    >>> gram.mean, gram.count
    (array([2., 3.]), 2)
    >>> groups = comq_np.Gram(2, problems=3)
    >>> groups.update(np.ones((10, 3, 2)))
    >>> groups.matrix.shape, groups.mean.shape, groups.count
    ((3, 2, 2), (3, 2), 10)
    """

    def __init__(self, m: int, problems: int | None = None) -> None:
        self._m = checks.integer("m", m, 1, MOST)
        self._problems = None if problems is None else checks.integer("problems", problems, 1, MOST)
        self._matrices = _zeros((2, *self._shape, self._m))
        self._sums = np.zeros((2, *self._shape))
        self._counts = [0, 0]
        self._masses = [0.0, 0.0]  # counts, but where groups of samples have weights

    @property
    def _shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self._m,) if self._problems is None else (self._problems, self._m)

    @classmethod
    def from_folds(cls, folds: tuple[Fold, Fold]) -> Gram:
        """Gram with the sums of two folds.

        Parameters
        ----------
        folds : tuple of two (matrix, sum, count)
            What another Gram's `folds` returned, or arrays like it.

        Returns
        -------
        Gram
            A Gram of its own, sharing no memory with them.

        Raises
        ------
        InputError
            If the shapes do not fit together, or a number is not finite or a count is negative.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.Gram.from_folds(comq_np.Gram(3).folds).count
        0
        """
        try:
            parts = [Fold(matrix, np.asarray(total), count) for matrix, total, count in folds]
        except (TypeError, ValueError):
            parts = []
        if len(parts) != 2:
            raise checks.InputError("`folds` must be two of (matrix, sum, count).")
        shape = parts[0].sum.shape
        made = cls(shape[1], shape[0]) if len(shape) == 2 else cls(parts[0].sum.size)
        for index, (matrix, total, count) in enumerate(parts):
            for name, array, into in (("matrix", matrix, made._matrices), ("sum", total, made._sums)):
                values = checks.real_array(name, array, (into.ndim - 1,))
                if values.shape != into.shape[1:]:
                    raise checks.InputError(f"`{name}` must have shape {into.shape[1:]}, got {values.shape}.")
                into[index] = values
            made._counts[index] = checks.integer("count", count, 0, 2**62)
            made._masses[index] = float(made._counts[index])
        return made

    @classmethod
    def _weighted(cls, grams: list[tuple[float, Gram]]) -> Gram:
        """Sum of Grams whose samples have weights."""
        (_, first), *_ = grams
        made = cls(first._m, first._problems)
        for weight, gram in grams:
            for fold in (0, 1):
                made._matrices[fold] += weight * gram._matrices[fold]
            made._sums += weight * gram._sums
            made._counts = [a + b for a, b in zip(made._counts, gram._counts, strict=True)]
            made._masses = [a + weight * b for a, b in zip(made._masses, gram._masses, strict=True)]
        return made

    def update(self, X: npt.ArrayLike, fold: int | None = None) -> None:
        """Add samples, half of them to each fold.

        What belongs together should not be torn apart, or one fold knows about the other: an entry of the first of
        several leading axes (the tokens of a text, the pixels of an image) stays whole, and since neighbours are alike,
        the first half of them goes to one fold and the second half to the other. Where they are odd in number, the
        fold with fewer samples gets one more.

        Parameters
        ----------
        X : array_like of real, shape (..., [b,] m)
            Inputs of the layer; leading axes are samples. ``X[None]`` keeps the rows of one (samples, m) together.
        fold : {0, 1}, optional
            Fold to add all of them to.

        Raises
        ------
        InputError
            If `X` does not have that shape or is not finite; nothing is added then.

        Examples
        --------
        >>> import comq_np
        >>> gram = comq_np.Gram(1)
        >>> gram.update([[1.0], [1.0], [3.0]])
        >>> [fold.count for fold in gram.folds]
        [2, 1]
        >>> gram.update([[[2.0], [2.0]]])
        >>> [fold.count for fold in gram.folds]
        [2, 3]
        """
        for number, part in self._parts(self._checked("X", X), fold):
            self._add(part, number)

    def _checked(self, name: str, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """Inputs as an array, if they are finite and of the right shape."""
        array, shape = checks.array_of(name, X), self._shape
        if array.shape[-len(shape) :] != shape:
            raise checks.InputError(f"`{name}` must have shape (..., {', '.join(map(str, shape))}), got {array.shape}.")
        largest = checks.largest(checks.real_dtype(name, array)) if array.size else 0.0
        if not largest <= MAX_INPUT:
            checks.real_array(name, array, (array.ndim,))
            raise checks.InputError(f"`{name}` must lie within ±{MAX_INPUT:g}, got an entry of size {largest:g}.")
        return array

    def _parts(self, array: npt.NDArray[Any], fold: int | None) -> list[tuple[int, npt.NDArray[Any]]]:
        """Fold and samples (k, m), or (k, b m), of either half of inputs, or of all of them where the fold is given."""
        shape = self._shape
        items = array if array.ndim > len(shape) else array[None]
        first = int(self._counts[1] < self._counts[0]) if fold is None else checks.integer("fold", fold, 0, 1)
        half = len(items) - len(items) // 2 if fold is None else len(items)
        parts = ((first, items[:half]), (1 - first, items[half:]))
        return [(number, part.reshape(-1, math.prod(shape))) for number, part in parts]

    def _add(self, X: npt.NDArray[Any], fold: int) -> None:
        """Add samples (k, m), or (k, b m), to a fold."""
        apart, chunk = (-1, self._m), _chunk(self._m, self._problems)
        for start in range(0, len(X), chunk):
            part = X[start : start + chunk].astype(np.float32, copy=False)
            mean = _far_mean(part)
            rest = part - mean if mean.any() else part
            left, far = _sum(rest), mean.astype(np.float64)
            matrices, shift = self._matrices[fold].reshape(-1, self._m, self._m), left + 0.5 * len(part) * far
            _add_product(matrices, rest.reshape(len(part), *apart), far.reshape(apart), shift.reshape(apart))
            self._sums[fold] += (left + len(part) * far).reshape(self._shape)
        self._counts[fold] += len(X)
        self._masses[fold] += len(X)

    def merge(self, other: Gram) -> None:
        """Add the samples of another Gram, fold by fold.

        Parameters
        ----------
        other : Gram
            Gram of the same width, and as many problems.

        Raises
        ------
        InputError
            If it is no such Gram.

        Examples
        --------
        >>> import comq_np
        >>> one, two = comq_np.Gram(1), comq_np.Gram(1)
        >>> one.update([[1.0]])
        >>> two.update([[2.0]])
        >>> one.merge(two)
        >>> one.matrix
        array([[5.]])
        """
        if not isinstance(other, Gram) or other._shape != self._shape:
            what = other._size if isinstance(other, Gram) else repr(type(other).__name__)
            raise checks.InputError(f"`other` must be a Gram {self._size}, got {what}.")
        self._matrices += other._matrices
        self._sums += other._sums
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        self._masses = [a + b for a, b in zip(self._masses, other._masses, strict=True)]

    @property
    def problems(self) -> int | None:
        """Number of problems; None for one without an axis for it."""
        return self._problems

    @property
    def _size(self) -> str:
        """Width and problems, as a message shows them."""
        return f"of width {self._m}" + (f" and {self._problems} problems" if self._problems is not None else "")

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """``X.T @ X`` over all samples, ([b,] m, m)."""
        total: npt.NDArray[np.float64] = self._matrices.sum(axis=0)
        return total

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean over all samples, ([b,] m); zeros where there are none."""
        total: npt.NDArray[np.float64] = self._sums.sum(axis=0) / (sum(self._masses) or 1)
        return total

    @property
    def count(self) -> int:
        """Number of samples, of each problem."""
        return sum(self._counts)

    @property
    def nbytes(self) -> int:
        """Bytes that its sums take."""
        return size(self._m, self._problems)

    @property
    def centred(self) -> npt.NDArray[np.float64]:
        """``(X - mean).T @ (X - mean)`` over all samples, ([b,] m, m).

        An input that does not vary has a row and column of exact zeros: what the subtraction leaves of it is rounding.
        """
        return _centred(self.matrix, self.mean, sum(self._masses))

    def fold_matrix(self, fold: int, centred: bool = False) -> npt.NDArray[np.float64]:
        """``X.T @ X`` of one fold, with the fold's own mean subtracted if `centred`.

        Parameters
        ----------
        fold : {0, 1}
            Which fold.
        centred : bool
            Whether to subtract the mean.

        Returns
        -------
        ndarray of float64, shape ([b,] m, m)
            The matrix, not shared with the Gram.

        Raises
        ------
        InputError
            If `fold` is another number, or `centred` is not True or False.

        Examples
        --------
        >>> import comq_np
        >>> gram = comq_np.Gram(1)
        >>> gram.update([[1.0], [3.0]], fold=0)
        >>> gram.fold_matrix(0), gram.fold_matrix(0, centred=True)
        (array([[10.]]), array([[2.]]))
        """
        fold, centred = checks.integer("fold", fold, 0, 1), checks.boolean("centred", centred)
        matrix, total, mass = self._matrices[fold], self._sums[fold], self._masses[fold]
        return _centred(matrix, total / (mass or 1), mass) if centred else matrix.copy()

    @property
    def folds(self) -> tuple[Fold, Fold]:
        """The two folds' own (matrix, sum, count), not copied."""
        first, second = (Fold(*fold) for fold in zip(self._matrices, self._sums, self._counts, strict=True))
        return first, second

    def __len__(self) -> int:
        return self._m

    def __repr__(self) -> str:
        problems = "" if self._problems is None else f"problems={self._problems}, "
        return f"Gram({self._m}, {problems}count={self.count})"


def _zeros(shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Zeros, which take memory only where they are written."""
    length = 8 * math.prod(shape)
    if length < OWN_PAGES:
        return np.zeros(shape)
    private = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    try:
        pages = mmap.mmap(-1, length, **private)
    except (OSError, OverflowError):
        raise MemoryError(f"Unable to allocate {length} bytes for an array with shape {shape}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):  # as NumPy does; a system without them says no
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages).reshape(shape)


def size(m: int, problems: int | None = None) -> int:
    """Bytes that a Gram of width m takes."""
    return 2 * 8 * (m * m + m) * (problems or 1)


def work(m: int, problems: int | None = None) -> int:
    """Bytes that an update takes beyond the Gram of width m: the rows at hand, these without a mean, and products."""
    width = m * (problems or 1)
    return 2 * 4 * _chunk(m, problems) * width + (4 + 2 * 8) * min(PANEL, m) * width


def _chunk(m: int, problems: int | None) -> int:
    """Samples of one product."""
    return CHUNK if problems is None else min(CHUNK, max(FEW, BATCH // (m * problems)))


def _far_mean(part: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Mean, over a few samples, of the inputs that vary little about it in all, 0 for the others.

    It is left out of the float32 product and added back in float64: the rounding of large squares would else drown what
    varies.
    """
    probe = part[:FEW]
    mean: npt.NDArray[np.float32] = probe.mean(axis=0, dtype=np.float64).astype(np.float32)
    likely = np.flatnonzero(np.abs(mean) > np.ptp(probe, axis=0))  # in few samples an input varies less than in all
    found = likely[np.abs(mean[likely]) > np.ptp(part[:, likely], axis=0)]
    far = np.zeros_like(mean)
    far[found] = mean[found]
    return far


def _sum(part: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Sum over the samples, in float64 of float32 sums over few of them."""
    ones = np.ones(min(FEW, len(part)), np.float32)
    pieces = (part[start : start + FEW] for start in range(0, len(part), FEW))
    total: npt.NDArray[np.float64] = np.sum([ones[: len(piece)] @ piece for piece in pieces], axis=0, dtype=np.float64)
    return total


def _add_product(
    matrices: npt.NDArray[np.float64],
    rest: npt.NDArray[np.float32],
    far: npt.NDArray[np.float64],
    shift: npt.NDArray[np.float64],
) -> None:
    """Add ``rest.T @ rest`` of each problem, and the products with what was left out of it.

    These are ``outer(far, shift)`` and its transpose. The matrices are (b, m, m), the samples (k, b, m), others (b, m).
    """
    for first in range(0, matrices.shape[1], PANEL):
        some, others = slice(first, first + PANEL), slice(first + PANEL, None)
        for columns in (some, others):
            # BLAS halves the work where the two are the same
            product = rest[:, :, some].transpose(1, 2, 0) @ rest[:, :, columns].transpose(1, 0, 2)
            block = _outer(far[:, some], shift[:, columns]) if far.any() else product
            if far.any():
                block += _outer(shift[:, some], far[:, columns])
                block += product
            matrices[:, some, columns] += block
            if columns is others:
                matrices[:, others, some] += block.transpose(0, 2, 1)


def _outer(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Outer products of vectors ([b,] m)."""
    return one[..., :, None] * other[..., None, :]


def _centred(matrix: npt.NDArray[np.float64], mean: npt.NDArray[np.float64], count: float) -> npt.NDArray[np.float64]:
    """``X.T @ X`` with the mean subtracted from X; what does not vary gets exact zeros, not what rounding leaves."""
    centred = matrix - count * _outer(mean, mean)
    still = np.diagonal(centred, axis1=-2, axis2=-1) <= STILL * np.diagonal(matrix, axis1=-2, axis2=-1)
    centred[still] = 0.0
    centred.swapaxes(-2, -1)[still] = 0.0
    return centred
