"""Arrays of a problem: matrices put in an order, the layouts of a tile, and products that cost half.

`problem` says what the layouts are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import checks, kernels
from comq_np.parallel import Workers

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
#: Either of them.
Real = npt.NDArray[Any]

#: Rows of a block in products with a symmetric or triangular matrix.
BLOCK = 128


def mirrored(G: Real, rows: slice, columns: slice) -> bool:
    """`checks.mirrored`, by a kernel where the entries lie side by side; zeros of different sign are not alike."""
    if not G.flags.c_contiguous:
        return checks.mirrored(G, rows, columns)
    bits = G.view(np.int32 if G.itemsize == 4 else np.int64)
    return kernels.mirrored(bits, rows.start, rows.stop, columns.start, columns.stop)


def arranged(
    matrices: Real, order: npt.NDArray[np.intp], unit: Float64, pool: Workers, dtype: npt.DTypeLike = np.float32
) -> Real:
    """Matrices (b, m, m) with rows and columns in an `order` (b, m), divided by `unit` (b,), a power of two."""
    if matrices.shape[1] <= BLOCK:
        rows = np.take_along_axis(matrices, order[:, :, None], axis=1)
        both = np.take_along_axis(rows, order[:, None, :], axis=2)
        return (both / unit[:, None, None]).astype(dtype)
    made: Real = np.empty(matrices.shape, dtype)

    def some_rows(one: tuple[int, slice]) -> None:
        p, rows = one
        part = np.take(matrices[p], order[p, rows], axis=0)
        part /= part.dtype.type(unit[p])
        kernels.take_rows(part.astype(dtype, copy=False), order[p : p + 1], made[p, rows])

    pool.map(some_rows, [(p, rows) for p in range(len(made)) for rows in blocks(made.shape[1])])
    return made


def arranged_in_place(matrices: Real, order: npt.NDArray[np.intp], unit: Float64, pool: Workers) -> Float32:
    """Do the same in the memory of the given matrices."""
    b, m = order.shape
    rows = matrices.reshape(b * m, m)
    made: Float32 = rows.reshape(-1).view(np.float32)[: rows.size].reshape(b, m, m)
    divisors = unit.astype(matrices.dtype).repeat(m)
    for row, source, divisor in zip(made.reshape(b * m, m), rows, divisors, strict=True):
        row[:] = source / divisor  # a row of float32 ends before the next of float64 begins
    for G, places in zip(made, order, strict=True):
        _permute_rows(G, places)

    def some_columns(one: tuple[int, slice]) -> None:
        p, rows = one
        made[p, rows] = np.take(made[p, rows], order[p], axis=1)

    pool.map(some_columns, [(p, rows) for p in range(b) for rows in blocks(m)])
    return made


def _permute_rows(G: Float32, order: npt.NDArray[np.intp]) -> None:
    """Put row ``order[i]`` in the place of row i, cycle by cycle."""
    done = np.zeros(len(G), np.bool_)
    for first in range(len(G)):
        if done[first]:
            continue
        kept, place = G[first].copy(), first
        while order[place] != first:
            done[place] = True
            G[place] = G[order[place]]
            place = order[place]
        done[place] = True
        G[place] = kept


def shrink(G: Real, share: float) -> None:
    """Put ``(1 - share) G + share mean(diag G) I``, over the inputs that are not always zero, in the place of `G`."""
    at = np.arange(G.shape[1])
    diagonal = G[:, at, at]
    added = share * mean_diagonal(diagonal)[:, None] * (diagonal > 0)
    G *= 1 - share
    G[:, at, at] += added.astype(G.dtype)


def mean_diagonal(diagonal: Real) -> Real:
    """Mean (b,) of the entries of a diagonal (b, m) that are not zero."""
    alive = (diagonal > 0).sum(axis=1)
    mean: Real = np.divide(diagonal.sum(axis=1), alive, out=np.zeros_like(diagonal[:, 0]), where=alive > 0)
    return mean


def written(*shape: int) -> Float32:
    """Array of zeros whose memory has been written to, row by row.

    Where the first write to new memory is slow, it is far slower in the order in which a transpose writes.
    """
    return np.full(shape, np.float32(0))


def written_at_once(rows: int, columns: int, pool: Workers) -> Float32:
    """The same by several threads."""
    made = np.empty((rows, columns), np.float32)
    pool.map(lambda some: made[some].fill(np.float32(0)), blocks(rows))
    return made


def blocks(rows: int, size: int = BLOCK) -> list[slice]:
    """Slices of so many rows that cover all of them."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def by_column(values: Float32, made: Float32 | None = None) -> Float32:
    """Values (k c, m) with a row for each column, from those of a tile (k, m, c)."""
    problems, rows, columns = values.shape
    made = written(problems * columns, rows) if made is None else made
    kernels.transpose(values, made.reshape(problems, columns, rows))
    return made


def by_row(values: Float32, problems: int) -> Float32:
    """Values (k, m, c) of a tile from those with a row for each column, (k c, m)."""
    apart = values.reshape(problems, -1, values.shape[1])
    made = np.empty((problems, apart.shape[2], apart.shape[1]), np.float32)
    kernels.transpose(apart, made)
    return made


def forms(G: Float32, vectors: Float32, made: Float32 | None = None) -> Float64:
    """``v.T @ G @ v`` (k c,) of vectors (k c, m), by half a product: each matrix of `G` (k, m, m) is symmetric."""
    reached = np.empty_like(vectors) if made is None else made
    np.copyto(reached, vectors)
    times_triangle(G, reached, turned=False)
    return 2.0 * dots(vectors, reached) - squares(vectors, np.diagonal(G, axis1=1, axis2=2))


def times_triangle(matrices: Float32, vectors: Float32, turned: bool) -> None:
    """Put ``L @ v`` in the place of vectors (k c, m), or ``L.T @ v``, for what is not above the diagonal (k, m, m)."""
    kernels.times_triangle(matrices, vectors.reshape(len(matrices), -1, vectors.shape[1]), turned)


def double_forms(G: Real, vectors: Float64) -> Float64:
    """The same in double precision, for vectors (k, c, m)."""
    total = np.zeros(vectors.shape[:2])
    for rows in blocks(vectors.shape[2]):
        square, above = (G[:, some, rows].astype(np.float64, copy=False) for some in (rows, slice(rows.start)))
        reached = vectors[:, :, rows] @ (0.5 * square) + vectors[:, :, : rows.start] @ above
        total += np.einsum("kji,kji->kj", vectors[:, :, rows], reached)
    return 2.0 * total.ravel()


def rows_of(values: Real, rows: npt.NDArray[np.intp]) -> Real:
    """Some rows (k, s) of values (k c, m): (k c, s)."""
    made: Real = np.empty((len(values), rows.shape[1]), values.dtype)
    kernels.take_rows(values, rows, made)
    return made


def dots(first: Real, second: Real) -> Float64:
    """Sums of the products of two arrays (k c, m) for each column, (k c,)."""
    total = np.zeros(len(first))
    kernels.dots(first, second, total)
    return total


def squares(values: Float32, weight: Float32) -> Float64:
    """Sum of the squares of values (k c, m), weighted by `weight` (k, m), for each column, (k c,)."""
    total = np.empty(len(values))
    kernels.squares(values, np.ascontiguousarray(weight), total)
    return total


def combined(shares: Float64, rows: Real) -> Float64:
    """Sum of the rows of each problem, ([b,] m, n), each times its share, ([b,] m)."""
    found: Float64 = (shares[..., None, :] @ rows)[..., 0, :]
    return found
