"""For every kernel of `comq_np.cuda`, what it is launched with and what it must make of that.

What is wanted comes from the kernels of the CPU where there is one for the same step, else from NumPy. Sizes are
ragged: no number of rows or columns is a multiple of what a block has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from comq_np import cuda, kernels

TOP = np.float32(15)


class Case(NamedTuple):
    """A launch.

    Attributes
    ----------
    grid : int or tuple of int
        Blocks.
    arguments : tuple
        What the kernel is called with.
    wanted : dict of int to numpy.ndarray
        What arguments must be afterwards, by their place; all others are as they were.
    """

    grid: int | tuple[int, ...]
    arguments: tuple[Any, ...]
    wanted: dict[int, np.ndarray]


Maker = Callable[[str], Iterator[Case]]


def single(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32)


def by_column(values: np.ndarray) -> np.ndarray:
    """(b n, m) of (b, m, n)."""
    return values.swapaxes(1, 2).reshape(-1, values.shape[1]).copy()


def by_row(values: np.ndarray, b: int) -> np.ndarray:
    """(b, m, n) of (b n, m)."""
    return values.reshape(b, -1, values.shape[1]).swapaxes(1, 2).copy()


def blocks(size: int, of: int) -> int:
    return -(-size // of)


class Layers:
    """Weights (b, m, n), their Gram matrices, grids and codes, drawn at random; the first row of the first is dead."""

    def __init__(self, b: int, m: int, n: int, groups: int = 1) -> None:
        self.b, self.m, self.n = b, m, n
        self.rng = np.random.default_rng([b, m, n, groups])
        X = self.rng.normal(size=(b, 2 * m, m)) + 0.7 * self.rng.normal(size=(b, 2 * m, 1))
        X[0, :, 0] = 0
        self.G = single(X.swapaxes(1, 2) @ X / (2 * m))
        self.W = single(self.rng.normal(size=(b, m, n)))
        diagonal = self.G.diagonal(axis1=1, axis2=2)
        self.inverse_diagonal = single(np.where(diagonal > 0, 1 / np.where(diagonal > 0, diagonal, 1), 0))
        self.group = (np.arange(m) * groups // m * np.ones((b, 1))).astype(np.int32)
        if groups > 1:
            self.group = self.rng.permuted(self.group, axis=1)
        self.scale = single(self.rng.uniform(0.25, 0.45, size=(b * n, groups)))
        self.offset = single(self.rng.integers(6, 10, size=(b * n, groups)))
        self.step = self.of_rows(self.scale)
        self.zero = self.of_rows(self.offset)

    def of_rows(self, values: np.ndarray) -> np.ndarray:
        """Of each row, (b, m, n), what is given for columns and groups."""
        of_group = values.reshape(self.b, self.n, -1)
        return np.stack([of_group[p][:, self.group[p]].T for p in range(self.b)])

    def start(self, real: bool) -> tuple[np.ndarray, np.ndarray]:
        """Codes, real or nearest to the weights, and their residual."""
        codes = self.W / self.step + self.zero
        codes = single(codes if real else np.clip(np.rint(codes), 0, TOP))
        return codes, self.residual(codes)

    def residual(self, codes: np.ndarray) -> np.ndarray:
        return single(self.G @ (self.W - self.step * (codes - self.zero)))


# ---- kernels that descend ----


def layers_for(name: str, most: int) -> Layers:
    """Layers for a kernel whose name tells threads and rows of each, at most so large."""
    threads, slots = map(int, name.split()[1].split("x"))
    m = min(threads * slots - 3, most)
    return Layers(1 if m > 150 else 2, m, 3, 3 if "grouped" in name else 1)


def sweeps(name: str) -> Iterator[Case]:
    made = layers_for(name, 600)
    b, m, n = made.W.shape
    for real in (False,) if m > 150 else (False, True):
        codes, residual = made.start(real)
        order = np.tile(np.arange(m, dtype=np.int32), (b * n, 1))
        if "own order" in name:
            order = made.rng.permuted(order, axis=1)
            order[0] = np.arange(m)  # thread 0 begins with the dead row, which does not move
        G, inverse, scale, group = made.G, made.inverse_diagonal, made.scale, made.group
        swept, left = by_column(codes), by_column(residual)
        changed, objective = np.zeros(b * n, np.int64), np.zeros(b * n)
        kernels.sweep(swept, left, G, inverse, scale, group, order, TOP, changed, objective)
        if m > 150:  # a later sweep, of codes of which few move
            nudged = made.rng.choice(m, size=12, replace=False)
            codes = by_row(swept, b)
            codes[:, nudged] = np.abs(codes[:, nudged] - 1)
            residual = made.residual(codes)
            swept, left = by_column(codes), by_column(residual)
            kernels.sweep(swept, left, G, inverse, scale, group, order, TOP, changed, objective)
        arguments = codes, residual, G, inverse, scale, group, order, TOP, np.zeros(b * n, np.int32)
        yield Case(b * n, arguments, {0: by_row(swept, b), 1: by_row(left, b), 8: changed.astype(np.int32)})


def tabu(name: str) -> Iterator[Case]:
    made = layers_for(name, 300)
    b, _, n = made.W.shape
    codes, residual = made.start(real=False)
    step, alive = by_column(made.step), made.inverse_diagonal > 0
    for moves in (1, 60):
        found, left = by_column(codes), by_column(residual)
        changed, objective = np.zeros(b * n, np.int64), np.zeros(b * n)
        kernels.tabu_search(found, left, made.G, alive, step, TOP, moves, changed, objective)
        live, unit = alive.sum(axis=1).astype(np.int32), step.max(axis=1)
        marks = alive.astype(np.uint8)
        arguments = codes, residual, made.G, marks, live, made.scale, unit, made.group, TOP, moves
        yield Case(b * n, arguments, {0: by_row(found, b), 1: by_row(left, b)})


def passes(name: str) -> Iterator[Case]:
    made = Layers(2, 150, 41, 3 if "grouped" in name else 1)
    b, m, n = made.W.shape
    U = single(np.triu(made.rng.normal(size=(b, m, m))) * 0.05)
    diagonal = single(made.rng.uniform(0.5, 2, size=(b, m)))
    diagonal[0, 20] = 0
    blank = np.full((b, m, n), np.nan, np.float32)
    given = single(0.1 * made.rng.normal(size=(b, m, n)))
    columns = (b, n, -1)
    grid = single(made.scale.reshape(columns).swapaxes(1, 2)), made.offset.reshape(columns).swapaxes(1, 2)
    for start, stop in ((0, 128), (9, 62), (128, 150)):
        targets, codes, error, missed = given.copy(), blank.copy(), blank.copy(), blank.copy()
        rows = slice(start, stop)
        zero, paid = np.ascontiguousarray(grid[1], dtype=np.float64), np.zeros((b, n))
        feedback, on = np.ascontiguousarray(U.swapaxes(1, 2)), (grid[0], zero, made.group, TOP)
        kernels.pass_panel(made.W, feedback, diagonal, *on, start, stop, targets, codes, error, paid)
        weights, left, sizes, wanted = (part[:, rows].copy() for part in (made.W, error, diagonal, targets))
        kernels.misses(weights, left, sizes, wanted)
        missed[:, rows] = wanted
        targets[:, stop:] = given[:, stop:]  # a product brings the feedback to later rows
        before = made.W, feedback, diagonal, made.scale, made.offset, made.group, TOP, start, stop
        arguments = (*before, given, blank, blank, blank)
        yield Case((blocks(n, cuda.NARROW), b), arguments, {9: targets, 10: codes, 11: error, 12: missed})


# ---- products and factors ----


def real_of(name: str) -> type[np.float32] | type[np.float64]:
    return np.float32 if "float32" in name else np.float64


def products(name: str) -> Iterator[Case]:
    real, flip, rng = real_of(name), "flipped" in name, np.random.default_rng(1)
    a0, k0, c0, rows, inner, columns = 3, 2, 1, 70, 37, 66
    A, B, C = (rng.normal(size=size).astype(real) for size in ((2, 80, 45), (2, 45, 67), (2, 75, 67)))
    part = A[:, a0 : a0 + rows, k0 : k0 + inner] @ B[:, k0 : k0 + inner, :columns]
    A = np.ascontiguousarray(A.swapaxes(1, 2)) if flip else A
    for keep, sign in ((True, -1), (False, 1)):
        before, made = C.copy(), C.copy()
        here = np.s_[:, c0 : c0 + rows, :columns]
        made[here] = sign * part + (made[here] if keep else 0)
        before[here] = before[here] if keep else np.nan
        grid = blocks(columns, cuda.SIDE), blocks(rows, cuda.SIDE), 2
        yield Case(grid, (A, B, before, a0, k0, c0, rows, inner, columns, real(sign), keep), {2: made})


def corners(name: str) -> Iterator[Case]:
    real, rng, start = real_of(name), np.random.default_rng(2), 4
    side = cuda.CORNER[np.dtype(real)]
    for rows in (side, side - 5, 1):
        m = start + rows + 3
        X = rng.normal(size=(2, 3 * rows, rows))
        square = X.swapaxes(1, 2) @ X / rows
        damping = np.array([0.5, 0.25], real)
        work = np.full((2, side, m), np.nan, real)
        work[:, :rows, start : start + rows] = square
        damped = work[:, :rows, start : start + rows] + damping[:, None, None] * np.eye(rows)
        U = np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1]
        factor, inverse = np.zeros((2, m, m), real), np.zeros((2, side, side), real)
        diagonal, failed = np.zeros((2, m), np.float32), np.zeros(2, np.int32)
        wanted = {4: factor.copy(), 5: inverse.copy(), 6: diagonal.copy()}
        wanted[4][:, start : start + rows, start : start + rows] = U.swapaxes(1, 2)
        wanted[5][:, :rows, :rows] = np.linalg.inv(U)
        wanted[6][:, start : start + rows] = U.diagonal(axis1=1, axis2=2)
        yield Case(2, (work, start, rows, damping, factor, inverse, diagonal, failed), wanted)


# ---- what goes over all rows ----


def rows_in_order(_: str) -> Iterator[Case]:
    made = Layers(2, 150, 3)
    W = single(np.round(made.W, 1))  # so that some are alike
    size = made.rng.integers(0, 3, size=(2, 150)).astype(np.float64)
    wanted = np.argsort(-size[:, None] * np.abs(W).swapaxes(1, 2).astype(np.float64), axis=2, kind="stable")
    order = np.zeros((6, 150), np.int32)
    yield Case(6, (W, size, order), {2: wanted.reshape(6, 150).astype(np.int32)})


def arrange(_: str) -> Iterator[Case]:
    made = Layers(2, 140, 2)
    order = np.stack([made.rng.permutation(140) for _ in range(2)]).astype(np.int32)
    divisor = single([2, 3])
    wanted = np.stack([made.G[p][np.ix_(order[p], order[p])] / divisor[p] for p in range(2)])
    yield Case(280, (made.G, order, divisor, np.zeros_like(made.G)), {3: wanted})


def gather(_: str) -> Iterator[Case]:
    made = Layers(2, 20, 140)
    rows = made.rng.integers(0, 20, size=(2, 7)).astype(np.int32)
    wanted = np.take_along_axis(made.W, rows[:, :, None], axis=1)
    yield Case(14, (made.W, rows, np.zeros_like(wanted)), {2: wanted})


def scatter(name: str) -> Iterator[Case]:
    kind, rng = np.dtype(name.split()[1]), np.random.default_rng(3)
    codes = single(rng.integers(0, np.iinfo(kind).max, endpoint=True, size=(2, 9, 140)))
    order = np.stack([rng.permutation(9) for _ in range(2)]).astype(np.int32)
    wanted = np.zeros(codes.shape, kind)
    np.put_along_axis(wanted, order[:, :, None], codes.astype(kind), axis=1)
    yield Case(18, (codes, order, np.zeros(codes.shape, kind)), {2: wanted})


def encode(_: str) -> Iterator[Case]:
    made = Layers(2, 9, 140, 3)
    only = made.rng.integers(0, 2, size=(2, 9)).astype(np.uint8)
    value = made.W.astype(np.float64) / made.step + made.zero
    for top, codes in ((TOP, np.clip(np.rint(value), 0, TOP)), (np.float32(-1), value)):
        grid = made.scale, made.offset, made.group
        wanted = np.where(only[:, :, None], single(codes), np.float32(-7))
        yield Case(18, (made.W, *grid, top, only, np.full_like(made.W, -7)), {6: wanted})


def errors(name: str) -> Iterator[Case]:
    made = Layers(2, 9, 140, 3)
    codes, _ = made.start(real=False)
    real = real_of(name)
    wanted = made.W.astype(real) - made.step * single(codes - made.zero)
    arguments = made.W, codes, made.scale, made.offset, made.group, np.zeros(made.W.shape, real)
    yield Case(18, arguments, {5: wanted.astype(real)})


def steps_of(_: str) -> Iterator[Case]:
    made = Layers(2, 9, 140, 3)
    codes, _ = made.start(real=False)
    for only in (-1, 1):
        wanted = np.where((made.group[:, :, None] == only) | (only < 0), codes - made.zero, 0)
        yield Case(18, (codes, made.offset, made.group, only, np.full_like(codes, np.nan)), {4: single(wanted)})


def of_columns(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two arrays (2, 9, 140), a number for each column, and the same beside the arrays."""
    first, second = (single(rng.normal(size=(2, 9, 140))) for _ in range(2))
    factor = single(rng.normal(size=280))
    return first, second, factor, factor.reshape(2, 1, 140)


