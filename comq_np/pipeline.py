"""From file to file: solve every layer of a calibration file, and verify what came of it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from comq_np import checks, hdf5, recipes
from comq_np.durable import fingerprint
from comq_np.gram import Gram
from comq_np.recipes import Recipe
from comq_np.result import QuantizedArray, SolveReport
from comq_np.solver import solve
from comq_np.store import CalibrationFile, Layer, Path, QuantizedFile, QuantizedWriter

#: Relative difference that the order of a float64 sum may leave between two computations of an objective.
ROUNDING = 1e-6
#: The same for an objective that is next to nothing, relative to (sum_i sqrt(G_ii) |e_i|)**2, which no error e exceeds.
FLOOR = 1e-12


def quantize_file(
    calibration: Path,
    quantized: Path,
    bits: int = 4,
    *,
    recipe: str | Recipe = "balanced",
    group_size: int | Literal["tensor"] | None = None,
    symmetric: bool = False,
    levels: int | None = None,
    zero_point: Literal["integer", "real"] = "integer",
    fit_bias: bool = True,
    shrinkage: float | Literal["auto"] = "auto",
    backend: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    progress: bool = False,
    restart: bool = False,
) -> dict[str, SolveReport]:
    """Solve every layer of a calibration file and write the quantized file.

    Each layer is on the disk as soon as it is solved, in a folder beside the file. Where that was interrupted, the same
    call goes on after the layers that are finished, and makes the same file.

    Parameters
    ----------
    calibration : str or path-like
        Calibration file, as an adapter's ``capture`` or `CalibrationWriter` writes it.
    quantized : str or path-like
        Quantized file to write; it is put in its place when complete.
    bits : int from 1 to 16
        Bits of one code.
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
    fit_bias : bool
        Whether the bias of each layer that has one takes up the mean of the output error.
    shrinkage : float from 0 to 1, or "auto"
        How much the Gram matrices are shrunk; "auto" chooses it for each layer, where the recipe allows it.
    backend : {"auto", "cpu", "cuda"}
        Where to solve; "auto" takes a GPU where there is one.
    threads : int >= 1, optional
        Threads to use, by default one for each core.
    progress : bool
        Whether to show a progress bar on standard error.
    restart : bool
        Whether to drop the layers that an interrupted run has finished. Where the calibration file, an option (but for
        `threads`) or the version of comq_np is another one, there is no going on from these.

    Returns
    -------
    dict of SolveReport
        The report of each layer, by name; ``seconds`` is None in those that an interrupted run has finished.

    Raises
    ------
    InputError
        If an option is not as `solve` wants it, a layer cannot be solved (the message names it), or both files are one.
    FileError
        If a file cannot be read or written, another process writes `quantized`, or layers of another run are kept.

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
    if os.path.realpath(calibration) == os.path.realpath(quantized):
        raise checks.InputError(
            f"`quantized` must be another file than `calibration`, got {os.fspath(quantized)!r} twice."
        )
    options: dict[str, Any] = {
        "recipe": recipe,
        "group_size": group_size,
        "symmetric": symmetric,
        "levels": levels,
        "zero_point": zero_point,
        "shrinkage": shrinkage,
        "backend": backend,
    }
    _check(bits, {**options, "fit_bias": fit_bias, "threads": threads})
    reports = {}
    with CalibrationFile(calibration) as source:
        run = _run(calibration, bits, {**options, "fit_bias": fit_bias})
        with QuantizedWriter(quantized, run=run, order=source, restart=restart) as target:
            left = [name for name in source if name not in target]
            finished = len(source) - len(left)
            for name in tqdm(
                left, desc="solve", unit="layer", total=len(source), initial=finished, disable=not progress
            ):
                layer = source[name]
                with checks.layer(name):
                    fit = fit_bias and layer.bias is not None
                    q = solve(layer.weight, layer.gram, bits, fit_bias=fit, threads=threads, **options)
                target.add(name, q)
                reports[name] = q.report
    with QuantizedFile(quantized) as made:
        return {name: reports.get(name) or made.report(name) for name in made}


