"""One pass over the rows, with any feedback of the errors made so far into the rows still to come.

Visiting the rows in turn, row i is rounded to ``target_i = W_i + sum_{k<i} U_ki E_k / U_ii`` and leaves the error
``E_i = W_i - Wq_i``. Without feedback that is round to nearest; with `G` for U it is COMQ's first sweep; with the upper
triangular factor of ``G = U @ U.T`` it is GPTQ, which is Babai's nearest plane [1]_: ``U_ii (target_i - Wq_i)`` are
then the entries of ``U.T @ E``, whose squares add up to the objective, each as small as it can be once the rows before
are fixed.

.. [1] J. Chen et al., "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", arXiv:2507.18553.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from comq_np import kernels
from comq_np.grid import Grid
from comq_np.layouts import (
    BLOCK,
    Float32,
    Float64,
    Real,
    blocks,
    by_column,
    by_row,
    dots,
    mean_diagonal,
    times_triangle,
)
from comq_np.parallel import Workers
from comq_np.problem import Problem, Tile

#: Gives an array of a name and shape, maybe a used one.
Scratch = Callable[..., Float32]

#: Share of the mean diagonal that is added to `G` at least before it is factored, lest rounding make it indefinite.
JITTER = 1e-6
#: The same times the squared number of levels. With an ill-conditioned `G` the nearest plane asks of the rows what lies
#: far outside of their codes, and clipping undoes its plan. Damping holds it to what they can give, like the noise in
#: detection by least mean squares: the variance of a rounding error is 1 / levels**2 of that of the codes.
DAMPING = 0.1
#: With less damping, the factor is computed in double precision.
SINGLE = 1e-5


@dataclass(frozen=True)
class Feedback:
    """``U.T`` on and below the diagonal of `matrix` (b, m, m), with anything above it, and its `diagonal` (b, m).

    Where `G` plus `damping` (b,) on its diagonal is `factored` (b,), it is ``U @ U.T``.
    """

    matrix: Float32
    diagonal: Float32
    factored: npt.NDArray[np.bool_]
    damping: Float32

    def times(self, some: slice, error: Float32) -> None:
        """Put ``U.T @ error`` in the place of errors (k c, m) of some of the problems, by half a product."""
        times_triangle(self.matrix[some], error, turned=False)

    def back(self, some: slice, missed: Float32) -> None:
        """Put ``U @ missed`` in the place of what they have `missed` (k c, m), by half a product."""
        times_triangle(self.matrix[some], missed, turned=True)


@dataclass
class Pass:
    """What a pass gives for a tile: codes, errors W - Wq, and the targets that the codes are nearest to, (k, m, c).

    Where the feedback is factored, the squares of U_ii (target_i - Wq_i), which is what a row has missed, add up to
    `price` (k c,), the objective with the damping.
    """

    codes: Float32
    error: Float32
    targets: Float32
    price: Float64

    @classmethod
    def like(cls, W: Float32, scratch: Scratch, name: str) -> Pass:
        """Pass for weights of that shape, in memory of that name, with anything in it."""
        codes, error, targets = (scratch(f"{name} {k}", *W.shape) for k in range(3))
        return cls(codes, error, targets, np.empty(W.shape[0] * W.shape[2]))

    def take(self, other: Pass, columns: npt.NDArray[np.intp], better: npt.NDArray[np.bool_]) -> None:
        """Replace those of some `columns` by those of another pass, of just these, that are `better`."""
        place = np.where(better, columns % self.codes.shape[2], -1).reshape(len(self.codes), -1)
        for name in ("codes", "error", "targets"):
            kernels.take_columns(getattr(self, name), getattr(other, name), place)
        self.price[columns[better]] = other.price[better]


def default_damping(levels: int) -> float:
    """Damping that suits so many levels."""
    return max(DAMPING / levels**2, JITTER)


def gram(problem: Problem) -> Feedback:
    """``F_ik = G_ik / G_ii``: the first sweep of COMQ (paper, algorithm 1)."""
    none = np.zeros(len(problem.G), np.float32)
    return Feedback(problem.G, problem.diagonal, none > 0, none)


@contextlib.contextmanager
def triangular(problem: Problem, share: float, pool: Workers) -> Iterator[Feedback]:
    """Babai's nearest plane: U with ``U @ U.T = G`` plus this share of its mean diagonal, `gram` where there is none.

    The factor borrows the memory of the lower triangle of `G`, which is whole again in the end.
    """
    G, diagonal = problem.G, problem.diagonal
    means = mean_diagonal(diagonal)
    damping = (share * np.where(means > 0, means, 1)).astype(np.float32)
    try:
        factor, factored = _factor(problem, damping, share, pool)
        factor[diagonal == 0] = 0.0
        pivots, at = np.where(factored[:, None], factor, diagonal), np.arange(G.shape[1])
        G[:, at, at] = pivots
        yield Feedback(G, pivots, factored, np.where(factored, damping, 0))
    finally:
        _restore(problem, slice(None), pool)


def _factor(problem: Problem, damping: Float32, share: float, pool: Workers) -> tuple[Float32, npt.NDArray[np.bool_]]:
    """Put ``U.T`` in the lower triangle of `G`; the diagonal of U, and which matrices of the batch have one."""
    G, at = problem.G, np.arange(problem.G.shape[1])
    work = G if share >= SINGLE else G.astype(np.float64)
    work[:, at, at] += damping[:, None]
    factored = np.ones(len(G), np.bool_)
    try:
        _cholesky(work, pool)
    except np.linalg.LinAlgError:  # of one of them: each on its own
        for p in range(len(G)):
            _restore(problem, slice(p, p + 1), pool)
            work[p] = G[p]
            work[p, at, at] += damping[p]
            try:
                _cholesky(work[p : p + 1], pool)
            except np.linalg.LinAlgError:
                factored[p] = False
    diagonal = work[:, at, at].astype(np.float32)
    factored &= diagonal.min(axis=1) > 0
    for p in np.flatnonzero(~factored).tolist():
        _restore(problem, slice(p, p + 1), pool)
    if work is not G:
        for i in at:
            G[factored, i, :i] = work[factored, i, :i]
    return diagonal, factored


def _cholesky(G: Real, pool: Workers) -> None:
    """Factor ``G = U @ U.T`` into its lower triangle, from the last rows to the first; nothing above is touched.

    Whichever thread has what a corner on the diagonal needs factors it while others are at the rest of the rows below.
    """
    corners = blocks(G.shape[1])[::-1]
    upper = _factor_corner(G, corners[0])
    for corner, following in itertools.pairwise(corners):
        if upper is not None:
            step = functools.partial(_step, G, corner, following, upper)
            upper, *_ = pool.map(step, [following, *blocks(following.start, 4 * BLOCK)])
    if upper is None:
        raise np.linalg.LinAlgError


def _step(G: Real, corner: slice, following: slice, upper: Real, columns: slice) -> Real | None:
    """Put in the rows of ``U.T`` of a corner in some `columns` left of it, with U in the corner (b, size, size).

    Where these are those of the `following` corner, it is factored, too.
    """
    later = slice(corner.stop, None)
    rest = G[:, corner, columns] - _transposed(G[:, later, corner]) @ G[:, later, columns]
    trsm: Any = scipy.linalg.get_blas_funcs("trsm", (upper, rest))
    for made, square, one in zip(G[:, corner, columns], upper, rest, strict=True):  # BLAS has columns for rows
        made[:] = trsm(1.0, square.T, one.T, side=1, lower=1, overwrite_b=1).T
    return _factor_corner(G, following) if columns is following else None


def _factor_corner(G: Real, corner: slice) -> Real | None:
    """Factor a square on the diagonal, once all rows below are: U there, or None if it has none."""
    later = slice(corner.stop, None)
    square = G[:, corner, corner] - _transposed(G[:, later, corner]) @ G[:, later, corner]
    try:
        upper = np.ascontiguousarray(np.linalg.cholesky(square[:, ::-1, ::-1])[:, ::-1, ::-1])
    except np.linalg.LinAlgError:
        return None
    below = np.tril(np.ones(square.shape[1:], np.bool_))
    np.copyto(G[:, corner, corner], _transposed(upper), where=below)
    return upper


def _restore(problem: Problem, some: slice, pool: Workers) -> None:
    """Restore some matrices of `G` on the diagonal and, from what is above it, below."""
    G, at = problem.G[some], np.arange(problem.G.shape[1])
    pool.map(lambda rows: kernels.mirror(G, rows.start, rows.stop), blocks(len(at)))
    G[:, at, at] = problem.diagonal[some]


def _transposed(matrices: Real) -> Real:
    return matrices.transpose(0, 2, 1)


def visit(problem: Problem, tile: Tile, W: Float32, grid: Grid, feedback: Feedback, paths: int, found: Pass) -> Pass:
    """Make the pass for a tile, its weights (k, m, c), on its grid; with several `paths`, the best of it and of them.

    It is put in the arrays of `found`.

    Of the nearest plane, a path is a way to round some first rows; each row adds its term to the objective of a path,
    and the paths with the least objectives go on (K-best, or M-algorithm [1]_).

    .. [1] J. B. Anderson, S. Mohan, "Sequential Coding Algorithms: A Survey and Cost Analysis", IEEE Transactions on
       Communications 32, 1984.
    """
    _visit(problem, tile, W, grid, feedback, found)
    if paths > 1 and feedback.factored[tile.problems].all():
        best = _visit_paths(problem, tile, W, grid, feedback, paths)
        found.take(best, np.arange(len(best.price)), best.price < found.price)
    return found


def _visit(problem: Problem, tile: Tile, W: Float32, grid: Grid, feedback: Feedback, found: Pass) -> None:
    some = tile.problems
    scale, zero_point = (
        np.ascontiguousarray(tile.split(values).transpose(0, 2, 1))
        for values in (grid.scale, grid.zero_point.astype(np.float64))
    )
    shape = feedback.matrix[some], feedback.diagonal[some], scale, zero_point, problem.group[some], problem.top
    found.price[:] = 0.0
    kernels.feedback_pass(W, *shape, found.targets, found.codes, found.error, tile.split(found.price))


def _visit_paths(problem: Problem, tile: Tile, rows_of_W: Float32, grid: Grid, feedback: Feedback, paths: int) -> Pass:
    some, (problems, columns) = tile.problems, tile.shape
    W = by_column(rows_of_W)
    group, inverse = problem.group[some], _inverse(feedback.diagonal[some])
    pivots = np.square(feedback.diagonal[some], dtype=np.float64)
    shape = (problems, columns * paths, W.shape[1])
    codes, error = np.empty(shape, np.float32), np.empty(shape, np.float32)  # the paths of a column follow another
    price = np.full((len(W), paths), np.inf)
    price[:, 0] = 0.0
    for rows in blocks(W.shape[1], kernels.PANEL):
        start = rows.start
        here = error[:, :, :start] @ _transposed(feedback.matrix[some, rows, :start])
        here *= inverse[:, None, rows]
        here = here.reshape(len(W), paths, -1) + W[:, None, rows]
        rounded, left, origin = np.empty_like(here), np.empty_like(here), np.empty(here.shape[:2], np.int64)
        kernels.paths_panel(
            np.ascontiguousarray(W[:, rows]),
            here,
            _transposed(feedback.matrix[some, rows, rows] * inverse[:, rows, None]).copy(),
            np.ascontiguousarray(pivots[:, rows]),
            grid.scale,
            grid.zero_point.astype(np.float64),
            np.ascontiguousarray(group[:, rows]),
            problem.top,
            price,
            origin,
            rounded,
            left,
        )
        for before, now in ((codes, rounded), (error, left)):
            all_paths = before.reshape(len(W), paths, -1)
            all_paths[:, :, :start] = np.take_along_axis(all_paths[:, :, :start], origin[:, :, None], axis=1)
            all_paths[:, :, rows] = now
    best_codes, missed = (np.ascontiguousarray(values.reshape(len(W), paths, -1)[:, 0]) for values in (codes, error))
    best_error = by_row(missed, problems)
    feedback.times(some, missed)
    targets = rows_of_W - best_error + by_row(missed, problems) * inverse[:, :, None]
    return Pass(by_row(best_codes, problems), best_error, targets, dots(missed, missed))


def _inverse(diagonal: Float32) -> Float32:
    return np.divide(1, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)
