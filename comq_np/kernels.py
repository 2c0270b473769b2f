"""The numba kernels: every scalar rule and every compiled loop, and nothing else.

They live in one file because numba's disk cache is keyed on the file of the function that is called and goes stale
when a function inlined into it lives elsewhere; those of `sphere` call no others. They take C-contiguous arrays in the
layouts that `problem` describes, fill arrays that the caller allocated, release the interpreter's lock and keep no
state, so any number of threads may run them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import llvmlite.binding
import numba
import numba.extending
import numpy as np
import numpy.typing as npt

Function = TypeVar("Function", bound=Callable[..., Any])

#: Adding and subtracting 1.5 * 2**23 rounds a float32 between -2**22 and 2**22 to the nearest integer, ties to even.
ROUNDER = np.float32(12582912.0)
ZERO, ONE = np.float32(0.0), np.float32(1.0)
#: The least and the greatest float16 above zero, and the least float32 in full precision.
LEAST_HALF, MOST_HALF, LEAST_SCALE = 2.0**-24, 65504.0, float(np.finfo(np.float32).tiny)
#: Two directions with less room than this between them (squared sine) are taken for one.
FLAT = 1e-6
#: Price of a step that is forbidden.
NEVER = np.float32(np.inf)
#: Rows that a pass, or a sweep over levels or bits, decides on before it follows the changes; and rows between two
#: products with all rows before them.
PANEL, REACH = 64, 512
#: The same of a sweep over codes on a grid, which looks for those that are due side by side.
STRETCH = 128
#: Rows and columns that are transposed, and that are compared with their mirror image, at a time.
STRIP, SQUARE = 8, 4
#: The largest int32.
LARGEST = np.int32(2**31 - 1)
#: One more than the moves of a tabu search that a code rests after its own, at most.
LONGEST_REST = 16


def jit(function: Function, reorder: bool = False, **options: Any) -> Function:
    """Compile `function`, cached on disk where numba finds a folder that it can write; `reorder` is for its sums."""
    # No kernel meets a NaN; to look for divisions by zero would keep loops from vectorising. A way in from C, which
    # nobody takes, takes as long to compile as a short function.
    flags = {"nnan", "reassoc", "contract"} if reorder else {"nnan"}
    options = {"nogil": True, "error_model": "numpy", "fastmath": flags, "no_cfunc_wrapper": True, **options}
    try:
        compiled: Function = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no such folder: compile in every process instead of refusing to work
        compiled = numba.njit(**options)(function)
    return compiled


#: Compile a function that has sums in any order, so that they vectorise.
jit_sums = functools.partial(jit, reorder=True)
#: Compile a function as a part of each kernel that calls it, and by itself only where Python does: a call passes seven
#: numbers and more for each array, and counts references to it.
jit_part = functools.partial(jit, inline="always")


def _blas(name: str, parameters: int) -> Any:
    """Function of the BLAS that SciPy uses, under a name: kernels are cached with names, not with addresses."""
    address = numba.extending.get_cython_function_address("scipy.linalg.cython_blas", name)
    llvmlite.binding.add_symbol(f"comq_np_{name}", address)
    return numba.types.ExternalFunction(f"comq_np_{name}", numba.void(*parameters * [numba.types.voidptr]))


_sgemm, _strmm = _blas("sgemm", 13), _blas("strmm", 11)
#: What BLAS reads by address, as constants: arrays made in a kernel take long to compile. Its letters for a matrix as
#: it is, its transpose, an upper triangle and the left side; and factors.
PLAIN, TURNED, UPPER, LEFT = (np.frombuffer(letter, np.uint8) for letter in (b"N", b"T", b"U", b"L"))
NONE, ONCE = np.zeros(1, np.float32), np.ones(1, np.float32)


@jit
def add_product(
    first: npt.NDArray[np.float32],
    second: npt.NDArray[np.float32],
    made: npt.NDArray[np.float32],
    keep: bool,
) -> None:
    """Put ``first @ second`` in the place of `made`, or add it if `keep`, by BLAS; each row lies side by side."""
    # BLAS has columns for rows, so it is told of the transposes: made.T = second.T @ first.T.
    sizes, kept = np.empty(6, np.int32), ONCE if keep else NONE
    sizes[0], sizes[1], sizes[2] = made.shape[1], made.shape[0], first.shape[1]
    sizes[3], sizes[4] = second.strides[0] // second.itemsize, first.strides[0] // first.itemsize
    sizes[5] = made.strides[0] // made.itemsize
    _sgemm(
        PLAIN.ctypes,
        PLAIN.ctypes,
        sizes.ctypes,
        sizes[1:].ctypes,
        sizes[2:].ctypes,
        ONCE.ctypes,
        second.ctypes,
        sizes[3:].ctypes,
        first.ctypes,
        sizes[4:].ctypes,
        kept.ctypes,
        made.ctypes,
        sizes[5:].ctypes,
    )


@jit
def times_triangle(matrix: npt.NDArray[np.float32], vectors: npt.NDArray[np.float32], turned: bool) -> None:
    """Put ``L @ v`` in the place of each of the `vectors` (k, c, m), or ``L.T @ v`` if `turned`, by BLAS.

    L is what the `matrix` (k, m, m) holds on and below its diagonal; that takes half a product.
    """
    # BLAS has columns for rows: the lower triangle is the upper one of the transpose, and the vectors are columns.
    sizes, turn = np.empty(4, np.int32), PLAIN if turned else TURNED
    sizes[0], sizes[1] = vectors.shape[2], vectors.shape[1]
    sizes[2], sizes[3] = matrix.strides[1] // matrix.itemsize, vectors.strides[1] // vectors.itemsize
    for p in range(len(vectors)):
        _strmm(
            LEFT.ctypes,
            UPPER.ctypes,
            turn.ctypes,
            PLAIN.ctypes,
            sizes.ctypes,
            sizes[1:].ctypes,
            ONCE.ctypes,
            matrix[p].ctypes,
            sizes[2:].ctypes,
            vectors[p].ctypes,
            sizes[3:].ctypes,
        )


@jit_part
def nearest_code(target: np.float32, top: np.float32) -> np.float32:
    """Nearest code to a real `target`, from 0 to `top`."""
    return (min(max(target, ZERO), top) + ROUNDER) - ROUNDER


@jit_part
def best_value(code: np.float32, residual: np.float32, inverse_diagonal: np.float32, step: np.float32) -> np.float32:
    """Real code with the least error, all others fixed (paper, algorithm 1), for the residual (W - Wq) G of its row."""
    return code + residual * inverse_diagonal / step


@jit_part
def encoded(value: Any, step: np.float32, offset: Any) -> np.float32:
    """Real code that stands for a value, in the precision of the value and the zero point `offset`."""
    return np.float32(value / step + offset)


@jit_part
def left_over(weight: np.float32, code: Any, step: np.float32, offset: Any) -> np.float32:
    """What a code leaves of a weight; the difference in the precision of the code and the zero point `offset`."""
    return weight - step * np.float32(code - offset)


@jit
def gather(
    W: npt.NDArray[np.float32],
    order: npt.NDArray[np.intp],
    problem: int,
    column: int,
    made: npt.NDArray[np.float32],
) -> None:
    """Fill `made` (k, m, c) with the rows of `W` (b, m, n) in an `order` (k, m), from a problem and a column on."""
    for p in range(made.shape[0]):
        for i in range(made.shape[1]):
            copy(W[problem + p, order[p, i], column : column + made.shape[2]], made[p, i])


@jit
def copy(values: npt.NDArray[Any], made: npt.NDArray[Any]) -> None:
    """Put `values` (c,) in the place of others.

    To assign a slice does the same, and takes seconds to compile: for what an error would say of the shapes.
    """
    for j in range(made.shape[0]):
        made[j] = values[j]


@jit
def take_rows(values: npt.NDArray[Any], rows: npt.NDArray[np.intp], made: npt.NDArray[Any]) -> None:
    """Fill `made` (k c, s) with some rows (k, s) of `values` (k c, m)."""
    columns = values.shape[0] // rows.shape[0]
    for j in range(values.shape[0]):
        value, chosen, row = values[j], rows[j // columns], made[j]
        for i in range(row.shape[0]):
            row[i] = value[chosen[i]]


@jit
def nearest_half(value: float) -> float:
    """Nearest positive float16, ties to even."""
    value = min(max(value, LEAST_HALF), MOST_HALF)
    _, exponent = math.frexp(value)
    step = math.ldexp(1.0, max(exponent, -13) - 11)
    nearest: float = np.rint(value / step) * step
    return nearest


@jit
def refit(
    scale: float,
    zero: float,
    qR: float,
    qGq: float,
    uR: float,
    uGq: float,
    uGu: float,
    real: bool,
    half: bool,
    limit: float,
) -> tuple[float, float]:
    """Scale and zero point of a group that minimise the objective; where that is no positive scale, the old ones.

    The sums are those of `descent.Terms`. Along q and u the error changes by ``a q + b u``: a is that of the scale,
    -b / scale that of the zero point, if it is `real`.
    """
    a, b = qR / qGq if qGq > 0.0 else 0.0, 0.0
    room = qGq * uGu - uGq * uGq
    sure = real and room > FLAT * qGq * uGu
    if sure:
        a, b = (qR * uGu - uR * uGq) / room, (uR * qGq - qR * uGq) / room
    wanted = scale + a
    better = nearest_half(wanted) if half else np.float64(np.float32(wanted))
    if sure and half:  # what suits the scale as it is stored
        b = (uR - (better - scale) * uGq) / uGu
    moved = np.float64(np.float32(zero - b / better)) if sure else zero
    fits = np.float32(wanted) >= LEAST_SCALE and abs(moved) <= limit
    return (better, moved) if fits else (scale, zero)


@jit
def refit_columns(
    sums: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[Any],
    real: bool,
    half: bool,
    limit: float,
) -> None:
    """Refit a group of each column (k c,), from sums (5, k c)."""
    for j in range(scale.shape[0]):
        qR, qGq, uR, uGq, uGu = sums[0, j], sums[1, j], sums[2, j], sums[3, j], sums[4, j]
        scale[j], zero = refit(scale[j], zero_point[j], qR, qGq, uR, uGq, uGu, real, half, limit)
        if real:
            zero_point[j] = zero


@jit_sums
def refit_sums(
    codes: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float32],
    products: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32],
    sums: npt.NDArray[np.float64],
) -> None:
    """Fill the first four `sums` (5, k c) for a single group, from `residual` and `products` (k c, m), ``W G``.

    They differ by ``d G q``; `scale` and `zero_point` are (k c,).
    """
    for j in range(codes.shape[0]):
        code, product, R, zero, step = codes[j], products[j], residual[j], zero_point[j], scale[j]
        qR, qGq, uR, uGq = 0.0, 0.0, 0.0, 0.0
        for i in range(code.shape[0]):
            q, left, reached = np.float64(code[i]) - zero, np.float64(R[i]), np.float64((product[i] - R[i]) / step)
            qR += q * left
            qGq += q * reached
            uR += left
            uGq += reached
        sums[0, j], sums[1, j], sums[2, j], sums[3, j] = qR, qGq, uR, uGq


@jit
def follow_refit(
    residual: npt.NDArray[np.float32],
    products: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    Gu: npt.NDArray[np.float64],
    change: npt.NDArray[np.float64],
    offset: npt.NDArray[np.float64],
) -> None:
    """Follow steps (k c,) along q and u with the `residual`, the arrays being those of before and ``G u`` (k, m)."""
    for j in range(residual.shape[0]):
        R, product, step, ones = residual[j], products[j], scale[j], Gu[j // (residual.shape[0] // Gu.shape[0])]
        by_q, by_u = np.float32(change[j]), np.float32(offset[j])
        for i in range(R.shape[0]):
            R[i] -= by_q * ((product[i] - R[i]) / step) + by_u * np.float32(ones[i])


@jit
def refit_groups(
    codes: npt.NDArray[np.float32],
    error: npt.NDArray[Any],
    residual: npt.NDArray[Any],
    Gq: npt.NDArray[Any],
    Gu: npt.NDArray[np.float64],
    rows: npt.NDArray[np.intp],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[Any],
    first: int,
    size: int,
    real: bool,
    half: bool,
    limit: float,
    objective: npt.NDArray[np.float64],
) -> None:
    """Refit the t groups that have some rows (k, s), from the `first` on, and follow with error and objective.

    In these rows, the `residual` (k c, s) is known, and for each group `Gq` (t, k c, s) and `Gu` (k, t, s).
    """
    columns = codes.shape[0] // rows.shape[0]
    q = np.empty(size)
    for j in range(codes.shape[0]):
        chosen, R = rows[j // columns], residual[j]
        for g in range(first, first + Gq.shape[0]):
            start, reached, ones = (g - first) * size, Gq[g - first, j], Gu[j // columns, g - first]
            stop, before, zero = min(start + size, R.shape[0]), np.float64(scale[j, g]), np.float64(zero_point[j, g])
            qR, qGq, uR, uGq, uGu = 0.0, 0.0, 0.0, 0.0, 0.0
            for i in range(start, stop):
                q[i - start] = codes[j, chosen[i]] - zero
                qR += q[i - start] * R[i]
                qGq += q[i - start] * reached[i]
                uR += R[i]
                uGq += reached[i]
                uGu += ones[i]
            scale[j, g], moved = refit(before, zero, qR, qGq, uR, uGq, uGu, real, half, limit)
            if real:
                zero_point[j, g] = moved
            change, offset = scale[j, g] - before, scale[j, g] * (zero - moved)
            objective[j] += change * (change * qGq - 2.0 * qR) + offset * (offset * uGu + 2.0 * change * uGq - 2.0 * uR)
            for i in range(start, stop):
                error[j, chosen[i]] -= change * q[i - start] + offset
            for i in range(stop, R.shape[0]):
                R[i] -= change * reached[i] + offset * ones[i]


@jit
def greedy_keys(
    W: npt.NDArray[np.float32],
    root: npt.NDArray[np.float64],
    room: np.uint64,
    sizes: npt.NDArray[np.float64],
    keys: npt.NDArray[np.uint64],
) -> None:
    """Fill `keys` (k c, m), the bits of `sizes`, with those of ``root |W|``, inverted, and the place of each entry.

    `room` masks the last bits, which are the place; `W` is (k c, m), `root` (k, m).
    """
    for j in range(W.shape[0]):
        size = root[j // (W.shape[0] // root.shape[0])]
        for i in range(W.shape[1]):
            sizes[j, i] = size[i] * np.abs(np.float64(W[j, i]))
        for i in range(W.shape[1]):
            keys[j, i] = (~keys[j, i] & ~room) | np.uint64(i)


@jit
def transpose(values: npt.NDArray[np.float32], made: npt.NDArray[np.float32]) -> None:
    """Fill `made` (k, c, m) with `values` (k, m, c): in squares whose size the compiler knows, and what they leave."""
    problems, rows, columns = values.shape
    below, right = rows - rows % STRIP, columns - columns % STRIP
    for p in range(problems):
        for column in range(0, right, STRIP):
            for row in range(0, below, STRIP):
                for j in range(STRIP):
                    for i in range(STRIP):
                        made[p, column + j, row + i] = values[p, row + i, column + j]
        for i in range(rows):
            for j in range(right if i < below else 0, columns):
                made[p, j, i] = values[p, i, j]


@jit
def mirrored(bits: npt.NDArray[Any], row: int, below: int, column: int, right: int) -> bool:
    """Whether the rows and columns of matrices (b, m, m) from the one to the other are those across the diagonal.

    Matrices are given as the `bits` of their entries, which are compared with any numbers; in squares, as `transpose`.
    """
    last, end = below - (below - row) % SQUARE, right - (right - column) % SQUARE
    for p in range(bits.shape[0]):
        for i in range(row, last, SQUARE):
            for k in range(column, end, SQUARE):
                differing = 0
                for a in range(SQUARE):
                    for b in range(SQUARE):
                        differing |= bits[p, i + a, k + b] ^ bits[p, k + b, i + a]
                if differing:
                    return False
        for i in range(row, below):
            for k in range(end if i < last else column, right):
                if bits[p, i, k] != bits[p, k, i]:
                    return False
    return True


@jit
def mirror(G: npt.NDArray[np.float32], start: int, stop: int) -> None:
    """Copy what is above the diagonal of the matrices of `G` (b, m, m) in some rows to the columns below it."""
    for p in range(G.shape[0]):
        for first in range(start, stop, STRIP):
            last = min(first + STRIP, stop)
            for i in range(first, last):
                for k in range(i + 1, last):
                    G[p, k, i] = G[p, i, k]
            for k in range(last, G.shape[1]):
                for i in range(first, last):
                    G[p, k, i] = G[p, i, k]


@jit
def move_towards(
    values: npt.NDArray[np.float32], limit: npt.NDArray[np.float32], ratio: npt.NDArray[np.float32]
) -> None:
    """Scale the distance of `values` (k c, m) from their `limit` by the `ratio` (k c,) of each column."""
    for j in range(values.shape[0]):
        value, end, share = values[j], limit[j], ratio[j]
        for i in range(value.shape[0]):
            value[i] = end[i] - share * (end[i] - value[i])


@jit
def take_off(values: npt.NDArray[np.float32], other: npt.NDArray[np.float32], share: npt.NDArray[np.float32]) -> None:
    """Take off `values` (k c, m) a `share` (k, m) of others."""
    for j in range(values.shape[0]):
        value, taken, factor = values[j], other[j], share[j // (values.shape[0] // share.shape[0])]
        for i in range(value.shape[0]):
            value[i] -= factor[i] * taken[i]


@jit
def some_columns(values: npt.NDArray[np.float32], columns: npt.NDArray[np.intp], made: npt.NDArray[np.float32]) -> None:
    """Fill `made` (k, m, s) with some columns (s,) of `values` (k, m, c)."""
    for p in range(values.shape[0]):
        for i in range(values.shape[1]):
            value, row = values[p, i], made[p, i]
            for j in range(columns.shape[0]):
                row[j] = value[columns[j]]


@jit
def take_columns(target: npt.NDArray[np.float32], source: npt.NDArray[np.float32], place: npt.NDArray[np.intp]) -> None:
    """Copy columns of an array (k, m, s) into another (k, m, c), each to its `place` (k, s) unless that is -1."""
    for p in range(source.shape[0]):
        for i in range(source.shape[1]):
            here, there, columns = target[p, i], source[p, i], place[p]
            for j in range(columns.shape[0]):
                if columns[j] >= 0:
                    here[columns[j]] = there[j]


@jit
def nearest_codes(
    W: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.float64],
    group: npt.NDArray[np.int32],
    top: np.float32,
    codes: npt.NDArray[np.float32],
) -> None:
    """Fill `codes` (k c, m) with the nearest to `W`, decided in float64: float32 holds 16 bits to 0.004 only.

    `scale` and `zero_point` are (k c, groups), `group` (k, m).
    """
    for j in range(W.shape[0]):
        weight, code, groups = W[j], codes[j], group[j // (W.shape[0] // group.shape[0])]
        if scale.shape[1] == 1:  # alike for all rows, so that it vectorises
            step, offset = scale[j, 0], zero_point[j, 0]
            for i in range(weight.shape[0]):
                code[i] = nearest_code(np.float32(np.rint(np.float64(weight[i]) / step + offset)), top)
        else:
            for i in range(weight.shape[0]):
                step, offset = scale[j, groups[i]], zero_point[j, groups[i]]
                code[i] = nearest_code(np.float32(np.rint(np.float64(weight[i]) / step + offset)), top)


@jit
def real_codes(
    W: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.float64],
    group: npt.NDArray[np.int32],
    digit: float,
    limit: float,
    codes: npt.NDArray[np.float32],
) -> None:
    """Fill `codes` (k c, m) with ``W / scale + zero_point``, all arrays as above, within the `limit`.

    The quotient is in multiples of `digit`. In float64, offsets cancel well; and no tiny scale overflows.
    """
    for j in range(W.shape[0]):
        weight, code, groups = W[j], codes[j], group[j // (W.shape[0] // group.shape[0])]
        for i in range(weight.shape[0]):
            g = groups[i] if scale.shape[1] > 1 else 0
            found = np.rint(np.float64(weight[i]) / scale[j, g] / digit) * digit + zero_point[j, g]
            code[i] = np.float32(min(max(found, -limit), limit))


@jit
def errors(
    W: npt.NDArray[np.float32],
    codes: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.float64],
    group: npt.NDArray[np.int32],
    error: npt.NDArray[np.float32],
) -> None:
    """Fill `error` (k c, m) with ``W - Wq``, all arrays as above."""
    for j in range(W.shape[0]):
        weight, code, left, groups = W[j], codes[j], error[j], group[j // (W.shape[0] // group.shape[0])]
        if scale.shape[1] == 1:
            step, offset = scale[j, 0], zero_point[j, 0]
            for i in range(weight.shape[0]):
                left[i] = left_over(weight[i], np.float64(code[i]), step, offset)
        else:
            for i in range(weight.shape[0]):
                step, offset = scale[j, groups[i]], zero_point[j, groups[i]]
                left[i] = left_over(weight[i], np.float64(code[i]), step, offset)


@jit
def sweep(
    codes: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32],
    G: npt.NDArray[np.float32],
    inverse_diagonal: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    group: npt.NDArray[np.int32],
    order: npt.NDArray[np.int32],
    top: np.float32,
    changed: npt.NDArray[np.int64],
    objective: npt.NDArray[np.float64],
) -> None:
    """Visit every coordinate of every column once, each column in its own order, and set it to its best code.

    `codes` (k c, m), real at first, `residual` (k c, m) = (W - Wq) G and `objective` (k c,) are updated in place;
    `order` (k c, m) holds the rows in the order of their visit; `changed` (k c,) gets the number of codes that end
    elsewhere than plain rounding of `codes` would put them. Only a change costs more than one step, and it waits for
    the next one: until the residual follows both, what the first one changes is taken off each entry that is visited.
    """
    columns, moved, moves = codes.shape[0] // G.shape[0], np.empty(2, np.int64), np.empty(2, np.float32)
    for j in range(codes.shape[0]):
        p, waiting = j // columns, 0
        changed[j] = 0
        for i in order[j]:
            step, old, here = scale[j, group[p, i]], codes[j, i], residual[j, i]
            if waiting:
                here -= moves[0] * G[p, moved[0], i]
            new = nearest_code(best_value(old, here, inverse_diagonal[p, i], step), top)
            if new != old:
                changed[j] += new != nearest_code(old, top)
                codes[j, i] = new
                move = step * (new - old)
                objective[j] += np.float64(move) * (np.float64(move) * G[p, i, i] - 2.0 * np.float64(here))
                moved[waiting], moves[waiting] = i, move
                if waiting:
                    follow(moved, moves, 2, G, p, residual, j)
                waiting = 1 - waiting
        follow(moved, moves, waiting, G, p, residual, j)


@jit
def sweep_rows(
    codes: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32],
    G: npt.NDArray[np.float32],
    inverse_diagonal: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    group: npt.NDArray[np.int32],
    top: np.float32,
    changed: npt.NDArray[np.int64],
    objective: npt.NDArray[np.float64],
) -> None:
    """Make the same sweep from the first row to the last.

    All columns being at the same rows, those of a stretch are decided on for each column with what they change there
    alone, and the rest of its residual follows while these rows of `G` are in the cache. Every entry still sees the
    same changes in the same order.
    """
    columns, m = codes.shape[0] // G.shape[0], codes.shape[1]
    square, here = np.empty((STRETCH, STRETCH), np.float32), np.empty(STRETCH, np.float32)
    step, moved, moves = np.empty(STRETCH, np.float32), np.empty(STRETCH, np.int64), np.empty(STRETCH, np.float32)
    changed[:] = 0
    for p in range(G.shape[0]):
        for start in range(0, m, STRETCH):
            stop = min(start + STRETCH, m)
            rows = stop - start
            inverse, groups = inverse_diagonal[p, start:stop], group[p, start:stop]
            for k in range(rows):
                copy(G[p, start + k, start:stop], square[k, :rows])
            for j in range(p * columns, (p + 1) * columns):
                code, count = codes[j, start:stop], 0
                spread(scale[j], groups, step[:rows])
                copy(residual[j, start:stop], here[:rows])
                i = next_due(code, here, inverse, step, top, np.int32(-1))
                while i < rows:
                    new = nearest_code(best_value(code[i], here[i], inverse[i], step[i]), top)
                    changed[j] += new != nearest_code(code[i], top)
                    move = step[i] * (new - code[i])
                    gain = np.float64(move) * square[i, i] - 2.0 * np.float64(here[i])
                    objective[j] += np.float64(move) * gain
                    code[i] = new
                    for k in range(rows):
                        here[k] -= move * square[i, k]
                    moved[count], moves[count] = start + i, move
                    count += 1
                    i = next_due(code, here, inverse, step, top, i)
                follow(moved, moves, count, G, p, residual, j)


@jit_part
def next_due(
    codes: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32],
    inverse_diagonal: npt.NDArray[np.float32],
    step: npt.NDArray[np.float32],
    top: np.float32,
    row: np.int32,
) -> np.int32:
    """First code after a `row` that is not the best, or `LARGEST`: few are, so that all are looked at side by side."""
    first = LARGEST
    for i in range(codes.shape[0]):
        best = nearest_code(best_value(codes[i], residual[i], inverse_diagonal[i], step[i]), top)
        first = min(first, np.int32(i) if best != codes[i] and np.int32(i) > row else LARGEST)
    return first


@jit
def split_sweep(
    codes: npt.NDArray[np.float32],
    middle: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32],
    G: npt.NDArray[np.float32],
    inverse_diagonal: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    group: npt.NDArray[np.int32],
    half: np.float32,
) -> int:
    """Visit every row of every column, and set its code to the better one of ``middle + half`` and ``middle - half``.

    All arrays are as for `sweep`, with `middle` (k c, m) like the codes. Returns how many codes changed.
    """
    columns, m, changed = codes.shape[0] // G.shape[0], codes.shape[1], 0
    here, moved, moves = np.empty(PANEL, np.float32), np.empty(PANEL, np.int64), np.empty(PANEL, np.float32)
    for p in range(G.shape[0]):
        for start in range(0, m, PANEL):
            rows = min(PANEL, m - start)
            for j in range(p * columns, (p + 1) * columns):
                count = 0
                copy(residual[j, start : start + rows], here[:rows])
                for i in range(rows):
                    row = start + i
                    step, old = scale[j, group[p, row]], codes[j, row]
                    above = best_value(old, here[i], inverse_diagonal[p, row], step) > middle[j, row]
                    new = middle[j, row] + half if above else middle[j, row] - half
                    if new != old:
                        codes[j, row] = new
                        move = step * (new - old)
                        for k in range(rows):
                            here[k] -= move * G[p, row, start + k]
                        moved[count], moves[count] = row, move
                        count += 1
                follow(moved, moves, count, G, p, residual, j)
                changed += count
    return changed


@jit_part
def follow(
    moved: npt.NDArray[np.int64],
    moves: npt.NDArray[np.float32],
    count: int,
    G: npt.NDArray[np.float32],
    p: int,
    residual: npt.NDArray[np.float32],
    j: int,
) -> None:
    """Follow the first `count` of the `moves` of rows that a column j of problem p has `moved` with its `residual`.

    Two at once, lest it be read and written for each of them; every entry sees them in turn all the same.
    """
    for t in range(0, count - 1, 2):
        one, other, by_one, by_other = moved[t], moved[t + 1], moves[t], moves[t + 1]
        for k in range(residual.shape[1]):
            residual[j, k] = residual[j, k] - by_one * G[p, one, k] - by_other * G[p, other, k]
    if count % 2:
        last, by_last = moved[count - 1], moves[count - 1]
        for k in range(residual.shape[1]):
            residual[j, k] -= by_last * G[p, last, k]


@jit_part
def spread(scale: npt.NDArray[np.float32], group: npt.NDArray[np.int32], step: npt.NDArray[np.float32]) -> None:
    """Fill `step` with the scale of each row."""
    if scale.shape[0] == 1:
        step[:] = scale[0]
    else:
        for i in range(group.shape[0]):
            step[i] = scale[group[i]]


@jit_part
def missed(target: np.float32, weight: np.float32, error: np.float32, size: np.float32) -> np.float32:
    """By how much a row misses its target, ``U_ii (target - Wq)``, for the `size` U_ii."""
    return size * (target - weight + error)


@jit
def feedback_pass(
    W: npt.NDArray[np.float32],
    matrix: npt.NDArray[np.float32],
    diagonal: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.float64],
    group: npt.NDArray[np.int32],
    top: np.float32,
    targets: npt.NDArray[np.float32],
    codes: npt.NDArray[np.float32],
    error: npt.NDArray[np.float32],
    price: npt.NDArray[np.float64],
) -> None:
    """Round the rows in turn, each after the feedback ``sum_k U_ki E_k`` of the errors before it, as `feedback` says.

    `W`, `targets`, `codes` and `error` = W - Wq (k, m, c) hold the rows in the order of their visit; `matrix` (k, m, m)
    is ``U.T`` below its diagonal. `diagonal` and `group` (k, m) are U_ii and the group of each row, `scale` and
    `zero_point` are (k, groups, c). `price` (k, c) grows by the square of what each row has `missed`.
    """
    for start in range(0, W.shape[1], PANEL):
        add_feedback(matrix, error, start, targets)
        stop = min(start + PANEL, W.shape[1])
        pass_panel(W, matrix, diagonal, scale, zero_point, group, top, start, stop, targets, codes, error, price)


@jit
def span(start: int, rows: int) -> tuple[int, int]:
    """First of the rows up to `start`, and end of those from it on, that a product brings together before its panel.

    As many panels before it as the largest power of two that divides its number, and as many from it on: every panel
    has then been brought together with all before it when its turn comes, in products as large as they can be (sums are
    kept in the same way in a Fenwick tree). Where `REACH` divides `start`, it is so many rows, and all before them.
    """
    panel = start // PANEL
    if start % REACH == 0:
        return 0, min(start + REACH, rows)
    reach = PANEL * (panel & -panel)
    return start - reach, min(start + reach, rows)


@jit
def add_feedback(
    matrix: npt.NDArray[np.float32], error: npt.NDArray[np.float32], start: int, targets: npt.NDArray[np.float32]
) -> None:
    """Add to `targets` the feedback that is due before the panel at `start`, as `span` says; what was there is lost."""
    first, end = span(start, error.shape[1])
    for p in range(error.shape[0]):
        if start:
            kept = start % REACH > 0
            add_product(matrix[p, start:end, first:start], error[p, first:start], targets[p, start:end], kept)
        else:
            targets[p, :end] = ZERO


@jit_part
def pass_panel(
    W: npt.NDArray[np.float32],
    matrix: npt.NDArray[np.float32],
    diagonal: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.float64],
    group: npt.NDArray[np.int32],
    top: np.float32,
    start: int,
    stop: int,
    targets: npt.NDArray[np.float32],
    codes: npt.NDArray[np.float32],
    error: npt.NDArray[np.float32],
    price: npt.NDArray[np.float64],
) -> None:
    """Round the rows of one panel, all arrays as in `feedback_pass`; their targets come with earlier rows' feedback.

    The innermost loops run over columns.
    """
    for p in range(W.shape[0]):
        for i in range(start, stop):
            step, offset, size = scale[p, group[p, i]], zero_point[p, group[p, i]], diagonal[p, i]
            inverse = ONE / size if size > ZERO else ZERO
            weight, target, code, left = W[p, i], targets[p, i], codes[p, i], error[p, i]
            feed_back(matrix[p], error[p], start, i, target)
            for j in range(weight.shape[0]):
                target[j] = weight[j] + target[j] * inverse
            for j in range(weight.shape[0]):
                code[j] = nearest_code(encoded(np.float64(target[j]), step[j], offset[j]), top)
            for j in range(weight.shape[0]):
                left[j] = left_over(weight[j], np.float64(code[j]), step[j], offset[j])
            total = price[p]
            for j in range(weight.shape[0]):
                miss = np.float64(missed(target[j], weight[j], left[j], size))
                total[j] += miss * miss


@jit
def feed_back(
    matrix: npt.NDArray[np.float32],
    error: npt.NDArray[np.float32],
    start: int,
    row: int,
    target: npt.NDArray[np.float32],
) -> None:
    """Add to the `target` (c,) of a row the feedback of the `error` (m, c) of those before it, from `start` on.

    Four at once, lest the target be read and written for each of them.
    """
    share, k = matrix[row], start
    while k + 4 <= row:
        first, second, third, fourth = error[k], error[k + 1], error[k + 2], error[k + 3]
        by_first, by_second, by_third, by_fourth = share[k], share[k + 1], share[k + 2], share[k + 3]
        for j in range(target.shape[0]):
            near = target[j] + by_first * first[j] + by_second * second[j]
            target[j] = near + by_third * third[j] + by_fourth * fourth[j]
        k += 4
    while k < row:
        last, by_last = error[k], share[k]
        for j in range(target.shape[0]):
            target[j] += by_last * last[j]
        k += 1


@jit
def misses(
    W: npt.NDArray[np.float32],
    error: npt.NDArray[np.float32],
    diagonal: npt.NDArray[np.float32],
    targets: npt.NDArray[np.float32],
) -> None:
    """Put what each row of a pass has `missed` in the place of its `targets`, all arrays as in `feedback_pass`."""
    for p in range(W.shape[0]):
        for i in range(W.shape[1]):
            weight, left, target, size = W[p, i], error[p, i], targets[p, i], diagonal[p, i]
            for j in range(weight.shape[0]):
                target[j] = missed(target[j], weight[j], left[j], size)


@jit
def nearest_rank(target: np.float32, edges: npt.NDArray[np.float32]) -> int:
    """Rank of the nearest of 2**b levels to a `target`, from the edges halfway between those that are neighbours."""
    rank, half = 0, (edges.shape[0] + 1) // 2
    while half:
        rank += half if target > edges[rank + half - 1] else 0
        half //= 2
    return rank


@jit_part
def best_level(level: np.float32, residual: np.float32, inverse_diagonal: np.float32) -> np.float32:
    """Real level with the least error, all others fixed, for the residual (W - Wq) G of its row."""
    return level + residual * inverse_diagonal


@jit
def nearest_levels(
    values: npt.NDArray[np.float32],
    edges: npt.NDArray[np.float32],
    ranked: npt.NDArray[np.uint8],
    group: npt.NDArray[np.int32],
    codes: npt.NDArray[np.uint8],
) -> None:
    """Fill `codes` (k c, m) with those of the nearest levels to `values`.

    `edges` (k c, groups, levels - 1) lie between the levels in order, which the codes `ranked` (k c, groups, levels)
    stand for; `group` is (k, m).
    """
    for j in range(values.shape[0]):
        groups = group[j // (values.shape[0] // group.shape[0])]
        for i in range(values.shape[1]):
            g = groups[i]
            codes[j, i] = ranked[j, g, nearest_rank(values[j, i], edges[j, g])]


@jit
def level_errors(
    W: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    levels: npt.NDArray[np.float32],
    group: npt.NDArray[np.int32],
    error: npt.NDArray[np.float32],
) -> None:
    """Fill `error` (k c, m) with what the levels (k c, groups, levels) of the `codes` leave of `W`."""
    for j in range(W.shape[0]):
        groups = group[j // (W.shape[0] // group.shape[0])]
        for i in range(W.shape[1]):
            error[j, i] = W[j, i] - levels[j, groups[i], codes[j, i]]


@jit
def level_sweep(
    codes: npt.NDArray[np.uint8],
    residual: npt.NDArray[np.float32],
    G: npt.NDArray[np.float32],
    inverse_diagonal: npt.NDArray[np.float32],
    levels: npt.NDArray[np.float32],
    edges: npt.NDArray[np.float32],
    ranked: npt.NDArray[np.uint8],
    group: npt.NDArray[np.int32],
    changed: npt.NDArray[np.int64],
    objective: npt.NDArray[np.float64],
) -> None:
    """Visit every coordinate of every column once, and set it to the best of its group's levels, all else fixed.

    As `sweep_rows`, with any `levels` (k c, groups, levels), of the codes 0, 1 and so on, in place of a scale. A move
    that does not lower the objective in double precision is not made.
    """
    columns, m = codes.shape[0] // G.shape[0], codes.shape[1]
    square, here = np.empty((PANEL, PANEL), np.float32), np.empty(PANEL, np.float32)
    moved, moves = np.empty(PANEL, np.int64), np.empty(PANEL, np.float32)
    changed[:] = 0
    for p in range(G.shape[0]):
        for start in range(0, m, PANEL):
            rows = min(PANEL, m - start)
            for i in range(rows):
                copy(G[p, start + i, start : start + rows], square[i, :rows])
            for j in range(p * columns, (p + 1) * columns):
                count = 0
                copy(residual[j, start : start + rows], here[:rows])
                for i in range(rows):
                    g, old = group[p, start + i], codes[j, start + i]
                    target = best_level(levels[j, g, old], here[i], inverse_diagonal[p, start + i])
                    new = ranked[j, g, nearest_rank(target, edges[j, g])]
                    if new == old:
                        continue
                    move = levels[j, g, new] - levels[j, g, old]
                    gain = np.float64(move) * (np.float64(move) * square[i, i] - 2.0 * np.float64(here[i]))
                    if gain < 0.0:
                        changed[j] += 1
                        codes[j, start + i] = new
                        objective[j] += gain
                        for k in range(rows):
                            here[k] -= move * square[i, k]
                        moved[count], moves[count] = start + i, move
                        count += 1
                follow(moved, moves, count, G, p, residual, j)


@jit
def level_pass(
    W: npt.NDArray[np.float32],
    matrix: npt.NDArray[np.float32],
    diagonal: npt.NDArray[np.float32],
    levels: npt.NDArray[np.float32],
    edges: npt.NDArray[np.float32],
    ranked: npt.NDArray[np.uint8],
    group: npt.NDArray[np.int32],
    targets: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    error: npt.NDArray[np.float32],
    price: npt.NDArray[np.float64],
) -> None:
    """Round the rows in turn to the nearest of any levels, as `feedback_pass` does to codes on a grid.

    `levels`, `edges` and `ranked` are (k, c, groups, ...), as for `level_sweep`; all else is as in `feedback_pass`.
    """
    for start in range(0, W.shape[1], PANEL):
        add_feedback(matrix, error, start, targets)
        stop = min(start + PANEL, W.shape[1])
        for p in range(W.shape[0]):
            for i in range(start, stop):
                g, size = group[p, i], diagonal[p, i]
                inverse = ONE / size if size > ZERO else ZERO
                weight, target, code, left, total = W[p, i], targets[p, i], codes[p, i], error[p, i], price[p]
                feed_back(matrix[p], error[p], start, i, target)
                for j in range(weight.shape[0]):
                    target[j] = weight[j] + target[j] * inverse
                    code[j] = ranked[p, j, g, nearest_rank(target[j], edges[p, j, g])]
                    level = levels[p, j, g, code[j]]
                    left[j] = weight[j] - level
                    miss = size * (target[j] - level)
                    total[j] += np.float64(miss) * np.float64(miss)


@jit
def paths_panel(
    W: npt.NDArray[np.float32],
    targets: npt.NDArray[np.float32],
    feedback: npt.NDArray[np.float32],
    pivots: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.float64],
    group: npt.NDArray[np.int32],
    top: np.float32,
    price: npt.NDArray[np.float64],
    origin: npt.NDArray[np.int64],
    codes: npt.NDArray[np.float32],
    error: npt.NDArray[np.float32],
) -> None:
    """Round the rows of one panel in turn, in the ways that cost the least so far: the K-best, or M-, algorithm.

    Like `pass_panel` for several paths a column, with the rows last: `W` is (k c, rows), `scale` and `zero_point` (k c,
    groups), `targets`, `codes` and `error` are (k c, paths, rows). `price` (k c, paths), infinite where there is no
    path yet, grows by ``pivots[p, i] * (target - Wq)**2``; every row leaves the cheapest paths, the cheapest first, and
    `origin` (k c, paths) is filled with what they were before the panel.
    """
    paths, rows = targets.shape[1:]
    now, after = np.empty((paths, rows), np.float32), np.empty((paths, rows), np.float32)
    parent, chosen = np.empty((rows, paths), np.int64), np.empty((rows, paths), np.float32)
    left = np.empty((rows, paths), np.float32)
    wanted, offer, paid = np.empty(paths), np.empty(paths), np.empty(paths)
    code, below, above = np.empty(paths, np.float32), np.empty(paths, np.float32), np.empty(paths, np.float32)
    columns = W.shape[0] // feedback.shape[0]
    for j in range(W.shape[0]):
        for p in range(paths):
            copy(targets[j, p], now[p])
        share = feedback[j // columns]
        for i in range(rows):
            g = group[j // columns, i]
            step, offset = scale[j, g], zero_point[j, g]
            unit = pivots[j // columns, i] * np.float64(step) * np.float64(step)
            for p in range(paths):
                wanted[p] = np.float64(now[p, i]) / step + offset
                code[p] = nearest_code(np.float32(wanted[p]), top)
                below[p], above[p] = code[p] - ONE, code[p] + ONE
                offer[p] = price[j, p] + unit * (wanted[p] - code[p]) ** 2
            for p in range(paths):
                least, best = np.inf, 0
                for other in range(paths):
                    least = min(least, offer[other])
                while offer[best] > least:
                    best += 1
                parent[i, p], chosen[i, p], paid[p] = best, code[best], offer[best]
                miss = left_over(W[j, i], np.float64(code[best]), step, offset)
                left[i, p] = miss
                for k in range(rows):  # from 0, where the feedback is of no use: else numba does not vectorise it
                    after[p, k] = now[best, k] + share[i, k] * miss
                # That path's next offer is its next nearest code; of a dead row, no code is worth another path.
                code[best] = nearer(wanted[best], below[best], above[best], top)
                above[best] += code[best] == above[best]
                below[best] -= code[best] == below[best]
                offer[best] = price[j, best] + unit * (wanted[best] - code[best]) ** 2
                if unit == 0 or code[best] < ZERO:
                    offer[best] = np.inf
            copy(paid, price[j])
            now, after = after, now
        trace(parent, chosen, left, codes[j], error[j], origin[j])


@jit_part
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
def moved_zero(zero_point: float, factor: np.float32, shift: float, middle: float, whole: bool) -> float:
    """Zero point of a candidate, as `grid_errors` says."""
    if middle < 0.0:
        return zero_point
    moved = middle - (middle - zero_point) / np.float64(factor) + shift
    return np.rint(moved) if whole else moved


@jit_sums
def grid_errors(
    values: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    group_size: int,
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.float64],
    factors: npt.NDArray[np.float32],
    shifts: npt.NDArray[np.float64],
    middle: float,
    whole: bool,
    top: np.float32,
    errors: npt.NDArray[np.float32],
) -> None:
    """Weighted squared rounding error of each group of `values` (k c, m) on each candidate around its grid.

    A group is `group_size` successive entries. `scale` and `zero_point` are (k c, groups), `factors` and `shifts`
    (candidates,), `errors` (k c, groups, candidates), and `weight` is (k, m). A candidate has the scale times its
    factor, and the zero point as far from the `middle` over its factor, shifted, and rounded if `whole`; with a
    negative `middle` the zero point stays. The errors are in units of its squared scale, so that weights of any size
    neither overflow nor vanish.
    """
    columns = values.shape[0] // weight.shape[0]
    for j in range(values.shape[0]):
        for g in range(errors.shape[1]):
            value = values[j, g * group_size : (g + 1) * group_size]
            share = weight[j // columns, g * group_size : (g + 1) * group_size]
            for s in range(errors.shape[2]):
                inverse, error = ONE / (scale[j, g] * factors[s]), ZERO
                offset = np.float32(moved_zero(zero_point[j, g], factors[s], shifts[s], middle, whole))
                for i in range(value.shape[0]):
                    wanted = value[i] * inverse
                    missed = wanted - (np.rint(min(max(wanted + offset, ZERO), top)) - offset)
                    error += share[i] * missed * missed
                errors[j, g, s] = error


@jit_sums
def dots(first: npt.NDArray[Any], second: npt.NDArray[Any], total: npt.NDArray[np.float64]) -> None:
    """Add the products of the rows of two arrays (n, m) to `total` (n,)."""
    for j in range(first.shape[0]):
        one, other, sums = first[j], second[j], 0.0
        for i in range(one.shape[0]):
            sums += np.float64(one[i]) * np.float64(other[i])
        total[j] += sums


@jit_sums
def squares(values: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], total: npt.NDArray[np.float64]) -> None:
    """Fill `total` (k c,) with the sum of the squares of each row of `values` (k c, m), weighted by `weight` (k, m)."""
    for j in range(values.shape[0]):
        value, share, sums = values[j], weight[j // (values.shape[0] // weight.shape[0])], 0.0
        for i in range(value.shape[0]):
            sums += np.float64(share[i]) * np.float64(value[i]) * np.float64(value[i])
        total[j] = sums


@jit_part
def ordered(bits: np.int32) -> np.int32:
    """Integer that is in the order of the float32 with these bits: minima of integers vectorise, of floats not."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & LARGEST))  # numba widens what operators give


