"""The order in which a sweep or a pass visits the rows of a column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import kernels

Float64 = npt.NDArray[np.float64]
#: Float32 or float64.
Real = npt.NDArray[Any]

#: Rows that are eliminated between two products.
BLOCK = 64
#: Share of the mean diagonal that is added to `G` before it is eliminated: below it pivots are rounding errors.
JITTER = 1e-6


def greedy(W: npt.NDArray[np.float32], diagonal: Real) -> npt.NDArray[np.int32]:
    """Each column's own order, descending sqrt(G_ii) |w_ij| of the original weights: the paper's, section III-B.

    `W` (k c, m) has a row for each column of k problems, `diagonal` (k, m) is that of their `G`.
    """
    # Sorting numbers is far faster than finding their order: the last bits of each make room for its place. The bits of
    # positive float64 are in their order, and those of one that differs by less are as good as equal.
    sizes = np.empty(W.shape)
    keys, room = sizes.view(np.uint64), np.uint64(2 ** (W.shape[1] - 1).bit_length() - 1)
    kernels.greedy_keys(W, np.sqrt(diagonal, dtype=np.float64), room, sizes, keys)
    keys.sort(axis=1)
    keys &= room
    return keys.astype(np.int32)


def shared(G: Real) -> npt.NDArray[np.intp]:
    """One order for all columns, descending G_ii."""
    return descending(np.diagonal(G, axis1=1, axis2=2))


def descending(diagonal: Real) -> npt.NDArray[np.intp]:
    """Rows (b, m) by descending diagonal entry."""
    return np.argsort(-diagonal, axis=1, kind="stable")


def cyclic(G: Real) -> npt.NDArray[np.intp]:
    """One order for all columns, first row to last."""
    return np.arange(G.shape[1])[None].repeat(len(G), axis=0)


def pivoted(G: Real) -> npt.NDArray[np.intp]:
    """One order for all columns: last the row with the least diagonal entry, and so on in what eliminating it leaves.

    The last row's pivot in `feedback` is its diagonal entry, and an earlier one's what the later ones leave of its own:
    the order takes each as small as it can be, from the last on, so the rows that are visited first, whose errors the
    others make up for, get large ones. It is that of sorted QR decomposition (D. Wübben et al., "Efficient algorithm
    for decoding layered space-time codes", Electronics Letters 37, 2001).
    """
    return np.stack([_pivoted(one.astype(np.float64)) for one in G])


def _pivoted(left: Float64) -> npt.NDArray[np.intp]:
    alive = left.diagonal() > 0
    left[np.diag_indices_from(left)] += JITTER * left.diagonal()[alive].mean() if alive.any() else 1.0
    rows, placed = np.arange(len(left)), []
    while rows.size:
        chosen, factor = _least_pivots(left, BLOCK)
        placed.append(rows[chosen])
        others = np.delete(np.arange(len(rows)), chosen)
        factor = factor[:, others]
        left = left[np.ix_(others, others)] - factor.T @ factor
        rows = rows[others]
    return np.concatenate(placed)[::-1]


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


#: Orders that all columns share: functions of G (b, m, m) that return (b, m).
ORDERS: dict[str, Callable[[Real], npt.NDArray[np.intp]]] = {"shared": shared, "cyclic": cyclic, "pivoted": pivoted}
