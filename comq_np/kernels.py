"""The numba kernels: every scalar rule and every compiled loop, and nothing else.

All of them live in this one file because numba's disk cache is keyed on the file of the function that is
called and goes stale when a function inlined into it lives elsewhere. They take C-contiguous arrays, a row
for each output channel (so `W` is the transpose of the one that users pass), fill arrays that the caller
allocated, release the interpreter's lock and keep no state, so any number of threads may run them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

Function = TypeVar("Function", bound=Callable[..., Any])

#: Adding and subtracting 1.5 * 2**23 rounds a float32 between -2**22 and 2**22 to the nearest integer, ties to even.
ROUNDER = np.float32(12582912.0)
ZERO = np.float32(0.0)
#: Price of a step that is forbidden.
NEVER = np.float32(np.inf)
#: Entries that the search for the least looks at together.
BLOCK = 64
#: One more than the moves of a tabu search that a code rests after its own, at most.
LONGEST_REST = 16


def jit(function: Function) -> Function:
    """Compile `function`, cached on disk where numba finds a folder that it can write."""
    # `nnan` lets minima vectorise; no kernel meets a NaN, and no sum is reordered.
    njit: Any = functools.partial(numba.njit, nogil=True, fastmath={"nnan"})
    try:
        compiled: Function = njit(cache=True)(function)
    except RuntimeError:  # no such folder: compile in every process instead of refusing to work
        compiled = njit()(function)
    return compiled


@jit
def nearest_code(target: np.float32, top: np.float32) -> np.float32:
    """Nearest code to a real `target`, from 0 to `top`."""
    return (min(max(target, ZERO), top) + ROUNDER) - ROUNDER


@jit
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
    objective: npt.NDArray[np.float64],
) -> None:
    """Visit every coordinate of every column once and set it to its best code.

    `codes` (n, m), real at first, `residual` (n, m) = (W - Wq) G and `objective` (n,) are updated in place; `order`
    (1, m) or (n, m) holds the rows in the order of their visit; `changed` (n,) gets the number of codes that end
    elsewhere than plain rounding of `codes` would put them. Only a change costs more than one step.
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
                objective[j] += np.float64(move) * (np.float64(move) * G[i, i] - 2.0 * np.float64(residual[j, i]))
                for k in range(rows.shape[0]):
                    residual[j, k] -= move * G[i, k]


@jit
def pass_panel(
    W: npt.NDArray[np.float32],
    targets: npt.NDArray[np.float32],
    feedback: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.number[Any]],
    group: npt.NDArray[np.int32],
    top: np.float32,
    codes: npt.NDArray[np.float32],
    error: npt.NDArray[np.float32],
) -> None:
    """Round the rows of one panel in turn, each after the feedback of the errors before it (Babai's nearest plane).

    All arrays (n, rows) hold a panel of rows in the order of their visit. `targets` comes with the feedback of earlier
    panels and gets that of this one; ``feedback[k, i]`` is what the error of row k adds to the target of row i;
    `group` (rows,) is the group of each row. `codes` and `error` = W - Wq are filled.
    """
    for j in range(W.shape[0]):
        for i in range(W.shape[1]):
            step, offset = scale[j, group[i]], zero_point[j, group[i]]
            code = nearest_code(np.float32(np.float64(targets[j, i]) / step + offset), top)
            codes[j, i] = code
            error[j, i] = W[j, i] - step * np.float32(np.float64(code) - offset)
            for k in range(W.shape[1]):  # from 0, where the feedback is zero: else numba does not vectorise it
                targets[j, k] += feedback[i, k] * error[j, i]