@jit_part
def first_of(cost: npt.NDArray[np.int32], bits: np.int32) -> np.int32:
    """First index of a `cost`, both given as the bits of float32."""
    first = LARGEST
    for i in range(cost.shape[0]):
        first = min(first, np.int32(i) if cost[i] == bits else LARGEST)
    return first


@jit
def tabu_search(
    codes: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32],
    G: npt.NDArray[np.float32],
    alive: npt.NDArray[np.bool_],
    step: npt.NDArray[np.float32],
    top: np.float32,
    moves: int,
    changed: npt.NDArray[np.int64],
    objective: npt.NDArray[np.float64],
) -> None:
    """Go down to a local minimum of every column and leave it: make the cheapest step of one code, even uphill.

    A code that has just moved rests for some moves, which leads away from the minimum. `step` (k c, m) is the scale of
    each row and `alive` (k, m) says which rows matter. `codes` and `residual` (k c, m) end as the best found, and
    `objective` (k c,) follows; `changed` (k c,) gets the number of codes that end elsewhere.
    """
    m, columns = codes.shape[1], codes.shape[0] // G.shape[0]
    slope, pull, best_pull = np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m, np.float32)
    curvature, rise, fall = np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m, np.float32)
    cost, first, best_codes = np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m, np.float32)
    bits, resting = cost.view(np.int32), np.empty(LONGEST_REST, np.int64)
    for j in range(codes.shape[0]):
        p = j // columns
        live, unit = 0, ZERO  # prices in the square of the largest step neither overflow nor vanish
        for i in range(m):
            live += alive[p, i]
            unit = max(unit, step[j, i])
        shortest, longest = min(5, max(1, live // 4)), min(LONGEST_REST, live // 2 + 2)
        for i in range(m):
            size = step[j, i] / unit
            slope[i] = np.float32(2.0) * size
            pull[i] = slope[i] * (residual[j, i] / unit)
            curvature[i] = size * size * G[p, i, i]
            rise[i] = curvature[i] if alive[p, i] and codes[j, i] < top else NEVER
            fall[i] = curvature[i] if alive[p, i] and codes[j, i] > ZERO else NEVER
        least = repriced(pull, cost, bits, slope, slope, rise, fall, ZERO)
        copy(codes[j], first)
        resting[:] = -1
        now, best, state = 0.0, np.inf, 1  # the same pseudo-random rests for every column
        for t in range(moves):
            i = int(first_of(bits, ordered(least)))
            if not cost[i] < NEVER:
                break
            if cost[i] >= ZERO and now < best:  # the best so far, if it goes up from here
                best = now
                copy(codes[j], best_codes)
                copy(pull, best_pull)
            now += np.float64(cost[i])
            change = ONE if rise[i] - pull[i] <= cost[i] else -ONE
            codes[j, i] += change
            # The length of the rest varies from move to move, lest the search runs in circles.
            rested = resting[t % LONGEST_REST]
            if rested >= 0:
                rise[rested] = curvature[rested] if codes[j, rested] < top else NEVER
                fall[rested] = curvature[rested] if codes[j, rested] > ZERO else NEVER
            rise[i], fall[i] = NEVER, NEVER
            resting[t % LONGEST_REST] = -1
            state = (state * 1103515245 + 12345) % 2147483648
            rest(resting, i, t + shortest + (state >> 16) % (longest - shortest))
            least = repriced(pull, cost, bits, G[p, i], slope, rise, fall, step[j, i] / unit * change)
        if best < now:
            now = best
            copy(best_codes, codes[j])
            copy(best_pull, pull)
        changed[j] = 0
        for i in range(m):
            changed[j] += codes[j, i] != first[i]
            residual[j, i] = pull[i] / slope[i] * unit
        objective[j] += now * np.float64(unit) * np.float64(unit)


@jit_part
def rest(resting: npt.NDArray[np.int64], row: int, until: int) -> None:
    """Let a row rest until about that move: `resting` has one for each of the next moves, or -1."""
    due = until % LONGEST_REST
    while resting[due] >= 0:
        due = (due + 1) % LONGEST_REST
    resting[due] = row


@jit_part
def repriced(
    pull: npt.NDArray[np.float32],
    cost: npt.NDArray[np.float32],
    bits: npt.NDArray[np.int32],
    G: npt.NDArray[np.float32],
    slope: npt.NDArray[np.float32],
    rise: npt.NDArray[np.float32],
    fall: npt.NDArray[np.float32],
    move: np.float32,
) -> np.int32:
    """Follow a move of a row with this row of `G`; the least `cost` then, `ordered`. `bits` are those of the costs."""
    least = LARGEST
    for k in range(pull.shape[0]):
        pull[k] -= move * slope[k] * G[k]
        cost[k] = min(rise[k] - pull[k], fall[k] + pull[k])  # of a step up or down by one
    for k in range(pull.shape[0]):
        least = min(least, ordered(bits[k]))
    return least


@jit
def level_tabu(
    codes: npt.NDArray[np.uint8],
    residual: npt.NDArray[np.float32],
    G: npt.NDArray[np.float32],
    alive: npt.NDArray[np.bool_],
    levels: npt.NDArray[np.float32],
    ranked: npt.NDArray[np.uint8],
    group: npt.NDArray[np.int32],
    moves: int,
    changed: npt.NDArray[np.int64],
    objective: npt.NDArray[np.float64],
) -> None:
    """Make the search of `tabu_search` with any levels: a step goes to the next one above or below.

    `levels` and `ranked` (k c, groups, levels) are as for `level_sweep`, all else as in `tabu_search`.
    """
    m, columns, top = codes.shape[1], codes.shape[0] // G.shape[0], levels.shape[2] - 1
    pull, best_pull, cost = np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m, np.float32)
    steps, prices = np.zeros((2, m), np.float32), np.empty((2, m), np.float32)
    rank, first, best_rank = np.empty(m, np.int64), np.empty(m, np.int64), np.empty(m, np.int64)
    values = np.empty((levels.shape[1], top + 1), np.float32)
    bits, resting = cost.view(np.int32), np.empty(LONGEST_REST, np.int64)
    for j in range(codes.shape[0]):
        p = j // columns
        unit, live = in_order(levels[j], ranked[j], values), 0  # prices in its square neither overflow nor vanish
        if not unit > ZERO:
            continue
        for i in range(m):
            live += alive[p, i]
            rank[i] = rank_of(codes[j, i], ranked[j, group[p, i]])
            pull[i] = residual[j, i] / unit
            price(i, rank[i], values[group[p, i]], G[p, i, i], alive[p, i], steps, prices)
        shortest, longest = min(5, max(1, live // 4)), min(LONGEST_REST, live // 2 + 2)
        least = level_prices(pull, cost, bits, G[p, 0], steps, prices, ZERO)
        copy(rank, first)
        resting[:] = -1
        now, best, state = 0.0, np.inf, 1
        for t in range(moves):
            i = int(first_of(bits, ordered(least)))
            if not cost[i] < NEVER:
                break
            if cost[i] >= ZERO and now < best:  # the best so far, if it goes up from here
                best = now
                copy(rank, best_rank)
                copy(pull, best_pull)
            now += np.float64(cost[i])
            up = prices[0, i] - steps[0, i] * pull[i] <= cost[i]
            value, before = values[group[p, i]], rank[i]
            rank[i] += 1 if up else -1
            rested = resting[t % LONGEST_REST]
            if rested >= 0:
                price(rested, rank[rested], values[group[p, rested]], G[p, rested, rested], True, steps, prices)
            price(i, rank[i], value, G[p, i, i], False, steps, prices)
            resting[t % LONGEST_REST] = -1
            state = (state * 1103515245 + 12345) % 2147483648
            rest(resting, i, t + shortest + (state >> 16) % (longest - shortest))
            least = level_prices(pull, cost, bits, G[p, i], steps, prices, value[rank[i]] - value[before])
        if best < now:
            now = best
            copy(best_rank, rank)
            copy(best_pull, pull)
        changed[j] = 0
        for i in range(m):
            changed[j] += rank[i] != first[i]
            codes[j, i] = ranked[j, group[p, i], rank[i]]
            residual[j, i] = pull[i] * unit
        objective[j] += now * np.float64(unit) * np.float64(unit)


@jit
def in_order(
    levels: npt.NDArray[np.float32], ranked: npt.NDArray[np.uint8], values: npt.NDArray[np.float32]
) -> np.float32:
    """Fill `values` with the levels (groups, levels) in order, in units of the widest step, which is returned."""
    unit, top = ZERO, levels.shape[1] - 1
    for g in range(levels.shape[0]):
        for r in range(top):
            unit = max(unit, levels[g, ranked[g, r + 1]] - levels[g, ranked[g, r]])
    for g in range(levels.shape[0]):
        for r in range(top + 1):
            values[g, r] = levels[g, ranked[g, r]] / unit
    return unit


@jit
def rank_of(code: np.uint8, ranked: npt.NDArray[np.uint8]) -> int:
    """Rank of the level of a code."""
    rank = 0
    while ranked[rank] != code:
        rank += 1
    return rank


@jit
def price(
    row: int,
    rank: int,
    values: npt.NDArray[np.float32],
    diagonal: np.float32,
    free: bool,
    steps: npt.NDArray[np.float32],
    prices: npt.NDArray[np.float32],
) -> None:
    """Put in the steps of a row to the levels above and below, twice their size, and what they cost by themselves."""
    for way in range(2):
        other = rank + 1 if way == 0 else rank - 1
        there = free and 0 <= other < values.shape[0]
        size = abs(values[other] - values[rank]) if there else ZERO
        steps[way, row] = np.float32(2.0) * size
        prices[way, row] = size * size * diagonal if there else NEVER


@jit_part
def level_prices(
    pull: npt.NDArray[np.float32],
    cost: npt.NDArray[np.float32],
    bits: npt.NDArray[np.int32],
    G: npt.NDArray[np.float32],
    steps: npt.NDArray[np.float32],
    prices: npt.NDArray[np.float32],
    move: np.float32,
) -> np.int32:
    """Follow a move of a row with this row of `G`; the least `cost` then, `ordered`. `bits` are those of the costs."""
    least = LARGEST
    up, down, rise, fall = steps[0], steps[1], prices[0], prices[1]
    for k in range(pull.shape[0]):
        pull[k] -= move * G[k]
        cost[k] = min(rise[k] - up[k] * pull[k], fall[k] + down[k] * pull[k])
    for k in range(pull.shape[0]):
        least = min(least, ordered(bits[k]))
    return least
