"""From file to file: solve every layer of a calibration file."""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from tqdm import tqdm

from comq_np import backends, checks, cluster, hdf5, recipes, schedule, tasks, widths
from comq_np.cluster import Cluster
from comq_np.crew import Local
from comq_np.durable import fingerprint
from comq_np.recipes import Recipe
from comq_np.result import Solved, SolveReport
from comq_np.schedule import Job, Limits
from comq_np.store import CalibrationFile, Path, QuantizedFile, QuantizedWriter
from comq_np.tasks import Outcome
from comq_np.widths import layer_bits

#: What identifies the calibration file of a run.
CONTENT = "the content of the calibration file"
#: Most layers that a warning tells more of than that they are some.
FEW = 5


class Reports(Mapping[str, SolveReport]):
    """What became of the layers of a file: a mapping from the names of those that are solved to their reports.

    Parameters
    ----------
    reports : dict of SolveReport
        Report of each layer that is solved.
    kept : dict of str
        Reason why each layer that could not be solved stays float.
    skipped : dict of str, optional
        Reason why each layer that was not to be solved stays float.

    Examples
    --------
    >>> import comq_np
    >>> report = comq_np.solve([1.0], [[1.0]]).report
    >>> reports = comq_np.Reports({"fc": report}, {"expert.7": "`G` must have seen inputs, got a Gram with count 0."})
    >>> list(reports), list(reports.kept)
    (['fc'], ['expert.7'])
    """

    def __init__(
        self, reports: Mapping[str, SolveReport], kept: Mapping[str, str], skipped: Mapping[str, str] | None = None
    ) -> None:
        self._reports = dict(reports)
        self.kept = dict(kept)
        self.skipped = dict(skipped or {})

    def __getitem__(self, name: str) -> SolveReport:
        return self._reports[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reports)

    def __len__(self) -> int:
        return len(self._reports)

    def __repr__(self) -> str:
        return f"Reports({self._reports}, kept={self.kept}, skipped={self.skipped})"