def move_towards(_: str) -> Iterator[Case]:
    values, limit, ratio, across = of_columns(np.random.default_rng(4))
    yield Case(18, (values, limit, ratio), {0: limit - across * (limit - values)})


def subtract(_: str) -> Iterator[Case]:
    values, other, factor, across = of_columns(np.random.default_rng(5))
    for taken in (other, other[:, :, :1].copy()):
        yield Case(18, (values, factor, taken), {0: values - across * taken})


def products_of_steps(_: str) -> Iterator[Case]:
    values, other, factor, across = of_columns(np.random.default_rng(6))
    yield Case(18, (values, other, factor, np.zeros_like(values)), {3: (values - other) / across})


def weigh(_: str) -> Iterator[Case]:
    values, _, factor, _ = of_columns(np.random.default_rng(7))
    weight = factor[:18].reshape(2, 9).copy()
    yield Case(18, (values, weight, np.zeros_like(values)), {2: weight[:, :, None] * values})


def take(_: str) -> Iterator[Case]:
    target, source, _, across = of_columns(np.random.default_rng(8))
    chosen = (across > 0).astype(np.uint8)
    yield Case(18, (target, source, chosen.ravel()), {0: np.where(chosen, source, target)})


def convert(_: str) -> Iterator[Case]:
    values, *_ = of_columns(np.random.default_rng(9))
    yield Case(18, (values, np.zeros(values.shape)), {1: values.astype(np.float64)})


