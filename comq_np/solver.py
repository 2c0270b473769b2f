"""The front door: check, grid, start, sweeps, result."""

from __future__ import annotations

import dataclasses
import time
from typing import Literal

import numpy as np
import numpy.typing as npt

from comq_np import checks, recipes
from comq_np import grid as grids
from comq_np.cross import matched_weights
from comq_np.descent import Float64, Problem, Solution, measured, nearest
from comq_np.gram import Gram
from comq_np.grid import Grid, decode
from comq_np.minimise import Callback, Outcome, keep_rounding, minimise
from comq_np.packing import code_type
from comq_np.parallel import Workers
from comq_np.recipes import Recipe
from comq_np.result import QuantizedArray, SolveReport
from comq_np.shrinkage import cross_validated, shrunk
from comq_np.starts import start_grid

#: Rounding in a float32 Gram can make an objective negative by this share of (sum_i sqrt(G_ii) |e_i|)**2.
INDEFINITE = 1e-6
#: Note in the report of a solve with `cross`.
MATCHED = "The codes stand for the weights that reproduce the given outputs best (`matched_weights`)."


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
    cross: npt.ArrayLike | None = None,
    shrinkage: float | Literal["auto"] = "auto",
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
    bits : int from 1 to 16
        Bits of one code.
    recipe : str or Recipe
        "balanced", "best", "fast", "paper" or "rtn", see `recipe`, or a recipe of your own.
    group_size : int, "tensor" or None
        Rows that share a scale and a zero point in each column, the last group maybe fewer; "tensor" has one for the
        whole of `W`, None one for each column.
    symmetric : bool
        Whether the zero point is ``levels // 2`` everywhere, a signed grid.
    zero_point : "integer", "real", or array_like of real, shape () or (groups, n)
        Code that stands for 0: a whole number, or any number, of the solver's choice. A real one takes out a little
        more of the error, but no code may be exactly 0. Numbers fix it, and need `scale`.
    levels : int from 2 to 65,536, optional
        Number of codes, in place of `bits`: 3 is ternary.
    scale : array_like of real > 0, shape () or (groups, n), optional
        Scales to keep as they are.
    fit_bias : bool
        Whether the layer's bias takes up the mean of the output error, which `bias_shift` then returns: the objective
        is that of the centred inputs. Needs a `Gram`, which knows the mean.
    cross : array_like of real, shape (m, m) or (2, m, m), optional
        ``Xq.T @ X`` where `G` is ``Xq.T @ Xq`` of the inputs `Xq` of a model whose layers before this one are quantized
        and `X` are the float model's: minimises ``||Xq @ Wq - X @ W||**2``, by solving for `matched_weights` in place
        of `W`. The report, and what is said here of plain rounding, refer to these. Not with `fit_bias`.
    shrinkage : float from 0 to 1, or "auto"
        Share s of the identity in the matrix that is minimised, ``(1 - s) * G + s * mean(diag(G)) * I``, so that the
        codes hold on other inputs. "auto" chooses it by cross-validation for a `Gram` with samples in both folds, where
        the recipe starts by Babai's nearest plane, and is 0 otherwise.
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
    group_size, symmetric = checks.group_size(group_size), checks.boolean("symmetric", symmetric)
    fit_bias = checks.boolean("fit_bias", fit_bias)
    if fit_bias and cross is not None:
        raise checks.InputError("`fit_bias` must be False with `cross`, which does not tell the mean of X, got True.")
    weights = checks.weights(W) if cross is None else matched_weights(W, G, cross)
    matrix, mean = _gram(G, len(weights), fit_bias)
    given_problem, unit = _problem(weights, matrix, levels, group_size, symmetric, zero_point)
    given = _given_grid(given_problem, scale, zero_point)
    if callback is not None and not callable(callback):
        raise checks.InputError(f"`callback` must be callable, got {callback!r}.")
    if given:
        steps = steps.replace(refit=False)

    with Workers(checks.thread_count(threads)) as pool:
        share = _shrinkage(shrinkage, given_problem, G, fit_bias, unit, steps, pool)
        problem = dataclasses.replace(given_problem, G=shrunk(given_problem.G, share))
        plain = _rounded(given_problem, given, pool)
        follow = None if callback is None else lambda sweep, objective: callback(sweep, objective * unit)
        found = minimise(problem, steps, given, plain, follow, pool)
        best = measured(given_problem, found.best.codes, found.best.grid, pool)
        kept = keep_rounding(given_problem, best, plain)
        norm = _norm(given_problem, pool)
        optimal, gap = _gap(problem, found, best, kept, pool)
    dead = _round_dead_rows(given_problem, best)

    objective = _not_negative(given_problem, best, norm)
    notes = [*found.notes, *plain.grid.notes, *[MATCHED] * (cross is not None)]
    report = SolveReport(
        recipe=steps.name,
        backend="cpu",
        objective_rounding=float(plain.objective.sum()) * unit,
        objective_start=found.start * unit,
        objectives=tuple(objective * unit for objective in found.objectives),
        objective=objective * unit,
        relative_error=objective / norm if norm > 0 else float(np.inf if objective > 0 else 0),
        sweeps=len(found.objectives),
        codes_changed=tuple(found.changed),
        converged=found.converged,
        shrinkage=share,
        optimal=optimal,
        gap=gap,
        seconds=time.perf_counter() - started,
        notes=_notes(given_problem, notes, dead, int(kept.sum()), given is not None, mean is not None),
    )
    q = QuantizedArray(
        codes=np.ascontiguousarray(best.codes.T.astype(code_type(bits))).reshape(weights.shape),
        scale=np.ascontiguousarray(best.grid.scale.T),
        zero_point=np.ascontiguousarray(best.grid.zero_point.T),
        bits=bits,
        levels=levels,
        group_size=group_size,
        bias_shift=None,
        report=report,
    )
    if mean is None:
        return q
    return dataclasses.replace(q, bias_shift=_bias_shift(mean, weights - q.dequantize()))


