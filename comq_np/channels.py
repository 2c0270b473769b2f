"""Codes for the inputs of a layer with a scale for each of its channels, which the weights absorb.

With a scale s_i for each channel, ``X @ W = (X / s) @ (s * W)``: the layer multiplies small integers by weights whose
rows are larger by the scales, so that a product of codes needs no more than one scale for each column of the weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from comq_np import checks
from comq_np.activations import CHUNK, LEAST_BITS, MOST_BITS, TINY, ActivationGrid, best_grid
from comq_np.gram import MAX_INPUT

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
#: Bins of a channel on either side of zero: at 8 bits, four or more for each step of its grid.
SIDE = 2**10
#: Most channels of a histogram, which takes 32 KiB for each.
MOST_CHANNELS = 2**20
#: The least scale is this share of the largest: a channel with a smaller one has no part in what the layer computes.
LEAST_SHARE = 2.0**-24
#: Starts that are followed to a minimum, of the best, and of those with other zero points: there are many channels.
FOLLOWED = 1
#: Exponent of the width of the bins of a channel that had no value but zero.
NONE = -(2**20)


class ChannelHistogram:
    """Histogram of each channel of the inputs of a layer, as they stream by.

    Each is as a `Histogram`, with 1,024 bins on either side of zero in place of 8,192, as wide as its own channel
    takes: 32 KiB for a channel.

    Parameters
    ----------
    channels : int >= 1
        Number of channels.
    positions : int >= 1
        Values of a channel in one sample, one after the other, such as those under the kernel of a convolution.

    Raises
    ------
    InputError
        If an argument is not as above.

    Examples
    --------
    >>> import comq_np
    >>> histogram = comq_np.ChannelHistogram(2)
    >>> histogram.update([[0.0, 100.0], [1.0, 300.0]])
    >>> histogram.count, histogram.ranges
    (2, array([[  0.,   1.],
           [100., 300.]]))
    """

    def __init__(self, channels: int, positions: int = 1) -> None:
        self.channels = checks.integer("channels", channels, 1, MOST_CHANNELS)
        self.positions = checks.integer("positions", positions, 1, MOST_CHANNELS)
        self._counts, self._sums = (np.zeros((channels, 2 * SIDE)) for _ in range(2))
        self._zeros, self._squares = np.zeros(channels, np.int64), np.zeros(channels)
        self._ends = np.full((2, channels), [[np.inf], [-np.inf]])
        self._exponents = np.full(channels, NONE)

    def update(self, X: npt.ArrayLike) -> None:
        """Add samples.

        Parameters
        ----------
        X : array_like of real, shape (..., channels * positions) or (..., b, m) with b * m as many
            Samples, as rows for a Gram, taken as float32.

        Raises
        ------
        InputError
            If they do not have that shape, are not real, or not finite; nothing is added then.

        Examples
        --------
        >>> import comq_np
        >>> histogram = comq_np.ChannelHistogram(2, positions=3)
        >>> histogram.update([[0, 1, 2, 10, 20, 30]])
        >>> histogram.ranges
        array([[ 0.,  2.],
               [10., 30.]])
        """
        array = checks.real_dtype("X", checks.array_of("X", X))
        width = self.channels * self.positions
        if width not in (array.shape[-1:] and array.shape[-1], array.shape[-2:] and np.prod(array.shape[-2:])):
            raise checks.InputError(f"`X` must have {width} values in a sample, got shape {array.shape}.")
        if not array.size:
            return
        size = checks.largest(array)
        if not size <= MAX_INPUT:
            checks.real_array("X", array, (array.ndim,))
            raise checks.InputError(f"`X` must lie within ±{MAX_INPUT:g}, got an entry of size {size:g}.")
        samples = array.reshape(-1, self.channels, self.positions)
        step = max(CHUNK, self._counts.size) // width or 1
        for start in range(0, len(samples), step):
            self._add(samples[start : start + step].astype(np.float32, copy=False))

    def _add(self, samples: Float32) -> None:
        """Add few samples (k, channels, positions)."""
        self._reach(np.array([samples.min(axis=(0, 2)), samples.max(axis=(0, 2))], np.float64))
        some = samples != 0
        self._zeros += (~some).sum(axis=(0, 2))
        # Exact, as the widths are powers of two; zeros, which are left out, may have any width.
        widths = np.ldexp(1.0, np.maximum(self._exponents, -1000))
        places = np.floor(samples / widths[:, None]).astype(np.int64) + SIDE
        places += (np.arange(self.channels) * 2 * SIDE)[:, None]
        places, values = places[some], samples[some]
        shape, size = self._counts.shape, self._counts.size
        self._counts += np.bincount(places, minlength=size).reshape(shape)
        self._sums += np.bincount(places, values, minlength=size).reshape(shape)
        self._squares += np.square(samples, dtype=np.float64).sum(axis=(0, 2))

    def _reach(self, ends: Float64) -> None:
        """Make the bins as wide as these least and largest values of each channel need them."""
        self._ends = np.array([np.minimum(self._ends[0], ends[0]), np.maximum(self._ends[1], ends[1])])
        sizes = np.abs(ends).max(axis=0)
        exponents = np.frexp(sizes)[1].astype(np.int64) - SIDE.bit_length() + 1
        self._widen(np.where(sizes > 0, exponents, NONE))

    def _widen(self, exponents: npt.NDArray[np.int64]) -> None:
        """Make the bins of each channel at least as wide as that power of two."""
        more = exponents - self._exponents
        for channel in np.flatnonzero((more > 0) & (self._exponents > NONE)):
            joined = 2 ** min(int(more[channel]), SIDE.bit_length() - 1)
            inner = slice(SIDE - SIDE // joined, SIDE + SIDE // joined)
            for values in (self._counts[channel], self._sums[channel]):
                sums = values.reshape(-1, joined).sum(axis=1)
                values[:] = 0
                values[inner] = sums
        self._exponents = np.maximum(self._exponents, exponents)

    def merge(self, other: ChannelHistogram) -> None:
        """Add the values of another histogram.

        Parameters
        ----------
        other : ChannelHistogram
            One of as many channels and positions, which stays as it is.

        Raises
        ------
        InputError
            If it is none.

        Examples
        --------
        >>> import comq_np
        >>> one, two = comq_np.ChannelHistogram(1), comq_np.ChannelHistogram(1)
        >>> one.update([[1.0]])
        >>> two.update([[300.0]])
        >>> one.merge(two)
        >>> one.count, one.ranges
        (2, array([[  1., 300.]]))
        """
        if not isinstance(other, ChannelHistogram):
            raise checks.InputError(f"`other` must be a comq_np.ChannelHistogram, got {type(other).__name__!r}.")
        if (other.channels, other.positions) != (self.channels, self.positions):
            raise checks.InputError(f"`other` must be like {self!r}, got {other!r}.")
        wide = ChannelHistogram(self.channels, self.positions)
        wide._counts += other._counts
        wide._sums += other._sums
        wide._exponents = other._exponents
        wide._widen(self._exponents)
        self._widen(wide._exponents)
        for name in ("_counts", "_sums"):
            setattr(self, name, getattr(self, name) + getattr(wide, name))
        self._zeros, self._squares = self._zeros + other._zeros, self._squares + other._squares
        self._ends = np.array([np.minimum(self._ends[0], other._ends[0]), np.maximum(self._ends[1], other._ends[1])])

    @property
    def count(self) -> int:
        """Number of samples."""
        return (int(self._zeros[0]) + int(self._counts[0].sum())) // self.positions

    @property
    def ranges(self) -> Float64:
        """Least and largest value of each channel, (channels, 2); zeros where there is none."""
        return self._ends.T.copy() if self.count else np.zeros((self.channels, 2))

    @property
    def nbytes(self) -> int:
        """Bytes that its bins take."""
        return self._counts.nbytes + self._sums.nbytes

    def channel(self, number: int) -> tuple[Float64, Float64, float]:
        """Mean of the values in each bin of a channel that has some, how many there are, and the sum of all squares.

        Parameters
        ----------
        number : int from 0 to channels - 1
            The channel.

        Returns
        -------
        tuple of ndarray, ndarray and float
            Values from the least to the largest, zero being one of its own; their counts; the sum.

        Raises
        ------
        InputError
            If there is no such channel.

        Examples
        --------
        >>> import comq_np
        >>> histogram = comq_np.ChannelHistogram(2)
        >>> histogram.update([[0.0, 3.0], [2.0, 3.0]])
        >>> histogram.channel(0)
        (array([0., 2.]), array([1., 1.]), 4.0)
        """
        number = checks.integer("number", number, 0, self.channels - 1)
        filled = np.flatnonzero(self._counts[number])
        counts = self._counts[number, filled]
        values, zeros = self._sums[number, filled] / counts, int(self._zeros[number])
        if zeros:
            place = int(np.searchsorted(filled, SIDE))
            values, counts = np.insert(values, place, 0.0), np.insert(counts, place, zeros)
        return values, counts, float(self._squares[number])

    def __repr__(self) -> str:
        return f"ChannelHistogram({self.channels}, positions={self.positions}, count={self.count})"


@dataclass(frozen=True, eq=False, repr=False)
class ChannelGrid:
    """Codes for the inputs of a layer with a scale and a zero point for each channel.

    The layer multiplies `steps` of its inputs, ``clip(round(X / scale) + zero_point, 0, 2**bits - 1) - zero_point``,
    by weights that have absorbed the scales: those of the float layer, row by row times the scale of its channel. Zero
    is on the grid of each channel.

    Parameters
    ----------
    scale : array_like of real > 0, shape (channels,)
        Distance of two values of a channel; it is rounded to float32.
    zero_point : array_like of int from 0 to ``2**bits - 1``, shape (channels,)
        Code that stands for 0.
    bits : int from 2 to 8
        Bits of one code.

    Raises
    ------
    InputError
        If they are not as above.

    Examples
    --------
    >>> import comq_np
    >>> grid = comq_np.ChannelGrid([0.5, 100.0], [0, 1], bits=2)
    >>> grid.steps([[1.1, 120.0], [9.0, -70.0]])
    array([[ 2.,  1.],
           [ 3., -1.]], dtype=float32)
    >>> grid.quantize([[1.1, 120.0], [9.0, -70.0]])
    array([[   1. ,  100. ],
           [   1.5, -100. ]], dtype=float32)
    """

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.uint8]
    bits: int

    def __post_init__(self) -> None:
        bits = checks.integer("bits", self.bits, LEAST_BITS, MOST_BITS)
        numbers = checks.real_array("scale", self.scale, (1,)).astype(np.float64)
        largest = float(np.finfo(np.float32).max)
        if not (numbers.min() >= TINY and numbers.max() <= largest):
            bad = next(float(number) for number in numbers if not TINY <= number <= largest)
            raise checks.InputError(f"`scale` must hold numbers from {TINY:g} to {largest:g}, got {bad:g}.")
        points = checks.array_of("zero_point", self.zero_point)
        if points.shape != numbers.shape:
            raise checks.InputError(
                f"`zero_point` must have shape {numbers.shape}, as `scale` has, got {points.shape}."
            )
        if points.dtype.kind not in "iu" or not 0 <= int(points.min()) <= int(points.max()) < 2**bits:
            raise checks.InputError(f"`zero_point` must hold integers from 0 to {2**bits - 1}, got others.")
        scale, zero_point = numbers.astype(np.float32), points.astype(np.uint8)
        scale.flags.writeable = zero_point.flags.writeable = False
        for name, value in (("scale", scale), ("zero_point", zero_point), ("bits", bits)):
            object.__setattr__(self, name, value)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.scale)

    @functools.cached_property
    def _content(self) -> tuple[bytes, bytes, int]:
        return self.scale.tobytes(), self.zero_point.tobytes(), self.bits

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChannelGrid) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __repr__(self) -> str:
        low, high = float(self.scale.min()), float(self.scale.max())
        return f"ChannelGrid({self.channels} channels of scales {low:g} to {high:g}, bits={self.bits})"

    def repeated(self, times: int) -> ChannelGrid:
        """Grid of each channel so many times in a row, as a convolution's rows have it.

        Parameters
        ----------
        times : int >= 1
            How often.

        Returns
        -------
        ChannelGrid
            One of as many times the channels.

        Raises
        ------
        InputError
            If it is no such number.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.ChannelGrid([0.5, 2.0], [0, 1], bits=2).repeated(2).scale
        array([0.5, 0.5, 2. , 2. ], dtype=float32)
        """
        times = checks.integer("times", times, 1, MOST_CHANNELS)
        return ChannelGrid(np.repeat(self.scale, times), np.repeat(self.zero_point, times), self.bits)

    def steps(self, X: npt.ArrayLike, axis: int = -1) -> Float32:
        """Codes of inputs less the zero points: what the layer multiplies.

        Parameters
        ----------
        X : array_like of real
            Inputs, taken as float32.
        axis : int
            The axis of the channels.

        Returns
        -------
        ndarray of float32, of the shape of `X`
            ``clip(round(X / scale) + zero_point, 0, 2**bits - 1) - zero_point``, where halves go to the even number.

        Raises
        ------
        InputError
            If they are not real, not finite, or of another number of channels.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.ChannelGrid([0.5, 2.0], [0, 1], bits=2).steps([[0.5, 6.0]])
        array([[1., 2.]], dtype=float32)
        """
        array, scale, zero_point = self._along("X", X, axis)
        if array.size:
            array = checks.real_array("X", array, (array.ndim,))
        steps = np.asarray(array.astype(np.float32) / scale)
        np.rint(steps, out=steps)
        np.clip(steps, -zero_point, np.float32(2**self.bits - 1) - zero_point, out=steps)
        steps += np.float32(0)  # of -0.0, which differs in its sign
        return steps

    def encode(self, X: npt.ArrayLike, axis: int = -1) -> npt.NDArray[np.uint8]:
        """Codes of inputs: the nearest ones.

        Parameters
        ----------
        X : array_like of real
            Inputs, taken as float32.
        axis : int
            The axis of the channels.

        Returns
        -------
        ndarray of uint8, of the shape of `X`
            ``clip(round(X / scale) + zero_point, 0, 2**bits - 1)``.

        Raises
        ------
        InputError
            If they are not real, not finite, or of another number of channels.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.ChannelGrid([0.5, 2.0], [0, 1], bits=2).encode([[0.5, 6.0]])
        array([[1, 3]], dtype=uint8)
        """
        steps = self.steps(X, axis)
        return (steps + self._along("X", steps, axis)[2]).astype(np.uint8)

    def quantize(self, X: npt.ArrayLike, axis: int = -1) -> Float32:
        """Inputs as their codes have them: `steps`, times the scales.

        Parameters
        ----------
        X : array_like of real
            Inputs, taken as float32.
        axis : int
            The axis of the channels.

        Returns
        -------
        ndarray of float32, of the shape of `X`
            The values on the grids that are nearest to them.

        Raises
        ------
        InputError
            If they are not real, not finite, or of another number of channels.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.ChannelGrid([0.5, 2.0], [0, 1], bits=2).quantize([[0.6, 6.0]])
        array([[0.5, 4. ]], dtype=float32)
        """
        steps = self.steps(X, axis)
        steps *= self._along("X", steps, axis)[1]
        return steps

    def _along(self, name: str, value: npt.ArrayLike, axis: int) -> tuple[npt.NDArray[np.generic], Float32, Float32]:
        """An array, and scales and zero points along its axis of the channels."""
        array = checks.array_of(name, value)
        axis = checks.integer("axis", axis, -array.ndim, array.ndim - 1) if array.ndim else 0
        if array.ndim == 0 or array.shape[axis] != self.channels:
            raise checks.InputError(
                f"`{name}` must have {self.channels} channels along axis {axis}, got shape {array.shape}."
            )
        shape = (-1, *[1] * (array.ndim - 1 - axis % array.ndim))
        return array, self.scale.reshape(shape), self.zero_point.astype(np.float32).reshape(shape)


#: What may quantize the inputs of a layer.
InputGrid = ActivationGrid | ChannelGrid


def of_rows(grid: ChannelGrid, rows: int) -> ChannelGrid:
    """Grid of so many rows of weights, of all problems, in the order of its channels."""
    if rows % grid.channels:
        raise checks.InputError(f"`grid` must have a number of channels that divides {rows} rows, has {grid.channels}.")
    return grid.repeated(rows // grid.channels)


def channel_grid(
    histogram: ChannelHistogram, bits: int, *, symmetric: bool = False, recipe: str = "solved"
) -> ChannelGrid:
    """Grid of each channel with the least square error of that channel, as `activation_grid` finds it.

    The error of a channel counts in the output by the weights of its row, which is one factor for all of its grids: so
    the best grid of each is a part of the best one of all.

    Parameters
    ----------
    histogram : ChannelHistogram
        The values of all channels.
    bits : int from 2 to 8
        Bits of one code.
    symmetric : bool
        Whether all zero points are ``2**bits // 2``; else each channel has its own.
    recipe : {"solved", "minmax"}
        "minmax" is the usual grid, of the whole range of each channel, to compare with.

    Returns
    -------
    ChannelGrid
        The grid; a channel that is always zero has the median of the other scales, or 1 where all are. A scale is
        2**-24 of the largest at least.

    Raises
    ------
    InputError
        If an argument is not as above, or the histogram has no samples.

    Examples
    --------
    >>> import comq_np, numpy as np
    >>> x = np.random.default_rng(0).normal(size=(1000, 3)) * [1, 10, 0]
    >>> histogram = comq_np.ChannelHistogram(3)
    >>> histogram.update(x)
    >>> grid = comq_np.channel_grid(histogram, 4)
    >>> bool(8 < grid.scale[1] / grid.scale[0] < 12.5), bool(grid.scale[2] == np.median(grid.scale))
    (True, True)
    """
    if not isinstance(histogram, ChannelHistogram):
        raise checks.InputError(f"`histogram` must be a comq_np.ChannelHistogram, got {type(histogram).__name__!r}.")
    if not histogram.count:
        raise checks.InputError("`histogram` must have seen samples, got one with count 0.")
    bits = checks.integer("bits", bits, LEAST_BITS, MOST_BITS)
    symmetric = checks.boolean("symmetric", symmetric)
    grids = [
        best_grid(*histogram.channel(number), (float(low), float(high)), bits, symmetric, recipe, FOLLOWED)
        for number, (low, high) in enumerate(histogram.ranges)
    ]
    scale, points = np.array([grid.scale for grid in grids]), np.array([grid.zero_point for grid in grids])
    alive = histogram.ranges.any(axis=1)
    if alive.any():
        scale[alive] = np.maximum(scale[alive], LEAST_SHARE * scale[alive].max())
        scale[~alive] = np.median(scale[alive])  # the rows of weights that absorb these are like the others
    return ChannelGrid(scale, points, bits)
