"""How much memory a solve takes, before it takes any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from comq_np import checks, diagonal, feedback, recipes
from comq_np.descent import MOST_LEVELS, groups_at_once
from comq_np.grid import SHRINK, refining
from comq_np.layouts import BLOCK
from comq_np.packing import code_type
from comq_np.problem import tiles
from comq_np.proof import is_provable
from comq_np.recipes import Recipe

#: Arrays of a tile that a thread has at a time: in any solve; in passes; in those that suit the grid to them, made
#: again for a few columns or for all; for each path; in refits of short problems; with several groups a column; for
#: objectives in double precision.
TILE_ARRAYS = {"any": 3, "pass": 3, "search": 1, "again": 3, "path": 3, "short": 6, "groups": 2, "double": 6}
#: The same of all tiles together, where these share a scale: then no memory is used again.
WHOLE_ARRAYS = {"pass": 4, "search": 3, "again": 3}
#: Arrays of the passes that lie where codes and residuals are put in the end.
PLACED = 2
#: Bytes for each grid that a search considers, of each group of each column.
CANDIDATE = 6
#: Matrices in double precision of a `Gram`, once more while it is read; at the same time while it is centred; arrays of
#: the size of the weights while the mean error is found for the bias.
FOLDS, CENTRING, BIAS = 2, 3, 10
#: Matrices of a `CrossGram` beside these, and of the problem that is made of it; work on one problem, and arrays of the
#: size of the weights, while weights are found that match.
CROSSES, MATCHING, MATCHED = 6, 12, 6
#: Matrices of nonlinear shrinkage beside the folds, while they are found and in the solve; the work on one problem.
CONFIRMED, HELD, CONFIRMING = 6, 2, 4
#: Copies in double precision of short matrices, which are put in order at once; those of the folds on trial for each
#: thread, and at all.
SHORT, TRIAL, TRIED = 4, 2, 2
#: Of what is proven: arrays of the size of the weights while codes and scales take turns; bytes for each row of each
#: column at work, beside its own copy of the matrix.
TURNING, PROVING = 7, 64
#: Of bit planes: arrays of the size of the weights, those of the uniform codes and of two starts among them; of a tile,
#: for each plane and the offset, the plane, its product with the matrix, and a copy; bytes for each level of a group.
PLANES, PLANE_ARRAYS, LEVEL = 7, 3, 24
#: Arrays of an embedding beside the codes of every start, and of its tiles in double precision on each thread.
COUNTED, TILE_COUNTED = 4, 8


def estimate(
    m: int,
    n: int,
    bits: int = 4,
    *,
    batch: int = 1,
    group_size: int | Literal["tensor"] | None = None,
    recipe: str | Recipe = "balanced",
    dtype: npt.DTypeLike = np.float32,
    overwrite: bool = False,
    threads: int | None = None,
    codebook: Literal["uniform", "planes"] = "uniform",
    zero_point: Literal["integer", "real"] = "integer",
) -> int:
    """Peak memory of a solve on the CPU, beyond its inputs.

    Parameters
    ----------
    m, n : int >= 1
        Rows and columns of the weights.
    bits : int from 1 to 16
        Bits of one code.
    batch : int >= 1
        Number of problems of that shape in one call.
    group_size : int, "tensor" or None
        As for `solve`.
    recipe : str or Recipe
        As for `solve`.
    dtype : float32 or float64
        Type of `G`, an array.
    overwrite : bool
        Whether the solver may work in the memory of `G`.
    threads : int >= 1, optional
        Threads, by default one for each core.
    codebook : {"uniform", "planes"}
        As for `solve`.
    zero_point : {"integer", "real"}
        As for `solve`.

    Returns
    -------
    int
        Bytes; what Python and the libraries take for themselves, some megabytes, is not among them.

    Raises
    ------
    InputError
        If an argument is not as described above.

    Examples
    --------
    >>> import comq_np
    >>> comq_np.estimate(4096, 4096, threads=2) // 10**6  # in megabytes
    310
    """
    m, n, batch = (checks.integer(name, value, 1, 2**40) for name, value in (("m", m), ("n", n), ("batch", batch)))
    levels = checks.bits_and_levels(bits, None)[1]
    group_size, overwrite = checks.group_size(group_size), checks.boolean("overwrite", overwrite)
    steps, threads = recipes.recipe(recipe), checks.thread_count(threads)
    planes = checks.choice("codebook", codebook, ("uniform", "planes")) == "planes"
    real = checks.choice("zero_point", zero_point, ("integer", "real")) == "real"
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise checks.InputError(f"`dtype` must be float32 or float64, got {np.dtype(dtype)}.")
    matrix, weights = 4 * batch * m * m, 4 * batch * m * n
    width = max(tile.shape[0] * tile.shape[1] for tile in tiles(batch, m, n))
    at_once = min(4 * m * width * threads, weights)  # tiles at work
    whole, groups = group_size == "tensor", -(-m // group_size) if isinstance(group_size, int) else 1
    passes = (weights if whole else at_once) * _arrays(steps, WHOLE_ARRAYS if whole else TILE_ARRAYS, m, levels)
    candidates = CANDIDATE * _candidates(steps) * groups * (batch * n if whole else min(width * threads, batch * n))
    short = m <= recipes.MOST_EXACT
    double = short or (not overwrite and np.dtype(dtype) == np.float64)
    refits = 0 if groups > 1 else _refits(steps, levels, whole or real or (short and _swept(steps)))

    own, others = matrix * (not overwrite) + SHORT * 2 * matrix * (m <= BLOCK), matrix * len(steps.other_orders)
    any_tile, in_groups = at_once * TILE_ARRAYS["any"], 0
    if isinstance(group_size, int) and group_size < m:
        in_groups = at_once * TILE_ARRAYS["groups"] + threads * _refit_of_groups(m, width, group_size)
    begun, kept = own + weights * (1 + _starts(steps)) + any_tile, 0 if whole else passes  # kept for the next tile
    factoring = own + others + 2 * matrix * _in_double(steps, levels) + weights + any_tile
    passing = begun + others + passes + at_once * TILE_ARRAYS["path"] * _paths(steps) + in_groups + candidates
    descending = begun + weights * (refits + _greedy(steps)) + kept + in_groups
    if short and refits:  # which are in double precision
        descending += weights * refits + at_once * TILE_ARRAYS["short"]
    proving = is_provable(m, levels, steps) * (begun + weights * TURNING + width * threads * (8 * m * m + PROVING * m))
    tables = LEVEL * levels * groups * batch * n
    turning = planes * (own + weights * PLANES + at_once * (PLANE_ARRAYS * (bits + 1) + 4) + tables)
    judging = own + 2 * weights + any_tile + max(kept, at_once) + at_once * TILE_ARRAYS["double"] * double
    return int(max(factoring, passing, descending, proving, turning, judging))


def with_gram(
    shape: tuple[int, int, int],
    bits: int,
    fit_bias: bool,
    group_size: int | Literal["tensor"] | None,
    recipe: str | Recipe,
    part: int,
    crossed: bool,
    threads: int,
    codebook: Literal["uniform", "planes"] = "uniform",
    nonlinear: bool = False,
    zero_point: Literal["integer", "real"] = "integer",
) -> int:
    """Peak memory of reading weights (b, m, n) and their `Gram` from a file and solving `part` of the columns.

    Where these are not all, codes of the others wait for them, and then all of them are joined. With a `CrossGram`, the
    weights to solve for are found first; with `nonlinear` shrinkage, the matrix to solve with is.
    """
    b, m, n = shape
    matrix, weights = 8 * b * m * m, 4 * b * m * part
    whole = (4 + 2 * np.dtype(code_type(bits)).itemsize) * b * m * n
    limits: dict[str, Any] = {"dtype": np.float64, "threads": threads, "codebook": codebook, "zero_point": zero_point}
    solve = estimate(m, part, bits, batch=b, group_size=group_size, recipe=recipe, **limits)
    trial = (TRIED + TRIAL * threads) * matrix * (m <= recipes.MOST_EXACT)
    return (
        whole * (part < n)
        + weights
        + FOLDS * matrix
        + crossed * CROSSES * matrix
        + max(
            FOLDS * matrix,
            CENTRING * matrix + solve + max(trial, nonlinear * HELD * matrix),
            nonlinear * (CONFIRMED * matrix + CONFIRMING * 8 * m * m * min(threads, 2)),
            BIAS * weights * fit_bias,
            crossed * (MATCHING * 8 * m * m + MATCHED * weights),
        )
    )


def with_groups(groups: int, with_gram: Callable[[int], int], shape: tuple[int, int, int], threads: int) -> int:
    """The same of layers that have a Gram for each named group of batches: all of them beside the balanced one."""
    b, m, _ = shape
    return with_gram(threads) + groups * FOLDS * 8 * b * m * m


def with_counts(m: int, n: int, recipe: str | Recipe, threads: int) -> int:
    """The same of an embedding (m, n) and its `TokenCounts`."""
    kept = COUNTED + _grids(recipes.recipe(recipe))
    return kept * 4 * m * n + threads * TILE_COUNTED * 8 * max(m, diagonal.TILE_WEIGHTS)


def _refit_of_groups(m: int, width: int, size: int) -> int:
    """What a refit of some groups of a tile takes: rows of the matrix, products of these with codes, and residuals."""
    at_once = groups_at_once(size)
    rows = min(at_once * size, m)
    return 4 * (rows * (m + rows) + width * (rows * (1 + at_once) + size))


def _is_told(steps: Recipe, levels: int) -> bool:
    """Whether the pass tells the objective, and the residual if there are sweeps."""
    return steps.start == "babai" and steps.paths == 1 and not steps.other_orders and levels <= MOST_LEVELS


def _swept(steps: Recipe) -> bool:
    return bool(steps.sweeps or steps.leaps or steps.trial)


def _in_double(steps: Recipe, levels: int) -> bool:
    """Whether `G` is factored in double precision."""
    share = feedback.default_damping(levels) if steps.damping is None else steps.damping
    return steps.start == "babai" and share < feedback.SINGLE


def _arrays(steps: Recipe, arrays: dict[str, int], rows: int, levels: int) -> int:
    """Arrays that the passes need."""
    if steps.start not in ("gram", "babai"):
        return 0
    again = arrays["search" if steps.least_promise(rows) else "again"] * bool(steps.search)
    return arrays["pass"] + again - PLACED * (_swept(steps) and _is_told(steps, levels))


def _paths(steps: Recipe) -> int:
    return steps.paths if steps.paths > 1 else 0


def _candidates(steps: Recipe) -> int:
    """Grids that a search considers at a time."""
    refined, babai = refining(symmetric=False), steps.start == "babai"
    if babai and steps.search:
        return len(refined.fine.factors)
    candidates = refined.near if babai else SHRINK
    return len(candidates.factors) if "shrunk" in steps.grids else 0


def _starts(steps: Recipe) -> int:
    """Codes and residuals of all starts, in arrays of the size of the weights."""
    return _grids(steps) * (1 + _swept(steps))


def _grids(steps: Recipe) -> int:
    """Grids to start from."""
    return len(steps.grids) * (1 + (steps.neighbours if steps.start == "babai" else 0))


def _greedy(steps: Recipe) -> bool:
    """Whether there is an order of its own for each column."""
    return steps.order == "greedy" and _swept(steps)


def _refits(steps: Recipe, levels: int, joint: bool) -> int:
    """Arrays of the size of the weights that refits need for a single group a column.

    They are G W, or G q in short problems, and the residual where no sweep has one. What a pass has told makes up for
    them, unless a refit is `joint`: with a zero point to find, columns that share a scale, or the sweeps of a short
    problem before it.
    """
    if steps.refit is False or (steps.refit is True and not _swept(steps)):
        return 0
    if steps.refit == "ends" and _is_told(steps, levels) and not joint:  # the pass knows
        return 0
    return 1 + (not _swept(steps))
