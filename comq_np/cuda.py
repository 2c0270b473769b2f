"""The CUDA kernels: the only module that imports `numba.cuda`.

Arrays on the device are (b, m, n), n columns of b problems, rows in the order of their visit; a matrix is (b, m, m).
What has one value a column is (b n, ...), as on the host. A column is one thread of a pass, whose loop runs over the
rows that all columns visit together, and one block of a sweep, whose threads look for the next row that moves. The
scalar rules are those of `kernels`. Sweeps, passes and tabu searches have no double precision in them; the sums that
judge them have nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import config, cuda, float32, float64, from_dtype, int32, int64, types, uint8

from comq_np import kernels
from comq_np.kernels import LONGEST_REST, NEVER, ZERO

#: The library itself, for what is no kernel.
toolkit: Any = cuda
#: The simulator runs every thread of a block in Python: there, blocks are small.
SIMULATED = bool(config.ENABLE_CUDASIM)
#: Threads of a block where each has a column, and where they share the columns of a row.
COLUMNS, ROW = (2, 2) if SIMULATED else (64, 128)
#: Threads, a column each, of a block of a pass.
NARROW = 2 if SIMULATED else 32
#: Rows of a panel, which a thread holds in registers, and rows of a block of a pass, between two products.
PANEL, REACH = (4, 16) if SIMULATED else (8, 128)
#: Threads along a side of a tile of a product, entries of each of them along it, and terms that they go on by.
ACROSS, EACH, DEPTH = (2, 4, 4) if SIMULATED else (16, 4, 16)
SIDE, THREADS = ACROSS * EACH, ACROSS * ACROSS
#: Rows of a corner of a factor, in single and in double precision.
CORNER = dict(zip((np.dtype(np.float32), np.dtype(np.float64)), (8, 4) if SIMULATED else (64, 32), strict=True))
#: Threads and rows of each of them, in kernels that have a block for each column: the first pair that holds all rows.
SIZES = ((2, 4), (4, 16)) if SIMULATED else ((32, 1), (32, 4), (128, 4), (128, 8), (256, 16), (512, 16), (512, 32))
#: Grids that a thread tries at a time.
TRIALS = 4
#: Most problems of a batch: what a grid of blocks takes along its second side.
MOST_PROBLEMS = 2**16 - 1
#: Most rows of a problem.
MOST_ROWS = math.prod(SIZES[-1])
#: Most entries of a residual that is in the memory which a block shares: 32 KiB of 48.
MOST_SHARED = 2**13
#: Zero points further from 0 leave too little of a code in single precision: 1 / 64.
MOST_ZERO_POINT = 2**18
#: Most rows of a problem that a tabu search is made in: it holds the pull of each beside its code.
MOST_TABU = 4096
#: Rows of a partial sum.
CHUNK = 512
#: Place of a row that is visited no more.
NOWHERE = np.int32(2**31 - 1)
#: Larger than what any step is ranked by.
LAST = np.int64(2**63 - 1)
ONE, TWO = np.float32(1.0), np.float32(2.0)
#: Rounds a float64 as `kernels.ROUNDER` does a float32.
DOUBLE_ROUNDER = 6755399441055744.0


def _on_device(rule: Callable[..., Any]) -> Any:
    """Scalar rule of `kernels` as a device function."""
    return cuda.jit(device=True, inline="always")(getattr(rule, "py_func", rule))


nearest_code = _on_device(kernels.nearest_code)
best_value = _on_device(kernels.best_value)
encoded = _on_device(kernels.encoded)
left_over = _on_device(kernels.left_over)
ordered = _on_device(kernels.ordered)


def rows_and_places(m: int) -> tuple[int, int]:
    """Threads, and rows of each of them, that hold the rows of a column."""
    return next(size for size in SIZES if math.prod(size) >= m)


@functools.cache
def sweep(threads: int, slots: int, own_order: bool, grouped: bool) -> Any:
    """Kernel that visits every coordinate of a column once: a block for each.

    The residual is in the order of the visit, `order` (b n, m) with `own_order`, else from the first row to the last.
    All threads look at the next rows, as many as they are; the first of these that moves does, one row of `G` is read,
    and they go on behind it. So the cost follows the number of moves.
    """
    together = threads * slots <= MOST_SHARED  # else each thread keeps its own, in its local memory
    room, spare = (threads * slots, 1) if together else (1, slots)

    @cuda.jit
    def kernel(codes, residual, G, inverse_diagonal, scale, group, order, top, changed):  # type: ignore[no-untyped-def]
        first = cuda.shared.array(2, int32)
        moved = cuda.shared.array(1, int32)
        moves = cuda.shared.array(1, float32)
        left = cuda.shared.array(room, float32)
        own = cuda.local.array(spare, float32)
        m, n = int32(codes.shape[1]), codes.shape[2]
        t = int32(cuda.threadIdx.x)
        p, j = cuda.blockIdx.x // n, cuda.blockIdx.x % n
        column = cuda.blockIdx.x
        for place in range(t, m, threads):
            i = order[column, place] if own_order else int32(place)
            if together:
                left[place] = residual[p, i, j]
            else:
                own[place // threads] = residual[p, i, j]
        if t < 2:
            first[t] = NOWHERE
        cuda.syncthreads()
        start, turn, count, held = int32(0), int32(0), int32(0), int32(-1)
        i, old, inverse, size = int32(0), ZERO, ZERO, ONE
        while start < m:
            place = start + (t + threads - start % threads) % threads
            moving, new = False, ZERO
            if place < m:
                if place != held:
                    i = order[column, place] if own_order else int32(place)
                    held, old, inverse = place, codes[p, i, j], inverse_diagonal[p, i]
                    size = scale[column, group[p, i]] if grouped else scale[column, 0]
                value = left[place] if together else own[place // threads]
                new = nearest_code(best_value(old, value, inverse, size), top)
                moving = new != old
            if moving:
                cuda.atomic.min(first, turn, place)
            cuda.syncthreads()
            found = first[turn]
            if moving and found == place:
                codes[p, i, j] = new
                moved[0], moves[0] = i, size * (new - old)
                count += int32(new != nearest_code(old, top))
            if t == 0:
                first[1 - turn] = NOWHERE
            cuda.syncthreads()
            turn = int32(1) - turn
            if found == NOWHERE:
                start += int32(threads)
            else:
                start = found + int32(1)
                row, move = moved[0], moves[0]
                for place in range(t, m, threads):
                    k = order[column, place] if own_order else int32(place)
                    if together:
                        left[place] -= move * G[p, row, k]
                    else:
                        own[place // threads] -= move * G[p, row, k]
        for place in range(t, m, threads):
            i = order[column, place] if own_order else int32(place)
            residual[p, i, j] = left[place] if together else own[place // threads]
        cuda.atomic.add(changed, column, count)

    return kernel


@functools.cache
def tabu(threads: int, slots: int, grouped: bool) -> Any:
    """Kernel of the tabu search of `kernels.tabu_search`: a block for each column."""

    @cuda.jit
    def kernel(codes, residual, G, alive, live, scale, unit, group, top, moves):  # type: ignore[no-untyped-def]
        least = cuda.shared.array(2, int64)
        resting = cuda.shared.array(LONGEST_REST, int32)
        chosen = cuda.shared.array(2, float32)
        free = cuda.shared.array(1, int32)
        code = cuda.local.array(slots, float32)
        pull = cuda.local.array(slots, float32)
        bits = cuda.local.array(1, float32)
        m, n = codes.shape[1], codes.shape[2]
        t = cuda.threadIdx.x
        p, j = cuda.blockIdx.x // n, cuda.blockIdx.x % n
        column = cuda.blockIdx.x
        whole = unit[column]
        shortest, longest = min(5, max(1, live[p] // 4)), min(LONGEST_REST, live[p] // 2 + 2)
        for s in range(slots):
            i = t + s * threads
            code[s], pull[s] = ZERO, ZERO
            if i < m:
                size = scale[column, group[p, i]] / whole if grouped else ONE
                code[s], pull[s] = codes[p, i, j], TWO * size * (residual[p, i, j] / whole)
        if t < 2:
            least[t] = LAST
        for k in range(t, LONGEST_REST, threads):
            resting[k] = -1
        cuda.syncthreads()
        rests = int32(0)  # a bit for each row of this thread
        now, lost, best, best_lost = ZERO, ZERO, NEVER, ZERO
        state, turn = int64(1), 0
        for number in range(moves):
            own, cheapest, up = LAST, NEVER, ONE
            for s in range(slots):
                i = t + s * threads
                if i < m and alive[p, i] and not (rests >> s) & 1:
                    size = scale[column, group[p, i]] / whole if grouped else ONE
                    bend = size * size * G[p, i, i]
                    rise = bend - pull[s] if code[s] < top else NEVER
                    fall = bend + pull[s] if code[s] > ZERO else NEVER
                    bits[0] = min(rise, fall)
                    key = (int64(ordered(bits.view(np.int32)[0])) << 32) + i
                    if key < own:
                        own, cheapest = key, bits[0]
                        up = ONE if rise <= fall else -ONE
            if cheapest < NEVER:
                cuda.atomic.min(least, turn, own)
            cuda.syncthreads()
            key = least[turn]
            if key == LAST:
                break
            i = int32(key & 0xFFFFFFFF)
            if own == key:
                chosen[0], chosen[1] = cheapest, up
            if t == 0:
                least[1 - turn] = LAST
                free[0] = resting[number % LONGEST_REST]
                resting[number % LONGEST_REST] = -1
                state = (state * 1103515245 + 12345) % 2147483648
                due = (number + shortest + (state >> 16) % (longest - shortest)) % LONGEST_REST
                while resting[due] >= 0:
                    due = (due + 1) % LONGEST_REST
                resting[due] = i
            cuda.syncthreads()
            cost, change, rested = chosen[0], chosen[1], free[0]
            if cost >= ZERO and (now < best or (now == best and lost < best_lost)):
                best, best_lost = now, lost
                for s in range(slots):
                    k = t + s * threads
                    if k < m:
                        codes[p, k, j], residual[p, k, j] = code[s], pull[s]
            total = now + cost  # in two numbers, the sum and what rounding it loses
            apart = total - now
            lost += (now - (total - apart)) + (cost - apart)
            now = total + lost
            lost -= now - total
            size = scale[column, group[p, i]] / whole if grouped else ONE
            move = size * change
            for s in range(slots):
                k = t + s * threads
                if k < m:
                    if k == i:
                        rests |= int32(1) << s
                        code[s] += change
                    if k == rested:
                        rests &= ~(int32(1) << s)
                    slope = TWO * scale[column, group[p, k]] / whole if grouped else TWO
                    pull[s] -= move * slope * G[p, i, k]
            turn = 1 - turn
        stays = now < best or (now == best and lost <= best_lost)
        for s in range(slots):
            k = t + s * threads
            if k < m:
                slope = TWO * scale[column, group[p, k]] / whole if grouped else TWO
                if stays:
                    codes[p, k, j], residual[p, k, j] = code[s], pull[s]
                residual[p, k, j] = residual[p, k, j] / slope * whole

    return kernel


@cuda.jit
def order_rows(W, size, order):  # type: ignore[no-untyped-def]
    """Rows of each column by descending ``size |w|``, (b n, m): a block for each column counts those before a row."""
    keys = cuda.shared.array(ROW, float64)
    m, n = W.shape[1], W.shape[2]
    p, j, t = cuda.blockIdx.x // n, cuda.blockIdx.x % n, cuda.threadIdx.x
    for base in range(0, m, ROW):
        i, place, own = base + t, int32(0), 0.0
        if i < m:
            own = size[p, i] * abs(float64(W[p, i, j]))
        for start in range(0, m, ROW):
            if start + t < m:
                keys[t] = size[p, start + t] * abs(float64(W[p, start + t, j]))
            cuda.syncthreads()
            for k in range(min(ROW, m - start)):
                place += int32(keys[k] > own or (keys[k] == own and start + k < i))
            cuda.syncthreads()
        if i < m:
            order[cuda.blockIdx.x, place] = i


@functools.cache
def visit(grouped: bool) -> Any:
    """Kernel that rounds rows in turn, each after the feedback of the errors before it: `kernels.pass_panel`.

    A thread for each column, a row of blocks for each problem, from row `start` to `stop`, at most `REACH` of them. The
    targets come with the feedback of the rows before `start`.
    """

    @cuda.jit
    def kernel(W, feedback, diagonal, scale, offset, group, top, start, stop, targets, codes, error, missed):  # type: ignore[no-untyped-def]
        strip = cuda.shared.array((REACH, PANEL), float32)  # of the feedback, with the rows of the panel last
        held = cuda.shared.array((REACH, NARROW), float32)  # errors, each column's own
        sizes = cuda.shared.array(PANEL, float32)
        target = cuda.local.array(PANEL, float32)
        weight = cuda.local.array(PANEL, float32)
        t, p = cuda.threadIdx.x, cuda.blockIdx.y
        n = W.shape[2]
        j = cuda.blockIdx.x * NARROW + t
        inside = j < n
        j = min(j, n - 1)
        column = p * n + j
        step, zero = scale[column, 0], offset[column, 0]
        for panel in range(start, stop, PANEL):
            for r in range(PANEL):  # all loads before what depends on them
                i = min(panel + r, stop - 1)
                target[r], weight[r] = targets[p, i, j], W[p, i, j]
            for r in range(t, PANEL, NARROW):
                sizes[r] = diagonal[p, panel + r] if panel + r < stop else ZERO
            for k in range(t, (panel + PANEL - start) * PANEL, NARROW):
                r, before = k // (panel + PANEL - start), k % (panel + PANEL - start)
                present = panel + r < stop and start + before < stop
                strip[before, r] = feedback[p, panel + r, start + before] if present else ZERO
            cuda.syncthreads()
            for k in range(panel - start):
                left = held[k, t]
                for r in range(PANEL):
                    target[r] += strip[k, r] * left
            for r in range(PANEL):
                i = panel + r
                if i < stop:
                    if grouped:
                        step, zero = scale[column, group[p, i]], offset[column, group[p, i]]
                    size = sizes[r]
                    inverse = ONE / size if size > ZERO else ZERO
                    wanted = weight[r] + target[r] * inverse
                    code = nearest_code(encoded(wanted, step, zero), top)
                    left = left_over(weight[r], code, step, zero)
                    if inside:
                        targets[p, i, j], codes[p, i, j], error[p, i, j] = wanted, code, left
                        missed[p, i, j] = size * (wanted - weight[r] + left)
                    held[i - start, t] = left
                    for k in range(r + 1, PANEL):
                        target[k] += strip[i - start, k] * left
            cuda.syncthreads()

    return kernel


@functools.cache
def product(dtype: np.dtype[Any], flip: bool) -> Any:
    """Kernel for ``C = (C if keep) + sign * A @ B`` of parts of arrays, in tiles; with `flip`, A.T in the place of A.

    ``C[p, c0 : c0 + rows]`` gets the product of ``A[p, a0 : a0 + rows, k]``, or ``A[p, k, a0 : a0 + rows]`` with
    `flip`, and ``B[p, k, :columns]``, with k from `k0` to ``k0 + inner``.
    """
    real, padded = from_dtype(dtype), SIDE + 1  # lest threads of a warp write to one bank

    @cuda.jit
    def kernel(A, B, C, a0, k0, c0, rows, inner, columns, sign, keep):  # type: ignore[no-untyped-def]
        left = cuda.shared.array((DEPTH, padded), real)
        right = cuda.shared.array((DEPTH, SIDE), real)
        total = cuda.local.array((EACH, EACH), real)
        t, p = cuda.threadIdx.x, cuda.blockIdx.z
        i0, j0 = cuda.blockIdx.y * SIDE, cuda.blockIdx.x * SIDE
        across, down = t % ACROSS, t // ACROSS
        for a in range(EACH):
            for b in range(EACH):
                total[a, b] = real(0)
        for start in range(0, inner, DEPTH):
            for u in range(t, DEPTH * SIDE, THREADS):
                if flip:
                    k, i = u // SIDE, u % SIDE
                    inside = start + k < inner and i0 + i < rows
                    left[k, i] = real(A[p, k0 + start + k, a0 + i0 + i]) if inside else real(0)
                else:
                    k, i = u % DEPTH, u // DEPTH
                    inside = start + k < inner and i0 + i < rows
                    left[k, i] = real(A[p, a0 + i0 + i, k0 + start + k]) if inside else real(0)
                k, j = u // SIDE, u % SIDE
                inside = start + k < inner and j0 + j < columns
                right[k, j] = real(B[p, k0 + start + k, j0 + j]) if inside else real(0)
            cuda.syncthreads()
            for k in range(DEPTH):
                for a in range(EACH):
                    value = left[k, down + ACROSS * a]
                    for b in range(EACH):
                        total[a, b] += value * right[k, across + ACROSS * b]
            cuda.syncthreads()
        for a in range(EACH):
            for b in range(EACH):
                i, j = i0 + down + ACROSS * a, j0 + across + ACROSS * b
                if i < rows and j < columns:
                    value = sign * total[a, b]
                    if keep:
                        value += C[p, c0 + i, j]
                    C[p, c0 + i, j] = value

    return kernel


@functools.cache
def corner(dtype: np.dtype[Any]) -> Any:
    """Kernel that factors a square on the diagonal, U @ U.T: a block for each problem, a thread for each row.

    The square, from column `start` of the `rows` rows of `work` on, gets the `damping` on its diagonal first. ``U.T``
    goes into the `factor`, and there is the `inverse` of U; `failed` tells where the square is not positive definite.
    """
    real, side = from_dtype(dtype), CORNER[dtype]
    padded = side + 1

    @cuda.jit
    def kernel(work, start, rows, damping, factor, inverse, diagonal, failed):  # type: ignore[no-untyped-def]
        square = cuda.shared.array((side, padded), real)
        turned = cuda.shared.array((side, padded), real)
        t, p = cuda.threadIdx.x, cuda.blockIdx.x
        for i in range(rows):
            if t < rows:
                square[i, t] = work[p, i, start + t]
                turned[i, t] = real(0)
                if i == t:
                    square[i, t] += real(damping[p])
        cuda.syncthreads()
        for k in range(rows - 1, -1, -1):
            pivot = square[k, k]
            if not pivot > real(0):
                pivot = real(1)
                if t == 0:
                    failed[p] = 1
            pivot = math.sqrt(pivot)
            cuda.syncthreads()
            if t < k:
                square[t, k] /= pivot
            if t == k:
                square[k, k] = pivot
            cuda.syncthreads()
            if t < k:
                for j in range(k):
                    square[t, j] -= square[t, k] * square[j, k]
            cuda.syncthreads()
        if t < rows:
            turned[t, t] = real(1) / square[t, t]
            for i in range(t - 1, -1, -1):
                total = real(0)
                for k in range(i + 1, t + 1):
                    total += square[i, k] * turned[k, t]
                turned[i, t] = -total / square[i, i]
            diagonal[p, start + t] = float32(square[t, t])
        for i in range(rows):
            if t < rows:
                inverse[p, i, t] = turned[i, t]
                if t <= i:
                    factor[p, start + i, start + t] = square[t, i]

    return kernel


@cuda.jit
def arrange(G, order, divisor, made):  # type: ignore[no-untyped-def]
    """Matrices with rows and columns in an `order` (b, m), divided by `divisor` (b,)."""
    m = G.shape[1]
    p, i = cuda.blockIdx.x // m, cuda.blockIdx.x % m
    for k in range(cuda.threadIdx.x, m, ROW):
        made[p, i, k] = G[p, order[p, i], order[p, k]] / divisor[p]


@cuda.jit
def gather(W, rows, made):  # type: ignore[no-untyped-def]
    """Some rows (b, s) of the problems."""
    p, i = cuda.blockIdx.x // rows.shape[1], cuda.blockIdx.x % rows.shape[1]
    for j in range(cuda.threadIdx.x, W.shape[2], ROW):
        made[p, i, j] = W[p, rows[p, i], j]


@functools.cache
def scatter(dtype: np.dtype[Any]) -> Any:
    """Kernel that puts codes in the users' order, as integers."""
    whole = from_dtype(dtype)

    @cuda.jit
    def kernel(codes, order, made):  # type: ignore[no-untyped-def]
        p, i = cuda.blockIdx.x // codes.shape[1], cuda.blockIdx.x % codes.shape[1]
        for j in range(cuda.threadIdx.x, codes.shape[2], ROW):
            made[p, order[p, i], j] = whole(codes[p, i, j])

    return kernel


