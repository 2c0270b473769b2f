"""Weights and matrices on the device, and solutions whose codes are there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import checks, cuda
from comq_np import grid as grids
from comq_np.descent import Solution
from comq_np.gpu import arrays
from comq_np.gpu.arrays import Array
from comq_np.grid import Grid
from comq_np.layouts import Float32, Float64, Real
from comq_np.problem import Problem


@dataclass(frozen=True)
class DeviceProblem(Problem):
    """Problem whose `W`, in the order of the visit, and `G` are on the device.

    `given` is the matrix before it was shrunk, in double precision if it was given so; `low` and `high` (b n, groups)
    are the least and greatest weights. A problem that may be proven has a twin `on_host`.
    """

    given: Array = None
    low: Float64 = dataclasses.field(default_factory=lambda: np.empty(0))
    high: Float64 = dataclasses.field(default_factory=lambda: np.empty(0))
    on_diagonal: Float32 = dataclasses.field(default_factory=lambda: np.empty(0, np.float32))
    on_host: Problem | None = None

    @functools.cached_property
    def span(self) -> Grid:
        """Min-max grid."""
        parts = self.levels, self.whole, self.symmetric, self.real, self.half
        return grids.spanning_ranges(self.low, self.high, self.W.shape[0], *parts)

    @property
    def zero_columns(self) -> npt.NDArray[np.bool_]:
        """Which columns (b n,) hold nothing but zeros."""
        zero: npt.NDArray[np.bool_] = ((self.low == 0) & (self.high == 0)).all(axis=1)
        return zero

    @functools.cached_property
    def diagonal(self) -> Float32:
        """``G_ii``, (b, m), on the host."""
        return self.on_diagonal

    def size(self) -> Float64 | None:
        """``w.T @ G @ w`` (b n,) of each column, if a refit has computed ``G W``."""
        return arrays.dots(self.W, self.made["GW"]) if "GW" in self.made else None

    @functools.cached_property
    def made(self) -> dict[str, Array]:
        """Arrays on the device that were asked for before."""
        return {}

    def kept(self, name: str, make: Callable[[], Array]) -> Array:
        """Array of that name, made when it is first asked for."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    @property
    def group_of_row(self) -> Array:
        """Group of every row, (b, m)."""
        return self.kept("group", lambda: arrays.upload(self.group, np.int32))

    @property
    def rows_by_group(self) -> Array:
        """Rows of the first group, then of the second and so on, (b, m)."""
        return self.kept("by_group", lambda: arrays.upload(self.by_group, np.int32))

    @property
    def alive(self) -> Array:
        """Which rows matter, (b, m)."""
        return self.kept("alive", lambda: arrays.upload(self.inverse_diagonal > 0, np.uint8))

    def products(self) -> Array:
        """``G W``."""

        def make() -> Array:
            found = arrays.empty(self.W.shape)
            arrays.multiply(self.G, self.W, found)
            return found

        return self.kept("GW", make)

    def on_grid(self, grid: Grid) -> tuple[Array, Array, Array]:
        """Scale, zero point and groups for a kernel, which knows zero points in single precision only."""
        furthest = float(np.abs(grid.zero_point).max())
        if furthest > cuda.MOST_ZERO_POINT:
            raise checks.OnlyOnCPU(
                f'`backend` must be "cpu" for `W` and scales whose zero points lie further than {cuda.MOST_ZERO_POINT} '
                f"from 0, got {furthest:g}: the GPU computes in single precision."
            )
        return arrays.upload(grid.scale, np.float32), arrays.upload(grid.zero_point, np.float32), self.group_of_row

    def codes_on(self, grid: Grid, real: bool = False) -> Array:
        """Nearest codes to the weights, or the real ones."""
        codes, everywhere = arrays.empty(self.W.shape), arrays.upload(np.ones(self.order.shape), np.uint8)
        top = np.float32(-1) if real else self.top
        arrays.by_rows(cuda.encode, self.W, self.W, *self.on_grid(grid), top, everywhere, codes)
        return codes

    def errors_of(self, codes: Array, grid: Grid, double: bool = False) -> Array:
        """``W - Wq``."""
        error = arrays.empty(self.W.shape, np.float64 if double else np.float32)
        arrays.by_rows(cuda.errors(error.dtype), self.W, self.W, codes, *self.on_grid(grid), error)
        return error

    def summed(self, values: Real) -> Real:
        """Values (b n, ...) of every column; with `whole`, the sums over those of each problem."""
        if not self.whole:
            return values
        columns = self.W.shape[2]
        total: Real = values.reshape(len(self.order), columns, *values.shape[1:]).sum(axis=1).repeat(columns, axis=0)
        return total


class DeviceSolution(Solution):
    """Solution whose codes (b, m, n) are on the device."""

    def copy(self) -> DeviceSolution:
        """Return a solution that shares no memory with this one."""
        return DeviceSolution(arrays.copied(self.codes), self.grid.copy(), self.objective.copy())

    def take(self, other: Solution, columns: npt.NDArray[np.bool_]) -> None:
        """Replace some columns by those of another solution."""
        arrays.by_rows(cuda.take, self.codes, self.codes, other.codes, arrays.upload(columns, np.uint8))
        self.grid.take(other.grid, columns)
        self.objective[columns] = other.objective[columns]


def form(G: Array, vectors: Array) -> Float64:
    """``v.T @ G @ v`` (b n,) of each column."""
    reached = arrays.empty(vectors.shape, vectors.dtype)
    arrays.multiply(G, vectors, reached)
    return arrays.dots(vectors, reached)


def nearest_objective(problem: DeviceProblem, grid: Grid) -> Float64:
    """Objective of plain rounding on a grid."""
    return form(problem.G, problem.errors_of(problem.codes_on(grid), grid))


def weights(W: Any) -> Array:
    """Weights that are on the device, checked."""
    array = arrays.adopted(W)
    if array.dtype != np.float32 or not array.is_c_contiguous() or array.ndim not in (1, 2, 3) or not array.size:
        raise checks.InputError(
            f"`W` must be C-contiguous, of float32 and of 1, 2 or 3 dimensions on the device, got {array.dtype} of "
            f"shape {array.shape}."
        )
    columns = array if array.ndim == 3 else array.reshape((1, array.shape[0], array.size // array.shape[0]))
    if not arrays.dots(columns, columns).max() <= checks.MAX_WEIGHT**2:
        checks.weights(arrays.download(array), ndim=(1, 2, 3))
    return array