@jit
def paths_panel(
    W: npt.NDArray[np.float32],
    targets: npt.NDArray[np.float32],
    feedback: npt.NDArray[np.float32],
    pivots: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.number[Any]],
    group: npt.NDArray[np.int32],
    top: np.float32,
    price: npt.NDArray[np.float64],
    origin: npt.NDArray[np.int64],
    codes: npt.NDArray[np.float32],
    error: npt.NDArray[np.float32],
) -> None:
    """Round the rows of one panel in turn, in the ways that cost the least so far: the K-best, or M-, algorithm.

    Like `pass_panel` for several paths a column: `targets`, `codes` and `error` are (n, paths, rows). `price` (n,
    paths), infinite where there is no path yet, grows by ``pivots[i] * (target - Wq)**2``; every row leaves the
    cheapest paths, the cheapest first, and `origin` (n, paths) is filled with what they were before the panel.
    """
    paths, rows = targets.shape[1:]
    now, after = np.empty((paths, rows), np.float32), np.empty((paths, rows), np.float32)
    parent, chosen = np.empty((rows, paths), np.int64), np.empty((rows, paths), np.float32)
    left = np.empty((rows, paths), np.float32)
    wanted, offer, paid = np.empty(paths), np.empty(paths), np.empty(paths)
    code, below, above = np.empty(paths, np.float32), np.empty(paths, np.float32), np.empty(paths, np.float32)
    for j in range(W.shape[0]):
        now[:] = targets[j]
        for i in range(rows):
            step, offset = scale[j, group[i]], zero_point[j, group[i]]
            unit = pivots[i] * np.float64(step) * np.float64(step)
            for p in range(paths):
                wanted[p] = np.float64(now[p, i]) / step + offset
                code[p] = nearest_code(np.float32(wanted[p]), top)
                below[p], above[p] = code[p] - np.float32(1.0), code[p] + np.float32(1.0)
                offer[p] = price[j, p] + unit * (wanted[p] - code[p]) ** 2
            for p in range(paths):
                least, best = np.inf, 0
                for other in range(paths):
                    least = min(least, offer[other])
                while offer[best] > least:
                    best += 1
                parent[i, p], chosen[i, p], paid[p] = best, code[best], offer[best]
                miss = W[j, i] - step * np.float32(np.float64(code[best]) - offset)
                left[i, p] = miss
                for k in range(rows):  # from 0, as above
                    after[p, k] = now[best, k] + feedback[i, k] * miss
                # That path's next offer is its next nearest code; of a dead row, no code is worth another path.
                code[best] = nearer(wanted[best], below[best], above[best], top)
                above[best] += code[best] == above[best]
                below[best] -= code[best] == below[best]
                offer[best] = price[j, best] + unit * (wanted[best] - code[best]) ** 2
                if unit == 0 or code[best] < ZERO:
                    offer[best] = np.inf
            price[j] = paid
            now, after = after, now
        trace(parent, chosen, left, codes[j], error[j], origin[j])


@jit
def nearer(target: float, below: np.float32, above: np.float32, top: np.float32) -> np.float32:
    """Nearer to a real `target` of two codes, negative if both lie outside of 0 to `top`."""
    if above <= top and (below < ZERO or above - target <= target - below):
        return above
    return below


@jit
def trace(
    parent: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.float32],
    left: npt.NDArray[np.float32],
    codes: npt.NDArray[np.float32],
    error: npt.NDArray[np.float32],
    origin: npt.NDArray[np.int64],
) -> None:
    """Follow the paths of a column back through a panel: of each, its `codes` and `error` (paths, rows) and `origin`.

    `parent`, `chosen` and `left` (rows, paths) hold for each row and path the path before it, its code and its error.
    """
    for p in range(parent.shape[1]):
        path = p
        for i in range(parent.shape[0] - 1, -1, -1):
            codes[p, i], error[p, i] = chosen[i, path], left[i, path]
            path = parent[i, path]
        origin[p] = path


@jit
def grid_errors(
    W: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.float32],
    group_size: int,
    top: np.float32,
    errors: npt.NDArray[np.float32],
) -> None:
    """Weighted squared rounding error of each group of `W` (n, m) on each of its candidate grids.

    `scale`, `zero_point` and `errors` are (n, groups, candidates). The errors are in units of the squared scale, so
    that weights of any size neither overflow nor vanish. The innermost loop runs over candidates, each with a sum of
    its own, so it vectorises without reordering any sum.
    """
    errors[:] = ZERO
    for j in range(W.shape[0]):
        for i in range(W.shape[1]):
            g = i // group_size
            for s in range(scale.shape[2]):
                value, offset = W[j, i] / scale[j, g, s], zero_point[j, g, s]
                error = value - (nearest_code(value + offset, top) - offset)
                errors[j, g, s] += weight[i] * error * error


