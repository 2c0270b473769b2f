"""Gram matrices of inputs that are not those of the float model, with what they have in common with these."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from comq_np import checks, gram
from comq_np.activations import ActivationGrid
from comq_np.channels import ChannelGrid, InputGrid, of_rows
from comq_np.gram import Fold, Gram

Float64 = npt.NDArray[np.float64]


class CrossFold(NamedTuple):
    """Sums over the samples of one fold: Xq.T @ (X - Xq) ([b,] m, m), and X.sum(axis=0) ([b,] m)."""

    apart: Float64
    exact_sum: Float64


class CrossGram(Gram):
    """Gram matrix of a layer's inputs in a quantized model, with their products with those in the float model.

    Xq are the inputs of the layer, on `grid` where there is one, and X those that the float model has in their place.
    `solve` finds codes for which ``Xq @ Wq`` is close to ``X @ W``, and with `fit_bias` makes the bias take up the mean
    of all of that error, of the inputs, too. On a `ChannelGrid` the sums are those of its `steps` and of the inputs
    divided by its scales, and the weights that fit these are `absorbed`: W with each row times the scale of its
    channel.

    Parameters
    ----------
    m : int >= 1
        Width of the inputs: rows of the weights `W`.
    problems : int >= 1, optional
        Number of problems, as in `Gram`.
    grid : ActivationGrid or ChannelGrid, optional
        What quantizes the inputs, if anything does. The rows of W run over its channels, each with as many in a row.

    Raises
    ------
    InputError
        If an argument is not as above.

    Examples
    --------
    >>> import comq_np
    >>> gram = comq_np.CrossGram(1, grid=comq_np.ActivationGrid(0.5, 0, bits=2))
    >>> gram.update([[0.4], [1.1]])
    >>> gram.matrix, gram.cross.sum(axis=0).round(3)  # of 0.5 and 1.0
    (array([[1.25]]), array([[1.3]]))
    """

    def __init__(self, m: int, problems: int | None = None, grid: InputGrid | None = None) -> None:
        super().__init__(m, problems)
        self.grid = grid
        self._rows: ChannelGrid | None = None
        if isinstance(grid, ChannelGrid):
            self._rows = of_rows(grid, m * (problems or 1))
        elif grid is not None and not isinstance(grid, ActivationGrid):
            what = "comq_np.ActivationGrid, a comq_np.ChannelGrid or None"
            raise checks.InputError(f"`grid` must be a {what}, got {type(grid).__name__!r}.")
        self._apart, self._exact_sums = gram._zeros(self._matrices.shape), np.zeros_like(self._sums)

    @classmethod
    def from_parts(
        cls, folds: tuple[Fold, Fold], crosses: tuple[CrossFold, CrossFold], grid: InputGrid | None = None
    ) -> CrossGram:
        """Gram with the sums of two folds.

        Parameters
        ----------
        folds : tuple of two (matrix, sum, count)
            What another one's `folds` returned, or arrays like it.
        crosses : tuple of two (apart, exact_sum)
            What its `crosses` returned.
        grid : ActivationGrid or ChannelGrid, optional
            Its grid.

        Returns
        -------
        CrossGram
            One of its own, sharing no memory with them.

        Raises
        ------
        InputError
            If the shapes do not fit together, or a number is not finite or a count is negative.

        Examples
        --------
        >>> import comq_np
        >>> empty = comq_np.CrossGram(3)
        >>> comq_np.CrossGram.from_parts(empty.folds, empty.crosses).count
        0
        """
        plain = Gram.from_folds(folds)
        made = cls(len(plain), plain.problems, grid)
        made._matrices, made._sums = plain._matrices, plain._sums
        made._counts, made._masses = plain._counts, plain._masses
        for index, fold in enumerate(crosses):
            for name, array, into in zip(CrossFold._fields, fold, (made._apart, made._exact_sums), strict=True):
                values = checks.real_array(name, array, (into.ndim - 1,))
                if values.shape != into.shape[1:]:
                    raise checks.InputError(f"`{name}` must have shape {into.shape[1:]}, got {values.shape}.")
                into[index] = values
        return made

    def update(self, X: npt.ArrayLike, fold: int | None = None, exact: npt.ArrayLike | None = None) -> None:
        """Add samples, half of them to each fold, as `Gram.update` does.

        Parameters
        ----------
        X : array_like of real, shape (..., [b,] m)
            Inputs of the layer, before `grid` quantizes them.
        fold : {0, 1}, optional
            Fold to add all of them to.
        exact : array_like of real, of the shape of `X`, optional
            Inputs that the float model has in their place; by default `X`, where nothing before the layer is quantized.

        Raises
        ------
        InputError
            If they do not have that shape or are not finite; nothing is added then.

        Examples
        --------
        >>> import comq_np
        >>> gram = comq_np.CrossGram(1)
        >>> gram.update([[2.0]], exact=[[3.0]])
        >>> gram.matrix, gram.cross.sum(axis=0)
        (array([[4.]]), array([[6.]]))
        """
        own = self._checked("X", X)
        others = own if exact is None else self._checked("exact", exact)
        if own.shape != others.shape:
            raise checks.InputError(f"`exact` must have shape {own.shape}, as `X` has, got {others.shape}.")
        chunk = gram._chunk(self._m, self._problems)
        for (number, mine), (_, theirs) in zip(self._parts(own, fold), self._parts(others, fold), strict=True):
            for start in range(0, len(mine), chunk):
                self._add_both(number, *(part[start : start + chunk] for part in (mine, theirs)))

    def _add_both(self, fold: int, own: npt.NDArray[Any], exact: npt.NDArray[Any]) -> None:
        """Add few samples (k, m), or (k, b m), to a fold."""
        own, exact = (part.astype(np.float32, copy=False) for part in (own, exact))
        if self._rows is not None:
            own, exact = self._rows.steps(own), exact / self._rows.scale
        elif isinstance(self.grid, ActivationGrid):
            own = self.grid.quantize(own)
        self._add(own, fold)
        apart, shape = exact - own, (-1, self._problems or 1, self._m)
        left, right = (np.moveaxis(part.reshape(shape), 0, -2) for part in (own, apart))  # (b, k, m)
        self._apart[fold] += (np.swapaxes(left, -1, -2) @ right).reshape(self._apart.shape[1:])
        self._exact_sums[fold] += exact.sum(axis=0, dtype=np.float64).reshape(self._shape)

    def merge(self, other: Gram) -> None:
        """Add the samples of another one, fold by fold.

        Parameters
        ----------
        other : CrossGram
            One of the same width, problems and grid.

        Raises
        ------
        InputError
            If it is no such CrossGram.

        Examples
        --------
        >>> import comq_np
        >>> one, two = comq_np.CrossGram(1), comq_np.CrossGram(1)
        >>> two.update([[2.0]], exact=[[3.0]])
        >>> one.merge(two)
        >>> one.cross.sum(axis=0)
        array([[6.]])
        """
        if not isinstance(other, CrossGram):
            raise checks.InputError(f"`other` must be a comq_np.CrossGram, got {type(other).__name__!r}.")
        if other.grid != self.grid:
            raise checks.InputError(f"`other` must have inputs on the grid {self.grid}, has {other.grid}.")
        super().merge(other)
        self._apart += other._apart
        self._exact_sums += other._exact_sums

    @property
    def crosses(self) -> tuple[CrossFold, CrossFold]:
        """The two folds' own (apart, exact_sum), not copied."""
        first, second = (CrossFold(*fold) for fold in zip(self._apart, self._exact_sums, strict=True))
        return first, second

    @property
    def cross(self) -> Float64:
        """``Xq.T @ X`` of either fold, (2, [b,] m, m)."""
        total: Float64 = self._matrices + self._apart
        return total

    @property
    def exact_mean(self) -> Float64:
        """Mean of X over all samples, ([b,] m); zeros where there are none."""
        total: Float64 = self._exact_sums.sum(axis=0) / max(self.count, 1)
        return total

    def absorbed(self, W: npt.ArrayLike) -> npt.NDArray[Any]:
        """Weights that multiply the inputs as they are on the grid.

        Parameters
        ----------
        W : array_like of real, shape ([b,] m, n) or (m,)
            Weights of the float layer.

        Returns
        -------
        ndarray
            With a `ChannelGrid`, in float32, each row times the scale of its channel; else what was given.

        Raises
        ------
        InputError
            If there are not as many rows.

        Examples
        --------
        >>> import comq_np
        >>> gram = comq_np.CrossGram(2, grid=comq_np.ChannelGrid([0.5, 2.0], [0, 0], bits=8))
        >>> gram.absorbed([[1.0, 2.0], [3.0, 4.0]])
        array([[0.5, 1. ],
               [6. , 8. ]], dtype=float32)
        """
        array: npt.NDArray[Any] = checks.array_of("W", W)
        if self._rows is None:
            return array
        shape = self._shape if array.ndim == 1 else (*self._shape, 1)
        array = checks.real_array("W", array, (len(self._shape), len(self._shape) + 1)).astype(np.float32)
        if array.shape[: len(self._shape)] != self._shape:
            raise checks.InputError(f"`W` must have rows {self._shape}, as the Gram has, got shape {array.shape}.")
        scaled: npt.NDArray[Any] = array * self._rows.scale.reshape(shape)
        return scaled

    @property
    def nbytes(self) -> int:
        """Bytes that its sums take."""
        return size(self._m, self._problems)

    def problem(self, centred: bool = False) -> tuple[Gram, Float64]:
        """Gram of Xq and `cross`, as `solve` takes them for the outputs of the float model.

        Parameters
        ----------
        centred : bool
            Whether the mean of each fold is subtracted, from Xq and from X, since a bias takes it up.

        Returns
        -------
        tuple of Gram and ndarray of float64
            The Gram, and `cross`: (2, [b,] m, m), or ([b,] m, m) where only one fold has samples.

        Raises
        ------
        InputError
            If `centred` is not True or False.

        Examples
        --------
        >>> import comq_np
        >>> gram = comq_np.CrossGram(1)
        >>> gram.update([[1.0], [3.0]], fold=0, exact=[[2.0], [6.0]])
        >>> plain, cross = gram.problem(centred=True)
        >>> plain.matrix, cross
        (array([[2.]]), array([[4.]]))
        """
        cross, folds = self.cross, self.folds
        if checks.boolean("centred", centred):
            made = []
            for k, fold in enumerate(folds):
                matrix = self.fold_matrix(k, centred=True)
                cross[k] -= fold.sum[..., :, None] * self._exact_sums[k][..., None, :] / max(fold.count, 1)
                cross[k][np.diagonal(matrix, axis1=-2, axis2=-1) == 0] = 0.0  # inputs that do not vary
                made.append(Fold(matrix, np.zeros_like(fold.sum), fold.count))
            folds = made[0], made[1]
        return Gram.from_folds(folds), cross if all(fold.count for fold in folds) else cross.sum(axis=0)


def size(m: int, problems: int | None = None) -> int:
    """Bytes that a CrossGram of width m takes."""
    return 2 * gram.size(m, problems)


def work(m: int, problems: int | None = None) -> int:
    """Bytes that an update takes beyond that: what a Gram's does, and inputs on the grid, differences and products."""
    width = m * (problems or 1)
    return gram.work(m, problems) + 4 * (3 * gram._chunk(m, problems) + m) * width