def some_columns(_: str) -> Iterator[Case]:
    values, *_ = of_columns(np.random.default_rng(10))
    columns = np.arange(139, 0, -1, dtype=np.int32)
    wanted = values[:, :, columns]
    yield Case(18, (values, columns, np.zeros_like(wanted)), {2: wanted})


def shrink(_: str) -> Iterator[Case]:
    made = Layers(2, 140, 2)
    added, share = single(made.rng.uniform(size=(2, 140))), np.float32(0.1)
    wanted = made.G * (1 - share) + added[:, :, None] * np.eye(140, dtype=np.float32)
    yield Case(280, (made.G, share, added), {0: wanted})


def fall_back(_: str) -> Iterator[Case]:
    made = Layers(2, 140, 2)
    factor, diagonal = np.zeros_like(made.G), np.zeros((2, 140), np.float32)
    wanted = factor.copy(), diagonal.copy()
    wanted[0][1], wanted[1][1] = made.G[1], made.G[1].diagonal()
    failed = np.array([0, 1], np.int32)
    yield Case(280, (factor, diagonal, made.G, failed), {0: wanted[0], 1: wanted[1]})


def diagonals(_: str) -> Iterator[Case]:
    G = Layers(2, 9, 2).G
    yield Case(18, (G, np.zeros((2, 9), np.float32)), {1: G.diagonal(axis1=1, axis2=2)})


