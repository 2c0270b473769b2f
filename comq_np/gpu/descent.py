"""Sweeps, tabu searches and refits on the device, from one start."""

from __future__ import annotations

import functools

import numpy as np

from comq_np import cuda
from comq_np.descent import STILL, Solution, Start, Terms, refitted, sums_of_one
from comq_np.gpu import arrays
from comq_np.gpu.arrays import Array
from comq_np.gpu.problem import DeviceProblem, DeviceSolution, nearest_objective
from comq_np.layouts import Float32, Float64, Real


class DeviceDescent:
    """`descent.Descent` on the device."""

    def __init__(self, problem: DeviceProblem, start: Start, size: Float64 | None, rounding: Float64 | None) -> None:
        self.problem = problem
        self.changed = np.zeros(problem.count, dtype=np.int64)
        self.converged = False
        self._real, self._size = start.real, start.size if size is None else size
        told = start.told
        self.solution: Solution = DeviceSolution(
            start.codes, start.grid, np.zeros(problem.count) if told is None else told.objective
        )
        self.residual = None if told is None else told.residual
        if start.real:
            self.solution.codes = problem.codes_on(start.grid, real=True)
            self.residual = arrays.zeros(problem.W.shape)
            self.start = nearest_objective(problem, start.grid) if rounding is None else rounding
            return
        if self.residual is None:
            self._measure()
        self.start = self.solution.objective.copy()

    def _measure(self) -> None:
        """Compute residual and objective from scratch."""
        error = self.problem.errors_of(self.solution.codes, self.solution.grid)
        self.residual = arrays.empty(error.shape)
        arrays.multiply(self.problem.G, error, self.residual)
        self.solution.objective = arrays.dots(error, self.residual)

    def _follow(self) -> None:
        """Compute the objective from the residual."""
        error = self.problem.errors_of(self.solution.codes, self.solution.grid)
        self.solution.objective = arrays.dots(error, self.residual)

    def sweep(self, order: Array) -> None:
        """Visit every coordinate once, in the `order` of each column or from the first row to the last."""
        problem, now = self.problem, self.solution
        threads, slots = cuda.rows_and_places(problem.W.shape[1])
        changed = arrays.zeros((problem.count,), np.int32)
        inverse = problem.kept("inverse", lambda: arrays.upload(problem.inverse_diagonal, np.float32))
        places = problem.kept("no order", lambda: arrays.empty((1, 1), np.int32)) if order is None else order
        kernel = cuda.sweep(threads, slots, order is not None, now.grid.scale.shape[1] > 1)
        arrays.a_block_each(
            kernel,
            problem.W,
            threads,
            now.codes,
            self.residual,
            problem.G,
            inverse,
            arrays.upload(now.grid.scale, np.float32),
            problem.group_of_row,
            places,
            problem.top,
            changed,
        )
        self.changed = arrays.download(changed).astype(np.int64)
        self.converged = not self._real and not self.changed.any()
        if self._real:
            self._measure()
            self._real = False
        else:
            self._follow()

    def tabu(self, moves: int) -> None:
        """Leave the minimum that the sweeps have reached, for a lower one that is that many moves away at most."""
        problem, now = self.problem, self.solution
        threads, slots = cuda.rows_and_places(problem.W.shape[1])
        before = arrays.copied(now.codes)
        live = problem.kept("live", lambda: arrays.upload((problem.inverse_diagonal > 0).sum(axis=1), np.int32))
        kernel = cuda.tabu(threads, slots, now.grid.scale.shape[1] > 1)
        arrays.a_block_each(
            kernel,
            problem.W,
            threads,
            now.codes,
            self.residual,
            problem.G,
            problem.alive,
            live,
            arrays.upload(now.grid.scale, np.float32),
            arrays.upload(now.grid.scale.max(axis=1), np.float32),
            problem.group_of_row,
            problem.top,
            moves,
        )
        self.changed = arrays.changes(before, now.codes)
        self._follow()
        self.converged = False

    def refit(self, last: bool = False) -> None:
        """Refit the grid in closed form, one group after the other, the others held."""
        problem, now = self.problem, self.solution
        before = now.grid.copy()
        groups = before.scale.shape[1]
        size = self._size if last and groups == 1 and not problem.real else None
        if last and size is None:
            self._measure()
        for g in range(groups):
            terms = self._last_terms(size) if size is not None else self._terms(g)
            total = problem.summed(terms.sums.T).T
            self._regrid(g, terms, *refitted(before, g, total, problem.real))
        self.converged &= now.grid.near(before, STILL)

    def _last_terms(self, size: Float64) -> Terms:
        """Terms for a single group from what is there."""
        wR = arrays.dots(self.problem.W, self.residual)
        return Terms(sums_of_one(self.solution.grid, size, wR, self.solution.objective), None)

    def _terms(self, g: int) -> Terms:
        """What a refit of group g of each column needs to know."""
        problem, now, single = self.problem, self.solution, self.solution.grid.scale.shape[1] == 1
        q, Gq = arrays.empty(problem.W.shape), arrays.empty(problem.W.shape)
        offset = arrays.upload(now.grid.zero_point, np.float32)
        arrays.by_rows(cuda.steps_of, q, now.codes, offset, problem.group_of_row, -1 if single else g, q)
        if single:  # from what is there: d G q = G w - R
            scale = arrays.upload(now.grid.scale[:, 0], np.float32)
            arrays.by_rows(cuda.products_of_steps, Gq, problem.products(), self.residual, scale, Gq)
        else:
            self._times_group(g, q, Gq)
        sums = np.zeros((5, problem.count))
        sums[0], sums[1] = arrays.dots(q, self.residual), arrays.dots(q, Gq)
        if not problem.real:
            return Terms(sums, functools.partial(self._follow_steps, Gq, None))
        ones, Gu = self._ones(g), arrays.empty((len(problem.order), problem.W.shape[1], 1))
        arrays.multiply(problem.G, ones, Gu)
        sums[2], sums[3] = arrays.dots(self.residual, ones), arrays.dots(Gq, ones)
        sums[4] = arrays.dots(ones, Gu).repeat(problem.W.shape[2])
        return Terms(sums, functools.partial(self._follow_steps, Gq, Gu))

    def _ones(self, g: int) -> Array:
        """The ones of a group, (b, m, 1)."""
        marks = (
            (self.problem.group == g) if self.solution.grid.scale.shape[1] > 1 else np.ones(self.problem.order.shape)
        )
        return arrays.upload(marks[:, :, None], np.float32)

    def _times_group(self, g: int, q: Array, Gq: Array) -> None:
        """``G q`` for q that is zero outside of a group: by its rows alone."""
        problem, size = self.problem, self.problem.group_size
        rows = arrays.upload(problem.by_group[:, g * size : (g + 1) * size], np.int32)
        G, part = arrays.empty((*rows.shape, problem.W.shape[1])), arrays.empty((*rows.shape, problem.W.shape[2]))
        arrays.by_rows(cuda.gather, G, problem.G, rows, G)
        arrays.by_rows(cuda.gather, part, q, rows, part)
        arrays.multiply(G, part, Gq, flip=True)

    def _regrid(self, g: int, terms: Terms, scale: Float32, zero_point: Real) -> None:
        """Put a new scale and zero point in, and follow with residual and objective."""
        now, (qR, qGq, uR, uGq, uGu) = self.solution, terms.sums
        offset = scale.astype(np.float64) * (now.grid.zero_point[:, g].astype(np.float64) - zero_point)
        change = scale.astype(np.float64) - now.grid.scale[:, g]
        now.grid.scale[:, g], now.grid.zero_point[:, g] = scale, zero_point
        now.objective += change * (change * qGq - 2 * qR) + offset * (offset * uGu + 2 * change * uGq - 2 * uR)
        if terms.follow is not None:
            terms.follow(change, offset)

    def _follow_steps(self, Gq: Array, Gu: Array | None, change: Float64, offset: Float64) -> None:
        """Let the residual follow with steps along q and, with a real zero point, u."""
        for reached, step in ((Gq, change), (Gu, offset)):
            if reached is not None:
                arrays.by_rows(cuda.subtract, self.residual, self.residual, arrays.upload(step, np.float32), reached)