def _gram(G: npt.ArrayLike | Gram, rows: int, fit_bias: bool) -> tuple[Float64, Float64 | None]:
    """Matrix to solve with, and the mean of the inputs where the bias is to take it up."""
    if not isinstance(G, Gram):
        if fit_bias:
            raise checks.InputError(
                f"`G` must be a comq_np.Gram, which knows the mean of the inputs, with `fit_bias`, "
                f"got {type(G).__name__!r}."
            )
        return checks.gram_matrix(G, rows), None
    matrix = checks.gram_matrix(G.centred if fit_bias else G.matrix, rows)
    if G.count == 0:
        raise checks.InputError("`G` must have seen inputs, got a Gram with count 0.")
    return matrix, G.mean if fit_bias else None


def _problem(
    weights: npt.NDArray[np.float32],
    G: Float64,
    levels: int,
    group_size: int | str | None,
    symmetric: bool,
    zero_point: npt.ArrayLike,
) -> tuple[Problem, float]:
    """Problem with `G` divided by the power of two that brings its largest diagonal entry near 1, and that power."""
    unit = float(np.exp2(np.frexp(G.diagonal().max())[1] - 1))
    W = np.ascontiguousarray(weights.reshape(len(weights), -1).T)
    rows = group_size if isinstance(group_size, int) else len(weights)
    real = isinstance(zero_point, str) and zero_point == "real"
    return Problem(W, G / unit, min(rows, len(weights)), group_size == "tensor", levels, symmetric, real), unit


