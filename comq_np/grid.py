"""Grids: scale and zero point of every group of every column, and the one formula that decodes.

Arrays in here have a row for each output channel: W (n, m), scale and zero_point (n, groups). A group is
`group_size` successive entries of a row, the last one maybe fewer. A zero point is an int32, or a float32 where it may
be any real number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from comq_np import kernels
from comq_np.checks import MAX_ZERO_POINT
from comq_np.parallel import Workers, tiles

Number = TypeVar("Number", bound=np.generic)
#: int32 or float32
ZeroPoint = npt.NDArray[np.number[Any]]

#: A range this much smaller than the numbers in it is below what float32 weights resolve.
CONSTANT = 2.0**-20
#: Weights below this size count as zero: their scale would leave float32's normal range.
NEGLIGIBLE = 1e-33
#: No scale is a smaller share of the largest weight: it would be far below what float32 weights resolve, and the zero
#: point would leave int32. With up to 8 bits, no range that is not constant is so narrow.
FINEST = 2.0**-28


@dataclass
class Grid:
    """Scale and zero point (n, groups), with sentences on what is special about them."""

    scale: npt.NDArray[np.float32]
    zero_point: ZeroPoint
    notes: list[str] = field(default_factory=list)

    def copy(self) -> Grid:
        """Return a grid that shares no memory with this one."""
        return Grid(self.scale.copy(), self.zero_point.copy(), list(self.notes))

    def take(self, other: Grid, columns: npt.NDArray[np.bool_]) -> None:
        """Replace some columns by those of another grid."""
        self.scale[columns], self.zero_point[columns] = other.scale[columns], other.zero_point[columns]

    def near(self, other: Grid, tolerance: float) -> bool:
        """Whether scales differ by less than this (relative), and zero points (relative where they are above 1)."""
        apart = np.abs(self.scale - other.scale) > tolerance * other.scale
        shifted = np.abs(self.zero_point - other.zero_point) > tolerance * np.maximum(np.abs(other.zero_point), 1)
        return not (apart.any() or shifted.any())


def expand(values: npt.NDArray[Number], rows: int, group_size: int) -> npt.NDArray[Number]:
    """One value for each weight, (n, rows), from one for each group, (n, groups)."""
    if values.shape[1] == 1:
        return np.broadcast_to(values, (values.shape[0], rows))
    return np.repeat(values, group_size, axis=1)[:, :rows]


def decode(
    codes: npt.NDArray[Any], scale: npt.NDArray[np.float32], zero_point: ZeroPoint, group_size: int
) -> npt.NDArray[np.float32]:
    """``scale * (codes - zero_point)`` for codes (n, m): the difference in the zero point's type, then in float32."""
    rows = codes.shape[1]
    steps: npt.NDArray[Any] = codes.astype(zero_point.dtype) - expand(zero_point, rows, group_size)
    return np.multiply(expand(scale, rows, group_size), steps.astype(np.float32), dtype=np.float32)


def encode(W: npt.NDArray[np.float32], grid: Grid, group_size: int) -> npt.NDArray[np.float64]:
    """Real codes ``W / scale + zero_point``, not rounded; in float64, so that offsets cancel well."""
    rows = W.shape[1]
    codes = W.astype(np.float64) / expand(grid.scale, rows, group_size) + expand(grid.zero_point, rows, group_size)
    return np.clip(codes, -MAX_ZERO_POINT, MAX_ZERO_POINT)  # a tiny given scale must not overflow


