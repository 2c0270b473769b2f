"""Mixed precision: how many bits each layer of a calibration file gets, so that all of them stay within a size."""

from __future__ import annotations

import dataclasses
import glob
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from comq_np import checks, cluster, hdf5, knapsack, pipeline, schedule, tasks, widths
from comq_np.durable import fingerprint
from comq_np.quantized import stored_bytes
from comq_np.recipes import Recipe
from comq_np.schedule import Limits
from comq_np.store import CalibrationFile, Path

#: Bits that a layer may get, unless that is said.
WIDTHS = range(2, 9)
#: Bytes that are given as bits a weight are as many again.
EXACT = 1 + 2**-50
#: Largest sensitivity of a layer.
MOST = 1e100


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Allocation(Mapping[str, int]):
    """Bits of each layer, which `quantize_file` takes as its `bits`: a mapping from the names of layers to bits.

    Of all choices that take ``budget_bits * weights / 8`` bytes at most it has the least sum over the layers of
    sensitivity times relative error; an error above 1, with which no weights at all would do as well, counts as 1.
    A name with ``*``, ``?`` or ``[`` is a key in the form of the pattern that only it matches (`glob.escape`).

    Parameters
    ----------
    budget_bits : float
        Bits a weight that are allowed, in the mean of all weights.
    curves : mapping
        Of each layer, by its name, what it is at each number of bits: a mapping from these to (bytes, relative error).
        The bytes are those of codes, scales, zero points and bias shift in a quantized file.
    weights : mapping from str to int
        Number of weights of each of these layers.
    sensitivities : mapping from str to float, optional
        How much a relative error of each layer counts; by default, all count alike.
    kept : mapping from str to str, optional
        Reason why each layer that could be solved at no number of bits stays float; it gets bits, but counts nowhere.

    Raises
    ------
    InputError
        If the budget is below what the layers take at least, or a layer has no point on its curve, a negative number,
        or no number of weights, or no sensitivity where some are given.

    Examples
    --------
    >>> import comq_np
    >>> curves = {"body": {2: (25, 0.1), 4: (50, 0.01)}, "head": {2: (25, 0.3), 4: (50, 0.02)}}
    >>> plan = comq_np.Allocation(3.0, curves, {"body": 100, "head": 100})
    >>> dict(plan), plan.bytes, plan.stored_bits
    ({'body': 2, 'head': 4}, 75, 3.0)
    """

    budget_bits: float
    curves: Mapping[str, Mapping[int, tuple[int, float]]]
    weights: Mapping[str, int]
    sensitivities: Mapping[str, float] | None = None
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    _chosen: dict[str, int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget_bits", _checked_budget(self.budget_bits))
        _check(self.curves, self.weights, self.sensitivities)
        curves = []
        for name, points in self.curves.items():
            sizes, errors = zip(*points.values(), strict=True)
            costs = self._sensitivity(name) * np.minimum(np.array(errors, np.float64), 1.0)
            curves.append(knapsack.Curve(np.array(sizes, np.int64), costs))
        weights = sum(self.weights[name] for name in self.curves)
        least, budget = (
            sum(int(curve.sizes.min()) for curve in curves),
            math.floor(self.budget_bits * weights / 8 * EXACT),
        )
        if least > budget:
            needed = math.ceil(8e4 * least / weights) / 1e4
            raise checks.InputError(
                f"`budget_bits` must be at least {needed:g}, as scales and zero points count, too, "
                f"got {self.budget_bits:g}."
            )
        options = [[*points] for points in self.curves.values()]
        found = [some[choice] for some, choice in zip(options, knapsack.best_choices(curves, budget), strict=True)]
        object.__setattr__(self, "_chosen", dict(zip(self.curves, found, strict=True)))

    def _sensitivity(self, name: str) -> float:
        return 1.0 if self.sensitivities is None else self.sensitivities[name]

    @property
    def bytes(self) -> int:
        """Bytes of the arrays of all layers in a quantized file, solved with the same options."""
        return sum(self.curves[name][bits][0] for name, bits in self._chosen.items())

    @property
    def stored_bits(self) -> float:
        """These in bits a weight; 0 where there are none."""
        return 8 * self.bytes / max(1, sum(self.weights[name] for name in self._chosen))

    @property
    def error(self) -> float:
        """Sum over the layers of sensitivity times relative error, which is minimised."""
        points = ((name, self.curves[name][bits]) for name, bits in self._chosen.items())
        return math.fsum(self._sensitivity(name) * min(error, 1.0) for name, (_, error) in points)

    def describe(self, name: str) -> dict[str, Any]:
        """Describe one layer.

        Parameters
        ----------
        name : str
            Name of the layer, as in `curves`.

        Returns
        -------
        dict
            Its name, weights, bits, bytes, relative error and sensitivity.

        Raises
        ------
        KeyError
            If there is no such layer.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.Allocation(3.0, {"fc": {2: (25, 0.1)}}, {"fc": 100}).describe("fc")["bytes"]
        25
        """
        bits = self._chosen[name]
        size, error = self.curves[name][bits]
        found = {"layer": name, "weights": self.weights[name], "bits": bits, "bytes": size}
        return {**found, "relative_error": error, "sensitivity": self._sensitivity(name)}

    def within(self, budget_bits: float) -> Allocation:
        """Allocate again with another budget, which takes no new solves.

        Parameters
        ----------
        budget_bits : float
            Bits a weight that are allowed.

        Returns
        -------
        Allocation
            The allocation, from the same curves.

        Raises
        ------
        InputError
            If that is below what the layers take at least.

        Examples
        --------
        >>> import comq_np
        >>> plan = comq_np.Allocation(4.0, {"fc": {2: (25, 0.1), 4: (50, 0.01)}}, {"fc": 100})
        >>> dict(plan), dict(plan.within(3.5))
        ({'fc': 4}, {'fc': 2})
        """
        return Allocation(budget_bits, self.curves, self.weights, self.sensitivities, self.kept)

    def to_dict(self) -> dict[str, Any]:
        """Return what it is made of, and its bits, as a dict that JSON can hold: ``comq solve --bits @FILE`` takes it.

        Returns
        -------
        dict
            The parameters by name, with ``bits``, ``bytes`` and ``error``. Numbers of bits are text in the curves.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.Allocation(3.0, {"fc": {2: (25, 0.1)}}, {"fc": 100}).to_dict()["bits"]
        {'fc': 2}
        """
        curves = {
            name: {str(bits): [size, error if error < math.inf else None] for bits, (size, error) in points.items()}
            for name, points in self.curves.items()
        }
        sensitivities = None if self.sensitivities is None else dict(self.sensitivities)
        return {
            "budget_bits": self.budget_bits,
            "bits": dict(self),
            "bytes": self.bytes,
            "error": self.error,
            "weights": dict(self.weights),
            "sensitivities": sensitivities,
            "curves": curves,
            "kept": dict(self.kept),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Allocation:
        """Undo `to_dict`, also after a way through JSON.

        Parameters
        ----------
        values : dict
            What `to_dict` returned.

        Returns
        -------
        Allocation
            The same allocation.

        Raises
        ------
        InputError
            If it is no such dict.

        Examples
        --------
        >>> import comq_np
        >>> plan = comq_np.Allocation(3.0, {"fc": {2: (25, 0.1)}}, {"fc": 100})
        >>> comq_np.Allocation.from_dict(plan.to_dict()) == plan
        True
        """
        try:
            curves = {
                name: {
                    int(bits): (int(size), math.inf if error is None else float(error))
                    for bits, (size, error) in points.items()
                }
                for name, points in values["curves"].items()
            }
            weights = {name: int(values["weights"][name]) for name in curves}
            given = values["sensitivities"]
            sensitivities = None if given is None else {name: float(given[name]) for name in curves}
            kept = {str(name): str(reason) for name, reason in values["kept"].items()}
            return cls(values["budget_bits"], curves, weights, sensitivities, kept)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, checks.InputError):
                raise
            raise checks.InputError(
                f"`values` must be what `Allocation.to_dict` returns, got {values!r:.60}."
            ) from None

    def __getitem__(self, name: str) -> int:
        return self._patterns()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns())

    def __len__(self) -> int:
        return len(self._chosen) + len(self.kept)

    def __repr__(self) -> str:
        return f"Allocation({self._patterns()}, budget_bits={self.budget_bits:g}, stored_bits={self.stored_bits:.4g})"

    def _patterns(self) -> dict[str, int]:
        most = max(self._chosen.values(), default=max(WIDTHS))
        return {glob.escape(name): bits for name, bits in {**self._chosen, **dict.fromkeys(self.kept, most)}.items()}