@cuda.jit
def encode(W, scale, offset, group, top, only, codes):  # type: ignore[no-untyped-def]
    """Nearest codes, in the rows that are marked in `only` (b, m); real ones with a negative `top`.

    They are decided on in double precision, as by `kernels.nearest_codes`.
    """
    m, n = W.shape[1], W.shape[2]
    p, i = cuda.blockIdx.x // m, cuda.blockIdx.x % m
    if only[p, i]:
        for j in range(cuda.threadIdx.x, n, ROW):
            column, g = p * n + j, group[p, i]
            value = float64(W[p, i, j]) / scale[column, g] + offset[column, g]
            if top < ZERO:
                codes[p, i, j] = value
            else:
                codes[p, i, j] = nearest_code(float32((value + DOUBLE_ROUNDER) - DOUBLE_ROUNDER), top)


@functools.cache
def errors(dtype: np.dtype[Any]) -> Any:
    """Kernel for ``W - Wq``, whose difference is exact in double precision."""
    real = from_dtype(dtype)

    @cuda.jit
    def kernel(W, codes, scale, offset, group, error):  # type: ignore[no-untyped-def]
        m, n = W.shape[1], W.shape[2]
        p, i = cuda.blockIdx.x // m, cuda.blockIdx.x % m
        for j in range(cuda.threadIdx.x, n, ROW):
            column, g = p * n + j, group[p, i]
            decoded = -left_over(ZERO, codes[p, i, j], scale[column, g], offset[column, g])
            error[p, i, j] = real(W[p, i, j]) - real(decoded)

    return kernel


