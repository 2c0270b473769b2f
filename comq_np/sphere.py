"""The kernels of the sphere decoder that `exact` describes.

They see G scaled to a unit diagonal, and a table of the errors of one column in that scale: `errors` (m, levels) holds
what each code of each row leaves of its weight. Dead rows are in no order, and their errors count as zero. Like those
of `kernels.py` they release the interpreter's lock and keep no state, and call none from other files.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from comq_np.kernels import jit

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

#: Codes that are better by less than this share of the objective are not looked for.
TOLERANCE = 1e-9
#: Where the limit cuts a search off, smaller spheres give the bound: the first one's objective, and how fast it grows.
SMALLEST, GROWTH, EPS = 1 / 256, 1.2, float(np.finfo(np.float64).eps)
#: What codes stand for is held within these; codes that stand for more are no good anyway.
LARGEST, LARGEST_SINGLE = float(np.finfo(np.float64).max), float(np.finfo(np.float32).max)


@jit
def search(
    grid: Float64,
    G: Float64,
    size: Float64,
    levels: int,
    single: bool,
    node_limit: int,
    codes: Int64,
    objective: Float64,
    bound: Float64,
    nodes: Int64,
    optimal: npt.NDArray[np.bool_],
) -> bool:
    """Improve `codes` (b, n, m) and fill the last four (b, n); return whether every G is positive semidefinite.

    `grid` (b, n, m, 3) holds weights, scales and zero points. Each of `G` (b, m, m) has been scaled to a unit diagonal,
    by `size` (b, m), 0 for a dead row. With `single`, what a code stands for is rounded to float32.
    """
    n, m = codes.shape[1:]
    errors, factor, inverse = np.zeros((m, levels)), np.zeros((m, m)), np.zeros((m, m))
    for p in range(len(codes)):
        gram, live = G[p], np.flatnonzero(size[p])
        if len(live) == 0:  # nothing reaches the output
            continue
        jitter = _factor(gram, live, 0.0, factor)
        if jitter < 0:
            return False
        _invert(factor, live, inverse)
        for j in range(n):
            given = codes[p, j]
            best = given.copy()
            _tabulate(grid[p, j], size[p], single, errors)
            order = _order(inverse.copy(), errors, live)
            raised = _factor(gram, order, jitter, factor)
            if raised < 0:
                return False
            start = _spent(errors, factor, order, best)
            radius, proven, nodes[p, j] = _prove(errors, factor, order, start, node_limit, best)
            optimal[p, j] = proven >= radius
            before, after = _objective(gram, errors, given), _objective(gram, errors, best)
            objective[p, j] = min(before, after)
            if after < before:
                for i in range(m):
                    given[i] = best[i]
            proven -= _doubt(errors, inverse, live, start, jitter, raised)
            bound[p, j] = min(max(proven, 0.0), objective[p, j])
    return True


@jit
def _tabulate(grid: Float64, size: Float64, single: bool, errors: Float64) -> None:
    """Fill the table of one column: its weights less what the codes stand for, rounded as `grid.decode` rounds it."""
    for i in range(errors.shape[0]):
        weight, scale, zero_point = grid[i, 0], grid[i, 1], grid[i, 2]
        for code in range(errors.shape[1]):
            if single:
                value = min(max(scale * np.float64(np.float32(code - zero_point)), -LARGEST_SINGLE), LARGEST_SINGLE)
                errors[i, code] = size[i] * (weight - np.float64(np.float32(value)))
            else:
                value = min(max(scale * (code - zero_point), -LARGEST), LARGEST)
                errors[i, code] = size[i] * (weight - value)


@jit
def _objective(G: Float64, errors: Float64, codes: Int64) -> float:
    """Objective of some codes from G itself, whatever the jitter of its factor."""
    total = 0.0
    for i in range(len(G)):
        for k in range(len(G)):
            total += errors[i, codes[i]] * G[i, k] * errors[k, codes[k]]
    return total


@jit
def _factor(G: Float64, order: Int64, jitter: float, factor: Float64) -> float:
    """Factor Lᵀ D L of `G` in `order`, plus the least jitter from `jitter` on with which there is one: that, or -1.

    `factor` gets D on its diagonal and Lᵀ, what the error of each row feeds to those after it, above.
    """
    m = len(order)
    while jitter < 4 * m:  # with m on the diagonal, entries of at most 1 beside it cannot fail
        for a in range(m):
            for b in range(a):
                factor[a, b] = G[order[a], order[b]]
            factor[a, a] = G[order[a], order[a]] + jitter
        left = m
        while left > 0 and factor[left - 1, left - 1] > 0:  # from the last row on; what is left of G lies below
            left -= 1
            for a in range(left):
                share = factor[left, a] / factor[left, left]
                factor[a, left] = share
                for b in range(a + 1):
                    factor[a, b] -= share * factor[left, b]
        if left == 0:
            return jitter
        jitter = max(4 * jitter, m * EPS)
    return -1.0


@jit
def _invert(factor: Float64, rows: Int64, inverse: Float64) -> None:
    """Fill the `rows` of `inverse` with the inverse of Lᵀ D L."""
    m = len(rows)
    half = np.zeros((m, m))  # the inverse of L
    for i in range(m):
        half[i, i] = 1.0
        for k in range(i):
            for c in range(k + 1):
                half[i, c] -= factor[k, i] * half[k, c]
    for a in range(m):
        for b in range(a + 1):
            total = 0.0
            for i in range(b + 1):
                total += half[a, i] * half[b, i] / factor[i, i]
            inverse[rows[a], rows[b]] = inverse[rows[b], rows[a]] = total


@jit
def _spent(errors: Float64, factor: Float64, order: Int64, codes: Int64) -> float:
    """Objective of some codes as the search sums it, from the factor."""
    total = 0.0
    for b in range(len(order)):
        error = errors[order[b], codes[order[b]]]
        for a in range(b):
            error += factor[a, b] * errors[order[a], codes[order[a]]]
        total += factor[b, b] * error * error
    return total


@jit
def _doubt(errors: Float64, inverse: Float64, live: Int64, objective: float, shared: float, jitter: float) -> float:
    """Bound on how far above its true objective the search may have put the optimum.

    The jitter does so, and the backward errors of the factor (Higham, Accuracy and Stability of Numerical Algorithms,
    theorem 10.3) and of the sums: together less than 8 (m + 2) EPS (sum_i sqrt(G_ii) |e_i|)**2. An |e_i| is within
    the grid's reach and ``sqrt(objective * inverse_ii)``: twice that, if the inverse, that of G with the `shared`
    jitter, is sure to a factor of two.
    """
    m, top = len(live), errors.shape[1] - 1
    reach, trace, square = np.zeros(m), 0.0, 0.0
    for a in range(m):
        reach[a] = max(abs(errors[live[a], 0]), abs(errors[live[a], top]))
        square += reach[a] * reach[a]
        trace += inverse[live[a], live[a]]
    sphere = objective + shared * square if m * m * EPS * trace < 0.25 else np.inf
    total, square = 0.0, 0.0
    for a in range(m):
        nearer = min(reach[a], 2 * math.sqrt(sphere * inverse[live[a], live[a]]))
        total += nearer
        square += nearer * nearer
    return jitter * square + 8 * (m + 2) * EPS * total * total


@jit
def _prove(
    errors: Float64, factor: Float64, order: Int64, objective: float, node_limit: int, best: Int64
) -> tuple[float, float, int]:
    """Search the sphere of the given codes; if the limit cuts that off, spheres from small to large for a bound.

    The open nodes left are too near the root to bound much; an empty sphere bounds by its radius, cheap if it is small.
    """
    radius, bound, nodes = _sphere(errors, factor, order, objective * (1 - TOLERANCE), node_limit, best)
    trial, left = radius * SMALLEST, node_limit
    while bound < radius and left > 0:
        found, proven, visited = _sphere(errors, factor, order, trial, left, best)
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
def _order(inverse: Float64, errors: Float64, live: Int64) -> Int64:
    """Live rows in the order of their visit; `inverse` (m, m) of G is used up."""
    order, offsets = live.copy(), np.zeros(len(inverse))
    for place in range(len(order)):
        most, chosen, move = -1.0, place, 0.0
        for q in range(place, len(order)):
            row, offset, room = errors[order[q]], offsets[order[q]], inverse[order[q], order[q]]
            under = _under(row, offset)
            code = _nearer(row, offset, under, under + 1)
            second = row[_nearer(row, offset, code - 1, code + 1)] + offset
            cost = second * second / max(room, 1.0)  # G's diagonal being 1, it is below 1 by rounding only
            if cost > most:
                most, chosen, move = cost, q, row[code] + offset
        i = order[chosen]
        order[place], order[chosen] = i, order[place]
        for q in range(place + 1, len(order)):
            k = order[q]
            share = inverse[i, k] / max(inverse[i, i], 1.0)
            offsets[k] -= share * move
            for c in range(len(inverse)):
                inverse[k, c] -= share * inverse[i, c]
    return order


@jit
def _sphere(
    errors: Float64, factor: Float64, order: Int64, radius: float, node_limit: int, best: Int64
) -> tuple[float, float, int]:
    """Search all codes with an objective below `radius`: its last value, a lower bound and the nodes visited.

    `best` (m,) gets the best codes, if there are any; `radius` is then their objective less `TOLERANCE`. After a
    complete search the bound reaches the radius. Past the limit, the way back to the root meets the open nodes: all
    codes not seen lie below.
    """
    m = len(order)
    path, below, above = np.empty(m, np.int64), np.empty(m, np.int64), np.empty(m, np.int64)
    spent, offsets = np.zeros(m), np.zeros((m, m))
    below[0] = _under(errors[order[0]], 0.0)
    above[0] = below[0] + 1
    level, nodes, bound = 0, 0, np.inf
    while level >= 0:
        row, offset = errors[order[level]], offsets[level, level]
        code = _nearer(row, offset, below[level], above[level])
        objective = spent[level] + factor[level, level] * (row[code] + offset) ** 2 if code >= 0 else np.inf
        if objective >= radius or nodes == node_limit:
            bound = min(bound, objective)  # holds for the siblings that follow, too: they are farther off
            level -= 1
            continue
        nodes += 1
        path[level] = code
        above[level] += code == above[level]
        below[level] -= code == below[level]
        if level == m - 1:
            for k in range(m):
                best[order[k]] = path[k]
            radius = objective * (1 - TOLERANCE)
            bound = min(bound, radius)
            continue
        for k in range(level + 1, m):
            offsets[level + 1, k] = offsets[level, k] + factor[level, k] * row[code]
        level += 1
        spent[level] = objective
        below[level] = _under(errors[order[level]], offsets[level, level])
        above[level] = below[level] + 1
    return radius, bound, nodes
