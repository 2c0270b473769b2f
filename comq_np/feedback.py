"""One pass over the rows, with any feedback of the errors made so far into the rows still to come.

Visiting the rows in an order, row i is rounded to ``target_i = W_i + sum_k F_ik E_k`` over the rows k visited before
it, and leaves the error ``E_i = W_i - Wq_i``. Without feedback that is round to nearest; with F_ik = G_ik / G_ii it is
COMQ's first sweep; with the strictly triangular part of L in ``G = L.T @ D @ L`` it is GPTQ, which is Babai's nearest
plane [1]_: then the objective is ``sum_i D_i (target_i - Wq_i)**2``, each term as small as it can be once the rows
before are fixed.

.. [1] J. Chen et al., "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", arXiv:2507.18553.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from comq_np import kernels
from comq_np.descent import Float32, Float64, Problem, Real
from comq_np.grid import Grid
from comq_np.parallel import Workers

#: Rows that the kernel visits between two products.
PANEL = 64
#: Share of the mean diagonal that is added to `G` at least before it is factored, lest rounding make it indefinite.
JITTER = 1e-6
#: The same times the squared number of levels. With an ill-conditioned `G` the nearest plane asks of the rows what lies
#: far outside of their codes, and clipping undoes its plan. Damping holds it to what they can give, like the noise in
#: detection by least mean squares: the variance of a rounding error is 1 / levels**2 of that of the codes.
DAMPING = 0.1


@dataclass(frozen=True)
class Feedback:
    """Rows in the order of their visit (m,), what row k feeds back to row i as ``matrix[k, i]``, and D (m,).

    `matrix` is in that order, `pivots` in that of the weights. Only with those of a `factored` matrix is the objective
    ``sum_i D_i (target_i - Wq_i)**2``.
    """

    order: npt.NDArray[np.int32]
    matrix: Float32
    pivots: Float64
    factored: bool


@dataclass
class Pass:
    """What a pass gives: codes (n, m), the targets that they are nearest to, and ``sum_i D_i (target_i - Wq_i)**2``."""

    codes: Float32
    targets: Float32
    error: Float64

    def take(self, other: Pass, columns: npt.NDArray[np.bool_]) -> None:
        """Replace some columns by those of another pass."""
        self.codes[columns], self.targets[columns] = other.codes[columns], other.targets[columns]
        self.error[columns] = other.error[columns]


def default_damping(levels: int) -> float:
    """Damping that suits so many levels."""
    return max(DAMPING / levels**2, JITTER)


def gram(G: Real, order: npt.NDArray[np.int32]) -> Feedback:
    """``F_ik = G_ik / G_ii``: the first sweep of COMQ (paper, algorithm 1)."""
    diagonal = G.diagonal()[order]
    matrix = G[np.ix_(order, order)]
    matrix = np.divide(matrix, diagonal, out=np.zeros_like(matrix), where=diagonal > 0)
    return Feedback(order, np.triu(matrix, 1).astype(np.float32), G.diagonal().copy(), factored=False)


def triangular(G: Real, order: npt.NDArray[np.int32], damping: float) -> Feedback | None:
    """``F`` from the unit triangular factor of the damped `G`: Babai's nearest plane. None if it cannot be factored."""
    backwards = order[::-1]
    reverse = G[np.ix_(backwards, backwards)]
    alive = G.diagonal()[G.diagonal() > 0]
    reverse[np.diag_indices_from(reverse)] += damping * alive.mean() if alive.size else 1.0
    try:  # transposed, which is the same matrix, for LAPACK to work in place
        lower = scipy.linalg.cholesky(reverse.T, overwrite_a=True, check_finite=False).T
    except scipy.linalg.LinAlgError:
        return None
    diagonal = lower.diagonal().astype(np.float64)
    if not diagonal.min() > 0:
        return None
    # The rows of the reversed factor are, divided by its diagonal, the columns of L.
    lower /= lower.diagonal().copy()
    matrix = np.triu(lower[::-1, ::-1], 1).astype(np.float32, copy=False)
    pivots = np.empty_like(diagonal)
    pivots[backwards] = diagonal**2
    pivots[G.diagonal() == 0] = 0.0
    return Feedback(order, matrix, pivots, factored=True)


