"""Grids: scale and zero point of every group of every column, and the one formula that decodes.

Weights are (b, m, n), n columns of b problems. Scale and zero_point have a row for each column of all problems, (b n,
groups). A group is `group_size` successive rows of the weights, the last one maybe fewer. A zero point is an int32, or
a float32 where it may be any real number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from comq_np import kernels
from comq_np.checks import MAX_ZERO_POINT, InputError
from comq_np.kernels import LEAST_HALF, MOST_HALF

#: int32 or float32
ZeroPoint = npt.NDArray[np.number[Any]]
#: Least scale that float16 holds with all its digits.
NORMAL_HALF = 2.0**-14
OUTSIDE = "lie on one side of zero: their zero point lies outside the codes"
SMALL = "have a scale so small that float16 holds it with fewer digits"

#: A range this much smaller than the numbers in it is below what float32 weights resolve.
CONSTANT = 2.0**-20
#: Weights below this size count as zero: their scale would leave float32's normal range.
NEGLIGIBLE = 1e-33
#: No scale is a smaller share of the largest weight: it would be far below what float32 weights resolve, and the zero
#: point would leave int32. With up to 8 bits, no range that is not constant is so narrow.
FINEST = 2.0**-28


@dataclass
class Grid:
    """Scale and zero point (n, groups), with sentences on what is special about them.

    With `half`, every scale is one that float16 holds.
    """

    scale: npt.NDArray[np.float32]
    zero_point: ZeroPoint
    notes: list[str] = field(default_factory=list)
    half: bool = False

    def copy(self) -> Grid:
        """Return a grid that shares no memory with this one."""
        return Grid(self.scale.copy(), self.zero_point.copy(), list(self.notes), self.half)

    def part(self, columns: slice | npt.NDArray[np.intp]) -> Grid:
        """Grid of some columns, without the notes; for a slice, in the same memory."""
        return Grid(self.scale[columns], self.zero_point[columns], half=self.half)

    def repeated(self, columns: int) -> Grid:
        """Return a grid that has every row that many times."""
        zero_point = self.zero_point.repeat(columns, axis=0)
        return Grid(self.scale.repeat(columns, axis=0), zero_point, self.notes, self.half)

    def put(self, part: Grid, columns: slice) -> None:
        """Replace some columns by a grid of these columns."""
        self.scale[columns], self.zero_point[columns] = part.scale, part.zero_point

    def take(self, other: Grid, columns: npt.NDArray[np.bool_]) -> None:
        """Replace some columns by those of another grid."""
        self.scale[columns], self.zero_point[columns] = other.scale[columns], other.zero_point[columns]

    def equals(self, other: Grid) -> bool:
        """Whether scales and zero points are the same."""
        return np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)

    def near(self, other: Grid, tolerance: float) -> bool:
        """Whether scales differ by less than this (relative), and zero points (relative where they are above 1)."""
        apart = np.abs(self.scale - other.scale) > tolerance * other.scale
        shifted = np.abs(self.zero_point - other.zero_point) > tolerance * np.maximum(np.abs(other.zero_point), 1)
        return not (apart.any() or shifted.any())


def stored(scale: npt.NDArray[Any], half: bool) -> npt.NDArray[np.float32]:
    """Scales as they are stored: the nearest that float16 holds with `half`, else in float32."""
    if not half:
        return scale.astype(np.float32)
    rounded: npt.NDArray[np.float32] = np.clip(scale, LEAST_HALF, MOST_HALF).astype(np.float16).astype(np.float32)
    return rounded


def decode(codes: npt.NDArray[Any], scale: npt.NDArray[Any], zero_point: ZeroPoint) -> npt.NDArray[np.float32]:
    """``scale * (codes - zero_point)``, all of one shape: the difference in the zero point's type, then in float32."""
    steps: npt.NDArray[Any] = codes.astype(zero_point.dtype) - zero_point
    decoded: npt.NDArray[np.float32] = np.multiply(scale, steps.astype(np.float32), dtype=np.float32)
    return decoded