@cuda.jit
def steps_of(codes, offset, group, only, made):  # type: ignore[no-untyped-def]
    """``codes - zero_point`` in the rows of the group `only`, of all groups if it is negative, and 0 elsewhere."""
    m, n = codes.shape[1], codes.shape[2]
    p, i = cuda.blockIdx.x // m, cuda.blockIdx.x % m
    g = group[p, i]
    for j in range(cuda.threadIdx.x, n, ROW):
        made[p, i, j] = codes[p, i, j] - offset[p * n + j, g] if only < 0 or only == g else ZERO


@cuda.jit
def move_towards(values, limit, ratio):  # type: ignore[no-untyped-def]
    """Scale the distance of `values` from their `limit` by the `ratio` (b n,) of each column."""
    m, n = values.shape[1], values.shape[2]
    p, i = cuda.blockIdx.x // m, cuda.blockIdx.x % m
    for j in range(cuda.threadIdx.x, n, ROW):
        values[p, i, j] = limit[p, i, j] - ratio[p * n + j] * (limit[p, i, j] - values[p, i, j])


@cuda.jit
def subtract(values, factor, other):  # type: ignore[no-untyped-def]
    """Subtract `factor` (b n,) times another array, (b, m, n) or (b, m, 1)."""
    m, n = values.shape[1], values.shape[2]
    p, i = cuda.blockIdx.x // m, cuda.blockIdx.x % m
    for j in range(cuda.threadIdx.x, n, ROW):
        k = j if other.shape[2] == n else 0
        values[p, i, j] -= factor[p * n + j] * other[p, i, k]


