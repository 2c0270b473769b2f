"""Codes for the inputs of a layer: a histogram of them as they stream by, and the grid with the least square error.

A grid has ``scale * (code - zero_point)`` with codes from 0 to ``2**bits - 1``, as that of weights. It is found as that
is, coordinate by coordinate: each value takes the nearest code, then the scale is the one that fits the codes best,
``<q, x> / <q, q>`` with ``q = codes - zero_point``, then the zero point moves by one where that is better, and so on as
long as the error falls. A scale that is nearest to its own codes may be far from the best one, since the error has many
minima: so it starts from several ranges, and leaps.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from comq_np import checks
from comq_np.gram import MAX_INPUT

Float64 = npt.NDArray[np.float64]
#: Bins on either side of zero.
SIDE = 2**13
#: Values that are sorted into bins at a time.
CHUNK = 2**20
#: Most bits of an activation's code, and least.
MOST_BITS, LEAST_BITS = 8, 2
#: Shares of the values that a range begins or ends with, beside the whole of it.
QUANTILES = (0.999, 0.9999, 0.99999)
#: Shares of the whole range that are tried.
SHRUNK = 2.0 ** (-np.arange(64) / 16)
#: Starts that are followed to a minimum: the best ones, and as many that are the best with their zero points.
FOLLOWED = 3
#: By how much the scale leaps, to be fitted there, in search of a better minimum.
LEAPS = (1.0, *(1 + sign / part for part in (12, 32, 256) for sign in (-1, 1)))
#: An error that falls by a smaller share is at its minimum.
STILL = 1e-6
#: Sweeps at most: each one lowers the error by that share at least, and most minima are reached in ten.
SWEEPS = 1000
TINY = float(np.finfo(np.float32).tiny)


class Histogram:
    """Histogram of values that stream by, such as all inputs of a layer.

    Bins are as wide as a power of two, the same for all, and reach from zero: as wide as it takes for 8,192 of them to
    reach the largest value on either side. They double in width when a larger one comes, so that the order of the
    values makes no difference, nor does it whether they come in one histogram or in several that are merged, beyond the
    rounding of sums in float64. Each bin has the number of its values and their sum; zeros are counted apart.

    Examples
    --------
    >>> import comq_np
    >>> histogram = comq_np.Histogram()
    >>> histogram.update([0.0, 1.0, 1.0, -3.0])
    >>> histogram.count, histogram.range
    (4, (-3.0, 1.0))
    >>> histogram.values
    array([-3.,  0.,  1.])
    >>> histogram.counts
    array([1., 1., 2.])
    """

    #: Bytes that its bins take.
    nbytes = 2 * 2 * SIDE * 8

    def __init__(self) -> None:
        self._counts, self._sums = np.zeros(2 * SIDE), np.zeros(2 * SIDE)
        self._zeros, self._squares = 0, 0.0
        self._least, self._largest = math.inf, -math.inf
        self._exponent: int | None = None

    def update(self, X: npt.ArrayLike) -> None:
        """Add values.

        Parameters
        ----------
        X : array_like of real, of any shape
            Values, taken as float32.

        Raises
        ------
        InputError
            If they are not real, or not finite; nothing is added then.

        Examples
        --------
        >>> import comq_np
        >>> histogram = comq_np.Histogram()
        >>> histogram.update([[0.5, 1.0], [2.0, 0.0]])
        >>> histogram.count
        4
        """
        array = checks.real_dtype("X", checks.array_of("X", X))
        if not array.size:
            return
        size = checks.largest(array)
        if not size <= MAX_INPUT:
            checks.real_array("X", array, (array.ndim,))
            raise checks.InputError(f"`X` must lie within ±{MAX_INPUT:g}, got an entry of size {size:g}.")
        values = array.reshape(-1)
        for start in range(0, len(values), CHUNK):
            self._add(values[start : start + CHUNK].astype(np.float32, copy=False))

    def _add(self, values: npt.NDArray[np.float32]) -> None:
        self._least, self._largest = min(self._least, float(values.min())), max(self._largest, float(values.max()))
        size = max(-self._least, self._largest)
        some = values[values != 0]
        self._zeros += len(values) - len(some)
        if not len(some):
            return
        self._widen(math.frexp(size)[1] - int(math.log2(SIDE)))
        assert self._exponent is not None, "there is a value that is not zero"
        # Exact, as the width is a power of two.
        bins = np.floor(np.ldexp(some.astype(np.float64), -self._exponent)).astype(np.int64) + SIDE
        self._counts += np.bincount(bins, minlength=2 * SIDE)
        self._sums += np.bincount(bins, some, minlength=2 * SIDE)
        self._squares += float(np.square(some, dtype=np.float64).sum())

    def _widen(self, exponent: int) -> None:
        """Make the bins at least as wide as that power of two."""
        if self._exponent is None:
            self._exponent = exponent
        joined = min(2 ** max(0, exponent - self._exponent), SIDE)
        if joined > 1:
            inner = slice(SIDE - SIDE // joined, SIDE + SIDE // joined)
            for values in (self._counts, self._sums):
                sums = values.reshape(-1, joined).sum(axis=1)
                values[:] = 0
                values[inner] = sums
        self._exponent = max(self._exponent, exponent)

    def merge(self, other: Histogram) -> None:
        """Add the values of another histogram.

        Parameters
        ----------
        other : Histogram
            The other one, which stays as it is.

        Raises
        ------
        InputError
            If it is none.

        Examples
        --------
        >>> import comq_np
        >>> one, two = comq_np.Histogram(), comq_np.Histogram()
        >>> one.update([1.0])
        >>> two.update([300.0])
        >>> one.merge(two)
        >>> one.values
        array([  1., 300.])
        """
        if not isinstance(other, Histogram):
            raise checks.InputError(f"`other` must be a comq_np.Histogram, got {type(other).__name__!r}.")
        self._least, self._largest = min(self._least, other._least), max(self._largest, other._largest)
        self._zeros += other._zeros
        if other._exponent is None:
            return
        wide = Histogram()
        wide._counts += other._counts
        wide._sums += other._sums
        wide._exponent = other._exponent
        if self._exponent is not None:
            wide._widen(self._exponent)
        self._widen(wide._exponent)
        self._counts += wide._counts
        self._sums += wide._sums
        self._squares += other._squares

    @property
    def count(self) -> int:
        """Number of values."""
        return self._zeros + int(self._counts.sum())

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest value; 0 and 0 where there is none."""
        return (self._least, self._largest) if self.count else (0.0, 0.0)

    @property
    def squares(self) -> float:
        """Sum of the squares of all values."""
        return self._squares

    @property
    def values(self) -> Float64:
        """Mean of the values in each bin that has some, from the least to the largest, zero being one of its own."""
        return self._merged(self._sums[self._filled] / self._counts[self._filled], 0.0)

    @property
    def counts(self) -> Float64:
        """How many there are in each of these."""
        return self._merged(self._counts[self._filled], float(self._zeros))

    @property
    def _filled(self) -> npt.NDArray[np.intp]:
        return np.flatnonzero(self._counts)

    def _merged(self, of_bins: Float64, of_zeros: float) -> Float64:
        """What there is of bins, with that of zeros between those of negative and positive values."""
        if not self._zeros:
            return of_bins
        return np.insert(of_bins, int(np.searchsorted(self._filled, SIDE)), of_zeros)

    def __repr__(self) -> str:
        return f"Histogram(count={self.count}, range={self.range})"


