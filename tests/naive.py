"""The oracle: round to nearest and the paper's algorithm from their equations, with loops, in float64.

Slow, plain, and importing nothing from comq_np: what it says is what the solver is judged by. Names follow the paper:
a column of weights ``w`` becomes ``d * q`` with integers ``z <= q <= z + levels - 1``; the solver's codes are ``q - z``
and its zero points ``-z``.

The solver computes in float32, so a decision that sits on the edge between two codes may fall on either side, and
everything after it in that column may differ. Each answer therefore carries a `margin` for every column: how close any
decision that led to it came to such an edge. A column with a margin must be met code for code.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

#: Shrink factors of the "shrunk" grid, the larger first.
FACTORS = [1.0 - 0.6 * step / 24 for step in range(25)]
#: A column whose decisions all keep this distance (in codes) from the edge between two codes must agree exactly.
MARGIN = 1e-4
#: Keys of the greedy order, and errors of two grids, that are this close (relative) may compare either way in float32.
NEAR = 1e-5


@dataclasses.dataclass
class Answer:
    """What a solve must give: shapes as in the solver's result, and for each column its objective and its margin."""

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    objective: np.ndarray
    margin: np.ndarray


def groups_of(m, size):
    """Rows of each group: `size` successive ones, the last group maybe fewer."""
    size = m if size is None or size == "tensor" else size
    return [list(range(first, min(first + size, m))) for first in range(0, m, size)]


def rows_of(values, m, size):
    """Per-group values (groups, n) as one for each row, (m, n)."""
    rows = np.zeros((m, values.shape[1]))
    for g, group in enumerate(groups_of(m, size)):
        rows[group] = values[g]
    return rows


def dequantize(codes, scale, zero_point, size):
    """Apply the one formula, scale * (codes - zero_point), each group's on its rows."""
    Wq = np.zeros(codes.shape)
    for g, rows in enumerate(groups_of(len(codes), size)):
        for i in rows:
            for j in range(codes.shape[1]):
                Wq[i, j] = float(scale[g, j]) * (int(codes[i, j]) - int(zero_point[g, j]))
    return Wq


def objective(W, Wq, G):
    """``e.T @ G @ e`` for every column e of W - Wq, in float64."""
    E = np.asarray(W, dtype=np.float64) - np.asarray(Wq, dtype=np.float64)
    return np.array([e @ np.asarray(G, dtype=np.float64) @ e for e in E.T])


def objective_of(q, W, G):
    """Objective of each column of a result of the solver, by its public `dequantize`."""
    return objective(W.reshape(len(W), -1), q.dequantize().reshape(len(W), -1), G)


def edge(target, low, high):
    """Distance from `target` to the nearest half-integer where the clipped answer would change; inf where none does."""
    below = np.floor(target)
    if np.clip(below, low, high) == np.clip(below + 1, low, high):
        return np.inf
    return abs(target - below - 0.5)


def nearest(target, low, high):
    """Round half to even, then clip."""
    return float(min(max(np.rint(target), low), high))


# Grids: (d, z, margin) of the weights of one group.


def minmax(w, levels, symmetric=False):
    """Span min w to max w; symmetric: with the smallest scale that reaches both ends from z = -(levels // 2)."""
    low, high = float(min(w)), float(max(w))
    if symmetric:
        negative, positive = levels // 2, levels - 1 - levels // 2
        d = max(-low / negative, high / positive if positive else 0.0, 0.0)
        return d or max(-low, high) or 1.0, -negative, np.inf
    if low == high:  # the equations give d = 0; with d = |w| one code is exact, and another is zero
        return abs(low) or 1.0, -1 if low < 0 else 0, np.inf
    d = (high - low) / (levels - 1)
    return d, int(np.rint(low / d)), edge(low / d, -np.inf, np.inf)