@cuda.jit
def weigh(values, weight, made):  # type: ignore[no-untyped-def]
    """Every row times its `weight` (b, m)."""
    m, n = values.shape[1], values.shape[2]
    p, i = cuda.blockIdx.x // m, cuda.blockIdx.x % m
    for j in range(cuda.threadIdx.x, n, ROW):
        made[p, i, j] = weight[p, i] * values[p, i, j]


@cuda.jit
def take(target, source, chosen):  # type: ignore[no-untyped-def]
    """Copy the `chosen` (b n,) columns."""
    m, n = target.shape[1], target.shape[2]
    p, i = cuda.blockIdx.x // m, cuda.blockIdx.x % m
    for j in range(cuda.threadIdx.x, n, ROW):
        if chosen[p * n + j]:
            target[p, i, j] = source[p, i, j]


@cuda.jit
def shrink(G, share, added):  # type: ignore[no-untyped-def]
    """``(1 - share) G`` and `added` (b, m) on the diagonal, in place."""
    m = G.shape[1]
    p, i = cuda.blockIdx.x // m, cuda.blockIdx.x % m
    for k in range(cuda.threadIdx.x, m, ROW):
        G[p, i, k] *= ONE - share
        if k == i:
            G[p, i, k] += added[p, i]


@cuda.jit
def fall_back(factor, diagonal, G, failed):  # type: ignore[no-untyped-def]
    """Put `G` itself, and its diagonal, where it could not be factored."""
    m = G.shape[1]
    p, i = cuda.blockIdx.x // m, cuda.blockIdx.x % m
    if failed[p]:
        for k in range(cuda.threadIdx.x, m, ROW):
            factor[p, i, k] = G[p, i, k]
            if k == i:
                diagonal[p, i] = G[p, i, i]