@dataclass(frozen=True)
class ActivationGrid:
    """Codes for the inputs of a layer: ``scale * (code - zero_point)``, with codes from 0 to ``2**bits - 1``.

    Zero is on the grid: inputs that are zero, of a ReLU or the border of an image, stay so.

    Parameters
    ----------
    scale : float > 0
        Distance of two values on the grid; it is rounded to float32.
    zero_point : int from 0 to ``2**bits - 1``
        Code that stands for 0: 0 itself for inputs that are never negative.
    bits : int from 2 to 8
        Bits of one code.

    Raises
    ------
    InputError
        If they are not as above.

    Examples
    --------
    >>> import comq_np
    >>> grid = comq_np.ActivationGrid(0.5, 1, bits=2)
    >>> grid.encode([-0.6, 0.0, 0.3, 9.0])
    array([0, 1, 2, 3], dtype=uint8)
    >>> grid.quantize([-0.6, 0.0, 0.3, 9.0])
    array([-0.5,  0. ,  0.5,  1. ], dtype=float32)
    """

    scale: float
    zero_point: int
    bits: int

    def __post_init__(self) -> None:
        scale = float(np.float32(checks.number("scale", self.scale, TINY, float(np.finfo(np.float32).max))))
        bits = checks.integer("bits", self.bits, LEAST_BITS, MOST_BITS)
        zero_point = checks.integer("zero_point", self.zero_point, 0, 2**bits - 1)
        for name, value in (("scale", scale), ("zero_point", zero_point), ("bits", bits)):
            object.__setattr__(self, name, value)

    def encode(self, X: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Codes of inputs: the nearest ones.

        Parameters
        ----------
        X : array_like of real
            Inputs, taken as float32.

        Returns
        -------
        ndarray of uint8, of the shape of `X`
            ``clip(round(X / scale) + zero_point, 0, 2**bits - 1)``, where halves go to the even number.

        Raises
        ------
        InputError
            If they are not real, or not finite.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.ActivationGrid(0.5, 0, bits=8).encode([0.2, 0.75, 1.0])
        array([0, 2, 2], dtype=uint8)
        """
        array = checks.array_of("X", X)
        if array.size:
            array = checks.real_array("X", array, (array.ndim,))
        return (self._steps(array) + np.float32(self.zero_point)).astype(np.uint8)

    def decode(self, codes: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Inputs that codes stand for.

        Parameters
        ----------
        codes : array_like of int
            Codes from 0 to ``2**bits - 1``.

        Returns
        -------
        ndarray of float32, of the shape of `codes`
            ``scale * (codes - zero_point)``.

        Raises
        ------
        InputError
            If they are no such codes.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.ActivationGrid(0.5, 1, bits=2).decode([0, 1, 3])
        array([-0.5,  0. ,  1. ], dtype=float32)
        """
        array = checks.array_of("codes", codes)
        if array.dtype.kind not in "iu" or (
            array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**self.bits
        ):
            raise checks.InputError(f"`codes` must be integers from 0 to {2**self.bits - 1}, got others.")
        return np.float32(self.scale) * (array.astype(np.int32) - self.zero_point).astype(np.float32)

    def quantize(self, X: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Inputs as their codes have them.

        Parameters
        ----------
        X : array_like of real
            Inputs, taken as float32.

        Returns
        -------
        ndarray of float32, of the shape of `X`
            What `decode` makes of what `encode` does.

        Raises
        ------
        InputError
            If they are not real, or not finite.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.ActivationGrid(0.25, 0, bits=4).quantize([0.3, -1.0, 100.0])
        array([0.25, 0.  , 3.75], dtype=float32)
        """
        array = checks.array_of("X", X)
        if array.size:
            array = checks.real_array("X", array, (array.ndim,))
        steps = self._steps(array)
        steps *= np.float32(self.scale)
        return steps

    def _steps(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        """Codes without the zero point, in float32, which holds them exactly."""
        steps = np.asarray(array.astype(np.float32) / np.float32(self.scale))
        np.rint(steps, out=steps)
        np.clip(steps, -self.zero_point, 2**self.bits - 1 - self.zero_point, out=steps)
        steps += np.float32(0)  # of -0.0, which differs in its sign
        return steps


def activation_grid(
    histogram: Histogram, bits: int, *, symmetric: bool = False, recipe: str = "solved"
) -> ActivationGrid:
    """Grid for values with the least square error, by their histogram.

    Minimises ``sum_i (scale * q_i - x_i)**2``, with ``q = codes - zero_point``, over one of them after the other: the
    nearest codes, the scale ``<q, x> / <q, q>``, the zero point one up or down. Ranges to start from are the whole, its
    shares down to a sixteenth, and those between quantiles 0.999, 0.9999 and 0.99999 on either side; the best are
    followed. There is nothing to tune.

    Parameters
    ----------
    histogram : Histogram
        The values.
    bits : int from 2 to 8
        Bits of one code.
    symmetric : bool
        Whether the zero point is ``2**bits // 2``, a signed grid; else it is chosen, so that values of one sign have
        all codes.
    recipe : {"solved", "minmax"}
        "minmax" is the usual grid, of the whole range, to compare with.

    Returns
    -------
    ActivationGrid
        The grid; of values that are all zero, the one of scale 1.

    Raises
    ------
    InputError
        If an argument is not as above, or the histogram has no values.

    Examples
    --------
    >>> import comq_np, numpy as np
    >>> x = np.maximum(np.random.default_rng(0).normal(size=10000), 0)  # behind a ReLU
    >>> histogram = comq_np.Histogram()
    >>> histogram.update(x)
    >>> grid, plain = (comq_np.activation_grid(histogram, 4, recipe=recipe) for recipe in ("solved", "minmax"))
    >>> grid.zero_point, bool(np.square(grid.quantize(x) - x).sum() < 0.7 * np.square(plain.quantize(x) - x).sum())
    (0, True)
    """
    if not isinstance(histogram, Histogram):
        raise checks.InputError(f"`histogram` must be a comq_np.Histogram, got {type(histogram).__name__!r}.")
    if not histogram.count:
        raise checks.InputError("`histogram` must have seen values, got one with count 0.")
    bits = checks.integer("bits", bits, LEAST_BITS, MOST_BITS)
    symmetric = checks.boolean("symmetric", symmetric)
    values = histogram.values, histogram.counts, histogram.squares
    return best_grid(*values, histogram.range, bits, symmetric, recipe)


def best_grid(
    x: Float64,
    counts: Float64,
    squares: float,
    ends: tuple[float, float],
    bits: int,
    symmetric: bool,
    recipe: str,
    followed: int = FOLLOWED,
) -> ActivationGrid:
    """Grid for so many of each value, whose squares have that sum, and which lie between these ends."""
    problem = _Problem(x, counts, squares, 2**bits, symmetric)
    plain = problem.start(*ends)
    if checks.choice("recipe", recipe, ("solved", "minmax")) == "minmax" or plain.error == 0:
        return ActivationGrid(plain.scale, plain.zero_point, bits)
    starts = sorted({*problem.starts(*ends)})
    apart = {start.zero_point: start for start in reversed(starts)}
    best = min(map(problem.descend, {*starts[:followed], *sorted(apart.values())[:followed]}))
    return ActivationGrid(best.scale, best.zero_point, bits)


class _Point(NamedTuple):
    """A grid, and its error."""

    error: float
    scale: float
    zero_point: int


@dataclass(frozen=True, eq=False)
class _Problem:
    """Values x, so many of each, and the sum of the squares of all; and which codes there are."""

    x: Float64
    counts: Float64
    squares: float
    levels: int
    symmetric: bool

    @functools.cached_property
    def sums(self) -> Float64:
        """Sum of the values of each bin."""
        return self.counts * self.x

    def start(self, low: float, high: float) -> _Point:
        """Grid of a range, which reaches to zero."""
        low, high, last = min(low, 0.0), max(high, 0.0), self.levels - 1
        if self.symmetric:
            middle = self.levels // 2
            return self.at(max(high / (last - middle), -low / middle), middle)
        scale = (high - low) / last or 1.0
        return self.at(scale, int(np.rint(-low / scale)))

    def starts(self, low: float, high: float) -> list[_Point]:
        """Grids to start from."""
        reached = self.counts.cumsum() / self.counts.sum()
        ends = [self.x[np.searchsorted(reached, share)] for share in QUANTILES]
        begins = [self.x[np.searchsorted(reached, 1 - share, side="right")] for share in QUANTILES]
        ranges = [(share * low, share * high) for share in SHRUNK]
        ranges += [(begin, end) for begin in (low, *begins) for end in (high, *ends)]
        return [self.start(*one) for one in ranges]

    def at(self, scale: float, zero_point: int) -> _Point:
        """Grid with its error; the scale is rounded to float32 first."""
        scale = max(float(np.float32(scale)), TINY) if scale else 1.0
        q = self.steps(scale, zero_point)
        error = self.squares + scale * (scale * float(np.square(q) @ self.counts) - 2 * float(q @ self.sums))
        return _Point(max(error, 0.0), scale, zero_point)

    def steps(self, scale: float, zero_point: int) -> Float64:
        """Codes q without the zero point."""
        return np.clip(np.rint(self.x / scale), -zero_point, self.levels - 1 - zero_point)

    def descend(self, point: _Point) -> _Point:
        """Lower the error by scale and zero point as long as that goes on."""
        for _ in range(SWEEPS):
            best = min(self._near(point), default=point)
            if not best.error < (1 - STILL) * point.error:
                break
            point = best
        return point

    def _near(self, point: _Point) -> list[_Point]:
        """Grids whose scale fits codes of this one, or of one near it."""
        found = []
        for zero_point in {point.zero_point} if self.symmetric else {point.zero_point + k for k in (-1, 0, 1)}:
            for leap in LEAPS if 0 <= zero_point < self.levels else ():
                q = self.steps(leap * point.scale, zero_point)
                fitted = float(q @ self.sums) / (float(np.square(q) @ self.counts) or 1.0)
                if fitted > 0:
                    found.append(self.at(fitted, zero_point))
        return found
