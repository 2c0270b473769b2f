"""Objectives on the given matrix, on the device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from comq_np import cuda
from comq_np.descent import Solution
from comq_np.gpu import arrays
from comq_np.gpu.arrays import Array
from comq_np.gpu.problem import DeviceProblem, form
from comq_np.grid import Grid
from comq_np.judge import DOUBTFUL, INDEFINITE, refuse_indefinite
from comq_np.layouts import Float64


class DeviceJudge:
    """`judge.Judge` on the device, by the given matrix."""

    def __init__(self, problem: DeviceProblem) -> None:
        self.problem = problem

    def errors(self, solution: Solution, share: float) -> Float64:
        """Objective of a solution."""
        return self._form(lambda double: self.problem.errors_of(solution.codes, solution.grid, double))

    def rounding(self, grid: Grid) -> Float64:
        """Objective of plain rounding on a grid."""
        codes = self.problem.codes_on(grid)
        return self._form(lambda double: self.problem.errors_of(codes, grid, double))

    def weights(self, size: Float64 | None, share: float) -> Float64:
        """``w.T @ G @ w``, maybe known to be the `size` by the matrix without shrinkage."""

        def weights(double: bool) -> Array:
            return arrays.converted(self.problem.W, np.float64) if double else self.problem.W

        return self._form(weights, None if share else size)

    def _form(self, vectors: Callable[[bool], Array], known: Float64 | None = None) -> Float64:
        """Form of vectors, in double precision where the matrix was given so or single leaves too few digits."""
        problem, double = self.problem, self.problem.given.dtype == np.float64
        value = vectors(double)
        found = form(problem.given, value) if known is None or double else known
        if not double:
            weighed = arrays.empty(value.shape)
            arrays.by_rows(cuda.weigh, value, value, arrays.upload(problem.diagonal, np.float32), weighed)
            if (found < DOUBTFUL * arrays.dots(value, weighed)).any():
                value = vectors(True)
                found = form(arrays.converted(problem.given, np.float64), value)
        self._refuse_negative(value, found)
        return np.maximum(found, 0.0)

    def _refuse_negative(self, value: Array, found: Float64) -> None:
        """Refuse what no Gram matrix can give, beyond what rounding may take below zero."""
        if (found >= 0).all():
            return
        problem = self.problem
        root = np.sqrt(problem.diagonal, dtype=np.float64)
        size = (np.abs(arrays.download(value)) * root[:, :, None]).sum(axis=1).ravel()
        if (found < -INDEFINITE * np.square(size)).any():
            refuse_indefinite(problem, found)