def _given_grid(problem: Problem, scale: npt.ArrayLike | None, zero_point: npt.ArrayLike) -> Grid | None:
    """Grid with the caller's scale, where there is one."""
    chosen = isinstance(zero_point, str)
    if chosen:
        checks.choice("zero_point", zero_point, ("integer", "real"))
    if problem.symmetric and not (chosen and zero_point == "integer"):
        got = repr(zero_point) if chosen else "numbers"
        raise checks.InputError(f'`zero_point` must be "integer" with `symmetric`, which fixes it, got {got}.')
    if scale is None:
        if not chosen:
            raise checks.InputError('`zero_point` must be "integer" or "real" without `scale`, got numbers.')
        return None
    if problem.real:
        raise checks.InputError("`zero_point` must be \"integer\" or numbers with `scale`, got 'real'.")
    n, m = problem.W.shape
    groups, whole = -(-m // problem.group_size), problem.whole
    steps = checks.scales(checks.per_group("scale", scale, groups, n, whole)).T
    offsets = None if chosen else checks.zero_points(checks.per_group("zero_point", zero_point, groups, n, whole)).T
    return grids.fixed(problem.W, steps, offsets, problem.levels, problem.group_size, whole, problem.symmetric)


def _shrinkage(
    value: float | str, problem: Problem, G: object, fit_bias: bool, unit: float, steps: Recipe, pool: Workers
) -> float:
    """Shrinkage that is given, or chosen where that is possible."""
    if value != "auto":
        return checks.share("shrinkage", value)
    if not isinstance(G, Gram) or steps.start != "babai" or not all(fold.count for fold in G.folds):
        return 0.0
    first, second = (G.fold_matrix(k, centred=fit_bias) / unit for k in (0, 1))
    return cross_validated(problem, (first, second), steps, pool)


def _rounded(problem: Problem, given: Grid | None, pool: Workers) -> Solution:
    """Plain rounding on the given grid, or else on the min-max grid."""
    grid = given or start_grid(problem, "minmax", pool)
    return measured(problem, nearest(problem, grid), grid, pool)


def _norm(problem: Problem, pool: Workers) -> float:
    """``||X W||**2``."""
    return sum(pool.map(lambda tile: float(np.vdot(problem.W[tile] @ problem.G, problem.W[tile])), problem.tiles))


def _gap(
    problem: Problem, found: Outcome, best: Solution, kept: npt.NDArray[np.bool_], pool: Workers
) -> tuple[bool, float | None]:
    """Whether the codes are proven optimal at their scales, and how far at most they are from it, if that is known."""
    if found.proof is None:
        return False, None
    total = float(measured(problem, best.codes, best.grid, pool).objective.sum())
    if total <= 0 or (found.proof.optimal & ~kept).all():
        return True, 0.0
    return False, 1.0 - float(np.maximum(found.proof.bound[~kept], 0).sum()) / total


def _bias_shift(mean: Float64, error: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Mean error of the outputs."""
    shift = mean @ error.reshape(len(error), -1)
    if np.abs(shift).max() > np.finfo(np.float32).max:
        raise checks.InputError(
            f"`G` and `W` must be smaller with `fit_bias`: the bias must fit in float32, got {np.abs(shift).max():g}."
        )
    return shift.astype(np.float32)


def _round_dead_rows(problem: Problem, best: Solution) -> int:
    """Round the rows whose input is always zero on the final grid: no code of theirs matters; the number of rows."""
    dead = problem.G.diagonal() == 0
    if dead.any():
        best.codes[:, dead] = nearest(problem, best.grid)[:, dead]
    return int(dead.sum())


def _not_negative(problem: Problem, best: Solution, norm: float) -> float:
    """Objective without what rounding may take it below zero; more than that no Gram matrix can give."""
    objective, size = float(best.objective.sum()), np.sqrt(problem.G.diagonal())
    W = problem.W.astype(np.float64)
    E = W - decode(best.codes, best.grid.scale, best.grid.zero_point, problem.group_size)
    if any(f < -INDEFINITE * np.sum((np.abs(e) @ size) ** 2) for f, e in ((objective, E), (norm, W))):
        raise checks.InputError(
            f"`G` must be positive semidefinite, as a Gram matrix is, got one with e.T @ G @ e = {objective:g} for an "
            f"error e of the weights, and w.T @ G @ w = {norm:g} for the weights."
        )
    return max(objective, 0.0)


def _notes(problem: Problem, found: list[str], dead: int, kept: int, fixed: bool, centred: bool) -> tuple[str, ...]:
    """A sentence for every substitution made."""
    n, m = problem.W.shape
    notes = list(dict.fromkeys(found))
    if dead:
        what = "never vary, which the bias takes up" if centred else "are always zero"
        notes.append(f"{dead} of {m} inputs {what}: the codes of their rows are rounded to nearest.")
    if kept:
        grid = "the given" if fixed else "the min-max"
        notes.append(f"{kept} of {n} columns keep plain rounding on {grid} grid, which the sweeps did not improve on.")
    return tuple(notes)
