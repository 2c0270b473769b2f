"""The order in which a sweep or a pass visits the rows of a column."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Order = Callable[[npt.NDArray[np.float32], Float64], npt.NDArray[np.int32]]

#: Rows that are eliminated between two products.
BLOCK = 64
#: Share of the mean diagonal that is added to `G` before it is eliminated: below it pivots are rounding errors.
JITTER = 1e-6


def greedy(W: npt.NDArray[np.float32], G: Float64) -> npt.NDArray[np.int32]:
    """Each column's own order, descending sqrt(G_ii) |w_ij| of the original weights: the paper's, section III-B."""
    return np.argsort(-np.sqrt(G.diagonal()) * np.abs(W), axis=1, kind="stable").astype(np.int32)


def shared(W: npt.NDArray[np.float32], G: Float64) -> npt.NDArray[np.int32]:  # noqa: ARG001
    """One order for all columns, descending G_ii."""
    return np.argsort(-G.diagonal(), kind="stable").astype(np.int32)[None]


def cyclic(W: npt.NDArray[np.float32], G: Float64) -> npt.NDArray[np.int32]:  # noqa: ARG001
    """One order for all columns, first row to last."""
    return np.arange(len(G), dtype=np.int32)[None]


def pivoted(W: npt.NDArray[np.float32], G: Float64) -> npt.NDArray[np.int32]:  # noqa: ARG001
    """One order for all columns: last the row with the least diagonal entry, and so on in what eliminating it leaves.

    The last row's pivot in `feedback` is its diagonal entry, and an earlier one's what the later ones leave of its own:
    the order takes each as small as it can be, from the last on, so the rows that are visited first, whose errors the
    others make up for, get large ones. It is that of sorted QR decomposition (D. Wübben et al., "Efficient algorithm
    for decoding layered space-time codes", Electronics Letters 37, 2001).
    """
    alive = G.diagonal() > 0
    left = G.copy()
    left[np.diag_indices_from(left)] += JITTER * left.diagonal()[alive].mean() if alive.any() else 1.0
    rows, placed = np.arange(len(G), dtype=np.int32), []
    while rows.size:
        chosen, factor = _least_pivots(left, BLOCK)
        placed.append(rows[chosen])
        others = np.delete(np.arange(len(rows)), chosen)
        factor = factor[:, others]
        left = left[np.ix_(others, others)] - factor.T @ factor
        rows = rows[others]
    return np.concatenate(placed)[None, ::-1].copy()


def _least_pivots(G: Float64, most: int) -> tuple[list[int], Float64]:
    """Rows with the least pivots, each of what the ones before leave of `G`, and their rows of its Cholesky factor."""
    pivots, chosen = G.diagonal().copy(), []
    factor = np.zeros((min(most, len(G)), len(G)))
    for k in range(len(factor)):
        i = int(pivots.argmin())
        if pivots[i] > 0:  # else a rounding error of a row that depends on others
            factor[k] = (G[i] - factor[:k, i] @ factor[:k]) / np.sqrt(pivots[i])
            pivots -= factor[k] ** 2
        pivots[i] = np.inf
        chosen.append(i)
    return chosen, factor


#: Functions of W (n, m), a row for each output channel, and G (m, m); they return (n, m) or, for all alike, (1, m).
ORDERS: dict[str, Order] = {"greedy": greedy, "shared": shared, "cyclic": cyclic, "pivoted": pivoted}