@cuda.jit
def column_dots(first, second, sums):  # type: ignore[no-untyped-def]
    """Products of the columns of two arrays, (b, m, n) and that or (b, m, 1), summed by `CHUNK` rows: (chunks, b n)."""
    m, n = first.shape[1], first.shape[2]
    column = cuda.blockIdx.x * COLUMNS + cuda.threadIdx.x
    if column < first.shape[0] * n:
        p, j, total = column // n, column % n, 0.0
        start, k = cuda.blockIdx.y * CHUNK, j if second.shape[2] == n else 0
        for i in range(start, min(start + CHUNK, m)):
            total += float64(first[p, i, j]) * float64(second[p, i, k])
        sums[cuda.blockIdx.y, column] = total


@cuda.jit
def extremes(W, group_size, low, high):  # type: ignore[no-untyped-def]
    """Least and greatest weight of each group of rows, in the users' order, (b n, groups)."""
    m, n = W.shape[1], W.shape[2]
    column, g = cuda.blockIdx.x * COLUMNS + cuda.threadIdx.x, cuda.blockIdx.y
    if column < W.shape[0] * n:
        p, j = column // n, column % n
        least = most = W[p, g * group_size, j]
        for i in range(g * group_size + 1, min((g + 1) * group_size, m)):
            least, most = min(least, W[p, i, j]), max(most, W[p, i, j])
        low[column, g], high[column, g] = least, most