def allocate_bits(
    calibration: Path,
    budget_bits: float,
    *,
    bits: Iterable[int] = WIDTHS,
    fixed: Mapping[str, int] | None = None,
    sensitivities: Mapping[str, float] | None = None,
    recipe: str | Recipe = "balanced",
    group_size: int | Literal["tensor"] | None = None,
    symmetric: bool = False,
    zero_point: Literal["integer", "real"] = "integer",
    scale_dtype: Literal["float32", "float16"] = "float32",
    codebook: Literal["uniform", "planes"] = "uniform",
    fit_bias: bool = True,
    shrinkage: float | Literal["auto", "nonlinear"] = "auto",
    backend: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    workers: int | None = None,
    memory: int | str | None = None,
    client: Any = None,
    progress: bool = False,
) -> Allocation:
    """Choose the bits of each layer of a calibration file so that their errors are least within a size.

    Every layer is solved at every number of bits, which tells its relative error and the bytes that it takes. Among all
    allocations within the budget, the one with the least sum of sensitivity times relative error is found exactly, by
    dynamic programming. Nothing is kept of a run that is interrupted; another budget takes no new one
    (`Allocation.within`).

    Parameters
    ----------
    calibration : str or path-like
        Calibration file.
    budget_bits : float
        Bits that may be stored for a weight, in the mean: those of codes, scales, zero points and bias shifts, as the
        quantized file has them.
    bits : iterable of int from 1 to 16
        Numbers of bits that a layer may get.
    fixed : mapping from str to int from 1 to 16, optional
        Bits of layers, by names or patterns as in `layer_bits`, that are not to be chosen but count in the budget.
    sensitivities : mapping from str to float >= 0, optional
        By names or patterns: how much the output of the whole model changes with a relative error of the layer, as an
        adapter's ``sensitivities`` measures it. By default, all relative errors count alike, which may be worse than
        the same bits for all layers: `benchmarks/allocation.py`.
    recipe : str or Recipe
        As in `quantize_file`, like the options below. The error of "fast" tells as well which layers need bits; the
        bytes are to the last one those of a file that is solved with the same options.
    group_size : int, "tensor" or None
        Rows that share a scale.
    symmetric : bool
        Whether the zero point is in the middle everywhere.
    zero_point : "integer" or "real"
        Whether a zero point is a whole number or any.
    scale_dtype : {"float32", "float16"}
        Type of the scales.
    codebook : {"uniform", "planes"}
        Levels in equal steps, or bit planes, of 8 bits at most.
    fit_bias : bool
        Whether biases take up the mean of the output error.
    shrinkage : float from 0 to 1, "auto" or "nonlinear"
        How much the Gram matrices are shrunk.
    backend : {"auto", "cpu", "cuda"}
        Where to solve.
    threads : int >= 1, optional
        Threads to use for all layers together.
    workers : int >= 1, optional
        Layers to solve at once at most.
    memory : int or str, optional
        Bytes that reading and solving layers may take together.
    client : dask.distributed.Client, optional
        Client of a cluster that solves the layers.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    Allocation
        A mapping from the names of layers to bits, for `bits` of `quantize_file`.

    Raises
    ------
    InputError
        If an option is not as above, or the budget is below what the layers take at least: the message says how much
        that is.
    FileError
        If the file cannot be read.

    Warns
    -----
    UserWarning
        If layers could not be solved.

    Examples
    --------
    >>> import comq_np, numpy as np, os, tempfile
    >>> rng, path = np.random.default_rng(0), os.path.join(tempfile.mkdtemp(), "calibration.h5")
    >>> with comq_np.CalibrationWriter(path) as file:
    ...     for name, m in (("body", 64), ("head", 8)):
    ...         gram = comq_np.Gram(m)
    ...         gram.update(rng.normal(size=(200, m)))
    ...         file.add(comq_np.Layer(name, rng.normal(size=(m, 32)), gram))
    >>> plan = comq_np.allocate_bits(path, 5, fixed={"head": 8})
    >>> dict(plan), plan.stored_bits <= 5
    ({'body': 3, 'head': 8}, True)
    """
    budget_bits, progress = _checked_budget(budget_bits), checks.boolean("progress", progress)
    offered, limits = _offered(bits), Limits.checked(threads, workers, memory)
    options: dict[str, Any] = {
        "bits": offered[-1],
        "recipe": recipe,
        "group_size": group_size,
        "symmetric": symmetric,
        "levels": None,
        "zero_point": zero_point,
        "scale_dtype": scale_dtype,
        "codebook": codebook,
        "fit_bias": checks.boolean("fit_bias", fit_bias),
        "shrinkage": shrinkage,
        "backend": backend,
    }
    tasks.check(options) if client is None else cluster.check(client, options)
    with CalibrationFile(calibration) as source:
        of_layer = _widths_of(source, offered, fixed)
        counts = _sensitivities_of(source, sensitivities)
        if of_layer and budget_bits <= (least := min(some[0] for some in of_layer.values())):
            raise checks.InputError(
                f"`budget_bits` must be above {least}, the fewest bits of a layer, as scales and zero points count, "
                f"too, got {budget_bits:g}."
            )
        with tqdm(desc="allocate", unit="solve", total=sum(map(len, of_layer.values())), disable=not progress) as bar:
            curves, reasons = _curves(source, calibration, of_layer, options, limits, client, bar)
        sizes = {name: _size(source, name) for name, points in curves.items() if points}
    kept = {name: reasons[name] for name in curves if name not in sizes}
    if kept:
        names = ", ".join(map(repr, kept))
        warnings.warn(f"Could not be solved and stay float, beyond the budget: {names}.", stacklevel=2)
    return Allocation(budget_bits, {name: curves[name] for name in sizes}, sizes, counts, kept)