def ranges(W: npt.NDArray[np.float32], group_size: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Least and greatest weight of each group, (n, groups)."""
    starts = np.arange(0, W.shape[1], group_size)
    low, high = np.minimum.reduceat(W, starts, axis=1), np.maximum.reduceat(W, starts, axis=1)
    return low.astype(np.float64), high.astype(np.float64)


def minmax(
    low: npt.NDArray[np.float64], high: npt.NDArray[np.float64], levels: int, symmetric: bool, real: bool = False
) -> Grid:
    """Grid that spans each range: d = (max - min) / (levels - 1), z = round(min / d) (paper, section III-B).

    The zero point -z is not clipped to the codes: a range that excludes zero then keeps its full resolution. With
    `real` it is not rounded either. With `symmetric` it is ``levels // 2``, and the scale the smallest that reaches
    both ends.
    """
    size = np.maximum(np.abs(low), np.abs(high))
    zero = size < NEGLIGIBLE
    constant = ~zero & (high - low <= CONSTANT * size) & (not symmetric)
    if symmetric:
        above, below = levels - 1 - levels // 2, levels // 2
        scale = np.maximum(high / above, -low / below) if above else np.where(low < 0, -low / below, size)
    else:
        scale = np.where(constant, size, (high - low) / (levels - 1))
    fine = ~zero & (scale < FINEST * size)
    scale = np.where(fine, FINEST * size, scale)
    scale = np.where(zero, 1.0, scale).astype(np.float32)
    offset = -low / scale if real else -np.rint(low / scale)
    zero_point = np.full(low.shape, levels // 2) if symmetric else np.where(constant, low < 0, offset)
    grid = Grid(scale, zero_point.astype(np.float32 if real else np.int32))
    _note(grid, zero, "are zero: their scale starts at 1")
    _note(grid, constant, "hold one constant: their scale is its size and their codes are exact")
    _note(grid, fine, "span too little for float32 to tell all codes apart: some of the codes stay unused")
    outside = (grid.zero_point < 0) | (grid.zero_point >= levels)
    _note(grid, outside, "lie on one side of zero: their zero point lies outside the codes")
    return grid


def tensor_paper(W: npt.NDArray[np.float32], levels: int, real: bool = False) -> Grid:
    """One signed grid for the whole matrix, scale mean_j max_i |w_ij| / (levels // 2) (paper, section III-A)."""
    scale = float(np.abs(W).max(axis=1).mean(dtype=np.float64)) / (levels // 2)
    grid = Grid(*_whole(len(W), scale if scale >= NEGLIGIBLE else 1.0, (np.float32 if real else np.int32)(levels // 2)))
    if scale < NEGLIGIBLE:
        grid.notes.append("All weights are zero: the scale is 1 and they stay exactly zero.")
    return grid


def spanning(
    W: npt.NDArray[np.float32], levels: int, group_size: int, whole: bool, symmetric: bool, real: bool = False
) -> Grid:
    """Min-max grid of every group, or one for the `whole` matrix."""
    low, high = ranges(W, group_size)
    if not whole:
        return minmax(low, high, levels, symmetric, real)
    grid = minmax(low.min(keepdims=True), high.max(keepdims=True), levels, symmetric, real)
    return Grid(*_whole(len(W), grid.scale[0, 0], grid.zero_point[0, 0]), grid.notes)


def search(
    values: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float64],
    grid: Grid,
    candidates: Candidates,
    levels: int,
    group_size: int,
    whole: bool,
    pool: Workers,
) -> Grid:
    """Candidate with the least weighted squared rounding error of `values` (n, m), for each group; `weight` is (m,)."""
    single = weight.astype(np.float32)

    def judged(tile: slice) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64], npt.NDArray[np.float32]]:
        scale, zero_point = candidates.around(grid, tile, levels)
        errors, offset = np.empty_like(scale), zero_point.astype(np.float32)
        kernels.grid_errors(values[tile], single, scale, offset, group_size, np.float32(levels - 1), errors)
        return scale, zero_point, errors * candidates.factors**2

    def best(tile: slice) -> Grid:
        scale, zero_point, errors = judged(tile)
        return picked(scale, zero_point, errors.argmin(axis=2), grid.zero_point.dtype)

    parts = tiles(len(values))
    if whole:
        found = pool.map(judged, parts)
        total = np.add.reduce([errors.sum(axis=0, keepdims=True, dtype=np.float64) for _, _, errors in found])
        one = picked(found[0][0][:1], found[0][1][:1], total.argmin(axis=2), grid.zero_point.dtype)
        return Grid(*_whole(len(values), one.scale[0, 0], one.zero_point[0, 0]), list(grid.notes))
    chosen = pool.map(best, parts)
    scale, zero_point = (np.concatenate([getattr(part, name) for part in chosen]) for name in ("scale", "zero_point"))
    return Grid(scale, zero_point, list(grid.notes))


def picked(
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.float64],
    best: npt.NDArray[np.intp],
    dtype: np.dtype[Any],
) -> Grid:
    """Grid of the candidates (columns, groups, candidates) with these numbers (columns, groups)."""
    chosen = best[:, :, None]
    offsets = np.take_along_axis(zero_point, chosen, axis=2)[:, :, 0].astype(dtype)
    return Grid(np.take_along_axis(scale, chosen, axis=2)[:, :, 0], offsets)


class Candidates:
    """Grids to choose from around each one: its scale times some factors, its middle kept, its zero point shifted.

    The first of them is the grid itself, which keeps its place on a tie. Without shifts the zero point stays.
    """

    def __init__(self, factors: npt.NDArray[np.float64], shifts: tuple[int, ...] = ()) -> None:
        self._moves = bool(shifts)
        self.factors = np.repeat(factors, max(len(shifts), 1)).astype(np.float32)
        self._shifts = np.tile(np.array(shifts or (0,)), len(factors))

    def around(self, grid: Grid, tile: slice, levels: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """Scales and zero points (columns, groups, candidates) of a tile's candidates."""
        scale = grid.scale[tile, :, None] * self.factors
        zero_point = np.broadcast_to(grid.zero_point[tile, :, None], scale.shape).astype(np.float64)
        if self._moves:
            middle = (levels - 1) / 2
            zero_point = middle - (middle - zero_point) / self.factors + self._shifts
            if grid.zero_point.dtype.kind == "i":
                zero_point = np.rint(zero_point)
        return scale, zero_point


#: Shrinks the min-max grid; the zero point stays, so that zero stays exact.
SHRINK = Candidates(np.linspace(1.0, 0.4, 25))
#: Refines a grid that is about right, the nearest candidates first; the second where the zero point must stay.
CLOSE = 1 + 0.025 * np.array(sorted(range(-8, 9), key=abs))
REFINE, REFINE_SCALE = Candidates(CLOSE, (0, -1, 1, -2, 2)), Candidates(CLOSE)


def fixed(
    W: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    zero_point: ZeroPoint | None,
    levels: int,
    group_size: int,
    whole: bool,
    symmetric: bool,
) -> Grid:
    """Grid with the caller's scale (n, groups); without a zero point, the codes are centred on each group's range."""
    if zero_point is None:
        low, high = ranges(W, group_size)
        if whole:
            low, high = low.min(keepdims=True), high.max(keepdims=True)
        centred = -np.rint((low + high) / 2 / scale - (levels - 1) / 2)
        middle = np.full_like(scale, levels // 2) if symmetric else centred
        zero_point = np.broadcast_to(np.clip(middle, -MAX_ZERO_POINT, MAX_ZERO_POINT), scale.shape).astype(np.int32)
    return Grid(scale, zero_point)


def _whole(columns: int, scale: float, zero_point: np.number[Any]) -> tuple[npt.NDArray[np.float32], ZeroPoint]:
    """One scale and zero point, for every column."""
    return np.full((columns, 1), scale, dtype=np.float32), np.full((columns, 1), zero_point)


def _note(grid: Grid, affected: npt.NDArray[np.bool_], what: str) -> None:
    if affected.any():
        unit = "columns" if affected.shape[1] == 1 else "groups"
        grid.notes.append(f"{int(affected.sum())} of {affected.size} {unit} {what}.")