def quantize_file(
    calibration: Path,
    quantized: Path,
    bits: int | Mapping[str, int] = 4,
    *,
    recipe: str | Recipe = "balanced",
    group_size: int | Literal["tensor"] | None = None,
    symmetric: bool = False,
    levels: int | None = None,
    zero_point: Literal["integer", "real"] = "integer",
    scale_dtype: Literal["float32", "float16"] = "float32",
    fit_bias: bool = True,
    shrinkage: float | Literal["auto", "nonlinear"] = "auto",
    backend: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    workers: int | None = None,
    memory: int | str | None = None,
    client: Any = None,
    strict: bool = False,
    progress: bool = False,
    restart: bool = False,
    codebook: Literal["uniform", "planes"] = "uniform",
) -> Reports:
    """Solve every layer of a calibration file and write the quantized file.

    Each layer is on the disk as soon as it is solved, in a folder beside the file. Where that was interrupted, the same
    call goes on after the layers that are finished, and makes the same file.

    Several layers are solved at once, each on its share of the threads, which changes no bit of the file; one with very
    many columns is several parts, each like a layer of its own. A layer that cannot be solved stays float and stops
    nothing: the file, the result and a warning say why.

    Parameters
    ----------
    calibration : str or path-like
        Calibration file, as an adapter's ``capture`` or `CalibrationWriter` writes it.
    quantized : str or path-like
        Quantized file to write; it is put in its place when complete.
    bits : int from 1 to 16, or mapping from str to such an int
        Bits of one code; or those of layers by their names, or by patterns such as ``"*.head"``, of which the last that
        matches counts, as `layer_bits` says.
    recipe : str or Recipe
        As in `solve`, like the options below.
    group_size : int, "tensor" or None
        Rows that share a scale.
    symmetric : bool
        Whether the zero point is ``levels // 2`` everywhere.
    levels : int from 2 to 65,536, optional
        Number of codes, in place of `bits`.
    zero_point : "integer" or "real"
        Whether a zero point is a whole number or any.
    scale_dtype : {"float32", "float16"}
        Type of the scales.
    fit_bias : bool
        Whether the bias of each layer that has one takes up the mean of the output error.
    shrinkage : float from 0 to 1, "auto" or "nonlinear"
        How much the Gram matrices are shrunk; "auto" chooses it for each layer, where the recipe allows it, "nonlinear"
        for each eigenvalue, which takes longer.
    backend : {"auto", "cpu", "cuda"}
        Where to solve; "auto" takes a GPU where there is one.
    threads : int >= 1, optional
        Threads to use for all layers together, by default one for each core; with `client`, for each layer, by default
        one.
    workers : int >= 1, optional
        Layers to solve at once at most, by default as many as there are threads, but only one where a GPU solves.
    memory : int or str, optional
        Bytes, or a text such as "4GiB", that reading and solving layers may take together; a layer that takes more is
        solved alone. By default what the layer that takes most does; with `client`, any.
    client : dask.distributed.Client, optional
        Client of a cluster that solves the layers, by the extra `dask`. Its workers read the calibration file where
        they see it under the same path; else they are sent the layers. The result is the same to the bit if their
        processors and libraries are.
    strict : bool
        Whether the first layer that cannot be solved stops the run.
    progress : bool
        Whether to show a progress bar on standard error.
    restart : bool
        Whether to drop the layers that an interrupted run has finished. Where the calibration file, one of the options
        from `bits` to `backend`, the codebook or the version of comq_np is another one, there is no going on from
        these.
    codebook : {"uniform", "planes"}
        What codes stand for: levels in equal steps, or sums of their bits, each with a scale of its own.

    Returns
    -------
    Reports
        A mapping from the names of the layers that are solved to their `SolveReport`, in which ``seconds`` is None for
        those that an interrupted run has finished; its `kept` is a dict with the reason why each layer that could not
        be solved stays float, its `skipped` the one of those that the calibration file says are not to be.

    Raises
    ------
    InputError
        If an option is not as `solve` wants it, `bits` has none for a layer, both files are one, or, with `strict`, a
        layer cannot be solved: the message names it.
    FileError
        If a file cannot be read or written, another process writes `quantized`, or layers of another run are kept.
    ConnectionError
        If the scheduler of `client` is lost. What is finished is kept, and the same call goes on there.

    Warns
    -----
    UserWarning
        If layers could not be solved, or take more than `memory`, or a cluster has no workers yet.

    Examples
    --------
    >>> import comq_np, numpy as np, os, tempfile
    >>> folder, gram = tempfile.mkdtemp(), comq_np.Gram(2)
    >>> gram.update([[1.0, 2.0], [3.0, 0.0]])
    >>> calibration, quantized = (os.path.join(folder, name) for name in ("calibration.h5", "quantized.h5"))
    >>> with comq_np.CalibrationWriter(calibration) as file:
    ...     file.add(comq_np.Layer("fc", np.array([[0.3, 1.0], [0.1, 2.0]]), gram))
    >>> reports = comq_np.quantize_file(calibration, quantized, bits=3)
    >>> list(reports)
    ['fc']
    """
    fit_bias, restart = checks.boolean("fit_bias", fit_bias), checks.boolean("restart", restart)
    strict, limits = checks.boolean("strict", strict), Limits.checked(threads, workers, memory)
    progress = checks.boolean("progress", progress)
    checks.path("calibration", calibration)
    if os.path.realpath(calibration) == os.path.realpath(checks.path("quantized", quantized)):
        raise checks.InputError(
            f"`quantized` must be another file than `calibration`, got {os.fspath(quantized)!r} twice."
        )
    options: dict[str, Any] = {
        "bits": bits,
        "recipe": recipe,
        "group_size": group_size,
        "symmetric": symmetric,
        "levels": levels,
        "zero_point": zero_point,
        "scale_dtype": scale_dtype,
        "fit_bias": fit_bias,
        "shrinkage": shrinkage,
        "backend": backend,
        "codebook": codebook,
    }
    one = {**options, "bits": _some(bits, levels)}
    tasks.check(one) if client is None else cluster.check(client, one)
    reports: dict[str, SolveReport] = {}
    with CalibrationFile(calibration) as source:
        of_layer = layer_bits(options["bits"], source, skipped=source.skipped)
        run = _run(calibration, options, of_layer)
        with QuantizedWriter(quantized, run=run, order=source._names, restart=restart) as target:
            for name, why in source.skipped.items():
                if name not in target:
                    target.skip(name, why)
            left = {name: width for name, width in of_layer.items() if name not in target}
            jobs = schedule.jobs(source, left, options)
            with crew_of(client, source, calibration, run, options, limits, jobs) as crew:
                _warn_of_large(jobs, crew.memory)
                found, done = schedule.outcomes(jobs, crew), len(source) - len(left)
                for name, outcome in tqdm(
                    found, desc="solve", unit="layer", total=len(source), initial=done, disable=not progress
                ):
                    _settle(target, name, outcome, strict, calibration)
                    if isinstance(outcome, Solved):
                        reports[name] = outcome.report
    return _reports(quantized, reports)