@jit
def step_cost(curvature: np.float32, pull: np.float32, up: np.float32, down: np.float32) -> np.float32:
    """What the cheaper step of a code, up or down by one, adds to the objective; `up`, `down` are 0 or forbid it."""
    return min(curvature - pull + up, curvature + pull + down)


@jit
def cheapest(cost: npt.NDArray[np.float32]) -> int:
    """Index of the least of `cost`: of the block with the least first, so that the search for it vectorises."""
    best, block = NEVER, 0
    for start in range(0, cost.shape[0], BLOCK):
        least = NEVER
        for i in range(start, min(start + BLOCK, cost.shape[0])):
            least = min(least, cost[i])
        if least < best:
            best, block = least, start
    for i in range(block, min(block + BLOCK, cost.shape[0])):
        if cost[i] == best:
            return i
    return 0


@jit
def tabu_search(
    codes: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32],
    G: npt.NDArray[np.float32],
    alive: npt.NDArray[np.bool_],
    step: npt.NDArray[np.float32],
    top: np.float32,
    moves: int,
) -> None:
    """Leave the local minimum of every column: make the cheapest step of one code, even uphill; keep the best found.

    A code that has just moved rests for some moves, which leads away from the minimum. `step` (n, m) is the scale of
    each row and `alive` (m,) says which rows matter. `codes` (n, m) end as the best found; `residual` is used up.
    """
    m, live = codes.shape[1], 0
    for i in range(m):
        live += alive[i]
    curvature, slope = np.empty(m, np.float32), np.empty(m, np.float32)
    up, down, cost = np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m, np.float32)
    shortest, longest = min(5, max(1, live // 4)), min(LONGEST_REST, live // 2 + 2)
    resting = np.empty(LONGEST_REST, np.int64)
    for j in range(codes.shape[0]):
        unit = step[j].max()  # prices in its square neither overflow nor vanish
        for i in range(m):
            size = step[j, i] / unit
            residual[j, i] /= unit
            curvature[i] = size * size * G[i, i]
            slope[i] = np.float32(2.0) * size
            up[i] = ZERO if alive[i] and codes[j, i] < top else NEVER
            down[i] = ZERO if alive[i] and codes[j, i] > ZERO else NEVER
            cost[i] = step_cost(curvature[i], slope[i] * residual[j, i], up[i], down[i])
        best_codes = codes[j].copy()
        resting[:] = -1
        now, best, state = 0.0, 0.0, 1  # the same pseudo-random rests for every column
        for t in range(moves):
            i = cheapest(cost)
            if not cost[i] < NEVER:
                break
            now += np.float64(cost[i])
            rises = curvature[i] - slope[i] * residual[j, i] + up[i] <= cost[i]
            change = np.float32(1.0) if rises else np.float32(-1.0)
            codes[j, i] += change
            # The length of the rest varies from move to move, lest the search runs in circles.
            rested = resting[t % LONGEST_REST]
            if rested >= 0:
                up[rested] = ZERO if codes[j, rested] < top else NEVER
                down[rested] = ZERO if codes[j, rested] > ZERO else NEVER
            up[i], down[i] = NEVER, NEVER
            resting[t % LONGEST_REST] = -1
            state = (state * 1103515245 + 12345) % 2147483648
            due = (t + shortest + (state >> 16) % (longest - shortest)) % LONGEST_REST
            while resting[due] >= 0:
                due = (due + 1) % LONGEST_REST
            resting[due] = i
            move = step[j, i] / unit * change
            for k in range(m):
                residual[j, k] -= move * G[i, k]
                cost[k] = step_cost(curvature[k], slope[k] * residual[j, k], up[k], down[k])
            if now < best:
                best = now
                best_codes[:] = codes[j]
        codes[j] = best_codes