@cuda.jit
def grid_errors(values, weight, rows, group_size, scale, offset, factors, shifts, middle, whole, top, found):  # type: ignore[no-untyped-def]
    """`kernels.grid_errors`: a thread for each column, group and `TRIALS` candidates.

    `rows` (b, m) are those of the first group, of the second and so on.
    """
    inverse, zero = cuda.local.array(TRIALS, float32), cuda.local.array(TRIALS, float32)
    total, part = cuda.local.array(TRIALS, float32), cuda.local.array(TRIALS, float32)
    m, n = values.shape[1], values.shape[2]
    column = cuda.blockIdx.x * COLUMNS + cuda.threadIdx.x
    g, candidates = cuda.blockIdx.z, found.shape[2]
    if column < values.shape[0] * n:
        p, j = column // n, column % n
        for a in range(TRIALS):
            s = min(cuda.blockIdx.y * TRIALS + a, candidates - 1)
            inverse[a], total[a] = ONE / (scale[column, g] * factors[s]), ZERO
            moved = float64(offset[column, g])
            if middle >= 0:
                moved = middle - (middle - moved) / float64(factors[s]) + shifts[s]
                if whole:
                    moved = (moved + DOUBLE_ROUNDER) - DOUBLE_ROUNDER
            zero[a] = float32(moved)
        stop = min((g + 1) * group_size, m)
        for start in range(g * group_size, stop, PANEL):
            for a in range(TRIALS):
                part[a] = ZERO
            for k in range(start, min(start + PANEL, stop)):
                i = rows[p, k]
                value, share = values[p, i, j], weight[p, i]
                for a in range(TRIALS):
                    wanted = value * inverse[a]
                    missed = wanted - (nearest_code(wanted + zero[a], top) - zero[a])
                    part[a] += share * missed * missed
            for a in range(TRIALS):
                total[a] += part[a]
        for a in range(TRIALS):
            s = cuda.blockIdx.y * TRIALS + a
            if s < candidates:
                found[column, g, s] = total[a]


