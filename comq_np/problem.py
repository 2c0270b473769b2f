"""What is minimised: weights and Gram matrices of one problem or many, in the order in which their rows are visited.

There are three layouts. `Problem.W` is (b, m, n) as users give it. Grids and whatever has one value a column have a row
for each column of all problems, (b n, ...), and so have the codes and residuals of a descent, (b n, m), whose loops
run over the rows of one column. What runs over all columns at a time takes a `Tile` of them, (k, m, c): c columns of k
problems, either some columns of one problem or all of several. Rows are in the order of their visit everywhere except
in `Problem.W`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from comq_np import kernels
from comq_np.checks import MAX_ZERO_POINT
from comq_np.grid import Grid, decode, spanning
from comq_np.layouts import Float32, Float64, Real, by_column, dots, double_forms, forms, shrink

#: Columns of a tile, or of one of several short problems as many as have so many weights: still no more than are worth
#: a thread.
TILE, SHORT_TILE = 256, 2**13


@dataclass(frozen=True)
class Tile:
    """Problems, columns of each of them, and the numbers of these columns among those of all problems."""

    problems: slice
    columns: slice
    where: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Number of problems, and of columns of each."""
        return self.problems.stop - self.problems.start, self.columns.stop - self.columns.start

    def first(self, columns: int) -> Tile:
        """Tile of so many columns of the same problems, which have the first numbers."""
        return Tile(self.problems, slice(0, columns), slice(0, self.shape[0] * columns))

    def split(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values of its columns (k c, ...) with the problems apart, (k, c, ...), not copied."""
        return values.reshape(*self.shape, *values.shape[1:])


def tiles(problems: int, rows: int, columns: int) -> list[Tile]:
    """Tiles that cover all columns. They depend on the shape alone, and so does every bit.

    There is an even number of them, about equal, lest one of two threads waits for the other in the end.
    """
    if columns >= TILE // 2:
        width = math.ceil(columns / (2 * math.ceil(columns / (2 * TILE))))
        starts = range(0, columns, width)
        return [
            Tile(slice(p, p + 1), slice(start, stop), slice(p * columns + start, p * columns + stop))
            for p in range(problems)
            for start, stop in ((start, min(start + width, columns)) for start in starts)
        ]
    most = max(TILE, SHORT_TILE // rows)
    step = math.ceil(problems / (2 * math.ceil(problems * columns / (2 * most))))
    spans = [(p, min(p + step, problems)) for p in range(0, problems, step)]
    return [Tile(slice(p, q), slice(0, columns), slice(p * columns, q * columns)) for p, q in spans]


class Kind(NamedTuple):
    """Kind of grid: `group_size` rows share a scale, with `whole` in all columns of a problem.

    There are `levels` codes. The zero point is the middle one with `symmetric`, and any number with `real`. Scales are
    of float16 with `half`.
    """

    group_size: int
    whole: bool
    levels: int
    symmetric: bool = False
    real: bool = False
    half: bool = False


@dataclass(frozen=True)
class Problem:
    """Weights (b, m, n) and Gram matrices (b, m, m), divided by a `unit` (b,) each that brings them near 1.

    `order` (b, m) holds the row of the weights that is visited first, and so on; the rows and columns of `G` are in
    that order. Short problems have `G` in `double` precision, too. The fields of a `Kind` say how grids are.
    """

    W: Float32
    G: Float32
    order: npt.NDArray[np.intp]
    unit: Float64
    group_size: int
    whole: bool
    levels: int
    symmetric: bool = False
    real: bool = False
    half: bool = False
    double: Float64 | None = None

    @property
    def top(self) -> np.float32:
        """The largest code."""
        return np.float32(self.levels - 1)

    @property
    def count(self) -> int:
        """Columns of all problems."""
        return int(self.W.shape[0] * self.W.shape[2])

    @functools.cached_property
    def tiles(self) -> list[Tile]:
        """Tiles of columns."""
        return tiles(*self.W.shape)

    @functools.cached_property
    def span(self) -> Grid:
        """Min-max grid."""
        return spanning(self.W, self.levels, self.group_size, self.whole, self.symmetric, self.real, self.half)

    @functools.cached_property
    def group(self) -> npt.NDArray[np.int32]:
        """Group of every row, (b, m)."""
        return (self.order // self.group_size).astype(np.int32)

    @functools.cached_property
    def by_group(self) -> npt.NDArray[np.intp]:
        """Rows of the first group, then of the second and so on, (b, m)."""
        return np.argsort(self.group, axis=1, kind="stable")

    def finest(self, tile: Tile) -> Real:
        """Matrices (k, m, m) of a tile, in double precision if they are there in it."""
        return (self.G if self.double is None else self.double)[tile.problems]

    @functools.cached_property
    def inverse_diagonal(self) -> Float32:
        """``1 / G_ii`` (b, m), and 0 for a dead row: it has no say in the output, a zero step leaves it rounded."""
        diagonal = self.diagonal
        return np.divide(1, diagonal, out=np.zeros_like(diagonal), where=diagonal >= np.finfo(np.float32).tiny)

    @functools.cached_property
    def diagonal(self) -> Float32:
        """``G_ii``, (b, m)."""
        return np.diagonal(self.G, axis1=1, axis2=2).copy()

    @property
    def zero_columns(self) -> npt.NDArray[np.bool_]:
        """Which columns (b n,) hold nothing but zeros."""
        return ~self.W.any(axis=1).ravel()

    def weights(self, tile: Tile, made: Float32 | None = None) -> Float32:
        """Weights of a tile, (k, m, c)."""
        problems, columns = tile.shape
        made = np.empty((problems, self.W.shape[1], columns), np.float32) if made is None else made
        kernels.gather(self.W, self.order[tile.problems], tile.problems.start, tile.columns.start, made)
        return made

    def weights_by_column(self, tile: Tile) -> Float32:
        """Weights of a tile with a row for each column, (k c, m), which are kept."""
        if tile.where.start not in self._by_column:
            self._by_column[tile.where.start] = by_column(self.weights(tile))
        return self._by_column[tile.where.start]

    def weight_products(self, tile: Tile) -> Float32:
        """``W G`` of a tile, (k c, m), computed once: by whichever refit asks for it first."""
        if tile.where.start not in self._products:
            W = self.weights_by_column(tile)
            self._products[tile.where.start] = (tile.split(W) @ self.G[tile.problems]).reshape(W.shape)
        return self._products[tile.where.start]

    def size(self) -> Float64 | None:
        """``w.T @ G @ w`` (b n,) of each column, where all ``W G`` have been computed."""
        if len(self._products) < len(self.tiles):
            return None
        found = [dots(self.weights_by_column(tile), self.weight_products(tile)) for tile in self.tiles]
        return np.concatenate(found)

    @functools.cached_property
    def _by_column(self) -> dict[int, Float32]:
        return {}

    @functools.cached_property
    def _products(self) -> dict[int, Float32]:
        return {}

    def spread(self, values: npt.NDArray[Any], tile: Tile) -> npt.NDArray[Any]:
        """One value for each row of each column of a tile, (k c, m), from one for each group, (k c, groups)."""
        if values.shape[1] == 1:
            return np.broadcast_to(values, (len(values), self.W.shape[1]))
        group = self.group[tile.problems].astype(np.intp).repeat(tile.shape[1], axis=0)
        return np.take_along_axis(values, group, axis=1)

    def encode(self, grid: Grid, tile: Tile, digit: float, codes: Float32) -> None:
        """Fill `codes` with the real codes ``W / scale + zero_point`` of a tile on its grid, (k c, m).

        The quotient is in multiples of `digit`, so that an opposite weight has the opposite one.
        """
        arrays = self.weights_by_column(tile), grid.scale, grid.zero_point.astype(np.float64)
        kernels.real_codes(*arrays, self.group[tile.problems], digit, MAX_ZERO_POINT, codes)

    def nearest(self, grid: Grid, tile: Tile, codes: Float32 | None = None) -> Float32:
        """Nearest codes to the weights of a tile, (k c, m)."""
        W, zero_point = self.weights_by_column(tile), grid.zero_point.astype(np.float64)
        codes = np.empty_like(W) if codes is None else codes
        kernels.nearest_codes(W, grid.scale, zero_point, self.group[tile.problems], self.top, codes)
        return codes

    def errors(self, codes: Float32, grid: Grid, tile: Tile, error: Float32 | None = None) -> Float32:
        """``W - Wq`` of a tile, (k c, m), for its codes of that shape."""
        W, zero_point = self.weights_by_column(tile), grid.zero_point.astype(np.float64)
        error = np.empty_like(W) if error is None else error
        kernels.errors(W, codes, grid.scale, zero_point, self.group[tile.problems], error)
        return error

    def double_errors(self, codes: Float32, grid: Grid, tile: Tile) -> Float64:
        """The same in double precision, in which the difference is exact."""
        scale, zero_point = self.spread(grid.scale, tile), self.spread(grid.zero_point, tile)
        return self.weights_by_column(tile).astype(np.float64) - decode(codes, scale, zero_point)

    def total(self, objective: Float64) -> float:
        """Sum of the objectives of all columns, in the unit of the given matrices; rounding may take one below zero."""
        return self.scaled_total(objective) * float(self.unit.max())

    def scaled_total(self, objective: Float64) -> float:
        """The same in a unit in which it does not overflow."""
        return float(objective.reshape(len(self.unit), -1).sum(axis=1) @ (self.unit / self.unit.max()))

    def shrunk(self, share: float) -> Problem:
        """The same with ``(1 - share) G + share mean(diag G) I`` in the place of `G`, which does not survive it."""
        if not share:
            return self
        double = None if self.double is None else self.double.copy()
        for G in (self.G,) if double is None else (self.G, double):
            shrink(G, share)
        made = dataclasses.replace(self, double=double)
        made._by_column.update(self._by_column)
        return made

    def with_matrix(self, matrix: Real) -> Problem:
        """The same with a copy of another matrix (b, m, m), its rows in the same order, in the place of `G`."""
        double = None if self.double is None else matrix
        made = dataclasses.replace(self, G=matrix.astype(np.float32), double=double)
        made._by_column.update(self._by_column)
        return made

    def objective(self, codes: Float32, grid: Grid, tile: Tile) -> Float64:
        """Objective of the columns of a tile, from scratch, for its codes and grid."""
        if self.double is None:
            return forms(self.G[tile.problems], self.errors(codes, grid, tile))
        return double_forms(self.double[tile.problems], tile.split(self.double_errors(codes, grid, tile)))

    def arranged(self, order: npt.NDArray[np.intp]) -> Problem:
        """The same with its rows in another order, (b, m), of those of this one."""
        G = np.stack([G[rows[:, None], rows] for G, rows in zip(self.G, order, strict=True)])
        return dataclasses.replace(self, G=G, double=None, order=np.take_along_axis(self.order, order, axis=1))

    def pooled(self, parts: list[Tile], values: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Values (k c, ...) of every column of the tiles.

        With `whole`, each gets the sum over the columns of its problem; the tiles are then all there are.
        """
        if not self.whole:
            return values
        total = np.zeros((self.W.shape[0], *values[0].shape[1:]))
        for tile, value in zip(parts, values, strict=True):
            total[tile.problems] += tile.split(value).sum(axis=1)
        return [total[tile.problems].repeat(tile.shape[1], axis=0) for tile in parts]