def _some(bits: int | Mapping[str, int], levels: int | None) -> int:
    """Bits that some layer gets."""
    if not isinstance(bits, Mapping):
        return bits
    if levels is not None:
        raise checks.InputError("`bits` must be a number with `levels`, which all layers have, got a mapping.")
    return max(widths.patterns(bits).values())


def crew_of(
    client: Any,
    source: CalibrationFile,
    path: Path,
    run: dict[str, Any],
    options: dict[str, Any],
    limits: Limits,
    jobs: list[Job],
) -> Local | Cluster:
    """Those who solve the layers."""
    if client is not None:
        return Cluster(client, source, path, run[CONTENT], options, limits)
    shapes = [job.shape for job in jobs if job.shape and not job.diagonal]
    backend = options["backend"] if options["codebook"] == "uniform" else "cpu"
    on_gpu = backends.takes_gpu(backend, recipes.recipe(options["recipe"]), shapes)
    return Local(source, options, limits, jobs, on_gpu=on_gpu)


def _warn_of_large(jobs: list[Job], memory: float) -> None:
    large = {job.name: f"{job.need(1):,} bytes" for job in jobs if job.need(1) > memory}
    if large:
        what = f"Solved alone, since they take more than the `memory` of {memory:,} bytes"
        warnings.warn(f"{what}: {_listed(large)}.", stacklevel=3)


def _settle(target: QuantizedWriter, name: str, outcome: Outcome, strict: bool, calibration: Path) -> None:
    """Write what came of a layer."""
    try:
        if isinstance(outcome, Solved):
            target.add(name, outcome)
            return
        error = outcome
    except checks.InputError as refused:  # such as an objective that is infinite
        error = checks.InputError(str(refused).removeprefix(f"layer {name!r}: "))
    if not strict:
        target.keep(name, tasks.reason(error, calibration))
        return
    with checks.layer(name):
        raise error


def _reports(quantized: Path, reports: dict[str, SolveReport]) -> Reports:
    """What became of the layers of a file, some of whose reports are here; a warning says which were not solved."""
    with QuantizedFile(quantized) as made:
        found = Reports({name: reports.get(name) or made.report(name) for name in made}, made.kept, made.skipped)
    if found.kept:
        warnings.warn(f"Could not be solved and stay float: {_listed(found.kept)}.", stacklevel=3)
    return found


def _listed(layers: dict[str, str]) -> str:
    """Names of layers, and what is to be said of the first of them."""
    some = [f"{name!r} ({what.rstrip('.')})" for name, what in itertools.islice(layers.items(), FEW)]
    more = f" and {len(layers) - FEW} more" if len(layers) > FEW else ""
    return ", ".join(some) + more


def _run(calibration: Path, options: dict[str, Any], of_layer: dict[str, int]) -> dict[str, Any]:
    """What the result depends on, checked options as plain values."""
    with hdf5.reading(calibration):
        content = fingerprint(calibration)
    steps = recipes.recipe(options["recipe"])
    size, share = checks.group_size(options["group_size"]), options["shrinkage"]
    codes: dict[str, Any] = {"bits": of_layer, "levels": None}
    if len(set(of_layer.values())) <= 1:  # however that was said
        width = min(of_layer.values(), default=checks.MAX_BITS)
        codes = dict(zip(codes, checks.bits_and_levels(width, options["levels"]), strict=True))
    given = {"recipe": steps.name, "group_size": size, "shrinkage": checks.shrinkage(share)}
    fields = {f"the recipe's {name}": value for name, value in dataclasses.asdict(steps).items() if name != "name"}
    flags = {name: bool(options[name]) for name in ("symmetric", "fit_bias")}
    return {CONTENT: content, **options, **given, **codes, **flags, **fields}  # first what is most likely another one
