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

from comq_np import checks, sphere

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


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
    """Search for the best codes of each column of some problems on its grid, from the given ones.

    Parameters
    ----------
    W, G : ndarray of real, shapes (b, n, m) and (b, m, m)
        Of each problem the weights, a row for each output channel, and the Gram matrix, symmetric and positive
        semidefinite up to rounding.
    codes : ndarray of real, shape (b, n, m)
        Whole numbers from 0 to ``levels - 1``; the better they are, the faster the search.
    scale, zero_point : ndarray of float32 or float64 and of real, shape (b, n, m) or (b, n, 1)
        The grid. What a code stands for is rounded to the type of `scale`: with float32, to what `grid.decode` gives.
    levels, node_limit : int >= 2 and >= 0
        Number of codes; most nodes of a column's search, and again as many for the bound where that is cut off.

    Returns
    -------
    Certificate
        Arrays (b, n, m) and (b, n). The given codes where none are better by more than 1e-9 of the objective, and in
        dead rows.

    Raises
    ------
    InputError
        If a `G` is far from positive semidefinite.

    References
    ----------
    X.-W. Chang, Q. Han, "Solving box-constrained integer least squares problems", IEEE Transactions on Wireless
    Communications 7, 2008; the search is that of C. P. Schnorr, M. Euchner, Mathematical Programming 66, 1994.

    Examples
    --------
    >>> W, G, start = np.array([[[0.4, 0.3]]]), np.array([[[1.0, 0.9], [0.9, 1.0]]]), np.zeros((1, 1, 2), int)
    >>> found = search(W, G, start, np.ones((1, 1, 1)), np.zeros((1, 1, 1)), 2)
    >>> found.codes.tolist(), found.objective.round(3).tolist(), found.optimal.tolist()
    ([[[1, 0]]], [[0.126]], [[True]])
    """
    columns = W.shape[:2]
    objective, bound = np.zeros(columns), np.zeros(columns)
    nodes, optimal = np.zeros(columns, np.int64), np.ones(columns, np.bool_)
    # New arrays, in C order and writeable: one compiled version serves all callers.
    found = np.array(codes, np.int64, order="C")
    grids = np.stack([np.broadcast_to(values, W.shape).astype(np.float64) for values in (W, scale, zero_point)], axis=3)
    scaled, size = _scaled(G.astype(np.float64))
    single = scale.dtype == np.float32
    if not sphere.search(grids, scaled, size, levels, single, node_limit, found, objective, bound, nodes, optimal):
        raise checks.InputError(
            "`G` must be positive semidefinite, as a Gram matrix is, got one with G[i, k]**2 > G[i, i] * G[k, k]."
        )
    return Certificate(found.astype(codes.dtype), objective, bound, nodes, optimal)


def _scaled(G: Float64) -> tuple[Float64, Float64]:
    """Matrices `G` (b, m, m), each scaled to a unit diagonal, and what they are scaled by, (b, m): 0 for dead rows."""
    size = np.sqrt(G.diagonal(axis1=1, axis2=2))
    unit = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    scaled = G * unit[:, :, None] * unit[:, None, :]
    return (scaled + scaled.transpose(0, 2, 1)) / 2, size