def _check(curves: Mapping[str, Any], weights: Mapping[str, Any], sensitivities: Mapping[str, Any] | None) -> None:
    """Refuse what are no curves of layers, or do not fit together."""
    for name, points in curves.items():
        with checks.layer(name):
            if not points or not all(size >= 0 and error >= 0 for size, error in points.values()):
                raise checks.InputError(
                    f"`curves` must hold (bytes, relative error) by bits, none negative, got {points}."
                )
            checks.integer("weights", weights.get(name), 1, 2**62)
            if sensitivities is not None:
                checks.number("sensitivities", sensitivities.get(name), 0, MOST)


def _checked_budget(value: object) -> float:
    return checks.number("budget_bits", value, 0, 4 * checks.MAX_BITS)


def _offered(bits: Iterable[int]) -> list[int]:
    """Numbers of bits to choose from, in order."""
    try:
        given = [*bits]
    except TypeError:
        raise checks.InputError(f"`bits` must be an iterable of integers, got {bits!r}.") from None
    if not given:
        raise checks.InputError("`bits` must hold at least one number, got none.")
    return sorted({checks.integer("bits", one, 1, checks.MAX_BITS) for one in given})


def _widths_of(source: CalibrationFile, offered: list[int], fixed: Mapping[str, int] | None) -> dict[str, list[int]]:
    """Numbers of bits that each layer may get."""
    chosen = _by_layer("fixed", {} if fixed is None else fixed, source)
    for name, width in chosen.items():
        chosen[name] = checks.integer(f"fixed[{name!r}]", width, 1, checks.MAX_BITS)
    return {name: [chosen[name]] if name in chosen else offered for name in source}


