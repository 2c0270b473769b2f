"""The numba kernels: every scalar rule and every compiled loop, and nothing else.

All of them live in this one file because numba's disk cache is keyed on the file of the function that is
called and goes stale when a function inlined into it lives elsewhere. They take C-contiguous arrays, a row
for each output channel (so `W` is the transpose of the one that users pass), fill arrays that the caller
allocated, release the interpreter's lock and keep no state, so any number of threads may run them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

Function = TypeVar("Function", bound=Callable[..., Any])

#: Adding and subtracting 1.5 * 2**23 rounds a float32 between -2**22 and 2**22 to the nearest integer, ties to even.
ROUNDER = np.float32(12582912.0)
ZERO = np.float32(0.0)


def _jit(function: Function) -> Function:
    """Compile `function`, cached on disk where numba finds a folder that it can write."""
    jit: Any = numba.njit
    try:
        compiled: Function = jit(nogil=True, cache=True)(function)
    except RuntimeError:  # no such folder: compile in every process instead of refusing to work
        compiled = jit(nogil=True)(function)
    return compiled


@_jit
def nearest_code(target: np.float32, top: np.float32) -> np.float32:
    """Nearest code to a real `target`, from 0 to `top`."""
    return (min(max(target, ZERO), top) + ROUNDER) - ROUNDER


@_jit
def round_codes(codes: npt.NDArray[np.float32], top: np.float32) -> None:
    """Replace real `codes` (n, m) by the nearest integer ones."""
    for j in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            codes[j, i] = nearest_code(codes[j, i], top)


@_jit
def sweep(
    codes: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32],
    G: npt.NDArray[np.float32],
    inverse_diagonal: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    order: npt.NDArray[np.int32],
    group_size: int,
    top: np.float32,
    changed: npt.NDArray[np.int64],
) -> None:
    """Visit every coordinate of every column once and set it to its best code.

    `codes` (n, m), real at first, and `residual` (n, m) = (W - Wq) G are updated in place; `order` (1, m) or (n, m)
    holds the rows in the order of their visit; `changed` (n,) gets the number of codes that end elsewhere than
    plain rounding of `codes` would put them.
    """
    for j in range(codes.shape[0]):
        rows = order[j % order.shape[0]]
        changed[j] = 0
        for p in range(rows.shape[0]):
            i = rows[p]
            step = scale[j, i // group_size]
            old = codes[j, i]
            new = nearest_code(old + residual[j, i] * inverse_diagonal[i] / step, top)
            if new != old:
                changed[j] += new != nearest_code(old, top)
                codes[j, i] = new
                move = step * (new - old)
                for k in range(rows.shape[0]):
                    residual[j, k] -= move * G[i, k]


@_jit
def shrink_errors(
    W: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.int32],
    group_size: int,
    factors: npt.NDArray[np.float32],
    top: np.float32,
    errors: npt.NDArray[np.float64],
) -> None:
    """Weighted squared rounding error of each group of `W` (n, m) with its scale times each of `factors`.

    `errors` (n, groups, factors) must hold zeros; they are in units of the squared step, so that weights of any size
    neither overflow nor vanish. The innermost loop runs over factors, each with a sum of its own, so it vectorises
    without reordering any sum.
    """
    for j in range(W.shape[0]):
        for i in range(W.shape[1]):
            g = i // group_size
            offset = np.float32(zero_point[j, g])
            for s in range(factors.shape[0]):
                target = W[j, i] / (scale[j, g] * factors[s]) + offset
                error = target - nearest_code(target, top)
                errors[j, g, s] += weight[i] * error * error