@cuda.jit
def mirrored(G, gaps, sizes):  # type: ignore[no-untyped-def]
    """How far entries are from their mirror images, at most, and the sum of their sizes, (chunks, b m) for columns."""
    m = G.shape[1]
    column = cuda.blockIdx.x * COLUMNS + cuda.threadIdx.x
    if column < G.shape[0] * m:
        p, k, gap, total = column // m, column % m, 0.0, 0.0
        start = cuda.blockIdx.y * CHUNK
        for i in range(start, min(start + CHUNK, m)):
            gap = max(gap, abs(float64(G[p, i, k]) - float64(G[p, k, i])))
            total += abs(float64(G[p, i, k]))
        gaps[cuda.blockIdx.y, column], sizes[cuda.blockIdx.y, column] = gap, total


@cuda.jit
def diagonals(G, made):  # type: ignore[no-untyped-def]
    """Entries on the diagonal, (b, m)."""
    p, i = cuda.blockIdx.x // G.shape[1], cuda.blockIdx.x % G.shape[1]
    if cuda.threadIdx.x == 0:
        made[p, i] = G[p, i, i]


@cuda.jit
def clear(values):  # type: ignore[no-untyped-def]
    """Fill an array (size,) with zeros."""
    i = cuda.blockIdx.x * ROW + cuda.threadIdx.x
    if i < values.shape[0]:
        values[i] = 0


@cuda.jit
def rows_of(G, start, rows, work):  # type: ignore[no-untyped-def]
    """Copy the first entries of some rows, as many as there is room for in a row of `work` (b, side, m)."""
    p, i = cuda.blockIdx.x // work.shape[1], cuda.blockIdx.x % work.shape[1]
    if i < rows:
        for k in range(cuda.threadIdx.x, start + rows, ROW):
            work[p, i, k] = G[p, start + i, k]


@cuda.jit
def put_rows(work, start, rows, G):  # type: ignore[no-untyped-def]
    """Copy the rows of `work` (b, side, k) to the first k entries of those of `G` from `start` on."""
    p, i = cuda.blockIdx.x // work.shape[1], cuda.blockIdx.x % work.shape[1]
    if i < rows:
        for k in range(cuda.threadIdx.x, work.shape[2], ROW):
            G[p, start + i, k] = work[p, i, k]


@cuda.jit
def some_columns(W, columns, made):  # type: ignore[no-untyped-def]
    """Some columns (k,) of all problems."""
    p, i = cuda.blockIdx.x // W.shape[1], cuda.blockIdx.x % W.shape[1]
    for j in range(cuda.threadIdx.x, columns.shape[0], ROW):
        made[p, i, j] = W[p, i, columns[j]]


@cuda.jit
def products_of_steps(GW, residual, scale, made):  # type: ignore[no-untyped-def]
    """``G q`` of the steps q of each column: ``(G w - R) / d``, with its `scale` (b n,)."""
    m, n = GW.shape[1], GW.shape[2]
    p, i = cuda.blockIdx.x // m, cuda.blockIdx.x % m
    for j in range(cuda.threadIdx.x, n, ROW):
        made[p, i, j] = (GW[p, i, j] - residual[p, i, j]) / scale[p * n + j]