def visit(problem: Problem, grid: Grid, feedback: Feedback, pool: Workers, paths: int = 1) -> Pass:
    """Make the pass for all columns; with several `paths`, for each column the best of that pass and of so many paths.

    Of the nearest plane, a path is a way to round some first rows; each row adds its term to the objective of a path,
    and the paths with the least objectives go on (K-best, or M-algorithm [1]_).

    .. [1] J. B. Anderson, S. Mohan, "Sequential Coding Algorithms: A Survey and Cost Analysis", IEEE Transactions on
       Communications 32, 1984.
    """
    found = _empty(problem)
    pool.map(lambda tile: _visit(problem, grid, feedback, found, tile), problem.tiles)
    if paths > 1 and feedback.factored:
        best = _empty(problem)
        pool.map(lambda tile: _visit_paths(problem, grid, feedback, paths, best, tile), problem.tiles)
        found.take(best, best.error < found.error)
    return found


def _empty(problem: Problem) -> Pass:
    return Pass(np.empty_like(problem.W), np.empty_like(problem.W), np.empty(len(problem.W)))


def _visit(problem: Problem, grid: Grid, feedback: Feedback, found: Pass, tile: slice) -> None:
    order = feedback.order
    W = np.take(problem.W[tile], order, axis=1)
    targets, error, codes = W.copy(), np.empty_like(W), np.empty_like(W)
    for start in range(0, len(order), PANEL):
        panel = slice(start, start + PANEL)
        here = targets[:, panel] + error[:, :start] @ feedback.matrix[:start, panel]
        rounded, left = np.empty_like(here), np.empty_like(here)
        kernels.pass_panel(
            np.ascontiguousarray(W[:, panel]),
            here,
            np.ascontiguousarray(feedback.matrix[panel, panel]),
            grid.scale[tile],
            grid.zero_point[tile],
            order[panel] // problem.group_size,
            problem.top,
            rounded,
            left,
        )
        targets[:, panel], codes[:, panel], error[:, panel] = here, rounded, left
    _store(found, tile, feedback, codes, targets, targets - W + error)


def _visit_paths(problem: Problem, grid: Grid, feedback: Feedback, paths: int, found: Pass, tile: slice) -> None:
    order, pivots = feedback.order, feedback.pivots[feedback.order]
    W = np.take(problem.W[tile], order, axis=1)
    codes, error = np.empty((2, len(W) * paths, len(order)), dtype=np.float32)  # the paths of a column follow another
    price = np.full((len(W), paths), np.inf)
    price[:, 0] = 0.0
    first = paths * np.arange(len(W))[:, None]
    for start in range(0, len(order), PANEL):
        panel = slice(start, start + PANEL)
        here = np.repeat(W[:, panel], paths, axis=0) + error[:, :start] @ feedback.matrix[:start, panel]
        shape = (len(W), paths, here.shape[1])
        rounded, left, origin = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape[:2], np.int64)
        kernels.paths_panel(
            np.ascontiguousarray(W[:, panel]),
            here.reshape(shape),
            np.ascontiguousarray(feedback.matrix[panel, panel]),
            pivots[panel],
            grid.scale[tile],
            grid.zero_point[tile],
            order[panel] // problem.group_size,
            problem.top,
            price,
            origin,
            rounded,
            left,
        )
        came_from = (first + origin).ravel()
        codes[:, :start], error[:, :start] = codes[came_from, :start], error[came_from, :start]
        codes[:, panel], error[:, panel] = rounded.reshape(here.shape), left.reshape(here.shape)
    missed = error[::paths] + error[::paths] @ feedback.matrix
    _store(found, tile, feedback, codes[::paths], W - error[::paths] + missed, missed)


def _store(found: Pass, tile: slice, feedback: Feedback, codes: Float32, targets: Float32, missed: Float32) -> None:
    """Put in what a pass came to for a tile, its rows in the order of their visit; `missed` is target - Wq."""
    found.codes[tile, feedback.order], found.targets[tile, feedback.order] = codes, targets
    found.error[tile] = np.square(missed, dtype=np.float64) @ feedback.pivots[feedback.order]