def clear(_: str) -> Iterator[Case]:
    values = np.full(1000, np.nan, np.float32)
    yield Case(blocks(1000, cuda.ROW), (values,), {0: np.zeros_like(values)})


def rows_of(_: str) -> Iterator[Case]:
    made = Layers(2, 150, 2)
    for start, rows in ((20, 8), (140, 5)):
        work = np.full((2, 8, 150), np.nan, np.float32)
        wanted = work.copy()
        wanted[:, :rows, : start + rows] = made.G[:, start : start + rows, : start + rows]
        yield Case(16, (made.G, start, rows, work), {3: wanted})


def put_rows(_: str) -> Iterator[Case]:
    made = Layers(2, 150, 2)
    work = single(made.rng.normal(size=(2, 8, 140)))
    wanted = made.G.copy()
    wanted[:, 20:26, :140] = work[:, :6]
    yield Case(16, (work, 20, 6, made.G), {3: wanted})


# ---- what goes over all columns ----


def of_chunks(values: np.ndarray, merge: Callable[..., np.ndarray]) -> np.ndarray:
    """Merge rows (b, m, n) by chunks: (chunks, b n)."""
    parts = [values[:, start : start + cuda.CHUNK] for start in range(0, values.shape[1], cuda.CHUNK)]
    return np.stack([merge(part, axis=1).ravel() for part in parts])


