"""The front door: check, grid, start, sweeps, result."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from comq_np import backends, checks, planes, recipes
from comq_np import grid as grids
from comq_np.backend import Backend, Judging
from comq_np.channels import ChannelGrid
from comq_np.counts import TokenCounts
from comq_np.cross import matched_weights
from comq_np.crossgram import CrossGram
from comq_np.diagonal import smoothing
from comq_np.gram import Gram
from comq_np.grid import Grid
from comq_np.host import Host
from comq_np.judge import Judge
from comq_np.layouts import Float64, combined
from comq_np.minimise import Callback, Outcome, keep_rounding, minimise
from comq_np.parallel import Workers
from comq_np.parts import joined
from comq_np.problem import Kind, Problem
from comq_np.recipes import Recipe
from comq_np.result import PlaneArray, QuantizedArray, Solved, SolveReport
from comq_np.shrinkage import Nonlinear, cross_validated, nonlinear, sampled

#: Multiplications of one product G @ W that are worth a thread of its own.
WORK = 2**18
#: Note in the report of a solve with `cross`.
MATCHED = "The codes stand for the weights that reproduce the given outputs best (`matched_weights`)."


@overload
def solve(
    W: npt.ArrayLike,
    G: npt.ArrayLike | Gram | TokenCounts,
    bits: int = 4,
    *,
    recipe: str | Recipe = "balanced",
    group_size: int | Literal["tensor"] | None = None,
    symmetric: bool = False,
    zero_point: npt.ArrayLike = "integer",
    levels: int | None = None,
    scale: npt.ArrayLike | None = None,
    scale_dtype: Literal["float32", "float16"] = "float32",
    fit_bias: bool = False,
    cross: npt.ArrayLike | None = None,
    shrinkage: float | Literal["auto", "nonlinear"] = "auto",
    backend: Literal["auto", "cpu", "cuda"] = "auto",
    overwrite: bool = False,
    threads: int | None = None,
    callback: Callback | None = None,
    codebook: Literal["uniform"] = "uniform",
) -> QuantizedArray: ...
@overload
def solve(
    W: npt.ArrayLike,
    G: npt.ArrayLike | Gram,
    bits: int = 4,
    *,
    recipe: str | Recipe = "balanced",
    group_size: int | None = None,
    scale_dtype: Literal["float32", "float16"] = "float32",
    fit_bias: bool = False,
    cross: npt.ArrayLike | None = None,
    shrinkage: float | Literal["auto", "nonlinear"] = "auto",
    backend: Literal["auto", "cpu"] = "auto",
    overwrite: bool = False,
    threads: int | None = None,
    callback: Callback | None = None,
    codebook: Literal["planes"],
) -> PlaneArray: ...
def solve(
    W: npt.ArrayLike,
    G: npt.ArrayLike | Gram | TokenCounts,
    bits: int = 4,
    *,
    recipe: str | Recipe = "balanced",
    group_size: int | Literal["tensor"] | None = None,
    symmetric: bool = False,
    zero_point: npt.ArrayLike = "integer",
    levels: int | None = None,
    scale: npt.ArrayLike | None = None,
    scale_dtype: Literal["float32", "float16"] = "float32",
    fit_bias: bool = False,
    cross: npt.ArrayLike | None = None,
    shrinkage: float | Literal["auto", "nonlinear"] = "auto",
    backend: Literal["auto", "cpu", "cuda"] = "auto",
    overwrite: bool = False,
    threads: int | None = None,
    callback: Callback | None = None,
    codebook: Literal["uniform", "planes"] = "uniform",
) -> Solved:
    """Quantize weights so that the layer's output changes as little as possible.

    Minimises ``||X @ Wq - X @ W||**2`` over integer codes and scales by coordinate descent (COMQ [1]_, algorithms 1
    and 2), knowing the inputs X only by their Gram matrix.

    Parameters
    ----------
    W : array_like of real, shape (m, n), (m,) or (b, m, n)
        Weights of a layer that computes ``X @ W``: a column for each output channel. Taken as float32. With a leading
        axis, of many small layers at once, such as the groups of a convolution: each is solved as if on its own. `W`
        and `G` may also be C-contiguous arrays of float32 (`G`: or float64) on a GPU, of CuPy or any other library that
        has the CUDA array interface; they are used where they are.
    G : array_like of real, shape (m, m) or (b, m, m), or Gram, or TokenCounts
        Gram matrix ``X.T @ X`` of the inputs; any positive multiple gives the same codes. Of many layers at once a
        `Gram` has as many `problems`. `TokenCounts` are the matrix of an embedding, W (m, n) with a row for each token.
        A `CrossGram` is one with `cross`, of inputs that a grid may quantize; with it, `fit_bias` takes up the mean of
        all of the error. The codes are of weights that absorb the scales of a `ChannelGrid`.
    bits : int from 1 to 16
        Bits of one code.
    recipe : str or Recipe
        "balanced", "best", "fast", "paper" or "rtn", see `recipe`, or a recipe of your own.
    group_size : int, "tensor" or None
        Rows that share a scale and a zero point in each column, the last group maybe fewer; "tensor" has one for the
        whole of `W` (for each of its matrices), None one for each column.
    symmetric : bool
        Whether the zero point is ``levels // 2`` everywhere, a signed grid.
    zero_point : "integer", "real", or array_like of real, shape () or ([b,] groups, n)
        Code that stands for 0: a whole number, or any number, of the solver's choice. A real one takes out a little
        more of the error, but no code may be exactly 0. Numbers fix it, and need `scale`.
    levels : int from 2 to 65,536, optional
        Number of codes, in place of `bits`: 3 is ternary.
    scale : array_like of real > 0, shape () or ([b,] groups, n), optional
        Scales to keep as they are.
    scale_dtype : {"float32", "float16"}
        Type of the scales. Those of float16 are rounded inside the solve, which chooses the codes for what is stored.
    fit_bias : bool
        Whether the layer's bias takes up the mean of the output error, which `bias_shift` then returns: the objective
        is that of the centred inputs. Needs a `Gram`, which knows the mean.
    cross : array_like of real, shape ([b,] m, m) or (2, [b,] m, m), optional
        ``Xq.T @ X`` where `G` is ``Xq.T @ Xq`` of the inputs `Xq` of a model whose layers before this one are quantized
        and `X` are the float model's: minimises ``||Xq @ Wq - X @ W||**2``, by solving for `matched_weights` in place
        of `W`. The report, and what is said here of plain rounding, refer to these. Not with `fit_bias`.
    shrinkage : float from 0 to 1, "auto" or "nonlinear"
        Share s of the identity in the matrix that is minimised, ``(1 - s) * G + s * mean(diag(G)) * I``, so that the
        codes hold on other inputs. "auto" chooses it, where the recipe starts by Babai's nearest plane, by
        cross-validation for a `Gram` with samples in both folds, one for many layers at once; with `TokenCounts` it is
        the one by which every token counts once more. Otherwise it is 0. "nonlinear" shrinks each eigenvalue by itself,
        to the variance that the other fold has along its eigenvector, for an eigendecomposition of each fold: better on
        inputs that come from few images or texts, less so on independent ones. It needs a `Gram`, and is "auto" with
        `TokenCounts`.
    backend : {"auto", "cpu", "cuda"}
        Where to solve: on the CPU or on a GPU, by the extra `cuda`. "auto" takes the GPU for problems that are large
        enough, of 2**27 multiplications in ``G @ W``, or on the GPU already; it says in the report why it does not. A
        layer that does not fit into the memory of the GPU beside its matrix is solved there in parts of its columns.
    overwrite : bool
        Whether the CPU may use `G`, a C-contiguous and writeable array of float32 or float64, as working memory, which
        saves a copy of it. It holds no matrix afterwards, and objectives of more than 64 rows are then computed in
        single precision.
    threads : int >= 1, optional
        Threads of the CPU to use, by default one for each core; the result is the same to the bit for any number.
    callback : callable, optional
        Called as ``callback(sweep, objective)`` after every sweep and every tabu search, counted from 1; for each part
        of the columns, where a GPU solves them in parts.
    codebook : {"uniform", "planes"}
        "uniform" has equal steps between the levels. With "planes", each bit of a code has a real scale of its own for
        each group and column, and a weight is the sum of those of its bits that are 1, less a real offset: up to 8
        bits, on the CPU, without `levels`, `symmetric`, `zero_point`, `scale` and ``group_size="tensor"``.

    Returns
    -------
    QuantizedArray, or PlaneArray with ``codebook="planes"``
        Codes, scale, zero point and report. On the given objective it is never worse than plain rounding on the
        min-max grid (on the given grid, if `scale` is given; with planes, on that with a real zero point, but for what
        the stored type rounds off the offset).

    Raises
    ------
    InputError
        If an argument is not as described above, not finite, or does not match another; the inputs are never modified,
        but for `G` with `overwrite`.

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
    if isinstance(G, CrossGram):
        options = {name: value for name, value in locals().items() if name not in ("W", "G", "fit_bias", "cross")}
        return _solve_cross(W, G, checks.boolean("fit_bias", fit_bias), cross, options)
    started = time.perf_counter()
    steps = recipes.recipe(recipe)
    if checks.choice("codebook", codebook, ("uniform", "planes")) == "planes":
        _check_planes(bits, levels, group_size, symmetric, zero_point, scale, backend, W, G)
        zero_point, backend = "real", "cpu"
    bits, levels = checks.bits_and_levels(bits, levels)
    group_size, symmetric = checks.group_size(group_size), checks.boolean("symmetric", symmetric)
    fit_bias, overwrite = checks.boolean("fit_bias", fit_bias), checks.boolean("overwrite", overwrite)
    if callback is not None and not callable(callback):
        raise checks.InputError(f"`callback` must be callable, got {callback!r}.")
    if overwrite:
        checks.overwritable("G", G)
    way = checks.shrinkage(shrinkage)
    if way == "nonlinear" and not isinstance(G, Gram | TokenCounts):
        raise checks.InputError(f'`G` must be a comq_np.Gram with `shrinkage="nonlinear"`, got {type(G).__name__!r}.')
    given_on_device = checks.on_device(W) or checks.on_device(G)
    weights = backends.weights(W) if cross is None else _matched(W, G, cross, fit_bias, given_on_device)
    rows = weights.shape[weights.ndim == 3]
    columns = weights if weights.ndim == 3 else weights.reshape((1, rows, weights.size // rows))
    size = min(group_size, rows) if isinstance(group_size, int) else rows
    real = isinstance(zero_point, str) and zero_point == "real"
    half = checks.choice("scale_dtype", scale_dtype, ("float32", "float16")) == "float16"
    kind = Kind(size, group_size == "tensor", levels, symmetric, real, half)
    given = _given_grid(columns, kind, weights.ndim == 3, scale, zero_point)
    if given:
        steps = steps.replace(refit=False)

    with Workers(min(checks.thread_count(threads), 1 + columns.size * rows // WORK)) as pool:
        diagonal = isinstance(G, TokenCounts)
        machine, notes = backends.chosen(backend, steps, kind, columns.shape, given_on_device, pool, diagonal)
        make = functools.partial(_gram, G, weights.shape, fit_bias)
        layer = _Layer(G, make, bits, group_size, kind, steps, fit_bias, overwrite, callback, machine, codebook)
        try:
            q = layer.solved(columns, given, way)
        except checks.OnlyOnCPU as error:
            if backend == "cuda" or given_on_device:
                raise
            layer, notes = dataclasses.replace(layer, machine=Host(pool)), [f"Solved on the CPU: {error}"]
            q = layer.solved(columns, given, way)
    notes = [*notes, *[MATCHED] * (cross is not None), *q.report.notes]
    report = dataclasses.replace(q.report, seconds=time.perf_counter() - started, notes=tuple(notes))
    q = dataclasses.replace(_shaped(q, weights.shape), report=report)
    if not fit_bias or not isinstance(G, Gram):
        return q
    return dataclasses.replace(q, bias_shift=_bias_shift(G.mean, backends.on_host(weights) - q.dequantize()))


def _solve_cross(W: npt.ArrayLike, G: CrossGram, fit_bias: bool, cross: object, options: dict[str, Any]) -> Solved:
    """Solution for the outputs of the float model, and what the bias takes up of their error, of the inputs, too."""
    if cross is not None:
        raise checks.InputError("`cross` must be None with a CrossGram, which has it.")
    if G.count == 0:
        raise checks.InputError("`G` must have seen inputs, got a CrossGram with count 0.")
    if not checks.on_device(W):
        W = G.absorbed(W)
    elif isinstance(G.grid, ChannelGrid):
        raise checks.InputError("`W` must be in the memory of the CPU with a ChannelGrid, is on a GPU.")
    plain, products = G.problem(centred=fit_bias)
    q: Solved = solve(W, plain, cross=products, **options)
    q = dataclasses.replace(q, activation=G.grid)
    if not fit_bias:
        return q
    given, got = (values.reshape(*G.mean.shape, -1) for values in (backends.weights(W), q.dequantize()))
    return dataclasses.replace(q, bias_shift=_as_shift(combined(G.exact_mean, given) - combined(G.mean, got)))


def solve_columns(W: npt.NDArray[np.float32], G: Gram, part: slice, **options: Any) -> tuple[Solved, float]:
    """Solution of some columns of `W` ([b,] m, n), and the objective that they would have without weights.

    They are solved as one of several parts of a layer, which may be solved anywhere and in any order: each chooses the
    shrinkage of the whole by itself, by the same columns.
    """
    seconds = 0.0
    if options["shrinkage"] == "auto":
        report = solve(W[..., sampled(W.shape[-1], W.shape[0] if W.ndim == 3 else 1)], G, **options).report
        seconds, options = report.seconds or 0.0, {**options, "shrinkage": report.shrinkage}
    q = solve(W[..., part], G, **options)
    q = dataclasses.replace(q, report=dataclasses.replace(q.report, seconds=seconds + (q.report.seconds or 0.0)))
    if q.report.relative_error:
        return q, q.report.objective / q.report.relative_error
    if isinstance(G, CrossGram):
        W = G.absorbed(W)
    matrix, columns = G.centred if options["fit_bias"] else G.matrix, W[..., part].astype(np.float64)
    return q, float(np.vdot(columns, matrix @ columns))


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What all columns (b, m, n) of a layer have in common; `make` makes the matrices (b, m, m) of a backend."""

    G: Any
    make: Callable[[Backend], Any]
    bits: int
    group_size: int | Literal["tensor"] | None
    kind: Kind
    steps: Recipe
    fit_bias: bool
    overwrite: bool
    callback: Callback | None
    machine: Backend
    codebook: str

    def solved(self, columns: Any, given: Grid | None, shrinkage: float | str) -> Solved:
        """Solution of all columns, in parts if there are too many of them."""
        how: float | str | Nonlinear = shrinkage
        if shrinkage == "nonlinear" and isinstance(self.G, Gram):
            how = nonlinear(self.G, self.fit_bias, self.machine)
        parts = self.machine.parts(columns.shape, self.kind, self.steps)
        if len(parts) == 1:
            return self.part(columns, parts[0], given, how)[0]
        matrices = self.make(self.machine)
        layer = dataclasses.replace(self, make=lambda _: matrices)
        if isinstance(how, str):
            some = layer.problem(columns, sampled(columns.shape[2]), matrices)
            how = _shrinkage(how, some, self.G, self.fit_bias, self.steps, self.machine)
        found = [layer.part(columns, part, given and given.part(part), how) for part in parts]
        return joined(*zip(*found, strict=True))

    def problem(self, columns: Any, part: slice | npt.NDArray[np.intp], matrices: Any) -> Problem:
        """Problem of some of the columns."""
        ours = self.overwrite or not (isinstance(matrices, np.ndarray) and np.may_share_memory(matrices, self.G))
        return self.machine.problem(self.machine.weights(columns, part), matrices, self.steps.order, self.kind, ours)

    def part(
        self, columns: Any, part: slice, given: Grid | None, shrinkage: float | str | Nonlinear
    ) -> tuple[Solved, float]:
        """Solution of some of the columns, arrays (b, ...), and the objective that they would have without weights."""
        machine, steps = self.machine, self.steps
        matrices = self.make(machine)
        double = matrices.dtype == np.float64
        problem = self.problem(columns, part, matrices)
        del matrices
        again = None if self.overwrite else functools.partial(self.make, machine)
        judge = machine.judge(problem, again, double)
        plain = given or machine.start_grid(problem, "minmax")
        rounding = judge.rounding(plain)
        if isinstance(shrinkage, Nonlinear):  # of whose objectives none tells that of the given matrix
            told, share = 1.0, shrinkage.share
            problem = machine.with_matrix(problem, machine.fold(problem, shrinkage.matrices))
        else:
            told = share = _shrinkage(shrinkage, problem, self.G, self.fit_bias, steps, machine)
            problem = machine.shrunk(problem, share)
        proving = steps.replace(exact=0) if self.codebook == "planes" else steps
        found = minimise(problem, proving, given, plain, None if told else rounding, self.callback, machine)
        finish = self._planes if self.codebook == "planes" else self._uniform
        done = finish(problem, found, judge, plain, rounding, told)
        objective, norm = problem.scaled_total(done.objective), problem.scaled_total(judge.weights(found.size, told))
        notes = [*_scarce(self.G, problem.W.shape[1], share), *found.notes, *plain.notes]
        if self.codebook == "planes":  # which have no zero point
            notes = [note for note in notes if grids.OUTSIDE not in note]
        report = SolveReport(
            recipe=steps.name,
            backend=machine.name,
            objective_rounding=problem.total(rounding),
            objective_start=found.start,
            objectives=tuple(found.objectives),
            objective=problem.total(done.objective),
            relative_error=objective / norm if norm > 0 else float(np.inf if objective > 0 else 0),
            sweeps=len(found.objectives),
            codes_changed=tuple(found.changed),
            converged=found.converged,
            shrinkage=share,
            optimal=done.optimal,
            gap=done.gap,
            seconds=0.0,
            notes=_notes(problem, notes, done.dead, int(done.kept.sum()), given is not None, self.fit_bias),
        )
        return done.array(report), norm

    def _uniform(
        self, problem: Problem, found: Outcome, judge: Judging, plain: Grid, rounding: Float64, share: float
    ) -> _Done:
        """Codes on a uniform grid."""
        machine, best = self.machine, found.best
        best.objective = judge.errors(best, share)
        kept = keep_rounding(problem, best, plain, rounding, machine)
        if kept.any():  # whose objective is as exact as rounding's was, not as that of the others
            best.objective = judge.errors(best, 0.0)
            rounding[kept] = best.objective[kept]
        optimal, gap = _gap(problem, found, kept, machine)
        dead = machine.round_dead_rows(problem, best)
        codes = machine.in_users_order(problem, best.codes, self.bits)
        scale, zero_point = (_by_group(problem, values) for values in (best.grid.scale, best.grid.zero_point))
        scale = scale.astype(np.float16) if self.kind.half else scale
        make = functools.partial(
            QuantizedArray, codes, scale, zero_point, self.bits, self.kind.levels, self.group_size, None
        )
        return _Done(make, best.objective, kept, dead, optimal, gap)

    def _planes(
        self, problem: Problem, found: Outcome, judge: Judging, plain: Grid, rounding: Float64, share: float
    ) -> _Done:
        """Codes of bit planes."""
        machine, dtype = self.machine, np.float16 if self.kind.half else np.float32
        assert isinstance(machine, Host), "planes are solved on the CPU"
        assert isinstance(judge, Judge), "as the host has them"
        assert not isinstance(self.group_size, str), "planes have scales for each column"
        best = planes.minimised(problem, self.steps, found, self.bits, machine.pool, self.callback)
        objective, kept = planes.judged(problem, best, plain, rounding, judge, share)
        dead = best.round_dead_rows()
        codes = machine.in_users_order(problem, best.codes.astype(np.float32), self.bits)
        scale = np.stack([_by_group(problem, one) for one in np.moveaxis(best.planes.scale, 2, 0)], axis=1)
        offset = _by_group(problem, best.planes.offset)
        make = functools.partial(
            PlaneArray, codes, scale.astype(dtype), offset.astype(dtype), self.bits, self.group_size, None
        )
        return _Done(make, objective, kept, dead)


class _Done(NamedTuple):
    """The array once there is a report for it, and what that says."""

    array: Callable[[SolveReport], Any]
    objective: Float64
    kept: npt.NDArray[np.bool_]
    dead: int
    optimal: bool = False
    gap: float | None = None


def _shaped(q: Solved, shape: tuple[int, ...]) -> Solved:
    """Arrays of a solution (b, ...) as they are for weights of that shape."""
    apart: dict[str, Any] = {
        name: values if len(shape) == 3 else values[0]
        for name, values in vars(q).items()
        if isinstance(values, np.ndarray)
    }
    return dataclasses.replace(q, **{**apart, "codes": q.codes.reshape(shape)})


def _check_planes(
    bits: int, levels: Any, group_size: Any, symmetric: Any, zero_point: Any, scale: Any, backend: Any, W: Any, G: Any
) -> None:
    """Refuse what is of uniform codes only."""
    checks.integer("bits", bits, 1, checks.MAX_PLANES)
    plain = isinstance(zero_point, str) and zero_point == "integer"
    refused = {
        "levels": (levels is None, "None", levels),
        "group_size": (group_size != "tensor", "None or a number of rows", group_size),
        "symmetric": (not symmetric, "False", symmetric),
        "zero_point": (plain, "left out", zero_point),
        "scale": (scale is None, "None", "numbers"),
        "backend": (backend != "cuda", '"cpu" or "auto"', backend),
        "W": (not checks.on_device(W), "an array of NumPy", "one on a GPU"),
        "G": (not isinstance(G, TokenCounts) and not checks.on_device(G), "a Gram or an array of NumPy", type(G)),
    }
    for name, (fits, must, got) in refused.items():
        if not fits:
            raise checks.InputError(f'`{name}` must be {must} with `codebook="planes"`, got {got!r}.')


def _matched(W: npt.ArrayLike, G: Any, cross: npt.ArrayLike, fit_bias: bool, given_on_device: bool) -> Any:
    """Weights to solve for with `cross`."""
    if fit_bias:
        raise checks.InputError("`fit_bias` must be False with `cross`, which does not tell the mean of X, got True.")
    if isinstance(G, TokenCounts):
        raise checks.InputError("`cross` must be None with TokenCounts, whose inputs no quantized layer changes.")
    if given_on_device:
        raise checks.InputError("`W` and `G` must be arrays of NumPy with `cross`, got one on a GPU.")
    return matched_weights(W, G, cross)


def _gram(G: npt.ArrayLike | Gram | TokenCounts, shape: tuple[int, ...], fit_bias: bool, machine: Backend) -> Any:
    """Matrices (b, m, m) to solve with, for weights of that shape."""
    problems, rows = (shape[0], shape[1]) if len(shape) == 3 else (None, shape[0])
    if not isinstance(G, Gram):
        if fit_bias:
            raise checks.InputError(
                f"`G` must be a comq_np.Gram, which knows the mean of the inputs, with `fit_bias`, "
                f"got {type(G).__name__!r}."
            )
        return machine.matrices(G, problems, rows)
    matrices = machine.matrices(G.centred if fit_bias else G.matrix, problems, rows)
    if G.count == 0:
        raise checks.InputError("`G` must have seen inputs, got a Gram with count 0.")
    return matrices


def _given_grid(
    columns: npt.NDArray[np.float32], kind: Kind, batch: bool, scale: npt.ArrayLike | None, zero_point: npt.ArrayLike
) -> Grid | None:
    """Grid with the caller's scale, where there is one."""
    chosen = isinstance(zero_point, str)
    if chosen:
        checks.choice("zero_point", zero_point, ("integer", "real"))
    if kind.symmetric and not (chosen and zero_point == "integer"):
        got = repr(zero_point) if chosen else "numbers"
        raise checks.InputError(f'`zero_point` must be "integer" with `symmetric`, which fixes it, got {got}.')
    if scale is None:
        if not chosen:
            raise checks.InputError('`zero_point` must be "integer" or "real" without `scale`, got numbers.')
        return None
    if kind.real:
        raise checks.InputError("`zero_point` must be \"integer\" or numbers with `scale`, got 'real'.")
    b, m, n = columns.shape
    shape = -(-m // kind.group_size), n, b if batch else None, kind.whole
    steps = checks.scales(checks.per_group("scale", scale, *shape))
    if kind.half and (grids.stored(steps, half=True) != steps).any():
        raise checks.InputError('`scale` must hold numbers of float16 with `scale_dtype="float16"`, got others.')
    offsets = None if chosen else checks.zero_points(checks.per_group("zero_point", zero_point, *shape))
    return grids.fixed(
        backends.on_host(columns), steps, offsets, kind.levels, kind.group_size, kind.whole, kind.symmetric, kind.half
    )


def _shrinkage(
    value: float | str, problem: Problem, G: object, fit_bias: bool, steps: Recipe, machine: Backend
) -> float:
    """Shrinkage that is given, or chosen where that is possible."""
    if not isinstance(value, str):
        return value
    if isinstance(G, TokenCounts):
        return smoothing(G) if steps.start == "babai" else 0.0
    if not isinstance(G, Gram) or steps.start != "babai" or not all(fold.count for fold in G.folds):
        return 0.0
    rows = len(G)
    folds = [machine.fold(problem, G.fold_matrix(k, centred=fit_bias).reshape(-1, rows, rows)) for k in (0, 1)]
    return cross_validated(problem, folds, G.count, steps, machine)


def _gap(problem: Problem, found: Outcome, kept: npt.NDArray[np.bool_], machine: Backend) -> tuple[bool, float | None]:
    """Whether the codes are proven optimal at their scales, and how far at most they are from it, if that is known."""
    if found.proof is None:
        return False, None
    total = problem.total(machine.measured(problem, found.best.codes, found.best.grid).objective)
    if total <= 0 or (found.proof.optimal & ~kept).all():
        return True, 0.0
    return False, 1.0 - problem.total(np.where(kept, 0.0, np.maximum(found.proof.bound, 0))) / total


def _bias_shift(mean: Float64, error: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Mean error of the outputs, ([b,] n), from the mean of the inputs ([b,] m)."""
    return _as_shift(combined(mean, error.reshape(*mean.shape, -1)))


def _as_shift(shift: Float64) -> npt.NDArray[np.float32]:
    """The same as a bias holds it."""
    if np.abs(shift).max() > np.finfo(np.float32).max:
        raise checks.InputError(
            f"`G` and `W` must be smaller with `fit_bias`: the bias must fit in float32, got {np.abs(shift).max():g}."
        )
    return shift.astype(np.float32)


def _by_group(problem: Problem, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values (b, groups, n) from those with a row for each column of all problems."""
    return np.ascontiguousarray(values.reshape(problem.W.shape[0], -1, values.shape[1]).transpose(0, 2, 1))


def _scarce(G: object, rows: int, share: float) -> list[str]:
    """A sentence where there are fewer samples than rows."""
    if not isinstance(G, Gram) or G.count >= rows:
        return []
    done = f"it is shrunk by {share:.3g}" if share else "it is not shrunk"
    return [f"`G` has seen {G.count} samples for {rows} rows, too few to tell their inputs apart: {done}."]


def _notes(problem: Problem, found: list[str], dead: int, kept: int, fixed: bool, centred: bool) -> tuple[str, ...]:
    """A sentence for every substitution made."""
    notes = list(dict.fromkeys(found))
    if dead:
        what = "never vary, which the bias takes up" if centred else "are always zero"
        notes.append(f"{dead} of {problem.order.size} inputs {what}: the codes of their rows are rounded to nearest.")
    if kept:
        what = f"plain rounding on {'the given' if fixed else 'the min-max'} grid"
        notes.append(f"{kept} of {problem.count} columns keep {what}, which the sweeps did not improve on.")
    return tuple(notes)
