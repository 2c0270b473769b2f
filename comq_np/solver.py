"""The front door: check, grid, start, sweeps, result."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from comq_np import checks, recipes
from comq_np import grid as grids
from comq_np.descent import Descent, Problem
from comq_np.gram import Gram
from comq_np.grid import Grid
from comq_np.orders import ORDERS
from comq_np.parallel import Workers, workers
from comq_np.recipes import Recipe
from comq_np.result import QuantizedArray, SolveReport

Callback = Callable[[int, float], object]


def solve(
    W: npt.ArrayLike,
    G: npt.ArrayLike | Gram,
    bits: int = 4,
    *,
    recipe: str | Recipe = "balanced",
    group_size: int | Literal["tensor"] | None = None,
    symmetric: bool = False,
    zero_point: npt.ArrayLike = "integer",
    levels: int | None = None,
    scale: npt.ArrayLike | None = None,
    fit_bias: bool = False,
    threads: int | None = None,
    callback: Callback | None = None,
) -> QuantizedArray:
    """Quantize weights so that the layer's output changes as little as possible.

    Minimises ``||X @ Wq - X @ W||**2`` over integer codes and scales by coordinate descent (COMQ [1]_, algorithms 1
    and 2), knowing the inputs X only by their Gram matrix.

    Parameters
    ----------
    W : array_like of real, shape (m, n) or (m,)
        Weights of a layer that computes ``X @ W``: a column for each output channel. Taken as float32.
    G : array_like of real, shape (m, m), or Gram
        Gram matrix ``X.T @ X`` of the inputs; any positive multiple gives the same codes.
    bits : int from 1 to 8
        Bits of one code.
    recipe : str or Recipe
        "balanced", "paper" or "rtn", see `recipe`, or a recipe of your own.
    group_size : int, "tensor" or None
        Rows that share a scale and a zero point in each column, the last group maybe fewer; "tensor" has one for the
        whole of `W`, None one for each column.
    symmetric : bool
        Whether the zero point is ``levels // 2`` everywhere, a signed grid.
    zero_point : "integer", or array_like of int, shape () or (groups, n)
        "integer" leaves the choice to the solver; numbers fix it, and need `scale`.
    levels : int from 2 to 256, optional
        Number of codes, in place of `bits`: 3 is ternary.
    scale : array_like of real > 0, shape () or (groups, n), optional
        Scales to keep as they are.
    fit_bias : bool
        Whether the layer's bias takes up the mean of the output error, which `bias_shift` then returns: the objective
        is that of the centred inputs. Needs a `Gram`, which knows the mean.
    threads : int >= 1, optional
        Threads to use, by default one for each core; the result is the same to the bit for any number.
    callback : callable, optional
        Called as ``callback(sweep, objective)`` after every sweep, counted from 1.

    Returns
    -------
    QuantizedArray
        Codes, scale, zero point and report. On the given objective it is never worse than plain rounding on the
        min-max grid (on the given grid, if `scale` is given).

    Raises
    ------
    InputError
        If an argument is not as described above, not finite, or does not match another; the inputs are never modified.

    References
    ----------
    .. [1] A. Zhang et al., "COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization",
       arXiv:2403.07134.

    Examples
    --------
    >>> import numpy as np, comq_np
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.normal(size=(100, 8)) @ rng.normal(size=(8, 8)), rng.normal(size=(8, 3))
    >>> q = comq_np.solve(W, X.T @ X, bits=3)
    >>> rounded = comq_np.solve(W, X.T @ X, bits=3, recipe="rtn")
    >>> bool(np.linalg.norm(X @ q.dequantize() - X @ W) < np.linalg.norm(X @ rounded.dequantize() - X @ W))
    True
    """
    started = time.perf_counter()
    steps = recipes.recipe(recipe)
    bits, levels = checks.bits_and_levels(bits, levels)
    problem, unit = _problem(W, G, checks.group_size(group_size), levels, checks.boolean("fit_bias", fit_bias))
    given = _given_grid(problem, scale, zero_point, checks.boolean("symmetric", symmetric))

    with workers(checks.thread_count(threads)) as pool:
        starts = [given] if given else _start_grids(problem, steps, symmetric, pool)
        descents = [Descent(problem, start, pool) for start in starts]
        baseline = given or grids.start_grid("minmax", problem.W, levels, problem.group_size, symmetric, problem.whole)
        rounding = next((d for d, s in zip(descents, starts) if s is baseline or _same(s, baseline)), None)
        rounding = _Rounding(rounding or Descent(problem, baseline, pool))
        history = _descend(problem, steps if not given else steps.replace(refit=False), descents, unit, callback)
        total = float(np.einsum("ji,ji->", problem.W.astype(np.float64), problem.W.astype(np.float64) @ problem.G))


def _problem(W, G, size, levels, fit_bias):
    ...