@cuda.jit
def convert(values, made):  # type: ignore[no-untyped-def]
    """Copy into an array of another type."""
    p, i = cuda.blockIdx.x // values.shape[1], cuda.blockIdx.x % values.shape[1]
    for j in range(cuda.threadIdx.x, values.shape[2], ROW):
        made[p, i, j] = values[p, i, j]


@cuda.jit
def count_changes(before, now, changed):  # type: ignore[no-untyped-def]
    """Number of entries of each column (b n,) that are not what they were."""
    m, n = now.shape[1], now.shape[2]
    column = cuda.blockIdx.x * COLUMNS + cuda.threadIdx.x
    if column < now.shape[0] * n:
        p, j, count = column // n, column % n, int32(0)
        for i in range(m):
            count += int32(before[p, i, j] != now[p, i, j])
        changed[column] = count


class Kernel(NamedTuple):
    """A kernel, the types that it is launched with, and the threads of a block."""

    kernel: Any
    signature: tuple[Any, ...]
    threads: int


def _table() -> dict[str, Kernel]:
    """All kernels, for tests to compile where there is no device."""
    f1, f2, f3 = (types.Array(float32, ndim, "C") for ndim in (1, 2, 3))
    d1, d2, d3, i1, i2 = (
        types.Array(*one, "C") for one in ((float64, 1), (float64, 2), (float64, 3), (int32, 1), (int32, 2))
    )
    u1, u2, i, f = types.Array(uint8, 1, "C"), types.Array(uint8, 2, "C"), types.int64, float32
    grid = f2, f2, i2  # scale, zero point and group
    found = {}
    for size in SIZES:
        name = "x".join(map(str, size))
        for grouped in (False, True):
            label = name + " grouped" * grouped
            sweeps = (f3, f3, f3, f2, f2, i2, i2, f, i1)
            found[f"sweep {label}"] = Kernel(sweep(*size, False, grouped), sweeps, size[0])
            found[f"sweep {label} own order"] = Kernel(sweep(*size, True, grouped), sweeps, size[0])
            if math.prod(size) <= MOST_TABU:
                searches = (f3, f3, f3, u2, i1, f2, f1, i2, f, i)
                found[f"tabu {label}"] = Kernel(tabu(*size, grouped), searches, size[0])
    for grouped in (False, True):
        passes = (f3, f3, f2, *grid, f, i, i, f3, f3, f3, f3)
        found["pass" + " grouped" * grouped] = Kernel(visit(grouped), passes, NARROW)
    for dtype, array in zip(CORNER, (f3, d3), strict=True):
        real = from_dtype(dtype)
        parts = array, i, i, types.Array(real, 1, "C"), array, array, f2, i1
        found[f"errors {dtype}"] = Kernel(errors(dtype), (f3, f3, *grid, array), ROW)
        found[f"corner {dtype}"] = Kernel(corner(dtype), parts, CORNER[dtype])
        for flip in (False, True):
            products = array, array, array, *[i] * 6, real, types.boolean
            found[f"product {dtype}" + " flipped" * flip] = Kernel(product(dtype, flip), products, THREADS)
    for dtype in (np.dtype(np.uint8), np.dtype(np.uint16)):
        found[f"scatter {dtype}"] = Kernel(scatter(dtype), (f3, i2, types.Array(from_dtype(dtype), 3, "C")), ROW)
    by_rows: dict[Any, tuple[Any, ...]] = {
        arrange: (f3, i2, f1, f3),
        gather: (f3, i2, f3),
        clear: (f1,),
        diagonals: (f3, f2),
        rows_of: (f3, i, i, f3),
        put_rows: (f3, i, i, f3),
        some_columns: (f3, i1, f3),
        products_of_steps: (f3, f3, f1, f3),
        convert: (f3, d3),
        encode: (f3, *grid, f, u2, f3),
        steps_of: (f3, f2, i2, i, f3),
        move_towards: (f3, f3, f1),
        subtract: (f3, f1, f3),
        weigh: (f3, f2, f3),
        take: (f3, f3, u1),
        shrink: (f3, f, f2),
        fall_back: (f3, f2, f3, i1),
        order_rows: (f3, d2, i2),
    }
    by_columns: dict[Any, tuple[Any, ...]] = {
        column_dots: (f3, f3, d2),
        extremes: (f3, i, f2, f2),
        grid_errors: (f3, f2, i2, i, f2, f2, f1, d1, float64, types.boolean, f, f3),
        count_changes: (f3, f3, i1),
        mirrored: (f3, d2, d2),
    }
    for kernels_of, threads in ((by_rows, ROW), (by_columns, COLUMNS)):
        for kernel, signature in kernels_of.items():
            found[kernel.py_func.__name__] = Kernel(kernel, signature, threads)
    return found


KERNELS = _table()