def _sensitivities_of(source: CalibrationFile, given: Mapping[str, float] | None) -> dict[str, float] | None:
    """Sensitivity of each layer, where they are given."""
    if given is None:
        return None
    found = _by_layer("sensitivities", given, source)
    for name in source:
        if name not in found:
            raise checks.InputError(f"layer {name!r}: `sensitivities` must hold its name or a pattern that it matches.")
    return {name: checks.number(f"sensitivities[{name!r}]", value, 0, MOST) for name, value in found.items()}


def _by_layer(argument: str, given: object, source: CalibrationFile) -> dict[str, Any]:
    """What a mapping of names or patterns has for layers; of several that match one, the last counts."""
    if not isinstance(given, Mapping) or not all(isinstance(pattern, str) for pattern in given):
        raise checks.InputError(f"`{argument}` must map names or patterns of layers to numbers, got {given!r}.")
    known = [*source, *source.skipped]
    idle = [pattern for pattern in given if not any(widths.matches(name, pattern) for name in known)]
    if idle:
        raise checks.InputError(f"`{argument}` must hold names of layers or patterns that match some, got {idle[0]!r}.")
    return {name: value for name in source for pattern, value in given.items() if widths.matches(name, pattern)}


def _curves(
    source: CalibrationFile,
    path: Path,
    of_layer: dict[str, list[int]],
    options: dict[str, Any],
    limits: Limits,
    client: Any,
    bar: tqdm[Any],
) -> tuple[dict[str, dict[int, tuple[int, float]]], dict[str, str]]:
    """Bytes and relative error of each layer at each number of bits, and why some could not be solved."""
    with hdf5.reading(path):
        run = {} if client is None else {pipeline.CONTENT: fingerprint(path)}
    curves: dict[str, dict[int, tuple[int, float]]] = {name: {} for name in of_layer}
    reasons: dict[str, str] = {}
    for width in sorted({width for some in of_layer.values() for width in some}):
        jobs = schedule.jobs(source, {name: width for name, some in of_layer.items() if width in some}, options)
        with pipeline.crew_of(client, source, path, run, options, limits, jobs) as crew:
            for name, outcome in schedule.outcomes(jobs, crew):
                bar.update()
                if isinstance(outcome, Exception):
                    reasons[name] = tasks.reason(outcome, path)
                else:
                    curves[name][width] = stored_bytes(outcome), outcome.report.relative_error
    return curves, reasons


def _size(source: CalibrationFile, name: str) -> int:
    """Number of weights of a layer."""
    row = source.summary(name)
    return int(row["problems"] * row["rows"] * row["columns"])
