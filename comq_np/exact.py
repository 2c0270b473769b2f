"""Proof: the best codes of a column on a given grid, or a bound on what any codes could reach.

A sphere decoder. With e = w - scale * (codes - zero_point) and G = Lᵀ D L, L unit lower triangular in an order of the
rows, the objective is ``eᵀGe = sum_i D_i (e_i + sum_{k<i} L_ik e_k)**2``: terms that are never negative, the i-th one
known once the first i codes are. A depth-first search over the codes, nearest to the real optimum first, turns back
where the terms reach the objective of the best codes so far. If it ends within its node limit, these are the optimum.

The order decides how soon the search turns back. It is found for each column (Chang and Han): next comes the row whose
second-best code would cost the most, since its best one is the least in doubt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from comq_np import checks
from comq_np.kernels import jit

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

#: Codes that are better by less than this share of the objective are not looked for.
TOLERANCE = 1e-9
#: Where the limit cuts a search off, smaller spheres give the bound: the first one's objective, and how fast it grows.
SMALLEST, GROWTH, EPS = 1 / 256, 1.2, float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Certificate:
    """Best codes found on a grid, and what the search for them has proven.

    Parameters
    ----------
    codes : ndarray, shape (m, n)
        The codes, in the type of the given ones.
    objective : ndarray of float64, shape (n,)
        Objective ``e.T @ G @ e`` of each column.
    bound : ndarray of float64, shape (n,)
        What no codes on the grid can go below.
    nodes : ndarray of int64, shape (n,)
        Partial codes that the search of each column visited.
    optimal : ndarray of bool, shape (n,)
        Whether the search came to its end: `bound` is then `objective` less 1e-9 of it, and less what rounding may do.

    Examples
    --------
    >>> import comq_np
    >>> G = [[1.0, 0.9], [0.9, 1.0]]
    >>> comq_np.certify([0.4, 0.3], G, comq_np.solve([0.4, 0.3], G, bits=1, scale=1.0, zero_point=0)).optimal
    array([ True])
    """

    codes: Array
    objective: Float64
    bound: Float64
    nodes: Int64
    optimal: npt.NDArray[np.bool_]


def search(
    W: Array, G: Array, codes: Array, scale: Array, zero_point: Array, levels: int, node_limit: int = 200_000
) -> Certificate:
    """Search for the best codes of each column on its grid, from the given ones; a row for each output channel.

    Parameters
    ----------
    W, G : ndarray of real, shapes (n, m) and (m, m)
        Weights, a row for each output channel, and Gram matrix, positive semidefinite up to rounding.
    codes : ndarray of real, shape (n, m)
        Whole numbers from 0 to ``levels - 1``; the better they are, the faster the search.
    scale, zero_point : ndarray of float and of real, shape (n, m) or (n, 1)
        The grid. What a code stands for is rounded to the type of `scale`: with float32, to what `grid.decode` gives.
    levels, node_limit : int >= 2 and >= 0
        Number of codes; most nodes of a column's search, and again as many for the bound where that is cut off.

    Returns
    -------
    Certificate
        The given codes where none are better by more than 1e-9 of the objective, and in dead rows.

    References
    ----------
    X.-W. Chang, Q. Han, "Solving box-constrained integer least squares problems", IEEE Transactions on Wireless
    Communications 7, 2008; the search is that of C. P. Schnorr, M. Euchner, Mathematical Programming 66, 1994.

    Examples
    --------
    >>> G = np.array([[1.0, 0.9], [0.9, 1.0]])
    >>> found = search(np.array([[0.4, 0.3]]), G, np.zeros((1, 2), int), np.ones((1, 1)), np.zeros((1, 1)), 2)
    >>> found.codes.tolist(), found.objective.round(3).tolist(), found.optimal.tolist()
    ([[1, 0]], [0.126], [True])
    """
    (n, m), G = W.shape, G.astype(np.float64)
    result = Certificate(codes.copy(), np.zeros(n), np.zeros(n), np.zeros(n, np.int64), np.ones(n, np.bool_))
    if not G.diagonal().any():  # nothing reaches the output
        return result
    limit = np.finfo(scale.dtype).max  # codes that stand for more are no good anyway
    shared, (scale, zero_point) = _Search(G), (np.broadcast_to(grid, (n, m)) for grid in (scale, zero_point))
    for j in range(n):
        steps = (np.arange(levels) - zero_point[j, :, None]).astype(scale.dtype)
        values = np.clip(scale[j, :, None] * steps.astype(np.float64), -limit, limit)
        errors = W[j, :, None] - values.astype(scale.dtype).astype(np.float64)
        given = codes[j].astype(np.int64)
        found, bound, result.nodes[j], result.optimal[j] = shared.run(errors, given, node_limit)
        before, after = (error @ G @ error for error in (errors[np.arange(m), codes] for codes in (given, found)))
        result.codes[j], result.objective[j] = (found, after) if after < before else (given, before)
        result.bound[j] = min(max(bound, 0.0), result.objective[j])
    return result


class _Search:
    """What the columns share: G without its dead rows and scaled to a unit diagonal, and the inverse of that."""

    def __init__(self, G: Float64) -> None:
        self.live = np.flatnonzero(G.diagonal() > 0)
        self.size = np.sqrt(G.diagonal()[self.live])
        scaled = G[np.ix_(self.live, self.live)] / self.size[:, None] / self.size
        self.G = (scaled + scaled.T) / 2
        factor, self.jitter = _cholesky(self.G, 0.0)
        half = scipy.linalg.solve_triangular(factor, np.eye(len(factor)), lower=True)
        self.inverse = half.T @ half

    def run(self, errors: Float64, codes: Int64, node_limit: int) -> tuple[Int64, float, int, bool]:
        """Best codes found, a lower bound, the nodes visited, and whether the search came to its end."""
        errors = errors[self.live] * self.size[:, None]
        order = _order(self.inverse.copy(), errors)
        # The factor of the reversed matrix, reversed: lower.T @ lower = G with its rows in order.
        factor, jitter = _cholesky(self.G[np.ix_(order, order)][::-1, ::-1], self.jitter)
        lower = factor.T[::-1, ::-1]
        pivots, feedback = lower.diagonal() ** 2, np.ascontiguousarray((lower / lower.diagonal()[:, None]).T)
        best = codes[self.live][order]
        objective = float(np.sum((lower @ errors[order, best]) ** 2))
        radius, bound, nodes = _prove(errors[order], pivots, feedback, objective, node_limit, best)
        found = codes.copy()
        found[self.live[order]] = best
        return found, bound - self.doubt(errors, objective, jitter), nodes, bound >= radius

    def doubt(self, errors: Float64, objective: float, jitter: float) -> float:
        """Bound on how far above its true objective the search may have put the optimum.

        The jitter does so, and the backward errors of Cholesky (Higham, Accuracy and Stability of Numerical Algorithms,
        theorem 10.3) and of the sums: together less than 8 (m + 2) EPS (sum_i sqrt(G_ii) |e_i|)**2. An |e_i| is within
        the grid's reach and ``sqrt(objective * inverse_ii)``: twice that, if the inverse is sure to a factor of two.
        """
        m = len(errors)
        reach = np.abs(errors[:, [0, -1]]).max(axis=1)
        if m * m * EPS * self.inverse.trace() < 0.25:
            sphere = objective + self.jitter * float(reach @ reach)
            reach = np.minimum(reach, 2 * np.sqrt(sphere * self.inverse.diagonal()))
        return jitter * float(reach @ reach) + 8 * (m + 2) * EPS * float(reach.sum()) ** 2


def _cholesky(G: Float64, jitter: float) -> tuple[Array, float]:
    """Lower Cholesky factor of `G`, its diagonal 1, plus the least jitter from `jitter` on with which there is one."""
    while jitter < 4 * len(G):  # with m on the diagonal, entries of at most 1 beside it cannot fail
        try:
            return np.linalg.cholesky(G + jitter * np.eye(len(G))), jitter
        except np.linalg.LinAlgError:
            jitter = max(4 * jitter, len(G) * EPS)
    raise checks.InputError(
        "`G` must be positive semidefinite, as a Gram matrix is, got one with G[i, k]**2 > G[i, i] * G[k, k]."
    )


def _prove(
    errors: Float64, pivots: Float64, feedback: Float64, objective: float, node_limit: int, best: Int64
) -> tuple[float, float, int]:
    """Search the sphere of the given codes; if the limit cuts that off, spheres from small to large for a bound.

    The open nodes left are too near the root to bound much; an empty sphere bounds by its radius, cheap if it is small.
    """
    radius, bound, nodes = _search(errors, pivots, feedback, objective * (1 - TOLERANCE), node_limit, best)
    trial, left = radius * SMALLEST, node_limit
    while bound < radius and left > 0:
        found, proven, visited = _search(errors, pivots, feedback, trial, left, best)
        radius = found if found < trial else radius
        bound = max(bound, proven)
        trial, left, nodes = min(max(trial, bound) * GROWTH, radius), left - max(visited, 1), nodes + visited
    return radius, bound, nodes


@jit
def _under(errors: Float64, offset: float) -> int:
    """Last code whose error plus `offset` is not negative, or 0; `errors` fall with the code, in about equal steps."""
    top = errors.shape[0] - 1
    step = max((errors[0] - errors[top]) / top, 1e-300)
    code = int(min(max((errors[0] + offset) / step, 0.0), top))
    while code > 0 and errors[code] + offset < 0:
        code -= 1
    while code < top and errors[code + 1] + offset >= 0:
        code += 1
    return code


@jit
def _nearer(errors: Float64, offset: float, below: int, above: int) -> int:
    """Return the better of two codes, -1 if both lie outside."""
    if above < errors.shape[0] and (below < 0 or abs(errors[above] + offset) <= abs(errors[below] + offset)):
        return above
    return below


@jit
def _order(inverse: Float64, errors: Float64) -> Int64:
    """Rows in the order of their visit; `inverse` (m, m) of G is used up."""
    m = len(errors)
    order, offsets, left = np.zeros(m, np.int64), np.zeros(m), np.ones(m, np.bool_)
    for place in range(m):
        most, move = -1.0, 0.0
        for i in np.flatnonzero(left):
            under = _under(errors[i], offsets[i])
            code = _nearer(errors[i], offsets[i], under, under + 1)
            second = errors[i, _nearer(errors[i], offsets[i], code - 1, code + 1)] + offsets[i]
            cost = second * second / max(inverse[i, i], 1.0)  # G's diagonal being 1, it is below 1 by rounding only
            if cost > most:
                most, move, order[place] = cost, errors[i, code] + offsets[i], i
        i = order[place]
        left[i] = False
        share = inverse[i] / max(inverse[i, i], 1.0)
        offsets -= share * move
        for k in np.flatnonzero(left):
            inverse[k] -= share[k] * inverse[i]
    return order


@jit
def _search(
    errors: Float64, pivots: Float64, feedback: Float64, radius: float, node_limit: int, best: Int64
) -> tuple[float, float, int]:
    """Search all codes with an objective below `radius`: its last value, a lower bound and the nodes visited.

    `errors` (m, levels), `pivots` D (m,) and `feedback` Lᵀ (m, m) are in the order of the visit. `best` (m,) gets the
    best codes, if there are any; `radius` is then their objective less `TOLERANCE`. After a complete search the bound
    reaches the radius. Past the limit, the way back to the root meets the open nodes: all codes not seen lie below.
    """
    m = errors.shape[0]
    path, below, spent, offsets = np.zeros(m, np.int64), np.zeros(m, np.int64), np.zeros(m), np.zeros((m, m))
    below[0] = _under(errors[0], 0.0)
    above = below + 1
    level, nodes, bound = 0, 0, np.inf
    while level >= 0:
        offset = offsets[level, level]
        code = _nearer(errors[level], offset, below[level], above[level])
        objective = spent[level] + pivots[level] * (errors[level, code] + offset) ** 2 if code >= 0 else np.inf
        if objective >= radius or nodes == node_limit:
            bound = min(bound, objective)  # holds for the siblings that follow, too: they are farther off
            level -= 1
            continue
        nodes += 1
        path[level] = code
        above[level] += code == above[level]
        below[level] -= code == below[level]
        if level == m - 1:
            best[:] = path
            radius = objective * (1 - TOLERANCE)
            bound = min(bound, radius)
            continue
        for k in range(level + 1, m):
            offsets[level + 1, k] = offsets[level, k] + feedback[level, k] * errors[level, code]
        level += 1
        spent[level] = objective
        below[level] = _under(errors[level], offsets[level, level])
        above[level] = below[level] + 1
    return radius, bound, nodes
