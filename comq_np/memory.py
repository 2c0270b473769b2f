"""How much memory a solve takes, before it takes any."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from comq_np import checks, feedback, recipes
from comq_np.problem import tiles
from comq_np.recipes import Recipe

#: Arrays of a tile that a thread keeps for the passes: its weights and, of two passes, four.
SCRATCH = 9


def estimate(
    m: int,
    n: int,
    bits: int = 4,
    *,
    batch: int = 1,
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
    5.125
    """
    m, n, batch = (checks.integer(name, value, 1, 2**40) for name, value in (("m", m), ("n", n), ("batch", batch)))
    bits, levels = checks.bits_and_levels(bits, None)
    steps = recipes.recipe(recipe)
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise checks.InputError(f"`dtype` must be float32 or float64, got {np.dtype(dtype)}.")
    checks.boolean("overwrite", overwrite)
    matrix, weights = 4 * batch * m * m, 4 * batch * m * n
    width = max(tile.shape[0] * tile.shape[1] for tile in tiles(batch, n))
    scratch = 4 * m * width * min(checks.thread_count(threads), math.ceil(batch * n / width))
    return int(matrix * _matrices(steps, levels, overwrite) + weights * _arrays(steps) + scratch * SCRATCH)


def _matrices(steps: Recipe, levels: int, overwrite: bool) -> float:
    """Float32 matrices of the size of `G`."""
    own = 0.0 if overwrite else 1.0
    if steps.start != "babai":
        return own
    share = feedback.default_damping(levels) if steps.damping is None else steps.damping
    double = 2.0 if share < feedback.SINGLE else 0.0  # the factor in double precision
    return own + double + len(steps.other_orders)


def _arrays(steps: Recipe) -> float:
    """Float32 arrays of the size of the weights, among them these by column and their codes."""
    begun = len(steps.grids) * (1 + (steps.neighbours if steps.start == "babai" else 0))
    residuals = 1 if steps.sweeps or steps.leaps else 0
    order, products = steps.order == "greedy" and bool(steps.sweeps), steps.refit is True and bool(steps.sweeps)
    return 1 + begun * (1 + residuals) + order + products