def column_dots(_: str) -> Iterator[Case]:
    rng = np.random.default_rng(11)
    first, second = (single(rng.normal(size=(2, cuda.CHUNK + 9, 35))) for _ in range(2))
    wanted = of_chunks(first.astype(np.float64) * second, np.sum)
    grid = blocks(70, cuda.COLUMNS), 2
    yield Case(grid, (first, second, np.zeros((2, 70))), {2: wanted})
    one = single(rng.normal(size=(2, cuda.CHUNK + 9, 1)))  # for all columns
    yield Case(grid, (first, one, np.zeros((2, 70))), {2: of_chunks(first.astype(np.float64) * one, np.sum)})


def mirrored(_: str) -> Iterator[Case]:
    m = cuda.CHUNK + 9
    G = single(np.random.default_rng(12).normal(size=(1, m, m)))
    G = G + G.swapaxes(1, 2)
    G[0, 3, 5] += 1
    exact = G.astype(np.float64)
    wanted = of_chunks(np.abs(exact - exact.swapaxes(1, 2)), np.max), of_chunks(np.abs(exact), np.sum)
    found = np.zeros((2, m)), np.zeros((2, m))
    yield Case((blocks(m, cuda.COLUMNS), 2), (G, *found), {1: wanted[0], 2: wanted[1]})


