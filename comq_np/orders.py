"""The order in which a sweep visits the rows of a column."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Order = Callable[[npt.NDArray[np.float32], npt.NDArray[np.float64]], npt.NDArray[np.int32]]


def greedy(W: npt.NDArray[np.float32], diagonal: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """Each column's own order, descending sqrt(G_ii) |w_ij| of the original weights: the paper's, section III-B."""
    return np.argsort(-np.sqrt(diagonal) * np.abs(W), axis=1, kind="stable").astype(np.int32)


def shared(W: npt.NDArray[np.float32], diagonal: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:  # noqa: ARG001
    """One order for all columns, descending G_ii."""
    return np.argsort(-diagonal, kind="stable").astype(np.int32)[None]


def cyclic(W: npt.NDArray[np.float32], diagonal: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:  # noqa: ARG001
    """One order for all columns, first row to last."""
    return np.arange(diagonal.size, dtype=np.int32)[None]


#: Functions of W (n, m), a row for each output channel, and diag G (m,); they return (n, m) or, for all alike, (1, m).
ORDERS: dict[str, Order] = {"greedy": greedy, "shared": shared, "cyclic": cyclic}