def _run(calibration: Path, bits: int, options: dict[str, Any]) -> dict[str, object]:
    """What the result depends on, checked options as plain values."""
    with hdf5.reading(calibration):
        content = fingerprint(calibration)
    steps = recipes.recipe(options["recipe"])
    size, share = checks.group_size(options["group_size"]), options["shrinkage"]
    codes = dict(zip(("bits", "levels"), checks.bits_and_levels(bits, options["levels"]), strict=True))
    given = {"recipe": steps.name, "group_size": size, "shrinkage": share if share == "auto" else float(share)}
    fields = {f"the recipe's {name}": value for name, value in dataclasses.asdict(steps).items() if name != "name"}
    flags = {name: bool(options[name]) for name in ("symmetric", "fit_bias")}
    said = {"the content of the calibration file": content, "bits": bits}  # first what is most likely another one
    return {**said, **options, **given, **codes, **flags, **fields}


def _check(bits: int, options: dict[str, Any]) -> None:
    """Refuse wrong options before there is any work done, by solving for a single weight."""
    gram = Gram(1)
    gram.update([[1.0]])
    solve([[1.0]], gram, bits, **options)


@dataclasses.dataclass(frozen=True)
class Verification:
    """What came of recomputing the objective of one layer from its stored codes.

    Parameters
    ----------
    name : str
        Name of the layer.
    reported : float
        Objective in the stored report.
    recomputed : float
        Objective of the stored codes on the Gram of the calibration file.
    matches : bool
        Whether they are the same up to rounding, and so is the bias shift, where there is one.

    Examples
    --------
    >>> import comq_np
    >>> comq_np.Verification("fc", 1.0, 2.0, matches=False).name
    'fc'
    """

    name: str
    reported: float
    recomputed: float
    matches: bool


def verify_file(calibration: Path, quantized: Path, *, progress: bool = False) -> list[Verification]:
    """Recompute the objective of every layer from its stored codes and compare it with the stored report.

    Parameters
    ----------
    calibration : str or path-like
        Calibration file that `quantized` was solved from.
    quantized : str or path-like
        Quantized file.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    list of Verification
        One for each layer of the quantized file.

    Raises
    ------
    FileError
        If a file cannot be read, or the files do not hold the same layers.

    Examples
    --------
    >>> import comq_np, numpy as np, os, tempfile
    >>> folder, gram = tempfile.mkdtemp(), comq_np.Gram(2)
    >>> gram.update([[1.0, 2.0], [3.0, 0.0]])
    >>> calibration, quantized = (os.path.join(folder, name) for name in ("calibration.h5", "quantized.h5"))
    >>> with comq_np.CalibrationWriter(calibration) as file:
    ...     file.add(comq_np.Layer("fc", np.array([[0.3, 1.0], [0.1, 2.0]]), gram))
    >>> reports = comq_np.quantize_file(calibration, quantized, bits=3)
    >>> [layer.matches for layer in comq_np.verify_file(calibration, quantized)]
    [True]
    """
    with CalibrationFile(calibration) as source, QuantizedFile(quantized) as target:
        for here, there, path in ((source, target, quantized), (target, source, calibration)):
            missing = [name for name in here if name not in there]
            if missing:
                raise checks.FileError(f"{path}: must hold layer {missing[0]!r}, as the other file does, but lacks it.")
        layers = []
        for name in tqdm(target, desc="verify", unit="layer", disable=not progress):
            layer = source[name]  # the layer before is let go only now: a Gram that they share is not read again
            layers.append(_verify(layer, target[name]))
        return layers


def _verify(layer: Layer, q: QuantizedArray) -> Verification:
    if q.codes.shape != layer.weight.shape:
        raise checks.FileError(
            f"layer {layer.name!r}: must have codes of shape {layer.weight.shape}, as its weight has, "
            f"has {q.codes.shape}."
        )
    E = layer.weight.astype(np.float64) - q.dequantize()
    G = layer.gram.matrix if q.bias_shift is None else layer.gram.centred
    recomputed, reported = max(float(np.vdot(E, G @ E)), 0.0), q.report.objective  # as `solve` reports it
    most = np.sqrt(np.maximum(G.diagonal(), 0)) @ np.abs(E)
    matches = abs(recomputed - reported) <= ROUNDING * max(recomputed, reported) + FLOOR * float(most @ most)
    if q.bias_shift is not None:
        shift = layer.gram.mean @ E
        matches = matches and np.allclose(q.bias_shift, shift, rtol=1e-5, atol=1e-6 * np.abs(shift).max())
    return Verification(layer.name, reported, recomputed, bool(matches))