def extremes(_: str) -> Iterator[Case]:
    W = single(np.random.default_rng(13).normal(size=(2, 20, 35)))
    parts = [by_column(W[:, start : start + 8]) for start in range(0, 20, 8)]
    low, high = (np.stack([merge(part, axis=1) for part in parts], axis=1) for merge in (np.min, np.max))
    yield Case((blocks(70, cuda.COLUMNS), 3), (W, 8, np.zeros_like(low), np.zeros_like(high)), {2: low, 3: high})


def count_changes(_: str) -> Iterator[Case]:
    rng = np.random.default_rng(14)
    before, now = (single(rng.integers(0, 2, size=(2, 20, 35))) for _ in range(2))
    wanted = (before != now).sum(axis=1, dtype=np.int32).ravel()
    yield Case(blocks(70, cuda.COLUMNS), (before, now, np.zeros(70, np.int32)), {2: wanted})


def grid_errors(_: str) -> Iterator[Case]:
    made = Layers(2, 20, 35, 3)
    size, count, middle = 8, 6, 7.5
    by_group = np.stack([made.rng.permutation(20) for _ in range(2)]).astype(np.int32)
    weight = single(made.rng.uniform(size=(2, 20)))
    factors, shifts = single(np.linspace(0.6, 1.1, count)), made.rng.normal(size=count)
    W = by_column(np.take_along_axis(made.W, by_group[:, :, None], axis=1))
    share = np.take_along_axis(weight, by_group, axis=1)
    for centre, whole in ((middle, True), (middle, False), (-1.0, False)):
        found, wanted = (np.zeros((*made.scale.shape, count), np.float32) for _ in range(2))
        moves = factors, shifts, centre, whole, TOP
        kernels.grid_errors(W, share, size, made.scale, made.offset.astype(np.float64), *moves, wanted)
        grid = blocks(70, cuda.COLUMNS), blocks(count, cuda.TRIALS), 3
        yield Case(grid, (made.W, weight, by_group, size, made.scale, made.offset, *moves, found), {11: wanted})


#: By the first word of a kernel's name.
CASES: dict[str, Maker] = {
    "sweep": sweeps,
    "tabu": tabu,
    "pass": passes,
    "product": products,
    "corner": corners,
    "order_rows": rows_in_order,
    **{
        made.__name__: made
        for made in (arrange, gather, scatter, encode, errors, steps_of, move_towards, subtract, weigh)
    },
    **{
        made.__name__: made
        for made in (
            products_of_steps,
            take,
            convert,
            some_columns,
            shrink,
            fall_back,
            diagonals,
            clear,
            rows_of,
            put_rows,
        )
    },
    **{made.__name__: made for made in (column_dots, mirrored, extremes, count_changes, grid_errors)},
}


def cases(name: str) -> list[Case]:
    """Launches of a kernel."""
    return list(CASES[name.split()[0]](name))


def differs(case: Case, after: tuple[Any, ...]) -> list[str]:
    """What is not as it must be, after a launch: real numbers may differ by what rounding does."""
    found = []
    for k, (before, now) in enumerate(zip(case.arguments, after, strict=True)):
        if not isinstance(now, np.ndarray):
            continue
        wanted = case.wanted.get(k, before)
        if k not in case.wanted or now.dtype.kind != "f":
            close = np.array_equal(now, wanted, equal_nan=now.dtype.kind == "f")
        else:
            tolerance = 1e-5 if now.dtype == np.float32 else 1e-11
            size = float(np.nanmax(np.abs(wanted), initial=0))
            close = np.allclose(now, wanted, rtol=tolerance, atol=tolerance * size, equal_nan=True)
        if not close:
            worst = np.nanmax(np.abs(now.astype(np.float64) - wanted))
            found.append(f"argument {k} by up to {worst:.3g} in {int((now != wanted).sum())} of {math.prod(now.shape)}")
    return found