def plane_levels(plane_scale: npt.NDArray[Any], offset: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Levels (2**bits, ...) that the codes of bit planes stand for, from scales (bits, ...) and an offset (...).

    ``sum_k plane_scale_k * bit_k(code) - offset`` in float32: the planes in turn, from the least significant one, then
    the offset. Each plane doubles the levels.
    """
    levels = np.zeros((1, *offset.shape), np.float32)
    for scale in plane_scale.astype(np.float32):
        levels = np.concatenate([levels, levels + scale])
    levels -= offset.astype(np.float32)
    return levels


def ranges(W: npt.NDArray[np.float32], group_size: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Least and greatest weight of each group of each column, (b n, groups), of weights (b, m, n)."""
    b, m, n = W.shape
    whole = m - m % group_size
    parts = [W[:, :whole].reshape(b, -1, group_size, n), *[W[:, None, whole:]] * (whole < m)]
    found = []
    for extreme in (np.min, np.max):
        found.append(
            np.concatenate([extreme(part, axis=2) for part in parts], axis=1)
            .transpose(0, 2, 1)
            .reshape(b * n, -1)
            .astype(np.float64)
        )
    return found[0], found[1]


def minmax(
    low: npt.NDArray[np.float64],
    high: npt.NDArray[np.float64],
    levels: int,
    symmetric: bool,
    real: bool = False,
    half: bool = False,
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
    exact = np.where(zero, 1.0, scale)
    scale = _rounded(exact, half)
    offset = -low / scale if real else -np.rint(low / scale)
    zero_point = np.full(low.shape, levels // 2) if symmetric else np.where(constant, low < 0, offset)
    grid = Grid(scale, zero_point.astype(np.float32 if real else np.int32), half=half)
    _note(grid, zero, "are zero: their scale starts at 1")
    exactly = "" if half else " and their codes are exact"
    _note(grid, constant, f"hold one constant: their scale is its size{exactly}")
    _note(grid, fine, "span too little for float32 to tell all codes apart: some of the codes stay unused")
    outside = (grid.zero_point < 0) | (grid.zero_point >= levels)
    _note(grid, outside, OUTSIDE)
    _note(grid, half & (exact < NORMAL_HALF), SMALL)
    return grid


def _rounded(scale: npt.NDArray[np.float64], half: bool) -> npt.NDArray[np.float32]:
    """Scales of a first grid as they are stored, if they can be."""
    if half and (scale > MOST_HALF).any():
        raise InputError(
            f'`W` must be smaller with `scale_dtype="float16"`, which holds scales up to {MOST_HALF:g}, got weights '
            f"whose scale is {scale.max():g}."
        )
    return stored(scale, half)


def tensor_paper(largest: npt.NDArray[Any], levels: int, real: bool = False, half: bool = False) -> Grid:
    """One signed grid for each matrix, scale mean_j max_i |w_ij| / (levels // 2): paper, section III-A.

    The `largest` are max_i |w_ij|, (b, n).
    """
    scale = largest.mean(axis=1, dtype=np.float64)[:, None] / (levels // 2)
    zero = scale < NEGLIGIBLE
    exact = np.where(zero, 1.0, scale)
    grid = Grid(
        _rounded(exact, half),
        np.full(scale.shape, levels // 2, dtype=np.float32 if real else np.int32),
        half=half,
    )
    if zero.any():
        grid.notes.append("All weights are zero: the scale is 1 and they stay exactly zero.")
    _note(grid, half & (exact < NORMAL_HALF), SMALL)
    return grid.repeated(largest.shape[1])


def spanning(
    W: npt.NDArray[np.float32],
    levels: int,
    group_size: int,
    whole: bool,
    symmetric: bool,
    real: bool = False,
    half: bool = False,
) -> Grid:
    """Min-max grid of every group of (b, m, n), or one for each `whole` matrix."""
    return spanning_ranges(*ranges(W, group_size), len(W), levels, whole, symmetric, real, half)


def spanning_ranges(
    low: npt.NDArray[np.float64],
    high: npt.NDArray[np.float64],
    problems: int,
    levels: int,
    whole: bool,
    symmetric: bool,
    real: bool = False,
    half: bool = False,
) -> Grid:
    """The same from the least and greatest weight of each group of each column, (b n, groups)."""
    if not whole:
        return minmax(low, high, levels, symmetric, real, half)
    columns = len(low) // problems
    return minmax(*_extremes(low, high, problems), levels, symmetric, real, half).repeated(columns)


def _extremes(
    low: npt.NDArray[np.float64], high: npt.NDArray[np.float64], problems: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Least and greatest weight of each matrix, (b, 1), from those of its columns, (b n, 1)."""
    return low.reshape(problems, -1).min(axis=1)[:, None], high.reshape(problems, -1).max(axis=1)[:, None]


def errors(
    values: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    grid: Grid,
    candidates: Candidates,
    levels: int,
    group_size: int,
) -> npt.NDArray[np.float64]:
    """Weighted squared rounding error (k c, groups, candidates) of `values` (k c, m); `weight` is (k, m).

    Errors are in units of the squared scale of the grid that the candidates are around.
    """
    found = np.empty((*grid.scale.shape, len(candidates.factors)), np.float32)
    arrays = values, weight, min(group_size, values.shape[1]), grid.scale, grid.zero_point.astype(np.float64)
    moves = candidates.factors, candidates.shifts, candidates.middle(levels), grid.zero_point.dtype.kind == "i"
    kernels.grid_errors(*arrays, *moves, np.float32(levels - 1), found)
    squares = np.square(candidates.factors, dtype=np.float64)
    error: npt.NDArray[np.float64] = np.multiply(found, squares, dtype=np.float64)
    return error


def promised(grid: Grid, error: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Share (k c,) of the error (k c, groups, candidates) of each column that the best candidates do not have."""
    before, after = (
        (values * np.square(grid.scale, dtype=np.float64)).sum(axis=1) for values in (error[:, :, 0], error.min(axis=2))
    )
    promise: npt.NDArray[np.float64] = 1 - np.divide(after, before, out=np.ones_like(after), where=before > 0)
    return promise


def picked(grid: Grid, candidates: Candidates, best: npt.NDArray[np.intp], levels: int) -> Grid:
    """Grid of the candidates with these numbers (columns, groups)."""
    factors, shifts, middle = candidates.factors[best], candidates.shifts[best], candidates.middle(levels)
    zero_point = grid.zero_point
    if candidates.moves:
        moved = middle - (middle - zero_point.astype(np.float64)) / factors + shifts
        zero_point = (np.rint(moved) if zero_point.dtype.kind == "i" else moved).astype(zero_point.dtype)
    return Grid(stored(grid.scale * factors, grid.half), zero_point.copy(), list(grid.notes), grid.half)


class Candidates:
    """Grids to choose from around each one: its scale times some factors, its middle kept, its zero point shifted.

    The first of them is the grid itself, which keeps its place on a tie. Without shifts the zero point stays.
    """

    def __init__(self, factors: npt.NDArray[np.float64], shifts: tuple[int, ...] = ()) -> None:
        self.moves = bool(shifts)
        self.factors = np.repeat(factors, max(len(shifts), 1)).astype(np.float32)
        self.shifts = np.tile(np.array(shifts or (0,), np.float64), len(factors))

    def middle(self, levels: int) -> float:
        """The middle that is kept, or a negative number if the zero point is."""
        return (levels - 1) / 2 if self.moves else -1.0


#: Shrinks the min-max grid; the zero point stays, so that zero stays exact.
SHRINK = Candidates(np.linspace(1.0, 0.4, 25))
#: The same for a grid that is refined afterwards.
COARSE = Candidates(np.linspace(1.0, 0.4, 13))


def _close(step: float, steps: int, shifts: tuple[int, ...]) -> Candidates:
    """Candidates whose scale is up to so many steps off, the nearest first."""
    return Candidates(1 + step * np.array(sorted(range(-steps, steps + 1), key=abs)), shifts)


class Refining(NamedTuple):
    """Candidates that refine a grid: for the only time; first roughly, then closely; and to suit what a pass tells."""

    near: Candidates
    rough: Candidates
    close: Candidates
    fine: Candidates


#: Steps of the scale, relative to it, and how many of them.
STEPS = ((0.025, 2), (0.04, 4), (0.01, 4), (0.01, 8))
#: The same with a close search that only fills the gaps of the rough one, since a fine one follows.
QUICK_STEPS = (*STEPS[:2], (0.02, 1), STEPS[3])
#: For a symmetric grid, whose zero point must stay, or not; and for a quick search, or not.
REFINING = {
    (symmetric, quick): Refining(
        *(_close(*steps, () if symmetric else (0, -1, 1)) for steps in (QUICK_STEPS if quick else STEPS))
    )
    for symmetric in (False, True)
    for quick in (False, True)
}


def refining(symmetric: bool, quick: bool = False) -> Refining:
    """Candidates around any grid, or a symmetric one."""
    return REFINING[symmetric, quick]


def fixed(
    W: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    zero_point: ZeroPoint | None,
    levels: int,
    group_size: int,
    whole: bool,
    symmetric: bool,
    half: bool,
) -> Grid:
    """Grid with the caller's scale (n, groups); without a zero point, the codes are centred on each group's range."""
    if zero_point is None:
        low, high = ranges(W, group_size)
        if whole:
            low, high = _extremes(low, high, len(W))
            low, high = low.repeat(W.shape[2], axis=0), high.repeat(W.shape[2], axis=0)
        centred = -np.rint((low + high) / 2 / scale - (levels - 1) / 2)
        middle = np.full_like(scale, levels // 2) if symmetric else centred
        zero_point = np.broadcast_to(np.clip(middle, -MAX_ZERO_POINT, MAX_ZERO_POINT), scale.shape).astype(np.int32)
    return Grid(scale, zero_point, half=half)


def _note(grid: Grid, affected: npt.NDArray[np.bool_], what: str) -> None:
    if affected.any():
        unit = "columns" if affected.shape[1] == 1 else "groups"
        grid.notes.append(f"{int(affected.sum())} of {affected.size} {unit} {what}.")