def tensor(W, levels):
    """Span the mean over columns of max |w| by half of the levels, signed: the paper's grid for one scale per layer."""
    reach = [max(abs(float(x)) for x in w) for w in np.asarray(W).T]
    return (sum(reach) / len(reach) / (levels // 2)) or 1.0, -(levels // 2), np.inf


def shrink(w, weight, d, z, levels):
    """Scale d times the factor with the least weighted squared rounding error (the larger on a tie), and its margin."""
    errors = []
    for factor in FACTORS:
        step, error = d * factor, 0.0
        for x, g in zip(w, weight, strict=True):
            error += float(g) * (float(x) - step * nearest(float(x) / step, z, z + levels - 1)) ** 2
        errors.append(error)
    best = min(range(len(FACTORS)), key=lambda k: errors[k])
    others = [error for k, error in enumerate(errors) if k != best]
    if len(set(errors)) == 1:
        return d, np.inf
    return d * FACTORS[best], np.inf if min(others) > errors[best] * (1 + NEAR) else 0.0


def grids_of(name, W, G, levels, size, symmetric):
    """(d, z, margin), each (groups, n), of the grid "minmax", "paper" or "shrunk"."""
    W = np.asarray(W, dtype=np.float64)
    parts, n = groups_of(len(W), size), W.shape[1]
    d, z, margin = np.zeros((len(parts), n)), np.zeros((len(parts), n), int), np.zeros((len(parts), n))
    if size == "tensor":
        whole = W.ravel()
        one = tensor(W, levels) if name == "paper" else minmax(whole, levels, symmetric)
        if name == "shrunk":
            weight = np.repeat(np.diag(G), n)
            shrunk, close = shrink(whole, weight, one[0], one[1], levels)
            one = (shrunk, one[1], min(one[2], close))
        d[:], z[:], margin[:] = one
        return d, z, margin
    for (g, rows), j in itertools.product(enumerate(parts), range(n)):
        d[g, j], z[g, j], margin[g, j] = minmax(W[rows, j], levels, symmetric)
        if name == "shrunk":
            d[g, j], close = shrink(W[rows, j], np.diag(G)[rows], d[g, j], z[g, j], levels)
            margin[g, j] = min(margin[g, j], close)
    return d, z, margin


# Orders: the rows as a sweep visits them, and whether two of them came close to changing places.


def rising(values):
    """Least squares fit by numbers that do not fall: neighbours that do are replaced by their mean until none does."""
    blocks = [[value] for value in values]
    k = 0
    while k + 1 < len(blocks):
        if np.mean(blocks[k]) > np.mean(blocks[k + 1]):
            blocks[k : k + 2] = [blocks[k] + blocks[k + 1]]
            k = max(k - 1, 0)
        else:
            k += 1
    return [np.mean(block) for block in blocks for _ in block]


def nonlinearly_shrunk(A, B, samples_of_A, samples_of_B):
    """Sum over both folds of the matrix with its eigenvectors, and with the other's variances along them."""
    made = np.zeros_like(A)
    for own, other, samples, others in ((A, B, samples_of_A, samples_of_B), (B, A, samples_of_B, samples_of_A)):
        eigenvalues, vectors = np.linalg.eigh(own)
        vectors = vectors[:, np.argsort(eigenvalues)]
        variances = rising([v @ other @ v / others for v in vectors.T])
        made += samples * sum(variance * np.outer(v, v) for variance, v in zip(variances, vectors.T, strict=True))
    return made


def order_of(name, w, G):
    if name == "cyclic":
        return list(range(len(w))), np.inf
    if name == "pivoted":
        return pivoted(G)
    key = [np.sqrt(G[i, i]) * (abs(float(w[i])) if name == "greedy" else 1.0) for i in range(len(w))]
    order = sorted(range(len(w)), key=lambda i: -key[i])
    gaps = [key[a] - key[b] for a, b in itertools.pairwise(order)]
    near = any(0 < gap < NEAR * 0.1 * key[a] for a, gap in zip(order, gaps, strict=False))
    return order, 0.0 if near else np.inf


def pivoted(G):
    """Place the rows from the last one on: each is that of the least pivot, once all that come after it are eliminated.

    The pivot of a row is the Schur complement of the rows after it: what they leave of its input, by least squares.
    """
    m = len(G)
    G = np.asarray(G, dtype=np.float64) + 1e-6 * np.mean(np.diag(G)[np.diag(G) > 0]) * np.eye(m)
    after, near = [], np.inf
    while len(after) < m:
        rest = [i for i in range(m) if i not in after]
        left = G[np.ix_(rest, rest)]
        if after:
            left = left - G[np.ix_(rest, after)] @ np.linalg.solve(G[np.ix_(after, after)], G[np.ix_(after, rest)])
        pivots = dict(zip(rest, np.diag(left), strict=True))
        best, *others = sorted(pivots, key=lambda i: (pivots[i], i))
        if others and pivots[others[0]] < pivots[best] * (1 + 1e-9):
            near = 0.0
        after.append(best)
    return after[::-1], near


# The algorithm.


def sweep(w, q, d, z, G, order, levels):
    """Visit every coordinate of one column once, changing q in place; the margin of its decisions.

    q_i <- clip(round(<X w - sum_{k != i} x_k d_k q_k, x_i> / (d_i ||x_i||^2)), z_i, z_i + levels - 1)
    """
    margin = np.inf
    for i in order:
        if G[i, i] > 0:
            error = w - d * q
            target = (G[i] @ error + G[i, i] * d[i] * q[i]) / (d[i] * G[i, i])
        else:  # an input that is always zero: nothing but the weight itself to go by
            target = w[i] / d[i]
        margin = min(margin, edge(target, z[i], z[i] + levels - 1))
        q[i] = nearest(target, z[i], z[i] + levels - 1)
    return margin


def refit_columns(W, Q, D, G, parts):
    """For each column, the scale of one group after the other in closed form, the others held."""
    for j, rows in itertools.product(range(W.shape[1]), parts):
        alone = np.zeros(len(W))
        alone[rows] = Q[rows, j]
        rest = W[:, j] - D[:, j] * Q[:, j] + D[rows[0], j] * alone
        length, along = alone @ G @ alone, alone @ G @ rest
        if length > 0 and along > 0:
            D[rows, j] = along / length


def refit_tensor(W, Q, D, G):
    """One scale for all: <X Q, X W> / ||X Q||^2."""
    length = sum(q @ G @ q for q in Q.T)
    along = sum(q @ G @ w for q, w in zip(Q.T, W.T, strict=True))
    if length > 0 and along > 0:
        D[:] = along / length


def descend(W, G, d, z, levels, size=None, order="greedy", sweeps=3, refit=True):
    """Run the paper's algorithm from the grid (d, z), each (groups, n)."""
    W, G = np.asarray(W, dtype=np.float64), np.asarray(G, dtype=np.float64)
    parts = groups_of(len(W), size)
    group = np.zeros(len(W), int)
    for g, rows in enumerate(parts):
        group[rows] = g
    D, Z = np.array(d, dtype=np.float64)[group], np.array(z)[group]
    Q = W / D
    margin = np.full(W.shape[1], np.inf)
    orders = [order_of(order, w, G) for w in W.T]
    for _ in range(sweeps):
        for j, (rows, near) in enumerate(orders):
            margin[j] = min(margin[j], near, sweep(W[:, j], Q[:, j], D[:, j], Z[:, j], G, rows, levels))
        if refit and size == "tensor":
            refit_tensor(W, Q, D, G)
        elif refit:
            refit_columns(W, Q, D, G, parts)
    if size == "tensor":  # columns share the scale, so they share every doubt about it
        margin[:] = margin.min()
    first = [rows[0] for rows in parts]
    return Answer((Q - Z).astype(int), D[first], -Z[first], objective(W, D * Q, G), margin)


def nearest_plane(W, G, d, z, levels, order, size=None):
    """Babai's nearest plane: visit the rows in an order, round each to its best real value given the errors before it.

    That value is the one which, with the rows still to come at their best real values too, has the least objective.
    """
    W, G = np.asarray(W, dtype=np.float64), np.asarray(G, dtype=np.float64)
    group = np.zeros(len(W), int)
    for g, rows in enumerate(groups_of(len(W), size)):
        group[rows] = g
    D, Z = np.array(d, dtype=np.float64)[group], np.array(z)[group]
    codes, margin, error = np.zeros(W.shape, int), np.full(W.shape[1], np.inf), np.zeros(W.shape)
    for place, i in enumerate(order):
        done, left = order[:place], order[place:]
        best = -np.linalg.solve(G[np.ix_(left, left)], G[np.ix_(left, done)] @ error[done])[0]
        for j in range(W.shape[1]):
            target = (W[i, j] - best[j]) / D[i, j]
            margin[j] = min(margin[j], edge(target, Z[i, j], Z[i, j] + levels - 1))
            q = nearest(target, Z[i, j], Z[i, j] + levels - 1)
            codes[i, j], error[i, j] = q - Z[i, j], W[i, j] - D[i, j] * q
    Wq = dequantize(codes, d, -np.array(z), size)
    return Answer(codes, np.array(d), -np.array(z), objective(W, Wq, G), margin)


def cheapest_paths(w, G, d, z, levels, order, paths):
    """Least objective of one column that K-best comes to: row by row, the paths with the least objectives go on.

    A path's objective is that with the rows still to come at their best real values.
    """
    w, G = np.asarray(w, dtype=np.float64), np.asarray(G, dtype=np.float64)
    kept = [(0.0, [])]
    for place in range(len(order)):
        done, left = order[: place + 1], order[place + 1 :]
        seen = G[np.ix_(done, done)]
        if left:
            seen = seen - G[np.ix_(done, left)] @ np.linalg.solve(G[np.ix_(left, left)], G[np.ix_(left, done)])
        longer = []
        for (_, path), q in itertools.product(kept, range(int(z), int(z) + levels)):
            error = w[done] - d * np.array([*path, q])
            longer.append((error @ seen @ error, [*path, q]))
        kept = sorted(longer)[:paths]
    return kept[0][0]


def rounded(W, G, d, z, levels, size=None):
    """Round to nearest on the grid (d, z)."""
    W = np.asarray(W, dtype=np.float64)
    codes, margin = np.zeros(W.shape, int), np.full(W.shape[1], np.inf)
    for g, rows in enumerate(groups_of(len(W), size)):
        for i, j in itertools.product(rows, range(W.shape[1])):
            target, low = W[i, j] / d[g, j], z[g, j]
            codes[i, j] = nearest(target, low, low + levels - 1) - low
            margin[j] = min(margin[j], edge(target, low, low + levels - 1))
    Wq = dequantize(codes, d, -z, size)
    return Answer(codes, np.array(d), -np.array(z), objective(W, Wq, G), margin)


def better(first, second, size):
    """Column by column (for "tensor", as a whole) the answer with the lower objective, the first on a tie."""
    a, b = first.objective, second.objective
    if size == "tensor":
        a, b = np.full(len(a), a.sum()), np.full(len(b), b.sum())
    win = b < a
    close = (np.abs(a - b) <= NEAR * np.maximum(a, b)) & (first.codes != second.codes).any(axis=0)
    pick = [np.where(win, getattr(second, f), getattr(first, f)) for f in ("codes", "scale", "zero_point", "objective")]
    return Answer(*pick, np.where(close, 0.0, np.minimum(first.margin, second.margin)))


def solve(W, G, levels=16, *, size=None, symmetric=False, order="greedy", sweeps=3, refit=True, grids=("paper",)):
    """Descend from each grid, take the best, and plain rounding where even that is worse."""
    W = np.asarray(W, dtype=np.float32)
    W, G = W.reshape(len(W), -1).astype(np.float64), np.asarray(G, dtype=np.float64)
    best = None
    for name in grids:
        d, z, close = grids_of(name, W, G, levels, size, symmetric)
        if sweeps:
            answer = descend(W, G, d, z, levels, size, order, sweeps, refit)
        else:
            answer = rounded(W, G, d, z, levels, size)
        answer.margin = np.minimum(answer.margin, close.min(axis=0))
        best = answer if best is None else better(best, answer, size)
    d, z, _ = grids_of("minmax", W, G, levels, size, symmetric)
    return better(best, rounded(W, G, d, z, levels, size), size)


def brute_force(w, G, d, z, levels):
    """Least objective over all codes of one column, its scale given."""
    w, G = np.asarray(w, dtype=np.float64), np.asarray(G, dtype=np.float64)
    best = np.inf
    for q in itertools.product(range(int(z), int(z) + levels), repeat=len(w)):
        error = w - d * np.array(q)
        best = min(best, error @ G @ error)
    return best


def best_of_two(w, G, d, zero_point, levels):
    """Least objective of one column of two rows over all codes: for each first code, the best second one.

    Codes stand for float32 numbers, as a result decodes them: near the nearest code, the next may be as near.
    """
    values = (np.float32(d) * (np.arange(levels) - zero_point).astype(np.float32)).astype(np.float64)
    first = float(w[0]) - values
    target = (float(w[1]) + G[0, 1] / G[1, 1] * first) / d + zero_point
    best = np.inf
    for shift in (-1, 0, 1):
        second = float(w[1]) - values[np.clip(np.rint(target) + shift, 0, levels - 1).astype(int)]
        best = min(best, (G[0, 0] * first**2 + 2 * G[0, 1] * first * second + G[1, 1] * second**2).min())
    return best


def best_single_change(w, G, d, codes, zero_point, levels):
    """Least objective of one column over all ways to change one code; d and zero_point have an entry for each row."""
    w, G = np.asarray(w, dtype=np.float64), np.asarray(G, dtype=np.float64)
    best = np.inf
    for i, code in itertools.product(range(len(w)), range(levels)):
        changed = np.array(codes, dtype=np.float64)
        changed[i] = code
        error = w - d * (changed - zero_point)
        best = min(best, error @ G @ error)
    return best


# The verdict.


def assert_same(q, answer, strict=0.9, margin=MARGIN, rtol=1e-5):
    """`q`, a result of the solver, is `answer` on every column that keeps clear of rounding edges.

    At least the share `strict` of the columns must do so, else the comparison would say little.
    """
    codes = q.codes.reshape(len(q.codes), -1)
    sure = answer.margin > margin
    assert sure.mean() >= strict, f"only {sure.mean():.0%} of the columns keep clear of rounding edges"
    differ = (codes != answer.codes).any(axis=0)
    assert not (differ & sure).any(), f"columns {np.flatnonzero(differ & sure)} differ, margins {answer.margin[differ]}"
    same = ~differ
    np.testing.assert_array_equal(q.zero_point[:, same & sure], answer.zero_point[:, same & sure])
    np.testing.assert_allclose(q.scale[:, same & sure], answer.scale[:, same & sure], rtol=rtol)


# Bit planes: a code stands for the sum of the scales of its bits, less an offset.


def dequantize_planes(codes, plane_scale, offset, size):
    """Apply ``sum_k plane_scale_k * bit_k(code) - offset`` in float32, from the least significant bit up."""
    Wq = np.zeros(codes.shape, np.float32)
    for g, rows in enumerate(groups_of(len(codes), size)):
        for i, j in itertools.product(rows, range(codes.shape[1])):
            value = np.float32(0)
            for k in range(len(plane_scale)):
                if int(codes[i, j]) >> k & 1:
                    value = np.float32(value + np.float32(plane_scale[k, g, j]))
            Wq[i, j] = np.float32(value - np.float32(offset[g, j]))
    return Wq


def plane_columns(codes, bits):
    """Matrix B (m, bits + 1) of one column: its bits, and -1 for the offset."""
    return np.array([[*(int(code) >> k & 1 for k in range(bits)), -1] for code in codes], dtype=np.float64)


def best_planes(w, G, codes, bits):
    """Least objective of one column over all scales and offsets, its codes given: the least squares of its planes."""
    root = np.linalg.cholesky(np.asarray(G, dtype=np.float64)).T  # X with X.T @ X = G
    B, w = root @ plane_columns(codes, bits), root @ np.asarray(w, dtype=np.float64)
    error = w - B @ np.linalg.lstsq(B, w, rcond=None)[0]
    return float(error @ error)


def brute_force_planes(w, G, bits):
    """Least objective of one column over all codes, scales and offsets."""
    return min(best_planes(w, G, codes, bits) for codes in itertools.product(range(2**bits), repeat=len(w)))


def split(W, G, d, z, bits, sweeps=4):
    """Codes found bit by bit, from the most significant one on, the lower ones in the middle of what they can be."""
    W, G = np.asarray(W, dtype=np.float64), np.asarray(G, dtype=np.float64)
    codes, margin = np.full(W.shape, (2**bits - 1) / 2), np.full(W.shape[1], np.inf)
    for j in range(W.shape[1]):
        q = codes[:, j]
        for k in reversed(range(bits)):
            middle, half = q.copy(), 2.0**k / 2
            for _ in range(sweeps):
                before = q.copy()
                for i in np.argsort(-np.diag(G), kind="stable"):
                    target = q[i] + G[i] @ (W[:, j] - d[j] * (q - z[j])) / (d[j] * G[i, i])
                    margin[j] = min(margin[j], abs(target - middle[i]))
                    q[i] = middle[i] + half if target > middle[i] else middle[i] - half
                if np.array_equal(q, before):
                    break
    return codes.astype(int), margin
