"""How much memory a solve takes, before it takes any."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from comq_np import checks, feedback, recipes
from comq_np.problem import tiles
from comq_np.recipes import Recipe

#: Arrays of a tile that a thread has at a time: in any solve; in passes, and in those that suit the grid to them; for
#: each path; in a refit that the residual follows; where the objective is computed in double precision.
TILE_ARRAYS = {"any": 3, "pass": 4, "search": 3, "path": 3, "refit": 4, "double": 6}


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
) -> int:
    """Peak memory of a solve, beyond its inputs.

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
    >>> comq_np.estimate(4096, 4096, threads=2) / (4 * 4096 * 4096)  # in matrices
    5.25
    """
    m, n, batch = (checks.integer(name, value, 1, 2**40) for name, value in (("m", m), ("n", n), ("batch", batch)))
    levels = checks.bits_and_levels(bits, None)[1]
    group_size, overwrite = checks.group_size(group_size), checks.boolean("overwrite", overwrite)
    steps, threads = recipes.recipe(recipe), checks.thread_count(threads)
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise checks.InputError(f"`dtype` must be float32 or float64, got {np.dtype(dtype)}.")
    matrix, weights = 4 * batch * m * m, 4 * batch * m * n
    width = max(tile.shape[0] * tile.shape[1] for tile in tiles(batch, n))
    at_once = min(4 * m * width * threads, weights)
    shared = weights if group_size == "tensor" else at_once  # what all tiles together have, or those at work
    kept = _tile_arrays(steps)
    double = 0 if overwrite or np.dtype(dtype) == np.float32 else TILE_ARRAYS["double"]
    matrices = _matrices(steps, levels, overwrite)
    solving = matrix * matrices + weights * (1 + _arrays(steps)) + shared * kept
    judging = matrix * (not overwrite) + 2 * weights + shared * kept + at_once * double
    return int(max(solving, judging))


def _matrices(steps: Recipe, levels: int, overwrite: bool) -> int:
    """Float32 matrices of the size of `G`."""
    if steps.start != "babai":
        return 0 if overwrite else 1
    share = feedback.default_damping(levels) if steps.damping is None else steps.damping
    double = 2 if share < feedback.SINGLE else 0  # the factor in double precision
    return (0 if overwrite else 1) + double + len(steps.other_orders)


def _arrays(steps: Recipe) -> int:
    """Float32 arrays of the size of the weights, beside these by column."""
    swept = bool(steps.sweeps or steps.leaps or steps.trial)
    starts = len(steps.grids) * (1 + (steps.neighbours if steps.start == "babai" else 0))
    order, products = steps.order == "greedy" and swept, steps.refit is True and swept
    return starts * (1 + swept) + order + products


def _tile_arrays(steps: Recipe) -> int:
    """Float32 arrays of the size of a tile."""
    found = TILE_ARRAYS["any"]
    if steps.start in ("gram", "babai"):
        found += TILE_ARRAYS["pass"] + TILE_ARRAYS["search"] * bool(steps.search)
        found += TILE_ARRAYS["path"] * steps.paths * (steps.paths > 1)
    return found + TILE_ARRAYS["refit"] * (steps.refit is True and bool(steps.sweeps))
